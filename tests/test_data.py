"""Are problems right, endless, and apart? Is every layout understood?"""
import asyncio
import contextlib
import io
import json
import os
import re
import subprocess
import sys
from collections import Counter, defaultdict
from fractions import Fraction
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
from conftest import decode

import data
import rollout
import sft
from data import UserError, embedded_problem, extract_answer, load_problems, read_row
from eval import exact_value, one_spelling
from rollout import encode_text, load_tokenizer

ROOT = Path(data.__file__).parent
REAL = ROOT.parent / "shared" / "data"
SPLITS = data.SPLITS


@pytest.fixture(scope="module")
def drawn():
    """{split: 2000 problems}"""
    return {split: [embedded_problem(split, 0, i) for i in range(2000)] for split in SPLITS}


# ------------------------------------------------------------------------------------------------------------
# The embedded problems: every answer again, the slow way


def slow_power(base, exponent, modulus):
    result = 1
    for _ in range(exponent):
        result = result * base % modulus
    return result


def slow_gcd(a, b):
    return max(d for d in range(1, min(a, b) + 1) if a % d == 0 and b % d == 0)


def slow_digits(n):
    count = 0
    while n:
        n, count = n // 10, count + 1
    return count


def slow_power_sum(n, d, k):
    total = 0
    for x in range(n + 1):
        if x % d == 0:
            total += x**k
    return int(str(total)[-2:])


def slow_search(box):
    """Ask for every number."""
    return next(x for x in range(1, rollout.HIGHEST + 1) if asked(box, x) == "equal")


def asked(box, x):
    service = rollout.Service(SimpleNamespace(equal=None), busy=0.0)
    return asyncio.run(service.run(f"print(ask({box}, {x}))")).output


BRUTE_FORCE = {
    "last_digit": lambda n: int(str(n)[-1]),
    "is_odd": lambda n: len(range(1, n + 1, 2)) - len(range(2, n + 1, 2)),
    "power_remainder": slow_power,
    "common_divisor": slow_gcd,
    "digit_sum": lambda a, b: sum(int(d) for d in f"{a * b}"),
    "power_sum": slow_power_sum,
    "digit_count": lambda a, b: slow_digits(a**b),
    "product_remainder": lambda a, b, m: sum([a] * b) % m,
    "search": slow_search,
    "sum_of_digit_sums": lambda a, b: sum(int(d) for d in f"{a + b}"),
}


@pytest.mark.parametrize("split", SPLITS)
def test_reference_answers_equal_brute_force(drawn, split):
    """Guards against a wrong reference: RL would reward the mistake."""
    for p in drawn[split][:400]:
        expected = str(BRUTE_FORCE[p.family](*p.operands))
        assert p.answer == expected, p
        assert extract_answer(p.by_hand) == extract_answer(p.by_code) == expected, p


def arithmetic(text):
    """The exact value of digits joined by + - * / and ^, or None."""
    if not re.fullmatch(r"-?\d+(?:[-+*/^]-?\d+)*", text := text.replace(" ", "")):
        return None
    numbers = re.sub(r"\d+", lambda n: f"Fraction({int(n[0])})", text.replace("^", "**"))
    return eval(numbers, {"Fraction": Fraction})


def test_equations_written_by_hand_hold(drawn):
    """Guards against traces whose derivation is wrong although their last line is right."""
    checked = Counter()
    for p in drawn["traces"] + drawn["ood_large"] + drawn["ood_families"]:
        if p.family in ("power_remainder", "digit_count"):
            continue
        for line in re.split(r"\n|\.(?=\s|$)", p.by_hand):
            sides = [arithmetic(side) for side in line.split("=")]
            sides = [side for side in sides if side is not None]
            if len(sides) > 1:
                checked[p.family] += 1
                assert len(set(sides)) == 1, (p.family, line)
    assert len(checked) >= 4, checked


def test_squares_written_by_hand_hold(drawn):
    """Guards against a wrong square in a trace that reaches the right remainder by construction."""
    lines = 0
    for p in drawn["traces"] + drawn["ood_large"]:
        if p.family != "power_remainder":
            continue
        a, b, m = p.operands
        steps = re.findall(r"^([01]): (\d+)$", p.by_hand, re.MULTILINE)
        assert "".join(bit for bit, _ in reversed(steps)) == f"{b:b}"
        for i, (_, power) in enumerate(steps):
            assert slow_power(a, 2**i, m) == int(power)
            lines += 1
    assert lines > 500


def run_snippet(code):
    """What a snippet of the generator (trusted) prints."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        exec(code, {})
    return out.getvalue().strip()


def snippets(response):
    return re.findall(r"<code>\n```python\n(.*?)\n```\n</code>\n<interpreter>\n(.*?)\n</interpreter>",
                      response, re.DOTALL)


def prints_the_answer(code, problem):
    try:
        return run_snippet(code) == problem.answer
    except (RecursionError, OverflowError):
        return False


@pytest.mark.parametrize("split", SPLITS)
def test_it_is_known_which_scripts_print_the_answer(drawn, split):
    """Guards against a script that counts as the right one and fails, or the other way round."""
    kinds = Counter()
    for p in drawn[split][:1000]:
        for code, works in p.scripts:
            # An interpreter that is as deep in calls as the sandbox's.
            assert prints_the_answer(code, p) == works, (p, code)
        kinds[p.kind, tuple(works for _, works in p.scripts)] += 1
    if split == "train":
        assert min(kinds["either one", works] for works in ((True, True), (False, True), (True, False))) > 10
        assert min(kinds["two scripts", works] for works in ((True, True), (False, True))) > 50
        assert not kinds["two scripts", (True, False)]
    if split.endswith("traces"):
        assert all(all(works) for _, works in kinds)


def test_traces_have_what_reward_is_to_find_but_seldom(drawn):
    """Guards against a behaviour that traces never have, and against one that they have already learned."""
    share = Counter()
    for p in drawn["traces"]:
        if p.kind == "search":
            share["calls of a search", p.by_code.count("<code>")] += 1
            continue
        first, second = (code for code, _ in p.scripts)
        share["scripts"] += 1
        share["second"] += snippets(p.by_code)[0][0] == second
        share["checked"] += "Is that right?" in p.by_code
        outputs = [output for _, output in snippets(p.by_code)]
        if "[busy]" in outputs:
            share["busy"] += 1
            share["retried"] += len(outputs) > 1
    assert 0.35 < share["second"] / share["scripts"] < 0.45
    assert 0.1 < share["retried"] / share["busy"] < 0.3 and share["busy"] > 300
    assert 0.03 < share["checked"] / share["scripts"] < 0.1
    assert min(share["calls of a search", n] for n in (1, 2, 3, 4)) > 50 and not share["calls of a search", 5]


def test_no_number_of_a_problem_shows_whether_a_script_fails(drawn):
    """Guards against sizes that traces have not: their digits would be copied wrong. Every length and every
    first digit of an operand occurs in traces of its family."""
    seen = defaultdict(set)
    for i in range(6000):
        p = embedded_problem("traces", 1, i)
        for position, operand in enumerate(p.operands):
            seen[p.family, position].add((len(str(operand)), str(operand)[0]))
    unseen = Counter()
    for p in drawn["train"]:
        for position, operand in enumerate(p.operands):
            unseen[(len(str(operand)), str(operand)[0]) in seen[p.family, position]] += 1
    assert not unseen[False]


def test_there_are_many_families_phrasings_and_operands(drawn):
    """Guards against a test set that training has memorised, and against one wording for each kind."""
    train = drawn["train"]
    phrasings = defaultdict(set)
    for p in train + drawn["ood_families"]:
        phrasings[p.family].add(re.sub(r"\d+", "#", p.question))
        for operand in p.operands:
            assert re.search(rf"(?<!\d){operand}(?!\d)", p.question), p
    families = {p.family for p in train}
    assert len(families) >= 9 and all(len(v) >= 3 for v in phrasings.values())
    assert not families & {p.family for p in drawn["ood_families"]}
    assert families == {p.family for p in drawn["test"]} == {p.family for p in drawn["ood_large"]}
    for family in families:
        mine = [p.operands for p in train if p.family == family]
        assert len(set(mine)) > 0.9 * len(mine), family


def test_splits_share_no_problem(drawn):
    """Guards against training on the test set, under another wording or with operands swapped."""
    def key(p):
        return p.family, tuple(sorted(p.operands))
    keys = {split: {key(p) for p in problems} for split, problems in drawn.items()}
    for a in ("traces", "train"):
        for b in ("held_out_traces", "test", "ood_large", "ood_families"):
            assert not keys[a] & keys[b], (a, b)
    other_seed = {key(embedded_problem("train", 1, i)) for i in range(2000)}
    assert not other_seed & keys["test"] and other_seed != keys["train"]


def test_large_operands_lie_outside_the_training_range(drawn):
    """Guards against "larger numbers" that training has seen. (The exponent of power_sum is a choice, not a
    size.)"""
    seen = defaultdict(set)
    for p in [embedded_problem("train", 2, i) for i in range(5000)] + drawn["train"]:
        for position, operand in enumerate(p.operands):
            seen[p.family, position].add(operand)
    shared = Counter()
    for p in drawn["ood_large"]:
        for position, operand in enumerate(p.operands):
            if (p.family, position) != ("power_sum", 2) and operand in seen[p.family, position]:
                shared[p.family, position] += 1
    assert not shared


def fingerprint():
    """All that must be the same in every process."""
    tokenizer = data.embedded_tokenizer()
    problems = [
        str(embedded_problem(split, seed, i)) for split in SPLITS for seed in (0, 5) for i in (0, 7, 123456)
    ]
    vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    return json.dumps(
        [problems, vocabulary,
         tokenizer.encode("Find gcd(12, 18). <code>"), tokenizer.chat_template])


def test_problems_and_tokenizer_are_the_same_in_every_process():
    """Guards against hash(), set order and global generators: ranks would disagree, and checkpoints would not fit."""
    program = (f"import sys; sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / 'tests')!r}]\n"
               "import random; random.seed(99); from test_data import fingerprint; print(fingerprint())")
    seed = "1" if os.environ.get("PYTHONHASHSEED") == "2" else "2"
    other = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True,
                           env=os.environ | {"PYTHONHASHSEED": seed})
    assert other.stdout.strip().splitlines()[-1] == fingerprint()


def test_problems_need_no_docstrings(monkeypatch, capsys):
    """Guards against phrasings that are docstrings: python -OO leaves them out."""
    bare = ModuleType("bare")
    monkeypatch.setitem(sys.modules, "bare", bare)
    exec(compile((ROOT / "data.py").read_text(), "data.py", "exec", optimize=2), bare.__dict__)
    assert data.embedded_rows.__doc__ and not bare.embedded_rows.__doc__
    for split in SPLITS:
        assert bare.embedded_rows(split, 20) == data.embedded_rows(split, 20)
    monkeypatch.setattr(sys, "argv", ["data.py"])
    bare.main()
    assert f"question: {embedded_problem('train', 0, 0).question}\n" in capsys.readouterr().out


def test_problems_do_not_depend_on_what_was_drawn_before(drawn):
    """Guards against a shared generator: resuming at index i must give problem i."""
    for i in (1999, 0, 500):
        assert embedded_problem("train", 0, i) == drawn["train"][i]


# ------------------------------------------------------------------------------------------------------------
# The embedded tokenizer


def test_digits_are_single_tokens_and_tags_are_ordinary_text(tokenizer):
    """Guards against numbers cut at random places, and against a tokenizer in which a tag can never be split
    or overrun."""
    for i in range(len(tokenizer)):
        text = decode(tokenizer, [i])
        assert len(text) == 1 or not any(c.isdigit() for c in text), text
        assert not re.search(r"</?(code|interpreter|answer)>", text)
    assert tokenizer.eos_token_id != tokenizer.pad_token_id  # else EOS is masked with the padding
    assert not any("code" in s or "interpreter" in s for s in tokenizer.all_special_tokens)


def test_a_saved_tokenizer_comes_back_the_same(tokenizer, drawn, tmp_path):
    """Guards against transformers putting another pre-tokenisation into a checkpoint it loads: for the model
    type qwen2 it always uses Qwen's, whatever tokenizer.json says."""
    sft.embedded_config(tokenizer).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    loaded = load_tokenizer(str(tmp_path))
    for p in drawn["train"][:300]:
        for text in (p.question, p.by_hand, p.by_code):
            assert encode_text(loaded, text) == encode_text(tokenizer, text), text
    assert loaded.eos_token_id == tokenizer.eos_token_id and loaded.pad_token_id == tokenizer.pad_token_id


def test_text_survives_the_tokenizer(tokenizer):
    """Guards against normalisation, swallowed spaces and unknown characters."""
    for text in [
            "a  b\t c\n\n  d\r\n", " leading", "é漢😀 \u200b", "x=1;print( x )", "\\boxed{\\frac{1}{2}}",
            "<code>\n```python\n1\n```\n</code>", "12345 678", "", " ", "\x00\x07"
    ]:
        assert decode(tokenizer, encode_text(tokenizer, text)) == text


def test_the_prompt_ends_where_the_assistant_begins(tokenizer):
    """Guards against a lost generation prompt, a template's braces being formatted, and a second user
    turn."""
    ids = rollout.encode_prompt(tokenizer, "Q {x} {question}!", "1+{0}?")
    assert decode(tokenizer, ids) == "<|im_start|>user\nQ {x} 1+{0}?!<|im_end|>\n<|im_start|>assistant\n"


# ------------------------------------------------------------------------------------------------------------
# Files


def write(path, *lines):
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines),
                    encoding="utf-8")
    return path


@pytest.mark.parametrize("row, question, answer", [
    ({"question": "Q", "answer": "5 + <<2+3=5>>5\n#### 1,005"}, "Q", "1,005"),
    ({"question": "Q", "answer": "7"}, "Q", "7"),
    ({"question": "Q", "answer": 7}, "Q", "7"),
    ({"question": "Q", "answer": -0.5}, "Q", "-0.5"),
    ({"problem": "Q", "answer": 7, "solution": 9}, "Q", "7"),
    ({"input": "Q é", "output": "45"}, "Q é", "45"),
    ({"input": "Q", "output": 45}, "Q", "45"),
    ({"problem": "Q", "solution": r"thus \boxed{\frac{1}{2}}", "level": 5}, "Q", r"\frac{1}{2}"),
    ({"problem": "Q", "answer": 33, "solution": "long"}, "Q", "33"),
    ({"problem": "Q", "solution": "#### Step 1\nAdd.\n#### Answer\nSo \\boxed{5}."}, "Q", "5"),
    ({"question": "Q", "answer": "5\n####\n5\n"}, "Q", "5"),
])
def test_every_known_layout_is_understood(tmp_path, row, question, answer):
    """Guards against the whole GSM8K solution, or a LaTeX derivation, being taken for the reference."""
    path = write(tmp_path / "some_name.jsonl", row, "", row)
    expected = {"question": question, "answer": answer, "family": "some_name"}
    assert load_problems(path) == [expected, expected]


SYSTEM = "Solve it. Put the answer in \\boxed{}."


@pytest.mark.parametrize("row", [
    {"prompt": [{"role": "system", "content": SYSTEM}, {"role": "user", "content": "Q"}],
     "reward_model": {"ground_truth": "5"}},
    {"messages": [{"role": "system", "content": SYSTEM}, {"role": "user", "content": "Q"},
                  {"role": "assistant", "content": r"so \boxed{5}"}]},
    {"messages": [{"role": "System", "content": SYSTEM}, {"role": "User", "content": "Q"},
                  {"role": "assistant", "content": r"so \boxed{6}"}], "answer": "5"},
    {"conversations": [{"from": "system", "value": SYSTEM}, {"from": "human", "value": "Q"},
                       {"from": "gpt", "value": r"so \boxed{5}"}, {"from": "human", "value": "And now?"}]},
    {"conversations": [{"role": "user", "content": "Q"}, {"role": "system", "content": SYSTEM},
                       {"role": "assistant", "content": r"so \boxed{5}"}]},
    {"messages": [{"role": "assistant", "content": "How can I help?"}, {"role": "user", "content": "Q"},
                  {"role": "assistant", "content": r"\boxed{5}"}]},
    {"prompt": [{"role": "system", "content": SYSTEM}, {"role": "user", "content": "Q\n\nPresent the answer in LaTex "
                                                        "format: \\boxed{Your answer}"}],
     "reward_model": {"ground_truth": "5"}},
    {"messages": [{"role": "developer", "content": SYSTEM}, {"role": "user", "content": "Q"},
                  {"role": "assistant", "content": r"\boxed{5}"}]},
])
def test_the_question_is_the_users_first_message_wherever_it_stands(tmp_path, row):
    """Guards against a system message, the same in every row, that is taken for the question."""
    [problem] = load_problems(write(tmp_path / "p.jsonl", row))
    assert (problem["question"], problem["answer"]) == ("Q", "5")


def test_messages_without_a_question_or_a_reply_are_refused(tmp_path):
    """Guards against a system message that becomes the question where the user says nothing."""
    system, user = {"role": "system", "content": SYSTEM}, {"role": "user", "content": "Q"}
    for messages in ([system], [system, user], [user, system], [user, user], [], ["Q", 5], {"role": "user"},
                     [{"content": "Q"}, {"content": r"\boxed{5}"}]):
        with pytest.raises(UserError, match="p.jsonl:1: needs question"):
            load_problems(write(tmp_path / "p.jsonl", {"messages": messages}))


def test_what_a_row_without_its_fields_holds_is_named(tmp_path):
    """Guards against "needs question + answer; found question, answer"."""
    for row, words in (({"question": "Q", "answer": None}, "{question: str, answer: NoneType}"),
                       ({"prompt": [{"role": "user", "content": "Q"}], "reward_model": {"ground_truth": [4]}},
                        "{prompt: [{role: str, content: str}], reward_model: {ground_truth: [int]}}"),
                       ({"question": "Q", "answer": ""}, "{question: str, answer: str}"),
                       ({"messages": []}, "{messages: list}"), (5, "int")):
        with pytest.raises(UserError, match="p.jsonl:1: needs .*, none of them empty; found " + re.escape(words) + "$"):
            load_problems(write(tmp_path / "p.jsonl", row))


def test_of_a_row_that_says_something_twice_its_own_fields_count(tmp_path):
    """Guards against a conversation, which may be cut or framed, that is read instead of the problem beside it."""
    messages = [{"role": "user", "content": "Q, in short"}, {"role": "assistant", "content": r"\boxed{6}"}]
    row = {"problem": "Q", "messages": messages, "answer": "5", "solution": r"so \boxed{5}"}
    assert read_row(row) == {"question": "Q", "answer": "5", "solution": r"so \boxed{5}", "stated": "5"}
    assert read_row({"messages": messages, "answer": 5})["answer"] == "5"


def test_a_file_with_one_question_for_different_answers_is_refused(tmp_path):
    """Guards against a field of instructions that is read as the question: every row would be the same problem."""
    rows = [{"question": "Solve it.", "answer": rf"\boxed{{{i}}}"} for i in range(3)]
    path = write(tmp_path / "p.jsonl", *rows)
    for load in (load_problems, sft.load_traces):
        with pytest.raises(UserError, match=r"^[^\n]*p.jsonl: all 3 rows have the same question, 'Solve it.'[^\n]*$"):
            load(path)
    assert len(load_problems(write(tmp_path / "p.jsonl", *rows, {"question": "2?", "answer": "2"}))) == 4
    assert len(load_problems(write(tmp_path / "p.jsonl", rows[1], rows[1]))) == 2


@pytest.mark.parametrize(
    "bad", [{"question": "Q"}, {"foo": 1}, {"problem": "Q", "solution": "no box"},
            {"question": " ", "answer": "5"}, {"question": "Q", "answer": ""},
            {"problem": "Q", "answer": None},
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "Q"}, {"type": "image"}]}], "answer": "5"},
            {"prompt": [{"content": [{"type": "text", "text": None}]}], "reward_model": {"ground_truth": "5"}},
            {"prompt": [{"content": ["Q"]}], "reward_model": {"ground_truth": "5"}}, {"input": "Q", "output": None}, [1, 2], "5", '"text"', "null"])
def test_a_row_without_its_fields_is_named(tmp_path, bad):
    """Guards against problems without a reference, which score -1 for ever, and messages that do not say
    where."""
    path = write(tmp_path / "p.jsonl", {"question": "Q", "answer": "1"}, "", bad)
    with pytest.raises(UserError, match=rf"{re.escape(str(path))}:3: needs "):
        load_problems(path)


def test_unreadable_files_are_one_line_errors(tmp_path):
    """Guards against tracebacks for a typing error, and training on nothing."""
    path = write(tmp_path / "p.jsonl", {"question": "Q", "answer": "1"}, "{broken")
    with pytest.raises(UserError, match=rf"{re.escape(str(path))}:2: not JSON"):
        load_problems(path)
    with pytest.raises(UserError, match="nowhere.jsonl: no such file, and not"):
        load_problems(tmp_path / "nowhere.jsonl")
    with pytest.raises(UserError, match="empty.jsonl: no rows"):
        load_problems(write(tmp_path / "empty.jsonl", "", " "))


@pytest.mark.skipif(not REAL.is_dir(), reason=f"the optional files in {REAL.name} are not there")
@pytest.mark.parametrize("name, rows", [("aime24", 30), ("aime25", 30), ("gsm8k_train", 7473),
                                        ("gsm8k_test", 1319)])
def test_public_files_load_with_short_answers(name, rows):
    """Guards against a layout that changed, or one read wrongly."""
    problems = load_problems(REAL / f"{name}.jsonl")
    assert len(problems) == rows and all(exact_value(one_spelling(p["answer"])) is not None for p in problems)
