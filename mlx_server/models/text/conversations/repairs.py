"""Ways to put a conversation so that a strict template takes it. None loses a text."""

from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from itertools import chain, groupby, takewhile
from typing import Any

from mlx_server.models.text.tool_prompts import result_message

Message = dict[str, Any]
Messages = list[Message]
Repair = Callable[[Messages], Messages]

NOTHING = " "
"""Said in a turn that is put in between; some templates refuse an empty one."""


def place_systems(messages: Messages) -> Messages:
    """The system messages that come first become one; later ones become the user's where they are,
    or else behind the results that stand there.
    """
    leading = list(takewhile(lambda one: one.get("role") == "system", messages))
    placed: Messages = [_joined(leading)] if leading else []
    waiting: Messages = []
    for message in messages[len(leading) :]:
        if message.get("role") == "system":
            waiting.append({**message, "role": "user"})
            continue
        if message.get("role") != "tool":
            placed += waiting
            waiting = []
        placed.append(message)
    return placed + waiting


def split_calls(messages: Messages) -> Messages:
    """One call a message, with its result right behind it."""
    split: Messages = []
    rest = deque(messages)
    while rest:
        message = rest.popleft()
        if len(message.get("tool_calls") or ()) < 2:
            split.append(message)
            continue
        results = list(takewhile(lambda one: one.get("role") == "tool", rest))
        for _ in results:
            rest.popleft()
        split += _calls_apart(message, results)
    return split


def drop_empty_answers(messages: Messages) -> Messages:
    return [one for one in messages if one.get("role") != "assistant" or _says_something(one)]


def tell_stray_results(messages: Messages) -> Messages:
    """Results that follow no call become the user's."""
    told: Messages = []
    called = False
    for message in messages:
        if message.get("role") == "tool" and not called:
            told.append(result_message(message))
            continue
        if message.get("role") != "tool":
            called = bool(message.get("tool_calls"))
        told.append(message)
    return told


def join_turns(messages: Messages) -> Messages:
    """Neighbouring messages of the user become one, and so do the assistant's."""
    joined: Messages = []
    for role, turns in groupby(messages, key=lambda one: one.get("role")):
        same = list(turns)
        apart = len(same) == 1 or role not in ("user", "assistant")
        joined += same if apart else [_joined(same)]
    return joined


def fold_system(messages: Messages) -> Messages:
    """The first system message goes into the user message behind it, or becomes one."""
    if not messages or messages[0].get("role") != "system":
        return messages
    told = {**messages[0], "role": "user"}
    if len(messages) > 1 and messages[1].get("role") == "user":
        return [_joined([told, messages[1]]), *messages[2:]]
    return [told, *messages[1:]]


def alternate(messages: Messages) -> Messages:
    """Turns that say nothing come in between, so that the user begins and roles alternate, calls
    and results left aside.
    """
    turns: Messages = []
    expected = "user"
    for message in messages:
        role = message.get("role")
        if role == "user" or (role == "assistant" and (not turns or not message.get("tool_calls"))):
            if role != expected:
                turns.append({"role": expected, "content": NOTHING})
            expected = "user" if role == "assistant" else "assistant"
            if message.get("tool_calls"):
                expected = "assistant"
        turns.append(message)
    return turns


REPAIRS: tuple[Repair, ...] = (
    place_systems,
    split_calls,
    drop_empty_answers,
    tell_stray_results,
    join_turns,
    fold_system,
    alternate,
)


def repaired(messages: Messages, repairs: Sequence[Repair], tries: int) -> Iterator[Messages]:
    """At most `tries` other conversations, made by `repairs` in their order, those that take the
    fewest first.
    """
    level: list[tuple[int, Messages]] = [(0, messages)]
    while level:
        following: list[tuple[int, Messages]] = []
        for first, made in level:
            for index, repair in enumerate(repairs[first:], start=first):
                if (other := repair(made)) == made:
                    continue
                if tries == 0:
                    return
                tries -= 1
                yield other
                following.append((index + 1, other))
        level = following


def _joined(messages: Messages) -> Message:
    """The first message with what the others say."""
    one: Message = {}
    for message in messages:
        one = {**message, **one}
    for key in ("content", "reasoning_content"):
        texts = [text for message in messages if (text := message.get(key))]
        if len(texts) > 1:
            one[key] = "\n\n".join(map(str, texts))
        elif texts:
            one[key] = texts[0]
    if calls := [call for message in messages for call in message.get("tool_calls") or ()]:
        one["tool_calls"] = calls
    return one


def _says_something(message: Message) -> bool:
    content = message.get("content")
    return bool(
        message.get("tool_calls") or (content.strip() if isinstance(content, str) else content)
    )


def _calls_apart(message: Message, results: Messages) -> Iterator[Message]:
    """Results go to the call of their id, others behind the last."""
    waiting: dict[Any, deque[Message]] = defaultdict(deque)
    for result in results:
        waiting[result.get("tool_call_id")].append(result)
    for call in message["tool_calls"]:
        yield {**message, "tool_calls": [call]}
        message = {"role": "assistant", "content": ""}
        if own := waiting[call.get("id")]:
            yield own.popleft()
    yield from chain.from_iterable(waiting.values())
