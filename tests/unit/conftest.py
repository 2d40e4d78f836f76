"""In the unit tier nothing is promoted or broadcast without saying so."""

import jax
import pytest


@pytest.fixture(autouse=True)
def strict():
    """Types are not widened, ranks are not filled up.

    A fixture, since the process plays other tiers too, and not of wider scope, since
    what a module's or a session's fixtures make may be used by other tiers.
    """
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        yield
