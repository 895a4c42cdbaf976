"""Bytes that one call of the model holds beside weights, cache and arguments.

The formulas follow what XLA was seen to keep, and are compared with it in the tests:
the widest moment of a layer, and what all layers keep.
"""

import math
from typing import NamedTuple

from minillm_jax.config import ModelConfig
from minillm_jax.model import attention, blockwise
from minillm_jax.planning import costs
from minillm_jax.training import loss

SAMPLING_COPIES = 9  # of the logits: a step that samples, and what requests count
SCALARS_BYTES = 2**20  # tokens, metrics and the like, at most
REMAT_KEPT = 1.3  # layer's inputs of each layer: a little more than one was seen
APART = 0.35  # of the gradients: they take no more than the rest of what was kept
PACKING = 1.005  # of an optimiser's updates: 1.0022 was seen, gaps included


class Call(NamedTuple):
    """One call of the model, of several tokens a row or of one."""

    config: ModelConfig  # nothing "auto"
    platform: str
    rows: int
    tokens: int  # new ones of each row
    keys: int  # that each of them meets, masked or not
    cached: bool

    def activation_bytes(self) -> int:
        """Bytes alive at once, logits included, when no gradient is taken."""
        logits = SAMPLING_COPIES * 4 * self.config.vocab_size
        rows = self.rows * (self._stream + logits)
        return rows + self.widest_moment() + self._kept_bytes()

    def widest_moment(self) -> int:
        """Bytes of a layer at its widest, beside the residual stream.

        That is one of three: qkv and what RoPE makes of it; queries, scores and what
        softmax makes of them; gate and up and their product. Narrow products are sums
        in float32 before they are rounded.
        """
        config, tokens, sums = self.config, self.tokens, 4
        size, inner = costs.itemsize(config.dtype), self.inner
        qkv = inner + 2 * config.num_kv_heads * config.head_dim
        rounded = 0 if size == 4 else config.dim_model * size
        projecting = tokens * (qkv * (sums + size) + rounded)
        attending = tokens * inner * size
        mixing = tokens * (config.dim_ff * (2 * sums + size) + rounded)
        copies = 2 if size == 4 else 3  # scores, their exponentials, these rounded
        scores = copies * self.score_bytes()
        return max(
            *(self.rows * projecting, self.rows * mixing),
            self.rows * attending + scores,
        )

    @property
    def inner(self) -> int:
        """Features of all query heads."""
        return self.config.num_heads * self.config.head_dim

    @property
    def _stream(self) -> int:
        return self.tokens * self.config.dim_model * costs.itemsize(self.config.dtype)

    def score_bytes(self) -> int:
        """float32 scores of the queries and keys that meet at once, of all rows.

        Blocks of queries are powers of two that fit SCORE_BYTES; this is the bound, so
        that more rows or keys never need less.
        """
        heads = 4 * self.rows * self.config.num_heads
        row = heads * self._block_keys()  # of one query
        least = row * min(self.tokens, attention.MIN_QUERY_BLOCK)
        most = row * min(self.tokens, attention.MAX_QUERY_BLOCK)
        block = max(least, min(most, attention.SCORE_BYTES))
        return max(block, heads * self.keys)  # and the mask of what a query may see

    def in_blocks(self) -> bool:
        """Whether `attention.attend` takes the queries block by block, on a GPU."""
        shape = (self.rows, self.config.num_heads, self.tokens, self.config.head_dim)
        return attention.query_block(shape, self._block_keys()) < self.tokens

    def _block_keys(self) -> int:
        gpu = self.platform == "gpu"
        return self.keys if gpu else min(self.keys, attention.KEY_BLOCK)

    def _kept_bytes(self) -> int:
        """What XLA keeps of every layer's attention beside its cache.

        Blocks of queries are replaced by their outputs. On a GPU the outputs are kept,
        behind a cache the queries too, as compiled for an H200 at most. A single block
        behind a cache that meets its keys in blocks sums them up in float32; of more
        rows than a block has it is as much as of those, so that more rows never need
        less.
        """
        elements = self.config.num_layers * self.tokens * self.inner
        if self.platform != "gpu":
            several = 1 < self.tokens <= attention.MAX_QUERY_BLOCK
            if not (self.cached and several and self.keys > attention.KEY_BLOCK):
                return 0
            row = 4 * self.config.num_heads * self.tokens * attention.KEY_BLOCK
            rows = min(self.rows, max(1, attention.SCORE_BYTES // row))
            return 4 * rows * elements
        if not self.in_blocks():
            return 0
        size = costs.itemsize(self.config.dtype)
        return (2 if self.cached else 1) * self.rows * elements * size


def training_bytes(call: Call) -> int:
    """Bytes that a training step holds beside parameters, moments and gradients.

    What every layer keeps for its gradients, a layer's backward pass, and a chunk of
    logits; while the optimiser runs, the updates instead. Most gradients take the place
    of what the layers kept. Bytes for each feature, and that share, were fitted to what
    XLA on CPU keeps (JAX 0.12), and are rounded up. On a GPU all keys meet a block of
    queries, and the cut queries and outputs are kept too; that is reasoned, and was not
    compared with what XLA compiles for one.
    """
    longest = min(float(call.tokens), _longest_at_once(call))
    running = _running_bytes(call, longest, at_once=True)
    if call.tokens > longest:  # never less than a shorter row at once
        running = max(running, _running_bytes(call, call.tokens, at_once=False))
    updates = int(PACKING * costs.weight_bytes(call.config))
    return max(updates, int(running)) + SCALARS_BYTES


def _longest_at_once(call: Call) -> float:
    """Tokens of a row whose scores would just fit one block of queries.

    Not rounded to whole tokens: of more rows it would be rounded by more at times, and
    they would seem to need less.
    """
    scores = attention.SCORE_BYTES / (4 * call.rows * call.config.num_heads)
    fitting = max(attention.MIN_QUERY_BLOCK, math.sqrt(scores))
    return min(blockwise.TRAINING_BLOCK, fitting)


def _running_bytes(call: Call, length: float, *, at_once: bool) -> float:
    """Of the forward and backward pass over rows of `length` tokens, less gradients."""
    config, tokens = call.config, call.rows * length
    layer = tokens * _stored_features(call)
    size, heads = costs.itemsize(config.dtype), call.rows * config.num_heads
    if call.platform == "gpu" and not at_once:
        layer += 2 * size * tokens * call.inner
    if at_once:  # the scores are stored
        layer += (9 if size == 4 else 12) * heads * length * length
    if config.remat:
        kept = REMAT_KEPT * tokens * size * config.dim_model
        backward = 1.45 if size == 4 else 1.7
    else:
        kept, backward = layer, 0.55
    stored = costs.itemsize(config.param_dtype)
    grads = stored * costs.layer_kernels(config)
    kept = config.num_layers * (max(kept, grads) - (1 - APART) * grads)
    if size != stored:  # kernels as they are computed in
        kept += size * costs.parameters(config)
    token = 4 * call.rows * config.vocab_size
    logits = max(token, min(token * length, loss.LOGITS_BYTES))
    return kept + max(backward * layer + (0 if at_once else _blocks(call)), 4 * logits)


def _blocks(call: Call) -> float:
    """Scores of a block of queries and one of keys, and what becomes of them."""
    if call.platform == "gpu":
        return 4 * call.score_bytes()
    size = min(blockwise.TRAINING_BLOCK, call.tokens)
    scores = 4 * call.rows * call.config.num_heads * size
    fitting = max(attention.MIN_QUERY_BLOCK, attention.SCORE_BYTES / scores)
    return 4 * scores * min(size, fitting)


def _heads(config: ModelConfig) -> int:
    """Features of all query heads, and of keys or values."""
    return (config.num_heads + config.num_kv_heads) * config.head_dim


def _stored_features(call: Call) -> int:
    """Bytes that a layer stores of each token, without remat.

    float32: a norm's input, square, normed and scaled values, and the residual stream
    twice. In the compute dtype with float32 sums: heads and gated features.
    """
    config = call.config
    narrow = costs.itemsize(config.dtype) < 4
    norms = 4 if config.post_norms else 2
    stored = (4 * norms + 2) * 4 * config.dim_model
    keys = config.num_kv_heads * config.head_dim
    stored += (9 if narrow else 12) * call.inner + (9 if narrow else 16) * keys
    gate = 13 if config.activation == "silu" else 19
    stored += (gate if narrow else 21) * config.dim_ff
    if config.qk_norm:
        stored += 16 * _heads(config)
    return stored
