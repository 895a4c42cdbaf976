"""How decode reaches the memory's speed: from the textbook's form to ours.

    python -m benchmarks.ladder --config=small
    python -m benchmarks.ladder --config=medium --context=512 --rounds=3

Each rung is the one before it with one thing changed. Those between the first and the
last are written here, as plain functions of arrays, so that the difference is in sight;
they decode the same tokens from the same weights. All take their turns. Prints a table,
then one JSON object as the last line.
"""

import functools
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from rich import console

from benchmarks import chunks, decode_runs, measure, report
from minillm_jax import progress
from minillm_jax.cli import app, config_files
from minillm_jax.cli.app import UserError
from minillm_jax.config import ModelConfig
from minillm_jax.model import cache as kv
from minillm_jax.model import transformer
from minillm_jax.planning import compiled, costs, memory

FLAGS = flags.FLAGS
STEPS = 16  # of a chunk, and tokens that a round decodes


class Rung(NamedTuple):
    """What is done; each field is a step up."""

    donated: bool = False
    unrolled: bool = False  # each layer's arrays apart, else stacked and scanned
    heads_first: bool = False  # leaves [B, K, S, H] instead of [B, S, K, H]
    no_batch_axis: bool = False  # where there is one row
    chunked: bool = False  # STEPS steps in a call, else one


# Fields of a config that the rungs in between know nothing of.
_UNKNOWN = (
    *("sliding_window", "rope_scaling", "attention_softcap", "logits_softcap"),
    *("tie_embeddings", "qkv_bias", "qk_norm", "post_norms", "norm_unit_offset"),
)
RUNGS = {
    "a cache, layers scanned": Rung(),
    "+ donated": Rung(donated=True),
    "+ layers unrolled, a leaf each": Rung(donated=True, unrolled=True),
    "+ heads before slots": Rung(donated=True, unrolled=True, heads_first=True),
    "+ no batch axis of one row": Rung(True, True, True, True),
    "+ 16 steps a call": Rung(True, True, True, True, True),
}


def define_flags() -> None:
    """Defines everything but --config."""
    flags.DEFINE_integer("context", 256, "Tokens that the cache holds.", lower_bound=1)
    flags.DEFINE_integer("batch_size", 1, "Rows.", lower_bound=1)
    flags.DEFINE_integer("rounds", 5, "Turns of each rung.", lower_bound=1)
    flags.DEFINE_string("json_path", None, "Also write the JSON object to this file.")


def random_kernels(config: ModelConfig) -> dict[str, Any]:
    """Kernels of all layers stacked, and what is not of a layer."""
    inner, narrow = config.num_heads * config.head_dim, config.num_kv_heads
    shapes = {
        "q": (config.dim_model, inner),
        "k": (config.dim_model, narrow * config.head_dim),
        "v": (config.dim_model, narrow * config.head_dim),
        "out": (inner, config.dim_model),
        "gate": (config.dim_model, config.dim_ff),
        "up": (config.dim_model, config.dim_ff),
        "down": (config.dim_ff, config.dim_model),
    }
    keys = iter(jax.random.split(jax.random.key(0), len(shapes) + 2))

    def normal(*shape: int) -> jax.Array:
        return 0.02 * jax.random.normal(next(keys), shape, config.dtype)

    layers = {name: normal(config.num_layers, *shape) for name, shape in shapes.items()}
    embedding = normal(config.vocab_size, config.dim_model)
    head = normal(config.dim_model, config.vocab_size)
    return {"layers": layers, "embedding": embedding, "head": head}


def unstacked(tree: Any, count: int) -> list[Any]:
    """The layers of stacked arrays, each an array of its own."""
    return [jax.tree.map(lambda x, i=layer: x[i] + 0, tree) for layer in range(count)]


def empty_leaf(config: ModelConfig, rung: Rung, rows: int, slots: int) -> jax.Array:
    """Keys or values of a layer."""
    shape = [slots, config.num_kv_heads]
    shape = [*(shape[::-1] if rung.heads_first else shape), config.head_dim]
    if not (rung.no_batch_axis and rows == 1):
        shape = [rows, *shape]
    return jnp.zeros(shape, config.cache_dtype)


def block(config: ModelConfig, rung: Rung, kernels, x, leaves, position):
    """A layer, for a token of each row: `x` [B, D], or [D] without the batch axis."""
    heads = (config.num_kv_heads, -1, config.head_dim)
    normed = _norm(x)
    q = _rotate((normed @ kernels["q"]).reshape(*x.shape[:-1], *heads), position)
    k, v = ((normed @ kernels[n]).reshape(*x.shape[:-1], *heads[::2]) for n in "kv")
    leaves = [
        _write(leaf, new, position, rung)
        for leaf, new in zip(leaves, (_rotate(k, position), v), strict=True)
    ]
    order = "KSH" if rung.heads_first else "SKH"
    scores = jnp.einsum(f"...KGH,...{order}->...KGS", q, leaves[0])
    seen = jnp.arange(scores.shape[-1]) <= position
    probs = jax.nn.softmax(jnp.where(seen, scores / config.head_dim**0.5, -1e30))
    mixed = jnp.einsum(f"...KGS,...{order}->...KGH", probs, leaves[1])
    x = x + mixed.reshape(*x.shape[:-1], -1) @ kernels["out"]
    normed = _norm(x)
    gated = jax.nn.silu(normed @ kernels["gate"]) * (normed @ kernels["up"])
    return x + gated @ kernels["down"], leaves


def step(config: ModelConfig, rung: Rung, params, leaves, tokens, position):
    """The likeliest next tokens, and the leaves with this one's keys and values."""
    x = params["embedding"][tokens]
    layer = functools.partial(block, config, rung)
    if rung.unrolled:
        written = []
        for kernels, pair in zip(params["layers"], leaves, strict=True):
            x, pair = layer(kernels, x, pair, position)
            written.append(pair)
    else:

        def scanned(x, given):
            return layer(*(given[0], x, given[1], position))

        x, written = jax.lax.scan(scanned, x, (params["layers"], leaves))
    return jnp.argmax(_norm(x) @ params["head"], axis=-1), written


class Runner:
    """A rung, compiled."""

    def __init__(self, config: ModelConfig, rung: Rung, rows: int, context: int):
        self._context = context
        params = random_kernels(config)
        leaf = functools.partial(empty_leaf, config, rung, rows, context + STEPS)
        if rung.unrolled:
            params["layers"] = unstacked(params["layers"], config.num_layers)
            leaves = [[leaf(), leaf()] for _ in range(config.num_layers)]
        else:
            count = config.num_layers
            leaves = [jnp.stack([leaf()] * count) for _ in range(2)]
        shape = () if rung.no_batch_axis and rows == 1 else (rows,)
        self._params, self._leaves = params, leaves
        self._tokens = jnp.zeros(shape, jnp.int32)
        one = functools.partial(step, config, rung)
        self._calls = 1 if rung.chunked else STEPS
        call = jax.jit(
            functools.partial(_chunk, one) if rung.chunked else one,
            donate_argnums=(1,) if rung.donated else (),
        )
        given = (params, leaves, self._tokens, np.int32(context))
        self._call = call.lower(*given).compile()
        self.temp_bytes = compiled.temporary_bytes(self._call)

    def seconds(self) -> float:
        """Of a step, of STEPS that follow `context` tokens."""
        tokens, leaves = self._tokens, self._leaves
        start = time.perf_counter()
        for index in range(self._calls):
            position = np.int32(self._context + index)
            tokens, leaves = self._call(self._params, leaves, tokens, position)
        jax.block_until_ready(tokens)
        took = time.perf_counter() - start
        self._leaves = leaves
        return took / STEPS


class NoCache:
    """The library's forward over the whole context, for each token."""

    def __init__(self, config: ModelConfig, rows: int, context: int):
        model = transformer.create_model(config)
        self._params = transformer.init_params(model)
        self._tokens = np.zeros((rows, context), np.int32)

        forward = jax.jit(decode_runs.last_logits, static_argnames=("model",))
        self._call = forward.lower(model, self._params, self._tokens).compile()
        self.temp_bytes = compiled.temporary_bytes(self._call)

    def seconds(self) -> float:
        """Of a token."""
        return measure.elapsed(self._call, self._params, self._tokens)


class Ours:
    """The library's decode chunk."""

    def __init__(self, config: ModelConfig, rows: int, context: int):
        model = transformer.create_model(config)
        params = transformer.init_params(model)
        cache = kv.init_cache(model.config, rows, context + STEPS)
        self._chunk = chunks.DecodeChunk(
            *(model, params, cache), context=context, steps=STEPS
        )
        self.temp_bytes = compiled.temporary_bytes(self._chunk.executable)

    def seconds(self) -> float:
        """Of a step."""
        return self._chunk.seconds() / STEPS


def _chunk(one, params, leaves, tokens, position):
    def body(carry, index):
        tokens, leaves = carry
        return one(params, leaves, tokens, position + index), None

    return jax.lax.scan(body, (tokens, leaves), jnp.arange(STEPS, dtype=jnp.int32))[0]


def _norm(x):
    return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + 1e-5)


def _rotate(x, position):
    half = x.shape[-1] // 2
    angles = position * 10000.0 ** (-jnp.arange(half) / half)
    first, second = x[..., :half], x[..., half:]
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    turned = [first * cos - second * sin, second * cos + first * sin]
    return jnp.concatenate(turned, axis=-1).astype(x.dtype)


def _write(leaf, new, position, rung: Rung):
    """A plain update, as the textbook has it: no token is past the end here."""
    axis = -2 if rung.heads_first else -3
    start = [0] * leaf.ndim
    start[axis] = position
    new = jnp.expand_dims(new, axis if rung.heads_first else -3)
    return jax.lax.dynamic_update_slice(leaf, new.astype(leaf.dtype), tuple(start))


def benchmark(config: ModelConfig) -> dict[str, Any]:
    """Measures the rungs in turn; returns the object that `main` prints."""
    rows, context = FLAGS.batch_size, FLAGS.context
    if context > config.max_seq_len:
        raise UserError(f"--context={context}: at most {config.max_seq_len}")
    asked = {name: getattr(config, name) for name in _UNKNOWN}
    asked["quantization"] = config.quantization != "none"
    asked["cache_dtype"] = config.cache_dtype == "int8"
    for name in (name for name, wanted in asked.items() if wanted):
        raise UserError(f"config.model.{name}: the textbook's forms do not have it")
    plan = memory.plan_memory(config, rows, context + STEPS)
    if not plan.fits:
        raise UserError(plan.refusal())
    config = plan.config
    makers: dict[str, Any] = {"no cache": functools.partial(NoCache, config)}
    for name, rung in RUNGS.items():
        makers[name] = functools.partial(Runner, config, rung)
    makers["ours"] = functools.partial(Ours, config)
    probe, seconds, shares, temps = measure.Bandwidth(), {}, {}, {}
    needed = costs.decode_step_bytes(config, rows, context + STEPS // 2)
    with progress.bar("measuring", len(makers) * (FLAGS.rounds + 1)) as bar:
        for turn in range(FLAGS.rounds + 1):
            for name, make in makers.items():
                progress.advance(bar, name)
                runner = make(rows, context)  # one at a time is alive
                runner.seconds()  # warms up
                bound = probe.probe()
                took = min(runner.seconds() for _ in range(3))
                temps[name] = runner.temp_bytes
                del runner
                if turn > 0:  # the first one warms up
                    seconds.setdefault(name, []).append(took)
                    shares.setdefault(name, []).append(needed / took / bound)
    result = report.header("ladder", {"model": config.to_dict()})
    return result | {
        "batch_size": rows,
        "context": context,
        "rungs": [
            {
                "name": name,
                "tokens_per_second": measure.spread([rows / s for s in seconds[name]]),
                "mbu": measure.spread(shares[name]),
                "temp_bytes": temps[name],
            }
            for name in makers
        ],
    }


def _show(result: dict[str, Any]) -> None:
    out, model = console.Console(highlight=False), result["config"]["model"]
    out.print(
        f"{result['device']['name']} ({result['device']['platform']}), jax "
        f"{result['versions']['jax']}, {model['dtype']}, batch size "
        f"{result['batch_size']}, context {result['context']}\n"
    )
    shown = report.grid("", "tok/s", "(min-max)", "MBU", "temp MB")
    shown.columns[0].justify = "left"
    for rung in result["rungs"]:
        speed = rung["tokens_per_second"]
        shown.add_row(
            *(rung["name"], report.rate(speed["median"]), report.least_and_most(speed)),
            *(f"{rung['mbu']['median']:.2f}", f"{rung['temp_bytes'] / 1e6:.1f}"),
        )
    out.print(shown)
    out.print(
        "\nMBU: what a step must read over its time, as a share of the read bandwidth\n"
        "probed beside it. temp: what XLA holds beside arguments and results.\n"
    )


def main(config: Any) -> None:
    """Measures, then prints."""
    report.check_writable(FLAGS.json_path, "--json_path")
    result = benchmark(config_files.model_config(config))
    _show(result)
    report.write_json(result, FLAGS.json_path)


if __name__ == "__main__":
    define_flags()
    app.run(main)
