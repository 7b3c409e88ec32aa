"""Batched generation with a manual KV cache that stops at </code>, runs the snippet, and resumes.

What one tick of `generate` does, for every row that is able to move:

    1. rows whose tool result is due rejoin; free cache slots are refilled from the queue
    2. ONE forward call over a flat stream of tokens: a decoding row feeds 1 token, a resuming row its closing
       tag plus the interpreter text, a new row its prompt. Prefill, decode and resume are the same call.
    3. one token is sampled per row. If it ends the row, its slot is free again; if it completes `</code>`,
       the row leaves the batch, keeps its slot and cache, and the snippet runs in the sandbox meanwhile.

Token ids are the only currency: what was sampled is never decoded and encoded again. The 0/1 `loss_mask` is
born here, beside the token (1 = sampled by the policy, 0 = forced interpreter text), and travels unchanged to
loss, GAE and metrics.

Definitions (each has a test):
  - A snippet is closed by the first `</code>` after its `<code>`, wherever it stands, also inside a string of
    the snippet: the text rules, as in the paper. It opens at the last `<code>` before that. `</code>` without
    `<code>` is plain text.
  - An empty snippet is run like any other and counts as a call.
  - The token that completes `</code>` may run past it (`>\\n`, `>\\n\\n`, `></`): it is kept, and only
    what is missing is appended.
  - finish_reason: `eos`; `length` (the response, interpreter text included, reached max_response_tokens);
    `max_calls` (a `</code>` beyond max_calls; after the last allowed call the model may still answer);
    `sandbox_error` (the sandbox itself failed: the row must be dropped, not scored).
  - A row's noise depends on (seed, step, prompt key, sample, position) alone, never on its batch-mates.

Reproducible by default: a paused row rejoins a fixed number of ticks after its call, and only then is its
result waited for, so that batch shapes (and with them rounding) do not depend on the clock. `rejoin_ticks=0`
gives that up: rows rejoin as soon as their result is there.

    python rollout.py                # against the slow twin: token for token, then tokens/s of both
    python rollout.py --model DIR    # the same on a checkpoint, on a GPU if there is one
    python rollout.py --slow_tools   # do snippets that sleep hold up a rollout?

Letters in shape comments: N rows in a step, T tokens in the flat stream, V vocabulary, L layers, H query
heads, K key/value heads, D head dim, S cache positions per slot.
"""
import argparse
import asyncio
import bisect
import copy
import heapq
import json
import math
import re
import resource
import sys
import time
from collections import deque
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from transformers import AttentionInterface

from sandbox import Sandbox, SandboxResult

try:  # CUDA only, an optional package; without it PyTorch's own FlashAttention is used
    from flash_attn import flash_attn_varlen_func
except ImportError:
    flash_attn_varlen_func = None

CODE_OPEN, CODE_CLOSE = "<code>", "</code>"
INTERPRETER_OPEN, INTERPRETER_CLOSE = "<interpreter>", "</interpreter>"
TAG = re.compile(r"<(/?)(code|interpreter|answer)>")
INTERPRETER_BLOCK = re.compile(r"\s*<interpreter>\n?(.*?)\n?</interpreter>", re.DOTALL)
FENCE = re.compile(r"\s*```(?:python|py)?[ \t]*\n(.*?)\n?[ \t]*```\s*", re.DOTALL)


# ------------------------------------------------------------------------------------------------------------
# Text <-> segments. SFT and rollout share this encoder, so that both see the same token boundaries.


def strip_fence(snippet):
    """The Python source in the text between <code> and </code>: the fenced block if there is one, else all of
    it."""
    match = FENCE.fullmatch(snippet)
    return match.group(1) if match else snippet.strip("\n")


def split_segments(text):
    """Cut a response into [(kind, text)], kind "model" or "interpreter", right after each closing tag.

    Only an <interpreter> block that directly follows </code> is the sandbox's; the text of an interpreter
    segment is what stands between the tags. Anything else, also an <interpreter> the model wrote by itself,
    is model text.
    """
    segments, begin, search = [], 0, 0
    while (close := text.find(CODE_CLOSE, search)) >= 0:
        search = close + len(CODE_CLOSE)
        block = INTERPRETER_BLOCK.match(text, search)
        if block:
            segments += [("model", text[begin:search]), ("interpreter", block.group(1))]
            begin = search = block.end()
    return segments + [("model", text[begin:])]


def encode_text(tokenizer, text):
    """Token ids of plain text: nothing is added, and text that looks like a special token is not one."""
    return tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)


def break_tags(output):
    """What a snippet prints is the policy's to choose: our tags in it lose their meaning."""
    return TAG.sub(r"[\1\2]", output)


def neutralise(tokenizer, output):
    """Interpreter text without our tags and without the tokenizer's special tokens."""
    output = break_tags(output)
    for special in tokenizer.all_special_tokens:
        output = output.replace(special, special[:1] + " " + special[1:])
    return output


def encode_interpreter(tokenizer, output, max_tokens, overrun=""):
    """Token ids of the forced block `\\n<interpreter>\\n{output}\\n</interpreter>`.

    output: what the sandbox gave back, without outer newlines; at most max_tokens of its tokens are kept
    (head and tail, with a notice between).
    overrun: text of the last sampled token beyond `</code>`; a newline already in it is not written twice.
    """
    body = encode_text(tokenizer, neutralise(tokenizer, output.strip("\n")))
    if len(body) > max_tokens:
        notice = encode_text(tokenizer, f"\n[... {len(body) - max_tokens} tokens left out ...]\n")
        head = (max_tokens + 1) // 2
        body = body[:head] + notice + body[len(body) - (max_tokens - head):]
    begin = INTERPRETER_OPEN + "\n" if overrun.endswith("\n") else "\n" + INTERPRETER_OPEN + "\n"
    return encode_text(tokenizer, begin) + body + encode_text(tokenizer, "\n" + INTERPRETER_CLOSE)


def encode_response(tokenizer, text, max_interpreter_tokens, masked_calls=()):
    """A whole response as (ids, loss_mask), EOS appended and trained, interpreter tokens 0.

    masked_calls: indices of snippets the model must not learn to write (they failed): `<code>`...`</code>` is
    0 there too. Each segment is encoded by itself, exactly as `generate` meets it.
    """
    ids, mask, call = [], [], 0
    for kind, segment in split_segments(text):
        if kind == "interpreter":
            block = encode_interpreter(tokenizer, segment, max_interpreter_tokens)
            ids, mask, call = ids + block, mask + [0] * len(block), call + 1
            continue
        encoded = tokenizer(segment, add_special_tokens=False, split_special_tokens=True,
                            return_offsets_mapping=True)
        # A token that starts before the snippet is the prose's, even if it reaches into the tag.
        snippet = segment.rfind(CODE_OPEN) if call in masked_calls else len(segment)
        ids += encoded["input_ids"]
        mask += [int(start < snippet) for start, _ in encoded["offset_mapping"]]
    return ids + [tokenizer.eos_token_id], mask + [1]


class Pieces:
    """The text each token id contributes: `pieces[i]`. Decoding next to an anchor keeps a SentencePiece
    leading space."""

    def __init__(self, tokenizer):
        self.tokenizer, self.cache = tokenizer, {}
        self.anchor = encode_text(tokenizer, "x")[-1]
        self.anchor_text = tokenizer.decode([self.anchor])

    def __getitem__(self, token):
        if token not in self.cache:
            text = self.tokenizer.decode([self.anchor, token], clean_up_tokenization_spaces=False)
            self.cache[token] = text[len(self.anchor_text):]
        return self.cache[token]


def find_snippet(pieces, ids, begin, overrun):
    """The snippet that the last token of `ids` has just closed: (start, code), or None if no <code> is open.

    begin: index where the current model segment starts; overrun: what the last token holds beyond the closing
    tag; start: index of the token in which `<code>` begins.
    """
    ending, text = len(CODE_CLOSE + overrun), "".join(pieces[token] for token in ids[begin:])
    opening = text[:-ending].rfind(CODE_OPEN)
    if opening < 0:
        return None
    start, position = begin, len(pieces[ids[begin]])
    while position <= opening:
        start += 1
        position += len(pieces[ids[start]])
    # Decode the span as a whole: a character may be spread over several byte-level tokens.
    text = pieces.tokenizer.decode(ids[start:], clean_up_tokenization_spaces=False)
    return start, strip_fence(text[:-ending].rpartition(CODE_OPEN)[2])


# ------------------------------------------------------------------------------------------------------------
# The cache and the attention function, shared by sampler and trainer


def at_least_fp32(x):
    """Softmax and logsumexp, and what goes into them, are never in half precision."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def head_dim(config):
    """Some configurations say it, others leave it to be divided."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


class RolloutError(ValueError):
    """What this engine cannot serve: attention of another kind, not even one row that fits into memory."""


class KVCache:
    """Contiguous slots: k and v are (L, n_slots, K, S, D); `lengths[slot]` tokens are filled.

    Why not pages. A slot holds the longest possible row, so a row that was admitted always finishes: nothing
    is preempted, no row starves (the queue is served in order), there is no block table. The price is what
    rows leave empty. Measured by the benchmark below: rows with 1-4 calls, in slots for 1,088 tokens, fill
    14 % of them, averaged over their lives; pages would hold up to seven times as many rows in the same
    memory. Where memory binds, pages are the next thing to build.
    """

    @staticmethod
    def shape(config, n_slots, max_tokens):
        """(L, n_slots, K, S, D)"""
        return config.num_hidden_layers, n_slots, config.num_key_value_heads, max_tokens, head_dim(config)

    def __init__(self, config, n_slots, max_tokens, dtype, device):
        shape = self.shape(config, n_slots, max_tokens)
        self.k = torch.zeros(shape, dtype=dtype, device=device)
        self.v = torch.zeros(shape, dtype=dtype, device=device)
        self.lengths = [0] * n_slots


class Packing:
    """Describes a flat stream of N sequences to the attention function, computed once for all layers.

    lengths: new tokens of each sequence, in stream order. With a cache, slots[i] holds what sequence i saw
    before; rows that feed a single token must come first (they are decoded together), longer ones after them.
    """

    def __init__(self, lengths, device, cache=None, slots=None):
        self.lengths, self.cache = lengths, cache
        self.past = [cache.lengths[s] for s in slots] if cache else [0] * len(lengths)
        positions = np.concatenate([np.arange(p, p + n) for p, n in zip(self.past, lengths)])
        self.position_ids = torch.from_numpy(positions).to(device)  # (T,)
        self.last = torch.from_numpy(np.cumsum(lengths) - 1).to(
            device)  # (N,) index of each sequence's last token
        if cache is None:
            return
        self.slots = slots
        self.n_decode = bisect.bisect_right(lengths, 1)  # lengths are 1, 1, ..., 1, then longer
        assert all(n > 1 for n in lengths[self.n_decode:]), "single-token rows must come first"
        self.slot_of_token = torch.from_numpy(np.repeat(slots, lengths)).to(device)  # (T,)
        if self.n_decode:
            # All slots up to the highest in use take part through a view: gathering the used ones would copy
            # the whole cache each step (21 ms against 1 ms per layer at 128 rows). Idle slots see one key,
            # ignored.
            self.decode_slots = self.slot_of_token[: self.n_decode]
            seen = np.ones(max(slots[: self.n_decode]) + 1, dtype=np.int64)
            seen[slots[: self.n_decode]] = [p + 1 for p in self.past[: self.n_decode]]
            self.longest = int(seen.max())
            hidden = np.arange(self.longest)[None] >= seen[:, None]  # (slots in view, longest)
            bias = np.where(hidden, -np.inf, 0.0)[:, None, None]
            self.bias = torch.from_numpy(bias).to(device=device, dtype=cache.k.dtype)


def flash_attention(q, k, v, last, longest, scale):
    """Whole sequences by a CUDA kernel: q (H, T, D), k, v (K, T, D) -> (1, T, H, D); last (N,) is the index of
    each sequence's last token. Written from the documentation of the two: never run, NOT MEASURED."""
    bounds = F.pad(last + 1, (1, 0)).int()  # (N + 1,)
    q, k, v = (x.transpose(0, 1) for x in (q, k, v))  # (T, heads, D)
    if flash_attn_varlen_func:
        return flash_attn_varlen_func(q, k, v, bounds, bounds, longest, longest, softmax_scale=scale,
                                      causal=True)[None]
    from torch.nn.attention.varlen import varlen_attn  # only here: it needs CUDA
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))  # enable_gqa came with 2.12
    return varlen_attn(q, k, v, bounds, bounds, longest, longest, scale=scale, window_size=(-1, 0))[None]


def packed_attention(module, query, key, value, attention_mask, scaling=None, packing=None, **kwargs):
    """Attention of a flat stream of sequences; the one function of sampler and trainer.

    query (1, H, T, D), key and value (1, K, T, D) -> (1, T, H, D). `packing` says where sequences begin and,
    with a cache, where each one's earlier keys are. Registered with transformers; `attention_mask` is None
    (see the registration below).
    """
    unknown = [name for name in ("sliding_window", "softcap", "s_aux") if kwargs.get(name) is not None]
    if unknown:
        raise RolloutError(f"this model's attention has {', '.join(unknown)}, which is not implemented")
    q, k, v = query[0], key[0], value[0]  # (H, T, D), (K, T, D)
    gqa = q.shape[0] != k.shape[0]
    cache, lengths = packing.cache, packing.lengths
    if cache is None and q.is_cuda and q.dtype in (torch.bfloat16, torch.float16):
        return flash_attention(q, k, v, packing.last, max(lengths), scaling), None
    if cache is None:  # training: whole sequences, no past
        # split, not slices: the backward of N slices would write N tensors of the full length
        spans = zip(q.split(lengths, 1), k.split(lengths, 1), v.split(lengths, 1))
        out = [
            F.scaled_dot_product_attention(a[None], b[None], c[None], is_causal=True, scale=scaling,
                                           enable_gqa=gqa) for a, b, c in spans
        ]
        return torch.cat(out, 2).transpose(1, 2), None

    k_cache, v_cache = cache.k[module.layer_idx], cache.v[module.layer_idx]  # (n_slots, K, S, D)
    k_cache[packing.slot_of_token, :, packing.position_ids] = k.transpose(0, 1)
    v_cache[packing.slot_of_token, :, packing.position_ids] = v.transpose(0, 1)
    out = torch.empty_like(q.transpose(0, 1))  # (T, H, D)
    n = packing.n_decode
    if n:
        n_view, heads = packing.bias.shape[0], k.shape[0]
        # The H/K query heads that share a key head become "queries" of one sequence: (slots, K, H/K, D), no
        # key is repeated.
        grouped = q.new_zeros(n_view, *q.shape[::2])  # (slots, H, D)
        grouped[packing.decode_slots] = q[:, :n].transpose(0, 1)
        grouped = grouped.view(n_view, heads, -1, q.shape[2])
        keys, values = (x[:n_view, :, :packing.longest] for x in (k_cache, v_cache))  # (slots, K, longest, D)
        # Written out: for one query per row this is twice as fast on CPU as the fused kernel.
        # In fp32 from the start: scores rounded to bf16 are not those that the trainer's kernel sees.
        scores = at_least_fp32(grouped) @ at_least_fp32(keys).transpose(-1, -2) * scaling
        probs = torch.softmax(scores + packing.bias, -1)  # (slots, K, H/K, longest)
        decoded = probs.to(values.dtype) @ values
        out[:n] = decoded.reshape(n_view, *q.shape[::2])[packing.decode_slots]
    begin = n
    for slot, past, new in zip(packing.slots[n:], packing.past[n:], lengths[n:]):
        total = past + new
        mask = None  # a prompt is plainly causal; a resumed row's queries also see all of its past
        if past:
            mask = torch.ones(new, total, dtype=torch.bool, device=q.device).tril(past)
        attended = F.scaled_dot_product_attention(
            q[None, :, begin:begin + new], k_cache[slot, None, :, :total], v_cache[slot, None, :, :total],
            attn_mask=mask, is_causal=mask is None, scale=scaling, enable_gqa=gqa)
        out[begin:begin + new] = attended[0].transpose(0, 1)
        begin += new
    return out[None], None


# A model loaded with attn_implementation="retool" calls packed_attention; transformers builds no mask for a
# name it does not know, so the unmodified Hugging Face model runs on the flat stream, with `packing`
# travelling as a keyword argument.
AttentionInterface.register("retool", packed_attention)


def free_bytes(device):
    """Memory that a cache may take: what is free on the device, less a tenth. Infinite where nobody tells."""
    if device.type == "cuda":
        torch.cuda.empty_cache()  # pieces that PyTorch keeps do not make one large block
        return 0.9 * torch.cuda.mem_get_info(device)[0]
    if sys.platform == "linux":
        with open("/proc/meminfo") as file:
            return 0.9 * 1024 * int(re.search(r"MemAvailable:\s*(\d+)", file.read())[1])
    return math.inf


@torch.inference_mode()
def forward_step(model, cache, slots, tokens):
    """Feed tokens[i] (a list of ids) into slots[i]; returns the logits after each row's last token: (N, V)
    fp32."""
    device = cache.k.device
    packing = Packing([len(t) for t in tokens], device, cache, slots)
    flat = torch.tensor([t for row in tokens for t in row], device=device)[None]  # (1, T)
    logits = model(input_ids=flat, position_ids=packing.position_ids[None], use_cache=False,
                   logits_to_keep=packing.last, packing=packing).logits[0]
    for slot, row in zip(slots, tokens):
        cache.lengths[slot] += len(row)
    return at_least_fp32(logits)


# ------------------------------------------------------------------------------------------------------------
# Sampling


def noise_bits(*fields):
    """64 random bits as a function of the fields (splitmix64, applied field by field); arrays broadcast."""
    with np.errstate(over="ignore"):
        bits = np.uint64(0)
        for value in fields:
            bits = (bits ^ np.asarray(value).astype(np.uint64)) + np.uint64(0x9E3779B97F4A7C15)
            bits = (bits ^ (bits >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            bits = (bits ^ (bits >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            bits = bits ^ (bits >> np.uint64(31))
    return bits


def sample(logits, uniform, temperature, top_p):
    """Draw one token per row by the inverse CDF in float64: (tokens (N,), logprobs (N,)).

    logits (N, V); uniform (N,) in [0, 1). temperature 0 is greedy (log-probabilities then at temperature 1).
    The log-probability is the full softmax's at the temperature, the same that the trainer computes; top_p <
    1 is for evaluation only, training on it would score another distribution than the one sampled from.
    """
    scaled = logits / (temperature or 1.0)
    logprobs = torch.log_softmax(scaled, -1)
    if temperature == 0:
        tokens = logits.argmax(-1)
    else:
        probs = logprobs.double().exp()
        if top_p < 1.0:
            ordered, order = probs.sort(-1, descending=True)
            beyond = ordered.cumsum(-1) - ordered >= top_p  # the token that crosses top_p stays
            probs = probs.scatter(-1, order, ordered.masked_fill(beyond, 0.0))
        cdf = probs.cumsum(-1)
        tokens = torch.searchsorted(cdf, uniform[:, None] * cdf[:, -1:], right=True)[:, 0]
        tokens = tokens.clamp(max=logits.shape[-1] - 1)
    return tokens, logprobs.gather(-1, tokens[:, None])[:, 0]


# ------------------------------------------------------------------------------------------------------------
# The engine


PREFILL_TOKENS = 16384  # of prompts in one tick, about: their activations need memory beside the cache


@dataclass
class ToolCall:
    code: str
    output: str  # the sandbox's text, before neutralising and the cap in tokens
    status: str
    start: int  # response_ids[start:end] is the snippet, tags included; interpreter tokens follow at `end`
    end: int
    seconds: float


@dataclass
class Trajectory:
    prompt_index: int
    sample_index: int
    prompt_ids: list
    response_ids: list = field(default_factory=list)
    loss_mask: list = field(default_factory=list)  # 1 sampled, 0 forced
    logprobs: list = field(
        default_factory=list)  # of the sampler, at the sampling temperature; 0.0 where forced
    tool_calls: list = field(default_factory=list)
    finish_reason: str = ""

    def sampled_segments(self, with_code=True):
        """Runs of sampled token ids; forced text (and executed code, if left out) lies between them."""
        chosen = list(self.loss_mask)
        if not with_code:
            for call in self.tool_calls:
                chosen[call.start:call.end] = [0] * (call.end - call.start)
        segments, previous = [[]], 1
        for token, sampled in zip(self.response_ids, chosen):
            if sampled and not previous:
                segments.append([])
            if sampled:
                segments[-1].append(token)
            previous = sampled
        return segments


@dataclass(eq=False)
class Row:
    """A trajectory in flight."""
    trajectory: Trajectory
    key: int  # names the prompt to the noise: the same on any number of ranks
    pending: list  # tokens to feed in the next step
    slot: int = -1
    segment_begin: int = 0
    tail: str = ""  # the last characters sampled: could be the beginning of a tag
    opened: bool = False  # <code> has been seen since segment_begin
    overrun: str = ""
    task: object = None  # the running snippet
    due: int = 0  # tick at which the row rejoins


async def generate(model, tokenizer, prompts, sandbox, *, n_samples=1, temperature=1.0, top_p=1.0,
                   max_response_tokens=512, max_calls=4, max_interpreter_tokens=128, tools=True, n_slots=64,
                   kv_gib=0.0, rejoin_ticks=4, seed=0, step=0, prompt_keys=None, logits_processor=None,
                   stats=None, progress=None):
    """Sample n_samples responses to each prompt; returns a list of Trajectory, prompt-major.

    prompts: list of token-id lists. sandbox: an entered Sandbox (unused, may be None, with tools=False: tags
    then mean nothing and nothing is run). Limits are in tokens; max_response_tokens counts interpreter tokens
    too. n_slots is reduced to what fits into kv_gib GiB (0: no such limit) and into the free memory; rows
    beyond it queue in order. Where that binds, batch shapes, and so rounding, depend on it.
    rejoin_ticks: ticks between a call and the row's return, 0 for "as soon as possible" (not reproducible).
    prompt_keys: integers naming the prompts to the noise (default: their index).
    logits_processor(logits (N, V), trajectories) -> logits, for forced decoding and ablations. stats: a dict
    that receives counts and seconds. progress: called with 1 for each finished row.
    Raises ValueError for an empty prompt and where prompt + response exceed the model's positions,
    RolloutError where not even one row fits into the memory.
    """
    longest = max((len(p) for p in prompts), default=0) + max_response_tokens
    if not all(prompts):
        raise ValueError("a prompt is empty")
    if longest > model.config.max_position_embeddings:
        raise ValueError(f"prompt + response may take {longest} tokens, but the model has "
                         f"{model.config.max_position_embeddings} positions")
    if n_slots < 1 or not 0 < top_p <= 1 or temperature < 0:
        raise ValueError("needs n_slots >= 1, 0 < top_p <= 1 and temperature >= 0")
    if model.config._attn_implementation != "retool":
        raise ValueError('the model must be loaded with attn_implementation="retool"')
    prompt_keys = list(range(len(prompts))) if prompt_keys is None else prompt_keys
    queue = deque(Row(Trajectory(i, j, prompts[i]), prompt_keys[i], prompts[i])
                  for i in range(len(prompts)) for j in range(n_samples))
    results, active, paused = [row.trajectory for row in queue], [], []
    weight = next(model.parameters())
    slot_bytes = 2 * math.prod(KVCache.shape(model.config, 1, longest)) * weight.element_size()
    budget = min(kv_gib * 2**30 or math.inf, free_bytes(weight.device))
    if budget < slot_bytes:
        raise RolloutError(f"one row of {longest} tokens needs {slot_bytes / 2**30:.2g} GiB of KV cache, "
                         f"there are {budget / 2**30:.2g} (--kv_gib, or free)")
    n_slots = int(min(n_slots, len(queue), budget / slot_bytes))
    cache = KVCache(model.config, n_slots, longest, weight.dtype, weight.device)
    free = list(range(n_slots))  # a heap: low slots first keeps the view of the decode step short
    pieces, eos = Pieces(tokenizer), tokenizer.eos_token_id
    shared = {}  # prompt index -> (logits after it, its k, its v), for its other samples
    # slot_ticks, kv_tokens: rows that hold a slot, and tokens they have cached, summed over the ticks
    counts = {"tokens_fed": 0, "sampled": 0, "ticks": 0, "slot_ticks": 0, "kv_tokens": 0,
              "tool_wait_seconds": 0.0}
    tick = 0

    def finish(row, reason):
        row.trajectory.finish_reason = reason
        cache.lengths[row.slot] = 0
        heapq.heappush(free, row.slot)
        if progress:
            progress(1)

    def advance(row, token, logprob):
        """Append a sampled token and decide what happens to the row: it ends, pauses for its snippet, or goes
        on."""
        t = row.trajectory
        t.response_ids.append(token)
        t.loss_mask.append(1)
        t.logprobs.append(logprob)
        row.pending = [token]
        if token == eos:
            return finish(row, "eos")
        if tools:
            window = row.tail + pieces[token]
            row.tail = window[1 - len(CODE_CLOSE):]
            row.opened |= CODE_OPEN in window
            _, closed, row.overrun = window.partition(CODE_CLOSE)
            snippet = None
            if closed and row.opened:  # the search is linear in the segment: not for every stray </code>
                snippet = find_snippet(pieces, t.response_ids, row.segment_begin, row.overrun)
            if snippet:
                if len(t.tool_calls) == max_calls:
                    return finish(row, "max_calls")
                start, code = snippet
                t.tool_calls.append(ToolCall(code, "", "", start, len(t.response_ids), 0.0))
                # Generators inside the snippet are seeded by the row, not by the order of arrival; the
                # position is negative so that no sampled token shares these bits.
                bits = noise_bits(seed, step, row.key, t.sample_index, -len(t.tool_calls))
                row.task = asyncio.ensure_future(sandbox.run(code, seed=int(bits >> np.uint64(33))))
                row.due = tick + rejoin_ticks
                return paused.append(row)
        if len(t.response_ids) >= max_response_tokens:
            return finish(row, "length")
        active.append(row)

    def rejoin(row):
        """Append the interpreter block. Nothing is computed here: its tokens are fed with the row's next
        step."""
        t, result = row.trajectory, row.task.result()
        call = t.tool_calls[-1]
        call.output, call.status, call.seconds = result.output, result.status, result.seconds
        if result.status == "sandbox_error":
            return finish(row, "sandbox_error")
        block = encode_interpreter(tokenizer, result.output, max_interpreter_tokens, row.overrun)
        block = block[: max_response_tokens - len(t.response_ids)]
        t.response_ids += block
        t.loss_mask += [0] * len(block)
        t.logprobs += [0.0] * len(block)
        row.pending, row.segment_begin = row.pending + block, len(t.response_ids)
        row.tail, row.opened = "", False
        if len(t.response_ids) >= max_response_tokens:
            return finish(row, "length")
        active.append(row)

    async def wait_for_tools():
        """Bring back the rows whose turn it is; wait for their results, or for any result if nothing else can
        be done."""
        nonlocal tick
        begin = time.perf_counter()
        if paused and not active and not (queue and free):
            tick = max(tick, min(row.due for row in paused))
            if not rejoin_ticks:
                await asyncio.wait([row.task for row in paused], return_when=asyncio.FIRST_COMPLETED)
        due = [row for row in paused if (row.due <= tick if rejoin_ticks else row.task.done())]
        await asyncio.gather(*[row.task for row in due])
        counts["tool_wait_seconds"] += time.perf_counter() - begin
        for row in due:
            paused.remove(row)
            rejoin(row)

    def admit():
        """Fill free slots: (rows that must compute their prompt, rows whose prompt another sample has or will
        have computed)."""
        leaders, followers, tokens = {}, [], 0
        while queue and free and tokens < PREFILL_TOKENS:
            row = queue.popleft()
            row.slot = heapq.heappop(free)
            index = row.trajectory.prompt_index
            if index in shared or index in leaders:
                followers.append(row)
            else:
                leaders[index] = row
                tokens += len(row.pending)
        return list(leaders.values()), followers

    def compact():
        """Move rows from the highest slots into free lower ones: the decode view shrinks with its rows."""
        for row in sorted(active + paused, key=lambda row: -row.slot):
            if not free or free[0] > row.slot:
                return
            slot, length = heapq.heappop(free), cache.lengths[row.slot]
            cache.k[:, slot, :, :length] = cache.k[:, row.slot, :, :length]
            cache.v[:, slot, :, :length] = cache.v[:, row.slot, :, :length]
            cache.lengths[slot], cache.lengths[row.slot] = length, 0
            heapq.heappush(free, row.slot)
            row.slot = slot

    def next_logits(rows, leaders, followers):
        """Feed the pending tokens of `rows` (leaders among them); logits (N, V) for rows, then followers."""
        nonlocal shared
        logits = []
        if rows:
            logits.append(
                forward_step(model, cache, [row.slot for row in rows], [row.pending for row in rows]))
            counts["tokens_fed"] += sum(len(row.pending) for row in rows)
        for row in leaders:
            kv = (x[:, row.slot, :, : len(row.pending)] for x in (cache.k, cache.v))
            shared[row.trajectory.prompt_index] = logits[0][rows.index(row)], *kv
        for row in followers:  # same prompt, same logits; only the noise differs
            first, k, v = shared[row.trajectory.prompt_index]
            cache.lengths[row.slot] = k.shape[2]
            cache.k[:, row.slot, :, : k.shape[2]], cache.v[:, row.slot, :, : k.shape[2]] = k, v
            logits.append(first[None])
        # Keep the one prompt that still has samples in the queue; as a copy when it is new, for its slot may
        # be refilled before they start.
        waiting = queue[0].trajectory.prompt_index if queue else None
        shared = {waiting: shared[waiting]} if waiting in shared else {}
        if any(row.trajectory.prompt_index == waiting for row in leaders):
            shared[waiting] = tuple(x.clone() for x in shared[waiting])
        return torch.cat(logits)

    try:
        while queue or active or paused:
            await asyncio.sleep(0)  # let the sandbox's own callbacks run
            await wait_for_tools()
            leaders, followers = admit()
            if not queue:  # as long as rows wait, a free slot is refilled instead
                compact()
            # Stable: decoding rows first, as Packing wants them.
            rows = sorted(active + leaders, key=lambda row: len(row.pending) > 1)
            active = []
            if not rows and not followers:
                continue
            logits = next_logits(rows, leaders, followers)
            rows += followers
            trajectories = [row.trajectory for row in rows]
            if logits_processor:
                logits = logits_processor(logits, trajectories)
            noise = noise_bits(seed, step, [row.key for row in rows], [t.sample_index for t in trajectories],
                               [len(t.response_ids) for t in trajectories])
            uniform = torch.from_numpy(
                (noise >> np.uint64(11)).astype(np.float64) * 2.0**-53).to(logits.device)
            tokens, logprobs = sample(logits, uniform, temperature, top_p)
            counts["sampled"] += len(rows)
            counts["slot_ticks"] += n_slots - len(free)
            counts["kv_tokens"] += sum(cache.lengths)
            for row, token, logprob in zip(rows, tokens.tolist(), logprobs.tolist()):
                advance(row, token, logprob)
            tick += 1
    finally:
        for row in paused:  # only after an error or a cancellation: no snippet outlives its rollout
            row.task.cancel()
    counts["ticks"] = tick
    if stats is not None:
        stats |= {"slots": n_slots, "slot_tokens": longest}
        for name, value in counts.items():
            stats[name] = stats.get(name, 0) + value
    return results


# ------------------------------------------------------------------------------------------------------------
# The slow twin and the benchmark


def slow_twin(model, tokenizer, prompts, run_tool, batch_size, max_interpreter_tokens=128, scripts=None):
    """Greedy tool use as everyone writes it first: Hugging Face `generate` turn by turn, every turn prefilled
    from scratch.

    model: loaded with attention of its own ("sdpa"). run_tool(code) -> text. scripts: see `force`. Returns
    the response ids of each prompt. The batch goes in lock step: a row that closes its snippet waits for the
    longest, and pays for padding.
    """
    pieces, eos = Pieces(tokenizer), tokenizer.eos_token_id
    pad = next(token for token in tokenizer.all_special_ids if token != eos)  # some tokenizers have no other
    responses, sampled = [[] for _ in prompts], [0] * len(prompts)

    def closed(ids):
        """What the last token holds beyond the closing tag it completed; None if it completed none."""
        text = "".join(pieces[t] for t in ids[-len(CODE_CLOSE):])
        _, tag, overrun = text.partition(CODE_CLOSE)
        return overrun if tag and len(overrun) < len(pieces[ids[-1]]) else None

    for first in range(0, len(prompts), batch_size):
        live = list(range(first, min(first + batch_size, len(prompts))))
        while live:
            contexts = [prompts[i] + responses[i] for i in live]
            width = max(map(len, contexts))
            ids = torch.tensor([[pad] * (width - len(c)) + c for c in contexts], device=model.device)
            mask = torch.tensor([[0] * (width - len(c)) + [1] * len(c) for c in contexts], device=model.device)

            def processor(input_ids, scores):
                done = input_ids.shape[1] - width
                return force(scores, [scripts[i].get(sampled[i] + done, -1)
                                      for i in live], eos) if scripts else scores

            def stop(input_ids, scores, **kwargs):
                done = [closed(row) is not None for row in input_ids[:, -len(CODE_CLOSE):].tolist()]
                return torch.tensor(done, device=model.device)

            out = model.generate(ids, attention_mask=mask, do_sample=False, eos_token_id=eos,
                                 pad_token_id=pad,
                                 max_new_tokens=model.config.max_position_embeddings - width,
                                 stopping_criteria=[stop], logits_processor=[processor])
            still = []
            for i, row in zip(live, out[:, width:].tolist()):
                while row[-1] == pad:
                    row.pop()
                sampled[i] += len(row)
                begin = len(responses[i])
                responses[i] += row
                if row[-1] == eos:
                    continue
                overrun = closed(responses[i])
                snippet = find_snippet(pieces, responses[i], begin, overrun) if overrun is not None else None
                if snippet:
                    responses[i] += encode_interpreter(tokenizer, run_tool(snippet[1]),
                                                       max_interpreter_tokens, overrun)
                    still.append(i)
            live = still
    return responses


def force(logits, tokens, eos):
    """Make row i's next token tokens[i]; where that is -1 the model is free, except that it may not end. In
    place."""
    tokens = torch.tensor(tokens, device=logits.device)
    logits[:, eos] = -torch.inf
    scripted = (tokens >= 0).nonzero()[:, 0]
    logits[scripted] = -torch.inf
    logits[scripted, tokens[scripted]] = 0.0
    return logits


class InstantSandbox:
    """Answers from a table: engines are compared without the tool's own time."""

    def __init__(self, answer):
        self.answer = answer

    async def run(self, code, seed=0):
        return SandboxResult("ok", self.answer(code))


def follow(scripts, eos):
    """The logits_processor of `generate` that forces what scripts[prompt_index] says: {position: token}."""
    def process(logits, trajectories):
        return force(logits, [scripts[t.prompt_index].get(sum(t.loss_mask), -1) for t in trajectories], eos)

    return process


def ragged_workload(tokenizer, rows, seed, code="1", shortest=8, longest=128):
    """1-4 calls per row, segments of log-uniform 8-128 tokens: (prompts, scripts, answer). Only a segment's
    ending is forced (a snippet, at last EOS), everything before it is computed greedily."""
    rng = np.random.default_rng(seed)
    snippet = encode_text(tokenizer, f"<code>{code}</code>")
    ordinary = np.setdiff1d(np.arange(len(tokenizer)), tokenizer.all_special_ids)
    prompts, scripts = [], []
    for _ in range(rows):
        script, n, calls = {}, 0, rng.integers(1, 5)
        for segment in range(calls + 1):
            ending = snippet if segment < calls else [tokenizer.eos_token_id]
            n += max(len(ending), round(np.exp(rng.uniform(np.log(shortest), np.log(longest)))))
            script |= dict(zip(range(n - len(ending), n), ending))
        prompts.append(rng.choice(ordinary, rng.integers(16, 65)).tolist())
        scripts.append(script)
    return prompts, scripts, lambda code: "1234567"


def trace_workload(tokenizer, rows, seed):
    """The embedded default's own prompts, answered word for word with its cold-start traces (40 % code), all
    forced."""
    import data  # only here: data.py imports this file
    prompts, scripts, outputs = [], [], {}
    for i in range(rows):
        problem = data.embedded_problem("test", seed, i)
        prompts.append(data.encode_prompt(tokenizer, "{question}", problem.question))
        segments = split_segments(problem.by_code if i % 5 < 2 else problem.by_hand)
        ids = [token for kind, text in segments if kind == "model" for token in encode_text(tokenizer, text)]
        scripts.append(dict(enumerate(ids + [tokenizer.eos_token_id])))
        for (_, before), (kind, output) in zip(segments, segments[1:]):
            if kind == "interpreter":
                outputs[strip_fence(before.split(CODE_OPEN)[1].split(CODE_CLOSE)
                                    [0])] = output or "OverflowError: math range error"
    return prompts, scripts, outputs.__getitem__


async def slow_tools(model, tokenizer, rows=128, repeats=3):
    """Do slow tools hold up a rollout? Throughput mode, the real sandbox with a worker per row: all snippets
    sleep for 0.5 s, against the same rows with snippets that do not. Prints the ratio of the medians."""
    seconds = {"0.0": [], "0.5": []}
    async with Sandbox(workers=rows, timeout=2.0) as sandbox:
        print(sandbox.report)
        for pause in list(seconds) * repeats:
            prompts, scripts, _ = ragged_workload(tokenizer, rows, 0, f"__import__('time').sleep({pause})",
                                                  shortest=64, longest=256)
            begin, stats = time.perf_counter(), {}
            trajectories = await generate(
                model, tokenizer, prompts, sandbox, n_slots=rows, rejoin_ticks=0, max_response_tokens=1800,
                stats=stats, logits_processor=follow(scripts, tokenizer.eos_token_id))
            seconds[pause].append(time.perf_counter() - begin)
            statuses = [call.status for t in trajectories for call in t.tool_calls]
            assert set(statuses) == {"ok"}, statuses
            print(f"{rows} rows, {len(statuses)} snippets of {pause} s: {seconds[pause][-1]:.1f} s, of it "
                  f"{stats['tool_wait_seconds']:.1f} s without a row to decode", flush=True)
    ratio = np.median(seconds["0.5"]) / np.median(seconds["0.0"])
    print(f"snippets that sleep 0.5 s: {ratio:.2f} times the wall time of instant ones")


def copy_bandwidth(device):
    """Bytes per second that the device reads and writes when it copies a large tensor; the best of five."""
    source = torch.zeros((1 << 32 if device.type == "cuda" else 1 << 28) // 4, device=device)
    target, best = torch.empty_like(source), math.inf
    for _ in range(5):
        begin = time.perf_counter()
        target.copy_(source)
        target[-1].item()  # waits for a GPU
        best = min(best, time.perf_counter() - begin)
    return 2 * source.numel() * 4 / best


def peak_gib(device):
    """Most memory used so far: the GPU's, or this process's."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**(20 if sys.platform == "linux" else 30)


async def benchmark(ours, twin, tokenizer, args):
    """Both engines on both workloads: equal token for token, then tokens/s; the last line is JSON."""
    bandwidth, report = copy_bandwidth(ours.device), {}
    weights = sum(p.numel() for p in ours.parameters())
    if not ours.config.tie_word_embeddings:
        weights -= ours.get_input_embeddings().weight.numel()  # only looked up
    kv_values = 2 * math.prod(KVCache.shape(ours.config, 1, 1))  # of one token

    async def run_ours(workload, n_slots, sandbox, rejoin_ticks=4):
        """(response ids, statistics)"""
        prompts, scripts, _ = workload
        limit = ours.config.max_position_embeddings - max(map(len, prompts))
        stats, begin = {}, time.perf_counter()
        trajectories = await generate(
            ours, tokenizer, prompts, sandbox, temperature=0, n_slots=n_slots, stats=stats,
            max_response_tokens=min(limit, 1024), rejoin_ticks=rejoin_ticks,
            logits_processor=follow(scripts, tokenizer.eos_token_id))
        # What cannot be done without: reading all weights, and each row's keys and values, once per tick.
        values = stats["ticks"] * weights + stats["kv_tokens"] * kv_values
        found = {"seconds": time.perf_counter() - begin, "slots": stats["slots"],
                 "kv_filled": stats["kv_tokens"] / (stats["slot_ticks"] * stats["slot_tokens"]),
                 "kv_gib": stats["slots"] * stats["slot_tokens"] * kv_values * ours.dtype.itemsize / 2**30,
                 "tool_wait_seconds": stats["tool_wait_seconds"]}
        found["tokens_per_second"] = stats["sampled"] / found["seconds"]
        found["bandwidth_share"] = values * ours.dtype.itemsize / bandwidth / found["seconds"]
        return [t.response_ids for t in trajectories], found

    def run_twin(workload, batch_size):
        """(response ids, tokens per second)"""
        prompts, scripts, answer = workload
        begin = time.perf_counter()
        responses = slow_twin(twin, tokenizer, prompts, answer, batch_size, scripts=scripts)
        return responses, sum(max(script) + 1 for script in scripts) / (time.perf_counter() - begin)

    for name, make in (("ragged turns", ragged_workload), ("embedded traces", trace_workload)):
        if args.check_rows:
            workload = make(tokenizer, args.check_rows, 1)
            ours.double(), twin.double()
            same = (await run_ours(workload, 7, InstantSandbox(workload[2])))[0] == run_twin(workload, 8)[0]
            ours.float(), twin.float()
            print(f"{name}: {args.check_rows} greedy rows in float64, 7 slots, against Hugging Face generate "
                  f"turn by turn: {'identical' if same else 'DIFFERENT'}")
            if not same:
                raise SystemExit(1)
        workload, runs, twin_rates = make(tokenizer, args.rows, 0), [], []
        for size in args.batch_sizes:
            runs.append((await run_ours(workload, size, InstantSandbox(workload[2])))[1])
            twin_rates.append(run_twin(workload, size)[1])
            print(f"  batch {size:4d}: {runs[-1]['tokens_per_second']:7.0f} tokens/s, "
                  f"slow twin {twin_rates[-1]:7.0f}", flush=True)
        best = max(runs, key=lambda found: found["tokens_per_second"])
        best |= {"slow_twin_tokens_per_second": max(twin_rates),
                 "ratio": best["tokens_per_second"] / max(twin_rates), "peak_gib": peak_gib(ours.device)}
        if make is ragged_workload:  # its snippets are real ones
            async with Sandbox() as sandbox:
                with_tools = (await run_ours(workload, best["slots"], sandbox, rejoin_ticks=0))[1]
            best |= {f"sandbox_{key}": with_tools[key] for key in ("tokens_per_second", "tool_wait_seconds")}
            print(f"  with the real sandbox, throughput mode: {with_tools['tokens_per_second']:.0f} tokens/s, "
                  f"{with_tools['tool_wait_seconds']:.2f} s without a row to decode")
        print(f"  each at its best batch size: {best['ratio']:.2f} times the slow twin; "
              f"{100 * best['bandwidth_share']:.0f} % of what reading weights and cache at "
              f"{bandwidth / 1e9:.0f} GB/s would allow; rows fill {100 * best['kv_filled']:.0f} % of the slots "
              "they hold", flush=True)
        report[name] = best
    print(json.dumps({"model": args.model, "dtype": args.dtype, "device": str(ours.device)} | report))


def main():
    import sft  # only here: sft.py imports this file
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="",
                        help="checkpoint folder or hub id; empty: the embedded model, random weights")
    parser.add_argument("--dtype", choices=sft.DTYPES, default="fp32", help="of weights and cache")
    parser.add_argument("--rows", type=int, default=256, help="responses per measurement")
    parser.add_argument("--check_rows", type=int, default=24,
                        help="responses that are compared token for token, in float64; 0: none")
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=[32, 64, 128, 256],
                        help="tried for both engines")
    parser.add_argument("--slow_tools", action="store_true",
                        help="instead: rollouts whose snippets sleep, against instant ones, real sandbox")
    args = parser.parse_args()
    if args.check_rows and args.dtype != "fp32":
        parser.error("--check_rows compares in float64: --dtype bf16 needs --check_rows 0")
    try:
        sft.check_model(args.model)
        tokenizer = sft.load_tokenizer(args.model)
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        ours = sft.load_model(args.model, tokenizer, device, dtype=args.dtype).eval()
    except sft.UserError as error:
        sys.exit(f"error: {error}")
    if args.slow_tools:
        return asyncio.run(slow_tools(ours, tokenizer))
    # a copy of the configuration: transformers would write "sdpa" into the one of `ours` as well
    twin = type(ours)._from_config(copy.deepcopy(ours.config), attn_implementation="sdpa", dtype=ours.dtype)
    twin.to(device).eval().load_state_dict(ours.state_dict())
    asyncio.run(benchmark(ours, twin, tokenizer, args))


if __name__ == "__main__":
    main()
