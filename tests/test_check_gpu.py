"""Does runs/check_gpu.py find what is wrong, survive it, and report what it has measured? On a CPU, with tiny models."""
import contextlib
import inspect
import json
import time
from types import SimpleNamespace

import pytest
import torch

import eval as evaluation
import rollout
from runs import check_gpu
from runs.check_gpu import (
    CHECKS,
    Check,
    Report,
    in_own_process,
    in_this_process,
    main,
    make_setup,
    run_all,
)

# In place of ppo.py: what a run leaves.
STUB_RUN = """
import json, sys
from pathlib import Path
value = lambda flag: sys.argv[sys.argv.index(flag) + 1]
folder = Path(value("--run_dir"))
folder.mkdir()
(folder / "arguments.json").write_text(json.dumps({"device": "cpu"}))
steps = [{"step": i, "seconds_rollout": 1.0, "seconds_update": 0.5, "sampler_difference": 2e-7}
         for i in range(int(value("--steps")))]
(folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\\n" for line in [{"evaluation": "x"}, *steps]))
"""

# In place of a check's own process: it has measured something when the worst happens.
STUB_CHILD = """
import json, os, subprocess, sys, time
from pathlib import Path
value = lambda flag: sys.argv[sys.argv.index(flag) + 1]
figure = {"name": "so far", "value": 7, "unit": "", "note": ""}
result = {"check": value("--child"), "status": "failed", "reason": "no result", "seconds": None, "figures": [figure]}
Path(value("--result")).write_text(json.dumps(result))
print("the last line", flush=True)
"""


@pytest.fixture
def ppo_script(tmp_path, monkeypatch):
    """ppo.py as far as `check_run` sees it; a test may write another text."""
    script = tmp_path / "stub_run.py"
    script.write_text(STUB_RUN)
    monkeypatch.setattr(check_gpu, "PPO_SCRIPT", script)
    return script


def result_of(name):
    [check] = [check for check in CHECKS if check.name == name]
    return in_this_process(check, make_setup("cpu"), 1000.0)


def figures(result):
    return {figure["name"]: figure["value"] for figure in result["figures"]}


class TorchWithoutCuda:
    def __getattr__(self, name):
        assert name != "cuda", "a CPU was checked with torch.cuda"
        return getattr(torch, name)


def test_all_checks_run_on_a_cpu_and_the_table_says_what_the_json_says(tmp_path, monkeypatch, capsys, ppo_script):
    """Guards against a check that fails where nothing is wrong, a figure that only one of the two files has,
    one that could be taken for a GPU's, and a use of CUDA where there is none."""
    monkeypatch.setattr(check_gpu, "torch", TorchWithoutCuda())
    assert main(["--device", "cpu", str(tmp_path / "out")], run_one=in_this_process) == 0
    record = json.loads((tmp_path / "out" / "check_gpu.json").read_text())
    text = (tmp_path / "out" / "check_gpu.md").read_text()
    assert text in capsys.readouterr().out

    status = {check["check"]: check["status"] for check in record["checks"]}
    measured = ["device", "decode 0.5B", "training 0.5B", "decode 7B"]
    assert status == dict.fromkeys(status, "passed") | dict.fromkeys(measured, "measured") | {"varlen": "skipped"}
    assert [check.name for check in CHECKS] == list(status)

    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()[2:]]
    for check in record["checks"]:
        name, word, reason, *_ = lines.pop(0)
        assert [name, word, reason] == [check["check"], check["status"], check["reason"]]
        for figure in check["figures"]:
            _, _, name, value, unit, note = lines.pop(0)
            assert (name, unit) == (figure["name"], figure["unit"])
            assert note == figure["note"] == "cpu, tiny: logic only"
            if isinstance(figure["value"], float):
                assert float(value) == pytest.approx(figure["value"], rel=1e-3)
            else:
                assert value == str(figure["value"])
    assert not lines


def test_without_a_gpu_it_says_so_in_one_line(tmp_path, monkeypatch, capsys):
    """Guards against a traceback, and against figures of a CPU under the name of a GPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main([str(tmp_path / "out")]) == 2
    out, err = capsys.readouterr()
    assert not out and err.count("\n") == 1 and "no CUDA device" in err
    assert not (tmp_path / "out").exists()


def test_what_raises_or_breaks_a_condition_has_failed_and_the_others_go_on(tmp_path, monkeypatch):
    """Guards against a wrong result that ends with exit status 0, and one bug that hides all else."""
    def breaks(setup, report):
        report.require(False, "one is not two")
        report.figure("afterwards", float("nan"))

    def raises(setup, report):
        report.figure("before", 1)
        raise RuntimeError("no kernel | here")

    def lacks_memory(setup, report):
        with report.part(setup, "large"):
            raise torch.OutOfMemoryError("CUDA out of memory")
        with report.part(setup, "small"):
            report.figure("small", 2)

    checks = [Check("breaks", breaks, 1), Check("raises", raises, 1), Check("lacks memory", lacks_memory, 1)]
    monkeypatch.setattr(check_gpu, "CHECKS", checks)
    assert main(["--device", "cpu", str(tmp_path)], run_one=in_this_process) == 1
    broken, raised, short = json.loads((tmp_path / "check_gpu.json").read_text())["checks"]
    assert (broken["status"], broken["reason"]) == ("failed", "one is not two")
    assert figures(broken) == {"afterwards": "nan"}
    assert (raised["status"], raised["reason"]) == ("failed", "RuntimeError: no kernel | here")
    assert figures(raised) == {"before": 1} and "raise RuntimeError" in raised["log"]
    assert short["status"] == "measured" and figures(short) == {"large": "skipped: memory", "small": 2}
    assert "RuntimeError: no kernel / here" in (tmp_path / "check_gpu.md").read_text()


def test_what_does_not_fit_into_the_time_is_skipped_and_what_is_left_over_is_given_on():
    """Guards against a run that takes as long as it likes, and late checks that starve the early ones."""
    limits = {}

    def run_one(check, setup, limit):
        limits[check.name] = limit
        return Report(check.name, "", limit).content | {"seconds": 0.0}

    checks = [Check("first", None, 100), Check("too long", None, 500), Check("last", None, 100)]
    seen = []
    results = run_all(checks, make_setup("cpu"), 250, run_one, time.monotonic(), lambda found: seen.append(len(found)))
    assert [result["status"] for result in results] == ["failed", "skipped", "failed"]
    assert results[1]["reason"] == "time" and seen == [1, 2, 3]
    # The first has its own seconds; the last has all that is left.
    assert limits["first"] == 100 and limits["last"] == pytest.approx(250, abs=2)
    assert sum(check.seconds for check in CHECKS) <= 470


@pytest.mark.parametrize("end, reason", [
    ("os.abort()", "exit status -6"),
    ("sys.exit(3)", "exit status 3"),
    ("subprocess.Popen(['sleep', '60']); time.sleep(60)", "still running after 3 s"),
])
def test_a_process_that_faults_or_hangs_leaves_its_figures(tmp_path, monkeypatch, end, reason):
    """Guards against a kernel that takes down all checks, or holds them up, and the reason why being lost."""
    child = tmp_path / "child.py"
    child.write_text(STUB_CHILD + end)
    monkeypatch.setattr(check_gpu, "__file__", str(child))
    result = in_own_process(CHECKS[0], make_setup("cpu"), 3.0)
    assert result["status"] == "failed" and reason in result["reason"]
    assert figures(result) == {"so far": 7} and "the last line" in result["log"]
    assert result["seconds"] < 30


def test_each_figure_is_on_the_disk_once_it_is_measured(tmp_path):
    """Guards against figures that die with the process that has measured them."""
    report = Report("name", "note", 10.0, tmp_path / "result.json")
    for n in (1, 2):
        report.figure(f"figure {n}", n, "ms")
        on_disk = json.loads((tmp_path / "result.json").read_text())
        assert on_disk["status"] == "failed" and list(figures(on_disk).values()) == list(range(1, n + 1))


def test_a_check_runs_in_a_process_of_its_own(tmp_path):
    """Guards against a command line that the file does not understand when it starts itself."""
    assert main(["--device", "cpu", str(tmp_path), "--checks", "device"]) == 0
    [result] = json.loads((tmp_path / "check_gpu.json").read_text())["checks"]
    assert result["status"] == "measured" and figures(result)["torch"] == torch.__version__


def test_a_check_on_a_gpu_starts_as_the_scripts_do(tmp_path, monkeypatch):
    """Guards against figures of a CPU under the name of a GPU, and of settings that no script has."""
    signature = inspect.signature(evaluation.use_device)

    def use_device(*arguments, **options):
        given = signature.bind(*arguments, **options).arguments
        assert given["wanted"] == "cuda" and not given["may_use_cpu"]
        given["process"].device = torch.device("cuda:5")

    def check(setup, report):
        report.figure("device", str(setup.device))
        report.figure("in a group", torch.distributed.is_initialized())

    monkeypatch.setattr(evaluation, "use_device", use_device)
    monkeypatch.setattr(check_gpu, "CHECKS", [Check("a check", check, 1)])
    result = tmp_path / "result.json"
    arguments = ["--device", "cuda", "--child", "a check", "--result", str(result), "--limit", "100"]
    check_gpu.run_child(check_gpu.parse_arguments(arguments), make_setup("cuda"))
    assert figures(json.loads(result.read_text())) == {"device": "cuda:5", "in a group": True}


def test_a_wrong_decode_step_is_found_by_both_comparisons(monkeypatch):
    """Guards against checks that pass whatever the engine computes."""
    decode = rollout.one_token_each
    monkeypatch.setattr(rollout, "one_token_each", lambda *arguments: -decode(*arguments))
    greedy = result_of("greedy")
    assert greedy["status"] == "failed"
    assert "fp32: greedy tokens are not those of generate" in greedy["reason"]
    assert "bf16: engine against generate: log-probabilities differ" in greedy["reason"]
    trainer = result_of("trainer")
    assert trainer["status"] == "failed" and "sampler against trainer" in trainer["reason"]


def test_a_wrong_gradient_is_found(monkeypatch):
    """Guards against a backward kernel that nobody compares."""
    whole = rollout.whole_sequences

    def other_gradient_in_bf16(q, k, v, packing, scale):
        if q.dtype == torch.bfloat16:  # the same keys, whose gradient has another sign
            k = 2 * k.detach() - k
        return whole(q, k, v, packing, scale)

    monkeypatch.setattr(rollout, "whole_sequences", other_gradient_in_bf16)
    trainer = result_of("trainer")
    assert trainer["status"] == "failed" and "a gradient in bf16 is not that in fp32" in trainer["reason"]


@pytest.mark.parametrize("error, status, reason", [
    (1e-3, "passed", ""),
    (3.0, "failed", "varlen against SDPA: log-probabilities differ"),
    (0.0, "failed", "both paths computed the same bits"),
])
def test_the_varlen_path_is_compared_with_sdpa(monkeypatch, error, status, reason):
    """Guards against a path that is found but not forced, or whose log-probabilities nobody compares."""
    forced = []
    real = check_gpu.generate

    async def generate(model, *arguments, logits_processor=None, **options):
        is_on = rollout.uses_varlen(model.device, model.dtype)
        forced.append(is_on)

        def processor(logits, trajectories):
            if is_on:  # this is the kernel
                logits = logits + error * torch.sin(torch.arange(logits.shape[1]))
            return logits_processor(logits, trajectories)

        with pytest.MonkeyPatch.context() as patch:  # a CPU has none
            patch.setattr(rollout, "uses_varlen", lambda *_: False)
            return await real(model, *arguments, logits_processor=processor, **options)

    monkeypatch.setattr(rollout, "uses_varlen", lambda device, dtype: True, raising=False)
    monkeypatch.setattr(check_gpu, "generate", generate)
    result = result_of("varlen")
    assert result["status"] == status and reason in result["reason"]
    assert forced == [True, False, True, False, False] * len(make_setup("cpu").head_dims)


def test_a_run_that_fails_is_reported_with_its_last_lines(ppo_script):
    """Guards against a first step that never ran and a reason that only the lost terminal showed."""
    ppo_script.write_text("import sys; print('out of luck'); sys.exit(3)")
    result = result_of("run")
    assert result["status"] == "failed" and "exit status of ppo.py: 3" in result["reason"]
    assert "0 of 2 steps" in result["reason"] and "out of luck" in result["log"]


def test_the_lines_that_only_a_gpu_runs_do_run(monkeypatch):
    """Guards against a name that is not torch's, or a figure that ends a check, where no test machine goes."""
    memory = dict(memory_allocated=lambda: 2**30, max_memory_allocated=lambda: 3 * 2**30,
                  reset_peak_memory_stats=lambda: None, synchronize=lambda: None, empty_cache=lambda: None)
    properties = SimpleNamespace(
        name="a card", total_memory=24 * 2**30, major=9, minor=0, multi_processor_count=132)
    machine = dict(get_device_properties=lambda device: properties, mem_get_info=lambda device: (2**30, 2**31),
                   device_count=lambda: 1, is_bf16_supported=lambda including_emulation: True)
    pretended = memory | machine
    for name, function in pretended.items():  # torch's own take what is passed here
        inspect.signature(getattr(torch.cuda, name)).bind(*inspect.signature(function).parameters)

    # Only for this file: the code under test stays on the CPU.
    pretended_torch = TorchWithoutCuda()
    pretended_torch.__dict__["cuda"] = SimpleNamespace(**pretended)
    monkeypatch.setattr(check_gpu, "torch", pretended_torch)
    monkeypatch.setattr(check_gpu, "on_gpu", lambda device: True)
    monkeypatch.setattr(check_gpu, "driver_version", lambda: "580")
    results = {name: result_of(name) for name in ("device", "decode 0.5B", "training 0.5B")}
    assert {result["status"] for result in results.values()} == {"measured"}, results
    assert figures(results["device"])["memory"] == 24
    decode = figures(results["decode 0.5B"])
    training = figures(results["training 0.5B"])
    assert decode["batch 4: peak memory of the sampler"] == training["activation checkpointing on: peak memory"] == 3
    for found in (decode, training):
        with contextlib.suppress(StopIteration):
            assert next(value for name, value in found.items() if "runs/plan.py" in name) > 0


def test_the_shapes_are_those_of_qwen():
    """Guards against a figure of another model: sizes by the parameters of the released checkpoints."""
    count = {}
    for name, shape in make_setup("cuda").shapes.items():
        with torch.device("meta"):
            model = check_gpu.AutoModelForCausalLM.from_config(check_gpu.Qwen2Config(**shape))
        count[name] = sum(p.numel() for p in model.parameters())
    assert count == {"0.5B": 494032768, "7B": 7615616512}
