"""Where does the format come from? Cold-start traces, the warm start on them, shared parts.

`curate` takes rewritings of solutions, whoever wrote them, through the paper's two checks, of
format and answer, and two more: every snippet runs, and a quoted output that is not the real
one rejects the trace (the paper lets an LLM invent them); in real data, snippets must compute
what they print, and the text use it.

The warm start is a masked next-token loss on these traces. Differences from the paper: (1) the
traces were executed; (2) snippets that failed stay, for the text corrects them, but are masked:
the model learns to recover from errors, not to make them; (3) a step's loss is a sum over
trainable tokens, divided once by their global number: packing and ranks do not change it.

    torchrun sft.py                                      # CPU: the embedded warm start, as ppo.py makes it
    torchrun sft.py --model DIR --traces traces.jsonl    # a checkpoint, on your own traces
    torchrun --nproc_per_node 8 sft.py --model ...       # eight GPUs
    python sft.py curate --input gsm8k_train.jsonl --decontaminate gsm8k_test.jsonl --output traces.jsonl
    python sft.py curate --input traces.jsonl --output again.jsonl     # verifies finished traces once more
"""
import argparse
import asyncio
import builtins
import contextlib
import ctypes
import fcntl
import functools
import hashlib
import itertools
import json
import keyword
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
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import distribute_tensor
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm
from transformers import AutoModelForCausalLM, Qwen3Config

from data import (LAYOUTS, boxed, embedded_problem, embedded_tokenizer, encode_prompt, extract_answer,
                  field_names, load_problems, load_template, read_row, read_rows, tool_call)
from eval import (Help, add_format_arguments, at_least, computes, in_range,
                  is_equivalent, make_sandbox, need_values, parse_flags, run_script, syntax_tree)
from rollout import (CLOSING, CODE_OPEN, DTYPES, INTERPRETER_CLOSE, INTERPRETER_OPEN, TAG, TOOLS, Packing,
                     at_least_fp32, break_tags, encode_response, encode_text, generate, load_config,
                     load_model, load_tokenizer, split_segments, strip_fence, tool_of)
from sandbox import UserError

# ---------------------------------------------------------------------------------------------
# Sequences for the trainer: one position per token, packed into micro-batches

LOGIT_BYTES = {"cuda": 256 << 20, "cpu": 32 << 20}  # at once: a CPU's cache is small


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
    return Example(torch.tensor(ids[:-1]), torch.tensor(ids[1:]),
                   **{name: torch.as_tensor(x, dtype=torch.float32)[1:] for name, x in columns.items()})


def pack(lengths, token_budget, world):
    """result[rank][micro_batch]: lists of indices. Longest sequence first into the emptiest bin;
    equally many bins per rank, maybe empty; above token_budget only a single sequence."""
    assert lengths, "nothing to pack"
    budget = max(token_budget, max(lengths))
    for n in itertools.count(max(1, math.ceil(sum(lengths) / (token_budget * world)))):
        bins, loads = [[] for _ in range(n * world)], [0] * (n * world)
        for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
            j = loads.index(min(loads))
            bins[j].append(i)
            loads[j] += lengths[i]
        if max(loads) <= budget:
            return [[bins[m * world + rank] for m in range(n)] for rank in range(world)]


def collate(examples, device):
    """(flat Example (T,), its Packing); an empty micro-batch becomes one masked token."""
    if not examples:
        zero = torch.zeros(1, dtype=torch.long, device=device)
        return Example(zero, zero, *[zero.float()] * (len(fields(Example)) - 2)), Packing([1], device)
    packing = Packing([len(e) for e in examples], device)
    columns = {name: torch.cat([getattr(e, name) for e in examples]).to(device)
               for name, column in vars(examples[0]).items() if column is not None}
    return Example(**columns), packing


class Policy(nn.Module):
    """A causal LM that returns log-probabilities. The head is inside `forward`, where FSDP has
    gathered its weights, and takes tokens in chunks: no (T, V) tensor ever exists."""

    def __init__(self, lm):
        super().__init__()
        self.lm = lm

    def forward(self, input_ids, targets, loss_mask, packing, temperature=1.0, with_entropy=False):
        """input_ids, targets, loss_mask (T,) -> the targets' logprobs (T,) at the temperature;
        with_entropy: also the entropy (T,). 0 where masked: the head skips that."""
        hidden = self.lm.model(input_ids=input_ids[None], position_ids=packing.position_ids[None],
                               use_cache=False, packing=packing).last_hidden_state[0]  # (T, hidden)
        chosen = loss_mask.nonzero()[:, 0]
        chunk = max(1, LOGIT_BYTES[hidden.device.type] // (4 * self.lm.config.vocab_size))
        head = self.head
        if len(chosen) > chunk and torch.is_grad_enabled():  # recompute logits in backward
            head = functools.partial(checkpoint, self.head, use_reentrant=False)
        parts = [head(hidden[i], targets[i], temperature, with_entropy) for i in chosen.split(chunk)]
        columns = [torch.zeros_like(input_ids, dtype=values.dtype).index_put((chosen,), values)
                   for values in map(torch.cat, zip(*parts))]
        return columns if with_entropy else columns[0]

    def head(self, hidden, targets, temperature, with_entropy):
        """hidden (n, hidden), targets (n,) -> logprobs (n,) and, if wanted, entropy (n,)."""
        logits = at_least_fp32(self.lm.lm_head(hidden)) / temperature  # (n, V)
        normaliser = torch.logsumexp(logits, -1)
        logprobs = logits.gather(-1, targets[:, None])[:, 0] - normaliser
        if not with_entropy:
            return (logprobs,)
        return logprobs, normaliser - (torch.softmax(logits, -1) * logits).sum(-1)


# ---------------------------------------------------------------------------------------------
# Training

def trace_example(trace, tokenizer, template, max_interpreter_tokens, mask_interpreter=True,
                  mask_failed=True):
    """A trace as an Example: prompt, interpreter text and failed snippets are masked."""
    prompt = encode_prompt(tokenizer, template, trace["question"])
    ids, mask = encode_response(tokenizer, trace["response"], max_interpreter_tokens,
                                trace["failed_calls"] if mask_failed else (), mask_interpreter)
    return make_example(prompt + ids, [0] * len(prompt) + mask)


def batch_loss(policy, batch, token_budget, process, backward=False):
    """Mean loss over all trainable tokens of a list of Example, on all ranks; with backward
    also its gradient."""
    total = sum(e.loss_mask.sum().item() for e in batch)
    token_sum = 0.0
    for indices in pack([len(e) for e in batch], token_budget, process.world)[process.rank]:
        flat, packing = collate([batch[i] for i in indices], process.device)
        with torch.set_grad_enabled(backward):
            loss = -policy(flat.input_ids, flat.targets, flat.loss_mask, packing).sum()
        token_sum += loss.item()
        if backward:
            # FSDP averages the ranks' gradients; a factor of world makes that their sum.
            (loss / total * process.world).backward()
    return all_sum(token_sum, process.device) / total


def clipped_step(module, optimizers, max_norm, what):
    """Clip the gradient and apply it; returns its norm before. FloatingPointError, with the
    weights as they were, where that is not finite."""
    norm = nn.utils.clip_grad_norm_(module.parameters(), max_norm).full_tensor().item()
    if not math.isfinite(norm):
        raise FloatingPointError(f"{what} is {norm}")
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()
    return norm


def batches(n, batch_size, seed):
    """Endless lists of batch_size of n indices, shuffled anew every epoch."""
    rng, order = random.Random(seed), []
    while True:
        if len(order) < batch_size:
            order += rng.sample(range(n), n)
        yield order[:batch_size]
        order = order[batch_size:]


def trapezoid(step, steps, warmup):
    """Learning-rate factor: linear warm-up, 1 until half-time, then a line down to 0. A cosine
    is worse here (results/README.md)."""
    return min(1.0, (step + 1) / max(1, warmup), (steps - step) / (0.5 * steps))


class Muon(torch.optim.Optimizer):
    """Along the orthogonalised momentum of each matrix (kellerjordan.github.io/posts/muon): half
    the steps of AdamW here. In fp32: torch.optim.Muon works in bf16, which many CPUs only
    emulate. Matrices are sharded by rows (FSDP2); every rank sees all and steps its own."""

    def __init__(self, matrices, lr, momentum=0.95):
        super().__init__(matrices, {"lr": lr, "momentum": momentum})
        for p in self.param_groups[0]["params"]:
            self.state[p]["momentum"] = torch.zeros_like(p)

    @torch.no_grad()
    def step(self):
        [group] = self.param_groups
        mesh, local = group["params"][0].device_mesh, []
        for p in group["params"]:
            average = self.state[p]["momentum"].lerp_(p.grad, 1 - group["momentum"])
            local.append(p.grad.lerp(average, group["momentum"]).to_local().flatten())  # Nesterov
        shards = [None] * mesh.size(mesh.ndim - 1)  # in one message: one per matrix took 100 ms
        mine = torch.cat(local), [len(rows) for rows in local]
        dist.all_gather_object(shards, mine, mesh.get_group(mesh.ndim - 1))
        for p, *pieces in zip(group["params"], *(flat.split(sizes) for flat, sizes in shards)):
            update = orthogonalise(torch.cat(pieces).view(p.shape)) * max(1.0, p.shape[0] / p.shape[1]) ** 0.5
            p.sub_(group["lr"] * distribute_tensor(update, mesh, p.placements, src_data_rank=None))


def orthogonalise(x):
    """U V^T of x = U S V^T, about: five Newton-Schulz steps bring singular values to 0.7-1.2."""
    if x.shape[0] > x.shape[1]:
        return orthogonalise(x.T).T
    x = x / (x.norm() + 1e-7)
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x


def train(policy, examples, held_out, recipe, process, folder, save_every):
    """Train the sharded policy on a list of Example, from the newest checkpoint in the folder;
    metrics.jsonl there gets a line every tenth step. Returns the metrics on held_out and on as
    many examples. At process.deadline the process ends with a checkpoint."""
    lr, muon_lr, steps = recipe.sft_lr, recipe.sft_muon_lr, recipe.sft_steps
    settings = recipe.token_budget, process
    rank = process.rank
    of_muon = {p for p in policy.lm.model.layers.parameters() if p.ndim == 2} if muon_lr else set()
    of_adamw = [p for p in policy.parameters() if p not in of_muon]
    adamw = torch.optim.AdamW(of_adamw, lr=lr, betas=(0.9, 0.95), weight_decay=0.01, fused=True)
    zero_moments(adamw)
    optimizers = {adamw: lr}  # -> peak rate
    if of_muon:
        optimizers[Muon([p for p in policy.parameters() if p in of_muon], muon_lr)] = muon_lr
    state = training_state("policy", policy, *optimizers)
    path, record = find_checkpoint(folder / "checkpoints", rank)
    if path:
        dcp.load(state, checkpoint_id=path)
    start = record["step"]
    file = open(folder / "metrics.jsonl" if rank == 0 else os.devnull, "a", buffering=1)
    if rank == 0:
        file.truncate(record["bytes"].get("metrics.jsonl", 0))
    order = batches(len(examples), recipe.sft_batch_size, recipe.sft_seed)
    order = itertools.islice(order, start, None)
    bar = tqdm(range(start, steps), desc="warm start", disable=rank > 0, mininterval=1.0)
    for step in bar:
        batch = [examples[i] for i in next(order)]
        for optimizer, peak in optimizers.items():
            optimizer.param_groups[0]["lr"] = peak * trapezoid(step, steps, recipe.sft_warmup)
        loss = batch_loss(policy, batch, *settings, backward=True)
        norm = clipped_step(policy, optimizers, 1.0, f"warm start step {step}: gradient norm")
        bar.set_postfix(loss=f"{loss:.4f}")
        if step % 10 == 0 or step == steps - 1:
            file.write(json.dumps({"step": step, "loss": loss, "grad_norm": norm}) + "\n")
        stops = time_is_up(process)
        if (stops or (step + 1) % save_every == 0) and step + 1 < steps:
            sizes = {"metrics.jsonl": os.fstat(file.fileno()).st_size}
            save_checkpoint(folder / "checkpoints", training_state("policy", policy, *optimizers),
                            {"step": step + 1, "bytes": sizes}, 1, rank)
            if stops:
                print(f"--minutes are over after step {step + 1} of the warm start: {process.goes_on}")
                sys.exit(0)
    seen, unseen = (batch_loss(policy, batch, *settings)
                    for batch in (examples[:len(held_out)], held_out))
    metrics = {"train_loss": seen, "held_out_loss": unseen, "memorisation_gap": unseen - seen}
    file.write(json.dumps(metrics) + "\n")
    file.close()
    return metrics


# ---------------------------------------------------------------------------------------------
# Traces: candidates that passed the checks of format, execution and answer

class Rejected(Exception):
    """Why a row becomes no trace: "stage: reason", and where it helps what was found."""


def load_traces(source):
    """A file or hub id -> [{"question", "answer", "family", "response", "failed_calls"}]."""
    traces = []
    for place, row in read_rows(source):
        found = read_row(row)
        if not found or found["own"] is None:
            raise UserError(f"{place}: no question, or no \\boxed{{}} answer in the response: this is "
                            "no trace (sft.py curate makes them)")
        traces.append({"failed_calls": [], "family": Path(source).stem,
                       "response": found.pop("solution")} | found | row)
    return traces


def take_apart(response):
    """The model's texts (each but the last ends with a call), of each call its tool and the text
    between its tags, and the interpreter text after each."""
    segments = [text for _, text in split_segments(response)]
    texts, outputs = segments[::2], segments[1::2]
    calls = []
    for text in texts[:-1]:
        tool = tool_of(text)
        snippet = text.rpartition(tool.open)[2].removesuffix(tool.close)
        calls.append((tool, strip_fence(snippet)))
    return texts, calls, outputs


def check_format(response):
    """Rejects what a reader or the rollout engine would not understand."""
    wanted = None  # the closing tag of what is open
    for tag in TAG.findall(response):
        if tag != wanted and (wanted or tag not in CLOSING):
            raise Rejected("format: tags")
        wanted = None if tag == wanted else CLOSING[tag]
    if wanted:
        raise Rejected("format: tags")
    texts, calls, _ = take_apart(response)
    closed = [sum(text.count(tool.close) for tool in TOOLS) for text in texts]
    if INTERPRETER_OPEN in "".join(texts) or closed != [1] * len(calls) + [0]:
        raise Rejected("format: interpreter block missing or misplaced")
    if not all(syntax_tree(text) for tool, text in calls if tool.name == "code"):
        raise Rejected("format: snippet does not parse")
    before, _, ending = response.rpartition("<answer>")
    final, earlier = boxed(ending), extract_answer(before)
    if ("<answer>" in before or not ending.endswith("</answer>") or ending.count(r"\boxed") != 1
            or final is None or earlier not in (None, final)):
        raise Rejected("format: no single final answer")


# With thousands commas or without. The digits of a word (x1) or a version (1.2.3) are none.
NUMBER_IN_TEXT = re.compile(r"(?<![\w.])(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|(?<![\w.])\.\d+")
TOKEN = re.compile(rf"{NUMBER_IN_TEXT.pattern}|\w+|[^\w\s]")


def numbers(text):
    """The numbers of a text without their signs, exactly as they are written, in order."""
    return [Decimal(number.replace(",", "")) for number in NUMBER_IN_TEXT.findall(text)]


def last_place(number):
    """The value of a number's last digit: 0.01 for 3.14, 1 for 42."""
    return Decimal(10) ** number.as_tuple().exponent


def same_token(quoted, real):
    """Whether two tokens are equal, or `quoted` is `real` rounded to the decimals it shows. A
    whole number is no rounding: 63 stands for 63.00000000000001, but not for 63.3."""
    if not numbers(quoted) or not numbers(real):
        return quoted == real
    shown, exact = numbers(quoted)[0], numbers(real)[0]
    return abs(shown - exact) <= (last_place(shown) / 2 if "." in quoted else Decimal("1e-9"))


def same_output(quoted, result):
    """Whether a quoted output is what came back; of an error only its kind counts."""
    real = break_tags(result.output)
    if result.status != "ok":  # the last line is "ValueError: math domain error"
        quoted, real = (text.strip().rpartition("\n")[2].partition(":")[0] for text in (quoted, real))
    quoted, real = TOKEN.findall(quoted), TOKEN.findall(real)
    return len(quoted) == len(real) and all(map(same_token, quoted, real))


async def check_trace(candidate, reference, sandbox):
    """Check format, execution and answer: (response with the real outputs, indices of failed
    snippets, SandboxResults). An empty interpreter block is filled, any other must agree."""
    check_format(candidate)
    texts, calls, quotes = take_apart(candidate)
    results = [await tool.run(text, 0, sandbox) for tool, text in calls]
    if any(result.status == "sandbox_error" for result in results):
        raise RuntimeError("the sandbox failed during curation")
    response = texts[0]
    for quoted, result, text in zip(quotes, results, texts[1:]):
        if quoted.strip() and not same_output(quoted, result):
            raise Rejected("execution: quoted output differs")
        output = break_tags(result.output).strip("\n")
        response += f"\n{INTERPRETER_OPEN}\n{output}\n{INTERPRETER_CLOSE}{text}"
    if not await is_equivalent(extract_answer(response), reference, sandbox):
        raise Rejected("answer: differs from the reference")
    return response, [i for i, result in enumerate(results) if result.status != "ok"], results


async def embedded_traces(n, code_share, seed, sandbox, split="train"):
    """Traces of n embedded problems, about the share `code_share` solved with code, the rest by
    hand, as `load_traces` reads them; and a Counter of "kept" and of the reasons to reject."""
    rng = random.Random(seed + 1)
    problems = [embedded_problem(split, seed, i) for i in range(n)]
    candidates = [p.by_code if rng.random() < code_share else p.by_hand for p in problems]

    async def verify(problem, candidate):
        try:
            response, failed, _ = await check_trace(candidate, problem.answer, sandbox)
        except Rejected as rejected:
            return str(rejected), None
        finally:
            bar.update()
        return "kept", {"question": problem.question, "answer": problem.answer,
                        "family": problem.family, "response": response, "failed_calls": failed}

    with tqdm(total=n, desc="curation", mininterval=1.0) as bar:
        outcomes = await asyncio.gather(*map(verify, problems, candidates))
    return [trace for _, trace in outcomes if trace], Counter(reason for reason, _ in outcomes)


# ---------------------------------------------------------------------------------------------
# The warm start

def versions():
    return {"python": sys.version.split()[0], "torch": torch.__version__,
            "transformers": transformers.__version__, "tokenizers": tokenizers.__version__}


def embedded_config(tokenizer):
    """The small Qwen3 of the embedded default: 0.6 M parameters."""
    return Qwen3Config(
        vocab_size=len(tokenizer), hidden_size=128, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, head_dim=32, intermediate_size=320, rope_theta=10000.0,
        max_position_embeddings=2048, tie_word_embeddings=True, bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)


def starting_point(path):
    """(configuration, tokenizer) of a checkpoint, or for an empty path the embedded ones."""
    tokenizer = load_tokenizer(path) if path else embedded_tokenizer()
    return load_config(path, tokenizer) if path else embedded_config(tokenizer), tokenizer


def starting_model(path, config, seed):
    """A checkpoint's model, or the embedded one with random weights, on the CPU in fp32."""
    if path:
        return load_model(path, "cpu")
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(config, attn_implementation="retool")


def digest(*records):
    """16 hex digits that change with JSON-able records, versions and the code of these files."""
    found = hashlib.sha256(json.dumps([*records, versions()]).encode())
    for name in ("sandbox.py", "rollout.py", "data.py", "eval.py", "sft.py"):
        found.update((Path(__file__).parent / name).read_bytes())
    return found.hexdigest()[:16]


def warm_start_recipe(args, traces=()):
    """All that decides a warm start's result, which is kept under its hash: the code below sees
    no other argument that could change it. (The number of ranks only changes rounding.)"""
    names = """model sft_traces code_share sft_steps sft_batch_size sft_lr sft_muon_lr sft_warmup
        sft_seed token_budget dtype max_interpreter_tokens sandbox_timeout sft_mask_interpreter
        mask_failed""".split()
    files = sorted(Path(args.model).glob("*")) if args.model else []
    weights = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    return SimpleNamespace(**{name: getattr(args, name) for name in names}, weights=weights,
                           traces=traces, template=load_template(args.prompt_template))


async def cold_start_traces(recipe, sandbox, folder):
    """(traces, held-out traces, counts) of the embedded cold start: curated once, then read
    from a file whose name is a hash of what decides them."""
    settings = recipe.code_share, recipe.sft_seed, recipe.sandbox_timeout
    path = folder / f"traces-{digest(recipe.sft_traces, settings)}.json"
    if not path.exists():
        async with sandbox:
            (kept, counts), (held_out, _) = [
                await embedded_traces(n, *settings[:2], sandbox, split)
                for n, split in ((recipe.sft_traces, "train"), (256, "test"))]
        partial = path.with_suffix(f".partial-{os.getpid()}")
        partial.write_text(json.dumps([kept, held_out, counts]))
        partial.rename(path)  # only a finished curation is ever found under its name
    return json.loads(path.read_text())


async def warm_start(args, process, traces_file=""):
    """The folder of the warm-started checkpoint for these arguments, made now or reused. An
    interrupted one goes on at its last checkpoint, with the same metrics."""
    rows = load_traces(traces_file) if traces_file else []
    if traces_file and len(rows) < 2:
        raise UserError(f"{traces_file}: needs at least two traces, one is held out")
    recipe = warm_start_recipe(args, rows)
    rank = process.rank
    folder, shared = Path(args.warm_start_dir) / digest(vars(recipe)), [None]
    folder.parent.mkdir(parents=True, exist_ok=True)
    with open(folder.with_suffix(".lock") if rank == 0 else os.devnull, "w") as lock:
        if rank == 0:  # curation runs once
            fcntl.flock(lock, fcntl.LOCK_EX)  # a run with the same arguments finishes first
            traces = None
            if folder.is_dir():
                print(f"warm start: reusing {folder}")
            elif rows:
                split = len(rows) - max(1, len(rows) // 50)
                traces = rows[:split], rows[split:]
            else:
                *traces, counts = await cold_start_traces(recipe, make_sandbox(args), folder.parent)
                print(f"curation: {counts}")
            shared = [(folder, traces)]
        dist.broadcast_object_list(shared)
        folder, traces = shared[0]
        if traces:
            partial = folder.with_suffix(".partial")
            partial.mkdir(exist_ok=True)
            metrics = train_on_traces(*traces, recipe, args, partial, process)
            if rank == 0:
                print("warm start:", *(f" {name} {value:.4f}" for name, value in metrics.items()))
                record = vars(args) | {"versions": versions()}
                (partial / "arguments.json").write_text(json.dumps(record, indent=1))
                shutil.rmtree(partial / "checkpoints", ignore_errors=True)
                partial.rename(folder)  # only a finished one is ever found under its name
        dist.barrier()
    return folder


def train_on_traces(traces, held_out, recipe, args, folder, process):
    """The warm start itself: the checkpoint goes into `folder`. Returns the final metrics.
    args: for what decides no result, the settings of `shard` and --sft_save_every."""
    config, tokenizer = starting_point(recipe.model)
    settings = (tokenizer, recipe.template, recipe.max_interpreter_tokens,
                recipe.sft_mask_interpreter == "on", recipe.mask_failed == "on")
    examples, fresh = ([trace_example(trace, *settings) for trace in rows]
                       for rows in (traces, held_out))
    longest, positions = max(len(e) for e in examples + fresh), config.max_position_embeddings
    if longest > positions:
        raise UserError(f"a trace has {longest} tokens, the model {positions} positions")
    start = recipe.model, config, recipe.sft_seed
    plain = starting_model(*start) if process.rank == 0 else None  # to be saved
    policy = Policy(starting_model(*start))
    shard(policy, policy.lm, args)
    metrics = train(policy, examples, fresh, recipe, process, folder, args.sft_save_every)
    sync_weights(policy, plain)
    if process.rank == 0:
        plain.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return metrics


# ---------------------------------------------------------------------------------------------
# Sharding

def check_mesh(replicas, world):
    """UserError where the ranks cannot be arranged as so many copies of a sharded model."""
    if world % replicas:
        raise UserError(f"--replicas {replicas} does not divide the {world} ranks")


def shard(module, lm, settings):
    """FSDP2 over `module`, which contains `lm`: each layer is a unit that is gathered when needed,
    the rest belongs to the root. settings: dtype and the trainer's flags. With replicas the ranks
    form a grid (replicas, shards): hybrid sharding. The module may lie in host memory: its units
    go to the GPU one by one. Master weights, gradients and optimiser states are fp32."""
    world, kind = dist.get_world_size(), "cuda" if torch.cuda.is_available() else "cpu"
    if settings.replicas > 1:
        grid = settings.replicas, world // settings.replicas
        mesh = init_device_mesh(kind, grid, mesh_dim_names=("replicate", "shard"))
    else:
        mesh = init_device_mesh(kind, (world,))
    lm.eval()
    if settings.activation_checkpointing:
        for layer in lm.model.layers:
            layer.training = True  # transformers asks that; what is inside stays as it is, without dropout
        lm.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    precision = MixedPrecisionPolicy(DTYPES[settings.dtype], torch.float32)
    offload = CPUOffloadPolicy(pin_memory=kind == "cuda") if settings.cpu_offload else OffloadPolicy()
    for unit in [*lm.model.layers, module]:
        fully_shard(unit, mesh=mesh, mp_policy=precision, offload_policy=offload)
    return module


@torch.no_grad()
def sync_weights(policy, plain):
    """Copy the sharded policy's weights into a plain model, in place (a captured graph over
    `plain` stays valid). All ranks call it; plain may be None on those that want no copy."""
    policy.reshard()  # after a forward without backward the root's weights are still gathered
    sources = dict(policy.lm.named_parameters())
    targets = dict(plain.named_parameters()) if plain else dict.fromkeys(sources)
    assert targets.keys() == sources.keys()
    for name, source in sources.items():
        full = source.full_tensor()
        if plain:
            targets[name].copy_(full)


def all_sum(value, device):
    """The sum of a number over all ranks."""
    total = torch.tensor(value, dtype=torch.float64, device=device)
    dist.all_reduce(total)
    return total.item()


def time_is_up(process):
    """Whether rank 0's clock has passed the deadline: the same on all ranks."""
    return all_sum(process.rank == 0 and time.monotonic() > process.deadline, process.device) > 0


# ---------------------------------------------------------------------------------------------
# Checkpoints of a training run. torch.distributed.checkpoint writes the shards, each rank its own, and reads
# them for any number of ranks; added here: a checkpoint is whole or absent, and a damaged one is recognised.

def zero_moments(optimizer):
    """Give an AdamW the moments of its first step: a checkpoint is loaded into them. (The helpers
    of torch would take a real step to make them, and saving would change the run.)"""
    for group in optimizer.param_groups:
        for p in group["params"]:
            optimizer.state[p] = {"step": torch.zeros((), dtype=torch.float32, device=p.device),
                                  "exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}


def training_state(name, module, *optimizers):
    """Every tensor that a step changes, by name: sharded weights and the optimisers' moments.
    Loading writes into them in place."""
    module.reshard()  # after a forward without backward the root's weights are still gathered
    state = {}
    for key, p in module.named_parameters():
        state[f"{name}.{key}"] = p.detach()
        for optimizer in optimizers:
            state |= {f"{name}.{key}.{moment}": value for moment, value in optimizer.state.get(p, {}).items()}
    return state


def file_hash(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync_to_disk(path):
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def publish(partial, final, record, hashes, keep):
    """Rank 0: make the synced shards in `partial` the checkpoint `final`, and delete old ones."""
    manifest = record | {"files": {name: digest for part in hashes for name, digest in part.items()}}
    manifest["files"][".metadata"] = file_hash(partial / ".metadata")
    for name in manifest["files"]:
        os.stat(partial / name)  # shards of another node, if the folder is not shared: an error here
    (partial / "manifest.json").write_text(json.dumps(manifest, indent=1))
    sync_to_disk(partial / "manifest.json")
    sync_to_disk(partial)
    shutil.rmtree(final, ignore_errors=True)  # damaged, or of a run that has been wound back
    partial.rename(final)
    sync_to_disk(final.parent)
    found = sorted(final.parent.glob("step-*"))
    later = found.index(final) + 1  # damaged ones, which the run has gone back behind
    for old in found[:later][:-keep] + found[later:]:
        shutil.rmtree(old)


def save_checkpoint(folder, state, record, keep, rank):
    """Write state and record (JSON, with its "step") as folder/step-<step>, then delete all
    but the last `keep`. All ranks call it, on a file system that they share.

    Shards go to a temporary folder and are synced; a manifest with everyone's hashes is the
    last file; one rename makes it a checkpoint. A crash at any moment leaves the ones before
    untouched. UserError where nothing can be written.
    """
    partial, final = folder / "partial", folder / f"step-{record['step']:06d}"
    if rank == 0:
        shutil.rmtree(partial, ignore_errors=True)  # of a run that was killed here
    dist.barrier()
    try:
        dcp.save(state, checkpoint_id=partial)
        hashes = [None] * dist.get_world_size()
        dist.all_gather_object(hashes, {file.name: file_hash(file) for file in partial.glob(f"__{rank}_*")})
        if rank == 0:
            publish(partial, final, record, hashes, keep)
    except (CheckpointException, OSError) as error:  # where one rank ends, torchrun ends the others
        raise UserError(f"checkpoint of step {record['step']} cannot be written "
                        f"({str(error).strip().splitlines()[-1]}): disk full? The ones before it in "
                        f"{folder} are intact") from None
    if sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)  # returns the gaps of a heap that `distributed` lets grow


def find_checkpoint(folder, rank):
    """(path, record) of the newest undamaged checkpoint, the same on all ranks; (None, the record of
    a run that begins) if there is none."""
    found = [newest_checkpoint(folder) if rank == 0 else None]
    dist.broadcast_object_list(found)
    return found[0]


def newest_checkpoint(folder):
    """`find_checkpoint` on one rank. UserError if all are damaged; says which it passes over."""
    for path in sorted(folder.glob("step-*"), reverse=True):
        try:
            record = json.loads((path / "manifest.json").read_text())
            damaged = [name for name, digest in record["files"].items() if file_hash(path / name) != digest]
        except (OSError, ValueError, KeyError) as error:
            damaged = [str(error)]
        if not damaged:
            return path, record
        print(f"checkpoint {path} is damaged ({damaged[0]}): going back to the one before", flush=True)
    if any(folder.glob("step-*")):
        raise UserError(f"{folder}: every checkpoint is damaged; delete them to start from the beginning")
    return None, {"step": 0, "seconds": 0.0, "bytes": {}}


# ---------------------------------------------------------------------------------------------
# Flags of both trainers

def add_warm_start_arguments(parser):
    """The warm start's flags, shared with ppo.py. Defaults are the embedded run's."""
    add = parser.add_argument_group("warm start").add_argument
    add("--model", default="",
        help="checkpoint folder or hub id, used as it is; empty: the embedded model, warm-started")
    add("--sft_traces", type=at_least(1), default=6000, help="embedded ones; paper: 2,000 released")
    add("--code_share", type=in_range(0.0, 1.0), default=0.55,
        help="share of them solved with code; paper's policy starts at 0.18")
    add("--sft_steps", type=at_least(1), default=1100, help="optimiser steps; paper: 2 epochs")
    add("--sft_batch_size", type=at_least(1), default=32, help="sequences per step, over all ranks")
    add("--sft_lr", type=in_range(0.0), default=5e-3, help="AdamW's peak; falls to 0; paper 1e-6 (32B)")
    add("--sft_muon_lr", type=in_range(0.0), default=0.04,
        help="of Muon, for the layers' matrices; 0: AdamW trains all, as the paper's")
    add("--sft_warmup", type=at_least(0), default=50, help="warm-up steps")
    add("--sft_mask_interpreter", choices=("on", "off"), default="on", help="off: learn results")
    add("--mask_failed", choices=("on", "off"), default="on", help="off: learn failed snippets")
    add("--sft_save_every", type=at_least(1), default=300, help="steps between checkpoints")
    add("--sft_seed", type=int, default=0, help="of traces, order and initial weights")
    add("--warm_start_dir", default="out/warm_start", help="finished ones are kept here and reused")


def add_trainer_arguments(parser):
    add = parser.add_argument_group("trainer").add_argument
    add("--token_budget", type=at_least(1), default=8192, help="tokens per micro-batch and rank")
    add("--activation_checkpointing", action="store_true",
        help="keep only the layers' inputs, compute the rest again in the backward pass")
    add("--cpu_offload", action="store_true", help="weights and optimiser states wait in host memory")
    add("--replicas", type=at_least(1), default=1,
        help="copies of the sharded model, e.g. one per node (hybrid sharding); 1: sharded over all ranks")
    add("--minutes", type=in_range(0.0), default=0.0, help="then stop with a checkpoint; 0: no limit")


# ---------------------------------------------------------------------------------------------
# Curation of real data: quality, the rewriters (solutions -> candidates), `sft.py curate`

def question_words(question, mask_numbers=False):
    """The words of a question in lower case; mask_numbers: # stands for every number."""
    question = re.sub(r"\d[\d.,]*", " # ", question) if mask_numbers else question
    return re.findall(r"[^\W_]+|#", question.lower())


def contamination_keys(question):
    """What training and evaluation problems must not share: the whole question, spaces aside, and
    any 13 words in a row, numbers aside."""
    words = question_words(question, mask_numbers=True)
    grams = [" ".join(words[i:i + 13]) for i in range(len(words) - 12)]
    return ["".join(question_words(question)), *grams]


NOTICED = re.compile(r"(?i)\b(error|exception|fail|fix|correct|mistake|wrong|bug|instead|again|"
                     r"timed? ?out|too (slow|long|large|small|many|deep)|(does|did) not work|retry)")


def is_used(output, later):
    """Whether the text after a snippet takes up a number that it printed, perhaps rounded. If it
    printed none ("True", taken up as "it is prime"): whether it printed anything."""
    if not numbers(output):
        return not output.startswith("[no output")
    return any(abs(a - b) < last_place(b) for a in numbers(output) for b in numbers(later))


def check_quality(candidate, results, reference):
    """Rejects a candidate that passed `check_trace` but computes nothing, does not use what it
    computes, or leaves errors or its answer unexplained."""
    texts, calls, quotes = take_apart(candidate)
    if not calls:
        raise Rejected("quality: no snippet")
    for i, ((tool, code), result) in enumerate(zip(calls, results)):
        if result.status != "ok":
            # The error must be quoted or mentioned right after, and a later snippet run.
            noticed = quotes[i].strip() or NOTICED.search(texts[i + 1])
            corrected = any(later.status == "ok" for later in results[i:])
            if result.status not in ("error", "timeout") or not noticed or not corrected:
                raise Rejected(f"quality: {result.status}, not corrected")
        elif tool.name == "code" and not computes(code):
            raise Rejected("quality: snippet only prints a literal")
        elif not is_used(result.output, "".join(texts[i + 1:])):
            raise Rejected("quality: snippet output is never used")
    stated = numbers("".join(texts).rpartition("<answer>")[0])
    if re.fullmatch(r"-?[\d,.]+", reference) and not set(numbers(reference)) <= set(stated):
        raise Rejected("quality: the answer comes from nowhere")


# "= $<<48/2=24>>"; what is no calculation, as <<60=60>>, only disappears.
ANNOTATION = re.compile(r"(?P<equals> ?=? ?)(?P<currency>[$€£¢]?)"
                        r"<<(?P<sum>[-+(]*[\d.]+[ )]*[-+*/][\d.+\-*/() ]+)=(?P<result>[^<>=]*)>>")


def calculator(solution, answer):
    """Turn the calculator annotations of GSM8K into snippets; None if there are none: "Ann sold
    48/2 = $<<48/2=24>>24 of fruit." becomes "Ann sold 48/2 =", a snippet that prints 48/2, and
    "$24 of fruit."; in front of a line that names a result first, "24, for 48/2 = <<48/2=24>>24",
    all its snippets stand."""
    def snippet(step):
        return "\n" + tool_call(f"print({step['sum']})", step["result"])

    def named_before(step):
        before = re.sub("<<.*?>>", "", step.string[:step.start()])
        named = Counter(numbers(before)) - Counter(numbers(step["sum"]))
        return named.keys() & numbers(step["result"])

    text = ""
    for line in solution.splitlines(keepends=True):
        steps = list(ANNOTATION.finditer(line))
        if any(map(named_before, steps)):
            text += "".join(f"Let me compute {step['sum']}.{snippet(step)}" for step in steps) + line
        else:
            text += ANNOTATION.sub(
                lambda step: step["equals"].rstrip() + snippet(step) + step["currency"], line)
    text = re.sub("<<.*?>>", "", text)
    return f"{text}\n<answer>\\boxed{{{answer}}}</answer>" if CODE_OPEN in text else None


# No part of a variable's name; and numbers that a solution may use unasked.
FILLERS = set("""and are because but can each for from gets had has have her him his its she that the
their them then there they this thus was were which will with would you""".split())

COMMON = {*range(13), 24, 30, 52, 60, 100, 365, 1000}


def variable_name(line, step, taken):
    """A name for the result of an annotation in this line: two words from before its sum and
    two from after it, with a number if the Counter `taken` has it."""
    parts = re.split(r"[\d,.;:(]", re.sub("<<.*?>>", "", line[:step.start()]))
    before = [text for text in parts[:-1 if "=" in step["equals"] else None] if not set(text) & set("+-*/")]
    after = re.match(r"[\d,.]*([^\d,.;:=(<]*)", line[step.end():])[1]
    *before, after = ([word for word in re.findall("[a-z]{3,}", text.lower()) if word not in FILLERS]
                      for text in [*before, after])
    name = "_".join(dict.fromkeys([[], *filter(None, before)][-1][-2:] + after[:2])) or "result"
    taken[name] += 1
    return f"{name}_{taken[name]}" if taken[name] > 1 else name


def program(solution, answer, question):
    """Turn the annotations into one script with a variable for each: an operand that equals an
    earlier result is that variable. None if the answer is no result, another result is never
    used, or an operand is found nowhere or in two places (results, question)."""
    code, variables, used = [], {}, set()  # variables: result -> names
    given, taken = set(numbers(question)), Counter(dir(builtins) + keyword.kwlist)
    for line in solution.splitlines():
        for step in ANNOTATION.finditer(line):
            for value in numbers(step["sum"]):
                sources = len(variables.get(value, [])) + (value in given)
                is_common = value < 1 or {value, 100 * value} & (given | COMMON)
                if sources > 1 or not (sources or is_common):
                    return None
                used.add(value)
            expression = NUMBER_IN_TEXT.sub(
                lambda match: variables.get(*numbers(match[0]), [match[0]])[0], step["sum"].strip())
            code.append(f"{variable_name(line, step, taken)} = {expression}")
            for value in numbers(step["result"])[:1]:
                variables.setdefault(value, []).append(code[-1].split()[0])
    final = next(iter(numbers(answer)), None)
    if final not in variables or set(variables) - used - {final}:
        return None
    script = tool_call("\n".join([*code, f"print({variables[final][-1]})"]), answer)
    return f"Let me compute this.\n{script}The answer is {answer}.\n<answer>\\boxed{{{answer}}}</answer>"


REWRITE_PROMPT = f"""Rewrite the solution below so that it uses a Python interpreter where that
helps. Keep the line of thought, also attempts that failed and how that was noticed. Replace each
calculation, enumeration or check that a program does better by a snippet and the output that you
expect:
{tool_call("print(...)", "...")}Each snippet is a complete script with its own imports. It shares
no variable with the others, computes what it prints, and prints what the text then uses. Every
snippet will be run, and its real output put in the place of yours. Close with
<answer>\\boxed{{...}}</answer>, once. Write nothing but the rewritten solution.

Problem:
{{question}}

Solution:
{{solution}}"""


def api_model(model, url, temperature, max_tokens):
    """complete(prompts, seeds) -> texts of an OpenAI-compatible endpoint, None where one came to
    no end or was refused. UserError when the openai package gives up trying again."""
    try:
        import openai
    except ImportError:
        raise UserError("--rewriter api needs the package openai (pip install openai)") from None
    client = openai.AsyncOpenAI(base_url=url or None, max_retries=6,
                                api_key=os.environ.get("OPENAI_API_KEY", "none"))

    async def complete_one(prompt, seed):
        try:
            reply = await client.chat.completions.create(
                model=model, messages=[{"role": "user", "content": prompt}], seed=seed,
                temperature=temperature, max_tokens=max_tokens)
        except openai.BadRequestError:
            return None
        except openai.OpenAIError as error:
            raise UserError(f"--rewriter api: {' '.join(str(error).split())[:200]}") from None
        finished = reply.choices and reply.choices[0].finish_reason == "stop"
        return reply.choices[0].message.content if finished else None
    return lambda prompts, seeds: asyncio.gather(*map(complete_one, prompts, seeds))


def local_model(path, temperature, max_tokens):
    """complete(prompts, seeds) -> texts of a checkpoint, None where one came to no end."""
    device, dtype = ("cuda", "bf16") if torch.cuda.is_available() else ("cpu", "fp32")
    tokenizer, model = load_tokenizer(path), load_model(path, device, dtype).eval()
    positions = model.config.max_position_embeddings

    async def complete(prompts, seeds):
        ids = [encode_prompt(tokenizer, "{question}", prompt)[:positions - 1] for prompt in prompts]
        room = min(max_tokens, positions - max(map(len, ids)))
        found = await generate(model, tokenizer, ids, None, tools=False, prompt_keys=seeds,
                               temperature=temperature, max_response_tokens=room)
        return [tokenizer.decode(t.response_ids, skip_special_tokens=True)
                if t.is_complete else None for t in found]
    return complete


def make_rewriter(args):
    """rewrite(records of rows) -> a candidate, or None, for each."""
    if args.rewriter in ("local", "api") and not args.model:
        raise UserError(f"--rewriter {args.rewriter} needs --model")
    if args.rewriter == "local":
        complete = local_model(args.model, args.temperature, args.max_tokens)
    elif args.rewriter == "api":
        complete = api_model(args.model, args.api_url, args.temperature, args.max_tokens)

    async def rewrite(records):
        if args.rewriter == "calculator":
            return [calculator(record["solution"], record["own"]) for record in records]
        if args.rewriter == "program":
            return [program(record["solution"], record["own"], record["question"]) for record in records]
        prompts = [REWRITE_PROMPT.replace("{solution}", record["solution"])
                   .replace("{question}", record["question"]) for record in records]
        return await complete(prompts, [args.seed + record["row"] for record in records])
    return rewrite


# ---------------------------------------------------------------------------------------------
# `sft.py curate`: read, filter, rewrite, check, remove duplicates, write, report.
#
# A record is what is known of one row: its number, place and "reason", "kept" or why it is left
# out; "input", the row, for which `check_problem` puts what `read_row` makes of it; the
# rewriter's "candidate"; the "trace".


async def check_problem(record, run):
    """Fill in the problem, if there is something to rewrite and it is not contaminated."""
    row = record.pop("input")
    found = read_row(row, run.layouts)
    if not found:
        raise Rejected(f"filter: unknown layout ({field_names(row)}), name its --question_field")
    record |= found
    question, answer, solution, own = found.values()
    if not question or re.search("[\ud800-\udfff]", question + answer + solution):
        raise Rejected("filter: not well-formed")  # a lone surrogate is no text
    if len(answer) > 200 or answer.lower() in ("proof", "notfound", "none", "n/a", ""):
        raise Rejected("filter: no answer to compare with")
    if not solution:
        raise Rejected("filter: no solution")
    if "<answer>" in solution:  # a trace already, to be checked but not to be rewritten
        record["candidate"] = solution
    elif not await is_equivalent(own, answer, run.sandbox):
        raise Rejected("filter: the solution's answer is not the reference")
    for key in contamination_keys(question):
        if key in run.evaluation:
            raise Rejected("contamination: " + ("13 words" if " " in key else "whole question"),
                           run.evaluation[key], key)


async def make_trace(record, run):
    """Make the trace of a record that has a candidate."""
    if not record["candidate"]:
        raise Rejected("rewrite: no calculation, or unfinished")
    candidate = record["candidate"].encode("utf-8", "replace").decode().strip()
    response, failed, results = await check_trace(candidate, record["answer"], run.sandbox)
    check_quality(candidate, results, record["answer"])
    prompt = run.template.replace("{question}", record["question"])
    if len(encode_text(run.tokenizer, prompt + response)) > run.max_tokens:
        raise Rejected("quality: too long")
    messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}]
    record["trace"] = {"messages": messages, "answer": record["answer"], "family": run.family,
                       "failed_calls": failed, "place": record["place"]}


async def curate_rows(rows, run):
    """The records of [(number, (place, row))], taken through one stage after the other."""
    async def attempt(stage, record):
        if record["reason"] == "kept":
            try:
                await stage(record, run)
            except Rejected as rejected:
                record["reason"], *record["detail"] = rejected.args

    records = [{"row": number, "place": Path(place).name, "reason": "kept", "input": row}
               for number, (place, row) in rows]
    await asyncio.gather(*[attempt(check_problem, record) for record in records])
    unwritten = [record for record in records if record["reason"] == "kept" and "candidate" not in record]
    if unwritten:
        for record, candidate in zip(unwritten, await run.rewrite(unwritten)):
            record["candidate"] = candidate
    await asyncio.gather(*[attempt(make_trace, record) for record in records])
    return records


async def curate_file(args):
    """`sft.py curate`. A line of OUTPUT's journal holds the records of in_flight rows, under a
    hash of all that decides them: an interrupted run does not make them again."""
    output = Path(args.output)
    journal, report, partial = map(output.with_suffix, (".journal", ".report.json", ".partial"))
    if output.exists():
        raise UserError(f"--output {output}: there already; nothing is overwritten")
    names = (args.question_field, args.answer_field, args.solution_field)
    run = SimpleNamespace(
        layouts=[names] if any(names) else LAYOUTS, template=load_template(args.prompt_template),
        rewrite=make_rewriter(args), family=Path(args.input).stem, max_tokens=args.max_tokens,
        tokenizer=load_tokenizer(args.tokenizer) if args.tokenizer else embedded_tokenizer(),
        evaluation={key: f"{Path(file).name}:{number}" for file in args.decontaminate
                    for number, problem in enumerate(load_problems(file), 1)
                    for key in contamination_keys(problem["question"])})
    speed = "output limit in_flight api_url sandbox_workers unsafe_sandbox".split()
    decisive = {name: value for name, value in vars(args).items() if name not in speed}
    rows = enumerate(read_rows(args.input, args.split, args.config), 1)
    rows, done, records = itertools.islice(rows, args.limit or None), {}, []
    async with make_sandbox(args) as run.sandbox:
        with open(journal, "a+") as file, tqdm(desc="rows", total=args.limit or None) as bar:
            file.seek(0)
            for line in file:
                with contextlib.suppress(ValueError):  # an empty line, or one torn by a kill
                    done |= json.loads(line)
            while chunk := list(itertools.islice(rows, args.in_flight)):
                key = json.dumps([decisive, chunk], default=str).encode()
                key = hashlib.sha256(key).hexdigest()
                if key not in done:
                    done[key] = await curate_rows(chunk, run)
                    file.write(f"\n{json.dumps({key: done[key]})}\n")  # ends a torn line first
                    file.flush()
                records += done[key]
                bar.update(len(chunk))
    traces, summary, examples = summarise(records)
    details = {"arguments": vars(args), "examples": examples}
    report.write_text(json.dumps(summary | details, indent=1))
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
    first_rows = {}
    for record in records:
        if record["reason"] == "kept":
            first = first_rows.setdefault(" ".join(question_words(record["question"])), record)
            if first is not record:
                record |= {"reason": "duplicate: same question", "detail": [first["place"]]}
    reasons = Counter(record["reason"] for record in records)
    examples = {reason: [record for record in records if record["reason"] == reason][:3]
                for reason in reasons if reason != "kept"}
    traces = [record["trace"] for record in records if record["reason"] == "kept"]
    return traces, {"rows": len(records), "kept": len(traces),
                    "reasons": dict(sorted(reasons.items()))}, examples


def add_curate_arguments(parser):
    add = parser.add_argument
    add("--input", required=True, help="JSONL or parquet file, or a Hugging Face hub id")
    add("--output", required=True, help="JSONL of traces; the report lies beside it")
    add("--rewriter", choices=("calculator", "program", "local", "api"), default="calculator",
        help="a snippet per calculation, one script, or a model's; traces are only checked")
    add("--limit", type=at_least(0), default=0, help="first rows only; 0: all")
    add("--seed", type=int, default=0, help="of the model's sampling")
    add("--split", default="train", help="of a hub data set")
    add("--config", default=None, help="of a hub data set")
    for name in ("question", "answer", "solution"):
        add(f"--{name}_field", default="", help="dotted path, of an unknown layout")
    add("--prompt_template", default="retool", help="plain, retool, or a file with {question}")
    add("--tokenizer", default="", help="for --max_tokens; empty: the embedded one")
    add("--max_tokens", type=at_least(1), default=16384, help="longer traces are left out")
    add("--decontaminate", nargs="*", default=[], help="evaluation sets that must not occur")
    add("--model", default="", help="of --rewriter local or api")
    add("--temperature", type=in_range(0.0), default=0.7, help="of the model")
    add("--api_url", default="", help="base URL; empty: OpenAI's; the key: OPENAI_API_KEY")
    add("--in_flight", type=at_least(1), default=64, help="rows, and requests, at a time")
    add("--sandbox_workers", type=at_least(1), default=2, help="snippets that run at a time")
    add("--sandbox_timeout", type=in_range(0.0, above=True), default=5.0, help="per snippet")
    add("--unsafe_sandbox", action="store_true", help="run snippets without a missing layer")


# ---------------------------------------------------------------------------------------------
# The script


async def main(process):
    begin = time.monotonic()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=Help, allow_abbrev=False)
    if sys.argv[1:2] == ["curate"]:
        add_curate_arguments(parser)
        return await curate_file(parser.parse_args(sys.argv[2:]))
    add_warm_start_arguments(parser)
    add_trainer_arguments(parser)
    add_format_arguments(parser)
    parser.add_argument("--traces", default="", help="a file or hub id; empty: the embedded ones")
    defaults, given = parse_flags(parser)
    args = argparse.Namespace(**defaults | given)
    if args.model:
        need_values(parser, given, ["sft_lr", "sft_muon_lr", "sft_steps"])
        if not args.traces:
            parser.error("--model needs --traces: the embedded traces are for the embedded model")
    process.deadline = begin + 60 * (args.minutes or math.inf)
    check_mesh(args.replicas, process.world)
    starting_point(args.model)  # a bad checkpoint is found out before the curation
    print(json.dumps(vars(args)))
    folder = await warm_start(args, process, args.traces)
    print(f"checkpoint: {folder}")


if __name__ == "__main__":
    run_script(main)
