"""What does this code do on a GPU? Random models and the embedded tokenizer: nothing is downloaded.

    bash runs/check_gpu.sh [FOLDER]                     # one GPU of 24 GB or more, at most eight minutes
    python runs/check_gpu.py --device cpu               # the same logic with tiny models: no figure means anything
    python runs/check_gpu.py --checks device varlen     # only these

FOLDER/check_gpu.json has every figure, FOLDER/check_gpu.md the same as a table. A check is
    passed     its conditions hold
    failed     one does not, or it raised, or it was still running at its limit
    measured   it has figures and no condition
    skipped    with the reason
The exit status is 1 if a check failed, 2 if there is no GPU.

Each check is a process of its own: a kernel that faults spoils CUDA for its process, and one that hangs is
ended. What an earlier check has left of its seconds is given to the next.
"""
import argparse
import asyncio
import contextlib
import functools
import gc
import importlib.metadata
import json
import math
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from dataclasses import dataclass
from pathlib import Path

BEGIN = time.monotonic()  # the imports count
ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import torch  # noqa: E402
from transformers import AutoModelForCausalLM, Qwen2Config  # noqa: E402

import eval as evaluation  # noqa: E402
import ppo  # noqa: E402
import rollout  # noqa: E402
import sft  # noqa: E402
from data import embedded_problem, embedded_tokenizer  # noqa: E402
from rollout import DTYPES, encode_prompt, encode_text, free_bytes, generate, head_dim  # noqa: E402
from sandbox import SandboxResult  # noqa: E402

PPO_SCRIPT = ROOT / "ppo.py"
SECONDS_TO_END = 3  # what a check needs to end by itself, before its limit

# -------------------------------------------------------------------------------------------------
# What is checked on which device

QWEN_05B = dict(hidden_size=896, num_hidden_layers=24, num_attention_heads=14, num_key_value_heads=2,
                intermediate_size=4864, vocab_size=151936, tie_word_embeddings=True)
QWEN_7B = dict(hidden_size=3584, num_hidden_layers=28, num_attention_heads=28, num_key_value_heads=4,
               intermediate_size=18944, vocab_size=152064, tie_word_embeddings=False)
TINY = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
            intermediate_size=48, vocab_size=1024)


@dataclass
class Setup:
    """The sizes of all checks on one kind of device."""
    device: torch.device
    note: str  # goes with every figure
    small: dict  # of the model whose tokens and log-probabilities are compared
    head_dims: list  # of the small model: each is another kernel
    rows: int
    response_tokens: int  # past one page of 256 keys
    shapes: dict  # of the models whose speed is measured
    decode_rows: list
    prompt_tokens: int
    decode_ticks: int
    train_lengths: list  # tokens of the packed sequences
    matmul_size: int
    copy_bytes: int
    part_seconds: float  # without so many left, a part of a check is not begun
    spare_bytes: int  # beside the weights: keys, values, activations
    run_flags: list  # of ppo.py


def make_setup(device_type):
    if device_type == "cpu":
        return Setup(
            device=torch.device("cpu"),
            note="cpu, tiny: logic only",
            small=TINY,
            head_dims=[8, 16],
            rows=4,
            response_tokens=20,
            shapes={"0.5B": TINY | {"tie_word_embeddings": True},
                    "7B": TINY | {"tie_word_embeddings": False}},
            decode_rows=[1, 2, 4],
            prompt_tokens=16,
            decode_ticks=6,
            train_lengths=[32, 32],
            matmul_size=64,
            copy_bytes=1 << 20,
            part_seconds=0.0,
            spare_bytes=0,
            run_flags="--sft_traces 60 --sft_steps 5 --sft_warmup 2 --steps 2 --critic_warmup 1 "
                      "--prompts_per_step 16 --eval_problems 2".split())
    return Setup(
        device=torch.device("cuda", 0),
        note="",
        small=dict(hidden_size=256, num_hidden_layers=4, num_attention_heads=8, num_key_value_heads=2,
                   intermediate_size=512),
        head_dims=[32, 64, 128],
        rows=16,
        response_tokens=320,
        shapes={"0.5B": QWEN_05B, "7B": QWEN_7B},
        decode_rows=[1, 32, 128],
        prompt_tokens=512,
        decode_ticks=32,
        train_lengths=[1024] * 8,
        matmul_size=8192,
        copy_bytes=1 << 30,
        part_seconds=8.0,
        spare_bytes=2 << 30,
        # 60 steps of 32 traces see 1,920 of them.
        run_flags="--sft_traces 1920 --sft_steps 60 --steps 3 --critic_warmup 1 --prompts_per_step 64 "
                  "--eval_problems 16".split())


# -------------------------------------------------------------------------------------------------
# What a check reports

class Skipped(Exception):
    """Why a check, or a part of it, is not done."""


class Report:
    """The figures of one check, kept in a file from the first one on: a process that faults or is ended
    leaves what it has measured."""

    def __init__(self, name, note, limit, path=None):
        self.content = {"check": name, "status": "failed", "reason": "its process ended without a result",
                        "seconds": None, "figures": []}
        self.note = note
        self.path = path
        self.begin = time.monotonic()
        self.deadline = self.begin + limit
        self.n_conditions = 0
        self.broken = []  # conditions that do not hold
        self.save()

    def figure(self, name, value, unit=""):
        """A measured value: a number or a text."""
        if isinstance(value, float) and not math.isfinite(value):
            value = str(value)  # JSON has no such numbers
        self.content["figures"].append({"name": name, "value": value, "unit": unit, "note": self.note})
        self.save()

    def require(self, condition, text):
        """The check fails unless the condition holds, but goes on."""
        self.n_conditions += 1
        if not condition:
            self.broken.append(text)

    @contextlib.contextmanager
    def part(self, setup, name):
        """A part of a check that may lack time, memory or a file: then the rest goes on."""
        try:
            yield
        except Skipped as reason:
            self.figure(name, f"skipped: {reason}")
        except torch.OutOfMemoryError:
            self.figure(name, "skipped: memory")
        free_memory(setup.device)

    def need_time(self, seconds):
        if self.deadline - time.monotonic() < seconds:
            raise Skipped("time")

    def end(self, status, reason="", log=""):
        self.content |= {"status": status, "reason": reason, "seconds": time.monotonic() - self.begin}
        if log:
            self.content["log"] = log
        self.save()

    def save(self):
        if self.path:
            partial = self.path.with_suffix(".partial")
            partial.write_text(json.dumps(self.content))
            partial.rename(self.path)


def run_check(check, setup, report):
    """Run one check in this process: its result is in the report."""
    try:
        check.function(setup, report)
    except Skipped as reason:
        report.end("skipped", str(reason))
    except Exception as error:
        report.end("failed", f"{type(error).__name__}: {error}", traceback.format_exc())
    else:
        if report.broken:
            report.end("failed", "; ".join(report.broken))
        else:
            report.end("passed" if report.n_conditions else "measured")


# -------------------------------------------------------------------------------------------------
# Models, clocks, and what the card can do at best

def random_model(config, dtype, device, weights_of=None):
    """A causal LM with `packed_attention`, made on the device; its weights are random, or another's."""
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=DTYPES[dtype], attn_implementation="retool")
    if weights_of:
        model.load_state_dict(weights_of.state_dict())
    return model.eval()


def small_config(setup, dim, tokenizer):
    """A model whose attention and next tokens are far from uniform, as those of a trained one."""
    shape = setup.small | {"vocab_size": len(tokenizer), "head_dim": dim}
    return Qwen2Config(
        **shape, max_position_embeddings=1024, tie_word_embeddings=False, bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
        initializer_range=1.6 / math.sqrt(shape["hidden_size"]))


def on_gpu(device):
    return device.type == "cuda"


def synchronise(device):
    if on_gpu(device):
        torch.cuda.synchronize()


def free_memory(device):
    if on_gpu(device):
        gc.collect()
        torch.cuda.empty_cache()


def seconds_of(function, device, repeats=5):
    """The median over some calls, after one that warms up."""
    seconds = []
    for _ in range(repeats + 1):
        synchronise(device)
        begin = time.perf_counter()
        function()
        synchronise(device)
        seconds.append(time.perf_counter() - begin)
    return statistics.median(seconds[1:])


def copy_bandwidth(setup):
    """Bytes per second of a copy within the device's memory, which reads and writes."""
    source = torch.zeros(setup.copy_bytes, dtype=torch.uint8, device=setup.device)
    target = torch.empty_like(source)
    return 2 * setup.copy_bytes / seconds_of(lambda: target.copy_(source), setup.device)


def matmul_peak(setup):
    """Floating point operations per second of a large product in bf16."""
    n = setup.matmul_size
    square = torch.randn(n, n, device=setup.device, dtype=torch.bfloat16)
    return 2 * n**3 / seconds_of(lambda: square @ square, setup.device)


def report_plan(report, name, config, flags, wanted):
    """What runs/plan.py says of the wanted parts, as far as it has them, for one GPU and these flags."""
    try:
        from runs.plan import plan
        result = plan(config, ppo.parse_arguments(flags), 1)
        groups = [result] if isinstance(result, dict) else vars(result).values()
    except (Exception, SystemExit) as error:  # another interface than this file knows
        raise Skipped(f"runs/plan.py: {type(error).__name__}: {error}") from None
    parts = {}
    for group in groups:
        if isinstance(group, dict):
            parts |= group
    found = [part for part in wanted if part in parts]
    report.figure(f"{name}: runs/plan.py, {' + '.join(found)}", float(sum(parts[part] for part in found)), "GiB")


# -------------------------------------------------------------------------------------------------
# Rows by the engine

class StubSandbox:
    """Every snippet prints the same number."""

    async def run(self, code, seed=0):
        return SandboxResult("ok", "12345\n")


def prompts_of(tokenizer, n):
    """Embedded problems, of many lengths."""
    questions = [embedded_problem("test", 0, index).question for index in range(n)]
    return [encode_prompt(tokenizer, "{question}", question) for question in questions]


def sample_rows(setup, model, tokenizer, rows=None, **options):
    """One response of the engine to each prompt."""
    prompts = prompts_of(tokenizer, rows or setup.rows)
    return asyncio.run(generate(
        model, tokenizer, prompts, StubSandbox(), max_response_tokens=setup.response_tokens, **options))


def call_once(tokenizer):
    """A logits_processor that makes every other row write a snippet, so that it resumes with many tokens."""
    snippet = encode_text(tokenizer, "<code>1</code>")

    def processor(logits, trajectories):
        logits = logits.clone()
        for row, trajectory in zip(logits, trajectories):
            position = len(trajectory.response_ids) - 4
            if trajectory.prompt_index % 2 == 0 and 0 <= position < len(snippet):
                row[:] = -torch.inf
                row[snippet[position]] = 0.0
        return logits
    return processor


def without_calls(trajectory):
    """The loss mask without the snippets, which were forced: their log-probability by the sampler is 0."""
    mask = list(trajectory.loss_mask)
    for call in trajectory.tool_calls:
        mask[call.start:call.end] = [0] * (call.end - call.start)
    return mask


def follow(trajectories, logprobs):
    """A logits_processor that repeats finished rows, and notes the log-probability of each of their tokens
    in `logprobs`, under (prompt index, position)."""
    def processor(logits, rows):
        all_logprobs = torch.log_softmax(logits, -1)  # (N, V)
        forced = torch.full_like(logits, -torch.inf)
        for i, row in enumerate(rows):
            position = len(row.response_ids)
            token = trajectories[row.prompt_index].response_ids[position]
            logprobs[row.prompt_index, position] = all_logprobs[i, token].item()
            forced[i, token] = 0.0
        return forced
    return processor


def equal_before_difference(ours, theirs):
    """(how many first tokens of some rows are equal, how many there are)."""
    n_equal = 0
    n_tokens = 0
    for mine, yours in zip(ours, theirs):
        n_tokens += len(mine)
        for token, other in zip(mine, yours):
            if token != other:
                break
            n_equal += 1
    return n_equal, n_tokens


# -------------------------------------------------------------------------------------------------
# The checks

def check_device(setup, report):
    """What is this machine?"""
    report.figure("torch", torch.__version__)
    report.figure("transformers", importlib.metadata.version("transformers"))
    if rollout.flash_attn_varlen_func:
        report.figure("flash_attn", importlib.metadata.version("flash_attn"))
    else:
        report.figure("flash_attn", "not installed")
    if not on_gpu(setup.device):
        report.figure("device", "cpu")
        return

    properties = torch.cuda.get_device_properties(setup.device)
    report.figure("device", properties.name)
    report.figure("memory", properties.total_memory / 2**30, "GiB")
    report.figure("free memory", torch.cuda.mem_get_info(setup.device)[0] / 2**30, "GiB")
    report.figure("compute capability", f"{properties.major}.{properties.minor}")
    report.figure("multiprocessors", properties.multi_processor_count)
    report.figure("GPUs visible", torch.cuda.device_count())
    report.figure("driver", driver_version())
    report.figure("CUDA of torch", str(torch.version.cuda))
    report.figure("cuDNN", str(torch.backends.cudnn.version()))
    report.figure("bf16, not emulated", torch.cuda.is_bf16_supported(including_emulation=False))
    report.figure("SDPA by cuDNN allowed", torch.backends.cuda.cudnn_sdp_enabled())
    report.figure("copy bandwidth", copy_bandwidth(setup) / 1e9, "GB/s")
    report.figure("bf16 product", matmul_peak(setup) / 1e12, "TFLOP/s")


def driver_version():
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout
    except (OSError, subprocess.SubprocessError) as error:
        return f"unknown ({type(error).__name__})"
    return answer.split("\n")[0]


@torch.no_grad()
def check_greedy(setup, report):
    """Does the engine choose the tokens that Hugging Face's `generate` chooses?"""
    tokenizer = embedded_tokenizer()
    config = small_config(setup, setup.head_dims[-1], tokenizer)
    for dtype in ("fp32", "bf16"):
        model = random_model(config, dtype, setup.device)
        # Half the rows: `generate` takes them one by one, so that nothing is padded.
        trajectories = sample_rows(
            setup, model, tokenizer, rows=setup.rows // 2, temperature=0.0, tools=False)
        ours = [trajectory.response_ids for trajectory in trajectories]

        model.set_attn_implementation("sdpa")
        theirs = []
        gaps = []
        for trajectory in trajectories:
            prompt = torch.tensor([trajectory.prompt_ids], device=setup.device)  # (1, prompt)
            response = model.generate(
                prompt, attention_mask=torch.ones_like(prompt), do_sample=False,
                max_new_tokens=setup.response_tokens)
            theirs.append(response[0, prompt.shape[1]:].tolist())

            # Its log-probabilities of the engine's tokens.
            whole = torch.tensor([trajectory.prompt_ids + trajectory.response_ids], device=setup.device)
            logits = model(input_ids=whole, use_cache=False).logits[0, prompt.shape[1] - 1:-1]
            logprobs = torch.log_softmax(logits.float(), -1)  # (response, V)
            chosen = logprobs.gather(-1, whole[0, prompt.shape[1]:, None])[:, 0]
            gaps.append((chosen.cpu() - torch.tensor(trajectory.logprobs)).abs())

        n_equal, n_tokens = equal_before_difference(ours, theirs)
        gap = torch.cat(gaps)
        allowed = mean_tolerance(trajectories, dtype, config)
        report.figure(f"{dtype}: tokens", n_tokens)
        report.figure(f"{dtype}: equal before the first difference", n_equal / n_tokens)
        report_gap(report, f"{dtype}: engine against generate", gap, allowed)
        if dtype == "fp32":
            report.require(ours == theirs, "fp32: greedy tokens are not those of generate")


def mean_tolerance(trajectories, dtype, config):
    """`ppo.tolerance` of the tokens that these rows sampled."""
    logprobs = torch.cat([torch.tensor(trajectory.logprobs) for trajectory in trajectories])
    mask = torch.cat([torch.tensor(without_calls(trajectory)) for trajectory in trajectories])
    error = ppo.logit_error(dtype, config.num_hidden_layers)
    return ppo.tolerance(logprobs, mask, error).item()


def report_gap(report, name, gap, allowed):
    """gap: |log-probability difference| of each token. Fails where the mean, or one token, is no rounding."""
    report.figure(f"{name}: mean difference of log-probabilities", gap.mean().item())
    report.figure(f"{name}: largest", gap.max().item())
    report.figure(f"{name}: allowed mean (ppo.tolerance)", allowed)
    report.require(gap.mean().item() < allowed, f"{name}: log-probabilities differ")
    # A healthy largest one is about the allowed mean: see a few wrong rows among many.
    report.require(gap.max().item() < 5 * allowed, f"{name}: a log-probability differs")


def check_trainer(setup, report):
    """Does the trainer find the sampler's tokens as likely as the sampler did? Is its gradient right?"""
    tokenizer = embedded_tokenizer()
    for dim in setup.head_dims:
        config = small_config(setup, dim, tokenizer)
        gradients = {}
        weights_of = None
        for dtype in ("bf16", "fp32"):
            model = random_model(config, dtype, setup.device, weights_of)
            name = f"{dtype}, head dim {dim}"
            if dtype == "bf16":
                weights_of = model
                trajectories = sample_rows(setup, model, tokenizer, logits_processor=call_once(tokenizer))
                n_calls = sum(len(trajectory.tool_calls) for trajectory in trajectories)
                report.figure(f"{name}: rows that resumed", n_calls)
                report.require(n_calls > 0, f"{name}: no row called its tool")
                for trajectory in trajectories:
                    trajectory.loss_mask = without_calls(trajectory)
                examples = [ppo.trajectory_example(trajectory, [0.0] * len(trajectory.loss_mask))
                            for trajectory in trajectories]

            # The trainer's side, on all rows in one stream.
            flat, packing = sft.collate(examples, setup.device)
            logprobs, _ = sft.Policy(model)(flat.input_ids, flat.targets, flat.loss_mask, packing)
            (-logprobs.sum() / flat.loss_mask.sum()).backward()
            # Without biases: that of the keys has no gradient but rounding.
            gradients[dtype] = [p.grad.float().flatten() for p in model.parameters() if p.ndim == 2]
            if dtype == "bf16":
                logprobs = logprobs.detach()
                gap = (logprobs - flat.sampler_logprobs).abs()[flat.loss_mask.bool()]
                error = ppo.logit_error(dtype, config.num_hidden_layers)
                allowed = ppo.tolerance(logprobs, flat.loss_mask, error).item()
                report_gap(report, f"{name}: sampler against trainer", gap, allowed)

        # Of the same weights and tokens: rounding turns a gradient a little, a wrong kernel turns it away.
        cosines = []
        for ours, exact in zip(gradients["bf16"], gradients["fp32"]):
            cosines.append(torch.cosine_similarity(ours, exact, dim=0).item())
        name = f"head dim {dim}: cosine of a matrix's gradients in bf16 and fp32"
        report.figure(f"{name}, mean", statistics.mean(cosines))
        report.figure(f"{name}, smallest", min(cosines))
        is_close = all(cosine > 0.95 for cosine in cosines)  # nan is not
        report.require(is_close, f"head dim {dim}: a gradient in bf16 is not that in fp32")


@torch.no_grad()
def check_varlen(setup, report):
    """Does the sampler's varlen kernel compute what SDPA does?"""
    if not hasattr(rollout, "uses_varlen"):
        raise Skipped("no varlen path: rollout.py has no uses_varlen")
    if not rollout.uses_varlen(setup.device, torch.bfloat16):
        raise Skipped("no varlen path: uses_varlen says no for this device in bf16")
    tokenizer = embedded_tokenizer()
    for dim in setup.head_dims:
        name = f"head dim {dim}"
        model = random_model(small_config(setup, dim, tokenizer), "bf16", setup.device)
        processor = call_once(tokenizer)
        greedy = {}
        for path in (True, False):
            with varlen_forced(path):
                greedy[path] = sample_rows(
                    setup, model, tokenizer, temperature=0.0, logits_processor=processor)
        n_equal, n_tokens = equal_before_difference(
            [trajectory.response_ids for trajectory in greedy[True]],
            [trajectory.response_ids for trajectory in greedy[False]])
        report.figure(f"{name}: greedy tokens", n_tokens)
        report.figure(f"{name}: equal before the first difference", n_equal / n_tokens)

        # Log-probabilities of the same tokens: by both paths, and by the same weights in fp32.
        rows = greedy[False]
        exact = random_model(model.config, "fp32", setup.device, weights_of=model)
        by_varlen = logprobs_of(setup, model, tokenizer, rows, varlen=True)
        by_sdpa = logprobs_of(setup, model, tokenizer, rows, varlen=False)
        by_fp32 = logprobs_of(setup, exact, tokenizer, rows, varlen=False)
        report_gap(report, f"{name}: varlen against SDPA", (by_varlen - by_sdpa).abs(),
                   mean_tolerance(rows, "bf16", model.config))
        n_other = (by_varlen != by_sdpa).sum().item()
        report.figure(f"{name}: log-probabilities that differ at all", n_other)
        report.require(n_other > 0, f"{name}: both paths computed the same bits: was the path switched?")
        varlen_error = (by_varlen - by_fp32).abs().mean().item()
        sdpa_error = (by_sdpa - by_fp32).abs().mean().item()
        report.figure(f"{name}: mean difference from fp32, varlen", varlen_error)
        report.figure(f"{name}: mean difference from fp32, SDPA", sdpa_error)
        report.require(varlen_error < 2 * sdpa_error + 1e-3,
                       f"{name}: varlen rounds more than twice as much as SDPA")


@contextlib.contextmanager
def varlen_forced(is_on):
    """`generate` with the varlen kernel, or without it."""
    decides = rollout.uses_varlen
    rollout.uses_varlen = lambda *_, **__: is_on
    try:
        yield
    finally:
        rollout.uses_varlen = decides


def logprobs_of(setup, model, tokenizer, rows, varlen):
    """Log-probabilities of the sampled tokens of finished rows, without their snippets, (tokens,)."""
    noted = {}
    with varlen_forced(varlen):
        sample_rows(setup, model, tokenizer, temperature=0.0, logits_processor=follow(rows, noted))
    logprobs = []
    for row in rows:
        for position, chosen in enumerate(without_calls(row)):
            if chosen:
                logprobs.append(noted[row.prompt_index, position])
    return torch.tensor(logprobs)


def check_run(setup, report):
    """Do the first steps of `python ppo.py` work?"""
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        command = [sys.executable, str(PPO_SCRIPT), *setup.run_flags, "--run_dir", str(run),
                   "--warm_start_dir", f"{folder}/warm_start"]
        if "device" in vars(ppo.parse_arguments([])):
            command += ["--device", setup.device.type]
        environment = dict(os.environ)
        if not on_gpu(setup.device):
            environment["CUDA_VISIBLE_DEVICES"] = ""
        log = Path(folder) / "log"
        begin = time.monotonic()
        with open(log, "w") as file:
            try:
                status = subprocess.run(
                    command, env=environment, stdout=file, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
                    timeout=report.deadline - begin - SECONDS_TO_END).returncode
            except subprocess.TimeoutExpired:
                status = "none, it was still running"
        report.figure("exit status", status)
        report.figure("whole run", time.monotonic() - begin, "s")

        # What it says of itself.
        steps = []
        if (run / "metrics.jsonl").exists():
            for line in (run / "metrics.jsonl").read_text().splitlines():
                metrics = json.loads(line)
                if "step" in metrics:
                    steps.append(metrics)
        if (run / "arguments.json").exists():
            device = json.loads((run / "arguments.json").read_text())["device"]
            report.figure("its device", device)
            report.require(device.startswith(setup.device.type), f"ppo.py ran on {device}")
        for metrics in steps:
            seconds = sum(value for name, value in metrics.items() if name.startswith("seconds_"))
            report.figure(f"step {metrics['step']}", seconds, "s")
            report.figure(f"step {metrics['step']}: sampler_difference", metrics["sampler_difference"])
        if status != 0:
            report.content["log"] = tail(log.read_text(errors="replace"))
        report.require(status == 0, f"exit status of ppo.py: {status}")
        wanted = int(setup.run_flags[setup.run_flags.index("--steps") + 1])
        report.require(len(steps) == wanted, f"{len(steps)} of {wanted} steps were done")


def check_decode(setup, report, shape, beside_generate):
    """How long does the sampler take for one token per row, and how long would reading its data take?"""
    config = Qwen2Config(**setup.shapes[shape])
    with torch.device("meta"):
        n_parameters = sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())
    needed = 2 * n_parameters + setup.spare_bytes
    free = free_bytes(setup.device)
    if needed > free:
        raise Skipped(f"memory: {needed / 2**30:.1f} GiB needed, {free / 2**30:.1f} free")
    model = random_model(config, "bf16", setup.device)
    report.figure("parameters", n_parameters / 1e9, "billion")
    bandwidth = copy_bandwidth(setup)
    report.figure("copy bandwidth", bandwidth / 1e9, "GB/s")

    # A tick reads every weight but the table of embeddings, of which it reads some rows; a tied table is the
    # head, too.
    weight_bytes = 2 * n_parameters
    if not config.tie_word_embeddings:
        weight_bytes -= 2 * config.vocab_size * config.hidden_size
    token_bytes = 2 * 2 * config.num_hidden_layers * config.num_key_value_heads * head_dim(config)
    context = setup.prompt_tokens + setup.decode_ticks // 2

    for rows in setup.decode_rows:
        name = f"batch {rows}"
        with report.part(setup, name):
            report.need_time(setup.part_seconds)
            if on_gpu(setup.device):
                torch.cuda.reset_peak_memory_stats()
            tick = engine_tick(setup, model, rows)
            if on_gpu(setup.device):
                peak = torch.cuda.max_memory_allocated() / 2**30
            reading = (weight_bytes + rows * context * token_bytes) / bandwidth
            report.figure(f"{name}: tick", 1e3 * tick, "ms")
            report.figure(f"{name}: reading weights and keys", 1e3 * reading, "ms")
            report.figure(f"{name}: tick / reading", tick / reading)
            if beside_generate:
                token = generate_token(setup, model, rows)
                report.figure(f"{name}: generate, per token", 1e3 * token, "ms")
                report.figure(f"{name}: generate / tick", token / tick)
            if not on_gpu(setup.device):
                raise Skipped("peak memory needs CUDA")
            report.figure(f"{name}: peak memory of the sampler", peak, "GiB")
            flags = ["--dtype", "bf16", "--n_slots", str(rows), "--max_prompt_tokens",
                     str(setup.prompt_tokens), "--max_response_tokens", str(setup.decode_ticks)]
            report_plan(report, name, config, flags, ["sampler", "KV cache", "prefill", "sampling"])


def engine_tick(setup, model, rows):
    """Seconds of one tick of the engine with so many decoding rows, at temperature 1 as in training."""
    begins = []

    def on_tick(engine, admitted):
        if not admitted and len(engine.active) == rows:
            begins.append(time.perf_counter())

    model.set_attn_implementation("retool")
    asyncio.run(generate(
        model, embedded_tokenizer(), [random_tokens(setup, model)], None, tools=False, n_samples=rows,
        n_slots=rows, max_response_tokens=setup.decode_ticks, on_tick=on_tick))
    return median_step(begins)


@torch.no_grad()
def generate_token(setup, model, rows):
    """The same of Hugging Face's `generate`."""
    begins = []

    def on_token(input_ids, scores, **kwargs):
        begins.append(time.perf_counter())
        return torch.zeros(rows, dtype=torch.bool, device=setup.device)

    model.set_attn_implementation("sdpa")
    ids = torch.tensor([random_tokens(setup, model)] * rows, device=setup.device)  # (rows, prompt)
    model.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=True, top_k=0, top_p=1.0, pad_token_id=0,
        max_new_tokens=setup.decode_ticks, stopping_criteria=[on_token])
    return median_step(begins)


def random_tokens(setup, model):
    draw = random.Random(0)
    return [draw.randrange(3, model.config.vocab_size) for _ in range(setup.prompt_tokens)]


def median_step(times):
    steps = [after - before for before, after in zip(times, times[1:])]
    if not steps:
        raise Skipped("memory: the cache never held all rows at once")
    return statistics.median(steps)


def check_training(setup, report):
    """How fast is a training step of the 0.5B shape, and what memory does it take?"""
    config = Qwen2Config(**setup.shapes["0.5B"])
    lengths = setup.train_lengths
    n_tokens = sum(lengths)
    peak = matmul_peak(setup)
    report.figure("bf16 product", peak / 1e12, "TFLOP/s")
    report.figure("tokens per step", n_tokens)
    report.figure("sequences per step", len(lengths))
    draw = random.Random(0)
    examples = []
    for length in lengths:
        ids = [draw.randrange(config.vocab_size) for _ in range(length + 1)]
        examples.append(sft.make_example(ids, [1] * (length + 1)))
    flat, packing = sft.collate(examples, setup.device)

    for is_on in (False, True):
        name = f"activation checkpointing {'on' if is_on else 'off'}"
        with report.part(setup, name):
            report.need_time(setup.part_seconds)
            measure_training(setup, report, name, config, flat, packing, peak, is_on)


def measure_training(setup, report, name, config, flat, packing, peak, checkpointing):
    model = random_model(config, "bf16", setup.device)
    if checkpointing:  # as `sft.shard` does
        for layer in model.model.layers:
            layer.training = True
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    policy = sft.Policy(model)
    n_tokens = len(flat)

    def step():
        logprobs, _ = policy(flat.input_ids, flat.targets, flat.loss_mask, packing)
        (-logprobs.sum() / n_tokens).backward()

    # What the mathematics needs, forward and backward; nothing that is computed twice counts. Two operations
    # per weight and token, and two products per pair of tokens that see each other; backward twice that.
    n_weights = sum(p.numel() for p in model.parameters())
    if not config.tie_word_embeddings:
        n_weights -= config.vocab_size * config.hidden_size
    all_heads = config.num_hidden_layers * config.num_attention_heads * head_dim(config)
    n_pairs = sum(length**2 for length in packing.lengths) / 2
    operations = 6 * n_weights * n_tokens + 12 * all_heads * n_pairs

    seconds = seconds_of(step, setup.device, repeats=3)
    report.figure(f"{name}: step", 1e3 * seconds, "ms")
    report.figure(f"{name}: tokens per second", n_tokens / seconds, "1/s")
    report.figure(f"{name}: share of the bf16 product's speed", operations / seconds / peak)

    if not on_gpu(setup.device):
        raise Skipped("peak memory needs CUDA")
    # Weights and gradients are there before and after: the rest is what runs/plan.py calls activations.
    synchronise(setup.device)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step()
    synchronise(setup.device)
    highest = torch.cuda.max_memory_allocated()
    report.figure(f"{name}: peak memory", highest / 2**30, "GiB")
    report.figure(f"{name}: of it beside weights and gradients", (highest - before) / 2**30, "GiB")
    flags = ["--dtype", "bf16", "--token_budget", str(n_tokens), "--max_prompt_tokens", "1",
             "--max_response_tokens", str(max(packing.lengths))]
    flags += ["--activation_checkpointing"] * checkpointing
    report_plan(report, name, config, flags, ["activations", "logits"])


@dataclass
class Check:
    """A check and the seconds that are kept for it, its process's start included."""
    name: str
    function: object  # (Setup, Report)
    seconds: float


# The most informative first. Their seconds and this process's own imports are eight minutes.
CHECKS = [
    Check("device", check_device, 30),
    Check("greedy", check_greedy, 60),
    Check("trainer", check_trainer, 45),
    Check("varlen", check_varlen, 60),
    Check("run", check_run, 110),
    Check("decode 0.5B", functools.partial(check_decode, shape="0.5B", beside_generate=True), 60),
    Check("training 0.5B", check_training, 50),
    Check("decode 7B", functools.partial(check_decode, shape="7B", beside_generate=False), 50),
]

# -------------------------------------------------------------------------------------------------
# One after the other, each in its own process


def tail(text, lines=25):
    return "\n".join(text.strip().splitlines()[-lines:])


def in_own_process(check, setup, limit):
    """The result of a check as a process of its own, which is ended after `limit` seconds."""
    begin = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "result.json"
        log = Path(folder) / "log"
        command = [sys.executable, __file__, "--device", setup.device.type, "--child", check.name,
                   "--result", str(path), "--limit", str(limit)]
        with open(log, "w") as file:
            process = subprocess.Popen(
                command, stdout=file, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
                start_new_session=True)
        reason = ""
        try:
            process.wait(limit)
            if process.returncode:
                reason = f"its process ended with exit status {process.returncode}"
        except subprocess.TimeoutExpired:
            reason = f"still running after {limit:.0f} s, its limit"
        finally:
            # With what it has started.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()

        if path.exists():
            result = json.loads(path.read_text())
        else:
            result = Report(check.name, setup.note, limit).content
        result["seconds"] = time.monotonic() - begin
        if reason:
            result |= {"status": "failed", "reason": reason}
            result.setdefault("log", tail(log.read_text(errors="replace")))
    return result


def in_this_process(check, setup, limit):
    report = Report(check.name, setup.note, limit)
    run_check(check, setup, report)
    return report.content


def run_all(checks, setup, total_seconds, run_one, begin, done):
    """Run the checks in turn, as far as their seconds fit: their results. done: f(results), after each."""
    results = []
    for i, check in enumerate(checks):
        left = begin + total_seconds - time.monotonic()
        later = sum(other.seconds for other in checks[i + 1:])
        if left < check.seconds:
            report = Report(check.name, setup.note, 0)
            report.end("skipped", "time")
            results.append(report.content)
        else:
            # What earlier ones have left over is this one's, too.
            results.append(run_one(check, setup, max(check.seconds, left - later)))
        result = results[-1]
        print(f"{result['check']}: {result['status']} {result['reason']} ({result['seconds']:.0f} s)",
              file=sys.stderr, flush=True)
        done(results)
    return results


def cell(value):
    """A value as the table shows it."""
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return text.replace("|", "/").replace("\n", " ")


def table(record):
    """The record as markdown: a line per check, and one per figure."""
    rows = []
    for check in record["checks"]:
        rows.append([check["check"], check["status"], cell(check["reason"]), cell(check["seconds"]), "s", ""])
        for figure in check["figures"]:
            rows.append(["", "", cell(figure["name"]), cell(figure["value"]), figure["unit"], figure["note"]])
    return evaluation.markdown(["check", "status", "figure or reason", "value", "unit", "note"], rows)


def write(folder, record):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "check_gpu.json").write_text(json.dumps(record, indent=1) + "\n")
    (folder / "check_gpu.md").write_text(table(record) + "\n")


def parse_arguments(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [check.name for check in CHECKS]
    add = parser.add_argument
    add("folder", nargs="?", default="out/check_gpu", help="where the two files go")
    add("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: tiny models, logic only")
    add("--seconds", type=float, default=480.0, help="for all checks together")
    add("--checks", nargs="+", choices=names, default=names, metavar="NAME", help=f"of {', '.join(names)}")
    # How this file starts itself.
    for flag in ("--child", "--result", "--limit"):
        add(flag, default="", help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def run_child(args, setup):
    """One check, in the process that `in_own_process` has started."""
    [check] = [check for check in CHECKS if check.name == args.child]
    report = Report(check.name, setup.note, float(args.limit), Path(args.result))
    report.deadline = BEGIN + float(args.limit)  # the imports count
    with contextlib.ExitStack() as stack:
        # What the scripts set up for CUDA holds here, too. `check_run` starts a script, which may want the card
        # for itself.
        if on_gpu(setup.device) and check.function is not check_run:
            process = stack.enter_context(evaluation.distributed())
            evaluation.use_device(process, "cuda", may_use_cpu=False)
            setup.device = process.device
        run_check(check, setup, report)


def main(argv=None, run_one=in_own_process):
    args = parse_arguments(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        print("error: no CUDA device is there (--device cpu: the same logic, tiny)", file=sys.stderr)
        return 2
    setup = make_setup(args.device)
    if args.child:
        run_child(args, setup)
        return 0

    # Called by another program, the clock starts now.
    begin = BEGIN if argv is None else time.monotonic()
    folder = Path(args.folder)
    record = {"device": args.device, "note": setup.note, "commit": ppo.commit(), "versions": sft.versions(),
              "limit": args.seconds}

    def save(results):
        record["seconds"] = time.monotonic() - begin
        record["checks"] = results
        write(folder, record)

    checks = [check for check in CHECKS if check.name in args.checks]
    results = run_all(checks, setup, args.seconds, run_one, begin, save)
    print(table(record))
    print(f"\n{folder}/check_gpu.json has the same")
    return int(any(result["status"] == "failed" for result in results))


if __name__ == "__main__":
    sys.exit(main())
