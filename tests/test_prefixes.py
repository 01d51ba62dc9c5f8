"""The three ways to ask: masks, models that can't share a cache, memory, prefixes asked once."""

import warnings
from dataclasses import replace

import pytest
import torch
from helpers import (
    BATCH,
    WAYS,
    WINDOWED,
    close,
    explicit_entropies,
    make_rollouts,
    only,
    redraw,
    tiny_policy,
    windowed_policy,
    written,
)
from hypothesis import given
from hypothesis import strategies as st
from transformers import MistralForCausalLM

from iapo_mini.early_exit import prefixes, question
from iapo_mini.early_exit.prefixes import ask, branch_inputs
from iapo_mini.early_exit.question import EarlyExit, Question
from iapo_mini.early_exit.reading import logits_entropy
from iapo_mini.information import answer_entropies, encode_postfix
from iapo_mini.policy import Policy


def test_branches_follow_their_own_prefix():
    """Two rows by hand: the first has two columns of padding; K = 2, two branches per row."""
    trunk_mask = torch.tensor([[False, False, True, True, True], [True, True, True, True, False]])
    position_ids = torch.tensor([[0, 0, 0, 1, 2], [0, 1, 2, 3, 3]])
    ends = torch.tensor([[2, 4], [0, 3]])
    inputs = branch_inputs(trunk_mask, position_ids, ends, torch.tensor([50, 60]))
    assert inputs["input_ids"].tolist() == [[50, 60, 50, 60]] * 2
    assert inputs["position_ids"].tolist() == [[1, 2, 3, 4], [1, 2, 4, 5]]
    expected = [
        [
            [0, 0, 1, 0, 0, 1, 0, 0, 0],
            [0, 0, 1, 0, 0, 1, 1, 0, 0],
            [0, 0, 1, 1, 1, 0, 0, 1, 0],
            [0, 0, 1, 1, 1, 0, 0, 1, 1],
        ],
        [
            [1, 0, 0, 0, 0, 1, 0, 0, 0],
            [1, 0, 0, 0, 0, 1, 1, 0, 0],
            [1, 1, 1, 1, 0, 0, 0, 1, 0],
            [1, 1, 1, 1, 0, 0, 0, 1, 1],
        ],
    ]
    assert inputs["attention_mask"].dtype == torch.bool
    assert inputs["attention_mask"][:, 0].int().tolist() == expected
    each = branch_inputs(trunk_mask, position_ids, ends, torch.tensor([[50, 60], [70, 80]]))
    assert each["input_ids"].tolist() == [[50, 60, 50, 60], [70, 80, 70, 80]]


# Models that can't share a cache


@pytest.mark.parametrize("name", ["mistral", "phi", "olmo2", "gpt_neox"])
def test_other_architectures_are_compared_at_use(tokenizer, monkeypatch, name):
    policy = tiny_policy(name, tokenizer)
    assert name not in prefixes.TESTED
    asked, agrees = [], prefixes._agrees

    def watched(*args):
        asked.append(agrees(*args))
        return asked[-1]

    monkeypatch.setattr(prefixes, "_agrees", watched)
    rollouts = make_rollouts(**BATCH, left=2, right=1)
    expected = explicit_entropies(policy, rollouts)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for way in question.WAYS:
            how = EarlyExit(way=way, chunk_size=5)
            close(answer_entropies(policy, rollouts, how), expected)
    assert asked == [True]  # once for a model, whatever the way


class Deaf(MistralForCausalLM):
    """A model that counts positions from the cache and ignores given position ids."""

    def forward(self, input_ids=None, attention_mask=None, position_ids=None, **kwargs):
        return super().forward(input_ids, attention_mask=attention_mask, **kwargs)


@pytest.mark.parametrize("way", ["packed", "cached"])
@pytest.mark.parametrize("completions", [[5, 1, 3, 6], [0, 3, 2, 4], [0, 0, 0, 0]])
def test_a_model_that_packing_gets_wrong_uses_the_naive_way(tokenizer, way, completions):
    like = tiny_policy("mistral", tokenizer, sliding_window=None).model.config
    policy = Policy(redraw(Deaf(like)), tokenizer)
    rollouts = make_rollouts([4, 9], completions, group=2)
    with pytest.warns(UserWarning, match="masks or positions work differently") as told:
        found = answer_entropies(policy, rollouts, EarlyExit(way=way))
    assert len(told) == 1
    close(found, explicit_entropies(policy, rollouts), atol=1e-5)


@pytest.mark.parametrize("name", WINDOWED)
@pytest.mark.parametrize("way", ["packed", "cached"])
def test_a_short_sliding_window_uses_the_naive_way(tokenizer, name, way):
    policy = windowed_policy(name, tokenizer, 6)
    rollouts = make_rollouts([4, 9], [8, 1, 3, 6], group=2)
    expected = explicit_entropies(policy, rollouts)
    wide = explicit_entropies(windowed_policy(name, tokenizer, 64), rollouts)
    assert (expected - wide).abs().max() > 0.01  # the window matters
    with pytest.warns(UserWarning, match="sliding window of 6") as told:
        found = answer_entropies(policy, rollouts, EarlyExit(way=way))
    assert len(told) == 1 and "naive" in str(told[0].message)
    close(found, expected)


@pytest.mark.parametrize("name", WINDOWED)
def test_a_long_sliding_window_changes_nothing(tokenizer, name):
    policy = windowed_policy(name, tokenizer, 17)
    rollouts = make_rollouts([4, 9], [6, 1, 3, 6], group=2)  # 9 + 6 + 2 tokens
    expected = explicit_entropies(policy, rollouts)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for way in ("packed", "cached"):
            close(answer_entropies(policy, rollouts, EarlyExit(way=way)), expected)


# Vocabulary and memory


@pytest.fixture(scope="module")
def wide_policy(tokenizer):
    """A policy with a vocabulary of 20,000, so 80 kB of fp32 logits for each position."""
    sizes = dict(vocab_size=20_000, hidden_size=16, num_attention_heads=2, num_key_value_heads=1)
    return tiny_policy("llama", tokenizer, intermediate_size=24, **sizes)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("memory_mb", [1, 4])
def test_logits_stay_within_the_memory_given(wide_policy, way, memory_mb):
    rollouts = make_rollouts([5, 3], [30, 12, 7, 25], group=2)
    branches, vocabulary = int((rollouts.lengths + 1).sum()), 20_000
    if way != "naive":
        branches -= 2  # each group asks once what comes before any token
    read_sizes, made_sizes = [], []

    def read(rows, logits):
        assert logits.ndim == 3 and len(rows) == len(logits)
        read_sizes.append(logits.numel())
        return logits_entropy(logits)

    head = wide_policy.model.get_output_embeddings()
    hook = head.register_forward_hook(lambda m, args, out: made_sizes.append(out.numel()))
    with only(way, memory_mb=memory_mb) as how:
        found = ask(wide_policy.model, rollouts, Question(encode_postfix(wide_policy), read), how)
    hook.remove()
    assert sum(read_sizes) == branches * vocabulary and len(read_sizes) > 1
    # One copy in the model's dtype, one in fp32, and a temporary.
    assert max(made_sizes + read_sizes) * 12 <= memory_mb * 2**20
    assert max(made_sizes) < branches * vocabulary / 4  # never (B, L, V)
    close(found[..., 0], explicit_entropies(wide_policy, rollouts))


class Hungry:
    """A ``read`` that runs out of memory in its first calls."""

    def __init__(self, times, error=torch.OutOfMemoryError):
        self.times, self.error = times, error

    def __call__(self, rows, logits):
        self.times -= 1
        if self.times >= 0:
            raise self.error("no room for the logits")
        return logits_entropy(logits)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("error", [torch.OutOfMemoryError, MemoryError])
def test_out_of_memory_halves_the_budget_and_continues(base_policy, way, error):
    rollouts = make_rollouts(**BATCH)
    asked = Question(encode_postfix(base_policy), Hungry(3, error))
    with (
        only(way, memory_mb=64, chunk_size=8) as how,
        pytest.warns(UserWarning, match="out of memory") as told,
    ):
        found = ask(base_policy.model, rollouts, asked, how)
    budgets = [str(w.message).rpartition("memory_mb=")[2] for w in told]
    assert budgets == ["32.", "16.", "8."]
    close(found[..., 0], explicit_entropies(base_policy, rollouts))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("chunk_size", [None, 8])
@pytest.mark.filterwarnings("ignore:out of memory")
def test_lasting_out_of_memory_is_raised(base_policy, way, chunk_size):
    calls = []

    def read(rows, logits):
        calls.append(len(rows))
        if len(calls) > 100:
            pytest.fail("it goes on for ever")
        raise torch.OutOfMemoryError("no room for the logits")

    asked = Question(encode_postfix(base_policy), read)
    with only(way, chunk_size=chunk_size) as how, pytest.raises(torch.OutOfMemoryError):
        ask(base_policy.model, make_rollouts(**BATCH), asked, how)
    # The smallest possible chunk was tried: one branch, or one column of a block of rows.
    assert calls[-1] <= (8 if way == "shared" else 1)


@pytest.mark.parametrize("way", WAYS)
def test_other_errors_are_not_swallowed(base_policy, way):
    asked = Question(encode_postfix(base_policy), Hungry(1, RuntimeError))
    with only(way) as how, pytest.raises(RuntimeError, match="no room"):
        ask(base_policy.model, make_rollouts(**BATCH), asked, how)


def test_asking_after_nothing_is_refused(base_policy):
    rollouts = make_rollouts(**BATCH)
    beyond = torch.arange(10) > rollouts.lengths[:, None]
    asked = Question(encode_postfix(base_policy), lambda rows, logits: logits_entropy(logits))
    with pytest.raises(ValueError, match="asked must hold at least one prefix"):
        ask(base_policy.model, rollouts, asked, asked=beyond)


# Prefixes that completions share


@given(
    rows=st.lists(
        st.lists(st.integers(1, 2), min_size=0, max_size=5), min_size=1, max_size=8
    ).filter(lambda rows: any(rows)),
    group=st.sampled_from([1, 2, 4]),
)
def test_shared_prefixes_by_a_loop(rows, group):
    rows = rows[: len(rows) // group * group] or [[1]] * group
    donors, shared = prefixes._shared_prefixes(written(rows, group))
    for i, row in enumerate(rows):
        earlier = range(i // group * group, i)
        common = []
        for j in earlier:
            n = 0
            while n < min(len(row), len(rows[j])) and row[n] == rows[j][n]:
                n += 1
            common.append(n)
        if not common:
            assert (int(donors[i]), int(shared[i])) == (i, -1)
        else:
            assert int(shared[i]) == max(common)
            assert int(donors[i]) in earlier and common[int(donors[i]) % group] == max(common)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("size", [{}, {"chunk_size": 1}, {"memory_mb": 0.01}])
def test_equal_completions_are_asked_once(base_policy, way, size):
    """Has many equal rows, rows that are prefixes of others, and a group without either."""
    group = 10
    rollouts = make_rollouts([3, 5, 4], [4] * 10 + [2, 4] * 5 + [1, 0] * 5, group)
    ids = rollouts.completion_ids.clone()
    ids[:10], ids[10:20, :2] = ids[0], ids[10, :2]
    rollouts = replace(rollouts, completion_ids=ids)
    asked = []

    def read(rows, logits):
        asked.extend(rows.tolist())
        return logits_entropy(logits)

    with only(way, **size) as how:
        found = ask(base_policy.model, rollouts, Question(encode_postfix(base_policy), read), how)
    found = found[..., 0]
    close(found, explicit_entropies(base_policy, rollouts))
    if way != "naive":
        assert asked.count(0) == 5 and not set(asked) & set(range(1, 10))
        assert torch.equal(found[:10], found[:1].expand(10, -1))
        assert asked.count(10) == 3 and all(asked.count(i) <= 2 for i in range(11, 20))


@pytest.mark.parametrize(
    ("attention", "reason"),
    [("sdpa", None), ("flash_attention_2", "takes no 4-D mask")],
)
def test_reasons_against_packing(tokenizer, attention, reason):
    model = tiny_policy("llama", tokenizer).model
    model.config._attn_implementation = attention
    found = prefixes.packing_problem(model, 30)
    assert found is None if reason is None else reason in found
