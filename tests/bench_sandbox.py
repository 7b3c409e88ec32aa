"""Speed of sandbox.py against two twins, in turns on one core. Run: python tests/bench_sandbox.py
With --load instead: idle, and beside processes that keep one core, then two cores, busy.

    a fresh interpreter, which imports numpy and sympy for each snippet: what the zygote saves
    a bare fork of the same prepared process, which does nothing: what the walls cost
"""
import asyncio
import gc
import os
import select
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from sandbox import (  # noqa: E402
    ENVIRONMENT,
    LINUX,
    OUTPUT_BYTES,
    Sandbox,
    SandboxResult,
    anonymous_file,
    prepare,
    status_and_text,
)


def run_fresh_interpreter(code, timeout=10.0, output_chars=2000):
    """The slow twin: a new interpreter that imports numpy and sympy for this one snippet. Blocks; `seconds`
    counts the imports. No seed, no echo of a trailing expression, no memory
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
    status, text = status_and_text(raw, process.returncode, timed_out, timeout, output_chars)
    return SandboxResult(status, text, time.monotonic() - begin)


def bare_fork_main():
    """The fast twin, a lower bound: the prepared process forks children that do nothing. Reads counts, one a
    line, and answers each with the seconds it took."""
    prepare()
    gc.disable()
    gc.freeze()
    for line in sys.stdin:
        begin = time.monotonic()
        for _ in range(int(line)):
            pid = os.fork()
            if pid == 0:
                os._exit(0)
            os.waitpid(pid, 0)
        print(time.monotonic() - begin, flush=True)


async def benchmark(rounds=10, n=50):
    """The report, deadlines, and the three twins in turns on one core; medians over the rounds."""
    async with Sandbox(timeout=0.5) as sandbox:
        print(sandbox.report)
        hanging = [await sandbox.run(code) for code in ["while True: pass", "import time; time.sleep(9)"] * 4]
        assert {r.status for r in hanging} == {"timeout"}
        late = max(abs(r.seconds - 0.5) for r in hanging)
        print(f"deadline of 0.5 s, 4 loops and 4 sleeps in turn: at most {1000 * late:.1f} ms of wall time off "
              "(waiting for a core included)")
    if LINUX:
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})            # inherited by all that follows
    rates, latencies, trainer, code = {"confined": [], "bare fork": [], "fresh": []}, [], 0.0, "print(1 + 1)"
    command = [sys.executable, "-s", os.path.abspath(__file__), "--bare_fork"]
    with subprocess.Popen(command, env=ENVIRONMENT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                          bufsize=1) as twin:
        async with Sandbox(workers=1) as sandbox:
            for _ in range(rounds + 1):                        # the first only warms up
                begin, cpu = time.monotonic(), time.process_time()
                results = []
                for _ in range(n):
                    start = time.monotonic()
                    results.append(await sandbox.run(code))
                    latencies.append(1000 * (time.monotonic() - start))
                rates["confined"].append(n / (time.monotonic() - begin))
                trainer += time.process_time() - cpu
                print(n, file=twin.stdin)
                rates["bare fork"].append(n / float(await asyncio.to_thread(twin.stdout.readline)))
                results.append(await asyncio.to_thread(run_fresh_interpreter, code))
                rates["fresh"].append(1 / results[-1].seconds)
                assert {(r.status, r.output) for r in results} == {("ok", "2\n")}
        twin.stdin.close()
    confined, bare, fresh = (sorted(rate[1:])[rounds // 2] for rate in rates.values())
    latencies = sorted(latencies[n:])
    print(f"{code} on one core, one at a time, median of {rounds} rounds of {n}: {confined:.0f} per second "
          f"with all layers\n  p50 {latencies[len(latencies) // 2]:.1f} ms, "
          f"p99 {latencies[len(latencies) * 99 // 100]:.1f} ms; "
          f"trainer's side {1000 * trainer / (rounds + 1) / n:.2f} ms of CPU each\n"
          f"  {confined / fresh:.0f} times a fresh interpreter that imports numpy and sympy ({fresh:.2f})\n"
          f"  {confined / bare:.2f} times a bare fork of the same prepared process ({bare:.0f})")


def busy_main():
    """A trainer's stand-in: work in pieces of about a millisecond; prints how many when stdin closes."""
    pieces = 0
    while not select.select([0], [], [], 0)[0]:
        sum(range(30_000))
        pieces += 1
    print(pieces)


async def under_load(seconds=5.0, code="print(1 + 1)"):
    """Snippets per second, two at a time, beside 0, 1 and 2 busy processes on two cores, and what those lose:
    pieces of work that they did not do, as seconds of a core, against the snippets' CPU seconds."""
    if LINUX:
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:2])

    def own_cpu():
        """CPU seconds of this process, the zygote, and its children that ended."""
        ticks = Path("/proc", str(sandbox.process.pid), "stat").read_text().rpartition(")")[2].split()[11:15]
        return time.process_time() + sum(map(int, ticks)) / os.sysconf("SC_CLK_TCK")

    async def measure(busy, snippets):
        command = [sys.executable, os.path.abspath(__file__), "--busy"]
        trainers = [subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
                    for _ in range(busy)]
        results, begin, before = [], time.monotonic(), own_cpu()

        async def worker():
            while time.monotonic() - begin < seconds:
                results.append(await sandbox.run(code))

        await asyncio.gather(*[worker() for _ in range(4)] if snippets else [asyncio.sleep(seconds)])
        assert {r.status for r in results} <= {"ok"}
        return (len(results) / (time.monotonic() - begin), own_cpu() - before,
                sum(int(trainer.communicate()[0]) for trainer in trainers))

    async with Sandbox(timeout=0.5) as sandbox:
        idle, _, _ = await measure(0, True)
        print(f"{code}, two at a time on two cores, idle: {idle:.0f} per second")
        for busy in (1, 2):
            _, _, alone = await measure(busy, False)
            rate, cpu, beside = await measure(busy, True)
            print(f"  beside {busy} busy: {rate:.0f} per second, {rate / idle:.2f} of idle; the busy lose "
                  f"{100 * (1 - beside / alone):.0f} % of their work, {seconds * busy * (1 - beside / alone):.1f} s "
                  f"of a core, while snippets, zygote and caller use {cpu:.1f} s of CPU", flush=True)


if __name__ == "__main__":
    if sys.argv[1:] == ["--busy"]:
        busy_main()
    elif sys.argv[1:] == ["--load"]:
        asyncio.run(under_load())
    elif sys.argv[1:] == ["--bare_fork"]:
        bare_fork_main()
    else:
        asyncio.run(benchmark())
