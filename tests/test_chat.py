"""Prompts and ends of turns for the model families that people train.

Templates and end-of-turn tokens are those of the families; the tokenizer is our own.
"""

import copy
import itertools
import json
import random
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from helpers import run, tiny_policy
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from iapo_mini import chat
from iapo_mini.chat import continuation_ids, end_of_turn, prefill, render_prompt, token_texts
from iapo_mini.evaluation import evaluate
from iapo_mini.information import answer_entropies, encode_postfix
from iapo_mini.policy import Policy
from iapo_mini.problems.stories import chain_of_thought, stories, token_roles
from iapo_mini.rewards import check_completion, score
from iapo_mini.sampling import encode_prompts, from_ids, from_texts
from iapo_mini.tasks import POSTFIX, SYSTEM_PROMPT_INTEGER, Problem
from iapo_mini.tools.explain import Explained, terminal_text

PROBLEM = Problem("What is 2 + 2?", "4")
PERFECT = "<think>ok</think>\n<answer>4</answer>"

_TURNS = "{% for m in messages %}"
_CHATML = (
    _TURNS + "<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_NO_SYSTEM = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}"
    "{% endif %}"
)
# Family -> (template, end of a turn, whether the tokenizer names that token as special).
FAMILIES = {
    "gemma": (
        _NO_SYSTEM + _TURNS + "<start_of_turn>{{ 'model' if m['role'] == 'assistant' else "
        "m['role'] }}\n{{ m['content'] | trim }}<end_of_turn>\n{% endfor %}"
        "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}",
        "<end_of_turn>", False,
    ),
    "phi3": (
        _TURNS + "<|{{ m['role'] }}|>\n{{ m['content'] }}<|end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>\n{% endif %}",
        "<|end|>", False,
    ),
    "llama3": (
        _TURNS + "<|start_header_id|>{{ m['role'] }}<|end_header_id|>\n\n{{ m['content'] | trim }}"
        "<|eot_id|>{% endfor %}{% if add_generation_prompt %}<|start_header_id|>assistant"
        "<|end_header_id|>\n\n{% endif %}",
        "<|eot_id|>", True,
    ),
    "mistral": (
        _NO_SYSTEM + _TURNS + "{% if m['role'] == 'user' %}[INST] {{ m['content'] }} [/INST]"
        "{% else %}{{ m['content'] }}</s>{% endif %}{% endfor %}",
        "</s>", True,
    ),
    "qwen3": (_CHATML, "<|im_end|>", True),
    "r1": (
        _TURNS + "{% if m['role'] == 'assistant' %}<|Assistant|>{{ m['content'] }}"
        "<|end_of_sentence|>{% else %}<|User|>{{ m['content'] }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|Assistant|><think>\n{% endif %}",
        "<|end_of_sentence|>", True,
    ),
    "tinyllama": (
        _TURNS + "<|{{ m['role'] }}|>\n{{ m['content'] }}</s>\n{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>\n{% endif %}",
        "</s>", True,
    ),
}  # fmt: skip


def in_the_way_of(family, tokenizer):
    """A policy whose tokenizer has a family's template and whose model names another stop token."""
    template, end, special = FAMILIES[family]
    tokenizer = copy.deepcopy(tokenizer)
    if tokenizer.convert_tokens_to_ids(end) in (None, tokenizer.unk_token_id):
        tokenizer.add_tokens([AddedToken(end, special=special)])
    tokenizer.chat_template = template
    policy = tiny_policy("qwen2", tokenizer, vocab_size=1024)
    policy.model.generation_config.eos_token_id = tokenizer.convert_tokens_to_ids("<|endoftext|>")
    return policy, tokenizer.convert_tokens_to_ids(end)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_right_completion_earns_its_reward_in_every_family(family, tokenizer):
    policy, end = in_the_way_of(family, tokenizer)
    assert end_of_turn(policy.tokenizer) == end == int(policy.eos_ids[0])
    rollouts = score(from_texts(policy, [PROBLEM], [PERFECT]), policy.tokenizer, [PROBLEM])
    assert rollouts.completion_ids[0, -1] == end and bool(rollouts.finished[0])
    expected = "<think>\n" + PERFECT.removeprefix("<think>") if rollouts.prefill else PERFECT
    assert rollouts.texts(policy.tokenizer) == [expected]
    assert float(rollouts.rewards[0]) == 1.5
    check_completion(policy, PROBLEM)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_familys_prompt_has_the_question_and_the_instructions(family, tokenizer):
    policy, _ = in_the_way_of(family, tokenizer)
    prompt = render_prompt(policy.tokenizer, PROBLEM)
    assert SYSTEM_PROMPT_INTEGER in prompt and PROBLEM.question in prompt
    assert prompt.index(SYSTEM_PROMPT_INTEGER) < prompt.index(PROBLEM.question)


def test_the_token_that_ends_a_row_is_dropped_and_no_other(tokenizer):
    """Only generation_config names this token. Other special tokens in the text are kept."""
    policy, end = in_the_way_of("gemma", tokenizer)
    assert end not in policy.tokenizer.all_special_ids
    inside = policy.tokenizer.convert_tokens_to_ids("<|im_start|>")
    ids = [*policy.tokenizer.encode("<think> 1"), inside, end]
    prompts = encode_prompts(policy, [PROBLEM])
    rollouts = from_ids(policy, *prompts, [ids, ids[:-1]], 2)
    assert rollouts.texts(policy.tokenizer) == ["<think> 1<|im_start|>"] * 2
    assert rollouts.finished.tolist() == [True, False]


def test_tags_that_are_special_tokens_stay_in_the_text(tokenizer):
    tokenizer = copy.deepcopy(tokenizer)
    tags = ["<think>", "</think>", "<answer>", "</answer>"]
    tokenizer.add_special_tokens({"additional_special_tokens": tags})
    policy = tiny_policy("qwen2", tokenizer, vocab_size=1024)
    rollouts = score(from_texts(policy, [PROBLEM], [PERFECT]), tokenizer, [PROBLEM])
    assert rollouts.texts(tokenizer) == [PERFECT] and float(rollouts.rewards[0]) == 1.5


def test_a_prefill_of_the_template_is_judged_with_the_completion(tokenizer):
    policy, end = in_the_way_of("r1", tokenizer)
    assert prefill(policy.tokenizer) == "<think>\n"
    ids = [*policy.tokenizer.encode("ok</think>\n<answer>4</answer>"), end]
    rollouts = from_ids(policy, *encode_prompts(policy, [PROBLEM]), [ids], 1)
    rollouts = score(rollouts, policy.tokenizer, [PROBLEM])
    assert rollouts.texts(policy.tokenizer) == ["<think>\nok</think>\n<answer>4</answer>"]
    assert float(rollouts.rewards[0]) == 1.5
    # The estimator asks after the same prefill, which occurs once in the prompts.
    prompt = policy.tokenizer.decode(rollouts.prompt_ids[0][rollouts.prompt_mask[0]])
    assert prompt.endswith("<think>\n")
    whole = from_texts(policy, [PROBLEM], ["<think>\nok</think>\n<answer>4</answer>"])
    assert torch.equal(whole.completion_ids, rollouts.completion_ids)
    assert torch.equal(answer_entropies(policy, whole), answer_entropies(policy, rollouts))


def test_other_templates_have_no_prefill(tokenizer):
    for family in FAMILIES.keys() - {"r1"}:
        assert prefill(in_the_way_of(family, tokenizer)[0].tokenizer) == ""


def test_a_base_model_with_a_chat_template_stops_at_the_end_of_a_turn(tokenizer):
    """Its generation config names only <|endoftext|>, which never occurs in chats."""
    policy, end = in_the_way_of("qwen3", tokenizer)
    other = policy.tokenizer.convert_tokens_to_ids("<|endoftext|>")
    assert policy.eos_ids.tolist() == [end, other]


def test_a_template_that_continues_in_plain_text_adds_no_stop_token(tokenizer):
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = _TURNS + "{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    assert end_of_turn(tokenizer) is None


def test_a_model_without_a_template_is_refused_with_the_remedy(tokenizer):
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template, tokenizer.name_or_path = None, "some/base-model"
    with pytest.raises(ValueError, match=r"model is 'some/base-model', .* no chat template; take"):
        render_prompt(tokenizer, PROBLEM)


FAILING = [
    "{{ raise_exception('no') }}",
    "{{ messages[9] }}{% if %}",
    "{{ 1 / 0 }}",
    "{{ messages | int + 'a' }}",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
]


@pytest.mark.parametrize("template", FAILING)
def test_a_template_that_fails_is_one_sentence(tokenizer, template):
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = template
    with pytest.raises(ValueError, match="whose chat template can't write a question"):
        render_prompt(tokenizer, PROBLEM)


_LOOP = "{% for a in range(99999) %}"
ENDLESS = [
    _LOOP * 3 + "{% endfor %}" * 3,
    _LOOP + "{{ range(99999) | sum }}{% endfor %}",
    _LOOP * 2 + "{{ a }}" + "{% endfor %}" * 2,
    "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
]


@pytest.mark.parametrize("template", ENDLESS)
@pytest.mark.parametrize("main", [True, False], ids=["main thread", "another thread"])
def test_a_template_that_never_ends_is_stopped(tokenizer, template, main, monkeypatch):
    monkeypatch.setattr(chat, "PATIENCE", 0.3)
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = template

    def write():
        with pytest.raises(ValueError, match=r"chat template takes more than 0\.3 seconds"):
            render_prompt(tokenizer, PROBLEM)

    watcher, began = sys.gettrace(), time.monotonic()
    if main:
        write()
    else:
        with ThreadPoolExecutor() as pool:
            pool.submit(write).result()
    assert time.monotonic() - began < 5
    assert sys.gettrace() is watcher  # a debugger, say, goes on watching


def test_a_model_without_a_stop_token_is_refused(tokenizer):
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = _TURNS + "{{ m['content'] }}\n{% endfor %}"
    policy = tiny_policy("qwen2", tokenizer)
    policy.model.generation_config.eos_token_id = None
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="has no token that ends a completion; set eos_token"):
        policy.eos_ids  # noqa: B018


@pytest.fixture(scope="module")
def spaced():
    """A tokenizer like that of Llama 2, in which words include the space before them."""
    rng = random.Random(0)
    texts = []
    for problem in itertools.islice(stories("train", seed=0), 200):
        chain = "".join(s.text for s in chain_of_thought(problem, rng))
        texts += [problem.question, chain.replace("</think><answer>", "</think> <answer>")]
    inner = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=False))
    inner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    inner.decoder = decoders.Metaspace(prepend_scheme="always")
    alphabet = [chr(c) for c in range(33, 127)] + ["\n"]
    trainer = trainers.BpeTrainer(
        vocab_size=700, special_tokens=["<unk>", "<s>", "</s>"], initial_alphabet=alphabet,
        show_progress=False,
    )  # fmt: skip
    inner.train_from_iterator(texts, trainer)
    found = PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token="<s>", eos_token="</s>", unk_token="<unk>",
        pad_token="</s>", padding_side="left",
    )  # fmt: skip
    found.chat_template = FAMILIES["tinyllama"][0]
    return found


def test_a_continuing_text_gets_no_extra_space(spaced):
    assert spaced.convert_ids_to_tokens(spaced.encode(POSTFIX))[0].startswith("\u2581")
    for text in (POSTFIX, "7", "</answer>", " 7", "apples"):
        tokens = spaced.convert_ids_to_tokens(continuation_ids(spaced, text))
        assert "".join(tokens).replace("\u2581", " ") == text
    policy = Policy(tiny_policy("qwen2", spaced).model, spaced)
    tokens = spaced.convert_ids_to_tokens(encode_postfix(policy).tolist())
    assert "".join(tokens) == POSTFIX


def test_roles_of_story_tokens_are_right_for_tokenizers_with_leading_spaces(spaced):
    rng = random.Random(1)
    for problem in itertools.islice(stories("tune", seed=2), 20):
        chain = chain_of_thought(problem, rng)
        text = "".join(s.text for s in chain)
        ids = continuation_ids(spaced, text)
        assert "".join(token_texts(spaced, ids)) == text
        roles = token_roles(spaced, ids)
        ends = list(itertools.accumulate(len(s.text) for s in chain))
        position = 0
        for piece, role in zip(token_texts(spaced, ids), roles):
            owner = next(s for s, end in zip(chain, ends) if position < end)
            assert role == owner.role, (piece, text)
            position += len(piece)


@pytest.fixture(scope="module")
def bytewise():
    """A tokenizer of single bytes, like that of Qwen for characters that it has no token for."""
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=257, special_tokens=["<|end|>"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    inner.train_from_iterator(["7"], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<|end|>")


@pytest.mark.parametrize("text", ["5 €", "Zoë 🙂 12", "三 + 四 = 七", "🙂", "a\ufffdb", "plain"])
def test_a_character_in_several_tokens_is_the_last_ones(bytewise, text):
    ids = bytewise.encode(text, add_special_tokens=False)
    texts = token_texts(bytewise, ids)
    assert len(texts) == len(ids) and "".join(texts) == text
    if "\ufffd" not in text:
        assert [len(t) for t in texts] == [
            int(i == len(c.encode()) - 1) for c in text for i in range(len(c.encode()))
        ]
    # A row that was cut within a character, and bytes that are no character at all.
    assert len(token_texts(bytewise, ids[:-1])) == len(ids) - 1
    assert len(token_texts(bytewise, ids[-1:] * 9)) == 9


def test_the_terminal_shows_spaces_between_words(spaced):
    tokens = token_texts(spaced, continuation_ids(spaced, "<think> Mia has 12 apples."))
    shown = Explained(PROBLEM, tokens, [0.0] * len(tokens), [0.0] * (len(tokens) + 1), None)
    assert "Mia has" in terminal_text(shown, color=False)


def test_a_family_with_spaces_earns_its_reward_too(spaced):
    policy = Policy(tiny_policy("llama", spaced).model, spaced)
    policy.model.generation_config.eos_token_id = spaced.eos_token_id
    check_completion(policy, PROBLEM)


def test_a_model_that_can_not_write_a_perfect_completion_is_refused_before_any_work(
    config, tmp_path, tokenizer
):
    policy = tiny_policy("qwen2", tokenizer)
    policy.model.generation_config.eos_token_id = [
        tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("</think>"),
    ]  # fmt: skip
    with pytest.raises(ValueError, match="a token in its middle ends the row"):
        run(config, tmp_path / "run", policy=policy)
    assert not list((tmp_path / "run").iterdir())
    with pytest.raises(ValueError, match="a token in its middle ends the row"):
        evaluate(policy, [PROBLEM], ks=[1], num_generations=1, progress=False)


def test_a_tokenizer_that_loses_the_tags_is_refused(tokenizer):
    """Its normalizer removes angle brackets as markup."""
    told = json.loads(tokenizer.backend_tokenizer.to_str())
    told["normalizer"] = {"type": "Replace", "pattern": {"String": "<answer>"}, "content": ""}
    told["added_tokens"] = [t for t in told["added_tokens"] if t["content"] != "<answer>"]
    stripped = copy.deepcopy(tokenizer)
    stripped._tokenizer = Tokenizer.from_str(json.dumps(told))
    with pytest.raises(ValueError, match=r"it scores -1.5, and it is read as"):
        check_completion(tiny_policy("qwen2", stripped), PROBLEM)
