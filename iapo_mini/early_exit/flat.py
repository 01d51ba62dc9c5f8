"""Flat packing: early answers after every prefix without one padded token.

All real trunk tokens of a block of rows (each prompt once per group, then every completion) and all
branch tokens (a suffix after every asked prefix) are walked through the decoder together, layer by
layer, so keys and values of only one layer exist at a time and no cache is copied per prefix.

The attention of a branch token has two parts: over the trunk up to the branch's own prefix (a fused
call per row, whose mask is a view of one triangle), and over the branch itself (at most K x K).
Each part is normalised on its own and they are merged by their log-sum-exps, which is exact. Work
that nobody reads is left out: of the last layer only the keys and values of the trunk and the
queries of the kept positions are needed, and when sampling has kept its keys and values
(``rollouts.cache``) the trunk is not run at all.

The walk spells out the decoder layer of the Llama family (pre-norm, rotary positions, gated MLP).
Other causal LMs are served by ``iapo_mini.early_exit.prefixes``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from iapo_mini.memory import CARD_BLOCK
from iapo_mini.rollouts import Rollouts

FAMILIES = ("qwen2", "qwen3", "llama", "gemma")
"""Values of ``config.model_type`` whose decoder layers the walk spells out."""

_QUERIES = 128  # per attention call: later keys, which none of them sees, are left out


def walkable(model) -> bool:
    """Whether :func:`run_branches` can serve this causal LM."""
    config = model.config
    rope = getattr(config, "rope_parameters", None) or {}
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    # "dynamic" and "longrope" change all rotations with the length of the sequence.
    fixed = rope.get("rope_type", "default") in ("default", "linear", "llama3", "yarn")
    return config.model_type in FAMILIES and kinds == {"full_attention"} and fixed


@dataclass
class Row:
    """One completion in the flat lists.

    Attributes:
        number: its row in the rollouts.
        start: tokens of its prompt.
        length: tokens of prompt and completion.
        prompt, completion: slices of trunk tokens; empty when keys and values are known.
        branches: slice of branches.
        asked: (b,) long, the prefix lengths after which this row's branches hang.
    """

    number: int
    start: int
    length: int
    prompt: slice
    completion: slice
    branches: slice
    asked: torch.Tensor


def _lay_out(rollouts: Rollouts, rows: list[int], asked: torch.Tensor):
    """Ids and positions of the trunk tokens to run, slices of the prompts, a ``Row`` for each."""
    layout, prompts = [], {}
    nothing = rollouts.completion_ids.new_empty(0)
    ids, positions = [nothing], [nothing]
    at = branch = 0

    def run(tokens: torch.Tensor, first: int) -> slice:
        nonlocal at
        if rollouts.cache is not None:
            return slice(0, 0)
        ids.append(tokens)
        positions.append(torch.arange(first, first + len(tokens), device=tokens.device))
        at += len(tokens)
        return slice(at - len(tokens), at)

    for i in rows:
        group = i // rollouts.num_generations
        prompt = rollouts.prompt_ids[i][rollouts.prompt_mask[i]]
        if group not in prompts:  # every prompt once
            prompts[group] = run(prompt, 0)
        completion = rollouts.completion_ids[i][rollouts.completion_mask[i]]
        prefixes = asked[i].nonzero()[:, 0]
        layout.append(
            Row(
                number=i,
                start=len(prompt),
                length=len(prompt) + len(completion),
                prompt=prompts[group],
                completion=run(completion, len(prompt)),
                branches=slice(branch, branch + len(prefixes)),
                asked=prefixes,
            )
        )
        branch += len(prefixes)
    return torch.cat(ids), torch.cat(positions), list(prompts.values()), layout


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, out: torch.Tensor) -> None:
    """Rotary positions; x and out (..., heads, D), cos and sin (..., D / 2)."""
    cos, sin = cos[..., None, :], sin[..., None, :]
    (a, b), (to_a, to_b) = x.chunk(2, dim=-1), out.chunk(2, dim=-1)
    torch.mul(a, cos, out=to_a).addcmul_(b, sin, value=-1)
    torch.mul(b, cos, out=to_b).addcmul_(a, sin)


def attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention and the log-sum-exp of its scores, which merging with another part needs.

    Args:
        query: (N, Q, heads, D): N queries in each of Q sets, heads a multiple of key heads.
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


def _merge_own(query, key, value, trunk_out, trunk_lse, scale: float) -> torch.Tensor:
    """Merge the trunk part of each branch token's attention with the part over its own branch.

    ``query`` and ``trunk_out`` (N, Q, heads, D) are of the last Q positions of N branches, ``key``
    and ``value`` (N, K, key heads, D) of all K, ``trunk_lse`` (N, Q, heads).
    """
    heads = (key.shape[2], -1)
    query, trunk_out, trunk_lse = (x.unflatten(2, heads) for x in (query, trunk_out, trunk_lse))
    out = torch.empty_like(query)
    for i in range(query.shape[1]):
        merged, lse = trunk_out[:, i], trunk_lse[:, i]
        for j in range(key.shape[1] - query.shape[1] + i + 1):  # itself and those before it
            score = torch.linalg.vecdot(query[:, i], key[:, j, :, None]).float() * scale
            share = torch.sigmoid(score - lse).to(value.dtype)[..., None]
            merged = torch.lerp(merged, value[:, j, :, None], share)
            lse = torch.logaddexp(lse, score)
        out[:, i] = merged
    return out.flatten(2)


def _even(total: int, most: int) -> int:
    """Size of parts of at most ``most``, all about equal: a call for a small rest is a waste."""
    parts = max(1, math.ceil(total / most))
    return max(1, math.ceil(total / parts))


def _attention_calls(row: Row, triangle: torch.Tensor):
    """Branches of a row in parts: ``(slice of branches, trunk tokens they see, mask)``."""
    size = _even(len(row.asked), _QUERIES)
    for i in range(0, len(row.asked), size):
        at = row.start - 1 + row.asked[i : i + size]  # the last trunk token each one sees
        n = int(at[-1]) + 1
        neighbours = n - int(at[0]) == len(at)  # then the mask is a view
        mask = triangle[n - len(at) : n, :n] if neighbours else triangle[at, :n]
        yield slice(row.branches.start + i, row.branches.start + i + len(at)), n, mask


def run_branches(
    model, rollouts: Rollouts, rows: list[int], asked: torch.Tensor, suffix: torch.Tensor, keep: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Hidden states, ready for the vocabulary head, of a suffix hung after every asked prefix.

    Args:
        model: causal LM for which :func:`walkable` holds, LoRA and quantised layers included.
        rollouts: rows of one prompt are adjacent.
        rows: numbers of the rows of this block.
        asked: (B, L + 1) bool, the prefix lengths to ask after.
        suffix: (B, K) long, what is appended.
        keep: how many of the suffix's last positions to return.

    Returns:
        ``(row, prefix, hidden)``: (N,) long, (N,) long and (N, keep, d) for N branches.
    """
    decoder, config = model.get_decoder(), model.config
    ids, positions, prompts, layout = _lay_out(rollouts, rows, asked)
    device, k = ids.device, suffix.shape[1]
    owner = torch.cat([torch.full_like(row.asked, i) for i, row in enumerate(layout)])
    prefix = torch.cat([row.asked for row in layout])
    ends = torch.cat([row.start + row.asked for row in layout])
    branch_positions = ends[:, None] + torch.arange(k, device=device)

    trunk = decoder.embed_tokens(ids)
    branch = decoder.embed_tokens(suffix[rows])[owner]
    alike = bool((suffix[rows] == suffix[rows[0]]).all())  # then so are they, before layer 0
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    head_dim = decoder.layers[0].self_attn.head_dim
    length = max(row.length for row in layout) + k
    cos, sin = decoder.rotary_emb(trunk, torch.arange(length, device=device)[None])
    cos, sin = cos[0, :, : head_dim // 2], sin[0, :, : head_dim // 2]
    turns = cos[positions], sin[positions]  # of every trunk and every branch token
    branch_turns = cos[branch_positions], sin[branch_positions]
    triangle = torch.full((length, length), float("-inf"), dtype=trunk.dtype, device=device).triu(1)
    calls = [list(_attention_calls(row, triangle)) for row in layout]
    # Buffers of one layer, used again by the next.
    key, value = trunk.new_empty(2, len(trunk), kv_heads, head_dim)
    query, attended = trunk.new_empty(2, len(trunk), heads, head_dim)
    branch_key, branch_value = trunk.new_empty(2, len(branch), k, kv_heads, head_dim)
    branch_query, branch_attended = trunk.new_empty(2, len(branch), k, heads, head_dim)
    lse = trunk.new_empty(len(branch), k, heads, dtype=torch.float32)
    # A block of tokens that fits the processor's cache makes the walk a third faster. A card wants
    # large ones, all the more when 4-bit weights are dequantised for every block anew.
    inner = 2**19 if device.type == "cpu" else CARD_BLOCK
    tokens = max(768, inner // config.intermediate_size)
    branches = _even(len(branch), max(1, tokens // k))

    def project(name: str, x: torch.Tensor, out: torch.Tensor, *turns: torch.Tensor) -> None:
        """Queries or keys (normed and rotated) or values of normed ``x`` into (..., heads, D)."""
        y = getattr(attention, f"{name}_proj")(x).unflatten(-1, (-1, head_dim))
        norm = getattr(attention, f"{name}_norm", None)
        y = y if norm is None else norm(y)
        out.copy_(y) if name == "v" else _rotate(y, *turns, out)

    def causal(q, keys, values, first: int, scale: float, out: torch.Tensor) -> None:
        """Attention of trunk tokens from position ``first`` on, over all up to themselves."""
        for i in range(0, len(q), _QUERIES):
            part = slice(i, min(i + _QUERIES, len(q)))
            n = first + part.stop
            mask = triangle[first + i : n, :n]
            out[part] = attend(q[part, None], keys[:n], values[:n], mask, scale)[0][:, 0]

    def in_blocks(size: int, *tensors: torch.Tensor):
        return zip(*(x.split(size) for x in tensors))

    def feed_forward(x: torch.Tensor) -> torch.Tensor:
        """The layer's gated MLP; the product takes the place of its first factor."""
        inner = layer.mlp.act_fn(layer.mlp.gate_proj(x)).mul_(layer.mlp.up_proj(x))
        return layer.mlp.down_proj(inner)

    for number, layer in enumerate(decoder.layers):
        attention, last = layer.self_attn, number == len(decoder.layers) - 1
        scale, skip = attention.scaling, k - keep if last else 0
        for x, c, s, to_k, to_v, to_q in in_blocks(tokens, trunk, *turns, key, value, query):
            x = layer.input_layernorm(x)
            project("k", x, to_k, c, s)
            project("v", x, to_v)
            if not last:
                project("q", x, to_q, c, s)
        for x, c, s, to_k, to_v, to_q in in_blocks(
            branches, branch, *branch_turns, branch_key, branch_value, branch_query
        ):
            x = layer.input_layernorm(x[:1] if number == 0 and alike else x)
            project("k", x, to_k, c, s)
            project("v", x, to_v)
            # Contiguous, or the product becomes one for each branch.
            project("q", x[:, skip:].contiguous(), to_q[:, skip:], c[:, skip:], s[:, skip:])
        for p in prompts if not last else ():
            causal(query[p], key[p], value[p], 0, scale, attended[p])
        for row, parts in zip(layout, calls):
            if rollouts.cache is None:
                keys, values = (torch.cat([x[row.prompt], x[row.completion]]) for x in (key, value))
            else:
                keys, values = rollouts.cache[row.number][number]
            if not last:
                own = row.completion
                causal(query[own], keys, values, row.start, scale, attended[own])
            for part, n, mask in parts:
                branch_attended[part, skip:], lse[part, skip:] = attend(
                    branch_query[part, skip:], keys[:n], values[:n], mask, scale
                )
        branch = branch[:, skip:]
        for x, q, bk, bv, o, e in in_blocks(
            branches, branch, branch_query[:, skip:], branch_key, branch_value,
            branch_attended[:, skip:], lse[:, skip:],
        ):  # fmt: skip
            x += attention.o_proj(_merge_own(q, bk, bv, o, e, scale).flatten(2))
            x += feed_forward(layer.post_attention_layernorm(x))
        for x, o in in_blocks(tokens, trunk, attended) if not last else ():
            x += attention.o_proj(o.flatten(1))
            x += feed_forward(layer.post_attention_layernorm(x))
    return torch.tensor(rows, device=device)[owner], prefix, decoder.norm(branch)
