"""The authors' own checkpoints, judged on whole test sets beside the problems that they used.

Their checkpoints are subfolders of one hub repository, one for each pair of model and data set. For
three of the nine both weights are 1e-6, and then the method is GRPO with DAPO's loss and clip range
up to rounding ("GRPO-like" here). Their evaluation reads the first 15 problems of a test set. For
MATH-500 this set is the last fifth of the problems, after a shuffle with seed 42 (``utils.py``,
lines 345 to 357); the models were trained on the rest.

    figures/results/released.json
      rows       name -> {"size", "data", "kind", "alpha", "beta", "step", "model": what was loaded,
                 "metrics": of all problems, "fifteen": of the authors' 15 problems; each with
                 "pass@k", "lenient pass@1", "length", "ratio@1", "intervals", "problems"}
      config     num_generations, max_completion_length, ks, base, repository, problems (hashes)
      versions

``figures/released.md`` is the same as a table. A row that was not evaluated says so.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from iapo_mini.devices import chosen_device, compute_dtype
from iapo_mini.errors import MOST_ROWS, MOST_TOKENS, check_choice, check_number
from iapo_mini.evaluation import evaluate, summary
from iapo_mini.files import read_json, replace_text, versions, write_json
from iapo_mini.hub import check_in_reach
from iapo_mini.intervals import format_interval
from iapo_mini.lab.results import check_options
from iapo_mini.policies import shown_name
from iapo_mini.policy import load_policy
from iapo_mini.problems.datasets import ALL, load_problems
from iapo_mini.tasks import Problem, fingerprint_of_problems

REPOSITORY = "jonathanhe123/iapo"
BASE = "Qwen/Qwen2.5-{size}-Instruct"
FIRST = 15
"""Number of problems in the authors' evaluation (``eval.py``, line 37)."""


class Released(NamedTuple):
    """A checkpoint of the authors: weights of the method, and training step (their notebook)."""

    size: str
    data: str
    alpha: float
    beta: float
    step: int

    @property
    def kind(self) -> str:
        """``"IAPO"``, or ``"GRPO-like"`` if both weights are next to nothing."""
        return "GRPO-like" if max(self.alpha, self.beta) <= 1e-6 else "IAPO"

    @property
    def subfolder(self) -> str:
        """Folder in the repository."""
        return f"Qwen2.5-{self.size}-Instruct_{NAMES[self.data]}"


NAMES = {"gsm8k": "GSM8K", "math500": "MATH-500", "dapo_math": "DAPO-Math-17k"}
CHECKPOINTS = (
    Released("0.5B", "gsm8k", 1, 1, 1100),
    Released("0.5B", "math500", 1, 1e-6, 4200),
    Released("0.5B", "dapo_math", 1e-6, 1e-2, 500),
    Released("1.5B", "gsm8k", 1, 1, 1000),
    Released("1.5B", "math500", 1e-6, 1e-6, 1900),
    Released("1.5B", "dapo_math", 1e-2, 1e-4, 200),
    Released("7B", "gsm8k", 1, 1e-6, 400),
    Released("7B", "math500", 1e-6, 1e-6, 300),
    Released("7B", "dapo_math", 1e-6, 1e-6, 100),
)
SIZES = ("0.5B", "1.5B", "7B")
TESTS = ("gsm8k", "math500")
"""Data sets that models are judged on. Models of DAPO-Math-17k, of which all problems may have been
in training, are judged on GSM8K."""


def held_out(problems: Sequence[Problem]) -> list[Problem]:
    """The fifth of MATH-500 that the authors did not train on, in their order."""
    order = list(range(len(problems)))
    random.Random(42).shuffle(order)
    return [problems[i] for i in order[int(0.8 * len(problems)) :]]


def rows(sizes: Sequence[str]) -> dict[str, tuple[str, str, Released | None]]:
    """Row -> size, data set that it is judged on, and checkpoint (None: the base model)."""
    out: dict[str, tuple[str, str, Released | None]] = {}
    for size in sizes:
        for data in TESTS:
            out[f"base {size}, {NAMES[data]}"] = size, data, None
        for found in CHECKPOINTS:
            if found.size == size:
                judged = found.data if found.data in TESTS else "gsm8k"
                out[f"{found.kind} {size}, {NAMES[found.data]}"] = size, judged, found
    return out


def released(
    sizes: Sequence[str] = ("0.5B",),
    *,
    repository: str = REPOSITORY,
    base: str = BASE,
    data_files: Sequence[str] = ("", ""),
    num_generations: int = 8,
    max_completion_length: int = 512,
    batch_size: int = 64,
    out: str | Path = "runs/released",
    figures: str | Path = "figures",
    device: str = "auto",
) -> dict:
    """Evaluate base models and the authors' checkpoints; write ``released.json`` and its table.

    Args:
        sizes: some of ``SIZES``.
        repository: hub id or folder with a subfolder for each checkpoint.
        base: name of the base models; ``{size}`` is replaced by the size.
        data_files: local files of GSM8K's and MATH-500's test problems; empty: from the hub.
        num_generations: completions for each problem.
        max_completion_length: number of tokens at which a completion is cut.
        batch_size: completions sampled at once.
        out: folder of completions; a stopped evaluation continues there.
        figures: folder of results.
        device: device of the models; on a GPU the weights are in half precision.

    Raises:
        ValueError: for an option out of range, or a model or data that can't be loaded.
    """
    for size in sizes:
        check_choice("sizes", size, SIZES)
    check_number("num_generations", num_generations, 1, MOST_ROWS)
    check_number("max_completion_length", max_completion_length, 1, MOST_TOKENS)
    check_number("batch_size", batch_size, 1, MOST_ROWS)
    figures, out = Path(figures), Path(out)
    check_options(out, figures, None)
    problems = {
        data: load_problems(data, ALL if file else "test", file)
        for data, file in zip(TESTS, data_files)
    }
    problems["math500"] = held_out(problems["math500"])
    device = chosen_device(device)
    dtype = compute_dtype(device)
    ks = tuple(k for k in (1, 2, 4, 8, 16, 32) if k <= num_generations)
    path = figures / "results" / "released.json"
    results: dict[str, Any] = read_json(path, {"rows": {}})
    how = {
        "num_generations": num_generations, "max_completion_length": max_completion_length,
        "ks": list(ks), "base": shown_name(base), "repository": shown_name(repository),
        "problems": {data: fingerprint_of_problems(found) for data, found in problems.items()},
    }  # fmt: skip
    _check_same(results.get("config", how), how, path)
    for model in [*(base.replace("{size}", size) for size in sizes), repository]:
        check_in_reach(model)
    for name, (size, data, found) in rows(sizes).items():
        if name in results["rows"]:
            continue
        policy = load_policy(
            base.replace("{size}", size) if found is None else repository,
            subfolder="" if found is None else found.subfolder,
            lora_rank=0, device=device, dtype=dtype,
        )  # fmt: skip
        judged = evaluate(
            policy, problems[data], ks=ks, num_generations=num_generations, lenient=True,
            max_completion_length=max_completion_length, batch_size=batch_size,
            save_to=out / f"{name.replace(' ', '_').replace(',', '')}.jsonl",
        )  # fmt: skip
        results["rows"][name] = {
            "size": size, "data": data, "kind": "base" if found is None else found.kind,
            "model": base.replace("{size}", size) if found is None else found.subfolder,
            **({} if found is None else {"alpha": found.alpha, "beta": found.beta,
                                         "step": found.step}),
            "metrics": _without_completions(judged),
            "fifteen": _of_first(judged["completions"], num_generations, ks),
        }  # fmt: skip
        results |= {"config": how, "versions": versions()}
        write_json(path, results)
        replace_text(figures / "released.md", released_page(results))
    return results


def _check_same(before: dict[str, Any], how: dict[str, Any], path: Path) -> None:
    """Refuse to go on with results that were made with other options."""
    for option, value in before.items():
        if how[option] != value:
            raise ValueError(
                f"{option} is {how[option]}, but '{path}' was made with {value}; use the same, or "
                "name other folders with figures and out."
            )


def _without_completions(judged: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in judged.items() if name != "completions"}


def _of_first(
    completions: Sequence[dict[str, Any]], group: int, ks: Sequence[int]
) -> dict[str, Any]:
    """The metrics of the first ``FIRST`` problems alone."""
    count = min(FIRST, len(completions) // group)
    kept = completions[: count * group]
    right = torch.tensor([c["correct"] for c in kept]).view(count, group).sum(1)
    tokens = torch.tensor([c["tokens"] for c in kept], dtype=torch.float64).view(count, group)
    return summary(right.tolist(), tokens, ks)


def released_table(results: dict) -> str:
    """All rows as a Markdown table; a row that was not evaluated says so."""
    head = (
        "model", "judged on", "alpha, beta", "Pass@1", "Pass@1, any format", "length (tokens)",
        f"Pass@1 of the first {FIRST}", f"length of the first {FIRST}",
    )  # fmt: skip
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for name, (_, data, found) in rows(SIZES).items():
        weights = "" if found is None else f"{found.alpha:g}, {found.beta:g}"
        row = results["rows"].get(name)
        cells = ["not yet"] * 5
        if row is not None:
            of, first = row["metrics"], row["fifteen"]
            cells = [
                *(_cell(of, metric) for metric in ("pass@1", "lenient pass@1", "length")),
                *(_cell(first, metric) for metric in ("pass@1", "length")),
            ]
        lines.append(f"| {name} | {NAMES[data]} | {weights} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cell(metrics: dict[str, Any], name: str) -> str:
    low, high = metrics["intervals"][name]
    return format_interval((metrics[name], low, high), 1 if name == "length" else 3)


def released_page(results: dict) -> str:
    """The content of ``figures/released.md``."""
    return (
        "# The authors' checkpoints on whole test sets\n\n"
        "Made by `iapo-mini lab released` ([docs](../docs/real_models.md#the-authors-own-models)). "
        "Intervals are 95%, by bootstrap over problems.\n\n" + released_table(results) + "\n"
    )
