"""The engine against its slow twin: token for token, then the tokens per second of both.

    python tests/bench_rollout.py                # the embedded model, random weights
    python tests/bench_rollout.py --model DIR    # a checkpoint, on a GPU if there is one
    python tests/bench_rollout.py --slow_tools   # do snippets that sleep hold up a rollout?
    python tests/bench_rollout.py --delays --model DIR   # what a distant sandbox would cost a trained checkpoint
    python tests/bench_rollout.py --plain        # text without tools against plain `generate`; operations per tick
    python tests/bench_rollout.py --pages        # attention over a paged cache against slots
    python tests/bench_rollout.py --gain RUN/rollouts.jsonl --model RUN/checkpoint   # how many more rows fit in pages
"""
import argparse
import asyncio
import contextlib
import copy
import itertools
import json
import math
import resource
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import rollout  # noqa: E402
import sft  # noqa: E402
from data import embedded_problem, embedded_rows  # noqa: E402
from eval import stated_answer  # noqa: E402
from rollout import (  # noqa: E402
    CODE_CLOSE,
    CODE_OPEN,
    DTYPES,
    KVCache,
    Pieces,
    encode_interpreter,
    encode_prompt,
    encode_text,
    forward_step,
    generate,
    load_model,
    load_template,
    sample,
    split_segments,
    strip_fence,
)
from sandbox import Sandbox, SandboxResult, UserError  # noqa: E402


def slow_twin(model, tokenizer, prompts, run_tool, batch_size, max_interpreter_tokens=128, scripts=None):
    """Greedy tool use as everyone writes it first: Hugging Face `generate` turn by turn, every turn prefilled
    from scratch.

    model: loaded with attention of its own ("sdpa"). run_tool(code) -> text. scripts: see `force`. Returns
    the response ids of each prompt. The batch goes in lock step: a row that closes its snippet waits for the
    longest, and pays for padding.
    """
    pieces, eos = Pieces(tokenizer), tokenizer.eos_token_id
    pad = next(token for token in tokenizer.all_special_ids if token != eos)  # some tokenizers have no other
    responses, sampled = [[] for _ in prompts], [0] * len(prompts)

    def closed(ids):
        """What the last token holds beyond the closing tag it completed; None if it completed none."""
        text = "".join(pieces[t] for t in ids[-len(CODE_CLOSE):])
        _, tag, overrun = text.partition(CODE_CLOSE)
        return overrun if tag and len(overrun) < len(pieces[ids[-1]]) else None

    for first in range(0, len(prompts), batch_size):
        live = list(range(first, min(first + batch_size, len(prompts))))
        while live:
            contexts = [prompts[i] + responses[i] for i in live]
            width = max(map(len, contexts))
            ids = torch.tensor([[pad] * (width - len(c)) + c for c in contexts], device=model.device)
            mask = torch.tensor([[0] * (width - len(c)) + [1] * len(c) for c in contexts], device=model.device)

            def processor(input_ids, scores):
                done = input_ids.shape[1] - width
                return force(scores, [scripts[i].get(sampled[i] + done, -1)
                                      for i in live], eos) if scripts else scores

            def stop(input_ids, scores, **kwargs):
                done = [closed(row) is not None for row in input_ids[:, -len(CODE_CLOSE):].tolist()]
                return torch.tensor(done, device=model.device)

            out = model.generate(ids, attention_mask=mask, do_sample=False, eos_token_id=eos,
                                 pad_token_id=pad,
                                 max_new_tokens=model.config.max_position_embeddings - width,
                                 stopping_criteria=[stop], logits_processor=[processor])
            still = []
            for i, row in zip(live, out[:, width:].tolist()):
                while row[-1] == pad:
                    row.pop()
                sampled[i] += len(row)
                begin = len(responses[i])
                responses[i] += row
                if row[-1] == eos:
                    continue
                overrun = closed(responses[i])
                if overrun is None:
                    continue
                text = tokenizer.decode(responses[i][begin:], clean_up_tokenization_spaces=False)
                _, opened, code = text[:-len(CODE_CLOSE + overrun)].rpartition(CODE_OPEN)
                if opened:  # else a closing tag that closes nothing, and the row goes on
                    responses[i] += encode_interpreter(tokenizer, run_tool(strip_fence(code)),
                                                       max_interpreter_tokens, overrun)
                still.append(i)
            live = still
    return responses


def force(logits, tokens, eos):
    """Make row i's next token tokens[i]; where that is -1 the model is free, except that it may not end. In
    place."""
    tokens = torch.tensor(tokens, device=logits.device)
    logits[:, eos] = -torch.inf
    scripted = (tokens >= 0).nonzero()[:, 0]
    logits[scripted] = -torch.inf
    logits[scripted, tokens[scripted]] = 0.0
    return logits


class InstantSandbox:
    """Answers from a table: engines are compared without the tool's own time."""

    def __init__(self, answer):
        self.answer = answer

    async def run(self, code, seed=0):
        return SandboxResult("ok", self.answer(code))


def follow(scripts, eos):
    """The logits_processor of `generate` that forces what scripts[prompt_index] says: {position: token}."""
    def process(logits, trajectories):
        return force(logits, [scripts[t.prompt_index].get(sum(t.loss_mask), -1) for t in trajectories], eos)

    return process


def ragged_workload(tokenizer, rows, seed, code="1", shortest=8, longest=128):
    """1-4 calls per row, segments of log-uniform 8-128 tokens: (prompts, scripts, answer). Only a segment's
    ending is forced (a snippet, at last EOS), everything before it is computed greedily."""
    rng = np.random.default_rng(seed)
    snippet = encode_text(tokenizer, f"<code>{code}</code>")
    ordinary = np.setdiff1d(np.arange(len(tokenizer)), tokenizer.all_special_ids)
    prompts, scripts = [], []
    for _ in range(rows):
        script, n, calls = {}, 0, rng.integers(1, 5)
        for segment in range(calls + 1):
            ending = snippet if segment < calls else [tokenizer.eos_token_id]
            n += max(len(ending), round(np.exp(rng.uniform(np.log(shortest), np.log(longest)))))
            script |= dict(zip(range(n - len(ending), n), ending))
        prompts.append(rng.choice(ordinary, rng.integers(16, 65)).tolist())
        scripts.append(script)
    return prompts, scripts, lambda code: "1234567"


def trace_workload(tokenizer, rows, seed):
    """The embedded default's own prompts, answered word for word with its cold-start traces (40 % code), all
    forced."""
    prompts, scripts, outputs = [], [], {}
    for i in range(rows):
        problem = embedded_problem("test", seed, i)
        prompts.append(encode_prompt(tokenizer, "{question}", problem.question))
        segments = split_segments(problem.by_code if i % 5 < 2 else problem.by_hand)
        ids = [token for kind, text in segments if kind == "model" for token in encode_text(tokenizer, text)]
        scripts.append(dict(enumerate(ids + [tokenizer.eos_token_id])))
        for (_, before), (kind, output) in zip(segments, segments[1:]):
            if kind == "interpreter":
                outputs[strip_fence(before.split(CODE_OPEN)[1].split(CODE_CLOSE)
                                    [0])] = output or "OverflowError: math range error"
    return prompts, scripts, outputs.__getitem__


async def slow_tools(model, tokenizer, rows=128, repeats=3):
    """Do slow tools hold up a rollout? Throughput mode, the real sandbox with a worker per row: all snippets
    sleep for 0.5 s, against the same rows with snippets that do not. Prints the ratio of the medians."""
    seconds = {"0.0": [], "0.5": []}
    async with Sandbox(workers=rows, timeout=2.0) as sandbox:
        print(sandbox.report)
        for pause in list(seconds) * repeats:
            prompts, scripts, _ = ragged_workload(tokenizer, rows, 0, f"__import__('time').sleep({pause})",
                                                  shortest=64, longest=256)
            begin, stats = time.perf_counter(), {}
            trajectories = await generate(
                model, tokenizer, prompts, sandbox, n_slots=rows, rejoin_ticks=0, max_response_tokens=1800,
                stats=stats, logits_processor=follow(scripts, tokenizer.eos_token_id))
            seconds[pause].append(time.perf_counter() - begin)
            statuses = [call.status for t in trajectories for call in t.tool_calls]
            assert set(statuses) == {"ok"}, statuses
            print(f"{rows} rows, {len(statuses)} snippets of {pause} s: {seconds[pause][-1]:.1f} s, of it "
                  f"{stats['tool_wait_seconds']:.1f} s without a row to decode", flush=True)
    ratio = np.median(seconds["0.5"]) / np.median(seconds["0.0"])
    print(f"snippets that sleep 0.5 s: {ratio:.2f} times the wall time of instant ones")


@contextlib.contextmanager
def watched():
    """What `generate` asks of the model meanwhile: forward calls and tokens fed; slots, slots in use and tokens
    in them, the latter summed over the calls."""
    seen, forward_step = Counter(), rollout.forward_step

    def watch(model, cache, slots, tokens):
        logits = forward_step(model, cache, slots, tokens)
        seen.update(calls=1, tokens_fed=sum(map(len, tokens)), kv_tokens=sum(cache.lengths),
                    slots_used=sum(map(bool, cache.lengths)))
        seen["slots"], seen["slot_tokens"] = len(cache.lengths), cache.k.shape[3]
        if cache.is_paged:  # on average
            seen["slot_tokens"] = cache.k.shape[1] * cache.k.shape[2] // len(cache.lengths)
        return logits
    rollout.forward_step = watch
    try:
        yield seen
    finally:
        rollout.forward_step = forward_step


class Distant:
    """A sandbox whose answers arrive so many seconds later, as from another machine."""

    def __init__(self, sandbox, seconds):
        self.sandbox, self.seconds = sandbox, seconds

    async def run(self, *arguments, **options):
        result = await self.sandbox.run(*arguments, **options)
        await asyncio.sleep(self.seconds)
        return result


async def delays(model, tokenizer, rows=256, repeats=3):
    """Rollouts as the default makes them, with 0 to 2 s of delay per call, in turns: prints the median seconds and the
    share of right answers, then JSON. Without rejoin_ticks=0 the tokens do not depend on the clock (asserted)."""
    problems, found, same = embedded_rows("test", rows), {}, {}
    prompts = [encode_prompt(tokenizer, load_template("plain"), row["question"]) for row in problems]
    async with Sandbox(workers=2, timeout=0.5) as sandbox:
        service = rollout.Service(sandbox, busy=0.3)
        for ticks, delay in list(itertools.product((4, 0), (0.0, 0.1, 0.5, 2.0))) * repeats:
            begin = time.perf_counter()
            trajectories = await generate(model, tokenizer, prompts, Distant(service, delay), n_slots=128,
                                          max_response_tokens=320, max_calls=3, rejoin_ticks=ticks)
            found.setdefault((ticks, delay), []).append(time.perf_counter() - begin)
            tokens = [t.response_ids for t in trajectories]
            assert not ticks or tokens == same.setdefault(ticks, tokens)
            right = np.mean([stated_answer(t, tokenizer) == row["answer"] for t, row in zip(trajectories, problems)])
            found[ticks, delay, "right"] = float(right)
    table = [{"rejoin_ticks": ticks, "delay": delay, "rollout_seconds": float(np.median(found[ticks, delay])),
              "accuracy": found[ticks, delay, "right"]} for ticks, delay, *rest in found if not rest]
    for row in table:
        print(*(f"{name} {value:.3g}" for name, value in row.items()))
    print(json.dumps(table))


class Operations(TorchDispatchMode):
    """Counts the operations that reach the dispatcher; views cost a GPU nothing."""
    VIEWS = set("alias as_strided detach expand permute select slice split squeeze t transpose unsqueeze view".split())

    def __init__(self):
        super().__init__()
        self.kernels = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.kernels += function.overloadpacket.__name__ not in self.VIEWS
        return function(*args, **(kwargs or {}))


def plain(ours, twin, tokenizer, tokens=64, repeats=5):
    """Text without tools, `tokens` each, against Hugging Face `generate` on the same prompts, in turns: prints the
    ratio of the medians, then what one tick of decoding asks of the device."""
    rng = np.random.default_rng(0)
    ordinary = np.setdiff1d(np.arange(len(tokenizer)), tokenizer.all_special_ids)
    never_end = lambda logits, _: logits.index_fill(1, torch.tensor(tokenizer.eos_token_id), -torch.inf)  # noqa: E731
    for rows in (1, 8, 64, 256):
        prompts, seconds = rng.choice(ordinary, (rows, 32)).tolist(), {"ours": [], "generate": []}
        for _ in range(repeats if rows > 8 else 3 * repeats):
            begin = time.perf_counter()
            asyncio.run(generate(ours, tokenizer, prompts, None, tools=False, n_slots=rows,
                                 max_response_tokens=tokens, logits_processor=never_end))
            middle = time.perf_counter()
            with torch.inference_mode():
                twin.generate(torch.tensor(prompts), attention_mask=torch.ones(rows, 32), do_sample=True, top_k=0,
                              max_new_tokens=tokens, min_new_tokens=tokens, pad_token_id=tokenizer.pad_token_id)
            seconds["ours"].append(middle - begin)
            seconds["generate"].append(time.perf_counter() - middle)
        rates = {name: rows * tokens / np.median(found) for name, found in seconds.items()}
        print(f"{rows:4d} rows: {rates['ours']:7.0f} tokens/s, generate {rates['generate']:7.0f}: "
              f"{rates['ours'] / rates['generate']:.2f} times", flush=True)
    cache = KVCache(ours.config, 64, 96, ours.dtype, ours.device)
    forward_step(ours, cache, list(range(64)), prompts[:64])
    for name, pending in (("decode", [[7]] * 64), ("decode 48, resume 16", [[7]] * 48 + [[7] * 20] * 16)):
        with Operations() as counted:
            sample(forward_step(ours, cache, list(range(64)), pending), torch.zeros(64), 1.0, 1.0)
        print(f"operations of a tick in which 64 rows {name}, views aside, "
              f"{ours.config.num_hidden_layers} layers of {ours.config.model_type}: {counted.kernels}")


def pages(config, rows=128, size=32, repeats=30):
    """A decode step's attention of one layer, keys and values as a view of slots or gathered from pages of `size`
    tokens, in turns: prints the ratio of the medians. No PyTorch kernel on CPU reads pages where they lie."""
    _, _, heads, _, dim = KVCache.shape(config, 1, 1)
    queries = torch.randn(rows, heads, config.num_attention_heads // heads, dim)
    for length in (64, 128, 256):
        slots = torch.randn(2, rows, heads, 364, dim)
        paged = torch.randn(2, rows * length // size, heads, size, dim)
        table, bias = torch.randperm(rows * length // size).view(rows, -1), torch.zeros(rows, 1, 1, length)
        sources = {"slots": lambda x: slots[x, :, :, :length],
                   "pages": lambda x: paged[x][table].transpose(1, 2).reshape(rows, heads, length, dim)}
        seconds = {name: [] for name in sources}
        for name in list(sources) * repeats:
            begin = time.perf_counter()
            torch.nn.functional.scaled_dot_product_attention(queries, *map(sources[name], (0, 1)), attn_mask=bias)
            seconds[name].append(time.perf_counter() - begin)
        ratio = np.median(seconds["pages"]) / np.median(seconds["slots"])
        print(f"{rows} rows of {length} tokens: pages take {ratio:.1f} times as long as slots", flush=True)


def gain_of_pages(lengths, longest, page=rollout.PAGE_TOKENS):
    """How many times as many rows a cache of pages holds as one of slots of the longest row, in pages too.

    lengths: (prompt, response) of rows, in tokens. Rows are in flight as long as they are long, and hold the pages
    of what they have: pages(longest) / mean over all tokens of pages(prompt + tokens so far).
    """
    held, n_tokens = 0, 0
    for prompt, response in lengths:
        for so_far in range(1, response + 1):
            held += math.ceil((prompt + so_far) / page)
        n_tokens += response
    return math.ceil(longest / page) * n_tokens / held


def print_gain(path, tokenizer):
    """Of a run's rollouts: as they are, and for prompts and responses of 64 times the length."""
    rows = [json.loads(line) for line in Path(path).read_text().splitlines()]
    lengths = [(len(tokenizer.encode(row["prompt"], add_special_tokens=False)), len(row["tokens"])) for row in rows]
    arguments = json.loads((Path(path).parent / "arguments.json").read_text())["arguments"]
    for factor in (1, 64):
        scaled = [(factor * prompt, factor * response) for prompt, response in lengths]
        longest_prompt = max(prompt for prompt, _ in scaled)
        limit = factor * arguments["max_response_tokens"]
        print(f"{len(scaled)} rows, prompts of {np.mean(scaled, 0)[0]:.0f} tokens and at most {longest_prompt}, "
              f"responses of {np.mean(scaled, 0)[1]:.0f} and at most {limit}: pages hold "
              f"{gain_of_pages(scaled, longest_prompt + limit):.1f} times as many rows as slots")


def copy_bandwidth(device):
    """Bytes per second that the device reads and writes when it copies a large tensor; the best of five."""
    source = torch.zeros((1 << 32 if device.type == "cuda" else 1 << 28) // 4, device=device)
    target, best = torch.empty_like(source), math.inf
    for _ in range(5):
        begin = time.perf_counter()
        target.copy_(source)
        target[-1].item()  # waits for a GPU
        best = min(best, time.perf_counter() - begin)
    return 2 * source.numel() * 4 / best


def peak_gib(device):
    """Most memory used so far: the GPU's, or this process's."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**(20 if sys.platform == "linux" else 30)


async def benchmark(ours, twin, tokenizer, args):
    """Both engines on both workloads: equal token for token, then tokens/s; the last line is JSON."""
    bandwidth, report = copy_bandwidth(ours.device), {}
    weights = sum(p.numel() for p in ours.parameters())
    if not ours.config.tie_word_embeddings:
        weights -= ours.get_input_embeddings().weight.numel()  # only looked up
    kv_values = 2 * math.prod(KVCache.shape(ours.config, 1, 1))  # of one token

    async def run_ours(workload, n_slots, sandbox, rejoin_ticks=4):
        """(response ids, statistics)"""
        prompts, scripts, _ = workload
        limit = ours.config.max_position_embeddings - max(map(len, prompts))
        stats, begin = {}, time.perf_counter()
        with watched() as seen:
            trajectories = await generate(
                ours, tokenizer, prompts, sandbox, temperature=0, n_slots=n_slots, stats=stats,
                max_response_tokens=min(limit, 1024), rejoin_ticks=rejoin_ticks,
                max_calls=limit,  # a trained model adds calls of its own to the scripted ones
                logits_processor=follow(scripts, tokenizer.eos_token_id))
        # What cannot be done without: reading all weights, and each row's keys and values, once per tick.
        values = seen["calls"] * weights + seen["kv_tokens"] * kv_values
        found = {"seconds": time.perf_counter() - begin, "slots": seen["slots"],
                 "kv_filled": seen["kv_tokens"] / (seen["slots_used"] * seen["slot_tokens"]),
                 "kv_gib": seen["slots"] * seen["slot_tokens"] * kv_values * ours.dtype.itemsize / 2**30,
                 "tool_wait_seconds": stats["tool_wait_seconds"]}
        found["tokens_per_second"] = sum(sum(t.loss_mask) for t in trajectories) / found["seconds"]
        found["bandwidth_share"] = values * ours.dtype.itemsize / bandwidth / found["seconds"]
        return [t.response_ids for t in trajectories], found

    def run_twin(workload, batch_size):
        """(response ids, tokens per second)"""
        prompts, scripts, answer = workload
        begin = time.perf_counter()
        responses = slow_twin(twin, tokenizer, prompts, answer, batch_size, scripts=scripts)
        return responses, sum(max(script) + 1 for script in scripts) / (time.perf_counter() - begin)

    for name, make in (("ragged turns", ragged_workload), ("embedded traces", trace_workload)):
        if args.check_rows:
            workload = make(tokenizer, args.check_rows, 1)
            ours.double(), twin.double()
            same = (await run_ours(workload, 7, InstantSandbox(workload[2])))[0] == run_twin(workload, 8)[0]
            ours.float(), twin.float()
            print(f"{name}: {args.check_rows} greedy rows in float64, 7 slots, against Hugging Face generate "
                  f"turn by turn: {'identical' if same else 'DIFFERENT'}")
            if not same:
                raise SystemExit(1)
        workload, runs, twin_rates = make(tokenizer, args.rows, 0), [], []
        for size in args.batch_sizes:
            runs.append((await run_ours(workload, size, InstantSandbox(workload[2])))[1])
            twin_rates.append(run_twin(workload, size)[1])
            print(f"  batch {size:4d}: {runs[-1]['tokens_per_second']:7.0f} tokens/s, "
                  f"slow twin {twin_rates[-1]:7.0f}", flush=True)
        best = max(runs, key=lambda found: found["tokens_per_second"])
        best |= {"slow_twin_tokens_per_second": max(twin_rates),
                 "ratio": best["tokens_per_second"] / max(twin_rates), "peak_gib": peak_gib(ours.device)}
        if make is ragged_workload:  # its snippets are real ones
            async with Sandbox() as sandbox:
                with_tools = (await run_ours(workload, best["slots"], sandbox, rejoin_ticks=0))[1]
            best |= {f"sandbox_{key}": with_tools[key] for key in ("tokens_per_second", "tool_wait_seconds")}
            print(f"  with the real sandbox, throughput mode: {with_tools['tokens_per_second']:.0f} tokens/s, "
                  f"{with_tools['tool_wait_seconds']:.2f} s without a row to decode")
        print(f"  each at its best batch size: {best['ratio']:.2f} times the slow twin; "
              f"{100 * best['bandwidth_share']:.0f} % of what reading weights and cache at "
              f"{bandwidth / 1e9:.0f} GB/s would allow; rows fill {100 * best['kv_filled']:.0f} % of the slots "
              "they hold", flush=True)
        report[name] = best
    print(json.dumps({"model": args.model, "dtype": args.dtype, "device": str(ours.device)} | report))


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="",
                        help="checkpoint folder or hub id; empty: the embedded model, random weights")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32", help="of weights and cache")
    parser.add_argument("--rows", type=int, default=256, help="responses per measurement")
    parser.add_argument("--check_rows", type=int, default=24,
                        help="responses that are compared token for token, in float64; 0: none")
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=[32, 64, 128, 256],
                        help="tried for both engines")
    parser.add_argument("--slow_tools", action="store_true",
                        help="instead: rollouts whose snippets sleep, against instant ones, real sandbox")
    parser.add_argument("--delays", action="store_true", help="instead: rollouts of --model with delayed calls")
    parser.add_argument("--pages", action="store_true", help="instead: a paged cache against slots")
    parser.add_argument("--gain", metavar="FILE", help="instead: how many more rows fit in pages, for a run's lengths")
    parser.add_argument("--plain", action="store_true", help="instead: text without tools against `generate`")
    args = parser.parse_args()
    if args.dtype != "fp32" and not args.model:
        parser.error("--dtype bf16 needs --model")
    if args.check_rows and args.dtype != "fp32":
        parser.error("--check_rows compares in float64: --dtype bf16 needs --check_rows 0")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        config, tokenizer = sft.starting_point(args.model)
        ours = (load_model(args.model, device, args.dtype) if args.model
                else sft.starting_model("", config, 0))
    except UserError as error:
        sys.exit(f"error: {error}")
    ours.eval()
    if args.gain:
        print_gain(args.gain, tokenizer)
        return
    if args.pages:
        pages(config)
        return
    if args.delays:
        asyncio.run(delays(ours, tokenizer))
        return
    if args.slow_tools:
        asyncio.run(slow_tools(ours, tokenizer))
        return
    # a copy of the configuration: transformers would write "sdpa" into the one of `ours` as well
    twin = type(ours)._from_config(copy.deepcopy(ours.config), attn_implementation="sdpa", dtype=ours.dtype)
    twin.to(device).eval().load_state_dict(ours.state_dict())
    if args.plain:
        plain(ours, twin, tokenizer)
        return
    asyncio.run(benchmark(ours, twin, tokenizer, args))


if __name__ == "__main__":
    main()
