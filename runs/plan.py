"""What would each GPU hold? Nothing is loaded but the configuration. Computed, never measured on a GPU.

    python runs/plan.py 8 80 --model DIR ...     # 8 GPUs of 80 GiB; the rest are flags of ppo.py
    python runs/plan.py                          # table for the Qwen2.5 shapes (results/plan.md)
"""
import math
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, Qwen2Config

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import ppo  # noqa: E402
import sft  # noqa: E402
from eval import markdown  # noqa: E402
from rollout import DTYPES, KVCache, head_dim, load_config  # noqa: E402
from sandbox import UserError  # noqa: E402

# hidden size, layers, query heads, key/value heads, feed-forward size, vocabulary, tied embeddings: config.json on the hub
SHAPES = {"0.5B": (896, 24, 14, 2, 4864, 151936, True), "1.5B": (1536, 28, 12, 2, 8960, 151936, True),
          "3B": (2048, 36, 16, 2, 11008, 151936, True), "7B": (3584, 28, 28, 4, 18944, 152064, False),
          "14B": (5120, 48, 40, 8, 13824, 152064, False), "32B": (5120, 64, 40, 8, 27648, 152064, False)}
NAMES = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "intermediate_size",
         "vocab_size", "tie_word_embeddings")
FLAGS = ["--dtype", "bf16", "--activation_checkpointing", "--n_slots", "64", "--kv_gib", "16",
         "--max_prompt_tokens", "2048", "--max_response_tokens", "16384", "--token_budget", "18432"]


def plan(config, args, gpus, gib=math.inf):
    """{part: GiB} on one of `gpus` GPUs of `gib` usable GiB each, "total", and "parameters" in
    billions; an estimate for a model of this config, a critic of the same size and these
    flags.

    Sharded, at 8 bytes per parameter: fp32 weights and gradients of actor and critic, and
    AdamW's moments ("optimiser"); the rest is whole on every GPU. Activations are those of one
    micro-batch: per token and layer its input, and what its backward needs unless that is
    computed again, about 10 hidden + 3 feed-forward sizes and 2 of queries, keys, values.
    """
    with torch.device("meta"):
        lm = AutoModelForCausalLM.from_config(config)
    count = lambda module: sum(p.numel() for p in module.parameters())  # noqa: E731
    total, layer = count(lm), count(lm.model.layers[0])
    size = torch.finfo(DTYPES[args.dtype]).bits // 8
    tokens = args.max_prompt_tokens + args.max_response_tokens
    inside = 10 * config.hidden_size + 3 * config.intermediate_size + 2 * head_dim(config) * (
        config.num_attention_heads + 2 * config.num_key_value_heads)
    layers_kept = 1 if args.activation_checkpointing else config.num_hidden_layers
    per_token = config.num_hidden_layers * config.hidden_size + layers_kept * inside
    on_gpu = 0 if args.cpu_offload else 8 * args.replicas / gpus
    actor, critic = total, total - count(lm.lm_head) * (not config.tie_word_embeddings)
    critic *= args.advantage == "gae"
    parts = {
        "actor": on_gpu * actor,
        "critic": on_gpu * critic,
        "optimiser": on_gpu * (actor + critic),
        "reference": on_gpu / 2 * actor * (args.kl_coef > 0),  # weights alone
        # Weights and gradients of two layers and of what is no layer, fp32 while reduced.
        "gathered": 4 * size * layer + (3 * size + 4) * (total - layer * config.num_hidden_layers),
        "activations": max(args.token_budget, tokens) * per_token * size + 3 * sft.LOGIT_BYTES["cuda"],
        "sampler": total * size,
    }
    parts = {name: value / 2**30 for name, value in parts.items()}
    # n_slots or, where memory is short, fewer as in `generate`, but at least one
    row = 2 * math.prod(KVCache.shape(config, 1, tokens)) * size / 2**30
    room = min(args.kv_gib or math.inf, gib - sum(parts.values()))
    parts["KV cache"] = row * max(1, int(min(args.n_slots, room / row)))
    return {"parameters": total / 1e9} | parts | {"total": sum(parts.values())}


def print_plan(args, gpus, gib):
    """UserError where it does not fit. A tenth of the memory is left to CUDA, NCCL and fragmentation."""
    config = load_config(args.model) if args.model else sft.starting_point("")[0]
    if gpus < 1 or gpus % args.replicas:
        raise UserError(f"--replicas {args.replicas} does not divide {gpus} GPUs")
    found, usable = plan(config, args, gpus, 0.9 * gib), 0.9 * gib
    print(markdown(["GPUs of GiB", *found],
                   [[f"{gpus} of {gib}", *(f"{value:.1f}" for value in found.values())]]))
    if found["total"] > usable:
        largest = max(list(found)[1:-1], key=found.get)
        raise UserError(f"does not fit: {found['total']:.1f} GiB per GPU are needed, {usable:.1f} are "
                        f"there; the largest part is {largest} with {found[largest]:.1f} GiB")
    slots = found["KV cache"] / plan(config, args, gpus, 0)["KV cache"]
    print(f"fits: {found['total']:.1f} of {usable:.1f} GiB per GPU, with {slots:.0f} slots; while loading "
          f"{4e9 * found['parameters'] / 2**30:.0f} GiB of host memory per process\n"
          f"disk: {24e9 * found['parameters'] / 2**30:.1f} GiB per checkpoint (weights and two moments of "
          f"actor and critic), up to {args.keep_checkpoints + 1} at a time, in a folder that all nodes share")


def print_table(gpus=(1, 8, 16)):
    print("GiB per GPU, in brackets with --cpu_offload, under " + " ".join(FLAGS))
    rows = []
    for name, shape in SHAPES.items():
        config, cells = Qwen2Config(**dict(zip(NAMES, shape))), [name]
        for n in gpus:
            total, offloaded = (plan(config, ppo.parse_arguments(FLAGS + more), n)["total"]
                                for more in ([], ["--cpu_offload"]))
            cells.append(f"{total:.0f} ({offloaded:.0f})")
        rows.append(cells)
    print(markdown(["", *(f"{n} GPU{'s' * (n > 1)}" for n in gpus)], rows))


if __name__ == "__main__":
    if not sys.argv[1:]:
        print_table()
    elif len(sys.argv) < 3 or not all(word.isdecimal() for word in sys.argv[1:3]):
        sys.exit(__doc__)
    else:
        try:
            print_plan(ppo.parse_arguments(sys.argv[3:]), *map(int, sys.argv[1:3]))
        except UserError as error:
            sys.exit(f"error: {error}")
