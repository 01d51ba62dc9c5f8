"""Compare the time of a GRPO step here and in TRL, and the values of both losses.

    python benchmarks/trl.py                  # a few minutes; embedded policy, CPU, one thread
    python benchmarks/trl.py --check          # judge the committed ratio without measuring

Both train a LoRA adapter of rank 16 with a KL term, on the same prompts, with the same number of
completions, the same length limit and one update per step. Steps of TRL and of ours alternate, so a
busy machine slows both equally, and medians are compared. Our time is that of a whole call of
``train`` for one step, including run folder, metrics and saved adapter. TRL's time is that between
its step callbacks.

Writes figures/results/trl.json.
"""

from __future__ import annotations

import argparse
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

from iapo_mini.callbacks import Callback
from iapo_mini.config import TrainConfig
from iapo_mini.engines.trl import answer_reward, dataset
from iapo_mini.files import versions, write_json
from iapo_mini.logprobs import token_logprobs
from iapo_mini.objective import policy_loss
from iapo_mini.policies import EMBEDDED
from iapo_mini.policy import load_policy
from iapo_mini.problems.stories import stories
from iapo_mini.rollouts import Rollouts
from iapo_mini.trainer import train

RESULTS = Path(__file__).parent.parent / "figures" / "results" / "trl.json"
LIMITS = {"our_step_over_trl_step": 0.5, "max_loss_difference": 1e-5}
LOSSES = {"grpo": "sequence", "bnpo": "token", "dapo": "token"}
"""TRL's loss types that exist here as well -> our aggregation."""


def trl_trainer(folder: str, policy, problems, group: int, prompts: int, limit: int, **settings):
    """TRL's trainer with our policy, for one update after each batch of completions."""
    steps = len(problems) // prompts
    config = GRPOConfig(
        folder, use_cpu=True, bf16=False, report_to=[], save_strategy="no", disable_tqdm=True,
        gradient_checkpointing=False, dataloader_pin_memory=False, shuffle_dataset=False,
        logging_steps=1000, per_device_train_batch_size=prompts * group, num_generations=group,
        max_completion_length=limit, max_steps=steps, adam_beta2=0.99, weight_decay=0.0,
        **{"loss_type": "grpo", "beta": 0.001, "learning_rate": 7e-4, **settings},
    )  # fmt: skip
    return GRPOTrainer(
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
) -> dict:
    """Seconds of each step after an untimed first step, and mean tokens per completion."""
    told = stories("train", seed=0)
    batches = [list(itertools.islice(told, prompts)) for _ in range(repeats + 1)]
    policy, lengths = load_policy(model, lora_rank=16), []

    def ours(step: int) -> None:
        config = TrainConfig(
            method="grpo", max_steps=1, prompts_per_step=prompts, num_generations=group,
            max_completion_length=limit, warmup_steps=0, threads=torch.get_num_threads(),
            seed=step, learning_rate=learning_rate,
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


def main() -> None:
    """Measure, write and judge the results."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--repeats", type=int, default=7, help="timed steps of each (%(default)s)")
    parser.add_argument("--prompts", type=int, default=8, help="prompts per step (%(default)s)")
    parser.add_argument("--group", type=int, default=8, help="completions per prompt (%(default)s)")
    parser.add_argument("--limit", type=int, default=224, help="length limit, tokens (%(default)s)")
    parser.add_argument("--out", type=Path, default=RESULTS, help="results (%(default)s)")
    parser.add_argument("--check", action="store_true", help="judge the committed results only")
    options = parser.parse_args()
    if options.check:
        results = json.loads(options.out.read_text(encoding="utf-8"))
    else:
        torch.set_num_threads(1)
        sizes = (options.prompts, options.group, options.limit)
        timed = step_seconds(options.repeats, *sizes)
        median = {name: statistics.median(values) for name, values in timed["seconds"].items()}
        results = {
            "our_step_over_trl_step": median["ours"] / median["trl"],
            "max_loss_difference": loss_difference(2, 4, options.limit),
            "median_seconds": median,
            **timed,
            "settings": dict(zip(("prompts", "num_generations", "max_completion_length"), sizes))
            | {"threads": 1, "lora_rank": 16, "kl_coef": 0.001, "loss_type": "grpo"},
            "versions": versions() | {"trl": version("trl"), "accelerate": version("accelerate")},
        }
        write_json(options.out, results)
        print(json.dumps(results, indent=1))
    beyond = [name for name, limit in LIMITS.items() if not results[name] <= limit]
    for name in beyond:
        print(f"{name} must be at most {LIMITS[name]:g}, got {results[name]:.3g}")
    sys.exit(bool(beyond))


if __name__ == "__main__":
    main()
