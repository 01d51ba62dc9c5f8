"""Ask a policy something after every prefix of every completion, in one of three ways.

The question is a suffix of K tokens, and the answer is the model's prediction at the suffix's last
positions. A completion of L tokens has L + 1 questions. The three ways differ only in what they
avoid computing twice (paper, Section 4, "Estimating s"):

* ``naive``: the definition. Every prefix is run again from its first token.
* ``cached``: KV-cache preloading with chunk-wise forwarding, as the paper describes. The trunk
  (prompt and completion) is run once, and its cache is copied once per prefix, C prefixes at a
  time.
* ``packed``: the trunk is run once and no cache is copied. All branches use the same keys and
  values, and each sees only its own prefix. :mod:`iapo_mini.early_exit.flat` does this without
  padding for the Llama family. Other models with a KV cache run C branches at a time, as one
  sequence under a 4-D mask.

All give the same numbers up to rounding.
"""

from __future__ import annotations

import inspect
import warnings
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from iapo_mini.attention import check_positions, model_mask, sliding_window
from iapo_mini.early_exit import flat
from iapo_mini.early_exit.question import EVERY_PREFIX, EarlyExit, Question
from iapo_mini.errors import first_line
from iapo_mini.logprobs import plain_model, trunk_blocks
from iapo_mini.rollouts import Rollouts

Chunk = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""Row numbers (N,), prefix lengths (N,) and logits (N, keep, V) of some branches."""

TESTED = (*flat.FAMILIES, "gpt2")
"""Model types that the tests compare with the definition. Others are compared at first use."""

_VERDICTS: weakref.WeakKeyDictionary[torch.nn.Module, bool] = weakref.WeakKeyDictionary()

_OUT_OF_MEMORY = (torch.OutOfMemoryError, MemoryError)


@dataclass(frozen=True)
class Case:
    """The inputs of a way to ask; the rows to work on are given separately.

    Attributes:
        model: the causal LM, without peft's wrapper.
        rollouts: B rows.
        asked: (B, L + 1) bool, prefix lengths to ask after.
        suffix: (B, K) long.
        keep: number of last positions of the suffix at which logits are computed.
    """

    model: Any
    rollouts: Rollouts
    asked: torch.Tensor
    suffix: torch.Tensor
    keep: int


Way = Callable[[Case, list[int], int], Iterator[Chunk]]
"""(case, row numbers, branches at a time) -> predictions, chunk by chunk."""


def packing_problem(model: Any, length: int) -> str | None:
    """The reason why branches can't share a cache in this model, or None if they can.

    Args:
        model: causal LM.
        length: number of tokens of the longest prompt, completion and suffix together.
    """
    config = model.config
    if config._attn_implementation not in ("sdpa", "eager"):
        return f"its attention ({config._attn_implementation}) takes no 4-D mask"
    if "position_ids" not in inspect.signature(model.forward).parameters:
        return "it takes no position ids"
    if any(not isinstance(layer, DynamicLayer) for layer in DynamicCache(config=config).layers):
        return "some of its layers have no KV cache"
    window = sliding_window(config)
    if window is not None and window < length:
        return f"its sliding window of {window} is shorter than the sequence of {length} tokens"
    return None


def branch_inputs(
    trunk_mask: torch.Tensor,
    position_ids: torch.Tensor,
    ends: torch.Tensor,
    suffix: torch.Tensor,
) -> dict[str, torch.Tensor]:
    """Model inputs that append one branch after each of C trunk positions of every row.

    All branches of a row form one sequence of C * K tokens behind the trunk's KV cache. A branch
    sees the real trunk tokens up to its end and its own earlier tokens, and its position ids
    continue from that end. So C early answers cost one forward pass and no copy of the cache.

    Args:
        trunk_mask: (B, T) bool, real tokens of the cached trunk.
        position_ids: (B, T) long, position of every trunk token.
        ends: (B, C) long, index of the trunk token that each branch follows.
        suffix: (K,) or (B, K) long.

    Returns:
        ``input_ids`` (B, C*K), ``attention_mask`` (B, 1, C*K, T + C*K) bool, ``position_ids``
        (B, C*K). The last token of branch j is at index j*K + K - 1.
    """
    (rows, branches), k = ends.shape, suffix.shape[-1]
    device = trunk_mask.device
    trunk = trunk_mask[:, None] & (
        torch.arange(trunk_mask.shape[1], device=device) <= ends[:, :, None]
    )
    number = torch.arange(branches * k, device=device) // k
    own = (number[:, None] == number).tril()
    mask = torch.cat([trunk.repeat_interleave(k, dim=1), own.expand(rows, -1, -1)], dim=2)
    positions = position_ids.gather(1, ends)[:, :, None] + 1 + torch.arange(k, device=device)
    return {
        "input_ids": suffix.expand(rows, k).repeat(1, branches),
        "attention_mask": mask[:, None],
        "position_ids": positions.flatten(1),
    }


def _naive(case: Case, rows: list[int], size: int) -> Iterator[Chunk]:
    """Run one full forward pass per row and prefix, without sharing or padding."""
    rollouts = case.rollouts
    for i in rows:
        prompt = rollouts.prompt_ids[i][rollouts.prompt_mask[i]]
        completion = rollouts.completion_ids[i][rollouts.completion_mask[i]]
        for t in case.asked[i].nonzero()[:, 0]:
            ids = torch.cat([prompt, completion[:t], case.suffix[i]])
            logits = case.model(ids[None], logits_to_keep=case.keep).logits
            yield torch.full_like(t[None], i), t[None], logits


def _cached(case: Case, rows: list[int], size: int) -> Iterator[Chunk]:
    """Copy the row's cache for each of ``size`` prefixes at a time; masks hide later tokens."""
    model, rollouts = case.model, case.rollouts
    k, width = case.suffix.shape[1], rollouts.prompt_ids.shape[1]
    for trunk in trunk_blocks(model, rollouts, 1, need_logits=False, rows=rows):
        i = int(trunk.rows)
        if not case.asked[i].any():
            continue
        for t in case.asked[i].nonzero()[:, 0].split(size):
            longest = width + int(t[-1])
            cache = DynamicCache(
                [
                    tuple(
                        x[:, :, :longest].repeat_interleave(len(t), 0) for x in (y.keys, y.values)
                    )
                    for y in trunk.cache.layers
                ]
            )
            seen = trunk.mask[:, :longest] & (
                torch.arange(longest, device=t.device) < (width + t)[:, None]
            )
            own = torch.ones(k, k, dtype=torch.bool, device=t.device).tril()
            mask = torch.cat([seen[:, None].expand(-1, k, -1), own.expand(len(t), -1, -1)], dim=2)
            start = trunk.mask[0, :width].sum() + t
            logits = model(
                case.suffix[i].expand(len(t), -1),
                attention_mask=model_mask(model, mask[:, None]),
                position_ids=start[:, None] + torch.arange(k, device=t.device),
                past_key_values=cache,
                logits_to_keep=case.keep,
            ).logits
            yield torch.full_like(t, i), t, logits


def _packed(case: Case, rows: list[int], size: int) -> Iterator[Chunk]:
    """Run ``size`` branches of every row of a block as one sequence behind the shared cache."""
    model, suffix, keep = case.model, case.suffix, case.keep
    k, width = suffix.shape[1], case.rollouts.prompt_ids.shape[1]
    last = torch.arange(k - keep, k, device=suffix.device)
    for trunk in trunk_blocks(model, case.rollouts, min(8, size), need_logits=False, rows=rows):
        here = case.asked[trunk.rows].any(0).nonzero()[:, 0]
        if not len(here):
            continue
        for t in here.split(max(1, size // len(trunk.rows))):
            ends = (width - 1 + t).expand(len(trunk.rows), -1)
            inputs = branch_inputs(trunk.mask, trunk.position_ids, ends, suffix[trunk.rows])
            inputs["attention_mask"] = model_mask(model, inputs["attention_mask"])
            wanted = (torch.arange(len(t), device=t.device)[:, None] * k + last).flatten()
            logits = model(past_key_values=trunk.cache, logits_to_keep=wanted, **inputs).logits
            trunk.cache.crop(-len(t) * k)
            real = case.asked[trunk.rows][:, t]
            branch_rows = trunk.rows[:, None].expand_as(real)
            yield branch_rows[real], t.expand_as(real)[real], logits.unflatten(1, (-1, keep))[real]


def _flat(case: Case, rows: list[int], size: int) -> Iterator[Chunk]:
    """Run flat packing, with the vocabulary head on ``size`` branches at a time."""
    found = flat.run_branches(case.model, case.rollouts, rows, case.asked, case.suffix, case.keep)
    head = case.model.get_output_embeddings()
    # The logits should fit the processor's cache, but reading the head's weights must pay as well.
    size = min(size, max(12, 2**19 // case.model.config.vocab_size))
    for row, t, hidden in zip(*(x.split(size) for x in found)):
        yield row, t, head(hidden)


def _values(way: Way, case: Case, rows: list[int], size: int, question: Question) -> list[Chunk]:
    """The values that the question computes from each branch, in place of the logits."""
    head = case.model.get_output_embeddings() if way is _flat else None
    # Exactly this class, since an adapter on the head or 4-bit weights give other logits.
    if question.read_hidden is not None and type(head) is torch.nn.Linear:
        row, t, hidden = flat.run_branches(
            case.model, case.rollouts, rows, case.asked, case.suffix, case.keep
        )
        return [(row, t, question.read_hidden(head, hidden))]
    return [
        (row, t, question.read(row, logits).float()) for row, t, logits in way(case, rows, size)
    ]


def _sizes(case: Case, way: Way, memory: float) -> tuple[int, int]:
    """Numbers of rows and of branches that fit into ``memory`` bytes at once, each at least 1."""
    rollouts, keep = case.rollouts, case.keep
    config, k = case.model.config.get_text_config(), case.suffix.shape[1]
    width = next(case.model.parameters()).element_size()
    hidden, layers = config.hidden_size, config.num_hidden_layers
    length = rollouts.prompt_ids.shape[1] + rollouts.completion_ids.shape[1] + 1
    inner = getattr(config, "intermediate_size", None) or 4 * hidden
    # The logits in the model's dtype, a copy in fp32, and one temporary in fp32.
    logits = keep * config.vocab_size * (width + 8)
    if way is _flat:
        branches = rollouts.completion_ids.shape[1] + 1
        row = width * hidden * (length + branches * k) * 6  # hidden, q, k, v, attention output
        return max(1, int(memory / 8 / row)), max(1, int(memory / 4 / logits))
    branch = logits + k * width * (3 * inner + 8 * hidden) + k * length * 5  # mask, bool and float
    if way is _cached:
        kv_heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        kv = hidden * kv_heads // config.num_attention_heads
        # A copy of the cache per branch. Appending the suffix copies it again, layer by layer.
        branch += 2 * (layers + 1) * length * kv * width + 2 * length * hidden * width
    return len(rollouts.lengths), max(1, int(memory / 2 / branch))


def _agrees(case: Case) -> bool:
    """Whether packing agrees with the definition, before and after the longest completion."""
    row = int(case.rollouts.lengths.argmax())
    asked = torch.zeros_like(case.asked)
    asked[row, [0, int(case.rollouts.lengths[row])]] = True
    ends = replace(case, asked=asked)
    packed, naive = (
        torch.cat([logits for _, _, logits in way(ends, [row], 2)]).softmax(-1)
        for way in (_packed, _naive)
    )
    return bool((packed.float() - naive.float()).abs().max() < 0.02)  # bf16 rounds to 1 in 256


def _common(ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Number of first tokens that each pair of rows shares, (G, G); ids and mask (G, L)."""
    same = (ids[:, None] == ids) & mask[:, None] & mask
    # The first difference; as bytes, because long completions make this tensor large.
    return torch.nn.functional.pad(~same, (0, 1), value=True).byte().argmax(-1)


def _shared_prefixes(rollouts: Rollouts) -> tuple[torch.Tensor, torch.Tensor]:
    """For each row, an earlier row of its group and the number of first tokens that they share.

    Completions of one prompt often begin alike, and a common prefix need not be asked twice.

    Returns:
        ``(donor, shared)``, each (B,) long. The first row of a group has no donor: it names itself,
        and ``shared`` is -1, because not even the empty prefix has been asked before.
    """
    group = rollouts.num_generations
    ids, mask = (
        x.unflatten(0, (-1, group)) for x in (rollouts.completion_ids, rollouts.completion_mask)
    )
    common = torch.stack([_common(*pair) for pair in zip(ids, mask)])  # (prompts, G, G)
    earlier = torch.ones(group, group, dtype=torch.bool, device=ids.device).tril(-1)
    shared, donor = common.masked_fill(~earlier, -1).max(-1)
    first = torch.arange(len(ids), device=ids.device)[:, None] * group
    donor = torch.where(shared < 0, torch.arange(group, device=ids.device), donor)
    return (donor + first).flatten(), shared.flatten()


def _way_for(case: Case, way: str) -> Way:
    """The function for a way to ask; it is ``naive`` if branches can't share a cache."""
    if way == "naive":
        return _naive
    model, rollouts = case.model, case.rollouts
    length = rollouts.prompt_ids.shape[1] + rollouts.completion_ids.shape[1] + case.suffix.shape[1]
    problem = packing_problem(model, length)
    if problem is None and model.config.model_type not in TESTED:
        if model not in _VERDICTS:
            _VERDICTS[model] = _agrees(case)
        problem = None if _VERDICTS[model] else "its masks or positions work differently"
    if problem:
        warnings.warn(
            f"early answers of {type(model).__name__} can't share a cache: {problem}. "
            "Every prefix is run from its start instead (way='naive'), which is slow.",
            stacklevel=4,
        )
        return _naive
    if way == "cached":
        return _cached
    return _flat if flat.walkable(model) else _packed


def _in_order(rollouts: Rollouts, way: Way) -> list[int]:
    """Row numbers sorted by length, so the rows of a block have similar lengths."""
    rows: list[int] = rollouts.lengths.argsort(stable=True).tolist()
    if way is _flat and rollouts.cache is None:  # groups stay together to run their prompt once
        group = rollouts.num_generations
        order = dict.fromkeys(i // group for i in rows)
        rows = [j * group + i for j in order for i in range(group)]
    return rows


def _answers(case: Case, question: Question, way: Way, how: EarlyExit) -> torch.Tensor:
    """Ask after every prefix in ``case.asked``, in blocks that fit the memory; (B, L + 1, r)."""
    rows, width = case.rollouts.completion_ids.shape
    memory_mb, chunk_size, out = how.memory_mb, how.chunk_size, None
    pending = _in_order(case.rollouts, way)
    while pending:
        rows_at_once, branches = _sizes(case, way, memory_mb * 2**20)
        branches = chunk_size or branches
        try:
            parts = _values(way, case, pending[:rows_at_once], branches, question)
        except _OUT_OF_MEMORY as error:
            if branches == 1 and (way is not _flat or rows_at_once == 1):
                raise
            memory_mb, chunk_size = memory_mb / 2, chunk_size and max(1, chunk_size // 2)
            warnings.warn(
                f"out of memory in the estimator ({first_line(error)[:80]}); "
                f"continuing with memory_mb={memory_mb:g}.",
                stacklevel=3,
            )
            continue
        for row, t, values in parts:
            if out is None:
                shape = (rows, width + 1, values.shape[1])
                out = torch.zeros(shape, device=case.suffix.device)
            out[row, t] = values
        pending = pending[rows_at_once:]
    assert out is not None  # the caller has checked that something is asked
    return out


@torch.no_grad()
def ask(
    model: Any,
    rollouts: Rollouts,
    question: Question,
    how: EarlyExit = EVERY_PREFIX,
    asked: torch.Tensor | None = None,
) -> torch.Tensor:
    """Append a suffix after every chosen prefix and read the predictions at its last positions.

    No tensor of shape (B, L, V) is ever made: ``question.read`` gets the logits of as many branches
    as fit in ``how.memory_mb``. If memory still runs out, the budget is halved with a warning and
    the block is run again.

    Args:
        model: any causal LM. If it has no KV cache or a sliding window shorter than the sequences,
            the definition (``naive``) is used instead, with a warning.
        rollouts: B rows, rows of one prompt adjacent.
        question: the suffix and the values to compute from the predictions.
        how: way and memory; its postfix and stride are already in ``question`` and ``asked``.
        asked: (B, L + 1) bool, prefix lengths to ask after; default: 0 to each row's length.

    Returns:
        (B, L + 1, r) fp32; zeros at prefixes that were not asked.

    Raises:
        ValueError: when no prefix is asked, or the model has too few positions.
    """
    rows, width = rollouts.completion_ids.shape
    t = torch.arange(width + 1, device=rollouts.completion_ids.device)
    reached = t <= rollouts.lengths[:, None]
    asked = reached if asked is None else asked & reached
    if not asked.any():
        raise ValueError("asked must hold at least one prefix within the completions, got none")
    suffix = question.suffix.expand(rows, -1)
    case = Case(plain_model(model), rollouts, asked, suffix, question.keep)
    tokens = rollouts.prompt_mask.sum(1) + rollouts.lengths
    check_positions(case.model, int(tokens.max()) + suffix.shape[1])
    way = _way_for(case, how.way)
    alike = not question.by_row and bool((suffix == suffix[:1]).all())
    if way is _naive or not alike:
        return _answers(case, question, way, how)
    donor, shared = _shared_prefixes(rollouts)
    known = asked & asked[donor] & (t <= shared[:, None])
    out = _answers(replace(case, asked=asked & ~known), question, way, how)
    for i in range(1, rollouts.num_generations):  # a donor comes before the rows that copy from it
        some = slice(i, None, rollouts.num_generations)
        out[some] = torch.where(known[some, :, None], out[donor[some]], out[some])
    return out
