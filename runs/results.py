"""What did finished runs of ppo.py reach, and what did eval.py find? Tables.

    python runs/results.py RUN [RUN ...]    # mean and range per group of runs with the same arguments
    python runs/results.py OUTPUT           # of eval.py: pass@k, families; purposes of code and failure
                                            # signatures, from OUTPUT.responses.jsonl; checkpoints in pairs
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
from data import TRIVIAL, extract_answer  # noqa: E402
from eval import (NOT_A_SETTING, bootstrap, computes, markdown, mean, percent,  # noqa: E402
                  syntax_tree)
from sandbox import UserError  # noqa: E402


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


# Failure signatures: key of the metrics -> (name, how to read the number)
SIGNATURES = {
    "code_ratio_trivial": ("unneeded_code", "of responses to trivial problems run code that nothing needs"),
    "unneeded_code_seconds": ("... its cost", "seconds of sandbox in each of them"),
    "unneeded_code_tokens": ("... its cost", "tokens of snippets and interpreter in each of them"),
    "repeated_snippets": ("repeated_snippets", "of responses with code run a syntax tree twice: stuck"),
    "uncorrected_failures": ("uncorrected_failures", "of responses with code end on a snippet that failed"),
    "void_turns": ("void_turns", "of responses end in a turn without snippet or answer: decay begins so"),
    "literal_prints": ("literal_prints", "of snippets print what stands in them: code as decoration"),
    "ood_drop": ("ood_drop", "points of accuracy from the first set to this one")}


def code_purpose(code, before):
    """What a snippet is for, guessed from its syntax tree and the words before it, where the paper
    asks an LLM: right for 32 of 50 that were labelled by hand (tests/purposes.jsonl)."""
    nodes = list(ast.walk(ast.parse(code)))
    has_assert = any(isinstance(node, ast.Assert) for node in nodes)
    if has_assert or re.search(r"(?i)\b(check|verif|confirm|double-check|make sure)", before[-200:]):
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
    return "enumeration" if any(isinstance(node, loops) for node in nodes) else "calculation"


def sampled_text(response, begin, end):
    """What the policy itself wrote between two tokens of a response."""
    tokens = zip(response["tokens"][begin:end], response["loss_mask"][begin:end])
    return "".join(token for token, sampled in tokens if sampled)


def failure_signatures(responses):
    """Shares and costs, over rows of OUTPUT.responses.jsonl; and the purposes of code."""
    trivial_families = {family.__name__ for family in TRIVIAL}
    purposes = Counter()
    literal_prints, void_turns, repeated, uncorrected = [], [], [], []
    unneeded_seconds, unneeded_tokens = [], []
    for response in responses:
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
        if codes and response["family"] in trivial_families:
            tokens = response["loss_mask"].count(0) + sum(end - start for start, end in response["calls"])
            unneeded_tokens.append(tokens)
            unneeded_seconds.append(sum(response["tool_seconds"]))

    snippets = sum(purposes.values())
    return {"purposes": {purpose: count / snippets for purpose, count in sorted(purposes.items())},
            "unneeded_code_seconds": mean(unneeded_seconds),
            "unneeded_code_tokens": mean(unneeded_tokens),
            "void_turns": mean(void_turns),
            "repeated_snippets": mean(repeated),
            "uncorrected_failures": mean(uncorrected),
            "literal_prints": mean(literal_prints)}


def number(key, value):
    if value is None:
        return "-"
    return f"{value:.3g}" if key.endswith(("seconds", "tokens")) else f"{100 * value:.1f} %"


def evaluation_tables(record, responses):
    """Markdown of what eval.py wrote: signatures, then the rest, a column per checkpoint and set.
    responses: the rows of OUTPUT.responses.jsonl."""
    columns = {}
    for path, results in record["results"].items():
        for name, metrics in results.items():
            label = f"{path} {name}" if len(record["results"]) > 1 else name
            members = [response for response in responses
                       if response["model"] == path and response["set"] == name]
            columns[label] = metrics | failure_signatures(members)
    signatures = [[name, *(number(key, m[key]) for m in columns.values()), meaning]
                  for key, (name, meaning) in SIGNATURES.items()]
    rows = {}
    for label, m in columns.items():
        cells = {f"pass@{k}": value for k, value in m["pass_at_k"].items()} | {"maj@n": m["maj_at_n"]}
        cells |= {f"accuracy of {family}": found["accuracy"] for family, found in m["families"].items()}
        cells |= {f"code for {purpose}": share for purpose, share in m["purposes"].items()}
        for name, value in cells.items():
            rows.setdefault(name, {})[label] = value
    rest = [[name, *(percent(row.get(label)) for label in columns)] for name, row in rows.items()]
    tables = [markdown(["failure signature", *columns, "what it says"], signatures),
              markdown(["%", *columns], rest)]
    pairs = [[f"{a} -> {b}", name, *compare(first[name], second[name])]
             for (a, first), (b, second) in itertools.combinations(record["results"].items(), 2)
             for name in first]
    if pairs:
        tables.append(markdown(["pair", "set", "difference of avg@n %", "95 % interval", "problems"], pairs))
    return "\n\n".join(tables)


def paired_gain(first, second):
    """(mean, low, high, problems) of second - first in avg@n over the problems that both sampled, as they
    met the same noise; the interval is the bootstrap's 2.5 to 97.5 % over problems. None without any."""
    pairs = zip(first["per_problem"], second["per_problem"])
    gains = [c2 / n2 - c1 / n1 for (n1, c1), (n2, c2) in pairs if n1 and n2]
    if not gains:
        return None
    return float(np.mean(gains)), *np.percentile(bootstrap(gains), [2.5, 97.5]).tolist(), len(gains)


def compare(first, second):
    """The cells of `paired_gain`."""
    found = paired_gain(first, second)
    if not found:
        return ["-", "-", "0"]
    gain, low, high, n = found
    return [f"{100 * gain:+.1f}", f"{100 * low:+.1f} to {100 * high:+.1f}", str(n)]


def main(paths):
    if not Path(paths[0]).is_file():
        return print(runs_tables(paths))
    for path in paths:
        try:
            record = json.loads(Path(path).read_text())
            lines = Path(f"{path}.responses.jsonl").read_text().splitlines()
            print(evaluation_tables(record, [json.loads(line) for line in lines]))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path}: neither a run's folder nor an OUTPUT of eval.py ({error})") from None


if __name__ == "__main__":
    if not sys.argv[1:] or sys.argv[1].startswith("-"):
        sys.exit(__doc__)
    try:
        main(sys.argv[1:])
    except UserError as error:
        sys.exit(f"error: {error}")
