"""What does the embedded default reach? results/default/README.md and the figure of README, from runs of several seeds.

    python runs/default.py results/default/seed-* --figure results/default/finds.svg > results/default/README.md
"""
import argparse
import functools
import json
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from eval import markdown  # noqa: E402
from sandbox import UserError  # noqa: E402

ROWS = {  # label of an evaluation -> what it is
    "test, untrained before": "untrained",
    "test before": "warm start, sampled",
    "test, greedy before": "warm start, greedy",
    "test, call forced before": "warm start, call forced",
    "test, call + retry forced before": "warm start, call and retry forced",
    "test, best known before": "best policy known (a script)",
    "test after": "after PPO, sampled",
    "test, greedy after": "after PPO, greedy",
    "ood_large before": "larger numbers, warm start",
    "ood_large after": "larger numbers, after PPO",
    "ood_families before": "a family never trained on, warm start",
    "ood_families after": "a family never trained on, after PPO",
}
COLUMNS = {  # key of the metrics -> heading
    "accuracy": "accuracy",
    "code_ratio": "calls",
    "accuracy_with_call": "right given a call",
    "retry_busy": "asks a busy tool again",
    "accuracy_after_retry": "right after that",
    "right_script": "the script that works",
    "search_solved": "search solved",
    "middle_probe": "asks in the middle",
    "copied_script": "script copied right",
}
# What the figure shows, and in which colour (Okabe and Ito: told apart by the colour-blind)
CURVES = {
    "code_ratio": ("calls the tool", "#0072B2"),
    "retry_busy": ("asks a busy tool again", "#D55E00"),
    "right_script": ("writes the script that works", "#009E73"),
    "search_solved": ("solves the search", "#CC79A7"),
}


def load(folder):
    """{"seed", "commit", "steps", "evaluations", "minutes"} of a finished run."""
    try:
        record = json.loads((Path(folder) / "arguments.json").read_text())
        rows = [json.loads(line) for line in open(Path(folder) / "metrics.jsonl")]
    except (OSError, ValueError) as error:
        raise UserError(f"{folder}: {error}") from None
    if "seconds_total" not in rows[-1]:
        raise UserError(f"{folder}: not a finished run")
    return {
        "seed": record["arguments"]["seed"],
        "advantage": record["arguments"].get("advantage", "gae"),
        "commit": record["commit"],
        "steps": [row for row in rows if "step" in row],
        "evaluations": {row["evaluation"]: row for row in rows if "evaluation" in row},
        "scripts": read_scripts(Path(folder) / "scripts.json"),
        "minutes": rows[-1]["seconds_total"] / 60,
    }


def read_scripts(path):
    """[metrics of the test problems before, after], of eval.py on the warm start and on the last checkpoint; or []."""
    if not path.exists():
        return []
    return [sets["test"] for sets in json.loads(path.read_text())["results"].values()]


def spread(values, scale=100):
    """mean [least, most]; one value alone."""
    known = [scale * value for value in values if value is not None]
    if not known:
        return "-"
    if len(known) == 1:
        return f"{known[0]:.1f}"
    return f"{np.mean(known):.1f} [{min(known):.1f}, {max(known):.1f}]"


def evaluations_table(runs):
    rows = []
    for label, name in ROWS.items():
        metrics = [run["evaluations"][label] for run in runs]
        cells = [spread([m[column] for m in metrics]) for column in COLUMNS]
        rows.append([name, *cells])
    return markdown(["%, mean of seeds [least, most]", *COLUMNS.values()], rows)


def families_table(runs):
    """Of each family of the test problems what the seeds' responses say, before -> after."""
    cells = {}
    for label in ("test before", "test after"):
        by_family = {}
        for run in runs:
            for family, metrics in run["evaluations"][label]["families"].items():
                by_family.setdefault(family, []).append(metrics)
        for family, members in by_family.items():
            for key in ("accuracy", "code_ratio", "accuracy_with_call", "accuracy_without_call"):
                values = [m[key] for m in members if m[key] is not None]
                text = f"{100 * np.mean(values):.0f}" if values else "-"
                cells.setdefault(family, {}).setdefault(key, []).append(text)
    rows = []
    for family, columns in sorted(cells.items()):
        rows.append([family, *[" -> ".join(texts) for texts in columns.values()]])
    return markdown(["family", "accuracy %", "calls %", "right given a call %", "right by hand %"], rows)


def utility(metrics, price):
    """Mean reward of a response: +1 or -1 for the answer, minus the price of its calls."""
    return 2 * metrics["accuracy"] - 1 - price * metrics["snippets_per_response"]


def regret_table(runs, prices=(0.0, 0.3)):
    """By kind of need: calls, and how much less reward than the best policy known gets."""
    by_need = {"a tool is needed": [], "by hand is as good": []}  # pairs (after, best) of families
    for run in runs:
        after = run["evaluations"]["test after"]["families"]
        best = run["evaluations"]["test, best known before"]["families"]
        for family, metrics in after.items():
            need = "by hand is as good" if best[family]["code_ratio"] == 0 else "a tool is needed"
            by_need[need].append((metrics, best[family]))

    rows = []
    for need, pairs in by_need.items():
        counts = [metrics["count"] for metrics, _ in pairs]
        cells = [need, str(sum(counts))]
        for which in (0, 1):
            calls = [pair[which]["snippets_per_response"] for pair in pairs]
            cells.append(f"{np.average(calls, weights=counts):.2f}")
        for price in prices:
            regrets = [utility(best, price) - utility(metrics, price) for metrics, best in pairs]
            cells.append(f"{np.average(regrets, weights=counts):.2f}")
        rows.append(cells)
    header = ["problems where", "responses", "calls after PPO", "calls of the best"]
    return markdown(header + [f"regret at a price of {price} per call" for price in prices], rows)


def problem_rates(metrics):
    """Share of right responses to each problem, nan where the sandbox failed."""
    return [right / n if n else np.nan for n, right in metrics["per_problem"]]


def rates(run, label):
    return problem_rates(run["evaluations"][label])


def gain(runs, after, before):
    """(gain in points, low, high) of one evaluation over another on the same problems."""
    return interval([np.subtract(rates(run, after), rates(run, before)) for run in runs])


@functools.cache
def bootstrap_counts(n_seeds, n_problems, draws):
    """How often a draw has each seed (draws, seeds), and each problem (draws, problems)."""
    rng = np.random.default_rng(0)
    of_seeds = rng.multinomial(n_seeds, [1 / n_seeds] * n_seeds, size=draws)
    of_problems = rng.multinomial(n_problems, [1 / n_problems] * n_problems, size=draws)
    return of_seeds, of_problems


def interval(differences, draws=4000):
    """(mean in points, low, high): the 95 % interval of a bootstrap over problems and seeds. differences: for each seed those
    of all problems."""
    differences = 100 * np.array(differences)  # (seeds, problems)
    is_known = ~np.isnan(differences)
    differences = np.nan_to_num(differences)
    n_seeds, n_problems = differences.shape

    of_seeds, of_problems = bootstrap_counts(n_seeds, n_problems, draws)
    sums = ((of_seeds @ differences) * of_problems).sum(axis=1)
    counts = ((of_seeds @ is_known) * of_problems).sum(axis=1)
    low, high = np.percentile(sums / counts, [2.5, 97.5])
    return differences.sum() / is_known.sum(), low, high


def critic_table(runs, others):
    """PPO's runs beside those without a critic, each paired with PPO of the same warm start."""
    seeds = {run["seed"] for run in others}
    by_name = {"ppo": [run for run in runs if run["seed"] in seeds]}
    for run in others:
        by_name.setdefault(run["advantage"], []).append(run)

    rows = []
    for name, members in by_name.items():
        after = [run["evaluations"]["test after"] for run in members]
        rows.append([
            name,
            ", ".join(str(run["seed"]) for run in members),
            *[spread([m[key] for m in after])
              for key in ("accuracy", "retry_busy", "right_script", "search_solved", "middle_probe")],
            spread([np.mean([row["accuracy"] for row in run["steps"][:10]]) for run in members])])
    return markdown(["", "seeds", "test after %", "asks a busy tool again %", "the script that works %", "search solved %",
                     "asks in the middle %", "accuracy in steps 1-10 %"], rows)


def pooled(evaluations, key):
    """A rate over the cases of several evaluations, and their number."""
    cases = [metrics for metrics in evaluations if metrics[key] is not None]
    count = sum(metrics[f"{key}_count"] for metrics in cases)
    return sum(metrics[key] * metrics[f"{key}_count"] for metrics in cases) / max(1, count), count


def targets_table(runs, warm_starts=None):
    """What was wanted, and what came out. warm_starts: eval.py's metrics of the seeds' warm starts, with more samples."""
    def each(label, key="accuracy"):
        return [100 * run["evaluations"][label][key] for run in runs]

    def verdict(is_reached):
        return "reached" if is_reached else "**missed**"

    def numbers(values):
        return ", ".join(f"{value:.1f}" for value in values)

    rows = []

    def add(name, wanted, measured, is_reached):
        rows.append([name, wanted, measured, "" if wanted == "said" else verdict(is_reached)])

    sampled = each("test before")
    greedy = each("test, greedy before")
    forced = each("test, call forced before")
    oracle = each("test, best known before")
    after = each("test after")
    add("warm start, sampled", "25-45 %", numbers(sampled), all(25 <= x <= 45 for x in sampled))
    if warm_starts:
        many = [100 * metrics["accuracy"] for metrics in warm_starts]
        n_samples = max(n for n, _ in warm_starts[0]["per_problem"])
        add(f"warm starts, {n_samples} samples per problem", "within two points of each other", numbers(many), max(many) - min(many) <= 2)
    add("warm start, greedy", "at most 55 %", numbers(greedy), max(greedy) <= 55)
    add("call forced, no RL", "at most 65 %", numbers(forced), max(forced) <= 65)
    add("call and retry forced, no RL", "said", numbers(each("test, call + retry forced before")), True)
    add("best policy known", "at least 97 %", numbers(oracle), min(oracle) >= 97)
    add(f"after {len(runs[0]['steps'])} PPO steps, sampled", "each seed at least 88 %", numbers(after), min(after) >= 88)
    mean, low, high = gain(runs, "test after", "test, call forced before")
    add("PPO minus call forced, paired", "interval above 20 points",
        f"{mean:+.1f} ({low:+.1f} to {high:+.1f})", low > 20)
    mean, low, high = gain(runs, "test after", "test, call + retry forced before")
    add("PPO minus call and retry forced", "said", f"{mean:+.1f} ({low:+.1f} to {high:+.1f})", True)
    before = [run["evaluations"]["test before"] for run in runs]
    last = [run["evaluations"]["test after"] for run in runs]
    scripts = [run["scripts"] for run in runs if run["scripts"]]
    scripts_before = [pair[0] for pair in scripts]
    scripts_after = [pair[1] for pair in scripts]
    for key, name, wanted, first, second in (
            ("retry_busy", "asks a busy tool again", 95, before, last),
            ("second_script", "second script where the first fails (families where only it can fail)", 95,
             scripts_before, scripts_after),
            ("script_by_problem", "the script that works (family where either can fail)", None, scripts_before, scripts_after),
            ("search_solved", "search solved given a call", 85, before, last)):
        rate_before, n_before = pooled(first, key)
        rate, n = pooled(second, key)
        add(name, f"at least {wanted} %" if wanted else "said",
            f"{100 * rate_before:.0f} (of {n_before}) -> {100 * rate:.1f} (of {n})", 100 * rate >= (wanted or 0))
    entropy = [np.mean([row["entropy"] for row in run["steps"][-5:]]) for run in runs]
    add("entropy, last five steps", "at least 0.02", ", ".join(f"{x:.3f}" for x in entropy), min(entropy) >= 0.02)
    minutes = [run["minutes"] for run in runs]
    add("minutes, whole run", "at most 8", numbers(minutes), max(minutes) <= 8)
    return markdown(["", "wanted", f"measured (seeds {', '.join(str(run['seed']) for run in runs)})", ""], rows)


# ---------------------------------------------------------------------------------------------
# The figure

WIDTH, HEIGHT = 640, 330
LEFT, RIGHT, TOP, BOTTOM = 46, 210, 16, 40


def svg(name, content="", **attributes):
    """An element; stroke_width=2 is the attribute stroke-width="2"."""
    written = "".join(f' {key.replace("_", "-")}="{value}"' for key, value in attributes.items())
    return f"<{name}{written}>{content}</{name}>"


def svg_page(width, height, parts):
    """A picture of elements, on white."""
    page = svg("rect", width=width, height=height, fill="white") + "\n" + "\n".join(parts) + "\n"
    return svg("svg", page, xmlns="http://www.w3.org/2000/svg", viewBox=f"0 0 {width} {height}",
               font_family="sans-serif", font_size=12) + "\n"


def figure(runs):
    """SVG: over PPO steps the rates of four behaviours, mean and range of the seeds; circles at
    the left are the warm start's on test problems; dashed is accuracy with the call forced."""
    n_steps = len(runs[0]["steps"])

    def x(step):
        return LEFT + (WIDTH - LEFT - RIGHT) * step / n_steps

    def y(percent):
        return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * percent / 100

    def line(xs, ys, **style):
        points = " ".join(f"{x(a):.1f},{y(b):.1f}" for a, b in zip(xs, ys))
        return svg("polyline", points=points, fill="none", **style)

    def text(left, top, words, **style):
        return svg("text", words, x=f"{left:.1f}", y=f"{top:.1f}", **style)

    parts = []
    for percent in (0, 20, 40, 60, 80, 100):
        parts.append(line([0, n_steps], [percent, percent], stroke="#ddd"))
        parts.append(text(LEFT - 8, y(percent) + 4, f"{percent} %", text_anchor="end"))
    for step in range(0, n_steps + 1, 5):
        parts.append(text(x(step), y(0) + 16, str(step), text_anchor="middle"))
    parts.append(text(x(n_steps / 2), HEIGHT - 6, "PPO step (320 responses each)", text_anchor="middle"))

    forced = 100 * np.mean([run["evaluations"]["test, call forced before"]["accuracy"] for run in runs])
    parts.append(line([0, n_steps], [forced, forced], stroke="#555", stroke_dasharray="6 4"))
    labels = [(forced, "right with the call forced, no RL", "#555")]

    accuracy = ("right", "#000000")
    for key, (name, colour) in {"accuracy": accuracy, **CURVES}.items():
        # Means of neighbouring steps: of some behaviours a step has twenty cases.
        values = np.array([[row[key] if row[key] is not None else np.nan for row in run["steps"]] for run in runs])
        mean = 100 * np.nanmean(values, axis=0)
        smooth = [np.nanmean(mean[max(0, i - 1):i + 2]) for i in range(n_steps)]
        parts.append(line([i + 0.5 for i in range(n_steps)], smooth, stroke=colour, stroke_width=2))
        before = 100 * np.mean([run["evaluations"]["test before"][key] for run in runs])
        parts.append(svg("circle", cx=f"{x(0):.1f}", cy=f"{y(before):.1f}", r=3.5, fill=colour))
        labels.append((smooth[-1], name, colour))

    # Names stand in the order of the ends of their curves, and do not cover each other.
    lowest = TOP
    for height, name, colour in sorted(labels, reverse=True):
        top = max(y(height) + 4, lowest)
        parts.append(text(x(n_steps) + 8, top, name, fill=colour))
        lowest = top + 15
    return svg_page(WIDTH, HEIGHT, parts)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", help="run folders, one per seed")
    parser.add_argument("--others", nargs="*", default=[], help="run folders with another --advantage")
    parser.add_argument("--warm_starts", default="", help="eval.py's output on the test problems")
    parser.add_argument("--figure", default="", help="SVG file")
    args = parser.parse_args()

    runs = [load(folder) for folder in args.runs]
    commits = ", ".join(sorted({run["commit"][:7] for run in runs}))
    seeds = ", ".join(str(run["seed"]) for run in runs)
    n_problems = runs[0]["evaluations"]["test after"]["problems"]
    print(f"# The embedded default\n\n"
          f"`bash runs/default.sh`: seeds {seeds} of warm start and PPO, commit {commits}. "
          f"This page: `python runs/default.py results/default/seed-*`.\n"
          f"{n_problems} test problems, fresh, the same for every seed; of the last checkpoint.\n")
    warm_starts = []
    if args.warm_starts:
        results = json.loads(Path(args.warm_starts).read_text())["results"]
        warm_starts = [sets["test"] for sets in results.values()]
    print(f"## What was wanted\n\n{targets_table(runs, warm_starts)}\n")
    print(f"## Evaluations\n\n{evaluations_table(runs)}\n")
    print(f"## When\n\nPPO was not charged for calls. Regret is what a response of the best policy known earns more: +1 or -1 for "
          f"the answer, minus a price for each call.\n\n{regret_table(runs)}\n")
    print(f"## By family\n\nMeans of the seeds, warm start -> after PPO.\n\n{families_table(runs)}")
    if args.others:
        others = [load(folder) for folder in args.others]
        print(f"\n## Without a critic\n\nThe same warm starts and as many responses per step, four to each of 80 prompts.\n\n"
              f"{critic_table(runs, others)}")
    if args.figure:
        Path(args.figure).write_text(figure(runs))


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"error: {error}")
