#!/usr/bin/env bash
# Qwen2.5-7B-Instruct on one node of eight 80 GB cards: traces, warm start, PPO, evaluation.
# NOTHING OF IT WAS RUN ON CUDA. By runs/plan.py, which comes first and stops what cannot fit:
#   41 of 72 GiB per card with the states in host memory (62 without --cpu_offload, which should be faster);
#   host memory: 255 GiB while the eight processes load (4 bytes per parameter each), 193 afterwards.
#   bash runs/7b.sh            # each stage is kept: the same command goes on where it stopped
set -euo pipefail
cd "$(dirname "$0")/.."

# torchrun would give each process one thread, but with --cpu_offload AdamW runs on the host.
threads=$(($(nproc) / 8))
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((threads > 0 ? threads : 1))}
# Without the first, pinned memory of the states is rounded up to powers of two: 1.9 times as much. With the second, memory that
# training has cut into pieces is free again for the KV cache.
export PYTORCH_ALLOC_CONF=${PYTORCH_ALLOC_CONF:-pinned_max_round_threshold_mb:1,expandable_segments:True}

MODEL=${MODEL:-Qwen/Qwen2.5-7B-Instruct}
DATA=${DATA:-BytedTsinghua-SIA/DAPO-Math-17k}     # each problem stands in it about a hundred times: duplicates are left out
TRACES=${TRACES:-JoeYing/ReTool-SFT}              # the authors' 2,000 traces; those whose quoted outputs are not what
                                                  # the snippets print are left out: the paper's were written, not run
AIME24=${AIME24:?a JSONL file with the problems of AIME 2024 (input/output or problem/answer)}
AIME25=${AIME25:?a JSONL file with the problems of AIME 2025}
OUT=${OUT:-out/7b}
SHARED="--prompt_template retool --dtype bf16 --activation_checkpointing --cpu_offload --token_budget 18432
  --max_interpreter_tokens 1024 --sandbox_timeout 5 --sandbox_workers 16"
RL="--max_prompt_tokens 2048 --max_response_tokens 16384 --max_calls 8 --actor_lr 1e-6 --critic_lr 2e-6 --kv_gib 24"

python runs/plan.py 8 80 --model "$MODEL" $SHARED $RL
mkdir -p "$OUT"
[ -e "$OUT/traces.jsonl" ] || python sft.py curate --input "$TRACES" --output "$OUT/traces.jsonl" --tokenizer "$MODEL" \
  --decontaminate "$AIME24" "$AIME25"
[ -e "$OUT/warm_start" ] || { torchrun --nproc_per_node 8 sft.py --model "$MODEL" --traces "$OUT/traces.jsonl" $SHARED \
  --sft_lr 1e-5 --sft_muon_lr 0 --sft_steps 125 --sft_batch_size 32 --sft_warmup 10 --warm_start_dir "$OUT/sft" | tee "$OUT/sft.log"
  ln -s "$(sed -n 's/^checkpoint: //p' "$OUT/sft.log" | xargs realpath)" "$OUT/warm_start"; }
if [ -d "$OUT/ppo/checkpoints" ]; then
  torchrun --nproc_per_node 8 ppo.py --resume "$OUT/ppo"
else
  torchrun --nproc_per_node 8 ppo.py --run_dir "$OUT/ppo" --model "$OUT/warm_start" --train_data "$DATA" $SHARED $RL \
    --eval_data "$AIME24,$AIME25" --eval_samples 32 --eval_top_p 0.7 --eval_every 50 --steps 400 --prompts_per_step 512 \
    --minibatches 2 --critic_warmup 20 --lr_floor 1.0 --clip_low 0.2 --clip_high 0.28 --rejoin_ticks 0
fi
torchrun --nproc_per_node 8 eval.py --model "$OUT/ppo/checkpoint" --problems "$AIME24,$AIME25" --samples 32 --top_p 0.7 \
  --max_prompt_tokens 2048 --max_response_tokens 16384 --max_calls 8 --kv_gib 40 --prompt_template retool --dtype bf16 \
  --max_interpreter_tokens 1024 --sandbox_timeout 5 --sandbox_workers 16 --output "$OUT/aime.json"
