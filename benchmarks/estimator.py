"""Measure speed and exactness of the estimator, as ratios from one run.

    python benchmarks/estimator.py            # everything, about 20 minutes
    python benchmarks/estimator.py tiny       # one part: exact, tiny, qwen05b or growth
    python benchmarks/estimator.py --check    # judge the committed ratios without measuring

Repeats of all ways are interleaved and medians are compared, so a busy machine slows all of them
equally. Seconds are written for the reader, but only ratios are judged. Writes
figures/results/estimator.json.

``packed`` is measured as in a training step, with the keys and values that sampling has kept.
``packed_alone`` includes its own pass over prompt and completion. The Qwen shape is in bf16.
``steps`` are whole training steps: seconds of each phase, and the ratio to the time of GRPO with a
95% interval.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import statistics
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from transformers import DynamicCache, Qwen2ForCausalLM

from iapo_mini.callbacks import Callback
from iapo_mini.config import TrainConfig
from iapo_mini.early_exit.question import EarlyExit
from iapo_mini.early_exit.reading import logits_entropy
from iapo_mini.files import versions, write_json
from iapo_mini.information import answer_entropies, encode_postfix
from iapo_mini.intervals import bootstrap_interval
from iapo_mini.logprobs import trunk_blocks
from iapo_mini.policy import Policy, load_policy
from iapo_mini.problems.stories import stories
from iapo_mini.rollouts import Rollouts
from iapo_mini.sampling import sample
from iapo_mini.tasks import POSTFIX
from iapo_mini.tools.planner import config_of
from iapo_mini.trainer import train

RESULTS = Path(__file__).parent.parent / "figures" / "results" / "estimator.json"
LIMITS = {
    "tiny": {
        "packed_over_cached_time": 0.2,
        "packed_over_cached_memory": 0.1,
        "packed_over_forward_time": 1.0,
        "iapo_step_over_grpo_step": 1.15,
    },
    "qwen05b": {
        "packed_over_cached_time": 0.5,
        "packed_over_cached_memory": 0.1,
        "packed_over_forward_time": 1.1,
    },
}
"""Largest ratios that ``--check`` allows."""

# A postfix of five tokens in the embedded tokenizer, as many as the paper's postfix has in Qwen's.
FIVE_TOKENS = " 1 2 3 4 5"


@torch.no_grad()
def authors_way(policy: Policy, rollouts: Rollouts, postfix: str, chunk: int = 16) -> torch.Tensor:
    """KV-cache preloading as in the released code, with its position and mask bugs fixed.

    The whole batch is run at once, padded to the longest row. The cache is copied for each of
    ``chunk`` positions. The vocabulary head runs at every position of the postfix, although only
    the last one is used.
    """
    model, ids = policy.for_inference(), encode_postfix(policy, postfix)
    (rows, length), width, k = rollouts.completion_ids.shape, rollouts.prompt_ids.shape[1], len(ids)
    out = torch.zeros(rows, length + 1)
    (trunk,) = trunk_blocks(model, rollouts, rows)
    back = trunk.rows.argsort()
    mask, layers = trunk.mask[back], trunk.cache.layers
    for t in torch.arange(length + 1).split(chunk):
        longest = width + int(t[-1])
        cache = DynamicCache(
            [
                [x[back, :, :longest].repeat_interleave(len(t), 0) for x in (y.keys, y.values)]
                for y in layers
            ]
        )
        seen = mask[:, None, :longest] & (torch.arange(longest) < width + t[:, None])
        own = torch.ones(k, k, dtype=torch.bool).tril().expand(rows * len(t), k, k)
        start = seen.sum(-1).flatten()
        logits = model(
            ids.expand(rows * len(t), k),
            attention_mask=torch.cat(
                [seen.flatten(0, 1)[:, None].expand(-1, k, -1), own], dim=2
            )[:, None],
            position_ids=start[:, None] + torch.arange(k),
            past_key_values=cache,
        ).logits  # fmt: skip
        out[:, t] = logits_entropy(logits[:, -1]).view(rows, len(t))
    return out * (torch.arange(length + 1) <= rollouts.lengths[:, None])


@torch.no_grad()
def padded_forward(policy: Policy, rollouts: Rollouts, postfix: str, rows: int = 4) -> None:
    """One plain causal forward pass over P + L + (L + 1) K tokens per row, with needed logits only.

    It runs in blocks of ``rows`` rows, which is faster on a CPU than one large batch.
    """
    model, k = policy.for_inference(), len(encode_postfix(policy, postfix))
    length, width = rollouts.completion_ids.shape[1], rollouts.prompt_ids.shape[1]
    ids = torch.cat([rollouts.prompt_ids, rollouts.completion_ids], dim=1)
    ids = torch.cat([ids, ids.new_ones(len(ids), (length + 1) * k)], dim=1)
    for block in ids.split(rows):
        hidden = model.model(block, use_cache=False).last_hidden_state
        wanted = hidden[:, width + length + k - 1 :: k].flatten(0, 1)
        for part in wanted.split(max(64, 2**19 // model.config.vocab_size)):
            logits_entropy(model.lm_head(part))


def embedded_rollouts(completions: int = 64) -> tuple[Policy, Rollouts]:
    """The embedded policy and its completions of tune stories, with keys and values kept."""
    policy = load_policy(lora_rank=0)
    problems = list(itertools.islice(stories("tune", seed=9), completions // 8))
    return policy, sample(policy, problems, num_generations=8, seed=0, keep_cache=True)


def qwen_shape(rows: int = 2, prompt: int = 100, completion: int = 256) -> tuple[Policy, Rollouts]:
    """Random bf16 weights in the shape of Qwen2.5-0.5B, and rows of equal length of random tokens.

    The keys and values of the rows are kept in the form in which ``sample`` keeps them.
    """
    torch.manual_seed(0)
    config = config_of("qwen2.5-0.5b")
    model = Qwen2ForCausalLM(config).to(torch.bfloat16).eval()
    policy = Policy(model, load_policy(lora_rank=0).tokenizer)
    policy.model.generation_config.eos_token_id = policy.tokenizer.eos_token_id
    ids = torch.randint(1, config.vocab_size, (rows, prompt + completion))
    ones = torch.ones_like(ids, dtype=torch.bool)
    rollouts = Rollouts(
        prompt_ids=ids[:, :prompt], prompt_mask=ones[:, :prompt],
        completion_ids=ids[:, prompt:], completion_mask=ones[:, prompt:],
        old_logprobs=torch.zeros(rows, completion), num_generations=1,
        finished=torch.ones(rows, dtype=torch.bool),
    )  # fmt: skip
    with torch.no_grad():
        (trunk,) = trunk_blocks(model, rollouts, rows, need_logits=False)
    cache = [
        [tuple(x[i].transpose(0, 1) for x in (y.keys, y.values)) for y in trunk.cache.layers]
        for i in trunk.rows.argsort().tolist()
    ]
    return policy, replace(rollouts, cache=cache)


SETTINGS = {"tiny": (embedded_rollouts, POSTFIX), "qwen05b": (qwen_shape, FIVE_TOKENS)}
RIVALS = {
    "packed": lambda p, r, postfix: answer_entropies(p, r, EarlyExit(postfix)),
    "packed_alone": lambda p, r, postfix: answer_entropies(
        p, replace(r, cache=None), EarlyExit(postfix)
    ),
    "cached": authors_way,
    "forward": padded_forward,
}


def medians(rivals: dict, repeats: int, warm_up: int = 1) -> dict[str, float]:
    """Median seconds of each function over interleaved repeats, after some warm-up repeats."""
    seconds: dict[str, list[float]] = {name: [] for name in rivals}
    for repeat in range(-warm_up, repeats):
        for name, run in rivals.items():
            start = time.perf_counter()
            run()
            if repeat >= 0:
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def peak_megabytes(run) -> float:
    """Peak memory of tensors in MiB during ``run()``, above the memory before it.

    Every allocation is traced. The resident memory of the process would depend on the allocator,
    and varied from 64 to 194 MiB for the same run.
    """
    with torch.profiler.profile(profile_memory=True) as profiler:
        run()
    events = profiler.profiler.kineto_results.events()
    events = sorted((e for e in events if e.name() == "[memory]"), key=lambda e: e.start_ns())
    return max(itertools.accumulate(e.nbytes() for e in events)) / 2**20


STEPS = {
    "grpo": {"method": "grpo"},
    "iapo": {"method": "iapo"},
    "iapo_sentence": {"method": "iapo", "estimator_stride": "sentence"},
}
"""Settings that train in turns on the same completions; the others are compared with the first."""


def _train_in_turn(name: str, threads: int, steps: int, folder: str, mine, following, told) -> None:
    """Train in a separate process; after each step, let the next process make its step."""
    done: list[dict[str, float]] = []

    def on_step(step: dict) -> None:
        done.append({k: v for k, v in step.items() if k.startswith("seconds_")})
        following.release()
        mine.acquire()

    # With such a small learning rate the runs do not diverge.
    config = TrainConfig(**STEPS[name], max_steps=steps, learning_rate=1e-12, threads=threads)
    mine.acquire()
    try:
        train(config, folder, callbacks=[Callback(on_step)], progress=False)
    finally:
        told.put((name, done))
        following.release()


def step_ratios(threads: int, steps: int = 40) -> dict:
    """Ratio of the time of a training step to that of GRPO, with the same policy and completions.

    The runs make their steps in turn, each in a separate process. Only one of them computes at a
    time, so a busy machine slows all of them equally, and the runs do not share memory.

    Returns:
        ``{"seconds": name -> phase -> median, "ratio": name -> [median, low, high]}``, with 95%
        intervals by bootstrap over the steps without the first two.
    """
    context = multiprocessing.get_context("spawn")
    turns = [context.Semaphore(int(i == 0)) for i in range(len(STEPS))]
    told = context.Queue()
    with tempfile.TemporaryDirectory() as folder:
        processes = [
            context.Process(
                target=_train_in_turn,
                args=(name, threads, steps + 2, f"{folder}/{name}", mine, following, told),
            )
            for name, mine, following in zip(STEPS, turns, turns[1:] + turns[:1])
        ]
        for process in processes:
            process.start()
        found = dict(told.get() for _ in processes)
        for process in processes:
            process.join()
    if short := [name for name, done in found.items() if len(done) < steps + 2]:
        raise RuntimeError(f"the run of {', '.join(short)} failed")
    found = {name: found[name][2:] for name in STEPS}
    seconds = {
        name: {phase: statistics.median(step[phase] for step in done) for phase in done[0]}
        for name, done in found.items()
    }
    measure, *others = ([sum(step.values()) for step in done] for done in found.values())
    ratios = {}
    for name, totals in zip(list(STEPS)[1:], others):
        by_step = [(np.array([a / b]),) for a, b in zip(totals, measure, strict=True)]
        ratios[name] = bootstrap_interval(lambda x: float(np.median(x)), by_step, draws=2000)
    return {"seconds": seconds, "ratio": ratios}


def qwen_step(policy: Policy, rollouts: Rollouts, packed: float) -> tuple[float, dict[str, float]]:
    """Ratio of IAPO's step to GRPO's for the Qwen shape and two completions; seconds by phase."""
    from peft import LoraConfig, get_peft_model

    from iapo_mini.trainer import update

    config = TrainConfig(
        num_generations=2, micro_batch_size=2, max_completion_length=256, learning_rate=1e-12
    )
    lora = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    tuned = Policy(get_peft_model(policy.model, lora), policy.tokenizer)
    tuned.model.generation_config.eos_token_id = 0  # never drawn, so completions have full length
    start = time.perf_counter()
    problem = next(stories("tune"))
    drawn = sample(tuned, [problem], num_generations=2, max_completion_length=256)
    sampled = time.perf_counter()
    optimizer = torch.optim.AdamW(tuned.trainable().values())
    advantages = torch.randn(drawn.completion_ids.shape)
    update(tuned, optimizer, drawn, advantages, config, step=0)
    grpo = {"sampling": sampled - start, "update": time.perf_counter() - sampled}
    total = sum(grpo.values())
    return (total + packed) / total, {**grpo, "information": packed}


def measure(setting: str, threads: int) -> dict:
    """Ratios of one setting, and the seconds and megabytes behind them."""
    make, postfix = SETTINGS[setting]
    policy, rollouts = make()
    rivals = {
        name: (lambda run=run: run(policy, rollouts, postfix)) for name, run in RIVALS.items()
    }
    seconds = medians(rivals, repeats=5)
    names = ("packed", "packed_alone", "cached")
    megabytes = {name: peak_megabytes(rivals[name]) for name in names}
    if setting == "tiny":
        step = {str(n): step_ratios(n) for n in sorted({1, threads})}
        ratio = step[str(threads)]["ratio"]["iapo"][0]
    else:
        ratio, step = qwen_step(policy, rollouts, seconds["packed"])
    return {
        "packed_over_cached_time": seconds["packed"] / seconds["cached"],
        "packed_over_cached_memory": megabytes["packed"] / megabytes["cached"],
        "packed_over_forward_time": seconds["packed"] / seconds["forward"],
        "packed_alone_over_cached_time": seconds["packed_alone"] / seconds["cached"],
        "packed_alone_over_cached_memory": megabytes["packed_alone"] / megabytes["cached"],
        "packed_alone_over_forward_time": seconds["packed_alone"] / seconds["forward"],
        "iapo_step_over_grpo_step": ratio,
        "seconds": seconds,
        "extra_megabytes": megabytes,
        "steps": step,
        "threads": threads,
    }


def exactness() -> float:
    """Largest difference from the definition in nats, over all ways, on sampled completions."""
    policy = load_policy(lora_rank=0)
    problems = list(itertools.islice(stories("tune", seed=9), 2))
    kept = sample(policy, problems, num_generations=4, seed=0, keep_cache=True)
    naive = answer_entropies(policy, kept, EarlyExit(way="naive"))
    worst = 0.0
    for way, cache in itertools.product(("packed", "cached"), (kept.cache, None)):
        found = answer_entropies(policy, replace(kept, cache=cache), EarlyExit(way=way))
        worst = max(worst, float((found - naive).abs().max()))
    return max(worst, float((authors_way(policy, kept, POSTFIX) - naive).abs().max()))


def growth(lengths=(16, 32, 64, 128, 256, 448)) -> dict:
    """Seconds by completion length for each way, and log-log slopes over the three longest."""
    policy = load_policy(lora_rank=0)
    seconds: dict[str, list[float]] = {"naive": [], "cached": [], "packed": []}
    for length in lengths:
        ids = torch.randint(5, 800, (1, 60 + length), generator=torch.Generator().manual_seed(0))
        ones = torch.ones_like(ids, dtype=torch.bool)
        rollouts = Rollouts(
            ids[:, :60], ones[:, :60], ids[:, 60:], ones[:, 60:], torch.zeros(1, length), 1,
            torch.ones(1, dtype=torch.bool),
        )  # fmt: skip
        for way, values in seconds.items():
            how = EarlyExit(way=way)
            run = {way: lambda h=how, r=rollouts: answer_entropies(policy, r, h)}
            values.append(medians(run, 1 if way == "naive" else 5, 0)[way])
    x = torch.tensor(lengths[-3:]).double().log()
    slopes = {}
    for method, values in seconds.items():
        y = torch.tensor(values[-3:]).double().log()
        slopes[method] = float(
            ((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).pow(2).sum()
        )
    return {"lengths": list(lengths), "seconds": seconds, "slopes": slopes}


def check(results: dict) -> list[str]:
    """A sentence for each ratio that is beyond its limit."""
    out = []
    for setting, limits in LIMITS.items():
        for name, limit in limits.items():
            if results[setting][name] > limit:
                value = results[setting][name]
                out.append(f"{setting} {name} must be at most {limit}, got {value:.3f}")
    if results["max_abs_error_nats"] > 1e-4:
        error = results["max_abs_error_nats"]
        out.append(f"max_abs_error_nats must be at most 1e-4, got {error:.1e}")
    return out


def main() -> None:
    """Measure, write and judge the ratios."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parts = ("exact", "tiny", "qwen05b", "growth")
    parser.add_argument("parts", nargs="*", help=f"any of {', '.join(parts)}; default: all")
    parser.add_argument("--threads", type=int, default=TrainConfig().threads)
    parser.add_argument("--check", action="store_true", help="judge the committed results only")
    options = parser.parse_args()
    if unknown := set(options.parts) - set(parts):
        parser.error(f"parts must be of {', '.join(parts)}, got {', '.join(sorted(unknown))}")
    results = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
    if not options.check:
        torch.set_num_threads(options.threads)
        for part in options.parts or parts:
            print(f"measuring {part} ...", flush=True)
            if part == "exact":
                results["max_abs_error_nats"] = exactness()
            elif part == "growth":
                results["growth"] = growth()
            else:
                results[part] = measure(part, options.threads)
                print(json.dumps(results[part], indent=1), flush=True)
            results["versions"] = versions()
            write_json(RESULTS, results)
    if missing := [name for name in (*LIMITS, "max_abs_error_nats") if name not in results]:
        sys.exit(f"not measured yet: {', '.join(missing)}")
    problems = check(results)
    print("\n".join(problems) or "every ratio is within its limit")
    sys.exit(bool(problems))


if __name__ == "__main__":
    main()
