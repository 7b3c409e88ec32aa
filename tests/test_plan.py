"""Is the plan of runs/plan.py what a model of that shape holds, and do the scripts for large models pass
flags that exist and a plan that fits? No test allocates what it counts: tensors are on the device "meta"."""
import argparse
import os
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface, AutoModelForCausalLM, Qwen2Config

import eval as evaluation
import ppo
import rollout
import sft
from runs import plan as planner
from sandbox import UserError

ROOT = Path(__file__).parent.parent
LONG_ROWS = ["--max_prompt_tokens", "2048", "--max_response_tokens", "16384"]
LARGE = ["--dtype", "bf16", "--activation_checkpointing", "--token_budget", "18432", *LONG_ROWS]


def config_of(name, **changes):
    return Qwen2Config(**dict(zip(planner.NAMES, planner.SHAPES[name])) | changes)


def planned(name, *flags, gpus=8, **options):
    return planner.plan(config_of(name), ppo.parse_arguments([*LARGE, *flags]), gpus, **options)


# ------------------------------------------------------------------------------------------------------------
# Counting


class Counter(TorchDispatchMode):
    """Bytes of the tensors that are alive now, and at most, without weights and their gradients: those are
    another part of the plan."""

    def __init__(self, weights, with_gradients=False):
        super().__init__()
        self.alive = {id(weight.untyped_storage()) for weight in weights}
        self.left_out = set() if with_gradients else {weight.shape for weight in weights}
        self.now = self.peak = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self.count(tensor.untyped_storage(), tensor.shape in self.left_out)
        return result

    def count(self, storage, is_left_out):
        key, size = id(storage), 0 if is_left_out else storage.nbytes()
        if key not in self.alive:  # views share what is counted already
            self.alive.add(key)
            self.now += size
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self.forget, key, size)

    def forget(self, key, size):
        self.alive.discard(key)
        self.now -= size


class FlashTwin(torch.autograd.Function):
    """What FlashAttention keeps and makes; it computes nothing."""

    @staticmethod
    def forward(ctx, query, key, value):
        out = torch.empty_like(query)
        normaliser = torch.empty(query.shape[:2], dtype=torch.float32, device=query.device)
        ctx.save_for_backward(query, key, value, out, normaliser)
        return out

    @staticmethod
    def backward(ctx, gradient):
        query, key, value, _, _ = ctx.saved_tensors
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


def flash_twin(module, query, key, value, attention_mask, **kwargs):
    query, key, value = (x[0].transpose(0, 1) for x in (query, key, value))  # (T, heads, D)
    repeats = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(repeats, 1) for x in (key, value))
    return FlashTwin.apply(query, key, value)[None], None


AttentionInterface.register("twin_of_kernel", flash_twin)


def model_on_meta(name, layers=1):
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(
            config_of(name, num_hidden_layers=layers), attn_implementation="twin_of_kernel", dtype=torch.bfloat16)


@pytest.mark.parametrize("name", ["0.5B", "7B", "32B"])
def test_a_layer_holds_what_is_counted(name):
    """Guards against a plan that forgets the gradients of the feed-forward part, or the fp32 copies in the
    norms: it said 3.5 GiB for 5.5 (7B, 18,432 tokens)."""
    tokens, config, dtype = 18432, config_of(name), torch.bfloat16
    layer = model_on_meta(name).model.layers[0]
    angles = torch.empty(1, tokens, rollout.head_dim(config), device="meta", dtype=dtype)
    hidden = torch.empty(1, tokens, config.hidden_size, device="meta", dtype=dtype, requires_grad=True)
    kept, added = planner.layer_bytes(config, 2)
    with Counter(list(layer.parameters())) as counter:
        output = layer(hidden * 1, position_embeddings=(angles, angles))
        assert counter.now - output.nbytes == pytest.approx(tokens * kept, rel=0.01)
        output.backward(torch.empty_like(output))
    assert counter.peak - output.nbytes == pytest.approx(tokens * (kept + added), rel=0.01)


@pytest.mark.parametrize("flags", [[], ["--activation_checkpointing"]])
def test_the_layers_hold_together_what_is_counted(flags):
    """Guards against a plan that counts one layer where all are kept, or all where one is computed again."""
    layers, tokens = 6, 18432
    lm = model_on_meta("7B", layers)
    if flags:
        lm.train()
        lm.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    args = ppo.parse_arguments(["--dtype", "bf16", "--token_budget", str(tokens), *flags])
    parameters = planner.count_parameters(lm.config)
    _, in_layer, _ = planner.training_moments(lm.config, args, parameters, "cuda")
    with Counter(list(lm.parameters())) as counter:
        ids = torch.zeros(1, tokens, device="meta", dtype=torch.long)
        output = lm.model(input_ids=ids, position_ids=ids, use_cache=False).last_hidden_state
        output.backward(torch.empty_like(output))
    assert counter.peak == pytest.approx(in_layer["activations"], rel=0.05)
    # Weights and gradients: bf16 of the root and the head, 4 times bf16 and once fp32 of one layer.
    gathered = 2 * parameters.root + 2 * parameters.head + 12 * parameters.layer
    assert in_layer["gathered"] == gathered


@pytest.mark.parametrize("name", ["0.5B", "7B"])
@pytest.mark.parametrize("with_entropy", [False, True])
def test_the_head_holds_what_is_counted(name, with_entropy):
    """Guards against logits planned without their gradients, and against forgetting that a chunk's gradient
    of the head, the sum so far and the new sum are there at once."""
    lm = model_on_meta(name)
    head = lm.lm_head.weight
    chunk = sft.LOGIT_BYTES["cuda"] // (4 * lm.config.vocab_size)
    parameters = planner.count_parameters(lm.config)
    args = ppo.parse_arguments(LARGE)
    in_head, _, _ = planner.training_moments(lm.config, args, parameters, "cuda")

    def peak(**options):
        hidden = torch.empty(3, chunk, lm.config.hidden_size, device="meta", dtype=torch.bfloat16,
                             requires_grad=True)
        targets = torch.empty(chunk, device="meta", dtype=torch.long)
        with Counter([head], **options) as counter:
            total = 0.0
            for part in hidden:  # as in Policy.forward, which asks for values that "meta" has not
                columns = checkpoint(sft.Policy(lm).head, part, targets, 1.0, with_entropy, use_reentrant=False)
                total = total + sum(column.sum() for column in columns if column is not None)
            total.backward()
        return counter.peak

    assert peak() == pytest.approx(in_head["logits"], rel=0.05)
    gradients = in_head["gathered"] - 2 * parameters.root
    assert peak(with_gradients=True) == pytest.approx(max(gradients, head.nbytes + in_head["logits"]), rel=0.05)


def test_a_tick_holds_what_is_counted():
    """Guards against a KV cache that leaves no room for prompts and for the float64 of sampling."""
    config, args = config_of("7B"), ppo.parse_arguments([*LARGE, "--n_slots", "64"])
    tokens = rollout.PREFILL_TOKENS + args.max_prompt_tokens
    layer = model_on_meta("7B").model.layers[0]
    angles = torch.empty(1, tokens, rollout.head_dim(config), device="meta", dtype=torch.bfloat16)
    with torch.no_grad(), Counter(list(layer.parameters())) as counter:
        hidden = torch.empty(1, tokens, config.hidden_size, device="meta", dtype=torch.bfloat16)
        layer(hidden, position_embeddings=(angles, angles))
    assert planned("7B").rollouts["prefill"] == pytest.approx(counter.peak / planner.GIB, rel=0.01)

    for top_p in (1.0, 0.7):
        with Counter([]) as counter:
            logits = torch.empty(64, config.vocab_size, device="meta")
            rollout.sample(logits, torch.empty(64, device="meta", dtype=torch.float64), 1.0, top_p)
        part = planned("7B", "--n_slots", "64", "--eval_top_p", str(top_p)).rollouts["sampling"]
        assert part == pytest.approx(counter.peak / planner.GIB, rel=0.01)


# ------------------------------------------------------------------------------------------------------------
# The plan


def test_the_plan_adds_up_and_refuses_what_cannot_fit(tmp_path, capsys):
    """Guards against an out-of-memory error after an hour, and against a plan that forgets the critic."""
    config_of("32B").save_pretrained(tmp_path)
    flags = ["--model", str(tmp_path), *LARGE, "--preset", "paper", "--n_slots", "8", "--max_response_tokens",
             "6144"]
    args = ppo.parse_arguments(flags)
    found = planner.plan(rollout.load_config(args.model), args, 16)
    parameters = planner.count_parameters(config_of("32B"))
    assert parameters.total == pytest.approx(32.8e9, abs=0.1e9)  # as published
    assert found.stays["sampler"] == pytest.approx(2 * 32.76e9 / 2**30, rel=0.01)
    assert found.stays["actor"] == pytest.approx(found.stays["sampler"] * 2 / 16)
    assert found.stays["moments"] == pytest.approx(2 * (found.stays["actor"] + found.stays["critic"]))
    assert found.rollouts["KV cache"] == pytest.approx(8 * 8192 * 256 / 2**20)  # 256 KiB per token
    with pytest.raises(UserError, match="does not fit: .* the largest part is sampler with 61.0 GiB"):
        planner.print_plan(args, 16, 141)
    planner.print_plan(ppo.parse_arguments([*flags, "--cpu_offload"]), 16, 141)
    printed = capsys.readouterr().out
    assert "fits: " in printed and "pinned_max_round_threshold_mb:1" in printed
    with pytest.raises(UserError, match="does not divide 8 GPUs"):
        planner.print_plan(ppo.parse_arguments([*flags, "--replicas", "3"]), 8, 141)
    with pytest.raises(SystemExit, match="error: does not fit: ") as refused:
        planner.main(["16", "80", *flags, "--cpu_offload"])
    assert "\n" not in str(refused.value)


def test_rollouts_and_training_are_not_added():
    """Guards against a plan that refuses what fits: the KV cache is freed before the training begins."""
    small, large = (planned("7B", "--kv_gib", str(gib)) for gib in (1, 40))
    for found in (small, large):
        stays = sum(found.stays.values())
        phases = [sum(found.rollouts.values()), sum(found.training.values())]
        assert found.total == pytest.approx(stays + max(phases))
        assert not found.rollouts.keys() & found.training.keys()
    assert small.training == large.training and small.larger_phase().keys() >= small.training.keys()
    assert large.total - large.rollouts["KV cache"] < small.total < large.total


def test_states_move_to_the_host_and_grow_with_replicas():
    """Guards against a host that is killed for memory: states of all GPUs of a node lie there, of each replica
    anew, and every process loads a whole model."""
    on_gpu, offloaded = planned("7B", gpus=16), planned("7B", "--cpu_offload", gpus=16)
    doubled = planned("7B", "--cpu_offload", "--replicas", "2", gpus=16)
    with_reference = planned("7B", "--cpu_offload", "--kl_coef", "0.1", gpus=16)
    parts = ("actor", "critic", "moments")
    assert not on_gpu.host and not offloaded.stays.keys() & set(parts)
    for part in parts:
        assert offloaded.host[part] == pytest.approx(8 * on_gpu.stays[part])  # eight GPUs per node
        assert doubled.host[part] == pytest.approx(2 * offloaded.host[part])
    assert on_gpu.training["gradients"] == pytest.approx(on_gpu.stays["actor"])
    assert "gradients" not in offloaded.training
    assert offloaded.host["gradients"] == pytest.approx(offloaded.host["actor"])
    assert with_reference.host["reference"] == pytest.approx(offloaded.host["actor"])
    parameters = planner.count_parameters(config_of("7B")).total
    assert on_gpu.loading["whole models"] == pytest.approx(8 * 4 * parameters / 2**30)
    assert offloaded.loading["shards"] == pytest.approx(offloaded.host["actor"])


def test_pinned_memory_is_rounded_up_to_powers_of_two():
    """Guards against a host that needs nearly twice what is planned where a script forgets the setting."""
    parameters = planner.count_parameters(config_of("7B"))
    assert planner.pinned_rounding(parameters, 8) == pytest.approx(1.90, abs=0.01)
    parameters.sizes = [(8, 1024), (8, 1025)]  # shards of 1,024 and 1,025 numbers: 4 and 8 KiB
    assert planner.pinned_rounding(parameters, 8) == pytest.approx((1024 + 2048) / (1024 + 1025))


def test_pages_hold_at_least_the_rows_of_slots():
    """Guards against a plan that counts rows of the longest length, where most are much shorter."""
    config, args = config_of("7B"), ppo.parse_arguments(LARGE)
    assert planner.rows_that_fit(config, args, 16, 18432) == (16, 16)  # 56 KiB per token
    assert planner.rows_that_fit(config, args, 16, 4608) == (16, 65)
    for length in range(1, 18433, 97):
        by_slots, by_pages = planner.rows_that_fit(config, args, 16, length)
        assert by_slots == 16 and by_pages >= by_slots
        assert by_pages == 16 * 2**30 // (-(-length // 256) * 256 * 56 * 1024)


def test_a_cpu_has_its_own_logits_and_no_gpu_that_limits_the_cache(capsys):
    """Guards against 0.7 GiB of logits that a CPU never makes, and against slots cut to a GPU's memory."""
    args = ppo.parse_arguments([])
    config = sft.starting_point("")[0]
    parameters = planner.count_parameters(config)
    of_cpu, of_gpu = (planner.training_moments(config, args, parameters, device)[0]["logits"]
                      for device in ("cpu", "cuda"))
    assert of_cpu == of_gpu / 8
    on_cpu, on_gpu = (planner.plan(config, args, 2, gib=0.2, device=device) for device in ("cpu", "cuda"))
    assert on_cpu.rollouts["KV cache"] == planner.plan(config, args, 2).rollouts["KV cache"]
    assert on_gpu.rollouts["KV cache"] < on_cpu.rollouts["KV cache"]
    planner.main(["2", "8", "--device", "cpu", "--lengths", "200", "--n_slots", "16"])
    assert "of 7.2 GiB per process" in capsys.readouterr().out
    offloaded = ppo.parse_arguments(["--cpu_offload"])
    assert planner.plan(config, offloaded, 2, device="cpu").stays.keys() >= {"actor", "moments"}


def test_the_committed_tables_are_what_is_printed(capsys):
    """Guards against results/plan.md of another plan."""
    planner.main([])
    assert (ROOT / "results" / "plan.md").read_text() == "$ python runs/plan.py\n" + capsys.readouterr().out


# ------------------------------------------------------------------------------------------------------------
# The scripts

STUB = """#!/usr/bin/env bash
printf '%s\\n' "OMP $OMP_NUM_THREADS ALLOC $PYTORCH_ALLOC_CONF" "$@" END >> "$CALLS"
echo "checkpoint: $PWD"
"""


def calls_of(script, tmp_path, *arguments, **environment):
    """The commands of a shell script: [(environment, script, arguments)], with stubs for python and torchrun."""
    for name in ("python", "torchrun"):
        stub = tmp_path / "bin" / name
        stub.parent.mkdir(exist_ok=True)
        stub.write_text(STUB)
        stub.chmod(0o755)
    log = tmp_path / "calls"
    log.unlink(missing_ok=True)
    variables = {"PATH": f"{tmp_path}/bin:{os.environ['PATH']}", "CALLS": str(log), "OUT": str(tmp_path / "out")}
    result = subprocess.run(["bash", ROOT / "runs" / script, *arguments], env=variables | environment,
                            capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    calls = []
    for block in log.read_text().split("END\n")[:-1]:
        first, *words = block.split("\n")[:-1]
        at = next(i for i, word in enumerate(words) if word.endswith(".py"))
        calls.append((first, words[at], words[at + 1:]))
    return calls


def parse_warm_start(words):
    parser = argparse.ArgumentParser(allow_abbrev=False)
    if words[0] == "curate":
        sft.add_curate_arguments(parser)
        return parser.parse_args(words[1:])
    parser.add_argument("--traces")
    sft.add_warm_start_arguments(parser)
    sft.add_trainer_arguments(parser)
    evaluation.add_format_arguments(parser)
    return parser.parse_args(words)


def parse_evaluation(words, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["eval.py", *words])
    return evaluation.parse_arguments()


def test_the_scripts_for_large_models_pass_flags_that_exist_and_fit(tmp_path, monkeypatch, capsys):
    """Guards against a script that nobody here can run: renamed flags, a plan that no longer fits, AdamW on one
    core of the host, pinned memory of twice the size."""
    for name in ("7B", "32B"):
        config_of(name).save_pretrained(tmp_path / name)
    files = {"DATA": "data", "TRACES": "traces", "AIME24": "a", "AIME25": "b"}
    calls = calls_of("7b.sh", tmp_path, MODEL=str(tmp_path / "7B"), **files)
    assert [script for _, script, _ in calls] == ["runs/plan.py", "sft.py", "sft.py", "ppo.py", "eval.py"]
    planner.main(calls[0][2])
    for _, _, words in calls[1:3]:
        parse_warm_start(words)
    of_7b = ppo.parse_arguments(calls[3][2])
    parse_evaluation(calls[4][2], monkeypatch)
    assert "fits: " in capsys.readouterr().out

    model = {"MODEL": str(tmp_path / "32B")}
    two_nodes = ["--nnodes", "2", "--nproc_per_node", "8"]
    warm_start, = calls_of("paper_32b.sh", tmp_path, *two_nodes, **model, **files)
    training, = calls_of("paper_32b.sh", tmp_path, *two_nodes, WARM_START=model["MODEL"], **model, **files)
    parse_warm_start(warm_start[2])
    of_32b = ppo.parse_arguments(training[2])
    planner.print_plan(of_32b, 16, 141)
    assert of_7b.dtype == of_32b.dtype == "bf16"

    threads = max(1, len(os.sched_getaffinity(0)) // 8)
    for environment, _, _ in [*calls, warm_start, training]:
        assert environment.startswith(f"OMP {threads} ALLOC ")
        assert "pinned_max_round_threshold_mb:1" in environment
        assert "expandable_segments:True" in environment
