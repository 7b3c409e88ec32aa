"""Problems and prompts: what the policy is asked, and the reference answers.

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

import sympy
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from rollout import (
    ANSWER_OPEN,
    CLOSING,
    CODE_CLOSE,
    CODE_OPEN,
    INTERPRETER_CLOSE,
    INTERPRETER_OPEN,
    break_added_tokens,
    encode_chat,
    first_line,
    need_hub,
)
from sandbox import UserError

# ---------------------------------------------------------------------------------------------
# Prompt

# For a model that has never seen the format.
RETOOL_PROMPT = """Work out the problem below, thinking step by step. Whenever a calculation or a \
check is better done by a program, write a complete Python script (with its imports, printing \
what you need) in this form:
<code>
```python
print(...)
```
</code>
It is run at once and what it printed is given back between <interpreter> and </interpreter>; \
then go on with your reasoning. You may do so several times, and correct a script that failed. \
Close with the final result in this form:
<answer>\\boxed{...}</answer>

*user question:*
{question}"""
PROMPT_TEMPLATES = {"plain": "{question}", "retool": RETOOL_PROMPT}


def load_template(name):
    """"plain" (the question alone), "retool", or a file containing {question}."""
    if name in PROMPT_TEMPLATES:
        return PROMPT_TEMPLATES[name]

    if not Path(name).is_file():
        raise UserError(f"--prompt_template {name}: neither plain nor retool nor a file")

    template = Path(name).read_text()
    if "{question}" not in template:
        raise UserError(f"--prompt_template {name}: the file does not contain {{question}}")
    return template


def encode_prompt(tokenizer, template, question):
    """One user message in the tokenizer's chat template -> token ids."""
    # A question that names control tokens must not open a turn.
    question = break_added_tokens(tokenizer, question)
    return encode_chat(tokenizer, template.replace("{question}", question))


# ---------------------------------------------------------------------------------------------
# The answer that a text states

# Calls and interpreter blocks; if unclosed, to the end.
BLOCKS = re.compile("|".join(f"{re.escape(tag)}.*?(?:{re.escape(CLOSING[tag])}|\\Z)"
                             for tag in CLOSING if tag != ANSWER_OPEN), re.DOTALL)


def boxed(text):
    r"""The content of the last complete \boxed{...}, nested braces included, or None."""
    boxes = []
    opened = []  # one pass with a stack: many \boxed{ must not stall the reward
    for brace in re.finditer(r"\\boxed\s*\{|[{}]", text):
        if brace[0] != "}":
            opened.append(brace)
        elif opened:
            opening = opened.pop()
            if opening[0] != "{":
                boxes.append((opening.end(), brace.start()))

    if not boxes:
        return None
    start, end = max(boxes)  # the one that starts last
    return text[start:end].strip()


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

# (question, answer, solution) as dotted paths; the first whose fields are all there wins. In a list
# of messages "user" is the first message of the user, "assistant" the reply to it: see `dig`.
LAYOUTS = [
    # NuminaMath-1.5
    ("problem", "answer", "solution"),
    # OpenThoughts
    ("problem", "ground_truth_solution", "deepseek_solution"),
    # MATH, NuminaMath-CoT: {"problem": "2+3?", "solution": "\\boxed{5}"}
    ("problem", "solution", "solution"),
    # AIME collections
    ("problem", "answer", ""),
    # Traces
    ("question", "answer", "response"),
    # {"question": "2+3?", "response": "\\boxed{5}"}
    ("question", "response", "response"),
    # GSM8K: {"question": "2+3?", "answer": "2+3=5\n#### 5"}, or a plain answer
    ("question", "answer", "answer"),
    # The authors' AIME files
    ("input", "output", ""),
    # DAPO-Math-17k: {"prompt": [{"content": "2+3?"}], "reward_model": {"ground_truth": "5"}}
    ("prompt.user.content", "reward_model.ground_truth", ""),
    # Its processed form
    ("prompt", "reward_model.ground_truth", ""),
    # `sft.py curate`: {"messages": [{"content": "2+3?"}, {"content": "\\boxed{5}"}], "answer": "5"}
    ("messages.user.content", "answer", "messages.assistant.content"),
    # The authors' traces
    ("messages.user.content", "messages.assistant.content", "messages.assistant.content"),
    # OpenThoughts
    ("conversations.user.value", "conversations.assistant.value", "conversations.assistant.value"),
    # The same with the other names of a message's fields
    ("conversations.user.content", "conversations.assistant.content",
     "conversations.assistant.content"),
]

# What these sets put around the question; it would contradict our own format.
PROMPT_FRAME = re.compile("|".join([
    # The authors' traces
    r"\A.*?\*user question:\*\s*(?:Answer the following [^\n]*\\boxed\{answer\}\s*)?",
    r"\s{0,9}Remember to place the final answer in the last part using the format.*",
    # DAPO-Math-17k
    r"\ASolve the following math problem step by step\. The last line [^\n]*\n+",
    r'\s{0,9}Remember to put your answer on its own line after "Answer:".*',
    # OpenThoughts
    r"\AReturn your final response within \\boxed\{\}\.\s*",
]), re.DOTALL)


def dig(row, path):
    """The value at a dotted path such as prompt.0.content or prompt.user.content, or None."""
    value = row
    for key in path.split("."):
        if isinstance(value, dict):
            value = value.get(key)
        elif isinstance(value, list) and key.isdigit() and int(key) < len(value):
            value = value[int(key)]
        elif isinstance(value, list) and key in ("user", "assistant"):
            question_at, reply_at = find_exchange(value)
            at = question_at if key == "user" else reply_at
            value = None if at is None else value[at]
        else:
            return None
    return value


def find_exchange(messages):
    """Where in a list of messages the user's first one is, and the reply to it; None: missing."""
    writers = []
    for message in messages:
        writer = None
        if isinstance(message, dict):
            writer = message.get("role") or message.get("from")
        writers.append(str(writer).lower())

    # Where no message says that it is the user's, only a system message is known to be none.
    instructs = ("system", "developer")
    of_user = [i for i, writer in enumerate(writers) if writer in ("user", "human")]
    of_others = [i for i, writer in enumerate(writers) if writer not in instructs]
    if not of_others:
        return None, None

    question_at = of_user[0] if of_user else of_others[0]
    for i in of_others:
        if i > question_at and i not in of_user:
            return question_at, i
    return question_at, None


def marked_answer(text):
    r"""A solution's final answer: the text after #### or the last \boxed{}; or None."""
    # In a trace, #### may be a comment in its code.
    if "####" in text and "<answer>" not in text:
        return text.rsplit("####", 1)[1].strip()
    return extract_answer(text)


def read_row(row, layouts=LAYOUTS):
    """{"question", "answer", "solution", "own"} of a row in a known layout, or None. "own": the
    solution's answer, None if missing; "solution": "" if missing."""
    for question_path, answer_path, solution_path in layouts:
        question = dig(row, question_path)
        answer = dig(row, answer_path)
        solution = dig(row, solution_path) if solution_path else ""
        if not isinstance(question, str) or not isinstance(answer, (str, int, float)):
            continue
        if not isinstance(solution, str):
            continue

        # A question in a list of messages may stand among instructions.
        if "." in question_path:
            question = PROMPT_FRAME.sub("", question)

        # The answer's field may hold a whole solution.
        answer = str(answer).strip()
        marked = marked_answer(answer)
        if marked is not None:
            answer = marked
        elif answer_path == solution_path == "answer":
            solution = ""  # a bare answer
        elif answer_path == solution_path:
            answer = None  # the solution states none

        own_answer = marked_answer(solution)
        if "<answer>" not in solution:  # not a trace
            solution = solution.rsplit("####", 1)[0]
            solution = re.sub(r"<\|(?:begin|end)_of_\w+\|>", "", solution)

        return {"question": question.strip(),
                "answer": answer,
                "solution": solution.strip(),
                "own": own_answer}
    return None


def wrong_field(row, layouts=LAYOUTS):
    """Which field keeps `read_row` from a row whose fields are all there; "" if some are not."""
    kinds = {type(None): "null", dict: "a dict", list: "a list", int: "a number", float: "a number"}
    types = (str, (str, int, float), str)  # of question, answer and solution
    for layout in layouts:
        if not all(has_field(row, path) for path in layout if path):
            continue
        for path, wanted in zip(layout, types):
            value = dig(row, path)
            if path and not isinstance(value, wanted):
                return f"{path} is {kinds.get(type(value), type(value).__name__)}"
    return ""


def has_field(row, path):
    """Whether there is something at a dotted path, be it null."""
    parent_path, _, key = path.rpartition(".")
    parent = dig(row, parent_path) if parent_path else row
    return dig(row, path) is not None or (isinstance(parent, dict) and key in parent)


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
    except ImportError:
        raise UserError(f"{source}: needs the package datasets (pip install datasets)") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{source}: cannot be read ({first_line(error)})") from None


def load_problems(source):
    """A file or hub id -> [{"question", "answer", "family"}]."""
    problems = []
    for place, row in read_rows(source):
        problem = read_row(row)
        if not problem or not problem["question"] or not problem["answer"]:
            found = f"found {field_names(row)}"
            if problem:
                found += ", but one is empty or states no answer"
            raise UserError(
                f"{place}: needs question + answer, input + output, or problem + solution (with "
                f"a \\boxed answer); {wrong_field(row) or found}")
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


def field_names(row):
    return ", ".join(row) if isinstance(row, dict) else type(row).__name__


# ---------------------------------------------------------------------------------------------
# The embedded problems

SPLITS = ("train", "test", "ood_large", "ood_families")


class Problem(NamedTuple):
    family: str
    operands: tuple
    question: str
    answer: str
    by_hand: str  # the paper's D_init
    by_code: str  # not yet verified


def embedded_problem(split, seed, index):
    """Problem number `index` of an endless split. ood_large draws operands above the training
    range, ood_families other families."""
    # Not hash(): for strings it differs from process to process.
    rng = random.Random(zlib.crc32(f"{split}/{seed}/{index}".encode()))
    families = HELD_OUT_FAMILIES if split == "ood_families" else FAMILIES

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

    return draw_problem(rng, split, families, draw)


def draw_problem(rng, split, families, draw):
    """A Problem of one of the families, whose operands belong to the split."""
    while True:
        family = rng.choice(families)
        operands, by_hand, by_code, answer = family(draw)

        # A hash keeps train and test disjoint. Sorted: 3 + 5 and 5 + 3 are one problem.
        key = f"{family.__name__}{sorted(operands)}"
        is_test = zlib.crc32(key.encode()) % 10 == 0
        if split == "train" and is_test:
            continue
        if split == "test" and not is_test:
            continue
        return write_problem(rng, family, operands, by_hand, by_code, answer)


def write_problem(rng, family, operands, by_hand, by_code, answer):
    """The Problem of what a family returned, with complete responses."""
    if CODE_OPEN not in by_code:
        by_code = tool_call(by_code, answer)
    final = f"<answer>\\boxed{{{answer}}}</answer>"
    return Problem(
        family=family.__name__,
        operands=operands,
        question=rng.choice(family.phrasings).format(*operands),
        answer=str(answer),
        by_hand=f"{by_hand}\n{final}",
        by_code=f"Let me compute this.\n{by_code}{final}")


def problem_row(problem):
    """As `load_problems` returns it."""
    return {"question": problem.question, "answer": problem.answer, "family": problem.family}


def embedded_rows(split, n, seed=0):
    """The first n problems of a split."""
    return [problem_row(embedded_problem(split, seed, index)) for index in range(n)]


def tool_call(code, output=""):
    return (f"{CODE_OPEN}\n```python\n{code}\n```\n{CODE_CLOSE}\n"
            f"{INTERPRETER_OPEN}\n{output}\n{INTERPRETER_CLOSE}\n")


# ---------------------------------------------------------------------------------------------
# The families. Each is a function of draw(low, high) that returns
#   operands   what makes the problem that problem
#   by_hand    a person's solution, without the answer line
#   by_code    a script that prints the answer; or prose and tool_call(snippet, output), without
#              the output where the natural script may fail
#   answer     an integer or a word


def phrasings(*questions):
    """What a family asks; {0}, {1}, ... are its operands."""
    def store(family):
        family.phrasings = questions
        return family

    return store


@phrasings(
    "What is {0} + {1}?",
    "Ann has {0} coins and Ben has {1}. How many do they have together?",
    "A shelf holds {0} books and {1} more arrive. How many books are there now?")
def addition(draw):
    a = draw(10, 499)
    b = draw(10, 499)
    return (a, b), f"{a} + {b} = {a + b}.", f"print({a}+{b})", a + b


@phrasings(
    "Which is larger, {0} or {1}?",
    "Of the numbers {0} and {1}, give the greater one.",
    "Two towns have {0} and {1} inhabitants. How many live in the larger town?")
def larger(draw):
    a = draw(10, 49999)
    b = draw(10, 49999)
    return (a, b), f"The larger one is {max(a, b)}.", f"print(max({a},{b}))", max(a, b)


@phrasings(
    "What is the last digit of {0}?",
    "Give the units digit of {0}.",
    "Which digit does {0} end in?")
def last_digit(draw):
    n = draw(100, 2999999)
    return (n,), f"It ends in {n % 10}.", f"print({n}%10)", n % 10


def square_and_multiply(a, b, m):
    lines = []
    result = 1
    power = a % m
    exponent = 1
    while exponent <= b:
        line = f"{exponent}: {power}"
        if b & exponent:
            product = result * power
            line += f", {result}*{power} = {product} = {product % m}"
            result = product % m
        lines.append(line)

        power = power * power % m
        exponent *= 2
    return "\n".join(lines), result


@phrasings(
    "Find the remainder when {0}^{1} is divided by {2}.",
    "What is {0} to the power {1} modulo {2}?",
    "Divide {0}^{1} by {2}. What remains?")
def power_remainder(draw):
    a = draw(3, 999)
    b = draw(3, 15)
    m = draw(11, 999)
    steps, answer = square_and_multiply(a, b, m)
    by_hand = f"Square repeatedly modulo {m}.\n{steps}"
    return (a, b, m), by_hand, f"print(pow({a},{b},{m}))", answer


@phrasings(
    "How many pairs (x, y) of integers from 1 to {0} have a sum divisible by {1}?",
    "Count the pairs (x, y) with 1 <= x, y <= {0} whose sum is a multiple of {1}.",
    ("Two dice have {0} sides each, numbered from 1. "
     "For how many rolls is the sum divisible by {1}?"))
def count_pairs(draw):
    n = draw(100, 999)
    m = draw(3, 5)
    if draw(0, 9) == 0:
        n = draw(6000, 9999)  # the natural loop takes a second

    # How many numbers leave each remainder? Those of r pair with those of -r.
    counts = [0] * m
    for x in range(1, n + 1):
        counts[x % m] += 1
    answer = sum(counts[r] * counts[-r] for r in range(m))
    listed = ", ".join(f"{counts[r]} times {r}" for r in range(m))
    products = " + ".join(f"{counts[r]}*{counts[-r]}" for r in range(m))
    by_hand = (f"Remainders modulo {m} of the numbers up to {n}: {listed}\n"
               f"{products} = {answer}")

    by_code = tool_call(f"r=range(1,{n}+1)\nprint(sum((x+y)%{m}==0 for x in r for y in r))")
    if n > 1200:
        by_code += "Too slow. Count the remainders.\n" + tool_call(
            f"n,m={n},{m}\nc=[(n-r)//m+(r>0) for r in range(m)]\n"
            "print(sum(c[r]*c[-r] for r in range(m)))", answer)
    return (n, m), by_hand, by_code, answer


def euclid(a, b):
    lines = []
    while b:
        lines.append(f"{a} = {a // b}*{b} + {a % b}")
        a, b = b, a % b
    return "\n".join(lines), a


@phrasings(
    "Find the greatest common divisor of {0} and {1}.",
    "What is gcd({0}, {1})?",
    ("Two ropes of {0} cm and {1} cm are cut into equal pieces as long as possible. "
     "How long is a piece in cm?"))
def common_divisor(draw):
    factor = draw(2, 40)
    a, b = sorted((factor * draw(5, 99), factor * draw(5, 99)))
    steps, answer = euclid(b, a)
    by_code = f"from math import gcd\nprint(gcd({a},{b}))"
    return (a, b), f"By Euclid:\n{steps}", by_code, answer


@phrasings(
    "Find the least common multiple of {0} and {1}.",
    "What is lcm({0}, {1})?",
    ("Two lights flash every {0} and every {1} seconds. "
     "After how many seconds do they flash together again?"))
def common_multiple(draw):
    a, b = sorted((draw(12, 250), draw(12, 250)))
    steps, g = euclid(b, a)
    answer = a * b // g
    by_hand = (f"By Euclid:\n{steps}\n"
               f"The gcd is {g}, so {a}*{b}/{g} = {a * b}/{g} = {answer}")
    return (a, b), by_hand, f"from math import lcm\nprint(lcm({a},{b}))", answer


@phrasings(
    "What is the digit sum of {0} * {1}?",
    "Multiply {0} by {1} and add up the digits of the result.",
    "Find the sum of the digits of the product of {0} and {1}.")
def digit_sum(draw, sign="*"):
    a, b = sorted((draw(101, 9999), draw(101, 9999)))
    digits = str(a * b if sign == "*" else a + b)
    answer = sum(map(int, digits))
    by_hand = f"{a}{sign}{b} = {digits}\n{'+'.join(digits)} = {answer}"
    return (a, b), by_hand, f"print(sum(map(int,str({a}{sign}{b}))))", answer


@phrasings(
    "How many positive divisors does {0} have?",
    "Count the divisors of {0}.",
    "In how many rows of equal length can {0} soldiers be arranged? Count every number of rows.")
def divisor_count(draw):
    n = draw(100, 9999)
    answer = sympy.divisor_count(n)
    powers = []
    for prime, exponent in sympy.factorint(n).items():
        powers.append(f"{prime}^{exponent}" if exponent > 1 else f"{prime}")
    by_hand = f"{n} = {'*'.join(powers)}\nAdd one to each exponent and multiply: {answer}"
    return (n,), by_hand, f"n={n}\nprint(sum(n%d==0 for d in range(1,n+1)))", answer


@phrasings(
    "How many primes are there from {0} to {1}?",
    "Count the prime numbers between {0} and {1} inclusive.",
    "How many of the integers {0}, ..., {1} are prime?")
def prime_count(draw):
    a = draw(10, 900)
    b = a + draw(10, 60)
    primes = list(sympy.primerange(a, b + 1))
    by_hand = "There are none."
    if primes:
        listed = ", ".join(map(str, primes))
        by_hand = f"The primes are {listed}.\nThat makes {len(primes)}."
    by_code = f"from sympy import primerange\nprint(len(list(primerange({a},{b}+1))))"
    return (a, b), by_hand, by_code, len(primes)


@phrasings(
    "Compute the sum of n^{2} for n from {0} to {1}.",
    "What is {0}^{2} + ... + {1}^{2}, over all integers between?",
    "Add the powers n^{2} of all integers n with {0} <= n <= {1}.")
def power_sum(draw):
    a = draw(2, 99)
    k = 2 + draw(0, 9) % 2
    b = a + draw(5, 200)

    by_hand = ""
    totals = []
    for end in (b, a - 1):
        total = sum(n**k for n in range(end + 1))
        formula = f"({end}*{end + 1}/2)^2"
        if k == 2:
            formula = f"{end}*{end + 1}*{2 * end + 1}/6"
        by_hand += f"Up to {end}: {formula} = {total}\n"
        totals.append(total)

    answer = totals[0] - totals[1]
    by_hand += f"{totals[0]} - {totals[1]} = {answer}"
    return (a, b, k), by_hand, f"print(sum(n**{k} for n in range({a},{b}+1)))", answer


@phrasings(
    "A sequence has u({0}) = {1} and u(n) = u(n-1) + n. Find u({2}).",
    "Let u({0}) = {1} and let u(n) exceed u(n-1) by n. What is u({2})?",
    "Start with u({0}) = {1}; step n adds n to the value before. Give u({2}).")
def recurrence(draw):
    a = draw(2, 499)
    first = draw(10, 999)
    steps = draw(20, 900)
    if draw(0, 9) % 3 == 0:
        steps = draw(1100, 1900)  # beyond Python's recursion limit
    n = first + steps

    added = steps * (first + 1 + n) // 2
    answer = a + added
    by_hand = (f"{first + 1} + ... + {n} = {steps}*{first + 1 + n}/2 = {added}\n"
               f"{a} + {added} = {answer}")

    by_code = tool_call(f"def u(n):\n    return u(n-1)+n if n>{first} else {a}\nprint(u({n}))")
    if steps > 1000:
        by_code += "Too deep. Use a loop.\n" + tool_call(
            f"n,u={first},{a}\nwhile n<{n}:\n    n+=1\n    u+=n\nprint(u)", answer)
    return (first, a, n), by_hand, by_code, answer


@phrasings(
    "Find the inverse of {0} modulo {1}, or 0 if there is none.",
    "Which x with 0 < x < {1} satisfies {0}*x = 1 modulo {1}? Answer 0 if no such x exists.",
    "Give the multiplicative inverse of {0} mod {1} (0 if it does not exist).")
def inverse(draw):
    m = draw(20, 999)
    a = draw(3, 999)
    if draw(0, 1):  # about half have no inverse
        g = 2 + a % 5
        m += g - m % g
        a += g - a % g

    # Extended Euclid: every remainder r is x*a modulo m.
    lines = []
    r, next_r = m, a % m
    x, next_x = 0, 1
    while next_r:
        q, rest = divmod(r, next_r)
        x, next_x = next_x, x - q * next_x
        lines.append(f"{r} = {q}*{next_r} + {rest}, x = {next_x}")
        r, next_r = next_r, rest
    by_hand = "By Euclid:\n" + "\n".join(lines)

    by_code = tool_call(f"print(pow({a},-1,{m}))")
    if r > 1:
        by_hand += f"\nThe gcd is {r}, so there is none."
        return (a, m), by_hand, f"{by_code}There is no inverse.\n", 0
    by_hand += f"\nThe gcd is 1, so the inverse is {x}, that is {x % m}."
    return (a, m), by_hand, by_code, x % m


@phrasings(
    "How many digits does {0}^{1} have?",
    "Find the number of decimal digits of {0} to the power {1}.",
    "If {0}^{1} is written out, how many digits does it take?")
def digit_count(draw):
    a = draw(3, 999)
    b = draw(20, 399)
    answer = len(str(a**b))
    log = math.log10(a)
    by_hand = f"log10({a}) = {log:.4f}\n{b}*{log:.4f} = {b * log:.2f}, so {answer} digits"

    by_code = tool_call(f"from math import pow,log10\nprint(int(log10(pow({a},{b})))+1)")
    if b * log > 308:  # a float's largest exponent
        by_code += "A float is too small. Use an integer.\n"
        by_code += tool_call(f"print(len(str({a}**{b})))", answer)
    return (a, b), by_hand, by_code, answer


@phrasings(
    ("Let g be the greatest common divisor of {0} and {1}. "
     "Find the remainder of g^{2} divided by {3}."),
    "Take g = gcd({0}, {1}). What is g^{2} modulo {3}?",
    "The numbers {0} and {1} have greatest common divisor g. Divide g^{2} by {3}. What remains?")
def divisor_then_power(draw):
    factor = draw(2, 40)
    a = factor * draw(5, 60)
    b = factor * draw(5, 60)
    k = draw(3, 15)
    m = draw(11, 4999)
    divisor_steps, g = euclid(a, b)
    power_steps, answer = square_and_multiply(g, k, m)
    by_hand = f"By Euclid:\n{divisor_steps}\nModulo {m}:\n{power_steps}"
    by_code = (tool_call(f"from math import gcd\nprint(gcd({a},{b}))", g)
               + "Now the power.\n"
               + tool_call(f"print(pow({g},{k},{m}))", answer))
    return (a, b, k, m), by_hand, by_code, answer


@phrasings(
    "Let p be the smallest prime greater than {0}. Find the remainder of p^{1} divided by {2}.",
    "Take the first prime p after {0}. What is p^{1} modulo {2}?",
    "p is the next prime after {0}. Divide p^{1} by {2}. What remains?")
def prime_then_power(draw):
    n = draw(20, 4999)
    k = draw(3, 15)
    m = draw(11, 4999)
    p = sympy.nextprime(n)
    steps, answer = square_and_multiply(p, k, m)
    by_code = (tool_call(f"from sympy import nextprime\nprint(nextprime({n}))", p)
               + "Now the power.\n"
               + tool_call(f"print(pow({p},{k},{m}))", answer))
    return (n, k, m), f"The prime is {p}. Modulo {m}:\n{steps}", by_code, answer


@phrasings(
    "Find the remainder when {0} * {1} is divided by {2}.",
    "What is {0} times {1} modulo {2}?",
    "Multiply {0} by {1} and divide by {2}. What remains?")
def product_remainder(draw):
    a = draw(20, 999)
    b = draw(20, 999)
    m = draw(11, 99)
    answer = a * b % m
    by_hand = f"{a}*{b} = {a * b} = {a * b // m}*{m} + {answer}"
    return (a, b, m), by_hand, f"print({a}*{b}%{m})", answer


@phrasings(
    "What is the digit sum of {0} + {1}?",
    "Add {0} and {1} and add up the digits of the result.",
    "Find the sum of the digits of the sum of {0} and {1}.")
def sum_of_digit_sums(draw):
    return digit_sum(draw, "+")


TRIVIAL = [addition, larger, last_digit]  # no tool is needed
FAMILIES = TRIVIAL + [
    power_remainder,
    count_pairs,
    common_divisor,
    common_multiple,
    digit_sum,
    divisor_count,
    prime_count,
    power_sum,
    recurrence,
    inverse,
    digit_count,
    divisor_then_power,
    prime_then_power,
]
HELD_OUT_FAMILIES = [product_remainder, sum_of_digit_sums]


# ---------------------------------------------------------------------------------------------
# The embedded tokenizer

# Failures as the sandbox prints them: else a traceback takes 200 tokens.
ERRORS = """Traceback (most recent call last, 988 frames dropped):
  File "snippet.py", line 3, in <module>
    print(u(2500))
  File "snippet.py", line 2, in u
    return u(n-1)+n if n>500 else 7
  [Previous line repeated 3 more times]
RecursionError: maximum recursion depth exceeded
ValueError: base is not invertible for the given modulus
OverflowError: math range error
SyntaxError: invalid syntax
NameError: name 'x' is not defined
[timed out after 0.5 s]
"""

CHAT_TEMPLATE = (
    "{% for m in messages %}"
    "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}")

# As Qwen's tokenizers split: for every qwen2 checkpoint, transformers loads this pattern.
QWEN_PATTERN = "|".join([
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)",
    r"[^\r\n\p{L}\p{N}]?\p{L}+",
    r"\p{N}",  # digits one by one
    r" ?[^\s\p{L}\p{N}]+[\r\n]*",
    r"\s*[\r\n]+",
    r"\s+(?!\S)",
    r"\s+",
])


@functools.cache  # takes seconds
def embedded_tokenizer(vocabulary=896, documents=3000):
    """A byte-level BPE tokenizer, trained on the embedded problems. Tags are ordinary text, as for
    the big tokenizers."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(QWEN_PATTERN), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()

    texts = []
    for index in range(documents):
        problem = embedded_problem("train", 0, index)
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
    parser.add_argument("--seed", type=int, default=0, help="of the embedded problems")
    args = parser.parse_args()

    if args.file:
        problems = load_problems(args.file)
    else:
        problems = [embedded_problem("train", args.seed, i)._asdict() for i in range(args.n)]

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
