"""Packed against padded training, and the peak memory of the chunked head.

    python tests/bench_trainer.py
    python tests/bench_trainer.py --trl CHECKPOINT    # a whole step against TRL's GRPO step (pip install trl)
"""
import copy
import math
import random
import resource
import sys
import time
from pathlib import Path

import torch
from torch import nn
from transformers import AutoModelForCausalLM, Qwen2Config

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import rollout  # noqa: E402
import sft  # noqa: E402
from sft import Policy, collate, make_example, pack  # noqa: E402


def head_benchmark():
    """Prints the peak memory of the chunked head and of all logits at once. First in a process: memory that
    was used before hides a peak."""
    tokens, vocabulary, grown = 4096, 38016, {}  # a quarter of 16k tokens, a quarter of Qwen's vocabulary
    config = Qwen2Config(vocab_size=vocabulary, hidden_size=32, num_hidden_layers=1, num_attention_heads=2,
                         num_key_value_heads=1, intermediate_size=32, tie_word_embeddings=True)
    policy = Policy(AutoModelForCausalLM.from_config(config, attn_implementation="retool"))
    ids = torch.randint(0, vocabulary, (tokens,))
    flat, packing = collate([make_example(ids.tolist(), [1] * tokens)], "cpu")
    peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024  # noqa: E731  (MiB)
    for name, sft.LOGIT_BYTES["cpu"] in (("warm-up", 1 << 18), ("chunked", (256 << 20) // 16), ("full", 1 << 40)):
        before = peak()
        policy(flat.input_ids, flat.targets, flat.loss_mask, packing)[0].sum().backward()
        grown[name] = peak() - before
    full_mib = 4 * tokens * vocabulary / 2**20
    print(f"head, {tokens} tokens, vocabulary {vocabulary}: peak memory grows by "
          f"{grown['chunked']:.0f} MiB in"
          f" chunks of 16 MiB of logits, by {grown['full']:.0f} MiB with all {full_mib:.0f} MiB at once: "
          f"{100 * grown['chunked'] / grown['full']:.1f} %. Both grow with the logits that exist at one time,"
          " so 16k tokens of 152k in chunks of 256 MiB have the same ratio.")


def packing_benchmark():
    """Prints the tokens per second of packed and of padded training on the same sequences."""
    config, tokenizer = sft.starting_point("")
    ours = sft.starting_model("", config, 0).train()
    # a copy: transformers would write "sdpa" into the config of `ours` as well
    theirs = AutoModelForCausalLM.from_config(copy.deepcopy(ours.config), attn_implementation="sdpa")
    theirs.load_state_dict(ours.state_dict())
    policy, rng = Policy(ours), random.Random(0)
    lengths = [round(math.exp(rng.uniform(math.log(64), math.log(1024)))) for _ in range(64)]
    tokens = [[rng.randrange(len(tokenizer)) for _ in range(n + 1)] for n in lengths]
    examples = [make_example(ids, [1] * len(ids)) for ids in tokens]

    def packed():
        total = 0.0
        for indices in pack(lengths, 8192, 1)[0]:
            flat, packing = collate([examples[i] for i in indices], "cpu")
            loss = -policy(flat.input_ids, flat.targets, flat.loss_mask, packing)[0].sum()
            loss.backward()
            total += loss.item()
        return total

    def padded():  # as it is usually done: batches in the order of arrival, filled up to their longest
        total = 0.0
        for begin in range(0, len(examples), 8):
            batch = [nn.utils.rnn.pad_sequence([getattr(e, name) for e in examples[begin:begin + 8]], batch_first=True)
                     for name in ("input_ids", "targets", "loss_mask")]
            ids, targets, mask = batch  # (8, longest)
            logits = theirs(input_ids=ids, attention_mask=mask, use_cache=False).logits
            losses = nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
            loss = (losses * mask.flatten()).sum()
            loss.backward()
            total += loss.item()
        return total

    rates = {packed: [], padded: []}
    for _ in range(4):
        for run in rates:
            begin = time.perf_counter()
            loss = run()
            rates[run].append(sum(lengths) / (time.perf_counter() - begin))
            print(f"{run.__name__}: loss {loss:.2f}, {rates[run][-1]:.0f} tokens/s", flush=True)
    best, twin = max(rates[packed]), max(rates[padded])
    print(f"packed training: {best / twin:.2f} times the tokens per second of padded, lengths 64 to 1024; "
          f"ideal {8 * sum(max(lengths[i:i + 8]) for i in range(0, 64, 8)) / sum(lengths):.2f}")


def trl_benchmark(checkpoint, rounds=6):
    """Prints the seconds of one step on a checkpoint of the embedded default, in turns in one process: TRL's GRPO
    step (256 text responses to 32 prompts, one update), the same work by ppo.py, and ppo.py's full step (critic,
    real tools, four minibatches). Medians without the first round; ratios to TRL."""
    import asyncio
    import tempfile

    from datasets import Dataset
    from transformers import AutoModelForCausalLM, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    import eval as evaluation
    import ppo
    from data import embedded_rows
    from sandbox import Sandbox

    tokens, folder = 320, tempfile.mkdtemp()
    tokenizer = rollout.load_tokenizer(checkpoint)
    rows = embedded_rows("train", 32 * (rounds + 2), 1)
    prompts = Dataset.from_list([{"prompt": [{"role": "user", "content": row["question"]}], "answer": row["answer"]}
                                 for row in rows])
    reward = lambda completions, answer, **_: [  # noqa: E731
        1.0 if a in c[0]["content"] else -1.0 for c, a in zip(completions, answer)]
    theirs = GRPOTrainer(
        AutoModelForCausalLM.from_pretrained(checkpoint), reward, train_dataset=prompts, processing_class=tokenizer,
        args=GRPOConfig(folder, per_device_train_batch_size=256, num_generations=8, max_completion_length=tokens,
                        temperature=1.0, max_steps=rounds, use_cpu=True, bf16=False, report_to="none",
                        learning_rate=1e-6, save_strategy="no", disable_tqdm=True, gradient_checkpointing=False))
    small = ["--actor_lr", "1e-6"]
    work = {"GRPO": ["--advantage", "grpo", "--samples_per_prompt", "8", "--prompts_per_step", "32", "--tools", "off",
                     "--code_share", "0", "--minibatches", "1", *small], "PPO": ["--critic_warmup", "0", *small]}
    seconds = {"TRL GRPO": [], "GRPO": [], "PPO": []}

    with evaluation.distributed() as process, asyncio.Runner() as runner:
        trainers = {name: ppo.Trainer(ppo.parse_arguments(flags), checkpoint, process)
                    for name, flags in work.items()}
        sandbox = runner.run(Sandbox(timeout=0.5).__aenter__())

        class Turns(TrainerCallback):
            def on_step_begin(self, args, state, control, **kwargs):
                self.begin = time.perf_counter()

            def on_step_end(self, args, state, control, **kwargs):
                seconds["TRL GRPO"].append(time.perf_counter() - self.begin)
                for name, trainer in trainers.items():
                    source = ppo.Prompts(None, 1, tokenizer, "{question}", 512)
                    begin = time.perf_counter()
                    _, found = runner.run(ppo.train_step(trainer, source, sandbox, tokenizer, state.global_step))
                    seconds[name].append(time.perf_counter() - begin)
                    length = sum(len(x.response_ids) for x in found) / len(found)
                    print(f"{name}: {seconds[name][-1]:.1f} s, {len(found)} responses of {length:.0f} tokens; "
                          f"TRL {seconds['TRL GRPO'][-1]:.1f} s", flush=True)

        theirs.add_callback(Turns())
        theirs.train()
        runner.run(sandbox.__aexit__())
    print(theirs.state.log_history[-2:])
    median = {name: sorted(found[1:])[len(found) // 2 - 1] for name, found in seconds.items()}
    print(", ".join(f"{name} {value:.1f} s ({value / median['TRL GRPO']:.2f} of TRL's)" for name, value in median.items()))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--trl"]:
        trl_benchmark(sys.argv[2])
    else:
        head_benchmark()
        packing_benchmark()
