"""Convolutions, in the formulation that is fastest where the program runs.

Images are [B, H, W, channels], kernels [k, k, in, out], and the padding is k // 2 on
each side. On TPU and GPU all convolutions and gradients are XLA's. On CPU a few shapes
have another formulation of the same sum, which is faster there (`_on_cpu`). Medians in
milliseconds for batch 16, generator and ResNet-20 at 32 x 32 x 3, 2 cores:

    what                                    XLA's   here
    64 -> 3, gradient of the kernel           6.5    2.7   product with patches of g
    64 -> 3, forward                          2.3    1.9   product, shifted sums
    3 -> 16, forward                          1.7    0.7   product with patches of x
    3 -> 16, gradient of x                    1.6    0.9   product, shifted sums

On CPU a depthwise convolution is a sum of shifted images. Milliseconds for batch 16,
28 x 28 x 96, 3x3, at stride 1 and, in brackets, at stride 2:

    forward                          26.5 (7.3)   1.1 (0.8)   sum of shifted images
    gradient of x                    26.6 (77)    0.7 (0.7)   its transpose
    both gradients                   82 (88)      22 (3.1)    its transpose

With 16 to 64 channels on both sides, XLA's convolution was 1.2 to 2.5 times faster than
any of these forms, forward and in both gradients.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

_NHWC = ("NHWC", "HWIO", "NHWC")
_NARROW_FORM = ((3, 3), 1, 1, (1, 1), (1, 1))  # size, strides, padding
_NARROW = 4  # a product is faster on CPU up to this many channels on a side


def _on_cpu(here: Callable[..., Any], elsewhere: Callable[..., Any], *operands: Array):
    """Call `here` in a program for CPU, `elsewhere` in one for other platforms.

    The choice is made while lowering: a program that is lowered on a CPU for a TPU has
    the TPU's form.
    """
    return jax.lax.platform_dependent(*operands, cpu=here, default=elsewhere)


def lax_conv(
    x: Array,
    kernel: Array,
    stride: int = 1,
    *,
    pad: int | None = None,
    dilation: int = 1,
    groups: int = 1,
) -> Array:
    """Compute XLA's convolution; `dilation` puts zeros into x, `pad` None is k // 2."""
    pad = kernel.shape[0] // 2 if pad is None else pad
    return jax.lax.conv_general_dilated(
        x,
        kernel,
        (stride, stride),
        ((pad, pad), (pad, pad)),
        lhs_dilation=(dilation, dilation),
        dimension_numbers=_NHWC,
        feature_group_count=groups,
    )


def conv(x: Array, kernel: Array, stride: int = 1, groups: int = 1) -> Array:
    """Convolve x [B, H, W, in] with a kernel, with padding k // 2.

    The kernel is [k, k, in / groups, out]. Each group of output channels reads its own
    share of the input channels; groups = in = out is depthwise.
    """
    if groups > 1:
        if groups == x.shape[-1] == kernel.shape[-1]:
            pad = kernel.shape[0] // 2
            window = _Window((stride, stride), ((pad, pad), (pad, pad)))
            return _depthwise_conv(x, kernel, window)
        return lax_conv(x, kernel, stride, groups=groups)
    size, _, channels, features = kernel.shape
    if (size, stride) == (3, 1) and min(channels, features) <= _NARROW:
        return _narrow_conv(x, kernel)
    return lax_conv(x, kernel, stride)


def _transposed(kernel: Array) -> Array:
    """Make the kernel of the gradient of x: taps reversed, in and out swapped."""
    return kernel[::-1, ::-1].swapaxes(2, 3)


def _patches(x: Array, size: int, stride: int = 1) -> Array:
    """Collect the patch that each output pixel reads, [B, h, w, size * size * C].

    x is padded by 1.
    """
    padded = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    height, width = (n + 2 - size + 1 for n in x.shape[1:3])
    taps = [
        padded[:, i : i + height : stride, j : j + width : stride]
        for i in range(size)
        for j in range(size)
    ]
    return jnp.concatenate(taps, -1)


def _pixels(x: Array) -> Array:
    """Reshape [B, H, W, C] to a matrix with a row per pixel."""
    return x.reshape(-1, x.shape[-1])


def _patches_first(x: Array, kernel: Array) -> Array:
    """Convolve 3x3 as one product with patches of x, for few channels in."""
    return _patches(x, 3) @ kernel.reshape(-1, kernel.shape[-1])


def _product_first(x: Array, kernel: Array) -> Array:
    """Convolve 3x3 as one product and nine shifts, for few channels out."""
    height, width, channels = x.shape[1:]
    by_tap = x @ kernel.transpose(2, 0, 1, 3).reshape(channels, -1)
    padded = jnp.pad(by_tap, ((0, 0), (1, 1), (1, 1), (0, 0)))
    taps = jnp.split(padded, 9, -1)
    total = jnp.zeros((), x.dtype)
    for tap, values in enumerate(taps):
        i, j = divmod(tap, 3)
        total = total + values[:, i : i + height, j : j + width]
    return total


@jax.custom_vjp
def _narrow_conv(x: Array, kernel: Array) -> Array:
    """Convolve 3x3 at stride 1, with few channels in or out."""
    fast = _patches_first if kernel.shape[2] <= _NARROW else _product_first
    return _on_cpu(fast, lax_conv, x, kernel)


def _narrow_forward(x, kernel):
    return _narrow_conv(x, kernel), (x, kernel)


def _narrow_backward(residuals, g):
    x, kernel = residuals
    features = kernel.shape[-1]
    if features <= _NARROW:
        x_bar = lax_conv(g, _transposed(kernel))
        kernel_bar = _on_cpu(_kernel_gradient_by_patches, _kernel_gradient, x, g)
    else:
        x_bar = _on_cpu(_product_first, lax_conv, g, _transposed(kernel))
        kernel_bar = _kernel_gradient(x, g)
    return x_bar, kernel_bar


_narrow_conv.defvjp(_narrow_forward, _narrow_backward)


def _kernel_gradient(x: Array, g: Array) -> Array:
    """Compute XLA's gradient of a 3x3 kernel."""
    shape = jax.ShapeDtypeStruct((3, 3, x.shape[-1], g.shape[-1]), x.dtype)
    (kernel_bar,) = jax.linear_transpose(lambda kernel: lax_conv(x, kernel), shape)(g)
    return kernel_bar


def _kernel_gradient_by_patches(x: Array, g: Array) -> Array:
    """Compute `_kernel_gradient` as one product with patches of g, for few outputs."""
    products = _pixels(x).T @ _pixels(_patches(g, 3))
    by_tap = products.reshape(x.shape[-1], 3, 3, -1)[:, ::-1, ::-1]
    return by_tap.transpose(1, 2, 0, 3)


class _Window(NamedTuple):
    """The strides and the padding of a depthwise convolution, in height and width.

    Attributes:
      strides: pixels of the image between output pixels.
      padding: pixels before and after the image.
    """

    strides: tuple[int, int]
    padding: tuple[tuple[int, int], tuple[int, int]]


def _shifted_sum(x: Array, kernel: Array, window: _Window) -> Array:
    """Convolve depthwise as a sum of shifted images, scaled for each channel."""
    (down, right), padding = window
    padded = jax.lax.pad(
        x, jnp.zeros((), x.dtype), [(0, 0, 0), *((*p, 0) for p in padding), (0, 0, 0)]
    )
    batch, height, width, channels = padded.shape
    rows, columns = (
        stride * ((n - k) // stride) + 1
        for n, k, stride in zip(
            (height, width), kernel.shape, window.strides, strict=False
        )
    )
    total = jnp.zeros((), x.dtype)
    for i in range(kernel.shape[0]):
        for j in range(kernel.shape[1]):
            begin, end = (0, i, j, 0), (batch, i + rows, j + columns, channels)
            tap = jax.lax.slice(padded, begin, end, (1, down, right, 1))
            total = total + tap * jax.lax.broadcast_to_rank(kernel[i, j, 0], tap.ndim)
    return total


def _grouped_conv(x: Array, kernel: Array, window: _Window) -> Array:
    return jax.lax.conv_general_dilated(
        x,
        kernel,
        window.strides,
        window.padding,
        dimension_numbers=_NHWC,
        feature_group_count=x.shape[-1],
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _depthwise_conv(x: Array, kernel: Array, window: _Window) -> Array:
    """Convolve each channel with a filter of its own."""
    here, elsewhere = (
        functools.partial(form, window=window) for form in (_shifted_sum, _grouped_conv)
    )
    return _on_cpu(here, elsewhere, x, kernel)


def _depthwise_forward(x, kernel, window):
    return _depthwise_conv(x, kernel, window), (x, kernel)


def _depthwise_backward(window, residuals, g):
    x, kernel = residuals

    def of_x(form):
        return lambda kernel, g: jax.linear_transpose(
            lambda x: form(x, kernel, window), x
        )(g)[0]

    def of_kernel(form):
        return lambda x, g: jax.linear_transpose(
            lambda kernel: form(x, kernel, window), kernel
        )(g)[0]

    x_bar = _on_cpu(of_x(_shifted_sum), of_x(_grouped_conv), kernel, g)
    kernel_bar = _on_cpu(of_kernel(_shifted_sum), of_kernel(_grouped_conv), x, g)
    return x_bar, kernel_bar


_depthwise_conv.defvjp(_depthwise_forward, _depthwise_backward)


def convolve(params: Mapping[str, Any], x: Array, kernel: Array) -> Array:
    """Compute a convolution of any network in the form that is fastest where it runs.

    Depthwise convolutions of any layout, strides and padding have a form of their own,
    and so have 3x3 convolutions of any layout with few channels in or out, at stride 1
    with padding 1. All others are XLA's.

    Args:
      params: the parameters of a `jax.lax.conv_general_dilated` equation.
      x: the images, in the layout of the parameters.
      kernel: the kernel, in the layout of the parameters.
    """
    numbers = params["dimension_numbers"]
    channels, features = x.shape[numbers.lhs_spec[1]], kernel.shape[numbers.rhs_spec[0]]
    groups, pads = params["feature_group_count"], params["padding"]
    plain = (
        x.ndim == 4
        and {*params["lhs_dilation"], *params["rhs_dilation"]} == {1}
        and params["batch_group_count"] == 1
        and params["preferred_element_type"] in (None, x.dtype)
        and min(min(pair) for pair in pads) >= 0
    )
    size = tuple(kernel.shape[axis] for axis in numbers.rhs_spec[2:])
    form: Callable[..., Array] | None = None
    if plain and groups > 1 and groups == channels == features:
        strides = params["window_strides"]
        window = _Window(tuple(strides), (tuple(pads[0]), tuple(pads[1])))
        form = functools.partial(_depthwise_conv, window=window)
    is_narrow = plain and groups == 1 and min(channels, features) <= _NARROW
    if is_narrow and (size, *params["window_strides"], *pads) == _NARROW_FORM:
        form = _narrow_conv
    if form is None:
        return jax.lax.conv_general_dilated_p.bind(x, kernel, **params)
    # The forms take NHWC and HWIO.
    y = form(
        x.transpose(_last(numbers.lhs_spec)),
        kernel.transpose(*numbers.rhs_spec[2:], *numbers.rhs_spec[1::-1]),
    )
    return y.transpose(np.argsort(_last(numbers.out_spec)))


def _last(spec: Sequence[int]) -> tuple[int, ...]:
    """Reorder a spec of the axes N, C, H, W to N, H, W, C."""
    return spec[0], *spec[2:], spec[1]


def _spread(kernel: Array) -> Array:
    """Sum a 3x3 kernel over the copies of a pixel: -> [4, 4, in, out]."""
    edges = ((1, 1), (1, 1), (0, 0), (0, 0))
    padded = jnp.pad(kernel, edges)
    return padded[:-1, :-1] + padded[1:, :-1] + padded[:-1, 1:] + padded[1:, 1:]


@jax.custom_vjp
def upsample_conv(x: Array, kernel: Array) -> Array:
    """Upsample x by 2 (nearest neighbour), then convolve it 3x3 with padding 1.

    Upsampling makes a block of 2x2 copies of each pixel of x. So a pixel of x reaches
    4x4 output pixels, and the next pixel reaches those two further on. This is a
    transposed convolution at stride 2, whose 4x4 kernel sums the 3x3 taps over the
    copies. The result is the same sum, with 2.25 times fewer multiplications.

    Args:
      x: [B, H, W, in].
      kernel: [3, 3, in, out].

    Returns:
      [B, 2H, 2W, out].
    """
    return lax_conv(x, _spread(kernel), pad=2, dilation=2)


def _upsample_forward(x, kernel):
    return upsample_conv(x, kernel), (x, kernel)


def _upsample_backward(residuals, g):
    x, kernel = residuals
    x_bar = lax_conv(g, _transposed(_spread(kernel)), 2, pad=1)
    spread_bar = _on_cpu(_spread_gradient_by_patches, _spread_gradient, x, g)
    (kernel_bar,) = jax.linear_transpose(_spread, kernel)(spread_bar)
    return x_bar, kernel_bar


upsample_conv.defvjp(_upsample_forward, _upsample_backward)


def _spread_gradient(x: Array, g: Array) -> Array:
    """Compute XLA's gradient of the 4x4 kernel."""
    shape = jax.ShapeDtypeStruct((4, 4, x.shape[-1], g.shape[-1]), x.dtype)
    (spread_bar,) = jax.linear_transpose(
        lambda spread: lax_conv(x, spread, pad=2, dilation=2), shape
    )(g)
    return spread_bar


def _spread_gradient_by_patches(x: Array, g: Array) -> Array:
    """Compute `_spread_gradient` by one product with patches of g."""
    products = _pixels(x).T @ _pixels(_patches(g, 4, 2))
    by_tap = products.reshape(x.shape[-1], 4, 4, -1)[:, ::-1, ::-1]
    return by_tap.transpose(1, 2, 0, 3)
