"""The training loop: sample, score, estimate information, compute advantages, update, log, save.

A run has one folder with ``config.json``, ``metrics.jsonl`` (a line per step, flushed at once),
``checkpoint-<step>/`` and, at the end, ``final/`` (the adapter in PEFT format, or the whole model).
:mod:`iapo_mini.run_folder` makes sure that nothing in it is lost when something fails.

There is no hidden random state. Everything random in step n is drawn from generators seeded with
(seed, n), and the prompts of step n are a fixed slice of the train stream. So a killed run resumes
to the same numbers from weights, optimizer state and step count alone.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from tqdm.auto import tqdm

from iapo_mini.advantages import ADVANTAGES, COUNTED, length_penalised
from iapo_mini.callbacks import Watcher, ending
from iapo_mini.config import TrainConfig
from iapo_mini.engines.vllm import sampler_of
from iapo_mini.errors import MOST_STEPS, check_number
from iapo_mini.held_out import HeldOut, held_out_problems
from iapo_mini.information import encode_postfix, inform
from iapo_mini.kept_completions import keep
from iapo_mini.logprobs import token_logprobs
from iapo_mini.metrics import Stopwatch, role_metrics, step_metrics
from iapo_mini.objective import policy_loss, truncated_weights
from iapo_mini.policy import Policy, load_policy
from iapo_mini.problems.datasets import load_problems, shuffled
from iapo_mini.problems.stories import stories
from iapo_mini.progress import tokens_shown
from iapo_mini.recipes import Recipe
from iapo_mini.rewards import check_completion, score
from iapo_mini.rollouts import Rollouts, joined
from iapo_mini.run_folder import Run
from iapo_mini.sampling import check_length
from iapo_mini.tasks import Problem

_FP16_LOSS_SCALE = 1024.0
"""Factor of the loss in fp16 (on GPUs without bf16). The gradient of a token is about one over the
number of tokens in the batch, which is near the smallest number of fp16. The factor is a power of
two, so dividing the adapter's fp32 gradients by it is exact."""


def train(
    config: TrainConfig,
    output_dir: str | Path,
    *,
    resume: bool = False,
    policy: Policy | None = None,
    problems: list[Problem] | None = None,
    callbacks: Sequence[Watcher] = (),
    keep_completions: int = 0,
    progress: bool = True,
    wait: float = 0.0,
) -> Policy:
    """Train a policy with GRPO, IAPO or another method of ``recipes.RECIPES``.

    Args:
        config: validated settings.
        output_dir: folder of the run; must be empty or absent unless ``resume``.
        resume: continue from the newest checkpoint, with the same numbers as an uninterrupted run.
        policy: start policy; default is ``config.model`` with a new adapter.
        problems: training problems, cycled; default is the endless stream of ``config.data``.
        callbacks: called after every step and evaluation, and at the end.
        keep_completions: keep the completions of every n-th step in ``output_dir``; 0 keeps none.
        progress: show a progress bar.
        wait: seconds to wait for another process to leave the folder.

    Returns:
        The trained policy, also saved to ``output_dir/final``.

    Raises:
        ValueError: for no problems, a folder in use or read-only, bad data, or another config.
        OSError: when the disk is full or has become read-only; the last checkpoint is unchanged.
        FloatingPointError: when log-probabilities, informativeness, loss or gradient are not
            finite. The update is not made, and its batch is in ``output_dir/failed-step-<n>``.
        KeyboardInterrupt: after Ctrl-C, SIGTERM or SIGHUP, when the step is saved.
    """
    check_number("keep_completions", keep_completions, 0, MOST_STEPS)
    (stream, known), held_out = _problem_stream(config, problems), held_out_problems(config)
    torch.set_num_threads(config.threads)
    recipe, how = config.recipe(), config.early_exit()
    with Run(output_dir, config, resume=resume, wait=wait) as run, ending(callbacks) as watcher:
        policy = start_policy(config) if policy is None else policy
        optimizer = _prepared(policy, [*known, *held_out], config)
        done = run.restore(policy, optimizer, problems)
        judge = HeldOut(run.folder, config, held_out, done)
        size = config.prompts_per_step * recipe.sampling_rounds
        stream = itertools.islice(stream, done * size, None)
        weigh, sample = _rule(config), _sampler(config)
        for step in (bar := _bar(config, done, progress)):
            if judge.ended:
                break
            watch = Stopwatch()
            # Sample G completions for each prompt from the current ("old") policy and score them.
            asked = list(itertools.islice(stream, size))
            with tokens_shown(bar) as seen:
                drawn = functools.partial(sample, on_token=seen)
                rollouts, batch, sampled = collect(policy, asked, drawn, config, step)
            watch.lap("sampling")
            # Estimate how much each token says about the answer, if the method uses it.
            if recipe.information is not None:
                rollouts = inform(policy, rollouts, recipe.information, how)
            watch.lap("information")
            # Compute the advantage of every token, then make one or more clipped updates.
            advantages = weigh(rollouts)
            with run.keeping(step + 1, rollouts, advantages, policy):
                stats = update(policy, optimizer, rollouts, advantages, config, step)
            watch.lap("update")
            metrics = {"step": step + 1, "sampled": sampled}
            metrics |= step_metrics(rollouts, advantages, stats, watch)
            metrics |= role_metrics(rollouts, advantages, policy.tokenizer, batch)
            run.log(metrics)
            bar.set_postfix(reward=f"{metrics['reward']:.2f}", length=f"{metrics['length']:.1f}")
            if keep_completions and (step + 1) % keep_completions == 0:
                keep(run.folder, step + 1, rollouts, advantages, policy.tokenizer)
            watcher.on_step(metrics)
            if (found := judge(step + 1, policy)) is not None:
                watcher.on_evaluate(found)
            run.save(step + 1, policy, optimizer)
        run.finish(policy)
    return policy


def _rule(config: TrainConfig) -> Callable[[Rollouts], torch.Tensor]:
    """The function from rollouts to advantages (B, L) that these settings describe."""
    recipe = config.recipe()
    rule = ADVANTAGES[recipe.rule] if isinstance(recipe.rule, str) else recipe.rule

    def weigh(rollouts: Rollouts) -> torch.Tensor:
        if config.length_penalty != "none":
            rollouts = length_penalised(rollouts, config.length_penalty, config.penalty_weight())
        return rule(rollouts, recipe.alpha, recipe.beta)

    return weigh


def _sampler(config: TrainConfig) -> Callable[..., Rollouts]:
    return sampler_of(config.engine, config.model, config.vllm_gpu_memory_utilization)


def _prepared(
    policy: Policy, problems: list[Problem], config: TrainConfig
) -> torch.optim.Optimizer:
    """The optimizer, after the checks; the reference gets the present weights if there is one."""
    _check(policy, problems, config)
    if config.recipe().kl_coef > 0:
        policy.keep_reference()
    weights = policy.trainable().values()
    return torch.optim.AdamW(weights, config.learning_rate, betas=(0.9, 0.99), weight_decay=0.0)


def _bar(config: TrainConfig, done: int, progress: bool) -> tqdm:
    return tqdm(
        range(done, config.max_steps), initial=done, total=config.max_steps, desc=config.method,
        unit="step", disable=not progress,
    )  # fmt: skip


def _problem_stream(
    config: TrainConfig, problems: list[Problem] | None
) -> tuple[Iterator[Problem], list[Problem]]:
    """The endless stream of training problems, and all of them (of stories, the first step's)."""
    if problems is not None:
        if not problems:
            raise ValueError("problems is empty; at least one problem is needed to train.")
        if config.eval_every and config.data == "stories" and not all(p.steps for p in problems):
            raise ValueError(
                "eval_every must be 0 with problems that are not those of data, got "
                f"{config.eval_every}: the policy would be judged on stories"
            )
        return itertools.cycle(problems), problems
    if config.data == "stories":
        first = itertools.islice(stories(config.split, config.seed), config.prompts_per_step)
        return stories(config.split, config.seed), list(first)
    known = load_problems(config.data, config.split, config.data_file)
    return shuffled(known, config.data, config.seed), known


def start_policy(config: TrainConfig) -> Policy:
    """The start policy of a run with these settings: its model with a new adapter."""
    recipe = config.recipe()
    return load_policy(
        config.model,
        lora_rank=config.lora_rank,
        keep_reference=config.lora_rank == 0 and recipe.kl_coef > 0,
        seed=config.seed,
        device=config.device,
        four_bit=config.four_bit,
        gradient_checkpointing=config.gradient_checkpointing,
    )


def _check(policy: Policy, problems: list[Problem], config: TrainConfig) -> None:
    """Check that the policy can earn full reward and has positions for all these problems."""
    check_completion(policy, problems[0])
    asked = 0
    if config.recipe().information is not None:
        asked = len(encode_postfix(policy, config.early_exit().postfix))
    check_length(policy, problems, config.max_completion_length, asked)


def collect(
    policy: Policy, problems: list[Problem], sample: Callable[..., Rollouts], config: TrainConfig,
    step: int,
) -> tuple[Rollouts, list[Problem], int]:  # fmt: skip
    """Sample and score the rollouts of a step.

    With dynamic sampling (``Recipe.sampling_rounds`` above 1), groups that are all right or all
    wrong are left out, and further prompts are sampled instead, until there are enough groups or
    no round is left. If all groups are left out, those of the last round are used.

    Args:
        problems: ``prompts_per_step`` for each round.
        sample: a function like ``sampling.sample``.

    Returns:
        ``(rollouts, their problems, number of completions sampled)``.
    """
    recipe, size, group = config.recipe(), config.prompts_per_step, config.num_generations
    kept: list[tuple[Rollouts, Problem]] = []
    for turn in range(recipe.sampling_rounds):
        batch = problems[turn * size : (turn + 1) * size]
        rollouts = sample(
            policy, batch, num_generations=group,
            max_completion_length=config.max_completion_length, temperature=config.temperature,
            seed=config.seed * 1_000_003 + step + turn * 1_000_000_007,
            keep_cache=recipe.information is not None,
        )  # fmt: skip
        rollouts = score(rollouts, policy.tokenizer, batch, config.reward)
        if recipe.sampling_rounds == 1:
            return rollouts, batch, len(rollouts.rewards)
        right = rollouts.correct.view(-1, group).sum(1)
        for j in ((right > 0) & (right < group)).nonzero()[:, 0].tolist():
            kept.append((rollouts.rows(j * group, (j + 1) * group), batch[j]))
        if len(kept) >= size:
            break
    sampled = (turn + 1) * size * group
    if not kept:
        return rollouts, batch, sampled
    parts, chosen = zip(*kept[:size])
    return joined(parts), list(chosen), sampled


def check_finite(rollouts: Rollouts, advantages: torch.Tensor) -> None:
    """Refuse a batch that would bring NaN or infinity into the weights, and name its origin.

    Raises:
        FloatingPointError: naming the first of log-probabilities, informativeness and advantages
            that is not finite.
    """
    for name, values in (
        ("log-probabilities of the sampled tokens", rollouts.old_logprobs),
        ("log-probabilities from the engine", rollouts.known.get("sampled_logprobs")),
        ("informativeness", rollouts.known.get("informativeness")),
        ("advantages", advantages),
    ):
        if values is not None and not values.isfinite().all():
            where = (~values.isfinite()).any(1).sum()
            raise FloatingPointError(
                f"the {name} of {where} of {len(values)} completions are not finite"
            )


def update(
    policy: Policy,
    optimizer: torch.optim.Optimizer,
    rollouts: Rollouts,
    advantages: torch.Tensor,
    config: TrainConfig,
    step: int,
) -> dict[str, float]:
    """Make the updates of one step: ``config.num_iterations`` passes over its rollouts.

    Args:
        advantages: (B, L).
        step: number of the step from 0, for the warm-up of the learning rate.

    Returns:
        Numbers of the last pass: loss, clip_ratio (share of tokens), kl and entropy (nats per
        token), grad_norm.

    Raises:
        FloatingPointError: when something is not finite; that update is not made.
    """
    warmup = min(1.0, (step + 1) / max(1, config.warmup_steps))
    for group in optimizer.param_groups:
        group["lr"] = config.learning_rate * warmup
    check_finite(rollouts, advantages)
    try:
        for _ in range(config.num_iterations):
            stats = _gradient(policy, rollouts, advantages, config)
            parameters = list(policy.trainable().values())
            norm = torch.nn.utils.clip_grad_norm_(parameters, config.max_grad_norm)
            stats["grad_norm"] = float(norm)
            if not math.isfinite(stats["grad_norm"]):
                raise FloatingPointError(f"the gradient norm is {stats['grad_norm']}")
            optimizer.step()
            optimizer.zero_grad()
    except FloatingPointError:
        optimizer.zero_grad()
        raise
    return stats


def _weights(rollouts: Rollouts, config: TrainConfig) -> torch.Tensor | None:
    """(B, L) weights that correct for the engine that sampled, or None if there are none."""
    drawn = rollouts.known.get("sampled_logprobs")
    if drawn is None or not config.vllm_importance_sampling_correction:
        return None
    return truncated_weights(rollouts.old_logprobs, drawn, config.vllm_importance_sampling_clip_max)


def _counted(rollouts: Rollouts, recipe: Recipe) -> torch.Tensor:
    """(B, L) bool: the tokens that are in the loss."""
    if recipe.counted is None:
        return rollouts.completion_mask
    count = COUNTED[recipe.counted] if isinstance(recipe.counted, str) else recipe.counted
    return count(rollouts, recipe.alpha)


def _gradient(
    policy: Policy, rollouts: Rollouts, advantages: torch.Tensor, config: TrainConfig
) -> dict[str, float]:
    """Accumulate the gradient over micro-batches of whole groups; return loss and statistics."""
    policy.model.train()
    recipe, rows = config.recipe(), len(rollouts.completion_ids)
    counted = _counted(rollouts, recipe)
    # Completions of a group share the pass over their prompt, except with checkpointing.
    group = 1 if config.gradient_checkpointing else config.num_generations
    rollouts = replace(rollouts, num_generations=group)  # so that parts are of whole groups
    scale = _FP16_LOSS_SCALE if policy.dtype == torch.float16 else 1.0
    size = math.ceil(config.micro_batch_size / group) * group
    tokens = int(counted.sum())
    totals: dict[str, float] = {}
    for start in range(0, rows, size):
        part = rollouts.rows(start, start + size)
        share = len(part.completion_ids) / rows
        mask = counted[start : start + size, : part.completion_mask.shape[1]]
        # Statistics are weighted by tokens; the loss is weighted according to its aggregation.
        weight = int(mask.sum()) / max(1, tokens)
        if recipe.aggregation == "token":
            share = weight
        ref_logprobs = None
        if recipe.kl_coef > 0:
            with torch.no_grad(), policy.reference() as reference:
                ref_logprobs, _ = token_logprobs(reference, part, config.temperature)
        logprobs, entropies = token_logprobs(policy.model, part, config.temperature)
        loss, stats = policy_loss(
            logprobs, part.old_logprobs,
            advantages[start : start + size, : logprobs.shape[1]], mask,
            ref_logprobs=ref_logprobs, kl_coef=recipe.kl_coef, weights=_weights(part, config),
            epsilon=recipe.epsilon, epsilon_high=recipe.epsilon_high,
            aggregation=recipe.aggregation,
        )  # fmt: skip
        if not loss.isfinite():
            raise FloatingPointError(f"the loss is {loss.item()}")
        (loss * share * scale).backward()
        stats["entropy"] = float((entropies * mask).sum() / mask.sum().clamp(min=1))
        for name, value in stats.items():
            totals[name] = totals.get(name, 0.0) + weight * value
        totals["loss"] = totals.get("loss", 0.0) + share * loss.item()
    if scale != 1.0:
        grads = [p.grad for p in policy.trainable().values() if p.grad is not None]
        torch._foreach_div_(grads, scale)
    return totals
