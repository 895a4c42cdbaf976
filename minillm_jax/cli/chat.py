"""An interactive conversation: each line a message; the cache lives on between them."""

import dataclasses
import sys

from minillm_jax.cli import reply
from minillm_jax.cli.app import UserError
from minillm_jax.decoding.generator import Generator
from minillm_jax.decoding.sampling import SamplingParams
from minillm_jax.decoding.stream import Session
from minillm_jax.model.cache import CacheOverflowError

HELP = "/reset forgets the conversation, /exit or Ctrl-D ends; Ctrl-C ends a reply."


def run(
    generator: Generator,
    system: str | None,
    max_new_tokens: int,
    params: SamplingParams,
) -> None:
    """Talks until the input ends."""
    tokenizer = generator.tokenizer
    if not hasattr(tokenizer, "encode_chat"):
        raise UserError("--chat needs a tokenizer that knows how a chat is written")
    stops = (*params.stop, *getattr(tokenizer, "chat_stop", ()))
    params = dataclasses.replace(params, stop=stops)
    beginning = [{"role": "system", "content": system}] if system else []
    messages, session = list(beginning), Session()
    if sys.stdin.isatty():
        print(HELP, file=sys.stderr)
    while (line := _read_line()) is not None:
        if line in ("/exit", "/quit"):
            break
        if line == "/reset":
            messages, session = list(beginning), Session()
            continue
        if not line.strip():
            continue
        messages.append({"role": "user", "content": line})
        try:
            prompt = tokenizer.encode_chat(messages)  # pyright: ignore
            answer = reply.Reply(generator, prompt, max_new_tokens, params, session)
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
