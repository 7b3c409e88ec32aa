"""What is right, and how good is it? The judge of answers, metrics of rollouts, evaluation.

    python eval.py --model out/ppo/.../checkpoint              # the embedded test splits
    python eval.py --model DIR --problems aime24.jsonl --samples 32 --top_p 0.7 ...   # as the paper
    python eval.py --model DIR DIR --output OUTPUT             # goes on if interrupted
    torchrun --nproc_per_node 8 eval.py ...                    # spread over eight GPUs
    python eval.py --report out/ppo/seed1 ... --output report.html   # a page of curves, rollouts
"""
if __name__ == "__main__":
    # The imports below take seconds, in which Ctrl-C is one line, too.
    from sandbox import end_at_interrupt
    end_at_interrupt()

import argparse
import ast
import asyncio
import contextlib
import ctypes
import hashlib
import json
import math
import os
import re
import signal
import sys
import time
import traceback
from collections import Counter
from dataclasses import asdict, dataclass
from datetime import timedelta
from fractions import Fraction
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from safetensors import SafetensorError
from tqdm import tqdm

from data import (
    SPLITS,
    embedded_rows,
    extract_answer,
    load_problems,
    need_source,
)
from rollout import (
    ANSWER_OPEN,
    CODE_CLOSE,
    CODE_OPEN,
    DTYPES,
    HIGHEST,
    QUESTION,
    TEMPLATE_KWARGS,
    Pieces,
    Service,
    ToolCall,
    Trajectory,
    at_least,
    choose_dtype,
    encode_prompt,
    generate,
    in_range,
    json_object,
    load_config,
    load_model,
    load_template,
    load_tokenizer,
    narrowed,
    seed_number,
)
from sandbox import INTERRUPTED, Sandbox, UserError

# --------------------------------------------------------------------------------------------
# Answers. math-verify (`Sandbox.equal`) decides about expressions. By itself it takes (1,2) for
# {1,2}, 10 cm for 10 m, 101_2 for 101_3 and "3 4" for 7.

MAX_LENGTH = 4000  # characters of an answer
MAX_BRACKETS = 100
SYMBOLS = {
    "−": "-",
    "–": "-",
    "×": r"\cdot",
    "·": r"\cdot",
    "*": r"\cdot",
    "÷": "/",
    "π": r"\pi",
    "√": r"\sqrt",
    "∞": r"\infty",
    "≤": r"\le",
    "≥": r"\ge",
    "≠": r"\ne",
    "∪": r"\cup",
    "∈": r"\in",
    "±": r"\pm",
    "°": r"^\circ",
    "½": r"\frac{1}{2}",
    "⅓": r"\frac{1}{3}",
    "⅔": r"\frac{2}{3}",
    "¼": r"\frac{1}{4}",
    "¾": r"\frac{3}{4}",
    "⅕": r"\frac{1}{5}",
    "⅛": r"\frac{1}{8}",
    "⁄": "/",
}
RAISED = "⁰¹²³⁴⁵⁶⁷⁸⁹⁻"  # the digits and the minus sign of an exponent
LOWERED = "₀₁₂₃₄₅₆₇₈₉₋"
ON_THE_LINE = "0123456789-"
COMMANDS = {
    r"\boxed": "",
    r"\fbox": "",
    r"\displaystyle": "",
    r"\textstyle": "",
    r"\bf": "",
    r"\rm": "",
    r"\it": "",
    r"\boldsymbol": "",
    r"\bm": "",
    r"\left": "",
    r"\right": "",
    r"\big": "",
    r"\quad": "",
    r"\leq": r"\le",
    r"\geq": r"\ge",
    r"\leqslant": r"\le",
    r"\geqslant": r"\ge",
    r"\lt": "<",
    r"\gt": ">",
    r"\neq": r"\ne",
    r"\times": r"\cdot",
    r"\lvert": "|",
    r"\rvert": "|",
    r"\dfrac": r"\frac",
    r"\tfrac": r"\frac",
    r"\cfrac": r"\frac",
    r"\dbinom": r"\binom",
    r"\lbrace": r"\{",
    r"\rbrace": r"\}",
    r"\degree": r"^\circ",
    r"\pounds": "£",
    r"\euro": "€",
}
NAMES = {
    "and": ",",
    "or": ",",
    "infinity": r"\infty ",
    "oo": r"\infty ",
    "percent": r"\%",
}
WORDS_OF_LATEX = "pi sqrt sin cos tan log ln exp alpha beta theta".split()
NAMES |= {name: f"\\{name} " for name in WORDS_OF_LATEX}
SHORT_WORDS = set("cm mm km kg mg ml ft lb hr mph th am pm no".split())


def plain_command(match):
    return COMMANDS.get(match[0], match[0])


def word_or_product(match):
    """A name, a word (in quotes from here on) or a product of letters."""
    word = match[0].lower()
    if word in NAMES:
        return NAMES[word]
    if word in SHORT_WORDS or (len(word) > 2 and re.search("[aeiou]", word)):
        return f'"{match[0]}"'
    return match[0]


def quoted_word(match):
    return NAMES.get(match[0], f'"{match[0]}"')


def quoted_words(match):
    r"""The content of \text{...}, where m, g, h and s are units too."""
    return " " + re.sub(r"[A-Za-z]{2,}|\b[mghs]\b", quoted_word, match[1]) + " "


def exact_decimal(match):
    whole, decimals = match.groups()
    power_of_ten = "1" + "0" * len(decimals)
    return rf"\frac{{{whole}{decimals}}}{{{power_of_ten}}}"


# (pattern, replacement), in this order. Above each, what it makes of an example.
SPELLINGS = [
    # \text{cm} -> "cm"
    (r"\\(?:text|mbox|math|operatorname)(?:rm|bf|it|tt|normal)? *\{([^{}]*)\}", quoted_words),
    # {\rm cm} -> "cm"
    (r"\{ *\\(?:bf|rm|it)(?![A-Za-z])([^{}\\]*)\}", quoted_words),
    # 2\,x -> 2 x
    (r"\\[,;:! ]|~|\s+", " "),
    # \cdot \cdot 2 (that was **2) -> ^2
    (r"\\cdot +\\cdot ", "^"),
    # x<=1 -> x\le 1
    (r"<=", r"\\le "),
    # x>=1 -> x\ge 1
    (r">=", r"\\ge "),
    # \dfrac12 -> \frac12
    (r"\\[A-Za-z]+", plain_command),
    # (\begin{matrix}1 -> ⟦1
    (r"[(\[]? *\\begin\{[pb]?matrix\}", "⟦"),
    # 2\end{pmatrix} -> 2⟧
    (r"(¶ *)?\\end\{[pb]?matrix\} *[)\]]?", "⟧"),
    # apples -> "apples"
    (r'(?<![\\A-Za-z"\d])[A-Za-z]{2,}(?!")', word_or_product),
    # 1; 2 -> 1,2
    (r"[;,][;, ]*", ","),
    # \$5 -> "dollar"5, and so for £5 and €5
    (r"\\\$", '"dollar"'),
    (r"£", '"pound"'),
    (r"€", '"euro"'),
    # "dollar"5 -> 5 "dollar"
    (r'"(dollar|pound|euro)" *(\d[\d,.]*)', r'\2 "\1"'),
    # 50\% -> 50"%"
    (r"\\?%", '"%"'),
    # 90^{\circ} -> 90"degree"
    (r"\^ *\{? *\\circ *\}?", '"degree"'),
    # \{\} -> \emptyset
    (r"\\\{ *\\\}|\\varnothing|∅", r"\\emptyset"),
    # \R -> (-\infty,\infty)
    (r"\\mathbb\{R\}|\\R(?![A-Za-z])", r"(-\\infty,\\infty)"),
    # 3.14 -> \frac{314}{100}
    (r"(\d*)\.(\d+)", exact_decimal),
    # 3\pm2 -> 3+2,3-2
    (r"^((?:(?!\\pm).)*)\\pm((?:(?!\\pm).)*)$", r"\1+\2,\1-\2"),
    # x^2 -> x^{2}
    (r"([\^_]) *(-?\d+|[A-Za-z])", r"\1{\2}"),
    # \sqrt(x+1) -> \sqrt{x+1}
    (r"\\sqrt *\(([^()]*)\)", r"\\sqrt{\1}"),
    # \sqrt[3]2 -> \sqrt[3]{2}
    (r"\\sqrt *(\[\d*\])? *(\w)", r"\\sqrt\1{\2}"),
    # \exp(2) -> e^{2}
    (r"(?:\\|(?<=\d))exp *(?:\(([^()]*)\)|\{([^{}]*)\})", r"e^{\1\2}"),
    # \frac12 -> \frac{1}2
    (r"\\(frac|binom) *(\w)", r"\\\1{\2}"),
    # \frac{1}2 -> \frac{1}{2}
    (r"\\(frac|binom) *(\{[^{}]*\}) *(\w)", r"\\\1\2{\3}"),
    # Spaces remain only between letters, digits or words: x + 1 -> x+1
    (r" +", " "),
    (r'(?<![\w"]) | (?![\w"])', ""),
    # +5 -> 5
    (r"(?<![^(\[{,=])\+", ""),
]

# After a number these are no unit: they change it, or take it back.
NO_UNIT = re.compile('"(hundred|thousand|million|billion|trillion|dozen|half|halve|third|quarter|'
                     '(?:fif|six|seven|eigh|nin|ten|twelf|hundred|thousand|million|billion)th|'
                     'squared|cubed|factorial|no|not|nope|wrong|incorrect|more|less|of)s?"')
NUMBER = re.compile(
    r"(?P<sign>-?) ?"
    r"(?:(?P<whole>\d+) (?=\d+/))?"  # 3 of 3 1/2
    r"(?P<top>\d+)"
    r"(?:/(?P<bottom>-?\d+))?"
    r"(?:(?:\\cdot *10\^|[eE])\{?(?P<exponent>[+-]?\d{1,3})\}?)?")
UNIT = re.compile(r'(.*?[^" ]) *((?:[ /]*"[^"]*"(?:\^\{-?\d\})?)+)')
LABEL = re.compile(
    r'(?:[A-Z]+|[a-z]|\\(?!not)[a-z]+ ?|(?:"\w+" ?)+'  # x, \alpha, "area"
    r"|\([a-z](?:_\{\w+\})?(?:,(?:[a-z]|\\[a-z]+)(?:_\{\w+\})?)+\)(?==))"  # (x,y) of (x,y)=(1,2)
    r"(?:_\{\w+\}|\^\{-1\})?"
    r"(?:\([A-Za-z,]*\))?"  # (x) of f(x)
    r"(?:=|\\in *(?![a-z]))")
INEQUALITY = re.compile(r"[<>]|\\[lg]e(?![a-z])")
# What math-verify misreads, and what is no mathematics
MISREAD = re.compile(
    r"\d_"  # 101_2
    r"|[\d)] ?(?<=[ )])\d"  # 3 4 and (2)3
    r"|\\frac\{d\w*\}\{d\w"  # derivatives
    r"|[^\w\\+/^(){}\[\]|!=<>,. -]"
    r"|.{400}", re.ASCII | re.DOTALL)
QUOTED = r""""[^"]*"|'[^']*'"""
LIST_OF_TEXTS = re.compile(rf"\s*\[\s*(?:{QUOTED})(?:\s*,\s*(?:{QUOTED}))*\s*,?\s*\]\s*")
FUNCTION = re.compile(r"\\[A-Za-z]+|!")
HARMLESS = {r"\frac", r"\sqrt", r"\pi", r"\cdot", r"\ln", r"\log", r"\infty", r"\le", r"\ge"}


def without_separators(match):
    """A number without its commas or thin spaces."""
    return re.sub("[,\u2009]", "", match[0])


def one_spelling(text):
    r"""What LaTeX, Unicode and Python write in many ways, in one: \frac{1}{2}, \cdot, ^{2},
    "words" in quotes, matrices as ⟦a&b¶c&d⟧."""
    text = text.replace(r"\\", "¶").replace('"', "")
    for symbol, spelling in SYMBOLS.items():
        text = text.replace(symbol, spelling + " ")

    # \(5\) -> 5
    text = re.sub(r"\\[()\[\]]", "", text)

    # x² -> x^{2}
    for digits, sign in ((RAISED, "^"), (LOWERED, "_")):
        text = re.sub(f"[{digits}]+", rf"{sign}{{\g<0>}}", text)
        text = text.translate(str.maketrans(digits, ON_THE_LINE))

    # 1{,}234 -> 1,234
    text = re.sub(r"(?<=\d)(?:\\,|\{,\}(?:\\! *)?|,\\! *)(?=\d{3})", ",", text)

    # 1234, where a thin or no-break space stands between the thousands
    text = text.replace(r"\thinspace ", "\u2009")
    text = text.replace("\u202f", "\u2009").replace("\u00a0", "\u2009")
    text = re.sub(r"(?<![\d.,])[1-9]\d{0,2}(?:\u2009\d{3})+(?!\d)", without_separators, text)

    # 1,234 -> 1234, but (1,234) is a pair.
    has_brackets = re.search(r"[(\[]|\\{", text)
    if not has_brackets or re.search(r",\s", text):
        text = re.sub(r"(?<![\d.,])[1-9]\d{0,2}(?:,\d{3})+(?!\d|,\d)", without_separators, text)

    # Dollar signs in pairs enclose mathematics; a lone one is money.
    dollars = re.findall(r"(?<!\\)\$", text)
    text = re.sub(r"(?<!\\)\$", r"\\$" if len(dollars) % 2 else "", text)

    for pattern, replacement in SPELLINGS:
        text = re.sub(pattern, replacement, text)
    # = 5 -> 5
    return text.strip().removesuffix(".").removeprefix("=")


def without_label(text, other):
    r"""The text without its "x=" or "x\in", where the other has the same label or no "="."""
    label = LABEL.match(text)
    if label and ("=" not in other or other.startswith(label[0])):
        # Of x=1,x=2 both labels go.
        return re.sub(rf"(?:^|(?<=,)){re.escape(label[0])}", "", text)
    return text


def without_unit(text):
    """(text, unit): ("5", "cm") of '5"cm"', the unit without the s of a plural."""
    match = UNIT.fullmatch(text)
    if not match or '"' in match[1] or NO_UNIT.search(match[2].lower()):
        return text, ""
    unit = re.sub(r'(?<=\w)s?"|[" ]', "", match[2].lower())
    return match[1], unit


def exact_value(text):
    """The Fraction that a text in one spelling stands for, or None."""
    text = re.sub(r"\\frac\{([^{}]*)\}\{([^{}]*)\}", r" \1/\2", text).strip()
    match = NUMBER.fullmatch(text)
    if not match or len(text) > MAX_LENGTH:  # int() has a limit
        return None

    # Sign, whole + top/bottom, times a power of ten.
    bottom = int(match["bottom"] or 1)
    if bottom == 0:
        return None
    value = int(match["whole"] or 0) + Fraction(int(match["top"]), bottom)
    value *= Fraction(10)**int(match["exponent"] or 0)
    return -value if match["sign"] else value


def top_level_parts(text, separator):
    """(parts, separators) of the text, split where the regular expression `separator` matches
    outside brackets; no parts if the brackets do not match."""
    parts = [""]
    separators = []
    depth = 0
    for token in re.split(rf"(\\[{{}}]|[](){{}}[⟦⟧]|{separator})", text):
        if token.endswith(("(", "[", "{", "⟦")):
            depth += 1
        if token.endswith((")", "]", "}", "⟧")):
            depth -= 1
        if depth < 0:
            return [], []

        if depth == 0 and re.fullmatch(separator, token):
            separators.append(token)
            parts.append("")
        else:
            parts[-1] += token
    return (parts, separators) if depth == 0 else ([], [])


def brackets_and_parts(text):
    """("()", ["1", "2"], [","]) of "(1,2)". Where order does not count, in a list, a set and a
    union, the brackets are ""; (5) only groups."""
    parts, separators = top_level_parts(text, r",|\\cup(?![a-z])")
    if separators:
        return "", parts, separators

    # Nothing is separated outside brackets: is all of it inside one pair?
    match = re.fullmatch(r"(\\\{|[(\[{⟦])(.*?)(\\\}|[)\]}⟧])", text)
    if not match:
        return "", [text], []
    parts, separators = top_level_parts(match[2], "[,&¶]")
    if not parts:  # (1)(2): these two brackets are no pair
        return "", [text], []

    brackets = match[1][-1] + match[3][-1]
    if brackets == "{}" or (brackets == "()" and not separators):
        brackets = ""
    return brackets, parts, separators


def acceptable_answers(reference):
    r"""The texts of a list that is written as text, in JSON or Python: ["4", "four"]; else []."""
    if not LIST_OF_TEXTS.fullmatch(reference):
        return []
    try:
        texts = json.loads(reference)
    except ValueError:
        texts = []
    # In JSON, the \f of an unescaped \frac is a control character.
    if texts and "".join(texts).isprintable():
        return texts

    # So it is Python, whose backslashes may be doubled or not.
    texts = [quoted[1:-1] for quoted in re.findall(QUOTED, reference)]
    if "\\" not in reference.replace(r"\\", ""):
        texts = [text.replace(r"\\", "\\") for text in texts]
    return texts


async def is_equivalent(predicted, reference, sandbox):
    """Whether two answers (texts, or None) mean the same.

    Numbers are compared exactly, and what still has to be computed (37*99 for 3663) is wrong: a
    policy could box the question. Brackets count, and the order in them; a list has no order and
    may be a set. A unit, a percent sign or "x=" may be missing on one side (50% is 50 and 0.5).
    Of a reference that is a list of texts, ["4", "four"], any one is right. UserError without
    math-verify.
    """
    for text in (predicted, reference):
        if not text or len(text) > MAX_LENGTH:
            return False
        if len(re.findall(r"[(\[{=]", text)) > MAX_BRACKETS:
            return False

    # A reference may list several texts, of which one has to match.
    answers = acceptable_answers(reference)
    if answers:
        for answer in answers:
            if await is_equivalent(predicted, answer, sandbox):
                return True
        return predicted == reference

    # Both in one spelling, without a label that says nothing.
    predicted = one_spelling(predicted)
    reference = one_spelling(reference)
    predicted_value = without_label(predicted, reference)
    reference_value = without_label(reference, predicted)
    if not predicted_value or not reference_value:
        return False
    return await means_the_same(predicted_value, reference_value, sandbox)


async def means_the_same(predicted, reference, sandbox):
    """`is_equivalent` for texts in one spelling and without a label."""
    if predicted == reference:
        return True
    if '"' in reference and predicted.lower() == reference.lower():
        return True

    # An inequality can only be another one, or an interval.
    brackets, parts, separators = brackets_and_parts(predicted)
    wanted_brackets, wanted_parts, wanted_separators = brackets_and_parts(reference)
    is_inequality = bool(INEQUALITY.search(predicted))
    if is_inequality != bool(INEQUALITY.search(reference)):
        if brackets == wanted_brackets:
            return False
        # x>5 is the interval (5,\infty)
        return await is_same_expression(predicted, reference, sandbox)

    # Parts are compared one by one, with their order if brackets keep it.
    if brackets != wanted_brackets or separators != wanted_separators:
        return False
    if parts == [predicted] and wanted_parts == [reference]:
        return await is_same_expression(predicted, reference, sandbox)
    if not brackets:
        return await match_without_order(parts, wanted_parts, sandbox)
    for part, wanted_part in zip(parts, wanted_parts):
        if not await means_the_same(part, wanted_part, sandbox):
            return False
    return True


async def match_without_order(parts, wanted_parts, sandbox):
    """Whether each part means the same as a wanted part of its own."""
    remaining = list(wanted_parts)
    for part in parts:
        partner = None
        for candidate in remaining:
            if await means_the_same(part, candidate, sandbox):
                partner = candidate
                break
        if partner is None:
            return False
        remaining.remove(partner)
    return True


async def is_same_expression(predicted, reference, sandbox):
    """Whether two texts are equal as numbers or, to math-verify, expressions or relations."""
    # Units may be missing on one side, but not differ.
    predicted, unit = without_unit(predicted)
    reference, wanted_unit = without_unit(reference)
    if unit and wanted_unit and unit != wanted_unit:
        return False
    if ("=" in predicted) != ("=" in reference):
        return False

    # Where the reference is a number, the answer must be one.
    value = exact_value(predicted)
    wanted = exact_value(without_label(reference, ""))
    if wanted is not None:
        # CRUCIAL: 37*99 is no answer; math-verify would do the arithmetic.
        scaled = wanted
        if unit == "%":
            scaled *= 100
        if wanted_unit == "%":
            scaled /= 100
        return value in (wanted, scaled)

    # math-verify sees only what it reads rightly, without a function that would do the work.
    if MISREAD.search(predicted) or MISREAD.search(reference):
        return False
    allowed = HARMLESS | set(FUNCTION.findall(reference))
    if not set(FUNCTION.findall(predicted)) <= allowed:
        return False
    return await sandbox.equal(predicted, reference)


def stated_answer(trajectory, tokenizer):
    r"""The policy's own final answer; None where it did not end with EOS. Only sampled text outside
    executed snippets, <code> and <interpreter> counts: a \boxed{} that a script holds or prints is
    no answer."""
    if not trajectory.is_complete:
        return None
    # Not by the tags alone: the engine knows which tokens it ran as code, however nested.
    text = ""
    for token_ids in trajectory.prose_segments():
        text += tokenizer.decode(token_ids, skip_special_tokens=True) + "\n"
    return extract_answer(text)


# --------------------------------------------------------------------------------------------
# Metrics

# What each key of metrics.jsonl means; results/metrics.md is made from it
METRICS = {
    # Of responses, without those lost to sandbox failures
    "accuracy": "share of correct responses (avg@n)",
    "code_ratio": "share of responses with a snippet",
    "accuracy_with_call": "share of correct ones among responses with a snippet",
    "accuracy_without_call": "share of correct ones among responses without",
    "response_tokens": "mean response length",
    "response_tokens_sampled": "mean length without interpreter text",
    "snippets_per_response": "mean number of calls",
    "code_lines": "executed lines of code per response",
    "pass_last_correct": "share of correct responses' last snippets that ran",
    "pass_last_correct_count": "correct responses with code",
    "pass_last_incorrect": "share of wrong responses' last snippets that ran",
    "pass_last_incorrect_count": "wrong responses with code",
    "timing_first": "start of the first snippet / response length",
    "timing_mean": "mean over snippets of start / response length",
    "retry_busy": "share of busy calls that another follows, where one is left",
    "retry_busy_count": "busy calls after which one is left",
    "accuracy_after_retry": "share of retried busy calls whose response is correct",
    "self_correction": "share of failed snippets whose next one, busy calls apart, ran",
    "self_correction_count": "failed snippets, not busy ones",
    "corrected_share": "share of correct responses with a failed snippet",
    "truncated": "share of responses cut off by a limit",
    "sandbox_outcomes": "snippets by status; ok: the paper's correct codes",
    "sandbox_errors_dropped": "responses lost to sandbox failures",

    # Of the embedded problems' behaviours
    "right_script": "share of first scripts that print the answer, where one of two does not",
    "right_script_count": "responses with a script to such problems",
    "second_script": "right_script in families where only the first script can fail",
    "second_script_count": "responses with a script to such problems",
    "script_by_problem": "right_script in families where either script can fail",
    "script_by_problem_count": "responses with a script to such problems",
    "copied_script": "share of scripts that are those of traces, with this problem's numbers",
    "self_correction_silent": "share of scripts with a wrong answer before one with the right",
    "self_correction_silent_count": "scripts with a wrong answer",
    "search_solved": "accuracy of searches with a call",
    "search_solved_count": "searches with a call",
    "middle_probe": "share of questions in the middle half, where five or more numbers are left",
    "middle_probe_count": "such questions",

    # Of collapse
    "snippets_refused": "snippets ended by a PermissionError",
    "logprob_code_open": "mean log-probability of `<code>`",
    "logprob_code_close": "mean log-probability of `</code>`",
    "logprob_answer": "mean log-probability of `<answer>`",
    "logprob_eos": "mean log-probability of EOS",
    "logprob_after_interpreter": "mean log-probability of 8 tokens after an output",

    # Of an evaluation
    "evaluation": "set of problems and moment",
    "accuracy_error": "standard error of accuracy (bootstrap over problems)",
    "sampling_error": "standard error of accuracy within problems",
    "pass_at_k": "share of problems solved in k responses (unbiased)",
    "maj_at_n": "accuracy of each problem's most frequent answer",
    "per_problem": "responses and correct ones of each",
    "problems": "number of problems",
    "skipped_long": "problems with too long prompts",
    "code_ratio_trivial": "code_ratio of families in which a model is right by hand",
    "code_ratio_needed": "code_ratio of other families",
    "families": "the same of each family: accuracy, calls, accuracy with and without a call",
    "ood_drop": "accuracy minus that of eval.py's first set: below 0 is a drop",

    # Of a step, by default means over its trainable tokens
    "step": "PPO step, from 0",
    "update_skipped": "1: no response to train on",
    "uniform_dropped": "responses left out by --drop_uniform",
    "reward": "mean over responses of the sum of their rewards",
    "entropy": "mean entropy of the policy",
    "approx_kl": "KL from the policy before the update",
    "clip_fraction": "share of tokens without gradient",
    "policy_loss": "clipped surrogate",
    "value_loss": "clipped squared error",
    "value_clip_fraction": "share of clipped values",
    "reference_kl": "KL from the policy at the start",
    "explained_variance": "of the returns, by the critic (at best 1)",
    "grad_norm_actor": "mean norm before clipping, null while frozen",
    "grad_norm_critic": "mean norm before clipping",
    "lr_factor_actor": "learning rate / its peak",
    "lr_factor_critic": "learning rate / its peak",
    "sampler_difference": "mean distance of log-probabilities by sampler and trainer",
    "sampler_difference_max": "maximum of that distance",
    "rollout_tokens_per_second": "sampled tokens",
    "train_tokens_per_second": "tokens of prompts and responses",
    "tool_wait_seconds": "time without a row to decode",
    "seconds_rollout": "sampling and judging",
    "seconds_metrics": "metrics of the responses",
    "seconds_score": "log-probabilities and values",
    "seconds_update": "all minibatches",
    "seconds_sync": "copying weights to the sampler",
    "seconds_ratios": "ratios of kept responses",
    "seconds_checkpoint": "saving the checkpoint before",
    "seconds_total": "the whole run, in the last line",
}
AFTER_INTERPRETER = 8  # tokens
MAX_VOTE = 200  # characters: patterns take long on some texts


def code_lines(code):
    lines = [line.strip() for line in code.splitlines()]
    return len([line for line in lines if line and not line.startswith("#")])


def syntax_tree(code):
    """The tree as text, blind to layout and comments; None where Python reads none."""
    with contextlib.suppress(SyntaxError, ValueError, RecursionError, MemoryError):
        return ast.dump(ast.parse(code))


def computes(code):
    """Whether a snippet does more than print what already stands in it."""
    work = (ast.BinOp, ast.Compare, ast.For, ast.While, ast.comprehension)
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, work):
            return True
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") != "print":
            return True
    return False


def mean(values):
    """Mean of a list; None (JSON null) if it is empty."""
    return float(np.mean(values)) if len(values) else None


def rate(name, cases):
    """A metric that is a share of few cases, and how many they are."""
    return {name: mean(cases), f"{name}_count": len(cases)}


def code_ratio(trajectories):
    return mean([bool(trajectory.snippets) for trajectory in trajectories])


def without_sandbox_errors(trajectories):
    return [trajectory for trajectory in trajectories
            if trajectory.finish_reason != "sandbox_error"]


def rollout_metrics(trajectories, max_calls=math.inf):
    kept = without_sandbox_errors(trajectories)
    with_call = [trajectory for trajectory in kept if trajectory.tool_calls]
    right_with_snippet = [trajectory.correct for trajectory in kept if trajectory.snippets]
    right_without = [trajectory.correct for trajectory in kept if not trajectory.snippets]

    # An entry per response, and per correct one
    lines = []
    had_failure = []
    for trajectory in kept:
        lines.append(sum([code_lines(call.code) for call in trajectory.snippets]))
        if trajectory.correct:
            failed = {call.status for call in trajectory.tool_calls} - {"ok", "busy"}
            had_failure.append(bool(failed))

    # An entry per response with code, per call, per busy one, and per one that failed by itself
    last_ran = {True: [], False: []}  # by correctness
    statuses = Counter()
    starts = []
    first_starts = []
    retried = []
    right_after_retry = []
    corrected = []
    for trajectory in with_call:
        last_ran[trajectory.correct].append(trajectory.tool_calls[-1].status == "ok")
        first_starts.append(trajectory.tool_calls[0].start / len(trajectory.response_ids))
        for number, call in enumerate(trajectory.tool_calls, 1):
            statuses[call.status] += 1
            starts.append(call.start / len(trajectory.response_ids))
            later = [other.status for other in trajectory.tool_calls[number:]]
            if call.status == "busy" and number < max_calls:
                retried.append(bool(later))
                if later:
                    right_after_retry.append(trajectory.correct)
            elif call.status not in ("ok", "busy"):
                answered = [status for status in later if status != "busy"]
                corrected.append(answered[:1] == ["ok"])

    return {
        "accuracy": mean([trajectory.correct for trajectory in kept]),
        "code_ratio": code_ratio(kept),
        "accuracy_with_call": mean(right_with_snippet),
        "accuracy_without_call": mean(right_without),
        "response_tokens": mean([len(trajectory.response_ids) for trajectory in kept]),
        "response_tokens_sampled": mean([sum(trajectory.loss_mask) for trajectory in kept]),
        "snippets_per_response": mean([len(trajectory.tool_calls) for trajectory in kept]),
        "code_lines": mean(lines),
        **rate("pass_last_correct", last_ran[True]),
        **rate("pass_last_incorrect", last_ran[False]),
        "timing_first": mean(first_starts),
        "timing_mean": mean(starts),
        **rate("retry_busy", retried),
        "accuracy_after_retry": mean(right_after_retry),
        **rate("self_correction", corrected),
        "corrected_share": mean(had_failure),
        "truncated": mean([not trajectory.is_complete for trajectory in kept]),
        "sandbox_outcomes": dict(sorted(statuses.items())),
        "sandbox_errors_dropped": len(trajectories) - len(kept),
    }


def words(code):
    return tuple(re.findall(r"[A-Za-z_]+", code))


def behaviour_metrics(trajectories, problems):
    """What a policy does on embedded problems, whose scripts are known. problems: the row of each
    prompt_index. Of responses to other problems nothing is known."""
    right_script = {"two scripts": [], "either one": []}  # by kind
    copied = []
    corrected = []
    solved = []
    in_middle = []
    for trajectory in without_sandbox_errors(trajectories):
        problem = problems[trajectory.prompt_index]
        if "kind" not in problem or not trajectory.snippets:
            continue
        if problem["kind"] == "search":
            solved.append(trajectory.correct)
            in_middle += probes(trajectory.snippets)
            continue

        # Which script was written is seen even if its numbers are miscopied.
        prints_answer = {}
        for code, works in problem["scripts"]:
            prints_answer[words(code)] = works
        if not all(prints_answer.values()):
            first = words(trajectory.snippets[0].code)
            right_script[problem["kind"]].append(prints_answer.get(first, False))

        # Is a script copied right? If it ran and printed something else: does a later one print
        # the answer?
        for number, call in enumerate(trajectory.snippets, 1):
            copied.append(call.code in [code for code, _ in problem["scripts"]])
            if call.status == "ok" and call.output.strip() != problem["answer"]:
                later = [other.output.strip() for other in trajectory.snippets[number:]]
                corrected.append(problem["answer"] in later)

    always_second = right_script["two scripts"]
    by_problem = right_script["either one"]
    return {
        **rate("right_script", always_second + by_problem),
        **rate("second_script", always_second),
        **rate("script_by_problem", by_problem),
        "copied_script": mean(copied),
        **rate("self_correction_silent", corrected),
        **rate("search_solved", solved),
        **rate("middle_probe", in_middle),
    }


def probes(calls):
    """Of each question to a box, while five or more numbers are left: does it leave at least a
    quarter of them, rounded down, on either side?"""
    low, high = 1, HIGHEST
    in_middle = []
    for call in calls:
        question = QUESTION.fullmatch(call.code.strip())
        if not question:
            continue
        guess = int(question[2])
        n_left = high - low + 1
        if n_left >= 5:
            below, above = guess - low, high - guess
            in_middle.append(min(below, above) >= n_left // 4)
        low, high = narrowed(low, high, guess, call.output)
    return in_middle


def collapse_metrics(trajectories, pieces):
    """Early signs of collapse (arXiv 2509.02479, 2606.26027); pieces: rollout.Pieces."""
    tags = {"code_open": CODE_OPEN, "code_close": CODE_CLOSE, "answer": ANSWER_OPEN}
    logprobs = {"code_open": [], "code_close": [], "answer": [], "eos": [], "after_interpreter": []}
    refused = 0
    for trajectory in without_sandbox_errors(trajectories):
        # The sampled text, and of each character its token; a forced token is \0, in no tag.
        text = ""
        token_of = []
        for i, token_id in enumerate(trajectory.response_ids):
            piece = pieces[token_id] if trajectory.loss_mask[i] else "\0"
            text += piece
            token_of += [i] * len(piece)
        for name, tag in tags.items():
            for match in re.finditer(tag, text):
                tokens = set(token_of[match.start():match.end()])
                logprobs[name] += [trajectory.logprobs[i] for i in tokens]

        # The first tokens that are sampled after interpreter text
        since_interpreter = AFTER_INTERPRETER
        for sampled, logprob in zip(trajectory.loss_mask, trajectory.logprobs):
            if not sampled:
                since_interpreter = 0
            elif since_interpreter < AFTER_INTERPRETER:
                logprobs["after_interpreter"].append(logprob)
                since_interpreter += 1

        if trajectory.finish_reason == "eos":
            logprobs["eos"].append(trajectory.logprobs[-1])
        for call in trajectory.tool_calls:
            if re.search(r"(?m)^PermissionError.*\s*\Z", call.output):
                refused += 1

    metrics = {"snippets_refused": refused}
    for name, values in logprobs.items():
        metrics[f"logprob_{name}"] = mean(values)
    return metrics


def bootstrap(per_problem, draws=2000):
    """Means over problems drawn with replacement: (draws,)."""
    n = len(per_problem)
    chosen = np.random.default_rng(0).integers(0, n, size=(draws, n))
    return np.asarray(per_problem, dtype=float)[chosen].mean(1)


def majority(votes):
    """Whether the most frequent answer, of several the first, is right. votes: each response's
    (answer, is it right); None does not vote."""
    counts = Counter([answer for answer, _ in votes if answer is not None])
    if not counts:
        return False
    return dict(votes)[max(counts, key=counts.get)]


def pass_at_k(n, c, k):
    """P(one of k responses is right), drawn from n with c right ones (arXiv 2107.03374)."""
    return 1 - math.comb(n - c, k) / math.comb(n, k)


def problem_metrics(votes):
    """pass@k, maj@n and both errors; votes: of each problem, as for `majority`."""
    per_problem = []  # (n responses, c right ones)
    for problem_votes in votes:
        verdicts = [right for _, right in problem_votes]
        per_problem.append((len(verdicts), verdicts.count(True)))
    sampled = [(n, c) for n, c in per_problem if n]

    # The variance of each problem's share of right responses
    variances = [c / n * (1 - c / n) / (n - 1) for n, c in sampled if n > 1]
    sampling_error = None
    if variances:
        sampling_error = math.sqrt(sum(variances)) / len(variances)

    # Powers of two, and the largest number of responses
    most = max([n for n, _ in per_problem])
    ks = {most}
    ks.update([2**i for i in range(most.bit_length())])
    pass_rates = {}
    for k in sorted(ks):
        pass_rates[str(k)] = mean([pass_at_k(n, c, k) for n, c in sampled if n >= k])

    return {
        "accuracy_error": float(bootstrap([c / n for n, c in sampled]).std()),
        "sampling_error": sampling_error,
        "pass_at_k": pass_rates,
        "maj_at_n": mean([majority(problem_votes) for problem_votes in votes if problem_votes]),
        "per_problem": per_problem,
    }


# --------------------------------------------------------------------------------------------
# Evaluation


async def sample_all(model, tokenizer, problems, sandbox, process, desc="", n_samples=1,
                     **sampling):
    """`generate` with problems dealt out over the ranks; every rank gets all trajectories,
    prompt-major, with `correct` set. problems: [{"prompt" (token ids), "answer", "key"}]; the key
    becomes prompt_index and keys the noise: the number of ranks changes only rounding."""
    mine = problems[process.rank::process.world]
    silent = process.rank > 0 or not desc
    total = len(mine) * n_samples
    with tqdm(total=total, desc=desc, disable=silent, leave=False, mininterval=1.0) as bar:
        trajectories = await generate(
            model,
            tokenizer,
            [problem["prompt"] for problem in mine],
            sandbox,
            n_samples=n_samples,
            prompt_keys=[problem["key"] for problem in mine],
            progress=bar.update,
            **sampling,
        )

    # One rank judges each response: under math-verify's time limit two might disagree.
    judgements = []
    for trajectory in trajectories:
        trajectory.answer = stated_answer(trajectory, tokenizer)
        reference = mine[trajectory.prompt_index]["answer"]
        judgements.append(is_equivalent(trajectory.answer, reference, sandbox))
    verdicts = await asyncio.gather(*judgements)
    for trajectory, verdict in zip(trajectories, verdicts):
        trajectory.prompt_index = mine[trajectory.prompt_index]["key"]
        trajectory.correct = verdict

    by_rank = [None] * process.world
    dist.all_gather_object(by_rank, trajectories)
    gathered = sum(by_rank, [])
    return sorted(gathered, key=lambda trajectory: (
        trajectory.prompt_index, trajectory.sample_index))


def encode_problems(problems, tokenizer, template, max_prompt_tokens, name):
    """The problems of the set `name`, each with its index as "key" and its "prompt": token ids,
    or None if too long. UserError if none remain."""
    encoded = []
    for key, problem in enumerate(problems):
        prompt = encode_prompt(tokenizer, template, problem["question"])
        if len(prompt) > max_prompt_tokens:
            prompt = None
        encoded.append(problem | {"key": key, "prompt": prompt})
    if all(problem["prompt"] is None for problem in encoded):
        raise UserError(
            f"{name}: every prompt is longer than --max_prompt_tokens {max_prompt_tokens}")
    return encoded


FAMILY_METRICS = (
    "accuracy",
    "code_ratio",
    "snippets_per_response",
    "accuracy_with_call",
    "accuracy_without_call",
)


async def evaluate(model, tokenizer, problems, sandbox, process, desc, sample=None, **sampling):
    """avg@n over problems, as `encode_problems` gives them: (metrics, trajectories).
    sample: instead of `sample_all`. UserError if nothing ran."""
    fits = [problem for problem in problems if problem["prompt"] is not None]
    sample = sample or sample_all
    # step -1: noise of its own, the same before and after training
    trajectories = await sample(
        model, tokenizer, fits, sandbox, process, desc, step=-1, **sampling)
    kept = without_sandbox_errors(trajectories)
    if not kept:
        raise UserError(f"{desc}: the sandbox failed in every response")

    # Answers by problem, and responses by family.
    votes = [[] for _ in problems]
    by_family = {}
    for trajectory in kept:
        answer = trajectory.answer
        if answer and len(answer) <= MAX_VOTE:
            answer = one_spelling(answer)
        votes[trajectory.prompt_index].append((answer, trajectory.correct))
        family = problems[trajectory.prompt_index]["family"]
        by_family.setdefault(family, []).append(trajectory)

    # A family is trivial if its problems can be solved by hand.
    families = {}
    trivial = []
    needed = []
    for family, members in sorted(by_family.items()):
        of_members = rollout_metrics(members)
        families[family] = {"count": len(members)}
        for name in FAMILY_METRICS:
            families[family][name] = of_members[name]
        if problems[members[0].prompt_index].get("kind") == "by hand":
            trivial += members
        else:
            needed += members

    metrics = rollout_metrics(trajectories, sampling.get("max_calls", math.inf))
    metrics.update(behaviour_metrics(trajectories, problems))
    metrics.update(problem_metrics(votes))
    metrics["problems"] = len(fits)
    metrics["skipped_long"] = len(problems) - len(fits)
    metrics["code_ratio_trivial"] = code_ratio(trivial)
    metrics["code_ratio_needed"] = code_ratio(needed)
    metrics["families"] = families
    return metrics, trajectories


# --------------------------------------------------------------------------------------------
# Tables, examples and the report page

EXAMPLE_LINES = 40
# Arguments that may differ between runs of one mean: seeds, places, what only changes speed
NOT_A_SETTING = {
    "seed",
    "sft_seed",
    "run_dir",
    "warm_start_dir",
    "resume",
    "export",
    "track",
    "minutes",
    "save_every",
    "sft_save_every",
    "keep_checkpoints",
    "save_rollouts",
    "sandbox_workers",
}


def percent(value):
    return "-" if value is None else f"{100 * value:.1f}"


def markdown(header, rows):
    """A table of texts."""
    lines = ["| " + " | ".join(cells) + " |" for cells in [header, *rows]]
    lines.insert(1, "|---" * len(header) + "|")
    return "\n".join(lines)


def evaluation_cells(m):
    """{column: text} of an evaluation's metrics."""
    return {
        "problems": str(m["problems"]),
        "skipped": str(m["skipped_long"]),
        "accuracy %": f"{percent(m['accuracy'])} +- {percent(m['accuracy_error'])}",
        "pass@n / maj@n %":
            f"{percent(max(m['pass_at_k'].values()))} / {percent(m['maj_at_n'])}",
        "code %": percent(m["code_ratio"]),
        "right given code %": percent(m["accuracy_with_call"]),
        "code % needed / trivial":
            f"{percent(m['code_ratio_needed'])} / {percent(m['code_ratio_trivial'])}",
        "snippets": f"{m['snippets_per_response']:.2f}",
        "last runs % right / wrong":
            f"{percent(m['pass_last_correct'])} / {percent(m['pass_last_incorrect'])}",
        "tokens written": f"{m['response_tokens_sampled']:.0f}",
        "truncated %": percent(m["truncated"]),
    }


def evaluation_table(results):
    """Markdown table of {name: metrics}."""
    rows = []
    for name, m in results.items():
        cells = evaluation_cells(m)
        cells["accuracy %"] += f" ({percent(m['sampling_error'])})"
        rows.append([name, *cells.values()])
    return markdown(["", *cells], rows)


def evaluation_summary(results):
    """`evaluation_table` for the console, in 100 columns: of a long name its end."""
    widths = {
        "problems": 9,
        "accuracy %": 14,
        "code %": 7,
        "right given code %": 7,
        "code % needed / trivial": 17,
        "snippets": 6,
        "tokens written": 7,
    }
    lines = ["set".ljust(32) + " problems    accuracy % code %"
             "  given   needed/trivial calls tokens"]
    for name, m in results.items():
        line = name[-32:].ljust(32)
        cells = evaluation_cells(m)
        for column, width in widths.items():
            line += cells[column].rjust(width)
        lines.append(line)
    return "\n".join(lines)


def example_responses(trajectories, problems, tokenizer):
    """Text for the console: the first right and the first wrong response."""
    examples = {}
    for trajectory in without_sandbox_errors(trajectories):
        examples.setdefault("right" if trajectory.correct else "wrong", trajectory)

    lines = []
    for verdict, trajectory in sorted(examples.items()):
        problem = problems[trajectory.prompt_index]
        text = f"{problem['question']}\n\n{tokenizer.decode(trajectory.response_ids)}"
        shown = text.splitlines()
        if len(shown) > EXAMPLE_LINES:
            shown = shown[:EXAMPLE_LINES] + ["..."]
        lines.append(f"A {verdict} response:")
        for line in [*shown, "", f"reference answer: {problem['answer']}"]:
            # The terminal must not obey a model's control characters.
            visible = [character if character.isprintable() else "?" for character in line]
            lines.append("  | " + "".join(visible))
    return "\n".join(lines)


def read_object(text, **options):
    """The JSON object in a text or bytes; ValueError where there is none."""
    try:
        value = json.loads(text, **options)
    except RecursionError:
        raise ValueError("too many brackets") from None
    if not isinstance(value, dict):
        raise ValueError(f"found {type(value).__name__}, needed is a JSON object")
    return value


def read_jsonl_so_far(path):
    """The rows up to the last newline: what follows is still being written."""
    lines = open(path).read().split("\n")[:-1]
    return [read_object(line, parse_constant=lambda _: None) for line in lines]  # JSON has no NaN


def read_arguments(folder):
    """The flags in a run folder's arguments.json. OSError or ValueError if damaged."""
    record = read_object((Path(folder) / "arguments.json").read_text())
    arguments = record.get("arguments")
    if not isinstance(arguments, dict) or not isinstance(record.get("resumed", []), list):
        raise ValueError("arguments.json is not what a run writes")
    return arguments


def report_page(runs):
    """The text of runs/report.html with the files of these run folders in it. Runs whose flags
    differ only in NOT_A_SETTING share a group."""
    names = [os.path.basename(os.path.abspath(run)) for run in runs]
    shown = []
    groups = []
    for run, name in zip(runs, names):
        rollouts = []
        path = f"{run}/arguments.json"
        try:
            arguments = read_arguments(run)
            path = f"{run}/metrics.jsonl"
            metrics = read_jsonl_so_far(path)
            path = f"{run}/rollouts.jsonl"
            if os.path.exists(path):
                rollouts = read_jsonl_so_far(path)
        except (OSError, ValueError) as error:
            raise UserError(f"--report {path}: {error}") from None

        # Runs with the same settings are one group.
        settings = {key: value for key, value in arguments.items() if key not in NOT_A_SETTING}
        if settings not in groups:
            groups.append(settings)
        seeds = {"seed": arguments.get("seed"), "sft_seed": arguments.get("sft_seed")}
        shown.append({
            "metrics": metrics,
            "rollouts": rollouts,
            "name": name if names.count(name) == 1 else run,
            "group": groups.index(settings),
            "arguments": settings | seeds,
        })

    # ASCII: U+2028 and lone surrogates are escaped.
    text = json.dumps({"meanings": METRICS, "runs": shown}, separators=(",", ":"))
    # Nothing may end the script element or start a comment.
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")

    template = open(f"{os.path.dirname(__file__)}/runs/report.html", encoding="utf-8").read()
    return template.replace("__DATA__", text)


def describe_trajectory(trajectory, tokenizer, problem):
    """A trajectory as a JSON row for people and `--report`. The columns after "tokens" have an
    entry per response token, to three digits. problem: the row that it answers."""
    pieces = Pieces(tokenizer)
    description = {
        "prompt": tokenizer.decode(trajectory.prompt_ids),
        "response": tokenizer.decode(trajectory.response_ids),
        "correct": trajectory.correct,
        "answer": problem["answer"],
        "family": problem["family"],
        "kind": problem.get("kind"),
        "finish_reason": trajectory.finish_reason,
        "tool_statuses": [call.status for call in trajectory.tool_calls],
        "prompt_index": trajectory.prompt_index,
        "sample_index": trajectory.sample_index,
        "calls": [[call.start, call.end] for call in trajectory.tool_calls],
        "codes": [call.code for call in trajectory.tool_calls],
        "tokens": [pieces[token] for token in trajectory.response_ids],
        "loss_mask": trajectory.loss_mask,
    }

    # What the trainer knows of each token, if it was trained on.
    columns = {"logprobs": trajectory.logprobs}
    if trajectory.example:
        columns["values"] = trajectory.example.values
        columns["advantages"] = trajectory.example.advantages
        columns["ratios"] = trajectory.example.ratios

    for name, column in columns.items():
        if isinstance(column, torch.Tensor):
            # Position i of an Example speaks of token i + 1 of prompt and response.
            column = column[len(trajectory.prompt_ids) - 1:].tolist()
        if column is not None:
            description[name] = [round(x, 3) for x in column]
    return description


# --------------------------------------------------------------------------------------------
# Running a script: processes and errors

M_TRIM_THRESHOLD = -1  # of glibc's mallopt
M_MMAP_THRESHOLD = -3
OTHER_RANKS_WAIT = 20  # seconds


@dataclass
class Process:
    """This process among those that torchrun started."""
    rank: int
    world: int  # how many there are
    device: torch.device = torch.device("cpu")  # see `use_device`
    goes_on: str = "the same command goes on"  # printed after an interrupt
    deadline: float = math.inf  # of time.monotonic(), from --minutes
    mesh: object = None  # of the ranks, once sft.py has made it


def keep_freed_memory():
    """Else page faults cost 18 % of a training step. Larger blocks would leave gaps: a 135M
    model's heap grew to 16 GiB."""
    libc = ctypes.CDLL(None)
    libc.mallopt(M_MMAP_THRESHOLD, 2**26)
    libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


@contextlib.contextmanager
def distributed():
    """Join torchrun's process group, or one's own; yields the Process."""
    # Without torchrun
    os.environ.setdefault("RANK", "0")
    os.environ.setdefault("WORLD_SIZE", "1")
    os.environ.setdefault("LOCAL_RANK", "0")
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    store = None if "MASTER_PORT" in os.environ else dist.HashStore()

    # Before CUDA starts: freed segments can be used for other sizes, and pinned memory is not
    # rounded up to powers of two.
    os.environ.setdefault(
        "PYTORCH_ALLOC_CONF", "expandable_segments:True,pinned_max_round_threshold_mb:1")

    process = Process(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]))
    has_gpus = torch.cuda.is_available() and local_world() <= torch.cuda.device_count()
    dist.init_process_group(
        # gloo with CUDA too: --cpu_offload keeps shards in host memory.
        "cpu:gloo,cuda:nccl" if has_gpus else "gloo",
        store=store,
        rank=process.rank,
        world_size=process.world,
        # Other ranks wait in a collective while rank 0 curates, or for the longest rollout.
        timeout=timedelta(days=1),
    )

    if process.rank > 0:  # only the first rank prints
        sys.stdout = open(os.devnull, "w")
    try:
        yield process
    finally:
        process.mesh = None  # it would outlive its group
        dist.destroy_process_group()


def local_world():
    """The number of ranks on this machine; where no launcher says it, of all machines."""
    world = os.environ.get("WORLD_SIZE", "1")
    return int(os.environ.get("LOCAL_WORLD_SIZE", world))


def choose_device(wanted, local_rank, n_ranks, n_gpus, may_use_cpu):
    """"cpu" or "cuda:<local rank>" for --device `wanted`. auto: a GPU if this machine has one for
    each of its ranks. UserError where cuda has too few, or auto has some but too few and may not
    use the CPU."""
    if wanted == "cpu" or (wanted == "auto" and n_gpus == 0):
        return "cpu"
    if n_ranks <= n_gpus:
        return f"cuda:{local_rank}"
    if wanted == "auto" and may_use_cpu:
        return "cpu"
    raise UserError(f"{n_ranks} ranks on this machine, but {n_gpus} GPUs: start at most one "
                    "rank per GPU (--nproc_per_node), or give --device cpu")


def use_device(process, wanted, may_use_cpu, tf32=False):
    """Set the process's device from --device, and how exact it is from --tf32."""
    n_gpus = torch.cuda.device_count()
    device = choose_device(
        wanted, int(os.environ["LOCAL_RANK"]), local_world(), n_gpus, may_use_cpu)
    process.device = torch.device(device)

    if process.device.type == "cuda":
        torch.cuda.set_device(process.device)
        # TF32 is too coarse for the checks of fp32. cuDNN's attention with a mask makes a plan
        # for each shape, and is wrong for few key heads on B200 (pytorch #193893).
        torch.set_float32_matmul_precision("high" if tf32 else "highest")
        torch.backends.cuda.enable_cudnn_sdp(False)
        return
    if wanted == "auto" and n_gpus:
        print(f"on the CPU: {local_world()} ranks, but {n_gpus} GPUs")
    if sys.platform == "linux":
        keep_freed_memory()


@contextlib.contextmanager
def ended_at_once(process):
    """Ctrl-C and SIGTERM end the process with one line; what is on the disk is whole or not
    there. asyncio's own handler would wait for the next await."""
    def handler(signal_number, frame):
        if process.rank == 0:
            os.write(2, f"\ninterrupted: {process.goes_on}\n".encode())
        os._exit(INTERRUPTED)

    interrupt = signal.signal(signal.SIGINT, handler)
    terminate = signal.signal(signal.SIGTERM, handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, interrupt)
        signal.signal(signal.SIGTERM, terminate)


def run_script(main):
    """Run an async main; bad input becomes one line on stderr and a non-zero exit status."""
    with distributed() as process, ended_at_once(process):
        try:
            asyncio.run(main(process))
        except Exception as error:
            line = describe_error(error)
            if line is None and process.world == 1:
                raise
            if line is None:
                print(traceback.format_exc(), file=sys.stderr, flush=True)
            else:
                print_last(line)
            if process.world > 1:
                # An orderly end would wait for ranks in a collective; torchrun ends those.
                os._exit(1)
            sys.exit(1)


def print_last(line):
    """Print an error to stderr. Under torchrun it goes into torchrun's own report, the last thing
    on the screen, and once: rank 0 is first, and torchrun ends the others."""
    if os.environ.get("RANK", "0") != "0":
        time.sleep(OTHER_RANKS_WAIT)
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if not path:
        print(line, file=sys.stderr, flush=True)
        return
    details = {"message": line, "extraInfo": {"timestamp": str(int(time.time()))}}
    Path(path).write_text(json.dumps({"message": details}))


def describe_error(error):
    """One line for what the user or the machine has to change, None for a bug."""
    if isinstance(error, (UserError, FloatingPointError)):  # a loss that is not finite
        return f"error: {error}"
    if isinstance(error, SafetensorError):
        return (f"error: weights cannot be written ({error}): disk full? What was saved before is "
                "whole: --resume, or the same command, writes them again")
    # A path or a disk: a TimeoutError has no errno.
    if isinstance(error, OSError) and error.errno:
        return f"error: {error}"
    return None


# --------------------------------------------------------------------------------------------
# Flags


class FlagParser(argparse.ArgumentParser):
    def error(self, message):
        print_last(f"{self.prog}: error: {message}")
        sys.exit(2)


class Help(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """--help with the file's docstring as it is, and all defaults that say something."""

    def _get_help_string(self, action):
        if action.default is False or action.default in ("", [], None):
            return action.help
        return super()._get_help_string(action)


def parse_flags(parser, argv=None):
    """(defaults, given): {flag: value} of all flags, and of those on the command line alone."""
    defaults = vars(parser.parse_args([]))
    # argparse fills in only what is missing.
    nothing_yet = argparse.Namespace(**dict.fromkeys(defaults))
    values = vars(parser.parse_args(argv, nothing_yet))
    given = {name: value for name, value in values.items() if value is not None}
    return defaults, given


# The paper's numbers for 32B or, where it is silent, those of public recipes:
# `ppo.py --preset paper`
PAPER = {
    "sft_lr": 1e-6,
    "sft_muon_lr": 0,
    "sft_steps": 125,
    "actor_lr": 1e-6,
    "critic_lr": 2e-6,
    "max_prompt_tokens": 2048,
    "max_response_tokens": 16384,
    "sandbox_timeout": 5.0,
    "steps": 400,
    "prompts_per_step": 1024,
    "minibatches": 2,
    "max_calls": 8,
    "token_budget": 18432,
    "critic_warmup": 20,
    "lr_warmup": 0,
    "lr_floor": 1.0,
    "rejoin_ticks": 0,
    "prompt_template": "retool",
    "max_interpreter_tokens": 1024,
    "eval_samples": 32,
    "eval_top_p": 0.7,
}


def need_values(parser, flags, names):
    """The parser's error where a name is not among the given flags."""
    missing = [f"--{name} (paper: {PAPER[name]:g})" for name in names if name not in flags]
    if missing:
        parser.error("the defaults are those of the embedded 0.7 M model; give "
                     + ", ".join(missing))


def add_rollout_arguments(parser):
    """Limits of a rollout, shared with ppo.py."""
    group = parser.add_argument_group("rollouts (recipes: public ones for large models)")
    add = group.add_argument
    add("--tools", choices=("on", "off"), default="on",
        help="off: no code is run (the text-only baseline)")
    add("--max_prompt_tokens", type=at_least(1), default=512,
        help="longer prompts are left out; recipes 2048")
    add("--max_response_tokens", type=at_least(1), default=320,
        help="length of a response with interpreter text; recipes 16384")
    add("--max_calls", type=at_least(0), default=3,
        help="snippets per response; recipes 8")
    add("--n_slots", type=at_least(1), default=128,
        help="responses in the KV cache at a time")
    add("--kv_gib", type=in_range(0.0), default=0.0,
        help="GiB of KV cache per GPU; 0: no limit")
    add("--busy", type=in_range(0.0, 1.0), default=0.3,
        help="probability that the tool of the embedded problems is busy")
    add("--rejoin_ticks", type=at_least(0), default=4,
        help="decode ticks a snippet takes; 0: as soon as it is done, not reproducible")
    add("--feedback", choices=("real", "hidden", "none"), default="real",
        help="what the model sees of a call; hidden: only whether it ran")
    add("--interpreter", choices=("stateless", "replay"), default="stateless",
        help="replay: a response's earlier snippets run again before each")


def rollout_settings(args):
    """Keyword arguments of `generate`."""
    return dict(
        max_response_tokens=args.max_response_tokens,
        max_calls=args.max_calls,
        n_slots=args.n_slots,
        kv_gib=args.kv_gib,
        rejoin_ticks=args.rejoin_ticks,
        max_interpreter_tokens=args.max_interpreter_tokens,
        feedback=args.feedback,
        interpreter=args.interpreter,
        tools=args.tools == "on",
    )


def add_format_arguments(parser):
    """Flags that all three scripts share."""
    add = parser.add_argument_group("prompts, precision, tool calls").add_argument
    add("--prompt_template", default="plain",
        help="plain, retool, or a file with {question}")
    add("--template_kwargs", type=json_object, default="", help=TEMPLATE_KWARGS)
    add("--device", choices=("auto", "cpu", "cuda"), default="auto",
        help="auto: a GPU for each rank of this machine, else the CPU")
    add("--dtype", type=choose_dtype, choices=DTYPES, default="fp32", metavar="{fp32,bf16,auto}",
        help="precision of computation; auto: measured; master weights and sums stay fp32")
    add("--tf32", action="store_true", help="on a GPU, products in fp32 may be rounded to TF32")
    add("--max_interpreter_tokens", type=at_least(1), default=128,
        help="of longer outputs the model sees head and tail")
    add_sandbox_arguments(add, timeout=0.5)


def add_sandbox_arguments(add, timeout):
    add("--sandbox_workers", type=at_least(1), default=2,
        help="snippets that run at a time")
    add("--sandbox_timeout", type=in_range(0.0, 1e6, above=True), default=timeout,
        help="seconds per snippet")
    add("--unsafe_sandbox", action="store_true",
        help="run snippets without a missing layer: they may do what this user may")


def make_sandbox(args):
    return Sandbox(
        workers=args.sandbox_workers,
        timeout=args.sandbox_timeout,
        unsafe=args.unsafe_sandbox,
    )


def check_positions(config, args):
    """UserError where prompt + response could exceed the model's positions."""
    wanted = args.max_prompt_tokens + args.max_response_tokens
    if wanted > config.max_position_embeddings:
        raise UserError(f"--max_prompt_tokens + --max_response_tokens is {wanted}, the model has "
                        f"{config.max_position_embeddings} positions")


def parse_arguments():
    epilog = "metrics:\n"
    for name, meaning in METRICS.items():
        epilog += f"  {name}: {meaning}\n"
    parser = FlagParser(
        usage="python eval.py --model MODEL ... [flags], or --report RUN ... --output PAGE",
        description=__doc__, epilog=epilog, formatter_class=Help, allow_abbrev=False)

    add = parser.add_argument_group("what to evaluate").add_argument
    add("--model", nargs="+", default=[],
        help="checkpoint folders or hub ids")
    add("--report", nargs="+", default=[],
        help="run folders: only write a page of them to --output")
    add("--problems", default="test,ood_large,ood_families",
        help="JSONL files, hub ids or embedded splits")
    add("--limit", type=at_least(1), default=256,
        help="problems per embedded split")
    add("--output", default="",
        help="JSON file of metrics, beside it journal and responses; or the page")
    add("--overwrite", action="store_true",
        help="replace --output even where another command made it")
    add("--chunk", type=at_least(1), default=512,
        help="responses per line of the journal")

    add = parser.add_argument_group("sampling").add_argument
    add("--samples", type=at_least(1), default=4,
        help="samples per problem; paper 32")
    add("--temperature", type=in_range(0.0), default=1.0,
        help="temperature of sampling, 0: greedy; paper 1.0")
    add("--top_p", type=in_range(0.0, 1.0, above=True), default=1.0,
        help="probability mass of nucleus sampling; paper 0.7")
    add("--seed", type=seed_number, default=0,
        help="seed of sampling and of the embedded problems")
    add("--prefill", default="",
        help="text that every response begins with, masked; in bash $'...' may hold \\n")
    add("--after_busy", default="",
        help="text that a response goes on with after a busy call, masked")

    add_rollout_arguments(parser)
    add_format_arguments(parser)

    defaults, given = parse_flags(parser)
    args = argparse.Namespace(**defaults | given)

    if bool(args.model) == bool(args.report):
        parser.error("give either --model or --report")
    if args.report and not args.output:
        parser.error("--report needs --output")
    lengths = ["max_prompt_tokens", "max_response_tokens"]
    files = [name for name in args.problems.split(",") if name not in SPLITS]
    if files and not set(lengths) <= given.keys():
        try:
            for name in files:
                need_source(name)  # a word that is mistyped needs no lengths
        except UserError as error:
            parser.error(f"--problems {error}, nor an embedded split ({', '.join(SPLITS)})")
        need_values(parser, given, lengths)
    return args


# --------------------------------------------------------------------------------------------
# The script


def read_journal(path):
    """{hash: rows} of a journal's whole lines."""
    entries = {}
    with open(path, "rb") as lines:
        for line in lines:
            with contextlib.suppress(ValueError):  # an empty line, or one torn by a kill
                for key, rows in read_object(line).items():
                    if isinstance(rows, list) and all(isinstance(row, dict) for row in rows):
                        entries[key] = rows
    return entries


def add_to_journal(file, key, value):
    line = json.dumps({key: value})
    file.write(f"\n{line}\n")  # the first \n ends a torn line
    file.flush()


@dataclass
class Journal:
    """What has been sampled, so that an interrupted evaluation goes on: a line of JSON per chunk
    of problems, under a hash of all that decides it."""
    file: object
    problems_per_line: int
    decisive: list  # what decides besides problems and sampling

    async def sample(self, model, tokenizer, problems, sandbox, process, desc="", **sampling):
        """`sample_all`, except for what is there already."""
        rows = self.read()
        trajectories = []
        for begin in range(0, len(problems), self.problems_per_line):
            part = problems[begin:begin + self.problems_per_line]
            recipe = json.dumps([self.decisive, sampling, part])
            key = hashlib.sha256(recipe.encode()).hexdigest()
            sampled = trajectories_of(rows.get(key, []))
            if not sampled:
                sampled = await sample_all(
                    model, tokenizer, part, sandbox, process, desc, **sampling)
                add_to_journal(self.file, key, [asdict(trajectory) for trajectory in sampled])
            trajectories += sampled
        return trajectories

    def read(self):
        """{hash: trajectories as dicts}. The file is rank 0's; every rank gets its whole lines."""
        shared = [read_journal(self.file.name)]
        dist.broadcast_object_list(shared)
        return shared[0]


def trajectories_of(rows):
    """Trajectories from dicts; None where they are of another version."""
    try:
        trajectories = []
        for row in rows:
            calls = [ToolCall(**call) for call in row["tool_calls"]]
            trajectories.append(Trajectory(**row | {"tool_calls": calls}))
        return trajectories
    except (TypeError, KeyError):
        return None


def keep_other_output(args, page=""):
    """UserError where --output is there and is neither the result of this same command, which its
    journal makes again, nor an older page."""
    path = Path(args.output)
    if args.overwrite or not path.exists():
        return

    try:
        text = path.read_text(encoding="utf-8")
        if page:
            is_own = text[:200] == page[:200]  # all pages begin alike
        else:
            before = json.loads(text)["arguments"]
            now = json.loads(json.dumps(vars(args)))
            is_own = before | {"overwrite": False} == now
    except (ValueError, KeyError, TypeError):
        is_own = False
    if not is_own:
        raise UserError(f"--output {path}: there already, made by another command; nothing is "
                        "overwritten without --overwrite")


async def main(process):
    args = parse_arguments()
    writes = args.output and process.rank == 0
    if args.report:
        page = report_page(args.report)
        if writes:
            keep_other_output(args, page)
            Path(args.output).write_text(page, encoding="utf-8")
        return

    # What may be wrong is found before a model is loaded.
    if writes:
        keep_other_output(args)
    use_device(process, args.device, may_use_cpu=False, tf32=args.tf32)
    template = load_template(args.prompt_template)
    sets = {}
    for name in args.problems.split(","):
        if name in SPLITS:
            sets[name] = embedded_rows(name, args.limit, args.seed)
        else:
            sets[name] = load_problems(name)

    tokenizers = {path: load_tokenizer(path, args.template_kwargs) for path in args.model}
    for path, tokenizer in tokenizers.items():
        check_positions(load_config(path, tokenizer), args)

    results = {}
    first_set = next(iter(sets))
    process.goes_on = "the same command goes on if --output was given"
    async with make_sandbox(args) as sandbox:
        print(sandbox.report)
        # Only now: a refused start leaves no file, nor an older one empty.
        journal_file = open(f"{args.output}.journal" if writes else os.devnull, "a+")
        responses = open(f"{args.output}.responses.jsonl" if writes else os.devnull, "w")
        for path, tokenizer in tokenizers.items():
            model = None  # the one before makes room
            model = load_model(path, process.device, args.dtype)
            # For the journal: sums of the weights' bits tell checkpoints apart.
            weights = [p.detach().view(torch.int16).sum().item() for p in model.parameters()]
            chunk = max(1, args.chunk // args.samples)
            journal = Journal(journal_file, chunk, [weights, args.sandbox_timeout, args.busy])

            results[path] = {}
            for name, problems in sets.items():
                encoded = encode_problems(
                    problems, tokenizer, template, args.max_prompt_tokens, name)
                tool = Service(sandbox, args.busy) if name in SPLITS else sandbox
                metrics, trajectories = await evaluate(
                    model,
                    tokenizer,
                    encoded,
                    tool,
                    process,
                    desc=f"{path} {name}",
                    sample=journal.sample,
                    n_samples=args.samples,
                    temperature=args.temperature,
                    top_p=args.top_p,
                    seed=args.seed,
                    prefill=args.prefill,
                    after_busy=args.after_busy,
                    **rollout_settings(args),
                )
                results[path][name] = metrics
                metrics["ood_drop"] = metrics["accuracy"] - results[path][first_set]["accuracy"]
                print(f"{path} {name}")
                print(example_responses(trajectories, problems, tokenizer))

                if writes:
                    for trajectory in trajectories:
                        problem = problems[trajectory.prompt_index]
                        row = describe_trajectory(trajectory, tokenizer, problem)
                        row["model"] = path
                        row["set"] = name
                        row["tool_seconds"] = [call.seconds for call in trajectory.tool_calls]
                        responses.write(json.dumps(row) + "\n")
            print(f"{path}\n{evaluation_summary(results[path])}")

    responses.close()
    if writes:
        record = {"arguments": vars(args), "sandbox": sandbox.report, "results": results}
        Path(args.output).write_text(json.dumps(record, indent=1))
        print(f"more tables: python runs/results.py {args.output}")


if __name__ == "__main__":
    run_script(main)
