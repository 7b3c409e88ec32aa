"""Properties of the curation of cold-start traces in sft.py. Run: python -m pytest tests/test_curate.py"""
import argparse
import asyncio
import contextlib
import http.server
import io
import itertools
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
from conftest import StubSandbox, decode

import rollout
import sft
from data import embedded_problem, load_problems, read_row
from rollout import encode_response, encode_text, split_segments
from runs import rewriters
from runs.rewriters import calculator, program
from sandbox import Sandbox, SandboxResult, UserError
from sft import Rejected, check_format, contamination_keys, load_traces

TESTS = Path(__file__).parent
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
    """In place of the sandbox where no snippet is hostile."""

    def __init__(self, args):
        super().__init__(execute, delay=lambda code: Trusted.seconds)

    seconds = 0.0

    async def __aenter__(self):
        return self

    async def __aexit__(self, *exc_info):
        pass


@pytest.fixture
def trusted(monkeypatch):
    monkeypatch.setattr(sft, "make_sandbox", Trusted)


def write(path, rows):
    path.write_text("".join(row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows))
    return path


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def curate(*arguments):
    """`python sft.py curate ...` in this process; returns its report."""
    parser = argparse.ArgumentParser()
    sft.add_curate_arguments(parser)
    args = parser.parse_args([*map(str, arguments)])
    asyncio.run(sft.curate_file(args))
    return json.loads(Path(args.output).with_suffix(".report.json").read_text())


def reason(check, *args):
    """What a check rejects for, or None."""
    try:
        check(*args)
    except Rejected as rejected:
        return str(rejected)


def outputs(trace):
    return [text.strip() for kind, text in split_segments(trace["response"]) if kind == "interpreter"]


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
    ({"problem": "Q", "solution": "s", "messages": [{"role": "user", "content": "Q"}], "answer": "7"}, "Q",
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
    assert read_row(row) == {"question": question, "answer": answer, "solution": solution, "stated": own}


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


@pytest.mark.parametrize("rows, options, message", [
    ([{"foo": 1, "bar": 2}], [], "rows kept, {'filter: no question or no answer in {foo: int, bar: int} (--question_field"),
    ([], [], "none of 0 rows kept"),
    (GSM8K[:1], ["--question_field", "q"], "no question or no answer in {question: str, answer: str} (--question_field"),
    ([{"question": "Q", "answer": None}], [], "no answer in {question: str, answer: NoneType} ("),
    ([{"question": "Q", "answer": {"value": 4}}], [], "no answer in {question: str, answer: {value: int}} ("),
    ([{"problem": "Q", "answer": ["4"], "solution": None}], [], "no answer in {problem: str, answer: [str], solution: NoneType} ("),
    ([{"question": ["Q"], "answer": "4"}], [], "no answer in {question: [str], answer: str} ("),
    ([{"problem": "Q", "solution": 4}], [], "no answer in {problem: str, solution: int} ("),
    ([{"x": {"q": "Q", "a": None}}], ["--question_field", "x.q", "--answer_field", "x.a"], "no answer in {x: {q: str, a: NoneType}} ("),
    ([trace("Q", "Four. " + ANSWER)] * 3 + GSM8K[:1], ["--limit", "3"], "none of 3 rows kept, {'quality: no"),
    (GSM8K[:1], ["--rewriter", "api"], "needs --model"),
    (GSM8K[:1], ["--prompt_template", "nowhere"], "--prompt_template nowhere"),
    (GSM8K[:1], ["--rewriter", "local", "--model", "/nowhere"], "/nowhere: "),
    (GSM8K[:1], ["--tokenizer", "/nowhere"], "/nowhere: "),
    (GSM8K[:1], ["--decontaminate", "nowhere.jsonl"], "nowhere.jsonl: no such file"),
    ([{"problem": "Q", "solution": "no box"}], [], "no answer in {problem: str, solution: str} ("),
    ([{"problem": "Q", "solution": "no box", "answer": "None"}], [], "rows kept, {'filter: no answer to compare with': 1}"),
    ([row | {"question": "Solve it."} for row in GSM8K[:2]], [], "all 2 rows have the same question, 'Solve it.'"),
])
def test_bad_input_is_one_line(tmp_path, trusted, rows, options, message):
    """Guards against tracebacks, and against a set that becomes an empty one without a word."""
    with pytest.raises(UserError) as error:
        curate("--input", write(tmp_path / "in.jsonl", rows), "--output", tmp_path / "out.jsonl", *options)
    assert message in str(error.value) and "\n" not in str(error.value)
    assert not {"out.jsonl", "out.partial", "out.journal"} & {path.name for path in tmp_path.iterdir()}


@pytest.mark.parametrize("option, value", [("limit", -1), ("in_flight", 0), ("sandbox_timeout", 0),
                                           ("sandbox_timeout", "nan"), ("sandbox_timeout", "inf"),
                                           ("seed", 2**63), ("limit", 10**30), ("in_flight", 2**63), ("max_tokens", 0),
                                           ("sandbox_workers", 0), ("temperature", -1), ("limit", "many")])
def test_numbers_out_of_range_are_the_parser_s_errors(capsys, option, value):
    """Guards against a run that never ends, or ends in a traceback, for in_flight 0."""
    with pytest.raises(SystemExit) as error:
        curate("--input", "in.jsonl", "--output", "out.jsonl", f"--{option}={value}")
    assert error.value.code == 2 and f"error: argument --{option}: " in capsys.readouterr().err


def test_fields_of_an_unknown_layout_can_be_named(tmp_path, trusted):
    """Guards against a mapping that reads nested fields, or the answer inside the solution, wrongly."""
    rows = [{"x": {"q": row["question"]}, "text": row["answer"]} for row in GSM8K[:3]]
    curate("--input", write(tmp_path / "in.jsonl", rows), "--output", tmp_path / "out.jsonl",
           "--question_field", "x.q", "--answer_field", "text", "--solution_field", "text")
    assert [t["answer"] for t in read(tmp_path / "out.jsonl")] == ["7", "9", "11"]


# ------------------------------------------------------------------------------------------------------------
# The calculator


def test_annotations_become_snippets_in_place():
    """Guards against a result that stands in the text before its snippet, and annotations left there."""
    found = read_row(GSM8K[0])
    assert calculator(found["solution"], found["stated"]) == (
        f"Ann sold 4/2 =\n{fenced('print(4/2)', '2')}2 boxes of fruit.\n"
        f"So Bob sold 2 + 5 =\n{fenced('print(2+5)', '7')}7 boxes.\n" r"<answer>\boxed{7}</answer>")


def blocks(text):
    """The text with each snippet as [code] and without the answer line."""
    text = re.sub(r"\n<code>\n```python\nprint\((.*)\)\n(?s:.)*?</interpreter>\n", r" [\1] ", text)
    return text.rpartition("<answer>")[0].strip()


@pytest.mark.parametrize("solution, text", [
    ("She earns 12/60 = $<<12/60=0.2>>0.2 per minute.", "She earns 12/60 = [12/60] $0.2 per minute."),
    ("She has <<3*2=6>>6 apples.", "She has [3*2] 6 apples."),
    ("If he eats 2*4=<<2*4=8>>8, 9-8=<<9-8=1>>1 is left.", "If he eats 2*4= [2*4] 8, 9-8= [9-8] 1 is left."),
    ("It is 5 - 3 + 3 = <<5-3+3=5>>5.", "It is 5 - 3 + 3 = [5-3+3] 5."),  # the 5 before it is a term
    ("It falls to -20+10 = <<-20+10=-10>>-10.", "It falls to -20+10 = [-20+10] -10."),
    # the result is named first: the snippet stands in front of the whole line
    ("A.\nHe is 6, for 12/2 = <<12/2=6>>6 years.",
     "A.\nLet me compute 12/2. [12/2] He is 6, for 12/2 = 6 years."),
    # what is no calculation is left as text
    ("That is 50% = <<50*.01=0.5>>0.5 or $<<60=60>>60.", "That is 50% = [50*.01] 0.5 or $60."),
    ("Twice 5% is <<2*5%=10%>>10% of 2*3 = <<2*3=6>>6.", "Twice 5% is 10% of 2*3 = [2*3] 6."),
])
def test_lines_are_continued_after_their_snippet(solution, text):
    """Guards against broken sentences, and results that are told before they are computed."""
    found = calculator(solution, "4")
    assert blocks(found) == text and reason(check_format, found) is None


@pytest.mark.parametrize("solution", ["No calculation.", "It is <<60=60>>60.", "<<x+1=3>>3", "<<+7=7>>7",
                                      "<<(((((=1>>1", "<<__import__('os')=1>>1", "<<3*x=3>>3", "<<1=1>>1"])
def test_what_is_no_calculation_is_not_turned_into_code(solution):
    """Guards against snippets that print a literal, or run what stands in the data."""
    assert calculator(solution, "4") is None


def test_annotations_become_one_script_whose_variables_carry_the_results():
    """Guards against a result that is copied as a number, and long names, which small models misspell."""
    solution = ("Ann sold 48/2 = $<<48/2=24>>24 of fruit, 3 times a day.\nBob's day = $24 + 6 = <<24+6=30>>30.0.\n"
                "They have <<24+30=54>>54 dollars; 54*(1/2) = $<<54*(1/2)=27>>27 is left.")
    assert program(solution, "27", "She had $48, he $6.") == (
        "Let me compute this.\n" + fenced("a = 48/2\nb = a+6\nc = a+b\nd = c*(1/2)\nprint(d)", "27")
        + r"The answer is 27." "\n" r"<answer>\boxed{27}</answer>")


@pytest.mark.parametrize("solution, question", [
    ("<<5*20=100>>, <<100-40=60>>, <<60-5=55>>", "5 boxes of 20, 100 in all; 40 and 5 are sold"),  # 100: which?
    ("<<9*20=180>>, <<90*2=180>>, <<180-125=55>>", "9 20 90 2 125"),  # which 180?
    ("<<5*20=100>>, <<60-5=55>>", "5 20 60"),  # 100 leads nowhere
    ("<<80-25=55>>", "80 pens"),  # 25 comes from nowhere
    ("<<80-20=60>>, so 60 - 5 = 55", "80 20"), ("<<55=55>>", "55"), ("No calculation.", "55"),
])
def test_a_script_that_is_not_the_whole_calculation_is_none(solution, question):
    """Guards against a number that stands for another, and programs with a step done by head."""
    assert program(solution, "55", question) is None


def test_a_script_of_more_variables_than_letters_is_none():
    """Guards against a 27th name."""
    for n in (26, 27):
        solution = "\n".join(f"{n} more: {50 + 100 * i} + 100 = <<{50 + 100 * i}+100={150 + 100 * i}>>" for i in range(n))
        assert (program(solution, str(50 + 100 * n), "50 and 100") is None) == (n == 27)


def test_programs_compute_what_their_annotations_say():
    """Guards against an operand that becomes the wrong variable."""
    rng, kept = random.Random(0), 0
    words = ["print", "class", "None", "sum", "pens", "of", "red", "Ünder", "a", "int"]
    for _ in range(300):
        given, known, lines = [str(rng.randint(2, 40)) for _ in range(4)], [], []
        for _ in range(rng.randint(1, 5)):
            a, b = rng.choice(known or given), rng.choice(given)
            expression = f"{a}{rng.choice('+-*' if int(a) > int(b) else '+*')}{b}"
            known.append(str(eval(expression)))
            before, after = (" ".join(rng.choices(words, k=rng.randint(0, 3))) for _ in range(2))
            lines.append(f"{before} {expression} = <<{expression}={known[-1]}>>{known[-1]} {after}.")
        response = program("\n".join(lines), known[-1], " ".join(given))
        if response:
            [(_, code)] = sft.take_apart(response)[1]
            assert execute(code).output.strip() == known[-1], (code, lines)
            kept += len(lines) > 1
            assert all(result not in code for result in {*known[:-1]} if int(result) > 400)
    assert kept > 30


def test_odd_rows_do_not_stall_the_run():
    """Guards against patterns that go back and forth over spaces and brackets."""
    begin = time.monotonic()
    for line in ("So" + " " * 20_000 + "it is 2*3 = <<2*3=6>>6.", "((" * 20_000 + "2*3=<<2*3=6>>."):
        assert "print(2*3)" in calculator(line, "6") and " = 2*3\n" in program(line, "6", "2 3")
    assert calculator("<<" + "(" * 20_000 + "1" * 20_000 + ")" * 20_000, "6") is None
    long = {"messages": [{"role": "user", "content": "x " * 500_000}, {"role": "assistant", "content": ANSWER}]}
    assert read_row(long)["answer"] == "4"
    assert time.monotonic() - begin < 5


# ------------------------------------------------------------------------------------------------------------
# Checks


TAGS, BLOCK = "tags", "interpreter block missing or misplaced"
SYNTAX, FINAL = "snippet does not parse", "no single final answer"


@pytest.mark.parametrize("response, expected", [
    (fenced("print(4)", "4") + ANSWER, None),
    ("Plain text. " + ANSWER, None),
    ("<code>print(4)</code><interpreter></interpreter>" + ANSWER, None),
    (fenced("print(4)") * 3 + ANSWER, None),
    ("<code>print(4)" + ANSWER, TAGS),
    ("print(4)</code>\n<interpreter>\n4\n</interpreter>" + ANSWER, TAGS),
    ("<code><code>x</code></code>\n<interpreter>\n4\n</interpreter>" + ANSWER, TAGS),
    ("<code>x</code>\n<interpreter>\n4\n" + ANSWER, TAGS),
    ("<code>x</interpreter>\n<interpreter>4</code>" + ANSWER, TAGS),
    (fenced("print('</code>')") + ANSWER, TAGS),
    (fenced("x", "<code>") + ANSWER, TAGS),
    (r"<answer>\boxed{4}", TAGS),
    (fenced("x") + r"<answer><answer>\boxed{4}</answer></answer>", TAGS),
    ("<interpreter>\n4\n</interpreter>\n" + ANSWER, BLOCK),
    ("<code>x</code>\n" + ANSWER, BLOCK),
    ("<code>x</code>\nThe result:\n<interpreter>\n4\n</interpreter>\n" + ANSWER, BLOCK),
    (fenced("x", "4") + "<interpreter>\n4\n</interpreter>\n" + ANSWER, BLOCK),
    ("<code>x</code><code>y</code>\n<interpreter>\n4\n</interpreter>\n" + ANSWER, BLOCK),
    (fenced("x = = 1") + ANSWER, SYNTAX),
    (fenced("print(1)") + fenced("  indented\nwrong") + ANSWER, SYNTAX),
    (fenced("x = '\x00'") + ANSWER, SYNTAX),
    (fenced("(" * 5000 + ")" * 5000) + ANSWER, SYNTAX),
    (fenced("-" * 200_000 + "1") + ANSWER, SYNTAX),
    (fenced("print(4)", "4"), FINAL),
    (fenced("print(4)", "4") + r"\boxed{4}", FINAL),
    ("<answer>4</answer>", FINAL),
    (r"<answer>\boxed{4</answer>", FINAL),
    (ANSWER + ANSWER, FINAL),
    (ANSWER + " and more", FINAL),
    (ANSWER + fenced("print(4)", "4"), FINAL),
    (fenced(r"print('\boxed{4}')") + "<answer>see above</answer>", FINAL),
], ids=range(31))
def test_broken_responses_are_rejected_for_their_reason(response, expected):
    """Guards against teaching a format in which the triggers are not found where they should be."""
    assert reason(check_format, response) == (f"format: {expected}" if expected else None)


@pytest.mark.parametrize("ending", [r"So \boxed{4}. <answer>5</answer>",
                                    r"<answer>\boxed{5} or \boxed{4}</answer>",
                                    r"So \boxed{5}. <answer>\boxed{4}</answer>"])
def test_the_answer_line_holds_the_one_final_answer(ending):
    """Guards against a check that reads another box than a reader does."""
    assert reason(check_format, f"2 + 2\n{ending}") == "format: no single final answer"
    assert reason(check_format, rf"So \boxed{{4}}. {ANSWER}") is None


@pytest.mark.parametrize("quoted, real, same", [
    ("24", "24.0\n", True), ("1,234", "1234", True), ("0.33", "0.3333333333333333", True),
    ("x = 5", "x = 5.0", True),
    ("63", "63.00000000000001", True), ("2.80", "2.8", True), ("[1, 2]", "[1,  2]", True),
    ("3.1", "3.14", True),
    ("3", "3.3", False), ("0.34", "0.3333333333333333", False), ("24", "25", False), ("-24", "24", False),
    ("24", "24 25", False), ("True", "False", False), ("x1", "x2", False), ("1" * 40, "1" * 39 + "2", False),
    ("", "24", False),
])
def test_a_quoted_output_is_compared_by_value(quoted, real, same):
    """Guards against invented outputs, and against rejecting 24 for 24.0 or a result that was rounded."""
    assert sft.same_output(quoted, SandboxResult("ok", real)) is same


def test_of_a_quoted_error_only_the_kind_counts():
    """Guards against an invented error, and against asking a writer for our traceback's every word."""
    real = SandboxResult(
        "error", 'Traceback:\n  File "snippet.py", line 1\nZeroDivisionError: division by zero')
    for quoted, same in ((real.output, True), ("ZeroDivisionError", True), ("ZeroDivisionError: by 0", True),
                         ("ValueError: division by zero", False), ("0", False)):
        assert sft.same_output(quoted, real) is same
    late = SandboxResult("timeout", "1\n[timed out after 2.0 s]")
    assert sft.same_output("[timed out after 5.0 s]", late) and not sft.same_output("[killed]", late)


FAULTS = [
    ("kept", fenced("print(2+2)", "4") + ANSWER, []),
    ("kept", fenced("print(2+2)") + ANSWER, []),
    ("kept", fenced("1/0") + "Once more.\n" + fenced("print(4)", "4") + ANSWER, [0]),
    ("kept", fenced("print(3)", "3") + fenced("import time\ntime.sleep(60)") + fenced("undefined") + ANSWER,
     [1, 2]),
    ("kept", "By hand. " + ANSWER, []),
    ("execution: quoted output differs", fenced("print(2+2)", "5") + ANSWER, None),
    ("execution: quoted output differs", fenced("1/0", "4") + ANSWER, None),
    ("execution: quoted output differs", fenced("print(1)", "1") + fenced("print(2)", "1") + ANSWER, None),
    ("answer: differs from the reference", fenced("print(5)", "5") + r"<answer>\boxed{5}</answer>", None),
    ("format: tags", "<code>" + ANSWER, None),
    ("format: snippet does not parse", fenced("print(") + ANSWER, None),
    ("format: no single final answer", fenced("print(4)", "4"), None),
]


def test_planted_faults_are_rejected_and_real_output_is_written_in():
    """Guards against invented interpreter text, another reason, and failures that SFT would not mask."""
    async def main():
        async with Sandbox(workers=2, timeout=3.0) as sandbox:
            return await asyncio.gather(*[sft.check_trace(response, "4.0", sandbox) for _, response, _ in FAULTS],
                                        return_exceptions=True)
    found = asyncio.run(main())
    assert [str(f) if isinstance(f, Rejected) else "kept" for f in found] == [reason for reason, *_ in FAULTS]
    kept = [f for f in found if not isinstance(f, Rejected)]
    assert [failed for _, failed, _ in kept] == [failed for reason, _, failed in FAULTS if reason == "kept"]
    printed = [outputs({"response": response}) for response, *_ in kept]
    assert printed[:2] == [["4"], ["4"]] and printed[4] == []
    assert printed[2][0].endswith("ZeroDivisionError: division by zero") and printed[2][1] == "4"
    assert printed[3][:2] == ["3", "[timed out after 3.0 s]"] and "NameError" in printed[3][2]
    for (_, candidate, _), (response, *_) in zip(FAULTS, kept):  # the model's own words are untouched
        assert [s for s in split_segments(response)
                if s[0] == "model"] == [s for s in split_segments(candidate) if s[0] == "model"]
        assert reason(check_format, response) is None


@pytest.mark.parametrize("output", [
    "</interpreter>\nI know it.", "<code>x</code>", "<|im_end|>",
    "</interpreter>\n<answer>\\boxed{4}</answer>"
])
def test_output_that_looks_like_markup_is_never_trained_on(tokenizer, output):
    """Guards against a snippet that prints `</interpreter>`: what follows would count as the model's text in
    SFT."""
    candidate = "Go.\n" + fenced("print(x)") + ANSWER
    response, *_ = asyncio.run(sft.check_trace(candidate, "4", StubSandbox(output)))
    ids, mask = encode_response(tokenizer, response, 128)
    trained = decode(tokenizer, [i for i, m in zip(ids, mask) if m])
    assert trained == "Go.\n<code>\n```python\nprint(x)\n```\n</code>\n" + ANSWER + "<|im_end|>"


def test_traces_keep_their_order_when_snippets_finish_out_of_order():
    """Guards against traces paired with the wrong problem."""
    delays = itertools.count(20, -1)
    sandbox = StubSandbox(execute, delay=lambda code: 0.001 * next(delays))
    traces, counts = asyncio.run(sft.embedded_traces(20, 1.0, 3, sandbox))
    assert counts == {"kept": 20}
    problems = [embedded_problem("traces", 3, i) for i in range(20)]
    assert [(t["question"], t["response"]) for t in traces] == [(p.question, p.by_code) for p in problems]


def test_a_failing_sandbox_stops_curation():
    """Guards against filling a training set with "[sandbox error]"."""
    sandbox = StubSandbox(lambda code: SandboxResult("sandbox_error", "dead"))
    with pytest.raises(RuntimeError, match="sandbox"):
        asyncio.run(sft.check_trace(fenced("print(4)") + ANSWER, "4", sandbox))


@pytest.mark.parametrize("split, n", [("traces", 300), ("held_out_traces", 50), ("ood_families", 20)])
def test_embedded_traces_are_all_kept_and_quote_what_came_back(split, n):
    """Guards against a generator whose programs do not do what its answer line says, a busy call that counts
    as a failed script, and one that is busy where the trace says otherwise."""
    async def main():
        async with Sandbox(workers=2, timeout=0.5) as sandbox:
            return await sft.embedded_traces(n, 1.0, 0, sandbox, split)
    traces, counts = asyncio.run(main())
    assert counts == {"kept": n}
    seen = Counter()
    for t in traces:
        assert t["failed_calls"] == []
        *others, last = outputs(t)
        if t["family"] == "search":
            assert set(others) <= {"low", "high"} and last in ("low", "high", "equal")
        else:
            assert last in (t["answer"], "[busy]") and set(others) <= {t["answer"], "[busy]"}
        seen[last == "[busy]"] += 1
    assert seen[True] and seen[False]


def test_text_traces_need_no_sandbox():
    """Guards against code in the text-only baseline's warm start."""
    traces, counts = asyncio.run(sft.embedded_traces(60, 0.0, 0, None))
    assert counts == {"kept": 60} and not any("<code>" in t["response"] for t in traces)


# ------------------------------------------------------------------------------------------------------------
# Quality, contamination, duplicates


EVALUATION = ("A farmer in the northern valley keeps 12 cows, 7 goats and 31 hens on his land and sells 5 "
              "hens to a neighbour each week. After how many weeks are fewer hens than cows left?")
GOOD = "Two and two.\n" + fenced("print(2+2)", "4") + "So it is 4.\n" + ANSWER
EMPTY = GOOD.replace("\n4\n", "\n\n")  # the output is left to the run
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
    ("quality: snippet output is never used", fenced("print(30+7)", "37") + GOOD),
    ("quality: snippet output is never used", fenced("x = 30+7", "") + GOOD),
    ("quality: the answer comes from nowhere", fenced("print(3+2)", "5") + "It is 5.\n" + ANSWER),
    ("quality: no snippet", "It is 4.\n" + ANSWER),
    ("quality: too long", "Well. " * 1000 + GOOD),
    ("contamination: whole question", GOOD, EVALUATION),
    ("contamination: whole question", GOOD, re.sub(r"(\w) (\w\w)", r"\1  \2", EVALUATION.upper())),
    ("contamination: whole question", GOOD, EVALUATION.replace("northern valley", "northernvalley")),
    ("contamination: 13 words", GOOD, EVALUATION.replace("31", "1,250").replace(" 5", " 6")),
    ("contamination: 13 words", GOOD, "Once more: " + EVALUATION.replace("12", "99").replace("After", "In")),
    ("duplicate: same question", GOOD, "A first question,  that is GOOD"),
    ("kept", fenced("print(1/0)") + "That failed.\n" + GOOD, "A third good one: it is noticed."),
    ("quality: error, not corrected", fenced("print(1/0)") + "So far so good.\n" + GOOD),
    ("quality: error, not corrected", EMPTY.replace("print(2+2)", "print(1/0)")),
    ("quality: error, not corrected", EMPTY.replace("print(2+2)", "def f(): return f()\nf()")),
    ("quality: timeout, not corrected", EMPTY.replace("print(2+2)", "while True: pass")),
    ("quality: killed, not corrected", fenced(  # reads memory that is not there
        "import numpy as np\nx = np.lib.stride_tricks.as_strided(np.zeros(1), (2,), (2**40,))\nprint(x[1])")
     + "That failed.\n" + GOOD),
    ("quality: output_limit, not corrected", EMPTY.replace("print(2+2)", "while True: print('x'*1000)")),
    ("quality: error, not corrected", EMPTY.replace("print(", "open('/etc/passwd').read()\nprint(")),
    ("filter: no answer to compare with", GOOD, None, "proof"),
    ("filter: no question or no answer in {messages: [{role: str, content: str}], answer: str} (--question_field and "
     "--answer_field name them)", GOOD, " "),
    ("filter: not well-formed", GOOD.replace("Two", "\ud800")),
    ("filter: no solution", ""),
]


def test_planted_rows_are_each_rejected_for_their_reason(tmp_path):
    """Guards against a fault that slips through, is counted under another name, or stops the run."""
    rows = []
    for i, (_, response, *rest) in enumerate(PLANTED):
        question = rest[0] if rest and rest[0] else f"What is {'xyz'[i % 3] * (i + 1)} of pears and figs?"
        rows.append(trace(question, response, *rest[1:]))
    bad = write(tmp_path / "evaluation.jsonl", [{"question": EVALUATION, "answer": "4"}])
    report = curate("--input", write(tmp_path / "in.jsonl", rows), "--output", tmp_path / "out.jsonl",
                    "--decontaminate", bad, "--sandbox_timeout", "1", "--max_tokens", "2000")
    assert report["reasons"] == Counter(reason for reason, *_ in PLANTED) and report["rows"] == len(PLANTED)
    for reason, examples in report["examples"].items():
        assert len(examples) <= 3 and all(PLANTED[e["row"] - 1][0] == reason for e in examples)
        assert reason[:3] != "con" or all(e["detail"][0] == "evaluation.jsonl:1" for e in examples)
    traces = load_traces(tmp_path / "out.jsonl")
    assert [t["failed_calls"] for t in traces] == [[], [0], [0]]
    assert "ZeroDivisionError: division by zero" in traces[1]["response"]  # what really came back


@pytest.mark.parametrize("code, expected", [
    ("print(48/2)", True), ("print(sum(1 for n in range(2, 9) if n % 7 == 0))", True), ("print(4 > 3)", True),
    ("x = 72\nassert x * 2 == 144\nprint(x)", True), ("print(max(3, 8))", True),
    ("for i in 1, 2: print(i)", True),
    ("from sympy import *\nprint(x.diff(y))", True), ("print(24)", False), ("x = 24\nprint(x, -x)", False),
    ("print('The answer is 24')", False), ("x = 4\nprint(f'{x}')", False), ("print(print(4))", False),
])
def test_a_literal_is_told_from_a_calculation(code, expected):
    """Guards against traces whose code is decoration."""
    assert sft.computes(code) is expected


def test_contamination_does_not_depend_on_numbers_case_or_spacing():
    """Guards against an evaluation problem with other numbers, and against short questions all being one."""
    known = set(contamination_keys(EVALUATION) + contamination_keys("What is 3 + 5?"))

    def is_known(question):
        return not known.isdisjoint(contamination_keys(question))
    for changed in (EVALUATION, EVALUATION.replace("12", "$12.50$").replace("7", "1,000"),
                    EVALUATION.replace(" ", "\n\t"), EVALUATION.replace(" ", ""), "what is 3+5 ?"):
        assert is_known(changed)
    assert not is_known("What is 3 + 6?")
    assert not is_known("A farmer in the northern valley keeps 12 cows, and he has 3 sons.")
    assert not is_known("A farmer in the northern valley keeps 1 cow, 2 goats and 3 hens on his land today.")
    assert is_known("A farmer in the northern valley keeps 9 cows, 8 goats and 1 hens there.")


# ------------------------------------------------------------------------------------------------------------
# The run


def test_the_same_input_gives_the_same_bytes_and_traces_that_training_reads(tmp_path, trusted):
    """Guards against an order that depends on timing, another chat format, and traces that do not pass a
    second time."""
    source = write(tmp_path / "gsm.jsonl", GSM8K)
    for name, in_flight in (("a", 64), ("b", 3)):
        curate("--input", source, "--output", tmp_path / f"{name}.jsonl", "--in_flight", in_flight)
    assert (tmp_path / "a.jsonl").read_bytes() == (tmp_path / "b.jsonl").read_bytes()
    assert not list(tmp_path.glob("*.partial")) + list(tmp_path.glob("*.journal"))
    rows, traces = read(tmp_path / "a.jsonl"), load_traces(tmp_path / "a.jsonl")
    assert len(rows) == len(GSM8K) and all("*user question:*" in r["messages"][0]["content"] for r in rows)
    for i, (source_row, row, t) in enumerate(zip(GSM8K, rows, traces), 1):
        assert (t["question"], t["response"]) == (source_row["question"], row["messages"][1]["content"])
        assert row["place"] == f"gsm.jsonl:{i}" and "<<" not in t["response"]
    assert outputs(traces[0])[0] == "2.0"  # the sandbox's 4/2, not the annotation's 2
    # what comes out goes in again, and all of it is verified anew
    curate("--input", tmp_path / "a.jsonl", "--output", tmp_path / "again.jsonl")
    assert [r["messages"] for r in read(tmp_path / "again.jsonl")] == [r["messages"] for r in rows]
    # Nor is a template of one's own taken for the question.
    (tmp_path / "template").write_text("Say it: {question}")
    curate("--input", source, "--output", tmp_path / "own.jsonl", "--prompt_template", tmp_path / "template")
    assert read(tmp_path / "own.jsonl")[0]["messages"][0]["content"] == f"Say it: {GSM8K[0]['question']}"
    assert load_traces(tmp_path / "own.jsonl")[0]["question"] == GSM8K[0]["question"]
    with pytest.raises(UserError, match="there already"):
        curate("--input", tmp_path / "gsm.jsonl", "--output", tmp_path / "a.jsonl")


def test_a_killed_run_goes_on_without_repeating_or_losing_rows(tmp_path, trusted, monkeypatch):
    """Guards against rows done twice or lost, a torn last line, a mended row that keeps its old fate, rows
    that were done with other arguments, and half a file under the final name."""
    mended = write(tmp_path / "mended.jsonl", GSM8K)
    curate("--input", mended, "--output", tmp_path / "whole.jsonl")
    source = write(tmp_path / "gsm.jsonl", [*GSM8K[:3], {"question": "?"}, *GSM8K[4:]])
    out, journal = tmp_path / "out.jsonl", tmp_path / "out.journal"
    command = ["--input", source, "--output", out, "--in_flight", 4]
    slow = ("import sys; sys.path.insert(0, sys.argv[1]); import test_curate as t\n"
            "t.sft.make_sandbox, t.Trusted.seconds = t.Trusted, 0.05; t.curate(*sys.argv[2:])")
    process = subprocess.Popen([sys.executable, "-c", slow, *map(str, [TESTS, *command])],
                               stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not journal.exists() or journal.read_bytes().count(b"\n") < 6:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not out.exists()
    with open(journal, "a") as file:
        file.write('{"0123": [{"row": 59, "rea')  # as if it had been torn
    finished = journal.read_text().count('"trace"') - 3  # the first chunk is no longer the same
    assert 0 < finished < len(GSM8K)
    source.write_bytes(mended.read_bytes())
    judged, make_trace, interrupt_at = [], sft.make_trace, 60

    async def counting(record, run):
        judged.append(record["row"])
        if record["row"] == interrupt_at:
            raise UserError("interrupted")
        await make_trace(record, run)
    monkeypatch.setattr(sft, "make_trace", counting)
    with pytest.raises(UserError, match="interrupted"):
        curate(*command)
    assert 4 in judged and len(set(judged)) == len(judged) == len(GSM8K) - finished and not out.exists()
    judged.clear()
    with pytest.raises(UserError, match="interrupted"):
        curate(*command)
    assert judged == [57, 58, 59, 60]  # the one chunk that is missing
    with pytest.raises(UserError, match="interrupted"):
        curate(*command, "--prompt_template", "plain")
    assert len(judged) == 4 + len(GSM8K)  # another argument: nothing of the journal holds
    judged.clear()
    evaluated = tmp_path / "evaluated.jsonl"
    for words, n_made in (("Other words.", len(GSM8K)), ("Other words.", 4), ("And others.", len(GSM8K))):
        write(evaluated, [{"question": words, "answer": 1}])
        with pytest.raises(UserError, match="interrupted"):
            curate(*command, "--decontaminate", evaluated)
        assert len(judged) == n_made  # all once more where the file's problems are others
        judged.clear()
    interrupt_at = None
    curate(*command)
    kept = [{**row, "family": "", "place": ""} for row in read(out)]
    assert kept == [{**row, "family": "", "place": ""} for row in read(tmp_path / "whole.jsonl")]
    assert not journal.exists()


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
            time.sleep(0.15)
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


def test_an_endpoint_is_asked_concurrently_and_again_after_errors(tmp_path, trusted):
    """Guards against requests one by one, rows lost to a 429 or 500, and a run stopped by one prompt."""
    pytest.importorskip("openai")

    def answer(body, n):
        if n in (3, 4, 5):
            return (429, "slow down") if n < 5 else (500, "broken")
        if "number 4 " in body["messages"][0]["content"]:
            return 400, "I do not like this prompt"
        return 200, "Sorry." if "number 9 " in body["messages"][0]["content"] else model_reply(body)
    with endpoint(answer) as (url, state):
        report = curate("--input", write(tmp_path / "in.jsonl", GSM8K[:20]), "--output",
                        tmp_path / "out.jsonl", "--rewriter", "api", "--model", "m", "--api_url", url)
    assert report["kept"] == 18 and state.requests == 23 and state.most >= 4
    assert report["reasons"]["rewrite: no calculation, or unfinished"] == 1
    assert report["reasons"]["format: no single final answer"] == 1


def test_an_endpoint_that_gives_up_ends_the_run_with_one_line_and_keeps_what_is_done(tmp_path, trusted):
    """Guards against a paid run that starts from nothing after the quota is used up."""
    pytest.importorskip("openai")
    arguments = ["--input", write(tmp_path / "in.jsonl", GSM8K[:12]), "--output", tmp_path / "out.jsonl",
                 "--rewriter", "api", "--model", "m", "--in_flight", "2"]
    with endpoint(lambda body, n: (200, model_reply(body)) if n < 8 else (429, "quota")) as (url, state):
        with pytest.raises(UserError, match=r"--rewriter api: .*quota") as error:
            curate(*arguments, "--api_url", url)
    assert "\n" not in str(error.value) and state.requests >= 8 + 6
    with endpoint(lambda body, n: (200, model_reply(body))) as (url, state):
        curate(*arguments, "--api_url", url)
    assert state.requests == 6 and len(read(tmp_path / "out.jsonl")) == 12  # three chunks of two were done


def test_a_local_checkpoint_rewrites_in_batches(tmp_path, trusted, monkeypatch, tokenizer, make_models):
    """Guards against one generation per row, texts given to the wrong row, and a crash on a useless text."""
    make_models("qwen2", positions=2048)[1].save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    batches = []

    async def generate(model, tokenizer, prompts, *rest, **options):
        batches.append(len(prompts))
        found = await rollout.generate(model, tokenizer, prompts, *rest, **options)
        for prompt, t in zip(prompts, found):
            content = tokenizer.decode(prompt)
            if "number 4 " not in content:  # the first row keeps what an untrained model says
                text = model_reply({"messages": [{"content": content}]})
                t.response_ids, t.finish_reason = encode_text(tokenizer, text), "eos"
        return found
    monkeypatch.setattr(rewriters, "generate", generate)
    report = curate("--input", write(tmp_path / "in.jsonl", GSM8K[:6]), "--output", tmp_path / "out.jsonl",
                    "--rewriter", "local", "--model", tmp_path / "model", "--max_tokens", "600")
    assert batches == [6] and report["rows"] == 6 and report["kept"] == 5
