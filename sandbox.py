"""Run model-written Python snippets: a process that has numpy and sympy imported forks once per snippet.

    async with Sandbox(workers=2, timeout=1.0) as sandbox:
        result = await sandbox.run("print(1 + 1)", seed=0)     # status "ok", output "2\\n"

How it works. Importing numpy and sympy costs a hundred times more than a fork, so one "zygote" process
imports them once and forks a child per snippet. Trainer (asyncio) and zygote talk over a unix socketpair:
    trainer -> zygote   request id, seed, and two file descriptors: the snippet's text, an empty output file
    zygote  -> trainer  request id, exit code, seconds, CPU seconds, peak memory
The zygote keeps the queue, the deadlines and the exit codes: a trainer whose event loop is blocked for
seconds by a GPU step neither delays nor falsifies a time limit, and nothing that a snippet prints can be
taken for its status. Output goes to an anonymous file: no pipe to fill up, nothing to unpickle.

Covered: endless loops (in C code too), output floods, memory and recursion blow-ups, crashes of the
interpreter, left-over threads and processes of the snippet's process group, state leaking between snippets
inside the interpreter, the trainer's environment variables, a killed or frozen zygote, a killed trainer, a
cancelled task. The same code and seed give the same text (clocks, os.urandom, object addresses and the
moment at which a time limit falls aside).
NOT covered yet: a hostile policy. Files can be read, and written where this user may; the network is open;
a snippet may signal or trace this user's other processes, leave its process group, fork without bound, fill
the disk with many files, and read the zygote's memory. Those layers belong into `confine`.
The limit is wall time, so a loaded host may time out what an idle one would finish.
macOS (Python 3.13 or later) is for development only: no memfd, no address-space limit, no death signal.

    python sandbox.py        # self-check, and snippets per second against a fresh interpreter for each
"""
import ast, asyncio, atexit, collections, contextlib, ctypes, dataclasses, gc, io, itertools  # noqa: E401
import json, linecache, math, os, random, resource, select, signal, socket, struct  # noqa: E401
import subprocess, sys, tempfile, threading, time, traceback, types, warnings  # noqa: E401

LINUX = sys.platform == "linux"
SNIPPET = "snippet.py"                 # the file name that a snippet sees in its own tracebacks
OUTPUT_BYTES = 1 << 20                 # a snippet that prints this much is stopped: status output_limit
MEMORY_RESERVE = 64 << 20              # bytes beyond memory_mb, released only to report a MemoryError
MAX_FRAMES = 6                         # traceback frames shown
MAX_IN_FLIGHT = 128                    # requests inside the zygote: 2 descriptors each, well below 1024
FROZEN_SECONDS = 30.0                  # a zygote silent this long past a time limit, or at start, is replaced
REQUEST = struct.Struct("=Qq?")        # request id, seed, True to cancel the request of that id
REPLY = struct.Struct("=Qi?ddd")       # request id, exit code, timed out, wall s, CPU s, peak memory in MiB
ENVIRONMENT = {"PATH": os.defpath, "HOME": "/", "LANG": "C.UTF-8", "PYTHONHASHSEED": "0",
               "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}


@dataclasses.dataclass
class SandboxResult:
    """What one snippet did.

    status: ok | error | timeout | output_limit | killed | sandbox_error. The last is the sandbox's own fault:
        drop the rollout, never score it, never show it to the model.
    output: text for the model: at most output_chars characters, plus a count and a notice in brackets.
    seconds: wall time from fork to exit. cpu_seconds: user + system time.
    max_rss_mb: peak resident MiB; the 60 or so shared with the zygote count too.
    """
    status: str
    output: str
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    max_rss_mb: float = 0.0


# ----------------------------------------------------------------------------------------------------------
# The trainer's side


def anonymous_file(content=b""):
    """An open file without a name that holds `content`: memfd on Linux. Elsewhere an unlinked temporary file,
    for development only (it is on disk)."""
    file = open(os.memfd_create("snippet"), "w+b", 0) if LINUX else tempfile.TemporaryFile(buffering=0)
    file.write(content)
    return file


def feedback(raw, exit_code, timed_out, timeout, output_chars):
    """(status, text for the model) of a finished process, from its output bytes and its exit code (minus the
    signal's number if one killed it). Numbers that differ from run to run must not enter the text."""
    text = raw.decode("utf-8", "backslashreplace")
    if len(text) > output_chars:
        head, tail = text[:output_chars // 2], text[len(text) - (output_chars + 1) // 2:]
        text = f"{head}\n[... {len(text) - output_chars} characters dropped ...]\n{tail}"
    if (timed_out and exit_code == -signal.SIGKILL) or exit_code == -signal.SIGXCPU:
        status, notice = "timeout", f"[timed out after {timeout} s]"
    elif exit_code < 0:
        names = {s.value: s.name for s in signal.Signals}      # most real-time signals have no name
        status, notice = "killed", f"[killed by {names.get(-exit_code, f'signal {-exit_code}')}]"
    elif len(raw) >= OUTPUT_BYTES:
        status, notice = "output_limit", f"[output limit of {OUTPUT_BYTES} bytes reached]"
    elif exit_code == 0:
        status, notice = "ok", "" if text else "[no output: use print(...) to see a result]"
    else:                # 1 is an exception or sys.exit, described by the child; others are os._exit
        status, notice = "error", "" if exit_code == 1 and text else f"[exit code {exit_code}]"
    return status, text + ("\n" if notice and text and not text.endswith("\n") else "") + notice


class Sandbox:
    """A pool of `workers` snippets at a time, for one event loop: `async with Sandbox() as sandbox`.

    timeout: wall seconds per snippet, counted from its fork and not from the call of run().
    memory_mb: address space in MiB above what the zygote has mapped.
    output_chars: characters of output kept, half from the head and half from the tail.
    Entering runs an empty snippet, and raises RuntimeError when that fails.
    """

    def __init__(self, workers=2, timeout=1.0, memory_mb=512, output_chars=2000):
        assert workers >= 1 and timeout > 0 and memory_mb > 0 and output_chars >= 0
        self.workers, self.timeout = workers, timeout
        self.memory_mb, self.output_chars = memory_mb, output_chars
        self.process = self.socket = None                     # the zygote; socket is None while there is none
        self.closed = True

    async def __aenter__(self):
        self.loop = asyncio.get_running_loop()
        self.slots = asyncio.Semaphore(max(MAX_IN_FLIGHT, 2 * self.workers))
        self.ids = itertools.count()
        self.futures = {}                                    # request id -> future of its reply, None if lost
        self.closed = False
        try:
            probe = await self.run("")
            if probe.status == "sandbox_error":
                raise RuntimeError(f"the sandbox does not start: {probe.output} (see standard error)")
        except BaseException:                                  # a cancellation too must not leave a process
            await self.__aexit__()
            raise
        return self

    async def __aexit__(self, *exc_info):
        self.closed = True
        self._stop(grace=5.0)

    async def run(self, code, seed=0):
        """Run `code` (str) with the generators of random, numpy and sympy seeded by `seed` (64-bit, signed).
        Returns a SandboxResult; RuntimeError outside `async with`. Cancelling the task kills the snippet."""
        async with self.slots:
            result = await self._attempt(code, seed)
            if result.status == "sandbox_error":               # most likely a neighbour's doing: once more
                result = await self._attempt(code, seed)
            return result

    async def _attempt(self, code, seed):
        if self.closed:
            raise RuntimeError("the sandbox is closed: use it inside `async with`")
        if self.socket is None:
            self._start()
        if not self.futures:
            self.heard = self.loop.time()                      # an idle zygote owes nobody a sign of life
        request_id, future = next(self.ids), self.loop.create_future()
        patience = self.timeout + FROZEN_SECONDS
        source = code.encode("utf-8", "surrogatepass")
        with anonymous_file(source) as source_file, anonymous_file() as output_file:
            self.futures[request_id] = future
            try:
                self._send(request_id, seed, False, [source_file.fileno(), output_file.fileno()])
                while not future.done():
                    await asyncio.wait([future], timeout=patience)
                    # Some snippet ends at least every `timeout` seconds: silence means a frozen zygote. After
                    # a blocked event loop replies are read before timers run: our lateness does not count.
                    if not future.done() and self.loop.time() - self.heard > patience:
                        self._stop(grace=0)
            finally:
                del self.futures[request_id]
                if not future.done():                          # this task was cancelled
                    self._send(request_id, 0, True, [])
            raw = os.pread(output_file.fileno(), OUTPUT_BYTES, 0)
        if future.result() is None:
            return SandboxResult("sandbox_error", f"[sandbox error: the zygote died] {raw[-2000:]!r}")
        exit_code, timed_out, *usage = future.result()
        return SandboxResult(*feedback(raw, exit_code, timed_out, self.timeout, self.output_chars), *usage)

    def _start(self):
        """Start a zygote; requests may be sent at once, they wait in the socket for its imports to end."""
        # Message boundaries keep descriptors with their request; on macOS, the fixed record sizes do that.
        kind = socket.SOCK_SEQPACKET if LINUX else socket.SOCK_STREAM
        ours, theirs = socket.socketpair(socket.AF_UNIX, kind)
        for end in (ours, theirs):
            end.setblocking(False)
            end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)    # room for all that is in flight
        config = {"workers": self.workers, "timeout": self.timeout, "memory_mb": self.memory_mb,
                  "trainer_pid": os.getpid()}
        # Not `python -I`: that would ignore PYTHONHASHSEED. The environment is clean as it is, -s leaves out
        # the user's site-packages, and the zygote drops this file's folder from sys.path. A session of its
        # own, because Ctrl-C in the trainer's terminal must not reach it.
        command = [sys.executable, "-s", os.path.abspath(__file__), "--zygote", str(theirs.fileno())]
        with theirs:
            self.process = subprocess.Popen(
                [*command, json.dumps(config)], env=ENVIRONMENT, cwd="/", pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, start_new_session=True)
        self.socket, self.heard = ours, self.loop.time()
        self.loop.add_reader(self.socket, self._on_readable)

    def _send(self, request_id, seed, cancel, fds):
        try:
            socket.send_fds(self.socket, [REQUEST.pack(request_id, seed, cancel)], fds)
        except OSError:                                        # it died, or is frozen and its buffer is full
            self._stop(grace=0)

    def _on_readable(self):
        try:
            message = self.socket.recv(REPLY.size)
        except ConnectionError:                                # it died with requests unread
            message = b""
        if not message:
            return self._stop(grace=0)
        self.heard = self.loop.time()
        request_id, *reply = REPLY.unpack(message)
        future = self.futures.get(request_id)                  # None: its task was cancelled
        if future is not None and not future.done():
            future.set_result(reply)

    def _stop(self, grace):
        """End the zygote: `grace` seconds to kill and reap its snippets, then SIGKILL (their death signal
        ends them). Whoever waits for a reply gets None."""
        if self.socket is None:
            return
        self.loop.remove_reader(self.socket)
        self.socket.close()                                    # the zygote reads an end of file
        self.socket = None
        try:
            self.process.wait(grace)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        for future in self.futures.values():
            if not future.done():
                future.set_result(None)


# ----------------------------------------------------------------------------------------------------------
# The zygote's side


@dataclasses.dataclass
class Job:
    pid: int
    started_at: float                                          # time.monotonic() at the fork, seconds
    deadline: float                                         # infinite once it has passed and the kill is sent


def die_with_parent(parent_pid):
    """Linux: SIGKILL for this process when its parent goes. Trap: "parent" is the thread that forked it."""
    if LINUX:
        if LIBC.prctl(1, *(ctypes.c_ulong(n) for n in (signal.SIGKILL, 0, 0, 0))) != 0:     # PR_SET_PDEATHSIG
            raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")
        if os.getppid() != parent_pid:                         # it went before the call
            os._exit(1)


def zygote_main(sock, config):
    """Import and warm what snippets use, then serve until the trainer closes its end of the socket."""
    global LIBC, numpy, sympy                                  # only here: the trainer imports none of them
    LIBC = ctypes.CDLL(None, use_errno=True)
    die_with_parent(config["trainer_pid"])
    # The usual 1024 is few for many workers; "unlimited" makes closerange() below crawl on an old kernel.
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    soft = 4096 if hard == resource.RLIM_INFINITY else min(hard, 4096)
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    sys.path.pop(0)                                           # this file's folder: no `import` of the trainer
    os.chdir("/proc" if LINUX else "/")                        # relative writes fail there, even for root
    # Without these few calls each snippet would pay for what numpy and sympy import or allocate lazily.
    import cmath, decimal, fractions, functools, heapq, re, statistics, string  # noqa: E401, F401
    import numpy, numpy.fft, numpy.linalg, numpy.random, sympy  # noqa: E401
    numpy.linalg.solve(numpy.eye(64) @ numpy.eye(64), numpy.ones(64))
    x = sympy.Symbol("x")
    str([sympy.solve(sympy.sympify("x**2 - 2"), x), sympy.integrate(sympy.sin(x) ** 2, x),
         sympy.factorint(360), sympy.simplify((x ** 2 - 1) / (x - 1)), sympy.N(sympy.pi, 20)])
    # The settings that are the same for all snippets.
    sys.argv = [SNIPPET]
    sys.set_int_max_str_digits(50_000)
    sys.setrecursionlimit(1000)
    warnings.formatwarning = lambda text, kind, *_: f"{kind.__name__}: {text}\n"         # no host path
    threading.excepthook = lambda args: print(describe(args.exc_value), end="", file=sys.stderr)
    if LINUX:
        with open("/proc/self/statm") as statm:
            mapped = int(statm.read().split()[0]) * resource.getpagesize()
        config["address_space"] = mapped + (config["memory_mb"] << 20)
    config["zygote_pid"] = os.getpid()
    gc.disable()                                               # a collection would un-share all pages
    gc.freeze()
    serve(sock, config)


def serve(sock, config):
    """The loop: reap, kill at deadlines, take requests, fork. An OSError here ends the zygote with a message
    on standard error, and the trainer's side starts another."""
    wake_r, wake_w = os.pipe()
    os.set_blocking(wake_r, False)
    os.set_blocking(wake_w, False)
    signal.set_wakeup_fd(wake_w, warn_on_full_buffer=False)    # a child's end wakes select()
    signal.signal(signal.SIGCHLD, lambda *_: None)
    queue = collections.OrderedDict()                          # request id -> seed, code fd, output fd
    jobs = {}                                                  # request id -> Job
    while True:
        deadline = min((job.deadline for job in jobs.values()), default=math.inf)
        wait = None if deadline == math.inf else max(0.0, deadline - time.monotonic())
        readable, _, _ = select.select([sock, wake_r], [], [], wait)
        if wake_r in readable:
            os.read(wake_r, 4096)
        for request_id, job in list(jobs.items()):
            # WNOWAIT: looks without reaping, for the pid must stay taken until its group has been killed
            if os.waitid(os.P_PID, job.pid, os.WEXITED | os.WNOWAIT | os.WNOHANG):
                sock.send(REPLY.pack(request_id, *reap(jobs.pop(request_id))))
            elif time.monotonic() >= job.deadline:
                job.deadline = math.inf
                kill_group(job.pid)
        while sock in readable:
            try:
                message, fds, _, _ = socket.recv_fds(sock, REQUEST.size, 2)
            except BlockingIOError:
                break
            except ConnectionError:                            # closed with replies unread
                message = b""
            if not message:                                    # the trainer closed, or died
                for job in jobs.values():
                    reap(job)
                return
            request_id, seed, cancel = REQUEST.unpack(message)
            if not cancel:
                assert len(fds) == 2, "a request lost its descriptors: too many open files?"
                queue[request_id] = seed, *fds
            elif request_id in queue:
                for fd in queue.pop(request_id)[1:]:
                    os.close(fd)
            elif request_id in jobs:
                kill_group(jobs[request_id].pid)
        while queue and len(jobs) < config["workers"]:
            request_id, (seed, code_fd, output_fd) = queue.popitem(last=False)
            started_at = time.monotonic()
            pid = os.fork()
            if pid == 0:
                run_child(config, seed, code_fd, output_fd)    # never returns
            os.close(code_fd)
            os.close(output_fd)
            jobs[request_id] = Job(pid, started_at, started_at + config["timeout"])


def kill_group(pid):
    """SIGKILL for a child that is not reaped yet, and for all processes of its group."""
    os.kill(pid, signal.SIGKILL)                               # it may not have made its own group yet
    with contextlib.suppress(ProcessLookupError, PermissionError):       # no group; macOS: only zombies in it
        os.killpg(pid, signal.SIGKILL)


def reap(job):
    """End what is left of a snippet: exit code, timed out, wall seconds, CPU seconds, peak memory in MiB."""
    kill_group(job.pid)
    _, wait_status, usage = os.wait4(job.pid, 0)
    seconds, cpu_seconds = time.monotonic() - job.started_at, usage.ru_utime + usage.ru_stime
    max_rss_mb = usage.ru_maxrss / (2**10 if LINUX else 2**20)              # macOS counts bytes
    return os.waitstatus_to_exitcode(wait_status), job.deadline == math.inf, seconds, cpu_seconds, max_rss_mb


# ----------------------------------------------------------------------------------------------------------
# The snippet's side: the forked child


def confine(config):
    """Every restriction of a snippet, set in the child just before its code runs. Raises OSError, ValueError.
    The descriptors, the environment, stdin = /dev/null and the working folder are already the snippet's.
    Further layers (Landlock, seccomp) go at the end, seccomp last because it forbids the others."""
    os.setsid()                                             # own session and process group, killed as a whole
    die_with_parent(config["zygote_pid"])
    cpu_seconds = math.ceil(config["timeout"]) + 1             # a backstop; the zygote's deadline comes first
    limits = {"RLIMIT_CORE": (0, 0), "RLIMIT_FSIZE": (OUTPUT_BYTES, OUTPUT_BYTES), "RLIMIT_NOFILE": (64, 64),
              "RLIMIT_CPU": (cpu_seconds, cpu_seconds + 1)}
    if LINUX:
        limits["RLIMIT_AS"] = (config["address_space"], config["address_space"] + MEMORY_RESERVE)
    for name, limit in limits.items():
        resource.setrlimit(getattr(resource, name), limit)


def run_child(config, seed, code_fd, output_fd):
    """Runs in the forked child and ends it whatever happens: nothing may return into the zygote's loop."""
    exit_code = 1
    try:
        try:
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            source = os.pread(code_fd, os.fstat(code_fd).st_size, 0)
            os.dup2(output_fd, 1)
            os.dup2(output_fd, 2)
            os.closerange(3, os.sysconf("SC_OPEN_MAX"))        # the socket, and the files of queued snippets
            confine(config)
        except BaseException:
            # Our own fault. An exit code that says so could be forged by a snippet, so the zygote goes too:
            # the trainer's side sees that, and finds this text in the output file.
            emit(traceback.format_exc())
            os.kill(config["zygote_pid"], signal.SIGKILL)
        else:
            exit_code = run_snippet(source.decode("utf-8", "surrogatepass"), seed)
    finally:
        os._exit(exit_code)


def emit(text):
    """Append to the output on a new line, past any buffer or replacement of sys.stdout."""
    with contextlib.suppress(OSError):                        # the output is full: its size tells the trainer
        size = os.fstat(1).st_size
        if size and os.pread(1, 1, size - 1) != b"\n":
            text = "\n" + text
        os.write(1, text.encode("utf-8", "backslashreplace"))


def run_snippet(code, seed):
    """Execute `code` as a script of its own. Returns the exit code: 1 after an exception, already printed."""
    gc.freeze()                                             # counters to zero: collections at the same points
    gc.enable()
    random.seed(seed)
    numpy.random.seed(seed % 2**32)
    sympy.core.random.seed(seed)                           # its own generator, seeded by the system at import
    # Line-buffered: what was printed before a kill is in the file. A lone surrogate must not raise.
    out = open(1, "w", buffering=1, encoding="utf-8", errors="backslashreplace", closefd=False)
    sys.stdout = sys.stderr = sys.__stdout__ = sys.__stderr__ = out
    main = sys.modules["__main__"] = types.ModuleType("__main__")          # pickle and dataclasses look it up
    # Universal newlines as in the tokenizer; splitlines() would also split at form feeds and shift the lines.
    linecache.cache[SNIPPET] = (len(code), None, io.StringIO(code, newline=None).readlines(), SNIPPET)
    exit_code = 0
    try:
        tree = ast.parse(code, SNIPPET)
        last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
        exec(compile(tree, SNIPPET, "exec", dont_inherit=True), main.__dict__)
        if last is not None:                                # a trailing expression is echoed as in a notebook
            echo = compile(ast.Expression(last.value), SNIPPET, "eval", dont_inherit=True)
            value = eval(echo, main.__dict__)
            if value is not None:
                print(repr(value))
    except SystemExit as stop:
        if stop.code is not None and stop.code != 0:
            exit_code = 1
            message = f"[exit code {stop.code}]" if isinstance(stop.code, int) else stop.code
            print(message, file=sys.stderr)
    except BaseException as error:                       # all that a snippet can raise: KeyboardInterrupt too
        exit_code = 1
        if LINUX:                                          # after a MemoryError there is no room to format it
            hard = resource.getrlimit(resource.RLIMIT_AS)[1]
            resource.setrlimit(resource.RLIMIT_AS, (hard, hard))
        message = describe(error)
        with contextlib.suppress(OSError, ValueError):         # the output is full; the snippet closed it
            out.flush()
        emit(message)
    # What the interpreter does at its end and os._exit leaves out. _shutdown and not Thread.join: it also
    # wakes the idle workers of an executor that was never shut down.
    threading._shutdown()
    atexit._run_exitfuncs()
    with contextlib.suppress(OSError, ValueError):
        out.flush()
    return exit_code


def describe(error):
    """Traceback text: the snippet's own frames only, the last MAX_FRAMES of them, and no path of the host."""
    frames = [(frame, line) for frame, line in traceback.walk_tb(error.__traceback__)
              if frame.f_code.co_filename == SNIPPET]
    dropped = f", {len(frames) - MAX_FRAMES} frames dropped" if len(frames) > MAX_FRAMES else ""
    lines = [f"Traceback (most recent call last{dropped}):\n"] if frames else []
    lines += traceback.StackSummary.extract(iter(frames[-MAX_FRAMES:])).format()
    text = "".join(lines + traceback.format_exception_only(type(error), error))
    for folder in sorted(filter(None, sys.path), key=len, reverse=True):  # "cannot import ... (/usr/lib/...)"
        text = text.replace(folder + "/", "")
    return text


# ----------------------------------------------------------------------------------------------------------
# The slow twin, and the check


def run_fresh_interpreter(code, timeout=10.0, output_chars=2000):
    """The slow twin: a new interpreter that imports numpy and sympy for this one snippet. Blocks; `seconds`
    counts the imports; CPU and memory are not measured. No seed, no echo of a trailing expression, no memory
    or output limit, Python's own traceback; `code` travels as an argument, so at most 128 KiB."""
    boot = "import sys, numpy, sympy; exec(compile(sys.argv[1], 'snippet.py', 'exec'))"
    begin, timed_out = time.monotonic(), False
    with anonymous_file() as output_file:
        process = subprocess.Popen([sys.executable, "-s", "-c", boot, code], env=ENVIRONMENT, cwd="/",
                                   stdin=subprocess.DEVNULL, stdout=output_file, stderr=subprocess.STDOUT)
        try:
            process.wait(timeout)
        except subprocess.TimeoutExpired:
            timed_out = True
            process.kill()
            process.wait()
        raw = os.pread(output_file.fileno(), OUTPUT_BYTES, 0)
    status, text = feedback(raw, process.returncode, timed_out, timeout, output_chars)
    return SandboxResult(status, text, time.monotonic() - begin)


async def self_check():
    checks = [("ok", "import sympy\nx = sympy.Symbol('x')\nsympy.integrate(x**2, x)"), ("ok", "x = 1"),
              ("error", "print('before')\n1 / 0"), ("error", "x = = 1"), ("error", "x = [0] * 10**10"),
              ("timeout", "print('partial')\nwhile True: pass"), ("timeout", "pow(3, 10**9)"),
              ("output_limit", "while True: print('flood ' * 100)"), ("killed", "import os; os.abort()")]
    trivial, begin = "print(1 + 1)", time.monotonic()
    async with Sandbox(workers=os.cpu_count()) as sandbox:
        print(f"first start: {time.monotonic() - begin:.2f} s")
        for expected, code in checks:
            result = await sandbox.run(code)
            print(f"{result.status:12s} {result.seconds * 1000:6.0f} ms  {code[:40]!r} -> "
                  f"{result.output[-50:]!r}")
            assert result.status == expected, f"expected {expected}, got {result}"
        begin = time.monotonic()
        results = [await sandbox.run(trivial) for _ in range(200)]
        alone = 200 / (time.monotonic() - begin)
        begin = time.monotonic()
        results += await asyncio.gather(*(sandbox.run(trivial) for _ in range(400)))
        together = 400 / (time.monotonic() - begin)
    begin = time.monotonic()
    results += [run_fresh_interpreter(trivial) for _ in range(5)]
    fresh = 5 / (time.monotonic() - begin)
    assert {(r.status, r.output) for r in results} == {("ok", "2\n")}
    print(f"{trivial}: {alone:.0f} per second one at a time, {together:.0f} with {os.cpu_count()} workers; "
          f"fresh interpreter {fresh:.1f} one at a time, so {alone / fresh:.0f} times slower")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--zygote"]:
        zygote_main(socket.socket(fileno=int(sys.argv[2])), json.loads(sys.argv[3]))
    else:
        asyncio.run(self_check())
