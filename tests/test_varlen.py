"""Is attention as a GPU computes it the attention of the CPU? No test here has a GPU: the kernels have slow twins,
and what decides between the two ways is switched by hand."""
import copy
import inspect
import math
import random
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from bench_rollout import gain_of_pages
from conftest import StubSandbox, run, scripted

import rollout
from rollout import KVCache, Packing, PagedCache, encode_text
from sandbox import SandboxResult, UserError
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


def in_fp32(model):
    """A copy in fp32, whose logits are small enough for differences to be told from rounding."""
    model = copy.deepcopy(model).float()
    with torch.no_grad():
        model.lm_head.weight.mul_(0.2)
    return model


def assert_same(found, expected, tolerance):
    for a, b in zip(found, expected, strict=True):
        assert a.response_ids == b.response_ids and a.loss_mask == b.loss_mask
        assert a.finish_reason == b.finish_reason
        assert [(c.code, c.output, c.start, c.end) for c in a.tool_calls] == [
            (c.code, c.output, c.start, c.end) for c in b.tool_calls]
        assert a.logprobs == pytest.approx(b.logprobs, rel=tolerance, abs=tolerance)


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


class VarlenTwin:
    """varlen_attn of PyTorch 2.13, slowly, with its documented meaning. It asserts what the kernel demands.
    only_half=False takes fp32 too, so that results can be compared closely; page: what divides the tokens of a
    page, smaller than the kernel's so that short rows have many. `calls` counts what was asked."""

    def __init__(self, only_half=True, page=256):
        self.only_half = only_half
        self.page = page
        self.calls = Counter()

    def __call__(self, query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale=None, window_size=(-1, -1),
                 enable_gqa=False, seqused_k=None, block_table=None, num_splits=None):
        is_paged = block_table is not None
        n_rows = len(cu_seq_q) - 1
        dim = query.shape[-1]
        n_groups, rest = divmod(query.shape[1], key.shape[-2])
        assert query.dim() == 3 and key.shape == value.shape
        assert query.dtype == key.dtype == value.dtype
        assert not self.only_half or query.dtype in (torch.bfloat16, torch.float16)
        assert query.stride(-1) == key.stride(-1) == value.stride(-1) == 1
        assert dim % 8 == 0 and dim <= 256
        assert rest == 0 and (enable_gqa or n_groups == 1)

        # Index tensors.
        indices = [cu_seq_q, cu_seq_k] + [seqused_k, block_table] * is_paged
        for index in indices:
            assert index.dtype == torch.int32 and index.is_contiguous() and index.device == query.device
        assert cu_seq_q.shape == cu_seq_k.shape == (n_rows + 1,) and cu_seq_q[0] == cu_seq_k[0] == 0
        n_new = cu_seq_q.diff().tolist()
        n_seen = cu_seq_k.diff().tolist()
        assert min(n_new) > 0 and cu_seq_q[-1] == len(query)
        assert type(max_q) is type(max_k) is int and max_q == max(n_new) and max_k == max(n_seen)

        if is_paged:
            assert torch.is_inference_mode_enabled() or not query.requires_grad, "the kernel has no backward here"
            assert key.dim() == 4 and key.shape[1] % self.page == 0
            assert seqused_k.tolist() == n_seen and block_table.shape[0] == n_rows and block_table.dim() == 2
            assert 0 <= block_table.min() and block_table.max() < len(key)
            assert max_k <= block_table.shape[1] * key.shape[1]
            assert num_splits == 1, "other numbers of splits compute wrong rows"
            assert window_size == ((-1, 0) if max_q > 1 else (-1, -1)), "a row's query heads are not read together"
        else:
            assert key.dim() == 3 and seqused_k is None and cu_seq_k[-1] == len(key)
            assert num_splits is None and window_size == (-1, 0)
        self.calls["paged" if is_paged else "packed", max_q > 1] += 1

        out = []
        for row, (queries, new, seen) in enumerate(zip(query.split(n_new), n_new, n_seen)):
            if is_paged:
                keys = key[block_table[row].long()].flatten(0, 1)[:seen]  # (seen, K, D)
                values = value[block_table[row].long()].flatten(0, 1)[:seen]
            else:
                keys = key.split(n_seen)[row]
                values = value.split(n_seen)[row]
            keys = keys.to(torch.promote_types(keys.dtype, torch.float32)).repeat_interleave(n_groups, 1)
            values = values.to(keys.dtype).repeat_interleave(n_groups, 1)
            scores = torch.einsum("qhd,khd->hqk", queries.to(keys.dtype), keys) * (scale or dim**-0.5)
            if window_size == (-1, 0):  # causal, aligned at the last query and the last key
                is_future = torch.ones(new, seen, dtype=torch.bool, device=query.device).triu(seen - new + 1)
                scores = scores.masked_fill(is_future, -math.inf)
            out.append(torch.einsum("hqk,khd->qhd", scores.softmax(-1), values).to(query.dtype))
        return torch.cat(out)


def flash_twin(only_half=True):
    """flash_attn_varlen_func of flash-attn 2.8, in its spelling."""
    twin = VarlenTwin(only_half)

    def flash_attn_varlen_func(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0,
                               softmax_scale=None, causal=False):
        assert causal and dropout_p == 0.0
        return twin(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, scale=softmax_scale,
                    window_size=(-1, 0), enable_gqa=True)
    flash_attn_varlen_func.calls = twin.calls
    return flash_attn_varlen_func


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """as_on_a_gpu(**options) -> the twin, which now computes attention, as on CUDA in half precision."""
    def switch(**options):
        twin = VarlenTwin(**options)
        monkeypatch.setattr(rollout, "uses_varlen", lambda device, dtype: True)
        monkeypatch.setattr(rollout, "varlen_attn", twin)
        monkeypatch.setattr(rollout, "flash_attn_varlen_func", None)
        return twin
    return switch


# ------------------------------------------------------------------------------------------------------------
# In fp32


@pytest.mark.parametrize("architecture", ["qwen2", "llama", "llama_mha"])
def test_repeated_key_heads_change_neither_rollouts_nor_gradients(make_models, tokenizer, monkeypatch, architecture):
    """Guards against the kernel that keeps the scores of all tokens, which is what CUDA takes for grouped heads in
    fp32 or under a mask, and against heads repeated in another order than they are grouped."""
    model = in_fp32(make_models(architecture)[0])
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


# ------------------------------------------------------------------------------------------------------------
# In half precision: one kernel


@pytest.mark.parametrize("architecture", ["qwen2", "llama", "qwen3", "llama_mha"])
def test_one_kernel_call_gives_the_rollouts_of_sdpa(make_models, tokenizer, as_on_a_gpu, architecture):
    """Guards against arguments that the kernel refuses or reads wrongly: lengths, pages, windows, splits. Prompts
    are ragged, slots are refilled, rows pause and resume, some reach their limit."""
    model = in_fp32(make_models(architecture, positions=400)[0])
    prompts = ragged_prompts(7)
    prompts[3] = prompts[3][:1]
    prompts[5] = ragged_prompts(1, longest=10)[0] * 50
    prompts[5] = prompts[5][:240]  # its rows grow into a second page
    options = dict(n_samples=3, n_slots=6, rejoin_ticks=2, max_response_tokens=90, max_calls=1,
                   logits_processor=scripted(script_with_calls(tokenizer)))
    expected = run(model, tokenizer, prompts, StubSandbox("some output 12\n" * 2), **options)
    assert sum(len(t.tool_calls) for t in expected) > 10
    assert {t.finish_reason for t in expected} == {"eos", "length", "max_calls"}

    twin = as_on_a_gpu(only_half=False)
    with_twin = run(model, tokenizer, prompts, StubSandbox("some output 12\n" * 2), **options)
    assert_same(with_twin, expected, 1e-6)
    assert twin.calls["paged", True] > 20 and twin.calls["paged", False] > 20 and len(twin.calls) == 2


def pages_of_a_row(model, n_tokens):
    """Bytes of the pages that hold so many tokens, in fp32."""
    return rollout.n_pages(n_tokens) * 2 * math.prod(KVCache.shape(model.config, 1, rollout.PAGE_TOKENS)) * 4


@pytest.mark.parametrize("rejoin_ticks", [9, 0])
@pytest.mark.parametrize("pages", [13, 15, 30])
def test_preempted_rows_end_as_if_memory_were_endless(
        make_models, tokenizer, as_on_a_gpu, monkeypatch, pages, rejoin_ticks):
    """Guards against tokens, log-probabilities or a call's result lost when a row gives its pages up, against pages
    that are never given back, and against rows that take one another's pages for ever. The longest row has 13."""
    monkeypatch.setattr(rollout, "PAGE_TOKENS", 16)
    monkeypatch.setattr(rollout, "PREFILL_TOKENS", 100)
    twin = as_on_a_gpu(only_half=False, page=16)
    model = in_fp32(make_models("qwen2")[0])
    prompts = ragged_prompts(5)
    limit = 200 - max(map(len, prompts))
    seen, in_flight = [], []

    def on_tick(engine, admitted):
        cache = engine.cache
        held = [page for table in cache.tables for page in table]
        assert sorted(held + cache.free_pages) == list(range(cache.k.shape[1])), "a page has two holders or none"
        assert all(engine.cache.tables[row.slot] for row in engine.active + admitted)
        again = [len(row.pending) for row in engine.active if not cache.lengths[row.slot]]
        assert len(again) < 2 or sum(again) <= 100, "too much for a tick"
        seen.append(engine)
        in_flight.append(sum(map(bool, cache.tables)))
    options = dict(n_samples=3, n_slots=8, rejoin_ticks=rejoin_ticks, max_response_tokens=limit, max_calls=9,
                   on_tick=on_tick)

    def script(t):
        rng = random.Random(f"{t.prompt_ids} {t.sample_index}")
        ids = []
        for call in range(rng.randint(1, 4)):
            ids += [None] * rng.randint(9, 30) + encode_text(tokenizer, f"<code>\nprint({call})\n</code>")
        return ids + [None] * rng.randint(9, 90) + [tokenizer.eos_token_id]

    def sandbox():
        def answer(code):
            return SandboxResult("sandbox_error" if "2" in code else "ok", "some output 12\n" * 2)
        return StubSandbox(answer, delay=lambda code: 0.002)
    expected = run(model, tokenizer, prompts, sandbox(), logits_processor=scripted(script), **options)
    assert seen[-1].cache.k.shape[1] == 8 * 13
    assert {t.finish_reason for t in expected} == {"eos", "length", "sandbox_error"}

    preempted = Counter()
    preempt = rollout.Engine.preempt

    def counted(engine, row):
        preempted["waits" if row in engine.paused else "runs"] += 1
        preempt(engine, row)
    monkeypatch.setattr(rollout.Engine, "preempt", counted)
    monkeypatch.setattr(rollout, "free_bytes", lambda device: pages / 13 * pages_of_a_row(model, 200) + 1)
    in_flight.clear()
    scarce = sandbox()
    found = run(model, tokenizer, prompts, scarce, logits_processor=scripted(script), **options)
    assert_same(found, expected, 1e-6)
    assert len(scarce.ran) == sum(len(t.tool_calls) for t in found), "a snippet ran twice"
    cache = seen[-1].cache
    assert cache.k.shape[1] == pages == len(cache.free_pages) and not any(cache.tables) and not any(cache.lengths)
    assert max(in_flight) > pages // 13, "no more rows than slots would hold"
    assert preempted["runs"] > 4 and (preempted["waits"] or not rejoin_ticks)
    assert twin.calls["paged", True] > 20

    monkeypatch.setattr(rollout, "free_bytes", lambda device: pages_of_a_row(model, 200) - 1)
    with pytest.raises(UserError, match="one row of 200 tokens needs .* of KV cache"):
        run(model, tokenizer, prompts, sandbox(), **options)


@pytest.mark.parametrize("status", ["ok", "sandbox_error"])
def test_a_row_that_is_preempted_while_its_snippet_runs_gets_the_result(
        make_models, tokenizer, as_on_a_gpu, monkeypatch, status):
    """Guards against a result that is lost or awaited for ever, and against a row without pages that gives back
    those of another."""
    monkeypatch.setattr(rollout, "PAGE_TOKENS", 16)
    as_on_a_gpu(only_half=False, page=16)
    model = in_fp32(make_models("qwen2")[0])
    monkeypatch.setattr(rollout, "free_bytes", lambda device: pages_of_a_row(model, 20 + 170) + 1)
    eos, call = tokenizer.eos_token_id, encode_text(tokenizer, "<code>\nprint(1)\n</code>")
    scripts = {(0, 0): [5] * 160 + [eos], (1, 0): call + [6] * 5 + [eos], (2, 0): [7] * 150 + [eos]}
    preempted, engines = [], []
    preempt = rollout.Engine.preempt

    def noted(engine, row):
        preempted.append((row.trajectory.prompt_index, row in engine.paused))
        preempt(engine, row)
    monkeypatch.setattr(rollout.Engine, "preempt", noted)
    done = run(model, tokenizer, [[5] * 20, [6] * 20, [7] * 20], StubSandbox(lambda code: SandboxResult(status, "12\n")),
               n_slots=2, rejoin_ticks=165, max_response_tokens=170, logits_processor=scripted(scripts),
               on_tick=lambda engine, admitted: engines.append(engine))
    assert preempted[0] == (1, True)
    assert [t.finish_reason for t in done] == ["eos", "eos" if status == "ok" else status, "eos"]
    assert [[i for i, m in zip(t.response_ids, t.loss_mask) if m] for t in done] == [
        scripts[0, 0], scripts[1, 0] if status == "ok" else call, scripts[2, 0]]
    assert done[1].tool_calls[0].output == "12\n" and len(done[1].tool_calls) == 1
    cache = engines[-1].cache
    assert sorted(cache.free_pages) == list(range(12)) and sorted(engines[-1].free) == [0, 1]


def test_the_gain_of_pages_is_that_of_its_definition():
    """Guards against a figure in a docstring that counts prompts or whole responses only."""
    # A prompt of 3 tokens holds, while it gets 4 more, 1, 2, 2, 2 pages of 4; the longest row has 4.
    assert gain_of_pages([(3, 4)], 16, page=4) == 4 / (7 / 4)
    assert gain_of_pages([(3, 4), (1, 1)], 16, page=4) == 4 / (8 / 5)


def test_in_bf16_a_rollout_is_scored_as_in_fp32(make_models, tokenizer, as_on_a_gpu):
    """Guards against what only half precision shows: dtypes that differ between query and cache."""
    model = copy.deepcopy(make_models("qwen2")[0]).to(torch.bfloat16)
    twin = as_on_a_gpu()
    done = run(model, tokenizer, ragged_prompts(5), StubSandbox(), n_slots=3, max_response_tokens=60,
               logits_processor=scripted(script_with_calls(tokenizer)))
    assert twin.calls["paged", True] and twin.calls["paged", False]
    reference = copy.deepcopy(make_models("qwen2")[1]).to(torch.bfloat16).float()
    errors = []
    for t in done:
        with torch.no_grad():
            logits = reference(torch.tensor([t.prompt_ids + t.response_ids])).logits[0, len(t.prompt_ids) - 1:-1]
        scores = torch.log_softmax(logits, -1)
        errors += [abs(scores[i, token].item() - t.logprobs[i]) for i, token in enumerate(t.response_ids) if t.logprobs[i]]
    assert len(errors) > 50 and sum(errors) / len(errors) < 0.1


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 0.05)])
@pytest.mark.parametrize("kernel", ["flash_attn", "varlen_attn"])
@pytest.mark.parametrize("architecture", ["qwen2", "llama_mha"])
def test_training_by_one_kernel_has_the_gradient_of_sdpa(
        make_models, as_on_a_gpu, monkeypatch, architecture, kernel, dtype, tolerance):
    """Guards against bounds of packed sequences that are off by one, a window that is not causal, and heads that
    the kernel does not group."""
    model = make_models(architecture)[0]
    expected_loss, expected = loss_and_gradient(model)
    twin = as_on_a_gpu(only_half=dtype != torch.float32)
    if kernel == "flash_attn":
        twin = flash_twin(only_half=dtype != torch.float32)
        monkeypatch.setattr(rollout, "flash_attn_varlen_func", twin)
    loss, gradient = loss_and_gradient(model, dtype)
    assert twin.calls == {("packed", True): 2}  # one per layer
    assert math.isclose(loss, expected_loss, rel_tol=tolerance)
    assert (gradient - expected).norm() < tolerance * expected.norm()


def test_pytorch_takes_the_arguments_that_its_twin_takes(make_models, monkeypatch):
    """Guards against a twin with another spelling than the kernel. Tensors of the device "meta" have shapes and
    dtypes, and no numbers; what is no tensor is checked by PyTorch."""
    spelled = list(inspect.signature(rollout.varlen_attn).parameters)
    spelled.remove("return_aux")
    assert spelled == list(inspect.signature(VarlenTwin()).parameters)

    monkeypatch.setattr(rollout, "uses_varlen", lambda device, dtype: True)
    monkeypatch.setattr(rollout, "flash_attn_varlen_func", None)
    meta = torch.device("meta")
    cache = PagedCache(make_models("qwen2")[0].config, 9, 20, torch.bfloat16, meta)
    heads = torch.zeros(8, 9, 8, dtype=torch.bfloat16, device=meta)  # of queries, keys and values
    query, key, value = heads[None, :4], heads[None, 4:6], heads[None, 6:]
    for lengths in ([1, 8], [1] * 9):
        assert all(cache.reserve(slot, new) for slot, new in enumerate(lengths))
        packing = Packing(lengths, meta, cache, list(range(len(lengths))))
        with torch.inference_mode():
            out, _ = rollout.packed_attention(SimpleNamespace(layer_idx=1), query, key, value, None, packing=packing)
        assert out.dtype == torch.bfloat16 and out.shape == (1, 9, 4, 8)
    out, _ = rollout.packed_attention(None, query, key, value, None, packing=Packing([4, 5], meta))
    assert out.shape == (1, 9, 4, 8)


def test_the_kernel_is_that_of_cuda_in_half_precision():
    """Guards against a kernel that has no code for CPUs or for fp32."""
    chosen = {(name, dtype) for name in ("cpu", "cuda") for dtype in (torch.float32, torch.bfloat16, torch.float16)
              if rollout.uses_varlen(torch.device(name), dtype)}
    assert chosen == {("cuda", torch.bfloat16), ("cuda", torch.float16)}


@pytest.mark.parametrize("change, line", [
    ("old PyTorch", "bf16 on a GPU needs a newer PyTorch: varlen_attn of .* has no block_table, num_splits"),
    ("old GPU", "compute capability 8.0"), ("head dim", "not 260: use --dtype fp32"), ("nothing", None)])
def test_a_missing_kernel_is_refused_when_a_model_is_loaded(monkeypatch, change, line):
    """Guards against a TypeError or a kernel's message in the first rollout."""
    def old(query, key, value, *, enable_gqa=False, seqused_k=None):
        raise AssertionError
    model = SimpleNamespace(config=SimpleNamespace(head_dim=260 if change == "head dim" else 128),
                            to=lambda device: "moved")
    monkeypatch.setattr(rollout, "from_checkpoint", lambda *args, **options: model)
    monkeypatch.setattr(rollout, "use_packed_attention", lambda model, path: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5) if change == "old GPU" else (9, 0))
    if change == "old PyTorch":
        monkeypatch.setattr(rollout, "varlen_attn", old)
    assert rollout.load_model("anywhere", "cuda", "fp32") == "moved"
    if line is None:
        assert rollout.load_model("anywhere", "cuda", "bf16") == "moved"
        return
    with pytest.raises(UserError, match=line):
        rollout.load_model("anywhere", "cuda", "bf16")
