"""Text from tokens that come one by one, and where it ends: the same on stage 0 and in a front. Needs no torch."""

from collections.abc import Callable, Sequence

Decode = Callable[[Sequence[int]], str]
"""A tokenizer's decoding; what is not yet a whole character may come out as the replacement character."""

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"

HELD_TOKENS = 32
"""Most tokens without text, so that a token costs the same however much a model writes that is no text."""


class IncrementalText:
    """Decodes a growing list of tokens.

    The texts that ``add`` and ``rest`` return, joined, are the text of all tokens. A character whose bytes are spread
    over several tokens comes with the last of them.
    """

    def __init__(self, decode: Decode) -> None:
        self._decode = decode
        self._told: list[int] = []
        """The tokens of the text that was returned last: a tokenizer treats what follows as inside a text (leading
        spaces, merges). A cut elsewhere could fall within a character.
        """
        self._held: list[int] = []
        """Tokens since then. While their text ends with a replacement, more bytes may change all of it: tokenizers
        that fall back to bytes take a whole run of bytes for broken until its last character is complete.
        """

    def add(self, token: int) -> str:
        """Take the next token; return the text that is certain now and was not before, perhaps none."""
        self._held.append(token)
        text = self._new()
        return "" if text.endswith(REPLACEMENT) and len(self._held) < HELD_TOKENS else self._tell(text)

    def rest(self) -> str:
        """Return what was held back, when no more tokens come."""
        return self._tell(self._new())

    def _new(self) -> str:
        return self._decode(self._told + self._held)[len(self._decode(self._told)) :]

    def _tell(self, text: str) -> str:
        if text:
            self._told, self._held = self._held, []
        return text


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
