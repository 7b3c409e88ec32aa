#!/usr/bin/env bash
# The embedded default with three seeds of warm start and PPO, its tables and figure in results/default, and PPO beside GRPO and RLOO.
# A run takes about eight minutes on two idle cores; nothing else should run beside it.
set -euo pipefail
cd "$(dirname "$0")/.."
OUT=results/default
for seed in ${SEEDS:-31 32 33}; do
  run=out/ppo/default-$seed
  [ -e "$run/table.md" ] || torchrun --nproc_per_node 2 ppo.py --seed "$seed" --sft_seed "$seed" --run_dir "$run"
  mkdir -p "$OUT/seed-$seed"
  cp "$run"/{arguments.json,metrics.jsonl,rollouts.jsonl,table.md} "$OUT/seed-$seed"
done
python runs/default.py "$OUT"/seed-* --figure "$OUT/finds.svg" > "$OUT/README.md"
python runs/novel.py "$OUT"/seed-* > "$OUT/novel.md"
