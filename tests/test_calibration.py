"""Whether forced early answers can be trusted."""

import itertools
from dataclasses import replace

import pytest
import torch
from helpers import TRIVIAL, explicit_entropies, forced_logits, make_rollouts

from iapo_mini import calibration as module
from iapo_mini.calibration import calibration, exit_calibration
from iapo_mini.information import encode_postfix
from iapo_mini.intervals import expected_calibration_error
from iapo_mini.policy import load_policy
from iapo_mini.problems.stories import stories
from iapo_mini.sampling import from_texts, sample

# Calibration error


# Forced answers along the chain


@pytest.mark.parametrize("parts", [1, 4])
def test_exit_calibration_asks_after_equal_parts(schooled_folder, parts):
    """Compared with plain forward passes, with references that some of the exits give."""
    policy = load_policy(schooled_folder, lora_rank=0)
    rollouts = sample(policy, TRIVIAL, num_generations=4, max_completion_length=12)
    answers = ["4", "5", "6", "7"] * 2
    found = exit_calibration(policy, rollouts, answers, parts=parts)
    for i, n in enumerate(rollouts.lengths.tolist()):
        truth = policy.tokenizer.encode(f" {answers[i]}")
        for part in range(parts + 1):
            t = round(n * part / parts)  # halves go to the even neighbour, as in torch
            p = forced_logits(policy, rollouts, i, t, encode_postfix(policy))[-1].softmax(-1)
            h = float(torch.distributions.Categorical(p).entropy())
            assert float(found["confidence"][i, part]) == pytest.approx(float(p.max()), abs=1e-4)
            assert float(found["entropy"][i, part]) == pytest.approx(h, abs=1e-4)
            assert bool(found["correct"][i, part]) == ([int(p.argmax())] == truth)
    assert 0 < found["correct"].float().mean() < 1


def test_exits_of_short_completions(base_policy):
    """More parts than tokens: several exits follow the same prefix."""
    rollouts = make_rollouts([4, 9], [0, 1, 2, 6], group=2)
    found = exit_calibration(base_policy, rollouts, ["5"] * 4, parts=5)
    entropies = explicit_entropies(base_policy, rollouts)
    for i, n in enumerate(rollouts.lengths.tolist()):
        at = [round(n * part / 5) for part in range(6)]
        assert found["entropy"][i].tolist() == pytest.approx(entropies[i, at].tolist(), abs=1e-4)


def test_an_empty_answer_is_no_answer(base_policy):
    texts = ["<think> 4.</think><answer></answer>", "<think> 4.</think><answer>  </answer>"]
    rollouts = from_texts(base_policy, TRIVIAL[:1] * 2, texts)
    with pytest.raises(ValueError, match="no completion gives an answer"):
        calibration(base_policy, TRIVIAL[:1] * 2, rollouts=rollouts)


@pytest.mark.parametrize("against", ["final", "truth"])
def test_calibration_judges_every_part_of_the_chain(schooled_folder, against):
    """Three completions per prompt, two with different answers and one without an answer."""
    policy = load_policy(schooled_folder, lora_rank=0)
    problems = [*TRIVIAL, *itertools.islice(stories("test"), 3)]
    texts = [f"<think> {n}.</think><answer> {n}</answer>" for n in (4, 5, 6, 7)]
    texts = [*texts, texts[0].removesuffix("</answer>")] * 3
    rollouts = from_texts(policy, [p for p in problems for _ in range(3)], texts)
    rollouts = replace(rollouts, num_generations=3)
    found = calibration(policy, problems, rollouts=rollouts, against=against, parts=4)
    answers, kept = [p.answer for p in problems for _ in range(3)], list(range(15))
    if against == "final":
        answers = ["4", "5", "6", "7", "0"] * 3
        kept = [i for i in range(15) if i % 5 < 4]
    exits = exit_calibration(policy, rollouts, answers, parts=4)
    for name, values in found.exits.items():
        assert values.shape == (len(kept), 5)
        assert torch.equal(values, exits[name][kept])
    confidence, correct = (exits[name][kept] for name in ("confidence", "correct"))
    assert correct.any() and not correct.all()
    for t in range(5):
        error = expected_calibration_error(confidence[:, t], correct[:, t])
        assert found.ece_by_part[t] == pytest.approx(error)
        mean = float(exits["entropy"][kept, t].mean())
        assert found.entropy_by_part[t] == pytest.approx(mean, abs=1e-6)
    whole = expected_calibration_error(confidence.flatten(), correct.flatten())
    assert found.ece == pytest.approx(whole) and len(found.ece_by_part) == 5


def test_an_odd_answer_changes_nothing_for_other_rows(schooled_folder):
    policy = load_policy(schooled_folder, lora_rank=0)
    rollouts = from_texts(policy, TRIVIAL * 2, ["<think> 5."] * 4)
    plain = exit_calibration(policy, rollouts, ["4", "5", "6", "7"], parts=2)
    odd = exit_calibration(policy, rollouts, ["4", "5", "6", "3 1/2"], parts=2)
    assert plain["correct"][:3].any()
    for name, values in plain.items():
        assert torch.equal(odd[name][:3], values[:3]), name


def test_calibration_samples_when_given_no_completions(schooled_folder):
    policy = load_policy(schooled_folder, lora_rank=0)
    found = calibration(policy, TRIVIAL * 3, against="truth", parts=2, seed=1)
    rollouts = sample(policy, TRIVIAL * 3, num_generations=1, seed=1)
    again = calibration(policy, TRIVIAL * 3, rollouts=rollouts, against="truth", parts=2)
    assert found.exits["confidence"].shape == (6, 3)
    assert torch.equal(found.exits["confidence"], again.exits["confidence"])


@pytest.mark.parametrize(
    ("confidence", "accuracy", "advice"),
    [
        (0.95, 0.25, "sure of answers it does not know (by 0.70 on average)"),
        (0.25, 0.95, "doubts answers it does know (by 0.70 on average)"),
        (0.5, 0.5, "can be trusted"),
        (0.55, 0.5, "can be trusted"),
    ],
)
def test_advice(base_policy, monkeypatch, confidence, accuracy, advice):
    shape = (20, 3)

    def exits(policy, rollouts, answers, parts):
        correct = torch.arange(20)[:, None].expand(shape) < round(20 * accuracy)
        confidences = torch.full(shape, confidence)
        return {"confidence": confidences, "correct": correct, "entropy": torch.ones(shape)}

    monkeypatch.setattr(module, "exit_calibration", exits)
    rollouts = make_rollouts([3] * 20, [2] * 20, 1)
    found = calibration(base_policy, TRIVIAL * 10, rollouts=rollouts, against="truth", parts=2)
    assert advice in found.advice
    assert found.ece == pytest.approx(abs(confidence - accuracy), abs=1e-6)
    assert found.ece_by_part == pytest.approx([found.ece] * 3)
    assert found.entropy_by_part == [1.0] * 3
    assert ("calibrate()" in found.advice) == ("trusted" not in found.advice)


def test_calibration_draws_a_figure(base_policy):
    rollouts = from_texts(
        base_policy, TRIVIAL, [f"<think> hm</think><answer> {n}</answer>" for n in (5, 6)]
    )
    figure = calibration(base_policy, TRIVIAL, rollouts=rollouts, parts=2).figure()
    assert figure.axes


def test_bad_calibration_arguments_are_refused(base_policy):
    rollouts = from_texts(base_policy, TRIVIAL, ["hm", "well"])
    with pytest.raises(ValueError, match="against must be one of final, truth, got 'both'"):
        calibration(base_policy, TRIVIAL, rollouts=rollouts, against="both")
    with pytest.raises(ValueError, match="no completion gives an answer"):
        calibration(base_policy, TRIVIAL, rollouts=rollouts)
