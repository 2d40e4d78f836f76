"""Reconstruction: rounding, blocks, and the phase over them."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from adadfq_jax import quant
from adadfq_jax.errors import InputError, NumericalError
from adadfq_jax.game import players
from adadfq_jax.network import kernels
from adadfq_jax.reconstruction import Block, Fixed, Images, Options, rounding, start
from adadfq_jax.reconstruction.block import _coins
from adadfq_jax.runtime import memory, sharding
from adadfq_jax.training import build, reconstruct, run
from adadfq_jax.training.callbacks import At
from adadfq_jax.training.spec import resolve
from tests import helpers, jobs
from tests.golden.fill import noise

OPTIONS = Options(
    iterations=20, batch_size=8, rate=0.05, factor_rate=1e-3, penalty=0.01
)


def kernel_at_start(shape, bits, out_axes=(-1,)):
    kernel = jnp.asarray(noise("rounded kernel", shape))
    return kernel, *rounding.start(kernel, bits, None, out_axes)


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("out_axes", [(-1,), (0,)])
def test_a_kernel_begins_as_it_is_and_rounds_as_it_did(bits, out_axes):
    kernel, grid, v = kernel_at_start((3, 3, 4, 6), bits, out_axes)
    soft = rounding.codes(grid, rounding.soft(v), bits)
    # The zero point is whole: an end of the range may lie half a step beyond the codes.
    lo, hi = (end - grid.zero_point for end in (0, 2**bits - 1))
    inside = jnp.clip(kernel, lo * grid.scale, hi * grid.scale)
    assert np.all(np.abs(inside - kernel) <= 0.5001 * grid.scale)
    begun = (soft - grid.zero_point) * grid.scale
    np.testing.assert_allclose(begun, inside, atol=1e-5, rtol=1e-4)
    found = quant.kernel_integers(kernel, bits, None, out_axes)
    np.testing.assert_array_equal(
        rounding.codes(grid, rounding.hard(v), bits), found.codes
    )
    np.testing.assert_array_equal(np.ravel(grid.scale), found.scale)
    np.testing.assert_array_equal(np.ravel(grid.zero_point), found.zero_point)


def test_a_kernel_of_zeros_stays_finite():
    grid, v = rounding.start(jnp.zeros((3, 4)), 4, None, (-1,))
    assert np.all(np.isfinite(v))
    u = rounding.codes(grid, rounding.hard(v), 4)
    np.testing.assert_array_equal((u - grid.zero_point) * grid.scale, 0)


def test_the_penalty_is_0_where_all_is_rounded_and_1_at_a_half():
    assert float(rounding.penalty(jnp.asarray([-9.0, 9.0]), jnp.asarray(2.0))) == 0
    assert float(rounding.penalty(jnp.zeros(5), jnp.asarray(20.0))) == 5


def test_coins_are_fair_and_the_same_on_any_number_of_devices():
    key, shape = jax.random.key(3), (8, 5, 7, 3)
    whole = np.asarray(_coins(key, shape, None))
    assert whole.dtype == bool and abs(whole.mean() - 0.5) < 0.05
    assert len(np.unique(whole.reshape(8, -1), axis=0)) == 8
    shared = jax.vmap(
        lambda _: _coins(key, (2, *shape[1:]), "d"), axis_name="d", axis_size=4
    )(np.zeros(4))
    np.testing.assert_array_equal(shared.reshape(shape), whole)


def blocks_of(graph, axis_name=None):
    q_options = players.QOptions(4, 4)
    count = len(graph.blocks)
    return [Block(graph, i, q_options, OPTIONS, axis_name) for i in range(count)]


@pytest.fixture(scope="module")
def small(job):
    """The tiny network: assembly, P, and a state whose ranges have seen images."""
    config = jobs.tiny_config(
        job,
        **{
            "reconstruction.iterations": 6,
            "reconstruction.images": 32,
            "reconstruction.batch_size": 8,
            "reconstruction.framed": 0.5,
            "game.steps": 4,
        },
    )
    loaded = build.load_teacher(resolve(config))
    assembly = build.assemble(loaded.spec, 16, loaded.function)
    teacher = assembly.teacher(loaded.function.variables)
    state = build.initial_state(assembly, loaded.function.variables)
    graph, options = assembly.graph, assembly.parts.q_options

    @jax.jit
    def observe(teacher, ranges, images):
        q = players.quantize(graph, options, teacher, {}, ranges)
        return players.q_observe(graph, options, q, images)[1]

    ranges = observe(teacher, state.q_ranges, noise("observed", (8, *jobs.SHAPE)))
    return assembly, teacher, state.replace(q_ranges=ranges)


def on(devices, *trees):
    return [sharding.replicate(tree, devices) for tree in trees]


def phase_on(small, count=1):
    return reconstruct.Reconstruction(small[0], jax.devices()[:count])


def reconstructed(small, phase, **options):
    """The state after the phase, its step, and the errors of the blocks."""
    _, teacher, state = small
    teacher, state = on(phase._devices, teacher, state)
    errors = []
    ended, step = phase.fit(state, teacher, 0, errors=errors, **options)
    return ended, step, errors


@pytest.fixture(scope="module")
def whole(small):
    """Makes the phase on one device, and what `reconstructed` gives, once."""

    @functools.cache
    def make():
        phase = phase_on(small)
        return phase, *reconstructed(small, phase)

    return make


def test_the_blocks_of_q_are_q(small, whole):
    assembly, teacher, state = small
    phase, *_ = whole()
    begun = phase._begun(state, teacher)
    graph, options = assembly.graph, assembly.parts.q_options

    @jax.jit
    def compute(begun, teacher, ranges, images):
        x = images
        for block, (fixed, learned) in zip(phase._blocks, begun, strict=True):
            x = block.q_output(learned, fixed, x)
        q = players.quantize(graph, options, teacher, {}, ranges)
        return x, players.q_logits(graph, options, q, images)

    images = jnp.asarray(noise("through all", (4, *jobs.SHAPE)))
    found, expected = compute(begun, teacher, state.q_ranges, images)
    helpers.assert_close(found, expected, 1e-5)


def test_a_block_comes_closer_to_ps(small, whole):
    assembly, teacher, state = small
    phase, *_ = whole()
    fixed, learned = phase._begun(state, teacher)[1]
    block = Block(assembly.graph, 1, assembly.parts.q_options, OPTIONS)
    kernels = phase._kernels(teacher.variables)
    entry = assembly.graph.blocks[0]
    x = jax.nn.relu(jnp.asarray(noise("into the block", (64, 16, 16, entry.shape[-1]))))
    x = x[:, : entry.shape[0], : entry.shape[1]]
    y = block.p_output(
        [kernels[e.name] for e in block.kernels],
        [teacher.variables[name] for name in block.variables],
        x,
    )
    fixed = fixed._replace(
        mean_square=jnp.mean(jnp.square(y)), first_step=jnp.zeros((), jnp.int32)
    )

    @jax.jit
    def error(learned):
        q = block.q_output(learned, fixed, x)
        return jnp.mean(jnp.square(q - y)) / fixed.mean_square

    now, iterate = start(learned, 0), jax.jit(block.iterate)
    for _ in range(OPTIONS.iterations):
        now, terms = iterate(now, fixed, Images(x, x, y), jax.random.key(0))
    assert int(terms["first_bad_step"]) == -1 and int(now.step) == OPTIONS.iterations
    assert float(error(now.learned)) < 0.9 * float(error(learned))


def test_the_phase_ends_in_the_network_that_the_blocks_are(small, whole):
    phase, ended, step, errors = whole()
    assembly, teacher, _ = small
    count = len(assembly.graph.blocks)
    assert step == phase.steps == 4 + 6 * count
    assert [error.block for error in errors] == [b.name for b in assembly.graph.blocks]
    assert all(0 < error.after < 1 for error in errors)
    network = run.freeze(assembly, ended, teacher, phase)
    images = phase.draw_images(small[2], 0)
    p = jax.jit(functools.partial(players.p_logits, assembly.graph))(
        teacher.variables, images
    )
    found = float(jnp.mean(jnp.square(network(images) - p)) / jnp.mean(jnp.square(p)))
    assert found == pytest.approx(errors[-1].after, rel=1e-3)


def test_stopped_and_gone_on_is_the_same(small, whole):
    phase, uninterrupted, *_ = whole()
    kept = []
    stop_at = At([13], lambda step, state, _: kept.append(jax.device_get(state)))
    reconstructed(small, phase, callbacks=[stop_at])
    assert phase.step_of(kept[0]) == 13
    shapes = phase.like(small[2], small[1], 13)
    jax.tree.map(
        lambda a, b: np.testing.assert_equal(a.shape, b.shape), kept[0], shapes
    )
    teacher, begun = on(jax.devices()[:1], small[1], kept[0])
    ended, step = phase.fit(begun, teacher, 0)
    assert step == phase.steps
    jax.tree.map(np.testing.assert_array_equal, ended.finished, uninterrupted.finished)
    assert phase.fit(ended, teacher, 0) == (ended, step)


def test_several_devices_give_the_same_numbers(small, whole):
    _, one, _, errors_of_one = whole()
    four, _, errors_of_four = reconstructed(small, phase_on(small, 4))
    for ours, theirs in zip(errors_of_four, errors_of_one, strict=True):
        assert ours.after == pytest.approx(theirs.after, rel=2e-2)
    for ours, theirs in zip(four.finished, one.finished, strict=True):
        for a, b in zip(ours.scales, theirs.scales, strict=True):
            helpers.assert_close(a, b, 0.1)


def test_iterations_in_a_dispatch_change_nothing(small, whole):
    phase, *_, alone = whole()
    *_, together = reconstructed(small, phase, per_dispatch=3)
    for ours, theirs in zip(together, alone, strict=True):
        assert ours.after == pytest.approx(theirs.after, rel=2e-2)


def test_a_number_that_fails_is_told_with_its_step(small, whole):
    assembly, teacher, state = small
    bad = state.q_ranges | {
        assembly.graph.activations[1].name: quant.fixed_range(0.0, np.nan)
    }
    with pytest.raises(NumericalError, match=r"step 1\d: .*reconstruction\.rate"):
        reconstructed((assembly, teacher, state.replace(q_ranges=bad)), whole()[0])


def test_a_batch_that_does_not_divide_is_refused(small):
    with pytest.raises(InputError, match=r"reconstruction\.batch_size=8: .*3 devices"):
        reconstruct.check_batch(small[0].spec, jax.devices()[:3])


def test_images_that_do_not_fit_into_memory_are_refused(small, monkeypatch):
    assembly = small[0]
    sizes = [np.prod(assembly.info.image_shape)]
    sizes += [np.prod(block.shape) for block in assembly.graph.blocks]
    most = max(a + b + max(a, b) for a, b in itertools.pairwise(sizes))
    need = 4 * most * assembly.spec.reconstruction.images
    assert reconstruct.kept_bytes(assembly) == need
    monkeypatch.setattr(memory, "of_each", lambda devices: need)
    reconstruct.check_memory(assembly, jax.devices()[:1])
    monkeypatch.setattr(memory, "of_each", lambda devices: need - 1)
    with pytest.raises(InputError, match=r"reconstruction\.images=\d+: .*; \d+ fit"):
        reconstruct.check_memory(assembly, jax.devices()[:1])


def test_the_memory_of_cpu_devices_is_the_machines():
    one, two = (memory.of_each(jax.devices()[:count]) for count in (1, 2))
    assert one is not None and 2**28 < one < 2**50 and two == one // 2


def test_blocks_that_are_alike_share_a_program():
    graph = helpers.graph("resnet20")
    outputs = []
    variables = helpers.filled_variables("resnet20_cifar10")
    for block in blocks_of(graph):
        begin = functools.partial(fixed_and_learned, graph, block)
        fixed, learned = jax.eval_shape(begin, variables)
        shape = graph.blocks[len(outputs) - 1].shape if outputs else graph.image_shape
        x = jax.ShapeDtypeStruct((2, *shape), jnp.float32)
        outputs.append(str(jax.make_jaxpr(block.q_output)(learned, fixed, x)))
    assert len(outputs) == 11 and len(set(outputs)) == 8


def fixed_and_learned(graph, block, variables):
    own = kernels(graph, variables)
    grids, learned = block.begin(
        [own[e.name] for e in block.kernels], [None] * len(block.kernels)
    )
    ends = tuple((jnp.zeros(()), jnp.ones(())) for _ in block.activations)
    others = tuple(variables[name] for name in block.variables)
    return Fixed(grids, ends, others, jnp.ones(()), jnp.zeros((), jnp.int32)), learned
