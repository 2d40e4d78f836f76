"""Recipes: their losses, their settings, and one from outside the package."""

import jax
import numpy as np
import pytest

from adadfq_jax import config as base
from adadfq_jax import losses, recipes, settings
from adadfq_jax.errors import InputError
from adadfq_jax.training.spec import resolve
from tests.golden.fill import labels, noise


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
