"""Sample answers to problems and report accuracy and how the code interpreter was used.

    python eval.py --model out/ppo/.../checkpoint                 # the embedded test splits
    python eval.py --model DIR --problems aime24.jsonl --samples 32 --top_p 0.7     # as the paper: avg@32
    torchrun --nproc_per_node 8 eval.py ...                       # problems spread over eight GPUs
    python eval.py --runs out/ppo/seed1 out/ppo/seed2 ...         # mean and range over finished PPO runs

How each metric is defined (a "response" is one sample; those dropped for a sandbox error are counted and left
out):
  accuracy            mean over responses (avg@n); its standard error is a bootstrap over problems
  response_tokens     mean length; response_tokens_sampled leaves interpreter text out
  code_ratio          share of responses that executed at least one snippet
  code_lines          non-blank, non-comment lines of executed snippets per response;
                      code_lines_per_snippet per snippet
  pass_last_correct   share whose last snippet ran without error, among correct responses with code;
                      pass_last_incorrect likewise among incorrect ones
  timing_first        start of the first snippet / response length, in tokens; timing_mean over all snippets
  self_correction     P(the next snippet runs | the previous one failed)
  corrected_share     correct responses with at least one failed snippet
  truncated           share that ended by a limit instead of EOS (it scores -1)
"""
import argparse
import json
import os
from collections import Counter

import numpy as np
import torch.distributed as dist
from tqdm import tqdm

import data
from data import UserError
from rollout import generate
from sft import (add_format_arguments, check_at_least, check_model, load_model, load_tokenizer, make_sandbox,
                 run_script)


async def sample_all(model, tokenizer, prompts, answers, sandbox, rank, world, desc="", n_samples=1,
                     **settings):
    """`generate` with the prompts dealt out over the ranks; every rank gets all (trajectories, rewards),
    prompt-major.

    The noise is keyed by the prompt's global index, so the number of ranks changes nothing but rounding. Each
    response is judged once, on the rank that sampled it: verdicts of math-verify depend on a clock, and ranks
    must not disagree.
    """
    mine = range(rank, len(prompts), world)
    with tqdm(total=len(mine) * n_samples, desc=desc, disable=rank > 0 or not desc, leave=False,
              mininterval=1.0) as bar:
        trajectories = await generate(model, tokenizer, [prompts[i] for i in mine], sandbox,
                                      n_samples=n_samples, prompt_keys=list(mine), progress=bar.update,
                                      **settings)
    for trajectory in trajectories:
        trajectory.prompt_index = mine[trajectory.prompt_index]
    judged = [(t, data.outcome_reward(t, tokenizer, answers[t.prompt_index])) for t in trajectories]
    gathered = [None] * world
    dist.all_gather_object(gathered, judged)
    judged = sorted((pair for part in gathered for pair in part),
                    key=lambda pair: (pair[0].prompt_index, pair[0].sample_index))
    return [t for t, _ in judged], [reward for _, reward in judged]


def code_lines(code):
    return sum(1 for line in code.splitlines() if line.strip() and not line.strip().startswith("#"))


def mean(values):
    """Mean of a possibly empty list; None (JSON null) if there is nothing to average."""
    return float(np.mean(values)) if len(values) else None


def rollout_metrics(trajectories, rewards):
    """The metrics defined above, as a flat dict. Rewards are +1 / -1, one per trajectory."""
    dropped = sum(t.finish_reason == "sandbox_error" for t in trajectories)
    kept = [(t, r) for t, r in zip(trajectories, rewards, strict=True) if t.finish_reason != "sandbox_error"]
    with_code = [(t, r) for t, r in kept if t.tool_calls]
    calls = [call for t, _ in kept for call in t.tool_calls]
    after_failure = [
        b.status == "ok" for t, _ in kept for a, b in zip(t.tool_calls, t.tool_calls[1:]) if a.status != "ok"
    ]
    last_ok = {True: [], False: []}
    for t, r in with_code:
        last_ok[r > 0].append(t.tool_calls[-1].status == "ok")
    return {
        "reward": mean([r for _, r in kept]),
        "accuracy": mean([r > 0 for _, r in kept]),
        "response_tokens": mean([len(t.response_ids) for t, _ in kept]),
        "response_tokens_sampled": mean([sum(t.loss_mask) for t, _ in kept]),
        "code_ratio": mean([bool(t.tool_calls) for t, _ in kept]),
        "snippets_per_response": mean([len(t.tool_calls) for t, _ in kept]),
        "code_lines": mean([sum(code_lines(c.code) for c in t.tool_calls) for t, _ in kept]),
        "code_lines_per_snippet": mean([code_lines(c.code) for c in calls]),
        "pass_last_correct": mean(last_ok[True]), "pass_last_correct_count": len(last_ok[True]),
        "pass_last_incorrect": mean(last_ok[False]), "pass_last_incorrect_count": len(last_ok[False]),
        "timing_first": mean([t.tool_calls[0].start / len(t.response_ids) for t, _ in with_code]),
        "timing_mean": mean([c.start / len(t.response_ids) for t, _ in with_code for c in t.tool_calls]),
        "self_correction": mean(after_failure), "self_correction_count": len(after_failure),
        "corrected_share": mean([any(c.status != "ok" for c in t.tool_calls) for t, r in kept if r > 0]),
        "truncated": mean([t.finish_reason != "eos" for t, _ in kept]),
        "sandbox_outcomes": dict(sorted(Counter(call.status for call in calls).items())),
        "sandbox_errors_dropped": dropped,
    }


def bootstrap_error(per_problem, draws=2000):
    """Standard error of the mean over problems, by resampling problems with replacement."""
    rng = np.random.default_rng(0)
    per_problem = np.asarray(per_problem, dtype=float)
    samples = rng.integers(0, len(per_problem), size=(draws, len(per_problem)))
    return float(per_problem[samples].mean(1).std())


async def evaluate(model, tokenizer, problems, template, sandbox, rank, world, desc, max_prompt_tokens,
                   **settings):
    """avg@n over problems ({"question", "answer", "family"}): (metrics, trajectories, rewards).

    Over-long prompts are skipped and counted; UserError if none remain. settings go to `generate`.
    """
    prompts = [data.encode_prompt(tokenizer, template, p["question"]) for p in problems]
    fits = [i for i, prompt in enumerate(prompts) if len(prompt) <= max_prompt_tokens]
    if not fits:
        raise UserError(f"{desc}: every prompt is longer than --max_prompt_tokens {max_prompt_tokens}")
    skipped = len(problems) - len(fits)
    problems, prompts = [problems[i] for i in fits], [prompts[i] for i in fits]
    # step -1: noise of its own, the same before and after training
    answers = [p["answer"] for p in problems]
    trajectories, rewards = await sample_all(model, tokenizer, prompts, answers, sandbox, rank, world, desc,
                                             step=-1, **settings)
    metrics = rollout_metrics(trajectories, rewards) | {"problems": len(problems), "skipped_long": skipped}
    per_problem, by_family = {}, {}
    for t, r in zip(trajectories, rewards):
        if t.finish_reason != "sandbox_error":
            per_problem.setdefault(t.prompt_index, []).append(r > 0)
            by_family.setdefault(problems[t.prompt_index]["family"], []).append((r > 0, bool(t.tool_calls)))
    metrics["accuracy_error"] = bootstrap_error([np.mean(v) for v in per_problem.values()])
    metrics["families"] = {
        f: {"accuracy": mean([a for a, _ in v]), "code_ratio": mean([c for _, c in v]), "count": len(v)}
        for f, v in sorted(by_family.items())
    }
    trivial = {family.__name__ for family in data.TRIVIAL}
    metrics["code_ratio_trivial"] = mean([c for f, v in by_family.items() if f in trivial for _, c in v])
    metrics["code_ratio_needed"] = mean([c for f, v in by_family.items() if f not in trivial for _, c in v])
    return metrics, trajectories, rewards


def add_arguments(parser):
    """Limits of a rollout, shared by eval.py and ppo.py."""
    add = parser.add_argument_group("rollouts").add_argument
    add("--tools", choices=("on", "off"), default="on",
        help="off: tags mean nothing, nothing is run (the text-only baseline)")
    add("--max_prompt_tokens", type=int, default=512,
        help="longer prompts are skipped and counted; public recipes: 2048")
    add("--max_response_tokens", type=int, default=320,
        help="response limit, interpreter text included; public recipes: 16384")
    add("--max_calls", type=int, default=4, help="snippets per response; public recipes: 8")
    add("--n_slots", type=int, default=128, help="rows in the KV cache at the same time")
    add("--kv_gib", type=float, default=0.0,
        help="GiB of KV cache per GPU: fewer slots if n_slots would take more; 0: no such limit")
    add("--rejoin_ticks", type=int, default=4,
        help="decode ticks a snippet takes; 0: as soon as it is done, not reproducible")


def rollout_settings(args):
    return {"max_response_tokens": args.max_response_tokens, "max_calls": args.max_calls,
            "n_slots": args.n_slots, "kv_gib": args.kv_gib, "rejoin_ticks": args.rejoin_ticks,
            "max_interpreter_tokens": args.max_interpreter_tokens, "tools": args.tools == "on"}


def check_limits(parser, args):
    """The parser's error (one line, exit status 2) for a limit that cannot be meant."""
    check_at_least(parser, args, max_prompt_tokens=1, max_response_tokens=1, max_calls=0, n_slots=1,
                   rejoin_ticks=0, max_interpreter_tokens=1, sandbox_workers=1)
    if args.sandbox_timeout <= 0:
        parser.error("--sandbox_timeout must be positive")


def check_positions(config, args):
    """UserError where prompt + response could exceed the model's positions."""
    wanted, positions = args.max_prompt_tokens + args.max_response_tokens, config.max_position_embeddings
    if wanted > positions:
        raise UserError(f"--max_prompt_tokens + --max_response_tokens is {wanted}, the model has {positions} "
                        "positions")


def embedded_split(split, n, seed=0):
    return [{"question": p.question, "answer": p.answer, "family": p.family}
            for p in (data.embedded_problem(split, seed, i) for i in range(n))]


def percent(value):
    return "-" if value is None else f"{100 * value:.1f}"


def table(results):
    """Markdown table of {name: metrics}."""
    columns = [("problems", lambda m: str(m["problems"])), ("skipped", lambda m: str(m["skipped_long"])),
               ("accuracy %", lambda m: f"{percent(m['accuracy'])} +- {percent(m['accuracy_error'])}"),
               ("code %", lambda m: percent(m["code_ratio"])),
               ("code % needed / trivial",
                lambda m: f"{percent(m['code_ratio_needed'])} / {percent(m['code_ratio_trivial'])}"),
               ("snippets", lambda m: f"{m['snippets_per_response']:.2f}"),
               ("last runs % right / wrong",
                lambda m: f"{percent(m['pass_last_correct'])} / {percent(m['pass_last_incorrect'])}"),
               ("tokens", lambda m: f"{m['response_tokens']:.0f}"),
               ("truncated %", lambda m: percent(m["truncated"]))]
    lines = ["| | " + " | ".join(name for name, _ in columns) + " |", "|---" * (len(columns) + 1) + "|"]
    return "\n".join(
        lines +
        [f"| {name} | " + " | ".join(show(m) for _, show in columns) + " |" for name, m in results.items()])


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", default="", help="checkpoint folder or hub id")
    add("--runs", nargs="+", default=[],
        help="instead of evaluating: finished run folders of ppo.py to summarise")
    add("--problems", default="test,ood_large,ood_families",
        help="JSONL files or embedded splits, separated by commas")
    add("--limit", type=int, default=256, help="problems per embedded split; files are used whole")
    add("--samples", type=int, default=4, help="samples per problem; paper 32")
    add("--temperature", type=float, default=1.0, help="0 is greedy; paper 1.0")
    add("--top_p", type=float, default=1.0, help="nucleus sampling; paper 0.7")
    add("--seed", type=int, default=0, help="seed of the sampling noise and of the embedded problems")
    add("--output", default="",
        help="JSON file for metrics; responses go beside it as JSONL; empty: only the table")
    add_arguments(parser)
    add_format_arguments(parser)
    args = parser.parse_args()
    if bool(args.model) == bool(args.runs):
        parser.error("give either --model or --runs")
    check_limits(parser, args)
    if args.samples < 1 or args.limit < 1 or args.temperature < 0 or not 0 < args.top_p <= 1:
        parser.error("needs --samples and --limit of at least 1, --temperature >= 0 and 0 < --top_p <= 1")
    return args


def summarise(runs):
    """Markdown table: mean and range over run folders of every evaluation in their metrics.jsonl, and of the
    wall time."""
    values = {}
    for run in runs:
        try:
            rows = [json.loads(line) for line in open(f"{run}/metrics.jsonl")]
        except OSError as error:
            raise UserError(f"--runs: {error}") from None
        if "seconds_total" not in rows[-1]:
            raise UserError(f"--runs {run}: not a finished run")
        for row in rows:
            if "evaluation" in row:
                for name in ("accuracy", "code_ratio", "code_ratio_needed", "code_ratio_trivial",
                             "response_tokens"):
                    values.setdefault(row["evaluation"], {}).setdefault(name, []).append(row[name])
        values.setdefault("whole run", {}).setdefault("minutes", []).append(rows[-1]["seconds_total"] / 60)

    def show(name, found):
        if None in found:
            return "-"
        scale = 100 if name.startswith(("accuracy", "code")) else 1
        return f"{scale * np.mean(found):.1f} [{scale * min(found):.1f}, {scale * max(found):.1f}]"

    columns = {"accuracy": "accuracy %", "code_ratio": "code %", "code_ratio_needed": "code % where needed",
               "code_ratio_trivial": "code % where trivial", "response_tokens": "tokens",
               "minutes": "minutes"}
    lines = [" | ".join([f"| {len(runs)} runs: mean [min, max]", *columns.values()]) + " |",
             "|---" * (len(columns) + 1) + "|"]
    for label, found in values.items():
        cells = [show(name, found[name]) if name in found else "" for name in columns]
        lines.append(" | ".join([f"| {label}", *cells]) + " |")
    return "\n".join(lines)


async def main(rank, world, device):
    args = parse_arguments()
    if args.runs:
        return print(summarise(args.runs))
    template = data.load_template(args.prompt_template)
    sets = {
        name: embedded_split(name, args.limit, args.seed) if name in data.SPLITS else data.load_problems(name)
        for name in args.problems.split(",")
    }
    tokenizer = load_tokenizer(args.model)
    check_positions(check_model(args.model), args)
    model = load_model(args.model, tokenizer, device, dtype=args.dtype)
    results = {}
    responses = open(args.output + ".responses.jsonl" if args.output and rank == 0 else os.devnull, "w")
    async with make_sandbox(args) as sandbox:
        if rank == 0:
            print(sandbox.report)
        for name, problems in sets.items():
            results[name], trajectories, rewards = await evaluate(
                model, tokenizer, problems, template, sandbox, rank, world, name, args.max_prompt_tokens,
                n_samples=args.samples, temperature=args.temperature, top_p=args.top_p, seed=args.seed,
                **rollout_settings(args))
            for t, r in zip(trajectories, rewards):
                responses.write(json.dumps(describe(t, r, tokenizer) | {"set": name}) + "\n")
    responses.close()
    if rank == 0:
        print(table(results))
        if args.output:
            with open(args.output, "w") as file:
                record = {"arguments": vars(args), "sandbox": sandbox.report, "results": results}
                json.dump(record, file, indent=1)


def describe(trajectory, reward, tokenizer):
    """A trajectory as a JSON row for people."""
    return {
        "prompt": tokenizer.decode(trajectory.prompt_ids),
        "response": tokenizer.decode(trajectory.response_ids), "reward": reward,
        "finish_reason": trajectory.finish_reason,
        "tool_statuses": [call.status for call in trajectory.tool_calls],
        "prompt_index": trajectory.prompt_index, "sample_index": trajectory.sample_index
    }


if __name__ == "__main__":
    run_script(main)
