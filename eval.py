"""What is right, and how good is it? The judge of answers, the metrics of rollouts, and evaluation.

    python eval.py --model out/ppo/.../checkpoint                 # the embedded test splits
    python eval.py --model DIR --problems aime24.jsonl --samples 32 --top_p 0.7     # as the paper: avg@32
    torchrun --nproc_per_node 8 eval.py ...                       # problems spread over eight GPUs
    python eval.py --runs out/ppo/seed1 out/ppo/seed2 ...         # mean and range over finished PPO runs

How each metric is defined (a "response" is one sample; those dropped for a sandbox error are counted and
left out):
  accuracy            responses that are correct (avg@n); its standard error is a bootstrap over problems
  response_tokens     mean length; response_tokens_sampled leaves interpreter text out
  code_ratio          share of responses that executed at least one snippet
  code_lines          non-blank, non-comment lines of executed snippets per response;
                      code_lines_per_snippet per snippet
  pass_last_correct   share whose last snippet ran without error, among correct responses with code;
                      pass_last_incorrect likewise among incorrect ones
  timing_first        start of the first snippet / response length, in tokens; timing_mean over all snippets
  self_correction     P(the next snippet runs | the previous one failed)
  corrected_share     correct responses with at least one failed snippet
  truncated           share that ended by a limit instead of EOS (it is not correct)
"""
import argparse
import asyncio
import contextlib
import ctypes
import json
import math
import inspect, select, subprocess, threading, time
from dataclasses import dataclass, replace
import os
import re
import sys
import traceback
from collections import Counter
from datetime import timedelta
from fractions import Fraction

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

from data import (SPLITS, TRIVIAL, boxed, embedded_rows, encode_prompt, extract_answer, load_problems,
                  load_template)
from rollout import DTYPES, generate, load_config, load_model, load_tokenizer
from sandbox import Sandbox, UserError

# ------------------------------------------------------------------------------------------------------------
# Answers

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


def old_is_equivalent(predicted, reference, strict=False):
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


async def is_equivalent(predicted, reference, sandbox):
    return old_is_equivalent(predicted, reference)


async def is_correct(trajectory, tokenizer, reference, sandbox):
    r"""Whether the policy's own final answer is right.

    Only sampled tokens (loss_mask 1) outside executed snippets count, and of their text only what is outside
    <code> and <interpreter>: a \boxed{} in a script, printed by one, or in an interpreter block that the
    policy wrote itself is no answer. A truncated response (anything but EOS) is not correct.
    """
    if trajectory.finish_reason != "eos":
        return False
    # Not by the tags alone: the engine knows which tokens it ran as code, however oddly tags were nested.
    segments = trajectory.sampled_segments(with_code=False)
    text = "\n".join(tokenizer.decode(ids, skip_special_tokens=True) for ids in segments)
    return await is_equivalent(extract_answer(text), reference, sandbox)


# ------------------------------------------------------------------------------------------------------------
# Metrics


def code_lines(code):
    return sum(1 for line in code.splitlines() if line.strip() and not line.strip().startswith("#"))


def mean(values):
    """Mean of a possibly empty list; None (JSON null) if there is nothing to average."""
    return float(np.mean(values)) if len(values) else None


def rollout_metrics(trajectories):
    """The metrics defined above, as a flat dict."""
    kept = [t for t in trajectories if t.finish_reason != "sandbox_error"]
    with_code = [t for t in kept if t.tool_calls]
    calls = [call for t in kept for call in t.tool_calls]
    after_failure = [b.status == "ok" for t in kept for a, b in zip(t.tool_calls, t.tool_calls[1:])
                     if a.status != "ok"]
    last_ok = {True: [], False: []}
    for t in with_code:
        last_ok[t.correct].append(t.tool_calls[-1].status == "ok")
    return {
        "accuracy": mean([t.correct for t in kept]),
        "response_tokens": mean([len(t.response_ids) for t in kept]),
        "response_tokens_sampled": mean([sum(t.loss_mask) for t in kept]),
        "code_ratio": mean([bool(t.tool_calls) for t in kept]),
        "snippets_per_response": mean([len(t.tool_calls) for t in kept]),
        "code_lines": mean([sum(code_lines(c.code) for c in t.tool_calls) for t in kept]),
        "code_lines_per_snippet": mean([code_lines(c.code) for c in calls]),
        "pass_last_correct": mean(last_ok[True]), "pass_last_correct_count": len(last_ok[True]),
        "pass_last_incorrect": mean(last_ok[False]), "pass_last_incorrect_count": len(last_ok[False]),
        "timing_first": mean([t.tool_calls[0].start / len(t.response_ids) for t in with_code]),
        "timing_mean": mean([c.start / len(t.response_ids) for t in with_code for c in t.tool_calls]),
        "self_correction": mean(after_failure), "self_correction_count": len(after_failure),
        "corrected_share": mean([any(c.status != "ok" for c in t.tool_calls) for t in kept if t.correct]),
        "truncated": mean([t.finish_reason != "eos" for t in kept]),
        "sandbox_outcomes": dict(sorted(Counter(call.status for call in calls).items())),
        "sandbox_errors_dropped": len(trajectories) - len(kept),
    }


def bootstrap_error(per_problem, draws=2000):
    """Standard error of the mean over problems, by resampling problems with replacement."""
    rng = np.random.default_rng(0)
    per_problem = np.asarray(per_problem, dtype=float)
    samples = rng.integers(0, len(per_problem), size=(draws, len(per_problem)))
    return float(per_problem[samples].mean(1).std())


# ------------------------------------------------------------------------------------------------------------
# Evaluation


async def sample_all(model, tokenizer, prompts, answers, sandbox, rank, world, desc="", n_samples=1,
                     **settings):
    """`generate` with the prompts dealt out over the ranks; every rank gets all trajectories, prompt-major,
    with `correct` set. settings go to `generate`.

    The noise is keyed by the prompt's global index, so the number of ranks changes nothing but rounding. Each
    response is judged once, on the rank that sampled it: a verdict of math-verify has a time limit, and ranks
    must not disagree.
    """
    mine = range(rank, len(prompts), world)
    with tqdm(total=len(mine) * n_samples, desc=desc, disable=rank > 0 or not desc, leave=False,
              mininterval=1.0) as bar:
        trajectories = await generate(model, tokenizer, [prompts[i] for i in mine], sandbox,
                                      n_samples=n_samples, prompt_keys=list(mine), progress=bar.update,
                                      **settings)
    for t in trajectories:
        t.prompt_index = mine[t.prompt_index]
    verdicts = await asyncio.gather(*[is_correct(t, tokenizer, answers[t.prompt_index], sandbox)
                                      for t in trajectories])
    for t, verdict in zip(trajectories, verdicts):
        t.correct = verdict
    gathered = [None] * world
    dist.all_gather_object(gathered, trajectories)
    return sorted((t for part in gathered for t in part), key=lambda t: (t.prompt_index, t.sample_index))


async def evaluate(model, tokenizer, problems, template, sandbox, rank, world, desc, max_prompt_tokens,
                   **settings):
    """avg@n over problems ({"question", "answer", "family"}): (metrics, trajectories).

    Over-long prompts are skipped and counted; UserError if none remain. settings go to `generate`.
    """
    prompts = [encode_prompt(tokenizer, template, p["question"]) for p in problems]
    fits = [i for i, prompt in enumerate(prompts) if len(prompt) <= max_prompt_tokens]
    if not fits:
        raise UserError(f"{desc}: every prompt is longer than --max_prompt_tokens {max_prompt_tokens}")
    skipped = len(problems) - len(fits)
    problems, prompts = [problems[i] for i in fits], [prompts[i] for i in fits]
    # step -1: noise of its own, the same before and after training
    trajectories = await sample_all(model, tokenizer, prompts, [p["answer"] for p in problems], sandbox, rank,
                                    world, desc, step=-1, **settings)
    metrics = rollout_metrics(trajectories) | {"problems": len(problems), "skipped_long": skipped}
    per_problem, by_family = {}, {}
    for t in trajectories:
        if t.finish_reason != "sandbox_error":
            per_problem.setdefault(t.prompt_index, []).append(t.correct)
            by_family.setdefault(problems[t.prompt_index]["family"], []).append(t)
    metrics["accuracy_error"] = bootstrap_error([np.mean(v) for v in per_problem.values()])
    metrics["families"] = {name: {"accuracy": mean([t.correct for t in found]),
                                  "code_ratio": mean([bool(t.tool_calls) for t in found]),
                                  "count": len(found)} for name, found in sorted(by_family.items())}
    trivial = {family.__name__ for family in TRIVIAL}
    for name, wanted in (("trivial", True), ("needed", False)):
        metrics[f"code_ratio_{name}"] = mean([bool(t.tool_calls) for family, found in by_family.items()
                                              if (family in trivial) == wanted for t in found])
    return metrics, trajectories


def percent(value):
    return "-" if value is None else f"{100 * value:.1f}"


def markdown(header, rows):
    return "\n".join("| " + " | ".join(cells) + " |"
                     for cells in [header, ["---"] * len(header), *rows]).replace("| --- ", "|---")


def evaluation_table(results):
    """Markdown table of {name: metrics}."""
    columns = {"problems": lambda m: str(m["problems"]), "skipped": lambda m: str(m["skipped_long"]),
               "accuracy %": lambda m: f"{percent(m['accuracy'])} +- {percent(m['accuracy_error'])}",
               "code %": lambda m: percent(m["code_ratio"]),
               "code % needed / trivial":
                   lambda m: f"{percent(m['code_ratio_needed'])} / {percent(m['code_ratio_trivial'])}",
               "snippets": lambda m: f"{m['snippets_per_response']:.2f}",
               "last runs % right / wrong":
                   lambda m: f"{percent(m['pass_last_correct'])} / {percent(m['pass_last_incorrect'])}",
               "tokens": lambda m: f"{m['response_tokens']:.0f}",
               "truncated %": lambda m: percent(m["truncated"])}
    return markdown(["", *columns], [[name, *(show(metrics) for show in columns.values())]
                                     for name, metrics in results.items()])


def runs_table(runs):
    """Markdown table: mean and range over run folders of every evaluation in their metrics.jsonl, and of the
    wall time."""
    values = {}
    for run in runs:
        try:
            rows = [json.loads(line) for line in open(f"{run}/metrics.jsonl")]
        except (OSError, ValueError) as error:
            raise UserError(f"--runs {run}: {error}") from None
        if not rows or "seconds_total" not in rows[-1]:
            raise UserError(f"--runs {run}: not a finished run")
        for row in rows:
            if "evaluation" in row:
                for name in ("accuracy", "code_ratio", "code_ratio_needed", "code_ratio_trivial",
                             "response_tokens"):
                    values.setdefault(row["evaluation"], {}).setdefault(name, []).append(row[name])
        values.setdefault("whole run", {}).setdefault("minutes", []).append(rows[-1]["seconds_total"] / 60)

    def show(name, found):
        if None in found:
            return "-"
        scale = 100 if name.startswith(("accuracy", "code")) else 1
        return f"{scale * np.mean(found):.1f} [{scale * min(found):.1f}, {scale * max(found):.1f}]"

    columns = {"accuracy": "accuracy %", "code_ratio": "code %", "code_ratio_needed": "code % where needed",
               "code_ratio_trivial": "code % where trivial", "response_tokens": "tokens",
               "minutes": "minutes"}
    return markdown([f"{len(runs)} runs: mean [min, max]", *columns.values()],
                    [[label, *(show(name, found[name]) if name in found else "" for name in columns)]
                     for label, found in values.items()])


def describe_trajectory(t, tokenizer):
    """A trajectory as a JSON row for people."""
    return {"prompt": tokenizer.decode(t.prompt_ids), "response": tokenizer.decode(t.response_ids),
            "correct": t.correct, "finish_reason": t.finish_reason,
            "tool_statuses": [call.status for call in t.tool_calls],
            "prompt_index": t.prompt_index, "sample_index": t.sample_index}


# ------------------------------------------------------------------------------------------------------------
# Running a script: processes, errors, and the flags that all three scripts share


@contextlib.contextmanager
def distributed():
    """Join torchrun's process group (gloo on CPU, nccl on CUDA); yields (rank, world size, device). Alone, a
    group of one."""
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0",
                        "MASTER_ADDR": "127.0.0.1"}.items():
        os.environ.setdefault(name, value)
    store = dist.HashStore() if "MASTER_PORT" not in os.environ else None
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    elif sys.platform == "linux":
        # glibc gives large blocks back to the kernel at every free, and touching them anew costs a page
        # fault per 4 KB: 18 % of a training step on a virtual machine. M_MMAP_THRESHOLD (-3) and
        # M_TRIM_THRESHOLD (-1) stop that.
        libc = ctypes.CDLL(None)
        libc.mallopt(-3, 1 << 30), libc.mallopt(-1, 2**31 - 1)
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    # Both backends with CUDA: --cpu_offload keeps shards in host memory. Long: the other ranks wait in a
    # collective while rank 0 curates, and for the longest rollout.
    dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", store=store, rank=rank,
                            world_size=world, timeout=timedelta(hours=2))
    try:
        yield rank, world, device
    finally:
        dist.destroy_process_group()


def run_script(main):
    """Run an async main; bad input becomes one line on stderr and a non-zero exit status."""
    try:
        with distributed() as (rank, world, device):
            try:
                asyncio.run(main(rank, world, device))
            except Exception as error:
                if world == 1:
                    raise
                # The other ranks may wait in a collective for ever, and so would an orderly end of the
                # group: leave at once, torchrun ends them.
                print(describe_error(error) or traceback.format_exc(), file=sys.stderr, flush=True)
                os._exit(1)
    except (Exception, KeyboardInterrupt) as error:
        line = describe_error(error)
        if not line:
            raise
        sys.exit(line)


def describe_error(error):
    """One line for what the user or the machine has to change, None for a bug."""
    # the latter two: a loss that is not finite; a path or a disk (a TimeoutError has no errno)
    if isinstance(error, (UserError, FloatingPointError)) or (
            isinstance(error, OSError) and error.errno):
        return f"error: {error}"
    return "interrupted" if isinstance(error, KeyboardInterrupt) else None


def all_sum(value, device):
    """The sum of a number over all ranks."""
    total = torch.tensor(value, dtype=torch.float64, device=device)
    dist.all_reduce(total)
    return total.item()


def in_range(low, high=math.inf, kind=float, above=False):
    """An argparse type: a number from low to high; above: low itself is too low."""
    def parse(text):
        value = kind(text)
        if not low <= value <= high or (above and value == low):
            limits = f"above {low}" if above else f"at least {low}"
            limits += f" and at most {high}" if high < math.inf else ""
            raise argparse.ArgumentTypeError(f"{text}: must be {limits}")
        return value

    parse.__name__ = kind.__name__  # what argparse calls it where the text is no number
    return parse


def at_least(low):
    return in_range(low, kind=int)


def add_rollout_arguments(parser):
    """Limits of a rollout, shared by eval.py and ppo.py."""
    add = parser.add_argument_group("rollouts").add_argument
    add("--tools", choices=("on", "off"), default="on",
        help="off: tags mean nothing, nothing is run (the text-only baseline)")
    add("--max_prompt_tokens", type=at_least(1), default=512,
        help="longer prompts are skipped and counted; public recipes: 2048")
    add("--max_response_tokens", type=at_least(1), default=320,
        help="response limit, interpreter text included; public recipes: 16384")
    add("--max_calls", type=at_least(0), default=4, help="snippets per response; public recipes: 8")
    add("--n_slots", type=at_least(1), default=128, help="rows in the KV cache at the same time")
    add("--kv_gib", type=in_range(0.0), default=0.0,
        help="GiB of KV cache per GPU: fewer slots if n_slots would take more; 0: no such limit")
    add("--rejoin_ticks", type=at_least(0), default=4,
        help="decode ticks a snippet takes; 0: as soon as it is done, not reproducible")


def rollout_settings(args):
    return {"max_response_tokens": args.max_response_tokens, "max_calls": args.max_calls,
            "n_slots": args.n_slots, "kv_gib": args.kv_gib, "rejoin_ticks": args.rejoin_ticks,
            "max_interpreter_tokens": args.max_interpreter_tokens, "tools": args.tools == "on"}


def add_format_arguments(parser):
    """The flags of prompts, precision and tool calls, shared by all three scripts."""
    add = parser.add_argument_group("prompts, precision, tool calls").add_argument
    add("--prompt_template", default="plain", help="plain, retool, or a file containing {question}")
    add("--dtype", choices=DTYPES, default="fp32",
        help="what trainer and sampler compute in; master weights and reductions stay fp32")
    add("--max_interpreter_tokens", type=at_least(1), default=128,
        help="interpreter text per call, head + tail; paper does not say")
    add("--sandbox_workers", type=at_least(1), default=2, help="snippets that run at the same time")
    add("--sandbox_timeout", type=in_range(0.0, above=True), default=0.5,
        help="seconds per snippet; raise it for real scripts")
    add("--unsafe_sandbox", action="store_true",
        help="run snippets although a layer of the sandbox is missing: they may then do what this user may")


def make_sandbox(args):
    return Sandbox(workers=args.sandbox_workers, timeout=args.sandbox_timeout, unsafe=args.unsafe_sandbox)


def check_positions(config, args):
    """UserError where prompt + response could exceed the model's positions."""
    wanted, positions = args.max_prompt_tokens + args.max_response_tokens, config.max_position_embeddings
    if wanted > positions:
        raise UserError(f"--max_prompt_tokens + --max_response_tokens is {wanted}, the model has {positions} "
                        "positions")


# ------------------------------------------------------------------------------------------------------------
# The script


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", default="", help="checkpoint folder or hub id")
    add("--runs", nargs="+", default=[],
        help="instead of evaluating: finished run folders of ppo.py to summarise")
    add("--problems", default="test,ood_large,ood_families",
        help="JSONL files or embedded splits, separated by commas")
    add("--limit", type=at_least(1), default=256, help="problems per embedded split; files are used whole")
    add("--samples", type=at_least(1), default=4, help="samples per problem; paper 32")
    add("--temperature", type=in_range(0.0), default=1.0, help="0 is greedy; paper 1.0")
    add("--top_p", type=in_range(0.0, 1.0, above=True), default=1.0, help="nucleus sampling; paper 0.7")
    add("--seed", type=int, default=0, help="seed of the sampling noise and of the embedded problems")
    add("--output", default="",
        help="JSON file for metrics; responses go beside it as JSONL; empty: only the table")
    add_rollout_arguments(parser)
    add_format_arguments(parser)
    args = parser.parse_args()
    if bool(args.model) == bool(args.runs):
        parser.error("give either --model or --runs")
    return args


async def main(rank, world, device):
    args = parse_arguments()
    if args.runs:
        return print(runs_table(args.runs))
    template = load_template(args.prompt_template)
    sets = {name: embedded_rows(name, args.limit, args.seed) if name in SPLITS else load_problems(name)
            for name in args.problems.split(",")}
    tokenizer = load_tokenizer(args.model)
    check_positions(load_config(args.model, tokenizer), args)
    model = load_model(args.model, device, args.dtype)
    results = {}
    responses = open(args.output + ".responses.jsonl" if args.output and rank == 0 else os.devnull, "w")
    async with make_sandbox(args) as sandbox:
        if rank == 0:
            print(sandbox.report)
        for name, problems in sets.items():
            results[name], trajectories = await evaluate(
                model, tokenizer, problems, template, sandbox, rank, world, name, args.max_prompt_tokens,
                n_samples=args.samples, temperature=args.temperature, top_p=args.top_p, seed=args.seed,
                **rollout_settings(args))
            for t in trajectories:
                responses.write(json.dumps(describe_trajectory(t, tokenizer) | {"set": name}) + "\n")
    responses.close()
    if rank == 0:
        print(evaluation_table(results))
        if args.output:
            with open(args.output, "w") as file:
                record = {"arguments": vars(args), "sandbox": sandbox.report, "results": results}
                json.dump(record, file, indent=1)


if __name__ == "__main__":
    run_script(main)
