"""Batched generation with a manual KV cache that stops at </code>, runs the snippet, and resumes.

One tick of `generate`:
    1. rows whose tool result is due rejoin; queued rows fill free cache slots
    2. ONE forward call over a flat stream: one token of a decoding row, closing tag and
       interpreter text of a resuming one, the prompt of a new one
    3. one token is sampled per row; a row that completes `</code>` pauses, with its slot and
       cache, while the sandbox runs the snippet

Sampled tokens are never decoded and encoded again. Their 0/1 `loss_mask` (1 = sampled by the
policy, 0 = forced interpreter text) travels unchanged to loss, GAE and metrics.

Definitions:
  - A snippet, maybe empty, ends at the first `</code>`, even inside a string, as in the paper,
    and begins at the last `<code>` before it. `</code>` without `<code>` is plain text.
  - The token that completes `</code>` may run past it (`>\\n`, `></`): it is kept, and only what
    is missing is appended.
  - finish_reason: `eos`; `length` (max_response_tokens reached, interpreter text included);
    `max_calls` (a `</code>` beyond max_calls; after the last call the model may still answer);
    `sandbox_error` (the sandbox itself failed: drop the row, do not score it).

Reproducible: a row's noise depends on (seed, step, prompt key, sample, position) alone, and a
paused row rejoins a fixed number of ticks after its call, when its result is waited for: batch
shapes, and so rounding, do not depend on the clock. `rejoin_ticks=0` gives that up.

Letters in shape comments: N rows in a step, T tokens in the flat stream, V vocabulary, L layers,
H query heads, K key/value heads, D head dim, S cache positions per slot.
"""
import asyncio
import bisect
import functools
import heapq
import itertools
import math
import os
import re
import socket
import sys
import time
import urllib.parse
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path

import huggingface_hub
import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors import SafetensorError
from torch.utils.benchmark import Timer
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM, AutoTokenizer

from sandbox import UserError

try:  # optional, CUDA only; without it PyTorch's own FlashAttention is used
    from flash_attn import flash_attn_varlen_func
except ImportError:
    flash_attn_varlen_func = None

if sys.version_info < (3, 11):
    sys.exit(f"error: Python 3.11 or later is needed, this is {sys.version.split()[0]}")

CODE_OPEN, CODE_CLOSE = "<code>", "</code>"
INTERPRETER_OPEN, INTERPRETER_CLOSE = "<interpreter>", "</interpreter>"
ANSWER_OPEN, ANSWER_CLOSE = "<answer>", "</answer>"
FENCE = re.compile(r"\s*```(?:python|py)?[ \t]*\n(.*?)\n?[ \t]*```\s*", re.DOTALL)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
PREFILL_TOKENS = 16384  # of prompts in one tick, about: activations need memory


# ---------------------------------------------------------------------------------------------
# The table of tools


@dataclass(frozen=True)
class Tool:
    """What the policy writes between the two tags is run; the output comes back in an interpreter block."""
    name: str
    open: str
    close: str
    run: object  # async function of (text between the tags, seed, sandbox) -> SandboxResult


async def run_python(code, seed, sandbox):
    return await sandbox.run(code, seed=seed)


# Another tool is another row: all patterns below, in data.py and in sft.py are made from this table.
TOOLS = [Tool("code", CODE_OPEN, CODE_CLOSE, run_python)]
CLOSING = {tool.open: tool.close for tool in TOOLS}  # of each opening tag
CLOSING |= {INTERPRETER_OPEN: INTERPRETER_CLOSE, ANSWER_OPEN: ANSWER_CLOSE}
TAG = re.compile("|".join(map(re.escape, [*CLOSING, *CLOSING.values()])))
AFTER_A_CALL = "|".join(f"(?<={re.escape(tool.close)})" for tool in TOOLS)
INTERPRETER_BLOCK = re.compile(
    rf"(?:{AFTER_A_CALL})\s*{INTERPRETER_OPEN}\n?(.*?)\n?{INTERPRETER_CLOSE}", re.DOTALL)


def tool_of(text):
    """The tool whose closing tag a text ends with, or None."""
    for tool in TOOLS:
        if text.endswith(tool.close):
            return tool
    return None


# ---------------------------------------------------------------------------------------------
# Text <-> segments, for SFT and rollout alike

def strip_fence(snippet):
    """The Python source in a snippet, without its fence if it has one."""
    match = FENCE.fullmatch(snippet)
    return match.group(1) if match else snippet.strip("\n")


def split_segments(text):
    """Cut a response into [(kind, text)]: "model", "interpreter", "model", ... Only an
    <interpreter> directly after </code> is the sandbox's, others were written by the model."""
    return list(zip(itertools.cycle(["model", "interpreter"]), INTERPRETER_BLOCK.split(text)))


def encode_text(tokenizer, text):
    """Token ids of plain text: nothing is added, and no special token is recognised."""
    return tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)


def break_tags(output):
    """Make our tags, in output that the policy controls, harmless: [tags]."""
    return TAG.sub(lambda tag: f"[{tag[0][1:-1]}]", output)


def encode_interpreter(tokenizer, output, max_tokens, overrun=""):
    """Token ids of the forced block `\\n<interpreter>\\n{output}\\n</interpreter>`; beyond
    max_tokens of output only head and tail are kept. A newline in overrun, what the last
    sampled token holds beyond `</code>`, is not repeated."""
    output = break_tags(output.strip("\n"))
    for special in tokenizer.all_special_tokens:
        output = output.replace(special, special[:1] + " " + special[1:])
    body = encode_text(tokenizer, output)
    if len(body) > max_tokens:
        notice = encode_text(tokenizer, f"\n[... {len(body) - max_tokens} tokens left out ...]\n")
        head = (max_tokens + 1) // 2
        body = body[:head] + notice + body[len(body) - (max_tokens - head):]
    begin = encode_text(tokenizer, ("" if overrun.endswith("\n") else "\n") + INTERPRETER_OPEN + "\n")
    return begin + body + encode_text(tokenizer, "\n" + INTERPRETER_CLOSE)


def encode_response(tokenizer, text, max_interpreter_tokens, masked_calls=(), mask_interpreter=True):
    """A whole response and EOS, each segment encoded by itself, as `generate` meets it: (ids,
    loss_mask). 0 for interpreter tokens and masked_calls (indices of failed snippets)."""
    ids, mask = [], []
    for i, (kind, segment) in enumerate(split_segments(text)):
        if kind == "interpreter":
            block = encode_interpreter(tokenizer, segment, max_interpreter_tokens)
            ids, mask = ids + block, mask + [int(not mask_interpreter)] * len(block)
            continue
        encoded = tokenizer(segment, add_special_tokens=False, split_special_tokens=True,
                            return_offsets_mapping=True)
        # A token that starts before the snippet is prose, even if it reaches into the tag.
        snippet = segment.rfind(tool_of(segment).open) if i // 2 in masked_calls else len(segment)
        ids += encoded["input_ids"]
        mask += [int(start < snippet) for start, _ in encoded["offset_mapping"]]
    return ids + [tokenizer.eos_token_id], mask + [1]


class Pieces(dict):
    """The text of each token id: `pieces[i]`. Decoded after an anchor token, as a SentencePiece
    token alone loses its leading space."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        self.anchor = encode_text(tokenizer, "x")[-1]
        self.anchor_length = len(tokenizer.decode([self.anchor]))

    def __missing__(self, token):
        text = self.tokenizer.decode([self.anchor, token], clean_up_tokenization_spaces=False)
        self[token] = text[self.anchor_length:]
        return self[token]


def shown_output(result, feedback):
    """What the model sees of a SandboxResult: with feedback "real" the output, "hidden" only
    whether the snippet ran, "none" nothing."""
    hidden = "[ran]" if result.status == "ok" else "[failed]"
    return {"real": result.output, "hidden": hidden, "none": ""}[feedback]


def after_earlier(code, calls):
    """`code` after the snippets of `calls` that ran, as in one session: they run again, unseen,
    within the same time limit."""
    earlier = [call.code for call in calls if call.status == "ok" and call.tool == "code"]
    mute = "__import__('contextlib').redirect_stdout(__import__('io').StringIO())"
    return f"with {mute}: [exec(s, globals()) for s in {earlier!r}]\n{code}" if earlier else code


# ---------------------------------------------------------------------------------------------
# The cache and the attention

def at_least_fp32(x):
    """Softmax, logsumexp and their inputs are never in half precision."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def head_dim(config):
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


class KVCache:
    """Contiguous slots: k and v are (L, n_slots, K, S, D); `lengths[slot]` tokens are filled.
    A slot holds the longest possible row, so a row once admitted always finishes. Pages would
    hold more (1-4 calls fill 14 % of 1,088-token slots), but gathering them makes attention on
    CPU four times as long (tests/bench_rollout.py --pages)."""

    @staticmethod
    def shape(config, n_slots, max_tokens):
        """(L, n_slots, K, S, D)"""
        return config.num_hidden_layers, n_slots, config.num_key_value_heads, max_tokens, head_dim(config)

    def __init__(self, config, n_slots, max_tokens, dtype, device):
        self.kv = torch.zeros(2, *self.shape(config, n_slots, max_tokens), dtype=dtype, device=device)
        self.k, self.v = self.kv
        self.lengths = [0] * n_slots


class Packing:
    """A flat stream of N sequences with so many new tokens (lengths), for all layers. With a
    cache, slots[i] holds the past of sequence i, and lengths ascend: single-token rows are
    decoded together, the others attend in groups of about equal length."""

    def __init__(self, lengths, device, cache=None, slots=None):
        self.lengths, self.cache = lengths, cache
        past = [cache.lengths[s] for s in slots] if cache else [0] * len(lengths)
        positions = np.concatenate([np.arange(p, p + n) for p, n in zip(past, lengths)])
        self.position_ids = torch.from_numpy(positions).to(device)  # (T,)
        self.last = torch.from_numpy(np.cumsum(lengths) - 1).to(device)  # (N,) last token of each
        if cache is None:
            return
        assert lengths == sorted(lengths), "shorter rows must come first"
        self.n_decode = n = bisect.bisect_right(lengths, 1)
        self.slot_of_token = torch.from_numpy(np.repeat(slots, lengths)).to(device)  # (T,)
        if n:
            # A view up to the highest slot used: to gather the used ones would copy the cache (21
            # ms per layer against 1, at 128 rows). Idle slots see one key, to no effect.
            seen = np.ones(max(slots[:n]) + 1, dtype=np.int64)
            seen[slots[:n]] = [p + 1 for p in past[:n]]
            self.longest = int(seen.max())
            hidden = np.arange(self.longest)[None] >= seen[:, None]  # (slots in view, longest)
            bias = np.where(hidden, -np.inf, 0.0)[:, None, None]
            self.bias = torch.from_numpy(bias).to(device=device, dtype=cache.k.dtype)
        self.groups = []  # (slots (n,), token indices (n, new), mask (n, 1, new, keys))
        begins = np.cumsum(lengths) - lengths
        for _, rows in itertools.groupby(range(n, len(lengths)), lambda i: lengths[i].bit_length()):
            rows = list(rows)
            own = np.array([lengths[i] for i in rows])[:, None]  # (n, 1)
            # padded to less than twice its length, a row repeats its last token
            index = begins[rows][:, None] + np.minimum(np.arange(own.max()), own - 1)  # (n, new)
            at = positions[index]
            mask = np.arange(at.max() + 1) <= at[:, None, :, None]  # (n, 1, new, keys)
            self.groups.append([torch.from_numpy(x).to(device)
                                for x in (np.array([slots[i] for i in rows]), index, mask)])


def packed_attention(module, query, key, value, attention_mask, scaling=None, packing=None, **kwargs):
    """Attention of a flat stream, described by `packing`, for sampler and trainer: query
    (1, H, T, D), key and value (1, K, T, D) -> (1, T, H, D). attn_implementation="retool":
    transformers builds no mask for a name it does not know."""
    unknown = [name for name in ("sliding_window", "softcap", "s_aux") if kwargs.get(name) is not None]
    if unknown:
        raise NotImplementedError(f"its attention has {', '.join(unknown)}, which is not implemented")
    q, k, v = query[0], key[0], value[0]  # (H, T, D), (K, T, D)
    if packing.cache is None:
        return whole_sequences(q, k, v, packing, scaling), None
    cache = packing.cache
    k_cache, v_cache = cache.k[module.layer_idx], cache.v[module.layer_idx]  # (n_slots, K, S, D)
    k_cache[packing.slot_of_token, :, packing.position_ids] = k.transpose(0, 1)
    v_cache[packing.slot_of_token, :, packing.position_ids] = v.transpose(0, 1)
    out = torch.empty_like(q.transpose(0, 1))  # (T, H, D)
    if packing.n_decode:
        out[:packing.n_decode] = one_token_each(q, k_cache, v_cache, packing, scaling)
    for slots, index, mask in packing.groups:  # prompts, and rows that resume with interpreter text
        keys, values = (x[slots, :, :mask.shape[-1]] for x in (k_cache, v_cache))  # (n, K, keys, D)
        out[index] = F.scaled_dot_product_attention(
            q[:, index].transpose(0, 1), keys, values, attn_mask=mask, scale=scaling,
            enable_gqa=q.shape[0] != k.shape[0]).transpose(1, 2)  # (n, new, H, D)
    return out[None], None


def whole_sequences(q, k, v, packing, scale):
    """Training: sequences without a past. q (H, T, D), k, v (K, T, D) -> (1, T, H, D). On CUDA
    by flash-attn or what PyTorch bundles of it: never run, NOT MEASURED."""
    if q.is_cuda and q.dtype in (torch.bfloat16, torch.float16):
        bounds, longest = F.pad(packing.last + 1, (1, 0)).int(), max(packing.lengths)  # (N + 1,)
        q, k, v = (x.transpose(0, 1) for x in (q, k, v))  # (T, heads, D)
        if flash_attn_varlen_func:
            return flash_attn_varlen_func(q, k, v, bounds, bounds, longest, longest,
                                          softmax_scale=scale, causal=True)[None]
        from torch.nn.attention.varlen import varlen_attn  # enable_gqa: 2.12
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
        return varlen_attn(q, k, v, bounds, bounds, longest, longest, scale=scale, window_size=(-1, 0))[None]
    # split, not slices: their backward would write N tensors of the full length
    spans = zip(*(x.split(packing.lengths, 1) for x in (q, k, v)))
    out = [F.scaled_dot_product_attention(a[None], b[None], c[None], is_causal=True, scale=scale,
                                          enable_gqa=q.shape[0] != k.shape[0]) for a, b, c in spans]
    return torch.cat(out, 2).transpose(1, 2)


def one_token_each(q, k_cache, v_cache, packing, scale):
    """Decoding: the first n tokens are one of each of n rows. q (H, T, D) -> (n, H, D)."""
    n, n_view, heads = packing.n_decode, packing.bias.shape[0], k_cache.shape[1]
    slots = packing.slot_of_token[:n]
    # Query heads of one key head become queries of one sequence: no key is repeated.
    grouped = q.new_zeros(n_view, *q.shape[::2])  # (slots, H, D)
    grouped[slots] = q[:, :n].transpose(0, 1)
    grouped = grouped.view(n_view, heads, -1, q.shape[2])  # (slots, K, H/K, D)
    keys, values = (x[:n_view, :, :packing.longest] for x in (k_cache, v_cache))  # (slots, K, longest, D)
    decoded = F.scaled_dot_product_attention(grouped, keys, values, attn_mask=packing.bias, scale=scale)
    return decoded.reshape(n_view, *q.shape[::2])[slots]


AttentionInterface.register("retool", packed_attention)


def free_bytes(device):
    """Memory for a cache: nine tenths of what the device has free; infinite if unknown."""
    if device.type == "cuda":
        torch.cuda.empty_cache()  # what PyTorch reserves is in pieces
        return 0.9 * torch.cuda.mem_get_info(device)[0]
    meminfo = Path("/proc/meminfo")  # Linux
    if meminfo.exists():
        return 0.9 * 1024 * int(re.search(r"MemAvailable:\s*(\d+)", meminfo.read_text())[1])
    return math.inf


@torch.inference_mode()
def forward_step(model, cache, slots, tokens):
    """Feed tokens[i] (a list) into slots[i] -> fp32 logits (N, V) after their last tokens. For 64
    decoding rows of a 3-layer Qwen3 232 operations, views aside (bench_rollout.py --plain)."""
    device = cache.k.device
    packing = Packing([len(t) for t in tokens], device, cache, slots)
    flat = torch.tensor([t for row in tokens for t in row], device=device)[None]  # (1, T)
    logits = model(input_ids=flat, position_ids=packing.position_ids[None], use_cache=False,
                   logits_to_keep=packing.last, packing=packing).logits[0]
    for slot, row in zip(slots, tokens):
        cache.lengths[slot] += len(row)
    return at_least_fp32(logits)


# ---------------------------------------------------------------------------------------------
# Loading a model

def first_line(error):
    return str(error).strip().splitlines()[0]


@functools.cache
def choose_dtype(name):
    """The name; for "auto" bf16 if that is clearly faster here: many CPUs only emulate it."""
    if name != "auto":
        return name
    ones = torch.ones(256, 512, device="cuda" if torch.cuda.is_available() else "cpu")
    timers = [Timer("x.mm(x.T)", globals={"x": ones.to(dtype)}, num_threads=torch.get_num_threads())
              for dtype in DTYPES.values()]
    seconds = [min(timer.timeit(1).mean for _ in range(5)) for timer in timers]
    if dist.is_initialized():
        dist.broadcast_object_list(seconds)  # all ranks follow the first
    if os.environ.get("RANK", "0") == "0":
        print(f"--dtype auto: products in bf16 are {seconds[0] / seconds[1]:.2f} times as fast as in fp32")
    return "bf16" if seconds[0] > 1.5 * seconds[1] else "fp32"


def from_checkpoint(loader, path, **options):
    """loader.from_pretrained(path); UserError, with what to do, if that is no checkpoint."""
    folder = Path(path)
    if folder.is_file():
        raise UserError(f"{path}: no folder, no hub id (how to convert a GGUF file: runs/smollm2.sh)")
    if folder.is_dir() and not (folder / "config.json").exists():
        raise UserError(f"{path}: no config.json in there (a run's model is in its folder checkpoint)")
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
    """Ask once whether the hub answers; if not, libraries use what is downloaded."""
    address = urllib.parse.urlparse(huggingface_hub.constants.ENDPOINT)
    try:
        socket.create_connection((address.hostname, address.port or 443), timeout=5).close()
    except OSError:
        huggingface_hub.constants.HF_HUB_OFFLINE = True
        os.environ["HF_DATASETS_OFFLINE"] = "1"  # datasets reads it at import


def load_tokenizer(path):
    """A checkpoint's tokenizer. Its EOS becomes the token that ends an assistant's turn in the
    chat template, as SFT trains."""
    tokenizer = from_checkpoint(AutoTokenizer, path)
    # Without tokenizer files a folder gives an empty tokenizer, not an error.
    if len(tokenizer) < 2 or tokenizer.eos_token_id is None or not tokenizer.chat_template:
        raise UserError(f"{path}: no usable tokenizer there (needs vocabulary, EOS, chat template)")
    turns = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "x"}]
    before, ids = (tokenizer.apply_chat_template(turns[:n], add_generation_prompt=n == 1, return_dict=False)
                   for n in (1, 2))
    special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    ends = [token for token in ids[len(before):] if token in special]
    if ends:
        tokenizer.eos_token = tokenizer.convert_ids_to_tokens(ends[0])
    return tokenizer


def end_tokens(model, tokenizer):
    """All tokens that end a response: the tokenizer's EOS and the generation config's."""
    ends = model.generation_config.eos_token_id if model.generation_config else None
    return {tokenizer.eos_token_id} | set(ends if isinstance(ends, list) else [ends]) - {None}


def load_config(path, tokenizer=()):
    """A checkpoint's configuration; UserError if it has fewer embeddings than the tokenizer."""
    config = from_checkpoint(AutoConfig, path)
    rows, tokens = config.vocab_size, len(tokenizer)
    if rows < tokens:
        raise UserError(f"{path}: the model has {rows} rows of embeddings, the tokenizer {tokens} tokens")
    return config


def load_model(path, device, dtype="fp32", weights=True):
    """A causal LM with `packed_attention`. weights=False: random, for a run's checkpoint to be
    read into. Trap: never `.to(torch.bfloat16)` later, that would round RoPE's frequencies."""
    if weights:
        model = from_checkpoint(AutoModelForCausalLM, path, dtype=DTYPES[dtype])
    else:
        model = AutoModelForCausalLM.from_config(load_config(path), dtype=DTYPES[dtype])
    use_packed_attention(model.to(device), path)
    return model


@torch.no_grad()
def use_packed_attention(model, name):
    """Switch a model to `packed_attention`. UserError unless two sequences keep their logits,
    packed (trainers) and in two pieces through the cache (sampler)."""
    refused = f"{name}: the architecture {model.config.model_type} is not supported"
    if "longrope" in str(model.config) or "dynamic" in str(getattr(model.config, "rope_parameters", "")):
        raise UserError(f"{refused}: its position encoding depends on the length of the longest sequence")
    if getattr(model.config, "attention_chunk_size", None):
        raise UserError(f"{refused}: its attention is chunked")
    dtypes = {parameter: parameter.dtype for parameter in model.parameters()}
    for parameter in dtypes:  # in fp32 a difference is not rounding
        parameter.data = at_least_fp32(parameter.data)
    first, second = (torch.arange(n, device=model.device) % model.config.vocab_size for n in (12, 17))
    try:
        wanted = torch.cat([model.eval()(input_ids=ids[None], use_cache=False).logits[0]
                            for ids in (first, second)])
        model.set_attn_implementation("retool")
        packing = Packing([12, 17], model.device)
        hidden = model.model(input_ids=torch.cat([first, second])[None], use_cache=False, packing=packing,
                             position_ids=packing.position_ids[None]).last_hidden_state[0]
        packed = model.lm_head(hidden)
        cache = KVCache(model.config, 2, 17, packed.dtype, model.device)
        forward_step(model, cache, [0, 1], [first[:9].tolist(), second[:11].tolist()])
        cached = forward_step(model, cache, [0, 1], [first[9:].tolist(), second[11:].tolist()])
        list(model.model.layers)  # what the trainers shard
    except (AttributeError, TypeError, RuntimeError, ValueError, IndexError, KeyError) as error:
        raise UserError(f"{refused}: {type(error).__name__}: {first_line(error)}") from None
    for what, ours, theirs in (("packed", packed, wanted), ("cached", cached, wanted[packing.last])):
        error = ((ours - theirs).norm(dim=-1).max() / theirs.norm(dim=-1).mean()).item()
        if not error < 1e-3:  # rounding: 3e-5; what is refused: 0.09
            raise UserError(f"{refused}: {what} sequences get other logits (relative difference "
                            f"{error:.0e}): layers that are not attention, or scaled logits")
    for parameter, dtype in dtypes.items():
        # copy: by a file's odd addresses a CPU would round otherwise than in a resumed run
        parameter.data = parameter.data.to(dtype, copy=True)


# ---------------------------------------------------------------------------------------------
# Sampling

def noise_bits(*fields):
    """64 random bits as a function of the fields (splitmix64 on each); arrays broadcast."""
    with np.errstate(over="ignore"):
        bits = np.uint64(0)
        for value in fields:
            bits = (bits ^ np.asarray(value).astype(np.uint64)) + np.uint64(0x9E3779B97F4A7C15)
            bits = (bits ^ (bits >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            bits = (bits ^ (bits >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            bits = bits ^ (bits >> np.uint64(31))
    return bits


def sample(logits, uniform, temperature, top_p):
    """One token per row by the inverse CDF in float64: logits (N, V), uniform (N,) in [0, 1) ->
    tokens (N,), logprobs (N,) of the full softmax. Temperature 0 is greedy, with logprobs at 1.
    top_p < 1 is for evaluation: training would score another distribution."""
    logprobs = torch.log_softmax(logits / (temperature or 1.0), -1)
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


# ---------------------------------------------------------------------------------------------
# The engine

@dataclass
class ToolCall:
    code: str
    output: str  # the sandbox's, before neutralising and cutting
    status: str
    start: int  # response_ids[start:end] is the snippet with its tags
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
    loss_mask: list = field(default_factory=list)  # 1 sampled, 0 forced
    logprobs: list = field(default_factory=list)  # by the sampler; 0.0 where forced
    tool_calls: list = field(default_factory=list)
    finish_reason: str = ""
    correct: bool = False  # set by eval.py
    answer: str = None  # that it states, set by eval.py
    example: object = None  # set by ppo.py

    @property
    def is_complete(self):
        """Whether the policy itself ended the response: only then it has an answer."""
        return self.finish_reason == "eos"

    @property
    def snippets(self):
        """The calls that ran code."""
        return [call for call in self.tool_calls if call.tool == "code"]

    def prose_segments(self):
        """Runs of sampled token ids outside the snippets that were run."""
        chosen = list(self.loss_mask)
        for call in self.tool_calls:
            chosen[call.start:call.end] = [0] * (call.end - call.start)
        runs = itertools.groupby(range(len(chosen)), chosen.__getitem__)
        return [[self.response_ids[i] for i in run] for is_prose, run in runs if is_prose]


@dataclass
class Sampling:
    """The keyword arguments of `generate`. Limits are in tokens."""
    temperature: float = 1.0  # 0 is greedy
    top_p: float = 1.0  # see `sample`
    max_response_tokens: int = 512  # interpreter tokens included
    max_calls: int = 4
    max_interpreter_tokens: int = 128  # of each call
    tools: bool = True  # False: tags mean nothing
    feedback: str = "real"  # see `shown_output`
    interpreter: str = "stateless"  # or "replay": see `after_earlier`
    n_slots: int = 64  # rows in the cache; fewer where memory is short
    kv_gib: float = 0.0  # for the cache; 0: what is free
    rejoin_ticks: int = 4  # from call to return; 0: once done, not reproducible
    seed: int = 0
    step: int = 0  # of the run, for the noise
    logits_processor: object = None  # f(logits (N, V), trajectories) -> logits
    progress: object = None  # called with 1 per finished row


@dataclass(eq=False)
class Row:
    """A trajectory in flight."""
    trajectory: Trajectory
    key: int  # names the prompt to the noise
    pending: list  # tokens to feed
    slot: int = -1
    segment_begin: int = 0  # of the current model segment
    text: str = ""  # of that segment
    overrun: str = ""  # of the last token beyond </code>
    task: object = None  # the running snippet
    due: int = 0  # tick at which the row rejoins


async def generate(model, tokenizer, prompts, sandbox, *, n_samples=1, prompt_keys=None,
                   stats=None, **sampling):
    """Sample n_samples responses to each prompt: a list of Trajectory, prompt-major.

    prompts: lists of token ids. sandbox: an entered Sandbox (may be None with tools=False).
    prompt_keys: integers that name the prompts to the noise (default: their index).
    stats: a dict that receives tool_wait_seconds. sampling: the fields of `Sampling`.
    Where memory limits the slots, rounding depends on it; UserError if no row fits.
    """
    settings = Sampling(**sampling)
    longest = max((len(p) for p in prompts), default=0) + settings.max_response_tokens
    if not all(prompts):
        raise ValueError("a prompt is empty")
    if longest > model.config.max_position_embeddings:
        raise ValueError(f"prompt + response may take {longest} tokens, but the model has "
                         f"{model.config.max_position_embeddings} positions")
    if model.config._attn_implementation != "retool":
        raise ValueError('the model must be loaded with attn_implementation="retool"')
    rows = [Row(Trajectory(i, j, prompt), prompt_keys[i] if prompt_keys else i, prompt)
            for i, prompt in enumerate(prompts) for j in range(n_samples)]
    engine = Engine(model, tokenizer, sandbox, settings, rows, longest)
    await engine.run()
    if stats is not None:
        stats["tool_wait_seconds"] = engine.tool_wait_seconds
    return [row.trajectory for row in rows]


class Engine:
    """The tick loop of one `generate`. A row is in the `queue`, `active` (fed next), `paused`
    (its snippet runs; it keeps its slot), or finished (its slot is free)."""

    def __init__(self, model, tokenizer, sandbox, settings, rows, longest):
        self.model, self.tokenizer, self.sandbox, self.settings = model, tokenizer, sandbox, settings
        self.queue, self.active, self.paused = deque(rows), [], []
        weight = next(model.parameters())
        slot_bytes = 2 * math.prod(KVCache.shape(model.config, 1, longest)) * weight.element_size()
        budget = min(settings.kv_gib * 2**30 or math.inf, free_bytes(weight.device))
        if budget < slot_bytes:
            raise UserError(f"one row of {longest} tokens needs {slot_bytes / 2**30:.2g} GiB of KV "
                            f"cache, there are {budget / 2**30:.2g} (--kv_gib, or free)")
        n_slots = int(min(settings.n_slots, len(rows), budget / slot_bytes))
        self.cache = KVCache(model.config, n_slots, longest, weight.dtype, weight.device)
        self.free = list(range(n_slots))  # a heap: low slots keep the decode view short
        self.pieces, self.ends, self.tick = Pieces(tokenizer), end_tokens(model, tokenizer), 0
        self.shared = {}  # prompt index -> (logits after it, its k and v), for other samples
        self.tool_wait_seconds = 0.0

    async def run(self):
        try:
            while self.queue or self.active or self.paused:
                await asyncio.sleep(0)  # let the sandbox's own callbacks run
                await self.wait_for_tools()
                leaders, followers = self.admit()
                if not self.queue:  # else free slots are refilled
                    self.compact()
                # shorter ones first, as Packing wants them
                rows = sorted(self.active + leaders, key=lambda row: len(row.pending))
                if rows or followers:
                    self.active = []
                    self.step(rows, leaders, followers)
        finally:
            for row in self.paused:  # no snippet outlives its rollout
                row.task.cancel()

    async def wait_for_tools(self):
        """Bring back the rows that are due. With nothing else to do, skip to the next such tick
        or, with rejoin_ticks=0, wait for the first result."""
        begin, ticks = time.perf_counter(), self.settings.rejoin_ticks
        if self.paused and not self.active and not (self.queue and self.free):
            self.tick = max(self.tick, min(row.due for row in self.paused))
            if not ticks:
                tasks = [row.task for row in self.paused]
                await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        due = [row for row in self.paused if (row.due <= self.tick if ticks else row.task.done())]
        await asyncio.gather(*[row.task for row in due])
        self.tool_wait_seconds += time.perf_counter() - begin
        for row in due:
            self.paused.remove(row)
            self.rejoin(row)

    def admit(self):
        """Fill free slots: (leaders, which compute their prompt; followers, which copy it)."""
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
        """Move rows from high slots to free lower ones: the decode view shrinks."""
        cache, free = self.cache, self.free
        for row in sorted(self.active + self.paused, key=lambda row: -row.slot):
            if not free or free[0] > row.slot:
                return
            slot, length = heapq.heappop(free), cache.lengths[row.slot]
            cache.kv[:, :, slot, :, :length] = cache.kv[:, :, row.slot, :, :length]
            cache.lengths[slot], cache.lengths[row.slot] = length, 0
            heapq.heappush(free, row.slot)
            row.slot = slot

    def step(self, rows, leaders, followers):
        """One tick: a forward call, one sampled token per row."""
        settings = self.settings
        logits = self.next_logits(rows, leaders, followers)
        rows = rows + followers
        trajectories = [row.trajectory for row in rows]
        if settings.logits_processor:
            logits = settings.logits_processor(logits, trajectories)
        bits = noise_bits(settings.seed, settings.step, [row.key for row in rows],
                          [t.sample_index for t in trajectories], [len(t.response_ids) for t in trajectories])
        uniform = torch.from_numpy((bits >> np.uint64(11)).astype(np.float64) * 2.0**-53)
        tokens, logprobs = sample(logits, uniform.to(logits.device), settings.temperature, settings.top_p)
        for row, token, logprob in zip(rows, tokens.tolist(), logprobs.tolist()):
            self.advance(row, token, logprob)
        self.tick += 1

    def next_logits(self, rows, leaders, followers):
        """Feed the pending tokens of `rows`: logits (N, V) of rows, then of followers."""
        cache, logits = self.cache, []
        if rows:
            slots, pending = [row.slot for row in rows], [row.pending for row in rows]
            logits.append(forward_step(self.model, cache, slots, pending))
        # Later samples need a prompt as a copy, for its slot may be refilled.
        waiting = self.queue[0].trajectory.prompt_index if self.queue else None
        for row in leaders:
            prompt = logits[0][rows.index(row)], cache.kv[:, :, row.slot, :, :len(row.pending)]
            index = row.trajectory.prompt_index
            self.shared[index] = [x.clone() for x in prompt] if index == waiting else prompt
        for row in followers:
            first, kv = self.shared[row.trajectory.prompt_index]
            cache.lengths[row.slot] = length = kv.shape[3]
            cache.kv[:, :, row.slot, :, :length] = kv
            logits.append(first[None])
        self.shared = {index: prompt for index, prompt in self.shared.items() if index == waiting}
        return torch.cat(logits)

    def advance(self, row, token, logprob):
        """Append a sampled token; the row ends, pauses for its snippet, or goes on."""
        t = row.trajectory
        t.response_ids.append(token)
        t.loss_mask.append(1)
        t.logprobs.append(logprob)
        row.pending = [token]
        if token in self.ends:
            return self.finish(row, "eos")
        snippet = self.closed_snippet(row, token) if self.settings.tools else None
        if snippet and len(t.tool_calls) < self.settings.max_calls:
            self.call(row, *snippet)
        elif snippet:
            self.finish(row, "max_calls")
        elif len(t.response_ids) >= self.settings.max_response_tokens:
            self.finish(row, "length")
        else:
            self.active.append(row)

    def closed_snippet(self, row, token):
        """(tool, index of the token in which its opening tag begins, text between the tags) of the call
        that this token closes, or None."""
        before = len(row.text)
        row.text += self.pieces[token]
        for tool in TOOLS:
            close = row.text.find(tool.close, max(0, before + 1 - len(tool.close)))
            opening = row.text.rfind(tool.open, 0, max(0, close))
            if opening >= 0:
                break
        else:
            return None
        row.overrun = row.text[close + len(tool.close):]
        ids = row.trajectory.response_ids
        ends = itertools.accumulate(len(self.pieces[token]) for token in ids[row.segment_begin:])
        start = row.segment_begin + bisect.bisect_right(list(ends), opening)
        # Decoded as a whole: byte-level tokens may split a character.
        text = self.tokenizer.decode(ids[start:], clean_up_tokenization_spaces=False)
        return tool, start, strip_fence(text[:-len(tool.close + row.overrun)].rpartition(tool.open)[2])

    def call(self, row, tool, start, code):
        """Start the row's snippet; the row pauses."""
        t, settings = row.trajectory, self.settings
        is_replayed = tool.name == "code" and settings.interpreter == "replay"
        source = after_earlier(code, t.tool_calls) if is_replayed else code
        t.tool_calls.append(ToolCall(code, "", "", start, len(t.response_ids), 0.0, tool.name))
        # Seeded by the row, not by order of arrival; no sampled token has a negative position.
        bits = noise_bits(settings.seed, settings.step, row.key, t.sample_index, -len(t.tool_calls))
        row.task = asyncio.ensure_future(tool.run(source, int(bits >> np.uint64(33)), self.sandbox))
        row.due = self.tick + settings.rejoin_ticks
        self.paused.append(row)

    def rejoin(self, row):
        """Append the interpreter block, to be fed in the next tick."""
        t, limit = row.trajectory, self.settings.max_response_tokens
        call, result = t.tool_calls[-1], row.task.result()
        call.output, call.status, call.seconds = result.output, result.status, result.seconds
        if result.status == "sandbox_error":
            return self.finish(row, "sandbox_error")
        block = encode_interpreter(self.tokenizer, shown_output(result, self.settings.feedback),
                                   self.settings.max_interpreter_tokens, row.overrun)
        block = block[:limit - len(t.response_ids)]
        t.response_ids += block
        t.loss_mask += [0] * len(block)
        t.logprobs += [0.0] * len(block)
        row.pending, row.segment_begin, row.text = row.pending + block, len(t.response_ids), ""
        if len(t.response_ids) >= limit:
            return self.finish(row, "length")
        self.active.append(row)

    def finish(self, row, reason):
        row.trajectory.finish_reason = reason
        self.cache.lengths[row.slot] = 0
        heapq.heappush(self.free, row.slot)
        if self.settings.progress:
            self.settings.progress(1)
