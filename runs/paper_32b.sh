#!/usr/bin/env bash
# The paper's setting as far as it is known (fill-ins of public recipes where it is silent). NOT RUN HERE: it needs a cluster.
# It documents which flag is which number. By `runs/plan.py` it fits 16 GPUs of 141 GB with the states in host memory.
#   bash runs/paper_32b.sh --nnodes 2 --nproc_per_node 8 --rdzv_backend c10d --rdzv_endpoint HOST:29500
set -euo pipefail
cd "$(dirname "$0")/.."
MODEL=${MODEL:?a Qwen2.5-32B-Instruct checkpoint}          # paper
TRACES=${TRACES:?JSONL of verified cold-start traces}      # paper: about 2,000 released
DATA=${DATA:?JSONL of problems}                            # authors: DAPO-Math-17k
WARM_START=${WARM_START:-}                                 # the folder printed by sft.py; empty: only that stage
COMMON="--prompt_template retool --max_interpreter_tokens 1024 --sandbox_workers 32 --sandbox_timeout 5 --token_budget 18432
  --dtype bf16 --activation_checkpointing --cpu_offload --replicas ${REPLICAS:-1}"
if [ -z "$WARM_START" ]; then
  torchrun "$@" sft.py --model "$MODEL" --traces "$TRACES" $COMMON \
    --sft_batch_size 32 --sft_steps 125 --sft_lr 1e-6 --sft_muon_lr 0 --warm_start_dir out/paper_32b_sft
  echo "now with WARM_START=<the folder printed above>" && exit
fi
torchrun "$@" ppo.py --model "$WARM_START" --train_data "$DATA" $COMMON \
  --eval_data "${EVAL_DATA:-}" --eval_samples 32 --eval_top_p 0.7 \
  --steps 400 --prompts_per_step 1024 --minibatches 2 --samples_per_prompt 1 --max_calls 8 \
  --max_prompt_tokens 2048 --max_response_tokens 16384 --actor_lr 1e-6 --critic_lr 2e-6 --critic_warmup 20 \
  --lr_floor 1.0 --clip_low 0.2 --clip_high 0.28 --value_clip 0.5 --rejoin_ticks 0 --kv_gib 24
