"""Devices: which are taken, and what each sees of a batch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from adadfq_jax.errors import InputError
from adadfq_jax.game import collectives
from adadfq_jax.runtime import sharding

AXIS = sharding.AXIS
BATCH = 16


def test_devices_see_different_images():
    """Were they to see the same, a game on several would show nothing."""
    index = jnp.arange(4)
    latents = jax.random.normal(jax.random.key(0), (BATCH, 3))
    shares = jax.pmap(
        lambda _: collectives.share(latents, AXIS), AXIS, devices=jax.devices()[:4]
    )(index)
    np.testing.assert_array_equal(shares.reshape(BATCH, 3), latents)


def test_a_batch_that_does_not_divide_is_refused_with_three_ways_out():
    with pytest.raises(InputError, match="batch_size=12") as refused:
        sharding.choose_devices(0, 12, "global")
    assert "(devices=6)" in str(refused.value)
    assert "(batch_size=16)" in str(refused.value)
    assert "(batch_rule=per_device" in str(refused.value)
    for count, size, rule in (
        (6, 12, "global"),
        (0, 16, "global"),
        (0, 12, "per_device"),
    ):
        devices, batch = sharding.choose_devices(count, size, rule)
        assert batch % len(devices) == 0
    assert batch == 96


def test_more_devices_than_there_are_is_refused():
    with pytest.raises(InputError, match=r"devices=9.* 8"):
        sharding.choose_devices(9, 18, "global")


def test_the_cpu_is_no_substitute_for_the_platform_that_is_asked_for():
    before = jax.config.jax_platforms
    try:
        jax.config.update("jax_platforms", "cpu,cuda")
        sharding.choose_devices(1, 8, "global")
        jax.config.update("jax_platforms", "cuda,cpu")
        with pytest.raises(InputError, match="cuda,cpu: no cuda device"):
            sharding.choose_devices(1, 8, "global")
    finally:
        jax.config.update("jax_platforms", before)
