"""What is refused of a model: code, pickles, damaged files, weights that do not fit, encoders."""

from __future__ import annotations

import json
from pathlib import Path, PureWindowsPath
from typing import Any

import torch
from transformers.cache_utils import Cache, DynamicLayer

from iapo_mini.attention import model_mask, positions_of
from iapo_mini.errors import first_line
from iapo_mini.policies import EMBEDDED, SHIPPED, looks_local

SETTINGS = ("config.json", "tokenizer_config.json", "generation_config.json", "tokenizer.json")
"""Files of a model folder that hold one JSON object each, where they are there."""

TOKENIZERS = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.*", "*.tiktoken")
"""Files of which a tokenizer has at least one."""


def model_source(model: str, weights: bool = True) -> str:
    """Folder or hub id to load from, refused early when it can't be a model.

    Raises:
        ValueError: for a folder without config.json or, unless ``weights`` is False, without
            safetensors or tokenizer, one that asks for code of its own or for pickled weights, or
            one whose settings are damaged.
    """
    if model in SHIPPED:
        return str(SHIPPED[model])
    if not looks_local(model):
        return model  # a hub id
    path = Path(model).expanduser()
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
            f"model is '{model}', which holds no *.safetensors; pickled weights are never loaded: "
            "load them where you trust them, and save them again by save_pretrained."
        )
    if weights and not any(True for name in TOKENIZERS for _ in path.glob(name)):
        raise ValueError(
            f"model is '{model}', which holds no tokenizer; copy tokenizer.json and "
            "tokenizer_config.json of the model that it was made from into it."
        )
    settings = _settings(model, path)
    problem = _asks_for_code(settings)
    if problem:
        raise ValueError(f"model is '{model}', {problem}; code from a model is never run.")
    for name, found in settings.items():
        shards = found.get("weight_map", {})
        named = sorted(map(str, shards.values())) if isinstance(shards, dict) else []
        for shard in named if weights else ():
            if not (path / shard).is_file():
                raise ValueError(
                    f"model is '{model}', whose {name} names '{shard}', which is not there; "
                    "complete the folder."
                )
    return str(path)


def of_repository(model: str, subfolder: str, revision: str | None) -> tuple[str, dict[str, str]]:
    """A model that is one of several in a repository, or stands at a revision of it.

    Args:
        model: folder or hub id of the repository.
        subfolder: folder of the model within it, with ``/`` between parts; empty for its top.
        revision: branch, tag or commit on the hub; None for the newest.

    Returns:
        The model (the inner folder of a folder), and what else the hub is asked for.

    Raises:
        ValueError: for a subfolder that leads out of the repository, or a revision of a folder.
    """
    inner = PureWindowsPath(subfolder)  # which takes both kinds of slash, on every system
    if inner.anchor or ".." in inner.parts:
        raise ValueError(
            f"subfolder is '{subfolder}'; allowed is the path of a folder inside '{model}'."
        )
    if not looks_local(model):
        asked = {"subfolder": inner.as_posix() if subfolder else "", "revision": revision or ""}
        return model, {name: value for name, value in asked.items() if value}
    if revision:
        raise ValueError(
            f"revision is '{revision}', but model is '{model}', which is no hub id and has none."
        )
    if model in SHIPPED and subfolder:
        raise ValueError(f"subfolder is '{subfolder}', but model is '{model}', which has none.")
    return (str(Path(model, *inner.parts)) if subfolder else model), {}


def _settings(model: str, folder: Path) -> dict[str, dict]:
    """File name -> what it holds, of every file of settings that is there.

    Whoever reads a damaged one later on may say something else, or go on without it.
    """
    out = {}
    for file in (*map(folder.joinpath, SETTINGS), *sorted(folder.glob("*.index.json"))):
        if not file.exists():
            continue
        try:
            out[file.name] = json.loads(file.read_text(encoding="utf-8"))
            reason = None if isinstance(out[file.name], dict) else "it holds no JSON object"
        except (OSError, ValueError, RecursionError) as error:
            reason = first_line(error)
        if reason:
            raise ValueError(
                f"model is '{model}', whose {file.name} is damaged ({reason}); replace it by that "
                "of the model it was made from."
            )
    return out


def _asks_for_code(settings: dict[str, dict]) -> str | None:
    """What in the settings of a model folder would run code that came with it, or None."""
    for name, found in settings.items():
        if found.get("auto_map"):
            return f"whose {name} asks for code of its own (auto_map)"
        attention = found.get("_attn_implementation") or found.get("attn_implementation")
        if "/" in json.dumps(attention):
            return f"whose {name} asks for a kernel from the hub ({attention})"
        shards = found.get("weight_map")
        for shard in shards.values() if isinstance(shards, dict) else ():
            if not str(shard).endswith(".safetensors") or Path(str(shard)).name != shard:
                return f"whose {name} names '{shard}', which is no safetensors beside it"
    return None


def check_quantised(model: str, config: Any, four_bit: bool) -> None:
    """Refuse weights that were saved quantised, except in bitsandbytes' 4 bits when asked for.

    Others can't be merged with an adapter here, and most need kernels of a certain card.
    """
    told = getattr(config, "quantization_config", None)
    if told is None:
        return
    kind = told.get("quant_method") if isinstance(told, dict) else told
    if isinstance(told, dict) and kind == "bitsandbytes" and told.get("load_in_4bit"):
        if not four_bit:
            raise ValueError(
                f"model is '{model}', whose weights were saved in 4 bits; load them so: "
                "four_bit=True, --four-bit on the command line."
            )
        return
    raise ValueError(
        f"model is '{model}', whose weights were saved quantised (quantization_config: {kind}); "
        "allowed are weights in fp32, bf16 or fp16, which four_bit=True (--four-bit) quantises "
        "when it loads them."
    )


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
        if state is None and type(layer).__name__ == "Linear4bit":
            raise ValueError(
                f"model is '{model}', whose config.json says that its weights are in 4 bits, and "
                f"'{name}.weight' is not; repair its quantization_config."
            )
    if not tokenizer("1 + 1 = 2", add_special_tokens=False)["input_ids"]:
        raise ValueError(
            f"model is '{model}', whose tokenizer knows no token; copy the tokenizer's files of "
            "the model that it was made from into it."
        )
    stops = causal_lm.generation_config.eos_token_id
    for stop in stops if isinstance(stops, list) else [stops]:
        if stop is not None and type(stop) is not int:
            raise ValueError(
                f"model is '{model}', whose generation config names the stop token {stop!r}; "
                "allowed are ids of tokens, whole numbers."
            )
    rows = causal_lm.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > rows:
        raise ValueError(
            f"model must have a tokenizer that fits its embedding, got '{model}' with "
            f"{len(tokenizer)} tokens and {rows} rows"
        )


@torch.no_grad()
def check_forward(model: str, causal_lm: Any) -> None:
    """Refuse an architecture that can't be run as :mod:`iapo_mini.sampling` runs it.

    Eight tokens are run as they are, and again with padding before them, with our positions, masks
    and cache. An encoder shows by what it says of the first tokens; a recurrent model has no keys
    and values to read; others count positions by themselves or need masks of their own.

    Raises:
        ValueError: naming the model and its architecture.
    """
    ids = torch.arange(3, 11, device=next(causal_lm.parameters()).device)[None]
    ids = ids * 7 % causal_lm.get_input_embeddings().weight.shape[0]
    kind = f"model is '{model}', whose architecture ({causal_lm.config.model_type})"
    try:
        whole = causal_lm(ids, use_cache=False).logits[0].float()
        alone = causal_lm(ids[:, :4], use_cache=False).logits[0, -1].float()
        ours = _behind_a_cache(causal_lm, ids).float()
    except Exception as error:  # whatever an architecture may raise, it is not for us
        raise ValueError(
            f"{kind} can't be run with padding, positions and a key-value cache of ours "
            f"({first_line(error)}); take a decoder with attention in every layer, such as Qwen or "
            "Llama."
        ) from error
    if whole.isnan().any():
        raise ValueError(
            f"model is '{model}', whose weights give NaN for the most ordinary tokens; repair its "
            "safetensors, or load them in another dtype."
        )
    never = whole == -torch.inf  # padded rows of a head
    whole, alone = whole.masked_fill(never, 0), alone.masked_fill(never[3], 0)
    ours = ours.masked_fill(never[3:], 0)
    # What is meant is far off; rounding in 16 bits, with experts to choose from, is not.
    tolerance = 1e-3 if causal_lm.dtype == torch.float32 else 0.25
    allowed = tolerance * max(float(whole.abs().max()), 1e-3)
    if float((alone - whole[3]).abs().max()) > allowed:
        raise ValueError(
            f"{kind} is no causal language model: what it says of a token depends on those after "
            "it; take a decoder, such as Qwen or Llama."
        )
    if float((ours - whole[3:]).abs().max()) > allowed:
        raise ValueError(
            f"{kind} says something else with padding, positions and a key-value cache of ours; "
            "take a decoder with attention in every layer, such as Qwen or Llama."
        )


def _behind_a_cache(causal_lm: Any, ids: torch.Tensor) -> torch.Tensor:
    """Logits (5, V) of the last tokens: four in a padded prompt, then three at once, then one."""
    cache = Cache(layer_class_to_replicate=DynamicLayer)
    mask = torch.arange(11, device=ids.device)[None] >= 3
    positions = positions_of(mask)
    padded = torch.nn.functional.pad(ids, (3, 0), value=int(ids[0, 0]))
    first = causal_lm(
        padded[:, :7], attention_mask=mask[:, :7], position_ids=positions[:, :7],
        past_key_values=cache, logits_to_keep=1,
    ).logits[0, -1:]  # fmt: skip
    out = [first]
    for start, end in ((7, 10), (10, 11)):
        seen = torch.ones(end - start, end, dtype=torch.bool, device=ids.device).tril(start)
        logits = causal_lm(
            padded[:, start:end],
            attention_mask=model_mask(causal_lm, (seen & mask[:, :end])[None, None]),
            position_ids=positions[:, start:end],
            past_key_values=cache,
        ).logits
        out.append(logits[0])
    return torch.cat(out)
