"""The settings of a training run."""

from __future__ import annotations

import dataclasses
import importlib
import math
import typing
from dataclasses import dataclass

from iapo_mini.advantages import ADVANTAGES
from iapo_mini.engines.vllm import ENGINES
from iapo_mini.information import INFORMATION, check_stride
from iapo_mini.objective import AGGREGATIONS
from iapo_mini.policies import EMBEDDED
from iapo_mini.problems.datasets import check_data


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
CARDS: dict[str, dict] = {
    "t4": {**_REAL, "model": "Qwen/Qwen2.5-0.5B-Instruct", "micro_batch_size": 8},
    "12gb": {**_REAL, "model": "Qwen/Qwen2.5-1.5B-Instruct", "micro_batch_size": 8},
    "24gb": {**_REAL, "model": "Qwen/Qwen2.5-7B-Instruct", "micro_batch_size": 4},
}
"""Fields of TrainConfig for a real model on one card: the paper's three sizes, from the smallest
card that has room for each. Memory of each by part: docs/real_models.md."""


def use_methods(module: str) -> None:
    """Add the methods of a module to the library's: its ``ADVANTAGES`` and ``INFORMATION``.

    Args:
        module: name of an importable module (docs/methods.md shows one).

    Raises:
        ValueError: when there is no such module, it has no ``ADVANTAGES``, or a name is taken.
    """
    try:
        found = importlib.import_module(module)
    except ImportError as error:
        raise ValueError(
            f"methods is '{module}', which can't be imported ({error}); allowed is the name of a "
            "Python module in this folder or on the path."
        ) from error
    if not isinstance(getattr(found, "ADVANTAGES", None), dict):
        raise ValueError(f"methods is '{module}', which has no dictionary ADVANTAGES.")
    for ours, theirs in (
        (ADVANTAGES, found.ADVANTAGES), (INFORMATION, getattr(found, "INFORMATION", {})),
    ):  # fmt: skip
        for name, function in theirs.items():
            if ours.setdefault(name, function) is not function:
                raise ValueError(f"methods is '{module}', whose name '{name}' is taken already.")
