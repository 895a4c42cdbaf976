"""What is counted in an HLO text, of functions that are compiled here."""

import jax
import jax.numpy as jnp
import pytest

from benchmarks import hlo

SHAPE = (8, 512)


def module(function, *args, donate=()):
    jitted = jax.jit(function, donate_argnums=donate)
    return hlo.Module(jitted.lower(*args).compile().as_text())


def updated(leaf, new, start):
    return jax.lax.dynamic_update_slice(leaf, new, (start, 0))


LEAF = jax.ShapeDtypeStruct(SHAPE, jnp.float32)
ROW = jax.ShapeDtypeStruct((1, 512), jnp.float32)
START = jax.ShapeDtypeStruct((), jnp.int32)


def test_an_update_of_a_donated_array_copies_nothing():
    assert module(updated, LEAF, ROW, START, donate=(0,)).copies(SHAPE) == []


def test_an_update_of_an_array_that_lives_on_copies_it():
    assert "copy" in module(updated, LEAF, ROW, START).copies(SHAPE)


def test_a_loop_counts_once_per_turn():
    def loop(x, turns):
        step = lambda x, _: (jnp.sin(x) @ x, None)  # noqa: E731
        return jax.lax.scan(step, x, length=turns)[0]

    x = jax.ShapeDtypeStruct((64, 64), jnp.float32)
    one, ten = (module(lambda x, turns=turns: loop(x, turns), x) for turns in (20, 200))
    assert one.loop_kernels() == ten.loop_kernels() >= 2
    assert ten.kernels() - one.kernels() == 180 * one.loop_kernels()
    assert one.waits() == 0


def test_a_conditional_is_a_wait():
    def choose(x, which):
        return jax.lax.cond(which, jnp.sin, lambda x: x @ x, x)

    x = jax.ShapeDtypeStruct((64, 64), jnp.float32)
    which = jax.ShapeDtypeStruct((), jnp.bool_)
    assert module(choose, x, which).waits() == 1


@pytest.mark.parametrize(
    "branches",
    [
        "branch_computations={%few, %many}",
        "true_computation=%many, false_computation=%few",
    ],
)
def test_of_a_conditional_the_dearest_branch_counts(branches):
    found = hlo.Module(CONDITIONAL.replace("BRANCHES", branches))
    assert found.kernels() == 2
    assert found.cycles() == 7 + 30


CONDITIONAL = """HloModule m

%few (a: f32[8]) -> f32[8] {
  %a = f32[8]{0} parameter(0)
  ROOT %n = f32[8]{0} negate(%a), backend_config={"estimated_cycles":"9"}
}

%many (b: f32[8]) -> f32[8] {
  %b = f32[8]{0} parameter(0)
  %s = f32[8]{0} sine(%b), backend_config={"estimated_cycles":"7"}
  ROOT %c = f32[8]{0} cosine(%s), backend_config={"estimated_cycles":"30"}
}

ENTRY %main (p: pred[], x: f32[8]) -> f32[8] {
  %p = pred[] parameter(0)
  %x = f32[8]{0} parameter(1)
  ROOT %f = f32[8]{0} conditional(%p, %x, %x), BRANCHES
}
"""

HEADER = """HloModule m

%fused (p: f32[8,512]) -> f32[8,512] {
  %p = f32[8,512]{1,0} parameter(0)
  ROOT %t = f32[8,512]{1,0} NAME(%p), dimensions={1,0}
}

ENTRY %main (p: f32[8,512]) -> f32[8,512] {
  %p = f32[8,512]{1,0} parameter(0)
  ROOT %f = f32[8,512]{1,0} fusion(%p), kind=kLoop, calls=%fused
}
"""


@pytest.mark.parametrize(
    ("name", "copies"),
    [("transpose", ["fusion"]), ("copy", ["fusion"]), ("dynamic-update-slice", [])],
)
def test_a_fusion_is_what_it_holds(name, copies):
    found = hlo.Module(HEADER.replace("NAME", name))
    assert found.copies(SHAPE) == copies
    assert found.kernels() == 1
