"""``iapo-mini lab ...``: what remakes the committed tables, figures and claims."""

from __future__ import annotations

import argparse
import importlib
from pathlib import Path

from iapo_mini.errors import MOST_PROBLEMS, MOST_THREADS, check_number
from iapo_mini.options import whole

EXPERIMENTS = {
    "tune": "three trials of every method on the tune stream; the choice is what table1 trains",
    "table1": "Table 1: all methods, five seeds; Pass@k, Length@k, Ratio@k, wall clock, Fig. 7",
    "ablation": "Fig. 5: IAPO without parts of its advantage; from the runs of table1",
    "sweeps": "Fig. 6: IAPO at other weights alpha and beta; three seeds",
    "departures": "the authors' departures from the paper, one at a time; three seeds",
    "controls": "IAPO with its informativeness replaced, under both means; when to pay; five seeds",
    "choices": "what each term pays computing over talk where a sentence is opened; no training",
    "oracle": "s and value by real continuations: how early exits agree, training with both",
    "selection": "how far a number is too good if a checkpoint was chosen by it; six runs of IAPO",
    "starts": "GRPO, IAPO-NE and IAPO from policies that are more and less calibrated; five seeds",
    "claims": "every claim of the paper against our results; runs what is missing, theory included",
}
"""Experiment -> what it is. Each is a function of the module of its name (tune: of tuning)."""


def add_lab(commands: argparse._SubParsersAction) -> None:
    """Add ``lab`` and its commands to those of the command line."""
    lab = commands.add_parser("lab", help="remake the paper's tables, figures and claims")
    parts = lab.add_subparsers(dest="experiment", required=True, metavar="EXPERIMENT")
    for name, sentence in EXPERIMENTS.items():
        part = parts.add_parser(name, help=sentence.split(";")[0], description=sentence)
        part.set_defaults(run_command=_experiment)
        part.add_argument(
            "--preset", default="full", help="size: full, or quick: a smoke test (%(default)s)"
        )
        part.add_argument("--out", default="runs/science", help="folder of runs (%(default)s)")
        part.add_argument("--figures", default="figures", help="of figures (%(default)s)")
        part.add_argument(
            "--parallel", type=whole, help="processes at a time (default: one per core)"
        )
    theory = parts.add_parser("theory", help="the paper's theory held against measurement")
    theory.set_defaults(run_command=_theory)
    theory.add_argument(
        "--preset", default="full", help="size: quick (seconds) or full (five seeds; %(default)s)"
    )
    figures = parts.add_parser("figures", help="remake the figures and results of a study")
    figures.set_defaults(run_command=_figures)
    figures.add_argument(
        "study", choices=("estimator",),
        help="estimator: every estimator against the known roles and the exact posterior; the "
        "speed figures are drawn from what benchmarks/estimator.py has measured",
    )  # fmt: skip
    figures.add_argument("--stories", type=whole, default=300, help="test stories (%(default)s)")
    for part in (theory, figures):
        part.add_argument("--figures", default="figures", help="folder of figures (%(default)s)")
        part.add_argument("--threads", type=whole, default=2, help="CPU threads (%(default)s)")


def _experiment(args: argparse.Namespace) -> None:
    """Run what is missing of an experiment, print its table and where everything is."""
    from iapo_mini.lab.results import comparison_table, results_path

    file = "tuning" if args.experiment == "tune" else args.experiment
    module = importlib.import_module(f"iapo_mini.lab.{file}")
    options = {name: getattr(args, name) for name in ("preset", "out", "figures", "parallel")}
    results = getattr(module, args.experiment)(**options)
    if args.experiment == "claims":
        print(results)
        return
    if args.experiment == "table1":
        for metric in ("pass", "length", "ratio"):
            print(comparison_table(results, metric) + "\n")
    elif hasattr(module, f"{args.experiment}_table"):
        print(getattr(module, f"{args.experiment}_table")(results) + "\n")
    print(f"Every number: {results_path(Path(args.figures), file, args.preset)}")
    print(f"Figures: {Path(args.figures)}")


def _theory(args: argparse.Namespace) -> None:
    import torch

    from iapo_mini.lab.results import results_path
    from iapo_mini.lab.theory import summary, theory

    check_number("threads", args.threads, 1, MOST_THREADS)
    torch.set_num_threads(args.threads)
    print(summary(theory(args.preset, args.figures)))
    where = Path(args.figures)
    print(f"\nEvery number: {results_path(where, 'theory', args.preset)}")
    print(f"Figures: {where / 'theory_*.png'}")


def _figures(args: argparse.Namespace) -> None:
    import torch

    from iapo_mini.files import writable_folder
    from iapo_mini.lab.estimators import estimator_study, study_table

    check_number("stories", args.stories, 2, MOST_PROBLEMS)
    check_number("threads", args.threads, 1, MOST_THREADS)
    writable_folder(Path(args.figures) / "results", "figures")
    torch.set_num_threads(args.threads)
    results = estimator_study(args.figures, args.stories)
    print(study_table(results))
    best = results["ceiling"]["auc"][0]
    print(f"\nThe exact posterior's own entropy drop reaches an AUC of {best:.3f}.")
    print(f"Every number: {Path(args.figures) / 'results' / 'estimator.json'}")
