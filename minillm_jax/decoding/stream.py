"""The generating loop: prefill, then decode chunks, one ahead of the host.

    device   prefill  first | chunk 1 | chunk 2 | chunk 3 | ...
    host                     enqueue 1, read first
                             enqueue 2, read chunk 1 -> pieces
                                       enqueue 3, read chunk 2 -> pieces

A row that ends by its budget, an EOS or a stop id is masked inside its chunk. One that
ends by a stop string, which only the host can see, is masked from the next chunk that
is enqueued; what the device has made of it by then is thrown away.

The host keeps its own count of what the cache holds. It never reads `lengths` back,
except of a Session's cache between two calls.
"""

import collections
import dataclasses
from collections.abc import Generator, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from minillm_jax.decoding import decode, sampling
from minillm_jax.decoding.executables import Executables
from minillm_jax.decoding.requests import Completion, Piece, Row


@dataclasses.dataclass
class Session:
    """A cache that outlives a call, for prompts that continue each other.

    Give it to `Generator.stream` with prompts that begin as the last one did, such as
    the turns of a chat: what the cache holds already is not prefilled again.
    """

    tokens: list[int] = dataclasses.field(default_factory=list)  # prompt and completion
    cache: dict[str, Any] | None = None
    capacity: int = 0  # tokens the cache is large enough for
    owner: Executables | None = None  # of the Generator that made the cache

    def reusable(self, prompt: Sequence[int], ring: bool) -> int:
        """Tokens at the beginning of `prompt` that need no prefill."""
        if self.cache is None:
            return 0
        pairs = zip(self.tokens, prompt[:-1], strict=False)  # the last one gives logits
        common = next((i for i, (a, b) in enumerate(pairs) if a != b), None)
        if common is None:
            common = min(len(self.tokens), len(prompt) - 1)
        held = int(np.asarray(self.cache["lengths"])[0])
        common = min(common, held)
        wrapped = ring and held > self.capacity
        return 0 if wrapped and common < held else common  # the older ones are gone


class Stream:
    """An iterator of pieces; `completions` tells what came of each prompt so far.

    It can be closed, or left, at any time, and is a context manager that closes.
    """

    def __init__(
        self,
        executables: Executables,
        rows: Sequence[Row],
        arrays: sampling.Rows,
        *,
        capacities: Sequence[int],
        chunks: Sequence[int],
        session: Session | None = None,
    ):
        self.prefilled_tokens = 0  # of the prompts; the rest was in the cache
        self._run, self._rows = executables, rows
        self._arrays, self._capacities = arrays, capacities
        self._chunks = sorted(chunks, reverse=True)
        self._session, self._capacity = session, 0
        self._enqueued = 0  # decode steps
        self._cache: Any = None
        self._progress: Any = None
        self._pieces = self._generate()

    def __iter__(self) -> Iterator[Piece]:
        return self

    def __next__(self) -> Piece:
        return next(self._pieces)

    def __enter__(self) -> "Stream":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the stream; what was enqueued runs out unread."""
        self._pieces.close()

    @property
    def completions(self) -> list[Completion]:
        """One for each prompt, in their order; finished rows have a finish_reason."""
        longest = self._run.model.config.max_kv_cache_len
        return [row.completion(longest, self._capacity) for row in self._rows]

    def _generate(self) -> Generator[Piece]:
        try:
            for row in self._rows:
                if row.finish_reason is not None:
                    yield Piece(row.index, None, "", row.finish_reason)
            if self._unfinished():
                waiting = collections.deque([self._prefill()])
                while waiting:
                    if self._steps_left() > 0:
                        waiting.append(self._decode())
                    yield from self._read(waiting.popleft())
        finally:
            self._keep_session()
            self._cache = self._progress = None

    def _unfinished(self) -> list[Row]:
        return [row for row in self._rows if row.finish_reason is None]

    def _steps_left(self) -> int:
        """Decode steps that are still to be enqueued for the longest row."""
        budgets = [row.request.budget for row in self._unfinished()]
        return max(budgets, default=0) - 1 - self._enqueued

    def _prefill(self) -> sampling.Sampled:
        """Enqueues the prompts, and the tokens that follow them."""
        run, config = self._run, self._run.model.config
        held = self._make_cache()
        prompts = [row.request.prompt[held:] for row in self._rows]
        budgets = self._arrays.budget
        lengths = np.where(budgets > 0, [len(prompt) for prompt in prompts], 0)
        tokens = np.zeros((len(prompts), lengths.max()), np.int32)
        for row, length in enumerate(lengths):
            tokens[row, :length] = prompts[row][:length]
        self.prefilled_tokens = int(lengths.sum())

        logits: Any = np.zeros((len(prompts), config.vocab_size), np.float32)
        chunks = decode.prompt_chunks(
            config, tokens, lengths.astype(np.int32), tokens.shape[1]
        )
        for chunk, left in chunks:
            logits, self._cache = run.prefill(
                self._capacity, self._cache, logits, chunk, left
            )()
        progress = run.put(sampling.start(self._arrays))
        self._arrays = run.put(self._arrays)
        sampled, self._progress = run.first(logits, progress, self._arrays)()
        return sampled

    def _make_cache(self) -> int:
        """A cache for the prompts; returns how many tokens of them it holds."""
        session, needed = self._session, self._tokens_after(self._chunks[-1])
        if session is None or session.cache is None:
            larger = (c for c in self._capacities if c >= needed)
            self._capacity = next(larger, self._capacities[-1])
            self._cache = self._run.empty(len(self._rows), self._capacity)()
            return 0
        ring = self._run.policy.overflow == "ring"
        held = session.reusable(self._rows[0].request.prompt, ring)
        lengths = self._run.put(np.array([held], np.int32))
        self._cache, self._capacity = session.cache, session.capacity
        self._cache = self._cache | {"lengths": lengths}
        session.cache, session.tokens = None, []
        self._grow(needed)
        return held

    def _keep_session(self) -> None:
        if self._session is None or self._cache is None:
            return
        if not self._cache["lengths"].is_deleted():
            row = self._rows[0]
            self._session.tokens = row.request.prompt + row.tokens
            self._session.cache, self._session.capacity = self._cache, self._capacity
            self._session.owner = self._run

    def _tokens_after(self, steps: int) -> int:
        """The longest row's prompt and completion after as many steps more."""
        generated = 1 + self._enqueued + steps
        return max(
            len(row.request.prompt) + min(row.request.budget, generated)
            for row in self._unfinished()
        )

    def _grow(self, tokens: int) -> None:
        """Makes room for `tokens` in each row, from one capacity to the next.

        Leaf by leaf: the peak is the cache and one leaf of the next.
        """
        batch_size = len(self._rows)
        while self._capacity < min(tokens, self._capacities[-1]):
            old = self._capacity
            new = next(c for c in self._capacities if c > old)

            def grow(leaf: jax.Array, old: int = old, new: int = new) -> jax.Array:
                grown = self._run.grow(leaf, batch_size, old, new)()
                if grown is not leaf:
                    grown.block_until_ready()
                    leaf.delete()
                return grown

            self._cache = jax.tree.map(grow, self._cache)
            self._capacity = new

    def _decode(self) -> sampling.Sampled:
        """Enqueues the next chunk, the longest that is not longer than needed."""
        left = self._steps_left()
        steps = next((c for c in self._chunks if c <= left), self._chunks[-1])
        self._grow(self._tokens_after(steps))
        going_on = np.array([row.finish_reason is None for row in self._rows])
        sampled, self._progress, self._cache = self._run.decode(
            self._capacity,
            steps,
            cache=self._cache,
            progress=self._progress,
            rows=self._arrays,
            going_on=going_on,
        )()
        self._enqueued += steps
        for leaf in jax.tree.leaves(sampled):
            leaf.copy_to_host_async()
        return sampled

    def _read(self, sampled: sampling.Sampled) -> Iterator[Piece]:
        """Waits for a chunk, and gives its tokens to their rows."""
        tokens = np.asarray(sampled.tokens)
        reported = {row.index for row in self._unfinished() if row.wants_logprobs}
        logprobs = [np.asarray(x) for x in sampled[1:]] if reported else []
        for step in range(tokens.shape[1]):
            for row in self._unfinished():
                at = (row.index, step)
                if row.index in reported:
                    row.push_logprobs(*(x[at] for x in logprobs))
                assert tokens[at] >= 0, f"row {row.index} ended on the device alone"
                yield row.push(int(tokens[at]))
