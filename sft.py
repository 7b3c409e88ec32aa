"""Supervised warm start: masked next-token loss on verified traces. Also home of what both trainers share.

Differences from the paper: (1) the traces were executed, not only written (see data.py); (2) snippets that
failed are masked, like the interpreter text; (3) sequences are packed to a token budget, and the loss of a
step is the sum over its trainable tokens divided once by their global number, so that it does not depend on
packing, micro-batches or ranks.

    torchrun sft.py                                      # CPU: the embedded warm start, as ppo.py makes it
    torchrun sft.py --model DIR --traces traces.jsonl    # a checkpoint, on your own traces
    torchrun --nproc_per_node 8 sft.py --model ...       # eight GPUs
    python sft.py --benchmark                            # packed against padded training, memory of the head

Letters in shape comments: T tokens of a flat stream of packed sequences, V vocabulary.
"""
import argparse
import asyncio
import contextlib
import copy
import ctypes
import hashlib
import json
import math
import os
import random
import resource
import shutil
import sys
import time
import traceback
from datetime import timedelta
from pathlib import Path

import tokenizers
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import transformers
from safetensors import SafetensorError
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, Qwen2Config

import data
from data import UserError
from rollout import Packing, RolloutError, at_least_fp32, encode_response
from sandbox import Sandbox

# ------------------------------------------------------------------------------------------------------------
# Shared with ppo.py: processes, models, sharding, packing


@contextlib.contextmanager
def distributed():
    """Join torchrun's process group (gloo on CPU, nccl on CUDA); yields (rank, world size, device). Alone, a
    group of one."""
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0",
                        "MASTER_ADDR": "127.0.0.1"}.items():
        os.environ.setdefault(name, value)
    store = dist.HashStore() if "MASTER_PORT" not in os.environ else None
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    elif sys.platform == "linux":
        # glibc gives large blocks back to the kernel at every free, and touching them anew costs a page fault
        # per 4 KB: 18 % of a training step on a virtual machine. M_MMAP_THRESHOLD (-3) and M_TRIM_THRESHOLD
        # (-1) stop that.
        libc = ctypes.CDLL(None)
        libc.mallopt(-3, 1 << 30), libc.mallopt(-1, 2**31 - 1)
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    # Both backends with CUDA: --cpu_offload keeps shards in host memory. Long: the other ranks wait in a
    # collective while rank 0 curates, and for the longest rollout.
    dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", store=store, rank=rank,
                            world_size=world, timeout=timedelta(hours=2))
    try:
        yield rank, world, device
    finally:
        dist.destroy_process_group()


def run_script(main):
    """Run an async main; bad input becomes one line on stderr and a non-zero exit status."""
    try:
        with distributed() as (rank, world, device):
            try:
                asyncio.run(main(rank, world, device))
            except Exception as error:
                if world == 1:
                    raise
                # The other ranks may wait in a collective for ever, and so would an orderly end of the group:
                # leave at once, torchrun ends them.
                print(describe_error(error) or traceback.format_exc(), file=sys.stderr, flush=True)
                os._exit(1)
    except (Exception, KeyboardInterrupt) as error:
        line = describe_error(error)
        if not line:
            raise
        sys.exit(line)


def describe_error(error):
    """One line for what the user or the machine has to change, None for a bug."""
    # the latter two: a loss that is not finite; a path or a disk (a TimeoutError has no errno)
    if isinstance(error, (UserError, RolloutError, FloatingPointError)) or (
            isinstance(error, OSError) and error.errno):
        return f"error: {error}"
    return "interrupted" if isinstance(error, KeyboardInterrupt) else None


DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def embedded_config(tokenizer):
    """The small Qwen2 of the embedded default: 0.6 M parameters."""
    return Qwen2Config(vocab_size=len(tokenizer), hidden_size=128, num_hidden_layers=3, num_attention_heads=4,
                       num_key_value_heads=2, intermediate_size=320, max_position_embeddings=2048,
                       rope_theta=10000.0, tie_word_embeddings=True, bos_token_id=None,
                       eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)


def load_tokenizer(path):
    if not path:
        return data.embedded_tokenizer()
    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise UserError(f"--model {path}: no usable tokenizer there ({str(error).splitlines()[0]})") from None
    # A folder with a config but no tokenizer files yields an empty tokenizer, not an error.
    if len(tokenizer) < 2 or tokenizer.eos_token_id is None or not tokenizer.chat_template:
        raise UserError(f"--model {path}: no usable tokenizer there (needs vocabulary, EOS, chat template)")
    return tokenizer


def load_config(path):
    """The model's configuration, without loading its weights."""
    if not path:
        return embedded_config(data.embedded_tokenizer())
    try:
        return AutoConfig.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise UserError(f"--model {path}: cannot be loaded ({str(error).splitlines()[0]})") from None


def check_model(path, critic_path=""):
    """Read a checkpoint's configuration and tokenizer (and the critic's) without its weights; returns the
    configuration. UserError where they cannot be read or do not belong together."""
    tokenizer = load_tokenizer(path)
    config = load_config(path) if path else embedded_config(tokenizer)
    if critic_path and load_tokenizer(critic_path).get_vocab() != tokenizer.get_vocab():
        raise UserError(f"--critic_model {critic_path}: its vocabulary is not the policy's")
    for name, rows in ((path, config.vocab_size),
                       (critic_path, load_config(critic_path).vocab_size if critic_path else math.inf)):
        if rows < len(tokenizer):
            raise UserError(f"{name}: the model has {rows} rows of embeddings, the tokenizer "
                            f"{len(tokenizer)} tokens")
    return config


def load_model(path, tokenizer, device, seed=0, dtype="fp32"):
    """A causal LM whose attention is rollout.packed_attention; path "" makes the embedded model from a seed.

    Trap: never `.to(torch.bfloat16)` later, that would round RoPE's frequencies too.
    """
    if not path:
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(embedded_config(tokenizer),
                                                attn_implementation="retool").to(device)
    try:
        model = AutoModelForCausalLM.from_pretrained(path, attn_implementation="retool", dtype=DTYPES[dtype])
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(f"--model {path}: cannot be loaded ({str(error).splitlines()[0]})") from None
    return model.to(device)


LOGIT_BYTES = 256 << 20  # of the logits that exist at one time: 441 tokens of Qwen's vocabulary in fp32


class Policy(nn.Module):
    """A causal LM that returns log-probabilities. The head is inside `forward`, where FSDP has gathered its
    weights, and goes through the tokens in chunks: no (T, V) tensor ever exists, forward or backward."""

    def __init__(self, lm):
        super().__init__()
        self.lm = lm

    def forward(self, input_ids, targets, loss_mask, packing, temperature=1.0, with_entropy=False):
        """input_ids, targets, loss_mask (T,) -> logprobs (T,) of the targets at the temperature, 0 where
        masked.

        with_entropy: also the entropy (T,) of each trainable position's distribution, without gradient. The
        head, most of the work of a small model, runs for trainable positions only.
        """
        hidden = self.lm.model(input_ids=input_ids[None], position_ids=packing.position_ids[None],
                               use_cache=False, packing=packing).last_hidden_state[0]  # (T, hidden)
        chosen = loss_mask.nonzero()[:, 0]
        chunk = max(1, LOGIT_BYTES // (4 * self.lm.config.vocab_size))
        parts = []
        for positions in chosen.split(chunk):
            arguments = hidden[positions], targets[positions], temperature, with_entropy
            # A chunk's logits are computed again in the backward pass instead of being kept; a single chunk
            # is kept, for there is nothing to save.
            parts.append(checkpoint(self.head, *arguments, use_reentrant=False)
                         if len(chosen) > chunk and torch.is_grad_enabled() else self.head(*arguments))
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
        with torch.no_grad():
            return logprobs, normaliser - (torch.softmax(logits, -1) * logits).sum(-1)


def check_mesh(args, world):
    """UserError where the ranks cannot be arranged as args.replicas copies of a sharded model."""
    if args.replicas < 1 or world % args.replicas:
        raise UserError(f"--replicas {args.replicas} does not divide the {world} ranks")


def shard(module, lm, args):
    """FSDP2 over `module`, which contains `lm`: each layer is a unit that is gathered when needed, the rest
    belongs to the root. With --replicas the ranks form a grid (replicas, shards): hybrid sharding. The module
    may lie in host memory: its units go to the GPU one by one, so that no GPU ever holds all of it.

    Master weights, gradients between ranks and optimiser states are fp32 whatever --dtype computes in.
    """
    world, kind = dist.get_world_size(), "cuda" if torch.cuda.is_available() else "cpu"
    if args.replicas > 1:
        mesh = init_device_mesh(kind, (args.replicas, world // args.replicas),
                                mesh_dim_names=("replicate", "shard"))
    else:
        mesh = init_device_mesh(kind, (world,))
    if args.activation_checkpointing:
        lm.train()  # transformers checkpoints in training mode only; no model here has dropout
        lm.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    precision = MixedPrecisionPolicy(DTYPES[args.dtype], torch.float32)
    offload = CPUOffloadPolicy(pin_memory=kind == "cuda") if args.cpu_offload else OffloadPolicy()
    for unit in [*lm.model.layers, module]:
        fully_shard(unit, mesh=mesh, mp_policy=precision, offload_policy=offload)
    return module


@torch.no_grad()
def sync_weights(policy, plain):
    """Copy the sharded policy's weights into a plain model, in place (a captured graph over `plain` stays
    valid). All ranks call it; plain may be None on those that want no copy."""
    policy.reshard()  # after a forward without backward the root's weights are still gathered
    sources = dict(policy.lm.named_parameters())
    targets = dict(plain.named_parameters()) if plain else dict.fromkeys(sources)
    assert targets.keys() == sources.keys()
    for name, source in sources.items():
        full = source.full_tensor()
        if plain:
            targets[name].copy_(full)


def pack(lengths, token_budget, world):
    """Distribute sequences over ranks and micro-batches: result[rank][micro_batch] is a list of indices.

    Longest first into the emptiest bin, the same number of micro-batches on every rank (some may be empty),
    none above token_budget unless a single sequence is.
    """
    assert lengths, "nothing to pack"
    budget, n = max(token_budget, max(lengths)), max(1, math.ceil(sum(lengths) / (token_budget * world)))
    while True:
        bins, loads = [[] for _ in range(n * world)], [0] * (n * world)
        for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
            j = loads.index(min(loads))
            bins[j].append(i)
            loads[j] += lengths[i]
        if max(loads) <= budget:
            return [[bins[m * world + rank] for m in range(n)] for rank in range(world)]
        n += 1


def example(ids, loss_mask, **per_token):
    """One sequence for the trainer: position t reads ids[t] and is scored on ids[t+1], so everything is one
    shorter than ids.

    per_token: further lists of the length of ids (old log-probabilities, advantages, ...), aligned with the
    scored token.
    """
    columns = {"input_ids": torch.tensor(ids[:-1]), "targets": torch.tensor(ids[1:]),
               "loss_mask": torch.tensor(loss_mask[1:], dtype=torch.float32)}
    return columns | {name: torch.as_tensor(values)[1:] for name, values in per_token.items()}


def collate(examples, device):
    """Flat tensors (T,) of the given examples and their Packing. For an empty micro-batch: one masked token,
    a rank's no-op."""
    if not examples:
        zero = torch.zeros(1, dtype=torch.long, device=device)
        return {"input_ids": zero, "targets": zero, "loss_mask": zero.float()}, Packing([1], device)
    packing = Packing([len(e["input_ids"]) for e in examples], device)
    return {name: torch.cat([e[name] for e in examples]).to(device) for name in examples[0]}, packing


def cosine(step, steps, warmup, floor=0.0):
    """Learning-rate factor: linear warm-up, then a cosine from 1 down to `floor`."""
    if step < warmup:
        return (step + 1) / warmup
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def all_sum(value, device):
    total = torch.tensor(value, dtype=torch.float64, device=device)
    dist.all_reduce(total)
    return total.item()


def versions():
    return {
        "python": sys.version.split()[0], "torch": torch.__version__,
        "transformers": transformers.__version__, "tokenizers": tokenizers.__version__
    }


# ------------------------------------------------------------------------------------------------------------
# Checkpoints of a training run. torch.distributed.checkpoint writes the shards, each rank its own, and reads
# them for any other number of ranks; what it lacks is added here: a checkpoint is there as a whole or not at
# all, and a damaged one is recognised.


def zero_moments(optimizer):
    """Give AdamW the moments it would make at its first step. Without them the helpers of torch take a real
    step to make them when saving, and saving would change the run."""
    for group in optimizer.param_groups:
        for p in group["params"]:
            optimizer.state[p] = {"step": torch.zeros((), dtype=torch.float32, device=p.device),
                                  "exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}


def training_state(name, module, optimizer):
    """Every tensor that a step changes, by name: sharded weights and AdamW's moments. Loading writes into
    them in place."""
    module.reshard()  # after a forward without backward the root's weights are still gathered
    state = {}
    for key, p in module.named_parameters():
        state[f"{name}.{key}"] = p.detach()
        state |= {f"{name}.{key}.{moment}": value for moment, value in optimizer.state[p].items()}
    return state


def file_hash(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync_to_disk(path):
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def save_checkpoint(folder, state, record, keep, rank):
    """Write state and record (JSON, with its "step") as folder/step-<step>, then delete all but the last
    `keep`. All ranks call it, on a file system that they share.

    Shards go to a temporary folder and are synced; a manifest with everyone's hashes is the last file; one
    rename makes it a checkpoint. A crash at any moment leaves the ones before untouched. UserError where
    nothing can be written, a full disk for instance.
    """
    partial, final = folder / "partial", folder / f"step-{record['step']:06d}"

    def refuse(error):
        raise UserError(f"checkpoint of step {record['step']} cannot be written ({error}); the ones before "
                        f"it in {folder} are intact")

    def on_rank_0(action):
        error = [None]
        if rank == 0:
            try:
                action()
            except OSError as problem:
                error = [str(problem)]
        dist.broadcast_object_list(error)  # every rank stops, or none
        if error[0]:
            refuse(error[0])

    def begin():
        shutil.rmtree(partial, ignore_errors=True)  # of a run that was killed here
        partial.mkdir(parents=True)

    def publish():
        manifest = record | {"files": {name: digest for part in hashes for name, digest in part.items()}}
        manifest["files"][".metadata"] = file_hash(partial / ".metadata")
        for name in manifest["files"]:
            os.stat(partial / name)  # shards of another node, if the folder is not shared: an error here
        (partial / "manifest.json").write_text(json.dumps(manifest, indent=1))
        sync_to_disk(partial / "manifest.json")
        sync_to_disk(partial)
        shutil.rmtree(final, ignore_errors=True)  # damaged, or of a run that has been wound back
        partial.rename(final)
        sync_to_disk(folder)
        found = sorted(folder.glob("step-*"))
        later = found.index(final) + 1  # damaged ones, which the run has gone back behind
        for old in found[:later][:-keep] + found[later:]:
            shutil.rmtree(old)

    on_rank_0(begin)
    try:
        dcp.save(state, checkpoint_id=partial)
    except CheckpointException as error:  # the same on all ranks
        refuse(f"{str(error).strip().splitlines()[-1]}: disk full?")
    hashes = [None] * dist.get_world_size()
    dist.all_gather_object(hashes, {file.name: file_hash(file) for file in partial.glob(f"__{rank}_*")})
    on_rank_0(publish)


def find_checkpoint(folder):
    """The newest undamaged checkpoint, (path, record); (None, None) if there is none at all, UserError if all
    are damaged. Says which ones it passes over."""
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
    return None, None


# ------------------------------------------------------------------------------------------------------------
# SFT


def add_format_arguments(parser):
    """The flags of prompts, precision and tool calls, shared by all three scripts."""
    add = parser.add_argument_group("prompts, precision, tool calls").add_argument
    add("--prompt_template", default="plain", help="plain, retool, or a file containing {question}")
    add("--dtype", choices=DTYPES, default="fp32",
        help="what trainer and sampler compute in; master weights and reductions stay fp32")
    add("--max_interpreter_tokens", type=int, default=128,
        help="interpreter text per call, head + tail; paper does not say")
    add("--sandbox_workers", type=int, default=2, help="snippets that run at the same time")
    add("--sandbox_timeout", type=float, default=0.5, help="seconds per snippet; raise it for real scripts")
    add("--unsafe_sandbox", action="store_true",
        help="run snippets although a layer of the sandbox is missing: they may then do what this user may")


def add_arguments(parser):
    """The warm start's flags, shared by sft.py and ppo.py. Defaults are the embedded run's."""
    add = parser.add_argument_group("warm start").add_argument
    add("--model", default="",
        help="checkpoint folder or hub id, used as it is; empty: the embedded model, warm-started")
    add("--sft_traces", type=int, default=8000,
        help="cold-start problems of the embedded default; paper: 2,000 traces released")
    add("--code_share", type=float, default=0.5,
        help="share of them rewritten with code, the rest text; paper's policy starts at 0.18")
    add("--sft_steps", type=int, default=1600, help="optimiser steps; paper: 2 epochs")
    add("--sft_batch_size", type=int, default=32, help="sequences per step, over all ranks")
    add("--sft_lr", type=float, default=2e-3,
        help="peak learning rate of AdamW, cosine to zero; paper 1e-6 (32B)")
    add("--sft_warmup", type=int, default=50, help="warm-up steps")
    add("--sft_seed", type=int, default=0, help="seed of the warm start: traces, order, initial weights")
    add("--warm_start_dir", default="out/warm_start",
        help="finished warm starts are kept here under a hash and reused")
    add = parser.add_argument_group("trainer").add_argument
    add("--token_budget", type=int, default=8192, help="tokens per micro-batch and rank")
    add("--activation_checkpointing", action="store_true",
        help="keep only the layers' inputs, compute the rest again in the backward pass")
    add("--cpu_offload", action="store_true", help="weights and optimiser states wait in host memory")
    add("--replicas", type=int, default=1,
        help="copies of the sharded model, e.g. one per node (hybrid sharding); 1: sharded over all ranks")
    add_format_arguments(parser)


def check_at_least(parser, args, **lowest):
    """The parser's error (one line, exit status 2) for a number below what can be meant."""
    for name, low in lowest.items():
        if getattr(args, name) < low:
            parser.error(f"--{name} must be at least {low}")


def check_arguments(parser, args):
    """The same for the numbers of `add_arguments`."""
    check_at_least(parser, args, sft_traces=1, sft_steps=1, sft_batch_size=1, token_budget=1)


def make_sandbox(args):
    return Sandbox(workers=args.sandbox_workers, timeout=args.sandbox_timeout, unsafe=args.unsafe_sandbox)


async def sft(policy, tokenizer, traces, held_out, args, rank, world, device, log):
    """Train the sharded policy on traces (as `data.curate` returns them) for args.sft_steps; returns the
    final metrics."""
    template = data.load_template(args.prompt_template)

    def tokenise(trace):
        prompt = data.encode_prompt(tokenizer, template, trace["question"])
        ids, mask = encode_response(tokenizer, trace["response"], args.max_interpreter_tokens,
                                    trace["failed_calls"])
        return example(prompt + ids, [0] * len(prompt) + mask)

    examples, fresh = [tokenise(t) for t in traces], [tokenise(t) for t in held_out]
    positions = policy.lm.config.max_position_embeddings
    longest = max(len(e["input_ids"]) for e in examples + fresh)
    if longest > positions:
        raise UserError(f"a trace has {longest} tokens, the model {positions} positions")
    optimizer = torch.optim.AdamW(policy.parameters(), lr=args.sft_lr, betas=(0.9, 0.95), weight_decay=0.01,
                                  fused=True)
    rng = random.Random(args.sft_seed)

    def step_loss(batch, train):
        """Mean loss over all trainable tokens of `batch`; with train=True also its gradient."""
        total = sum(e["loss_mask"].sum().item() for e in batch)
        token_sum = 0.0
        for indices in pack([len(e["input_ids"]) for e in batch], args.token_budget, world)[rank]:
            flat, packing = collate([batch[i] for i in indices], device)
            with torch.set_grad_enabled(train):
                loss = -policy(flat["input_ids"], flat["targets"], flat["loss_mask"], packing).sum()
            token_sum += loss.item()
            if train:
                # FSDP averages gradients over ranks; times world makes that the sum that total already
                # divides.
                (loss / total * world).backward()
        return all_sum(token_sum, device) / total

    order, tokens, begin = [], 0, time.perf_counter()
    bar = tqdm(range(args.sft_steps), desc="warm start", disable=rank > 0, mininterval=1.0)
    for step in bar:
        if len(order) < args.sft_batch_size:  # a new epoch
            order += rng.sample(range(len(examples)), len(examples))
        batch, order = [examples[i] for i in order[:args.sft_batch_size]], order[args.sft_batch_size:]
        for group in optimizer.param_groups:
            group["lr"] = args.sft_lr * cosine(step, args.sft_steps, args.sft_warmup)
        loss = step_loss(batch, train=True)
        norm = nn.utils.clip_grad_norm_(policy.parameters(), 1.0).full_tensor().item()
        if not math.isfinite(loss + norm):
            raise FloatingPointError(f"warm start step {step}: loss {loss}, gradient norm {norm}")
        optimizer.step()
        optimizer.zero_grad()
        tokens += sum(len(e["input_ids"]) for e in batch)
        bar.set_postfix(loss=f"{loss:.4f}")
        if step % 10 == 0 or step == args.sft_steps - 1:
            log({
                "step": step, "loss": loss, "grad_norm": norm,
                "tokens_per_second": tokens / (time.perf_counter() - begin)
            })
    seen = step_loss(examples[:len(fresh)], train=False)
    unseen = step_loss(fresh, train=False)
    return {"train_loss": seen, "held_out_loss": unseen, "memorisation_gap": unseen - seen}


def digest(record, files):
    """16 hex digits that change with a JSON-able record and with the content of the files."""
    found = hashlib.sha256(json.dumps([record, versions()]).encode())
    for file in files:
        found.update(Path(file).read_bytes())
    return found.hexdigest()[:16]


def sources(*names):
    return [Path(__file__).parent / name for name in names]


def warm_start_key(args, traces_file=""):
    """Hash of all that decides the result: arguments, data, code, versions. The number of ranks only changes
    rounding."""
    names = ("model", "sft_traces", "code_share", "sft_steps", "sft_batch_size", "sft_lr", "sft_warmup",
             "sft_seed", "token_budget", "dtype", "max_interpreter_tokens", "sandbox_timeout")
    weights = [(file.name, file.stat().st_size, file.stat().st_mtime_ns)  # too large to be read for a hash
               for file in sorted(Path(args.model).glob("*"))] if args.model else []
    record = [{n: getattr(args, n) for n in names}, weights, data.load_template(args.prompt_template)]
    files = sources("data.py", "rollout.py", "sandbox.py", "sft.py") + [traces_file] * bool(traces_file)
    return digest(record, files)


async def cold_start_traces(args):
    """(traces, held-out traces, counts) of the embedded cold start: curated once, then read from a file whose
    name is a hash of what decides them."""
    record = {n: getattr(args, n) for n in ("sft_traces", "code_share", "sft_seed", "sandbox_timeout")}
    key = digest(record, sources("data.py", "rollout.py", "sandbox.py"))
    path = Path(args.warm_start_dir) / f"traces-{key}.json"
    if not path.exists():
        overlap = data.embedded_overlap(args.sft_seed)
        print(f"problems shared with the training split, of 2000 each: {overlap}")
        async with make_sandbox(args) as sandbox:
            with tqdm(total=args.sft_traces, desc="curation", mininterval=1.0) as bar:
                kept, counts = await data.embedded_traces(
                    args.sft_traces, args.code_share, args.sft_seed, sandbox, progress=bar.update)
            held_out, _ = await data.embedded_traces(
                256, args.code_share, args.sft_seed, sandbox, split="test")
        partial = path.with_suffix(f".partial-{os.getpid()}")
        partial.write_text(json.dumps([kept, held_out, counts]))
        partial.rename(path)  # only a finished curation is ever found under its name
    return json.loads(path.read_text())


async def warm_start(args, rank, world, device, traces_file=""):
    """The folder of the warm-started checkpoint for these arguments, made now or reused."""
    rows = data.load_traces(traces_file) if traces_file else None
    found = [None]
    if rank == 0:  # one rank looks, for another run may be about to finish the same folder
        folder = Path(args.warm_start_dir) / warm_start_key(args, traces_file)
        found = [(folder, folder.is_dir())]
    dist.broadcast_object_list(found)
    folder, exists = found[0]
    if exists:
        if rank == 0:
            print(f"warm start: reusing {folder}")
        return folder
    tokenizer = load_tokenizer(args.model)
    partial = folder.with_name(f"{folder.name}.partial-{os.getpid()}")
    shared = [None]
    if rank == 0:  # curation runs once
        shutil.rmtree(partial, ignore_errors=True)  # of a run that was killed under the same process id
        partial.mkdir(parents=True)
        if traces_file:
            split = len(rows) - max(1, len(rows) // 50)
            kept, held_out, counts = rows[:split], rows[split:], {"loaded": len(rows)}
        else:
            kept, held_out, counts = await cold_start_traces(args)
        print(f"curation: {counts}")
        (partial / "curation.json").write_text(json.dumps(counts, indent=1))
        with open(partial / "traces.jsonl", "w") as file:
            file.writelines(json.dumps(trace) + "\n" for trace in kept)
        shared = [(kept, held_out)]
    dist.broadcast_object_list(shared)
    kept, held_out = shared[0]
    plain = load_model(args.model, tokenizer, "cpu", args.sft_seed) if rank == 0 else None  # to be saved
    policy = Policy(load_model(args.model, tokenizer, "cpu", args.sft_seed))
    shard(policy, policy.lm, args)
    with open(partial / "metrics.jsonl" if rank == 0 else os.devnull, "w") as file:
        metrics = await sft(policy, tokenizer, kept, held_out, args, rank, world, device,
                            lambda row: file.write(json.dumps(row) + "\n"))
        file.write(json.dumps(metrics) + "\n")
    sync_weights(policy, plain)
    if rank == 0:
        print("warm start: " + "  ".join(f"{name} {value:.4f}" for name, value in metrics.items()))
        plain.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        (partial / "arguments.json").write_text(json.dumps(vars(args) | {"versions": versions()}, indent=1))
        if folder.is_dir():  # another run with the same arguments was faster
            shutil.rmtree(partial)
        else:
            partial.rename(folder)  # only a finished warm start is ever found under its name
    dist.barrier()
    return folder


def head_benchmark():
    """Prints the peak memory of the chunked head and of all logits at once. First in a process: memory that
    was used before hides a peak."""
    global LOGIT_BYTES
    tokens, vocabulary, grown = 4096, 38016, {}  # a quarter of 16k tokens, a quarter of Qwen's vocabulary
    config = Qwen2Config(vocab_size=vocabulary, hidden_size=32, num_hidden_layers=1, num_attention_heads=2,
                         num_key_value_heads=1, intermediate_size=32, tie_word_embeddings=True)
    policy = Policy(AutoModelForCausalLM.from_config(config, attn_implementation="retool"))
    ids = torch.randint(0, vocabulary, (tokens,))
    flat, packing = collate([example(ids.tolist(), [1] * tokens)], "cpu")
    peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024  # noqa: E731  (MiB)
    for name, LOGIT_BYTES in (("warm-up", 1 << 18), ("chunked", (256 << 20) // 16), ("full", 1 << 40)):
        before = peak()
        policy(flat["input_ids"], flat["targets"], flat["loss_mask"], packing).sum().backward()
        grown[name] = peak() - before
    full_mib = 4 * tokens * vocabulary / 2**20
    print(f"head, {tokens} tokens, vocabulary {vocabulary}: peak memory grows by "
          f"{grown['chunked']:.0f} MiB in"
          f" chunks of 16 MiB of logits, by {grown['full']:.0f} MiB with all {full_mib:.0f} MiB at once: "
          f"{100 * grown['chunked'] / grown['full']:.1f} %. Both grow with the logits that exist at one time,"
          " so 16k tokens of 152k in chunks of 256 MiB have the same ratio.")


def packing_benchmark():
    """Prints the tokens per second of packed and of padded training on the same sequences."""
    tokenizer = load_tokenizer("")
    ours = load_model("", tokenizer, "cpu").train()
    # a copy: transformers would write "sdpa" into the config of `ours` as well
    theirs = AutoModelForCausalLM.from_config(copy.deepcopy(ours.config), attn_implementation="sdpa")
    theirs.load_state_dict(ours.state_dict())
    policy, rng = Policy(ours), random.Random(0)
    lengths = [round(math.exp(rng.uniform(math.log(64), math.log(1024)))) for _ in range(64)]
    tokens = [[rng.randrange(len(tokenizer)) for _ in range(n + 1)] for n in lengths]
    examples = [example(ids, [1] * len(ids)) for ids in tokens]

    def packed():
        total = 0.0
        for indices in pack(lengths, 8192, 1)[0]:
            flat, packing = collate([examples[i] for i in indices], "cpu")
            loss = -policy(flat["input_ids"], flat["targets"], flat["loss_mask"], packing).sum()
            loss.backward()
            total += loss.item()
        return total

    def padded():  # as it is usually done: batches in the order of arrival, filled up to their longest
        total = 0.0
        for begin in range(0, len(examples), 8):
            batch = [nn.utils.rnn.pad_sequence([e[name] for e in examples[begin:begin + 8]], batch_first=True)
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


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    parser.add_argument("--traces", default="", help="JSONL of verified traces; empty: the embedded ones")
    parser.add_argument("--benchmark", action="store_true",
                        help="instead: packed against padded training, memory of the chunked head")
    args = parser.parse_args()
    check_arguments(parser, args)
    return args


async def main(rank, world, device):
    args = parse_arguments()
    if args.benchmark:
        head_benchmark()
        return packing_benchmark()
    check_mesh(args, world)
    check_model(args.model)
    if rank == 0:
        print(json.dumps(vars(args)))
    folder = await warm_start(args, rank, world, device, args.traces)
    if rank == 0:
        print(f"checkpoint: {folder}")


if __name__ == "__main__":
    run_script(main)
