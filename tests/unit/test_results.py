"""What a run says of its result."""

import pytest

from adadfq_jax import config as base
from adadfq_jax.training import results


def test_a_teacher_far_below_the_expected_is_warned_of():
    config = base.default_config()
    config.teacher.expected_top1 = 93.0
    assert results.warn_of_teacher(config, 91.5) is None
    warning = results.warn_of_teacher(config, 60.0)
    assert "60.00" in warning and "teacher.mean=" in warning


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
