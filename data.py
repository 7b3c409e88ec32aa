"""Problems and prompts: what the policy is asked, and the reference answers.

The default needs no download: endless, seeded number problems (`embedded_problem`), each with a
solution by hand (the paper's D_init) and one with code, which sft.py verifies, and a small tokenizer
(`embedded_tokenizer`). All else is a file or hub id in a layout that public data sets use.

    python data.py                   # sample problems
    python data.py --file FILE       # how a file of problems (or a hub id) is understood
"""
import argparse
import functools
import json
import math
import random
import re
import sys
import zlib
from collections import namedtuple
from pathlib import Path

import sympy
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from rollout import (ANSWER_OPEN, CLOSING, CODE_CLOSE, CODE_OPEN, INTERPRETER_CLOSE, INTERPRETER_OPEN,
                     first_line, need_hub)
from sandbox import UserError

# ---------------------------------------------------------------------------------------------
# Prompt

# For a model that has never seen the format.
RETOOL_PROMPT = r"""Work out the problem below, thinking step by step. Whenever a calculation or a \
check is better done by a program, write a complete Python script (with its imports, printing what you \
need) in this form:
<code>
```python
print(...)
```
</code>
It is run at once and what it printed is given back between <interpreter> and </interpreter>; then go on \
with your reasoning. You may do so several times, and correct a script that failed. Close with the final \
result in this form:
<answer>\boxed{...}</answer>

*user question:*
{question}"""
PROMPT_TEMPLATES = {"plain": "{question}", "retool": RETOOL_PROMPT.replace("\\\n", "")}


def load_template(name):
    """"plain" (the question alone), "retool", or a file containing {question}."""
    if name in PROMPT_TEMPLATES:
        return PROMPT_TEMPLATES[name]
    if not Path(name).is_file():
        raise UserError(f"--prompt_template {name}: neither {' nor '.join(PROMPT_TEMPLATES)} nor a file")
    template = Path(name).read_text()
    if "{question}" not in template:
        raise UserError(f"--prompt_template {name}: the file does not contain {{question}}")
    return template


def encode_prompt(tokenizer, template, question):
    """One user message in the tokenizer's chat template -> token ids, ready for generation."""
    message = {"role": "user", "content": template.replace("{question}", question)}
    return tokenizer.apply_chat_template([message], add_generation_prompt=True, return_dict=False)


# ---------------------------------------------------------------------------------------------
# The answer that a text states

# Calls and interpreter blocks; if unclosed, to the end.
BLOCKS = re.compile("|".join(f"{re.escape(tag)}.*?(?:{re.escape(CLOSING[tag])}|\\Z)"
                             for tag in CLOSING if tag != ANSWER_OPEN), re.DOTALL)


def boxed(text):
    r"""The content of the last complete \boxed{...}, nested braces included, or None."""
    opened, last = [], (-1, None)  # one pass: many \boxed{ must not stall the reward
    for match in re.finditer(r"\\boxed\s*\{|[{}]", text):
        if match[0] != "}":
            opened.append(match)
        elif opened:
            box = opened.pop()
            if len(box[0]) > 1 and box.end() > last[0]:
                last = box.end(), text[box.end():match.start()].strip()
    return last[1]


def extract_answer(response):
    r"""The last \boxed{} outside a text's blocks, or None. (Of rollouts: eval.stated_answer.)"""
    return boxed(BLOCKS.sub("\n", response))


# ---------------------------------------------------------------------------------------------
# Loading problems

# (question, answer, solution) as dotted paths; the first whose fields are all there wins.
LAYOUTS = [
    ("problem", "answer", "solution"),  # NuminaMath-1.5
    ("problem", "ground_truth_solution", "deepseek_solution"),  # OpenThoughts with metadata
    ("problem", "solution", "solution"),  # MATH, NuminaMath-CoT
    ("problem", "answer", ""),  # AIME collections
    ("question", "answer", "response"),  # traces of `curate`
    ("question", "response", "response"),
    ("question", "answer", "answer"),  # GSM8K, or a plain answer
    ("input", "output", ""),  # the authors' AIME files
    ("prompt.0.content", "reward_model.ground_truth", ""),  # DAPO-Math-17k
    ("prompt", "reward_model.ground_truth", ""),  # its processed form
    ("messages.0.content", "answer", "messages.1.content"),  # what `sft.py curate` writes
    ("messages.0.content", "messages.1.content", "messages.1.content"),  # the authors' released traces
    ("conversations.0.value", "conversations.1.value", "conversations.1.value"),  # OpenThoughts
]
# What these sets put around the question; it would contradict our own format.
PROMPT_HEAD = re.compile(r"\A(?:.*?\*user question:\*\s*(?:Answer the following [^\n]*\\boxed\{answer\}\s*)?"
                         r"|Solve the following math problem step by step\. The last line [^\n]*\n+"
                         r"|Return your final response within \\boxed\{\}\.\s*)", re.DOTALL)
PROMPT_TAIL = re.compile(r'\s{0,9}Remember to (?:put your answer on its own line after "Answer:"'
                         r"|place the final answer in the last part using the format).*\Z", re.DOTALL)


def dig(row, path):
    """The value at a dotted path such as prompt.0.content, or None."""
    for key in path.split("."):
        if isinstance(row, list) and key.isdigit() and int(key) < len(row):
            row = row[int(key)]
        else:
            row = row.get(key) if isinstance(row, dict) else None
    return row


def marked_answer(text):
    r"""A solution's final answer: the text after #### or the last \boxed{}; or None."""
    if "####" in text and "<answer>" not in text:
        return text.rsplit("####", 1)[1].strip()
    return extract_answer(text)


def read_row(row, layouts=LAYOUTS):
    """{"question", "answer", "solution", "own"} of a row in a known layout, or None. "own": the
    solution's answer, None if missing; "solution": "" if missing."""
    for layout in layouts:
        at_question, at_answer, at_solution = layout
        question, answer, solution = (dig(row, path) for path in layout)
        if not (isinstance(question, str) and isinstance(answer, (str, int, float))
                and (isinstance(solution, str) or not at_solution)):
            continue
        if "." in at_question:
            question = PROMPT_TAIL.sub("", PROMPT_HEAD.sub("", question, count=1))
        answer, solution = str(answer).strip(), solution or ""
        marked = marked_answer(answer)
        if at_answer == at_solution == "answer" and marked is None:
            solution = ""  # a bare answer
        elif marked is not None or at_answer == at_solution:
            answer = marked
        own = marked_answer(solution)
        if "<answer>" not in solution:  # not a trace
            solution = re.sub(r"<\|(?:begin|end)_of_\w+\|>", "", solution.rsplit("####", 1)[0])
        return {"question": question.strip(), "answer": answer, "solution": solution.strip(), "own": own}
    return None


def read_jsonl(path):
    with open(path, "rb") as lines:
        for number, line in enumerate(lines, 1):
            try:
                if line.strip():
                    yield f"{path}:{number}", json.loads(line)
            except ValueError as error:  # JSONDecodeError, UnicodeDecodeError
                raise UserError(f"{path}:{number}: not JSON ({error}); needed is JSONL, one row per "
                                "line") from None


def read_rows(source, split="train", config=None):
    """Yields (place, row) of a JSONL or parquet file, or of a streamed hub id."""
    is_file, ending = Path(source).is_file(), Path(source).suffix
    if not is_file and (ending in (".jsonl", ".parquet") or str(source).count("/") != 1):
        raise UserError(f"{source}: no such file, and not a hub id (OWNER/NAME)")
    if is_file and ending != ".parquet":
        yield from read_jsonl(source)
        return
    try:
        import datasets
        if not is_file:
            need_hub()
        where = dict(path="parquet", data_files=str(source)) if is_file else dict(path=source, name=config)
        rows = datasets.load_dataset(**where, split=split, streaming=True)
        for number, row in enumerate(rows, 1):
            yield f"{source}:{number}", row
    except ImportError:
        raise UserError(f"{source}: needs the package datasets (pip install datasets)") from None
    except (OSError, ValueError) as error:  # unreachable, gated, damaged, ...
        raise UserError(f"{source}: cannot be read ({first_line(error)})") from None


def load_problems(source):
    """A file or hub id -> [{"question", "answer", "family"}]."""
    problems = []
    for place, row in read_rows(source):
        found = read_row(row)
        if not found or not found["question"] or not found["answer"]:
            raise UserError(f"{place}: needs question + answer, input + output, or problem + solution (with "
                            f"a \\boxed answer); found {field_names(row)}")
        problems.append({"question": found["question"], "answer": found["answer"],
                         "family": Path(source).stem})
    if not problems:
        raise UserError(f"{source}: no rows")
    return problems


def field_names(row):
    return ", ".join(row) if isinstance(row, dict) else type(row).__name__


# ---------------------------------------------------------------------------------------------
# The embedded problems. A family is a function of draw(low, high). Its docstring holds the
# phrasings, one a line; {0}, {1}, ... are the operands. It returns
#   operands   what makes the problem that problem
#   by_hand    the solution as a person would write it, without the answer line
#   by_code    a script that prints the answer; or prose and tool_call(snippet, what it should
#              print), the latter left out where the natural script may fail
#   answer     an integer or a word


def tool_call(code, output=""):
    snippet = f"{CODE_OPEN}\n```python\n{code}\n```\n{CODE_CLOSE}\n"
    return f"{snippet}{INTERPRETER_OPEN}\n{output}\n{INTERPRETER_CLOSE}\n"


def euclid(a, b):
    lines = []
    while b:
        lines.append(f"{a} = {a // b}*{b} + {a % b}")
        a, b = b, a % b
    return "\n".join(lines), a


def square_and_multiply(a, b, m):
    power, exponent, result, lines = a % m, 1, 1, []
    while exponent <= b:
        lines.append(f"{exponent}: {power}")
        if b & exponent:
            product = result * power
            lines[-1] += f", {result}*{power} = {product} = {product % m}"
            result = product % m
        power, exponent = power * power % m, exponent * 2
    return "\n".join(lines), result


def addition(draw):
    """What is {0} + {1}?
    Ann has {0} coins and Ben has {1}. How many do they have together?
    A shelf holds {0} books and {1} more arrive. How many books are there now?"""
    a, b = draw(10, 499), draw(10, 499)
    return (a, b), f"{a} + {b} = {a + b}.", f"print({a}+{b})", a + b


def larger(draw):
    """Which is larger, {0} or {1}?
    Of the numbers {0} and {1}, give the greater one.
    Two towns have {0} and {1} inhabitants. How many live in the larger town?"""
    a, b = draw(10, 49999), draw(10, 49999)
    return (a, b), f"The larger one is {max(a, b)}.", f"print(max({a},{b}))", max(a, b)


def last_digit(draw):
    """What is the last digit of {0}?
    Give the units digit of {0}.
    Which digit does {0} end in?"""
    n = draw(100, 2999999)
    return (n,), f"It ends in {n % 10}.", f"print({n}%10)", n % 10


def power_remainder(draw):
    """Find the remainder when {0}^{1} is divided by {2}.
    What is {0} to the power {1} modulo {2}?
    Divide {0}^{1} by {2}. What remains?"""
    a, b, m = draw(3, 999), draw(3, 15), draw(11, 999)
    steps, answer = square_and_multiply(a, b, m)
    return (a, b, m), f"Square repeatedly modulo {m}.\n{steps}", f"print(pow({a},{b},{m}))", answer


def count_pairs(draw):
    """How many pairs (x, y) of integers from 1 to {0} have a sum divisible by {1}?
    Count the pairs (x, y) with 1 <= x, y <= {0} whose sum is a multiple of {1}.
    Two dice have {0} sides each, numbered from 1. For how many rolls is the sum divisible by {1}?"""
    n, m = draw(100, 999), draw(3, 5)
    if draw(0, 9) == 0:
        n = draw(6000, 9999)  # the natural loop takes a second
    counts = [(n - r) // m + (r > 0) for r in range(m)]
    answer = sum(counts[r] * counts[-r] for r in range(m))
    found = ", ".join(f"{count} times {r}" for r, count in enumerate(counts))
    products = " + ".join(f"{counts[r]}*{counts[-r]}" for r in range(m))
    text = f"Remainders modulo {m} of the numbers up to {n}: {found}\n{products} = {answer}"
    code = tool_call(f"r=range(1,{n}+1)\nprint(sum((x+y)%{m}==0 for x in r for y in r))")
    if n > 1200:
        code += "Too slow. Count the remainders.\n" + tool_call(
            f"n,m={n},{m}\nc=[(n-r)//m+(r>0) for r in range(m)]\n"
            "print(sum(c[r]*c[-r] for r in range(m)))", answer)
    return (n, m), text, code, answer


def common_divisor(draw):
    """Find the greatest common divisor of {0} and {1}.
    What is gcd({0}, {1})?
    Two ropes of {0} cm and {1} cm are cut into equal pieces as long as possible. How long is a piece in cm?
    """
    g = draw(2, 40)
    a, b = sorted((g * draw(5, 99), g * draw(5, 99)))
    steps, answer = euclid(b, a)
    return (a, b), f"By Euclid:\n{steps}", f"from math import gcd\nprint(gcd({a},{b}))", answer


def common_multiple(draw):
    """Find the least common multiple of {0} and {1}.
    What is lcm({0}, {1})?
    Two lights flash every {0} and every {1} seconds. After how many seconds do they flash together again?"""
    a, b = sorted((draw(12, 250), draw(12, 250)))
    steps, g = euclid(b, a)
    answer = a * b // g
    text = f"By Euclid:\n{steps}\nThe gcd is {g}, so {a}*{b}/{g} = {a * b}/{g} = {answer}"
    return (a, b), text, f"from math import lcm\nprint(lcm({a},{b}))", answer


def digit_sum(draw, sign="*"):
    """What is the digit sum of {0} * {1}?
    Multiply {0} by {1} and add up the digits of the result.
    Find the sum of the digits of the product of {0} and {1}."""
    a, b = sorted((draw(101, 9999), draw(101, 9999)))
    digits = str(a * b if sign == "*" else a + b)
    answer = sum(map(int, digits))
    text = f"{a}{sign}{b} = {digits}\n{'+'.join(digits)} = {answer}"
    return (a, b), text, f"print(sum(map(int,str({a}{sign}{b}))))", answer


def divisor_count(draw):
    """How many positive divisors does {0} have?
    Count the divisors of {0}.
    In how many rows of equal length can {0} soldiers be arranged? Count every number of rows."""
    n = draw(100, 9999)
    factors = sympy.factorint(n)
    product = "*".join(f"{p}^{e}" if e > 1 else f"{p}" for p, e in factors.items())
    answer = math.prod(e + 1 for e in factors.values())
    text = f"{n} = {product}\nAdd one to each exponent and multiply: {answer}"
    return (n,), text, f"n={n}\nprint(sum(n%d==0 for d in range(1,n+1)))", answer


def prime_count(draw):
    """How many primes are there from {0} to {1}?
    Count the prime numbers between {0} and {1} inclusive.
    How many of the integers {0}, ..., {1} are prime?"""
    a = draw(10, 900)
    b = a + draw(10, 60)
    primes = list(sympy.primerange(a, b + 1))
    listed = ", ".join(map(str, primes))
    text = f"The primes are {listed}.\nThat makes {len(primes)}." if primes else "There are none."
    return (a, b), text, f"from sympy import primerange\nprint(len(list(primerange({a},{b}+1))))", len(primes)


def power_sum(draw):
    """Compute the sum of n^{2} for n from {0} to {1}.
    What is {0}^{2} + ... + {1}^{2}, over all integers between?
    Add the powers n^{2} of all integers n with {0} <= n <= {1}."""
    a, k = draw(2, 99), 2 + draw(0, 9) % 2
    b = a + draw(5, 200)
    text, totals = "", [sum(n**k for n in range(end + 1)) for end in (b, a - 1)]
    for n, total in zip((b, a - 1), totals):
        formula = f"{n}*{n + 1}*{2 * n + 1}/6" if k == 2 else f"({n}*{n + 1}/2)^2"
        text += f"Up to {n}: {formula} = {total}\n"
    answer = totals[0] - totals[1]
    text += f"{totals[0]} - {totals[1]} = {answer}"
    return (a, b, k), text, f"print(sum(n**{k} for n in range({a},{b}+1)))", answer


def recurrence(draw):
    """A sequence has u({0}) = {1} and u(n) = u(n-1) + n. Find u({2}).
    Let u({0}) = {1} and let u(n) exceed u(n-1) by n. What is u({2})?
    Start with u({0}) = {1}; step n adds n to the value before. Give u({2})."""
    a, first, steps = draw(2, 499), draw(10, 999), draw(20, 900)
    if draw(0, 9) % 3 == 0:
        steps = draw(1100, 1900)  # beyond Python's recursion limit
    n = first + steps
    added = steps * (first + 1 + n) // 2
    answer = a + added
    text = f"{first + 1} + ... + {n} = {steps}*{first + 1 + n}/2 = {added}\n{a} + {added} = {answer}"
    # Operands in the order of the question: swapped, copying them was learnt last of all.
    code = tool_call(f"def u(n):\n    return u(n-1)+n if n>{first} else {a}\nprint(u({n}))")
    if steps > 1000:
        code += "Too deep. Use a loop.\n" + tool_call(
            f"n,u={first},{a}\nwhile n<{n}:\n    n+=1\n    u+=n\nprint(u)", answer)
    return (first, a, n), text, code, answer


def inverse(draw):
    """Find the inverse of {0} modulo {1}, or 0 if there is none.
    Which x with 0 < x < {1} satisfies {0}*x = 1 modulo {1}? Answer 0 if no such x exists.
    Give the multiplicative inverse of {0} mod {1} (0 if it does not exist)."""
    m, a = draw(20, 999), draw(3, 999)
    if draw(0, 1):  # about half have no inverse
        g = 2 + a % 5
        m, a = m - m % g + g, a - a % g + g
    # Extended Euclid: every remainder r is x*a modulo m.
    lines, r, x = [], (m, a % m), (0, 1)
    while r[1]:
        q = r[0] // r[1]
        lines.append(f"{r[0]} = {q}*{r[1]} + {r[0] % r[1]}, x = {x[0] - q * x[1]}")
        r, x = (r[1], r[0] % r[1]), (x[1], x[0] - q * x[1])
    text, code = "By Euclid:\n" + "\n".join(lines), tool_call(f"print(pow({a},-1,{m}))")
    if r[0] > 1:
        return (a, m), f"{text}\nThe gcd is {r[0]}, so there is none.", f"{code}There is no inverse.\n", 0
    return (a, m), f"{text}\nThe gcd is 1, so the inverse is {x[0]}, that is {x[0] % m}.", code, x[0] % m


def digit_count(draw):
    """How many digits does {0}^{1} have?
    Find the number of decimal digits of {0} to the power {1}.
    If {0}^{1} is written out, how many digits does it take?"""
    a, b = draw(3, 999), draw(20, 399)
    answer = len(str(a**b))
    log = math.log10(a)
    text = f"log10({a}) = {log:.4f}\n{b}*{log:.4f} = {b * log:.2f}, so {answer} digits"
    code = tool_call(f"from math import pow,log10\nprint(int(log10(pow({a},{b})))+1)")
    if b * log > 308:
        code += "A float is too small. Use an integer.\n" + tool_call(f"print(len(str({a}**{b})))", answer)
    return (a, b), text, code, answer


def divisor_then_power(draw):
    """Let g be the greatest common divisor of {0} and {1}. Find the remainder of g^{2} divided by {3}.
    Take g = gcd({0}, {1}). What is g^{2} modulo {3}?
    The numbers {0} and {1} have greatest common divisor g. Divide g^{2} by {3}. What remains?"""
    g = draw(2, 40)
    a, b, k, m = g * draw(5, 60), g * draw(5, 60), draw(3, 15), draw(11, 4999)
    steps, g = euclid(a, b)
    more, answer = square_and_multiply(g, k, m)
    code = (tool_call(f"from math import gcd\nprint(gcd({a},{b}))", g) + "Now the power.\n"
            + tool_call(f"print(pow({g},{k},{m}))", answer))
    return (a, b, k, m), f"By Euclid:\n{steps}\nModulo {m}:\n{more}", code, answer


def prime_then_power(draw):
    """Let p be the smallest prime greater than {0}. Find the remainder of p^{1} divided by {2}.
    Take the first prime p after {0}. What is p^{1} modulo {2}?
    p is the next prime after {0}. Divide p^{1} by {2}. What remains?"""
    n, k, m = draw(20, 4999), draw(3, 15), draw(11, 4999)
    p = sympy.nextprime(n)
    steps, answer = square_and_multiply(p, k, m)
    code = (tool_call(f"from sympy import nextprime\nprint(nextprime({n}))", p) + "Now the power.\n"
            + tool_call(f"print(pow({p},{k},{m}))", answer))
    return (n, k, m), f"The prime is {p}. Modulo {m}:\n{steps}", code, answer


def product_remainder(draw):
    """Find the remainder when {0} * {1} is divided by {2}.
    What is {0} times {1} modulo {2}?
    Multiply {0} by {1} and divide by {2}. What remains?"""
    a, b, m = draw(20, 999), draw(20, 999), draw(11, 99)
    answer = a * b % m
    return (a, b, m), f"{a}*{b} = {a * b} = {a * b // m}*{m} + {answer}", f"print({a}*{b}%{m})", answer


def sum_of_digit_sums(draw):
    """What is the digit sum of {0} + {1}?
    Add {0} and {1} and add up the digits of the result.
    Find the sum of the digits of the sum of {0} and {1}."""
    return digit_sum(draw, "+")


TRIVIAL = [addition, larger, last_digit]  # no tool is needed
FAMILIES = [addition, larger, last_digit, power_remainder, count_pairs, common_divisor, common_multiple,
            digit_sum, divisor_count, prime_count, power_sum, recurrence, inverse, digit_count,
            divisor_then_power, prime_then_power]
HELD_OUT_FAMILIES = [product_remainder, sum_of_digit_sums]  # never trained on
SPLITS = ("train", "test", "ood_large", "ood_families")


# by_hand: D_init; by_code: not yet verified
Problem = namedtuple("Problem", "family operands question answer by_hand by_code")


def embedded_problem(split, seed, index):
    """Problem number `index` of an endless split. A hash of (family, operands) keeps train and test
    disjoint; ood_large draws operands above the training range, ood_families other families."""
    # not hash(): for strings it differs from process to process
    rng = random.Random(zlib.crc32(f"{split}/{seed}/{index}".encode()))

    def draw(low, high):
        if split == "ood_large" and high > 9:
            return rng.randint(high + 1, 3 * high)  # numbers up to 9 are choices, not operands
        if high >= 100:  # every length equally often, not nearly always the longest
            digits = rng.randint(len(str(low)), len(str(high)))
            low, high = max(low, 10**(digits - 1)), min(high, 10**digits - 1)
        return rng.randint(low, high)

    while True:
        family = rng.choice(HELD_OUT_FAMILIES if split == "ood_families" else FAMILIES)
        operands, by_hand, by_code, answer = family(draw)
        # sorted: 3 + 5 and 5 + 3 are one problem
        is_test = zlib.crc32(f"{family.__name__}{sorted(operands)}".encode()) % 10 == 0
        if split in ("train", "test") and is_test != (split == "test"):
            continue
        if CODE_OPEN not in by_code:
            by_code = tool_call(by_code, answer)
        final = f"<answer>\\boxed{{{answer}}}</answer>"
        question = rng.choice(family.__doc__.strip().splitlines()).strip().format(*operands)
        return Problem(family.__name__, operands, question, str(answer), f"{by_hand}\n{final}",
                       f"Let me compute this.\n{by_code}{final}")


def embedded_rows(split, n, seed=0):
    """The first n problems of a split, as `load_problems` returns them."""
    return [{"question": p.question, "answer": p.answer, "family": p.family}
            for p in (embedded_problem(split, seed, i) for i in range(n))]


# Failures as the sandbox prints them, for the tokenizer: else a traceback takes 200 tokens.
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
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}")


@functools.cache  # takes seconds
def embedded_tokenizer(vocabulary=896, documents=3000):
    """A byte-level BPE tokenizer, trained on the embedded problems. Tags are ordinary text, as for
    the big tokenizers. Digits in pairs would halve the steps after which operands are copied right
    (measured), but of a qwen2 checkpoint transformers loads Qwen's splitting, one by one."""
    tokenizer = Tokenizer(models.BPE())
    pattern = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
               r"|\s*[\r\n]+|\s+(?!\S)|\s+")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(pattern), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    problems = [embedded_problem("train", 0, i) for i in range(documents)]
    texts = [text for p in problems for text in (p.question, p.by_hand, p.by_code)]
    texts += ["user\n", "assistant\n"] * documents + [ERRORS] * (documents // 10)
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        show_progress=False, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>",
                                   pad_token="<|endoftext|>", additional_special_tokens=["<|im_start|>"],
                                   chat_template=CHAT_TEMPLATE)


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--file", default="", help="file or hub id of problems to load; empty: the embedded problems")
    add("--n", type=int, default=2, help="problems to print")
    add("--seed", type=int, default=0, help="of the embedded problems")
    args = parser.parse_args()
    problems = load_problems(args.file) if args.file else [
        embedded_problem("train", args.seed, index)._asdict() for index in range(args.n)]
    print(f"{len(problems)} problems\n")
    for problem in problems[:args.n]:
        print("".join(f"{name}: {value}\n" for name, value in problem.items()))


if __name__ == "__main__":
    try:
        main()
    except (UserError, OSError) as problem:
        sys.exit(f"error: {problem}")
