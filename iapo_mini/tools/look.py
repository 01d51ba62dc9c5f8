"""Show the prompts and completions of a step, with the informativeness or advantage of each token.

Reading completions is the way to find reward hacking: rewards can also rise because the policy has
found an unintended way to earn them.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from iapo_mini.errors import MOST_ROWS, MOST_STEPS, check_number, first_line
from iapo_mini.kept_completions import FOLDER, path_of
from iapo_mini.tools.explain import colored_tokens

SHOWN = {
    "informativeness": ("informativeness", "nats; blue lowers the answer entropy"),
    "advantage": ("token_advantages", "blue: made more likely, red: made less likely"),
}
"""Name of the values that colour tokens -> (column, legend)."""


def kept_steps(run: str | Path) -> list[int]:
    """The steps of a run whose completions were kept, in order."""
    names = (path.name for path in (Path(run) / FOLDER).glob("completions_*.parquet"))
    found = (re.fullmatch(r"completions_(\d+)\.parquet", name) for name in names)
    return sorted(int(match[1]) for match in found if match)


def kept_rows(run: str | Path, step: int | None = None) -> list[dict[str, Any]]:
    """The kept completions of a step, one mapping for each (:mod:`iapo_mini.kept_completions`).

    Args:
        run: folder of the run.
        step: number of the step; default is the last one that was kept.

    Raises:
        ValueError: for a run without kept completions, a step that was not kept, or a damaged file.
    """
    import pyarrow.parquet

    if step is not None:
        check_number("step", step, 1, MOST_STEPS)
    steps = kept_steps(run)
    if not steps:
        raise ValueError(
            f"run is '{run}', which has kept no completions; train with --keep-completions N "
            "(keep_completions=N)."
        )
    step = steps[-1] if step is None else step
    if step not in steps:
        raise ValueError(f"step must be one of {', '.join(map(str, steps))}, got {step}")
    path = path_of(Path(run), step)
    try:
        return pyarrow.parquet.read_table(path).to_pylist()
    except (OSError, ValueError) as error:
        raise ValueError(f"'{path}' is damaged ({first_line(error)}).") from error


def group_text(
    run: str | Path,
    step: int | None = None,
    group: int = 0,
    show: str = "informativeness",
    color: bool = True,
) -> str:
    """Text of a prompt and its completions with coloured tokens, with the best reward first.

    Args:
        run, step: as for :func:`kept_rows`.
        group: number of the prompt in the step, from 0.
        show: a key of ``SHOWN``; a run without informativeness shows advantages.
        color: as for :func:`iapo_mini.tools.explain.colored_tokens`.

    Raises:
        ValueError: the errors of :func:`kept_rows`, and a group that the step does not have.
    """
    check_number("group", group, 0, MOST_ROWS)
    rows = kept_rows(run, step)
    prompts = list(dict.fromkeys(row["prompt"] for row in rows))
    check_number("group", group, 0, len(prompts) - 1)
    own = [row for row in rows if row["prompt"] == prompts[group]]
    if own[0]["informativeness"] is None:
        show = "advantage"
    column, legend = SHOWN[show]
    limit = max(0.1, *(abs(value) for row in own for value in row[column]))
    lines = [
        f"Step {own[0]['step']}, prompt {group} of {len(prompts)} (from 0); right answer: "
        f"{own[0]['answer']}", "", prompts[group].strip(),
    ]  # fmt: skip
    for row in sorted(own, key=lambda row: -row["reward"]):
        right = "right" if row["correct"] else "wrong"
        text, _ = colored_tokens(row["tokens"], row[column], color, limit)
        lines += [
            "", f"{right}, reward {row['reward']:+.1f}, mean advantage {row['advantage']:+.2f}, "
            f"{row['length']} tokens:", text,
        ]  # fmt: skip
    scale = f"; full colour is {limit:.2f}" if color else ""
    return "\n".join([*lines, "", f"Tokens show {show} ({legend}){scale}."])
