#!/usr/bin/env bash
# The embedded default with three seeds of warm start and PPO; beside it, from the same warm starts, GRPO and RLOO. Tables and the
# figure of README, in results/default. A run takes about seven and a half minutes on two idle cores; nothing else should run beside it.
set -euo pipefail
cd "$(dirname "$0")/.."
OUT=results/default
keep() {  # run folder, name: what the tables are made of; of the rollouts the first and last steps, without their tokens
  mkdir -p "$OUT/$2"
  cp "$1"/{arguments.json,metrics.jsonl,table.md} "$OUT/$2"
  python runs/novel.py --keep "$1" > "$OUT/$2/rollouts.jsonl"
}
newest_warm_start() { ls -d -t "out/warm_start/$1"/*[0-9a-f] | head -n 1; }  # SEED
for seed in ${SEEDS:-51 52 53}; do
  run=out/ppo/default-$seed
  [ -e "$run/table.md" ] || torchrun --nproc_per_node 2 ppo.py --seed "$seed" --sft_seed "$seed" --run_dir "$run" \
    --warm_start_dir "out/warm_start/$seed"
  keep "$run" "seed-$seed"
  # Which of two scripts fails: the same responses as in the run's own evaluations of the warm start and the last checkpoint.
  [ -e "$run.scripts.json" ] || python eval.py --model "$(newest_warm_start "$seed")" "$run/checkpoint" --problems test --samples 2 --output "$run.scripts.json"
  cp "$run.scripts.json" "$OUT/seed-$seed/scripts.json"
  python runs/experiments.py --signatures "$run.scripts.json" > "$OUT/seed-$seed/signatures.json"
done
for seed in ${SEEDS:-51 52 53}; do
  for advantage in grpo rloo; do
    run=out/ppo/$advantage-$seed
    [ -e "$run/table.md" ] || torchrun --nproc_per_node 2 ppo.py --seed "$seed" --sft_seed "$seed" --run_dir "$run" \
      --warm_start_dir "out/warm_start/$seed" --advantage $advantage --samples_per_prompt 4 --prompts_per_step 80
    keep "$run" "$advantage-$seed"
  done
done
# The warm starts beside each other, with more samples than a run's own evaluation has
warm_starts=()
for seed in ${SEEDS:-51 52 53}; do warm_starts+=("$(newest_warm_start "$seed")"); done
[ -e out/ppo/warm_starts.json ] || torchrun --nproc_per_node 2 eval.py --model "${warm_starts[@]}" --problems test --samples 12 \
  --n_slots 320 --output out/ppo/warm_starts.json
cp out/ppo/warm_starts.json "$OUT"
python runs/experiments.py --by_hand out/ppo/warm_starts.json > "$OUT/by_hand.json"
python runs/default.py "$OUT"/seed-* --others "$OUT"/{grpo,rloo}-* --warm_starts "$OUT/warm_starts.json" --figure "$OUT/finds.svg" > "$OUT/README.md"
python runs/novel.py "$OUT"/seed-* > "$OUT/novel.md"
