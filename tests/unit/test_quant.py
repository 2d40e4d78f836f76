"""Fake quantization and activation ranges: recorded cases and hand-made ones."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from adadfq_jax import quant
from tests import helpers
from tests.golden.fill import noise

GOLDEN = helpers.load_npz("quantizers")
BITS = (2, 3, 4, 5, 6, 8)
ACTIVATIONS = sorted(key for key in GOLDEN if key.startswith("act_q_"))


@pytest.mark.parametrize("bits", BITS)
def test_kernels_match_the_recorded_ones_per_channel(bits):
    # Constant and zero channels are among the recorded ones.
    conv = GOLDEN[f"conv_w_{bits}"].transpose(2, 3, 1, 0)
    expected = GOLDEN[f"conv_q_{bits}"].transpose(2, 3, 1, 0)
    helpers.assert_close(quant.fake_quant_kernel(conv, bits), expected, 1e-6)
    dense = quant.fake_quant_kernel(GOLDEN[f"dense_w_{bits}"].T, bits)
    helpers.assert_close(dense, GOLDEN[f"dense_q_{bits}"].T, 1e-6)


@pytest.mark.parametrize("key", ACTIVATIONS)
def test_activations_match_the_recorded_ones_per_tensor(key):
    bits, lo, hi = re.fullmatch(r"act_q_(\d)_(.*)_(.*)", key).groups()
    x = GOLDEN[f"act_x_{bits}"]
    found = quant.fake_quant(x, jnp.float32(lo), jnp.float32(hi), int(bits))
    helpers.assert_close(found, GOLDEN[key], 1e-6)


def test_every_width_is_recorded():
    assert {int(key[6]) for key in ACTIVATIONS} == set(BITS)


def test_codes_by_hand_with_halves_to_even():
    # Range [0, 3] at 2 bits: scale 1, zero point 0, codes 0..3.
    x = jnp.array([-9.0, 0.5, 1.5, 2.5, 1.49, 9.0])
    codes, scale, zero_point = quant.to_integers(x, 0, 3, 2)
    assert (scale, zero_point) == (1, 0)
    # 0.5 -> 0, 1.5 and 2.5 -> 2 (even); outside values are clipped.
    np.testing.assert_array_equal(codes, [0, 0, 2, 2, 1, 3])
    found = quant.fake_quant(x, jnp.float32(0), jnp.float32(3), 2)
    np.testing.assert_array_equal(found, [0, 0, 2, 2, 1, 3])


def test_signed_range_by_hand():
    # [-1, 1] at 2 bits: s = 1.5, round(-1.5) = -2 (even), z = 0: the grid is k / 1.5
    # for k in -2..1, so that 1 is out of its reach.
    x = jnp.array([-5.0, -1.0, -0.4, 0.0, 0.4, 1.0])
    found = quant.fake_quant(x, jnp.float32(-1), jnp.float32(1), 2)
    expected = np.array([-2, -2, -1, 0, 1, 1]) / 1.5
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_gradient_is_one_everywhere_and_none_reaches_the_range():
    x = jnp.linspace(-3, 3, 31)  # half of them clipped
    lo, hi = jnp.float32(-1), jnp.float32(1.5)
    up = jnp.arange(31.0)

    def value(x, lo, hi):
        return jnp.sum(up * quant.fake_quant(x, lo, hi, 3))

    by_x, by_lo, by_hi = jax.grad(value, (0, 1, 2))(x, lo, hi)
    np.testing.assert_array_equal(by_x, up)
    assert by_lo == 0 and by_hi == 0


def test_kernel_gradient_is_one_though_the_range_follows_the_kernel():
    w = jax.random.normal(jax.random.key(0), (3, 3, 4, 5))
    up = jax.random.normal(jax.random.key(1), w.shape)
    found = jax.grad(lambda w: jnp.sum(up * quant.fake_quant_kernel(w, 2)))(w)
    np.testing.assert_array_equal(found, up)


@pytest.mark.parametrize("bits", range(2, 9))
def test_kernels_are_the_same_bits_jitted(bits):
    # The export rebuilds Q's kernels from codes: they may not depend on fusion.
    w = jax.random.normal(jax.random.key(bits), (3, 3, 16, 32))
    jitted = jax.jit(quant.fake_quant_kernel, static_argnums=1)(w, bits)
    np.testing.assert_array_equal(jitted, quant.fake_quant_kernel(w, bits))


@pytest.mark.parametrize("bits", range(2, 9))
def test_at_most_two_to_the_bits_values_a_channel(bits):
    w = jax.random.normal(jax.random.key(0), (3, 3, 64, 2))
    found = np.asarray(quant.fake_quant_kernel(w, bits)).reshape(-1, 2)
    assert all(len(np.unique(channel)) <= 2**bits for channel in found.T)
    step = np.ptp(np.asarray(w).reshape(-1, 2), axis=0) / (2**bits - 1)
    # Half a step for rounding x, up to half for rounding the zero point.
    worst = np.abs(found - np.asarray(w).reshape(-1, 2)).max(0)
    assert (worst <= step * 1.001).all()


def test_kernels_are_quantized_along_their_output_axes():
    kernel = jax.random.normal(jax.random.key(0), (5, 4, 3))
    found = quant.fake_quant_kernel(kernel, 3, None, (0, 2))
    for i in range(5):
        for j in range(3):
            alone = quant.fake_quant_kernel(kernel[i, :, j, None], 3)
            np.testing.assert_array_equal(found[i, :, j], alone[:, 0])
    integers = quant.kernel_integers(kernel, 3, None, (0, 2))
    assert integers.scale.shape == integers.zero_point.shape == (15,)
    zero_point, scale = (
        quant.along(values, kernel.shape, (0, 2))
        for values in (integers.zero_point, integers.scale)
    )
    np.testing.assert_array_equal((integers.codes - zero_point) * scale, found)


def test_at_two_bits_channels_of_few_values_keep_minimum_and_maximum():
    kernel = jax.random.normal(jax.random.key(0), (3, 3, 1, 8))
    assert quant.kernel_shrink(kernel, 2) is None
    assert quant.kernel_shrink(kernel, 3).shape == (1, 1, 1, 8)
    assert quant.kernel_shrink(kernel.reshape(36, 2), 2).shape == (1, 2)
    assert quant.kernel_shrink(kernel.reshape(2, 36), 2, (0,)).shape == (2, 1)


@pytest.mark.parametrize("axis", ["lo", "hi"])
def test_released_average_is_the_recorded_recursion(axis):
    # lo is 0 throughout in the record; hi reaches 8,843.
    golden = helpers.load_npz("range_ema")
    state, found = quant.init_range(), []
    for batch in golden["x"]:
        state = quant.update_range(state, batch.min(), batch.max(), "released")
        lo, hi = quant.read_range(state, "released")
        found.append(lo if axis == "lo" else hi)
    np.testing.assert_array_equal(np.array(found, np.float64), golden[axis])


def test_released_average_peaks_at_3945_times_a_constant():
    state, found = quant.init_range(), []
    for _ in range(150):
        state = quant.update_range(state, np.float32(-1), np.float32(1), "released")
        found.append(float(state.hi))
    assert np.argmax(found) == 20  # update 21
    assert found[20] == pytest.approx(3945, abs=1)
    assert found[-1] == pytest.approx(1, rel=0.014)
    assert float(state.lo) == -found[-1]


def test_corrected_average_of_signed_ranges_by_hand():
    # Weights after n updates: 0.1 * 0.9^(n - 1 - i) / (1 - 0.9^n).
    batches = [(-1.0, 2.0), (-3.0, 1.0), (0.5, 4.0)]
    expected = [
        (-1.0, 2.0),
        ((0.9 * -1 + -3) / 1.9, (0.9 * 2 + 1) / 1.9),
        ((0.81 * -1 + 0.9 * -3 + 0.5) / 2.71, (0.81 * 2 + 0.9 * 1 + 4) / 2.71),
    ]
    state = quant.init_range()
    for (lo, hi), wanted in zip(batches, expected, strict=True):
        state = quant.update_range(state, np.float32(lo), np.float32(hi), "corrected")
        np.testing.assert_allclose(quant.read_range(state, "corrected"), wanted, 1e-6)


def test_corrected_average_of_a_constant_is_the_constant():
    state = quant.init_range()
    for _ in range(100):
        state = quant.update_range(state, np.float32(-2), np.float32(5), "corrected")
        np.testing.assert_allclose(quant.read_range(state, "corrected"), (-2, 5), 2e-6)


@pytest.mark.parametrize("range_ema", ("corrected", "released"))
def test_fixed_range_reads_as_itself(range_ema):
    state = quant.fixed_range(np.float32(-0.3), np.float32(7.1))
    assert quant.read_range(state, range_ema) == (np.float32(-0.3), np.float32(7.1))


@pytest.mark.parametrize("range_ema", ("corrected", "released"))
@pytest.mark.parametrize("bits", [2, 8])
def test_a_range_never_observed_gives_finite_values(bits, range_ema):
    lo, hi = quant.read_range(quant.init_range(), range_ema)
    assert (lo, hi) == (0, 0)
    found = quant.fake_quant(jnp.linspace(-10, 10, 9), lo, hi, bits)
    assert np.isfinite(found).all()


def test_masked_and_learned_gradients_by_hand():
    # 2 bits on [0, 3]: codes stand for 0, 1, 2, 3. Below, inside (error +0.3: rounded
    # up by 0.3; then -0.2), above.
    x = jnp.float32([-1.0, 0.7, 2.2, 5.0])

    def total(x, lo, hi, **how):
        return jnp.sum(
            jnp.float32([1, 10, 100, 1000]) * quant.fake_quant(x, lo, hi, 2, **how)
        )

    by_x, by_lo, by_hi = jax.grad(total, (0, 1, 2))(x, 0.0, 3.0)
    np.testing.assert_array_equal(by_x, [1, 10, 100, 1000])
    assert float(by_lo) == float(by_hi) == 0
    by_x = jax.grad(functools.partial(total, masked=True))(x, 0.0, 3.0)
    np.testing.assert_array_equal(by_x, [0, 10, 100, 0])
    learned = jax.grad(functools.partial(total, learned=True), (0, 1, 2))
    by_x, by_lo, by_hi = learned(x, jnp.float32(0), jnp.float32(3))
    np.testing.assert_array_equal(by_x, [0, 10, 100, 0])
    scale = (4 * 3) ** -0.5
    inside = (10 * 0.3 - 100 * 0.2) / 3
    assert float(by_lo) == pytest.approx(scale * (1 - inside), rel=1e-4)
    assert float(by_hi) == pytest.approx(scale * (1000 + inside), rel=1e-4)


def test_the_least_error_range_is_the_best_of_its_candidates():
    kernel = noise("outlier", (3, 3, 64, 5))
    kernel[0, 0, 0, 2] = 8.0

    def error(lo, hi):
        return jnp.sum(
            jnp.square(kernel - quant.fake_quant(kernel, lo, hi, 3)), (0, 1, 2)
        )

    lo, hi = quant.kernel_range(kernel)
    best = error(*quant.kernel_range(kernel, quant.kernel_shrink(kernel, 3)))
    for shrink in quant.SHRINKS:
        assert (best <= error(shrink * lo, shrink * hi) * (1 + 1e-6)).all()
    assert best[2] < 0.9 * error(lo, hi)[2]  # the outlier is given up


def test_kernels_that_are_near_are_quantized_nearly_alike():
    """As those of Q and of its average: by P's shrinks, not by shrinks of their own."""
    p = noise("depthwise", (3, 3, 1, 8192))
    near = p * (1 + 1e-3 * noise("moved", p.shape))

    def shrink(kernel):
        return quant.kernel_shrink(kernel, 4)

    def apart(*shrinks):
        """By how many steps, over the nine weights of a channel."""
        lo, hi = quant.kernel_range(p)
        first, second = (
            quant.fake_quant_kernel(kernel, 4, each)
            for kernel, each in zip((p, near), shrinks, strict=True)
        )
        return (jnp.abs(first - second) / ((hi - lo) / 15)).sum((0, 1, 2))

    jumped = (shrink(p) != shrink(near)).reshape(-1)
    assert 0 < jumped.sum() < 100
    assert jnp.median(apart(shrink(p), shrink(p))[jumped]) < 0.1
    assert apart(shrink(p), shrink(near))[jumped].min() > 1


def test_observed_ranges_of_a_batch():
    x = noise("acts", (64, 512))
    x[0, 0] = 100.0
    assert quant.observed_range(x, 4, "minmax") == (x.min(), 100)


def test_observed_ranges_of_least_error():
    x = noise("acts", (64, 512))

    def error(lo, hi):
        return (jnp.abs(x - quant.fake_quant(x, lo, hi, 3)) ** 3).sum()

    least = error(*quant.observed_range(x, 3, "l3"))
    for shrink in quant.SHRINKS:
        assert least <= error(shrink * x.min(), shrink * x.max()) * (1 + 1e-6)
    assert least < 0.9 * error(x.min(), x.max())


def test_a_higher_power_clips_less():
    x = noise("acts", (64, 512))
    found = [
        float(quant.least_error_shrink(x, x.min(), x.max(), 3, (0, 1), power=power))
        for power in (2, 3)
    ]
    assert found[0] < found[1] < 1
