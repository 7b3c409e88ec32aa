"""Properties of `data.py curate`. Run: python -m pytest tests/test_curate.py"""
import asyncio
import contextlib
import http.server
import io
import json
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import StubSandbox

import data
import sft
from data import Contamination, Duplicates, UserError, calculator, load_problems, load_traces, read_row
from rollout import encode_text
from sandbox import SandboxResult

ROOT = Path(data.__file__).parent
ANSWER = r"<answer>\boxed{4}</answer>"


def fenced(code, output=""):
    return f"<code>\n```python\n{code}\n```\n</code>\n<interpreter>\n{output}\n</interpreter>\n"


def execute(code):
    """A trusted snippet in this process, as the sandbox would answer."""
    out = io.StringIO()
    try:
        with contextlib.redirect_stdout(out):
            exec(code, {})
    except Exception as error:  # whatever a snippet raises is its output
        return SandboxResult("error", f"{out.getvalue()}{type(error).__name__}: {error}")
    return SandboxResult("ok", out.getvalue())


class Trusted(StubSandbox):
    """In place of data.Sandbox where no snippet is hostile."""

    def __init__(self, *args, **options):
        super().__init__(execute)
        self.counts = Counter()

    async def __aenter__(self):
        return self

    async def __aexit__(self, *exc_info):
        pass


def write(path, rows):
    path.write_text("".join(row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows))
    return path


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def curate_cli(monkeypatch, *arguments):
    """`python data.py curate ...` in this process."""
    monkeypatch.setattr(sys, "argv", ["data.py", "curate", *map(str, arguments)])
    asyncio.run(data.main())


def trace(question, response, answer="4"):
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": response}],
            "answer": answer}


GSM8K = [{"question": f"Ann had {n} boxes in her shop number {n * n} and sold half of them. Bob sold {n + 3} "
                      "more than she did. How many did Bob sell?",
          "answer": f"Ann sold {2 * n}/2 = <<{2 * n}/2={n}>>{n} boxes of fruit.\nSo Bob sold {n} + {n + 3} = "
                    f"<<{n}+{n + 3}={2 * n + 3}>>{2 * n + 3} boxes.\n#### {2 * n + 3}"} for n in range(2, 62)]


# ------------------------------------------------------------------------------------------------------------
# Reading


@pytest.mark.parametrize("row, question, answer, solution, own", [
    ({"question": "Q", "answer": "2+3=<<2+3=5>>5\n#### 5"}, "Q", "5", "2+3=<<2+3=5>>5", "5"),
    ({"question": "Q", "answer": "5"}, "Q", "5", "", None),
    ({"problem": "Q", "solution": r"so \boxed{\frac12}", "level": "3"}, "Q", r"\frac12",
     r"so \boxed{\frac12}", r"\frac12"),
    ({"problem": "Q", "solution": r"so \boxed{7}", "answer": "7", "source": "x"}, "Q", "7", r"so \boxed{7}",
     "7"),
    ({"problem": "Q", "solution": "s", "messages": [{"content": "Q"}, {"content": "s"}], "answer": "7"}, "Q",
     "7", "s", None),
    ({"problem": "Q", "answer": 7}, "Q", "7", "", None),
    ({"prompt": [{"role": "user", "content": "Solve the following math problem step by step. The last line "
                  "of your response should be of the form Answer: $Answer (without quotes).\n\nQ?\n\n"
                  'Remember to put your answer on its own line after "Answer:".'}],
      "reward_model": {"ground_truth": "34", "style": "rule"}}, "Q?", "34", "", None),
    ({"conversations": [{"from": "user", "value": r"Return your final response within \boxed{}. Q"},
                        {"from": "gpt", "value": r"<|begin_of_thought|>hm<|end_of_thought|> \boxed{3}"}]},
     "Q", "3", r"hm \boxed{3}", "3"),
    ({"messages": [{"role": "user", "content": "Solve it.\n\n*user question:*\nAnswer the following Math "
                    "Problem and put the answer in the format of \\boxed{answer}\n\nQ\n\n\nRemember to place "
                    "the final answer in the last part using the format: \n<answer>\n\\boxed{}\n</answer>"},
                   {"role": "assistant", "content": fenced("# #### no\nprint(2+2)", "4") + ANSWER}]},
     "Q", "4", fenced("# #### no\nprint(2+2)", "4") + ANSWER, "4"),
])
def test_layouts_of_real_sets_are_understood(row, question, answer, solution, own):
    """Guards against a prompt's instructions being taken for the question, and #### in code for an answer."""
    assert read_row(row) == {"question": question, "answer": answer, "solution": solution, "own": own}


def test_parquet_and_hub_rows_are_read_through_datasets(tmp_path, monkeypatch):
    """Guards against structs that come back flattened, and hub errors that end in a traceback."""
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    pytest.importorskip("datasets")
    rows = [{"prompt": [{"role": "user", "content": f"Q{i}"}], "reward_model": {"ground_truth": str(i)}}
            for i in range(3)]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "d.parquet")
    assert load_problems(tmp_path / "d.parquet") == [
        {"question": f"Q{i}", "answer": str(i), "family": "d"} for i in range(3)]
    (tmp_path / "broken.parquet").write_text("no parquet")
    with pytest.raises(UserError, match="broken.parquet: cannot be read"):
        load_problems(tmp_path / "broken.parquet")
    with pytest.raises(UserError, match="gone.parquet: no such file"):
        load_problems(tmp_path / "gone.parquet")

    def load_dataset(path, name, split, streaming):
        if path == "some/set":
            return [GSM8K[0]]
        raise ConnectionError(f"Couldn't reach '{path}' on the Hub\nmore")
    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    assert len(load_problems("some/set")) == 1
    with pytest.raises(UserError, match=r"^other/set: cannot be read \(Couldn't reach .* on the Hub\)$"):
        load_problems("other/set")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match="needs the package datasets"):
        load_problems("some/set")


@pytest.mark.parametrize("rows, options, message", [
    ([{"foo": 1, "bar": 2}], [], "unknown layout; found foo, bar. Name the fields with --question_field"),
    ([], [], "unknown layout; found no rows"),
    (GSM8K[:1], ["--question_field", "q"], "unknown layout; found question, answer"),
    (GSM8K[:1] + ["{broken\n"], [], ":2: not JSON"),
    (GSM8K[:1], ["--rewriter", "api"], "needs --model"),
    (GSM8K[:1], ["--agreement", "3"], "--agreement needs"),
    (GSM8K[:1], ["--prompt_template", "nowhere"], "--prompt_template nowhere"),
    (GSM8K[:1], ["--rewriter", "local", "--model", "/nowhere"], "--model /nowhere: cannot be loaded"),
    (GSM8K[:1], ["--decontaminate", "nowhere.jsonl"], "nowhere.jsonl: no such file"),
])
def test_bad_input_is_one_line(tmp_path, monkeypatch, rows, options, message):
    """Guards against tracebacks, and against a set that is silently read as empty."""
    with pytest.raises(UserError) as error:
        curate_cli(monkeypatch, "--input", write(tmp_path / "in.jsonl", rows), "--output",
                   tmp_path / "out.jsonl", *options)
    assert message in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "out.jsonl").exists()


def test_fields_of_an_unknown_layout_can_be_named(tmp_path, monkeypatch):
    """Guards against a mapping that reads nested fields, or the answer inside the solution, wrongly."""
    monkeypatch.setattr(data, "Sandbox", Trusted)
    rows = [{"x": {"q": [row["question"]]}, "text": row["answer"]} for row in GSM8K[:3]]
    curate_cli(monkeypatch, "--input", write(tmp_path / "in.jsonl", rows), "--output", tmp_path / "out.jsonl",
               "--question_field", "x.q.0", "--answer_field", "text", "--solution_field", "text")
    assert [t["answer"] for t in read(tmp_path / "out.jsonl")] == ["7", "9", "11"]


# ------------------------------------------------------------------------------------------------------------
# The calculator


def test_annotations_become_snippets_in_place():
    """Guards against a result that stands in the text before its snippet, and annotations left there."""
    text = calculator(read_row(GSM8K[0]), random.Random(0))
    first, second = fenced("print(4/2)", "2").strip(), fenced("print(2+5)", "7").strip()
    assert re.fullmatch(re.escape(f"Ann sold 4/2 boxes.\n{first}\n") + r"\w[\w ]* is 2 boxes of fruit\."
                        + re.escape(f"\nSo Bob sold 2 + 5 boxes.\n{second}\n") + r"\w[\w ]* is 7 boxes\.\n"
                        + re.escape(r"<answer>\boxed{7}</answer>"), text)


@pytest.mark.parametrize("solution, code, text", [
    ("Weng earns 12/60 = $<<12/60=0.2>>0.2 per minute.", ["print(12/60)"], "is $0.2 per minute."),
    ("She has 3 apples * 2 = <<3*2=6>>6 apples.", ["print(3*2)"], "She has 3 apples * 2.\n"),
    ("Each gets 100/3 = <<100/3=33.33>>33.33 dollars.", ["print(round(100/3, 2))"], "is 33.33 dollars."),
    ("They pay 07*2 = $<<07*2=14>>14.", ["print(7*2)"], "They pay 07*2.\n"),
    # independent steps share a snippet, dependent ones do not
    ("Tea is 2*3 = $<<2*3=6>>6.\nMilk is 4*5 = $<<4*5=20>>20.", ["print(2*3)\nprint(4*5)"], "is $6 and $20."),
    ("Tea is 2*3 = $<<2*3=6>>6.\nMilk is 6*5 = $<<6*5=30>>30.", ["print(2*3)", "print(6*5)"], "is $30."),
    # a line that does not fall apart into two sentences is kept whole, after its calculation
    ("If she eats 2*3 = <<2*3=6>>6 of them, none is left.", ["print(2*3)"],
     "</interpreter>\nIf she eats 2*3 = 6 of them, none is left."),
    ("In total 4*5 = <<4*5=20>>20 are left.", ["print(4*5)"], "</interpreter>\nIn total 4*5 = 20 are left."),
    ("Twice (2*3 = <<2*3=6>>6) is it.", ["print(2*3)"], "</interpreter>\nTwice (2*3 = 6) is it."),
    ("He is 6 because 12/2 = <<12/2=6>>6 years.", ["print(12/2)"],
     "</interpreter>\nHe is 6 because 12/2 = 6 years."),
])
def test_lines_become_sentences_around_their_snippet(solution, code, text):
    """Guards against broken grammar and wrong rounding."""
    found = calculator({"solution": solution, "own": "4"}, random.Random(1))
    assert [data.strip_fence(block[6:-7]) for block in re.findall(r"(?s)<code>.*?</code>", found)] == code
    assert text in found and "<<" not in found and data.verify_format(found) is None


@pytest.mark.parametrize("solution", ["No calculation.", "It is <<60=60>>60.", "<<9**9**9=1>>1", "<<x+1=3>>3",
                                      "<<1/0=5>>5", "<<5*1=5>>5", "<<+7=7>>7", "<<(((((=1>>1", "<<3//2=1>>1"])
def test_what_is_no_calculation_is_not_turned_into_code(solution):
    """Guards against snippets that print a literal, and data that make the rewriter compute for ever."""
    assert calculator({"solution": solution, "own": "4"}, random.Random(0)) is None


# ------------------------------------------------------------------------------------------------------------
# Verification


EVALUATION = ("A farmer in the northern valley keeps 12 cows, 7 goats and 31 hens on his land and sells 5 "
              "hens to a neighbour each week. After how many weeks are fewer hens than cows left?")
GOOD = "Two and two.\n" + fenced("print(2+2)", "4") + "So it is 4.\n" + ANSWER
# reason, response[, question[, answer]]
PLANTED = [
    ("kept", GOOD, "A first question that is good."),
    ("kept", fenced("print(1/0)", "ZeroDivisionError") + "Again.\n" + fenced("print(12/3)", "4.0")
     + "It is 4.\n" + ANSWER, "Another good one: the error is corrected."),
    ("execution: quoted output differs", GOOD.replace("\n4\n", "\n5\n")),
    ("answer: differs from the reference", GOOD.replace("boxed{4}", "boxed{5}")),
    ("format: tags", GOOD.replace("</code>", "", 1)),
    ("format: interpreter block missing or misplaced", GOOD.replace("</code>\n", "</code>\nSo:\n")),
    ("format: snippet does not parse", GOOD.replace("print(2+2)", "print(2+")),
    ("format: no single final answer", GOOD + " Done."),
    ("quality: snippet only prints a literal", GOOD.replace("2+2", "4")),
    ("quality: snippet only prints a literal", GOOD.replace("print(2+2)", "x = 4\nprint(f'{x}')")),
    ("quality: snippet only prints a literal", GOOD.replace("2+2", "int('4') * 1")),
    ("quality: snippet prints the answer without computing it",
     fenced("n = sum(range(9))\nprint(n)\nprint(4)", "36\n4") + "So 36 and 4.\n" + ANSWER),
    ("quality: snippet output is never used", fenced("print(30+7)", "37") + GOOD),
    ("quality: snippet output is never used", fenced("x = 30+7", "") + GOOD),
    ("quality: the answer comes from nowhere", fenced("print(3+2)", "5") + "It is 5.\n" + ANSWER),
    ("quality: no snippet", "It is 4.\n" + ANSWER),
    ("contamination: same but for numbers and spacing", GOOD, EVALUATION),
    ("contamination: same but for numbers and spacing", GOOD,
     EVALUATION.replace("31", "1,250").replace(" 5", " six")),
    ("contamination: same but for numbers and spacing", GOOD,
     re.sub(r"(\w) (\w\w)", r"\1  \2", EVALUATION.upper())),
    ("contamination: same but for numbers and spacing", GOOD,
     EVALUATION.replace("northern valley", "northernvalley")),
    ("contamination: 13-gram", GOOD, "Once more: " + EVALUATION.replace("12", "99").replace("After", "In")),
    ("duplicate: same question", GOOD, "A first question,  that is GOOD"),
    ("execution: timeout, not corrected", GOOD.replace("print(2+2)", "while True: pass")),
    ("kept", fenced("print(1/0)") + "That failed.\n" + GOOD, "A third good one: it is noticed."),
    ("execution: error, not corrected", fenced("print(1/0)") + "So far so good.\n" + GOOD),
    ("execution: killed, not corrected", fenced(  # reads memory that is not there
        "import numpy as np\nx = np.lib.stride_tricks.as_strided(np.zeros(1), (2,), (2**40,))\nprint(x[1])")
     + "That failed.\n" + GOOD),
    ("execution: error, not corrected", GOOD.replace("print(2+2)", "print(1/0)")),
    ("execution: error, not corrected", GOOD.replace("print(2+2)", "def f(): return f()\nf()")),
    ("execution: output_limit, not corrected", GOOD.replace("print(2+2)", "while True: print('x'*1000)")),
    ("quality: snippet reaches for the system (os)",
     GOOD.replace("print(", "import os\nos.kill(os.getppid(), 9)\nprint(")),
    ("quality: snippet reaches for the system (subprocess)",
     GOOD.replace("print(", "from subprocess import run\nrun('id')\nprint(")),
    ("quality: snippet reaches for the system (open)",
     GOOD.replace("print(", "open('/etc/passwd').read()\nprint(")),
    ("quality: snippet reaches for the system (__class__)", GOOD.replace("print(", "().__class__\nprint(")),
    ("filter: no answer that parses", GOOD, None, "proof"),
    ("filter: not well-formed", GOOD, " "),
    ("filter: not well-formed", GOOD.replace("Two", "\ud800")),
    ("filter: no solution", ""),
]


def test_planted_faults_are_each_rejected_for_their_reason(tmp_path, monkeypatch):
    """Guards against a fault that slips through, is counted under another name, or stops the run."""
    rows = []
    for i, (_, response, *rest) in enumerate(PLANTED):
        question = rest[0] if rest and rest[0] else f"What is {'xyz'[i % 3] * (i + 1)} of pears and figs?"
        rows.append(trace(question, response, rest[1] if len(rest) > 1 else "4"))
    bad = write(tmp_path / "evaluation.jsonl", [{"question": EVALUATION, "answer": "4"}])
    curate_cli(monkeypatch, "--input", write(tmp_path / "in.jsonl", rows), "--output", tmp_path / "out.jsonl",
               "--decontaminate", bad, "--sandbox_timeout", "1")
    report = json.loads((tmp_path / "out.report.json").read_text())
    found = {name: n for name, n in report["reasons"].items() if not name.startswith("kept,")}
    assert found == Counter(reason for reason, *_ in PLANTED)
    assert report["left_after"]["duplicate"] == report["kept"] == 3 and report["reasons"][
        "kept, with an error that is corrected"] == 2
    for reason, examples in report["examples"].items():
        assert all(PLANTED[int(e["place"].split(":")[1]) - 1][0] == reason for e in examples)
    assert len(report["hits"]) == 5 and all(hit[1] == "evaluation.jsonl:1" for hit in report["hits"])
    traces = load_traces(tmp_path / "out.jsonl")
    assert [t["failed_calls"] for t in traces] == [[], [0], [0]]
    assert "ZeroDivisionError: division by zero" in traces[1]["response"]  # what really came back


@pytest.mark.parametrize("reason, response", [
    (None, fenced("print(10/4)", "2.4") + "Go on.\n" + fenced("print(2+2)", "4") + "2.5 and 4.\n" + ANSWER),
    (None, fenced("print(10/3)", "3.33") + "It is 3.33.\n" + fenced("print(2+2)", "4") + "4.\n" + ANSWER),
    ("execution: later text depends on a wrong quoted output",
     fenced("print(10/4)", "2.4") + "It is 2.4.\n" + fenced("print(2+2)", "4") + "4.\n" + ANSWER),
    ("execution: later text depends on a wrong quoted output",
     fenced("print(10/4)", "2.4") + fenced("print(2.4+1.6)", "4") + "4.\n" + ANSWER),
    ("execution: later text depends on a wrong quoted output",
     fenced("print(4 > 5)", "True") + "So it is.\n" + fenced("print(2+2)", "4") + "4.\n" + ANSWER),
    ("execution: later text depends on a wrong quoted output",
     fenced("print(1/0)", "7") + fenced("print(2+2)", "4") + "4.\n" + ANSWER),
])
def test_a_wrong_quoted_output_is_replaced_only_where_nothing_depends_on_it(reason, response):
    """Guards against text that argues from a number which the interpreter never printed."""
    async def main(policy):
        async def run(code):
            return execute(code)
        return await data.verify(response, "4", run, policy, strict=True)
    found, real, snippets = asyncio.run(main("replace"))
    assert found == reason and all(s["output"].strip("\n") in real for s in snippets)
    assert asyncio.run(main("reject"))[0] == "execution: quoted output differs"


@pytest.mark.parametrize("code, answer, reason", [
    ("print(48/2)", "24", None), ("print(10-5)", "5", None), ("print(75/100*100)", "75", None),
    ("print(5*2-5)", "5", None), ("print(sum(1 for n in range(2, 9) if n % 7 == 0))", "1", None),
    ("x = 72\nassert x * 2 == 144\nprint(x / 2, x)", "36", None), ("print(max(3, 8) - 1)", "7", None),
    ("print(24)", "24", "only prints a literal"), ("print('The answer is 24')", "9", "only prints a literal"),
    ("x = 24\nprint(x)", "24", "only prints a literal"), ("print(24 + 0)", "24", "only prints a literal"),
    ("print('yes')", "yes", "only prints a literal"), ("print(1)", "1", "only prints a literal"),
    ("print(sum([24]))", "24", "only prints a literal"), ("print(-24)", "-24", "only prints a literal"),
    ("y = 3 * 5\nprint(y, 24)", "24", "prints the answer without computing it"),
])
def test_what_a_snippet_computes_is_told_from_what_it_repeats(code, answer, reason):
    """Guards against hard-coded results, and against rejecting a sum that equals one of its terms."""
    async def run(code):
        return execute(code)
    assert asyncio.run(data.hard_coded(code, execute(code).output, answer, run)) == reason


def test_odd_rows_neither_stop_nor_stall_the_run():
    """Guards against an index error on a stray comma, and against patterns that go back and forth over spaces."""
    begin = time.monotonic()
    for line in ("He has 2*3=$<<2*3=6>>, apples.", "So" + " " * 20_000 + "it is 2*3 = <<2*3=6>>6.", "2*3=<<2*3=6>>."):
        assert "print(2*3)" in calculator({"solution": line, "own": "6"}, random.Random(0))
    long = {"messages": [{"content": "x " * 500_000}, {"content": ANSWER}]}
    assert read_row(long)["answer"] == "4"
    assert time.monotonic() - begin < 5


@pytest.mark.parametrize("ending", [r"So \boxed{4}. <answer>5</answer>", r"<answer>\boxed{5} or \boxed{4}</answer>",
                                    r"So \boxed{5}. <answer>\boxed{4}</answer>"])
def test_the_answer_line_holds_the_one_final_answer(ending):
    """Guards against a check that reads another box than a reader does."""
    assert data.verify_format(f"2 + 2\n{ending}") == "no single final answer"
    assert data.verify_format(rf"So \boxed{{4}}. {ANSWER}") is None


def test_contamination_does_not_depend_on_numbers_case_or_spacing(tmp_path):
    """Guards against an evaluation problem with other numbers, and against short questions all being one."""
    questions = EVALUATION, "What is 3 + 5?"
    file = write(tmp_path / "e.jsonl", [{"question": question, "answer": "1"} for question in questions])
    find = Contamination([file])
    for changed in (EVALUATION, EVALUATION.replace("12 cows", "twelve cows"), EVALUATION.replace(" ", "\n\t"),
                    EVALUATION.replace("12", "$12.50$").replace("7", "1,000"), EVALUATION.replace(" ", "")):
        assert find(changed)[:2] == ("same but for numbers and spacing", "e.jsonl:1")
    assert find("What is 3+5 ?")[1] == "e.jsonl:2" and find("What is 3 + 6?") is None
    assert find("A farmer in the northern valley keeps 12 cows, and he has 3 sons.") is None
    assert find("A farmer in the northern valley keeps 1 cow, 2 goats and 3 hens on his land today.") is None
    assert find("A farmer in the northern valley keeps 9 cows, 8 goats and 1 hens there.")[0] == "13-gram"


def test_near_duplicates_differ_in_a_word_not_in_a_number():
    """Guards against copies with a changed word, and against taking another instance for a copy."""
    question = " ".join(f"word{'abcdefghij'[i % 10] * (1 + i // 10)}" for i in range(40)) + " 17"
    find = Duplicates()
    assert find(question, 1) is None
    assert find(question.replace("wordb ", "wort "), 2) == ("nearly the same question", 1)
    assert find("What is 3 + 5?", 3) is None and find("What is 3 + 6?", 4) is None
    assert find("what is 3+5", 5) == ("same question", 3)


# ------------------------------------------------------------------------------------------------------------
# The run


def test_the_same_input_gives_the_same_bytes_and_traces_that_training_reads(tmp_path, monkeypatch, capsys):
    """Guards against an order that depends on timing, spans that are off, and another chat format."""
    monkeypatch.setattr(data, "Sandbox", Trusted)
    source = write(tmp_path / "gsm.jsonl", GSM8K)
    for name, in_flight in (("a", 64), ("b", 3)):
        curate_cli(monkeypatch, "--input", source, "--output", tmp_path / f"{name}.jsonl", "--in_flight",
                   in_flight)
    for end in (".jsonl", ".report.json"):
        assert (tmp_path / f"a{end}").read_bytes() == (tmp_path / f"b{end}").read_bytes()
    assert not list(tmp_path.glob("*.partial")) + list(tmp_path.glob("*.journal"))
    rows = read(tmp_path / "a.jsonl")
    assert len(rows) == len(GSM8K) and all("*user question:*" in r["messages"][0]["content"] for r in rows)
    traces = load_traces(tmp_path / "a.jsonl")
    for source_row, row, t in zip(GSM8K, rows, traces):
        response = row["messages"][1]["content"]
        assert (t["question"], t["response"]) == (source_row["question"], response)
        spans = [response[begin:end] for kind, begin, end in row["spans"] if kind == "code"]
        assert len(spans) == 2 and all(s.startswith("<code>") and s.endswith("</code>") for s in spans)
        assert row["provenance"]["place"].startswith("gsm.jsonl:") and "<<" not in response
        assert "2.0" in response or source_row is not GSM8K[0]  # the sandbox's 4/2, not the annotation's
    # what comes out goes in again, and all of it is verified anew
    curate_cli(monkeypatch, "--input", tmp_path / "a.jsonl", "--output", tmp_path / "again.jsonl")
    assert [r["messages"] for r in read(tmp_path / "again.jsonl")] == [r["messages"] for r in rows]
    capsys.readouterr()
    arguments = ["data.py", "show", f"{tmp_path}/a.jsonl", "--n", "1", "--color", "always"]
    monkeypatch.setattr(sys, "argv", arguments)
    asyncio.run(data.main())
    shown = capsys.readouterr().out
    assert "\033[36m<code>" in shown and re.sub(r"\033\[[\d;]*m", "", shown).count(traces[0]["response"]) == 1
    with pytest.raises(UserError, match="there already"):
        curate_cli(monkeypatch, "--input", tmp_path / "gsm.jsonl", "--output", tmp_path / "a.jsonl")


def test_a_killed_run_goes_on_without_repeating_or_losing_rows(tmp_path, monkeypatch):
    """Guards against rows done twice or lost, a torn last line, and half a file under the final name."""
    monkeypatch.setattr(data, "Sandbox", Trusted)
    source, out = write(tmp_path / "gsm.jsonl", GSM8K), tmp_path / "out.jsonl"
    curate_cli(monkeypatch, "--input", source, "--output", tmp_path / "whole.jsonl")
    slow = ("import sys, asyncio, time; sys.path[:0] = sys.argv[1:3]; import data, test_curate\n"
            "data.Sandbox, judge = test_curate.Trusted, data.judge\n"
            "async def slowly(*a):\n    await asyncio.sleep(0.05)\n    return await judge(*a)\n"
            "data.judge = slowly; sys.argv[:3] = ['data.py']; asyncio.run(data.main())")
    command = [sys.executable, "-c", slow, ROOT, ROOT / "tests", "curate", "--input", source, "--output", out]
    process = subprocess.Popen([*map(str, command), "--in_flight", "4"], stderr=subprocess.DEVNULL)
    journal = tmp_path / "out.journal"
    deadline = time.monotonic() + 60
    while not journal.exists() or journal.read_bytes().count(b"\n") < 12:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not out.exists()
    lines = journal.read_bytes().splitlines(keepends=True)
    complete = [line for line in lines if line.endswith(b"\n")]
    journal.write_bytes(b"".join(complete) + b'{"row": 59, "rea')  # as if it had been torn
    with pytest.raises(UserError, match="other arguments"):
        curate_cli(monkeypatch, "--input", source, "--output", out, "--seed", "1")
    judged, judge = [], data.judge

    async def counting(row, *rest):
        judged.append(row["question"])
        return await judge(row, *rest)
    monkeypatch.setattr(data, "judge", counting)
    curate_cli(monkeypatch, "--input", source, "--output", out)
    assert len(judged) == len(set(judged)) == len(GSM8K) - (len(complete) - 1)
    assert out.read_bytes() == (tmp_path / "whole.jsonl").read_bytes() and not journal.exists()
    assert (tmp_path / "out.report.json").read_bytes() == (tmp_path / "whole.report.json").read_bytes()


# ------------------------------------------------------------------------------------------------------------
# Models as rewriters


@contextlib.contextmanager
def endpoint(answer):
    """A small server that speaks the protocol. answer(body, n) -> (status, text), n counting the requests."""
    state = SimpleNamespace(requests=0, at_once=0, most=0, lock=threading.Lock())

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with state.lock:
                state.requests += 1
                state.at_once += 1
                state.most, n = max(state.most, state.at_once), state.requests
            time.sleep(0.05)
            status, text = answer(body, n)
            choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": text}}
            reply = {"id": "x", "object": "chat.completion", "created": 0, "model": "m", "choices": [choice]}
            content = json.dumps(reply if status == 200 else {"error": {"message": text}}).encode()
            with state.lock:
                state.at_once -= 1
            self.send_response(status)
            self.send_header("Content-Length", str(len(content)))
            self.send_header("Content-Type", "application/json")
            self.send_header("retry-after-ms", "10")
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *args):
            pass
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}/v1", state
    finally:
        server.shutdown()
        server.server_close()


def model_reply(body):
    """What a good model would write for a row of GSM8K."""
    a, b = map(int, re.findall(r"(\d+)\+(\d+)=", body["messages"][0]["content"])[-1])
    text = f"Sum up.\n{fenced(f'print({a}+{b})', a + b)}So Bob sold {a + b}.\n"
    return f"{text}<answer>\\boxed{{{a + b}}}</answer>"


def test_an_endpoint_is_asked_concurrently_and_again_after_errors(tmp_path, monkeypatch):
    """Guards against requests one by one, rows lost to a 429 or 500, and a run stopped by one prompt."""
    pytest.importorskip("openai")
    monkeypatch.setattr(data, "Sandbox", Trusted)

    def answer(body, n):
        if n in (3, 4, 5):
            return (429, "slow down") if n < 5 else (500, "broken")
        if "number 4 " in body["messages"][0]["content"]:
            return 400, "I do not like this prompt"
        return 200, "Sorry." if "number 9 " in body["messages"][0]["content"] else model_reply(body)
    with endpoint(answer) as (url, state):
        curate_cli(monkeypatch, "--input", write(tmp_path / "in.jsonl", GSM8K[:20]), "--output",
                   tmp_path / "out.jsonl", "--rewriter", "api", "--model", "m", "--api_url", url)
    report = json.loads((tmp_path / "out.report.json").read_text())
    assert report["kept"] == 18 and state.requests == 23 and state.most >= 8
    reasons = report["reasons"]
    assert reasons["rewrite: unfinished"] == reasons["format: no single final answer"] == 1


def test_an_endpoint_that_gives_up_ends_the_run_with_one_line_and_keeps_what_is_done(tmp_path, monkeypatch):
    """Guards against a paid run that starts from nothing after the quota is used up."""
    pytest.importorskip("openai")
    monkeypatch.setattr(data, "Sandbox", Trusted)
    arguments = ["--input", write(tmp_path / "in.jsonl", GSM8K[:12]), "--output", tmp_path / "out.jsonl",
                 "--rewriter", "api", "--model", "m", "--api_retries", "1", "--in_flight", "2"]
    with endpoint(lambda body, n: (200, model_reply(body)) if n < 8 else (429, "quota")) as (url, state):
        with pytest.raises(UserError, match=r"--rewriter api: http://127.*quota.*tried 2 times") as error:
            curate_cli(monkeypatch, *arguments, "--api_url", url)
    assert "\n" not in str(error.value)
    before = len(read(tmp_path / "out.journal")) - 1
    with endpoint(lambda body, n: (200, model_reply(body))) as (url, state):
        curate_cli(monkeypatch, *arguments, "--api_url", url)
    assert before >= 5 and state.requests == 12 - before and len(read(tmp_path / "out.jsonl")) == 12


def test_problems_on_which_the_model_s_samples_disagree_are_filtered(tmp_path, monkeypatch):
    """Guards against references that a model, asked several times, does not come to."""
    pytest.importorskip("openai")
    monkeypatch.setattr(data, "Sandbox", Trusted)

    def answer(body, n):
        if "Solution:" in body["messages"][0]["content"]:
            return 200, model_reply(body)
        return 200, r"\boxed{7}"  # right for the first problem only
    with endpoint(answer) as (url, state):
        curate_cli(monkeypatch, "--input", write(tmp_path / "in.jsonl", GSM8K[:4]), "--output",
                   tmp_path / "out.jsonl", "--rewriter", "api", "--model", "m", "--api_url", url,
                   "--agreement", "3")
    report = json.loads((tmp_path / "out.report.json").read_text())
    assert report["kept"] == 1 and state.requests == 4 * 3 + 1
    assert report["reasons"]["filter: model samples disagree with the reference"] == 3


def test_a_local_checkpoint_rewrites_in_batches(tmp_path, monkeypatch, tokenizer):
    """Guards against one generation per row, texts given to the wrong row, and a crash on a useless text."""
    monkeypatch.setattr(data, "Sandbox", Trusted)
    sft.load_model("", tokenizer, "cpu").save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    batches, original = [], data.generate

    async def generate(model, tokenizer, prompts, *rest, **options):
        batches.append(len(prompts))
        found = await original(model, tokenizer, prompts, *rest, **options)
        for prompt, t in zip(prompts, found):
            content = tokenizer.decode(prompt)
            if "number 4 " not in content:  # the first row keeps what an untrained model says
                text = model_reply({"messages": [{"content": content}]})
                t.response_ids, t.finish_reason = encode_text(tokenizer, text), "eos"
        return found
    monkeypatch.setattr(data, "generate", generate)
    curate_cli(monkeypatch, "--input", write(tmp_path / "in.jsonl", GSM8K[:6]), "--output",
               tmp_path / "out.jsonl", "--rewriter", "local", "--model", tmp_path / "model",
               "--max_response_tokens", "300")
    report = json.loads((tmp_path / "out.report.json").read_text())
    assert batches == [6] and report["kept"] == 5 and report["reasons"]["rewrite: unfinished"] == 1
