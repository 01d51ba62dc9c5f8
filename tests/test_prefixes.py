"""Asking after every prefix: each way against a forward pass per prefix, and its memory."""

import copy
import warnings
from dataclasses import replace

import pytest
import torch
from helpers import (
    TRIVIAL,
    WAYS,
    entropies_by,
    explicit_entropies,
    make_rollouts,
    only,
    perturb_lora,
    redraw,
    tiny_policy,
    unpadded,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import DynamicCache, MistralForCausalLM

from iapo_mini import policy as policy_module
from iapo_mini.early_exit import flat, prefixes
from iapo_mini.early_exit.prefixes import ask, branch_inputs
from iapo_mini.information import answer_entropies, candidate_logprobs, encode_postfix, entropy
from iapo_mini.logprobs import token_logprobs
from iapo_mini.policy import Policy, load_policy
from iapo_mini.sampling import _GrowingLayer, sample
from iapo_mini.tasks import POSTFIX

# Each number with its space is one token: postfixes of 1 to 8 tokens.
POSTFIXES = ["".join(f" {n}" for n in range(7, 7 + k)) for k in range(1, 9)]
BATCH = dict(prompts=[4, 9, 2], completions=[5, 1, 3, 6, 0, 4], group=2)


def close(found, expected, atol=1e-4):
    torch.testing.assert_close(found, expected, atol=atol, rtol=0)


@st.composite
def batches(draw, longest=10):
    """Rollouts of random tokens; few different ones, so that completions may begin alike."""
    prompts = draw(st.lists(st.integers(1, 12), min_size=1, max_size=3))
    group = draw(st.integers(1, 3))
    rows = group * len(prompts)
    return make_rollouts(
        prompts,
        draw(st.lists(st.integers(0, longest), min_size=rows, max_size=rows)),
        group,
        vocabulary=draw(st.sampled_from([3, 800])),
        seed=draw(st.integers(0, 99)),
        left=draw(st.integers(0, 4)),
        right=draw(st.integers(0, 4)),
    )


# Exactness


@pytest.mark.parametrize("postfix", [*POSTFIXES, POSTFIX])
def test_postfixes_have_the_lengths_meant(base_policy, postfix):
    expected = 2 if postfix == POSTFIX else postfix.count(" ")
    assert len(encode_postfix(base_policy, postfix)) == expected


@settings(max_examples=25)
@given(
    rollouts=batches(),
    postfix=st.sampled_from([*POSTFIXES, POSTFIX]),
    chunk_size=st.sampled_from([1, 2, 7, None]),
    memory_mb=st.sampled_from([0.01, 256.0]),
    queries=st.sampled_from([1, 3, 128]),
)
def test_every_way_equals_the_definition(
    base_policy, monkeypatch, rollouts, postfix, chunk_size, memory_mb, queries
):
    monkeypatch.setattr(flat, "_QUERIES", queries)
    expected = explicit_entropies(base_policy, rollouts, postfix)
    for way in WAYS:
        found = entropies_by(
            way, base_policy, rollouts, postfix, chunk_size=chunk_size, memory_mb=memory_mb
        )
        assert found.dtype == torch.float32, way
        close(found, expected)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("keep", [1, 2, 3, 5])
def test_the_last_positions_of_the_suffix_are_kept(base_policy, way, keep):
    """All kept log-probabilities, each row with a suffix of its own."""
    rollouts = make_rollouts(**BATCH, left=1)
    suffix = torch.randint(1, 800, (6, 5), generator=torch.Generator().manual_seed(keep))
    with only(way) as method:
        found = ask(
            base_policy.model,
            rollouts,
            suffix,
            lambda rows, logits: logits.log_softmax(-1)[..., ::50].flatten(1),
            keep=keep,
            method=method,
            chunk_size=4,
        )
    for i, n in enumerate(rollouts.lengths.tolist()):
        prompt, completion = unpadded(rollouts, i)
        for t in range(n + 1):
            ids = torch.cat([prompt, completion[:t], suffix[i]])
            with torch.no_grad():
                log_p = base_policy.model(ids[None]).logits[0, -keep:].log_softmax(-1)
            close(found[i, t], log_p[:, ::50].flatten(), atol=1e-3)
        assert not found[i, n + 1 :].any()


@pytest.mark.parametrize("way", WAYS)
def test_only_what_is_asked_is_answered(base_policy, way):
    rollouts = make_rollouts(**BATCH, right=2)
    expected = explicit_entropies(base_policy, rollouts)
    asked = torch.rand(expected.shape, generator=torch.Generator().manual_seed(0)) < 0.5
    asked[3] = False
    reached = torch.arange(expected.shape[1]) <= rollouts.lengths[:, None]
    seen = []

    def read(rows, logits):
        seen.extend(rows.tolist())
        return entropy(logits)

    with only(way) as method:
        found = ask(
            base_policy.model, rollouts, encode_postfix(base_policy), read, asked=asked,
            method=method, chunk_size=2,
        )[..., 0]  # fmt: skip
    close(found, expected * asked)
    assert (asked & ~reached).any() and len(seen) <= int((asked & reached).sum())


class OtherHead(torch.nn.Linear):
    """A head that is more than its weights, as one with an adapter or in 4 bits is."""

    def forward(self, x):
        return super().forward(x) * 3


def test_a_head_that_is_no_plain_matrix_is_asked_for_its_logits(tokenizer):
    policy = tiny_policy("qwen2", tokenizer)
    rollouts, plain = make_rollouts(**BATCH), policy.model.lm_head
    policy.model.lm_head = OtherHead(plain.in_features, plain.out_features, bias=False)
    policy.model.lm_head.weight = plain.weight
    close(entropies_by("flat", policy, rollouts), explicit_entropies(policy, rollouts))
    texts = [" 7", " 12", " 30"]
    flat_way, naive = (
        candidate_logprobs(policy, rollouts, texts, method=method) for method in ("packed", "naive")
    )
    close(flat_way, naive, atol=1e-3)


def plain_attention(query, key, value, mask, scale):
    """Query by query, head by head."""
    n, sets, heads, _ = query.shape
    shared = heads // key.shape[1]
    out, lse = torch.zeros_like(query), torch.zeros(n, sets, heads)
    for i in range(n):
        for q in range(sets):
            for h in range(heads):
                scores = key[:, h // shared] @ query[i, q, h] * scale + mask[i]
                lse[i, q, h] = scores.exp().sum().log()
                out[i, q, h] = scores.softmax(0) @ value[:, h // shared]
    return out, lse


class ElsewhereTensor(torch.Tensor):
    """Says that it lives on an accelerator, so that the branch for those is taken."""

    device = torch.device("cuda")


@pytest.mark.parametrize("elsewhere", [False, True])
@pytest.mark.parametrize(("heads", "kv_heads", "sets"), [(2, 2, 1), (4, 2, 3), (6, 1, 2)])
def test_attention_and_its_log_sum_exp(heads, kv_heads, sets, elsewhere):
    generator = torch.Generator().manual_seed(0)
    n, length, size = 5, 9, 8
    query = torch.randn(n, sets, heads, size, generator=generator)
    key, value = torch.randn(2, length, kv_heads, size, generator=generator)
    mask = torch.full((n, length), float("-inf")).triu(length - n + 1)
    given = query.as_subclass(ElsewhereTensor) if elsewhere else query
    out, lse = flat.attend(given, key, value, mask, 0.3)
    expected, expected_lse = plain_attention(query, key, value, mask, 0.3)
    close(torch.Tensor(out), expected, atol=1e-5)
    close(torch.Tensor(lse), expected_lse, atol=1e-5)


def test_branches_stand_behind_their_own_prefix():
    """Two rows by hand: the first has two columns of left-padding; K = 2, branches after 2 ends."""
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


def test_estimating_consumes_no_randomness_and_keeps_no_graph(base_policy):
    before = torch.get_rng_state()
    for method in prefixes.METHODS:
        found = answer_entropies(base_policy, make_rollouts([4], [3, 2], group=2), method=method)
        assert not found.requires_grad
    assert torch.equal(torch.get_rng_state(), before)


# Off-by-ones of the released code


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("postfix", [POSTFIX, POSTFIXES[0], POSTFIXES[4]])
def test_column_t_follows_t_completion_tokens(base_policy, way, postfix):
    rollouts = make_rollouts([4, 9], [5, 1, 3, 6], group=2, left=2, right=1)
    expected = explicit_entropies(base_policy, rollouts, postfix)
    close(entropies_by(way, base_policy, rollouts, postfix, chunk_size=3), expected)
    # Neighbouring columns differ, so a shift by one would have been seen.
    for i, n in enumerate(rollouts.lengths.tolist()):
        assert (expected[i, 1 : n + 1] - expected[i, :n]).abs().min() > 1e-3


@pytest.mark.parametrize("way", WAYS)
def test_a_token_is_seen_from_its_own_column_on(base_policy, way):
    """The cached prefix is not one token short, nor one too long."""
    rollouts = make_rollouts([4, 9], [6, 6, 6, 6], group=2, left=1)
    before = entropies_by(way, base_policy, rollouts)
    for t in range(6):
        other = replace(rollouts, completion_ids=rollouts.completion_ids.clone())
        other.completion_ids[:, t] = other.completion_ids[:, t] % 800 + 1
        after = entropies_by(way, base_policy, other)
        close(after[:, : t + 1], before[:, : t + 1], atol=1e-5)
        assert (after[:, t + 1] - before[:, t + 1]).abs().min() > 1e-3


@pytest.mark.parametrize("way", WAYS)
def test_short_prefixes_beside_long_ones_keep_their_positions(base_policy, way):
    """What a row gets depends neither on its chunk nor on other rows."""
    rollouts = make_rollouts(**BATCH)
    whole = entropies_by(way, base_policy, rollouts)
    for chunk_size in (1, 2, 3, 50):
        close(entropies_by(way, base_policy, rollouts, chunk_size=chunk_size), whole, atol=1e-5)
    for start in (0, 2, 4):
        part = rollouts.rows(start, start + 2)
        found = entropies_by(way, base_policy, part)
        close(found, whole[start : start + 2, : found.shape[1]], atol=1e-5)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("padding", [{"left": 5}, {"right": 5}, {"left": 3, "right": 2}])
def test_padding_takes_no_part(base_policy, way, padding):
    plain = entropies_by(way, base_policy, make_rollouts(**BATCH))
    for pad in (0, 7):
        found = entropies_by(way, base_policy, make_rollouts(**BATCH, **padding, pad=pad))
        close(found[:, : plain.shape[1]], plain, atol=1e-5)
        assert not found[:, plain.shape[1] :].any()


# Architectures

FAMILIES = [(name, "sdpa") for name in ("qwen2", "qwen3", "llama", "gemma", "gpt2")]
FAMILIES += [("llama", "eager"), ("gpt2", "eager")]


@pytest.mark.parametrize(("name", "attention"), FAMILIES)
def test_tested_architectures(tokenizer, name, attention):
    policy = tiny_policy(name, tokenizer, attention)
    assert policy.model.config._attn_implementation == attention
    assert policy.model.config.model_type in prefixes.TESTED
    rollouts = make_rollouts(**BATCH, left=2, right=1)
    expected = explicit_entropies(policy, rollouts)
    # The entropies tell prefixes apart, so a wrong mask or position would show.
    assert all((expected[i, 1 : n + 1].diff().abs() > 1e-3).all() for i, n in ((0, 5), (3, 6)))
    for way in WAYS:
        if way == "flat" and name == "gpt2":
            continue
        for sizes in ({}, {"chunk_size": 2}, {"memory_mb": 0.01}):
            close(entropies_by(way, policy, rollouts, **sizes), expected)


@pytest.mark.parametrize(
    "changes",
    [
        {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}},
        {
            "rope_parameters": {
                "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "rope_theta": 1e4,
                "high_freq_factor": 4.0, "original_max_position_embeddings": 16,
            }
        },
        {
            "rope_parameters": {
                "rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4,
                "original_max_position_embeddings": 16,
            }
        },
        {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
        {"num_key_value_heads": 1, "head_dim": 8},
    ],
)  # fmt: skip
def test_llamas_of_other_kinds(tokenizer, changes):
    policy = tiny_policy("llama", tokenizer, **changes)
    rollouts = make_rollouts(**BATCH, left=2)
    expected = explicit_entropies(policy, rollouts)
    for way in WAYS:
        close(entropies_by(way, policy, rollouts, POSTFIX), expected)


def test_rotations_that_depend_on_the_length_are_not_walked(tokenizer):
    rope = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4}
    assert not flat.walkable(tiny_policy("llama", tokenizer, rope_parameters=rope).model)
    assert flat.walkable(tiny_policy("llama", tokenizer).model)


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
        for method in prefixes.METHODS:
            close(answer_entropies(policy, rollouts, method=method, chunk_size=5), expected)
    assert asked == [True]  # once for a model, whatever the method


class Deaf(MistralForCausalLM):
    """Counts positions from the cache, whatever it is told."""

    def forward(self, input_ids=None, attention_mask=None, position_ids=None, **kwargs):
        return super().forward(input_ids, attention_mask=attention_mask, **kwargs)


@pytest.mark.parametrize("method", ["packed", "cached"])
@pytest.mark.parametrize("completions", [[5, 1, 3, 6], [0, 3, 2, 4], [0, 0, 0, 0]])
def test_a_model_that_packing_gets_wrong_is_asked_naively(tokenizer, method, completions):
    like = tiny_policy("mistral", tokenizer, sliding_window=None).model.config
    policy = Policy(redraw(Deaf(like)), tokenizer)
    rollouts = make_rollouts([4, 9], completions, group=2)
    with pytest.warns(UserWarning, match="masks or positions work differently") as told:
        found = answer_entropies(policy, rollouts, method=method)
    assert len(told) == 1
    close(found, explicit_entropies(policy, rollouts), atol=1e-5)


WINDOWS = {
    "mistral": lambda n: {"sliding_window": n},
    "qwen2": lambda n: {"sliding_window": n, "use_sliding_window": True, "max_window_layers": 0},
}


@pytest.mark.parametrize("name", WINDOWS)
@pytest.mark.parametrize("method", ["packed", "cached"])
def test_a_short_sliding_window_is_asked_naively(tokenizer, name, method):
    policy = tiny_policy(name, tokenizer, **WINDOWS[name](6))
    rollouts = make_rollouts([4, 9], [8, 1, 3, 6], group=2)
    expected = explicit_entropies(policy, rollouts)
    wide = explicit_entropies(tiny_policy(name, tokenizer, **WINDOWS[name](64)), rollouts)
    assert (expected - wide).abs().max() > 0.01  # the window matters
    with pytest.warns(UserWarning, match="sliding window of 6") as told:
        found = answer_entropies(policy, rollouts, method=method)
    assert len(told) == 1 and "naive" in str(told[0].message)
    close(found, expected)


@pytest.mark.parametrize("name", WINDOWS)
def test_a_short_sliding_window_is_neither_sampled_nor_trained(tokenizer, name):
    policy = tiny_policy(name, tokenizer, **WINDOWS[name](6))
    with pytest.raises(ValueError, match="sliding window is 6 tokens"):
        sample(policy, TRIVIAL, num_generations=1, max_completion_length=4)
    with pytest.raises(ValueError, match="sliding window is 6 tokens"):
        token_logprobs(policy.model, make_rollouts([4, 9], [8, 1, 3, 6], group=2))


@pytest.mark.parametrize("name", WINDOWS)
def test_a_long_sliding_window_changes_nothing(tokenizer, name):
    policy = tiny_policy(name, tokenizer, **WINDOWS[name](17))
    rollouts = make_rollouts([4, 9], [6, 1, 3, 6], group=2)  # 9 + 6 + 2 tokens
    expected = explicit_entropies(policy, rollouts)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for method in ("packed", "cached"):
            close(answer_entropies(policy, rollouts, method=method), expected)


# Adapters and number formats


@pytest.mark.parametrize("merged", [True, False])
@pytest.mark.parametrize("way", WAYS)
def test_the_adapter_is_used(lora_policy, monkeypatch, way, merged):
    """Entropies are those of the current policy, not of the base below the adapter."""
    if not merged:
        monkeypatch.setattr(policy_module, "_MERGED_COPY_LIMIT", 0)
    assert (lora_policy.for_inference() is lora_policy.model) != merged
    rollouts = make_rollouts([4, 9], [5, 1, 3, 6], group=2)
    before = entropies_by(way, lora_policy, rollouts)
    perturb_lora(lora_policy)
    after = entropies_by(way, lora_policy, rollouts)
    close(after, explicit_entropies(lora_policy, rollouts))
    assert not torch.allclose(before, after, atol=1e-2)


@pytest.mark.parametrize("name", ["qwen2", "gemma", "gpt2"])
def test_bfloat16_weights_give_fp32_entropies(tokenizer, name):
    """No way rounds worse than the definition, judged by the same weights computed in fp32."""
    policy = tiny_policy(name, tokenizer, dtype=torch.bfloat16)
    rollouts = make_rollouts(**BATCH, left=1)
    naive = entropies_by("naive", policy, rollouts)
    exact = explicit_entropies(Policy(copy.deepcopy(policy.model).float(), tokenizer), rollouts)
    noise = float((naive - exact).abs().mean())
    assert 0 < noise < 0.05 < float(exact[0, 1:6].diff().abs().min())
    for way in WAYS[:3]:
        if way == "flat" and name == "gpt2":
            continue
        found = entropies_by(way, policy, rollouts)
        assert found.dtype == torch.float32
        assert float((found - exact).abs().mean()) < 1.5 * noise, way


def test_4_bit_weights(tiny_folder, tokenizer):
    bnb = pytest.importorskip("bitsandbytes")
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    model = AutoModelForCausalLM.from_pretrained(
        tiny_folder, quantization_config=config, device_map="cpu"
    )
    linears = [m for m in model.modules() if isinstance(m, bnb.nn.Linear4bit)]
    for linear in linears:
        linear.support_avx512bf16_for_cpu = False
    assert linears
    policy = Policy(model.eval(), tokenizer)
    rollouts = make_rollouts(**BATCH)
    naive = entropies_by("naive", policy, rollouts)
    atol = 1e-3 if model.dtype == torch.float32 else 0.05
    for way in WAYS[:3]:
        close(entropies_by(way, policy, rollouts), naive, atol=atol)


# Vocabulary and memory


@pytest.fixture(scope="module")
def wide_policy(tokenizer):
    """A vocabulary of 20,000: 80 kB of fp32 logits for each position."""
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
        return entropy(logits)

    head = wide_policy.model.get_output_embeddings()
    hook = head.register_forward_hook(lambda m, args, out: made_sizes.append(out.numel()))
    with only(way) as method:
        found = ask(
            wide_policy.model, rollouts, encode_postfix(wide_policy), read, method=method,
            memory_mb=memory_mb,
        )[..., 0]  # fmt: skip
    hook.remove()
    assert sum(read_sizes) == branches * vocabulary and len(read_sizes) > 1
    # Made once in the model's dtype, once in fp32, and a temporary.
    assert max(made_sizes + read_sizes) * 12 <= memory_mb * 2**20
    assert max(made_sizes) < branches * vocabulary / 4  # never (B, L, V)
    close(found, explicit_entropies(wide_policy, rollouts))


class Hungry:
    """A ``read`` that runs out of memory the first times."""

    def __init__(self, times, error=torch.OutOfMemoryError):
        self.times, self.error = times, error

    def __call__(self, rows, logits):
        self.times -= 1
        if self.times >= 0:
            raise self.error("no room for the logits")
        return entropy(logits)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("error", [torch.OutOfMemoryError, MemoryError])
def test_out_of_memory_halves_the_budget_and_goes_on(base_policy, way, error):
    rollouts = make_rollouts(**BATCH)
    with only(way) as method, pytest.warns(UserWarning, match="out of memory") as told:
        found = ask(
            base_policy.model, rollouts, encode_postfix(base_policy), Hungry(3, error),
            method=method, memory_mb=64, chunk_size=8,
        )  # fmt: skip
    budgets = [str(w.message).rpartition("memory_mb=")[2] for w in told]
    assert budgets == ["32.", "16.", "8."]
    close(found[..., 0], explicit_entropies(base_policy, rollouts))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("chunk_size", [None, 8])
@pytest.mark.filterwarnings("ignore:out of memory")
def test_out_of_memory_for_good_is_raised(base_policy, way, chunk_size):
    calls = []

    def read(rows, logits):
        calls.append(len(rows))
        if len(calls) > 100:
            pytest.fail("it goes on for ever")
        raise torch.OutOfMemoryError("no room for the logits")

    with only(way) as method, pytest.raises(torch.OutOfMemoryError):
        ask(
            base_policy.model, make_rollouts(**BATCH), encode_postfix(base_policy), read,
            method=method, chunk_size=chunk_size,
        )  # fmt: skip
    # As little as possible was tried: one branch, or one column of a block of rows.
    assert calls[-1] <= (8 if way == "shared" else 1)


@pytest.mark.parametrize("way", WAYS)
def test_other_errors_are_not_swallowed(base_policy, way):
    with only(way) as method, pytest.raises(RuntimeError, match="no room"):
        ask(
            base_policy.model, make_rollouts(**BATCH), encode_postfix(base_policy),
            Hungry(1, RuntimeError), method=method,
        )  # fmt: skip


# Prefixes that completions share


@given(
    rows=st.lists(
        st.lists(st.integers(1, 2), min_size=0, max_size=5), min_size=1, max_size=8
    ).filter(lambda rows: any(rows)),
    group=st.sampled_from([1, 2, 4]),
)
def test_shared_prefixes_by_a_loop(rows, group):
    rows = rows[: len(rows) // group * group] or [[1]] * group
    lengths = [len(row) for row in rows]
    rollouts = make_rollouts([3] * (len(rows) // group), lengths, group)
    for i, row in enumerate(rows):
        rollouts.completion_ids[i, : len(row)] = torch.tensor(row, dtype=torch.long)
    donors, shared = prefixes._shared_prefixes(rollouts)
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
    """Many equal rows, rows that another begins with, and a group without any."""
    group = 10
    rollouts = make_rollouts([3, 5, 4], [4] * 10 + [2, 4] * 5 + [1, 0] * 5, group)
    rollouts.completion_ids[:10] = rollouts.completion_ids[0]
    rollouts.completion_ids[10:20, :2] = rollouts.completion_ids[10, :2]
    asked = []

    def read(rows, logits):
        asked.extend(rows.tolist())
        return entropy(logits)

    with only(way) as method:
        found = ask(
            base_policy.model, rollouts, encode_postfix(base_policy), read, method=method, **size
        )[..., 0]  # fmt: skip
    close(found, explicit_entropies(base_policy, rollouts))
    if way != "naive":
        assert asked.count(0) == 5 and not set(asked) & set(range(1, 10))
        assert torch.equal(found[:10], found[:1].expand(10, -1))
        assert asked.count(10) == 3 and all(asked.count(i) <= 2 for i in range(11, 20))


# Keys and values kept by sampling


@pytest.mark.parametrize("limit", [1, 6, 40])
@pytest.mark.parametrize("block", [3, 128])
def test_kept_keys_are_those_of_a_plain_pass(stopping_policy, monkeypatch, limit, block):
    monkeypatch.setattr(_GrowingLayer, "block", block)
    sizes = dict(num_generations=16, max_completion_length=limit, seed=1)
    rollouts = sample(stopping_policy, TRIVIAL, keep_cache=True, **sizes)
    plain = sample(stopping_policy, TRIVIAL, **sizes)
    assert plain.cache is None
    for name, value in vars(plain).items():
        if isinstance(value, torch.Tensor) and not name.endswith(("logprobs", "entropies")):
            assert torch.equal(value, getattr(rollouts, name)), name
    close(rollouts.old_logprobs, plain.old_logprobs, atol=1e-5)
    close(rollouts.token_entropies, plain.token_entropies, atol=1e-5)
    config = stopping_policy.model.config
    assert len(rollouts.cache) == 32
    for i, layers in enumerate(rollouts.cache):
        ids = torch.cat(unpadded(rollouts, i))
        cache = DynamicCache()
        with torch.no_grad():
            stopping_policy.model(ids[None], past_key_values=cache)
        assert len(layers) == config.num_hidden_layers
        for (key, value), layer in zip(layers, cache.layers):
            assert key.shape == value.shape == (len(ids), config.num_key_value_heads, 32)
            close(key, layer.keys[0].transpose(0, 1))
            close(value, layer.values[0].transpose(0, 1))
    # Rows that end by themselves and, unless the limit is far, rows that are cut.
    assert rollouts.finished.any() and (limit == 40 or not rollouts.finished.all())
    assert limit == 1 or len(set(rollouts.lengths.tolist())) > 2


@pytest.mark.parametrize("size", [{}, {"chunk_size": 2}, {"memory_mb": 0.05}])
def test_kept_keys_give_the_same_entropies(stopping_policy, size):
    rollouts = sample(
        stopping_policy, TRIVIAL, num_generations=8, max_completion_length=12, keep_cache=True
    )
    assert rollouts.finished.any() and not rollouts.finished.all()
    expected = explicit_entropies(stopping_policy, rollouts)
    for kept in (rollouts, replace(rollouts, cache=None)):
        for way in WAYS:
            close(entropies_by(way, stopping_policy, kept, **size), expected)


def test_kept_keys_spare_the_trunk(stopping_policy, monkeypatch):
    """Keys and values that are not the policy's give other entropies: they are really read."""
    rollouts = sample(
        stopping_policy, TRIVIAL, num_generations=2, max_completion_length=8, keep_cache=True
    )
    right = answer_entropies(stopping_policy, rollouts)
    rollouts.cache = [[(k, -v) for k, v in layers] for layers in rollouts.cache]
    assert (answer_entropies(stopping_policy, rollouts) - right).abs().max() > 0.1


def test_kept_keys_of_an_adapter(lora_policy):
    perturb_lora(lora_policy)
    rollouts = sample(
        lora_policy, TRIVIAL, num_generations=3, max_completion_length=6, keep_cache=True
    )
    close(entropies_by("flat", lora_policy, rollouts), explicit_entropies(lora_policy, rollouts))


@pytest.mark.parametrize("name", ["qwen3", "gemma", "gpt2"])
def test_kept_keys_of_other_architectures(tokenizer, name):
    policy = tiny_policy(name, tokenizer)
    rollouts = sample(policy, TRIVIAL, num_generations=3, max_completion_length=6, keep_cache=True)
    close(answer_entropies(policy, rollouts), explicit_entropies(policy, rollouts))


def test_rows_take_their_keys_along(stopping_policy):
    rollouts = sample(
        stopping_policy, TRIVIAL, num_generations=4, max_completion_length=10, keep_cache=True
    )
    part = rollouts.rows(4, 8)
    assert len(part.cache) == 4 and part.cache[0][0][0] is rollouts.cache[4][0][0]
    whole = answer_entropies(stopping_policy, rollouts)
    found = answer_entropies(stopping_policy, part)
    close(found, whole[4:, : found.shape[1]], atol=1e-5)


def test_a_schooled_policy(schooled_folder):
    """Trained weights, real postfix, sampled text."""
    policy = load_policy(schooled_folder, lora_rank=0)
    rollouts = sample(policy, TRIVIAL, num_generations=4, max_completion_length=12)
    expected = explicit_entropies(policy, rollouts)
    for way in WAYS:
        close(entropies_by(way, policy, rollouts), expected)


# Arguments


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("method", "exact"),
        ("postfix", ""),
        ("memory_mb", 0),
        ("memory_mb", -1.0),
        ("memory_mb", float("nan")),
        ("chunk_size", 0),
        ("chunk_size", -3),
    ],
)
def test_bad_arguments_are_refused(base_policy, argument, value):
    with pytest.raises(ValueError, match=f"{argument} is {value!r}"):
        answer_entropies(base_policy, make_rollouts([4], [3, 2], group=2), **{argument: value})


def test_an_unknown_method_is_refused(base_policy):
    rollouts = make_rollouts([4], [3, 2], group=2)
    with pytest.raises(ValueError, match="method is 'strided'"):
        ask(base_policy.model, rollouts, torch.tensor([3]), lambda r, x: x, method="strided")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"attention": "sdpa"}, None),
        ({"attention": "flash_attention_2"}, "takes no 4-D mask"),
    ],
)
def test_reasons_against_packing(tokenizer, change, reason):
    model = tiny_policy("llama", tokenizer).model
    model.config._attn_implementation = change["attention"]
    found = prefixes.packing_problem(model, 30)
    assert found is None if reason is None else reason in found
