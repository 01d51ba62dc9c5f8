"""The entropy of whole answers, compared with the enumeration of all answers of two tokens."""

import math
from dataclasses import replace

import pytest
import torch
from helpers import (
    BATCH,
    WINDOWED,
    forced_logits,
    make_rollouts,
    tiny_policy,
    unpadded,
    windowed_policy,
)
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from iapo_mini.early_exit import answers
from iapo_mini.early_exit.answers import Prefix, ends_of_answer, top_answers, whole_answers
from iapo_mini.early_exit.branches import Branch, ask_branches, postfix_branch, with_cache
from iapo_mini.early_exit.question import EarlyExit
from iapo_mini.information import answer_entropies, encode_postfix
from iapo_mini.sampling import from_ids

ALL = dict(mass=1.0, width=1000)
"""Nothing is left out."""


def logits_after(policy, rollouts, branch):
    suffix = torch.tensor(branch.suffix)
    return forced_logits(policy, rollouts, branch.row, branch.prefix, suffix)[-1]


@pytest.mark.parametrize("family", ["qwen2", "gpt2"])
@pytest.mark.parametrize("cached", [True, False])
def test_each_branch_has_its_own_suffix(tokenizer, family, cached):
    policy, rollouts = tiny_policy(family, tokenizer), make_rollouts(**BATCH)
    branches = [
        Branch(5, 9, (3,)), Branch(0, 0, (4, 5)), Branch(0, 5, (4, 5)), Branch(0, 5, (5, 4)),
        Branch(4, 0, (7, 8, 9)), Branch(5, 2, (3,)), Branch(1, 1, (4, 5)), Branch(0, 5, (4, 5)),
    ]  # fmt: skip
    given = with_cache(policy.model, rollouts) if cached else rollouts
    assert (given.cache is not None) == (cached and family == "qwen2")
    found = ask_branches(policy.model, given, branches, lambda logits: logits)
    expected = torch.stack([logits_after(policy, rollouts, branch) for branch in branches])
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    "branch", [Branch(0, 6, (1,)), Branch(0, -1, (1,)), Branch(0, 2, ()), Branch(4, 1, (1,))]
)
def test_a_branch_that_fits_no_row_is_refused(base_policy, branch):
    with pytest.raises(ValueError, match="branches must have a suffix of at least one token and"):
        ask_branches(base_policy.model, make_rollouts(**BATCH), [branch], lambda logits: logits)


def test_some_branch_must_be_asked(base_policy):
    with pytest.raises(ValueError, match="branches must hold at least one branch, got none"):
        ask_branches(base_policy.model, make_rollouts(**BATCH), [], lambda logits: logits)


def enumerated(policy, ends, rollouts, i, t):
    """All answers of at most two tokens: ``[(tokens, probability)]``, by plain forward passes."""
    prompt, completion = unpadded(rollouts, i)
    trunk = torch.cat([prompt, completion[:t], encode_postfix(policy)])
    kept = (~ends).nonzero()[:, 0]

    @torch.no_grad()
    def after(beginnings):
        ids = torch.cat([trunk.expand(len(beginnings), -1), beginnings], dim=1)
        p = policy.model(ids, use_cache=False, logits_to_keep=1).logits[:, -1].double().softmax(-1)
        return p[:, ends].sum(1).tolist(), p[:, kept].tolist()

    (end,), (first,) = after(torch.zeros(1, 0, dtype=torch.long))
    out = [((), end)]
    tokens = kept.tolist()
    for token, p, end, second in zip(tokens, first, *after(kept[:, None])):
        out += [((token,), p * end), *(((token, k), p * q) for k, q in zip(tokens, second))]
    return out


def entropy(probabilities):
    return -sum(p * math.log(p) for p in probabilities if p > 0)


@pytest.fixture(scope="module")
def rollouts():
    return make_rollouts(prompts=[4, 2], completions=[3, 1], group=1)


@pytest.fixture(scope="module")
def asked():
    return torch.tensor([[True, False, True, False], [False, True, False, False]])


@pytest.fixture
def few(base_policy, monkeypatch):
    """All tokens but twelve end an answer, so that its tree is small."""
    ends = torch.ones_like(ends_of_answer(base_policy))
    ends[100:112] = False
    monkeypatch.setattr(answers, "ends_of_answer", lambda policy: ends)
    return ends


PREFIXES = [Prefix(0, 0), Prefix(0, 2), Prefix(1, 1)]


def test_the_whole_tree_has_the_entropy_of_all_answers(base_policy, few, rollouts, asked):
    found = whole_answers(base_policy, rollouts, asked, longest=2, **ALL)
    assert list(found.entropy) == PREFIXES
    for prefix in PREFIXES:
        possible = enumerated(base_policy, few, rollouts, *prefix)
        assert sum(p for _, p in possible) == pytest.approx(1, abs=1e-6)
        assert found.entropy[prefix] == pytest.approx(entropy(p for _, p in possible), abs=1e-4)
        assert found.left[prefix] == pytest.approx(0, abs=1e-5)
        texts: dict[str, float] = {}
        for tokens, p in possible:
            text = base_policy.tokenizer.decode(list(tokens)).strip()
            texts[text] = texts.get(text, 0) + p
        assert found.answers[prefix] == pytest.approx(texts, abs=1e-5)
    tops = {prefix: (text, p) for prefix, text, p in top_answers(found)}
    assert tops[PREFIXES[0]][1] == max(found.answers[PREFIXES[0]].values())


@pytest.mark.parametrize(("mass", "width"), [(0.95, 1000), (0.8, 1000), (0.5, 5), (1.0, 3)])
def test_a_part_of_the_tree_bounds_the_entropy(base_policy, few, rollouts, asked, mass, width):
    part = whole_answers(base_policy, rollouts, asked, longest=2, mass=mass, width=width)
    whole = whole_answers(base_policy, rollouts, asked, longest=2, **ALL)
    for prefix in PREFIXES:
        assert part.entropy[prefix] <= whole.entropy[prefix] + 1e-5 <= part.most[prefix] + 2e-5
        if width == 1000:
            assert part.left[prefix] <= 1 - mass + 1e-6
            total = sum(part.answers[prefix].values()) + part.left[prefix]
            assert total == pytest.approx(1, abs=1e-5)
    assert part.asked < whole.asked


def test_answers_of_one_token_have_the_papers_entropy(base_policy, rollouts, asked):
    """With a length of one, only the ways to end an answer are added up."""
    found = whole_answers(base_policy, rollouts, asked, longest=1, **ALL)
    paper = answer_entropies(base_policy, rollouts)
    for prefix in PREFIXES:
        p = logits_after(
            base_policy, rollouts, Branch(*prefix, tuple(encode_postfix(base_policy).tolist()))
        ).softmax(-1)
        ends = p[ends_of_answer(base_policy)]
        inner = entropy((ends / ends.sum()).tolist()) * float(ends.sum())
        assert found.entropy[prefix] + inner == pytest.approx(float(paper[prefix]), abs=1e-4)


def test_longer_answers_never_have_less_entropy(base_policy, few, rollouts, asked):
    two, three = (
        whole_answers(base_policy, rollouts, asked, longest=n, mass=0.9, width=4) for n in (2, 3)
    )
    assert all(three.entropy[prefix] >= two.entropy[prefix] - 1e-5 for prefix in PREFIXES)


def test_width_one_follows_the_most_probable_answer(base_policy, rollouts, asked):
    found = whole_answers(base_policy, rollouts, asked, longest=2, mass=1.0, width=1)
    for prefix in PREFIXES:
        postfix = tuple(encode_postfix(base_policy).tolist())
        kept = ~ends_of_answer(base_policy)
        tokens = ()
        for _ in range(2):
            logits = logits_after(base_policy, rollouts, Branch(*prefix, postfix + tokens))
            tokens += (int(logits.masked_fill(~kept, -math.inf).argmax()),)
        text = base_policy.tokenizer.decode(list(tokens)).strip()
        assert text in found.answers[prefix]


def test_another_postfix_gives_other_answers(base_policy, rollouts, asked):
    how = EarlyExit(postfix=" so 7</think><answer>")
    one, other = (
        whole_answers(base_policy, rollouts, asked, way, longest=1, **ALL)
        for way in (EarlyExit(), how)
    )
    assert one.entropy != other.entropy


@pytest.mark.parametrize("family", WINDOWED)
def test_models_without_a_shared_cache_are_asked_in_the_plain_way(tokenizer, family, asked):
    policy = windowed_policy(family, tokenizer, window=4)
    rollouts = make_rollouts(prompts=[4, 2], completions=[3, 1], group=1)
    with pytest.warns(UserWarning, match="can't share a cache"):
        found = whole_answers(policy, rollouts, asked, longest=1, **ALL)
    paper = answer_entropies(policy, rollouts, EarlyExit(way="naive"))
    assert found.entropy[PREFIXES[0]] <= float(paper[PREFIXES[0]]) + 1e-5


@pytest.mark.parametrize(
    ("option", "told"),
    [
        (dict(mass=0.0), "mass must be"), (dict(mass=1.5), "mass must be"),
        (dict(mass=math.nan), "mass must be"), (dict(longest=0), "longest must be"),
        (dict(width=0), "width must be"), (dict(mass=-0.1), "mass must be"),
    ],
)  # fmt: skip
def test_bad_options_are_refused(base_policy, rollouts, asked, option, told):
    with pytest.raises(ValueError, match=told):
        whole_answers(base_policy, rollouts, asked, **option)


def test_something_must_be_asked(base_policy, rollouts, asked):
    with pytest.raises(ValueError, match="asked must hold at least one prefix"):
        whole_answers(base_policy, rollouts, asked & False)


def test_the_cache_of_a_group_is_that_of_its_rows(base_policy):
    """Rows of one prompt, and rows given twice, are asked as if each stood alone."""
    group = make_rollouts(**BATCH)
    alone = replace(group, num_generations=1)
    asked = torch.zeros(6, 10, dtype=torch.bool)
    asked[:, 0] = True
    one, other = (
        whole_answers(base_policy, x, asked, longest=1, mass=0.9, width=8) for x in (group, alone)
    )
    assert list(one.entropy.values()) == pytest.approx(list(other.entropy.values()), abs=1e-5)


@pytest.fixture(scope="module")
def merging(base_policy):
    """The policy with a tokenizer that has a token ``.</``."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=len(alphabet) + 3, initial_alphabet=alphabet, special_tokens=["<pad>"]
    )
    tokenizer.train_from_iterator([".</", ".</"], trainer)
    return replace(
        base_policy,
        tokenizer=PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>"),
    )


def test_a_joined_postfix_is_written_as_the_tokenizer_would(merging):
    encode, decode = merging.tokenizer.encode, merging.tokenizer.decode
    for text in ("a.", "a", ".", "a b", "2.", "5 €"):
        ids = encode(text)
        rollouts = from_ids(merging, torch.tensor([[5]]), torch.tensor([[True]]), [ids], 1)
        plain, joined = (
            postfix_branch(merging, rollouts, 0, len(ids), "</x>", joined)
            for joined in (False, True)
        )
        assert plain == Branch(0, len(ids), tuple(encode("</x>")))
        written = [*ids[: joined.prefix], *joined.suffix]
        assert written == encode(text + "</x>") and decode(written) == text + "</x>"
        assert (joined == plain) == (not text.endswith("."))
        assert postfix_branch(merging, rollouts, 0, 0, "</x>", True).suffix == plain.suffix
