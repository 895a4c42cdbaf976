"""The best case against sums by hand."""

import pytest

import minillm_jax as mj
from minillm_jax.planning import bounds, costs
from minillm_jax.planning.devices import Device

MEMORY_BOUND = Device("x", "gpu", 10**10, 1e12, 1e18)
FLOPS_BOUND = Device("x", "gpu", 10**10, 1e18, 1e12)


@pytest.fixture
def config():
    return mj.Configs.large().resolve("gpu")


@pytest.mark.parametrize("rows", [1, 8])
def test_a_step_reads_the_weights_and_the_cache(config, rows):
    found = bounds.best_case(config, MEMORY_BOUND, rows, 4096)
    embedding = config.vocab_size * config.dim_model
    weights = 2 * (costs.parameters(config) - embedding + rows * config.dim_model)
    cache = rows * 4096 * config.num_layers * 2 * config.dim_model * 2
    seconds = (weights + cache) / 1e12
    assert found.decode_tokens_per_second == pytest.approx(rows / seconds)
    assert found.ttft_seconds == pytest.approx(2 * costs.parameters(config) / 1e12)


@pytest.mark.parametrize("rows", [1, 8])
def test_a_prompt_is_multiplied_through(config, rows):
    found = bounds.best_case(config, FLOPS_BOUND, rows, 1024)
    layers = config.num_layers * costs.layer_kernels(config) * 1024
    attention = config.num_layers * 2 * config.dim_model * 1024 * 1025 // 2
    head = config.vocab_size * config.dim_model
    flops = 2 * (layers + attention + head)
    assert found.ttft_seconds == pytest.approx(rows * flops / 1e12)
    assert found.decode_tokens_per_second == pytest.approx(
        1e12 / costs.forward_flops(config, 1, 1023)
    )


def test_there_is_none_of_a_device_whose_rates_are_not_known(config):
    assert bounds.best_case(config, Device("x", "gpu", 10**10), 1, 128) is None
