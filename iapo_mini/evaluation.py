"""Pass@k, Length@k and Ratio@k = Pass@k / Length@k (paper, Section 5), with intervals."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from iapo_mini.adapters import fingerprint_of_weights
from iapo_mini.early_exit.question import Stopping
from iapo_mini.early_exit.stopping import RECORDED, room_to_ask, sample_until_sure
from iapo_mini.files import read_json, replace_text, write_json
from iapo_mini.intervals import format_interval
from iapo_mini.policy import Policy
from iapo_mini.progress import tokens_shown
from iapo_mini.rewards import check_completion, lenient_correct, score
from iapo_mini.sampling import check_length, sample
from iapo_mini.tasks import Problem, fingerprint_of_problems

_OF_POLICY = "fingerprint of the policy"


def pass_at_k(n: int, c: int, k: int) -> float:
    """Unbiased Pass@k of one problem: 1 - C(n - c, k) / C(n, k).

    Args:
        n: number of completions; c: number of correct ones among them; k: at most n.

    Returns:
        Probability, 0 to 1, that k completions drawn without replacement contain a correct one.

    Raises:
        ValueError: for a k that is not 1 to n.
    """
    if not 1 <= k <= n:
        raise ValueError(f"k must be 1 to n = {n}, got {k}")
    return 1.0 - math.comb(n - c, k) / math.comb(n, k)


def ratio_at_k(pass_at_k: float, length_at_k: float) -> float:
    """Right answers per token: Ratio@k = Pass@k / Length@k (paper, Section 5).

    Args:
        pass_at_k: share of problems solved by at least one of k completions, 0 to 1.
        length_at_k: mean length of the k completions, tokens.

    Returns:
        Right answers per token. Tables and figures show right answers per 1,000 tokens.

    Raises:
        ValueError: for a length that is not above 0.
    """
    if not length_at_k > 0:
        raise ValueError(f"length_at_k must be above 0, got {length_at_k}")
    return pass_at_k / length_at_k


def evaluate(
    policy: Policy,
    problems: Sequence[Problem],
    *,
    ks: Sequence[int] = (1, 2, 4, 8),
    num_generations: int = 8,
    max_completion_length: int = 224,
    temperature: float = 1.0,
    batch_size: int = 128,
    seed: int = 0,
    progress: bool = True,
    save_to: str | Path | None = None,
    lenient: bool = False,
    early_exit: Stopping | None = None,
) -> dict[str, Any]:
    """Sample completions for every problem and report the paper's three metrics.

    Args:
        policy: the policy to judge.
        problems: at least one problem.
        ks: values of k, each at most ``num_generations``.
        num_generations: completions per problem.
        max_completion_length: number of tokens at which a completion is cut.
        temperature: sampling temperature.
        batch_size: completions sampled at once.
        seed: sampling seed.
        progress: show a progress bar.
        save_to: JSONL file of the completions, written batch by batch. The settings are kept beside
            it in ``*.settings.json``. If the file holds completions by the same policy for the same
            problems and settings, sampling continues after the last complete batch. The numbers are
            the same as without a break, because every batch has its own seed.
        lenient: also judge answers in whatever format (:func:`iapo_mini.rewards.lenient_answer`).
        early_exit: stop thinking when the forced answer is sure; default: let the policy think.

    Returns:
        ``{"pass@k", "length@k", "ratio@k" for each k, "length" (mean tokens of all completions),
        "problems", "intervals": {metric: [low, high]}, "completions": [{"problem", "text",
        "correct", "tokens"}, ...]}``, and with ``lenient`` "lenient pass@k" for each k. With
        ``early_exit`` also "asking", the mean tokens forwarded for asking ("length" leaves them
        out), and "cut", the share of thoughts that were cut. Pass@k is the unbiased estimator;
        Length@k is the mean length of the first k; Ratio@k is per token.
        Intervals are 95%, by bootstrap over the problems.

    Raises:
        ValueError: for an empty problem list, a k outside 1..num_generations, or completions in
            ``save_to`` that were made with other settings.
    """
    if not problems:
        raise ValueError("problems is empty; at least one problem is needed to evaluate.")
    for k in ks:
        if not 1 <= k <= num_generations:
            raise ValueError(f"k must be 1 to num_generations = {num_generations}, got {k}")
    check_completion(policy, problems[0])
    check_length(policy, problems, max_completion_length + room_to_ask(policy, early_exit))
    options = (num_generations, max_completion_length, temperature, batch_size, seed)
    how = _Sampling(*options, early_exit)
    path = None if save_to is None else Path(save_to)
    completions = _sample_all(policy, problems, how, path, progress)
    names = ("tokens", *(() if early_exit is None else RECORDED))
    values = [[float(c[name]) for c in completions] for name in names]
    lengths, *others = torch.tensor(values, dtype=torch.float64).view(
        len(names), len(problems), num_generations
    )
    right = torch.tensor([c["correct"] for c in completions]).view(len(problems), -1).sum(1)
    metrics = summary(right.tolist(), lengths, ks, dict(zip(RECORDED, others)))
    if lenient:
        also = torch.tensor(
            [lenient_correct(c["text"], problems[c["problem"]].answer) for c in completions]
        )
        judged = summary(also.view(len(problems), -1).sum(1).tolist(), lengths, ks)
        for name in (f"pass@{k}" for k in ks):
            metrics[f"lenient {name}"] = judged[name]
            metrics["intervals"][f"lenient {name}"] = judged["intervals"][name]
    return {**metrics, "completions": completions}


def summary(
    right: Sequence[int],
    tokens: torch.Tensor,
    ks: Sequence[int],
    more: Mapping[str, torch.Tensor] | None = None,
) -> dict[str, Any]:
    """Compute the three metrics with 95% intervals from counts alone.

    Args:
        right: N numbers of right completions, one for each problem.
        tokens: (N, G) fp64, lengths of the G completions of each problem, in sampling order.
        ks: values of k, each 1 to G.
        more: name -> (N, G) fp64, further values of the completions, of which means are reported.

    Returns:
        The dictionary of :func:`evaluate`, without the completions.

    Raises:
        ValueError: for a k out of range, or a mean length that is not above 0.
    """
    problems, group = tokens.shape
    # All metrics use the same bootstrap samples, so their intervals are comparable.
    generator = torch.Generator().manual_seed(0)
    resample = torch.randint(problems, (1000, problems), generator=generator)
    result: dict[str, Any] = {"problems": problems, "intervals": {}}

    def add(name: str, value: float, draws: torch.Tensor) -> None:
        result[name] = value
        quantiles = torch.tensor([0.025, 0.975], dtype=torch.float64)
        result["intervals"][name] = torch.quantile(draws, quantiles).tolist()

    for name, values in {"length": tokens, **(more or {})}.items():
        whole = values.mean(1)
        add(name, float(whole.mean()), whole[resample].mean(1))
    for k in ks:
        passed = torch.tensor([pass_at_k(group, c, k) for c in right], dtype=torch.float64)
        length = tokens[:, :k].mean(1)
        p, n = float(passed.mean()), float(length.mean())
        p_draws, n_draws = passed[resample].mean(1), length[resample].mean(1)
        add(f"pass@{k}", p, p_draws)
        add(f"length@{k}", n, n_draws)
        add(f"ratio@{k}", ratio_at_k(p, n), p_draws / n_draws)
    return result


@dataclass(frozen=True)
class _Sampling:
    """Settings of sampling. Sampling into a file continues only with the same settings."""

    num_generations: int
    max_completion_length: int
    temperature: float
    batch_size: int
    seed: int
    early_exit: Stopping | None

    @property
    def problems_at_once(self) -> int:
        return max(1, self.batch_size // self.num_generations)


def check_out(out: Path, data_file: str = "") -> None:
    """Refuse, before any work, a results file that is a folder or would overwrite something else.

    Raises:
        ValueError: naming the file, and what is allowed.
    """
    if out.suffix != ".json" or out.is_dir():
        raise ValueError(
            f"out must be a .json file (the completions go to .jsonl beside it), got '{out}'"
        )
    data = Path(data_file).expanduser().resolve() if data_file else None
    if data in (out.resolve(), out.with_suffix(".jsonl").resolve()):
        raise ValueError(f"out is '{out}', which would overwrite data_file; name another file.")
    completions, settings = out.with_suffix(".jsonl"), _settings_beside(out)
    for path, what, names in (
        (out, "results", {"intervals", "config"}),
        (settings, "the settings of completions", {_OF_POLICY}),
    ):
        if path.exists() and not _holds(path, names):
            raise ValueError(
                f"out is '{out}', but '{path}' does not hold {what}; name another file"
            )
    if completions.is_dir() or (_has_content(completions) and not settings.exists()):
        raise ValueError(
            f"out is '{out}', but '{completions}' does not hold completions of an evaluation; "
            "name another file"
        )


def _holds(path: Path, names: set[str]) -> bool:
    """Whether this file holds a JSON object with these names."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError):
        return False
    return isinstance(found, dict) and names <= found.keys()


def _has_content(path: Path) -> bool:
    return path.is_file() and path.stat().st_size > 0


def _settings_beside(path: Path) -> Path:
    return path.with_suffix(".settings.json")


def evaluation_table(result: dict[str, Any], ks: Sequence[int]) -> str:
    """Markdown table of Pass@k, Length@k and Ratio@k of :func:`evaluate`, with intervals."""
    columns = [
        ("pass", "Pass@k", 3, 1), ("length", "Length@k (tokens)", 1, 1),
        ("ratio", "Ratio@k (1/1000 tokens)", 2, 1000), ("lenient pass", "Pass@k, any format", 3, 1),
    ]  # fmt: skip
    columns = [column for column in columns if f"{column[0]}@{ks[0]}" in result]
    lines = ["| k | " + " | ".join(title for _, title, _, _ in columns) + " |"]
    lines.append("|---" * (len(columns) + 1) + "|")
    for k in ks:
        cells = []
        for name, _, digits, unit in columns:
            interval = (result[f"{name}@{k}"], *result["intervals"][f"{name}@{k}"])
            cells.append(format_interval([unit * x for x in interval], digits))
        lines.append(f"| {k} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _sample_all(
    policy: Policy,
    problems: Sequence[Problem],
    how: _Sampling,
    save_to: Path | None,
    progress: bool,
) -> list[dict[str, Any]]:
    """Sample G completions for every problem, continuing and extending ``save_to`` if given."""
    completions = [] if save_to is None else _saved(save_to, policy, problems, how)
    size, done = how.problems_at_once, len(completions) // how.num_generations
    bar = tqdm(
        total=len(problems), initial=done, desc="evaluate", unit="problem", disable=not progress
    )
    appended: Any = contextlib.nullcontext()
    if save_to is not None:
        appended = save_to.open("a", encoding="utf-8", newline="\n")
    with bar, appended as log:
        for start in range(done, len(problems), size):
            part = list(problems[start : start + size])
            with tokens_shown(bar) as on_token:
                batch = _sample_batch(policy, part, start, how, on_token)
            completions += batch
            if log is not None:
                log.write("".join(json.dumps(completion) + "\n" for completion in batch))
                log.flush()
            bar.update(len(part))
    return completions


def _sample_batch(
    policy: Policy,
    part: list[Problem],
    start: int,
    how: _Sampling,
    on_token: Callable[[int, int], None],
) -> list[dict[str, Any]]:
    """Sample and judge a batch of problems from number ``start``; each batch has its own seed."""
    options: dict[str, Any] = {
        "num_generations": how.num_generations, "temperature": how.temperature,
        "max_completion_length": how.max_completion_length,
        "seed": how.seed * 1_000_003 + start, "on_token": on_token,
    }  # fmt: skip
    of_exits: list[dict[str, Any]] = [{}] * (len(part) * how.num_generations)
    if how.early_exit is None:
        rollouts = sample(policy, part, **options)
    else:
        rollouts, exits = sample_until_sure(policy, part, how.early_exit, **options)
        of_exits = exits.records()
    rollouts = score(rollouts, policy.tokenizer, part)
    texts, lengths = rollouts.texts(policy.tokenizer), rollouts.lengths.tolist()
    return [
        {
            "problem": start + i // how.num_generations,
            "text": text,
            "correct": bool(rollouts.correct[i]),
            "tokens": lengths[i],
            **of_exits[i],
        }
        for i, text in enumerate(texts)
    ]


def _saved(
    path: Path, policy: Policy, problems: Sequence[Problem], how: _Sampling
) -> list[dict[str, Any]]:
    """The completions in a file, if made with the same settings; only complete batches."""
    settings = {
        **asdict(how),
        "number of problems": len(problems),
        "fingerprint of the problems": fingerprint_of_problems(problems),
        _OF_POLICY: fingerprint_of_weights(policy.model.named_parameters()),
    }
    size = how.problems_at_once
    whole = [min(start, len(problems)) for start in range(0, len(problems) + size, size)]
    return _restore(path, settings, [n * how.num_generations for n in whole])


def _restore(path: Path, settings: dict[str, Any], sizes: Sequence[int]) -> list[dict[str, Any]]:
    """Completions of the complete batches in a file; a batch that a kill cut short is dropped.

    ``sizes`` holds the number of completions after 0, 1, 2, ... batches.
    """
    saved = _settings_beside(path)
    found: list[dict[str, Any]] = []
    if _has_content(path):
        before = read_json(saved, {})
        for name, value in settings.items():
            if before.get(name) != value:
                raise ValueError(
                    f"{name} is {value!r}, but the completions in '{path}' were made with "
                    f"{before.get(name)!r}; use the same settings, or name another file."
                )
        cuts = settings["early_exit"] is not None
        found = read_completions(path, settings["num_generations"], cuts)
        found = found[: max(n for n in sizes if n <= len(found))]
    write_json(saved, settings)
    replace_text(path, "".join(json.dumps(completion) + "\n" for completion in found))
    return found


def read_completions(
    path: Path, num_generations: int, early_exit: bool = False
) -> list[dict[str, Any]]:
    """Read the completions that :func:`evaluate` has written, without an incomplete last line.

    With ``early_exit`` they also hold what :data:`RECORDED` names.

    Raises:
        ValueError: naming the first line that does not hold the expected completion.
    """
    *lines, rest = path.read_bytes().split(b"\n")
    found = []
    needs: dict[str, type] = {"problem": int, "text": str, "correct": bool, "tokens": int}
    needs |= RECORDED if early_exit else {}
    for number, line in enumerate([*lines, rest] if rest else lines, start=1):
        try:
            row = json.loads(line)
            kinds = {name: type(row[name]) for name in needs}
        except (ValueError, TypeError, KeyError, RecursionError):
            row, kinds = {}, {}
        if kinds == needs and row["problem"] == (number - 1) // num_generations:
            found.append(row)
        elif number <= len(lines):
            raise ValueError(
                f"'{path}' is damaged: line {number} does not hold a completion of problem "
                f"{(number - 1) // num_generations}; restore the file, or remove it to sample all "
                "completions again."
            )
    return found
