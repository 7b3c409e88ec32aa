"""Does the report page show what the run folders say, whatever a model has printed?"""
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest

import eval as evaluation
from sandbox import UserError

TEMPLATE = (Path(__file__).parents[1] / "runs" / "report.html").read_text(encoding="utf-8")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
HOSTILE = [
    "</script><script>document.title = 'owned'</script>", "<img src=x onerror=\"document.title = 'owned'\">",
    "<!--<script>", "]]>&lt;iframe src=//x>", "__DATA__ `${document.title = 'owned'}` \\u003c \\",
    "left \u202eright\u2066 \u2028 \u2029 \ufeff \U000e0041 tail\u2028", "bell \x07 esc \x1b[31m null \x00 delete \x7f",
    "lone \ud83d and \udc00", "\ufffd\ufffd e\u0301 \u05d0\u05d1 \U0001d11e"]


def make_run(folder, accuracy, responses=(), finished=True, old=False, **arguments):
    """A run folder of two steps; its responses have a token per word (old: no tokens) and one call."""
    folder.mkdir(parents=True)
    arguments = {"tools": "on", "seed": 1, "sft_seed": 1, "run_dir": str(folder), "steps": 2} | arguments
    (folder / "arguments.json").write_text(json.dumps({"arguments": arguments}))
    evaluation_row = {"accuracy": accuracy, "accuracy_error": 0.0123, "code_ratio_needed": 0.987,
                      "code_ratio_trivial": None, "response_tokens_sampled": 67.89}
    rows = [{"evaluation": "test before"} | evaluation_row | {"accuracy": 0.25}]
    rows += [{"step": step, "accuracy": 0.5, "entropy": float("nan"), "seconds_update": 30.0,
              "response_tokens_sampled": 10.0, "sandbox_outcomes": {"ok": 3}} for step in (0, 1)]
    rows += [{"evaluation": "test after"} | evaluation_row, {"seconds_total": 333.0}] if finished else []
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with open(folder / "rollouts.jsonl", "w") as file:
        for i, response in enumerate(responses):
            tokens = re.findall(r"\s*\S+|\s+$", response)
            numbers = [round(0.1 * n, 3) for n in range(len(tokens))]
            row = {
                "step": 0, "prompt": response, "response": response, "correct": i % 2 == 0, "answer": response,
                "family": response, "finish_reason": "eos", "tool_statuses": ["ok"], "prompt_index": i,
                "sample_index": 0}
            columns = {
                "tokens": tokens, "loss_mask": [int(n != 1) for n in range(len(tokens))], "calls": [[0, 1]],
                "logprobs": numbers, "values": numbers, "advantages": None, "ratios": numbers}
            file.write(json.dumps(row if old else row | columns) + "\n")
    return str(folder)


def embedded(page):
    """What the page's script would read: the text up to the first end of a script element."""
    text = re.search(r'<script type="application/json" id="data">(.*?)</script', page, re.S)[1]
    return json.loads(text)["runs"]


class Elements(HTMLParser):
    """tags: every start tag; texts: id (of the nearest element that has one) -> its text."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.texts, self.ids = [], {}, []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        if tag not in ("meta", "input", "br"):
            self.ids.append((tag, dict(attributes).get("id") or (self.ids[-1][1] if self.ids else "")))

    def handle_endtag(self, tag):
        while self.ids and self.ids.pop()[0] != tag:
            pass

    def handle_data(self, data):
        name = self.ids[-1][1] if self.ids else ""
        self.texts[name] = self.texts.get(name, "") + data


def test_hostile_text_comes_back_exactly_and_never_ends_the_data(tmp_path):
    """Guards against a response that closes the script element, opens a comment, or is changed on the way."""
    page = evaluation.report_page([make_run(tmp_path / "run", 0.5, HOSTILE)])
    (run,) = embedded(page)
    assert [row["response"] for row in run["rollouts"]] == HOSTILE
    before, after = TEMPLATE.split("__DATA__")
    assert page.startswith(before) and page.endswith(after)
    data = page[len(before):-len(after)]
    assert data.isascii() and not set("<>&\n") & set(data)


def test_runs_that_differ_in_seeds_share_a_group_and_keep_their_names(tmp_path):
    """Guards against a band over different settings, and two runs that one link would mean."""
    runs = [make_run(tmp_path / "a" / "run", 0.5), make_run(tmp_path / "b" / "run", 0.5, seed=2),
            make_run(tmp_path / "text", 0.5, tools="off")]
    found = embedded(evaluation.report_page(runs))
    assert [run["group"] for run in found] == [0, 0, 1]
    assert [run["name"] for run in found] == [runs[0], runs[1], "text"]
    assert [run["arguments"]["seed"] for run in found] == [1, 2, 1]
    assert not any("run_dir" in run["arguments"] for run in found)  # nobody's paths in a public page


def test_a_run_that_is_still_writing_is_shown_and_a_damaged_one_is_one_line(tmp_path):
    """Guards against a page that has to wait for the end, and a traceback for a wrong folder."""
    run = make_run(tmp_path / "run", 0.5, ["one two"], finished=False)
    with open(f"{run}/metrics.jsonl", "a") as file:
        file.write('{"step": 2, "accu')
    (found,) = embedded(evaluation.report_page([run]))
    assert [row.get("step") for row in found["metrics"]] == [None, 0, 1]
    assert found["metrics"][1]["entropy"] is None  # NaN would end JSON.parse
    (tmp_path / "run" / "rollouts.jsonl").unlink()
    assert embedded(evaluation.report_page([run]))[0]["rollouts"] == []
    with open(f"{run}/metrics.jsonl", "a") as file:
        file.write("\n")
    with pytest.raises(UserError, match=r"^--report .*run/metrics.jsonl: [^\n]*$"):
        evaluation.report_page([run])
    (tmp_path / "run" / "metrics.jsonl").unlink()
    with pytest.raises(UserError, match=r"^--report .*run/metrics.jsonl: [^\n]*No such file[^\n]*$"):
        evaluation.report_page([run])
    for name in ("metrics.jsonl", "arguments.json"):
        for damaged in ("[]\n", "5\n", '{"arguments": [1]}\n'[name == "metrics.jsonl":]):
            (tmp_path / "run" / name).write_text(damaged)
            with pytest.raises(UserError, match=rf"^--report .*run/{name}: [^\n]*$"):
                evaluation.report_page([run])
        (tmp_path / "run" / name).write_text("")


@pytest.mark.parametrize("flags, message", [
    (["--report", "x"], "--report needs --output"), (["--report", "x", "--model", "y"], "give either"),
    ([], "give either")])
def test_contradicting_flags_are_one_line(flags, message, monkeypatch, capsys):
    """Guards against a report that goes nowhere, or a second task that is silently left out."""
    monkeypatch.setattr("sys.argv", ["eval.py", *flags])
    with pytest.raises(SystemExit):
        evaluation.parse_arguments()
    assert f"error: {message}" in capsys.readouterr().err


def test_the_template_loads_nothing_and_makes_no_markup_of_text():
    """Guards against a library from a network, and data that reaches the HTML parser."""
    assert set(re.findall(r"[a-z]+://[^\"')\s]+", TEMPLATE)) == {"http://www.w3.org/2000/svg"}  # a name, no address
    assert not re.search(r"innerHTML|outerHTML|insertAdjacent|document\.write|\beval\(|Function\(|\bsrc=|@import|"
                         r"\burl\(|\bfetch\(|<link|\son[a-z]+=\"", TEMPLATE)
    places = [TEMPLATE.index(text) for text in (
        "Content-Security-Policy", "default-src 'none'", "require-trusted-types-for 'script'", "<style", "<script")]
    assert places == sorted(places)


@pytest.mark.skipif(not CHROMIUM, reason="no Chromium, so the page is not opened")
def test_a_browser_shows_the_numbers_and_runs_no_response(tmp_path):
    """Guards against a summary that is not metrics.jsonl's, a response that becomes an element or runs, and
    characters that hide or turn text around."""
    runs = [make_run(tmp_path / "one", 0.9, HOSTILE), make_run(tmp_path / "two", 0.8, ["plain"] * 3, seed=2),
            make_run(tmp_path / "off", 0.3, HOSTILE[:2], finished=False, old=True, tools="off")]
    (tmp_path / "page.html").write_text(evaluation.report_page(runs), encoding="utf-8")
    shown = subprocess.run(
        [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
         "--disable-background-networking", "--disable-component-update", "--disable-sync",
         f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=5000", "--dump-dom",
         f"file://{tmp_path}/page.html#one:6"], capture_output=True, text=True, timeout=60)
    page = Elements(shown.stdout)
    assert re.sub(r"\s+", " ", page.texts["table"]).count("85.0 ± 1.2[80.0, 90.0]") == 1  # mean of 0.9 and 0.8
    assert all(text in page.texts["table"] for text in ("25.0 ± 1.2", "98.7", "67.9", "2, unfinished", "5.5"))
    assert page.texts["count"] == "14 of 14 responses"
    assert page.texts["panels"].count("not recorded") == 8  # of eleven panels; NaN is no value
    assert page.tags.count("script") == 2 and not {"img", "iframe", "form", "object", "link"} & set(page.tags)
    assert "owned" not in page.texts[""].split("ReTool")[0]  # the title
    detail, hidden = page.texts["detail"], "⟨U+2028⟩ ⟨U+2029⟩ ⟨U+FEFF⟩ ⟨U+E0041⟩ tail⟨U+2028⟩"
    assert f"left ⟨U+202E⟩right⟨U+2066⟩ {hidden}" in detail  # the prompt
    assert detail.count(hidden) == 5  # family, prompt, reference, what the model wrote, its tokens
    for name in ("list", "detail", "pair", "filters"):
        assert not re.search("[\u202a-\u202e\u2066-\u2069\u2028\u2029\x00-\x08\x0e-\x1f\x7f]", page.texts[name])
    assert "bell ⟨U+0007⟩ esc ⟨U+001B⟩[31m null ⟨U+0000⟩ delete ⟨U+007F⟩" in page.texts["list"]
    assert "lone ⟨U+D83D⟩ and ⟨U+DC00⟩" in page.texts["list"]
    assert page.texts["pair"].count("Tokens by value: not recorded.") == 1  # of two runs, the old one
    assert HOSTILE[0] in page.texts["list"] and HOSTILE[1] in page.texts["pair"]
