"""Every claim of the paper beside our number: ``figures/claims.md``, made from the results files.

A claim is a quantity with an interval over seeds and the region in which it holds. The verdict is
*holds* when the whole 95% interval lies in the region, *does not hold* when it lies outside, and
*cannot tell* otherwise, or when a single seed gives no interval.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from iapo_mini.files import read_json, replace_text
from iapo_mini.intervals import format_interval, mean_interval
from iapo_mini.lab.ablation import ablation
from iapo_mini.lab.departures import departures
from iapo_mini.lab.results import results_path
from iapo_mini.lab.sizes import preset_of
from iapo_mini.lab.sweeps import sweeps
from iapo_mini.lab.theory import theory
from iapo_mini.plots import LABELS

Row = tuple[str, str, str, str]
"""Claim, the paper's number, ours, verdict."""


def verdict(interval: Sequence[float], low: float = -math.inf, high: float = math.inf) -> str:
    """Whether a quantity lies between ``low`` and ``high``, by its ``(mean, low, high)``."""
    _, left, right = interval
    if math.isnan(left):
        return "cannot tell"
    if left >= low and right <= high:
        return "holds"
    return "does not hold" if left > high or right < low else "cannot tell"


def _paired(
    one: Sequence[float], other: Sequence[float], how: Callable[[float, float], float]
) -> tuple[float, float, float]:
    """Mean and interval of ``how(a, b)`` over runs of the same seed."""
    return mean_interval([how(a, b) for a, b in zip(one, other)])


def _less(a: float, b: float) -> float:
    """Share by which a is below b."""
    return 1 - a / b


BASELINES = ("grpo", "dapo", "gfpo", "gtpo", "sgrpo")
ACCURACY_MARGIN = 0.02
"""Pass@k that may be lost where the paper says "equal accuracy"; its table loses up to 0.044."""


def _of_table1(results: Mapping) -> list[Row]:
    methods, k = results["methods"], max(results["config"]["evaluation"]["ks"])
    iapo, grpo, start = methods["iapo"], methods["grpo"], methods["start"]
    length, passed, ratio = f"length@{k}", f"pass@{k}", f"ratio@{k}"
    rows = []
    for name in BASELINES:
        saved = _paired(iapo[length], methods[name][length], _less)
        rows.append((
            f"IAPO writes fewer tokens than {LABELS[name]} (Length@{k}, share saved)",
            {"gfpo": "0.37 (7B, GSM8K)", "dapo": "0.18 (1.5B, MATH-500), 0.55 (7B, DAPO-Math)",
             "gtpo": "0.32 (7B, GSM8K, k = 16)", "sgrpo": "0.37 (7B, GSM8K)"}.get(name, "-"),
            format_interval(saved), verdict(saved, low=0.0),
        ))  # fmt: skip
    for name in BASELINES:
        lost = _paired(iapo[passed], methods[name][passed], lambda a, b: a - b)
        rows.append((
            f"at equal accuracy (Pass@{k} minus that of {LABELS[name]}, at least "
            f"-{ACCURACY_MARGIN})",
            {"gfpo": "+0.022", "gtpo": "0.000", "dapo": "0.000 (1.5B), -0.044 (7B)"}.get(name, "-"),
            format_interval(lost), verdict(lost, low=-ACCURACY_MARGIN),
        ))  # fmt: skip
    for name in BASELINES:
        gained = _paired(iapo[ratio], methods[name][ratio], lambda a, b: a / b)
        rows.append((
            f"and so has the higher Ratio@{k} (factor over {LABELS[name]})",
            {"gfpo": "1.47 (7B, GSM8K)", "dapo": "1.22 (1.5B), 2.08 (7B)"}.get(name, "-"),
            format_interval(gained), verdict(gained, low=1.0),
        ))  # fmt: skip
    first = _paired(iapo["pass@1"], grpo["pass@1"], lambda a, b: a - b)
    rows.append((
        f"a single answer is as often right (Pass@1 minus that of GRPO, at least "
        f"-{ACCURACY_MARGIN})", "-", format_interval(first), verdict(first, low=-ACCURACY_MARGIN),
    ))  # fmt: skip
    clock = results["wall_clock"]
    for name in ("start", "grpo"):
        faster = _paired(clock["iapo"], clock[name], _less)
        rows.append((
            f"inference takes less wall-clock time than with the {LABELS[name]}"
            f"{'' if name == 'start' else ' policy'} (share saved)",
            "0.11 to 0.177", format_interval(faster), verdict(faster, low=0.0),
        ))  # fmt: skip
    dropped = _paired(_talk(iapo), _talk(start), _less)
    rows.append((
        "filler goes (share of talking tokens dropped since the start policy)", "-",
        format_interval(dropped), verdict(dropped, low=0.0),
    ))  # fmt: skip
    computing = iapo["roles"]["compute"], start["roles"]["compute"]
    share = [a / (a + t) - b / (b + u) for a, b, t, u in zip(*computing, _talk(iapo), _talk(start))]
    rows.append((
        "and computing stays (share of computing tokens dropped; verdict: they are a larger part "
        "of what is written than before)", "-", format_interval(_paired(*computing, _less)),
        verdict(mean_interval(share), low=0.0),
    ))  # fmt: skip
    return rows


def _talk(method: Mapping) -> list[float]:
    """Tokens of talk per completion, one number for each seed."""
    roles = ("restate", "plan", "check", "hedge", "conclude")
    return [sum(counts) for counts in zip(*(method["roles"][role] for role in roles))]


def _of_ablation(results: Mapping) -> list[Row]:
    return [
        (
            f"Ratio@{results['k']} of {LABELS[a]} is above that of {LABELS[b]} (per 1,000 tokens)",
            "yes (Fig. 5)" if a != "iapo_pmi" else "- (ours)",
            format_interval([1000 * x for x in results["gap"][f"{a} - {b}"]], 2),
            verdict(results["gap"][f"{a} - {b}"], low=0.0),
        )
        for a, b in (("iapo", "iapo_ne"), ("iapo_ne", "iapo_ni"), ("iapo_pmi", "iapo"))
    ]


def _slope(points: Sequence[Mapping], metric: str) -> tuple[float, float, float]:
    """Interval over seeds of the change per decade of the weight, by least squares."""
    x = [math.log10(point["value"]) for point in points]
    centre = sum(x) / len(x)
    spread = sum((u - centre) ** 2 for u in x)
    seeds = zip(*(point[metric] for point in points))
    return mean_interval([
        sum((u - centre) * y for u, y in zip(x, values)) / spread for values in seeds
    ])  # fmt: skip


def _of_sweeps(results: Mapping) -> list[Row]:
    k, alpha, beta = results["k"], results["alpha"], results["beta"]
    means = [sum(point["length"]) / len(point["length"]) for point in alpha]
    falls = all(b <= a for a, b in itertools.pairwise(means))
    length = _slope(alpha, "length")
    share = _paired(alpha[-1]["length"], alpha[0]["length"], _less)
    lost = _paired(alpha[-1][f"pass@{k}"], alpha[0][f"pass@{k}"], _less)
    slower = _paired(
        [b / a for a, b in zip(alpha[0][f"pass@{k}"], alpha[-1][f"pass@{k}"])],
        [b / a for a, b in zip(alpha[0]["length"], alpha[-1]["length"])], lambda p, n: p - n,
    )  # fmt: skip
    rows = [
        ("length falls with alpha (tokens per decade of alpha)", "falls monotonically (Fig. 6)",
         format_interval(length, 1) + ("" if falls else "; the means do not fall at every step"),
         verdict(length, high=0.0)),
        (f"Pass@{k} falls much more slowly (share lost from the least to the largest alpha; that "
         "of the length)", "yes (Fig. 6)", f"{format_interval(lost)}; {format_interval(share)}",
         verdict(slower, low=0.0)),
    ]  # fmt: skip
    for metric, label, unit in ((f"pass@{k}", f"Pass@{k}", 3), ("length", "length", 1)):
        slope = _slope(beta, metric)
        rows.append((f"{label} rises with beta (per decade of beta)", "rises (Fig. 6)",
                     format_interval(slope, unit), verdict(slope, low=0.0)))  # fmt: skip
    return rows


def _of_theory(results: Mapping) -> list[Row]:
    theorem, exploration = results["theorem"]["informativeness"], results["exploration"]
    tables, told = results["corollary"]["tables"], results["corollary"]["stories"]
    rows = [
        ("a small step changes the expected length by the covariance (slope of measured on "
         "predicted at the smallest step, tabular worlds)", "1 (Theorem 4.1)",
         format_interval(theorem["slope"][0], 4), verdict(theorem["slope"][0], 0.98, 1.02)),
        ("the error shrinks in proportion to the step (order)", "1 (first order)",
         format_interval(theorem["order"]), verdict(theorem["order"], 0.9, 1.1)),
        ("informativeness per token falls as completions grow (correlation within a story, start "
         "policy)", "assumed (Corollary 4.2)", format_interval(told["correlation"]),
         verdict(told["correlation"], high=0.0)),
        ("where it falls, the step shortens (share of worlds of talk and an answer)",
         "1 (Corollary 4.2)", format_interval(tables["filler"]["shorter"]),
         verdict(tables["filler"]["shorter"], low=0.95)),
        ("where it grows, the step lengthens (share of worlds of clues that it shortens)",
         "0 (Corollary 4.2)", format_interval(tables["clue"]["shorter"]),
         verdict(tables["clue"]["shorter"], high=0.05)),
    ]  # fmt: skip
    for name, sign, moves in (("plus", "+", "falls"), ("minus", "-", "rises")):
        found = exploration[name]
        rows += [
            (f"with A = {sign}pi the entropy changes by -eta Cov(log pi, A) (slope at the smallest "
             "step)", "1 (exploration)", format_interval(found["slope"][0], 4),
             verdict(found["slope"][0], 0.98, 1.02)),
            (f"and so it {moves} (share of random policies)", "1 (exploration)",
             format_interval(found["right_sign"]), verdict(found["right_sign"], low=0.95)),
        ]  # fmt: skip
    return rows


def _of_departures(results: Mapping) -> list[Row]:
    rows = []
    for row in results["rows"].values():
        change = _paired(row["length"], results["iapo"]["length"], lambda a, b: a / b)
        right = _paired(row["pass@1"], results["iapo"]["pass@1"], lambda a, b: a - b)
        same = verdict(change, 0.95, 1.05)
        rows.append((
            f"the released code's departure \"{row['what']}\" makes no difference (length over "
            "that of the paper's rule within 5%; Pass@1 minus)", "not told",
            f"{format_interval(change)}; {format_interval(right)}; correlation of the advantages "
            f"{format_interval(mean_interval(row['correlation']), 2)}", same,
        ))  # fmt: skip
    return rows


def _theory(preset: str, figures: Path) -> dict:
    """Results of the theory, from its file where that is there: a run takes minutes."""
    path = results_path(figures, "theory", preset)
    needs = ("theorem", "exploration", "corollary")
    return read_json(path, {}, needs) or theory(preset, figures=figures)


def claims(
    preset: str = "full",
    *,
    out: str | Path = "runs/science",
    figures: str | Path = "figures",
    parallel: int | None = None,
) -> str:
    """Write ``claims.md``: every claim, the paper's number, ours with its interval, the verdict.

    What is missing of Table 1, ablation, sweeps, departures and theory is run first. Arguments and
    errors as for :func:`iapo_mini.lab.table1.table1`.

    Returns:
        The text of the file.
    """
    preset_of(preset)
    ablated = ablation(preset, out=out, figures=figures, parallel=parallel)  # Table 1 with it
    table = read_json(results_path(Path(figures), "table1", preset))
    swept = sweeps(preset, out=out, figures=figures, parallel=parallel)
    sections = {
        "Fewer tokens at equal accuracy (Table 1)": _of_table1(table),
        "What each part is worth (Fig. 5)": _of_ablation(ablated),
        "The weights (Fig. 6)": _of_sweeps(swept),
        "Theory": _of_theory(_theory(preset, Path(figures))),
        "The released code": _of_departures(
            departures(preset, out=out, figures=figures, parallel=parallel)
        ),
    }
    size = table["config"]["evaluation"]
    command = "iapo-mini lab claims" + ("" if preset == "full" else f" --preset {preset}")
    lines = [
        "# The paper's claims, remade",
        "",
        f"Made by `{command}` from the "
        f"results beside it. Ours: embedded policy, story world, {len(table['seeds'])} seeds, "
        f"{size['problems']} test stories, {size['num_generations']} completions each (sweeps and "
        f"departures: {len(swept['seeds'])} seeds, {swept['config']['evaluation']['problems']} "
        "stories); mean and 95% interval over seeds, paired by seed where two rows are compared. "
        "The paper's: Qwen2.5-Instruct models on mathematics. So ours can tell whether a claim "
        "holds in this world, and not how large it is elsewhere. *Cannot tell*: the interval "
        "reaches across the border.",
    ]
    for title, rows in sections.items():
        lines += ["", f"## {title}", "", "| claim | paper | ours | verdict |", "|---|---|---|---|"]
        lines += [f"| {row[0]} | {row[1]} | {row[2]} | **{row[3]}** |" for row in rows]
    text = "\n".join(lines) + "\n"
    name = "claims.md" if preset == "full" else f"claims_{preset}.md"
    replace_text(Path(figures) / name, text)
    return text
