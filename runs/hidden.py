"""Traces for a policy that does not see what a call returns: outputs give way to what `--feedback` shows.

    python runs/hidden.py {hidden,none} TRACES.json > traces.jsonl

TRACES.json: the curated traces that sft.py keeps beside its warm starts. What the text says after a call stays, and
follows from an output that is no longer there: a policy that learns from it learns to make the result up.
"""
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from rollout import BUSY, INTERPRETER_BLOCK, INTERPRETER_CLOSE, INTERPRETER_OPEN, shown_output  # noqa: E402
from sandbox import SandboxResult  # noqa: E402


def hide(trace, feedback):
    """The trace with every output replaced by what the policy will see of it."""
    response = trace["response"]
    shown = ""
    end = 0  # of the block before
    for number, match in enumerate(INTERPRETER_BLOCK.finditer(response)):
        is_busy = match[1].strip() == BUSY
        is_failed = number in trace["failed_calls"]
        status = "error" if is_busy or is_failed else "ok"
        output = shown_output(SandboxResult(status, match[1]), feedback)
        shown += response[end:match.start()]
        shown += f"\n{INTERPRETER_OPEN}\n{output}\n{INTERPRETER_CLOSE}"
        end = match.end()
    return trace | {"response": shown + response[end:]}


def main(feedback, path):
    traces, _ = json.loads(Path(path).read_text())  # the rest is held out, also from the warm start made here
    for trace in traces:
        print(json.dumps(hide(trace, feedback)))


if __name__ == "__main__":
    if len(sys.argv) != 3 or sys.argv[1] not in ("hidden", "none"):
        sys.exit(__doc__)
    main(*sys.argv[1:])
