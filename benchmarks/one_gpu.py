"""Everything that needs a GPU, in one command that continues where the time ran out.

    python benchmarks/one_gpu.py --minutes 25 --data-file gsm8k_train.jsonl
    python benchmarks/one_gpu.py --parts study --model FOLDER     # one part
    python benchmarks/one_gpu.py --tiny --device cpu              # the same code in a few minutes

The parts, in this order:

* ``memory``: ``memory.py`` for each of its three shapes (``figures/results/memory.json``);
* ``sampling``: ``sampling.py`` (``figures/results/sampling.json``);
* ``study``: ``iapo-mini lab real-training`` with the model (``real_training_card.json``, and
  what its runs say so far when the time runs out);
* ``gsm8k``: from the start policy of the study, GRPO and IAPO on GSM8K side by side
  (``figures/results/one_gpu.json``: what ``real_training_so_far_card.json`` has).

What is finished is not made again. When the time is over, the part in work is asked to stop, saves
what it has, and continues when the command is repeated.
"""

from __future__ import annotations

import argparse
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch

from iapo_mini.files import read_json, versions, whole_records, write_json
from iapo_mini.lab.real_progress import progress_table, so_far
from iapo_mini.policies import shown_name

HERE = Path(__file__).parent
SHAPES = ("qwen2.5-0.5b", "qwen2.5-1.5b", "qwen2.5-7b")
PARTS = ("memory", "sampling", "study", "gsm8k")
METHODS = ("grpo", "iapo")
PATIENCE = 120.0
"""Seconds that a part may take to save after it was asked to stop."""


def device_name(device: str) -> str:
    """The name that the benchmarks write beside their rows."""
    return torch.cuda.get_device_name(device) if device.startswith("cuda") else "cpu"


def together(commands: list[list[str]], until: float) -> bool:
    """Run commands side by side; ask them to stop when the time is over.

    Returns:
        Whether all of them ended by themselves and well.
    """
    running = [subprocess.Popen(command) for command in commands]
    while any(p.poll() is None for p in running) and time.monotonic() < until:
        time.sleep(0.2)
    late = [p for p in running if p.poll() is None]
    for process in late:
        # Windows has no SIGINT for other processes; checkpoints are whole at any time.
        process.send_signal(signal.SIGINT if sys.platform != "win32" else signal.SIGTERM)
    for process in late:
        try:
            process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            process.kill()
    return not late and all(p.returncode == 0 for p in running)


def measured(path: Path, shape: str, device: str) -> bool:
    """Whether a results file has a finished row of this shape on this device."""
    rows = read_json(path, {"rows": []}, needs=("rows",))["rows"]
    return any(row["shape"] == shape and row["device"] == device and whole(row) for row in rows)


def whole(row: dict) -> bool:
    """Whether nothing is left of a shape: no step of a method, or no way to sample."""
    if "left" in row:
        return row["left"] == 0
    return all(row["steps"].get(m, 0) >= row["settings"]["max_steps"] for m in METHODS)


def commands_of(part: str, args: argparse.Namespace) -> list[list[list[str]]]:
    """What is left of a part: groups of commands, each group side by side."""
    python, results = sys.executable, args.figures / "results"
    tiny = ["--tiny", "--device", args.device] if args.tiny else ["--device", args.device]
    named = device_name(args.device)
    if part in ("memory", "sampling"):
        path = results / f"{part}.json"
        shapes = ("tiny",) if args.tiny else SHAPES if part == "memory" else SHAPES[:1]
        # Two steps on the tiny shape: the least of which one counts.
        more = ["--steps", "2" if args.tiny else "3"] if part == "memory" else []
        return [
            [[python, str(HERE / f"{part}.py"), *([] if args.tiny else [shape]), *tiny, *more,
              "--out", str(path)]]
            for shape in shapes if not measured(path, shape, named)
        ]  # fmt: skip
    if part == "study":
        done = results / f"real_training_{preset_of(args)}.json"
        return [] if done.is_file() else [[study_command(args)]]
    return [[
        train_command(args, method) for method in METHODS
        if len(whole_records(run_of(args, method) / "metrics.jsonl")) < args.steps
    ]]  # fmt: skip


def preset_of(args: argparse.Namespace) -> str:
    """The size of the training study."""
    return "quick" if args.tiny else "card"


def study_command(args: argparse.Namespace, *more: str) -> list[str]:
    """The command of the training study."""
    return [sys.executable, "-m", "iapo_mini", "lab", "real-training", "--preset", preset_of(args),
            "--model", args.model, "--out", str(args.out), "--figures", str(args.figures),
            "--parallel", str(args.parallel), *more]  # fmt: skip


def start_of(args: argparse.Namespace) -> Path:
    """The start policy that the study has made."""
    return args.out / preset_of(args) / "real_training" / "start" / "model"


def run_of(args: argparse.Namespace, method: str) -> Path:
    """Folder of a method's run on GSM8K."""
    return args.out / "gsm8k" / f"{method}-0" / "train"


def train_command(args: argparse.Namespace, method: str) -> list[str]:
    """The command of a run on GSM8K, which continues one that was begun."""
    run = run_of(args, method)
    data = ["--data-file", str(args.data_file)] if args.data_file else []
    size = ["--prompts-per-step", "1", "--num-generations", "2", "--max-completion-length", "16"]
    card = [*size, "--split", "all"] if args.tiny else ["--card", "t4", "--learning-rate", "1e-4"]
    return [sys.executable, "-m", "iapo_mini", "train", *card, "--model", str(start_of(args)),
            "--device", args.device, "--data", "gsm8k", *data, "--method", method,
            "--max-steps", str(args.steps), "--out", str(run),
            *(["--resume"] if (run / "config.json").is_file() else [])]  # fmt: skip


def tell(args: argparse.Namespace) -> None:
    """Write and print what the runs on GSM8K say, if they have begun."""
    folder = args.out / "gsm8k"
    if not any(whole_records(path) for path in folder.glob("*/train/metrics.jsonl")):
        return
    told = {"model": shown_name(args.model), "device": device_name(args.device)}
    results = so_far(folder, METHODS, {**told, "versions": versions()})
    write_json(args.figures / "results" / "one_gpu.json", results)
    print(progress_table(results))


def main() -> None:
    """Make the parts until the time is over."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help=", ".join(PARTS))
    parser.add_argument("--model", default="Qwen/Qwen2.5-Coder-0.5B-Instruct",
                        help="folder or hub id (%(default)s)")  # fmt: skip
    parser.add_argument("--data-file", help="GSM8K's training problems (default: from the hub)")
    parser.add_argument("--minutes", type=float, default=25.0, help="time in all (%(default)s)")
    parser.add_argument("--steps", type=int, default=200, help="steps on GSM8K (%(default)s)")
    parser.add_argument("--parallel", type=int, default=10, help="runs at once in the study (10)")
    parser.add_argument("--device", default="cuda", help="default: %(default)s")
    parser.add_argument("--tiny", action="store_true", help="the embedded policy and tiny shapes")
    parser.add_argument("--out", type=Path, default=Path("runs/one_gpu"), help="(%(default)s)")
    parser.add_argument("--figures", type=Path, default=HERE.parent / "figures", help="of results")
    args = parser.parse_args()
    if not args.tiny and not (args.device.startswith("cuda") and torch.cuda.is_available()):
        print(f"one_gpu.py: device is {args.device}, but real shapes need a CUDA device that works "
              "here; --tiny --device cpu runs the same code on tiny shapes.",
              file=sys.stderr)  # fmt: skip
        raise SystemExit(2)
    if args.minutes <= 0 or args.steps < 1:
        parser.error(
            f"--minutes and --steps must be above 0, got {args.minutes:g} and {args.steps}"
        )
    until = time.monotonic() + 60 * args.minutes
    whole = True
    for part in args.parts:
        if part == "gsm8k" and not start_of(args).is_dir():
            print("gsm8k: waits for the start policy of the study")
            whole = False
            continue
        for commands in commands_of(part, args):
            if time.monotonic() < until:
                print(
                    f"{part}: {' '.join(commands[0][1:6]) if commands else 'finished'}", flush=True
                )
                whole &= together(commands, until)
            else:
                whole = False
        if part == "study" and list(args.out.glob("*/real_training/*/train/metrics.jsonl")):
            whole &= together([study_command(args, "--so-far")], until + PATIENCE)
    tell(args)
    print(json.dumps({"finished": whole}))
    raise SystemExit(0 if whole else 3)


if __name__ == "__main__":
    main()
