"""Where does the format come from? Traces, the warm start on them, and what both trainers share:
examples, packing, the policy, sharding, checkpoints.

The warm start is a masked next-token loss on traces. Differences from the paper:
 1. The traces were executed; a quoted output that is not the real one rejects a trace.
 2. Snippets that failed stay, for the text corrects them, but are masked: the model learns to
    recover from errors, not to make them.
 3. A step's loss is a sum over trainable tokens, divided once by their global number: packing and
    ranks do not change it.

    torchrun sft.py                                      # CPU: the embedded warm start
    torchrun sft.py --model DIR --traces traces.jsonl --sft_lr 1e-5 ...     # a checkpoint
    torchrun --nproc_per_node 8 sft.py --model ...       # eight GPUs
    python sft.py curate --input gsm8k_train.jsonl --output traces.jsonl --decontaminate test.jsonl
    python sft.py curate --input traces.jsonl --output again.jsonl     # verifies finished traces

In shape comments: T tokens of a flat stream, n chosen ones, V vocabulary.
"""
if __name__ == "__main__":
    # The imports below take seconds, in which Ctrl-C is one line, too.
    from sandbox import end_at_interrupt
    end_at_interrupt()

import argparse
import ast
import asyncio
import contextlib
import ctypes
import fcntl
import functools
import hashlib
import itertools
import json
import math
import os
import random
import re
import shutil
import sys
import time
from collections import Counter
from dataclasses import dataclass, fields
from decimal import Decimal
from pathlib import Path
from types import SimpleNamespace

import tokenizers
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import transformers
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
)
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm
from transformers import AutoModelForCausalLM, Qwen3Config

from data import (
    FIELDS,
    NUMBER_IN_TEXT,
    boxed,
    embedded_problem,
    embedded_tokenizer,
    extract_answer,
    load_problems,
    numbers,
    read_row,
    read_rows,
    refuse_one_question,
    shape,
)
from eval import (
    FlagParser,
    Help,
    add_format_arguments,
    add_sandbox_arguments,
    add_to_journal,
    computes,
    is_equivalent,
    make_sandbox,
    need_values,
    parse_flags,
    read_journal,
    read_object,
    run_script,
    syntax_tree,
    use_device,
)
from rollout import (
    BUSY,
    BUSY_SEED,
    CLOSING,
    DTYPES,
    INTERPRETER_CLOSE,
    INTERPRETER_OPEN,
    TAG,
    TEMPLATE_KWARGS,
    TOOLS,
    Packing,
    Service,
    at_least,
    at_least_fp32,
    break_tags,
    encode_prompt,
    encode_response,
    encode_text,
    in_range,
    json_object,
    load_config,
    load_model,
    load_template,
    load_tokenizer,
    need_varlen,
    save_beside_weights,
    seed_number,
    split_segments,
    strip_fence,
    tool_of,
)
from runs.rewriters import make_rewriter
from sandbox import UserError

# -------------------------------------------------------------------------------------------------
# Examples: one position per token, packed into micro-batches

# Logits that exist at a time, in bytes: a CPU's cache is small.
LOGIT_BYTES = {"cuda": 256 << 20, "cpu": 32 << 20}


@dataclass
class Example:
    """One sequence for the trainer, or a packed micro-batch. Columns are (T,), T one less than the
    tokens: position t reads token t; other columns speak of token t + 1."""
    input_ids: torch.Tensor  # token t
    targets: torch.Tensor  # token t + 1
    loss_mask: torch.Tensor  # 1.0 where it is trained on
    sampled: torch.Tensor = None  # 1.0 where the policy sampled it
    sampler_logprobs: torch.Tensor = None  # by the sampler
    rewards: torch.Tensor = None
    logprobs: torch.Tensor = None  # by the trainer, before the update
    reference_logprobs: torch.Tensor = None  # by the model that training started from
    entropy: torch.Tensor = None  # of the distribution it was drawn from
    values: torch.Tensor = None  # of the state before it, before the update
    advantages: torch.Tensor = None
    returns: torch.Tensor = None  # what the values should be
    ratios: torch.Tensor = None  # its probability after the update / before

    def __len__(self):
        return len(self.input_ids)


def make_example(ids, loss_mask, **per_token):
    """An Example of columns aligned with the tokens: only here are they shifted."""
    columns = {"loss_mask": loss_mask, "sampled": loss_mask} | per_token
    example = Example(torch.tensor(ids[:-1]), torch.tensor(ids[1:]), None)
    for name, column in columns.items():
        setattr(example, name, torch.as_tensor(column, dtype=torch.float32)[1:])
    return example


def pack(lengths, token_budget, world):
    """result[rank][micro_batch]: lists of indices, equally many per rank, maybe empty."""
    assert lengths, "nothing to pack"
    # A bin holds at least the longest sequence.
    budget = max(token_budget, max(lengths))
    longest_first = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    bins_per_rank = max(1, math.ceil(sum(lengths) / (budget * world)))

    # The longest sequence goes first, each into the emptiest bin; more bins until all fit.
    while True:
        n_bins = bins_per_rank * world
        bins = [[] for _ in range(n_bins)]
        loads = [0] * n_bins
        for i in longest_first:
            emptiest = loads.index(min(loads))
            bins[emptiest].append(i)
            loads[emptiest] += lengths[i]
        if max(loads) <= budget:
            return [bins[rank::world] for rank in range(world)]
        bins_per_rank += 1


def say_floor(token_budget, longest):
    """Say it where the longest sequence, not --token_budget, bounds a micro-batch."""
    if token_budget < longest:
        print(f"--token_budget {token_budget}: a micro-batch holds at least the longest sequence, "
              f"which may have {longest} tokens", flush=True)


def collate(examples, device):
    """(flat Example (T,), its Packing); an empty micro-batch becomes one masked token."""
    if not examples:
        examples = [empty_example()]
    flat = Example(None, None, None)
    for name, column in vars(examples[0]).items():
        if column is not None:
            columns = [getattr(example, name) for example in examples]
            setattr(flat, name, torch.cat(columns).to(device))
    return flat, Packing([len(example) for example in examples], device)


def micro_batches(examples, token_budget, process):
    """This rank's share of a batch, as (indices, flat Example, Packing)."""
    lengths = [len(example) for example in examples]
    for indices in pack(lengths, token_budget, process.world)[process.rank]:
        flat, packing = collate([examples[i] for i in indices], process.device)
        yield indices, flat, packing


def empty_example():
    """One masked token, with every column that a loss may read."""
    example = Example(torch.zeros(1, dtype=torch.long), torch.zeros(1, dtype=torch.long), None)
    for field in fields(Example):
        if getattr(example, field.name) is None:
            setattr(example, field.name, torch.zeros(1))
    return example


class Policy(nn.Module):
    """A causal LM that returns log-probabilities."""

    def __init__(self, lm):
        super().__init__()
        self.lm = lm

    def forward(self, input_ids, targets, loss_mask, packing, temperature=1.0, with_entropy=False):
        """input_ids, targets, loss_mask (T,) -> (the targets' log-probabilities at the temperature,
        the entropies or None), each (T,), 0 where masked."""
        output = self.lm.model(
            input_ids=input_ids[None], position_ids=packing.position_ids[None],
            use_cache=False, packing=packing)
        hidden = output.last_hidden_state[0]  # (T, hidden)

        # CRUCIAL: the head takes unmasked tokens in chunks, so no (T, V) tensor ever exists. It is
        # in here, where FSDP has gathered its weights.
        chosen = loss_mask.nonzero()[:, 0]  # (n,)
        chunk = max(1, LOGIT_BYTES[hidden.device.type] // (4 * self.lm.config.vocab_size))

        # With several chunks the backward pass computes logits again.
        head = self.head
        if len(chosen) > chunk and torch.is_grad_enabled():
            head = functools.partial(checkpoint, self.head, use_reentrant=False)
        logprob_chunks = []
        entropy_chunks = []
        for indices in chosen.split(chunk):
            logprobs, entropy = head(
                hidden[indices], targets[indices], temperature, with_entropy)
            logprob_chunks.append(logprobs)
            entropy_chunks.append(entropy)

        def over_all_tokens(chunks):
            values = torch.cat(chunks)
            zeros = torch.zeros_like(input_ids, dtype=values.dtype)
            return zeros.index_put((chosen,), values)

        entropy = over_all_tokens(entropy_chunks) if with_entropy else None
        return over_all_tokens(logprob_chunks), entropy

    def head(self, hidden, targets, temperature, with_entropy):
        """hidden (n, hidden), targets (n,) -> logprobs (n,) and entropy (n,), or None."""
        logits = at_least_fp32(self.lm.lm_head(hidden)) / temperature  # (n, V)
        normaliser = torch.logsumexp(logits, -1)
        logprobs = logits.gather(-1, targets[:, None])[:, 0] - normaliser
        if not with_entropy:
            return logprobs, None
        entropy = normaliser - (torch.softmax(logits, -1) * logits).sum(-1)
        return logprobs, entropy


def trace_example(trace, tokenizer, template, max_interpreter_tokens, mask_interpreter=True,
                  mask_failed=True):
    """A trace as an Example: prompt, interpreter text and failed snippets are masked."""
    prompt = encode_prompt(tokenizer, template, trace["question"])
    masked_calls = trace["failed_calls"] if mask_failed else ()
    ids, mask = encode_response(
        tokenizer, trace["response"], max_interpreter_tokens, masked_calls, mask_interpreter)
    return make_example(prompt + ids, [0] * len(prompt) + mask)


# -------------------------------------------------------------------------------------------------
# Training


def batch_loss(policy, batch, token_budget, process, backward=False):
    """Mean loss over all trainable tokens of a list of Example, on all ranks; with backward
    also its gradient."""
    # Every rank has the whole batch, so all divide by the same number.
    total = sum(example.loss_mask.sum().item() for example in batch)
    token_sum = 0.0
    for _, flat, packing in micro_batches(batch, token_budget, process):
        with torch.set_grad_enabled(backward):
            logprobs, _ = policy(flat.input_ids, flat.targets, flat.loss_mask, packing)
            loss = -logprobs.sum()
        token_sum += loss.item()
        if backward:
            # FSDP averages the ranks' gradients; a factor of world makes that their sum.
            (loss / total * process.world).backward()
    return all_sum(token_sum, process.device) / total


def clipped_step(module, optimizers, max_norm, name):
    """Clip the gradient and apply it; returns its norm before. FloatingPointError where that is
    not finite."""
    norm = nn.utils.clip_grad_norm_(module.parameters(), max_norm).full_tensor().item()
    # Before a step, so that the weights are still those of the last checkpoint or step.
    if not math.isfinite(norm):
        raise FloatingPointError(f"{name} is {norm}")
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()
    return norm


def batches(n, batch_size, seed):
    """Endless lists of batch_size of n indices, or of all n if they are fewer, shuffled anew every
    epoch."""
    rng = random.Random(seed)
    order = []
    while True:
        if len(order) < batch_size:
            order += rng.sample(range(n), n)
        yield order[:batch_size]
        order = order[batch_size:]


def trapezoid(step, steps, warmup):
    """Learning-rate factor: linear warm-up, 1 until half-time, then a line down to 0."""
    return min(1.0, (step + 1) / max(1, warmup), (steps - step) / (0.5 * steps))


class Muon(torch.optim.Optimizer):
    """Steps along the orthogonalised momentum of each matrix (kellerjordan.github.io/posts/muon).
    It needs half the steps of AdamW here."""
    # In fp32: torch.optim.Muon works in bf16, which many CPUs only emulate.

    def __init__(self, matrices, lr, momentum=0.95):
        super().__init__(matrices, {"lr": lr, "momentum": momentum})
        for p in self.param_groups[0]["params"]:
            self.state[p]["momentum"] = torch.zeros_like(p)

    @torch.no_grad()
    def step(self):
        lr = self.param_groups[0]["lr"]
        momentum = self.param_groups[0]["momentum"]
        matrices = self.param_groups[0]["params"]

        # FSDP2 shards matrices by rows. Nesterov: this rank's rows of each gradient, mixed with
        # their running average.
        my_rows = []
        for p in matrices:
            average = self.state[p]["momentum"].lerp_(p.grad, 1 - momentum)
            my_rows.append(p.grad.lerp(average, momentum).to_local().cpu())

        # Every rank gets the others' rows, in one message: one per matrix took 100 ms. On the CPU:
        # a CUDA tensor would come back on its sender's device.
        mesh = matrices[0].device_mesh
        shard_dim = mesh.ndim - 1
        rank = mesh.get_local_rank(shard_dim)
        rows_of_rank = [None] * mesh.size(shard_dim)
        dist.all_gather_object(rows_of_rank, my_rows, mesh.get_group(shard_dim))

        # Every rank makes the same whole update and steps its own rows, wherever they lie.
        for i, p in enumerate(matrices):
            shards = [rows[i] for rows in rows_of_rank]
            direction = torch.cat(shards).to(mesh.device_type)
            scale = max(1.0, p.shape[0] / p.shape[1]) ** 0.5
            update = orthogonalise(direction) * scale

            mine = p.to_local()
            begin = sum(len(shard) for shard in shards[:rank])
            mine.sub_((lr * update[begin:begin + len(mine)]).to(mine.device))


def orthogonalise(x):
    """U V^T of x = U S V^T, about."""
    # Five Newton-Schulz steps bring singular values to 0.7-1.2.
    if x.shape[0] > x.shape[1]:
        return orthogonalise(x.T).T
    x = x / (x.norm() + 1e-7)
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x


def train(policy, examples, held_out, recipe, process, folder, save_every):
    """Train the sharded policy on a list of Example, from the newest checkpoint in the folder.
    Returns the metrics on held_out and on as many examples. At process.deadline the process ends
    with a checkpoint."""
    # Muon for the layers' matrices, AdamW for the rest: embeddings and norms.
    in_layers = set(policy.lm.model.layers.parameters())
    of_muon = []
    of_adamw = []
    for p in policy.parameters():
        if recipe.sft_muon_lr and p in in_layers and p.ndim == 2:
            of_muon.append(p)
        else:
            of_adamw.append(p)
    adamw = torch.optim.AdamW(
        of_adamw, lr=recipe.sft_lr, betas=(0.9, 0.95), weight_decay=0.01, fused=True)
    zero_moments(adamw)
    peak_rates = {adamw: recipe.sft_lr}
    if of_muon:
        peak_rates[Muon(of_muon, recipe.sft_muon_lr)] = recipe.sft_muon_lr
    optimizers = list(peak_rates)

    # Go on where the newest checkpoint was made.
    path, record = find_checkpoint(folder / "checkpoints", process.rank)
    if path:
        dcp.load(training_state("policy", policy, *optimizers), checkpoint_id=path)
    file = open(folder / "metrics.jsonl" if process.rank == 0 else os.devnull, "a", buffering=1)
    if process.rank == 0:
        file.truncate(record["bytes"].get("metrics.jsonl", 0))
    order = batches(len(examples), recipe.sft_batch_size, recipe.sft_seed)
    for _ in range(record["step"]):
        next(order)

    # A step: one batch, and for each optimiser the rate of this step.
    steps = recipe.sft_steps
    bar = tqdm(range(record["step"], steps), desc="warm start", disable=process.rank > 0,
               mininterval=1.0)
    for step in bar:
        batch = [examples[i] for i in next(order)]
        for optimizer, peak in peak_rates.items():
            rate = peak * trapezoid(step, steps, recipe.sft_warmup)
            optimizer.param_groups[0]["lr"] = rate

        loss = batch_loss(policy, batch, recipe.token_budget, process, backward=True)
        norm = clipped_step(policy, optimizers, 1.0, f"warm start step {step}: gradient norm")

        bar.set_postfix(loss=f"{loss:.4f}")
        if step % 10 == 0 or step == steps - 1:
            file.write(json.dumps({"step": step, "loss": loss, "grad_norm": norm}) + "\n")

        # After the last step the finished model is saved instead.
        is_over = time_is_up(process)
        if (is_over or (step + 1) % save_every == 0) and step + 1 < steps:
            sizes = {"metrics.jsonl": os.fstat(file.fileno()).st_size}
            save_checkpoint(folder / "checkpoints", training_state("policy", policy, *optimizers),
                            {"step": step + 1, "bytes": sizes}, 1, process.rank)
            if is_over:
                print(f"--minutes are over after step {step + 1} of the warm start: "
                      f"{process.goes_on}")
                sys.exit(0)

    # The loss on traces that were trained on and on others: the gap is what is learnt by heart.
    seen = batch_loss(policy, examples[:len(held_out)], recipe.token_budget, process)
    unseen = batch_loss(policy, held_out, recipe.token_budget, process)
    metrics = {"train_loss": seen, "held_out_loss": unseen, "memorisation_gap": unseen - seen}
    file.write(json.dumps(metrics) + "\n")
    file.close()
    return metrics


# -------------------------------------------------------------------------------------------------
# The warm start: made once, then found again under a key of what decides it


async def warm_start(args, process, traces_file=""):
    """The folder of the warm-started checkpoint for these arguments, made now or reused. An
    interrupted one goes on at its last checkpoint."""
    parent = Path(args.warm_start_dir)
    parent.mkdir(parents=True, exist_ok=True)
    recipe = warm_start_recipe(args)

    # Rank 0 makes or reads the traces, and waits for a run that makes the same warm start.
    shared = [None]
    lock = contextlib.nullcontext()
    if process.rank == 0:
        traces, held_out = await warm_start_traces(args, recipe, traces_file, parent)
        folder = warm_start_folder(parent, recipe, traces, held_out)
        lock = open(folder.with_suffix(".lock"), "w")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"warm start: waiting for the run that makes {folder}", flush=True)
            fcntl.flock(lock, fcntl.LOCK_EX)
        shared = [(traces, held_out, folder, folder.is_dir())]

    with lock:  # whether this ends with a checkpoint or before
        dist.broadcast_object_list(shared)
        traces, held_out, folder, is_there = shared[0]
        if is_there:
            print(f"warm start: reusing {folder}")
        else:
            make_warm_start(traces, held_out, recipe, args, folder, process)
    return folder


def make_warm_start(traces, held_out, recipe, args, folder, process):
    """Train, and put the checkpoint under its name."""
    print(f"warm start: {recipe.sft_steps} steps on {len(traces)} traces", flush=True)
    begin = time.perf_counter()
    partial = folder.with_suffix(".partial")
    partial.mkdir(exist_ok=True)
    metrics = train_on_traces(traces, held_out, recipe, args, partial, process)
    losses = " ".join(f"{name} {value:.4f}" for name, value in metrics.items())
    print(f"warm start: {losses} in {time.perf_counter() - begin:.0f} s")

    # Only a finished one is ever found under its name.
    if process.rank == 0:
        record = vars(args) | {"versions": versions(), "code": training_code()}
        (partial / "arguments.json").write_text(json.dumps(record, indent=1))
        shutil.rmtree(partial / "checkpoints", ignore_errors=True)
        partial.rename(folder)
    dist.barrier()


def train_on_traces(traces, held_out, recipe, args, folder, process):
    """The warm start itself: the checkpoint goes into `folder`. Returns the final metrics.
    args: for `shard`, whose dtype is in recipe too, and for what decides no result."""
    # Positions are checked before minutes of training.
    config, tokenizer = starting_point(recipe.model, recipe.template_kwargs)

    def examples_of(rows):
        return [trace_example(
            row, tokenizer, recipe.template, recipe.max_interpreter_tokens,
            mask_interpreter=recipe.sft_mask_interpreter == "on",
            mask_failed=recipe.mask_failed == "on") for row in rows]

    examples = examples_of(traces)
    held_out_examples = examples_of(held_out)
    longest = max(len(example) for example in examples + held_out_examples)
    if longest > config.max_position_embeddings:
        raise UserError(f"a trace has {longest} tokens, the model "
                        f"{config.max_position_embeddings} positions")
    say_floor(recipe.token_budget, longest)

    # The plain model, on rank 0 alone, receives the trained weights and is saved.
    plain = None
    if process.rank == 0:
        plain = starting_model(recipe.model, config, recipe.sft_seed)
    policy = Policy(starting_model(recipe.model, config, recipe.sft_seed))
    shard(policy, policy.lm, args, process)
    metrics = train(policy, examples, held_out_examples, recipe, process, folder,
                    args.sft_save_every)
    sync_weights(policy, plain)
    if process.rank == 0:
        plain.save_pretrained(folder)
        save_beside_weights(plain, tokenizer, folder)
    return metrics


async def warm_start_traces(args, recipe, traces_file, folder):
    """(traces, held-out traces): the rows of a file, or the embedded ones, curated once."""
    if traces_file:
        rows = load_traces(traces_file)
        if len(rows) < 2:
            raise UserError(f"{traces_file}: needs at least two traces, one is held out")
        split = len(rows) - max(1, len(rows) // 50)
        return rows[:split], rows[split:]

    # The file's name holds what decides the traces.
    decides = [recipe.sft_traces, recipe.code_share, recipe.sft_seed, recipe.sandbox_timeout]
    path = folder / f"traces-{digest(decides, versions())}-{digest(curation_code())}.json"
    curated = read_traces(path)
    if not curated:
        print(f"curation: {recipe.sft_traces} traces, whose snippets are run", flush=True)
        begin = time.perf_counter()
        async with make_sandbox(args) as sandbox:
            traces, counts = await embedded_traces(
                recipe.sft_traces, recipe.code_share, recipe.sft_seed, sandbox, "traces")
            held_out, _ = await embedded_traces(
                256, recipe.code_share, recipe.sft_seed, sandbox, "held_out_traces")
        print(f"curation: {dict(counts)} in {time.perf_counter() - begin:.0f} s")
        partial = path.with_suffix(f".partial-{os.getpid()}")
        partial.write_text(json.dumps([traces, held_out]))
        partial.rename(path)
        curated = read_traces(path)
    return curated


def read_traces(path):
    """(traces, held-out traces) of a file of curated ones; None if there is none."""
    if not path.exists():
        return None
    try:
        traces, held_out = json.loads(path.read_text())
        if all(isinstance(trace, dict) for trace in traces + held_out):
            return traces, held_out
    except (ValueError, TypeError):
        pass
    print(f"curation: {path} is damaged, and made anew")
    return None


def warm_start_recipe(args):
    """The arguments that decide a warm start: `train_on_traces` sees no other that could change
    its result. (The number of ranks only changes rounding.)"""
    # Of a checkpoint its files' names, sizes and times stand for its weights.
    files = sorted(Path(args.model).glob("*")) if args.model else []
    return SimpleNamespace(
        model=args.model,
        weights=[(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files],
        template=load_template(args.prompt_template),
        template_kwargs=args.template_kwargs,
        sft_traces=args.sft_traces,
        code_share=args.code_share,
        sft_steps=args.sft_steps,
        sft_batch_size=args.sft_batch_size,
        sft_lr=args.sft_lr,
        sft_muon_lr=args.sft_muon_lr,
        sft_warmup=args.sft_warmup,
        sft_seed=args.sft_seed,
        token_budget=args.token_budget,
        dtype=args.dtype,
        tf32=args.tf32,
        max_interpreter_tokens=args.max_interpreter_tokens,
        sandbox_timeout=args.sandbox_timeout,
        sft_mask_interpreter=args.sft_mask_interpreter,
        mask_failed=args.mask_failed)


def warm_start_folder(parent, recipe, traces, held_out):
    """Where this warm start lies. If other code made one, says which file has changed."""
    _, tokenizer = starting_point(recipe.model)
    text_to_ids = (tokenizer.backend_tokenizer.to_str(), tokenizer.chat_template,
                   tokenizer.eos_token)
    decides = digest(vars(recipe), traces, held_out, text_to_ids, versions())
    code = training_code()
    folder = parent / f"{decides}-{digest(code)}"
    if not folder.is_dir():
        for path in sorted(parent.glob(f"{decides}-*/arguments.json")):
            try:
                before = dict(read_object(path.read_text())["code"])
            except (ValueError, TypeError, KeyError):  # damaged
                continue
            changed = [file for file in code if code[file] != before.get(file)]
            print(f"warm start: made anew, for code in {', '.join(changed)} is not that of "
                  f"{path.parent}")
    return folder


def curation_code():
    """`code_hashes` of the embedded traces, and all of the sandbox's: what it says is quoted."""
    sandbox = ast.parse(Path(__file__).with_name("sandbox.py").read_text())
    return code_hashes(["embedded_traces"]) | {"sandbox.py": digest(ast.dump(sandbox))}


def training_code():
    """`code_hashes` of the training loop and of the forward pass, which transformers calls. For
    the tokenizer the key holds what its code has made; how checkpoints are kept changes none."""
    return code_hashes(
        ["train_on_traces", "packed_attention"],
        left_out=["embedded_tokenizer", "save_checkpoint", "find_checkpoint"])


def code_hashes(entries, left_out=()):
    """{file: hash} of the definitions that the entries reach by name. Comments, docstrings, layout
    and what is not reached may change freely."""
    definitions = {}  # name -> [(file, tree)]
    modules = {path.stem for path in Path(__file__).parent.glob("*.py")}
    for path in sorted(Path(__file__).parent.glob("*.py")):
        for node in ast.parse(path.read_text()).body:
            remove_docstrings(node)
            for name in defined_names(node):
                definitions.setdefault(name, []).append((path.name, node))

    # From the entries on, follow every name that is used to all that is defined under it: rather
    # a few too many than one too few.
    reached = {}  # file -> the trees, as text
    waiting = list(entries)
    done = set(left_out)
    while waiting:
        name = waiting.pop()
        if name in done:
            continue
        done.add(name)
        for file, node in definitions.get(name, []):
            reached.setdefault(file, set()).add(ast.dump(node))
            for part in ast.walk(node):
                if isinstance(part, ast.Name):
                    waiting.append(part.id)
                # Of rollout.generate the second part, too.
                if isinstance(part, ast.Attribute) and getattr(part.value, "id", "") in modules:
                    waiting.append(part.attr)
    return {file: digest(sorted(reached[file])) for file in sorted(reached)}


DEFINITION = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)


def defined_names(node):
    """The names that a statement of a file defines."""
    if isinstance(node, DEFINITION):
        return {node.name}
    return {part.id for part in ast.walk(node)
            if isinstance(part, ast.Name) and isinstance(part.ctx, ast.Store)}


def remove_docstrings(node):
    for part in ast.walk(node):
        if isinstance(part, DEFINITION) and ast.get_docstring(part) is not None:
            part.body = part.body[1:]


def digest(*records):
    """16 hex digits that change with JSON-able records."""
    return hashlib.sha256(json.dumps(records).encode()).hexdigest()[:16]


def versions():
    return {"python": sys.version.split()[0], "torch": torch.__version__,
            "transformers": transformers.__version__, "tokenizers": tokenizers.__version__}


def embedded_config(tokenizer):
    """The small Qwen3 of the embedded default: 0.7 M parameters."""
    return Qwen3Config(
        vocab_size=len(tokenizer), hidden_size=128, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=4, head_dim=32, intermediate_size=320, rope_theta=10000.0,
        max_position_embeddings=2048, tie_word_embeddings=True, bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)


def starting_point(path, template_kwargs=""):
    """(configuration, tokenizer) of a checkpoint, or for an empty path the embedded ones."""
    if path:
        tokenizer = load_tokenizer(path, template_kwargs)
        return load_config(path, tokenizer), tokenizer
    if json.loads(template_kwargs or "{}"):
        raise UserError("--template_kwargs: the embedded chat template has no variables")
    tokenizer = embedded_tokenizer()
    return embedded_config(tokenizer), tokenizer


def starting_model(path, config, seed):
    """A checkpoint's model, or the embedded one with random weights, on the CPU in fp32."""
    if path:
        return load_model(path, "cpu")
    # The seed decides the initial weights, and nothing else here draws.
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(config, attn_implementation="retool")


# ---------------------------------------------------------------------------------------------
# Traces: candidates that passed the checks of format, execution and answer

class Rejected(Exception):
    """Why a row becomes no trace: "stage: reason", and details where they help."""


def load_traces(source):
    """A file or hub id -> [{"question", "answer", "family", "response", "failed_calls"}]."""
    traces = []
    for place, row in read_rows(source):
        problem = read_row(row, FIELDS | {"solution": ["response", "solution"]})
        response = problem["solution"]
        if not problem["question"] or problem["stated"] is None:
            raise UserError(f"{place}: no question, or no \\boxed{{}} answer in the response: "
                            "this is no trace (sft.py curate makes them)")
        failed_calls = row.get("failed_calls", [])
        _, calls, _ = take_apart(response)
        if not isinstance(failed_calls, list) or not all(
                call in range(len(calls)) for call in failed_calls):
            raise UserError(f"{place}: failed_calls is not a list of indices of its calls")
        traces.append({
            "question": problem["question"],
            "answer": problem["answer"],
            "family": row.get("family", Path(source).stem),
            "response": response,
            "failed_calls": failed_calls})
    refuse_one_question(source, traces)
    return traces


def take_apart(response):
    """The model's texts (each but the last ends with a call), of each call its tool and the text
    between its tags, and the interpreter text after each."""
    # They alternate, and the model's come first.
    segments = [text for _, text in split_segments(response)]
    texts = segments[::2]
    outputs = segments[1::2]

    # A call is what stands behind its text's last opening tag.
    calls = []
    for text in texts[:-1]:
        tool = tool_of(text)
        _, _, after_opening = text.rpartition(tool.open)
        snippet = after_opening.removesuffix(tool.close)
        calls.append((tool, strip_fence(snippet)))
    return texts, calls, outputs


def check_format(response):
    """Rejects what a reader or the rollout engine would not understand."""
    # Tags come in pairs: an opening one, then its closing one.
    tags = TAG.findall(response)
    wanted = [CLOSING.get(tag) for tag in tags[::2]]
    if tags[1::2] != wanted:
        raise Rejected("format: tags")

    # `take_apart` finds the calls with a block right behind them. No other call or block is left.
    texts, calls, _ = take_apart(response)
    own_text = "".join(texts)
    n_closed = sum(own_text.count(tool.close) for tool in TOOLS)
    if n_closed != len(calls) or INTERPRETER_OPEN in own_text:
        raise Rejected("format: interpreter block missing or misplaced")

    for tool, snippet in calls:
        if tool.name == "code" and not syntax_tree(snippet):
            raise Rejected("format: snippet does not parse")

    # The one <answer> ends the response and holds one box. A box before it says the same.
    before, _, ending = response.rpartition("<answer>")
    answer = boxed(ending)
    is_last = "<answer>" not in before and ending.endswith("</answer>")
    is_single = answer is not None and ending.count(r"\boxed") == 1
    if not is_last or not is_single or extract_answer(before) not in (None, answer):
        raise Rejected("format: no single final answer")


TOKEN = re.compile(rf"{NUMBER_IN_TEXT.pattern}|\w+|[^\w\s]")


def last_place(number):
    """The value of a number's last digit: 0.01 for 3.14, 1 for 42."""
    return Decimal(10) ** number.as_tuple().exponent


def same_token(quoted, real):
    """Whether two tokens are equal, or `quoted` is `real` rounded to the decimals it shows. A
    whole number is no rounding: 63 stands for 63.00000000000001, but not for 63.3."""
    if not numbers(quoted) or not numbers(real):
        return quoted == real
    shown = numbers(quoted)[0]
    exact = numbers(real)[0]
    tolerance = last_place(shown) / 2 if "." in quoted else Decimal("1e-9")
    return abs(shown - exact) <= tolerance


def error_kind(output):
    """ValueError, where the last line is "ValueError: math domain error"; [timed out, where it is
    "[timed out after 5.0 s]"."""
    last_line = output.strip().rpartition("\n")[2]
    return re.split(":| after ", last_line)[0]


def same_output(quoted, result):
    """Whether a quoted output is what came back; of an error only its kind counts."""
    real = break_tags(result.output)
    if result.status != "ok":
        quoted = error_kind(quoted)
        real = error_kind(real)
    quoted_tokens = TOKEN.findall(quoted)
    real_tokens = TOKEN.findall(real)
    if len(quoted_tokens) != len(real_tokens):
        return False
    return all(map(same_token, quoted_tokens, real_tokens))


async def check_trace(candidate, reference, sandbox):
    """Check format, execution and answer: (response with the real outputs, indices of failed
    snippets, SandboxResults)."""
    check_format(candidate)
    texts, calls, quoted_outputs = take_apart(candidate)

    # A quoted refusal of a busy tool is brought about.
    results = []
    for (tool, snippet), quoted in zip(calls, quoted_outputs):
        seed = BUSY_SEED if quoted.strip() == BUSY else 0
        results.append(await tool.run(snippet, seed, sandbox))
    if any(result.status == "sandbox_error" for result in results):
        raise RuntimeError("the sandbox failed during curation")

    # An empty interpreter block is filled, any other must agree.
    response = texts[0]
    for i, result in enumerate(results):
        if quoted_outputs[i].strip() and not same_output(quoted_outputs[i], result):
            raise Rejected("execution: quoted output differs")
        output = break_tags(result.output).strip("\n")
        response += f"\n{INTERPRETER_OPEN}\n{output}\n{INTERPRETER_CLOSE}"
        response += texts[i + 1]

    # With the real outputs, the answer must still be right.
    if not await is_equivalent(extract_answer(response), reference, sandbox):
        raise Rejected("answer: differs from the reference")
    # That the tool is busy is no fault of a snippet.
    failed_calls = [i for i, result in enumerate(results) if result.status not in ("ok", "busy")]
    return response, failed_calls, results


async def embedded_traces(n, code_share, seed, sandbox, split="traces"):
    """(traces, counts). Traces as `load_traces` reads them, of n embedded problems: about the share
    `code_share` solved with code, the rest by hand. counts: a Counter of "kept" and of the reasons
    to reject."""
    rng = random.Random(seed + 1)
    # A draw for each problem decides between code and hand.
    problems = [embedded_problem(split, seed, i) for i in range(n)]
    candidates = [p.by_code if rng.random() < code_share else p.by_hand for p in problems]
    service = Service(sandbox, busy=0.5)  # seeds decide, see `check_trace`

    async def verify(problem, candidate):
        try:
            response, failed_calls, _ = await check_trace(candidate, problem.answer, service)
        except Rejected as rejected:
            return str(rejected), None
        finally:
            bar.update()
        return "kept", {
            "question": problem.question,
            "answer": problem.answer,
            "family": problem.family,
            "response": response,
            "failed_calls": failed_calls}

    # All at once: the sandbox has a queue.
    with tqdm(total=n, desc="curation", mininterval=1.0) as bar:
        outcomes = await asyncio.gather(*map(verify, problems, candidates))
    traces = [trace for _, trace in outcomes if trace]
    counts = Counter(reason for reason, _ in outcomes)
    return traces, counts


# -------------------------------------------------------------------------------------------------
# Sharding, and sums over ranks


def check_mesh(replicas, world):
    """UserError where the ranks cannot be arranged as so many copies of a sharded model."""
    if world % replicas:
        raise UserError(f"--replicas {replicas} does not divide the {world} ranks")


def shard(module, lm, args, process):
    """FSDP2 over `module`, which contains `lm`. Master weights, gradients and optimiser states are
    fp32."""
    # Made once: each mesh has communicators of its own.
    device_type = process.device.type
    if process.mesh is None:
        if args.replicas > 1:  # a grid (replicas, shards): hybrid sharding
            grid = (args.replicas, process.world // args.replicas)
            names = ("replicate", "shard")
            process.mesh = init_device_mesh(device_type, grid, mesh_dim_names=names)
        else:
            process.mesh = init_device_mesh(device_type, (process.world,))

    if device_type == "cuda" and args.dtype == "bf16":
        need_varlen(lm.config, process.device)

    lm.eval()
    if args.activation_checkpointing:
        for layer in lm.model.layers:
            layer.training = True  # transformers asks that; what is inside stays without dropout
        lm.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})

    # Each layer is a unit that is gathered when needed, the rest belongs to the root. The module
    # may lie in host memory: its units go to the GPU one by one.
    precision = MixedPrecisionPolicy(DTYPES[args.dtype], torch.float32)
    offload = OffloadPolicy()
    if args.cpu_offload:
        offload = CPUOffloadPolicy(pin_memory=device_type == "cuda")
    for unit in [*lm.model.layers, module]:
        fully_shard(unit, mesh=process.mesh, mp_policy=precision, offload_policy=offload)
    return module


@torch.no_grad()
def sync_weights(policy, plain):
    """Copy the sharded policy's weights into a plain model, in place. All ranks call it; plain may
    be None on those that want no copy, if it is fp32 on the others."""
    policy.reshard()  # after a forward without backward the root's weights are still gathered
    sources = dict(policy.lm.named_parameters())
    targets = dict(plain.named_parameters()) if plain else dict.fromkeys(sources)
    assert targets.keys() == sources.keys()
    for name, source in sources.items():
        # To the GPU and to the target's precision before gathering: fewer bytes, by NCCL.
        part = source.detach().to(source.device_mesh.device_type)
        if plain:
            part = part.to(targets[name].dtype)
        full = part.full_tensor()
        if plain:
            targets[name].copy_(full)


def all_sum(value, device):
    """The sum of a number over all ranks."""
    total = torch.tensor(value, dtype=torch.float64, device=device)
    dist.all_reduce(total)
    return total.item()


def time_is_up(process):
    """Whether rank 0's clock has passed the deadline of --minutes: the same on all ranks."""
    is_late = process.rank == 0 and time.monotonic() > process.deadline
    return all_sum(is_late, process.device) > 0


# -------------------------------------------------------------------------------------------------
# Checkpoints of a training run. torch.distributed.checkpoint writes the shards, each rank its own.
# Added here: a checkpoint is whole or absent, and a damaged one is recognised.


def zero_moments(optimizer):
    """Give an AdamW the moments of its first step, to load a checkpoint into."""
    # torch's own helpers would take a real step to make them.
    for group in optimizer.param_groups:
        for p in group["params"]:
            optimizer.state[p] = {"step": torch.zeros((), dtype=torch.float32, device=p.device),
                                  "exp_avg": torch.zeros_like(p),
                                  "exp_avg_sq": torch.zeros_like(p)}


def training_state(name, module, *optimizers):
    """Every tensor that a step changes, by name: sharded weights and the optimisers' moments."""
    module.reshard()  # after a forward without backward the root's weights are still gathered
    state = {}
    for key, p in module.named_parameters():
        state[f"{name}.{key}"] = p.detach()
        for optimizer in optimizers:
            for moment, value in optimizer.state.get(p, {}).items():
                state[f"{name}.{key}.{moment}"] = value
    return state


def save_checkpoint(folder, state, record, keep, rank):
    """Write state and record (JSON, with its "step") as folder/step-<step>, then delete all
    but the last `keep`. All ranks call it, on a file system that they share.

    A crash leaves the ones before untouched. UserError where nothing can be written.
    """
    # Shards go to a temporary folder, which becomes a checkpoint by one rename.
    partial = folder / "partial"
    final = folder / f"step-{record['step']:06d}"
    if rank == 0:
        shutil.rmtree(partial, ignore_errors=True)  # of a run that was killed here
    dist.barrier()
    try:
        dcp.save(state, checkpoint_id=partial)
        my_hashes = {file.name: file_hash(file) for file in partial.glob(f"__{rank}_*")}
        hashes_of_rank = [None] * dist.get_world_size()
        dist.all_gather_object(hashes_of_rank, my_hashes)
        if rank == 0:
            publish(partial, final, record, hashes_of_rank, keep)
    except (CheckpointException, OSError) as error:  # where one rank ends, torchrun ends the others
        reason = str(error).strip().splitlines()[-1]
        earlier = "There is none before it"
        if any(folder.glob("step-*")):
            earlier = f"The ones before it in {folder} are intact"
        raise UserError(f"checkpoint of step {record['step']} cannot be written ({reason}): disk "
                        f"full? {earlier}") from None
    if sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)  # returns the gaps of a heap that `use_device` lets grow


def publish(partial, final, record, hashes_of_rank, keep):
    """Rank 0: make the synced shards in `partial` the checkpoint `final`, and delete old ones."""
    # The last file is a manifest with everyone's hashes.
    files = {}
    for hashes in hashes_of_rank:
        files |= hashes
    files[".metadata"] = file_hash(partial / ".metadata")
    for name in files:
        os.stat(partial / name)  # an error for another node's shards in a folder that is not shared
    (partial / "manifest.json").write_text(json.dumps(record | {"files": files}, indent=1))
    sync_to_disk(partial / "manifest.json")
    sync_to_disk(partial)

    shutil.rmtree(final, ignore_errors=True)  # damaged, or of a run that has been wound back
    partial.rename(final)
    sync_to_disk(final.parent)

    # Later ones are damaged: the run has gone back behind them.
    checkpoints = sorted(final.parent.glob("step-*"))
    up_to_this = checkpoints[:checkpoints.index(final) + 1]
    kept = up_to_this[-keep:]
    for path in checkpoints:
        if path not in kept:
            shutil.rmtree(path)


BEGINNING = {"step": 0, "seconds": 0.0, "bytes": {}}  # the record of a run that begins


def find_checkpoint(folder, rank, only_weights=False):
    """(path, record) of the newest checkpoint that is undamaged, as are (unless only_weights) the
    files beside `folder` that the run appends to; the same on all ranks. If there is none,
    (None, BEGINNING)."""
    newest = [newest_checkpoint(folder, only_weights) if rank == 0 else None]
    dist.broadcast_object_list(newest)
    return newest[0]


def newest_checkpoint(folder, only_weights):
    """`find_checkpoint` on one rank. UserError if all are damaged."""
    checkpoints = sorted(folder.glob("step-*"), reverse=True)
    for path in checkpoints:
        try:
            record = read_manifest(path)
            if not only_weights:
                for name, size in record["bytes"].items():
                    check_lines(folder.parent / name, size)
            return path, record
        except (OSError, ValueError) as damage:
            if path == checkpoints[-1]:
                raise UserError(f"{folder}: every checkpoint is damaged ({damage}); delete them "
                                "to start from the beginning") from None
            print(f"checkpoint {path} is damaged ({damage}): going back to the one before",
                  flush=True)
    return None, BEGINNING


def read_manifest(path):
    """The record of a checkpoint. OSError or ValueError if it or a file is damaged."""
    try:
        record = BEGINNING | read_object((path / "manifest.json").read_text())
    except ValueError as error:
        raise ValueError(f"manifest.json: {error}") from None
    hashes = record.get("files")
    sizes = record["bytes"]
    is_right = (
        type(record["step"]) is int
        and path.name == f"step-{record['step']:06d}"
        and type(record["seconds"]) in (int, float)
        and isinstance(hashes, dict)
        and isinstance(sizes, dict)
        and all(type(size) is int for size in sizes.values()))
    if not is_right:
        raise ValueError("manifest.json is not what a run writes")

    # Every file is there, and none was changed.
    names = {file.name for file in path.glob("__*")} | {".metadata"} | set(hashes)
    for name in sorted(names):
        if file_hash(path / name) != hashes.get(name):
            raise ValueError(f"{name} has another hash")
    return record


def check_lines(path, size):
    """OSError or ValueError unless a file begins with `size` bytes of lines of JSON objects."""
    if size == 0:
        return
    with open(path, "rb") as file:
        while size > 0:
            line = file.readline()
            if not line:
                raise ValueError(f"{path} is shorter than recorded")
            try:
                read_object(line)
            except ValueError as error:
                raise ValueError(f"{path}: {error}") from None
            size -= len(line)
    if size < 0:
        raise ValueError(f"{path} has other lines than recorded")


def file_hash(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync_to_disk(path):
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


# -------------------------------------------------------------------------------------------------
# Flags of both trainers


def add_warm_start_arguments(parser):
    """The warm start's flags, shared with ppo.py. Defaults are the embedded run's."""
    add = parser.add_argument_group("warm start").add_argument
    add("--model", default="",
        help="checkpoint folder or hub id, used as it is; empty: the embedded model, warm-started")
    add("--sft_traces", type=at_least(1), default=10000,
        help="embedded traces; paper: 2,000 released")
    add("--code_share", type=in_range(0.0, 1.0), default=0.5,
        help="share of embedded traces solved with code; paper's policy starts at 0.18")
    add("--sft_steps", type=at_least(1), default=1300,
        help="optimiser steps of the warm start; paper: 2 epochs")
    add("--sft_batch_size", type=at_least(1), default=32,
        help="traces per step, over all ranks")
    add("--sft_lr", type=in_range(0.0), default=5e-3,
        help="AdamW's peak rate in the warm start, falls to 0; paper 1e-6 (32B)")
    add("--sft_muon_lr", type=in_range(0.0), default=0.04,
        help="Muon's peak rate for the layers' matrices; 0: AdamW trains all, as the paper's")
    add("--sft_warmup", type=at_least(0), default=50,
        help="steps in which the warm start's rates rise")
    add("--sft_mask_interpreter", choices=("on", "off"), default="on",
        help="off: the warm start learns interpreter text too")
    add("--mask_failed", choices=("on", "off"), default="on",
        help="off: the warm start learns failed snippets too")
    add("--sft_save_every", type=at_least(1), default=300,
        help="steps between checkpoints of the warm start")
    add("--sft_seed", type=seed_number, default=0,
        help="seed of traces, their order and the initial weights")
    add("--warm_start_dir", default="out/warm_start",
        help="where finished warm starts are kept and found again")


def add_trainer_arguments(parser):
    add = parser.add_argument_group("trainer").add_argument
    add("--token_budget", type=at_least(1), default=8192, help="tokens per micro-batch and rank")
    add("--activation_checkpointing", action="store_true",
        help="keep only the layers' inputs, compute the rest again in the backward pass")
    add("--cpu_offload", action="store_true",
        help="weights and optimiser states wait in host memory")
    add("--replicas", type=at_least(1), default=1,
        help="copies of the sharded model, e.g. one per node (hybrid sharding)")
    add("--minutes", type=in_range(0.0), default=0.0,
        help="stop with a checkpoint after so many minutes; 0: no limit")


# ---------------------------------------------------------------------------------------------
# Curation of real data: `sft.py curate`

def question_words(question, mask_numbers=False):
    """The words of a question in lower case; mask_numbers: # stands for every number."""
    if mask_numbers:
        question = re.sub(r"\d[\d.,]*", " # ", question)
    return re.findall(r"[^\W_]+|#", question.lower())


def contamination_keys(question):
    """What training and evaluation problems must not share: the whole question, spaces aside, and
    any 13 words in a row, numbers aside."""
    keys = ["".join(question_words(question))]
    words = question_words(question, mask_numbers=True)
    for end in range(13, len(words) + 1):
        keys.append(" ".join(words[end - 13:end]))
    return keys


NOTICED = re.compile(
    r"(?i)\b(error|exception|fail|fix|correct|mistake|wrong|bug|instead|again|timed? ?out"
    r"|too (slow|long|large|small|many|deep)|(does|did) not work|retry)")


def is_used(output, later):
    """Whether the text after a snippet takes up a number that it printed, perhaps rounded."""
    # "True" may be taken up as "it is prime": without numbers any output counts.
    printed = numbers(output)
    if not printed:
        return not output.startswith("[no output")
    for mentioned in numbers(later):
        if any(abs(number - mentioned) < last_place(mentioned) for number in printed):
            return True
    return False


def check_quality(candidate, results, reference):
    """Rejects what passed `check_trace` but computes nothing, does not use what it computes, or
    leaves errors or its answer unexplained."""
    texts, calls, quoted_outputs = take_apart(candidate)
    if not calls:
        raise Rejected("quality: no snippet")

    # Each snippet must do something for the answer, or be corrected.
    for i, (tool, snippet) in enumerate(calls):
        status = results[i].status
        if status == "ok":
            if tool.name == "code" and not computes(snippet):
                raise Rejected("quality: snippet only prints a literal")
            if not is_used(results[i].output, "".join(texts[i + 1:])):
                raise Rejected("quality: snippet output is never used")
        else:
            # The error must be quoted or mentioned right after, and a later snippet run.
            is_noticed = quoted_outputs[i].strip() or NOTICED.search(texts[i + 1])
            is_corrected = any(later.status == "ok" for later in results[i + 1:])
            if status not in ("error", "timeout") or not is_noticed or not is_corrected:
                raise Rejected(f"quality: {status}, not corrected")

    # A number must be stated before it is the answer.
    before = "".join(texts).rpartition("<answer>")[0]
    is_stated = set(numbers(reference)) <= set(numbers(before))
    if re.fullmatch(r"-?[\d,.]+", reference) and not is_stated:
        raise Rejected("quality: the answer comes from nowhere")


# A record is a dict of what is known of one row: "row", its number; "place"; "reason", "kept" or
# why it is left out, with "detail"; "input", which `check_problem` replaces by what `read_row`
# makes of it; the rewriter's "candidate"; the "trace".


async def check_problem(record, run):
    """Fill in the problem, if there is something to rewrite and it is not contaminated."""
    row = record.pop("input")
    record.update(read_row(row, run.fields))
    question = record["question"]
    answer = record["answer"]
    solution = record["solution"]

    # What cannot be asked, compared or rewritten is left out.
    if not question or not answer:
        raise Rejected(f"filter: no question or no answer in {shape(row)} (--question_field and "
                       "--answer_field name them)")
    if re.search("[\ud800-\udfff]", question + answer + solution):
        raise Rejected("filter: not well-formed")  # a lone surrogate is no text
    if len(answer) > 200 or answer.lower() in ("proof", "notfound", "none", "n/a"):
        raise Rejected("filter: no answer to compare with")
    if not solution:
        raise Rejected("filter: no solution")

    # A trace already is checked, not rewritten.
    if "<answer>" in solution:
        record["candidate"] = solution
    elif not await is_equivalent(record["stated"], answer, run.sandbox):
        raise Rejected("filter: the solution's answer is not the reference")

    # A problem of an evaluation must not be learnt, not even in part.
    for key in contamination_keys(question):
        if key in run.evaluation:
            overlap = "13 words" if " " in key else "whole question"
            raise Rejected(f"contamination: {overlap}", run.evaluation[key], key)


async def make_trace(record, run):
    """Make the trace of a record that has a candidate."""
    if not record["candidate"]:
        raise Rejected("rewrite: no calculation, or unfinished")
    # Half a character, which a model may write, becomes a question mark.
    candidate = record["candidate"].encode("utf-8", "replace").decode().strip()
    response, failed_calls, results = await check_trace(candidate, record["answer"], run.sandbox)
    check_quality(candidate, results, record["answer"])

    # Prompt and response must fit the model.
    prompt = run.template.replace("{question}", record["question"])
    if len(encode_text(run.tokenizer, prompt + response)) > run.max_tokens:
        raise Rejected("quality: too long")
    # The layout that `load_traces` reads: the bare question; the messages are for other programs.
    record["trace"] = {
        "question": record["question"],
        "response": response,
        "messages": [{"role": "user", "content": prompt},
                     {"role": "assistant", "content": response}],
        "answer": record["answer"],
        "family": run.family,
        "failed_calls": failed_calls,
        "place": record["place"]}


async def pass_stage(stage, records, run):
    """Take records through a stage, all at once; returns those that are still kept."""
    async def attempt(record):
        try:
            await stage(record, run)
        except Rejected as rejected:
            record["reason"] = rejected.args[0]
            record["detail"] = list(rejected.args[1:])

    await asyncio.gather(*map(attempt, records))
    return [record for record in records if record["reason"] == "kept"]


async def curate_rows(rows, run):
    """The records of [(number, (place, row))], taken through one stage after the other."""
    records = []
    for number, (place, row) in rows:
        records.append({"row": number, "place": Path(place).name, "reason": "kept", "input": row})
    kept = await pass_stage(check_problem, records, run)

    # Finished traces are only checked.
    unwritten = [record for record in kept if "candidate" not in record]
    if unwritten:
        candidates = await run.rewrite(unwritten)
        for record, candidate in zip(unwritten, candidates):
            record["candidate"] = candidate

    await pass_stage(make_trace, kept, run)
    return records


# Flags on which no record depends.
NOT_DECISIVE = {"output", "limit", "in_flight", "api_url", "sandbox_workers", "unsafe_sandbox"}


async def curate_file(args):
    """`sft.py curate`. A line of OUTPUT's journal holds the records of in_flight rows, under a
    hash of what decides them: an interrupted run does not make them again."""
    output = Path(args.output)
    journal = output.with_suffix(".journal")
    report = output.with_suffix(".report.json")
    partial = output.with_suffix(".partial")
    if output.exists():
        raise UserError(f"--output {output}: there already; nothing is overwritten")

    # What the stages need.
    named = {"question": args.question_field, "answer": args.answer_field,
             "solution": args.solution_field}
    run = SimpleNamespace(
        fields=FIELDS | {name: [path] for name, path in named.items() if path},
        template=load_template(args.prompt_template),
        rewrite=make_rewriter(args),
        family=Path(args.input).stem,
        max_tokens=args.max_tokens,
        tokenizer=load_tokenizer(args.tokenizer) if args.tokenizer else embedded_tokenizer(),
        evaluation={})  # contamination key -> place of its problem
    for file in args.decontaminate:
        for number, problem in enumerate(load_problems(file), 1):
            for key in contamination_keys(problem["question"]):
                run.evaluation[key] = f"{Path(file).name}:{number}"

    # What decides a record: flags, and what stands in the files that they name.
    flags = {name: value for name, value in vars(args).items() if name not in NOT_DECISIVE}
    decisive = digest(flags, run.template, run.evaluation)
    rows = enumerate(read_rows(args.input, args.split, args.config), 1)
    rows = itertools.islice(rows, args.limit or None)
    records = []
    async with make_sandbox(args) as sandbox:
        run.sandbox = sandbox
        with open(journal, "a+") as file, tqdm(desc="rows", total=args.limit or None) as bar:
            # What an interrupted run has left: hash -> records.
            done = read_journal(file.name)

            # All rows, in_flight at a time.
            while True:
                chunk = list(itertools.islice(rows, args.in_flight))
                if not chunk:
                    break
                identity = json.dumps([decisive, chunk], default=str)
                key = hashlib.sha256(identity.encode()).hexdigest()
                if key not in done:
                    done[key] = await curate_rows(chunk, run)
                    add_to_journal(file, key, done[key])
                records += done[key]
                bar.update(len(chunk))

    try:
        refuse_one_question(args.input, [record for record in records if "question" in record])
    except UserError:
        journal.unlink()
        raise

    # Only a whole file is ever found under OUTPUT's name.
    traces, summary, examples = summarise(records)
    whole_report = summary | {"arguments": vars(args), "examples": examples}
    report.write_text(json.dumps(whole_report, indent=1))
    if traces:
        partial.write_text("".join(json.dumps(trace) + "\n" for trace in traces))
        partial.rename(output)
    journal.unlink()
    if not traces:
        frequent = dict(Counter(summary["reasons"]).most_common(3))
        raise UserError(f"{args.input}: none of {len(records)} rows kept, {frequent}; see {report}")
    print(json.dumps(summary, indent=1))


def summarise(records):
    """(traces, but no question twice; counts; three examples of each reason)."""
    traces = []
    reasons = Counter()
    examples = {}
    first_records = {}  # of each question
    for record in records:
        # Of rows with the same words in their question the first is kept.
        if record["reason"] == "kept":
            words = " ".join(question_words(record["question"]))
            first = first_records.setdefault(words, record)
            if first is not record:
                record["reason"] = "duplicate: same question"
                record["detail"] = [first["place"]]

        reason = record["reason"]
        reasons[reason] += 1
        if reason == "kept":
            traces.append(record["trace"])
        elif reasons[reason] <= 3:
            examples.setdefault(reason, []).append(record)

    summary = {"rows": len(records), "kept": len(traces), "reasons": dict(sorted(reasons.items()))}
    return traces, summary, examples


def add_curate_arguments(parser):
    add = parser.add_argument
    add("--input", required=True, help="JSONL or parquet file, or a Hugging Face hub id")
    add("--output", required=True, help="JSONL file of traces; the report lies beside it")
    add("--rewriter", choices=("calculator", "program", "local", "api"), default="calculator",
        help="GSM8K's annotations become snippets or one script, or a model rewrites solutions")
    add("--limit", type=at_least(0), default=0, help="rows to curate; 0: all")
    # Numbers of rows are added to it.
    add("--seed", type=in_range(-2**63, 2**62, number=int), default=0,
        help="seed of a rewriting model")
    add("--split", default="train", help="split of a hub data set")
    add("--config", default=None, help="configuration of a hub data set")
    add("--question_field", default="", help="dotted path of the question, if its name is new")
    add("--answer_field", default="", help="dotted path of the answer, if its name is new")
    add("--solution_field", default="", help="dotted path of the solution, if its name is new")
    add("--prompt_template", default="retool", help="plain, retool, or a file with {question}")
    add("--tokenizer", default="", help="tokenizer for --max_tokens; empty: the embedded one")
    add("--max_tokens", type=at_least(1), default=16384, help="longer traces are left out")
    add("--decontaminate", nargs="*", default=[], help="evaluation sets that must not occur")
    add("--model", default="", help="model of --rewriter local or api")
    add("--template_kwargs", type=json_object, default="", help=TEMPLATE_KWARGS + " (local)")
    add("--temperature", type=in_range(0.0), default=0.7, help="temperature of a rewriting model")
    add("--api_url", default="",
        help="base URL of the endpoint, for the key OPENAI_API_KEY; empty: OpenAI's")
    add("--in_flight", type=at_least(1), default=64, help="rows, and requests, at a time")
    add_sandbox_arguments(add, timeout=5.0)


# -------------------------------------------------------------------------------------------------
# The script


async def main(process):
    parser = FlagParser(
        usage="torchrun sft.py [flags], or python sft.py curate [flags]", description=__doc__,
        formatter_class=Help, allow_abbrev=False)
    if sys.argv[1:2] == ["curate"]:
        parser.usage = "python sft.py curate [flags]"
        add_curate_arguments(parser)
        await curate_file(parser.parse_args(sys.argv[2:]))
        return

    parser.add_argument("--traces", default="",
                        help="a file or hub id of traces to train on; empty: the embedded ones")
    add_warm_start_arguments(parser)
    add_trainer_arguments(parser)
    add_format_arguments(parser)
    defaults, given = parse_flags(parser)
    args = argparse.Namespace(**defaults | given)
    if args.model:
        need_values(parser, given, ["sft_lr", "sft_muon_lr", "sft_steps"])
        if not args.traces:
            parser.error("--model needs --traces: the embedded traces are for the embedded model")

    process.deadline = time.monotonic() + 60 * (args.minutes or math.inf)
    use_device(process, args.device, may_use_cpu=not args.model, tf32=args.tf32)
    check_mesh(args.replicas, process.world)
    # A bad checkpoint is found out before the curation.
    starting_point(args.model, args.template_kwargs)
    folder = await warm_start(args, process, args.traces)
    print(f"checkpoint: {folder}")


if __name__ == "__main__":
    run_script(main)
