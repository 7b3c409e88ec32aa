"""results/RESULTS.md from the outputs of runs/experiments.sh: nothing in it is typed by hand but questions and answers.

    python runs/experiments.py results/experiments results/figures > results/RESULTS.md
"""
import json
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from eval import bootstrap, markdown  # noqa: E402

TEXTS = Path(__file__).parent / "experiments.json"  # questions, expectations, answers
COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"]  # Okabe and Ito: colour-blind safe


def load(folder):
    """{name: {seed: run}}; a run: {"steps": rows, "evaluations": {label: metrics}, "commit"}."""
    runs = {}
    for path in sorted(Path(folder).glob("*/metrics.jsonl")):
        name, seed = path.parent.name.rsplit("-", 1)
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        record = json.loads((path.parent / "arguments.json").read_text())
        runs.setdefault(name, {})[int(seed)] = {
            "steps": [row for row in rows if "step" in row], "commit": record["commit"],
            "evaluations": {row["evaluation"]: row for row in rows if "evaluation" in row}}
    return runs


def spread(values, scale=100, digits=1):
    """mean [least, most] of the seeds; one value alone."""
    found = [scale * value for value in values if value is not None]
    if not found:
        return "-"
    mean = f"{np.mean(found):.{digits}f}"
    return mean if len(found) == 1 else f"{mean} [{min(found):.{digits}f}, {max(found):.{digits}f}]"


def paired(runs, base, label="test after"):
    """Gain in accuracy over `base` on the same problems, noise and seeds: "mean (low to high)" in points; the
    interval is the bootstrap's 95 % over problems, each averaged over the seeds that both have."""
    gains = []
    for seed in sorted(runs.keys() & base.keys()):
        counts = [run[seed]["evaluations"][label]["per_problem"] for run in (runs, base)]
        counts = [zip(c["responses"], c["correct"]) if isinstance(c, dict) else c for c in counts]  # an earlier layout
        gains.append([c2 / n2 - c1 / n1 if n1 and n2 else np.nan for (n2, c2), (n1, c1) in zip(*counts)])
    if not gains or runs is base:
        return "-"
    means = 100 * np.nanmean(np.array(gains), axis=0)
    low, high = np.percentile(bootstrap(means[~np.isnan(means)]), [2.5, 97.5])
    return f"{np.nanmean(means):+.1f} ({low:+.1f} to {high:+.1f})"


def table(runs, names, base):
    """A row per name: what its runs reached, and the gain over `base`."""
    rows = []
    for name in names:
        found = runs.get(name, {})
        if not found:
            rows.append([name, "not run"] + [""] * 9)
            continue
        after = [run["evaluations"]["test after"] for run in found.values()]
        before, large = ([run["evaluations"][label]["accuracy"] for run in found.values()]
                         for label in ("test before", "ood_large after"))
        columns = [[m[key] for m in after] for key in ("code_ratio_needed", "code_ratio_trivial")]
        steps = [[row for row in run["steps"] if "seconds_rollout" in row] for run in found.values()]
        seconds = [np.mean([row["seconds_rollout"] + row["seconds_score"] + row["seconds_update"] for row in s])
                   for s in steps if s]
        rows.append([
            name, ", ".join(map(str, found)), spread(before), spread([m["accuracy"] for m in after]),
            paired(found, runs.get(base, {})), spread(large), *map(spread, columns),
            spread([m["snippets_per_response"] for m in after], 1, 2),
            spread([m["response_tokens"] for m in after], 1, 0), spread(seconds, 1)])
    return markdown(["", "seeds", "before %", "after %", f"gain over {base}, points (95 %)", "ood_large %",
                     "code needed %", "code trivial %", "snippets", "tokens", "s / step"], rows)


DYNAMICS = {"accuracy": 100, "response_tokens": 1, "code_ratio": 100, "code_lines": 1, "snippets_per_response": 1,
            "pass_last_correct": 100, "pass_last_incorrect": 100, "timing_first": 1, "self_correction": 100,
            "entropy": 1, "clip_fraction": 100}


def dynamics(runs, names):
    """Means of the first and of the last three steps of each name's runs."""
    columns = {f"{name}, {which}": [row for run in runs[name].values() for row in run["steps"][part]]
               for name in names if name in runs
               for which, part in (("first 3 steps", slice(0, 3)), ("last 3", slice(-3, None)))}
    rows = [[metric + (" %" if scale == 100 else ""), *(
        f"{np.mean(found):.{2 if scale == 1 else 1}f}" if (found := [
            scale * row[metric] for row in rows if row.get(metric) is not None]) else "-"
        for rows in columns.values())] for metric, scale in DYNAMICS.items()]
    return markdown(["", *columns], rows)


def corrections(folder):
    """Responses in which a failed snippet is corrected, as text."""
    rows = [json.loads(line) for line in open(Path(folder) / "retool-21" / "corrections.jsonl")]
    return "\n".join(f"Step {row['step']}, {row['family']}:\n\n~~~\n{row['prompt'].split(chr(10))[1]}\n{row['response']}\n~~~\n"
                     for row in rows)


AXES = {"steps": ("PPO step", lambda row: 1), "tokens": ("sampled tokens, thousands", lambda row: 256e-3 * row[
    "response_tokens_sampled"]), "minutes": ("minutes of training", lambda row: sum(
        value for key, value in row.items() if key.startswith("seconds_")) / 60)}


def figure(runs, names, axis, metric="accuracy", width=520, height=300):
    """An SVG: the metric over steps, tokens or minutes; a line for each name's mean, a band for its range."""
    label, cost = AXES[axis]
    curves = []
    for name in names:
        seeds = [run["steps"] for run in runs.get(name, {}).values()]
        if seeds:
            x = np.mean([np.cumsum([cost(row) for row in rows]) for rows in seeds], axis=0)
            y = 100 * np.array([[row[metric] for row in rows] for rows in seeds])
            curves.append((name, x, y.mean(0), y.min(0), y.max(0)))
    most = max(x[-1] for _, x, *_ in curves)
    at = lambda x, y: f"{50 + (width - 160) * x / most:.1f},{height - 40 - (height - 60) * y / 100:.1f}"  # noqa: E731
    parts = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif" '
             f'font-size="12"><rect width="{width}" height="{height}" fill="white"/>']
    for y in range(0, 101, 20):
        parts.append(f'<path d="M{at(0, y)} L{at(most, y)}" stroke="#ddd"/>'
                     f'<text x="42" y="{height - 36 - (height - 60) * y / 100:.0f}" text-anchor="end">{y}</text>')
    for i in range(5):
        x, y = at(most * i / 4, 0).split(",")
        parts.append(f'<text x="{x}" y="{float(y) + 16}" text-anchor="middle">{most * i / 4:.3g}</text>')
    parts.append(f'<text x="{50 + (width - 160) / 2}" y="{height - 6}" text-anchor="middle">{label}</text>'
                 f'<text x="10" y="14">{metric.replace("_", " ")} of the sampled responses, %</text>')
    for (name, x, mean, low, high), colour in zip(curves, COLOURS):
        band = [at(a, b) for a, b in zip(x, high)] + [at(a, b) for a, b in zip(x[::-1], low[::-1])]
        parts.append(f'<polygon points="{" ".join(band)}" fill="{colour}" opacity="0.2"/><polyline points='
                     f'"{" ".join(at(*p) for p in zip(x, mean))}" fill="none" stroke="{colour}" stroke-width="2"/>')
        x, y = at(x[-1], mean[-1]).split(",")
        parts.append(f'<text x="{float(x) + 5:.1f}" y="{float(y) + 4:.1f}" fill="{colour}">{name}</text>')
    return "\n".join(parts) + "\n</svg>\n"


def main(folder, figures):
    runs, questions = load(folder), json.loads(TEXTS.read_text())
    commits = sorted({run["commit"][:7] for found in runs.values() for run in found.values()})
    count = sum(map(len, runs.values()))
    print(f"# Findings\n\n{count} runs of the default task at commit {', '.join(commits)}, one thread each, two side by side; each "
          f"row's seeds are in it. Commands: `bash runs/experiments.sh` (the flags stand there); this file: `bash "
          f"runs/results.sh`. \"After\" is the last checkpoint on fresh test problems; gains are paired by problem. "
          f"Expectations were written before the runs (`expectations.md`). Seconds are not comparable from row to "
          f"row: other processes ran beside them.\n")
    unanswered = [q for q in questions if not q["answer"]]
    questions = [q for q in questions if q["answer"]]
    for q in questions:
        print(f"- [{q['finding']}](#{q['id']})")
    titles = "; ".join(q["title"] for q in unanswered)
    print(f"\nNot run yet, though their flags and commands are there: {titles}.")
    for q in questions:
        print(f"\n<a id=\"{q['id']}\"></a>\n\n## {q['title']}\n\n{q['question']}\n\n*Expected:* {q['expected']}\n")
        if q["id"] == "dynamics":
            print(dynamics(runs, q["runs"]))
        else:
            print(table(runs, q["runs"], q.get("base", "retool")))
        if q["id"] == "details":
            print("\n" + dynamics(runs, ["retool", "kl-0.1", "entropy-0.01"]))
        for axis in q.get("figures", []):
            path = Path(figures) / f"{q['id']}_{axis}.svg"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(figure(runs, q["runs"], axis))
            print(f"\n![{q['title']}, over {axis}](figures/{path.name})")
        print(f"\n*Answer:* {q['finding']} {q['answer']}")
        if q["id"] == "dynamics":
            print("\n" + corrections(folder))


if __name__ == "__main__":
    main(*sys.argv[1:])
