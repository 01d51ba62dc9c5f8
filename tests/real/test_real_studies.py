"""Calibration, a warm start and the merged copy with a real, pretrained model.

``make real MODEL=...`` runs them; they are skipped without a model.
"""

import itertools

import pytest
import torch
from helpers import real_model

from iapo_mini.calibration import calibrate
from iapo_mini.lab.school import LEVELS, worked_stories
from iapo_mini.lab.warm_start import WarmStart, completion_tokens, warm_start
from iapo_mini.logprobs import token_logprobs
from iapo_mini.policy import load_policy
from iapo_mini.sampling import sample
from iapo_mini.tasks import POSTFIX

THREADS = torch.get_num_threads()


@pytest.fixture(autouse=True)
def _threads():
    torch.set_num_threads(THREADS)


@pytest.fixture(scope="module")
def model():
    return real_model()


@pytest.fixture(scope="module")
def worked():
    return list(itertools.islice(worked_stories("tune", 0, LEVELS[:2]), 4))


def test_sampling_from_the_merged_copy_is_sampling_from_the_policy(model, worked):
    """Old log-probabilities from the copy equal those of model and adapter within 1e-3 nats."""
    policy = load_policy(model, lora_rank=8)
    with torch.no_grad():
        for name, parameter in policy.trainable().items():
            if "lora_B" in name:
                parameter.normal_(std=0.02)
    problems = [w.problem for w in worked[:2]]
    rollouts = sample(policy, problems, num_generations=2, max_completion_length=12, seed=0)
    assert policy.for_inference() is not policy.model
    with torch.no_grad():
        expected, _ = token_logprobs(policy.model, rollouts)
        with policy.reference() as reference:
            base, _ = token_logprobs(reference, rollouts)
    assert float((rollouts.old_logprobs - expected).abs().max()) < 1e-3
    assert float((base - expected).abs().max()) > 0.01  # the adapter matters


def test_calibration_never_holds_the_logits_of_whole_completions(model, worked):
    policy, seen = load_policy(model, lora_rank=8), []
    policy.model.get_output_embeddings().register_forward_hook(
        lambda module, args, out: seen.append(out.shape[:-1].numel())
    )
    history = calibrate(
        policy, [w.problem for w in worked] * 2, texts=[w.text() for w in worked] * 2, steps=2,
        batch_size=4, exits=4, learning_rate=1e-4, progress=False,
    )  # fmt: skip
    print(f"at most {max(seen)} tokens at a time; {history}")
    assert history[0]["kl"] == pytest.approx(0, abs=1e-5)
    assert all(torch.isfinite(torch.tensor(list(step.values()))).all() for step in history)
    # As many tokens as fit into 512 MiB, at most.
    vocabulary = policy.model.config.get_text_config().vocab_size
    assert max(seen) * vocabulary * 4 < 512 * 2**20


def test_a_warm_start_learns_the_format(model, worked, tmp_path):
    policy = load_policy(model, lora_rank=0)
    text = policy.tokenizer.decode(completion_tokens(policy, worked[0])[:-1])
    assert text == worked[0].text() and POSTFIX in text
    how = WarmStart(model, steps=4, batch_size=2, levels=LEVELS[:1], save_every=4)
    found = warm_start(tmp_path / "start", how)
    assert found["loss"][-1][0] == 4 and found["minutes"] > 0
    started = load_policy(str(tmp_path / "start" / "model"), lora_rank=0)
    with torch.no_grad():
        ids = torch.arange(3, 19)[None]
        assert not torch.equal(started.model(ids).logits, policy.model(ids).logits)
