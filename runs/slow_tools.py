"""Do slow tools hold up a rollout? 128 rows of 3 calls with the real sandbox in throughput mode
(--rejoin_ticks 0, a worker per row): every snippet sleeps 0.5 s, against the same rows whose snippets do not.

    python runs/slow_tools.py            # prints one line per measurement and their ratio
"""
import asyncio
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import numpy as np  # noqa: E402

import rollout  # noqa: E402
import sft  # noqa: E402
from sandbox import Sandbox  # noqa: E402

ROWS, CALLS, SEGMENT, REPEATS = 128, 3, (48, 96), 3


def workload(tokenizer, code, seed=0):
    """(prompts, scripts): each segment has 48-95 tokens and ends with the snippet, the last with EOS."""
    rng = np.random.default_rng(seed)
    ordinary = np.setdiff1d(np.arange(len(tokenizer)), tokenizer.all_special_ids)
    snippet = rollout.encode_text(tokenizer, f"<code>{code}</code>")
    prompts, scripts = [], []
    for _ in range(ROWS):
        script, n = {}, 0
        for call in range(CALLS + 1):
            ending = snippet if call < CALLS else [tokenizer.eos_token_id]
            n += max(len(ending), int(rng.integers(*SEGMENT)))
            script |= dict(zip(range(n - len(ending), n), ending))
        scripts.append(script)
        prompts.append(rng.choice(ordinary, 32).tolist())
    return prompts, scripts


async def measure(model, tokenizer, sandbox, code):
    """(wall seconds, seconds without a row to decode) of one rollout."""
    prompts, scripts = workload(tokenizer, code)

    def process(logits, trajectories):
        tokens = [scripts[t.prompt_index].get(sum(t.loss_mask), -1) for t in trajectories]
        return rollout.force(logits, tokens, tokenizer.eos_token_id)
    stats, begin = {}, time.perf_counter()
    done = await rollout.generate(model, tokenizer, prompts, sandbox, n_slots=ROWS, rejoin_ticks=0,
                                  stats=stats, max_response_tokens=900, logits_processor=process)
    seconds = time.perf_counter() - begin
    statuses = [call.status for t in done for call in t.tool_calls]
    assert statuses == ["ok"] * (ROWS * CALLS), {s: statuses.count(s) for s in statuses}
    return seconds, stats["tool_wait_seconds"]


async def main():
    tokenizer = sft.load_tokenizer("")
    model = sft.load_model("", tokenizer, "cpu").eval()
    # Snippets of the same length, for they are sampled too.
    seconds = {"__import__('time').sleep(0.0)": [], "__import__('time').sleep(0.5)": []}
    async with Sandbox(workers=ROWS, timeout=2.0) as sandbox:
        print(sandbox.report)
        for _ in range(REPEATS):
            for code, found in seconds.items():
                wall, waited = await measure(model, tokenizer, sandbox, code)
                found.append(wall)
                print(f"{code} {wall:6.1f} s, of it {waited:.1f} s waiting for snippets", flush=True)
    instant, slow = map(statistics.median, seconds.values())
    print(f"{ROWS} rows of {CALLS} calls, all of them sleep 0.5 s: {slow / instant:.2f} times the wall time")


if __name__ == "__main__":
    asyncio.run(main())
