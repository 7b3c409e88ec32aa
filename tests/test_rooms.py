"""Do imports go one way, and are there six rooms?"""
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
