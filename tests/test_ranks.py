"""Which rank gets which device, and what must hold where weights, shards and messages lie on different ones?"""
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

import eval as evaluation
import ppo
import sft
from sandbox import UserError

ROOT = Path(sft.__file__).parent


@pytest.mark.parametrize("gpus, ranks, wanted, embedded, devices", [
    (0, 1, "auto", True, ["cpu"]), (0, 2, "auto", True, ["cpu"] * 2), (0, 8, "auto", False, ["cpu"] * 8),
    (1, 1, "auto", True, ["cuda:0"]), (1, 1, "auto", False, ["cuda:0"]),
    (1, 2, "auto", True, ["cpu"] * 2),  # README's first command on a machine with one GPU
    (1, 2, "auto", False, "2 ranks on this machine, but 1 GPUs"),
    (2, 2, "auto", True, ["cuda:0", "cuda:1"]), (2, 2, "auto", False, ["cuda:0", "cuda:1"]),
    (8, 2, "auto", False, ["cuda:0", "cuda:1"]),
    (2, 2, "cpu", False, ["cpu"] * 2), (1, 2, "cpu", True, ["cpu"] * 2),
    (2, 1, "cuda", True, ["cuda:0"]), (0, 1, "cuda", True, "1 ranks on this machine, but 0 GPUs"),
    (1, 2, "cuda", True, "2 ranks on this machine, but 1 GPUs"),
])
def test_every_number_of_gpus_and_ranks_gives_devices_or_one_line(gpus, ranks, wanted, embedded, devices, monkeypatch,
                                                                  capsys):
    """Guards against a rank that asks for a GPU that is not there, and two ranks on one, which NCCL refuses."""
    chosen = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setattr(torch.backends.cuda, "enable_cudnn_sdp", lambda on: chosen.append(on))
    monkeypatch.setattr(torch, "set_float32_matmul_precision", chosen.append)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(ranks))
    monkeypatch.setenv("LOCAL_RANK", "0")
    processes = [evaluation.Process(rank, 2 * ranks) for rank in range(ranks)]  # of two machines
    if isinstance(devices, str):
        with pytest.raises(UserError, match=devices):
            evaluation.use_device(processes[0], wanted, embedded)
        return
    for rank, process in enumerate(processes):
        monkeypatch.setenv("LOCAL_RANK", str(rank))
        evaluation.use_device(process, wanted, embedded)
    assert [str(process.device) for process in processes] == devices
    on_gpus = [device for device in devices if device != "cpu"]
    assert [str(device) for device in chosen[::3]] == on_gpus
    assert chosen[1::3] == ["highest"] * len(on_gpus) and chosen[2::3] == [False] * len(on_gpus)
    evaluation.use_device(processes[0], wanted, embedded, tf32=True)
    assert not on_gpus or chosen[-2] == "high"
    said = f"on the CPU: {ranks} ranks, but {gpus} GPUs" in capsys.readouterr().out
    assert said == (wanted == "auto" and gpus > 0 and not on_gpus)


@pytest.mark.parametrize("gpus, ranks, backend", [(0, 2, "gloo"), (1, 2, "gloo"), (2, 2, "cpu:gloo,cuda:nccl")])
def test_nccl_is_not_started_where_ranks_would_share_a_gpu(gpus, ranks, backend, monkeypatch):
    """Guards against a run on the CPU that NCCL ends, and pinned memory that doubles by rounding."""
    asked = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(evaluation.dist, "init_process_group",
                        lambda backend, **options: asked.append((backend, options["timeout"].days)))
    monkeypatch.setattr(evaluation.dist, "destroy_process_group", lambda: None)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(ranks))
    monkeypatch.delenv("PYTORCH_ALLOC_CONF", raising=False)
    with evaluation.distributed():
        allocator = os.environ["PYTORCH_ALLOC_CONF"]
    assert asked == [(backend, 1)]  # others wait a day for the slowest rank
    assert "expandable_segments:True" in allocator and "pinned_max_round_threshold_mb:1" in allocator


def test_the_suite_itself_sees_no_gpu():
    """Guards against tests that pass or fail by the card of the machine."""
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "" and torch.cuda.device_count() == 0


TWO_RANKS = """
import os
import sys
sys.path[:0] = [{root!r}]
import torch, torch.distributed as dist
import eval as evaluation, sft
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor


def main(process):
    torch.manual_seed(0)
    start = [torch.randn(25, 8), torch.randn(8, 24), torch.randn(16, 16)]
    gradients = [[torch.randn_like(p) for p in start] for _ in range(3)]
    mesh = init_device_mesh("cpu", (process.world,))
    ours = [torch.nn.Parameter(distribute_tensor(p, mesh, [Shard(0)])) for p in start]
    optimizer = sft.Muon(ours, 0.1)
    for step in gradients:
        for p, gradient in zip(ours, step):
            p.grad = distribute_tensor(gradient, mesh, [Shard(0)])
        optimizer.step()
    whole = [p.full_tensor().detach() for p in ours]
    if process.rank == 0:
        torch.save(whole, {path!r})
    dist.barrier()
    # The end of torch's threads is not what is tested: there a rank aborted twice in some hundred runs
    # ("terminate called without an active exception").
    os._exit(0)


with evaluation.distributed() as process:
    main(process)
"""


def test_muon_on_two_ranks_has_the_bits_of_one(tmp_path):
    """Guards against rows of the update that go to another rank's shard, also where a shard is smaller, and
    against messages that carry a device."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    running = []
    for ranks, command in ((1, [sys.executable]), (2, torchrun)):
        script = tmp_path / f"{ranks}.py"
        script.write_text(TWO_RANKS.format(root=str(ROOT), path=str(tmp_path / f"{ranks}.pt")))
        running.append(subprocess.Popen([*command, str(script)], stderr=subprocess.PIPE, text=True,
                                        env=os.environ | {"OMP_NUM_THREADS": "1"}))
    for process in running:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors[-3000:]
    one, two = (torch.load(tmp_path / f"{ranks}.pt") for ranks in (1, 2))
    assert all(torch.equal(a, b) for a, b in zip(one, two))


def test_muon_sends_no_tensor_of_a_device_and_steps_where_the_weights_lie(monkeypatch):
    """Guards against a message that comes back on its sender's GPU, and against --cpu_offload, where weights
    lie in host memory and the mesh is the GPU's."""
    sent = []
    gather = sft.dist.all_gather_object

    def noted(result, message, group):
        sent.append(message[0].device.type)
        gather(result, message, group)

    monkeypatch.setattr(sft.dist, "all_gather_object", noted)
    with evaluation.distributed():
        mesh = init_device_mesh("cpu", (1,))
        p = torch.nn.Parameter(distribute_tensor(torch.randn(6, 4), mesh, [Shard(0)]))
        local = p.to_local()
        optimizer = sft.Muon([p], 0.1)
        p.grad = distribute_tensor(torch.randn(6, 4), mesh, [Shard(0)])
        before = local.clone()
        optimizer.step()
        assert sent == ["cpu"] and not torch.equal(local, before)  # in place: no new tensor on another device


def test_actor_and_critic_share_one_mesh(tmp_path, tokenizer, monkeypatch):
    """Guards against new process groups, each with memory of its own, for every model that is sharded."""
    sft.starting_model("", sft.starting_point("")[0], 0).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    made = []
    monkeypatch.setattr(sft, "init_device_mesh", lambda *arguments: made.append(init_device_mesh(*arguments)) or made[0])
    with evaluation.distributed() as process:
        trainer = ppo.Trainer(ppo.parse_arguments([]), str(tmp_path), process)
        assert len(made) == 1 and process.mesh is made[0]
        module = trainer.actor
        examples = [sft.make_example(list(range(5, 15)), [1] * 10)]
        trainer.fill(examples, lambda flat, packing: {"logprobs": trainer.logprobs(module, flat, packing)[0]})
        # The root has given its gathered weights back.
        assert all(isinstance(p, torch.distributed.tensor.DTensor) for p in module.parameters())


def test_weights_are_gathered_in_the_samplers_precision(tmp_path, tokenizer, monkeypatch):
    """Guards against twice the bytes in every step's sync, and other bits in the sampler than a cast gives."""
    sft.starting_model("", sft.starting_point("")[0], 0).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    gathered = []
    whole = DTensor.full_tensor

    def noted(tensor, *arguments, **options):
        gathered.append(tensor.dtype)
        return whole(tensor, *arguments, **options)

    monkeypatch.setattr(DTensor, "full_tensor", noted)
    with evaluation.distributed() as process:
        trainer = ppo.Trainer(ppo.parse_arguments(["--dtype", "bf16"]), str(tmp_path), process)
        with torch.no_grad():
            for p in trainer.actor.parameters():
                p.mul_(1.1)
        expected = {name: whole(p).detach().bfloat16() for name, p in trainer.actor.lm.named_parameters()}
        sft.sync_weights(trainer.actor, trainer.sampler)
    assert set(gathered) == {torch.bfloat16} and len(gathered) == len(expected)
    assert all(torch.equal(p, expected[name]) for name, p in trainer.sampler.named_parameters())


def test_a_deep_model_in_bf16_may_round_more_and_the_message_says_what_to_do():
    """Guards against a healthy run of a 30-layer model that is refused, and a limit that grows in fp32 too."""
    assert ppo.logit_error("bf16", 3) == ppo.logit_error("bf16", 1) == 0.1
    assert ppo.logit_error("bf16", 27) == pytest.approx(0.3)
    assert ppo.logit_error("fp32", 64) == 1e-3
    n = 20
    logprobs = torch.full((n,), -1.0)
    example = SimpleNamespace(sampled=torch.ones(n), logprobs=logprobs, sampler_logprobs=logprobs - 0.1)
    ppo.check_sampler([example], ppo.logit_error("bf16", 27), 0)
    with pytest.raises(AssertionError, match="--dtype fp32"):
        ppo.check_sampler([example], ppo.logit_error("bf16", 3), 0)
