"""What a run says of its result."""

import jax
import pytest

from adadfq_jax import config as base
from adadfq_jax.training import build, results
from adadfq_jax.training.spec import resolve


def test_a_teacher_far_below_the_expected_is_warned_of():
    config = base.default_config()
    config.teacher.expected_top1 = 93.0
    assert results.warn_of_teacher(config, 91.5) is None
    warning = results.warn_of_teacher(config, 60.0)
    assert "60.00" in warning and "teacher.mean=" in warning


def test_the_batch_of_all_devices_is_told():
    spec = resolve(base.load("cifar10_resnet20", "w4a4"))  # in batches of 16
    said = results.describe_game(build.assemble(spec, 32), 50.0, jax.devices()[:2])
    assert "80000 steps of batch 32 on 2 x cpu" in said and "about 50 s" in said


@pytest.mark.parametrize(
    ("before", "last", "p", "share"),
    [
        *((80.0, 85.0, 90.0, 0.5), (80.0, 78.0, 90.0, -0.2)),
        *((90.0, 90.0, 90.0, None), (90.2, 89.8, 90.0, None)),
    ],
)
def test_the_share_won_back(before, last, p, share):
    assert results.recovered(before, last, p) == (share and pytest.approx(share))
    assert results.recovered(None, last, p) is None
