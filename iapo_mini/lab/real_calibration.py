"""Calibration of a real model: what it repairs, what it costs, and whether the model suffers.

A published model was never asked for an answer in the middle of a sentence, and most of what the
estimator finds there is noise. An adapter is trained as :func:`iapo_mini.calibration.calibrate`
trains the embedded policy, on worked solutions of the train split of a file. Before and after, the
model is judged on the test split, which training never sees (:func:`problems.datasets.cut`):

* the calibration error of forced answers, against the true answer (its first token);
* the noise of words: the standard deviation of s over words;
* AUC of the tokens that compute against all others, and of the sentences that compute. A token
  computes if it belongs to a result (:mod:`iapo_mini.problems.worked` tells words and results); a
  sentence computes if it has such a token. The tokens of the answer and of the tags are left out;
* Pass@1 of the model's own completions, and the nats per token of the worked solutions.

How long it takes, for SmolLM2-135M, GSM8K and the preset ``full`` on two cores without AVX512,
counted from 500 forward tokens a second: 25 minutes for 100 steps, and 15 minutes for each
judgement. The command measures the speed of the machine and tells its own estimate before it
begins. Every part continues after a break.

    figures/results/real_calibration.json
      model           name of the model
      problems, steps number of test problems, steps of calibration
      before, after   {"ece", "ece_by_tenth", "entropy_by_tenth" (nats), "words_sd" (nats),
                      "auc", "auc_sentence": [value, low, high] over problems, "pass@1",
                      "lenient pass@1", "length", "intervals": {metric: [low, high]},
                      "solution_nats" (per token)}
      minutes         of calibration
      losses          [{"kl", "exit_loss"}], one for each step
      config, versions
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from tqdm.auto import tqdm

from iapo_mini.calibration import calibrate, exit_calibration
from iapo_mini.chat import token_texts
from iapo_mini.errors import MOST_THREADS, check_choice, check_number
from iapo_mini.evaluation import evaluate
from iapo_mini.files import (
    read_json,
    replace_folder,
    same_settings,
    versions,
    writable_folder,
    write_json,
)
from iapo_mini.information import answer_entropies, encode_postfix, informativeness
from iapo_mini.intervals import (
    auc,
    bootstrap_interval,
    expected_calibration_error,
    format_interval,
)
from iapo_mini.lab.pace import LEARN, SAMPLE, duration, forward_speed
from iapo_mini.lab.results import results_path
from iapo_mini.lab.school import Worked, read_worked
from iapo_mini.logprobs import token_logprobs
from iapo_mini.metrics import LOG, whole_log
from iapo_mini.policies import EMBEDDED, shown_name
from iapo_mini.policy import Policy, load_policy
from iapo_mini.problems.datasets import cut, fingerprint
from iapo_mini.problems.worked import character_kinds, token_kinds
from iapo_mini.sampling import from_texts

_SENTENCE = re.compile(r"(?<=[.!?])\s+|\n+")


@dataclass(frozen=True)
class Scale:
    """Sizes of the study.

    Attributes:
        problems: test problems, from the start of the test split.
        steps, batch_size, exits: of :func:`iapo_mini.calibration.calibrate`.
        num_generations: completions per test problem, for Pass@1.
        rows_at_once: completions that the estimator reads at a time.
    """

    problems: int
    steps: int
    batch_size: int = 4
    exits: int = 12
    num_generations: int = 4
    rows_at_once: int = 8


SCALES = {
    "quick": Scale(problems=3, steps=2, batch_size=2, exits=2, num_generations=1),
    "full": Scale(problems=100, steps=100),
}
"""Preset -> sizes."""


def real_calibration(
    preset: str = "full",
    *,
    model: str = EMBEDDED,
    data_file: str,
    out: str | Path = "runs/science",
    figures: str | Path = "figures",
    threads: int = 2,
) -> dict[str, Any]:
    """Calibrate a model on the train split of a file, and judge it before and after.

    Args:
        preset: a key of :data:`SCALES`.
        model: folder or hub id of a model.
        data_file: worked solutions in GSM8K's format (:func:`iapo_mini.lab.school.read_worked`).
        out: folder of the work; the adapter is kept in ``calibrated`` there.
        figures: folder of the results file.
        threads: CPU threads.

    Returns:
        The content of the results file.

    Raises:
        ValueError: for an argument out of range, a file that can't be used, or a folder with
            another study.
    """
    check_choice("preset", preset, SCALES)
    check_number("threads", threads, 1, MOST_THREADS)
    out, figures, scale = Path(out), Path(figures), SCALES[preset]
    writable_folder(figures / "results", "figures")
    folder = out / preset / "real_calibration"
    writable_folder(folder, "out")
    train, test = splits_of(data_file)
    test = test[: scale.problems]
    torch.set_num_threads(threads)
    settings = {"model": model, "data": fingerprint(data_file), **asdict(scale)}
    same_settings(folder / "settings.json", "study", settings)
    policy = load_policy(model, lora_rank=16)
    told = expected_seconds(policy, test, scale)
    print(f"All of it takes {duration(told)} on this machine as fast as it is now; the same "
          "command continues after a break.", flush=True)  # fmt: skip
    before = _once(folder / "before.json", lambda: judged(policy, test, scale, folder / "before"))
    lessons = _lessons(train, scale.steps * scale.batch_size)
    losses = calibrate(
        policy, [w.problem for w in lessons], texts=[w.text() for w in lessons], steps=scale.steps,
        batch_size=scale.batch_size, exits=scale.exits, folder=folder / "calibration",
    )  # fmt: skip
    if not (folder / "calibrated").is_dir():
        replace_folder(folder / "calibrated", policy.save)
    after = _once(folder / "after.json", lambda: judged(policy, test, scale, folder / "after"))
    rows = whole_log(folder / "calibration" / LOG, scale.steps)
    results = {
        "model": shown_name(model),
        "problems": len(test), "steps": scale.steps, "before": before, "after": after,
        "minutes": sum(row["seconds"] for row in rows) / 60, "losses": losses,
        "config": {**asdict(scale), "threads": threads, "lora_rank": 16},
        "versions": versions(),
    }  # fmt: skip
    write_json(results_path(figures, "real_calibration", preset), results)
    return results


def splits_of(data_file: str) -> tuple[list[Worked], list[Worked]]:
    """Worked solutions of the train split and of the test split, which share no question."""
    worked = read_worked(data_file)
    problems = [w.problem for w in worked]
    train, test = ({p.question for p in cut(problems, split)} for split in ("train", "test"))
    return (
        [w for w in worked if w.problem.question in train],
        [w for w in worked if w.problem.question in test],
    )


def _lessons(train: Sequence[Worked], count: int) -> list[Worked]:
    """The first ``count`` of the worked solutions, shuffled anew in every pass over them."""
    rng = random.Random("real calibration")
    lessons: list[Worked] = []
    while len(lessons) < count:
        order = list(train)
        rng.shuffle(order)
        lessons += order
    return lessons[:count]


def _once(path: Path, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """The content of a results file, which is made if it does not exist."""
    if not path.is_file():
        write_json(path, make())
    return read_json(path)


def expected_seconds(policy: Policy, test: Sequence[Worked], scale: Scale) -> float:
    """Seconds of the whole study, from the speed of one pass (:mod:`iapo_mini.lab.pace`)."""
    some = list(test[:20])
    rollouts = from_texts(policy, [w.problem for w in some], [w.text() for w in some])
    prompt = float(rollouts.prompt_mask.sum()) / len(some)
    solution, asked = float(rollouts.lengths.float().mean()), len(encode_postfix(policy))
    reading = 3 * (prompt + solution) + asked * (solution + 12)
    judging = len(test) * (reading + scale.num_generations * 200 * SAMPLE)
    step = (prompt + solution) * (1 + LEARN) + scale.exits * asked * LEARN
    tokens = 2 * judging + scale.steps * scale.batch_size * step
    return tokens / forward_speed(policy)


class Tokens(NamedTuple):
    """What is known about the tokens of a worked solution's thought, each array (n,).

    Attributes:
        inside: positions of these tokens in the completion, long.
        computes: whether the token belongs to a result, bool.
        words: whether it is a word, bool.
        sentence: number of the sentence that it begins in, long.
    """

    inside: np.ndarray
    computes: np.ndarray
    words: np.ndarray
    sentence: np.ndarray


def tokens_of(texts: Sequence[str]) -> Tokens:
    """Kinds of the tokens of a completion ``<think>...</think>...``, from their texts alone."""
    whole = "".join(texts)
    first, last = len("<think>"), whole.rindex("</think>")
    kinds = token_kinds(texts, ["tag"] * first + character_kinds(whole[first:last]))
    breaks = [m.end() for m in _SENTENCE.finditer(whole, first, last)]
    rows: list[tuple[int, bool, bool, int]] = []
    start = 0
    for at, (text, kind) in enumerate(zip(texts, kinds)):
        end = start + len(text)
        if first <= start and end <= last:
            # A token may begin with the space between two sentences.
            lead = len(text) - len(text.lstrip()) if text.strip() else 0
            sentence = sum(b <= start + lead for b in breaks)
            rows.append((at, kind == "result", kind == "word", sentence))
        start = end
    return Tokens(*(np.array(x) for x in zip(*rows)))


@torch.no_grad()
def judged(
    policy: Policy, test: Sequence[Worked], scale: Scale, completions: Path
) -> dict[str, Any]:
    """What the results file holds of a model before or after calibration.

    Args:
        policy: the model.
        test: worked solutions that it was not calibrated on.
        scale: sizes.
        completions: path, without ending, of the file with the model's own completions.
    """
    problems = [w.problem for w in test]
    own = evaluate(
        policy, problems, ks=(1,), num_generations=scale.num_generations, lenient=True,
        save_to=completions.with_suffix(".jsonl"),
    )  # fmt: skip
    words: list[np.ndarray] = []
    by_token: list[tuple[np.ndarray, ...]] = []
    by_sentence: list[tuple[np.ndarray, ...]] = []
    nats, tokens = 0.0, 0
    exits: dict[str, list[torch.Tensor]] = {"confidence": [], "correct": [], "entropy": []}
    size = scale.rows_at_once
    for start in tqdm(range(0, len(test), size), desc="solutions", unit="batch"):
        part = test[start : start + size]
        rollouts = from_texts(policy, [w.problem for w in part], [w.text() for w in part])
        for name, values in exit_calibration(
            policy, rollouts, [w.problem.answer for w in part]
        ).items():
            exits[name].append(values)
        logprobs, _ = token_logprobs(policy.for_inference(), rollouts)
        nats, tokens = nats - float(logprobs.sum()), tokens + int(rollouts.lengths.sum())
        s = informativeness(answer_entropies(policy, rollouts), rollouts.completion_mask)
        for ids, row, n in zip(rollouts.completion_ids, s.double().cpu().numpy(), rollouts.lengths):
            known = tokens_of(token_texts(policy.tokenizer, ids[: int(n) - 1].tolist()))
            of_thought = row[known.inside]
            words.append(of_thought[known.words])
            by_token.append((of_thought, known.computes))
            sums = np.bincount(known.sentence, weights=of_thought)
            by_sentence.append((sums, np.bincount(known.sentence, weights=known.computes) > 0))
    found = {name: torch.cat(values) for name, values in exits.items()}
    confidence, correct = found["confidence"], found["correct"]
    return {
        "ece": expected_calibration_error(confidence.flatten(), correct.flatten()),
        "ece_by_tenth": [
            expected_calibration_error(p, right) for p, right in zip(confidence.T, correct.T)
        ],
        "entropy_by_tenth": found["entropy"].mean(0).tolist(),
        "words_sd": float(np.concatenate(words).std()),
        "auc": bootstrap_interval(auc, by_token),
        "auc_sentence": bootstrap_interval(auc, by_sentence),
        **{name: own[name] for name in ("pass@1", "lenient pass@1", "length", "intervals")},
        "solution_nats": nats / tokens,
    }  # fmt: skip


def real_calibration_table(results: Mapping[str, Any]) -> str:
    """Results of :func:`real_calibration` as a Markdown table."""
    rows = {
        "calibration error of forced answers": "ece",
        "noise of words (nats)": "words_sd",
        "AUC, tokens": "auc",
        "AUC, sentences": "auc_sentence",
        "Pass@1": "pass@1",
        "Pass@1, any format": "lenient pass@1",
        "worked solutions (nats per token)": "solution_nats",
    }
    lines = ["| | before | after |", "|---|---|---|"]
    for title, name in rows.items():
        cells = []
        for part in (results["before"], results["after"]):
            value = part[name]
            if name in part["intervals"]:
                value = [value, *part["intervals"][name]]
            cells.append(f"{value:.3f}" if isinstance(value, float) else format_interval(value))
        lines.append(f"| {title} | " + " | ".join(cells) + " |")
    lines.append(f"\n{results['steps']} steps, {results['minutes']:.1f} minutes; "
                 f"{results['problems']} test problems.")  # fmt: skip
    return "\n".join(lines)
