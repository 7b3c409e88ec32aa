r"""Is an answer judged as a careful person would, and are metrics what they are called?
Run: python -m pytest tests/test_eval.py

The labels of the table were decided by mathematics and by what a careful human grader would say,
before code was run on them. A row of SAME is a group whose members all mean what the first one
means; in a row of DIFFERENT none of the others does. Where two graders could disagree (a base left
out, a pair without its parentheses) the label is "different": a wrong answer that is rewarded costs
more than a right one that is not.

    python tests/test_eval.py       # the whole table: disagreements, precision, recall, pairs/s
"""
import asyncio
import functools
import itertools
import json
import math
import os
import random
import re
import signal
import sys
import time
from collections import Counter
from dataclasses import asdict
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from conftest import StubSandbox, scripted  # noqa: E402
from search_constants import FAST, HARD_REFERENCES, paid_for_different_references  # noqa: E402

import eval as evaluation  # noqa: E402
from data import boxed, extract_answer  # noqa: E402
from eval import (  # noqa: E402
    behaviour_metrics,
    collapse_metrics,
    describe_trajectory,
    exact_value,
    is_equivalent,
    majority,
    one_spelling,
    problem_metrics,
    rollout_metrics,
    stated_answer,
    without_unit,
)
from rollout import Pieces, ToolCall, Trajectory, encode_interpreter, encode_text  # noqa: E402
from runs.results import code_purpose, compare, failure_signatures, paired_gain  # noqa: E402
from sandbox import Sandbox  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]

# -------------------------------------------------------------------------------------------
# The table

# Members of a row are separated by " | ".
SAME = r"""
5 | 5.0 | 5.00 | +5 | 05 | $5$ | 5. | \boxed{5} | \(5\) | (5) | {5} | \mathbf{5} | \text{5} | 10/2
    | \frac{10}{2}
-7 | −7 | - 7 | $-7$ | -7.0 | \left(-7\right) | -\frac{14}{2}
0 | 0.0 | -0 | 0/3
1234567 | 1,234,567 | 1{,}234{,}567 | 1\,234\,567 | 1,\!234,\!567 | 1234567.0
1000 | 1,000 | 1,000.00 | 1 \times 10^3 | 1.0\times10^{3} | 1 \cdot 10^{3}
0.00032 | 3.2 \times 10^{-4} | 3.2\times10^{-4} | .00032
\frac{1}{2} | \dfrac{1}{2} | \tfrac12 | \frac12 | 1/2 | 0.5 | .5 | \frac{2}{4} | \cfrac{1}{2} | \frac 1 2
    | \frac{1}2 | \frac1{2}
-\frac{3}{4} | \frac{-3}{4} | \frac{3}{-4} | -3/4 | -0.75 | -\left(\frac{3}{4}\right) | -.75
\frac{7}{2} | 3\frac{1}{2} | 3 1/2 | 3 \frac12 | 3.5 | 7/2 | 3\tfrac{1}{2}
-\frac{7}{2} | -3\frac{1}{2} | -3 1/2 | -3.5
\frac{11}{111} | 11/111 | \frac{22}{222}
3.0000001 | 30000001/10000000
123456789012345678901234567890 | 123,456,789,012,345,678,901,234,567,890 | 123456789012345678901234567890.0
2\sqrt{2} | 2 \sqrt 2 | 2\sqrt2 | \sqrt{8} | \sqrt8 | 2*sqrt(2) | 2\cdot\sqrt{2} | 2√2 | \sqrt{2}\cdot 2
    | 2 \times \sqrt{2} | \frac{4}{\sqrt{2}} | 2^{3/2}
\frac{\sqrt{3}}{3} | \frac{1}{\sqrt{3}} | \dfrac{\sqrt3}{3} | \frac{1}{3}\sqrt{3} | sqrt(3)/3 | \sqrt{3}/3
    | \sqrt{\frac{1}{3}}
\frac{\pi}{4} | \pi/4 | pi/4 | 0.25\pi | \frac{1}{4}\pi | π/4 | \frac14 \pi | {\pi \over 4}
6\pi | 6 \pi | 6*pi | 6\cdot\pi | \pi \cdot 6 | 6π | 6{\pi}
1+\sqrt{5} | \sqrt{5}+1 | 1 + \sqrt 5 | \left(1+\sqrt{5}\right)
\frac{1+\sqrt{5}}{2} | (1+\sqrt{5})/2 | \frac12+\frac{\sqrt5}{2} | \frac{\sqrt{5}+1}{2}
\sqrt[3]{2} | 2^{1/3} | \sqrt[3]2 | 2^{\frac{1}{3}}
e^2 | e^{2} | e*e
\ln 2 | \ln{2} | \ln(2) | \log_e 2
\log_2 3 | \log_{2}{3} | \log_2(3) | \frac{\ln 3}{\ln 2}
2^{10} | 1024
10! | 3628800 | 10\cdot 9!
\binom{5}{2} | 10 | \dbinom{5}{2} | {5 \choose 2}
3+4i | 4i+3 | 3 + 4i | 3+4\cdot i
\infty | +\infty | infinity | \text{infinity} | ∞
-\infty | - \infty | -∞ | -infinity
2x+1 | 1+2x | 2 x + 1 | 2*x+1 | 2x + 1.0 | y | f(x) = 2x+1 | \left(2x+1\right)
(x+1)(x-1) | x^2-1 | x^{2} - 1 | (x-1)(x+1) | x**2 - 1 | -1+x^2
x^{10} | x^10 | x ^ {10} | x**10 | x^{9}x
\frac{x}{2} | 0.5x | x/2 | \frac12 x | \frac{1}{2}x
4xyz | 4 x y z | 4xzy | 4\cdot x\cdot y\cdot z
\frac{a+b}{c} | \frac{b+a}{c} | (a+b)/c | a/c+b/c
\sin^2 x | \sin^2(x) | (\sin x)^2 | 1-\cos^2 x
a^{-1} | 1/a | \frac{1}{a}
\alpha+\beta | \beta+\alpha | \beta + \alpha
x_1+x_2 | x_2+x_1 | x_{1}+x_{2}
|x| | \left|x\right| | \lvert x \rvert
e^{i\pi/3} | e^{\frac{\pi i}{3}} | e^{\pi i/3}
(1,2) | (1, 2) | \left(1,2\right) | ( 1 , 2 ) | (1.0, 2) | \big(1,2\big) | $(1,2)$
(-1, \frac{1}{2}) | (-1,0.5) | \left(-1,\dfrac12\right) | (-1, 1/2)
(1,-2,3) | (1, -2, 3.0) | \left( 1, -2, 3 \right)
(3, \frac{\pi}{2}) | (3,\pi/2) | \left(3,\frac{\pi}{2}\right)
[1,2] | \left[1,2\right] | [1, 2.0]
[0,\infty) | \left[0,\infty\right) | [0, +\infty) | x \in [0,\infty) | x \ge 0 | x \geq 0 | 0 \le x | x >= 0
    | x≥0
(-\infty,2) | \left(-\infty,2\right) | x<2 | x \in (-\infty, 2) | 2 > x | (-∞, 2)
(1,3] | \left(1,3\right] | 1<x\le 3 | 1 < x \leq 3 | 3 \ge x > 1 | x \in (1,3]
(-\infty,-1)\cup(1,\infty) | (1,\infty)\cup(-\infty,-1) | x<-1 \text{ or } x>1 | (-\infty,-1) \cup (1,+\infty)
    | x \in (-\infty,-1)\cup(1,\infty)
\{1,2\} | \{2,1\} | \{1, 2\} | \left\{1,2\right\} | {1,2} | \{1,2,2\} | x \in \{1,2\} | \lbrace 1,2 \rbrace
\{1,\sqrt{8}\} | \{2\sqrt{2}, 1\} | 1, 2\sqrt{2}
1,2 | 1, 2 | 2,1 | 1 and 2 | 1 \text{ and } 2 | 1 \text{ or } 2 | x=1,2 | x = 1 or x = 2 | x=1, x=2
    | x=2,\ x=1 | \{1,2\} | 1;2 | 1, and 2
100, 200 | 200, 100 | 100 and 200 | \{100,200\} | \{200, 100\}
(1000, 5) | (1,000, 5) | (1000,5)
1,2,3 | 1, 2, and 3 | 3,2,1 | 1,\, 2,\, 3
-2,2 | \pm 2 | 2,-2 | \pm2 | x=\pm 2 | ±2
3+\sqrt{2}, 3-\sqrt{2} | 3 \pm \sqrt{2} | 3\pm\sqrt2 | 3-\sqrt{2}, \sqrt{2}+3
(1,2),(3,4) | (3,4),(1,2) | (1,2), (3,4) | (1,2) and (3,4) | \{(1,2),(3,4)\}
\emptyset | \varnothing | \{\} | \{ \} | ∅
\mathbb{R} | (-\infty,\infty) | \R | (-\infty, +\infty)
5 cm | 5\text{ cm} | 5 \text{cm} | 5\,\mathrm{cm} | 5~cm | 5 centimeters | 5 \mbox{ cm}
5 | 5 cm | 5\text{ apples} | 5 apples | x=5 | x = 5 | n=5 | \$5 | $5 | 5 dollars
12 \text{ cm}^2 | 12 cm^2 | 12\text{ square centimeters} | 12 \text{ sq cm} | 12\ \mathrm{cm}^{2}
18 | \$18 | $18 | $18.00 | 18 dollars | \$18.00 | 18\text{ dollars} | 18 \text{ dollars per day}
2.50 | \$2.50 | $2.5
6\pi | 6\pi \text{ cm} | 6\pi\text{ inches}
2\sqrt{3} | 2\sqrt{3}\text{ units} | x = 2\sqrt{3} | 2\sqrt{3}\ \mathrm{m}
60 miles per hour | 60 mph | 60 \text{ mph}
90^\circ | 90^{\circ} | 90 degrees | 90\text{ degrees} | 90° | 90
\frac{1}{2} | x=\frac12 | P = \frac{1}{2} | P(A)=0.5
50\% | 50% | 50 \% | 50 percent | 50\text{ percent} | 50.0%
50\% | 50
12.5\% | 0.125 | \frac{1}{8}
\text{Evelyn} | Evelyn | \textbf{Evelyn} | evelyn | \mathrm{Evelyn}
\text{yes} | Yes | yes | YES | \text{Yes.}
\text{no solution} | no solution | No solution
\text{(A)} | (A) | A | \textbf{(A)} | \mathrm{A} | A. | \textbf{A}
\text{even} | even | Even
\text{Friday} | friday
x=y | x = y | y=x
y=2x+1 | y = 1+2x | 2x+1=y
x^2+y^2=25 | x^2 + y^2 = 25 | y^2+x^2=25 | x^2+y^2-25=0
\begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix} | \begin{pmatrix}1&2\\3&4\end{pmatrix}
    | \begin{bmatrix} 1 & 2 \\ 3 & 4 \end{bmatrix} | \left[\begin{matrix}1&2\\3&4\end{matrix}\right]
\begin{pmatrix} 1/2 \\ -3 \end{pmatrix} | \begin{pmatrix} 0.5 \\ -3 \end{pmatrix}
    | \begin{pmatrix} \frac{1}{2} \\ -3 \end{pmatrix}
\begin{pmatrix} \sqrt{8} \\ 1 \end{pmatrix} | \begin{pmatrix} 2\sqrt{2} \\ 1 \end{pmatrix}
101_2 | 101_{2} | 101_{{2}}
2516_8 | 2516_{8} | $2516_8$
3:4 | 3 : 4
1 < x < 2 | 1<x<2 | 2>x>1
x>5 | x > 5 | 5<x | (5,\infty)
""".replace("| y | f", "| f")

DIFFERENT = r"""
5 | 6 | -5 | 50 | 0.5 | 5.1 | 55 | \sqrt{5} | 5x | x | 5i | 5^2 | 5\pi | 5! | \frac{1}{5} | 5,6 | (5,6) | 1/0
1,000 | 1.000 | 1,000,000 | 100 | 1,00
12345 | 12, 345 | 1,2345 | (12,345) | 12.345
5 | 5 no | no 5 | 5 \text{ is incorrect, } 6 | \text{not } 5
12 | 1,2 | 1.2 | 1 2 | 1/2 | 21
1234 | 1,2,3,4 | 12,34 | 1.234 | 123,4 | 1 234 5
1/3 | 0.33 | 0.333 | 0.3333333 | 0.33333333333333333 | 33\% | 3
\pi | 3.14 | 3.14159 | 3.141592653589793 | \frac{22}{7} | 180^\circ | 3
\sqrt{2} | 1.414 | 1.41421356 | 2 | \sqrt{3} | -\sqrt{2} | \sqrt[3]{2} | 1.4142135623730951
e | 2.718 | 2.718281828 | 3 | e^2
\frac{2}{3} | \frac{3}{2} | 0.67 | 0.6667 | 2,3 | 23 | -\frac{2}{3} | 2 | 66.7\%
3\frac{1}{2} | \frac{3}{2} | \frac{31}{2} | 31/2 | 3 | \frac{1}{2} | 3,\frac{1}{2}
1000000000000000000000000000001 | 1000000000000000000000000000000 | 1e30x
0.1 | 0.10000001 | 0.1000000001 | 1 | .01
99.99 | 100 | 99.999
50\% | 0.05 | 5000\% | 5\% | 50.5\%
50 | 0.5 | 0.50\% | 5000
10 cm | 10 m | 10\text{ mm} | 10 \text{ cm}^2 | 100 mm
10 \text{ cm} | 100 | 1
\$5 | €5 | 5 cents | \$6 | \$50
5 miles | 5 km | 8 km | 5 hours
5 million | 5 | 5000 | 5,000
5 | 5 thousand | 5 dozen | 5 hundred | 5 squared
5 \text{ or } 6 | 5 | 6 | 11 | 56 | 5 \text{ or } 7
5 | 5,5,6 | 3,4,5,6,7 | 1,2,3,4,5 | 0 or 5 | 4,5 | 5,6 | \{4,5,6\}
1,2 | 1,3 | 1,2,3 | 1 | 2 | -1,-2 | 1,-2
2,3 | (2,3) | [2,3] | 23 | 2.3 | 2/3
(1,2) | (2,1) | [1,2] | \{1,2\} | [1,2) | (1,2] | (1,3) | (1,2,3) | 1 | (1,-2) | (1,2),(1,2)
(1,2,3) | (1,3,2) | (1,2) | (1,2,3,3) | \{1,2,3\} | (1,2,-3)
(1000,5) | (1,000,5,0) | (1,5)
(1,234) | (1234) | (12,34)
[0,\infty) | (0,\infty) | [0,1) | (-\infty,0] | [0,-\infty) | \mathbb{R} | x > 0 | x \le 0
(-\infty,-1)\cup(1,\infty) | (-\infty,1)\cup(1,\infty) | (-\infty,-1)\cap(1,\infty)
    | (-\infty,-1)\cup[1,\infty) | (-\infty,-1),(1,\infty) | (-1,1) | (-\infty,-1)
(1,2)\cup(3,4) | (1,2)\cup(3,5) | (1,4) | (1,2),(3,4) | (1,2)\cup(3,4)\cup(5,6)
\{1,2\} | \{1\} | \{1,2,3\} | \{1,3\} | \emptyset | \{\{1,2\}\} | \{(1,2)\}
\{1,2,3\} | \{1,2,4\} | \{1,2\} | \{1,2,3,4\} | \{-1,2,3\}
\pm 2 | 2 | -2 | \pm 4 | \pm\sqrt{2} | \mp 3
3\pm\sqrt{2} | 3+\sqrt{2} | 3-\sqrt{2} | -3\pm\sqrt{2} | 3\pm 2 | \pm\sqrt{2}
x=5 | y=5 | x=6 | x=-5 | x>5 | x\ne 5
x=1,y=2 | x=2,y=1 | (2,1) | 2,1 | x=1,y=3
x | y | X | 2x | x^2 | -x | x+1 | 5
A | B | C | (D) | a | AB
(A) | (B) | (a,b) | 5
\text{yes} | \text{no} | 1 | 0 | y
\text{even} | \text{odd} | \text{neither} | 2
\text{listen} | \text{silent} | \text{enlist}
\text{Monday} | \text{Tuesday} | \text{Sunday}
\text{five} | 6 | \text{six}
2x+1 | 2x-1 | x+2 | 2y+1 | 2x | 2x+1.0001 | x^2+1 | 2(x+1)
x^2-1 | x^2+1 | (x-1)^2 | x^{-2} | x^3-1 | x^2-y
x^{10} | x^{1}0 | 10x | x^{100} | 10^x
(x+1)^2 | x^2+1 | x^2+2x+2 | (x-1)^2 | 2x+2
\frac{x}{y} | \frac{y}{x} | xy | x-y
\sqrt{x^2} | x | -x | x^2
\sin x | \cos x | \sin 2x | \sin y | x
\log_2 3 | \log_3 2 | \log 3 | \log_2 4 | \ln 3
3+4i | 3-4i | 4+3i | 7 | 5 | 7i
x_1 | x_2 | x | x1+0 | y_1
101_2 | 5 | 101 | 101_3 | 110_2 | 101_{10}
2516_8 | 2516_9 | 1358 | 2516_7
90^\circ | \frac{\pi}{2} | 91^\circ | 9
3:4 | 4:3 | 3:5 | 34 | 3,4 | 7
\infty | -\infty | 0 | 10 | \text{none}
y=2x+1 | y=2x-1 | y=x+2 | x=2y+1 | y=2x | y+2x=1 | 3
x+y=5 | x-y=5 | x+y=6 | 5 | x+y=-5 | x+y
1<x<2 | 1\le x<2 | 1<x<3 | 1<y<2 | x<2 | 1>x>2
x>5 | x<5 | x\ge 5 | y>5 | x>-5 | x>6
\begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix} | \begin{pmatrix} 1 & 3 \\ 2 & 4 \end{pmatrix}
    | \begin{pmatrix} 1 & 2 \\ 3 & 5 \end{pmatrix} | \begin{pmatrix} 1 & 2 & 3 & 4 \end{pmatrix}
    | \begin{vmatrix} 1 & 2 \\ 3 & 4 \end{vmatrix} | -2 | \{1,2,3,4\} | (1,2,3,4)
\begin{pmatrix} 1 \\ 2 \end{pmatrix} | \begin{pmatrix} 2 \\ 1 \end{pmatrix}
    | \begin{pmatrix} 1 & 2 \end{pmatrix} | \begin{pmatrix} -1 \\ 2 \end{pmatrix}
2\sqrt{3} | 3\sqrt{2} | \sqrt{6} | 2\sqrt[3]{3} | 2+\sqrt{3} | \sqrt{12.0001} | 2\sqrt{3}x | 2 | 6
\frac{\pi}{4} | \frac{4}{\pi} | \frac{\pi}{3} | 0.785398 | 45^\circ | -\frac{\pi}{4} | 4\pi | \frac{\pi^2}{4}
1+\sqrt{5} | 1-\sqrt{5} | \sqrt{6} | \sqrt{5} | 3.236067977 | \frac{1+\sqrt{5}}{2}
2^{10} | 2^{11} | 10^2 | 2^{-10} | 20 | 210 | 1025
1 \times 10^3 | 1 \times 10^{4} | 10^{-3} | 1.1\times 10^3 | 103 | 10 | 1 \times 10
no idea | 5 | I do not know | ?
5 | not 5 | 5 is wrong | at least 5 | 5 or more | more than 5 | \approx 5.01 | > 5 | \ge 5 | 5+ | 5?
"""

# (predicted, reference): what is predicted still has to be computed. The other way round may well be right.
UNEVALUATED = [
    (r"\gcd(12,18)", "6"), (r"7^{5} \mod 13", "11"), ("37*99", "3663"), ("12+30", "42"), ("2^{10}", "1024"),
    ("7^5", "16807"), (r"\sum_{n=1}^{10} n^2", "385"), (r"\lfloor 17/5 \rfloor", "3"), (r"\max(3,9)", "9"),
    ("4=5", "5"), (r"37 \cdot 99", "3663"), ("5!", "120"), (r"\sqrt{9}", "3"), ("4$ $5", "5"),
    ("(4)(5)", "20"), ("4 5", "20"), (r"\binom{5}{2}", "10"), (r"5\text{ squared}", "25"), ("1000-7", "993"),
    (r"\frac{2+4}{3}", "2"), ("3/4+1/4", "1"), (r"37 \times 99 \text{ cm}", "3663"), ("x=37*99", "3663"),
    (r"\cos(60^\circ)", r"\frac{1}{2}"), (r"50\% \text{ of } 10", "5"), (r"\int_0^1 2x\,dx", "1"),
    (r"|{-5}|", "5"), (r"\lcm(4,6)", "12"), ("17 mod 5", "2"), (r"17 \bmod 5", "2"), ("6 choose 2", "15"),
    (r"\lim_{x\to 0} \frac{\sin x}{x}", "1"), (r"\log_2 8", "3"), (r"e^0", "1"), (r"\{37*99\}", "3663"),
    (r"\left(37*99, 2\right)", "(3663, 2)"), ("2^{10}, 5", "1024, 5"),
    ("2x=10", "x=5"), ("x+3=8", "x=5"), ("x-5=0", "x=5"), ("2x>10", "x>5"), ("x^2=4", r"x=\pm 2"),
    (r"\arctan(1)", r"\frac{\pi}{4}"),
    (r"\sin(60^\circ)", r"\frac{\sqrt{3}}{2}"), (r"\int_0^1 \pi x\,dx", r"\frac{\pi}{2}"),
    (r"\sum_{n=1}^{\infty} \frac{1}{n^2}", r"\frac{\pi^2}{6}"), (r"\frac{d}{dx} x^2", "2x"),
    (r"\begin{vmatrix} 1 & 2 \\ 3 & 4 \end{vmatrix}", "-2"), ("1011_2", "11"), (r"1.2.3", "6"),
    ("3663 = 37*99 = 3664", "3663"), ("sum(range(11))", "55"), ("pow(7,5,13)", "11"), ("gcd(12, 18)", "6"),
]

# (predicted, reference)
PAIRS = [
    ("5 cm", "5"), ("5", "5 cm"), (r"\$5", "5"), ("50%", "50"), ("50%", "0.5"), (r"90^\circ", "90"),
    ("x=5", "5"), ("2,1", "1,2"), (r"\{1,2\}", "1,2"), ("Yes", "yes"),
    ("x>5", r"(5,\infty)"), (r"x \in [0,1]", "[0,1]"),
    (r"\pm 2", "-2,2"), (r"f(x)=2x+1", "2x+1"), (r"\{5\}", "5"), (r"12\text{ apples}", "12"),
    (r"2\sqrt{3}\text{ cm}", r"2\sqrt{3}"),
    ("5", "5.0"), ("1,000", "1000"), (r"\frac12", "0.5"), (r"\sqrt{8}", r"2\sqrt{2}"), ("2x+1", "1+2x"),
    ("(1,2)", "(1, 2.0)"), (r"\{2,1\}", r"\{1,2\}"), ("50%", r"50\%"), ("5 cm", r"5\text{ cm}"),
    ("x=5", "x = 5.0"), ("(A)", "A"), ("1,2", "1, 2"), (r"3\frac12", "3.5"),
    (r"(1,2)\cup(3,4)", r"(3,4) \cup (1,2)"), (r"\$5", r"\$5.00"),
    (r"\text{yes}", "yes"), (r"90^\circ", r"90^{\circ}"),
]

# Right answers that are known to be missed, either way round: what it would take to read them is
# more than they are worth.
MISSED = {frozenset(pair) for pair in [
    (r"-\left(\frac{3}{4}\right)", r"-\frac{3}{4}"), (r"{\pi \over 4}", r"\frac{\pi}{4}"),
    (r"{5 \choose 2}", r"\binom{5}{2}"), (r"1-\cos^2 x", r"\sin^2 x"), (r"\{1,2,2\}", r"\{1,2\}"),
    (r"x<-1 \text{ or } x>1", r"(-\infty,-1)\cup(1,\infty)"), ("2>x>1", "1 < x < 2"),
    ("101_{{2}}", "101_2"),
    # units with several names
    ("5 centimeters", "5 cm"), (r"12\text{ square centimeters}", r"12 \text{ cm}^2"),
    (r"12 \text{ sq cm}", r"12 \text{ cm}^2"), ("60 mph", "60 miles per hour"),
    (r"60 \text{ mph}", "60 miles per hour")]}


def groups(table):
    lines = table.strip().replace("\n    | ", " | ").splitlines()
    return [[member.strip() for member in line.split(" | ")] for line in lines]


def formats(value):
    """Ways to write a Fraction."""
    sign, n, d = "-" if value < 0 else "", abs(value.numerator), value.denominator
    if d == 1:
        yield from (f"{value}", f"{value}.0", f"{int(value):,}", f"${value}$", f"{int(value):,}.00")
        yield from (f"x = {value}", f"{value}\\text{{ units}}", f"\\boxed{{{value}}}", f" {value} ")
        yield f"{sign}{n:,}".replace(",", "{,}")
        return
    yield from (f"{value}", f"{sign}\\frac{{{n}}}{{{d}}}", f"\\dfrac{{{sign}{n}}}{{{d}}}",
                f"\\left({value}\\right)")
    yield from (f"\\frac{{{2 * n}}}{{{sign}{2 * d}}}", f"x={sign}\\tfrac{{{n}}}{{{d}}}")
    if n > d:
        yield from (f"{sign}{n // d}\\frac{{{n % d}}}{{{d}}}", f"{sign}{n // d} {n % d}/{d}")
    if 1000 % d == 0:
        yield f"{float(value)}"
        yield f"${float(value):.4f}$"


def generated(seed=0, n=60):
    """(predicted, reference, label): numbers in all formats against each other and against near misses."""
    rng = random.Random(seed)
    for _ in range(n):
        value = Fraction(rng.randint(-4000, 99999), rng.choice([1, 1, 1, 2, 3, 4, 7, 8, 12, 25]))
        written = list(formats(value))
        yield rng.choice(written), rng.choice(written), True
        misses = [-value, value + 1, value - 1, value * 10, value / 10, value + Fraction(1, 1000), 2 * value]
        miss = rng.choice([m for m in misses if m != value])
        yield rng.choice(list(formats(miss))), rng.choice(written), False
        other = Fraction(rng.randint(1, 50))
        yield f"{value}, {other}", rng.choice(written), False
        if value != other:
            yield f"({value}, {other})", f"({other}, {value})", False
            yield f"{other}, {value}", f"{value}, {other}", True
    for _ in range(n // 3):
        a, b, c = (rng.randint(2, 9) for _ in range(3))
        yield f"{a}\\sqrt{{{b}}}", f"\\sqrt{{{b}}} \\cdot {a}", True
        yield f"{a}\\sqrt{{{b}}}", f"{a + 1}\\sqrt{{{b}}}", False
        yield f"{a}x^2-{b}x+{c}", f"{c} - {b}x + {a}x^{{2}}", True
        yield f"{a}x^2-{b}x+{c}", f"{a}x^2+{b}x+{c}", False
        yield f"\\frac{{{a}\\pi}}{{{b}}}", f"{a}\\pi/{b}", True
        yield f"\\frac{{{a}\\pi}}{{{b}}}", f"\\frac{{{a}\\pi}}{{{b + 1}}}", False
        yield f"[{a}, {a + b})", f"\\left[{a},{a + b}\\right)", True
        yield f"[{a}, {a + b})", f"({a}, {a + b})", False


def table():
    """All (predicted, reference, label)."""
    for members in groups(SAME):
        yield from ((a, members[0], True) for a in members[1:])
        yield from ((members[0], b, True) for b in members[1:] if not written_out(members[0], b))
    for members in groups(DIFFERENT):
        yield from ((a, b, False) for a, b in itertools.permutations(members, 2) if members[0] in (a, b))
    yield from ((a, b, False) for a, b in UNEVALUATED)
    yield from ((a, b, True) for a, b in PAIRS)
    yield from generated()


def written_out(predicted, reference):
    """2^{10} for 1024, 10! for 3628800, \binom{5}{2} for 10 are no answers, the reverse is."""
    return any(sign in predicted for sign in ("!", r"\binom", "2^{10}")) and reference.isdigit()


@pytest.fixture(scope="module")
def judged():
    """judged(pairs): verdicts of pairs that are judged side by side in one sandbox for the whole file,
    because the judge takes seconds to start. judged.sandbox is that sandbox."""
    loop = asyncio.new_event_loop()
    sandbox = loop.run_until_complete(Sandbox().__aenter__())

    async def verdicts(pairs):
        return await asyncio.gather(*(is_equivalent(*pair, sandbox) for pair in pairs))

    def judge(pairs):
        return loop.run_until_complete(verdicts(pairs))
    judge.sandbox, judge.wait = sandbox, loop.run_until_complete
    yield judge
    loop.run_until_complete(sandbox.__aexit__())
    loop.close()


class DeafJudge:
    """Stands in for the sandbox: finds nothing equal, and counts how often it was asked."""
    asked = 0

    async def equal(self, predicted, reference):
        self.asked += 1
        return False


# -------------------------------------------------------------------------------------------
# Equivalence


def test_a_slice_of_the_table_is_judged_right(judged):
    """Guards against a wrong answer that scores, and a right one that does not; running this file
    judges it all."""
    pairs = list(table())[::8]
    verdicts = judged([pair[:2] for pair in pairs])
    wrong = [pair for pair, verdict in zip(pairs, verdicts) if verdict != pair[2]]
    assert [pair for pair in wrong if frozenset(pair[:2]) not in MISSED] == []


def test_what_still_has_to_be_computed_is_no_answer(judged):
    """Guards against the policy that boxes the question and lets the judge do the arithmetic."""
    assert [pair for pair, verdict in zip(UNEVALUATED, judged(UNEVALUATED)) if verdict] == []


TINY = r"\frac{1}{10^{40}}"


def test_a_tiny_number_is_equal_to_nothing_but_itself(judged):
    """Guards against an evaluation that sets what is below 1e-30 to zero, inside products, beside a
    symbol, in a matrix: one answer would be right for every fraction that is left unevaluated."""
    frames = ["{}", "{}x", "x<{}", "x-{}", "y={}x", "{}i", r"(-\infty,{})", r"\begin{pmatrix}{}\\0\end{pmatrix}"]
    pairs = [(frame.replace("{}", TINY), frame.replace("{}", reference))
             for frame in frames for reference in (r"\frac{99!}{100!}", "e^{-100}", r"\frac{80!}{79!\cdot 3}")]
    pairs += [pair[::-1] for pair in pairs]
    assert [pair for pair, verdict in zip(pairs, judged(pairs)) if verdict] == []
    right = [(r"\frac{1}{100}", r"\frac{99!}{100!}"), ("0.01x", r"\frac{99!}{100!}x"), (TINY, TINY),
             (r"\frac{\pi}{10^{40}}", r"\frac{\pi}{10\cdot 10^{39}}"), (r"x<\frac{1}{100}", r"x<\frac{99!}{100!}")]
    assert [pair for pair, verdict in zip(right, judged(right)) if not verdict] == []


def test_no_constant_answer_is_paid(judged):
    """Guards against an answer that is right for references that differ: a policy would give it always.
    search_constants.py tries all of them."""
    references = HARD_REFERENCES + ["0", "5", r"\sqrt{2}", "2x+1", "x", "x^2=-1", "(1,2)", r"\emptyset", "x>5"]
    assert judged.wait(paid_for_different_references(FAST, references, judged.sandbox)) == []


# Neither is the other: multiplicities and order, values close by, relations, equations that say
# nothing, words that are no units.
LOOKS_ALIKE = [
    ("1,1,2", "1,2,2"), ("(1,2),(1,2),(3,4)", "(1,2),(3,4),(3,4)"), ("(1;2)", "(2;1)"),
    ("[2,1]", "[3,1]"), (r"\{\{1,2\}\}", r"\{1,2\}"), ("x=1,y=2", "2,1"), (r"\emptyset", r"\{0\}"),
    ("0.3333333333x", r"\frac{x}{3}"), ("1.41421356237309504880168872420969807857", r"\sqrt{2}"),
    ("x>3.14159265358979", r"(\pi,\infty)"), ("-1<x<1", "[-1,1]"), ("x>5", "(5,6)"), ("x<1", r"(-\infty,1]"),
    ("0=0", "x^2=-1"), ("x=x", "x^2=-1"), ("y=y", "y=2x+1"), ("5=5", "5=6"), ("x>=x", r"\emptyset"),
    ("5 millions", "5"), ("5 tenths", "5"), ("5 nope", "5"), ("3 quarters", "3"), ("x'", "x"), ("5", "5'"),
    (r"5\text{ m}", r"5\text{ s}"), ("5 cm^2", "5 cm^3"), (r"\pi \text{ million}", r"\pi"),
    (r"\not= 5", "5"), ("x=1x=2", "12"), ("2y=4", "24"), ("0,5", "0.5"), ("1.234,5", "1234.5"), ("True", "x"), (r"\sin(30)", r"\frac{1}{2}")]


def test_what_looks_alike_is_not_equal(judged):
    """Guards against a pattern that reads one thing for another."""
    pairs = LOOKS_ALIKE + [pair[::-1] for pair in LOOKS_ALIKE]
    assert [pair for pair, verdict in zip(pairs, judged(pairs)) if verdict] == []


# What people write for the same, and what must not be read so
OTHER_SPELLINGS = [
    ("4=2y", "2y=4"),
    (r"\fbox{4}", "4"), (r"\boxed{\fbox{4}}", "4"), (r"\fbox{$x+1$}", "x+1"),
    ("(p,q)=(3,2)", "(3,2)"), (r"(x, y) = \left(3, 2\right)", "(3,2)"), ("(x_1,x_2,x_3)=(1,2,3)", "(1,2,3)"),
    (r"(r,\theta)=(3,\frac{\pi}{2})", r"(3,\frac{\pi}{2})"),
    (r"x \lt 3", "x<3"), (r"x\gt 3", r"(3,\infty)"), (r"1\lt x\leqslant 3", "(1,3]"), (r"x \geqslant 3", r"x\ge 3"),
    (r"11,\! 111,\! 100", "11111100"), (r"11{,}\! 111{,}\!100", "11111100"),
    ("11\u2009111\u2009100", "11111100"), ("11\u202f111", "11111"), ("11\u00a0111", "11111"),
    (r"11\thinspace 111", "11111"),
    ("exp(2)", "e^2"), (r"\exp(2)", "e^2"), (r"\exp{2x}", "e^{2x}"), ("3exp(-x)", "3e^{-x}"), (r"\exp(x+1)+1", "e^{x+1}+1"),
    (r"\displaystyle\frac{1}{2}", "0.5"), (r"\displaystyle \sqrt{2}+1", r"1+\sqrt{2}"), (r"\textstyle 5", "5"),
    (r"{\bf 5}", "5"), (r"{\rm B}", "B"), (r"\boldsymbol{x+1}", "x+1"), (r"\bm{5}", "5"), (r"{\bf (1,2)}", "(1,2)"), (r"5{\rm cm}", "5 cm"),
    ("£5", "5"), ("€5", "5"), ("5€", "5"), ("€5", "5 euros"), (r"\pounds 5.50", "£5.5"), ("£1,200", "1200"), ("£5", "5 pounds"),
    ("½", "0.5"), ("3½", r"\frac{7}{2}"), ("-¾", "-0.75"), ("½x", r"\frac{x}{2}"), ("1⁄2", "0.5"),
    ("x²", "x^2"), ("x²+y³", "x^2+y^3"), ("x⁻¹", r"\frac{1}{x}"), ("x¹⁰", "x^{10}"), ("12 cm²", "12 cm^2"), ("x₁+x₂", "x_1+x_2"),
    ("101₂", "101_2"), ("= 5", "5"), ("=5", "x=5"), (r"= \frac{1}{2}", "0.5"), ("= x+1", "x+1"), (r"90\degree", "90"),
]
NO_OTHER_SPELLINGS = [
    ("2 fifths", "2"), ("3 halves", "3"), ("5", "5 hundredths"), ("7 twelfths", "7"), ("1 millionth", "1"),
    (r"\fbox{4}", "5"), ("(p,q)=(3,2)", "(2,3)"), ("(p,q)=(3,2)", "3,2"), ("(p,q)=(3,2)", "(q,p)=(3,2)"),
    ("(p,q)=5", "(5,5)"), ("(p,q)", "(3,2)"), ("(1,2)=(3,2)", "(3,2)"), ("(p,q)=(3,2)=(4,2)", "(3,2)"),
    (r"x \lt 3", "x>3"), (r"x \lt 3", r"x\le 3"), (r"x\gt 3", "3"), (r"11,\! 111", "11,111,000"), ("11\u200911", "1111"),
    ("1 234", "1234"), ("1\u2009234\u20095", "12345"), ("1\u00a023", "123"), ("(1\u2009234)", "(1,234)"),
    ("exp(2)", "2e"), ("exp(2)", "e^{-2}"), ("exp(0)", "1"), ("exp(2)x", "e^{2x}"), (r"\exp(\ln(5))", "5"),
    ("€5", "$5"), ("£5", "€5"), ("£5", "$5"), ("£5", "6"), ("£5", "5 kg"), ("½", "2"), ("3½", "1.5"), ("x½", "x"),
    ("5²", "25"), ("2¹⁰", "1024"), ("x²", "x2"), ("x²", "2x"), ("x²", "x_2"), ("cm²", "cm"), ("x₁", "x1"), ("101₂", "5"),
    ("=", "5"), ("= 37*99", "3663"), ("==5", "5"), ("4 = 5", "5"), ("5 =", "5"), (">= 5", "5"), (r"\bf", "5"), (r"\displaystyle", "x"),
]


def test_what_people_write_for_the_same_is_read(judged):
    """Guards against a right answer that earns nothing for how it is spelled."""
    assert [pair for pair, verdict in zip(OTHER_SPELLINGS, judged(OTHER_SPELLINGS)) if not verdict] == []


def test_no_spelling_makes_a_wrong_answer_right(judged):
    """Guards against a spelling that is read for another thing, or that hides arithmetic."""
    pairs = NO_OTHER_SPELLINGS
    assert [pair for pair, verdict in zip(pairs, judged(pairs)) if verdict] == []


LISTS = [r'["4"]', r'["\\frac{1}{2}", "half"]', r'["\frac{1}{2}", "\times"]', "['5', '\\\\sqrt{2}']", ' [ "90\\u00b0" ] ',
         json.dumps([r"2\pi", r"\text{two pi}"]), str(["3", "(1,2)"])]


def test_any_answer_of_a_list_that_is_written_as_text_is_right(judged):
    """Guards against references like ["4"], for which 4 is wrong and [4] is right, and against LaTeX in
    such a list whose backslashes are or are not escaped."""
    half, two_pi = r"\frac{1}{2}", r"2\pi"
    right = [("4", LISTS[0]), (half, LISTS[1]), ("0.5", LISTS[1]), ("half", LISTS[1]), (half, LISTS[2]),
             ("5", LISTS[3]), (r"\sqrt{2}", LISTS[3]), (r"90^\circ", LISTS[4]), (two_pi, LISTS[5]),
             ("two pi", LISTS[5]), ("3", LISTS[6]), ("(1,2)", LISTS[6]), ("[1,2]", "[1,2]"), ("[x]", "[x]")]
    assert [pair for pair, verdict in zip(right, judged(right)) if not verdict] == []
    wrong = [("5", LISTS[0]), ("[4]", LISTS[0]), ("", LISTS[0]), (LISTS[0], "4"), ("3, (1,2)", LISTS[6]),
             ("1", "[1,2]"), ("[3,4]", '["3","4"]'), ("4", '[["4"]]'), ("4", '["4'), ("", '[""]')]
    assert [pair for pair, verdict in zip(wrong, judged(wrong)) if verdict] == []


@pytest.mark.parametrize("text, value", [
    ("-1,234.5", Fraction(-2469, 2)), ("$18.00", Fraction(18)), ("2/3", Fraction(2, 3)),
    (r"-\frac{2}{3}", Fraction(-2, 3)), (r"3\frac{1}{2}", Fraction(7, 2)), (".5", Fraction(1, 2)),
    (r"6 \times 10^{23}", Fraction(6 * 10**23)), ("1e-3", Fraction(1, 1000)), (r"50\%", Fraction(50)),
    ("5 cm", Fraction(5)), ("1/0", None), ("37*99", None), ("x", None), ("", None), ("9" * 5000, None)])
def test_a_plain_number_is_exact(text, value):
    """Guards against floats, which take 0.1 for another number, and against arithmetic."""
    assert exact_value(without_unit(one_spelling(text))[0]) == value


def test_plain_numbers_are_decided_without_the_judge():
    """Guards against a run on number problems that starts a second pool, or needs math-verify."""
    judge, numbers = DeafJudge(), ["5", "-3.5", r"\frac{1}{2}", "1,234", "x=5", "5 cm", "{5}"]
    pairs = [*itertools.product(numbers, repeat=2), ("2x+1", "5"), ("37*99", "3663"), (None, "5"), ("", "5")]

    async def verdicts():
        return [await is_equivalent(a, b, judge) for a, b in pairs]
    right = [pair for pair, verdict in zip(pairs, asyncio.run(verdicts())) if verdict]
    assert right == [(a, b) for a, b in pairs if a == b or {a, b} <= {"5", "x=5", "5 cm", "{5}"}]
    assert judge.asked == 0


HOSTILE = [
    "10^{10^{10}}", "9" * 4000, r"\frac{" * 500, "(" * 1500 + "1" + ")" * 1500, "{" * 10000 + "}" * 10000,
    "\n\r\n", "\x00\ud800\U0010ffff", "$" * 4000, "9^9^9^9^9", "(10^{10^{8}})!", "x" * 1_000_000, "5," * 1999,
    "x=" * 1900, r"\text{" * 600, '"a' * 1900, "1 " * 1999, "-" * 3999 + "1", r"\sqrt" * 700 + "2",
    "(1,2," * 45 + "3" + ")" * 45, "5 apples " * 440,
    "1,000" * 700, r"\begin{pmatrix}" * 250, r"\pm" * 1000, "x<" * 1900, "99999999999!",
    r"\frac{x}{" * 30 + "y" + "}" * 30, "1/" + "0" * 100, "9e999999",
    "|" * 1000, r"\boxed{" * 500 + "}" * 500,
    "__import__('os').system('touch {path}')", "(((x+1)^{99}+1)^{99}+1)^{99}"]




def test_hostile_answers_are_wrong_and_read_soon(judged, tmp_path):
    """Guards against a policy that stalls, crashes or commands the trainer."""
    judge = DeafJudge()
    hostile = [text.replace("{path}", str(tmp_path / "seen")) for text in HOSTILE]
    hostile += [r"\{" * n + "6" + r"\}" * n for n in (20, 90)]
    pairs = [pair for text in hostile for other in ("5", r"x!+\sqrt{2}", "(1,2)", r"\{5\}", "x>5")
             for pair in ((text, other), (other, text))]
    for pair in pairs:
        begin = time.monotonic()
        assert not asyncio.run(is_equivalent(*pair, judge)), pair
        assert time.monotonic() - begin < 2, pair                # it takes milliseconds
    begin = time.monotonic()
    assert not any(judged([(text, r"x!+\sqrt{2}") for text in hostile])) and not any(tmp_path.iterdir())
    assert time.monotonic() - begin < 60                         # a second of own time for a few


def test_a_killed_judge_comes_back(judged):
    """Guards against all later answers being wrong once the judge died."""
    pair = r"\sqrt{8}", r"2\sqrt{2}"
    assert judged([pair]) == [True]
    killed = judged.sandbox.judge.process
    os.kill(killed.pid, signal.SIGKILL)
    assert judged([pair]) == [True] and judged.sandbox.judge.process is not killed


# -------------------------------------------------------------------------------------------
# The answer that a response states


@pytest.mark.parametrize("text, answer", [
    (r"so \boxed{5}.", "5"),
    (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
    (r"\boxed{ {a{b}} }", "{a{b}}"),
    (r"\boxed{1} then \boxed{2}", "2"),
    (r"\boxed{1} then \boxed{2", "1"),
    (r"\boxed {7}", "7"),
    (r"\boxed{\boxed{3}}", "3"),
    (r"\boxed{", None),
    (r"\boxed{{1}", None),
    ("5", None),
    ("", None),
    (r"\boxed5", None),
    (r"\fbox{4}", "4"),
    (r"\fbox {$\frac{1}{2}$}", r"$\frac{1}{2}$"),
    (r"\boxed{4} \fbox{5}", "5"),
    (r"\boxed{\left\{1\right.}", r"\left\{1\right."), (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
    (r"\fbox{\boxed{5}}", "5"),
    (r"\fbox{4} \fbox{5} \boxed 6", "5"),
    (r"\boxed 4", "4"),
    (r"$\boxed 4$.", "4"),
    (r"\(\boxed -4\) so", "-4"),
    (r"\[\boxed  \frac{1}{2}\]", r"\frac{1}{2}"),
    ("So \\boxed (1, 2)\nfor x < 3", "(1, 2)"),
    (r"<answer>\boxed x < 3</answer>", "x < 3"),
    (r"\boxed A", "A"),
    (r"\boxed 3 then \boxed 4", "4"),
    (r"\boxed 12\pi \sqrt 2", r"12\pi \sqrt 2"),
    (r"\boxed 4 of them", "4 of them"),
    (r"\boxed{4}, in a \boxed 5", "4"),
    (r"in \boxed form", None),
    (r"\boxed {4", None),
    (r"\boxed", None),
    ("\\boxed \n4", None),
    (r"\boxed{}", ""),
])
def test_boxed_is_the_last_complete_one(text, answer):
    """Guards against regular expressions that stop at the first brace, the first of several answers, and a reward
    lost to \\fbox{4} or \\boxed 4."""
    assert boxed(text) == answer


@pytest.mark.parametrize("text, answer", [
    (r"\boxed{5} <code>print('\boxed{6}')</code>", "5"),
    (r"\boxed{5} <interpreter>\boxed{6}</interpreter>", "5"),
    (r"<code>x</code><interpreter>\boxed{6}</interpreter>\boxed{7}", "7"),
    (r"<interpreter>\boxed{6}</interpreter>", None),
    (r"<code>\boxed{6}", None), (r"<interpreter>\boxed{6}", None),
    (r"\boxed{5} <interpreter>\boxed{6}", "5"),
    (r"<interpreter>a</interpreter>\boxed{1}<interpreter>\boxed{2}</interpreter>", "1"),
    (r"<interpreter><code></interpreter>\boxed{8}", "8"),
    (r"\boxed{1<code>x</code>2}", "1\n2"),
])
def test_answers_inside_blocks_do_not_count(text, answer):
    """Guards against an answer that a program printed, or that stands in a block that was never closed."""
    assert extract_answer(text) == answer


def test_boxed_reads_a_text_once():
    r"""Guards against a policy that writes \boxed{ until the context ends: as many scans of it all."""
    begin = time.monotonic()
    assert boxed(r"\boxed{" * 100_000) is None and boxed(r"\boxed{" * 50_000 + "}" * 50_000) == ""
    for text in (r"\boxed 4 ", r"\boxed ", r"\boxed 4<", "<a", " ", "\n"):
        boxed(r"\boxed 4" + text * 100_000)
    assert time.monotonic() - begin < 5


def is_right(trajectory, tokenizer):
    return asyncio.run(is_equivalent(stated_answer(trajectory, tokenizer), "5", DeafJudge()))


def test_a_boxed_answer_inside_an_executed_snippet_is_no_answer(tokenizer):
    """Guards against nested tags: the engine runs from the last <code>, a text filter would start at the
    first."""
    ids = encode_text(tokenizer, "<interpreter><code></interpreter>\\boxed{5}</code>")
    answer = encode_text(tokenizer, "\nSo it is.") + [tokenizer.eos_token_id]
    call = ToolCall("", "", "error", len(encode_text(tokenizer, "<interpreter>")), len(ids), 0.0)
    t = Trajectory(0, 0, [1], ids + answer, [1] * len(ids + answer), [], [call], "eos")
    assert not is_right(t, tokenizer)
    t.tool_calls = []  # the same text, had the engine not run it: the tags alone would have let it pass
    assert is_right(t, tokenizer)


def trajectory(tokenizer, parts, finish_reason="eos"):
    """parts: texts; those of the form ("forced", text) are interpreter tokens."""
    ids, mask = [], []
    for part in parts:
        forced = isinstance(part, tuple)
        new = encode_text(tokenizer, part[1] if forced else part)
        ids, mask = ids + new, mask + [int(not forced)] * len(new)
    if finish_reason == "eos":
        ids, mask = ids + [tokenizer.eos_token_id], mask + [1]
    return Trajectory(0, 0, [5], ids, mask, [0.0] * len(ids), [], finish_reason)


FORCED = ("forced", "\n<interpreter>\n\\boxed{5}\n</interpreter>")


@pytest.mark.parametrize("parts, reason, right", [
    ([r"It is <answer>\boxed{5}</answer>"], "eos", True),
    ([r"It is \boxed{5.0}"], "eos", True),
    ([r"<code>print(5)</code>", FORCED, r"\boxed{5}"], "eos", True),
    ([r"It is \boxed{4}"], "eos", False),
    (["It is 5"], "eos", False),
    ([r"\boxed{5} or rather \boxed{4}"], "eos", False),
    ([r"<interpreter>\boxed{5}</interpreter>"], "eos", False),
    ([r"<interpreter>\boxed{5}"], "eos", False),
    (["<code>print('\\boxed{5}')</code>", FORCED, "Done."], "eos", False),
    (["<code>print('\\boxed{5}')", ], "eos", False),
    (["<code>x</code>", FORCED], "eos", False),
    (["<code>x</code>", FORCED, "So \\boxed{4}"], "eos", False),
    (["<code>x</code>", FORCED, "\n<interpreter>\n\\boxed{5}\n</interpreter>\n"], "eos", False),
    ([r"It is \boxed{5}"], "length", False),
    ([r"It is \boxed{5}"], "max_calls", False),
    ([], "eos", False),
])
def test_only_the_policy_s_own_finished_answer_counts(tokenizer, parts, reason, right):
    """Guards against the reward hacks: print the answer, fake an interpreter block, ramble on."""
    assert is_right(trajectory(tokenizer, parts, reason), tokenizer) is right


# -------------------------------------------------------------------------------------------
# Metrics of problems


def right_of(n, c):
    """Votes of a problem with c right ones among n."""
    return [("5", True)] * c + [("6", False)] * (n - c)


@pytest.mark.parametrize("n", range(1, 8))
def test_pass_at_k_equals_the_share_of_all_subsets_with_a_right_response(n):
    """Guards against 1 - (1 - c/n)^k, which is biased, and against k beyond n."""
    for c in range(n + 1):
        found = problem_metrics([right_of(n, c)])["pass_at_k"]
        assert list(found) == [str(k) for k in sorted({1, 2, 4, n}) if k <= n]
        for k, value in found.items():
            subsets = list(itertools.combinations(range(n), int(k)))
            assert value == pytest.approx(sum(min(s) < c for s in subsets) / len(subsets), abs=1e-12)


def test_pass_at_k_leaves_out_problems_with_fewer_than_k_responses():
    """Guards against comb(n, k) = 0 after a sandbox error, and against counting such a problem as failed."""
    found = problem_metrics([right_of(4, 1), right_of(3, 3), []])
    assert found["pass_at_k"] == {"1": pytest.approx(0.625), "2": pytest.approx(0.75), "4": 1.0}
    assert found["per_problem"] == [(4, 1), (3, 3), (0, 0)] and found["maj_at_n"] == 0.5


@pytest.mark.parametrize("votes, right", [
    ([("5", True), ("6", False), ("6", False)], False),
    ([("5", True), ("6", False)], True), ([("6", False), ("5", True)], False),  # ties: the first
    ([(None, False), (None, False), (None, False), ("5", True)], True),  # silence has no vote
    ([(None, False)], False), ([], False)])
def test_the_majority_is_of_answers_and_ties_go_to_the_first(votes, right):
    """Guards against responses without an answer that outvote the rest, and ties that depend on a hash."""
    assert majority(votes) is right


def test_both_errors_equal_their_formulas_and_a_simulation():
    """Guards against one error that is taken for the other: 30 problems with 32 samples each are not 960."""
    rng = np.random.default_rng(1)
    p, n = rng.random(40), 8
    draw = lambda: [right_of(n, c) for c in rng.binomial(n, p)]  # noqa: E731
    votes = draw()
    rates = np.array([sum(right for _, right in v) / n for v in votes])
    found = problem_metrics(votes)
    assert found["accuracy_error"] == pytest.approx(rates.std() / math.sqrt(40), rel=0.06)
    assert found["sampling_error"] == pytest.approx(math.sqrt((rates * (1 - rates) / (n - 1)).sum()) / 40)
    # the same problems, other noise
    again = [np.mean([right for v in draw() for _, right in v]) for _ in range(300)]
    assert found["sampling_error"] == pytest.approx(np.std(again), rel=0.25)
    assert problem_metrics([right_of(1, 1), right_of(1, 0)])["sampling_error"] is None


def counts(n, correct):
    return {"per_problem": [[n, c] for c in correct]}


def test_the_paired_interval_is_the_analytic_one_and_ignores_how_hard_problems_are():
    """Guards against two intervals side by side: a gain of one in ten on every problem is certain, although
    the problems differ from 0 to 90 %."""
    rng = np.random.default_rng(0)
    first = rng.integers(0, 10, 200).tolist()
    gain, low, high, problems = paired_gain(counts(10, first), counts(10, [c + 1 for c in first]))
    assert gain == pytest.approx(0.1) and low == pytest.approx(0.1) == high and problems == 200
    second = [int(c) for c in rng.integers(0, 11, 200)]
    differences = (np.array(second) - first) / 10
    gain, low, high, _ = paired_gain(counts(10, first), counts(10, second))
    half = 1.96 * differences.std() / math.sqrt(200)
    assert gain == pytest.approx(differences.mean())
    assert [low, high] == pytest.approx([gain - half, gain + half], abs=0.15 * half)
    skipped = {"per_problem": [[10, 5], [0, 0]]}
    assert paired_gain(skipped, counts(10, [6, 9]))[::3] == (pytest.approx(0.1), 1)
    assert compare(counts(0, [0]), counts(0, [0])) == ["-", "-", "0"]


# -------------------------------------------------------------------------------------------
# Metrics of text


def response(tokenizer, *parts, reason="eos"):
    """Parts are sampled texts, or (code, status, output) of a snippet that ran."""
    t = Trajectory(0, 0, [5], finish_reason=reason)
    for part in parts:
        if isinstance(part, str):
            t.response_ids += encode_text(tokenizer, part)
            t.loss_mask += [1] * (len(t.response_ids) - len(t.loss_mask))
            continue
        code, status, output = part
        start = len(t.response_ids)
        t.response_ids += encode_text(tokenizer, f"<code>\n```python\n{code}\n```\n</code>")
        t.tool_calls.append(ToolCall(code, output, status, start, len(t.response_ids), 0.5))
        t.loss_mask += [1] * (len(t.response_ids) - start)
        t.response_ids += encode_interpreter(tokenizer, output, 99)
        t.loss_mask += [0] * (len(t.response_ids) - len(t.loss_mask))
    if reason == "eos":
        t.response_ids, t.loss_mask = t.response_ids + [tokenizer.eos_token_id], t.loss_mask + [1]
    t.logprobs = [-float(i + 1) * sampled for i, sampled in enumerate(t.loss_mask)]
    return t


def signatures_of(tokenizer, trajectories, kind):
    rows = []
    for t in trajectories:
        row = describe_trajectory(t, tokenizer, {"answer": "2", "family": "", "kind": kind})
        row["tool_seconds"] = [call.seconds for call in t.tool_calls]
        rows.append(json.loads(json.dumps(row)))
    return failure_signatures(rows)


TWO = ("print(1 + 1)", "ok", "2\n")
FAILED = ("print(1 / 0)", "error", "ZeroDivisionError: division by zero\n")
BOX = "\n<answer>\\boxed{2}</answer>"


@pytest.mark.parametrize("parts, reason, signatures", [
    ((BOX,), "eos", {"void_turns": 0, "repeated_snippets": None, "literal_prints": None}),
    (("It is two.",), "eos", {"void_turns": 1}), (("It is",), "length", {"void_turns": 1}),
    ((TWO, BOX), "eos", {"void_turns": 0, "uncorrected_failures": 0, "repeated_snippets": 0}),
    ((TWO, BOX), "eos", {"literal_prints": 0}),
    ((BOX, TWO), "eos", {"void_turns": 1}),  # the last turn is EOS alone
    ((TWO,), "length", {"void_turns": 0}),  # no turn came after the output
    ((TWO, "<code>print(3)</code>"), "max_calls", {"void_turns": 0}),  # a snippet, though refused
    ((TWO, "\n<code>\\boxed{2}"), "eos", {"void_turns": 1}),  # no answer that counts
    ((TWO, "Again.", ("print( 1+1 ) # two", "ok", "2\n"), BOX), "eos", {"repeated_snippets": 1}),
    ((TWO, ("print(2 + 1)", "ok", "3\n"), BOX), "eos", {"repeated_snippets": 0}),
    ((("print(1", "error", "x"), ("print(1 ", "error", "x"), BOX), "eos",
      {"repeated_snippets": 0, "literal_prints": None}),
    ((FAILED, TWO, BOX), "eos", {"uncorrected_failures": 0}),
    ((TWO, FAILED, BOX), "eos", {"uncorrected_failures": 1}),
    ((("print(2)", "ok", "2\n"), TWO, BOX), "eos", {"literal_prints": 0.5}),
])
def test_failure_signatures_are_what_they_are_called(tokenizer, parts, reason, signatures):
    """Guards against signatures that fire on right behaviour: an output that meets the limit is no void
    turn, a corrected failure is corrected."""
    found = signatures_of(tokenizer, [response(tokenizer, *parts, reason=reason)], "two scripts")
    assert {name: found[name] for name in signatures} == signatures
    assert found["unneeded_code_seconds"] is None


def test_unneeded_code_costs_its_snippets_and_outputs(tokenizer):
    """Guards against a cost that leaves the interpreter's tokens out or counts responses without code."""
    plain, short, long = (response(tokenizer, *parts)
                          for parts in ((BOX,), (TWO, BOX), ("Hm.", TWO, FAILED, BOX)))
    found = signatures_of(tokenizer, [plain, short, long], "by hand")
    texts = [len(encode_text(tokenizer, text)) + 1 for text in (BOX, "Hm." + BOX)]
    assert found["unneeded_code_seconds"] == pytest.approx((0.5 + 1.0) / 2)
    assert found["unneeded_code_tokens"] == pytest.approx(
        (len(short.response_ids) - texts[0] + len(long.response_ids) - texts[1]) / 2, abs=1)


def test_hostile_snippets_do_not_stop_the_metrics(tokenizer):
    """Guards against a policy whose code crashes the parser in the trainer's process."""
    codes = ["-" * 50_000 + "1", "1" + "+1" * 50_000, "(" * 300, "x\0y", "\ud800", "a" + ".b" * 2000, "if 1:"]
    t = response(tokenizer, BOX)
    t.tool_calls = [ToolCall(code, "", "error", 0, 0, 0.0) for code in codes]
    found = signatures_of(tokenizer, [t], "two scripts")
    assert found["purposes"] == {"unreadable": 1.0} and found["literal_prints"] is None


BUSY = ("print(1 + 1)", "busy", "[busy]")
WRONG = ("print(1 + 2)", "ok", "3\n")


def test_a_busy_tool_is_no_failure_and_no_failure_is_left_out(tokenizer):
    """Guards against a busy tool that counts as a script's error, against self-correction that forgets
    responses which stop after an error, and against a retry that is asked for where no call is left."""
    trajectories = [
        response(tokenizer, BUSY, TWO, BOX),
        response(tokenizer, BUSY, BOX),
        response(tokenizer, BUSY, BUSY, BUSY, BOX),  # after the third no call is left
        response(tokenizer, FAILED, BUSY, TWO, BOX),
        response(tokenizer, FAILED, FAILED, BOX),
        response(tokenizer, BOX)]
    for t in trajectories:
        t.correct = True
    trajectories[1].correct = False
    found = rollout_metrics(trajectories, max_calls=3)
    assert (found["retry_busy"], found["retry_busy_count"]) == (4 / 5, 5)
    assert found["accuracy_after_retry"] == 1.0
    assert (found["self_correction"], found["self_correction_count"]) == (1 / 3, 3)
    assert found["corrected_share"] == 2 / 5
    assert (found["accuracy_with_call"], found["accuracy_without_call"]) == (4 / 5, 1.0)


def embedded(kind, scripts=(), answer="2"):
    return {"kind": kind, "answer": answer, "scripts": list(scripts), "operands": (4821,)}


def test_behaviours_are_what_they_are_called(tokenizer):
    """Guards against a script that counts as another one because its numbers were miscopied, and against
    errors that count as wrong outputs."""
    first, second = ("n=1\nprint(n/0)", False), ("print(1 + 1)", True)
    problems = [embedded("two scripts", [first, second])] * 4 + [embedded("one script", [second])] * 2
    trajectories = [
        response(tokenizer, TWO, BOX),
        response(tokenizer, ("print(4 + 1)", "ok", "5\n"), TWO, BOX),  # the right one, miscopied; then silent
        response(tokenizer, ("n=7\nprint(n/0)", "error", "ZeroDivisionError"), TWO, BOX),
        response(tokenizer, ("2", "ok", ""), BOX),  # no script of traces
        response(tokenizer, WRONG, BOX),
        response(tokenizer, BOX)]
    for i, t in enumerate(trajectories):
        t.prompt_index = i
    found = behaviour_metrics(trajectories, problems)
    assert (found["right_script"], found["right_script_count"]) == (2 / 4, 4)
    assert (found["second_script"], found["script_by_problem"]) == (2 / 4, None)
    either = [problem | {"kind": "either one"} for problem in problems]
    assert behaviour_metrics(trajectories, either)["script_by_problem"] == 2 / 4
    assert found["copied_script"] == 3 / 7
    assert (found["self_correction_silent"], found["self_correction_silent_count"]) == (1 / 3, 3)
    assert found["search_solved"] is None
    assert behaviour_metrics(trajectories, [{"answer": "2"}] * 6)["copied_script"] is None


def test_questions_of_a_search_are_followed(tokenizer):
    """Guards against a middle that is not of what is left."""
    def asked(guess, verdict):
        return f"print(ask(4821,{guess}))", "ok", verdict
    t = response(tokenizer, asked(6, "low"), asked(12, "high"), asked(9, "equal"), BOX)
    # 1..12: 3 are enough on a side; 7..12: 12 leaves none above; 7..11: 9 leaves two on each.
    found = behaviour_metrics([t], [embedded("search")])
    assert (found["middle_probe"], found["middle_probe_count"]) == (2 / 3, 3)
    assert (found["search_solved"], found["search_solved_count"]) == (0.0, 1)
    edge = response(tokenizer, asked(3, "low"), asked(5, "high"), asked(4, "equal"), BOX)
    assert behaviour_metrics([edge], [embedded("search")])["middle_probe_count"] == 2
    # After the answer one number is left.
    again = response(tokenizer, asked(6, "equal"), asked(6, "equal"), BOX)
    assert behaviour_metrics([again], [embedded("search")])["middle_probe_count"] == 1


def test_purposes_agree_with_the_labels_by_hand_as_often_as_the_results_say():
    """Guards against a heuristic that is quoted as if it were a judge. The labels were made before it ran."""
    rows = [json.loads(line) for line in open(ROOT / "tests" / "purposes.jsonl")]
    agreed = sum(code_purpose(row["code"], row["before"]) == row["purpose"] for row in rows)
    assert (agreed, len(rows)) == (32, 50)  # as results/README.md and `code_purpose` say


def slow_collapse(t, pieces):
    """The definition of four log-probabilities, a character at a time."""
    text, tokens = "", []
    for i, (token, sampled) in enumerate(zip(t.response_ids, t.loss_mask)):
        piece = pieces[token] if sampled else "\n#"
        text, tokens = text + piece, tokens + [i] * len(piece)
    found = {}
    for name, tag in (("code_open", "<code>"), ("code_close", "</code>"), ("answer", "<answer>")):
        values = []
        for at in range(len(text)):
            if text[at:at + len(tag)] == tag:
                values += [t.logprobs[i] for i in dict.fromkeys(tokens[at:at + len(tag)])]
        found[name] = sum(values) / len(values) if values else None
    after, count = [], 9
    for i, sampled in enumerate(t.loss_mask):
        count = count + 1 if sampled else 0
        if 1 <= count <= 8:
            after.append(t.logprobs[i])
    return found | {"after_interpreter": sum(after) / len(after) if after else None,
                    "eos": t.logprobs[-1] if t.finish_reason == "eos" else None}


@pytest.mark.parametrize("parts, reason", [
    (("Let me see.\n", TWO, "So it is two, as everybody knows.", BOX), "eos"),
    ((TWO, "No.", FAILED, TWO, BOX), "eos"), (("<co", TWO), "length"),
    (("<answer><answer>",), "length"), ((), "eos")])
def test_the_collapse_monitor_equals_its_definition_by_characters(tokenizer, parts, reason):
    """Guards against tags that are looked up as one token, forced text that is averaged in, and the ninth
    token after an output."""
    t, pieces = response(tokenizer, *parts, reason=reason), Pieces(tokenizer)
    dropped = response(tokenizer, TWO, reason="sandbox_error")
    found = collapse_metrics([t, dropped], pieces)
    for name, value in slow_collapse(t, pieces).items():
        assert found[f"logprob_{name}"] == (value if value is None else pytest.approx(value)), name


def test_tokens_that_run_past_a_tag_count_and_forced_text_never_makes_one():
    """Guards against `</code>` that ends inside a token, and against a tag spelled across an output."""
    pieces = {1: "x<", 2: "code", 3: ">y", 4: "</code>\n", 5: "<"}
    t = Trajectory(0, 0, [9], [1, 2, 3, 4, 1, 2, 3], [1, 1, 1, 1, 1, 0, 1], [-1.0, -2, -3, -4, -5, 0, -7],
                   finish_reason="length")
    found = collapse_metrics([t], pieces)
    assert found["logprob_code_open"] == -2 and found["logprob_code_close"] == -4
    assert found["logprob_after_interpreter"] == -7
    assert found["logprob_eos"] is None is found["logprob_answer"]


def test_what_the_sandbox_refuses_is_counted_and_what_a_snippet_prints_is_not(judged, tokenizer):
    """Guards against a count that the layers' real messages never reach."""
    codes = ["open('/etc/passwd')", "import os\nos.listdir('/root')", "import socket\nsocket.socket()",
             "print('PermissionError: no')\nprint(1)", "print(1 / 0)", "print('PermissionError')\n1 / 0"]

    async def outputs():
        return [await judged.sandbox.run(code) for code in codes]
    results = judged.wait(outputs())
    for result, refused in zip(results, (1, 1, 1, 0, 0, 0)):
        t = response(tokenizer, ("", result.status, result.output), BOX)
        assert collapse_metrics([t], Pieces(tokenizer))["snippets_refused"] == refused, result.output


# -------------------------------------------------------------------------------------------
# An evaluation as a whole


PROBLEMS = [{"question": f"What is {i} + {i}?", "answer": str(2 * i), "family": "addition"}
            for i in range(1, 7)]


def evaluated(model, tokenizer, problems=PROBLEMS, sample=None, limit=99, **settings):
    """`evaluate` in a process group of one, with a sandbox that answers 4."""
    settings = dict(n_samples=3, max_response_tokens=60, seed=3) | settings
    problems = evaluation.encode_problems(problems, tokenizer, "{question}", limit, "test")
    with evaluation.distributed() as process:
        return asyncio.run(evaluation.evaluate(model, tokenizer, problems, StubSandbox(), process, "", sample,
                                               **settings))


def test_votes_are_normalised_and_metrics_stand_under_their_problem(tokenizer):
    r"""Guards against \frac12 and \frac{1}{2} as two votes, and counts that shift behind a skipped prompt."""
    problems = [{"question": "?" * 300, "answer": "9", "family": "addition"},
                {"question": "a", "answer": r"\frac{1}{2}", "family": "addition"},
                {"question": "b", "answer": "7", "family": "sums"}]

    async def sample(model, tokenizer, rows, *common, **settings):
        texts = {1: ["7", "7", r"\frac12", r"\dfrac{1}{2}", r"\frac{1}{2}"], 2: ["7", "8", "9", "9", ""]}
        found = []
        for key in [row["key"] for row in rows]:
            for j, text in enumerate(texts[key]):
                t = response(tokenizer, f"\\boxed{{{text}}}" if text else "?")
                t.prompt_index, t.sample_index = key, j
                t.answer = stated_answer(t, tokenizer)
                t.correct = await is_equivalent(t.answer, problems[key]["answer"], DeafJudge())
                found.append(t)
        return found

    metrics, _ = evaluated(None, tokenizer, problems, sample)
    assert metrics["per_problem"] == [(0, 0), (5, 3), (5, 1)]
    assert metrics["maj_at_n"] == 0.5 and metrics["skipped_long"] == 1 and metrics["accuracy"] == 0.4
    accuracies = {name: found["accuracy"] for name, found in metrics["families"].items()}
    assert accuracies == {"addition": 0.6, "sums": 0.2}


def test_a_skipped_prompt_does_not_change_the_noise_of_the_others(model, tokenizer):
    """Guards against checkpoints compared on other noise because their tokenizers skip other prompts."""
    long = [{"question": "?" * 300, "answer": "9", "family": "sums"}]
    _, all_of_them = evaluated(model, tokenizer)
    _, behind = evaluated(model, tokenizer, PROBLEMS[:2] + long + PROBLEMS[3:])
    kept = [t.response_ids for t in all_of_them if t.prompt_index != 2]
    assert [t.response_ids for t in behind] == kept and {t.prompt_index for t in behind} == {0, 1, 3, 4, 5}


def journaled(path, decisive="weights", chunk=2):
    return evaluation.Journal(open(path, "a+"), chunk, decisive).sample


def test_an_interrupted_evaluation_ends_as_an_uninterrupted_one_bit_for_bit(model, tokenizer, tmp_path,
                                                                            monkeypatch):
    """Guards against problems that are sampled again, or differently, after a kill; a torn line; and
    responses of other weights or settings that are taken over."""
    sampled, real = [], evaluation.sample_all

    async def counted(model, tokenizer, problems, *arguments, **settings):
        if len(sampled) == stop:
            raise KeyboardInterrupt
        sampled.append([problem["key"] for problem in problems])
        return await real(model, tokenizer, problems, *arguments, **settings)

    code = encode_text(tokenizer, "<code>\nprint(4)\n</code>")  # then the model is free
    monkeypatch.setattr(evaluation, "generate",
                        functools.partial(evaluation.generate, logits_processor=scripted(code)))
    monkeypatch.setattr(evaluation, "sample_all", counted)
    stop, path = -1, tmp_path / "journal"
    whole = evaluated(model, tokenizer, sample=journaled(tmp_path / "other"))
    assert sampled == [[0, 1], [2, 3], [4, 5]]
    sampled, stop = [], 2
    with pytest.raises(KeyboardInterrupt):
        evaluated(model, tokenizer, sample=journaled(path))
    with open(path, "a") as file:
        file.write(path.read_text().splitlines()[-1][:99])  # the line that a kill tore
    sampled, stop = [], -1
    resumed = evaluated(model, tokenizer, sample=journaled(path))
    assert sampled == [[4, 5]]
    timeless = lambda m: {k: v for k, v in m.items() if "seconds" not in k}  # noqa: E731
    assert timeless(resumed[0]) == timeless(whole[0])
    assert [asdict(t) for t in resumed[1]] == [asdict(t) for t in whole[1]]
    assert all(t.tool_calls[0].output == "4\n" for t in resumed[1])
    sampled = []
    evaluated(model, tokenizer, sample=journaled(path))
    assert sampled == []  # finished: nothing is left to sample
    for change, settings in (("other weights", {}), ("weights", {"top_p": 0.5})):
        sampled = []
        evaluated(model, tokenizer, sample=journaled(path, change), **settings)
        assert len(sampled) == 3
    sampled = []
    evaluated(model, tokenizer, PROBLEMS[:5] + [PROBLEMS[5] | {"answer": "1"}], sample=journaled(path))
    assert sampled == [[4, 5]]


def test_a_damaged_line_of_a_journal_is_sampled_again(model, tokenizer, tmp_path):
    """Guards against a traceback for bytes that are no text, JSON of another shape, and rows that another version
    wrote."""
    path = tmp_path / "journal"
    whole = evaluated(model, tokenizer, sample=journaled(path))
    lines = path.read_bytes().split(b"\n")
    rows = [number for number, line in enumerate(lines) if line]
    [(key, first)] = json.loads(lines[rows[0]]).items()
    for damaged in (b"[1, 2]", b"5", b"\xff" + lines[rows[0]], lines[rows[0]].replace(b": ", b":\xff", 1), b"\0" * 9,
                    b"[" * 100_000, json.dumps({key: None}).encode(), json.dumps({key: [1]}).encode(),
                    json.dumps({key: [{"tool_calls": 5}]}).encode(),
                    json.dumps({key: [row | {"old_field": 1} for row in first]}).encode()):
        lines[rows[0]] = damaged
        path.write_bytes(b"\n".join(lines))
        again = evaluated(model, tokenizer, sample=journaled(path))
        assert [t.response_ids for t in again[1]] == [t.response_ids for t in whole[1]]


# -------------------------------------------------------------------------------------------

KINDS = [("matrix", "matrix"), ("base", r"\d_"), ("inequality", r"[<>≥]|\\[lg]e"),
         ("interval", r"infty|∞|\\cup|^\["), ("equation", r"[a-z]="), ("set", r"^\\?\{.*,|emptyset"),
         ("tuple", r"^(\\left|\$)?\(.*,"), ("list", r",| and | or |;|\\pm"),
         ("unit", r"[%$°]|\\circ|\d ?[A-Za-z]{2,}|\d\S* ?\\(text|mbox|mathrm)"),
         ("words", r"\\text|[A-Za-z]{3,}$"), ("expression", r"[A-Za-zπ√^!]"), ("number", "")]


async def judge_all(pairs):
    """(verdicts, seconds, how many pairs of expressions math-verify decided)"""
    async with Sandbox() as sandbox:
        await sandbox.equal("x", "y")                            # starts the judge
        begin = time.monotonic()
        verdicts = await asyncio.gather(*(is_equivalent(a, b, sandbox) for a, b, _ in pairs))
        seconds, counts = time.monotonic() - begin, sandbox.judge.counts
        return verdicts, seconds, counts.total() - counts["near_limit"] - 1


def main():
    pairs = list(dict.fromkeys(table()))
    verdicts, seconds, decided = asyncio.run(judge_all(pairs))
    total, missed = Counter(), Counter()
    for (predicted, reference, label), verdict in zip(pairs, verdicts):
        kind = next(kind for kind, pattern in KINDS if re.search(pattern, reference))
        total[kind] += 1
        if verdict != label:
            missed[kind, label] += 1
            print("said equal    " if verdict else "said different", f"{predicted!r:45} {reference!r}")
    for kind, n in total.items():
        print(f"{kind:12} {n:5} pairs, {missed[kind, True]} right ones missed, "
              f"{missed[kind, False]} wrong ones taken")
    right = sum(verdict and pair[2] for verdict, pair in zip(verdicts, pairs))
    equal = sum(label for *_, label in pairs)
    print(f"{len(pairs)} pairs, {equal} of them equal: precision {right / sum(verdicts):.4f}, "
          f"recall {right / equal:.4f}, {len(pairs) / seconds:.0f} pairs/s")
    print(f"math-verify decided {decided} times: {1000 * seconds / decided:.0f} ms each")


if __name__ == "__main__":
    main()
