"""results/archive/RESULTS.md, the findings on the earlier embedded task, from the outputs that lie beside it: nothing in it is
typed by hand but questions and answers.

    python runs/archive.py results/archive/experiments results/archive/figures > results/archive/RESULTS.md
"""
import itertools
import json
import sys
from pathlib import Path

import numpy as np

sys.path[:0] = map(str, Path(__file__).resolve().parents[:2])
import eval as evaluation  # noqa: E402
from eval import bootstrap, markdown  # noqa: E402
from results import compare  # noqa: E402

TEXTS = Path(__file__).parents[1] / "results" / "archive" / "questions.json"  # questions, expectations, answers
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


def evaluation_table(results):
    """Of metrics that were made before responses with and without a call were told apart."""
    return evaluation.evaluation_table({name: {"accuracy_with_call": None} | m for name, m in results.items()})


def spread(values, scale=100, digits=1):
    """mean [least, most] of the seeds; one value alone."""
    found = [scale * value for value in values if value is not None]
    if not found:
        return "-"
    mean = f"{np.mean(found):.{digits}f}"
    return mean if len(found) == 1 else f"{mean} [{min(found):.{digits}f}, {max(found):.{digits}f}]"


def paired(runs, base, label="test after", base_label=None):
    """Gain in accuracy over `base` (its evaluation base_label, or the same) on the same problems, noise and
    seeds: "mean (low to high)" in points; the interval is the bootstrap's 95 % over problems, each averaged
    over the seeds that both have. A run is not compared with itself."""
    gains = []
    for seed in sorted(runs.keys() & base.keys()):
        if runs[seed] is base[seed] and not base_label:
            continue
        counts = [run[seed]["evaluations"][which]["per_problem"]
                  for run, which in ((runs, label), (base, base_label or label))]
        counts = [zip(c["responses"], c["correct"]) if isinstance(c, dict) else c for c in counts]  # an earlier layout
        gains.append([c2 / n2 - c1 / n1 if n1 and n2 else np.nan for (n2, c2), (n1, c1) in zip(*counts)])
    if not gains:
        return "-"
    means = 100 * np.nanmean(np.array(gains), axis=0)
    low, high = np.percentile(bootstrap(means[~np.isnan(means)]), [2.5, 97.5])
    return f"{np.nanmean(means):+.1f} ({low:+.1f} to {high:+.1f})"


def table(runs, names, bases=("retool",), splits=("test",)):
    """A row per name: what its runs reached, and the gains on the splits over `bases`: of two that have a seed, the
    later one counts."""
    base = {seed: run for name in bases for seed, run in runs.get(name, {}).items()}
    rows, missing = [], [name for name in names if name not in runs]
    for name in (name for name in names if name in runs):
        found = runs[name]
        after = [run["evaluations"]["test after"] for run in found.values()]
        before, large = ([run["evaluations"][label]["accuracy"] for run in found.values()]
                         for label in ("test before", "ood_large after"))
        columns = [[m[key] for m in after] for key in ("code_ratio_needed", "code_ratio_trivial")]
        steps = [[row for row in run["steps"] if "seconds_rollout" in row] for run in found.values()]
        seconds = [np.mean([row["seconds_rollout"] + row["seconds_score"] + row["seconds_update"] for row in s])
                   for s in steps if s]
        reached = [next((row["step"] + 1 for row in run["steps"] if row["accuracy"] >= 0.9), None)
                   for run in found.values()]
        rows.append([
            name, ", ".join(map(str, found)), spread(before), spread([m["accuracy"] for m in after]),
            *(paired(found, base, f"{split} after") for split in splits),
            "never" if None in reached else spread(reached, 1, 0), spread(large), *map(spread, columns),
            spread([m["snippets_per_response"] for m in after], 1, 2),
            spread([m["response_tokens"] for m in after], 1, 0), spread(seconds, 1),
            spread([m.get("unneeded_code_seconds") for m in after], 1000, 0)])
    left_out = f"\n\nNot run: {', '.join(missing)}." if missing else ""
    gains = [f"gain over {', '.join(bases)}{f' on {split}' if split != 'test' else ''}, points (95 %)" for split in splits]
    return markdown(["", "seeds", "before %", "after %", *gains, "steps to 90 %", "ood_large %",
                     "code needed %", "code trivial %", "snippets", "tokens", "s / step", "sandbox ms, trivial"], rows) + left_out


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


def families(folder, runs, names):
    """By family, ordered by the calls of its solutions: accuracy and share of code, before -> after."""
    calls_needed = json.loads((Path(folder) / "calls_needed.json").read_text())  # 0 where no tool was
    rows = []
    for family, calls in sorted(calls_needed.items(), key=lambda item: (item[1], item[0])):
        row = [family, f"{calls:.1f}"]
        for name in names:
            found = [[run["evaluations"][label]["families"].get(family) for run in runs[name].values()]
                     for label in ("test before", "test after")]
            for metric in ("accuracy", "code_ratio"):
                row.append(" -> ".join(f"{100 * np.mean([m[metric] for m in seeds if m]):.0f}" for seeds in found))
        rows.append(row)
    header = [f"{name}, {what} %" for name in names for what in ("accuracy", "code")]
    return markdown(["family", "calls", *header], rows)


def with_error(m):
    """Accuracy in % and its standard error."""
    return f"{100 * m['accuracy']:.1f} +- {100 * m['accuracy_error']:.1f}"


def by_calls(runs, name):
    """By the number of calls that a problem's solution takes (runs/calls.py), before -> after, means over seeds."""
    rows = []
    for calls in (1, 2, 3):
        found = [[m for run in runs[name].values() for label, m in run["evaluations"].items()
                  if label.endswith(f"calls_{calls}.jsonl {when}")] for when in ("before", "after")]
        rows.append([str(calls), *(" -> ".join(spread([m[key] for m in seeds], scale, digits) for seeds in found)
                                   for key, scale, digits in (("accuracy", 100, 1), ("code_ratio", 100, 1),
                                                              ("snippets_per_response", 1, 2), ("code_lines", 1, 1)))])
    return markdown(["calls", "accuracy %", "code %", "snippets per response", "lines of code"], rows)


def purposes(runs, names):
    """Shares of the purposes of snippets on test problems, before -> after, means over seeds."""
    found = {name: [[run["evaluations"][label]["purposes"] for run in runs[name].values()]
                    for label in ("test before", "test after")] for name in names}
    kinds = sorted({kind for columns in found.values() for seeds in columns for m in seeds for kind in m})
    return markdown(["purpose, % of snippets", *names], [
        [kind, *(" -> ".join(f"{100 * np.mean([m.get(kind, 0) for m in seeds]):.1f}" for seeds in columns)
                 for columns in found.values())] for kind in kinds])


def of_one_checkpoint(path):
    """{set of problems: metrics} of eval.py's output."""
    [found] = json.loads(path.read_text())["results"].values()
    return found


def memorisation(folder, names):
    """{run: number of traces}. Losses of its warm start on its own traces and on others (warm_start.txt), and
    what that answers right on the problems of 256 of its traces and on fresh ones."""
    rows = []
    for name, traces in names.items():
        text = (Path(folder) / name / "warm_start.txt").read_text().removeprefix("warm start: ").split()
        found = of_one_checkpoint(Path(folder) / "memorisation" / f"{traces}.json")
        rows.append([f"{traces:,}", *text[1::2], *map(with_error, found.values())])
    return markdown(["traces", "loss on them", "on others", "gap", "accuracy % on their problems", "on fresh ones"], rows)


def pretrained(folder, runs, question):
    """What checkpoints answer right, {name: file of eval.py's output}; then runs, before and after PPO."""
    def row(name, found, *gains):
        return [name, " / ".join(str(m["problems"]) for m in found), *(
            f"{with_error(m)} ({100 * m['code_ratio']:.0f})" for m in found), *gains]

    rows, splits = [], ("test", "ood_large", "ood_families")
    for name, file in question["checkpoints"].items():
        found = of_one_checkpoint(Path(folder) / file)
        rows.append(row(name, [found[split] for split in splits], "", ""))
    for name, which in itertools.product(question["runs"], ("before", "after")):
        for seed, run in runs[name].items():
            gains = [paired({seed: run}, {seed: run}, f"{split} after", f"{split} before") for split in splits[::2]]
            rows.append(row(f"{name}, {which}", [run["evaluations"][f"{split} {which}"] for split in splits],
                            *(gains if which == "after" else ["", ""])))
    return markdown(["", "problems", *(f"{split} % (code %)" for split in splits), "gain on test, points (95 %)",
                     "on ood_families"], rows)


def gsm8k(folder, runs, question):
    """Tables of checkpoints and of runs, before and after, as in `pretrained`; and of pairs [(name, name)] of them."""
    found = {name: next(iter(of_one_checkpoint(Path(folder) / file).values()))
             for name, file in question["checkpoints"].items()}
    for name in question["runs"]:
        for label, m in runs[name][0]["evaluations"].items():
            found[f"{name}, {label.split()[-1]}"] = m
    gains = [[f"{first} -> {second}", *compare(found[first], found[second])] for first, second in question["pairs"]]
    return evaluation_table(found) + "\n\n" + markdown(["pair", "difference of avg@n %", "95 % interval", "problems"], gains)


def evaluated(folder, name, who):
    """What eval.py wrote of one checkpoint, a line for each set of problems."""
    found = of_one_checkpoint(Path(folder) / f"{name}.json")
    return "\n".join(f"{who}, {split}: {100 * m['accuracy']:.1f} % right, {100 * m['code_ratio']:.1f} % with code, "
                     f"{100 * m['truncated']:.0f} % cut at the limit ({m['problems']} problems)." for split, m in found.items())


def delays(folder):
    """`python tests/bench_rollout.py --delays --model CHECKPOINT` of the trained default."""
    rows = json.loads((Path(folder) / "delays.json").read_text())
    return markdown(["seconds per call", "rejoin_ticks", "rollout of 256, s", "accuracy %"], [
        [f"{row['delay']}", f"{row['rejoin_ticks']}", f"{row['rollout_seconds']:.2f}", f"{100 * row['accuracy']:.1f}"]
        for row in rows])


AXES = {"steps": ("PPO step", lambda row: 1), "tokens": ("sampled tokens, thousands", lambda row: 256e-3 * row[
    "response_tokens_sampled"]), "minutes": ("minutes of training", lambda row: sum(
        value for key, value in row.items() if key.startswith("seconds_")) / 60)}


def ticks(most):
    """Round numbers from 0 to at most `most`, four to eight of them."""
    step = next(s * 10.0**k for k in range(-3, 9) for s in (1, 2, 5) if most / (s * 10.0**k) < 8)
    return [step * i for i in range(int(most / step + 1e-9) + 1)]


def plot(curves, label, title, top=100, width=520, height=310):
    """An SVG of curves [(name, x, y, least y, most y)], both axes from 0."""
    most = max(x[-1] for _, x, *_ in curves)
    across = lambda x: 50 + (width - 160) * x / most  # noqa: E731
    down = lambda y: height - 40 - (height - 70) * y / top  # noqa: E731
    points = lambda xs, ys: " ".join(f"{across(x):.1f},{down(y):.1f}" for x, y in zip(xs, ys))  # noqa: E731
    parts = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif" '
             f'font-size="12"><rect width="{width}" height="{height}" fill="white"/>']
    for y in ticks(top):
        parts.append(f'<polyline points="{points([0, most], [y, y])}" stroke="#ddd"/><text x="42" '
                     f'y="{down(y) + 4:.0f}" text-anchor="end">{y:.4g}</text>')
    for x in ticks(most):
        parts.append(f'<text x="{across(x):.1f}" y="{down(0) + 16:.1f}" text-anchor="middle">{x:.4g}</text>')
    parts.append(f'<text x="{50 + (width - 160) / 2}" y="{height - 6}" text-anchor="middle">{label}</text>'
                 f'<text x="10" y="14">{title}</text>')
    heights = []  # of the names, which must not cover each other
    for (name, x, mean, low, high), colour in zip(curves, COLOURS):
        parts.append(f'<polygon points="{points(x, high)} {points(x[::-1], low[::-1])}" fill="{colour}" opacity="0.2"/>'
                     f'<polyline points="{points(x, mean)}" fill="none" stroke="{colour}" stroke-width="2"/>')
        y = down(mean[-1])
        while any(abs(y - other) < 13 for other in heights):
            y += 1
        heights.append(y)
        parts.append(f'<text x="{across(x[-1]) + 5:.1f}" y="{y + 4:.1f}" fill="{colour}">{name}</text>')
    return "\n".join(parts) + "\n</svg>\n"


def learning_curves(runs, names, axis, metric="accuracy"):
    """The metric over steps, tokens or minutes; a line for each name's mean, a band for its range."""
    (label, cost), scale, curves = AXES[axis], DYNAMICS[metric], []
    for name in names:
        seeds = [run["steps"] for run in runs.get(name, {}).values()]
        if seeds:
            x = np.mean([np.cumsum([cost(row) for row in rows]) for rows in seeds], axis=0)
            y = scale * np.array([[row[metric] for row in rows] for rows in seeds])
            curves.append((name, x, y.mean(0), y.min(0), y.max(0)))
    top = 100 if scale == 100 else 1.1 * max(high.max() for *_, high in curves)
    unit = ", %" if scale == 100 else ""
    return plot(curves, label, f"{metric.replace('_', ' ')} of the sampled responses{unit}", top)


def price_curve(runs):
    """Accuracy and shares of code on test problems after training, over the price of a call."""
    prices = {0.0: runs["retool"]} | {float(name.split("-")[1]): found for name, found in runs.items()
                                      if name.startswith("cost-")}
    prices = dict(sorted(prices.items()))
    curves = []
    for label, metric in (("code needed", "code_ratio_needed"), ("code trivial", "code_ratio_trivial"),
                          ("accuracy", "accuracy")):
        y = [[100 * run["evaluations"]["test after"][metric] for run in found.values()] for found in prices.values()]
        curves.append((label, np.array(list(prices)), *(np.array([f(v) for v in y]) for f in (np.mean, min, max))))
    return plot(curves, "price of a call (a right answer pays 1, a wrong one -1)", "after 24 steps, %")


def main(folder, figures):
    runs, questions = load(folder), json.loads(TEXTS.read_text())
    commits = sorted({run["commit"][:7] for found in runs.values() for run in found.values()})
    count = sum(map(len, runs.values()))
    three = ", ".join(name for name, found in runs.items() if len(found) > 2)
    print(f"# Findings\n\n{count} runs of the default task at commit {', '.join(commits)}, one thread each, two side by side (retool: two ranks); each "
          f"row's seeds are in it: three for {three}; one, or two, for the rest. Commands: `bash runs/experiments.sh` (the flags stand there); this file: `bash "
          f"runs/results.sh`. \"After\" is the last checkpoint on fresh test problems; gains are paired by problem. "
          f"Expectations were written before the runs (`expectations.md`). Seconds are not comparable from row to "
          f"row, for other processes ran beside them, but in \"The axis of time\"; \"sandbox ms\" are those of a response with code where none is "
          f"needed.\n")
    runs |= load(Path(folder).parent / "smollm2")
    unanswered = [q for q in questions if not q["answer"]]
    questions = [q for q in questions if q["answer"]]
    for q in questions:
        print(f"- [{q['finding']}](#{q['id']})")
    titles = "; ".join(q["title"] for q in unanswered)
    if titles:
        print(f"\nNot run yet, though their flags and commands are there: {titles}.")
    parts = {"table": lambda q: table(runs, q["runs"], **q.get("compare", {})),
             "dynamics": lambda q: dynamics(runs, q["runs"]), "purposes": lambda q: purposes(runs, q["runs"]),
             "families": lambda q: families(folder, runs, q["runs"]), "calls": lambda q: by_calls(runs, "calls"),
             "pretrained": lambda q: pretrained(Path(folder).parent / "smollm2", runs, q), "delays": lambda q: delays(folder),
             "gsm8k": lambda q: gsm8k(Path(folder).parent / "smollm2", runs, q),
             "memorisation": lambda q: memorisation(folder, q["traces"]), "untrained": lambda q: evaluated(folder, "untrained", "Untrained"),
             "transfer": lambda q: evaluated(folder, "transfer", "Trained on numbers (the default, seed 0)")}
    for q in questions:
        print(f"\n<a id=\"{q['id']}\"></a>\n\n## {q['title']}\n\n{q['question']}\n\n*Expected:* {q['expected']}\n")
        print("\n\n".join(parts[part](q) for part in q.get("parts", ["table"])))
        for name in q.get("figures", []):  # an axis, an axis and a metric, or "price"
            axis, _, metric = name.partition(" ")
            path = Path(figures) / f"{q['id']}_{name.replace(' ', '_')}.svg"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(price_curve(runs) if axis == "price" else
                            learning_curves(runs, q["runs"], axis, metric or "accuracy"))
            print(f"\n![{q['title']}, {metric or 'accuracy'} over {axis}](figures/{path.name})")
        print(f"\n*Answer:* {q['finding']} {q['answer']}")
        if q["id"] == "dynamics":
            print("\n" + corrections(folder))


if __name__ == "__main__":
    main(*sys.argv[1:])
