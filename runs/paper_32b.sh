#!/usr/bin/env bash
# The paper's setting as far as it is known (fill-ins of public recipes where it is silent). It documents which flag is which number.
# NOTHING OF IT WAS RUN ON CUDA: it needs a cluster. By runs/plan.py, on 16 GPUs of 141 GB with the states in host memory:
#   119 of 127 GiB per GPU, 12 rows in the KV cache at a time, each with a slot for the longest;
#   host memory per node of eight: 1,040 GiB while the processes load (4 bytes per parameter each), 423 afterwards, 846 with REPLICAS=2.
#   python runs/plan.py 16 141 --model MODEL ...     # with the flags of ppo.py below
#   bash runs/paper_32b.sh --nnodes 2 --nproc_per_node 8 --rdzv_backend c10d --rdzv_endpoint HOST:29500     # on each node
# Two nodes: if gloo reports "connectFullMesh failed", name the network interface (one, as in `ip link`) on each:
#   export GLOO_SOCKET_IFNAME=eth0
set -euo pipefail
cd "$(dirname "$0")/.."

# torchrun would give each of eight processes one thread, but with --cpu_offload AdamW runs on the host.
threads=$(($(nproc) / 8))
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((threads > 0 ? threads : 1))}
# Without the first, pinned memory of the states is rounded up to powers of two: 1.8 times as much. With the second, memory that
# training has cut into pieces is free again for the KV cache.
export PYTORCH_ALLOC_CONF=${PYTORCH_ALLOC_CONF:-pinned_max_round_threshold_mb:1,expandable_segments:True}

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
  --lr_floor 1.0 --clip_low 0.2 --clip_high 0.28 --value_clip 0.5 --rejoin_ticks 0 --kv_gib 56
