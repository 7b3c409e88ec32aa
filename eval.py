"""What is right, and how good is it? The judge of answers, metrics of rollouts, evaluation.

    python eval.py --model out/ppo/.../checkpoint              # the embedded test splits
    python eval.py --model DIR --problems aime24.jsonl --samples 32 --top_p 0.7 ...   # as the paper
    python eval.py --model DIR DIR --output OUTPUT             # goes on if interrupted
    torchrun --nproc_per_node 8 eval.py ...                    # spread over eight GPUs
    python eval.py --report out/ppo/seed1 ... --output report.html   # a page of curves, rollouts

The keys of metrics.jsonl. Of responses, without those in which the sandbox itself failed:
  accuracy            share of responses that are correct (avg@n)
  response_tokens     mean length; response_tokens_sampled leaves interpreter text out
  code_ratio          share of responses that executed a snippet
  code_lines          executed per response, no blanks or comments
  pass_last_correct   of correct ones with code, share whose last snippet ran; pass_last_incorrect
  timing_first        start of the first snippet / response length; timing_mean of all snippets
  self_correction     P(the next snippet runs | the previous one failed)
  corrected_share     correct responses with at least one failed snippet
  truncated           share that ended by a limit instead of EOS (never correct)
  snippets_per_response, sandbox_outcomes (snippets by status; ok: the paper's correct codes),
  sandbox_errors_dropped (responses); X_count: what X is a share of
Of collapse, the sampler's mean log-probability: logprob_code_open, logprob_code_close,
  logprob_answer (of <code>, </code>, <answer>), logprob_eos, logprob_after_interpreter (8
  tokens); snippets_refused (ended in a PermissionError)
Of an evaluation: evaluation (set and moment), problems, skipped_long (prompts too long),
  accuracy_error (standard error, bootstrap over problems), sampling_error (within problems),
  pass_at_k (unbiased), maj_at_n (vote by normalised text, ties to the first; without answer, no
  vote), per_problem (n, right ones), families (accuracy, code_ratio, count),
  code_ratio_trivial (unneeded code: families that need no tool), code_ratio_needed (others),
  ood_drop (from eval.py's first set)
Of a step, means over its trainable tokens if nothing else is said: step, update_skipped (1: no
  response was left to train on), reward (sum over a response), entropy of the policy;
  approx_kl, clip_fraction, policy_loss, value_loss, value_clip_fraction, reference_kl as in
  ppo.py's losses; explained_variance of the returns by the critic (1 is perfect);
  grad_norm_actor, grad_norm_critic before clipping, mean over minibatches, null while frozen;
  lr_factor_actor, lr_factor_critic; sampler_difference, sampler_difference_max: |log-probability
  of the sampler - of the trainer|, its mean over snippets: sampler_difference_code, over other
  text before the first call: sampler_difference_prose, after: sampler_difference_after_interpreter;
  rollout_tokens_per_second (sampled), train_tokens_per_second; seconds_rollout, seconds_score,
  seconds_update, seconds_sync, seconds_ratios (of responses that are kept), seconds_checkpoint
  (the save before), tool_wait_seconds (no row could be decoded), seconds_total (the last line)
"""
import argparse
import ast
import asyncio
import contextlib
import ctypes
import functools
import hashlib
import json
import math
import os
import re
import signal
import sys
import traceback
from collections import Counter
from dataclasses import asdict, dataclass
from datetime import timedelta
from fractions import Fraction
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

from data import (SPLITS, TRIVIAL, embedded_rows, encode_prompt, extract_answer, load_problems,
                  load_template)
from rollout import (CODE_CLOSE, CODE_OPEN, DTYPES, ToolCall, Trajectory, choose_dtype, generate,
                     load_config, load_model, load_tokenizer)
from sandbox import Sandbox, UserError

# ------------------------------------------------------------------------------------------------------------
# Answers. math-verify (`Sandbox.equal`) decides about expressions. By itself it takes 37*99 for
# 3663, 3.14159265 for \pi, (1,2) for {1,2}, 10 cm for 10 m, 101_2 for 101_3 and "3 4" for 7.

MAX_LENGTH = 4000                      # characters of an answer
SYMBOLS = {ord('"'): None} | {ord(pair[0]): pair[1:] + " " for pair in (
    r"−- –- ×\cdot ·\cdot *\cdot ÷/ π\pi √\sqrt ∞\infty ≤\le ≥\ge ≠\ne ∪\cup ∈\in ±\pm "
    r"°^\circ").split()}
COMMANDS = dict(pair.split(":") for pair in (
    r"\boxed: \left: \right: \big: \quad: \leq:\le \geq:\ge \neq:\ne \times:\cdot \lvert:| \rvert:| "
    r"\dfrac:\frac \tfrac:\frac \cfrac:\frac \dbinom:\binom \lbrace:\{ \rbrace:\}").split())
NAMES = {"and": ",", "or": ",", "infinity": r"\infty ", "oo": r"\infty ", "percent": r"\%"} | {
    name: f"\\{name} " for name in "pi sqrt sin cos tan log ln exp alpha beta theta".split()}
SHORT_WORDS = set("cm mm km kg mg ml ft lb hr mph th am pm no".split())
# After a number these are no unit: they change it, or take it back.
NO_UNIT = re.compile('"(hundred|thousand|million|billion|trillion|dozen|half|third|quarter|tenth|'
                     'squared|cubed|factorial|no|not|nope|wrong|incorrect|more|less|of)s?"')


def word_or_product(match):
    """A run of letters: a name, a word (in quotes from here on) or a product of letters."""
    text, lower = match[0], match[0].lower()
    is_word = lower in SHORT_WORDS or (len(text) > 2 and set(lower) & set("aeiou"))
    return NAMES.get(lower) or (f'"{text}"' if is_word else text)


def quoted_words(match):
    r"""The content of \text{...} with its words in quotes; m, g, h and s are units there."""
    return " " + re.sub(r"[A-Za-z]{2,}|\b[mghs]\b",
                        lambda word: NAMES.get(word[0], f'"{word[0]}"'), match[1]) + " "


SPELLINGS = [(re.compile(pattern), new) for pattern, new in (
    (r"\\(?:text|mbox|math|operatorname)(?:rm|bf|it|tt|normal)? *\{([^{}]*)\}", quoted_words),
    (r"\\[,;:! ]|~|\s+", " "), (r"\\cdot +\\cdot ", "^"), (r"<=", r"\\le "), (r">=", r"\\ge "),
    (r"\\[A-Za-z]+", lambda match: COMMANDS.get(match[0], match[0])),
    (r"[(\[]? *\\begin\{[pb]?matrix\}", "⟦"), (r"(¶ *)?\\end\{[pb]?matrix\} *[)\]]?", "⟧"),
    (r'(?<![\\A-Za-z"\d])[A-Za-z]{2,}(?!")', word_or_product), (r"[;,][;, ]*", ","),
    (r"\\\$", '"dollar"'), (r'"dollar" *(\d[\d,.]*)', r'\1 "dollar"'), (r"\\?%", '"%"'),
    (r"\^ *\{? *\\circ *\}?", '"degree"'), (r"\\\{ *\\\}|\\varnothing|∅", r"\\emptyset"),
    (r"\\mathbb\{R\}|\\R(?![A-Za-z])", r"(-\\infty,\\infty)"),
    (r"(\d*)\.(\d+)", lambda m: rf"\frac{{{m[1] + m[2]}}}{{1{'0' * len(m[2])}}}"),    # exact
    (r"^((?:(?!\\pm).)*)\\pm((?:(?!\\pm).)*)$", r"\1+\2,\1-\2"),
    # braces around arguments
    (r"([\^_]) *(-?\d+|[A-Za-z])", r"\1{\2}"), (r"\\sqrt *\(([^()]*)\)", r"\\sqrt{\1}"),
    (r"\\sqrt *(\[\d*\])? *(\w)", r"\\sqrt\1{\2}"), (r"\\(frac|binom) *(\w)", r"\\\1{\2}"),
    (r"\\(frac|binom) *(\{[^{}]*\}) *(\w)", r"\\\1\2{\3}"),
    # spaces only where they separate letters, digits or words; no plus that means nothing
    (r" +", " "), (r'(?<![\w"]) | (?![\w"])', ""), (r"(?<![^(\[{,=])\+", ""))]
NUMBER = re.compile(r"(?P<sign>-?) ?(?:(?P<whole>\d+) (?=\d+/))?(?P<top>\d+)"
    r"(?:/(?P<bottom>-?\d+))?(?:(?:\\cdot *10\^|[eE])\{?(?P<exponent>[+-]?\d{1,3})\}?)?")
UNIT = re.compile(r'(.*?[^" ]) *((?:[ /]*"[^"]*"(?:\^\{-?\d\})?)+)')
LABEL = re.compile(r'(?:[A-Z]+|[a-z]|\\(?!not)[a-z]+ ?|(?:"\w+" ?)+)(?:_\{\w+\}|\^\{-1\})?'
                   r"(?:\([A-Za-z,]*\))?(?:=|\\in *(?![a-z]))")
INEQUALITY = re.compile(r"[<>]|\\[lg]e(?![a-z])")
# What math-verify misreads (101_2; "3 4" and (2)3; derivatives), and what is no mathematics
MISREAD = re.compile(r"\d_|[\d)] ?(?<=[ )])\d|\\frac\{d\w*\}\{d\w|[^\w\\+/^(){}\[\]|!=<>,. -]"
                     r"|.{400}", re.ASCII | re.DOTALL)
HARMLESS = set(r"\frac \sqrt \pi \cdot \ln \log \infty \le \ge".split())


def one_spelling(text):
    r"""What LaTeX, Unicode and Python write in many ways, in one: \frac{1}{2}, \cdot, ^{2},
    "words" in quotes, matrices as ⟦a&b¶c&d⟧, no dollar signs around, no thousands commas."""
    text = re.sub(r"\\[()\[\]]", "", text.replace(r"\\", "¶").translate(SYMBOLS))
    text = re.sub(r"(?<=\d)(?:\\,|\{,\}(?:\\!)?|,\\!)(?=\d{3})", ",", text)
    if not re.search(r"[(\[]|\\{", text) or re.search(r",\s", text):    # (1,234) is a pair
        text = re.sub(r"(?<![\d.,])[1-9]\d{0,2}(?:,\d{3})+(?!\d|,\d)",
                      lambda match: match[0].replace(",", ""), text)
    paired = len(re.findall(r"(?<!\\)\$", text)) % 2 == 0               # a lone one is money
    text = re.sub(r"(?<!\\)\$", "" if paired else r"\\$", text)
    for pattern, new in SPELLINGS:
        text = pattern.sub(new, text)
    return text.strip().removesuffix(".")


def without_label(text, other):
    r"""The text without its "x=" or "x\in", where the other has the same label or no "="."""
    label = LABEL.match(text)
    omitted = label and ("=" not in other or other.startswith(label[0]))
    return text.replace(label[0], "") if omitted else text


def without_unit(text):
    """(text, unit): ("5", "cm") of '5"cm"', the unit without the s of a plural."""
    match = UNIT.fullmatch(text)
    if not match or '"' in match[1] or NO_UNIT.search(match[2].lower()):
        return text, ""
    return match[1], re.sub(r'(?<=\w)s?"|[" ]', "", match[2].lower())


def exact_value(text):
    """The Fraction that a text in one spelling stands for, or None."""
    text = re.sub(r"\\frac\{([^{}]*)\}\{([^{}]*)\}", r" \1/\2", text).strip()
    match = NUMBER.fullmatch(text) if len(text) <= MAX_LENGTH else None     # int() has a limit
    if not match or int(match["bottom"] or 1) == 0:
        return None
    fraction = Fraction(int(match["top"]), int(match["bottom"] or 1))
    value = (int(match["whole"] or 0) + fraction) * Fraction(10)**int(match["exponent"] or 0)
    return -value if match["sign"] else value


def top_level_parts(text, separator):
    """(parts, separators): the text split where the regular expression `separator` matches
    outside all brackets. No parts if the brackets do not match."""
    parts, separators, depth = [""], [], 0
    for token in re.split(rf"(\\[{{}}]|[](){{}}[⟦⟧]|{separator})", text):
        depth += (token[-1:] in list("([{⟦")) - (token[-1:] in list(")]}⟧"))
        if depth < 0:
            return [], []
        if depth == 0 and re.fullmatch(separator, token):
            parts.append("")
            separators.append(token)
        else:
            parts[-1] += token
    return (parts, separators) if depth == 0 else ([], [])


def brackets_and_parts(text):
    """("()", ["1", "2"], [","]) of "(1,2)". Where order does not count, in a list, a set and a
    union, the brackets are ""; (5) only groups."""
    parts, separators = top_level_parts(text, r",|\\cup(?![a-z])")
    match = re.fullmatch(r"(\\\{|[(\[{⟦])(.*?)(\\\}|[)\]}⟧])", text)
    inner, inner_separators = top_level_parts(match[2], "[,&¶]") if match else ([], [])
    if separators or not inner:
        return "", parts or [text], separators
    brackets = match[1][-1] + match[3][-1]
    has_order = brackets != "{}" and (brackets != "()" or inner_separators)
    return brackets if has_order else "", inner, inner_separators


async def is_equivalent(predicted, reference, sandbox):
    r"""Whether two answers (texts, or None) mean the same. Numbers are compared exactly (0.333
    is not 1/3), and what still has to be computed (37*99 for 3663, \arctan(1) for \frac{\pi}{4})
    is wrong: a policy could box the question. Brackets and the order in them count. A unit, a percent
    sign or "x=" may be missing on one side (5 cm is 5, but not 5 m; 50% is 50 and 0.5); a list has
    no order and may be a set; words have no case. What cannot be read or judged in time is wrong.
    UserError without math-verify."""
    if any(not text or len(text) > MAX_LENGTH or len(re.findall(r"[(\[{=]", text)) > 100
           for text in (predicted, reference)):
        return False
    predicted, reference = one_spelling(predicted), one_spelling(reference)
    texts = without_label(predicted, reference), without_label(reference, predicted)
    return all(texts) and await means_the_same(*texts, sandbox)


async def means_the_same(predicted, reference, sandbox):
    """`is_equivalent` for texts in one spelling and without a label."""
    if predicted == reference or ('"' in reference and predicted.lower() == reference.lower()):
        return True
    brackets, parts, separators = brackets_and_parts(predicted)
    wanted_brackets, wanted, wanted_separators = brackets_and_parts(reference)
    kinds = [bool(INEQUALITY.search(text)) for text in (predicted, reference)]
    if kinds[0] != kinds[1] and brackets != wanted_brackets:    # x>5 is the interval (5,\infty)
        return await is_same_expression(predicted, reference, sandbox)
    if kinds[0] != kinds[1] or (brackets, separators) != (wanted_brackets, wanted_separators):
        return False
    if (parts, wanted) == ([predicted], [reference]):
        return await is_same_expression(predicted, reference, sandbox)
    for part in parts:
        for candidate in wanted[:1] if brackets else list(wanted):
            if await means_the_same(part, candidate, sandbox):
                wanted.remove(candidate)
                break
        else:
            return False
    return True


async def is_same_expression(predicted, reference, sandbox):
    """Whether two texts are equal as numbers or, to math-verify, expressions or relations."""
    predicted, unit = without_unit(predicted)
    reference, wanted_unit = without_unit(reference)
    if (unit and wanted_unit and unit != wanted_unit) or ("=" in predicted) != ("=" in reference):
        return False
    value, wanted = exact_value(predicted), exact_value(LABEL.sub("", reference, count=1))
    if wanted is not None:
        # CRUCIAL: for a plain number 37*99 is no answer; math-verify would do the arithmetic.
        scale = {"%": 100}
        return value in (wanted, wanted * scale.get(unit, 1) / scale.get(wanted_unit, 1))
    if MISREAD.search(predicted) or MISREAD.search(reference):
        return False
    used, allowed = (set(re.findall(r"\\[A-Za-z]+|!", text)) for text in (predicted, reference))
    return used <= allowed | HARMLESS and await sandbox.equal(predicted, reference)


def stated_answer(trajectory, tokenizer):
    r"""The policy's own final answer; None where it did not end with EOS.

    Only sampled text outside executed snippets, <code> and <interpreter> counts: a \boxed{} in
    a script, printed by one, or in an interpreter block of the policy's own making is no answer.
    """
    if not trajectory.is_complete:
        return None
    # Not by the tags alone: the engine knows which tokens it ran as code, however nested.
    segments = trajectory.prose_segments()
    return extract_answer("\n".join(tokenizer.decode(ids, skip_special_tokens=True) for ids in segments))


# ------------------------------------------------------------------------------------------------------------
# Metrics and evaluation


def code_lines(code):
    return sum(1 for line in code.splitlines() if line.strip() and not line.strip().startswith("#"))


def syntax_tree(code):
    """The tree as text, blind to layout and comments; None where Python reads none."""
    with contextlib.suppress(SyntaxError, ValueError, RecursionError, MemoryError):
        return ast.dump(ast.parse(code))


def computes(code):
    """Whether a snippet does more than print what already stands in it."""
    work = (ast.BinOp, ast.Compare, ast.For, ast.While, ast.comprehension)
    nodes = list(ast.walk(ast.parse(code)))
    called = [getattr(node.func, "id", "") for node in nodes if isinstance(node, ast.Call)]
    return any(isinstance(node, work) for node in nodes) or any(name != "print" for name in called)


def mean(values):
    """Mean of a list; None (JSON null) if it is empty."""
    return float(np.mean(values)) if len(values) else None


def code_ratio(trajectories):
    return mean([bool(t.snippets) for t in trajectories])


def rollout_metrics(trajectories):
    """The metrics of responses that the file's docstring defines, as a flat dict."""
    kept = [t for t in trajectories if t.finish_reason != "sandbox_error"]
    with_code = [t for t in kept if t.tool_calls]
    calls = [call for t in kept for call in t.tool_calls]
    after_failure = [b.status == "ok" for t in kept for a, b in zip(t.tool_calls, t.tool_calls[1:])
                     if a.status != "ok"]
    right, wrong = ([t.tool_calls[-1].status == "ok" for t in with_code if t.correct == verdict]
                    for verdict in (True, False))
    return {
        "accuracy": mean([t.correct for t in kept]), "code_ratio": code_ratio(kept),
        "response_tokens": mean([len(t.response_ids) for t in kept]),
        "response_tokens_sampled": mean([sum(t.loss_mask) for t in kept]),
        "snippets_per_response": mean([len(t.tool_calls) for t in kept]),
        "code_lines": mean([sum(code_lines(c.code) for c in t.snippets) for t in kept]),
        "pass_last_correct": mean(right), "pass_last_correct_count": len(right),
        "pass_last_incorrect": mean(wrong), "pass_last_incorrect_count": len(wrong),
        "timing_first": mean([t.tool_calls[0].start / len(t.response_ids) for t in with_code]),
        "timing_mean": mean([c.start / len(t.response_ids) for t in with_code for c in t.tool_calls]),
        "self_correction": mean(after_failure), "self_correction_count": len(after_failure),
        "corrected_share": mean([any(c.status != "ok" for c in t.tool_calls) for t in kept if t.correct]),
        "truncated": mean([not t.is_complete for t in kept]),
        "sandbox_outcomes": dict(sorted(Counter(call.status for call in calls).items())),
        "sandbox_errors_dropped": len(trajectories) - len(kept)}


def collapse_metrics(trajectories, pieces):
    """Early signs of collapse (arXiv 2509.02479, 2606.26027); pieces: rollout.Pieces."""
    tags = {"code_open": CODE_OPEN, "code_close": CODE_CLOSE, "answer": "<answer>"}
    found = {name: [] for name in (*tags, "eos", "after_interpreter")}
    kept = [t for t in trajectories if t.finish_reason != "sandbox_error"]
    for t in kept:
        texts = [pieces[i] if sampled else "\0" for i, sampled in zip(t.response_ids, t.loss_mask)]
        token_of = [i for i, text in enumerate(texts) for _ in text]  # of each character
        for name, tag in tags.items():
            for match in re.finditer(tag, "".join(texts)):
                found[name] += [t.logprobs[i] for i in set(token_of[slice(*match.span())])]
        for match in re.finditer("(?<=0)1{1,8}", "".join(map(str, t.loss_mask))):
            found["after_interpreter"] += t.logprobs[slice(*match.span())]
        found["eos"] += t.logprobs[-1:] if t.is_complete else []
    refused = [c for t in kept for c in t.tool_calls if re.search(r"(?m)^PermissionError.*\s*\Z", c.output)]
    return {"snippets_refused": len(refused)} | {f"logprob_{k}": mean(v) for k, v in found.items()}


def bootstrap(per_problem, draws=2000):
    """Means over problems drawn with replacement: (draws,)."""
    chosen = np.random.default_rng(0).integers(0, len(per_problem), size=(draws, len(per_problem)))
    return np.asarray(per_problem, dtype=float)[chosen].mean(1)


def majority(votes):
    """Whether the most frequent answer, of several the first, is right. votes: each response's
    (answer, is it right); None does not vote."""
    counts = Counter(answer for answer, _ in votes if answer is not None)
    return bool(counts) and dict(votes)[max(counts, key=counts.get)]


def problem_metrics(votes):
    """pass@k, maj@n and both errors; votes: of each problem, as for `majority`."""
    counts = [(len(v), sum(right for _, right in v)) for v in votes]  # (n, c)
    sampled, most = [pair for pair in counts if pair[0]], max(counts)[0]
    variances = [c / n * (1 - c / n) / (n - 1) for n, c in sampled if n > 1]
    return {
        "accuracy_error": float(bootstrap([c / n for n, c in sampled]).std()),
        "sampling_error": math.sqrt(sum(variances)) / len(variances) if variances else None,
        "pass_at_k": {str(k): mean([1 - math.comb(n - c, k) / math.comb(n, k) for n, c in sampled if n >= k])
                      for k in sorted({most} | {2**i for i in range(most.bit_length())})},
        "maj_at_n": mean([majority(v) for v in votes if v]), "per_problem": counts}


async def sample_all(model, tokenizer, problems, sandbox, process, desc="", n_samples=1, **sampling):
    """`generate` with the problems dealt out over the ranks; every rank gets all trajectories,
    prompt-major, with `correct` set. problems: [{"prompt" (token ids), "answer", "key"}]; the key becomes
    prompt_index and keys the noise: the number of ranks changes only rounding. sampling goes to
    `generate`. Each response is judged by one rank: under math-verify's time limit two might disagree."""
    mine = problems[process.rank::process.world]
    with tqdm(total=len(mine) * n_samples, desc=desc, disable=process.rank > 0 or not desc, leave=False,
              mininterval=1.0) as bar:
        trajectories = await generate(model, tokenizer, [problem["prompt"] for problem in mine], sandbox,
                                      n_samples=n_samples, prompt_keys=[problem["key"] for problem in mine],
                                      progress=bar.update, **sampling)
    for t in trajectories:
        t.answer = stated_answer(t, tokenizer)
    verdicts = await asyncio.gather(*[is_equivalent(t.answer, mine[t.prompt_index]["answer"], sandbox)
                                      for t in trajectories])
    for t, verdict in zip(trajectories, verdicts):
        t.prompt_index, t.correct = mine[t.prompt_index]["key"], verdict
    gathered = [None] * process.world
    dist.all_gather_object(gathered, trajectories)
    return sorted((t for part in gathered for t in part), key=lambda t: (t.prompt_index, t.sample_index))


def encode_problems(problems, tokenizer, template, max_prompt_tokens, name):
    """The problems of the set `name`, each with its index as "key" and its "prompt": token ids, or None
    if too long. UserError if none remain."""
    rows = []
    for key, problem in enumerate(problems):
        prompt = encode_prompt(tokenizer, template, problem["question"])
        rows.append(problem | {"key": key, "prompt": prompt if len(prompt) <= max_prompt_tokens else None})
    if all(row["prompt"] is None for row in rows):
        raise UserError(f"{name}: every prompt is longer than --max_prompt_tokens {max_prompt_tokens}")
    return rows


async def evaluate(model, tokenizer, problems, sandbox, process, desc, sample=None, **sampling):
    """avg@n over problems, as `encode_problems` gives them: (metrics, trajectories), whose prompt_index is
    the problem's. Over-long prompts are skipped and counted. sample: instead of `sample_all`; sampling
    goes to `generate`."""
    fits = [problem for problem in problems if problem["prompt"] is not None]
    # step -1: noise of its own, the same before and after training
    trajectories = await (sample or sample_all)(
        model, tokenizer, fits, sandbox, process, desc, step=-1, **sampling)
    kept = [t for t in trajectories if t.finish_reason != "sandbox_error"]
    if not kept:
        raise UserError(f"{desc}: the sandbox failed in every response")
    votes, families, trivial, needed = [[] for _ in problems], {}, [], []
    for t in kept:
        answer, family = t.answer, problems[t.prompt_index]["family"]
        short = answer and len(answer) <= 200  # patterns take long on some texts
        votes[t.prompt_index].append((one_spelling(answer) if short else answer, t.correct))
        families.setdefault(family, []).append(t)
        (trivial if family in {f.__name__ for f in TRIVIAL} else needed).append(t)
    return rollout_metrics(trajectories) | problem_metrics(votes) | {
        "problems": len(fits), "skipped_long": len(problems) - len(fits),
        "code_ratio_trivial": code_ratio(trivial), "code_ratio_needed": code_ratio(needed),
        "families": {name: {"accuracy": mean([t.correct for t in found]), "count": len(found),
                            "code_ratio": code_ratio(found)} for name, found in sorted(families.items())},
    }, trajectories


def percent(value):
    return "-" if value is None else f"{100 * value:.1f}"


def markdown(header, rows):
    return "\n".join("| " + " | ".join(cells) + " |"
                     for cells in (header, ["---"] * len(header), *rows)).replace("| --- ", "|---")


def evaluation_table(results):
    """Markdown table of {name: metrics}."""
    header = ["", "problems", "skipped", "accuracy %", "pass@n / maj@n %", "code %",
              "code % needed / trivial", "snippets", "last runs % right / wrong", "tokens", "truncated %"]
    return markdown(header, [[
        name, str(m["problems"]), str(m["skipped_long"]),
        f"{percent(m['accuracy'])} +- {percent(m['accuracy_error'])} ({percent(m['sampling_error'])})",
        f"{percent(max(m['pass_at_k'].values()))} / {percent(m['maj_at_n'])}", percent(m["code_ratio"]),
        f"{percent(m['code_ratio_needed'])} / {percent(m['code_ratio_trivial'])}",
        f"{m['snippets_per_response']:.2f}",
        f"{percent(m['pass_last_correct'])} / {percent(m['pass_last_incorrect'])}",
        f"{m['response_tokens']:.0f}", percent(m["truncated"])] for name, m in results.items()])


# Arguments that may differ between runs of one mean: seeds, places, what only changes speed.
NOT_A_SETTING = {"seed", "sft_seed", "run_dir", "warm_start_dir", "resume", "export", "plan", "save_every",
                 "keep_checkpoints", "save_rollouts", "sandbox_workers"}


def report_page(runs):
    """The text of runs/report.html with the files of these run folders in it. Runs that differ
    only in seeds share a group; unfinished ones, or without rollouts.jsonl, are shown too."""
    names = [os.path.basename(os.path.abspath(run)) for run in runs]
    data, groups = [], []
    for run, name in zip(runs, names):
        rows = {"metrics": [], "rollouts": []}
        path = f"{run}/arguments.json"
        try:
            arguments = json.load(open(path))["arguments"]
            for kind in rows:
                path = f"{run}/{kind}.jsonl"
                if kind == "metrics" or os.path.exists(path):
                    # What follows the last newline is still being written; JSON has no NaN.
                    lines = open(path).read().split("\n")[:-1]
                    rows[kind] = [json.loads(line, parse_constant=lambda _: None) for line in lines]
        except (OSError, ValueError, KeyError) as error:
            raise UserError(f"--report {path}: {error}") from None
        settings = {key: value for key, value in arguments.items() if key not in NOT_A_SETTING}
        if settings not in groups:
            groups.append(settings)
        seeds = {key: arguments.get(key) for key in ("seed", "sft_seed")}
        data.append(rows | {"name": name if names.count(name) == 1 else run,
                            "group": groups.index(settings), "arguments": settings | seeds})
    text = json.dumps(data, separators=(",", ":"))  # ASCII: U+2028 and lone surrogates are escaped
    for character in "<>&":  # nothing may end the script element or start a comment
        text = text.replace(character, f"\\u{ord(character):04x}")
    template = open(f"{os.path.dirname(__file__)}/runs/report.html", encoding="utf-8").read()
    return template.replace("__DATA__", text)


def describe_trajectory(t, tokenizer, problem):
    """A trajectory as a JSON row for people and `--report`: the columns after "tokens" have an entry
    per response token, to three digits. problem: the row that it answers."""
    columns = {"logprobs": t.logprobs}
    if t.example:  # its position t speaks of token t + 1
        names = {name: getattr(t.example, name) for name in ("values", "advantages", "ratios")}
        columns |= {name: column[len(t.prompt_ids) - 1:].tolist()
                    for name, column in names.items() if column is not None}
    return {"prompt": tokenizer.decode(t.prompt_ids), "response": tokenizer.decode(t.response_ids),
            "correct": t.correct, "answer": problem["answer"], "family": problem["family"],
            "finish_reason": t.finish_reason, "tool_statuses": [call.status for call in t.tool_calls],
            "prompt_index": t.prompt_index, "sample_index": t.sample_index,
            "calls": [[call.start, call.end] for call in t.tool_calls],
            "codes": [call.code for call in t.tool_calls],
            "tokens": [tokenizer.decode([token]) for token in t.response_ids], "loss_mask": t.loss_mask,
            **{name: [round(x, 3) for x in column] for name, column in columns.items()}}


# ------------------------------------------------------------------------------------------------------------
# Running a script: processes, errors, flags


@dataclass
class Process:
    """This process among those that torchrun started."""
    rank: int
    world: int  # how many there are
    device: torch.device
    goes_on: str = "the same command goes on"  # printed after an interrupt
    deadline: float = math.inf  # of time.monotonic(), from --minutes


@contextlib.contextmanager
def distributed():
    """Join torchrun's process group, or one's own; yields the Process. Of all ranks only the first prints."""
    alone = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
    os.environ.update(alone | os.environ)
    store = dist.HashStore() if "MASTER_PORT" not in os.environ else None
    cuda = torch.cuda.is_available()
    rank, world, local = (int(os.environ[n]) for n in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    device = torch.device("cuda", local) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    elif sys.platform == "linux":
        # Else glibc returns blocks to the kernel at every free, and page faults when they come
        # back cost 18 % of a training step: M_MMAP_THRESHOLD (-3), M_TRIM_THRESHOLD (-1). Larger
        # blocks would leave gaps: a 135M model's heap grew to 16 GiB.
        libc = ctypes.CDLL(None)
        libc.mallopt(-3, 1 << 26), libc.mallopt(-1, 2**31 - 1)
    # gloo with CUDA too: --cpu_offload keeps shards in host memory. Hours: other ranks wait in
    # a collective while rank 0 curates.
    dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", store=store, rank=rank,
                            world_size=world, timeout=timedelta(hours=2))
    try:
        with open(os.devnull, "w") as silence, contextlib.redirect_stdout(silence if rank else sys.stdout):
            yield Process(rank, world, device)
    finally:
        dist.destroy_process_group()


@contextlib.contextmanager
def ended_at_once(process):
    """Ctrl-C and SIGTERM end the process with one line; what is on the disk is whole or not there.
    asyncio's own handler would wait for the next await."""
    def handler(*_):
        if process.rank == 0:
            os.write(2, f"\ninterrupted: {process.goes_on}\n".encode())
        os._exit(130)

    before = {number: signal.signal(number, handler) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, earlier in before.items():
            signal.signal(number, earlier)


def run_script(main):
    """Run an async main; bad input becomes one line on stderr and a non-zero exit status."""
    try:
        with distributed() as process, ended_at_once(process):
            try:
                asyncio.run(main(process))
            except Exception as error:
                if process.world == 1:
                    raise
                # An orderly end would wait for ranks in a collective; torchrun ends those.
                print(describe_error(error) or traceback.format_exc(), file=sys.stderr, flush=True)
                os._exit(1)
    except Exception as error:
        if line := describe_error(error):
            sys.exit(line)
        raise


def describe_error(error):
    """One line for what the user or the machine has to change, None for a bug."""
    # A loss that is not finite; a path or a disk (a TimeoutError is an OSError without errno).
    if isinstance(error, (UserError, FloatingPointError)) or (isinstance(error, OSError) and error.errno):
        return f"error: {error}"


class Help(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """--help with the file's docstring as it is, and all defaults."""


def parse_flags(parser, argv=None):
    """(defaults, given): {flag: value} of all flags, and of those on the command line alone."""
    defaults = vars(parser.parse_args([]))
    nothing_yet = argparse.Namespace(**dict.fromkeys(defaults))  # argparse fills in only what is missing
    values = vars(parser.parse_args(argv, nothing_yet))
    return defaults, {name: value for name, value in values.items() if value is not None}


# The paper's numbers for 32B or, where it is silent, those of public recipes: `ppo.py --preset paper`
PAPER = {"sft_lr": 1e-6, "sft_muon_lr": 0, "sft_steps": 125, "actor_lr": 1e-6, "critic_lr": 2e-6,
         "max_prompt_tokens": 2048, "max_response_tokens": 16384, "sandbox_timeout": 5.0, "steps": 400,
         "prompts_per_step": 1024, "minibatches": 2, "max_calls": 8, "token_budget": 18432,
         "critic_warmup": 20, "lr_floor": 1.0, "rejoin_ticks": 0, "prompt_template": "retool",
         "max_interpreter_tokens": 1024, "eval_samples": 32, "eval_top_p": 0.7}


def need_values(parser, flags, names):
    """The parser's error where one of the names is not among the given flags: the embedded model's
    defaults would train a pretrained one to nothing."""
    missing = [f"--{name} (paper: {PAPER[name]:g})" for name in names if name not in flags]
    if missing:
        parser.error("the defaults are those of the embedded 0.6 M model; give " + ", ".join(missing))


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
    """Limits of a rollout, shared with ppo.py. "recipes": public ones for large models."""
    add = parser.add_argument_group("rollouts").add_argument
    add("--tools", choices=("on", "off"), default="on", help="off: nothing is run (the text-only baseline)")
    add("--max_prompt_tokens", type=at_least(1), default=512, help="longer ones are left out; recipes: 2048")
    add("--max_response_tokens", type=at_least(1), default=320, help="with interpreter text; recipes: 16384")
    add("--max_calls", type=at_least(0), default=4, help="snippets per response; recipes: 8")
    add("--n_slots", type=at_least(1), default=128, help="rows in the KV cache at a time")
    add("--kv_gib", type=in_range(0.0), default=0.0, help="limit of the KV cache in GiB per GPU; 0: none")
    add("--rejoin_ticks", type=at_least(0), default=4,
        help="decode ticks a snippet takes; 0: as soon as it is done, not reproducible")
    add("--feedback", choices=("real", "hidden", "none"), default="real",
        help="between the interpreter tags: the output, only whether it ran, or nothing")
    add("--interpreter", choices=("stateless", "replay"), default="stateless",
        help="replay: a response's earlier snippets that ran are run again in front of each")


def rollout_settings(args):
    """Keyword arguments of `generate`, from the flags above and below."""
    names = ("max_response_tokens max_calls n_slots kv_gib rejoin_ticks max_interpreter_tokens feedback "
             "interpreter").split()
    return {name: getattr(args, name) for name in names} | {"tools": args.tools == "on"}


def add_format_arguments(parser):
    """The flags of prompts, precision and tool calls, shared by all three scripts."""
    add = parser.add_argument_group("prompts, precision, tool calls").add_argument
    add("--prompt_template", default="plain", help="plain, retool, or a file with {question}")
    add("--dtype", type=choose_dtype, choices=DTYPES, default="fp32", metavar="{fp32,bf16,auto}",
        help="of computation; auto: measured; master weights and sums: fp32")
    add("--max_interpreter_tokens", type=at_least(1), default=128, help="per call, head + tail")
    add("--sandbox_workers", type=at_least(1), default=2, help="snippets that run at a time")
    add("--sandbox_timeout", type=in_range(0.0, above=True), default=0.5, help="seconds per snippet")
    add("--unsafe_sandbox", action="store_true",
        help="run snippets without a missing layer: they may do what this user may")


def make_sandbox(args):
    return Sandbox(workers=args.sandbox_workers, timeout=args.sandbox_timeout, unsafe=args.unsafe_sandbox)


def check_positions(config, args):
    """UserError where prompt + response could exceed the model's positions."""
    wanted = args.max_prompt_tokens + args.max_response_tokens
    if wanted > config.max_position_embeddings:
        raise UserError(f"--max_prompt_tokens + --max_response_tokens is {wanted}, the model has "
                        f"{config.max_position_embeddings} positions")


# ------------------------------------------------------------------------------------------------------------
# The script


async def sample_new(journal, chunk, decisive, model, tokenizer, problems, *common, **sampling):
    """`sample_all`, so many problems at a time. Each chunk is a line of the journal, under a hash of
    all that decides it; what is there is not sampled again."""
    trajectories, done = [], [{}]
    journal.seek(0)
    for line in journal:
        with contextlib.suppress(ValueError):  # torn by a kill
            done[0] |= json.loads(line)
    dist.broadcast_object_list(done)
    for part in (problems[begin:begin + chunk] for begin in range(0, len(problems), chunk)):
        recipe = json.dumps([decisive, sampling, part])
        recipe = hashlib.sha256(recipe.encode()).hexdigest()
        if recipe not in done[0]:
            done[0][recipe] = [asdict(t) for t in await sample_all(
                model, tokenizer, part, *common, **sampling)]
            journal.write(f"\n{json.dumps({recipe: done[0][recipe]})}\n")  # ends a torn line first
            journal.flush()
        for row in done[0][recipe]:
            row["tool_calls"] = [ToolCall(**call) for call in row["tool_calls"]]
            trajectories.append(Trajectory(**row))
    return trajectories


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=Help, allow_abbrev=False)
    add = parser.add_argument
    add("--model", nargs="+", default=[], help="checkpoint folders or hub ids")
    add("--report", nargs="+", default=[], help="only make a page of these run folders: --output")
    add("--problems", default="test,ood_large,ood_families", help="JSONL files, hub ids or embedded splits")
    add("--limit", type=at_least(1), default=256, help="problems per embedded split")
    add("--samples", type=at_least(1), default=4, help="samples per problem; paper 32")
    add("--temperature", type=in_range(0.0), default=1.0, help="0 is greedy; paper 1.0")
    add("--top_p", type=in_range(0.0, 1.0, above=True), default=1.0, help="nucleus sampling; paper 0.7")
    add("--seed", type=int, default=0, help="of the sampling noise and of the embedded problems")
    add("--output", default="", help="JSON file for metrics, journal and responses beside it; or the page")
    add("--chunk", type=at_least(1), default=512, help="responses per line of the journal")
    add_rollout_arguments(parser)
    add_format_arguments(parser)
    defaults, given = parse_flags(parser)
    args = argparse.Namespace(**defaults | given)
    if bool(args.model) == bool(args.report):
        parser.error("give either --model or --report")
    if args.report and not args.output:
        parser.error("--report needs --output")
    if set(args.problems.split(",")) - set(SPLITS):
        need_values(parser, given, ["max_prompt_tokens", "max_response_tokens"])
    return args


async def main(process):
    args = parse_arguments()
    if args.report:
        page = report_page(args.report)
        with open(args.output if process.rank == 0 else os.devnull, "w", encoding="utf-8") as file:
            return file.write(page)
    template = load_template(args.prompt_template)
    sets = {name: embedded_rows(name, args.limit, args.seed) if name in SPLITS else load_problems(name)
            for name in args.problems.split(",")}
    tokenizers = {path: load_tokenizer(path) for path in args.model}
    for path, tokenizer in tokenizers.items():
        check_positions(load_config(path, tokenizer), args)
    writes = args.output and process.rank == 0
    journal, responses = (open(args.output + ending if writes else os.devnull, mode)
                          for ending, mode in ((".journal", "a+"), (".responses.jsonl", "w")))
    results = {path: {} for path in tokenizers}
    process.goes_on = "the same command goes on if --output was given"
    async with make_sandbox(args) as sandbox:
        print(sandbox.report)
        for path, found in results.items():
            model, tokenizer = load_model(path, process.device, args.dtype), tokenizers[path]
            weights = [p.detach().view(torch.int16).sum().item() for p in model.parameters()]
            chunk = max(1, args.chunk // args.samples)  # problems per line of the journal
            sample = functools.partial(sample_new, journal, chunk, [weights, args.sandbox_timeout])
            for name, problems in sets.items():
                metrics, trajectories = await evaluate(
                    model, tokenizer, encode_problems(problems, tokenizer, template, args.max_prompt_tokens, name),
                    sandbox, process, f"{path} {name}", sample, n_samples=args.samples,
                    temperature=args.temperature,
                    top_p=args.top_p, seed=args.seed, **rollout_settings(args))
                first = next(iter(found.values()), metrics)
                found[name] = metrics | {"ood_drop": metrics["accuracy"] - first["accuracy"]}
                for t in trajectories if writes else ():
                    row = describe_trajectory(t, tokenizer, problems[t.prompt_index])
                    row |= {"model": path, "set": name}
                    row["tool_seconds"] = [call.seconds for call in t.tool_calls]
                    responses.write(json.dumps(row) + "\n")
            print(f"{path}\n{evaluation_table(found)}")
    responses.close()
    if writes:
        record = {"arguments": vars(args), "sandbox": sandbox.report, "results": results}
        Path(args.output).write_text(json.dumps(record, indent=1))
        print(f"more tables: python runs/results.py {args.output}")


if __name__ == "__main__":
    run_script(main)
