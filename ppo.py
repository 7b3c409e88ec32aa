"""How does it improve? PPO on answers reached with a code interpreter.

One step: sample responses with tool calls (rollout.py) -> +1 / -1 for the final answer ->
log-probabilities and values by the trainer's own weights -> GAE over sampled tokens only ->
clipped updates of actor and critic -> copy the weights to the sampler. Interpreter tokens are
context: no loss, reward, value or step of GAE.

What the paper leaves open, and what is done here:
 1. The critic is a copy of the warm start with a scalar head; at first it learns alone.
 2. Advantages are whitened over the global batch; a floor under their deviation keeps a nearly
    perfect batch from amplifying noise.
 3. Losses are sums over trainable tokens, divided once by their number in the minibatch.
 4. A truncated response scores -1, is terminal, stays in the loss.
 5. The KL coefficient is 0.0 as in the paper; only with --kl_coef is there a reference model.
 6. Clip range, value clip, gamma and lambda are those of public recipes.

    torchrun --nproc_per_node 2 ppo.py               # the whole method on two CPU cores
    torchrun ppo.py --tools off --code_share 0       # its text-only twin, on one
    torchrun ppo.py --train_data gsm8k_train.jsonl --eval_data gsm8k_test.jsonl
    torchrun --nproc_per_node 8 ppo.py --model DIR --train_data ...   # a warm-started checkpoint

In shape comments: B responses, T tokens (of a padded batch or of a flat packed stream).
"""
if __name__ == "__main__":
    # The imports below take seconds, in which Ctrl-C is one line, too.
    from sandbox import end_at_interrupt
    end_at_interrupt()

import argparse
import fcntl
import functools
import json
import math
import os
import random
import shlex
import shutil
import socket
import subprocess
import time
from collections import Counter
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.rnn import pad_sequence

import eval as evaluation
import sft
from data import (
    FORCED_CALL,
    FORCED_RETRY,
    embedded_problem,
    embedded_rows,
    load_problems,
)
from eval import mean, parse_flags, percent
from rollout import (
    Pieces,
    Service,
    at_least,
    encode_prompt,
    in_range,
    load_model,
    load_template,
    load_tokenizer,
    save_beside_weights,
    seed_number,
)
from runs import oracle
from sandbox import UserError

# -------------------------------------------------------------------------------------------------
# The method, as pure functions: rewards, advantages, losses


def token_rewards(trajectory, reward="outcome", reward_scale=0.1):
    """Rewards of each token of a response. All kinds pay +1 or -1 for the answer (equation 1's
    R), on the last sampled token even if forced text follows. On top of it, with s the scale:
        outcome     nothing; code that runs earns nothing
        executable  + s * the share of its calls that ran without error
        bonus       + s if it called at all, even where every call failed
        steps       + s for a call that ran, - s for one that failed or found the tool busy, where
                    it was closed
        cost        - s for every call, there
    """
    rewards = [0.0] * len(trajectory.loss_mask)
    calls = trajectory.tool_calls
    ran = [call for call in calls if call.status == "ok"]
    last = max(i for i, sampled in enumerate(trajectory.loss_mask) if sampled)

    # The answer, and what is paid once for a response.
    rewards[last] = 1.0 if trajectory.correct else -1.0
    if calls and reward == "executable":
        rewards[last] += reward_scale * (len(ran) / len(calls))
    if calls and reward == "bonus":
        rewards[last] += reward_scale

    # What is paid for each call, where it was closed.
    for call in calls:
        if reward == "steps":
            rewards[call.end - 1] += reward_scale if call.status == "ok" else -reward_scale
        if reward == "cost":
            rewards[call.end - 1] -= reward_scale
    return rewards


def gae(rewards, values, loss_mask, gamma, lam):
    """Generalised advantage estimation (arXiv 1506.02438) that sees only the trainable tokens.

    rewards, values, loss_mask: (B, T). values[b, t] is V of the state BEFORE token t, read at the
    token in front of it (after a call: the last interpreter token). lam: a number, or (B,).
    Returns (advantages, returns), (B, T), exactly 0 where masked:
        delta_t = r_t + gamma V_{t+1} - V_t
        A_t     = delta_t + gamma lam A_{t+1},   V = A = 0 at the end
    with the masked tokens deleted.
    """
    # CRUCIAL: interpreter text is no step. It neither decays lambda nor bootstraps.
    trainable = loss_mask.bool()
    advantages = torch.zeros_like(values)
    next_value = torch.zeros_like(values[:, 0])  # (B,)
    next_advantage = torch.zeros_like(values[:, 0])  # (B,)

    for t in reversed(range(values.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        advantage = delta + gamma * lam * next_advantage

        # Where token t is masked, the next trainable token stays the next one.
        is_step = trainable[:, t]
        advantages[:, t] = torch.where(is_step, advantage, 0.0)
        next_value = torch.where(is_step, values[:, t], next_value)
        next_advantage = torch.where(is_step, advantage, next_advantage)

    returns = torch.where(trainable, advantages + values, 0.0)
    return advantages, returns


def turn_gae(rewards, values, loss_mask, gamma, lam):
    """`gae` whose steps are turns, the runs of trainable tokens between interpreter blocks. A
    turn's reward is the sum over its tokens, its value that of its first token; all its tokens get
    its advantage and its return. Shapes as in `gae`."""
    trainable = loss_mask.bool()
    token_before = F.pad(trainable, (1, 0))[:, :-1]
    first_of_turn = trainable & ~token_before
    turn = first_of_turn.cumsum(1)  # (B, T): the number of each token's turn, from 1

    def sum_over_turn(x):
        """At each trainable token the sum of x (B, T) over its turn."""
        sums = torch.zeros_like(x)
        for number in range(1, turn.max() + 1):
            in_turn = trainable & (turn == number)
            total = (x * in_turn).sum(1, keepdim=True)  # (B, 1)
            sums += total * in_turn
        return sums

    turn_rewards = sum_over_turn(rewards)
    advantages, returns = gae(turn_rewards, values, first_of_turn, gamma, lam)

    # Only a turn's first token has an advantage: the sum spreads it.
    return sum_over_turn(advantages), sum_over_turn(returns)


def adaptive_lam(loss_mask):
    """lambda (B,) = max(0, 1 - 1 / (0.05 l)) of a response of l trainable tokens (arXiv
    2504.05118)."""
    lengths = loss_mask.sum(1).clamp(min=1)
    return (1 - 20 / lengths).clamp(min=0)


def whiten(advantages, loss_mask, floor):
    """(advantages - mean) / max(deviation, floor) over trainable tokens, 0 where masked; (B, T)."""
    trainable = loss_mask.bool()
    chosen = advantages[trainable]
    scale = chosen.std(unbiased=False).clamp(min=floor)
    return torch.where(trainable, (advantages - chosen.mean()) / scale, 0.0)


def group_advantages(totals, groups, kind):
    """Advantages (B,) of responses with rewards `totals` (B,), without a critic. groups (B,): one
    number per prompt. kind "grpo": (R - mean) / (deviation + 1e-4) of the group (arXiv 2402.03300);
    "rloo": R - mean of the others in the group (arXiv 2402.14740)."""
    advantages = torch.zeros_like(totals)
    for group in groups.unique():
        members = groups == group
        rewards = totals[members]
        centred = rewards - rewards.mean()
        n = len(rewards)
        if kind == "grpo":
            deviation = rewards.std(unbiased=False)
            advantages[members] = centred / (deviation + 1e-4)
        elif n > 1:  # alone in its group, after others were dropped, a response has no baseline
            advantages[members] = centred * n / (n - 1)
    return advantages


def advantages_and_returns(rewards, values, loss_mask, groups, args):
    """(advantages, returns: the critic's targets), each (B, T), 0 where masked.

    rewards, values, loss_mask (B, T) as in `gae`; groups (B,) as in `group_advantages`. Of args:
    advantage and, for "gae", gae_unit, gamma, lam_actor, lam_critic, whiten_floor. Without a
    critic there are neither values nor returns.
    """
    if args.advantage != "gae":
        totals = (rewards * loss_mask).sum(1)
        return group_advantages(totals, groups, args.advantage)[:, None] * loss_mask, None

    estimate = turn_gae if args.gae_unit == "turn" else gae
    lam_actor = adaptive_lam(loss_mask) if args.lam_actor == "adaptive" else args.lam_actor
    advantages, _ = estimate(rewards, values, loss_mask, args.gamma, lam_actor)
    _, returns = estimate(rewards, values, loss_mask, args.gamma, args.lam_critic)
    return whiten(advantages, loss_mask, args.whiten_floor), returns


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

    # The smaller surrogate of the two: no gain from moving further than the clip range.
    unclipped = ratio * advantages
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high) * advantages
    surrogate = torch.minimum(unclipped, clipped)
    has_no_gradient = clipped < unclipped

    # A bad token whose probability has risen far: its loss is bounded, too.
    if dual_clip:
        bound = dual_clip * advantages
        is_bad = advantages < 0
        has_no_gradient = has_no_gradient | (is_bad & (surrogate < bound))
        surrogate = torch.where(is_bad, surrogate.clamp(min=bound), surrogate)

    # Sums over tokens: the trainer divides once, by those of all ranks.
    loss = -(weights * surrogate * loss_mask).sum()
    approx_kl = ((ratio - 1 - log_ratio) * loss_mask).sum().detach()
    clip_fraction = (has_no_gradient * loss_mask).sum()
    return loss, {"approx_kl": approx_kl, "clip_fraction": clip_fraction}


def importance_weights(old_logprobs, sampler_logprobs, sampled):
    """min(pi_old / pi_sampler, 2) of sampled tokens, else 1: corrects for a sampler that is not
    the policy of the update (truncated importance sampling, by token)."""
    log_ratio = torch.where(sampled.bool(), old_logprobs - sampler_logprobs, 0.0)
    return log_ratio.exp().clamp(max=2.0)


def reference_kl(logprobs, reference_logprobs, loss_mask):
    """KL(policy || reference) by the k3 estimate r - 1 - log r with r = pi_reference / pi, summed
    over trainable tokens (joschu.net/blog/kl-approx.html)."""
    # Never negative, unlike -log r alone.
    log_ratio = torch.where(loss_mask.bool(), reference_logprobs - logprobs, 0.0)
    return (log_ratio.exp() - 1 - log_ratio).sum()


def value_loss(values, old_values, returns, loss_mask, value_clip):
    """0.5 max((V - R)^2, (V_clipped - R)^2), V_clipped within value_clip of the old value,
    summed over trainable tokens. Returns (sum, metrics), also sums."""
    # A masked token has no error.
    trainable = loss_mask.bool()
    values = torch.where(trainable, values, 0.0)
    old_values = torch.where(trainable, old_values, 0.0)
    returns = torch.where(trainable, returns, 0.0)

    # The larger error of the two: no gain from moving further than value_clip.
    clipped = old_values + (values - old_values).clamp(-value_clip, value_clip)
    plain_error = (values - returns) ** 2
    clipped_error = (clipped - returns) ** 2
    loss = 0.5 * torch.maximum(plain_error, clipped_error).sum()
    return loss, {"value_clip_fraction": (clipped_error > plain_error).sum()}


def explained_variance(values, returns, loss_mask):
    """1 - Var(returns - values) / Var(returns) over trainable tokens; 0 for returns all alike."""
    # 1 is a perfect critic, 0 one that knows nothing but the mean.
    trainable = loss_mask.bool()
    error = (returns - values)[trainable].var()
    spread = returns[trainable].var()
    return (1 - error / spread).item() if spread > 1e-6 else 0.0


def cosine(step, steps, warmup, floor=0.0):
    """Learning-rate factor: linear warm-up, then a cosine from 1 down to `floor`."""
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / (steps - warmup)
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress))


# -------------------------------------------------------------------------------------------------
# One PPO step


async def train_step(trainer, prompts, sandbox, tokenizer, step):
    """Sample, reward, score, estimate advantages, update, sync: returns (metrics, trajectories)."""
    args = trainer.args
    stopwatch = Stopwatch()

    # Sample: every rank its share of the prompts, with tool calls on the way.
    problems = []
    for i in range(args.prompts_per_step):
        problems.append(prompts[step * args.prompts_per_step + i] | {"key": i})
    stats = {}
    trajectories = await evaluation.sample_all(
        trainer.sampler, tokenizer, problems, sandbox, trainer.process,
        n_samples=args.samples_per_prompt, temperature=args.temperature,
        seed=args.seed, step=step, stats=stats, **evaluation.rollout_settings(args))
    stopwatch.lap("rollout")
    metrics = evaluation.rollout_metrics(trajectories, args.max_calls)
    metrics |= evaluation.behaviour_metrics(trajectories, problems)
    metrics |= evaluation.collapse_metrics(trajectories, Pieces(tokenizer))
    stopwatch.lap("metrics")

    # Some responses are not trained on: the sandbox failed, or a flag filters them out.
    chosen = [trajectory for trajectory in trajectories if is_trained_on(trajectory, args)]
    if args.drop_uniform:
        mixed = of_mixed_groups(chosen)
        metrics["uniform_dropped"] = len(chosen) - len(mixed)
        chosen = mixed
    metrics["update_skipped"] = int(not chosen)
    if not chosen:
        if trainer.is_synced_after(step):  # with the weights of earlier updates
            sft.sync_weights(trainer.actor, trainer.sampler)
        return metrics, trajectories

    # Reward: each response becomes an example, with a reward for each of its tokens.
    for trajectory in chosen:
        rewards = token_rewards(trajectory, args.reward, args.reward_scale)
        trajectory.example = trajectory_example(
            trajectory, rewards, mask_interpreter=args.mask_interpreter == "on")
    examples = [trajectory.example for trajectory in chosen]

    # Score: what actor and critic say before the update, by the trainer's own weights.
    trainer.score(examples)
    metrics |= score_metrics(examples)
    if trainer.is_synced_after(step - 1):
        check_sampler(examples, trainer.logit_error, step)
    stopwatch.lap("score")

    # Advantages: how much better each token came out than the critic, or the group, expected.
    groups = [trajectory.prompt_index for trajectory in chosen]
    metrics["explained_variance"] = trainer.estimate(examples, groups)

    # Update: clipped steps of actor and critic.
    metrics |= trainer.update(examples, step)
    stopwatch.lap("update")

    # Sync: the sampler gets the new weights.
    if trainer.is_synced_after(step):
        sft.sync_weights(trainer.actor, trainer.sampler)
    stopwatch.lap("sync")

    # How far the update moved responses that are kept.
    kept = trajectories[:args.save_rollouts]
    trainer.fill_ratios([trajectory.example for trajectory in kept if trajectory.example])
    stopwatch.lap("ratios")

    # Tokens per second, of sampling and of training.
    seconds = stopwatch.seconds
    n_sampled = sum(sum(trajectory.loss_mask) for trajectory in trajectories)
    n_trained = sum(len(example) for example in examples)
    train_seconds = seconds["seconds_score"] + seconds["seconds_update"]
    metrics |= stats | seconds
    metrics["rollout_tokens_per_second"] = n_sampled / seconds["seconds_rollout"]
    metrics["train_tokens_per_second"] = n_trained / train_seconds
    return metrics, trajectories


class Stopwatch:
    """Seconds since the lap before, by name."""

    def __init__(self):
        self.seconds = {}
        self.last = time.perf_counter()

    def lap(self, name):
        now = time.perf_counter()
        self.seconds[f"seconds_{name}"] = now - self.last
        self.last = now


def is_trained_on(trajectory, args):
    if trajectory.finish_reason == "sandbox_error":
        return False
    if args.drop_truncated and not trajectory.is_complete:
        return False
    # Void (arXiv 2509.02479): without an answer. What was cut off never has one.
    return not (args.drop_void and trajectory.answer is None)


def of_mixed_groups(trajectories):
    """Responses to prompts that were answered both right and wrong: in other groups, if --reward
    pays the answer alone, every group advantage is 0. (DAPO's dynamic sampling, arXiv 2503.14476,
    but none is drawn instead.)"""
    outcomes = {}  # prompt -> {True, False}
    for trajectory in trajectories:
        outcomes.setdefault(trajectory.prompt_index, set()).add(trajectory.correct)
    return [trajectory for trajectory in trajectories
            if len(outcomes[trajectory.prompt_index]) == 2]


def trajectory_example(trajectory, rewards, mask_interpreter=True):
    """A trajectory and the rewards of its tokens as an Example."""
    # Prompt tokens have no reward, no mask, no log-probability.
    prompt = [0.0] * len(trajectory.prompt_ids)
    sampled = trajectory.loss_mask
    trained = sampled if mask_interpreter else [1] * len(sampled)
    return sft.make_example(
        trajectory.prompt_ids + trajectory.response_ids,
        prompt + trained,
        sampled=prompt + sampled,
        sampler_logprobs=prompt + trajectory.logprobs,
        rewards=prompt + rewards)


def score_metrics(examples):
    """Mean reward, entropy, and how far sampler and trainer are apart."""
    loss_mask = torch.cat([example.loss_mask for example in examples])
    entropy = torch.cat([example.entropy for example in examples])
    gap = torch.cat([sampler_gap(example) for example in examples])
    sampled = torch.cat([example.sampled for example in examples])
    return {"reward": mean([example.rewards.sum().item() for example in examples]),
            "entropy": ((entropy * loss_mask).sum() / loss_mask.sum()).item(),
            "sampler_difference": (gap.sum() / sampled.sum()).item(),
            "sampler_difference_max": gap.max().item()}


def sampler_gap(example):
    """|log-probability by the trainer - by the sampler| of sampled tokens, (T,)."""
    return (example.logprobs - example.sampler_logprobs).abs() * example.sampled


def logit_error(dtype, n_layers):
    """The error of a logit that is a bug, not rounding. Healthy are 1e-5 in fp32, and 0.006 to 0.06
    in bf16, where it grows with depth: 0.07 at 3 layers, 0.12 at 12 (random weights)."""
    if dtype == "fp32":
        return 1e-3
    return 0.1 * max(1.0, n_layers / 3) ** 0.5


def tolerance(logprobs, mask, error):
    """Mean |log-probability difference| per token that is a bug. An error of logits shifts the
    log-probability of a token by about (1 - its probability) times as much: where the policy is
    certain, even a small difference is one."""
    uncertain = ((1 - logprobs.exp()) * mask).sum() / mask.sum().clamp(min=1)
    return error * uncertain.clamp(min=0.01)


def check_sampler(examples, error, step):
    """AssertionError where the sampler's log-probabilities are not the trainer's, on average
    or in one response."""
    n = torch.tensor([example.sampled.sum() for example in examples])
    gaps = torch.tensor([sampler_gap(example).sum() for example in examples]) / n
    allowed = torch.stack([tolerance(e.logprobs, e.sampled, error) for e in examples])

    # The limit of one response is wider: a single token may be off by four times the error.
    one_token = 4 * error / n
    average = gaps.mean().item()
    worst = gaps[(gaps / allowed).argmax()].item()
    fits_each = gaps < 2 * allowed + one_token
    assert average < allowed.mean() and fits_each.all(), (
        f"step {step}: the sampler's log-probabilities differ from the trainer's by {average} on "
        f"average, by {worst} in one response: were the weights synced? Where --dtype fp32 passes "
        "this check, the precision is too low for the model")


# -------------------------------------------------------------------------------------------------
# The trainer's parts


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
        output = self.backbone(
            input_ids=input_ids[None], position_ids=packing.position_ids[None],
            use_cache=False, packing=packing)
        hidden = output.last_hidden_state[0]  # (T, hidden)
        return self.head(hidden).float().squeeze(-1).clone()  # a copy: FSDP warns about views


class Trainer:
    """Actor, critic, their optimisers, and the plain copy of the actor that samples."""

    def __init__(self, args, model_path, process, weights=True):
        """weights: False where a checkpoint brings them."""
        self.args = args
        self.process = process

        def sharded(wrapper, path):
            lm = load_model(path, "cpu", weights=weights)  # `shard` moves it to the GPU by layers
            return sft.shard(wrapper(lm), lm, args, process)

        # The sampler is a plain model; what learns is sharded.
        self.sampler = load_model(model_path, process.device, args.dtype, weights)
        self.logit_error = logit_error(args.dtype, self.sampler.config.num_hidden_layers)
        self.actor = sharded(sft.Policy, model_path)
        self.critic = None
        if args.advantage == "gae":
            self.critic = sharded(Critic, args.critic_model or model_path)
        self.reference = None
        if args.kl_coef:
            self.reference = sharded(sft.Policy, model_path).requires_grad_(False)

        # Actor and critic have an optimiser each; the critic may learn some steps alone.
        self.optimizers = {"actor": self.adamw(self.actor)}
        if self.critic:
            self.optimizers["critic"] = self.adamw(self.critic)
        self.actor_start = args.critic_warmup if self.critic else 0  # first step in which it learns

    def adamw(self, module):
        optimizer = torch.optim.AdamW(
            module.parameters(), betas=(0.9, 0.99), eps=self.args.adam_eps, fused=True,
            weight_decay=self.args.weight_decay)
        sft.zero_moments(optimizer)
        return optimizer

    def score(self, examples):
        """Fill what the models say before the update."""
        def compute(flat, packing):
            logprobs, entropy = self.logprobs(self.actor, flat, packing, with_entropy=True)
            columns = {"logprobs": logprobs, "entropy": entropy}
            if self.critic:
                columns["values"] = self.critic(flat.input_ids, packing)
            if self.reference:
                columns["reference_logprobs"], _ = self.logprobs(self.reference, flat, packing)
            return columns

        self.fill(examples, compute)

    def fill_ratios(self, examples):
        """Fill pi_new / pi_old."""
        def compute(flat, packing):
            logprobs, _ = self.logprobs(self.actor, flat, packing)
            return {"ratios": (logprobs - flat.logprobs).exp()}

        if examples:
            self.fill(examples, compute)

    def estimate(self, examples, groups):
        """Fill advantages and returns; returns the explained variance, None without a critic."""
        def padded(name):
            columns = [getattr(example, name) for example in examples]
            return pad_sequence(columns, batch_first=True)  # (B, T)

        # All responses side by side, as (B, T).
        loss_mask = padded("loss_mask")
        values = padded("values") if self.critic else None
        advantages, returns = advantages_and_returns(
            padded("rewards"), values, loss_mask, torch.tensor(groups), self.args)

        # Without the padding.
        for i, example in enumerate(examples):
            example.advantages = advantages[i, :len(example)]
            if self.critic:
                example.returns = returns[i, :len(example)]
        return explained_variance(values, returns, loss_mask) if self.critic else None

    def update(self, examples, step):
        """One epoch of clipped updates over shuffled minibatches; returns means over tokens."""
        args = self.args
        world = self.process.world
        actor_learns = step >= self.actor_start
        lr_factors = self.set_learning_rates(step)
        sums = Counter()  # of metrics, over this rank's tokens
        n_tokens = 0.0
        actor_norms = []
        critic_norms = []

        for number, minibatch in enumerate(self.minibatches(examples, step)):
            # A loss is a sum, divided once by the trainable tokens of all ranks. FSDP averages the
            # ranks' gradients; a factor of world makes that their sum.
            total = sum(example.loss_mask.sum().item() for example in minibatch)
            n_tokens += total

            # The actor's step: the clipped surrogate and, if wanted, entropy bonus and KL penalty.
            if actor_learns:
                for _, flat, packing in sft.micro_batches(
                        minibatch, args.token_budget, self.process):
                    loss_mask = flat.loss_mask
                    logprobs, entropy = self.logprobs(
                        self.actor, flat, packing, with_entropy=args.entropy_coef > 0)
                    if number == 0:
                        check_unchanged(logprobs, flat, self.logit_error)

                    weights = 1.0
                    if args.importance == "token":
                        weights = importance_weights(
                            flat.logprobs, flat.sampler_logprobs, flat.sampled)
                    loss, metrics = policy_loss(
                        logprobs, flat.logprobs, flat.advantages, loss_mask,
                        clip_low=args.clip_low, clip_high=args.clip_high,
                        dual_clip=args.dual_clip, weights=weights)
                    metrics["policy_loss"] = loss
                    if args.entropy_coef:
                        loss = loss - args.entropy_coef * (entropy * loss_mask).sum()
                    if self.reference:
                        kl = reference_kl(logprobs, flat.reference_logprobs, loss_mask)
                        metrics["reference_kl"] = kl
                        loss = loss + args.kl_coef * kl

                    (loss / total * world).backward()
                    for name, value in metrics.items():
                        sums[name] += value.item()

                actor_norms.append(sft.clipped_step(
                    self.actor, [self.optimizers["actor"]], args.max_grad_norm,
                    f"step {step}: gradient norm of the actor"))

            # The critic's step: the clipped squared error.
            if self.critic:
                for _, flat, packing in sft.micro_batches(
                        minibatch, args.token_budget, self.process):
                    values = self.critic(flat.input_ids, packing)
                    loss, metrics = value_loss(
                        values, flat.values, flat.returns, flat.loss_mask, args.value_clip)
                    metrics["value_loss"] = loss

                    (loss / total * world).backward()
                    for name, value in metrics.items():
                        sums[name] += value.item()

                critic_norms.append(sft.clipped_step(
                    self.critic, [self.optimizers["critic"]], args.max_grad_norm,
                    f"step {step}: gradient norm of the critic"))

        # Sums of all ranks become means over tokens. Sorted: the ranks must ask in one order.
        means = {}
        for name in sorted(sums):
            means[name] = sft.all_sum(sums[name], self.process.device) / n_tokens
            if not math.isfinite(means[name]):
                raise FloatingPointError(f"step {step}: {name} is {means[name]}")
        means["grad_norm_actor"] = mean(actor_norms)
        means["grad_norm_critic"] = mean(critic_norms)
        return means | lr_factors

    def set_learning_rates(self, step):
        """Warm-up and cosine of each optimiser from its first step on; returns the factors."""
        args = self.args
        peaks = {"actor": args.actor_lr, "critic": args.critic_lr}
        first_steps = {"actor": self.actor_start, "critic": 0}
        factors = {}
        for name, optimizer in self.optimizers.items():
            first = first_steps[name]
            factor = cosine(
                max(0, step - first), args.steps - first, args.lr_warmup, floor=args.lr_floor)
            optimizer.param_groups[0]["lr"] = peaks[name] * factor
            factors[f"lr_factor_{name}"] = factor
        return factors

    def minibatches(self, examples, step):
        """The examples, in an order of seed and step, in at most args.minibatches lists."""
        # A generator of its own: the same order on all ranks, and after a resume.
        generator = torch.Generator().manual_seed((self.args.seed * 100003 + step) % 2**64)
        order = torch.randperm(len(examples), generator=generator).tolist()
        shuffled = [examples[i] for i in order]
        size = math.ceil(len(shuffled) / self.args.minibatches)
        return [shuffled[begin:begin + size] for begin in range(0, len(shuffled), size)]

    def logprobs(self, policy, flat, packing, with_entropy=False):
        """(log-probabilities of the targets, their entropies or None), at the sampler's
        temperature; each (T,), 0 where masked."""
        return policy(flat.input_ids, flat.targets, flat.loss_mask, packing,
                      temperature=self.args.temperature, with_entropy=with_entropy)

    @torch.no_grad()
    def fill(self, examples, compute):
        """Set columns of every example, on every rank. compute: (flat Example, packing) ->
        {name: (T,)}."""
        pieces = []  # (index of the example, name of the column, its values)
        for indices, flat, packing in sft.micro_batches(
                examples, self.args.token_budget, self.process):
            for name, column in compute(flat, packing).items():
                for index, values in zip(indices, column.cpu().split(packing.lengths)):
                    # clone: a view would be pickled with the whole micro-batch behind it
                    pieces.append((index, name, values.clone()))

        # Every rank sets the columns of all examples.
        gathered = [None] * self.process.world
        dist.all_gather_object(gathered, pieces)
        for pieces_of_rank in gathered:
            for index, name, values in pieces_of_rank:
                setattr(examples[index], name, values)

        # Without a backward pass FSDP leaves a root gathered, where the KV cache needs room.
        for module in (self.actor, self.critic, self.reference):
            if module:
                module.reshard()

    def is_synced_after(self, step):
        """Whether the sampler gets the actor's weights at the end of a step."""
        return (step + 1) % self.args.sync_every == 0

    def state(self):
        """All that a step changes, as tensors by name."""
        # No random state: prompts, noise, minibatches, learning rates come from seed and step.
        state = sft.training_state("actor", self.actor, self.optimizers["actor"])
        if self.critic:
            state |= sft.training_state("critic", self.critic, self.optimizers["critic"])
        if self.reference:
            state |= sft.training_state("reference", self.reference)
        if self.args.sync_every > 1:  # then the sampler is not the actor
            for name, p in self.sampler.named_parameters():
                state[f"sampler.{name}"] = p.detach()
        return state


def check_unchanged(logprobs, flat, error):
    """AssertionError where a forward pass before the update does not repeat `score`."""
    # It would be a bug: another temperature, a mask off by one, dropout.
    mask = flat.loss_mask
    difference = ((logprobs - flat.logprobs) * mask).abs().sum() / mask.sum().clamp(min=1)
    assert difference < tolerance(flat.logprobs, mask, error), (
        f"first minibatch: mean |log ratio| {difference}, should be 0")


class Prompts:
    """Training prompts by position: endless embedded ones, or rows, shuffled every epoch."""

    def __init__(self, problems, seed, tokenizer, template, max_prompt_tokens):
        """problems: rows, or None for the embedded ones."""
        self.seed = seed
        self.tokenizer = tokenizer
        self.template = template
        self.rows = None
        self.skipped = 0
        self.duplicates = 0
        if problems is None:
            return

        # Raw DAPO holds each problem a hundred times.
        unique = {(row["question"], row["answer"]): row for row in problems}
        self.rows = [row for row in unique.values()
                     if len(self.encode(row)["prompt"]) <= max_prompt_tokens]
        self.duplicates = len(problems) - len(unique)
        self.skipped = len(unique) - len(self.rows)
        if not self.rows:
            raise UserError("--train_data: every prompt is longer than --max_prompt_tokens "
                            f"{max_prompt_tokens}")

    def encode(self, row):
        return row | {"prompt": encode_prompt(self.tokenizer, self.template, row["question"])}

    def __getitem__(self, position):
        """A row with "question", "answer", "family" and "prompt" (token ids)."""
        if self.rows is None:
            # With a seed of its own: not the problems of the evaluations.
            problem = embedded_problem("train", f"ppo{self.seed}", position)
            return self.encode(problem._asdict())
        epoch, index = divmod(position, len(self.rows))
        order = shuffled_order(len(self.rows), f"{self.seed}/{epoch}")
        return self.encode(self.rows[order[index]])


@functools.lru_cache(maxsize=2)
def shuffled_order(n, seed):
    return random.Random(seed).sample(range(n), n)


# -------------------------------------------------------------------------------------------------
# Flags


def parse_arguments(argv=None):
    """The flags as a namespace."""
    parser = evaluation.FlagParser(
        usage="torchrun ppo.py [flags]", description=__doc__, formatter_class=evaluation.Help,
        allow_abbrev=False)
    add_ppo_arguments(parser)
    add_run_arguments(parser)
    sft.add_warm_start_arguments(parser)
    sft.add_trainer_arguments(parser)
    evaluation.add_rollout_arguments(parser)
    evaluation.add_format_arguments(parser)

    # The last that names a flag decides: its default, --preset, the run that --resume goes on
    # with, the command line.
    defaults, given = parse_flags(parser, argv)
    values = dict(defaults)
    if given.get("preset"):
        values |= {name: value for name, value in evaluation.PAPER.items()
                   if not name.startswith("sft_")}
    if given.get("resume"):
        values |= recorded_values(parser, given["resume"], defaults)
    args = argparse.Namespace(**values | given)
    args.run_dir = args.resume or args.run_dir

    refuse_contradictions(parser, args, given)
    return args


def recorded_values(parser, folder, defaults):
    """The flags of the run in a folder. The parser's error where it would not have taken them."""
    try:
        values = evaluation.read_arguments(folder)
    except (OSError, ValueError) as error:
        parser.error(f"--resume {folder}: not the folder of a run ({error})")

    # What is no default is parsed again, as a command line.
    command_line = []
    for name, value in values.items():
        if value is None:
            parser.error(f"--resume {folder}: arguments.json: {name} is null")
        if value is True:
            command_line.append(f"--{name}")
        elif value != defaults.get(name):
            command_line.append(f"--{name}={value}")
    _, changed = parse_flags(parser, command_line)
    return defaults | changed


def add_ppo_arguments(parser):
    add = parser.add_argument_group("PPO").add_argument
    # The task
    add("--train_data", default="embedded",
        help="problems to train on: embedded, or a file; paper: DAPO-Math-17k")
    add("--eval_data", default="",
        help="files to evaluate on, with commas between; empty: the embedded splits")
    add("--seed", type=seed_number, default=0,
        help="seed of PPO; the warm start has --sft_seed")
    # The batch
    add("--steps", type=at_least(1), default=30, help="number of PPO steps; paper 400")
    add("--prompts_per_step", type=at_least(1), default=320,
        help="prompts sampled in a step; paper 512 per minibatch")
    add("--samples_per_prompt", type=at_least(1), default=1,
        help="responses to each prompt")
    add("--minibatches", type=at_least(1), default=4, help="optimiser steps per PPO step")
    add("--temperature", type=in_range(0.0, above=True), default=1.0,
        help="softmax temperature of rollouts and losses; paper 1.0")
    # Rewards and advantages
    add("--reward", choices=("outcome", "executable", "bonus", "steps", "cost"), default="outcome",
        help="what is paid besides the answer: see `token_rewards`")
    add("--reward_scale", type=in_range(0.0), default=0.1,
        help="size of what --reward pays besides the answer, which pays 1 or -1")
    add("--advantage", choices=("gae", "grpo", "rloo"), default="gae",
        help="gae: by a critic; grpo, rloo: by the other responses to a prompt")
    add("--gae_unit", choices=("token", "turn"), default="token",
        help="a step of GAE: see `turn_gae`")
    add("--gamma", type=in_range(0.0, 1.0), default=1.0, help="discount of rewards per token")
    add("--lam_actor", type=lambda_or_adaptive, default=1.0,
        help="GAE's lambda for advantages, or adaptive: see `adaptive_lam`")
    add("--lam_critic", type=in_range(0.0, 1.0), default=1.0,
        help="GAE's lambda for the critic's targets")
    add("--whiten_floor", type=in_range(0.0, above=True), default=0.2,
        help="least deviation that advantages are divided by")
    # The losses
    add("--clip_low", type=in_range(0.0, 1.0), default=0.2,
        help="probability ratios below 1 - clip_low are clipped")
    add("--clip_high", type=in_range(0.0), default=0.28,
        help="probability ratios above 1 + clip_high are clipped")
    add("--dual_clip", type=in_range(1.0, off=0), default=0.0,
        help="bound of a bad token's surrogate, e.g. 3; 0: none")
    add("--value_clip", type=in_range(0.0), default=0.5,
        help="how far values may move")
    add("--kl_coef", type=in_range(0.0), default=0.0,
        help="weight of the KL to the starting policy; paper 0")
    add("--entropy_coef", type=in_range(0.0), default=0.0, help="weight of the entropy bonus")
    add("--importance", choices=("off", "token"), default="off",
        help="token: weight by trainer's / sampler's probability, at most 2")
    add("--mask_interpreter", choices=("on", "off"), default="on",
        help="off: PPO trains on interpreter text too (a known mistake)")
    add("--drop_truncated", action="store_true",
        help="do not train on responses that were cut off")
    add("--drop_void", action="store_true",
        help="do not train on responses without an answer")
    add("--drop_uniform", action="store_true",
        help="do not train on groups whose responses are all right or all wrong")
    # The optimisers
    add("--actor_lr", type=in_range(0.0), default=1.2e-3,
        help="AdamW's peak rate, actor; paper 1e-6 (32B)")
    add("--critic_lr", type=in_range(0.0), default=1e-3,
        help="AdamW's peak rate, critic; public recipes 2e-6 (32B)")
    add("--critic_model", default="",
        help="checkpoint, of any size, that the critic starts from; empty: the policy")
    add("--critic_warmup", type=at_least(0), default=2,
        help="first steps, of the critic alone; public recipes 20")
    add("--lr_warmup", type=at_least(0), default=2, help="steps of linear warm-up of both rates")
    add("--lr_floor", type=in_range(0.0, 1.0), default=0.6,
        help="factor of both rates at the end; 1.0: constant rates")
    add("--adam_eps", type=in_range(0.0, above=True), default=1e-8,
        help="AdamW's epsilon; 1e-6 halves a 7B model's updates")
    add("--weight_decay", type=in_range(0.0), default=0.0, help="AdamW's weight decay")
    add("--max_grad_norm", type=in_range(0.0, above=True), default=1.0,
        help="norm that gradients are clipped to")
    add("--sync_every", type=at_least(1), default=1,
        help="steps between syncs of the sampler; an evaluation syncs it, too")


def lambda_or_adaptive(text):
    return text if text == "adaptive" else in_range(0.0, 1.0)(text)


def add_run_arguments(parser):
    add = parser.add_argument_group("the run").add_argument
    add("--preset", choices=("", "paper"), default="",
        help="paper: the defaults are the paper's numbers")
    add("--run_dir", default="",
        help="a new folder for the run; empty: out/ppo/<date>-<time>-<process>")
    add("--resume", default="",
        help="run folder to go on with, under its own flags and those given")
    add("--export", default="",
        help="with --resume: only write its newest checkpoint here")
    add("--warm_start", default="",
        help="finished warm start to use as it is, instead of making one")
    add("--eval_problems", type=at_least(2), default=256,
        help="embedded problems to evaluate on; of ood splits half as many")
    add("--eval_samples", type=at_least(1), default=2, help="samples per problem; paper 32")
    add("--eval_top_p", type=in_range(0.0, 1.0, above=True), default=1.0,
        help="nucleus sampling in evaluations; paper 0.7")
    add("--eval_every", type=at_least(0), default=0,
        help="steps between evaluations; 0: only before and after training")
    add("--save_every", type=at_least(1), default=10, help="steps between checkpoints")
    add("--keep_checkpoints", type=at_least(1), default=2, help="how many checkpoints are kept")
    add("--save_rollouts", type=at_least(0), default=32,
        help="responses per step in rollouts.jsonl")
    add("--track", choices=("", "wandb", "trackio"), default="",
        help="where each step's metrics are sent, too")


def refuse_contradictions(parser, args, given):
    """parser.error for flags that contradict each other or do nothing."""
    def refuse(flag, idle):
        for name in sorted(idle & given.keys()):
            parser.error(f"--{name} has no effect with {flag}")

    # Flags that do nothing with another one.
    of_warm_start = {name for name in given if name.startswith("sft_")}
    of_warm_start |= {"code_share", "warm_start_dir", "mask_failed"}
    if args.resume:
        refuse("--resume", {"run_dir", "model", "critic_model", "preset", "train_data", "advantage",
                            "kl_coef", "sync_every", "warm_start"})
    if args.model and not args.resume:
        refuse("--model", of_warm_start | {"warm_start"})
    if args.warm_start and not args.resume:
        refuse("--warm_start", of_warm_start)
    if args.advantage != "gae":
        refuse(f"--advantage {args.advantage}", {
            "critic_model", "critic_lr", "critic_warmup", "value_clip", "gamma", "lam_actor",
            "lam_critic", "whiten_floor", "gae_unit"})
    if args.reward == "outcome":
        refuse("--reward outcome", {"reward_scale"})

    # Combinations that cannot work.
    if args.export and not args.resume:
        parser.error("--export needs --resume")
    if args.model and not args.resume and not args.preset:
        rates = ["actor_lr", "critic_lr"] if args.advantage == "gae" else ["actor_lr"]
        lengths = ["sandbox_timeout", "max_prompt_tokens", "max_response_tokens"]
        evaluation.need_values(parser, given, rates + lengths)
    if not args.model and not args.warm_start and args.tools == "off" and args.code_share:
        parser.error("--tools off needs --code_share 0: else the warm start teaches code that "
                     "never runs")
    if args.advantage == "gae" and args.critic_warmup >= args.steps:
        parser.error(f"--critic_warmup {args.critic_warmup} leaves nothing of --steps {args.steps}")
    if (args.drop_uniform or args.advantage != "gae") and args.samples_per_prompt < 2:
        parser.error("--drop_uniform and --advantage grpo or rloo need a group: "
                     "--samples_per_prompt of at least 2")
    if args.prompts_per_step * args.samples_per_prompt % args.minibatches:
        parser.error(f"--minibatches {args.minibatches} does not divide the responses per step, "
                     f"{args.prompts_per_step} * {args.samples_per_prompt}")


# -------------------------------------------------------------------------------------------------
# The run


async def main(process):
    begin = time.perf_counter()
    args = parse_arguments()
    process.deadline = time.monotonic() + 60 * (args.minutes or math.inf)

    evaluation.use_device(
        process, args.device, may_use_cpu=not args.model, tf32=args.tf32)

    with RunFolder(args, process) as run:
        checkpoint, record = sft.find_checkpoint(
            run.path / "checkpoints", process.rank, only_weights=bool(args.export))
        if args.export:
            if not checkpoint:
                raise UserError(f"--resume {run.path}: there is no checkpoint to export")
            if process.rank == 0:
                export(checkpoint, str(run.path / "model"), args)
            print(f"step {record['step']} of {run.path} exported to {args.export}")
            return

        # What can be wrong is found before the warm start, which takes minutes.
        sft.check_mesh(args.replicas, process.world)
        # Only where there is a checkpoint is it known that model/ was written to its end.
        start_model = str(run.path / "model") if checkpoint else args.model or args.warm_start
        config, tokenizer = sft.starting_point(start_model, args.template_kwargs)
        evaluation.check_positions(config, args)
        if args.critic_model:
            if load_tokenizer(args.critic_model).get_vocab() != tokenizer.get_vocab():
                raise UserError(
                    f"--critic_model {args.critic_model}: its vocabulary is not the policy's")
        template = load_template(args.prompt_template)
        sets = evaluation_sets(args)
        is_embedded = args.train_data == "embedded" and not args.eval_data
        problems = None if args.train_data == "embedded" else load_problems(args.train_data)
        if record["step"] > args.steps:
            raise UserError(f"--steps {args.steps}: the run has done {record['step']} already")

        print(f"run folder: {run.path}\n{settings_line(args)}", flush=True)
        sft.say_floor(args.token_budget, args.max_prompt_tokens + args.max_response_tokens)
        run.track(args)

        # Of a resumed run's model/ only the configuration: its weights are in the checkpoint.
        model_path = start_model or str(await sft.warm_start(args, process))
        tokenizer = load_tokenizer(model_path, args.template_kwargs)
        trainer = Trainer(args, model_path, process, weights=not checkpoint)
        if checkpoint:
            dcp.load(trainer.state(), checkpoint_id=checkpoint)
            if trainer.is_synced_after(record["step"] - 1):
                sft.sync_weights(trainer.actor, trainer.sampler)

        # Problems become prompts, for training and for evaluation.
        prompts = Prompts(problems, args.seed, tokenizer, template, args.max_prompt_tokens)
        for name in sets:
            sets[name] = evaluation.encode_problems(
                sets[name], tokenizer, template, args.max_prompt_tokens, name)
        print(f"warm start ready after {time.perf_counter() - begin:.0f} s; prompts left out: "
              f"{prompts.skipped} too long, {prompts.duplicates} duplicates")
        if args.resume:
            print(f"{run.path}: goes on after step {record['step']}")
        begin -= record["seconds"]  # of the runs that this one continues

        async def evaluate(model, rows, label, **changed):
            """Evaluate a model on rows under a label; `changed` settings are not those of all."""
            settings = dict(
                n_samples=args.eval_samples, temperature=1.0, top_p=args.eval_top_p, seed=0)
            settings |= evaluation.rollout_settings(args) | changed
            tool = Service(sandbox, args.busy) if "kind" in rows[0] else sandbox
            metrics, trajectories = await evaluation.evaluate(
                model, tokenizer, rows, tool, process, label, **settings)
            run.write("metrics.jsonl", {"evaluation": label} | metrics)
            run.results[label] = metrics
            return trajectories

        async def evaluate_all(when):
            # What is evaluated is the policy of now, whatever --sync_every is.
            sft.sync_weights(trainer.actor, trainer.sampler)
            if not sets:
                return
            print(f"evaluation {when}: {', '.join(sets)}", flush=True)
            evaluation_begin = time.perf_counter()
            # Two responses of the first set are shown.
            shown = ""
            for name, rows in sets.items():
                trajectories = await evaluate(trainer.sampler, rows, f"{name} {when}")
                shown = shown or evaluation.example_responses(trajectories, rows, tokenizer)

            # What could explain a gain away.
            if is_embedded and when in ("before", "after"):
                rows = sets["test"]
                if when == "before" and not args.model:
                    untrained = sft.starting_model("", config, args.sft_seed)
                    untrained = untrained.to(process.device)
                    await evaluate(untrained, rows[:UNTRAINED], "test, untrained before")
                baselines = {"greedy": dict(temperature=0.0, n_samples=1)}
                if when == "before" and args.tools == "on":
                    baselines["best known"] = dict(sample=oracle.sample)
                    baselines["call forced"] = dict(prefill=FORCED_CALL)
                    baselines["call + retry forced"] = dict(
                        prefill=FORCED_CALL, after_busy=FORCED_RETRY)
                for name, changed in baselines.items():
                    await evaluate(trainer.sampler, rows, f"test, {name} {when}", **changed)
            seconds = time.perf_counter() - evaluation_begin
            print(f"{shown}\n\n{evaluation.evaluation_summary(run.results)}\n"
                  f"evaluated in {seconds:.0f} s\n", flush=True)

        # The sandbox starts with its self-test; then the run is evaluated before its first step.
        async with evaluation.make_sandbox(args) as sandbox:
            print(sandbox.report)
            run.prepare(trainer.sampler, tokenizer, record, sandbox.report)
            if record["step"] == 0:
                await evaluate_all("before")
            tool = Service(sandbox, args.busy) if problems is None else sandbox
            n_responses = args.prompts_per_step * args.samples_per_prompt
            print(f"PPO: {args.steps} steps of {n_responses} responses\n{LEGEND}", flush=True)

            seconds_checkpoint = 0.0
            for step in range(record["step"], args.steps):
                done = step + 1

                # One step of PPO: sample, reward, score, advantages, update, sync.
                metrics, trajectories = await train_step(trainer, prompts, tool, tokenizer, step)
                metrics["seconds_checkpoint"] = seconds_checkpoint  # of the save before
                seconds_checkpoint = 0.0

                # Log: a line, metrics and some responses.
                run.log_step(step, metrics)
                for trajectory in trajectories[:args.save_rollouts]:
                    problem = prompts[step * args.prompts_per_step + trajectory.prompt_index]
                    description = evaluation.describe_trajectory(trajectory, tokenizer, problem)
                    run.write("rollouts.jsonl", {"step": step} | description)
                print(step_line(done, args.steps, metrics), flush=True)
                if args.eval_every and done % args.eval_every == 0 and done < args.steps:
                    await evaluate_all(f"step {done}")

                # Save: now and then, at the end, and when --minutes are over.
                is_over = sft.time_is_up(process)
                if done % args.save_every == 0 or done == args.steps or is_over:
                    save_begin = time.perf_counter()
                    record = {"step": done, "seconds": save_begin - begin, "bytes": run.sizes()}
                    sft.save_checkpoint(run.path / "checkpoints", trainer.state(), record,
                                    args.keep_checkpoints, process.rank)
                    seconds_checkpoint = time.perf_counter() - save_begin
                if is_over and done < args.steps:
                    print(f"--minutes are over after step {done}: {process.goes_on}")
                    return

            await evaluate_all("after")

        # What a finished run has.
        seconds_total = time.perf_counter() - begin
        run.write("metrics.jsonl", {"seconds_total": seconds_total})
        run.add_to_arguments({"sandbox_results": sandbox.counts})  # no metric: depends on load
        run.finish(trainer.sampler, tokenizer)
        question = prompts[args.steps * args.prompts_per_step]["question"]
        flags = f"--busy {args.busy} " if problems is None else ""
        if args.prompt_template != "plain":
            flags += f"--prompt_template {shlex.quote(args.prompt_template)} "
        print(f"{run.path}: done in {seconds_total:.0f} s\n"
              f"curves and responses: {run.path}/report.html, in a browser\n"
              "one response live: python rollout.py "
              f"--model {shlex.quote(f'{run.path}/checkpoint')} {flags}{shlex.quote(question)}")


def export(checkpoint, model_path, args):
    """A checkpoint's actor for plain transformers: read straight into a plain model."""
    model = load_model(model_path, "cpu", args.dtype, weights=False)
    tokenizer = load_tokenizer(model_path, args.template_kwargs)
    state = {f"actor.lm.{name}": p.detach() for name, p in model.named_parameters()}
    dcp.load(state, checkpoint_id=checkpoint, no_dist=True)
    model.save_pretrained(args.export)
    save_beside_weights(model, tokenizer, args.export)


UNTRAINED = 64  # problems for a model with random weights, whose responses never end


def evaluation_sets(args):
    """{name: problems} to evaluate on before and after training."""
    if args.eval_data:
        return {name: load_problems(name) for name in args.eval_data.split(",")}
    if args.train_data != "embedded":
        return {}
    half = args.eval_problems // 2
    return {"test": embedded_rows("test", args.eval_problems),
            "ood_large": embedded_rows("ood_large", half),
            "ood_families": embedded_rows("ood_families", half)}


def settings_line(args):
    defaults = vars(parse_arguments([]))
    changed = [f"--{name} {value}" for name, value in vars(args).items()
               if value != defaults[name]]
    return f"settings: {' '.join(changed) or 'all defaults'} (in full: arguments.json)"


LEGEND = """\
  acc, code   % of responses that are right, that ran code       given       % right of those
  kl, clip    how far the update moved; % of tokens clipped      ent         the policy's entropy
  vloss, ev   the critic's loss and explained variance           len, tools  tokens sampled; calls
  sampler     |log-probability by the sampler - by the trainer|, mean of sampled tokens"""


def step_line(step, steps, m):
    """A step's metrics `m` as one line; LEGEND explains it."""
    # Then most metrics are missing.
    if m["update_skipped"]:
        return (f"step {step:3d}/{steps} | no response to train on "
                f"(truncated {percent(m['truncated'])} %)")
    seconds = sum(value for name, value in m.items() if name.startswith("seconds_"))
    outcomes = [f"{status} {count}" for status, count in m["sandbox_outcomes"].items()]
    return (
        f"step {step:3d}/{steps} | acc {percent(m['accuracy']):>5} | "
        f"code {percent(m['code_ratio']):>5} | "
        f"given {percent(m['accuracy_with_call']):>5} | len {m['response_tokens_sampled']:5.1f} | "
        f"kl {m.get('approx_kl', 0):.4f} | clip {m.get('clip_fraction', 0):.3f} | "
        f"ent {m['entropy']:.3f} | vloss {m.get('value_loss', 0):.3f} | "
        f"ev {m['explained_variance'] or 0:5.2f} | sampler {m['sampler_difference']:.0e} | "
        f"tools {' '.join(outcomes) or 'none'} | {seconds:.1f}s")


def commit():
    """The commit of this code, or git's words why there is none."""
    folder = shlex.quote(str(Path(__file__).parent))
    return subprocess.getoutput(f"git -C {folder} rev-parse HEAD")


# The file in a run folder that a run locks as long as it lives. What counts is the lock, not the
# file, which stays.
LOCK = "run.lock"


def lock_folder(folder):
    """The folder's lock file, open and locked. UserError that names the run that has it."""
    file = open(folder / LOCK, "a+")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        raise UserError(f"{folder}: another run is at work in it ({file.read()})") from None

    # Say who has it, for whoever is refused.
    since = time.strftime("%Y-%m-%d %H:%M:%S")
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()} since {since}")
    file.flush()
    return file


class RunFolder:
    """What a run leaves behind. Every rank has one; rank 0 alone writes. Until its first row there
    is only the lock's file: a start that is refused blocks no other, and changes nothing.

    Appended to: metrics.jsonl, rollouts.jsonl. Replaced: arguments.json. Written at the end:
    table.md, report.html, checkpoint/.
    """

    def __init__(self, args, process):
        self.args = args
        self.process = process
        self.writes = process.rank == 0 and not args.export  # which only reads
        self.files = {}
        self.results = {}  # of evaluations, by label
        self.tracker = None
        self.lock = None
        self.is_new = False

        # Rank 0 names it: the ranks' clocks may differ.
        now = time.strftime("%Y%m%d-%H%M%S")
        path = [args.resume or args.run_dir or f"out/ppo/{now}-{os.getpid()}"]
        dist.broadcast_object_list(path)
        self.path = Path(path[0])
        if not self.writes:
            return
        if not args.resume:
            self.is_new = not self.path.exists()
            self.path.mkdir(parents=True, exist_ok=True)
            if any(path.name != LOCK for path in self.path.iterdir()):
                raise UserError(
                    f"--run_dir {self.path}: not empty; nothing is overwritten (see --resume)")
        self.lock = lock_folder(self.path)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        if not self.lock:
            return
        if not self.files and self.is_new:
            shutil.rmtree(self.path, ignore_errors=True)
        self.lock.close()

    def prepare(self, model, tokenizer, record, sandbox_report):
        """Note what `begin` needs."""
        self.model = model
        self.tokenizer = tokenizer
        self.record = record
        self.sandbox_report = sandbox_report

    def begin(self):
        """Open the JSONL files, and write what stands before the first row."""
        # What a killed run wrote after its last checkpoint is cut off, and written again.
        for name in ("metrics.jsonl", "rollouts.jsonl"):
            self.files[name] = open(self.path / name, "a", buffering=1)
            self.files[name].truncate(self.record["bytes"].get(name, 0))
        for line in open(self.path / "metrics.jsonl"):
            row = json.loads(line)
            if "evaluation" in row:
                self.results[row.pop("evaluation")] = row

        self.say_how_it_started()
        if self.record["step"] == 0:
            save_beside_weights(self.model, self.tokenizer, self.path / "model")
        self.process.goes_on = f"torchrun ppo.py --resume {shlex.quote(str(self.path))}"

    def say_how_it_started(self):
        """What the run was started with; a resumed run adds a line about itself."""
        start = {"versions": sft.versions(), "commit": commit(), "world_size": self.process.world,
                 "threads": torch.get_num_threads(), "device": str(self.process.device)}
        if self.args.resume:
            before = json.loads((self.path / "arguments.json").read_text())
            start = {"resumed": before.get("resumed", []) + [start]}
        self.add_to_arguments(
            start | {"arguments": vars(self.args), "sandbox": self.sandbox_report})

    def add_to_arguments(self, entries):
        if not self.writes:
            return
        path = self.path / "arguments.json"
        partial = self.path / "arguments.partial"
        record = json.loads(path.read_text()) if path.exists() else {}
        # A kill leaves the old file or the new one.
        partial.write_text(json.dumps(record | entries, indent=1))
        sft.sync_to_disk(partial)
        partial.rename(path)

    def write(self, name, row):
        if not self.writes:
            return
        if not self.files:
            self.begin()
        self.files[name].write(json.dumps(row) + "\n")

    def track(self, args):
        """Open a run of wandb or trackio, whose calls are alike."""
        if not args.track or not self.writes:
            return
        try:
            self.tracker = __import__(args.track)
        except ImportError:
            raise UserError(
                f"--track {args.track}: not installed (pip install {args.track})") from None
        self.tracker.init(project="retool", name=self.path.name, config=vars(args))

    def log_step(self, step, metrics):
        row = {"step": step} | metrics
        self.write("metrics.jsonl", row)
        if self.tracker:
            self.tracker.log(row, step=step)

    def sizes(self):
        """Bytes of the JSONL files, now on the disk."""
        for file in self.files.values():
            os.fsync(file.fileno())
        return {name: os.path.getsize(self.path / name) for name in self.files}

    def finish(self, model, tokenizer):
        if not self.writes:
            return
        # Closed, for the page reads them.
        for file in self.files.values():
            file.close()
        if self.tracker:
            self.tracker.finish()
        model.save_pretrained(self.path / "checkpoint")
        save_beside_weights(model, tokenizer, self.path / "checkpoint")
        page = evaluation.report_page([self.path])
        (self.path / "report.html").write_text(page, encoding="utf-8")
        if self.results:
            (self.path / "table.md").write_text(evaluation.evaluation_table(self.results) + "\n")


if __name__ == "__main__":
    evaluation.run_script(main)
