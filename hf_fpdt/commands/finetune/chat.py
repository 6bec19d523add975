"""Conversations as tokens and labels: the tokenizer's own chat template, and a loss on what the assistant says alone.

Which tokens the assistant says is known from the template's generation marks. Where it has none, TRL's version of the
template has them for many models, if TRL is installed; else each turn is rendered without and with what follows it,
which says so where a template only ever adds at the end. Where it does not, the conversation is refused.
"""

from __future__ import annotations

import importlib
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from jinja2 import TemplateError

from ...labels import IGNORE_INDEX
from ..options import UserMistake, one_line

Tokens = tuple[list[int], list[int]]  # ids and labels
CHAT_COLUMNS = ("messages", "tools", "prompt", "completion")
_MARKS = re.compile(r"\{%-?\s*generation\s*-?%\}")
# A template that wants more of a message than it has, or refuses it.
_NO_RENDERING = (TemplateError, TypeError, ValueError, LookupError, AttributeError)


def conversation_of(fields: Mapping[str, Any], where: str) -> str | None:
    """A row's conversation, or prompt and completion, as JSON; None where it has neither.

    Raises:
        UserMistake: it is none.
    """
    if fields.get("messages") is not None:
        found: dict[str, Any] = {"messages": _messages(fields["messages"], where, "messages")}
    elif fields.get("prompt") is not None and fields.get("completion") is not None:
        parts = {name: _parsed(fields[name], text_alone=True) for name in ("prompt", "completion")}
        if all(isinstance(part, str) for part in parts.values()):
            return json.dumps(parts, ensure_ascii=False)
        found = {name: _messages(part, where, name) for name, part in parts.items()}
    else:
        return None
    tools = _parsed(fields.get("tools"))
    return json.dumps({**found, **({"tools": _without_none(tools)} if tools else {})}, ensure_ascii=False)


def _messages(value: Any, where: str, column: str) -> list[dict[str, Any]]:
    value = _parsed(value)
    if not isinstance(value, list) or not value or not all(isinstance(m, dict) and m.get("role") for m in value):
        raise UserMistake(
            f"data: {where}, column {column!r} holds no list of messages, each with a role; give "
            '[{"role": "user", "content": "..."}, ...], as text or as a list'
        )
    return [{"content": "", **_without_none(message)} for message in value]


def _parsed(value: Any, *, text_alone: bool = False) -> Any:
    """What a text or bytes hold as JSON; with `text_alone` a text that is none stays one."""
    if isinstance(value, bytes):
        value = value.decode("utf-8-sig", errors="replace")
    if not isinstance(value, str) or (text_alone and not value.lstrip().startswith(("[{", "[ {"))):
        return value
    try:
        return json.loads(value)
    except ValueError:
        return value


def _without_none(value: Any) -> Any:
    """Tables fill in None for what another row's messages have."""
    if isinstance(value, dict):
        return {key: _without_none(each) for key, each in value.items() if each is not None}
    return [_without_none(each) for each in value] if isinstance(value, list) else value


class Conversations:
    """Renders conversations with one tokenizer.

    Raises:
        UserMistake: it has no chat template.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self._template: str | None = None  # None: the tokenizer's own

    def tokens(self, text: str, name: str) -> Tokens:
        """Ids and labels of what `conversation_of` gave; a prompt, and what others say, has no labels.

        Raises:
            UserMistake: the template can't render it, or does not say which tokens are the assistant's.
        """
        record = json.loads(text)
        if isinstance(record.get("prompt"), str):
            return self._completed(record["prompt"], record["completion"])
        prompt = record.get("prompt", [])
        messages = [*prompt, *record["completion"]] if "completion" in record else record["messages"]
        self._check_template()
        try:
            ids, labels = self._rendered(messages, record.get("tools"), len(prompt))
        except _NO_RENDERING as error:
            raise UserMistake(
                f"data: document {name}: the chat template can't render it: {one_line(error)}; mend the messages, or "
                "the template"
            ) from error
        if ids is None:
            raise UserMistake(
                f"data: document {name}: the chat template renders an earlier turn otherwise once more follows, and "
                "has no {% generation %} marks, so which tokens the assistant said is not known; install trl, which "
                "has marked templates for many models, or put marks into tokenizer.chat_template"
            )
        return ids, labels

    def _completed(self, prompt: str, completion: str) -> Tokens:
        eos = self.tokenizer.eos_token_id
        before = self.tokenizer(prompt, verbose=False)["input_ids"]
        before = before[:-1] if before and before[-1] == eos else before
        after = self.tokenizer(completion, add_special_tokens=False, verbose=False)["input_ids"]
        after = after if after and after[-1] == eos else [*after, eos]
        return [*before, *after], [IGNORE_INDEX] * len(before) + after

    def _check_template(self) -> None:
        if getattr(self.tokenizer, "chat_template", None) is None:
            raise UserMistake(
                "--model: the tokenizer has no chat template, and the data are conversations; set "
                "tokenizer.chat_template, or give a column of text with --text_column"
            )

    def _rendered(self, messages: list[Any], tools: Any, first: int) -> tuple[list[int] | None, list[int]]:
        """Ids, None where their owners can't be told, and labels of the assistant's from message `first` on."""
        marked = self._marked_template()
        if marked is not None:
            options = {"return_assistant_tokens_mask": True, "return_dict": True, "chat_template": marked}
            found = self._render(messages, tools, **options)
            ids, mask = found["input_ids"], found["assistant_masks"]
            start = len(self._ids(messages[:first], tools, chat_template=marked)) if first else 0
            said = (bool(own) and place >= start for place, own in enumerate(mask))
            return ids, [token if own else IGNORE_INDEX for token, own in zip(ids, said, strict=True)]
        ids = self._ids(messages, tools)
        labels = [IGNORE_INDEX] * len(ids)
        for index in range(first, len(messages)):
            if messages[index]["role"] != "assistant":
                continue
            before = self._ids(messages[:index], tools, add_generation_prompt=True)
            after = self._ids(messages[: index + 1], tools)
            if ids[: len(after)] != after or after[: len(before)] != before:
                return None, labels
            labels[len(before) : len(after)] = ids[len(before) : len(after)]
        return ids, labels

    def _ids(self, messages: Sequence[Any], tools: Any, **options: Any) -> list[int]:
        return list(self._render(messages, tools, return_dict=True, **options)["input_ids"]) if messages else []

    def _render(self, messages: Sequence[Any], tools: Any, **options: Any) -> Any:
        return self.tokenizer.apply_chat_template(list(messages), tools=tools, tokenize=True, **options)

    def _marked_template(self) -> str | None:
        """A template with generation marks: the tokenizer's own, or TRL's for it."""
        if self._template is None:
            own = self.tokenizer.chat_template
            own = own.get("default", "") if isinstance(own, dict) else own
            self._template = own if _MARKS.search(own) else (_trls_template(self.tokenizer) or "")
        return self._template or None


def _trls_template(tokenizer: Any) -> str | None:
    try:
        templates = importlib.import_module("trl.chat_template_utils")
        found = templates.get_training_chat_template(tokenizer)
    except (ImportError, AttributeError, TypeError, ValueError):
        return None
    return found if found is not None and _MARKS.search(found) else None
