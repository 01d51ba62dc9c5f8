"""Command line: ``iapo-mini compare | train | evaluate | explain | table1 | claims | ...``."""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import itertools
import json
import os
import re
import sys
import typing
from pathlib import Path

# Read by the libraries when they are imported, hence before them.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

EXPERIMENTS = {
    "tune": "three trials of every method on the tune stream; the choice is what table1 trains",
    "table1": "Table 1: all methods, five seeds; Pass@k, Length@k, Ratio@k, wall clock, Fig. 7",
    "ablation": "Fig. 5: IAPO without parts of its advantage; from the runs of table1",
    "sweeps": "Fig. 6: IAPO at other weights alpha and beta; three seeds",
    "departures": "the authors' departures from the paper, one at a time; three seeds",
    "starts": "GRPO, IAPO-NE and IAPO from policies that are more and less calibrated; five seeds",
    "claims": "every claim of the paper against our results; runs what is missing, theory included",
}

MODEL_HELP = "'embedded', a model folder, or a hub id"


def _field_help(cls) -> dict[str, str]:
    """Field name -> sentence, from the ``Attributes:`` block of a dataclass docstring."""
    text = cls.__doc__.split("Attributes:")[1]
    found = re.findall(r"^ {8}([\w, ]+): (.*(?:\n {10,}.*)*)", text, re.MULTILINE)
    return {
        name.strip(): re.sub(r"\s+", " ", sentence).replace("`", "").replace("%", "%%")
        for names, sentence in found
        for name in names.split(",")
    }


def _number_or_word(text: str) -> int | str:
    return int(text) if text.lstrip("-").isdigit() else text


def _add_train_options(parser: argparse.ArgumentParser) -> None:
    """One option for each field of TrainConfig; one that is not given leaves no trace."""
    from iapo_mini.config import TrainConfig

    sentences, types = _field_help(TrainConfig), typing.get_type_hints(TrainConfig)
    for field in dataclasses.fields(TrainConfig):
        kind = types[field.name]
        option, shown = "--" + field.name.replace("_", "-"), f" (default: {field.default})"
        settings = {"default": argparse.SUPPRESS, "help": sentences[field.name] + shown}
        if kind is bool:
            parser.add_argument(option, action=argparse.BooleanOptionalAction, **settings)
        else:
            if kind == int | str:
                kind, name = _number_or_word, "INT|WORD"
            else:
                kind = float if kind not in (int, str) else kind
                name = kind.__name__.upper()
            parser.add_argument(option, type=kind, metavar=name, **settings)


def _add_policy_options(parser: argparse.ArgumentParser) -> None:
    """Which policy a command looks at."""
    parser.add_argument("--model", default="embedded", help=MODEL_HELP + " (%(default)s)")
    parser.add_argument("--adapter", help="folder of a trained adapter (PEFT format)")
    parser.add_argument(
        "--four-bit", action="store_true", help="load the weights in 4 bits (NF4; bitsandbytes)"
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="iapo-mini",
        description="Information-aware policy optimization (IAPO) against GRPO, end to end.",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    compare = commands.add_parser("compare", help="train GRPO and IAPO from one start and compare")
    compare.add_argument(
        "--preset", default="demo",
        help="quick (seconds), demo (three seeds, under ten minutes on two cores), full (five "
        "seeds, the README's table) or long (three seeds, 60 steps); default: %(default)s",
    )  # fmt: skip
    compare.add_argument("--out", default="runs/compare", help="folder of the runs (%(default)s)")
    compare.add_argument("--figures", default="figures", help="folder of figures (%(default)s)")
    compare.add_argument("--parallel", type=int, help="processes at a time (default: one per core)")

    for name, sentence in EXPERIMENTS.items():
        science = commands.add_parser(name, help=sentence.split(";")[0])
        science.description = sentence
        science.add_argument(
            "--preset", default="full", help="full, or quick: a smoke test (%(default)s)"
        )
        science.add_argument("--out", default="runs/science", help="folder of runs (%(default)s)")
        science.add_argument("--figures", default="figures", help="of figures (%(default)s)")
        science.add_argument(
            "--parallel", type=int, help="processes at a time (default: one per core)"
        )

    train = commands.add_parser("train", help="train one policy")
    train.add_argument("--out", required=True, help="folder of the run")
    train.add_argument("--resume", action="store_true", help="go on from the newest checkpoint")
    train.add_argument(
        "--methods", help="Python module with methods of your own (docs/methods.md; default: none)"
    )
    preset_help = "settings for a real model on one card: t4, 12gb or 24gb; options given beside "
    preset_help += "it take precedence (default: none, the settings below)"
    train.add_argument("--preset", help=preset_help)
    _add_train_options(train)

    plan = commands.add_parser("plan", help="predict the memory of a training run on a card")
    plan.add_argument("--gpu", default="12gb", help="t4, or a size such as 12gb (%(default)s)")
    plan.add_argument("--shape", help="qwen2.5-0.5b, -1.5b, -3b or -7b, in place of --model")
    plan.add_argument("--prompt", type=int, default=200, help="prompt tokens (%(default)s)")
    plan.add_argument("--completion", type=int, help="the same as --max-completion-length")
    plan.add_argument("--preset", help=preset_help)
    _add_train_options(plan)

    diagnose = commands.add_parser("diagnose", help="is a run healthy, and what to do if it is not")
    diagnose.add_argument("run", help="folder of a training run, finished or not")
    diagnose.add_argument("--last", type=int, default=10, help="steps to average (%(default)s)")

    evaluate = commands.add_parser("evaluate", help="Pass@k, Length@k and Ratio@k of a policy")
    _add_policy_options(evaluate)
    evaluate.add_argument(
        "--data", default="stories",
        help="stories, gsm8k, math500, dapo_math or commonsense_qa (%(default)s)",
    )  # fmt: skip
    evaluate.add_argument(
        "--data-file", default="", help=".jsonl, .json or .parquet file (default: ask the hub)"
    )
    evaluate.add_argument(
        "--split", default="test", help="train, tune, test, or all of a local file (%(default)s)"
    )
    evaluate.add_argument(
        "--problems", type=int, default=200, help="the first so many problems (%(default)s)"
    )
    evaluate.add_argument(
        "--k", type=int, nargs="+", default=[1, 2, 4, 8],
        help="values of k; the largest is the number of completions per problem (1 2 4 8)",
    )  # fmt: skip
    evaluate.add_argument(
        "--max-completion-length", type=int, default=224, help="tokens (%(default)s)"
    )
    evaluate.add_argument(
        "--batch-size", type=int, default=128, help="completions sampled at once (%(default)s)"
    )
    evaluate.add_argument("--temperature", type=float, default=1.0, help="sampling (%(default)s)")
    evaluate.add_argument("--seed", type=int, default=0, help="sampling seed (%(default)s)")
    evaluate.add_argument(
        "--out",
        help="results JSON; completions go beside it as JSONL, and the same command goes on from "
        "them (default: a name in runs/evaluate that follows from the settings)",
    )
    evaluate.add_argument("--threads", type=int, default=2, help="CPU threads (%(default)s)")

    explain = commands.add_parser("explain", help="show which tokens of an answer inform")
    explain.add_argument("story", help="the question, in quotes; '-' draws a test story")
    _add_policy_options(explain)
    explain.add_argument("--temperature", type=float, default=1.0, help="sampling (%(default)s)")
    explain.add_argument("--seed", type=int, default=0, help="sampling seed (%(default)s)")
    explain.add_argument("--out", default="figures/explain.png", help="heat map (%(default)s)")
    explain.add_argument(
        "--color", choices=("auto", "always", "never"), default="auto",
        help="colour the terminal; 'never' prints nats beside the tokens (%(default)s)",
    )  # fmt: skip

    export = commands.add_parser("export", help="merge an adapter into its model, in one folder")
    export.add_argument("--model", help=MODEL_HELP + " (default: that of the adapter's run)")
    export.add_argument("--adapter", required=True, help="folder of a trained adapter: RUN/final")
    export.add_argument("--out", required=True, help="new folder: safetensors and tokenizer")
    export.add_argument(
        "--four-bit", action=argparse.BooleanOptionalAction,
        help="merge into the 4-bit weights that the adapter was trained on, dequantised "
        "(default: as in the adapter's run)",
    )  # fmt: skip

    figures = commands.add_parser("figures", help="remake the figures and results of a study")
    figures.add_argument(
        "study", choices=("estimator",),
        help="estimator: every estimator against the known roles and the exact posterior; the "
        "speed figures are drawn from what benchmarks/estimator.py has measured",
    )  # fmt: skip
    figures.add_argument("--stories", type=int, default=300, help="test stories (%(default)s)")
    figures.add_argument("--figures", default="figures", help="folder of figures (%(default)s)")
    figures.add_argument("--threads", type=int, default=2, help="CPU threads (%(default)s)")

    theory = commands.add_parser("theory", help="the paper's theory held against measurement")
    theory.add_argument(
        "--preset", default="full", help="quick (seconds) or full (five seeds; %(default)s)"
    )
    theory.add_argument("--figures", default="figures", help="folder of figures (%(default)s)")
    theory.add_argument("--threads", type=int, default=2, help="CPU threads (%(default)s)")
    return parser


def _compare(args: argparse.Namespace) -> None:
    from iapo_mini.lab.compare import compare
    from iapo_mini.lab.results import comparison_table

    results = compare(args.preset, out=args.out, figures=args.figures, parallel=args.parallel)
    print(comparison_table(results))
    over = "seeds" if len(results["seeds"]) > 1 else "problems"
    problems = results["config"]["evaluation"]["problems"]
    print(f"\nMean and 95% interval over {over}; {problems} test stories, "
          f"{len(results['seeds'])} training seed(s).")  # fmt: skip
    where = Path(args.figures)
    print(f"Every number: {where / 'results' / f'compare_{args.preset}.json'}")
    for name in ("", "_training", "_roles"):
        print(f"Figure: {where / f'compare_{args.preset}{name}.png'}")
    best = Path(args.out) / args.preset / f"iapo-{results['seeds'][0]}" / "train" / "final"
    print(f"Look at tokens: iapo-mini explain - --adapter {best}")


def _experiment(args: argparse.Namespace) -> None:
    """Table 1, its tuning, Fig. 5 and 6, the departures, the claims: run what is missing, tell."""
    from importlib import import_module

    from iapo_mini.lab.results import comparison_table, results_path

    options = {name: getattr(args, name) for name in ("preset", "out", "figures", "parallel")}
    if args.command == "claims":
        from iapo_mini.lab.claims import claims

        print(claims(**options))
        return
    if args.command == "departures":
        from iapo_mini.lab.departures import departures, departures_table

        results = departures(**options)
        print(departures_table(results) + "\n")
    elif args.command == "starts":
        from iapo_mini.lab.starts import starts, starts_table

        results = starts(**options)
        print(starts_table(results) + "\n")
    else:
        home = "tuning" if args.command == "tune" else args.command
        results = getattr(import_module(f"iapo_mini.lab.{home}"), args.command)(**options)
    if args.command == "table1":
        for metric in ("pass", "length", "ratio"):
            print(comparison_table(results, metric) + "\n")
    name = "tuning" if args.command == "tune" else args.command
    print(f"Every number: {results_path(Path(args.figures), name, args.preset)}")
    print(f"Figures: {Path(args.figures)}")


def _train_config(args: argparse.Namespace):
    """TrainConfig of the preset, if any, and the options that were given."""
    from iapo_mini.config import CARDS, TrainConfig

    if args.preset not in (None, *CARDS):
        raise ValueError(f"preset is {args.preset!r}; allowed are {', '.join(CARDS)}.")
    names = {field.name for field in dataclasses.fields(TrainConfig)}
    given = {name: value for name, value in vars(args).items() if name in names}
    return TrainConfig(**{**CARDS.get(args.preset, {}), **given})


def _train(args: argparse.Namespace) -> None:
    from iapo_mini.config import use_methods
    from iapo_mini.trainer import train

    if args.methods:
        sys.path.insert(0, "")  # modules of this folder, as with python -m
        use_methods(args.methods)
    config = _train_config(args)
    try:
        train(config, args.out, resume=args.resume)
    except KeyboardInterrupt as stopped:
        told = str(stopped) or "the same command with --resume goes on"
        raise SystemExit(f"\nInterrupted; {told}.") from None
    print(f"Trained policy: {Path(args.out) / 'final'}")


def _evaluate(args: argparse.Namespace) -> None:
    import torch

    from iapo_mini.evaluation import evaluate
    from iapo_mini.intervals import format_interval
    from iapo_mini.policy import load_policy
    from iapo_mini.problems.datasets import check_data, load_problems
    from iapo_mini.problems.stories import stories
    from iapo_mini.run_folder import versions, writable_folder, write_json

    for name in ("problems", "max_completion_length", "batch_size", "threads"):
        if getattr(args, name) < 1:
            raise ValueError(f"{name} is {getattr(args, name)}; allowed are 1 and above.")
    check_data(args.data, args.split, args.data_file)
    if args.data == "stories":
        problems = list(itertools.islice(stories(args.split), args.problems))
    else:
        problems = load_problems(args.data, args.split, args.data_file)
    found, problems = len(problems), problems[: args.problems]
    out = Path(args.out or f"runs/evaluate/{args.data}-{args.split}-{_digest(args)}.json")
    if out.suffix == ".jsonl":
        raise ValueError(f"out is '{out}'; allowed is a .json file, the completions get .jsonl.")
    writable_folder(out.parent, "out")
    torch.set_num_threads(args.threads)
    policy = load_policy(args.model, adapter=args.adapter, lora_rank=0, four_bit=args.four_bit)
    result = evaluate(
        policy,
        problems,
        ks=args.k,
        num_generations=max(args.k),
        max_completion_length=args.max_completion_length,
        temperature=args.temperature,
        batch_size=args.batch_size,
        seed=args.seed,
        save_to=out.with_suffix(".jsonl"),
    )
    del result["completions"]  # they are in their file
    print("| k | Pass@k | Length@k (tokens) | Ratio@k (1/1000 tokens) |\n|---|---|---|---|")
    for k in args.k:
        cells = []
        for name, digits, unit in (("pass", 3, 1), ("length", 1, 1), ("ratio", 2, 1000)):
            interval = (result[f"{name}@{k}"], *result["intervals"][f"{name}@{k}"])
            cells.append(format_interval([unit * x for x in interval], digits))
        print(f"| {k} | " + " | ".join(cells) + " |")
    of = "" if args.data == "stories" else f" of {found}"
    print(f"\n{len(problems)}{of} problems of {args.data} ({args.split}); 95% intervals by "
          "bootstrap over problems.")  # fmt: skip
    write_json(out, {**result, "config": vars(args), "versions": versions()})
    print(f"Results: {out}; completions: {out.with_suffix('.jsonl')}")


def _digest(args: argparse.Namespace) -> str:
    """Eight characters that follow from all settings of a command but where results go."""
    settings = {name: value for name, value in vars(args).items() if name not in ("out", "threads")}
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:8]


def _explain(args: argparse.Namespace) -> None:
    from iapo_mini.policy import load_policy
    from iapo_mini.problems.stories import stories
    from iapo_mini.run_folder import writable_folder
    from iapo_mini.tasks import Problem
    from iapo_mini.tools.explain import explain, terminal_text

    if not args.story.strip():
        raise ValueError("story is empty; give the question as text, or '-' for a test story.")
    writable_folder(Path(args.out).parent, "out")
    problem = Problem(args.story, "")
    if args.story == "-":
        problem = next(itertools.islice(stories("test"), args.seed, None))
    policy = load_policy(args.model, adapter=args.adapter, lora_rank=0, four_bit=args.four_bit)
    explained = explain(policy, problem, temperature=args.temperature, seed=args.seed)
    color = args.color == "always" or (
        args.color == "auto" and sys.stdout.isatty() and "NO_COLOR" not in os.environ
    )
    print(problem.question + (f" (answer: {problem.answer})" if problem.answer else "") + "\n")
    print(terminal_text(explained, color))
    print(f"\nAnswer entropy before reasoning {explained.entropies[0]:.2f} nats, at the end "
          f"{explained.entropies[-1]:.2f} nats; {len(explained.tokens)} tokens.")  # fmt: skip
    explained.figure().savefig(args.out, dpi=150)
    print(f"Heat map: {args.out}")


def _plan(args: argparse.Namespace) -> None:
    from iapo_mini.tools.planner import GB, SHAPES, card_gb, comparison_table, lower, plan, shape

    if args.completion is not None:
        args.max_completion_length = args.completion
    settings, gb = _train_config(args), card_gb(args.gpu)
    if args.shape not in (None, *SHAPES):
        raise ValueError(f"shape is {args.shape!r}; allowed are {', '.join(SHAPES)}.")
    config = shape(args.shape or settings.model)
    planned = plan(config, settings, args.prompt)
    print(comparison_table({args.shape or settings.model: planned}))
    if planned.total <= gb * GB:
        print(f"\nFits into {gb:g} GB; {gb - planned.total / GB:.1f} GB are left.")
        return
    print(f"\nDoes not fit into {gb:g} GB. Lower, in this order:")
    after = planned
    for change, _, after in lower(config, settings, args.prompt, gb * GB):
        print(f"  {change}: {after.total / GB:.1f} GB")
    if after.total > gb * GB:
        print("Even so it does not fit; take a smaller model or a larger card.")


def _diagnose(args: argparse.Namespace) -> None:
    from iapo_mini.tools.diagnose import diagnose, report

    print(report(diagnose(args.run, args.last)))


def _export(args: argparse.Namespace) -> None:
    from iapo_mini.policy import load_policy
    from iapo_mini.run_folder import writable_folder

    out = Path(args.out)
    writable_folder(out, "out")
    if any(out.iterdir()):
        raise ValueError(f"out is '{out}', which is not empty; allowed is a new folder.")
    trained = {"model": "embedded", "four_bit": False}
    config = Path(args.adapter).parent / "config.json"
    if config.is_file():
        trained |= {k: v for k, v in json.loads(config.read_text()).items() if k in trained}
    policy = load_policy(
        args.model or trained["model"],
        adapter=args.adapter,
        four_bit=trained["four_bit"] if args.four_bit is None else args.four_bit,
    )
    policy.merged("cpu").save_pretrained(out)
    policy.tokenizer.save_pretrained(out)
    print(f"Merged model: {out}")


def _figures(args: argparse.Namespace) -> None:
    import torch

    from iapo_mini.lab.estimators import estimator_study, study_table
    from iapo_mini.run_folder import writable_folder

    if args.stories < 2:
        raise ValueError(f"stories is {args.stories}; allowed are 2 and above.")
    writable_folder(Path(args.figures) / "results", "figures")
    torch.set_num_threads(args.threads)
    results = estimator_study(args.figures, args.stories)
    print(study_table(results))
    best = results["ceiling"]["auc"][0]
    print(f"\nThe exact posterior's own entropy drop reaches an AUC of {best:.3f}.")
    print(f"Every number: {Path(args.figures) / 'results' / 'estimator.json'}")


def _theory(args: argparse.Namespace) -> None:
    import torch

    from iapo_mini.lab.results import results_path
    from iapo_mini.lab.theory import summary, theory

    if args.threads < 1:
        raise ValueError(f"threads is {args.threads}; allowed are 1 and above.")
    torch.set_num_threads(args.threads)
    print(summary(theory(args.preset, args.figures)))
    where = Path(args.figures)
    print(f"\nEvery number: {results_path(where, 'theory', args.preset)}")
    print(f"Figures: {where / 'theory_*.png'}")


def main(argv: list[str] | None = None) -> None:
    """Run a command; bad input ends with one sentence on stderr and exit status 2."""
    args = _parser().parse_args(argv)
    command = {
        "compare": _compare, "train": _train, "evaluate": _evaluate, "explain": _explain,
        "figures": _figures, "export": _export, "plan": _plan, "theory": _theory,
        "diagnose": _diagnose,
        **dict.fromkeys(EXPERIMENTS, _experiment),
    }  # fmt: skip
    try:
        command[args.command](args)
    except (ValueError, OSError, RuntimeError, FloatingPointError) as error:
        print(f"iapo-mini: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        raise SystemExit("\nInterrupted; the same command goes on where it stopped.") from None


if __name__ == "__main__":
    main()
