"""Share a trained policy: export it, write a model card from its run, and upload it to the hub."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import huggingface_hub

from iapo_mini.adapters import base_of
from iapo_mini.errors import first_line, shown
from iapo_mini.files import read_json, replace_folder, versions, writable_folder
from iapo_mini.intervals import format_interval
from iapo_mini.metrics import LOG, logged
from iapo_mini.policy import load_policy
from iapo_mini.recipes import RECIPES

KINDS = ("merged", "adapter")
"""Kinds of exports: one plain model, or the adapter alone."""

ENDS = 5
"""Number of steps at either end of a run whose means the card shows."""

_SHOWN = ("reward", "accuracy", "length", "kl")
_SETTINGS = (
    "method", "aggregation", "alpha", "beta", "learning_rate", "max_steps", "prompts_per_step",
    "num_generations", "max_completion_length", "temperature", "kl_coef", "epsilon", "epsilon_high",
    "lora_rank", "four_bit", "estimator_stride", "reward", "seed",
)  # fmt: skip
_LOADED = {
    "merged": "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
    'model = AutoModelForCausalLM.from_pretrained("{name}")\n'
    'tokenizer = AutoTokenizer.from_pretrained("{name}")',
    "adapter": "from iapo_mini import load_policy\n\n"
    'policy = load_policy(adapter="{name}")  # a local copy of this repository',
}


def export(
    adapter: str | Path,
    out: str | Path,
    *,
    kind: str = "merged",
    model: str | None = None,
    four_bit: bool | None = None,
    card: str = "",
) -> None:
    """Write a trained policy to a new folder: safetensors, tokenizer, settings, card.

    Args:
        adapter: folder ``RUN/final``.
        out: new or empty folder.
        kind: one of ``KINDS``.
        model: as for ``load_policy``; default is the model of the adapter's run.
        four_bit: dequantise the 4-bit weights that the adapter was trained on, and merge into them;
            default as in the adapter's run.
        card: text of README.md, if any.

    Raises:
        ValueError: for a folder that is not empty, or an adapter that can't be loaded.
    """
    out = Path(out)
    writable_folder(out, "out")
    if any(out.iterdir()):
        raise ValueError(f"out must be a new folder, got '{out}', which is not empty")
    if four_bit is None:
        four_bit = bool(read_json(Path(adapter).parent / "config.json", {}).get("four_bit"))
    policy = load_policy(model, adapter=adapter, four_bit=four_bit)

    def write(folder: Path) -> None:
        if kind == "merged":
            policy.merged("cpu").save_pretrained(folder)
            policy.tokenizer.save_pretrained(folder)
        else:
            policy.save(folder)
        if card:
            (folder / "README.md").write_text(card, encoding="utf-8", newline="\n")

    replace_folder(out, write)


def model_card(
    adapter: str | Path, kind: str, name: str = "", evaluation: str | Path | None = None
) -> str:
    """The README of a model repository, in Markdown with the hub's metadata on top.

    Args:
        adapter: folder ``RUN/final``; settings and numbers are those of ``RUN``.
        kind: one of ``KINDS``.
        name: name of the repository in the loading example; default is the folder's name.
        evaluation: results file of ``iapo-mini evaluate``, whose numbers are shown with intervals.

    Raises:
        ValueError: for an adapter without a run beside it, or a file that is not an evaluation.
    """
    run = Path(adapter).parent
    settings = read_json(run / "config.json", {})
    if not settings:
        raise ValueError(
            f"adapter is '{adapter}', which has no run beside it (no '{run / 'config.json'}'), so "
            "a card can't be written."
        )
    base = base_of(adapter).get("model", settings["model"])
    recipe = RECIPES.get(settings["method"])
    what = recipe.what if recipe is not None else "a method of its own"
    name = name or f"{run.name}"
    data = huggingface_hub.ModelCardData(
        base_model=base if "/" in base and not Path(base).exists() else None,
        library_name="peft" if kind == "adapter" else "transformers",
        pipeline_tag="text-generation",
        tags=["reinforcement-learning", "grpo", "iapo", "iapo-mini", settings["method"]],
    )
    lines = [
        "---", data.to_yaml().strip(), "---", "", f"# {name}", "",
        f"`{base}`, trained by `{settings['method']}` ({what}) on {settings['data']} with "
        "[iapo-mini](https://github.com/iapo-mini/iapo-mini). "
        + ("The adapter is merged into the weights." if kind == "merged" else
           "This repository holds only the LoRA adapter."),
        "", "```python", _LOADED[kind].format(name=name), "```", "",
        "The model thinks in `<think>...</think>` and answers in `<answer>...</answer>`.", "",
        "## Training", "", *_of_training(run), "", "| setting | value |", "|---|---|",
        *(f"| {key} | {settings[key]} |" for key in _SETTINGS if settings.get(key) is not None),
    ]  # fmt: skip
    if evaluation is not None:
        lines += ["", "## Evaluation", "", *_of_evaluation(Path(evaluation))]
    used = ", ".join(f"{package} {version}" for package, version in versions().items())
    return "\n".join([*lines, "", f"Made with {used}.", ""])


def _of_training(run: Path) -> list[str]:
    rows = [row for _, row in logged(run / LOG)]
    if not rows:
        return ["The run's log is missing."]
    ends = rows[:ENDS], rows[-ENDS:]
    lines = [f"{len(rows)} steps; means of the first and of the last {len(ends[0])} of them, of "
             "training completions:", "", "| metric | first | last |", "|---|---|---|"]  # fmt: skip
    for metric in _SHOWN:
        means = [_mean(part, metric) for part in ends]
        if None not in means:
            lines.append(f"| {metric} | {means[0]:.3g} | {means[1]:.3g} |")
    return lines


def _mean(rows: list[dict], metric: str) -> float | None:
    values = [row[metric] for row in rows if isinstance(row.get(metric), int | float)]
    return sum(values) / len(values) if values else None


def _of_evaluation(path: Path) -> list[str]:
    found: Mapping[str, Any] = read_json(path, needs=("intervals", "config", "problems"))
    how = found["config"]
    lines = [f"{found['problems']} problems of {how.get('data')} ({how.get('split')}), "
             f"{max(how.get('k', [1]))} completions each; 95% intervals by bootstrap over the "
             "problems.", "", "| metric | value |", "|---|---|"]  # fmt: skip
    if how.get("early_exit") is not None:
        lines[0] += f" Thoughts were cut by early exit (rule: {how['early_exit']})."
    for metric, ends in found["intervals"].items():
        digits = 5 if metric.startswith("ratio") else 1 if "length" in metric else 3
        lines.append(f"| {metric} | {format_interval((found[metric], *ends), digits)} |")
    return lines


def check_repository(name: str) -> None:
    """Refuse, before any work, a text that can't be the name of a repository on the hub.

    Raises:
        ValueError: naming the text and the required form.
    """
    told = f"push must be owner/name of a repository on the hub, got {shown(name)}"
    try:
        huggingface_hub.utils.validate_repo_id(name)
    except huggingface_hub.utils.HFValidationError as error:
        raise ValueError(told) from error
    if "/" not in name:
        raise ValueError(told)


def push(folder: str | Path, name: str, private: bool = False) -> str:
    """Upload a folder to a repository on the hub, which is created if it does not exist.

    The token is that of ``hf auth login`` or the environment variable ``HF_TOKEN``.

    Args:
        folder: folder that :func:`export` wrote.
        name: ``owner/name``.
        private: whether a new repository is private.

    Returns:
        The address of the commit.

    Raises:
        ValueError: when the hub refuses it or does not answer. The folder is kept.
    """
    api = huggingface_hub.HfApi()
    try:
        api.create_repo(name, private=private, exist_ok=True)
        done = api.upload_folder(
            folder_path=folder, repo_id=name, commit_message="Trained with iapo-mini"
        )
    except Exception as error:  # the client may raise anything; the folder is kept
        raise ValueError(
            f"push is '{name}', which the hub refused ({first_line(error)}); the model is in "
            f"'{folder}'. Log in with `hf auth login` and a token that may write, and push again."
        ) from error
    return str(done.commit_url)
