"""Rollouts: their quantities, their rows and their texts."""

from dataclasses import FrozenInstanceError, fields, replace

import pytest
import torch
from helpers import make_rollouts, written

from iapo_mini.rollouts import FILLED_BY, joined

BY_ROW, BY_TOKEN = ("rewards", "correct"), ("token_entropies", "informativeness")


def values(rollouts, name):
    """Different numbers for all rows and tokens."""
    rows, width = rollouts.completion_ids.shape
    return torch.arange(float(rows)) if name in BY_ROW else torch.rand(rows, width)


@pytest.mark.parametrize(
    ("name", "by"),
    [
        ("rewards", "rewards.score"),
        ("correct", "rewards.score"),
        ("token_entropies", "sampling.sample"),
        ("informativeness", "information.inform"),
    ],
)
def test_a_quantity_that_is_not_filled_in_is_named(name, by):
    message = rf"^these rollouts have no {name} yet; {by} fills it in\.$"
    with pytest.raises(ValueError, match=message):
        getattr(make_rollouts([3], [2, 1], group=2), name)
    others = {other: torch.zeros(2) for other in FILLED_BY if other != name}
    with pytest.raises(ValueError, match=message):
        getattr(make_rollouts([3], [2, 1], group=2).filled(**others), name)


def test_filling_in_returns_a_copy():
    plain = make_rollouts([3], [2, 1], group=2)
    found = {name: values(plain, name) for name in FILLED_BY}
    rewarded = plain.filled(rewards=found["rewards"], correct=found["correct"])
    full = rewarded.filled(token_entropies=found["token_entropies"])
    full = full.filled(informativeness=found["informativeness"])
    full = full.filled(sampled_logprobs=found["sampled_logprobs"])
    assert not plain.known and set(rewarded.known) == {"rewards", "correct"}
    for name, value in found.items():
        assert getattr(full, name) is value
    for field in fields(plain):
        if field.name != "known":
            assert getattr(full, field.name) is getattr(plain, field.name)
    # The second value replaces the first.
    assert full.filled(rewards=-full.rewards).rewards.tolist() == [0.0, -1.0]
    assert full.rewards.tolist() == [0.0, 1.0]


@pytest.mark.parametrize("name", ["reward", "old_logprobs", "cache", "advantages"])
def test_another_name_is_refused(name):
    message = f"name must be one of {', '.join(FILLED_BY)}, got '{name}'"
    with pytest.raises(TypeError, match=message):
        make_rollouts([3], [2, 1], group=2).filled(**{name: torch.zeros(2)})


@pytest.mark.parametrize("name", ["old_logprobs", "rewards", "informativeness", "cache"])
def test_fields_can_not_be_assigned(name):
    with pytest.raises(FrozenInstanceError):
        setattr(make_rollouts([3], [2, 1], group=2), name, torch.zeros(2))


def test_tensors_are_those_of_the_batch_and_those_filled_in():
    rollouts = make_rollouts([3], [2, 1], group=2)
    others = {"num_generations", "known", "cache", "prefill", "limit", "references"}
    own = {field.name for field in fields(rollouts)} - others
    assert set(rollouts.tensors()) == own
    rewards = torch.tensor([1.5, -0.5])
    filled = rollouts.filled(rewards=rewards).tensors()
    assert set(filled) == own | {"rewards"} and filled["rewards"] is rewards


def test_lengths_count_the_end_and_no_padding():
    assert make_rollouts([3, 1], [4, 0, 7, 1], group=2, right=3).lengths.tolist() == [4, 0, 7, 1]


def test_rows_cuts_whole_groups_to_their_longest():
    rollouts = make_rollouts([3, 5], [4, 2, 7, 1], group=2)
    rollouts = rollouts.filled(**{name: values(rollouts, name) for name in FILLED_BY})
    part = rollouts.rows(0, 2)
    assert part.completion_ids.shape == part.old_logprobs.shape == (2, 4)
    assert torch.equal(part.completion_ids, rollouts.completion_ids[:2, :4])
    assert part.lengths.tolist() == [4, 2]
    assert part.rewards.tolist() == part.correct.tolist() == [0.0, 1.0]
    for name in BY_TOKEN:
        assert torch.equal(getattr(part, name), getattr(rollouts, name)[:2, :4])
    assert part.prompt_ids.shape == (2, 5) and part.num_generations == 2


def test_texts_keep_tags_and_leave_out_the_end(tokenizer):
    text = "<think> 3.</think><answer> 3</answer>"
    ids = [*tokenizer.encode(text), tokenizer.eos_token_id]
    rollouts = written([ids, ids[:3]], group=2, pad=tokenizer.encode(" 7")[0])
    rollouts = replace(rollouts, finished=torch.tensor([True, False]))
    assert rollouts.texts(tokenizer) == [text, "<think> 3."]


def test_joined_groups_are_the_rows_they_were():
    """In batches of different widths every row keeps its tokens and quantities."""
    one = make_rollouts([3, 5], [2, 4, 1, 3], group=2, seed=1)
    other = make_rollouts([7], [6, 2], group=2, seed=2)
    parts = [
        replace(
            part.filled(**{name: values(part, name) for name in FILLED_BY}),
            references=tuple(f"{number}-{i}" for i in range(len(part.lengths))),
        )
        for number, part in enumerate((one, other))
    ]
    whole = joined(parts)
    assert whole.references == ("0-0", "0-1", "0-2", "0-3", "1-0", "1-1")
    assert whole.completion_ids.shape == (6, 6) and whole.prompt_ids.shape == (6, 7)
    row = 0
    for part in parts:
        for i in range(len(part.lengths)):
            for name in ("prompt", "completion"):
                ids, mask = getattr(whole, f"{name}_ids"), getattr(whole, f"{name}_mask")
                was, real = getattr(part, f"{name}_ids"), getattr(part, f"{name}_mask")
                assert torch.equal(ids[row][mask[row]], was[i][real[i]])
            n = int(part.lengths[i])
            assert torch.equal(whole.old_logprobs[row, :n], part.old_logprobs[i, :n])
            for name in BY_TOKEN:
                assert torch.equal(whole.known[name][row, :n], part.known[name][i, :n])
            for name in BY_ROW:
                assert whole.known[name][row] == part.known[name][i]
            row += 1
    # Prompts stay left-padded, completions right-padded.
    assert whole.prompt_mask[:, -1].all() and whole.completion_mask[:, 0].all()
    assert joined(parts[:1]) is parts[0]
