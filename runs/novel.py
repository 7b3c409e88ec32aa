"""What do trained policies write that no trace has? Counts, from rollouts.jsonl of runs of the embedded default.

    python runs/novel.py results/default/seed-* > results/default/novel.md
    python runs/novel.py --keep RUN > rollouts.jsonl     # what this needs of a run's rollouts

A response is a trace's if, numbers apart, it is one letter for letter. That can hide something new: an answer
that is given too early differs from a trace in its numbers alone. So behaviours are counted by themselves, of
all responses; none of them is in any trace. Below them: what traces do, for comparison.
"""
import argparse
import json
import re
import sys
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from data import HIGHEST, embedded_problem  # noqa: E402
from eval import QUESTION, markdown, words  # noqa: E402
from rollout import CODE_OPEN, INTERPRETER_BLOCK, narrowed  # noqa: E402
from sandbox import UserError  # noqa: E402

MOMENTS = {"first three steps": lambda step, steps: step < 3,
           "last five steps": lambda step, steps: step >= steps - 5}


def without_numbers(text):
    return re.sub(r"\d+(?:\.\d+)?", "#", text)


def trace_texts(seed, n):
    """The traces of a warm start, numbers apart: with code and by hand, whatever was drawn."""
    texts = set()
    for index in range(n):
        problem = embedded_problem("traces", seed, index)
        texts.add(without_numbers(problem.by_code))
        texts.add(without_numbers(problem.by_hand))
    return texts


def left_in_box(codes, outputs):
    """How many numbers the answers of a search leave."""
    low, high = 1, HIGHEST
    for code, output in zip(codes, outputs):
        question = QUESTION.fullmatch(code.strip())
        if question:
            low, high = narrowed(low, high, int(question[2]), output.strip())
    return high - low + 1


def behaviours(row, max_calls):
    """What a response does, of what no trace does."""
    codes = row["codes"]
    statuses = row["tool_statuses"]
    outputs = INTERPRETER_BLOCK.findall(row["response"])
    has_ended = row["finish_reason"] == "eos"
    found = []

    if row["kind"] == "search" and codes and left_in_box(codes, outputs) > 1:
        if has_ended and len(codes) == max_calls:
            found.append("search: answers after the last allowed question, several numbers left")
        elif has_ended:
            found.append("search: answers earlier, several numbers left")
        elif row["finish_reason"] == "max_calls":
            found.append("search: asks once more than is allowed, several numbers left")
    for i in range(len(codes) - 1):
        if statuses[i] == "busy" and words(codes[i]) != words(codes[i + 1]):
            found.append("busy, then another script")
            break
    if "error" in statuses[:-1]:
        found.append("a failed script, then another call")
    if statuses.count("ok") >= 2 and row["kind"] != "search" and len(set(map(words, codes))) == 1:
        found.append("the same script again, though it ran")
    return found


# What traces do: name -> whether a response does it
HABITS = {
    "of those with a call: a sentence before it": lambda row: bool(row["codes"]) and not row["response"].startswith(CODE_OPEN),
    "a check of the result by another script": lambda row: "Is that right?" in row["response"],
    "by hand after a busy call": lambda row: "Then by hand." in row["response"],
}


def table(runs):
    n_responses = Counter()  # by moment
    n_right = Counter()
    like_traces = Counter()
    right_like_traces = Counter()
    counts = {}  # behaviour -> Counter by moment
    right = {}
    for run in runs:
        try:
            arguments = json.loads((Path(run) / "arguments.json").read_text())["arguments"]
            rows = [json.loads(line) for line in open(Path(run) / "rollouts.jsonl")]
        except (OSError, ValueError, KeyError) as error:
            raise UserError(f"{run}: {error}") from None
        texts = trace_texts(arguments["sft_seed"], arguments["sft_traces"])

        for row in rows:
            response = without_numbers(row["response"].removesuffix("<|im_end|>"))
            for moment, belongs in MOMENTS.items():
                if not belongs(row["step"], arguments["steps"]):
                    continue
                n_responses[moment] += 1
                n_right[moment] += row["correct"]
                if response in texts:
                    like_traces[moment] += 1
                    right_like_traces[moment] += row["correct"]
                names = behaviours(row, arguments["max_calls"])
                names += [f"habit of traces: {name}" for name, is_there in HABITS.items() if is_there(row)]
                for name in names:
                    counts.setdefault(name, Counter())[moment] += 1
                    right.setdefault(name, Counter())[moment] += row["correct"]

    def cells(count, count_right):
        return [f"{count[moment]} ({count_right[moment]})" for moment in MOMENTS]

    rows = [["all", *cells(n_responses, n_right)],
            ["a trace, numbers apart", *cells(like_traces, right_like_traces)]]
    for name in sorted(counts, key=lambda name: (name.startswith("habit"), name)):
        rows.append([name, *cells(counts[name], right[name])])
    return markdown(["responses (right ones)", *MOMENTS], rows)


KEPT = ["step", "family", "kind", "prompt", "response", "correct", "answer", "finish_reason", "tool_statuses", "codes"]


def keep(run):
    """Print the rows and columns of a run's rollouts that the table needs."""
    steps = json.loads((Path(run) / "arguments.json").read_text())["arguments"]["steps"]
    for line in open(Path(run) / "rollouts.jsonl"):
        row = json.loads(line)
        if any(belongs(row["step"], steps) for belongs in MOMENTS.values()):
            print(json.dumps({name: row[name] for name in KEPT}))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", help="run folders")
    parser.add_argument("--keep", action="store_true", help="print the rollouts that are needed")
    args = parser.parse_args()
    if args.keep:
        keep(args.runs[0])
        return
    print("# What no trace has\n\n`python runs/novel.py`, of the kept responses of each step.\n")
    print(table(args.runs))


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"error: {error}")
