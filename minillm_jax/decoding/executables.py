"""The compiled functions of a Generator: one for each key, all shapes known before.

    name         one for each                                   what it runs
    init_cache   batch, capacity                                `cache.init_cache`
    grow_cache   batch, capacity, slots                         a layer's keys or values
    prefill      batch, capacity, prefill chunk                 `decode.prefill_chunk`
    first_token  batch, greedy or sampling                      `decode.first_tokens`
    decode       batch, capacity, greedy or sampling, steps     `decode.decode_requests`
    copy_rows    batch, capacity, a kept prompt's capacity      `cache.copy_rows`

Nothing else that a Generator does compiles: arrays reach the device by `device_put`.
"""

import collections
import contextlib
import functools
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from minillm_jax.decoding import decode, sampling
from minillm_jax.decoding.decode import Params
from minillm_jax.model import cache as kv
from minillm_jax.model.transformer import MiniLLM

_WITH_PARAMS = ("prefill", "decode")
_UNITS = {  # of a key's size
    "prefill": "chunk",
    "decode": "steps",
    "grow_cache": "slots",
    "copy_rows": "kept",
}


class CompileForbiddenError(RuntimeError):
    """Something would have been compiled inside `forbid_compile()`."""


class Key(NamedTuple):
    """Which executable."""

    name: str
    batch_size: int
    capacity: int | None = None  # tokens a row of the cache can hold
    size: int | None = None  # in the unit of _UNITS
    sampling: bool | None = None  # or greedy

    def __str__(self) -> str:
        parts = [f"batch_size={self.batch_size}"]
        if self.capacity is not None:
            parts.append(f"capacity={self.capacity}")
        if self.size is not None:
            parts.append(f"{_UNITS[self.name]}={self.size}")
        if self.sampling is not None:
            parts.append("sampling" if self.sampling else "greedy")
        return f"{self.name}({', '.join(parts)})"


class Executables:
    """Compiles, counts and calls; all arrays live where the parameters do.

    Args:
      model: from `create_model`.
      params: the inner tree.
      policy: of the caches.
      capacities: tokens per row that caches are made for, ascending.
      steps: of the decode chunks.
    """

    def __init__(
        self,
        model: MiniLLM,
        params: Params,
        policy: kv.CachePolicy,
        *,
        capacities: Sequence[int],
        steps: Sequence[int],
    ):
        self.model, self.policy, self.capacities = model, policy, capacities
        self.params = jax.device_put(params)
        self.seconds: dict[Key, float] = {}  # to trace and compile
        self._steps = steps
        self._table: dict[Key, Callable[..., Any]] = {}
        self._forbidden = 0
        leaf = jax.tree.leaves(self.params)[0]
        self._device = leaf.sharding if len(leaf.devices()) == 1 else None

    def __call__(self, key: Key, **arrays: Any) -> Any:
        """Runs an executable; what it donates of `arrays` is dead afterwards."""
        if key.name in _WITH_PARAMS:
            arrays["params"] = self.params
        if _jit_is_disabled():
            function, _, static = self._function(key)
            return function(**self.put(arrays), **static)
        self.compile(key)
        return self._table[key](**arrays)

    def put(self, tree: Any) -> Any:
        """Arrays of the host on the device."""
        return jax.device_put(tree, self._device)

    def prefill(
        self, cache: Any, capacity: int, prompts: Sequence[Sequence[int]]
    ) -> tuple[Any, Any]:
        """Enqueues a prompt for each row, [] for none; `cache` is dead.

        Returns:
          The logits of each row's last token, and the cache.
        """
        config, rows = self.model.config, len(prompts)
        lengths = np.array([len(prompt) for prompt in prompts], np.int32)
        tokens = np.zeros((rows, lengths.max()), np.int32)
        for row, prompt in enumerate(prompts):
            tokens[row, : len(prompt)] = prompt
        logits: Any = np.zeros((rows, config.vocab_size), np.float32)
        for chunk, remaining in decode.prompt_chunks(
            config, tokens, lengths, tokens.shape[1]
        ):
            logits, cache = self(
                Key("prefill", rows, capacity, chunk.shape[1]),
                cache=cache,
                logits=logits,
                tokens=chunk,
                remaining=remaining,
            )
        return logits, cache

    @contextlib.contextmanager
    def forbidden(self) -> Iterator[None]:
        """A block in which compiling raises CompileForbiddenError."""
        self._forbidden += 1
        try:
            yield
        finally:
            self._forbidden -= 1

    @property
    def counts(self) -> dict[str, int]:
        """Executables by name."""
        return dict(collections.Counter(key.name for key in self._table))

    def keys(self, batch_size: int, kept: Iterable[int] = ()) -> list[Key]:
        """All executables of a batch size, where caches of some capacities are kept."""
        key = functools.partial(Key, batch_size=batch_size)
        found = [key("first_token", sampling=kind) for kind in (False, True)]
        for capacity in self.capacities:
            at = functools.partial(key, capacity=capacity)
            found.append(at("init_cache"))
            found += [at("grow_cache", size=n) for n in sorted(self._grown(capacity))]
            sizes = decode.chunk_sizes(self.model.config)
            found += [at("prefill", size=size) for size in sizes]
            for kind in (False, True):
                found += [at("decode", size=n, sampling=kind) for n in self._steps]
            found += [at("copy_rows", size=n) for n in sorted({*kept})]
        return found

    def compile(self, key: Key) -> float:
        """Seconds that it took; 0.0 where it was there already.

        Raises:
          CompileForbiddenError: inside `forbidden`, if it was not.
        """
        if key in self._table or _jit_is_disabled():
            return 0.0
        if self._forbidden:
            raise CompileForbiddenError(
                f"{key} is not compiled yet: call warmup(batch_sizes="
                f"({key.batch_size},)) before forbid_compile()"
            )
        start = time.perf_counter()
        function, arguments, static = self._function(key)
        if key.name in _WITH_PARAMS:
            arguments["params"] = self.params
        self._table[key] = function.lower(**arguments, **static).compile()
        self.seconds[key] = time.perf_counter() - start
        return self.seconds[key]

    def next_slots(self, capacity: int) -> list[int]:
        """Slots of each layer in a cache of the next capacity."""
        return kv.num_slots(self.model.config, self.larger(capacity), self.policy)

    def _grown(self, capacity: int) -> dict[int, int]:
        """Slots after growing to the next capacity -> before, of leaves that grow."""
        if not self.larger(capacity):
            return {}
        before = kv.num_slots(self.model.config, capacity, self.policy)
        pairs = zip(before, self.next_slots(capacity), strict=True)
        return {new: old for old, new in pairs if new > old}

    def larger(self, capacity: int) -> int:
        """The next capacity; 0 behind the last."""
        return next((c for c in self.capacities if c > capacity), 0)

    def _function(self, key: Key) -> tuple[Any, dict[str, Any], dict[str, Any]]:
        """A jitted function, the shapes of its arguments, and its static ones."""
        config, batch_size = self.model.config, key.batch_size
        shape = functools.partial(jax.ShapeDtypeStruct, sharding=self._device)
        if key.name == "init_cache":
            empty = functools.partial(
                *(kv.init_cache, config, batch_size, key.capacity), policy=self.policy
            )
            return jax.jit(empty, out_shardings=self._device), {}, {}
        logits = shape((batch_size, config.vocab_size), np.float32)
        if key.name == "first_token":
            arguments = {"logits": logits, **self._requests(key)}
            return decode.first_tokens, self._shapes(arguments), {}
        cache = kv.cache_shapes(config, batch_size, key.capacity, policy=self.policy)
        if key.name == "grow_cache":
            old = self._grown(key.capacity or 0)[key.size or 0]
            layers = [part["attention"] for n, part in cache.items() if n != "lengths"]
            half = next(kv.held(x)[0] for x in layers if x["k"].shape[-2] == old)
            padded = jax.jit(kv.padded, static_argnames="slots")
            return padded, self._shapes({"half": half}), {"slots": key.size}
        if key.name == "copy_rows":
            source = kv.cache_shapes(config, 1, key.size, policy=self.policy)
            rows, length = shape((batch_size,), np.bool_), shape((), np.int32)
            arguments = {"cache": cache, "source": source, "rows": rows}
            copied = jax.jit(kv.copy_rows, donate_argnames="cache")
            return copied, self._shapes(arguments | {"length": length}), {}
        static = {"model": self.model, "policy": self.policy}
        arguments = {"cache": cache}
        if key.name == "prefill":
            tokens = shape((batch_size, key.size), np.int32)
            remaining = shape((batch_size,), np.int32)
            arguments |= {"logits": logits, "tokens": tokens, "remaining": remaining}
            return decode.prefill_chunk, self._shapes(arguments), static
        unfinished = shape((batch_size,), np.bool_)
        arguments |= {"unfinished": unfinished, **self._requests(key)}
        static["steps"] = key.size
        return decode.decode_requests, self._shapes(arguments), static

    def _requests(self, key: Key) -> dict[str, Any]:
        """Requests of the key's kind and their state, for their shapes."""
        params = sampling.SamplingParams() if key.sampling else sampling.GREEDY
        vocab_size = self.model.config.vocab_size
        requests = sampling.equal_requests(params, key.batch_size, vocab_size)
        return {"requests": requests, "state": sampling.initial_state(requests)}

    def _shapes(self, tree: Any) -> Any:
        """Arrays as shapes, on the device of the parameters."""

        def shape(x: Any) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=self._device)

        return jax.tree.map(shape, tree)


def _jit_is_disabled() -> bool:
    """Whether `jax.disable_jit()` is in force, for debugging: nothing compiles then."""
    return jax.config.jax_disable_jit  # pyright: ignore[reportAttributeAccessIssue]


def smallest_holding(capacities: Sequence[int], tokens: int) -> int:
    """The first of ascending capacities that holds `tokens`, or the last there is."""
    return next((c for c in capacities if c >= tokens), capacities[-1])
