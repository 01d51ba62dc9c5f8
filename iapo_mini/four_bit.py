"""Weights in bitsandbytes' NF4 (QLoRA, arXiv 2305.14314): loaded, checked and read back.

Every 64 weights that follow each other in memory share a scale, and each weight is one of 16 levels
times that scale. The scales themselves are kept in 8 bits (double quantisation).
"""

from __future__ import annotations

from typing import Any

import torch
from peft import prepare_model_for_kbit_training
from peft.utils.integrations import dequantize_bnb_weight
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel

from iapo_mini.errors import first_line

BLOCK = 64
"""Weights that share a scale."""


def check_four_bit(device: str) -> None:
    """Quantise a few numbers, so that a broken installation shows before a model is read.

    Raises:
        ValueError: when bitsandbytes is missing or fails on this device.
    """
    try:
        import bitsandbytes

        bitsandbytes.functional.quantize_4bit(torch.ones(64, 64, device=device), quant_type="nf4")
    except (ImportError, OSError, RuntimeError, AttributeError, NotImplementedError) as error:
        raise ValueError(
            f"four_bit is True, but bitsandbytes can't quantise on this machine's {device} "
            f"({first_line(error)}); install it with pip install 'iapo-mini[four-bit]', or go "
            "without it: four_bit=False, --no-four-bit on the command line."
        ) from error


def load_four_bit(
    source: str, device: str, dtype: torch.dtype, **asked: str
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """A causal LM whose linear layers, the vocabulary head excepted, are in NF4.

    Args:
        source: folder or hub id.
        device: where the weights go, and where they are quantised.
        dtype: of all that is not quantised, and of the arithmetic.
        asked: subfolder and revision of a hub id, where they are given.

    Returns:
        The model, and what transformers says of the weights that it found.
    """
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        source,
        dtype=dtype,
        use_safetensors=True,
        trust_remote_code=False,
        device_map=device,
        output_loading_info=True,
        ignore_mismatched_sizes=True,
        quantization_config=BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        ),
        **asked,
    )
    model, told = loaded
    for layer in _quantised_layers(model):
        # On CPUs with AVX512-BF16 the first forward in eval mode would repack the weights in place
        # for a kernel without autograd, after which training fails or learns nothing.
        layer.support_avx512bf16_for_cpu = False
    return model, told


def prepare_for_adapter(
    model: PreTrainedModel, dtype: torch.dtype, gradient_checkpointing: bool
) -> PreTrainedModel:
    """Freeze a model in 4 bits and let gradients flow through it to an adapter, in place."""
    model = prepare_model_for_kbit_training(
        model,
        use_gradient_checkpointing=gradient_checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False},
    )
    for parameter in model.parameters():
        # The line above makes everything that is not quantised fp32; for the vocabulary of a 7B
        # model that is two gigabytes, and activations and cache would be fp32 as well.
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)
    return model


def _quantised_layers(model: torch.nn.Module) -> list[Any]:
    from bitsandbytes.nn import Linear4bit

    return [module for module in model.modules() if isinstance(module, Linear4bit)]


def check_rows(name: str, model: PreTrainedModel) -> None:
    """Refuse a model on a CPU that reads its 4-bit rows back as other numbers, without a word.

    A row of whole blocks is read rightly everywhere. Of others, bitsandbytes (0.50) takes the
    scales rightly from the blocks as they lie in memory, or, on processors with AVX512, wrongly
    counts blocks from the start of each row. So it is asked.

    Args:
        name: the model's, for the message.
        model: loaded by :func:`load_four_bit` onto the CPU.

    Raises:
        ValueError: naming the model and the length of the rows.
    """
    layers = _quantised_layers(model)
    for length in sorted({x.in_features for x in layers if x.in_features % BLOCK}):
        if not reads_back(length, model.dtype):
            raise ValueError(
                f"four_bit is True, but '{name}' has a layer with rows of {length} weights, which "
                "bitsandbytes reads back wrongly on this processor unless they are a multiple of "
                f"{BLOCK}"
            )


def reads_back(length: int, dtype: torch.dtype) -> bool:
    """Whether bitsandbytes, on this CPU, reads rows of 4-bit weights back as well as NF4 can.

    Args:
        length: weights in a row.
        dtype: what the weights are before and after.
    """
    from bitsandbytes import functional

    # 64 rows make whole blocks, whatever their length. Every other block is three times as large,
    # so that the scale of a neighbour shows.
    blocks = torch.randn(length, BLOCK, generator=torch.Generator().manual_seed(0))
    blocks[1::2] *= 3
    rows = blocks.view(BLOCK, length).to(dtype)
    packed, state = functional.quantize_4bit(rows, compress_statistics=True, quant_type="nf4")
    # On a CPU there is this one way back: forward, backward and merging all begin with it.
    back = functional.dequantize_4bit(packed, state)
    error = (back.float() - rows.float()).abs().view(-1, BLOCK)
    scales = rows.float().abs().view(-1, BLOCK).amax(1)
    # The nearest level is at most half the widest gap between levels away, times the scale, which
    # is the largest weight of the block. The scale is off in turn, by at most one gap of its own
    # levels times how far scales stray from their mean. And the result is rounded.
    nearest = state.code.diff().max() / 2 * scales
    scale_error = state.state2.code.diff().max() * (scales - scales.mean()).abs().max()
    rounding = torch.finfo(dtype).eps * scales
    return bool((error <= (nearest + scale_error + rounding)[:, None]).all())


def plain_weight(layer: Any) -> torch.Tensor:
    """The weight of a layer as plain numbers, whether it is kept in 4 bits or not."""
    weight = layer.weight
    return dequantize_bnb_weight(weight) if hasattr(weight, "quant_state") else weight
