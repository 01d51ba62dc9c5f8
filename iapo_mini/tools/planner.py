"""Predict the GPU memory of a training run by part, before anything is loaded.

Weights, adapter, optimiser and cache are counted exactly, and tests compare them with real tensors.
The built-in shapes need no model code. Other architectures are built on torch's ``meta`` device,
which holds shapes but no numbers. Activations are the tensors that decoder layers of the Llama
family keep for the backward pass. Working memory and the CUDA context are estimates, and the table
marks them as such.

A GB is 2**30 bytes here, as on the box of a graphics card and in ``nvidia-smi``.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from iapo_mini.config import TrainConfig
from iapo_mini.errors import MOST_REAL, MOST_TOKENS, check_number, shown
from iapo_mini.memory import CACHE_BLOCK, CARD_BLOCK, LOGIT_BYTES, LOGITS_MB
from iapo_mini.tools import plan_vllm

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

GB = 2**30


@dataclass(frozen=True)
class Shape:
    """The sizes of a causal LM that determine its memory.

    Attributes:
        hidden, inner: widths of the residual stream and of the MLP.
        layers, heads, kv_heads, head_dim: sizes of the decoder.
        vocabulary: rows of the vocabulary head.
        linear: (inputs, outputs) of every linear layer except the vocabulary head.
        other: number of all other parameters: embeddings, head, norms, biases.
    """

    hidden: int
    inner: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    linear: tuple[tuple[int, int], ...]
    other: int


def _qwen2(
    hidden: int, inner: int, layers: int, heads: int, kv_heads: int, vocabulary: int
) -> Shape:
    """Shape of a Qwen2 model: biases on queries, keys, values; two norms per layer; tied head."""
    head_dim = hidden // heads
    kv = kv_heads * head_dim
    layer = ((hidden, hidden), (hidden, kv), (hidden, kv), (hidden, hidden),
             (hidden, inner), (hidden, inner), (inner, hidden))  # fmt: skip
    other = layers * (hidden + 2 * kv + 2 * hidden) + hidden + vocabulary * hidden
    widths = (hidden, inner, layers, heads, kv_heads, head_dim, vocabulary)
    return Shape(*widths, layer * layers, other)


def _untied(model: Shape) -> Shape:
    """The same shape with a vocabulary head that is separate from the embedding."""
    return replace(model, other=model.other + model.vocabulary * model.hidden)


SHAPES = {
    "qwen2.5-0.5b": _qwen2(896, 4864, 24, 14, 2, 151_936),
    "qwen2.5-1.5b": _qwen2(1536, 8960, 28, 12, 2, 151_936),
    "qwen2.5-3b": _qwen2(2048, 11_008, 36, 16, 2, 151_936),
    "qwen2.5-7b": _untied(_qwen2(3584, 18_944, 28, 28, 4, 152_064)),
}
"""Built-in shapes, from the models' config.json, which need no network."""

UNTIED = ("qwen2.5-7b",)
"""Shapes with a vocabulary head that is separate from the embedding."""


def config_of(name: str) -> PreTrainedConfig:
    """The configuration of a built-in shape, for making a model. Imports transformers."""
    from transformers import Qwen2Config

    model = SHAPES[name]
    return Qwen2Config(
        hidden_size=model.hidden, intermediate_size=model.inner, num_hidden_layers=model.layers,
        num_attention_heads=model.heads, num_key_value_heads=model.kv_heads,
        vocab_size=model.vocabulary, tie_word_embeddings=name not in UNTIED,
    )  # fmt: skip


CARD_GB = {"t4": 14.7}
"""Memory in GB of GPUs that are known by name; others are given by size, such as ``12gb``."""

CONTEXT_GB = 0.6
"""Bytes of the CUDA context and kernels before the first tensor; an estimate."""

FRAGMENTATION = 0.05
"""Share of memory that the allocator reserves but can't use; an estimate."""


@dataclass(frozen=True)
class Plan:
    """Memory of a run in bytes.

    Attributes:
        always: part -> bytes held from the first step to the last.
        phases: phase of a step -> part -> bytes held during it. Phases follow each other, so only
            the largest counts.
    """

    always: dict[str, int]
    phases: dict[str, dict[str, int]]

    @property
    def peak(self) -> str:
        """The phase that needs most memory."""
        return max(self.phases, key=lambda name: sum(self.phases[name].values()))

    @property
    def tensors(self) -> int:
        """Bytes of tensors at the peak, as ``torch.cuda.max_memory_allocated`` reports them."""
        return sum(self.always.values()) + sum(self.phases[self.peak].values())

    @property
    def total(self) -> int:
        """Bytes of GPU memory at the peak: tensors, fragmentation and the CUDA context."""
        loose = self.tensors - self.always.get(plan_vllm.PART, 0)  # vLLM reserves one block
        return int(self.tensors + FRAGMENTATION * loose + CONTEXT_GB * GB)


def shape(model: str) -> Shape:
    """The shape of a model, which is built in or taken from its config.json.

    Args:
        model: a key of ``SHAPES``, the hub id of one of them (``Qwen/Qwen2.5-7B-Instruct``), a
            folder, or another hub id that this machine can reach.

    Raises:
        ValueError: when the configuration can't be loaded.
    """
    name = model.rsplit("/", 1)[-1].lower()
    for known, found in SHAPES.items():
        if re.fullmatch(re.escape(known) + r"(-instruct)?", name):
            return found
    from transformers import AutoConfig

    from iapo_mini.hub import reaching
    from iapo_mini.model_files import model_source, quiet_libraries

    quiet_libraries()
    source = model_source(model, weights=False)
    with reaching(source) as unreached:
        try:
            return shape_of(AutoConfig.from_pretrained(source, trust_remote_code=False))
        except (OSError, KeyError) as error:
            raise ValueError(
                "model must be a model folder, a hub id that this machine can reach, or one of "
                f"{', '.join(SHAPES)}, got '{model}', whose config.json can't be loaded"
                + (f" ({unreached})" if unreached else "")
            ) from error


def shape_of(config: PreTrainedConfig) -> Shape:
    """The shape of a causal LM with this configuration, counted on the meta device."""
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    head = model.get_output_embeddings()
    linear = [m for m in model.modules() if isinstance(m, torch.nn.Linear) and m is not head]
    text = config.get_text_config()
    heads, hidden = text.num_attention_heads, text.hidden_size
    return Shape(
        hidden=hidden,
        inner=getattr(text, "intermediate_size", None) or 4 * hidden,
        layers=text.num_hidden_layers,
        heads=heads,
        kv_heads=getattr(text, "num_key_value_heads", None) or heads,
        head_dim=getattr(text, "head_dim", None) or hidden // heads,
        vocabulary=text.vocab_size,
        linear=tuple((m.in_features, m.out_features) for m in linear),
        other=sum(p.numel() for p in model.parameters()) - sum(m.weight.numel() for m in linear),
    )


def card_gb(gpu: str) -> float:
    """Memory of a GPU in GB.

    Raises:
        ValueError: for a GPU that is neither known by name nor given by size.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*gb", gpu.lower())
    if gpu.lower() in CARD_GB:
        return CARD_GB[gpu.lower()]
    if not found or not 0 < float(found[1]) <= MOST_REAL:
        raise ValueError(
            f"gpu must be one of {', '.join(CARD_GB)} or a size, such as 12gb, got {shown(gpu)}"
        )
    return float(found[1])


def weight_bytes(model: Shape, rank: int, four_bit: bool, width: int) -> dict[str, int]:
    """Bytes of model, adapter and optimiser: part -> bytes.

    Args:
        model: shape of a causal LM.
        rank: rank of the adapter on every linear layer except the vocabulary head.
        four_bit: whether those layers are in NF4 with double quantisation. That takes half a byte
            per weight, one byte per 64 weights, four bytes per 256 of these, and a layer's tables.
        width: bytes of a weight that is not quantised.
    """
    adapter = 4 * sum(rank * (inputs + outputs) for inputs, outputs in model.linear)
    inner = sum(inputs * outputs for inputs, outputs in model.linear)
    quantised = 0
    for inputs, outputs in model.linear if four_bit else ():
        blocks = math.ceil(inputs * outputs / 64)
        tables = 4 * (16 + 256 + 1)  # values of NF4, values of the second quantisation, one mean
        quantised += math.ceil(inputs * outputs / 2) + blocks
        quantised += 4 * math.ceil(blocks / 256) + tables
    kept = width * (model.other + (0 if four_bit else inner))
    return {
        "4-bit weights": quantised,
        "16-bit weights" if width == 2 else "weights": kept,
        "adapter": adapter,
        "gradients": adapter,
        "AdamW moments": 2 * adapter,
    }


def cache_bytes(model: Shape, rows: int, prompt: int, completion: int, width: int) -> int:
    """Bytes of the keys and values of ``rows`` completions in the buffers of sampling."""
    # The buffers of sampling.sample grow by a block whenever a token no longer fits.
    length = prompt + CACHE_BLOCK
    while length < prompt + completion:
        length += CACHE_BLOCK + 1
    return 2 * model.layers * rows * model.kv_heads * model.head_dim * length * width


def layer_bytes(model: Shape, rank: int, width: int) -> int:
    """Bytes that one decoder layer with LoRA keeps for one token until the backward pass.

    The adapter computes in fp32. If the model is in 16 bits, the adapter keeps its own copy of the
    input of each of the seven linear layers, and these copies are the larger part.
    """
    queries = model.heads * model.head_dim
    norms = 2 * 4 * model.hidden
    inputs = 4 * (model.hidden * (2 if width == 4 else 5) + queries + model.inner + 7 * rank)
    attention = 4 * queries * width  # queries, keys and values for all heads, output
    return norms + inputs + attention + 3 * model.inner * width


def plan(
    model: Shape, settings: TrainConfig, prompt: int, width: int | None = None,
    gpu_gb: float | None = None,
) -> Plan:  # fmt: skip
    """Predict the memory of a run.

    Args:
        model: from :func:`shape`.
        settings: settings of the run; ``model`` is not used.
        prompt: number of tokens of the longest prompt.
        width: bytes of a weight that is not quantised and of an activation; default 2 with
            ``four_bit``, else 4, as in :func:`iapo_mini.policy.load_policy` on a GPU.
        gpu_gb: memory of the GPU in GB, of which vLLM takes its share; needed with vLLM only.

    Raises:
        ValueError: for a prompt without tokens, full fine-tuning, or too small a share for vLLM.
    """
    check_number("prompt", prompt, 1, MOST_TOKENS)
    if settings.lora_rank < 1:
        raise ValueError(
            "lora_rank must be at least 1 for the planner, which plans only adapters, got 0"
        )
    width = width or (2 if settings.four_bit else 4)
    group, hidden, inner = settings.num_generations, model.hidden, model.inner
    rows, completion = settings.prompts_per_step * group, settings.max_completion_length
    always = weight_bytes(model, settings.lora_rank, settings.four_bit, width)
    kept = left = cache_bytes(model, rows, prompt, completion, width)
    drawn = rows * model.vocabulary * (width + 5 * 4)
    if settings.engine == "vllm":
        token = 2 * model.layers * model.kv_heads * model.head_dim
        parameters = model.other + sum(inputs * outputs for inputs, outputs in model.linear)
        always[plan_vllm.PART] = plan_vllm.vllm_bytes(
            settings.vllm_gpu_memory_utilization, gpu_gb, parameters, 2 * token, prompt + completion
        )
        # No cache is left for the estimator. Log-probabilities are computed in blocks of 16 rows.
        kept = width * token * (settings.prompts_per_step * prompt + 16 * (prompt + completion))
        left, drawn = 0, int(LOGITS_MB * 2**20)
    dequantised = inner * hidden * width if settings.four_bit else 0
    size = settings.micro_batch_size
    if settings.gradient_checkpointing:
        size = min(size, rows)
        tokens = size * (prompt + completion)
        layer = tokens * layer_bytes(model, settings.lora_rank, width)
        kept_by_layers = model.layers * tokens * hidden * width
    else:
        size = min(math.ceil(size / group) * group, rows)
        tokens = size * completion + size // group * prompt
        layer = tokens * layer_bytes(model, settings.lora_rank, width)
        # The keys and values of the prompt are copied for each of its completions.
        copied = size * prompt * 2 * model.heads * model.head_dim * width
        kept_by_layers = model.layers * (layer + copied)
        layer = 0
    # Final hidden states, the ones selected for the head, and the gradients of both.
    kept_by_layers += 4 * size * completion * hidden * width
    logits = min(int(LOGITS_MB * 2**20), LOGIT_BYTES * size * completion * model.vocabulary)
    phases = {
        "sampling": {
            "KV cache": kept,
            # These do not coincide: logits and tensors of their size, the weights of the largest
            # layer, and the buffer of one layer while it grows.
            "working memory (estimate)": max(drawn, dequantised, kept // model.layers),
        },
        "information": {
            "KV cache": left,
            "estimator": int(settings.estimator_memory_mb * 2**20),
            "working memory (estimate)": 10 * CARD_BLOCK + dequantised,
        }
        if settings.recipe().information is not None
        else {},
        "update, at the head": {"activations": kept_by_layers, "logits chunk": logits},
        "update, in a layer": {
            "activations": kept_by_layers + layer,
            "working memory (estimate)": tokens * inner * (2 + width) + dequantised,
        },
    }
    return Plan(always, phases)


def lower(
    model: Shape, settings: TrainConfig, prompt: int, limit: float
) -> list[tuple[str, TrainConfig, Plan]]:
    """Changes of settings, cheapest first, that make a run fit into ``limit`` bytes.

    Returns:
        (change in words, settings with all changes so far, their plan) for each change. The last
        plan fits, unless nothing is left to lower.
    """

    def halved(name: str, least: int) -> dict:
        value = getattr(settings, name)
        return {name: max(least, value // 2)} if value > least else {}

    steps: list[tuple[str, TrainConfig, Plan]] = []
    now = plan(model, settings, prompt, gpu_gb=limit / GB)
    while now.total > limit:
        options = (  # from the smallest loss of time to the largest
            {} if settings.four_bit else {"four_bit": True},
            {} if settings.gradient_checkpointing else {"gradient_checkpointing": True},
            halved("micro_batch_size", 1 if settings.gradient_checkpointing else 8),
            halved("prompts_per_step", 1),
            halved("estimator_memory_mb", 64),
            halved("max_completion_length", 128),
        )
        for change in filter(None, options):
            changed = replace(settings, **change)
            after = plan(model, changed, prompt, gpu_gb=limit / GB)
            if after.total < 0.99 * now.total:
                break
        else:
            return steps
        ((name, value),) = change.items()
        steps.append((f"{name} {getattr(settings, name)} -> {value}", changed, after))
        settings, now = changed, after
    return steps


def plan_table(plans: dict[str, Plan]) -> str:
    """Markdown table of plans side by side, in GB, with the keys of ``plans`` as column heads."""
    columns = list(plans.values())
    parts = [("always", part) for part in dict.fromkeys(p for x in columns for p in x.always)]
    parts += dict.fromkeys(
        (phase, part) for x in columns for phase, held in x.phases.items() for part in held
    )
    lines = [
        "| when | part | " + " | ".join(plans) + " |",
        "|---|---|" + "---|" * len(plans),
    ]
    for phase, part in parts:
        held = [{"always": x.always, **x.phases}[phase].get(part, 0) for x in columns]
        if any(held):
            cells = " | ".join(f"{size / GB:.2f}" if size else "" for size in held)
            lines.append(f"| {phase} | {part} | {cells} |")
    slack = " | ".join(f"{(x.total - x.tensors) / GB:.2f}" for x in columns)
    lines.append(f"| always | CUDA context and fragmentation (estimate) | {slack} |")
    peaks = " | ".join(f"**{x.total / GB:.1f}** ({x.peak})" for x in columns)
    lines.append(f"| | **peak** (during) | {peaks} |")
    return "\n".join(lines)
