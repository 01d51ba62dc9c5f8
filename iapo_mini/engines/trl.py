"""Every method on TRL's engine, an optional extra: ``pip install 'iapo-mini[trl]'``.

:class:`IAPOTrainer` is TRL's ``GRPOTrainer`` with one difference: after TRL has scored its
completions, each token gets its own advantage, by IAPO, another method of this library, or your own
method. TRL's loss accepts one advantage for each token, so sampling (also with vLLM), loss types,
PEFT, accelerate, DeepSpeed, logging and checkpoints are those of TRL. docs/scaleout.md says how to
run it and where it was tested. Nothing else in the library imports this module.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from accelerate.utils import gather_object
from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer
from trl.models.utils import unwrap_model_for_generation

from iapo_mini.adapters import pass_over_old_torchao
from iapo_mini.advantages import ADVANTAGES, COUNTED, exploration, normalize
from iapo_mini.early_exit.question import EarlyExit, check_stride
from iapo_mini.errors import MOST_REAL, check_choice, check_number
from iapo_mini.information import encode_postfix, inform
from iapo_mini.policy import Policy
from iapo_mini.recipes import RECIPES
from iapo_mini.rewards import reward
from iapo_mini.rollouts import Rollouts
from iapo_mini.tasks import POSTFIX, Problem, messages

LOSS_TYPES = {"sequence": "grpo", "token": "dapo"}
"""TRL's names of the ways to average the loss."""


@dataclass
class IAPOConfig(GRPOConfig):
    """``GRPOConfig`` with a method of this library. TRL's ``beta`` is the KL weight.

    Attributes:
        iapo_method: a key of :data:`iapo_mini.recipes.RECIPES`, or a method of your own module that
            ``use_methods`` has added. There is no dynamic sampling (``dapo``): TRL samples once.
        loss_type, epsilon, epsilon_high, beta: settings of TRL; default is the method's recipe.
        iapo_alpha: the method's alpha (IAPO: weight of informativeness); default is the recipe's.
            With IAPO, 0 switches the estimator off.
        iapo_beta: the method's beta (IAPO: weight of exploration); default is the recipe's.
        iapo_correct_above: a completion counts as correct if its weighted sum of rewards is above
            this.
        iapo_postfix: text that forces an answer.
        iapo_memory_mb: memory in MiB, beside the model, for the estimator.
        iapo_stride: number of tokens between early answers, or ``"sentence"``.

    Raises:
        ValueError: for a value out of range, naming it and what is allowed.
    """

    iapo_method: str = field(default="iapo", metadata={"help": "Method: a key of RECIPES."})
    loss_type: str | None = field(default=None, metadata={"help": "Loss; default the method's."})  # type: ignore[assignment]
    epsilon: float | None = field(default=None, metadata={"help": "Clip range below 1."})  # type: ignore[assignment]
    epsilon_high: float | None = field(default=None, metadata={"help": "Clip range above 1."})
    beta: float | None = field(default=None, metadata={"help": "Weight of the KL term."})  # type: ignore[assignment]
    iapo_alpha: float | None = field(default=None, metadata={"help": "The method's alpha."})
    iapo_beta: float | None = field(default=None, metadata={"help": "The method's beta."})
    iapo_correct_above: float = field(default=0.0, metadata={"help": "Correct above this reward."})
    iapo_postfix: str = field(default=POSTFIX, metadata={"help": "Text that forces an answer."})
    iapo_memory_mb: float = field(default=256.0, metadata={"help": "Memory of the estimator."})
    iapo_stride: str = field(default="1", metadata={"help": "Tokens between early answers."})

    def __post_init__(self) -> None:
        check_choice("iapo_method", self.iapo_method, RECIPES)
        recipe = RECIPES[self.iapo_method]
        for name, value in (
            ("loss_type", LOSS_TYPES[recipe.aggregation]), ("epsilon", recipe.epsilon),
            ("epsilon_high", recipe.epsilon_high), ("beta", recipe.kl_coef),
            ("iapo_alpha", recipe.alpha), ("iapo_beta", recipe.beta),
        ):  # fmt: skip
            if getattr(self, name) is None:
                setattr(self, name, value)
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
    """``GRPOTrainer`` with an advantage for every token, by any method of this library.

    With IAPO, the default, the paper's token terms (Section 4) are added to TRL's group advantage,
    so TRL's options for it still work. Other methods get the rewards and compute the advantages of
    the whole batch over all processes. Tokens that they leave out of the loss are also left out of
    TRL's loss.

    Raises:
        ValueError: for a postfix without tokens, or for a method with an estimate and FSDP. (The
            estimator needs all weights at once. DeepSpeed gathers them, TRL's FSDP does not.)
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
        self._recipe = RECIPES[args.iapo_method]
        if self.is_fsdp_enabled and self._asks:
            raise ValueError(
                f"iapo_alpha must be 0 with FSDP, which does not gather the weights, got "
                f"{args.iapo_alpha}; DeepSpeed and plain data parallelism allow any value"
            )
        self._policy = Policy(self.model, self._tokenizer)
        encode_postfix(self._policy, args.iapo_postfix)

    @property
    def _asks(self) -> bool:
        """Whether the method needs early answers."""
        weighs = self._recipe.rule != "iapo" or bool(self.args.iapo_alpha)
        return self._recipe.information is not None and weighs

    def _calculate_rewards(
        self, inputs: Any, prompts: Any, completions: Any, completion_ids_list: Any
    ) -> torch.Tensor:
        """TRL's rewards, (rows of all processes, functions), which are also kept for later."""
        self._rewards: torch.Tensor = super()._calculate_rewards(
            inputs, prompts, completions, completion_ids_list
        )
        return self._rewards

    def _generate_and_score_completions(self, inputs: Any) -> dict[str, Any]:
        """TRL's batch, with advantages (B, T) instead of (B,)."""
        batch = super()._generate_and_score_completions(inputs)
        if not self.model.training:
            return batch
        if "pixel_values" in batch:
            raise ValueError("the prompts hold images, but they must be only text")
        rows = len(batch["advantages"])
        start = self.accelerator.process_index * rows
        local = self._rewards[start : start + rows]
        mask = batch["completion_mask"].bool()
        # Tokens that the policy wrote, not a tool.
        own = mask & batch["tool_mask"].bool() if "tool_mask" in batch else mask
        rollouts = self._rollouts(batch, inputs, local)
        if self.args.iapo_method == "iapo":
            # Both norms are over completions that have a reward.
            scored = own & ~local.isnan().all(1)[:, None]
            advantages = self._iapo(batch, rollouts, own, scored)
        else:
            advantages = self._by_rule(batch, rollouts, start)
        batch["advantages"] = advantages * own
        return batch

    def _rollouts(self, batch: dict[str, Any], inputs: Any, rewards: torch.Tensor) -> Rollouts:
        """The rows of this process, with their weighted rewards (B,)."""
        mask, ids = batch["completion_mask"].bool(), batch["completion_ids"]
        total = (rewards * self.reward_weights.to(rewards.device)).nansum(1)
        last = ids.gather(1, (mask.sum(1, keepdim=True) - 1).clamp(min=0))[:, 0]
        whole_groups = len(ids) % self.num_generations == 0  # otherwise a group spans processes
        return Rollouts(
            prompt_ids=batch["prompt_ids"],
            prompt_mask=batch["prompt_mask"].bool(),
            completion_ids=ids,
            completion_mask=mask,
            old_logprobs=torch.zeros(mask.shape, device=mask.device),
            num_generations=self.num_generations if whole_groups else 1,
            finished=torch.isin(last, self._policy.eos_ids),
            known={"correct": total > self.args.iapo_correct_above, "rewards": total},
            limit=self.args.max_completion_length or 0,
            references=tuple(str(row.get("answer", "")) for row in inputs),
        )

    def _iapo(
        self, batch: dict[str, Any], rollouts: Rollouts, own: torch.Tensor, scored: torch.Tensor
    ) -> torch.Tensor:
        """TRL's group advantage plus the paper's two token terms, (B, T)."""
        alpha, beta = float(self.args.iapo_alpha or 0), float(self.args.iapo_beta or 0)
        advantages = batch["advantages"][:, None] * own
        if alpha > 0:
            s = self._informed(rollouts, own).informativeness
            advantages = advantages + alpha * normalize(s, scored)
        if beta > 0:
            rollouts = replace(rollouts, old_logprobs=self._old(batch, entropies=False)[0])
            advantages = advantages + beta * normalize(exploration(rollouts), scored)
        return advantages

    def _by_rule(self, batch: dict[str, Any], rollouts: Rollouts, start: int) -> torch.Tensor:
        """Advantages of this process's rows, (B, T), computed among the rows of all processes."""
        recipe, alpha = self._recipe, float(self.args.iapo_alpha or 0)
        logprobs, entropies = self._old(batch, entropies=True)
        rollouts = replace(rollouts, old_logprobs=logprobs).filled(token_entropies=entropies)
        if self._asks:
            rollouts = self._informed(rollouts, rollouts.completion_mask)
        everyone = self._gathered(rollouts)
        rows, width = rollouts.completion_mask.shape
        here = slice(start, start + rows), slice(0, width)
        # A rule needs every length. TRL empties the mask of a truncated completion that it leaves
        # out, so such a row counts as full here, and its advantages are dropped later.
        full = everyone.completion_mask | ~everyone.completion_mask.any(1, keepdim=True)
        everyone = replace(everyone, completion_mask=full)
        weigh = ADVANTAGES[recipe.rule] if isinstance(recipe.rule, str) else recipe.rule
        advantages = weigh(everyone, alpha, float(self.args.iapo_beta or 0))[here]
        if recipe.counted is not None:
            count = COUNTED[recipe.counted] if isinstance(recipe.counted, str) else recipe.counted
            kept = count(everyone, alpha)[here] & rollouts.completion_mask
            # TRL multiplies its mask by this one, also in denominators.
            kept = kept & batch["tool_mask"].bool() if "tool_mask" in batch else kept
            batch["tool_mask"] = kept.to(batch["completion_mask"].dtype)
            batch["num_items_in_batch"] = self.accelerator.gather(kept.sum()).sum()
        return advantages

    def _gathered(self, rollouts: Rollouts) -> Rollouts:
        """The rows of all processes in their order, where every group is whole."""

        def gather(values: torch.Tensor) -> torch.Tensor:
            if values.ndim == 2:
                values = self.accelerator.pad_across_processes(values, dim=1)
            return self.accelerator.gather(values)

        return replace(
            rollouts,
            prompt_ids=gather(rollouts.prompt_ids),
            prompt_mask=gather(rollouts.prompt_mask),
            completion_ids=gather(rollouts.completion_ids),
            completion_mask=gather(rollouts.completion_mask),
            old_logprobs=gather(rollouts.old_logprobs),
            finished=gather(rollouts.finished),
            known={name: gather(values) for name, values in rollouts.known.items()},
            num_generations=self.num_generations,
            references=tuple(gather_object(list(rollouts.references))),
        )

    def _informed(self, rollouts: Rollouts, own: torch.Tensor) -> Rollouts:
        """Rollouts with s_{i,t}, (B, T) nats, of the current policy, whose weights are gathered."""
        assert self._recipe.information is not None
        how = EarlyExit(
            self.args.iapo_postfix, self.args.stride, memory_mb=self.args.iapo_memory_mb
        )
        with unwrap_model_for_generation(self.model_wrapped, self.accelerator):
            try:
                rollouts = inform(self._policy, rollouts, self._recipe.information, how)
            finally:
                self.model.train()  # the estimator has set eval mode
        told = torch.stack([(rollouts.informativeness * own).sum(), own.sum()])
        told = self.accelerator.gather(told).view(-1, 2).sum(0)
        self._metrics["train"]["informativeness"].append((told[0] / told[1].clamp(min=1)).item())
        return rollouts

    def _old(self, batch: dict[str, Any], entropies: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """log pi_old(o_t), and on request the entropies of the distributions; (B, T) nats each.

        TRL omits them from the batch if its loss does not need them.
        """
        if "old_per_token_logps" in batch and not entropies:
            return batch["old_per_token_logps"], torch.empty(0)
        ids, mask = (
            torch.cat([batch[f"prompt_{x}"], batch[f"completion_{x}"]], 1) for x in ("ids", "mask")
        )
        with torch.no_grad():
            logprobs, found, *_ = self._get_per_token_logps_and_entropies(
                self.model, ids, mask, batch["completion_ids"].shape[1],
                batch_size=self.args.per_device_train_batch_size, compute_entropy=entropies,
            )  # fmt: skip
        real = batch["completion_mask"].bool()
        if found is None:
            return logprobs, torch.empty(0)
        return batch.get("old_per_token_logps", logprobs), found * real


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
