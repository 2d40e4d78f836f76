"""The quantized network as a file: `quantized.safetensors`, and back.

The file is plain safetensors: 8 bytes with the length n of the header, little-endian;
n bytes of JSON with the type, shape and [begin, end) of every tensor, offsets from the
header's end; the tensors' bytes, little-endian, row-major. Tensors:

    <kernel>.codes        U8   packed codes, see below
    <kernel>.scale        F32  [out], units per code
    <kernel>.zero_point   F32  [out], integral
    <activation>.range    F32  [2], lo and hi of an activation
    anything else         F32  biases, batch-norm scale, bias, mean and var

A kernel has the name of its variable, the path in the network's tree joined by dots,
and an activation '<first kernel that reads it>:input'. A kernel of k bits has codes u
in [0, 2^k - 1] and stands for (u - zero_point) * scale, per output channel. It is
written as its convolution or product reads it, in the shape and with the output axes
that the metadata tells ([H, W, in, out] and [3] of Flax's convolutions); where there
are several output axes, [out] has their product. Codes are written k bits each, least
significant bit first, in row-major order, without gaps; zero bits fill the last byte.

The header's metadata has the single key `adadfq_jax`: a JSON object with
format_version, model, num_classes, image_shape, mean, std, weight_bits, act_bits,
first_last_bits, places ('nonlinearities' or 'all': where activations are quantized),
layout (of the images that the network's own function takes), layer_bits (k by the names
of the kernels and activations that it is not weight_bits or act_bits of), and kernels
(by name, shape and out_axes). Of a network that is none of this package's, variables
has the shape, the type and, in a tree of dictionaries and lists, the path of every
variable by name. Nothing else is in the file: the same network gives the same bytes.

Files of before are read: those of format_version 2 name an activation after a module,
those of 1 have 2^(k-1) - zero_point in the place of the zero point besides.
"""

import dataclasses
import functools
import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

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
    function_of,
    graph_of,
    is_of_package,
)
from adadfq_jax.errors import InputError, short
from adadfq_jax.game import QVariables, Teacher
from adadfq_jax.network import PLACES, Function, Graph, as_function, kernels, tree_of
from adadfq_jax.runtime import invocation, sharding
from adadfq_jax.teacher import safetensors_file

FORMAT_VERSION = 3
READABLE_VERSIONS = (1, 2, 3)
METADATA_KEY = "adadfq_jax"

MOST_PIXELS = 8192  # along a side
MOST_CHANNELS = 1024
MOST_CLASSES = 10**6
MOST_ZERO_POINT = 2.0**53  # that of a channel whose values are all the same is large


@functools.partial(jax.jit, static_argnums=1)
def _read_ranges(states, range_ema: str):
    return [jnp.stack(quant.read_range(state, range_ema)) for state in states]


def freeze(
    teacher: Teacher,
    parameters: Mapping[str, jax.Array],
    ranges: Mapping[str, quant.RangeState],
    *,
    info: NetworkInfo,
    function: Function,
    graph: Graph,
    range_ema: str,
    integers: Mapping[str, quant.Integers] | None = None,
) -> QuantizedNetwork:
    """Makes the quantized network of what was trained: codes instead of floats.

    Args:
      teacher: P, on the host.
      parameters: Q's, by name.
      ranges: Q's activation ranges, as the game has them.
      info: the network's description.
      function: the network.
      graph: of it.
      range_ema: how the ranges are read, see `quant.read_range`.
      integers: the kernels, by name, where they are integers already; None rounds them.
    """
    variables = {**teacher.variables, **parameters}
    bits_of = info.bits_by_name(graph)
    own = jax.jit(kernels, static_argnums=0)(graph, variables)
    tensors = {name: np.asarray(variables[name]) for name in graph.beside_kernels}
    for entry in graph.kernels:
        name, bits = entry.name, bits_of[entry.name]
        if integers is None:
            ratio = teacher.clip_ratios.get(name)
            found = quant.kernel_integers(own[name], bits, ratio, entry.out_axes)
        else:
            found = integers[name]
        tensors |= _kernel_tensors(name, Kernel(*found, bits, entry.out_axes))
    names = [entry.name for entry in graph.activations]
    bounds = _read_ranges([ranges[name] for name in names], range_ema)
    for name, value in zip(names, sharding.fetch(bounds), strict=True):
        tensors[f"{name}.range"] = value
    return _to_network(tensors, info, function.of_shapes(), graph)


def _kernel_tensors(name: str, kernel: Kernel) -> dict[str, np.ndarray]:
    return {
        f"{name}.codes": pack_codes(kernel.codes, kernel.bits),
        f"{name}.scale": np.asarray(kernel.scale, np.float32),
        f"{name}.zero_point": np.asarray(kernel.zero_point, np.float32),
    }


def to_bytes(network: QuantizedNetwork) -> bytes:
    """The content of the network's file; the same network gives the same bytes."""
    tensors = {n: np.asarray(x) for n, x in network.variables.variables.items()}
    for name, kernel in network.kernels.items():
        tensors |= _kernel_tensors(name, kernel)
    for name, bounds in network.ranges.items():
        tensors[f"{name}.range"] = np.asarray(bounds, np.float32)
    header = {
        "format_version": FORMAT_VERSION,
        **described(network.info, network.graph),
        "kernels": {
            entry.name: {"shape": entry.shape, "out_axes": entry.out_axes}
            for entry in network.graph.kernels
        },
    }
    if not is_of_package(network.info, network.function):
        header["variables"] = _tree(network.function)
    # One key: safetensors writes several in an order that changes.
    metadata = {METADATA_KEY: json.dumps(header, sort_keys=True)}
    return safetensors.numpy.save(tensors, metadata)


def _tree(function: Function) -> dict[str, Any]:
    """Shape, type and path of every variable, as JSON values; a key has no path."""
    paths = {
        name: path
        for name, path in (function.paths or {}).items()
        if not jax.dtypes.issubdtype(
            function.variables[name].dtype, jax.dtypes.prng_key
        )
    }
    return {
        name: {
            "shape": leaf.shape,
            "dtype": str(leaf.dtype),
            **({"path": paths[name]} if name in paths else {}),
        }
        for name, leaf in function.variables.items()
    }


def is_quantized(path: Path) -> bool:
    """Whether a file says that it is a quantized network; it may still be damaged."""
    try:
        with safetensors.safe_open(path, "numpy") as file:
            return METADATA_KEY in (file.metadata() or {})
    except (safetensors.SafetensorError, OSError):
        return False


_UNREADABLE = (
    LookupError,
    AttributeError,
    TypeError,
    ValueError,
    ArithmeticError,
    RecursionError,
    OSError,
)


def load_quantized(
    path: str | Path, network: Any = None, variables: Any = None
) -> QuantizedNetwork:
    """Reads a quantized network from its file, as a function of images.

    Args:
      path: a `quantized.safetensors`, of this version or of format version 1 or 2.
      network: what `quantize` was given, where it is none of this package.
      variables: that it was given with it, or others of their shapes; needed of a
        function whose variables are no tree of dictionaries and lists.

    Returns:
      A callable on images [B, H, W, C] in normalised space, (pixels / 255 - mean) /
      std, that gives logits [B, num_classes]; with `weight_bits`, `act_bits`, `ranges`
      (lo and hi by activation), `kernels`, `num_classes`, `image_shape`, `mean`, `std`,
      `variables` and `path`.

    Raises:
      InputError: the file is missing, damaged or not of this format.
    """
    path = Path(path)
    if not path.is_file():
        what = "it is a folder" if path.is_dir() else "no such file"
        raise InputError(f"{path}: {what}")
    if not is_quantized(path):
        raise InputError(
            f"{path}: no quantized network of this package; a file of P in full"
            " precision is to be quantized first, as"
            f" {invocation.mode('inspect')} --file={path} says"
        )
    try:
        tensors, metadata = safetensors_file.read(path)
        header = json.loads(metadata[METADATA_KEY])
        version = header["format_version"]
        if version not in READABLE_VERSIONS:
            raise InputError(
                f"format version {version}, this package reads"
                f" {', '.join(map(str, READABLE_VERSIONS))}"
            )
        info = _read_info(header)
        function = _function(info, header, network, variables)
        graph = graph_of(info, function)
        if version < 3:
            tensors = _with_names_of_today(tensors, graph)
        elif header["layer_bits"] != described(info, graph)["layer_bits"]:
            raise InputError("layer_bits are not of the first and the last layer")
        found = _to_network(tensors, info, function, graph, version)
        _check_shapes(header["kernels"], graph, version)
        return dataclasses.replace(found, path=path)
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
    except _UNREADABLE as error:
        raise InputError(
            f"{path}: not a quantized network ({short(repr(error), 300)})"
        ) from error


def _function(
    info: NetworkInfo, header: Mapping[str, Any], network: Any, variables: Any
) -> Function:
    """The network that a file is of, with the shapes of its variables."""
    if network is None:
        return function_of(info)
    if isinstance(network, Function):
        return network.of_shapes()
    declared = header.get("variables", {})
    is_tree = declared and all("path" in one for one in declared.values())
    if variables is None and is_tree:
        shapes = {
            name: jax.ShapeDtypeStruct(tuple(one["shape"]), np.dtype(one["dtype"]))
            for name, one in declared.items()
        }
        paths = {name: one["path"] for name, one in declared.items()}
        variables = tree_of(shapes, paths)
    return as_function(network, variables).of_shapes()


def _with_names_of_today(
    tensors: Mapping[str, np.ndarray], graph: Graph
) -> dict[str, np.ndarray]:
    """Tensors of a file of before, whose ranges have the names of quantizer modules.

    Such a module follows the kernels whose names begin as its own does ('init_quant'
    and 'init_block.conv.kernel'; 'stage1_unit1.quant' and all of the unit), so that the
    last of them gives the order of the ranges.
    """
    names = [entry.name for entry in graph.kernels]

    def order(range_name: str) -> int:
        stem = range_name.removesuffix("quant.range").removesuffix("_")
        at = [i for i, name in enumerate(names) if name.startswith(stem)]
        if not at:
            raise InputError(f"{short(range_name)} is of no module of the network")
        return at[-1]

    old = sorted((n for n in tensors if n.endswith(".range")), key=order)
    if len(old) != len(graph.activations):
        raise InputError(
            f"{len(old)} ranges, the network has {len(graph.activations)} activations"
        )
    today = dict(zip(old, (f"{a.name}.range" for a in graph.activations), strict=True))
    return {today.get(name, name): tensor for name, tensor in tensors.items()}


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
    places = header.get("places", PLACES[0])
    layout = header.get("layout", "NHWC")
    if places not in list(PLACES) or layout not in ["NHWC", "NCHW"]:
        raise InputError(f"places {short(str(places))}, layout {short(str(layout))}")
    return NetworkInfo(
        model=header["model"],
        num_classes=_whole(header["num_classes"], "num_classes", 1, MOST_CLASSES),
        image_shape=tuple(shape),
        mean=mean,
        std=std,
        weight_bits=_whole(header["weight_bits"], "weight_bits", 2, 8),
        act_bits=_whole(header["act_bits"], "act_bits", 2, 8),
        first_last_bits=own and _whole(own, "first_last_bits", 2, 8),
        places=places,
        layout=layout,
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


def _check_shapes(declared: Any, graph: Graph, version: int) -> None:
    """Refuses a header whose `kernels` are not the network's."""
    shapes: dict[str, Any] = {k.name: list(k.shape) for k in graph.kernels}
    if version >= 3:
        shapes = {
            k.name: {"shape": list(k.shape), "out_axes": list(k.out_axes)}
            for k in graph.kernels
        }
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
    function: Function,
    graph: Graph,
    version: int = FORMAT_VERSION,
) -> QuantizedNetwork:
    """Fills what the network needs; whatever does not fit is refused."""
    left, bits_of = dict(tensors), info.bits_by_name(graph)

    def take(
        name: str, shape: tuple[int, ...], kind: str = "", dtype: Any = np.float32
    ) -> np.ndarray:
        tensor = left.pop(name, None)
        if tensor is None or tensor.shape != shape or tensor.dtype != dtype:
            found = "nothing" if tensor is None else f"{tensor.dtype} {tensor.shape}"
            raise InputError(f"{name}: {found} instead of {np.dtype(dtype)} {shape}")
        _check_numbers(name, tensor, kind)
        return tensor

    codes_of: dict[str, Kernel] = {}
    real: dict[str, Any] = {}
    for entry in graph.kernels:
        name, bits = entry.name, bits_of[entry.name]
        size = -(-math.prod(entry.shape) * bits // 8)
        channels = math.prod(entry.shape[axis] for axis in entry.out_axes)
        packed = take(f"{name}.codes", (size,), "codes", np.uint8)
        scale, zero_point = (
            take(f"{name}.{what}", (channels,), what)
            for what in ("scale", "zero_point")
        )
        codes = unpack_codes(packed, entry.shape, bits)
        if version == 1:  # signed codes, and what is added to them
            zero_point = 2.0 ** (bits - 1) - zero_point.astype(np.float64)
        codes_of[name] = Kernel(codes, scale, zero_point, bits, entry.out_axes)
        with np.errstate(over="ignore"):  # refused
            real[name] = codes_of[name].dequantize()
        _check_numbers(name, real[name])
    bounds = {a.name: take(f"{a.name}.range", (2,), "range") for a in graph.activations}
    variances = {norm.variables[1] for norm in graph.batch_norms}
    others: dict[str, Any] = {}
    for name in graph.beside_kernels:
        leaf = function.variables[name]
        kind = "var" if name in variances else ""
        others[name] = take(name, leaf.shape, kind, leaf.dtype)
    if left:
        names = ", ".join(map(short, sorted(left)[:5]))
        raise InputError(f"unknown tensors: {names}")
    return QuantizedNetwork(
        info,
        function,
        graph,
        QVariables(
            others,
            real,
            {name: quant.fixed_range(*ends) for name, ends in bounds.items()},
        ),
        codes_of,
        {name: (float(lo), float(hi)) for name, (lo, hi) in bounds.items()},
    )
