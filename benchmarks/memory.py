"""Measure memory and seconds of training steps on real shapes, and compare them with the plan.

    python benchmarks/memory.py                       # Qwen2.5-0.5B, 1.5B and 7B
    python benchmarks/memory.py qwen2.5-0.5b          # one of them
    python benchmarks/memory.py --tiny --device cpu   # the same code on a tiny shape, in seconds

Real shapes need a CUDA device. Random weights of these shapes are written to a temporary folder and
loaded like a user's model, in 4 bits and with an adapter; nothing is downloaded. Then
``trainer.train`` runs steps of GRPO and of IAPO, with G = 8, prompts of 200 tokens, completions of
up to 512 tokens and the other settings of the preset. The first step of each method does not count
for the seconds, unless there is no other.

A row for each shape is written to figures/results/memory.json after each method. A benchmark that
is asked to stop finishes its step and writes what that step took; the same command continues.

* ``planned_gb``, ``peak_gb``: GPU memory including context and fragmentation (2**30 bytes);
  ``planned_tensors_gb``, ``peak_tensors_gb``: tensors alone;
* ``seconds``: medians of sampling, information and update; ``iapo_step_over_grpo_step``;
* ``steps``: number of steps that each method made.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import statistics
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, PreTrainedConfig, Qwen2Config

from iapo_mini.callbacks import Callback
from iapo_mini.config import CARDS, TrainConfig
from iapo_mini.files import read_json, versions, write_json
from iapo_mini.policy import Policy, load_policy
from iapo_mini.sampling import encode_prompts
from iapo_mini.tasks import Problem
from iapo_mini.tools.planner import GB, config_of, plan, shape_of
from iapo_mini.trainer import train

RESULTS = Path(__file__).parent.parent / "figures" / "results" / "memory.json"
METHODS = ("grpo", "iapo")
PROMPT = 200
CARD_OF = {"qwen2.5-0.5b": "t4", "qwen2.5-1.5b": "12gb", "qwen2.5-7b": "24gb"}
TINY = Qwen2Config(
    hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, vocab_size=2000, tie_word_embeddings=True,
)  # fmt: skip


def write_random_model(config: PreTrainedConfig, folder: Path, device: str) -> None:
    """Write a model folder with random 16-bit weights, one file per block, and a tokenizer."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    parameters = dict(model.named_parameters())
    blocks: dict[str, list[str]] = {}
    for name in parameters:
        numbers = [part for part in name.split(".") if part.isdigit()]
        blocks.setdefault(numbers[0] if numbers else name, []).append(name)
    where = {}
    for number, names in enumerate(blocks.values()):
        file = f"model-{number:05}.safetensors"
        weights = {}
        for name in names:
            size = parameters[name].shape
            drawn = torch.ones(size) if "norm" in name else 0.02 * torch.randn(size, device=device)
            weights[name] = drawn.to("cpu", torch.bfloat16)
        save_file(weights, folder / file, metadata={"format": "pt"})
        where |= dict.fromkeys(names, file)
    index = {"metadata": {}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    config.save_pretrained(folder)
    load_policy(lora_rank=0, device="cpu").tokenizer.save_pretrained(folder)


def problems_of(policy: Policy, prompt: int) -> list[Problem]:
    """A list of one problem whose prompt has ``prompt`` tokens (or as few as possible)."""
    ids, _ = encode_prompts(policy, [Problem("7", "7")])
    return [Problem(" ".join(["7"] * max(1, prompt - ids.shape[1] + 1)), "7")]


def new_row(name: str, policy: Policy, settings: TrainConfig, config, prompt: int) -> dict:
    """The row of a shape before anything is measured."""
    planned = plan(shape_of(config), settings, prompt, width=policy.dtype.itemsize)
    cuda = policy.device.type == "cuda"
    return {
        "shape": name,
        "planned_gb": planned.total / GB,
        "peak_gb": None,  # only measured on CUDA devices
        "planned_tensors_gb": planned.tensors / GB,
        "peak_tensors_gb": None,
        "iapo_step_over_grpo_step": None,
        "seconds": {},
        "steps": {},
        "device": torch.cuda.get_device_name() if cuda else "cpu",
        "dtype": str(policy.dtype).removeprefix("torch."),
        "prompt": prompt,
        "length": None,
        "settings": dataclasses.asdict(settings),
    }


def peaks() -> dict[str, float]:
    """The largest use of GPU memory since the last reset."""
    free, total = torch.cuda.mem_get_info()
    context = total - free - torch.cuda.memory_reserved()
    return {
        "peak_gb": (torch.cuda.max_memory_reserved() + context) / GB,
        "peak_tensors_gb": torch.cuda.max_memory_allocated() / GB,
    }


def continued(row: dict, before: dict | None) -> tuple[dict, list[str]]:
    """The row to go on with, and its methods that have steps to make.

    A row that is finished, or of another card or other settings, is measured anew.
    """
    row = json.loads(json.dumps(row))
    same = ("settings", "device", "dtype", "prompt")
    if before is not None and all(before[part] == row[part] for part in same):
        steps = before["steps"]
        left = [m for m in METHODS if steps.get(m, 0) < before["settings"]["max_steps"]]
        if left:
            return before, left
    return row, list(METHODS)


def measure(
    name: str, config: PreTrainedConfig, settings: TrainConfig, device: str, before: dict | None,
    write: Callable[[dict], None],
) -> dict:  # fmt: skip
    """Measure what is missing of a row: GRPO and then IAPO, from the same random weights.

    Args:
        name: name of the shape.
        config: its configuration.
        settings: of both methods.
        device: where to measure.
        before: the row as an earlier call has left it.
        write: keeps the row; called after each method.

    Raises:
        KeyboardInterrupt: when the benchmark is asked to stop, after the row was written.
    """
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        write_random_model(config, Path(folder), device)
        policy = load_policy(
            folder, four_bit=True, lora_rank=settings.lora_rank, device=device,
            gradient_checkpointing=settings.gradient_checkpointing,
        )  # fmt: skip
    # Random weights hardly ever draw this stop token, so rows run to the length limit.
    policy.model.generation_config.eos_token_id = config.vocab_size - 1
    problems = problems_of(policy, PROMPT)
    prompt = encode_prompts(policy, problems)[0].shape[1]
    row, left = continued(new_row(name, policy, settings, config, prompt), before)
    cuda = device.startswith("cuda")
    for method in left:
        lines: list[dict] = []
        gc.collect()
        if cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        try:
            with tempfile.TemporaryDirectory() as folder:
                train(
                    dataclasses.replace(settings, method=method), folder, policy=policy,
                    problems=problems, callbacks=[Callback(lines.append)], progress=False,
                )  # fmt: skip
        finally:
            if lines:
                counted = lines[1:] or lines
                row["seconds"][method] = {
                    phase: statistics.median(line[f"seconds_{phase}"] for line in counted)
                    for phase in ("sampling", "information", "update")
                }
                row["steps"][method], row["length"] = len(lines), lines[-1]["length"]
                row |= peaks() if cuda else {}
                if len(row["seconds"]) == len(METHODS):
                    grpo, iapo = (sum(row["seconds"][m].values()) for m in METHODS)
                    row["iapo_step_over_grpo_step"] = iapo / grpo
                write(row)
    return row


def main() -> None:
    """Measure the given shapes; rows of other shapes in the file are kept."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("shapes", nargs="*", default=list(CARD_OF), help=", ".join(CARD_OF))
    parser.add_argument("--device", default="cuda", help="default: %(default)s")
    parser.add_argument("--tiny", action="store_true", help="use a tiny shape and short texts")
    parser.add_argument("--steps", type=int, default=4, help="steps per method, one to warm up (4)")
    parser.add_argument("--out", type=Path, help="results (default: figures/results/memory.json)")
    args = parser.parse_args()
    if not args.tiny and not (args.device.startswith("cuda") and torch.cuda.is_available()):
        print(
            f"memory.py: device is {args.device}, but real shapes need a CUDA device that works "
            "here; --tiny --device cpu runs the same code on a tiny shape.",
            file=sys.stderr,
        )
        raise SystemExit(2)
    if args.steps < 2:
        parser.error(f"--steps must be at least 2, got {args.steps}")
    out = args.out or (Path("runs") / "memory_tiny.json" if args.tiny else RESULTS)
    rows = {row["shape"]: row for row in read_json(out, {"rows": []}, needs=("rows",))["rows"]}

    def write(row: dict) -> None:
        rows[row["shape"]] = row
        write_json(out, {"rows": list(rows.values()), "versions": versions()})

    for name in ["tiny"] if args.tiny else args.shapes:
        settings = TrainConfig(**{**CARDS[CARD_OF.get(name, "t4")], "max_steps": args.steps})
        if args.tiny:
            settings = dataclasses.replace(
                settings, max_completion_length=16, prompts_per_step=2, threads=1
            )
        config = TINY if args.tiny else config_of(name)
        row = measure(name, config, settings, args.device, rows.get(name), write)
        peak = "not measured" if row["peak_gb"] is None else f"{row['peak_gb']:.2f} GB"
        print(f"{name}: planned {row['planned_gb']:.2f} GB, peak {peak}; IAPO step over GRPO step "
              f"{row['iapo_step_over_grpo_step']:.2f} ({row['device']})", flush=True)  # fmt: skip
        gc.collect()


if __name__ == "__main__":
    main()
