"""Flat frames: what of an image stays, what the rest becomes, who learns from it."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from adadfq_jax import game, losses
from adadfq_jax.errors import InputError
from adadfq_jax.game import Phase, framing, players
from adadfq_jax.models.generator import draw_inputs
from adadfq_jax.training import build
from adadfq_jax.training.spec import resolve
from configs import fashion_mnist_resnet20
from tests import jobs

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
    framed = np.asarray(framing.put_in_frames(jnp.asarray(images), frames()))
    kept = np.broadcast_to(frames().keep, framed.shape)
    np.testing.assert_array_equal(framed[kept], images[kept])
    fill = np.broadcast_to(frames().fill, framed.shape)
    np.testing.assert_array_equal(framed[~kept], fill[~kept])


def config_with(weight):
    config = fashion_mnist_resnet20.get_config("w4a4")
    config.game.framed_weight = weight
    return config


def test_frames_are_of_p_s_pixels_and_leave_latents_and_labels_as_they_are():
    spec = resolve(config_with(0.5))
    key = jax.random.key(3)
    batch = build.make_draw(spec, 64)(key)
    for ours, theirs in zip(batch[:2], draw_inputs(key, 64, 10), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    mean, std = np.asarray(spec.teacher.mean), np.asarray(spec.teacher.std)
    pixels = np.unique(np.asarray(batch.frames.fill) * std + mean)
    np.testing.assert_allclose([pixels.min(), pixels.max()], [0, 1], atol=1e-6)
    assert build.make_draw(resolve(config_with(0.0)), 64)(key).frames is None


class Played:
    """Steps in which Q trains, after one in which its ranges were observed."""

    def __init__(self, job):
        self.job = job
        function, spec, _ = build.load_teacher(self.spec(0.5))
        self.assembly = build.assemble(spec, 8)
        self.batch = self.assembly.draw(jax.random.key(0))
        self.teacher = self.assembly.teacher(function.variables)
        start = build.initial_state(self.assembly, function.variables)
        self.observed, _ = self.step(0.5, Phase.OBSERVE, start)
        self.both = functools.cache(lambda weight: self.step(weight, Phase.BOTH))

    def spec(self, weight):
        values = {"game.framed_weight": weight, "game.q_rate": 1e-3}
        return resolve(jobs.tiny_config(self.job, **values))

    def step(self, weight, phase, state=None):
        parts = build.assemble(self.spec(weight), 8).parts
        play = jax.jit(game.make_play(**parts._asdict()), static_argnames="phase")
        state = self.observed if state is None else state
        after = play(state, self.teacher, self.batch, phase=phase)
        return jax.device_get(after)

    def q_update(self, params):
        """How far Q has moved, as one vector."""
        moved = jax.tree.map(np.subtract, params, self.observed.q_params)
        return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(moved)])


@pytest.fixture(scope="module")
def played(job):
    return Played(job)


def test_g_does_not_see_frames(played):
    (framed, losses_framed), (plain, losses_plain) = map(played.both, (0.5, 0.0))
    chex.assert_trees_all_close(framed.g_batch_stats, plain.g_batch_stats, rtol=1e-5)
    # Not the parameters: Adam makes whole steps of gradients that are rounding alone.
    chex.assert_trees_all_close(
        framed.g_opt_state, plain.g_opt_state, rtol=1e-3, atol=1e-6
    )
    for name in ("generator", "student"):
        np.testing.assert_allclose(losses_framed[name], losses_plain[name], rtol=1e-5)


def cosine(a, b):
    return a @ b / (np.linalg.norm(a) * np.linalg.norm(b))


def test_q_minimises_the_loss_on_framed_images_too(played):
    """By hand: L(x) + w L(every second x, framed), and its gradient's step."""
    weight, ours = 0.5, played
    state, batch, parts = ours.observed, ours.batch, ours.assembly.parts

    @jax.jit
    def by_hand():
        g_variables = {"params": state.g_params, "batch_stats": state.g_batch_stats}
        images, _ = parts.networks.g_apply(
            g_variables, batch.latents, batch.labels, mutable=["batch_stats"]
        )
        kept = batch.frames.keep[::2].astype(images.dtype)
        framed = images[::2] * kept + batch.frames.fill[::2] * (1 - kept)

        def gap(params, x):
            graph, options = parts.networks.q, parts.q_options
            moved = state.replace(q_params=params)
            q = game.q_variables(moved, ours.teacher, graph, options)
            return losses.student_gap(
                players.p_logits(graph, ours.teacher.variables, x),
                players.q_logits(graph, options, q, x),
                ours.assembly.spec.game.temperature,
            )

        def loss(params):
            on_framed = gap(params, framed)
            return gap(params, images) + weight * on_framed, on_framed

        grads, on_framed = jax.grad(loss, has_aux=True)(state.q_params)
        trained, _ = parts.q_optimizer.update(
            grads, state.q_opt_state, state.q_params, state.step
        )
        return on_framed, trained

    on_framed, params = jax.device_get(by_hand())
    after, metrics = ours.both(weight)
    np.testing.assert_allclose(metrics["framed"], on_framed, rtol=1e-4)
    update = ours.q_update(after.q_params)
    assert cosine(update, ours.q_update(params)) > 0.999
    # And it tells a step without frames from one with them.
    assert cosine(update, ours.q_update(ours.both(0.0)[0].q_params)) < 0.99


def test_a_negative_weight_is_refused():
    with pytest.raises(InputError, match=r"framed_weight=-0.1.*0 or more"):
        resolve(config_with(-0.1))
