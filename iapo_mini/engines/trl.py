"""IAPO on TRL's engine, an optional extra: ``pip install 'iapo-mini[trl]'``.

:class:`IAPOTrainer` is TRL's ``GRPOTrainer`` with one difference: after TRL has scored its
completions, the paper's token terms are added to their advantages. TRL's loss accepts one advantage
for each token, so sampling (also with vLLM), loss types, PEFT, accelerate, DeepSpeed, logging and
checkpoints are those of TRL. docs/scaleout.md says how to run it and where it was tested. Nothing
else in the library imports this module.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer
from trl.models.utils import unwrap_model_for_generation

from iapo_mini.adapters import pass_over_old_torchao
from iapo_mini.advantages import exploration, normalize
from iapo_mini.config import RECIPES
from iapo_mini.early_exit.question import EarlyExit, check_stride
from iapo_mini.errors import MOST_REAL, check_number
from iapo_mini.information import answer_entropies, encode_postfix, informativeness
from iapo_mini.policy import Policy
from iapo_mini.rewards import reward
from iapo_mini.rollouts import Rollouts
from iapo_mini.tasks import POSTFIX, Problem, messages

RECIPE = RECIPES["iapo"]
LOSS_TYPES = {"sequence": "grpo", "token": "dapo"}
"""TRL's names of the ways to average the loss."""


@dataclass
class IAPOConfig(GRPOConfig):
    """``GRPOConfig`` with the weights of IAPO's terms. TRL's ``beta`` is the KL weight.

    Attributes:
        loss_type, epsilon, epsilon_high, beta: settings of TRL, with the defaults of IAPO's recipe
            (:data:`iapo_mini.config.RECIPES`).
        iapo_alpha: weight of the informativeness term (paper: alpha); 0 switches the estimator off.
        iapo_beta: weight of the exploration term (paper: beta).
        iapo_correct_above: a completion counts as correct (the sign of the exploration term) when
            its weighted sum of rewards is above this.
        iapo_postfix: text that forces an answer.
        iapo_memory_mb: memory in MiB, beside the model, for the estimator.
        iapo_stride: number of tokens between early answers, or ``"sentence"``.
    """

    loss_type: str = field(
        default=LOSS_TYPES[RECIPE.aggregation], metadata={"help": "Loss, as in IAPO's recipe."}
    )
    epsilon: float = field(default=RECIPE.epsilon, metadata={"help": "Clip range below 1."})
    epsilon_high: float | None = field(
        default=RECIPE.epsilon_high, metadata={"help": "Clip range above 1."}
    )
    beta: float = field(default=RECIPE.kl_coef, metadata={"help": "Weight of the KL term."})
    iapo_alpha: float = field(default=RECIPE.alpha, metadata={"help": "Weight of informativeness."})
    iapo_beta: float = field(default=RECIPE.beta, metadata={"help": "Weight of exploration."})
    iapo_correct_above: float = field(default=0.0, metadata={"help": "Correct above this reward."})
    iapo_postfix: str = field(default=POSTFIX, metadata={"help": "Text that forces an answer."})
    iapo_memory_mb: float = field(default=256.0, metadata={"help": "Memory of the estimator."})
    iapo_stride: str = field(default="1", metadata={"help": "Tokens between early answers."})

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("iapo_alpha", "iapo_beta"):
            check_number(name, getattr(self, name), 0, MOST_REAL)
        check_number("iapo_memory_mb", self.iapo_memory_mb, above=0, most=MOST_REAL)
        check_stride(self.stride, "iapo_stride")

    @property
    def stride(self) -> int | str:
        """``iapo_stride`` as a number if it is one; a field has one type on the command line."""
        text = str(self.iapo_stride)
        return int(text) if text.isdigit() else text


class IAPOTrainer(GRPOTrainer):
    """``GRPOTrainer`` with the paper's A_{i,t} (Section 4) as advantages. Takes the same arguments.

    Raises:
        ValueError: for a postfix without tokens, or with FSDP. (The estimator needs all weights at
            once. DeepSpeed gathers them, TRL's FSDP does not.)
    """

    args: IAPOConfig
    model: torch.nn.Module
    num_generations: int
    _tag_names = ["trl", "iapo"]  # noqa: RUF012 (as TRL declares it)

    def __init__(
        self, model: Any, reward_funcs: Any = None, args: IAPOConfig | None = None, **kwargs: Any
    ) -> None:
        args = IAPOConfig("iapo") if args is None else args
        pass_over_old_torchao()
        super().__init__(model, reward_funcs, args=args, **kwargs)
        if self.is_fsdp_enabled and args.iapo_alpha > 0:
            raise ValueError(
                f"iapo_alpha must be 0 with FSDP, which does not gather the weights, got "
                f"{args.iapo_alpha}; DeepSpeed and plain data parallelism allow any value"
            )
        self._policy = Policy(self.model, self._tokenizer)
        encode_postfix(self._policy, args.iapo_postfix)

    def _calculate_rewards(
        self, inputs: Any, prompts: Any, completions: Any, completion_ids_list: Any
    ) -> torch.Tensor:
        """TRL's rewards, (rows of all processes, functions), which are also kept for later."""
        self._rewards: torch.Tensor = super()._calculate_rewards(
            inputs, prompts, completions, completion_ids_list
        )
        return self._rewards

    def _generate_and_score_completions(self, inputs: Any) -> dict[str, Any]:
        """TRL's batch, with advantages (B, T) instead of (B,): group term plus token terms."""
        batch = super()._generate_and_score_completions(inputs)
        if not self.model.training:
            return batch
        if "pixel_values" in batch:
            raise ValueError("the prompts hold images, but they must be only text")
        args, rows = self.args, len(batch["advantages"])
        start = self.accelerator.process_index * rows
        local = self._rewards[start : start + rows]
        total = (local * self.reward_weights.to(local.device)).nansum(1)
        mask = batch["completion_mask"].bool()
        # Both norms are over tokens that the policy (not a tool) wrote in rewarded completions.
        own = mask & batch["tool_mask"].bool() if "tool_mask" in batch else mask
        scored = own & ~local.isnan().all(1)[:, None]
        whole_groups = rows % self.num_generations == 0  # otherwise a group spans processes
        ids = batch["completion_ids"]
        last = ids.gather(1, (mask.sum(1, keepdim=True) - 1).clamp(min=0))[:, 0]
        rollouts = Rollouts(
            prompt_ids=batch["prompt_ids"],
            prompt_mask=batch["prompt_mask"].bool(),
            completion_ids=ids,
            completion_mask=mask,
            old_logprobs=torch.zeros(mask.shape, device=mask.device),
            num_generations=self.num_generations if whole_groups else 1,
            finished=torch.isin(last, self._policy.eos_ids),
            known={"correct": total > args.iapo_correct_above},
        )
        advantages = batch["advantages"][:, None] * own
        if args.iapo_alpha > 0:
            s = self._informativeness(rollouts)
            advantages = advantages + args.iapo_alpha * normalize(s, scored)
            told = torch.stack([(s * own).sum(), own.sum()])
            told = self.accelerator.gather(told).view(-1, 2).sum(0)
            self._metrics["train"]["informativeness"].append((told[0] / told[1]).item())
        if args.iapo_beta > 0:
            rollouts = replace(rollouts, old_logprobs=self._old_logprobs(batch))
            advantages = advantages + args.iapo_beta * normalize(exploration(rollouts), scored)
        batch["advantages"] = advantages
        return batch

    def _informativeness(self, rollouts: Rollouts) -> torch.Tensor:
        """s_{i,t}, (B, T) nats, of the current policy, with all its weights gathered here."""
        with unwrap_model_for_generation(self.model_wrapped, self.accelerator):
            try:
                how = EarlyExit(
                    self.args.iapo_postfix, self.args.stride,
                    memory_mb=self.args.iapo_memory_mb,
                )  # fmt: skip
                entropies = answer_entropies(self._policy, rollouts, how)
            finally:
                self.model.train()  # the estimator has set eval mode
        return informativeness(entropies, rollouts.completion_mask)

    def _old_logprobs(self, batch: dict[str, Any]) -> torch.Tensor:
        """log pi_old(o_t), (B, T) nats. TRL omits it if its loss does not need it."""
        if "old_per_token_logps" in batch:
            return batch["old_per_token_logps"]
        ids, mask = (
            torch.cat([batch[f"prompt_{x}"], batch[f"completion_{x}"]], 1) for x in ("ids", "mask")
        )
        with torch.no_grad():
            logprobs, _, _ = self._get_per_token_logps_and_entropies(
                self.model, ids, mask, batch["completion_ids"].shape[1],
                batch_size=self.args.per_device_train_batch_size,
            )  # fmt: skip
        return logprobs


def answer_reward(completions: list, answer: list[str], **kwargs: Any) -> list[float]:
    """Reward function for TRL: format and correctness as in :func:`iapo_mini.rewards.reward`.

    Args:
        completions: texts, or chats whose first message is the completion.
        answer: reference answers, a column of :func:`dataset`.
    """
    texts = [c if isinstance(c, str) else c[0]["content"] for c in completions]
    return [reward(text, right)[0] for text, right in zip(texts, answer, strict=True)]


def dataset(problems: Iterable[Problem]) -> Dataset:
    """Problems in TRL's format: a chat under ``prompt``, the reference answer under ``answer``."""
    rows = [{"prompt": messages(problem), "answer": problem.answer} for problem in problems]
    if not rows:
        raise ValueError("problems is empty; at least one problem is needed to train.")
    return Dataset.from_list(rows)
