"""Tokenizers: what a Generator asks of one, bytes, and `tokenizer.json`.

Chat templates are Jinja programs that come with other people's files: they run in
Jinja's immutable sandbox, without access to attributes that are private or change data.
"""

import dataclasses
import datetime
import functools
import hashlib
import json
import os
import pathlib
import shutil
import uuid
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.sandbox
import tokenizers

from minillm_jax.json_files import read_object

Messages = Sequence[Mapping[str, Any]]

# What makes up a tokenizer beside its tokenizer.json, as far as a folder has it.
BESIDE = (
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "added_tokens.json",
    "tokenizer.model",
)
# Where a message may have the model's reasoning: templates read the first two.
REASONING = ("reasoning_content", "thinking", "reasoning")


class TokenizerError(ValueError):
    """A tokenizer's files or chat template that cannot be used."""


@runtime_checkable
class Tokenizer(Protocol):
    """What a Generator needs.

    Optional, as the two tokenizers here have them: `known_ids`, which limits what is
    sampled; `eos_token_ids`, which belong into `config.eos_token_ids`; `encode_chat`
    and `chat_stop`, for conversations; `fingerprint`, a text that no tokenizer of other
    ids has: a prompt cache's file knows one without it by its class alone.
    """

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
    fingerprint = "bytes"

    def encode(self, text: str) -> list[int]:
        """The text's bytes; lone surrogates, which have none, become "?"."""
        return list(text.encode("utf-8", errors="replace"))

    def decode(self, tokens: Sequence[int]) -> str:
        """The bytes' text; what is not UTF-8 becomes U+FFFD, other ids nothing."""
        known = bytes(token for token in tokens if 0 <= token < 256)
        return known.decode("utf-8", errors="replace")

    has_files = True  # `save` makes them

    def save(self, folder: str | pathlib.Path) -> None:
        """Writes a tokenizer.json of the same ids, which other libraries read too.

        It is byte-level BPE (GPT-2, Radford et al. 2019) without a merge.
        """
        vocab = {character: byte for byte, character in enumerate(_characters())}
        flags = {"add_prefix_space": False, "trim_offsets": True, "use_regex": False}
        level = {"type": "ByteLevel", **flags}
        values = {
            "version": "1.0",
            "added_tokens": [],
            "pre_tokenizer": level,
            "decoder": level,
            "model": {"type": "BPE", "vocab": vocab, "merges": []},
        }
        path = pathlib.Path(folder) / "tokenizer.json"
        path.write_text(json.dumps(values, indent=1, ensure_ascii=False))

    def encode_chat(self, messages: Messages) -> list[int]:
        """`role: content` lines, and the assistant's turn begun."""
        lines = [f"{message['role']}: {message['content']}\n" for message in messages]
        return self.encode("".join(lines) + "assistant: ")


@dataclasses.dataclass(frozen=True)
class Settings:
    """What the files beside a tokenizer.json say, checked."""

    # "bos_token", "eos_token", ... -> its text
    special_tokens: Mapping[str, str] = dataclasses.field(default_factory=dict)
    eos_token_ids: tuple[int, ...] = ()
    chat_template: str | None = None


class FileTokenizer:
    """A `tokenizer.json` with what stands beside it; made by `load_tokenizer`."""

    chat_stop: tuple[str, ...] = ()

    def __init__(
        self,
        tokenizer: tokenizers.Tokenizer,
        settings: Settings = Settings(),
        source: pathlib.Path | None = None,
    ):
        """Takes what `load_tokenizer` has read, and from which tokenizer.json."""
        self._tokenizer = tokenizer
        self._special = settings.special_tokens
        self._template = settings.chat_template
        self.known_ids = frozenset(tokenizer.get_vocab().values())
        eos = self._special.get("eos_token")
        own = None if eos is None else tokenizer.token_to_id(eos)
        ids = [own, *settings.eos_token_ids]
        self.eos_token_ids = tuple(dict.fromkeys(i for i in ids if i is not None))
        self._files = {} if source is None else _files(source)

    def encode(self, text: str) -> list[int]:
        """The ids, with the special tokens that tokenizer.json puts around them.

        Lone surrogates, which no file of text has, become "?".
        """
        return self._tokenizer.encode(_without_surrogates(text)).ids

    def decode(self, tokens: Sequence[int]) -> str:
        """The text, without special tokens."""
        return self._tokenizer.decode(list(tokens), skip_special_tokens=True)

    @functools.cached_property
    def fingerprint(self) -> str:
        """SHA-256 of what makes ids of a text; equal for equal tokenizers."""
        return hashlib.sha256(self._tokenizer.to_str().encode()).hexdigest()

    def encode_chat(self, messages: Messages) -> list[int]:
        """The ids of a conversation, the assistant's next turn begun.

        Args:
          messages: mappings with "role" and "content", the oldest first.

        Raises:
          TokenizerError: if there is no chat template, or it refuses the messages.
        """
        text = _without_surrogates(self.render_chat(messages))  # it has its own BOS
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def render_chat(
        self, messages: Messages, *, add_generation_prompt: bool = True
    ) -> str:
        """The text that the chat template makes of a conversation.

        What is None in a message is left out of it, and its reasoning, under whatever
        name of `REASONING`, is there as reasoning_content and thinking.
        """
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
                    messages=[_normalized(message) for message in messages],
                    add_generation_prompt=add_generation_prompt,
                    tools=None,
                    documents=None,
                    **self._special,
                )
            )
        except Exception as error:  # a template is a program, and may fail in any way
            reason = str(error) or type(error).__name__
            raise TokenizerError(f"chat template: {reason}") from error

    @property
    def has_files(self) -> bool:
        """Whether it was read from files, which `save` copies."""
        return bool(self._files)

    def save(self, folder: str | pathlib.Path) -> None:
        """Copies the files that it was read from into a folder, unchanged.

        Those are tokenizer.json and what of `BESIDE` stood beside it, not the files of
        the model; each is there as a whole or not at all. Other files there stay.

        Raises:
          TokenizerError: if there is no such folder, or a file to copy has gone, or
            there never was one.
        """
        if not self._files:
            raise TokenizerError(
                "this tokenizer has no files to save: load_tokenizer makes one that has"
            )
        folder = pathlib.Path(folder)
        if not folder.is_dir():
            raise TokenizerError(f"{folder}: no such folder to save a tokenizer in")
        for name, file in self._files.items():
            try:
                _copy(file, folder / name)
            except FileNotFoundError as error:
                raise TokenizerError(f"{file}: has gone since it was read") from error


def load_tokenizer(path: str | pathlib.Path) -> FileTokenizer:
    """Reads a `tokenizer.json`, or the folder of a model that has one.

    Beside it, where they exist: `tokenizer_config.json` and `special_tokens_map.json`
    (special tokens; the latter, older, only where the former has no
    added_tokens_decoder), `chat_template.jinja`, `generation_config.json` and
    `config.json` (the list of EOS ids).

    But for its special tokens, the tokenizer.json is taken as it stands: classes,
    add_bos_token or split_special_tokens beside it, and names it lacks, change nothing.

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

    settings = _settings(file.parent)
    _make_special(tokenizer, settings.special_tokens.values())
    return FileTokenizer(tokenizer, settings, file.absolute())


def _make_special(tokenizer: tokenizers.Tokenizer, texts: Iterable[str]) -> None:
    """Makes special tokens of those that tokenizer.json has as others."""
    decoder = tokenizer.get_added_tokens_decoder()
    added = {token.content: token for token in decoder.values()}
    for text in texts:
        token = added.get(text, tokenizers.AddedToken(text, normalized=False))
        if not token.special and tokenizer.token_to_id(text) is not None:
            token.special = True
            tokenizer.add_special_tokens([token])


def _settings(folder: pathlib.Path) -> Settings:
    file, older = folder / "tokenizer_config.json", folder / "special_tokens_map.json"
    config = read_object(file, TokenizerError)
    special = _special_tokens(file, config)
    if "added_tokens_decoder" not in config:
        others = read_object(older, TokenizerError)  # may say that there is none
        special = {name: text for name, text in special.items() if name not in others}
        special |= _special_tokens(older, others)
    ids: list[int] = []
    for name in ("generation_config.json", "config.json"):
        ids += _eos_ids(folder / name)
    template = _template(folder, config.get("chat_template"))
    return Settings(special, tuple(ids), template)


def _special_tokens(file: pathlib.Path, values: dict[str, Any]) -> dict[str, str]:
    """Fields such as "bos_token": each a text, or an object with its `content`."""
    found = {}
    for name, value in values.items():
        if not name.endswith("_token") or name.startswith("add_") or value is None:
            continue
        text = value.get("content") if isinstance(value, dict) else value
        if not isinstance(text, str) or text != _without_surrogates(text):
            raise TokenizerError(
                f"{file}: {name}={value!r} must be a text, or an object with content"
            )
        found[name] = text
    return found


def _eos_ids(file: pathlib.Path) -> list[int]:
    """The EOS ids that a file names: one, or a list."""
    value = read_object(file, TokenizerError).get("eos_token_id")
    ids = value if isinstance(value, list) else [] if value is None else [value]
    for item in ids:
        if not isinstance(item, int) or isinstance(item, bool) or item < 0:
            raise TokenizerError(
                f"{file}: eos_token_id={value!r} must be an id, or a list of ids"
            )
    return ids


def _template(folder: pathlib.Path, given: Any) -> str | None:
    """The chat template: a file of its own, a string, or the default of several."""
    file = folder / "chat_template.jinja"
    if file.is_file():
        try:
            return file.read_bytes().decode()
        except UnicodeDecodeError as error:
            raise TokenizerError(f"{file}: {error}") from error
    items = (
        given if isinstance(given, list) else [{"name": "default", "template": given}]
    )
    named = {}
    for item in items:
        name = item.get("name") if isinstance(item, dict) else None
        text = item.get("template", 0) if name is not None else 0
        if not isinstance(name, str) or not isinstance(text, str | None):
            raise TokenizerError(
                f"{folder / 'tokenizer_config.json'}: chat_template must be a string, "
                "or a list of objects with name and template"
            )
        named[name] = text
    return named.get("default")


def _files(source: pathlib.Path) -> dict[str, pathlib.Path]:
    """The files that make up a tokenizer, under the names that a folder has them."""
    beside = {name: source.with_name(name) for name in BESIDE}
    found = {name: file for name, file in beside.items() if file.is_file()}
    return found | {"tokenizer.json": source}


def _copy(source: pathlib.Path, target: pathlib.Path) -> None:
    """Copies a file, so that `target` is the old one until it is the new one."""
    if target.exists() and target.samefile(source):
        return
    temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex}")
    try:
        shutil.copyfile(source, temporary)
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


def _characters() -> str:
    """The visible character that byte-level BPE writes for each of the 256 bytes."""
    shown = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = iter(range(256, 512))
    return "".join(chr(b if b in shown else next(others)) for b in range(256))


def _normalized(message: Mapping[str, Any]) -> dict[str, Any]:
    """A message without what is None, its reasoning where templates look for it."""
    message = {key: value for key, value in message.items() if value is not None}
    for name in REASONING:
        if name in message:
            reasoning = message[name]
            return {"thinking": reasoning, **message, "reasoning_content": reasoning}
    return message


def _without_surrogates(text: str) -> str:
    return text.encode("utf-8", errors="replace").decode()


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


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON as it stands: Jinja's own filter would escape it for HTML."""
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)


def _now(format: str) -> str:
    return datetime.datetime.now().strftime(format)
