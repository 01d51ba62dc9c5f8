"""Real problems: GSM8K, MATH-500, DAPO-Math-17k and CommonsenseQA, from the hub or a local file.

Every row becomes a :class:`~iapo_mini.tasks.Problem` with the system prompt of its data set and a
normalised reference answer. A file is read as a whole or not at all: if some rows can't be used,
an error gives their number and place, and the other rows are not used either.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import math
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any

from iapo_mini.errors import check_choice, first_line, shown
from iapo_mini.problems.stories import SPLITS, stories
from iapo_mini.problems.verify import as_number
from iapo_mini.tasks import SYSTEM_PROMPT, SYSTEM_PROMPT_INTEGER, Problem

ALL = "all"
"""Name of the split that holds a whole local file."""

FILE_TYPES = (".jsonl", ".json", ".parquet")

DAPO_PREFIX = (
    "Solve the following math problem step by step. The last line of your response should be of "
    "the form Answer: $Answer (without quotes) where $Answer is the answer to the problem.\n\n"
)
DAPO_SUFFIX = '\n\nRemember to put your answer on its own line after "Answer:".'


@dataclass(frozen=True)
class Source:
    """Where a data set is found and how its rows are read.

    Attributes:
        hub: repository and configuration on the hub.
        splits: our name of a split -> its name on the hub. Empty when the hub has only "train",
            which is then cut into splits as a local file is.
        system: system prompt of its problems.
        fields: description of the fields of a row, for messages.
        read: row -> (question, normalised answer); raises ValueError.
        limit: number of different questions to take, from the start; None takes all rows.
    """

    hub: tuple[str, str]
    splits: dict[str, str]
    system: str
    fields: str
    read: Callable[[dict], tuple[str, str]]
    limit: int | None = None


def _field(row: object, name: str) -> str:
    value = row.get(name) if isinstance(row, dict) else None
    if isinstance(value, int | float | Decimal) and not isinstance(value, bool):
        value = _number(value, name)
    return _text(value, name)


def _text(value: object, name: str) -> str:
    """The text without space around it; ValueError, naming the field, if it can't be tokenised."""
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"no text under '{name}'")
    if any("\ud800" <= c <= "\udfff" for c in value):  # half a character, which tokenizers refuse
        raise ValueError(f"broken text under '{name}'")
    return value.strip()


def _number(value: float | Decimal, name: str) -> str:
    """Write a number as people do (72.0 as 72); ValueError if it is not finite."""
    if not math.isfinite(value):
        raise ValueError(f"no text under '{name}'")
    whole = value == int(value)
    return str(int(value)) if whole else f"{Decimal(str(value)).normalize():f}"


def _plain_number(text: str) -> str:
    """Write ``1,234`` as ``1234`` and ``$5`` as ``5``; ValueError if the text is not a number."""
    value = as_number(text)
    if value is None:
        raise ValueError(f"the answer '{text[:40]}' is not a number")
    plain = text.replace(",", "").replace("$", "").strip()
    return str(value) if value.denominator == 1 else plain


def _read_gsm8k(row: dict) -> tuple[str, str]:
    return _field(row, "question"), _plain_number(_field(row, "answer").split("####")[-1].strip())


def _read_math500(row: dict) -> tuple[str, str]:
    return _field(row, "problem"), _field(row, "answer")


def _read_dapo_math(row: dict) -> tuple[str, str]:
    """Read rows of the original (a chat, ``reward_model``) or its processed copy (plain text)."""
    prompt = row.get("prompt") if isinstance(row, dict) else None
    if isinstance(prompt, str) and prompt.lstrip().startswith("[{"):  # a chat kept as JSON
        with contextlib.suppress(ValueError, RecursionError):
            prompt = json.loads(prompt)
    if isinstance(prompt, list) and prompt:
        asked = [t for t in prompt if isinstance(t, dict) and t.get("role", "user") == "user"]
        if not asked:
            raise ValueError("no user turn under 'prompt'")
        question = _field(asked[-1], "content")
        answer = _field(row.get("reward_model"), "ground_truth")
    else:
        question, answer = _field(row, "prompt"), _field(row, "solution")
    question = question.removeprefix(DAPO_PREFIX).removesuffix(DAPO_SUFFIX).strip()
    if not question:
        raise ValueError("no question between prefix and suffix")
    return question, _plain_number(answer)


def _read_commonsense_qa(row: dict) -> tuple[str, str]:
    """Read rows of the hub (lists in ``choices``) or of the first release (``question.stem``)."""
    inner = row.get("question") if isinstance(row, dict) else None
    told = inner if isinstance(inner, dict) else row
    question = _field(told, "stem" if told is inner else "question")
    answer = _field(row, "answerKey")
    try:
        choices = told["choices"]
        if isinstance(choices, list):
            pairs = [(choice["label"], choice["text"]) for choice in choices]
        else:
            pairs = list(zip(choices["label"], choices["text"], strict=True))
    except (TypeError, KeyError, ValueError):
        raise ValueError("no 'label' and 'text' lists of equal length under 'choices'") from None
    lettered = [(_text(label, "label"), _text(text, "choices")) for label, text in pairs]
    if answer not in (letter for letter, _ in lettered):
        raise ValueError(f"the answer '{answer}' is not one of the choices")
    lines = [f"{letter}. {text}" for letter, text in lettered]
    return "\n".join([question, *lines, "Answer with the letter of one choice."]), answer


SOURCES: dict[str, Source] = {
    "gsm8k": Source(
        ("openai/gsm8k", "main"),
        {"train": "train", "test": "test"},
        SYSTEM_PROMPT_INTEGER,
        "'question' and 'answer', a number or a solution that ends with '#### number'",
        _read_gsm8k,
    ),
    "math500": Source(
        ("HuggingFaceH4/MATH-500", "default"),
        {"test": "test"},
        SYSTEM_PROMPT,
        "'problem' and 'answer', in LaTeX",
        _read_math500,
    ),
    "dapo_math": Source(
        ("open-r1/DAPO-Math-17k-Processed", "all"),
        {},
        SYSTEM_PROMPT_INTEGER,
        "'prompt' and 'solution', or a chat under 'prompt' and 'reward_model.ground_truth'",
        _read_dapo_math,
        limit=7000,
    ),
    "commonsense_qa": Source(
        ("tau/commonsense_qa", "default"),
        # The answers of the hub's test split are not public.
        {"train": "train", "test": "validation"},
        SYSTEM_PROMPT,
        "'question', 'choices' with lists 'label' and 'text', and 'answerKey'",
        _read_commonsense_qa,
    ),
}
DATA = ("stories", *SOURCES)
"""Names of the data sets."""


def fingerprint(data_file: str) -> str:
    """Sixteen characters of the hash of a file's content; an empty text if no file is named."""
    if not data_file:
        return ""
    with Path(data_file).expanduser().open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]


def check_data(data: str, split: str, data_file: str = "") -> None:
    """Refuse settings that name no problems. Reads no data.

    Raises:
        ValueError: naming the argument, its value and what is allowed.
    """
    check_choice("data", data, DATA)
    if data_file:
        if data == "stories":
            raise ValueError(
                f"data_file is '{data_file}', but data is 'stories', which need no file; "
                f"set data to the format of the file: {', '.join(SOURCES)}."
            )
        path = Path(data_file).expanduser()
        if path.suffix.lower() not in FILE_TYPES:
            raise ValueError(
                f"data_file must be a file of type {', '.join(FILE_TYPES)}, got '{data_file}'"
            )
        if not path.is_file():
            raise ValueError(f"data_file is '{data_file}', which is not a file.")
    allowed = _splits(data, data_file)
    if split not in allowed:
        hint = ""
        if len(allowed) < len(SPLITS):
            hint = f" for {data} from the hub (a local file, data_file, has every split)"
        raise ValueError(f"split must be one of {', '.join(allowed)}{hint}, got {shown(split)}")


def _splits(data: str, data_file: str) -> tuple[str, ...]:
    if data == "stories":
        return SPLITS
    return (*SPLITS, ALL) if data_file else tuple(SOURCES[data].splits) or (*SPLITS, ALL)


def load_problems(data: str, split: str, data_file: str = "") -> list[Problem]:
    """The problems of a split, in the order of their source.

    GSM8K and CommonsenseQA keep the hub's splits. MATH-500 is for evaluation only. DAPO-Math-17k
    and local files are cut by :func:`cut`; their split ``"all"`` holds all problems.

    Args:
        data: a key of ``SOURCES``.
        split: ``"train"``, ``"tune"``, ``"test"`` or ``"all"``, if the data set has it.
        data_file: local .jsonl, .json (a list) or .parquet file with the data set's fields; if
            empty, the data is loaded from the hub.

    Raises:
        ValueError: for settings that name no problems, rows that can't be used (the message gives
            their number and the first ones), a file with too few problems, or a hub that can't be
            reached.
    """
    check_data(data, split, data_file)
    source = SOURCES[data]
    if data_file:
        rows, name = (
            rows_of_file(Path(data_file).expanduser()),
            f"data_file is '{data_file}', where",
        )
    else:
        rows, name = _from_hub(data, source, split), f"data is '{data}', where"
    problems = _read(rows, source, name)
    if split == ALL or (source.splits and not data_file):
        return problems
    return cut(problems, split)


def training_problems(
    data: str, seed: int, data_file: str = "", split: str = "train"
) -> Iterator[Problem]:
    """Endless training stream: stories, or the problems of a split, shuffled anew in every pass.

    Equal arguments give equal streams, so step n of a run always gets the same prompts. Real data
    is read here, before the first problem is drawn. Raises the same errors as
    :func:`load_problems`.
    """
    check_data(data, split, data_file)
    if data == "stories":
        return stories(split, seed)
    return shuffled(load_problems(data, split, data_file), data, seed)


def shuffled(problems: Sequence[Problem], data: str, seed: int) -> Iterator[Problem]:
    """Endless stream of these problems, shuffled anew in every pass; ``data`` is their name."""
    for epoch in itertools.count():
        order = list(problems)
        random.Random(f"{data}/{seed}/{epoch}").shuffle(order)
        yield from order


def cut(problems: list[Problem], split: str) -> list[Problem]:
    """One split of problems that have none: tune and test get a tenth each, train gets the rest.

    The hash of a question decides its split, with a fixed seed. So the seed of a run never moves a
    test problem into training, and a question that occurs twice in a file is in one split only. The
    splits depend on the set of questions, not on their order.

    Raises:
        ValueError: for fewer than three different questions.
    """
    questions = sorted(
        {problem.question for problem in problems},
        key=lambda question: hashlib.sha256(f"split/0/{question}".encode()).digest(),
    )
    if len(questions) < 3:
        raise ValueError(
            f"problems must hold at least three different questions to be cut into train, tune and "
            f"test, got {len(questions)}; the split '{ALL}' takes any number"
        )
    tenth = max(1, len(questions) // 10)
    chosen = {
        "test": questions[:tenth],
        "tune": questions[tenth : 2 * tenth],
        "train": questions[2 * tenth :],
    }
    kept = set(chosen[split])
    return [problem for problem in problems if problem.question in kept]


def _read(rows: Iterable[tuple[str, Any]], source: Source, name: str) -> list[Problem]:
    """Problems of all rows; a row is ``(its place for messages, its object or JSON text)``."""
    problems, bad, count = [], [], 0
    seen: set[str] = set()
    for place, row in rows:
        count += 1
        try:
            row = json.loads(row) if isinstance(row, str) else row
            question, answer = source.read(row)
        except (json.JSONDecodeError, RecursionError):  # the latter for JSON nested a thousand deep
            bad.append(f"{place} (not valid JSON)")
            continue
        except ValueError as error:
            bad.append(f"{place} ({error})")
            continue
        if source.limit is not None:
            if question in seen:
                continue
            if len(seen) == source.limit:
                break
            seen.add(question)
        problems.append(Problem(question, answer, system=source.system))
    if bad:
        shown = ", ".join(bad[:5]) + (", ..." if len(bad) > 5 else "")
        raise ValueError(
            f"{name} {len(bad)} of {count} rows can't be used: {shown}; "
            f"repair or remove them (a row holds {source.fields})."
        )
    if not problems:
        raise ValueError(f"{name} there are no problems; a row holds {source.fields}.")
    return problems


def rows_of_file(path: Path) -> Iterator[tuple[str, object]]:
    """Place and row (object or JSON text) of every row; ValueError for an unreadable file."""
    if path.suffix.lower() == ".parquet":
        import pyarrow
        from pyarrow import parquet

        try:
            # Read batch by batch: the original DAPO file repeats its problems a hundred times.
            with parquet.ParquetFile(path) as file:
                rows = (row for batch in file.iter_batches(4096) for row in batch.to_pylist())
                for number, row in enumerate(rows, start=1):
                    yield f"row {number}", row
        except (OSError, pyarrow.ArrowException) as error:
            raise ValueError(f"data_file is '{path}', which is not a Parquet file.") from error
        return
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"data_file is '{path}', which is not UTF-8 text ({error}).") from error
    if path.suffix.lower() == ".jsonl":
        # splitlines would also cut at separators that JSON allows within its strings.
        for number, line in enumerate(text.split("\n"), start=1):
            if line.strip():
                yield f"line {number}", line
        return
    try:
        rows = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(
            f"data_file is '{path}', which is not valid JSON (line {error.lineno}: {error.msg}); "
            "name a file with one object per line .jsonl."
        ) from error
    except (ValueError, RecursionError) as error:  # a number of 5,000 digits, or very deep nesting
        raise ValueError(
            f"data_file is '{path}', which can't be read as JSON ({error})."
        ) from error
    if not isinstance(rows, list):
        raise ValueError(f"data_file must hold a list of rows, got '{path}', which has no list")
    for number, row in enumerate(rows, start=1):
        yield f"row {number}", row


def _from_hub(data: str, source: Source, split: str) -> Iterator[tuple[str, object]]:
    # Imported only when needed: it imports pandas and Arrow, which takes a second.
    import datasets
    import huggingface_hub

    from iapo_mini.hub import reaching

    huggingface_hub.utils.logging.set_verbosity_error()  # it reports each of its retries
    repository, config = source.hub
    part = source.splits.get(split, "train")
    with reaching(repository) as unreached:
        try:
            found = datasets.load_dataset(repository, config, split=part)
        except Exception as error:  # the hub's client may raise anything; the advice is the same
            reason = unreached or first_line(error)
            raise ValueError(
                f"data is '{data}', and '{repository}' can't be loaded from the hub ({reason}); "
                "connect to the network, or name a local copy with --data-file (data_file)."
            ) from error
    return ((f"row {number}", row) for number, row in enumerate(found, start=1))
