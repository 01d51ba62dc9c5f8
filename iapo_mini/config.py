"""The settings of a training run. Nothing heavy is imported here.

A field of :class:`TrainConfig` that is left at None is taken from the recipe of its method
(:mod:`iapo_mini.recipes`).
"""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from iapo_mini.early_exit.question import EarlyExit, check_stride
from iapo_mini.errors import (
    AUTO,
    MOST_PROBLEMS,
    MOST_RANK,
    MOST_REAL,
    MOST_ROWS,
    MOST_SEED,
    MOST_STEPS,
    MOST_THREADS,
    MOST_TOKENS,
    check_choice,
    check_device,
    check_number,
    check_temperature,
    shown,
)
from iapo_mini.policies import EMBEDDED
from iapo_mini.problems.datasets import check_data
from iapo_mini.recipes import (
    FROM_RECIPE,
    LENGTH_PENALTIES,
    NO_LENGTH_PENALTY,
    RECIPES,
    Recipe,
)

AGGREGATIONS = ("sequence", "token")
"""Ways to average the loss (:func:`iapo_mini.objective.aggregate`)."""

ENGINES = ("native", "vllm")
"""Engines for sampling (:mod:`iapo_mini.sampling`, :mod:`iapo_mini.engines.vllm`)."""

MEASURES = ("ratio@1", "pass@1", "length")
"""Measures of the best policy (:mod:`iapo_mini.held_out`)."""

REWARDS = ("strict", "released")
"""Reward functions (:mod:`iapo_mini.rewards`)."""


_RANGES: dict[str, tuple[float, float]] = {
    "alpha": (0, MOST_REAL), "beta": (0, MOST_REAL), "kl_coef": (0, MOST_REAL),
    "warmup_steps": (0, MOST_STEPS), "max_steps": (1, MOST_STEPS), "save_steps": (1, MOST_STEPS),
    "num_iterations": (1, MOST_STEPS), "prompts_per_step": (1, MOST_ROWS),
    "num_generations": (2, MOST_ROWS), "micro_batch_size": (1, MOST_ROWS),
    "max_completion_length": (1, MOST_TOKENS), "lora_rank": (0, MOST_RANK),
    "eval_every": (0, MOST_STEPS), "eval_problems": (1, MOST_PROBLEMS), "patience": (0, MOST_STEPS),
    "threads": (1, MOST_THREADS), "seed": (0, MOST_SEED),
    "vllm_importance_sampling_clip_max": (1, MOST_REAL),
    "vllm_gpu_memory_utilization": (0.05, 0.95),
}  # fmt: skip
"""Smallest and largest values of fields that may be one of these bounds."""

_POSITIVE = (
    "learning_rate", "temperature", "max_grad_norm", "epsilon", "epsilon_high",
    "length_penalty_weight", "estimator_memory_mb",
)  # fmt: skip
"""Fields that must be above 0."""


@dataclass(frozen=True)
class TrainConfig:
    """Settings of one run. The names are those of TRL where TRL has the same setting.

    Attributes:
        method: training method, a key of ``recipes.RECIPES``; `iapo-mini methods` lists them.
        model: ``"embedded"``, a model folder or a hub id.
        data: ``"stories"`` or a data set: gsm8k, math500, dapo_math, commonsense_qa.
        data_file: local file with the problems (.jsonl, .json or .parquet); if empty, the data is
            loaded from the hub.
        split: part of the data to train on: train, tune, test, or all of a local file.
        alpha: weight of the informativeness term (paper's symbol). In gtpo the weight of the
            entropy, in grpo_kimi and grpo_efficient the weight of the length, in gfpo the share of
            the group that is kept, in sgrpo the factor of the thresholds.
        beta: weight of the exploration term (paper's symbol; not the KL weight).
        learning_rate: AdamW step size after warm-up (betas 0.9 and 0.99 as in the paper).
        warmup_steps: steps of linear warm-up.
        max_steps: optimisation steps, one batch of rollouts each.
        prompts_per_step: number of prompts sampled in a step.
        num_generations: completions per prompt, G, at least 2.
        num_iterations: passes over each batch of rollouts.
        max_completion_length: number of tokens at which a completion is cut.
        temperature: sampling temperature.
        epsilon: clip range of the importance ratio below 1.
        epsilon_high: clip range above 1; defaults to ``epsilon`` in methods with equal clip ranges.
        kl_coef: weight of KL(pi || pi_ref), nats per token (the paper's beta_KL).
        aggregation: mean of the loss over each completion first (``"sequence"``) or over all tokens
            of the batch at once (``"token"``).
        lora_rank: rank of the adapter; 0 trains all weights.
        micro_batch_size: completions per forward and backward pass. It is rounded up to whole
            groups, whose prompt is run once, except with gradient checkpointing.
        max_grad_norm: largest norm of the gradient, which is clipped to it.
        save_steps: steps between checkpoints.
        seed: one seed for LoRA initialisation, prompts and sampling.
        estimator_memory_mb: memory in MiB, beside the model, for the estimator.
        estimator_stride: number of tokens between early answers (1 as in the paper, or more), or
            ``"sentence"`` for one at each end of a sentence. The information between two early
            answers is exact and is spread evenly over the tokens between them.
        device: ``"cpu"``, ``"cuda"`` or ``"cuda:1"``; ``"auto"`` is the first CUDA device, or the
            CPU if there is none.
        threads: CPU threads; two runs are identical only with the same number.
        four_bit: keep the weights under the adapter in 4 bits (NF4); needs bitsandbytes.
        gradient_checkpointing: compute activations twice instead of keeping them.
        engine: engine for sampling: ``"native"`` (``iapo_mini.sampling``) or, if installed,
            ``"vllm"``.
        vllm_importance_sampling_correction: with vLLM, multiply the surrogate of a token by
            min(pi_old / pi_vllm, cap), which corrects for the rounding of vLLM.
        vllm_importance_sampling_clip_max: the cap of these weights, at least 1.
        vllm_gpu_memory_utilization: share of the GPU's memory for vLLM, 0.05 to 0.95.
        eval_every: steps between evaluations during training, on problems that are neither
            trained on nor reported (:mod:`iapo_mini.held_out`); 0 for no evaluations.
        eval_problems: number of these problems, with four completions each.
        best_by: measure of the best policy, which ``best/`` keeps: ratio@1, pass@1 or length.
        patience: number of evaluations without a better one after which training stops; 0 for
            never.
        reward: ``"strict"`` (an answer counts only in a well-formed completion) or ``"released"``
            (format and answer are judged separately, as in the paper's released code).
        length_penalty: term of the reward that makes long completions earn less, for any method
            that uses rewards: ``"kimi"`` (Kimi k1.5), ``"efficient"`` (Arora and Zanette) or
            ``"none"``.
        length_penalty_weight: factor of that term; defaults to 0.5 for kimi, 0.4 for efficient.

    Raises:
        ValueError: for a value out of range, naming it and what is allowed.
    """

    method: str = "iapo"
    model: str = EMBEDDED
    data: str = "stories"
    data_file: str = ""
    split: str = "train"
    alpha: float | None = None
    beta: float | None = None
    learning_rate: float = 7e-4
    warmup_steps: int = 5
    max_steps: int = 60
    prompts_per_step: int = 12
    num_generations: int = 8
    num_iterations: int = 1
    max_completion_length: int = 224
    temperature: float = 1.0
    epsilon: float | None = None
    epsilon_high: float | None = None
    kl_coef: float | None = None
    aggregation: str | None = None
    lora_rank: int = 16
    micro_batch_size: int = 32
    max_grad_norm: float = 1.0
    save_steps: int = 20
    seed: int = 0
    estimator_memory_mb: float = 256.0
    estimator_stride: int | str = 1
    device: str = AUTO
    threads: int = 2
    four_bit: bool = False
    gradient_checkpointing: bool = False
    engine: str = "native"
    vllm_importance_sampling_correction: bool = True
    vllm_importance_sampling_clip_max: float = 2.0
    vllm_gpu_memory_utilization: float = 0.4
    reward: str = "strict"
    length_penalty: str = "none"
    length_penalty_weight: float | None = None
    eval_every: int = 0
    eval_problems: int = 64
    best_by: str = "ratio@1"
    patience: int = 0

    def __post_init__(self) -> None:
        self._check_types()
        check_choice("method", self.method, RECIPES)
        check_choice("engine", self.engine, ENGINES)
        check_choice("reward", self.reward, REWARDS)
        check_choice("best_by", self.best_by, MEASURES)
        if self.aggregation is not None:
            check_choice("aggregation", self.aggregation, AGGREGATIONS)
        check_data(self.data, self.split, self.data_file)
        for name, (least, most) in _RANGES.items():
            if getattr(self, name) is not None:
                check_number(name, getattr(self, name), least, most)
        if self.temperature == 0:
            raise ValueError(
                f"temperature must be above 0, got {self.temperature}: greedy completions of a "
                "prompt are all equal, so their advantages are 0"
            )
        for name in _POSITIVE:
            if getattr(self, name) is not None:
                check_number(name, getattr(self, name), above=0, most=MOST_REAL)
        self._check_length_penalty()
        rows = self.prompts_per_step * self.num_generations
        check_number("prompts_per_step * num_generations", rows, most=MOST_ROWS)
        check_temperature(self.temperature)
        check_device(self.device)
        check_stride(self.estimator_stride, "estimator_stride")
        if self.four_bit and self.lora_rank == 0:
            raise ValueError(
                "lora_rank must be at least 1 with four_bit, got 0: 4-bit weights can't be trained "
                "without an adapter"
            )

    def _check_length_penalty(self) -> None:
        check_choice("length_penalty", self.length_penalty, ("none", *LENGTH_PENALTIES))
        if self.length_penalty == "none":
            if self.length_penalty_weight is not None:
                raise ValueError(
                    f"length_penalty must be one of {', '.join(LENGTH_PENALTIES)} with "
                    f"length_penalty_weight {self.length_penalty_weight}, got 'none'"
                )
            return
        rule = RECIPES[self.method].rule
        if isinstance(rule, str) and rule in NO_LENGTH_PENALTY:
            raise ValueError(
                f"length_penalty must be 'none' with method '{self.method}', which "
                f"{NO_LENGTH_PENALTY[rule]}, got '{self.length_penalty}'"
            )

    def _check_types(self) -> None:
        for field, kind in typing.get_type_hints(TrainConfig).items():
            value, kinds = getattr(self, field), typing.get_args(kind) or (kind,)
            kinds = (*kinds, int) if float in kinds else kinds
            wrong_bool = isinstance(value, bool) and bool not in kinds
            if not isinstance(value, kinds) or wrong_bool:
                wanted = {int, float} & set(kinds) if float in kinds else set(kinds)
                names = " or ".join(sorted(t.__name__ for t in wanted - {type(None)}))
                raise ValueError(f"{field} must be of type {names}, got {shown(value)}")

    def recipe(self) -> Recipe:
        """The method's recipe, with the fields that were given replacing its own."""
        own = RECIPES[self.method]
        given = {name: getattr(self, name) for name in FROM_RECIPE}
        given = {name: value for name, value in given.items() if value is not None}
        if own.epsilon == own.epsilon_high and "epsilon" in given:
            given.setdefault("epsilon_high", given["epsilon"])
        return dataclasses.replace(own, **given)

    def penalty_weight(self) -> float:
        """Weight of the length penalty; 0 without one."""
        if self.length_penalty == "none":
            return 0.0
        given = self.length_penalty_weight
        return LENGTH_PENALTIES[self.length_penalty] if given is None else given

    def settings(self) -> dict[str, Any]:
        """Every field by name, with the recipe's values filled in, as in a run's config.json."""
        recipe = self.recipe()
        return dataclasses.asdict(self) | {name: getattr(recipe, name) for name in FROM_RECIPE}

    def from_recipe(self) -> list[str]:
        """Names of the fields that were not given and are taken from the recipe."""
        return [name for name in FROM_RECIPE if getattr(self, name) is None]

    def early_exit(self) -> EarlyExit:
        """The estimator's settings of early exit."""
        return EarlyExit(stride=self.estimator_stride, memory_mb=self.estimator_memory_mb)


def with_defaults(saved: Mapping[str, Any]) -> dict[str, Any]:
    """Saved settings of a run; fields that its version did not have get their defaults.

    Other entries of config.json, such as the list of fields from the recipe, are left out.
    """
    names = {field.name for field in dataclasses.fields(TrainConfig)}
    kept = {k: v for k, v in saved.items() if k in names and v is not None}
    method = {"method": kept["method"]} if kept.get("method") in RECIPES else {}
    return TrainConfig(**method).settings() | kept


_REAL: dict[str, Any] = {
    "prompts_per_step": 8,
    "num_generations": 8,
    "max_completion_length": 512,
    "max_steps": 200,
    "warmup_steps": 10,
    "save_steps": 10,
    # The paper trains all weights with 1e-6. An adapter starts at zero and needs about ten times
    # the learning rate of full fine-tuning.
    "learning_rate": 1e-5,
    "kl_coef": 0.001,
    "lora_rank": 16,
    "four_bit": True,
    "gradient_checkpointing": True,
    "estimator_memory_mb": 512.0,
}
CARDS: dict[str, dict[str, Any]] = {
    "t4": {**_REAL, "model": "Qwen/Qwen2.5-0.5B-Instruct", "micro_batch_size": 8},
    "12gb": {**_REAL, "model": "Qwen/Qwen2.5-1.5B-Instruct", "micro_batch_size": 8},
    "24gb": {**_REAL, "model": "Qwen/Qwen2.5-7B-Instruct", "micro_batch_size": 4},
}
"""Fields of TrainConfig for real models of the paper's three sizes, each on the smallest GPU with
enough memory for it. docs/real_models.md lists the memory of each part."""
