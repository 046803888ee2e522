"""Stop strings in streaming text."""

import re
from collections import deque
from collections.abc import Sequence


class StopMatcher:
    """Passes text on until the first stop string; of several ending together, the longest counts.

    An Aho–Corasick automaton ("Efficient string matching", CACM 18(6), 1975): states are prefixes
    of the stop strings, the current one the longest suffix of the text. That much is held back.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._next: list[dict[str, int]] = [{}]
        self._fallback = [0]
        self._depth = [0]
        self._match = [0]
        """By state: length of the longest stop string ending there."""
        for stop in filter(None, stops):
            self._add(stop)
        self._link()
        self._first = re.compile("|".join(map(re.escape, self._next[0]))) if self._next[0] else None
        self._state = 0
        self._held = ""
        self.found: str | None = None
        """The stop string that ended the text."""

    def push(self, text: str) -> tuple[str, bool]:
        """The text to show now, and whether a stop string ended it."""
        if self._first is None:
            return text, False
        state, position = self._state, 0
        if state == 0:
            found = self._first.search(text)
            if found is None:
                return text, False
            position = found.start()
        for end in range(position, len(text)):
            state = self._step(state, text[end])
            if self._match[state]:
                whole = self._held + text[: end + 1]
                self._state, self._held = 0, ""
                start = len(whole) - self._match[state]
                self.found = whole[start:]
                return whole[:start], True
        whole = self._held + text
        certain = len(whole) - self._depth[state]
        self._state, self._held = state, whole[certain:]
        return whole[:certain], False

    def flush(self) -> str:
        """The text held back; matching restarts."""
        held = self._held
        self._state, self._held = 0, ""
        return held

    def _step(self, state: int, character: str) -> int:
        while state and character not in self._next[state]:
            state = self._fallback[state]
        return self._next[state].get(character, 0)

    def _add(self, stop: str) -> None:
        state = 0
        for depth, character in enumerate(stop, start=1):
            if character not in self._next[state]:
                self._next[state][character] = len(self._next)
                self._next.append({})
                self._fallback.append(0)
                self._depth.append(depth)
                self._match.append(0)
            state = self._next[state][character]
        self._match[state] = len(stop)

    def _link(self) -> None:
        """Link each state to its longest proper suffix state, breadth first."""
        queue = deque(self._next[0].values())
        while queue:
            state = queue.popleft()
            for character, child in self._next[state].items():
                fallback = self._step(self._fallback[state], character)
                self._fallback[child] = fallback
                # The longest one that ends here started first.
                self._match[child] = self._match[child] or self._match[fallback]
                queue.append(child)
