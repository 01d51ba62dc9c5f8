"""The entropy of a prediction, from whole logits and from blocks of the vocabulary."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from iapo_mini.early_exit.reading import head_entropy, logits_entropy


@settings(max_examples=30)
@given(st.integers(0, 999), st.floats(0, 50))
def test_entropy_is_that_of_the_categorical_distribution(seed, scale):
    logits = scale * torch.randn(3, 4, 11, generator=torch.Generator().manual_seed(seed))
    expected = torch.distributions.Categorical(logits=logits).entropy()
    torch.testing.assert_close(logits_entropy(logits), expected, atol=1e-5, rtol=1e-5)


def test_entropy_of_known_distributions():
    assert float(logits_entropy(torch.full((1000,), 3.0))) == pytest.approx(
        math.log(1000), rel=1e-6
    )
    assert float(logits_entropy(torch.tensor([1e4, 0.0, -1e4]))) == 0.0
    half = torch.tensor([5.0, 5.0, -1e4])
    assert float(logits_entropy(half)) == pytest.approx(math.log(2), rel=1e-6)


@pytest.mark.parametrize("shape", [(50_000,), (2, 1, 50_000)])
def test_entropy_of_half_precision_logits_is_computed_in_full_precision(shape):
    found = logits_entropy(torch.zeros(shape, dtype=torch.bfloat16))
    assert found.dtype == torch.float32 and found.shape == shape[:-1]
    assert found.flatten().tolist() == pytest.approx([math.log(50_000)] * found.numel(), rel=1e-5)


@pytest.mark.parametrize("vocabulary", [7, 1024, 1025, 5000])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_head_entropy_is_that_of_whole_logits(vocabulary, bias, dtype):
    """Tests all sizes of the last block of the vocabulary, and flat and peaked distributions."""
    torch.manual_seed(0)
    head = torch.nn.Linear(16, vocabulary, bias=bias).to(dtype)
    hidden = torch.cat([torch.randn(300, 2, 16), 40 * torch.randn(300, 2, 16)]).to(dtype)
    found = head_entropy(head, hidden)
    assert found.dtype == torch.float32 and found.shape == (600, 2)
    exact = torch.nn.functional.linear(hidden, head.weight, head.bias).double().log_softmax(-1)
    torch.testing.assert_close(found.double(), -(exact.exp() * exact).sum(-1), rtol=0, atol=2e-5)


def test_head_entropy_makes_no_whole_logits():
    head = torch.nn.Linear(8, 20_000)
    shapes = []

    class Shapes(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            shapes.extend(x.numel() for x in (out,) if isinstance(x, torch.Tensor))
            return out

    hidden = torch.randn(4_000, 8)
    with Shapes():
        head_entropy(head, hidden)
    assert max(shapes) <= max(2**19, head.weight.numel())


@pytest.mark.parametrize("where", [[3], [0], [0, 1, 2], list(range(1024, 1100))])
def test_tokens_that_can_not_be_drawn_add_nothing(where):
    """Logits of -inf come from padded rows of the head and banned tokens, even a whole block."""
    generator = torch.Generator().manual_seed(0)
    head = torch.nn.Linear(8, 1100)
    with torch.no_grad():
        head.weight.copy_(torch.randn(head.weight.shape, generator=generator))
        head.bias[where] = -torch.inf
    hidden = torch.randn(5, 8, generator=generator)
    logits = head(hidden)
    others = [i for i in range(1100) if i not in where]
    expected = torch.distributions.Categorical(logits=logits[:, others].double()).entropy().float()
    torch.testing.assert_close(logits_entropy(logits), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(head_entropy(head, hidden), expected, atol=2e-5, rtol=1e-5)


def test_a_broken_prediction_stays_visible():
    """NaN stays NaN."""
    assert logits_entropy(torch.tensor([[0.0, math.nan]])).isnan().all()
