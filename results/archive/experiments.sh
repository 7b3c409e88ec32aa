#!/usr/bin/env bash
# The runs behind results/RESULTS.md, most important ones first: two processes of one thread side by side. A run that is there
# is not made again, one that was cut short goes on: the same command finishes the list.
#   bash runs/experiments.sh            # SEEDS="31" and OUT=... may be set
set -euo pipefail
cd "$(dirname "$0")/.."
export OMP_NUM_THREADS=1 OUT=${OUT:-results/experiments}
seeds=${SEEDS:-21 22 23}
first=${seeds%% *}

keep() {  # NAME-SEED, log of its warm start: what is committed of a run
  mkdir -p "$OUT/$1" && cp "out/experiments/$1"/arguments.json "out/experiments/$1"/metrics.jsonl "$OUT/$1/"
  grep -a '^warm start: ' "$2" > "$OUT/$1/warm_start.txt"  # its losses, or which one was reused
}

one() {  # NAME SEED FLAGS...
  local folder="out/experiments/$1-$2"
  [ -e "$OUT/$1-$2/metrics.jsonl" ] && return
  if [ -d "$folder/checkpoints" ]; then
    python ppo.py --resume "$folder" > "$folder.log" 2>&1 || return
  else
    rm -rf "$folder"
    python ppo.py --run_dir "$folder" --seed "$2" --sft_seed "$2" "${@:3}" > "$folder.log" 2>&1 || return
  fi
  keep "$1-$2" "$folder.log"
}
export -f keep one

list() {
  for seed in $seeds; do echo "retool $seed"; done  # three warm starts, which the others reuse
  for seed in $seeds; do echo "text $seed --tools off --code_share 0"; done
  for seed in $seeds; do
    for kind in none hidden; do echo "feedback-$kind $seed --feedback $kind"; done
    for price in 0.1 0.3 0.6 1.2 1.8; do echo "cost-$price $seed --reward cost --reward_scale $price"; done
    for kind in executable bonus steps; do echo "reward-$kind $seed --reward $kind --reward_scale 0.3"; done
  done
  local group="--samples_per_prompt 8 --prompts_per_step 32" once="--eval_samples 1"
  echo "grpo $first --advantage grpo $group"
  echo "rloo $first --advantage rloo $group"
  for seed in $seeds; do echo "mask-off $seed --mask_interpreter off"; done
  echo "kl-0.1 $first --kl_coef 0.1 $once"
  echo "kl-0.01 $first --kl_coef 0.01 $once"
  echo "entropy-0.01 $first --entropy_coef 0.01 $once"
  echo "sync-4 $first --sync_every 4"
  echo "sync-4-weighted $first --sync_every 4 --importance token"
  echo "sync-16 $first --sync_every 16"
  echo "sync-16-weighted $first --sync_every 16 --importance token"
  echo "no-critic-warmup $first --critic_warmup 0 $once"
  echo "lam-0.95 $first --lam_actor 0.95 $once"
  echo "lam-adaptive $first --lam_actor adaptive $once"
  echo "turns $first --gae_unit turn $once"
  echo "clip-0.2 $first --clip_high 0.2 $once"
  echo "no-whiten-floor $first --whiten_floor 1e-6 $once"
  echo "drop-void $first --drop_void $once"
  echo "code-0.25 $first --code_share 0.25"
  echo "code-0.1 $first --code_share 0.1"
  echo "code-0.75 $first --code_share 0.75"
  echo "sft-mask-off $first --sft_mask_interpreter off"
  echo "mask-failed-off $first --mask_failed off"
  echo "traces-500 $first --sft_traces 500"
  echo "traces-2000 $first --sft_traces 2000"
  # Once more, all on one machine, one thread each: the axis of time, and the base of what was run there; then the base of
  # the rewards and of mask-off on the other seeds, run on a third.
  echo "retool-check $first"
  for seed in $seeds; do [ "$seed" = "$first" ] || echo "retool-again $seed"; done
  echo "grpo-check $first --advantage grpo $group"
  echo "rloo-check $first --advantage rloo $group"
  echo "text-check $first --tools off --code_share 0"
}
# As the default is run: another number of ranks would round otherwise.
for seed in $seeds; do torchrun --nproc_per_node 2 sft.py --sft_seed "$seed"; done
mkdir -p out/experiments
list | xargs -P ${PROCESSES:-2} -L 1 bash -c 'one "$@"' bash

# Problems of one, two and three calls, from files.
calls() {  # SEED
  local data=out/calls/$1 folder=out/experiments/calls-$1 checkpoint
  [ -e "$OUT/calls-$1/metrics.jsonl" ] && return
  [ -e "$data/train.jsonl" ] || python runs/calls.py "$data" "$1"
  checkpoint=$(python sft.py --traces "$data/traces.jsonl" --sft_seed "$1" | tee "$data/sft.log" | sed -n 's/^checkpoint: //p')
  rm -rf "$folder"
  python ppo.py --run_dir "$folder" --seed "$1" --model "$checkpoint" --train_data "$data/train.jsonl" \
    --eval_data "$data/calls_1.jsonl,$data/calls_2.jsonl,$data/calls_3.jsonl" --actor_lr 4e-4 --critic_lr 5e-4 \
    --sandbox_timeout 0.5 --max_prompt_tokens 512 --max_response_tokens 320 > "$folder.log"
  keep "calls-$1" "$data/sft.log"
}
for seed in $seeds; do calls "$seed"; done

# What warm starts on more and more traces answer right: on the problems of 256 of their traces, and on fresh ones.
mkdir -p "$OUT/memorisation"
python -c "import data, json; [print(json.dumps(row)) for row in data.embedded_rows('train', 256, $first)]" > out/experiments/seen.jsonl
for n in 500 2000 6000; do
  [ -e "$OUT/memorisation/$n.json" ] && continue
  checkpoint=$(python sft.py --sft_traces $n --sft_seed "$first" | sed -n 's/^checkpoint: //p')
  python eval.py --model "$checkpoint" --problems out/experiments/seen.jsonl,test --limit 256 --samples 2 \
    --max_prompt_tokens 512 --max_response_tokens 320 --n_slots 128 --output out/experiments/memorisation-$n.json
  cp out/experiments/memorisation-$n.json "$OUT/memorisation/$n.json"
done

# The same model, untrained.
if [ ! -e "$OUT/untrained.json" ]; then
  checkpoint=$(python sft.py --sft_steps 2 --sft_warmup 1 --sft_lr 0 --sft_muon_lr 0 --sft_seed "$first" | sed -n 's/^checkpoint: //p')
  python eval.py --model "$checkpoint" --samples 2 --max_prompt_tokens 512 --max_response_tokens 320 --n_slots 128 \
    --output out/experiments/untrained.json
  cp out/experiments/untrained.json "$OUT/untrained.json"
fi

# A task that is not mathematics, from files; and the model of numbers on it.
words() {
  local data=out/words/$first folder=out/experiments/task-text-$first checkpoint
  [ -e "$data/train.jsonl" ] || python runs/words.py "$data" "$first"
  if [ ! -e "$OUT/task-text-$first/metrics.jsonl" ]; then
    checkpoint=$(python sft.py --traces "$data/traces.jsonl" --sft_seed "$first" | tee "$data/sft.log" | sed -n 's/^checkpoint: //p')
    rm -rf "$folder"
    python ppo.py --run_dir "$folder" --seed "$first" --model "$checkpoint" --train_data "$data/train.jsonl" \
      --eval_data "$data/test.jsonl,$data/ood_large.jsonl,$data/ood_families.jsonl" --actor_lr 4e-4 --critic_lr 5e-4 \
      --sandbox_timeout 0.5 --max_prompt_tokens 512 --max_response_tokens 320 > "$folder.log"
    keep "task-text-$first" "$data/sft.log"
  fi
  [ -e "$OUT/transfer.json" ] && return
  python eval.py --model "out/experiments/retool-$first/checkpoint" --problems "$data/test.jsonl" --samples 2 --max_prompt_tokens 512 \
    --max_response_tokens 320 --n_slots 128 --output out/experiments/transfer.json
  cp out/experiments/transfer.json "$OUT/transfer.json"
}
words

# What a distant sandbox would cost the trained model.
[ -e "$OUT/delays.json" ] || python tests/bench_rollout.py --delays --model "out/experiments/retool-$first/checkpoint" |
  tail -n 1 > "$OUT/delays.json"
bash runs/results.sh
