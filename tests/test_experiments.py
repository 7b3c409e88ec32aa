"""Are the findings what the committed outputs say?"""
import importlib.util
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_the_archived_findings_are_made_of_the_committed_outputs(tmp_path):
    """Guards against numbers typed in by hand, and tables of an earlier set of runs."""
    command = [sys.executable, ROOT / "runs" / "archive.py", ROOT / "results" / "archive" / "experiments", tmp_path]
    made = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert made == (ROOT / "results" / "archive" / "RESULTS.md").read_text()
    figures = list(tmp_path.iterdir())
    assert figures and all((ROOT / "results" / "archive" / "figures" / f.name).read_text() == f.read_text() for f in figures)


def test_an_archived_gain_is_paired_by_problem_and_seed():
    """Guards against a difference of means over other problems, or over seeds that only one side has."""
    spec = importlib.util.spec_from_file_location("archive", ROOT / "runs" / "archive.py")
    archive = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(archive)

    def run(*right):
        return {"evaluations": {"test after": {"per_problem": [(2, n) for n in right]}}}

    base = {1: run(0, 1, 2), 2: run(0, 0, 0)}
    assert archive.paired({1: run(1, 2, 2), 3: run(2, 2, 2)}, base).startswith("+33.3 (")
    assert archive.paired({1: run(0, 1, 2)}, base) == "+0.0 (+0.0 to +0.0)"
    assert archive.paired({3: run(0, 0, 0)}, base) == archive.paired(base, base) == "-"
    assert archive.spread([0.5, None, 1.0]) == "75.0 [50.0, 100.0]"
