"""Measure completion tokens per second of our sampler and of transformers' fast ways to sample.

    python benchmarks/sampling.py                       # qwen2.5-0.5b on a CUDA device
    python benchmarks/sampling.py qwen2.5-1.5b
    python benchmarks/sampling.py --tiny --device cpu   # a tiny shape, in seconds

The weights are random. There are 8 prompts of about 200 tokens with 8 completions of 512 tokens
each, at temperature 1. Every way is measured with 4-bit weights under the adapter, and with a
merged 16-bit copy of them (fp32 on a CPU):

* ``native``: ``sampling.sample``, which runs a prompt once per group and drops rows that end;
* ``generate``: ``model.generate`` with its growing cache;
* ``static``: the same with a static cache, which transformers compiles on a CUDA device;
* ``paged``: ``model.generate_batch``, continuous batching over a paged cache (CUDA only).

If a way fails, its reason is recorded. Rows are written to figures/results/sampling.json, each as
soon as it is measured; ``left`` is the number of ways that were left then. A stopped benchmark
continues when the command is repeated.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import tempfile
import time
from pathlib import Path

import torch
from memory import TINY, problems_of, write_random_model
from transformers import GenerationConfig

from iapo_mini.files import read_json, versions, write_json
from iapo_mini.policy import Policy, load_policy
from iapo_mini.sampling import encode_prompts, sample
from iapo_mini.tools.planner import SHAPES, config_of

RESULTS = Path(__file__).parent.parent / "figures" / "results" / "sampling.json"
GENERATIONS = 8


def native(policy: Policy, problems, length: int) -> int:
    """Sample with our sampler; return the number of tokens."""
    rollouts = sample(policy, problems, num_generations=GENERATIONS, max_completion_length=length)
    return int(rollouts.completion_mask.sum())


def generate(policy: Policy, problems, length: int, **settings) -> int:
    """Sample with transformers' generate; return the number of tokens."""
    ids, mask = (x.repeat_interleave(GENERATIONS, 0) for x in encode_prompts(policy, problems))
    out = policy.model.eval().generate(
        ids, attention_mask=mask, do_sample=True, top_k=0, max_new_tokens=length,
        pad_token_id=policy.tokenizer.pad_token_id, **settings,
    )  # fmt: skip
    return out[:, ids.shape[1] :].numel()


def static(policy: Policy, problems, length: int) -> int:
    """Sample with generate and a static cache; return the number of tokens."""
    return generate(policy, problems, length, cache_implementation="static")


def paged(policy: Policy, problems, length: int) -> int:
    """Sample with generate_batch; return the number of tokens."""
    ids, mask = encode_prompts(policy, problems)
    rows = [i[m].tolist() for i, m in zip(ids, mask) for _ in range(GENERATIONS)]
    config = GenerationConfig(
        do_sample=True, top_k=0, max_new_tokens=length,
        eos_token_id=policy.eos_ids.tolist(), pad_token_id=policy.tokenizer.pad_token_id,
    )  # fmt: skip
    done = policy.model.eval().generate_batch(rows, generation_config=config)
    if any(x.error for x in done.values()) or len(done) < len(rows):
        raise RuntimeError("not every request was answered")
    return sum(len(x.generated_tokens) for x in done.values())


WAYS = {"native": native, "generate": generate, "static": static, "paged": paged}


@torch.no_grad()
def measure(policy: Policy, problems, length: int, way: str, cuda: bool) -> dict:
    """Tokens per second of the second of two runs (the first compiles), or why it failed."""
    try:
        for _ in range(2):
            start = time.perf_counter()
            tokens = WAYS[way](policy, problems, length)
            if cuda:
                torch.cuda.synchronize()
            seconds = time.perf_counter() - start
    except Exception as error:
        return {"tokens_per_second": None, "error": str(error).strip().splitlines()[0][:200]}
    return {"tokens_per_second": tokens / seconds, "tokens": tokens, "seconds": seconds}


def main() -> None:
    """Measure one shape; rows of other shapes in the file are kept."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("shape", nargs="?", default="qwen2.5-0.5b", help=", ".join(SHAPES))
    parser.add_argument("--device", default="cuda", help="default: %(default)s")
    parser.add_argument("--tiny", action="store_true", help="use a tiny shape and short texts")
    parser.add_argument("--out", type=Path, help="default: figures/results/sampling.json")
    args = parser.parse_args()
    cuda = args.device.startswith("cuda")
    if not args.tiny and not (cuda and torch.cuda.is_available()):
        print(f"sampling.py: device is {args.device}, but real shapes need a CUDA device that "
              "works here; --tiny --device cpu runs the same code on a tiny shape.",
              file=sys.stderr)  # fmt: skip
        raise SystemExit(2)
    name, length, prompts = ("tiny", 12, 2) if args.tiny else (args.shape, 512, 8)
    config = TINY if args.tiny else config_of(args.shape)
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        write_random_model(config, Path(folder), args.device)
        adapted = load_policy(folder, four_bit=True, device=args.device)
    # Random weights hardly ever draw this stop token, so rows run to the length limit.
    adapted.model.generation_config.eos_token_id = config.vocab_size - 1
    problems = problems_of(adapted, 200) * prompts
    device = torch.cuda.get_device_name() if cuda else "cpu"
    out = args.out or (Path("runs") / "sampling_tiny.json" if args.tiny else RESULTS)
    kept = read_json(out, {"rows": []}, needs=("rows",))["rows"]
    rows = [x for x in kept if x["shape"] == name and x["device"] == device]
    others = [x for x in kept if x["shape"] != name]
    if rows and rows[-1]["left"] == 0:
        rows = []  # a finished benchmark is measured anew
    ways = list(WAYS) if cuda else ["native", "generate", "static"]
    todo = list(itertools.product(("4-bit", "merged"), ways))
    merged = None
    for weights, way in todo[len(rows) :]:
        if weights == "merged" and merged is None:
            merged = Policy(adapted.merged(), adapted.tokenizer)
        row = {"shape": name, "weights": weights, "way": way}
        row |= measure(merged or adapted, problems, length, way, cuda)
        rows.append(row | {"device": device, "left": len(todo) - len(rows) - 1})
        write_json(out, {"rows": others + rows, "versions": versions()})
        speed = row["tokens_per_second"]
        told = row["error"] if speed is None else f"{speed:.0f} tokens/s"
        print(f"{name}, {weights}, {way}: {told}", flush=True)


if __name__ == "__main__":
    main()
