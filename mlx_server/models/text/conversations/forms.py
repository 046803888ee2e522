"""How templates want calls and results handed to them."""

import hashlib
import json
import string
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import product
from typing import Any

Message = dict[str, Any]
Messages = list[Message]
NewId = Callable[[str, str, int], str]
"""From a call's own id, its name and number."""

LETTERS = string.digits + string.ascii_letters
SHORT = 9


def _own_id(own: str, name: str, number: int) -> str:
    return own


def _short_id(own: str, name: str, number: int) -> str:
    """Nine letters or digits, as Mistral's templates demand."""
    if len(own) == SHORT and all(one in LETTERS for one in own):
        return own
    rest = int.from_bytes(hashlib.sha256(own.encode(errors="replace")).digest()[:8])
    letters = []
    for _ in range(SHORT):
        rest, digit = divmod(rest, len(LETTERS))
        letters.append(LETTERS[digit])
    return "".join(letters)


def _counted_id(own: str, name: str, number: int) -> str:
    """Kimi's, whose templates show a call's name nowhere else."""
    return f"functions.{name}:{number}"


@dataclass(frozen=True, slots=True)
class CallForm:
    """`text`: arguments are JSON, not an object. `named`: results have their call's name. `blank`:
    the content of an answer of calls only is not empty. `parts`: that of results is a list.
    """

    new_id: NewId = _own_id
    text: bool = False
    named: bool = False
    blank: bool = False
    parts: bool = False

    def given(self, messages: Messages) -> Messages:
        return messages if self == CallForm() else list(_Giving(self).given(messages))


def call_forms() -> Iterator[CallForm]:
    """The usual one first, then those that differ the least."""
    ids: tuple[NewId, ...] = (_own_id, _short_id, _counted_id)
    choices = product((False, True), repeat=4)
    forms = (CallForm(new_id, *more) for new_id, more in product(ids, choices))
    return iter(sorted(forms, key=_changes))


def _changes(form: CallForm) -> int:
    # Names of results must not stand in for a call's that is shown as its id alone.
    return (form.new_id is not _own_id) + form.text + 2 * form.named + form.blank + form.parts


def _stray_id(form: CallForm, own: str) -> str:
    return _short_id(own, "", 0) if form.new_id is _short_id else own


@dataclass(slots=True)
class _Giving:
    """Follows a conversation, since clients use ids again."""

    form: CallForm
    calls: int = 0
    ids: dict[str, str] = field(default_factory=dict)
    names: dict[str, str] = field(default_factory=dict)

    def given(self, messages: Messages) -> Iterator[Message]:
        for message in messages:
            if message.get("tool_calls"):
                yield self._answer(message)
            elif message.get("role") == "tool":
                yield self._result(message)
            else:
                yield message

    def _answer(self, message: Message) -> Message:
        given = {**message, "tool_calls": [self._call(one) for one in message["tool_calls"]]}
        if self.form.blank:
            given["content"] = message.get("content") or " "
        return given

    def _call(self, call: dict[str, Any]) -> dict[str, Any]:
        own, function = str(call.get("id")), call.get("function") or {}
        name = str(function.get("name"))
        self.ids[own] = self.form.new_id(own, name, self.calls)
        self.names[own] = name
        self.calls += 1
        if self.form.text and not isinstance(function.get("arguments"), str):
            arguments = json.dumps(function.get("arguments"), ensure_ascii=False)
            function = {**function, "arguments": arguments}
        return {**call, "id": self.ids[own], "function": function}

    def _result(self, message: Message) -> Message:
        own = str(message.get("tool_call_id"))
        new = self.ids[own] if own in self.ids else _stray_id(self.form, own)
        given = {**message, "tool_call_id": new}
        if self.form.named and own in self.names and not message.get("name"):
            given["name"] = self.names[own]
        if self.form.parts and isinstance(given.get("content"), str):
            given["content"] = [{"type": "text", "text": given["content"]}]
        return given
