"""Generator: prompts in, text out, with a bounded number of executables."""

import contextlib
import functools
import logging
import os
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import numpy as np

from minillm_jax import progress, validation
from minillm_jax.config import ModelConfig
from minillm_jax.decoding import prompt_cache, requests
from minillm_jax.decoding.decode import Params
from minillm_jax.decoding.executables import Executables, Key, smallest_holding
from minillm_jax.decoding.prompt_cache import PromptCacheError
from minillm_jax.decoding.requests import Completion, Prompt
from minillm_jax.decoding.sampling import SamplingParams, request_arrays
from minillm_jax.decoding.stream import Loop, Session, Stream
from minillm_jax.model import cache as kv
from minillm_jax.model import transformer
from minillm_jax.planning import costs
from minillm_jax.text.tokenizer import Tokenizer

# Steps of the decode chunks that a stream uses, and those that `generate` does.
STREAM_STEPS, GENERATE_STEPS = (4,), (4, 16)
SMALLEST_CAPACITY = 256  # tokens; a smaller cache would hardly cost less

_log = logging.getLogger("minillm_jax")


class Generator:
    """Generates from prompts of any mix of lengths, greedily or by sampling.

    Args:
      model: from `create_model`. EOS ids are those of its config.
      params: the inner tree; where its arrays live, everything runs.
      tokenizer: anything with `encode` and `decode`; None = prompts are token ids.
      overflow: what happens when prompt and completion fill max_kv_cache_len: "error"
        raises before any work, "stop" ends the row with the finish_reason "cache_full",
        "ring" goes on and overwrites the oldest tokens.
      num_sinks: first tokens that a ring keeps (arXiv:2309.17453).
      prompt_cache_bytes: what `remember` and `load_cache` may keep on the device.

    Raises:
      ConfigError: for an unknown policy, or sinks that the config cannot keep.
    """

    def __init__(
        self,
        model: transformer.MiniLLM,
        params: Params,
        tokenizer: Tokenizer | None = None,
        overflow: str = "stop",
        num_sinks: int = 0,
        *,
        prompt_cache_bytes: int = prompt_cache.BUDGET_BYTES,
    ):
        policy = kv.CachePolicy(overflow=overflow, num_sinks=num_sinks)
        if not isinstance(model, transformer.MiniLLM):
            raise validation.ConfigError(
                f"model={validation.shown(model)}: must be a MiniLLM, from create_model"
            )
        if not isinstance(tokenizer, Tokenizer | None):
            raise validation.ConfigError(
                f"tokenizer={validation.shown(tokenizer)}: must have encode and decode"
            )
        model = transformer.create_model(model.config)  # resolves dtype="auto"
        transformer.check_params(model, params)
        kv.cache_shapes(model.config, policy=policy)  # raises where they do not match
        self.model, self.tokenizer, self.policy = model, tokenizer, policy
        self._random = transformer.are_random(params)
        self._executables = Executables(
            model,
            params,
            policy,
            capacities=capacities(model.config, policy),
            steps=GENERATE_STEPS,
        )
        bounds = validation.Range(0, 2**60)
        budget = validation.whole_number(
            "prompt_cache_bytes", prompt_cache_bytes, bounds
        )
        self._prompts = prompt_cache.PromptCache(model.config, policy, budget)
        self._origin = prompt_cache.Origin(
            model.config, self._executables.params, tokenizer
        )
        known = _known_ids(tokenizer, model.config.vocab_size)
        self._known = self._executables.put(known)
        if getattr(tokenizer, "eos_token_ids", ()) and not model.config.eos_token_ids:
            _warn_once(
                "the tokenizer has EOS ids, but config.eos_token_ids is empty: no "
                "completion will end at one"
            )

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        max_new_tokens: int = 64,
        sampling: SamplingParams | Sequence[SamplingParams] = SamplingParams(),
    ) -> list[Completion]:
        """The completions of one prompt or several, side by side, in their order.

        Args:
          prompts: a text or token ids, or a list of these.
          max_new_tokens: for each of them.
          sampling: for all of them, or one for each.

        Raises:
          CacheOverflowError: before any work, if a prompt is longer than the cache or,
            under "error", if prompt and `max_new_tokens` do not fit.
          ConfigError: a ValueError that names what is wrong.
        """
        if isinstance(prompts, (list, tuple)) and not prompts:
            return []
        pieces = self._start(prompts, max_new_tokens, sampling, GENERATE_STEPS)
        with pieces:
            for _ in pieces:
                pass
            return pieces.completions

    def stream(
        self,
        prompts: Prompt | Sequence[Prompt],
        max_new_tokens: int = 64,
        sampling: SamplingParams | Sequence[SamplingParams] = SamplingParams(),
        *,
        session: Session | None = None,
    ) -> Stream:
        """The same, piece by piece: an iterator of `Piece`.

        Errors are raised at once, not by the first piece. Texts of a prompt's pieces
        add up to what `generate` returns. To stop early, close it or leave it.

        Args:
          prompts: a text or token ids, or a list of these.
          max_new_tokens: for each of them.
          sampling: for all of them, or one for each.
          session: keeps the cache of one prompt for a later one that starts with the
            same tokens.
        """
        return self._start(prompts, max_new_tokens, sampling, STREAM_STEPS, session)

    def _start(
        self,
        prompts: Any,
        max_new_tokens: int,
        sampling: Any,
        steps: Sequence[int],
        session: Session | None = None,
    ) -> Stream:
        config = self.model.config
        asked = requests.make_requests(
            config,
            self.tokenizer,
            self.policy,
            prompts,
            max_new_tokens=max_new_tokens,
            sampling=sampling,
        )
        if session is not None:
            if not isinstance(session, Session):
                raise validation.ConfigError(
                    f"session={validation.shown(session)}: must be a Session"
                )
            session.check(self._executables, len(asked))
        arrays = request_arrays(
            [request.sampling for request in asked],
            sample_indices=[request.sample_index for request in asked],
            prompts=[request.prompt for request in asked],
            budgets=[request.budget for request in asked],
            eos_token_ids=config.eos_token_ids,
            known=self._known,
        )
        rows = [
            requests.Row(index, request, self.tokenizer, config.eos_token_ids)
            for index, request in enumerate(asked)
        ]
        if self._random:
            _warn_once("the weights are random: the output is noise")
        run = self._executables
        loop = Loop(
            *(run, rows, arrays), steps=steps, prompts=self._prompts, session=session
        )
        return Stream(loop)

    def remember(self, prompt: Prompt) -> int:
        """Keeps the cache of a prompt, such as a system message, for all that follow.

        What later prompts have in common with it, token by token from the first, is not
        prefilled again. Kept caches that have not been used for longest make room where
        `prompt_cache_bytes` are not enough.

        Returns:
          Tokens that were prefilled: 0 where it was kept already, as a whole.

        Raises:
          CacheOverflowError: if it is longer than the cache.
          PromptCacheError: if it alone takes more than `prompt_cache_bytes`.
          ConfigError: for anything that is not one prompt.
        """
        config, run = self.model.config, self._executables
        tokens = requests.prompt_ids(config, self.tokenizer, prompt)
        longest = config.max_kv_cache_len
        if len(tokens) > longest:
            raise kv.CacheOverflowError(
                f"prompt has {len(tokens)} tokens, but max_kv_cache_len={longest}; "
                "only what fits without a ring can be kept"
            )
        best = self._prompts.best(tokens, whole=True)
        kept, held = best or (None, 0)
        if held == len(tokens):
            return 0
        capacity = smallest_holding(run.capacities, len(tokens))
        size, what = self._kept_bytes(capacity), "the cache of this prompt"
        self._prompts.make_room(size, what, but=kept)
        cache = run(Key("init_cache", 1, capacity))
        if best is not None:
            cache = prompt_cache.copied(run, capacity, cache, best, np.ones(1, bool))
        _, cache = run.prefill(cache, capacity, [tokens[held:]])
        cache = jax.block_until_ready(cache)
        self._prompts.keep(prompt_cache.Kept(tuple(tokens), cache, capacity))
        return len(tokens) - held

    def forget(self) -> None:
        """Gives up all that `remember` and `load_cache` keep."""
        self._prompts.clear()

    def save_cache(self, path: str | os.PathLike[str]) -> None:
        """Writes what `remember` keeps to a file, which replaces one of that name.

        The format is in prompt_cache.py; the first call reads all weights once, for a
        fingerprint.

        Raises:
          PromptCacheError: if nothing is kept.
        """
        if not len(self._prompts):
            raise PromptCacheError("nothing is kept yet: call remember(prompt) first")
        prompt_cache.write(path, self._prompts.kept, self._origin)

    def load_cache(self, path: str | os.PathLike[str]) -> int:
        """Keeps what a file of `save_cache` has, as `remember` does.

        Returns:
          How many prompts that are.

        Raises:
          PromptCacheError: for a file that is damaged, or was made with another config,
            other weights or another tokenizer; nothing of it is kept.
        """
        config, run = self.model.config, self._executables
        on_host, size = [], 0
        for arrays in prompt_cache.read(path, self._origin):
            tokens = tuple(arrays["tokens"].tolist())
            capacity = smallest_holding(run.capacities, len(tokens))
            if len(tokens) > capacity:
                raise PromptCacheError(
                    f"{path}: has a prompt of {len(tokens)} tokens, but "
                    f"max_kv_cache_len={config.max_kv_cache_len}"
                )
            shapes = kv.cache_shapes(config, 1, capacity, policy=self.policy)
            on_host.append(
                (tokens, prompt_cache.filled(arrays, shapes, path), capacity)
            )
            size += self._kept_bytes(capacity)
        self._prompts.make_room(size, f"{path}: what it holds")
        for tokens, cache, capacity in on_host:
            self._prompts.keep(prompt_cache.Kept(tokens, run.put(cache), capacity))
        return len(on_host)

    def _kept_bytes(self, capacity: int) -> int:
        """Of a kept prompt's cache."""
        slots = kv.num_slots(self.model.config, capacity, self.policy)
        return costs.cache_bytes(self.model.config, 1, slots)

    @property
    def compilations(self) -> dict[str, int]:
        """How many executables there are of each name.

        "prefill" and "decode" (chunks of prompts and of completions), "first_token",
        "init_cache" and "grow_cache", "copy_rows" (of kept prompts); what each depends
        on is in executables.py.
        """
        return self._executables.counts

    @property
    def compile_seconds(self) -> dict[str, float]:
        """Seconds that tracing and compiling took, by executable."""
        seconds = self._executables.seconds
        return {str(key): seconds[key] for key in seconds}

    def forbid_compile(self) -> contextlib.AbstractContextManager[None]:
        """A block in which a call that would compile raises CompileForbiddenError."""
        return self._executables.forbidden()

    def warmup(self, batch_sizes: Iterable[int] = (1,)) -> dict[str, float]:
        """Compiles all that calls with as many prompts can need; runs nothing.

        After it nothing compiles, whatever the prompts, sampling fields, stop strings
        and `max_new_tokens`; of kept prompts those count that are there now. Shows a
        progress bar in a terminal or notebook.

        Returns:
          Seconds by executable, of those that were not there yet.
        """
        bounds = validation.Range(1, kv.MAX_ROWS)
        given = batch_sizes if isinstance(batch_sizes, Iterable) else (batch_sizes,)
        sizes = [validation.whole_number("batch_sizes", size, bounds) for size in given]
        kept = [one.capacity for one in self._prompts.kept]
        keys = [key for size in sizes for key in self._executables.keys(size, kept)]
        taken = {}
        with progress.bar("compiling", len(keys)) as bar:
            for key in keys:
                seconds = self._executables.compile(key)
                progress.advance(bar, f"compiled {key} in {seconds:.1f} s")
                if seconds:
                    taken[str(key)] = seconds
        return taken


def capacities(config: ModelConfig, policy: kv.CachePolicy) -> tuple[int, ...]:
    """Tokens per row that caches are made for: powers of two, then the longest."""
    longest, smallest = config.max_kv_cache_len, SMALLEST_CAPACITY
    sizes = (smallest << shift for shift in range(longest.bit_length()))
    return (*(size for size in sizes if policy.num_sinks < size < longest), longest)


@functools.cache
def _warn_once(message: str) -> None:
    _log.warning(message)


def _known_ids(tokenizer: Tokenizer | None, vocab_size: int) -> np.ndarray:
    """Which ids may be sampled: all, but for a tokenizer that says which it knows."""
    ids = getattr(tokenizer, "known_ids", None)
    if ids is None:
        return np.ones(vocab_size, bool)
    known = np.zeros(vocab_size, bool)
    known[[i for i in ids if 0 <= i < vocab_size]] = True
    return known
