"""One real step of every ImageNet configuration at 224 x 224 on CPU.

    IMAGENET_BATCH=16 ./launch/test.sh tests/test_imagenet.py    # the released batch

By default the batch is 2.
"""

import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from adadfq_jax import build, quant, teacher
from adadfq_jax.game import Phase
from tests import helpers
from tests.test_config import CONFIGS, get_config

BATCH = int(os.environ.get("IMAGENET_BATCH", "2"))
RECORDS = {
    "imagenet_resnet18": "resnet18",
    "imagenet_mobilenet_v2": "mobilenetv2_w1",
    "imagenet_resnet50": "resnet50",
}


def observed(ranges):
    """Ranges as if every quantizer had seen values from 0 to 6."""
    return jax.tree.map(
        lambda _: quant.fixed_range(jnp.float32(0), jnp.float32(6)),
        ranges,
        is_leaf=lambda node: isinstance(node, quant.RangeState),
    )


@pytest.mark.parametrize("name", RECORDS)
def test_one_step_of_both_players(name):
    config = build.prepare(get_config(CONFIGS[0].parent / f"{name}.py", "w4a4"))
    state_dict = helpers.filled_state_dict(RECORDS[name], RECORDS[name])
    config.teacher.model = teacher.recognise(state_dict).model
    p_variables = teacher.from_state_dict(state_dict)
    steps, state = build.build_game(config, p_variables, jax.local_devices()[:1], BATCH)
    state = state.replace(q_ranges=observed(state.q_ranges))
    g_before = np.array(state.g_params["conv3"]["kernel"])
    after, metrics = steps(Phase.BOTH, 1)(state, p_variables, jax.random.key(0))
    assert all(np.isfinite(value).all() for value in metrics.values())
    assert int(np.ravel(after.first_bad_step)[0]) == -1
    assert not np.array_equal(after.g_params["conv3"]["kernel"], g_before)
    moved = jax.tree.map(np.array_equal, after.q_params, p_variables["params"])
    assert not all(jax.tree.leaves(moved))
