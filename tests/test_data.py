"""Properties of data.py. Run: python -m pytest tests/test_data.py"""
import asyncio
import contextlib
import io
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import StubSandbox, decode

import data
import sft
from data import (UserError, boxed, curate, embedded_problem, extract_answer, is_equivalent, load_problems,
                  outcome_reward, verify_format)
from rollout import ToolCall, Trajectory, encode_response, encode_text, split_segments
from sandbox import Sandbox, SandboxResult

ROOT = Path(data.__file__).parent
REAL = ROOT.parent / "shared" / "data"
SPLITS = ("train", "test", "ood_large", "ood_families")


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
        for base, exponent, power, rest in re.findall(r"^(\d+)\^(\d+) = (\d+)(.*)$", p.by_hand, re.MULTILINE):
            assert slow_power(int(base), int(exponent), m) == int(power)
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
    loaded = sft.load_tokenizer(tmp_path)
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
# Answers


@pytest.mark.parametrize("text, answer", [
    (r"so \boxed{5}.", "5"),
    (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
    (r"\boxed{ {a{b}} }", "{a{b}}"),
    (r"\boxed{1} then \boxed{2}", "2"),
    (r"\boxed{1} then \boxed{2", "1"),
    (r"\boxed {7}", "7"),
    (r"\boxed{\boxed{3}}", "3"),
    (r"\boxed{", None),
    (r"\boxed{{1}", None),
    ("5", None),
    ("", None),
    (r"\boxed5", None),
    (r"\boxed{}", ""),
])
def test_boxed_is_the_last_complete_one(text, answer):
    """Guards against regular expressions that stop at the first brace, and the first of several answers."""
    assert boxed(text) == answer


@pytest.mark.parametrize("text, answer", [
    (r"\boxed{5} <code>print('\boxed{6}')</code>", "5"),
    (r"\boxed{5} <interpreter>\boxed{6}</interpreter>", "5"),
    (r"<code>x</code><interpreter>\boxed{6}</interpreter>\boxed{7}", "7"),
    (r"<interpreter>\boxed{6}</interpreter>", None),
    (r"<code>\boxed{6}", None), (r"<interpreter>\boxed{6}", None),
    (r"\boxed{5} <interpreter>\boxed{6}", "5"),
    (r"<interpreter>a</interpreter>\boxed{1}<interpreter>\boxed{2}</interpreter>", "1"),
    (r"<interpreter><code></interpreter>\boxed{8}", "8"),
    (r"\boxed{1<code>x</code>2}", "1\n2"),
])
def test_answers_inside_blocks_do_not_count(text, answer):
    """Guards against an answer that a program printed, or that stands in a block that was never closed."""
    assert extract_answer(text) == answer


EQUIVALENT = [
    ("5", "5"),
    ("5.0", "5"),
    ("+5", "5"),
    ("1,234,567", "1234567"),
    ("1{,}234", "1234"),
    ("$12$", "12"),
    (" 7 ", "7"),
    ("-3", "-3.00"),
    ("0.5", "1/2"),
    (r"\frac{1}{2}", "0.5"),
    (r"\dfrac{3}{4}", "3/4"),
    (r"-\frac{1}{2}", "-0.5"),
    (r"\frac{2}{4}", r"\frac12"),
    (r"\sqrt{8}", r"2\sqrt{2}"),
    ("\\frac{10}{2}", "5"), ("x = 5", "5"), ("5 \\text{ apples}", "5"),
    ("x+1", "1+x"),
    ("(1,2)", "(1, 2)"),
    (r"5\text{ cm}", "5"),
    ("0.1", "1/10"),
    ("123456789012345678901234567890", "123456789012345678901234567890.0"),
    (12, "12"),
]
DIFFERENT = [
    ("5", "6"),
    ("-3", "3"),
    ("0.333", "1/3"),
    ("1,2", "12"),
    ("1/0", "5"),
    ("", "5"),
    (None, "5"),
    ("5", None),
    ("50", "5"),
    ("1000000000000000000000000000001", "1000000000000000000000000000000"),
    (r"\sqrt{2}", "2"),
    ("(2,1)", "(1,2)"),
    (r"\frac{1}{3}", "0.5"),
    ("x+2", "x+1"),
    ("no idea", "5"),
    (r"\text{five}", "6"),
    ("012 3", "5"),
    ("5 or 6", "7"),
]
HOSTILE = [
    "10^{10^{10}}", "9" * 5000, r"\frac{" * 500, "(" * 1500 + "1" + ")" * 1500, "\x00\ud800\U0010ffff",
    "$" * 100, "9^9^9^9^9", r"(10^{10^{8}})!", "\n\r\n", "__import__('os').system('true')",
    r"\int_0^{10^9} x^{x^x} dx", "1" + "0" * 3500 + "1", "{" * 200
]


@pytest.mark.parametrize("predicted, reference", EQUIVALENT)
def test_equal_answers_are_equivalent(predicted, reference):
    """Guards against punishing a right answer for the way it is written."""
    assert is_equivalent(predicted, reference) and is_equivalent(reference, predicted)


@pytest.mark.parametrize("predicted, reference", DIFFERENT)
def test_different_answers_are_not_equivalent(predicted, reference):
    """Guards against rewarding a wrong answer: floats that round together, a lost sign, a comma taken for
    thousands."""
    assert is_equivalent(predicted, reference) is False and is_equivalent(reference, predicted) is False


@pytest.mark.parametrize("predicted, reference", [
    (r"\gcd(12,18)", "6"), (r"7^{5} \mod 13", "11"), ("37*99", "3663"), ("12+30", "42"), ("2^{10}", "1024"),
    (r"\sum_{n=1}^{10} n^2", "385"), (r"\lfloor 17/5 \rfloor", "3"), (r"\max(3,9)", "9"), ("4=5", "5"),
    (r"37 \cdot 99", "3663"), ("5!", "120"), (r"\sqrt{9}", "3"), ("4$ $5", "5"),
    ("(4)(5)", "20"), ("4 5", "20")])
def test_an_expression_that_still_has_to_be_computed_is_no_answer(predicted, reference):
    """Guards against the policy that boxes the question and lets the verifier do the arithmetic."""
    assert is_equivalent(predicted, reference) is False


def test_a_boxed_answer_inside_an_executed_snippet_is_no_answer(tokenizer):
    """Guards against nested tags: the engine runs from the last <code>, a text filter would start at the
    first."""
    ids = encode_text(tokenizer, "<interpreter><code></interpreter>\\boxed{5}</code>")
    answer = encode_text(tokenizer, "\nSo it is.") + [tokenizer.eos_token_id]
    call = ToolCall("", "", "error", len(encode_text(tokenizer, "<interpreter>")), len(ids), 0.0)
    t = Trajectory(0, 0, [1], ids + answer, [1] * len(ids + answer), [], [call], "eos")
    assert outcome_reward(t, tokenizer, "5") == -1.0
    t.tool_calls = []  # the same text, had the engine not run it: the tags alone would have let it pass
    assert outcome_reward(t, tokenizer, "5") == 1.0


@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
def test_hostile_answers_are_judged_soon(text):
    """Guards against a policy that hangs or crashes the trainer; the bound is for a stall, not a
    measurement."""
    begin = time.monotonic()
    assert is_equivalent(text, "5") is False
    assert time.monotonic() - begin < 10
    assert is_equivalent(r"\sqrt{8}", r"2\sqrt{2}")  # the judge is still there


def test_answers_can_be_judged_from_several_threads():
    """Guards against verdicts that go to the wrong caller, and timers that only work in the main thread."""
    pairs = [(rf"\sqrt{{{n * n}x}}", rf"{m}\sqrt{{x}}") for n in range(1, 6) for m in range(1, 6)]
    with ThreadPoolExecutor(4) as pool:
        verdicts = list(pool.map(lambda pair: is_equivalent(*pair), pairs))
    assert verdicts == [n == m for n in range(1, 6) for m in range(1, 6)]


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
def test_a_killed_verifier_comes_back_and_leaves_no_zombie():
    """Guards against all later answers being wrong once the server died, and against unreaped processes."""
    def children(parent):
        found = []
        for stat in Path("/proc").glob("[0-9]*/stat"):
            with contextlib.suppress(OSError):
                state, ppid = stat.read_text().rsplit(")", 1)[1].split()[:2]
                found += [(int(stat.parent.name), state)] if int(ppid) == parent else []
        return found
    assert is_equivalent(r"\sqrt{8}", r"2\sqrt{2}")
    first = data.VERIFIER.server
    os.kill(first.pid, signal.SIGKILL)
    first.wait(10)
    assert is_equivalent(r"\sqrt{8}", r"2\sqrt{2}") and data.VERIFIER.server.pid != first.pid
    assert not data.VERIFIER(r"10^{10^{10}}+x", "x", 1.0)[0]  # a judge that had to be killed, or gave up
    second = data.VERIFIER.server.pid
    assert children(second) == []
    assert all(state != "Z" for _, state in children(os.getpid()))
    data.VERIFIER.stop()
    assert not Path(f"/proc/{second}").exists()
    assert is_equivalent(r"\sqrt{8}", r"2\sqrt{2}")


# ------------------------------------------------------------------------------------------------------------
# The reward


def trajectory(tokenizer, parts, finish_reason="eos"):
    """parts: texts; those of the form ("forced", text) are interpreter tokens."""
    ids, mask = [], []
    for part in parts:
        forced = isinstance(part, tuple)
        new = encode_text(tokenizer, part[1] if forced else part)
        ids, mask = ids + new, mask + [int(not forced)] * len(new)
    if finish_reason == "eos":
        ids, mask = ids + [tokenizer.eos_token_id], mask + [1]
    return Trajectory(0, 0, [5], ids, mask, [0.0] * len(ids), [], finish_reason)


FORCED = ("forced", "\n<interpreter>\n\\boxed{5}\n</interpreter>")


@pytest.mark.parametrize("parts, reason, reward", [
    ([r"It is <answer>\boxed{5}</answer>"], "eos", 1.0),
    ([r"It is \boxed{5.0}"], "eos", 1.0),
    ([r"<code>print(5)</code>", FORCED, r"\boxed{5}"], "eos", 1.0),
    ([r"It is \boxed{4}"], "eos", -1.0),
    (["It is 5"], "eos", -1.0),
    ([r"\boxed{5} or rather \boxed{4}"], "eos", -1.0),
    ([r"<interpreter>\boxed{5}</interpreter>"], "eos", -1.0),
    ([r"<interpreter>\boxed{5}"], "eos", -1.0),
    (["<code>print('\\boxed{5}')</code>", FORCED, "Done."], "eos", -1.0),
    (["<code>print('\\boxed{5}')", ], "eos", -1.0),
    (["<code>x</code>", FORCED], "eos", -1.0),
    (["<code>x</code>", FORCED, "So \\boxed{4}"], "eos", -1.0),
    (["<code>x</code>", FORCED, "\n<interpreter>\n\\boxed{5}\n</interpreter>\n"], "eos", -1.0),
    ([r"It is \boxed{5}"], "length", -1.0),
    ([r"It is \boxed{5}"], "max_calls", -1.0),
    ([], "eos", -1.0),
])
def test_only_the_policy_s_own_finished_answer_is_rewarded(tokenizer, parts, reason, reward):
    """Guards against the reward hacks: print the answer, fake an interpreter block, ramble on after it."""
    assert outcome_reward(trajectory(tokenizer, parts, reason), tokenizer, "5") == reward


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
    with pytest.raises(UserError, match="nowhere.jsonl: no such file"):
        load_problems(tmp_path / "nowhere.jsonl")
    with pytest.raises(UserError, match="empty.jsonl: no rows"):
        load_problems(write(tmp_path / "empty.jsonl", "", " "))


@pytest.mark.skipif(not REAL.is_dir(), reason=f"the optional files in {REAL.name} are not there")
@pytest.mark.parametrize("name, rows", [("aime24", 30), ("aime25", 30), ("gsm8k_train", 7473),
                                        ("gsm8k_test", 1319)])
def test_public_files_load_with_short_answers(name, rows):
    """Guards against a layout that changed, or one read wrongly."""
    problems = load_problems(REAL / f"{name}.jsonl")
    assert len(problems) == rows and all(data.plain_number(p["answer"]) is not None for p in problems)


# ------------------------------------------------------------------------------------------------------------
# Curation


def fenced(code, output=""):
    return f"<code>\n```python\n{code}\n```\n</code>\n<interpreter>\n{output}\n</interpreter>\n"


ANSWER = r"<answer>\boxed{4}</answer>"
TAGS, BLOCK = "tags", "interpreter block missing or misplaced"
SYNTAX, FINAL = "snippet does not parse", "no single final answer"


@pytest.mark.parametrize("response, reason", [
    (fenced("print(4)", "4") + ANSWER, None),
    ("Plain text. " + ANSWER, None),
    ("<code>print(4)</code><interpreter></interpreter>" + ANSWER, None),
    (fenced("print(4)") * 3 + ANSWER, None),
    ("<code>print(4)" + ANSWER, TAGS),
    ("print(4)</code>\n<interpreter>\n4\n</interpreter>" + ANSWER, TAGS),
    ("<code><code>x</code></code>\n<interpreter>\n4\n</interpreter>" + ANSWER, TAGS),
    ("<code>x</code>\n<interpreter>\n4\n" + ANSWER, TAGS),
    ("<code>x</interpreter>\n<interpreter>4</code>" + ANSWER, TAGS),
    (fenced("print('</code>')") + ANSWER, TAGS),
    (fenced("x", "<code>") + ANSWER, TAGS),
    (r"<answer>\boxed{4}", TAGS),
    (fenced("x") + r"<answer><answer>\boxed{4}</answer></answer>", TAGS),
    ("<interpreter>\n4\n</interpreter>\n" + ANSWER, BLOCK),
    ("<code>x</code>\n" + ANSWER, BLOCK),
    ("<code>x</code>\nThe result:\n<interpreter>\n4\n</interpreter>\n" + ANSWER, BLOCK),
    (fenced("x", "4") + "<interpreter>\n4\n</interpreter>\n" + ANSWER, BLOCK),
    ("<code>x</code><code>y</code>\n<interpreter>\n4\n</interpreter>\n" + ANSWER, BLOCK),
    (fenced("x = = 1") + ANSWER, SYNTAX),
    (fenced("print(1)") + fenced("  indented\nwrong") + ANSWER, SYNTAX),
    (fenced("x = '\x00'") + ANSWER, SYNTAX),
    (fenced("(" * 5000 + ")" * 5000) + ANSWER, SYNTAX),
    (fenced("-" * 200_000 + "1") + ANSWER, SYNTAX),
    (fenced("print(4)", "4"), FINAL),
    (fenced("print(4)", "4") + r"\boxed{4}", FINAL),
    ("<answer>4</answer>", FINAL),
    (r"<answer>\boxed{4</answer>", FINAL),
    (ANSWER + ANSWER, FINAL),
    (ANSWER + " and more", FINAL),
    (ANSWER + fenced("print(4)", "4"), FINAL),
    (fenced(r"print('\boxed{4}')") + "<answer>see above</answer>", FINAL),
], ids=range(31))
def test_broken_responses_are_rejected_for_their_reason(response, reason):
    """Guards against teaching a format in which the triggers are not found where they should be."""
    assert verify_format(response) == reason


PLANTED = [
    ("kept", fenced("print(2+2)", "4") + ANSWER, []),
    ("kept", fenced("print(2+2)") + ANSWER, []),
    ("kept", fenced("1/0") + "Once more.\n" + fenced("print(4)", "4") + ANSWER, [0]),
    ("kept", fenced("print(3)", "3") + fenced("import time\ntime.sleep(60)") + fenced("undefined") + ANSWER,
     [1, 2]),
    ("kept", "By hand. " + ANSWER, []),
    ("execution: quoted output differs", fenced("print(2+2)", "5") + ANSWER, None),
    ("execution: quoted output differs", fenced("1/0", "4") + ANSWER, None),
    ("execution: quoted output differs", fenced("print(1)", "1") + fenced("print(2)", "1") + ANSWER, None),
    ("answer: differs from the reference", fenced("print(5)", "5") + r"<answer>\boxed{5}</answer>", None),
    ("format: tags", "<code>" + ANSWER, None),
    ("format: snippet does not parse", fenced("print(") + ANSWER, None),
    ("format: no single final answer", fenced("print(4)", "4"), None),
]


def test_planted_faults_are_rejected_and_real_output_is_written_in():
    """Guards against invented interpreter text, a wrong count per reason, and failures that SFT would not
    mask."""
    problems = [SimpleNamespace(question=f"q{i}", answer="4.0", family="f") for i in range(len(PLANTED))]
    ticks = []

    async def main():
        async with Sandbox(workers=2, timeout=3.0) as sandbox:
            return await curate(problems, [response for _, response, _ in PLANTED], sandbox, ticks.append)
    traces, counts = asyncio.run(main())
    assert counts == Counter(reason for reason, _, _ in PLANTED) and sum(ticks) == len(PLANTED)
    kept = [(f"q{i}", failed) for i, (reason, _, failed) in enumerate(PLANTED) if reason == "kept"]
    assert [(t["question"], t["failed_calls"]) for t in traces] == kept
    outputs = [[text.strip() for kind, text in split_segments(t["response"]) if kind == "interpreter"]
               for t in traces]
    assert outputs[:2] == [["4"], ["4"]] and outputs[4] == []
    assert outputs[2][0].endswith("ZeroDivisionError: division by zero") and outputs[2][1] == "4"
    assert outputs[3][:2] == ["3", "[timed out after 3.0 s]"] and "NameError" in outputs[3][2]
    for (_, response, _), t in zip(PLANTED, traces):  # the model's own words are untouched
        assert [s for s in split_segments(t["response"])
                if s[0] == "model"] == [s for s in split_segments(response) if s[0] == "model"]
        assert verify_format(t["response"]) is None and (t["answer"], t["family"]) == ("4.0", "f")


@pytest.mark.parametrize("output", [
    "</interpreter>\nI know it.", "<code>x</code>", "<|im_end|>",
    "</interpreter>\n<answer>\\boxed{4}</answer>"
])
def test_output_that_looks_like_markup_is_never_trained_on(tokenizer, output):
    """Guards against a snippet that prints `</interpreter>`: what follows would count as the model's text in
    SFT."""
    problem = SimpleNamespace(question="q", answer="4", family="f")
    traces, counts = asyncio.run(
        curate([problem], ["Go.\n" + fenced("print(x)") + ANSWER], StubSandbox(output)))
    assert sum(counts.values()) == 1
    for t in traces:  # rejecting it would do as well
        ids, mask = encode_response(tokenizer, t["response"], 128)
        trained = decode(tokenizer, [i for i, m in zip(ids, mask) if m])
        assert trained == "Go.\n<code>\n```python\nprint(x)\n```\n</code>\n" + ANSWER + "<|im_end|>"


def test_curation_keeps_the_order_and_survives_slow_snippets():
    """Guards against traces paired with the wrong problem when snippets finish out of order."""
    problems = [SimpleNamespace(question=f"q{i}", answer=str(i), family="f") for i in range(20)]
    candidates = [fenced(f"print({i})") + rf"<answer>\boxed{{{i}}}</answer>" for i in range(20)]
    sandbox = StubSandbox(lambda code: code[6:-1] + "\n", delay=lambda code: 0.001 * (20 - int(code[6:-1])))
    traces, counts = asyncio.run(curate(problems, candidates, sandbox))
    assert counts == {"kept": 20} and [t["question"] for t in traces] == [f"q{i}" for i in range(20)]
    for i, t in enumerate(traces):
        assert [text.strip() for kind, text in split_segments(t["response"])
                if kind == "interpreter"] == [str(i)]


def test_a_failing_sandbox_stops_curation():
    """Guards against filling a training set with "[sandbox error]"."""
    sandbox = StubSandbox(lambda code: SandboxResult("sandbox_error", "dead"))
    with pytest.raises(RuntimeError, match="sandbox"):
        asyncio.run(
            curate([SimpleNamespace(question="q", answer="4", family="f")], [fenced("print(4)") + ANSWER],
                   sandbox))


def test_embedded_traces_are_all_kept_and_their_last_result_is_the_answer():
    """Guards against a generator whose programs do not do what its answer line says."""
    async def main():
        async with Sandbox(workers=2, timeout=2.0) as sandbox:
            return await data.embedded_traces(150, 1.0, 0, sandbox)
    traces, counts = asyncio.run(main())
    assert counts == {"kept": 150}
    failed_last = Counter()
    for t in traces:
        outputs = [text.strip() for kind, text in split_segments(t["response"]) if kind == "interpreter"]
        if len(outputs) - 1 in t["failed_calls"]:  # no inverse: the error is the answer
            failed_last[t["family"]] += 1
            assert "not invertible" in outputs[-1] and t["answer"] == "0"
        else:
            assert outputs[-1] == t["answer"], t
    assert set(failed_last) == {"inverse"}


def test_text_traces_need_no_sandbox():
    """Guards against code in the text-only baseline's warm start."""
    traces, counts = asyncio.run(data.embedded_traces(60, 0.0, 0, None))
    assert counts == {"kept": 60} and not any("<code>" in t["response"] for t in traces)
