"""A task that is not mathematics, as files: problems about words, lists, dates and tables, and traces of
their solutions, executed and checked as the embedded ones are.

    python runs/words.py FOLDER [SEED]      # traces, train, test, ood_large and ood_families .jsonl
    python sft.py --traces FOLDER/traces.jsonl
    python ppo.py --model CHECKPOINT --train_data FOLDER/train.jsonl --eval_data FOLDER/test.jsonl ...

A family is a function of draw(low, high, is_size=True), as in data.py; is_size is False for choices such as a
letter or a month, which are no longer in ood_large.
"""
import asyncio
import datetime
import json
import random
import sys
import zlib
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from data import CODE_OPEN, tool_call  # noqa: E402
from sandbox import Sandbox  # noqa: E402
from sft import check_trace  # noqa: E402


def random_word(draw, low, high):
    """Letters with a vowel among them: what the judge takes for a word."""
    letters = [chr(96 + draw(1, 26, False)) for _ in range(draw(low, high))]
    return "".join(letters[:-1]) + "aeiou"[draw(0, 4, False)]


def first_letter(draw):
    word = random_word(draw, 4, 9)
    return (word,), f"It begins with {word[0]}.", f'print("{word}"[0])', word[0]


def reversed_word(draw):
    word = random_word(draw, 4, 9)
    answer = word[::-1]
    text = f"From the end: {', '.join(answer)}. That is {answer}."
    return (word,), text, f'print("{word}"[::-1])', answer


def sorted_letters(draw):
    word = random_word(draw, 4, 9)
    answer = "".join(sorted(word))
    text = f"In order: {', '.join(answer)}. That is {answer}."
    return (word,), text, f'print("".join(sorted("{word}")))', answer


def letter_count(draw):
    word = random_word(draw, 6, 15)
    letter = word[draw(0, 5, False)]
    answer = word.count(letter)
    text = f"The letters are {', '.join(word)}. {letter} occurs {answer} times."
    return (word, letter), text, f'print("{word}".count("{letter}"))', answer


def second_largest(draw):
    found = [draw(10, 999) for _ in range(draw(4, 7))]
    listed, ordered = ", ".join(map(str, found)), sorted(found)
    text = f"In order: {', '.join(map(str, ordered))}. It is {ordered[-2]}."
    return (listed,), text, f"print(sorted([{listed}])[-2])", ordered[-2]


def weekday(draw):
    day = datetime.date(draw(1900, 2099), draw(1, 12, False), draw(1, 28, False))
    first = day.replace(day=1)
    text = f"{first} is a {first:%A}, {day.day - 1} days earlier. So it is a {day:%A}."
    script = f'from datetime import date\nprint(f"{{date({day.year},{day.month},{day.day}):%A}}")'
    return (str(day),), text, script, f"{day:%A}"


def days_between(draw):
    a = datetime.date(draw(1990, 2029, False), draw(1, 12, False), draw(1, 28, False))
    b = a + datetime.timedelta(draw(10, 199))
    answer, year = (b - a).days, datetime.date(a.year, 1, 1)
    text = f"They are day {(a - year).days + 1} and day {(b - year).days + 1} of {a.year}. That is {answer}."
    dates = [f"date({d.year},{d.month},{d.day})" for d in (b, a)]
    return (str(a), str(b)), text, f"from datetime import date\nprint(({'-'.join(dates)}).days)", answer


def table_total(draw):
    rows = [(draw(2, 49), draw(2, 99)) for _ in range(draw(2, 4))]
    table = "; ".join(f"{n} at {price}" for n, price in rows)
    products, parts = [f"{n}*{price}" for n, price in rows], [n * price for n, price in rows]
    text = "\n".join(f"{product} = {part}" for product, part in zip(products, parts))
    text += f"\n{' + '.join(map(str, parts))} = {sum(parts)}"
    return (table,), text, f"print({'+'.join(products)})", sum(parts)


def vowel_count(draw):
    word = random_word(draw, 6, 15)
    answer = sum(letter in "aeiou" for letter in word)
    text = f"The letters are {', '.join(word)}. {answer} are vowels."
    return (word,), text, f'print(sum(c in "aeiou" for c in "{word}"))', answer


def smallest_gap(draw):
    found = sorted(draw(10, 999) for _ in range(draw(4, 7)))
    listed, gaps = ", ".join(map(str, found)), [b - a for a, b in zip(found, found[1:])]
    text = f"The gaps are {', '.join(map(str, gaps))}. The smallest is {min(gaps)}."
    return (listed,), text, f"a=[{listed}]\nprint(min(y-x for x,y in zip(a,a[1:])))", min(gaps)

# The questions of each family; {0}, {1} are its operands.
PHRASINGS = {
    first_letter: ["Which letter does {0} begin with?",
        "Give the first letter of the word {0}."],
    reversed_word: ["Write the word {0} backwards.",
        "What is {0} read from right to left?"],
    sorted_letters: ["Sort the letters of {0} alphabetically.",
        "Put the letters of the word {0} in order."],
    letter_count: ["How often does the letter {1} occur in {0}?",
        "Count the letter {1} in the word {0}."],
    second_largest: ["Which is the second largest entry of the list {0}?",
        "Sort {0}. Which entry is the last but one?"],
    weekday: ["Which day of the week is {0}?",
        "On what weekday does {0} fall?"],
    days_between: ["How many days is it from {0} to {1}?",
        "Count the days between {0} and {1}."],
    table_total: ["A bill lists (number at price): {0}. What is the total?",
        "Add up this order: {0}."],
    vowel_count: ["How many vowels (a, e, i, o, u) has the word {0}?",
        "Count the letters a, e, i, o, u in {0}."],
    smallest_gap: ["What is the smallest gap between neighbours in the list {0}?",
        "By how much do the closest neighbours of {0} differ?"],
}

HELD_OUT_FAMILIES = [vowel_count, smallest_gap]  # never trained on
FAMILIES = [family for family in PHRASINGS if family not in HELD_OUT_FAMILIES]


def problem(split, seed, index):
    """{"question", "answer", "family"}, the operands, and two responses: by hand, with code. A hash of family
    and operands keeps train and test apart; ood_large draws sizes above those of training."""
    rng = random.Random(f"{split}/{seed}/{index}")

    def draw(low, high, is_size=True):
        if is_size and split == "ood_large":
            return rng.randint(high + 1, 3 * high)
        return rng.randint(low, high)

    while True:
        family = rng.choice(HELD_OUT_FAMILIES if split == "ood_families" else FAMILIES)
        operands, by_hand, by_code, answer = family(draw)
        is_test = zlib.crc32(f"{family.__name__}{sorted(operands)}".encode()) % 10 == 0
        if split in ("train", "test") and is_test != (split == "test"):
            continue
        question = rng.choice(PHRASINGS[family]).format(*operands)
        final = f"<answer>\\boxed{{{answer}}}</answer>"
        code = by_code if CODE_OPEN in by_code else tool_call(by_code, answer)
        row = {"question": question, "answer": str(answer), "family": family.__name__}
        return row, operands, f"{by_hand}\n{final}", f"Let me compute this.\n{code}{final}"


async def main(folder, seed="0"):
    Path(folder).mkdir(parents=True, exist_ok=True)

    def write(name, rows):
        with open(f"{folder}/{name}.jsonl", "w") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)

    async def trace(index, with_code):
        row, _, by_hand, by_code = problem("train", seed, index)
        candidate = by_code if with_code else by_hand
        response, failed, _ = await check_trace(candidate, row["answer"], sandbox)
        return row | {"response": response, "failed_calls": failed}

    rng = random.Random(seed)
    async with Sandbox(workers=2, timeout=0.5) as sandbox:
        write("traces", await asyncio.gather(*[trace(i, rng.random() < 0.55) for i in range(6000)]))
    write("train", [problem("train", f"{seed}/ppo", i)[0] for i in range(6144)])
    for split in ("test", "ood_large", "ood_families"):
        write(split, [problem(split, 0, i)[0] for i in range(256)])


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
