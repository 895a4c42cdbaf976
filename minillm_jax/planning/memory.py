"""Whether a model and its cache fit, before anything is allocated.

The parts are summed for the moments when most is alive: weights, cache and a call with
its activations, or the weights as the last of them is made; and the runtime itself.
"""

import dataclasses
from typing import NamedTuple

import jax

from minillm_jax.config import ModelConfig
from minillm_jax.model import attention
from minillm_jax.model import cache as kv
from minillm_jax.planning import costs

RUNTIME_BYTES = 640 * 2**20  # Python, JAX and the compiler, resident on the host
MARGIN = 1.03  # of the rest: allocator rounding, small buffers
SAMPLING_COPIES = 6  # of the logits, in a step that samples


@dataclasses.dataclass(frozen=True)
class MemoryPlan:
    """Bytes by class, beside the limit they must keep."""

    weights_bytes: int
    cache_bytes: int
    activation_bytes: int  # the largest call's, its logits included
    conversion_bytes: int  # copies of weights and cache in another dtype
    init_bytes: int  # of making random weights, before there is a cache
    runtime_bytes: int
    limit_bytes: int

    @property
    def total_bytes(self) -> int:
        """The sum, with a margin for the allocator."""
        running = self.cache_bytes + self.activation_bytes + self.conversion_bytes
        peak = self.weights_bytes + max(running, self.init_bytes)
        return int(MARGIN * peak) + self.runtime_bytes

    @property
    def fits(self) -> bool:
        """Whether the total keeps the limit."""
        return self.total_bytes <= self.limit_bytes

    def refusal(self, device: str) -> str:
        """Why it does not fit, for the user of a command line."""
        return (
            f"does not fit: weights {_gb(self.weights_bytes)}, cache "
            f"{_gb(self.cache_bytes)}, activations {_gb(self.activation_bytes)}, "
            f"copies in another dtype {_gb(self.conversion_bytes)}; in all "
            f"{_gb(self.total_bytes)} with the runtime, but "
            f"{_gb(max(self.limit_bytes, 0))} are available on {device}"
        )


def _gb(size: int) -> str:
    return f"{size / 1e9:.1f} GB"


def plan_decode(
    config: ModelConfig,
    *,
    batch_size: int,
    capacity: int,
    forward_tokens: int = 0,
    platform: str,
    limit_bytes: int,
    policy: kv.CachePolicy = kv.CachePolicy(),
) -> MemoryPlan:
    """The plan of a prefill and decode, and of a forward without cache if there is one.

    Args:
      config: dtypes "auto" are resolved for `platform`.
      batch_size: rows.
      capacity: tokens a row of the cache can hold.
      forward_tokens: tokens per row of the longest forward without cache.
      platform: JAX's name of it: "cpu", "gpu" or "tpu".
      limit_bytes: what may be used.
      policy: what the cache is made with.
    """
    config = config.resolve(platform)
    slots = kv.num_slots(config, capacity, policy)
    weights = costs.weight_bytes(config)
    cache = costs.cache_bytes(config, batch_size, slots)
    chunk = min(config.prefill_chunk, capacity)
    calls = [_Call(config, platform, batch_size, chunk, max(slots), cached=True)]
    if forward_tokens:
        shape = (batch_size, forward_tokens, forward_tokens)
        calls.append(_Call(config, platform, *shape, cached=False))
    return MemoryPlan(
        weights_bytes=weights,
        cache_bytes=cache,
        activation_bytes=max(call.activation_bytes() for call in calls),
        conversion_bytes=_conversions(
            config, platform, batch_size, cache, max(slots) / sum(slots)
        ),
        init_bytes=_making_weights(config),
        runtime_bytes=RUNTIME_BYTES if platform == "cpu" else 0,
        limit_bytes=limit_bytes,
    )


class _Call(NamedTuple):
    """One call of the model, of several tokens a row or of one."""

    config: ModelConfig
    platform: str
    rows: int
    tokens: int  # new ones of each row
    keys: int  # that each of them meets, masked or not
    cached: bool

    def activation_bytes(self) -> int:
        """Bytes alive at once, logits included.

        The widest of three moments of a layer, each beside the residual stream: qkv and
        what RoPE makes of it; queries, scores and what softmax makes of them; gate and
        up and their product. Narrow products are sums in float32 before they are
        rounded.
        """
        config, tokens, sums = self.config, self.tokens, 4
        size, inner = costs.itemsize(config.dtype), self._inner
        qkv = inner + 2 * config.num_kv_heads * config.head_dim
        queries, keys = self._block()
        scores = config.num_heads * max(queries * keys, self.keys)
        copies = 2 if size == 4 else 3  # scores, their exponentials, these rounded
        rounded = 0 if size == 4 else config.dim_model * size
        projecting = tokens * (qkv * (sums + size) + rounded)
        attending = tokens * inner * size + copies * sums * scores
        mixing = tokens * (config.dim_ff * (2 * sums + size) + rounded)
        widest = max(projecting, attending, mixing)
        stream = tokens * config.dim_model * size
        logits = SAMPLING_COPIES * 4 * config.vocab_size
        return self.rows * (stream + widest + logits) + self._kept_bytes()

    @property
    def _inner(self) -> int:
        return self.config.num_heads * self.config.head_dim

    def _block(self) -> tuple[int, int]:
        """Queries and keys that `attention.attend` takes together."""
        gpu = self.platform == "gpu"
        keys = self.keys if gpu else min(self.keys, attention.KEY_BLOCK)
        heads = (self.rows, self.config.num_heads)
        shape = (*heads, self.tokens, self.config.head_dim)
        return min(self.tokens, attention.query_block(shape, keys)), keys

    def _kept_bytes(self) -> int:
        """What XLA keeps of every layer's attention that goes in blocks of queries.

        The outputs, unless they replace the queries as they do behind a cache; on a GPU
        both of them then, as compiled for an H200 at most.
        """
        queries, _ = self._block()
        in_place = self.cached and self.platform != "gpu"
        if in_place or queries == self.tokens:
            return 0
        output = self.rows * self.tokens * self._inner
        arrays = 2 if self.cached else 1
        size = costs.itemsize(self.config.dtype)
        return arrays * self.config.num_layers * output * size


def _making_weights(config: ModelConfig) -> int:
    """The largest matrix, in float32, three times: random bits, normals, the result."""
    return 3 * 4 * config.dim_model * max(2 * config.dim_ff, config.vocab_size)


def _conversions(config, platform: str, rows: int, cache: int, largest: float) -> int:
    """Copies in another dtype that XLA keeps beside the stored arrays.

    Weights stored in another dtype than they are computed in are converted before a
    token loop, all of them. Before JAX 0.12, XLA on CPU also looks tokens up and writes
    to the cache in float32: it converts the embedding, tied to the head twice, and the
    cache, of several rows all layers at once.
    """
    size, copies = costs.itemsize(config.dtype), 0
    if platform == "cpu" and size < 4 and jax.__version_info__ < (0, 12):
        width = 6 if config.tie_embeddings else 4
        copies += width * config.vocab_size * config.dim_model
        if costs.itemsize(config.cache_dtype) == 2:
            copies += 2 * (cache if rows > 1 else int(cache * largest))
    if config.param_dtype != config.dtype:
        copies += costs.parameters(config) * size
    if config.cache_dtype != config.dtype:  # a layer's at a time
        copies += int(cache * largest * size // costs.itemsize(config.cache_dtype))
    return copies
