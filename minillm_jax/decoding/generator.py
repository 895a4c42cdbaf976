"""Generator: prompts in, text out, with a bounded number of executables."""

import contextlib
import logging
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from minillm_jax import progress, validation
from minillm_jax.decoding import decode, requests, sampling
from minillm_jax.decoding.executables import Executables
from minillm_jax.decoding.requests import Completion, Prompt
from minillm_jax.decoding.sampling import SamplingParams
from minillm_jax.decoding.stream import Session, Stream
from minillm_jax.model import cache as kv
from minillm_jax.model import transformer
from minillm_jax.text.tokenizer import Tokenizer

SHORT, LONG = 4, 16  # steps of a decode chunk
STREAMED, CHUNKS = (SHORT,), (SHORT, LONG)  # what a stream uses, and what `generate`
SMALLEST = 256  # tokens of the smallest cache: below, the cost is the weights'

_log = logging.getLogger("minillm_jax")
_told: set[str] = set()


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

    Raises:
      ConfigError: for an unknown policy, or sinks that the config cannot keep.
    """

    def __init__(
        self,
        model: transformer.MiniLLM,
        params: decode.Params,
        tokenizer: Tokenizer | None = None,
        overflow: str = "stop",
        num_sinks: int = 0,
    ):
        policy = kv.CachePolicy(overflow=overflow, num_sinks=num_sinks)
        kv.cache_shapes(model.config, policy=policy)  # raises where they do not match
        if "embedding" not in params:
            raise validation.ConfigError(
                "params: must be the inner tree, such as init_params gives; from the "
                "variables of a Linen module that is variables['params']"
            )
        self.model, self.tokenizer, self.policy = model, tokenizer, policy
        self._run = Executables(model, params, policy)
        self._known = self._run.put(_known_ids(tokenizer, model.config.vocab_size))

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
        with self._start(prompts, max_new_tokens, sampling, CHUNKS) as pieces:
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
          session: keeps the cache of one prompt for the next that begins alike.
        """
        return self._start(prompts, max_new_tokens, sampling, STREAMED, session)

    def _start(
        self,
        prompts: Any,
        max_new_tokens: int,
        params: Any,
        chunks: tuple[int, ...],
        session: Session | None = None,
    ) -> Stream:
        config = self.model.config
        asked = requests.make_requests(
            config,
            self.tokenizer,
            self.policy,
            prompts,
            max_new_tokens=max_new_tokens,
            sampling=params,
        )
        if session is not None and len(asked) != 1:
            raise validation.ConfigError(
                f"session: keeps the cache of one prompt, not of {len(asked)}"
            )
        if session is not None and session.owner not in (None, self._run):
            raise validation.ConfigError(
                "session: belongs to another Generator; make a new one for this"
            )
        arrays = sampling.rows(
            [request.params for request in asked],
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
        self._tell_if_random()
        return Stream(
            self._run,
            rows,
            arrays,
            capacities=self.capacities,
            chunks=chunks,
            session=session,
        )

    def _tell_if_random(self) -> None:
        if "random" not in _told and transformer.are_random(self._run.params):
            _told.add("random")
            _log.warning("the weights are random: what they generate means nothing")

    @property
    def capacities(self) -> tuple[int, ...]:
        """Tokens per row that caches are made for: powers of two, then the longest."""
        longest, sinks = self.model.config.max_kv_cache_len, self.policy.num_sinks
        sizes = (SMALLEST << shift for shift in range(longest.bit_length()))
        return (*(size for size in sizes if sinks < size < longest), longest)

    @property
    def compilations(self) -> dict[str, int]:
        """How many executables there are, by name (see executables.py)."""
        return self._run.counts

    @property
    def compile_seconds(self) -> dict[str, float]:
        """Seconds that tracing and compiling each executable took."""
        return dict(self._run.seconds)

    def forbid_compile(self) -> contextlib.AbstractContextManager[None]:
        """A block in which a call that would compile raises CompileForbiddenError."""
        return self._run.forbidden()

    def warmup(self, batch_sizes: Iterable[int] = (1,)) -> dict[str, float]:
        """Compiles all that calls with as many prompts can need; runs nothing.

        After it nothing compiles, whatever the prompts, sampling fields, stop strings
        and `max_new_tokens`. Shows a progress bar on a terminal.

        Returns:
          Seconds by executable, of those that were not there yet.
        """
        before = done = self.compile_seconds
        bounds = validation.Range(1, kv.MAX_ROWS)
        sizes = [validation.whole_number("batch_sizes", b, bounds) for b in batch_sizes]
        jobs = [
            job
            for size in sizes
            for job in self._run.everything(size, self.capacities, CHUNKS)
        ]
        with progress.bar("compiling", len(jobs)) as bar:
            for job in jobs:
                job()
                done = self.compile_seconds
                name = next(reversed(done))
                progress.advance(bar, f"compiled {name} in {done[name]:.1f} s")
        return {name: done[name] for name in done if name not in before}


def _known_ids(tokenizer: Tokenizer | None, vocab_size: int) -> np.ndarray:
    """Which ids may be sampled: all, but for a tokenizer that says which it knows."""
    ids = getattr(tokenizer, "known_ids", None)
    if ids is None:
        return np.ones(vocab_size, bool)
    known = np.zeros(vocab_size, bool)
    known[[i for i in ids if i < vocab_size]] = True
    return known
