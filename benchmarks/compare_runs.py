"""Rounds in turn: every peer prefills and decodes the same, one after the other.

What else a shared machine does changes from second to second. So all peers are
measured in each round, and ratios are taken within rounds. Before each prefill the
machine's rate of products is probed, before each decode its read bandwidth: their
bounds. Programs that wait by spinning suffer most from neighbours, so each case tells
how busy the machine was while all peers waited.
"""

import dataclasses
import statistics
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from benchmarks import measure, peers, prompts
from benchmarks.workers import PeerError, Worker
from minillm_jax import validation
from minillm_jax.cli.config_files import CompareSettings
from minillm_jax.config import ConfigError, ModelConfig
from minillm_jax.planning import costs

PREFILL_SECONDS = 10.0  # a peer's, of one case, beyond its first


@dataclasses.dataclass(frozen=True)
class Case:
    """One measurement: how many rows, and how many tokens each."""

    batch_size: int
    context: int  # tokens a row holds at the end
    new_tokens: int

    @property
    def prompt_tokens(self) -> int:
        """Tokens of each row's prompt."""
        return self.context - self.new_tokens

    @property
    def held(self) -> int:
        """Tokens a row holds in the middle of the decode."""
        return self.prompt_tokens + self.new_tokens // 2


@dataclasses.dataclass
class Timings:
    """What one peer did in one case; seconds by round."""

    step_bytes: int
    prefill: dict[int, float] = dataclasses.field(default_factory=dict)
    decode: dict[int, float] = dataclasses.field(default_factory=dict)
    products: dict[int, float] = dataclasses.field(default_factory=dict)  # FLOP/s
    reads: dict[int, float] = dataclasses.field(default_factory=dict)  # bytes/s
    tokens: np.ndarray | None = None  # [B, new_tokens]

    def wants_prefill(self) -> bool:
        """Whether another round would still cost no more than PREFILL_SECONDS."""
        spent = list(self.prefill.values())
        return not spent or sum(spent) + spent[-1] <= PREFILL_SECONDS


class Probes(NamedTuple):
    """What the machine could do."""

    product: measure.Product
    bandwidth: measure.Bandwidth


class Field:
    """The peers that run, and why the others do not or no longer do."""

    def __init__(self, status: dict[str, str], workers: dict[str, Worker]):
        self.status = status  # name -> "ok", or what went wrong
        self.workers = workers

    def call(self, name: str, **request: Any) -> dict[str, Any] | None:
        """A peer's reply; None, and the peer is out, where it failed."""
        if name not in self.workers:
            return None
        try:
            return self.workers[name].call(**request)
        except PeerError as error:
            self.status[name] = f"failed: {error}"
            del self.workers[name]
            return None

    def stop(self) -> None:
        """Ends all processes."""
        for worker in self.workers.values():
            worker.stop()


def checked_peers(settings: CompareSettings) -> tuple[str, ...]:
    """The peers that are asked for, each once; raises ConfigError if one is unknown."""
    # The command line gives several as one string.
    names = [name for given in settings.peers for name in given.split(",")]
    for name in names:
        if name not in peers.PEERS:
            raise ConfigError(
                f"config.compare.peers: {name!r} is none of {', '.join(peers.PEERS)}"
                f"{validation.did_you_mean(name, tuple(peers.PEERS))}"
            )
    return tuple(dict.fromkeys(names or peers.PEERS))


def cases(config: ModelConfig, settings: CompareSettings) -> list[Case]:
    """What the settings ask for; raises ConfigError with numbers."""
    prompts.check(config.vocab_size)
    if not settings.batch_sizes or min(settings.batch_sizes) < 1:
        raise ConfigError(
            f"config.compare.batch_sizes={settings.batch_sizes}: must be numbers from 1"
        )
    longest = config.max_kv_cache_len
    for context in settings.measured_contexts():
        if context > longest:
            raise ConfigError(
                f"config.compare.contexts: {context} tokens are more than "
                f"max_kv_cache_len={longest}; raise that, or write {longest}"
            )
    return [
        Case(batch_size, context, settings.new_tokens)
        for batch_size in dict.fromkeys(settings.batch_sizes)
        for context in dict.fromkeys(settings.contexts)
    ]


def run(
    field: Field,
    config: ModelConfig,
    case: Case,
    *,
    repeats: int,
    probes: Probes,
    progress: Callable[[str], None] = lambda stage: None,
) -> dict[str, Any]:
    """Measures one case; the keys are those of the comparison's `results`."""
    rows, length = case.batch_size, case.prompt_tokens
    prompt = prompts.source_tokens(rows, length, config.vocab_size).tolist()
    progress("warm-up")
    others = measure.busy_share()  # the peers wait now
    timings = _warm_up(field, case, prompt)
    progress("prefill")
    for turn in range(repeats):
        _prefill_round(field, timings, turn, prompt, probes.product)
    progress("decode")
    for turn in range(repeats):
        _decode_round(field, timings, turn, case.new_tokens - 1, probes.bandwidth)

    alive = {name: timings[name] for name in timings if name in field.workers}
    flops = _prefill_flops(config, case)
    summaries = {n: _summary(case, flops, t, alive) for n, t in alive.items()}
    return {
        "batch_size": rows,
        "context": case.context,
        "prompt_tokens": length,
        "new_tokens": case.new_tokens,
        "busy_before": others,
        "prefill_flops": flops,
        "product_gflop_per_s": _giga([t.products for t in alive.values()]),
        "bandwidth_gb_per_s": _giga([t.reads for t in alive.values()]),
        "peers": summaries,
    }


def _prefill_round(
    field: Field,
    timings: dict[str, Timings],
    turn: int,
    prompt: list[Any],
    product: measure.Product,
) -> None:
    for name, timing in timings.items():
        if name in field.workers and timing.wants_prefill():
            bound = product.probe()
            reply = field.call(name, call="prefill", tokens=prompt)
            if reply is not None:
                timing.prefill[turn] = reply["seconds"]
                timing.products[turn] = bound


def _decode_round(
    field: Field,
    timings: dict[str, Timings],
    turn: int,
    steps: int,
    bandwidth: measure.Bandwidth,
) -> None:
    for name, timing in timings.items():
        if name in field.workers:
            bound = bandwidth.probe()
            reply = field.call(name, call="decode", steps=steps)
            if reply is not None:
                timing.decode[turn] = reply["seconds"] / steps
                timing.reads[turn] = bound


def _warm_up(field: Field, case: Case, prompt: list[Any]) -> dict[str, Timings]:
    """Runs each peer once and keeps its tokens; those that failed are left out."""
    timings = {}
    shape = {"batch_size": case.batch_size, "context": case.context}
    for name in list(field.workers):
        begun = field.call(name, call="begin", **shape, held=case.held)
        first = field.call(name, call="prefill", tokens=prompt)
        rest = field.call(name, call="decode", steps=case.new_tokens - 1)
        if begun is not None and first is not None and rest is not None:
            first, rest = np.asarray(first["tokens"]), np.asarray(rest["tokens"])
            tokens = np.concatenate([first[:, None], rest], axis=1)
            timings[name] = Timings(begun["step_bytes"], tokens=tokens)
    return timings


def _summary(
    case: Case, flops: int, timing: Timings, alive: dict[str, Timings]
) -> dict[str, Any]:
    ours, int8 = alive.get(peers.OURS), alive.get(peers.OURS_INT8)
    prompt = case.batch_size * case.prompt_tokens
    return {
        "prefill_tokens_per_second": _rates(prompt, timing.prefill),
        "decode_tokens_per_second": _rates(case.batch_size, timing.decode),
        "prefill_ours_to_peer": ours and _ratios(ours.prefill, timing.prefill),
        "decode_ours_to_peer": ours and _ratios(ours.decode, timing.decode),
        "decode_int8_to_peer": int8 and _ratios(int8.decode, timing.decode),
        "prefill_product_share": _share(flops, timing.prefill, timing.products),
        "bytes_per_step": timing.step_bytes,
        "mbu": _share(timing.step_bytes, timing.decode, timing.reads),
        "same_tokens": ours and same_tokens(ours.tokens, timing.tokens),
    }


def _share(work: float, seconds: dict[int, float], bounds: dict[int, float]) -> float:
    """Work per second over the bound beside it, the median of the rounds."""
    return statistics.median(work / seconds[turn] / bounds[turn] for turn in seconds)


def _giga(probed: list[dict[int, float]]) -> float | None:
    """The median of all probes, in 10^9."""
    values = [value for rounds in probed for value in rounds.values()]
    return statistics.median(values) / 1e9 if values else None


def _rates(tokens: int, seconds: dict[int, float]) -> dict[str, float]:
    return measure.spread([tokens / second for second in seconds.values()])


def _ratios(ours: dict[int, float], peer: dict[int, float]) -> dict[str, float]:
    """Our rate over the peer's, of the rounds that both were in."""
    return measure.spread([peer[turn] / ours[turn] for turn in ours if turn in peer])


def same_tokens(ours: Any, others: Any) -> float:
    """Share of the positions up to each row's first difference, mean over the rows."""
    same = np.cumprod(np.asarray(ours) == np.asarray(others), axis=1)
    return float(same.mean())


def _prefill_flops(config: ModelConfig, case: Case) -> int:
    """FLOPs of all rows' prompts, with the output head for the last token alone."""
    tokens = case.prompt_tokens
    heads = 2 * (tokens - 1) * config.vocab_size * config.dim_model
    return case.batch_size * (costs.forward_flops(config, tokens) - heads)
