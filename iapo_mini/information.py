"""How much each token says about the answer: informativeness by early exit (paper, Section 4).

The conditional mutual information s_{i,t} = I(y_i; o_{i,t} | q, o_{i,<t}) is estimated by its
realised value

    s_{i,t} = H(y | q, o_{i,<t}) - H(y | q, o_{i,<=t})   [nats, can be negative],

where H(y | prefix) is the entropy of the policy's next-token distribution after the prefix is
closed by the postfix ``</think><answer>``, which makes the policy answer now. The mean of s_{i,t}
over o_t is the conditional mutual information, and the values of one completion add up to H at its
start minus H at its end (chain rule).

Such differences can be taken of every potential U_t that is known before and after a token. This
module offers four; :func:`informativeness` turns each into values per token:

* :func:`answer_entropies`: entropy of the answer's first token (the paper's estimate);
* :func:`answer_surprisals`: -log p(y | q, o_<=t) of the whole answer string at the end of the
  completion, whose drop is the pointwise information;
* :func:`candidate_logprobs`: the distribution over a given set of answers, and its entropy;
* :func:`next_token_informativeness`: next-token entropy (the paper's IAPO-NE), which is not about
  the answer at all.

:func:`belief_shift` is a fifth: the distance that a token moves the distribution over candidates.
The estimates are meaningful only if the policy is calibrated when it is forced to answer early
(:mod:`iapo_mini.calibration`). docs/estimators.md says what each measures and when it misleads.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from iapo_mini.attention import most_positions
from iapo_mini.chat import continuation_ids
from iapo_mini.early_exit import prefixes
from iapo_mini.early_exit.question import EVERY_PREFIX, EarlyExit, Question
from iapo_mini.early_exit.reading import head_entropy, logits_entropy
from iapo_mini.early_exit.strides import prefixes_asked, spread
from iapo_mini.errors import shown
from iapo_mini.logprobs import NEVER
from iapo_mini.policy import Policy
from iapo_mini.rollouts import Rollouts
from iapo_mini.tasks import POSTFIX


def encode_postfix(policy: Policy, postfix: str = POSTFIX) -> torch.Tensor:
    """Token ids of the postfix when it follows a completion, shape (K,) long."""
    ids = continuation_ids(policy.tokenizer, postfix)
    if not ids:
        raise ValueError(f"postfix must be text of at least one token, got {shown(postfix)}")
    return torch.tensor(ids, device=policy.device)


def _potential(
    policy: Policy,
    rollouts: Rollouts,
    how: EarlyExit,
    questions: Sequence[tuple[Question, torch.Tensor | None]],
) -> torch.Tensor:
    """The first value of each question (nats) after every prefix of its rows, (B, L + 1); else 0.

    Rows are (B,) bool and belong to one question at most; None: all rows.
    """
    t = torch.arange(rollouts.completion_ids.shape[1] + 1, device=policy.device)
    within = t <= rollouts.lengths[:, None]
    asked = within
    if how.stride != 1:
        asked = within & prefixes_asked(policy, rollouts, how.stride)
    model, found = policy.for_inference(), torch.zeros(within.shape, device=policy.device)
    for question, rows in questions:
        own = asked if rows is None else asked & rows[:, None]
        found += prefixes.ask(model, rollouts, question, how, own)[..., 0]
    return (found if how.stride == 1 else spread(found, asked)) * within


def answer_entropies(
    policy: Policy, rollouts: Rollouts, how: EarlyExit = EVERY_PREFIX
) -> torch.Tensor:
    """H(y | q, o_<=t) for every prefix of every completion (paper, Section 4, "Early exit").

    Args:
        policy: the policy that is forced to answer.
        rollouts: B completions in whole groups.
        how: postfix, stride, way and memory; the default is that of the paper.

    Returns:
        (B, L + 1) fp32 nats; column t is the entropy after t completion tokens. Columns past a
        row's length are 0.

    Raises:
        ValueError: for a postfix without tokens.
    """

    def read(rows: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        return logits_entropy(logits)

    question = Question(encode_postfix(policy, how.postfix), read, read_hidden=head_entropy)
    return _potential(policy, rollouts, how, [(question, None)])


def answer_in(text: str) -> str | None:
    """The text between the last ``<answer>`` and its ``</answer>``, with spaces; None if blank."""
    _, opened, rest = text.rpartition("<answer>")
    answer, closed, _ = rest.partition("</answer>")
    return answer if opened and closed and answer.strip() else None


def final_answers(policy: Policy, rollouts: Rollouts) -> list[str | None]:
    """The answer at the end of each row (:func:`answer_in`); None if the row has no answer."""
    return [answer_in(text) for text in rollouts.texts(policy.tokenizer)]


def answer_surprisals(
    policy: Policy,
    rollouts: Rollouts,
    answers: Sequence[str | None] | None = None,
    how: EarlyExit = EVERY_PREFIX,
) -> torch.Tensor:
    """-log p(y | q, o_<=t) of a whole answer string after every prefix, teacher-forced.

    The drop at a token, ``informativeness(surprisals, mask)``, is the pointwise information
    log p(y | q, o_<=t) - log p(y | q, o_<t). All tokens of an answer count. An answer of one token
    costs no more than the entropy, and each further token adds one token to the branches of rows
    whose answers are about as long.

    Args:
        policy, rollouts, how: as for :func:`answer_entropies`.
        answers: B texts as they follow the postfix, with their leading space; None leaves a row at
            0. Default: the answer at the end of each completion (:func:`final_answers`), of which
            only the first tokens count if the model has too few positions for all. To distinguish
            "7" from the beginning of "72", end the texts with ``</answer>``.

    Returns:
        (B, L + 1) fp32 nats, 0 past a row's length.

    Raises:
        ValueError: for a wrong number of answers, an answer without tokens, or a postfix without
            tokens.
    """
    start, room = encode_postfix(policy, how.postfix), None
    if answers is None:  # the policy may have written an answer of any length
        answers = final_answers(policy, rollouts)
        longest = int((rollouts.prompt_mask.sum(1) + rollouts.lengths).max()) + len(start)
        most = most_positions(policy.model)
        room = max(1, int(most) - longest + 1) if math.isfinite(most) else None
    if len(answers) != len(rollouts.lengths):
        raise ValueError(
            f"answers must be one for each of the {len(rollouts.lengths)} rows, got {len(answers)}"
        )
    ids = [None if x is None else continuation_ids(policy.tokenizer, x)[:room] for x in answers]
    if [] in ids:
        raise ValueError("answers must be texts of at least one token, got one without tokens")
    width = max((len(x) for x in ids if x), default=1)
    padded = [(x or []) + [0] * (width - len(x or [])) for x in ids]
    targets = torch.tensor(padded, device=start.device)
    lengths = torch.tensor([len(x or []) for x in ids], device=start.device)
    real = torch.arange(width, device=start.device) < lengths[:, None]
    suffix = torch.cat([start.expand(len(ids), -1), targets[:, :-1]], dim=1)

    def read(rows: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        width = logits.shape[1]
        log_p = torch.log_softmax(logits.float(), dim=-1)
        log_p = log_p.gather(2, targets[rows, :width, None])[..., 0]
        return -(log_p * real[rows, :width]).sum(1, keepdim=True)

    # Rows with up to 8 tokens are asked together, those with up to 16, and so on. All branches of
    # a question are equally long, so one long answer would make those of all rows long.
    sizes = [max(8, 1 << (n - 1).bit_length()) if n else 0 for n in lengths.tolist()]
    questions = []
    for size in sorted({*sizes} - {0}):
        rows = torch.tensor(sizes, device=start.device) == size
        width = int(lengths[rows].max())
        some = suffix[:, : len(start) + width - 1]
        questions.append((Question(some, read, keep=width, by_row=True), rows))
    return _potential(policy, rollouts, how, questions)


def candidate_logprobs(
    policy: Policy, rollouts: Rollouts, candidates: Sequence[str], how: EarlyExit = EVERY_PREFIX
) -> torch.Tensor:
    """Log-distribution over a given set of answers after every prefix, renormalised over the set.

    Its entropy, ``logits_entropy(candidate_logprobs(...))``, is the answer entropy without the
    probability that the policy gives to texts outside the set. If every candidate has one token,
    one pass is enough; otherwise there is a pass for each candidate. Every prefix is asked,
    whatever the stride.

    Args:
        policy, rollouts, how: as for :func:`answer_entropies`.
        candidates: C >= 2 different texts, as they follow the postfix.

    Returns:
        (B, L + 1, C) fp32 nats; uniform past a row's length.

    Raises:
        ValueError: for fewer than two candidates, or two with the same tokens.
    """
    ids = [tuple(continuation_ids(policy.tokenizer, c)) for c in candidates]
    if len(ids) < 2 or len(set(ids)) < len(ids) or () in ids:
        raise ValueError(
            "candidates must be two or more texts that differ in their tokens, got "
            f"{shown(list(candidates))}"
        )
    how = replace(how, stride=1)
    if any(len(x) > 1 for x in ids):
        rows = len(rollouts.lengths)
        each = [answer_surprisals(policy, rollouts, [c] * rows, how) for c in candidates]
        return torch.log_softmax(-torch.stack(each, dim=-1), dim=-1)
    tokens = torch.tensor(ids, device=policy.device)[:, 0]

    def read(rows: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        return logits[:, 0].float().index_select(1, tokens)

    def read_hidden(head: torch.nn.Linear, hidden: torch.Tensor) -> torch.Tensor:
        bias = None if head.bias is None else head.bias[tokens]
        return torch.nn.functional.linear(hidden[:, 0], head.weight[tokens], bias).float()

    question = Question(encode_postfix(policy, how.postfix), read, read_hidden=read_hidden)
    found = prefixes.ask(policy.for_inference(), rollouts, question, how)
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

    Its mean over o_t is the conditional mutual information, like that of the entropy drop, but it
    is never negative. A token that replaces one guess by another, equally uncertain guess has no
    entropy drop, but it does have a belief shift.

    Args:
        logprobs: (B, L + 1, C) from :func:`candidate_logprobs`.
        completion_mask: (B, L) bool.

    Returns:
        (B, L) fp32 nats, 0 at padding.
    """
    before, after = (x.clamp(min=NEVER) for x in (logprobs[:, :-1], logprobs[:, 1:]))
    return (after.exp() * (after - before)).sum(-1) * completion_mask


def next_token_informativeness(
    entropies: torch.Tensor, completion_mask: torch.Tensor
) -> torch.Tensor:
    """H(o_t | q, o_<t) - H(o_{t+1} | q, o_<=t): the paper's ablation IAPO-NE.

    Args:
        entropies: (B, L) nats, entropy of the distribution that each token was drawn from, as given
            by ``logprobs.token_logprobs``. The second term of the last token is 0.
        completion_mask: (B, L) bool.

    Returns:
        (B, L) fp32 nats, 0 at padding.
    """
    following = torch.nn.functional.pad((entropies * completion_mask)[:, 1:], (0, 1))
    return (entropies - following) * completion_mask


Information = Callable[[Policy, Rollouts, EarlyExit], torch.Tensor]
"""(policy, rollouts, settings of early exit) -> s_{i,t}, (B, L) nats."""


def _of_entropies(policy: Policy, rollouts: Rollouts, how: EarlyExit) -> torch.Tensor:
    return informativeness(answer_entropies(policy, rollouts, how), rollouts.completion_mask)


def _of_surprisals(policy: Policy, rollouts: Rollouts, how: EarlyExit) -> torch.Tensor:
    surprisals = answer_surprisals(policy, rollouts, how=how)
    return informativeness(surprisals, rollouts.completion_mask)


def _of_next_tokens(policy: Policy, rollouts: Rollouts, how: EarlyExit) -> torch.Tensor:
    return next_token_informativeness(rollouts.token_entropies, rollouts.completion_mask)


INFORMATION: dict[str, Information] = {
    "answer_entropy": _of_entropies,
    "answer_surprisal": _of_surprisals,
    "next_token_entropy": _of_next_tokens,
}
"""Estimates of s by their names in recipes (:mod:`iapo_mini.config`). ``answer_surprisal`` gives
zeros to a completion without an answer; ``next_token_entropy`` needs no early answers."""


def inform(
    policy: Policy, rollouts: Rollouts, information: str | Information, how: EarlyExit
) -> Rollouts:
    """Fill in ``informativeness`` and drop the cache, which an update would invalidate.

    Args:
        policy: the policy that wrote the completions.
        rollouts: B completions in whole groups.
        information: a key of ``INFORMATION``, or a function of the same form.
        how: settings of early exit.
    """
    estimate = INFORMATION[information] if isinstance(information, str) else information
    return replace(rollouts.filled(informativeness=estimate(policy, rollouts, how)), cache=None)
