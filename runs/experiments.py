"""results/RESULTS.md: the findings. Text comes from runs/findings.md; every number in it from the committed outputs of runs.

    python runs/experiments.py results/figures > results/RESULTS.md     # and the figures
    python runs/experiments.py --keep RUN results/experiments/NAME-SEED
    python runs/experiments.py --signatures OUTPUT > results/default/seed-SEED/signatures.json
    python runs/experiments.py --by_hand OUTPUT > results/default/by_hand.json
    python runs/experiments.py --power OUTPUT                           # what gain over an evaluation would be seen

In runs/findings.md `{{ expression }}` is a Python expression over the functions of this file:

    percent("ppo", "accuracy", "test after")      mean of the seeds
    gain("grpo")                                  over PPO from the same warm starts, with its 95 % interval
    table("ppo", "grpo")                          a row for each

A run is called by its name, "grpo", and stands for its seeds, grpo-51, grpo-52, ...
"""
import functools
import json
import re
import shutil
import sys
from pathlib import Path

import numpy as np

sys.path[:0] = map(str, Path(__file__).resolve().parents[:2])
import default  # noqa: E402
import words  # noqa: E402
from default import spread, svg, svg_page  # noqa: E402

from data import embedded_rows  # noqa: E402
from eval import markdown  # noqa: E402
from results import failure_signatures  # noqa: E402
from sandbox import UserError  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
TEMPLATE = ROOT / "runs" / "findings.md"

# ---------------------------------------------------------------------------------------------
# Runs

# What is kept of a step: what tables and figures show
STEP_KEYS = [
    "step", "accuracy", "code_ratio", "accuracy_with_call", "retry_busy", "retry_busy_count", "right_script",
    "right_script_count", "search_solved", "search_solved_count", "middle_probe", "copied_script", "self_correction",
    "self_correction_count", "corrected_share", "truncated", "response_tokens", "response_tokens_sampled", "snippets_per_response",
    "code_lines", "pass_last_correct", "pass_last_correct_count", "pass_last_incorrect", "pass_last_incorrect_count",
    "timing_first", "timing_mean", "uniform_dropped", "entropy", "approx_kl", "clip_fraction", "explained_variance", "reward",
    "seconds_rollout", "seconds_score", "seconds_update"]


def keep(run, folder):
    """Copy what is committed of a finished run: its arguments, its evaluations, and these keys of its steps."""
    folder = Path(folder)
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)  # of a copy that was cut short
    partial.mkdir(parents=True)
    shutil.copy(Path(run) / "arguments.json", partial)
    rows = [json.loads(line) for line in open(Path(run) / "metrics.jsonl")]
    with open(partial / "metrics.jsonl", "w") as file:
        for row in rows:
            if "step" in row:
                row = {key: row[key] for key in STEP_KEYS if key in row}
            file.write(json.dumps(row) + "\n")
    partial.rename(folder)


def print_signatures(output):
    """Of what eval.py wrote, a list: for each checkpoint the failure signatures and purposes of its responses to test problems."""
    rows = [json.loads(line) for line in open(f"{output}.responses.jsonl")]
    found = []
    for path in json.loads(Path(output).read_text())["results"]:
        found.append(failure_signatures([row for row in rows if row["model"] == path and row["set"] == "test"]))
    print(json.dumps(found, indent=1))


def power(metrics):
    """The smallest gain in points that is seen with 80 % power, at 95 %, between two policies as this one, of as many samples each.
    Problems that move more than others, and seeds, add to it."""
    counts = np.array(metrics["per_problem"], dtype=float)
    n, right = counts[counts[:, 0] > 1].T
    rate = right / n
    variance = np.mean(rate * (1 - rate) / (n - 1))  # of a problem's mean over its samples, unbiased
    error = np.sqrt(2 * variance / len(n))  # of a difference
    return 100 * (1.96 + 0.84) * error


def print_power(output):
    for sets in json.loads(Path(output).read_text())["results"].values():
        for problems, metrics in sets.items():
            samples, right = np.sum(metrics["per_problem"], axis=0)
            n = len(metrics["per_problem"])
            print(f"{problems}: {n} problems, {samples / n:.0f} samples each, {100 * right / samples:.1f} % right: "
                  f"{power(metrics):.1f} points")


def size_of(family, operands):
    """What may decide whether a problem is solved by hand: how long its largest number is, or which multiples are added."""
    if family == "power_sum":
        return f"multiples of {operands[1]}"
    return f"{len(str(max(operands)))} digits"


def print_by_hand(output):
    """Of what eval.py wrote about test problems: {family: {size: (right ones, responses)}} of all responses without a call."""
    arguments = json.loads(Path(output).read_text())["arguments"]
    problems = embedded_rows("test", arguments["limit"], arguments["seed"])
    found = {}
    for line in open(f"{output}.responses.jsonl"):
        row = json.loads(line)
        if row["codes"] or row["set"] != "test" or row["finish_reason"] == "sandbox_error":
            continue
        sizes = found.setdefault(row["family"], {})
        counts = sizes.setdefault(size_of(row["family"], problems[row["prompt_index"]]["operands"]), [0, 0])
        counts[0] += row["correct"]
        counts[1] += 1
    print(json.dumps(found, indent=1, sort_keys=True))


def load_runs():
    """{name: {seed: run}}, a run as `default.load` returns it."""
    runs = {}
    for folder in sorted([*ROOT.glob("results/default/*-*"), *ROOT.glob("results/experiments/*-*")]):
        if folder.suffix == ".partial":
            continue
        name, seed = folder.name.rsplit("-", 1)
        if name == "seed":
            name = "ppo"
        is_run = (folder / "metrics.jsonl").exists()
        run = default.load(folder) if is_run else load_scores(folder)
        seeds = runs.setdefault(name, {})
        if int(seed) in seeds:
            raise UserError(f"{folder}: {name} with seed {seed} is there twice")
        seeds[int(seed)] = run
    return runs


# Files of eval.py's outputs: name -> label of the evaluation
SCORES = {"sampled": "{}", "greedy": "{}, greedy", "call": "{}, call forced, greedy", "retry": "{}, call + retry forced, greedy"}


def load_scores(folder):
    """A run that is no run of PPO: eval.py's outputs on the warm start and, of rejection sampling, the checkpoint after
    each round."""
    evaluations = {}
    for name, label in SCORES.items():
        path = folder / f"{name}.json"
        if not path.exists():
            continue
        checkpoints = list(json.loads(path.read_text())["results"].values())
        rounds = [(f"round {n}", sets) for n, sets in enumerate(checkpoints)]
        for when, sets in [("before", checkpoints[0]), *rounds, ("after", checkpoints[-1])]:
            for problems, metrics in sets.items():
                evaluations[f"{label.format(problems)} {when}"] = metrics
    return {"evaluations": evaluations, "steps": []}


RUNS = {}  # filled by main


def seeds_of(name):
    if name not in RUNS:
        raise UserError(f"runs/findings.md: there is no run {name}")
    return RUNS[name]


# ---------------------------------------------------------------------------------------------
# What runs/findings.md may ask for. at: the label of an evaluation


def values(name, key, at):
    """The seeds' values of a metric, without those that have none: of no call there is no share that is right."""
    for seed, run in seeds_of(name).items():
        if at not in run["evaluations"]:
            raise UserError(f"runs/findings.md: {name}-{seed} has no evaluation {at}")
    found = [run["evaluations"][at][key] for run in seeds_of(name).values()]
    return [value for value in found if value is not None]


def percent(name, key="accuracy", at="test after", digits=0):
    return f"{100 * np.mean(values(name, key, at)):.{digits}f}"


def of_family(evaluations, family, key):
    return f"{100 * np.mean([metrics['families'][family][key] for metrics in evaluations]):.0f}"


def family_percent(name, family, key="accuracy", at="test after"):
    return of_family([run["evaluations"][at] for run in seeds_of(name).values()], family, key)


def calls_of_callers(name, family, at="test after"):
    """Mean number of calls of a family's responses that call at all."""
    metrics = [run["evaluations"][at]["families"][family] for run in seeds_of(name).values()]
    return f"{np.mean([m['snippets_per_response'] / m['code_ratio'] for m in metrics]):.1f}"


def starts_alike():
    """How many runs have PPO's warm starts, after checking that each is right on the same problems as often before it learns."""
    count = 0
    for name, seeds in RUNS.items():
        if name.startswith(("text", "feedback", "from", "sft-", "again")):
            continue
        for seed, run in seeds.items():
            if "test before" in run["evaluations"]:
                if default.rates(run, "test before") != default.rates(partner(run, "ppo", seed), "test before"):
                    raise UserError(f"runs/findings.md: {name}-{seed} does not start as ppo-{seed}")
                count += 1
    return str(count)


def points_of_family(family, name="ppo", at="test after", base_at="test, call + retry forced before"):
    """How many of the points between two evaluations of a run one family accounts for."""
    points = []
    for run in seeds_of(name).values():
        after, before = (run["evaluations"][label]["families"] for label in (at, base_at))
        n = sum(metrics["count"] for metrics in after.values())
        points.append(100 * after[family]["count"] * (after[family]["accuracy"] - before[family]["accuracy"]) / n)
    return f"{np.mean(points):.1f}"


def number(name, key, at="test after", digits=2):
    return f"{np.mean(values(name, key, at)):.{digits}f}"


def mean(found):
    """Of the seeds, in percent; "-" where none has a value."""
    return f"{100 * np.mean(found):.1f}" if found else "-"


def each(name, key="accuracy", at="test after", digits=1):
    return ", ".join(f"{100 * value:.{digits}f}" for value in values(name, key, at))


def difference(name, base="ppo", at="test after", base_at=""):
    """(gain in points, low, high) over the same problems and seeds of another run."""
    seeds = sorted(seeds_of(name).keys() & seeds_of(base).keys())
    if not seeds:
        raise UserError(f"runs/findings.md: {name} and {base} have no seed in common")
    gains = []
    for seed in seeds:
        ours = default.rates(RUNS[name][seed], at)
        theirs = default.rates(partner(RUNS[name][seed], base, seed), base_at or at)
        gains.append(np.subtract(ours, theirs))
    return default.interval(gains)


def partner(run, base, seed):
    """The run of another name that a run is compared with. Two machines make a seed's warm start with other rounding: if
    this run's start is that of `again`, PPO on the second machine, it is that."""
    again = RUNS.get("again", {}).get(seed)
    before = "test before"
    if base == "ppo" and again and before in run["evaluations"]:
        if default.rates(run, before) == default.rates(again, before):
            return again
    return RUNS[base][seed]


def with_interval(points, low, high):
    return f"{points:+.1f} ({low:+.1f} to {high:+.1f})"


def gain(*names, **of):
    return with_interval(*difference(*names, **of))


def early_rates(name, begin, end, key="accuracy"):
    """Mean of a metric of the samples of some steps, of each seed."""
    runs = [run for run in seeds_of(name).values() if run["steps"]]
    return [np.mean([row[key] for row in run["steps"][begin:end]]) for run in runs]


def early(name, begin=0, end=10, key="accuracy"):
    return f"{100 * np.mean(early_rates(name, begin, end, key)):.0f}"


def step_each(name, step, key="accuracy"):
    """Of each seed a metric of the samples of a step, counted from 1, in percent."""
    return ", ".join(f"{100 * run['steps'][step - 1][key]:.0f}" for run in seeds_of(name).values())


def steps_alike(name, base="ppo"):
    """How many steps two runs of a seed have, after checking that all metrics but durations are equal."""
    [(seed, run)] = seeds_of(name).items()
    for ours, theirs in zip(run["steps"], seeds_of(base)[seed]["steps"], strict=True):
        for key in ours.keys() & theirs.keys():
            if not key.startswith("seconds_") and ours[key] != theirs[key]:
                raise UserError(f"runs/findings.md: {name} and {base} differ in step {ours['step']}: {key}")
    return str(len(run["steps"]))


def interpreter_share(name):
    """Percent of a response's tokens that the interpreter wrote, in the last five steps."""
    shares = []
    for run in seeds_of(name).values():
        for row in run["steps"][-5:]:
            shares.append(1 - row["response_tokens_sampled"] / row["response_tokens"])
    return f"{100 * np.mean(shares):.0f}"


def last_entropy(name):
    """Of the policy, in the last five steps."""
    return f"{np.mean(early_rates(name, -5, None, 'entropy')):.3f}"


COLUMNS = {  # key of the evaluations -> heading
    "code_ratio": "calls",
    "accuracy_with_call": "right given a call",
    "retry_busy": "asks again",
    "right_script": "script that works",
    "search_solved": "search solved",
}


def table(*names, base="ppo"):
    """A row for each name: what its last checkpoint does on the test problems."""
    rows = []
    for name in names:
        cells = [spread(values(name, "accuracy", "test after")), "" if name == base else gain(name, base)]
        cells.append(spread(values(name, "accuracy", "test, greedy after")))
        cells += [mean(values(name, key, "test after")) for key in COLUMNS]
        rows.append([name, str(len(seeds_of(name))), *cells])
    return markdown(["", "seeds", "sampled %", f"minus {base}, points (95 %)", "greedy %", *(f"{name} %" for name in COLUMNS.values())], rows)


def ladder():
    """The rows that every result is held against: sampled and greedy test accuracy, and what it is made of."""
    steps = [
        ("untrained", "ppo", "test, untrained before", ""),
        ("warm start", "ppo", "test before", "test, greedy before"),
        ("call forced, no RL", "ppo", "test, call forced before", "test, call forced, greedy before"),
        ("call and retry forced, no RL", "ppo", "test, call + retry forced before", "test, call + retry forced, greedy before"),
        ("rejection sampling (RFT), 3 rounds", "rft", "test after", "test, greedy after"),
        ("rejection sampling, 10 rounds", "rft-10", "test after", "test, greedy after"),
        ("text, warm start", "text", "test before", "test, greedy before"),
        ("text, RL", "text", "test after", "test, greedy after"),
        ("text, RL with 2.7 times the steps", "text-long", "test after", "test, greedy after"),
        ("**ReTool**", "ppo", "test after", "test, greedy after"),
        ("best policy known (a script)", "ppo", "test, best known before", "")]
    rows = []
    for heading, name, sampled, greedy in steps:
        of_greedy = "forced" if "forced" in greedy else name
        cells = [spread(values(name, "accuracy", sampled)), spread(values(of_greedy, "accuracy", greedy)) if greedy else ""]
        cells += [mean(values(name, key, sampled)) for key in COLUMNS]
        rows.append([heading, str(len(seeds_of(name))), *cells])
    return markdown(["", "seeds", "sampled %", "greedy %", *(f"{name} %" for name in COLUMNS.values())], rows)


def hand_table():
    """By family: right by hand (of all samples without a call), with the call forced, after PPO; and how many samples."""
    rows = []
    for family in sorted(by_hand()):
        right, count = by_hand()[family]
        cells = [family, f"{100 * right / count:.0f} (of {count})"]
        for at in ("test, call forced before", "test after", "test, best known before"):
            cells.append(family_percent("ppo", family, at=at))
        rows.append(cells)
    return markdown(["family", "by hand %", "call forced, no RL %", "after PPO %", "best policy known %"], rows)


@functools.cache
def by_hand_and_size():
    """{family: {size: (right ones, responses)}} of the warm starts' samples without a call."""
    return json.loads((ROOT / "results" / "default" / "by_hand.json").read_text())


def by_hand():
    """The same without the size."""
    return {family: np.sum(list(sizes.values()), axis=0) for family, sizes in by_hand_and_size().items()}


def is_solved_by_hand(right, count):
    return right >= 0.95 * count


def solved_by_hand():
    """Where by hand is right in at least 95 %: families, or of a family some sizes."""
    places = []
    for family, sizes in by_hand_and_size().items():
        solved = {size: counts for size, counts in sizes.items() if is_solved_by_hand(*counts)}
        if len(solved) == len(sizes):
            places.append(f"`{family}` of every size")
        else:
            places += [f"`{family}` with {size} ({right} of {count})" for size, (right, count) in solved.items()]
    return ", ".join(places)


def best_utility(family, price):
    """Of the better of two policies at this price: the scripted one, or the warm start's work by hand. One that asks less than
    the script may be better than both."""
    right, count = by_hand()[family]
    scripted = next(iter(seeds_of("ppo").values()))["evaluations"]["test, best known before"]["families"][family]
    return max(default.utility(scripted, price), 2 * right / count - 1)


def at_price(price):
    """The run in which a call has this price."""
    return f"cost-{price}" if price else "ppo"


def regret(name, price=0.0, seeds=()):
    """How much less a response earns than the best policy known at this price, mean over test problems and seeds."""
    regrets = []
    for seed, run in seeds_of(name).items():
        if seeds and seed not in seeds:
            continue
        families = run["evaluations"]["test after"]["families"]
        gaps = [best_utility(family, price) - default.utility(metrics, price) for family, metrics in families.items()]
        regrets.append(np.average(gaps, weights=[metrics["count"] for metrics in families.values()]))
    return f"{np.mean(regrets):.2f}"


def utility_table(prices):
    """By family: what a response earns after PPO at each price, and what the best policy known earns."""
    rows = []
    for family in sorted(by_hand()):
        cells = [f"`{family}`"]
        for price in prices:
            runs = seeds_of(at_price(price)).values()
            utilities = [default.utility(run["evaluations"]["test after"]["families"][family], price) for run in runs]
            cells.append(f"{np.mean(utilities):z.2f} ({best_utility(family, price):z.2f})")  # z: no negative zero
        rows.append(cells)
    return markdown(["", *(f"price {price}" for price in prices)], rows)


def price_table(prices):
    """After PPO at each price of a call: what is right, in which families the tool is called, and how much less a response earns
    than the best policy known at this price."""
    rows = []
    for price in prices:
        name = at_price(price)
        calls = {"by hand": [], "search": [], "power_sum": [], "others": []}  # share of a family's responses
        for run in seeds_of(name).values():
            families = run["evaluations"]["test after"]["families"]
            for family, metrics in families.items():
                if is_solved_by_hand(*by_hand()[family]):
                    group = "by hand"
                else:
                    group = family if family in calls else "others"
                calls[group] += [metrics["code_ratio"]] * metrics["count"]
        rows.append([
            f"{price}",
            str(len(seeds_of(name))),
            spread(values(name, "accuracy", "test after")),
            *(f"{100 * np.mean(shares):.0f}" for shares in calls.values()),
            regret(name, price)])
    return markdown(["price of a call", "seeds", "right %", "calls where by hand is as good %", "calls in search %",
                     "in power_sum %", "in the other families %", "regret"], rows)


def memory_table(counts):
    """Of warm starts on so many traces: loss and right answers on their own and on held-out ones, and PPO from there."""
    rows = []
    for count in counts:
        cells = [f"{count:,}"]
        [folder] = ROOT.glob(f"results/experiments/traces-{count}-*")
        losses = json.loads((folder / "warm_start.jsonl").read_text().splitlines()[-1])
        cells += [f"{losses['train_loss']:.2f}", f"{losses['held_out_loss']:.2f}"]
        for problems in ("traces", "held_out_traces"):
            cells.append(percent(f"traces-{count}", at=f"{problems} before"))
        run = "ppo" if count == 10000 else f"from-{count}"  # the default has 10,000
        cells += [percent(run), percent(run, at="test, greedy after"), str(len(seeds_of(run)))]
        rows.append(cells)
    return markdown(["traces", "loss on them", "on others", "right on their problems %", "on others %", "after PPO, sampled %", "greedy %",
                     "seeds of PPO"], rows)


def delays():
    """[{"delay", "rejoin_ticks", "rollout_seconds", "accuracy"}] of the run `latency`."""
    [file] = ROOT.glob("results/experiments/latency-*/delays.json")
    return json.loads(file.read_text())


def delay_table():
    """Seconds of a rollout with so many seconds more for each call."""
    rows = {}
    for row in delays():
        rows.setdefault(row["delay"], {})[row["rejoin_ticks"]] = row
    cells = []
    for delay, by_ticks in rows.items():
        cells.append([f"{delay:g}", *(f"{by_ticks[ticks]['rollout_seconds']:.1f}" for ticks in (4, 0))])
    return markdown(["seconds per call", "results come back after four ticks, s", "as soon as there, s"], cells)


def delay_accuracy():
    """What all rollouts of the table have."""
    [accuracy] = {row["accuracy"] for row in delays()}
    return f"{100 * accuracy:.1f}"


EVOLUTION = {  # key -> (name, scale, digits)
    "response_tokens_sampled": ("tokens that the policy wrote", 1, 0),
    "code_ratio": ("responses with code, %", 100, 1),
    "code_lines": ("lines of code per response", 1, 2),
    "lines_per_snippet": ("lines per snippet", 1, 2),
    "snippets_per_response": ("snippets per response", 1, 2),
    "pass_last_correct": ("last snippet ran, of right responses, %", 100, 1),
    "pass_last_incorrect": ("last snippet ran, of wrong responses, %", 100, 1),
    "timing_first": ("where the first snippet begins, share of the response", 1, 3),
    "timing_mean": ("where snippets begin, share of the response", 1, 3),
    "self_correction": ("failed snippets, not busy, that one that ran follows, %", 100, 1)}


def evolution(name, n=3):
    """Of the first and the last n steps of all seeds; a rate of few cases is pooled over them."""
    rows = []
    for key, (heading, scale, digits) in EVOLUTION.items():
        cells = []
        for part in (slice(0, n), slice(-n, None)):
            steps = []
            for run in seeds_of(name).values():
                steps += run["steps"][part]
            if f"{key}_count" in steps[0]:
                rate, count = default.pooled(steps, key)
                cells.append(f"{scale * rate:.{digits}f} (of {count})")
            elif key == "lines_per_snippet":
                lines = [row["code_lines"] / row["snippets_per_response"] for row in steps]
                cells.append(f"{np.mean(lines):.{digits}f}")
            else:
                cells.append(f"{scale * np.mean([row[key] for row in steps]):.{digits}f}")
        rows.append([heading, *cells])
    return markdown(["", f"first {n} steps", f"last {n}"], rows)


def signatures_of(when):
    """Of each seed of the default, before or after PPO."""
    files = sorted(ROOT.glob("results/default/seed-*/signatures.json"))
    return [json.loads(file.read_text())[{"before": 0, "after": 1}[when]] for file in files]


def signatures_table():
    names = {
        "repeated_snippets": "responses with code that run the same syntax tree twice",
        "uncorrected_failures": "responses with code whose last snippet failed or met a busy tool",
        "void_turns": "responses that end without an answer, and not by a refused call"}
    rows = []
    for key, name in names.items():
        cells = [mean([seed[key] for seed in signatures_of(when)]) for when in ("before", "after")]
        rows.append([name, *cells])
    cells = [f"{np.mean([seed['unneeded_code_tokens'] for seed in signatures_of(when)]):.0f}" for when in ("before", "after")]
    rows.append(["unneeded code: tokens per response that has it", *cells])
    for purpose in ("calculation", "enumeration", "verification", "unreadable"):
        cells = [mean([seed["purposes"].get(purpose, 0) for seed in signatures_of(when)]) for when in ("before", "after")]
        rows.append([f"snippets for {purpose}", *cells])
    return markdown(["%", "warm start", "after PPO"], rows)


def ood_table():
    rows = []
    for split in ("test", "ood_large", "ood_families"):
        for when in ("before", "after"):
            keys = ("accuracy", "code_ratio", "accuracy_with_call", "retry_busy", "right_script", "middle_probe", "copied_script")
            cells = [mean(values("ppo", key, f"{split} {when}")) for key in keys]
            rows.append([f"{split}, {when}", *cells])
    header = ["%", "right", "calls", "right given a call", "asks again", "script that works", "asks in the middle", "copied right"]
    return markdown(header, rows)


# Of SmolLM2: eval.py's outputs in results/smollm2, each of one checkpoint and one set; a pattern stands for those of all seeds.


def scores(pattern):
    """[metrics] of the outputs that match."""
    found = []
    for path in sorted((ROOT / "results" / "smollm2").glob(f"{pattern}.json")):
        [sets] = json.loads(path.read_text())["results"].values()
        found += sets.values()
    if not found:
        raise UserError(f"runs/findings.md: results/smollm2 has no {pattern}.json")
    return found


def score(pattern, key="accuracy", digits=1):
    return f"{100 * np.mean([metrics[key] for metrics in scores(pattern)]):.{digits}f}"


def score_power(pattern):
    [metrics] = scores(pattern)
    return f"{power(metrics):.1f}"


def score_pass(pattern, k):
    """Problems solved at least once in k samples."""
    return f"{100 * np.mean([metrics['pass_at_k'][str(k)] for metrics in scores(pattern)]):.1f}"


def score_family(pattern, family):
    return of_family(scores(pattern), family, "accuracy")


def dropped(run):
    """How many responses --drop_uniform left out of a run in results/smollm2."""
    rows = map(json.loads, open(ROOT / "results" / "smollm2" / run / "metrics.jsonl"))
    return str(sum(row["uniform_dropped"] for row in rows if "step" in row))


def score_each(pattern, family=""):
    """Of each seed what is right, in percent; of one family, if it is named."""
    if family:
        return ", ".join(of_family([metrics], family, "accuracy") for metrics in scores(pattern))
    return ", ".join(f"{100 * metrics['accuracy']:.1f}" for metrics in scores(pattern))


@functools.cache
def words_family(index):
    """Of a test problem of runs/words.py."""
    return words.problem("test", 0, index).family


def score_words(pattern, family):
    """Of the problems about words that are of this family, in percent."""
    shares = []
    for metrics in scores(pattern):
        rates = default.problem_rates(metrics)
        shares += [rate for index, rate in enumerate(rates) if words_family(index) == family]
    return f"{100 * np.mean(shares):.0f}"


def score_gain(pattern, base):
    """In points, over one checkpoint or as many, on the same problems."""
    bases = scores(base)
    ours = scores(pattern)
    if len(bases) == 1:
        bases = bases * len(ours)
    gains = [np.subtract(default.problem_rates(a), default.problem_rates(b)) for a, b in zip(ours, bases, strict=True)]
    return with_interval(*default.interval(gains))


def score_table(gains_over="warm_start", greedy=(), bases=(), **patterns):
    """A row for each name = pattern; greedy: {name: pattern}; bases: {name: pattern} of rows that are held against another than
    `gains_over`. A column that says nothing of any is left out."""
    greedy = dict(greedy)
    bases = dict(bases)
    everything = [metrics for pattern in patterns.values() for metrics in scores(pattern)]
    columns = [key for key in COLUMNS if any(metrics[key] is not None for metrics in everything)]
    rows = []
    for name, pattern in patterns.items():
        found = scores(pattern)
        base = bases.get(name, patterns[gains_over])
        cells = [spread([metrics["accuracy"] for metrics in found])]
        cells.append("" if pattern == base or name == "untrained" else score_gain(pattern, base))
        if greedy:
            cells.append(spread([metrics["accuracy"] for metrics in scores(greedy[name])]) if name in greedy else "")
        cells += [mean([metrics[key] for metrics in found if metrics[key] is not None]) for key in columns]
        rows.append([name.replace("_", " "), str(len(found)), *cells])
    header = ["", "checkpoints", "right %", f"minus {gains_over.replace('_', ' ')}, points (95 %)"]
    header += ["greedy %"] if greedy else []
    return markdown([*header, *(f"{COLUMNS[key]} %" for key in columns)], rows)


# ---------------------------------------------------------------------------------------------
# Figures


GREY, BLUE, GREEN = "#999999", "#0072B2", "#009E73"  # Okabe and Ito's, told apart by the colour-blind
# ReTool, table 1: AIME24, Qwen2.5-32B-Instruct, mean of 32 samples
PAPER = [("no training", 26.7, None, GREY), ("cold start alone", 40.9, None, GREY), ("text RL", 40.0, None, BLUE), ("ReTool", 67.0, None, GREEN)]


def bars(title, rows, left, top, width):
    """SVG of a bar chart: rows (name, percent, percent of the black mark or None, colour)."""
    parts = [svg("text", title, x=left, y=top + 12, font_weight="bold")]
    zero = left + 150  # right of the names
    scale = (width - 190) / 100
    for i, (name, value, marked, colour) in enumerate(rows):
        y = top + 24 + 22 * i
        parts.append(svg("text", name, x=zero - 8, y=y + 13, text_anchor="end"))
        parts.append(svg("rect", x=zero, y=y, width=f"{scale * value:.1f}", height=17, fill=colour))
        end = zero + scale * max(value, marked or 0)
        parts.append(svg("text", f"{value:.0f}", x=f"{end + 6:.1f}", y=y + 13))
        if marked is not None:
            x = f"{zero + scale * marked:.1f}"
            parts.append(svg("line", x1=x, x2=x, y1=y - 2, y2=y + 19, stroke="black", stroke_width=2))
    return parts


def table1_figure():
    """Bars: the paper's table 1 and ours, sampled; black marks: greedily. Rejection sampling has ten rounds."""
    def row(heading, name, sampled, greedy, colour, of_greedy=None):
        marked = 100 * np.mean(values(of_greedy or name, "accuracy", greedy)) if greedy else None
        return heading, 100 * np.mean(values(name, "accuracy", sampled)), marked, colour

    after = ("test after", "test, greedy after")
    rows = [
        row("untrained", "ppo", "test, untrained before", "", GREY),
        row("cold start alone", "ppo", "test before", "test, greedy before", GREY),
        row("call and retry forced", "ppo", "test, call + retry forced before", "test, call + retry forced, greedy before", GREY, "forced"),
        row("rejection sampling", "rft-10", *after, BLUE),
        row("text RL", "text", *after, BLUE),
        row("text RL, 2.7x the steps", "text-long", *after, BLUE),
        row("ReTool", "ppo", *after, GREEN)]
    paper = bars("the paper: AIME24, 32B, %", PAPER, 8, 8, 380)
    ours = bars("here: test problems, 0.7 M, %; black: greedily", rows, 398, 8, 380)
    return svg_page(780, 40 + 22 * len(rows), paper + ours)


def learning_figure():
    """SVG: right test problems, sampled, over the responses that were sampled to learn from; mean of the seeds."""
    left, top, width, height, n_responses = 46, 14, 400, 250, 9600

    def x(responses):
        return left + width * responses / n_responses

    def y(percent):
        return top + height * (1 - percent / 100)

    def line(points, **style):
        corners = " ".join(f"{x(a):.1f},{y(b):.1f}" for a, b in points)
        return svg("polyline", points=corners, fill="none", **style)

    def text(a, b, words, **style):
        return svg("text", words, x=f"{a:.1f}", y=f"{b:.1f}", **style)

    def curve(name, labels):
        """[(responses, percent)] of the evaluations with these labels, from the first response to the last."""
        share = n_responses / (len(labels) - 1)
        return [(i * share, 100 * np.mean(values(name, "accuracy", label))) for i, label in enumerate(labels)]

    parts = []
    for percent in range(0, 101, 20):
        parts.append(line([(0, percent), (n_responses, percent)], stroke="#ddd"))
        parts.append(text(left - 6, y(percent) + 4, f"{percent} %", text_anchor="end"))
    for responses in range(0, n_responses + 1, 1920):
        parts.append(text(x(responses), y(0) + 16, f"{responses:,}", text_anchor="middle"))
    parts.append(text(x(n_responses / 2), y(0) + 34, "responses sampled to learn from", text_anchor="middle"))

    steps = [f"test step {step}" for step in range(3, 30, 3)]
    curves = {  # name -> (points, colour, dashes)
        "ReTool": (curve("curve", ["test before", *steps, "test after"]), GREEN, ""),
        "rejection sampling, 10 rounds": (curve("rft-10", [f"test round {n}" for n in range(11)]), "#D55E00", ""),
        "rejection sampling, 3 rounds": (curve("rft", [f"test round {n}" for n in range(4)]), BLUE, ""),
        "text RL": (curve("text", ["test before", "test after"]), "#CC79A7", ""),
        "best policy known": (curve("ppo", ["test, best known before"] * 2), GREY, "2 3"),
        "call and retry forced, no RL": (curve("ppo", ["test, call + retry forced before"] * 2), GREY, "6 4"),
        "call forced, no RL": (curve("ppo", ["test, call forced before"] * 2), GREY, "6 4")}
    lowest = 0
    for name, (points, colour, dashes) in sorted(curves.items(), key=lambda item: -item[1][0][-1][1]):
        parts.append(line(points, stroke=colour, stroke_width=2, stroke_dasharray=dashes or "none"))
        if len(points) > 2:
            parts += [svg("circle", cx=f"{x(a):.1f}", cy=f"{y(b):.1f}", r=3, fill=colour) for a, b in points]
        # Names stand below each other.
        lowest = max(y(points[-1][1]) + 4, lowest + 15)
        parts.append(text(x(n_responses) + 8, lowest, f"{name}: {points[-1][1]:.0f} %", fill=colour))
    return svg_page(680, 310, parts)


# ---------------------------------------------------------------------------------------------


def fill(template):
    """The template with each {{ expression }} replaced by its value, which is a text."""
    def value(match):
        text = eval(match[1], globals())  # of our own file
        if not isinstance(text, str):
            raise UserError(f"runs/findings.md: {match[1]} is no text")
        return text

    return re.sub(r"\{\{ (.*?) \}\}", value, template)


def main(arguments):
    if arguments[:1] == ["--keep"]:
        _, run, folder = arguments
        keep(run, folder)
        return
    if arguments[:1] == ["--signatures"]:
        print_signatures(arguments[1])
        return
    if arguments[:1] == ["--by_hand"]:
        print_by_hand(arguments[1])
        return
    if arguments[:1] == ["--power"]:
        print_power(arguments[1])
        return
    RUNS.update(load_runs())
    print(fill(TEMPLATE.read_text()), end="")
    figures = Path(arguments[0])
    figures.mkdir(exist_ok=True)
    (figures / "table1.svg").write_text(table1_figure())
    (figures / "learning.svg").write_text(learning_figure())


if __name__ == "__main__":
    if not sys.argv[1:]:
        sys.exit(__doc__)
    try:
        main(sys.argv[1:])
    except UserError as error:
        sys.exit(f"error: {error}")
