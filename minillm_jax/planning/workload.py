"""What is to run, and the bytes that are alive at each moment of it."""

import dataclasses
import functools
from typing import Any

import jax

from minillm_jax.config import ModelConfig
from minillm_jax.decoding import generator
from minillm_jax.decoding.executables import smallest_holding
from minillm_jax.model import cache as kv
from minillm_jax.planning import costs
from minillm_jax.planning.activations import Call, training_bytes

GPU_LIBRARY_BYTES = 64 * 2**20
CPU_LIBRARY_WIDTH = 1.5  # bytes of each token's gated features in every layer

Moments = dict[str, dict[str, int]]  # moment -> class -> bytes alive then


def of_length(
    config: ModelConfig, tokens: int, *, training: bool = False
) -> ModelConfig:
    """The config for rows of so many tokens in a cache, or of a training sequence.

    Its other lengths are shortened or raised where they must be.
    """
    longest = max(config.max_kv_cache_len, tokens) if training else tokens
    sequence = tokens if training else min(config.max_seq_len, tokens)
    fields = {"max_kv_cache_len": longest, "max_seq_len": sequence}
    chunk = config.given().get("prefill_chunk")
    if chunk is not None:
        fields["prefill_chunk"] = min(chunk, longest)
    same = all(getattr(config, name) == value for name, value in fields.items())
    return config if same else config.replace(**fields)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Workload:
    """Rows of some tokens, generated with a cache or trained on."""

    config: ModelConfig  # nothing "auto"
    batch_size: int  # rows
    context: int  # tokens that a row of the cache holds, or of a training sequence
    # Tokens that the cache is allocated for; None = as a Generator would.
    capacity: int | None = None
    policy: kv.CachePolicy = kv.CachePolicy()
    forward_tokens: int = 0  # of the longest forward without cache
    training: bool = False
    accumulated: bool = False  # gradients of several such batches are summed
    # What `config` was before a context shortened it, where one did.
    longer: ModelConfig | None = dataclasses.field(default=None, compare=False)

    def with_context(self, context: int) -> "Workload":
        """The same of another context, which the config is made for."""
        longer = self.longer or self.config
        config = of_length(longer, context, training=self.training)
        return dataclasses.replace(self, config=config, context=context, longer=longer)

    def with_model(self, platform: str, /, **changes: Any) -> "Workload":
        """The same with other fields of the config, resolved for a JAX platform."""
        longer = self.longer and self.longer.replace(**changes).resolve(platform)
        config = self.config.replace(**changes).resolve(platform)
        return dataclasses.replace(self, config=config, longer=longer)

    @property
    def least_context(self) -> int:
        """Tokens of the shortest row there can be: one more than the sinks."""
        return 1 if self.training else self.policy.num_sinks + 1

    @property
    def allocated(self) -> int:
        """Tokens that a row of the cache has room for."""
        if self.capacity is not None:
            return self.capacity
        sizes = generator.capacities(self.config, self.policy)
        return smallest_holding(sizes, self.context)

    @functools.cached_property
    def slots(self) -> list[int]:
        """Slots of each layer; none in training."""
        if self.training:
            return []
        return kv.num_slots(self.config, self.allocated, self.policy)

    @property
    def weights_bytes(self) -> int:
        """Of the parameters as stored."""
        return costs.weight_bytes(self.config)

    @property
    def cache_bytes(self) -> int:
        """Of the cache as allocated."""
        return self._slot_bytes(self.slots)

    @property
    def cache_used_bytes(self) -> int:
        """Of the cache, what the context fills."""
        return self._slot_bytes([min(self.context, count) for count in self.slots])

    def _slot_bytes(self, slots: list[int]) -> int:
        return costs.cache_bytes(self.config, self.batch_size, slots)

    def moments(self, platform: str) -> Moments:
        """Bytes alive at each moment of the run on JAX's platform of that name.

        "init" is when random weights are made, and "growth" when the last leaf of the
        cache is copied to a larger one.
        """
        weights = {"weights": self.weights_bytes}
        making = max(0, _making(self.config) - self.weights_bytes)
        moments = {"init": weights | {"random weights": making}}
        if self.training:
            moments["train"] = weights | self._training(platform)
            return moments
        largest = max(self.slots)
        call = functools.partial(Call, self.config, platform, self.batch_size)
        held = weights | {"cache": self.cache_bytes}
        for name, tokens in (("prefill", self._chunk), ("decode", 1)):
            copies = {"converted copies": self._conversions(platform, name)}
            size = call(tokens, largest, cached=True).activation_bytes()
            moments[name] = held | copies | {"activations": size}
        # A layer's keys or values.
        moments["growth"] = held | {"growth": self._slot_bytes([largest]) // 2}
        if length := self.forward_tokens:
            copies = {"converted copies": self._conversions(platform, "forward")}
            size = call(length, length, cached=False).activation_bytes()
            moments["forward"] = weights | copies | {"activations": size}
        return moments

    def scratch_bytes(self, moment: str, platform: str) -> int:
        """What libraries take for themselves at a moment, of which XLA does not know.

        On a GPU a constant. On CPU those that multiply narrow dtypes lay their operands
        out anew, and keep room for that in every layer.
        """
        if platform == "gpu":
            return GPU_LIBRARY_BYTES
        tokens = {
            "prefill": self._chunk,
            "forward": self.forward_tokens,
            "train": self.context,
        }
        if platform != "cpu" or costs.itemsize(self.config.dtype) == 4:
            return 0
        gated = self.config.num_layers * tokens.get(moment, 0) * self.config.dim_ff
        return int(CPU_LIBRARY_WIDTH * self.batch_size * gated)

    @property
    def _chunk(self) -> int:
        """Tokens of the largest prefill chunk."""
        return min(self.config.prefill_chunk, self.allocated)

    def _training(self, platform: str) -> dict[str, int]:
        """AdamW holds two moments of each parameter; gradients are as parameters.

        Those of a batch in parts are there twice: the sum, and what a part adds.
        """
        config, length = self.config, self.context
        call = Call(config, platform, self.batch_size, length, length, cached=False)
        return {
            "optimizer": 2 * self.weights_bytes,
            "gradients": (2 if self.accumulated else 1) * self.weights_bytes,
            "activations": training_bytes(call),
        }

    def _conversions(self, platform: str, moment: str) -> int:
        """Copies in another dtype that XLA keeps beside the stored arrays.

        Weights stored in another dtype than they are computed in are converted before a
        token loop, all of them. Before JAX 0.12, XLA on CPU also writes to the cache of
        several rows in float32, all layers at once, and a token loop converts the
        embedding that it looks tokens up in, tied to the head twice.
        """
        config, largest = self.config, self._slot_bytes([max(self.slots)])
        size, copies = costs.itemsize(config.dtype), 0
        if platform == "cpu" and size < 4 and jax.__version_info__ < (0, 12):
            looped, several = moment == "decode", self.batch_size > 1
            if looped:
                width = 6 if config.tie_embeddings else 4
                copies += width * config.vocab_size * config.dim_model
            if costs.itemsize(config.cache_dtype) == 2 and moment != "forward":
                copies += 2 * (self.cache_bytes if several else looped * largest)
        kernels, _ = costs.quantized_kernels(config)
        if config.param_dtype != config.dtype:
            copies += (costs.parameters(config) - kernels) * size
        if platform == "cpu" and config.quantization == "w8a16":
            copies += kernels * size
        as_stored = platform == "cpu" and config.cache_dtype == "int8"
        if config.cache_dtype != config.dtype and not as_stored:  # a layer's at a time
            copies += largest * size // costs.itemsize(config.cache_dtype)
        return copies


def _making(config: ModelConfig) -> int:
    """The most that is alive while random weights are made, the largest matrix first.

    Those that are there, and one in float32 three times: random bits, normals, the
    result; a narrow result takes nearly as much again.
    """
    heads = 2 * config.num_heads + 2 * config.num_kv_heads
    layer = (2 * config.dim_ff, config.dim_ff, heads * config.head_dim)
    sizes = [config.dim_model * width for width in layer] * config.num_layers
    tables = 1 if config.tie_embeddings else 2
    sizes += [config.dim_model * config.vocab_size] * tables
    there = alive = 0
    stored = costs.itemsize(config.param_dtype)
    making = 3 * 4 + (0 if stored == 4 else 3)
    if config.quantization != "none":  # then in float32 once more, to be rounded
        stored, making = 1, making + 4
    for size in sorted(sizes, reverse=True):
        alive = max(alive, there + making * size)
        there += stored * size
    return alive
