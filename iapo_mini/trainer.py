"""The training loop: sample, score, inform, weigh, update. Readable top to bottom.

A run lives in one folder: ``config.json``, ``metrics.jsonl`` (a line per step, flushed at once),
``checkpoint-<step>/`` and, at the end, ``final/`` (the adapter in PEFT format, or the whole model).

There is no hidden random state. Everything random in step n is drawn from generators seeded with
(seed, n), and the prompts of step n are a fixed slice of the train stream, so a killed run resumes
to the same numbers from weights, optimizer state and the step count alone.

Nothing is lost to a fault: what is written has another name until it is whole, a checkpoint carries
the checksums of its files and one that does not match is passed over, a run folder belongs to one
process at a time, Ctrl-C finishes the step and saves, and the batch of a step that came out
infinite or NaN is kept in ``failed-step-<n>/``.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import time
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file
from tqdm.auto import tqdm

from iapo_mini.advantages import ADVANTAGES
from iapo_mini.config import TrainConfig, with_defaults
from iapo_mini.engines.vllm import sampler_of
from iapo_mini.information import INFORMATION
from iapo_mini.logprobs import token_logprobs
from iapo_mini.objective import policy_loss
from iapo_mini.policy import Policy, load_policy
from iapo_mini.problems.datasets import training_problems
from iapo_mini.problems.stories import ROLES, token_roles
from iapo_mini.rewards import score
from iapo_mini.rollouts import Rollouts
from iapo_mini.run_folder import (
    claimed,
    ctrl_c,
    is_leftover,
    remove,
    replace_folder,
    replace_text,
    restore_checkpoint,
    save_checkpoint,
    trim_log,
    writing,
)
from iapo_mini.tasks import Problem

_FP16_LOSS_SCALE = 1024.0
"""Factor of the loss under fp16 (cards without bf16), where a token's gradient, about one over the
tokens of the batch, would come near the smallest number there is. A power of two, so that taking it
back from the fp32 gradients of the adapter is exact."""


def train(
    config: TrainConfig,
    output_dir: str | Path,
    *,
    resume: bool = False,
    policy: Policy | None = None,
    problems: list[Problem] | None = None,
    on_step: Callable[[dict], None] | None = None,
    progress: bool = True,
) -> Policy:
    """Train a policy with GRPO, IAPO or another method of ``advantages.ADVANTAGES``.

    Args:
        config: validated settings.
        output_dir: folder of the run; must be empty or absent unless ``resume``.
        resume: go on from the newest checkpoint, to the same numbers as an uninterrupted run.
        policy: start policy; default is ``config.model`` with a new adapter.
        problems: training problems, cycled; default is the endless stream of ``config.data``.
        on_step: called with each step's metrics.
        progress: show a progress bar.

    Returns:
        The trained policy, also saved to ``output_dir/final``.

    Raises:
        ValueError: an empty problem list, a folder that is in use, or a resume with another config.
            Also when ``output_dir`` can't be written, or the data can't be read.
        OSError: the disk is full or has become read-only; the last checkpoint is left as it was.
        FloatingPointError: log-probabilities, informativeness, loss or gradient of a step are not
            finite. Its batch is in ``output_dir/failed-step-<n>``; that update was not made.
        KeyboardInterrupt: after Ctrl-C, once the step is done and saved; a second Ctrl-C does not
            wait. (Not in threads other than the main one, which Ctrl-C does not reach.)
    """
    if problems is not None and not problems:
        raise ValueError("problems is empty; at least one problem is needed to train.")
    if problems is None:
        stream = training_problems(config.data, config.seed, config.data_file, config.split)
    else:
        stream = itertools.cycle(problems)
    torch.set_num_threads(config.threads)
    run = Path(output_dir)
    with claimed(run, resume):
        return _train(config, run, resume, policy, stream, on_step, progress)


def _train(config: TrainConfig, run: Path, resume, policy, stream, on_step, progress) -> Policy:
    with writing(run):
        _prepare(run, config, resume)
    if policy is None:
        full = config.lora_rank == 0
        policy = load_policy(
            config.model,
            lora_rank=config.lora_rank,
            keep_reference=full and config.kl_coef > 0,
            seed=config.seed,
            four_bit=config.four_bit,
            gradient_checkpointing=config.gradient_checkpointing,
        )
    parameters = list(policy.trainable().values())
    optimizer = torch.optim.AdamW(
        parameters, lr=config.learning_rate, betas=(0.9, 0.99), weight_decay=0.0
    )
    done = restore_checkpoint(run, policy, optimizer)
    with writing(run):
        trim_log(run / "metrics.jsonl", done)
    stream = itertools.islice(stream, done * config.prompts_per_step, None)
    advantage_of, sample = ADVANTAGES[config.method], sampler_of(config.engine, config.model)

    bar = tqdm(
        range(done, config.max_steps), initial=done, total=config.max_steps,
        desc=config.method, unit="step", disable=not progress,
    )  # fmt: skip
    with bar, ctrl_c() as interrupted:
        for step in bar:
            clock = [time.perf_counter()]
            # Sample G completions for each prompt from the current policy, now "old".
            batch = list(itertools.islice(stream, config.prompts_per_step))
            rollouts = sample(
                policy, batch,
                num_generations=config.num_generations,
                max_completion_length=config.max_completion_length,
                temperature=config.temperature,
                seed=config.seed * 1_000_003 + step,
                keep_cache=config.method in INFORMATION,
            )  # fmt: skip
            rollouts = score(rollouts, policy.tokenizer, batch)
            clock.append(time.perf_counter())
            # Estimate what each token tells about the answer, if the method asks for it.
            if config.method in INFORMATION:
                estimate = INFORMATION[config.method]
                rollouts.informativeness = estimate(
                    policy, rollouts, config.estimator_memory_mb, config.estimator_stride
                )
                rollouts.cache = None  # the update makes it stale
            clock.append(time.perf_counter())
            advantages = advantage_of(rollouts, config.alpha, config.beta)
            # One or more clipped-surrogate updates.
            for group in optimizer.param_groups:
                warmup = min(1.0, (step + 1) / max(1, config.warmup_steps))
                group["lr"] = config.learning_rate * warmup
            try:
                _check_finite(rollouts, advantages)
                for _ in range(config.num_iterations):
                    stats = _update(policy, optimizer, parameters, rollouts, advantages, config)
            except FloatingPointError as error:
                optimizer.zero_grad()
                kept = _keep_batch(run, step + 1, rollouts, advantages, policy.tokenizer)
                raise FloatingPointError(
                    f"step {step + 1}: {error}; the run has stopped before the update and the "
                    f"batch is in '{kept}'. Often the remedy is a new run with a lower "
                    f"learning_rate (now {config.learning_rate})."
                ) from error
            clock.append(time.perf_counter())

            metrics = _metrics(step + 1, rollouts, advantages, stats, clock, policy, batch)
            with writing(run), (run / "metrics.jsonl").open("a") as log:
                log.write(json.dumps(metrics) + "\n")
            bar.set_postfix(reward=f"{metrics['reward']:.2f}", length=f"{metrics['length']:.1f}")
            if on_step is not None:
                on_step(metrics)
            if (step + 1) % config.save_steps == 0 or interrupted.is_set():
                with writing(run):
                    save_checkpoint(run, step + 1, policy, optimizer)
            if interrupted.is_set():
                raise KeyboardInterrupt(
                    f"step {step + 1} is saved in '{run}'; --resume (resume=True) goes on from it"
                )
    policy.model.eval()
    with writing(run):
        replace_folder(run / "final", policy.save)
    return policy


def _check_finite(rollouts: Rollouts, advantages: torch.Tensor) -> None:
    """Refuse a batch that would spread NaN or infinity into the weights, naming where it began."""
    for name, values in (
        ("log-probabilities of the sampled tokens", rollouts.old_logprobs),
        ("informativeness", rollouts.informativeness),
        ("advantages", advantages),
    ):
        if values is not None and not values.isfinite().all():
            where = (~values.isfinite()).any(1).sum()
            raise FloatingPointError(
                f"the {name} of {where} of {len(values)} completions are not finite"
            )


def _update(policy, optimizer, parameters, rollouts: Rollouts, advantages, config) -> dict:
    """One optimiser step over all rollouts in micro-batches of whole groups."""
    policy.model.train()
    rows = len(rollouts.completion_ids)
    # Completions of a group share the pass over their prompt, but not under checkpointing.
    group = 1 if config.gradient_checkpointing else config.num_generations
    scale = _FP16_LOSS_SCALE if policy.dtype == torch.float16 else 1.0
    size = math.ceil(config.micro_batch_size / group) * group
    tokens = int(rollouts.completion_mask.sum())
    totals: dict[str, float] = {}
    for start in range(0, rows, size):
        part = rollouts.rows(start, start + size)
        share = len(part.completion_ids) / rows
        if config.aggregation == "token":
            share = int(part.completion_mask.sum()) / tokens
        ref_logprobs = None
        if config.kl_coef > 0:
            with torch.no_grad(), policy.reference() as reference:
                ref_logprobs, _ = token_logprobs(reference, part, config.temperature)
        logprobs, entropies = token_logprobs(policy.model, part, config.temperature)
        loss, stats = policy_loss(
            logprobs, part.old_logprobs,
            advantages[start : start + size, : logprobs.shape[1]], part.completion_mask,
            ref_logprobs=ref_logprobs, kl_coef=config.kl_coef,
            epsilon=config.epsilon, epsilon_high=config.epsilon_high,
            aggregation=config.aggregation,
        )  # fmt: skip
        if not loss.isfinite():
            raise FloatingPointError(f"the loss is {loss.item()}")
        (loss * share * scale).backward()
        stats["entropy"] = float(entropies.sum() / part.completion_mask.sum())
        # Token means are weighed by tokens, the loss as its aggregation asks.
        weight = int(part.completion_mask.sum()) / tokens
        for name, value in stats.items():
            totals[name] = totals.get(name, 0.0) + weight * value
        totals["loss"] = totals.get("loss", 0.0) + share * loss.item()
    if scale != 1.0:
        torch._foreach_div_([p.grad for p in parameters if p.grad is not None], scale)
    norm = torch.nn.utils.clip_grad_norm_(parameters, config.max_grad_norm)
    totals["grad_norm"] = float(norm)
    if not math.isfinite(totals["grad_norm"]):
        raise FloatingPointError(f"the gradient norm is {totals['grad_norm']}")
    optimizer.step()
    optimizer.zero_grad()
    return totals


def _metrics(step, rollouts: Rollouts, advantages, stats, clock, policy, batch) -> dict:
    """What is logged for a step; see docs in README.md, "What the metrics mean"."""
    mask, s = rollouts.completion_mask, rollouts.informativeness
    groups = rollouts.rewards.view(-1, rollouts.num_generations)
    seconds = [b - a for a, b in itertools.pairwise(clock)]
    metrics = {
        "step": step,
        "loss": stats["loss"],
        "reward": float(rollouts.rewards.mean()),
        "accuracy": float(rollouts.correct.float().mean()),
        "format": float((rollouts.rewards > -1).float().mean()),
        "length": float(rollouts.lengths.float().mean()),
        "truncated": float((~rollouts.finished).float().mean()),
        "entropy": stats["entropy"],
        "kl": stats["kl"],
        "clip_ratio": stats["clip_ratio"],
        "grad_norm": stats["grad_norm"],
        "zero_variance_groups": float((groups.std(1) < 1e-6).float().mean()),
        "informativeness": None if s is None else float(s[mask].mean()),
        "tokens_per_second": int(mask.sum()) / (clock[-1] - clock[0]),
        "seconds_sampling": seconds[0],
        "seconds_information": seconds[1],
        "seconds_update": seconds[2],
    }
    if batch[0].steps:  # a story: the role of every token is known
        sums = {role: [0, 0.0, 0.0] for role in ROLES}
        information = advantages * 0 if s is None else s
        rows = zip(rollouts.completion_ids, mask, advantages.tolist(), information.tolist())
        for ids, real, row_advantages, row_s in rows:
            roles = token_roles(policy.tokenizer, ids[real].tolist())
            for role, a, s_t in zip(roles, row_advantages, row_s):
                if role in sums:
                    sums[role] = [x + y for x, y in zip(sums[role], (1, a, s_t))]
        for role, (count, a, s_t) in sums.items():
            metrics[f"tokens/{role}"] = count / len(mask)
            metrics[f"advantage/{role}"] = a / count if count else None
            if s is not None:
                metrics[f"informativeness/{role}"] = s_t / count if count else None
    return metrics


def _prepare(run: Path, config: TrainConfig, resume: bool) -> None:
    """Write the settings of a new run, or make sure that a run is resumed with its own."""
    settings = dataclasses.asdict(config)
    saved = run / "config.json"
    if resume:
        try:
            before = with_defaults(json.loads(saved.read_text()))
        except (ValueError, TypeError) as error:
            raise ValueError(
                f"output_dir is '{run}', whose config.json is damaged ({error}); write the run's "
                "settings back into it, or name a new folder."
            ) from error
        changed = [k for k in settings if k != "max_steps" and settings[k] != before.get(k)]
        if changed:
            name = changed[0]
            raise ValueError(
                f"{name} is {settings[name]!r}, but the run in '{run}' was started with "
                f"{before.get(name)!r}; resume with the same settings (only max_steps may differ)."
            )
    elif not all(map(is_leftover, run.iterdir())):
        raise ValueError(
            f"output_dir is '{run}', which is not empty; resume the run in it or name a new folder."
        )
    for path in run.glob(".*.tmp"):
        remove(path)
    replace_text(saved, json.dumps(settings, indent=2) + "\n")


def _keep_batch(run: Path, step: int, rollouts: Rollouts, advantages, tokenizer) -> Path:
    """What a failed step was made of: every tensor of the rollouts, and the texts."""
    tensors = {k: v for k, v in vars(rollouts).items() if isinstance(v, torch.Tensor)}
    tensors["advantages"] = advantages

    def write(folder: Path) -> None:
        save_file(
            {k: v.detach().contiguous() for k, v in tensors.items()},
            folder / "rollouts.safetensors",
        )
        texts = rollouts.texts(tokenizer)
        (folder / "completions.json").write_text(json.dumps(texts, indent=1) + "\n")

    folder = run / f"failed-step-{step}"
    with writing(run):
        replace_folder(folder, write)
    return folder
