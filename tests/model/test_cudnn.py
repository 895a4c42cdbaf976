"""The flash attention of cuDNN: when it is chosen, and what is made of its two masks.

There is no GPU here: the kernel itself is stood in for by its definition, in JAX.
"""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.cudnn import fused_attention_stablehlo as fused

import minillm_jax as mj
from minillm_jax import testing
from minillm_jax.decoding import decode
from minillm_jax.model import attention, cudnn, scores, transformer
from minillm_jax.model import cache as kv
from minillm_jax.model.transformer import MiniLLM


def definition(
    q, k, v, *, scale, mask_type, q_seqlen, kv_seqlen, qkv_layout,
    sliding_window_length, return_residual,
):  # fmt: skip
    """`fused.dot_product_attention`, of what the library asks of it."""
    assert qkv_layout == "BNTH"
    groups = q.shape[1] // k.shape[1]
    k, v = (jnp.repeat(x, groups, axis=1).astype(jnp.float32) for x in (k, v))
    scores = scale * jnp.einsum("BNTH,BNSH->BNTS", q.astype(jnp.float32), k)
    query, key = np.indices(scores.shape[-2:])
    if mask_type == fused.MaskType.CAUSAL:
        assert q_seqlen is None
        assert kv_seqlen is None
        mask = jnp.asarray(key <= query)[None]
        if sliding_window_length is not None:
            mask &= jnp.asarray(key > query - sliding_window_length)[None]
    else:
        assert mask_type == fused.MaskType.PADDING
        assert q_seqlen.dtype == kv_seqlen.dtype == jnp.int32
        mask = jnp.asarray(key)[None] < kv_seqlen[:, None, None]
    scores = jnp.where(mask[:, None], scores, -jnp.inf)
    out = jnp.einsum("BNTS,BNSH->BNTH", jax.nn.softmax(scores), v).astype(q.dtype)
    lse = jax.nn.logsumexp(scores, axis=-1)
    return (out, lse) if return_residual else out


def a_gpu(monkeypatch, *, capable=True):
    """Makes JAX's own checks say what they would on a GPU with cuDNN."""
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(fused, "check_cudnn_version", lambda: 91000)
    monkeypatch.setattr(fused, "check_compute_capability", lambda _: capable)
    monkeypatch.setattr(fused, "is_cuda_compute_capability_equal", lambda _: False)
    cudnn._refusal.cache_clear()


@pytest.fixture(autouse=True)
def _forget():
    yield
    cudnn._refusal.cache_clear()
    jax.clear_caches()


def random_call(key, *, batch, heads, groups, length, slots, dtype=jnp.float32):
    keys = jax.random.split(key, 5)
    shape = (batch, heads)
    q = jax.random.normal(keys[0], (*shape, groups, length, 16), dtype)
    new = [jax.random.normal(x, (*shape, length, 16), dtype) for x in keys[1:3]]
    held = [jax.random.normal(x, (*shape, slots, 16), dtype) for x in keys[3:]]
    return q, *new, *held


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("length", [2, 7])
def test_new_tokens_and_held_ones_are_put_together_exactly(
    key, monkeypatch, groups, length
):
    """Nothing held, some, and as many as leave no more than the new ones."""
    monkeypatch.setattr(fused, "dot_product_attention", definition)
    q, k, v, held_k, held_v = random_call(
        key, batch=3, heads=2, groups=groups, length=length, slots=20
    )
    first = jnp.array([0, 5, 20 - length], jnp.int32)
    rows = [jnp.arange(length) + start for start in np.asarray(first)]
    for row, slots in enumerate(rows):
        held_k = held_k.at[row, :, slots].set(jnp.moveaxis(k[row], 1, 0))
        held_v = held_v.at[row, :, slots].set(jnp.moveaxis(v[row], 1, 0))
    expected = attention.attend(
        *(q, held_k, held_v),
        queries=scores.Places(jnp.stack(rows)),
        keys=scores.Places(kv.slot_positions(first + length, 20, kv.SlotRule())),
        scale=0.3,
    )
    actual = cudnn.attend_after(q, k, v, held_k, held_v, first=first, scale=0.3)
    chex.assert_trees_all_close(actual, expected, atol=2e-6, rtol=0)


def test_one_token_attends_to_what_is_held(key, monkeypatch):
    monkeypatch.setattr(fused, "dot_product_attention", definition)
    q, _, _, k, v = random_call(key, batch=2, heads=2, groups=2, length=1, slots=9)
    held = jnp.array([1, 9], jnp.int32)
    expected = attention.attend(
        *(q, k, v),
        queries=scores.Places(held[:, None] - 1),
        keys=scores.Places(kv.slot_positions(held, 9, kv.SlotRule())),
        scale=0.3,
    )
    actual = cudnn.attend_held(q, k, v, held=held, scale=0.3)
    chex.assert_trees_all_close(actual, expected, atol=2e-6, rtol=0)
    nothing = cudnn.attend_held(q, k, v, held=jnp.zeros_like(held), scale=0.3)
    assert bool(jnp.all(jnp.isfinite(nothing)))


@pytest.mark.parametrize("window", [None, 3])
def test_a_sequence_attends_to_itself(key, monkeypatch, window):
    monkeypatch.setattr(fused, "dot_product_attention", definition)
    q, k, v, _, _ = random_call(key, batch=2, heads=2, groups=2, length=8, slots=1)
    places = scores.Places(jnp.broadcast_to(jnp.arange(8), (2, 8)))
    rule = kv.SlotRule(window=window)
    expected = attention.attend(
        q, k, v, queries=places, keys=places, rule=rule, scale=0.3
    )
    actual = cudnn.attend_alone(q, k, v, window=window, scale=0.3)
    chex.assert_trees_all_close(actual, expected, atol=2e-6, rtol=0)


# The choice


def test_on_a_gpu_auto_is_cudnn_for_several_tokens(monkeypatch):
    a_gpu(monkeypatch)
    config = mj.create_model(mj.Configs.small()).config
    assert (config.attention, config.decode_attention) == ("cudnn", "xla")
    assert cudnn.attends(config, 8, kv.SlotRule(), cached=True)
    assert cudnn.attends(config, 8, kv.SlotRule(window=4), cached=False)
    assert not cudnn.attends(config, 8, kv.SlotRule(), cached=False, packed=True)
    assert not cudnn.attends(config, 1, kv.SlotRule(), cached=True)
    assert not cudnn.attends(config, 8, kv.SlotRule(window=4), cached=True)
    assert not cudnn.attends(config, 8, kv.SlotRule(wraps=True, window=4), cached=True)


def test_elsewhere_auto_is_xla():
    config = mj.create_model(mj.Configs.small()).config
    assert (config.attention, config.decode_attention) == ("xla", "xla")


@pytest.mark.parametrize(
    ("changes", "capable", "words"),
    [
        ({"dtype": "float32"}, True, "bfloat16 or float16, not float32"),
        ({"attention_softcap": 3.0}, True, "no attention_softcap=3.0"),
        ({"head_dim": 256}, False, "head dim must be <= 128"),
    ],
)
@pytest.mark.parametrize("name", ["attention", "decode_attention"])
def test_what_cudnn_cannot_do_is_refused_or_left_to_xla(
    monkeypatch, changes, capable, words, name
):
    a_gpu(monkeypatch, capable=capable)
    config = mj.Configs.small().replace(**changes)
    assert getattr(mj.create_model(config).config, name) == "xla"
    with pytest.raises(mj.ConfigError, match=words) as raised:
        mj.create_model(config.replace(**{name: "cudnn"}))
    assert str(raised.value).startswith(f"{name}='cudnn': ")
    assert "write 'auto' or 'xla'" in str(raised.value)


@pytest.mark.parametrize("cache_dtype", ["int8", "float32"])
def test_a_step_by_cudnn_needs_a_cache_in_the_dtype_of_the_model(
    monkeypatch, cache_dtype
):
    a_gpu(monkeypatch)
    config = mj.Configs.small().replace(cache_dtype=cache_dtype)
    chosen = mj.create_model(config).config
    assert (chosen.attention, chosen.decode_attention) == ("cudnn", "xla")
    assert mj.create_model(config.replace(attention="cudnn")).config == chosen
    message = f"decode_attention='cudnn': needs a cache in bfloat16, not {cache_dtype};"
    with pytest.raises(mj.ConfigError, match=message):
        mj.create_model(config.replace(decode_attention="cudnn"))


def test_without_a_gpu_cudnn_is_refused():
    config = mj.Configs.small().replace(dtype="bfloat16", attention="cudnn")
    with pytest.raises(mj.ConfigError, match="needs an NVIDIA GPU, not cpu"):
        mj.create_model(config)


# The model


@pytest.fixture(scope="module")
def models():
    """A tiny model in float32 by XLA, and the same that asks for cuDNN."""
    config = testing.tiny_config().resolve("cpu")
    asked = config.replace(attention="cudnn", decode_attention="cudnn")
    params = testing.noisy_params(MiniLLM(config))
    return MiniLLM(config), MiniLLM(asked), params


@pytest.mark.parametrize(("tokens", "calls"), [(1, 1), (16, 2)])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_a_cached_call_lowers_to_cudnn_without_moving_the_cache(
    monkeypatch, batch_size, tokens, calls
):
    config = mj.Configs.small().replace(num_layers=1).resolve("gpu")
    model = MiniLLM(config.replace(attention="cudnn", decode_attention="cudnn"))
    a_gpu(monkeypatch)
    params = transformer.param_shapes(model)
    cache = kv.cache_shapes(config, batch_size, 1024)
    prompt = jax.ShapeDtypeStruct((batch_size, tokens), jnp.int32)
    logits = jax.ShapeDtypeStruct((batch_size, config.vocab_size), jnp.float32)
    left = jax.ShapeDtypeStruct((batch_size,), jnp.int32)
    traced = decode.prefill_chunk.trace(model, params, cache, logits, prompt, left)
    hlo = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert hlo.count("@__cudnn$fmhaSoftmax") == calls
    assert (batch_size == 1) == ("tensor<8x1024x64xbf16>" in hlo)
    leaf = "8x1024x64xbf16>"
    moved = [line for line in hlo.splitlines() if "transpose" in line and leaf in line]
    assert not moved


@pytest.mark.parametrize("batch_size", [1, 2])
def test_the_model_is_the_same_by_cudnn(monkeypatch, models, batch_size):
    """With the branch for a GPU taken here, and its kernel stood in for."""
    monkeypatch.setattr(fused, "dot_product_attention", definition)
    monkeypatch.setattr(cudnn, "DTYPES", ("float32",))

    def cuda_branch(*args, cuda=None, default=None, **_):
        return (default if cuda is None else cuda)(*args)

    by_xla, by_cudnn, params = models
    tokens = jax.random.randint(jax.random.key(0), (batch_size, 40), 0, 61)
    full = jax.jit(by_xla.apply)({"params": params}, tokens)
    cache = mj.init_cache(by_xla.config, batch_size)
    lengths = np.array([40, 23][:batch_size])
    expected, cache = mj.prefill(by_xla, params, cache, tokens, lengths)
    following, _ = mj.decode_step(by_xla, params, cache, tokens[:, 0])

    monkeypatch.setattr(jax.lax, "platform_dependent", cuda_branch)
    jax.clear_caches()  # of what was traced with other branches
    actual = jax.jit(by_cudnn.apply)({"params": params}, tokens)
    chex.assert_trees_all_close(actual, full, atol=1e-5, rtol=0)
    cache = mj.init_cache(by_xla.config, batch_size)
    actual, cache = mj.prefill(by_cudnn, params, cache, tokens, lengths)
    chex.assert_trees_all_close(actual, expected, atol=1e-5, rtol=0)
    actual, _ = mj.decode_step(by_cudnn, params, cache, tokens[:, 0])
    chex.assert_trees_all_close(actual, following, atol=1e-5, rtol=0)
