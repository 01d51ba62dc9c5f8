"""The commands ``iapo-mini lab ...``, which remake the committed tables, figures and claims."""

from __future__ import annotations

import argparse
import importlib
from pathlib import Path

from iapo_mini.errors import MOST_PROBLEMS, MOST_THREADS, check_number
from iapo_mini.options import number, whole
from iapo_mini.policies import EMBEDDED

EXPERIMENTS = {
    "tune": "trials of every method on the tune stream, which choose the settings of table1",
    "table1": "Table 1: all methods, 5 to 10 seeds; Pass@k, Length@k, Ratio@k, wall clock, Fig. 7",
    "ablation": "Fig. 5: IAPO without parts of its advantage, from the runs of table1",
    "sweeps": "Fig. 6: IAPO with other weights alpha and beta; three seeds",
    "departures": "departures of the released code from the paper, one at a time; three seeds",
    "controls": "IAPO with other informativeness, and with other times of payment; 3 to 5 seeds",
    "choices": "how much each term favours computing over talk at sentence starts; no training",
    "oracle": "s and value from real continuations: agreement with early exits, and training",
    "selection": "bias of a number by which the checkpoint was chosen; six runs of IAPO",
    "starts": "GRPO, IAPO-NE and IAPO from more and less calibrated policies; five seeds",
    "early-exit": "accuracy against tokens when sure thoughts are cut at inference; three seeds",
    "claims": "every claim of the paper against our results; makes missing runs, also of theory",
}
"""Experiment -> description. Each is a function in the module of its name (tune: in tuning; a
hyphen stands for an underscore)."""


def add_lab(commands: argparse._SubParsersAction) -> None:
    """Add ``lab`` and its commands to the command line."""
    lab = commands.add_parser("lab", help="remake the paper's tables, figures and claims")
    parts = lab.add_subparsers(dest="experiment", required=True, metavar="EXPERIMENT")
    for name, sentence in EXPERIMENTS.items():
        part = parts.add_parser(name, help=sentence.split(";")[0], description=sentence)
        part.set_defaults(run_command=_experiment)
        part.add_argument(
            "--preset", default="full", help="size: full, or quick for a smoke test (%(default)s)"
        )
        part.add_argument("--out", default="runs/science", help="folder of runs (%(default)s)")
        part.add_argument("--figures", default="figures", help="folder of figures (%(default)s)")
        part.add_argument(
            "--parallel", type=whole, help="number of processes at a time (default: one per core)"
        )
        if name == "early-exit":
            _add_early_exit(part)
    theory = parts.add_parser("theory", help="compare the paper's theory with measurements")
    theory.set_defaults(run_command=_theory)
    theory.add_argument(
        "--preset", default="full", help="size: quick (seconds) or full (five seeds; %(default)s)"
    )
    _add_real(parts)
    _add_released(parts)
    _add_real_studies(parts)
    figures = parts.add_parser("figures", help="remake the figures and results of a study")
    figures.set_defaults(run_command=_figures)
    figures.add_argument(
        "study", choices=("estimator", "all"),
        help="estimator: compare every estimator with the known roles and the exact posterior; the "
        "speed figures show the measurements of benchmarks/estimator.py. all: draw again every "
        "figure that needs only its results file; nothing is measured",
    )  # fmt: skip
    figures.add_argument("--stories", type=whole, default=300, help="test stories (%(default)s)")
    for part in (theory, figures):
        part.add_argument("--figures", default="figures", help="folder of figures (%(default)s)")
        part.add_argument("--threads", type=whole, default=2, help="CPU threads (%(default)s)")


def _add_early_exit(part: argparse.ArgumentParser) -> None:
    add = part.add_argument
    add("--adapter", default="", help="an adapter trained by IAPO (default: train three seeds)")
    add("--untrained", action="store_true", help="leave the trained policies out")
    add("--model", default="", help="another model to run as well, folder or hub id (slow)")
    add("--data-file", default="", help="its problems, in GSM8K's form (default: stories)")


def _add_real(parts: argparse._SubParsersAction) -> None:
    real = parts.add_parser(
        "real", help="measure the estimators on a pretrained model",
        description="measure all estimators on worked solutions and the model's own completions; "
        "every measured chain is kept, so a stopped study goes on where it was",
    )  # fmt: skip
    real.set_defaults(run_command=_real)
    real.add_argument("--model", required=True, help="folder or hub id of a pretrained model")
    real.add_argument("--data-file", required=True, help="problems in GSM8K's form, with solutions")
    real.add_argument(
        "--problems", type=whole, default=100, help="chains of each set (%(default)s)"
    )
    real.add_argument(
        "--weights", default="as published", help="what the weights are (%(default)s)"
    )
    real.add_argument("--name", default="", help="ending of the results file's name (none)")
    real.add_argument("--out", default="runs/real", help="folder of measured chains (%(default)s)")
    real.add_argument(
        "--so-far", dest="unfinished", action="store_true",
        help="measure nothing; tell what the chains of an unfinished study say",
    )  # fmt: skip
    real.add_argument("--figures", default="figures", help="folder of results (%(default)s)")
    real.add_argument("--threads", type=whole, default=2, help="CPU threads (%(default)s)")


def _add_released(parts: argparse._SubParsersAction) -> None:
    released = parts.add_parser(
        "released", help="evaluate the authors' checkpoints on whole test sets",
        description="evaluate base models and the authors' checkpoints on whole test sets, beside "
        "the 15 problems of the authors' evaluation",
    )  # fmt: skip
    released.set_defaults(run_command=_released)
    released.add_argument(
        "--sizes", nargs="+", default=["0.5B"], help="0.5B, 1.5B or 7B, several (0.5B)"
    )
    released.add_argument(
        "--repository", default="jonathanhe123/iapo",
        help="hub id or folder with a subfolder for each checkpoint (%(default)s)",
    )  # fmt: skip
    released.add_argument(
        "--base", default="Qwen/Qwen2.5-{size}-Instruct", help="base models (%(default)s)"
    )
    released.add_argument(
        "--data-files", nargs=2, default=["", ""], metavar=("GSM8K", "MATH500"),
        help="local files of the test problems (default: from the hub)",
    )  # fmt: skip
    released.add_argument(
        "--num-generations", type=whole, default=8, help="completions per problem (%(default)s)"
    )
    released.add_argument(
        "--max-completion-length", type=whole, default=512, help="tokens (%(default)s)"
    )
    released.add_argument("--batch-size", type=whole, default=64, help="(%(default)s)")
    released.add_argument(
        "--out", default="runs/released", help="folder of completions (%(default)s)"
    )
    released.add_argument("--device", default="auto", help="cpu, cuda or cuda:1 (%(default)s)")
    released.add_argument("--figures", default="figures", help="folder of results (%(default)s)")


def _add_real_studies(parts: argparse._SubParsersAction) -> None:
    """Add the studies that calibrate and train a real model."""
    calibration = parts.add_parser(
        "real-calibration", help="what calibration repairs in a real model, and what it costs"
    )
    calibration.add_argument(
        "--data-file", required=True,
        help="worked solutions in GSM8K's format (.jsonl, .json or .parquet)",
    )  # fmt: skip
    calibration.add_argument("--threads", type=whole, default=2, help="CPU threads (%(default)s)")
    training = parts.add_parser(
        "real-training", help="train a real model with four methods, after a warm start"
    )
    training.add_argument(
        "--parallel", type=whole, help="number of processes at a time (default: one per core)"
    )
    training.add_argument(
        "--seeds", type=whole, default=0, help="number of seeds (default: that of the preset)"
    )
    training.add_argument(
        "--learning-rate", type=number, default=3e-4, help="of every run (%(default)s)"
    )
    training.add_argument(
        "--so-far", dest="unfinished", action="store_true",
        help="make nothing; tell what the runs of an unfinished study say",
    )  # fmt: skip
    for part in (calibration, training):
        part.set_defaults(run_command=_real_study)
        part.add_argument("--model", default=EMBEDDED, help="model folder or hub id (%(default)s)")
        sizes = "full, card (longer solutions, for a GPU)" if part is training else "full"
        part.add_argument(
            "--preset", default="full",
            help=f"size: {sizes}, or quick for a smoke test (%(default)s)",
        )  # fmt: skip
        part.add_argument("--out", default="runs/science", help="folder of the work (%(default)s)")
        part.add_argument("--figures", default="figures", help="folder of results (%(default)s)")


def _real_study(args: argparse.Namespace) -> None:
    """Make a study of a real model; print its table and the path of its file."""
    from iapo_mini.hub import check_in_reach
    from iapo_mini.lab.results import results_path

    name = args.experiment.replace("-", "_")
    check_in_reach(args.model)
    module = importlib.import_module(f"iapo_mini.lab.{name}")
    options = {
        option: value for option, value in vars(args).items()
        if option not in ("command", "experiment", "preset", "run_command")
    }  # fmt: skip
    results = getattr(module, name)(args.preset, **options)
    print(getattr(module, f"{name}_table")(results) + "\n")
    name += "_so_far" if options.get("unfinished") else ""
    print(f"Every number: {results_path(Path(args.figures), name, args.preset)}")


def _experiment(args: argparse.Namespace) -> None:
    """Make the missing runs of an experiment; print its table and the paths of its files."""
    from iapo_mini.lab.results import comparison_table, results_path

    experiment = args.experiment.replace("-", "_")
    file = "tuning" if experiment == "tune" else experiment
    module = importlib.import_module(f"iapo_mini.lab.{file}")
    names = (
        "preset", "out", "figures", "parallel", "adapter", "untrained", "model", "data_file"
    )  # fmt: skip
    options = {name: getattr(args, name) for name in names if name in args}
    results = getattr(module, experiment)(**options)
    if experiment == "claims":
        print(results)
        return
    if experiment == "table1":
        for metric in ("pass", "length", "ratio"):
            print(comparison_table(results, metric) + "\n")
    elif hasattr(module, f"{experiment}_table"):
        print(getattr(module, f"{experiment}_table")(results) + "\n")
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


def _real(args: argparse.Namespace) -> None:
    import torch

    from iapo_mini.lab.real import real, real_table

    check_number("threads", args.threads, 1, MOST_THREADS)
    torch.set_num_threads(args.threads)
    names = ("problems", "weights", "name", "out", "unfinished")
    options = {part: getattr(args, part) for part in names}
    results = real(args.model, args.data_file, figures=args.figures, **options)
    print(real_table(results))
    print(f"Every number: {Path(args.figures) / 'results'}")


def _released(args: argparse.Namespace) -> None:
    from iapo_mini.lab.released import released, released_table

    names = ("repository", "base", "data_files", "num_generations", "max_completion_length",
             "batch_size", "out", "figures", "device")  # fmt: skip
    results = released(args.sizes, **{name: getattr(args, name) for name in names})
    print(released_table(results))
    print(f"Every number: {Path(args.figures) / 'results' / 'released.json'}")


def _figures(args: argparse.Namespace) -> None:
    import torch

    from iapo_mini.files import writable_folder
    from iapo_mini.lab.estimators import estimator_study, study_table
    from iapo_mini.lab.redraw import redraw

    check_number("stories", args.stories, 2, MOST_PROBLEMS)
    check_number("threads", args.threads, 1, MOST_THREADS)
    writable_folder(Path(args.figures) / "results", "figures")
    torch.set_num_threads(args.threads)
    if args.study == "all":
        print("\n".join(map(str, redraw(args.figures))))
        return
    results = estimator_study(args.figures, args.stories)
    print(study_table(results))
    best = results["ceiling"]["auc"][0]
    print(f"\nThe exact posterior's own entropy drop reaches an AUC of {best:.3f}.")
    print(f"Every number: {Path(args.figures) / 'results' / 'estimator.json'}")
