"""GSM8K's calculator annotations, as in "sold 48/2 = $<<48/2=24>>24", as code: the rewriters
`calculator` and `program` of `sft.py curate`.

    python runs/gsm8k.py FILE     # the first solutions, rewritten both ways
"""
import builtins
import itertools
import keyword
import re
import sys
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from data import CODE_OPEN, NUMBER_IN_TEXT, numbers, read_row, read_rows, tool_call  # noqa: E402

# Of "48/2 = $<<48/2=24>>24" it matches " = $<<48/2=24>>", but not <<60=60>>: no calculation.
ANNOTATION = re.compile(
    r"(?P<equals> ?=? ?)"
    r"(?P<currency>[$€£¢]?)"
    r"<<(?P<sum>[-+(]*[\d.]+[ )]*[-+*/][\d.+\-*/() ]+)"
    r"=(?P<result>[^<>=]*)>>")


def remove_annotations(text):
    return re.sub("<<.*?>>", "", text)


def is_named_before(step, line):
    """Whether the result stands before its annotation, as in "24, for 48/2 = <<48/2=24>>24", and
    not only as an operand, as in "5 - 3 + 3 = <<5-3+3=5>>5"."""
    told = Counter(numbers(remove_annotations(line[:step.start()])))
    told.subtract(numbers(step["sum"]))
    return any(told[result] > 0 for result in numbers(step["result"]))


def calculator(solution, answer, question=""):
    """Turn the calculator annotations of GSM8K into snippets; None if there are none."""
    def snippet(step):
        return "\n" + tool_call(f"print({step['sum']})", step["result"])

    def in_place(step):
        return step["equals"].rstrip() + snippet(step) + step["currency"]

    text = ""
    for line in solution.splitlines(keepends=True):
        steps = list(ANNOTATION.finditer(line))
        if any(is_named_before(step, line) for step in steps):
            # The snippets stand in front of the line.
            for step in steps:
                text += f"Let me compute {step['sum']}.{snippet(step)}"
            text += line
        else:
            # "sold 48/2 = $<<48/2=24>>24 of": "sold 48/2 =", a snippet, "$24 of".
            text += ANNOTATION.sub(in_place, line)

    if CODE_OPEN not in text:
        return None
    return f"{remove_annotations(text)}\n<answer>\\boxed{{{answer}}}</answer>"


# No part of a variable's name.
FILLERS = set("""and are because but can each for from gets had has have her him his its she that
the their them then there they this thus was were which will with would you""".split())
# A solution may use these numbers unasked.
COMMON = set(range(13)) | {24, 30, 52, 60, 100, 365, 1000}


def naming_words(text):
    return [word for word in re.findall("[a-z]{3,}", text.lower()) if word not in FILLERS]


def variable_name(line, step, taken):
    """A name for the result of an annotation in this line: two words from before its sum and
    two from after it, with a number if the Counter `taken` has it."""
    # "Ann sold 48/2" -> "Ann sold ", "", "/", "".
    phrases = re.split(r"[\d,.;:(]", remove_annotations(line[:step.start()]))
    if "=" in step["equals"]:
        phrases.pop()  # what stands before "=" belongs to the sum

    # The last phrase of words: "ann", "sold".
    words_before = []
    for phrase in phrases:
        if not set(phrase) & set("+-*/"):
            words = naming_words(phrase)
            if words:
                words_before = words

    # "24 of fruit." -> "fruit"
    phrase_after = re.match(r"[\d,.]*([^\d,.;:=(<]*)", line[step.end():])[1]
    words_after = naming_words(phrase_after)

    name_words = dict.fromkeys(words_before[-2:] + words_after[:2])  # each once, in order
    name = "_".join(name_words) or "result"
    taken[name] += 1
    return f"{name}_{taken[name]}" if taken[name] > 1 else name


def program(solution, answer, question):
    """Turn the annotations into one script with a variable for each: an operand that equals an
    earlier result is that variable. None if the answer is no result, another result is never
    used, or an operand is found nowhere or in two places (results, question)."""
    lines = []
    variables = {}  # result -> name
    used = set()  # operands
    given = set(numbers(question))
    sources = Counter(given)  # number -> places where it is found
    taken = Counter(dir(builtins) + keyword.kwlist)

    def variable_or_number(match):
        value = numbers(match[0])[0]
        return variables.get(value, match[0])

    for line in solution.splitlines():
        for step in ANNOTATION.finditer(line):
            for value in numbers(step["sum"]):
                # Fractions need no source, nor does 1.2 where 120 has one: percent.
                is_common = value < 1 or {value, 100 * value} & (given | COMMON)
                if sources[value] > 1 or (sources[value] == 0 and not is_common):
                    return None
                used.add(value)

            # "ann_sold_fruit = 48/2", which stands for 24 from now on.
            expression = NUMBER_IN_TEXT.sub(variable_or_number, step["sum"].strip())
            name = variable_name(line, step, taken)
            lines.append(f"{name} = {expression}")
            for value in numbers(step["result"])[:1]:
                variables[value] = name
                sources[value] += 1

    final = next(iter(numbers(answer)), None)
    if final not in variables or set(variables) - used - {final}:
        return None
    lines.append(f"print({variables[final]})")
    script = tool_call("\n".join(lines), answer)
    return (f"Let me compute this.\n{script}The answer is {answer}.\n"
            f"<answer>\\boxed{{{answer}}}</answer>")


def main(path):
    for place, row in itertools.islice(read_rows(path), 3):
        problem = read_row(row)
        for rewrite in (calculator, program):
            candidate = rewrite(problem["solution"], problem["own"], problem["question"])
            print(f"{place}, {rewrite.__name__}:\n{candidate}\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
