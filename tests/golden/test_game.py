"""The two-player step against recorded games."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from adadfq_jax import game, optim, quant, recipes
from adadfq_jax.game import Phase, players
from adadfq_jax.models.generator import CifarGenerator
from tests import helpers
from tests.golden.fill import labels, noise

BATCH, TEMPERATURE = 16, 20.0
RELEASED = recipes.ADADFQ


def make_parts(classes, bits, *, range_ema="released", q_rate=1e-4):
    """Play function, optimizers and the network of a CIFAR game; bits None: smooth."""
    generator = CifarGenerator(classes, (32, 32, 3))
    graph = helpers.graph("resnet20", classes)
    g_optimizer = optim.generator_optimizer(optax.constant_schedule(1e-3))
    q_optimizer = optim.student_optimizer(optax.constant_schedule(q_rate), 1e-4)
    play = game.make_play(
        networks=game.Networks(generator.apply, graph, graph),
        generator_loss=recipes.make_loss(RELEASED.generator, RELEASED.settings),
        student_loss=recipes.make_loss(RELEASED.student, RELEASED.settings),
        g_optimizer=g_optimizer,
        q_optimizer=q_optimizer,
        q_options=game.QOptions(bits, bits, range_ema=range_ema),
    )
    return play, graph, (g_optimizer, q_optimizer)


def make_state(graph, optimizers, g_variables, variables):
    return game.init_state(
        g_variables=g_variables,
        q_params={name: variables[name] for name in graph.parameters},
        q_ranges=players.init_ranges(graph),
        g_optimizer=optimizers[0],
        q_optimizer=optimizers[1],
        q_options=game.QOptions(None, None),
    )


def set_ranges(graph, recorded):
    return {
        entry.name: quant.fixed_range(jnp.float32(lo), jnp.float32(hi))
        for entry, (lo, hi) in zip(graph.activations, recorded, strict=True)
    }


class RecordedGame(NamedTuple):
    """A record, and our play of it: losses [plays, 12, 6] in the record's columns."""

    record: dict
    losses: np.ndarray
    ranges_after_warmup: Any
    q_before: Any
    state: game.GameState


@functools.cache
def recorded_game(name):
    """Plays the twelve recorded steps; the smooth game three times.

    Adam's first steps amplify the last bit, in the original as well as here. The
    further plays have latents jittered by 1e-6, as the record's own
    `losses_jittered` has, so that their median says more than one realisation.
    """
    record = helpers.load_npz(f"game_{name}")
    classes = 100 if "cifar100" in name else 10
    bits = None if "smooth" in name else int(name[-1])
    play, graph, optimizers = make_parts(classes, bits)
    variables = helpers.filled_variables(f"resnet20_cifar{classes}")
    teacher = game.Teacher(variables, {})
    q_variables = variables
    if bits is None:
        q_variables = helpers.filled_variables("resnet20_cifar10", "student")
    generator = helpers.filled_generator("gc", classes)
    start = make_state(graph, optimizers, generator, q_variables)
    step = jax.jit(play, static_argnames="phase")

    def play_steps(state, steps, phase, jitter):
        rows = []
        for i in steps:
            z, y = noise(f"z{i}", (BATCH, 100)), labels(f"lab{i}", BATCH, classes)
            if jitter:
                z *= 1 + np.float32(1e-6) * noise(f"jitter{i}", z.shape, salt=jitter)
            state, metrics = step(state, teacher, game.Batch(z, y), phase=phase)
            rows.append([float(metrics[c]) for c in record["columns"]])
        return state, rows

    def play_all(jitter):
        observed, first = play_steps(start, range(6), Phase.OBSERVE, jitter)
        frozen = observed
        if bits is not None:
            calibrated = set_ranges(graph, record["ranges_calibrated"])
            frozen = observed.replace(q_ranges=calibrated)
        last, second = play_steps(frozen, range(6, 12), Phase.BOTH, jitter)
        return first + second, observed.q_ranges, start.q_params, jax.device_get(last)

    losses, *rest = play_all(0)
    jitters = range(1, 3) if bits is None else ()
    plays = [losses, *(play_all(jitter)[0] for jitter in jitters)]
    return RecordedGame(record, np.asarray(plays), *rest)


GAMES = ("cifar10_smooth", "cifar10_w8a8", "cifar10_w4a4", "cifar100_w3a3")


def as_gap(recorded, classes):
    """A record's student column as the gap: its constant would hide everything."""
    rows = np.array(recorded, np.float64)
    rows[..., 5] += TEMPERATURE**2 * np.log(classes)
    return rows


@pytest.mark.parametrize("name", GAMES)
def test_losses_follow_the_recorded_game(name):
    played = recorded_game(name)
    classes = 100 if "cifar100" in name else 10
    plays = np.array(played.losses, np.float64)
    theirs = as_gap(played.record["losses"], classes)
    jitter = np.abs(as_gap(played.record["losses_jittered"], classes) - theirs)
    if name == "cifar10_w8a8":
        # At 8 bits p - q is rounding noise, and H' with it: the margin is only bounded.
        margins = plays[..., :1]
        assert ((margins >= 0) & (margins <= 1)).all()
        generator = list(played.record["columns"]).index("generator")
        plays[..., generator] -= plays[..., 0]
        theirs[..., generator] -= theirs[..., 0]
        plays[..., 0] = theirs[..., 0]
    errors = np.abs(np.median(plays, 0) - theirs)
    for begin in (0, 6):
        part = slice(begin, begin + 6)
        allowed = 5 * jitter[part].max(0) + 1e-3 * np.abs(theirs[part])
        for column, loss in enumerate(played.record["columns"]):
            error = errors[part, column]
            assert (error <= allowed[:, column]).all(), (
                loss,
                error,
                allowed[:, column],
            )


def test_first_step_of_the_smooth_game_is_exact():
    played = recorded_game("cifar10_smooth")
    theirs = as_gap(played.record["losses"], 10)[0]
    np.testing.assert_allclose(played.losses[0][0], theirs, rtol=1e-4)


@pytest.mark.parametrize(
    ("name", "cosine", "norm"),
    [
        ("cifar10_smooth", 0.995, 0.05),
        ("cifar10_w8a8", 0.9, None),
        ("cifar10_w4a4", 0.98, 0.15),
        ("cifar100_w3a3", 0.98, 0.15),
    ],
)
def test_q_moves_as_recorded(name, cosine, norm):
    played = recorded_game(name)
    record = played.record
    after = helpers.to_state_dict(played.state.q_params)
    before = helpers.to_state_dict(played.q_before)
    keys = [k.removeprefix("q_after.") for k in record if k.startswith("q_after.")]
    assert len(keys) > 5
    ours = np.concatenate([(after[k] - before[k]).ravel() for k in keys])
    theirs = np.concatenate(
        [(record[f"q_after.{k}"] - record[f"q_before.{k}"]).ravel() for k in keys]
    )
    lengths = np.linalg.norm(ours), np.linalg.norm(theirs)
    assert ours @ theirs / (lengths[0] * lengths[1]) >= cosine
    if norm:
        assert abs(lengths[0] / lengths[1] - 1) <= norm


def test_g_moves_as_recorded_in_the_smooth_game():
    played = recorded_game("cifar10_smooth")
    record = played.record
    after = helpers.generator_to_torch(played.state.g_params)
    start = helpers.generator_to_torch(helpers.filled_generator("gc", 10)["params"])
    # Biases before a training-mode batch norm have no gradient: Adam moves them by
    # the sign of rounding noise.
    noise_only = ("conv_blocks1.0.bias", "conv_blocks2.0.bias")
    keys = [k.removeprefix("g_after.") for k in record if k.startswith("g_after.")]
    for key in sorted(set(keys) - set(noise_only)):
        ours = (after[key] - start[key]).ravel()
        theirs = (record[f"g_after.{key}"] - start[key]).ravel()
        lengths = np.linalg.norm(ours), np.linalg.norm(theirs)
        cosine = ours @ theirs / (lengths[0] * lengths[1])
        # Near 0 Adam's step is the sign of a gradient: a row of the embedding has
        # hundreds of such elements, and the fewest draws.
        assert cosine > (0.85 if key == "label_emb.weight" else 0.94), (key, cosine)
        assert abs(lengths[0] / lengths[1] - 1) < 0.1, (key, lengths)


def test_the_released_ranges_after_observing():
    played = recorded_game("cifar10_w4a4")
    first = helpers.graph("resnet20").activations[0].name
    ours = quant.read_range(played.ranges_after_warmup[first], "released")
    # The stem sees images alone; deeper ones see its runaway range.
    theirs = played.record["ranges_after_warmup"][0]
    np.testing.assert_allclose(np.asarray(ours), theirs, rtol=1e-3)
