"""Measure memory and seconds of training steps on real shapes, and compare them with the plan.

    python benchmarks/memory.py                       # Qwen2.5-0.5B, 1.5B and 7B
    python benchmarks/memory.py qwen2.5-0.5b          # one of them
    python benchmarks/memory.py --tiny --device cpu   # the same code on a tiny shape, in seconds

Real shapes need a CUDA device. Random weights of these shapes are written to a temporary folder and
loaded like a user's model, in 4 bits and with an adapter; nothing is downloaded. Then
``trainer.train`` runs steps of GRPO and of IAPO, with G = 8, prompts of 200 tokens, completions of
up to 512 tokens and the other settings of the preset. The first step of each method does not count.
Rows are written to figures/results/memory.json:

* ``planned_gb``, ``peak_gb``: GPU memory including context and fragmentation (2**30 bytes);
  ``planned_tensors_gb``, ``peak_tensors_gb``: tensors alone;
* ``seconds``: medians of sampling, information and update; ``iapo_step_over_grpo_step``.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import statistics
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, PreTrainedConfig, Qwen2Config

from iapo_mini.callbacks import Callback
from iapo_mini.config import CARDS, TrainConfig
from iapo_mini.files import versions, write_json
from iapo_mini.policy import Policy, load_policy
from iapo_mini.sampling import encode_prompts
from iapo_mini.tasks import Problem
from iapo_mini.tools.planner import GB, config_of, plan, shape_of
from iapo_mini.trainer import train

RESULTS = Path(__file__).parent.parent / "figures" / "results" / "memory.json"
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


def measure(name: str, config: PreTrainedConfig, settings: TrainConfig, prompt: int, device: str):
    """Measure one row: GRPO and then IAPO, from the same random weights."""
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        write_random_model(config, Path(folder), device)
        policy = load_policy(
            folder, four_bit=True, lora_rank=settings.lora_rank, device=device,
            gradient_checkpointing=settings.gradient_checkpointing,
        )  # fmt: skip
    # Random weights hardly ever draw this stop token, so rows run to the length limit.
    policy.model.generation_config.eos_token_id = config.vocab_size - 1
    problems = problems_of(policy, prompt)
    prompt = encode_prompts(policy, problems)[0].shape[1]
    cuda = device.startswith("cuda")
    seconds, peaks = {}, {}
    for method in ("grpo", "iapo"):
        lines: list[dict] = []
        gc.collect()
        if cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        with tempfile.TemporaryDirectory() as folder:
            train(
                dataclasses.replace(settings, method=method), folder, policy=policy,
                problems=problems, callbacks=[Callback(lines.append)], progress=False,
            )  # fmt: skip
        seconds[method] = {
            phase: statistics.median(line[f"seconds_{phase}"] for line in lines[1:])
            for phase in ("sampling", "information", "update")
        }
        if cuda:
            free, total = torch.cuda.mem_get_info()
            context = total - free - torch.cuda.memory_reserved()
            peaks = {
                "peak_gb": (torch.cuda.max_memory_reserved() + context) / GB,
                "peak_tensors_gb": torch.cuda.max_memory_allocated() / GB,
            }
    planned = plan(shape_of(config), settings, prompt, width=policy.dtype.itemsize)
    steps = {method: sum(parts.values()) for method, parts in seconds.items()}
    return {
        "shape": name,
        "planned_gb": planned.total / GB,
        "peak_gb": None,  # only measured on CUDA devices
        "planned_tensors_gb": planned.tensors / GB,
        "peak_tensors_gb": None,
        **peaks,
        "iapo_step_over_grpo_step": steps["iapo"] / steps["grpo"],
        "seconds": seconds,
        "device": torch.cuda.get_device_name() if cuda else "cpu",
        "dtype": str(policy.dtype).removeprefix("torch."),
        "prompt": prompt,
        "length": lines[-1]["length"],
        "settings": dataclasses.asdict(settings),
    }


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
    before = json.loads(out.read_text(encoding="utf-8"))["rows"] if out.exists() else []
    for name in ["tiny"] if args.tiny else args.shapes:
        settings = TrainConfig(**{**CARDS[CARD_OF.get(name, "t4")], "max_steps": args.steps})
        if args.tiny:
            settings = dataclasses.replace(
                settings, max_completion_length=16, prompts_per_step=2, threads=1
            )
        row = measure(name, TINY if args.tiny else config_of(name), settings, 200, args.device)
        before = [x for x in before if x["shape"] != name] + [row]
        out.parent.mkdir(parents=True, exist_ok=True)
        write_json(out, {"rows": before, "versions": versions()})
        peak = "not measured" if row["peak_gb"] is None else f"{row['peak_gb']:.2f} GB"
        print(f"{name}: planned {row['planned_gb']:.2f} GB, peak {peak}; IAPO step over GRPO step "
              f"{row['iapo_step_over_grpo_step']:.2f} ({row['device']})", flush=True)  # fmt: skip
        gc.collect()


if __name__ == "__main__":
    main()
