"""The quantized network as a file: `quantized.safetensors`, and back.

The file is plain safetensors: 8 bytes with the length n of the header, little-endian;
n bytes of JSON with the type, shape and [begin, end) of every tensor, offsets from the
header's end; the tensors' bytes, little-endian, row-major. Tensors, by the module path
in Flax joined by dots:

    <kernel>.codes        U8   packed codes, see below
    <kernel>.scale        F32  [out], units per code
    <kernel>.zero_point   F32  [out], integral
    <quantizer>.range     F32  [2], lo and hi of an activation
    anything else         F32  biases, batch-norm scale, bias, mean and var

A kernel of k bits has codes u in [0, 2^k - 1] and stands for (u - zero_point) * scale,
per output channel (the last axis). Codes are written k bits each, least significant bit
first, in row-major order of the kernel's shape (convolutions [H, W, in, out], dense
[in, out]), without gaps; zero bits fill the last byte. (Files of format_version 1 have
the same codes, and 2^(k-1) - zero_point in the place of the zero point.)

The header's metadata has the single key `adadfq_jax`: a JSON object with
format_version, model, num_classes, image_shape, mean, std, weight_bits, act_bits and
kernels (the shape of each by name). Where the first and last layer have bits of their
own it has first_last_bits too, and layer_bits: k by the names of the kernels and
quantizers that it is not weight_bits or act_bits of. Nothing else is in the file: the
same network gives the same bytes.
"""

import dataclasses
import functools
import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import flax.errors
import flax.linen as nn
import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy

from adadfq_jax import quant
from adadfq_jax.deploy.codes import Kernel, pack_codes, unpack_codes
from adadfq_jax.deploy.network import (
    NetworkInfo,
    QuantizedNetwork,
    described,
    layer_bits,
    make_student,
)
from adadfq_jax.errors import InputError, short
from adadfq_jax.runtime import sharding
from adadfq_jax.teacher import safetensors_file

FORMAT_VERSION = 2
READABLE_VERSIONS = (1, 2)
METADATA_KEY = "adadfq_jax"

MOST_PIXELS = 8192  # along a side
MOST_CHANNELS = 1024
MOST_CLASSES = 10**6
MOST_ZERO_POINT = 2.0**53  # that of a channel whose values are all the same is large


@functools.partial(jax.jit, static_argnums=1)
def _read_ranges(states, range_ema: str):
    return [jnp.stack(quant.read_range(state, range_ema)) for state in states]


def freeze(
    q_params: Any,
    batch_stats: Any,
    q_ranges: Any,
    *,
    info: NetworkInfo,
    range_ema: str,
    clip_ratios: Mapping[str, jax.Array] = quant.NO_SHRINKS,
    model: nn.Module | None = None,
) -> QuantizedNetwork:
    """Makes the quantized network of what was trained: codes instead of floats.

    Args:
      q_params: Q's parameters, float.
      batch_stats: Q's running statistics, P's as a rule.
      q_ranges: Q's activation ranges, as the game has them.
      info: the network's description.
      range_ema: how the ranges are read, see `quant.read_range`.
      clip_ratios: of the kernels' ranges, see `quant.kernel_shrinks`.
      model: the network from outside the package, or None.
    """
    tensors: dict[str, np.ndarray] = {}
    of_layers = layer_bits(info, model)
    for path, leaf in flax.traverse_util.flatten_dict(q_params, sep=".").items():
        if not path.endswith(".kernel"):
            tensors[path] = np.asarray(leaf)
            continue
        bits = of_layers.get(path, info.weight_bits)
        found = quant.kernel_integers(leaf, bits, clip_ratios.get(path))
        tensors |= _kernel_tensors(path, Kernel(*found, bits))
    for path, leaf in flax.traverse_util.flatten_dict(batch_stats, sep=".").items():
        tensors[path] = np.asarray(leaf)
    ranges = flax.traverse_util.flatten_dict(q_ranges, sep=".")
    values = sharding.fetch(_read_ranges(list(ranges.values()), range_ema))
    tensors.update(zip(ranges, values, strict=True))
    return _to_network(tensors, info, make_student(info, model))


def _kernel_tensors(name: str, kernel: Kernel) -> dict[str, np.ndarray]:
    return {
        f"{name}.codes": pack_codes(kernel.codes, kernel.bits),
        f"{name}.scale": np.asarray(kernel.scale, np.float32),
        f"{name}.zero_point": np.asarray(kernel.zero_point, np.float32),
    }


def to_bytes(network: QuantizedNetwork) -> bytes:
    """The content of the network's file; the same network gives the same bytes."""
    flat = flax.traverse_util.flatten_dict(dict(network.variables))
    tensors: dict[str, np.ndarray] = {}
    for path, leaf in flat.items():
        name = ".".join(path[1:])
        if name in network.kernels:
            tensors |= _kernel_tensors(name, network.kernels[name])
        elif path[0] != "ranges":
            tensors[name] = np.asarray(leaf)
    for name, bounds in network.ranges.items():
        tensors[f"{name}.range"] = np.asarray(bounds, np.float32)
    header = {
        "format_version": FORMAT_VERSION,
        **described(network.info, network.module),
        "kernels": {n: list(k.codes.shape) for n, k in network.kernels.items()},
    }
    # One key: safetensors writes several in an order that changes.
    metadata = {METADATA_KEY: json.dumps(header, sort_keys=True)}
    return safetensors.numpy.save(tensors, metadata)


def is_quantized(path: Path) -> bool:
    """Whether a file says that it is a quantized network; it may still be damaged."""
    try:
        with safetensors.safe_open(path, "numpy") as file:
            return METADATA_KEY in (file.metadata() or {})
    except (safetensors.SafetensorError, OSError):
        return False


_UNREADABLE = (
    flax.errors.FlaxError,
    LookupError,
    TypeError,
    ValueError,
    ArithmeticError,
    RecursionError,
    OSError,
)


def load_quantized(
    path: str | Path, model: nn.Module | None = None
) -> QuantizedNetwork:
    """Reads a quantized network from its file, as a function of images.

    Args:
      path: a `quantized.safetensors`, of this version or of format version 1.
      model: the Flax module that it is of, where that is none of this package.

    Returns:
      A callable on images [B, H, W, C] in normalised space, (pixels / 255 - mean) /
      std, that gives logits [B, num_classes]; with `weight_bits`, `act_bits`, `ranges`
      (lo and hi by activation quantizer), `kernels`, `num_classes`, `image_shape`,
      `mean`, `std`, `variables` and `path`.

    Raises:
      InputError: the file is missing, damaged or not of this format.
    """
    if model is not None and not isinstance(model, nn.Module):
        raise InputError(
            f"model: {type(model).__name__} is no flax.linen.Module; of a network of"
            " this package leave it out"
        )
    path = Path(path)
    if not path.is_file():
        what = "it is a folder" if path.is_dir() else "no such file"
        raise InputError(f"{path}: {what}")
    if not is_quantized(path):
        raise InputError(
            f"{path}: no quantized network of this package; a file of P in full"
            f" precision is to be quantized first, as --mode=inspect --file={path} says"
        )
    try:
        tensors, metadata = safetensors_file.read(path)
        header = json.loads(metadata[METADATA_KEY])
        version = header["format_version"]
        if version not in READABLE_VERSIONS:
            raise InputError(
                f"format version {version}, this package reads"
                f" {' and '.join(map(str, READABLE_VERSIONS))}"
            )
        info = _read_info(header)
        if header.get("layer_bits", {}) != layer_bits(info, model):
            raise InputError("layer_bits are not of the first and the last layer")
        module = make_student(info, model)
        network = _to_network(tensors, info, module, version)
        _check_shapes(header["kernels"], network.kernels)
        return dataclasses.replace(network, path=path)
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
    except _UNREADABLE as error:
        raise InputError(
            f"{path}: not a quantized network ({short(repr(error), 300)})"
        ) from error


def _read_info(header: Mapping[str, Any]) -> NetworkInfo:
    shape = [
        _whole(size, "image_shape", 1, most)
        for size, most in zip(
            header["image_shape"],
            (MOST_PIXELS, MOST_PIXELS, MOST_CHANNELS),
            strict=True,
        )
    ]
    mean, std = (_numbers(header, key, shape[2]) for key in ("mean", "std"))
    if min(std) <= 0:
        raise InputError(f"std {std}: must be above 0")
    if not isinstance(header["model"], str):
        raise InputError("model: must be a name")
    own = header.get("first_last_bits", 0)
    return NetworkInfo(
        model=header["model"],
        num_classes=_whole(header["num_classes"], "num_classes", 1, MOST_CLASSES),
        image_shape=tuple(shape),
        mean=mean,
        std=std,
        weight_bits=_whole(header["weight_bits"], "weight_bits", 2, 8),
        act_bits=_whole(header["act_bits"], "act_bits", 2, 8),
        first_last_bits=own and _whole(own, "first_last_bits", 2, 8),
    )


def _whole(value: Any, what: str, least: int, most: int) -> int:
    if type(value) is not int or not least <= value <= most:
        found = short(json.dumps(value), 40)
        raise InputError(f"{what} {found}: must be a whole number, {least} to {most}")
    return value


def _numbers(header: Mapping[str, Any], key: str, count: int) -> tuple[float, ...]:
    """The finite numbers of a key, one per channel."""
    values = header[key]
    if len(values) != count or not all(
        type(x) in (int, float) and math.isfinite(x) for x in values
    ):
        found = short(json.dumps(values), 60)
        raise InputError(f"{key} {found}: must be {count} numbers, one per channel")
    return tuple(map(float, values))


def _check_shapes(declared: Any, kernels: Mapping[str, Kernel]) -> None:
    """Refuses a header whose `kernels` are not the network's."""
    shapes = {name: list(kernel.codes.shape) for name, kernel in kernels.items()}
    if declared == shapes:
        return
    if not isinstance(declared, dict):
        raise InputError("kernels must be shapes by name")
    wrong = [n for n in {**shapes, **declared} if declared.get(n) != shapes.get(n)]
    name = wrong[0]
    raise InputError(
        f"kernels: {short(name)} is {short(json.dumps(declared.get(name)), 60)}, the"
        f" network's is {shapes.get(name)}"
    )


# What the tensors of a kind are.
_RULES: dict[str, tuple[Callable[[np.ndarray], Any], str]] = {
    "scale": (lambda x: x > 0, "above 0"),
    "zero_point": (
        lambda x: (x == np.rint(x)) & (np.abs(x) <= MOST_ZERO_POINT),
        "whole numbers, and not beyond any",
    ),
    "range": (lambda x: x[0] <= x[1], "lo and hi, lo no more than hi"),
    "var": (lambda x: x >= 0, "0 or more, as variances are"),
}


def _check_numbers(name: str, array: np.ndarray, kind: str = "") -> None:
    """Refuses numbers that no network of this package has; kind: of `_RULES`."""
    if not np.all(np.isfinite(array)):
        raise InputError(f"{name} has numbers that are not finite")
    holds, must_be = _RULES.get(kind, (np.isfinite, ""))
    if not np.all(holds(array)):
        raise InputError(f"{name} must be {must_be}")


def _to_network(
    tensors: Mapping[str, np.ndarray],
    info: NetworkInfo,
    module: nn.Module,
    version: int = FORMAT_VERSION,
) -> QuantizedNetwork:
    """Fills the tree that the network has; whatever does not fit is refused."""
    image = jax.ShapeDtypeStruct((1, *info.image_shape), np.float32)
    shapes = jax.eval_shape(module.init, jax.random.key(0), image)
    left, of_layers = dict(tensors), layer_bits(info, module)

    def take(
        name: str, shape: tuple[int, ...], kind: str = "", dtype: Any = np.float32
    ) -> np.ndarray:
        tensor = left.pop(name, None)
        if tensor is None or tensor.shape != shape or tensor.dtype != dtype:
            found = "nothing" if tensor is None else f"{tensor.dtype} {tensor.shape}"
            raise InputError(f"{name}: {found} instead of {np.dtype(dtype)} {shape}")
        _check_numbers(name, tensor, kind)
        return tensor

    leaves: dict[tuple[str, ...], Any] = {}
    kernels, ranges = {}, {}
    for path, expected in flax.traverse_util.flatten_dict(shapes).items():
        collection, name = path[0], ".".join(path[1:])
        if collection == "ranges":
            lo, hi = take(name, (2,), "range")
            leaves[path] = quant.fixed_range(lo, hi)
            ranges[".".join(path[1:-1])] = (float(lo), float(hi))
        elif path[-1] == "kernel":
            shape, bits = expected.shape, of_layers.get(name, info.weight_bits)
            size = -(-math.prod(shape) * bits // 8)
            packed = take(f"{name}.codes", (size,), "codes", np.uint8)
            scale, zero_point = (
                take(f"{name}.{what}", shape[-1:], what)
                for what in ("scale", "zero_point")
            )
            codes = unpack_codes(packed, shape, bits)
            if version == 1:  # signed codes, and what is added to them
                zero_point = 2.0 ** (bits - 1) - zero_point.astype(np.float64)
            kernels[name] = Kernel(codes, scale, zero_point, bits)
            with np.errstate(over="ignore"):  # refused
                leaves[path] = kernels[name].dequantize()
            _check_numbers(name, leaves[path])
        else:
            is_var = collection == "batch_stats" and path[-1] == "var"
            leaves[path] = take(name, expected.shape, "var" if is_var else "")
    if left:
        names = ", ".join(map(short, sorted(left)[:5]))
        raise InputError(f"unknown tensors: {names}")
    variables = flax.traverse_util.unflatten_dict(leaves)
    return QuantizedNetwork(info, module, variables, kernels, ranges)
