"""The compiled functions of a Generator: one of each shape, made ahead of its call.

    name      one for each                                        what it does
    empty     batch, capacity                                     an empty cache
    prefill   batch, capacity, prefill chunk                      `decode.prefill_chunk`
    first     batch, greedy or sampling                           `decode.first_tokens`
    decode    batch, capacity, greedy or sampling, steps          `decode.decode_rows`
    grow      batch, capacity                                     to the next capacity

Nothing else a Generator does compiles: arrays reach the device by `jax.device_put`.
"""

import collections
import contextlib
import functools
import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from minillm_jax.decoding import decode, sampling
from minillm_jax.decoding.decode import Params
from minillm_jax.model import cache as kv
from minillm_jax.model.transformer import MiniLLM

Cache = dict[str, Any]


class CompileForbiddenError(RuntimeError):
    """Something would have been compiled inside `forbid_compile()`."""


class Key(NamedTuple):
    """Which executable."""

    name: str
    batch_size: int
    capacity: int | None = None
    size: int | None = None  # tokens of a prefill chunk, steps of a decode chunk
    sampling: bool | None = None

    def __str__(self) -> str:
        parts = [f"batch_size={self.batch_size}"]
        if self.capacity is not None:
            parts.append(f"capacity={self.capacity}")
        if self.size is not None:
            parts.append(f"{'steps' if self.name == 'decode' else 'chunk'}={self.size}")
        if self.sampling is not None:
            parts.append("sampling" if self.sampling else "greedy")
        return f"{self.name}({', '.join(parts)})"


class Executables:
    """Compiles, counts and calls; all arrays live where the parameters do."""

    def __init__(self, model: MiniLLM, params: Params, policy: kv.CachePolicy):
        self.model, self.policy = model, policy
        self.params = jax.device_put(params)
        self.seconds: dict[str, float] = {}  # to compile, by the key's text
        self._table: dict[Key, Callable[..., Any]] = {}
        self._forbidden = 0
        leaf = jax.tree.leaves(self.params)[0]
        self._device = leaf.sharding if len(leaf.devices()) == 1 else None

    @property
    def counts(self) -> dict[str, int]:
        """Executables by name."""
        return dict(collections.Counter(key.name for key in self._table))

    @contextlib.contextmanager
    def forbidden(self) -> Iterator[None]:
        """A block in which a call that would compile raises CompileForbiddenError."""
        self._forbidden += 1
        try:
            yield
        finally:
            self._forbidden -= 1

    def put(self, tree: Any) -> Any:
        """Arrays of the host on the device."""
        return jax.device_put(tree, self._device)

    def empty(self, batch_size: int, capacity: int) -> Callable[[], Cache]:
        """A cache without tokens."""
        function = functools.partial(
            kv.init_cache, self.model.config, batch_size, capacity, policy=self.policy
        )
        jitted = jax.jit(function, out_shardings=self._device)
        return self._ready(Key("empty", batch_size, capacity), jitted, {})

    def prefill(
        self, capacity: int, cache: Any, logits: Any, tokens: Any, lengths: Any
    ) -> Callable[[], tuple[jax.Array, Cache]]:
        """One chunk of the prompts."""
        return self._ready(
            Key("prefill", tokens.shape[0], capacity, tokens.shape[1]),
            decode.prefill_chunk,
            {"cache": cache, "logits": logits, "tokens": tokens, "lengths": lengths},
        )

    def first(
        self, logits: Any, progress: sampling.Progress, rows: sampling.Rows
    ) -> Callable[[], tuple[sampling.Sampled, sampling.Progress]]:
        """The tokens that follow the prompts."""
        kind = rows.sampler is not None
        key = Key("first", len(rows.budget), sampling=kind)
        arguments = {"logits": logits, "progress": progress, "rows": rows}
        return self._ready(key, decode.first_tokens, arguments)

    def decode(
        self, capacity: int, steps: int, **arguments: Any
    ) -> Callable[[], tuple[sampling.Sampled, sampling.Progress, Cache]]:
        """The next chunk; the arguments are those of `decode.decode_rows`."""
        rows = arguments["rows"]
        kind = rows.sampler is not None
        key = Key("decode", len(rows.budget), capacity, steps, kind)
        return self._ready(key, decode.decode_rows, arguments, steps=steps)

    def grow(self, leaf: Any, batch_size: int, old: int, new: int) -> Callable[[], Any]:
        """A leaf of a cache of capacity `old`, with the slots of capacity `new`."""
        slots = kv.num_slots(self.model.config, new, self.policy)
        if leaf.ndim == 1 or leaf.shape[-2] >= slots:
            return lambda: leaf
        jitted = jax.jit(kv.padded, static_argnames="slots")
        return self._ready(
            Key("grow", batch_size, old), jitted, {"leaf": leaf}, slots=slots
        )

    def everything(
        self, batch_size: int, capacities: Sequence[int], steps: Sequence[int]
    ) -> Iterator[Callable[[], Any]]:
        """Functions that make every executable of a batch size, and run none."""
        config, vocab_size = self.model.config, self.model.config.vocab_size
        logits = jax.ShapeDtypeStruct((batch_size, vocab_size), np.float32)
        kinds = [_rows(params, batch_size, vocab_size) for params in _KINDS]
        going_on = np.ones(batch_size, bool)
        for rows in kinds:
            yield functools.partial(self.first, logits, sampling.start(rows), rows)
        for old, new in itertools.zip_longest(capacities, capacities[1:]):
            cache = kv.cache_shapes(config, batch_size, old, policy=self.policy)
            yield functools.partial(self.empty, batch_size, old)
            for size in decode.chunk_sizes(config):
                tokens = np.zeros((batch_size, size), np.int32)
                lengths = tokens[:, 0]
                yield functools.partial(
                    self.prefill, old, cache, logits, tokens, lengths
                )
            for rows, chunk in itertools.product(kinds, steps):
                yield functools.partial(
                    self.decode,
                    old,
                    chunk,
                    cache=cache,
                    progress=sampling.start(rows),
                    rows=rows,
                    going_on=going_on,
                )
            if new is not None:
                leaf = cache["layers_0"]["attention"]["k"]
                yield functools.partial(self.grow, leaf, batch_size, old, new)

    def _ready(
        self, key: Key, function: Any, arguments: dict[str, Any], **static: Any
    ) -> Any:
        """A call without arguments; compiled now, if it is the first of its key.

        The arguments may be shapes, if the call is not made.
        """
        if key.name in ("prefill", "decode"):
            arguments = {"params": self.params, **arguments}
            static = {"model": self.model, "policy": self.policy, **static}
        if key not in self._table:
            if self._forbidden:
                raise CompileForbiddenError(
                    f"{key} is not compiled yet: call warmup(batch_sizes="
                    f"({key.batch_size},)) before forbid_compile()"
                )
            start = time.perf_counter()
            self._table[key] = function.lower(**arguments, **static).compile()
            self.seconds[str(key)] = time.perf_counter() - start
        return functools.partial(self._table[key], **arguments)


_KINDS = (sampling.SamplingParams(temperature=0.0), sampling.SamplingParams())


def _rows(params: sampling.SamplingParams, count: int, vocab_size: int):
    """Rows of a kind, greedy or sampling, for their shapes."""
    return sampling.rows(
        [params] * count,
        sample_indices=range(count),
        prompts=[[0]] * count,
        budgets=[1] * count,
        eos_token_ids=(),
        known=np.ones(vocab_size, bool),
    )
