"""Flat packing: early answers after every prefix, without padded tokens.

All real trunk tokens of a block of rows (each prompt once per group, then every completion) and all
branch tokens (a suffix after every chosen prefix) go through the decoder together, layer by layer.
So the keys and values of only one layer exist at a time, and no cache is copied per prefix.

The attention of a branch token has two parts: over the trunk up to the branch's own prefix (a fused
call per row, whose mask is a view of one triangle), and over the branch itself (at most K x K).
Each part is normalised separately, and the two are merged exactly by their log-sum-exps. Work that
is not needed is left out. The last layer computes only the keys and values of the trunk and the
queries of the kept positions. If sampling has kept its keys and values (``rollouts.cache``), the
trunk is not run at all.

The code computes the decoder layer of the Llama family (pre-norm, rotary positions, gated MLP).
``iapo_mini.early_exit.prefixes`` handles other causal LMs.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from iapo_mini.early_exit.layout import Row, lay_out
from iapo_mini.memory import CARD_BLOCK
from iapo_mini.rollouts import Cache, Rollouts

FAMILIES = ("qwen2", "qwen3", "llama", "gemma")
"""Values of ``config.model_type`` whose decoder layers this module can compute."""

Turns = tuple[torch.Tensor, torch.Tensor]
"""Cosines and sines of rotary positions."""

Call = tuple[slice, int, torch.Tensor]
"""One attention call of a row: its slice of branches, number of trunk tokens they see, the mask."""

_QUERIES = 128  # per attention call; keys after the last of them are left out of the call


def walkable(model: Any) -> bool:
    """Whether :func:`run_branches` can serve this causal LM."""
    config = model.config
    rope = getattr(config, "rope_parameters", None) or {}
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    # "dynamic" and "longrope" change all rotations with the length of the sequence.
    fixed = rope.get("rope_type", "default") in ("default", "linear", "llama3", "yarn")
    return config.model_type in FAMILIES and kinds == {"full_attention"} and fixed


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, out: torch.Tensor) -> None:
    """Rotary positions; x and out (..., heads, D), cos and sin (..., D / 2)."""
    cos, sin = cos[..., None, :], sin[..., None, :]
    (a, b), (to_a, to_b) = x.chunk(2, dim=-1), out.chunk(2, dim=-1)
    torch.mul(a, cos, out=to_a).addcmul_(b, sin, value=-1)
    torch.mul(b, cos, out=to_b).addcmul_(a, sin)


def attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention, and the log-sum-exp of its scores, which is needed to merge it with another part.

    Args:
        query: (N, Q, heads, D): N queries in each of Q sets; heads is a multiple of key heads.
        key, value: (S, key heads, D), shared by all sets.
        mask: (N, S), 0 or -inf, in the dtype of the query.
        scale: factor of the scores.

    Returns:
        Output (N, Q, heads, D) and log-sum-exp (N, Q, heads) fp32.
    """
    sets = query.unflatten(2, (key.shape[1], -1)).permute(1, 3, 2, 0, 4)
    shape = sets.shape[:2]
    sets = sets.flatten(0, 1)  # (Q * heads per key head, key heads, N, D)
    key, value = (x.transpose(0, 1).expand(len(sets), -1, -1, -1) for x in (key, value))
    if query.device.type == "cpu":
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            sets, key, value, attn_mask=mask[None, None], scale=scale
        )
    else:
        scores = (sets @ key.transpose(-1, -2)).float() * scale + mask.float()
        lse = scores.logsumexp(-1)
        out = (scores - lse[..., None]).exp_().to(value.dtype) @ value
    out = out.unflatten(0, shape).permute(3, 0, 2, 1, 4).flatten(2, 3)
    return out, lse.unflatten(0, shape).permute(3, 0, 2, 1).flatten(2, 3)


_MERGED_BY_TOKEN = 6  # longest suffix for which one token at a time costs less


def _merge_own(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    trunk_out: torch.Tensor,
    trunk_lse: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    """Merge the trunk part of each branch token's attention with the part over its own branch.

    ``query`` and ``trunk_out`` (N, Q, heads, D) are of the last Q positions of N branches, ``key``
    and ``value`` (N, K, key heads, D) of all K, ``trunk_lse`` (N, Q, heads). Returns
    (N, Q, heads * D).
    """
    heads, places, length = (key.shape[2], -1), query.shape[1], key.shape[1]
    query, trunk_out, trunk_lse = (x.unflatten(2, heads) for x in (query, trunk_out, trunk_lse))
    if length > _MERGED_BY_TOKEN:
        scores = torch.einsum("nqhgd,nkhd->nqhgk", query, key).float() * scale
        later = torch.ones(places, length, dtype=torch.bool, device=key.device)
        later = later.triu(length - places + 1)[:, None, None]
        scores = scores.masked_fill(later, float("-inf"))
        lse = torch.logaddexp(trunk_lse, scores.logsumexp(-1))[..., None]
        own = torch.einsum("nqhgk,nkhd->nqhgd", (scores - lse).exp_().to(value.dtype), value)
        return (own + trunk_out * (trunk_lse[..., None] - lse).exp().to(value.dtype)).flatten(2)
    out = torch.empty_like(query)
    for i in range(places):
        merged, lse = trunk_out[:, i], trunk_lse[:, i]
        for j in range(length - places + i + 1):  # the token itself and earlier ones
            score = torch.linalg.vecdot(query[:, i], key[:, j, :, None]).float() * scale
            share = torch.sigmoid(score - lse).to(value.dtype)[..., None]
            merged = torch.lerp(merged, value[:, j, :, None], share)
            lse = torch.logaddexp(lse, score)
        out[:, i] = merged
    return out.flatten(2)


def _even(total: int, most: int) -> int:
    """Size of about equal parts of at most ``most``, so no call is wasted on a small remainder."""
    parts = max(1, math.ceil(total / most))
    return max(1, math.ceil(total / parts))


def _attention_calls(row: Row, triangle: torch.Tensor) -> Iterator[Call]:
    """Split a row's branches into calls ``(slice of branches, trunk tokens they see, mask)``."""
    size = _even(len(row.asked), _QUERIES)
    for i in range(0, len(row.asked), size):
        at = row.start - 1 + row.asked[i : i + size]  # last trunk token that each branch sees
        n = int(at[-1]) + 1
        neighbours = n - int(at[0]) == len(at)  # then the mask is a view
        mask = triangle[n - len(at) : n, :n] if neighbours else triangle[at, :n]
        yield slice(row.branches.start + i, row.branches.start + i + len(at)), n, mask


@dataclass
class _Tokens:
    """Trunk or branch tokens on their way through the layers, and buffers of the current layer.

    Attributes:
        hidden: (T, d) for the trunk, (N, K, d) for the branches; layers add to it in place.
        turns: cosines and sines of every token's rotation, each (T or N, K, D / 2).
        query, attended: (T or N, K, heads, D); key, value: the same with the key heads.
    """

    hidden: torch.Tensor
    turns: Turns
    query: torch.Tensor
    attended: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor


def _tokens(hidden: torch.Tensor, turns: Turns, config: Any, head_dim: int) -> _Tokens:
    places = hidden.shape[:-1]
    query, attended = hidden.new_empty(2, *places, config.num_attention_heads, head_dim)
    key, value = hidden.new_empty(2, *places, config.num_key_value_heads, head_dim)
    return _Tokens(hidden, turns, query, attended, key, value)


@dataclass(frozen=True)
class _Scores:
    """The keys that every token sees.

    Attributes:
        rows: completions, each with its attention calls (:func:`_attention_calls`).
        prompts: slices of the trunk, one for each prompt.
        triangle: (S, S), 0 up to the diagonal, -inf beyond.
        cache: keys and values that sampling has kept, by row and layer, or None.
    """

    rows: list[tuple[Row, list[Call]]]
    prompts: list[slice]
    triangle: torch.Tensor
    cache: Cache | None


def _project(
    attention: Any, name: str, x: torch.Tensor, out: torch.Tensor, turns: Turns | None = None
) -> None:
    """Compute queries or keys (normed, rotated) or values of normed ``x`` into (..., heads, D)."""
    y = getattr(attention, f"{name}_proj")(x).unflatten(-1, (-1, out.shape[-1]))
    norm = getattr(attention, f"{name}_norm", None)
    y = y if norm is None else norm(y)
    if turns is None:
        out.copy_(y)
    else:
        _rotate(y, *turns, out)


def _project_trunk(layer: Any, trunk: _Tokens, size: int, queries: bool) -> None:
    """Compute keys and values of all trunk tokens, and their queries if they are needed."""
    for x, c, s, to_k, to_v, to_q in _in_blocks(
        size, trunk.hidden, *trunk.turns, trunk.key, trunk.value, trunk.query
    ):
        x = layer.input_layernorm(x)
        _project(layer.self_attn, "k", x, to_k, (c, s))
        _project(layer.self_attn, "v", x, to_v)
        if queries:
            _project(layer.self_attn, "q", x, to_q, (c, s))


def _project_branches(layer: Any, branch: _Tokens, size: int, skip: int, alike: bool) -> None:
    """Compute keys and values of all branch tokens, and queries from position ``skip`` on."""
    for x, c, s, to_k, to_v, to_q in _in_blocks(
        size, branch.hidden, *branch.turns, branch.key, branch.value, branch.query
    ):
        x = layer.input_layernorm(x[:1] if alike else x)
        _project(layer.self_attn, "k", x, to_k, (c, s))
        _project(layer.self_attn, "v", x, to_v)
        # Without contiguous() this would become one matrix product for each branch.
        _project(
            layer.self_attn, "q", x[:, skip:].contiguous(), to_q[:, skip:],
            (c[:, skip:], s[:, skip:]),
        )  # fmt: skip


def _attend_trunk(
    trunk: _Tokens,
    own: slice,
    keys: torch.Tensor,
    values: torch.Tensor,
    scores: _Scores,
    scale: float,
) -> None:
    """Causal attention of the trunk tokens ``own``, which are the last ones of a sequence."""
    query, out = trunk.query[own], trunk.attended[own]
    first = len(keys) - len(query)
    for i in range(0, len(query), _QUERIES):
        part = slice(i, min(i + _QUERIES, len(query)))
        n = first + part.stop
        mask = scores.triangle[first + i : n, :n]
        out[part] = attend(query[part, None], keys[:n], values[:n], mask, scale)[0][:, 0]


def _attend(
    trunk: _Tokens, branch: _Tokens, scores: _Scores, number: int, scale: float, skip: int | None
) -> torch.Tensor:
    """Attention of all trunk tokens, and of all branch tokens over the trunk.

    Args:
        number: number of the layer.
        skip: number of branch positions that are not needed, in the last layer, where the trunk
            tokens need no attention; None in the other layers.

    Returns:
        (N, K, heads) fp32, log-sum-exp of the trunk part of each branch token.
    """
    last, skip = skip is not None, skip or 0
    lse = branch.query.new_empty(branch.query.shape[:-1], dtype=torch.float32)
    for p in scores.prompts if not last else ():
        _attend_trunk(trunk, p, trunk.key[p], trunk.value[p], scores, scale)
    for row, parts in scores.rows:
        if scores.cache is None:
            keys, values = (
                torch.cat([x[row.prompt], x[row.completion]]) for x in (trunk.key, trunk.value)
            )
        else:
            keys, values = scores.cache[row.number][number]
        if not last:
            _attend_trunk(trunk, row.completion, keys, values, scores, scale)
        for part, n, mask in parts:
            branch.attended[part, skip:], lse[part, skip:] = attend(
                branch.query[part, skip:], keys[:n], values[:n], mask, scale
            )
    return lse


def _in_blocks(size: int, *tensors: torch.Tensor) -> Iterator[tuple[torch.Tensor, ...]]:
    return zip(*(x.split(size) for x in tensors))


def _feed_forward(layer: Any, x: torch.Tensor) -> torch.Tensor:
    """The layer's gated MLP; the product is computed in place."""
    inner = layer.mlp.act_fn(layer.mlp.gate_proj(x)).mul_(layer.mlp.up_proj(x))
    return layer.mlp.down_proj(inner)


def _finish_branches(layer: Any, branch: _Tokens, lse: torch.Tensor, size: int, skip: int) -> None:
    """Merge in attention over the own branch, then apply output projection and MLP.

    Only positions from ``skip`` on are computed.
    """
    attention = layer.self_attn
    branch.hidden = branch.hidden[:, skip:]
    for x, q, k, v, o, e in _in_blocks(
        size, branch.hidden, branch.query[:, skip:], branch.key, branch.value,
        branch.attended[:, skip:], lse[:, skip:],
    ):  # fmt: skip
        merged = _merge_own(q, k, v, o, e, attention.scaling)
        x += attention.o_proj(merged.flatten(2))
        x += _feed_forward(layer, layer.post_attention_layernorm(x))


def run_branches(
    model: Any,
    rollouts: Rollouts,
    rows: list[int],
    asked: torch.Tensor,
    suffix: torch.Tensor,
    keep: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Append a suffix after every chosen prefix and return the inputs of the vocabulary head.

    Args:
        model: causal LM for which :func:`walkable` is True; LoRA and quantised layers are allowed.
        rollouts: rows of one prompt are adjacent.
        rows: numbers of the rows of this block.
        asked: (B, L + 1) bool, the prefix lengths to ask after.
        suffix: (B, K) long, the tokens to append.
        keep: number of last positions of the suffix to return.

    Returns:
        ``(row, prefix, hidden)``: (N,) long, (N,) long and (N, keep, d) for N branches.
    """
    decoder, config = model.get_decoder(), model.config
    ids, positions, prompts, layout = lay_out(rollouts, rows, asked)
    device, k = ids.device, suffix.shape[1]
    owner = torch.cat([torch.full_like(row.asked, i) for i, row in enumerate(layout)])
    ends = torch.cat([row.start + row.asked for row in layout])
    branch_positions = ends[:, None] + torch.arange(k, device=device)
    alike = bool((suffix[rows] == suffix[rows[0]]).all())  # then branches are equal before layer 0

    head_dim = decoder.layers[0].self_attn.head_dim
    length = max(row.length for row in layout) + k
    embedded = decoder.embed_tokens(ids)
    cos, sin = decoder.rotary_emb(embedded, torch.arange(length, device=device)[None])
    cos, sin = cos[0, :, : head_dim // 2], sin[0, :, : head_dim // 2]
    trunk = _tokens(embedded, (cos[positions], sin[positions]), config, head_dim)
    branch = _tokens(
        decoder.embed_tokens(suffix[rows])[owner],
        (cos[branch_positions], sin[branch_positions]), config, head_dim,
    )  # fmt: skip
    triangle = torch.full((length, length), float("-inf"), dtype=embedded.dtype, device=device)
    triangle = triangle.triu(1)
    calls = [(row, list(_attention_calls(row, triangle))) for row in layout]
    scores = _Scores(calls, prompts, triangle, rollouts.cache)
    # Blocks of tokens that fit the processor's cache make this a third faster. A GPU needs large
    # blocks, especially when 4-bit weights are dequantised for every block.
    inner = 2**19 if device.type == "cpu" else CARD_BLOCK
    tokens = max(768, inner // config.intermediate_size)
    branches = _even(len(branch.hidden), max(1, tokens // k))

    for number, layer in enumerate(decoder.layers):
        last = number == len(decoder.layers) - 1
        skip = k - keep if last else 0
        _project_trunk(layer, trunk, tokens, queries=not last)
        _project_branches(layer, branch, branches, skip, alike and number == 0)
        scale = layer.self_attn.scaling
        lse = _attend(trunk, branch, scores, number, scale, skip if last else None)
        _finish_branches(layer, branch, lse, branches, skip)
        for x, o in _in_blocks(tokens, trunk.hidden, trunk.attended) if not last else ():
            x += layer.self_attn.o_proj(o.flatten(1))
            x += _feed_forward(layer, layer.post_attention_layernorm(x))
    prefix = torch.cat([row.asked for row in layout])
    return torch.tensor(rows, device=device)[owner], prefix, decoder.norm(branch.hidden)
