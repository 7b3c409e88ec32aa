"""What did finished runs of ppo.py reach, and what did eval.py find? Tables.

    python runs/results.py RUN [RUN ...]  # mean and range per group of runs with the same arguments
    python runs/results.py OUTPUT         # of eval.py: pass@k, families; purposes of code and failure
                                          # signatures, from OUTPUT.responses.jsonl; checkpoints in
                                          # pairs
    python runs/results.py --metrics      # results/metrics.md: what each key of metrics.jsonl means
"""
import ast
import itertools
import json
import re
import sys
from collections import Counter
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from data import extract_answer  # noqa: E402
from eval import METRICS, NOT_A_SETTING, bootstrap, computes, markdown, mean, percent, syntax_tree  # noqa: E402
from sandbox import UserError  # noqa: E402


def metrics_table():
    """Markdown of eval.METRICS."""
    rows = [[f"`{name}`", meaning] for name, meaning in METRICS.items()]
    return markdown(["metric", "meaning"], rows)


# ---------------------------------------------------------------------------------------------
# Runs of ppo.py


def read_settings(run):
    """The arguments of a run, except those that may differ between runs of one mean."""
    try:
        arguments = json.load(open(f"{run}/arguments.json"))["arguments"]
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{run}: arguments.json: {error}") from None
    return {name: value for name, value in arguments.items() if name not in NOT_A_SETTING}


def runs_tables(runs):
    """`runs_table` of each group of runs with the same arguments, under a line of what
    differs."""
    groups = {}  # settings as JSON -> runs
    for run in runs:
        key = json.dumps(read_settings(run), sort_keys=True)
        groups.setdefault(key, []).append(run)

    # The settings in which groups differ
    all_settings = [json.loads(key) for key in groups]
    names = set()
    for settings in all_settings:
        names.update(settings)
    differ = []
    for name in sorted(names):
        values = {json.dumps(settings.get(name)) for settings in all_settings}
        if len(values) > 1:
            differ.append(name)

    parts = []
    for settings, members in zip(all_settings, groups.values()):
        if differ:
            parts.append(" ".join([f"--{name} {settings.get(name)}" for name in differ]))
        parts.append(runs_table(members))
    return "\n\n".join(parts)


# Columns of the table: key of the metrics -> heading
COLUMNS = {
    "accuracy": "accuracy %",
    "code_ratio": "code %",
    "code_ratio_needed": "code % where needed",
    "code_ratio_trivial": "code % where trivial",
    "response_tokens_sampled": "tokens written",
    "minutes": "minutes",
}


def read_evaluations(run):
    """[(label, metrics)] of a finished run's evaluations; the last one, its minutes."""
    try:
        rows = [json.loads(line) for line in open(f"{run}/metrics.jsonl")]
    except (OSError, ValueError) as error:
        raise UserError(f"{run}: {error}") from None
    if not rows or "seconds_total" not in rows[-1]:
        raise UserError(f"{run}: not a finished run")

    evaluations = [(row["evaluation"], row) for row in rows if "evaluation" in row]
    evaluations.append(("whole run", {"minutes": rows[-1]["seconds_total"] / 60}))
    return evaluations


def mean_and_range(name, values):
    """The cell of a column's values, one per run."""
    if None in values:
        return "-"
    scale = 100 if name.startswith(("accuracy", "code")) else 1
    return (f"{scale * np.mean(values):.1f} "
            f"[{scale * min(values):.1f}, {scale * max(values):.1f}]")


def runs_table(runs):
    """Markdown table: mean and range over run folders of their evaluations and wall times."""
    values = {}  # label of an evaluation -> column -> one value per run
    for run in runs:
        for label, metrics in read_evaluations(run):
            of_label = values.setdefault(label, {})
            for name in COLUMNS:
                if name in metrics:
                    of_label.setdefault(name, []).append(metrics[name])

    rows = []
    for label, of_label in values.items():
        cells = [label]
        for name in COLUMNS:
            cells.append(mean_and_range(name, of_label[name]) if name in of_label else "")
        rows.append(cells)
    return markdown([f"{len(runs)} runs: mean [min, max]", *COLUMNS.values()], rows)


# ---------------------------------------------------------------------------------------------
# OUTPUT of eval.py

# Failure signatures: key of the metrics -> (name, how to read the number)
SIGNATURES = {
    "code_ratio_trivial": (
        "unneeded_code", "of responses to trivial problems run code that nothing needs"),
    "unneeded_code_seconds": (
        "... its cost", "seconds of sandbox in each of them"),
    "unneeded_code_tokens": (
        "... its cost", "tokens of snippets and interpreter in each of them"),
    "repeated_snippets": (
        "repeated_snippets", "of responses with code run a syntax tree twice: stuck"),
    "uncorrected_failures": (
        "uncorrected_failures", "of responses with code end on a snippet that failed"),
    "void_turns": (
        "void_turns", "of responses end in a turn without snippet or answer: decay begins so"),
    "literal_prints": (
        "literal_prints", "of snippets print what stands in them: code as decoration"),
    "ood_drop": (
        "ood_drop", "points of accuracy from the first set to this one"),
}


def code_purpose(code, before):
    """What a snippet is for, guessed from its syntax tree and the words before it, where the paper
    asks an LLM: right for 32 of 50 that were labelled by hand (tests/purposes.jsonl)."""
    nodes = list(ast.walk(ast.parse(code)))
    has_assert = any(isinstance(node, ast.Assert) for node in nodes)
    announced = r"(?i)\b(check|verif|confirm|double-check|make sure|is that right)"
    if has_assert or re.search(announced, before[-200:]):
        return "verification"

    imported = set()
    for node in nodes:
        if isinstance(node, ast.ImportFrom):
            imported.add(node.module or "")
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            imported.update(alias.name.split(".")[0] for alias in node.names)
    if imported & {"sympy", "symbols"}:
        return "symbolic algebra"
    if "random" in imported:
        return "simulation"

    loops = (ast.For, ast.While, ast.comprehension)
    if any(isinstance(node, loops) for node in nodes):
        return "enumeration"
    return "calculation"


def sampled_text(response, begin, end):
    """What the policy itself wrote between two tokens of a response."""
    text = ""
    for token, sampled in zip(response["tokens"][begin:end], response["loss_mask"][begin:end]):
        if sampled:
            text += token
    return text


def failure_signatures(responses):
    """Shares and costs, over rows of OUTPUT.responses.jsonl; and the purposes of code."""
    purposes = Counter()
    literal_prints = []
    void_turns = []
    repeated = []
    uncorrected = []
    unneeded_seconds = []
    unneeded_tokens = []
    for response in responses:
        # Snippets that Python reads, with the text since the snippet before
        codes = response["codes"]
        begin = 0
        for code, (start, end) in zip(codes, response["calls"]):
            if syntax_tree(code):
                purposes[code_purpose(code, sampled_text(response, begin, start))] += 1
                literal_prints.append(not computes(code))
            else:
                purposes["unreadable"] += 1
            begin = end

        # A turn is void where something was written after the last output, but no answer.
        last_turn = sampled_text(response, begin, len(response["tokens"]))
        refused = response["finish_reason"] == "max_calls"
        void_turns.append(last_turn != "" and not refused and extract_answer(last_turn) is None)

        if codes:
            distinct = {syntax_tree(code) or code for code in codes}
            repeated.append(len(distinct) < len(codes))
            uncorrected.append(response["tool_statuses"][-1] != "ok")
        if codes and response.get("kind") == "by hand":
            snippet_tokens = sum(end - start for start, end in response["calls"])
            interpreter_tokens = response["loss_mask"].count(0)
            unneeded_tokens.append(snippet_tokens + interpreter_tokens)
            unneeded_seconds.append(sum(response["tool_seconds"]))

    n_snippets = sum(purposes.values())
    shares = {purpose: count / n_snippets for purpose, count in sorted(purposes.items())}
    return {
        "purposes": shares,
        "unneeded_code_seconds": mean(unneeded_seconds),
        "unneeded_code_tokens": mean(unneeded_tokens),
        "void_turns": mean(void_turns),
        "repeated_snippets": mean(repeated),
        "uncorrected_failures": mean(uncorrected),
        "literal_prints": mean(literal_prints),
    }


def signature_cell(key, value):
    if value is None:
        return "-"
    if key.endswith(("seconds", "tokens")):
        return f"{value:.3g}"
    return f"{100 * value:.1f} %"


def evaluation_tables(record, responses):
    """Markdown of what eval.py wrote: signatures, then the rest, a column per checkpoint and set.
    responses: the rows of OUTPUT.responses.jsonl."""
    columns = {}  # heading -> metrics
    for path, results in record["results"].items():
        for name, metrics in results.items():
            heading = f"{path} {name}" if len(record["results"]) > 1 else name
            members = [response for response in responses
                       if response["model"] == path and response["set"] == name]
            columns[heading] = metrics | failure_signatures(members)

    tables = [signatures_table(columns), details_table(columns)]
    if len(record["results"]) > 1:
        tables.append(pairs_table(record["results"]))
    return "\n\n".join(tables)


def signatures_table(columns):
    rows = []
    for key, (name, meaning) in SIGNATURES.items():
        cells = [signature_cell(key, metrics[key]) for metrics in columns.values()]
        rows.append([name, *cells, meaning])
    return markdown(["failure signature", *columns, "what it says"], rows)


def details_table(columns):
    """pass@k, the vote, families and purposes. A family may be missing in some columns."""
    shares = {}  # name of the row -> heading of the column -> share
    for heading, metrics in columns.items():
        details = {f"pass@{k}": share for k, share in metrics["pass_at_k"].items()}
        details["maj@n"] = metrics["maj_at_n"]
        for family, of_family in metrics["families"].items():
            details[f"accuracy of {family}"] = of_family["accuracy"]
        for purpose, share in metrics["purposes"].items():
            details[f"code for {purpose}"] = share
        for name, share in details.items():
            shares.setdefault(name, {})[heading] = share

    rows = []
    for name, of_row in shares.items():
        cells = [percent(of_row.get(heading)) for heading in columns]
        rows.append([name, *cells])
    return markdown(["%", *columns], rows)


def pairs_table(results):
    """What each later checkpoint gained over each earlier one, on every set."""
    rows = []
    for (a, first), (b, second) in itertools.combinations(results.items(), 2):
        for name in first:
            rows.append([f"{a} -> {b}", name, *compare(first[name], second[name])])
    header = ["pair", "set", "difference of avg@n %", "95 % interval", "problems"]
    return markdown(header, rows)


def paired_gain(first, second):
    """(mean, low, high, problems) of second - first in avg@n over the problems that both sampled:
    they met the same noise. The interval is the bootstrap's 2.5 to 97.5 % over problems. None
    without any such problem."""
    gains = []
    for (n1, c1), (n2, c2) in zip(first["per_problem"], second["per_problem"]):
        if n1 and n2:
            gains.append(c2 / n2 - c1 / n1)
    if not gains:
        return None
    low, high = np.percentile(bootstrap(gains), [2.5, 97.5]).tolist()
    return float(np.mean(gains)), low, high, len(gains)


def compare(first, second):
    """The cells of `paired_gain`."""
    paired = paired_gain(first, second)
    if paired is None:
        return ["-", "-", "0"]
    gain, low, high, n_problems = paired
    return [f"{100 * gain:+.1f}", f"{100 * low:+.1f} to {100 * high:+.1f}", str(n_problems)]


def main(paths):
    if not Path(paths[0]).is_file():
        print(runs_tables(paths))
        return
    for path in paths:
        try:
            record = json.loads(Path(path).read_text())
            lines = Path(f"{path}.responses.jsonl").read_text().splitlines()
            print(evaluation_tables(record, [json.loads(line) for line in lines]))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{path}: neither a run's folder nor an OUTPUT of eval.py ({error})") from None


if __name__ == "__main__":
    if sys.argv[1:] == ["--metrics"]:
        print(metrics_table())
        sys.exit()
    if not sys.argv[1:] or sys.argv[1].startswith("-"):
        sys.exit(__doc__)
    try:
        main(sys.argv[1:])
    except UserError as error:
        sys.exit(f"error: {error}")
