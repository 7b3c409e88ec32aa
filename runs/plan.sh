#!/bin/bash
# The README's memory table: --plan for the Qwen2.5 shapes, bf16, activation checkpointing, rows of up to 2,048 + 16,384
# tokens, at most 16 GiB of KV cache per GPU. Nothing is downloaded or loaded.
cd "$(dirname "$0")/.." && python - <<'PYTHON'
from transformers import Qwen2Config

import ppo

# hidden size, layers, query heads, key/value heads, feed-forward size, vocabulary, tied embeddings: config.json on the hub
SHAPES = {"0.5B": (896, 24, 14, 2, 4864, 151936, True), "1.5B": (1536, 28, 12, 2, 8960, 151936, True),
          "3B": (2048, 36, 16, 2, 11008, 151936, True), "7B": (3584, 28, 28, 4, 18944, 152064, False),
          "14B": (5120, 48, 40, 8, 13824, 152064, False), "32B": (5120, 64, 40, 8, 27648, 152064, False)}
NAMES = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "intermediate_size",
         "vocab_size", "tie_word_embeddings")
FLAGS = ["--dtype", "bf16", "--activation_checkpointing", "--n_slots", "64", "--kv_gib", "16",
         "--max_prompt_tokens", "2048", "--max_response_tokens", "16384", "--token_budget", "18432"]
GPUS = (1, 8, 16)
print("$ bash runs/plan.sh      # python ppo.py --model DIR --plan GPUS GIB " + " ".join(FLAGS))
print("| GiB per GPU (with `--cpu_offload`) | " + " | ".join(f"{n} GPU{'s' * (n > 1)}" for n in GPUS) + " |")
print("|---" * (len(GPUS) + 1) + "|")
for name, shape in SHAPES.items():
    config = Qwen2Config(**dict(zip(NAMES, shape)))
    cells = []
    for n in GPUS:
        total, offloaded = (ppo.plan(config, ppo.parse_arguments(FLAGS + more), n)["total"]
                            for more in ([], ["--cpu_offload"]))
        cells.append(f"{total:.0f} ({offloaded:.0f})")
    print(f"| {name} | " + " | ".join(cells) + " |")
PYTHON
