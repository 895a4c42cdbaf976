"""One reply on a terminal: streamed as it comes, with its rates afterwards."""

import dataclasses
import sys
import time
from collections.abc import Sequence
from typing import Any

import jax

from minillm_jax import progress
from minillm_jax.decoding.generator import STREAM_STEPS, Generator
from minillm_jax.decoding.requests import Completion
from minillm_jax.decoding.sampling import SamplingParams
from minillm_jax.decoding.stream import Session
from minillm_jax.planning import machine

# Control characters, which a terminal might obey, become pictures of themselves.
_PICTURES = {code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"}
_PICTURES |= {code: 0xFFFD for code in range(0x7F, 0xA0)}


class Reply:
    """A completion in the making; Ctrl-C ends it, and it keeps what there is."""

    def __init__(
        self,
        generator: Generator,
        prompt: Sequence[int],
        max_new_tokens: int,
        sampling: SamplingParams,
        session: Session | None = None,
    ):
        self.interrupted = False
        self._generator = generator
        self._start, self._before = time.perf_counter(), self._compiling()
        # Of the first piece and of the last: seconds since the start, and of them
        # those spent compiling.
        self._first = self._last = (0.0, 0.0)
        self._stream = generator.stream(
            [list(prompt)], max_new_tokens, sampling, session=session
        )

    @property
    def completion(self) -> Completion:
        """What came of the prompt so far."""
        return self._stream.completions[0]

    def show(self, *, quiet: bool = False) -> None:
        """Writes the text to stdout as it comes, then a newline."""
        out = None if quiet else sys.stdout
        picture = out is not None and out.isatty()
        try:
            with progress.spinner("compiling and reading the prompt"):
                piece = next(self._stream, None)
            self._first = self._clock()
            while piece is not None:
                self._last = self._clock()
                if out is not None:
                    text = piece.text.translate(_PICTURES) if picture else piece.text
                    out.write(text)
                    out.flush()
                piece = next(self._stream, None)
        except KeyboardInterrupt:
            self.interrupted = True
        finally:
            self._stream.close()
        if out is not None:
            print(file=out, flush=True)

    def _compiling(self) -> float:
        return sum(self._generator.compile_seconds.values())

    def _clock(self) -> tuple[float, float]:
        return time.perf_counter() - self._start, self._compiling() - self._before

    def _rate(self) -> float | None:
        """Tokens per second from the first to the last, without compiling.

        None for so few that the clock would tell nothing.
        """
        seconds, compiling = (
            b - a for a, b in zip(self._first, self._last, strict=True)
        )
        tokens = len(self.completion.tokens) - 1
        known = tokens >= 2 * STREAM_STEPS[-1]  # tokens come a chunk at a time
        return tokens / (seconds - compiling) if known else None

    def report(self) -> dict[str, Any]:
        """Everything, for `--json`; times in seconds."""
        done = self.completion
        return {
            "finish_reason": "interrupted" if self.interrupted else done.finish_reason,
            "text": done.text,
            "tokens": done.tokens,
            "logprobs": done.logprobs,
            "top_logprobs": done.top_logprobs,
            "prompt_tokens": done.prompt_tokens,
            "prefilled_tokens": self._stream.prefilled_tokens,
            "completion_tokens": len(done.tokens),
            "cache": dataclasses.asdict(done.cache)
            | {"overwritten": done.cache.overwritten},
            "ttft_seconds": self._first[0],
            "compile_seconds": self._last[1],
            "decode_tokens_per_second": self._rate(),
            "config": self._generator.model.config.to_dict(),
            "device": machine.device_name(jax.devices()[0]),
            "versions": machine.versions(),
        }

    def summary(self) -> str:
        """The same in a line for people."""
        done, rate = self.completion, self._rate()
        reason = "interrupted" if self.interrupted else done.finish_reason
        compiling = self._last[1]
        parts = [
            f"prompt {done.prompt_tokens} tokens",
            f"first token after {self._first[0]:.2f} s",
            f"{len(done.tokens)} tokens" + (f" at {rate:.3g}/s" if rate else ""),
            f"ended by {reason}",
            f"cache {done.cache.tokens} of {done.cache.capacity}",
        ]
        prefilled = self._stream.prefilled_tokens
        if prefilled < done.prompt_tokens:
            parts[0] += f", {prefilled} of them new"
        elif prefilled > done.prompt_tokens:  # some again, for longrope
            parts[0] += f", {prefilled} prefilled in all"
        if compiling:
            parts[1] += f" ({compiling:.2f} s of compiling in all)"
        return "[" + "; ".join(parts) + "]"
