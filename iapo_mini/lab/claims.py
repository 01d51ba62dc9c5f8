"""Make ``figures/claims.md`` from the results files: every claim of the paper beside our number.

:mod:`iapo_mini.lab.verdicts` decides the verdict on each claim.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from iapo_mini.files import read_json, replace_text
from iapo_mini.intervals import format_interval, mean_interval
from iapo_mini.lab.ablation import ablation
from iapo_mini.lab.controls import control_claims
from iapo_mini.lab.departures import departures
from iapo_mini.lab.oracle import oracle_claims
from iapo_mini.lab.results import results_path
from iapo_mini.lab.sizes import preset_of
from iapo_mini.lab.sweeps import SWEPT, sweeps
from iapo_mini.lab.theory import theory
from iapo_mini.lab.verdicts import LEVEL, Claim, Row, judge, verdict
from iapo_mini.plots import LABELS

BASELINES = ("grpo", "dapo", "gfpo", "gfpo_24", "gtpo", "gtpo_iapo", "sgrpo", "grpo_kimi",
             "grpo_efficient")  # fmt: skip
ACCURACY_MARGIN = 0.02
"""Loss of Pass@k that still counts as "equal accuracy"; the paper's table loses up to 0.044."""
COLLAPSED = 0.5
"""Training counts as collapsed if Pass@1 is below this share of Pass@1 at the smallest weight."""


def _paired(
    one: Sequence[float], other: Sequence[float], how: Callable[[float, float], float]
) -> list[float]:
    """``how(a, b)`` for the two runs of each seed."""
    return [how(a, b) for a, b in zip(one, other)]


def _ratio(a: float, b: float) -> float:
    return a / b if b else math.nan


def _less(a: float, b: float) -> float:
    """Share by which a is below b."""
    return 1 - _ratio(a, b)


def _more(a: float, b: float) -> float:
    return a - b


def _told(values: Sequence[float], digits: int = 3, scale: float = 1.0) -> str:
    """Mean and interval over seeds as text, or a dash if nothing was measured."""
    if not values or any(map(math.isnan, values)):
        return "-"
    return format_interval(mean_interval([scale * x for x in values]), digits)


def _at_ceiling(table: Mapping, metric: str) -> bool:
    """Whether the start policy counts as accurate even beside a method that is always right."""
    return min(table["methods"]["start"][metric]) >= 1 - ACCURACY_MARGIN


def of_table1(table: Mapping) -> list[Claim]:
    """Every claim on the content of ``table1.json``, to be judged together."""
    methods, k = table["methods"], max(table["config"]["evaluation"]["ks"])
    iapo, start = methods["iapo"], methods["start"]
    baselines = [name for name in BASELINES if name in methods]  # deciding rows are told first
    claims = []
    for name in baselines:
        saved = _paired(iapo[f"length@{k}"], methods[name][f"length@{k}"], _less)
        paper = {
            "gfpo": "0.37 (7B, GSM8K)",
            "dapo": "0.18 (1.5B, MATH-500), 0.55 (7B, DAPO-Math)",
            "gtpo_iapo": "0.32 (7B, GSM8K, k = 16)",
            "sgrpo": "0.37 (7B, GSM8K)",
        }
        claims.append(Claim(
            f"IAPO writes fewer tokens than {LABELS[name]} (share of Length@{k} saved)",
            paper.get(name, "-"), _told(saved), saved, low=0.0,
        ))  # fmt: skip
    for name in baselines:
        paper = {"gfpo": "+0.022", "gtpo_iapo": "0.000", "dapo": "0.000 (1.5B), -0.044 (7B)"}
        claims.append(_as_accurate(table, f"pass@{k}", name, paper.get(name, "-")))
    for name in baselines:
        gained = _paired(iapo[f"ratio@{k}"], methods[name][f"ratio@{k}"], _ratio)
        paper = {"gfpo": "1.47 (7B, GSM8K)", "dapo": "1.22 (1.5B), 2.08 (7B)"}
        claims.append(Claim(
            f"IAPO has a higher Ratio@{k} than {LABELS[name]} (factor)",
            paper.get(name, "-"), _told(gained), gained, low=1.0,
        ))  # fmt: skip
    claims.append(_as_accurate(table, "pass@1", "grpo", "-"))
    clock = table["wall_clock"]
    for name, whose in (("start", "start policy"), ("grpo", "GRPO policy")):
        faster = _paired(clock["iapo"], clock[name], _less)
        claims.append(Claim(
            f"inference takes less wall-clock time than with the {whose} (share of time saved)",
            "0.11 to 0.177", _told(faster), faster, low=0.0,
        ))  # fmt: skip
    dropped = _paired(_talk(iapo), _talk(start), _less)
    claims.append(Claim(
        "training removes filler (share of the start policy's talk tokens that is removed)", "-",
        _told(dropped), dropped, low=0.0,
    ))  # fmt: skip
    computing = iapo["roles"]["compute"], start["roles"]["compute"]
    share = [
        _ratio(a, a + t) - _ratio(b, b + u)
        for a, b, t, u in zip(*computing, _talk(iapo), _talk(start))
    ]
    claims.append(Claim(
        "computing tokens become a larger part of the completion (shown: share of them that is "
        "removed)",
        "-", _told(_paired(*computing, _less)), share, low=0.0,
    ))  # fmt: skip
    return claims


def _as_accurate(table: Mapping, metric: str, name: str, paper: str) -> Claim:
    lost = _paired(table["methods"]["iapo"][metric], table["methods"][name][metric], _more)
    return Claim(
        f"IAPO's {metric.capitalize()} is at least that of {LABELS[name]} minus {ACCURACY_MARGIN} "
        "(difference)",
        paper, _told(lost), lost, low=-ACCURACY_MARGIN, testable=not _at_ceiling(table, metric),
    )  # fmt: skip


def _talk(method: Mapping) -> list[float]:
    """Talk tokens per completion, one number for each seed."""
    roles = ("restate", "plan", "check", "hedge", "conclude")
    return [sum(counts) for counts in zip(*(method["roles"][role] for role in roles))]


def of_ablation(results: Mapping) -> list[Claim]:
    """Every claim on the content of ``ablation.json``, to be judged together."""
    k, claims = results["k"], []
    for a, b in (("iapo", "iapo_ne"), ("iapo_ne", "iapo_ni"), ("iapo_pmi", "iapo")):
        if not {a, b} <= set(results["ratio"]):
            continue  # its trials or runs are not finished
        gap = _paired(results["ratio"][a], results["ratio"][b], _more)
        claims.append(Claim(
            f"Ratio@{k} of {LABELS[a]} is above that of {LABELS[b]} (per 1,000 tokens)",
            "yes (Fig. 5)" if a != "iapo_pmi" else "- (ours)", _told(gap, 2, 1000), gap, low=0.0,
        ))  # fmt: skip
    return claims


def _slope(points: Sequence[Mapping], metric: str) -> list[float]:
    """Least-squares change per decade of the weight, for each seed; empty for a single point."""
    if len(points) < 2:
        return []
    x = [math.log10(point["value"]) for point in points]
    centre = sum(x) / len(x)
    spread = sum((u - centre) ** 2 for u in x)
    seeds = zip(*(point[metric] for point in points))
    return [sum((u - centre) * y for u, y in zip(x, values)) / spread for values in seeds]


def _mean(point: Mapping, metric: str) -> float:
    return sum(point[metric]) / len(point[metric])


def _trained(points: Sequence[Mapping], weight: str) -> tuple[list[Mapping], str]:
    """Points below the first weight at which training collapses, and a text about the others."""
    floor = COLLAPSED * _mean(points[0], "pass@1")
    kept = list(itertools.takewhile(lambda point: _mean(point, "pass@1") >= floor, points))
    told = [
        f"{point['value']:g} ({_mean(point, 'length'):.0f} tokens, "
        f"Pass@1 {_mean(point, 'pass@1'):.3f})"
        for point in points[len(kept) :]
    ]
    why = f", because training collapses at {', '.join(told)}" if told else ""
    return kept, f"; for {weight} up to {kept[-1]['value']:g}{why}"


def _of_sweeps(results: Mapping, table: Mapping) -> list[Claim]:
    k = results["k"]
    alpha, range_ = _trained(results["alpha"], "alpha")
    length = _slope(alpha, "length")
    means = [_mean(point, "length") for point in alpha]
    falls = all(b <= a for a, b in itertools.pairwise(means))
    steps = "" if falls else "; the means do not fall at every step"
    claims = [Claim(
        "length falls with alpha (change in tokens per decade of alpha)",
        "falls monotonically (Fig. 6)",
        _told(length, 1) + steps + range_, length, high=0.0,
    )]  # fmt: skip
    saved = _paired(alpha[-1]["length"], alpha[0]["length"], _less)
    for metric in ("pass@1", f"pass@{k}"):
        lost = _paired(alpha[-1][metric], alpha[0][metric], _less)
        claims.append(Claim(
            f"{metric.capitalize()} falls more slowly than length as alpha grows (shares of both "
            "lost from the smallest to the largest alpha)", "yes (Fig. 6)",
            f"{_told(lost)}; {_told(saved)}{range_}", _paired(saved, lost, _more), low=0.0,
            testable=not _at_ceiling(table, metric),
        ))  # fmt: skip
    beta, range_ = _trained(results["beta"], "beta")
    for metric, digits in (("pass@1", 3), (f"pass@{k}", 3), ("length", 1)):
        slope = _slope(beta, metric)
        claims.append(Claim(
            f"{metric.capitalize() if digits == 3 else metric} rises with beta (change per decade "
            "of beta)", "rises (Fig. 6)", _told(slope, digits) + range_, slope, low=0.0,
        ))  # fmt: skip
    return claims


def _of_theory(results: Mapping) -> list[Row]:
    theorem, exploration = results["theorem"]["informativeness"], results["exploration"]
    tables, told = results["corollary"]["tables"], results["corollary"]["stories"]
    rows = [
        ("a small step changes the expected length by the covariance (slope of measured on "
         "predicted change at the smallest step, tabular worlds)", "1 (Theorem 4.1)",
         format_interval(theorem["slope"][0], 4), verdict(theorem["slope"][0], 0.98, 1.02)),
        ("the error of this prediction is proportional to the step (order)", "1 (first order)",
         format_interval(theorem["order"]), verdict(theorem["order"], 0.9, 1.1)),
        ("informativeness per token is lower in longer completions (correlation within a story, "
         "start policy)", "assumed (Corollary 4.2)", format_interval(told["correlation"]),
         verdict(told["correlation"], high=0.0)),
        ("if it is lower in longer completions, a step shortens completions (share of worlds with "
         "talk before the answer)", "1 (Corollary 4.2)",
         format_interval(tables["filler"]["shorter"]),
         verdict(tables["filler"]["shorter"], low=0.95)),
        ("if it is lower in longer completions, a step shortens completions (share of random "
         "worlds; the same without normalising informativeness)", "1 (Corollary 4.2)",
         "; ".join(format_interval(tables["random"][key]) for key in ("shorter", "shorter_raw")),
         verdict(tables["random"]["shorter"], low=0.95)),
        ("if it is higher in longer completions, a step does not shorten them (share of worlds of "
         "clues that are shortened)", "0 (Corollary 4.2)",
         format_interval(tables["clue"]["shorter"]),
         verdict(tables["clue"]["shorter"], high=0.05)),
    ]  # fmt: skip
    for name, sign, moves in (("plus", "+", "falls"), ("minus", "-", "rises")):
        found = exploration[name]
        rows += [
            (f"with A = {sign}pi the entropy changes by -eta Cov(log pi, A) (slope of measured on "
             "predicted change at the smallest step)", "1 (exploration)",
             format_interval(found["slope"][0], 4), verdict(found["slope"][0], 0.98, 1.02)),
            (f"with A = {sign}pi the entropy {moves} (share of random policies)", "1 (exploration)",
             format_interval(found["right_sign"]), verdict(found["right_sign"], low=0.95)),
        ]  # fmt: skip
    return rows


def _of_departures(results: Mapping) -> list[Claim]:
    rule, claims = results["iapo"], []
    for row in results["rows"].values():
        change, told = [], []
        if "length" in row and "length" in rule:
            change = _paired(row["length"], rule["length"], _ratio)
            told = [_told(change), _told(_paired(row["pass@1"], rule["pass@1"], _more))]
        told += [
            f"correlation of the {what} {_told(row[key], 2)}"
            for key, what in (("correlation", "advantages"), ("terms", "token terms"))
            if key in row
        ]
        claims.append(Claim(
            f"the released code's departure \"{row['what']}\" makes no difference (length divided "
            "by that of the paper's rule is within 5% of 1; difference of Pass@1)",
            "not reported",
            "; ".join(told if change else ["not trained yet", *told]), change, 0.95, 1.05,
        ))  # fmt: skip
    return claims


def _theory(preset: str, figures: Path) -> dict:
    """Results of the theory, from its file if that exists, because a run takes minutes."""
    path = results_path(figures, "theory", preset)
    needs = ("theorem", "exploration", "corollary")
    return read_json(path, {}, needs) or theory(preset, figures=figures)


FILES = ("table1", "ablation", "sweeps", "theory", "departures")
MORE_FILES = ("controls", "oracle")
"""Results files of studies that :func:`claims` does not run; they add a section if they exist."""


def claims(
    preset: str = "full",
    *,
    out: str | Path = "runs/science",
    figures: str | Path = "figures",
    parallel: int | None = None,
) -> str:
    """Write ``claims.md``: every claim, the paper's number, our interval and the verdict.

    Missing runs of Table 1, ablation, sweeps, departures and theory are made first. Arguments and
    errors are those of :func:`iapo_mini.lab.table1.table1`.

    Returns:
        The text of the file.
    """
    preset_of(preset)
    for study in (ablation, sweeps, departures):  # the first makes Table 1 too
        study(preset, out=out, figures=figures, parallel=parallel)
    _theory(preset, Path(figures))
    text = report_of_files(preset, figures)
    name = "claims.md" if preset == "full" else f"claims_{preset}.md"
    replace_text(Path(figures) / name, text)
    return text


def report_of_files(preset: str = "full", figures: str | Path = "figures") -> str:
    """The text of ``claims.md`` from the results files, without any training.

    Raises:
        ValueError: for a file that is damaged, or missing and not one of ``MORE_FILES``.
    """
    paths = {name: results_path(Path(figures), name, preset) for name in FILES + MORE_FILES}
    wanted = {name: p for name, p in paths.items() if name in FILES or p.is_file()}
    return report({name: read_json(path) for name, path in wanted.items()}, preset)


def report(results: Mapping[str, Mapping], preset: str = "full") -> str:
    """The text of ``claims.md`` from the contents of results files, by their names."""
    table, swept = results["table1"], results["sweeps"]
    sections = {
        "Fewer tokens at equal accuracy (Table 1)": judge(of_table1(table)),
        "What each part is worth (Fig. 5)": judge(of_ablation(results["ablation"])),
        "The weights (Fig. 6)": judge(_of_sweeps(swept, table)),
        "Theory": _of_theory(results["theory"]),
        "The released code": judge(_of_departures(results["departures"])),
    }
    if "controls" in results:
        sections["Controls: is it the information?"] = judge(control_claims(results["controls"]))
    if "oracle" in results:
        sections["Better information"] = judge(oracle_claims(results["oracle"]))
    lines = ["# The paper's claims, remade", "", *_head(table, swept, preset)]
    if more := [name for name in MORE_FILES if name in results]:
        lines += ["", _of_more([results[name] for name in more], more)]
    for title, rows in sections.items():
        lines += ["", f"## {title}", "", "| claim | paper | ours | verdict |", "|---|---|---|---|"]
        lines += [f"| {row[0]} | {row[1]} | {row[2]} | **{row[3]}** |" for row in rows]
    return "\n".join(lines) + "\n"


def _head(table: Mapping, swept: Mapping, preset: str) -> list[str]:
    size = table["config"]["evaluation"]
    counts = {len(row["length"]) for row in table["methods"].values()}
    seeds = " to ".join(str(n) for n in sorted({min(counts), max(counts)}))
    command = "iapo-mini lab claims" + ("" if preset == "full" else f" --preset {preset}")
    return [
        f"`{command}` makes this page from the files in `results`. Our numbers are for the "
        f"embedded policy in the story world, with {seeds} seeds and "
        f"{size['problems']} test stories of {size['num_generations']} completions each. (The "
        f"sweeps and departures have {len(swept['seeds'])} seeds and "
        f"{swept['config']['evaluation']['problems']} stories.) Each is a mean with a 95% interval "
        "over seeds. Where two rows are compared, they are paired by seed. The paper's numbers are "
        "for Qwen2.5-Instruct models on mathematics. So our numbers show whether a claim holds in "
        "the story world. They do not show how large an effect is elsewhere.",
        "",
        f"The mean of the loss is that of each method's authors. {_losses(table)} The sweeps: "
        f"{_mean_of(swept['config'])}. The results files name the mean of every row "
        "(`aggregation`).",
        "",
        "A claim *holds* or *does not hold* if a t-test over seeds finds the mean on that side of "
        f"the border. All rows of a section share a one-sided level of {LEVEL} (Holm's "
        "correction). The intervals are not corrected, so an interval can lie on one side of the "
        "border although the verdict is *cannot tell*. A claim *cannot be tested* if the start "
        f"policy has a Pass@k of at least {1 - ACCURACY_MARGIN} in every seed, since a method then "
        "passes without learning anything. The sweep of a weight is used up to the last value "
        "before training collapses. Training counts as collapsed if Pass@1 is below "
        f"{COLLAPSED} of Pass@1 at the smallest value.",
        "",
        "For the theory the results file holds only intervals. There the whole 95% interval must "
        "lie on one side of the border, without a correction. The borders are 0.98 and 1.02 for a "
        "slope, 0.9 and 1.1 for an order, 0 for a correlation, and 0.95 (or 0.05) for a share.",
    ]


def _of_more(found: Sequence[Mapping], names: Sequence[str]) -> str:
    """A sentence on the sizes of further studies."""
    told = []
    for name, results in zip(names, found):
        size, seeds = results["config"]["evaluation"], len(results["seeds"])
        told.append(
            f"the {name} with at least {seeds} seeds and {size['problems']} test stories of "
            f"{size['num_generations']} completions"
        )
    return f"Further studies, under the token mean unless a row says otherwise: {'; '.join(told)}."


def _losses(table: Mapping) -> str:
    """A sentence on the mean of the loss in the rows of Table 1."""
    rows: dict[str, list[str]] = {}
    for name, row in table["methods"].items():
        if "aggregation" in row:
            rows.setdefault(row["aggregation"], []).append(LABELS[name])
    told = [f"*{how} mean* for {', '.join(names)}" for how, names in sorted(rows.items())]
    return f"Table 1 and its ablation: {'; '.join(told)}."


def _mean_of(config: Mapping) -> str:
    """The mean of the loss of the runs that vary a weight."""
    ways = {row["aggregation"] for name, row in config.items() if name.startswith(tuple(SWEPT))}
    return " and ".join(f"*{way} mean*" for way in sorted(ways))
