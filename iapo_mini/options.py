"""Parts of the command line: a parser with errors of one line, and options of several commands."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import io
import re
import sys
import typing
from collections.abc import Iterator
from typing import Any, NoReturn

from iapo_mini.config import CARDS, TrainConfig
from iapo_mini.errors import AUTO, check_choice, first_line, shown
from iapo_mini.recipes import FROM_RECIPE, RECIPES


class Parser(argparse.ArgumentParser):
    """A parser without abbreviated options whose errors are one sentence, without the usage."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**{"allow_abbrev": False, **settings})

    def error(self, message: str) -> NoReturn:
        """Exit with status 2; ``argument --k: must be ...`` is printed as ``--k must be ...``."""
        if message.startswith("argument "):
            message = message.removeprefix("argument ").replace(": ", " ", 1)
        if " must be " not in message:
            message += f"; see {self.prog} --help"
        self.exit(2, f"{self.prog.split()[0]}: {message}\n")

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None:
            name = action.option_strings[0] if action.option_strings else action.metavar
            try:
                check_choice(str(name or action.dest), value, action.choices)
            except ValueError as error:
                self.error(str(error))


def whole(text: str) -> int:
    """Parse an option that is a whole number."""
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a whole number, got {shown(text)}") from None


def number(text: str) -> float:
    """Parse an option that is a number; the code that uses it checks its range."""
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a number, got {shown(text)}") from None


def whole_or_word(text: str) -> int | str:
    """Parse an option that is a whole number or a word; the code that uses it checks both."""
    try:
        return int(text)
    except ValueError:
        return text


def number_or_word(text: str) -> float | str:
    """Parse an option that is a number or a word; the code that uses it checks both."""
    try:
        return float(text)
    except ValueError:
        return text


def print_any_text() -> None:
    """Print ``?`` for a character that stdout can't show, instead of raising an error.

    A pipe on Windows takes only the characters of cp1252, and a completion may hold any.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")


@contextlib.contextmanager
def in_one_sentence(program: str) -> Iterator[None]:
    """Turn errors of input or machine into one sentence on stderr and exit status 2."""
    try:
        yield
    except (ValueError, OSError, RuntimeError, ArithmeticError) as error:
        told = str(error) if "\n" not in str(error).strip() else first_line(error)
    except MemoryError:
        told = "these settings need more memory than this machine has"
    else:
        return
    print(f"{program}: {told}", file=sys.stderr)
    raise SystemExit(2)


_TYPES: dict[type, Any] = {int: whole, float: number, str: str}


def _field_help(cls: type) -> dict[str, str]:
    """Field name -> help text, from the ``Attributes:`` block of a dataclass docstring."""
    text = (cls.__doc__ or "").split("Attributes:")[1]
    found = re.findall(r"^ {8}([\w, ]+): (.*(?:\n {10,}.*)*)", text, re.MULTILINE)
    return {
        name.strip(): re.sub(r"\s+", " ", sentence).replace("`", "").replace("%", "%%")
        for names, sentence in found
        for name in names.split(",")
    }


def _default(name: str, value: object) -> str:
    """The default of a field of TrainConfig in words; a recipe's field has one for each method."""
    if name not in FROM_RECIPE:
        return f"default: {value}"
    by_value: dict[Any, list[str]] = {}
    for method, recipe in RECIPES.items():
        by_value.setdefault(getattr(recipe, name), []).append(method)
    common = max(by_value, key=lambda v: len(by_value[v]))
    others = [f"{v} for {', '.join(names)}" for v, names in by_value.items() if v != common]
    return f"default by method: {'; '.join([*others, f'{common} for the others'])}"


def add_train_options(parser: argparse.ArgumentParser) -> None:
    """Add an option for each field of TrainConfig. Options that are not given set nothing."""
    sentences, types = _field_help(TrainConfig), typing.get_type_hints(TrainConfig)
    for field in dataclasses.fields(TrainConfig):
        kinds = set(typing.get_args(types[field.name]) or (types[field.name],)) - {type(None)}
        told = f"{sentences[field.name]} ({_default(field.name, field.default)})"
        settings: dict[str, Any] = {"default": argparse.SUPPRESS, "help": told}
        option = "--" + field.name.replace("_", "-")
        if kinds == {bool}:
            settings["action"] = argparse.BooleanOptionalAction
        elif kinds == {int, str}:
            settings |= {"type": whole_or_word, "metavar": "INT|WORD"}
        else:
            (kind,) = kinds
            settings |= {"type": _TYPES[kind], "metavar": kind.__name__.upper()}
        parser.add_argument(option, **settings)
    parser.add_argument(
        "--config", metavar="FILE",
        help="YAML or JSON file of settings with the names below, or the config.json of a run; "
        "other options override it (default: none)",
    )  # fmt: skip
    parser.add_argument(
        "--card", choices=tuple(CARDS),
        help="settings for a real model on one GPU; other options override them (default: none, "
        "use the defaults of the options)",
    )  # fmt: skip


def add_policy_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that choose the policy of a command."""
    add = parser.add_argument
    add("--model",
        help="'embedded', a folder, or a hub id (default: the adapter's model, or embedded)",
    )  # fmt: skip
    add("--adapter", help="folder of a trained adapter (PEFT format)")
    add("--subfolder", default="", help="folder of the model in its repository (default: the top)")
    add("--revision", help="branch, tag or commit of a hub id (default: the newest)")
    add("--four-bit", action="store_true", help="load the weights in 4 bits (NF4; bitsandbytes)")
    add("--device", default=AUTO,
        help="cpu, cuda or cuda:1; auto is the first CUDA device, else the CPU (%(default)s)",
    )  # fmt: skip
