"""Run model-written Python, confined: a prepared process forks once per snippet.

    async with Sandbox(workers=2, timeout=1.0) as sandbox:
        result = await sandbox.run("print(1 + 1)", seed=0)     # status "ok", output "2\\n"

Importing numpy and sympy costs as much as a hundred forks. So one process, the "zygote",
imports them once. It shares a socketpair with the trainer:
    trainer -> zygote   request id, seed, time limit, and two files: the code, an empty output
    zygote  -> trainer  request id, exit code, whether it timed out, wall and own seconds
The zygote keeps queue, deadlines and exit codes. So a trainer blocked by a GPU step falsifies no
time limit, and nothing that a snippet prints can pass for its status.

The adversary is a policy that is paid for answers and may know this file. Mandatory on Linux:
    seccomp     harmless system calls only: no process, program, socket, lock, shared memory,
                signal to others, or change of a file
    Landlock    no file but the interpreter's libraries, to read, and /dev/null
    rlimits     on memory, output, descriptors; no capability; an environment of constants
Sandbox() does not start where one is missing, nor where its self-test finds an attack that works,
unless unsafe=True (--unsafe_sandbox).

`timeout` limits a snippet's *own* time: the CPU seconds of its threads, or the wall time of its
main thread less what that waited for a core, whichever is more. So other load pushes nothing over
it, but work in another thread that the main one waits for. WALL_FACTOR * `timeout` of wall time
ends all.

Covered too: floods of output, memory and threads, state passed between snippets, a killed or
frozen zygote, a killed trainer. The same code and seed give the same text (clocks, os.urandom,
addresses, process, thread and user ids, inodes aside).

NOT covered: holes in the kernel; timing and cache channels; stat(), which Landlock leaves open;
ids that the kernel counts up (of processes, threads, inodes), which tell how many others there
were; the names of the host and of the interpreter's folders; threads that a snippet starts in
10 ms, where the report says "NOT bound on threads".
macOS (Python 3.13 or later) and --unsafe_sandbox: accidents only.

    python sandbox.py                     # does it start here?
    python tests/bench_sandbox.py         # speed against a fresh interpreter per snippet
    python tests/test_sandbox.py 10000    # soak with hostile snippets
"""
import argparse
import ast
import asyncio
import atexit
import collections
import contextlib
import ctypes
import dataclasses
import errno
import functools
import gc
import importlib.util
import io
import itertools
import json
import linecache
import logging
import math
import os
import pathlib
import random
import resource
import select
import signal
import site
import socket
import struct
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
import traceback
import types
import warnings

LINUX = sys.platform == "linux"

# Of a snippet.
SNIPPET = "snippet.py"
OWN_SOURCES = set()  # names under which the snippet and earlier ones are compiled
OUTPUT_BYTES = 1 << 20  # a snippet that prints this much is stopped
MEMORY_RESERVE = 64 << 20  # bytes beyond memory_mb, to report a MemoryError
STACK_BYTES = 2 << 20  # CPython's time to overflow it with repr() grows with its square
MAX_FRAMES = 6
MAX_THREADS = 128  # of a snippet, its main one included; each takes STACK_BYTES of memory_mb
WALL_FACTOR = 10
JUDGE_SECONDS = 1.0
ENVIRONMENT = dict(
    PATH=os.defpath,
    HOME="/",
    LANG="C.UTF-8",
    TZ="UTC",
    PYTHONHASHSEED="0",
    OMP_NUM_THREADS="1",
    OPENBLAS_NUM_THREADS="1",
    MKL_NUM_THREADS="1",
    MALLOC_ARENA_MAX="1",  # else each thread takes 64 MiB of address space for its malloc
)

# Of the zygote.
MAX_IN_FLIGHT = 128  # requests inside it: 2 descriptors each, well below 1024
MAX_DEATHS = 10
LOOK_SECONDS = 0.1  # between looks at a snippet
FORK_SECONDS = 0.1  # until a fork that failed is tried again
FIRST_USER = 0x7F000000  # users from here on are nobody on a host, nor in a container
FROZEN_SECONDS = 30.0  # one silent this long past a time limit is replaced

# Its messages. A time limit of 0 cancels.
REQUEST = struct.Struct("=Qqd")
REPLY = struct.Struct("=Qi?dd")


INTERRUPTED = 130  # exit status


def end_at_interrupt():
    """From here on Ctrl-C ends the process at once, with one line."""
    def handler(signal_number, frame):
        if os.environ.get("RANK", "0") == "0":
            os.write(2, b"\ninterrupted\n")
        os._exit(INTERRUPTED)

    signal.signal(signal.SIGINT, handler)


class UserError(Exception):
    """What the user or the machine has to change: scripts print its one line and fail."""


@dataclasses.dataclass
class SandboxResult:
    """What one snippet did. sandbox_error is our own fault: drop the rollout."""
    status: str  # ok, error, timeout, output_limit, killed, sandbox_error; of a Service: busy
    output: str  # for the model: at most output_chars characters, plus notices in brackets
    seconds: float = 0.0  # of wall time from fork to exit


# --------------------------------------------------------------------------------------------
# The trainer's side


@dataclasses.dataclass(eq=False)
class Sandbox:
    """A pool of snippets, for one event loop.

    report: one line on layers and self-test. counts: results by status, and "near_limit", those
    that took over half of their time limit: they may differ in another run.
    """
    workers: int = 2  # snippets that run at a time
    timeout: float = 1.0  # seconds of a snippet's own time
    memory_mb: int = 512  # of address space beyond the zygote's
    output_chars: int = 2000  # kept of an output, half from its head; tokens are limited besides
    unsafe: bool = False  # start, with a warning, although the self-test fails
    math_verify: bool = False  # import what `equal` needs

    def __post_init__(self):
        assert self.workers >= 1 and self.timeout > 0
        assert self.memory_mb > 0 and self.output_chars >= 0
        self.process = None  # the zygote
        self.socket = None  # to the zygote
        self.deaths = 0  # since the last reply
        self.ids = itertools.count()
        self.futures = {}  # request id -> future of the reply
        self.slots = asyncio.Semaphore(max(MAX_IN_FLIGHT, 2 * self.workers))
        self.judge = None  # the pool of `equal`
        self.judge_lock = asyncio.Lock()
        self.counts = collections.Counter(near_limit=0)
        self.closed = True

    async def __aenter__(self):
        self.loop = asyncio.get_running_loop()
        self.closed = False
        self.layers_file = anonymous_file()  # the zygote's stdout: its layers
        try:
            self.report = await self._self_test()
        except BaseException:  # a cancellation too must not leave a process
            await self.__aexit__()
            raise

        if (self.unsafe or not LINUX) and not self.math_verify:
            flag = "--unsafe_sandbox" if self.unsafe else "development only, not isolation"
            print(f"WARNING: {flag}: {self.report}", file=sys.stderr, flush=True)
        return self

    async def __aexit__(self, *exc_info):
        self.closed = True
        if self.judge:
            await self.judge.__aexit__()
        self._stop(grace=5.0)
        self.layers_file.close()

    async def run(self, code, seed=0):
        """The SandboxResult of `code`; `seed` (64-bit, signed) is for random, numpy and sympy.
        `code` may be a list: all but the last run before it, unseen, as `replay` says.
        Cancelling the task kills the snippet. RuntimeError outside `async with`."""
        async with self.slots:
            # An error of our own is retried once. A snippet that never ran is sent again.
            failures = 0
            while failures < 2:
                result = await self._attempt(code, seed, self.timeout, self.output_chars)
                if result.status == "sandbox_error":
                    failures += 1
                elif result.status != "never ran":
                    break
            self.counts[result.status] += 1
            return result

    async def equal(self, predicted, reference):
        """Whether math-verify takes two LaTeX expressions for equal within JUDGE_SECONDS. It can
        be made to hang, so it runs as a snippet. UserError if it does not run."""
        async with self.judge_lock:
            self._check_open()
            if self.judge is None:
                judge = Sandbox(self.workers, JUDGE_SECONDS, unsafe=self.unsafe, math_verify=True)
                self.judge = await judge.__aenter__()
        result = await self.judge.run(f"texts = {[predicted, reference]!r}\n{JUDGE}")
        if result.status == "sandbox_error":
            raise UserError(f"math-verify does not run: {result.output}")
        return result.status == "ok" and result.output == "True\n"

    def _check_open(self):
        if self.closed:
            raise RuntimeError("the sandbox is closed: use it inside `async with`")

    async def _attempt(self, code, seed=0, timeout=10.0, output_chars=10_000):
        """Run `code` once. If the zygote dies: status "sandbox_error", or "never ran" for a
        snippet that waited for a worker."""
        self._check_open()
        if self.deaths >= MAX_DEATHS:
            raise UserError(
                f"the sandbox died {self.deaths} times without finishing a snippet in between")
        if self.socket is None:
            self._start()
        if not self.futures:
            self.heard_at = self.loop.time()  # an idle zygote owes nobody a sign of life

        # Code and output are files in memory, whose descriptors go to the zygote.
        request_id = next(self.ids)
        future = self.loop.create_future()
        patience = WALL_FACTOR * timeout + FROZEN_SECONDS
        snippets = [code] if isinstance(code, str) else code
        source = json.dumps(snippets).encode()
        with anonymous_file(source) as source_file, anonymous_file() as output_file:
            self.futures[request_id] = future
            try:
                fds = [source_file.fileno(), output_file.fileno()]
                self._send(request_id, seed, timeout, fds)

                # Some snippet ends every WALL_FACTOR * timeout seconds: a silent zygote hangs.
                # Replies are read before timers run: our lateness does not count.
                while not future.done():
                    await asyncio.wait([future], timeout=patience)
                    if not future.done() and self.loop.time() - self.heard_at > patience:
                        self._stop(grace=0)
            finally:
                del self.futures[request_id]
                if not future.done():  # this task was cancelled
                    self._send(request_id, 0, 0.0, [])
            raw = os.pread(output_file.fileno(), OUTPUT_BYTES, 0)

        # What came back, as text.
        try:
            exit_code, timed_out, seconds, own_seconds = future.result()
        except ZygoteDied as death:
            return SandboxResult(str(death), f"[sandbox error: the zygote died] {raw[-2000:]!r}")
        if own_seconds > timeout / 2 and not timed_out:
            self.counts["near_limit"] += 1
        status, text = status_and_text(raw, exit_code, timed_out, timeout, output_chars)
        return SandboxResult(status, text, seconds)

    def _start(self):
        """Start a zygote. Requests may be sent at once: the socket holds them."""
        # Message boundaries keep descriptors with their request; on macOS fixed sizes do.
        socket_type = socket.SOCK_SEQPACKET if LINUX else socket.SOCK_STREAM
        ours, theirs = socket.socketpair(type=socket_type)
        for end in (ours, theirs):
            end.setblocking(False)
            end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)

        config = dataclasses.asdict(self)
        config.update(trainer_pid=os.getpid(), folders=library_folders(), path=sys.path)
        config_file = anonymous_file(json.dumps(config).encode())
        config_file.seek(0)
        # A snippet can read the command and the names of the files in stack traces. So this file
        # is the zygote's stdin, and its command has no path of ours.
        with theirs, config_file, open(__file__, "rb") as this_file:
            fds = [theirs.fileno(), config_file.fileno()]
            self.process = subprocess.Popen(
                # -s, not -I, which ignores PYTHONHASHSEED
                [sys.executable, "-s", "-", "--zygote", str(fds[0]), str(fds[1])],
                env=ENVIRONMENT,
                cwd="/",
                pass_fds=fds,
                stdin=this_file,
                stdout=self.layers_file,
            )
        self.socket = ours
        self.heard_at = self.loop.time()
        self.loop.add_reader(self.socket, self._on_readable)

    def _send(self, request_id, seed, timeout, fds):
        try:
            socket.send_fds(self.socket, [REQUEST.pack(request_id, seed, timeout)], fds)
        except OSError:  # it died, or is frozen
            self._stop(grace=0)

    def _on_readable(self):
        try:
            message = self.socket.recv(REPLY.size)
        except ConnectionError:  # it died with requests unread
            message = b""
        if not message:
            self._stop(grace=0)
            return

        # A snippet has ended: its task goes on.
        self.heard_at = self.loop.time()
        self.deaths = 0
        request_id, *reply = REPLY.unpack(message)
        if request_id in self.futures:  # else its task was cancelled
            self.futures[request_id].set_result(reply)

    def _stop(self, grace):
        """End the zygote: `grace` seconds to reap its snippets, then
        SIGKILL, which ends them too."""
        if self.socket is None:
            return
        self.loop.remove_reader(self.socket)
        self.socket.close()
        self.socket = None
        try:
            self.process.wait(grace)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.deaths += 1

        # Of what has no answer only the oldest requests, one per worker, may have begun.
        unanswered = [future for future in self.futures.values() if not future.done()]
        for position, future in enumerate(unanswered):
            status = "sandbox_error" if position < self.workers else "never ran"
            future.set_exception(ZygoteDied(status))
            future.exception()  # else asyncio logs what nobody reads

    async def _self_test(self):
        """Try each kind of attack and each limit. The one-line report, or UserError."""
        begin = time.monotonic()

        # One snippet tries all attacks, and prints those that worked.
        with tempfile.TemporaryDirectory() as folder:
            canary = pathlib.Path(folder, "canary")
            canary.write_text("canary")
            attacked = await self._attempt(
                f"canary = {str(canary)!r}\n"
                f"source = {os.path.abspath(__file__)!r}\n"
                f"attacks = {ATTACKS!r}\n{PROBE}")
            is_intact = os.listdir(folder) == ["canary"] and canary.read_text() == "canary"

        # A zygote that lacks a mandatory layer says so and ends.
        layers_text = os.pread(self.layers_file.fileno(), 1 << 16, 0)
        layers = json.loads(layers_text or b'{"missing": []}')
        missing = ", ".join(layers["missing"])
        if missing and not self.unsafe:
            raise UserError(
                f"the sandbox does not start: it lacks {missing} (see --unsafe_sandbox)")
        if attacked.status != "ok":
            raise UserError(f"the sandbox does not start: {attacked.output} (see stderr)")

        # Three more try the limits.
        loop, memory, output = await asyncio.gather(
            self._attempt("while True: pass", timeout=0.1),
            self._attempt("bytearray(1 << 40)"),
            self._attempt("print('x' * (1 << 22))"))

        lines = attacked.output.splitlines()
        possible = [name for name in ATTACKS if name in lines]
        if not is_intact:
            possible.append("leave a trace in a folder")
        if "end" not in lines:  # the last attack replaced the snippet
            possible.append("run a program")
        if loop.status != "timeout":
            possible.append("exceed the time limit")
        if "MemoryError" not in memory.output:
            possible.append("exceed the memory limit")
        if output.status != "output_limit":
            possible.append("exceed the output limit")
        if possible and LINUX and not self.unsafe:
            raise UserError(
                f"the sandbox does not start: its self-test could {', '.join(possible)}")

        parts = []
        if possible:
            parts.append(f"POSSIBLE: {', '.join(possible)}")
        else:
            parts.append(f"{len(ATTACKS)} attacks refused, limits hold "
                         f"(0.1 s fired at {loop.seconds:.3f} s)")
        if missing:
            parts.append(f"LACKS {missing}")
        parts.append(", ".join(layers["layers"]))
        parts.append(f"self-test {time.monotonic() - begin:.1f} s")
        return "sandbox: " + "; ".join(parts)


class ZygoteDied(Exception):
    """The zygote died before it answered. The text is the snippet's status."""


def status_and_text(raw, exit_code, timed_out, timeout, output_chars):
    """(status, text for the model) of a finished process. exit_code: minus the number of a signal.
    The text names no folder of the host."""
    text = raw.decode("utf-8", "replace")
    for folder in library_folders():
        text = text.replace(folder + "/", "")

    dropped = len(text) - output_chars
    if dropped > 0:
        half = output_chars // 2
        head = text[:half]
        tail = text[half + dropped:]
        text = f"{head}\n[... {dropped} characters dropped ...]\n{tail}"

    notice = ""
    if timed_out and exit_code == -signal.SIGKILL:
        status = "timeout"
        notice = f"[timed out after {timeout} s]"
    elif exit_code < 0:
        names = {number.value: number.name for number in signal.Signals}
        name = names.get(-exit_code, f"signal {-exit_code}")
        status = "killed"
        notice = f"[killed by {name}]"
    elif len(raw) >= OUTPUT_BYTES:
        status = "output_limit"
        notice = f"[output limit of {OUTPUT_BYTES} bytes reached]"
    elif exit_code == 0:
        status = "ok"
        if not text:
            notice = "[no output: use print(...) to see a result]"
    else:
        # 1: an exception or sys.exit, which the child described. Others: os._exit.
        status = "error"
        if exit_code != 1 or not text:
            notice = f"[exit code {exit_code}]"

    if notice and text and not text.endswith("\n"):
        text += "\n"
    return status, text + notice


@functools.cache
def library_folders():
    """Where this interpreter's modules and numpy lie; longest first. Not sys.path nor sys.prefix:
    they may name the repository."""
    folders = {f"{sys.base_prefix}/lib"}
    for name in ("stdlib", "platstdlib", "purelib", "platlib"):
        folders.add(sysconfig.get_path(name))
    folders.update(site.getsitepackages())
    folders.add(str(pathlib.Path(importlib.util.find_spec("numpy").origin).parents[1]))
    return sorted(folders, key=len, reverse=True)


def anonymous_file(content=b""):
    """An open file without a name that holds `content`."""
    if LINUX:
        file = open(os.memfd_create("snippet"), "w+b", buffering=0)
    else:
        file = tempfile.TemporaryFile(buffering=0)
    file.write(content)
    return file


# What a snippet must not be able to do. Each is harmless where it can.
ATTACKS = {
    "use a descriptor of the pool": "os.fstat(3)",
    "fork": "os.fork() or os._exit(0)",
    "open a socket": "socket.socket()",
    "signal the zygote": "os.kill(os.getppid(), 0)",
    "signal all processes": "os.kill(-1, 0)",
    "limit the zygote": "resource.prlimit(os.getppid(), resource.RLIMIT_CPU)",
    "read the zygote's environment": "open(f'/proc/{os.getppid()}/environ')",
    "read the trainer's code": "open(source)",
    "read a file": "open(canary)",
    "list a folder": "os.listdir(os.path.dirname(canary))",
    "write a file": "open(canary, 'a')",
    "create a file": "open(canary + '.new', 'w')",
    "change a file's mode": "os.chmod(canary, 0o600)",
    "change a file's times": "os.utime(canary)",
    "link a file": "os.link(canary, canary + '.link')",
    "delete a file": "os.unlink(canary)",
    "lock a file": "fcntl.flock(os.open(os.__file__, os.O_RDONLY), fcntl.LOCK_SH)",
    "hold memory in a file": "os.memfd_create('x')",
    "hold memory in a queue": "queue = native(libc.msgget(0, 0o600)); libc.msgctl(queue, 0, None)",
    "read a process's memory": "native(libc.process_vm_readv(os.getpid(), None, 0, None, 0, 0))",
    "enter a namespace": "native(libc.unshare(0x10000000))",
    "raise its limits": "resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY,) * 2)",
    "run a program": "os.execv('/bin/true', ['true'])",
}
PROBE = """
import ctypes, fcntl, os, resource, socket
libc = ctypes.CDLL(None, use_errno=True)

def native(result):
    if result < 0:
        raise OSError(ctypes.get_errno(), "refused")
    return result

for name, attack in attacks.items():
    try:
        exec(attack)
    except (OSError, ValueError):
        continue
    print(name)
print("end")
"""


# What `equal` runs, after patch_math_verify().
JUDGE = """
from latex2sympy2_extended.latex2sympy2 import ConversionConfig, latex2sympy
from math_verify import grader, verify

real = not any(map(grader.should_treat_as_complex, texts))
config = ConversionConfig(lowercase_symbols=False)
expressions = []
for text in texts:
    expressions.append(latex2sympy(
        text, is_real=real, conversion_config=config, normalization_config=None))
predicted, reference = expressions
print(verify(
    reference,
    predicted,
    numeric_precision=30,
    timeout_seconds=None,
    allow_set_relation_comp=True,
))
"""
# Read before the fork, these fill the parser's tables and sympy's caches.
WARM_UP = [
    r"-\frac{3x^{2}-1}{2}+\sqrt{5}\cdot{y}",
    r"2\sqrt[3]{\frac{\pi}{4}}(a_{1}+b)(x-1)!",
    r"x<5",
    r"x+y=2z^{-1}",
    r"3-2i",
    r"\frac{\ln{3}}{\log_{2}{x}}+\sin^{2}x-\cos(2x)|x|",
    r"e^{i\pi/3}+4i+\binom{n}{2}\alpha",
    r"\frac{2\pi}{3}",
    r"1+2\sqrt{3}",
    r"\frac{x}{2}",
    r"(x+1)(x-2)",
    r"(x+2)^{2}",
    r"2ab+c/2",
    r"[2,\infty)",
    r"x\ge2",
    r"2<x\le3",
    r"\log_{2}3",
]


# --------------------------------------------------------------------------------------------
# The zygote's side


@dataclasses.dataclass
class Job:
    """A snippet that runs."""
    pid: int
    timeout: float  # seconds of own time
    started_at: float  # time.monotonic() at the fork
    look_at: float  # time of the next look; infinite once killed
    timed_out: bool = False


def zygote_main(sock, config):
    """Import what snippets use, give up what they must not have, serve."""
    global LIBC, PROC, LOOK_SECONDS
    LIBC = ctypes.CDLL(None, use_errno=True)
    PROC = os.open("/proc", os.O_RDONLY) if LINUX else None
    os.setpgid(0, 0)  # Ctrl-C in the trainer's terminal must not reach it

    folders = tuple(folder + "/" for folder in config["folders"])
    sys.path[:] = [folder for folder in config.pop("path") if (folder + "/").startswith(folders)]
    prepare(config["math_verify"])
    config.update(zygote_pid=os.getpid(), limits=limits(config), own_user=False)
    report = give_up(config)
    if LINUX and not config["own_user"]:
        LOOK_SECONDS = 0.01  # nothing else bounds what a snippet starts
    os.pwrite(1, json.dumps(report).encode(), 0)
    if report["missing"] and not config["unsafe"]:
        return
    # Not before: entering a user namespace resets it.
    die_with_parent(config.pop("trainer_pid"))

    # A collection would un-share all pages; in snippets it may be rare.
    gc.disable()
    gc.set_threshold(10_000, 10, 10)
    gc.freeze()
    request = serve(sock, config)
    if request is not None:
        seed, code_fd, output_fd = request
        run_child(config, seed, code_fd, output_fd)  # never returns


def prepare(math_verify=False):
    """Imports and settings for all snippets."""
    global numpy, sympy  # not in the trainer
    import cmath  # noqa: F401

    import numpy
    import numpy.fft
    import numpy.linalg
    import numpy.random
    import sympy

    # Without these calls each snippet would pay for what numpy and sympy load lazily.
    numpy.linalg.solve(numpy.eye(64) @ numpy.eye(64), numpy.ones(64))
    x = sympy.Symbol("x")
    str([
        sympy.solve(sympy.sympify("x**2 - 2"), x),
        sympy.integrate(sympy.sin(x) ** 2, x),
        sympy.factorint(360),
        sympy.simplify((x ** 2 - 1) / (x - 1)),
        sympy.N(sympy.pi, 20),
    ])
    if math_verify:
        logging.disable()
        patch_math_verify()
        for text in WARM_UP:
            exec(JUDGE, {"texts": [text, text.replace("2", "7")]})

    sys.argv = [SNIPPET]
    sys.orig_argv = [SNIPPET]
    sys.dont_write_bytecode = True
    sys.set_int_max_str_digits(50_000)
    sys.setrecursionlimit(1000)
    threading.stack_size(STACK_BYTES)  # else the host's `ulimit -s`, of memory_mb
    # These name no path of the host.
    warnings.formatwarning = lambda text, category, *_: f"{category.__name__}: {text}\n"
    threading.excepthook = lambda args: print(describe(args.exc_value), end="", file=sys.stderr)


def patch_math_verify():
    """Take back two of math-verify's ways to say "equal": of two equations that it cannot solve,
    and of two numbers whose difference it evaluates. There, parts below 1e-30 become zero, inside
    products too: 1/10^40 would be equal to 99!/100!."""
    from math_verify import grader
    grader.sympy_solve_and_compare = lambda *_: False
    numeric_eq = grader.sympy_numeric_eq  # calls itself by its global name on matrices' elements

    def numeric_eq_side_by_side(gold, predicted, float_rounding, numeric_precision):
        if not numeric_eq(gold, predicted, float_rounding, numeric_precision):
            return False
        if not isinstance(gold, sympy.Expr) or not isinstance(predicted, sympy.Expr):
            return True

        # In x-1/10^40 the small number must not hide behind the value of x.
        symbols = sorted(gold.free_symbols | predicted.free_symbols, key=str)
        constant = gold.as_independent(*symbols, as_Add=True)[0]
        predicted_constant = predicted.as_independent(*symbols, as_Add=True)[0]
        if symbols and not has_same_value(constant, predicted_constant):
            return False
        values = {}
        for i, symbol in enumerate(symbols):
            values[symbol] = sympy.Rational(2 * i + 3, 7)  # any value will do
        return has_same_value(gold.subs(values), predicted.subs(values))

    grader.sympy_numeric_eq = numeric_eq_side_by_side


def has_same_value(left, right):
    """Whether two expressions without symbols, each evaluated by itself, are the same number."""
    left = left.evalf(30)  # digits
    right = right.evalf(30)
    if not (left.is_finite and right.is_finite):
        return bool(left == right)
    larger = max(abs(left), abs(right))
    return bool(abs(left - right) <= 1e-25 * larger)


def limits(config):
    """The rlimits of a snippet: {name: (soft, hard)}."""
    numbers = dict(
        CORE=1,  # 0 would still start the crash handler of a host
        FSIZE=OUTPUT_BYTES,
        MEMLOCK=0,
        STACK=STACK_BYTES,
        NOFILE=64,
        CPU=math.ceil(config["timeout"]) + WALL_FACTOR,  # the zygote's deadline comes first
    )
    if resource.getrlimit(resource.RLIMIT_CORE)[1] == 0:
        numbers["CORE"] = 0
    pairs = {name: (number, number) for name, number in numbers.items()}

    if LINUX:
        mapped_pages = int(process_file("self", "statm").split()[0])
        space = mapped_pages * resource.getpagesize() + (config["memory_mb"] << 20)
        # No queued signals: they are counted per user, so two snippets could talk by them.
        pairs.update(SIGPENDING=(0, 0), MSGQUEUE=(0, 0), AS=(space, space + MEMORY_RESERVE))
    return pairs


def serve(sock, config):
    """The loop, until the trainer closes: None. A forked child returns its request at once, for
    a snippet can look into the frames below its own: here are those that run beside it."""
    # A child's end writes into this pipe, which wakes select().
    wake_read, wake_write = os.pipe()
    os.set_blocking(wake_write, False)
    signal.set_wakeup_fd(wake_write, warn_on_full_buffer=False)
    signal.signal(signal.SIGCHLD, lambda *_: None)

    queue = {}  # request id -> (seed, timeout, code_fd, output_fd), the oldest first
    jobs = {}  # request id -> Job
    fork_at = math.inf  # after a fork that failed: the time to try again
    while True:
        # Wait for a request, a child's end, or the time of a look or fork.
        look_at = min((job.look_at for job in jobs.values()), default=math.inf)
        wait = min(look_at - time.monotonic(), fork_at - time.monotonic(), 3600.0)
        readable, _, _ = select.select([sock, wake_read], [], [], max(0.0, wait))
        if wake_read in readable:
            os.read(wake_read, 4096)

        # Answer for snippets that ended, look at the others.
        for request_id, job in list(jobs.items()):
            # WNOWAIT does not reap: the pid must stay taken until its group has been killed.
            if os.waitid(os.P_PID, job.pid, os.WEXITED | os.WNOWAIT | os.WNOHANG):
                del jobs[request_id]
                exit_code, seconds, used = reap(job)
                sock.send(REPLY.pack(request_id, exit_code, job.timed_out, seconds, used))
            elif time.monotonic() >= job.look_at:
                look(job)

        # Take all requests that have arrived.
        while sock in readable:
            try:
                message, fds, _, _ = socket.recv_fds(sock, REQUEST.size, 2)
            except BlockingIOError:
                break
            except ConnectionError:
                message = b""
            if not message:  # the trainer closed
                for job in jobs.values():
                    reap(job)
                return None

            # A request without a timeout cancels the one of its number.
            request_id, seed, timeout = REQUEST.unpack(message)
            if timeout:
                assert len(fds) == 2, "a request lost its descriptors: too many open files?"
                queue[request_id] = (seed, timeout, fds[0], fds[1])
            elif request_id in queue:
                _, _, code_fd, output_fd = queue.pop(request_id)
                os.close(code_fd)
                os.close(output_fd)
            elif request_id in jobs:
                kill_group(jobs[request_id].pid)

        # Fork a child for each free worker.
        fork_at = math.inf
        while queue and len(jobs) < config["workers"]:
            request_id = next(iter(queue))
            seed, timeout, code_fd, output_fd = queue[request_id]
            started_at = time.monotonic()
            try:
                pid = os.fork()
            except OSError:  # the host has too many processes just now
                fork_at = started_at + FORK_SECONDS
                break
            del queue[request_id]
            if pid == 0:
                return seed, code_fd, output_fd
            os.close(code_fd)
            os.close(output_fd)
            look_at = started_at + min(timeout, LOOK_SECONDS)
            jobs[request_id] = Job(pid, timeout, started_at, look_at)


def look(job):
    """Kill a snippet that is over a limit, or set the time of the next look."""
    used = own_seconds(job)
    now = time.monotonic()
    threads = 1
    if LINUX:
        # num_threads is the 18th field after the name in brackets.
        fields = process_file(job.pid, "stat").rpartition(")")[2].split()
        threads = int(fields[17])

    # Too late, or too many threads.
    is_late = used >= job.timeout or now - job.started_at >= WALL_FACTOR * job.timeout
    if is_late or threads > MAX_THREADS:
        job.timed_out = is_late
        job.look_at = math.inf
        kill_group(job.pid)
        return

    seconds_left = (job.timeout - used) / threads
    job.look_at = now + min(LOOK_SECONDS, max(0.001, seconds_left))


def own_seconds(job):
    """What counts against the time limit."""
    wall = time.monotonic() - job.started_at
    if not LINUX:
        return wall
    cpu = time.clock_gettime((~job.pid << 3) | 2)  # its CPU clock: see clock_getcpuclockid
    # Far from the limit, whatever it waited: one file less to read.
    if wall < job.timeout / 2:
        return max(wall, cpu)
    waited = int(process_file(job.pid, "schedstat").split()[1]) * 1e-9  # 0 if not counted
    return max(wall - waited, cpu)


def process_file(pid, name):
    """Text of /proc/pid/name, through a descriptor: the zygote covers /proc."""
    # A snippet may name its process, with any bytes.
    fd = os.open(f"{pid}/{name}", os.O_RDONLY, dir_fd=PROC)
    with open(fd, errors="replace") as file:
        return file.read()


def write_process_file(name, text):
    """Write /proc/self/name."""
    with open(os.open(f"self/{name}", os.O_WRONLY, dir_fd=PROC), "w") as file:
        file.write(text)


def kill_group(pid):
    """SIGKILL for a child that is not reaped yet, and for its group."""
    os.kill(pid, signal.SIGKILL)  # it may not have made its own group yet
    with contextlib.suppress(ProcessLookupError, PermissionError):  # no group; a zombie's
        os.killpg(pid, signal.SIGKILL)


def reap(job):
    """End what is left of a snippet: (exit code, wall seconds, own seconds)."""
    used = own_seconds(job)
    kill_group(job.pid)
    _, wait_status = os.waitpid(job.pid, 0)
    seconds = time.monotonic() - job.started_at
    return os.waitstatus_to_exitcode(wait_status), seconds, used


# --------------------------------------------------------------------------------------------
# The snippet's side: the forked child


def run_child(config, seed, code_fd, output_fd):
    """Runs in the forked child and ends it."""
    exit_code = 1
    try:
        try:
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            source = os.pread(code_fd, os.fstat(code_fd).st_size, 0)
            os.dup2(output_fd, 1)
            os.dup2(output_fd, 2)
            confine(config)
        except BaseException:
            # Our own fault. A snippet could forge an exit code that says so: the zygote goes too.
            emit(traceback.format_exc())
            os.kill(config["zygote_pid"], signal.SIGKILL)
        else:
            exit_code = run_snippet(json.loads(source), seed, config["memory_mb"])
    finally:
        os._exit(exit_code)


def run_snippet(snippets, seed, memory_mb):
    """Execute the last of `snippets` as a script: the exit code, 1 after an exception."""
    gc.freeze()  # counters to zero: collections at the same points
    gc.enable()
    random.seed(seed)
    numpy.random.seed(seed % 2**32)
    sympy.core.random.seed(seed)

    open_output()

    # pickle looks the main module up, tracebacks the source.
    main = types.ModuleType("__main__")
    sys.modules["__main__"] = main
    *earlier, code = snippets
    remember_source(SNIPPET, code)

    exit_code = 0
    is_parsing = False
    try:
        if earlier:
            replay(earlier, main.__dict__)
        is_parsing = True
        tree = ast.parse(code, SNIPPET)
        is_parsing = False
        last = None
        if tree.body and isinstance(tree.body[-1], ast.Expr):
            last = tree.body.pop()
        exec(compile(tree, SNIPPET, "exec", dont_inherit=True), main.__dict__)

        # A trailing expression is echoed as in a notebook.
        if last is not None:
            echo = compile(ast.Expression(last.value), SNIPPET, "eval", dont_inherit=True)
            value = eval(echo, main.__dict__)
            if value is not None and not is_for_its_effect(last.value, main.__dict__):
                emit(f"{value!r}\n")
    except SystemExit as stop:
        if stop.code is not None and stop.code != 0:
            exit_code = 1
            message = f"[exit code {stop.code}]" if isinstance(stop.code, int) else stop.code
            emit(f"{message}\n")
    except BaseException as error:
        exit_code = 1
        if LINUX:  # after a MemoryError only the reserve has room to format it
            hard = resource.getrlimit(resource.RLIMIT_AS)[1]
            resource.setrlimit(resource.RLIMIT_AS, (hard, hard))
        message = describe(error)
        if isinstance(error, MemoryError) and is_parsing:
            message += "[nested too deeply for Python's parser]\n"
        elif isinstance(error, MemoryError):
            message += f"[memory limit of {memory_mb} MiB reached]\n"
        emit(message)

    # What os._exit leaves out. _shutdown, unlike join, wakes the idle workers of executors.
    threading._shutdown()
    atexit._run_exitfuncs()
    flush_all()
    return exit_code


def open_output():
    """A new stream for all that is printed. Line-buffered: what was printed before a kill is in
    the file."""
    REPLACED.append((sys.stdout, sys.stderr))
    out = open(1, "w", buffering=1, encoding="utf-8", errors="backslashreplace", closefd=False)
    sys.stdout = sys.stderr = sys.__stdout__ = sys.__stderr__ = out


def flush_all():
    """Write out what our stream holds, and what the snippet may have put in its place."""
    for stream in (sys.__stdout__, sys.stdout, sys.stderr):
        with contextlib.suppress(BaseException):  # the output is full, closed, or no stream at all
            stream.flush()


def remember_source(name, code):
    """Tracebacks look lines up here."""
    # Newlines as in the tokenizer: splitlines() would also split at form feeds.
    lines = io.StringIO(code, newline=None).readlines()
    linecache.cache[name] = (len(code), None, lines, name)
    OWN_SOURCES.add(name)


# Streams that were replaced. The last reference to one must stay: it would close our own output.
REPLACED = []


def replay(earlier, namespace):
    """Run earlier snippets, each compiled by itself; what they print goes nowhere, and an exit ends
    only the snippet in which it stands. One that closes all descriptors spoils the later ones."""
    end_process = os._exit
    shown = os.dup(1)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        for number, code in enumerate(earlier, 1):
            name = f"earlier_{number}.py"
            remember_source(name, code)
            os.dup2(nowhere, 1)
            os.dup2(nowhere, 2)
            os._exit = sys.exit
            open_output()
            with contextlib.suppress(SystemExit):
                exec(compile(code, name, "exec", dont_inherit=True), namespace)
            atexit._run_exitfuncs()
            flush_all()
            sys.stdin = open(0, closefd=False)  # exit() closes it
    finally:
        os._exit = end_process
        os.dup2(shown, 1)
        os.dup2(shown, 2)
        os.close(nowhere)
        os.close(shown)
        open_output()


# Methods and functions that return how much they wrote.
WRITES = ("write", "writelines", "writerow", "writerows", "write_text", "write_bytes")


def is_for_its_effect(expression, namespace):
    """Whether a trailing expression is `...`, a text as it stands (a docstring, a remark), or calls
    something that writes: its value is only a count."""
    if isinstance(expression, ast.Constant):
        return expression.value is ... or isinstance(expression.value, str)
    for node in ast.walk(expression):
        if not isinstance(node, ast.Call):
            continue
        function = node.func
        if isinstance(function, ast.Attribute) and function.attr in WRITES:
            return True

        # A plain name may stand for sys.stdout.write; a function of the snippet's own is none.
        if isinstance(function, ast.Name):
            value = namespace.get(function.id)
            is_own = isinstance(value, types.FunctionType)
            if not is_own and getattr(value, "__name__", None) in WRITES:
                return True
    return False


def describe(error):
    """Traceback text: the snippet's own frames only, the last MAX_FRAMES of them."""
    frames = []
    for frame, line in traceback.walk_tb(error.__traceback__):
        if frame.f_code.co_filename in OWN_SOURCES:
            frames.append((frame, line))
    dropped = len(frames) - MAX_FRAMES

    lines = []
    if dropped > 0:
        lines.append(f"Traceback (most recent call last, {dropped} frames dropped):\n")
    elif frames:
        lines.append("Traceback (most recent call last):\n")
    lines += traceback.StackSummary.extract(iter(frames[-MAX_FRAMES:])).format()
    lines += traceback.format_exception_only(type(error), error)
    return "".join(lines)


def emit(text):
    """Append to the output, past sys.stdout, on a line of its own: behind output that ends inside
    a line it would be read as a part of that."""
    flush_all()
    with contextlib.suppress(OSError):
        size = os.fstat(1).st_size
        if size > 0 and os.pread(1, 1, size - 1) != b"\n":
            text = "\n" + text
        os.write(1, text.encode("utf-8", "backslashreplace"))


# --------------------------------------------------------------------------------------------
# The walls around a snippet


# From the kernel's headers.
PR_SET_PDEATHSIG = 1
PR_SET_DUMPABLE = 4
PR_SET_SECCOMP = 22
PR_SET_NO_NEW_PRIVS = 38
PR_SET_THP_DISABLE = 41
SECCOMP_MODE_FILTER = 2
CAPABILITY_VERSION_3 = 0x20080522
CAP_SETUID = 1 << 7
CLONE_NEWUSER = 0x10000000
MS_RDONLY = 0x1
MS_REC = 0x4000
MS_PRIVATE = 0x40000
MOUNT_ATTR_RDONLY = 1
AT_FDCWD = -100
AT_RECURSIVE = 0x8000
SYS_MOUNT_SETATTR = 442  # on all machines
SYS_LANDLOCK_CREATE_RULESET = 444
SYS_LANDLOCK_ADD_RULE = 445
SYS_LANDLOCK_RESTRICT_SELF = 446
LANDLOCK_CREATE_RULESET_VERSION = 1
LANDLOCK_RULE_PATH_BENEATH = 1
LANDLOCK_ACCESS_FS_WRITE_FILE = 0x2
LANDLOCK_ACCESS_FS_READ_FILE = 0x4
LANDLOCK_ACCESS_FS_READ_DIR = 0x8
LANDLOCK_ACCESS_FS_REFER = 0x2000
LANDLOCK_ACCESS_FS_TRUNCATE = 0x4000
LANDLOCK_ACCESS_FS_IOCTL_DEV = 0x8000


def kernel(function, *arguments):
    """A function of libc, called by name; integers are long. OSError."""
    arguments = [ctypes.c_ulong(a) if isinstance(a, int) else a for a in arguments]
    result = getattr(LIBC, function)(*arguments)
    code = ctypes.get_errno()
    if result < 0:
        raise OSError(code, f"{function}({arguments[0]}): {os.strerror(code)}")
    return result


syscall = functools.partial(kernel, "syscall")


def give_up(config):
    """Raise the walls of all snippets: {"layers": what is on, "missing": what is not}."""
    report = {"layers": [], "missing": []}
    if not LINUX:
        return report

    @contextlib.contextmanager
    def layer(name, mandatory=True):
        try:
            yield
            report["layers"].append(name)
        except (OSError, KeyError) as error:
            if mandatory:
                report["missing"].append(f"{name} ({error})")
            else:
                report["layers"].append(f"NOT {name} ({error})")

    with layer("first choice of the OOM killer", mandatory=False):
        write_process_file("oom_score_adj", "500")

    # Of a huge page that is unmapped but for 4 KiB all 2 MiB stay, and RLIMIT_AS counts 4 KiB.
    with layer("no huge pages", mandatory=False):
        kernel("prctl", PR_SET_THP_DISABLE, 1, 0, 0, 0)

    with layer("time limits without waiting for a core", mandatory=False):
        if process_file("self", "schedstat").startswith("0 "):
            raise OSError("the kernel does not count it")

    user = os.geteuid()
    group = os.getegid()
    host_mounts = os.stat("self/ns/mnt", dir_fd=PROC).st_ino
    with layer("network, IPC and mount namespaces", mandatory=False):
        namespaces = 0x48020000  # CLONE_NEWNET, CLONE_NEWIPC, CLONE_NEWNS
        try:
            kernel("unshare", namespaces)
        except PermissionError:  # a user namespace allows the others
            kernel("unshare", namespaces | CLONE_NEWUSER)
            # Who is unknown in one cannot make the next, a snippet's own.
            write_process_file("setgroups", "deny")
            write_process_file("uid_map", f"{user} {user} 1")
            write_process_file("gid_map", f"{group} {group} 1")

    with layer("read-only mounts, no /proc", mandatory=False):
        # CRUCIAL, for root: without a namespace of its own this would strike the host, and
        # without MS_PRIVATE the cover of /proc would spread to it.
        if os.stat("self/ns/mnt", dir_fd=PROC).st_ino == host_mounts:
            raise OSError("no mount namespace")
        kernel("mount", b"none", b"/", None, MS_REC | MS_PRIVATE, None)
        kernel("mount", b"none", b"/proc", b"tmpfs", MS_RDONLY, b"mode=0,size=4k")
        attributes = struct.pack("=QQQQ", MOUNT_ATTR_RDONLY, 0, 0, 0)
        syscall(SYS_MOUNT_SETATTR, AT_FDCWD, b"/", AT_RECURSIVE, attributes, 32)

    # A user namespace hides this process from its owner.
    kernel("prctl", PR_SET_DUMPABLE, 1, 0, 0, 0)

    with layer("bound on threads", mandatory=False):
        keep_capabilities(CAP_SETUID)
        try_own_user()
        config["own_user"] = True

    with layer("dropped capabilities"):
        kernel("prctl", PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
        if not config["own_user"]:
            keep_capabilities(0)

    with layer("Landlock"):
        config["landlock"] = landlock_ruleset(config["folders"])

    with layer("seccomp"):
        # A kernel that has seccomp asks for a program: EFAULT.
        result = LIBC.prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, None, 0, 0)
        code = ctypes.get_errno()
        if result != -1 or code != errno.EFAULT:
            raise OSError(code, "PR_SET_SECCOMP: " + os.strerror(code))
        config["seccomp"] = seccomp_filter()
    return report


def keep_capabilities(kept):
    """Drop all capabilities but those of the set `kept` (of the first 32)."""
    header = struct.pack("=Ii", CAPABILITY_VERSION_3, 0)
    sets = ctypes.create_string_buffer(24)
    kernel("capget", header, sets)
    permitted = struct.unpack("=6I", sets.raw)[1]
    wanted = struct.pack("=6I", kept & permitted, kept & permitted, 0, 0, 0, 0)
    kernel("capset", header, wanted)
    kernel("capget", header, sets)
    if sets.raw != wanted:
        raise OSError("some are left")


def take_own_user():
    """Become a user of whom there is no other process. The kernel counts tasks, for RLIMIT_NPROC,
    by real user and user namespace, and exempts root."""
    try:
        os.setresuid(FIRST_USER + os.getpid(), -1, -1)  # who may open files does not change
    except OSError:  # not root
        kernel("unshare", CLONE_NEWUSER)
        kernel("prctl", PR_SET_DUMPABLE, 1, 0, 0, 0)


def try_own_user():
    """OSError unless a child that takes a user of its own may have two tasks, and not two where
    the limit is one."""
    pid = os.fork()
    if pid == 0:
        exit_code = 1
        try:
            take_own_user()
            keep_capabilities(0)
            resource.setrlimit(resource.RLIMIT_NPROC, (2, 2))
            threading.Thread(target=int).start()
            resource.setrlimit(resource.RLIMIT_NPROC, (1, 1))
            try:
                threading.Thread(target=int).start()
            except RuntimeError:
                exit_code = 0
        finally:
            os._exit(exit_code)

    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    try:
        process_file(pid, "stat")  # /proc may hide processes of other users
    finally:
        _, wait_status = os.waitpid(pid, 0)
    if wait_status:
        raise OSError("no user of its own for a snippet")


def confine(config):
    """What would bind the zygote too: put on in the child, just before the code."""
    os.setpgid(0, 0)
    if LINUX:  # the OOM killer must not take the zygote, and with it the snippets beside, first
        with contextlib.suppress(OSError):
            write_process_file("oom_score_adj", "1000")
    if config["own_user"]:  # before die_with_parent: a namespace resets it
        with contextlib.suppress(OSError):  # no namespace is left: share that of the zygote
            take_own_user()
        keep_capabilities(0)
        resource.setrlimit(resource.RLIMIT_NPROC, (MAX_THREADS, MAX_THREADS))
    die_with_parent(config["zygote_pid"])
    # An open file of its own: flags of the zygote's stdin are shared.
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    if "landlock" in config:
        syscall(SYS_LANDLOCK_RESTRICT_SELF, config["landlock"], 0)
    os.closerange(3, os.sysconf("SC_OPEN_MAX"))  # the socket, and the files of queued snippets
    for name, pair in config["limits"].items():  # after that: they are more than NOFILE
        resource.setrlimit(getattr(resource, "RLIMIT_" + name), pair)
    if "seccomp" in config:  # last, for it forbids the others
        instructions = config["seccomp"].replace(WORD.pack(SELF), WORD.pack(os.getpid()))
        buffer = ctypes.create_string_buffer(instructions)
        program = struct.pack("HP", len(instructions) // 8, ctypes.addressof(buffer))
        kernel("prctl", PR_SET_SECCOMP, SECCOMP_MODE_FILTER, program, 0, 0)


def die_with_parent(parent_pid):
    """SIGKILL for this process when its parent, the *thread* that forked it, goes."""
    if LINUX:
        kernel("prctl", PR_SET_PDEATHSIG, signal.SIGKILL.value, 0, 0, 0)
        if os.getppid() != parent_pid:  # it went before the call
            os._exit(1)


def landlock_ruleset(folders):
    """Descriptor of a ruleset: the folders can be read, /dev/null written."""
    # Take away all rights that this version knows of.
    abi = syscall(SYS_LANDLOCK_CREATE_RULESET, None, 0, LANDLOCK_CREATE_RULESET_VERSION)
    files = 0x1FFF  # the 13 of the first version
    network = 0
    scopes = 0
    if abi >= 2:
        files |= LANDLOCK_ACCESS_FS_REFER
    if abi >= 3:
        files |= LANDLOCK_ACCESS_FS_TRUNCATE
    if abi >= 4:
        network = 0x3  # LANDLOCK_ACCESS_NET_BIND_TCP, LANDLOCK_ACCESS_NET_CONNECT_TCP
    if abi >= 5:
        files |= LANDLOCK_ACCESS_FS_IOCTL_DEV
    if abi >= 6:
        scopes = 0x3  # LANDLOCK_SCOPE_ABSTRACT_UNIX_SOCKET, LANDLOCK_SCOPE_SIGNAL
    rights = struct.pack("=QQQ", files, network, scopes)
    ruleset = syscall(SYS_LANDLOCK_CREATE_RULESET, rights, len(rights), 0)

    # Give some back at and below these paths.
    read = LANDLOCK_ACCESS_FS_READ_FILE
    access_by_path = {
        "/etc/ld.so.cache": read,
        "/dev/urandom": read,
        "/dev/null": read | LANDLOCK_ACCESS_FS_WRITE_FILE,
    }
    for folder in [*folders, "/lib", "/lib64", "/usr/lib", "/usr/lib64", "/usr/share/zoneinfo"]:
        access_by_path[folder] = read | LANDLOCK_ACCESS_FS_READ_DIR
    for path, access in access_by_path.items():
        with contextlib.suppress(FileNotFoundError):
            fd = os.open(path, os.O_PATH)
            rule = struct.pack("=Qi", access, fd)
            syscall(SYS_LANDLOCK_ADD_RULE, ruleset, LANDLOCK_RULE_PATH_BENEATH, rule, 0)
            os.close(fd)
    return ruleset


# System calls that are allowed: numbers on x86-64 and on aarch64 (None: not there). They act on
# the calling process, or on files that Landlock let it open. Not here: sendmsg and recvmsg (pass
# descriptors), close_range (gives a thread its own, each with RLIMIT_NOFILE), shm*, sem*, msg*,
# mq_*, flock, inotify* (messages between snippets), mincore, preadv2, statfs, sysinfo (shared
# state), readlink, access (Landlock does not cover them).
ALLOWED = dict(
    # Files and descriptors.
    read=(0, 63), write=(1, 64), readv=(19, 65), writev=(20, 66), pread64=(17, 67),
    pwrite64=(18, 68), lseek=(8, 62), close=(3, 57),
    dup=(32, 23), dup2=(33, None), dup3=(292, 24), open=(2, None), openat=(257, 56),
    getdents64=(217, 61), getcwd=(79, 17), stat=(4, None), lstat=(6, None),
    fstat=(5, 80), newfstatat=(262, 79),
    # To wait for them.
    pipe=(22, None), pipe2=(293, 59), poll=(7, None), ppoll=(271, 73),
    select=(23, None), pselect6=(270, 72), epoll_create=(213, None),
    epoll_create1=(291, 20), epoll_ctl=(233, 21), epoll_wait=(232, None),
    epoll_pwait=(281, 22), epoll_pwait2=(441, 441), eventfd2=(290, 19),
    # Sockets of a pair.
    getsockname=(51, 204), getpeername=(52, 205), getsockopt=(55, 209),
    recvfrom=(45, 207), shutdown=(48, 210),
    # Memory and threads.
    mmap=(9, 222), munmap=(11, 215), mremap=(25, 216), mprotect=(10, 226),
    brk=(12, 214), set_robust_list=(273, 99), set_tid_address=(218, 96),
    rseq=(334, 293), sched_yield=(24, 124), getcpu=(309, 168),
    # Time.
    nanosleep=(35, 101), alarm=(37, None), pause=(34, None), getitimer=(36, 102),
    setitimer=(38, 103), time=(201, None), times=(100, 153), gettimeofday=(96, 169),
    getrusage=(98, 165),
    # Itself.
    getrlimit=(97, 163), getrandom=(318, 278), uname=(63, 160), getpid=(39, 172),
    gettid=(186, 178), getppid=(110, 173), getpgrp=(111, None), getuid=(102, 174),
    geteuid=(107, 175), getgid=(104, 176), getegid=(108, 177), getresuid=(118, 148),
    getresgid=(120, 150), getgroups=(115, 158),
    # Signals, and the end.
    rt_sigaction=(13, 134), rt_sigprocmask=(14, 135), rt_sigpending=(127, 136),
    rt_sigsuspend=(130, 133), rt_sigtimedwait=(128, 137), rt_sigreturn=(15, 139),
    sigaltstack=(131, 132), restart_syscall=(219, 128), exit=(60, 93),
    exit_group=(231, 94),
    # With CONDITIONS.
    clone=(56, 220), kill=(62, 129), tgkill=(234, 131), prctl=(157, 167),
    prlimit64=(302, 261), sched_getaffinity=(204, 123), getpgid=(121, 155),
    getsid=(124, 156), ioctl=(16, 29), fcntl=(72, 25), madvise=(28, 233),
    socketpair=(53, 199), sendto=(44, 206), clock_gettime=(228, 113),
    clock_getres=(229, 114), clock_nanosleep=(230, 115), futex=(202, 98),
)

# Some are allowed only with certain values: {argument: values}, all of 32 bits in the kernel.
MAP_SHARED = 0x1
MAP_ANONYMOUS = 0x20
MASKS = {"mmap": MAP_SHARED | MAP_ANONYMOUS}  # only these bits of the argument count
SELF = 0x5E1F5E1F  # stands for the snippet's own pid
CLOCKS = {0: range(12)}  # those of other processes are negative
CONDITIONS = dict(
    # Of the bits in MASKS. Pages that are shared and anonymous stay until the last one is
    # unmapped, and RLIMIT_AS counts only what is mapped.
    mmap={3: (0, MAP_SHARED, MAP_ANONYMOUS)},
    clone={0: (0x3D0F00, 0x7D0F00)},  # a thread's flags in glibc, in musl
    kill={0: [SELF]},
    tgkill={0: [SELF]},
    prctl={0: (15, 16)},  # PR_SET_NAME, PR_GET_NAME
    # Not RLIMIT_CORE, 4: see `limits`.
    prlimit64={0: (0, SELF), 1: [*range(4), *range(5, 16)]},
    sched_getaffinity={0: (0, SELF)},
    getpgid={0: (0, SELF)},
    getsid={0: (0, SELF)},
    # TCGETS, TIOCGWINSZ, FIONREAD, FIONBIO, FIONCLEX, FIOCLEX
    ioctl={1: (0x5401, 0x5413, 0x541B, 0x5421, 0x5450, 0x5451)},
    # F_DUPFD, GETFD, SETFD, GETFL, SETFL, DUPFD_CLOEXEC: no locks, leases, owners, seals.
    fcntl={1: (0, 1, 2, 3, 4, 1030)},
    # MADV_NORMAL, RANDOM, SEQUENTIAL, WILLNEED, DONTNEED, FREE, HUGEPAGE, NOHUGEPAGE
    madvise={2: (0, 1, 2, 3, 4, 8, 14, 15)},
    # AF_UNIX; SOCK_STREAM, also NONBLOCK, CLOEXEC: for asyncio.
    socketpair={0: [1], 1: (1, 0x801, 0x80001, 0x80801)},
    sendto={5: [0]},  # without an address
    clock_gettime=CLOCKS,
    clock_getres=CLOCKS,
    clock_nanosleep=CLOCKS,
    # Private ones. A shared one names a place in a file: a doorbell between snippets.
    futex={1: (128, 129, 131, 132, 133, 134, 135, 137, 138, 393)},
)
# Other values fail with EPERM, or with these. EINVAL: as on an old kernel. EAGAIN makes glibc look
# again: the futex of a joined thread is shared.
ERRORS = dict(madvise=errno.EINVAL, futex=errno.EAGAIN)
CLONE3 = 435
FIRST_UNKNOWN = 451
MACHINES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}  # column, AUDIT_ARCH

# A filter's instructions and its answers.
BPF_LOAD = 0x20
BPF_EQUAL = 0x15
BPF_AT_LEAST = 0x35
BPF_AND = 0x54
BPF_RETURN = 0x06
SECCOMP_RET_ALLOW = 0x7FFF0000
SECCOMP_RET_ERRNO = 0x00050000
WORD = struct.Struct("=I")


def seccomp_filter():
    """The filter, a BPF program of 8 bytes per instruction.

    For example sched_getaffinity, whose argument 0 may be 0 or SELF:
        BPF_EQUAL 204         else skip 5, to the next system call
        BPF_LOAD argument 0
        BPF_EQUAL 0           then skip 2, to the last line
        BPF_EQUAL SELF        then skip 1
        BPF_RETURN EPERM
        BPF_RETURN allow
    """
    column, arch = MACHINES[os.uname().machine]

    def instruction(code, constant, skip_if_true=0, skip_if_false=0):
        return struct.pack("=HBBI", code, skip_if_true, skip_if_false, constant)

    def refuse(error):
        return instruction(BPF_RETURN, SECCOMP_RET_ERRNO | error)

    # Offset 4 is the machine, 0 the number, from 16 come the arguments. After ENOSYS glibc takes
    # an older way.
    program = [
        instruction(BPF_LOAD, 4),
        instruction(BPF_EQUAL, arch, skip_if_true=1),
        refuse(errno.EPERM),
        instruction(BPF_LOAD, 0),
        instruction(BPF_AT_LEAST, 0x40000000, skip_if_false=1),  # the numbers of x32
        refuse(errno.EPERM),
        instruction(BPF_AT_LEAST, FIRST_UNKNOWN, skip_if_false=1),
        refuse(errno.ENOSYS),
        instruction(BPF_EQUAL, CLONE3, skip_if_false=1),
        refuse(errno.ENOSYS),
    ]
    for name, numbers in ALLOWED.items():
        if numbers[column] is None:
            continue
        block = []
        for argument, values in CONDITIONS.get(name, {}).items():
            block.append(instruction(BPF_LOAD, 16 + 8 * argument))
            if name in MASKS:
                block.append(instruction(BPF_AND, MASKS[name]))
            for position, value in enumerate(values):
                # Skip the values that are left, and the refusal.
                skip = len(values) - position
                block.append(instruction(BPF_EQUAL, value, skip_if_true=skip))
            block.append(refuse(ERRORS.get(name, errno.EPERM)))
        block.append(instruction(BPF_RETURN, SECCOMP_RET_ALLOW))
        program.append(instruction(BPF_EQUAL, numbers[column], skip_if_false=len(block)))
        program += block
    program.append(refuse(errno.EPERM))
    return b"".join(program)


async def main():
    argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    async with Sandbox() as sandbox:
        print(sandbox.report)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--zygote"]:
        zygote_main(socket.socket(fileno=int(sys.argv[2])), json.load(open(int(sys.argv[3]))))
    else:
        try:
            asyncio.run(main())
        except UserError as error:
            sys.exit(str(error))
