"""Traces for a policy that does not see what a call returns: outputs give way to what `--feedback` shows.

    python runs/hidden.py {hidden,none} TRACES.json > traces.jsonl

TRACES.json: the curated traces that sft.py keeps beside its warm starts.
"""
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from rollout import BUSY, INTERPRETER_BLOCK, INTERPRETER_CLOSE, INTERPRETER_OPEN, shown_output  # noqa: E402
from sandbox import SandboxResult  # noqa: E402


def hide(trace, feedback):
    """The trace with every output replaced by what the policy will see of it."""
    calls = iter(range(trace["response"].count(INTERPRETER_OPEN)))

    def block(match):
        failed = next(calls) in trace["failed_calls"] or match[1].strip() == BUSY
        result = SandboxResult("error" if failed else "ok", match[1])
        return f"\n{INTERPRETER_OPEN}\n{shown_output(result, feedback)}\n{INTERPRETER_CLOSE}"

    return trace | {"response": INTERPRETER_BLOCK.sub(block, trace["response"])}


def main(feedback, path):
    traces, held_out = json.loads(Path(path).read_text())
    for trace in traces + held_out:
        print(json.dumps(hide(trace, feedback)))


if __name__ == "__main__":
    if len(sys.argv) != 3 or sys.argv[1] not in ("hidden", "none"):
        sys.exit(__doc__)
    main(*sys.argv[1:])
