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
from iapo_mini import command_options as options
from iapo_mini.config import CARDS, TrainConfig
from iapo_mini.early_exit.question import Stopping
from iapo_mini.errors import (
    MOST_PROBLEMS,
    MOST_ROWS,
    MOST_SEED,
    MOST_STEPS,
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
    in_one_sentence,
    print_any_text,
)
from iapo_mini.recipes import use_methods

# The libraries read this when they are imported, so it is set first.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")


def _policy(args: argparse.Namespace) -> Any:
    """Load the policy that these options name."""
    from iapo_mini.policy import load_policy

    names = ("adapter", "subfolder", "revision", "four_bit", "device")
    return load_policy(args.model, lora_rank=0, **{name: getattr(args, name) for name in names})


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
    """Make a TrainConfig from the card and the settings file, if any, and the given options."""
    filed = {}
    if args.config:
        from iapo_mini.config_file import read_settings

        filed = read_settings(args.config)
    names = {field.name for field in dataclasses.fields(TrainConfig)}
    given = {name: value for name, value in vars(args).items() if name in names}
    return TrainConfig(**{**CARDS.get(args.card, {}), **filed, **given})


def _train(args: argparse.Namespace) -> None:
    if args.methods:
        sys.path.insert(0, "")  # modules of this folder, as with python -m
        use_methods(args.methods)
    config = _train_config(args)
    check_number("keep_completions", args.keep_completions, 0, MOST_STEPS)
    taken = ", ".join(f"{name} {config.settings()[name]}" for name in config.from_recipe())
    if taken:
        print(f"From the recipe of {config.method}: {taken}.")
    check_in_reach(config.model)
    from iapo_mini.engines.reporting import reporters
    from iapo_mini.trainer import train

    callbacks = reporters(args.report_to, Path(args.out), config.settings())
    try:
        train(
            config, args.out, resume=args.resume, callbacks=callbacks,
            keep_completions=args.keep_completions,
        )  # fmt: skip
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


def _stopping(args: argparse.Namespace) -> Stopping | None:
    """The rule of early exit that these options name, or None."""
    rule, stride = args.early_exit, args.early_exit_stride
    if rule is not None:
        return Stopping(rule, "sentence" if stride is None else stride)
    if stride is not None:
        raise ValueError(f"early_exit must be given with early_exit_stride, got only {stride!r}")
    return None


def _evaluate(args: argparse.Namespace) -> None:
    from iapo_mini.problems.datasets import check_data, load_problems
    from iapo_mini.problems.stories import stories

    _check_evaluate(args)
    stopping = _stopping(args)
    check_in_reach(args.model)
    check_data(args.data, args.split, args.data_file)
    if args.data == "stories":
        problems = list(itertools.islice(stories(args.split), args.problems))
    else:
        problems = load_problems(args.data, args.split, args.data_file)
    found, problems = len(problems), problems[: args.problems]
    out = Path(args.out or f"runs/evaluate/{args.data}-{args.split}-{_digest(args)}.json")

    import torch

    from iapo_mini.early_exit.stopping import exits_text
    from iapo_mini.evaluation import check_out, evaluate, evaluation_table
    from iapo_mini.files import versions, writable_folder, write_json

    check_out(out, args.data_file)
    writable_folder(out.parent, "out")
    torch.set_num_threads(args.threads)
    result = evaluate(
        _policy(args), problems, ks=args.k, num_generations=max(args.k),
        max_completion_length=args.max_completion_length, temperature=args.temperature,
        batch_size=args.batch_size, seed=args.seed, save_to=out.with_suffix(".jsonl"),
        lenient=args.lenient, early_exit=stopping,
    )  # fmt: skip
    del result["completions"]  # they are in their file
    print(evaluation_table(result, args.k))
    if stopping is not None:
        print("\n" + exits_text(result, stopping, len(problems) * max(args.k)))
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
    settings = {
        name: x
        for name, x in _given(args).items()
        if name not in ("out", "threads", "lenient")
        # Left out when not given, so that results keep the names that earlier versions gave them.
        and not (name.startswith("early_exit") and x is None)
    }
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
    print(problem.question + (f" (answer: {problem.answer})" if problem.answer else "") + "\n")
    print(terminal_text(explained, _colored(args.color)))
    print(f"\nAnswer entropy before reasoning {explained.entropies[0]:.2f} nats, at the end "
          f"{explained.entropies[-1]:.2f} nats; {len(explained.tokens)} tokens.")  # fmt: skip
    explained.figure().savefig(args.out, dpi=150)
    print(f"Heat map: {args.out}")


def _colored(color: str) -> bool:
    """Whether ``--color`` asks for colours, on this terminal."""
    return color == "always" or (
        color == "auto" and sys.stdout.isatty() and "NO_COLOR" not in os.environ
    )


def _look(args: argparse.Namespace) -> None:
    from iapo_mini.tools.look import group_text

    print(group_text(args.run, args.step, args.group, args.show, _colored(args.color)))


def _plan(args: argparse.Namespace) -> None:
    from iapo_mini.tools.planner import GB, SHAPES, card_gb, lower, plan, plan_table, shape

    if args.scale:
        from iapo_mini.tools.scale import scale_table

        print(scale_table())
        print("\nThis is a plan, not a measurement; docs/scaleout.md says what it assumes.")
        return
    if args.completion is not None:
        args.max_completion_length = args.completion
    settings, gb = _train_config(args), card_gb(args.gpu or args.card or "12gb")
    if args.shape is not None:
        check_choice("shape", args.shape, SHAPES)
    model = shape(args.shape or settings.model)
    planned = plan(model, settings, args.prompt, gpu_gb=gb)
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
    from iapo_mini.tools.sharing import check_repository, export, model_card, push

    if args.push:
        check_repository(args.push)
    card = ""
    if args.card or args.push or args.evaluation:
        card = model_card(args.adapter, args.kind, args.push or "", args.evaluation)
    export(
        args.adapter, args.out, kind=args.kind, model=args.model, four_bit=args.four_bit, card=card
    )
    print(f"{'Merged model' if args.kind == 'merged' else 'Adapter'}: {args.out}")
    if args.push:
        print(f"On the hub: {push(args.out, args.push, args.private)}")


def _methods(args: argparse.Namespace) -> None:
    from iapo_mini.tools.methods import methods_text

    if args.methods:
        sys.path.insert(0, "")
        use_methods(args.methods)
    print(methods_text())


COMMANDS = {
    "compare": ("train GRPO and IAPO from one start and compare", options.add_compare, _compare),
    "train": ("train a policy", options.add_train, _train),
    "evaluate": ("Pass@k, Length@k and Ratio@k of a policy", options.add_evaluate, _evaluate),
    "explain": ("show how much each token of an answer informs", options.add_explain, _explain),
    "plan": ("predict the GPU memory of a training run", options.add_plan, _plan),
    "diagnose": (
        "check whether a run is healthy, and give advice",
        options.add_diagnose,
        _diagnose,
    ),
    "look": ("read the completions that a run kept, token by token", options.add_look, _look),
    "export": ("merge an adapter into its model, or share it", options.add_export, _export),
    "methods": ("list every method with its source and settings", options.add_methods, _methods),
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
    print_any_text()
    args = _parser().parse_args(argv)
    try:
        with in_one_sentence("iapo-mini"):
            args.run_command(args)
    except KeyboardInterrupt:
        raise SystemExit("\nInterrupted; the same command continues where it stopped.") from None
