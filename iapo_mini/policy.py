"""The policy: tokenizer + causal language model, LoRA by default, reference = adapter switched off.

``load_policy()`` gives the embedded policy that ships with the package; any causal LM folder or hub
id goes the same way. Nothing is unpickled and no remote code runs.
"""

from __future__ import annotations

import contextlib
import copy
import os
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import huggingface_hub
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

EMBEDDED = "embedded"
"""Name under which the shipped policy is loaded."""

EMBEDDED_UNCALIBRATED = "embedded-uncalibrated"
"""A second shipped policy, trained on whole chains only: what goes wrong without calibration."""

_SHIPPED = {
    EMBEDDED: Path(__file__).parent / "embedded",
    EMBEDDED_UNCALIBRATED: Path(__file__).parent / "embedded_uncalibrated",
}
# Below this many parameters a second, merged copy of the weights is cheap and makes sampling and
# the estimator about twice as fast as going through the adapter's extra layers.
_MERGED_COPY_LIMIT = 50_000_000


_LOAD_ERRORS = (OSError, ValueError, RuntimeError, KeyError, SafetensorError)


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(":. ")


@dataclass
class Policy:
    """A policy pi_theta with what is needed to talk to it.

    Attributes:
        model: causal LM; a ``PeftModel`` when LoRA is used.
        tokenizer: its tokenizer, padding on the left.
        frozen: copy of the start weights for full fine-tuning with a KL term, else None.
    """

    model: torch.nn.Module
    tokenizer: transformers.PreTrainedTokenizerBase
    frozen: PreTrainedModel | None = None
    _merged: PreTrainedModel | None = None

    @property
    def device(self) -> torch.device:
        """Device of the first parameter."""
        return next(self.model.parameters()).device

    @property
    def uses_lora(self) -> bool:
        """Whether only adapter weights are trained."""
        return isinstance(self.model, PeftModel)

    @property
    def eos_ids(self) -> torch.Tensor:
        """Token ids that end a completion, shape (E,), from the generation config."""
        ids = self.model.generation_config.eos_token_id
        ids = self.tokenizer.eos_token_id if ids is None else ids
        return torch.tensor(ids if isinstance(ids, list) else [ids], device=self.device)

    @contextlib.contextmanager
    def reference(self) -> Iterator[torch.nn.Module]:
        """The reference policy pi_ref: the start weights, without a second copy under LoRA.

        Raises:
            ValueError: under full fine-tuning when no frozen copy was kept at load.
        """
        if self.uses_lora:
            with self.model.disable_adapter():
                yield self.model
        elif self.frozen is not None:
            yield self.frozen
        else:
            raise ValueError(
                "the policy is fully fine-tuned and kept no reference; "
                "load it with keep_reference=True."
            )

    def for_inference(self) -> torch.nn.Module:
        """The model to sample and estimate with, in eval mode.

        Small LoRA policies are merged into a plain copy that is refreshed on every call (equal to
        the adapter's forward up to rounding); other policies are returned as they are.
        """
        self.model.eval()
        if not self.uses_lora or self.model.num_parameters() > _MERGED_COPY_LIMIT:
            return self.model
        base = self.model.get_base_model()
        with torch.no_grad():
            if self._merged is None:
                self._merged = _plain_copy(base)
            for name, layer in base.named_modules():
                if hasattr(layer, "get_delta_weight"):
                    target = self._merged.get_submodule(name).weight
                    target.copy_(layer.base_layer.weight + layer.get_delta_weight("default"))
        return self._merged

    def trainable(self) -> dict[str, torch.nn.Parameter]:
        """Parameters that are trained, by name."""
        return {n: p for n, p in self.model.named_parameters() if p.requires_grad}

    def save(self, folder: str | Path) -> None:
        """Write the adapter in PEFT format (LoRA) or the whole model, and the tokenizer."""
        self.model.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)


def _plain_copy(base: PreTrainedModel) -> PreTrainedModel:
    """A model without adapter layers and with its own storage for every weight."""
    plain = copy.deepcopy(base)
    for name, layer in list(plain.named_modules()):
        if hasattr(layer, "base_layer"):
            plain.set_submodule(name, layer.base_layer)
    return plain.requires_grad_(False).eval()


def _model_source(model: str) -> str:
    """Folder or hub id to load from, refused early when it can't be a model."""
    if model in _SHIPPED:
        return str(_SHIPPED[model])
    path = Path(model)
    looks_local = path.exists() or path.is_absolute() or model.startswith((".", "~"))
    if not looks_local:
        return model  # a hub id
    path = path.expanduser()
    if not (path / "config.json").is_file():
        raise ValueError(
            f"model is '{model}', which is no model folder (it has no config.json); allowed are "
            f"'{EMBEDDED}', a folder written by save_pretrained, or a hub id."
        )
    if not list(path.glob("*.safetensors")):
        raise ValueError(
            f"model is '{model}', which holds no *.safetensors; pickled weights are never loaded."
        )
    return str(path)


def load_policy(
    model: str = EMBEDDED,
    *,
    adapter: str | Path | None = None,
    lora_rank: int = 16,
    lora_alpha: int | None = None,
    keep_reference: bool = False,
    seed: int = 0,
    device: str | None = None,
    dtype: torch.dtype = torch.float32,
) -> Policy:
    """Load a policy.

    Args:
        model: ``"embedded"``, ``"embedded-uncalibrated"``, a folder written by
            ``save_pretrained``, or a hub id.
        adapter: folder of a trained PEFT adapter to continue from or to evaluate.
        lora_rank: rank of new LoRA matrices on all linear layers; 0 trains every weight.
        lora_alpha: LoRA scale numerator, default ``2 * lora_rank``.
        keep_reference: keep a frozen copy of the weights (full fine-tuning with a KL term).
        seed: seed of the LoRA initialisation.
        device: default is the first CUDA device, else the CPU.
        dtype: dtype of the weights.

    Raises:
        ValueError: when ``model`` or ``adapter`` can't be loaded, naming it and what is allowed.
    """
    if lora_rank < 0:
        raise ValueError(f"lora_rank is {lora_rank}; allowed are 0 (full fine-tuning) and above.")
    source = _model_source(model)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    # Weight-loading bars and advice lines of the libraries would drown our own output.
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    huggingface_hub.utils.logging.set_verbosity_error()
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, padding_side="left")
        causal_lm = AutoModelForCausalLM.from_pretrained(source, dtype=dtype, use_safetensors=True)
    except _LOAD_ERRORS as error:
        reason = _first_line(error)
        raise ValueError(
            f"model is '{model}' and can't be loaded ({reason}); allowed are '{EMBEDDED}', a "
            "folder written by save_pretrained, or a hub id that this machine can reach."
        ) from error
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    causal_lm.to(device)
    frozen = copy.deepcopy(causal_lm).requires_grad_(False).eval() if keep_reference else None
    if adapter is not None:
        if not os.path.isfile(Path(adapter) / "adapter_model.safetensors"):
            raise ValueError(
                f"adapter is '{adapter}', which has no adapter_model.safetensors; allowed is a "
                "folder in PEFT format, such as the one a training run writes."
            )
        try:
            peft = PeftModel.from_pretrained(causal_lm, adapter, is_trainable=True)
        except _LOAD_ERRORS as error:
            raise ValueError(
                f"adapter is '{adapter}' and can't be loaded onto '{model}' "
                f"({_first_line(error)}); allowed is an adapter trained on this model."
            ) from error
        return Policy(peft, tokenizer, frozen)
    if lora_rank == 0:
        return Policy(causal_lm, tokenizer, frozen)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = LoraConfig(
            r=lora_rank,
            lora_alpha=lora_alpha if lora_alpha is not None else 2 * lora_rank,
            target_modules="all-linear",
            task_type="CAUSAL_LM",
        )
        with warnings.catch_warnings():
            # peft asks transformers about gradient checkpointing by its older name.
            warnings.simplefilter("ignore", FutureWarning)
            peft = get_peft_model(causal_lm, config)
    return Policy(peft, tokenizer, None)
