"""Recipes: what the two players minimise, and when, as data.

A recipe has loss terms by name and settings. Each term is a pure function of
`losses.LossInputs` with a weight. The settings are the values of the configuration keys
that the recipe decides; a value that depends on the bits of kernels is a `ByBits`. A
configuration names its recipe in `config.recipe`. A key that the configuration sets
itself overrides the recipe's value. The game knows no recipe by name.

    name            G minimises                        Q minimises
    reconstruction  as adadfq, for a hundred steps     after the game, the error of one
                                                       block after the other on G's
                                                       images; its alias is `best`
    calibrate       as reconstruction, for fewer       nothing; its biases are corrected
                    steps                              after the game
    adadfq          margin, disagreement, agreement,   entropy of p - q, raised
                    BN statistics
    adadfq_short    the same, for a thousand steps     the same
    adadfq_tuned    the same, with ranges of least     the same, a tenth of it on
                    error, masked gradients, an        framed images as well
                    average of Q's weights
    adadfq_imagenet_NETWORK
                    as adadfq, at the values released  as adadfq
                    for a network on ImageNet
    adasg           as adadfq, other boundaries        as adadfq
    gdfq            CE(p, y), BN statistics            KL over batch and classes, CE
    gdfq_batch_kl   CE(p, y), BN statistics            KL over the batch
    adadfq_batch_kl as adadfq_short                    KL over the batch

NETWORK is resnet18, resnet50 or mobilenet_v2. A recipe with _tpu after that trains on
the same number of images, in batches of 128 (`enlarge_batch`).

A recipe can be made outside the package:

    term = recipes.Term(lambda x, s: losses.cross_entropy(x.q_logits, x.labels), 0.1)
    mine = recipes.get("adadfq").adding(student={"ce": term})

`adadfq_jax.quantize(recipe=mine)` takes it. A configuration file returns it from a
function get_recipe() beside get_config().
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from adadfq_jax import losses
from adadfq_jax.errors import InputError
from adadfq_jax.game import Apply, Batch, ViewLoss, framing
from adadfq_jax.losses import Loss, LossInputs

Settings = Mapping[str, Any]  # config.game's values by key


class Term(NamedTuple):
    """One summand of a player's loss.

    Attributes:
      value: (inputs, settings) -> scalar. On several devices it is this device's share;
        the mean over the devices is the term.
      weight: a number, or settings -> number; a term of weight 0 is not computed.
    """

    value: Callable[[LossInputs, Settings], Array]
    weight: float | Callable[[Settings], float] = 1.0


class ByBits(NamedTuple):
    """A value in a recipe's settings that depends on the bits of kernels.

    Attributes:
      few: the value for at most 3 bits.
      four: the value for 4 bits.
      many: the value for 5 bits or more.
    """

    few: Any
    four: Any
    many: Any

    def at(self, weight_bits: int) -> Any:
        """Return the value for a number of bits of kernels."""
        if weight_bits <= 3:
            return self.few
        return self.four if weight_bits == 4 else self.many


@dataclasses.dataclass(frozen=True)
class Recipe:
    """The losses of the two players and the settings that go with them.

    Values of settings may be `ByBits`; `at` replaces these before they are used.

    Attributes:
      generator: terms of G's loss by name; the names appear in the log.
      student: terms of Q's loss by name; the names appear in the log.
      settings: values of `config.game` keys.
      quantizer: values of `config.quant` keys.
      reconstruction: values of `config.reconstruction` keys.
      calibration: values of `config.calibration` keys.
    """

    generator: Mapping[str, Term]
    student: Mapping[str, Term]
    settings: Settings
    quantizer: Settings
    reconstruction: Settings = dataclasses.field(
        default_factory=lambda: {"iterations": 0}
    )
    calibration: Settings = dataclasses.field(default_factory=lambda: {"images": 0})

    def adding(
        self,
        *,
        generator: Mapping[str, Term] | None = None,
        student: Mapping[str, Term] | None = None,
        quantizer: Settings | None = None,
        reconstruction: Settings | None = None,
        calibration: Settings | None = None,
        **settings: Any,
    ) -> "Recipe":
        """Copy the recipe; given terms and settings are added or replace its own."""
        return Recipe(
            {**self.generator, **(generator or {})},
            {**self.student, **(student or {})},
            {**self.settings, **settings},
            {**self.quantizer, **(quantizer or {})},
            {**self.reconstruction, **(reconstruction or {})},
            {**self.calibration, **(calibration or {})},
        )

    def at(self, weight_bits: int) -> "Recipe":
        """Copy the recipe with each `ByBits` replaced by its value for these bits."""

        def plain(values: Settings) -> Settings:
            found = {
                key: value.at(weight_bits) if isinstance(value, ByBits) else value
                for key, value in values.items()
            }
            # Python's number of a scalar of NumPy or JAX, which JSON has, too.
            return {
                key: value.item() if getattr(value, "shape", None) == () else value
                for key, value in found.items()
            }

        return dataclasses.replace(
            self,
            settings=plain(self.settings),
            quantizer=plain(self.quantizer),
            reconstruction=plain(self.reconstruction),
            calibration=plain(self.calibration),
        )


# What the log and the step's metrics have beside the terms of the losses.
_LOGGED = (
    *("generator", "student", "g_rate", "q_rate", "p_agrees", "h_mean", "h_quantiles"),
    *("framed", "first_bad_step", "step", "phase", "steps_per_second", "seconds"),
)


def check(recipe: Recipe) -> None:
    """Refuse names of terms that the log could not tell apart.

    Raises:
      InputError: a term has the name of another one or of another column of the log.
    """
    for name in [*recipe.generator, *recipe.student]:
        both = name in recipe.generator and name in recipe.student
        if both or name in _LOGGED:
            other = "both losses have it" if both else "the log has a column of it"
            raise InputError(
                f"recipe: term {name!r} needs another name: {other}", "recipe"
            )


def enlarge_batch(recipe: Recipe, batch_size: int) -> Recipe:
    """Copy a recipe so that it trains on as many images in batches of another size.

    With k = batch_size / the recipe's batch size, every number of steps is divided by k
    and rounded up. Q's rate, of SGD, is multiplied by k (Goyal et al., 2017, arXiv
    1706.02677) and G's rate, of Adam, by sqrt(k) (Malladi et al., 2022, arXiv
    2205.10287).

    Args:
      recipe: a recipe whose batch size is no `ByBits`; its steps and rates may be.
      batch_size: number of images in a step.
    """
    factor = batch_size / recipe.settings["batch_size"]

    def fewer(steps: int) -> int:
        return math.ceil(steps / factor)

    rules: dict[str, Callable[[Any], Any]] = {
        "steps": fewer,
        "observe_steps": fewer,
        "warmup_steps": fewer,
        "rate_drops": lambda drops: tuple(map(fewer, drops)),
        "q_rate": lambda rate: rate * factor,
        "g_rate": lambda rate: rate * math.sqrt(factor),
    }
    changed: dict[str, Any] = {"batch_size": batch_size}
    for key, rule in rules.items():
        value = recipe.settings[key]
        by_bits = isinstance(value, ByBits)
        changed[key] = ByBits(*map(rule, value)) if by_bits else rule(value)
    return recipe.adding(**changed)


def weigh(terms: Mapping[str, Term], settings: Settings) -> dict[str, float]:
    """Compute the weights of terms by name, without those that are 0."""
    weights = {
        name: term.weight(settings) if callable(term.weight) else term.weight
        for name, term in terms.items()
    }
    return {name: weight for name, weight in weights.items() if weight}


def make_loss(
    terms: Mapping[str, Term],
    settings: Settings,
    weights: Mapping[str, float | Array] | None = None,
) -> Loss:
    """Make the loss that is the weighted sum of terms.

    Args:
      terms: the terms by name.
      settings: the settings that the terms read; numbers may be traced where `weights`
        are given.
      weights: weights of the terms that are computed, by name; may be traced. None
        stands for the result of `weigh`.

    Returns:
      A function `LossInputs` -> (scalar loss, unweighted terms by name).
    """
    weighted = weigh(terms, settings) if weights is None else weights

    def loss(inputs: LossInputs) -> tuple[Array, dict[str, Array]]:
        values = {
            name: term.value(inputs, settings)
            for name, term in terms.items()
            if name in weighted
        }
        total = sum((weighted[k] * v for k, v in values.items()), jnp.zeros(()))
        return total, values

    return loss


def framed_view(student_loss: Loss, weight: float, axis_name: str | None) -> ViewLoss:
    """Make the term that is Q's loss on every second image, put in a flat frame.

    The paper does not have it; see `game.framing`. G gets no gradient from it, since
    framed images do not have P's BN statistics, which G must match. Of a device's share
    with an odd number of images, one more than half is framed.

    Args:
      student_loss: Q's loss; its terms get no BN statistics here.
      weight: weight of the loss on framed images.
      axis_name: mapped axis over which the global batch is split, or None.
    """

    def loss(apply_p: Apply, apply_q: Apply, images: Array, batch: Batch) -> Array:
        if batch.frames is None:
            raise ValueError("framed_view: the drawn batch has no frames")
        # These are the same images on any number of devices with even shares.
        images, frames, labels = jax.tree.map(
            lambda leaf: leaf[::2], (images, batch.frames, batch.labels)
        )
        images = framing.put_in_frames(images, frames)
        seen = LossInputs(apply_p(images), apply_q(images), labels, axis_name=axis_name)
        return student_loss(seen)[0]

    return ViewLoss("framed", loss, weight)


def _margin(x: LossInputs, s: Settings) -> Array:
    bounds = s["lambda_l"], s["lambda_u"]
    return losses.margin_loss(x.p_logits, x.q_logits, *bounds, x.axis_name)


def _disagreement(x: LossInputs, s: Settings) -> Array:
    return losses.disagreement_loss(x.p_logits, x.q_logits, x.labels)


def _agreement(x: LossInputs, s: Settings) -> Array:
    return losses.agreement_loss(x.p_logits, x.q_logits, x.labels)


def _bn_stats(x: LossInputs, s: Settings) -> Array:
    return losses.bn_stats_loss(x.bn_inputs, x.batch_stats)


def _teacher_ce(x: LossInputs, s: Settings) -> Array:
    return losses.cross_entropy(x.p_logits, x.labels)


def _student_gap(x: LossInputs, s: Settings) -> Array:
    return losses.student_gap(x.p_logits, x.q_logits, s["temperature"])


def _student_kl(x: LossInputs, s: Settings) -> Array:
    return losses.student_kl(x.p_logits, x.q_logits, s["temperature"])


def _student_kl_per_class(x: LossInputs, s: Settings) -> Array:
    return _student_kl(x, s) / x.p_logits.shape[-1]


def _student_ce(x: LossInputs, s: Settings) -> Array:
    return losses.cross_entropy(x.q_logits, x.labels)


_EPOCH = 200  # steps of an epoch in the released configurations

# The values of the released CIFAR configurations.
_RELEASED = {
    "batch_size": 16,
    "steps": 400 * _EPOCH,
    "observe_steps": 4 * _EPOCH,
    "warmup_steps": 4 * _EPOCH,
    "rate_drops": (100 * _EPOCH, 200 * _EPOCH, 300 * _EPOCH),
    "g_rate": 1e-3,
    "q_rate": 1e-4,
    "lambda_l": 0.1,
    "lambda_u": 0.8,
    "alpha_ds": 0.2,
    "alpha_as": 0.1,
    "beta": 1.0,
    "gamma": 1.0,
    "temperature": 20.0,
    "q_average": 0.0,
    "framed_weight": 0.0,
}
_RELEASED_QUANTIZER = {
    "act_range": "minmax",
    "weight_range": "minmax",
    "mask_gradient": False,
}

ADADFQ = Recipe(
    generator={
        "margin": Term(_margin),
        "disagreement": Term(_disagreement, lambda s: s["beta"] * s["alpha_ds"]),
        "agreement": Term(_agreement, lambda s: s["beta"] * s["alpha_as"]),
        "bn_stats": Term(_bn_stats, lambda s: s["gamma"]),
    },
    student={"student_gap": Term(_student_gap)},
    settings=_RELEASED,
    quantizer=_RELEASED_QUANTIZER,
)

ADADFQ_SHORT = ADADFQ.adding(
    steps=1000, observe_steps=100, warmup_steps=100, rate_drops=(750,), q_rate=1e-3
)

# The values of the released ImageNet configurations; `ByBits` has those for W3, W4, W5.
_IMAGENET = ADADFQ.adding(
    warmup_steps=50 * _EPOCH, rate_drops=(350 * _EPOCH,), q_rate=1e-5, temperature=5.0
)
_IMAGENET_NETWORKS = {
    "resnet18": _IMAGENET.adding(
        lambda_l=ByBits(0.1, 0.3, 0.3), alpha_ds=ByBits(0.2, 0.2, 0.3)
    ),
    "resnet50": _IMAGENET.adding(
        warmup_steps=ByBits(100 * _EPOCH, 50 * _EPOCH, 50 * _EPOCH),
        rate_drops=ByBits(
            (150 * _EPOCH, 300 * _EPOCH), (200 * _EPOCH, 300 * _EPOCH), (350 * _EPOCH,)
        ),
        q_rate=1e-4,
        lambda_l=ByBits(0.4, 0.3, 0.3),
        alpha_ds=ByBits(0.2, 0.1, 0.2),
    ),
    "mobilenet_v2": _IMAGENET.adding(alpha_ds=ByBits(0.2, 0.3, 0.2)),
}

GDFQ = Recipe(
    generator={
        "teacher_ce": Term(_teacher_ce),
        "bn_stats": Term(_bn_stats, lambda s: s["gamma"]),
    },
    student={
        "student_kl": Term(_student_kl_per_class),
        "student_ce": Term(_student_ce),
    },
    settings={**_RELEASED, "batch_size": 200, "gamma": 0.1},
    quantizer=_RELEASED_QUANTIZER,
)

ADADFQ_TUNED = ADADFQ_SHORT.adding(
    steps=1300,
    rate_drops=(975,),
    q_average=0.98,
    framed_weight=0.1,
    quantizer={"act_range": "l3", "weight_range": "mse", "mask_gradient": True},
)

# The game ends with the warm-up, so Q trains only afterwards, block by block.
RECONSTRUCTION = ADADFQ_TUNED.adding(
    steps=100,
    rate_drops=(),
    g_rate=5e-3,
    q_average=0.0,
    framed_weight=0.0,
    reconstruction={"iterations": 200},
)

CALIBRATE = RECONSTRUCTION.adding(
    steps=25,
    observe_steps=25,
    warmup_steps=25,
    reconstruction={"iterations": 0},
    calibration={"images": 256},
)

_ALIASES = {"best": "reconstruction"}  # the recommended recipe

_RECIPES = {
    "reconstruction": RECONSTRUCTION,
    "calibrate": CALIBRATE,
    "adadfq": ADADFQ,
    "adadfq_short": ADADFQ_SHORT,
    "adadfq_tuned": ADADFQ_TUNED,
    **{f"adadfq_imagenet_{name}": made for name, made in _IMAGENET_NETWORKS.items()},
    **{
        f"adadfq_imagenet_{name}_tpu": enlarge_batch(made, 128)
        for name, made in _IMAGENET_NETWORKS.items()
    },
    "adasg": ADADFQ.adding(lambda_l=0.3, alpha_ds=0.1, alpha_as=0.1),
    "gdfq": GDFQ,
    # A control: does the entropy of p - q help, or only the scale of the loss? To
    # second order, AdaDFQ's loss of Q is this KL.
    "gdfq_batch_kl": Recipe(
        GDFQ.generator,
        {"student_kl": Term(_student_kl)},
        {**GDFQ.settings, "batch_size": 16},
        GDFQ.quantizer,
    ),
    # The other half of that control: AdaDFQ's loss of G, with the KL for Q.
    "adadfq_batch_kl": Recipe(
        ADADFQ.generator,
        {"student_kl": Term(_student_kl)},
        ADADFQ_SHORT.settings,
        ADADFQ.quantizer,
    ),
}


def names() -> list[str]:
    """Return the names of the recipes and their aliases, sorted."""
    return sorted([*_RECIPES, *_ALIASES])


def full_name(name: str) -> str:
    """Return the recipe's name that an alias stands for; other names stay the same."""
    return _ALIASES.get(name, name)


def get(name: str) -> Recipe:
    """Return the recipe with a name or an alias.

    Raises:
      InputError: there is no such recipe.
    """
    name = full_name(name)
    if name not in _RECIPES:
        raise InputError(
            f"recipe={name!r}: no such recipe; known are: {', '.join(names())}",
            "recipe",
        )
    return _RECIPES[name]
