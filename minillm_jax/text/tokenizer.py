"""Tokenizers: what a Generator asks of one, bytes, and `tokenizer.json`.

Chat templates are Jinja programs that come with other people's files: they run in
Jinja's immutable sandbox, without access to attributes that are private or change data.
"""

import datetime
import json
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.sandbox
import tokenizers

Messages = Sequence[Mapping[str, Any]]


class TokenizerError(ValueError):
    """A tokenizer's files or chat template that cannot be used."""


@runtime_checkable
class Tokenizer(Protocol):
    """What a Generator needs. `known_ids`, if there is one, limits what it samples."""

    def encode(self, text: str) -> Sequence[int]:
        """The ids of a prompt, with BOS where the model expects one."""
        ...

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of a completion, without special tokens."""
        ...


class ByteTokenizer:
    """UTF-8 bytes, ids 0 to 255: nothing to download, and any text round-trips."""

    known_ids: Iterable[int] = range(256)
    eos_token_ids: tuple[int, ...] = ()
    chat_stop = ("\nuser:",)

    def encode(self, text: str) -> list[int]:
        """The text's bytes; lone surrogates, which have none, become "?"."""
        return list(text.encode("utf-8", errors="replace"))

    def decode(self, tokens: Sequence[int]) -> str:
        """The bytes' text; what is not UTF-8 becomes U+FFFD, other ids nothing."""
        known = bytes(token for token in tokens if 0 <= token < 256)
        return known.decode("utf-8", errors="replace")

    def encode_chat(self, messages: Messages) -> list[int]:
        """`role: content` lines, and the assistant's turn begun."""
        lines = [f"{message['role']}: {message['content']}\n" for message in messages]
        return self.encode("".join(lines) + "assistant: ")


class FileTokenizer:
    """A `tokenizer.json` with what stands beside it; made by `load_tokenizer`."""

    chat_stop: tuple[str, ...] = ()

    def __init__(self, tokenizer: tokenizers.Tokenizer, settings: Mapping[str, Any]):
        """Takes the contents of tokenizer_config.json, as `load_tokenizer` reads it."""
        self._tokenizer = tokenizer
        self._add_bos = settings.get("add_bos_token")
        self._special = {
            name: text
            for name, value in settings.items()
            if name.endswith("_token") and (text := _content(value)) is not None
        }
        self._template = settings.get("chat_template")
        self.known_ids = frozenset(tokenizer.get_vocab().values())
        self.bos_token_id = self._id("bos_token")
        ids = [self._id("eos_token"), *settings.get("eos_token_ids", ())]
        self.eos_token_ids = tuple(dict.fromkeys(i for i in ids if i is not None))

    def _id(self, name: str) -> int | None:
        text = self._special.get(name)
        return None if text is None else self._tokenizer.token_to_id(text)

    def encode(self, text: str) -> list[int]:
        """The ids, with the special tokens that the files ask for around them."""
        ids = self._tokenizer.encode(text).ids
        bos = self.bos_token_id
        if self._add_bos is None or bos is None:
            return ids
        rest = ids[1:] if ids[:1] == [bos] else ids
        return [bos, *rest] if self._add_bos else rest

    def decode(self, tokens: Sequence[int]) -> str:
        """The text, without special tokens."""
        return self._tokenizer.decode(list(tokens), skip_special_tokens=True)

    def encode_chat(self, messages: Messages) -> list[int]:
        """The ids of a conversation, the assistant's next turn begun.

        Args:
          messages: mappings with "role" and "content", the oldest first.

        Raises:
          TokenizerError: if there is no chat template, or it refuses the messages.
        """
        text = self.render_chat(messages)  # which has its own BOS
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def render_chat(
        self, messages: Messages, *, add_generation_prompt: bool = True
    ) -> str:
        """The text that the chat template makes of a conversation."""
        if self._template is None:
            raise TokenizerError(
                "this tokenizer has no chat template: there is neither a "
                "chat_template.jinja nor one in tokenizer_config.json"
            )
        try:
            return (
                _environment()
                .from_string(self._template)
                .render(
                    messages=messages,
                    add_generation_prompt=add_generation_prompt,
                    tools=None,
                    documents=None,
                    **self._special,
                )
            )
        except (jinja2.TemplateError, TypeError, ValueError, OverflowError) as error:
            raise TokenizerError(f"chat template: {error}") from error


def load_tokenizer(path: str | pathlib.Path) -> FileTokenizer:
    """Reads a `tokenizer.json`, or the folder of a model that has one.

    Beside it, where they exist: `tokenizer_config.json` and `special_tokens_map.json`
    (special tokens, add_bos_token), `chat_template.jinja`, `generation_config.json` and
    `config.json` (the list of EOS ids).

    Raises:
      TokenizerError: if a file is missing or not what it should be.
    """
    path = pathlib.Path(path)
    file = path / "tokenizer.json" if path.is_dir() else path
    if not file.is_file():
        raise TokenizerError(f"{path}: no such tokenizer.json, nor a folder with one")
    try:
        tokenizer = tokenizers.Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises plain Exception
        raise TokenizerError(f"{file}: {error}") from error
    tokenizer.no_padding()
    tokenizer.no_truncation()

    folder, names = file.parent, ("special_tokens_map.json", "tokenizer_config.json")
    settings: dict[str, Any] = {}
    for name in names:
        settings |= _read(folder / name)
    settings["eos_token_ids"] = _eos_ids(folder)
    settings["chat_template"] = _template(folder, settings.get("chat_template"))
    return FileTokenizer(tokenizer, settings)


def _read(file: pathlib.Path) -> dict[str, Any]:
    """A JSON object, or nothing where there is no such file."""
    if not file.is_file():
        return {}
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise TokenizerError(f"{file}: {error}") from error
    if not isinstance(values, dict):
        raise TokenizerError(f"{file}: must hold a JSON object")
    return values


def _eos_ids(folder: pathlib.Path) -> list[int]:
    """EOS ids of the two files that may name several."""
    found: list[int] = []
    for name in ("generation_config.json", "config.json"):
        ids = _read(folder / name).get("eos_token_id")
        ids = ids if isinstance(ids, list) else [ids]
        found += [i for i in ids if isinstance(i, int)]
    return found


def _template(folder: pathlib.Path, given: Any) -> str | None:
    """The chat template: a file of its own, a string, or the default of several."""
    file = folder / "chat_template.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    if isinstance(given, list):
        named = {item["name"]: item["template"] for item in given}
        return named.get("default")
    return given


def _content(value: Any) -> str | None:
    """A special token's text: a string, or an object with `content`."""
    if isinstance(value, Mapping):
        value = value.get("content")
    return value if isinstance(value, str) else None


def _environment() -> jinja2.Environment:
    """Jinja as chat templates expect it: block trimming, `break`, and a few helpers."""
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[jinja2.ext.loopcontrols, _Generation],
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise
    environment.globals["strftime_now"] = _now
    return environment


class _Generation(jinja2.ext.Extension):
    """`{% generation %}`, which marks what a model wrote, for training: no effect."""

    tags: set[str] = {"generation"}  # noqa: RUF012

    def parse(self, parser: Any) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _to_json(value: Any, indent: int | None = None) -> str:
    """JSON as it stands: Jinja's own filter would escape it for HTML."""
    return json.dumps(value, ensure_ascii=False, indent=indent)


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)


def _now(format: str) -> str:
    return datetime.datetime.now().strftime(format)
