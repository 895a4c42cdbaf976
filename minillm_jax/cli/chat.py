"""An interactive conversation: each line a message; the cache lives on between them."""

import dataclasses
import sys

from minillm_jax.cli import reply
from minillm_jax.decoding.generator import Generator
from minillm_jax.decoding.sampling import SamplingParams
from minillm_jax.decoding.stream import Session
from minillm_jax.model.cache import CacheOverflowError
from minillm_jax.text.tokenizer import ByteTokenizer, FileTokenizer

ChatTokenizer = ByteTokenizer | FileTokenizer
HELP = "/reset forgets the conversation, /exit or Ctrl-D ends; Ctrl-C ends a reply."


def user(content: str) -> dict[str, str]:
    """A message of the person."""
    return {"role": "user", "content": content}


def beginning(system: str | None) -> list[dict[str, str]]:
    """The messages before the first of the person."""
    return [{"role": "system", "content": system}] if system else []


def run(
    generator: Generator,
    tokenizer: ChatTokenizer,
    system: str | None,
    max_new_tokens: int,
    sampling: SamplingParams,
) -> None:
    """Talks until the input ends."""
    stops = (*sampling.stop, *tokenizer.chat_stop)
    sampling = dataclasses.replace(sampling, stop=stops)
    messages, session = beginning(system), Session()
    if _is_terminal():
        print(HELP, file=sys.stderr)
    while (line := _read_line()) is not None:
        if line in ("/exit", "/quit"):
            break
        if line == "/reset":
            messages, session = beginning(system), Session()
            continue
        if not line.strip():
            continue
        messages.append(user(line))
        try:
            prompt = tokenizer.encode_chat(messages)
            answer = reply.Reply(generator, prompt, max_new_tokens, sampling, session)
        except ValueError as error:  # too long, or not in the vocabulary
            messages.pop()
            hint = "; or /reset" if isinstance(error, CacheOverflowError) else ""
            print(f"{error}{hint}", file=sys.stderr)
            continue
        answer.show()
        print(answer.summary(), file=sys.stderr)
        messages.append({"role": "assistant", "content": answer.completion.text})


def _read_line() -> str | None:
    """The next message; None at the end of the input, or at Ctrl-C."""
    try:
        return input("> " if _is_terminal() else "")
    except (EOFError, KeyboardInterrupt, RuntimeError):  # the last: stdin is closed
        if _is_terminal():
            print()
        return None


def _is_terminal() -> bool:
    return sys.stdin is not None and sys.stdin.isatty()
