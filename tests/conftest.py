"""What the tests share: the embedded tokenizer, tiny random models, a stub sandbox, and a policy that says
what it is told. Which question is asked where:

    test_rooms.py     do imports go one way, and are there six rooms?
    test_sandbox.py   what can a snippet do, and what not?
    test_rollout.py   are the tokens right, whatever the batch? is text cut and masked where it should be?
    test_varlen.py    is attention as a GPU computes it that of the CPU? do rows survive that they are preempted?
    test_models.py    which architectures are computed right, and are the others refused in one line?
    test_train.py     are log-probabilities, loss and gradient those of the plain model, however packed?
    test_data.py      are problems right, endless, and apart? is every layout understood?
    test_ranks.py     which rank gets which device, and is everything right where they differ?
    test_device.py    does everything that meets on a GPU lie there?
    test_check_gpu.py  does runs/check_gpu.py find what is wrong, survive it, and say what it measured?
    test_words.py     is the task of runs/words.py right?
    test_eval.py      is an answer judged as a careful person would? are metrics what they are called?
    test_plan.py      is the plan of memory what a large model holds, and do the scripts fit it?
    test_oracle.py    is the best policy known as good as it is called, and are intervals over seeds?
    test_experiments.py  are the findings what the committed outputs say?
    test_ablations.py  is every flag the arithmetic it is called?
    test_curate.py    is every trace true, and does a curation survive bad rows and kills?
    test_report.py    does the report page show what the run folders say, whatever a model has printed?
    test_ppo.py       are GAE and losses the equations? do the scripts run, resume, and refuse bad input?

bench_*.py are run by hand: they hold the slow twins and print the speed of both. preloaded.py is what the
processes that test_ppo.py starts have in common.
"""
import asyncio
import os
import sys
from pathlib import Path

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # before torch: no test touches a GPU by accident

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config, Qwen3Config

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import data  # noqa: E402
import rollout  # noqa: E402
from sandbox import SandboxResult  # noqa: E402

torch.set_num_threads(1)

# Grouped, multi-query and plain heads; a head dim that is not hidden size / heads; query and key norms.
CONFIGS = {
    "qwen2": lambda **k: Qwen2Config(num_attention_heads=4, num_key_value_heads=2, **k),
    "llama": lambda **k: LlamaConfig(num_attention_heads=4, num_key_value_heads=1, **k),
    "qwen3": lambda **k: Qwen3Config(num_attention_heads=6, num_key_value_heads=2, head_dim=16, **k),
    "llama_mha": lambda **k: LlamaConfig(num_attention_heads=4, num_key_value_heads=4, **k),
}


@pytest.fixture(scope="session")
def tokenizer():
    return data.embedded_tokenizer()


@pytest.fixture(scope="session")
def make_models(tokenizer):
    """make_models(architecture) -> (model for `generate`, the same weights under Hugging Face's own
    attention), float64."""
    made = {}

    def make(architecture, vocabulary=len(tokenizer), positions=256):
        key = architecture, vocabulary, positions
        if key not in made:
            config = dict(vocab_size=vocabulary, hidden_size=32, num_hidden_layers=2, intermediate_size=48,
                          max_position_embeddings=positions, tie_word_embeddings=False, bos_token_id=None,
                          eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
            torch.manual_seed(0)
            ours = AutoModelForCausalLM.from_config(CONFIGS[architecture](**config),
                                                    attn_implementation="retool")
            theirs = AutoModelForCausalLM.from_config(CONFIGS[architecture](**config),
                                                      attn_implementation="eager")
            ours, theirs = ours.double().eval(), theirs.double().eval()
            with torch.no_grad():  # biases and norms too: as initialised they would hide a lost bias
                for name, weight in ours.named_parameters():
                    weight.copy_(1 + 0.2 * torch.randn_like(weight) if "norm" in name else 0.25 *
                                 torch.randn_like(weight))
            theirs.load_state_dict(ours.state_dict())
            made[key] = ours, theirs
        return made[key]

    return make


@pytest.fixture(scope="session")
def model(make_models):
    return make_models("qwen2")[0]


class StubSandbox:
    """Answers every snippet with `answer(code)` (a text or a SandboxResult); `ran` holds (code, seed)."""

    def __init__(self, answer="4\n", delay=lambda code: 0.0):
        self.answer = answer if callable(answer) else lambda code: answer
        self.delay, self.ran, self.cancelled = delay, [], 0

    async def run(self, code, seed=0):
        self.ran.append((code, seed))
        try:
            await asyncio.sleep(self.delay(code))
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        result = self.answer(code)
        return result if isinstance(result, SandboxResult) else SandboxResult("ok", result)

    async def equal(self, predicted, reference):
        return predicted == reference


def scripted(scripts, seen=None):
    """A logits_processor: sampled token number n of a row is script[n]; None or the script's end leaves the
    model free.

    scripts: {(prompt_index, sample_index): ids}, a function of the trajectory, or one list for all rows.
    seen: a dict that receives the untouched logits under (prompt_index, sample_index, position in the
    response).
    """
    def processor(logits, trajectories):
        logits = logits.clone()
        for row, t in zip(logits, trajectories):
            if seen is not None:
                key = t.prompt_index, t.sample_index, len(t.response_ids)
                assert key not in seen, "a position was sampled twice"
                seen[key] = row.clone()
            if callable(scripts):
                script = scripts(t)
            else:
                script = scripts[t.prompt_index, t.sample_index] if isinstance(scripts, dict) else scripts
            n = sum(t.loss_mask)
            if n < len(script) and script[n] is not None:
                row[:] = -torch.inf
                row[script[n]] = 0.0
        return logits
    return processor


def run(model, tokenizer, prompts, sandbox=None, **options):
    return asyncio.run(rollout.generate(model, tokenizer, prompts, sandbox, **options))


def decode(tokenizer, ids):
    return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
