"""Adapters: new and trained ones, the model that one belongs to, and the result of merging it.

Functions that need model code import it themselves, because whoever reads a run needs none of it.

The folder of an adapter holds ``base.json``: the name of the model that it was trained on, and some
of that model's weights. The name alone is not enough, because the weights at a path can change.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import json
import os
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

from iapo_mini.devices import full_precision
from iapo_mini.errors import first_line
from iapo_mini.files import read_json

BASE, SETTINGS, WEIGHTS = "base.json", "adapter_config.json", "adapter_model.safetensors"
NAMED = ((BASE, "model"), (SETTINGS, "base_model_name_or_path"))
"""Files of an adapter that name its model, and the key of the name."""

_PLAIN = re.compile(r"lora_[AB]\.default\.weight$")
_OF_ADAPTER = re.compile(r"lora_|modules_to_save|trainable_tokens")
_WRAPPED = re.compile(r"^base_model\.model\.|(?<=\.)(?:base_layer|original_module|token_adapter)\.")
_SHAPE = ("peft_type", "r", "lora_alpha", "use_rslora", "use_dora", "target_modules",
          "rank_pattern", "alpha_pattern")  # fmt: skip
"""Settings of an adapter that decide what its weights do."""
_VOCABULARY = re.compile(r"embed|wte|lm_head")

TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.05, torch.float16: 0.01}
"""Largest allowed difference of logits after a merge, as a share of the largest logit."""


def pass_over_old_torchao() -> None:
    """Make peft treat a torchao that is too old for it as absent.

    peft looks for torchao at every LoRA layer and raises ImportError if it finds an old one, as on
    Colab, even when no weight uses torchao.
    """
    import peft.import_utils

    try:
        peft.import_utils.is_torchao_available()
    except ImportError:
        for name, module in list(sys.modules.items()):
            if name.split(".")[0] == "peft" and hasattr(module, "is_torchao_available"):
                vars(module)["is_torchao_available"] = lambda: False


@contextlib.contextmanager
def exchanged(
    parameters: dict[str, torch.nn.Parameter], values: dict[str, torch.Tensor]
) -> Iterator[None]:
    """Let these parameters have other values for a while. No number is copied."""
    own = {name: parameter.data for name, parameter in parameters.items()}
    try:
        for name, value in values.items():
            parameters[name].data = value
        yield
    finally:
        for name, value in own.items():
            parameters[name].data = value


def base_weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Weights of the base model, by their names without an adapter."""
    kind = getattr(getattr(model, "base_model", None), "prefix", None)  # such as "hada_" of LoHa
    return {
        _WRAPPED.sub("", name): p
        for name, p in model.named_parameters()
        if not _OF_ADAPTER.search(name) and not (kind and kind in name)
    }


def fingerprint_of_weights(named: Iterable[tuple[str, torch.Tensor]]) -> str:
    """Hash of a thousand values of every weight, since training changes all and reading is slow."""
    digest = hashlib.sha256()
    for name, weight in named:
        some = weight.detach().flatten()[:: max(1, weight.numel() // 1000)]
        digest.update(name.encode() + some.float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def some_weights(model: torch.nn.Module, count: int = 256) -> list[float]:
    """A few weights of the base model, spread over its parts; 4-bit weights are left out."""
    named = {name: p for name, p in base_weights(model).items() if p.is_floating_point()}
    # Weights that could be in 4 bits are always left out, so the list is the same in both cases.
    kept = [named[n] for n in sorted(named) if named[n].ndim == 1 or _VOCABULARY.search(n)]
    each = max(1, count // max(1, len(kept)))
    values = [p.detach().flatten()[:: max(1, p.numel() // each)][:each].float() for p in kept]
    return torch.cat([v.cpu() for v in values])[:count].tolist() if values else []


def write_base(
    folder: str | Path, model: torch.nn.Module, name: str, asked: dict[str, str]
) -> None:
    """Write ``base.json`` into an adapter's folder; ``asked`` holds subfolder and revision."""
    told = {"model": name, **asked, "weights": some_weights(model)}
    (Path(folder) / BASE).write_text(json.dumps(told) + "\n", encoding="utf-8", newline="\n")


def base_of(adapter: str | Path) -> dict[str, str]:
    """The model that an adapter was trained on, with its subfolder and revision on the hub.

    Empty when the adapter's folder does not name it.
    """
    for file, key in NAMED:
        found = read_json(Path(adapter) / file, {})
        if found.get(key):
            asked = {x: str(found[x]) for x in ("subfolder", "revision") if found.get(x)}
            return {"model": str(found[key]), **asked}
    return {}


def check_base(adapter: str | Path, model: torch.nn.Module, name: str) -> None:
    """Refuse a model if the adapter was trained on another one.

    Raises:
        ValueError: naming both models. Without ``base.json`` there is nothing to compare, and no
            model is refused.
    """
    told = read_json(Path(adapter) / BASE, {})
    try:
        before = torch.tensor(told["weights"])
    except (KeyError, TypeError, ValueError):
        return
    now = torch.tensor(some_weights(model))
    # A weight that is loaded in 16 bits is rounded to three digits.
    same = before.shape == now.shape and torch.allclose(before, now, rtol=0.01, atol=1e-5)
    if not same:
        raise ValueError(
            f"model must be the model that adapter '{adapter}' was trained on, "
            f"'{told.get('model')}', got '{name}', which has other weights"
        )


def is_plain_lora(model: Any) -> bool:
    """Whether an adapter consists only of products of two matrices on linear layers.

    False for DoRA, LoRA on embeddings, biases, ``modules_to_save`` and trainable token indices.
    """
    own = [n for n, _ in model.named_parameters() if _OF_ADAPTER.search(n)]
    head = model.get_output_embeddings()
    # A merge into a shared weight would change the embeddings too.
    shared = hasattr(head, "base_layer") and model.config.get_text_config().tie_word_embeddings
    layers = [m for m in model.modules() if hasattr(m, "get_delta_weight")]
    config = model.peft_config["default"]
    return (
        config.peft_type == "LORA"
        and not shared
        and all(_PLAIN.search(name) for name in own)
        and all(hasattr(m, "base_layer") and hasattr(m.base_layer, "weight") for m in layers)
        and getattr(config, "bias", "none") == "none"
        and not getattr(config, "use_dora", False)
    )


def adapter_state(model: Any) -> list[torch.Tensor]:
    """What a plain LoRA adapter adds to its model follows from this: its scales and weights."""
    scales = [m.scaling["default"] for m in model.modules() if hasattr(m, "get_delta_weight")]
    weights = [p.detach() for n, p in model.named_parameters() if _OF_ADAPTER.search(n)]
    return [torch.tensor(scales), *weights]


def is_trained(model: Any) -> bool:
    """Whether an adapter may change its model. A new LoRA adapter does not, as its B is zero."""
    named = model.named_parameters()
    return not is_plain_lora(model) or any(p.any() for n, p in named if ".lora_B." in n)


def fingerprint_of_adapter(model: Any) -> str:
    """Hash of an adapter's settings, and of its weights if it was trained before."""
    settings = model.peft_config["default"].to_dict()
    kept = {name: settings[name] for name in _SHAPE if name in settings}
    told = json.dumps(kept, sort_keys=True, default=lambda x: sorted(x))
    if is_trained(model):
        named = model.named_parameters()
        told += fingerprint_of_weights((n, p) for n, p in named if p.requires_grad)
    return hashlib.sha256(told.encode()).hexdigest()[:16]


def merged_by_peft(model: Any, device: torch.device) -> Any:
    """A plain model made by peft's merge, which works for more kinds of adapters than ours.

    Raises:
        ValueError: for a kind that peft can't merge.
    """
    try:
        return copy.deepcopy(model).to(device).merge_and_unload()
    except (RuntimeError, ValueError, NotImplementedError) as error:
        raise ValueError(
            f"the adapter can't be merged into its model ({first_line(error)}); use it unmerged."
        ) from error


@torch.no_grad()
def check_merge(model: Any, merged: Any, dtype: torch.dtype) -> None:
    """Compare a merged model with the model before the merge, on a few tokens.

    Raises:
        ValueError: when their logits differ by more than ``TOLERANCE``.
    """
    vocabulary = merged.config.get_text_config().vocab_size
    ids = torch.arange(3, 19)[None] * 7 % vocabulary
    training = model.training
    model.eval()
    with full_precision():
        before, after = (
            m(ids.to(next(m.parameters()).device), use_cache=False).logits.float().cpu()
            for m in (model, merged)
        )
    model.train(training)
    if not before.isfinite().all():
        return  # an error about such weights is raised where they are used
    size = float(before.abs().max())
    error = float((before - after).abs().max())
    if not error <= TOLERANCE.get(dtype, 0.05) * max(size, 1e-3):
        raise ValueError(
            f"the merged model's logits differ by {error:.3g} from those of model and adapter "
            f"(largest logit {size:.3g}); this kind of adapter can't be merged into these weights, "
            "use it unmerged, or on weights that are not in 4 bits."
        )


def with_trained_adapter(causal_lm: Any, adapter: str | Path, model: str) -> Any:
    """Load a trained adapter from a folder onto the model; ``model`` is its name in messages."""
    from peft import PeftModel

    from iapo_mini.model_files import by_older_names, without_dropout

    if not os.path.isfile(Path(adapter) / WEIGHTS):
        raise ValueError(
            "adapter must be a folder in PEFT format, such as a training run writes, got "
            f"'{adapter}', which has no {WEIGHTS}"
        )
    try:
        with by_older_names():
            return without_dropout(PeftModel.from_pretrained(causal_lm, adapter, is_trainable=True))
    except Exception as error:
        raise ValueError(
            f"adapter must be one trained on '{model}', got '{adapter}', which can't be loaded "
            f"onto it ({first_line(error)})"
        ) from error


def with_new_adapter(causal_lm: Any, rank: int, alpha: int, seed: int) -> Any:
    """Add a new adapter, which does not change the output yet, without using the global seed."""
    from peft import LoraConfig, get_peft_model

    from iapo_mini.model_files import by_older_names

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        # "all-linear" takes every linear layer except the vocabulary head, whatever their names.
        # With QLoRA that matters more than the rank (arXiv 2305.14314, figure 2).
        config = LoraConfig(
            r=rank, lora_alpha=alpha, target_modules="all-linear", task_type="CAUSAL_LM"
        )
        with by_older_names():
            return get_peft_model(causal_lm, config)
