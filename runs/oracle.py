"""The best policy for the embedded problems that is known, as a script: what RL could reach.

By hand where the trained model is right by hand; else a script that works, and once more while the
tool is busy; in a search always the middle of what is left.
"""
import numpy as np

from rollout import (
    HIGHEST,
    Sampling,
    ToolCall,
    Trajectory,
    encode_response,
    narrowed,
    noise_bits,
    question_to_box,
)


async def sample(model, tokenizer, problems, sandbox, process, desc, n_samples=1, **sampling):
    """As `eval.sample_all`, on every rank; no model is asked."""
    settings = Sampling(**sampling)
    trajectories = []
    for problem in problems:
        for sample_index in range(n_samples):
            row = Trajectory(problem["key"], sample_index, problem["prompt"])
            row.answer = await respond(problem, row, sandbox, settings)
            row.correct = row.answer == problem["answer"]
            row.finish_reason = "eos"
            text = f"<answer>\\boxed{{{row.answer}}}</answer>"
            row.response_ids, row.loss_mask = encode_response(
                tokenizer, text, max_interpreter_tokens=0)
            row.logprobs = [0.0] * len(row.response_ids)
            trajectories.append(row)
    return trajectories


async def respond(problem, row, sandbox, settings):
    """The answer to a problem; the calls that it takes are appended to the row."""
    async def call(code):
        # The seed that the engine would use: as often busy.
        number = len(row.tool_calls) + 1
        bits = noise_bits(
            settings.seed, settings.step, [row.prompt_index], [row.sample_index], -number)
        result = await sandbox.run(code, seed=int(bits[0] >> np.uint64(33)))
        row.tool_calls.append(
            ToolCall(code, result.output, result.status, start=0, end=0, seconds=0.0))
        return result.output.strip()

    if problem["kind"] == "by hand":
        return problem["answer"]

    if problem["kind"] == "search":
        box = problem["operands"][0]
        low, high = 1, HIGHEST
        while low < high and len(row.tool_calls) < settings.max_calls:
            guess = (low + high) // 2
            verdict = await call(question_to_box(box, guess))
            if verdict == "equal":
                return str(guess)
            low, high = narrowed(low, high, guess, verdict)
        return str((low + high) // 2)

    script = [code for code, works in problem["scripts"] if works][0]
    for _ in range(settings.max_calls):
        output = await call(script)
        if row.tool_calls[-1].status == "ok":
            return output
    return None
