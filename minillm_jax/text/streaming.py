"""Tokens to text as they come: whole characters only, and nothing past a stop string.

A character may be spread over tokens, and a stop string over many: text is released
once nothing that follows can change it. What is released depends on the tokens alone,
not on how they arrive, so streamed and collected text are the same.
"""

from collections.abc import Sequence

from minillm_jax.text.tokenizer import Tokenizer

REPLACEMENT = "\ufffd"  # what decoders write for bytes that are no character (yet)
MAX_UTF8_BYTES = 4  # of a character
MAX_HELD_TOKENS = 16  # then give up waiting: no character spans so many tokens


class Detokenizer:
    """Incremental `tokenizer.decode`, in windows of a few tokens.

        tokens of the window     [ shown | new ]      `shown` only gives context: how a
        decode(shown + new)      "...the| cat"        token reads may depend on the one
                                         ^ released   before it

    The pieces add up to `tokenizer.decode` of all tokens wherever that works through
    bytes from left to right. (The ByteFallback decoder does not where bytes are broken:
    one bad byte turns all those around it into U+FFFD, the good ones before it too.)
    """

    def __init__(self, tokenizer: Tokenizer):
        self._decode = tokenizer.decode
        self._window: list[int] = []
        self._num_shown = 0
        self._shown = ""  # decode(window[:num_shown])

    def push(self, token: int) -> str:
        """The text that `token` completes; "" while a character is not whole."""
        # Twice, because a lone "\u2581" decodes to "" too: leading spaces are stripped.
        if not self._decode([token, token]):
            return ""  # a special token, which no window would get past
        self._window.append(token)
        text = self._decode(self._window)
        if text.endswith(REPLACEMENT):
            waiting = len(self._window) - self._num_shown
            return self._release_broken(text) if waiting > MAX_HELD_TOKENS else ""
        released = text[len(self._shown) :]
        if released:
            self._window = self._window[self._num_shown :]
            self._num_shown = len(self._window)
            self._shown = self._decode(self._window)
        return released

    def flush(self) -> str:
        """What has been held back; the tokens are over."""
        released = self._decode(self._window)[len(self._shown) :]
        self._window, self._num_shown, self._shown = [], 0, ""
        return released

    def _release_broken(self, text: str) -> str:
        """All but the last tokens, if the text falls apart in two before them."""
        for length in range(1, MAX_UTF8_BYTES + 1):
            head = self._decode(self._window[:-length])
            if head + self._decode(self._window[-length:]) == text:
                released = head[len(self._shown) :]
                self._window, self._num_shown = self._window[-length:], 0
                self._shown = ""
                return released
        return ""


class StopStrings:
    """Text up to the first stop string to be completed, which is not part of it."""

    def __init__(self, stop: Sequence[str]):
        self._stop = tuple(stop)
        self._held = ""  # may be the beginning of a stop string
        self.stopped = False

    def push(self, text: str) -> str:
        """The text that is certain to come before any stop string."""
        if self.stopped:
            return ""
        held = self._held + text
        # The one that is completed first; of several at once, the longest. Whatever
        # comes in one go: "abc" with the stops "abc" and "b" ends at "b".
        found = [stop for stop in self._stop if stop in held]
        if found:
            first = min(found, key=lambda s: (held.find(s) + len(s), -len(s)))
            self.stopped, self._held = True, ""
            return held[: held.find(first)]
        keep = self._longest_beginning(held)
        self._held = held[len(held) - keep :]
        return held[: len(held) - keep]

    def flush(self) -> str:
        """What has been held back; the text is over."""
        held, self._held = self._held, ""
        return held

    def _longest_beginning(self, text: str) -> int:
        """Characters at the end of `text` that begin a stop string."""
        longest = max((len(stop) for stop in self._stop), default=1) - 1
        for length in range(min(longest, len(text)), 0, -1):
            if any(stop.startswith(text[-length:]) for stop in self._stop):
                return length
        return 0


class TextStream:
    """One row's text: a Detokenizer, then StopStrings."""

    def __init__(self, tokenizer: Tokenizer | None, stop: Sequence[str] = ()):
        self._detokenizer = None if tokenizer is None else Detokenizer(tokenizer)
        self._stop = StopStrings(stop)

    @property
    def stopped(self) -> bool:
        """Whether a stop string was completed."""
        return self._stop.stopped

    def push(self, token: int) -> str:
        """Text that is released by `token`; "" without a tokenizer."""
        if self._detokenizer is None:
            return ""
        return self._stop.push(self._detokenizer.push(token))

    def flush(self) -> str:
        """Text that was held back, as far as it comes before a stop string."""
        if self._detokenizer is None:
            return ""
        return self._stop.push(self._detokenizer.flush()) + self._stop.flush()
