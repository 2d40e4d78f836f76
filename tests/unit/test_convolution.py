"""Every formulation of a convolution against XLA's, forward and both gradients."""

import jax
import jax.numpy as jnp
import pytest

from adadfq_jax.models import convolution
from tests import helpers
from tests.golden.fill import noise

# Of the registered networks and of the generator.
CHANNELS = [(1, 16), (3, 16), (64, 1), (64, 3), (16, 32), (3, 4), (1, 8)]


def upsample_and_convolve(x, kernel):
    return convolution.lax_conv(jnp.repeat(jnp.repeat(x, 2, 1), 2, 2), kernel)


def assert_equal_with_gradients(ours, theirs, x, kernel):
    """Both with both gradients, in one program."""
    shape = jax.eval_shape(theirs, x, kernel).shape

    @jax.jit
    def compute(x, kernel, up):
        pairs = (jax.vjp(function, x, kernel) for function in (ours, theirs))
        return [(out, *vjp(up)) for out, vjp in pairs]

    for found, expected in zip(*compute(x, kernel, noise("up", shape)), strict=True):
        helpers.assert_close(found, expected, 2e-6)


@pytest.mark.parametrize("image", [(8, 8), (5, 6), (1, 1)])
@pytest.mark.parametrize(("size", "stride"), [(3, 1), (3, 2), (1, 2), (1, 1)])
@pytest.mark.parametrize("channels", CHANNELS)
def test_conv_is_xlas(channels, size, stride, image):
    x = noise("x", (2, *image, channels[0]))
    kernel = noise("k", (size, size, *channels))
    assert_equal_with_gradients(
        lambda x, k: convolution.conv(x, k, stride),
        lambda x, k: convolution.lax_conv(x, k, stride),
        x,
        kernel,
    )


@pytest.mark.parametrize("image", [(8, 8), (4, 6), (1, 1)])
@pytest.mark.parametrize("channels", [(128, 64), (3, 4), (5, 1)])
def test_upsample_conv_is_nearest_upsampling_and_a_convolution(channels, image):
    x = noise("x", (2, *image, channels[0]))
    kernel = noise("k", (3, 3, *channels))
    assert_equal_with_gradients(
        convolution.upsample_conv, upsample_and_convolve, x, kernel
    )


@pytest.mark.parametrize("backend", ["cpu", "other"])
@pytest.mark.parametrize("image", [(8, 8), (7, 6), (1, 1)])
@pytest.mark.parametrize(("size", "stride"), [(3, 1), (3, 2), (5, 3)])
def test_depthwise_conv_is_xlas(size, stride, image, backend, monkeypatch):
    if backend == "other":
        monkeypatch.setattr(
            convolution, "_on_cpu", lambda here, elsewhere, *args: elsewhere(*args)
        )
    assert_equal_with_gradients(
        lambda x, k: convolution.conv(x, k, stride, groups=6),
        lambda x, k: convolution.lax_conv(x, k, stride, groups=6),
        noise("x", (2, *image, 6)),
        noise("k", (size, size, 1, 6)),
    )


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (convolution.conv, convolution.lax_conv),
        (convolution.upsample_conv, upsample_and_convolve),
    ],
)
def test_the_other_platforms_formulation(ours, theirs, monkeypatch):
    monkeypatch.setattr(
        convolution, "_on_cpu", lambda here, elsewhere, *args: elsewhere(*args)
    )
    for channels in [(3, 16), (16, 3)]:
        kernel = noise("k", (3, 3, *channels))
        x = noise("x", (2, 4, 6, channels[0]))
        assert_equal_with_gradients(ours, theirs, x, kernel)


@pytest.mark.parametrize("platform", ["cpu", "tpu", "cuda"])
def test_other_platforms_get_convolutions(platform):
    def gradient(x, kernel):
        return jax.grad(lambda k: jnp.sum(convolution.conv(x, k) ** 2))(kernel)

    x = jax.ShapeDtypeStruct((2, 8, 8, 64), jnp.float32)
    kernel = jax.ShapeDtypeStruct((3, 3, 64, 3), jnp.float32)
    exported = jax.export.export(jax.jit(gradient), platforms=[platform])(x, kernel)
    text = exported.mlir_module()
    assert ("dot_general" in text) == (platform == "cpu")
    assert ("stablehlo.convolution" in text) == (platform != "cpu")
