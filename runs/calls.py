"""Problems whose solutions take one, two and three calls, as files: traces.jsonl, executed and checked as the
embedded ones are, train.jsonl, and a test file for each number of calls. The third kind is not among the embedded families.

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
from data import divisor_then_power, power_remainder, prime_then_power, tool_call  # noqa: E402
from sandbox import Sandbox  # noqa: E402
from sft import check_trace  # noqa: E402


def then_divisors(family):
    """A family of two calls, made longer: how many divisors has its answer?"""
    def longer(draw):
        answer = 0
        while answer == 0:  # which has no number of divisors
            operands, by_hand, by_code, answer = family(draw)
        found = sympy.divisors(answer)
        code = by_code + "Now the divisors.\n" + tool_call(
            f"r={answer}\nprint(sum(r%d==0 for d in range(1,r+1)))", len(found))
        return operands, f"{by_hand}\nIts divisors are {', '.join(map(str, found))}.", code, len(found)

    longer.__doc__ = "\n".join(line.rstrip() + " Call it r. How many divisors does r have?"
                               for line in family.__doc__.strip().splitlines())
    return longer


FAMILIES = {1: [power_remainder], 2: [divisor_then_power, prime_then_power],
            3: [then_divisors(divisor_then_power), then_divisors(prime_then_power)]}


def problem(calls, seed, is_test):
    """{"question", "answer", "family"} and two responses: by hand, with code."""
    rng = random.Random(seed)
    while True:
        family = rng.choice(FAMILIES[calls])
        operands, by_hand, by_code, answer = family(lambda low, high: rng.randint(low, high))
        if (zlib.crc32(f"{calls}{operands}".encode()) % 10 == 0) != is_test:  # a tenth is kept for the test
            continue
        code = by_code if calls > 1 else tool_call(by_code, answer)
        question = rng.choice(family.__doc__.strip().splitlines()).strip().format(*operands)
        final = f"<answer>\\boxed{{{answer}}}</answer>"
        return ({"question": question, "answer": str(answer), "family": f"calls_{calls}"},
                f"{by_hand}\n{final}", f"Let me compute this.\n{code}{final}")


async def main(folder, seed="0"):
    Path(folder).mkdir(parents=True, exist_ok=True)

    def write(name, rows):
        with open(f"{folder}/{name}.jsonl", "w") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)

    async def trace(i, chosen):
        row, *responses = problem(1 + i % 3, f"{seed}/traces/{i}", False)
        response, failed, _ = await check_trace(responses[chosen], row["answer"], sandbox)
        return row | {"response": response, "failed_calls": failed}

    rng = random.Random(seed)
    async with Sandbox(workers=2, timeout=0.5) as sandbox:
        write("traces", await asyncio.gather(*(trace(i, rng.random() < 0.55) for i in range(6000))))
    write("train", [problem(1 + i % 3, f"{seed}/train/{i}", False)[0] for i in range(6144)])
    for calls in FAMILIES:
        write(f"calls_{calls}", [problem(calls, f"test/{i}", True)[0] for i in range(128)])


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
