# SPDX-License-Identifier: Apache-2.0
"""From tokens to text, piece by piece, with stop strings held back until they can't be."""

from collections.abc import Callable, Iterable

__all__ = ["TextStream"]

_PARTIAL = "\ufffd"  # what a decoder makes of half a character


class TextStream:
    """Turns tokens into text as they come; the pieces join to what all tokens decode to.

    Args:
      decode: ids to text.
      stops: strings that end the text; they are not part of it.

    >>> stream = TextStream(lambda ids: "".join(map(chr, ids)), stops=("END",))
    >>> [stream.push(map(ord, piece)) for piece in ("ab", "E", "Nc", "EN", "Dx")], stream.stopped
    (['ab', '', 'ENc', '', ''], True)
    """

    def __init__(self, decode: Callable[[Iterable[int]], str], stops: Iterable[str] = ()) -> None:
        self._decode, self._stops = decode, tuple(filter(None, stops))
        self._ids: list[int] = []
        self._start = self._done = 0  # decoders look back: text is what ids[start:] has beyond ids[start:done]
        self._held = ""
        self.stopped = False

    def push(self, ids: Iterable[int]) -> str:
        """More tokens in, the text that is certain out."""
        self._ids += ids
        return self._certain(self._new_text(last=False), last=False)

    def finish(self) -> str:
        """What was held back."""
        return self._certain(self._new_text(last=True), last=True)

    def _new_text(self, *, last: bool) -> str:
        before = self._decode(self._ids[self._start : self._done])
        after = self._decode(self._ids[self._start :])
        if not last and (after.endswith(_PARTIAL) or len(after) <= len(before)):
            return ""
        self._start, self._done = self._done, len(self._ids)
        return after[len(before) :]

    def _certain(self, text: str, *, last: bool) -> str:
        if self.stopped:
            return ""
        text, self._held = self._held + text, ""
        found = [at for stop in self._stops if (at := text.find(stop)) >= 0]
        if found:
            self.stopped = True
            return text[: min(found)]
        if last:
            return text
        longest = max((len(stop) for stop in self._stops), default=1) - 1
        for size in range(min(longest, len(text)), 0, -1):
            if any(stop.startswith(text[-size:]) for stop in self._stops):
                self._held = text[-size:]
                return text[:-size]
        return text
