"""Recipes: their losses, their settings, and one from outside the package."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from adadfq_jax import config as base
from adadfq_jax import losses, recipes, settings
from adadfq_jax.errors import InputError
from adadfq_jax.training import build
from adadfq_jax.training.spec import identity, resolve
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


@pytest.mark.parametrize("name", ["margin", "h_mean"])
def test_a_name_that_the_log_has_already_is_refused(name):
    term = recipes.Term(lambda x, s: 0.0)
    mine = recipes.ADADFQ.adding(student={name: term})
    with pytest.raises(InputError, match=f"'{name}'"):
        resolve({"recipe": "mine"}, mine)


def test_a_scalar_of_numpy_is_a_plain_number_in_a_spec():
    mine = recipes.ADADFQ.adding(strength=np.float32(3), g_rate=jnp.float32(0.5))
    spec = resolve({"recipe": "mine"}, mine)
    assert json.dumps(spec.losses.settings["strength"]) == "3.0"
    assert type(spec.game.g_rate) is float


def by_bits():
    return recipes.ADADFQ.adding(
        lambda_l=recipes.ByBits(0.1, 0.2, 0.3),
        rate_drops=recipes.ByBits((101, 202), (303,), ()),
        strength=recipes.ByBits(1, 2, 3),
        quantizer={"weight_range": recipes.ByBits("mse", "minmax", "minmax")},
    )


@pytest.mark.parametrize("bits", range(2, 9))
def test_a_value_by_bits_is_plain_in_a_spec(bits):
    act_bits = 2 if bits > 4 else 8  # they have no say
    values = {"recipe": "mine", "quant.weight_bits": bits, "quant.act_bits": act_bits}
    spec = resolve(values, by_bits())
    column = 0 if bits <= 3 else 1 if bits == 4 else 2
    assert spec.game.lambda_l == (0.1, 0.2, 0.3)[column]
    assert spec.game.rate_drops == ((101, 202), (303,), ())[column]
    assert spec.quant.weight_range == ("mse", "minmax", "minmax")[column]
    plain = {
        **recipes.ADADFQ.settings,
        "lambda_l": spec.game.lambda_l,
        "rate_drops": spec.game.rate_drops,
        "strength": column + 1,
    }
    assert spec.losses.settings == plain
    assert build.game_values(spec).settings["lambda_l"] == spec.game.lambda_l
    written = identity(spec, batch_size=16, weights={}, p_digest="")["recipe.settings"]
    assert written == {**plain, "rate_drops": list(spec.game.rate_drops)}


def test_a_value_by_bits_is_replaced_in_every_section():
    values = {"images": recipes.ByBits(1, 2, 3)}
    others = dict.fromkeys(("quantizer", "reconstruction", "calibration"), values)
    plain = recipes.ADADFQ.adding(**others, **values).at(2)
    for section in ("settings", *others):
        assert getattr(plain, section)["images"] == 1


def test_a_key_that_is_set_overrides_a_value_by_bits():
    values = {"recipe": "mine", "game": {"lambda_l": 0.05, "rate_drops": (5,)}}
    game = resolve(values, by_bits()).game
    assert (game.lambda_l, game.rate_drops) == (0.05, (5,))


def test_a_plain_recipe_is_the_same_at_any_bits():
    for name in ("adadfq", "adadfq_tuned", "gdfq"):
        recipe = recipes.get(name)
        assert recipe.at(2) == recipe.at(4) == recipe.at(8) == recipe


def test_larger_batches_play_as_many_images():
    usual = by_bits().adding(steps=1001, warmup_steps=recipes.ByBits(80, 81, 0))
    settings = dict(usual.settings)
    larger = recipes.enlarge_batch(usual, 64)
    assert usual.settings == settings  # it is left as it is
    assert larger.settings["batch_size"] == 64
    assert larger.settings["steps"] == 251  # rounded up
    assert larger.settings["observe_steps"] == 200
    assert larger.settings["warmup_steps"] == (20, 21, 0)
    assert larger.settings["rate_drops"] == ((26, 51), (76,), ())
    assert isinstance(larger.settings["rate_drops"], recipes.ByBits)
    assert larger.settings["q_rate"] == pytest.approx(4e-4)  # SGD: linear
    assert larger.settings["g_rate"] == pytest.approx(2e-3)  # Adam: root
    scaled = {"batch_size", "steps", "observe_steps", "warmup_steps", "rate_drops"}
    scaled |= {"q_rate", "g_rate"}
    for key in settings.keys() - scaled:
        assert larger.settings[key] == settings[key]
    assert (larger.generator, larger.student) == (usual.generator, usual.student)
    assert larger.quantizer == usual.quantizer
    for bits in (3, 4, 5):
        assert larger.at(bits) == recipes.enlarge_batch(usual.at(bits), 64)
