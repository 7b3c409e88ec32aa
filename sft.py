"""Where does the format come from? Cold-start traces, the warm start on them, and what both trainers share.

`curate` takes rewritings of solutions, whoever wrote them, through the paper's two checks, and through two
the paper lacks:

    1. format verification   tags balanced and ordered, snippets parse, exactly one final answer
    2. execution             every snippet runs in the sandbox; the interpreter text is what really came
                             back, and a quoted result that differs from it rejects the trace (the paper
                             lets an LLM invent these outputs)
    3. answer verification   the final answer equals the reference
    4. quality               (real data) snippets compute what they print, and the text uses it

A snippet that failed stays in its trace, because the text after it corrects it, but the trace says so
(`failed_calls`), and SFT masks it: the model learns to recover from errors, not to make them.

The warm start is a masked next-token loss on these traces. Differences from the paper: (1) the traces were
executed, not only written; (2) snippets that failed are masked, like the interpreter text; (3) sequences are
packed to a token budget, and the loss of a step is the sum over its trainable tokens divided once by their
global number, so that it does not depend on packing, micro-batches or ranks.

    torchrun sft.py                                      # CPU: the embedded warm start, as ppo.py makes it
    torchrun sft.py --model DIR --traces traces.jsonl    # a checkpoint, on your own traces
    torchrun --nproc_per_node 8 sft.py --model ...       # eight GPUs
    python sft.py curate --input gsm8k_train.jsonl --decontaminate gsm8k_test.jsonl --output traces.jsonl
    python sft.py curate --input traces.jsonl --output again.jsonl     # verifies finished traces once more
    python sft.py show traces.jsonl
"""
import argparse
import ast
import asyncio
import functools
import hashlib
import itertools
import json
import math
import os
import random
import re
import shutil
import sys
import time
import zlib
from collections import Counter
from decimal import Decimal
from pathlib import Path

import tokenizers
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import transformers
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2Config

from data import (LAYOUTS, PROMPT_TEMPLATES, boxed, embedded_overlap, embedded_problem, embedded_tokenizer,
                  encode_prompt, extract_answer, field_names, load_problems, load_template, read_jsonl, read_row,
                  read_rows, tool_call)
from eval import (add_format_arguments, all_sum, at_least, describe_error, in_range, is_equivalent,
                  make_sandbox, plain_number, run_script)
from rollout import (CODE_CLOSE, CODE_OPEN, DTYPES, INTERPRETER_CLOSE, INTERPRETER_OPEN, TAG, Policy,
                     break_tags, collate, encode_response, generate, load_config, load_model, load_tokenizer,
                     make_example, pack, split_segments, strip_fence)
from sandbox import Sandbox, UserError

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
    if not await is_equivalent(extract_answer(response), reference, None):
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
        response += tool_call("\n".join(codes), "\n".join(quotes)) + result + "\n"
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
            f"{args.input}: unknown layout; found {field_names(first[0]) if first else 'no rows'}. Name the "
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


def show_traces(args):
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


# ------------------------------------------------------------------------------------------------------------
# Sharding, shared with ppo.py


def add_trainer_arguments(parser):
    add = parser.add_argument_group("trainer").add_argument
    add("--token_budget", type=at_least(1), default=8192, help="tokens per micro-batch and rank")
    add("--activation_checkpointing", action="store_true",
        help="keep only the layers' inputs, compute the rest again in the backward pass")
    add("--cpu_offload", action="store_true", help="weights and optimiser states wait in host memory")
    add("--replicas", type=at_least(1), default=1,
        help="copies of the sharded model, e.g. one per node (hybrid sharding); 1: sharded over all ranks")


def sharding_settings(args):
    """The keyword arguments of `shard`."""
    return {"dtype": args.dtype, "replicas": args.replicas, "cpu_offload": args.cpu_offload,
            "activation_checkpointing": args.activation_checkpointing}


def check_mesh(replicas, world):
    """UserError where the ranks cannot be arranged as so many copies of a sharded model."""
    if world % replicas:
        raise UserError(f"--replicas {replicas} does not divide the {world} ranks")


def shard(module, lm, dtype, replicas, cpu_offload, activation_checkpointing):
    """FSDP2 over `module`, which contains `lm`: each layer is a unit that is gathered when needed, the rest
    belongs to the root. With replicas the ranks form a grid (replicas, shards): hybrid sharding. The module
    may lie in host memory: its units go to the GPU one by one, so that no GPU ever holds all of it.

    Master weights, gradients between ranks and optimiser states are fp32 whatever dtype computes.
    """
    world, kind = dist.get_world_size(), "cuda" if torch.cuda.is_available() else "cpu"
    if replicas > 1:
        mesh = init_device_mesh(kind, (replicas, world // replicas), mesh_dim_names=("replicate", "shard"))
    else:
        mesh = init_device_mesh(kind, (world,))
    if activation_checkpointing:
        lm.train()  # transformers checkpoints in training mode only; no model here has dropout
        lm.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    precision = MixedPrecisionPolicy(DTYPES[dtype], torch.float32)
    offload = CPUOffloadPolicy(pin_memory=kind == "cuda") if cpu_offload else OffloadPolicy()
    for unit in [*lm.model.layers, module]:
        fully_shard(unit, mesh=mesh, mp_policy=precision, offload_policy=offload)
    return module


@torch.no_grad()
def sync_weights(policy, plain):
    """Copy the sharded policy's weights into a plain model, in place (a captured graph over `plain` stays
    valid). All ranks call it; plain may be None on those that want no copy."""
    policy.reshard()  # after a forward without backward the root's weights are still gathered
    sources = dict(policy.lm.named_parameters())
    targets = dict(plain.named_parameters()) if plain else dict.fromkeys(sources)
    assert targets.keys() == sources.keys()
    for name, source in sources.items():
        full = source.full_tensor()
        if plain:
            targets[name].copy_(full)

def cosine(step, steps, warmup, floor=0.0):
    """Learning-rate factor: linear warm-up, then a cosine from 1 down to `floor`."""
    if step < warmup:
        return (step + 1) / warmup
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))

def versions():
    return {
        "python": sys.version.split()[0], "torch": torch.__version__,
        "transformers": transformers.__version__, "tokenizers": tokenizers.__version__
    }


# ------------------------------------------------------------------------------------------------------------
# Checkpoints of a training run. torch.distributed.checkpoint writes the shards, each rank its own, and reads
# them for any other number of ranks; what it lacks is added here: a checkpoint is there as a whole or not at
# all, and a damaged one is recognised.


def zero_moments(optimizer):
    """Give AdamW the moments it would make at its first step. Without them the helpers of torch take a real
    step to make them when saving, and saving would change the run."""
    for group in optimizer.param_groups:
        for p in group["params"]:
            optimizer.state[p] = {"step": torch.zeros((), dtype=torch.float32, device=p.device),
                                  "exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}


def training_state(name, module, optimizer):
    """Every tensor that a step changes, by name: sharded weights and AdamW's moments. Loading writes into
    them in place."""
    module.reshard()  # after a forward without backward the root's weights are still gathered
    state = {}
    for key, p in module.named_parameters():
        state[f"{name}.{key}"] = p.detach()
        state |= {f"{name}.{key}.{moment}": value for moment, value in optimizer.state[p].items()}
    return state


def file_hash(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync_to_disk(path):
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def save_checkpoint(folder, state, record, keep, rank):
    """Write state and record (JSON, with its "step") as folder/step-<step>, then delete all but the last
    `keep`. All ranks call it, on a file system that they share.

    Shards go to a temporary folder and are synced; a manifest with everyone's hashes is the last file; one
    rename makes it a checkpoint. A crash at any moment leaves the ones before untouched. UserError where
    nothing can be written, a full disk for instance.
    """
    partial, final = folder / "partial", folder / f"step-{record['step']:06d}"

    def refuse(error):
        raise UserError(f"checkpoint of step {record['step']} cannot be written ({error}); the ones before "
                        f"it in {folder} are intact")

    def on_rank_0(action):
        error = [None]
        if rank == 0:
            try:
                action()
            except OSError as problem:
                error = [str(problem)]
        dist.broadcast_object_list(error)  # every rank stops, or none
        if error[0]:
            refuse(error[0])

    def begin():
        shutil.rmtree(partial, ignore_errors=True)  # of a run that was killed here
        partial.mkdir(parents=True)

    def publish():
        manifest = record | {"files": {name: digest for part in hashes for name, digest in part.items()}}
        manifest["files"][".metadata"] = file_hash(partial / ".metadata")
        for name in manifest["files"]:
            os.stat(partial / name)  # shards of another node, if the folder is not shared: an error here
        (partial / "manifest.json").write_text(json.dumps(manifest, indent=1))
        sync_to_disk(partial / "manifest.json")
        sync_to_disk(partial)
        shutil.rmtree(final, ignore_errors=True)  # damaged, or of a run that has been wound back
        partial.rename(final)
        sync_to_disk(folder)
        found = sorted(folder.glob("step-*"))
        later = found.index(final) + 1  # damaged ones, which the run has gone back behind
        for old in found[:later][:-keep] + found[later:]:
            shutil.rmtree(old)

    on_rank_0(begin)
    try:
        dcp.save(state, checkpoint_id=partial)
    except CheckpointException as error:  # the same on all ranks
        refuse(f"{str(error).strip().splitlines()[-1]}: disk full?")
    hashes = [None] * dist.get_world_size()
    dist.all_gather_object(hashes, {file.name: file_hash(file) for file in partial.glob(f"__{rank}_*")})
    on_rank_0(publish)


def find_checkpoint(folder):
    """The newest undamaged checkpoint, (path, record); (None, None) if there is none at all, UserError if all
    are damaged. Says which ones it passes over."""
    for path in sorted(folder.glob("step-*"), reverse=True):
        try:
            record = json.loads((path / "manifest.json").read_text())
            damaged = [name for name, digest in record["files"].items() if file_hash(path / name) != digest]
        except (OSError, ValueError, KeyError) as error:
            damaged = [str(error)]
        if not damaged:
            return path, record
        print(f"checkpoint {path} is damaged ({damaged[0]}): going back to the one before", flush=True)
    if any(folder.glob("step-*")):
        raise UserError(f"{folder}: every checkpoint is damaged; delete them to start from the beginning")
    return None, None


# ------------------------------------------------------------------------------------------------------------
# The warm start


def embedded_config(tokenizer):
    """The small Qwen2 of the embedded default: 0.6 M parameters."""
    return Qwen2Config(vocab_size=len(tokenizer), hidden_size=128, num_hidden_layers=3, num_attention_heads=4,
                       num_key_value_heads=2, intermediate_size=320, max_position_embeddings=2048,
                       rope_theta=10000.0, tie_word_embeddings=True, bos_token_id=None,
                       eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)


def starting_point(path):
    """(configuration, tokenizer) of a checkpoint, or of the embedded model if the path is empty."""
    tokenizer = load_tokenizer(path) if path else embedded_tokenizer()
    return load_config(path, tokenizer) if path else embedded_config(tokenizer), tokenizer


def starting_model(path, config, seed):
    """A checkpoint's model, or the embedded one with random weights, in host memory and fp32."""
    if path:
        return load_model(path, "cpu")
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(config, attn_implementation="retool")


def trace_example(trace, tokenizer, template, max_interpreter_tokens):
    """A trace as an Example: prompt, interpreter text and failed snippets are masked."""
    prompt = encode_prompt(tokenizer, template, trace["question"])
    ids, mask = encode_response(tokenizer, trace["response"], max_interpreter_tokens, trace["failed_calls"])
    return make_example(prompt + ids, [0] * len(prompt) + mask)


def batch_loss(policy, batch, token_budget, rank, world, device, backward=False):
    """Mean loss over all trainable tokens of a list of Example, on all ranks; with backward also its
    gradient."""
    total = sum(e.loss_mask.sum().item() for e in batch)
    token_sum = 0.0
    for indices in pack([len(e) for e in batch], token_budget, world)[rank]:
        flat, packing = collate([batch[i] for i in indices], device)
        with torch.set_grad_enabled(backward):
            loss = -policy(flat.input_ids, flat.targets, flat.loss_mask, packing).sum()
        token_sum += loss.item()
        if backward:
            # FSDP averages the ranks' gradients; a factor of world makes that their sum.
            (loss / total * world).backward()
    return all_sum(token_sum, device) / total


def train(policy, examples, held_out, steps, batch_size, lr, warmup, seed, token_budget, rank, world, device,
          log):
    """Train the sharded policy on a list of Example; log(dict) is called every tenth step. Returns the final
    metrics, on held_out and on as many examples."""
    optimizer = torch.optim.AdamW(policy.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.01,
                                  fused=True)
    rng, order, tokens, begin = random.Random(seed), [], 0, time.perf_counter()
    bar = tqdm(range(steps), desc="warm start", disable=rank > 0, mininterval=1.0)
    for step in bar:
        if len(order) < batch_size:  # a new epoch
            order += rng.sample(range(len(examples)), len(examples))
        batch, order = [examples[i] for i in order[:batch_size]], order[batch_size:]
        for group in optimizer.param_groups:
            group["lr"] = lr * cosine(step, steps, warmup)
        loss = batch_loss(policy, batch, token_budget, rank, world, device, backward=True)
        norm = nn.utils.clip_grad_norm_(policy.parameters(), 1.0).full_tensor().item()
        if not math.isfinite(loss + norm):
            raise FloatingPointError(f"warm start step {step}: loss {loss}, gradient norm {norm}")
        optimizer.step()
        optimizer.zero_grad()
        tokens += sum(len(e) for e in batch)
        bar.set_postfix(loss=f"{loss:.4f}")
        if step % 10 == 0 or step == steps - 1:
            log({"step": step, "loss": loss, "grad_norm": norm,
                 "tokens_per_second": tokens / (time.perf_counter() - begin)})
    seen, unseen = (batch_loss(policy, batch, token_budget, rank, world, device)
                    for batch in (examples[:len(held_out)], held_out))
    return {"train_loss": seen, "held_out_loss": unseen, "memorisation_gap": unseen - seen}


def digest(record, files):
    """16 hex digits that change with a JSON-able record and with the content of the files."""
    found = hashlib.sha256(json.dumps([record, versions()]).encode())
    for file in files:
        found.update(Path(file).read_bytes())
    return found.hexdigest()[:16]


def sources(*names):
    return [Path(__file__).parent / name for name in names]


def warm_start_key(args, traces_file=""):
    """Hash of all that decides the result: arguments, data, code, versions. The number of ranks only changes
    rounding."""
    names = ("model", "sft_traces", "code_share", "sft_steps", "sft_batch_size", "sft_lr", "sft_warmup",
             "sft_seed", "token_budget", "dtype", "max_interpreter_tokens", "sandbox_timeout")
    weights = [(file.name, file.stat().st_size, file.stat().st_mtime_ns)  # too large to be read for a hash
               for file in sorted(Path(args.model).glob("*"))] if args.model else []
    record = [{n: getattr(args, n) for n in names}, weights, load_template(args.prompt_template)]
    files = sources("sandbox.py", "rollout.py", "data.py", "eval.py", "sft.py")
    return digest(record, files + [traces_file] * bool(traces_file))


async def cold_start_traces(args):
    """(traces, held-out traces, counts) of the embedded cold start: curated once, then read from a file whose
    name is a hash of what decides them."""
    record = {n: getattr(args, n) for n in ("sft_traces", "code_share", "sft_seed", "sandbox_timeout")}
    key = digest(record, sources("sandbox.py", "rollout.py", "data.py", "eval.py", "sft.py"))
    path = Path(args.warm_start_dir) / f"traces-{key}.json"
    if not path.exists():
        print(f"problems shared with the training split, of 2000 each: {embedded_overlap(args.sft_seed)}")
        async with make_sandbox(args) as sandbox:
            with tqdm(total=args.sft_traces, desc="curation", mininterval=1.0) as bar:
                kept, counts = await embedded_traces(args.sft_traces, args.code_share, args.sft_seed, sandbox,
                                                     progress=bar.update)
            held_out, _ = await embedded_traces(256, args.code_share, args.sft_seed, sandbox, split="test")
        partial = path.with_suffix(f".partial-{os.getpid()}")
        partial.write_text(json.dumps([kept, held_out, counts]))
        partial.rename(path)  # only a finished curation is ever found under its name
    return json.loads(path.read_text())


async def warm_start(args, rank, world, device, traces_file=""):
    """The folder of the warm-started checkpoint for these arguments, made now or reused."""
    rows = load_traces(traces_file) if traces_file else None
    found = [None]
    if rank == 0:  # one rank looks, for another run may be about to finish the same folder
        folder = Path(args.warm_start_dir) / warm_start_key(args, traces_file)
        found = [(folder, folder.is_dir())]
    dist.broadcast_object_list(found)
    folder, exists = found[0]
    if exists:
        if rank == 0:
            print(f"warm start: reusing {folder}")
        return folder
    partial = folder.with_name(f"{folder.name}.partial-{os.getpid()}")
    shared = [None]
    if rank == 0:  # curation runs once
        shutil.rmtree(partial, ignore_errors=True)  # of a run that was killed under the same process id
        partial.mkdir(parents=True)
        if traces_file:
            split = len(rows) - max(1, len(rows) // 50)
            kept, held_out, counts = rows[:split], rows[split:], {"loaded": len(rows)}
        else:
            kept, held_out, counts = await cold_start_traces(args)
        print(f"curation: {counts}")
        (partial / "curation.json").write_text(json.dumps(counts, indent=1))
        with open(partial / "traces.jsonl", "w") as file:
            file.writelines(json.dumps(trace) + "\n" for trace in kept)
        shared = [(kept, held_out)]
    dist.broadcast_object_list(shared)
    metrics = train_on_traces(*shared[0], args, partial, rank, world, device)
    if rank == 0:
        print("warm start: " + "  ".join(f"{name} {value:.4f}" for name, value in metrics.items()))
        (partial / "arguments.json").write_text(json.dumps(vars(args) | {"versions": versions()}, indent=1))
        if folder.is_dir():  # another run with the same arguments was faster
            shutil.rmtree(partial)
        else:
            partial.rename(folder)  # only a finished warm start is ever found under its name
    dist.barrier()
    return folder


def train_on_traces(traces, held_out, args, folder, rank, world, device):
    """The warm start itself: the trained checkpoint and its metrics.jsonl go into `folder`. Returns the final
    metrics."""
    config, tokenizer = starting_point(args.model)
    template = load_template(args.prompt_template)
    examples, fresh = ([trace_example(trace, tokenizer, template, args.max_interpreter_tokens)
                        for trace in rows] for rows in (traces, held_out))
    longest, positions = max(len(e) for e in examples + fresh), config.max_position_embeddings
    if longest > positions:
        raise UserError(f"a trace has {longest} tokens, the model {positions} positions")
    plain = starting_model(args.model, config, args.sft_seed) if rank == 0 else None  # to be saved
    policy = Policy(starting_model(args.model, config, args.sft_seed))
    shard(policy, policy.lm, **sharding_settings(args))
    with open(folder / "metrics.jsonl" if rank == 0 else os.devnull, "w") as file:
        metrics = train(policy, examples, fresh, args.sft_steps, args.sft_batch_size, args.sft_lr,
                        args.sft_warmup, args.sft_seed, args.token_budget, rank, world, device,
                        lambda row: file.write(json.dumps(row) + "\n"))
        file.write(json.dumps(metrics) + "\n")
    sync_weights(policy, plain)
    if rank == 0:
        plain.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return metrics


# ------------------------------------------------------------------------------------------------------------
# The script


def add_warm_start_arguments(parser):
    """The warm start's flags, shared with ppo.py. Defaults are the embedded run's."""
    add = parser.add_argument_group("warm start").add_argument
    add("--model", default="",
        help="checkpoint folder or hub id, used as it is; empty: the embedded model, warm-started")
    add("--sft_traces", type=at_least(1), default=8000,
        help="cold-start problems of the embedded default; paper: 2,000 traces released")
    add("--code_share", type=in_range(0.0, 1.0), default=0.5,
        help="share of them rewritten with code, the rest text; paper's policy starts at 0.18")
    add("--sft_steps", type=at_least(1), default=1600, help="optimiser steps; paper: 2 epochs")
    add("--sft_batch_size", type=at_least(1), default=32, help="sequences per step, over all ranks")
    add("--sft_lr", type=in_range(0.0), default=2e-3,
        help="peak learning rate of AdamW, cosine to zero; paper 1e-6 (32B)")
    add("--sft_warmup", type=at_least(0), default=50, help="warm-up steps")
    add("--sft_seed", type=int, default=0, help="seed of the warm start: traces, order, initial weights")
    add("--warm_start_dir", default="out/warm_start",
        help="finished warm starts are kept here under a hash and reused")


async def main(rank, world, device):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add_warm_start_arguments(parser)
    add_trainer_arguments(parser)
    add_format_arguments(parser)
    parser.add_argument("--traces", default="", help="JSONL of verified traces; empty: the embedded ones")
    args = parser.parse_args()
    check_mesh(args.replicas, world)
    starting_point(args.model)  # a bad checkpoint is found out before the curation
    if rank == 0:
        print(json.dumps(vars(args)))
    folder = await warm_start(args, rank, world, device, args.traces)
    if rank == 0:
        print(f"checkpoint: {folder}")


def main_curation():
    """`python sft.py curate ...` and `python sft.py show FILE`."""
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    add_curate_arguments(commands.add_parser("curate", help="real data -> verified traces",
                                             formatter_class=argparse.ArgumentDefaultsHelpFormatter))
    shown = commands.add_parser("show", help="print traces in colour")
    shown.add_argument("file", help="JSONL of traces")
    shown.add_argument("--n", type=at_least(0), default=10, help="how many")
    shown.add_argument("--color", choices=("auto", "always", "never"), default="auto",
                       help="auto: on a terminal")
    args = parser.parse_args()
    if args.command == "show":
        return show_traces(args)
    asyncio.run(curate_file(args))


if __name__ == "__main__":
    if sys.argv[1:2] in (["curate"], ["show"]):  # these two need no process group
        try:
            main_curation()
        except (UserError, OSError) as error:
            sys.exit(describe_error(error))
        except KeyboardInterrupt:
            sys.exit("interrupted; what is finished is kept, the same command goes on")
    else:
        run_script(main)
