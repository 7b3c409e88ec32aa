"""Are problems right, endless, and apart? Is every layout understood?"""
import contextlib
import io
import json
import math
import os
import re
import subprocess
import sys
from collections import Counter, defaultdict
from fractions import Fraction
from pathlib import Path

import pytest
from conftest import decode

import data
import sft
from data import UserError, embedded_problem, extract_answer, load_problems
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


def is_prime(n):
    return n > 1 and all(n % d for d in range(2, math.isqrt(n) + 1))


def slow_pairs(n, m):
    """Row by row: for each x, the y whose remainder completes that of x."""
    remainders = Counter(x % m for x in range(1, n + 1))
    return sum(remainders[-x % m] for x in range(1, n + 1))


def slow_lcm(a, b):
    return next(x for x in range(b, a * b + 1, b) if x % a == 0)


def slow_recurrence(first, a, n):
    u = a
    for i in range(first + 1, n + 1):
        u = u + i
    return u


def slow_digits(n):
    count = 0
    while n:
        n, count = n // 10, count + 1
    return count


BRUTE_FORCE = {
    "addition": lambda a, b: sum([a, b]),
    "larger": lambda a, b: sorted([a, b])[1],
    "last_digit": lambda n: int(str(n)[-1]),
    "power_remainder": slow_power,
    "count_pairs": slow_pairs,
    "common_divisor": slow_gcd,
    "common_multiple": slow_lcm,
    "digit_sum": lambda a, b: sum(int(d) for d in f"{a * b}"),
    "divisor_count": lambda n: len([d for d in range(1, n + 1) if n % d == 0]),
    "prime_count": lambda a, b: len([n for n in range(a, b + 1) if is_prime(n)]),
    "power_sum": lambda a, b, k: sum(n**k for n in range(a, b + 1)),
    "recurrence": slow_recurrence,
    "inverse": lambda a, m: next((x for x in range(1, m) if a * x % m == 1), 0),
    "digit_count": lambda a, b: slow_digits(a**b),
    "divisor_then_power": lambda a, b, k, m: slow_power(slow_gcd(a, b), k, m),
    "prime_then_power": lambda n, k, m: slow_power(next(p for p in range(n + 1, 3 * n) if is_prime(p)), k, m),
    "product_remainder": lambda a, b, m: sum([a] * b) % m,
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
    modular = {"power_remainder", "divisor_then_power", "prime_then_power", "digit_count"}
    checked = Counter()
    for p in drawn["train"] + drawn["ood_large"] + drawn["ood_families"]:
        if p.family in modular:
            continue
        for line in re.split(r"\n|, so |, x = |\.(?=\s|$)", p.by_hand):
            sides = [arithmetic(side) for side in re.split(r"[:=]", line)]
            sides = [side for side in sides if side is not None]
            if len(sides) > 1:
                checked[p.family] += 1
                assert len(set(sides)) == 1, (p.family, line)
    assert len(checked) >= 8, checked


def test_modular_steps_written_by_hand_hold(drawn):
    """Guards against a wrong square or product in a trace that reaches the right remainder by
    construction."""
    lines = 0
    for p in drawn["train"] + drawn["ood_large"]:
        if p.family not in ("power_remainder", "divisor_then_power", "prime_then_power"):
            continue
        m = p.operands[-1]
        steps = re.findall(r"^(\d+): (\d+)(.*)$", p.by_hand, re.MULTILINE)
        for exponent, power, rest in steps:
            assert slow_power(int(steps[0][1]), int(exponent), m) == int(power)
            if rest:
                x, y, product, remainder = map(int,
                                               re.fullmatch(r", (\d+)\*(\d+) = (\d+) = (\d+)", rest).groups())
                assert y == int(power) and x * y == product and product % m == remainder
            lines += 1
        assert p.by_hand.split("\n<answer>")[0].endswith(f" {p.answer}")
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


def test_float_logarithms_count_the_digits_right():
    """Guards against int(log10(10**23)) + 1 == 23: the snippet would print one number and the trace answer
    another."""
    wrong = []
    for a in range(3, 100):
        for b in range(20, 200):
            draws = iter((a, b))
            *_, by_code, answer = data.digit_count(lambda low, high: next(draws))
            found = snippets(by_code)
            if len(found) == 1 and run_snippet(found[0][0]) != str(answer):
                wrong.append((a, b))
    assert not wrong


def test_there_are_many_families_phrasings_and_operands(drawn):
    """Guards against a test set that training has memorised, and against one wording for each kind."""
    train = drawn["train"]
    phrasings = defaultdict(set)
    for p in train + drawn["ood_families"]:
        phrasings[p.family].add(re.sub(r"\d+", "#", p.question))
        for operand in p.operands:
            assert re.search(rf"(?<!\d){operand}(?!\d)", p.question), p
    families = {p.family for p in train}
    assert len(families) >= 12 and all(len(v) >= 3 for v in phrasings.values())
    assert not families & {p.family for p in drawn["ood_families"]}
    assert families == {p.family for p in drawn["test"]} == {p.family for p in drawn["ood_large"]}
    assert len({(p.family, p.operands) for p in train}) > 1900
    for family in families:
        mine = [p.operands for p in train if p.family == family]
        assert len(set(mine)) > 0.97 * len(mine), family


def test_splits_share_no_problem(drawn):
    """Guards against training on the test set, under another wording or with operands swapped."""
    def key(p):
        return p.family, tuple(sorted(p.operands))
    keys = {split: {key(p) for p in problems} for split, problems in drawn.items()}
    for a in SPLITS:
        for b in SPLITS:
            assert a == b or not keys[a] & keys[b], (a, b)
    other_seed = {key(embedded_problem("train", 1, i)) for i in range(2000)}
    assert not other_seed & keys["test"] and other_seed != keys["train"]


def test_large_operands_lie_outside_the_training_range(drawn):
    """Guards against "larger numbers" that training has seen. (A modulus up to 9 and the exponent of
    power_sum are choices, not sizes; the last index of a recurrence is its first one plus a number of steps,
    both larger.)"""
    seen = defaultdict(set)
    for p in [embedded_problem("train", 2, i) for i in range(5000)] + drawn["train"]:
        for position, operand in enumerate(p.operands):
            seen[p.family, position].add(operand)
    shared = Counter()
    for p in drawn["ood_large"]:
        for position, operand in enumerate(p.operands):
            choice = (p.family, position) in (("power_sum", 2), ("count_pairs", 1), ("recurrence", 2))
            if not choice and operand in seen[p.family, position]:
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
    """Guards against hash(), set order and global generators: ranks would disagree, and checkpoints would not
    fit."""
    program = (f"import sys; sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / 'tests')!r}]\n"
               "import random; random.seed(99); from test_data import fingerprint; print(fingerprint())")
    seed = "1" if os.environ.get("PYTHONHASHSEED") == "2" else "2"
    other = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True,
                           env=os.environ | {"PYTHONHASHSEED": seed})
    assert other.stdout.strip().splitlines()[-1] == fingerprint()


def test_problems_do_not_depend_on_what_was_drawn_before(drawn):
    """Guards against a shared generator: resuming at index i must give problem i."""
    for i in (1999, 0, 500):
        assert embedded_problem("train", 0, i) == drawn["train"][i]


def test_problems_need_no_docstrings():
    """Guards against phrasings that are docstrings: python -OO leaves them out."""
    command = [sys.executable, "-OO", "data.py"]
    output = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert f"question: {embedded_problem('train', 0, 0).question}\n" in output


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
    ids = data.encode_prompt(tokenizer, "Q {x} {question}!", "1+{0}?")
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
    ({"input": "Q é", "output": "45"}, "Q é", "45"),
    ({"input": "Q", "output": 45}, "Q", "45"),
    ({"problem": "Q", "solution": r"thus \boxed{\frac{1}{2}}", "level": 5}, "Q", r"\frac{1}{2}"),
    ({"problem": "Q", "answer": 33, "solution": "long"}, "Q", "33"),
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
    {"messages": [{"content": "Q"}, {"content": r"\boxed{5}"}]},
    {"messages": [{"role": "developer", "content": SYSTEM}, {"role": "problem", "content": "Q"},
                  {"role": "solution", "content": r"\boxed{5}"}]},
])
def test_the_question_is_the_users_first_message_wherever_it_stands(tmp_path, row):
    """Guards against a system message, the same in every row, that is taken for the question."""
    [problem] = load_problems(write(tmp_path / "p.jsonl", row))
    assert (problem["question"], problem["answer"]) == ("Q", "5")


def test_messages_without_a_question_or_a_reply_are_refused(tmp_path):
    """Guards against a system message that becomes the question where the user says nothing."""
    system, user = {"role": "system", "content": SYSTEM}, {"role": "user", "content": "Q"}
    for messages in ([system], [system, user], [user, system], [user, user], [], ["Q", 5], {"role": "user"}):
        with pytest.raises(UserError, match="p.jsonl:1: needs question"):
            load_problems(write(tmp_path / "p.jsonl", {"messages": messages}))


def test_what_is_wrong_with_a_row_is_named_and_not_a_list_of_the_right_fields(tmp_path):
    """Guards against "needs question + answer; found question, answer"."""
    for row, words in (({"question": "Q", "answer": None}, "answer is null"),
                       ({"prompt": [{"content": "Q"}], "reward_model": {"ground_truth": [4]}},
                        "reward_model.ground_truth is a list"),
                       ({"question": "Q", "answer": ""}, "found question, answer, but one is empty"),
                       ({"problem": "Q", "solution": "no box"}, "found problem, solution, but .* states no answer"),
                       ({"question": "Q", "reply": None}, "found question, reply$"), (5, "found int$")):
        with pytest.raises(UserError, match=rf"p.jsonl:1: needs .*; {words}"):
            load_problems(write(tmp_path / "p.jsonl", row))


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
            {"problem": "Q", "answer": None}, {"input": "Q", "output": None}, [1, 2], "5", '"text"', "null"])
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
