"""What is refused of a model's files: code, pickles, weights that do not fit the architecture."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from iapo_mini.policies import EMBEDDED, SHIPPED


def model_source(model: str, weights: bool = True) -> str:
    """Folder or hub id to load from, refused early when it can't be a model.

    Raises:
        ValueError: for a folder without config.json or, unless ``weights`` is False, without
            safetensors, or one that asks for code of its own or for pickled weights.
    """
    if model in SHIPPED:
        return str(SHIPPED[model])
    path = Path(model)
    looks_local = path.exists() or path.is_absolute() or model.startswith((".", "~"))
    if not looks_local:
        return model  # a hub id
    path = path.expanduser()
    if not (path / "config.json").is_file() and (path / "adapter_config.json").is_file():
        raise ValueError(
            f"model is '{model}', which is an adapter; say --adapter '{model}' (adapter=), its "
            "model is found by it."
        )
    if not (path / "config.json").is_file():
        raise ValueError(
            f"model must be '{EMBEDDED}', a folder written by save_pretrained, or a hub id, got "
            f"'{model}', which is no model folder (it has no config.json)"
        )
    if weights and not list(path.glob("*.safetensors")):
        raise ValueError(
            f"model is '{model}', which holds no *.safetensors; pickled weights are never loaded."
        )
    problem = _asks_for_code(path)
    if problem:
        raise ValueError(f"model is '{model}', {problem}; code from a model is never run.")
    return str(path)


def _asks_for_code(folder: Path) -> str | None:
    """What in a model folder would run code that came with it, or None."""
    settings = ("config.json", "tokenizer_config.json", "generation_config.json")
    for file in (*map(folder.joinpath, settings), *sorted(folder.glob("*.index.json"))):
        if not file.is_file():
            continue
        try:
            found = json.loads(file.read_text(encoding="utf-8"))
        except (ValueError, RecursionError):
            continue  # whoever needs it will say so
        if not isinstance(found, dict):
            continue
        if found.get("auto_map"):
            return f"whose {file.name} asks for code of its own (auto_map)"
        attention = found.get("_attn_implementation") or found.get("attn_implementation")
        if "/" in json.dumps(attention):
            return f"whose {file.name} asks for a kernel from the hub ({attention})"
        shards = found.get("weight_map")
        for shard in set(shards.values()) if isinstance(shards, dict) else ():
            if not str(shard).endswith(".safetensors") or Path(str(shard)).name != shard:
                return f"whose {file.name} names '{shard}', which is no safetensors beside it"
    return None


def check_loaded(model: str, tokenizer: Any, causal_lm: Any, told: Any) -> None:
    """Refuse weights that do not fit the architecture: transformers would draw new ones.

    Args:
        told: what ``from_pretrained`` says of the keys.
    """
    for kind, verb in (("missing", "lacks"), ("mismatched", "has in another shape"),
                       ("unexpected", "holds beside its architecture")):  # fmt: skip
        keys = sorted(str(k[0] if isinstance(k, tuple) else k) for k in told[f"{kind}_keys"])
        if keys:
            more = f" and {len(keys) - 1} more" if len(keys) > 1 else ""
            raise ValueError(
                f"model is '{model}', which {verb} the weight '{keys[0]}'{more}; repair its "
                "safetensors or its config.json."
            )
    for name, layer in causal_lm.named_modules():
        state = getattr(getattr(layer, "weight", None), "quant_state", None)
        if state is not None and tuple(state.shape) != (layer.out_features, layer.in_features):
            raise ValueError(  # in 4 bits transformers says nothing of it
                f"model is '{model}', which has in another shape the weight '{name}.weight'; "
                "repair its safetensors or its config.json."
            )
    rows = causal_lm.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > rows:
        raise ValueError(
            f"model must have a tokenizer that fits its embedding, got '{model}' with "
            f"{len(tokenizer)} tokens and {rows} rows"
        )
