"""Rejection-sampling fine-tuning: a policy's own right responses become traces for sft.py.

    python eval.py --model CHECKPOINT --problems train --limit 3200 --samples 1 --output SAMPLES
    python runs/rft.py SAMPLES.responses.jsonl > traces.jsonl
    python sft.py --model CHECKPOINT --traces traces.jsonl

It is the cheapest thing that learns from the same reward: no critic, no advantages, no ratio. What was wrong
is thrown away.
"""
import json
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from rollout import INTERPRETER_BLOCK  # noqa: E402

USER_TURN = re.compile(r"<\|im_start\|>user\n(.*?)<\|im_end\|>", re.DOTALL)


def trace(response):
    """A row of OUTPUT.responses.jsonl as `sft.load_traces` reads it. Its prompt is ChatML."""
    # As in traces: that the tool is busy is no fault of a snippet.
    failed_calls = [i for i, status in enumerate(response["tool_statuses"]) if status not in ("ok", "busy")]
    return {
        "question": USER_TURN.search(response["prompt"])[1],
        "answer": response["answer"],
        "family": response["family"],
        "response": response["response"].removesuffix("<|im_end|>"),
        "failed_calls": failed_calls}


def main(paths):
    for path in paths:
        for line in open(path):
            response = json.loads(line)
            # Where a token closed a call and held more than its tag, a reader of the text finds no call.
            calls = INTERPRETER_BLOCK.findall(response["response"])
            if response["correct"] and len(calls) == len(response["tool_statuses"]):
                print(json.dumps(trace(response)))


if __name__ == "__main__":
    if not sys.argv[1:] or sys.argv[1].startswith("-"):
        sys.exit(__doc__)
    main(sys.argv[1:])
