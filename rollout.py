"""Batched generation that stops at </code>, runs the snippet, and resumes.

    python rollout.py --model CHECKPOINT "What is 17^23 modulo 91?"    # watch it

One tick of the engine:
    1. Rows whose tool result is due rejoin; queued rows fill free cache slots.
    2. ONE forward call over a flat stream: one token of a decoding row, interpreter text of a
       resuming one, the prompt of a new one.
    3. One token is sampled per row. A row that completes `</code>` pauses while the sandbox runs
       the snippet. It keeps its slot, unless a full `PagedCache` takes it.

On CUDA in half precision attention is one call of a kernel per layer, over pages (`PagedCache`);
elsewhere it is SDPA, over slots (`KVCache`).

Sampled tokens are never decoded and encoded again. Their `loss_mask` (1 = sampled, 0 = forced
interpreter text) travels unchanged to loss, GAE and metrics.

Definitions:
  - A snippet ends at the first `</code>`, even inside a string, as in the paper, and begins at
    the last `<code>` before it. `</code>` without `<code>` is plain text.
  - The token that completes `</code>` may run past it (`>\\n`, `></`): it is kept.
  - finish_reason: `eos`; `length`; `max_calls` (a `</code>` beyond them); `sandbox_error` (drop
    the row, never score it).

Reproducible: noise depends on (seed, step, prompt key, sample, position) alone, and a paused
row rejoins a fixed number of ticks after its call.

Shapes: N rows in a step, T tokens in the stream, V vocabulary, L layers, H query heads, K
key/value heads, D head dim, S positions per slot.
"""
import argparse
import asyncio
import datetime
import functools
import heapq
import inspect
import itertools
import json
import math
import os
import re
import socket
import sys
import time
import urllib.parse
import zlib
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path

import huggingface_hub
import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors import SafetensorError
from torch.nn.attention.varlen import varlen_attn
from torch.utils.benchmark import Timer
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM, AutoTokenizer

from sandbox import Sandbox, SandboxResult, UserError

try:  # optional, CUDA only
    from flash_attn import flash_attn_varlen_func
except ImportError:
    flash_attn_varlen_func = None

if sys.version_info < (3, 11):  # noqa: UP036
    sys.exit(f"error: Python 3.11 or later is needed, this is {sys.version.split()[0]}")

# ---------------------------------------------------------------------------------------------
# The table of tools. Another tool is another row, and the function that it names.

CODE_OPEN, CODE_CLOSE = "<code>", "</code>"
INTERPRETER_OPEN, INTERPRETER_CLOSE = "<interpreter>", "</interpreter>"
ANSWER_OPEN, ANSWER_CLOSE = "<answer>", "</answer>"


@dataclass(frozen=True)
class Tool:
    """The text between two tags is run; the output comes back in an interpreter block."""
    name: str
    open: str
    close: str
    run: object  # async (text, seed, sandbox) -> SandboxResult


async def run_python(code, seed, sandbox):
    return await sandbox.run(code, seed=seed)


TOOLS = [
    Tool("code", CODE_OPEN, CODE_CLOSE, run_python),
]

# All patterns, in other files too, are made from the table.
CLOSING = {tool.open: tool.close for tool in TOOLS}
CLOSING |= {INTERPRETER_OPEN: INTERPRETER_CLOSE, ANSWER_OPEN: ANSWER_CLOSE}
TAG = re.compile("|".join(re.escape(tag) for tag in [*CLOSING, *CLOSING.values()]))
AFTER_A_CALL = "|".join(f"(?<={re.escape(tool.close)})" for tool in TOOLS)
INTERPRETER_BLOCK = re.compile(
    rf"(?:{AFTER_A_CALL})\s*{INTERPRETER_OPEN}\n?(.*?)\n?{INTERPRETER_CLOSE}", re.DOTALL)


def tool_of(text):
    """The tool whose closing tag ends a text, or None."""
    for tool in TOOLS:
        if text.endswith(tool.close):
            return tool
    return None


def find_call(text, n_read):
    """The call that a text closes after n_read characters: (tool, index of the opening tag, of
    the closing tag), or None."""
    for tool in TOOLS:
        # The closing tag may begin in what was read.
        search_from = max(0, n_read - len(tool.close) + 1)
        close_at = text.find(tool.close, search_from)
        if close_at >= 0:
            open_at = text.rfind(tool.open, 0, close_at)
            if open_at >= 0:
                return tool, open_at, close_at
    return None


# ---------------------------------------------------------------------------------------------
# The embedded problems' tool is the sandbox with two things more. It may be busy; and a script that
# is nothing but `print(ask(4821,7))` asks whether 7 is too low or too high for the number that box
# 4821 hides. Nowhere else is there an `ask`, so nothing else is answered for it.
BUSY = "[busy]"
BUSY_SEED = 999  # busy with every probability from 0.001 on
HIGHEST = 12  # number in a box
QUESTION = re.compile(r"print\(ask\((\d{1,9}), ?(\d{1,9})\)\)")


def as_question(code):
    """The match of a script that is nothing but a question to a box, or None."""
    return QUESTION.fullmatch(code.strip())


class Service:
    """A Sandbox that turns scripts away with the probability `busy`, and knows boxes. Whether it is
    busy depends on the call's seed alone: a script cannot change that, a second try draws anew."""

    def __init__(self, sandbox, busy):
        self.sandbox = sandbox
        self.busy = busy

    async def run(self, code, seed=0):
        question = as_question(code) if isinstance(code, str) else None  # a list is no question
        if question:
            box = int(question[1])
            guess = int(question[2])
            return SandboxResult("ok", compare(guess, hidden_number(box)))
        if seed % 1000 >= 1000 * (1 - self.busy):
            return SandboxResult("busy", BUSY)
        return await self.sandbox.run(code, seed)

    async def equal(self, predicted, reference):
        return await self.sandbox.equal(predicted, reference)


def question_to_box(box, guess):
    return f"print(ask({box},{guess}))"


def hidden_number(box):
    return zlib.crc32(b"%d" % box) % HIGHEST + 1


def compare(guess, number):
    if guess == number:
        return "equal"
    return "low" if guess < number else "high"


def narrowed(low, high, guess, verdict):
    """What a box's verdict leaves of the numbers from low to high: (low, high)."""
    if verdict == "equal":
        return guess, guess
    if verdict == "low":
        return max(low, guess + 1), high
    if verdict == "high":
        return low, min(high, guess - 1)
    return low, high


# ---------------------------------------------------------------------------------------------
# Text <-> segments, for SFT and rollout alike

# ```python, ``` Python, ```py3, or ``` alone
FENCE = re.compile(r"\s*```[ \t]*(?:py(?:thon)?[\d.]*[ \t]*)?\r?\n", re.IGNORECASE)


def strip_fence(snippet):
    """Python source without its fence, which may be unclosed."""
    opening = FENCE.match(snippet)
    if not opening:
        return snippet.strip("\n")

    source = snippet[opening.end():]
    code, closing, after = source.rpartition("```")
    if not closing or after.strip():
        return source.strip("\r\n")
    return code.rstrip(" \t").removesuffix("\n").removesuffix("\r")


def split_segments(text):
    """A response as [("model", text), ("interpreter", text), ("model", text), ...]."""
    # Only a block directly after </code> is the sandbox's. re.split alternates what lies between
    # the blocks with what they hold.
    writers = itertools.cycle(["model", "interpreter"])
    return list(zip(writers, INTERPRETER_BLOCK.split(text)))


# Texts in front of which a SentencePiece tokenizer puts its space: one that does not join what
# follows it is taken.
ANCHORS = ["\n", "x", "0", "é"]


@functools.lru_cache(maxsize=8)
def adds_space(tokenizer):
    """Whether the tokenizer puts a space in front of every text, as SentencePiece does."""
    ids = tokenizer.encode("x", add_special_tokens=False)
    alone = tokenizer.decode(ids[-1:], clean_up_tokenization_spaces=False)
    followed = tokenizer.decode(ids[-1:] + ids, clean_up_tokenization_spaces=False)
    return followed[len(alone):].startswith(" ")


def encode_segment(tokenizer, text):
    """(ids, start of each in the text) of plain text that continues other text: no token and no
    space is added."""
    options = dict(
        add_special_tokens=False, split_special_tokens=True, return_offsets_mapping=True)
    encoded = tokenizer(text, **options)
    ids = encoded["input_ids"]
    offsets = encoded["offset_mapping"]

    if adds_space(tokenizer):
        for anchor in ANCHORS:
            encoded = tokenizer(anchor + text, **options)
            spans = encoded["offset_mapping"]
            n_anchor = len([start for start, _ in spans if start < len(anchor)])
            if all(end <= len(anchor) for _, end in spans[:n_anchor]):
                ids = encoded["input_ids"][n_anchor:]
                offsets = [(start - len(anchor), end - len(anchor))
                           for start, end in spans[n_anchor:]]
                break

    # A Unigram model has special tokens in its own vocabulary: what spells one is encoded in two
    # parts.
    special = set(tokenizer.all_special_ids) - {tokenizer.unk_token_id}
    if not special.isdisjoint(ids):
        for token, (start, end) in zip(ids, offsets):
            if token in special and end - start > 1:
                cut = end - 1
                before, before_starts = encode_segment(tokenizer, text[:cut])
                after, after_starts = encode_segment(tokenizer, text[cut:])
                return before + after, before_starts + [cut + start for start in after_starts]
    return ids, [start for start, _ in offsets]


def encode_text(tokenizer, text):
    """Token ids of plain text: no special token is added or recognised, and no space added."""
    return encode_segment(tokenizer, text)[0]


def break_tags(output):
    """Makes our tags in output, which the policy controls, harmless."""
    return TAG.sub(lambda tag: f"[{tag[0][1:-1]}]", output)


@functools.lru_cache(maxsize=8)
def added_tokens(tokenizer, n_tokens):
    """The ids of all tokens that are matched as a whole, special or not. n_tokens: the tokenizer's
    length, so that a later addition is seen."""
    return set(tokenizer.added_tokens_decoder) | set(tokenizer.all_special_ids)


def break_added_tokens(tokenizer, text):
    """Makes added tokens in a text harmless, such as an end of turn or </think>, which many
    tokenizers do not mark as special: a space is put behind their first character."""
    added = added_tokens(tokenizer, len(tokenizer))
    # What is broken may hold another one. The bound is for a normaliser that drops spaces.
    for _ in range(9):
        if added.isdisjoint(tokenizer.encode(text, add_special_tokens=False)):
            break
        encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        cuts = []
        for token, (start, end) in zip(encoded["input_ids"], encoded["offset_mapping"]):
            span = text[start:end]
            # Runs of spaces and single characters are text, and so is an unknown character.
            is_unknown = token == tokenizer.unk_token_id and tokenizer.unk_token not in span
            if token in added and len(span.strip()) > 1 and not is_unknown:
                cuts.append(start + len(span) - len(span.lstrip()) + 1)
        if not cuts:
            break
        for cut in reversed(cuts):
            text = text[:cut] + " " + text[cut:]
    return text


def encode_interpreter(tokenizer, output, max_tokens, overrun=""):
    """Token ids of the forced block `\\n<interpreter>\\n{output}\\n</interpreter>`, of long output
    head and tail. overrun: what the last sampled token holds beyond `</code>`."""
    output = break_added_tokens(tokenizer, break_tags(output.strip("\n")))
    body = encode_text(tokenizer, output)
    n_dropped = len(body) - max_tokens
    if n_dropped > 0:
        n_head = (max_tokens + 1) // 2
        notice = encode_text(tokenizer, f"\n[... {n_dropped} tokens left out ...]\n")
        body = body[:n_head] + notice + body[n_head + n_dropped:]

    newline = "" if overrun.endswith("\n") else "\n"
    begin = encode_text(tokenizer, newline + INTERPRETER_OPEN + "\n")
    return begin + body + encode_text(tokenizer, "\n" + INTERPRETER_CLOSE)


def encode_response(tokenizer, text, max_interpreter_tokens, masked_calls=(),
                    mask_interpreter=True):
    """(ids, loss_mask) of a response and EOS, encoded in segments, as `generate` meets them;
    0 for interpreter tokens and masked_calls (indices of failed snippets)."""
    ids = []
    mask = []
    for number, (writer, segment) in enumerate(split_segments(text)):
        if writer == "interpreter":
            block = encode_interpreter(tokenizer, segment, max_interpreter_tokens)
            ids += block
            mask += [0 if mask_interpreter else 1] * len(block)
            continue

        # Segments alternate: this one ends in call number // 2.
        trained_until = len(segment)
        if number // 2 in masked_calls:
            trained_until = segment.rfind(tool_of(segment).open)

        # A token that starts before the snippet is prose, even if it reaches into the tag.
        segment_ids, starts = encode_segment(tokenizer, segment)
        ids += segment_ids
        mask += [int(start < trained_until) for start in starts]
    return ids + [tokenizer.eos_token_id], mask + [1]


class Pieces(dict):
    """pieces[i] is the text of token i. It is decoded after an anchor, for a SentencePiece token
    alone loses its space."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        self.anchor = encode_text(tokenizer, "x")[-1]
        self.anchor_length = len(tokenizer.decode([self.anchor]))

    def __missing__(self, token):
        text = self.tokenizer.decode([self.anchor, token], clean_up_tokenization_spaces=False)
        self[token] = text[self.anchor_length:]
        return self[token]

    def join(self, ids):
        """The pieces of ids: in them `closed_call` counts characters."""
        return "".join([self[token] for token in ids])


def shown_output(result, feedback):
    """What the model sees of a SandboxResult."""
    hidden = "[ran]" if result.status == "ok" else "[failed]"
    return {"real": result.output, "hidden": hidden, "none": ""}[feedback]


def after_earlier(code, calls):
    """`code` for the sandbox, where the earlier snippets that ran run again before it, unseen. They
    draw other random numbers than before, for each call has its own seed."""
    # A question to a box is no script.
    if as_question(code):
        return code
    earlier = []
    for call in calls:
        if call.status == "ok" and call.tool == "code" and not as_question(call.code):
            earlier.append(call.code)
    return [*earlier, code] if earlier else code


# ---------------------------------------------------------------------------------------------
# What is sampled, and how

@dataclass
class ToolCall:
    code: str
    output: str  # uncut
    status: str  # empty while it runs
    start: int  # response_ids[start:end], tags included
    end: int
    seconds: float
    tool: str = "code"  # a name of TOOLS


@dataclass
class Trajectory:
    """One response; its three lists have an entry per token."""
    prompt_index: int
    sample_index: int
    prompt_ids: list
    response_ids: list = field(default_factory=list)
    loss_mask: list = field(default_factory=list)
    logprobs: list = field(default_factory=list)  # 0.0 where forced
    tool_calls: list = field(default_factory=list)
    finish_reason: str = ""
    correct: bool = False  # set by eval.py
    answer: str = None  # set by eval.py
    example: object = None  # set by ppo.py

    @property
    def is_complete(self):
        """Only what the policy itself has ended holds an answer."""
        return self.finish_reason == "eos"

    @property
    def snippets(self):
        return [call for call in self.tool_calls if call.tool == "code"]

    def prose_segments(self):
        """Runs of sampled token ids outside the snippets that were run."""
        is_prose = list(self.loss_mask)
        for call in self.tool_calls:
            is_prose[call.start:call.end] = [0] * (call.end - call.start)

        segments = [[]]
        for token, prose in zip(self.response_ids, is_prose):
            if prose:
                segments[-1].append(token)
            else:
                segments.append([])
        return [segment for segment in segments if segment]


@dataclass
class Sampling:
    """The settings among the keyword arguments of `generate`."""
    temperature: float = 1.0  # 0 is greedy
    top_p: float = 1.0
    max_response_tokens: int = 512  # interpreter tokens included
    max_calls: int = 4
    max_interpreter_tokens: int = 128  # per call
    tools: bool = True  # False: tags mean nothing
    feedback: str = "real"  # see `shown_output`
    interpreter: str = "stateless"  # or "replay": see `after_earlier`
    prefill: str = ""  # the text that every response begins with
    after_busy: str = ""  # the text that it goes on with after a call that was "busy"
    n_slots: int = 64  # rows in the cache, at most
    kv_gib: float = 0.0  # of cache; 0: what is free
    rejoin_ticks: int = 4  # after the call; 0: once done, not reproducible
    seed: int = 0
    step: int = 0  # of the run
    logits_processor: object = None  # f(logits (N, V), trajectories) -> logits
    progress: object = None  # f(1) per finished row
    on_tokens: object = None  # f(trajectory) when it grew or finished
    on_tick: object = None  # f(engine, rows admitted) before each step


# ---------------------------------------------------------------------------------------------
# The engine

# Of prompts per tick, about: activations need memory.
PREFILL_TOKENS = 16384


@dataclass(eq=False)
class Row:
    """A trajectory in flight."""
    trajectory: Trajectory
    key: int  # names the prompt to the noise
    pending: list  # tokens to feed
    slot: int = -1  # none
    text: str = ""  # since the last call
    overrun: str = ""  # of the last token beyond </code>
    task: object = None  # the running snippet
    due: int = 0  # tick at which the row rejoins

    @property
    def order(self):
        """A row of lower order is older."""
        return self.trajectory.prompt_index, self.trajectory.sample_index

    def force(self, ids, text):
        """Append ids that are not sampled. text: where in them a call may begin."""
        self.trajectory.response_ids += ids
        self.trajectory.loss_mask += [0] * len(ids)
        self.trajectory.logprobs += [0.0] * len(ids)
        self.text = text


async def generate(model, tokenizer, prompts, sandbox, *, n_samples=1, prompt_keys=None,
                   stats=None, **sampling):
    """Sample n_samples responses to each prompt: a list of Trajectory, prompt-major.

    prompts: lists of token ids. sandbox: an entered Sandbox, or None with tools=False.
    prompt_keys: integers that name the prompts to the noise (default: their index).
    stats: a dict that receives tool_wait_seconds.
    UserError if memory holds no row; if it limits the slots, rounding depends on it.
    """
    settings = Sampling(**sampling)
    longest = settings.max_response_tokens + max(map(len, prompts), default=0)
    if not all(prompts):
        raise ValueError("a prompt is empty")
    if longest > model.config.max_position_embeddings:
        raise ValueError(f"prompt + response may take {longest} tokens, but the model has "
                         f"{model.config.max_position_embeddings} positions")
    if model.config._attn_implementation != "retool":
        raise ValueError('the model must be loaded with attn_implementation="retool"')

    # Forced, like interpreter text: no sampled token, masked.
    prefill = encode_text(tokenizer, settings.prefill)
    prefill_text = Pieces(tokenizer).join(prefill)
    if len(prefill) >= settings.max_response_tokens:
        raise UserError(f"the prefill has {len(prefill)} tokens, and leaves nothing to sample of "
                        f"{settings.max_response_tokens}")

    rows = []
    for prompt_index, prompt in enumerate(prompts):
        key = prompt_keys[prompt_index] if prompt_keys else prompt_index
        for sample_index in range(n_samples):
            row = Row(Trajectory(prompt_index, sample_index, prompt), key, prompt + prefill)
            row.force(prefill, prefill_text)
            rows.append(row)

    engine = Engine(model, tokenizer, sandbox, settings, rows, longest)
    await engine.run()
    if stats is not None:
        stats["tool_wait_seconds"] = engine.tool_wait_seconds
    return [row.trajectory for row in rows]


class Engine:
    """The tick loop of one `generate`. A row is in the `queue`, `active` (fed next), `paused`
    (its snippet runs), or finished (its slot is free). A preempted row has lost its slot: it is in
    the queue again, or still paused."""

    def __init__(self, model, tokenizer, sandbox, settings, rows, longest):
        self.model = model
        self.tokenizer = tokenizer
        self.sandbox = sandbox
        self.settings = settings
        self.pieces = Pieces(tokenizer)
        self.ends = end_tokens(model, tokenizer)

        self.queue = deque(rows)
        self.active = []
        self.paused = []
        self.tick = 0
        self.tool_wait_seconds = 0.0
        # Prompt index -> (logits after it, keys and values), for other samples.
        self.shared = {}

        # How many bytes of keys and values one row takes.
        weight = next(model.parameters())
        is_paged = uses_varlen(weight.device, weight.dtype)
        row_tokens = n_pages(longest) * PAGE_TOKENS if is_paged else longest
        numbers = 2 * math.prod(KVCache.shape(model.config, 1, row_tokens))  # keys and values
        row_bytes = numbers * weight.element_size()
        n_rows = min(settings.n_slots, len(rows))

        # How many rows fit, beside what a tick itself needs.
        budget = free_bytes(weight.device)
        if weight.is_cuda:
            longest_prompt = longest - settings.max_response_tokens
            n_tokens = max(longest, PREFILL_TOKENS + longest_prompt)
            budget -= tick_bytes(model.config, n_tokens, n_rows, weight.dtype, settings.top_p)
        if settings.kv_gib:
            budget = min(budget, settings.kv_gib * 2**30)
        if budget < row_bytes:
            raise UserError(f"one row of {longest} tokens needs {row_bytes / 2**30:.2g} GiB of KV "
                            f"cache, there are {budget / 2**30:.2g} (--kv_gib, or free)")

        # In slots of the longest row, each row can finish; in pages at least the oldest can.
        rows_that_fit = min(n_rows, budget / row_bytes)
        if is_paged:
            n_slots = n_rows
            total_pages = int(rows_that_fit * n_pages(longest))
            self.cache = PagedCache(
                model.config, n_slots, total_pages, weight.dtype, weight.device)
        else:
            n_slots = int(rows_that_fit)
            self.cache = KVCache(model.config, n_slots, longest, weight.dtype, weight.device)
        # A heap: low slots keep the decode view short.
        self.free = list(range(n_slots))

    async def run(self):
        try:
            while self.queue or self.active or self.paused:
                # Let the sandbox's own callbacks run.
                await asyncio.sleep(0)
                await self.wait_for_tools()
                self.make_room()
                leaders, followers = self.admit()
                # Queued rows would fill the gaps.
                if not self.queue and not self.cache.is_paged:
                    self.compact()

                # Packing wants the shorter ones first.
                rows = sorted(self.active + leaders, key=lambda row: len(row.pending))
                if rows or followers:
                    if self.settings.on_tick:
                        self.settings.on_tick(self, leaders + followers)
                    self.active = []
                    self.step(rows, leaders, followers)
        finally:
            # No snippet outlives its rollout.
            for row in self.paused:
                row.task.cancel()

    async def wait_for_tools(self):
        """Bring back the paused rows whose turn it is."""
        begin = time.perf_counter()
        # Idle: only a tool can go on. Some row is paused, for an empty cache admits the next one.
        is_idle = not self.active and not self.can_admit()
        if self.settings.rejoin_ticks:
            # Reproducible: a row returns so many ticks after its call.
            if is_idle:
                self.tick = min(row.due for row in self.paused)
            returning = [row for row in self.paused if row.due <= self.tick]
        else:
            # Eager: a row returns once its snippet is done.
            if is_idle:
                tasks = [row.task for row in self.paused]
                await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            returning = [row for row in self.paused if row.task.done()]

        # An error of one snippet ends this at once.
        await asyncio.gather(*[row.task for row in returning])
        self.tool_wait_seconds += time.perf_counter() - begin
        for row in returning:
            self.paused.remove(row)
            self.rejoin(row)
            self.tell(row)

    def make_room(self):
        """Reserve room for what active rows feed next. Where there is none, the youngest row in
        flight is preempted. The oldest never is: it ends, however small the cache."""
        for row in sorted(self.active, key=lambda row: row.order):
            while row.slot >= 0 and not self.cache.reserve(row.slot, len(row.pending)):
                in_flight = [other for other in self.active + self.paused if other.slot >= 0]
                self.preempt(max(in_flight, key=lambda other: other.order))

    def preempt(self, row):
        """Take a row's slot. It is computed again from its tokens; a paused one waits for its call
        before that."""
        self.release(row)
        if row in self.active:
            self.active.remove(row)
            self.requeue(row)

    def requeue(self, row):
        """A preempted row is next to be admitted."""
        row.pending = row.trajectory.prompt_ids + row.trajectory.response_ids
        self.queue.appendleft(row)

    def release(self, row):
        """Give a row's slot back, if it has one."""
        if row.slot >= 0:
            self.cache.release(row.slot)
            heapq.heappush(self.free, row.slot)
            row.slot = -1

    def can_admit(self):
        """Whether there is a next row, a slot, and room for what the row feeds first."""
        if not self.queue or not self.free:
            return False
        return self.cache.has_room(len(self.queue[0].pending))

    def admit(self):
        """Fill free slots: (leaders, which compute their prompt; followers, which copy it). Rows
        that have begun, before they were preempted or with a prefill, become active, and compute
        all their tokens."""
        leaders = []
        followers = []
        computed = set(self.shared)
        n_tokens = 0
        while self.can_admit() and n_tokens < PREFILL_TOKENS:
            row = self.queue[0]
            # A row that has begun may be long: not after others that make it too much for a tick.
            has_begun = bool(row.trajectory.response_ids)
            if has_begun and n_tokens and n_tokens + len(row.pending) > PREFILL_TOKENS:
                break

            self.queue.popleft()
            row.slot = heapq.heappop(self.free)
            self.cache.reserve(row.slot, len(row.pending))
            # The first sample of a prompt computes it, the others copy.
            if has_begun:
                self.active.append(row)
                n_tokens += len(row.pending)
            elif row.trajectory.prompt_index in computed:
                followers.append(row)
            else:
                leaders.append(row)
                computed.add(row.trajectory.prompt_index)
                n_tokens += len(row.pending)
        return leaders, followers

    def compact(self):
        """Move rows from high slots to free lower ones: the decode view shrinks."""
        lengths = self.cache.lengths
        kv = self.cache.kv
        for row in sorted(self.active + self.paused, key=lambda row: -row.slot):
            if not self.free or self.free[0] > row.slot:
                return
            old = row.slot
            new = heapq.heappop(self.free)
            kv[:, :, new, :, :lengths[old]] = kv[:, :, old, :, :lengths[old]]
            lengths[new] = lengths[old]
            lengths[old] = 0
            heapq.heappush(self.free, old)
            row.slot = new

    def step(self, rows, leaders, followers):
        """One tick: a forward call, one sampled token per row."""
        settings = self.settings
        logits = self.next_logits(rows, leaders, followers)
        rows = rows + followers
        trajectories = [row.trajectory for row in rows]
        if settings.logits_processor:
            logits = settings.logits_processor(logits, trajectories)

        # The upper 53 bits as a float64 in [0, 1).
        keys = [row.key for row in rows]
        samples = [trajectory.sample_index for trajectory in trajectories]
        positions = [len(trajectory.response_ids) for trajectory in trajectories]
        bits = noise_bits(settings.seed, settings.step, keys, samples, positions)
        uniform = (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53
        uniform = torch.from_numpy(uniform).to(logits.device)  # (N,)

        tokens, logprobs = sample(logits, uniform, settings.temperature, settings.top_p)
        for row, token, logprob in zip(rows, tokens.tolist(), logprobs.tolist()):
            self.advance(row, token, logprob)
            self.tell(row)
        self.tick += 1

    def next_logits(self, rows, leaders, followers):
        """Feed the pending tokens of `rows`: logits (N, V) of rows, then of followers."""
        cache = self.cache
        logits = []
        if rows:
            slots = [row.slot for row in rows]
            pending = [row.pending for row in rows]
            logits.append(forward_step(self.model, cache, slots, pending))

        # Prompts whose followers are here are shared now. That of the queue's next row is kept for
        # later ticks: as a copy, for its slot may be refilled.
        next_prompt = self.queue[0].trajectory.prompt_index if self.queue else None
        wanted = {row.trajectory.prompt_index for row in followers} | {next_prompt}
        for row in leaders:
            prompt_index = row.trajectory.prompt_index
            if prompt_index not in wanted:
                continue
            prompt_logits = logits[0][rows.index(row)]  # (V,); leaders are among rows
            prompt_kv = cache.read(row.slot, len(row.pending))
            if prompt_index == next_prompt:
                prompt_logits = prompt_logits.clone()
                prompt_kv = prompt_kv.clone()
            self.shared[prompt_index] = prompt_logits, prompt_kv

        for row in followers:
            prompt_logits, prompt_kv = self.shared[row.trajectory.prompt_index]
            cache.fill(row.slot, prompt_kv)
            cache.lengths[row.slot] = len(row.pending)
            logits.append(prompt_logits[None])

        kept = self.shared.get(next_prompt)
        self.shared = {next_prompt: kept} if kept else {}
        return torch.cat(logits)

    def advance(self, row, token, logprob):
        """Append a sampled token; the row ends, pauses for its snippet, or goes on."""
        if math.isnan(logprob):
            raise FloatingPointError("the model's logits are not numbers (NaN)")
        trajectory = row.trajectory
        trajectory.response_ids.append(token)
        trajectory.loss_mask.append(1)
        trajectory.logprobs.append(logprob)
        row.pending = [token]
        if token in self.ends:
            self.finish(row, "eos")
            return

        call = self.closed_call(row, token) if self.settings.tools else None
        if call and len(trajectory.tool_calls) < self.settings.max_calls:
            tool, start, code = call
            self.start_call(row, tool, start, code)
        elif call:
            self.finish(row, "max_calls")
        elif len(trajectory.response_ids) >= self.settings.max_response_tokens:
            self.finish(row, "length")
        else:
            self.active.append(row)

    def closed_call(self, row, token):
        """The call that this token closes: (tool, index of its first token, code), or None."""
        n_read = len(row.text)
        row.text += self.pieces[token]
        call = find_call(row.text, n_read)
        if call is None:
            return None
        tool, open_at, close_at = call
        row.overrun = row.text[close_at + len(tool.close):]

        # Go back to the token in which the opening tag begins.
        ids = row.trajectory.response_ids
        start = len(ids)
        token_at = len(row.text)
        while token_at > open_at:
            start -= 1
            token_at -= len(self.pieces[ids[start]])

        # Decode as a whole: byte-level tokens may split a character.
        text = self.tokenizer.decode(ids[start:], clean_up_tokenization_spaces=False)
        text = text[:-len(tool.close + row.overrun)]
        code = text.rpartition(tool.open)[2]
        return tool, start, strip_fence(code)

    def start_call(self, row, tool, start, code):
        settings = self.settings
        trajectory = row.trajectory
        source = code
        if tool.name == "code" and settings.interpreter == "replay":
            source = after_earlier(code, trajectory.tool_calls)

        trajectory.tool_calls.append(ToolCall(
            code, output="", status="", start=start, end=len(trajectory.response_ids),
            seconds=0.0, tool=tool.name))

        # The seed depends on the row alone; no sampled token has a negative position.
        position = -len(trajectory.tool_calls)
        bits = noise_bits(settings.seed, settings.step, row.key, trajectory.sample_index, position)
        seed = int(bits >> np.uint64(33))
        row.task = asyncio.ensure_future(tool.run(source, seed, self.sandbox))
        row.due = self.tick + settings.rejoin_ticks
        self.paused.append(row)

    def rejoin(self, row):
        """Append the interpreter block, to be fed next."""
        trajectory = row.trajectory
        call = trajectory.tool_calls[-1]
        result = row.task.result()
        call.output = result.output
        call.status = result.status
        call.seconds = result.seconds
        if result.status == "sandbox_error":
            self.finish(row, "sandbox_error")
            return

        block = encode_interpreter(
            self.tokenizer, shown_output(result, self.settings.feedback),
            self.settings.max_interpreter_tokens, row.overrun)
        continuation = []
        if result.status == "busy":
            continuation = encode_text(self.tokenizer, self.settings.after_busy)
        block += continuation
        block = block[:self.settings.max_response_tokens - len(trajectory.response_ids)]
        row.force(block, self.pieces.join(continuation))
        if len(trajectory.response_ids) >= self.settings.max_response_tokens:
            self.finish(row, "length")
            return

        if row.slot < 0:
            self.requeue(row)
            return
        row.pending = row.pending + block
        self.active.append(row)

    def finish(self, row, reason):
        row.trajectory.finish_reason = reason
        self.release(row)
        if self.settings.progress:
            self.settings.progress(1)

    def tell(self, row):
        if self.settings.on_tokens:
            self.settings.on_tokens(row.trajectory)


# ---------------------------------------------------------------------------------------------
# The cache and the attention

def at_least_fp32(x):
    """Softmax, logsumexp and their inputs are never in half precision."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def head_dim(config):
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def uses_varlen(device, dtype):
    """Whether attention is `varlen_attn`, a kernel for CUDA in half precision; else it is SDPA."""
    return device.type == "cuda" and dtype in (torch.bfloat16, torch.float16)


class KVCache:
    """Slots, for SDPA: k and v are (L, n_slots, K, S, D); `lengths[slot]` tokens are filled."""
    is_paged = False

    @staticmethod
    def shape(config, n_slots, max_tokens):
        n_kv_heads = config.num_key_value_heads
        return config.num_hidden_layers, n_slots, n_kv_heads, max_tokens, head_dim(config)

    def __init__(self, config, n_slots, max_tokens, dtype, device):
        shape = self.shape(config, n_slots, max_tokens)
        self.kv = torch.zeros(2, *shape, dtype=dtype, device=device)
        self.k, self.v = self.kv
        self.lengths = [0] * n_slots

    def has_room(self, n_tokens):
        """Whether an empty slot takes so many tokens: it holds the longest row."""
        return True

    def reserve(self, slot, n_new):
        return True

    def release(self, slot):
        self.lengths[slot] = 0

    def append(self, layer, k, v, packing):
        """Keys and values of new tokens, (K, T, D)."""
        self.k[layer][packing.slot_of_token, :, packing.position_ids] = k.transpose(0, 1)
        self.v[layer][packing.slot_of_token, :, packing.position_ids] = v.transpose(0, 1)

    def read(self, slot, n_tokens):
        """Keys and values of a slot's first tokens, for `fill`: a view."""
        return self.kv[:, :, slot, :, :n_tokens]  # (2, L, K, tokens, D)

    def fill(self, slot, kv):
        self.kv[:, :, slot, :, :kv.shape[3]] = kv


# The kernel reads pages whose number of tokens is a multiple of 256.
PAGE_TOKENS = 256


def n_pages(n_tokens):
    return math.ceil(n_tokens / PAGE_TOKENS)


class PagedCache:
    """Pages, for `varlen_attn`: k and v are (L, pages, PAGE_TOKENS, K, D). The tokens of a slot lie
    in the pages of tables[slot], in order; `lengths[slot]` are filled.

    A slot of `KVCache` takes the memory of the longest row; here a row takes that of its own pages,
    and a full cache preempts the youngest row. So more rows fit: twice as many in the embedded run,
    4.8 times as many of texts 64 times as long (tests/bench_rollout.py --gain).
    """
    is_paged = True

    def __init__(self, config, n_slots, total_pages, dtype, device):
        n_layers, _, n_kv_heads, _, dim = KVCache.shape(config, 1, 1)
        shape = (n_layers, total_pages, PAGE_TOKENS, n_kv_heads, dim)
        self.kv = torch.zeros(2, *shape, dtype=dtype, device=device)
        self.k, self.v = self.kv
        self.lengths = [0] * n_slots
        self.tables = [[] for _ in range(n_slots)]
        self.free_pages = list(range(total_pages))

    def has_room(self, n_tokens):
        """Whether an empty slot takes so many tokens."""
        return n_pages(n_tokens) <= len(self.free_pages)

    def reserve(self, slot, n_new):
        """Take the pages that n_new more tokens need; False, and none, if too few are free."""
        table = self.tables[slot]
        n_missing = n_pages(self.lengths[slot] + n_new) - len(table)
        if n_missing > len(self.free_pages):
            return False
        for _ in range(n_missing):
            table.append(self.free_pages.pop())
        return True

    def release(self, slot):
        self.free_pages += self.tables[slot]
        self.tables[slot] = []
        self.lengths[slot] = 0

    def append(self, layer, k, v, packing):
        """Keys and values of new tokens, (K, T, D)."""
        self.k[layer][packing.page_of_token, packing.offset_of_token] = k.transpose(0, 1)
        self.v[layer][packing.page_of_token, packing.offset_of_token] = v.transpose(0, 1)

    def read(self, slot, n_tokens):
        """Keys and values of a slot's first tokens, for `fill`: a copy."""
        pages, offsets = self.places(slot, n_tokens)
        return self.kv[:, :, pages, offsets]  # (2, L, tokens, K, D)

    def fill(self, slot, kv):
        pages, offsets = self.places(slot, kv.shape[2])
        self.kv[:, :, pages, offsets] = kv

    def places(self, slot, n_tokens):
        """Where a slot's first tokens lie: (pages, offsets in them), both (tokens,)."""
        device = self.kv.device
        positions = torch.arange(n_tokens, device=device)
        table = torch.tensor(self.tables[slot], device=device)
        return table[positions // PAGE_TOKENS], positions % PAGE_TOKENS


def int32(values, device):
    return torch.from_numpy(np.asarray(values, dtype=np.int32)).to(device)


class Packing:
    """A flat stream of N sequences with so many new tokens (lengths). With a cache, slots[i]
    holds the past of sequence i; for SDPA lengths ascend."""

    def __init__(self, lengths, device, cache=None, slots=None):
        self.lengths = lengths
        self.cache = cache
        past = [cache.lengths[slot] for slot in slots] if cache else [0] * len(lengths)

        # Where tokens stand in their sequences, and where sequences end.
        ranges = [np.arange(begin, begin + new) for begin, new in zip(past, lengths)]
        positions = np.concatenate(ranges)
        self.position_ids = torch.from_numpy(positions).to(device)  # (T,)
        self.last = torch.from_numpy(np.cumsum(lengths) - 1).to(device)  # (N,)
        if cache is None:
            return

        if cache.is_paged:
            self.plan_varlen(slots, past, positions)
            return

        assert lengths == sorted(lengths), "shorter rows must come first"
        self.slot_of_token = torch.from_numpy(np.repeat(slots, lengths)).to(device)  # (T,)
        self.n_decode = lengths.count(1)
        if self.n_decode:
            self.plan_decoding(slots[:self.n_decode], past[:self.n_decode])
        self.plan_groups(slots, positions)

    def plan_varlen(self, slots, past, positions):
        """Where new tokens go, and what `varlen_attn` asks for, in int32."""
        n_rows = len(slots)
        n_seen = np.add(past, self.lengths)
        self.longest_new = max(self.lengths)
        self.longest = int(n_seen.max())
        table = np.zeros((n_rows, n_pages(self.longest)), dtype=np.int64)
        for index, slot in enumerate(slots):
            pages = self.cache.tables[slot]
            table[index, :len(pages)] = pages

        device = self.cache.k.device
        row_of_token = np.repeat(np.arange(n_rows), self.lengths)
        page_of_token = table[row_of_token, positions // PAGE_TOKENS]
        self.page_of_token = torch.from_numpy(page_of_token).to(device)  # (T,)
        self.offset_of_token = self.position_ids % PAGE_TOKENS  # (T,)

        self.begins = int32([0, *np.cumsum(self.lengths)], device)  # (N + 1,), of queries
        self.key_begins = int32([0, *np.cumsum(n_seen)], device)  # (N + 1,)
        self.n_seen = int32(n_seen, device)  # (N,)
        self.block_table = int32(table, device)  # (N, pages of the longest)

    def plan_decoding(self, slots, past):
        """The bias for rows with one new token."""
        # All slots up to the highest used are a view: to gather those in use would copy the
        # cache. Idle ones see one key.
        n_seen = np.ones(max(slots) + 1, dtype=np.int64)
        n_seen[slots] = np.array(past) + 1
        self.longest = int(n_seen.max())
        device = self.cache.k.device
        n_seen = torch.from_numpy(n_seen).to(device)
        is_unseen = torch.arange(self.longest, device=device) >= n_seen[:, None]
        bias = torch.zeros(is_unseen.shape, dtype=self.cache.k.dtype, device=device)
        bias.masked_fill_(is_unseen, -math.inf)
        self.bias = bias[:, None, None]  # (slots in view, 1, 1, longest)

    def plan_groups(self, slots, positions):
        """The other rows, padded to less than twice their length."""
        # Rows of 4 to 7 tokens are one group, those of 8 to 15 the next.
        group_of_size = {}
        for index in range(self.n_decode, len(slots)):
            size = self.lengths[index].bit_length()
            group_of_size.setdefault(size, []).append(index)

        # (slots (n,), token indices (n, new), mask (n, 1, new, keys))
        self.groups = []
        begins = np.cumsum(self.lengths) - self.lengths  # (N,)
        for group in group_of_size.values():
            # Shorter rows repeat their last token.
            new = np.array(self.lengths)[group, None]  # (n, 1)
            offsets = np.minimum(np.arange(new.max()), new - 1)
            indices = begins[group, None] + offsets
            n_keys = int(positions[indices].max()) + 1

            device = self.cache.k.device
            slots_of_group = torch.from_numpy(np.array(slots)[group]).to(device)
            indices = torch.from_numpy(indices).to(device)
            # A token sees keys up to its own position.
            own_position = self.position_ids[indices].unsqueeze(1).unsqueeze(3)  # (n, 1, new, 1)
            keys = torch.arange(n_keys, device=device)
            mask = keys <= own_position
            self.groups.append((slots_of_group, indices, mask))


def repeats_heads(device):
    """Whether SDPA gets a key head once per query head. On CUDA the memory-efficient kernel, which
    takes masks and fp32, refuses fewer: the scores of all tokens would then lie in memory."""
    return device.type == "cuda"


def sdpa(query, key, value, **options):
    """scaled_dot_product_attention of query (n, H, T, D), key and value (n, K, S, D)."""
    if repeats_heads(query.device):
        queries_per_key = query.shape[1] // key.shape[1]
        key = key.repeat_interleave(queries_per_key, 1)
        value = value.repeat_interleave(queries_per_key, 1)
    is_grouped = query.shape[1] != key.shape[1]
    return F.scaled_dot_product_attention(query, key, value, enable_gqa=is_grouped, **options)


def packed_attention(module, query, key, value, attention_mask, scaling=None, packing=None,
                     **kwargs):
    """Attention of a flat stream, described by `packing`, for sampler and trainer: query
    (1, H, T, D), key and value (1, K, T, D) -> (1, T, H, D)."""
    extras = ("sliding_window", "softcap", "s_aux")
    unknown = [name for name in extras if kwargs.get(name) is not None]
    if unknown:
        names = ", ".join(unknown)
        raise NotImplementedError(f"its attention has {names}, which is not implemented")
    q = query[0]  # (H, T, D)
    k = key[0]  # (K, T, D)
    v = value[0]

    # Training: sequences without a past.
    if packing.cache is None:
        if uses_varlen(q.device, q.dtype):
            return whole_sequences_varlen(q, k, v, packing, scaling), None
        return whole_sequences(q, k, v, packing, scaling), None

    # Sampling: new keys and values go into the cache.
    packing.cache.append(module.layer_idx, k, v, packing)
    if packing.cache.is_paged:
        return cached_sequences_varlen(q, packing, module.layer_idx, scaling), None
    return cached_sequences(q, packing, module.layer_idx, scaling), None


def whole_sequences(q, k, v, packing, scale):
    """One sequence after the other: q (H, T, D), k and v (K, T, D) -> (1, T, H, D)."""
    # Not slices: their backward would write N tensors of full length.
    queries = q[None].split(packing.lengths, 2)
    keys = k[None].split(packing.lengths, 2)
    values = v[None].split(packing.lengths, 2)
    out = []
    for query, key, value in zip(queries, keys, values):
        out.append(sdpa(query, key, value, is_causal=True, scale=scale))
    return torch.cat(out, 2).transpose(1, 2)


def whole_sequences_varlen(q, k, v, packing, scale):
    """The same by one kernel: flash-attn's, or what PyTorch bundles of it. Never run on a GPU."""
    bounds = F.pad(packing.last + 1, (1, 0)).int()  # (N + 1,)
    longest = max(packing.lengths)
    q = q.transpose(0, 1)  # (T, H, D)
    k = k.transpose(0, 1)  # (T, K, D)
    v = v.transpose(0, 1)
    if flash_attn_varlen_func:
        return flash_attn_varlen_func(
            q, k, v, cu_seqlens_q=bounds, cu_seqlens_k=bounds,
            max_seqlen_q=longest, max_seqlen_k=longest, softmax_scale=scale, causal=True)[None]

    # The window is all keys before and none after.
    return varlen_attn(
        q, k, v, cu_seq_q=bounds, cu_seq_k=bounds, max_q=longest, max_k=longest,
        scale=scale, window_size=(-1, 0), enable_gqa=True)[None]


def cached_sequences(q, packing, layer, scale):
    """New tokens and their past in a KVCache: q (H, T, D) -> (1, T, H, D)."""
    k_cache = packing.cache.k[layer]  # (n_slots, K, S, D)
    v_cache = packing.cache.v[layer]
    out = torch.empty_like(q.transpose(0, 1))  # (T, H, D)
    if packing.n_decode:
        out[:packing.n_decode] = one_token_each(q, k_cache, v_cache, packing, scale)
    # Prompts and interpreter text.
    for slots, indices, mask in packing.groups:
        n_keys = mask.shape[-1]
        attended = sdpa(
            q[:, indices].transpose(0, 1),  # (n, H, new, D)
            k_cache[slots, :, :n_keys],  # (n, K, keys, D)
            v_cache[slots, :, :n_keys],
            attn_mask=mask, scale=scale)
        out[indices] = attended.transpose(1, 2)
    return out[None]


def cached_sequences_varlen(q, packing, layer, scale):
    """The same in a PagedCache, one call of a kernel whatever rows feed. Never run on a GPU."""
    # Causal, aligned at the last key. If each row feeds one token, no key comes after it, and only
    # a full window lets the kernel read a key once for all its query heads.
    window = (-1, 0) if packing.longest_new > 1 else (-1, -1)
    return varlen_attn(
        q.transpose(0, 1),  # (T, H, D)
        packing.cache.k[layer],  # (pages, PAGE_TOKENS, K, D)
        packing.cache.v[layer],
        cu_seq_q=packing.begins,
        cu_seq_k=packing.key_begins,
        max_q=packing.longest_new,
        max_k=packing.longest,
        scale=scale,
        window_size=window,
        enable_gqa=True,
        seqused_k=packing.n_seen,
        block_table=packing.block_table,
        # CRUCIAL: other numbers of splits compute wrong rows where keys lie in pages (PyTorch's
        # issue 194167), and depend on the longest row.
        num_splits=1)[None]


def one_token_each(q, k_cache, v_cache, packing, scale):
    """Decoding: the first n tokens are one of each of n rows. q (H, T, D) -> (n, H, D)."""
    n_heads, _, dim = q.shape
    n_view = packing.bias.shape[0]
    slots = packing.slot_of_token[:packing.n_decode]

    # Query heads of one key head become queries of one sequence.
    queries = q.new_zeros(n_view, n_heads, dim)
    queries[slots] = q[:, :packing.n_decode].transpose(0, 1)
    queries = queries.view(n_view, k_cache.shape[1], -1, dim)  # (slots, K, H/K, D)
    out = F.scaled_dot_product_attention(
        queries,
        k_cache[:n_view, :, :packing.longest],  # (slots, K, longest, D)
        v_cache[:n_view, :, :packing.longest],
        attn_mask=packing.bias, scale=scale)
    return out.reshape(n_view, n_heads, dim)[slots]


# transformers builds no mask for a name that it does not know.
AttentionInterface.register("retool", packed_attention)


def tick_bytes(config, n_tokens, n_rows, dtype, top_p=1.0):
    """Bytes that a tick needs beside weights and cache, for n_tokens fed and n_rows sampled:

    tokens * (10 hidden + 3 intermediate + 2 D (H + 2 K) + 2 L K D) * bytes of a number
    + rows * V * (40, or with top_p 120)
    """
    # Activations of one layer, and a copy of keys and values for other samples of a prompt.
    n_qkv_heads = config.num_attention_heads + 2 * config.num_key_value_heads
    intermediate = getattr(config, "intermediate_size", 4 * config.hidden_size)
    per_token = 10 * config.hidden_size + 3 * intermediate + 2 * head_dim(config) * n_qkv_heads
    per_token += 2 * math.prod(KVCache.shape(config, 1, 1))
    # A logit in the model's dtype and in fp32, its log-probability, and float64 for the CDF; the
    # nucleus is found by sorting.
    per_logit = 40 if top_p == 1.0 else 120
    return n_tokens * per_token * dtype.itemsize + n_rows * config.vocab_size * per_logit


def free_bytes(device):
    """Nine tenths of a device's free memory, on a CPU this rank's share; infinite if unknown."""
    if device.type == "cuda":
        # What PyTorch has reserved is in pieces.
        torch.cuda.empty_cache()
        return 0.9 * torch.cuda.mem_get_info(device)[0]
    meminfo = Path("/proc/meminfo")  # Linux
    if meminfo.exists():
        kib = re.search(r"MemAvailable:\s*(\d+)", meminfo.read_text())[1]
        n_ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # on this machine
        return 0.9 * 1024 * int(kib) / n_ranks
    return math.inf


@torch.inference_mode()
def forward_step(model, cache, slots, tokens):
    """Feed tokens[i] (a list) into slots[i] -> fp32 logits (N, V) after their last tokens."""
    device = cache.k.device
    packing = Packing([len(new) for new in tokens], device, cache, slots)
    stream = list(itertools.chain.from_iterable(tokens))
    input_ids = torch.tensor(stream, device=device)[None]  # (1, T)
    logits = model(input_ids=input_ids, position_ids=packing.position_ids[None], use_cache=False,
                   logits_to_keep=packing.last, packing=packing).logits[0]
    for slot, new in zip(slots, tokens):
        cache.lengths[slot] += len(new)
    return at_least_fp32(logits)


# ---------------------------------------------------------------------------------------------
# Noise, and the token that it chooses

def noise_bits(*fields):
    """64 random bits as a function of the fields (splitmix64 on each); arrays broadcast."""
    bits = np.uint64(0)
    with np.errstate(over="ignore"):  # products wrap around
        for value in fields:
            bits = (bits ^ np.asarray(value).astype(np.uint64)) + np.uint64(0x9E3779B97F4A7C15)
            bits = (bits ^ (bits >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            bits = (bits ^ (bits >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            bits = bits ^ (bits >> np.uint64(31))
    return bits


def sample(logits, uniform, temperature, top_p):
    """Inverse CDF in float64: logits (N, V), uniform (N,) in [0, 1) -> tokens (N,), logprobs (N,)
    of the full softmax. Temperature 0 is greedy, with logprobs at 1. Training, which scores the
    full softmax, needs top_p 1."""
    logprobs = torch.log_softmax(logits / (temperature or 1.0), -1)  # (N, V)
    if temperature == 0:
        tokens = logits.argmax(-1)
    else:
        probs = logprobs.double().exp()
        if top_p < 1.0:
            # The likeliest tokens stay, up to the one that crosses top_p.
            ordered, order = probs.sort(-1, descending=True)
            mass_before = ordered.cumsum(-1) - ordered
            ordered = ordered.masked_fill(mass_before >= top_p, 0.0)
            probs = probs.scatter(-1, order, ordered)
        # The first token whose cumulative mass exceeds the drawn share.
        cdf = probs.cumsum(-1)
        threshold = uniform[:, None] * cdf[:, -1:]
        tokens = torch.searchsorted(cdf, threshold, right=True)[:, 0]
        tokens = tokens.clamp(max=logits.shape[-1] - 1)
    return tokens, logprobs.gather(-1, tokens[:, None])[:, 0]


# ---------------------------------------------------------------------------------------------
# Loading a model

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def first_line(error):
    """The first line of an error's message, or its type if it has none."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


@functools.cache
def choose_dtype(name):
    """The name; for "auto" bf16 if that is clearly faster here: many CPUs only emulate it."""
    if name != "auto":
        return name
    # Not timed: the start of a kernel hides how fast it is.
    if torch.cuda.is_available():
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"

    ones = torch.ones(256, 512)
    seconds = []
    for dtype in DTYPES.values():
        timer = Timer(
            "x.mm(x.T)", globals={"x": ones.to(dtype)}, num_threads=torch.get_num_threads())
        seconds.append(min(timer.timeit(1).mean for _ in range(5)))
    # All ranks follow the first.
    if dist.is_initialized():
        dist.broadcast_object_list(seconds)
    fp32, bf16 = seconds
    if os.environ.get("RANK", "0") == "0":
        print(f"--dtype auto: products in bf16 are {fp32 / bf16:.2f} times as fast as in fp32")
    return "bf16" if fp32 > 1.5 * bf16 else "fp32"


def from_checkpoint(loader, path, **options):
    """loader.from_pretrained(path); UserError if that is no checkpoint."""
    folder = Path(path)
    if folder.is_file():
        raise UserError(
            f"{path}: no folder, no hub id (how to convert a GGUF file: runs/smollm2.sh)")
    if folder.is_dir() and not (folder / "config.json").exists():
        raise UserError(
            f"{path}: no config.json in there (a run's model is in its folder checkpoint)")
    if not folder.exists():
        if path.count("/") != 1 or path[0] in "./~":
            raise UserError(f"{path}: no such folder, and not a hub id (OWNER/NAME)")
        need_hub()
    try:
        return loader.from_pretrained(path, **options)
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(f"{path}: cannot be loaded ({first_line(error)})") from None


@functools.cache
def need_hub():
    """If the hub does not answer, libraries use what is downloaded."""
    address = urllib.parse.urlparse(huggingface_hub.constants.ENDPOINT)
    try:
        socket.create_connection((address.hostname, address.port or 443), timeout=5).close()
    except OSError:
        huggingface_hub.constants.HF_HUB_OFFLINE = True
        # The package datasets reads this at import.
        os.environ["HF_DATASETS_OFFLINE"] = "1"


def load_tokenizer(path, template_kwargs=""):
    """A checkpoint's tokenizer. Its EOS becomes what ends an answer in the chat template, whose
    variables template_kwargs, a JSON object or "", are set for good."""
    tokenizer = from_checkpoint(AutoTokenizer, path)
    # Without tokenizer files a folder gives an empty one, not an error.
    if len(tokenizer) < 2 or tokenizer.eos_token_id is None or not tokenizer.chat_template:
        raise UserError(f"{path}: no usable tokenizer there (needs vocabulary, EOS, chat template)")

    # A template given by several names is a dict.
    templates = tokenizer.chat_template
    is_dict = isinstance(templates, dict)
    if not is_dict:
        templates = {"only": templates}
    words = re.findall(r"\w+", " ".join(templates.values()))
    variables = json.loads(template_kwargs or "{}")
    for name in variables:
        if name not in words:
            raise UserError(f"{path}: --template_kwargs: its chat template knows no {name!r}")

    for name, template in templates.items():
        # A template that writes today's date makes other prompts tomorrow.
        templates[name] = with_variables(with_fixed_date(template), variables)
    tokenizer.chat_template = templates if is_dict else templates["only"]

    # What special token does the template write after an answer? Where two answers differ, the
    # answer has begun: whatever the template puts in front of it lies before.
    question = {"role": "user", "content": "What is 17 + 25?"}
    turns = []
    for text in ("x", "y"):
        answer = {"role": "assistant", "content": text}
        rendered = render_chat(tokenizer, [question, answer])
        turns.append(tokenizer.encode(rendered, add_special_tokens=False))
    answer_at = len(os.path.commonprefix(turns))
    added = tokenizer.added_tokens_decoder
    ends = [token for token in turns[0][answer_at:] if token in added and added[token].special]
    if ends:
        tokenizer.eos_token = tokenizer.convert_ids_to_tokens(ends[0])

    # A template that fails on a question is refused here, before a run starts.
    prompt = tokenizer.decode(encode_chat(tokenizer, question["content"]))
    if "<think>" in prompt.rpartition("</think>")[2]:
        warn(f"{path}: the chat template opens a thought (<think>) that every answer begins in; "
             "--template_kwargs may close it")
    return tokenizer


@functools.cache
def warn(text):
    """Say it once, on rank 0."""
    if os.environ.get("RANK", "0") == "0":
        print(f"warning: {text}", file=sys.stderr, flush=True)


# The date of every prompt.
PROMPT_DATE = datetime.datetime(2024, 7, 26)


def with_fixed_date(chat_template):
    """The chat template; if it calls `strftime_now`, behind a macro of that name that formats
    PROMPT_DATE."""
    # A macro in the template hides the function that transformers gives to it, and unlike an
    # argument it is saved with the tokenizer.
    if "strftime_now" not in chat_template:
        return chat_template
    text = "format"
    for letter in "aAbBcdDeFfGhHIjmMpRSTuUVwWxXyYzZ":
        value = PROMPT_DATE.strftime("%" + letter)
        text += f".replace('%{letter}', '{value}')"
        if value.isdigit():
            text += f".replace('%-{letter}', '{int(value)}')"
    # The line break after the macro is not part of the prompt: the template's blocks take one.
    macro = "{%- macro strftime_now(format) %}{{ " + text + " }}{% endmacro %}\n"
    # A tokenizer that was saved has it already.
    if macro in chat_template:
        return chat_template
    return macro + chat_template


TEMPLATE_KWARGS = 'JSON object of variables for the chat template: {"enable_thinking": false}'


def with_variables(chat_template, variables):
    """The chat template behind lines that set some of its variables."""
    for name, value in variables.items():
        # The comment tells a line that a saved tokenizer has already from the template's own.
        line = "{# --template_kwargs #}{% set " + name + " = "
        chat_template = re.sub(rf"^{re.escape(line)}.*\n", "", chat_template, flags=re.MULTILINE)
        # What Python writes for a value of JSON, Jinja reads.
        chat_template = f"{line}{value!r} %}}\n{chat_template}"
    return chat_template


def render_chat(tokenizer, messages, for_answer=False):
    """The text that the chat template makes of messages; UserError if it fails. for_answer: up to
    where the assistant's answer begins."""
    try:
        return tokenizer.apply_chat_template(
            messages, add_generation_prompt=for_answer, tokenize=False)
    except Exception as error:  # a template is a program, and raises what it likes
        reason = first_line(f"{type(error).__name__}: {error}")
        raise UserError(f"{tokenizer.name_or_path}: its chat template fails on a question from "
                        f"the user ({reason})") from None


def encode_chat(tokenizer, content):
    """Token ids of one user message in the chat template; UserError if the message is not in what
    the template makes of it."""
    message = {"role": "user", "content": content}
    prompt = render_chat(tokenizer, [message], for_answer=True)
    # Templates trim, and some break lines anew.
    if "".join(content.split()) not in "".join(prompt.split()):
        raise UserError(f"{tokenizer.name_or_path}: its chat template does not write the user's "
                        f"message as it is: {content[:60]!r}")
    return tokenizer.encode(prompt, add_special_tokens=False)


# As the paper asks, in words of our own; for a model that has never seen the format.
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


def end_tokens(model, tokenizer):
    """What ends a response: the tokenizer's EOS and the generation config's."""
    ends = {tokenizer.eos_token_id}
    if model.generation_config:
        configured = model.generation_config.eos_token_id
        ends |= set(configured if isinstance(configured, list) else [configured])
    return ends - {None}


def save_beside_weights(model, tokenizer, folder):
    """Write all that a checkpoint holds but the weights; config.json and generation_config.json
    name every end of a response."""
    # A policy trained to stop at the template's end of turn must stop there in other programs,
    # which read these files and not the tokenizer's.
    ends = sorted(end_tokens(model, tokenizer))
    named = ends if len(ends) > 1 else ends[0]
    model.config.eos_token_id = named
    model.config.save_pretrained(folder)
    if model.generation_config:
        model.generation_config.eos_token_id = named
        model.generation_config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def load_config(path, tokenizer=None):
    """A checkpoint's configuration; UserError if it has fewer embeddings than the tokenizer."""
    config = from_checkpoint(AutoConfig, path)
    if tokenizer is not None and config.vocab_size < len(tokenizer):
        raise UserError(f"{path}: the model has {config.vocab_size} rows of embeddings, "
                        f"the tokenizer {len(tokenizer)} tokens")
    return config


def load_model(path, device, dtype="fp32", weights=True):
    """A causal LM with `packed_attention`; weights=False: random, to be overwritten."""
    # Trap: a later `.to(torch.bfloat16)` would round RoPE's frequencies.
    if weights:
        model = from_checkpoint(AutoModelForCausalLM, path, dtype=DTYPES[dtype])
    else:
        model = AutoModelForCausalLM.from_config(load_config(path), dtype=DTYPES[dtype])
    # Before it is moved: the check makes fp32 copies, for which a GPU may have no room, and its
    # tolerance is that of full fp32 products, which a GPU may round.
    use_packed_attention(model, path)
    if uses_varlen(torch.device(device), DTYPES[dtype]):
        need_varlen(model.config, device)
    return model.to(device)


def need_varlen(config, device):
    """UserError if this GPU, this PyTorch or these heads have no kernel for half precision."""
    instead = "use --dtype fp32"
    wanted = {"enable_gqa", "seqused_k", "block_table", "num_splits"}
    missing = wanted - set(inspect.signature(varlen_attn).parameters)
    if missing:
        raise UserError(f"bf16 on a GPU needs a newer PyTorch: varlen_attn of {torch.__version__} "
                        f"has no {', '.join(sorted(missing))}; or {instead}")
    if torch.cuda.get_device_capability(device) < (8, 0):
        raise UserError(f"bf16 needs a GPU of compute capability 8.0 or more: {instead}")
    if head_dim(config) % 8 or head_dim(config) > 256:
        raise UserError(f"bf16 on a GPU needs a head dim that 8 divides, at most 256, "
                        f"not {head_dim(config)}: {instead}")


def is_out_of_memory(error):
    """Whether an exception says so. PyTorch's are RuntimeErrors, on the CPU of no class of their
    own."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    text = str(error).lower()
    return "out of memory" in text or "allocate memory" in text


def logits_in_three_ways(model):
    """Logits of two sequences by the model's own attention and packed, both (29, V), and of their
    last tokens through the cache (2, V)."""
    first = torch.arange(12, device=model.device) % model.config.vocab_size
    second = torch.arange(17, device=model.device) % model.config.vocab_size
    model.eval()
    plain = [model(input_ids=sequence[None], use_cache=False).logits[0]
             for sequence in (first, second)]

    model.set_attn_implementation("retool")
    packing = Packing([12, 17], model.device)
    hidden = model.model(
        input_ids=torch.cat([first, second])[None], position_ids=packing.position_ids[None],
        use_cache=False, packing=packing).last_hidden_state[0]
    packed = model.lm_head(hidden)

    cache = KVCache(model.config, 2, 17, packed.dtype, model.device)
    forward_step(model, cache, [0, 1], [first[:9].tolist(), second[:11].tolist()])
    cached = forward_step(model, cache, [0, 1], [first[9:].tolist(), second[11:].tolist()])
    return torch.cat(plain), packed, cached


@torch.no_grad()
def use_packed_attention(model, name):
    """Switch to `packed_attention`. UserError unless two sequences keep their logits, packed
    (trainers) and through the cache (sampler)."""
    refused = f"{name}: the architecture {model.config.model_type} is not supported"
    rope = str(getattr(model.config, "rope_parameters", ""))
    if "longrope" in str(model.config) or "dynamic" in rope:
        raise UserError(
            f"{refused}: its position encoding depends on the length of the longest sequence")
    if getattr(model.config, "attention_chunk_size", None):
        raise UserError(f"{refused}: its attention is chunked")

    # In fp32 a difference is not rounding.
    dtypes = {parameter: parameter.dtype for parameter in model.parameters()}
    try:
        for parameter in dtypes:
            parameter.data = at_least_fp32(parameter.data)
        plain, packed, cached = logits_in_three_ways(model)
        list(model.model.layers)  # the trainers shard these: refused where there are none
    except (AttributeError, TypeError, RuntimeError, ValueError, IndexError, KeyError,
            MemoryError) as error:
        if is_out_of_memory(error):
            raise UserError(f"{name}: not enough memory to check it in fp32") from None
        raise UserError(f"{refused}: {type(error).__name__}: {first_line(error)}") from None

    plain_last = plain[[11, 28]]  # the last tokens of the two
    for way, ours, theirs in (("packed", packed, plain), ("cached", cached, plain_last)):
        error = ((ours - theirs).norm(dim=-1).max() / theirs.norm(dim=-1).mean()).item()
        # Rounding makes 3e-5, what is refused 0.09.
        if not error < 1e-3:
            raise UserError(f"{refused}: {way} sequences get other logits (relative difference "
                            f"{error:.0e}): layers that are not attention, or scaled logits")

    for parameter, dtype in dtypes.items():
        # A copy: at a file's odd addresses a CPU rounds otherwise than in a resumed run.
        parameter.data = parameter.data.to(dtype, copy=True)


# ---------------------------------------------------------------------------------------------
# Types of flags, for argparse


def in_range(low, high=math.inf, number=float, above=False, off=None):
    """An argparse type: a number from low to high, or `off`; above: low itself is too low."""
    limits = f"above {low}" if above else f"at least {low}"
    if high < math.inf:
        limits += f" and at most {high}"
    if off is not None:
        limits = f"{off} or {limits}"

    def parse(text):
        value = number(text)
        is_inside = low <= value <= high and not (above and value == low)
        if not is_inside and value != off:
            raise argparse.ArgumentTypeError(f"{text}: must be {limits}")
        return value

    parse.__name__ = number.__name__  # what argparse calls it where the text is no number
    return parse


def at_least(low):
    return in_range(low, 2**63 - 1, number=int)  # 64 bits hold it


seed_number = in_range(-2**63, 2**64 - 1, number=int)  # what torch takes


def json_object(text):
    """An argparse type: the text, if it is a JSON object or empty."""
    try:
        value = json.loads(text or "{}")
        json.dumps(value, allow_nan=False)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f'{text}: must be a JSON object, {{"name": value}}')
    return text


# ---------------------------------------------------------------------------------------------
# The demo

COLOURS = {"text": 0, "code": 36, "output": 33, "answer": 32}  # of a terminal (ANSI)
# After any other tag a response goes on with text.
PART_AFTER = {tool.open: "code" for tool in TOOLS}
PART_AFTER[ANSWER_OPEN] = "answer"


class Printer:
    """Prints a response while it grows."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        self.begin = time.perf_counter()
        self.text = ""  # printed so far
        self.n_tokens = 0
        self.n_calls = 0

    def show(self, trajectory):
        for call in trajectory.tool_calls[self.n_calls:]:
            if call.status:  # it came back
                self.show_tokens(trajectory, call.end)
                self.n_calls += 1
                print(f"\n[call of {call.tool}: {call.status}, {call.seconds:.3f} s]")
        self.show_tokens(trajectory, len(trajectory.response_ids))

        if trajectory.finish_reason:
            n_sampled = sum(trajectory.loss_mask)
            n_forced = trajectory.loss_mask.count(0)
            rate = n_sampled / (time.perf_counter() - self.begin)
            print(f"\n[{n_sampled} tokens sampled, {n_forced} forced (masked), "
                  f"{rate:.0f} tokens/s, ended by {trajectory.finish_reason}]")

    def show_tokens(self, trajectory, end):
        ids = trajectory.response_ids
        for n in range(self.n_tokens, end):
            text = self.tokenizer.decode(ids[:n + 1], clean_up_tokenization_spaces=False)
            # The next token may complete a character.
            if n + 1 < len(ids) or not trajectory.finish_reason:
                text = text.rstrip("\ufffd")
            piece = text[len(self.text):]
            if sys.stdout.isatty():
                tags = [""] + TAG.findall(self.text)
                part = PART_AFTER.get(tags[-1], "text") if trajectory.loss_mask[n] else "output"
                piece = f"\033[{COLOURS[part]}m{piece}\033[0m"
            print(piece, end="", flush=True)
            self.text = text
        self.n_tokens = end


def print_tick(engine, admitted):
    n_resuming = len([row for row in engine.active if len(row.pending) > 1])
    n_decoding = len(engine.active) - n_resuming
    print(f"tick {engine.tick}: {n_decoding} decoding, {n_resuming} resuming, "
          f"{len(admitted)} admitted, {len(engine.paused)} waiting for tools")


async def demo(args):
    tokenizer = load_tokenizer(args.model, args.template_kwargs)
    load_config(args.model, tokenizer)
    model = load_model(args.model, "cuda" if torch.cuda.is_available() else "cpu")

    prompt = encode_prompt(tokenizer, load_template(args.prompt_template), args.question)
    room = model.config.max_position_embeddings - len(prompt)
    limit = args.max_response_tokens or min(room, 1024)
    if not 1 <= limit <= room:
        raise UserError(f"--max_response_tokens {limit}: the question leaves {room} positions")

    async with Sandbox() as sandbox:
        if args.busy is not None:
            sandbox = Service(sandbox, args.busy)
        printers = [Printer(tokenizer) for _ in range(args.samples)]

        def on_tokens(trajectory):
            number = trajectory.sample_index
            # Only a single response streams.
            if args.samples > 1 or args.ticks:
                if not trajectory.finish_reason:
                    return
                print(f"--- response {number + 1} of {args.samples} ---")
            printers[number].show(trajectory)

        await generate(
            model, tokenizer, [prompt], sandbox, n_samples=args.samples, seed=args.seed,
            temperature=args.temperature, max_response_tokens=limit, max_calls=args.max_calls,
            on_tokens=on_tokens, on_tick=print_tick if args.ticks else None)


def main():
    parser = argparse.ArgumentParser(
        usage="python rollout.py --model MODEL [flags] QUESTION",
        description="Ask a checkpoint a question.",
        exit_on_error=False)
    add = parser.add_argument
    add("question", help="text of the user's message")
    add("--model", required=True, help="checkpoint folder or hub id")
    add("--samples", type=at_least(1), default=1, help="number of responses; a single one streams")
    add("--temperature", type=in_range(0.0), default=1.0,
        help="temperature of sampling, 0: greedy")
    add("--seed", type=seed_number, default=0, help="seed of sampling")
    add("--max_response_tokens", type=at_least(0), default=0,
        help="length of a response with interpreter text; 0: what fits, at most 1024")
    add("--max_calls", type=at_least(0), default=8, help="snippets per response")
    add("--busy", type=in_range(0.0, 1.0),
        help="probability that a call is refused; with it, calls may ask the embedded boxes")
    add("--prompt_template", default="plain", help="plain, retool, or a file with {question}")
    add("--template_kwargs", type=json_object, default="", help=TEMPLATE_KWARGS)
    add("--ticks", action="store_true", help="print what every tick feeds")
    try:
        asyncio.run(demo(parser.parse_args()))
    except (UserError, FloatingPointError, argparse.ArgumentError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
