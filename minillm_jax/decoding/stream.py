"""The generating loop: prefill, then decode chunks, one ahead of the host.

    device   prefill, first token | chunk 1 | chunk 2 | chunk 3 | ...
    host                 enqueue 1, read the first token -> pieces
                                  enqueue 2, read chunk 1 -> pieces
                                            enqueue 3, read chunk 2 -> pieces

A row that ends by its budget, an EOS or a stop id is masked inside its chunk. One that
ends by a stop string, which only the host can see, is masked from the next chunk that
is enqueued; what the device has made of it by then is thrown away.

Where a row outgrows the context that its keys were turned for (`rope.turning_point`),
it waits until all rows have come that far or ended, and is prefilled again: the loop
runs in parts, most often in one.

The host keeps its own count of what the cache holds. It never reads `lengths` back,
except of a Session's cache between two calls.
"""

import collections
from collections.abc import Generator, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from minillm_jax.config import ConfigError
from minillm_jax.decoding import prompt_cache, sampling
from minillm_jax.decoding.executables import Executables, Key, smallest_holding
from minillm_jax.decoding.prompt_cache import Kept, PromptCache
from minillm_jax.decoding.requests import Completion, Piece, Row
from minillm_jax.model import cache as kv
from minillm_jax.model import rope


class Session:
    """A cache that outlives a call, for prompts that continue each other.

    Give it to `Generator.stream` with prompts that begin as the last one did, such as
    the turns of a chat: what the cache holds already is not prefilled again.
    """

    def __init__(self) -> None:
        self._owner: Executables | None = None
        self._borrower: object = None  # the call that has the cache now
        self._tokens: list[int] = []  # of the last prompt and its completion
        self._reached = 0  # most tokens that the cache has held since it was empty
        self._cache: dict[str, Any] | None = None
        self._capacity = 0

    @property
    def tokens(self) -> list[int]:
        """The last prompt and its completion."""
        return list(self._tokens)

    def check(self, owner: Executables, num_prompts: int) -> None:
        """Raises ConfigError where a call cannot have this session."""
        if num_prompts != 1:
            raise ConfigError(
                f"session: keeps the cache of one prompt, not of {num_prompts}"
            )
        if self._owner not in (None, owner):
            raise ConfigError(
                "session: belongs to another Generator; make a new one for this"
            )

    def take(
        self, borrower: object, prompt: Sequence[int]
    ) -> tuple[dict[str, Any], int, int] | None:
        """The cache, its capacity and how much of the prompt it holds, if it has one.

        The prompt's last token is never among that: its logits are needed.
        """
        self._borrower = borrower
        if self._cache is None or self._owner is None:
            self._reached = 0
            return None
        cache, self._cache = self._cache, None
        held = int(np.asarray(cache["lengths"])[0])
        common = min(prompt_cache.common_prefix(self._tokens, prompt[:-1]), held)
        run, config = self._owner, self._owner.model.config
        self._reached = max(self._reached, held)
        rewinds = kv.can_rewind(config, cache, run.policy, self._reached, common)
        if not rewinds or not rope.same_turns(config, held, len(prompt)):
            common = 0
        if common == 0:
            self._reached = 0
        cache = cache | {"lengths": run.put(np.array([common], np.int32))}
        return cache, self._capacity, common

    def keep(
        self,
        borrower: object,
        owner: Executables,
        *,
        cache: dict[str, Any],
        capacity: int,
        tokens: list[int],
        reached: int,
    ) -> None:
        """Takes the cache of a call that has ended, unless a later one has begun.

        `reached` is what the cache had held before it was the call's.
        """
        if self._borrower is borrower:
            self._borrower = None
            self._reached = max(self._reached, reached)
            self._owner, self._tokens = owner, tokens
            self._cache, self._capacity = cache, capacity


class Stream:
    """An iterator of pieces; `completions` tells what came of each prompt so far.

    It can be closed, or left, at any time, and is a context manager that closes.
    """

    def __init__(self, loop: "Loop"):
        # The loop does not know the stream: one that is left is freed at once.
        self._loop, self._pieces = loop, loop.pieces()

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
    def prefilled_tokens(self) -> int:
        """Tokens that were prefilled; what was kept of prompts before had the rest.

        Those that were prefilled again, beyond `rope.turning_point`, count again.
        """
        return self._loop.prefilled_tokens

    @property
    def completions(self) -> list[Completion]:
        """One for each prompt, in their order; finished rows have a finish_reason."""
        return self._loop.completions()


class Loop:
    """The state of one call, and what is done with it."""

    def __init__(
        self,
        executables: Executables,
        rows: Sequence[Row],
        requests: sampling.RequestArrays,
        *,
        steps: Sequence[int],
        prompts: PromptCache,
        session: Session | None = None,
    ):
        self.prefilled_tokens = 0
        self._executables, self._rows = executables, rows
        self._requests, self._session, self._prompts = requests, session, prompts
        self._steps = sorted(steps, reverse=True)
        self._capacity = 0
        self._until: list[int] = []  # each row's tokens at the end of this part
        self._before: list[int] = []  # and at its beginning
        self._enqueued = 0  # decode steps of this part
        self._copied = 0  # tokens of the longest kept prompt that rows began as
        self._cache: Any = None
        self._state: Any = None
        # False while cache, capacity and lengths change: interrupted there, by Ctrl-C
        # or an error, they may not belong together.
        self._settled = False

    def completions(self) -> list[Completion]:
        """What there is so far."""
        longest = self._executables.model.config.max_kv_cache_len
        return [row.completion(longest, self._capacity) for row in self._rows]

    def pieces(self) -> Generator[Piece]:
        """Runs the loop; closing it early is fine."""
        try:
            for row in self._rows:
                if row.finish_reason is not None:
                    yield Piece(row.index, None, "", row.finish_reason)
            while self._begin_part():
                self._settled = False
                waiting = collections.deque([self._prefill()])
                while waiting:
                    if self._steps_left() > 0:
                        self._settled = False
                        waiting.append(self._decode())
                    self._settled = True
                    yield from self._read(waiting.popleft())
        finally:
            if self._session is not None and self._settled:
                self._session.keep(
                    self,
                    self._executables,
                    cache=self._cache,
                    capacity=self._capacity,
                    tokens=self._rows[0].request.prompt + self._rows[0].tokens,
                    reached=self._copied,
                )
            self._cache = self._state = None

    def _begin_part(self) -> bool:
        """Sets how far the rows go in the next part; False where none goes on."""
        point = rope.turning_point(self._executables.model.config)
        self._until, self._enqueued = [], 0
        self._before = [len(row.tokens) for row in self._rows]
        for row in self._rows:
            prompt, until = len(row.request.prompt), row.request.budget
            if point is not None and prompt + len(row.tokens) <= point:
                until = min(until, point - prompt + 1)  # the last is not in the cache
            self._until.append(0 if row.finish_reason is not None else until)
        return bool(self._unfinished())

    def _unfinished(self) -> list[Row]:
        """Rows that go on in this part."""
        return [
            row
            for row in self._rows
            if row.finish_reason is None and len(row.tokens) < self._until[row.index]
        ]

    def _steps_left(self) -> int:
        """Decode steps that are still to be enqueued for the longest row."""
        left = [
            self._until[r.index] - self._before[r.index] for r in self._unfinished()
        ]
        return max(left, default=0) - 1 - self._enqueued

    def _next_steps(self) -> int:
        """Steps of the next chunk: the longest that is not longer than needed."""
        left = self._steps_left()
        return next((s for s in self._steps if s <= left), self._steps[-1])

    def _key(self, name: str, size: int | None = None) -> Key:
        """The executable for these rows and their cache as it is now."""
        kind = self._requests.sampler is not None
        if name == "first_token":
            return Key(name, len(self._rows), sampling=kind)
        sampled = kind if name == "decode" else None
        return Key(name, len(self._rows), self._capacity, size, sampled)

    def _prefill(self) -> sampling.Sampled:
        """Enqueues the prompts, and their first tokens."""
        run = self._executables
        held = self._take_cache()
        if self._steps_left() > 0:  # now, for the first token will not wait for it
            run.compile(self._key("decode", self._next_steps()))
        prompts: list[list[int]] = [[] for _ in self._rows]
        for row in self._unfinished():
            whole = row.request.prompt + row.tokens
            prompts[row.index] = whole[held[row.index] :]
        self.prefilled_tokens += sum(map(len, prompts))
        logits, self._cache = run.prefill(self._cache, self._capacity, prompts)
        requests = self._requests._replace(budget=np.array(self._until, np.int32))
        generated = [row.tokens for row in self._rows]
        state = run.put(sampling.initial_state(requests, generated))
        self._requests = run.put(requests)
        key = self._key("first_token")
        sampled, self._state = run(
            key, logits=logits, state=state, requests=self._requests
        )
        return sampled

    def _take_cache(self) -> list[int]:
        """A cache for the prompts; returns how many tokens of each it holds."""
        needed, nothing = self._tokens_after(self._steps[-1]), [0] * len(self._rows)
        if self._cache is not None:  # an earlier part's, as if it were empty
            empty = self._executables.put(np.zeros(len(self._rows), np.int32))
            self._cache = self._cache | {"lengths": empty}
            self._grow(needed)
            return nothing
        prompt = self._rows[0].request.prompt
        taken = self._session.take(self, prompt) if self._session is not None else None
        if taken is not None:
            self._cache, self._capacity, held = taken
            self._grow(needed)
            return [held] if held else self._copy_prompts(nothing)
        self._capacity = smallest_holding(self._executables.capacities, needed)
        self._cache = self._executables(self._key("init_cache"))
        return self._copy_prompts(nothing)

    def _copy_prompts(self, held: list[int]) -> list[int]:
        """Rows that begin as a kept prompt does get its cache."""
        found: dict[tuple[Kept, int], list[int]] = {}
        for row in self._unfinished():
            if (best := self._prompts.best(row.request.prompt)) is not None:
                found.setdefault(best, []).append(row.index)
        for best, rows in found.items():
            self._copied = max(self._copied, len(best[0].tokens))
            chosen = np.isin(np.arange(len(held)), rows)
            self._cache = prompt_cache.copied(
                *(self._executables, self._capacity, self._cache, best, chosen)
            )
            for row in rows:
                held[row] = best[1]
        return held

    def _tokens_after(self, steps: int) -> int:
        """The longest row's prompt and completion after as many steps more."""
        new = 1 + self._enqueued + steps
        return max(
            len(r.request.prompt)
            + min(self._until[r.index], self._before[r.index] + new)
            for r in self._unfinished()
        )

    def _grow(self, tokens: int) -> None:
        """Makes room for `tokens` in each row, from one capacity to the next.

        A layer's keys, then its values: the peak is the cache and one of those more.
        """
        longest = self._executables.capacities[-1]
        while self._capacity < min(tokens, longest):
            for layer, slots in enumerate(self._executables.next_slots(self._capacity)):
                key, name = self._key("grow_cache", slots), f"layers_{layer}"

                def grow(half: Any, key: Key = key) -> Any:
                    if half.shape[-2] >= (key.size or 0):
                        return half
                    grown = jax.block_until_ready(self._executables(key, half=half))
                    jax.tree.map(lambda leaf: leaf.delete(), half)
                    return grown

                k, v = kv.held(self._cache[name]["attention"])
                self._cache[name] = {"attention": kv.named(grow(k), grow(v))}
            self._capacity = self._executables.larger(self._capacity)

    def _decode(self) -> sampling.Sampled:
        """Enqueues the next chunk."""
        steps = self._next_steps()
        self._grow(self._tokens_after(steps))
        unfinished = np.array([row.finish_reason is None for row in self._rows])
        sampled, self._state, self._cache = self._executables(
            self._key("decode", steps),
            cache=self._cache,
            state=self._state,
            requests=self._requests,
            unfinished=unfinished,
        )
        self._enqueued += steps
        for leaf in jax.tree.leaves(sampled):
            leaf.copy_to_host_async()
        return sampled

    def _read(self, sampled: sampling.Sampled) -> Iterator[Piece]:
        """Waits for a chunk, and gives its tokens to their rows."""
        if not any(row.wants_logprobs for row in self._unfinished()):
            sampled = sampling.Sampled(sampled.tokens, None, None, None)
        host: Any = jax.tree.map(np.asarray, sampled)
        for step in range(host.tokens.shape[1]):
            for row in self._unfinished():
                at = (row.index, step)
                if row.wants_logprobs:
                    chosen = float(host.logprobs[at])
                    row.push_logprobs(chosen, host.top_ids[at], host.top_logprobs[at])
                assert host.tokens[at] >= 0, (
                    f"row {row.index} ended on the device alone"
                )
                yield row.push(int(host.tokens[at]))
