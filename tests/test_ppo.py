"""The pure functions of PPO against brute force and autograd, and the real scripts on one, two and four
processes."""
import asyncio
import contextlib
import copy
import fcntl
import gc
import importlib.util
import io
import json
import math
import multiprocessing
import os
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import bench_rollout
import pytest
import torch
from conftest import CONFIGS
from safetensors import SafetensorError
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from transformers import AutoModelForCausalLM

import data
import eval as evaluation
import ppo
import rollout
import sft
from ppo import advantages_and_returns, gae, policy_loss, token_rewards, value_loss, whiten
from rollout import Packing, Trajectory
from sandbox import UserError

ROOT = Path(__file__).parent.parent


# ------------------------------------------------------------------------------------------------------------
# GAE


def textbook_gae(rewards, values, gamma, lam):
    """The definition as a double sum: A_t = sum_k (gamma lam)^k delta_{t+k}; lists of one sequence without
    masks."""
    deltas = [
        r + gamma * (values[t + 1] if t + 1 < len(values) else 0.0) - values[t] for t, r in enumerate(rewards)
    ]
    return [sum((gamma * lam)**k * deltas[t + k] for k in range(len(deltas) - t)) for t in range(len(deltas))]


MASKS = {"none masked": [1, 1, 1, 1, 1, 1, 1, 1],
         "head":        [0, 0, 1, 1, 1, 1, 1, 1],
         "tail":        [1, 1, 1, 1, 1, 0, 0, 0],
         "middle":      [1, 1, 0, 0, 0, 1, 1, 1],
         "everywhere":  [0, 1, 0, 1, 1, 0, 1, 0],
         "one":         [0, 0, 0, 1, 0, 0, 0, 0],
         "all masked":  [0, 0, 0, 0, 0, 0, 0, 0]}


@pytest.mark.parametrize("gamma, lam", [(1.0, 1.0), (0.9, 1.0), (1.0, 0.8), (0.95, 0.7), (0.5, 0.0),
                                        (0.0, 0.5)])
def test_gae_equals_deleting_masked_tokens_then_textbook_then_scattering_back(gamma, lam):
    """Guards against tool tokens as steps (decays lambda), bootstrapping from their values, and losing a reward
    before a tail: radixark/miles#1827, verl-project/verl#2337; and against a reward-to-go that starts anew at every
    observation, so that what led to the call gets nothing: verl-project/verl#6376, #7278."""
    torch.manual_seed(0)
    mask = torch.tensor(list(MASKS.values()), dtype=torch.float64)
    rewards, values = torch.randn(2, *mask.shape, dtype=torch.float64)
    values = values.masked_fill(mask == 0, 1e6)  # what stands in masked places must not matter
    advantages, returns = gae(rewards, values, mask, gamma, lam)
    for b in range(len(mask)):
        kept = [t for t in range(mask.shape[1]) if mask[b, t]]
        expected = textbook_gae(rewards[b, kept].tolist(), values[b, kept].tolist(), gamma, lam)
        assert torch.allclose(advantages[b, kept], torch.tensor(expected, dtype=torch.float64), atol=1e-12)
        assert torch.allclose(returns[b, kept], advantages[b, kept] + values[b, kept])
    assert (advantages[mask == 0] == 0).all() and (returns[mask == 0] == 0).all()


def test_gae_survives_nan_in_masked_places():
    """Guards against 0 * nan: a critic may output anything on tokens it was never trained on."""
    mask = torch.tensor([[0.0, 1, 0, 1]])
    values = torch.tensor([[float("nan"), 0.5, float("nan"), -0.5]])
    advantages, returns = gae(torch.tensor([[0.0, 0, 0, 1]]), values, mask, 1.0, 1.0)
    assert advantages.tolist() == [[0.0, 0.5, 0.0, 1.5]] and returns.tolist() == [[0.0, 1.0, 0.0, 1.0]]


@pytest.mark.parametrize("mask, last", [([1, 1, 0, 1], 3), ([1, 1, 0, 0], 1), ([1], 0)])
def test_the_reward_stands_on_the_last_sampled_token(mask, last):
    """Guards against a reward on forced text, where the mask would delete it, and one that is read off
    anything but `correct`."""
    for correct in (True, False):
        t = Trajectory(0, 0, [1], [5] * len(mask), mask, [], [], "eos", correct)
        assert token_rewards(t) == [(2.0 * correct - 1) * (i == last) for i in range(len(mask))]


@pytest.mark.parametrize("kind", ["grpo", "rloo"])
def test_advantages_without_a_critic_equal_a_loop_over_the_groups(kind):
    """Guards against groups that mix prompts, a baseline that contains what it judges (rloo), and a tool token
    that gets an advantage."""
    rewards = torch.tensor([[0.0, 1.0, 0.0], [0.0, -1.0, 0.0], [0.0, 0.0, 1.0], [0.0, 0.0, 1.0], [1.0, 0, 0]])
    mask, groups = torch.tensor([[1.0, 1, 0], [1, 1, 0], [1, 0, 1], [1, 1, 1], [1, 0, 0]]), [0, 0, 1, 0, 1]
    advantages, returns = advantages_and_returns(rewards, None, mask, torch.tensor(groups), SimpleNamespace(advantage=kind))
    totals = [1.0, -1.0, 1.0, 1.0, 1.0]
    for i, group in enumerate(groups):
        members = [totals[j] for j in range(5) if groups[j] == group]
        others = [totals[j] for j in range(5) if groups[j] == group and j != i]
        average = sum(members) / len(members)
        deviation = math.sqrt(sum((x - average)**2 for x in members) / len(members))
        expected = {"grpo": (totals[i] - average) / (deviation + 1e-4), "rloo": totals[i] - sum(others) / len(others)}
        assert torch.allclose(advantages[i], expected[kind] * mask[i], atol=1e-5)
    assert returns is None


def test_whitening_has_unit_deviation_over_trainable_tokens_and_respects_its_floor():
    """Guards against statistics that count masked zeros, and against amplified noise when all responses are
    right."""
    torch.manual_seed(0)
    mask = (torch.rand(5, 20) < 0.6).float()
    advantages = torch.randn(5, 20) * 3 + 2
    white = whiten(advantages, mask, 0.1)
    chosen = white[mask.bool()]
    assert abs(chosen.mean()) < 1e-5 and abs(chosen.std(unbiased=False) - 1) < 1e-5
    assert (white[mask == 0] == 0).all()
    quiet = whiten(advantages * 1e-4, mask, 0.1)
    assert quiet.abs().max() < 0.02


# ------------------------------------------------------------------------------------------------------------
# Losses


def test_policy_loss_equals_a_loop_over_tokens_and_its_gradient_is_cut_only_by_the_clip():
    """Guards against min/max mix-ups: the clip may stop an improvement, never a correction."""
    torch.manual_seed(0)
    old = torch.randn(200)
    new = (old + 0.5 * torch.randn(200)).requires_grad_()
    advantages, mask = torch.randn(200), (torch.rand(200) < 0.7).float()
    loss, metrics = policy_loss(new, old, advantages, mask, 0.2, 0.28)
    loss.backward()
    expected, clipped = 0.0, 0
    for t in range(200):
        ratio, a = math.exp(new[t].item() - old[t].item()), advantages[t].item()
        cut = (ratio > 1.28 and a > 0) or (ratio < 0.8 and a < 0)
        if mask[t]:
            expected -= min(max(ratio, 0.8), 1.28) * a if cut else ratio * a
            clipped += cut
        gradient = 0.0 if cut or not mask[t] else -ratio * a
        assert new.grad[t].item() == pytest.approx(gradient, rel=1e-4, abs=1e-6)
    assert loss.item() == pytest.approx(expected, rel=1e-4)
    assert metrics["clip_fraction"] == clipped > 5
    log_ratio = (new - old).detach()[mask.bool()]
    approx_kl = (log_ratio.exp() - 1 - log_ratio).sum().item()
    assert metrics["approx_kl"].item() == pytest.approx(approx_kl, rel=1e-4)


def test_policy_gradient_at_ratio_one_is_reinforce():
    """At the old policy PPO's gradient is -A per token: the identity that a wrong sign or scale breaks."""
    logprobs = torch.randn(50).requires_grad_()
    advantages, mask = torch.randn(50), (torch.arange(50) % 3 > 0).float()
    policy_loss(logprobs, logprobs.detach(), advantages, mask, 0.2, 0.28)[0].backward()
    assert torch.allclose(logprobs.grad, -advantages * mask, atol=1e-6)


@pytest.mark.parametrize("junk", [500.0, math.inf, math.nan])
def test_losses_and_gradients_ignore_what_stands_in_masked_places(junk):
    """Guards against 0 * nan and 0 * inf: padding and forced text may hold anything. OpenRLHF/OpenRLHF#1240 (loss),
    THUDM/slime#1370 (KL over tool text)."""
    mask, zeros = torch.tensor([1.0, 0.0, 1.0]), torch.zeros(3)
    for loss in (lambda x: policy_loss(x, zeros, mask, mask, 0.2, 0.28)[0],
                 lambda x: policy_loss(zeros, x.detach(), mask, mask, 0.2, 0.28, 3.0)[0] + 0 * x[0],
                 lambda x: ppo.reference_kl(x, zeros, mask), lambda x: value_loss(x, zeros, zeros, mask, 0.5)[0],
                 lambda x: ppo.importance_weights(x, zeros, mask).sum()):
        x = torch.tensor([0.0, junk, -0.1], requires_grad=True)
        loss(x).backward()
        assert torch.isfinite(loss(x)) and torch.isfinite(x.grad[mask.bool()]).all() and x.grad[1] == 0


def test_the_temperature_of_rollouts_leaves_the_critics_values_alone(trainer_and_examples, monkeypatch):
    """Guards against values divided by the sampling temperature: THUDM/slime#1928."""
    trainer, examples = trainer_and_examples
    values, logprobs = examples[-1].values.clone(), examples[-1].logprobs.clone()
    monkeypatch.setattr(trainer.args, "temperature", 0.5)
    trainer.score(examples)
    assert torch.equal(examples[-1].values, values) and not torch.equal(examples[-1].logprobs, logprobs)


def test_value_loss_takes_the_worse_of_plain_and_clipped():
    """Guards against a minimum, which would reward the critic for leaving its trust region."""
    values = torch.tensor([0.0, 1.0, -2.0, 3.0], requires_grad=True)
    old, returns = torch.tensor([0.0, 0.0, 0.0, 9.0]), torch.tensor([1.0, 1.0, 1.0, 9.0])
    mask = torch.tensor([1.0, 1.0, 1.0, 0.0])
    loss, metrics = value_loss(values, old, returns, mask, 0.5)
    # (0-1)^2 ; max((1-1)^2, (0.5-1)^2) ; max((-2-1)^2, (-0.5-1)^2)
    assert loss.item() == pytest.approx(0.5 * (1.0 + 0.25 + 9.0)) and metrics["value_clip_fraction"] == 1
    loss.backward()
    assert values.grad.tolist() == [-1.0, 0.0, -3.0, 0.0]


# ------------------------------------------------------------------------------------------------------------
# The real script

SFT = ["--sft_traces", "60", "--sft_steps", "4", "--sft_batch_size", "16", "--sft_warmup", "2", "--sft_save_every",
       "2", "--token_budget", "512"]
PPO = [
    "--steps", "2", "--critic_warmup", "1", "--prompts_per_step", "12", "--minibatches", "2",
    "--eval_problems", "2", "--eval_samples", "1", "--n_slots", "8", "--max_response_tokens", "40"
]
TINY = SFT + PPO
# What has no default with a model of one's own.
OWN = ["--actor_lr", "1e-4", "--critic_lr", "5e-4", "--max_prompt_tokens", "512", "--sandbox_timeout", "0.5"]


def launch(*flags):
    """`torchrun ppo.py` as the README has it."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "1",
               str(ROOT / "ppo.py"), *flags]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=280)


def one_rank(environment, script, flags, output):
    """Runs in a process of its own, with what torchrun would tell it."""
    os.environ |= environment | {"TZ": f"UTC{environment['RANK']}"}  # clocks that differ
    time.tzset()
    torch.set_num_threads(1)
    os.chdir(Path(output).parent)
    for descriptor in (1, 2):
        os.dup2(os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND), descriptor)
    sys.argv = [script, *flags]
    evaluation.run_script(importlib.import_module(script).main)


def start_ranks(world, output, *flags, script="ppo"):
    """The script on `world` ranks; all tests share one server that has imported everything and forks."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["preloaded"])
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    ranks = []
    for rank in range(world):
        environment = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world),
                       "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
        ranks.append(context.Process(target=one_rank, args=(environment, script, flags, output)))
        with pytest.MonkeyPatch.context() as patch:  # read when the server starts
            patch.setenv("PYTHONPATH", f"{ROOT}:{ROOT / 'tests'}")
            ranks[-1].start()
    return ranks


def run_ranks(world, output, *flags, script="ppo"):
    ranks = start_ranks(world, output, *flags, script=script)
    for rank in ranks:
        rank.join(250)
    assert [rank.exitcode for rank in ranks] == [0] * world, output.read_text()[-3000:]


KNOWN_HASHES = {}


def code_hashes_once(entries, left_out=(), compute=sft.code_hashes):
    """The same in each of these runs, and half a second each time."""
    key = tuple(entries), tuple(left_out)
    if key not in KNOWN_HASHES:
        KNOWN_HASHES[key] = compute(entries, left_out)
    return KNOWN_HASHES[key]


def run_here(*flags, script=ppo):
    """The same in this process, which has paid for the imports already."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", [script.__file__, *flags])
            patch.setattr(sft, "code_hashes", code_hashes_once)
            try:
                evaluation.run_script(script.main)
            except SystemExit as stop:
                code = stop.code if isinstance(stop.code, int) else 1
                err.write("" if isinstance(stop.code, int) else str(stop.code))
    return subprocess.CompletedProcess(flags, code, out.getvalue(), err.getvalue())


def module_in_runs(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "runs" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def metrics_of(run):
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    timings = ("seconds", "per_second")
    return [{k: v for k, v in row.items() if not any(word in k for word in timings)} for row in rows]


def finished(folder):
    """The one warm start that was finished in a folder of them."""
    [path] = [path for path in folder.iterdir() if path.is_dir()]
    return path


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The tiny run three times: made from nothing, repeated on the reused warm start, and on two
    processes."""
    folder = tmp_path_factory.mktemp("runs")
    results = {}
    warm = ("--warm_start_dir", str(folder / "warm"))
    refused = subprocess.Popen([sys.executable, str(ROOT / "ppo.py"), "--train_data", "nowhere.jsonl"], text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=folder)  # beside the first
    for name, start in (("first", launch), ("again", run_here)):
        results[name] = start(*TINY, "--run_dir", str(folder / name), *warm)
        assert results[name].returncode == 0, results[name].stdout[-3000:] + results[name].stderr[-3000:]
    errors = refused.communicate(timeout=120)[1]
    results["refused"] = refused.returncode, errors.strip()
    run_ranks(2, folder / "two.log", *TINY, *warm)  # no --run_dir: the ranks must agree on one
    [run] = (folder / "out" / "ppo").iterdir()
    run.rename(folder / "two")
    return folder, results


def test_run_folder_holds_everything_a_reader_needs(runs):
    """Guards against runs that cannot be reproduced or looked at afterwards."""
    run = runs[0] / "first"
    record = json.loads((run / "arguments.json").read_text())
    assert record["arguments"]["sft_traces"] == 60 and record["versions"]["torch"] and record["commit"]
    rows = metrics_of(run)
    keys = set().union(*(json.loads(line) for line in open(run / "metrics.jsonl")))
    assert keys - evaluation.METRICS.keys() == set()
    assert [row["step"] for row in rows if "step" in row] == [0, 1]
    assert len({row["evaluation"] for row in rows if "evaluation" in row}) == 12  # five are baselines
    assert (run / "table.md").read_text().count("\n") == 14 and "ReTool" in (run / "report.html").read_text()
    rollout = json.loads((run / "rollouts.jsonl").read_text().splitlines()[0])
    assert {"step", "prompt", "response", "correct", "answer", "family", "finish_reason", "tool_statuses"} <= rollout.keys()


def test_same_command_twice_gives_the_same_metrics_also_on_a_reused_warm_start(runs):
    """Guards against hidden state: clocks in the batch composition, random streams shared between stages."""
    folder, results = runs
    assert "reusing" not in results["first"].stdout and "warm start: reusing" in results["again"].stdout
    assert metrics_of(folder / "first") == metrics_of(folder / "again")


def test_the_console_says_what_differs_what_columns_mean_and_where_to_look(runs):
    """Guards against a dump of all flags, a table that wraps, and a run that ends without a word about its
    report."""
    folder, results = runs
    lines = results["again"].stdout.splitlines()
    [settings] = [line for line in lines if line.startswith("settings: ")]
    assert "--sft_traces 60" in settings and "--temperature" not in settings and "arguments.json" in settings
    [heading] = {i for i, line in enumerate(lines) if line.startswith("PPO: 2 steps of 12 responses")}
    first_step = next(i for i, line in enumerate(lines) if line.startswith("step   1/2"))
    legend = " ".join(lines[heading + 1:first_step])
    columns = re.findall(r"\| ([a-z]+) ", lines[first_step])
    assert len(columns) > 8 and all(re.search(rf"\b{name}\b", legend) for name in columns)
    table = [line for line in lines if re.match(r"(test|ood_\w+).* (before|after) .* \+- ", line)]
    assert len(table) == 8 + 12 and all(len(line) <= 100 for line in table)  # the second shows both
    assert any("response:" in line for line in lines) and any("reference answer: " in line for line in lines)
    run = folder / "again"
    assert any(f"{run}/report.html" in line for line in lines[-4:])
    assert any(f"python rollout.py --model {run}/checkpoint --busy 0.3 '" in line for line in lines[-4:])


def test_two_processes_give_the_losses_of_one(runs):
    """Guards against per-rank means, unequal micro-batches and noise keyed by rank."""
    folder, _ = runs
    one, two = (metrics_of(folder / name) for name in ("first", "two"))
    assert len(one) == len(two)
    for a, b in zip(one, two):
        assert a.keys() == b.keys()
        for name in ("reward", "policy_loss", "value_loss", "entropy", "approx_kl", "grad_norm_actor",
                     "grad_norm_critic", "response_tokens"):
            if a.get(name) is not None:
                assert b[name] == pytest.approx(a[name], abs=1e-5), name


def test_a_finished_warm_start_is_used_as_it_is_with_the_embedded_defaults(runs):
    """Guards against a warm start that is made again, and against rates that are asked for as for a model of
    one's own."""
    folder, _ = runs
    result = run_here(*PPO, "--warm_start", str(finished(folder / "warm")), "--run_dir", str(folder / "as_it_is"))
    assert result.returncode == 0 and "curation" not in result.stdout, result.stderr[-3000:]
    own = [row for row in metrics_of(folder / "as_it_is") if "evaluation" in row]
    assert own[:3] == [row for row in metrics_of(folder / "first") if "evaluation" in row][:3]
    result = run_here("--warm_start", str(finished(folder / "warm")), "--sft_steps", "3")
    assert "--sft_steps has no effect with --warm_start" in result.stderr


def test_code_that_made_a_warm_start_anew_is_named(runs, capsys):
    """Guards against minutes of training that nobody can explain."""
    record = finished(runs[0] / "warm") / "arguments.json"
    text = record.read_text()
    code = json.loads(text)["code"]
    record.write_text(text.replace(code["rollout.py"], "0" * 16))
    args = ppo.parse_arguments(TINY)
    recipe = sft.warm_start_recipe(args)
    traces, held_out = json.loads(next((runs[0] / "warm").glob("traces-*.json")).read_text())
    folder = sft.warm_start_folder(runs[0] / "warm", recipe, traces, held_out)
    assert folder == record.parent and capsys.readouterr().out == ""
    other = record.parent.with_name(record.parent.name[:-16] + "f" * 16)
    record.parent.rename(other)
    sft.warm_start_folder(runs[0] / "warm", recipe, traces, held_out)
    assert f"made anew, for code in rollout.py is not that of {other}" in capsys.readouterr().out
    other.rename(record.parent)
    record.write_text(text)


def cut_short(folder, name, step, *flags):
    """The tiny run again, killed with SIGKILL as soon as step number `step` is in its metrics."""
    run = folder / name
    [process] = start_ranks(1, folder / "killed.log", *TINY, *flags, "--run_dir", str(run),
                            "--warm_start_dir", str(folder / "warm"))
    metrics = run / "metrics.jsonl"
    for _ in range(2000):
        if metrics.exists() and f'"step": {step},' in metrics.read_text():
            break
        assert process.exitcode is None, "it ended before it could be killed"
        time.sleep(0.05)
    process.kill()
    process.join()
    return run


def test_a_killed_run_resumes_to_the_same_metrics_also_past_a_damaged_checkpoint(runs):
    """Guards against state that a checkpoint forgets (moments, data position, noise), lines written twice,
    and trust in a file that was cut short."""
    folder, _ = runs
    flags = ["--steps", "4", "--save_every", "1", "--keep_checkpoints", "3", "--eval_problems", "2",
             "--eval_every", "2"]
    whole = run_here(*TINY, *flags, "--run_dir", str(folder / "whole"), "--warm_start_dir",
                   str(folder / "warm"))
    assert whole.returncode == 0, whole.stderr[-3000:]
    run = cut_short(folder, "killed", 2, *flags)
    newest = sorted((run / "checkpoints").glob("step-*"))[-1]
    shard = next(newest.glob("__0_*"))
    shard.write_bytes(shard.read_bytes()[:-1000])
    (run / "checkpoints" / "partial").mkdir(exist_ok=True)  # a save that was interrupted
    (folder / "warm").rename(folder / "away")  # the checkpoint has all that it needs
    resumed = run_here("--resume", str(run))
    (folder / "away").rename(folder / "warm")
    assert resumed.returncode == 0 and "curation" not in resumed.stdout, resumed.stderr[-3000:]
    assert [r["evaluation"] for r in metrics_of(run) if "evaluation" in r][8] == "test step 2"
    assert f"{newest} is damaged" in resumed.stdout and "goes on after step" in resumed.stdout
    assert metrics_of(run) == metrics_of(folder / "whole")
    assert (run / "rollouts.jsonl").read_text() == (folder / "whole" / "rollouts.jsonl").read_text()
    assert len(list((run / "checkpoints").iterdir())) == 3


def test_a_run_resumes_on_another_number_of_ranks_and_exports(runs):
    """Guards against shards that only fit the ranks which wrote them."""
    folder, _ = runs
    run, exported = folder / "two_more", folder / "exported"
    shutil.copytree(folder / "first", run)
    run_ranks(2, folder / "two_more.log", "--resume", str(run), "--steps", "3", "--replicas", "2")
    assert [row["step"] for row in metrics_of(run) if "step" in row] == [0, 1, 2]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ppo, "Trainer", None)  # of a large model it would not fit on one card
        result = run_here("--resume", str(run), "--export", str(exported))
    assert result.returncode == 0 and "step 3 of" in result.stdout, result.stderr[-3000:]
    a, b = (AutoModelForCausalLM.from_pretrained(path) for path in (run / "checkpoint", exported))
    ids = torch.tensor([[5, 6, 7, 300, 301]])
    assert torch.equal(a(ids).logits, b(ids).logits)
    record = (run / "arguments.json").read_text()
    for flags, line in ((["--model", "other"], "--model has no effect with --resume"),
                        (["--run_dir", "other"], "--run_dir has no effect with --resume"),
                        (["--steps", "2"], "--steps 2: the run has done 3 already")):
        result = run_here("--resume", str(run), "--replicas", "1", *flags)
        assert result.returncode != 0 and line in result.stderr, result.stderr[-3000:]
    metrics = (run / "metrics.jsonl").read_text()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluation, "make_sandbox", refuse_sandbox)
        result = run_here("--resume", str(run), "--replicas", "1")
    assert result.returncode == 1 and "no sandbox here" in result.stderr, result.stderr[-3000:]
    # What is refused leaves no trace.
    assert (run / "arguments.json").read_text() == record and (run / "metrics.jsonl").read_text() == metrics
    shutil.rmtree(run / "checkpoints")
    result = run_here("--resume", str(run), "--export", str(exported))
    assert result.returncode == 1 and "no checkpoint to export" in result.stderr


def refuse_sandbox(args):
    raise UserError("no sandbox here")


def save(trainer, folder, step):
    sft.save_checkpoint(folder, trainer.state(), {"step": step}, trainer.args.keep_checkpoints, 0)


def test_a_full_disk_leaves_the_last_checkpoint(trainer_and_examples, tmp_path, monkeypatch):
    """Guards against a save that destroys what it was to replace."""
    trainer, _ = trainer_and_examples
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="step 1 cannot be written .*There is none before it$"):
        save(trainer, tmp_path / "file", 1)
    save(trainer, tmp_path, 1)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))  # the shards are larger
    with pytest.raises(UserError, match="disk full.*intact"):
        save(trainer, tmp_path, 2)
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(sft.Path, "write_text", full)
        with pytest.raises(UserError, match="No space left on device.*intact"):
            save(trainer, tmp_path, 2)
    assert sft.find_checkpoint(tmp_path, 0)[1]["step"] == 1


@pytest.mark.skipif(sys.platform != "linux", reason="of glibc's heap")
def test_a_save_returns_the_gaps_of_the_heap(trainer_and_examples, tmp_path):
    """Guards against memory that grows for hours: steps of other lengths leave gaps, and glibc keeps them."""
    trainer, _ = trainer_and_examples

    def resident():
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()

    blocks = [torch.ones(25_000) for _ in range(4000)]  # 400 MB, below every threshold of mmap
    kept = blocks[::40]
    del blocks
    before = resident()
    save(trainer, tmp_path, 1)
    assert resident() < before - 200e6 and len(kept) == 100


def test_damaged_checkpoints_are_never_kept_instead_of_good_ones(trainer_and_examples, tmp_path):
    """Guards against pruning by name alone: after going back to step 1 behind a damaged step 5, step 2 is the
    newest."""
    trainer, _ = trainer_and_examples
    folder = tmp_path / "checkpoints"
    for step in (1, 5):
        save(trainer, folder, step)
    (folder / "step-000005" / "manifest.json").write_text("{")
    assert sft.find_checkpoint(folder, 0)[1]["step"] == 1
    save(trainer, folder, 2)
    assert sorted(path.name for path in folder.iterdir()) == ["step-000001", "step-000002"]
    for path in folder.iterdir():
        (path / ".metadata").write_text("")
    with pytest.raises(UserError, match="every checkpoint is damaged"):
        sft.find_checkpoint(folder, 0)


def test_four_processes_in_a_grid_of_two_by_two_warm_start_like_one(runs):
    """Guards against a gradient that is averaged once too often, over either dimension of the grid, and
    against ranks that curate on their own. Activation checkpointing must change nothing either."""
    folder, _ = runs
    run_ranks(4, folder / "four.log", *SFT, "--replicas", "2", "--activation_checkpointing",
              "--warm_start_dir", str(folder / "four_warm"), script="sft")
    one, four = (metrics_of(finished(folder / name)) for name in ("warm", "four_warm"))
    assert len(one) == len(four) == 3  # the first step, the last one, the evaluation
    for a, b in zip(one, four):
        assert b == pytest.approx(a, abs=1e-5)


def test_checkpoint_loads_in_plain_transformers_and_scores_like_the_sampler(runs):
    """Guards against checkpoints that only this project can read, and against saving weights that were never
    synced."""
    checkpoint = runs[0] / "first" / "checkpoint"
    plain = AutoModelForCausalLM.from_pretrained(checkpoint, attn_implementation="sdpa")
    ours = rollout.load_model(str(checkpoint), "cpu")
    tokenizer = rollout.load_tokenizer(str(checkpoint))
    ids = torch.tensor(tokenizer.encode("What is 12 + 30?\n<code>"))
    flat, packing = sft.collate([sft.make_example(ids.tolist(), [1] * len(ids))], "cpu")
    with torch.no_grad():
        logprobs, _ = sft.Policy(ours)(flat.input_ids, flat.targets, flat.loss_mask, packing)
        scores = torch.log_softmax(plain(ids[None]).logits[0, :-1], -1).gather(-1, ids[1:, None])[:, 0]
    assert torch.allclose(logprobs, scores, atol=1e-5)
    warm = finished(runs[0] / "warm")
    start = AutoModelForCausalLM.from_pretrained(warm)
    moved = [(a - b).abs().max().item() for a, b in zip(plain.parameters(), start.parameters())]
    assert max(moved) > 1e-5


def random_checkpoint(folder, architecture, tokenizer, **changes):
    """A folder as the hub has them, with random weights of a real architecture."""
    config = CONFIGS[architecture](**dict(
        vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=2, intermediate_size=48,
        max_position_embeddings=512, bos_token_id=None, eos_token_id=tokenizer.eos_token_id) | changes)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("architecture, flags", [
    ("qwen2", ["--activation_checkpointing"]), ("qwen3", ["--critic_model", "CRITIC"]),
    ("llama", ["--cpu_offload", "--kv_gib", "0.0005"])])
def test_checkpoints_of_real_architectures_train_in_bf16(tokenizer, tmp_path, monkeypatch, architecture, flags):
    """Guards against code that only the embedded model survives: untied heads, query and key norms, no pad
    token, weights and optimiser in host memory, rotary frequencies rounded to bf16, and the embedded problems' tool."""
    monkeypatch.setattr(ppo, "Service", None)
    tokenizer = copy.deepcopy(tokenizer)
    if architecture == "llama":
        tokenizer.pad_token = None
    model = random_checkpoint(tmp_path / "model", architecture, tokenizer, tie_word_embeddings=False)
    critic = random_checkpoint(tmp_path / "critic", "llama", tokenizer, hidden_size=16)
    flags = [critic if flag == "CRITIC" else flag for flag in flags]
    data_file = tmp_path / "problems.jsonl"
    data_file.write_text('{"question": "What is 2 + 2?", "answer": "#### 4"}\n' * 4)
    result = run_here("--model", model, "--dtype", "bf16", "--steps", "2", "--critic_warmup", "0",
                      "--prompts_per_step", "4", "--minibatches", "2", *OWN, "--max_response_tokens", "24",
                      "--max_prompt_tokens", "40", "--train_data", str(data_file), "--run_dir",
                      str(tmp_path / "run"), *flags)
    assert result.returncode == 0, result.stderr[-3000:]  # the sync check inside has passed too
    row = metrics_of(tmp_path / "run")[1]
    assert row["sampler_difference"] < 0.02 and row["grad_norm_actor"] > 0 and row["truncated"] > 0
    exported = str(tmp_path / "run" / "checkpoint")
    plain = AutoModelForCausalLM.from_pretrained(exported)
    ours = rollout.load_model(exported, "cpu", "bf16")
    start = AutoModelForCausalLM.from_pretrained(model)
    assert plain.dtype == ours.dtype == torch.bfloat16
    assert torch.equal(ours.model.rotary_emb.inv_freq, start.model.rotary_emb.inv_freq)
    ids = torch.arange(4, 12)
    ours_logits = ours(input_ids=ids[None], position_ids=torch.arange(8)[None], use_cache=False,
                       packing=Packing([8], "cpu")).logits
    assert torch.equal(plain(ids[None], attn_implementation="sdpa").logits.argmax(-1), ours_logits.argmax(-1))
    assert plain.generate(ids[None], max_new_tokens=3, do_sample=False).shape[1] > 8


def test_eval_script_compares_checkpoints_on_a_file_and_goes_on(runs, tmp_path):
    """The paper's kind of evaluation file, end to end, on one rank and on two: the same counts. The same
    command once more samples nothing, and runs/results.py shows what OUTPUT holds."""
    problems = tmp_path / "aime.jsonl"
    problems.write_text(
        '{"input": "What is 2 + 2?", "output": "4"}\n{"input": "What is 3^2?", "output": 9}\n')
    models = [str(runs[0] / "first" / "checkpoint"), str(finished(runs[0] / "warm"))]
    flags = ["--model", *models, "--problems", f"test,{problems}", "--limit", "3", "--samples", "2",
             "--max_response_tokens", "40", "--output", str(tmp_path / "out.json")]
    result = run_here(*flags, script=evaluation)
    assert result.returncode == 2 and "give --max_prompt_tokens (paper: 2048)" in result.stderr
    result = run_here(*flags, "--max_prompt_tokens", "99", script=evaluation)
    assert result.returncode == 0, result.stderr[-3000:]
    record = json.loads((tmp_path / "out.json").read_text())
    metrics = record["results"][models[0]]
    assert metrics[str(problems)]["problems"] == 2 and metrics["test"]["problems"] == 3
    assert set().union(*metrics.values()) <= evaluation.METRICS.keys()
    assert len((tmp_path / "out.json.responses.jsonl").read_text().splitlines()) == 20
    journal = (tmp_path / "out.json.journal").read_bytes()
    again = run_here(*flags, "--max_prompt_tokens", "99", script=evaluation)
    assert again.stdout.splitlines()[1:] == result.stdout.splitlines()[1:]
    assert (tmp_path / "out.json.journal").read_bytes() == journal
    assert json.loads((tmp_path / "out.json").read_text())["results"] == record["results"]

    # Another command does not overwrite it, nor any other file, unless it is told to.
    whole = (tmp_path / "out.json").read_bytes()
    other = [*flags, "--max_prompt_tokens", "99", "--seed", "1"]
    refused = run_here(*other, script=evaluation)
    assert refused.returncode == 1 and "out.json: there already, made by another command" in refused.stderr
    assert "\n" not in refused.stderr.strip() and (tmp_path / "out.json").read_bytes() == whole
    assert (tmp_path / "out.json.journal").read_bytes() == journal
    for what in (["--report", str(runs[0] / "first")], flags[:-2]):
        refused = run_here(*what, "--max_prompt_tokens", "99", "--output", str(problems), script=evaluation)
        assert refused.returncode == 1 and "aime.jsonl: there already" in refused.stderr
    page = ["--report", str(runs[0] / "first"), "--output", str(tmp_path / "page.html")]
    assert [run_here(*page, script=evaluation).returncode for _ in range(2)] == [0, 0]  # a page is made anew
    forced = run_here(*flags, "--max_prompt_tokens", "99", "--overwrite", script=evaluation)
    assert forced.returncode == 0 and json.loads((tmp_path / "out.json").read_text())["results"] == record["results"]

    # A word that is neither a split nor a file is not asked for lengths.
    for name in ("tset", "test,", f"{problems}l", f"{problems},nowhere/aime.jsonl"):
        refused = run_here("--model", models[0], "--problems", name, script=evaluation)
        assert refused.returncode == 2 and "no such file" in refused.stderr and "give" not in refused.stderr
        assert "nor an embedded split (traces, held_out_traces, train, test, ood_large, ood_families)" in refused.stderr

    flags[-1] = str(tmp_path / "two.json")
    run_ranks(2, tmp_path / "two.log", *flags, "--max_prompt_tokens", "99", script="eval")
    two = json.loads((tmp_path / "two.json").read_text())["results"][models[0]]
    assert [two[name]["per_problem"] for name in two] == [metrics[name]["per_problem"] for name in two]
    lines = (tmp_path / "out.json.responses.jsonl").read_text().splitlines()
    tables = module_in_runs("results").evaluation_tables(record, [json.loads(line) for line in lines])
    assert tables.count(" -> ") == 2 and all(name in tables for name in ("void_turns", "pass@2", "ood_drop"))


def test_runs_of_different_settings_are_never_averaged_and_torn_files_are_named(runs, tmp_path):
    """Guards against a mean over the tool and the text run, and a traceback for half a line."""
    first, text = runs[0] / "first", tmp_path / "text"
    shutil.copytree(first, text)
    record = json.loads((text / "arguments.json").read_text())
    record["arguments"] |= {"tools": "off", "seed": 5}
    (text / "arguments.json").write_text(json.dumps(record))
    runs_tables = module_in_runs("results").runs_tables
    tables = runs_tables([first, runs[0] / "again", text])
    assert tables.count("2 runs: mean") == tables.count("1 runs: mean") == 1
    assert "--tools on\n" in tables and "--tools off\n" in tables and "--seed" not in tables
    with open(text / "metrics.jsonl", "a") as file:
        file.write('{"step": ')
    with pytest.raises(UserError, match="text: Expecting value"):
        runs_tables([text])


def test_failures_at_the_very_end_are_one_line(tokenizer, tmp_path, monkeypatch):
    """Guards against tracebacks for a table of nothing but sandbox errors, and for a disk that is full when
    the finished model is written."""
    async def only_failures(model, tokenizer, prompts, *arguments, **settings):
        return [Trajectory(i, 0, [1], finish_reason="sandbox_error") for i in range(len(prompts))]

    monkeypatch.setattr(evaluation, "sample_all", only_failures)
    problems = [{"question": "1+1?", "answer": "2", "family": "sums"}] * 2
    problems = evaluation.encode_problems(problems, tokenizer, "{question}", 99, "test")
    with pytest.raises(UserError, match="test: the sandbox failed in every response"):
        asyncio.run(evaluation.evaluate(None, tokenizer, problems, None, evaluation.Process(0, 1, "cpu"), "test"))

    def full(folder):
        raise SafetensorError("I/O error: No space left on device")

    run = SimpleNamespace(path=tmp_path, files={}, tracker=None, writes=True)
    with pytest.raises(SafetensorError) as error:
        ppo.RunFolder.finish(run, SimpleNamespace(save_pretrained=full), tokenizer)
    line = evaluation.describe_error(error.value)
    assert re.fullmatch(r"error: weights cannot be written \(.*No space left.*disk full\?.*--resume.*", line)


def test_a_file_of_problems_is_no_file_of_traces(tmp_path):
    """Guards against a warm start on texts without tags or answers."""
    file = tmp_path / "traces.jsonl"
    file.write_text('{"question": "1+1?", "response": "\\\\boxed{2}", "answer": "2"}\n'
                    '{"question": "1+2?", "response": "It is 3.", "answer": "3"}\n')
    with pytest.raises(UserError, match="traces.jsonl:2: no .*boxed.* answer in the response"):
        sft.load_traces(str(file))
    trace = {"question": "1+1?", "answer": "2", "response": "\\boxed{2}"}
    for failed_calls in (None, 1, [0], [[0]]):  # it has no call
        file.write_text(json.dumps(trace | {"failed_calls": failed_calls}))
        with pytest.raises(UserError, match="traces.jsonl:1: failed_calls is not a list of indices"):
            sft.load_traces(str(file))
    # Where a solution stands beside it, the response is what is trained on.
    file.write_text(json.dumps(trace | {"solution": "by hand: \\boxed{2}"}))
    assert sft.load_traces(str(file))[0]["response"] == "\\boxed{2}"


def test_text_only_ppo_on_a_file_runs_and_skips_over_long_prompts(runs, tmp_path):
    """Guards against a baseline that runs code, and an epoch's end or a long prompt that stops the run."""
    problems = tmp_path / "problems.jsonl"
    rows = [{"question": f"What is {i} + 1?", "answer": f"so\n#### {i + 1}"} for i in range(5)]
    rows += rows[:3]
    rows.append({"question": "What is 1 + 1? " * 200, "answer": "2"})
    problems.write_text("".join(json.dumps(row) + "\n" for row in rows))
    checkpoint = str(runs[0] / "first" / "checkpoint")
    result = run_here(*PPO, *OWN, "--model", checkpoint, "--tools", "off", "--train_data", str(problems),
                    "--eval_data", str(problems), "--run_dir", str(tmp_path / "run"))
    assert result.returncode == 0, result.stderr[-3000:]
    assert "prompts left out: 1 too long, 3 duplicates" in result.stdout
    rows = metrics_of(tmp_path / "run")
    steps, evaluations = [r for r in rows if "step" in r], [r for r in rows if "evaluation" in r]
    assert len(steps) == 2 and all(r["code_ratio"] == 0 and not r["sandbox_outcomes"] for r in steps)
    assert all(r["problems"] == 8 and r["skipped_long"] == 1 for r in evaluations) and len(evaluations) == 2
    # Only the critic learns in the first step; the policy is frozen.
    assert steps[0]["grad_norm_actor"] is None and steps[1]["grad_norm_actor"] > 0
    assert all(step["grad_norm_critic"] > 0 for step in steps)
    assert "policy_loss" not in steps[0] and "policy_loss" in steps[1]


def test_without_a_critic_none_is_built_and_a_run_goes_on(runs, tmp_path):
    """Guards against the memory of a critic that nobody asks, and checkpoints that want one."""
    flags = ["--advantage", "rloo", "--prompts_per_step", "6", "--samples_per_prompt", "2", "--minibatches", "2",
             "--actor_lr", "1e-4", "--max_prompt_tokens", "512", "--max_response_tokens", "16", "--tools", "off",
             "--sandbox_timeout", "0.5", "--eval_problems", "2", "--eval_samples", "1", "--save_every", "1"]
    run, checkpoint = tmp_path / "run", str(runs[0] / "first" / "checkpoint")
    for more in (["--steps", "1", "--model", checkpoint, "--run_dir", str(run), *flags],
                 ["--steps", "2", "--resume", str(run)]):
        result = run_here(*more)
        assert result.returncode == 0, result.stderr[-3000:]
    steps = [row for row in metrics_of(run) if "step" in row]
    assert [row["step"] for row in steps] == [0, 1]
    assert all("policy_loss" in row and "value_loss" not in row and row["grad_norm_critic"] is None for row in steps)


def test_a_step_without_a_response_to_train_on_is_skipped_and_counted(runs, tmp_path):
    """Guards against a flag that filters nothing, and a run that ends where it could have gone on: with one
    token per response every row is truncated."""
    checkpoint = str(runs[0] / "first" / "checkpoint")
    for number, flags in enumerate(([], ["--drop_truncated"])):
        result = run_here(*PPO, *OWN, *flags, "--model", checkpoint, "--max_response_tokens", "1", "--tools",
                          "off", "--run_dir", str(tmp_path / f"run{number}"))
        assert result.returncode == 0, result.stderr[-3000:]
        steps = [row for row in metrics_of(tmp_path / f"run{number}") if "step" in row]
        assert [row["update_skipped"] for row in steps] == [number] * 2


def test_a_group_with_both_outcomes_is_trained_on():
    """Guards against groups told apart by the order of their responses, or by their rewards."""
    outcomes = [(0, True), (1, False), (0, True), (1, True), (2, False), (1, False)]
    trajectories = [SimpleNamespace(prompt_index=prompt, correct=correct) for prompt, correct in outcomes]
    assert ppo.of_mixed_groups(trajectories) == [trajectories[1], trajectories[3], trajectories[5]]
    assert ppo.of_mixed_groups([]) == []


@pytest.fixture
def trainer_and_examples(runs):
    """A Trainer on the tiny checkpoint in a process group of this process alone, and a scored batch."""
    checkpoint = str(runs[0] / "first" / "checkpoint")
    tokenizer = rollout.load_tokenizer(checkpoint)
    with evaluation.distributed() as process:
        trainer = ppo.Trainer(ppo.parse_arguments(TINY), checkpoint, process)
        trainer.tokenizer = tokenizer
        ids = tokenizer.encode("What is 12 + 30? It is 42, what else could it be?")
        examples = [sft.make_example(ids[:n], [0] * 4 + [1] * (n - 4),
                                         rewards=[0.0] * (n - 1) + [(-1.0)**n]) for n in range(8, len(ids))]
        trainer.score(examples)
        trainer.estimate(examples, [0] * len(examples))
        yield trainer, examples


def weights(module):
    module.reshard()  # after a forward without backward the root's weights are still gathered
    return torch.cat([p.full_tensor().detach().flatten() for p in module.parameters()])


def test_only_the_critic_moves_during_its_warm_up(trainer_and_examples):
    """Guards against a policy that follows the advantages of an untrained critic."""
    trainer, examples = trainer_and_examples
    actor, critic = weights(trainer.actor), weights(trainer.critic)
    metrics = trainer.update(examples, step=0)  # TINY: one step of critic warm-up
    assert torch.equal(weights(trainer.actor), actor) and not torch.equal(weights(trainer.critic), critic)
    assert "policy_loss" not in metrics and metrics["value_loss"] > 0


def test_a_ratio_that_does_not_start_at_one_stops_the_run(trainer_and_examples):
    """Guards against scoring with another temperature, mask or dropout than the update uses."""
    trainer, examples = trainer_and_examples
    shifted = [replace(e, logprobs=e.logprobs + 0.01) for e in examples]
    with pytest.raises(AssertionError, match="should be 0"):
        trainer.update(shifted, step=1)


def test_both_learning_rates_warm_up_from_the_first_step_that_is_taken(trainer_and_examples, monkeypatch):
    """Guards against an actor whose warm-up is over while it was frozen."""
    trainer, _ = trainer_and_examples
    for name, value in {"critic_warmup": 20, "lr_warmup": 10, "steps": 100}.items():
        monkeypatch.setattr(trainer.args, name, value)
    monkeypatch.setattr(trainer, "actor_start", 20)
    factors = [trainer.set_learning_rates(step) for step in (0, 9, 19, 20, 29, 99)]
    assert [f["lr_factor_critic"] for f in factors[:2]] == [0.1, 1.0]
    assert [f["lr_factor_actor"] for f in factors[3:5]] == [0.1, 1.0]
    assert factors[-1]["lr_factor_actor"] == pytest.approx(trainer.args.lr_floor, abs=0.01)
    assert trainer.optimizers["actor"].param_groups[0]["lr"] == trainer.args.actor_lr * factors[-1]["lr_factor_actor"]


def test_one_response_of_another_policy_stops_the_run(trainer_and_examples):
    """Guards against a bad row in a hundred that the mean hides, and against a run refused for one uncertain
    token in a response of certain ones (SmolLM2 in bf16: p 0.58 against 0.51)."""
    _, examples = trainer_and_examples
    rows = [replace(e, sampler_logprobs=e.logprobs.clone()) for e in examples] * 9
    certain = torch.full_like(rows[0].logprobs, -0.002)
    first = torch.arange(len(certain)) == rows[0].sampled.argmax()
    rows.append(replace(rows[0], logprobs=certain.masked_fill(first, math.log(0.58)),
                        sampler_logprobs=certain.masked_fill(first, math.log(0.51))))
    ppo.check_sampler(rows, ppo.logit_error("bf16", 3), 0)
    rows[0].sampler_logprobs -= 0.4
    with pytest.raises(AssertionError, match="in one response"):
        ppo.check_sampler(rows, ppo.logit_error("bf16", 3), 0)


@pytest.mark.parametrize("seed", [-2**63, -3, 0, 2**47, 2**64 - 1])
def test_any_seed_of_64_bits_orders_the_minibatches(trainer_and_examples, monkeypatch, seed):
    """Guards against a seed whose product with a constant no generator takes, and another order for those that fit."""
    trainer, examples = trainer_and_examples
    monkeypatch.setattr(trainer.args, "seed", ppo.parse_arguments(["--seed", str(seed)]).seed)
    orders = []
    for step in (2, 2, 3):
        minibatches = trainer.minibatches(examples, step)
        orders.append([len(example) for minibatch in minibatches for example in minibatch])
    assert orders[0] == orders[1] != orders[2] and sorted(orders[0]) == [len(example) for example in examples]
    if abs(seed) < 2**46:
        expected = torch.randperm(len(examples), generator=torch.Generator().manual_seed(seed * 100003 + 2))
        assert orders[0] == [len(examples[i]) for i in expected]
    rollout.noise_bits(trainer.args.seed, 0, 0)


@pytest.mark.parametrize("logprob, off, healthy", [(-1.0, 0.05, True), (-1.0, 0.2, False), (-0.001, 0.01, False)])
def test_sampler_and_trainer_may_differ_where_rounding_can(trainer_and_examples, logprob, off, healthy):
    """Guards against a model refused for rounding of uncertain tokens (SmolLM2 as released: 0.03 in
    bf16), and against a bug that a nearly certain policy hides (the same after its warm start: 6e-5)."""
    _, examples = trainer_and_examples
    rows = [replace(e, logprobs=torch.full_like(e.logprobs, logprob),
                    sampler_logprobs=torch.full_like(e.logprobs, logprob - off)) for e in examples]
    with contextlib.nullcontext() if healthy else pytest.raises(AssertionError, match="were the weights synced"):
        ppo.check_sampler(rows, ppo.logit_error("bf16", 3), 0)


def test_an_interrupted_warm_start_goes_on_with_the_same_metrics(runs, tmp_path):
    """Guards against hours of SFT on a real model that are lost, and against a process that waits for the end
    of them before it listens to Ctrl-C."""
    folder, _ = runs
    warm = tmp_path / "warm"
    flags = [*SFT, "--sft_save_every", "1", "--warm_start_dir", str(warm)]
    [process] = start_ranks(1, tmp_path / "log", *flags, script="sft")
    for _ in range(9000):
        if list(warm.glob("*.partial/checkpoints/step-*")):
            break
        assert process.exitcode is None, (tmp_path / "log").read_text()[-3000:]
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGINT)
    process.join(5)
    assert process.exitcode == 130 and "interrupted: the same command goes on" in (tmp_path / "log").read_text()
    result = run_here(*flags, script=sft)
    assert result.returncode == 0, result.stderr[-3000:]
    assert metrics_of(finished(warm)) == metrics_of(finished(folder / "warm"))
    assert not list(warm.glob("*.partial")) and not (finished(warm) / "checkpoints").exists()


def test_a_warm_start_in_slices_of_minutes_equals_one_in_a_piece(runs, tmp_path):
    """Guards against a stop that leaves no checkpoint or holds its lock, an error code for it, and steps lost or done
    twice."""
    flags = [*SFT, "--warm_start_dir", str(tmp_path)]
    gc.disable()  # it would free the lock some time
    for step in (1, 2, 3):
        result = run_here(*flags, "--minutes", "1e-9", script=sft)
        assert result.returncode == 0 and f"over after step {step} of the warm start" in result.stdout
        assert not (tmp_path / "checkpoint").exists() and "checkpoint: " not in result.stdout
        [lock] = tmp_path.glob("*.lock")
        with open(lock) as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    gc.enable()
    run_here(*flags, "--minutes", "1e-9", script=sft)  # the last step needs no checkpoint
    assert metrics_of(finished(tmp_path)) == metrics_of(finished(runs[0] / "warm"))


def test_a_sampler_that_was_not_synced_stops_the_run(trainer_and_examples, monkeypatch):
    """Guards against rollouts from old weights: rewards of one policy, gradients of another."""
    trainer, _ = trainer_and_examples
    prompts = ppo.Prompts(None, 0, trainer.tokenizer, "{question}", 512)
    monkeypatch.setattr(trainer.args, "tools", "off")
    trainer.actor.reshard()
    with torch.no_grad():
        for p in trainer.actor.parameters():
            p.mul_(1.2)
    with pytest.raises(AssertionError, match="were the weights synced"):
        asyncio.run(ppo.train_step(trainer, prompts, None, trainer.tokenizer, 1))
    sft.sync_weights(trainer.actor, trainer.sampler)
    asyncio.run(ppo.train_step(trainer, prompts, None, trainer.tokenizer, 1))


def test_losses_that_are_not_finite_stop_the_run_before_the_weights_are_touched(trainer_and_examples):
    """Guards against a checkpoint full of nan after a night."""
    trainer, examples = trainer_and_examples
    before = weights(trainer.critic)
    broken = [replace(e, returns=e.returns * math.inf) for e in examples]
    with pytest.raises(FloatingPointError, match="gradient norm of the critic is"):
        trainer.update(broken, step=0)
    assert torch.equal(weights(trainer.critic), before)


def test_the_other_scripts_run(monkeypatch, capsys):
    """One real run of what has no run above: each prints what its docstring promises."""
    small = ["--rows", "2", "--check_rows", "2", "--batch_sizes", "2"]
    for script, flags, line in ((bench_rollout, small, '"ratio"'), (data, ["--n", "1"], "by_code: ")):
        monkeypatch.setattr(sys, "argv", [script.__file__, *flags])
        script.main()
        assert line in capsys.readouterr().out


@pytest.mark.parametrize("flags, line", [
    (["--max_response_tokens", "1600"], "the model has 2048 positions"),
    (["--train_data", "nowhere.jsonl"], "error: nowhere.jsonl: no such file, and not a hub id (OWNER/NAME)"),
    (["--train_data", "BROKEN"], "broken.jsonl:2: needs question + answer"),
    (["--model", "EMPTY"], "no config.json in there"),
    (["--model", "no-such/model"], "no-such/model: cannot be loaded"),
    (["--model", "SILENT"], "needs vocabulary, EOS, chat template"),
    (["--model", "SMALL"], "small: the model has 100 rows of embeddings, the tokenizer"),
    (["--critic_model", "OTHER"], "its vocabulary is not the policy's"),
    (["--kv_gib", "1e-6", "--model", "FINE"], "of KV cache, there are 1e-06"),
    (["--replicas", "2"], "--replicas 2 does not divide the 1 ranks"),
    (["--token_budget", "0"], "--token_budget: 0: must be at least 1"),
    (["--seed", str(2**64)], "--seed: 18446744073709551616: must be at least -9223372036854775808 and at most 184"),
    (["--sft_seed", str(-2**63 - 1)], "--sft_seed: -9223372036854775809: must be"),
    (["--sandbox_timeout", "inf"], "--sandbox_timeout: inf: must be above 0.0 and at most 1000000.0"),
    (["--sft_steps", "1" + 30 * "0"], "must be at least 1 and at most 9223372036854775807"),
    (["--advantage", "grpo"], "grpo or rloo need a group"),
    (["--advantage", "rloo", "--samples_per_prompt", "2", "--critic_lr", "1"], "--critic_lr has no effect with"),
    (["--resume", "EMPTY"], "not the folder of a run"),
    (["--run_dir", "BROKEN"], "File exists"),
    (["--model", "CUT"], "cannot be loaded"),
    (["--model", "WINDOW"], "attention has sliding_window, which is not implemented"),
    (["--n_slots", "0"], "--n_slots: 0: must be at least 1"),
    (["--tools", "maybe"], "argument --tools: invalid choice: 'maybe'"),
    (["--dual_clip", "0.5"], "argument --dual_clip: 0.5: must be 0 or at least 1"),
    (["--prompt_template", "nowhere.txt"], "--prompt_template nowhere.txt"),
    (["--template_kwargs", '{"enable_thinking": false}'], "--template_kwargs: the embedded chat template has no var"),
    (["--template_kwargs", "enable_thinking=false"], "enable_thinking=false: must be a JSON object"),
    (["--run_dir", "FULL"], "not empty; nothing is overwritten"),
    (["--model", "FINE", "--max_prompt_tokens", "9"], "give --actor_lr (paper: 1e-06), --critic_lr (paper: 2e-06), --sandbox_timeout (paper: 5), --max_response"),
    (["--model", "FINE", *OWN, "--max_response_tokens", "9", "--sft_lr", "1"], "--sft_lr has no effect with"),
    (["--tools", "off"], "--tools off needs --code_share 0"),
    (["--critic_warmup", "30"], "--critic_warmup 30 leaves nothing of --steps 30"),
    (["--track", "wandb"], "--track wandb: not installed (pip install wandb)"),
    (["--reward_scale", "1"], "--reward_scale has no effect with --reward outcome"),
    (["--gamma", "-3"], "argument --gamma: -3: must be at least 0.0 and at most 1.0"),
    (["--train_data", "table.csv"], "table.csv:1: not JSON"),
    (["--train_data", "array.json"], "needed is JSONL, one row per line"),
    (["--train_data", "nothing.jsonl"], "nothing.jsonl: no rows"),
    (["--prompts_per_step", "6", "--minibatches", "4"], "--minibatches 4 does not divide the responses per"),
])
def test_bad_input_gets_one_clear_line_and_a_non_zero_exit(tokenizer, tmp_path, monkeypatch, flags, line):
    """Guards against tracebacks for a typing error, and against defaults that hide it."""
    (tmp_path / "broken.jsonl").write_text('{"question": "1+1?", "answer": "2"}\n{"question": "no answer"}\n')
    (tmp_path / "empty").mkdir()
    (tmp_path / "full").mkdir()
    (tmp_path / "table.csv").write_text("question,answer\n1+1?,2\n")
    (tmp_path / "array.json").write_text('[\n{"question": "1+1?", "answer": "2"}\n]')
    (tmp_path / "nothing.jsonl").write_text("\n")
    (tmp_path / "full" / "metrics.jsonl").write_text("{}")
    other = copy.deepcopy(tokenizer)
    other.add_tokens(["one more"])
    silent = copy.deepcopy(tokenizer)
    silent.chat_template = None
    places = {"BROKEN": tmp_path / "broken.jsonl", "EMPTY": tmp_path / "empty", "FULL": tmp_path / "full",
              "SMALL": random_checkpoint(tmp_path / "small", "qwen2", tokenizer, vocab_size=100),
              "OTHER": random_checkpoint(tmp_path / "other", "llama", other),
              "SILENT": random_checkpoint(tmp_path / "silent", "llama", silent),
              "CUT": random_checkpoint(tmp_path / "cut", "llama", tokenizer, max_position_embeddings=2048),
              "WINDOW": random_checkpoint(tmp_path / "window", "qwen2", tokenizer, use_sliding_window=True,
                                          sliding_window=8, max_window_layers=0, max_position_embeddings=2048),
              "FINE": random_checkpoint(tmp_path / "fine", "llama", tokenizer, max_position_embeddings=2048)}
    weights = tmp_path / "cut" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    flags = [str(places.get(flag, flag)) for flag in flags]
    if "--model" in flags and len(flags) == 2 or "--kv_gib" in flags:
        flags += [*OWN, "--max_response_tokens", "320"]
    if "--run_dir" not in flags:
        flags += ["--run_dir", str(tmp_path / "run")]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # else it tries for a minute
    result = run_here(*flags)
    clear = line in result.stderr and "Traceback" not in result.stderr
    assert result.returncode != 0 and clear, result.stderr[-2000:]
    assert not (tmp_path / "run").exists() and not (tmp_path / "out" / "ppo").exists()
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["metrics.jsonl"]
    assert not any((tmp_path / "empty").iterdir())


def run_folder(args, process=SimpleNamespace(rank=0, world=1, device="cpu", goes_on="")):
    """A RunFolder that has started."""
    args = SimpleNamespace(**{"run_dir": "", "resume": "", "export": ""} | args)
    run = ppo.RunFolder(args, process)
    run.prepare(None, None, {"step": 1, "bytes": {}}, "the sandbox")
    return run


def test_a_run_folder_belongs_to_one_run(tmp_path, monkeypatch):
    """Guards against two runs that write every step into the same files."""
    monkeypatch.setattr(ppo.dist, "broadcast_object_list", lambda values: None)
    monkeypatch.chdir(tmp_path)
    holder = f"another run is at work in it \\(process {os.getpid()} on .* since "
    with run_folder({"run_dir": "one"}) as one:
        with pytest.raises(UserError, match=f"^one: {holder}"):
            run_folder({"run_dir": "one"})
        one.write("metrics.jsonl", {"step": 0})
        with pytest.raises(UserError, match="^--run_dir one: not empty; nothing is overwritten"):
            run_folder({"run_dir": "one"})
        with pytest.raises(UserError, match=f"^one: {holder}"):
            run_folder({"resume": "one"})
        with run_folder({"resume": "one", "export": "x"}):  # only reads
            pass
        one.write("metrics.jsonl", {"step": 1})

    # Afterwards it is free; what is left of the lock, or of a kill, is no obstacle.
    with run_folder({"resume": "one"}) as again:
        again.write("metrics.jsonl", {"step": 2})
    assert (again.path / "metrics.jsonl").read_text() == '{"step": 2}\n'  # what its checkpoint has not seen is cut off
    with pytest.raises(UserError, match="not empty; nothing is overwritten"):
        run_folder({"run_dir": "one"})
    Path("killed").mkdir()
    Path("killed", ppo.LOCK).write_text("process 1")
    with run_folder({"run_dir": "killed"}):
        pass


def test_a_refused_start_leaves_nothing(tmp_path, monkeypatch):
    """Guards against a folder that blocks the corrected command, and a refused --resume that changes the run."""
    monkeypatch.setattr(ppo.dist, "broadcast_object_list", lambda values: None)
    folder = str(tmp_path / "run")
    for refused in (UserError, SystemExit):
        with pytest.raises(refused), run_folder({"run_dir": folder}):
            raise refused
        assert not any(tmp_path.iterdir())

    # A folder that was there stays, and takes the corrected command.
    (tmp_path / "there").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "there")
    for name in ("there", "link"):
        with pytest.raises(UserError, match="^memory$"), run_folder({"run_dir": str(tmp_path / name)}):
            raise UserError("memory")
    with run_folder({"run_dir": str(tmp_path / "link")}):
        pass

    # What has begun stays, and a resumed run says so at its first row.
    with pytest.raises(UserError), run_folder({"run_dir": folder}) as run:
        run.write("metrics.jsonl", {})
        raise UserError("memory")
    before = (run.path / "arguments.json").read_text()
    assert json.loads(before)["sandbox"] == "the sandbox" and folder in run.process.goes_on
    with pytest.raises(UserError), run_folder({"resume": folder}):
        raise UserError("memory")
    assert (run.path / "arguments.json").read_text() == before and (run.path / "metrics.jsonl").exists()
    with run_folder({"resume": folder}) as run:
        run.write("metrics.jsonl", {})
    assert len(json.loads((run.path / "arguments.json").read_text())["resumed"]) == 1


def test_an_evaluation_that_is_refused_leaves_no_file(runs, tmp_path, monkeypatch):
    """Guards against the responses of a finished evaluation that a start without a sandbox empties."""
    monkeypatch.setattr(evaluation, "make_sandbox", refuse_sandbox)
    (tmp_path / "out.json.responses.jsonl").write_text("{}\n")
    result = run_here("--model", str(runs[0] / "first" / "checkpoint"), "--output", str(tmp_path / "out.json"),
                      script=evaluation)
    assert result.returncode == 1 and "no sandbox here" in result.stderr
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("out.json.responses.jsonl", "{}\n")]


def test_a_half_written_model_is_no_obstacle_to_resume(runs, tmp_path):
    """Guards against a run, killed before its first checkpoint, that cannot go on."""
    folder = runs[0]
    run = tmp_path / "run"
    (run / "model").mkdir(parents=True)
    shutil.copy(folder / "first" / "arguments.json", run)
    (run / "model" / "config.json").write_text('{"half')
    result = run_here("--resume", str(run))
    assert result.returncode == 0, result.stderr[-2000:]
    assert metrics_of(run) == metrics_of(folder / "first")


def torn(text):
    return text[:30]


def with_nuls(text):
    return "\0" * len(text)


def without_keys(text):
    return "{}"


def a_list(text):
    return f"[{text}]"


@pytest.mark.parametrize("name", ["metrics.jsonl", "rollouts.jsonl", "checkpoints/step-000002/manifest.json"])
@pytest.mark.parametrize("damage", [None, torn, with_nuls, a_list, without_keys])
def test_a_run_goes_back_behind_damage_to_whatever_it_reads(runs, tmp_path, capsys, name, damage):
    """Guards against files that are filled up with NULs to their recorded size, and a traceback for JSON of another
    shape."""
    run, checkpoints = tmp_path / "run", tmp_path / "run" / "checkpoints"
    shutil.copytree(runs[0] / "first", run)
    assert sft.newest_checkpoint(checkpoints, False)[1]["step"] == 2
    shutil.copytree(checkpoints / "step-000002", checkpoints / "step-000001")
    manifest = checkpoints / "step-000001" / "manifest.json"
    record = json.loads(manifest.read_text())
    begun = {file: (run / file).read_bytes().find(b"\n") + 1 for file in record["bytes"]}
    manifest.write_text(json.dumps(record | {"step": 1, "bytes": begun}))

    if damage:
        text = (run / name).read_text()
        kept = text[:begun.get(name, 0)]
        (run / name).write_text(kept + damage(text[len(kept):]))
    else:
        (run / name).unlink()
    before_all = damage is None and name.endswith(".jsonl")
    if not before_all:
        assert sft.newest_checkpoint(checkpoints, False)[1]["step"] == 1
        assert re.search(rf"step-000002 is damaged \(.*{Path(name).name}.*going back", capsys.readouterr().out)
        shutil.rmtree(checkpoints / "step-000001")
    with pytest.raises(UserError, match=rf"every checkpoint is damaged \(.*{Path(name).name}.*from the beginning"):
        sft.newest_checkpoint(checkpoints, False)
    # What only reads the weights does not need the files beside them.
    if "manifest" not in name:
        assert sft.newest_checkpoint(checkpoints, True)[1]["step"] == 2


@pytest.mark.parametrize("change, line", [
    ([], "found list, needed is a JSON object"),
    ({"arguments": [1]}, "not the folder of a run"),
    ({"resumed": "once"}, "not the folder of a run"),
    ({"steps": "many"}, "argument --steps: invalid int value: 'many'"),
    ({"steps": True}, "argument --steps: expected one argument"),
    ({"steps": False}, "argument --steps: invalid int value: 'False'"),
    ({"minibatches": 0}, "argument --minibatches: 0: must be at least 1"),
    ({"gamma": math.nan}, "argument --gamma: nan: must be at least 0.0"),
    ({"reward": "none"}, "argument --reward: invalid choice: 'none'"),
    ({"tf32": "yes"}, "argument --tf32: ignored explicit argument 'yes'"),
    ({"actor_rl": 1.0}, "unrecognized arguments: --actor_rl=1.0"),
    ({"export": None}, "arguments.json: export is null"),
])
def test_arguments_that_the_parser_would_refuse_are_refused_when_they_are_read_back(runs, tmp_path, change, line):
    """Guards against an edited arguments.json that trains with minibatches of nothing, or ends in a traceback."""
    record = json.loads((runs[0] / "first" / "arguments.json").read_text())
    if not change:
        record = []
    elif change.keys() <= {"arguments", "resumed"}:
        record |= change
    else:
        record["arguments"] |= change
    (tmp_path / "arguments.json").write_text(json.dumps(record))
    result = run_here("--resume", str(tmp_path))
    assert result.returncode == 2 and line in result.stderr and "Traceback" not in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["arguments.json"]


def test_arguments_that_a_run_has_written_are_taken_as_they_are(tmp_path):
    """Guards against a default that its own flag refuses, and a value that a text does not hold exactly."""
    args = ppo.parse_arguments(["--value_clip", "inf", "--lam_actor", "adaptive", "--seed", "-3", "--tf32",
                                "--actor_lr", "0.1234567890123", "--run_dir", " a=b"])
    (tmp_path / "arguments.json").write_text(json.dumps({"arguments": vars(args)}))
    again = ppo.parse_arguments(["--resume", str(tmp_path)])
    assert vars(again) == vars(args) | {"resume": str(tmp_path), "run_dir": str(tmp_path)}


def test_a_damaged_warm_start_is_made_anew(runs, tmp_path, capsys, monkeypatch):
    """Guards against a traceback for half a file of traces, or for the record of another warm start."""
    monkeypatch.setattr(sft, "code_hashes", code_hashes_once)
    file = next((runs[0] / "warm").glob("traces-*.json"))
    assert len(sft.read_traces(file)[0]) == 60
    text = file.read_text()
    for damaged in (text[:-9], "", "{}", "[1, 2]", "[[1], [2]]", "\0" * 99):
        (tmp_path / "traces.json").write_text(damaged)
        assert sft.read_traces(tmp_path / "traces.json") is None
        assert "traces.json is damaged, and made anew" in capsys.readouterr().out
    assert sft.read_traces(tmp_path / "no.json") is None and not capsys.readouterr().out

    recipe = sft.warm_start_recipe(ppo.parse_arguments(TINY))
    name = sft.warm_start_folder(tmp_path, recipe, ["a"], ["b"]).name
    other = tmp_path / f"{name[:-16]}{'f' * 16}"
    other.mkdir()
    for damaged in ("", "[]", "{}", '{"code": 5}', '{"code": "abc"}'):
        (other / "arguments.json").write_text(damaged)
        assert sft.warm_start_folder(tmp_path, recipe, ["a"], ["b"]).name == name


@pytest.mark.parametrize("flags, line", [(["--steps", "0"], "ppo.py: error: argument --steps: 0: must be at least 1"),
                                         (["--train_data", "nowhere.jsonl"], "error: nowhere.jsonl: no such file")])
def test_under_torchrun_an_error_is_the_last_thing_on_the_screen_and_once(tmp_path, monkeypatch, flags, line):
    """Guards against an error above two screens of torchrun's own traceback, or from every rank."""
    report = tmp_path / "error.json"
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(report))
    monkeypatch.chdir(tmp_path)
    result = run_here(*flags)
    assert result.returncode != 0 and result.stderr == ""
    first = ProcessFailure(0, 1, result.returncode, str(report))
    ended = ProcessFailure(1, 2, -15, "")
    *_, last, border = str(ChildFailedError("ppo.py", {0: first, 1: ended})).splitlines()
    assert line in last and set(border) == {"="}

    # Another rank leaves it to the first, unless it is alone with its error.
    waits = []
    monkeypatch.setattr(evaluation.time, "sleep", waits.append)
    monkeypatch.setenv("RANK", "1")
    evaluation.print_last("memory")
    assert waits == [evaluation.OTHER_RANKS_WAIT] and "memory" in report.read_text()


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
@pytest.mark.parametrize("script", ["eval", "sft", "ppo"])
def test_an_interrupt_during_the_imports_is_one_line(script, tmp_path):
    """Guards against a traceback through torch for a command that was regretted at once."""
    process = subprocess.Popen([sys.executable, str(ROOT / f"{script}.py")], stdout=subprocess.PIPE, cwd=tmp_path,
                               stderr=subprocess.STDOUT, text=True)
    maps = Path(f"/proc/{process.pid}/maps")
    while "libtorch" not in maps.read_text():
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=60)[0] == "\ninterrupted\n" and process.returncode == 130


def test_a_run_says_that_it_waits_for_another_one_s_warm_start(runs, tmp_path):
    """Guards against minutes of silence that look like a hang."""
    log, warm = tmp_path / "log", runs[0] / "warm"
    with open(finished(warm).with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        [process] = start_ranks(1, log, *SFT, "--warm_start_dir", str(warm), script="sft")
        for _ in range(3000):
            if log.exists() and f"waiting for the run that makes {finished(warm)}\n" in log.read_text():
                break
            assert process.exitcode is None, log.read_text()[-3000:]
            time.sleep(0.01)
        else:
            pytest.fail("nothing was said")
    process.join(60)
    assert process.exitcode == 0 and "warm start: reusing" in log.read_text()


def test_an_error_is_a_non_zero_exit_status_and_one_line(runs):
    """The same seen from outside: what a job scheduler gets."""
    assert runs[1]["refused"] == (1, "error: nowhere.jsonl: no such file, and not a hub id (OWNER/NAME)")
