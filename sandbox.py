"""Run model-written Python, confined: a prepared process forks once per snippet.

    async with Sandbox(workers=2, timeout=1.0) as sandbox:
        result = await sandbox.run("print(1 + 1)", seed=0)     # status "ok", output "2\\n"

Importing numpy and sympy costs a hundred times more than a fork, so one process, the "zygote",
imports them once and forks a child per snippet. It shares a socketpair with the trainer (asyncio):
    trainer -> zygote   request id, seed, time limit, and two files: the code, an empty output
    zygote  -> trainer  request id, exit code, whether it timed out, wall and own seconds
The zygote keeps queue, deadlines and exit codes: a trainer blocked by a GPU step neither delays
nor falsifies a time limit, and nothing that a snippet prints can pass for its status.

The adversary is a policy that is paid for answers and may know this file. Mandatory on Linux:
    seccomp     harmless system calls only: no process, program, socket, lock, shared memory,
                signal to others, or change of a file's name, mode, times or size
    Landlock    no file but the interpreter's libraries, to read, and /dev/null
    rlimits     on memory, output, descriptors; no capability; an environment of constants
Sandbox() does not start where one is missing, nor where its self-test finds an attack that works,
unless unsafe=True (--unsafe_sandbox). Best effort, as reported at start: namespaces, the OOM
killer's preference, time limits that do not count waiting for a core.

`timeout` limits a snippet's *own* time: the CPU seconds of its threads, or the wall time of its
main thread less what that waited for a core, whichever is more. So a loop and a sleep both end at
`timeout`, and other load pushes nothing over it. WALL_FACTOR * `timeout` of wall time ends all.
Results that took more than half of their limit are counted: they may differ.

Covered too: floods of output, memory, threads and recursion, crashes, left-over threads, state
passed between snippets (memory, files, locks, futexes), a killed or frozen zygote, a killed
trainer, a cancelled task. The same code and seed give the same text (clocks, os.urandom and
addresses aside). NOT covered: holes in the kernel; timing and cache channels; stat(), which
Landlock leaves open; nonsense in the text itself (rollout.py neutralises tags). macOS (Python
3.13 or later) and --unsafe_sandbox are for development: accidents only.

    python sandbox.py                     # does it start here? layers and self-test in a line
    python tests/bench_sandbox.py         # speed against a fresh interpreter per snippet
    python tests/test_sandbox.py 10000    # soak: hostile snippets, and what they leave behind
"""
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
SNIPPET = "snippet.py"  # the file name that a snippet sees in its own tracebacks
OUTPUT_BYTES = 1 << 20  # a snippet that prints this much is stopped: status output_limit
MEMORY_RESERVE = 64 << 20  # bytes beyond memory_mb, released only to report a MemoryError
STACK_BYTES = 2 << 20  # CPython's time to overflow it with repr() grows with its square
MAX_FRAMES = 6  # traceback frames shown
MAX_THREADS = 128  # a snippet with more is killed
MAX_DEATHS = 10  # of zygotes, without a finished snippet in between
MAX_IN_FLIGHT = 128  # requests inside the zygote: 2 descriptors each, well below 1024
WALL_FACTOR = 10  # wall seconds for each second of a time limit, at most
JUDGE_SECONDS = 1.0  # own time of a snippet of `equal`
LOOK_SECONDS = 0.1  # how often the zygote looks at a snippet's threads and CPU time
FROZEN_SECONDS = 30.0  # a zygote silent this long past a time limit, or at start, is replaced
REQUEST = struct.Struct("=Qqd")  # request id, seed, time limit; a limit of 0 cancels
REPLY = struct.Struct("=Qi?dd")  # request id, exit code, timed out, wall and own seconds
ENVIRONMENT = {"PATH": os.defpath, "HOME": "/", "LANG": "C.UTF-8", "TZ": "UTC", "PYTHONHASHSEED": "0"}
ENVIRONMENT |= dict.fromkeys(["OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"], "1")


class UserError(Exception):
    """What the user or the machine has to change: scripts print its one line and fail."""


@dataclasses.dataclass
class SandboxResult:
    """What one snippet did. sandbox_error is our own fault: drop the rollout, never score it,
    never show it to the model."""
    status: str  # ok | error | timeout | output_limit | killed | sandbox_error
    output: str  # for the model: at most output_chars characters, plus notices in brackets
    seconds: float = 0.0  # of wall time from fork to exit


# --------------------------------------------------------------------------------------------
# The trainer's side


def anonymous_file(content=b""):
    """An open file without a name that holds `content`, in memory (on macOS on disk)."""
    file = open(os.memfd_create("snippet"), "w+b", 0) if LINUX else tempfile.TemporaryFile(buffering=0)
    file.write(content)
    return file


def feedback(raw, exit_code, timed_out, timeout, output_chars):
    """(status, text for the model) of a finished process, from its output bytes and exit code
    (minus the number of a signal). The text names no folder of the host."""
    text = raw.decode("utf-8", "replace")
    for folder in library_folders():
        text = text.replace(folder + "/", "")
    if len(text) > output_chars:
        head, tail = text[:output_chars // 2], text[len(text) - (output_chars + 1) // 2:]
        text = f"{head}\n[... {len(text) - output_chars} characters dropped ...]\n{tail}"
    if timed_out and exit_code == -signal.SIGKILL:
        status, notice = "timeout", f"[timed out after {timeout} s]"
    elif exit_code < 0:
        names = {s.value: s.name for s in signal.Signals}  # most real-time ones have none
        status, notice = "killed", f"[killed by {names.get(-exit_code, f'signal {-exit_code}')}]"
    elif len(raw) >= OUTPUT_BYTES:
        status, notice = "output_limit", f"[output limit of {OUTPUT_BYTES} bytes reached]"
    elif exit_code == 0:
        status, notice = "ok", "" if text else "[no output: use print(...) to see a result]"
    else:  # 1 is an exception or sys.exit, described by the child; others are os._exit
        status, notice = "error", "" if exit_code == 1 and text else f"[exit code {exit_code}]"
    return status, text + ("\n" if notice and text and not text.endswith("\n") else "") + notice


ATTACKS = {  # what a snippet must not be able to do; every line is harmless where it can
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
    "run a program": "os.execv('/bin/true', ['true'])"}
PROBE = """
import ctypes, fcntl, os, resource, socket
libc = ctypes.CDLL(None, use_errno=True)
def native(result):
    if result < 0: raise OSError(ctypes.get_errno(), "refused")
    return result
for name, attack in attacks.items():
    try: exec(attack)
    except (OSError, ValueError): continue
    print(name)
print("end")
"""


# What `equal` runs. The parser's tables and sympy's caches fill with use: what resembles an
# expression that was read before the fork (WARM_UP) takes a fraction of the time.
JUDGE = """
from latex2sympy2_extended.latex2sympy2 import ConversionConfig, latex2sympy
from math_verify import grader, verify
grader.sympy_solve_and_compare = lambda *_: False  # two equations it cannot solve were equal
real = not any(map(grader.should_treat_as_complex, texts))
config = ConversionConfig(lowercase_symbols=False)
predicted, reference = [latex2sympy(text, is_real=real, conversion_config=config,
                                    normalization_config=None) for text in texts]
print(verify(reference, predicted, numeric_precision=30, timeout_seconds=None,
             allow_set_relation_comp=True))
"""
WARM_UP = r"""
-\frac{3x^{2}-1}{2}+\sqrt{5}\cdot{y} 2\sqrt[3]{\frac{\pi}{4}}(a_{1}+b)(x-1)! x<5 x+y=2z^{-1} 3-2i
\frac{\ln{3}}{\log_{2}{x}}+\sin^{2}x-\cos(2x)|x| e^{i\pi/3}+4i+\binom{n}{2}\alpha \frac{2\pi}{3}
1+2\sqrt{3} \frac{x}{2} (x+1)(x-2) (x+2)^{2} 2ab+c/2 [2,\infty) x\ge2 2<x\le3 \log_{2}3""".split()


class Sandbox:
    """A pool of `workers` snippets at a time, for one event loop: `async with Sandbox() as s`.

    timeout: seconds of its own time that a snippet has, see the top of this file.
    memory_mb: address space in MiB above what the zygote has mapped.
    output_chars: characters of output kept, half from the head and half from the tail.
    unsafe: start although the self-test fails, with a warning; else that is a UserError.
    math_verify: have math-verify imported, which the snippets of `equal` need.
    report: one line on layers and self-test. counts: results by status, and "near_limit".
    """

    def __init__(self, workers=2, timeout=1.0, memory_mb=512, output_chars=2000, unsafe=False,
                 math_verify=False):
        assert workers >= 1 and timeout > 0 and memory_mb > 0 and output_chars >= 0
        self.workers, self.timeout, self.unsafe = workers, timeout, unsafe
        self.memory_mb, self.output_chars, self.math_verify = memory_mb, output_chars, math_verify
        self.process = self.socket = None  # the zygote; socket is None while there is none
        self.futures = {}  # request id -> future of its reply, or of the status of a lost one
        self.ids, self.deaths = itertools.count(), 0  # deaths: of zygotes, since the last reply
        self.slots = asyncio.Semaphore(max(MAX_IN_FLIGHT, 2 * workers))
        self.judge, self.judge_lock = None, asyncio.Lock()  # the pool of `equal`, once needed
        self.report, self.counts = "", collections.Counter()
        self.closed = True

    async def __aenter__(self):
        self.loop = asyncio.get_running_loop()
        self.closed = False
        self.layers_file = anonymous_file()  # the zygote's stdout: what it says about itself
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

    async def _self_test(self):
        """Try each kind of attack and each limit. The one-line report, or UserError."""
        begin = time.monotonic()
        with tempfile.TemporaryDirectory() as folder:
            canary = pathlib.Path(folder, "canary")
            canary.write_text("canary")
            code = f"canary, source, attacks = {(str(canary), os.path.abspath(__file__), ATTACKS)!r}{PROBE}"
            attacked = await self._attempt(code)
            layers = json.loads(os.pread(self.layers_file.fileno(), 1 << 16, 0) or b'{"missing": []}')
            missing = ", ".join(layers["missing"])
            if missing and not self.unsafe:
                raise UserError(f"the sandbox does not start: it lacks {missing} (see --unsafe_sandbox)")
            if attacked.status != "ok":
                raise UserError(f"the sandbox does not start: {attacked.output} (see stderr)")
            intact = os.listdir(folder) == ["canary"] and canary.read_text() == "canary"
        loop, memory, output = await asyncio.gather(
            self._attempt("while True: pass", timeout=0.1), self._attempt("bytearray(1 << 40)"),
            self._attempt("print('x' * (1 << 22))"))
        lines = attacked.output.splitlines()
        holds = {"leave a trace in a folder": intact, "run a program": "end" in lines,  # the last attack
                 "exceed the time limit": loop.status == "timeout",
                 "exceed the memory limit": "MemoryError" in memory.output,
                 "exceed the output limit": output.status == "output_limit"}
        possible = [line for line in lines if line in ATTACKS] + [name for name in holds if not holds[name]]
        if possible and LINUX and not self.unsafe:
            raise UserError(f"the sandbox does not start: its self-test could {', '.join(possible)}")
        found = (f"POSSIBLE: {', '.join(possible)}" if possible else
                 f"{len(ATTACKS)} attacks refused, limits hold (0.1 s fired at {loop.seconds:.3f} s)")
        return (f"sandbox: {found}; {f'LACKS {missing}; ' if missing else ''}"
                f"{', '.join(layers['layers'])}; self-test {time.monotonic() - begin:.1f} s")

    async def run(self, code, seed=0):
        """The SandboxResult of `code`; `seed` (64-bit, signed) is for random, numpy and sympy.
        Cancelling the task kills the snippet. RuntimeError outside `async with`."""
        async with self.slots:
            tries = 0
            while tries < 2:  # once more after an error of our own; what never ran is no try
                result = await self._attempt(code, seed, self.timeout, self.output_chars)
                if result.status not in ("sandbox_error", "never ran"):
                    break
                tries += result.status == "sandbox_error"
            self.counts[result.status] += 1
            return result

    async def equal(self, predicted, reference):
        """Whether math-verify takes two LaTeX expressions for equal within JUDGE_SECONDS. It
        calculates what it reads and can be made to hang, so it runs as a snippet, in a pool of
        its own that the first call starts. UserError if it does not run."""
        async with self.judge_lock:
            self._check_open()
            if self.judge is None:
                judge = Sandbox(self.workers, JUDGE_SECONDS, unsafe=self.unsafe, math_verify=True)
                self.judge = await judge.__aenter__()
        result = await self.judge.run(f"texts = {[predicted, reference]!r}\n{JUDGE}")
        if result.status == "sandbox_error":  # our own fault is no verdict
            raise UserError(f"math-verify does not run: {result.output}")
        return (result.status, result.output) == ("ok", "True\n")

    def _check_open(self):
        if self.closed:
            raise RuntimeError("the sandbox is closed: use it inside `async with`")

    async def _attempt(self, code, seed=0, timeout=10.0, output_chars=10_000):
        self._check_open()
        if self.deaths >= MAX_DEATHS:
            raise UserError(f"the sandbox died {self.deaths} times without finishing a snippet in between")
        if self.socket is None:
            self._start()
        if not self.futures:
            self.heard = self.loop.time()  # an idle zygote owes nobody a sign of life
        request_id, future = next(self.ids), self.loop.create_future()
        patience = WALL_FACTOR * timeout + FROZEN_SECONDS
        source = code.encode("utf-8", "surrogatepass")
        with anonymous_file(source) as source_file, anonymous_file() as output_file:
            self.futures[request_id] = future
            try:
                self._send(request_id, seed, timeout, [source_file.fileno(), output_file.fileno()])
                while not future.done():
                    await asyncio.wait([future], timeout=patience)
                    # Some snippet ends every WALL_FACTOR * timeout seconds: a silent zygote
                    # hangs. Replies are read before timers run: our lateness does not count.
                    if not future.done() and self.loop.time() - self.heard > patience:
                        self._stop(grace=0)
            finally:
                del self.futures[request_id]
                if not future.done():  # this task was cancelled
                    self._send(request_id, 0, 0.0, [])
            raw = os.pread(output_file.fileno(), OUTPUT_BYTES, 0)
        if isinstance(future.result(), str):
            return SandboxResult(future.result(), f"[sandbox error: the zygote died] {raw[-2000:]!r}")
        exit_code, timed_out, seconds, own_seconds = future.result()
        status, text = feedback(raw, exit_code, timed_out, timeout, output_chars)
        self.counts["near_limit"] += not timed_out and own_seconds > timeout / 2
        return SandboxResult(status, text, seconds)

    def _start(self):
        """Start a zygote. Requests may be sent at once: the socket holds them."""
        # Message boundaries keep descriptors with their request; on macOS fixed sizes do.
        ours, theirs = socket.socketpair(type=socket.SOCK_SEQPACKET if LINUX else socket.SOCK_STREAM)
        for end in (ours, theirs):
            end.setblocking(False)
            end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)  # for all in flight
        names = "workers", "timeout", "memory_mb", "unsafe", "math_verify"
        config = {name: getattr(self, name) for name in names}
        config |= {"trainer_pid": os.getpid(), "folders": library_folders(), "path": sys.path}
        # Not `python -I`, which ignores PYTHONHASHSEED.
        command = [sys.executable, "-s", os.path.abspath(__file__), "--zygote", str(theirs.fileno())]
        with theirs:
            self.process = subprocess.Popen(
                [*command, json.dumps(config)], env=ENVIRONMENT, cwd="/", pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL, stdout=self.layers_file)
        self.socket, self.heard = ours, self.loop.time()
        self.loop.add_reader(self.socket, self._on_readable)

    def _send(self, request_id, seed, timeout, fds):
        try:
            socket.send_fds(self.socket, [REQUEST.pack(request_id, seed, timeout)], fds)
        except OSError:  # it died, or is frozen and its buffer is full
            self._stop(grace=0)

    def _on_readable(self):
        try:
            message = self.socket.recv(REPLY.size)
        except ConnectionError:  # it died with requests unread
            message = b""
        if not message:
            return self._stop(grace=0)
        self.heard, self.deaths = self.loop.time(), 0
        request_id, *reply = REPLY.unpack(message)
        if request_id in self.futures:  # else its task was cancelled
            self.futures[request_id].set_result(reply)

    def _stop(self, grace):
        """End the zygote: `grace` seconds to reap its snippets, then SIGKILL, which ends them too.
        Whoever waits is told whether its snippet may have run: the oldest, one per worker."""
        if self.socket is None:
            return
        self.loop.remove_reader(self.socket)
        self.socket.close()  # the zygote reads an end of file
        self.socket = None
        try:
            self.process.wait(grace)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.deaths += 1
        for i, future in enumerate(self.futures.values()):
            if not future.done():
                future.set_result("sandbox_error" if i < self.workers else "never ran")


# --------------------------------------------------------------------------------------------
# The zygote's side


@dataclasses.dataclass
class Job:
    pid: int
    timeout: float  # seconds of own time
    started_at: float  # time.monotonic() at the fork, seconds
    look_at: float  # time of the next look; infinite once killed
    timed_out: bool = False


def kernel(call, *arguments):
    """A libc function by name or a system call by number; integers are long. OSError."""
    if isinstance(call, int):
        return kernel("syscall", call, *arguments)
    arguments = [ctypes.c_ulong(a) if isinstance(a, int) else a for a in arguments]
    result, code = getattr(LIBC, call)(*arguments), ctypes.get_errno()
    if result < 0:
        raise OSError(code, f"{call}({arguments[0]}): {os.strerror(code)}")
    return result


def die_with_parent(parent_pid):
    """Linux: SIGKILL for this process when its parent, the *thread* that forked it, goes."""
    if LINUX:
        kernel("prctl", 1, signal.SIGKILL.value, 0, 0, 0)  # PR_SET_PDEATHSIG
        if os.getppid() != parent_pid:  # it went before the call
            os._exit(1)


def zygote_main(sock, config):
    """Import what snippets use, give up what they must not have, serve."""
    global LIBC, PROC
    LIBC = ctypes.CDLL(None, use_errno=True)
    PROC = os.open("/proc", os.O_RDONLY) if LINUX else None
    # A process group of its own: Ctrl-C in the trainer's terminal must not reach it.
    os.setpgid(0, 0)
    folders = tuple(folder + "/" for folder in config["folders"])
    sys.path[:] = [folder for folder in config["path"] if (folder + "/").startswith(folders)]
    prepare(config["math_verify"])
    config |= {"zygote_pid": os.getpid(), "limits": limits(config)}
    report = give_up(config)
    os.pwrite(1, json.dumps(report).encode(), 0)
    if report["missing"] and not config["unsafe"]:
        return  # the trainer's side reads the report
    die_with_parent(config["trainer_pid"])  # not before: entering a user namespace resets it
    gc.disable()  # a collection would un-share all pages
    gc.set_threshold(10_000, 10, 10)  # for snippets: collections are dear after fork
    gc.freeze()
    serve(sock, config)


@functools.cache
def library_folders():
    """Where this interpreter's modules lie, and numpy, which may be elsewhere; longest first.
    Not sys.path nor sys.prefix: they may name the repository, or the venv in it."""
    paths = [sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")]
    paths += [*site.getsitepackages(), f"{sys.base_prefix}/lib"]
    paths.append(os.path.dirname(os.path.dirname(importlib.util.find_spec("numpy").origin)))
    return sorted(set(paths), key=len, reverse=True)


def prepare(math_verify=False):
    """Imports, and the settings that are the same for all snippets."""
    global numpy, sympy  # only here: the trainer imports none of them
    # Without these calls each snippet would pay for what numpy and sympy load lazily.
    import cmath, decimal, fractions, functools, heapq, re, statistics, string  # noqa: E401,F401
    import numpy, numpy.fft, numpy.linalg, numpy.random, sympy  # noqa: E401
    numpy.linalg.solve(numpy.eye(64) @ numpy.eye(64), numpy.ones(64))
    x = sympy.Symbol("x")
    str([sympy.solve(sympy.sympify("x**2 - 2"), x), sympy.integrate(sympy.sin(x) ** 2, x),
         sympy.factorint(360), sympy.simplify((x ** 2 - 1) / (x - 1)), sympy.N(sympy.pi, 20)])
    if math_verify:
        logging.disable()
        for text in WARM_UP:
            exec(JUDGE, {"texts": [text, text.replace("2", "7")]})
    sys.argv = [SNIPPET]
    sys.dont_write_bytecode = True
    sys.set_int_max_str_digits(50_000)
    sys.setrecursionlimit(1000)
    warnings.formatwarning = lambda text, kind, *_: f"{kind.__name__}: {text}\n"  # no host path
    threading.excepthook = lambda args: print(describe(args.exc_value), end="", file=sys.stderr)


def limits(config):
    """The rlimits of a snippet: {name: (soft, hard)}."""
    # CORE 1: none at all. 0 would still start the crash handler of a host that has one.
    core = int(resource.getrlimit(resource.RLIMIT_CORE)[1] != 0)
    numbers = {"CORE": core, "FSIZE": OUTPUT_BYTES, "MEMLOCK": 0, "STACK": STACK_BYTES, "NOFILE": 64,
               "CPU": math.ceil(config["timeout"]) + WALL_FACTOR}  # the zygote's deadline comes first
    pairs = {name: (number, number) for name, number in numbers.items()}
    if LINUX:
        mapped = int(process_file("self", "statm").split()[0]) * resource.getpagesize()
        space = mapped + (config["memory_mb"] << 20)
        pairs |= {"SIGPENDING": (64, 64), "MSGQUEUE": (0, 0), "AS": (space, space + MEMORY_RESERVE)}
    return pairs


def serve(sock, config):
    """The loop, until the trainer closes: reap, kill at deadlines, take requests, fork."""
    wake_r, wake_w = os.pipe()
    os.set_blocking(wake_r, False)
    os.set_blocking(wake_w, False)
    signal.set_wakeup_fd(wake_w, warn_on_full_buffer=False)  # a child's end wakes select()
    signal.signal(signal.SIGCHLD, lambda *_: None)
    queue = collections.OrderedDict()  # request id -> seed, timeout, two descriptors
    jobs = {}  # request id -> Job
    while True:
        wait = min((job.look_at for job in jobs.values()), default=math.inf) - time.monotonic()
        readable, _, _ = select.select([sock, wake_r], [], [], max(0.0, min(wait, 3600.0)))
        if wake_r in readable:
            os.read(wake_r, 4096)
        for request_id, job in list(jobs.items()):
            # WNOWAIT does not reap: the pid must stay taken until its group has been killed
            if os.waitid(os.P_PID, job.pid, os.WEXITED | os.WNOWAIT | os.WNOHANG):
                sock.send(REPLY.pack(request_id, *reap(jobs.pop(request_id))))
            elif time.monotonic() >= job.look_at:
                look(job)
        while sock in readable:
            try:
                message, fds, _, _ = socket.recv_fds(sock, REQUEST.size, 2)
            except BlockingIOError:
                break
            except ConnectionError:  # closed with replies unread
                message = b""
            if not message:  # the trainer closed, or died
                for job in jobs.values():
                    reap(job)
                return
            request_id, seed, timeout = REQUEST.unpack(message)
            if timeout:
                assert len(fds) == 2, "a request lost its descriptors: too many open files?"
                queue[request_id] = seed, timeout, *fds
            elif request_id in queue:
                for fd in queue.pop(request_id)[2:]:
                    os.close(fd)
            elif request_id in jobs:
                kill_group(jobs[request_id].pid)
        while queue and len(jobs) < config["workers"]:
            request_id, (seed, timeout, code_fd, output_fd) = queue.popitem(last=False)
            started_at = time.monotonic()
            pid = os.fork()
            if pid == 0:
                run_child(config, seed, code_fd, output_fd)  # never returns
            os.close(code_fd)
            os.close(output_fd)
            jobs[request_id] = Job(pid, timeout, started_at, started_at + min(timeout, LOOK_SECONDS))


def process_file(pid, name):
    """Text of /proc/pid/name, by way of a descriptor: the zygote covers /proc."""
    with open(os.open(f"{pid}/{name}", os.O_RDONLY, dir_fd=PROC)) as file:
        return file.read()


def own_seconds(job):
    """What counts against the time limit, see the top of this file."""
    wall = time.monotonic() - job.started_at
    if not LINUX:
        return wall
    cpu = time.clock_gettime((~job.pid << 3) | 2)  # its CPU clock: see clock_getcpuclockid
    if wall < job.timeout / 2:  # the usual case needs no second look
        return max(wall, cpu)
    waited = int(process_file(job.pid, "schedstat").split()[1]) * 1e-9  # 0 if not counted
    return max(wall - waited, cpu)


def look(job):
    """Kill a snippet that is over a limit, or set the time of the next look."""
    used, now, threads = own_seconds(job), time.monotonic(), 1
    if LINUX:
        threads = int(process_file(job.pid, "stat").rpartition(")")[2].split()[17])
    over = used >= job.timeout or now - job.started_at >= WALL_FACTOR * job.timeout
    job.look_at = now + min(LOOK_SECONDS, max(0.001, (job.timeout - used) / threads))
    if over or threads > MAX_THREADS:
        job.timed_out, job.look_at = over, math.inf
        kill_group(job.pid)


def kill_group(pid):
    """SIGKILL for a child that is not reaped yet, and for all processes of its group."""
    os.kill(pid, signal.SIGKILL)  # it may not have made its own group yet
    with contextlib.suppress(ProcessLookupError, PermissionError):  # no group; a zombie's
        os.killpg(pid, signal.SIGKILL)


def reap(job):
    """End what is left of a snippet: its REPLY but for the request id."""
    own = own_seconds(job)
    kill_group(job.pid)
    _, wait_status = os.waitpid(job.pid, 0)
    seconds = time.monotonic() - job.started_at
    return os.waitstatus_to_exitcode(wait_status), job.timed_out, seconds, own


# --------------------------------------------------------------------------------------------
# The walls: what the zygote gives up once for all its children, and what each child gives up


# name, number on x86-64, number on aarch64 ("-": not there). They act on the calling process,
# or on files that Landlock let it open. Not here: sendmsg and recvmsg (pass descriptors),
# shm*, sem*, msg*, mq_*, flock, inotify* (messages between snippets), mincore, preadv2,
# statfs, sysinfo (state that is shared), readlink, access (Landlock does not cover them).
ALLOWED = """
read 0 63, write 1 64, readv 19 65, writev 20 66, pread64 17 67, pwrite64 18 68, lseek 8 62,
close 3 57, close_range 436 436, dup 32 23, dup2 33 -, dup3 292 24, open 2 -, openat 257 56,
getdents64 217 61, getcwd 79 17, stat 4 -, lstat 6 -, fstat 5 80, newfstatat 262 79, pipe 22 -,
pipe2 293 59, poll 7 -, ppoll 271 73, select 23 -, pselect6 270 72, epoll_create 213 -,
epoll_create1 291 20, epoll_ctl 233 21, epoll_wait 232 -, epoll_pwait 281 22,
epoll_pwait2 441 441, eventfd2 290 19, getsockname 51 204, getpeername 52 205,
getsockopt 55 209, recvfrom 45 207, shutdown 48 210, mmap 9 222, munmap 11 215, mremap 25 216,
mprotect 10 226, brk 12 214, set_robust_list 273 99, set_tid_address 218 96, rseq 334 293,
sched_yield 24 124, getcpu 309 168, nanosleep 35 101, alarm 37 -, pause 34 -, getitimer 36 102,
setitimer 38 103, time 201 -, times 100 153, gettimeofday 96 169, getrusage 98 165,
getrlimit 97 163, getrandom 318 278, uname 63 160, getpid 39 172, gettid 186 178,
getppid 110 173, getpgrp 111 -, getuid 102 174, geteuid 107 175, getgid 104 176,
getegid 108 177, getresuid 118 148, getresgid 120 150, getgroups 115 158, rt_sigaction 13 134,
rt_sigprocmask 14 135, rt_sigpending 127 136, rt_sigsuspend 130 133, rt_sigtimedwait 128 137,
rt_sigreturn 15 139, sigaltstack 131 132, restart_syscall 219 128, exit 60 93,
exit_group 231 94"""
SELF = 0x5E1F5E1F  # stands for the snippet's own pid in a filter
CLOCKS = {0: range(12)}  # not the CPU clocks of other processes, whose ids are negative
# (x86-64, aarch64), {argument: the values it may have}, all of 32 bits in the kernel
CONDITIONAL = [
    ((56, 220), {0: (0x3D0F00, 0x7D0F00)}),  # clone: a thread's flags in glibc, in musl
    ((62, 129), {0: [SELF]}), ((234, 131), {0: [SELF]}),  # kill, tgkill
    ((157, 167), {0: (15, 16)}),  # prctl: the thread's name
    # prlimit64: not of others; not RLIMIT_CORE, for 0 would start the host's crash handler
    ((302, 261), {0: (0, SELF), 1: [n for n in range(16) if n != 4]}),
    ((204, 123), {0: (0, SELF)}),  # sched_getaffinity
    ((121, 155), {0: (0, SELF)}), ((124, 156), {0: (0, SELF)}),  # getpgid, getsid
    # ioctl: TCGETS, TIOCGWINSZ, FIONREAD, FIONBIO, FIONCLEX, FIOCLEX
    ((16, 29), {1: (0x5401, 0x5413, 0x541B, 0x5421, 0x5450, 0x5451)}),
    ((72, 25), {1: (0, 1, 2, 3, 4, 1030)}),  # fcntl: no locks, leases, owners, seals
    ((28, 233), {2: (0, 1, 2, 3, 4, 8, 14, 15)}, errno.EINVAL),  # madvise, as on an old kernel
    ((53, 199), {0: [1], 1: (1, 0x801, 0x80001, 0x80801)}),  # socketpair, for asyncio
    ((44, 206), {5: [0]}),  # sendto: without an address
    ((228, 113), CLOCKS), ((229, 114), CLOCKS), ((230, 115), CLOCKS),  # clock_gettime, getres, nanosleep
    # futex: private ones only. A shared one names a place in a file: any page of libc would be
    # a doorbell between snippets. EAGAIN makes glibc look again (a joined thread's is shared).
    ((202, 98), {1: (128, 129, 131, 132, 133, 134, 135, 137, 138, 393)}, errno.EAGAIN)]
CLONE3, FIRST_UNKNOWN = 435, 451  # ENOSYS, so that glibc takes an older way
MACHINES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}  # column, AUDIT_ARCH


def seccomp_filter():
    """(BPF program, where a snippet puts its pid in it, the kernel's struct of it). An
    instruction is 8 bytes: code, jump if true, jump if false, constant."""
    column, arch = MACHINES[os.uname().machine]
    load, equal, at_least, leave = 0x20, 0x15, 0x35, 0x06

    def fail(code=errno.EPERM):
        return [(leave, 0, 0, 0x00050000 | code)]

    program = [(load, 0, 0, 4), (equal, 1, 0, arch), *fail(), (load, 0, 0, 0),
               (at_least, 0, 1, 0x40000000), *fail(),  # x32's numbers
               (at_least, 0, 1, FIRST_UNKNOWN), *fail(errno.ENOSYS),
               (equal, 0, 1, CLONE3), *fail(errno.ENOSYS)]
    plain = [(entry.split()[1:], {}) for entry in ALLOWED.split(",")]
    for numbers, conditions, *code in plain + CONDITIONAL:
        block = []
        for argument, values in conditions.items():
            block += [(load, 0, 0, 16 + 8 * argument)]  # its lower half
            block += [(equal, len(values) - i, 0, value) for i, value in enumerate(values)] + fail(*code)
        block += [(leave, 0, 0, 0x7FFF0000)]  # allow
        if numbers[column] != "-":
            program += [(equal, 0, len(block), int(numbers[column])), *block]
    program += fail()
    text = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *line) for line in program))
    selves = [8 * i + 4 for i, line in enumerate(program) if line[3] == SELF]
    return text, selves, struct.pack("HP", len(program), ctypes.addressof(text))


def landlock_ruleset(folders):
    """Descriptor of a ruleset: the folders can be read, /dev/null written."""
    abi = kernel(444, None, 0, 1)  # landlock_create_ruleset: the version
    handled = (1 << (13, 14, 15, 15, 16)[min(abi, 5) - 1]) - 1  # all file rights it knows of
    rights = struct.pack("=QQQ", handled, 3 * (abi >= 4), 3 * (abi >= 6))  # TCP; abstract sockets, signals
    ruleset = kernel(444, rights, len(rights), 0)
    folders = [*folders, "/lib", "/lib64", "/usr/lib", "/usr/lib64", "/usr/share/zoneinfo"]
    files = {"/etc/ld.so.cache": 4, "/dev/urandom": 4, "/dev/null": 6}  # write 2, read 4, list 8
    for path, access in (dict.fromkeys(folders, 12) | files).items():
        with contextlib.suppress(FileNotFoundError):
            fd = os.open(path, os.O_PATH)
            kernel(445, ruleset, 1, struct.pack("=Qi", access, fd), 0)  # landlock_add_rule
            os.close(fd)
    return ruleset


def give_up(config):
    """The walls of all snippets, raised once: {"layers": what is on, "missing": what not}."""
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
        with open("/proc/self/oom_score_adj", "w") as file:
            file.write("500")
    with layer("time limits without waiting for a core", mandatory=False):
        if process_file("self", "schedstat").startswith("0 "):
            raise OSError("the kernel does not count it")
    host = os.stat("self/ns/mnt", dir_fd=PROC).st_ino
    with layer("network, IPC and mount namespaces", mandatory=False):
        try:
            kernel("unshare", 0x48020000)  # CLONE_NEWNET, NEWIPC, NEWNS
        except PermissionError:
            kernel("unshare", 0x58020000)  # and NEWUSER, which allows the others
    with layer("read-only mounts, no /proc", mandatory=False):
        # CRUCIAL, for root: without a namespace of its own this would strike the host, and
        # from one that is not private (MS_PRIVATE) the cover of /proc would spread to it.
        if os.stat("self/ns/mnt", dir_fd=PROC).st_ino == host:
            raise OSError("no mount namespace")
        kernel("mount", b"none", b"/", None, 0x44000, None)  # MS_REC, MS_PRIVATE
        kernel("mount", b"none", b"/proc", b"tmpfs", 1, b"mode=0,size=4k")  # 1: MS_RDONLY
        kernel(442, -100, b"/", 0x8000, struct.pack("=QQQQ", 1, 0, 0, 0), 32)  # mount_setattr
    kernel("prctl", 4, 1, 0, 0, 0)  # PR_SET_DUMPABLE: a user namespace hides this process from its owner
    with layer("dropped capabilities"):
        kernel("prctl", 38, 1, 0, 0, 0)  # PR_SET_NO_NEW_PRIVS
        header, data = struct.pack("=Ii", 0x20080522, 0), ctypes.create_string_buffer(24)
        kernel("capset", header, data)
        kernel("capget", header, data)
        if any(data.raw):
            raise OSError("some are left")
    with layer("Landlock"):
        config["landlock"] = landlock_ruleset(config["folders"])
    with layer("seccomp"):
        result, code = LIBC.prctl(22, 2, None, 0, 0), ctypes.get_errno()
        if result != -1 or code != errno.EFAULT:  # EFAULT: it wants a program
            raise OSError(code, "PR_SET_SECCOMP: " + os.strerror(code))
        config["seccomp"] = seccomp_filter()
    return report


# --------------------------------------------------------------------------------------------
# The snippet's side: the forked child


def confine(config):
    """The restrictions that are not inherited, just before the code."""
    os.setpgid(0, 0)  # killed as a whole, where there can be a whole
    die_with_parent(config["zygote_pid"])
    # Not niced: beside two busy cores that takes most of their time (bench_sandbox.py --load).
    # An open file of its own: the flags of the zygote's stdin are shared by all its children.
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    if "landlock" in config:
        kernel(446, config["landlock"], 0)  # landlock_restrict_self
    os.closerange(3, os.sysconf("SC_OPEN_MAX"))  # the socket, and the files of queued snippets
    for name, pair in config["limits"].items():  # after that: they are more than NOFILE
        resource.setrlimit(getattr(resource, "RLIMIT_" + name), pair)
    if "seccomp" in config:  # last, for it forbids the others
        text, selves, program = config["seccomp"]
        for offset in selves:
            struct.pack_into("=I", text, offset, os.getpid())
        kernel("prctl", 22, 2, program, 0, 0)  # PR_SET_SECCOMP


def run_child(config, seed, code_fd, output_fd):
    """Runs in the forked child and ends it: nothing may return into the zygote's loop."""
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
            # Our own fault. A snippet could forge an exit code that says so, so the zygote
            # goes too: the trainer's side sees that, and finds this text in the output file.
            emit(traceback.format_exc())
            os.kill(config["zygote_pid"], signal.SIGKILL)
        else:
            exit_code = run_snippet(source.decode("utf-8", "surrogatepass"), seed, config["memory_mb"])
    finally:
        os._exit(exit_code)


def emit(text):
    """Append to the output on a new line, past any buffer or replacement of sys.stdout."""
    with contextlib.suppress(OSError):  # the output is full: its size tells the trainer
        size = os.fstat(1).st_size
        if size and os.pread(1, 1, size - 1) != b"\n":
            text = "\n" + text
        os.write(1, text.encode("utf-8", "backslashreplace"))


def run_snippet(code, seed, memory_mb):
    """Execute `code` as a script: the exit code, 1 after an exception, which it prints."""
    gc.freeze()  # counters to zero: collections at the same points
    gc.enable()
    random.seed(seed)
    numpy.random.seed(seed % 2**32)
    sympy.core.random.seed(seed)  # its own generator, seeded by the system at import
    # Line-buffered: what was printed before a kill is in the file. No surrogate may raise.
    out = open(1, "w", buffering=1, encoding="utf-8", errors="backslashreplace", closefd=False)
    sys.stdout = sys.stderr = sys.__stdout__ = sys.__stderr__ = out
    main = sys.modules["__main__"] = types.ModuleType("__main__")  # pickle looks it up
    # Universal newlines as in the tokenizer; splitlines() would also split at form feeds.
    linecache.cache[SNIPPET] = (len(code), None, io.StringIO(code, newline=None).readlines(), SNIPPET)
    exit_code = 0
    try:
        tree = ast.parse(code, SNIPPET)
        last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
        exec(compile(tree, SNIPPET, "exec", dont_inherit=True), main.__dict__)
        if last is not None:  # a trailing expression is echoed as in a notebook
            echo = compile(ast.Expression(last.value), SNIPPET, "eval", dont_inherit=True)
            value = eval(echo, main.__dict__)
            if value is not None:
                print(repr(value))
    except SystemExit as stop:
        if stop.code is not None and stop.code != 0:
            exit_code = 1
            message = f"[exit code {stop.code}]" if isinstance(stop.code, int) else stop.code
            print(message, file=sys.stderr)
    except BaseException as error:  # all that a snippet can raise: KeyboardInterrupt too
        exit_code = 1
        if LINUX:  # after a MemoryError there is no room to format it
            hard = resource.getrlimit(resource.RLIMIT_AS)[1]
            resource.setrlimit(resource.RLIMIT_AS, (hard, hard))
        message = describe(error)
        if isinstance(error, MemoryError):
            message += f"[memory limit of {memory_mb} MiB reached]\n"
        with contextlib.suppress(OSError, ValueError):  # the output is full, or closed
            out.flush()
        emit(message)
    # What os._exit leaves out. _shutdown, unlike join, wakes the idle workers of executors.
    threading._shutdown()
    atexit._run_exitfuncs()
    with contextlib.suppress(OSError, ValueError):
        out.flush()
    return exit_code


def describe(error):
    """Traceback text: the snippet's own frames only, the last MAX_FRAMES of them."""
    frames = [(frame, line) for frame, line in traceback.walk_tb(error.__traceback__)
              if frame.f_code.co_filename == SNIPPET]
    dropped = f", {len(frames) - MAX_FRAMES} frames dropped" if len(frames) > MAX_FRAMES else ""
    lines = [f"Traceback (most recent call last{dropped}):\n"] if frames else []
    lines += traceback.StackSummary.extract(iter(frames[-MAX_FRAMES:])).format()
    return "".join(lines + traceback.format_exception_only(type(error), error))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--zygote"]:
        zygote_main(socket.socket(fileno=int(sys.argv[2])), json.loads(sys.argv[3]))
    elif sys.argv[1:]:
        print(__doc__)
    else:
        try:
            print(asyncio.run(Sandbox().__aenter__()).report)
        except UserError as error:
            sys.exit(str(error))
