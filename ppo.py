"""How does it improve? PPO on answers reached with a code interpreter.

One step: sample responses with tool calls (rollout.py) -> +1 / -1 for the final answer ->
log-probabilities and values by the trainer's own weights -> GAE over sampled tokens only ->
clipped updates of actor and critic -> copy the weights to the sampler. Interpreter tokens are
context: no loss, reward, value or step of GAE.

What the paper leaves open, and what is done here:
 1. The critic is a copy of the warm start with a scalar head; at first it learns alone.
 2. Advantages are whitened over the global batch; a floor under their deviation keeps a nearly
    perfect batch, in which only a few responses differ, from amplifying noise.
 3. Losses are sums over trainable tokens, divided once by their number in the minibatch.
 4. A truncated response scores -1, is terminal (nothing is bootstrapped), stays in the loss.
 5. The KL coefficient is 0.0 as in the paper; only with --kl_coef is there a reference model.
 6. Clip range, value clip, gamma and lambda are those of public recipes.

    torchrun --nproc_per_node 2 ppo.py               # the whole method on two CPU cores
    torchrun ppo.py --tools off --code_share 0       # its text-only twin, on one
    torchrun ppo.py --train_data gsm8k_train.jsonl --eval_data gsm8k_test.jsonl
    torchrun --nproc_per_node 8 ppo.py --model DIR --train_data ...   # a warm-started checkpoint

In shape comments: B responses, T tokens (of a padded batch or a flat packed stream).
"""
import argparse
import functools
import json
import math
import os
import random
import subprocess
import time
from collections import Counter
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from safetensors import SafetensorError
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

import sft
from data import embedded_problem, embedded_rows, encode_prompt, load_problems, load_template
from eval import (PAPER, Help, add_format_arguments, add_rollout_arguments, at_least,
                  check_positions, collapse_metrics, describe_trajectory, encode_problems, evaluate, evaluation_table,
                  in_range, make_sandbox, mean, need_values, parse_flags, percent, report_page,
                  rollout_metrics, rollout_settings, run_script, sample_all)
from rollout import Pieces, load_model, load_tokenizer
from sandbox import UserError
from sft import (Policy, add_trainer_arguments, all_sum, check_mesh, clipped_step, collate, find_checkpoint,
                 make_example, pack, save_checkpoint, shard, sync_to_disk, sync_weights,
                 time_is_up, training_state, zero_moments)

# ------------------------------------------------------------------------------------------------------------
# The algorithm, as pure functions


def gae(rewards, values, loss_mask, gamma, lam):
    """Generalised advantage estimation (arXiv 1506.02438) that sees only the trainable tokens.

    rewards, values, loss_mask: (B, T). values[b, t] is V of the state BEFORE token t, read at
    the token in front of it (after a call: the last interpreter token). lam: a number, or (B,).
    Returns (advantages, returns), (B, T), exactly 0 where masked:
        delta_t = r_t + gamma V_{t+1} - V_t,   A_t = delta_t + gamma lam A_{t+1},   V = A = 0 at the end
    with the masked tokens deleted: interpreter text neither decays lambda nor bootstraps.
    """
    trainable = loss_mask.bool()
    advantages = torch.zeros_like(values)
    next_value = next_advantage = torch.zeros_like(values[:, 0])  # (B,)
    for t in reversed(range(values.shape[1])):
        now = trainable[:, t]
        advantage = rewards[:, t] + gamma * next_value - values[:, t] + gamma * lam * next_advantage
        advantages[:, t] = torch.where(now, advantage, 0.0)
        next_value = torch.where(now, values[:, t], next_value)
        next_advantage = torch.where(now, advantage, next_advantage)
    return advantages, torch.where(trainable, advantages + values, 0.0)


def turn_gae(rewards, values, loss_mask, gamma, lam):
    """`gae` whose steps are turns, the runs of trainable tokens between interpreter blocks: a turn's
    reward is the sum over its tokens, its value that of its first token, and all its tokens get
    its advantage and its return."""
    trainable = loss_mask.bool()
    first = trainable & ~F.pad(trainable, (1, 0))[:, :-1]
    turn = first.cumsum(1)  # (B, T): number of the turn

    def turn_sums(x):
        sums = x.new_zeros(x.shape[0], x.shape[1] + 1).scatter_add(1, turn, x)
        return sums.gather(1, turn)

    found = gae(turn_sums(rewards * loss_mask), values, first, gamma, lam)
    return tuple(turn_sums(x) * loss_mask for x in found)


def adaptive_lam(loss_mask):
    """lambda (B,) = 1 - 1 / (0.05 l) of a response of l trainable tokens (arXiv 2504.05118)."""
    return (1 - 20 / loss_mask.sum(1).clamp(min=1)).clamp(min=0)


def whiten(advantages, loss_mask, floor):
    """(advantages - mean) / max(deviation, floor) over trainable tokens, 0 where masked."""
    trainable = loss_mask.bool()
    chosen = advantages[trainable]
    scale = chosen.std(unbiased=False).clamp(min=floor)
    return torch.where(trainable, (advantages - chosen.mean()) / scale, 0.0)


def group_advantages(totals, groups, kind):
    """Advantages (B,) of responses with rewards `totals` (B,), without a critic. groups (B,): one
    number per prompt. "grpo": (R - mean) / (deviation + 1e-4) of the group (arXiv 2402.03300);
    "rloo": R - mean of the others in the group (arXiv 2402.14740)."""
    advantages = torch.zeros_like(totals)
    for group in groups.unique():
        members = groups == group
        own, n = totals[members], int(members.sum())
        if kind == "grpo":
            advantages[members] = (own - own.mean()) / (own.std(unbiased=False) + 1e-4)
        elif n > 1:  # alone in its group, after others were dropped, a response has no baseline
            advantages[members] = (own - own.mean()) * n / (n - 1)
    return advantages


def advantages_and_returns(rewards, values, loss_mask, groups, kind, unit, gamma, lam_actor, lam_critic,
                           whiten_floor):
    """(advantages, returns: the critic's targets), each (B, T), 0 where masked.

    rewards, loss_mask, values (B, T) as in `gae`. kind "gae", by unit "token" or "turn": whitened;
    lam_actor may be "adaptive". Else `group_advantages` of every response on all its tokens, and
    neither values nor returns.
    """
    if kind != "gae":
        return group_advantages((rewards * loss_mask).sum(1), groups, kind)[:, None] * loss_mask, None
    estimate = turn_gae if unit == "turn" else gae
    lam_actor = adaptive_lam(loss_mask) if lam_actor == "adaptive" else lam_actor
    raw, _ = estimate(rewards, values, loss_mask, gamma, lam_actor)
    _, returns = estimate(rewards, values, loss_mask, gamma, lam_critic)
    return whiten(raw, loss_mask, whiten_floor), returns


def explained_variance(values, returns, loss_mask):
    """1 - Var(returns - values) / Var(returns) over trainable tokens."""
    trainable = loss_mask.bool()
    error, spread = (returns - values)[trainable].var(), returns[trainable].var()
    return (1 - error / spread).item() if spread > 1e-6 else 0.0  # returns all alike


def policy_loss(logprobs, old_logprobs, advantages, loss_mask, clip_low, clip_high, dual_clip=0.0,
                weights=1.0):
    """Clipped surrogate (arXiv 1707.06347), summed over trainable tokens; all of one shape.

    -w min(r A, clip(r, 1 - clip_low, 1 + clip_high) A) with r = exp(logprobs - old_logprobs) and
    weights w; with dual_clip c > 0, where A < 0: at most -w c A (arXiv 1912.09729).
    Returns (sum, metrics), also sums: approx_kl of r - 1 - log r; clip_fraction of tokens
    without gradient.
    """
    # Masked here, not at the end: exp could overflow, and inf * 0 is nan, as nan * 0 is.
    log_ratio = torch.where(loss_mask.bool(), logprobs - old_logprobs, 0.0)
    ratio = log_ratio.exp()
    unclipped = ratio * advantages
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high) * advantages
    surrogate, flat = torch.minimum(unclipped, clipped), clipped < unclipped
    if dual_clip:
        flat = flat | ((advantages < 0) & (surrogate < dual_clip * advantages))
        surrogate = torch.where(advantages < 0, surrogate.clamp(min=dual_clip * advantages), surrogate)
    loss = -(weights * surrogate * loss_mask).sum()
    return loss, {"approx_kl": ((ratio - 1 - log_ratio) * loss_mask).sum().detach(),
                  "clip_fraction": (flat * loss_mask).sum()}


def importance_weights(old_logprobs, sampler_logprobs, sampled, most=2.0):
    """min(pi_old / pi_sampler, most) of sampled tokens, else 1: corrects for a sampler that is not
    the policy of the update (truncated importance sampling, by token)."""
    return torch.where(sampled.bool(), old_logprobs - sampler_logprobs, 0.0).exp().clamp(max=most)


def reference_kl(logprobs, reference_logprobs, loss_mask):
    """KL(policy || reference) by the k3 estimate r - 1 - log r with r = pi_reference / pi, never
    negative, summed over trainable tokens (joschu.net/blog/kl-approx.html)."""
    log_ratio = torch.where(loss_mask.bool(), reference_logprobs - logprobs, 0.0)
    return (log_ratio.exp() - 1 - log_ratio).sum()


def value_loss(values, old_values, returns, loss_mask, value_clip):
    """0.5 max((V - R)^2, (V_clipped - R)^2), V_clipped within value_clip of the old value,
    summed over trainable tokens. Returns (sum, metrics), also sums."""
    values, old_values, returns = (torch.where(loss_mask.bool(), x, 0.0)
                                   for x in (values, old_values, returns))
    clipped = old_values + (values - old_values).clamp(-value_clip, value_clip)
    plain_error, clipped_error = (values - returns) ** 2, (clipped - returns) ** 2
    loss = 0.5 * torch.maximum(plain_error, clipped_error).sum()
    return loss, {"value_clip_fraction": (clipped_error > plain_error).sum()}


def token_rewards(trajectory, kind="outcome", scale=0.1):
    """Rewards of each token of a response. All kinds: +1 or -1 for the answer (equation 1's R), on the
    last sampled token even if forced text follows. On top of it:
        outcome     nothing; code that runs earns nothing
        executable  + scale * the share of its snippets that ran without error
        bonus       + scale if it called at all, even where every snippet failed
        steps       + scale for a snippet that ran, - scale for one that failed, where it was closed
        cost        - scale for every snippet, there
    """
    rewards = [0.0] * len(trajectory.loss_mask)
    last = max(i for i, sampled in enumerate(trajectory.loss_mask) if sampled)
    rewards[last] = 1.0 if trajectory.correct else -1.0
    ran = [call.status == "ok" for call in trajectory.tool_calls]
    if ran and kind in ("executable", "bonus"):
        rewards[last] += scale * (1.0 if kind == "bonus" else sum(ran) / len(ran))
    if kind in ("steps", "cost"):
        for call, ok in zip(trajectory.tool_calls, ran):
            rewards[call.end - 1] += scale if ok and kind == "steps" else -scale
    return rewards


def cosine(step, steps, warmup, floor=0.0):
    """Learning-rate factor: linear warm-up, then a cosine from 1 down to `floor`."""
    if step < warmup:
        return (step + 1) / warmup
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def is_void(trajectory):
    """Whether a response states no answer: its last turn is void (arXiv 2509.02479), for earlier ones
    end with a snippet."""
    return trajectory.answer is None


class Critic(nn.Module):
    """The policy's network with a scalar head, which starts at zero."""

    def __init__(self, lm):
        super().__init__()
        self.backbone = lm.model
        self.head = nn.Linear(lm.config.hidden_size, 1)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, input_ids, packing):
        """input_ids (T,) -> values (T,): position t is the state before the next token."""
        hidden = self.backbone(input_ids=input_ids[None], position_ids=packing.position_ids[None],
                               use_cache=False, packing=packing).last_hidden_state[0]
        return self.head(hidden).float().squeeze(-1).clone()  # a copy: FSDP warns about views


# Errors of a logit that are bugs, not rounding
LOGIT_ERROR = {"fp32": 1e-3, "bf16": 0.1}  # healthy: 1e-5, and 0.006 to 0.06


def tolerance(logprobs, mask, dtype):
    """Mean |log-probability difference| per token from which on it is a bug: an error of logits
    shifts a token of probability p by about 1 - p of it, so a certain token says little."""
    uncertain = ((1 - logprobs.exp()) * mask).sum() / mask.sum().clamp(min=1)
    return LOGIT_ERROR[dtype] * uncertain.clamp(min=0.01)


# ------------------------------------------------------------------------------------------------------------
# One PPO step


class Prompts:
    """Training prompts by position: endless embedded ones, or rows, shuffled every epoch."""

    def __init__(self, problems, seed, tokenizer, template, max_prompt_tokens):
        self.seed, self.tokenizer, self.template = seed, tokenizer, template
        self.rows, self.skipped, self.duplicates = None, 0, 0
        if problems is not None:
            unique = {(row["question"], row["answer"]): row for row in problems}  # raw DAPO: each 100 times
            # A token has at least one byte: only what could be too long is encoded.
            self.rows = [row for row in unique.values()
                         if len(row["question"].encode()) + len(template.encode()) + 200 <= max_prompt_tokens
                         or len(self.encode(row)["prompt"]) <= max_prompt_tokens]
            self.duplicates, self.skipped = len(problems) - len(unique), len(unique) - len(self.rows)
            if not self.rows:
                raise UserError("--train_data: every prompt is longer than --max_prompt_tokens "
                                f"{max_prompt_tokens}")

    def encode(self, row):
        return row | {"prompt": encode_prompt(self.tokenizer, self.template, row["question"])}

    def __getitem__(self, position):
        if self.rows is None:
            # Its own seed: the warm start used this split under its.
            problem = embedded_problem("train", f"ppo{self.seed}", position)
            return self.encode({"question": problem.question, "answer": problem.answer,
                                "family": problem.family})
        epoch, index = divmod(position, len(self.rows))
        return self.encode(self.rows[self.order(epoch)[index]])

    @functools.lru_cache(maxsize=2)
    def order(self, epoch):
        return random.Random(f"{self.seed}/{epoch}").sample(range(len(self.rows)), len(self.rows))


class Trainer:
    """Actor, critic, their optimisers, and the plain copy of the actor that samples."""

    def __init__(self, args, model_path, process, weights=True):
        """weights: False where a checkpoint brings them."""
        self.args, self.process, self.device = args, process, process.device
        self.rank, self.world = process.rank, process.world
        self.sampler = load_model(model_path, process.device, args.dtype, weights)

        def sharded(kind, path):
            lm = load_model(path, "cpu", weights=weights)  # `shard` moves it to the GPU layer by layer
            return shard(kind(lm), lm, args)

        self.modules = {"actor": sharded(Policy, model_path)}
        if args.advantage == "gae":
            self.modules["critic"] = sharded(Critic, args.critic_model or model_path)
        adamw = functools.partial(torch.optim.AdamW, betas=(0.9, 0.99), eps=args.adam_eps, fused=True,
                                  weight_decay=args.weight_decay)
        self.optimizers = {name: adamw(module.parameters()) for name, module in self.modules.items()}
        for optimizer in self.optimizers.values():
            zero_moments(optimizer)
        if args.kl_coef:
            self.modules["reference"] = sharded(Policy, model_path).requires_grad_(False)
        self.actor, self.critic, self.reference = map(self.modules.get, ("actor", "critic", "reference"))
        self.actor_start = args.critic_warmup if self.critic else 0  # the first step in which it learns

    def state(self):
        """All that a step changes, and the reference, as tensors by name. No random state:
        prompts, noise, minibatches and learning rates are functions of seed and step."""
        state = {}
        for name, module in self.modules.items():
            state |= training_state(name, module, *filter(None, [self.optimizers.get(name)]))
        if self.args.sync_every > 1:  # the sampler is not the actor
            state |= {f"sampler.{name}": p.detach() for name, p in self.sampler.named_parameters()}
        return state

    def is_synced_after(self, step):
        """Whether the sampler gets the actor's weights at the end of a step; after the last it does."""
        return (step + 1) % self.args.sync_every == 0 or step + 1 == self.args.steps

    def micro_batches(self, examples):
        """Yields this rank's share as (indices, flat Example, packing)."""
        shares = pack([len(e) for e in examples], self.args.token_budget, self.world)
        for indices in shares[self.rank]:
            yield indices, *collate([examples[i] for i in indices], self.device)

    def logprobs(self, policy, flat, packing, **options):
        return policy(flat.input_ids, flat.targets, flat.loss_mask, packing,
                      self.args.temperature, **options)

    @torch.no_grad()
    def fill(self, examples, compute):
        """Set columns of every example, on every rank; compute: (flat Example, packing) -> {name: (T,)}."""
        mine = []
        for indices, flat, packing in self.micro_batches(examples):
            found = compute(flat, packing)
            # clone: a view would be pickled with the whole micro-batch behind it
            parts = zip(*([x.clone() for x in column.cpu().split(packing.lengths)]
                          for column in found.values()))
            mine += [(i, dict(zip(found, columns))) for i, columns in zip(indices, parts)]
        gathered = [None] * self.world
        dist.all_gather_object(gathered, mine)
        for index, columns in (row for part in gathered for row in part):
            vars(examples[index]).update(columns)

    def score(self, examples):
        """Fill what the models say before the update: logprobs, entropy, values, reference_logprobs."""
        def compute(flat, packing):
            scores = self.logprobs(self.actor, flat, packing, with_entropy=True)
            found = dict(zip(("logprobs", "entropy"), scores))
            if self.critic:
                found["values"] = self.critic(flat.input_ids, packing)
            if self.reference:
                found["reference_logprobs"] = self.logprobs(self.reference, flat, packing)
            return found

        self.fill(examples, compute)

    def fill_ratios(self, examples):
        """Fill pi_new / pi_old of responses that are kept to be looked at."""
        if examples:
            self.fill(examples, lambda flat, packing: {"ratios": (
                self.logprobs(self.actor, flat, packing) - flat.logprobs).exp()})

    def estimate(self, examples, groups):
        """Fill advantages and returns of every example; returns the explained variance (None
        without a critic)."""
        def padded(name):
            return pad_sequence([getattr(e, name) for e in examples], batch_first=True)  # (B, T)

        args, mask, values = self.args, padded("loss_mask"), padded("values") if self.critic else None
        advantages, returns = advantages_and_returns(
            padded("rewards"), values, mask, torch.tensor(groups), args.advantage, args.gae_unit,
            args.gamma, args.lam_actor, args.lam_critic, args.whiten_floor)
        for i, e in enumerate(examples):
            e.advantages = advantages[i, :len(e)]
            e.returns = returns[i, :len(e)] if self.critic else None
        return explained_variance(values, returns, mask) if self.critic else None

    def update(self, examples, step):
        """One epoch of clipped updates over shuffled minibatches; returns token means."""
        sums, norms, counted = Counter(), {}, 0.0
        learning = [name for name in self.optimizers if name == "critic" or step >= self.actor_start]
        lr_factors = self.set_learning_rates(step)
        for number, minibatch in enumerate(self.minibatches(examples, step)):
            total = sum(e.loss_mask.sum().item() for e in minibatch)  # every rank has all examples
            for _, flat, packing in self.micro_batches(minibatch):
                for name in learning:
                    loss, metrics = (self.critic_loss(flat, packing) if name == "critic" else
                                     self.actor_loss(flat, packing, unchanged=number == 0))
                    # the factor: see sft.batch_loss
                    (loss / total * self.world).backward()
                    sums.update({key: value.item() for key, value in metrics.items()})
            counted += total
            for name in learning:
                norms.setdefault(name, []).append(clipped_step(
                    self.modules[name], [self.optimizers[name]], self.args.max_grad_norm,
                    f"step {step}: gradient norm of the {name}"))
        metrics = {name: all_sum(value, self.device) / counted for name, value in sorted(sums.items())}
        for name, value in metrics.items():
            if not math.isfinite(value):
                raise FloatingPointError(f"step {step}: {name} is {value}")
        metrics |= {f"grad_norm_{name}": mean(norms.get(name, [])) for name in ("actor", "critic")}
        return metrics | lr_factors

    def set_learning_rates(self, step):
        """Warm-up and cosine of each optimiser from its first step on; returns the factors."""
        args, factors = self.args, {}
        for name, first in (("actor", self.actor_start), ("critic", 0)):
            factor = cosine(max(0, step - first), args.steps - first, args.lr_warmup, floor=args.lr_floor)
            factors[f"lr_factor_{name}"] = factor
            if name in self.optimizers:
                self.optimizers[name].param_groups[0]["lr"] = getattr(args, f"{name}_lr") * factor
        return factors

    def minibatches(self, examples, step):
        """The examples, in an order of seed and step, in args.minibatches lists."""
        generator = torch.Generator().manual_seed(self.args.seed * 100003 + step)
        order = torch.randperm(len(examples), generator=generator).tolist()
        size = math.ceil(len(order) / self.args.minibatches)
        return [[examples[i] for i in order[begin:begin + size]] for begin in range(0, len(order), size)]

    def actor_loss(self, flat, packing, unchanged):
        """(policy loss, metrics), sums over tokens. unchanged: no update since `score`."""
        args, mask = self.args, flat.loss_mask
        logprobs = self.logprobs(self.actor, flat, packing, with_entropy=args.entropy_coef > 0)
        if args.entropy_coef:
            logprobs, entropy = logprobs
        if unchanged:
            # Any difference is a bug: another temperature, a mask off by one, dropout.
            difference = ((logprobs - flat.logprobs) * mask).abs().sum() / mask.sum().clamp(min=1)
            assert difference < tolerance(flat.logprobs, mask, args.dtype), (
                f"first minibatch: mean |log ratio| {difference}, should be 0")
        weights = (importance_weights(flat.logprobs, flat.sampler_logprobs, flat.sampled)
                   if args.importance == "token" else 1.0)
        loss, metrics = policy_loss(logprobs, flat.logprobs, flat.advantages, mask, args.clip_low,
                                    args.clip_high, args.dual_clip, weights)
        metrics["policy_loss"] = loss
        if args.entropy_coef:
            loss = loss - args.entropy_coef * (entropy * mask).sum()
        if self.reference:
            metrics["reference_kl"] = reference_kl(logprobs, flat.reference_logprobs, mask)
            loss = loss + args.kl_coef * metrics["reference_kl"]
        return loss, metrics

    def critic_loss(self, flat, packing):
        """(value loss, metrics), sums over tokens."""
        values = self.critic(flat.input_ids, packing)
        loss, metrics = value_loss(values, flat.values, flat.returns, flat.loss_mask, self.args.value_clip)
        return loss, metrics | {"value_loss": loss}


async def train_step(trainer, prompts, sandbox, tokenizer, step):
    """One PPO step; returns (metrics, trajectories)."""
    args, stats, clock = trainer.args, {}, [time.perf_counter()]
    rows = [prompts[step * args.prompts_per_step + i] for i in range(args.prompts_per_step)]
    problems = [row | {"key": i} for i, row in enumerate(rows)]
    trajectories = await sample_all(
        trainer.sampler, tokenizer, problems, sandbox, trainer.process, n_samples=args.samples_per_prompt,
        temperature=args.temperature, seed=args.seed, step=step, stats=stats, **rollout_settings(args))
    clock.append(time.perf_counter())
    chosen = [t for t in trajectories if t.finish_reason != "sandbox_error"
              and (t.is_complete or not args.drop_truncated)
              and not (args.drop_void and is_void(t))]
    metrics = rollout_metrics(trajectories) | collapse_metrics(trajectories, Pieces(tokenizer))
    metrics["update_skipped"] = int(not chosen)
    if not chosen:
        if trainer.is_synced_after(step):  # of earlier updates
            sync_weights(trainer.actor, trainer.sampler)
        return metrics, trajectories
    for t in chosen:
        t.example = trajectory_example(t, token_rewards(t, args.reward, args.reward_scale),
                                       args.mask_interpreter == "on")
    examples = [t.example for t in chosen]
    trainer.score(examples)
    metrics |= score_metrics(chosen)
    if step == 0 or trainer.is_synced_after(step - 1):
        check_sampler(examples, args.dtype, step)
    clock.append(time.perf_counter())
    groups = [t.prompt_index for t in chosen]
    metrics["explained_variance"] = trainer.estimate(examples, groups)  # advantages
    metrics |= trainer.update(examples, step)
    clock.append(time.perf_counter())
    if trainer.is_synced_after(step):
        sync_weights(trainer.actor, trainer.sampler)
    clock.append(time.perf_counter())
    trainer.fill_ratios([t.example for t in trajectories[:args.save_rollouts] if t.example])
    clock.append(time.perf_counter())
    metrics["tool_wait_seconds"] = stats["tool_wait_seconds"]
    seconds = {name: after - before for name, before, after
               in zip(("rollout", "score", "update", "sync", "ratios"), clock, clock[1:])}
    metrics |= {f"seconds_{name}": value for name, value in seconds.items()}
    sampled, fed = sum(sum(t.loss_mask) for t in trajectories), sum(len(e) for e in examples)
    metrics["rollout_tokens_per_second"] = sampled / seconds["rollout"]
    metrics["train_tokens_per_second"] = fed / (seconds["score"] + seconds["update"])
    return metrics, trajectories


def trajectory_example(t, rewards, mask_interpreter=True):
    """A trajectory and the rewards of its tokens as an Example."""
    before = [0.0] * len(t.prompt_ids)
    trained = t.loss_mask if mask_interpreter else [1] * len(t.loss_mask)
    return make_example(t.prompt_ids + t.response_ids, before + trained, sampled=before + t.loss_mask,
                        sampler_logprobs=before + t.logprobs, rewards=before + rewards)


def score_metrics(trajectories):
    """Mean reward, entropy, and how far sampler and trainer are apart, also by kind of text."""
    examples, gaps = [t.example for t in trajectories], {"prose": [], "code": [], "after_interpreter": []}
    mask, entropy = (torch.cat(column) for column in zip(*((e.loss_mask, e.entropy) for e in examples)))
    for t in trajectories:
        gap = sampler_gap(t.example)[len(t.prompt_ids) - 1:]  # (response tokens,)
        code = torch.zeros(len(gap), dtype=torch.bool)
        for call in t.tool_calls:
            code[call.start:call.end] = True
        sampled = torch.tensor(t.loss_mask, dtype=torch.bool)
        after = sampled & (sampled.cumprod(0) == 0)  # a call in front of it
        gaps["code"].append(gap[code])
        gaps["prose"].append(gap[sampled & ~code & ~after])
        gaps["after_interpreter"].append(gap[after & ~code])
    gaps = {f"sampler_difference_{name}": torch.cat(found) for name, found in gaps.items()}
    whole = torch.cat(list(gaps.values()))
    return {"reward": mean([e.rewards.sum().item() for e in examples]),
            "entropy": ((entropy * mask).sum() / mask.sum()).item(),
            "sampler_difference": whole.mean().item(), "sampler_difference_max": whole.max().item(),
            **{name: mean(found.tolist()) for name, found in gaps.items()}}


def sampler_gap(e):
    """|log-probability by the trainer - by the sampler| of an Example's sampled tokens, (T,)."""
    return (e.logprobs - e.sampler_logprobs).abs() * e.sampled


def check_sampler(examples, dtype, step):
    """AssertionError where the sampler's log-probabilities are not the trainer's, on average
    or in one response, whose limit leaves room for one token."""
    n = torch.tensor([e.sampled.sum() for e in examples])
    rows = torch.tensor([sampler_gap(e).sum() for e in examples]) / n
    allowed = torch.stack([tolerance(e.logprobs, e.sampled, dtype) for e in examples])
    mean, row = rows.mean().item(), rows[(rows / allowed).argmax()].item()
    assert mean < allowed.mean() and (rows < 2 * allowed + 4 * LOGIT_ERROR[dtype] / n).all(), (
        f"step {step}: the sampler's log-probabilities differ from the trainer's by {mean} on average, "
        f"by {row} in one response: were the weights synced?")


# ------------------------------------------------------------------------------------------------------------
# The run


def parse_arguments(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=Help, allow_abbrev=False)
    sft.add_warm_start_arguments(parser)
    add_trainer_arguments(parser)
    add_rollout_arguments(parser)
    add_format_arguments(parser)
    add = parser.add_argument_group("PPO").add_argument
    add("--preset", choices=("", "paper"), default="", help="paper: its numbers as defaults")
    add("--critic_model", default="", help="where the critic starts; empty: at the policy")
    add("--train_data", default="embedded", help="embedded, or a file; paper: DAPO-Math-17k")
    add("--eval_data", default="", help="files, separated by commas; empty: the embedded test splits")
    add("--eval_problems", type=at_least(2), default=256, help="of test; half as many of other splits")
    add("--eval_every", type=at_least(0), default=0, help="steps; 0: only before and after training")
    add("--eval_samples", type=at_least(1), default=2, help="samples per problem; paper 32")
    add("--eval_top_p", type=in_range(0.0, 1.0, above=True), default=1.0, help="nucleus; paper 0.7")
    add("--steps", type=at_least(1), default=24, help="PPO steps; paper 400")
    add("--advantage", choices=("gae", "grpo", "rloo"), default="gae",
        help="gae: by a critic; the others by the group of a prompt's samples, and no critic is built")
    add("--prompts_per_step", type=at_least(1), default=256, help="paper 512 per minibatch")
    add("--gae_unit", choices=("token", "turn"), default="token", help="a step of GAE: see `turn_gae`")
    add("--reward", choices=("outcome", "executable", "bonus", "steps", "cost"), default="outcome",
        help="what is paid besides the answer: see `token_rewards`")
    add("--reward_scale", type=in_range(0.0), default=0.1, help="of that; the answer pays 1 or -1")
    add("--samples_per_prompt", type=at_least(1), default=1, help="the critic is the baseline")
    add("--minibatches", type=at_least(1), default=4, help="optimiser steps per PPO step")
    add("--actor_lr", type=in_range(0.0), default=4e-4, help="AdamW; paper 1e-6 (32B)")
    add("--critic_lr", type=in_range(0.0), default=5e-4, help="AdamW; public recipes 2e-6 (32B)")
    add("--adam_eps", type=in_range(0.0, above=True), default=1e-8, help="1e-6 halves a 7B model's updates")
    add("--weight_decay", type=in_range(0.0), default=0.0, help="of actor and critic")
    add("--lr_warmup", type=at_least(0), default=0, help="steps of linear warm-up")
    add("--lr_floor", type=in_range(0.0, 1.0), default=0.1, help="end of the cosine; 1.0: constant")
    add("--critic_warmup", type=at_least(0), default=3, help="steps of the critic alone; recipes 20")
    add("--temperature", type=in_range(0.0, above=True), default=1.0, help="of rollouts and loss; paper 1.0")
    add("--gamma", type=in_range(0.0, 1.0), default=1.0, help="discount")
    add("--lam_actor", type=lambda text: text if text == "adaptive" else in_range(0.0, 1.0)(text),
        default=1.0, help="GAE lambda of the advantages, or adaptive: longer responses, a larger one")
    add("--lam_critic", type=in_range(0.0, 1.0), default=1.0, help="GAE lambda of the critic's targets")
    add("--clip_low", type=in_range(0.0, 1.0), default=0.2, help="the ratio is at least 1 - clip_low")
    add("--clip_high", type=in_range(0.0), default=0.28, help="and at most 1 + clip_high")
    add("--dual_clip", type=in_range(1.0), default=0.0, help="least loss per bad token, e.g. 3; 0: none")
    add("--kl_coef", type=in_range(0.0), default=0.0, help="of KL to the start, in the loss; paper 0")
    add("--entropy_coef", type=in_range(0.0), default=0.0, help="of the entropy bonus")
    add("--importance", choices=("off", "token"), default="off",
        help="token: weight by trainer's / sampler's probability, at most 2")
    add("--sync_every", type=at_least(1), default=1, help="steps between copies of weights to the sampler")
    add("--mask_interpreter", choices=("on", "off"), default="on",
        help="off: PPO trains on interpreter text too (a known mistake)")
    add("--value_clip", type=in_range(0.0), default=0.5, help="how far values may move")
    add("--whiten_floor", type=in_range(0.0, above=True), default=0.2, help="least divisor of advantages")
    add("--max_grad_norm", type=in_range(0.0, above=True), default=1.0, help="of actor and critic each")
    add("--drop_truncated", action="store_true", help="overlong filter: truncated ones are not trained on")
    add("--drop_void", action="store_true", help="nor responses whose last turn has no answer")
    add("--seed", type=int, default=0, help="the warm start has --sft_seed")
    add("--run_dir", default="", help="new folder; empty: out/ppo/<date>-<time>")
    add("--resume", default="",
        help="run folder to go on with, under its arguments except those given here")
    add("--export", default="", help="with --resume: only write its newest checkpoint here")
    add("--track", choices=("", "wandb", "trackio"), default="", help="send each step's metrics there too")
    add("--save_every", type=at_least(1), default=10, help="steps between checkpoints")
    add("--keep_checkpoints", type=at_least(1), default=2, help="the last ones are kept")
    add("--save_rollouts", type=at_least(0), default=32, help="responses per step in rollouts.jsonl")
    defaults, given = parse_flags(parser, argv)
    values = dict(defaults)
    if given.get("preset"):
        values |= {name: value for name, value in PAPER.items() if not name.startswith("sft_")}
    if given.get("resume"):
        try:
            record = json.loads((Path(given["resume"]) / "arguments.json").read_text())
            values |= record["arguments"]
        except (OSError, ValueError, KeyError) as error:
            parser.error(f"--resume {given['resume']}: not the folder of a run ({error})")
    args = argparse.Namespace(**values | given)
    args.run_dir = args.resume or args.run_dir
    check_combinations(parser, args, set(given))
    return args


def check_combinations(parser, args, flags):
    """parser.error for flags that contradict each other or do nothing. flags: those given."""
    if args.export and not args.resume:
        parser.error("--export needs --resume")
    idle = [  # (whether it holds that, with this flag, those do nothing)
        (args.resume, "--resume", {"run_dir", "model", "critic_model", "preset", "train_data", "advantage",
                                   "kl_coef", "sync_every"}),
        (args.model and not args.resume, "--model", {f for f in flags if f.startswith("sft_")} | {
            "code_share", "warm_start_dir", "mask_failed"}),
        (args.advantage != "gae", f"--advantage {args.advantage}", {
            "critic_model", "critic_lr", "critic_warmup", "value_clip", "gamma", "lam_actor", "lam_critic",
            "whiten_floor", "gae_unit"}),
        (args.reward == "outcome", "--reward outcome", {"reward_scale"})]
    for holds, flag, others in idle:
        if holds and others & flags:
            parser.error(f"--{min(others & flags)} has no effect with {flag}")
    if args.model and not (args.resume or args.preset):
        rates = ["actor_lr", "critic_lr"] if args.advantage == "gae" else ["actor_lr"]
        need_values(parser, flags, [*rates, "sandbox_timeout", "max_prompt_tokens", "max_response_tokens"])
    if not args.model and args.tools == "off" and args.code_share:
        parser.error("--tools off needs --code_share 0: else the warm start teaches code that never runs")
    if args.advantage != "gae" and args.samples_per_prompt < 2:
        parser.error(f"--advantage {args.advantage} needs a group: --samples_per_prompt of at least 2")
    if args.advantage == "gae" and args.critic_warmup + args.lr_warmup >= args.steps:
        parser.error(f"--critic_warmup {args.critic_warmup} and --lr_warmup {args.lr_warmup} leave nothing "
                     f"of --steps {args.steps}")
    if args.prompts_per_step * args.samples_per_prompt % args.minibatches:
        parser.error(f"--minibatches {args.minibatches} does not divide the responses per step, "
                     f"{args.prompts_per_step} * {args.samples_per_prompt}")


def step_line(step, steps, m):
    seconds = sum(value for name, value in m.items() if name.startswith("seconds_"))
    outcomes = " ".join(f"{name} {count}" for name, count in m["sandbox_outcomes"].items()) or "none"
    if m["update_skipped"]:
        return f"step {step:3d}/{steps} | no response to train on (truncated {percent(m['truncated'])} %)"
    return (
        f"step {step:3d}/{steps} | acc {percent(m['accuracy']):>5} | code {percent(m['code_ratio']):>5} | "
        f"len {m['response_tokens']:5.1f} | trunc {percent(m['truncated']):>4} | "
        f"kl {m.get('approx_kl', 0):.4f} | clip {m.get('clip_fraction', 0):.3f} | "
        f"ent {m['entropy']:.3f} | vloss {m.get('value_loss', 0):.3f} | "
        f"ev {m['explained_variance'] or 0:5.2f} | "
        f"sampler {m['sampler_difference']:.0e} | tools {outcomes} | {seconds:.1f}s")


def commit():
    result = subprocess.run(["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True,
                            text=True)
    return result.stdout.strip() or "not a git checkout"


def evaluation_sets(args):
    """{name: problems} to evaluate on before and after training."""
    if args.eval_data:
        return {name: load_problems(name) for name in args.eval_data.split(",")}
    if args.train_data != "embedded":
        return {}
    return {name: embedded_rows(name, args.eval_problems // (1 + (name != "test")))
            for name in ("test", "ood_large", "ood_families")}


class RunFolder:
    """What a run leaves behind. Every rank has one; rank 0 alone writes, and over no other run.

    Appended to: metrics.jsonl, rollouts.jsonl. Replaced by a rename, so that a kill leaves the
    old or the new one: arguments.json. Written at the end: table.md, report.html, checkpoint/.
    """

    def __init__(self, args, rank):
        path = [args.run_dir or f"out/ppo/{time.strftime('%Y%m%d-%H%M%S')}"]
        dist.broadcast_object_list(path)  # the ranks' clocks may differ
        self.path, self.rank = Path(path[0]), rank
        self.files, self.results, self.tracker = {}, {}, None
        if rank == 0 and not args.resume and self.path.exists() and any(self.path.iterdir()):
            raise UserError(f"--run_dir {self.path}: not empty; nothing is overwritten (see --resume)")

    def write_arguments(self, args, world, device):
        """What the run was started with; a resumed run adds a line about itself."""
        record = {"versions": sft.versions(), "commit": commit(), "world_size": world,
                  "threads": torch.get_num_threads(), "device": str(device)}
        self.path.mkdir(parents=True, exist_ok=True)
        if args.resume:
            before = json.loads((self.path / "arguments.json").read_text())
            record = {"resumed": before.get("resumed", []) + [record]}
        self.add_to_arguments(record | {"arguments": vars(args)})

    def add_to_arguments(self, entries):
        path, partial = self.path / "arguments.json", self.path / "arguments.partial"
        record = json.loads(path.read_text()) if path.exists() else {}
        partial.write_text(json.dumps(record | entries, indent=1))
        sync_to_disk(partial)
        partial.rename(path)

    def open(self, sizes):
        """Open the JSONL files, cut to the sizes that a checkpoint recorded, and read them."""
        if self.rank > 0:
            return
        for name in ("metrics.jsonl", "rollouts.jsonl"):
            self.files[name] = open(self.path / name, "a", buffering=1)
            self.files[name].truncate(sizes.get(name, 0))
        for line in open(self.path / "metrics.jsonl"):
            row = json.loads(line)
            if "evaluation" in row:
                self.results[row.pop("evaluation")] = row

    def write(self, name, row):
        if self.rank == 0:
            self.files[name].write(json.dumps(row) + "\n")

    def track(self, package, args):
        """Open a run of wandb or trackio, whose calls are alike; metrics of steps go there too."""
        if package and self.rank == 0:
            try:
                self.tracker = __import__(package)
            except ImportError:
                raise UserError(f"--track {package}: not installed (pip install {package})") from None
            self.tracker.init(project="retool", name=self.path.name, config=vars(args))

    def sizes(self):
        """Bytes of the JSONL files, now on the disk; a resumed run cuts them to these."""
        for file in self.files.values():
            os.fsync(file.fileno())
        return {name: os.path.getsize(self.path / name) for name in self.files}

    def finish(self, model, tokenizer):
        for file in self.files.values():
            file.close()
        if self.tracker:
            self.tracker.finish()
        try:
            model.save_pretrained(self.path / "checkpoint")
        except SafetensorError as error:
            raise UserError(f"{self.path / 'checkpoint'} cannot be written ({error}): disk full? The run's "
                            "last checkpoint is there; --resume writes this again") from None
        tokenizer.save_pretrained(self.path / "checkpoint")
        (self.path / "report.html").write_text(report_page([self.path]), encoding="utf-8")
        if self.results:
            table = evaluation_table(self.results)
            (self.path / "table.md").write_text(table + "\n")
            print(table)


async def main(process):
    args, begin = parse_arguments(), time.perf_counter()
    process.deadline = time.monotonic() + 60 * (args.minutes or math.inf)
    rank, world, device = process.rank, process.world, process.device
    run = RunFolder(args, rank)
    # Before the warm start: a bad file should not be found minutes later.
    check_mesh(args.replicas, world)
    folder = run.path / "model"
    resumed = folder.is_dir() and args.resume
    config, tokenizer = sft.starting_point(str(folder) if resumed else args.model)
    check_positions(config, args)
    if args.critic_model and load_tokenizer(args.critic_model).get_vocab() != tokenizer.get_vocab():
        raise UserError(f"--critic_model {args.critic_model}: its vocabulary is not the policy's")
    template, sets = load_template(args.prompt_template), evaluation_sets(args)
    problems = None if args.train_data == "embedded" else load_problems(args.train_data)
    checkpoint, start = find_checkpoint(run.path / "checkpoints", rank)
    if args.export and not checkpoint:
        raise UserError(f"--resume {run.path}: there is no checkpoint to export")
    if start["step"] > args.steps:
        raise UserError(f"--steps {args.steps}: the run has done {start['step']} already")
    if rank == 0 and not args.export:
        if not args.resume:
            run.write_arguments(args, world, device)
        print(f"run folder: {run.path}\n{json.dumps(vars(args))}")
    process.goes_on = f"torchrun ppo.py --resume {run.path}"
    run.track(args.track, args)

    # A checkpoint has all weights; of model/ only the configuration is needed.
    model_path = str(folder) if checkpoint else (
        args.model or str(await sft.warm_start(args, process)))
    tokenizer = load_tokenizer(model_path)
    trainer = Trainer(args, model_path, process, weights=not checkpoint)
    prompts = Prompts(problems, args.seed, tokenizer, template, args.max_prompt_tokens)
    if checkpoint:
        dcp.load(trainer.state(), checkpoint_id=checkpoint)
        if args.sync_every == 1:
            sync_weights(trainer.actor, trainer.sampler)
    if args.export:
        if rank == 0:
            trainer.sampler.save_pretrained(args.export)
            tokenizer.save_pretrained(args.export)
            print(f"step {start['step']} of {run.path} exported to {args.export}")
        return
    if rank == 0:
        if args.resume:  # only now: what is refused leaves no trace
            run.write_arguments(args, world, device)
        if not checkpoint:
            trainer.sampler.config.save_pretrained(folder)
            trainer.sampler.generation_config.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
        print(f"warm start ready after {time.perf_counter() - begin:.0f} s; prompts left out: "
              f"{prompts.skipped} too long, {prompts.duplicates} duplicates")
        if args.resume:
            print(f"{run.path}: goes on after step {start['step']}")
    run.open(start["bytes"])
    sets = {name: encode_problems(problems, tokenizer, template, args.max_prompt_tokens, name)
            for name, problems in sets.items()}
    await train_and_evaluate(trainer, tokenizer, prompts, sets, run, start, begin)


async def train_and_evaluate(trainer, tokenizer, prompts, sets, run, start, begin):
    """From the step that `start` records on; begin: perf_counter() of the script's start. At
    process.deadline a checkpoint is made and the run ends."""
    args, rank, process = trainer.args, trainer.rank, trainer.process
    begin -= start["seconds"]  # of the runs that this one continues

    async def evaluate_all(when):
        found = {}
        for name, problems in sets.items():
            label = f"{name} {when}"
            found[label], _ = await evaluate(
                trainer.sampler, tokenizer, problems, sandbox, process, label, n_samples=args.eval_samples, temperature=1.0, top_p=args.eval_top_p,
                seed=0, **rollout_settings(args))
            run.write("metrics.jsonl", {"evaluation": label} | found[label])
        run.results |= found
        if sets:
            print(evaluation_table(found), flush=True)

    async with make_sandbox(args) as sandbox:
        print(sandbox.report)
        if rank == 0:
            run.add_to_arguments({"sandbox": sandbox.report})
        if start["step"] == 0:
            await evaluate_all("before")
        seconds_checkpoint = 0.0
        for step in tqdm(range(start["step"], args.steps), desc="ppo", disable=rank > 0):
            done = step + 1
            metrics, trajectories = await train_step(trainer, prompts, sandbox, tokenizer, step)
            metrics["seconds_checkpoint"], seconds_checkpoint = seconds_checkpoint, 0.0
            row = {"step": step} | metrics
            run.write("metrics.jsonl", row)
            if run.tracker:
                run.tracker.log(row, step=step)
            for t in trajectories[:args.save_rollouts]:
                problem = prompts[step * args.prompts_per_step + t.prompt_index]
                run.write("rollouts.jsonl", {"step": step} | describe_trajectory(t, tokenizer, problem))
            tqdm.write(step_line(done, args.steps, metrics))
            if args.eval_every and done % args.eval_every == 0 and done < args.steps:
                await evaluate_all(f"step {done}")
            is_over = time_is_up(process)
            if done % args.save_every == 0 or done == args.steps or is_over:
                clock = time.perf_counter()
                record = {"step": done, "seconds": clock - begin, "bytes": run.sizes()}
                save_checkpoint(run.path / "checkpoints", trainer.state(), record,
                                args.keep_checkpoints, rank)
                seconds_checkpoint = time.perf_counter() - clock
            if is_over and done < args.steps:
                return print(f"--minutes are over after step {done}: {process.goes_on}")
        await evaluate_all("after")
    seconds_total = time.perf_counter() - begin
    run.write("metrics.jsonl", {"seconds_total": seconds_total})
    if rank == 0:
        run.add_to_arguments({"sandbox_results": sandbox.counts})  # no metric: depends on load
        run.finish(trainer.sampler, tokenizer)
        print(f"{run.path}: done in {seconds_total:.0f} s")


if __name__ == "__main__":
    run_script(main)
