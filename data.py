"""Problems, prompts, answers, rewards, and the cold-start traces that teach the format.

The embedded default needs no download: an endless, seeded generator of number problems (`embedded_problem`),
a small byte-level BPE tokenizer trained on them (`embedded_tokenizer`), and for each problem a solution as a
person would write it by hand (the paper's D_init) and a code-augmented rewriting of it. `verify` takes
rewritings, whoever wrote them, through the paper's two checks, and through two the paper lacks:

    1. format verification   tags balanced and ordered, snippets parse, exactly one final answer
    2. execution             every snippet runs in the sandbox; the interpreter text is what really came back,
                             and a quoted result that differs from it rejects the trace (the paper lets an LLM
                             invent these outputs)
    3. answer verification   the final answer equals the reference
    4. quality               (real data) snippets compute what they print, and the text uses it

A snippet that failed stays in its trace, because the text after it corrects it, but the trace says so
(`failed_calls`), and SFT masks it: the model learns to recover from errors, not to make them.

`data.py curate` does the same for real data: it reads solutions, filters them, has them rewritten (by rule
from calculator annotations, by a checkpoint, or by an endpoint), verifies, and removes duplicates and what
occurs in evaluation sets. The final answer must stand in the trace before the answer line; that a snippet
has printed it is asked for only with --answer_from_code, for a last step without a calculation is no fault.

    python data.py                   # sample problems and traces, counts of each stage and rejection
    python data.py --file FILE       # loads a file of problems (or a hub id), prints how it was understood
    python data.py curate --input gsm8k_train.jsonl --decontaminate gsm8k_test.jsonl --output traces.jsonl
    python data.py curate --input traces.jsonl --output again.jsonl     # verifies finished traces once more
    python data.py show traces.jsonl
"""
import argparse
import ast
import asyncio
import functools
import hashlib
import inspect
import itertools
import json
import math
import os
import random
import re
import select
import subprocess
import sys
import threading
import time
import zlib
from collections import Counter
from dataclasses import dataclass, replace
from decimal import Decimal
from fractions import Fraction
from pathlib import Path

import sympy
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from rollout import (CODE_CLOSE, CODE_OPEN, INTERPRETER_CLOSE, INTERPRETER_OPEN, TAG, break_tags,
                     generate, split_segments, strip_fence)
from sandbox import Sandbox


class UserError(Exception):
    """Bad input: scripts print its one line and exit with a non-zero status."""


# ------------------------------------------------------------------------------------------------------------
# Prompt

# What a model that has never seen the format needs to be told; `--prompt_template retool`.
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
    """"plain" (the question alone: a warm-started model knows the format), "retool", or a file containing
    {question}."""
    if name in PROMPT_TEMPLATES:
        return PROMPT_TEMPLATES[name]
    if not Path(name).is_file():
        raise UserError(f"--prompt_template {name}: neither {' nor '.join(PROMPT_TEMPLATES)} nor a file")
    template = Path(name).read_text()
    if "{question}" not in template:
        raise UserError(f"--prompt_template {name}: the file does not contain {{question}}")
    return template


def encode_prompt(tokenizer, template, question):
    """One user message through the tokenizer's chat template -> token ids, ready for generation."""
    message = {"role": "user", "content": template.replace("{question}", question)}
    return tokenizer.apply_chat_template([message], add_generation_prompt=True, return_dict=False)


# ------------------------------------------------------------------------------------------------------------
# Answers and rewards

BLOCKS = re.compile(r"<(code|interpreter)>.*?(?:</\1>|\Z)", re.DOTALL)  # an unclosed block reaches to the end


def boxed(text):
    r"""The content of the last complete \boxed{...} of the text, nested braces included, or None."""
    opened, last = [], (-1, None)  # one pass: 5,000 times \boxed{ must not stall the reward
    for match in re.finditer(r"\\boxed\s*\{|[{}]", text):
        if match[0] != "}":
            opened.append(match)
        elif opened:
            box = opened.pop()
            if len(box[0]) > 1 and box.end() > last[0]:
                last = box.end(), text[box.end():match.start()].strip()
    return last[1]


def extract_answer(response):
    r"""The last \boxed{} outside code and interpreter blocks of a response given as text, or None.

    For files. Rewards use `outcome_reward`, which knows which tokens the policy sampled itself.
    """
    return boxed(BLOCKS.sub("\n", response))


# A final answer is brought to one spelling (`tidy`), read as what it is (`read`: a number, a tuple, a set...)
# and like is compared with like (`same`). math-verify judges only the expressions inside: left to itself it
# takes (1,2) for {1,2}, 10 cm for 10 m, x for X, 3.14159265 for \pi, 101_2 for 101_3 and "3 4" for 7.
SYMBOLS = {ord('"'): None} | {ord(pair[0]): pair[1:] + " " for pair in (
    r"−- –- ×\cdot ·\cdot *\cdot ÷/ π\pi √\sqrt ∞\infty ≤\le ≥\ge ≠\ne ∪\cup ∈\in ±\pm ²^2 ³^3 "
    r"°^\circ ∅\emptyset €\text{euro} £\text{pound}").split()}
# What a run of letters stands for, and which commands mean another.
NAMES = {name: f"\\{name} " for name in "pi sqrt sin cos tan log ln exp alpha beta theta or".split()} | {
    "and": ",", "percent": '"%"', "infinity": r"\infty ", "inf": r"\infty ", "oo": r"\infty "}
COMMANDS = dict(pair.split(":") for pair in (
    r"\left: \right: \big: \Big: \bigl: \bigr: \displaystyle: \quad: \qquad: \leq:\le \leqslant:\le \geq:\ge "
    r"\geqslant:\ge \neq:\ne \lt:< \gt:> \times:\cdot \dfrac:\frac \tfrac:\frac \cfrac:\frac \dbinom:\binom "
    r"\lvert:| \rvert:| \vert:| \lbrace:\{ \rbrace:\} \varnothing:\emptyset \degree:^\circ").split())
# Units with several names, and short words that are no product of letters.
UNITS = {name: names.split()[0] for names in (
    "cm centimeter centimetre,mm millimeter millimetre,km kilometer kilometre,m meter metre,mg,ml,"
    "kg kilogram,g gram,ft foot feet,in inch inche,mi mile,lb pound,hr hour h,"
    "min minute,s sec second,^2 square sq,^3 cubic cu,/ per,degree deg,th,st,nd,rd,am,pm,no"
).split(",") for name in names.split()
} | {"mph": "/ hr mi", "unit": ""}
# Words after a number that are no unit: they change it or take it back.
NO_UNIT = set("ten hundred thousand million mil billion trillion lakh crore dozen squared cubed factorial half "
              "halve third quarter fourth fifth sixth seventh eighth ninth tenth hundredth thousandth millionth "
              "is are no not nope wrong incorrect false negative zero below more less least most of mod modulo "
              "remainder choose plus minus times".split())


def word(match):
    """A run of letters or a command -> its one spelling, a "word" (in quotes from here on), or a product of
    letters."""
    text, low = match[0], match[0].lower()
    if text[0] in '"\\' or len(text) == 1:
        return COMMANDS.get(text, text)
    glued = match.string[:match.start()][-1:].isdigit()  # 4abc is no word, 4 abc is
    is_word = low in UNITS or (len(text) > 2 and not glued and set(low) & set("aeiou"))
    return NAMES.get(low) or (f'"{text}"' if is_word else text)


def unwrap(match):
    r"""The content of \text{} and the like, as words."""
    return " " + re.sub("[A-Za-z]{2,}|[a-z](?=/)|(?<=/)[a-z]",
                        lambda run: NAMES.get(run[0].lower(), f'"{run[0]}"'), match[1]) + " "


BRACED = r"\{(?:[^{}]|\{[^{}]*\})*\}"
REWRITES = [(re.compile(pattern), new) for pattern, new in (
    (r"\\(?:text|mathrm|mbox)\{\s*([mghs])\s*\}(?=\s*(?:$|\^|/))", r'"\1"'),
    (r"\\(?:text|mbox|math|operatorname\*?|boldsymbol)(?:rm|bf|it|sf|tt|normal)?\s*\{([^{}]*)\}", unwrap),
    (r"\\[,;:! ]|~|\s+", " "), (r"(?<=\d )[mghs](?=$|\^|/)", r'"\g<0>"'), (r'(?<!")\\?%', '"%"'),
    (r"\\\$", '"dollar"'), (r'"(dollar|euro|pound)" *(\d[\d,.]*)', r'\2 "\1"'), (r"\\cdot \\cdot ", "^"),
    (r"<=", r"\\le "), (r">=", r"\\ge "), (r'"[^"]*"|\\?[A-Za-z]+', word),
    (r"\^\s*\{?\s*\\circ\s*\}?", '"degree"'), (r"\\\{ *\\\}", r"\\emptyset"),
    (r"\\(?:mathbb\{R\}|R(?![A-Za-z]))", r"(-\\infty,\\infty)"),
    (r"\{([^{}]*)\\over(?![A-Za-z])([^{}]*)\}", r"\\frac{\1}{\2}"),
    (r"\{([^{}]*)\\choose([^{}]*)\}", r"\\binom{\1}{\2}"),
    # arguments get their braces, other braces become parentheses
    (r"\s*([\^_])\s*(-?\d+|[A-Za-z])", r"\1{\2}"), (r"\^\s*\(([^()]*)\)", r"^{\1}"),
    (r"\\sqrt\s*(\[[^][]*\])?\s*([\dA-Za-z])", r"\\sqrt\1{\2}"), (r"\\sqrt\s*\(([^()]*)\)", r"\\sqrt{\1}"),
    (r"\\(frac|binom)\s*([\dA-Za-z])\s*", r"\\\1{\2}"),
    (rf"\\(frac|binom)\s*({BRACED})\s*([\dA-Za-z])", r"\\\1\2{\3}"),
    (r"\{(\{[^{}]*\})\}", r"\1"), (r"(?<![A-Za-z}\]^_\\ ])\{([^{},]*)\}", r"(\1)"),
    # spaces only between letters or digits, and no plus that means nothing
    (r" +", " "), (r"(?<![\dA-Za-z\"]) | (?![\dA-Za-z\"])", ""), (r"(?<![^(\[{,=])\+", ""))]
THOUSANDS = re.compile(r"(?<![\d.,])[1-9]\d{0,2}(?:,\d{3})+(?!\d|,\d)")
MATRIX = re.compile(r"(?:(?:\\left)?[(\[])?\s*\\begin\{([pbB]?matrix|array)\}(?:\{[clr| ]*\})?(.*?)"
                    r"\\end\{\1\}\s*(?:(?:\\right)?[)\]])?", re.DOTALL)
DECIMAL = r"(?:\d{1,3000}(?:\.\d{0,3000})?|\.\d{1,3000})"
NUMBER = re.compile(rf"([+-]?) ?(?:(\d{{1,9}}) (?=\d+/\d))?((?:(?<= )-)?{DECIMAL})(?:/(-?{DECIMAL}))?"
                    rf"(?:(?:\\cdot *10\^|[eE](?=[-+\d]))\{{?([+-]?\d{{1,3}})\}}?)?")
UNIT = re.compile(r'(.*?[^" ]) *((?:[ /]*"[^"]*"(?:\^\{-?\d\})?)+)')
LABEL = re.compile(
    r'((?:[A-Z]+|[a-z]|\\[a-z]+ ?[A-Z]*)(?:_\{\w+\})?(?:\^\{-1\})?\'*(?:\([\w,"]*\))?|(?:"[^"]*" ?)+'
    r'|\((?:[a-z],)+[a-z]\))(?:=|\\in(?![a-z]) *)(?=[^=])')
RELATION = r"[<>=]|\\(?:le|ge|ne)(?![A-Za-z])"
# Not for the judge: 101_2, "3 4" and (2)3, which it adds, derivatives, powers of powers of numbers
MISREAD = re.compile(r"'|\\not(?![a-z])|\d_|[\d)] ?(?<=[ )])\d|\d\^\{[^{}]*\^|\^\{-?\d{4}|\d{4}!|!!|\\frac\{d\w*\}\{d\w")


def tidy(text):
    r"""One spelling for what LaTeX, Unicode and Python write in many: \frac{1}{2}, \cdot, ^{2}, "words" in
    double quotes, no math delimiters, no thousands commas, spaces only where they separate."""
    text = text.strip()
    text = boxed(text) if text == rf"\boxed{{{boxed(text)}}}" else text
    text = re.sub(r"^(?i:(?:the )?(?:final )?answer(?: is\b|:| is:))\s*|^=\s*", "", text)
    text = text[2:-2] if re.fullmatch(r"\*\*[^*]+\*\*", text) else text
    text = MATRIX.sub(lambda m: "⟦" + m[2].strip().removesuffix(r"\\").replace(r"\\", "¶") + "⟧", text)
    text = re.sub(r"\\[()\[\]]", "", text.replace("\\\\", "\\").translate(SYMBOLS))
    text = re.sub(r"\\not\s*=", r"\\ne ", text)
    text = re.sub(r"(?<=\d)(?:\\,|\{,\}(?:\\!)?|,\\!)(?=\d{3})", ",", text)
    if not re.search(r"[(\[]|\\{", text) or re.search(r",\s", text):  # (1,234) is a pair, 1, 234 a list
        text = THOUSANDS.sub(lambda match: match[0].replace(",", ""), text)
    paired = len(re.findall(r"(?<!\\)\$", text)) % 2 == 0  # $ encloses mathematics; a lone one is money
    text = re.sub(r"(?<!\\)\$", "" if paired else r"\\$", text)
    for pattern, new in REWRITES:
        text = pattern.sub(new, text)
    return text.strip().removesuffix(".")


def plain_number(text):
    r"""The exact value of a number as people write it (-1,234.5, 2/3, \frac{2}{3}, 3\frac{1}{2}, 6 \times
    10^{23}), or None."""
    text = re.sub(r" ?\\frac\{([^{}]*)\}\{([^{}]*)\}", r" \1/\2", tidy(text)).strip()
    match = NUMBER.fullmatch(text)
    if not match:
        return None
    whole, top, bottom = int(match[2] or 0), Fraction(match[3]), Fraction(match[4] or 1)
    if not bottom or (match[2] and top >= bottom):
        return None
    value = (whole + top / bottom) * Fraction(10)**int(match[5] or 0)
    return -value if match[1] == "-" else value


@dataclass
class Answer:
    kind: str  # number, expression, words, relation, list, union, row, or its brackets: "()", "[)", "{}", ...
    text: str  # as `tidy` leaves it, without label and unit
    value: Fraction = None  # of a number
    parts: list = ()  # of a list, a set, a tuple, ...
    label: str = ""  # the x of x = 5, x \in [1,2] and x > 5
    unit: str = ""


def split(text, separator):
    """The parts of a text between the matches of a regular expression that stand outside all brackets, and
    these matches; no parts if the brackets do not match."""
    parts, found, depth, start = [], [], 0, 0
    for match in re.finditer(rf"(\\\{{|[(\[{{⟦])|(\\\}}|[)\]}}⟧])|({separator})", text):
        depth += bool(match[1]) - bool(match[2])
        if depth < 0:
            return [], []
        if match[3] and depth == 0:
            parts.append(text[start:match.start()].strip())
            found.append(match[3].strip())
            start = match.end()
    return (parts + [text[start:].strip()], found) if depth == 0 else ([], [])


def read(text):
    """Tidy text -> Answer."""
    def several(kind, texts, label=""):
        return Answer(kind, text, None, [read(part) for part in texts if part], label)

    parts, _ = split(text, ";")
    if len(parts) > 1:
        return several("list", parts)
    parts, found = split(text, r",|\\or ")
    if len(parts) > 1:
        answer = several("list", parts)
        label = answer.parts[0].label if answer.parts else ""
        # x=1, x=2 and x=1,2 are values of one x
        if label and all(part.label in (label, "") for part in answer.parts):
            intervals = set(found) == {r"\or"} and all(part.kind[0] in "([" for part in answer.parts)
            return Answer("union" if intervals else "list", text, None,
                          [replace(part, label="") for part in answer.parts], label)
        return answer
    if match := LABEL.match(text):
        answer = read(text[match.end():])
        if not answer.label and answer.kind != "relation":
            return replace(answer, label=match[1].strip())
    parts, found = split(text, RELATION)
    if len(parts) > 1:
        return read_relation(text, parts, found)
    parts, _ = split(text, r"\\cup(?![A-Za-z])")
    if len(parts) > 1:
        return several("union", parts)
    if match := re.fullmatch(r"(\\\{|[(\[{⟦])(.*?)(\\\}|[)\]}⟧])", text):
        kind = match[1][-1] + match[3][-1]
        parts, _ = split(match[2], "¶" if kind == "⟦⟧" else "[,;]")
        if kind == "⟦⟧":
            return Answer(kind, text, None, [Answer("row", row, None, [read(x) for x in split(row, "&")[0]])
                                             for row in parts])
        if parts:  # one in parentheses or plain braces is only grouped
            return read(parts[0]) if len(parts) == 1 and match[1] in "({" else several(kind, parts)
    if text.count(r"\pm") == 1:
        return several("list", [re.sub(r"\\pm *", sign, text).removeprefix("+") for sign in "+-"])
    if match := UNIT.fullmatch(text):
        names = [name.lower() for name in re.findall(r"[A-Za-z%/]+|\^\{-?\d", match[2])]
        answer = read(match[1])
        changed = NO_UNIT.intersection(names + [name.removesuffix("s") for name in names])
        if answer.kind in ("number", "expression") and not answer.unit and not changed:
            names = [UNITS.get(name, UNITS.get(name.removesuffix("s"), name.removesuffix("s")))
                     for name in names]
            return replace(answer, unit=" ".join(sorted(filter(None, names))).replace("{", ""))
    value = plain_number(text)
    return Answer("number" if value is not None else "words" if '"' in text else "expression", text, value)


def read_relation(text, parts, signs):
    r"""x > 5 and 1 < x \le 3 are intervals, labelled x; what cannot be read so remains a relation."""
    if all(sign in (">", r"\ge") for sign in signs):
        parts, signs = parts[::-1], ["<" if sign == ">" else r"\le" for sign in signs[::-1]]
    if len(parts) == 2:
        x_is_first = re.fullmatch("[A-Za-z]", parts[0])
        parts = [r"-\infty", *parts] if x_is_first else [*parts, r"\infty"]
        signs = ["<", *signs] if x_is_first else [*signs, "<"]
    if (len(parts) != 3 or not set(signs) <= {"<", r"\le"} or not re.fullmatch("[A-Za-z]", parts[1]) or any(
            not end or re.search(r"(?<![\\a-z])[A-Za-z]", end) for end in parts[::2])):
        return Answer("relation", text)
    kind = ("(" if signs[0] == "<" else "[") + (")" if signs[1] == "<" else "]")
    return Answer(kind, text, None, [read(end) for end in parts[::2]], parts[1])


def same(a, b, strict, judge, depth=0):
    """Whether Answer a, predicted, is Answer b; judge(a, b) decides about two expressions."""
    def alike(x, y):
        return same(x, y, strict, judge, depth + 1)

    def pairwise(xs, ys, ordered):
        if ordered:
            return len(xs) == len(ys) and all(map(alike, xs, ys))
        if len(xs) != len(ys):  # sets, in which something may stand twice
            return all(any(alike(x, y) for y in ys) for x in xs) and all(any(alike(x, y) for x in xs) for y in ys)
        left = list(ys)
        for x in xs:
            partner = next((i for i, y in enumerate(left) if alike(x, y)), None)
            if partner is None:
                return False
            del left[partner]
        return True

    if a == b:
        return True
    if depth > 4:  # sets of sets of sets take exponential time, and are no answer
        return False
    if "relation" in (a.kind, b.kind) or (a.label and b.label and a.label != b.label):  # two equations
        fit = all(x.kind == "relation" or (x.label and x.kind in ("number", "expression")) for x in (a, b))
        # where the reference is x=5, 2x=10 has not been solved
        equations = [f"{x.label}={x.text}" if x.label else x.text for x in (a, b)]
        unknowns = all(re.search(r"(?<![\\A-Za-z])[A-Za-z]", text) for text in equations)  # 5=5 says nothing
        return fit and unknowns and b.kind != "number" and judge(*equations)
    if (a.label != b.label and (strict or depth)) or (a.unit != b.unit and (strict or (a.unit and b.unit))):
        return False
    if a.kind == b.kind == "number":
        scale = {"%": Fraction(1, 100)} if a.unit != b.unit else {}
        return a.value == b.value or a.value * scale.get(a.unit, 1) == b.value * scale.get(b.unit, 1)
    if not strict and {"list", "{}"} & {a.kind, b.kind}:
        xs, ys = (x.parts if x.kind in ("list", "{}") else [replace(x, label="", unit="")] for x in (a, b))
        return (len(xs) == len(ys) or a.kind == b.kind == "{}") and pairwise(xs, ys, ordered=False)
    if a.kind == b.kind and a.parts:
        return (len(a.parts) == len(b.parts) or a.kind == "{}") and pairwise(
            a.parts, b.parts, ordered=a.kind not in ("{}", "union"))
    if a.kind == b.kind == "words":
        return not strict and a.text.casefold() == b.text.casefold()
    # CRUCIAL: for a plain number 37*99 is no answer; the judge would do the arithmetic
    return {a.kind, b.kind} <= {"number", "expression"} and b.kind != "number" and judge(a.text, b.text)


def expression(text):
    """Tidy text for the judge, every number exact, and the operations in it that not every answer may use;
    None for what the judge would misread."""
    allowed = re.fullmatch(r"[\w\\+/^(){}\[\]|!=<>' .-]{1,400}", text, re.ASCII)
    if not allowed or MISREAD.search(text):
        return None
    used = set(re.findall(r"\\[A-Za-z]+|!", re.sub(r"\\(?:cos|tan|cot|sec|csc)", r"\\sin", text)))
    text = re.sub(r"(\d{1,9}) ?\\frac\{(\d{1,9})\}\{(\d{1,9})\}",
                  lambda m: rf"\frac{{{int(m[1]) * int(m[3]) + int(m[2])}}}{{{m[3]}}}", text)
    text = re.sub(r"(\d*)\.(\d+)", lambda m: rf"\frac{{{m[1]}{m[2]}}}{{1{'0' * len(m[2])}}}", text)
    text = re.sub(r"(?<=[\d)])(?=\()", r"\\cdot ", text)
    return text, used - {r"\frac", r"\sqrt", r"\pi", r"\cdot", r"\ln", r"\log"}


class Verifier:
    """math-verify behind a wall: its parser evaluates what it reads, `10^{10^{10}}` would hang the trainer.

    One server process with a clean environment runs `verify_server`: it imports math-verify once and forks
    for every pair; the fork has limits on CPU time and memory and is killed when its seconds are over.
    Thread-safe. RuntimeError if the server does not start, which means a broken installation.
    """

    def __init__(self):
        self.lock, self.server = threading.Lock(), None

    def start(self):
        environment = {"PATH": os.defpath, "LANG": "C.UTF-8", "PYTHONHASHSEED": "0"}
        # The function's source travels on the command line: importing this file would load torch as well.
        source = f"{inspect.getsource(verify_server)}\nverify_server()"
        self.server = subprocess.Popen([sys.executable, "-I", "-c", source], bufsize=0, env=environment,
                                       cwd="/", stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        if self.read(60.0) != "ready\n":
            raise RuntimeError("the math-verify server does not start: is math-verify installed?")

    def read(self, seconds):
        if not select.select([self.server.stdout], [], [], seconds)[0]:
            return ""
        return self.server.stdout.readline().decode()

    def stop(self):
        if self.server:
            self.server.kill()
            self.server.wait()
            self.server.stdin.close()
            self.server.stdout.close()
            self.server = None

    def __call__(self, predicted, reference, seconds):
        """(whether the two expressions are equal, how many of the seconds are left)"""
        with self.lock:
            if self.server is None or self.server.poll() is not None:
                self.stop()
                self.start()
            request, begin = json.dumps([predicted, reference, seconds]) + "\n", time.monotonic()
            try:
                self.server.stdin.write(request.encode())
                reply = self.read(seconds + 5.0)
            except BrokenPipeError:
                reply = ""
            if not reply:  # it is gone or stuck: this pair counts as different, the next gets a new server
                self.stop()
            return reply == "1\n", seconds - (time.monotonic() - begin)


def verify_server():
    """Reads [predicted, reference, seconds] as JSON lines, answers 1 or 0 for each; every pair is judged in a
    limited fork."""
    import gc, json, logging, math, os, resource, select, signal, sys  # noqa: E401  (it runs alone)
    from latex2sympy2_extended.latex2sympy2 import ConversionConfig, latex2sympy
    logging.disable()
    from math_verify import verify
    from math_verify.grader import should_treat_as_complex

    def judge(predicted, reference):
        real = not any(map(should_treat_as_complex, (predicted, reference)))
        config = ConversionConfig(lowercase_symbols=False)
        gold, target = (latex2sympy(text, is_real=real, normalization_config=None, conversion_config=config)
                        for text in (reference, predicted))
        return verify(gold, target, numeric_precision=30, timeout_seconds=None)

    # The grammar's tables and sympy's caches fill as they are used: what is in them before the fork is 10
    # times as fast after it.
    for text in (r"-\frac{3x^{2}-1}{2}+\sqrt{5}\cdot y", r"2\sqrt[3]{\frac{\pi}{4}}(a_{1}+b)(x-1)!", "x<5",
                 r"\frac{\ln{3}}{\log_{2}{x}}+\sin^{2}x-\cos(2x)|x|", r"e^{i\pi/3}+4i+\binom{n}{2}\alpha",
                 r"x+y=2z^{-1}"):
        judge(text, text.replace("2", "7"))
    gc.freeze()
    print("ready", flush=True)
    for line in sys.stdin:
        *pair, seconds = json.loads(line)
        verdict, answer = os.pipe()
        child = os.fork()
        if child == 0:
            resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))
            resource.setrlimit(resource.RLIMIT_CPU, (math.ceil(seconds), math.ceil(seconds)))
            resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
            os.dup2(os.open(os.devnull, os.O_RDWR), 2)
            try:
                os.write(answer, b"1" if judge(*pair) else b"0")
            finally:  # whatever was raised, SystemExit and MemoryError included, is "not equivalent"
                os._exit(0)
        os.close(answer)
        # readable when the child has answered or is gone
        equal = bool(select.select([verdict], [], [], seconds)[0]) and os.read(verdict, 1) == b"1"
        os.close(verdict)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        print(int(equal), flush=True)


VERIFIER = Verifier()


def is_equivalent(predicted, reference, strict=False):
    r"""Whether two final answers mean the same, at most 1 s of judging per pair.

    In both modes numbers are compared exactly (nothing is rounded: 0.333 is not 1/3, 3.14 is not \pi) and
    expressions by math-verify; the kind of brackets, the order in a tuple and the number of elements count;
    units are never converted; and what still has to be computed (37*99 for 3663, \arctan(1) for
    \frac{\pi}{4}) is wrong, because a policy that boxes the question would be rewarded for it.

    lenient: the default, for rewards, evaluation and curation, because references leave out what the question
    says. "x =", a unit or a percent sign may be missing on one side (5 cm is 5, but not 5 m; 50% is 50, and
    0.5, which it equals); a list has no order, and may be written as a set or with \pm; an interval may be
    an inequality; words have no case.
    strict: both have the same label, unit and kind, lists the same order, words the same case. What is
    equivalent strictly is so leniently.

    Never raises and never hangs, from any thread: what cannot be read, or judged in time, is not equivalent.
    """
    if predicted is None or reference is None:
        return False
    try:
        texts = [str(predicted).strip(), str(reference).strip()]
    except ValueError:  # an int of more than 4,300 digits
        return False
    if any(not text or len(text) > 4000 or len(re.findall(r"[(\[{=]", text)) > 100 for text in texts):
        return False
    seconds = 1.0

    def judge(x, y):
        nonlocal seconds
        x, y = expression(x), expression(y)
        if seconds <= 0 or not x or not y or not x[1] <= y[1]:
            return False
        verdict, seconds = VERIFIER(x[0], y[0], seconds)
        return verdict

    predicted, reference = (tidy(text) for text in texts)
    return bool(predicted and reference) and same(read(predicted), read(reference), strict, judge)


def outcome_reward(trajectory, tokenizer, reference):
    r"""+1.0 if the policy's own final answer is right, else -1.0 (equation 1's R; there is no reward for code
    that runs).

    Only sampled tokens (loss_mask 1) outside executed snippets count, and of their text only what is outside
    <code> and <interpreter>: a \boxed{} in a script, printed by one, or in an interpreter block that the
    policy wrote itself is no answer. A truncated response (anything but EOS) scores -1.
    """
    if trajectory.finish_reason != "eos":
        return -1.0
    # Not by the tags alone: the engine knows which tokens it ran as code, however oddly tags were nested.
    segments = trajectory.sampled_segments(with_code=False)
    text = "\n".join(tokenizer.decode(ids, skip_special_tokens=True) for ids in segments)
    return 1.0 if is_equivalent(extract_answer(text), reference) else -1.0


# ------------------------------------------------------------------------------------------------------------
# Loading problems


# (question, answer, solution) as dotted paths. The first whose fields are all there wins; where answer
# and solution are one field, the answer is what that marks as final (#### or \boxed).
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
    ("messages.0.content", "answer", "messages.1.content"),  # what `data.py curate` writes
    ("messages.0.content", "messages.1.content", "messages.1.content"),  # the authors' released traces
    ("conversations.0.value", "conversations.1.value", "conversations.1.value"),  # OpenThoughts
]
# What these sets put around the question in their prompts; it would contradict our own format.
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
    r"""What a solution marks as its final answer: the text after #### or the last \boxed{}; or None."""
    if "####" in text and "<answer>" not in text:
        return text.rsplit("####", 1)[1].strip()
    return extract_answer(text)


def read_row(row, layouts=LAYOUTS):
    """{"question", "answer", "solution", "own"} of a row in a known layout, or None. "answer" is the
    reference and "own" the solution's final answer, None if missing; "solution" is "" if there is none."""
    for at_question, at_answer, at_solution in layouts:
        question, answer, solution = dig(row, at_question), dig(row, at_answer), dig(row, at_solution)
        if not isinstance(answer, (str, int, float)) or not (
                isinstance(question, str) and (isinstance(solution, str) or not at_solution)):
            continue
        if "." in at_question:
            question = PROMPT_TAIL.sub("", PROMPT_HEAD.sub("", question, count=1))
        answer, solution = str(answer).strip(), solution or ""
        marked = marked_answer(answer)
        if at_answer == at_solution == "answer" and marked is None:
            solution = ""  # nothing is marked: a bare answer, not a solution
        elif marked is not None or at_answer == at_solution:
            answer = marked
        own = marked_answer(solution)
        if "<answer>" not in solution:  # a solution still to be rewritten, not a trace
            solution = re.sub(r"<\|(?:begin|end)_of_\w+\|>", "", solution.rsplit("####", 1)[0])
        return {"question": question.strip(), "answer": answer, "solution": solution.strip(), "own": own}
    return None


def read_jsonl(path):
    """Yields (line number, row) of the non-blank lines; UserError names file and line of what is not JSON."""
    if not Path(path).is_file():
        raise UserError(f"{path}: no such file")
    with open(path, "rb") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                try:
                    yield number, json.loads(line)
                except ValueError as error:  # JSONDecodeError, UnicodeDecodeError
                    raise UserError(f"{path}:{number}: not JSON ({error})") from None


def read_rows(source, split="train", config=None):
    """Yields (place, row) of a JSONL file, a parquet file, or a hub id read as a stream; UserError if that
    fails."""
    is_file, ending = Path(source).is_file(), Path(source).suffix
    if ending == ".parquet" and not is_file:
        raise UserError(f"{source}: no such file")
    if ending != ".parquet" and (is_file or ending.startswith(".json") or source.count("/") != 1):
        yield from ((f"{source}:{number}", row) for number, row in read_jsonl(source))
        return
    try:
        import datasets
        where = dict(path="parquet", data_files=source) if is_file else dict(path=source, name=config)
        rows = datasets.load_dataset(**where, split=split, streaming=True)
        for number, row in enumerate(rows, 1):
            yield f"{source}:{number}", row
    except ImportError:
        raise UserError(f"{source}: needs the package datasets (pip install datasets)") from None
    except (OSError, ValueError) as error:  # unreachable, unknown or gated; no such split; a damaged file
        raise UserError(f"{source}: cannot be read ({str(error).splitlines()[0]})") from None


def load_problems(source):
    """A file or hub id -> [{"question", "answer", "family"}]; UserError names file and line of a row without
    the needed fields."""
    problems = []
    for place, row in read_rows(str(source)):
        found = read_row(row)
        if not found or not found["question"] or not found["answer"]:
            raise UserError(f"{place}: needs question + answer, input + output, or problem + solution (with "
                            f"a \\boxed answer); found {fields(row)}")
        problems.append({"question": found["question"], "answer": found["answer"],
                         "family": Path(source).stem})
    if not problems:
        raise UserError(f"{source}: no rows")
    return problems


def fields(row):
    return ", ".join(row) if isinstance(row, dict) else type(row).__name__


def load_traces(path, least=2):
    """JSONL of verified traces, as `curate` returns them or `data.py curate` writes them; "failed_calls" may
    be absent (no snippet is masked then)."""
    traces = []
    for number, row in read_jsonl(path):
        found = read_row(row)
        if not found or not found["solution"]:
            raise UserError(f"{path}:{number}: a trace needs question and response as text, or messages")
        response = found.pop("solution")
        traces.append({"failed_calls": [], "family": Path(path).stem, "response": response} | found | row)
    if len(traces) < least:
        raise UserError(f"{path}: needs at least two traces, one is held out")
    return traces


# ------------------------------------------------------------------------------------------------------------
# The embedded problems. A family is a function of draw(low, high) that returns
#   operands   what makes the problem that problem
#   phrasings  ways to ask; {0}, {1}, ... are the operands
#   by_hand    the solution as a person would write it, without the answer line
#   by_code    the same with the computation given to Python: prose and call(snippet, what it should print);
#              call(snippet) where the outcome is left to the run, because the natural script may fail
#   answer     an integer


def call(code, output=""):
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
        if b & exponent:
            lines.append(
                f"{a}^{exponent} = {power}, {result}*{power} = {result * power} = {result * power % m}")
            result = result * power % m
        else:
            lines.append(f"{a}^{exponent} = {power}")
        power, exponent = power * power % m, exponent * 2
    return "\n".join(lines), result


def factorise(n):
    factors = sympy.factorint(n)
    return "*".join(f"{p}^{e}" if e > 1 else f"{p}"
                    for p, e in factors.items()), math.prod(e + 1 for e in factors.values())


def addition(draw):
    a, b = draw(10, 499), draw(10, 499)
    phrasings = ["What is {0} + {1}?", "Ann has {0} coins and Ben has {1}. How many do they have together?",
                 "A shelf holds {0} books and {1} more arrive. How many books are there now?"]
    return (a, b), phrasings, f"{a} + {b} = {a + b}.", call(f"print({a}+{b})", a + b), a + b


def larger(draw):
    a, b = draw(100, 9999), draw(100, 9999)
    phrasings = ["Which is larger, {0} or {1}?", "Of the numbers {0} and {1}, give the greater one.",
                 "Two towns have {0} and {1} inhabitants. How many live in the larger town?"]
    answer = max(a, b)
    return (a, b), phrasings, f"The larger one is {answer}.", call(f"print(max({a},{b}))", answer), answer


def last_digit(draw):
    n = draw(100, 99999)
    phrasings = ["What is the last digit of {0}?", "Give the units digit of {0}.",
                 "Which digit does {0} end in?"]
    return (n,), phrasings, f"It ends in {n % 10}.", call(f"print({n}%10)", n % 10), n % 10


def power_remainder(draw):
    a, b, m = draw(3, 999), draw(4, 10), draw(11, 999)
    phrasings = ["Find the remainder when {0}^{1} is divided by {2}.",
                 "What is {0} to the power {1} modulo {2}?", "Divide {0}^{1} by {2}. What remains?"]
    steps, answer = square_and_multiply(a, b, m)
    text = f"Square repeatedly modulo {m}.\n{steps}"
    return (a, b, m), phrasings, text, call(f"print(pow({a},{b},{m}))", answer), answer


def count_pairs(draw):
    n, m = draw(100, 1200), draw(3, 5)
    if draw(0, 9) == 0:
        n = draw(6000, 9999)  # the natural loop now takes a second and more
    phrasings = ["How many pairs (x, y) of integers from 1 to {0} have a sum divisible by {1}?",
                 "Count the pairs (x, y) with 1 <= x, y <= {0} whose sum is a multiple of {1}.",
                 "Two dice have {0} sides each, numbered from 1. "
                 "For how many rolls is the sum divisible by {1}?"]
    counts = [(n - r) // m + (r > 0) for r in range(m)]
    answer = sum(counts[r] * counts[-r] for r in range(m))
    found = ", ".join(f"{count} times {r}" for r, count in enumerate(counts))
    products = " + ".join(f"{counts[r]}*{counts[-r]}" for r in range(m))
    text = f"Remainders modulo {m} of the numbers up to {n}: {found}\n{products} = {answer}"
    code = call(f"r=range(1,{n}+1)\nprint(sum((x+y)%{m}==0 for x in r for y in r))")
    if n > 1200:
        code += "Too slow. Count the remainders.\n" + call(
            f"c=[({n}-r)//{m}+(r>0) for r in range({m})]\nprint(sum(c[r]*c[-r] for r in range({m})))", answer)
    return (n, m), phrasings, text, code, answer


def common_divisor(draw):
    g = draw(2, 40)
    a, b = sorted((g * draw(5, 99), g * draw(5, 99)))
    phrasings = ["Find the greatest common divisor of {0} and {1}.", "What is gcd({0}, {1})?",
                 "Two ropes of {0} cm and {1} cm are cut into equal pieces as long as possible. "
                 "How long is a piece in cm?"]
    steps, answer = euclid(b, a)
    code = call(f"from math import gcd\nprint(gcd({a},{b}))", answer)
    return (a, b), phrasings, f"By Euclid:\n{steps}", code, answer


def common_multiple(draw):
    a, b = sorted((draw(12, 250), draw(12, 250)))
    phrasings = ["Find the least common multiple of {0} and {1}.", "What is lcm({0}, {1})?",
                 "Two lights flash every {0} and every {1} seconds. "
                 "After how many seconds do they flash together again?"]
    steps, g = euclid(b, a)
    answer = a * b // g
    text = f"By Euclid:\n{steps}\nThe gcd is {g}, so {a}*{b}/{g} = {a * b}/{g} = {answer}"
    return (a, b), phrasings, text, call(f"from math import lcm\nprint(lcm({a},{b}))", answer), answer


def digit_sum(draw):
    a, b = sorted((draw(101, 9999), draw(101, 9999)))
    phrasings = ["What is the digit sum of {0} * {1}?",
                 "Multiply {0} by {1} and add up the digits of the result.",
                 "Find the sum of the digits of the product of {0} and {1}."]
    digits = str(a * b)
    answer = sum(map(int, digits))
    text = f"{a}*{b} = {digits}\n{'+'.join(digits)} = {answer}"
    return (a, b), phrasings, text, call(f"print(sum(map(int,str({a}*{b}))))", answer), answer


def divisor_count(draw):
    n = draw(50, 9999)
    phrasings = ["How many positive divisors does {0} have?", "Count the divisors of {0}.",
                 "In how many rows of equal length can {0} soldiers be arranged? Count every number of rows."]
    factors, answer = factorise(n)
    text = f"{n} = {factors}\nAdd one to each exponent and multiply: {answer}"
    return (n,), phrasings, text, call(f"n={n}\nprint(sum(n%d==0 for d in range(1,n+1)))", answer), answer


def prime_count(draw):
    a = draw(10, 900)
    b = a + draw(10, 60)
    phrasings = ["How many primes are there from {0} to {1}?",
                 "Count the prime numbers between {0} and {1} inclusive.",
                 "How many of the integers {0}, ..., {1} are prime?"]
    primes = list(sympy.primerange(a, b + 1))
    listed = ", ".join(map(str, primes))
    text = f"The primes are {listed}.\nThat makes {len(primes)}." if primes else "There are none."
    code = call(f"from sympy import primerange\nprint(len(list(primerange({a},{b}+1))))", len(primes))
    return (a, b), phrasings, text, code, len(primes)


def power_sum(draw):
    a, k = draw(2, 60), 2 + draw(0, 9) % 2
    b = a + draw(5, 200)
    phrasings = ["Compute the sum of n^{2} for n from {0} to {1}.",
                 "What is {0}^{2} + ... + {1}^{2}, over all integers between?",
                 "Add the powers n^{2} of all integers n with {0} <= n <= {1}."]
    totals, lines = [], []
    for n in (b, a - 1):
        if k == 2:
            product = n * (n + 1) * (2 * n + 1)
            totals.append(product // 6)
            lines.append(f"Up to {n}: {n}*{n + 1}*{2 * n + 1}/6 = {product}/6 = {totals[-1]}")
        else:
            root = n * (n + 1) // 2
            totals.append(root**2)
            lines.append(f"Up to {n}: ({n}*{n + 1}/2)^2 = {root}^2 = {totals[-1]}")
    answer = totals[0] - totals[1]
    text = "\n".join(lines) + f"\n{totals[0]} - {totals[1]} = {answer}"
    return (a, b, k), phrasings, text, call(f"print(sum(n**{k} for n in range({a},{b}+1)))", answer), answer


def recurrence(draw):
    a, first, steps = draw(2, 99), draw(100, 899), draw(20, 900)
    if draw(0, 9) % 3 == 0:
        steps = draw(1100, 1900)  # beyond Python's recursion limit
    n = first + steps
    phrasings = ["A sequence has u({0}) = {1} and u(n) = u(n-1) + n. Find u({2}).",
                 "Let u({0}) = {1} and let u(n) exceed u(n-1) by n. What is u({2})?",
                 "Start with u({0}) = {1}; step n adds n to the value before. Give u({2})."]
    added = steps * (first + 1 + n) // 2
    answer = a + added
    text = f"{first + 1} + ... + {n} = {steps}*{first + 1 + n}/2 = {added}\n{a} + {added} = {answer}"
    code = call(f"def u(n):\n    return {a} if n=={first} else u(n-1)+n\nprint(u({n}))")
    if steps > 1000:
        code += "Too deep. Use a loop.\n" + call(
            f"u={a}\nfor n in range({first}+1,{n}+1):\n    u+=n\nprint(u)", answer)
    return (first, a, n), phrasings, text, code, answer


def inverse(draw):
    m, a = draw(20, 999), draw(3, 999)
    if draw(0, 1):  # about half of the problems have no inverse
        g = 2 + a % 5
        m, a = m - m % g + g, a - a % g + g
    phrasings = ["Find the inverse of {0} modulo {1}, or 0 if there is none.",
                 "Which x with 0 < x < {1} satisfies {0}*x = 1 modulo {1}? Answer 0 if no such x exists.",
                 "Give the multiplicative inverse of {0} mod {1} (0 if it does not exist)."]
    # Extended Euclid: every remainder r is x*a modulo m, with x carried along.
    lines, r, x = [], (m, a % m), (0, 1)
    while r[1]:
        q = r[0] // r[1]
        lines.append(f"{r[0]} = {q}*{r[1]} + {r[0] % r[1]}, x = {x[0]} - {q}*{x[1]} = {x[0] - q * x[1]}")
        r, x = (r[1], r[0] % r[1]), (x[1], x[0] - q * x[1])
    steps = "By Euclid:\n" + "\n".join(lines)
    code = call(f"print(pow({a},-1,{m}))")
    if r[0] > 1:
        text = f"{steps}\nThe gcd is {r[0]}, so there is none."
        return (a, m), phrasings, text, code + "There is no inverse.\n", 0
    text = f"{steps}\nThe gcd is 1, so the inverse is {x[0]}, that is {x[0] % m}."
    return (a, m), phrasings, text, code, x[0] % m


def digit_count(draw):
    a, b = draw(3, 99), draw(20, 199)
    phrasings = ["How many digits does {0}^{1} have?",
                 "Find the number of decimal digits of {0} to the power {1}.",
                 "If {0}^{1} is written out, how many digits does it take?"]
    answer = len(str(a**b))
    log = math.log10(a)
    text = f"log10({a}) = {log:.4f}\n{b}*{log:.4f} = {b * log:.2f}, so {answer} digits"
    code = call(f"from math import pow,log10\nprint(int(log10(pow({a},{b})))+1)")
    if b * log > 308:
        code += "A float is too small. Use an integer.\n" + call(f"print(len(str({a}**{b})))", answer)
    return (a, b), phrasings, text, code, answer


def divisor_then_power(draw):
    g = draw(2, 40)
    a, b, k, m = g * draw(5, 60), g * draw(5, 60), draw(4, 10), draw(11, 999)
    phrasings = ["Let g be the greatest common divisor of {0} and {1}. "
                 "Find the remainder of g^{2} divided by {3}.",
                 "Take g = gcd({0}, {1}). What is g^{2} modulo {3}?",
                 "The numbers {0} and {1} have greatest common divisor g. Divide g^{2} by {3}. What remains?"]
    steps, g = euclid(a, b)
    more, answer = square_and_multiply(g, k, m)
    code = (call(f"from math import gcd\nprint(gcd({a},{b}))", g) + "Now the power.\n"
            + call(f"print(pow({g},{k},{m}))", answer))
    return (a, b, k, m), phrasings, f"By Euclid:\n{steps}\nModulo {m}:\n{more}", code, answer


def prime_then_power(draw):
    n, k, m = draw(20, 999), draw(4, 10), draw(11, 999)
    phrasings = ["Let p be the smallest prime greater than {0}. Find the remainder of p^{1} divided by {2}.",
                 "Take the first prime p after {0}. What is p^{1} modulo {2}?",
                 "p is the next prime after {0}. Divide p^{1} by {2}. What remains?"]
    p = sympy.nextprime(n)
    steps, answer = square_and_multiply(p, k, m)
    code = (call(f"from sympy import nextprime\nprint(nextprime({n}))", p) + "Now the power.\n"
            + call(f"print(pow({p},{k},{m}))", answer))
    return (n, k, m), phrasings, f"The prime is {p}. Modulo {m}:\n{steps}", code, answer


def product_remainder(draw):
    a, b, m = draw(20, 999), draw(20, 999), draw(11, 99)
    phrasings = ["Find the remainder when {0} * {1} is divided by {2}.", "What is {0} times {1} modulo {2}?",
                 "Multiply {0} by {1} and divide by {2}. What remains?"]
    answer = a * b % m
    text = f"{a}*{b} = {a * b} = {a * b // m}*{m} + {answer}"
    return (a, b, m), phrasings, text, call(f"print({a}*{b}%{m})", answer), answer


def sum_of_digit_sums(draw):
    a, b = sorted((draw(101, 9999), draw(101, 9999)))
    phrasings = ["What is the digit sum of {0} + {1}?",
                 "Add {0} and {1} and add up the digits of the result.",
                 "Find the sum of the digits of the sum of {0} and {1}."]
    digits = str(a + b)
    answer = sum(map(int, digits))
    text = f"{a}+{b} = {digits}\n{'+'.join(digits)} = {answer}"
    return (a, b), phrasings, text, call(f"print(sum(map(int,str({a}+{b}))))", answer), answer


TRIVIAL = [addition, larger, last_digit]  # no tool is needed
FAMILIES = TRIVIAL + [
    power_remainder, count_pairs, common_divisor, common_multiple, digit_sum, divisor_count, prime_count,
    power_sum, recurrence, inverse, digit_count, divisor_then_power, prime_then_power
]
HELD_OUT = [product_remainder, sum_of_digit_sums]  # never trained on
SPLITS = ("train", "test", "ood_large", "ood_families")


@dataclass
class Problem:
    family: str
    operands: tuple
    question: str
    answer: str
    by_hand: str  # D_init: text only
    by_code: str  # its code-augmented rewriting, not yet verified


def embedded_problem(split, seed, index):
    """Problem number `index` of an endless split: a function of its three arguments alone.

    A hash of (family, operands) sends each problem to train or test, so that the two are disjoint however
    many are drawn; ood_large draws every operand above the training range; ood_families uses families that
    training never sees.
    """
    # crc32, not hash(): Python's string hash differs from process to process
    rng = random.Random(zlib.crc32(f"{split}/{seed}/{index}".encode()))
    while True:
        family = rng.choice(HELD_OUT if split == "ood_families" else FAMILIES)
        large = split == "ood_large"
        # ranges up to 9 are choices, not operands
        operands, phrasings, by_hand, by_code, answer = family(lambda low, high: rng.randint(
            high + 1, 3 * high) if large and high > 9 else rng.randint(low, high))
        # sorted: "3 + 5" and "5 + 3" are one problem and belong into one split
        is_test = zlib.crc32(f"{family.__name__}{sorted(operands)}".encode()) % 10 == 0
        if split in ("train", "test") and is_test != (split == "test"):
            continue
        final = f"<answer>\\boxed{{{answer}}}</answer>"
        return Problem(family.__name__, operands, rng.choice(phrasings).format(*operands), str(answer),
                       f"{by_hand}\n{final}", f"Let me compute this.\n{by_code}{final}")


def embedded_overlap(seed, n=2000):
    """How many of n problems of each other split also occur among n training problems; asserted to be 0, and
    printed."""
    keys = {
        split: {(p.family, tuple(sorted(p.operands)))
                for p in (embedded_problem(split, seed, i) for i in range(n))}
        for split in SPLITS
    }
    overlap = {split: len(keys["train"] & keys[split]) for split in SPLITS[1:]}
    assert not any(overlap.values()), f"splits overlap: {overlap}"
    return overlap


# What the sandbox answers to a script that fails, for the embedded tokenizer: else a traceback would take 200
# tokens.
ERRORS = """Traceback (most recent call last, 988 frames dropped):
  File "snippet.py", line 3, in <module>
    print(u(2500))
  File "snippet.py", line 2, in u
    return 7 if n==500 else u(n-1)+n
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
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}")


@functools.cache  # training it takes seconds
def embedded_tokenizer(vocabulary=896, documents=3000):
    """A byte-level BPE tokenizer trained on the embedded problems, with Qwen's pre-tokenisation (digits one
    by one).

    The tags are ordinary text to it, split and overrun as in the big tokenizers. End of turn is <|im_end|>,
    pad another token. Digits in pairs would halve the steps after which operands are copied right (measured),
    but transformers gives every qwen2 checkpoint Qwen's pre-tokenisation again when it loads one.
    """
    tokenizer = Tokenizer(models.BPE())
    pattern = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
               r"|\s*[\r\n]+|\s+(?!\S)|\s+")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(pattern), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    ])
    tokenizer.decoder = decoders.ByteLevel()
    problems = [embedded_problem("train", 0, i) for i in range(documents)]
    texts = [text for p in problems for text in (p.question, p.by_hand, p.by_code)]
    texts += ["user\n", "assistant\n"] * documents + [ERRORS] * (documents // 10)
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(vocab_size=vocabulary,
                            special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
                            show_progress=False, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>",
                                   pad_token="<|endoftext|>", additional_special_tokens=["<|im_start|>"],
                                   chat_template=CHAT_TEMPLATE)


# ------------------------------------------------------------------------------------------------------------
# Curation


def verify_format(response):
    """Why a rewritten response is not well-formed, or None: tags balanced, ordered, not nested; one answer,
    at the end."""
    inside = None
    for match in TAG.finditer(response):
        closing, name = match.groups()
        if bool(closing) != (inside is not None) or (closing and inside != name):
            return "tags"
        inside = None if closing else name
    if inside:
        return "tags"
    segments = split_segments(response)
    for i, (kind, text) in enumerate(segments):
        if kind == "model" and (INTERPRETER_OPEN in text
                                or text.count(CODE_CLOSE) != (i + 1 < len(segments))):
            return "interpreter block missing or misplaced"
        if kind == "model" and i + 1 < len(segments):
            try:
                ast.parse(strip_fence(text.split(CODE_OPEN)[1].split(CODE_CLOSE)[0]))
            except (SyntaxError, ValueError, MemoryError, RecursionError):  # the latter two: absurd nesting
                return "snippet does not parse"
    before, _, answer = response.rpartition("<answer>")
    if "<answer>" in before or not answer.endswith("</answer>") or answer.count(r"\boxed") != 1 or (
            boxed(answer) is None or extract_answer(before) not in (None, boxed(answer))):
        return "no single final answer"
    return None


NUMBER_IN_TEXT = re.compile(r"(?<![\w.])(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|(?<![\w.])\.\d+")
TOKEN = re.compile(rf"{NUMBER_IN_TEXT.pattern}|\w+|[^\w\s]")


def numbers(text):
    """The unsigned numbers of a text, exactly, in order: commas as thousands, no digits of words (x1)."""
    return [Decimal(n.replace(",", "")) for n in NUMBER_IN_TEXT.findall(text)]


def rounds_to(exact, shown, slack=Decimal("0.5")):
    """Whether `shown` is `exact` rounded to the decimals that it shows (slack 1: or cut off there)."""
    return exact == shown or abs(exact - shown) < slack * Decimal(10) ** min(shown.as_tuple().exponent, 0)


def same_output(quoted, result):
    """Whether quoted interpreter text says what really came back: numbers by value (24 is 24.0), other tokens
    as they are; of an error only its kind counts."""
    output = break_tags(result.output)
    if quoted.split() == output.split():
        return True
    if result.status != "ok":
        kind = re.search(r"(\w+)[^\n]*\Z", output.strip())  # the last line is "ZeroDivisionError: ..."
        return kind is not None and kind[1] in re.findall(r"\w+", quoted.strip().rpartition("\n")[2])[:1]
    quoted, real = TOKEN.findall(quoted), TOKEN.findall(output)
    return len(quoted) == len(real) and all(a == b or numbers(a) == numbers(b) != []
                                            for a, b in zip(quoted, real))


def depends_on(quoted, output, later):
    """Whether the text after a quoted output that was wrong may rest on it: it repeats a number that is not a
    rounding of a real one. Words that differ (True, an error) always count: their use cannot be seen."""
    wrong = {n for n in numbers(quoted) if not any(rounds_to(real, n) for real in numbers(output))}
    words = re.compile(r"[^\W\d_]+")
    return words.findall(quoted) != words.findall(output) or not wrong.isdisjoint(numbers(later))


def system_access(code):
    """A module or name in a snippet that reaches beyond mathematics, or None. The sandbox stops it anyway,
    but it must not be taught."""
    nodes = list(ast.walk(ast.parse(code)))
    own = {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    for node in nodes:
        names = [getattr(node, "module", None) or "", getattr(node, "attr", "")]
        names += [node.id] if isinstance(node, ast.Name) and node.id not in own else []
        names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        for name in names:
            if name.split(".")[0] in SYSTEM:
                return name
        if isinstance(node, ast.Attribute) and node.attr.startswith("__"):
            return node.attr
    return None


SYSTEM = set("os subprocess socket ctypes shutil signal multiprocessing threading pathlib resource mmap "
             "pickle importlib builtins asyncio gc inspect tempfile glob urllib http open exec eval compile "
             "input __import__ __builtins__ globals getattr io codecs linecache fileinput runpy posix ssl "
             "modules fromfile loadtxt memmap _os".split())
LITERAL = re.compile(r"(?<![\w.])(?:\d+(?:\.\d*)?|\.\d+)(?!\w)")


async def hard_coded(code, output, answer, run):
    """Why a snippet is no computation, or None: all that it prints, or the final answer, stands in it.

    Found out by experiment: a number of the snippet that is also printed is raised by one. Where the printed
    one follows by one, and does not move with the snippet's other numbers, it was only passed through
    (`x = 24; print(x * 1)`). 0 and 1 are left alone, they count and index.
    """
    nodes = list(ast.walk(ast.parse(code)))
    if not any(isinstance(node, (ast.BinOp, ast.Compare, ast.For, ast.While, ast.comprehension)) or (
            isinstance(node, ast.Call) and getattr(node.func, "id", "") != "print") for node in nodes):
        return "only prints a literal"
    printed, target, passed = numbers(output), plain_number(answer), set()
    literals = [match for match in LITERAL.finditer(code) if Decimal(match[0]) not in (0, 1)]

    async def moved(chosen, by=1):
        """By how much each printed number moves when the chosen ones are raised by 1, 2, 3, ... times `by`."""
        changed = code
        for step, match in reversed(list(enumerate(chosen, 1))):
            changed = changed[:match.start()] + str(Decimal(match[0]) + step * by) + changed[match.end():]
        after = numbers((await run(changed)).output)
        return [b - a for a, b in zip(printed, after)] if len(after) == len(printed) else []
    for match in [match for match in literals if Decimal(match[0]) in printed][:20]:  # each costs two runs
        others = await moved([other for other in literals if other is not match], 1009)  # max() takes another
        passed |= {i for i, (step, other) in enumerate(zip(await moved([match]), others))
                   if step == 1 and other == 0 and printed[i] == Decimal(match[0])}
    bare = {Decimal(str(argument.value)) for node in nodes if isinstance(node, ast.Call)
            and getattr(node.func, "id", "") == "print" for argument in node.args
            if isinstance(argument, ast.Constant) and type(argument.value) in (int, float)}
    passed |= {i for i, number in enumerate(printed) if number in bare}  # whatever stands around that print
    if printed and len(passed) == len(printed):
        return "only prints a literal"
    answers = {i for i, number in enumerate(printed) if target is not None and abs(target) == number}
    return "prints the answer without computing it" if answers and answers <= passed else None


def is_used(output, later):
    """Whether the text after a snippet takes up what it printed: a number (also rounded) or a word of it."""
    found, printed = numbers(later), numbers(output)
    if printed or output.startswith("[no output"):
        return any(rounds_to(p, n, slack=1) for p in printed for n in found)
    words = set(re.findall(r"\w+", output.lower()))  # "True" may be taken up as "so it is prime"
    return bool(words & {"true", "false", "none"} or words & set(re.findall(r"\w+", later.lower())))


NOTICED = re.compile(r"(?i)\b(error|exception|fail|fix|correct|mistake|wrong|bug|instead|again|timed? ?out|"
                     r"too (slow|long|large|small|many|deep)|(does|did) not work|retry)")


async def verify(response, reference, run, wrong_output="reject", strict=False):
    """Every check of one trace: (reason to reject it or None, response with the real outputs, snippets).

    run(code) -> SandboxResult. wrong_output: what to do where a quoted output differs from the real one:
    "reject" or "replace" (where later text depends on it, the trace is rejected all the same). strict: what
    real data needs beyond the embedded traces: a failed snippet is noticed and corrected; the quality
    checks. snippets: [{"code", "status", "output"}].
    """
    reason = verify_format(response)
    if reason:
        return f"format: {reason}", response, []
    segments = [text for _, text in split_segments(response)]
    texts, quotes = segments[::2], segments[1::2]
    codes = [strip_fence(text.rsplit(CODE_OPEN, 1)[1].split(CODE_CLOSE)[0]) for text in texts[:-1]]
    for name in filter(None, map(system_access, codes if strict else [])):
        return f"quality: snippet reaches for the system ({name})", response, []
    results = [await run(code) for code in codes]
    if any(result.status == "sandbox_error" for result in results):
        raise RuntimeError("the sandbox failed during curation")
    response = "".join(f"{text}\n{INTERPRETER_OPEN}\n" + break_tags(result.output).strip("\n")
                       + f"\n{INTERPRETER_CLOSE}" for text, result in zip(texts, results)) + texts[-1]
    snippets = [{"code": code, "status": result.status, "output": result.output}
                for code, result in zip(codes, results)]
    for i, (quoted, result) in enumerate(zip(quotes, results)):
        # A failure is admitted where the trace quotes it, or notices it in the text that follows, and a later
        # snippet runs: to go on as if nothing had happened must not be taught.
        noticed = result.status in ("error", "timeout") and (quoted.strip() or NOTICED.search(texts[i + 1]))
        corrected = noticed and any(later.status == "ok" for later in results[i:])
        if strict and result.status != "ok" and not corrected:
            return f"execution: {result.status}, not corrected", response, snippets
        if quoted.strip() and not same_output(quoted, result):
            if wrong_output == "reject":
                return "execution: quoted output differs", response, snippets
            if depends_on(quoted, result.output, "".join(texts[i + 1:])):
                return "execution: later text depends on a wrong quoted output", response, snippets
    if not await asyncio.to_thread(is_equivalent, extract_answer(response), reference):
        return "answer: differs from the reference", response, snippets
    for i, result in enumerate(results if strict else []):
        reason = await hard_coded(codes[i], result.output, reference, run) if result.status == "ok" else None
        if result.status == "ok" and not reason and not is_used(result.output, "".join(texts[i + 1:])):
            reason = "output is never used"
        if reason:
            return f"quality: snippet {reason}", response, snippets
    stated = numbers(reference) if re.fullmatch(r"-?[\d,.]+", reference) else []
    if strict and not set(stated) <= set(numbers(response.rsplit("<answer>", 1)[0])):
        return "quality: the answer comes from nowhere", response, snippets
    return None, response, snippets


async def curate(problems, candidates, sandbox, progress=None):
    """Verify code-augmented candidates: (traces, counts of "kept" and of each reason to reject).

    problems: objects with .question and .answer; candidates: one response text each, in which an empty
    interpreter block is filled by the run and a quoted one must agree with it. A trace is {"question",
    "answer", "family", "response", "failed_calls"}; order is kept. Snippets of all candidates run
    concurrently.
    """
    async def one(problem, candidate):
        reason, response, snippets = await verify(candidate, problem.answer,
                                                  lambda code: sandbox.run(code, seed=0))
        if reason:
            return reason, None
        failed = [i for i, snippet in enumerate(snippets) if snippet["status"] != "ok"]
        return "kept", {"question": problem.question, "answer": problem.answer, "family": problem.family,
                        "response": response, "failed_calls": failed}

    counts, traces, limit = Counter(), [], asyncio.Semaphore(256)

    async def limited(pair):
        async with limit:
            outcome = await one(*pair)
        if progress:
            progress(1)
        return outcome

    for reason, trace in await asyncio.gather(*map(limited, zip(problems, candidates, strict=True))):
        counts[reason] += 1
        if trace:
            traces.append(trace)
    return traces, counts


async def embedded_traces(n, code_share, seed, sandbox, split="train", progress=None):
    """n cold-start problems -> (traces, counts): a share of them as code-augmented traces, the rest as text
    (code_share 0: all).

    The same `curate` verifies both kinds: a text solution is a trace without snippets.
    """
    problems = [embedded_problem(split, seed, i) for i in range(n)]
    rng = random.Random(seed + 1)
    candidates = [p.by_code if rng.random() < code_share else p.by_hand for p in problems]
    return await curate(problems, candidates, sandbox, progress)


# ------------------------------------------------------------------------------------------------------------
# Rewriters of D_init. Whoever wrote a candidate, it goes through `verify`.

ANNOTATION = re.compile(r"\s{0,3}(=?)\s{0,3}([$€£]?)\s{0,3}<<([^<>]*)=([^<>=]*)>>([$€£]?[\d,]*\.?\d*)")
NO_CALCULATION = re.compile(r"[+-]?[\d.]*|[\d.]+[*/]1|1\*[\d.]+|[\d.]+[+-]0|0\+[\d.]+")
SUBORDINATE = re.compile(r"(?i)(?:.*[.?!] )?(?:if|when|since|because|after|as|while|once|although)\b[^,]*")
VERB = re.compile(r"(?: (?!that|which|who|because|so|and)[\w$']+)*? "
                  r"(?:is|are|was|were|will|would|can|has|have|had|remain\w*)\b")
# Up to three words that go with a number ("clips", "square feet"), before the rest of the line.
NOUN = re.compile(r"(?: (?!(?:in|for|at|on|of|to|from|with|by|per|each|every|an?|and|or|so|as|than|the|his|"
                  r"her|their|this|it|he|she|they|during|until|after|before|while|when|total|not|because|"
                  r"since|which|that|if|but|left|now|then)\b)[A-Za-z]+){1,3}(?![\w&'/-])")
PURE = re.compile(r".*?[a-z:=,] ?[\d$.]+(?: ?[-+*/x] ?[\d$.]+)+")


def calculation(line):
    """One line of a GSM8K solution as (statement, snippet, quoted output, result, is_sentence), or None if it
    has no calculation. "Ann sold 48/2 = <<48/2=24>>24 clips in May." -> "Ann sold 48/2 clips", "print(48/2)",
    "24", "24 clips in May", True. Where the line does not fall apart into such sentences, the calculation
    comes first and then the whole line: ("48/2", "print(48/2)", "24", the line, False)."""
    match = ANNOTATION.search(line)
    code = match and re.sub(r"(?<![\d.])0+(?=\d)", "", match[3].replace(" ", ""))
    if not match or not re.fullmatch(r"[\d.+\-*/()]{3,100}", code) or re.search(r"\*\*|//", code):
        return None
    try:
        value, shown = eval(code), float(match[4])  # digits and + - * / ( ) only, see above
    except (SyntaxError, TypeError, ValueError, ZeroDivisionError):
        return None
    if NO_CALCULATION.fullmatch(code):
        return None
    expression, digits = match[3], len(match[4].partition(".")[2])
    if value != shown and round(value, digits) == shown:  # as people do: rounded to the digits that are used
        code = f"round({code}, {digits})" if digits else f"round({code})"
    head, tail = line[:match.start()], line[match.end():]
    if (match[1] and numbers(match[5]) and re.search(r"[A-Za-z]{2}", head) and head.count("(") == head.count(")")
            and not re.match(r"[^\s.,;!]| [-=+*/x(]", tail) and not SUBORDINATE.fullmatch(head)
            and not VERB.match(tail)
            and numbers(match[5])[0] not in Counter(numbers(head)) - Counter(numbers(expression))):
        # "7 apples * 2 = 14 apples" has its noun already, and $ is one
        noun = NOUN.match(tail) if PURE.fullmatch(head) and not match[2] else None
        result = (match[2] + match[5] + tail).rstrip(" .,;")
        return head.rstrip(" :") + (noun[0] if noun else ""), f"print({code})", match[4], result, True
    return expression, f"print({code})", match[4], unmark(line), False


def unmark(line):
    return re.sub(r"<<[^<>]*>>", "", line)


def calculator(item, rng):
    """Turns calculator annotations into snippets in place, without a model. Consecutive short steps that do
    not need each other's results share a snippet. None if there is nothing to calculate."""
    lines = [line.strip() for line in item["solution"].splitlines() if line.strip()]
    steps, response = [(line, calculation(line)) for line in lines], ""
    if not any(step for _, step in steps):
        return None
    while steps:
        line, step = steps.pop(0)
        if not step:
            response += unmark(line) + "\n"
            continue
        group = [step]
        while steps and len(group) < 3 and is_short(step) and is_short(steps[0][1]) and not any(
                set(numbers(earlier[2])) & set(numbers(steps[0][1][0])) for earlier in group):
            group.append(steps.pop(0)[1])
        statements, codes, quotes, results, _ = zip(*group)
        if step[4]:
            response += " ".join(statement + "." for statement in statements) + "\n"
            result = rng.choice(["That is ", "This is ", "So that is "])
            result += ", ".join(results[:-1]) + " and " * (len(group) > 1) + results[-1] + "."
        else:
            response += rng.choice(["Let me work out ", "Let me compute ", "Let me calculate "])
            response, result = f"{response}{step[0]}.\n", step[3]
        response += call("\n".join(codes), "\n".join(quotes)) + result + "\n"
    return f"{response}<answer>\\boxed{{{item['own']}}}</answer>"


def is_short(step):
    return step and step[4] and len(step[3].split()) < 6 and not re.search(r"[.,;:!?] ", step[3])


# What a model is asked; --rewrite_prompt FILE replaces it.
REWRITE_PROMPT = r"""Rewrite the solution of the problem below so that it uses a Python interpreter wherever \
that helps.
- Keep the line of thought, also attempts that failed and how that was noticed.
- Replace each calculation, enumeration or check that a program does better by a snippet, followed by the \
output that you expect:
<code>
```python
print(...)
```
</code>
<interpreter>
...
</interpreter>
- Each snippet is a complete script: it has its own imports, shares no variable with the others, computes \
what it prints, and prints what the text then uses. Never print a number that you already know.
- Every snippet will be run, and its real output put in the place of yours.
- Close with <answer>\boxed{...}</answer>, once. Write nothing but the rewritten solution.

Problem:
{question}

Solution:
{solution}""".replace("\\\n", "")


def api_model(args):
    """complete(prompt, seed) -> text of an OpenAI-compatible endpoint, or None where it came to no end or
    refused this one prompt. The openai package tries again after 408, 409, 429, 5xx and lost connections,
    waiting longer each time; after that the run ends with one line, and the same command goes on."""
    try:
        import openai
    except ImportError:
        raise UserError("--rewriter api needs the package openai (pip install openai)") from None
    client = openai.AsyncOpenAI(base_url=args.api_url or None, max_retries=args.api_retries,
                                api_key=os.environ.get("OPENAI_API_KEY", "none"))

    async def complete(prompt, seed):
        try:
            reply = await client.chat.completions.create(
                model=args.model, messages=[{"role": "user", "content": prompt}], seed=seed,
                temperature=args.temperature, max_tokens=args.max_response_tokens)
        except openai.BadRequestError:
            return None
        except openai.OpenAIError as error:
            raise UserError(f"--rewriter api: {client.base_url}: {' '.join(str(error).split())[:200]} (tried "
                            f"{args.api_retries + 1} times; finished rows are kept)") from None
        done = reply.choices and reply.choices[0].finish_reason == "stop"
        return reply.choices[0].message.content if done else None
    return complete


def local_model(args):
    """complete(prompt, seed) -> text of a checkpoint through rollout.py's engine, or None where it came to no
    end. Rows that ask at the same time are generated as one batch."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(args.model)
        model = AutoModelForCausalLM.from_pretrained(args.model, attn_implementation="retool", dtype="auto")
    except (OSError, ValueError) as error:
        raise UserError(f"--model {args.model}: cannot be loaded ({str(error).splitlines()[0]})") from None
    model.to("cuda" if torch.cuda.is_available() else "cpu").eval()
    waiting, positions, batch = [], model.config.max_position_embeddings, None

    async def complete(prompt, seed):
        nonlocal batch
        if not waiting:
            batch = asyncio.create_task(whole_batch())
        waiting.append((encode_prompt(tokenizer, "{question}", prompt)[:positions - 1], seed))
        mine, index = batch, len(waiting) - 1
        return (await mine)[index]

    async def whole_batch():
        await asyncio.sleep(0.1)
        prompts, seeds = map(list, zip(*waiting))
        waiting.clear()
        room = min(args.max_response_tokens, positions - max(map(len, prompts)))
        found = await generate(model, tokenizer, prompts, None, tools=False, prompt_keys=seeds,
                               seed=args.seed, temperature=args.temperature, max_response_tokens=room)
        return [tokenizer.decode(t.response_ids, skip_special_tokens=True)
                if t.finish_reason == "eos" else None for t in found]
    return complete


# ------------------------------------------------------------------------------------------------------------
# Contamination and duplicates

NUMBER_WORD = re.compile(
    r"(?:\d[\d.,]*|\b(?:one|two|three|four|five|six|seven|eight|nine|ten|eleven|twelve|\w+teen|twenty|thirty|"
    r"forty|fifty|sixty|seventy|eighty|ninety|hundred|thousand|million|half|twice|double|dozen)\b[\s-]*)+")


def words(text, mask_numbers=False):
    """The words of a text, in lower case, without punctuation; mask_numbers: runs of numbers become #."""
    text = NUMBER_WORD.sub(" # ", text.lower()) if mask_numbers else text.lower()
    found = re.findall(r"[^\W_]+|#", text)
    return [word for word, before in zip(found, [""] + found) if not word == before == "#"]


def ngrams(text, n, mask_numbers=False):
    found = words(text, mask_numbers)
    return [" ".join(found[i:i + n]) for i in range(len(found) - n + 1)]


class Contamination:
    """Finds questions that are, or share 13 words in a row with, an evaluation problem. Numbers and spacing
    do not count: digits and number words are masked, whole questions are compared without spaces as well."""

    def __init__(self, files):
        self.whole, self.grams = {}, {}
        for file in files:
            for row, problem in enumerate(load_problems(file), 1):
                where = f"{Path(file).name}:{row}"
                self.whole |= dict.fromkeys(self.keys(problem["question"]), where)
                for gram in ngrams(problem["question"], 13, mask_numbers=True):
                    self.grams[gram] = where

    def keys(self, question):
        """The question without spaces; number words are masked in one, for they are no words without spaces."""
        masked = ["".join(words(question, mask_numbers=True)), re.sub(r"\d+", "#", "".join(words(question)))]
        # "What is 3 + 5?": without its numbers nothing is left that could be recognised
        return masked if len(masked[0]) > 30 else ["".join(words(question))]

    def __call__(self, question):
        """(kind, evaluation problem, shared text) of a hit, or None."""
        for key in self.keys(question):
            if key in self.whole:
                return "same but for numbers and spacing", self.whole[key], question
        for gram in ngrams(question, 13, mask_numbers=True):
            if gram in self.grams:
                return "13-gram", self.grams[gram], gram
        return None


class Duplicates:
    """Recognises questions seen before: the same words, or word triples with a Jaccard index of at least 0.8.
    Only questions that share one of their 8 smallest hashes are compared: time and memory grow linearly."""

    def __init__(self):
        self.exact, self.sketches = {}, {}

    def __call__(self, question, row):
        """(kind, row) of the first question like this one, or None; in that case this one is remembered."""
        key, triples = "".join(words(question)), frozenset(ngrams(question, 3))
        if key in self.exact:
            return "same question", self.exact[key]
        smallest = sorted(zlib.crc32(triple.encode()) for triple in triples)[:8]
        for other, other_row in [pair for h in smallest for pair in self.sketches.get(h, [])]:
            if len(triples & other) >= 0.8 * len(triples | other):
                return "nearly the same question", other_row
        self.exact[key] = row
        for h in smallest:
            self.sketches.setdefault(h, []).append((triples, row))
        return None


# ------------------------------------------------------------------------------------------------------------
# The pipeline on real data: read, filter, rewrite, verify, remove duplicates, write, report


def purpose(code, before):
    """What a snippet is for, guessed from its syntax tree and the words before it: a heuristic."""
    nodes = list(ast.walk(ast.parse(code)))
    imported = {alias.name.split(".")[0] for node in nodes if isinstance(node, (ast.Import, ast.ImportFrom))
                for alias in node.names} | {getattr(node, "module", "") for node in nodes}
    if any(isinstance(node, ast.Assert) for node in nodes) or re.search(
            r"(?i)\b(check|verif|confirm|double-check|make sure)", before[-200:]):
        return "verification"
    if imported & {"sympy", "symbols"}:
        return "symbolic algebra"
    if "random" in imported:
        return "simulation"
    loops = (ast.For, ast.While, ast.comprehension)
    return "enumeration" if any(isinstance(node, loops) for node in nodes) else "calculation"


def parses(answer):
    """Whether an answer is short and readable as mathematics, so that a response can be compared with it."""
    if len(answer) > 200 or answer.lower() in ("proof", "notfound", "none", "n/a", ""):
        return False
    found = read(tidy(answer))
    text = expression(found.text)
    return found.kind != "expression" or bool(text and VERIFIER(text[0], text[0], 1.0)[0])


async def judge(row, rng, args, tokenizer, contamination, complete, run):
    """One row through all stages: {"reason": "kept", "trace", ...} or why and where it was rejected."""
    item, candidate = read_row(row, args.layouts), None

    def rejected(reason, detail=None):
        question = item and item["question"]
        return {"reason": reason, "question": question, "candidate": candidate, "detail": detail}

    def too_long(text, limit=args.max_response_tokens):
        return len(tokenizer(text, add_special_tokens=False)["input_ids"]) > limit
    if not item or not item["question"] or re.search("[\ud800-\udfff]", item["question"] + item["solution"]):
        return rejected("filter: not well-formed")  # lone surrogates are no text: nothing can encode them
    if not item["answer"] or not await asyncio.to_thread(parses, item["answer"]):
        return rejected("filter: no answer that parses")
    if not item["solution"]:
        return rejected("filter: no solution")
    is_trace = "<answer>" in item["solution"]  # then it is verified, not rewritten
    if not is_trace and not await asyncio.to_thread(is_equivalent, item["own"], item["answer"]):
        return rejected("filter: the solution's answer is not the reference")
    if too_long(item["question"], args.max_question_tokens) or too_long(item["solution"]):
        return rejected("filter: too long")
    if hit := contamination(item["question"]):
        return rejected(f"contamination: {hit[0]}", hit[1:])
    if args.agreement:
        prompt = PROMPT_TEMPLATES["retool"].replace("{question}", item["question"])
        samples = await asyncio.gather(*[complete(prompt, rng.getrandbits(31))
                                         for _ in range(args.agreement)])
        agree = sum(is_equivalent(extract_answer(text or ""), item["answer"]) for text in samples)
        if 2 * agree <= args.agreement:
            return rejected("filter: model samples disagree with the reference")
    if is_trace:
        candidate = item["solution"]
    elif args.rewriter == "calculator":
        candidate = calculator(item, rng)
    else:
        prompt = args.rewrite_template.replace("{solution}", item["solution"])
        candidate = await complete(prompt.replace("{question}", item["question"]), rng.getrandbits(31))
    if not candidate:
        return rejected("rewrite: no calculation" if args.rewriter == "calculator" else "rewrite: unfinished")
    candidate = candidate.encode("utf-8", "replace").decode().strip()
    reason, response, snippets = await verify(candidate, item["answer"], run, args.wrong_output, strict=True)
    printed = numbers(" ".join(snippet["output"] for snippet in snippets))
    printed = any(rounds_to(n, answer) for n in printed for answer in numbers(item["answer"]))
    reason = (reason or (not snippets and "quality: no snippet")
              or (args.answer_from_code and not printed and "quality: no snippet prints the answer")
              or (too_long(response) and "quality: too long with its snippets"))
    if reason:
        return rejected(reason)
    texts = [text for _, text in split_segments(response)][::2]
    return {"reason": "kept", "answer_printed": printed, "trace": {
        "messages": [{"role": "user", "content": args.template.replace("{question}", item["question"])},
                     {"role": "assistant", "content": response}],
        "answer": item["answer"], "family": Path(args.input).stem,
        "failed_calls": [i for i, snippet in enumerate(snippets) if snippet["status"] != "ok"],
        "spans": [[m[1], *m.span()] for m in BLOCK.finditer(response)],  # in characters; the rest is text
        "snippets": [{"status": snippet["status"], "purpose": purpose(snippet["code"], before),
                      "lines": sum(bool(line.strip()) for line in snippet["code"].splitlines())}
                     for snippet, before in zip(snippets, texts)]}}


BLOCK = re.compile(r"(?s)<(code|interpreter|answer)>.*?</\1>")


def open_journal(path, key):
    """(file to append to, {row: offset of its record}). The first line is `key`, what decides the result; a
    line torn by a kill is cut off."""
    offsets, end, file = {}, 0, open(path, "a+b")
    file.seek(0)
    for line in file:
        if not line.endswith(b"\n"):
            break
        if not end and line != key:
            raise UserError(f"{path} belongs to another input or other arguments: finish that or delete it")
        if end:
            offsets[json.loads(line)["row"]] = end
        end += len(line)
    file.seek(end)
    file.truncate()
    file.write(b"" if end else key)
    return file, offsets


async def curate_file(args):
    """`data.py curate`. Every finished row becomes a line of OUTPUT's journal, in any order, and is not done
    again; at the end they are sorted, duplicates go, and OUTPUT and its report appear by a rename."""
    if args.limit < 0:
        raise UserError(f"--limit {args.limit}: must not be negative")
    output = Path(args.output)
    journal, report = output.with_suffix(".journal"), output.with_suffix(".report.json")
    if output.exists() and not journal.exists():
        raise UserError(f"--output {output}: there already; nothing is overwritten")
    names = (args.question_field, args.answer_field, args.solution_field)
    args.layouts = [names] if any(names) else LAYOUTS
    first = [row for _, row in itertools.islice(read_rows(args.input, args.split, args.config), 100)]
    if not any(read_row(row, args.layouts) for row in first):
        raise UserError(
            f"{args.input}: unknown layout; found {fields(first[0]) if first else 'no rows'}. Name the "
            "fields with --question_field, --answer_field, --solution_field (dotted paths: prompt.0.content)")
    args.template = load_template(args.prompt_template)
    args.rewrite_template = load_template(args.rewrite_prompt) if args.rewrite_prompt else REWRITE_PROMPT
    complete = None
    if args.rewriter != "calculator":
        if not args.model or "{solution}" not in args.rewrite_template:
            raise UserError(f"--rewriter {args.rewriter} needs --model, and {{solution}} in --rewrite_prompt")
        complete = (local_model if args.rewriter == "local" else api_model)(args)
    elif args.agreement:
        raise UserError("--agreement needs --rewriter local or api: their model is what is asked")
    contamination = Contamination(args.decontaminate)
    tokenizer = AutoTokenizer.from_pretrained(args.tokenizer) if args.tokenizer else embedded_tokenizer()
    # What decides the result, the content of the files included; paths and speed do not.
    decides = {name: value for name, value in vars(args).items() if name not in (
        "command", "file", "n", "input", "output", "decontaminate", "in_flight", "sandbox_workers",
        "api_retries", "api_url", "unsafe_sandbox")}
    decides["files"] = {Path(name).name: hashlib.sha256(Path(name).read_bytes()).hexdigest()[:16]
                        if Path(name).is_file() else name for name in [args.input, *args.decontaminate]}
    file, offsets = open_journal(journal, json.dumps(decides).encode() + b"\n")
    begin, done, pending = time.perf_counter(), len(offsets), {}

    async def collect(limit):
        while len(pending) > limit:
            finished, _ = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
            # errors last: what is done is kept
            for task in sorted(finished, key=lambda task: task.exception() is not None):
                number, place = pending.pop(task)
                offsets[number] = file.tell()
                file.write(json.dumps({"row": number, "place": place} | task.result()).encode() + b"\n")
                bar.update()
            file.flush()  # from here on a kill loses nothing of it
    async with Sandbox(args.sandbox_workers, args.sandbox_timeout, unsafe=args.unsafe_sandbox) as sandbox:
        # The same snippet gives the same result: small sums recur, and are run once.
        run = functools.lru_cache(50_000)(lambda code: asyncio.ensure_future(sandbox.run(code, seed=0)))
        with file, tqdm(desc="rows", initial=done, total=args.limit or None, mininterval=1.0) as bar:
            rows = itertools.islice(read_rows(args.input, args.split, args.config), args.limit or None)
            try:
                for number, (place, row) in enumerate(rows):
                    if number not in offsets:
                        rng = random.Random(f"{args.seed}/{number}")
                        task = judge(row, rng, args, tokenizer, contamination, complete, run)
                        pending[asyncio.create_task(task)] = number, Path(place).name
                        await collect(args.in_flight)
                await collect(0)
            finally:
                for task in pending:
                    task.cancel()
                await asyncio.gather(*pending, return_exceptions=True)
    seconds, new = time.perf_counter() - begin, len(offsets) - done
    summary = write_traces(journal, offsets, output.with_suffix(".partial"), decides)
    report.with_suffix(".partial").write_text(json.dumps(summary, indent=1))
    report.with_suffix(".partial").rename(report)
    output.with_suffix(".partial").rename(output)
    journal.unlink()
    brief = {name: value for name, value in summary.items() if name not in ("arguments", "examples", "hits")}
    print(json.dumps(brief, indent=1))
    print(f"{new} rows in {seconds:.1f} s, {new / seconds:.1f} rows/s; sandbox: {dict(sandbox.counts)}")


def write_traces(journal, offsets, path, decides):
    """Write the kept rows of the journal in the input's order, without duplicates; returns the report."""
    reasons, examples, hits, snippets, duplicates = Counter(), {}, [], [], Duplicates()
    with open(journal, "rb") as file, open(path, "w") as out:
        for number in sorted(offsets):
            file.seek(offsets[number])
            record = json.loads(file.readline())
            if trace := record.get("trace"):
                record["question"] = read_row(trace)["question"]
                if found := duplicates(record["question"], record["place"]):
                    record["reason"], record["detail"] = f"duplicate: {found[0]}", found[1]
            reason = record["reason"]
            reasons[reason] += 1
            if reason != "kept":
                example = {name: record.get(name) for name in ("place", "question", "candidate", "detail")}
                examples[reason] = (examples.get(reason, []) + [example])[:3]
                hits += [[record["place"], *record["detail"]]] if reason.startswith("contamination") else []
                continue
            reasons["kept, the answer printed by a snippet"] += record["answer_printed"]
            reasons["kept, with an error that is corrected"] += bool(trace["failed_calls"])
            snippets += trace["snippets"]
            trace["provenance"] = {"place": record["place"], "rewriter": decides["rewriter"]}
            out.write(json.dumps(trace) + "\n")
        out.flush()
        os.fsync(out.fileno())
    left, left_after, kept = len(offsets), {}, reasons["kept"]
    for stage in "filter contamination rewrite format execution answer quality duplicate".split():
        left -= sum(n for reason, n in reasons.items() if reason.startswith(stage + ":"))
        left_after[stage] = left
    return {"arguments": decides, "rows": len(offsets), "kept": kept,
            "kept_share": kept / max(1, len(offsets)), "left_after": left_after,
            "reasons": dict(sorted(reasons.items())),
            "snippets_per_trace": len(snippets) / max(1, kept),
            "lines_per_snippet": sum(s["lines"] for s in snippets) / max(1, len(snippets)),
            "outcomes": Counter(s["status"] for s in snippets),
            "purposes, guessed from syntax and words": Counter(s["purpose"] for s in snippets),
            "hits": hits, "examples": examples}


def show(args):
    """Prints traces with code, output and answer in colour."""
    colour = args.color == "always" or (args.color == "auto" and sys.stdout.isatty())
    paint = {"code": "\033[36m", "interpreter": "\033[33m", "answer": "\033[1;32m"}
    for trace in load_traces(args.file, least=1)[:args.n]:
        text = trace["response"]
        text = BLOCK.sub(lambda m: f"{paint[m[1]]}{m[0]}\033[0m", text) if colour else text
        print(f"{'=' * 100}\n{trace['question']}\n{'-' * 100}\n{text}")


def add_curate_arguments(parser):
    add = parser.add_argument
    add("--input", required=True, help="JSONL or parquet file, or a Hugging Face hub id")
    add("--output", required=True, help="JSONL of traces; the report lies beside it")
    add("--rewriter", choices=("calculator", "local", "api"), default="calculator",
        help="of solutions; rows that are traces already are verified only")
    add("--limit", type=int, default=0, help="first rows only; 0: all")
    add("--seed", type=int, default=0, help="of wording and sampling")
    add("--split", default="train", help="of a hub data set")
    add("--config", default=None, help="of a hub data set")
    for name in ("question", "answer", "solution"):
        add(f"--{name}_field", default="", help="dotted path of the field in an unknown layout")
    add("--prompt_template", default="retool", help="of the user message: plain, retool, or a file")
    add("--tokenizer", default="", help="folder or hub id, for the limits in tokens; empty: the embedded one")
    add("--max_question_tokens", type=int, default=2048, help="longer questions are left out")
    add("--max_response_tokens", type=int, default=16384, help="longer solutions and traces are left out")
    add("--wrong_output", choices=("reject", "replace"), default="reject",
        help="where a quoted output is not the real one: reject, or replace it if no later text needs it")
    add("--answer_from_code", action="store_true", help="some snippet must print the final answer")
    add("--decontaminate", nargs="*", default=[], help="evaluation sets whose problems must not occur")
    add("--model", default="", help="of --rewriter local (folder or hub id) or api (name)")
    add("--temperature", type=float, default=0.7, help="of the model")
    add("--rewrite_prompt", default="", help="file with {question} and {solution}")
    add("--agreement", type=int, default=0, help="samples of the model, of which most must be right; 0: off")
    add("--api_url", default="", help="base URL; empty: OpenAI's; the key is read from OPENAI_API_KEY")
    add("--api_retries", type=int, default=6, help="further tries of one request")
    add("--in_flight", type=int, default=64, help="rows, and requests, at the same time")
    add("--sandbox_workers", type=int, default=2, help="snippets at the same time")
    add("--sandbox_timeout", type=float, default=5.0, help="seconds per snippet")
    add("--unsafe_sandbox", action="store_true", help="run snippets although the sandbox lacks a layer")


async def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--file", default="", help="JSONL of problems to load; empty: the embedded problems")
    parser.add_argument("--n", type=int, default=1000, help="embedded problems to curate")
    parser.add_argument("--seed", type=int, default=0, help="of the embedded problems")
    commands = parser.add_subparsers(dest="command")
    add_curate_arguments(commands.add_parser("curate", help="real data -> verified traces",
                                             formatter_class=argparse.ArgumentDefaultsHelpFormatter))
    shown = commands.add_parser("show", help="print traces in colour")
    shown.add_argument("file", help="JSONL of traces")
    shown.add_argument("--n", type=int, default=10, help="how many")
    shown.add_argument("--color", choices=("auto", "always", "never"), default="auto",
                       help="auto: on a terminal")
    args = parser.parse_args()
    if args.command == "show":
        return show(args)
    if args.command == "curate":
        return await curate_file(args)
    if args.file:
        problems = load_problems(args.file)
        print(f"{args.file}: {len(problems)} problems; the first and the last:")
        for problem in (problems[0], problems[-1]):
            print(f"\n{problem['question']}\n-> {problem['answer']}")
        return
    print(f"problems shared with the training split, of 2000 each: {embedded_overlap(args.seed)}\n")
    for problem in (embedded_problem("train", args.seed, index) for index in range(2)):
        print(f"{problem.family} {problem.operands}\n{problem.question}\n--- by hand\n{problem.by_hand}\n"
              f"--- with code, not yet run\n{problem.by_code}\n")
    async with Sandbox(workers=2, timeout=0.5) as sandbox:
        traces, counts = await embedded_traces(args.n, 1.0, args.seed, sandbox)
    corrected = [trace for trace in traces if trace["failed_calls"]]
    for trace in corrected[:1]:
        print("--- a verified trace with a script that failed\n"
              f"{trace['question']}\n{trace['response']}\n")
    print(f"curated {args.n} code-augmented candidates: {dict(counts)}; with a failed script that is then "
          f"corrected: {len(corrected)}")


if __name__ == "__main__":
    try:
        asyncio.run(main())
    except (UserError, OSError) as problem:
        sys.exit(f"error: {problem}")
    except KeyboardInterrupt:
        sys.exit("interrupted; what is finished is kept, the same command goes on")
