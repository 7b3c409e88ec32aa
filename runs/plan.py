"""What would each GPU and each host hold? Computed from the configuration, never measured on a GPU.

    python runs/plan.py 8 80 --model DIR ...     # 8 GPUs of 80 GiB; the rest are flags of ppo.py
    python runs/plan.py                          # tables for the Qwen2.5 shapes (results/plan.md)

    --lengths 18432,4608   how many rows of these mean lengths would the KV cache hold in pages?
    --device cpu           8 processes of 80 GiB each, without a GPU

Counted: tensors of a dense model, whose critic has the same size, with attention that keeps no
scores (FlashAttention's). Not counted: CUDA and NCCL themselves, fragmentation and the kernels'
own workspace, for which a tenth of each GPU is left; Python and the sandbox on the host.
"""
import argparse
import math
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, Qwen2Config

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import ppo  # noqa: E402
import sft  # noqa: E402
from eval import markdown  # noqa: E402
from rollout import DTYPES, PREFILL_TOKENS, head_dim, load_config  # noqa: E402
from sandbox import UserError  # noqa: E402

GIB = 2**30
FP32 = 4  # bytes
GPUS_PER_NODE = 8
PAGE = 256  # tokens: pages of the CUDA kernels are multiples of it
USABLE = 0.9  # of a GPU's memory

# Of one chunk of logits in the head's backward: logits, probabilities, and three gradients.
LOGIT_TENSORS = 5

# Bytes per row and entry of the vocabulary while a token is sampled: fp32 logits and
# log-probabilities, float64 probabilities and their sums; more where top_p sorts them.
SAMPLING_BYTES = 24
NUCLEUS_BYTES = 49

# config.json on the hub
NAMES = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
         "intermediate_size", "vocab_size", "tie_word_embeddings")
SHAPES = {
    "0.5B": (896, 24, 14, 2, 4864, 151936, True),
    "1.5B": (1536, 28, 12, 2, 8960, 151936, True),
    "3B": (2048, 36, 16, 2, 11008, 151936, True),
    "7B": (3584, 28, 28, 4, 18944, 152064, False),
    "14B": (5120, 48, 40, 8, 13824, 152064, False),
    "32B": (5120, 64, 40, 8, 27648, 152064, False),
}
FLAGS = ["--dtype", "bf16", "--activation_checkpointing", "--n_slots", "64", "--kv_gib", "16",
         "--max_prompt_tokens", "2048", "--max_response_tokens", "16384",
         "--token_budget", "18432"]


# -------------------------------------------------------------------------------------------------
# What there is to hold


@dataclass
class Parameters:
    """How many parameters a model and its parts have."""
    total: int
    layer: int
    head: int  # of the output matrix, tied or not
    root: int  # outside the layers: FSDP gathers them as one unit
    critic: int  # its own head, of one row, is left out
    sizes: list  # of each weight: (rows, numbers per row)


def count_parameters(config):
    with torch.device("meta"):
        lm = AutoModelForCausalLM.from_config(config)
    sizes = [(len(p), p[0].numel()) for p in lm.parameters()]
    total = sum(rows * width for rows, width in sizes)
    layer = sum(p.numel() for p in lm.model.layers[0].parameters())
    head = lm.lm_head.weight.numel()
    return Parameters(
        total=total,
        layer=layer,
        head=head,
        root=total - layer * config.num_hidden_layers,
        critic=total if config.tie_word_embeddings else total - head,
        sizes=sizes,
    )


def bytes_per_number(args):
    return torch.finfo(DTYPES[args.dtype]).bits // 8


def longest_row(args):
    return args.max_prompt_tokens + args.max_response_tokens


def state_bytes(parameters, args):
    """{part: bytes} of one copy of what FSDP shards, all in fp32."""
    actor = parameters.total
    critic = parameters.critic if args.advantage == "gae" else 0
    return {
        "actor": FP32 * actor,
        "critic": FP32 * critic,
        "reference": FP32 * actor if args.kl_coef else 0,
        "moments": 2 * FP32 * (actor + critic),
        # The actor's are gone when the critic's come.
        "gradients": FP32 * max(actor, critic),
    }


def layer_bytes(config, size):
    """Bytes per token of one layer, besides its input: (kept for its backward, added while that
    runs)."""
    hidden = config.hidden_size
    heads = config.num_attention_heads * head_dim(config)
    # Kept are, of the feed-forward part, both products, the activation and what enters the last
    # product; of each of two norms its input in fp32, the normalised and the scaled; queries,
    # attention's output, keys and values repeated for each query head (a kernel that takes them
    # as they are keeps less).
    norms = 2 * (FP32 + 2 * size) * hidden
    kept = size * (4 * config.intermediate_size + 4 * heads) + norms
    # Added are the gradients of both products, and the gradient that comes from above.
    added = size * (2 * config.intermediate_size + hidden)
    return kept, added


def training_moments(config, args, parameters, device):
    """[{part: bytes on a GPU}] of three moments of a backward pass: one of them needs most."""
    size = bytes_per_number(args)
    tokens = max(args.token_budget, longest_row(args))
    kept, added = layer_bytes(config, size)

    # Each layer keeps its input, and the rest unless that is computed again.
    inputs = size * config.hidden_size
    if args.activation_checkpointing:
        all_layers = config.num_hidden_layers * inputs
        inside_one = kept + added
    else:
        all_layers = config.num_hidden_layers * (inputs + kept)
        inside_one = added

    # The head: a gradient, another chunk's, and their sum.
    root = size * parameters.root
    head_gradient = size * parameters.head
    in_head = {
        "gathered": root + 3 * head_gradient,
        "activations": tokens * all_layers,
        "logits": LOGIT_TENSORS * sft.LOGIT_BYTES[device],
    }

    # A layer: its weights, the next one's and the buffer in which those arrive; its gradient,
    # and that in fp32 for the sum over ranks.
    in_layer = {
        "gathered": root + head_gradient + (4 * size + FP32) * parameters.layer,
        "activations": tokens * (all_layers + inside_one),
    }

    # The end: the root's gradients, and those in fp32.
    at_end = {"gathered": (size + FP32) * parameters.root}
    return [in_head, in_layer, at_end]


# -------------------------------------------------------------------------------------------------
# The KV cache


def row_bytes(config, args, length):
    """Bytes of the keys and values of a row, in whole pages."""
    pages = math.ceil(length / PAGE)
    per_token = 2 * config.num_hidden_layers * config.num_key_value_heads * head_dim(config)
    return pages * PAGE * per_token * bytes_per_number(args)


def rows_that_fit(config, args, gib, length):
    """(by slots, by pages): how many rows of a mean length a cache of so many GiB holds. A slot
    has room for the longest row."""
    by_slots = gib * GIB // row_bytes(config, args, longest_row(args))
    by_pages = gib * GIB // row_bytes(config, args, length)
    return int(by_slots), int(by_pages)


# -------------------------------------------------------------------------------------------------
# The plan


@dataclass
class Plan:
    """GiB by part: of one GPU (of one process on a CPU) and of a node's host memory."""
    stays: dict  # in both phases
    rollouts: dict
    training: dict
    loading: dict  # of the host, before the first step
    host: dict  # afterwards
    rounding: float  # how much larger pinned memory is without PYTORCH_ALLOC_CONF
    checkpoint: float  # on the disk

    @property
    def total(self):
        """Of the larger phase: rollouts and training never exist together."""
        return sum(self.larger_phase().values())

    def larger_phase(self):
        """{part: GiB}, with what stays."""
        phases = [self.stays | self.rollouts, self.stays | self.training]
        return max(phases, key=lambda parts: sum(parts.values()))


def plan(config, args, gpus, gib=math.inf, device="cuda"):
    """The Plan for a model of this config, these flags of ppo.py, and `gpus` GPUs of which each
    has `gib` usable GiB."""
    parameters = count_parameters(config)
    size = bytes_per_number(args)
    offloaded = args.cpu_offload and device == "cuda"
    copies_per_gpu = args.replicas / gpus
    states = state_bytes(parameters, args)
    shards = {part: copies_per_gpu * states[part] for part in states}
    gradients = shards.pop("gradients")

    # On a GPU. The sampler is whole on each.
    stays = {"sampler": size * parameters.total}
    if not offloaded:
        stays |= shards
    moments = training_moments(config, args, parameters, device)
    training = max(moments, key=lambda parts: sum(parts.values()))
    training["gradients"] = 0 if offloaded else gradients

    # The prompts of one tick go through a layer: of each size three tensors are alive at once.
    prefill_tokens = PREFILL_TOKENS + args.max_prompt_tokens
    sampling_bytes = SAMPLING_BYTES if args.eval_top_p == 1.0 else NUCLEUS_BYTES
    rollouts = {
        "prefill": 3 * size * (config.intermediate_size + config.hidden_size) * prefill_tokens,
        "sampling": args.n_slots * config.vocab_size * sampling_bytes,
    }

    # As many rows as --n_slots or fewer, as in `generate`, but at least one.
    room = args.kv_gib * GIB if args.kv_gib else math.inf
    if device == "cuda":
        room = min(room, gib * GIB - sum(stays.values()) - sum(rollouts.values()))
    row = row_bytes(config, args, longest_row(args))
    rollouts["KV cache"] = row * max(1, int(min(args.n_slots, room / row)))

    # On the host. Every process loads a whole model in fp32, the last one beside the shards of
    # the others.
    processes = min(gpus, GPUS_PER_NODE)
    loading = {"whole models": processes * FP32 * parameters.total}
    host = {}
    if offloaded:
        host = {part: processes * shards[part] for part in shards}
        host["gradients"] = processes * gradients
        weights = host["actor"] + host["critic"] + host["reference"]
        last = host["reference"] or host["critic"] or host["actor"]
        loading["shards"] = weights - last

    return Plan(
        stays=in_gib(stays),
        rollouts=in_gib(rollouts),
        training=in_gib(training),
        loading=in_gib(loading),
        host=in_gib(host),
        rounding=pinned_rounding(parameters, gpus // args.replicas),
        checkpoint=(sum(states.values()) - states["gradients"]) / GIB,
    )


def in_gib(parts):
    """Without the parts that this run does not have."""
    return {part: n_bytes / GIB for part, n_bytes in parts.items() if n_bytes > 0}


def pinned_rounding(parameters, ranks):
    """How much larger shards get in pinned memory, which PyTorch rounds up to powers of two."""
    exact = 0
    rounded = 0
    for rows, width in parameters.sizes:
        shard = FP32 * math.ceil(rows / ranks) * width
        exact += shard
        rounded += 2**math.ceil(math.log2(shard))
    return rounded / exact


# -------------------------------------------------------------------------------------------------
# Printing


def print_plan(args, gpus, gib, device="cuda", lengths=()):
    """UserError where it does not fit."""
    config = load_config(args.model) if args.model else sft.starting_point("")[0]
    unit = "GPU" if device == "cuda" else "process"
    if gpus < 1 or gpus % args.replicas:
        raise UserError(f"--replicas {args.replicas} does not divide {gpus} {unit}s")
    usable = USABLE * gib
    planned = plan(config, args, gpus, usable, device)

    # Both phases, part by part.
    rows = []
    for part in [*planned.stays, *planned.rollouts, *planned.training]:
        row = [part]
        for phase in (planned.rollouts, planned.training):
            parts = planned.stays | phase
            row.append(f"{parts[part]:.1f}" if part in parts else "")
        rows.append(row)
    stays = sum(planned.stays.values())
    rollouts = stays + sum(planned.rollouts.values())
    training = stays + sum(planned.training.values())
    rows.append(["together", f"{rollouts:.1f}", f"{training:.1f}"])
    print(markdown([f"GiB per {unit}", "rollouts", "training"], rows))

    if planned.total > usable:
        parts = planned.larger_phase()
        largest = max(parts, key=parts.get)
        raise UserError(
            f"does not fit: {planned.total:.1f} GiB per {unit} are needed, {usable:.1f} are there; "
            f"the largest part is {largest} with {parts[largest]:.1f} GiB")
    print(f"fits: {planned.total:.1f} of {usable:.1f} GiB per {unit}")

    cache = planned.rollouts["KV cache"]
    for length in lengths or (longest_row(args), longest_row(args) // 4):
        by_slots, by_pages = rows_that_fit(config, args, cache, length)
        print(f"KV cache of {cache:.1f} GiB, rows of {length} tokens: {by_slots} in whole slots; "
              f"in pages of {PAGE} tokens (bf16 on CUDA) {by_pages}")
    if device == "cuda":
        print_host(planned, min(gpus, GPUS_PER_NODE))
    print(f"disk: {planned.checkpoint:.1f} GiB per checkpoint (weights and two moments), up to "
          f"{args.keep_checkpoints + 1} at a time, in a folder that all nodes share")


def print_host(planned, processes):
    loading = sum(planned.loading.values())
    print(f"host: {loading:.1f} GiB per node while its {processes} processes load "
          f"({describe(planned.loading)})")
    if planned.host:
        after = sum(planned.host.values())
        print(f"host: {after:.1f} GiB per node afterwards ({describe(planned.host)}) under "
              "PYTORCH_ALLOC_CONF=pinned_max_round_threshold_mb:1; without it weights and "
              f"gradients take {planned.rounding:.2f} times as much")


def describe(parts):
    return ", ".join(f"{part} {gib:.1f}" for part, gib in parts.items())


def print_tables():
    """The Qwen2.5 shapes under FLAGS."""
    totals = []
    details = []
    for name, shape in SHAPES.items():
        config = Qwen2Config(**dict(zip(NAMES, shape)))
        on_gpu = ppo.parse_arguments(FLAGS)
        offloaded = ppo.parse_arguments([*FLAGS, "--cpu_offload"])

        cells = [name]
        for gpus in (1, 8, 16):
            plain = plan(config, on_gpu, gpus)
            with_offload = plan(config, offloaded, gpus)
            cells.append(f"{plain.total:.0f} ({with_offload.total:.0f})")
        totals.append(cells)

        # On one node of eight.
        planned = plan(config, offloaded, GPUS_PER_NODE)
        stays = sum(planned.stays.values())
        longest = longest_row(offloaded)
        by_slots, by_pages = rows_that_fit(config, offloaded, offloaded.kv_gib, longest // 4)
        details.append([
            name,
            f"{stays + sum(planned.rollouts.values()):.0f}",
            f"{stays + sum(planned.training.values()):.0f}",
            f"{sum(planned.loading.values()):.0f}",
            f"{sum(planned.host.values()):.0f}",
            f"{planned.rounding:.2f}",
            str(by_slots),
            str(by_pages),
        ])

    print(f"Under {' '.join(FLAGS)}\n")
    print("GiB per GPU in the larger phase, in brackets with --cpu_offload\n")
    print(markdown(["", "1 GPU", "8 GPUs", "16 GPUs"], totals))
    header = ["", "rollouts", "training", "host, loading", "host, afterwards", "if rounded",
              "rows in slots", "rows in pages"]
    print("\nEight GPUs with --cpu_offload: GiB per GPU in both phases, GiB of host memory,")
    print("how many times as much its weights and gradients take without PYTORCH_ALLOC_CONF,")
    print(f"and how many rows of {longest // 4} tokens {offloaded.kv_gib:g} GiB of KV cache hold "
          f"in slots, and in pages of {PAGE} tokens (bf16 on CUDA)\n")
    print(markdown(header, details))


# -------------------------------------------------------------------------------------------------
# The script


def token_counts(text):
    """An argparse type: numbers of tokens with commas between."""
    lengths = [int(word) for word in text.split(",")]
    if min(lengths) < 1:
        raise ValueError
    return lengths


def main(words):
    if not words:
        print_tables()
        return
    if len(words) < 2 or not words[0].isdecimal() or not words[1].isdecimal():
        sys.exit(__doc__)
    gpus = int(words[0])
    gib = int(words[1])

    # Flags that are not the plan's are those of ppo.py.
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--lengths", type=token_counts, default=())
    options, flags = parser.parse_known_args(words[2:])
    try:
        print_plan(ppo.parse_arguments(flags), gpus, gib, options.device, options.lengths)
    except UserError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main(sys.argv[1:])
