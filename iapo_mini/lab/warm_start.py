"""A warm start for a real model: it learns the paper's format from worked solutions.

A published model rarely writes the tags that the reward asks for, and a run would begin with
learning to write them. So an adapter is trained first, supervised, by transformers' ``Trainer`` on
worked stories (:mod:`iapo_mini.lab.school`). The start policy of all runs is the model with this
adapter merged into it. The adapter itself is kept beside it.

The closing tags are tokens of their own in training, as they are when the estimator forces an
answer. The tokenizer would merge some of them with the character before.

Two machines that train an adapter get slightly different weights. So a start that others should
continue from is kept, as an adapter of a few megabytes. Its weights are rounded to bf16 and merged
in float64: products and sums are exact then, and every machine gets the same start policy.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import Trainer, TrainingArguments

from iapo_mini.adapters import NAMED, WEIGHTS
from iapo_mini.chat import continuation_ids, render_prompt
from iapo_mini.files import read_json, replace_folder, same_settings, write_json
from iapo_mini.lab.school import LEVELS, Level, Worked, worked_stories
from iapo_mini.logprobs import token_logprobs
from iapo_mini.policies import shown_name
from iapo_mini.policy import Policy, load_policy
from iapo_mini.rollouts import Rollouts
from iapo_mini.sampling import from_ids
from iapo_mini.tasks import POSTFIX

TOLD = "warm_start.json"


@dataclass(frozen=True)
class WarmStart:
    """Settings of a warm start.

    Attributes:
        model: folder or hub id of a model.
        steps: optimiser steps.
        batch_size: worked stories per step.
        learning_rate: peak of AdamW's learning rate, after a warm-up over a tenth of the steps; it
            falls to zero along a cosine.
        lora_rank: rank of the adapter.
        levels: difficulties of the stories, each equally often.
        seed: seed of stories and adapter.
        save_every: steps between checkpoints.
    """

    model: str
    steps: int = 60
    batch_size: int = 8
    learning_rate: float = 5e-4
    lora_rank: int = 32
    levels: tuple[Level, ...] = LEVELS
    seed: int = 0
    save_every: int = 10


def completion_tokens(policy: Policy, worked: Worked) -> list[int]:
    """Token ids of a worked solution, in which the closing tags are tokens of their own."""
    before, tags, answer = worked.text().partition(POSTFIX)
    ids = [continuation_ids(policy.tokenizer, text) for text in (before, tags, answer)]
    return [*itertools.chain(*ids), int(policy.eos_ids[0])]


def collated(policy: Policy, rows: Sequence[Worked]) -> dict[str, torch.Tensor]:
    """Tokens of a batch: what all prompts begin with, and the rest of each row.

    Every prompt tells the model the same before it asks its question. Those tokens are two thirds
    of a prompt, and run once for the whole batch.

    Returns:
        ``prompt_ids`` and ``prompt_mask`` (B, P), equal in all rows; ``completion_ids`` and
        ``completion_mask`` (B, L), the question and the solution; and ``learned`` (B, L) bool, the
        tokens of the solution.
    """
    texts = [render_prompt(policy.tokenizer, row.problem) for row in rows]
    prompts = policy.tokenizer(texts, add_special_tokens=False)["input_ids"]
    same = itertools.takewhile(lambda tokens: len(set(tokens)) == 1, zip(*prompts))
    shared = len(list(same))
    solutions = [completion_tokens(policy, row) for row in rows]
    ids = [prompt[shared:] + solution for prompt, solution in zip(prompts, solutions)]
    first = torch.tensor([prompts[0][:shared]], device=policy.device)
    made = from_ids(policy, first, torch.ones_like(first, dtype=torch.bool), ids, len(rows))
    names = ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask")
    before = torch.tensor([len(p) - shared for p in prompts], device=policy.device)
    place = torch.arange(made.completion_ids.shape[1], device=policy.device)
    learned = made.completion_mask & (place >= before[:, None])
    return {name: getattr(made, name) for name in names} | {"learned": learned}


def supervised_loss(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Cross-entropy of the solutions in a batch of :func:`collated`, nats per token."""
    mask, learned = batch["completion_mask"], batch["learned"]
    rollouts = Rollouts(
        batch["prompt_ids"], batch["prompt_mask"], batch["completion_ids"], mask,
        old_logprobs=torch.zeros(mask.shape, device=mask.device), num_generations=len(mask),
        finished=mask.any(1),
    )  # fmt: skip
    logprobs, _ = token_logprobs(model, rollouts, rows_per_block=8)
    return -logprobs[learned].sum() / learned.sum()


class _Supervised(Trainer):
    """transformers' trainer with our loss, whose vocabulary head runs in chunks."""

    _last = 0.0

    def compute_loss(self, model: Any, inputs: dict, *given: Any, **named: Any) -> torch.Tensor:
        """The supervised loss of a batch."""
        return supervised_loss(model, inputs)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the seconds since the last entry; the entries are kept in checkpoints."""
        now = time.perf_counter()
        super().log({**logs, "seconds": now - (self._last or now)}, start_time)
        self._last = now

    def training_step(self, *given: Any, **named: Any) -> torch.Tensor:
        """Start the clock at the first step, then train as usual."""
        self._last = self._last or time.perf_counter()
        return super().training_step(*given, **named)


def _newest(folder: Path) -> str | None:
    """The newest checkpoint that is complete: its state is written last."""
    for path in sorted(folder.glob("checkpoint-*"), key=lambda p: -int(p.name.split("-")[1])):
        with contextlib.suppress(OSError, ValueError):
            json.loads((path / "trainer_state.json").read_text(encoding="utf-8"))
            return str(path)
    return None


def _train(policy: Policy, lessons: Sequence[Worked], how: WarmStart, folder: Path) -> list[dict]:
    """Train the adapter in place; return the entries of the log."""
    settings = TrainingArguments(
        str(folder), max_steps=how.steps, per_device_train_batch_size=how.batch_size,
        learning_rate=how.learning_rate, lr_scheduler_type="cosine",
        warmup_steps=max(1, how.steps // 10), weight_decay=0.0, max_grad_norm=1.0, seed=how.seed,
        logging_steps=min(10, how.steps), save_steps=how.save_every, save_total_limit=2,
        use_cpu=policy.device.type == "cpu", remove_unused_columns=False, report_to=[],
        dataloader_pin_memory=False, disable_tqdm=False,
    )  # fmt: skip
    # Its type names torch's Dataset, but any sequence serves.
    data: dict[str, Any] = {
        "train_dataset": lessons, "data_collator": functools.partial(collated, policy),
    }  # fmt: skip
    trainer = _Supervised(policy.model, settings, **data)
    trainer.train(resume_from_checkpoint=_newest(folder))
    return trainer.state.log_history


@torch.no_grad()
def exactly_merged(policy: Policy) -> Any:
    """The plain model of a LoRA policy whose adapter is rounded, the same on every machine."""
    plain = policy.merged()
    weights = plain.state_dict()
    for name, layer in policy.model.get_base_model().named_modules():
        if hasattr(layer, "get_delta_weight"):
            a, b = (part["default"].weight.double() for part in (layer.lora_A, layer.lora_B))
            total = layer.base_layer.weight.double() + layer.scaling["default"] * (b @ a)
            weights[f"{name}.weight"].copy_(total)
    return plain


def _save_in_16_bits(policy: Policy, folder: Path) -> None:
    """Write the rounded adapter without loss, in half the space."""
    policy.save(folder)
    weights = {name: weight.bfloat16() for name, weight in load_file(folder / WEIGHTS).items()}
    save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})


def _named(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings in which a model in a folder is called by the folder's name."""
    return {**settings, "model": shown_name(settings["model"])}


def _keep(folder: Path, kept: Path) -> None:
    """Copy a finished warm start's adapter and numbers, without the paths of this machine."""

    def write(target: Path) -> None:
        shutil.copy(folder / "adapter" / WEIGHTS, target)
        for name, key in NAMED:
            told = read_json(folder / "adapter" / name)
            line = json.dumps(told | {key: shown_name(told[key])})
            (target / name).write_text(line + "\n", encoding="utf-8", newline="\n")
        told = read_json(folder / TOLD)
        write_json(target / TOLD, told | {"settings": _named(told["settings"])})

    replace_folder(kept, write)


def _kept(kept: Path, how: WarmStart) -> tuple[Policy, dict[str, Any]] | None:
    """The policy with the adapter that is kept, and its numbers.

    None if nothing is kept, or if it has other settings or belongs to other weights.
    """
    told = read_json(kept / TOLD, {})
    if told.get("settings") != json.loads(json.dumps(_named(asdict(how)))):
        return None
    with contextlib.suppress(ValueError):  # a model of the same name with other weights
        return load_policy(how.model, adapter=kept), told
    return None


def _trained(folder: Path, how: WarmStart) -> tuple[Policy, dict[str, Any]]:
    """The policy after training, its adapter rounded, and minutes and losses."""
    policy = load_policy(how.model, lora_rank=how.lora_rank, seed=how.seed)
    count = how.steps * how.batch_size
    lessons = list(itertools.islice(worked_stories("train", how.seed, how.levels), count))
    try:
        log = _train(policy, lessons, how, folder / "checkpoints")
    except ImportError as error:
        raise ValueError(
            "a warm start needs accelerate, which is not installed; pip install accelerate."
        ) from error
    for weight in policy.trainable().values():
        weight.data = weight.data.bfloat16().to(weight.dtype)
    policy.model.eval()
    return policy, {
        "minutes": sum(entry["seconds"] for entry in log) / 60,
        "loss": [[entry["step"], entry["loss"]] for entry in log if "loss" in entry],
    }


def warm_start(folder: Path, how: WarmStart, kept: Path | None = None) -> dict[str, Any]:
    """Make the start policy in ``folder/model`` and its adapter in ``folder/adapter``.

    A finished one is not made again, and an interrupted one continues from its newest checkpoint.

    Args:
        folder: folder of the work.
        how: settings.
        kept: folder that keeps the adapter for other machines. If it holds one with these settings
            and of this model, nothing is trained. Otherwise the new one is put there.

    Returns:
        The content of ``folder/warm_start.json``: ``settings``, ``minutes`` and ``loss``, pairs of
        a step and the mean loss of the steps before it (nats per token).

    Raises:
        ValueError: when the folder holds a warm start with other settings, or accelerate, which
            transformers' trainer needs, is not installed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    same_settings(folder / "settings.json", "warm start", asdict(how))
    path = folder / TOLD
    if not path.is_file():
        policy, told = (kept and _kept(kept, how)) or _trained(folder, how)
        replace_folder(folder / "adapter", lambda target: _save_in_16_bits(policy, target))
        plain = exactly_merged(policy)

        def write(target: Path) -> None:
            plain.save_pretrained(target)
            policy.tokenizer.save_pretrained(target)

        replace_folder(folder / "model", write)
        write_json(path, told | {"settings": asdict(how)})
    made = read_json(path, needs=("settings", "minutes", "loss"))
    if kept and read_json(kept / TOLD, {}).get("loss") != made["loss"]:
        _keep(folder, kept)
    return made
