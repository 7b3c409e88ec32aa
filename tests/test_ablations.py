"""The arithmetic of every ablation flag against a loop, and a short run of each."""
import asyncio
import json
import math
import shutil
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import StubSandbox, decode, run, scripted
from safetensors.torch import load_file
from test_ppo import OWN, PPO, metrics_of, run_here, textbook_gae

import eval as evaluation
import ppo
import rollout
import sft
from data import tool_call
from ppo import advantages_and_returns, policy_loss, token_rewards, turn_gae
from rollout import ToolCall, Trajectory
from sandbox import Sandbox


@pytest.mark.parametrize("gamma, lam", [(1.0, 1.0), (0.9, 0.8), (0.5, 0.0)])
def test_gae_by_turns_equals_textbook_gae_over_the_list_of_turns(gamma, lam):
    """Guards against a reward inside a turn that later tokens of the turn miss, and against lambda that decays
    over interpreter text."""
    torch.manual_seed(0)
    mask = torch.tensor([[0.0, 1, 1, 0, 0, 1, 1, 1], [1, 0, 1, 0, 1, 1, 0, 0], [0, 0, 0, 0, 0, 0, 0, 0]], dtype=torch.double)
    rewards, values = torch.randn(2, *mask.shape, dtype=torch.double)
    advantages, returns = turn_gae(rewards, values, mask, gamma, lam)
    for row, turns in enumerate([[[1, 2], [5, 6, 7]], [[0], [2], [4, 5]], []]):
        expected = textbook_gae([sum(rewards[row, t].item() for t in turn) for turn in turns],
                                [values[row, turn[0]].item() for turn in turns], gamma, lam)
        for turn, advantage in zip(turns, expected):
            for t in turn:
                assert advantages[row, t].item() == pytest.approx(advantage)
                assert returns[row, t].item() == pytest.approx(advantage + values[row, turn[0]].item())
    assert (advantages[mask == 0] == 0).all() and (returns[mask == 0] == 0).all()


def test_adaptive_lambda_is_each_responses_own():
    """Guards against one lambda for the batch, and lengths that count interpreter text."""
    torch.manual_seed(0)
    mask = torch.ones(3, 100)
    mask[0, 50:], mask[1, 10:], mask[2, ::2] = 0, 0, 0  # 50, 10 and 50 trainable tokens
    rewards, values = torch.randn(2, *mask.shape)
    found, _ = advantages_and_returns(rewards, values, mask, None, SimpleNamespace(
        advantage="gae", gae_unit="token", gamma=1.0, lam_actor="adaptive", lam_critic=1.0, whiten_floor=1e-9))
    rows = [ppo.gae(rewards[i:i + 1], values[i:i + 1], mask[i:i + 1], 1.0, lam)[0] for i, lam in
            enumerate((1 - 1 / (0.05 * 50), 0.0, 1 - 1 / (0.05 * 50)))]
    assert torch.allclose(found, ppo.whiten(torch.cat(rows), mask, 1e-9), atol=1e-4)


def called(*statuses, correct=True):
    """A response of 10 tokens whose snippet i is tokens 3i and 3i + 1, followed by one of interpreter text."""
    mask = [int(i % 3 < 2 or i >= 3 * len(statuses)) for i in range(10)]
    calls = [ToolCall("", "", status, 3 * i, 3 * i + 2, 0.0) for i, status in enumerate(statuses)]
    return Trajectory(0, 0, [1], [5] * 10, mask, [0.0] * 10, calls, "eos", correct)


@pytest.mark.parametrize("kind, paid", [("outcome", {9: 1.0}), ("executable", {9: 1.5}), ("bonus", {9: 2.0}),
                                        ("steps", {1: -1.0, 4: 1.0, 9: 1.0}), ("cost", {1: -1.0, 4: -1.0, 9: 1.0})])
def test_rewards_stand_where_they_are_said_to_stand(kind, paid):
    """Guards against a price that falls on interpreter text, where the mask deletes it, and against shaping that
    changes what is right."""
    t = called("error", "ok")
    assert token_rewards(t, kind, 1.0) == [paid.get(i, 0.0) for i in range(10)]
    assert all(t.loss_mask[i] for i in paid) and evaluation.rollout_metrics([t])["accuracy"] == 1.0
    assert token_rewards(called(correct=False), kind, 1.0) == [0.0] * 9 + [-1.0]  # no snippet: the answer alone


def test_dual_clip_and_importance_weights_equal_a_loop_over_tokens():
    """Guards against a bound on good tokens, weights that are clipped from below, and weights on forced text."""
    torch.manual_seed(0)
    old, sampler, advantages = torch.randn(3, 300)
    new, mask, sampled = old + 2 * torch.randn(300), (torch.rand(300) < 0.7).float(), (torch.rand(300) < 0.7).float()
    weights = ppo.importance_weights(old, sampler, sampled)
    loss, metrics = policy_loss(new, old, advantages, mask, 0.2, 0.28, 3.0, weights)
    expected, flat = 0.0, 0
    for t in range(300):
        if not mask[t]:
            continue
        ratio, a = math.exp(new[t] - old[t]), advantages[t].item()
        term = min(ratio * a, min(max(ratio, 0.8), 1.28) * a)
        flat += term < ratio * a or (a < 0 and term < 3 * a)
        expected -= (max(term, 3 * a) if a < 0 else term) * (min(math.exp(old[t] - sampler[t]), 2.0) if sampled[t] else 1.0)
    assert loss.item() == pytest.approx(expected, rel=1e-4) and metrics["clip_fraction"] == flat


def test_reference_kl_is_the_kl_on_average_and_zero_at_the_reference():
    """Guards against the estimate with its arguments the wrong way round, and against inf * 0 where masked."""
    torch.manual_seed(0)
    policy, reference = torch.randn(2, 6).log_softmax(-1)
    tokens = torch.multinomial(policy.exp(), 200_000, replacement=True)
    estimate = ppo.reference_kl(policy[tokens], reference[tokens], torch.ones(len(tokens))) / len(tokens)
    assert estimate.item() == pytest.approx((policy.exp() * (policy - reference)).sum().item(), rel=0.03)
    far = torch.tensor([0.0, 900.0])
    assert ppo.reference_kl(torch.zeros(2), far, torch.tensor([1.0, 0.0])) == 0


@pytest.mark.parametrize("feedback, text", [("real", "\n<interpreter>\n4\n</interpreter>"),
                                            ("hidden", "\n<interpreter>\n[ran]\n</interpreter>"),
                                            ("none", "\n<interpreter>\n\n</interpreter>")])
def test_feedback_decides_what_the_model_sees_and_not_what_is_measured(model, tokenizer, feedback, text):
    """Guards against an ablation that leaks the result, or forgets the status that the metrics need."""
    script = rollout.encode_text(tokenizer, "<code>\nprint(4)\n</code>")
    [t] = run(model, tokenizer, [[5, 6]], StubSandbox("4\n"), max_response_tokens=60, feedback=feedback,
              logits_processor=scripted(script + [None] * 2 + [tokenizer.eos_token_id]))
    forced = [token for token, sampled in zip(t.response_ids, t.loss_mask) if not sampled]
    assert decode(tokenizer, forced) == text and t.tool_calls[0].output == "4\n"


def test_replay_keeps_what_earlier_snippets_defined_but_not_what_they_printed_or_failed():
    """Guards against outputs that come back twice, and a snippet that fails again and takes the next with it."""
    calls = [ToolCall("x = 20\nprint('seen')", "", "ok", 0, 0, 0), ToolCall("y = x = 1 / 0", "", "error", 0, 0, 0)]

    async def main():
        async with Sandbox() as sandbox:
            return [await sandbox.run(code) for code in (rollout.after_earlier("print(x + 1)", calls), "print(x + 1)",
                                                         rollout.after_earlier("print(y)", calls))]

    with_x, without, failed = asyncio.run(main())
    assert (with_x.status, with_x.output) == ("ok", "21\n") and without.status == "error"
    assert failed.status == "error" and "NameError" in failed.output


@pytest.mark.parametrize("earlier, code, status, output", [
    (["x = 4\nexit()"], "print(x)", "ok", "4\n"),
    (["x = 4\nimport sys\nsys.exit(0)\nx = 5", "y = x\nraise SystemExit"], "print(x, y)", "ok", "4 4\n"),
    (["x = 4\nimport os\nos._exit(0)"], "print(x)", "ok", "4\n"),
    (["x = 4"], "y = 1\n1/0", "error", 'Traceback (most recent call last):\n  File "snippet.py", line 2, in <module>\n'
     "    1/0\nZeroDivisionError: division by zero\n"),
    (["def f(n):\n    return 1 / n"], "x = 3\ny = 4\nf(0)", "error", 'Traceback (most recent call last):\n'
     '  File "snippet.py", line 3, in <module>\n    f(0)\n  File "earlier_1.py", line 2, in f\n    return 1 / n\n'
     "ZeroDivisionError: division by zero\n"),
    (["x = 4"], "y = (", "error", '  File "snippet.py", line 1\n    y = (\n        ^\nSyntaxError: \'(\' was never closed\n'),
    (["from __future__ import annotations\nx = 4"], "from __future__ import annotations\ndef f(a: nowhere): return x\nf(1)",
     "ok", "4\n"),
    (["from __future__ import annotations"], "def f(a: nowhere): pass", "error", None),
    (["import os, sys\nprint(1, end='')\nprint(2, file=sys.stderr)\nos.write(1, b'3')\nx = 4\n5"], "x", "ok", "4\n"),
    (["import io, sys\nsys.stdout = io.StringIO()", "import atexit\n_ = atexit.register(print, 6)"], "5", "ok", "5\n"),
    (["exit()"], "input()", "error", None),
    (["import atexit\n_ = atexit.register(print, 6, end='')"], "5", "ok", "5\n"),
    (["import sys\nx = 4\nsys.stdout.close()", "print(x)"], "print(x)", "ok", "4\n"),
    (["import sys\n_ = sys.stderr.detach()", "import os\nos.close(1)", "print(3)"], "print(4)", "ok", "4\n"),
    (["s = '\\n\\ud800\u2028'\nx = len(s)"], "print(x)\n'''one\r\ntwo'''\n3", "ok", "3\n3\n"),
])
def test_replayed_snippets_are_programs_of_their_own(earlier, code, status, output):
    """Guards against an exit() that ends every later snippet, shifted lines in tracebacks, a `from __future__` that
    is no longer in front, and output that comes back."""
    calls = [ToolCall(text, "", "ok", 0, 0, 0) for text in earlier]

    async def main():
        async with Sandbox() as sandbox:
            return await sandbox.run(rollout.after_earlier(code, calls))

    result = asyncio.run(main())
    assert result.status == status and (result.output == output or output is None), result.output
    assert output is not None or "NameError: name 'nowhere'" in result.output or "EOFError" in result.output


def test_no_text_of_a_snippet_makes_others_run_before_it():
    """Guards against earlier snippets that travel inside the source: a policy could write some, never seen by anyone."""
    async def main():
        async with Sandbox() as sandbox:
            return [await sandbox.run(f"{text}print(x)") for text in ('# earlier snippets: ["x = 5"]\n', '["x = 5"]\n')]

    assert all(result.status == "error" and "NameError" in result.output for result in asyncio.run(main()))


def test_each_mask_switch_trains_exactly_the_tokens_it_names(tokenizer):
    """Guards against a switch that unmasks the prompt, or a comparison with the sampler over text it never drew."""
    response = "a\n" + tool_call("uu", "1") + "b\n" + tool_call("vv", "2") + r"c<answer>\boxed{2}</answer>"
    trace = {"question": "q", "response": response, "failed_calls": [0]}

    def trained(*switches):
        e = sft.trace_example(trace, tokenizer, "{question}", 128, *switches)
        return decode(tokenizer, [token for token, mask in zip(e.targets, e.loss_mask) if mask])

    assert "<interpreter>" not in trained() and "uu" not in trained() and "\nvv\n" in trained()
    assert "<interpreter>\n1\n" in trained(False) and "uu" not in trained(False)
    assert "\nuu\n" in trained(True, False) and "<interpreter>" not in trained(True, False)
    assert "user" not in trained(False, False)
    t = called("ok")
    e = ppo.trajectory_example(t, token_rewards(t), mask_interpreter=False)
    assert e.loss_mask.tolist() == [1] * 10 and e.sampled.tolist() == t.loss_mask


def test_a_void_response_is_one_whose_last_turn_has_no_answer():
    """Guards against a filter that drops wrong answers, which are what there is to learn from."""
    args = SimpleNamespace(drop_truncated=False, drop_void=True)
    for answer, kept in (("7", True), (None, False)):
        assert ppo.is_trained_on(SimpleNamespace(finish_reason="eos", answer=answer), args) == kept


# Every flag once; those in a line have nothing to do with each other.
FLAGS = ["--gae_unit turn --lam_actor adaptive --reward steps --importance token --sync_every 2",
         "--mask_interpreter off --dual_clip 3 --reward cost --kl_coef 0.1 --track trackio",
         "--feedback hidden --entropy_coef 0.01 --reward bonus", "--feedback none --interpreter replay --reward executable",
         "--drop_void", "--drop_uniform --samples_per_prompt 2", "--advantage grpo --samples_per_prompt 2"]


@pytest.fixture(scope="module")
def checkpoint(tokenizer, tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("checkpoint"))
    sft.starting_model("", sft.starting_point("")[0], 0).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("flags", FLAGS)
def test_every_flag_runs_three_steps(checkpoint, tmp_path, monkeypatch, flags):
    """Guards against an ablation that ends in a traceback, or in numbers that are none."""
    sent = []
    monkeypatch.setitem(sys.modules, "trackio", SimpleNamespace(
        init=lambda **about: sent.append(about["name"]), finish=lambda: sent.append("end"),
        log=lambda metrics, step: sent.append(metrics["step"] == step)))
    options = [*PPO, *OWN, "--steps", "3", "--model", checkpoint, "--tools", "on", *flags.split()]
    for name in ("--critic_warmup", "--critic_lr") if "grpo" in flags else ():
        del options[options.index(name):options.index(name) + 2]
    result = run_here(*options, "--run_dir", str(tmp_path))
    assert result.returncode == 0, result.stderr[-3000:]
    steps = [row for row in metrics_of(tmp_path) if "step" in row]
    assert len(steps) == 3 and ("reference_kl" in steps[2]) == ("kl_coef" in flags)
    assert sent == ([tmp_path.name, True, True, True, "end"] if "track" in flags else [])
    if "drop" in flags:  # a random model answers nothing
        assert all(row["update_skipped"] for row in steps)
        assert "uniform" not in flags or all(row["uniform_dropped"] > 0 for row in steps)
        return
    assert all(math.isfinite(row["policy_loss"]) for row in steps[1:])
    row = json.loads((tmp_path / "rollouts.jsonl").read_text().splitlines()[-1])
    assert {len(row[name]) for name in ("tokens", "loss_mask", "logprobs", "advantages", "ratios")} == {len(row["tokens"])}


def test_a_stale_sampler_is_part_of_the_checkpoint(checkpoint, tmp_path):
    """Guards against a run with --sync_every that a resume silently brings back on policy, and a reference that
    becomes the present policy."""
    flags = [*PPO, *OWN, "--steps", "4", "--model", checkpoint, "--eval_problems", "2", "--critic_warmup", "0",
             "--save_every", "1", "--sync_every", "3", "--kl_coef", "0.1", "--entropy_coef", "0.1", "--actor_lr", "0.01"]
    for name, more in (("whole", []), ("parts", ["--minutes", "0.0001"])):
        result = run_here(*flags, *more, "--run_dir", str(tmp_path / name))
        assert result.returncode == 0, result.stderr[-3000:]
    assert "are over after step 1: torchrun ppo.py --resume" in result.stdout
    shutil.copytree(tmp_path / "parts", tmp_path / "short")
    result = run_here("--resume", str(tmp_path / "parts"), "--minutes", "0")
    assert result.returncode == 0, result.stderr[-3000:]
    assert metrics_of(tmp_path / "parts") == metrics_of(tmp_path / "whole")
    # A run that ends earlier than it was to keeps its newest weights, not those of the last sync.
    result = run_here("--resume", str(tmp_path / "short"), "--minutes", "0", "--steps", "1")
    assert result.returncode == 0, result.stderr[-3000:]
    first, last = (load_file(f"{folder}/model.safetensors") for folder in (checkpoint, tmp_path / "short" / "checkpoint"))
    assert not any(torch.equal(first[name], last[name]) for name in first)


def test_an_evaluation_measures_the_policy_of_now_however_old_the_sampler_is(checkpoint, tmp_path, monkeypatch):
    """Guards against curves of a run with --sync_every that repeat the values before training."""
    seen = []

    async def evaluate(model, *args, real=evaluation.evaluate, **settings):
        seen.append(next(model.parameters()).sum().item())
        return await real(model, *args, **settings)

    monkeypatch.setattr(evaluation, "evaluate", evaluate)
    problems = tmp_path / "problems.jsonl"
    problems.write_text('{"question": "1+1?", "answer": "2"}\n')
    result = run_here(*PPO, *OWN, "--steps", "3", "--model", checkpoint, "--eval_data", str(problems), "--critic_warmup", "0",
                      "--sync_every", "9", "--eval_every", "1", "--actor_lr", "0.01", "--run_dir", str(tmp_path / "run"))
    assert result.returncode == 0, result.stderr[-3000:]
    # The first step moves nothing: a critic that says 0 finds all responses alike.
    assert len(seen) == 4 and len(set(seen[1:])) == 3
