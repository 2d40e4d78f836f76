"""Whole runs by recipes and options: each makes another network."""

import jax
import jax.numpy as jnp
import pytest

from adadfq_jax import recipes
from adadfq_jax.errors import InputError
from adadfq_jax.jobs import train
from tests.jobs import rows, tiny_config


def test_a_recipe_from_outside_the_package_is_played(job, tmp_path):
    def confidence(x, settings):
        probs = jax.nn.softmax(x.q_logits)
        return settings["strength"] * jnp.mean(jnp.sum(probs * probs, -1))

    term = recipes.Term(confidence, 0.5)
    mine = recipes.get("adadfq").adding(student={"confidence": term}, strength=3.0)
    with pytest.raises(InputError, match=r"'gdfq'.*of this package"):
        train.run(tiny_config(job, recipe="gdfq"), tmp_path / "run", recipe=mine)
    with pytest.raises(InputError, match=r"'mine'.*no such recipe"):
        train.run(tiny_config(job, recipe="mine"), tmp_path / "run")
    train.run(tiny_config(job, recipe="mine"), tmp_path / "run", recipe=mine)
    for row in rows(tmp_path / "run"):
        assert row["confidence"] >= 3 / 10 - 1e-6  # least where all classes are alike
        expected = row["student_gap"] + 0.5 * row["confidence"]
        assert row["student"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    "options",
    [
        {"game.q_average": 0.9},
        {"game.framed_weight": 0.5},
        {"quant.act_range": "l3"},
        {"quant.weight_range": "mse"},
        {"quant.places": "all"},
        {"recipe": "gdfq", "game.batch_size": 16},
    ],
    ids=str,
)
def test_every_option_makes_another_network(job, tmp_path, options, plain):
    rates = {"game.g_rate": 1e-3, "game.q_rate": 1e-2, "log.every": 12}
    config = tiny_config(job, **rates, **options)
    summary = train.run(config, tmp_path / "run")
    assert summary["sha256"] != plain


@pytest.fixture(scope="module")
def plain(job, tmp_path_factory):
    """The digest of the network without any option."""
    rates = {"game.g_rate": 1e-3, "game.q_rate": 1e-2, "log.every": 12}
    workdir = tmp_path_factory.mktemp("plain") / "run"
    return train.run(tiny_config(job, **rates), workdir)["sha256"]
