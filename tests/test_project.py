"""The texts of the project agree with its files."""

import json
import math
import re
import statistics
from pathlib import Path

import pytest
from helpers import load_script

from iapo_mini.config import TrainConfig
from iapo_mini.intervals import format_interval, mean_interval, share_interval
from iapo_mini.lab import verdicts
from iapo_mini.lab.choices import choices_by_start, choices_table
from iapo_mini.lab.claims import _talk, of_table1, report_of_files
from iapo_mini.lab.controls import control_claims, controls_table
from iapo_mini.lab.curves import curves_table, steps_table
from iapo_mini.lab.departures import departures_table
from iapo_mini.lab.early_exit import early_exit_table
from iapo_mini.lab.estimators import ESTIMATORS, POLICIES, speed_table, study_table
from iapo_mini.lab.ledger import read as read_ledger
from iapo_mini.lab.oracle import oracle_claims, oracle_table
from iapo_mini.lab.real import real_table
from iapo_mini.lab.real_calibration import real_calibration_table
from iapo_mini.lab.real_progress import progress_table
from iapo_mini.lab.results import comparison_table
from iapo_mini.lab.runs import START
from iapo_mini.lab.sizes import COMPARED, preset_of
from iapo_mini.lab.starts import starts_table
from iapo_mini.lab.table1 import DECIDING
from iapo_mini.lab.tuning import ROWS, finished_trials, tuning_table
from iapo_mini.lab.verdicts import judge
from iapo_mini.recipes import RECIPES

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def full():
    return json.loads((ROOT / "figures/results/compare_full.json").read_text(encoding="utf-8"))


def test_readme_table_is_the_committed_result(full):
    readme, page = (
        (ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "docs/results.md")
    )
    assert comparison_table(full) in readme and comparison_table(full) in page
    length, right = ([full["methods"][m][metric] for m in ("iapo", "grpo")]
                     for metric in ("length", "pass@1"))  # fmt: skip
    factor = sum(length[0]) / sum(length[1])
    assert f"**{factor:.2f} times as long**" in readme
    gap = format_interval(mean_interval([a - b for a, b in zip(*right)]))
    assert f"Pass@1 differs by {gap} within a seed" in readme


def test_the_readme_is_short_and_its_two_commands_come_first():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    lines = readme.splitlines()
    assert len(lines) <= 130
    assert readme.index("$$A_{i,t}") < readme.index("![A completion of the start policy")
    assert readme.index("![A completion of the start policy") < readme.index("make demo")
    assert readme.index("make test") < readme.index("## Result")
    assert not re.search(r"\]\((?!https:|#)", readme)  # links work on a package index, too


@pytest.fixture(scope="module")
def estimator():
    return json.loads((ROOT / "figures/results/estimator.json").read_text(encoding="utf-8"))


def test_tables_of_the_estimator_are_the_committed_results(estimator):
    docs = (ROOT / "docs/estimators.md").read_text(encoding="utf-8")
    assert study_table(estimator) in docs
    assert speed_table(estimator) in docs


def test_compare_trains_what_the_finished_trials_chose():
    kept = ROOT / "figures/results/runs/tuning.jsonl"
    results = finished_trials(kept, preset_of("full").tuning)
    page = (ROOT / "docs/methods.md").read_text(encoding="utf-8")
    assert tuning_table(results) in page
    runs = read_ledger(kept)
    start = [runs[name]["result"]["pass@1"] for name in runs if name.startswith(START)]
    assert f"start policy (Pass@1 {statistics.fmean(start):.3f})" in page
    for row, recipe in COMPARED.items():
        settings = results["trials"][row][results["chosen"][row]]["settings"]
        trained = TrainConfig(**recipe).settings()
        assert {field: trained[field] for field in settings} == settings


@pytest.fixture(scope="module")
def table1_results():
    return json.loads((ROOT / "figures/results/table1.json").read_text(encoding="utf-8"))


def test_table1_in_the_texts_is_the_committed_result(table1_results):
    page = (ROOT / "docs/results.md").read_text(encoding="utf-8")
    for metric in ("pass", "length", "ratio"):
        assert comparison_table(table1_results, metric) in page
    assert curves_table(table1_results) in page and steps_table(table1_results) in page
    departed = json.loads((ROOT / "figures/results/departures.json").read_text(encoding="utf-8"))
    assert departures_table(departed) in page
    chosen = json.loads((ROOT / "figures/results/choices.json").read_text(encoding="utf-8"))
    assert choices_table(chosen) in page and choices_by_start(chosen) in page


def test_results_of_better_starts_in_the_docs_are_the_committed_ones():
    results = json.loads((ROOT / "figures/results/starts.json").read_text(encoding="utf-8"))
    page = (ROOT / "docs/results.md").read_text(encoding="utf-8")
    assert starts_table(results) in page

    def told(start, pair, metric, digits, sign=1, scale=1):
        ends = sorted(sign * scale * x for x in results["difference"][start][pair][metric])
        low, mean, high = (f"{x:.{digits}f}" for x in ends)
        return f"{mean} [{low}, {high}]"

    def shorter(start, other):
        mean, interval = told(start, f"iapo - {other}", "length", 0, sign=-1).split(" ", 1)
        return {f"{mean} tokens {interval}", f"{mean} {interval}"}

    starts = ("uncalibrated", "embedded", "calibrated")
    pairs = [(start, "grpo") for start in starts] + [("uncalibrated", "iapo_ne")]
    assert [pair for pair in pairs if not any(x in page for x in shorter(*pair))] == []
    gains = (-results["difference"][start]["iapo - iapo_ne"]["length"][0] for start in starts)
    assert "largest: {:.0f} tokens, against {:.0f} and {:.0f}".format(*gains) in page
    paid = json.loads((ROOT / "figures/results/choices.json").read_text(encoding="utf-8"))
    terms = (paid["starts"]["uncalibrated"], paid, paid["starts"]["calibrated"])
    pay = (row["terms"]["iapo"]["token"][0] for row in terms)
    assert "{:.2f} standard deviations against {:.2f} and {:.2f}".format(*pay) in page
    for metric, digits, unit in (("length", 1, " tokens"), ("pass@1", 3, "")):
        first, *rest = (told(start, "iapo_sentence - iapo", metric, digits) for start in starts)
        assert f"{first}, {' and '.join(rest)}{unit}" in page
    gained = [told("uncalibrated", f"iapo - {other}", "ratio@1", 1, scale=1000)
              for other in ("grpo", "iapo_ne")]  # fmt: skip
    assert " and ".join(gained) + " more right answers" in page
    study = json.loads((ROOT / "figures/results/estimator.json").read_text(encoding="utf-8"))
    parrot, embedded = (study["auc"][start]["entropy"][0] for start in starts[:2])
    assert f"an AUC of {parrot:.2f}, no worse than those of the embedded policy with " \
           f"{embedded:.2f}" in page  # fmt: skip


def test_early_exits_in_the_docs_are_the_committed_ones():
    results = json.loads((ROOT / "figures/results/early_exit.json").read_text(encoding="utf-8"))
    page = (ROOT / "docs/results.md").read_text(encoding="utf-8")
    tables = early_exit_table(results).split("\n\n")
    assert len(tables) == 2 and [table for table in tables if table not in page] == []
    rows = {name: {row["rule"]: row for row in own} for name, own in results["policies"].items()}
    for name in ("embedded", "calibrated"):
        never, cut = rows[name]["never"], rows[name][0.5]
        assert abs(never["pass@1"][0] - cut["pass@1"][0]) < 0.02 and cut["cut"] > 0.85
        assert 3 <= never["length"][0] - cut["length"][0] <= 5 and 14 < cut["asking"][0] < 16
    assert max(row["pass@1"][0] for h, row in rows["uncalibrated"].items() if h not in (
        "never", "agree")) < 0.05  # fmt: skip


def told_so_far(stem, levels, lasted):
    """Results of an unfinished study, its Pass@1 by level, and the page, which tells its parts."""
    path = ROOT / f"figures/results/{stem}.json"
    results = json.loads(path.read_text(encoding="utf-8"))
    page = (ROOT / "docs/real_models.md").read_text(encoding="utf-8")
    assert progress_table(results) in page
    assert [results["levels"][i]["level"] for i in results["chosen"]] == levels
    assert results["within"]
    assert "Pass@1 {pass@1:.2f} and Pass@32 {pass@32:.2f}".format(**results["expected"]) in page
    how, minutes = results["start"]["settings"], results["start"]["minutes"]
    told = f"{how['steps']} steps of {how['batch_size']} worked stories"
    assert f"{told}, {lasted.format(minutes)}" in page
    return results, {tuple(level["level"]): level["pass@1"] for level in results["levels"]}, page


def test_unfinished_training_of_a_real_model_in_the_docs_is_the_committed_one():
    chosen = [[1, 99], [4, 9999]]
    results, right, page = told_so_far("real_training_so_far_card", chosen, "{:.1f} minutes")
    told = right[1, 99], right[4, 999]
    assert "Pass@1 then fell from {:.2f} for one operation below 100 to {:.2f} for".format(
        *told
    ) in page.replace("\n", " ")
    steps = [len(one["length"]) for some in results["runs"].values() for one in some]
    assert f"after {min(steps)} to {max(steps)} steps" in page
    judged = [one["judged"] for one in results["runs"]["grpo_efficient"]]
    lost = [one["start pass@1"] - one["pass@1"] for one in judged]
    assert "within 0.04 of the start's" in page and 0 < max(lost) < 0.045


def test_what_training_on_a_cpu_says_so_far_in_the_docs_is_what_the_ledger_says():
    chosen, lasted = [[1, 99], [1, 999]], "{:.0f} minutes on two cores"
    results, right, page = told_so_far("real_training_so_far", chosen, lasted)
    told = (right[level] for level in ((1, 99), (2, 99), (1, 999), (2, 999)))
    assert (
        "Pass@1 is then {:.2f} for one operation below 100, {:.2f} for two of them, {:.2f} for one "
        "below 1,000 and {:.2f} for two of those."
    ).format(*told) in page
    folder = ROOT / "figures/results/runs"
    kept = json.loads((folder / "real_start/warm_start.json").read_text(encoding="utf-8"))
    assert kept["loss"] == results["start"]["loss"]
    entries = read_ledger(folder / "real_training.jsonl")
    runs = {name: entry["result"] for name, entry in entries.items()}
    assert set(runs) == {
        "start-0", "start-1", "grpo-0", "grpo-1", "grpo_efficient-0", "grpo_efficient-1", "iapo-0",
        "iapo_sentence_tags-0",
    }  # fmt: skip
    told = "GRPO and the length penalty are finished with both seeds, and IAPO with seed 0."
    assert "{pass@32:.2f}. {told}".format(**results["expected"], told=told) in page

    def both(row, metric, form):
        return " and ".join(form.format(runs[f"{row}-{seed}"][metric]) for seed in (0, 1))

    start, iapo, tags = (runs[name] for name in ("start-0", "iapo-0", "iapo_sentence_tags-0"))
    methods = ("grpo", "grpo_efficient")
    for part in (
        f"writes {start['length']:.0f} tokens, with Pass@1 {start['pass@1']:.2f}",
        f"as it was**, {both('grpo', 'length', '{:.0f}')} tokens",
        f"to {both('grpo_efficient', 'length', '{:.0f}')} tokens",
        "(Pass@1 " + "; ".join(both(row, "pass@1", "{:.2f}") for row in methods),
        "(Pass@32 " + "; ".join(both(row, "pass@32", "{:.2f}") for row in methods),
        f"{iapo['length']:.0f} tokens, with Pass@1 {iapo['pass@1']:.2f} and the lowest Pass@32 so "
        f"far, {iapo['pass@32']:.2f}",
        f"take {iapo['roles']['restate']:.0f} tokens of a completion, "
        f"{start['roles']['restate']:.0f} before",
        f"took {tags['roles']['conclude']:.0f} of {tags['length']:.0f} tokens",
        f"Pass@1 fell to {tags['pass@1']:.2f}",
    ):
        assert part in page, part
    assert start["pass@32"] == 28 / 32
    sound = [run["pass@32"] for name, run in runs.items() if "tags" not in name]
    assert min(sound) == iapo["pass@32"]
    lengths = entries["iapo_sentence_tags-0"]["curve"]["length"]
    assert max(lengths[:9]) < 60 < min(lengths[9:])  # from step 10 on


@pytest.mark.parametrize("name", ["real_estimator", "real_estimator_warm_start"])
def test_estimators_on_a_real_model_in_the_docs_are_the_committed_ones(name):
    path = ROOT / f"figures/results/{name}.json"
    results = json.loads(path.read_text(encoding="utf-8"))
    page = (ROOT / "docs/real_models.md").read_text(encoding="utf-8")
    assert real_table(results) in page
    entropy, sentence, whole = (
        results["token"]["entropy"], results["sentence"]["entropy"], results["whole"]
    )  # fmt: skip
    told = [
        f"{results['problems']['worked']} of GSM8K's worked solutions",
        f"None of {results['sampled']} completions",
        f"standard deviation {entropy['words_sd']:.2f}",
        f"rise* by {-entropy['result_mean']:.2f} nats",
        f"right in {100 * results['accuracy_by_tenth'][-1]:.0f}% of the chains",
        f"({whole['end']['first']:.1f} nats against {whole['start']['first']:.1f})",
        f"{whole['auc'][0]:.2f} against {whole['first_auc'][0]:.2f} by sentence",
        f"although {100 * whole['left']:.0f}% of the probability",
        f"{results['postfix']['natural']['auc'][0]:.2f} against "
        f"{results['postfix']['paper']['auc'][0]:.2f} by token",
        f"({whole['start']['whole']:.1f} against {whole['start']['first']:.1f} nats",
    ]  # fmt: skip
    if name.endswith("warm_start"):
        own = results["own"]
        told = [
            f"{results['problems']['worked']} worked stories",
            f"the AUC is {sentence['auc'][0]:.2f}",
            f"by {sentence['computing']['mean']:.2f} nats, the others by "
            f"{sentence['other']['mean']:.2f}",
            f"{100 * results['confidence_by_tenth'][0]:.0f}% confidence before the first word",
            f"a calibration error of {results['ece']:.2f}",
            f"the calibration error falls from {results['ece']:.2f} to "
            f"{results['postfix']['natural']['ece']:.2f}",
            f"On {results['problems']['own']} completions of its own",
            f"({own['sentence']['entropy']['auc'][0]:.2f} by sentence, calibration error "
            f"{own['ece']:.2f})",
            f"({whole['auc'][0]:.2f} and {whole['first_auc'][0]:.2f})",
            f"{whole['start']['whole']:.1f} against {whole['start']['first']:.1f} after",
        ]
        assert results["accuracy_by_tenth"][0] == 0.01 and abs(own["right"] - 1 / 3) < 0.03
    for part in told:
        assert part in page, part


def test_calibration_of_a_real_model_in_the_docs_is_the_committed_one():
    path = ROOT / "figures/results/real_calibration.json"
    results = json.loads(path.read_text(encoding="utf-8"))
    page = (ROOT / "docs/real_models.md").read_text(encoding="utf-8")
    assert real_calibration_table(results) in page
    before, after = results["before"], results["after"]
    for part in (
        f"from {before['ece']:.2f} to {after['ece']:.2f}",
        f"from {before['auc_sentence'][0]:.2f} to {after['auc_sentence'][0]:.2f} by sentence",
        f"from {before['entropy_by_tenth'][0]:.1f} to {after['entropy_by_tenth'][0]:.1f} nats",
    ):
        assert part in page, part


def test_controls_in_the_docs_are_the_committed_ones():
    results = json.loads((ROOT / "figures/results/controls.json").read_text(encoding="utf-8"))
    page = (ROOT / "docs/results.md").read_text(encoding="utf-8")
    rows = {name: row["token"] for name, row in results["rows"].items()}
    assert controls_table(results) in page

    def less(name, metric, scale=1):
        """IAPO's value minus that of a control, as text."""
        pairs = zip(rows["iapo"][metric], rows[name][metric])
        return format_interval(mean_interval([scale * (a - b) for a, b in pairs]), 1)

    for name in ("grpo_kimi", "grpo_efficient"):
        assert less(name, "length") in page
    for name in ("grpo", "shuffled", "random", "constant"):
        assert less(name, "ratio@1", 1000) in page
    short = {name: sum(n < 34 for n in row["length"]) for name, row in rows.items()}
    told = [short[name] for name in ("shuffled", "random", "constant", "grpo")]
    assert told == [2, 4, 3, 1] and short["iapo"] == 5
    assert "2, 4, 3 and 1 of 5 end below 34 tokens" in page
    collapsed = {name: sum(p == 0 for p in row["pass@1"]) for name, row in rows.items()}
    assert (collapsed["numeric"], collapsed["roles"], collapsed["iapo"]) == (2, 3, 0)
    verdicts = [row[3] for row in judge(control_claims(results))]
    assert len(verdicts) == 20 and verdicts.count("holds") == 1


def test_real_continuations_in_the_docs_are_the_committed_ones():
    results = json.loads((ROOT / "figures/results/oracle.json").read_text(encoding="utf-8"))
    page = (ROOT / "docs/results.md").read_text(encoding="utf-8")
    assert [part for part in oracle_table(results).split("\n\n") if part not in page] == []
    trained = results["training"]

    def less(one, other, metric, scale=1.0):
        return [scale * (a - b) for a, b in zip(trained[one][metric], trained[other][metric])]

    shorter = less("iapo", "oracle", "length")
    assert f"a difference within a seed of {format_interval(mean_interval(shorter), 1)}" in page
    assert [gap > 0 for gap in less("iapo", "oracle", "pass@1")].count(True) == 2
    more = less("iapo", "vine", "ratio@1", 1000)
    assert f"1,000 tokens are {format_interval(mean_interval(more), 1)} below IAPO's" in page
    assert all(1 < gap < 7 for gap in less("vine", "grpo", "length"))
    for name in ("embedded", "calibrated"):
        gaps = [(place, early - real) for place, early, real
                in results["agreement"][name]["by_place"]]  # fmt: skip
        assert all(gap > 1 for place, gap in gaps if place < 0.8) and 0 < gaps[-1][1] < 1
        assert f"{results['agreement'][name]['correlation'][0]:.2f}" == "0.41"
    # "Not certain after Holm's correction", and neither is anything else of this study.
    assert {row[3] for row in judge(oracle_claims(results))} == {"cannot tell"}


def test_the_cost_of_watching_in_the_docs_is_the_measured_one():
    results = json.loads((ROOT / "figures/results/watching.json").read_text(encoding="utf-8"))
    page = (ROOT / "docs/commands.md").read_text(encoding="utf-8")
    for part, share in results["share"].items():
        assert f"{100 * share:.1f}%" in page, part


def test_selection_effects_in_the_docs_are_the_committed_ones():
    results = json.loads((ROOT / "figures/results/selection.json").read_text(encoding="utf-8"))
    page = (ROOT / "docs/how_it_was_measured.md").read_text(encoding="utf-8")
    commands = (ROOT / "docs/commands.md").read_text(encoding="utf-8")

    def percent(interval):
        return format_interval([100 * x for x in interval], 1)

    for rule in results["rules"]["1"].values():
        low, high = (f"{100 * x:.1f}" for x in rule["ratio"]["spread"])
        cells = [format_interval(share_interval(rule["pass"][x])) for x in ("reported", "value")]
        cells += [percent(rule[metric]["share"]) for metric in ("pass", "ratio")]
        cells += [f"{low} to {high}"]
        assert " | ".join(cells) in page
    flattered = results["ablation"]["4"]["test"]
    shown = {f"{100 * x:.1f}" for part in ("apparent", "bias", "true") for x in flattered[part]}
    shown |= {f"{100 * x:.1f}" for x in results["problems"]["100"]["test"]}
    shown |= {f"{100 * x:.1f}" for x in results["rules"]["8"]["test"]["ratio"]["share"]}
    assert [number for number in shown if number not in page] == []
    assert "by 3.7% in Pass@1 and 4.9% in Ratio@1" in commands
    chosen = results["rules"]["1"]["test"]
    assert [f"{100 * chosen[m]['share'][0]:.1f}" for m in ("pass", "ratio")] == ["3.7", "4.9"]


def minus(rows, one, other, metric, digits, scale=1):
    """One row of Table 1 minus another within a seed, as the texts write it."""
    pairs = zip(rows[one][metric], rows[other][metric])
    return format_interval(mean_interval([scale * (a - b) for a, b in pairs]), digits)


def test_numbers_of_table1_in_the_text_are_computed_from_it(table1_results):
    page, readme = (
        (ROOT / name).read_text(encoding="utf-8") for name in ("docs/results.md", "README.md")
    )
    methods, clock = table1_results["methods"], table1_results["wall_clock"]
    iapo, start = methods["iapo"], methods["start"]

    def saved(one, other):
        interval = mean_interval([1 - a / b for a, b in zip(one, other)])
        return "{:.0f}% [{:.0f}, {:.0f}]".format(*(100 * x for x in interval))

    shorter = f"IAPO writes {saved(iapo['length@32'], methods['grpo']['length@32'])} fewer tokens"
    assert f"{shorter} than GRPO" in page and f"{shorter} than GRPO" in readme
    more_right = minus(methods, "iapo", "grpo", "pass@1", 3)
    gained = minus(methods, "iapo", "iapo_ne", "ratio@32", 1, 1000)
    mean, low, high = mean_interval(
        [b - a for a, b in zip(iapo["length@32"], methods["iapo_ne"]["length@32"])]
    )
    for text in (f"a Pass@1 that is {more_right} higher", f"IAPO has {gained} more right answers",
                 f"writes {mean:.1f} [{low:.1f}, {high:.1f}] fewer tokens",
                 f"{saved(iapo['length@32'], methods['dapo']['length@32'])} fewer than DAPO",
                 f"drops {saved(_talk(iapo), _talk(start))} of it",
                 f"{saved(clock['iapo'], clock['start'])} less time",
                 minus(methods, "iapo", "grpo_kimi", "pass@1", 3),
                 minus(methods, "iapo", "grpo_efficient", "pass@1", 3)):  # fmt: skip
        assert text in page, text
    for name in ("grpo_kimi", "grpo_efficient"):
        longer = minus(methods, "iapo", name, "length@32", 1)
        assert longer.startswith("1.9 [") and longer.removeprefix("1.9 ") in page
    lengths = {name: [round(x) for x in row["length"]] for name, row in methods.items()}
    assert "GRPO's seeds spread from {} to {} tokens and IAPO-NE's from {} to {}".format(
        *(f(lengths[name]) for name in ("grpo", "iapo_ne") for f in (min, max))
    ) in page  # fmt: skip
    assert sorted(lengths["iapo"])[0] == 30 and sorted(lengths["iapo"])[-2:] == [32, 38]
    assert sum(n < 35 for n in lengths["dapo"]) == 8
    for name in ("gfpo", "gtpo_iapo", "sgrpo"):
        assert f"({', '.join(map(str, lengths[name]))})" in page
    *first, last = map(str, lengths["gfpo_24"])
    assert f"ends at {', '.join(first)} and {last} tokens" in page
    right = [f"{p:.2f}" for p in sorted(methods["gtpo"]["pass@1"])]
    told = f"({min(lengths['gtpo'])} to {max(lengths['gtpo'])} tokens, Pass@1 {right[0]} to"
    assert f"{told} {right[-1]})" in page
    for name, text in (("gfpo_24", "tokens than GFPO"), ("gtpo_iapo", "than GTPO in the")):
        fewer = saved(iapo["length@32"], methods[name]["length@32"])
        assert f"{fewer} fewer {text}" in page
    half = {metric: max((x[metric][1] - x[metric][0]) / 2 for row in methods.values()
                        for x in row["intervals"]) for metric in ("pass@1", "length")}  # fmt: skip
    assert f"at most {half['pass@1']:.2f} wide to each side for Pass@1" in page
    assert f"and {half['length']:.1f} tokens for length" in page


def test_the_page_of_claims_follows_from_the_committed_results():
    assert report_of_files(figures=ROOT / "figures") == (ROOT / "figures/claims.md").read_text(
        encoding="utf-8"
    )


def test_statements_about_table1_agree_with_its_verdicts(table1_results):
    rows = verdicts.judge(of_table1(table1_results))
    page = (ROOT / "docs/results.md").read_text(encoding="utf-8")
    testable = sum(row[3] != "cannot be tested" for row in rows)
    assert all("Pass@32" in row[0] for row in rows if row[3] == "cannot be tested")
    told = f"Corrected for the {testable} claims on the table that can be tested (Holm)"
    assert f'{told}, "shorter than GRPO" stands; "a higher Ratio@32 than GRPO"' in page
    stands = [row[0] for row in rows if row[3] in ("holds", "does not hold")]
    compared = [text for text in stands if text.startswith("IAPO")]
    assert compared == [
        "IAPO writes fewer tokens than GRPO (share of Length@32 saved)",
        "IAPO writes fewer tokens than GTPO (share of Length@32 saved)",
        "IAPO has a higher Ratio@32 than GTPO (factor)",
    ]
    assert "only GTPO as published is told apart" in page


def test_the_ablation_in_the_texts_is_the_committed_result(table1_results):
    page = (ROOT / "docs/results.md").read_text(encoding="utf-8")
    part = page.split("## What each part is worth (Fig. 5)")[1].split("\n## ")[0]
    rows = table1_results["methods"]

    mean, interval = minus(rows, "iapo", "iapo_ni", "length@32", 1).split(" ", 1)
    assert f"IAPO minus IAPO-NI is {mean} tokens {interval}" in part
    for one, other, told in (
        ("iapo", "iapo_ne", "has {} more right answers"),
        ("iapo", "iapo_ni", "and {} right answers per 1,000 tokens"),
        ("iapo_ne", "iapo_ni", "here the difference is {}"),
        ("iapo", "iapo_pmi", "Ratio@32 is {} lower than IAPO's"),
    ):
        assert told.format(minus(rows, one, other, "ratio@32", 1, 1000)) in part
    short = [sum(x < 40 for x in rows[name]["length@32"]) for name in ("iapo", "iapo_ni")]
    assert short == [10, 3] and "ten of ten against three of five" in part
    by_chance = math.comb(5, 2) / math.comb(15, 2)  # both long runs fall to IAPO-NI
    assert 0.09 < by_chance < 0.11 and "chance would make one time in ten" in part
    lengths = [f"{x:.0f}" for x in sorted(rows["iapo_ni"]["length@32"])[-2:]]
    assert f"two stay at {' and '.join(lengths)}" in part


def test_the_rows_that_decide_have_ten_seeds(table1_results):
    rows = table1_results["methods"]
    assert set(rows) <= {START, *ROWS} and set(rows) >= {START, *DECIDING}
    for name, result in rows.items():
        for k in (1, 2, 4, 8, 16, 32):
            for metric in ("pass", "length", "ratio"):
                assert len(result[f"{metric}@{k}"]) == (10 if name in DECIDING else 5)
    assert table1_results["config"]["evaluation"]["problems"] == 500


def test_table_of_the_verifier_is_the_committed_result():
    benchmark = load_script(ROOT / "benchmarks/rewards.py")
    results = json.loads((ROOT / "figures/results/rewards.json").read_text(encoding="utf-8"))
    docs = (ROOT / "docs/data.md").read_text(encoding="utf-8")
    assert benchmark.verdict_table(results) in docs
    assert results["references"] == 500 and f"{results['pairs']:,} pairs" in docs
    assert f"agree on {results['agreement']:.3f}" in docs
    for way in ("ours", "strings"):
        assert f"{results['accuracy'][way]:.3f}" in docs
    # The counts of the table follow from the present judges.
    assert benchmark.by_strings("\\dfrac12", "\\frac{1}{2}") and benchmark.by_strings("50\\%", "50")
    assert not benchmark.by_strings("72.0", "72")


def test_the_speed_of_a_real_model_in_the_docs_is_the_committed_one():
    results = json.loads((ROOT / "figures/results/real_speed.json").read_text(encoding="utf-8"))
    docs = (ROOT / "docs/real_models.md").read_text(encoding="utf-8")
    (part,) = (p for p in docs.split("\n## ") if p.startswith("Speed on a CPU"))
    rows = [line.split(" | ") for line in part.splitlines() if line.startswith("| ")][1:]
    limits = load_script(ROOT / "benchmarks/real_speed.py").LIMITS
    named = [name for name in results if "_over_" in name]
    assert [row[1] for row in rows] == [f"{results[name]:.2f}" for name in named]
    goals = [f"at most {limits[name]:g} |" if name in limits else "|" for name in named]
    assert [row[2] for row in rows] == goals
    assert {name for name in limits if results[name] > limits[name]} == {
        "iapo_sentence_step_over_grpo_step"
    } and f"{results['iapo_sentence_step_over_grpo_step']:.3f}" in part  # the miss is told
    seconds = results["phases"]["grpo"]
    told = (f"{seconds['seconds_sampling']:.0f} seconds", f"update {seconds['seconds_update']:.0f}")
    asked = results["phases"]["iapo_sentence"]["seconds_information"]
    assert all(x in part for x in (*told, f"adds {asked:.1f} seconds"))
    assert f"turns {results['settings']['turns']}" in part


def test_the_page_on_trl_has_the_committed_numbers():
    results = json.loads((ROOT / "figures/results/trl.json").read_text(encoding="utf-8"))
    docs = (ROOT / "docs/scaleout.md").read_text(encoding="utf-8")
    assert f"**{results['our_step_over_trl_step']:.2f} times**" in docs
    assert results["our_step_over_trl_step"] <= 0.5
    assert results["max_loss_difference"] <= 1e-5
    rules = results["rules"]
    assert set(rules) == {"trl", *RECIPES}
    base = statistics.median(rules.pop("trl")["seconds"])
    for name, row in rules.items():
        assert row["loss_difference"] < 1e-6 and row["gradient_difference"] < 1e-3
        ratio = statistics.median(row["seconds"]) / base
        assert (
            f"| {RECIPES[name].label} | {ratio:.2f} | {row['advantage_difference']:.0e} |" in docs
        )
    state = json.loads((ROOT / "figures/results/trl_run.json").read_text(encoding="utf-8"))
    rows = [row for row in state["log_history"] if "loss" in row]
    for name, digits in (("completions/mean_length", 1), ("reward", 2)):
        first, last = (sum(r[name] for r in x) / 5 for x in (rows[:5], rows[-5:]))
        assert f"from {first:.{digits}f} to {last:.{digits}f}" in docs


def test_estimator_results_hold_what_they_promise(estimator):
    assert 0 < estimator["max_abs_error_nats"] <= 1e-4
    for setting in ("tiny", "qwen05b"):
        for ratio in (
            "packed_over_cached_time",
            "packed_over_cached_memory",
            "packed_over_forward_time",
            "iapo_step_over_grpo_step",
        ):
            assert estimator[setting][ratio] > 0
    for policy in POLICIES:
        for name in ESTIMATORS:
            value, low, high = estimator["auc"][policy][name]
            assert 0 <= low <= value <= high <= 1


def test_full_result_has_five_seeds_and_every_metric(full):
    assert len(full["seeds"]) == 5
    for method in ("start", "grpo", "iapo"):
        for metric in ("length", "pass@1", "pass@8", "ratio@8"):
            values = full["methods"][method][metric]
            assert len(values) == 5 and all(v > 0 for v in values)


PAGES = ["README.md", "figures/claims.md", "figures/recipe_search.md", "notebooks/README.md"]
PAGES += [f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md")]
OURS = r"https://(?:github\.com/iapo-mini/iapo-mini/blob|raw\.githubusercontent\.com/[^/]+/[^/]+)/main/"


@pytest.mark.parametrize("page", PAGES)
def test_links_of_every_page_exist(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    for target, anchor in re.findall(r"\]\(([^)#\s]*)(?:#([^)\s]*))?\)", text):
        at_home = re.sub(OURS, "/", target)
        if at_home.startswith("http"):
            continue
        file = ROOT / at_home[1:] if at_home.startswith("/") else (ROOT / page).parent / at_home
        file = file if target else ROOT / page
        assert file.exists(), target
        if anchor and file.suffix == ".md":
            assert anchor in anchors(file), f"{target}#{anchor}"


def anchors(page):
    """The anchors that GitHub gives the headings of a page."""
    titles = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def test_committed_log_ends_where_the_policy_report_says():
    folder = ROOT / "iapo_mini/policies/embedded"
    last = json.loads((folder / "pretrain_log.jsonl").read_text(encoding="utf-8").splitlines()[-1])
    policy = json.loads((ROOT / "figures/results/policy.json").read_text(encoding="utf-8"))
    assert policy["train_minutes"] == last["minutes"] <= 60


@pytest.mark.parametrize("name", ["embedded", "embedded_calibrated", "embedded_uncalibrated"])
def test_shipped_policies_are_small_and_hold_no_pickle(name):
    files = list((ROOT / "iapo_mini/policies" / name).iterdir())
    assert sum(f.stat().st_size for f in files) < 12e6
    assert not [f for f in files if f.suffix in {".bin", ".pt", ".pth", ".pkl"}]


def test_notebooks_keep_their_outputs_and_stay_small():
    notebooks = sorted((ROOT / "notebooks").glob("*.ipynb"))
    assert notebooks
    for path in notebooks:
        # Every picture is there twice: as HTML with its alt text, and as a PNG alone.
        assert path.stat().st_size < 2_000_000
        cells = [
            c
            for c in json.loads(path.read_text(encoding="utf-8"))["cells"]
            if c["cell_type"] == "code"
        ]
        assert all(c["execution_count"] for c in cells), f"{path.name} was not run"
        assert [c["execution_count"] for c in cells] == list(range(1, len(cells) + 1))
        assert not [o for c in cells for o in c["outputs"] if o["output_type"] == "error"]
