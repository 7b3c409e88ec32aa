"""Are the findings what the committed outputs say?"""
import importlib.util
import itertools
import json
import re
from pathlib import Path

import numpy as np
import pytest

import rollout
import sft
from data import embedded_rows, embedded_tokenizer
from rollout import encode_response
from sandbox import UserError

ROOT = Path(__file__).parents[1]


def script(name):
    """runs/NAME.py as a module."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "runs" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("page", ["results/RESULTS.md", "results/archive/RESULTS.md"])
def test_findings_are_made_of_the_committed_outputs(tmp_path, capsys, page):
    """Guards against numbers typed in by hand, and tables of an earlier set of runs."""
    if "archive" in page:
        script("archive").main(ROOT / "results" / "archive" / "experiments", tmp_path)
    else:
        script("experiments").main([tmp_path])
    assert capsys.readouterr().out == (ROOT / page).read_text()
    figures = list(tmp_path.iterdir())
    kept = (ROOT / page).parent / "figures"
    assert figures and all((kept / f.name).read_text() == f.read_text() for f in figures)


def test_README_says_what_the_runs_say(monkeypatch):
    """Guards against figures of earlier runs on README's first screen."""
    module = script("experiments")
    monkeypatch.setattr(module, "RUNS", module.load_runs())
    percent = module.percent

    def of_scripts(key):
        pairs = [run["scripts"] for run in module.RUNS["ppo"].values()]
        before, after = (100 * module.default.pooled(metrics, key)[0] for metrics in zip(*pairs))
        return f"| {before:.0f} % | {after:.0f} % |"

    rows = [
        f"(two families) {of_scripts('second_script')}",
        f"(one family) {of_scripts('script_by_problem')}",
        f"| calls the tool | {percent('ppo', 'code_ratio', 'test before')} % | {percent('ppo', 'code_ratio')} % |",
        f"three times in ten) | {percent('ppo', 'retry_busy', 'test before')} % | {percent('ppo', 'retry_busy')} % |",
        f" once it asks | {percent('ppo', 'search_solved', 'test before')} % | {percent('ppo', 'search_solved')} % |",
        f"| **{percent('ppo', at='test before')} %** | **{percent('ppo')} %** |",
        f"Without RL, a call forced in every response gives {percent('ppo', at='test, call forced before')} %;",
        f"with the retry forced as well, {percent('ppo', at='test, call + retry forced before')} %",
        f"own samples, gives {percent('rft-10')} % in ten rounds,",
        f"Greedily it has {percent('rft-10', at='test, greedy after')} %, and PPO {percent('ppo', at='test, greedy after')} %",
        f"the best policy known, reaches {percent('ppo', at='test, best known before')} %"]
    text = (ROOT / "README.md").read_text()
    assert [row for row in rows if row not in text] == []


def test_README_shows_a_response_that_a_run_made():
    """Guards against a response, or its mask, that no model has written."""
    text = (ROOT / "README.md").read_text()
    shown = re.search(r"```\n\. user: (.*?)\n((?:[|.] .*\n)+)```\n\nOf its", text)
    assert len(re.findall(r"(?m)^```", text)) % 2 == 0
    lines = shown[2].splitlines()
    response = "\n".join(line[2:] for line in lines)
    rollouts = map(json.loads, open(ROOT / "results" / "default" / "seed-53" / "rollouts.jsonl"))
    [row] = [row for row in rollouts if shown[1] in row["prompt"] and row["step"] == 29]
    assert row["response"] == response + "<|im_end|>"

    ids, mask = encode_response(embedded_tokenizer(), response, 128)
    assert f"Of its {len(ids)} tokens {sum(mask)} are sampled and {mask.count(0)} masked." in text
    forced = [line for line in lines if line.startswith(".")]
    assert forced == [f". {line}" for output in ("[busy]", "415") for line in ("<interpreter>", output, "</interpreter>")]


@pytest.fixture
def experiments(monkeypatch):
    """runs/experiments.py with three runs of its own: two seeds of "ppo", one of "other"."""
    module = script("experiments")

    def run(*right):
        return {"steps": [], "evaluations": {"test after": {"per_problem": [(2, n) for n in right], "accuracy": sum(right) / 2 / len(right)}}}

    monkeypatch.setattr(module, "RUNS", {"ppo": {1: run(0, 1, 2), 2: run(0, 0, 0)}, "other": {1: run(1, 2, 2)}})
    return module


def test_checkpoints_of_several_seeds_are_held_against_one_start(experiments, tmp_path, monkeypatch):
    """Guards against a pattern that takes other files too, or a gain over other problems."""
    folder = tmp_path / "results" / "smollm2"
    folder.mkdir(parents=True)
    monkeypatch.setattr(experiments, "ROOT", tmp_path)
    for name, right in {"start": (0, 2, 4), "rl-0": (2, 2, 4), "rl-1": (4, 4, 4), "rl-0-samples": (0, 0, 0)}.items():
        metrics = {"per_problem": [(4, n) for n in right], "accuracy": sum(right) / 12}
        (folder / f"{name}.json").write_text(json.dumps({"results": {"a checkpoint": {"test": metrics}}}))
    assert experiments.score("rl-[0-9]") == "83.3" and experiments.score("start") == "50.0"
    # Gains of 50, 0, 0 and 100, 50, 0 points
    assert experiments.score_gain("rl-[0-9]", "start").startswith("+33.3 (")
    with pytest.raises(UserError, match="results/smollm2 has no rl-7.json"):
        experiments.score("rl-7")


def test_the_power_of_a_comparison_is_that_of_its_sampling_noise(experiments, tmp_path, capsys):
    """Guards against a bound that counts differences between problems, which are the same on both sides."""
    def power(*counts):
        (tmp_path / "o.json").write_text(json.dumps({"results": {"a": {"test": {"per_problem": counts}}}}))
        experiments.print_power(tmp_path / "o.json")
        return float(capsys.readouterr().out.split()[-2])

    assert power(*[(4, 0)] * 50, *[(4, 4)] * 50) == 0
    # Each problem right half of the time: 2.8 standard errors of a difference of means of 400 coin tosses; the estimate of the
    # variance from two of four right is 1/3 instead of 1/4
    assert power(*[(4, 2)] * 100) == pytest.approx(280 * (2 / 3 / 400) ** 0.5, abs=0.06) == pytest.approx(11.4, abs=0.1)


def test_what_is_solved_by_hand_is_measured_by_size(experiments, tmp_path, capsys, monkeypatch):
    """Guards against responses with a call among those by hand, and a family that is named where only a size of it is solved."""
    rows = []
    for index, problem in enumerate(embedded_rows("test", 48)):
        is_right = problem["family"] == "is_odd" or problem["family"] == "power_sum" and problem["operands"][1] == 10
        row = {"set": "test", "prompt_index": index, "family": problem["family"], "finish_reason": "eos"}
        rows += [row | {"codes": [], "correct": is_right}, row | {"codes": ["1"], "correct": True}]
    output = tmp_path / "o.json"
    output.write_text(json.dumps({"arguments": {"limit": 48, "seed": 0}}))
    Path(f"{output}.responses.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    experiments.print_by_hand(output)
    found = json.loads(capsys.readouterr().out)
    monkeypatch.setattr(experiments, "by_hand_and_size", lambda: found)
    assert experiments.solved_by_hand() == "`is_odd` of every size, `power_sum` with multiples of 10 (1 of 1)"
    assert list(experiments.by_hand()["power_sum"]) == [1, 3]


def test_a_gain_is_paired_by_problem_and_seed(experiments):
    """Guards against a difference of means over other problems, or over seeds that only one side has."""
    mean, low, high = experiments.difference("other", "ppo")
    assert mean == pytest.approx(100 / 3) and 0 <= low < mean < high <= 50
    assert experiments.difference("ppo", "ppo") == (0, 0, 0)
    # Over seeds too: both problems and seeds are drawn again.
    gains = np.array([[0, 0, 0], [0, 50, 100]])
    experiments.RUNS["ppo"][2], experiments.RUNS["other"][2] = experiments.RUNS["other"][1], experiments.RUNS["ppo"][2]
    experiments.RUNS["other"][1] = experiments.RUNS["ppo"][1]
    mean, low, high = experiments.difference("ppo", "other")
    assert mean == pytest.approx(gains.mean() * 5 / 3) and low == 0 and high > 60


def test_a_run_of_another_machine_is_held_against_ppo_from_its_own_warm_start(experiments):
    """Guards against a difference between two warm starts of one seed that is read as one between two methods."""
    def run(before, after):
        return {"evaluations": {"test before": {"per_problem": [(1, n) for n in before]},
                                "test after": {"per_problem": [(1, n) for n in after]}}}

    experiments.RUNS |= {"ppo": {1: run([0, 0], [1, 1])}, "again": {1: run([0, 1], [0, 1])},
                         "here": {1: run([0, 0], [1, 1])}, "there": {1: run([0, 1], [1, 1])}}
    assert experiments.difference("here", "ppo")[0] == 0 and experiments.difference("there", "ppo")[0] == 50
    experiments.RUNS["other"] = {1: run([1, 1], [1, 1])}
    with pytest.raises(UserError, match="other-1 does not start as ppo-1"):
        experiments.starts_alike()


def test_what_the_findings_ask_for_must_be_there(experiments):
    """Guards against an empty cell where a run is missing or misspelt."""
    assert experiments.fill('{{ percent("ppo") }} %, {{ each("ppo", digits=0) }}') == "25 %, 50, 0"
    for wrong in ('{{ percent("pop") }}', '{{ gain("ppo", "nobody") }}', "{{ 3 }}"):
        with pytest.raises(UserError, match="findings.md"):
            experiments.fill(wrong)


RESPONSE = {
    "prompt": "<|im_start|>user\nHow many digits does 3^9 have?<|im_end|>\n<|im_start|>assistant\n",
    "response": "<code>\n```python\nprint(1\n```\n</code>\n<interpreter>\nSyntaxError: invalid syntax\n</interpreter>\n<code>\n```python\nprint(5)\n```\n"
                "</code>\n<interpreter>\n[busy]\n</interpreter>\n<answer>\\boxed{5}</answer><|im_end|>",
    "answer": "5", "family": "digit_count", "tool_statuses": ["error", "busy"], "correct": True}


def test_right_responses_become_traces(tmp_path, capsys):
    """Guards against a policy that learns from its wrong responses, or learns failed snippets."""
    wrong = RESPONSE | {"correct": False, "answer": "7"}
    overrun = RESPONSE | {"response": RESPONSE["response"].replace("</code>", "</code>,", 1)}  # to a reader of text no call
    assert overrun["response"] != RESPONSE["response"]
    samples = tmp_path / "samples.jsonl"
    samples.write_text("".join(json.dumps(row) + "\n" for row in (wrong, overrun, RESPONSE)))
    script("rft").main([samples])
    traces = tmp_path / "traces.jsonl"
    traces.write_text(capsys.readouterr().out)
    [trace] = [json.loads(line) for line in open(traces)]
    assert trace["question"] == "How many digits does 3^9 have?" and trace["failed_calls"] == [0]
    traces.write_text(json.dumps(trace) + "\n" + json.dumps(trace | {"question": "And 3^10?"}) + "\n")
    assert [row["response"] for row in sft.load_traces(str(traces))] == [RESPONSE["response"].removesuffix("<|im_end|>")] * 2


def test_hidden_outputs_are_what_the_engine_shows(tmp_path, capsys):
    """Guards against a warm start under another condition than its rollouts: an output that is left in a trace teaches to read it."""
    trace = script("rft").trace(RESPONSE)
    third = "\n<code>\n```python\nprint(5)\n```\n</code>\n<interpreter>\n5\n</interpreter>\n<answer>"
    trace["response"] = trace["response"].replace("\n<answer>", third)
    (tmp_path / "traces.json").write_text(json.dumps([[trace], [trace | {"question": "held out"}]]))
    tokenizer = sft.embedded_tokenizer()
    for feedback, shown in (("hidden", ["[failed]", "[failed]", "[ran]"]), ("none", ["", "", ""])):
        script("hidden").main(feedback, tmp_path / "traces.json")
        [row] = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
        assert row["question"] == trace["question"]

        # Token for token: what the policy wrote stays, and a block is the engine's own.
        ids, mask = rollout.encode_response(tokenizer, row["response"], 128)
        before, before_mask = rollout.encode_response(tokenizer, trace["response"], 128)
        assert [i for i, m in zip(ids, mask) if m] == [i for i, m in zip(before, before_mask) if m]
        blocks = [list(group) for is_sampled, group in itertools.groupby(zip(ids, mask), key=lambda pair: pair[1]) if not is_sampled]
        assert [[i for i, _ in block] for block in blocks] == [rollout.encode_interpreter(tokenizer, text, 128) for text in shown]


def test_an_archived_gain_is_paired_by_problem_and_seed():
    """Guards against a difference of means over other problems, or over seeds that only one side has."""
    archive = script("archive")

    def run(*right):
        return {"evaluations": {"test after": {"per_problem": [(2, n) for n in right]}}}

    base = {1: run(0, 1, 2), 2: run(0, 0, 0)}
    assert archive.paired({1: run(1, 2, 2), 3: run(2, 2, 2)}, base).startswith("+33.3 (")
    assert archive.paired({1: run(0, 1, 2)}, base) == "+0.0 (+0.0 to +0.0)"
    assert archive.paired({3: run(0, 0, 0)}, base) == archive.paired(base, base) == "-"
    assert archive.spread([0.5, None, 1.0]) == "75.0 [50.0, 100.0]"
