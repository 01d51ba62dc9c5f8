"""How much each token tells about the answer: informativeness by early exit (paper, Section 4).

The conditional mutual information s_{i,t} = I(y_i; o_{i,t} | q, o_{i,<t}) is estimated by its
realised value

    s_{i,t} = H(y | q, o_{i,<t}) - H(y | q, o_{i,<=t})   [nats, can be negative],

where H(y | prefix) is the entropy of the policy's next-token distribution after the prefix is
closed by a postfix that forces an answer now, ``</think><answer>``. Its mean over o_t is the
conditional mutual information, and the values of one completion telescope to H at its start minus
H at its end (chain rule).

The same holds for every potential U_t that is known before and after a token, and this module
offers four; :func:`informativeness` turns each into values per token:

* :func:`answer_entropies`: entropy of the answer's first token (the paper's);
* :func:`answer_surprisals`: -log p(y | q, o_<=t) of the whole answer string the completion ends
  with, so that the drop is the pointwise information;
* :func:`candidate_logprobs`: the distribution over a given set of answers, and its entropy;
* next-token entropy, :func:`next_token_informativeness` (the paper's IAPO-NE): not about the
  answer at all.

:func:`belief_shift` is a fifth: how far a token moves the distribution over candidates. The
estimates mean something only if the policy is calibrated when it is forced to answer early
(:mod:`iapo_mini.calibration`). What each measures, and when it lies: docs/estimators.md.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from iapo_mini.early_exit import prefixes
from iapo_mini.policy import Policy
from iapo_mini.rollouts import Rollouts
from iapo_mini.tasks import POSTFIX

METHODS = (*prefixes.METHODS, "strided")


@torch.no_grad()
def entropy(logits: torch.Tensor) -> torch.Tensor:
    """Shannon entropy in nats of softmax(logits) over the last dimension, fp32, no gradient."""
    log_p = torch.log_softmax(logits.float(), dim=-1)
    p = log_p.exp()
    return -p.mul_(log_p).sum(-1)  # in place: with a large vocabulary these are what fills memory


@torch.no_grad()
def head_entropy(head: torch.nn.Linear, hidden: torch.Tensor) -> torch.Tensor:
    """``entropy(head(hidden))`` from blocks of the vocabulary; no logits of the whole ever exist.

    By the chain rule of entropy: that of the block a token falls into, plus the mean of those
    within the blocks. A block that stays in the processor's cache makes this more than twice as
    fast as whole logits of a vocabulary of 151,936, and the head's weights are read once instead
    of once for every few rows.

    Args:
        head: vocabulary head, d -> V.
        hidden: (..., d), ready for the head.

    Returns:
        (...) fp32 nats.
    """
    numbers = 2**19 if hidden.device.type == "cpu" else 2**24
    weights = head.weight.split(1024)
    biases = [None] * len(weights) if head.bias is None else head.bias.split(1024)
    out = []
    for x in hidden.flatten(0, -2).split(max(1, numbers // min(1024, head.out_features))):
        block, within = [], []
        for weight, bias in zip(weights, biases):
            logits = torch.nn.functional.linear(x, weight, bias).float()
            log_p = torch.log_softmax(logits, dim=-1)
            block.append(logits[:, 0] - log_p[:, 0])  # log-sum-exp
            within.append(-log_p.exp().mul_(log_p).sum(-1))
        log_p, within = torch.log_softmax(torch.stack(block, 1), 1), torch.stack(within, 1)
        out.append((log_p.exp() * (within - log_p)).sum(1))
    return torch.cat(out).view(hidden.shape[:-1])


def encode_postfix(policy: Policy, postfix: str = POSTFIX) -> torch.Tensor:
    """Token ids of the postfix, shape (K,) long, without special tokens."""
    ids = policy.tokenizer.encode(postfix, add_special_tokens=False)
    if not ids:
        raise ValueError(f"postfix is {postfix!r}; allowed is text of at least one token.")
    return torch.tensor(ids, device=policy.device)


def sentence_ends(policy: Policy, rollouts: Rollouts) -> torch.Tensor:
    """(B, L + 1) bool: prefixes that end with a sentence, a line or a tag, and the first and last.

    A token ends a sentence when its text ends with one of ``. ! ? >`` or a line break.
    """
    vocabulary = torch.unique(rollouts.completion_ids)
    texts = policy.tokenizer.batch_decode(vocabulary[:, None], skip_special_tokens=False)
    last = [text.rstrip(" ")[-1:] for text in texts]
    ends = vocabulary[[c in set(".!?>\n") and c != "" for c in last]]
    out = torch.isin(rollouts.completion_ids, ends) & rollouts.completion_mask
    out = torch.nn.functional.pad(out, (1, 0), value=True)
    return out.scatter_(1, rollouts.lengths[:, None], True)


def check_stride(stride: int | str, name: str = "stride") -> None:
    """Refuse a stride that is neither a number of tokens nor ``"sentence"``.

    Raises:
        ValueError: with the argument's ``name``, its value and what is allowed.
    """
    whole = isinstance(stride, int) and not isinstance(stride, bool) and stride >= 1
    if not whole and stride != "sentence":
        raise ValueError(f"{name} is {stride!r}; allowed are 1 and above, or 'sentence'.")


def _prefixes_asked(policy: Policy, rollouts: Rollouts, stride: int | str) -> torch.Tensor:
    """(B, L + 1) bool: every ``stride``-th prefix, or the sentence ends, and each row's last."""
    check_stride(stride)
    if stride == "sentence":
        return sentence_ends(policy, rollouts)
    t = torch.arange(rollouts.completion_ids.shape[1] + 1, device=rollouts.lengths.device)
    return (t % stride == 0) | (t == rollouts.lengths[:, None])


def _spread(values: torch.Tensor, asked: torch.Tensor) -> torch.Tensor:
    """Fill the prefixes between two asked ones on the straight line between their values.

    So a segment's drop is exact and every token of the segment gets an equal share of it.
    """
    t = torch.arange(values.shape[1], device=values.device).expand_as(values)
    before = torch.where(asked, t, -1).cummax(1).values.clamp(min=0)
    after = torch.where(asked, t, values.shape[1]).flip(1).cummin(1).values.flip(1)
    after = torch.where(after < values.shape[1], after, before)
    share = (t - before) / (after - before).clamp(min=1)
    left, right = values.gather(1, before), values.gather(1, after)
    return torch.where(asked, values, left + (right - left) * share)


def _potential(
    policy, rollouts, suffix, read, keep, method, stride, memory_mb, chunk_size, **how
) -> torch.Tensor:
    """One number (nats) for every prefix, (B, L + 1); padding 0."""
    if method not in METHODS:
        raise ValueError(f"method is {method!r}; allowed are {', '.join(METHODS)}.")
    asked = None
    if method == "strided":
        method, asked = "packed", _prefixes_asked(policy, rollouts, stride)
    found = prefixes.ask(
        policy.for_inference(), rollouts, suffix, read, keep=keep, asked=asked, method=method,
        memory_mb=memory_mb, chunk_size=chunk_size, **how,
    )[..., 0]  # fmt: skip
    t = torch.arange(found.shape[1], device=found.device)
    found = found if asked is None else _spread(found, asked & (t <= rollouts.lengths[:, None]))
    return found * (t <= rollouts.lengths[:, None])


def answer_entropies(
    policy: Policy,
    rollouts: Rollouts,
    postfix: str = POSTFIX,
    *,
    method: str = "packed",
    stride: int | str = 4,
    memory_mb: float = 256.0,
    chunk_size: int | None = None,
) -> torch.Tensor:
    """H(y | q, o_<=t) for every prefix of every completion (paper, Section 4, "Early exit").

    Args:
        policy: the policy that is forced to answer.
        rollouts: B completions in whole groups.
        postfix: text that forces an answer.
        method: ``"packed"`` (one trunk pass, all branches behind its keys and values),
            ``"cached"`` (a copy of the cache for each prefix, as the paper describes), ``"naive"``
            (the definition, re-running each prefix), or ``"strided"`` (packed, but only some
            prefixes are asked; the drop between two of them is exact and spread evenly over the
            tokens between).
        stride: for ``"strided"``: ask after every so many tokens, or at ``"sentence"`` ends.
        memory_mb: memory beside the model that this may take, MiB; results do not depend on it.
        chunk_size: branches at a time instead of what ``memory_mb`` allows. Where packing serves
            (:func:`iapo_mini.early_exit.flat.walkable`) and the vocabulary head is a plain matrix
            there are no chunks: :func:`head_entropy` needs 2 MiB at a time on a CPU, 64 on a card.

    Returns:
        (B, L + 1) fp32 nats; column t is the entropy after t completion tokens, column 0 before
        any. Columns past a row's length are 0.

    Raises:
        ValueError: for an unknown method, an empty postfix, a stride or size out of range.
    """
    suffix = encode_postfix(policy, postfix)

    def read(rows: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        return entropy(logits)

    return _potential(
        policy, rollouts, suffix, read, 1, method, stride, memory_mb, chunk_size,
        read_hidden=head_entropy,
    )  # fmt: skip


def final_answers(policy: Policy, rollouts: Rollouts) -> list[str | None]:
    """The text between the last ``<answer>`` and its ``</answer>`` of each row, spaces kept.

    None for a completion that gives no answer.
    """
    out: list[str | None] = []
    for text in rollouts.texts(policy.tokenizer):
        _, opened, rest = text.rpartition("<answer>")
        answer, closed, _ = rest.partition("</answer>")
        out.append(answer if opened and closed and answer.strip() else None)
    return out


def answer_surprisals(
    policy: Policy,
    rollouts: Rollouts,
    answers: Sequence[str | None] | None = None,
    postfix: str = POSTFIX,
    *,
    method: str = "packed",
    stride: int | str = 4,
    memory_mb: float = 256.0,
    chunk_size: int | None = None,
) -> torch.Tensor:
    """-log p(y | q, o_<=t) of a whole answer string after every prefix, teacher-forced.

    The drop at a token, ``informativeness(surprisals, mask)``, is the pointwise information
    log p(y | q, o_<=t) - log p(y | q, o_<t). All tokens of an answer count, so an answer of several
    tokens costs one more branch token for each beyond the first; one of a single token costs
    nothing over the entropy.

    Args:
        answers: B texts, as they stand after the postfix (leading space included); None leaves a
            row at 0. Default: the answer each completion ends with (:func:`final_answers`). To tell
            "7" from the beginning of "72", let the texts end with ``</answer>``.
        policy, rollouts, postfix, method, stride, memory_mb, chunk_size: as for
            :func:`answer_entropies`.

    Returns:
        (B, L + 1) fp32 nats, 0 past a row's length.

    Raises:
        ValueError: for a wrong number of answers, one without tokens, or as above.
    """
    answers = final_answers(policy, rollouts) if answers is None else list(answers)
    if len(answers) != len(rollouts.lengths):
        raise ValueError(
            f"answers has {len(answers)} entries; allowed is one for each of the "
            f"{len(rollouts.lengths)} rows."
        )
    start = encode_postfix(policy, postfix)
    ids = [
        policy.tokenizer.encode(answer, add_special_tokens=False) if answer is not None else None
        for answer in answers
    ]
    if [] in ids:
        raise ValueError("answers holds a text without tokens; allowed are texts of at least one.")
    width = max((len(x) for x in ids if x), default=1)
    padded = [(x or []) + [0] * (width - len(x or [])) for x in ids]
    targets = torch.tensor(padded, device=start.device)
    lengths = torch.tensor([len(x or []) for x in ids], device=start.device)
    real = torch.arange(width, device=start.device) < lengths[:, None]
    suffix = torch.cat([start.expand(len(ids), -1), targets[:, :-1]], dim=1)

    def read(rows: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        log_p = torch.log_softmax(logits.float(), dim=-1)
        log_p = log_p.gather(2, targets[rows][..., None])[..., 0]
        return -(log_p * real[rows]).sum(1, keepdim=True)

    return _potential(
        policy, rollouts, suffix, read, width, method, stride, memory_mb, chunk_size, by_row=True
    )


def candidate_logprobs(
    policy: Policy,
    rollouts: Rollouts,
    candidates: Sequence[str],
    postfix: str = POSTFIX,
    *,
    method: str = "packed",
    memory_mb: float = 256.0,
) -> torch.Tensor:
    """Log-distribution over a given set of answers after every prefix, renormalised over the set.

    Its entropy, ``entropy(candidate_logprobs(...))``, is the answer entropy without the mass that
    the policy puts on things that are no answers. Candidates of one token each are read from one
    pass; otherwise there is a pass for each candidate.

    Args:
        candidates: C >= 2 different texts, as they stand after the postfix.
        policy, rollouts, postfix, method, memory_mb: as for :func:`answer_entropies`.

    Returns:
        (B, L + 1, C) fp32 nats; past a row's length, uniform.

    Raises:
        ValueError: for fewer than two candidates, or two with the same tokens.
    """
    ids = [tuple(policy.tokenizer.encode(c, add_special_tokens=False)) for c in candidates]
    if len(ids) < 2 or len(set(ids)) < len(ids) or () in ids:
        raise ValueError(
            f"candidates is {list(candidates)!r}; allowed are two or more texts that differ "
            "in their tokens."
        )
    if all(len(x) == 1 for x in ids):
        tokens = torch.tensor(ids, device=policy.device)[:, 0]

        def read(rows: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
            return logits[:, 0].float().index_select(1, tokens)

        def read_hidden(head: torch.nn.Linear, hidden: torch.Tensor) -> torch.Tensor:
            bias = None if head.bias is None else head.bias[tokens]
            return torch.nn.functional.linear(hidden[:, 0], head.weight[tokens], bias).float()

        found = prefixes.ask(
            policy.for_inference(), rollouts, encode_postfix(policy, postfix), read,
            read_hidden=read_hidden, method=method, memory_mb=memory_mb,
        )  # fmt: skip
    else:
        found = -torch.stack(
            [
                answer_surprisals(
                    policy, rollouts, [c] * len(rollouts.lengths), postfix, method=method,
                    memory_mb=memory_mb,
                )
                for c in candidates
            ],
            dim=-1,
        )  # fmt: skip
    return torch.log_softmax(found, dim=-1)


def informativeness(potential: torch.Tensor, completion_mask: torch.Tensor) -> torch.Tensor:
    """s_{i,t} = H(y | q, o_<t) - H(y | q, o_<=t) (paper, "Early exit"), for any potential.

    Args:
        potential: (B, L + 1) nats: :func:`answer_entropies` (the paper), :func:`answer_surprisals`
            (pointwise information) or the entropy of :func:`candidate_logprobs`.
        completion_mask: (B, L) bool.

    Returns:
        (B, L) fp32 nats, 0 at padding; each row sums to its first minus its last potential.
    """
    return (potential[:, :-1] - potential[:, 1:]) * completion_mask


def belief_shift(logprobs: torch.Tensor, completion_mask: torch.Tensor) -> torch.Tensor:
    """KL(p(y | q, o_<=t) || p(y | q, o_<t)): how far each token moves the belief about the answer.

    Its mean over o_t is the conditional mutual information, as that of the entropy drop is, but it
    is never negative: a step that turns one guess into another, equally unsure one counts here.

    Args:
        logprobs: (B, L + 1, C) from :func:`candidate_logprobs`.
        completion_mask: (B, L) bool.

    Returns:
        (B, L) fp32 nats, 0 at padding.
    """
    before, after = logprobs[:, :-1], logprobs[:, 1:]
    return (after.exp() * (after - before)).sum(-1) * completion_mask


def next_token_informativeness(
    entropies: torch.Tensor, completion_mask: torch.Tensor
) -> torch.Tensor:
    """H(o_t | q, o_<t) - H(o_{t+1} | q, o_<=t): the paper's ablation IAPO-NE.

    Args:
        entropies: (B, L) nats, entropy of the distribution each token was drawn from, from
            ``logprobs.token_logprobs``. Nothing follows the last token: its second term is 0.
        completion_mask: (B, L) bool.

    Returns:
        (B, L) fp32 nats, 0 at padding.
    """
    following = torch.nn.functional.pad((entropies * completion_mask)[:, 1:], (0, 1))
    return (entropies - following) * completion_mask


def _of_entropies(policy: Policy, rollouts: Rollouts, memory_mb: float, stride: int | str):
    entropies = answer_entropies(
        policy, rollouts, method="strided", stride=stride, memory_mb=memory_mb
    )
    return informativeness(entropies, rollouts.completion_mask)


def _of_surprisals(policy: Policy, rollouts: Rollouts, memory_mb: float, stride: int | str):
    surprisals = answer_surprisals(
        policy, rollouts, method="strided", stride=stride, memory_mb=memory_mb
    )
    return informativeness(surprisals, rollouts.completion_mask)


def _of_next_tokens(policy: Policy, rollouts: Rollouts, memory_mb: float, stride: int | str):
    return next_token_informativeness(rollouts.token_entropies, rollouts.completion_mask)


INFORMATION: dict[str, Callable[[Policy, Rollouts, float, int | str], torch.Tensor]] = {
    "iapo": _of_entropies,
    "iapo_ne": _of_next_tokens,
    "iapo_pmi": _of_surprisals,
}
"""Method -> ``(policy, rollouts, memory_mb, stride) -> (B, L)`` nats: what
``rollouts.informativeness`` is filled with before its advantages are computed, asking after every
``stride`` tokens or sentence. A method without an entry never pays for an estimate. ``iapo_pmi``
gives zeros to a completion without an answer, ``iapo_ne`` asks nothing and has no stride."""
