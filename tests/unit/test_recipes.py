"""Recipes: their losses, their settings, and one from outside the package."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from adadfq_jax import config as base
from adadfq_jax import losses, recipes, settings
from adadfq_jax.errors import InputError
from adadfq_jax.jobs import train
from adadfq_jax.training.spec import resolve
from tests.golden.fill import labels, noise
from tests.jobs import rows, tiny_config


def inputs(bn=True):
    p, q = 3 * noise("recipe p", (16, 10)), 3 * noise("recipe q", (16, 10))
    stats = {"bn": {"mean": np.ones(3, np.float32), "var": np.ones(3, np.float32)}}
    running = jax.tree.map(np.zeros_like, stats)
    y = labels("recipe y", 16, 10)
    return losses.LossInputs(p, q, y, stats if bn else None, running)


def test_adadfq_is_the_weighted_sum_of_its_terms():
    settings = {**recipes.ADADFQ.settings, "beta": 3.0, "gamma": 5.0, "lambda_l": 0.3}
    x = inputs()
    total, terms = recipes.make_loss(recipes.ADADFQ.generator, settings)(x)
    p, q, y = x.p_logits, x.q_logits, x.labels
    assert terms == {
        "margin": losses.margin_loss(p, q, 0.3, 0.8),
        "disagreement": losses.disagreement_loss(p, q, y),
        "agreement": losses.agreement_loss(p, q, y),
        "bn_stats": 2,
    }
    balance = 0.2 * terms["disagreement"] + 0.1 * terms["agreement"]
    expected = float(terms["margin"] + 3 * balance + 5 * 2)
    assert float(total) == pytest.approx(expected, rel=1e-6)


def test_a_term_of_weight_0_is_not_computed():
    settings = {**recipes.ADADFQ.settings, "gamma": 0.0}
    loss = recipes.make_loss(recipes.ADADFQ.generator, settings)
    _, terms = loss(inputs(bn=False))  # there are no statistics to compute it from
    assert terms.keys() == {"margin", "disagreement", "agreement"}


def test_gdfq_averages_over_classes_and_its_control_does_not():
    x = inputs()

    def student(name):
        recipe = recipes.get(name)
        return recipes.make_loss(recipe.student, recipe.settings)(x)

    kl = losses.student_kl(x.p_logits, x.q_logits, 20.0)
    total, terms = student("gdfq")
    ce = losses.cross_entropy(x.q_logits, x.labels)
    assert float(terms["student_kl"]) == pytest.approx(float(kl) / 10, rel=1e-6)
    assert float(total) == pytest.approx(float(kl) / 10 + float(ce), rel=1e-6)
    assert float(student("gdfq_batch_kl")[0]) == pytest.approx(float(kl), rel=1e-6)
    recipe = recipes.get("gdfq")
    total, _ = recipes.make_loss(recipe.generator, recipe.settings)(x)
    expected = losses.cross_entropy(x.p_logits, x.labels) + 0.1 * 2
    assert float(total) == pytest.approx(float(expected), rel=1e-6)


@pytest.mark.parametrize("name", recipes.names())
def test_every_recipe_settles_every_key_that_is_the_recipes(name):
    config = base.default_config()
    config.recipe = name
    prepared = resolve(config)
    assert all(settings.get(prepared, name) is not None for name in settings.ROWS)
    assert config.game.steps is None  # the given one is left as it is


def test_a_key_that_is_set_overrides_the_recipe():
    config = base.default_config()
    config.recipe, config.game.lambda_l = "adasg", 0.05
    game = resolve(config).game
    assert (game.lambda_l, game.alpha_ds, game.lambda_u) == (0.05, 0.1, 0.8)


def test_an_unknown_recipe_is_refused_with_those_there_are():
    config = base.default_config()
    config.recipe = "adadqf"
    with pytest.raises(InputError, match=r"adadqf.*known are: adadfq, "):
        resolve(config)


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
        {"game.reobserve_steps": 2, "game.warmup_steps": 8},
        {"game.q_decay_norms": False},
        {"quant.learn_ranges": True},
        {"quant.act_range": "percentile"},
        {"quant.act_range": "l3"},
        {"quant.act_range": "mse", "quant.weight_range": "mse"},
        {"quant.reestimate_steps": 3},
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
