"""Which checkpoints are computed right, and are the others refused in one line?"""
import argparse
import copy
import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from conftest import StubSandbox, decode, run, scripted
from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    trainers,
)
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedTokenizerFast,
)

import eval as evaluation
import rollout
from data import embedded_problem
from rollout import (
    Pieces,
    Trajectory,
    encode_interpreter,
    encode_prompt,
    encode_response,
    encode_text,
    end_tokens,
    load_model,
    load_tokenizer,
    use_packed_attention,
)
from sandbox import UserError

SMALL = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
             intermediate_size=48, max_position_embeddings=256, bos_token_id=None, pad_token_id=0)
EXPERTS = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16)
LINEAR = dict(head_dim=8, linear_num_value_heads=4, linear_num_key_heads=2, linear_key_head_dim=8,
              linear_value_head_dim=8)

RIGHT = [
    ("qwen2", {}), ("qwen3", {"head_dim": 8}), ("llama", {}), ("gemma", {"head_dim": 8}), ("olmo2", {}),
    ("phi3", {}), ("mistral", {"sliding_window": None}), ("smollm3", {}), ("glm4", {"head_dim": 8}),
    ("mixtral", {"num_local_experts": 4, "sliding_window": None}),
    ("qwen2_moe", EXPERTS | {"shared_expert_intermediate_size": 16}), ("qwen3_moe", EXPERTS | {"head_dim": 8}),
    ("llama", {"rope_parameters": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
                                   "high_freq_factor": 4.0, "original_max_position_embeddings": 64,
                                   "rope_theta": 10000.0}}),
    ("qwen2", {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 10000.0,
                                   "original_max_position_embeddings": 64}})]
REFUSED = [
    ("granite", {"logits_scaling": 8.0}, "scaled logits"), ("cohere", {"logit_scale": 0.06}, "scaled logits"),
    ("gemma2", {"head_dim": 8}, "sliding_window"), ("gemma3_text", {"head_dim": 8}, "sliding_window"),
    ("qwen3_next", EXPERTS | LINEAR | {"shared_expert_intermediate_size": 16}, "layers that are not attention"),
    ("qwen3_5_text", LINEAR, "layers that are not attention"),
    ("lfm2", {"layer_types": ["conv", "full_attention"]}, "layers that are not attention"),
    ("falcon_h1", {}, "layers that are not attention"),
    ("jamba", {"num_experts": 2, "attn_layer_period": 2, "attn_layer_offset": 1}, "layers that are not"),
    ("minimax", {"num_local_experts": 2}, "layers that are not attention"),
    ("llama4_text", {"head_dim": 8, "num_local_experts": 2, "intermediate_size_mlp": 48}, "chunked"),
    ("phi3", {"rope_parameters": {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [4.0] * 4,
                                  "rope_theta": 1e4, "original_max_position_embeddings": 64}},
     "length of the longest sequence"),
    ("gpt2", {"n_embd": 32, "n_layer": 2, "n_head": 4}, "has no attribute 'model'"),
    ("opt", {"ffn_dim": 48, "word_embed_proj_dim": 32}, "RuntimeError"),
    ("gpt_neox", {}, "has no attribute 'model'"), ("stablelm", {}, "AttributeError"),
    ("mamba", {}, "has no attribute 'model'"),
    ("deepseek_v3", {"n_routed_experts": 4, "q_lora_rank": 16, "kv_lora_rank": 8, "qk_rope_head_dim": 4,
                     "qk_nope_head_dim": 4, "v_head_dim": 8, "moe_intermediate_size": 16, "n_group": 1,
                     "topk_group": 1, "num_experts_per_tok": 2}, "RuntimeError")]


def tiny(architecture, changes, vocabulary, dtype=torch.float32):
    torch.manual_seed(0)
    config = AutoConfig.for_model(architecture, **(SMALL | {"vocab_size": vocabulary} | changes))
    model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    with torch.no_grad():  # as initialised, attention is nearly uniform and hides what it looks at
        for name, weight in model.named_parameters():
            if "norm" not in name and weight.dim() > 1:
                weight.mul_(5.0)
    return model


@pytest.mark.parametrize("architecture, changes", RIGHT, ids=range(len(RIGHT)))
def test_supported_architectures_give_the_tokens_of_generate(tokenizer, architecture, changes):
    """Guards against an engine that is right for Qwen2 alone. Prompts of several lengths share three slots."""
    model = tiny(architecture, changes, len(tokenizer))
    if "experts" not in str(changes):  # whose grouped products know no float64; a tie would fail the test
        model.double()
    prompts, eos = [list(range(5, 5 + n)) for n in (3, 11, 7, 20)], tokenizer.eos_token_id
    expected = [model.generate(torch.tensor([p]), max_new_tokens=12, do_sample=False, eos_token_id=eos,
                               attention_mask=torch.ones(1, len(p)))[0, len(p):].tolist() for p in prompts]
    use_packed_attention(model, "tiny")
    found = run(model, tokenizer, prompts, tools=False, temperature=0, max_response_tokens=12, n_slots=3)
    assert [t.response_ids for t in found] == expected


@pytest.mark.parametrize("architecture, changes, reason", REFUSED, ids=[f"{a}-{r[:9]}" for a, _, r in REFUSED])
def test_other_architectures_are_refused_with_their_reason(architecture, changes, reason):
    """Guards against models that train silently wrong: state that leaks from one packed sequence into the next,
    attention of another kind, a head that is not all there is to the logits. bf16 must not hide it."""
    with pytest.raises(UserError, match=f"tiny: the architecture {architecture} is not supported: .*{reason}"):
        use_packed_attention(tiny(architecture, changes, 128, torch.bfloat16), "tiny")


def test_the_check_leaves_a_bf16_model_as_it_was(tokenizer):
    """Guards against rotary frequencies or weights rounded on the way through fp32."""
    before = tiny("qwen2", {}, 128, torch.bfloat16)
    after = copy.deepcopy(before)
    use_packed_attention(after, "tiny")
    for (name, a), (_, b) in zip(before.state_dict().items(), after.state_dict().items()):
        assert a.dtype == b.dtype and torch.equal(a, b), name
    assert torch.equal(before.model.rotary_emb.inv_freq, after.model.rotary_emb.inv_freq)


@pytest.mark.parametrize("error", [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), RuntimeError("CUDA error: out of memory"),
    RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"), MemoryError()])
def test_a_lack_of_memory_is_not_called_an_unsupported_architecture(error):
    """Guards against a user who looks for another model, where a smaller one or another machine would do."""
    model = tiny("qwen2", {}, 128)

    def fail(*args, **kwargs):
        raise error
    model.model.layers[1].mlp.forward = fail
    with pytest.raises(UserError, match="^tiny: not enough memory"):
        use_packed_attention(model, "tiny")


def saved(tmp_path, tokenizer, **generation):
    model = tiny("llama", {"eos_token_id": tokenizer.eos_token_id}, len(tokenizer))
    for name, value in generation.items():
        setattr(model.generation_config, name, value)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    return str(tmp_path)


def test_a_model_is_checked_before_it_is_moved(tokenizer, tmp_path):
    """Guards against fp32 copies of all weights on a GPU that has room for those in bf16 alone. A "meta" device
    computes nothing: a check there could not pass."""
    moved = load_model(saved(tmp_path, tokenizer), "meta", "bf16")
    assert {(p.device.type, p.dtype) for p in moved.parameters()} == {("meta", torch.bfloat16)}


def test_any_of_several_ends_stops_a_row_and_sft_trains_the_template_s(tokenizer, tmp_path):
    """Guards against rows of Gemma and Llama-3 that run to the limit and score -1: their tokenizer's EOS is not
    the token that ends a turn."""
    other = copy.deepcopy(tokenizer)
    other.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|turn_end|>"]})
    turn_end, eos = other.convert_tokens_to_ids("<|turn_end|>"), other.eos_token_id
    other.chat_template = other.chat_template.replace("<|im_end|>", "<|turn_end|>")
    path = saved(tmp_path, other, eos_token_id=[eos, turn_end, 7])
    loaded, model = load_tokenizer(path), load_model(path, "cpu")
    assert loaded.eos_token_id == turn_end and end_tokens(model, loaded) == {eos, turn_end, 7}
    assert encode_response(loaded, "It is 4.", 9)[0][-1] == turn_end
    for end in (eos, turn_end, 7):
        [t] = run(model, loaded, [[5, 6]], tools=False, max_response_tokens=9,
                  logits_processor=scripted([9, 9, end, 9, 9, 9, 9, 9, 9]))
        assert t.finish_reason == "eos" and t.response_ids == [9, 9, end]


def test_a_saved_policy_stops_in_plain_transformers_where_its_training_ended_turns(tokenizer, tmp_path, monkeypatch):
    """Guards against a policy from a base model that talks on for ever elsewhere: its config.json and
    generation_config.json named the end of a text alone, not the end of turn that it was trained to write."""
    import ppo
    import sft
    base = copy.deepcopy(tokenizer)
    base.add_special_tokens({"additional_special_tokens": ["<|turn_end|>"]})
    turn_end, text_end = base.convert_tokens_to_ids("<|turn_end|>"), base.eos_token_id
    base.chat_template = base.chat_template.replace("<|im_end|>", "<|turn_end|>")
    path = saved(tmp_path / "base", base, eos_token_id=text_end)
    loaded, model = load_tokenizer(path), load_model(path, "cpu")
    monkeypatch.setattr(evaluation, "report_page", lambda folders: "")
    run_folder = SimpleNamespace(path=tmp_path, files={}, tracker=None, writes=True, results={})
    ppo.save_beside_weights(model, loaded, tmp_path / "model")
    ppo.RunFolder.finish(run_folder, model, loaded)

    process = SimpleNamespace(rank=0, device="cpu", world=1)
    recipe = SimpleNamespace(model=path, sft_seed=0, template="{question}", max_interpreter_tokens=9, token_budget=99,
                             sft_mask_interpreter="on", mask_failed="on", template_kwargs="")
    trace = {"question": "1+1?", "response": "It is 2.", "failed_calls": []}
    for name in ("shard", "train", "sync_weights"):
        monkeypatch.setattr(sft, name, lambda *arguments: None)
    sft.train_on_traces([trace], [trace], recipe, SimpleNamespace(sft_save_every=0), tmp_path / "sft", process)
    for folder in ("checkpoint", "model", "sft"):
        assert AutoConfig.from_pretrained(tmp_path / folder).eos_token_id == [text_end, turn_end], folder
        assert GenerationConfig.from_pretrained(tmp_path / folder).eos_token_id == [text_end, turn_end], folder

    def says(script):
        def processor(ids, scores):
            return torch.full_like(scores, -torch.inf).index_fill(1, torch.tensor(script[ids.shape[1] - 2]), 0.0)
        return [processor]

    for folder in ("checkpoint", "sft"):
        plain = AutoModelForCausalLM.from_pretrained(tmp_path / folder)
        for end in (turn_end, text_end):
            out = plain.generate(torch.tensor([[5, 6]]), max_new_tokens=9, do_sample=False,
                                 logits_processor=says([9, 9, end] + [9] * 6))
            assert out[0].tolist() == [5, 6, 9, 9, end]
    resumed = load_model(str(tmp_path / "model"), "cpu", weights=False)
    assert end_tokens(resumed, load_tokenizer(str(tmp_path / "model"))) == {text_end, turn_end}


def test_dropout_stays_off_where_activations_are_checkpointed():
    """Guards against training mode, which transformers asks for, and its dropout: the ratio would not be 1."""
    import eval as evaluation
    import sft
    from sft import Policy, collate, make_example
    model = tiny("phi3", {"resid_pdrop": 0.5, "embd_pdrop": 0.5, "attention_dropout": 0.5}, 128)
    use_packed_attention(model, "tiny")
    flat, packing = collate([make_example(list(range(9)), [1] * 9)], "cpu")
    arguments = flat.input_ids, flat.targets, flat.loss_mask, packing
    expected, _ = Policy(model)(*arguments)
    with evaluation.distributed() as process:
        policy = sft.shard(Policy(model), model, SimpleNamespace(
            dtype="fp32", replicas=1, cpu_offload=False, activation_checkpointing=True), process)
        assert torch.allclose(policy(*arguments)[0], expected, atol=1e-6)
        policy(*arguments)[0].sum().backward()


@pytest.mark.parametrize("name, line", [
    ("run", "a run's model is in its folder checkpoint"), ("model.gguf", "how to convert a GGUF file"),
    ("empty", "no config.json in there"), ("./nowhere", "no such folder, and not a hub id"),
    ("nowhere", "no such folder, and not a hub id")])
def test_what_is_no_checkpoint_is_refused_with_what_to_do(tmp_path, monkeypatch, name, line):
    """Guards against "Repo id must be in the form", a traceback, or a minute of retries."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run" / "checkpoint").mkdir(parents=True)
    (tmp_path / "model.gguf").write_text("")
    (tmp_path / "empty").mkdir()
    for load in (rollout.load_tokenizer, rollout.load_config, lambda path: load_model(path, "cpu")):
        with pytest.raises(UserError, match=line):
            load(name)


@pytest.fixture(scope="module")
def smollm(tmp_path_factory):
    """(tokenizer, model, the model under Hugging Face's attention) of SmolLM2's kind, tiny: EOS is also PAD,
    the chat template adds a system message, digits stand alone, ">" joins what follows, and there are special
    tokens that are neither EOS, BOS, UNK nor PAD."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        [embedded_problem("traces", 0, i).by_code for i in range(300)] + ["</code></answer>"] * 99,
        trainers.BpeTrainer(vocab_size=500, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), special_tokens=[
            "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<repo_name>"]))
    template = ("{% for m in messages %}{% if loop.first and m['role'] != 'system' %}<|im_start|>system\nBe kind"
                "<|im_end|>\n{% endif %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}"
                "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<|im_start|>", eos_token="<|im_end|>", unk_token="<|endoftext|>",
        pad_token="<|im_end|>", chat_template=template)
    path = saved(tmp_path_factory.mktemp("smollm"), tokenizer, bos_token_id=1, eos_token_id=2, pad_token_id=2)
    theirs = AutoModelForCausalLM.from_pretrained(path, attn_implementation="eager").eval()
    return load_tokenizer(path), load_model(path, "cpu"), theirs


@pytest.mark.parametrize("call", ["Let me see.\n<code>\n```python\nprint(48)\n```\n</code>",
                                  "x=<code>print(7)</code></"])
def test_tool_turns_equal_generate_where_eos_is_pad(smollm, call):
    """Guards against rows that end at a PAD, a snippet or its end lost in "=<" or "></", special tokens in an
    output that end or split the text, and turns that differ from Hugging Face's."""
    tokenizer, model, theirs = smollm
    output = "It is 12345<|im_end|><repo_name></interpreter>"
    prompts = [encode_prompt(tokenizer, "{question}", f"What is {n} + 1?") for n in (5, 67, 89012)]
    forced = encode_text(tokenizer, call)
    done = run(model, tokenizer, prompts, StubSandbox(output), temperature=0.0, n_slots=2, n_samples=1,
               max_response_tokens=110, logits_processor=scripted([None] * 3 + forced))
    for t in done:
        begin = 3 + len(forced)
        assert [c.code for c in t.tool_calls][:1] == ["print(48)" if "48" in call else "print(7)"]
        overrun = call.partition("</code>")[2]
        block = encode_interpreter(tokenizer, output, 128, overrun)
        assert t.response_ids[begin:begin + len(block)] == block and not set(block) & {0, 1, 2, 3}
        assert t.loss_mask == [1] * begin + [0] * len(block) + [1] * (len(t.loss_mask) - begin - len(block))
        for start, end in ((0, 3), (begin + len(block), len(t.response_ids))):
            ids = torch.tensor([t.prompt_ids + t.response_ids[:start]])
            out = theirs.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False,
                                  max_new_tokens=end - start)
            assert out[0, ids.shape[1]:].tolist() == t.response_ids[start:end]


def test_sft_trains_the_eos_that_is_also_the_pad(smollm):
    """Guards against an EOS that is masked as padding, so that no response ever ends, a second system message,
    and digits that join in one place and not in another."""
    tokenizer = smollm[0]
    problem = embedded_problem("train", 0, 3)
    prompt = encode_prompt(tokenizer, "{question}", problem.question)
    assert decode(tokenizer, prompt) == ("<|im_start|>system\nBe kind<|im_end|>\n<|im_start|>user\n"
                                         f"{problem.question}<|im_end|>\n<|im_start|>assistant\n")
    text = "Go.\n<code>\nprint(12*345)\n</code>\n<interpreter>\n4140\n</interpreter>\nIt is 4140.\n"
    ids, mask = encode_response(tokenizer, text, 128)
    assert decode(tokenizer, ids) == text + "<|im_end|>" and (ids[-1], mask[-1]) == (tokenizer.pad_token_id, 1)
    trained = decode(tokenizer, [i for i, m in zip(ids, mask) if m])
    assert trained == "Go.\n<code>\nprint(12*345)\n</code>\nIt is 4140.\n<|im_end|>"
    assert [decode(tokenizer, [i]) for i in ids if decode(tokenizer, [i]).strip().isdigit()] == [*"1234541404140"]


# ------------------------------------------------------------------------------------------------------------
# Chat templates that people bring

ROLE = "'<|im_start|>' + m['role'] + '\n'"
CONTENT = "{{ m['content'] }}"
GENERATION = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"


def turns(body, around=GENERATION):
    return "{% for m in messages %}" + body + "{% endfor %}" + around


def brought(tokenizer, tmp_path, template):
    """What load_tokenizer makes of a checkpoint with this chat template and several special tokens."""
    other = copy.deepcopy(tokenizer)
    other.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|channel|>", "<|end|>", "<|eot|>"]})
    other.chat_template = template
    return load_tokenizer(saved(tmp_path, other))


@pytest.mark.parametrize("asked, written", [
    ("strftime_now('%d %b %Y')", "26 Jul 2024"), ("strftime_now('%Y-%m-%d')", "2024-07-26"),
    ("strftime_now('%-d %B %y, %H:%M')", "26 July 24, 00:00"), ("strftime_now(format='%A %j')", "Friday 208"),
    ("(strftime_now('%Y') | int) + 1", "2025"),
    ("date() if strftime_now is defined else 'none'", "26/07/24"),
])
@pytest.mark.parametrize("named", [False, True])
def test_a_prompt_is_the_same_tomorrow(tokenizer, tmp_path, monkeypatch, asked, written, named):
    """Guards against today's date in prompts (Llama 3.2, SmolLM3, gpt-oss): a resumed run and an evaluation would
    see other prompts than those before them."""
    template = ("{%- macro date() %}{{ strftime_now('%d/%m/%y') }}{% endmacro %}\n"
                "  {% if true %}\n" + turns("{{ " + ROLE + " + m['content'] + '<|end|>\n' }}") +
                "{{ 'It is ' ~ (" + asked + ") }}{% endif %}")
    loaded = brought(tokenizer, tmp_path, {"default": template, "tools": template} if named else template)
    expected = "<|im_start|>user\n1+1?<|end|>\n<|im_start|>assistant\nIt is " + written
    assert decode(loaded, encode_prompt(loaded, "{question}", "1+1?")) == expected
    loaded.save_pretrained(tmp_path)
    again = load_tokenizer(str(tmp_path))
    assert again.chat_template == loaded.chat_template
    assert decode(again, encode_prompt(again, "{question}", "1+1?")) == expected


@pytest.mark.parametrize("template, end", [
    # The answer begins with special tokens, and the generation prompt has none of them.
    (turns("{{ " + ROLE + " }}{% if m['role'] == 'assistant' %}{{ '<|channel|>final' }}{% endif %}" + CONTENT +
           "<|end|>"), "<|end|>"),
    (turns("<|im_start|>{{ m['role'] }}<|channel|>" + CONTENT + "{{ '<|eot|>' if m['role'] == 'assistant' "
           "else '<|end|>' }}"), "<|eot|>"),
    # There is no generation prompt.
    (turns("{{ " + ROLE + " }}" + CONTENT + "<|end|>", ""), "<|end|>"),
    # The generation prompt opens a thought, which history does not show.
    (turns("{{ " + ROLE + " + m['content'].split('</think>')[-1] }}<|end|>",
           "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n<|channel|><think>\n' }}{% endif %}"), "<|end|>"),
    # Nothing after an answer: the tokenizer's EOS stays.
    (turns("{{ " + ROLE + " + m['content'] + '\n' }}"), "<|im_end|>"),
    # After the end of turn stands another special token.
    (turns("{{ " + ROLE + " + m['content'] + '<|eot|><|end|>' }}"), "<|eot|>"),
])
def test_the_end_of_turn_is_what_stands_behind_the_answer(tokenizer, tmp_path, end, template):
    """Guards against a policy that is trained to begin an answer in order to end it: the first special token of
    the assistant's turn was taken where it is not the end."""
    assert brought(tokenizer, tmp_path, template).eos_token == end


@pytest.mark.parametrize("template, line", [
    (turns("{% for part in m['content'] %}{{ part['text'] }}{% endfor %}"), "does not write the user's message"),
    ("<|im_start|>Hello.", "does not write the user's message"),
    (turns("{{ raise_exception('a system message is needed') }}"), "TemplateError: a system message is needed"),
    ("{% for m in messages %}" + CONTENT, "TemplateSyntaxError"),
    ("{{ nothing.of_that.name }}", "UndefinedError"),
    (turns("{{ 1 + m['content'] }}"), "TypeError"),
    (turns("{{ raise_exception('') }}"), "fails on a question"),
    ({"tools": turns(CONTENT)}, "ValueError"),
])
def test_a_template_that_loses_the_question_or_raises_is_refused_in_one_line(tokenizer, tmp_path, template, line):
    """Guards against training on prompts without a question, and a traceback from inside a template."""
    with pytest.raises(UserError, match=line) as refused:
        brought(tokenizer, tmp_path, template)
    assert "\n" not in str(refused.value) and str(tmp_path) in str(refused.value)


@pytest.mark.parametrize("opened, is_said", [("<think>\\n", True), ("<think>\\n\\n</think>\\n", False), ("", False)])
def test_a_prompt_that_ends_inside_a_thought_is_said_once(tokenizer, tmp_path, capsys, opened, is_said):
    """Guards against a run whose answers all stand in a thought, without a word."""
    template = turns("{{ " + ROLE + " }}" + CONTENT + "<|end|>", GENERATION + opened)
    brought(tokenizer, tmp_path, template)
    load_tokenizer(str(tmp_path))
    assert capsys.readouterr().err.count("opens a thought") == int(is_said)


THINKS = turns("{{ " + ROLE + " + m['content'] }}<|end|>", GENERATION + (
    "{% macro show(x) %}{{ x }}{{ effort }}{% endmacro %}{% if enable_thinking is defined and enable_thinking is false "
    "%}{{ '<think>\n\n</think>\n\n' }}{% else %}{{ '<think>\n' }}{% endif %}{{ show(effort) }}"))


def test_variables_of_a_chat_template_are_set_for_good(tokenizer, tmp_path, capsys):
    """Guards against thoughts that were switched off in training and are on in evaluation or in other programs."""
    loaded = brought(tokenizer, tmp_path, "\n" + THINKS)
    before = "\n<|im_start|>user\n1+1?<|end|><|im_start|>assistant\n"
    assert decode(loaded, encode_prompt(loaded, "{question}", "1+1?")) == before + "<think>\n"
    assert "--template_kwargs may close it" in capsys.readouterr().err
    shutil.copytree(tmp_path, tmp_path / "saved")
    value = 'a\'b"\\c %} {{ d }}\n😀é\u2028'
    for kwargs, shown in [({"enable_thinking": False}, ""), ({"effort": value, "enable_thinking": False}, value * 2),
                          ({"effort": [1.5, -2, None, True, {}], "enable_thinking": False},
                           "[1.5, -2, None, True, {}]" * 2)]:
        loaded = load_tokenizer(str(tmp_path), rollout.json_object(json.dumps(kwargs)))
        loaded.save_pretrained(tmp_path / "saved")
        again = load_tokenizer(str(tmp_path / "saved"))
        twice = load_tokenizer(str(tmp_path / "saved"), json.dumps(kwargs))
        assert loaded.chat_template == again.chat_template == twice.chat_template
        plain = AutoTokenizer.from_pretrained(tmp_path / "saved")
        rendered = plain.apply_chat_template([{"role": "user", "content": "1+1?"}], tokenize=False,
                                             add_generation_prompt=True)
        assert rendered == before + "<think>\n\n</think>\n\n" + shown
        assert again.encode(rendered, add_special_tokens=False) == encode_prompt(again, "{question}", "1+1?")
    # A value of a saved tokenizer gives way to another one.
    other = load_tokenizer(str(tmp_path / "saved"), '{"enable_thinking": true, "effort": 3}')
    assert decode(other, encode_prompt(other, "{question}", "1+1?")) == before + "<think>\n33"
    with pytest.raises(UserError, match="--template_kwargs: its chat template knows no 'enable_thiking'$"):
        load_tokenizer(str(tmp_path), '{"enable_thiking": false}')


@pytest.mark.parametrize("text", ["enable_thinking=false", "[1]", "3", "null", '{"a": NaN}', '{"a": 1e999}', "{'a': 1}"])
def test_template_kwargs_are_a_json_object(text, capsys):
    """Guards against a traceback, or a setting that is not the one that was meant."""
    parser = argparse.ArgumentParser()
    evaluation.add_format_arguments(parser)
    assert parser.parse_args(["--template_kwargs", '{"a": {"b": 1e3}}']).template_kwargs == '{"a": {"b": 1e3}}'
    with pytest.raises(SystemExit):
        parser.parse_args(["--template_kwargs", text])
    assert f"--template_kwargs: {text}: must be a JSON object" in capsys.readouterr().err


def test_a_template_that_loses_one_question_alone_is_refused_there(tokenizer, tmp_path):
    """Guards against a template that cuts what stands behind a word, so that some questions lose their end."""
    loaded = brought(tokenizer, tmp_path, turns("{{ " + ROLE + " + m['content'].split('/think')[0] | trim }}"))
    assert decode(loaded, encode_prompt(loaded, "{question}", " 1+1?\n")) == (
        "<|im_start|>user\n1+1?<|im_start|>assistant\n")
    with pytest.raises(UserError, match="does not write the user's message as it is: 'Is it /think or 2"):
        encode_prompt(loaded, "{question}", "Is it /think or 2?")


# ------------------------------------------------------------------------------------------------------------
# Tokenizers that people bring


SPACED = ["bpe", "bpe, first", "bpe, normalizer", "unigram", "byte-level"]


def make_spaced(kind):
    """A tokenizer that puts a space in front of every text: SentencePiece of Llama 2's kinds, small, with bytes
    for unknown characters, or byte-level."""
    texts = ["[[1 2]\n [3 4]] So it is 4. x = 5 print(12) " * 2, "the answer is </code> <interpreter>\n"] * 40
    specials = ["<unk>", "<s>", "</s>"] + [f"<0x{byte:02X}>" for byte in range(256)]
    if kind == "unigram":
        tokenizer, trainer = Tokenizer(models.Unigram()), trainers.UnigramTrainer(
            vocab_size=380, special_tokens=specials, unk_token="<unk>")
    else:
        tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
        trainer = trainers.BpeTrainer(vocab_size=420, special_tokens=specials)
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(),
                                           decoders.Strip(" ", 1, 0)])
    if kind == "byte-level":
        tokenizer = Tokenizer(models.BPE())
        trainer = trainers.BpeTrainer(vocab_size=420, special_tokens=specials[:3],
                                      initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
        tokenizer.decoder = decoders.ByteLevel()
    elif kind == "bpe, normalizer":
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(
            prepend_scheme="first" if "first" in kind else "always", split=False)
    tokenizer.train_from_iterator(texts, trainer)
    content = json.loads(tokenizer.to_str())
    content["added_tokens"] = content["added_tokens"][:3]
    content["model"]["byte_fallback"] = kind != "byte-level"
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(content)), unk_token="<unk>",
                                   bos_token="<s>", eos_token="</s>")


@pytest.fixture(scope="module", params=SPACED)
def spaced(request):
    return make_spaced(request.param)


SEGMENTS = ["[[1 2]\n [3 4]]", " [3 4]\n", "x = 5", "\n4", "  two", "é漢😀\n\n", "0", "</code>", "é", "\n", "", " "]


def test_segments_join_without_a_space_that_nobody_wrote(spaced):
    """Guards against a space in front of every segment with SentencePiece (Llama 2, TinyLlama): the first line of
    a printed matrix is shifted against the others."""
    pieces, last = Pieces(spaced), spaced.encode("x", add_special_tokens=False)[-1]
    for text in SEGMENTS:
        for after in SEGMENTS:
            ids = [last] + encode_text(spaced, text) + encode_text(spaced, after)
            assert decode(spaced, ids).strip(" ") == ("x" + text + after).strip(" "), (text, after)
            if after.isascii() and text.isascii():
                assert "".join(pieces[token] for token in ids[1:]) == text + after


def test_the_words_of_a_report_stand_apart(spaced):
    """Guards against a page of responses whose words are joined: alone, a SentencePiece token loses its space."""
    t = Trajectory(0, 0, [1], encode_text(spaced, "So it is 4.\n x = é"))
    row = evaluation.describe_trajectory(t, spaced, {"answer": "4", "family": "none"})
    assert "".join(row["tokens"]).encode("ascii", "ignore") == b"So it is 4.\n x = "


def test_a_printed_matrix_stands_as_it_was_printed(spaced):
    """Guards against interpreter blocks and traces that say something else than the snippet printed."""
    assert decode(spaced, [spaced.encode("x", add_special_tokens=False)[-1]] + encode_interpreter(
        spaced, "[[1 2]\n [3 4]]\n", 99)).strip() == "x\n<interpreter>\n[[1 2]\n [3 4]]\n</interpreter>"
    text = "Go.\n<code>\nprint(12)\n</code>\n<interpreter>\n[[1 2]\n [3 4]]\n</interpreter>\nIt is é 4."
    ids, mask = encode_response(spaced, text, 99)
    assert decode(spaced, ids).strip() == text + "</s>" and len(ids) == len(mask)
    ids, mask = encode_response(spaced, text, 99, masked_calls=[0])
    trained = [token for token, is_trained in zip(ids, mask) if is_trained]
    assert decode(spaced, trained).strip() == "Go.\n\nIt is é 4.</s>"


def test_a_trace_that_spells_the_end_of_turn_does_not_end(spaced):
    """Guards against a Unigram model, which finds its special tokens in its own vocabulary."""
    for text in ("a</s>b", "</s>", "So </s></s><s> it is", " </s>\n<s>"):
        ids, mask = encode_response(spaced, text, 99)
        assert not set(ids[:-1]) & {1, 2} and len(ids) == len(mask)
        last = spaced.encode("x", add_special_tokens=False)[-1]
        assert decode(spaced, [last] + ids).strip(" ") == "x" + text + "</s>"


CONTROLS = ["<|im_end|>", "<｜User｜>", "</think>", "<tool_call>", "< |im_end|>", "|im|", "<pad2>", "▁▁", "★"]


@pytest.fixture(scope="module", params=["embedded", *SPACED])
def controlled(request, tokenizer):
    """A tokenizer with added tokens that are not marked special, and the ids of all that control."""
    tokenizer = copy.deepcopy(tokenizer) if request.param == "embedded" else make_spaced(request.param)
    tokenizer.add_tokens([AddedToken(text, special=False, normalized=False, lstrip=text == "<pad2>")
                          for text in CONTROLS] + ["    "])
    tokenizer.chat_template = turns("<｜User｜>" + CONTENT + "<tool_call>")
    return tokenizer, set(tokenizer.added_tokens_decoder) - set(tokenizer.convert_tokens_to_ids(["    ", "★"]))


TROUBLE = ["</think>", "a<|im_end|>\n<｜User｜>b", "<<tool_call>>", "x   <pad2>", "<|im_end|>" * 3, "<|im|>",
           "▁▁▁ ▁▁", "</s><s> <unk>"]


def test_outputs_and_questions_hold_no_added_token(controlled):
    """Guards against DeepSeek's role tokens, </think> and <tool_call> as ids in forced text and questions: they
    are added but not marked special, and open a turn or close a thought."""
    tokenizer, controls = controlled
    for text in TROUBLE + CONTROLS[:-1]:
        ids = encode_interpreter(tokenizer, text, 99)
        assert not set(ids) & controls, (text, tokenizer.convert_ids_to_tokens(ids))
        said = decode(tokenizer, ids).strip()[len("<interpreter>"):-len("</interpreter>")]
        # SentencePiece writes a space as ▁.
        assert "".join(said.replace("▁", " ").split()) == "".join(text.replace("▁", " ").split())
        ids = encode_prompt(tokenizer, "Use <tool_call>: {question}!", text)
        theirs = encode_prompt(tokenizer, "Use <tool_call>: {question}!", "2")
        assert [token for token in ids if token in controls] == [token for token in theirs if token in controls]


@pytest.mark.parametrize("text", ["1 < 2 | 3 > 2", "if x:\n    y = 漢😀\n        z", "a ★ b", "  ", "</ think>"])
def test_text_without_added_tokens_is_not_touched(controlled, text):
    """Guards against spaces in printed code, for runs of spaces are added tokens of some tokenizers, and against
    unknown characters that are taken for the token of the unknown."""
    assert rollout.break_added_tokens(controlled[0], text) == text
