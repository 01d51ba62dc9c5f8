"""A plan of memory and time for the paper's setting on 1, 8 and 64 cards; nothing is measured.

``iapo-mini plan --scale`` prints :func:`scale_table`. Memory comes from the shapes of
:mod:`iapo_mini.tools.planner` and the rules of DeepSpeed's ZeRO; time comes from operations and
bytes over what a card can do, times the assumed shares below. Only one number was measured, on a
CPU: the time of the estimator over that of the update.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from iapo_mini.config import CARDS, TrainConfig
from iapo_mini.tools.planner import CONTEXT_GB, FRAGMENTATION, GB, SHAPES, Shape, plan

CARD_MEMORY = 80.0
"""GB of the card of the plan, an H100 with 80 GB."""

FILLED = 0.9
"""Share of that memory that a plan may fill."""

OPERATIONS, SHARE_OF_OPERATIONS = 989e12, 0.35
"""Dense 16-bit operations of that card a second, and the share that training should reach."""

BANDWIDTH, SHARE_OF_BANDWIDTH = 3.35e12, 0.6
"""Bytes a second of its memory, and the share that sampling should reach."""

LINK = {"inside": 200e9, "between": 25e9}
"""Bytes a second that a card is assumed to exchange inside a machine of eight, and between them."""

TOKEN_SECONDS = 0.005
"""Assumed time of launching the kernels of one token of sampling, seconds."""

INFORMATION_OVER_UPDATE = 0.65
"""Time of the estimator over that of the update. It was measured on a CPU for the shape of
Qwen2.5-0.5B, with a question after every token (figures/results/estimator.json)."""

PROMPT, MEAN, LONGEST, LIMIT = 200, 300, 1000, 2048
"""Assumed tokens: of a prompt, of a mean and of the longest completion; and the length limit."""

PROMPTS, GROUP, QUESTIONS, EPOCHS = 12, 8, 7473, 2
"""The paper's prompts per step, completions per prompt, training questions of GSM8K, and epochs."""

VLLM_SHARE, ESTIMATOR_GB = 0.35, 2.0
"""Share of a card for vLLM, and GB for the estimator, as in examples/gsm8k_8gpu.yaml."""

LOGIT = 8
"""Bytes per logit in TRL's loss (an estimate): in 16 bits, over the temperature, its gradient, and
rows of fp32."""


@dataclass(frozen=True)
class Row:
    """The plan for one model on some cards.

    Attributes:
        way: what is trained, and how it is divided.
        completions: completions of a step on all cards.
        micro: completions in one backward pass of a card.
        gb: memory of a card, GB of 2**30 bytes.
        seconds: phase of a step -> seconds.
        hours: hours for ``EPOCHS`` epochs of GSM8K.
    """

    way: str
    completions: int
    micro: int
    gb: float
    seconds: dict[str, float]
    hours: float


def parameters(model: Shape) -> int:
    """Number of parameters of a model."""
    return model.other + sum(inputs * outputs for inputs, outputs in model.linear)


def full_gb(model: Shape, cards: int, stage: int, micro: int) -> float:
    """GB of a card in full fine-tuning with AdamW, gradient checkpointing and vLLM beside it.

    Args:
        model: from ``SHAPES``.
        cards: number of cards among which the state is divided.
        stage: ZeRO stage. Stage 2 divides gradients, fp32 weights and moments, stage 3 also the
            16-bit weights, which are gathered for sampling and for the estimator.
        micro: completions in one backward pass.
    """
    n, tokens = parameters(model), micro * (PROMPT + LIMIT)
    state = 2 * n / (cards if stage == 3 else 1) + (2 + 12) * n / cards
    asked = ESTIMATOR_GB * GB + (2 * n if stage == 3 else 0)
    layer = 2 * tokens * (4 * model.hidden + 4 * model.heads * model.head_dim + 3 * model.inner)
    update = 2 * model.layers * tokens * model.hidden + layer
    update += LOGIT * micro * LIMIT * model.vocabulary
    held = state + max(asked, update)
    return VLLM_SHARE * CARD_MEMORY + held * (1 + FRAGMENTATION) / GB + CONTEXT_GB


def _memory(model: Shape, cards: int, rows: int) -> tuple[str, int, int, float]:
    """(way, ZeRO stage, completions in a backward pass, GB): the simplest way that fits a card.

    Stage 0 stands for an adapter on 4-bit weights.
    """
    for stage in (2, 3) if cards > 1 else (2,):
        for micro in (16, 8, 4, 2, 1):
            gb = full_gb(model, cards, stage, micro)
            if gb <= FILLED * CARD_MEMORY and micro <= rows:
                way = f"full, ZeRO-{stage}" if cards > 1 else "full"
                return way, stage, micro, gb
    settings = TrainConfig(**{
        **CARDS["24gb"], "engine": "vllm", "vllm_gpu_memory_utilization": VLLM_SHARE,
        "prompts_per_step": PROMPTS, "max_completion_length": LIMIT,
        "estimator_memory_mb": 1024 * ESTIMATOR_GB,
    })  # fmt: skip
    planned = plan(model, settings, PROMPT, gpu_gb=CARD_MEMORY)
    return "LoRA, 4 bits", 0, settings.micro_batch_size, planned.total / GB


def scale_row(model: Shape, cards: int) -> Row:
    """The plan for a model on a number of cards.

    A step has the paper's 96 completions, or eight for each card if that is more.
    """
    n = parameters(model)
    prompts = max(PROMPTS, cards)
    rows = prompts * GROUP // cards
    way, stage, micro, gb = _memory(model, cards, rows)
    speed = SHARE_OF_OPERATIONS * OPERATIONS
    tokens = rows * (PROMPT + MEAN)
    cache = 4 * model.layers * model.kv_heads * model.head_dim * rows * (PROMPT + MEAN)
    read = (2 * n + cache) / (SHARE_OF_BANDWIDTH * BANDWIDTH)
    # Forward, again for checkpointing, gradient of inputs and, without an adapter, of weights; and
    # two passes for the old and the reference log-probabilities.
    work = (6 if stage == 0 else 8) + 2 * 2
    update = work * n * tokens / speed
    link = LINK["inside" if cards <= 8 else "between"]
    exchanged = 4 * n + (6 * n * math.ceil(rows / micro) if stage == 3 else 0)
    seconds = {
        "sampling": LONGEST * (TOKEN_SECONDS + max(read, 2 * n * rows / speed)),
        "information": INFORMATION_OVER_UPDATE * update,
        "update": update,
        "exchange": exchanged / link if cards > 1 else 0.0,
    }
    steps = math.ceil(EPOCHS * QUESTIONS / prompts)
    hours = steps * sum(seconds.values()) / 3600
    return Row(way, prompts * GROUP, micro, gb, seconds, hours)


def scale_table() -> str:
    """Markdown table of the plan for three models on 1, 8 and 64 cards."""
    phases = ("sampling", "information", "update", "exchange")
    lines = [
        "| model | cards | trained | completions a step | per backward pass | GB a card | "
        + " | ".join(f"{phase}, s" for phase in phases)
        + " | step, s | hours | card hours |",
        "|---|" + "---|" * (8 + len(phases)),
    ]
    for name in ("qwen2.5-0.5b", "qwen2.5-1.5b", "qwen2.5-7b"):
        for cards in (1, 8, 64):
            row = scale_row(SHAPES[name], cards)
            cells = [
                name.replace("qwen", "Qwen").replace("b", "B"), str(cards), row.way,
                str(row.completions), str(row.micro), f"{row.gb:.0f}",
                *(f"{row.seconds[phase]:.2g}" for phase in phases),
                f"{sum(row.seconds.values()):.2g}", f"{row.hours:.2g}",
                f"{row.hours * cards:.2g}",
            ]  # fmt: skip
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)
