"""Pretraining of the embedded policy; ``python -m iapo_mini.lab.pretrain`` repeats all of it.

A model of the Qwen2 architecture learns to continue stories of the train stream with chains of
thought that the world writes. One pass over prompt and completion gives two losses:

* next-token cross-entropy on the completion, and
* **early exits**: at ``exits`` random prefixes of every chain, a branch ``</think><answer>`` is
  appended (all branches of a row are packed behind its KV cache), which must predict the true
  answer. Only the answer is a target, so the policy does not learn to stop early.

Without the second loss, a policy that is forced to answer early copies the last number it saw. Its
answer entropy is near zero everywhere, and the estimator of the paper measures noise.

``python -m iapo_mini.lab.pretrain --calibrate`` makes ``embedded-calibrated`` from the result.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import math
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import Qwen2ForCausalLM, Qwen2Tokenizer

from iapo_mini.calibration import calibrate
from iapo_mini.chat import render_prompt
from iapo_mini.errors import (
    MOST_RANK,
    MOST_REAL,
    MOST_ROWS,
    MOST_SEED,
    MOST_STEPS,
    MOST_THREADS,
    check_number,
)
from iapo_mini.exit_training import Trunk, exit_loss
from iapo_mini.files import rename, same_settings, writable_folder
from iapo_mini.lab.assess import assess
from iapo_mini.lab.story_model import HEAD_WIDTH, build_model, build_tokenizer
from iapo_mini.metrics import trim_log
from iapo_mini.model_files import model_source
from iapo_mini.options import Parser, in_one_sentence, number, print_any_text, whole
from iapo_mini.policies import EMBEDDED
from iapo_mini.policy import load_policy
from iapo_mini.problems.stories import MAX_VALUE, chain_of_thought, stories
from iapo_mini.tasks import POSTFIX

_Row = tuple[list[int], list[int], int]
"""Tokens of a prompt, tokens of its completion, and token of its answer."""


_RANGES: dict[str, tuple[float, float]] = {
    "steps": (1, MOST_STEPS), "checkpoint_every": (1, MOST_STEPS), "batch_size": (1, MOST_ROWS),
    "exits": (0, MOST_ROWS), "layers": (1, 1000), "hidden": (HEAD_WIDTH, MOST_RANK),
    "exit_weight": (0, MOST_REAL), "threads": (1, MOST_THREADS), "seed": (0, MOST_SEED),
}  # fmt: skip


@dataclass(frozen=True)
class Settings:
    """Settings of pretraining; the defaults are those of the embedded policy.

    Attributes:
        steps: optimiser steps.
        batch_size: stories per step.
        exits: early exits per story; 0 for none.
        exit_weight: weight of the exit loss beside the next-token loss.
        lr: peak learning rate of AdamW; Muon's is ten times as high.
        hidden: hidden size, a multiple of 32.
        layers: decoder layers.
        seed: seed of weights and stories.
        checkpoint_every: steps between checkpoints.
        threads: CPU threads.

    Raises:
        ValueError: for a value out of range, naming it and what is allowed.
    """

    steps: int = 1600
    batch_size: int = 48
    exits: int = 8
    exit_weight: float = 0.5
    lr: float = 2e-3
    hidden: int = 128
    layers: int = 4
    seed: int = 0
    checkpoint_every: int = 500
    threads: int = 2

    def __post_init__(self) -> None:
        for name, (least, most) in _RANGES.items():
            check_number(name, getattr(self, name), least, most)
        check_number("lr", self.lr, above=0, most=MOST_REAL)
        if self.hidden % HEAD_WIDTH:
            raise ValueError(f"hidden must be a multiple of {HEAD_WIDTH}, got {self.hidden}")


AS_SHIPPED = Settings()
"""The settings of the embedded policy."""


def sample_batches(
    tokenizer: Qwen2Tokenizer, seed: int, batch_size: int, exits: int, skip: int = 0
) -> Iterator[dict[str, torch.Tensor]]:
    """Endless batches: right-padded ``ids`` (B, T), ``labels``, ``ends`` (B, exits), ``answers``.

    Rows of similar length share a batch. ``ends`` are indices of the last trunk token that a branch
    sees. They range from the prompt's last token (before any reasoning) to the closing
    ``<|im_end|>``, so training covers every prefix that a rollout can contain.
    """
    rng = random.Random(f"pretrain/{seed}")
    problems = stories("train", seed=seed + 1)
    answers = {str(n): tokenizer.encode(f" {n}")[0] for n in range(MAX_VALUE + 1)}
    emitted = 0
    while True:
        rows: list[_Row] = []
        for problem in itertools.islice(problems, 8 * batch_size):
            prompt = tokenizer.encode(render_prompt(tokenizer, problem))
            chain = "".join(s.text for s in chain_of_thought(problem, rng))
            completion = tokenizer.encode(chain + tokenizer.eos_token)
            rows.append((prompt, completion, answers[problem.answer]))
        rows.sort(key=lambda row: len(row[0]) + len(row[1]))
        batches = [rows[i : i + batch_size] for i in range(0, len(rows), batch_size)]
        rng.shuffle(batches)
        for batch in batches:
            cuts = []
            for prompt, completion, _ in batch:
                first, last = len(prompt) - 1, len(prompt) + len(completion) - 1
                cuts.append(sorted(rng.randint(first, last) for _ in range(exits)))
            emitted += 1
            if emitted > skip:
                yield _collate(batch, cuts, tokenizer.pad_token_id)


def _collate(batch: list[_Row], cuts: list[list[int]], pad: int) -> dict[str, torch.Tensor]:
    width = max(len(p) + len(c) for p, c, _ in batch)
    ids = torch.full((len(batch), width), pad)
    labels = torch.full((len(batch), width), -100)
    for i, (prompt, completion, _) in enumerate(batch):
        ids[i, : len(prompt) + len(completion)] = torch.tensor(prompt + completion)
        labels[i, len(prompt) : len(prompt) + len(completion)] = torch.tensor(completion)
    answers = torch.tensor([a for _, _, a in batch])
    ends = torch.tensor(cuts, dtype=torch.long)
    return {"ids": ids, "labels": labels, "ends": ends, "answers": answers}


def losses(
    model: Any, batch: dict[str, torch.Tensor], postfix: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cross-entropy of the completion and of the early exits (both nats per target, fp32).

    ``batch`` is from :func:`sample_batches`; ``postfix`` has shape (K,), token ids. If the batch
    has no exits, the second loss is 0, and the policy learns from whole chains only.
    """
    ids, ends = batch["ids"], batch["ends"]
    # No mask is needed: with right padding and a causal mask real tokens never see padding.
    read = model(ids, use_cache=True)
    lm = torch.nn.functional.cross_entropy(
        read.logits[:, :-1].flatten(0, 1).float(), batch["labels"][:, 1:].flatten()
    )
    if not ends.shape[1]:
        return lm, torch.zeros(())
    mask = torch.ones_like(ids, dtype=torch.bool)
    trunk = Trunk(read.past_key_values, mask, torch.arange(ids.shape[1]).expand_as(ids))
    return lm, exit_loss(model, trunk, ends, postfix, batch["answers"])


def build_optimizers(model: Qwen2ForCausalLM, lr: float) -> dict[str, torch.optim.Optimizer]:
    """Muon for the matrices inside the layers, AdamW for embeddings, norms and biases.

    Muon reached AdamW's loss in two thirds of the steps here (figures/recipe_search.md).
    """
    matrices: list[torch.nn.Parameter] = []
    rest: list[torch.nn.Parameter] = []
    for name, parameter in model.named_parameters():
        inner = parameter.ndim == 2 and "layers" in name
        (matrices if inner else rest).append(parameter)
    muon_lr = 10 * lr  # Muon's steps have spectral norm 1, those of AdamW have entries near 1
    return {
        "adamw": torch.optim.AdamW(
            [{"params": rest, "peak": lr}], lr=lr, betas=(0.9, 0.98), weight_decay=0.0
        ),
        "muon": torch.optim.Muon(
            [{"params": matrices, "peak": muon_lr}], lr=muon_lr, weight_decay=0.01
        ),
    }


def schedule(step: int, steps: int, warmup: int = 100) -> float:
    """Share of the peak learning rate: linear warm-up, then a cosine down to a fiftieth."""
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress))


class _Log:
    """A log with a line per 50 steps: means of both losses since the last line, speed, and time."""

    def __init__(self, path: Path, minutes_before: float) -> None:
        self.path, self.minutes_before = path, minutes_before
        self.began, self.seen, self.totals = time.perf_counter(), 0, torch.zeros(2)
        self.steps = 0  # since the last line, which a resume may have shortened

    def minutes(self) -> float:
        """Minutes of training, including those before a kill."""
        return self.minutes_before + (time.perf_counter() - self.began) / 60

    def add(self, lm: torch.Tensor, early: torch.Tensor, tokens: int) -> None:
        """Count a step."""
        self.seen += tokens
        self.totals += torch.stack([lm.detach(), early.detach()])
        self.steps += 1

    def write(self, step: int, learning_rate: float) -> list[float]:
        """Write the line of a step (counted from 0) and return the mean losses."""
        minutes, elapsed = self.minutes(), time.perf_counter() - self.began
        mean = (self.totals / self.steps).tolist()
        row = {
            "step": step + 1,
            "lm_loss": round(mean[0], 4),
            "exit_loss": round(mean[1], 4),
            "learning_rate": learning_rate,
            "tokens_per_second": round(self.seen / elapsed),
            "minutes": round(minutes, 2),
        }
        with self.path.open("a", encoding="utf-8", newline="\n") as file:
            file.write(json.dumps(row) + "\n")
        self.totals.zero_()
        self.steps = 0
        return mean


def _resume(
    checkpoint: Path, log: Path, model: Any, optimizers: dict[str, torch.optim.Optimizer]
) -> tuple[int, float]:
    """Restore a checkpoint; return its steps and minutes. The log is cut to the same step."""
    if not checkpoint.exists():
        log.unlink(missing_ok=True)
        return 0, 0.0
    state = torch.load(checkpoint, weights_only=True)
    model.load_state_dict(state["model"])
    for name, optimizer in optimizers.items():
        optimizer.load_state_dict(state[name])
    trim_log(log, state["step"])
    return state["step"], state["minutes"]


def _save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    temporary = path.with_suffix(".tmp")
    torch.save(state, temporary)
    rename(temporary, path)


def pretrain(out: str | Path, settings: Settings = AS_SHIPPED) -> Path:
    """Train the embedded policy and save it with its tokenizer to ``out`` (transformers format).

    Checkpoints go to ``out/checkpoint.pt`` (written under a temporary name and renamed). A killed
    run continues when it is started again with the same arguments. The log,
    ``out/pretrain_log.jsonl``, has a line per 50 steps with both losses (nats), learning rate,
    tokens per second and minutes.
    """
    torch.set_num_threads(settings.threads)
    out, steps = Path(out), settings.steps
    out.mkdir(parents=True, exist_ok=True)
    told = dataclasses.asdict(settings)
    del told["threads"], told["checkpoint_every"]  # these change no number
    same_settings(out / "settings.json", "pretraining", told)
    tokenizer = build_tokenizer()
    model = build_model(tokenizer, settings.seed, settings.hidden, settings.layers)
    optimizers = build_optimizers(model, settings.lr)
    postfix = torch.tensor(tokenizer.encode(POSTFIX))
    checkpoint, log_file = out / "checkpoint.pt", out / "pretrain_log.jsonl"
    start, minutes = _resume(checkpoint, log_file, model, optimizers)
    batches = sample_batches(
        tokenizer, settings.seed, settings.batch_size, settings.exits, skip=start
    )
    bar = tqdm(range(start, steps), initial=start, total=steps, unit="step", desc="pretrain")
    log = _Log(log_file, minutes)
    for step in bar:
        batch, share = next(batches), schedule(step, steps)
        for optimizer in optimizers.values():
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * share
        lm, early = losses(model, batch, postfix)
        model.zero_grad()
        (lm + settings.exit_weight * early).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers.values():
            optimizer.step()
        log.add(lm, early, batch["ids"].numel())
        if (step + 1) % 50 == 0 or step + 1 == steps:
            mean = log.write(step, settings.lr * share)
            bar.set_postfix(lm=f"{mean[0]:.3f}", exit=f"{mean[1]:.3f}")
        if (step + 1) % settings.checkpoint_every == 0:
            state = {"model": model.state_dict(), "step": step + 1, "minutes": log.minutes()}
            state |= {name: optimizer.state_dict() for name, optimizer in optimizers.items()}
            _save_checkpoint(checkpoint, state)
    model.eval().save_pretrained(out)
    tokenizer.save_pretrained(out)
    checkpoint.unlink(missing_ok=True)
    (out / "settings.json").unlink()
    return out


def calibrated(out: str | Path, steps: int = 700, threads: int = 2) -> Path:
    """Calibrate the embedded policy and save it, merged and in bf16, to ``out``.

    ``calibration.calibrate`` trains an adapter of rank 64 on stories of the train stream. The log,
    ``out/calibrate_log.jsonl``, has one line per 50 steps with the means of both losses in nats.
    """
    torch.set_num_threads(threads)
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    policy = load_policy(EMBEDDED, lora_rank=64)
    history = calibrate(policy, stories("train", seed=11), steps=steps)
    with (out / "calibrate_log.jsonl").open("w", encoding="utf-8", newline="\n") as log:
        for i in range(0, steps, 50):
            part = history[i : i + 50]
            means = {k: round(sum(x[k] for x in part) / len(part), 5) for k in part[0]}
            log.write(json.dumps({"step": i + len(part)} | means) + "\n")
    policy.merged("cpu").bfloat16().save_pretrained(out)
    policy.tokenizer.save_pretrained(out)
    return out


def main(argv: list[str] | None = None) -> None:
    """Run the command line; exit status 2 for a value out of range."""
    print_any_text()
    parser = Parser(
        prog="pretrain", description=__doc__.split("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )  # fmt: skip
    default = AS_SHIPPED
    parser.add_argument("--out", default="runs/pretrain", help="folder for the policy and its log")
    parser.add_argument("--steps", type=whole, default=default.steps, help="optimiser steps")
    parser.add_argument(
        "--batch-size", type=whole, default=default.batch_size, help="stories per step"
    )
    parser.add_argument(
        "--exits", type=whole, default=default.exits, help="early exits per story; 0 for none"
    )
    parser.add_argument(
        "--exit-weight", type=number, default=default.exit_weight, help="weight of the exit loss"
    )
    parser.add_argument("--lr", type=number, default=default.lr, help="peak learning rate")
    parser.add_argument(
        "--hidden", type=whole, default=default.hidden, help="hidden size (multiple of 32)"
    )
    parser.add_argument("--layers", type=whole, default=default.layers, help="decoder layers")
    parser.add_argument("--seed", type=whole, default=default.seed)
    parser.add_argument("--threads", type=whole, default=default.threads, help="CPU threads")
    parser.add_argument(
        "--report-only", action="store_true", help="judge the policy in --out without training"
    )
    parser.add_argument(
        "--calibrate",
        action="store_true",
        help="calibrate the embedded policy (700 steps) and save the result; no pretraining",
    )
    parser.add_argument("--figures", default="figures", help="folder of the report")
    with in_one_sentence("pretrain"):
        _run(parser.parse_args(argv))


def _run(args: argparse.Namespace) -> None:
    names = [field.name for field in dataclasses.fields(Settings) if hasattr(args, field.name)]
    settings = Settings(**{name: getattr(args, name) for name in names})
    writable_folder(Path(args.figures), "figures")
    if args.report_only:
        model_source(args.out)
    else:
        writable_folder(Path(args.out), "out")
    if args.calibrate:
        calibrated(args.out, threads=settings.threads)
        return
    if not args.report_only:
        pretrain(args.out, settings)
    torch.set_num_threads(settings.threads)
    print(json.dumps(assess(args.out, args.figures), indent=1))


if __name__ == "__main__":
    main()
