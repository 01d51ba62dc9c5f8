"""Send metrics to trackio, Weights & Biases or TensorBoard, which are optional extras.

``metrics.jsonl`` remains the record of a run. A reporter only repeats it elsewhere. A reporter that
fails is dropped with a warning.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from iapo_mini.callbacks import Callback, harmless
from iapo_mini.errors import check_choice

PROJECT = "iapo-mini"
"""Name of the project in trackio and Weights & Biases."""


def numbers_of(row: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """The numbers in a line of a log, without the step."""
    return {
        f"{prefix}{name}": float(value)
        for name, value in row.items()
        if name != "step" and isinstance(value, int | float) and not isinstance(value, bool)
    }


def _identity(folder: Path) -> str:
    """An identity of the run that depends only on its folder, so a resumed run keeps it."""
    return hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:12]


def _late(
    begin: Callable[[], Any],
    write: Callable[[Any, dict[str, float], int], object],
    end: Callable[[Any], object],
) -> Callback:
    """A callback that begins its run at the first step.

    A command that is refused before, such as one that names a used folder without ``--resume``,
    must not change the run that is shown for this folder. And a new run needs an empty folder, into
    which TensorBoard's writer writes at once.
    """
    run = functools.cache(begin)

    def send(row: Mapping[str, Any], prefix: str = "") -> None:
        write(run(), numbers_of(row, prefix), row["step"])

    def finish() -> None:
        if run.cache_info().currsize:
            end(run())

    return Callback(send, lambda found: send(found, "evaluation/"), finish)


def _tensorboard(folder: Path, settings: Mapping[str, Any]) -> Callback:
    open_writer = importlib.import_module("torch.utils.tensorboard").SummaryWriter

    def begin() -> Any:
        writer = open_writer(str(folder / "tensorboard"))
        writer.add_text("settings", "\n".join(f"    {k}: {v}" for k, v in settings.items()))
        return writer

    def write(writer: Any, numbers: dict[str, float], step: int) -> None:
        for name, value in numbers.items():
            writer.add_scalar(name, value, step)
        writer.flush()

    return _late(begin, write, lambda writer: writer.close())


def _log(run: Any, numbers: dict[str, float], step: int) -> None:
    run.log(numbers, step=step)


def _wandb(folder: Path, settings: Mapping[str, Any]) -> Callback:
    wandb = importlib.import_module("wandb")

    def begin() -> Any:
        return wandb.init(
            project=PROJECT, name=folder.name, config=dict(settings), id=_identity(folder),
            resume="allow",
        )  # fmt: skip

    return _late(begin, _log, lambda run: run.finish())


def _trackio(folder: Path, settings: Mapping[str, Any]) -> Callback:
    trackio = importlib.import_module("trackio")

    def begin() -> Any:
        trackio.init(
            project=PROJECT, name=f"{folder.name}-{_identity(folder)}", config=dict(settings),
            resume="allow",
        )  # fmt: skip
        return trackio

    return _late(begin, _log, lambda module: module.finish())


REPORTERS: dict[str, Callable[[Path, Mapping[str, Any]], Callback]] = {
    "trackio": _trackio,
    "wandb": _wandb,
    "tensorboard": _tensorboard,
}
"""Name in ``--report-to`` -> function (folder of the run, its settings) -> callback."""


def check_reporters(names: Sequence[str]) -> None:
    """Refuse names that are unknown or whose package is missing, before any long work.

    Raises:
        ValueError: naming the package and how to install it.
    """
    for name in names:
        check_choice("report_to", name, REPORTERS)
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise ValueError(
                f"report_to names '{name}', which is not installed; pip install 'iapo-mini[{name}]'"
            ) from error


def reporters(names: Sequence[str], folder: Path, settings: Mapping[str, Any]) -> list[Callback]:
    """A callback for each name.

    Args:
        names: keys of ``REPORTERS``.
        folder: folder of the run.
        settings: settings of the run, to be shown.

    Raises:
        ValueError: the same errors as :func:`check_reporters`.
    """
    check_reporters(names)
    return [harmless(REPORTERS[name](folder, settings), name) for name in names]
