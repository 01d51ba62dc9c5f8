"""The policy: a tokenizer and a causal language model, with LoRA by default.

Under a new LoRA adapter the reference policy is the same model with the adapter switched off.
``load_policy()`` loads the embedded policy that ships with the package, or a folder or hub id of
any causal LM. ``four_bit=True`` keeps the weights in bitsandbytes' NF4 (QLoRA, arXiv 2305.14314).
Nothing is unpickled and no remote code runs.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import PeftModel
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from iapo_mini.adapters import (
    adapter_state,
    base_of,
    check_base,
    check_merge,
    exchanged,
    is_plain_lora,
    is_trained,
    merged_by_peft,
    pass_over_old_torchao,
    with_new_adapter,
    with_trained_adapter,
    write_base,
)
from iapo_mini.chat import end_of_turn
from iapo_mini.devices import chosen_device, compute_dtype, has_room_for_copy
from iapo_mini.errors import MOST_RANK, check_number, first_line
from iapo_mini.four_bit import (
    check_four_bit,
    check_rows,
    load_four_bit,
    plain_weight,
    prepare_for_adapter,
)
from iapo_mini.hub import not_loaded, reaching
from iapo_mini.model_files import (
    by_older_names,
    check_forward,
    check_loaded,
    check_quantised,
    model_source,
    of_repository,
    quiet_libraries,
    without_dropout,
)
from iapo_mini.policies import EMBEDDED


@dataclass
class Policy:
    """A policy pi_theta: the model, its tokenizer and its reference.

    Attributes:
        model: causal LM; a ``PeftModel`` when LoRA is used. (The two share no type with the
            methods of both, hence ``Any`` here and where the model is returned.)
        tokenizer: the model's tokenizer, which pads on the left.
        frozen: copy of the reference's weights for full fine-tuning with a KL term, else None.
        start: the adapter's weights in the reference, by name; empty if it has no adapter.
        name: the name, folder or hub id that it was loaded by.
        asked: the subfolder and revision of the hub repository, if they were given.
    """

    model: Any
    tokenizer: transformers.PreTrainedTokenizerBase
    frozen: PreTrainedModel | None = None
    name: str = ""
    asked: dict[str, str] = field(default_factory=dict)
    start: dict[str, torch.Tensor] = field(default_factory=dict)
    _merged: PreTrainedModel | None = None
    _merged_from: list[torch.Tensor] = field(default_factory=list)

    @property
    def device(self) -> torch.device:
        """Device of the first parameter."""
        return next(self.model.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the base weights that are not quantised."""
        return self.model.get_input_embeddings().weight.dtype

    @property
    def uses_lora(self) -> bool:
        """Whether only the adapter's weights are trained."""
        return isinstance(self.model, PeftModel)

    @property
    def eos_ids(self) -> torch.Tensor:
        """Token ids that end a completion, shape (E,); the token that ends a turn comes first.

        These are the ids of the generation config (or of the tokenizer, if it has none) and the
        token after an assistant's turn in the chat template, which some configs do not name.

        Raises:
            ValueError: when there is none.
        """
        given = self.model.generation_config.eos_token_id
        given = self.tokenizer.eos_token_id if given is None else given
        ids = [] if given is None else given if isinstance(given, list) else [given]
        turn = end_of_turn(self.tokenizer)
        ids = list(dict.fromkeys([turn, *ids] if turn is not None else ids))
        if not ids:
            raise ValueError(
                f"model is '{self.tokenizer.name_or_path}', which has no token that ends a "
                "completion; set eos_token in its tokenizer or eos_token_id in its generation "
                "config."
            )
        return torch.tensor(ids, device=self.device)

    def keep_reference(self) -> None:
        """Make the present weights those of the reference policy, as ``train`` does at its start.

        A new adapter adds zero and needs no copy. A trained one is copied. Raises the same errors
        as :meth:`reference`.
        """
        if self.uses_lora and is_trained(self.model):
            self.start = {name: p.detach().clone() for name, p in self.trainable().items()}
        elif not self.uses_lora:
            with self.reference() as reference:
                reference.load_state_dict(self.model.state_dict())

    @contextlib.contextmanager
    def reference(self) -> Iterator[Any]:
        """The reference policy pi_ref, with the weights at the last :meth:`keep_reference`.

        Before such a call it is the model without its adapter.

        Raises:
            ValueError: under full fine-tuning, when no frozen copy was kept at load.
        """
        if self.start:
            with exchanged(self.trainable(), self.start):
                yield self.model
        elif self.uses_lora:
            with self.model.disable_adapter():
                yield self.model
        elif self.frozen is not None:
            yield self.frozen
        else:
            raise ValueError(
                "the policy is fully fine-tuned and has no copy of its start weights; "
                "load it with keep_reference=True."
            )

    def for_inference(self) -> Any:
        """The model to sample and estimate with, in eval mode.

        A small fp32 LoRA policy is merged into a plain copy, which is refreshed when the adapter
        has changed. It equals the adapter's forward up to rounding; 4-bit weights are dequantised.
        Other policies are returned as they are: a copy would be large, and rounding base plus
        adapter to 16 bits would lose most of an adapter that has changed little so far.
        """
        self.model.eval()
        small = self.uses_lora and self.dtype == torch.float32 and is_plain_lora(self.model)
        if not small or not has_room_for_copy(self.device, self.model.num_parameters()):
            return self.model
        state = adapter_state(self.model)
        if self._merged is None:
            self._merged = self.merged()
        elif not all(map(torch.equal, state, self._merged_from)):
            plain = self._merged.state_dict()
            for name, weight in self.merged_weights(adapted_only=True):
                plain[name].copy_(weight)
        else:
            return self._merged
        self._merged_from = [value.clone() for value in state]
        return self._merged

    @torch.no_grad()
    def merged_weights(self, adapted_only: bool = False) -> Iterator[tuple[str, torch.Tensor]]:
        """Name and value of every weight of the plain model that computes the same as this policy.

        The names are those of the architecture without an adapter. Base weights are dequantised,
        the adapter's product is added in fp32, and the sum is rounded to :attr:`dtype`. Merging
        into the quantised weights instead would round each sum to one of 16 values. Layers without
        an adapter never change, and ``adapted_only`` leaves them out.
        """
        if self.uses_lora and not is_plain_lora(self.model):
            yield from self.merged().state_dict().items()
            return
        base = self.model.get_base_model() if self.uses_lora else self.model
        for name, layer in base.named_modules():
            if name.endswith(".base_layer") or ".lora_" in name:
                continue
            prefix = name + "." if name else ""
            if hasattr(layer, "get_delta_weight"):
                inner = layer.base_layer
                delta = layer.get_delta_weight("default")
                yield prefix + "weight", (plain_weight(inner) + delta).to(self.dtype)
                if inner.bias is not None:
                    yield prefix + "bias", inner.bias
                continue
            if adapted_only:
                continue
            for key, value in layer.named_parameters(recurse=False):
                yield prefix + key, plain_weight(layer) if key == "weight" else value
            for key, value in layer.named_buffers(recurse=False):
                if key not in layer._non_persistent_buffers_set:
                    yield prefix + key, value

    def merged(self, device: str | torch.device | None = None) -> PreTrainedModel:
        """A plain model in :attr:`dtype`, without adapter, that computes the same as this policy.

        Args:
            device: where it is built; default is the device of the policy. Choose the CPU for a
                model that does not fit on the GPU beside its 4-bit version.

        Raises:
            ValueError: when the two differ by more than rounding (:func:`adapters.check_merge`).
        """
        device = self.device if device is None else torch.device(device)
        if self.uses_lora and not is_plain_lora(self.model):
            plain = merged_by_peft(self.model, device).requires_grad_(False).eval()
            check_merge(self.model, plain, self.dtype)
            return plain
        base = self.model.get_base_model() if self.uses_lora else self.model
        config = copy.deepcopy(base.config)
        if hasattr(config, "quantization_config"):
            del config.quantization_config
        weights = {name: value.to(device, copy=True) for name, value in self.merged_weights()}
        plain = type(base).from_pretrained(
            None, config=config, state_dict=weights, dtype=self.dtype,
            attn_implementation=base.config._attn_implementation,
        )  # fmt: skip
        plain.generation_config = copy.deepcopy(base.generation_config)
        plain = plain.to(device).requires_grad_(False).eval()
        check_merge(self.model, plain, self.dtype)
        return plain

    def trainable(self) -> dict[str, torch.nn.Parameter]:
        """The trained parameters by name."""
        return {n: p for n, p in self.model.named_parameters() if p.requires_grad}

    def save(self, folder: str | Path) -> None:
        """Write the adapter in PEFT format (LoRA) or the whole model, and the tokenizer."""
        # For an adapter, peft would otherwise ask the hub whether the vocabulary changed.
        settings = {"save_embedding_layers": False} if self.uses_lora else {}
        self.model.save_pretrained(folder, **settings)
        self.tokenizer.save_pretrained(folder)
        if self.uses_lora:
            write_base(folder, self.model, self.name, self.asked)


def load_policy(
    model: str | None = None,
    *,
    subfolder: str = "",
    revision: str | None = None,
    adapter: str | Path | None = None,
    lora_rank: int = 16,
    lora_alpha: int | None = None,
    keep_reference: bool = False,
    seed: int = 0,
    device: str = "auto",
    dtype: torch.dtype | None = None,
    four_bit: bool = False,
    gradient_checkpointing: bool = False,
) -> Policy:
    """Load a policy.

    Args:
        model: ``"embedded"``, ``"embedded-calibrated"``, ``"embedded-uncalibrated"``, a folder
            written by ``save_pretrained``, or a hub id. Default: the model that the adapter was
            trained on, or ``"embedded"`` without an adapter.
        subfolder: folder of the model within a repository that holds several models.
        revision: branch, tag or commit of a hub id.
        adapter: folder of a trained PEFT adapter to continue from or to evaluate.
        lora_rank: rank of new LoRA matrices on all linear layers; 0 trains every weight.
        lora_alpha: LoRA scale numerator, default ``2 * lora_rank``.
        keep_reference: keep a frozen copy of the weights (full fine-tuning with a KL term).
        seed: seed of the LoRA initialisation.
        device: ``"cpu"``, ``"cuda"`` or ``"cuda:1"``; ``"auto"`` is the first CUDA device, or the
            CPU if there is none.
        dtype: dtype of the weights; with ``four_bit``, dtype of the weights that are not quantised
            and of the arithmetic. Default: fp32; with ``four_bit``, a dtype that is fast on the
            device (:func:`compute_dtype`). Adapters are always fp32.
        four_bit: keep linear layers in NF4 with double quantisation (needs bitsandbytes).
        gradient_checkpointing: keep only the input of every decoder layer for the backward pass
            and compute the rest again. This needs a tenth of the memory for activations and a third
            more arithmetic.

    Raises:
        ValueError: when ``model`` or ``adapter`` can't be loaded, naming it and what is allowed, or
            when ``four_bit`` is set on a machine where bitsandbytes does not work.
    """
    check_number("lora_rank", lora_rank, 0, MOST_RANK)
    if model is None:
        base = {} if adapter is None else base_of(adapter)
        model = base.get("model", EMBEDDED)
        subfolder = subfolder or base.get("subfolder", "")
        revision = revision or base.get("revision")
    model, asked = of_repository(model, subfolder, revision)
    source = model_source(model)
    device = chosen_device(device)
    if four_bit:
        check_four_bit(device)
    if dtype is None:
        dtype = compute_dtype(device) if four_bit else torch.float32
    quiet_libraries()
    pass_over_old_torchao()
    tokenizer, causal_lm = _load(
        model, source, asked, device, dtype,
        four_bit=four_bit, checkpointing=gradient_checkpointing,
    )  # fmt: skip
    if four_bit and device == "cpu":
        check_rows(model, causal_lm)
    if gradient_checkpointing and not four_bit:
        with by_older_names():
            causal_lm.gradient_checkpointing_enable({"use_reentrant": False})
    full, frozen = adapter is None and lora_rank == 0, None
    if full and keep_reference:
        frozen = copy.deepcopy(causal_lm).requires_grad_(False).eval()
    if adapter is not None:
        check_base(adapter, causal_lm, model)
        causal_lm = with_trained_adapter(causal_lm, adapter, model)
    elif not full:
        alpha = lora_alpha if lora_alpha is not None else 2 * lora_rank
        causal_lm = with_new_adapter(causal_lm, lora_rank, alpha, seed)
    return Policy(causal_lm, tokenizer, frozen, model, asked)


def _load(
    model: str,
    source: str,
    asked: dict[str, str],
    device: str,
    dtype: torch.dtype,
    *,
    four_bit: bool,
    checkpointing: bool,
) -> tuple[transformers.PreTrainedTokenizerBase, Any]:
    """Load tokenizer and causal LM; any fault of theirs becomes a ValueError of one sentence."""
    within = "".join(f", {name} '{value}'" for name, value in asked.items())
    with reaching(source) as unreached:
        try:
            config = AutoConfig.from_pretrained(source, trust_remote_code=False, **asked)
        except Exception as error:
            raise not_loaded(model, unreached or first_line(error), within) from error
        check_quantised(model, config, four_bit)
        try:
            # If it were unset, transformers would ask on the terminal and wait.
            tokenizer = AutoTokenizer.from_pretrained(
                source, padding_side="left", trust_remote_code=False, **asked
            )
            if tokenizer.pad_token is None:
                tokenizer.pad_token = tokenizer.eos_token
            tokenizer("1 + 1 = 2", padding=True)  # some settings are not read before this call
            causal_lm: Any
            if four_bit:
                causal_lm, told = load_four_bit(source, device, dtype, **asked)
                with by_older_names():
                    causal_lm = prepare_for_adapter(causal_lm, dtype, checkpointing)
            else:
                loaded: Any = AutoModelForCausalLM.from_pretrained(
                    source, dtype=dtype, use_safetensors=True, trust_remote_code=False,
                    output_loading_info=True, ignore_mismatched_sizes=True, **asked,
                )  # fmt: skip
                causal_lm, told = loaded[0].to(device), loaded[1]
        except Exception as error:
            raise not_loaded(model, unreached or first_line(error), within) from error
    check_loaded(model, tokenizer, causal_lm, told)
    check_forward(model, causal_lm)
    return tokenizer, without_dropout(causal_lm)
