#!/usr/bin/env bash
# The embedded default with three seeds, and its text-only twin: the figures of results/README.md. Each run takes minutes on two cores.
set -euo pipefail
cd "$(dirname "$0")/.."
for seed in ${SEEDS:-21 22 23}; do
  torchrun --nproc_per_node 2 ppo.py --seed "$seed" --sft_seed "$seed" --run_dir "out/ppo/tools-$seed"
  torchrun --nproc_per_node 2 ppo.py --seed "$seed" --sft_seed "$seed" --run_dir "out/ppo/text-$seed" --tools off --code_share 0
done
python runs/results.py out/ppo/tools-*
python runs/results.py out/ppo/text-*
