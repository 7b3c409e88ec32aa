"""Is the task of runs/words.py right, and do its splits keep apart?"""
import heapq
import importlib.util
import itertools
import re
import string
from pathlib import Path

import pytest

from data import extract_answer

spec = importlib.util.spec_from_file_location("words", Path(__file__).parents[1] / "runs" / "words.py")
words = importlib.util.module_from_spec(spec)
spec.loader.exec_module(words)
SPLITS = ("train", "test", "ood_large", "ood_families")


@pytest.fixture(scope="module")
def drawn():
    """{split: 400 problems}"""
    return {split: [words.problem(split, 0, i) for i in range(400)] for split in SPLITS}


def slow_day_number(year, month, day):
    """Days since the end of year 0, counted year by year and month by month."""
    leap = lambda y: y % 4 == 0 and (y % 100 > 0 or y % 400 == 0)  # noqa: E731
    months = [31, 28 + leap(year), 31, 30, 31, 30, 31, 31, 30, 31, 30, 31]
    return sum(365 + leap(y) for y in range(1, year)) + sum(months[:month - 1]) + day


def slow_weekday(day):
    names = "Sunday Monday Tuesday Wednesday Thursday Friday Saturday".split()
    return names[slow_day_number(*map(int, day.split("-"))) % 7]


BRUTE_FORCE = {
    "first_letter": lambda word: word[:1],
    "reversed_word": lambda word: "".join(word[i] for i in range(len(word) - 1, -1, -1)),
    "sorted_letters": lambda word: "".join(letter * word.count(letter) for letter in string.ascii_lowercase),
    "letter_count": lambda word, letter: len(word) - len(word.replace(letter, "")),
    "second_largest": lambda listed: heapq.nlargest(2, map(int, listed.split(", ")))[1],
    "weekday": slow_weekday,
    "days_between": lambda a, b: slow_day_number(*map(int, b.split("-"))) - slow_day_number(*map(int, a.split("-"))),
    "table_total": lambda table: sum(sum([int(n)] * int(m)) for n, m in re.findall(r"(\d+) at (\d+)", table)),
    "vowel_count": lambda word: len(re.findall("[aeiou]", word)),
    "smallest_gap": lambda listed: min(abs(a - b) for a, b in itertools.combinations(map(int, listed.split(", ")), 2)),
}


@pytest.mark.parametrize("split", SPLITS)
def test_reference_answers_equal_brute_force(drawn, split):
    """Guards against a wrong reference: RL would reward the mistake."""
    for p in drawn[split]:
        expected = str(BRUTE_FORCE[p.family](*p.operands))
        assert p.answer == expected, p
        assert extract_answer(p.by_hand) == extract_answer(p.by_code) == expected, p


def test_splits_share_no_problem(drawn):
    """Guards against training on the test set, and against larger words that training has seen."""
    keys = {split: {(p.family, p.operands) for p in problems} for split, problems in drawn.items()}
    for a, b in itertools.combinations(SPLITS, 2):
        assert not keys[a] & keys[b], (a, b)
    text = drawn["train"] + drawn["test"]
    longest = {family: max(len(p.operands[0]) for p in text if p.family == family)
               for family in ("first_letter", "letter_count")}
    assert all(len(p.operands[0]) > longest.get(p.family, 0) for p in drawn["ood_large"])
