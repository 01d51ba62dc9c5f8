"""Measure how fast a real model is trained here, as ratios of times of one run.

    python benchmarks/real_speed.py MODEL         # a folder or a hub id; LoRA of rank 16, fp32, CPU
    python benchmarks/real_speed.py MODEL --tiny  # a few tokens, to see that it runs
    python benchmarks/real_speed.py --check       # judge the committed ratios without measuring

Everything is timed in turns, so a busy machine slows all rivals equally, and medians over the turns
are compared:

* ``our_step_over_trl_step``: one GRPO step here and in TRL, as benchmarks/trl.py measures it for
  the embedded policy;
* ``sampling_over_generate``: seconds per token of our sampler and of transformers' ``generate``,
  for the same policy with an adapter, at batch 32. Our sampler merges the adapter into a copy of
  the weights first, and this is part of its time; ``sampling_over_generate_merged`` compares it
  with ``generate`` on such a copy;
* ``sentence_estimator_over_forward``: answer entropies at the ends of sentences, over one padded
  forward pass over prompts and completions without vocabulary head, in blocks of four rows;
* ``iapo_sentence_step_over_grpo_step``: a training step of IAPO that asks at the ends of sentences,
  over a step of GRPO.

``phases`` holds the seconds of the parts of both training steps, which tells what binds. Writes
figures/results/real_speed.json, with the name of the processor.

On two cores without AVX512, SmolLM2-135M needs about eight minutes a turn, and one turn more.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import json
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import torch

from iapo_mini.callbacks import Callback
from iapo_mini.config import TrainConfig
from iapo_mini.early_exit.question import EarlyExit
from iapo_mini.files import versions, write_json
from iapo_mini.information import answer_entropies
from iapo_mini.policy import Policy, load_policy
from iapo_mini.problems.stories import stories
from iapo_mini.rollouts import Rollouts
from iapo_mini.sampling import encode_prompts, sample
from iapo_mini.tasks import Problem
from iapo_mini.trainer import train

RESULTS = Path(__file__).parent.parent / "figures" / "results" / "real_speed.json"
LIMITS = {
    "our_step_over_trl_step": 0.7, "sampling_over_generate": 0.6,
    "sentence_estimator_over_forward": 0.5, "iapo_sentence_step_over_grpo_step": 1.1,
}  # fmt: skip
ROWS = 8
"""Completions per forward and backward pass; TRL's step of all 32 at once needs over 22 GB."""
STEPS = {
    "grpo": {"method": "grpo"},
    "iapo_sentence": {"method": "iapo", "estimator_stride": "sentence"},
}


def processor() -> str:
    """Name of the processor."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return (named or [platform.processor() or platform.machine()])[0]


def medians(rivals: dict[str, Callable[[int], float]], repeats: int) -> dict[str, float]:
    """Median seconds per unit of each rival over the turns after a first, untimed one.

    A rival gets the number of the turn and returns its number of units.
    """
    seconds: dict[str, list[float]] = {name: [] for name in rivals}
    for turn, (name, run) in itertools.product(range(-1, repeats), rivals.items()):
        began = time.perf_counter()
        units = run(max(turn, 0))
        if turn >= 0:
            seconds[name].append((time.perf_counter() - began) / units)
    return {name: statistics.median(values) for name, values in seconds.items()}


def generated(policy: Policy, model, problems: list[Problem], group: int, limit: int) -> int:
    """Sample with transformers' generate; return the number of tokens up to each row's end."""
    ids, mask = (x.repeat_interleave(group, 0) for x in encode_prompts(policy, problems))
    out = model.generate(
        ids, attention_mask=mask, do_sample=True, temperature=1.0, top_k=0, top_p=1.0,
        max_new_tokens=limit, eos_token_id=policy.eos_ids.tolist(),
        pad_token_id=policy.tokenizer.pad_token_id,
    )[:, ids.shape[1] :]  # fmt: skip
    before = torch.isin(out, policy.eos_ids).long().cumsum(1) == 0
    return int((before.sum(1) + 1).clamp(max=out.shape[1]).sum())


def sampling_seconds(
    policy: Policy, problems: list[Problem], group: int, limit: int, repeats: int
) -> dict[str, float]:
    """Median seconds per token of our sampler and of generate, with an adapter and merged."""

    def ours(turn: int) -> int:
        rollouts = sample(
            policy, problems, num_generations=group, max_completion_length=limit, seed=turn
        )
        return int(rollouts.completion_mask.sum())

    def theirs(merged: bool) -> Callable[[int], int]:
        def run(turn: int) -> int:
            torch.manual_seed(turn)
            model = policy.for_inference() if merged else policy.model.eval()
            return generated(policy, model, problems, group, limit)

        return run

    rivals = {"ours": ours, "generate": theirs(False), "generate_merged": theirs(True)}
    return medians(rivals, repeats)


@torch.no_grad()
def padded_forward(policy: Policy, rollouts: Rollouts, rows: int = 4) -> None:
    """One causal pass over prompts and completions with their padding, without vocabulary head."""
    decoder = policy.for_inference().get_decoder()
    ids = torch.cat([rollouts.prompt_ids, rollouts.completion_ids], dim=1)
    mask = torch.cat([rollouts.prompt_mask, rollouts.completion_mask], dim=1)
    for block, real in zip(ids.split(rows), mask.split(rows)):
        decoder(block, attention_mask=real, use_cache=False)


def estimator_seconds(
    policy: Policy, problems: list[Problem], group: int, limit: int, repeats: int
) -> dict[str, float]:
    """Median seconds of answer entropies at sentence ends and at every token, and of a forward."""
    rollouts = sample(
        policy, problems, num_generations=group, max_completion_length=limit, keep_cache=True
    )

    def asking(stride: int | str) -> Callable[[int], int]:
        def run(turn: int) -> int:
            answer_entropies(policy, rollouts, EarlyExit(stride=stride))
            return 1

        return run

    def forward(turn: int) -> int:
        padded_forward(policy, rollouts)
        return 1

    return medians(
        {"sentence": asking("sentence"), "every_token": asking(1), "forward": forward}, repeats
    )


def step_seconds(
    policy: Policy, problems: list[Problem], group: int, limit: int, repeats: int
) -> tuple[dict[str, float], dict[str, dict[str, float]]]:
    """Median seconds of a whole call of ``train`` for one step of each of STEPS, and of its parts.

    With such a small learning rate the policy stays the same, so all sample the same completions.
    """
    parts: dict[str, list[dict[str, float]]] = {name: [] for name in STEPS}

    def stepping(name: str) -> Callable[[int], int]:
        def on_step(line: dict) -> None:
            parts[name].append({k: v for k, v in line.items() if k.startswith("seconds_")})

        def run(turn: int) -> int:
            config = TrainConfig(
                **STEPS[name], max_steps=1, prompts_per_step=len(problems), num_generations=group,
                max_completion_length=limit, warmup_steps=0, learning_rate=1e-12, seed=turn,
                micro_batch_size=ROWS, threads=torch.get_num_threads(),
            )  # fmt: skip
            with tempfile.TemporaryDirectory() as folder:
                train(config, Path(folder) / "run", policy=policy, problems=problems,
                      progress=False, callbacks=[Callback(on_step)])  # fmt: skip
            return 1

        return run

    whole = medians({name: stepping(name) for name in STEPS}, repeats)
    phases = {
        name: {part: statistics.median(row[part] for row in rows[1:]) for part in rows[0]}
        for name, rows in parts.items()
    }
    return whole, phases


def trl_benchmark() -> ModuleType:
    """benchmarks/trl.py under another name, since its own is that of the library."""
    path = Path(__file__).with_name("trl.py")
    spec = importlib.util.spec_from_file_location("trl_benchmark", path)
    assert spec is not None and spec.loader is not None  # the file is there
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def measure(model: str, prompts: int, group: int, limit: int, repeats: int) -> dict:
    """Every ratio, and the seconds behind it."""
    problems = list(itertools.islice(stories("tune", seed=9), prompts))
    timed = trl_benchmark().step_seconds(
        repeats, prompts, group, limit, model=model, learning_rate=1e-5,
        rows=min(ROWS, prompts * group),
    )  # fmt: skip
    steps = {name: statistics.median(values) for name, values in timed["seconds"].items()}
    policy = load_policy(model, lora_rank=16)
    how = (policy, problems, group, limit, repeats)
    sampled, asked = sampling_seconds(*how), estimator_seconds(*how)
    whole, phases = step_seconds(*how)
    return {
        "model": model,
        "processor": processor(),
        "our_step_over_trl_step": steps["ours"] / steps["trl"],
        "sampling_over_generate": sampled["ours"] / sampled["generate"],
        "sampling_over_generate_merged": sampled["ours"] / sampled["generate_merged"],
        "sentence_estimator_over_forward": asked["sentence"] / asked["forward"],
        "iapo_sentence_step_over_grpo_step": whole["iapo_sentence"] / whole["grpo"],
        "median_seconds": {
            "step": steps, "sampling_per_token": sampled, "estimator": asked, "train": whole,
        },
        "phases": phases,
        "mean_length": timed["mean_length"],
        "settings": {
            "prompts": prompts, "num_generations": group, "max_completion_length": limit,
            "turns": repeats, "threads": torch.get_num_threads(), "lora_rank": 16, "rows": ROWS,
        },
        "versions": versions(),
    }  # fmt: skip


def main() -> None:
    """Measure, write and judge the ratios."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("model", nargs="?", default="", help="a folder or a hub id")
    parser.add_argument("--turns", type=int, default=5, help="timed turns (%(default)s)")
    parser.add_argument("--limit", type=int, default=64, help="length limit, tokens (%(default)s)")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (%(default)s)")
    parser.add_argument("--tiny", action="store_true", help="four completions of six tokens")
    parser.add_argument("--out", type=Path, default=RESULTS, help="results (%(default)s)")
    parser.add_argument("--check", action="store_true", help="judge the committed results only")
    options = parser.parse_args()
    if options.check:
        results = json.loads(options.out.read_text(encoding="utf-8"))
    elif not options.model:
        parser.error("name a model: a folder or a hub id")
    else:
        torch.set_num_threads(options.threads)
        sizes = (2, 2, 6, 1) if options.tiny else (4, 8, options.limit, options.turns)
        results = measure(options.model, *sizes)
        write_json(options.out, results)
        print(json.dumps(results, indent=1))
    beyond = [name for name, limit in LIMITS.items() if not results[name] <= limit]
    for name in beyond:
        print(f"{name} must be at most {LIMITS[name]:g}, got {results[name]:.3g}")
    sys.exit(bool(beyond))


if __name__ == "__main__":
    main()
