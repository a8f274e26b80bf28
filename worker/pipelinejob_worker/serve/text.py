"""Text from tokens that come one by one, and where it ends: the same on stage 0 and in a front. Needs no torch."""

from collections.abc import Callable, Sequence

Decode = Callable[[Sequence[int]], str]
"""A tokenizer's decoding; what is not yet a whole character may come out as the replacement character."""

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"

CONTEXT_TOKENS = 6
"""Tokens decoded before a new one, so that the tokenizer treats it as inside a text (leading spaces, merges)."""

WINDOW_TOKENS = 32
"""Most tokens decoded at a time, so that a token costs the same however long the text is."""


class IncrementalText:
    """Decodes a growing list of tokens.

    The texts that ``add`` and ``rest`` return, joined, are the text of all tokens. A character whose bytes are spread
    over several tokens comes with the last of them.
    """

    def __init__(self, decode: Decode) -> None:
        self._decode = decode
        self._window: list[int] = []
        self._told = 0
        """Characters of the window's text that have been returned."""

    def add(self, token: int) -> str:
        """Take the next token; return the text that is certain now and was not before, perhaps none."""
        self._window.append(token)
        # An unfinished character is the last one and comes out as one replacement.
        certain = self._decode(self._window).removesuffix(REPLACEMENT)
        new, self._told = certain[self._told :], len(certain)
        if len(self._window) == WINDOW_TOKENS:
            self._window = self._window[-CONTEXT_TOKENS:]
            self._told = len(self._decode(self._window).removesuffix(REPLACEMENT))
        return new

    def rest(self) -> str:
        """Return what was held back, when no more tokens come."""
        return self._decode(self._window)[self._told :]


class StopText:
    """Cuts a text before that one of several strings which is complete first, in whatever parts the text comes.

    ``add`` returns the text that cannot be the begin of one of them any more; ``stopped`` is set once one is complete,
    and what follows is ignored.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""
        self.stopped = False

    def add(self, text: str) -> str:
        """Take the next text and return what is certain not to be cut."""
        if self.stopped:
            return ""
        self._held += text
        found = [(place + len(stop), place) for stop in self._stops if (place := self._held.find(stop)) >= 0]
        if found:
            self.stopped = True
            certain, self._held = self._held[: min(found)[1]], ""
            return certain
        keep = max((self._overlap(stop) for stop in self._stops), default=0)
        certain, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return certain

    def rest(self) -> str:
        """Return what was held back, when no more text comes."""
        certain, self._held = self._held, ""
        return certain

    def _overlap(self, stop: str) -> int:
        """Length of the longest end of the text that is a begin of ``stop``."""
        longest = min(len(stop) - 1, len(self._held))
        return next((length for length in range(longest, 0, -1) if self._held.endswith(stop[:length])), 0)


class StopWatch:
    """Whether the text of the tokens contains one of several strings by now."""

    def __init__(self, decode: Decode, stops: Sequence[str]) -> None:
        self._text = IncrementalText(decode)
        self._stop = StopText(stops)

    def __call__(self, token: int) -> bool:
        """Take the next token."""
        self._stop.add(self._text.add(token))
        return self._stop.stopped
