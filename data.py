"""Problems: what the policy is asked, and the reference answers.

The default needs no download: endless, seeded number problems (`embedded_problem`), solved by hand
and with code, and a tokenizer trained on them. All else is a file or hub id in a public layout.

    python data.py                   # sample problems
    python data.py --file FILE       # how a file of problems is understood
"""
import argparse
import functools
import json
import math
import random
import re
import sys
import zlib
from decimal import Decimal
from pathlib import Path
from typing import NamedTuple

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

from rollout import (
    ANSWER_OPEN,
    BUSY,
    CLOSING,
    CODE_CLOSE,
    CODE_OPEN,
    HIGHEST,
    INTERPRETER_CLOSE,
    INTERPRETER_OPEN,
    compare,
    first_line,
    hidden_number,
    narrowed,
    need_hub,
    question_to_box,
)
from sandbox import UserError

# ---------------------------------------------------------------------------------------------
# The answer that a text states

# Calls and interpreter blocks; if unclosed, to the end.
BLOCKS = re.compile("|".join(f"{re.escape(tag)}.*?(?:{re.escape(CLOSING[tag])}|\\Z)"
                             for tag in CLOSING if tag != ANSWER_OPEN), re.DOTALL)


# \boxed 4, to the end of the formula, tag or line around it, or the next box. A word is prose.
BARE_BOX = re.compile(
    r"\\(?:boxed|fbox)[ \t]+(?![A-Za-z]{2})([^\s{$].*?)"
    r"(?=\$|\\[)\]]|</?[a-z]+>|\\(?:boxed|fbox)|$)", re.MULTILINE)


def boxed(text):
    r"""The content of the last complete \boxed{...} or \fbox{...}, nested braces included; where
    there is none, of the last \boxed without braces; or None."""
    boxes = []
    opened = []  # one pass with a stack: many \boxed{ must not stall the reward
    for brace in re.finditer(r"\\(?:boxed|fbox)\s*\{|(?<!\\)[{}]", text):  # \{ is no brace
        if brace[0] != "}":
            opened.append(brace)
        elif opened:
            opening = opened.pop()
            if opening[0] != "{":
                boxes.append((opening.end(), brace.start()))

    if boxes:
        start, end = max(boxes)  # the one that starts last
        return text[start:end].strip()
    bare = BARE_BOX.findall(text)
    return bare[-1].strip() if bare else None


def extract_answer(response):
    r"""The last \boxed{} outside a text's blocks, or None. (Of rollouts: eval.stated_answer.)"""
    return boxed(BLOCKS.sub("\n", response))


# 1,234.5 or 42 or .5, but not the digits of x1, nor the 3 of 1.2.3.
NUMBER_IN_TEXT = re.compile(
    r"(?<![\w.])(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?"
    r"|(?<![\w.])\.\d+")


def numbers(text):
    """The numbers of a text without their signs, exactly as they are written, in order."""
    return [Decimal(number.replace(",", "")) for number in NUMBER_IN_TEXT.findall(text)]


# ---------------------------------------------------------------------------------------------
# Loading problems

# The names of a field in public sets; the first that holds text or a number counts. GSM8K's
# "answer" and MATH's "solution" hold both, solution and answer: `read_row` splits them.
FIELDS = {
    "question": ["problem", "question", "input", "prompt"],
    "answer": ["answer", "output", "ground_truth_solution", "reward_model.ground_truth"],
    "solution": ["solution", "deepseek_solution", "response"],
}
# Or a list of messages holds question and response: the authors' traces, OpenThoughts, DAPO.
CONVERSATIONS = ["messages", "conversations", "prompt"]

# What these sets put around the question; it would contradict our own format.
PROMPT_FRAME = re.compile("|".join([
    # The authors' traces
    r"\A.*?\*user question:\*\s*(?:Answer the following [^\n]*\\boxed\{answer\}\s*)?",
    r"\s{0,9}Remember to place the final answer in the last part using the format.*",
    # DAPO-Math-17k
    r"\ASolve the following math problem step by step\. The last line [^\n]*\n+",
    r'\s{0,9}Remember to put your answer on its own line after "Answer:".*',
    # Eurus-2-RL-Data
    r"\s{0,9}Present the answer in LaTe[xX] format: \\boxed\{Your answer\}\s*\Z",
    # OpenThoughts
    r"\AReturn your final response within \\boxed\{\}\.\s*",
]), re.DOTALL)


def exchange(messages):
    """{"question", "response"}: the user's first message, and the first reply to it."""
    texts = {}
    for message in messages:
        if not isinstance(message, dict):
            continue
        writer = str(message.get("role") or message.get("from")).lower()
        text = message.get("content") or message.get("value")
        if writer in ("user", "human"):
            texts.setdefault("question", text)
        elif writer in ("assistant", "gpt") and texts:
            texts.setdefault("response", text)
    return texts


def first_text(row, paths):
    """The first text or number at one of these dotted paths, as text; "" if there is none."""
    for path in paths:
        value = row
        for key in path.split("."):
            value = value.get(key) if isinstance(value, dict) else None
        if isinstance(value, (str, int, float)):
            return str(value).strip()
    return ""


def split_answer(text):
    r"""(solution, final answer) of a text: the answer stands on GSM8K's last line, "#### 5", or in
    the last \boxed{}; None without one."""
    before, mark, answer = text.rpartition("####")
    answer = answer.strip()
    # A heading of Markdown, or a comment in a trace's code: more lines follow it.
    if not mark or "\n" in answer:
        return text, extract_answer(text)
    return before, answer


def read_row(row, fields=FIELDS):
    """{"question", "answer", "solution", "stated"} of a row; "" for what is missing.
    "stated": the solution's answer, None if missing."""
    if isinstance(row, dict):
        for name in CONVERSATIONS:
            if isinstance(row.get(name), list):
                row = exchange(row[name]) | row
    question = PROMPT_FRAME.sub("", first_text(row, fields["question"]))
    answer = first_text(row, fields["answer"])
    solution = first_text(row, fields["solution"])

    # The answer's field may hold a whole solution, as in GSM8K, or the solution the answer.
    _, marked = split_answer(answer)
    if marked is not None:
        solution = solution or answer
        answer = marked
    solution, stated = split_answer(solution)
    answer = answer or stated or ""

    solution = re.sub(r"<\|(?:begin|end)_of_\w+\|>", "", solution)
    return {"question": question.strip(), "answer": answer,
            "solution": solution.strip(), "stated": stated}


def shape(value):
    """What a row is made of, for messages: {question: str, answer: NoneType}."""
    if isinstance(value, dict):
        fields = [f"{name}: {shape(part)}" for name, part in value.items()]
        return "{" + ", ".join(fields) + "}"
    if isinstance(value, list) and value:
        return f"[{shape(value[0])}]"
    return type(value).__name__


def read_jsonl(path):
    with open(path, "rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:
                raise UserError(f"{path}:{number}: not JSON ({error}); needed is JSONL, "
                                "one row per line") from None
            yield f"{path}:{number}", row


def need_source(source):
    """UserError where a source of rows is no file, and cannot be a hub id."""
    is_id = str(source).count("/") == 1 and Path(source).suffix not in (".jsonl", ".parquet")
    if not is_id and not Path(source).is_file():
        raise UserError(f"{source}: no such file, and not a hub id (OWNER/NAME)")


def read_rows(source, split="train", config=None):
    """Yields (place, row) of a JSONL or parquet file, or of a streamed hub id."""
    need_source(source)
    is_file = Path(source).is_file()
    if is_file and Path(source).suffix != ".parquet":
        yield from read_jsonl(source)
        return

    try:
        import datasets
        where = {"path": "parquet", "data_files": str(source)}
        if not is_file:
            need_hub()
            where = {"path": source, "name": config}
        rows = datasets.load_dataset(**where, split=split, streaming=True)
        for number, row in enumerate(rows, 1):
            yield f"{source}:{number}", row
    except (OSError, ValueError) as error:
        raise UserError(f"{source}: cannot be read ({first_line(error)})") from None


def load_problems(source):
    """A file or hub id -> [{"question", "answer", "family"}]."""
    problems = []
    for place, row in read_rows(source):
        problem = read_row(row)
        if not problem["question"] or not problem["answer"]:
            raise UserError(
                f"{place}: needs question + answer, input + output, or problem + solution (with "
                f"a \\boxed answer), none of them empty; found {shape(row)}")
        problems.append({
            "question": problem["question"],
            "answer": problem["answer"],
            "family": Path(source).stem})

    if not problems:
        raise UserError(f"{source}: no rows")
    refuse_one_question(source, problems)
    return problems


def refuse_one_question(source, problems):
    """UserError where all problems have the same question, but not the same answer: what stands in
    the field of the question is something else, such as an instruction."""
    questions = {problem["question"] for problem in problems}
    answers = {problem["answer"] for problem in problems}
    if len(questions) == 1 and len(answers) > 1:
        question = problems[0]["question"]
        raise UserError(
            f"{source}: all {len(problems)} rows have the same question, {question[:60]!r}: "
            "is it in another field?")


# ---------------------------------------------------------------------------------------------
# The embedded problems. Reward has to find what their traces do not show, or hardly:
#   by hand      the model is right without a tool: should it call one at all?
#   one script   the tool may be busy: does it ask once more?
#   two scripts  both work in traces, the first fails on larger problems: is the second written?
#   either one   each fails where the other works: does the choice look at the problem?
#   search       what came back decides the next call: how does it search?

# Of "traces" and "held_out_traces" the warm start is made; there every script of a problem works.
SPLITS = ("traces", "held_out_traces", "train", "test", "ood_large", "ood_families")


class Problem(NamedTuple):
    family: str
    kind: str  # one of the five above
    operands: tuple
    question: str
    answer: str
    by_hand: str  # the paper's D_init
    by_code: str  # a response with calls, and what they give back
    scripts: list  # (code, whether it prints the answer); of a search none


def embedded_problem(split, seed, index):
    """Problem number `index` of an endless split. ood_large draws operands above the training
    range, ood_families other families."""
    # Not hash(): for strings it differs from process to process.
    rng = random.Random(zlib.crc32(f"{split}/{seed}/{index}".encode()))
    family = rng.choice(HELD_OUT_FAMILIES if split == "ood_families" else FAMILIES)

    def draw(low, high):
        # Numbers up to 9 are choices, not operands.
        if split == "ood_large" and high > 9:
            return rng.randint(high + 1, 3 * high)

        # Every number of digits comes equally often, not nearly always the largest.
        if high >= 100:
            digits = rng.randint(len(str(low)), len(str(high)))
            low = max(low, 10**(digits - 1))
            high = min(high, 10**digits - 1)
        return rng.randint(low, high)

    while True:
        solved = family(draw)
        operands, by_hand, scripts, answer = solved

        # Traces do not tell which script fails where: there all of them work.
        working = [works for _, works in scripts]
        if split.endswith("traces"):
            is_wanted = all(working)
        else:
            is_wanted = any(working) or family is search
        if is_wanted and belongs_to(split, family, operands):
            break

    if family is search:
        by_code = search_trace(rng, operands[0], answer)
    else:
        by_code = script_trace(rng, by_hand, scripts, answer)
    return write_problem(rng, family, solved, by_code)


def belongs_to(split, family, operands):
    """Whether a problem may be in a split: a hash keeps training and test apart."""
    # Sorted: 3 + 5 and 5 + 3 are one problem.
    key = f"{family.__name__}{sorted(operands)}"
    is_test = zlib.crc32(key.encode()) % 10 == 0
    if split in ("traces", "train"):
        return not is_test
    if split in ("held_out_traces", "test"):
        return is_test
    return True


def write_problem(rng, family, solved, by_code):
    """The Problem of what a family returned (`solved`), with complete responses."""
    operands, by_hand, scripts, answer = solved
    opening = rng.choice(OPENINGS)
    final = f"<answer>\\boxed{{{answer}}}</answer>"
    return Problem(
        family=family.__name__,
        kind=family.kind,
        operands=operands,
        question=rng.choice(family.phrasings).format(*operands),
        answer=str(answer),
        by_hand=f"{opening}{by_hand}\n{final}",
        by_code=f"{opening}{by_code}{final}",
        scripts=scripts)


def embedded_rows(split, n, seed=0):
    """The first n problems of a split."""
    return [embedded_problem(split, seed, index)._asdict() for index in range(n)]


def tool_call(code, output):
    return (f"{CODE_OPEN}\n```python\n{code}\n```\n{CODE_CLOSE}\n"
            f"{INTERPRETER_OPEN}\n{output}\n{INTERPRETER_CLOSE}\n")


# What forces a call, and another one after a busy tool, whatever the policy would do.
FORCED_CALL = f"{CODE_OPEN}\n```python\n"
FORCED_RETRY = f"\nOnce more.\n{FORCED_CALL}"

# What every response may begin with, by hand or not: the decision to call comes later.
OPENINGS = ["", "Let me see.\n", "Let me see. This needs some care.\n"]
FIRST_SCRIPT = 0.6  # share of traces with the first of a problem's scripts
BUSY_SHARE = 0.4  # of calls in traces: more than --busy, to show more retries
RETRY_SHARE = 0.2  # of busy calls in traces
CHECK_SHARE = 0.1  # of results in traces that another script confirms


def script_trace(rng, by_hand, scripts, answer):
    """A script that works, and its output. Where the tool is busy, now and then once more."""
    working = [code for code, works in scripts if works]
    script = working[0] if rng.random() < FIRST_SCRIPT else working[-1]

    text = ""
    while rng.random() < BUSY_SHARE:
        text += tool_call(script, BUSY)
        if rng.random() >= RETRY_SHARE:
            return f"{text}Then by hand.\n{by_hand}\n"
        text += "Once more.\n"
    text += tool_call(script, answer)

    if rng.random() < CHECK_SHARE:
        other = working[0] if script == working[-1] else working[-1]
        text += "Is that right?\n" + tool_call(other, answer)
    return text


def search_trace(rng, box, number):
    """Questions to a box, each for any number that is left, until one is left. More than four
    questions are drawn anew."""
    while True:
        low, high = 1, HIGHEST
        calls = []
        while low < high:
            guess = rng.randint(low, high)
            verdict = compare(guess, number)
            call = tool_call(question_to_box(box, guess), verdict)
            low, high = narrowed(low, high, guess, verdict)
            if verdict != "equal":
                call += f"{low} to {high}.\n"
            calls.append(call)
        if len(calls) <= 4:
            return "".join(calls)


# ---------------------------------------------------------------------------------------------
# The families. Each is a function of draw(low, high) that returns
#   operands   what makes the problem that problem
#   by_hand    a person's solution, without the answer line
#   scripts    [(code, whether it prints the answer)]
#   answer     an integer


def phrasings(*questions, kind="one script"):
    """What a family asks; {0}, {1}, ... are its operands. kind: of the five above."""
    def store(family):
        family.phrasings = questions
        family.kind = kind
        return family

    return store


@phrasings(
    "What is the last digit of {0}?",
    "Give the units digit of {0}.",
    "Which digit does {0} end in?",
    kind="by hand")
def last_digit(draw):
    n = draw(100, 2999999)
    scripts = [(f"print({n}%10)", True), (f"print(str({n})[-1])", True)]
    return (n,), f"{n} ends in {n % 10}.", scripts, n % 10


@phrasings(
    "Is {0} odd? Answer 1 if it is and 0 if it is even.",
    "What remains when {0} is divided by 2?",
    "Give 1 if {0} is an odd number, 0 if it is even.",
    kind="by hand")
def is_odd(draw):
    n = draw(100, 2999999)
    scripts = [(f"print({n}%2)", True), (f"print({n}&1)", True)]
    return (n,), f"{n} ends in {n % 10}, so {n % 2}.", scripts, n % 2


@phrasings(
    "What is the digit sum of {0} * {1}?",
    "Multiply {0} by {1} and add up the digits of the result.",
    "Find the sum of the digits of the product of {0} and {1}.")
def digit_sum(draw, sign="*"):
    a, b = sorted((draw(11, 999), draw(11, 999)))
    digits = str(a * b if sign == "*" else a + b)
    answer = sum(map(int, digits))
    by_hand = f"{a}{sign}{b} = {digits}\n{'+'.join(digits)} = {answer}"
    scripts = [
        (f"print(sum(map(int,str({a}{sign}{b}))))", True),
        (f"n={a}{sign}{b}\ns=0\nwhile n:\n    s+=n%10\n    n//=10\nprint(s)", True)]
    return (a, b), by_hand, scripts, answer


@phrasings(
    "Find the remainder when {0} * {1} is divided by {2}.",
    "What is {0} times {1} modulo {2}?",
    "Multiply {0} by {1} and divide by {2}. What remains?")
def product_remainder(draw):
    a = draw(20, 999)
    b = draw(20, 999)
    m = draw(11, 99)
    product = a * b
    by_hand = f"{a}*{b} = {product} = {product // m}*{m} + {product % m}"
    scripts = [(f"print({a}*{b}%{m})", True), (f"print(divmod({a}*{b},{m})[1])", True)]
    return (a, b, m), by_hand, scripts, product % m


@phrasings(
    "Find the greatest common divisor of {0} and {1}.",
    "What is gcd({0}, {1})?",
    ("Two ropes of {0} cm and {1} cm are cut into equal pieces as long as possible. "
     "How long is a piece in cm?"))
def common_divisor(draw):
    factor = draw(2, 40)
    smaller, larger = sorted((factor * draw(3, 24), factor * draw(3, 24)))

    # Euclid: the divisors of a and b are those of b and the remainder.
    lines = []
    a, b = larger, smaller
    while b:
        lines.append(f"{a} = {a // b}*{b} + {a % b}")
        a, b = b, a % b

    scripts = [
        (f"from math import gcd\nprint(gcd({smaller},{larger}))", True),
        (f"a,b={smaller},{larger}\nwhile b:\n    a,b=b,a%b\nprint(a)", True)]
    return (smaller, larger), "By Euclid:\n" + "\n".join(lines), scripts, a


@phrasings(
    "How many digits does {0}^{1} have?",
    "Find the number of decimal digits of {0} to the power {1}.",
    "If {0}^{1} is written out, how many digits does it take?",
    kind="two scripts")
def digit_count(draw):
    a = draw(2, 99)
    b = draw(100, 449)
    answer = len(str(a**b))
    log = math.log10(a)
    by_hand = f"log10({a}) = {log:.4f}\n{b}*{log:.4f} = {b * log:.2f}, so {answer} digits"
    # No float is as large as 2^1024: from there on the first script raises an OverflowError.
    scripts = [
        (f"from math import log10\nprint(int(log10({a}.0**{b}))+1)", a**b < 2**1024),
        (f"print(len(str({a}**{b})))", True)]
    return (a, b), by_hand, scripts, answer


@phrasings(
    "Find the remainder when {0}^{1} is divided by {2}.",
    "What is {0} to the power {1} modulo {2}?",
    "Divide {0}^{1} by {2}. What remains?",
    kind="two scripts")
def power_remainder(draw):
    a = draw(2, 99)
    b = draw(3, 19)
    m = draw(11, 999)
    answer = a**b % m

    # Square and multiply.
    lines = []
    power = a % m
    for bit in reversed(bin(b)[2:]):
        lines.append(f"{bit}: {power}")
        power = power * power % m
    by_hand = "\n".join([f"Square repeatedly modulo {m}.", *lines, f"That makes {answer}."])

    # From 2^53 on a float is rounded: the number that it prints is wrong.
    scripts = [
        (f"print(int({a}.0**{b}%{m}))", int(float(a)**b % m) == answer),
        (f"print(pow({a},{b},{m}))", True)]
    return (a, b, m), by_hand, scripts, answer


DEEPEST = 950  # calls in calls: at 1,000 Python gives up


# {2} is the exponent: "x^{2}" becomes x^5.
@phrasings(
    "Add x^{2} for all multiples x of {1} up to {0}. What are the last two digits of the sum?",
    "What is the sum of x^{2} over the multiples x of {1} up to {0}, modulo 100?",
    "The multiples of {1} up to {0} are raised to the power {2}. Find their sum modulo 100.",
    kind="either one")
def power_sum(draw):
    k = 2 + 3 * draw(0, 1)  # 2 or 5
    d = draw(2, 12) if k == 2 else draw(8, 12)  # for 5 rarely both scripts fail
    n = draw(1000, 9999)
    n -= n % d
    if DEEPEST <= n // d <= 1000:
        n -= 60 * d  # not so near to the limit
    multiples = range(d, n + 1, d)
    answer = sum(x**k for x in multiples) % 100
    rounded = sum(float(x)**k for x in multiples)
    by_hand = (f"There are {n // d} multiples, from {d} to {n}.\n"
               f"Their powers add up to a number that ends in {answer:02}.")
    # Each fails where the other works: the recursion is too deep, or the sum of floats rounded.
    scripts = [
        (f"def s(n):\n    return n**{k}+s(n-{d}) if n else 0\nprint(s({n})%100)",
         n // d < DEEPEST),
        (f"print(int(sum(float(x)**{k} for x in range(0,{n}+1,{d})))%100)",
         int(rounded) % 100 == answer)]
    return (n, d, k), by_hand, scripts, answer


@phrasings(
    f"Box {{0}} hides a number from 1 to {HIGHEST}. Find it.",
    f"Which number from 1 to {HIGHEST} is in box {{0}}?",
    f"Find the number in box {{0}}. It is at least 1 and at most {HIGHEST}.",
    kind="search")
def search(draw):
    box = draw(1000, 9999)
    # No text says the number, and no arithmetic: who does not ask can only guess.
    number = hidden_number(box)
    return (box,), f"I guess that {box} hides {number}.", [], number


@phrasings(
    "What is the digit sum of {0} + {1}?",
    "Add {0} and {1} and add up the digits of the result.",
    "Find the sum of the digits of the sum of {0} and {1}.")
def sum_of_digit_sums(draw):
    return digit_sum(draw, "+")


HELD_OUT_FAMILIES = [sum_of_digit_sums]
# As often as they stand here. Few by hand: they are right from the start.
FAMILIES = ([last_digit, is_odd] + 2 * [digit_sum, product_remainder, common_divisor]
            + 2 * [digit_count, power_remainder, power_sum] + 6 * [search])


# ---------------------------------------------------------------------------------------------
# The embedded tokenizer

# Failures as the sandbox prints them: else a traceback takes 200 tokens.
ERRORS = """Traceback (most recent call last, 988 frames dropped):
  File "snippet.py", line 3, in <module>
    print(s(2500)%100)
  File "snippet.py", line 2, in s
    return n**2+s(n-2) if n else 0
  [Previous line repeated 3 more times]
RecursionError: maximum recursion depth exceeded
OverflowError: (34, 'Numerical result out of range')
SyntaxError: invalid syntax
NameError: name 'x' is not defined
[timed out after 0.5 s]
"""

CHAT_TEMPLATE = (
    "{% for m in messages %}"
    "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}")

@functools.cache  # takes seconds
def embedded_tokenizer(vocabulary=896, documents=3000):
    """A byte-level BPE tokenizer, trained on the embedded problems. Tags are ordinary text, as for
    the big tokenizers."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(PRETOKENIZE_REGEX), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()

    texts = []
    for index in range(documents):
        problem = embedded_problem("traces", 0, index)
        texts += [problem.question, problem.by_hand, problem.by_code]
    texts += ["user\n", "assistant\n"] * documents
    texts += [ERRORS] * (documents // 10)

    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)

    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=["<|im_start|>"],
        chat_template=CHAT_TEMPLATE)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--file",
        help="file or hub id of problems to load; empty: the embedded problems")
    parser.add_argument("--n", type=int, default=2, help="problems to print")
    parser.add_argument("--seed", type=int, default=0, help="seed of the embedded problems")
    args = parser.parse_args()

    if args.file:
        problems = load_problems(args.file)
    else:
        problems = embedded_rows("train", args.n, args.seed)

    print(f"{len(problems)} problems\n")
    for problem in problems[:args.n]:
        for name, value in problem.items():
            print(f"{name}: {value}")
        print()


if __name__ == "__main__":
    try:
        main()
    except (UserError, OSError) as error:
        sys.exit(f"error: {error}")
