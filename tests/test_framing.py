"""Flat frames: what of an image stays, what the rest becomes, who learns from it."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from adadfq_jax import build, framing, game, losses
from adadfq_jax.errors import InputError
from adadfq_jax.game import Phase
from adadfq_jax.models.generator import draw_inputs
from configs import fashion_mnist_resnet20

SHAPE, COUNT = (20, 28, 3), 2000
BLACK, WHITE = np.array([-1.5, -2.0, -2.5]), np.array([1.0, 2.0, 3.0])


@functools.cache
def frames():
    key = jax.random.key(7)
    return jax.device_get(framing.draw_frames(key, COUNT, SHAPE, BLACK, WHITE))


def test_what_is_kept_is_a_rectangle_of_any_place_and_of_40_to_100_per_cent():
    keep = frames().keep[..., 0]
    rows, columns = keep.any(2), keep.any(1)
    np.testing.assert_array_equal(keep, rows[:, :, None] & columns[:, None, :])
    for inside, size in ((rows, SHAPE[0]), (columns, SHAPE[1])):
        edges = np.diff(np.pad(inside.astype(int), ((0, 0), (1, 1))), axis=1)
        assert (np.abs(edges).sum(1) == 2).all()  # one piece
        lengths = inside.sum(1)
        assert set(lengths) == set(range(round(0.4 * size), size + 1))
        assert inside.any(0).all()  # each place is kept in some image
        assert not inside.all(0).any()  # and lost in another


def test_the_frame_is_black_or_white():
    fill = frames().fill
    white = (fill[:, 0, 0] == WHITE.astype(np.float32)).all(1)
    black = (fill[:, 0, 0] == BLACK.astype(np.float32)).all(1)
    assert (white ^ black).all()
    assert abs(white.mean() - 0.5) < 4 * 0.5 / COUNT**0.5


def test_the_rectangle_stays_as_it_is():
    images = np.random.default_rng(1).normal(size=(COUNT, *SHAPE)).astype(np.float32)
    framed = np.asarray(framing.put(jnp.asarray(images), frames()))
    kept = np.broadcast_to(frames().keep, framed.shape)
    np.testing.assert_array_equal(framed[kept], images[kept])
    fill = np.broadcast_to(frames().fill, framed.shape)
    np.testing.assert_array_equal(framed[~kept], fill[~kept])


def config_with(weight):
    config = fashion_mnist_resnet20.get_config("w4a4")
    config.game.framed_weight = weight
    return config


def test_frames_are_of_p_s_pixels_and_leave_latents_and_labels_as_they_are():
    config = build.prepare(config_with(0.5))
    key = jax.random.key(3)
    batch = build.make_draw(config, 64)(key)
    for ours, theirs in zip(batch[:2], draw_inputs(key, 64, 10), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    mean, std = np.asarray(config.teacher.mean), np.asarray(config.teacher.std)
    pixels = np.unique(np.asarray(batch.frames.fill) * std + mean)
    np.testing.assert_allclose([pixels.min(), pixels.max()], [0, 1], atol=1e-6)
    assert build.make_draw(build.prepare(config_with(0.0)), 64)(key).frames is None


class Played:
    """A step in which Q trains on the ranges of one before, for some weight."""

    def __init__(self):
        self.config = build.prepare(config_with(0.5))
        self.p_variables = build.load_teacher(self.config)
        self.draw = build.make_draw(self.config, 8)
        self.batch = self.draw(jax.random.key(0))
        start = build.initial_state(
            self.config, self.parts(0.5), self.p_variables, self.draw
        )
        self.observed, _ = self.step(0.5, start, self.batch, Phase.OBSERVE)

    def parts(self, weight):
        return build.game_parts(build.prepare(config_with(weight)))

    def step(self, weight, state, batch, phase):
        play = game.make_play(**self.parts(weight)._asdict())
        return jax.jit(play, static_argnames="phase")(
            state, self.p_variables, batch, phase=phase
        )

    def both(self, weight, batch=None):
        batch = self.batch if batch is None else batch
        return jax.device_get(self.step(weight, self.observed, batch, Phase.BOTH))


@functools.cache
def played():
    return Played()


def test_g_and_the_observed_ranges_do_not_see_frames():
    framed, _ = played().both(0.5)
    plain, _ = played().both(0.0)
    chex.assert_trees_all_close(framed.g_params, plain.g_params, rtol=1e-5, atol=1e-7)
    _, before = played().step(0.0, played().observed, played().batch, Phase.OBSERVE)
    _, same = played().step(0.5, played().observed, played().batch, Phase.OBSERVE)
    chex.assert_trees_all_close(before, same, rtol=1e-6)


def test_q_minimises_the_loss_on_framed_images_too():
    """By hand: L(x) + w L(every second x, framed), and its gradient's step."""
    weight, game_played = 0.5, played()
    state, batch, parts = game_played.observed, game_played.batch, None
    parts = game_played.parts(weight)
    g_variables = {"params": state.g_params, "batch_stats": state.g_batch_stats}

    @jax.jit
    def step():
        images, _ = parts.networks.g_apply(
            g_variables, batch.latents, batch.labels, mutable=["batch_stats"]
        )
        kept = batch.frames.keep[::2]
        framed = images[::2] * kept + batch.frames.fill[::2] * (1 - kept)

        def loss(params):
            q_state = state.replace(q_params=params)
            variables = game.q_variables(
                q_state, game_played.p_variables, parts.q_options
            )
            values = [
                losses.student_gap(
                    parts.networks.p_apply(game_played.p_variables, x),
                    parts.networks.q_apply(variables, x),
                    game_played.config.game.temperature,
                )
                for x in (images, framed)
            ]
            return values[0] + weight * values[1]

        value, grads = jax.value_and_grad(loss)(state.q_params)
        trained, _ = parts.q_optimizer.update(
            {"params": grads}, state.q_opt_state, {"params": state.q_params}, state.step
        )
        return value, trained["params"]

    value, params = jax.device_get(step())
    after, metrics = game_played.both(weight)
    np.testing.assert_allclose(metrics["student"], value, rtol=1e-4)

    def moved(new):
        return jax.tree.map(lambda a, b: a - b, new, jax.device_get(state.q_params))

    ours, theirs = moved(after.q_params), moved(params)
    a, b = (
        np.concatenate(list(map(np.ravel, jax.tree.leaves(t)))) for t in (ours, theirs)
    )
    assert a @ b / (np.linalg.norm(a) * np.linalg.norm(b)) > 0.999
    plain, _ = game_played.both(0.0)
    c = np.concatenate(list(map(np.ravel, jax.tree.leaves(moved(plain.q_params)))))
    assert a @ c / (np.linalg.norm(a) * np.linalg.norm(c)) < 0.99  # it tells them apart


def test_a_negative_weight_is_refused():
    with pytest.raises(InputError, match=r"framed_weight=-0.1.*0 or more"):
        build.prepare(config_with(-0.1))
