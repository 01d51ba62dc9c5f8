"""What surrounds a completion: the prompt of the chat template, and the token that ends a turn.

Model families differ here in ways that are silent and fatal. A turn may end with a token that is
nowhere named as special, a template may know no system turn, it may begin the thinking itself, and
a tokenizer may write a space before a text that goes on where another ended. Whatever depends on
such a habit asks this module.
"""

from __future__ import annotations

import contextlib
import re
import sys
import time
import weakref
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from iapo_mini.errors import first_line
from iapo_mini.tasks import Problem, messages

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_KNOWN: weakref.WeakKeyDictionary[Any, dict[str, Any]] = weakref.WeakKeyDictionary()
"""Tokenizer -> what has been found out about it, and for which template."""

_PREFILL = re.compile(r"<think>\s*\Z")
_QUESTION, _ANSWER = "1 + 1?", "An answer."
_LIMIT = 100_000  # characters that a template may make of a short question
_SPACE = "\u2581"  # how SentencePiece writes the space before a word


PATIENCE = 5.0
"""Seconds that a chat template may take; those in use take milliseconds."""


@contextlib.contextmanager
def _within_seconds(seconds: float) -> Iterator[None]:
    """Raise TimeoutError in Python code of this thread that is still at it after so many seconds.

    A template is a program from a stranger, and its sandbox counts no loops. Watching each line is
    the one way that works in every thread and on every system, and leaves no process behind.
    """
    end, before = time.monotonic() + seconds, sys.gettrace()

    def watch(frame: Any, event: str, given: Any) -> Any:
        if time.monotonic() > end:
            raise TimeoutError
        return watch

    sys.settrace(watch)
    try:
        yield
    finally:
        sys.settrace(before)


def render(tokenizer: PreTrainedTokenizerBase, turns: list[dict[str, str]], prompt: bool) -> str:
    """Turns as the chat template writes them, with or without the opening of an answer.

    Raises:
        ValueError: when the tokenizer has no chat template, or it can't be used.
    """
    name = tokenizer.name_or_path
    if not tokenizer.chat_template:
        raise ValueError(
            f"model is '{name}', whose tokenizer has no chat template; take an instruction-tuned "
            "model, or set tokenizer.chat_template and save it beside the model."
        )
    try:
        with _within_seconds(PATIENCE):
            return str(
                tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=prompt)
            )
    except TimeoutError as error:
        raise ValueError(
            f"model is '{name}', whose chat template takes more than {PATIENCE:g} seconds to write "
            "a question; repair chat_template in its tokenizer, or take another model."
        ) from error
    except Exception as error:  # a template may raise anything, RecursionError and MemoryError, too
        if turns[0]["role"] == "system":  # older Mistral, Gemma: no such role
            first, second, *rest = turns
            told = {"role": "user", "content": f"{first['content']}\n\n{second['content']}"}
            return render(tokenizer, [told, *rest], prompt)
        raise ValueError(
            f"model is '{name}', whose chat template can't write a question ({first_line(error)}); "
            "repair chat_template in its tokenizer, or take another model."
        ) from error


def render_prompt(tokenizer: PreTrainedTokenizerBase, problem: Problem) -> str:
    """The prompt text up to where the completion begins, by the tokenizer's chat template.

    A template without a system role gets the system text before the question. Raises as
    :func:`render`.
    """
    return render(tokenizer, messages(problem), True)


def prefill(tokenizer: PreTrainedTokenizerBase) -> str:
    """What the template itself writes of the completion: ``<think>`` and a line break, or nothing.

    R1 distillations end their prompt so. It stands in the prompt and is judged with the completion.
    """
    return str(_found(tokenizer)["prefill"])


def without_prefill(tokenizer: PreTrainedTokenizerBase, completion: str) -> str:
    """A completion without the beginning that the template writes itself."""
    given = prefill(tokenizer)
    if completion.startswith(given):
        return completion[len(given) :]
    return completion.removeprefix(given.strip()).lstrip()


def end_of_turn(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Id of the token that follows an assistant's turn in the template; None if there is none.

    Only a token that was added as one counts: a template may also go on with a plain line break.
    """
    found: int | None = _found(tokenizer)["end"]
    return found


def _found(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    known = _KNOWN.setdefault(tokenizer, {})
    if known.get("template") != tokenizer.chat_template or "end" not in known:
        known.clear()
        known["template"] = tokenizer.chat_template
        known["prefill"], known["end"] = "", None
        if tokenizer.chat_template:
            match = _PREFILL.search(_tried(tokenizer))
            known["prefill"] = "" if match is None else match[0]
            known["end"] = _token_after_an_answer(tokenizer)
    return known


def _tried(tokenizer: PreTrainedTokenizerBase) -> str:
    """What the template makes of a short question, refused where it would spoil every prompt."""
    prompt = render_prompt(tokenizer, Problem(_QUESTION, "2"))
    if _QUESTION not in prompt or len(prompt) > _LIMIT:
        told = "leaves out the question"
        if _QUESTION in prompt:
            told = f"makes {len(prompt):,} characters of the question '{_QUESTION}'"
        raise ValueError(
            f"model is '{tokenizer.name_or_path}', whose chat template {told}; repair "
            "chat_template in its tokenizer, or take another model."
        )
    return prompt


def _token_after_an_answer(tokenizer: PreTrainedTokenizerBase) -> int | None:
    turns = [{"role": "user", "content": _QUESTION}, {"role": "assistant", "content": _ANSWER}]
    try:
        _, _, rest = render(tokenizer, turns, False).rpartition(_ANSWER)
    except ValueError:  # a template that writes prompts only
        return None
    ids = tokenizer.encode(rest, add_special_tokens=False) if rest else []
    added = set(tokenizer.added_tokens_decoder) | set(tokenizer.all_special_ids)
    return ids[0] if ids and ids[0] in added else None


def _writes_spaces(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether this is a tokenizer whose words carry the space before them, and lose it alone."""
    known = _KNOWN.setdefault(tokenizer, {})
    if "spaces" not in known:
        tokens = tokenizer.convert_ids_to_tokens(tokenizer.encode("a b", add_special_tokens=False))
        known["spaces"] = any(_SPACE in token for token in tokens)
    return bool(known["spaces"])


def continuation_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Token ids of a text that goes on where another ended.

    SentencePiece tokenizers put a space before whatever they encode; here it is left out.
    """
    ids: list[int] = tokenizer.encode(text, add_special_tokens=False)
    if not ids or not _writes_spaces(tokenizer):
        return ids
    for anchor in ("\n", ".", ":", "0", "a"):
        before = tokenizer.encode(anchor, add_special_tokens=False)
        both = tokenizer.encode(anchor + text, add_special_tokens=False)
        if both[: len(before)] == before and len(both) > len(before):
            return both[len(before) :]
    return ids


def token_texts(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> list[str]:
    """The text of each token as it stands after another one; joined, the text of all of them."""
    if not _writes_spaces(tokenizer):
        return [str(tokenizer.decode([i], skip_special_tokens=False)) for i in ids]
    known = _KNOWN[tokenizer].setdefault("texts", {})
    anchor = tokenizer.encode("a", add_special_tokens=False)
    before = str(tokenizer.decode(anchor, skip_special_tokens=False))
    for i in set(ids) - known.keys():
        text = str(tokenizer.decode([*anchor, i], skip_special_tokens=False))
        known[i] = text[len(before) :] if text.startswith(before) else text
    return [known[i] for i in ids]
