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

    python tests/bench_rollout.py    # against the slow twin: token for token, then tokens/s of both

Letters in shape comments: N rows in a step, T tokens in the flat stream, V vocabulary, L layers, H query
heads, K key/value heads, D head dim, S cache positions per slot.
"""
import asyncio
import bisect
import heapq
import math
import re
import sys
import time
from collections import deque
from dataclasses import dataclass, field, fields

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM, AutoTokenizer

from sandbox import UserError

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
        raise UserError(f"this model's attention has {', '.join(unknown)}, which is not implemented")
    q, k, v = query[0], key[0], value[0]  # (H, T, D), (K, T, D)
    if packing.cache is None:
        if q.is_cuda and q.dtype in (torch.bfloat16, torch.float16):
            return flash_attention(q, k, v, packing.last, max(packing.lengths), scaling), None
        return whole_sequences(q, k, v, packing.lengths, scaling), None
    cache = packing.cache
    k_cache, v_cache = cache.k[module.layer_idx], cache.v[module.layer_idx]  # (n_slots, K, S, D)
    k_cache[packing.slot_of_token, :, packing.position_ids] = k.transpose(0, 1)
    v_cache[packing.slot_of_token, :, packing.position_ids] = v.transpose(0, 1)
    out = torch.empty_like(q.transpose(0, 1))  # (T, H, D)
    if packing.n_decode:
        out[:packing.n_decode] = one_token_each(q, k_cache, v_cache, packing, scaling)
    several_tokens_each(out, q, k_cache, v_cache, packing, scaling)
    return out[None], None


def whole_sequences(q, k, v, lengths, scale):
    """Training: sequences without a past. q (H, T, D), k, v (K, T, D) -> (1, T, H, D)."""
    # split, not slices: the backward of N slices would write N tensors of the full length
    spans = zip(q.split(lengths, 1), k.split(lengths, 1), v.split(lengths, 1))
    out = [F.scaled_dot_product_attention(a[None], b[None], c[None], is_causal=True, scale=scale,
                                          enable_gqa=q.shape[0] != k.shape[0]) for a, b, c in spans]
    return torch.cat(out, 2).transpose(1, 2)


def one_token_each(q, k_cache, v_cache, packing, scale):
    """Decoding: the first n tokens are one of each of n rows. q (H, T, D) -> (n, H, D)."""
    n, n_view, heads = packing.n_decode, packing.bias.shape[0], k_cache.shape[1]
    # The H/K query heads that share a key head become "queries" of one sequence: no key is repeated.
    grouped = q.new_zeros(n_view, *q.shape[::2])  # (slots, H, D)
    grouped[packing.decode_slots] = q[:, :n].transpose(0, 1)
    grouped = grouped.view(n_view, heads, -1, q.shape[2])  # (slots, K, H/K, D)
    keys, values = (x[:n_view, :, :packing.longest] for x in (k_cache, v_cache))  # (slots, K, longest, D)
    # Written out: for one query per row this is twice as fast on CPU as the fused kernel.
    # In fp32 from the start: scores rounded to bf16 are not those that the trainer's kernel sees.
    scores = at_least_fp32(grouped) @ at_least_fp32(keys).transpose(-1, -2) * scale
    probs = torch.softmax(scores + packing.bias, -1)  # (slots, K, H/K, longest)
    decoded = probs.to(values.dtype) @ values
    return decoded.reshape(n_view, *q.shape[::2])[packing.decode_slots]


def several_tokens_each(out, q, k_cache, v_cache, packing, scale):
    """Prompts, and rows that come back with interpreter text; writes into out (T, H, D)."""
    n = begin = packing.n_decode
    for slot, past, new in zip(packing.slots[n:], packing.past[n:], packing.lengths[n:]):
        total = past + new
        mask = None  # a prompt is plainly causal; a resumed row's queries also see all of its past
        if past:
            mask = torch.ones(new, total, dtype=torch.bool, device=q.device).tril(past)
        attended = F.scaled_dot_product_attention(
            q[None, :, begin:begin + new], k_cache[slot, None, :, :total],
            v_cache[slot, None, :, :total], attn_mask=mask, is_causal=mask is None, scale=scale,
            enable_gqa=q.shape[0] != k_cache.shape[1])
        out[begin:begin + new] = attended[0].transpose(0, 1)
        begin += new


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
# Loading a model


DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def first_line(error):
    return str(error).strip().splitlines()[0]


def load_tokenizer(path):
    """The tokenizer of a checkpoint; UserError where it has no vocabulary, EOS or chat template."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: no usable tokenizer there ({first_line(error)})") from None
    # A folder with a config but no tokenizer files yields an empty tokenizer, not an error.
    if len(tokenizer) < 2 or tokenizer.eos_token_id is None or not tokenizer.chat_template:
        raise UserError(f"{path}: no usable tokenizer there (needs vocabulary, EOS, chat template)")
    return tokenizer


def load_config(path, tokenizer=()):
    """A checkpoint's configuration, without its weights; UserError where it cannot be read, or has fewer
    embeddings than the tokenizer has tokens."""
    try:
        config = AutoConfig.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be loaded ({first_line(error)})") from None
    if config.vocab_size < len(tokenizer):
        raise UserError(f"{path}: the model has {config.vocab_size} rows of embeddings, the tokenizer "
                        f"{len(tokenizer)} tokens")
    return config


def load_model(path, device, dtype="fp32"):
    """A causal LM whose attention is `packed_attention`.

    Trap: never `.to(torch.bfloat16)` later, that would round RoPE's frequencies too.
    """
    try:
        model = AutoModelForCausalLM.from_pretrained(path, attn_implementation="retool",
                                                     dtype=DTYPES[dtype])
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(f"{path}: cannot be loaded ({first_line(error)})") from None
    return model.to(device)


# ------------------------------------------------------------------------------------------------------------
# How likely it is: what the trainers need of a response


@dataclass
class Example:
    """One sequence for the trainer, or a packed micro-batch of them. Every column is (T,), T being one less
    than the sequence's tokens: position t reads token t and speaks of token t + 1."""
    input_ids: torch.Tensor  # token t
    targets: torch.Tensor  # token t + 1
    loss_mask: torch.Tensor  # 1.0 where the policy sampled token t + 1 itself
    sampler_logprobs: torch.Tensor = None  # of token t + 1, as the sampler computed them
    rewards: torch.Tensor = None  # for token t + 1
    logprobs: torch.Tensor = None  # of token t + 1 before the update, by the trainer
    entropy: torch.Tensor = None  # of the distribution that token t + 1 was drawn from
    values: torch.Tensor = None  # of the state before token t + 1, before the update
    advantages: torch.Tensor = None  # of token t + 1
    returns: torch.Tensor = None  # what the value of the state before token t + 1 should be

    def __len__(self):
        return len(self.input_ids)


def make_example(ids, loss_mask, **per_token):
    """Token ids and 0/1 mask of a sequence, and further columns aligned with its tokens, as an Example. This
    is the one place where columns are shifted by one."""
    columns = {name: torch.as_tensor(values)[1:] for name, values in per_token.items()}
    return Example(torch.tensor(ids[:-1]), torch.tensor(ids[1:]),
                   torch.tensor(loss_mask[1:], dtype=torch.float32), **columns)


def pack(lengths, token_budget, world):
    """Distribute sequences over ranks and micro-batches: result[rank][micro_batch] is a list of indices.

    Longest first into the emptiest bin, the same number of micro-batches on every rank (some may be empty),
    none above token_budget unless a single sequence is.
    """
    assert lengths, "nothing to pack"
    budget = max(token_budget, max(lengths))
    n = max(1, math.ceil(sum(lengths) / (token_budget * world)))
    while True:
        bins, loads = [[] for _ in range(n * world)], [0] * (n * world)
        for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
            j = loads.index(min(loads))
            bins[j].append(i)
            loads[j] += lengths[i]
        if max(loads) <= budget:
            return [[bins[m * world + rank] for m in range(n)] for rank in range(world)]
        n += 1


def collate(examples, device):
    """(flat Example (T,), its Packing). An empty micro-batch, a rank's no-op beside the others' work, becomes
    one masked token."""
    if not examples:
        zero = torch.zeros(1, dtype=torch.long, device=device)
        return Example(zero, zero, *[zero.float()] * (len(fields(Example)) - 2)), Packing([1], device)
    packing = Packing([len(e) for e in examples], device)
    names = [f.name for f in fields(Example) if getattr(examples[0], f.name) is not None]
    return Example(**{name: torch.cat([getattr(e, name) for e in examples]).to(device)
                      for name in names}), packing


LOGIT_BYTES = 256 << 20  # of the logits that exist at one time: 441 tokens of Qwen's vocabulary in fp32


class Policy(nn.Module):
    """A causal LM that returns log-probabilities. The head is inside `forward`, where FSDP has gathered its
    weights, and goes through the tokens in chunks: no (T, V) tensor ever exists, forward or backward."""

    def __init__(self, lm):
        super().__init__()
        self.lm = lm

    def forward(self, input_ids, targets, loss_mask, packing, temperature=1.0, with_entropy=False):
        """input_ids, targets, loss_mask (T,) -> logprobs (T,) of the targets at the temperature, 0 where
        masked.

        with_entropy: also the entropy (T,) of each trainable position's distribution, without gradient. The
        head, most of the work of a small model, runs for trainable positions only.
        """
        hidden = self.lm.model(input_ids=input_ids[None], position_ids=packing.position_ids[None],
                               use_cache=False, packing=packing).last_hidden_state[0]  # (T, hidden)
        chosen = loss_mask.nonzero()[:, 0]
        chunk = max(1, LOGIT_BYTES // (4 * self.lm.config.vocab_size))
        parts = []
        for positions in chosen.split(chunk):
            arguments = hidden[positions], targets[positions], temperature, with_entropy
            # A chunk's logits are computed again in the backward pass instead of being kept; a single chunk
            # is kept, for there is nothing to save.
            parts.append(checkpoint(self.head, *arguments, use_reentrant=False)
                         if len(chosen) > chunk and torch.is_grad_enabled() else self.head(*arguments))
        columns = [torch.zeros_like(input_ids, dtype=values.dtype).index_put((chosen,), values)
                   for values in map(torch.cat, zip(*parts))]
        return columns if with_entropy else columns[0]

    def head(self, hidden, targets, temperature, with_entropy):
        """hidden (n, hidden), targets (n,) -> logprobs (n,) and, if wanted, entropy (n,)."""
        logits = at_least_fp32(self.lm.lm_head(hidden)) / temperature  # (n, V)
        normaliser = torch.logsumexp(logits, -1)
        logprobs = logits.gather(-1, targets[:, None])[:, 0] - normaliser
        if not with_entropy:
            return (logprobs,)
        with torch.no_grad():
            return logprobs, normaliser - (torch.softmax(logits, -1) * logits).sum(-1)
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
    start: int  # response_ids[start:end] is the snippet, tags included
    end: int  # interpreter tokens follow here
    seconds: float


@dataclass
class Trajectory:
    """One response. The three lists have an entry for each token of the response."""
    prompt_index: int
    sample_index: int
    prompt_ids: list
    response_ids: list = field(default_factory=list)
    loss_mask: list = field(default_factory=list)  # 1 sampled, 0 forced
    logprobs: list = field(default_factory=list)  # of the sampler, at its temperature; 0.0 where forced
    tool_calls: list = field(default_factory=list)
    finish_reason: str = ""
    correct: bool = False  # whether the final answer is right: eval.py says so

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


@dataclass
class Sampling:
    """The keyword arguments of `generate`. Limits are in tokens."""
    temperature: float = 1.0  # 0 is greedy
    top_p: float = 1.0  # below 1 for evaluation only, see `sample`
    max_response_tokens: int = 512  # interpreter tokens included
    max_calls: int = 4
    max_interpreter_tokens: int = 128  # of each call
    tools: bool = True  # False: tags mean nothing, nothing is run
    n_slots: int = 64  # rows in the cache at the same time; fewer where memory is short
    kv_gib: float = 0.0  # GiB that the cache may take; 0: what is free
    rejoin_ticks: int = 4  # ticks between a call and the row's return; 0: once it is done, not reproducible
    seed: int = 0
    step: int = 0  # of the run: part of the noise
    logits_processor: object = None  # f(logits (N, V), trajectories) -> logits, for forced decoding
    progress: object = None  # called with 1 for each finished row


@dataclass(eq=False)
class Row:
    """A trajectory in flight."""
    trajectory: Trajectory
    key: int  # names the prompt to the noise: the same on any number of ranks
    pending: list  # tokens to feed in the next tick
    slot: int = -1
    segment_begin: int = 0  # where in the response the current model segment starts
    tail: str = ""  # the last characters sampled: could be the beginning of a tag
    opened: bool = False  # <code> has been seen since segment_begin
    overrun: str = ""  # what the last token holds beyond </code>
    task: object = None  # the running snippet
    due: int = 0  # tick at which the row rejoins


async def generate(model, tokenizer, prompts, sandbox, *, n_samples=1, prompt_keys=None, stats=None,
                   **sampling):
    """Sample n_samples responses to each prompt; returns a list of Trajectory, prompt-major.

    prompts: lists of token ids. sandbox: an entered Sandbox (may be None with tools=False).
    prompt_keys: integers that name the prompts to the noise (default: their index).
    stats: a dict that receives counts and seconds. sampling: the fields of `Sampling`.
    Rows beyond the slots queue in order. Where memory binds, batch shapes, and so rounding, depend on it.
    ValueError for an empty prompt and where prompt + response exceed the model's positions, UserError
    where not even one row fits into the memory.
    """
    settings = Sampling(**sampling)
    longest = max((len(p) for p in prompts), default=0) + settings.max_response_tokens
    if not all(prompts):
        raise ValueError("a prompt is empty")
    if longest > model.config.max_position_embeddings:
        raise ValueError(f"prompt + response may take {longest} tokens, but the model has "
                         f"{model.config.max_position_embeddings} positions")
    if settings.n_slots < 1 or not 0 < settings.top_p <= 1 or settings.temperature < 0:
        raise ValueError("needs n_slots >= 1, 0 < top_p <= 1 and temperature >= 0")
    if model.config._attn_implementation != "retool":
        raise ValueError('the model must be loaded with attn_implementation="retool"')
    keys = prompt_keys or range(len(prompts))
    rows = [Row(Trajectory(i, j, prompt), keys[i], prompt)
            for i, prompt in enumerate(prompts) for j in range(n_samples)]
    engine = Engine(model, tokenizer, sandbox, settings, rows, longest)
    await engine.run()
    for name, value in (engine.counts if stats is not None else {}).items():
        stats[name] = stats.get(name, 0) + value
    if stats is not None:
        stats |= {"slots": engine.n_slots, "slot_tokens": longest}
    return [row.trajectory for row in rows]


class Engine:
    """The tick loop of one `generate`. A row is in exactly one of these places:

    queue    waits for a slot; served in order
    active   takes part in the next forward call
    paused   its snippet runs; it keeps its slot and cache
    (none)   finished, its slot is free again
    """

    def __init__(self, model, tokenizer, sandbox, settings, rows, longest):
        self.model, self.tokenizer, self.sandbox, self.settings = model, tokenizer, sandbox, settings
        self.queue, self.active, self.paused = deque(rows), [], []
        weight = next(model.parameters())
        slot_bytes = 2 * math.prod(KVCache.shape(model.config, 1, longest)) * weight.element_size()
        budget = min(settings.kv_gib * 2**30 or math.inf, free_bytes(weight.device))
        if budget < slot_bytes:
            raise UserError(f"one row of {longest} tokens needs {slot_bytes / 2**30:.2g} GiB of KV "
                            f"cache, there are {budget / 2**30:.2g} (--kv_gib, or free)")
        self.n_slots = int(min(settings.n_slots, len(rows), budget / slot_bytes))
        self.cache = KVCache(model.config, self.n_slots, longest, weight.dtype, weight.device)
        # A heap: low slots first keeps the view of the decode step short.
        self.free = list(range(self.n_slots))
        self.pieces, self.tick = Pieces(tokenizer), 0
        # Prompt index -> (logits after it, its k, its v), for the prompt's other samples.
        self.shared = {}
        # slot_ticks, kv_tokens: rows that hold a slot, and tokens they have cached, summed over ticks.
        self.counts = {"tokens_fed": 0, "sampled": 0, "ticks": 0, "slot_ticks": 0, "kv_tokens": 0,
                       "tool_wait_seconds": 0.0}

    async def run(self):
        try:
            while self.queue or self.active or self.paused:
                await asyncio.sleep(0)  # let the sandbox's own callbacks run
                await self.wait_for_tools()
                leaders, followers = self.admit()
                if not self.queue:  # as long as rows wait, a free slot is refilled instead
                    self.compact()
                # Stable: decoding rows first, as Packing wants them.
                rows = sorted(self.active + leaders, key=lambda row: len(row.pending) > 1)
                if rows or followers:
                    self.active = []
                    self.step(rows, leaders, followers)
        finally:
            for row in self.paused:  # after an error or a cancellation no snippet outlives its rollout
                row.task.cancel()
        self.counts["ticks"] = self.tick

    async def wait_for_tools(self):
        """Bring back the rows whose turn it is, and wait for their results; for any result, if nothing
        else can be done."""
        begin, ticks = time.perf_counter(), self.settings.rejoin_ticks
        if self.paused and not self.active and not (self.queue and self.free):
            self.tick = max(self.tick, min(row.due for row in self.paused))
            if not ticks:
                await asyncio.wait([row.task for row in self.paused],
                                   return_when=asyncio.FIRST_COMPLETED)
        due = [row for row in self.paused if (row.due <= self.tick if ticks else row.task.done())]
        await asyncio.gather(*[row.task for row in due])
        self.counts["tool_wait_seconds"] += time.perf_counter() - begin
        for row in due:
            self.paused.remove(row)
            self.rejoin(row)

    def admit(self):
        """Fill free slots: (leaders, which must compute their prompt; followers, whose prompt another
        sample has or will have computed)."""
        leaders, followers, tokens = {}, [], 0
        while self.queue and self.free and tokens < PREFILL_TOKENS:
            row = self.queue.popleft()
            row.slot = heapq.heappop(self.free)
            index = row.trajectory.prompt_index
            if index in self.shared or index in leaders:
                followers.append(row)
            else:
                leaders[index] = row
                tokens += len(row.pending)
        return list(leaders.values()), followers

    def compact(self):
        """Move rows from the highest slots into free lower ones: the decode view shrinks with its
        rows."""
        cache, free = self.cache, self.free
        for row in sorted(self.active + self.paused, key=lambda row: -row.slot):
            if not free or free[0] > row.slot:
                return
            slot, length = heapq.heappop(free), cache.lengths[row.slot]
            cache.k[:, slot, :, :length] = cache.k[:, row.slot, :, :length]
            cache.v[:, slot, :, :length] = cache.v[:, row.slot, :, :length]
            cache.lengths[slot], cache.lengths[row.slot] = length, 0
            heapq.heappush(free, row.slot)
            row.slot = slot

    def step(self, rows, leaders, followers):
        """One tick: a forward call, one sampled token for every row."""
        settings = self.settings
        logits = self.next_logits(rows, leaders, followers)
        rows = rows + followers
        trajectories = [row.trajectory for row in rows]
        if settings.logits_processor:
            logits = settings.logits_processor(logits, trajectories)
        bits = noise_bits(settings.seed, settings.step, [row.key for row in rows],
                          [t.sample_index for t in trajectories],
                          [len(t.response_ids) for t in trajectories])
        uniform = torch.from_numpy((bits >> np.uint64(11)).astype(np.float64) * 2.0**-53)
        tokens, logprobs = sample(logits, uniform.to(logits.device), settings.temperature,
                                  settings.top_p)
        self.counts["sampled"] += len(rows)
        self.counts["slot_ticks"] += self.n_slots - len(self.free)
        self.counts["kv_tokens"] += sum(self.cache.lengths)
        for row, token, logprob in zip(rows, tokens.tolist(), logprobs.tolist()):
            self.advance(row, token, logprob)
        self.tick += 1

    def next_logits(self, rows, leaders, followers):
        """Feed the pending tokens of `rows` (leaders among them); logits (N, V) for rows, then
        followers."""
        cache, logits = self.cache, []
        if rows:
            logits.append(forward_step(self.model, cache, [row.slot for row in rows],
                                       [row.pending for row in rows]))
            self.counts["tokens_fed"] += sum(len(row.pending) for row in rows)
        for row in leaders:
            kv = (x[:, row.slot, :, : len(row.pending)] for x in (cache.k, cache.v))
            self.shared[row.trajectory.prompt_index] = logits[0][rows.index(row)], *kv
        for row in followers:  # same prompt, same logits; only the noise differs
            first, k, v = self.shared[row.trajectory.prompt_index]
            cache.lengths[row.slot] = k.shape[2]
            cache.k[:, row.slot, :, : k.shape[2]], cache.v[:, row.slot, :, : k.shape[2]] = k, v
            logits.append(first[None])
        # Keep the one prompt that still has samples in the queue; as a copy when it is new, for its
        # slot may be refilled before they start.
        waiting = self.queue[0].trajectory.prompt_index if self.queue else None
        self.shared = {waiting: self.shared[waiting]} if waiting in self.shared else {}
        if any(row.trajectory.prompt_index == waiting for row in leaders):
            self.shared[waiting] = tuple(x.clone() for x in self.shared[waiting])
        return torch.cat(logits)

    def advance(self, row, token, logprob):
        """Append a sampled token; then the row ends, pauses for the snippet it has closed, or goes on."""
        t = row.trajectory
        t.response_ids.append(token)
        t.loss_mask.append(1)
        t.logprobs.append(logprob)
        row.pending = [token]
        if token == self.tokenizer.eos_token_id:
            return self.finish(row, "eos")
        snippet = self.closed_snippet(row, token) if self.settings.tools else None
        if snippet and len(t.tool_calls) == self.settings.max_calls:
            return self.finish(row, "max_calls")
        if snippet:
            return self.call(row, *snippet)
        if len(t.response_ids) >= self.settings.max_response_tokens:
            return self.finish(row, "length")
        self.active.append(row)

    def closed_snippet(self, row, token):
        """(start, code) of the snippet that this token closes, or None."""
        window = row.tail + self.pieces[token]
        row.tail = window[1 - len(CODE_CLOSE):]
        row.opened |= CODE_OPEN in window
        _, closed, row.overrun = window.partition(CODE_CLOSE)
        # The search is linear in the segment: not for every stray </code>.
        if closed and row.opened:
            return find_snippet(self.pieces, row.trajectory.response_ids, row.segment_begin, row.overrun)

    def call(self, row, start, code):
        """Start the row's snippet; the row pauses."""
        t, settings = row.trajectory, self.settings
        t.tool_calls.append(ToolCall(code, "", "", start, len(t.response_ids), 0.0))
        # Generators inside the snippet are seeded by the row, not by the order of arrival; the position
        # is negative so that no sampled token shares these bits.
        bits = noise_bits(settings.seed, settings.step, row.key, t.sample_index, -len(t.tool_calls))
        row.task = asyncio.ensure_future(self.sandbox.run(code, seed=int(bits >> np.uint64(33))))
        row.due = self.tick + settings.rejoin_ticks
        self.paused.append(row)

    def rejoin(self, row):
        """Append the interpreter block. Nothing is computed here: its tokens are fed with the row's next
        tick."""
        t, result, limit = row.trajectory, row.task.result(), self.settings.max_response_tokens
        call = t.tool_calls[-1]
        call.output, call.status, call.seconds = result.output, result.status, result.seconds
        if result.status == "sandbox_error":
            return self.finish(row, "sandbox_error")
        block = encode_interpreter(self.tokenizer, result.output, self.settings.max_interpreter_tokens,
                                   row.overrun)
        block = block[: limit - len(t.response_ids)]
        t.response_ids += block
        t.loss_mask += [0] * len(block)
        t.logprobs += [0.0] * len(block)
        row.pending, row.segment_begin = row.pending + block, len(t.response_ids)
        row.tail, row.opened = "", False
        if len(t.response_ids) >= limit:
            return self.finish(row, "length")
        self.active.append(row)

    def finish(self, row, reason):
        row.trajectory.finish_reason = reason
        self.cache.lengths[row.slot] = 0
        heapq.heappush(self.free, row.slot)
        if self.settings.progress:
            self.settings.progress(1)
