"""Command line: ``iapo-mini compare | train | evaluate | explain | ...``, ``iapo-mini lab ...``.

The commands call the library. Each imports what it needs when it runs, so ``--help`` is fast.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import itertools
import json
import os
import sys
from pathlib import Path
from typing import Any

from iapo_mini import __version__
from iapo_mini.config import CARDS, TrainConfig, use_methods
from iapo_mini.errors import (
    MOST_PROBLEMS,
    MOST_ROWS,
    MOST_SEED,
    MOST_THREADS,
    MOST_TOKENS,
    check_choice,
    check_device,
    check_number,
    check_temperature,
)
from iapo_mini.hub import check_in_reach
from iapo_mini.lab.commands import add_lab
from iapo_mini.options import (
    Parser,
    add_policy_options,
    add_train_options,
    in_one_sentence,
    number,
    whole,
)

# The libraries read this when they are imported, so it is set first.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")


def _policy(args: argparse.Namespace) -> Any:
    """Load the policy that these options name."""
    from iapo_mini.policy import load_policy

    names = ("adapter", "subfolder", "revision", "four_bit", "device")
    return load_policy(args.model, lora_rank=0, **{name: getattr(args, name) for name in names})


def _add_compare(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--preset", default="demo",
        help="size: quick (seconds), demo (three seeds, under ten minutes on two cores), full "
        "(five seeds, for the README's table) or long (three seeds, 60 steps); %(default)s",
    )  # fmt: skip
    add("--out", default="runs/compare", help="folder of the runs (%(default)s)")
    add("--figures", default="figures", help="folder of figures (%(default)s)")
    add("--parallel", type=whole, help="number of processes at a time (default: one per core)")


def _add_train(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--out", required=True, help="folder of the run")
    add("--resume", action="store_true", help="continue from the newest checkpoint")
    add("--methods", help="Python module with your own methods (docs/methods.md; default: none)")
    add_train_options(parser)


def _add_evaluate(parser: argparse.ArgumentParser) -> None:
    add_policy_options(parser)
    add = parser.add_argument
    add("--data", default="stories",
        help="stories, gsm8k, math500, dapo_math or commonsense_qa (%(default)s)")  # fmt: skip
    add("--data-file", default="", help=".jsonl, .json or .parquet file (default: use the hub)")
    add("--split", default="test", help="train, tune, test, or all of a local file (%(default)s)")
    add("--problems", type=whole, default=200,
        help="number of problems, from the start of the split (%(default)s)")  # fmt: skip
    add("--k", type=whole, nargs="+", default=[1, 2, 4, 8],
        help="values of k; the largest is the number of completions per problem (1 2 4 8)",
    )  # fmt: skip
    add("--max-completion-length", type=whole, default=224, help="tokens (%(default)s)")
    add("--batch-size", type=whole, default=128, help="completions sampled at once (%(default)s)")
    add("--temperature", type=number, default=1.0, help="of sampling; 0 is greedy (%(default)s)")
    add("--seed", type=whole, default=0, help="sampling seed (%(default)s)")
    add("--out",
        help="JSON file of results; completions go beside it as JSONL, and the same command "
        "continues from them (default: in runs/evaluate, named by the settings)")  # fmt: skip
    add("--threads", type=whole, default=2, help="CPU threads (%(default)s)")


def _add_explain(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("story", help="the question, in quotes; '-' takes a random test story")
    add_policy_options(parser)
    add("--temperature", type=number, default=1.0, help="of sampling; 0 is greedy (%(default)s)")
    add("--seed", type=whole, default=0, help="sampling seed (%(default)s)")
    add("--out", default="runs/explain.png", help="file of the heat map (%(default)s)")
    add("--color", choices=("auto", "always", "never"), default="auto",
        help="colour tokens in the terminal; 'never' prints nats beside them (%(default)s)",
    )  # fmt: skip


def _add_plan(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--gpu", help="t4, or a size such as 12gb (default: the GPU of --card, else 12gb)")
    add("--shape", help="qwen2.5-0.5b, -1.5b, -3b or -7b, instead of --model")
    add("--prompt", type=whole, default=200, help="prompt tokens (%(default)s)")
    add("--completion", type=whole, help="the same as --max-completion-length")
    add_train_options(parser)


def _add_diagnose(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", help="folder of a training run, finished or not")
    parser.add_argument("--last", type=whole, default=10,
                        help="number of last steps to average (%(default)s)")  # fmt: skip


def _add_export(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--model", help="'embedded', a folder, or a hub id (default: the adapter's model)")
    add("--adapter", required=True, help="folder of a trained adapter: RUN/final")
    add("--out", required=True, help="new folder for safetensors and tokenizer")
    add("--four-bit", action=argparse.BooleanOptionalAction,
        help="dequantise the 4-bit weights that the adapter was trained on, and merge into them "
        "(default: as in the adapter's run)")  # fmt: skip


def _add_methods(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--methods", help="Python module with your own methods (default: none)")


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


def _train_config(args: argparse.Namespace) -> TrainConfig:
    """Make a TrainConfig from the card, if any, and the options that were given."""
    names = {field.name for field in dataclasses.fields(TrainConfig)}
    given = {name: value for name, value in vars(args).items() if name in names}
    return TrainConfig(**{**CARDS.get(args.card, {}), **given})


def _train(args: argparse.Namespace) -> None:
    if args.methods:
        sys.path.insert(0, "")  # modules of this folder, as with python -m
        use_methods(args.methods)
    config = _train_config(args)
    taken = ", ".join(f"{name} {config.settings()[name]}" for name in config.from_recipe())
    if taken:
        print(f"From the recipe of {config.method}: {taken}.")
    check_in_reach(config.model)
    from iapo_mini.trainer import train

    try:
        train(config, args.out, resume=args.resume)
    except KeyboardInterrupt as stopped:
        told = str(stopped) or "the same command with --resume continues"
        raise SystemExit(f"\nInterrupted; {told}.") from None
    print(f"Trained policy: {Path(args.out) / 'final'}")


def _check_evaluate(args: argparse.Namespace) -> None:
    for name, least, most in (
        ("problems", 1, MOST_PROBLEMS),
        ("max_completion_length", 1, MOST_TOKENS),
        ("batch_size", 1, MOST_ROWS),
        ("seed", 0, MOST_SEED),
        ("threads", 1, MOST_THREADS),
    ):
        check_number(name, getattr(args, name), least, most)
    for k in args.k:
        check_number("k", k, 1, MOST_ROWS)
    check_temperature(args.temperature)
    check_device(args.device)


def _evaluate(args: argparse.Namespace) -> None:
    from iapo_mini.problems.datasets import check_data, load_problems
    from iapo_mini.problems.stories import stories

    _check_evaluate(args)
    check_in_reach(args.model)
    check_data(args.data, args.split, args.data_file)
    if args.data == "stories":
        problems = list(itertools.islice(stories(args.split), args.problems))
    else:
        problems = load_problems(args.data, args.split, args.data_file)
    found, problems = len(problems), problems[: args.problems]
    out = Path(args.out or f"runs/evaluate/{args.data}-{args.split}-{_digest(args)}.json")

    import torch

    from iapo_mini.evaluation import check_out, evaluate, evaluation_table
    from iapo_mini.files import versions, writable_folder, write_json

    check_out(out, args.data_file)
    writable_folder(out.parent, "out")
    torch.set_num_threads(args.threads)
    result = evaluate(
        _policy(args), problems, ks=args.k, num_generations=max(args.k),
        max_completion_length=args.max_completion_length, temperature=args.temperature,
        batch_size=args.batch_size, seed=args.seed, save_to=out.with_suffix(".jsonl"),
    )  # fmt: skip
    del result["completions"]  # they are in their file
    print(evaluation_table(result, args.k))
    of = "" if args.data == "stories" else f" of {found}"
    print(f"\n{len(problems)}{of} problems of {args.data} ({args.split}); 95% intervals by "
          "bootstrap over problems.")  # fmt: skip
    write_json(out, {**result, "config": _given(args), "versions": versions()})
    print(f"Results: {out}; completions: {out.with_suffix('.jsonl')}")


def _given(args: argparse.Namespace) -> dict[str, Any]:
    """The options of a command, without the entries that the parser added."""
    return {name: value for name, value in vars(args).items() if name != "run_command"}


def _digest(args: argparse.Namespace) -> str:
    """Eight characters of the hash of all settings of a command, except where results go."""
    settings = {name: x for name, x in _given(args).items() if name not in ("out", "threads")}
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:8]


def _explain(args: argparse.Namespace) -> None:
    from iapo_mini.problems.stories import stories
    from iapo_mini.tasks import Problem

    if not args.story.strip():
        raise ValueError("story is empty; give the question as text, or '-' for a test story.")
    check_number("seed", args.seed, 0, MOST_SEED)
    check_temperature(args.temperature)
    check_device(args.device)
    problem = next(stories("test", args.seed)) if args.story == "-" else Problem(args.story, "")
    check_in_reach(args.model)

    from iapo_mini.files import writable_folder
    from iapo_mini.tools.explain import check_figure, explain, terminal_text

    check_figure(args.out)
    writable_folder(Path(args.out).parent, "out")
    policy = _policy(args)
    explained = explain(
        policy, problem, temperature=args.temperature, seed=args.seed, progress=True
    )
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
    from iapo_mini.tools.planner import GB, SHAPES, card_gb, lower, plan, plan_table, shape

    if args.completion is not None:
        args.max_completion_length = args.completion
    settings, gb = _train_config(args), card_gb(args.gpu or args.card or "12gb")
    if args.shape is not None:
        check_choice("shape", args.shape, SHAPES)
    model = shape(args.shape or settings.model)
    planned = plan(model, settings, args.prompt)
    print(plan_table({args.shape or settings.model: planned}))
    if planned.total <= gb * GB:
        print(f"\nFits into {gb:g} GB; {gb - planned.total / GB:.1f} GB are left.")
        return
    print(f"\nDoes not fit into {gb:g} GB. Lower, in this order:")
    after = planned
    for change, _, after in lower(model, settings, args.prompt, gb * GB):
        print(f"  {change}: {after.total / GB:.1f} GB")
    if after.total > gb * GB:
        print("It still does not fit; take a smaller model or a larger GPU.")


def _diagnose(args: argparse.Namespace) -> None:
    from iapo_mini.tools.diagnose import diagnose, findings_text

    print(findings_text(diagnose(args.run, args.last)))


def _export(args: argparse.Namespace) -> None:
    check_in_reach(args.model)
    from iapo_mini.files import read_json, replace_folder, writable_folder
    from iapo_mini.policy import load_policy

    out = Path(args.out)
    writable_folder(out, "out")
    if any(out.iterdir()):
        raise ValueError(f"out must be a new folder, got '{out}', which is not empty")
    trained = read_json(Path(args.adapter).parent / "config.json", {})
    four_bit = bool(trained.get("four_bit")) if args.four_bit is None else args.four_bit
    policy = load_policy(args.model, adapter=args.adapter, four_bit=four_bit)
    merged = policy.merged("cpu")

    def write(folder: Path) -> None:
        merged.save_pretrained(folder)
        policy.tokenizer.save_pretrained(folder)

    replace_folder(out, write)
    print(f"Merged model: {out}")


def _methods(args: argparse.Namespace) -> None:
    from iapo_mini.tools.methods import methods_text

    if args.methods:
        sys.path.insert(0, "")
        use_methods(args.methods)
    print(methods_text())


COMMANDS = {
    "compare": ("train GRPO and IAPO from one start and compare", _add_compare, _compare),
    "train": ("train a policy", _add_train, _train),
    "evaluate": ("Pass@k, Length@k and Ratio@k of a policy", _add_evaluate, _evaluate),
    "explain": ("show how much each token of an answer informs", _add_explain, _explain),
    "plan": ("predict the GPU memory of a training run", _add_plan, _plan),
    "diagnose": ("check whether a run is healthy, and give advice", _add_diagnose, _diagnose),
    "export": ("merge an adapter into its model, in one folder", _add_export, _export),
    "methods": ("list every method with its source and settings", _add_methods, _methods),
}
"""Command -> (help text, function that adds its options, function that runs it)."""


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="iapo-mini",
        description="Information-aware policy optimization (IAPO) against GRPO, end to end.",
    )  # fmt: skip
    parser.add_argument("--version", action="version", version=f"iapo-mini {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (sentence, add_options, run) in COMMANDS.items():
        command = commands.add_parser(
            name, help=sentence, description=sentence[0].upper() + sentence[1:] + "."
        )
        command.set_defaults(run_command=run)
        add_options(command)
    add_lab(commands)
    return parser


def main(argv: list[str] | None = None) -> None:
    """Run a command; bad input ends with one sentence on stderr and exit status 2."""
    args = _parser().parse_args(argv)
    try:
        with in_one_sentence("iapo-mini"):
            args.run_command(args)
    except KeyboardInterrupt:
        raise SystemExit("\nInterrupted; the same command continues where it stopped.") from None
