"""What did finished runs of ppo.py reach? Mean and range, a table per group of runs with the same arguments.

    python runs/results.py RUN [RUN ...]
"""
import json
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from eval import markdown  # noqa: E402
from sandbox import UserError  # noqa: E402

# Arguments that may differ between runs of one mean: seeds, places, what only changes speed.
NOT_A_SETTING = {"seed", "sft_seed", "run_dir", "warm_start_dir", "resume", "export", "plan", "save_every",
                 "keep_checkpoints", "save_rollouts", "sandbox_workers"}


def runs_tables(runs):
    """`runs_table` of each group of runs with the same arguments, under a line of what
    differs."""
    groups = {}
    for run in runs:
        try:
            arguments = json.load(open(f"{run}/arguments.json"))["arguments"]
        except (OSError, ValueError, KeyError) as error:
            raise UserError(f"{run}: arguments.json: {error}") from None
        kept = {name: value for name, value in arguments.items() if name not in NOT_A_SETTING}
        groups.setdefault(json.dumps(kept, sort_keys=True), []).append(run)
    settings = [json.loads(key) for key in groups]
    differ = sorted(name for name in set().union(*settings)
                    if len({json.dumps(s.get(name)) for s in settings}) > 1)
    lines = [" ".join(f"--{name} {setting.get(name)}" for name in differ) for setting in settings]
    tables = [runs_table(members) for members in groups.values()]
    return "\n\n".join(part for pair in zip(lines, tables) for part in pair if part)


def runs_table(runs):
    """Markdown table: mean and range over run folders of their evaluations and wall times."""
    columns = {"accuracy": "accuracy %", "code_ratio": "code %", "code_ratio_needed": "code % where needed",
               "code_ratio_trivial": "code % where trivial", "response_tokens": "tokens",
               "minutes": "minutes"}
    values = {}  # row of the table -> column -> one value per run
    for run in runs:
        try:
            rows = [json.loads(line) for line in open(f"{run}/metrics.jsonl")]
        except (OSError, ValueError) as error:
            raise UserError(f"{run}: {error}") from None
        if not rows or "seconds_total" not in rows[-1]:
            raise UserError(f"{run}: not a finished run")
        rows[-1] |= {"evaluation": "whole run", "minutes": rows[-1]["seconds_total"] / 60}
        for row in rows:
            if "evaluation" in row:
                found = values.setdefault(row["evaluation"], {})
                for name in columns.keys() & row.keys():
                    found.setdefault(name, []).append(row[name])

    def show(name, found):
        if None in found:
            return "-"
        scale = 100 if name.startswith(("accuracy", "code")) else 1
        return f"{scale * np.mean(found):.1f} [{scale * min(found):.1f}, {scale * max(found):.1f}]"

    return markdown([f"{len(runs)} runs: mean [min, max]", *columns.values()],
                    [[label, *(show(name, found[name]) if name in found else "" for name in columns)]
                     for label, found in values.items()])


if __name__ == "__main__":
    if not sys.argv[1:] or sys.argv[1].startswith("-"):
        sys.exit(__doc__)
    try:
        print(runs_tables(sys.argv[1:]))
    except UserError as error:
        sys.exit(f"error: {error}")
