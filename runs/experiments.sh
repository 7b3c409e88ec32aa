#!/usr/bin/env bash
# The runs behind results/RESULTS.md, beside those of runs/default.sh, from whose warm starts most of them begin.
# Two ranks each, one after the other, about four minutes each on two idle cores.
# What is there is not made again, and what was cut short goes on: the same command finishes the list.
#   bash runs/experiments.sh                # all of them
#   bash runs/experiments.sh NAME SEED ...  # some
set -euo pipefail
cd "$(dirname "$0")/.."
OUT=results/experiments
export OMP_NUM_THREADS=1
TEXT="--tools off --code_share 0 --warm_start_dir out/warm_start/text"
two_ranks() { torchrun --nproc_per_node 2 "$@"; }

flags() {  # NAME: what a run has other than the default
  case $1 in
    *-equal-time) echo --advantage "${1%-equal-time}" --samples_per_prompt 4 --prompts_per_step 80 --steps 37 ;;  # PPO's time for 30, about
    lam-*) echo --lam_actor "${1#lam-}" ;;
    again) echo ;;  # the default, from the warm starts of another machine: what runs there are compared with
    curve) echo --eval_every 3 ;;  # the default, evaluated as it learns
    turn) echo --gae_unit turn ;;
    mask-off) echo --mask_interpreter off ;;
    sft-mask-off) echo --sft_mask_interpreter off --warm_start_dir out/warm_start/masks ;;
    sync-*-weighted) local name=${1#sync-}; echo --sync_every "${name%-weighted}" --importance token ;;
    sync-*) echo --sync_every "${1#sync-}" ;;
    minibatches-*) echo --minibatches "${1#minibatches-}" ;;
    kl-*) echo --kl_coef "${1#kl-}" ;;
    entropy-*) echo --entropy_coef "${1#entropy-}" ;;
    no-whiten-floor) echo --whiten_floor 1e-6 ;;
    cost-*) echo --reward cost --reward_scale "${1#cost-}" ;;
    reward-*) echo --reward "${1#reward-}" --reward_scale 0.3 ;;
    text) echo "$TEXT" ;;
    text-long) echo "$TEXT --steps 81" ;;  # 2.7 times the steps, as in the paper
    text-long-*) echo "$TEXT --steps 81 --actor_lr ${1#text-long-}" ;;
    feedback-*) echo --feedback "${1#feedback-}" ;;
    from-*) echo "--sft_traces ${1#from-} --warm_start_dir out/warm_start/traces" ;;  # those of traces-N
    *) echo "no run is called $1" >&2; return 1 ;;
  esac
}

warm_start() {  # SEED FLAGS...: the folder of a warm start, made or found
  two_ranks sft.py --sft_seed "$1" "${@:2}" | tee -a out/experiments/warm_starts.log | sed -n 's/^checkpoint: //p'
}

ppo() {  # NAME SEED
  local run=out/experiments/$1-$2 from=(--sft_seed "$2" --warm_start_dir "out/warm_start/$2") words more checkpoint traces
  words=$(flags "$1")
  read -ra more <<< "$words"
  if [ -d "$run/checkpoints" ]; then
    two_ranks ppo.py --resume "$run" >> "$run.log"
  else
    # What the policy will not see of a call, its traces do not show.
    if [[ $1 = feedback-* ]]; then
      warm_start "$2" --warm_start_dir "out/warm_start/$2" > /dev/null  # it keeps its traces there
      traces=$(ls -t "out/warm_start/$2"/traces-*.json | head -n 1)  # where code has changed, there are older ones
      python runs/hidden.py "${1#feedback-}" "$traces" > "$run.traces.jsonl"
      checkpoint=$(warm_start "$2" --traces "$run.traces.jsonl")
      from=(--warm_start "$checkpoint")
    fi
    rm -rf "$run"
    two_ranks ppo.py --run_dir "$run" --seed "$2" "${from[@]}" "${more[@]}" > "$run.log"
  fi
  python runs/experiments.py --keep "$run" "$OUT/$1-$2"
}

# Rejection sampling with as many responses as PPO samples, 9,600, and 600 steps of SFT.
# rft: three rounds; after each the policy learns from all its right responses. rft-10: ten rounds; from the newest alone, as PPO.
rft() {  # NAME SEED
  local folder=out/experiments/$1-$2 rounds=3 model models newest samples=() round
  [ "$1" = rft-10 ] && rounds=10
  mkdir -p "$folder"
  model=$(warm_start "$2" --warm_start_dir "out/warm_start/$2")
  models=("$model")
  for ((round = 1; round <= rounds; round++)); do
    newest=$folder/samples-$round.json
    two_ranks eval.py --model "$model" --problems train --limit $((9600 / rounds)) --samples 1 --seed "$2$round" --output "$newest"
    [ "$1" = rft-10 ] && samples=()
    samples+=("$newest.responses.jsonl")
    python runs/rft.py "${samples[@]}" > "$folder/right-$round.jsonl"
    model=$(warm_start "$2" --model "$model" --traces "$folder/right-$round.jsonl" --sft_steps $((600 / rounds)) --sft_warmup 10 \
      --sft_lr 2e-3 --sft_muon_lr 1.6e-2)
    models+=("$model")
  done >> "$folder.log"
  # The same noise as in PPO's own evaluations
  two_ranks eval.py --model "${models[@]}" --problems test --samples 2 --output "$folder/sampled.json" >> "$folder.log"
  two_ranks eval.py --model "${models[@]}" --problems test --samples 1 --temperature 0 --output "$folder/greedy.json" >> "$folder.log"
  keep_scores "$1-$2" sampled.json greedy.json
}

# Greedy, with the call forced, or call and retry: what a run's own table has sampled.
forced() {  # NAME SEED
  local folder=out/experiments/$1-$2 model
  local call=$'<code>\n```python\n' again=$'\nOnce more.\n<code>\n```python\n'
  mkdir -p "$folder"
  model=$(warm_start "$2" --warm_start_dir "out/warm_start/$2")
  two_ranks eval.py --model "$model" --problems test --samples 1 --temperature 0 --prefill "$call" --output "$folder/call.json" > "$folder.log"
  two_ranks eval.py --model "$model" --problems test --samples 1 --temperature 0 --prefill "$call" --after_busy "$again" \
    --output "$folder/retry.json" >> "$folder.log"
  keep_scores "$1-$2" call.json retry.json
}

# Memorisation: a warm start on N traces, asked the problems of its own traces and others of the same kind.
traces() {  # traces-N SEED
  local folder=out/experiments/$1-$2 model
  mkdir -p "$folder"
  model=$(warm_start "$2" --sft_traces "${1#traces-}" --warm_start_dir out/warm_start/traces)
  two_ranks eval.py --model "$model" --problems traces,held_out_traces --seed "$2" --samples 2 --output "$folder/sampled.json" > "$folder.log"
  cp "$model/metrics.jsonl" "$folder/warm_start.jsonl"
  keep_scores "$1-$2" sampled.json warm_start.jsonl
}

# Latency: what a slow sandbox would cost the rollouts of the trained default.
latency() {  # NAME SEED
  local table=out/experiments/$1-$2.json
  python tests/bench_rollout.py --delays --model "out/ppo/default-$2/checkpoint" | tail -n 1 > "$table"
  mkdir "$OUT/$1-$2"
  mv "$table" "$OUT/$1-$2/delays.json"
}

keep_scores() {  # NAME-SEED FILE...: all of them or none
  rm -rf "$OUT/$1.partial"
  mkdir -p "$OUT/$1.partial"
  for file in "${@:2}"; do cp "out/experiments/$1/$file" "$OUT/$1.partial"; done
  mv "$OUT/$1.partial" "$OUT/$1"
}

one() {  # NAME SEED
  [ -e "$OUT/$1-$2" ] && return
  mkdir -p out/experiments
  case $1 in
    rft | rft-10) rft "$1" "$2" ;;
    forced) forced "$1" "$2" ;;
    traces-*) traces "$1" "$2" ;;
    latency) latency "$1" "$2" ;;
    *) ppo "$1" "$2" ;;
  esac
}

if [ $# -gt 0 ]; then
  while [ $# -gt 0 ]; do one "$1" "$2"; shift 2; done
  exit
fi
# Most important ones first; three seeds for what a headline says.
for seed in 51 52 53; do
  for name in rft rft-10 forced curve text mask-off lam-0.95; do one $name $seed; done
done
for seed in 52 53; do one again $seed; done
for name in feedback-hidden feedback-none text-long text-long-0.0003 text-long-0.003 turn lam-adaptive sync-4 sync-4-weighted sync-16 \
    sync-16-weighted minibatches-16 kl-0.01 kl-0.1 entropy-0.01 no-whiten-floor reward-executable reward-bonus reward-steps cost-0.1 cost-0.3 cost-0.6 \
    cost-0.9 cost-1.2 cost-1.8 grpo-equal-time rloo-equal-time sft-mask-off traces-500 traces-2000 traces-10000 from-500 from-2000 latency; do
  one $name 51
done
