"""Early exit at inference: stop thinking when the forced answer is sure.

While a policy thinks, it is asked now and then for its answer, as the estimator of informativeness
asks. If the answer is sure, the postfix is written into the completion, and the policy goes on from
there and answers. Nothing is trained. The idea is that of dynamic early exit (DEER, arXiv
2504.15895), which asks where a thought turns ("Wait") and reads the mean probability of the trial
answer's tokens. Here the places and the rules are those of :class:`Stopping`.

Asking is not free. Every question forwards the tokens of the postfix, and the rule ``"agree"`` also
those of the trial answer. :class:`Exits` counts them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import DynamicCache
from transformers.cache_utils import Cache

from iapo_mini.attention import model_mask
from iapo_mini.chat import prefill, token_texts
from iapo_mini.early_exit.question import Stopping
from iapo_mini.early_exit.reading import logits_entropy
from iapo_mini.early_exit.strides import ends_sentence, prefixes_asked
from iapo_mini.information import encode_postfix
from iapo_mini.intervals import format_interval
from iapo_mini.policy import Policy
from iapo_mini.rollouts import Rollouts
from iapo_mini.sampling import Rows, check_sampling, encode_prompts, sample_after
from iapo_mini.tasks import Problem

LONGEST_ANSWER = 16
"""Number of tokens after which a trial answer is compared although it is not closed."""
RECORDED: dict[str, type] = {"asking": int, "cut": bool}
"""What is recorded of a completion -> its type: tokens forwarded for asking, whether it was cut."""
_TAGS = ("<think>", "</think>", "<answer>")


@dataclass(frozen=True)
class Exits:
    """What early exit did to B completions.

    Attributes:
        prefix: (B,) long, number of tokens after which the thought was cut; -1 if it was not.
        questions: (B,) long, number of times that the policy was asked.
        tokens: (B,) long, tokens that were forwarded for asking. The completion does not hold them.
    """

    prefix: torch.Tensor
    questions: torch.Tensor
    tokens: torch.Tensor

    @property
    def cut(self) -> torch.Tensor:
        """(B,) bool, whether the thought was cut."""
        return self.prefix >= 0

    def records(self) -> list[dict[str, int | bool]]:
        """The values of :data:`RECORDED` for each completion."""
        pairs = zip(self.tokens.tolist(), self.cut.tolist())
        return [dict(zip(RECORDED, pair)) for pair in pairs]


def is_sure(rule: float | str, entropy: float, answer: str = "", before: str = "") -> bool:
    """Whether a forced answer is sure, by the rule of :class:`Stopping`.

    Args:
        rule: nats, or ``"agree"``.
        entropy: of the forced answer's first token, nats. Only a rule in nats reads it.
        answer: the most probable forced answer; an empty one is never sure. Only ``"agree"`` reads
            it, and ``before``.
        before: the answer to the question before this one, or an empty text.
    """
    if isinstance(rule, str):
        return answer != "" and answer == before
    return entropy < rule


def first_sure(sure: torch.Tensor, asked: torch.Tensor) -> torch.Tensor:
    """The prefix length after which each thought is cut.

    Args:
        sure: (B, L + 1) bool, whether the forced answer after this prefix is sure.
        asked: (B, L + 1) bool, whether the policy is asked after this prefix.

    Returns:
        (B,) long: the first prefix that is asked and sure; -1 if there is none.
    """
    found = sure & asked
    first = found.long().argmax(1)  # the first of equal values
    return torch.where(found.any(1), first, -1)


def may_end(text: str) -> bool:
    """Whether a thought may be ended after this text of a completion.

    It must have begun, its end must not be written yet, and no tag may be half written.
    """
    closed = "</think>" in text or "<answer>" in text
    half = any(text.endswith(tag[:n]) for tag in _TAGS for n in range(1, len(tag)))
    return bool(text.strip()) and not closed and not half


def room_to_ask(policy: Policy, stopping: Stopping | None) -> int:
    """Number of positions that a question may need after the last token of a completion.

    Raises:
        ValueError: for a postfix without tokens.
    """
    return 0 if stopping is None else len(encode_postfix(policy, stopping.postfix)) + LONGEST_ANSWER


def prefixes_to_ask(policy: Policy, rollouts: Rollouts, stride: int | str) -> torch.Tensor:
    """(B, L + 1) bool: the prefixes of whole completions after which early exit would ask."""
    asked = prefixes_asked(policy, rollouts, stride, ahead=False)
    ids = rollouts.completion_ids.tolist()
    for i, n in enumerate(rollouts.lengths.tolist()):
        text, texts = rollouts.prefill, token_texts(policy.tokenizer, ids[i][:n])
        for t in range(asked.shape[1]):
            asked[i, t] &= t < n and may_end(text)
            text += texts[t] if t < n else ""
    return asked


class _Asker:
    """Asks during sampling, and forces the postfix on rows that are sure (``sampling.Force``)."""

    def __init__(self, policy: Policy, stopping: Stopping, rows: int, memory_mb: float) -> None:
        self.policy, self.stopping, self.memory = policy, stopping, memory_mb * 2**20
        self.model: Any = policy.for_inference()
        self.postfix = encode_postfix(policy, stopping.postfix)
        self.prefill = prefill(policy.tokenizer)
        self.prefix = torch.full((rows,), -1, device=policy.device)
        self.questions, self.tokens = torch.zeros(2, rows, dtype=torch.long, device=policy.device)
        self.before = [""] * rows
        self.ends: dict[int, bool] = {}  # token -> whether it ends a sentence

    def __call__(self, t: int, rows: Rows, ids: torch.Tensor, cache: Cache) -> torch.Tensor:
        slots = self._due(t, rows, ids)
        layers: Any = cache.layers
        # A copy of the row's keys and values, and another one while the suffix is appended.
        row = 2 * sum(x[0].nbytes for y in layers for x in (y.keys, y.values))
        for part in torch.tensor(slots, device=ids.device).split(max(1, int(self.memory / row))):
            if len(part):
                self._ask(t, part, rows, cache)
        since = t - self.prefix[rows.active]
        forced = (self.prefix[rows.active] >= 0) & (since < len(self.postfix))
        return torch.where(forced, self.postfix[since.clamp(0, len(self.postfix) - 1)], -1)

    def _due(self, t: int, rows: Rows, ids: torch.Tensor) -> list[int]:
        """The rows in use that are asked after ``t`` tokens."""
        stride = self.stopping.stride
        slots: list[int] = []
        if isinstance(stride, int) and t % stride:
            return slots
        waiting = (rows.running & (self.prefix[rows.active] < 0)).tolist()
        written = ids[rows.active, :t].tolist()
        for slot, own in enumerate(written):
            if not waiting[slot] or not (stride != "sentence" or t == 0 or self._ends(own[-1])):
                continue
            text = self.policy.tokenizer.decode(own, skip_special_tokens=False)
            if may_end(self.prefill + str(text)):
                slots.append(slot)
        return slots

    def _ends(self, token: int) -> bool:
        if token not in self.ends:
            text = self.policy.tokenizer.decode([token], skip_special_tokens=False)
            self.ends[token] = ends_sentence(str(text))
        return self.ends[token]

    def _ask(self, t: int, slots: torch.Tensor, rows: Rows, cache: Cache) -> None:
        """Ask some rows after ``t`` tokens, and cut those that are sure."""
        layers: Any = cache.layers
        own = DynamicCache([(y.keys[slots], y.values[slots]) for y in layers])
        seen, start = rows.attend[slots, ..., : rows.width + t], rows.positions[slots] + t

        def read(tokens: torch.Tensor, after: int) -> torch.Tensor:
            """Logits (n, V) after some more tokens (n, k), of which ``after`` came before."""
            n, k = tokens.shape
            new = torch.ones(k, after + k, dtype=torch.bool, device=tokens.device).tril(after)
            mask = torch.cat([seen.expand(-1, -1, k, -1), new.expand(n, 1, -1, -1)], dim=3)
            logits: torch.Tensor = self.model(
                tokens,
                attention_mask=model_mask(self.model, mask),
                position_ids=start[:, None] + after + torch.arange(k, device=tokens.device),
                past_key_values=own,
                logits_to_keep=1,
            ).logits[:, -1]
            return logits

        numbers = rows.active[slots]
        logits = read(self.postfix.expand(len(slots), -1), 0)
        self.questions[numbers] += 1
        self.tokens[numbers] += len(self.postfix)
        answers = [""] * len(slots)
        if isinstance(self.stopping.rule, str):
            answers, more = self._answers(logits, read)
            self.tokens[numbers] += more
        entropies = logits_entropy(logits).tolist()
        for i, entropy, answer in zip(numbers.tolist(), entropies, answers):
            if is_sure(self.stopping.rule, entropy, answer, self.before[i]):
                self.prefix[i] = t
            self.before[i] = answer

    def _answers(
        self, logits: torch.Tensor, read: Callable[[torch.Tensor, int], torch.Tensor]
    ) -> tuple[list[str], torch.Tensor]:
        """The most probable answers, token by token, up to the next tag or the end of the turn.

        Returns:
            The texts, and the number of tokens forwarded for each, (n,) long.
        """
        written: list[list[int]] = [[] for _ in logits]
        texts = [""] * len(logits)
        more = torch.zeros(len(logits), dtype=torch.long, device=logits.device)
        stops = set(self.policy.eos_ids.tolist())
        open_rows = set(range(len(logits)))
        for length in range(LONGEST_ANSWER):
            token = logits.argmax(-1)
            for i in list(open_rows):
                written[i].append(int(token[i]))
                text = self.policy.tokenizer.decode(written[i], skip_special_tokens=False)
                texts[i], tag, _ = str(text).partition("<")
                if tag or written[i][-1] in stops:
                    open_rows.remove(i)
            if not open_rows or length + 1 == LONGEST_ANSWER:
                break
            more[list(open_rows)] += 1
            logits = read(token[:, None], len(self.postfix) + length)
        return [text.strip() for text in texts], more


def sample_until_sure(
    policy: Policy,
    problems: Sequence[Problem],
    stopping: Stopping,
    *,
    num_generations: int = 8,
    max_completion_length: int = 224,
    temperature: float = 1.0,
    seed: int = 0,
    memory_mb: float = 256.0,
    on_token: Callable[[int, int], object] = lambda tokens, running: None,
) -> tuple[Rollouts, Exits]:
    """Sample completions whose thoughts are cut when the forced answer is sure.

    Up to the cut, every completion is the one that :func:`iapo_mini.sampling.sample` draws with the
    same seed, up to rounding. Then follow the postfix and the answer. The completion holds both,
    and both count as its tokens.

    Args:
        policy, problems, num_generations, max_completion_length, temperature, seed, on_token: as
            for :func:`iapo_mini.sampling.sample`.
        stopping: when to stop.
        memory_mb: memory in MiB for the copies of keys and values that asking needs. It does not
            change the results.

    Raises the same errors as :func:`iapo_mini.sampling.check_sampling`.
    """
    problems = list(problems)
    check_sampling(problems, num_generations, max_completion_length, temperature)
    asker = _Asker(policy, stopping, len(problems) * num_generations, memory_mb)
    rollouts = sample_after(
        policy, *encode_prompts(policy, problems), num_generations=num_generations,
        max_completion_length=max_completion_length, temperature=temperature, seed=seed,
        on_token=on_token, force=asker,
    )  # fmt: skip
    return rollouts, Exits(asker.prefix, asker.questions, asker.tokens)


def exits_text(result: Mapping[str, Any], stopping: Stopping, chains: int) -> str:
    """One sentence on an evaluation's early exits: chains cut, and the cost of asking.

    Args:
        result: of :func:`iapo_mini.evaluation.evaluate`.
        stopping: the rule that was used.
        chains: number of completions.
    """
    rule = "agrees twice" if isinstance(stopping.rule, str) else f"is below {stopping.rule:g} nats"
    of = result["intervals"]
    asking, length = (
        format_interval((result[name], *of[name]), 1) for name in ("asking", "length")
    )
    return (
        f"Early exit (the forced answer {rule}): {round(result['cut'] * chains)} of {chains} "
        f"chains cut; per completion, {length} tokens written and {asking} more forwarded to ask."
    )
