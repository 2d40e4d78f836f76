"""Flat frames: what of an image stays, what the rest becomes, who sees it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from adadfq_jax import build, framing, game
from adadfq_jax.errors import InputError
from adadfq_jax.game import Phase
from adadfq_jax.models.generator import draw_inputs
from configs import fashion_mnist_resnet20

SHAPE, COUNT = (20, 28, 3), 2000
BLACK, WHITE = np.array([-1.5, -2.0, -2.5]), np.array([1.0, 2.0, 3.0])


@functools.cache
def draw(share):
    return jax.device_get(
        framing.draw_frames(jax.random.key(7), COUNT, SHAPE, share, BLACK, WHITE)
    )


def test_so_many_images_are_framed():
    assert draw(0.0).keep.all()
    framed = ~draw(0.25).keep.all((1, 2, 3))
    # Of those drawn, one in 14 x 9 sides keeps the whole image.
    assert abs(framed.mean() - 0.25) < 4 * (0.25 * 0.75 / COUNT) ** 0.5 + 0.25 / 100


def test_what_is_kept_is_a_rectangle_of_any_place_and_of_40_to_100_per_cent():
    keep = draw(1.0).keep[..., 0]
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
    fill = draw(1.0).fill
    white = (fill[:, 0, 0] == WHITE.astype(np.float32)).all(1)
    black = (fill[:, 0, 0] == BLACK.astype(np.float32)).all(1)
    assert (white ^ black).all()
    assert abs(white.mean() - 0.5) < 4 * 0.5 / COUNT**0.5


def test_the_rectangle_stays_as_it_is_and_the_frame_has_no_gradient():
    frames = draw(1.0)
    images = jax.random.normal(jax.random.key(1), (COUNT, *SHAPE))
    framed = np.asarray(framing.put(images, frames))
    kept = np.broadcast_to(frames.keep, framed.shape)
    np.testing.assert_array_equal(framed[kept], np.asarray(images)[kept])
    fill = np.broadcast_to(frames.fill, framed.shape)
    np.testing.assert_array_equal(framed[~kept], fill[~kept])
    slope = jax.grad(lambda x: jnp.sum(framing.put(x, frames)))(images)
    np.testing.assert_array_equal(slope, kept.astype(np.float32))


def config_with(share):
    config = fashion_mnist_resnet20.get_config("w4a4")
    config.game.framed_share = share
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


def test_both_networks_see_the_frame():
    """Frames over whole images: nothing of G is left, for P, Q and the gradient."""
    config = build.prepare(config_with(1.0))
    p_variables = build.load_teacher(config)
    parts, draw_batch = build.game_parts(config), build.make_draw(config, 4)
    state = build.initial_state(config, parts, p_variables, draw_batch)
    play = jax.jit(game.make_play(**parts._asdict()), static_argnames="phase")
    batch = draw_batch(jax.random.key(0))
    flat = jnp.full((4, 1, 1, 1), 0.75)
    nowhere = jnp.zeros_like(batch.frames.keep)
    batch = batch._replace(frames=framing.Frames(nowhere, flat))
    after, _ = play(state, p_variables, batch, phase=Phase.OBSERVE)
    apply = jax.jit(functools.partial(parts.networks.q_apply, mutable=["ranges"]))
    variables = game.q_variables(state, p_variables, parts.q_options)
    images = jnp.full((4, *config.teacher.image_shape), 0.75)
    for _ in range(2):
        _, moved = apply(variables, images)
        variables = {**variables, **moved}
    for ours, theirs in zip(
        jax.tree.leaves(after.q_ranges),
        jax.tree.leaves(variables["ranges"]),
        strict=True,
    ):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)
    first = jax.tree.leaves(after.g_opt_state)
    moments = [leaf for leaf in first if leaf.ndim > 1]
    assert moments
    assert not any(leaf.any() for leaf in moments)  # no gradient has reached G


@pytest.mark.parametrize("share", [-0.1, 1.5])
def test_a_share_that_is_none_is_refused(share):
    with pytest.raises(InputError, match=r"framed_share=.*0 to 1"):
        build.prepare(config_with(share))
