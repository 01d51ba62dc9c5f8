"""The options of every command: names, defaults and help texts."""

from __future__ import annotations

import argparse

from iapo_mini.options import (
    add_policy_options,
    add_train_options,
    number,
    number_or_word,
    whole,
    whole_or_word,
)


def add_compare(parser: argparse.ArgumentParser) -> None:
    """Options of ``compare``."""
    add = parser.add_argument
    add("--preset", default="demo",
        help="size: quick (seconds), demo (three seeds, under ten minutes on two cores), full "
        "(five seeds, for the README's table) or long (three seeds, 60 steps); %(default)s",
    )  # fmt: skip
    add("--out", default="runs/compare", help="folder of the runs (%(default)s)")
    add("--figures", default="figures", help="folder of figures (%(default)s)")
    add("--parallel", type=whole, help="number of processes at a time (default: one per core)")


def add_train(parser: argparse.ArgumentParser) -> None:
    """Options of ``train``."""
    add = parser.add_argument
    add("--out", required=True, help="folder of the run")
    add("--resume", action="store_true", help="continue from the newest checkpoint")
    add("--methods", help="Python module with your own methods (docs/methods.md; default: none)")
    add("--report-to", nargs="+", default=[], metavar="NAME",
        help="also send metrics to trackio, wandb or tensorboard (default: none)",
    )  # fmt: skip
    add("--keep-completions", type=whole, default=0, metavar="N",
        help="keep the completions of every N-th step as Parquet, to read with `iapo-mini look` "
        "(default: none)",
    )  # fmt: skip
    add_train_options(parser)


def add_evaluate(parser: argparse.ArgumentParser) -> None:
    """Options of ``evaluate``."""
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
    add("--lenient", action="store_true",
        help="also count right answers in any format: the last answer tag, the last boxed answer, "
        "or the last number of the text",
    )  # fmt: skip
    add("--early-exit", type=number_or_word, metavar="NATS|agree",
        help="stop thinking when the entropy of the forced answer is below so many nats, or, with "
        "'agree', when the same answer is forced twice in a row (default: let the policy think)",
    )  # fmt: skip
    add("--early-exit-stride", type=whole_or_word, metavar="INT|WORD",
        help="ask for the forced answer after every so many tokens, or at ends of sentences "
        "(default: sentence)")  # fmt: skip
    add("--out",
        help="JSON file of results; completions go beside it as JSONL, and the same command "
        "continues from them (default: in runs/evaluate, named by the settings)")  # fmt: skip
    add("--threads", type=whole, default=2, help="CPU threads (%(default)s)")


def add_explain(parser: argparse.ArgumentParser) -> None:
    """Options of ``explain``."""
    add = parser.add_argument
    add("story", help="the question, in quotes; '-' takes a random test story")
    add_policy_options(parser)
    add("--temperature", type=number, default=1.0, help="of sampling; 0 is greedy (%(default)s)")
    add("--seed", type=whole, default=0, help="sampling seed (%(default)s)")
    add("--out", default="runs/explain.png", help="file of the heat map (%(default)s)")
    add("--color", choices=("auto", "always", "never"), default="auto",
        help="colour tokens in the terminal; 'never' prints nats beside them (%(default)s)",
    )  # fmt: skip


def add_plan(parser: argparse.ArgumentParser) -> None:
    """Options of ``plan``."""
    add = parser.add_argument
    add("--gpu", help="t4, or a size such as 12gb (default: the GPU of --card, else 12gb)")
    add("--shape", help="qwen2.5-0.5b, -1.5b, -3b or -7b, instead of --model")
    add("--prompt", type=whole, default=200, help="prompt tokens (%(default)s)")
    add("--completion", type=whole, help="the same as --max-completion-length")
    add("--scale", action="store_true",
        help="print a plan of memory and time for three models on 1, 8 and 64 cards, and nothing "
        "else (docs/scaleout.md says what it assumes)",
    )  # fmt: skip
    add_train_options(parser)


def add_diagnose(parser: argparse.ArgumentParser) -> None:
    """Options of ``diagnose``."""
    parser.add_argument("run", help="folder of a training run, finished or not")
    parser.add_argument("--last", type=whole, default=10,
                        help="number of last steps to average (%(default)s)")  # fmt: skip


def add_look(parser: argparse.ArgumentParser) -> None:
    """Options of ``look``."""
    add = parser.add_argument
    add("run", help="folder of a run that was trained with --keep-completions")
    add("--step", type=whole, help="a step that was kept (default: the last one)")
    add("--group", type=whole, default=0, help="number of the prompt in the step (%(default)s)")
    add("--show", choices=("informativeness", "advantage"), default="informativeness",
        help="values that colour the tokens (%(default)s)",
    )  # fmt: skip
    add("--color", choices=("auto", "always", "never"), default="auto",
        help="colour tokens in the terminal; 'never' prints numbers beside them (%(default)s)",
    )  # fmt: skip


def add_export(parser: argparse.ArgumentParser) -> None:
    """Options of ``export``."""
    add = parser.add_argument
    add("--model", help="'embedded', a folder, or a hub id (default: the adapter's model)")
    add("--adapter", required=True, help="folder of a trained adapter: RUN/final")
    add("--out", required=True, help="new folder for safetensors and tokenizer")
    add("--as", dest="kind", choices=("merged", "adapter"), default="merged",
        help="export the merged model, or the adapter alone (%(default)s)",
    )  # fmt: skip
    add("--card", action="store_true",
        help="write a model card (README.md) from the adapter's run: method, settings, numbers",
    )  # fmt: skip
    add("--evaluation", metavar="FILE", help="results of evaluate, for the card (default: none)")
    add("--push", metavar="OWNER/NAME", help="upload it to the hub, with its card (default: no)")
    add("--private", action="store_true", help="make a new repository on the hub a private one")
    add("--four-bit", action=argparse.BooleanOptionalAction,
        help="dequantise the 4-bit weights that the adapter was trained on, and merge into them "
        "(default: as in the adapter's run)")  # fmt: skip


def add_methods(parser: argparse.ArgumentParser) -> None:
    """Options of ``methods``."""
    parser.add_argument("--methods", help="Python module with your own methods (default: none)")
