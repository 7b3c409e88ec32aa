r"""Is there one answer that is paid for every question? A search among degenerate answers.

    python tests/search_constants.py                      # all candidates, the table's references
    python tests/search_constants.py ../data/*.jsonl      # and those of these files

A candidate that is right for two references which are not equal to each other is printed.
test_eval.py runs a fast part of it.
"""
import asyncio
import itertools
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from data import load_problems  # noqa: E402
from eval import LABEL, is_equivalent, one_spelling, without_unit  # noqa: E402
from sandbox import Sandbox  # noqa: E402

# References that sympy has to evaluate: no two are equal, and each hides a number below 1e-30.
HARD_REFERENCES = [
    r"\frac{99!}{100!}",
    r"\frac{97!}{98!}",
    r"-\frac{60!}{61!}",
    r"\frac{80!}{79!\cdot 3}",
    r"\frac{\binom{100}{50}}{2^{100}}",
    r"\frac{\binom{365}{23}\cdot 23!}{365^{23}}",
    r"\sqrt{2}\cdot\frac{70!}{71!}",
    r"\frac{\pi\cdot 50!}{52!}",
    r"1-\left(\frac{5}{6}\right)^{60}",
    r"\left(\frac{5}{6}\right)^{60}",
    r"\frac{3^{90}}{4^{90}}",
    r"e^{-100}",
    r"e^{-99}",
    r"\frac{99!}{100!}x",
    r"\frac{98!}{100!}x+y",
    r"x-\frac{99!}{100!}",
    r"x<\frac{99!}{100!}",
    r"x\ge e^{-80}",
    r"\frac{99!}{100!}i",
    r"1+\frac{99!}{100!}i",
    r"\left(\frac{99!}{100!},\infty\right)",
    r"\begin{pmatrix}\frac{99!}{100!}\\0\end{pmatrix}",
    r"\begin{pmatrix}\frac{98!}{100!}\\1\end{pmatrix}",
    r"\{\frac{59!}{60!},\sqrt{2}\}",
    r"y=\frac{99!}{100!}x^2",
    r"x^2+y^2=e^{-90}",
]

SMALL = [r"\frac{1}{10^{40}}", r"-\frac{1}{10^{40}}", "10^{-40}", "10^{-400}", r"\frac{1}{100!}",
         "e^{-200}", "2^{-999}", r"\frac{\pi}{10^{60}}", r"\frac{\sqrt{2}}{9^{99}}",
         r"0\cdot\pi", r"\pi-\pi", r"\sqrt{2}-\sqrt{2}", r"\ln(1)", r"\sqrt{0}", r"\frac{0}{\pi}"]
LARGE = ["10^{40}", "10^{400}", "100!", "e^{200}", "2^{999}", "9^{9^{9}}", "e^{e^{e}}",
         "e^{e^{e^{e}}}", r"\frac{1}{0}", r"\frac{0}{0}", r"\frac{\pi}{0}", r"\infty", r"-\infty",
         r"\infty-\infty", r"\frac{\infty}{\infty}", r"0\cdot\infty", r"\infty\cdot i",
         r"\frac{1}{\infty}", r"\ln(0)", r"\log_{1}{2}", r"\log_{0}{0}", r"0^{0}", r"0^{-1}",
         r"\sqrt{\infty}"]
NAMED = ["0", "1", "-1", "2", r"\pi", "e", "i", "x", "n", "a", "abc", r"\alpha", r"\theta", "xyz",
         "C", "E", "I", "N", "O", "Q", "S", "oo", "nan", "zoo", "None", "True", "False", "inf",
         "pass", r"\text{none}", r"\text{answer}", "?", "_", "!", "|", "=", "<", ".", ",", r"\\", "&",
         "{}", "()", "[]", r"\{\}", r"\emptyset", r"\R", r"\mathbb{C}", r"\mathbb{Z}", r"\pm",
         r"\pm 0", r"\mp 1", r"\ldots", r"\dots", r"\cdots", r"\%", "$", r"\$", r"^\circ", r"\cdot"]
SENTENCES = ["0=0", "x=x", "x=y", "1=1", "1=2", "x<x", r"x\le x", "0<1", "1<0", r"0\le 0", r"x\ne x",
             "f=f", "f(x)", "f(x)=f(x)", "x<y<z", r"x\in\R", r"x\in\emptyset", r"x\in x", "x=5=6",
             r"x<\infty", r"x>\infty", r"-\infty<x<\infty", r"(-\infty,\infty)", r"(\infty,\infty)",
             "(0,0)", "[0,0]", "(1,0)", "[1,0]", r"(x,x)", r"[x,y]", r"(-\infty,-\infty)",
             r"\emptyset\cup\emptyset", r"(0,0)\cup(0,0)", r"\{\emptyset\}", r"\{x\}", r"\{0,0\}",
             "x,x", ",", "0,", ",0", "(,)", r"\{,\}", "0;0"]
FUNCTIONS = [r"\sin x", r"|x|", "|0|", r"\sqrt{x}", r"\sqrt{x^2}", "x^0", "x-x", r"\frac{x}{x}",
             r"0\cdot x", "x!", r"\binom{x}{y}", r"\binom{0}{1}", "(-1)!", "0!", r"\sqrt{-1}",
             r"\sqrt[0]{2}", r"\sqrt[x]{x}", r"\ln x", r"\log_{x}{x}", r"\lim_{x\to 0}x",
             r"\int x\,dx", r"\sum_{n=1}^{0} n", r"\prod_{n=1}^{0} n", r"\frac{d}{dx}x",
             r"\lfloor x\rfloor", r"\max(x,y)", r"\gcd(0,0)", r"x\bmod x", r"x'", "x_{0}", "x^{x^{x}}",
             r"\begin{pmatrix}0\end{pmatrix}", r"\begin{pmatrix}x\end{pmatrix}",
             r"\begin{pmatrix}0&0\\0&0\end{pmatrix}", r"\begin{pmatrix}\end{pmatrix}",
             r"\begin{pmatrix}\frac{1}{10^{40}}\\0\end{pmatrix}", r"\det(0)"]
LONG = ["+".join(["x"] * 60), "1" * 300, "0." + "0" * 60 + "1", "x" * 300, "-" * 60 + "1", "(" * 40 + "0" + ")" * 40,
        "+".join(["10^{-40}"] * 20), r"\cdot".join(["10^{-20}"] * 10), r"\sqrt{" * 20 + "0" + "}" * 20,
        r"\frac{1}{" * 15 + "10^{40}" + "}" * 15, "(x+1)^{99}", "0^{" * 9 + "0" + "}" * 9]
# A tiny number stands where an answer has a number.
FRAMES = ["{}", "{}x", "x-{}", "x+{}", "{}x+y", "x<{}", r"x\ge {}", "x={}", "y={}x", "y={}x^2", "x^2+y^2={}",
          "{}i", "1+{}i", "({},\\infty)", "[{},1)", "\\{{{},\\sqrt{{2}}\\}}", "({},{})", "{},{}",
          "\\sqrt{{{}}}", "e^{{{}}}", "\\ln({})", "\\frac{{1}}{{{}}}", "x^{{{}}}", "|{}|"]
FAST = [*SMALL[:4], "0", "x", r"\infty", r"\frac{0}{0}", "0=0", "x=x", r"\emptyset",
        r"x<\frac{1}{10^{40}}", r"\frac{x}{10^{40}}", r"x-\frac{1}{10^{40}}",
        r"\begin{pmatrix}\frac{1}{10^{40}}\\0\end{pmatrix}"]


def candidates():
    framed = [frame.replace("{}", value).replace("{{", "{").replace("}}", "}")
              for frame, value in itertools.product(FRAMES, SMALL[:6] + LARGE[:4])]
    texts = FAST + SMALL + LARGE + NAMED + SENTENCES + FUNCTIONS + LONG + framed
    return list(dict.fromkeys(texts))


def distinct(texts):
    """One of each spelling. A unit or a label may be missing in an answer: 5 is right for 5 cm and
    for 5 m, so references that have one are left out."""
    by_spelling = {}
    for text in texts:
        spelling = one_spelling(text)
        if not without_unit(spelling)[1] and not LABEL.match(spelling):
            by_spelling.setdefault(spelling, text)
    return list(by_spelling.values())


async def paid_for_different_references(answers, references, sandbox):
    """[(answer, reference, reference)]: the answer is right for both, and they are not equal."""
    constants = []
    for answer in answers:
        verdicts = await asyncio.gather(*(is_equivalent(answer, reference, sandbox) for reference in references))
        paid = [reference for reference, verdict in zip(references, verdicts) if verdict]
        for one, other in itertools.combinations(paid, 2):
            # A judge that is wrong about the answer may be wrong about these in the same way.
            known_to_differ = one in HARD_REFERENCES and other in HARD_REFERENCES
            if known_to_differ or not (await is_equivalent(one, other, sandbox)
                                       or await is_equivalent(other, one, sandbox)):
                constants.append((answer, one, other))
                break
    return constants


async def main(paths):
    from test_eval import DIFFERENT, SAME, groups
    references = HARD_REFERENCES + [members[0] for members in groups(SAME)]
    references += [member for members in groups(DIFFERENT) for member in members]
    for path in paths:
        references += [problem["answer"] for problem in load_problems(path)]
    references = distinct(references)
    answers = candidates()
    begin = time.monotonic()
    async with Sandbox() as sandbox:
        n_constants = 0
        for answer in answers:
            found = await paid_for_different_references([answer], references, sandbox)
            n_constants += len(found)
            for answer, one, other in found:
                print(f"{answer!r} is right for {one!r} and for {other!r}", flush=True)
    print(f"{len(answers)} answers, {len(references)} references, {n_constants} constants, "
          f"{time.monotonic() - begin:.0f} s")


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1:]))
