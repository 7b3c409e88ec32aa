"""Is attention as a GPU computes it the attention of the CPU? No test here has a GPU: the kernels have slow twins,
and what decides between the two ways is switched by hand."""
import copy
import math
import random

import pytest
import torch
import torch.nn.functional as F
from conftest import StubSandbox, run, scripted

import rollout
from rollout import KVCache, Packing, encode_text
from sft import Policy, collate, make_example


def ragged_prompts(n, seed=0, longest=40):
    rng = random.Random(seed)
    return [[rng.randrange(3, 700) for _ in range(rng.randint(1, longest))] for _ in range(n)]


def script_with_calls(tokenizer):
    """A script that depends on prompt and sample alone: free tokens, none to three calls, free tokens; some rows
    have no end."""
    def script(t):
        rng = random.Random(f"{t.prompt_ids} {t.sample_index}")
        ids = []
        for call in range(rng.randint(0, 3)):
            ids += [None] * rng.randint(1, 9) + encode_text(tokenizer, f"<code>\nprint({call})\n</code>")
        return ids + [None] * rng.randint(1, 20) + [tokenizer.eos_token_id] * (rng.random() < 0.7)
    return script


def assert_same(found, expected, tolerance):
    for a, b in zip(found, expected, strict=True):
        assert a.response_ids == b.response_ids and a.loss_mask == b.loss_mask
        assert a.finish_reason == b.finish_reason
        assert [(c.code, c.output, c.start, c.end) for c in a.tool_calls] == [
            (c.code, c.output, c.start, c.end) for c in b.tool_calls]
        assert a.logprobs == pytest.approx(b.logprobs, abs=tolerance)


def loss_and_gradient(model, dtype=torch.float32):
    """Of packed sequences of several lengths, one of them a single token."""
    model = copy.deepcopy(model).to(dtype)
    rng = random.Random(1)
    sequences = [[rng.randrange(3, 700) for _ in range(n)] for n in (2, 31, 7, 18)]
    flat, packing = collate([make_example(ids, [1] * len(ids)) for ids in sequences], "cpu")
    logprobs, _ = Policy(model)(flat.input_ids, flat.targets, flat.loss_mask, packing)
    loss = -logprobs.sum()
    loss.backward()
    gradient = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    return loss.item(), gradient.double()


# ------------------------------------------------------------------------------------------------------------
# In fp32


@pytest.mark.parametrize("architecture", ["qwen2", "llama", "llama_mha"])
def test_repeated_key_heads_change_neither_rollouts_nor_gradients(make_models, tokenizer, monkeypatch, architecture):
    """Guards against the kernel that keeps the scores of all tokens, which is what CUDA takes for grouped heads in
    fp32 or under a mask, and against heads repeated in another order than they are grouped."""
    model = copy.deepcopy(make_models(architecture)[0]).float()
    options = dict(n_samples=2, n_slots=5, rejoin_ticks=2, max_response_tokens=80,
                   logits_processor=scripted(script_with_calls(tokenizer)))
    expected = run(model, tokenizer, ragged_prompts(6), StubSandbox(), **options)
    loss, gradient = loss_and_gradient(model)

    calls = []

    def strict(query, key, value, enable_gqa=False, **options):
        assert not enable_gqa and query.shape[1] == key.shape[1] == value.shape[1]
        calls.append(query.shape)
        return attention(query, key, value, **options)
    attention = F.scaled_dot_product_attention
    monkeypatch.setattr(rollout, "repeats_heads", lambda device: True)
    monkeypatch.setattr(F, "scaled_dot_product_attention", strict)
    assert_same(run(model, tokenizer, ragged_prompts(6), StubSandbox(), **options), expected, 1e-5)
    assert max(shape[2] for shape in calls) > 20
    repeated_loss, repeated_gradient = loss_and_gradient(model)
    assert math.isclose(loss, repeated_loss, rel_tol=1e-5)
    assert torch.allclose(gradient, repeated_gradient, atol=1e-5 * gradient.abs().max().item())


def test_heads_are_repeated_on_cuda_alone():
    """Guards against keys copied on a CPU, whose kernel takes grouped heads."""
    assert [rollout.repeats_heads(torch.device(name)) for name in ("cuda", "cuda:3", "cpu")] == [True, True, False]


def test_masks_are_made_where_they_are_used(model, monkeypatch):
    """Guards against masks made by the host, 32 MiB for eight prompts of 2,048 tokens, which a GPU waits for."""
    cache = KVCache(model.config, 6, 200, torch.float32, torch.device("cpu"))
    cache.lengths = [150, 0, 90, 0, 120, 7]
    lengths = [1, 1, 30, 40, 90]
    sizes, from_numpy = [], torch.from_numpy

    def sized(array):
        sizes.append(array.size)
        return from_numpy(array)
    monkeypatch.setattr(torch, "from_numpy", sized)
    packing = Packing(lengths, cache.k.device, cache, [0, 2, 4, 5, 1])
    assert max(sizes) <= 2 * sum(lengths) < 2 * 30 * 150

    # Rows of two tokens or more, in two groups: token by token, what it may see.
    seen = {}
    for slots, indices, mask in packing.groups:
        for slot, row, row_mask in zip(slots.tolist(), indices, mask):
            for index, keys in zip(row.tolist(), row_mask[0]):
                seen[slot, index - sum(lengths[:[0, 2, 4, 5, 1].index(slot)])] = keys.tolist()
    for slot, past, new in ((4, 120, 30), (5, 7, 40), (1, 0, 90)):
        for token in range(new):
            keys = seen[slot, token]
            assert keys == [key <= past + token for key in range(len(keys))] and sum(keys) == past + token + 1
    assert packing.bias[:, 0, 0].eq(0).sum(-1).tolist() == [151, 1, 91]
    assert packing.bias.dtype == torch.float32 and packing.bias.min() == -math.inf
