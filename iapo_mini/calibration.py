"""Measure and improve the calibration of a policy that is forced to answer early.

The estimator takes H(y | q, o_<=t) from the policy's forced answer. If the policy is sure of a
wrong answer in the middle of a thought, the entropy is too low there and its drops are noise.
:func:`calibration` measures this, and :func:`calibrate` repairs it by a short fine-tuning. There,
chains are cut at random tokens and closed by the postfix, and the loss is on the true answer.
"""

from __future__ import annotations

import itertools
import json
import random
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from tqdm.auto import tqdm

from iapo_mini.adapters import fingerprint_of_weights
from iapo_mini.attention import check_reach
from iapo_mini.chat import continuation_ids
from iapo_mini.early_exit.prefixes import ask
from iapo_mini.early_exit.question import Question
from iapo_mini.early_exit.reading import logits_entropy
from iapo_mini.errors import MOST_REAL, MOST_ROWS, MOST_STEPS, check_choice, check_number
from iapo_mini.exit_training import anchor_loss, draw_exits, exit_loss
from iapo_mini.files import same_settings
from iapo_mini.information import encode_postfix
from iapo_mini.intervals import expected_calibration_error
from iapo_mini.logprobs import plain_model
from iapo_mini.metrics import LOG, trim_log, whole_log
from iapo_mini.policy import Policy
from iapo_mini.problems.stories import chain_of_thought
from iapo_mini.rewards import parse_answer
from iapo_mini.rollouts import Rollouts
from iapo_mini.run_folder import restore_checkpoint, save_checkpoint
from iapo_mini.sampling import from_texts, sample
from iapo_mini.tasks import POSTFIX, Problem, fingerprint_of_problems

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
    check_number("parts", parts, 1, MOST_ROWS)
    if rollouts is None:
        rollouts = sample(policy, list(problems), num_generations=1, seed=seed)
    group = rollouts.num_generations
    answers: list[str | None] = [p.answer for p in problems for _ in range(group)]
    if against == "final":
        answers = [parse_answer(text) for text in rollouts.texts(policy.tokenizer)]
    whole = torch.tensor([bool(answer) for answer in answers])
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


def _share_of_rate(step: int, steps: int) -> float:
    """Share of the peak rate: warm-up over a tenth of the steps, linear decay over a half."""
    return min(1.0, (step + 1) / max(1, steps // 10), 2 * (1 - step / steps))


def _peeked(problems: Iterable[Problem], count: int) -> tuple[str, Iterator[Problem]]:
    """Fingerprint of the first problems, and all problems."""
    stream = iter(problems)
    first = list(itertools.islice(stream, count))
    return fingerprint_of_problems(first), itertools.chain(first, stream)


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


def _read(policy: Policy, batch: list[Problem], chains: list[str], asked: int) -> Rollouts:
    """Chains as rollouts, if the model can read them and ``asked`` tokens after them."""
    rollouts = from_texts(policy, batch, chains)
    longest = rollouts.prompt_ids.shape[1] + rollouts.completion_ids.shape[1]
    check_reach(plain_model(policy.model), longest + asked)
    return rollouts


def _update(
    policy: Policy, optimizer: torch.optim.Optimizer, loss: torch.Tensor, learning_rate: float
) -> None:
    if not torch.isfinite(loss):
        raise FloatingPointError(
            f"the loss of the calibration is {loss.item()}; its update is not made. Lower "
            "learning_rate."
        )
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
    loss.backward()
    torch.nn.utils.clip_grad_norm_(list(policy.trainable().values()), 1.0)
    optimizer.step()
    optimizer.zero_grad()


class _Progress:
    """What calibration has done so far: the history of its losses, and its checkpoints, if any.

    Args:
        folder: folder of the checkpoints and the log, or None to keep nothing.
        settings: what must be equal for the calibration to continue.
        every: steps between checkpoints.
        shown: whether to show a progress bar.
    """

    def __init__(
        self, folder: Path | None, settings: dict[str, Any], every: int, shown: bool
    ) -> None:
        self.folder, self.settings, self.every = folder, settings, every
        self.history: list[dict[str, float]] = []
        self.bar = tqdm(total=settings["steps"], desc="calibrate", unit="step", disable=not shown)
        self._last = time.perf_counter()

    def restore(self, policy: Policy, optimizer: torch.optim.Optimizer) -> int:
        """Load the newest checkpoint and return its number of steps, or 0.

        Raises:
            ValueError: when the folder holds a calibration with other settings.
        """
        if self.folder is None:
            return 0
        self.folder.mkdir(parents=True, exist_ok=True)
        weights = fingerprint_of_weights(policy.model.named_parameters())
        same_settings(
            self.folder / "settings.json", "calibration", {**self.settings, "weights": weights}
        )
        done = restore_checkpoint(self.folder, policy, optimizer)
        trim_log(self.folder / LOG, done)
        rows = whole_log(self.folder / LOG, done)
        self.history = [{name: row[name] for name in ("kl", "exit_loss")} for row in rows]
        self.bar.update(done)
        self._last = time.perf_counter()
        return done

    def add(
        self, losses: dict[str, float], policy: Policy, optimizer: torch.optim.Optimizer
    ) -> None:
        """Add the losses of a step, and write a checkpoint if one is due or all are done."""
        self.history.append(losses)
        done, now = len(self.history), time.perf_counter()
        row = {"step": done, **losses, "seconds": now - self._last}
        self._last = now
        self.bar.set_postfix(kl=f"{losses['kl']:.4f}", exit=f"{losses['exit_loss']:.3f}")
        self.bar.update()
        if self.folder is None:
            return
        with (self.folder / LOG).open("a", encoding="utf-8", newline="\n") as log:
            log.write(json.dumps(row) + "\n")
        if done % self.every == 0 or done == self.settings["steps"]:
            save_checkpoint(self.folder, done, policy, optimizer)


def _check_settings(policy: Policy, settings: Mapping[str, Any], save_every: int) -> None:
    """Refuse what :func:`calibrate` can't work with, before its first step."""
    check_number("steps", settings["steps"], 1, MOST_STEPS)
    for name in ("batch_size", "exits"):
        check_number(name, settings[name], 1, MOST_ROWS)
    check_number("save_every", save_every, 1, MOST_STEPS)
    check_number("learning_rate", settings["learning_rate"], above=0, most=1)
    check_number("anchor", settings["anchor"], 0, MOST_REAL)
    check_number("td_lambda", settings["td_lambda"], above=0, most=1)
    if getattr(plain_model(policy.model), "is_gradient_checkpointing", False):
        raise ValueError(
            "policy has gradient_checkpointing, which keeps no keys and values for forced answers; "
            "load it without to calibrate it."
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
    folder: str | Path | None = None,
    save_every: int = 25,
    progress: bool = True,
) -> list[dict[str, float]]:
    """Calibrate forced early answers by a short fine-tuning of the policy, in place.

    Every step takes ``batch_size`` chains and adds two losses. The first is the cross-entropy of
    the forced answer after ``exits`` random prefixes, with temporal differences
    (:func:`iapo_mini.exit_training.forecast_targets`). The second is ``anchor`` times KL(before ||
    now) of the next token, which preserves the policy's way of reasoning. (The next-token loss on
    the chains in its place is so noisy that the policy forgets some arithmetic.) Only the policy's
    trainable weights change; under LoRA this is the adapter.

    Args:
        policy: the policy to train.
        problems: at least ``steps * batch_size`` problems with answers, or an endless stream;
            stories need no ``texts``.
        steps: optimiser steps (AdamW, warm-up over a tenth, linear decay over the second half).
        batch_size, exits: chains per step, and forced answers per chain.
        learning_rate: peak learning rate.
        anchor: weight of the KL divergence from the policy before, beside the exit loss.
        td_lambda: above 0; 1 trains every exit on the true answer, less also on the next exit. The
            value falls from 1 to this over the first quarter of the steps.
        postfix: text that forces an answer.
        texts: completions to learn from, one for each problem, if the problems are not stories.
        seed: seed of cuts and chains.
        folder: where checkpoints are kept. With the same policy, problems and settings, calibration
            continues after the newest one, to the same numbers as without a break.
        save_every: steps between checkpoints.
        progress: show a progress bar.

    Returns:
        One ``{"kl", "exit_loss"}`` for each step, nats per token and nats per forced answer.

    Raises:
        ValueError: for too few problems, for problems that are not stories without ``texts``, a
            number out of range, gradient checkpointing, or a folder with another calibration.
        FloatingPointError: when a loss is not finite; its update is not made.
    """
    settings = {
        "steps": steps, "batch_size": batch_size, "exits": exits, "learning_rate": learning_rate,
        "anchor": anchor, "td_lambda": td_lambda, "postfix": postfix, "seed": seed,
    }  # fmt: skip
    _check_settings(policy, settings, save_every)
    model, rng, ids = policy.model, random.Random(seed), encode_postfix(policy, postfix)
    before = {name: p.detach().clone() for name, p in policy.trainable().items()}
    optimizer = torch.optim.AdamW(policy.trainable().values(), weight_decay=0.0)
    settings["problems"], stream = _peeked(problems, batch_size)
    kept = _Progress(None if folder is None else Path(folder), settings, save_every, progress)
    done = kept.restore(policy, optimizer)
    model.train()
    for step, (batch, chains) in enumerate(_batches(stream, texts, steps, batch_size, rng)):
        rollouts = _read(policy, batch, chains, len(ids))
        ends = draw_exits(rollouts, exits, rng)
        if step < done:
            continue  # only their draws are repeated
        answers = _answer_tokens(policy, [p.answer for p in batch])
        kl, trunk = anchor_loss(model, before, rollouts)
        # At first only the true answer: untrained forecasts have nothing to teach each other.
        weight = max(td_lambda, 1 - 4 * step / steps)
        # The anchor preserves the policy's completions, so gradients may flow into the trunk.
        early = exit_loss(model, trunk, ends, ids, answers, td_lambda=weight, into_trunk=True)
        rate = learning_rate * _share_of_rate(step, steps)
        _update(policy, optimizer, anchor * kl + early, rate)
        kept.add({"kl": kl.item(), "exit_loss": early.item()}, policy, optimizer)
    model.eval()
    return kept.history
