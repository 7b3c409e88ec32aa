"""Is the best policy known as good as it is called? And are the tables made of its runs right?"""
import asyncio
import json

import numpy as np
import pytest

from data import embedded_rows
from eval import Process, encode_problems, evaluate
from rollout import Service
from runs import default, oracle
from sandbox import Sandbox, UserError


def played(tokenizer, busy, n=200, **settings):
    """Metrics of the scripted policy on test problems."""
    async def main():
        async with Sandbox(timeout=0.5) as sandbox:
            problems = encode_problems(embedded_rows("test", n), tokenizer, "{question}", 512, "test")
            return await evaluate(
                None, tokenizer, problems, Service(sandbox, busy), Process(0, 1), "oracle", sample=oracle.sample,
                max_calls=3, n_samples=1, seed=0, **settings)
    return asyncio.run(main())


def test_with_a_tool_that_is_never_busy_the_best_policy_is_always_right(tokenizer):
    """Guards against problems that no policy can solve: three questions are enough for twelve numbers, and of
    the scripts one always works."""
    metrics, trajectories = played(tokenizer, busy=0.0)
    assert metrics["accuracy"] == 1.0 and metrics["code_ratio_trivial"] == 0.0
    assert metrics["right_script"] == metrics["search_solved"] == metrics["copied_script"] == 1.0
    assert max(len(t.tool_calls) for t in trajectories) == 3


def test_only_three_busy_calls_in_a_row_defeat_the_best_policy(tokenizer):
    """Guards against a bound that is too low, or one that no policy reaches: of problems that need a script a
    share of busy^3 is lost."""
    metrics, trajectories = played(tokenizer, busy=0.5, n=400)
    assert metrics["retry_busy"] == 1.0
    lost = [t for t in trajectories if not t.correct]
    scripts = [t for t in trajectories if t.tool_calls and "ask(" not in t.tool_calls[0].code]
    assert all([call.status for call in t.tool_calls] == ["busy"] * 3 for t in lost)
    assert len(lost) / len(scripts) == pytest.approx(0.125, abs=0.05)


def run_folder(path, seed, right, forced):
    """A finished run, each problem with two samples."""
    path.mkdir()
    (path / "arguments.json").write_text(json.dumps({"arguments": {"seed": seed}, "commit": "abcdef0123"}))

    def evaluation(label, counts):
        return {"evaluation": label, "per_problem": [[2, n] for n in counts]}

    rows = [evaluation("test after", right), evaluation("test, call forced before", forced), {"seconds_total": 60.0}]
    (path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_the_interval_of_a_gain_counts_problems_and_seeds(tmp_path):
    """Guards against an interval in which a seed that differs counts for nothing: it must be wider than that over
    problems alone, which is 0 here."""
    same = [run_folder(tmp_path / f"a{i}", i, [2] * 50, [1] * 50) for i in range(3)]
    runs = [default.load(folder) for folder in same]
    assert default.gain(runs, "test after", "test, call forced before") == (50.0, 50.0, 50.0)
    other = default.load(run_folder(tmp_path / "b", 9, [1] * 50, [1] * 50))
    mean, low, high = default.gain([*runs[:2], other], "test after", "test, call forced before")
    assert mean == pytest.approx(100 / 3) and low == 0.0 and high == 50.0
    assert np.isnan(default.rates({"evaluations": {"x": {"per_problem": [[0, 0]]}}}, "x")).all()


def test_an_unfinished_run_is_named(tmp_path):
    """Guards against a table of runs that have not come to their end."""
    folder = run_folder(tmp_path / "a", 1, [1], [1])
    lines = open(f"{folder}/metrics.jsonl").readlines()
    open(f"{folder}/metrics.jsonl", "w").writelines(lines[:-1])
    with pytest.raises(UserError, match="not a finished run"):
        default.load(folder)
