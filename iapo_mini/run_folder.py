"""The folder of a training run, which loses nothing when something fails.

* Files are written under another name and renamed when complete, so a kill leaves the old or the
  new version.
* A checkpoint holds the checksums of its files. A checkpoint that does not match is skipped.
* A folder belongs to one process at a time; the lock is released if the process is killed.
* On a full or read-only disk the error names the last complete checkpoint.
* Ctrl-C, SIGTERM and SIGHUP end the run after the current step; a second one ends it at once.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import threading
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import filelock
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from iapo_mini.adapters import (
    base_weights,
    fingerprint_of_adapter,
    fingerprint_of_weights,
)
from iapo_mini.config import TrainConfig, with_defaults
from iapo_mini.files import remove, replace_folder, replace_text, writable_folder
from iapo_mini.metrics import LOG, logged, sum_of_log, trim_log, whole_log
from iapo_mini.problems.datasets import fingerprint
from iapo_mini.signals import asked_to_end
from iapo_mini.tasks import fingerprint_of_problems

if TYPE_CHECKING:
    from iapo_mini.policy import Policy
    from iapo_mini.rollouts import Rollouts
    from iapo_mini.tasks import Problem

_LOCK = ".lock"


def is_leftover(path: Path) -> bool:
    """Whether a killed run left this behind: its lock, or something that it did not yet rename."""
    return path.name == _LOCK or (path.name.startswith(".") and path.name.endswith(".tmp"))


@contextlib.contextmanager
def writing(run: Path) -> Iterator[None]:
    """Turn a failed write into one sentence that names the last checkpoint and says what to do."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        whole = checkpoints(run)
        safe = f"'{whole[-1].name}' is whole" if whole else "there is no checkpoint yet"
        reason = getattr(error, "strerror", None) or error
        raise OSError(
            f"output_dir is '{run}', where writing failed ({reason}); {safe}. Make room or make it "
            "writable, then resume: --resume (resume=True)."
        ) from error


def checkpoints(run: Path) -> list[Path]:
    """Checkpoint folders of a run, oldest first."""
    found = [p for p in run.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", p.name)]
    return sorted(found, key=_step_of)


def _step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.split("-")[1])


def _sums(folder: Path) -> dict[str, str]:
    """SHA-256 of the tensors of a checkpoint, by file name."""
    out = {}
    for name in ("trainable.safetensors", "optimizer.safetensors"):
        with (folder / name).open("rb") as file:
            out[name] = hashlib.file_digest(file, "sha256").hexdigest()
    return out


def save_checkpoint(run: Path, step: int, policy: Policy, optimizer: torch.optim.Optimizer) -> None:
    """Write a checkpoint of trained weights and optimizer moments; the two newest are kept.

    It also holds the checksum of the log up to this step.
    """

    def write(folder: Path) -> None:
        save_file({k: v.detach().contiguous() for k, v in policy.trainable().items()},
                  folder / "trainable.safetensors")  # fmt: skip
        moments = {
            f"{i}/{key}": value.contiguous()
            for i, entry in optimizer.state_dict()["state"].items()
            for key, value in entry.items()
        }
        save_file(moments, folder / "optimizer.safetensors")
        sums = _sums(folder) | {LOG: sum_of_log(run / LOG, step)}
        (folder / "sha256.json").write_text(
            json.dumps(sums, indent=1) + "\n", encoding="utf-8", newline="\n"
        )

    replace_folder(run / f"checkpoint-{step}", write)
    for old in checkpoints(run)[:-2]:
        if _step_of(old) != step:  # a resume may have left damaged checkpoints with a higher step
            remove(old)


def restore_checkpoint(run: Path, policy: Policy, optimizer: torch.optim.Optimizer) -> int:
    """Load the newest undamaged checkpoint and return its number of steps; 0 if there is none.

    If the log is damaged, the steps since an older checkpoint are repeated.

    Raises:
        ValueError: for a checkpoint that can't be read, or a log whose damage begins before the
            oldest checkpoint. The run does not start again over undamaged checkpoints.
    """
    told = None
    for checkpoint in reversed(checkpoints(run)):
        try:
            sums = json.loads((checkpoint / "sha256.json").read_text(encoding="utf-8"))
            logged_sum = sums.pop(LOG, None)
            if _sums(checkpoint) != sums:
                raise ValueError("its files do not match their checksums")
            weights = load_file(checkpoint / "trainable.safetensors")
            moments = load_file(checkpoint / "optimizer.safetensors")
        except (FileNotFoundError, ValueError, AttributeError, SafetensorError) as error:
            warnings.warn(
                f"'{checkpoint}' is damaged ({error}) and is not used; the run continues from the "
                "checkpoint before it, or from the start.",
                stacklevel=2,
            )
            continue
        except OSError as error:  # it may be undamaged, so the run must not start again over it
            raise ValueError(
                f"output_dir is '{run}', whose '{checkpoint.name}' can't be read "
                f"({error.strerror or error}); make it readable, then resume."
            ) from error
        try:
            whole_log(run / LOG, _step_of(checkpoint), logged_sum)
        except ValueError as error:
            told = str(error)
            continue
        if told:
            warnings.warn(
                f"{told}; the steps after '{checkpoint.name}' are repeated.", stacklevel=2
            )
        with torch.no_grad():
            for name, parameter in policy.trainable().items():
                parameter.copy_(weights[name])
        state = optimizer.state_dict()
        for name, value in moments.items():
            index, key = name.split("/")
            # A copy: what is loaded is the file itself, which Windows would then not remove.
            state["state"].setdefault(int(index), {})[key] = value.clone()
        optimizer.load_state_dict(state)
        return _step_of(checkpoint)
    if told:
        raise ValueError(
            f"{told}, and every checkpoint is newer than the undamaged part; restore the file, or "
            "start a new run in another folder."
        )
    return 0


class Run:
    """The folder of one run, as a context manager.

    Entering locks the folder for this process and refuses an unsuitable one. Nothing is written
    before :meth:`restore`, so a run whose model can't be loaded leaves nothing behind.

    Args:
        folder: must be empty or absent unless ``resume``.
        config: its settings are written to ``config.json``.
        resume: continue the run in the folder, which must have the same settings.
        wait: seconds to wait for another process to leave the folder.

    Raises:
        ValueError: when the folder is in use, can't be written or is not empty, or, with
            ``resume``, when it holds no run or a run with other settings or more steps.
    """

    def __init__(
        self, folder: str | Path, config: TrainConfig, *, resume: bool = False, wait: float = 0.0
    ) -> None:
        self.folder, self.config, self.resume, self.wait = Path(folder), config, resume, wait
        self._stack = contextlib.ExitStack()
        self._interrupted = threading.Event()
        self._before: dict[str, Any] = {}

    def __enter__(self) -> Run:
        if self.resume and not (self.folder / "config.json").is_file():
            raise ValueError(
                f"output_dir is '{self.folder}', which holds no run to resume (no config.json)."
            )
        writable_folder(self.folder, "output_dir")
        with contextlib.ExitStack() as stack:
            stack.enter_context(_locked(self.folder, self.wait))
            self._check()
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *raised: Any) -> None:
        self._stack.__exit__(*raised)

    def _check(self) -> None:
        """Refuse a folder that is not empty, or a resume with other settings."""
        run, settings = self.folder, self.config.settings()
        if not self.resume:
            if not all(map(is_leftover, run.iterdir())):
                raise ValueError(
                    f"output_dir is '{run}', which is not empty; resume the run in it, or name a "
                    "new folder."
                )
            return
        try:
            saved = json.loads((run / "config.json").read_text(encoding="utf-8"))
            before = with_defaults(saved)
            self._before = saved
        except (ValueError, TypeError, AttributeError) as error:
            raise ValueError(
                f"output_dir is '{run}', whose config.json is damaged ({error}); write the run's "
                "settings back into it, or name a new folder."
            ) from error
        data = saved.get("data_fingerprint")
        if data is not None and data != fingerprint(self.config.data_file):
            raise ValueError(
                f"data_file is '{self.config.data_file}', whose content differs from "
                f"'{before['data_file']}' when the run in '{run}' was started; resume with the "
                "same problems, or start a new run."
            )
        free = {"max_steps"} if data is None else {"max_steps", "data_file"}  # by content
        for name, value in settings.items():
            if name not in free and value != before.get(name):
                raise ValueError(
                    f"{name} is {value!r}, but the run in '{run}' was started with "
                    f"{before.get(name)!r}; resume with the same settings (only max_steps may "
                    "differ)."
                )
        made = [row["step"] for _, row in logged(run / LOG)]
        done = max([*made, *map(_step_of, checkpoints(run))], default=0)
        if done > self.config.max_steps:
            raise ValueError(
                f"max_steps must be at least {done}, the number of steps of the run in '{run}', "
                f"got {self.config.max_steps}; name a new folder for a shorter run"
            )

    def restore(
        self,
        policy: Policy,
        optimizer: torch.optim.Optimizer,
        problems: Sequence[Problem] | None = None,
    ) -> int:
        """Write the settings, load the newest undamaged checkpoint, return its steps (or 0).

        Args:
            problems: the training problems, if they are not those of ``config.data``.

        Raises:
            ValueError: for other start weights or problems than those that the run began with.
        """
        with writing(self.folder):
            for path in self.folder.glob(".*.tmp"):
                remove(path)
            told = self.config.settings() | {"from_recipe": self.config.from_recipe()}
            told["data_fingerprint"] = fingerprint(self.config.data_file)
            told["problems_fingerprint"] = self._problems_fingerprint(problems)
            told["model_fingerprint"] = self._model_fingerprint(policy)
            replace_text(self.folder / "config.json", json.dumps(told, indent=2) + "\n")
        done = restore_checkpoint(self.folder, policy, optimizer)
        with writing(self.folder):
            trim_log(self.folder / LOG, done)
        self._interrupted = self._stack.enter_context(asked_to_end())  # signals wait from here on
        return done

    def _problems_fingerprint(self, problems: Sequence[Problem] | None) -> str:
        """Fingerprint of the problems given to ``train``, which must stay the same; else empty."""
        now = "" if problems is None else fingerprint_of_problems(problems)
        if self._before.get("problems_fingerprint", now) != now:
            raise ValueError(
                f"problems are not those that the run in '{self.folder}' was started with; resume "
                "with the same problems, or start a new run."
            )
        return now

    def _model_fingerprint(self, policy: Policy) -> dict[str, str]:
        """Fingerprint of the start weights, which must be those that the run began with."""
        start = policy.model if policy.frozen is None else policy.frozen
        now = {
            "dtype": str(policy.dtype),
            "weights": fingerprint_of_weights(base_weights(start).items()),
        }
        if policy.uses_lora:
            now["adapter"] = fingerprint_of_adapter(policy.model)
        before = self._before.get("model_fingerprint") or now
        now = {name: value for name, value in now.items() if name in before}  # of older versions
        # Another GPU may need another dtype, in which the weights are rounded differently.
        if before["dtype"] == now["dtype"] and before != now:
            raise ValueError(
                f"model is '{self.config.model}', whose weights or adapter are not those that the "
                f"run in '{self.folder}' was started with; resume with the same policy, or start a "
                "new run."
            )
        return before

    def log(self, metrics: Mapping[str, Any]) -> None:
        """Append one line to ``metrics.jsonl``, flushed at once."""
        with (
            writing(self.folder),
            (self.folder / LOG).open("a", encoding="utf-8", newline="\n") as log,
        ):
            log.write(json.dumps(metrics) + "\n")

    def save(self, step: int, policy: Policy, optimizer: torch.optim.Optimizer) -> None:
        """Save a checkpoint if one is due; after a signal, save one and end the run.

        Raises:
            KeyboardInterrupt: after Ctrl-C, SIGTERM or SIGHUP, when everything is saved.
            FloatingPointError: for weights that are not finite. Earlier checkpoints are kept.
        """
        if step % self.config.save_steps == 0 or self._interrupted.is_set():
            _check_weights(policy, step)
            with writing(self.folder):
                save_checkpoint(self.folder, step, policy, optimizer)
        if self._interrupted.is_set():
            raise KeyboardInterrupt(
                f"step {step} is saved in '{self.folder}'; --resume (resume=True) continues from it"
            )

    def finish(self, policy: Policy) -> None:
        """Save the trained policy to ``final/``. Raises the same errors as :meth:`save`."""
        policy.model.eval()
        _check_weights(policy, self.config.max_steps)
        with writing(self.folder):
            replace_folder(self.folder / "final", policy.save)
        if self._interrupted.is_set():
            raise KeyboardInterrupt(f"the run in '{self.folder}' is finished")

    @contextlib.contextmanager
    def keeping(
        self, step: int, rollouts: Rollouts, advantages: torch.Tensor, policy: Policy
    ) -> Iterator[None]:
        """Save the inputs of an update in ``failed-step-<n>/`` if its result is not finite."""
        try:
            yield
        except FloatingPointError as error:
            kept = self.folder / f"failed-step-{step}"

            def write(folder: Path) -> None:
                tensors = rollouts.tensors() | {"advantages": advantages}
                save_file(
                    {name: value.detach().contiguous() for name, value in tensors.items()},
                    folder / "rollouts.safetensors",
                )
                texts = rollouts.texts(policy.tokenizer)
                (folder / "completions.json").write_text(
                    json.dumps(texts, indent=1) + "\n", encoding="utf-8", newline="\n"
                )

            with writing(self.folder):
                replace_folder(kept, write)
            raise FloatingPointError(
                f"step {step}: {error}; the run has stopped before the update, and the batch is in "
                f"'{kept}'. A new run with a lower learning_rate often helps (now "
                f"{self.config.learning_rate})."
            ) from error


def _check_weights(policy: Policy, step: int) -> None:
    """Refuse weights that are not finite, as a too large update can leave them."""
    for name, parameter in policy.trainable().items():
        if not parameter.isfinite().all():
            raise FloatingPointError(
                f"after step {step} the weight '{name}' is not finite and is not saved; a new run "
                "with a lower learning_rate often helps."
            )


@contextlib.contextmanager
def _locked(run: Path, wait: float) -> Iterator[None]:
    """Lock the run folder for this process; the lock is released if the process is killed."""
    lock = filelock.FileLock(run / _LOCK)
    try:
        lock.acquire(timeout=wait)
    except filelock.Timeout as error:
        raise ValueError(
            f"output_dir is '{run}', where another process is training; wait until it ends, or "
            "name a new folder."
        ) from error
    try:
        yield
    finally:
        with contextlib.suppress(OSError):  # fails on Windows (open file) or a read-only disk
            os.unlink(run / _LOCK)
        lock.release()
