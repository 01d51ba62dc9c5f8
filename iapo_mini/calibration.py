"""Measure and improve the calibration of a policy that is forced to answer early.

The estimator takes H(y | q, o_<=t) from the policy's forced answer. If the policy is sure of a
wrong answer in the middle of a thought, the entropy is too low there and its drops are noise.
:func:`calibration` measures this, and :func:`calibrate` repairs it by a short fine-tuning. There,
chains are cut at random tokens and closed by the postfix, and the loss is on the true answer.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from tqdm.auto import tqdm
from transformers import DynamicCache

from iapo_mini.attention import model_mask, positions_of
from iapo_mini.chat import continuation_ids
from iapo_mini.early_exit.prefixes import ask, branch_inputs
from iapo_mini.early_exit.question import Question
from iapo_mini.early_exit.reading import logits_entropy
from iapo_mini.errors import check_choice, check_number
from iapo_mini.information import encode_postfix
from iapo_mini.intervals import expected_calibration_error
from iapo_mini.logprobs import NEVER
from iapo_mini.policy import Policy
from iapo_mini.problems.stories import chain_of_thought
from iapo_mini.rewards import parse_answer
from iapo_mini.rollouts import Rollouts
from iapo_mini.sampling import from_texts, sample
from iapo_mini.tasks import POSTFIX, Problem

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def _answer_tokens(policy: Policy, answers: Sequence[str]) -> torch.Tensor:
    """(N,) long: first token of each answer after ``<answer>``.

    It begins with a space, as in the story world, if space and answer are one token.
    """

    def first(answer: str) -> int:
        spaced = continuation_ids(policy.tokenizer, f" {answer}")
        plain = continuation_ids(policy.tokenizer, answer)
        return spaced[0] if len(spaced) == 1 else plain[0]

    return torch.tensor([first(answer) for answer in answers], device=policy.device)


def exit_calibration(
    policy: Policy, rollouts: Rollouts, answers: Sequence[str], parts: int = 10
) -> dict[str, torch.Tensor]:
    """Force the policy to answer after every ``1/parts`` of each completion.

    The first token of the forced answer is judged. In the story world this is the whole answer.

    Args:
        policy: the policy that is forced to answer.
        rollouts: B completions in whole groups (sampled, or written by the world).
        answers: B reference answers, one for each row.
        parts: number of equal parts of the chain; parts + 1 prefixes are asked.

    Returns:
        ``confidence`` (B, parts + 1), probability of the most likely forced answer; ``correct``
        (B, parts + 1) bool; ``entropy`` (B, parts + 1) nats.
    """
    truth = _answer_tokens(policy, answers)
    share = torch.arange(parts + 1, device=policy.device) / parts
    at = (rollouts.lengths[:, None] * share).round().long()
    asked = torch.zeros(
        len(at), rollouts.completion_ids.shape[1] + 1, dtype=torch.bool, device=policy.device
    ).scatter_(1, at, True)

    def read(rows: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        p, guess = torch.softmax(logits[:, 0].float(), dim=-1).max(-1)
        return torch.stack([p, (guess == truth[rows]).float(), logits_entropy(logits)[:, 0]], dim=1)

    question = Question(encode_postfix(policy), read, by_row=True)
    found = ask(policy.for_inference(), rollouts, question, asked=asked)
    found = found.gather(1, at[..., None].expand(-1, -1, 3)).cpu()
    return {
        "confidence": found[..., 0], "correct": found[..., 1] > 0.5, "entropy": found[..., 2],
    }  # fmt: skip


@dataclass(frozen=True)
class Calibration:
    """The result of :func:`calibration`.

    Attributes:
        exits: ``confidence``, ``correct`` and ``entropy``, each (N, parts + 1), from
            :func:`exit_calibration`.
        ece: expected calibration error over all prefixes.
        ece_by_part: parts + 1 errors, from the start of the chain to its end.
        entropy_by_part: parts + 1 mean answer entropies, nats.
        advice: a sentence of advice.
    """

    exits: dict[str, torch.Tensor]
    ece: float
    ece_by_part: list[float]
    entropy_by_part: list[float]
    advice: str

    def figure(self) -> Figure:
        """Plot the reliability diagram, and error and answer entropy along the chain."""
        from iapo_mini.plots import reliability

        return reliability({"forced answers": self.exits})


def calibration(
    policy: Policy,
    problems: Sequence[Problem],
    *,
    rollouts: Rollouts | None = None,
    against: str = "final",
    parts: int = 10,
    seed: int = 0,
) -> Calibration:
    """Measure how far the policy's forced early answers can be trusted.

    Args:
        policy: the policy to judge.
        problems: N problems.
        rollouts: completions to cut, whole groups in the order of ``problems``; default: one
            sampled completion for each problem.
        against: ``"final"`` compares forced answers with the answer at the end of the same
            completion, the y of the paper's I(y; o_t | q, o_<t); completions without an answer are
            left out. ``"truth"`` compares them with the problem's answer.
        parts: number of equal parts of the chain; parts + 1 prefixes are judged.
        seed: seed of sampling.

    Raises:
        ValueError: for an unknown ``against``, or when no completion gives an answer.
    """
    check_choice("against", against, ("final", "truth"))
    if rollouts is None:
        rollouts = sample(policy, list(problems), num_generations=1, seed=seed)
    group = rollouts.num_generations
    answers: list[str | None] = [p.answer for p in problems for _ in range(group)]
    if against == "final":
        answers = [parse_answer(text) for text in rollouts.texts(policy.tokenizer)]
    whole = torch.tensor([answer is not None for answer in answers])
    if not whole.any():
        raise ValueError("problems: no completion gives an answer, so there is nothing to judge.")
    exits = exit_calibration(policy, rollouts, [a or "0" for a in answers], parts)
    exits = {name: values[whole] for name, values in exits.items()}
    confidence, correct = exits["confidence"], exits["correct"]
    ece = expected_calibration_error(confidence.flatten(), correct.flatten())
    by_part = [expected_calibration_error(p, right) for p, right in zip(confidence.T, correct.T)]
    gap = float((confidence - correct.float()).mean())
    advice = "The forced answers can be trusted: informativeness in nats means what it says."
    if ece > 0.1 and gap > 0:
        advice = (
            f"The policy is sure of answers it does not know (by {gap:.2f} on average): entropies "
            "are too low and their drops are noise. Run calibrate() before training with IAPO."
        )
    elif ece > 0.1:
        advice = (
            f"The policy doubts answers it does know (by {-gap:.2f} on average): informativeness "
            "comes too late. Run calibrate(), or check that the postfix fits the policy's format."
        )
    entropies = exits["entropy"].mean(0).tolist()
    return Calibration(exits, ece, by_part, entropies, advice)


def forecast_targets(logits: torch.Tensor, answers: torch.Tensor, td_lambda: float) -> torch.Tensor:
    """TD(lambda) targets for the forecasts of the answer along a chain (Sutton, 1988).

    The forecasts p_1 ... p_C of a calibrated policy are a martingale: its present belief is the
    mean of its later beliefs. So a forecast can learn from the next one instead of from the true
    answer alone: G_j = (1 - lambda) p_{j+1} + lambda G_{j+1}, where G_C is the true answer. The
    true answer is a single, noisy draw; the next forecast is not. Unlike training on the true
    answer alone, this also penalises forecasts that change although the chain says nothing new.

    Args:
        logits: (B, C, V), forecasts in the order of the chain.
        answers: (B,) long, true answers.
        td_lambda: 1 uses the true answer alone; near 0 it is mostly the next forecast.

    Returns:
        (B, C, V) fp32 probabilities, without gradient.
    """
    p = torch.softmax(logits.detach().float(), dim=-1)
    targets = torch.empty_like(p)
    target = torch.nn.functional.one_hot(answers, p.shape[-1]).to(p.dtype)
    for j in reversed(range(p.shape[1])):
        targets[:, j] = target
        target = torch.lerp(p[:, j], target, td_lambda)
    return targets


@dataclass(frozen=True)
class Trunk:
    """Sequences that a model has processed, with their cache, to which branches are appended.

    Attributes:
        cache: keys and values of T positions in each of B rows.
        mask: (B, T) bool, real tokens.
        position_ids: (B, T) long.
    """

    cache: DynamicCache
    mask: torch.Tensor
    position_ids: torch.Tensor


def exit_loss(
    model: Any,
    trunk: Trunk,
    ends: torch.Tensor,
    postfix: torch.Tensor,
    answers: torch.Tensor,
    *,
    td_lambda: float = 1.0,
    into_trunk: bool = False,
) -> torch.Tensor:
    """Cross-entropy of the true answer's first token when it is forced after given trunk tokens.

    By default the trunk's keys and values are detached, so exits learn to use what the chain has
    computed so far. With gradients into the trunk, a policy that is still learning to reason would
    instead learn to solve problems internally, before the chain says anything.

    Args:
        model: causal LM.
        trunk: B rows that the model has processed.
        ends: (B, C) long, index of the trunk token that each exit follows, in rising order.
        postfix: (K,) long.
        answers: (B,) long, first token of each row's answer.
        td_lambda: below 1, an exit also learns from the next one (:func:`forecast_targets`).
        into_trunk: let gradients flow into the trunk's keys and values.

    Returns:
        Scalar, nats per exit, fp32.
    """
    branch = branch_inputs(trunk.mask, trunk.position_ids, ends, postfix)
    branch["attention_mask"] = model_mask(model, branch["attention_mask"])
    k, exits = len(postfix), ends.shape[1]
    kept: Any = trunk.cache.layers  # its type also allows layers without keys and values
    layers = [(x.keys, x.values) for x in kept]
    if not into_trunk:
        layers = [(keys.detach(), values.detach()) for keys, values in layers]
    last = torch.arange(k - 1, exits * k, k, device=ends.device)
    out = model(past_key_values=DynamicCache(layers), logits_to_keep=last, **branch)
    logits = out.logits.float().clamp(min=NEVER)  # a target of probability 0 costs nothing
    if td_lambda == 1:
        targets = answers[:, None].expand(ends.shape).flatten()
    else:
        targets = forecast_targets(logits, answers, td_lambda).flatten(0, 1)
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets)


def _optimizer(
    parameters: list[torch.nn.Parameter], learning_rate: float, steps: int
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    """AdamW with a warm-up over a tenth of the steps and a linear decay over the second half."""
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=0.0)
    warmup = max(1, steps // 10)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / warmup, 2 * (1 - step / steps))
    )
    return optimizer, schedule


def _batches(
    problems: Iterable[Problem],
    texts: Iterable[str] | None,
    steps: int,
    batch_size: int,
    rng: random.Random,
) -> Iterator[tuple[list[Problem], list[str]]]:
    """Problems of every step, each with its given text or a chain that the story world writes."""
    stream, given = iter(problems), iter(texts) if texts is not None else None
    for step in range(steps):
        batch = [p for _, p in zip(range(batch_size), stream)]
        chains = [c for _, c in zip(batch, given)] if given else []
        if len(batch) < batch_size or (given and len(chains) < batch_size):
            raise ValueError(
                f"problems must be at least steps * batch_size = {steps * batch_size}, each with "
                f"its text if texts are given; they ran out at step {step} of {steps}"
            )
        if not given:
            if not all(p.steps for p in batch):
                raise ValueError("problems are not stories, but texts is None; give their chains.")
            chains = ["".join(s.text for s in chain_of_thought(p, rng)) for p in batch]
        yield batch, chains


def _read(
    model: Any, before: dict[str, torch.Tensor], rollouts: Rollouts
) -> tuple[torch.Tensor, Trunk]:
    """KL(before || now) of the completions' tokens (scalar, nats per token), and their trunk."""
    mask = torch.cat([rollouts.prompt_mask, rollouts.completion_mask], dim=1)
    causal = torch.ones(mask.shape[1], mask.shape[1], dtype=torch.bool, device=mask.device)
    inputs = {
        "input_ids": torch.cat([rollouts.prompt_ids, rollouts.completion_ids], dim=1),
        "attention_mask": model_mask(model, (mask[:, None] & causal.tril())[:, None]),
        "position_ids": positions_of(mask),
    }
    now = model(**inputs, use_cache=True)
    with torch.no_grad():
        was = torch.func.functional_call(model, before, kwargs=inputs | {"use_cache": False})
    written = slice(rollouts.prompt_ids.shape[1] - 1, -1)
    logits = (x.logits[:, written].float() for x in (was, now))
    p, q = (torch.log_softmax(x, dim=-1).clamp(min=NEVER) for x in logits)
    kl = ((p.exp() * (p - q)).sum(-1) * rollouts.completion_mask).sum()
    trunk = Trunk(now.past_key_values, mask, inputs["position_ids"])
    return kl / rollouts.completion_mask.sum(), trunk


def _draw_exits(rollouts: Rollouts, exits: int, rng: random.Random) -> torch.Tensor:
    """(B, exits) long: random trunk tokens to force an answer after, from the prompt's last on."""
    last = rollouts.prompt_ids.shape[1] - 1
    return torch.tensor(
        [sorted(last + rng.randint(0, int(n)) for _ in range(exits)) for n in rollouts.lengths],
        device=rollouts.prompt_ids.device,
    )


def calibrate(
    policy: Policy,
    problems: Iterable[Problem],
    *,
    steps: int = 300,
    batch_size: int = 16,
    exits: int = 24,
    learning_rate: float = 1e-3,
    anchor: float = 10.0,
    td_lambda: float = 0.05,
    postfix: str = POSTFIX,
    texts: Sequence[str] | None = None,
    seed: int = 0,
    progress: bool = True,
) -> list[dict[str, float]]:
    """Calibrate forced early answers by a short fine-tuning of the policy, in place.

    Every step takes ``batch_size`` chains and adds two losses. The first is the cross-entropy of
    the forced answer after ``exits`` random prefixes, with temporal differences
    (:func:`forecast_targets`). The second is ``anchor`` times KL(before || now) of the next token,
    which preserves the policy's way of reasoning. (The next-token loss on the chains in its place
    is so noisy that the policy forgets some arithmetic.) Only the policy's trainable weights
    change; under LoRA this is the adapter.

    Args:
        policy: the policy to train.
        problems: at least ``steps * batch_size`` problems with answers, or an endless stream;
            stories need no ``texts``.
        steps: optimiser steps (AdamW, warm-up over a tenth, linear decay over the second half).
        batch_size: chains per step.
        exits: forced answers per chain.
        learning_rate: peak learning rate.
        anchor: weight of the KL divergence from the policy before, beside the exit loss.
        td_lambda: above 0; 1 trains every exit on the true answer, less also on the next exit. The
            value falls from 1 to this over the first quarter of the steps.
        postfix: text that forces an answer.
        texts: completions to learn from, one for each problem in order, if the problems are not
            stories (for example right completions of the policy).
        seed: seed of cuts and chains.
        progress: show a progress bar.

    Returns:
        One ``{"kl", "exit_loss"}`` for each step, nats per token and nats per forced answer.

    Raises:
        ValueError: when problems run out, when they are not stories and ``texts`` is None, or for
            a ``td_lambda`` out of range.
    """
    check_number("td_lambda", td_lambda, above=0, most=1)
    model, rng = policy.model, random.Random(seed)
    ids = encode_postfix(policy, postfix)
    parameters = list(policy.trainable().values())
    before = {name: p.detach().clone() for name, p in policy.trainable().items()}
    optimizer, schedule = _optimizer(parameters, learning_rate, steps)
    history = []
    model.train()
    bar = tqdm(range(steps), desc="calibrate", unit="step", disable=not progress)
    for step, (batch, chains) in zip(bar, _batches(problems, texts, steps, batch_size, rng)):
        rollouts = from_texts(policy, batch, chains)
        kl, trunk = _read(model, before, rollouts)
        ends = _draw_exits(rollouts, exits, rng)
        answers = _answer_tokens(policy, [p.answer for p in batch])
        # At first only the true answer: untrained forecasts have nothing to teach each other.
        weight = max(td_lambda, 1 - 4 * step / steps)
        # The anchor preserves the policy's completions, so gradients may flow into the trunk.
        early = exit_loss(model, trunk, ends, ids, answers, td_lambda=weight, into_trunk=True)
        (anchor * kl + early).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        history.append({"kl": kl.item(), "exit_loss": early.item()})
        bar.set_postfix(kl=f"{history[-1]['kl']:.4f}", exit=f"{history[-1]['exit_loss']:.3f}")
    model.eval()
    return history
