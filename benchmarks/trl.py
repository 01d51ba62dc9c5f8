"""Compare the time of a GRPO step here and in TRL, and the values of both losses.

    python benchmarks/trl.py                  # a few minutes; embedded policy, CPU, one thread
    python benchmarks/trl.py --rules          # only a row for each method on TRL's engine
    python benchmarks/trl.py --check          # judge the committed results without measuring

Both train a LoRA adapter of rank 16 with a KL term, on the same prompts, with the same number of
completions, the same length limit and one update per step. Steps of TRL and of ours alternate, so a
busy machine slows both equally, and medians are compared. Our time is that of a whole call of
``train`` for one step, including run folder, metrics and saved adapter. TRL's time is that between
its step callbacks.

With ``--rules`` every method trains a few steps on TRL's engine (IAPOTrainer). Its row has the
processor time of a step over that of TRL's own GRPO, and the largest differences from this library:
of the advantages, the loss and the gradient on one batch that TRL has sampled.

Writes figures/results/trl.json; ``--rules`` keeps the other results in it.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import statistics
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

# The folder of this file is first on the path, and this file would hide the library trl.
sys.path[:] = [p for p in sys.path if Path(p or ".").resolve() != Path(__file__).resolve().parent]

import torch
from transformers import TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from iapo_mini.advantages import ADVANTAGES, COUNTED
from iapo_mini.callbacks import Callback
from iapo_mini.config import TrainConfig
from iapo_mini.early_exit.question import EVERY_PREFIX
from iapo_mini.engines.trl import IAPOConfig, IAPOTrainer, answer_reward, dataset
from iapo_mini.files import versions, write_json
from iapo_mini.information import inform
from iapo_mini.logprobs import token_logprobs
from iapo_mini.objective import policy_loss
from iapo_mini.policies import EMBEDDED
from iapo_mini.policy import load_policy
from iapo_mini.problems.stories import stories
from iapo_mini.recipes import RECIPES
from iapo_mini.rollouts import Rollouts
from iapo_mini.trainer import train

RESULTS = Path(__file__).parent.parent / "figures" / "results" / "trl.json"
LIMITS = {"our_step_over_trl_step": 0.5, "max_loss_difference": 1e-5}
RULE_LIMIT = 1e-3
"""Largest difference between the loss of a rule here and on TRL's engine."""

LOSSES = {"grpo": "sequence", "bnpo": "token", "dapo": "token"}
"""TRL's loss types that exist here as well -> our aggregation."""


def trl_trainer(
    folder: str, policy, problems, group: int, prompts: int, limit: int, ours: bool = False,
    **settings,
):  # fmt: skip
    """A trainer with our policy, for one update after each batch: TRL's own, or ``ours`` on it."""
    steps = len(problems) // prompts
    if not ours:
        settings = {"loss_type": "grpo", "beta": 0.001, **settings}
    config = (IAPOConfig if ours else GRPOConfig)(
        folder, use_cpu=True, bf16=False, report_to=[], save_strategy="no", disable_tqdm=True,
        gradient_checkpointing=False, dataloader_pin_memory=False, shuffle_dataset=False,
        logging_steps=1000, num_generations=group, max_completion_length=limit, max_steps=steps,
        adam_beta2=0.99, weight_decay=0.0,
        **{"learning_rate": 7e-4, "per_device_train_batch_size": prompts * group, **settings},
    )  # fmt: skip
    return (IAPOTrainer if ours else GRPOTrainer)(
        policy.model, answer_reward, args=config, train_dataset=dataset(problems),
        processing_class=policy.tokenizer,
    )  # fmt: skip


class _Interleaved(TrainerCallback):
    """Times each step of TRL, and one of our steps after it."""

    def __init__(self, ours):
        self.ours, self.seconds, self.lengths = ours, {"trl": [], "ours": []}, []

    def on_step_begin(self, args, state, control, **kwargs):
        self.began = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        between = time.perf_counter()
        self.ours(state.global_step - 1)
        self.seconds["trl"].append(between - self.began)
        self.seconds["ours"].append(time.perf_counter() - between)


def step_seconds(
    repeats: int,
    prompts: int,
    group: int,
    limit: int,
    *,
    model: str = EMBEDDED,
    learning_rate: float = 7e-4,
    rows: int = 0,
) -> dict:
    """Seconds of each step after an untimed first step, and mean tokens per completion.

    With ``rows`` both train so many completions at a time, and then make one update.
    """
    ours_by, theirs_by = {}, {}
    if rows:
        ours_by = {"micro_batch_size": rows}
        theirs_by = {"per_device_train_batch_size": rows,
                     "gradient_accumulation_steps": prompts * group // rows}  # fmt: skip
    told = stories("train", seed=0)
    batches = [list(itertools.islice(told, prompts)) for _ in range(repeats + 1)]
    policy, lengths = load_policy(model, lora_rank=16), []

    def ours(step: int) -> None:
        config = TrainConfig(
            method="grpo", max_steps=1, prompts_per_step=prompts, num_generations=group,
            max_completion_length=limit, warmup_steps=0, threads=torch.get_num_threads(),
            seed=step, learning_rate=learning_rate, **ours_by,
        )  # fmt: skip
        with tempfile.TemporaryDirectory() as folder:
            train(config, Path(folder) / "run", policy=policy, problems=batches[step],
                  progress=False,
                  callbacks=[Callback(lambda line: lengths.append(line["length"]))])  # fmt: skip

    clock = _Interleaved(ours)
    with tempfile.TemporaryDirectory() as folder:
        trainer = trl_trainer(
            folder,
            load_policy(model, lora_rank=16),
            list(itertools.chain(*batches)),
            group,
            prompts,
            limit,
            learning_rate=learning_rate,
            **theirs_by,
        )
        trainer.add_callback(clock)
        trainer.train()
        theirs = trainer.state.log_history[-1]["completions/mean_length"]
    return {
        "seconds": {name: values[1:] for name, values in clock.seconds.items()},
        "mean_length": {"trl": theirs, "ours": statistics.fmean(lengths)},
    }


def loss_difference(prompts: int, group: int, limit: int) -> float:
    """Largest difference between our loss and TRL's on the same completions, over shared types.

    Log-probabilities of the old and the reference policy are shifted, so some ratios are clipped
    and the KL term is not 0. Advantages are random for each token.
    """
    worst, problems = 0.0, list(itertools.islice(stories("tune"), prompts))
    for loss_type, aggregation in LOSSES.items():
        policy = load_policy(lora_rank=0)
        with tempfile.TemporaryDirectory() as folder:
            trainer = trl_trainer(
                folder, policy, problems, group, prompts, limit,
                loss_type=loss_type, beta=0.1, use_bias_correction_kl=False,
            )  # fmt: skip
            trainer.model.train()
            trainer.current_gradient_accumulation_steps = 1
            rows = [row for row in trainer.train_dataset for _ in range(group)]
            batch = trainer._generate_and_score_completions(rows)
        masks = batch["prompt_mask"].bool(), batch["completion_mask"].bool()
        rollouts = Rollouts(
            batch["prompt_ids"], masks[0], batch["completion_ids"], masks[1],
            torch.zeros(masks[1].shape), group, masks[1].any(1),
        )  # fmt: skip
        generator = torch.Generator().manual_seed(0)
        shifts = [torch.randn(masks[1].shape, generator=generator) for _ in range(3)]
        with torch.no_grad():
            logprobs, _ = token_logprobs(policy.model, rollouts)
            old, reference = logprobs + 0.3 * shifts[0], logprobs + 0.3 * shifts[1]
            batch |= {
                "advantages": shifts[2], "old_per_token_logps": old,
                "ref_per_token_logps": reference,
            }  # fmt: skip
            theirs = float(trainer._compute_loss(trainer.model, batch))
            ours, _ = policy_loss(
                logprobs, old, shifts[2], masks[1], ref_logprobs=reference, kl_coef=0.1,
                aggregation=aggregation,
            )  # fmt: skip
        worst = max(worst, abs(float(ours) - theirs))
    return worst


class _Clock(TrainerCallback):
    """Processor time of every step, which other programs on the machine hardly change."""

    def __init__(self):
        self.seconds = []

    def on_step_begin(self, args, state, control, **kwargs):
        self.began = time.process_time()

    def on_step_end(self, args, state, control, **kwargs):
        self.seconds.append(time.process_time() - self.began)


def rule_row(method: str | None, repeats: int, prompts: int, group: int, limit: int) -> dict:
    """A method's steps on TRL's engine after an untimed one, and its differences from our own code.

    Args:
        method: a key of ``RECIPES``; None for TRL's own GRPO, which has no differences.
        repeats: number of timed steps.
        prompts, group, limit: prompts per step, completions per prompt, length limit in tokens.
    """
    problems = list(itertools.islice(stories("train", seed=0), prompts * (repeats + 1)))
    policy, clock = load_policy(lora_rank=16), _Clock()
    own = {} if method is None else {"ours": True, "iapo_method": method}
    with tempfile.TemporaryDirectory() as folder:
        trainer = trl_trainer(folder, policy, problems, group, prompts, limit, **own)
        found = {} if method is None else differences(trainer, policy, problems[:prompts], limit)
        trainer.add_callback(clock)
        trainer.train()
        length = trainer.state.log_history[-1]["completions/mean_length"]
    return {**found, "seconds": clock.seconds[1:], "mean_length": length}


def differences(trainer: IAPOTrainer, policy, problems, limit: int) -> dict[str, float]:
    """Largest differences of advantages, loss and gradient from the library, on a batch of TRL."""
    group, recipe = trainer.num_generations, RECIPES[trainer.args.iapo_method]
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1
    batch = trainer._generate_and_score_completions(
        [row for row in dataset(problems) for _ in range(group)]
    )
    rewards, mask = trainer._rewards[:, 0], batch["completion_mask"].bool()
    last = batch["completion_ids"].gather(1, mask.sum(1, keepdim=True) - 1)[:, 0]
    rollouts = Rollouts(
        batch["prompt_ids"], batch["prompt_mask"].bool(), batch["completion_ids"], mask,
        torch.zeros(mask.shape), group, torch.isin(last, policy.eos_ids),
        known={"rewards": rewards, "correct": rewards > 0}, limit=limit,
        references=tuple(problem.answer for problem in problems for _ in range(group)),
    )  # fmt: skip
    policy.model.eval()
    with torch.no_grad():
        old, entropies = token_logprobs(policy.model, rollouts)
    rollouts = dataclasses.replace(rollouts, old_logprobs=old).filled(token_entropies=entropies)
    if recipe.information is not None:
        rollouts = inform(policy, rollouts, recipe.information, EVERY_PREFIX)
    advantages = ADVANTAGES[recipe.rule](rollouts, recipe.alpha, recipe.beta)
    counted = mask if recipe.counted is None else COUNTED[recipe.counted](rollouts, recipe.alpha)
    trainer.model.train()
    theirs = trainer._compute_loss(trainer.model, batch)
    gradient = _gradient(policy, theirs)
    reference = None
    if recipe.kl_coef:
        with torch.no_grad(), policy.reference() as start:
            reference, _ = token_logprobs(start, rollouts)
    logprobs, _ = token_logprobs(policy.model, rollouts)
    loss, _ = policy_loss(
        logprobs, logprobs.detach(), advantages, counted, ref_logprobs=reference,
        kl_coef=recipe.kl_coef, epsilon=recipe.epsilon, epsilon_high=recipe.epsilon_high,
        aggregation=recipe.aggregation,
    )  # fmt: skip
    own = _gradient(policy, loss)
    return {
        "advantage_difference": float((batch["advantages"] - advantages).abs().max()),
        "loss_difference": abs(float(loss.detach() - theirs.detach())),
        "gradient_difference": float(
            (own - gradient).abs().max() / own.abs().max().clamp(min=1e-6)
        ),
    }


def _gradient(policy, loss: torch.Tensor) -> torch.Tensor:
    """The gradient of a loss as one vector; the weights keep none."""
    grads = torch.autograd.grad(loss, list(policy.trainable().values()), allow_unused=True)
    return torch.cat([g.flatten() for g in grads if g is not None])


def rules_table(rules: dict[str, dict]) -> str:
    """Markdown table of the rows: method -> its row; ``"trl"`` is TRL's own GRPO."""
    base = statistics.median(rules["trl"]["seconds"])
    lines = [
        "| method | time of a step, TRL's GRPO = 1 | advantages | loss | gradient |",
        "|---|---|---|---|---|",
    ]
    for name, row in rules.items():
        if name != "trl":
            parts = [row[f"{x}_difference"] for x in ("advantage", "loss", "gradient")]
            times = statistics.median(row["seconds"]) / base
            cells = " | ".join(f"{x:.0e}" for x in parts)
            lines.append(f"| {RECIPES[name].label} | {times:.2f} | {cells} |")
    return "\n".join(lines)


def main() -> None:
    """Measure, write and judge the results."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--repeats", type=int, default=7, help="timed steps of each (%(default)s)")
    parser.add_argument("--prompts", type=int, default=8, help="prompts per step (%(default)s)")
    parser.add_argument("--group", type=int, default=8, help="completions per prompt (%(default)s)")
    parser.add_argument("--limit", type=int, default=224, help="length limit, tokens (%(default)s)")
    parser.add_argument("--out", type=Path, default=RESULTS, help="results (%(default)s)")
    parser.add_argument("--check", action="store_true", help="judge the committed results only")
    parser.add_argument("--rules", action="store_true", help="measure the methods on TRL only")
    parser.add_argument("--methods", nargs="+", default=list(RECIPES), choices=list(RECIPES),
                        metavar="METHOD", help="methods of --rules (all)")  # fmt: skip
    options = parser.parse_args()
    torch.set_num_threads(1)
    sizes = (options.prompts, options.group, options.limit)
    before = json.loads(options.out.read_text(encoding="utf-8")) if options.out.is_file() else {}
    if options.check and not before:
        parser.error(f"out is '{options.out}', where there are no results to check")
    if options.check:
        results = before
    elif options.rules:
        rows = {name: rule_row(name, options.repeats, *sizes) for name in options.methods}
        rules = {"trl": rule_row(None, options.repeats, *sizes), **rows}
        results = {**before, "rules": rules}
        write_json(options.out, results)
        print(rules_table(rules))
    else:
        timed = step_seconds(options.repeats, *sizes)
        median = {name: statistics.median(values) for name, values in timed["seconds"].items()}
        results = {
            "our_step_over_trl_step": median["ours"] / median["trl"],
            "max_loss_difference": loss_difference(2, 4, options.limit),
            "median_seconds": median,
            **timed,
            **{name: before[name] for name in ("rules",) if name in before},
            "settings": dict(zip(("prompts", "num_generations", "max_completion_length"), sizes))
            | {"threads": 1, "lora_rank": 16, "kl_coef": 0.001, "loss_type": "grpo"},
            "versions": versions() | {"trl": version("trl"), "accelerate": version("accelerate")},
        }
        write_json(options.out, results)
        print(json.dumps(results, indent=1))
    judged = {name: (results[name], most) for name, most in LIMITS.items() if name in results}
    judged |= {
        f"loss_difference of {name}": (row["loss_difference"], RULE_LIMIT)
        for name, row in results.get("rules", {}).items()
        if name != "trl"
    }
    beyond = {name: found for name, found in judged.items() if not found[0] <= found[1]}
    for name, (value, most) in beyond.items():
        print(f"{name} must be at most {most:g}, got {value:.3g}")
    sys.exit(bool(beyond))


if __name__ == "__main__":
    main()
