"""How much each token tells about the answer: informativeness by early exit (paper, Section 4).

The conditional mutual information s_{i,t} = I(y_i; o_{i,t} | q, o_{i,<t}) is estimated by its
realised value

    s_{i,t} = H(y | q, o_{i,<t}) - H(y | q, o_{i,<=t})   [nats, can be negative],

where H(y | prefix) is the entropy of the policy's next-token distribution after the prefix is
closed by a postfix that forces an answer now, ``</think><answer>``. Its mean over o_t is the
conditional mutual information, and the values of one completion telescope to H at its start minus
H at its end.

The estimate means something only if the policy is calibrated when it is forced to answer early;
the embedded policy is trained to be (``iapo_mini.pretrain``), and ``exit_calibration`` measures it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from iapo_mini.policy import Policy
from iapo_mini.rollouts import Rollouts, trunk_blocks
from iapo_mini.tasks import POSTFIX

METHODS = ("packed", "naive")


def branch_inputs(
    trunk_mask: torch.Tensor,
    position_ids: torch.Tensor,
    ends: torch.Tensor,
    postfix: torch.Tensor,
) -> dict[str, torch.Tensor]:
    """Model inputs that append one postfix branch after each of C trunk positions of every row.

    All branches of a row form one sequence of C * K tokens behind the trunk's KV cache. A branch
    sees the real trunk tokens up to its own end and its own earlier tokens; its position ids go on
    from that end. So C early answers cost one forward pass and no copy of the cache.

    Args:
        trunk_mask: (B, T) bool, real tokens of the cached trunk.
        position_ids: (B, T) long, position of every trunk token.
        ends: (B, C) long, index into the trunk of the last token each branch follows.
        postfix: (K,) long.

    Returns:
        ``input_ids`` (B, C*K), ``attention_mask`` (B, 1, C*K, T + C*K) bool, ``position_ids``
        (B, C*K). The last token of branch j is at index j*K + K - 1.
    """
    (rows, branches), k = ends.shape, len(postfix)
    device = trunk_mask.device
    trunk = trunk_mask[:, None] & (
        torch.arange(trunk_mask.shape[1], device=device) <= ends[:, :, None]
    )
    number = torch.arange(branches * k, device=device) // k
    own = (number[:, None] == number).tril()
    mask = torch.cat([trunk.repeat_interleave(k, dim=1), own.expand(rows, -1, -1)], dim=2)
    positions = position_ids.gather(1, ends)[:, :, None] + 1 + torch.arange(k, device=device)
    return {
        "input_ids": postfix.repeat(rows, branches),
        "attention_mask": mask[:, None],
        "position_ids": positions.flatten(1),
    }


def encode_postfix(policy: Policy, postfix: str = POSTFIX) -> torch.Tensor:
    """Token ids of the postfix, shape (K,) long, without special tokens."""
    ids = policy.tokenizer.encode(postfix, add_special_tokens=False)
    if not ids:
        raise ValueError(f"postfix is {postfix!r}; allowed is text of at least one token.")
    return torch.tensor(ids, device=policy.device)


def entropy(logits: torch.Tensor) -> torch.Tensor:
    """Shannon entropy in nats of softmax(logits) over the last dimension, computed in fp32."""
    log_p = torch.log_softmax(logits.float(), dim=-1)
    return -(log_p.exp() * log_p).sum(-1)


def early_answers(
    model,
    rollouts: Rollouts,
    postfix: torch.Tensor,
    rows_per_block: int = 16,
    chunk_size: int = 256,
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Next-token logits after every prefix of every completion, closed by the postfix (packed).

    Args:
        model: causal LM with a KV cache and 4-D attention masks.
        rollouts: whole groups.
        postfix: (K,) long.
        rows_per_block: completions handled at once.
        chunk_size: branches per row and forward pass; memory grows with it, results do not change.

    Yields:
        ``(rows, logits)``: row numbers (b,) and logits (b, l + 1, V) whose entry t follows the
        first t completion tokens; entries past a row's length mean nothing.
    """
    start, k = rollouts.prompt_ids.shape[1] - 1, len(postfix)
    for trunk in trunk_blocks(model, rollouts, rows_per_block, need_logits=False):
        out, stop = [], trunk.mask.shape[1]
        for first in range(start, stop, chunk_size):
            n = min(chunk_size, stop - first)
            ends = torch.arange(first, first + n, device=postfix.device).expand(len(trunk.rows), -1)
            inputs = branch_inputs(trunk.mask, trunk.position_ids, ends, postfix)
            last = torch.arange(k - 1, n * k, k, device=postfix.device)
            out.append(model(past_key_values=trunk.cache, logits_to_keep=last, **inputs).logits)
            trunk.cache.crop(-n * k)
        yield trunk.rows, torch.cat(out, dim=1)


@torch.no_grad()
def _naive_entropies(model, rollouts: Rollouts, postfix: torch.Tensor) -> torch.Tensor:
    """The definition: one full forward pass per row and prefix, nothing shared, nothing padded."""
    rows, length = rollouts.completion_ids.shape
    out = torch.zeros(rows, length + 1, device=rollouts.completion_ids.device)
    for i in range(rows):
        prompt = rollouts.prompt_ids[i][rollouts.prompt_mask[i]]
        completion = rollouts.completion_ids[i][rollouts.completion_mask[i]]
        for t in range(len(completion) + 1):
            ids = torch.cat([prompt, completion[:t], postfix])
            out[i, t] = entropy(model(ids[None]).logits[0, -1])
    return out


@torch.no_grad()
def answer_entropies(
    policy: Policy,
    rollouts: Rollouts,
    postfix: str = POSTFIX,
    *,
    method: str = "packed",
    rows_per_block: int = 16,
    chunk_size: int = 256,
) -> torch.Tensor:
    """H(y | q, o_<=t) for every prefix of every completion.

    Args:
        policy: the policy that is forced to answer.
        rollouts: B completions in whole groups.
        postfix: text that forces an answer.
        method: ``"packed"`` (one trunk pass, all branches behind its KV cache) or ``"naive"`` (the
            definition, re-running each prefix; for checks).
        rows_per_block: completions handled at once.
        chunk_size: branches per row and forward pass.

    Returns:
        (B, L + 1) fp32 nats; column t is the entropy after t completion tokens, column 0 before
        any. Columns past a row's length are 0.

    Raises:
        ValueError: for an unknown method, an empty postfix or a non-positive size.
    """
    if method not in METHODS:
        raise ValueError(f"method is {method!r}; allowed are {', '.join(METHODS)}.")
    for name, value in (("rows_per_block", rows_per_block), ("chunk_size", chunk_size)):
        if value < 1:
            raise ValueError(f"{name} is {value}; allowed are 1 and above.")
    model, ids = policy.for_inference(), encode_postfix(policy, postfix)
    if method == "naive":
        return _naive_entropies(model, rollouts, ids)
    rows, length = rollouts.completion_ids.shape
    out = torch.zeros(rows, length + 1, device=rollouts.completion_ids.device)
    for block, logits in early_answers(model, rollouts, ids, rows_per_block, chunk_size):
        out[block, : logits.shape[1]] = entropy(logits)
    reached = torch.arange(length + 1, device=out.device) <= rollouts.lengths[:, None]
    return out * reached


def informativeness(entropies: torch.Tensor, completion_mask: torch.Tensor) -> torch.Tensor:
    """s_{i,t} = H(y | q, o_<t) - H(y | q, o_<=t) (paper, "Early exit").

    Args:
        entropies: (B, L + 1) nats, from :func:`answer_entropies`.
        completion_mask: (B, L) bool.

    Returns:
        (B, L) fp32 nats, 0 at padding; each row sums to its first minus its last entropy.
    """
    return (entropies[:, :-1] - entropies[:, 1:]) * completion_mask


def expected_calibration_error(
    confidence: torch.Tensor, correct: torch.Tensor, bins: int = 15
) -> float:
    """Expected calibration error: mean |accuracy - confidence| over equal-width confidence bins.

    Args:
        confidence: (N,) in 0..1; correct: (N,) bool or 0/1; bins: number of bins.
    """
    confidence, correct = confidence.double(), correct.double()
    index = (confidence * bins).long().clamp(max=bins - 1)
    gap = torch.zeros(bins, dtype=torch.double).index_add(0, index, correct - confidence)
    return float(gap.abs().sum() / len(confidence))


@torch.no_grad()
def exit_calibration(
    policy: Policy, rollouts: Rollouts, answers: Sequence[str], parts: int = 10
) -> dict[str, torch.Tensor]:
    """What the policy answers when forced to, after every ``1/parts`` of each completion.

    The forced answer is one token here, as in the story world.

    Args:
        policy: the policy that is forced to answer.
        rollouts: B completions in whole groups (sampled, or written by the world).
        answers: B reference answers, one for each row.
        parts: how many equal parts the chain is cut into; parts + 1 prefixes are asked.

    Returns:
        ``confidence`` (B, parts + 1) probability of the most likely forced answer, ``correct``
        (B, parts + 1) bool, ``entropy`` (B, parts + 1) nats.
    """
    model, postfix = policy.for_inference(), encode_postfix(policy)
    truth = [policy.tokenizer.encode(f" {a}", add_special_tokens=False)[0] for a in answers]
    shape = (len(answers), parts + 1)
    out = {
        "confidence": torch.zeros(shape),
        "correct": torch.zeros(shape, dtype=torch.bool),
        "entropy": torch.zeros(shape),
    }
    for rows, logits in early_answers(model, rollouts, postfix):
        fraction = torch.arange(parts + 1, device=logits.device) / parts
        at = (rollouts.lengths[rows, None] * fraction).round().long()
        logits = logits.gather(1, at[..., None].expand(-1, -1, logits.shape[2]))
        p, guess = torch.softmax(logits.float(), dim=-1).max(-1)
        target = torch.tensor([truth[row] for row in rows.tolist()], device=guess.device)
        out["confidence"][rows.cpu()] = p.cpu()
        out["correct"][rows.cpu()] = (guess == target[:, None]).cpu()
        out["entropy"][rows.cpu()] = entropy(logits).cpu()
    return out
