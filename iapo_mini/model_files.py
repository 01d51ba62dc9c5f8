"""Checks that refuse a model with code, pickles, damaged files, wrong weights, or an encoder."""

from __future__ import annotations

import contextlib
import json
import warnings
from collections.abc import Iterator
from pathlib import Path, PureWindowsPath
from typing import Any

import huggingface_hub
import torch
import transformers
from transformers.cache_utils import Cache, DynamicLayer

from iapo_mini.attention import model_mask, positions_of
from iapo_mini.devices import full_precision
from iapo_mini.errors import first_line
from iapo_mini.policies import EMBEDDED, SHIPPED, looks_local

SETTINGS = ("config.json", "tokenizer_config.json", "generation_config.json", "tokenizer.json")
"""Files of a model folder that hold one JSON object each. Any of them may be missing."""

TOKENIZERS = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.*", "*.tiktoken")
"""Files of a tokenizer. Every tokenizer has at least one of them."""


def model_source(model: str, weights: bool = True) -> str:
    """Folder or hub id to load from. A folder that can't be a model is refused early.

    Raises:
        ValueError: for a folder without config.json; for one without safetensors or tokenizer,
            unless ``weights`` is False; for one that needs its own code or pickled weights; and for
            one with damaged settings.
    """
    if model in SHIPPED:
        return str(SHIPPED[model])
    if not looks_local(model):
        return model  # a hub id
    path = Path(model).expanduser()
    if not (path / "config.json").is_file() and (path / "adapter_config.json").is_file():
        raise ValueError(
            f"model is '{model}', which is an adapter; use --adapter '{model}' (adapter=), which "
            "finds the model by itself."
        )
    if not (path / "config.json").is_file():
        raise ValueError(
            f"model must be '{EMBEDDED}', a folder written by save_pretrained, or a hub id, got "
            f"'{model}', which is not a model folder (it has no config.json)"
        )
    if weights and not list(path.glob("*.safetensors")):
        raise ValueError(
            f"model is '{model}', which holds no *.safetensors; pickled weights are never loaded. "
            "If you trust them, load them yourself and save them again with save_pretrained."
        )
    if weights and not any(True for name in TOKENIZERS for _ in path.glob(name)):
        raise ValueError(
            f"model is '{model}', which holds no tokenizer; copy into it tokenizer.json and "
            "tokenizer_config.json of the model that it was made from."
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
                    f"model is '{model}', whose {name} names '{shard}', which is missing; "
                    "add the missing files to the folder."
                )
    return str(path)


def of_repository(model: str, subfolder: str, revision: str | None) -> tuple[str, dict[str, str]]:
    """Resolve a model that is one of several in a repository, or a revision of a repository.

    Args:
        model: folder or hub id of the repository.
        subfolder: folder of the model within it, with ``/`` between parts; empty for the top.
        revision: branch, tag or commit on the hub; None for the newest.

    Returns:
        The model (for a local folder, its inner folder), and further arguments for the hub.

    Raises:
        ValueError: for a subfolder that leads out of the repository, or a revision of a folder.
    """
    inner = PureWindowsPath(subfolder)  # which takes both kinds of slash, on every system
    if inner.anchor or ".." in inner.parts:
        raise ValueError(
            f"subfolder is '{subfolder}'; it must be the path of a folder inside '{model}'."
        )
    if not looks_local(model):
        asked = {"subfolder": inner.as_posix() if subfolder else "", "revision": revision or ""}
        return model, {name: value for name, value in asked.items() if value}
    if revision:
        raise ValueError(
            f"revision is '{revision}', but model is '{model}'; only hub ids have revisions."
        )
    if model in SHIPPED and subfolder:
        raise ValueError(
            f"subfolder is '{subfolder}', but model is '{model}', which has no subfolders."
        )
    return (str(Path(model, *inner.parts)) if subfolder else model), {}


def _settings(model: str, folder: Path) -> dict[str, dict]:
    """File name -> content, for every file of settings in the folder.

    Damaged files are refused here, because code that reads them later may give a misleading error
    or ignore the damage.
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
                f"model is '{model}', whose {file.name} is damaged ({reason}); replace it with the "
                "file of the model it was made from."
            )
    return out


def _asks_for_code(settings: dict[str, dict]) -> str | None:
    """A clause about the setting that would run a model's own code; None if there is none."""
    for name, found in settings.items():
        if found.get("auto_map"):
            return f"whose {name} needs code from the model's own files (auto_map)"
        attention = found.get("_attn_implementation") or found.get("attn_implementation")
        if "/" in json.dumps(attention):
            return f"whose {name} needs a kernel from the hub ({attention})"
        shards = found.get("weight_map")
        for shard in shards.values() if isinstance(shards, dict) else ():
            if not str(shard).endswith(".safetensors") or Path(str(shard)).name != shard:
                return f"whose {name} names '{shard}', which is not a safetensors file beside it"
    return None


def check_quantised(model: str, config: Any, four_bit: bool) -> None:
    """Refuse weights that were saved quantised, except bitsandbytes' 4 bits with ``four_bit``.

    Other formats can't be merged with an adapter here, and most need kernels of certain GPUs.
    """
    told = getattr(config, "quantization_config", None)
    if told is None:
        return
    kind = told.get("quant_method") if isinstance(told, dict) else told
    if isinstance(told, dict) and kind == "bitsandbytes" and told.get("load_in_4bit"):
        if not four_bit:
            raise ValueError(
                f"model is '{model}', whose weights were saved in 4 bits; load them with "
                "four_bit=True (--four-bit on the command line)."
            )
        return
    raise ValueError(
        f"model is '{model}', whose weights were saved quantised (quantization_config: {kind}); "
        "use weights in fp32, bf16 or fp16, which four_bit=True (--four-bit) quantises at load."
    )


def check_loaded(model: str, tokenizer: Any, causal_lm: Any, told: Any) -> None:
    """Refuse weights that do not fit the architecture. transformers would replace them at random.

    Args:
        told: the report of ``from_pretrained`` about the keys.
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
            raise ValueError(  # transformers does not report this for 4-bit weights
                f"model is '{model}', which has in another shape the weight '{name}.weight'; "
                "repair its safetensors or its config.json."
            )
        if state is None and type(layer).__name__ == "Linear4bit":
            raise ValueError(
                f"model is '{model}', whose config.json says that its weights are in 4 bits, but "
                f"'{name}.weight' is not; repair its quantization_config."
            )
    if not tokenizer("1 + 1 = 2", add_special_tokens=False)["input_ids"]:
        raise ValueError(
            f"model is '{model}', whose tokenizer has no tokens; copy into it the tokenizer's "
            "files of the model that it was made from."
        )
    stops = causal_lm.generation_config.eos_token_id
    for stop in stops if isinstance(stops, list) else [stops]:
        if stop is not None and type(stop) is not int:
            raise ValueError(
                f"model is '{model}', whose generation config names the stop token {stop!r}; "
                "a stop token must be a token id, a whole number."
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

    Eight tokens are run plainly, and again after padding with our positions, masks and cache. The
    logits must agree. Encoders fail because their logits for the first tokens depend on later ones,
    recurrent models because they have no keys and values, and others because they compute positions
    or masks themselves.

    Raises:
        ValueError: naming the model and its architecture.
    """
    ids = torch.arange(3, 11, device=next(causal_lm.parameters()).device)[None]
    ids = ids * 7 % causal_lm.get_input_embeddings().weight.shape[0]
    kind = f"model is '{model}', whose architecture ({causal_lm.config.model_type})"
    try:
        with full_precision():
            whole = causal_lm(ids, use_cache=False).logits[0].float()
            alone = causal_lm(ids[:, :4], use_cache=False).logits[0, -1].float()
            ours = _behind_a_cache(causal_lm, ids).float()
    except Exception as error:  # an architecture may raise anything; it can't be used here
        raise ValueError(
            f"{kind} can't be run with the padding, positions and key-value cache used here "
            f"({first_line(error)}); take a decoder with attention in every layer, such as Qwen or "
            "Llama."
        ) from error
    if whole.isnan().any():
        raise ValueError(
            f"model is '{model}', whose weights give NaN for ordinary tokens; repair its "
            "safetensors, or load them in another dtype."
        )
    never = whole == -torch.inf  # padded rows of a head
    whole, alone = whole.masked_fill(never, 0), alone.masked_fill(never[3], 0)
    ours = ours.masked_fill(never[3:], 0)
    # Wrong architectures are far off. The tolerance covers rounding in 16 bits, which is larger in
    # mixtures of experts.
    tolerance = 1e-3 if causal_lm.dtype == torch.float32 else 0.25
    allowed = tolerance * max(float(whole.abs().max()), 1e-3)
    if float((alone - whole[3]).abs().max()) > allowed:
        raise ValueError(
            f"{kind} is not a causal language model: its output for a token depends on later "
            "tokens; take a decoder, such as Qwen or Llama."
        )
    if float((ours - whole[3:]).abs().max()) > allowed:
        raise ValueError(
            f"{kind} gives other logits with the padding, positions and key-value cache used here; "
            "take a decoder with attention in every layer, such as Qwen or Llama."
        )


def _behind_a_cache(causal_lm: Any, ids: torch.Tensor) -> torch.Tensor:
    """Logits (5, V) of the last tokens: a padded prompt of four, then three tokens, then one."""
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


def without_dropout(model: Any) -> Any:
    """The same model with every probability of dropout at 0.

    Dropout would make the policy of the update another one than the policy that wrote the
    completions, with noise from the global random state, which no checkpoint holds.
    """
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        for name, value in vars(module).items():
            if "dropout" in name and isinstance(value, float):
                setattr(module, name, 0.0)
    return model


@contextlib.contextmanager
def by_older_names() -> Iterator[None]:
    """Silence transformers' warning about an old name of checkpointing that peft and we use."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        yield


def quiet_libraries() -> None:
    """Switch off the libraries' progress bars, retry notes and advice, to keep output readable."""
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    huggingface_hub.utils.logging.set_verbosity_error()
