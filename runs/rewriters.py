"""How do solutions become candidates for traces? The rewriters of `sft.py curate`, which checks what they
write: GSM8K's calculator annotations as snippets or as one script, or a model that rewrites freely.

Another one is a function that `make_rewriter` returns, and its name among the choices of --rewriter.
"""
import asyncio
import os
import re
import string
from collections import Counter

import torch

from data import CODE_OPEN, NUMBER_IN_TEXT, numbers, tool_call
from rollout import encode_prompt, generate, load_model, load_tokenizer
from sandbox import UserError

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


def calculator(solution, answer):
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


# A solution may use these numbers unasked.
COMMON = set(range(13)) | {24, 30, 52, 60, 100, 365, 1000}


def program(solution, answer, question):
    """Turn the annotations into one script with a variable a, b, c, ... for each: an operand that
    equals an earlier result is that variable. None if the answer is no result, another result is
    never used, or an operand is found nowhere or in two places (results, question)."""
    # Names taken from the sentences (week_pies_ducks) teach a small model names that it misspells.
    names = iter(string.ascii_lowercase)
    lines = []
    variables = {}  # result -> name
    used = set()  # operands
    given = set(numbers(question))
    sources = Counter(given)  # number -> places where it is found

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

            # "a = 48/2", which stands for 24 from now on.
            expression = NUMBER_IN_TEXT.sub(variable_or_number, step["sum"].strip())
            name = next(names, None)
            if name is None:
                return None
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


REWRITE_PROMPT = f"""Rewrite the solution below so that it uses a Python interpreter where that
helps. Keep the line of thought, also attempts that failed and how that was noticed. Replace each
calculation, enumeration or check that a program does better by a snippet and the output that you
expect:
{tool_call("print(...)", "...")}Each snippet is a complete script with its own imports. It shares
no variable with the others, computes what it prints, and prints what the text then uses. Every
snippet will be run, and its real output put in the place of yours. Close with
<answer>\\boxed{{...}}</answer>, once. Write nothing but the rewritten solution.

Problem:
{{question}}

Solution:
{{solution}}"""


def api_model(args):
    """complete(prompts, seeds) -> texts of an OpenAI-compatible endpoint, None where one is
    unfinished or refused. UserError where it keeps failing."""
    try:
        import openai
    except ImportError:
        raise UserError("--rewriter api needs the package openai (pip install openai)") from None
    client = openai.AsyncOpenAI(
        base_url=args.api_url or None,
        api_key=os.environ.get("OPENAI_API_KEY", "none"),
        max_retries=6)

    async def complete_one(prompt, seed):
        try:
            reply = await client.chat.completions.create(
                model=args.model,
                messages=[{"role": "user", "content": prompt}],
                seed=seed,
                temperature=args.temperature,
                max_tokens=args.max_tokens)
        except openai.BadRequestError:
            return None
        except openai.OpenAIError as error:
            raise UserError(f"--rewriter api: {' '.join(str(error).split())[:200]}") from None
        finished = reply.choices and reply.choices[0].finish_reason == "stop"
        return reply.choices[0].message.content if finished else None

    async def complete(prompts, seeds):
        return await asyncio.gather(*map(complete_one, prompts, seeds))

    return complete


def local_model(args):
    """complete(prompts, seeds) -> texts of a checkpoint, None where one is unfinished."""
    device, dtype = ("cuda", "bf16") if torch.cuda.is_available() else ("cpu", "fp32")
    tokenizer = load_tokenizer(args.model, args.template_kwargs)
    model = load_model(args.model, device, dtype).eval()
    positions = model.config.max_position_embeddings

    async def complete(prompts, seeds):
        encoded = [encode_prompt(tokenizer, "{question}", prompt) for prompt in prompts]
        encoded = [ids[:positions - 1] for ids in encoded]  # leaves room for a token
        longest = max(len(ids) for ids in encoded)
        trajectories = await generate(
            model, tokenizer, encoded,
            sandbox=None,
            tools=False,
            prompt_keys=seeds,
            temperature=args.temperature,
            max_response_tokens=min(args.max_tokens, positions - longest))
        texts = []
        for trajectory in trajectories:
            text = tokenizer.decode(trajectory.response_ids, skip_special_tokens=True)
            texts.append(text if trajectory.is_complete else None)
        return texts

    return complete


def make_rewriter(args):
    """rewrite(records) -> a candidate, or None, for each."""
    async def by_calculator(records):
        return [calculator(record["solution"], record["stated"]) for record in records]

    async def by_program(records):
        return [program(record["solution"], record["stated"], record["question"])
                for record in records]

    async def by_model(records):
        prompts = []
        for record in records:
            prompt = REWRITE_PROMPT.replace("{solution}", record["solution"])
            prompts.append(prompt.replace("{question}", record["question"]))
        seeds = [args.seed + record["row"] for record in records]
        return await complete(prompts, seeds)

    if args.rewriter == "calculator":
        return by_calculator
    if args.rewriter == "program":
        return by_program
    if not args.model:
        raise UserError(f"--rewriter {args.rewriter} needs --model")
    complete = local_model(args) if args.rewriter == "local" else api_model(args)
    return by_model
