"""Measures other forms of 3x3 convolutions on CPU beside XLA's own.

    PYTHONPATH=. JAX_PLATFORMS=cpu .venv/bin/python tests/tools/measure_convolutions.py

The shapes are those of reconstruction's blocks and of G: height and width, channels in
and out, stride 1. A row has the milliseconds of XLA's convolution and, for each other
form, its time as a share of that, in one run: below 1 the form is faster. Each form is
measured forward, and with the gradients of the images and of the kernel.

    patches    a product with the patches that the output pixels read
    nine       nine products, one for each tap, of shifted images, summed
    winograd   F(2x2, 3x3): sixteen products for four output pixels (Lavin and Gray,
               2016, arXiv 1509.09308)

All forms are compared with XLA's before they are measured.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from adadfq_jax.models.convolution import lax_conv

SHAPES = {  # height, channels in, channels out, images
    "ResNet on CIFAR, stage 1": (32, 16, 16, 32),
    "ResNet on CIFAR, stage 2": (16, 32, 32, 32),
    "ResNet on CIFAR, stage 3": (8, 64, 64, 32),
    "near G at 32 x 32": (32, 128, 64, 16),
    "near G at 16 x 16": (16, 128, 128, 16),
    "near G at 224 x 224": (224, 64, 64, 1),
    "ResNet-18, stage 1": (56, 64, 64, 8),
    "ResNet-18, stage 2": (28, 128, 128, 8),
    "ResNet-18, stage 3": (14, 256, 256, 8),
    "ResNet-18, stage 4": (7, 512, 512, 8),
}


def _shifted(x: Array) -> list[Array]:
    height, width = x.shape[1:3]
    padded = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    return [
        padded[:, i : i + height, j : j + width] for i in range(3) for j in range(3)
    ]


def patches(x: Array, kernel: Array) -> Array:
    """Convolve as one product with patches."""
    return jnp.concatenate(_shifted(x), -1) @ kernel.reshape(-1, kernel.shape[-1])


def nine(x: Array, kernel: Array) -> Array:
    """Convolve as a sum of nine products."""
    taps = kernel.reshape(9, *kernel.shape[2:])
    return sum(view @ tap for view, tap in zip(_shifted(x), taps, strict=True))


# The matrices of F(2x2, 3x3): of the kernel, of a 4x4 tile, and of its 2x2 output.
_OF_KERNEL = np.array(
    [[1, 0, 0], [0.5, 0.5, 0.5], [0.5, -0.5, 0.5], [0, 0, 1]], np.float32
)
_OF_TILE = np.array(
    [[1, 0, -1, 0], [0, 1, 1, 0], [0, -1, 1, 0], [0, 1, 0, -1]], np.float32
)
_OF_OUTPUT = np.array([[1, 1, 1, 0], [0, 1, -1, -1]], np.float32)


def winograd(x: Array, kernel: Array) -> Array:
    """Convolve by Winograd's F(2x2, 3x3)."""
    images, height, width, channels = x.shape
    rows, columns = -(-height // 2), -(-width // 2)
    ends = (2 * rows - height + 1, 2 * columns - width + 1)
    padded = jnp.pad(x, ((0, 0), (1, ends[0]), (1, ends[1]), (0, 0)))
    tiles = jnp.stack(
        [
            jnp.stack(
                [
                    padded[:, i : i + 2 * rows : 2, j : j + 2 * columns : 2]
                    for j in range(4)
                ]
            )
            for i in range(4)
        ]
    )  # [4, 4, B, rows, columns, C]
    tiles = jnp.einsum("ai,bj,ijnrcx->abnrcx", _OF_TILE, _OF_TILE, tiles)
    taps = jnp.einsum("ai,bj,ijxy->abxy", _OF_KERNEL, _OF_KERNEL, kernel)
    flat = tiles.reshape(16, -1, channels) @ taps.reshape(16, channels, -1)
    flat = flat.reshape(4, 4, images, rows, columns, -1)
    out = jnp.einsum("ai,bj,ijnrcy->nracby", _OF_OUTPUT, _OF_OUTPUT, flat)
    return out.reshape(images, 2 * rows, 2 * columns, -1)[:, :height, :width]


FORMS = {"patches": patches, "nine": nine, "winograd": winograd}


def _passes(form: Callable[[Array, Array], Array]) -> dict[str, Callable]:
    """Return the form's three passes as functions of (x, kernel, g)."""
    return {
        "forward": lambda x, kernel, g: form(x, kernel),
        "of images": lambda x, kernel, g: jax.vjp(lambda y: form(y, kernel), x)[1](g),
        "of kernel": lambda x, kernel, g: jax.vjp(lambda k: form(x, k), kernel)[1](g),
    }


def measure(shape: tuple[int, int, int, int], rounds: int) -> dict[str, list[float]]:
    """Return, for each pass, XLA's milliseconds and the shares of the other forms."""
    size, channels, features, images = shape
    rng = np.random.default_rng(0)
    operands = [
        jnp.asarray(rng.normal(size=of).astype(np.float32))
        for of in (
            (images, size, size, channels),
            (3, 3, channels, features),
            (images, size, size, features),
        )
    ]
    found = {}
    forms = {"xla": lax_conv, **FORMS}
    compiled: dict[str, dict[str, Callable]] = {
        name: {key: jax.jit(each) for key, each in _passes(form).items()}
        for name, form in forms.items()
    }
    for key in compiled["xla"]:
        ours = compiled["xla"][key](*operands)
        for name in FORMS:
            for a, b in zip(
                jax.tree.leaves(ours),
                jax.tree.leaves(compiled[name][key](*operands)),
                strict=True,
            ):
                np.testing.assert_allclose(a, b, atol=1e-3 * float(jnp.abs(a).max()))
        times: dict[str, list[float]] = {name: [] for name in forms}
        for _ in range(rounds):
            for name in forms:  # in turn, so that a slow moment meets all
                begin = time.perf_counter()
                jax.block_until_ready(compiled[name][key](*operands))
                times[name].append(1000 * (time.perf_counter() - begin))
        medians = {name: statistics.median(each) for name, each in times.items()}
        found[key] = [medians["xla"], *(medians[n] / medians["xla"] for n in FORMS)]
    return found


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=15)
    rounds = parser.parse_args().rounds
    print(f"| convolution | pass | XLA, ms | {' | '.join(FORMS)} |")
    print("|---" * (3 + len(FORMS)) + "|")
    for name, shape in SHAPES.items():
        for key, (milliseconds, *shares) in measure(shape, rounds).items():
            cells = " | ".join(f"{share:.1f}" for share in shares)
            print(f"| {name} | {key} | {milliseconds:.1f} | {cells} |", flush=True)


if __name__ == "__main__":
    main()
