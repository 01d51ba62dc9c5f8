"""Compare the metrics of a training run with normal ranges, and give advice where they differ.

``iapo-mini diagnose RUN`` prints :func:`findings_text` of :func:`diagnose`. The ranges are wide. A
number outside its range deserves a look, but is not always a fault.
"""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from safetensors import SafetensorError, safe_open

from iapo_mini.errors import MOST_STEPS, check_number, first_line
from iapo_mini.metrics import LOG, row_of
from iapo_mini.run_folder import checkpoints
from iapo_mini.tools import diagnose_trl as trl

WEIGHTS = ("adapter_model.safetensors", "trainable.safetensors")
"""Files that hold the adapter: in ``final/``, and in a checkpoint."""


@dataclass(frozen=True)
class Check:
    """The healthy range of one number, and advice.

    Attributes:
        what: name of the number.
        read: metrics of a step -> the number, or None if the run does not have it.
        low, high: the healthy range, including both ends.
        if_low, if_high: meaning and advice for values below and above the range.
        always: whether every run has this number.
    """

    what: str
    read: Callable[[Mapping], float | None]
    low: float = -math.inf
    high: float = math.inf
    if_low: str = ""
    if_high: str = ""
    always: bool = True


def _number(metrics: Mapping, name: str) -> float | None:
    """A metric of a step, or None if its line has no number for it."""
    value = metrics.get(name)
    if not isinstance(value, int | float) or isinstance(value, bool):
        return None
    if abs(value) > 1e100:  # not a possible metric, and its square would overflow
        return math.inf if value > 0 else -math.inf
    return float(value)


def _told(metrics: Mapping) -> float | None:
    """Information in a whole completion, nats: the mean of s times the length."""
    s, length = _number(metrics, "informativeness"), _number(metrics, "length")
    return None if s is None or length is None else s * length


CHECKS = (
    Check(
        "share well-formed (format)", lambda m: _number(m, "format"), low=0.9,
        if_low="answers are not found in the expected place. Early on this is normal for a model "
        "that has never seen the format. Later it is not: read some completions.",
    ),
    Check(
        "share cut at the limit (truncated)", lambda m: _number(m, "truncated"), high=0.05,
        if_high="a completion that is cut counts as wrong: raise max_completion_length.",
    ),
    Check(
        "groups whose rewards are all equal (zero_variance_groups)",
        lambda m: _number(m, "zero_variance_groups"), high=0.7,
        if_high="GRPO learns nothing from them. Use problems that are sometimes solved, or more "
        "completions per prompt (num_generations), or stop: the policy may have learnt all it can.",
    ),
    Check(
        "gradient norm before clipping (grad_norm)", lambda m: _number(m, "grad_norm"), 1e-6, 10.0,
        "nothing is learnt: all advantages are zero, or nothing is trainable.",
        "max_grad_norm limits every step: lower learning_rate.",
    ),
    Check(
        "KL to the reference policy (kl, nats per token)", lambda m: _number(m, "kl"), high=0.5,
        if_high="the policy is far from the reference: lower learning_rate, or raise kl_coef.",
    ),
    Check(
        "tokens at the clip (clip_ratio)", lambda m: _number(m, "clip_ratio"), high=0.2,
        if_high="batches are used too often or steps are too large: lower num_iterations or "
        "learning_rate.",
    ),
    Check(
        "policy entropy (entropy, nats per token)", lambda m: _number(m, "entropy"), low=0.02,
        if_low="completions of a group are nearly equal, so there is nothing to compare: lower "
        "learning_rate or alpha, or stop earlier.",
    ),
    Check(
        "tokens that vLLM drew less than half as often as the policy (sampler_ratio_above_2)",
        lambda m: _number(m, "sampler_ratio_above_2"), high=0.01, always=False,
        if_high="this is more than rounding: check that vLLM runs the same model and dtype. "
        "vllm_importance_sampling_correction limits the harm, so leave it on.",
    ),
    Check(
        "information told by a completion (informativeness x length, nats)", _told, low=0.3,
        always=False,
        if_low="forced answers are as certain before the reasoning as after it. If the model is "
        "not calibrated there, the estimate is noise: see docs/estimators.md and calibrate().",
    ),
)  # fmt: skip


OF_TRL = Check(
    "reward of the format (a reward function with 'format' in its name)",
    lambda m: _number(m, "format_reward"), low=0.0, always=False,
    if_low="answers are mostly not found in the expected place. Check that the prompt shows the "
    "format and that the model can write it: read some completions, or begin with a short "
    "supervised fine-tuning.",
)  # fmt: skip
"""The check that a run of TRL has in place of the share of well-formed completions."""


@dataclass(frozen=True)
class Finding:
    """One line of the report: the finding, whether it deserves a look, and advice if any."""

    what: str
    value: str
    healthy: str
    look: bool
    advice: str = ""


_PLAIN = re.compile(rb'\{"step": ([0-9]{1,15})(?:, "[^"\\]*+": (?:-?[0-9][0-9.e+-]*+|null))*+\}\n')
"""A line with only finite numbers, as a run writes it. Matching takes a third of parsing's time."""


@dataclass
class _Log:
    """The parts of a log that are kept while it is read line by line, so it may be very long.

    Attributes:
        last: number of steps to keep at either end.
        steps: number of steps.
        step: the newest step.
        first, ending: lines of the first and of the last steps.
        odd: steps with a number that is not finite.
        unread: numbers of the lines that hold no step, or not the expected step.
    """

    last: int
    steps: int = 0
    step: int = 0
    first: list[bytes] = field(default_factory=list)
    ending: list[bytes] = field(default_factory=list)
    odd: list[int] = field(default_factory=list)
    unread: list[int] = field(default_factory=list)

    def add(self, number: int, line: bytes) -> None:
        """Take in a line; a last line that a kill cut short is skipped."""
        plain = _PLAIN.fullmatch(line)
        row = None if plain else row_of(line)
        step = int(plain[1]) if plain else None if row is None else int(row["step"])
        if step != self.step + 1 and line.endswith(b"\n"):
            self.unread.append(number)
        if step is None:
            return
        self.steps, self.step = self.steps + 1, step
        if len(self.first) < self.last:
            self.first.append(line)
        self.ending.append(line)
        del self.ending[: -self.last]
        if any(isinstance(x, float) and not math.isfinite(x) for x in (row or {}).values()):
            self.odd.append(step)


def read_log(run: str | Path, last: int) -> _Log:
    """Read the steps of ``metrics.jsonl``, keeping ``last`` of them at either end.

    Raises:
        ValueError: when the folder holds no step of a run, or its log can't be read.
    """
    path, log = Path(run) / LOG, _Log(last)
    if path.is_file():
        try:
            with path.open("rb") as lines:
                for number, line in enumerate(lines, start=1):
                    log.add(number, line)
        except OSError as error:
            reason = error.strerror or error
            raise ValueError(f"run is '{run}', whose {LOG} can't be read ({reason}).") from error
    if not log.steps:
        raise ValueError(f"run is '{run}', which holds no step of a training run ({LOG}).")
    return log


def diagnose(run: str | Path, last: int = 10) -> list[Finding]:
    """Check a finished, killed or running training run.

    Args:
        run: folder of the run. It may be a run of TRL's GRPOTrainer; advice then has TRL's names.
        last: number of steps at the end that are averaged.

    Returns:
        One finding for each of ``CHECKS`` that the run should have numbers for. Further findings
        say whether lines of the log can't be read, whether all metrics are finite, how reward and
        length change, and whether the adapter is still zero.

    Raises:
        ValueError: for ``last`` below 1, or a folder without a step.
    """
    check_number("last", last, 1, MOST_STEPS)
    state = None if (Path(run) / LOG).is_file() else trl.state_of(Path(run))
    if state is not None:
        return _diagnose_trl(Path(run), state, last)
    log = read_log(run, last)
    return [*_found(log, CHECKS), *_damage(log), _reward(log), _length(log), *_adapter(Path(run))]


def _diagnose_trl(run: Path, state: Path, last: int) -> list[Finding]:
    """The findings for a run of TRL's trainer, including some that only its files allow."""
    rows, log = trl.rows_of_trl(state), _Log(last)
    if not rows:
        raise ValueError(f"run is '{run}', whose {trl.STATE} holds no logged step.")
    for number, line in enumerate(trl.lines_of_trl(rows), start=1):
        log.add(number, line)
    # TRL logs the format only if a reward function judges it, and KL only if beta is above 0.
    checks = [OF_TRL, *(replace(check, always=False) for check in CHECKS)]
    found = [*_found(log, checks), *_damage(log), _reward(log), _length(log)]
    flat = trl.flat_rewards(rows, last)
    found.append(Finding(
        "reward functions without variation", ", ".join(flat) or "none", "none", bool(flat),
        "they gave every completion the same reward: check that they match the model's answers, "
        "and read some completions (log_completions=True)." if flat else "",
    ))  # fmt: skip
    share = trl.repeated(run)
    if share is not None:
        found.append(Finding(
            "completions that repeat another one of their prompt", f"{share:.2g}", "<= 0.5",
            share > 0.5, "there is nothing to compare: raise temperature, or lower learning_rate."
            if share > 0.5 else "",
        ))  # fmt: skip
    found += _adapter(run, (run, state.parent))
    return [replace(finding, advice=trl.in_trl_names(finding.advice)) for finding in found]


def _found(log: _Log, checks: Sequence[Check]) -> list[Finding]:
    """One finding for each check that the run has, or should have, numbers for."""
    ending = _rows(log.ending)
    found = []
    for check in checks:
        values = [x for x in map(check.read, ending) if x is not None]
        if values:
            mean = sum(values) / len(values)
            low, high = mean < check.low, mean > check.high
            advice = check.if_low if low else check.if_high if high else ""
            look = low or high or not math.isfinite(mean)
            found.append(Finding(check.what, f"{mean:.3g}", _range(check), look, advice))
        elif check.always:
            found.append(Finding(check.what, "not in the log", _range(check), True))
    return found


def _damage(log: _Log) -> list[Finding]:
    """Lines that can't be read, if there are any, and numbers that are not finite."""
    found = []
    if log.unread:
        found.append(Finding(
            "lines of the log that can't be read or are out of order", str(len(log.unread)), "0",
            True, f"the first is line {log.unread[0]} of {LOG}: the file was damaged, or another "
            "program has written into it.",
        ))  # fmt: skip
    odd = log.odd
    found.append(Finding(
        "steps with a number that is not finite", str(len(odd)), "0", bool(odd),
        f"the first is step {odd[0]}: lower learning_rate." if odd else "",
    ))  # fmt: skip
    return found


def _range(check: Check) -> str:
    if math.isinf(check.high):
        return f">= {check.low:g}"
    return f"<= {check.high:g}" if math.isinf(check.low) else f"{check.low:g} to {check.high:g}"


def _rows(lines: Sequence[bytes]) -> list[dict]:
    return [row for line in lines if (row := row_of(line)) is not None]


def _change(log: _Log, name: str) -> tuple[str, str]:
    """Mean of the last steps minus mean of the first ones: direction, and the numbers as text."""
    size = min(log.last, log.steps // 3)
    if size < 2:
        return "", "too few steps"
    ends = _rows(log.first[:size]), _rows(log.ending[-size:])
    before, after = ([x for row in part if (x := _number(row, name)) is not None] for part in ends)
    if min(len(before), len(after)) < 2:
        return "", "not in the log"
    if not all(map(math.isfinite, [*before, *after])):
        return "", "not finite"
    change = statistics.fmean(after) - statistics.fmean(before)
    error = 2 * math.sqrt((statistics.variance(before) + statistics.variance(after)) / size)
    told = "rises" if change > error else "falls" if change < -error else "within the noise"
    return told, f"{change:+.3g} +- {error:.2g}, {told}"


def _reward(log: _Log) -> Finding:
    told, value = _change(log, "reward")
    advice = {
        "falls": "training makes it worse: lower learning_rate, alpha and beta.",
        "within the noise": "more steps or more prompts_per_step would show a small gain. (The "
        "loss does not show it.)",
    }.get(told, "")
    look = told == "falls" or value.startswith("not ")
    return Finding("reward, end less beginning", value, "rises", look, advice)


def _length(log: _Log) -> Finding:
    value = _change(log, "length")[1]
    look = value.startswith("not ")
    return Finding("length, end less beginning (tokens)", value, "either way", look)


def _adapter(run: Path, folders: Sequence[Path] | None = None) -> list[Finding]:
    """Norm of the newest adapter's B matrices, which start at zero; empty without an adapter."""
    folders = folders or (run / "final", *reversed(checkpoints(run)))
    files = [folder / name for folder in folders for name in WEIGHTS]
    for file in filter(Path.is_file, files):
        what = f"norm of the adapter's B matrices ({file.parent.name})"
        try:
            with safe_open(file, framework="pt") as weights:
                names = [name for name in weights.keys() if "lora_B" in name]  # noqa: SIM118
                squares = [float(weights.get_tensor(n).float().square().sum()) for n in names]
        except (OSError, SafetensorError) as error:
            told = f"can't be read ({first_line(error)})"
            advice = f"'{file}' is damaged, or was written by another program."
            return [Finding(what, told, "above 0", True, advice)]
        if not squares:  # every weight was trained
            return []
        norm = math.sqrt(sum(squares))
        advice = "" if norm else "the adapter has not changed: the policy is the start policy."
        return [Finding(what, f"{norm:.3g}", "above 0", not 0 < norm < math.inf, advice)]
    return []


def findings_text(found: Sequence[Finding]) -> str:
    """Findings as text, one per line, with advice below those that deserve a look."""
    width = max(len(finding.what) for finding in found)
    lines = []
    for finding in found:
        mark = "look" if finding.look else "ok"
        lines.append(f"{mark:4}  {finding.what:{width}}  {finding.value}  (healthy: "
                     f"{finding.healthy})")  # fmt: skip
        if finding.advice:
            lines.append(f"      {finding.advice}")
    return "\n".join(lines)
