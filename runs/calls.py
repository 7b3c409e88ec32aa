"""Problems whose solutions take one, two and three calls, as files: traces.jsonl, executed and
checked as the embedded ones are, train.jsonl, and a test file for each number of calls. The third
kind is not among the embedded families.

    python runs/calls.py FOLDER [SEED]
"""
import asyncio
import json
import random
import sys
import zlib
from pathlib import Path

import sympy

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from data import (  # noqa: E402
    divisor_then_power,
    power_remainder,
    prime_then_power,
    problem_row,
    tool_call,
    write_problem,
)
from sandbox import Sandbox  # noqa: E402
from sft import check_trace  # noqa: E402


def then_divisors(family):
    """A family of two calls, made longer by a third: how many divisors has its answer?"""
    def longer(draw):
        # Zero has no number of divisors: draw again.
        answer = 0
        while answer == 0:
            operands, by_hand, by_code, answer = family(draw)

        divisors = sympy.divisors(answer)
        listed = ", ".join(map(str, divisors))
        by_hand += f"\nIts divisors are {listed}."

        script = f"r={answer}\nprint(sum(r%d==0 for d in range(1,r+1)))"
        by_code += "Now the divisors.\n"
        by_code += tool_call(script, len(divisors))
        return operands, by_hand, by_code, len(divisors)

    longer.phrasings = [
        question + " Call it r. How many divisors does r have?" for question in family.phrasings]
    return longer


# The families by the number of calls that their solutions take.
FAMILIES = {
    1: [power_remainder],
    2: [divisor_then_power, prime_then_power],
    3: [then_divisors(divisor_then_power), then_divisors(prime_then_power)],
}


def problem(calls, seed, is_test):
    """The Problem of a seed, whose solution takes so many calls; its family is named after them."""
    rng = random.Random(seed)
    while True:
        family = rng.choice(FAMILIES[calls])
        operands, by_hand, by_code, answer = family(rng.randint)

        # A tenth, by hash, is kept for the test.
        key = f"{calls}{operands}"
        in_test = zlib.crc32(key.encode()) % 10 == 0
        if in_test == is_test:
            break

    written = write_problem(rng, family, operands, by_hand, by_code, answer)
    return written._replace(family=f"calls_{calls}")


def write_jsonl(path, rows):
    with open(path, "w") as file:
        for row in rows:
            file.write(json.dumps(row) + "\n")


async def write_files(folder, seed, trace_problems, problem_files):
    """Write into a folder traces.jsonl, a response to each of trace_problems, executed and checked;
    and NAME.jsonl for each of problem_files, {NAME: problems}."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)

    # A share of about 0.55 is solved with code, the rest by hand.
    rng = random.Random(seed)
    candidates = []
    for solved in trace_problems:
        with_code = rng.random() < 0.55
        candidates.append(solved.by_code if with_code else solved.by_hand)

    async def trace(solved, candidate):
        response, failed_calls, _ = await check_trace(candidate, solved.answer, sandbox)
        return problem_row(solved) | {"response": response, "failed_calls": failed_calls}

    async with Sandbox(workers=2, timeout=0.5) as sandbox:
        checks = map(trace, trace_problems, candidates)
        traces = await asyncio.gather(*checks)

    write_jsonl(folder / "traces.jsonl", traces)
    for name, problems in problem_files.items():
        write_jsonl(folder / f"{name}.jsonl", map(problem_row, problems))


async def main(folder, seed="0"):
    # One, two and three calls in turn.
    trace_problems = [problem(1 + i % 3, f"{seed}/traces/{i}", False) for i in range(6000)]

    files = {"train": [problem(1 + i % 3, f"{seed}/train/{i}", False) for i in range(6144)]}
    for calls in FAMILIES:
        files[f"calls_{calls}"] = [problem(calls, f"test/{i}", True) for i in range(128)]

    await write_files(folder, seed, trace_problems, files)


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
