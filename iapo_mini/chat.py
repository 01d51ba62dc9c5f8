"""The text around a completion: the prompt of the chat template, and the token that ends a turn.

Model families differ here, and a difference that is overlooked spoils a run without any error. A
turn may end with a token that is not marked as special. A template may have no system turn, or may
write the opening ``<think>`` itself. A tokenizer may add a space before a text that continues
another one. All code that depends on such a difference uses this module.
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
"""Tokenizer -> facts found out about it, and the template that they hold for."""

_PREFILL = re.compile(r"<think>\s*\Z")
_QUESTION, _ANSWER = "1 + 1?", "An answer."
_LIMIT = 100_000  # largest number of characters in the prompt of a short question
_NO_CHARACTER = "\ufffd"  # what bytes that are no whole character are decoded to
_MOST_BYTES = 4  # of a character in UTF-8
_SPACE = "\u2581"  # SentencePiece's sign for the space before a word


PATIENCE = 5.0
"""Seconds that a chat template may take. The templates in common use take milliseconds."""


@contextlib.contextmanager
def _within_seconds(seconds: float) -> Iterator[None]:
    """Raise TimeoutError in this thread's Python code if it runs longer than ``seconds``.

    A template is a program by a stranger, and its sandbox does not limit loops. A trace function
    that checks the clock at each line works in every thread and on every system, and it leaves no
    process behind.
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
    """Write turns with the chat template, with or without the opening of an answer.

    Raises:
        ValueError: when the tokenizer has no chat template, or the template can't be used.
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
    except Exception as error:  # a template may raise anything, even RecursionError or MemoryError
        if turns[0]["role"] == "system":  # older Mistral and Gemma have no such role
            first, second, *rest = turns
            told = {"role": "user", "content": f"{first['content']}\n\n{second['content']}"}
            return render(tokenizer, [told, *rest], prompt)
        raise ValueError(
            f"model is '{name}', whose chat template can't write a question ({first_line(error)}); "
            "repair chat_template in its tokenizer, or take another model."
        ) from error


def render_prompt(tokenizer: PreTrainedTokenizerBase, problem: Problem) -> str:
    """Write the prompt of a problem with the tokenizer's chat template.

    The text ends where the completion begins. If the template has no system role, the system text
    is put before the question. Raises the same errors as :func:`render`.
    """
    return render(tokenizer, messages(problem), True)


def prefill(tokenizer: PreTrainedTokenizerBase) -> str:
    """The start of the completion that the template writes itself, or an empty text.

    The templates of R1 distillations end the prompt with ``<think>`` and a line break. This text
    is part of the prompt, but rewards judge it together with the completion.
    """
    return str(_found(tokenizer)["prefill"])


def without_prefill(tokenizer: PreTrainedTokenizerBase, completion: str) -> str:
    """A completion without the start that the template writes itself."""
    given = prefill(tokenizer)
    if completion.startswith(given):
        return completion[len(given) :]
    return completion.removeprefix(given.strip()).lstrip()


def end_of_turn(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Id of the token that the template puts after an assistant's turn; None if there is none.

    Only special and added tokens count, because a template may also put a plain line break there.
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
    """The prompt of a short question; ValueError if it is huge or lacks the question."""
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
    except ValueError:  # the template can only write prompts
        return None
    ids = tokenizer.encode(rest, add_special_tokens=False) if rest else []
    added = set(tokenizer.added_tokens_decoder) | set(tokenizer.all_special_ids)
    return ids[0] if ids and ids[0] in added else None


def _writes_spaces(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the tokenizer keeps the space before a word in the word's token (SentencePiece).

    Such a tokenizer drops that space when it decodes the token alone.
    """
    known = _KNOWN.setdefault(tokenizer, {})
    if "spaces" not in known:
        tokens = tokenizer.convert_ids_to_tokens(tokenizer.encode("a b", add_special_tokens=False))
        known["spaces"] = any(_SPACE in token for token in tokens)
    return bool(known["spaces"])


def continuation_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Token ids of a text that continues another text.

    SentencePiece tokenizers add a space before every text that they encode. Here it is left out.
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
    """The text of each token when it follows another token; joined, they give the whole text.

    Tokens of bytes may split a character. Then the last of its tokens has the character, and those
    before it have an empty text.
    """
    texts: list[str] = []
    parts: list[int] = []  # tokens of a character that is not whole yet
    for i in ids:
        parts.append(i)
        text = _text_after_another(tokenizer, tuple(parts))
        whole = not text.endswith(_NO_CHARACTER) or len(parts) == _MOST_BYTES
        texts.append(text if whole else "")
        parts = [] if whole else parts
    if parts:
        texts[-1] = text
    return texts


def _text_after_another(tokenizer: PreTrainedTokenizerBase, ids: tuple[int, ...]) -> str:
    """The text of these tokens when they follow another token."""
    spaces = _writes_spaces(tokenizer)
    known = _KNOWN[tokenizer].setdefault("texts", {})
    if ids not in known:
        anchor = tokenizer.encode("a", add_special_tokens=False) if spaces else []
        before = str(tokenizer.decode(anchor, skip_special_tokens=False))
        text = str(tokenizer.decode([*anchor, *ids], skip_special_tokens=False))
        known[ids] = text.removeprefix(before)
    return str(known[ids])
