"""The quantized network as a file: `quantized.safetensors`, and back.

The file is plain safetensors: 8 bytes with the length n of the header, little-endian;
n bytes of JSON with the type, shape and [begin, end) of every tensor, offsets from the
header's end; the tensors' bytes, little-endian, row-major. Tensors:

    <kernel>.codes        U8   packed codes, see below
    <kernel>.scale        F32  [out], units per code
    <kernel>.zero_point   F32  [out], integral
    <activation>.range    F32  [2], lo and hi of an activation
    anything else         F32  biases, batch-norm scale, bias, mean and var

A kernel has the name of its variable, the path in the network's tree joined by dots.
An activation has the name '<first kernel that reads it>:input'. A kernel of k bits has
codes u in [0, 2^k - 1] that stand for (u - zero_point) * scale, per output channel. It
is stored in the shape in which its convolution or product reads it. The metadata has
this shape and the output axes ([H, W, in, out] and [3] for Flax's convolutions); with
several output axes, out is the product of their lengths. Codes are written k bits each,
least significant bit first, in row-major order, without gaps; zero bits fill the last
byte.

The header's metadata has the single key `adadfq_jax`: a JSON object with
format_version, model, num_classes, image_shape, mean, std, weight_bits, act_bits,
first_last_bits, places ('nonlinearities' or 'all': where activations are quantized),
layout (of the images that the network's own function takes), layer_bits (k by name, for
the kernels and activations whose bits are not weight_bits or act_bits), and kernels
(shape and out_axes by name). For a network that is not of this package, the key
`variables` has the shape and the type of every variable by name, and its path if the
variables are a tree of dictionaries and lists. For a network that came as an ONNX file,
the key `onnx` has its graph without weights, see `network.onnx_network`. The file has
nothing else, so that the same network gives the same bytes.

Older files are read, too. Files of format_version 2 name an activation after a module.
Files of format_version 1 do so as well, and store 2^(k-1) - zero_point instead of the
zero point.
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
from adadfq_jax.network import (
    PLACES,
    Function,
    Graph,
    as_function,
    kernels,
    onnx_network,
    tree_of,
)
from adadfq_jax.runtime import invocation, sharding
from adadfq_jax.teacher import LoadedNetwork, safetensors_file

FORMAT_VERSION = 3
READABLE_VERSIONS = (1, 2, 3)
METADATA_KEY = "adadfq_jax"

# Networks whose name in files is another: TensorFlow's form of EfficientNet-Lite had
# the plain name before PyTorch's was known.
NAMES_IN_FILES = {
    "tf_efficientnet_lite0": "efficientnet_lite0",
    "efficientnet_lite0": "efficientnet_lite0 (symmetric)",
}
_NAMES_HERE = {there: here for here, there in NAMES_IN_FILES.items()}

MOST_PIXELS = 8192  # along a side
MOST_CHANNELS = 1024
MOST_CLASSES = 10**6
MOST_ZERO_POINT = 2.0**53  # it is large in a channel whose values are all equal


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
    symmetric: bool = False,
    integers: Mapping[str, quant.Integers] | None = None,
) -> QuantizedNetwork:
    """Make the quantized network, with codes for kernels, from trained parameters.

    Args:
      teacher: P, on the host.
      parameters: Q's parameters, by name.
      ranges: Q's activation ranges, as the game has them.
      info: the network's description.
      function: the network.
      graph: the network's graph.
      range_ema: how the ranges are read, see `quant.read_range`.
      symmetric: whether kernels have symmetric ranges, see `quant.kernel_range`.
      integers: the kernels by name, if they are integers already; None means that the
        kernels among the parameters are rounded.
    """
    variables = {**teacher.variables, **parameters}
    bits_of = info.bits_by_name(graph)
    own = jax.jit(kernels, static_argnums=0)(graph, variables)
    tensors = {name: np.asarray(variables[name]) for name in graph.beside_kernels}
    for entry in graph.kernels:
        name, bits = entry.name, bits_of[entry.name]
        if integers is None:
            ratio = teacher.clip_ratios.get(name)
            found = quant.kernel_integers(
                own[name], bits, ratio, entry.out_axes, symmetric
            )
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
    """Return the content of the network's file, equal bytes for equal networks."""
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
    if is_of_package(network.info, network.function):
        header["model"] = NAMES_IN_FILES.get(header["model"], header["model"])
    else:
        header["variables"] = _variable_table(network.function)
    if network.function.definition is not None:
        header["onnx"] = network.function.definition
    # One key, because safetensors writes several keys in a varying order.
    metadata = {METADATA_KEY: json.dumps(header, sort_keys=True)}
    return safetensors.numpy.save(tensors, metadata)


def _variable_table(function: Function) -> dict[str, Any]:
    """Return shape, type and path of every variable; a random key has no path."""
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
    """Tell whether a file, damaged or not, has a quantized network's metadata."""
    try:
        with safetensors.safe_open(path, "numpy") as file:
            return METADATA_KEY in (file.metadata() or {})
    except (safetensors.SafetensorError, OSError):
        return False


_READ_ERRORS = (
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
    """Read a quantized network from its file, as a function of images.

    Args:
      path: a `quantized.safetensors` of format version 1, 2 or 3.
      network: the network that `quantize` was given; needed if it is code that is not
        of this package.
      variables: the variables that `quantize` was given, or others of the same shapes;
        needed if they are not a tree of dictionaries and lists.

    Returns:
      A function of images [B, H, W, C] in normalised space, (pixels / 255 - mean) /
      std, that gives logits [B, num_classes]. Its attributes are `weight_bits`,
      `act_bits`, `ranges` (lo and hi by activation), `kernels`, `num_classes`,
      `image_shape`, `mean`, `std`, `variables` and `path`.

    Raises:
      InputError: the file is missing, damaged or not of this format.
    """
    path = Path(path).expanduser()
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
        if version >= 3:
            info = _with_layer_bits(info, header["layer_bits"], graph)
        if version < 3:
            tensors = _with_names_of_today(tensors, graph)
        found = _to_network(tensors, info, function, graph, version)
        _check_shapes(header["kernels"], graph, version)
        return dataclasses.replace(found, path=path)
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
    except _READ_ERRORS as error:
        raise InputError(
            f"{path}: not a quantized network ({short(repr(error), 300)})"
        ) from error


def _function(
    info: NetworkInfo, header: Mapping[str, Any], network: Any, variables: Any
) -> Function:
    """Return the original network of a file, with the shapes of its variables."""
    if isinstance(network, LoadedNetwork):
        network = network.function
    if isinstance(network, Function):
        return network.of_shapes()
    declared = header.get("variables", {})
    is_tree = declared and all("path" in one for one in declared.values())
    shapes = {}
    if is_tree or "onnx" in header:
        shapes = {
            name: jax.ShapeDtypeStruct(tuple(one["shape"]), np.dtype(one["dtype"]))
            for name, one in declared.items()
        }
    if network is None:
        if "onnx" in header:
            return onnx_network.from_json(header["onnx"]).function(shapes)
        return function_of(info)
    if variables is None and is_tree:
        paths = {name: one["path"] for name, one in declared.items()}
        variables = tree_of(shapes, paths)
    return as_function(network, variables).of_shapes()


def _with_names_of_today(
    tensors: Mapping[str, np.ndarray], graph: Graph
) -> dict[str, np.ndarray]:
    """Rename the ranges of an older file, which are named after quantizer modules.

    Such a module follows the kernels whose names begin as its own does: 'init_quant'
    follows 'init_block.conv.kernel', 'stage1_unit1.quant' all kernels of the unit. The
    last of these kernels therefore gives the order of the ranges.
    """
    names = [entry.name for entry in graph.kernels]

    def order(range_name: str) -> int:
        stem = range_name.removesuffix("quant.range").removesuffix("_")
        at = [i for i, name in enumerate(names) if name.startswith(stem)]
        if not at:
            raise InputError(f"{short(range_name)}: the network has no such module")
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
        _whole_number(size, "image_shape", 1, most)
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
        model=_NAMES_HERE.get(header["model"], header["model"]),
        num_classes=_whole_number(
            header["num_classes"], "num_classes", 1, MOST_CLASSES
        ),
        image_shape=tuple(shape),
        mean=mean,
        std=std,
        weight_bits=_whole_number(header["weight_bits"], "weight_bits", 2, 8),
        act_bits=_whole_number(header["act_bits"], "act_bits", 2, 8),
        first_last_bits=own and _whole_number(own, "first_last_bits", 2, 8),
        places=places,
        layout=layout,
    )


def _with_layer_bits(
    info: NetworkInfo, own: Mapping[str, Any], graph: Graph
) -> NetworkInfo:
    """Add bits by name, which are checked, to the description."""
    known = info.bits_by_name(graph)
    for name, bits in own.items():
        if name not in known:
            raise InputError(f"layer_bits: the network has no {short(name)}")
        _whole_number(bits, f"layer_bits of {name}", 2, 8)
    if not info.first_last_bits:
        return info.mixed(own)
    if known != info.mixed(own).bits_by_name(graph):
        raise InputError("layer_bits are not of the first and the last layer")
    return info


def _whole_number(value: Any, what: str, least: int, most: int) -> int:
    if type(value) is not int or not least <= value <= most:
        found = short(json.dumps(value), 40)
        raise InputError(f"{what} {found}: must be a whole number, {least} to {most}")
    return value


def _numbers(header: Mapping[str, Any], key: str, count: int) -> tuple[float, ...]:
    """Read the finite numbers of a key, one per channel."""
    values = header[key]
    if len(values) != count or not all(
        type(x) in (int, float) and math.isfinite(x) for x in values
    ):
        found = short(json.dumps(values), 60)
        raise InputError(f"{key} {found}: must be {count} numbers, one per channel")
    return tuple(map(float, values))


def _check_shapes(declared: Any, graph: Graph, version: int) -> None:
    """Refuse a header whose `kernels` are not the network's kernels."""
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


# By the kind of a tensor: a condition on its numbers, and the condition in words.
_RULES: dict[str, tuple[Callable[[np.ndarray], Any], str]] = {
    "scale": (lambda x: x > 0, "above 0"),
    "zero_point": (
        lambda x: (x == np.rint(x)) & (np.abs(x) <= MOST_ZERO_POINT),
        "whole numbers of at most 2^53 in size",
    ),
    "range": (lambda x: x[0] <= x[1], "lo and hi, lo no more than hi"),
    "var": (lambda x: x >= 0, "0 or more, as variances are"),
}


def _check_numbers(name: str, array: np.ndarray, kind: str = "") -> None:
    """Refuse numbers that are not finite or break the rule of `kind` in `_RULES`."""
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
    """Build the network from its tensors; refuse missing, wrong and unknown ones."""
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
        if version == 1:  # it stores 2^(k-1) - zero_point
            zero_point = 2.0 ** (bits - 1) - zero_point.astype(np.float64)
        codes_of[name] = Kernel(codes, scale, zero_point, bits, entry.out_axes)
        with np.errstate(over="ignore"):  # `_check_numbers` refuses an overflow
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
