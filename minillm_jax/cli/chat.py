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
    if sys.stdin.isatty():
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
        except CacheOverflowError as error:
            messages.pop()
            print(f"{error}; or /reset", file=sys.stderr)
            continue
        answer.show()
        print(answer.summary(), file=sys.stderr)
        messages.append({"role": "assistant", "content": answer.completion.text})


def _read_line() -> str | None:
    """The next message; None at the end of the input, or at Ctrl-C."""
    try:
        return input("> " if sys.stdin.isatty() else "")
    except (EOFError, KeyboardInterrupt):
        if sys.stdin.isatty():
            print()
        return None
