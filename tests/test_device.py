"""Does everything that meets on a GPU lie there? On the pretended device of pretend_device.py, whose limits its
docstring names."""
import asyncio
import copy
import itertools
import random
from collections import Counter

import pytest
import torch
from conftest import StubSandbox, run, scripted
from pretend_device import DEVICE, OnDevice, pretended_device
from test_rollout import SeedSandbox, mixed_script, ragged_prompts
from test_varlen import VarlenTwin
from transformers import AutoModelForCausalLM, Qwen3Config

import eval as evaluation
import ppo
import rollout
import sft

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def logit_bytes(monkeypatch):
    """The chunks of the head are those of CUDA."""
    monkeypatch.setitem(sft.LOGIT_BYTES, DEVICE.type, sft.LOGIT_BYTES["cuda"])


def on_device(module):
    return copy.deepcopy(module).to(DEVICE)


def from_device(x):
    """The values of a tensor that has to lie on the device."""
    assert isinstance(x, OnDevice)
    return x.detach().held


def kinds(transfers):
    """Transfers by kind alone."""
    counts = Counter()
    for (kind, _), n in transfers.items():
        counts[kind] += n
    return counts


# ------------------------------------------------------------------------------------------------------------
# The pretended device itself


@pytest.mark.parametrize("meeting", [
    lambda x: x + torch.ones(3),
    lambda x: torch.cat([x, torch.ones(2, 3)]),
    lambda x: torch.nn.functional.linear(torch.ones(3), x),
    lambda x: torch.nn.functional.embedding(torch.tensor([0, 1]), x),
    lambda x: torch.ones(2, 3)[x > 2],
    lambda x: x.index_put((x > 2,), torch.ones(3)),
    lambda x: torch.ones(3).add_(x[0]),
])
def test_the_pretended_device_refuses_what_cuda_refuses(meeting):
    """Guards against a device that forgives: then nothing below would test anything."""
    with pretended_device():
        x = torch.arange(6.0, device=DEVICE).view(2, 3)
        with pytest.raises(RuntimeError, match="same device"):
            meeting(x)


@pytest.mark.parametrize("kind, transfer", [
    ("upload", lambda x: torch.ones(3).to(DEVICE)),
    ("upload", lambda x: torch.tensor([1, 2], device=DEVICE)),
    ("upload", lambda x: x.copy_(torch.ones(6))),
    ("upload", lambda x: x[[0, 1]]),
    ("upload", lambda x: x[torch.tensor([0, 1])]),
    ("wait", lambda x: x.cpu()),
    ("wait", lambda x: x.tolist()),
    ("wait", lambda x: x[0].item()),
    ("wait", lambda x: 1 if x[0] > 0 else 0),
    ("wait", lambda x: x.nonzero()),
    ("wait", lambda x: x[x > 2]),
    ("wait", lambda x: torch.ones(6).copy_(x)),
    ("neither", lambda x: x * torch.tensor(2.0)),
    ("neither", lambda x: torch.zeros_like(x).copy_(x)[2:].mul_(2)),
    ("neither", lambda x: torch.zeros(3, device=DEVICE).double()),
])
def test_the_pretended_device_counts_every_transfer_once(kind, transfer):
    """Guards against transfers that look like none, and so would not be counted: a list or a mask as an index."""
    with pretended_device() as transfers:
        x = torch.arange(6.0, device=DEVICE)
        transfers.clear()
        transfer(x)
    assert kinds(transfers) == ({} if kind == "neither" else {kind: 1})


# ------------------------------------------------------------------------------------------------------------
# Sampling


def assert_same_trajectories(ours, theirs):
    for a, b in zip(ours, theirs, strict=True):
        assert a.response_ids == b.response_ids and a.loss_mask == b.loss_mask
        assert a.finish_reason == b.finish_reason and a.correct == b.correct and a.answer == b.answer
        assert a.logprobs == pytest.approx(b.logprobs, abs=1e-4)
        assert len(a.tool_calls) == len(b.tool_calls)
        for call, expected in zip(a.tool_calls, b.tool_calls):
            assert (call.code, call.output) == (expected.code, expected.output)
            assert (call.start, call.end) == (expected.start, expected.end)


def rollouts(model, tokenizer, n_prompts=4, **options):
    """Responses with none to two calls, in fewer slots than there are rows."""
    options = {"n_samples": 2, "n_slots": 4, "max_response_tokens": 60, "seed": 3} | options
    return run(model, tokenizer, ragged_prompts(n_prompts, seed=4), SeedSandbox(),
               logits_processor=scripted(mixed_script(tokenizer)), **options)


@pytest.mark.parametrize("how", [{}, {"temperature": 0.7, "top_p": 0.8}, {"temperature": 0.0}], ids=str)
def test_rollouts_on_the_device_are_those_of_the_cpu(model, tokenizer, how):
    """Guards against a tensor of the engine that stays on the CPU: cache, packing, masks, noise."""
    expected = rollouts(model, tokenizer, **how)
    assert sum(len(t.tool_calls) for t in expected) >= 4
    with pretended_device():
        assert_same_trajectories(rollouts(on_device(model), tokenizer, **how), expected)


def test_a_tick_asks_for_no_more_transfers_than_today(model, tokenizer):
    """Guards against a copy or a wait that slips into the decode loop, where each costs a launch or a stall.

    In a pure decode tick today: 6 uploads (input ids, positions, last tokens, slots, the bias, noise) and 2 waits
    (tokens, log-probabilities; after the first the second has nothing left to wait for). Prompts and interpreter
    text add 2 uploads per group of rows of like length (slots, indices).
    """
    ticks = []  # (lengths that are fed, transfers until then)
    with pretended_device() as transfers:
        def on_tick(engine, admitted):
            fed = [len(row.pending) for row in engine.active + admitted]
            ticks.append((fed, kinds(transfers)))

        rollouts(on_device(model), tokenizer, n_prompts=8, n_samples=1, n_slots=3, on_tick=on_tick)
        ticks.append(([], kinds(transfers)))

    n_pure = 0
    n_mixed = 0
    for (fed, before), (_, after) in zip(ticks, ticks[1:]):
        n_groups = len({n.bit_length() for n in fed if n > 1})
        if n_groups == 0:
            n_pure += 1
        elif 1 in fed:
            n_mixed += 1
        assert after["wait"] - before["wait"] <= 2
        assert after["upload"] - before["upload"] <= 6 + 2 * n_groups
    assert n_pure >= 10 and n_mixed >= 3, "the test needs both kinds of ticks"


# ------------------------------------------------------------------------------------------------------------
# Scores and losses


def some_examples(n, vocabulary):
    """Examples with every column that a loss reads."""
    rng = random.Random(0)
    torch.manual_seed(0)
    names = ["sampler_logprobs", "logprobs", "reference_logprobs", "values", "advantages", "returns"]
    examples = []
    for _ in range(n):
        length = rng.randint(3, 20)
        ids = [rng.randrange(vocabulary) for _ in range(length)]
        mask = [0, 0] + [int(rng.random() < 0.7) for _ in range(length - 2)]
        columns = {name: torch.randn(length) for name in names}
        examples.append(sft.make_example(ids, mask, **columns))
    return examples


def assert_same_tensors(ours, theirs):
    """Tensors by name: of the device, and what the CPU says."""
    ours = {name: from_device(x) for name, x in ours.items() if x is not None}
    theirs = {name: x.detach() for name, x in theirs.items() if x is not None}
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def gradients(module):
    return {name: p.grad for name, p in module.named_parameters()}


def scores(policy, device, with_entropy=True):
    """Log-probabilities, entropies, and the gradient of a loss of both."""
    flat, packing = sft.collate(some_examples(5, policy.lm.config.vocab_size), device)
    logprobs, entropy = policy(flat.input_ids, flat.targets, flat.loss_mask, packing, temperature=0.7,
                               with_entropy=with_entropy)
    loss = (logprobs * flat.advantages).sum()
    if with_entropy:
        loss = loss + entropy.sum()
    loss.backward()
    return {"logprobs": logprobs, "entropy": entropy} | gradients(policy)


@pytest.mark.parametrize("tokens_per_chunk", [7, 10**6])
@pytest.mark.parametrize("with_entropy", [False, True])
def test_log_probabilities_and_their_gradient_are_those_of_the_cpu(model, monkeypatch, with_entropy,
                                                                  tokens_per_chunk):
    """Guards against columns, positions or indices of chunks that stay on the CPU."""
    for device_type in sft.LOGIT_BYTES:
        monkeypatch.setitem(sft.LOGIT_BYTES, device_type, 4 * model.config.vocab_size * tokens_per_chunk)
    expected = scores(sft.Policy(copy.deepcopy(model)), CPU, with_entropy)
    with pretended_device():
        assert_same_tensors(scores(sft.Policy(on_device(model)), DEVICE, with_entropy), expected)


def test_the_warm_starts_loss_is_that_of_the_cpu(model):
    """Guards against micro-batches, or a sum over the ranks, on the wrong device."""
    examples = some_examples(7, model.config.vocab_size)
    policy = sft.Policy(copy.deepcopy(model))
    with evaluation.distributed():
        expected = sft.batch_loss(policy, examples, 40, evaluation.Process(0, 1, CPU), backward=True)
        with pretended_device():
            ours = sft.Policy(on_device(model))
            loss = sft.batch_loss(ours, examples, 40, evaluation.Process(0, 1, DEVICE), backward=True)
            assert_same_tensors(gradients(ours), gradients(policy))
    assert loss == pytest.approx(expected, rel=1e-5)


def test_the_losses_of_ppo_and_their_gradient_are_those_of_the_cpu(model):
    """Guards against a constant, a mask or a weight made on the CPU, and against a critic's head left there."""
    def losses(critic, device):
        flat, packing = sft.collate(some_examples(5, model.config.vocab_size), device)
        values = critic(flat.input_ids, packing)
        value_loss, value_metrics = ppo.value_loss(
            values, flat.values, flat.returns, flat.loss_mask, value_clip=0.2)
        value_loss.backward()

        logprobs = (0.5 * flat.logprobs).requires_grad_()
        weights = ppo.importance_weights(flat.logprobs, flat.sampler_logprobs, flat.sampled)
        policy_loss, policy_metrics = ppo.policy_loss(
            logprobs, flat.logprobs, flat.advantages, flat.loss_mask, clip_low=0.2, clip_high=0.28,
            dual_clip=1.2, weights=weights)
        kl = ppo.reference_kl(logprobs, flat.reference_logprobs, flat.loss_mask)
        (policy_loss + kl).backward()
        results = {"values": values, "value_loss": value_loss, "policy_loss": policy_loss, "kl": kl}
        return results | value_metrics | policy_metrics | {"gradient": logprobs.grad} | gradients(critic)

    critic = ppo.Critic(copy.deepcopy(model)).double()
    torch.nn.init.normal_(critic.head.weight)
    expected = losses(copy.deepcopy(critic), CPU)
    with pretended_device():
        assert_same_tensors(losses(on_device(critic), DEVICE), expected)


# ------------------------------------------------------------------------------------------------------------
# A step of PPO, and evaluation


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, tokenizer):
    """A folder with a tiny model, whose embeddings are tied, and its tokenizer."""
    folder = tmp_path_factory.mktemp("checkpoint")
    config = Qwen3Config(
        vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, intermediate_size=48, max_position_embeddings=512,
        tie_word_embeddings=True, bos_token_id=None, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(3.0)  # so that some tokens are likelier than others
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def unsharded(module, lm, args, process):
    """Stands for `sft.shard`, as FSDP knows no pretended device: the only shard is the whole module."""
    lm.eval()
    module.to(DEVICE)
    module.reshard = lambda: None
    return module


def first_step(checkpoint, tokenizer, device):
    """(trainer, metrics, trajectories) of a run's first step, with every term that a loss may have."""
    args = ppo.parse_arguments([
        "--prompts_per_step", "4", "--samples_per_prompt", "2", "--max_response_tokens", "12", "--n_slots", "4",
        "--minibatches", "2", "--token_budget", "150", "--critic_warmup", "0", "--kl_coef", "0.1", "--entropy_coef", "0.1",
        "--importance", "token", "--dual_clip", "3",
        "--actor_lr", "4e-4", "--critic_lr", "5e-4"])  # a larger step enlarges rounding
    trainer = ppo.Trainer(args, str(checkpoint), evaluation.Process(0, 1, device))
    prompts = ppo.Prompts(None, 0, tokenizer, "{question}", args.max_prompt_tokens)
    metrics, trajectories = asyncio.run(ppo.train_step(trainer, prompts, StubSandbox(), tokenizer, 0))
    return trainer, metrics, trajectories


def flat_weights(module):
    """All weights, sharded or of the device, as one tensor of the CPU."""
    pieces = []
    for p in module.parameters():
        whole = p.detach()
        if hasattr(whole, "full_tensor"):
            whole = whole.full_tensor()
        pieces.append(whole.cpu().flatten())
    return torch.cat(pieces)


def test_a_step_of_ppo_on_the_device_is_that_of_the_cpu(checkpoint, tokenizer, monkeypatch):
    """Guards against columns that `fill` leaves on the device, moments of the optimiser that stay on the CPU, and
    a sampler that does not get the new weights. On the CPU FSDP has made the step."""
    verdicts = itertools.cycle([True, False])

    async def judge(answer, reference, sandbox):
        return next(verdicts)

    monkeypatch.setattr(evaluation, "is_equivalent", judge)
    with evaluation.distributed():
        trainer, expected, theirs = first_step(checkpoint, tokenizer, CPU)
        with pretended_device():
            monkeypatch.setattr(sft, "shard", unsharded)
            ours_trainer, metrics, ours = first_step(checkpoint, tokenizer, DEVICE)
            moved = {}
            for name in ("sampler", "actor", "critic"):
                module = getattr(ours_trainer, name)
                assert all(isinstance(p, OnDevice) for p in module.parameters())
                moved[name] = flat_weights(module)

        # What was sampled and scored; it lies on the CPU again.
        assert_same_trajectories(ours, theirs)
        for a, b in zip(ours, theirs):
            columns = vars(a.example)
            assert not any(isinstance(column, OnDevice) for column in columns.values())
            torch.testing.assert_close(columns, vars(b.example), rtol=1e-3, atol=1e-4)
        for name, value in expected.items():
            if isinstance(value, float) and "second" not in name:
                assert metrics[name] == pytest.approx(value, rel=1e-3, abs=1e-4), name

        # The step as a whole: where a gradient is nearly 0, AdamW makes a step of rounding.
        start = flat_weights(rollout.load_model(str(checkpoint), "cpu"))
        for name, weights in moved.items():
            weights = weights[:len(start)]  # without the critic's head
            step = flat_weights(getattr(trainer, name))[:len(start)] - start
            assert step.norm() > 0 and (weights - start - step).norm() < 0.03 * step.norm(), name
        assert torch.equal(moved["sampler"], moved["actor"])


@pytest.fixture(params=["SDPA", "varlen_attn"])
def gpu_paths(request, monkeypatch):
    """What the modules do on CUDA, in fp32 (SDPA, a key head per query head) or in half precision."""
    monkeypatch.setattr(rollout, "varlen_attn", VarlenTwin(only_half=False))
    monkeypatch.setattr(rollout, "flash_attn_varlen_func", None)
    monkeypatch.setattr(rollout, "repeats_heads", lambda device: device == DEVICE)
    monkeypatch.setattr(rollout, "uses_varlen",
                        lambda device, dtype: device == DEVICE and request.param == "varlen_attn")


def test_the_paths_of_a_gpu_stay_on_the_device(model, tokenizer, gpu_paths):
    """Guards against what only the paths of CUDA make: bounds, block tables, counts of keys."""
    expected = rollouts(model, tokenizer)
    expected_scores = scores(sft.Policy(copy.deepcopy(model)), CPU)
    with pretended_device():
        assert_same_trajectories(rollouts(on_device(model), tokenizer), expected)
        assert_same_tensors(scores(sft.Policy(on_device(model)), DEVICE), expected_scores)


def test_an_evaluation_on_the_device_is_that_of_the_cpu(checkpoint, tokenizer):
    """Guards against a model that is loaded and checked, or sampled from, on two devices."""
    rows = evaluation.embedded_rows("test", 3)
    problems = evaluation.encode_problems(rows, tokenizer, "{question}", 200, "test")

    def evaluated(device):
        return asyncio.run(evaluation.evaluate(
            rollout.load_model(str(checkpoint), device), tokenizer, problems, StubSandbox(),
            evaluation.Process(0, 1, device), "", n_samples=2, temperature=0.8, top_p=0.9, seed=1,
            max_response_tokens=12, n_slots=4))

    with evaluation.distributed():
        expected, theirs = evaluated(CPU)
        with pretended_device():
            metrics, ours = evaluated(DEVICE)
    assert_same_trajectories(ours, theirs)
    assert metrics == expected


# ------------------------------------------------------------------------------------------------------------
# What is forgotten is found


def lines_missed(work):
    """The lines of this project whose copies to the device work() cannot do without."""
    with pretended_device() as transfers:
        work()
    missed = []
    for kind, line in transfers:
        if kind == "upload":
            with pretended_device(forgotten=line):
                try:
                    work()
                except RuntimeError as error:
                    assert "same device" in str(error)
                    missed.append(line)
    return missed


def test_a_forgotten_copy_to_the_device_is_an_error(model, tokenizer):
    """Guards against tests that pass though a tensor lies on the CPU: the copies of each line are left out in turn,
    as if its `.to(device)` were missing. Only an index may then stay there, as on CUDA: the slots, the last tokens."""
    with pretended_device():
        lm = on_device(model)
    missed = lines_missed(lambda: rollouts(lm, tokenizer, n_samples=1, max_response_tokens=12))
    assert len(missed) >= 4, "input ids, positions, masks, noise"
    missed = lines_missed(lambda: scores(sft.Policy(lm), DEVICE))
    assert len(missed) >= 2, "the examples' columns, positions"
