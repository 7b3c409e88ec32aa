"""A task that is not mathematics, as files: problems about words, lists, dates and tables, and
traces of their solutions, executed and checked as the embedded ones are.

    python runs/words.py FOLDER [SEED]      # traces, train, test, ood_large and ood_families .jsonl
    python sft.py --traces FOLDER/traces.jsonl
    python ppo.py --model CHECKPOINT \\
        --train_data FOLDER/train.jsonl --eval_data FOLDER/test.jsonl ...

A family is a function of draw(low, high, is_size=True), as in data.py. ood_large draws sizes above
the range of training; choices, such as a letter or a month, have is_size False: their range stays.
"""
import asyncio
import datetime
import json
import random
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import sft  # noqa: E402
from data import belongs_to, phrasings, tool_call, write_problem  # noqa: E402
from sandbox import Sandbox  # noqa: E402


def random_word(draw, low, high):
    """Letters with a vowel at the end: what the judge takes for a word."""
    length = draw(low, high)
    letters = [chr(96 + draw(1, 26, is_size=False)) for _ in range(length)]
    letters[-1] = "aeiou"[draw(0, 4, is_size=False)]
    return "".join(letters)


def random_numbers(draw):
    n = draw(4, 7)
    return [draw(10, 999) for _ in range(n)]


def random_date(draw, year):
    month = draw(1, 12, is_size=False)
    day = draw(1, 28, is_size=False)
    return datetime.date(year, month, day)


def joined(values):
    return ", ".join(map(str, values))


@phrasings(
    "Which letter does {0} begin with?",
    "Give the first letter of the word {0}.")
def first_letter(draw):
    word = random_word(draw, 4, 9)
    return (word,), f"It begins with {word[0]}.", f'print("{word}"[0])', word[0]


@phrasings(
    "Write the word {0} backwards.",
    "What is {0} read from right to left?")
def reversed_word(draw):
    word = random_word(draw, 4, 9)
    answer = word[::-1]
    by_hand = f"From the end: {joined(answer)}. That is {answer}."
    return (word,), by_hand, f'print("{word}"[::-1])', answer


@phrasings(
    "Sort the letters of {0} alphabetically.",
    "Put the letters of the word {0} in order.")
def sorted_letters(draw):
    word = random_word(draw, 4, 9)
    answer = "".join(sorted(word))
    by_hand = f"In order: {joined(answer)}. That is {answer}."
    return (word,), by_hand, f'print("".join(sorted("{word}")))', answer


@phrasings(
    "How often does the letter {1} occur in {0}?",
    "Count the letter {1} in the word {0}.")
def letter_count(draw):
    word = random_word(draw, 6, 15)
    letter = word[draw(0, 5, is_size=False)]
    answer = word.count(letter)
    by_hand = f"The letters are {joined(word)}. {letter} occurs {answer} times."
    return (word, letter), by_hand, f'print("{word}".count("{letter}"))', answer


@phrasings(
    "Which is the second largest entry of the list {0}?",
    "Sort {0}. Which entry is the last but one?")
def second_largest(draw):
    numbers = random_numbers(draw)
    listed = joined(numbers)
    ordered = sorted(numbers)
    answer = ordered[-2]
    by_hand = f"In order: {joined(ordered)}. It is {answer}."
    return (listed,), by_hand, f"print(sorted([{listed}])[-2])", answer


@phrasings(
    "Which day of the week is {0}?",
    "On what weekday does {0} fall?")
def weekday(draw):
    day = random_date(draw, year=draw(1900, 2099))
    first = day.replace(day=1)
    by_hand = f"{first} is a {first:%A}, {day.day - 1} days earlier. So it is a {day:%A}."
    by_code = (
        "from datetime import date\n"
        f'print(f"{{date({day.year},{day.month},{day.day}):%A}}")')
    return (str(day),), by_hand, by_code, f"{day:%A}"


@phrasings(
    "How many days is it from {0} to {1}?",
    "Count the days between {0} and {1}.")
def days_between(draw):
    start = random_date(draw, year=draw(1990, 2029, is_size=False))
    answer = draw(10, 199)
    end = start + datetime.timedelta(answer)

    new_year = datetime.date(start.year, 1, 1)
    start_day = (start - new_year).days + 1
    end_day = (end - new_year).days + 1
    by_hand = f"They are day {start_day} and day {end_day} of {start.year}. That is {answer}."

    by_code = (
        "from datetime import date\n"
        f"print((date({end.year},{end.month},{end.day})"
        f"-date({start.year},{start.month},{start.day})).days)")
    return (str(start), str(end)), by_hand, by_code, answer


@phrasings(
    "A bill lists (number at price): {0}. What is the total?",
    "Add up this order: {0}.")
def table_total(draw):
    n_rows = draw(2, 4)
    table = []
    products = []
    totals = []
    for _ in range(n_rows):
        number = draw(2, 49)
        price = draw(2, 99)
        table.append(f"{number} at {price}")
        products.append(f"{number}*{price}")
        totals.append(number * price)
    answer = sum(totals)

    by_hand = ""
    for product, total in zip(products, totals):
        by_hand += f"{product} = {total}\n"
    by_hand += f"{' + '.join(map(str, totals))} = {answer}"
    return ("; ".join(table),), by_hand, f"print({'+'.join(products)})", answer


@phrasings(
    "How many vowels (a, e, i, o, u) has the word {0}?",
    "Count the letters a, e, i, o, u in {0}.")
def vowel_count(draw):
    word = random_word(draw, 6, 15)
    answer = len([letter for letter in word if letter in "aeiou"])
    by_hand = f"The letters are {joined(word)}. {answer} are vowels."
    return (word,), by_hand, f'print(sum(c in "aeiou" for c in "{word}"))', answer


@phrasings(
    "What is the smallest gap between neighbours in the list {0}?",
    "By how much do the closest neighbours of {0} differ?")
def smallest_gap(draw):
    numbers = sorted(random_numbers(draw))
    listed = joined(numbers)
    gaps = [after - before for before, after in zip(numbers, numbers[1:])]
    answer = min(gaps)
    by_hand = f"The gaps are {joined(gaps)}. The smallest is {answer}."
    by_code = f"a=[{listed}]\nprint(min(y-x for x,y in zip(a,a[1:])))"
    return (listed,), by_hand, by_code, answer


FAMILIES = [
    first_letter,
    reversed_word,
    sorted_letters,
    letter_count,
    second_largest,
    weekday,
    days_between,
    table_total,
]
HELD_OUT_FAMILIES = [vowel_count, smallest_gap]  # never trained on


def problem(split, seed, index):
    """Problem number `index` of a split."""
    rng = random.Random(f"{split}/{seed}/{index}")
    families = HELD_OUT_FAMILIES if split == "ood_families" else FAMILIES

    def draw(low, high, is_size=True):
        if is_size and split == "ood_large":
            return rng.randint(high + 1, 3 * high)
        return rng.randint(low, high)

    while True:
        family = rng.choice(families)
        operands, by_hand, script, answer = family(draw)
        if belongs_to(split, family, operands):
            by_code = tool_call(script, answer)
            solved = (operands, by_hand, [(script, True)], answer)
            return write_problem(rng, family, solved, by_code)


async def write_files(folder, seed, trace_problems, files):
    """Write FOLDER/traces.jsonl, half of them solved with code, and the problems of each file."""
    candidates = []
    rng = random.Random(f"{seed}/code")
    for solved in trace_problems:
        with_code = rng.random() < 0.55
        candidates.append(solved.by_code if with_code else solved.by_hand)

    traces = []
    async with Sandbox(timeout=2.0) as sandbox:
        for solved, candidate in zip(trace_problems, candidates):
            response, failed_calls, _ = await sft.check_trace(candidate, solved.answer, sandbox)
            traces.append({
                "question": solved.question, "answer": solved.answer, "family": solved.family,
                "response": response, "failed_calls": failed_calls})

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    rows = {"traces": traces}
    for name, problems in files.items():
        rows[name] = [{"question": p.question, "answer": p.answer, "family": p.family}
                      for p in problems]
    for name, lines in rows.items():
        with open(folder / f"{name}.jsonl", "w") as file:
            file.writelines(json.dumps(line) + "\n" for line in lines)


async def main(folder, seed="0"):
    trace_problems = [problem("train", seed, i) for i in range(6000)]

    files = {"train": [problem("train", f"{seed}/ppo", i) for i in range(6144)]}
    for split in ("test", "ood_large", "ood_families"):
        files[split] = [problem(split, 0, i) for i in range(256)]

    await write_files(folder, seed, trace_problems, files)


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
