"""Are log-probabilities, loss and gradient those of the plain model, however packed?"""
import copy
import math
import random
import shutil
from pathlib import Path

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, Qwen2Config

import data
import eval as evaluation
import sft
from ppo import cosine
from rollout import encode_response
from sft import Policy, collate, make_example, pack


@pytest.fixture(scope="module")
def models():
    """The same tiny weights twice: with our attention, and with Hugging Face's own (the reference)."""
    config = Qwen2Config(vocab_size=97, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
                         num_key_value_heads=2, intermediate_size=48, max_position_embeddings=256,
                         tie_word_embeddings=True)
    torch.manual_seed(0)
    ours = AutoModelForCausalLM.from_config(config, attn_implementation="retool")
    for parameter in ours.parameters():  # larger than at initialisation, so that attention is not uniform
        parameter.data.mul_(5.0)
    reference = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    reference.load_state_dict(ours.state_dict())
    return ours, reference


def make_examples(n, seed=0):
    rng = random.Random(seed)
    examples = []
    for _ in range(n):
        length = rng.randint(3, 40)
        ids = [rng.randrange(97) for _ in range(length)]
        examples.append(make_example(ids, [0, 0] + [int(rng.random() < 0.7) for _ in range(length - 2)]))
    return examples


def test_packed_logprobs_and_entropy_equal_separate_hugging_face_forwards(models):
    """Guards against sequences that attend to their neighbours in the pack, and against position_ids that do
    not restart."""
    ours, reference = models
    examples = make_examples(9)
    flat, packing = collate(examples, "cpu")
    with torch.no_grad():
        logprobs, entropy = Policy(ours)(flat.input_ids, flat.targets, flat.loss_mask, packing,
                                         temperature=0.7, with_entropy=True)
        for e, got, got_entropy in zip(examples, logprobs.split(packing.lengths),
                                       entropy.split(packing.lengths)):
            scores = torch.log_softmax(reference(e.input_ids[None]).logits[0] / 0.7, -1)
            expected = scores.gather(-1, e.targets[:, None])[:, 0]
            assert torch.allclose(got, expected * e.loss_mask, atol=2e-5)
            assert torch.allclose(got_entropy, -(scores.exp() * scores).sum(-1) * e.loss_mask, atol=2e-5)


def gradient(policy, examples, token_budget, world=1):
    """Loss and gradient of all examples, micro-batch by micro-batch, over all would-be ranks."""
    policy.zero_grad()
    total = sum(e.loss_mask.sum().item() for e in examples)
    loss_sum = 0.0
    for rank in pack([len(e) for e in examples], token_budget, world):
        for indices in rank:
            flat, packing = collate([examples[i] for i in indices], "cpu")
            logprobs, _ = policy(flat.input_ids, flat.targets, flat.loss_mask, packing)
            loss = -logprobs.sum() / total
            loss.backward()
            loss_sum += loss.item()
    return loss_sum, torch.cat([p.grad.flatten() for p in policy.parameters()])


@pytest.mark.parametrize("token_budget, world", [(40, 1), (100, 1), (90, 3), (16, 7)])
def test_loss_and_gradient_do_not_depend_on_packing(models, token_budget, world):
    """Guards against means per micro-batch: with them the loss scales with the number of micro-batches or
    ranks."""
    policy, examples = Policy(models[0]), make_examples(17)
    loss, grad = gradient(policy, examples, 10**6)
    packed_loss, packed_grad = gradient(policy, examples, token_budget, world)
    assert math.isclose(loss, packed_loss, rel_tol=1e-5)
    assert torch.allclose(grad, packed_grad, atol=1e-5 * grad.abs().max().item())


def test_the_chunked_head_changes_nothing(models, monkeypatch):
    """Guards against a chunk boundary that loses a token, and against recomputing with other settings."""
    policy, examples = Policy(models[0]), make_examples(17)
    loss, grad = gradient(policy, examples, 10**6)
    monkeypatch.setitem(sft.LOGIT_BYTES, "cpu", 4 * 97 * 7)
    chunked_loss, chunked_grad = gradient(policy, examples, 10**6)
    assert math.isclose(loss, chunked_loss, rel_tol=1e-6)
    assert torch.allclose(grad, chunked_grad, atol=1e-6 * grad.abs().max().item())


class MostLogits(TorchDispatchMode):
    """Rows of the largest (..., vocabulary) tensor that any operation returns."""
    rows = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, torch.Tensor) and tensor.shape[-1:] == (97,):
                self.rows = max(self.rows, tensor.numel() // 97)
        return result


def test_no_tensor_of_all_logits_exists(models, monkeypatch):
    """Guards against logits of a whole micro-batch, forward, kept for the backward, or in it: 10 GB for 16k
    tokens of Qwen's vocabulary."""
    policy, examples = Policy(models[0]), make_examples(17)
    trainable = sum(e.loss_mask.sum().item() for e in examples)
    rows = {}
    for chunk in (7, 10**6):
        monkeypatch.setitem(sft.LOGIT_BYTES, "cpu", 4 * 97 * chunk)
        with MostLogits() as seen:
            gradient(policy, examples, 10**6)
        rows[chunk] = seen.rows
    assert rows[10**6] == trainable  # the measurement sees them where they are
    assert rows[7] == 32  # the transposed head, (hidden, vocabulary)


def test_gradient_equals_hugging_face_cross_entropy(models):
    """The whole chain against a reference that shares none of it: labels -100, one padded sequence after the
    other."""
    ours, reference = models
    examples = make_examples(6)
    loss, grad = gradient(Policy(ours), examples, 64)
    reference.zero_grad()
    total = sum(e.loss_mask.sum().item() for e in examples)
    expected = 0.0
    for e in examples:
        labels = e.targets.masked_fill(e.loss_mask == 0, -100)
        logits = reference(e.input_ids[None]).logits[0]
        part = torch.nn.functional.cross_entropy(logits, labels, reduction="sum", ignore_index=-100) / total
        part.backward()
        expected += part.item()
    reference_grad = torch.cat([p.grad.flatten() for p in reference.parameters()])
    assert math.isclose(loss, expected, rel_tol=1e-5)
    assert torch.allclose(grad, reference_grad, atol=1e-5 * reference_grad.abs().max().item())


def test_masked_targets_get_no_gradient(models):
    """Guards against training on interpreter text: replacing every masked target must not move loss or
    gradient."""
    policy, examples = Policy(models[0]), make_examples(5)
    loss, grad = gradient(policy, examples, 200)
    for e in examples:
        e.targets = torch.where(e.loss_mask == 0, (e.targets + 13) % 97, e.targets)
    changed_loss, changed_grad = gradient(policy, examples, 200)
    assert loss == changed_loss and torch.equal(grad, changed_grad)


@pytest.mark.parametrize("world", [1, 2, 5])
def test_pack_covers_every_sequence_once_within_the_budget_on_equal_micro_batches(world):
    """Guards against ranks that run different numbers of micro-batches: with FSDP the shorter one hangs the
    run."""
    rng = random.Random(1)
    lengths = [rng.randint(1, 300) for _ in range(101)] + [900]
    ranks = pack(lengths, 700, world)
    assert len(ranks) == world and len({len(rank) for rank in ranks}) == 1
    bins = [indices for rank in ranks for indices in rank]
    assert sorted(i for indices in bins for i in indices) == list(range(len(lengths)))
    # the one over-long sequence raises the budget to its own length
    assert all(sum(lengths[i] for i in indices) <= 900 for indices in bins)
    loads = [sum(sum(lengths[i] for i in indices) for indices in rank) for rank in ranks]
    assert max(loads) <= 1.3 * min(loads)


@pytest.mark.parametrize("world", [1, 2, 5])
def test_a_budget_below_the_longest_sequence_is_the_longest_sequence(world, capsys):
    """Guards against a forward pass for every token of a batch, without a word."""
    rng = random.Random(1)
    lengths = [rng.randint(1, 300) for _ in range(101)]
    assert pack(lengths, 1, world) == pack(lengths, max(lengths), world)
    sft.say_floor(9, 9)
    assert capsys.readouterr().out == ""
    sft.say_floor(8, 9)
    assert "--token_budget 8: a micro-batch holds at least the longest" in capsys.readouterr().out


def test_more_ranks_than_sequences_leaves_empty_micro_batches_that_cost_nothing(models):
    """Guards against a rank without data: it must run a forward (FSDP gathers need it) that adds exactly
    nothing."""
    policy, examples = Policy(models[0]), make_examples(2)
    assert sum(not indices for rank in pack([5, 5], 8, 4) for indices in rank) == 2
    loss, grad = gradient(policy, examples, 8)
    wide_loss, wide_grad = gradient(policy, examples, 8, world=4)
    assert math.isclose(loss, wide_loss, rel_tol=1e-6) and torch.allclose(grad, wide_grad, atol=1e-6)


def test_example_aligns_masks_and_columns_with_the_scored_token():
    """Guards against the off-by-one that scores each token with its neighbour's mask or advantage."""
    e = make_example([10, 11, 12, 13], [0, 0, 1, 1], advantages=[0.0, 0.1, 0.2, 0.3])
    assert e.input_ids.tolist() == [10, 11, 12] and e.targets.tolist() == [11, 12, 13]
    assert e.loss_mask.tolist() == [0, 1, 1]
    assert torch.allclose(e.advantages, torch.tensor([0.1, 0.2, 0.3]))


def test_cosine_schedule_warms_up_and_ends_at_the_floor():
    """Guards against a first step at rate 0 and a schedule that rises again after its end."""
    factors = [cosine(step, 100, 10, floor=0.1) for step in range(100)]
    assert factors[0] == pytest.approx(0.1) and factors[9] == pytest.approx(1.0)
    assert all(a >= b for a, b in zip(factors[9:], factors[10:]))
    assert factors[-1] == pytest.approx(0.1, abs=0.01)
    factors = [sft.trapezoid(step, 100, 10) for step in range(100)]
    assert factors[0] == pytest.approx(0.1) and factors[9:51] == [1.0] * 42
    assert all(a > b for a, b in zip(factors[50:], factors[51:])) and 0 < factors[-1] <= 0.02


def test_warm_start_key_changes_with_arguments_and_not_with_where_it_is_kept(monkeypatch):
    """Guards against a stale warm start: a run with other traces, code share or seed must not reuse it."""
    import argparse
    monkeypatch.setattr(sft, "training_code", dict)  # the next test asks about code
    parser = argparse.ArgumentParser()
    sft.add_warm_start_arguments(parser)
    sft.add_trainer_arguments(parser)
    evaluation.add_format_arguments(parser)
    def key(*flags, traces=("a",)):
        recipe = sft.warm_start_recipe(parser.parse_args(flags))
        return sft.warm_start_folder(Path("nowhere"), recipe, traces, ["held out"]).name

    assert key() == key() == key("--warm_start_dir", "elsewhere") != key(traces=("b",))
    others = {
        key("--code_share", "0"),
        key("--sft_seed", "1"),
        key("--sft_lr", "0.1"),
        key("--tf32"),
        key("--prompt_template", "retool"),
        key("--template_kwargs", '{"a": 1}')
    }
    assert len(others | {key()}) == 7
    before = key()

    # The same vocabulary makes other tokens behind another chat template or EOS.
    tokenizer = copy.deepcopy(data.embedded_tokenizer())
    monkeypatch.setattr(sft, "embedded_tokenizer", lambda: tokenizer)
    assert key() == before
    tokenizer.chat_template += "."
    assert key() != before
    tokenizer.chat_template = tokenizer.chat_template[:-1]
    assert key() == before
    tokenizer.eos_token = "<|endoftext|>"
    assert key() != before


@pytest.fixture
def edit(tmp_path, monkeypatch):
    """edit(file, before, after): from then on sft.py reads a copy of the code with this change."""
    def edit(file, before, after):
        for path in Path(sft.__file__).parent.glob("*.py"):
            shutil.copy(path, tmp_path)
        text = (tmp_path / file).read_text()
        assert before in text
        (tmp_path / file).write_text(text.replace(before, after, 1))
        monkeypatch.setattr(sft, "__file__", str(tmp_path / "sft.py"))
    return edit


@pytest.mark.parametrize("file, before, after, changes", [
    ("ppo.py", "def gae(", "def gae2(", set()),
    ("eval.py", "def percent(", "def per_cent(", set()),
    ("sft.py", "def summarise(", "def summarise2(", set()),
    ("sft.py", "    x = x / (x.norm() + 1e-7)", "    x = x / (x.norm() + 1e-7)  # why", set()),
    ("sft.py", '"""U V^T of x', '"""About U V^T of x', set()),
    ("rollout.py", "TOOLS = [", "TOOLS = 1 * [", {"rollout.py"}),
    ("data.py", "def split_answer(", "def split_answers(", set()),
    ("sft.py", "def save_checkpoint(folder,", "def save_checkpoint(folder, *,", set()),
    ("sft.py", "    x = x / (x.norm() + 1e-7)", "    x = x / (x.norm() + 1e-6)", {"sft.py"}),
    ("sft.py", "LOGIT_BYTES = ", "LOGIT_BYTES = 1 and ", {"sft.py"}),
    ("rollout.py", "CLOSING |= {INTERPRETER_OPEN: INTERPRETER_CLOSE, ", "CLOSING |= {", {"rollout.py"}),
    ("rollout.py", "AttentionInterface.register", "\n\nAttentionInterface.register", set()),
    ("rollout.py", "def packed_attention(module,", "def packed_attention(layer,", {"rollout.py"}),
])
def test_only_code_that_can_matter_makes_a_warm_start_anew(edit, file, before, after, changes):
    """Guards against four minutes lost to a comment or a new metric, and against a warm start that other
    training code made."""
    old = sft.training_code()
    edit(file, before, after)
    new = sft.training_code()
    assert {name for name in old if old[name] != new[name]} == changes and old.keys() == new.keys()


def test_what_the_sandbox_says_makes_traces_anew(edit):
    """Guards against traces that quote what the sandbox printed before its words were changed."""
    old = sft.curation_code()
    edit("sandbox.py", 'raise OSError("some are left")', 'raise OSError("one is left")')
    new = sft.curation_code()
    assert new["sandbox.py"] != old["sandbox.py"] and new | {"sandbox.py": ""} == old | {"sandbox.py": ""}


def test_eos_is_trained_and_pad_is_another_token():
    """Guards against pad = eos: masked padding would silently untrain the end of the answer, and rows never
    stop."""
    tokenizer = data.embedded_tokenizer()
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    ids, mask = encode_response(tokenizer, "It is 4.\n<answer>\\boxed{4}</answer>", 64)
    assert ids[-1] == tokenizer.eos_token_id and mask[-1] == 1


def test_muon_steps_as_torch_does_and_along_the_singular_vectors():
    """Guards against momentum, Nesterov's look-ahead or the scale of tall matrices lost on the way to fp32 and to
    shards; torch's own, in bf16, differs by its rounding."""
    torch.manual_seed(0)
    start = [torch.randn(24, 8), torch.randn(8, 24), torch.randn(16, 16)]
    gradients = [[torch.randn_like(p) for p in start] for _ in range(4)]
    with evaluation.distributed():
        mesh = init_device_mesh("cpu", (1,))
        ours = [torch.nn.Parameter(distribute_tensor(p, mesh, [Shard(0)])) for p in start]
        theirs = [torch.nn.Parameter(p.clone()) for p in start]
        optimizers = [sft.Muon(ours, 0.1), torch.optim.Muon(theirs, lr=0.1, weight_decay=0.0)]
        for step in gradients:
            for p, q, gradient in zip(ours, theirs, step):
                p.grad, q.grad = distribute_tensor(gradient, mesh, [Shard(0)]), gradient.clone()
            for optimizer in optimizers:
                optimizer.step()
        for p, q, before in zip(ours, theirs, start):
            moved = (q - before).norm()
            assert (p.full_tensor() - q).norm() < 0.02 * moved
    u, s, v = torch.linalg.svd(gradients[0][0], full_matrices=False)
    rotated = u.T @ sft.orthogonalise(gradients[0][0]) @ v.T
    assert 0.6 < rotated.diag().min() and rotated.diag().max() < 1.3
    assert (rotated - rotated.diag().diag()).abs().max() < 1e-4
