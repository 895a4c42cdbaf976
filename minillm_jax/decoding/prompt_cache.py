"""Caches of prompts that others begin with: filled once, used by many, kept in a file.

A kept cache is one row that has seen a prompt and nothing else. A later prompt that
begins with the same tokens, as many as they are, takes its row from it.

The file is safetensors: of each kept prompt `N.tokens` int32 [T] and, for each layer,
`N.layers_3.k` and `.v` [K, slots, H], only slots that hold something. Its metadata says
what it was made with; nothing is used of a file that does not match, or of which a
byte has changed.
"""

import dataclasses
import functools
import hashlib
import json
import os
import pathlib
import uuid
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import safetensors
import safetensors.numpy

from minillm_jax.config import ModelConfig
from minillm_jax.decoding.executables import Executables, Key
from minillm_jax.model import cache as kv
from minillm_jax.model import rope

FORMAT = "minillm_jax prompt cache, version 1"
BUDGET_BYTES = 2**30
# Of a config, what a cache's content does not depend on. (On prefill_chunk, which
# follows from max_seq_len where it is not given, the slots of a window do.)
_FREE = ("max_seq_len", "max_kv_cache_len", "eos_token_ids", "remat")


class PromptCacheError(ValueError):
    """A prompt cache that cannot be kept, or a file of one that is not to be used."""


@dataclasses.dataclass(frozen=True, eq=False)
class Kept:
    """A prompt and its cache."""

    tokens: tuple[int, ...]
    cache: Mapping[str, Any]  # of one row, not rewound since a leaf of it has wrapped
    capacity: int  # tokens that it was made for

    @property
    def nbytes(self) -> int:
        """Of its keys and values."""
        leaves = jax.tree.leaves(dict(self.cache))
        return sum(leaf.nbytes for leaf in leaves if leaf.ndim > 1)


class PromptCache:
    """Kept caches within a budget: where one more is too much, the idlest ones go."""

    def __init__(self, config: ModelConfig, policy: kv.CachePolicy, budget_bytes: int):
        self._config, self._policy = config, policy
        self.budget_bytes = budget_bytes
        self._kept: list[Kept] = []  # the idlest first

    def __len__(self) -> int:
        return len(self._kept)

    @property
    def kept(self) -> list[Kept]:
        """All of them, the one that was used last at the end."""
        return list(self._kept)

    @property
    def nbytes(self) -> int:
        """Of all that are kept."""
        return sum(kept.nbytes for kept in self._kept)

    def make_room(self, nbytes: int, what: str, *, but: Kept | None = None) -> None:
        """Gives up the idlest where so many bytes more are too much.

        Args:
          nbytes: of what is about to be kept.
          what: it is, in a message.
          but: one that is not given up yet.

        Raises:
          PromptCacheError: where they alone are too much; then nothing is given up.
        """
        if nbytes > self.budget_bytes:
            raise PromptCacheError(
                f"{what} takes {nbytes} bytes, but prompt_cache_bytes="
                f"{self.budget_bytes}; write {nbytes}, or keep less"
            )
        idlest = [kept for kept in self._kept if kept is not but]
        while idlest and self.nbytes + nbytes > self.budget_bytes:
            self._kept.remove(idlest.pop(0))

    def keep(self, kept: Kept) -> None:
        """Takes one in, in the place of those that it serves as well."""
        self._kept = [
            other
            for other in self._kept
            if self._common(kept, other.tokens, True) < len(other.tokens)
        ]
        self.make_room(kept.nbytes, "the cache of this prompt")
        self._kept.append(kept)

    def clear(self) -> None:
        """Gives up all."""
        self._kept.clear()

    def best(
        self, prompt: Sequence[int], *, whole: bool = False
    ) -> tuple[Kept, int] | None:
        """The kept cache that begins with the most of a prompt, and how many tokens.

        The prompt's last token is not among them, for its logits are needed; with
        `whole`, for a prompt that is only to be kept, it may be.
        """
        found = [(self._common(kept, prompt, whole), kept) for kept in self._kept]
        common, kept = max(found, key=lambda pair: pair[0], default=(0, None))
        if kept is None or common == 0:
            return None
        self._kept.remove(kept)
        self._kept.append(kept)
        return kept, common

    def _common(self, kept: Kept, prompt: Sequence[int], whole: bool) -> int:
        """Tokens of the prompt that a kept cache can be used for."""
        common = common_prefix(kept.tokens, prompt if whole else prompt[:-1])
        config, held = self._config, len(kept.tokens)
        leaves = config, kept.cache, self._policy
        if whole:  # what is kept has not been rewound where that left a trace
            usable = common == held or not kv.has_wrapped(*leaves, held)
        else:
            usable = kv.can_rewind(*leaves, held, common)
        usable &= rope.same_turns(config, held, len(prompt), exactly=True)
        return common if usable else 0


def common_prefix(first: Sequence[int], second: Sequence[int]) -> int:
    """Tokens with which both begin."""
    length = min(len(first), len(second))
    same = (a == b for a, b in zip(first, second, strict=False))
    return next((place for place, equal in enumerate(same) if not equal), length)


def copied(
    run: Executables, capacity: int, cache: Any, best: tuple[Kept, int], rows: Any
) -> Any:
    """A cache of a capacity with some rows begun as a kept one; `cache` is dead."""
    kept, common = best
    return run(
        Key("copy_rows", len(rows), capacity, kept.capacity),
        cache=cache,
        source=kept.cache,
        rows=rows,
        length=np.array(common, np.int32),
    )


class Origin:
    """What caches were made with, and what a file's must be: config, weights, text."""

    def __init__(self, config: ModelConfig, params: Mapping[str, Any], tokenizer: Any):
        values = {k: v for k, v in config.to_dict().items() if k not in _FREE}
        self._config, self._params, self._tokenizer = values, params, tokenizer

    @functools.cached_property
    def fingerprints(self) -> dict[str, str]:
        """By part; reads all weights when it is first asked for."""
        leaves = jax.tree_util.tree_leaves_with_path(dict(self._params))
        weights = ((jax.tree_util.keystr(path), leaf) for path, leaf in leaves)
        return {
            "config": json.dumps(self._config, sort_keys=True),
            "weights": _sha256(weights),
            "tokenizer": _tokenizer_name(self._tokenizer),
        }

    def check(self, metadata: Mapping[str, str], file: pathlib.Path) -> None:
        """Raises PromptCacheError where a file was made with something else."""
        for part, mine in self.fingerprints.items():
            if metadata.get(part) == mine:
                continue
            which, detail = "another " + part, ""
            if part == "weights":
                which = "other weights"
            elif part == "config":
                detail = _differences(metadata.get(part, "{}"), self._config)
            raise PromptCacheError(
                f"{file}: was made with {which}{detail}; it must be made anew"
            )


def write(path: str | os.PathLike[str], kept: Sequence[Kept], origin: Origin) -> None:
    """Writes caches to a file, which replaces one of that name when it is whole.

    Raises:
      PromptCacheError: where it cannot be written; what was there is there still.
    """
    path = pathlib.Path(path)
    arrays: dict[str, np.ndarray] = {}
    for index, one in enumerate(kept):
        arrays[f"{index}.tokens"] = np.asarray(one.tokens, np.int32)
        for layer in range(len(one.cache) - 1):
            for name, leaf in one.cache[f"layers_{layer}"]["attention"].items():
                used = np.asarray(leaf)[:, : min(leaf.shape[-2], len(one.tokens))]
                arrays[f"{index}.layers_{layer}.{name}"] = np.ascontiguousarray(used)
    metadata = {"format": FORMAT, **origin.fingerprints}
    metadata["sha256"] = _file_sha256(arrays, metadata)
    beside = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        beside.touch()
        mode = beside.stat().st_mode  # safetensors makes another file, private to us
        safetensors.numpy.save_file(arrays, beside, metadata=metadata)
        beside.chmod(mode)
        with beside.open("rb") as file:
            os.fsync(file.fileno())
        beside.replace(path)
    except (safetensors.SafetensorError, OSError) as error:
        raise PromptCacheError(f"{path}: cannot be written: {error}") from None
    finally:
        beside.unlink(missing_ok=True)


def read(path: str | os.PathLike[str], origin: Origin) -> list[dict[str, np.ndarray]]:
    """The arrays of each prompt in a file, by `tokens`, `layers_3.k` and so on.

    Raises:
      PromptCacheError: where it is none, was made with something else, or is damaged.
    """
    path = pathlib.Path(path)
    try:
        with safetensors.safe_open(path, framework="numpy") as opened:
            metadata = opened.metadata() or {}
            names = opened.keys()
            arrays = {name: opened.get_tensor(name) for name in names}
    except (safetensors.SafetensorError, OSError) as error:
        raise PromptCacheError(f"{path}: cannot be read: {error}") from None
    if metadata.get("format") != FORMAT:
        raise PromptCacheError(f"{path}: is not a {FORMAT}")
    if _file_sha256(arrays, metadata) != metadata.get("sha256"):
        raise PromptCacheError(f"{path}: is damaged: its SHA-256 is not what it says")
    origin.check(metadata, path)
    prompts: dict[str, dict[str, np.ndarray]] = {}
    for name, array in arrays.items():
        index, _, rest = name.partition(".")
        prompts.setdefault(index, {})[rest] = array
    for index, prompt in prompts.items():
        tokens = prompt.get("tokens", np.zeros(0))
        if tokens.dtype != np.int32 or tokens.ndim != 1 or not tokens.size:
            raise PromptCacheError(f"{path}: prompt {index!r} has no tokens")
    return list(prompts.values())


def filled(
    arrays: Mapping[str, np.ndarray], empty: Mapping[str, Any], path: Any
) -> dict[str, Any]:
    """A file's arrays as a cache of the shapes of `empty`, in host memory.

    Raises:
      PromptCacheError: where they are not those of such a cache.
    """
    count, found = len(arrays["tokens"]), {"tokens"}
    cache: dict[str, Any] = {"lengths": np.array([count], np.int32)}
    for layer in range(len(empty) - 1):
        leaves = {}
        for name, shape in empty[f"layers_{layer}"]["attention"].items():
            leaf, part = np.zeros(shape.shape, shape.dtype), f"layers_{layer}.{name}"
            used = leaf[:, : min(shape.shape[-2], count)]
            given = arrays.get(part, np.zeros(0))
            if given.shape != used.shape or given.dtype != used.dtype:
                raise PromptCacheError(
                    f"{path}: {part} is {given.dtype} {list(given.shape)}, and not "
                    f"{used.dtype} {list(used.shape)}"
                )
            used[...] = given
            leaves[name] = leaf
            found.add(part)
        cache[f"layers_{layer}"] = {"attention": leaves}
    if unknown := sorted(arrays.keys() - found):
        raise PromptCacheError(f"{path}: has {unknown[0]}, which the model has not")
    return cache


def _file_sha256(arrays: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> str:
    """Of arrays and metadata, but for what says this."""
    said = {name: text for name, text in metadata.items() if name != "sha256"}
    text = np.frombuffer(json.dumps(said, sort_keys=True).encode(), np.uint8)
    return _sha256([("metadata", text), *sorted(arrays.items())])


def _sha256(named: Iterable[tuple[str, Any]]) -> str:
    """Of arrays and their names; one at a time is in host memory."""
    found = hashlib.sha256()
    for name, array in named:
        found.update(f"{name} {array.dtype} {array.shape}\n".encode())
        flat = np.ascontiguousarray(np.asarray(array)).reshape(-1)
        found.update(
            memoryview(flat.view(np.uint8))  # pyright: ignore[reportArgumentType]
        )
    return found.hexdigest()


def _tokenizer_name(tokenizer: Any) -> str:
    """Its own fingerprint where it has one, or its class."""
    own = getattr(tokenizer, "fingerprint", None)
    return own if isinstance(own, str) else f"{type(tokenizer).__qualname__}"


def _differences(theirs: str, mine: Mapping[str, Any]) -> str:
    had, have = json.loads(theirs), json.loads(json.dumps(mine))  # as it was written
    names = sorted(n for n in had.keys() | have.keys() if had.get(n) != have.get(n))
    shown = [f"{n}={had.get(n)!r} and not {have.get(n)!r}" for n in names[:3]]
    return f" ({', '.join(shown)})"
