"""Load, check and read back weights in bitsandbytes' NF4 (QLoRA, arXiv 2305.14314).

Each block of 64 weights in memory shares a scale, and each weight is one of 16 levels times that
scale. The scales themselves are kept in 8 bits (double quantisation).
"""

from __future__ import annotations

from typing import Any

import torch
from peft import prepare_model_for_kbit_training
from peft.utils.integrations import dequantize_bnb_weight
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel

from iapo_mini.errors import first_line

BLOCK = 64
"""Number of weights that share a scale."""


def check_four_bit(device: str) -> None:
    """Quantise a few numbers, to find a broken installation before a model is read.

    Raises:
        ValueError: when bitsandbytes is missing or fails on this device.
    """
    try:
        import bitsandbytes

        bitsandbytes.functional.quantize_4bit(torch.ones(64, 64, device=device), quant_type="nf4")
    except (ImportError, OSError, RuntimeError, AttributeError, NotImplementedError) as error:
        raise ValueError(
            f"four_bit is True, but bitsandbytes can't quantise on this machine's {device} "
            f"({first_line(error)}); install it with pip install 'iapo-mini[four-bit]', or set "
            "four_bit=False (--no-four-bit on the command line)."
        ) from error


def load_four_bit(
    source: str, device: str, dtype: torch.dtype, **asked: str
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """Load a causal LM with all linear layers in NF4, except the vocabulary head.

    Args:
        source: folder or hub id.
        device: where the weights are quantised and kept.
        dtype: dtype of the weights that are not quantised, and of the arithmetic.
        asked: subfolder and revision of a hub id, where they are given.

    Returns:
        The model, and transformers' report about the weights that it found.
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
        # On CPUs with AVX512-BF16 the first forward pass in eval mode would repack the weights in
        # place for a kernel without autograd. Training would then fail or learn nothing.
        layer.support_avx512bf16_for_cpu = False
    return model, told


def prepare_for_adapter(
    model: PreTrainedModel, dtype: torch.dtype, gradient_checkpointing: bool
) -> PreTrainedModel:
    """Freeze a 4-bit model in place, but let gradients flow through it to an adapter."""
    model = prepare_model_for_kbit_training(
        model,
        use_gradient_checkpointing=gradient_checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False},
    )
    for parameter in model.parameters():
        # The call above makes everything that is not quantised fp32. That would cost two gigabytes
        # for the vocabulary of a 7B model, and activations and cache would be fp32 as well.
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)
    return model


def _quantised_layers(model: torch.nn.Module) -> list[Any]:
    from bitsandbytes.nn import Linear4bit

    return [module for module in model.modules() if isinstance(module, Linear4bit)]


def check_rows(name: str, model: PreTrainedModel) -> None:
    """Refuse a model if bitsandbytes silently reads its 4-bit rows back wrongly on this CPU.

    Rows that consist of whole blocks are read back rightly everywhere. For other rows, bitsandbytes
    (0.50) is right on most processors, where it takes the scales of the blocks in memory. On
    processors with AVX512 it counts blocks from the start of each row, which is wrong. So this is
    tried out.

    Args:
        name: the model's name, for the message.
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
    """Whether bitsandbytes on this CPU reads rows of 4-bit weights back within NF4's precision.

    Args:
        length: number of weights in a row.
        dtype: dtype of the weights before and after.
    """
    from bitsandbytes import functional

    # 64 rows make whole blocks, whatever their length. Every other block is three times as large,
    # so using the scale of a neighbour gives a visible error.
    blocks = torch.randn(length, BLOCK, generator=torch.Generator().manual_seed(0))
    blocks[1::2] *= 3
    rows = blocks.view(BLOCK, length).to(dtype)
    packed, state = functional.quantize_4bit(rows, compress_statistics=True, quant_type="nf4")
    # On a CPU, the forward pass, the backward pass and merging all begin with this function.
    back = functional.dequantize_4bit(packed, state)
    error = (back.float() - rows.float()).abs().view(-1, BLOCK)
    scales = rows.float().abs().view(-1, BLOCK).amax(1)
    # Three errors add up. The nearest level is at most half the widest gap between levels away,
    # times the scale, which is the largest weight of the block. The scale itself is off by at most
    # one gap of its own levels, times the largest distance of a scale from the mean scale. The
    # result is rounded.
    nearest = state.code.diff().max() / 2 * scales
    scale_error = state.state2.code.diff().max() * (scales - scales.mean()).abs().max()
    rounding = torch.finfo(dtype).eps * scales
    return bool((error <= (nearest + scale_error + rounding)[:, None]).all())


def plain_weight(layer: Any) -> torch.Tensor:
    """The weight of a layer as plain numbers, dequantised if it is kept in 4 bits."""
    weight = layer.weight
    return dequantize_bnb_weight(weight) if hasattr(weight, "quant_state") else weight
