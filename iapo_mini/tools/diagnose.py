"""Is a training run healthy? Its metrics held against what is normal, and advice where they differ.

``iapo-mini diagnose RUN`` prints :func:`findings_text` of :func:`diagnose`. The ranges are wide:
what lies outside deserves a look, and is not always a fault.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from safetensors import safe_open

from iapo_mini.errors import MOST_STEPS, check_number
from iapo_mini.run_folder import checkpoints, logged

WEIGHTS = ("adapter_model.safetensors", "trainable.safetensors")
"""Where the adapter stands: in ``final/``, in a checkpoint."""


@dataclass(frozen=True)
class Check:
    """What is normal for one number.

    Attributes:
        what: what is looked at.
        read: metrics of a step -> the number, or None where the run has none.
        low, high: the healthy range, ends included.
        if_low, if_high: what it means and what to do below and above it.
    """

    what: str
    read: Callable[[Mapping], float | None]
    low: float = -math.inf
    high: float = math.inf
    if_low: str = ""
    if_high: str = ""


def _told(metrics: Mapping) -> float | None:
    """Information of a whole completion, nats: the mean of s times the length."""
    s = metrics.get("informativeness")
    return None if s is None else s * metrics["length"]


CHECKS = (
    Check(
        "share well-formed (format)", lambda m: m["format"], low=0.9,
        if_low="answers are not found where they should stand. Early on this is normal for a model "
        "that has never seen the format; later it is not: look at completions.",
    ),
    Check(
        "share cut at the limit (truncated)", lambda m: m["truncated"], high=0.05,
        if_high="a cut completion counts as wrong, whatever it was about to say: raise "
        "max_completion_length.",
    ),
    Check(
        "groups whose rewards are all equal (zero_variance_groups)",
        lambda m: m["zero_variance_groups"], high=0.7,
        if_high="they teach GRPO nothing. Take problems that are sometimes solved, or more "
        "completions per prompt (num_generations), or stop: it has learnt what there is.",
    ),
    Check(
        "gradient norm before clipping (grad_norm)", lambda m: m["grad_norm"], 1e-6, 10.0,
        "nothing is learnt: all advantages are zero, or nothing is trainable.",
        "steps are only as large as max_grad_norm lets them be: lower learning_rate.",
    ),
    Check(
        "KL to the reference policy (kl, nats per token)", lambda m: m["kl"], high=0.5,
        if_high="the policy has gone far: lower learning_rate, or raise kl_coef.",
    ),
    Check(
        "tokens at the clip (clip_ratio)", lambda m: m["clip_ratio"], high=0.2,
        if_high="batches are used too often or steps are too large: lower num_iterations or "
        "learning_rate.",
    ),
    Check(
        "policy entropy (entropy, nats per token)", lambda m: m["entropy"], low=0.02,
        if_low="completions of a group are nearly alike and nothing can be compared: lower "
        "learning_rate or alpha, or stop earlier.",
    ),
    Check(
        "information told by a completion (informativeness x length, nats)", _told, low=0.3,
        if_low="forced answers are as sure before the reasoning as after it. If the model is not "
        "calibrated there, the estimate is noise: see docs/estimators.md and calibrate().",
    ),
)  # fmt: skip


@dataclass(frozen=True)
class Finding:
    """One line of the report: what was found, whether it deserves a look, and advice if any."""

    what: str
    value: str
    healthy: str
    look: bool
    advice: str = ""


def read_metrics(run: str | Path) -> list[dict]:
    """The steps of ``metrics.jsonl``; a last line that a kill left half is passed over.

    Raises:
        ValueError: when the folder holds no step of a run.
    """
    rows = [row for _, row in logged(Path(run) / "metrics.jsonl")]
    if not rows:
        raise ValueError(f"run is '{run}', which holds no step of a training run (metrics.jsonl).")
    return rows


def diagnose(run: str | Path, last: int = 10) -> list[Finding]:
    """Look at a finished, killed or running training run.

    Args:
        run: its folder.
        last: steps at the end that are averaged.

    Returns:
        One finding for each of ``CHECKS`` that the run has numbers for, then whether all metrics
        are finite, where reward and length are going, and whether the adapter has left zero.

    Raises:
        ValueError: for ``last`` below 1, or a folder without a step.
    """
    check_number("last", last, 1, MOST_STEPS)
    rows = read_metrics(run)
    ending = rows[-last:]
    found = []
    for check in CHECKS:
        values = [x for x in map(check.read, ending) if x is not None]
        if values:
            mean = statistics.fmean(values)
            low, high = mean < check.low, mean > check.high
            advice = check.if_low if low else check.if_high if high else ""
            found.append(Finding(check.what, f"{mean:.3g}", _range(check), low or high, advice))
    odd = [row["step"] for row in rows if any(not _finite(x) for x in row.values())]
    found.append(Finding(
        "steps with a number that is not finite", str(len(odd)), "0", bool(odd),
        f"the first is step {odd[0]}: lower learning_rate." if odd else "",
    ))  # fmt: skip
    return [*found, _reward(rows, last), _length(rows, last), *_adapter(Path(run))]


def _range(check: Check) -> str:
    if math.isinf(check.high):
        return f">= {check.low:g}"
    return f"<= {check.high:g}" if math.isinf(check.low) else f"{check.low:g} to {check.high:g}"


def _finite(value: object) -> bool:
    return not isinstance(value, float) or math.isfinite(value)


def _change(rows: Sequence[Mapping], last: int, name: str) -> tuple[str, str]:
    """Mean of the last steps less that of as many first ones: direction, and the numbers."""
    size = min(last, len(rows) // 3)
    if size < 2:
        return "", "too few steps to tell"
    before, after = ([row[name] for row in part] for part in (rows[:size], rows[-size:]))
    change = statistics.fmean(after) - statistics.fmean(before)
    error = 2 * math.sqrt((statistics.variance(before) + statistics.variance(after)) / size)
    told = "rises" if change > error else "falls" if change < -error else "within the noise"
    return told, f"{change:+.3g} +- {error:.2g}, {told}"


def _reward(rows: Sequence[Mapping], last: int) -> Finding:
    told, value = _change(rows, last, "reward")
    advice = {
        "falls": "training makes it worse: lower learning_rate, alpha and beta.",
        "within the noise": "more steps, or more prompts_per_step, would tell a small gain from "
        "none. (The loss tells nothing: it is near zero by construction.)",
    }.get(told, "")
    return Finding("reward, end less beginning", value, "rises", told == "falls", advice)


def _length(rows: Sequence[Mapping], last: int) -> Finding:
    value = _change(rows, last, "length")[1]
    return Finding("length, end less beginning (tokens)", value, "either way", False)


def _adapter(run: Path) -> list[Finding]:
    """Norm of the newest adapter's B matrices, which start at zero; nothing without an adapter."""
    folders = (run / "final", *reversed(checkpoints(run)))
    files = [folder / name for folder in folders for name in WEIGHTS]
    for file in filter(Path.is_file, files):
        with safe_open(file, framework="pt") as weights:
            matrices = [weights.get_tensor(n) for n in weights.keys() if "lora_B" in n]  # noqa: SIM118
        if not matrices:  # every weight was trained
            return []
        norm = math.sqrt(sum(float(b.float().square().sum()) for b in matrices))
        advice = "" if norm else "the adapter is as it began: the policy is still the start policy."
        what = f"norm of the adapter's B matrices ({file.parent.name})"
        return [Finding(what, f"{norm:.3g}", "above 0", not norm, advice)]
    return []


def findings_text(found: Sequence[Finding]) -> str:
    """Findings as text: a line each, advice below those that deserve a look."""
    width = max(len(finding.what) for finding in found)
    lines = []
    for finding in found:
        mark = "look" if finding.look else "ok"
        lines.append(f"{mark:4}  {finding.what:{width}}  {finding.value}  (healthy: "
                     f"{finding.healthy})")  # fmt: skip
        if finding.advice:
            lines.append(f"      {finding.advice}")
    return "\n".join(lines)
