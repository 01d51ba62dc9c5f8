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
import typing
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from tqdm.auto import tqdm

from iapo_mini.advantages import ADVANTAGES
from iapo_mini.data import check_data, training_problems
from iapo_mini.information import INFORMATION, check_stride
from iapo_mini.logprobs import token_logprobs
from iapo_mini.objective import AGGREGATIONS, policy_loss
from iapo_mini.policy import EMBEDDED, Policy, load_policy
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
from iapo_mini.tasks import ROLES, Problem, token_roles
from iapo_mini.vllm_engine import ENGINES, sampler_of


@dataclass(frozen=True)
class TrainConfig:
    """Settings of one run; names as in TRL where TRL has the same thing.

    Attributes:
        method: advantage rule, a key of ``advantages.ADVANTAGES``: grpo, dapo, gfpo, gtpo, sgrpo,
            iapo, iapo_ni, iapo_ne or iapo_pmi.
        model: ``"embedded"``, a model folder or a hub id.
        data: ``"stories"`` or a data set: gsm8k, math500, dapo_math, commonsense_qa.
        data_file: local file with the problems (.jsonl, .json or .parquet); empty asks the hub.
        split: part of the data to train on: train, tune, test, or all of a local file.
        alpha: weight of the informativeness term (paper's symbol); of the entropy term in gtpo,
            factor of the thresholds in sgrpo.
        beta: weight of the exploration term (paper's symbol; not the KL weight).
        learning_rate: AdamW step size after warm-up (betas 0.9 and 0.99 as in the paper).
        warmup_steps: steps of linear warm-up.
        max_steps: optimisation steps, one batch of rollouts each.
        prompts_per_step: prompts sampled in a step.
        num_generations: completions per prompt, G, at least 2.
        num_iterations: passes over each batch of rollouts.
        max_completion_length: tokens at which a completion is cut.
        temperature: sampling temperature.
        epsilon: clip range of the importance ratio below 1.
        epsilon_high: clip range above 1; None means the same as below.
        kl_coef: weight of KL(pi || pi_ref), nats per token (the paper's beta_KL).
        aggregation: ``"sequence"`` (GRPO) or ``"token"`` (DAPO) mean of the loss.
        lora_rank: rank of the adapter; 0 trains all weights.
        micro_batch_size: completions per forward and backward pass (rounded up to whole groups,
            whose prompt is run once; not so with gradient checkpointing).
        max_grad_norm: gradient clipping.
        save_steps: steps between checkpoints.
        seed: one seed for LoRA initialisation, prompts and sampling.
        estimator_memory_mb: memory the estimator may take beside the model, MiB.
        estimator_stride: ask for an early answer after every so many tokens (1, as in the paper, or
            more) or ``"sentence"``; the information between two questions is exact and spread
            evenly over the tokens between.
        threads: CPU threads; two runs are identical only with the same number.
        four_bit: keep the weights under the adapter in 4 bits (NF4); needs bitsandbytes.
        gradient_checkpointing: compute activations twice instead of keeping them.
        engine: who samples: ``"native"`` (``iapo_mini.rollouts``) or, where installed, ``"vllm"``.
    """

    method: str = "iapo"
    model: str = EMBEDDED
    data: str = "stories"
    data_file: str = ""
    split: str = "train"
    alpha: float = 0.2
    beta: float = 0.05
    learning_rate: float = 7e-4
    warmup_steps: int = 5
    max_steps: int = 60
    prompts_per_step: int = 12
    num_generations: int = 8
    num_iterations: int = 1
    max_completion_length: int = 224
    temperature: float = 1.0
    epsilon: float = 0.2
    epsilon_high: float | None = None
    kl_coef: float = 0.001
    aggregation: str = "sequence"
    lora_rank: int = 16
    micro_batch_size: int = 32
    max_grad_norm: float = 1.0
    save_steps: int = 20
    seed: int = 0
    estimator_memory_mb: float = 256.0
    estimator_stride: int | str = 1
    threads: int = 2
    four_bit: bool = False
    gradient_checkpointing: bool = False
    engine: str = "native"

    def __post_init__(self) -> None:
        for field, kind in typing.get_type_hints(TrainConfig).items():
            value, kinds = getattr(self, field), typing.get_args(kind) or (kind,)
            wanted = (int, float) if float in kinds else kinds
            optional = value is None and field == "epsilon_high"
            wrong_bool = isinstance(value, bool) and bool not in kinds
            if not optional and (not isinstance(value, wanted) or wrong_bool):
                names = " or ".join(t.__name__ for t in wanted)
                raise ValueError(f"{field} is {value!r}; allowed are values of type {names}.")
        choices = {
            "method": tuple(ADVANTAGES), "aggregation": AGGREGATIONS, "engine": ENGINES,
        }  # fmt: skip
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                value = getattr(self, name)
                raise ValueError(f"{name} is {value!r}; allowed are {', '.join(allowed)}.")
        check_data(self.data, self.split, self.data_file)
        least = {
            "alpha": 0, "beta": 0, "kl_coef": 0, "warmup_steps": 0, "lora_rank": 0,
            "max_steps": 1, "prompts_per_step": 1, "num_generations": 2, "num_iterations": 1,
            "max_completion_length": 1, "micro_batch_size": 1, "save_steps": 1, "threads": 1,
        }  # fmt: skip
        for name, bound in least.items():
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= bound):
                raise ValueError(f"{name} is {value}; allowed are {bound} and above.")
        positive = "learning_rate temperature max_grad_norm epsilon epsilon_high"
        for name in (*positive.split(), "estimator_memory_mb"):
            value = getattr(self, name)
            if value is None and name == "epsilon_high":
                continue
            if not (math.isfinite(value) and value > 0):
                raise ValueError(f"{name} is {value}; allowed are numbers above 0.")
        check_stride(self.estimator_stride, "estimator_stride")
        if self.four_bit and self.lora_rank == 0:
            raise ValueError(
                "lora_rank is 0 with four_bit; 4-bit weights can't be trained themselves, allowed "
                "are 1 and above."
            )


def with_defaults(saved: dict) -> dict:
    """Settings of a run as saved; fields that its version did not have are at their defaults."""
    return dataclasses.asdict(TrainConfig()) | saved


_REAL = {
    "prompts_per_step": 8,
    "num_generations": 8,
    "max_completion_length": 512,
    "max_steps": 200,
    "warmup_steps": 10,
    "save_steps": 10,
    # The paper trains all weights with 1e-6. An adapter starts at zero and takes about ten times
    # the step of full fine-tuning.
    "learning_rate": 1e-5,
    "kl_coef": 0.001,
    "lora_rank": 16,
    "four_bit": True,
    "gradient_checkpointing": True,
    "estimator_memory_mb": 512.0,
}
PRESETS: dict[str, dict] = {
    "t4": {**_REAL, "model": "Qwen/Qwen2.5-0.5B-Instruct", "micro_batch_size": 8},
    "12gb": {**_REAL, "model": "Qwen/Qwen2.5-1.5B-Instruct", "micro_batch_size": 8},
    "24gb": {**_REAL, "model": "Qwen/Qwen2.5-7B-Instruct", "micro_batch_size": 4},
}
"""Fields of TrainConfig for a real model on one card: the paper's three sizes, from the smallest
card that has room for each. Memory of each by part: docs/real_models.md."""

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
