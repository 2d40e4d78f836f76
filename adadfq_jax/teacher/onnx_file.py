"""Reading an ONNX file of P: its graph as JAX can run it, and its weights.

The graph is run once on shapes. What does not depend on the image or the weights is
computed on the way, in numpy: the arithmetic on shapes with which exporters surround a
Reshape. What remains is a `network.onnx_network.OnnxGraph`, which is right for any
number of images, whether the file has an open batch or a fixed one.

A file is a claim: everything in it is checked before it is used, and nothing in it is
executed.
"""

import dataclasses
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from adadfq_jax.errors import InputError, first_line, short
from adadfq_jax.network.onnx_network import (
    MOST_NODES,
    Node,
    OnnxGraph,
    attributes_of,
    compute,
)
from adadfq_jax.network.onnx_operators import (
    EITHER,
    FOLDED,
    OPERATORS,
    STATIC,
    bounded,
)
from adadfq_jax.network.trace import TRACED_BATCHES, batches_beside
from adadfq_jax.runtime import extras

OPSETS = range(11, 26)
MOST_SIDE = 8192  # pixels along a side of an image
MOST_FOLDED = 2**24  # numbers of all arrays that are computed while reading
PASSED_ON = ("Cast", "CastLike", "Dropout", "Identity")
SEQUENCES = frozenset(
    ("ConcatFromSequence", "SequenceAt", "SequenceConstruct", "SplitToSequence")
)
# Every operator that is read.
NAMES = sorted(
    {*OPERATORS, *FOLDED, *PASSED_ON, *SEQUENCES, "Constant", "Shape", "Size"}
)
_QUANTIZED = re.compile(r"QuantizeLinear|DequantizeLinear|QLinear\w+|\w+Integer")
# Inputs that are weights even if they are a single number.
_WEIGHTS = {
    "BatchNormalization": slice(1, 5),
    "Conv": slice(1, 3),
    "Gemm": slice(1, 3),
    "LayerNormalization": slice(1, 3),
    "MatMul": slice(0, 2),
    "PRelu": slice(1, 2),
}


@dataclasses.dataclass(frozen=True)
class OnnxContent:
    """What an ONNX file holds.

    Attributes:
      graph: the network without its weights.
      variables: the weights, float32, by name.
      image_shape: (H, W, channels).
      num_classes: length of the logits.
      opset: version of the operators.
      notes: remarks for the user.
    """

    graph: OnnxGraph
    variables: dict[str, np.ndarray]
    image_shape: tuple[int, int, int]
    num_classes: int
    opset: int
    notes: tuple[str, ...]


def is_onnx(path: Path) -> bool:
    """Tell whether a file is ONNX by its name, or starts as every exporter's does."""
    if path.suffix.lower() == ".onnx":
        return True
    with path.open("rb") as file:
        start = file.read(3)
    # The version of the format, in 1 to 32, then another field of the model.
    return (
        len(start) == 3
        and start[0] == 0x08
        and 1 <= start[1] <= 32
        and start[2] in (0x12, 0x1A, 0x22, 0x2A, 0x32, 0x3A, 0x42)
    )


def read(path: Path, image_shape: Sequence[int] | None = None) -> OnnxContent:
    """Read the network of an ONNX file.

    Args:
      path: the file.
      image_shape: (H, W, channels), for a file whose images may have any size.

    Raises:
      InputError: the file is damaged, or holds a network that cannot be read. The
        message does not contain the path.
    """
    if not extras.are_installed("onnx"):
        raise extras.missing("an ONNX file", "onnx", "onnx")
    import onnx  # here: it is an optional extra
    from google.protobuf.message import DecodeError

    model = onnx.ModelProto()
    try:
        model.ParseFromString(path.read_bytes())
    except (DecodeError, RecursionError, ValueError) as error:
        raise InputError(
            f"not an ONNX file, or a truncated one ({short(str(error), 200)})"
        ) from error
    if not model.graph.node or not model.graph.output:
        raise InputError("not an ONNX file, or one without a network")
    if len(model.graph.node) > MOST_NODES:
        raise InputError(
            f"it has {len(model.graph.node):,} nodes; at most {MOST_NODES:,} are read"
        )
    if not all(isinstance(text, str) for text in _texts(model)):
        raise InputError("a damaged ONNX file: a name in it is not UTF-8")
    return _Reader(model, path.parent).read(image_shape)


def _texts(model: Any) -> Iterator[Any]:
    """Yield every text of a model that is read; a text that is not UTF-8 is bytes."""
    graph = model.graph
    yield from (opset.domain for opset in model.opset_import)
    yield from (value.name for value in (*graph.input, *graph.output))
    tensors = list(graph.initializer)
    for node in graph.node:
        yield from (node.name, node.op_type, node.domain, *node.input, *node.output)
        yield from (attribute.name for attribute in node.attribute)
        tensors += [x.t for x in node.attribute]
    for tensor in tensors:
        yield tensor.name
        yield from (x for e in tensor.external_data for x in (e.key, e.value))


def _opset(model: Any) -> int:
    opsets = [x.version for x in model.opset_import if x.domain in ("", "ai.onnx")]
    if len(opsets) != 1 or opsets[0] not in OPSETS:
        raise InputError(
            f"opset {', '.join(map(str, opsets)) or 'of no version'}: opsets"
            f" {OPSETS[0]} to {OPSETS[-1]} are read; export it again with"
            " opset_version=18"
        )
    return opsets[0]


class _Reader:
    """The walk over a file's nodes.

    A value is a numpy array, computed from constants alone; a tracer of JAX, computed
    from weights or images; or a list of names, a sequence. Labels are the names of the
    tracers in the graph that is built.
    """

    def __init__(self, model: Any, folder: Path):
        from adadfq_jax.teacher.onnx_weights import Tensors

        self._model, self._tensors = model, Tensors(folder)
        self._opset = _opset(model)
        self._labels: dict[str, str] = {}
        self._taken: set[str] = set()
        self._values: dict[str, Any] = {}
        self._nodes: list[Node] = []
        self._extra: dict[str, np.ndarray] = {}  # weights that were computed
        self._biased: set[str] = set()  # outputs of convolutions with a bias
        self._folded = 0
        self._batch: int | None = None  # the file's own number of images, if fixed
        self._traced = TRACED_BATCHES[0]  # number of images in the walk

    def read(self, image_shape: Sequence[int] | None) -> OnnxContent:
        graph = self._model.graph
        constants = {t.name: self._tensors.read(t) for t in graph.initializer}
        constants |= self._constant_nodes()
        inputs = [value for value in graph.input if value.name not in constants]
        if len(inputs) != 1:
            names = ", ".join(short(value.name) for value in inputs[:5])
            raise InputError(f"it has {len(inputs)} inputs ({names}), not one: images")
        shape, layout = self._image(inputs[0], image_shape)
        image = self._label(inputs[0].name)
        slots = {
            name
            for node in graph.node
            for name in list(node.input)[_WEIGHTS.get(node.op_type, slice(0))]
        }
        static = {
            name
            for node in graph.node
            for place, name in enumerate(node.input)
            if place in STATIC.get(node.op_type, ())
        }
        weights = {
            self._label(name): array
            for name, array in constants.items()
            if array.dtype == np.float32
            and (array.size > 1 or name in slots)
            and name not in static
        }
        for name, array in constants.items():
            if self._labels.get(name) not in weights:
                self._values[name] = array
        one = shape if layout == "NHWC" else (shape[2], *shape[:2])
        self._traced = batches_beside([one, *(x.shape for x in constants.values())])[0]
        images = jax.ShapeDtypeStruct((self._traced, *one), np.float32)
        shapes = {n: jax.ShapeDtypeStruct(x.shape, x.dtype) for n, x in weights.items()}

        def walk(variables: Mapping[str, Any], images: Any) -> Any:
            self._values[inputs[0].name] = images
            for name, label in self._labels.items():
                if label in variables:
                    self._values[name] = variables[label]
            for node in graph.node:
                self._node(node)
            return self._output([value.name for value in graph.output])

        logits = jax.eval_shape(walk, shapes, images)
        last, notes = self._end(logits.shape)
        nodes = _needed(self._nodes, last)
        notes = (*notes, *self._partly_folded(nodes))
        built = OnnxGraph(image, layout, last, nodes)
        variables = {
            name: array
            for name, array in {**weights, **self._extra}.items()
            if name in built.reads
        }
        classes = int(np.prod(logits.shape[1:]))
        self._check(built, variables, shape, classes)
        return OnnxContent(built, variables, shape, classes, self._opset, notes)

    # Names, inputs and outputs.

    def _label(self, name: str) -> str:
        """Give a name of the file a name in the graph: printable, short and unique."""
        plain = re.sub(r"[^\w./:+-]", "_", name)[-120:] or "tensor"
        label, count = plain, 1
        while label in self._taken:
            count += 1
            label = f"{plain}_{count}"
        self._taken.add(label)
        self._labels[name] = label
        return label

    def _constant_nodes(self) -> dict[str, np.ndarray]:
        """Read the values of the Constant nodes, by the names of their outputs."""
        from onnx import AttributeProto

        found = {}
        for node in self._model.graph.node:
            if node.op_type != "Constant" or node.domain not in ("", "ai.onnx"):
                continue
            kinds = [
                (a.name, AttributeProto.AttributeType.Name(a.type))
                for a in node.attribute
            ]
            if len(kinds) != 1 or kinds[0] not in _CONSTANTS or len(node.output) != 1:
                raise InputError(f"{_name_of(node)}: its value cannot be read")
            value, dtype = _attribute(node.attribute[0]), _CONSTANTS[kinds[0]]
            found[node.output[0]] = (
                np.asarray(value, dtype) if dtype else self._tensors.read(value)
            )
        return found

    def _image(
        self, value: Any, given: Sequence[int] | None
    ) -> tuple[tuple[int, int, int], str]:
        """Return (H, W, channels) and the layout of the images."""
        from onnx import TensorProto

        from adadfq_jax.teacher.onnx_weights import FLOATS

        kind, name = value.type.tensor_type, short(value.name)
        if kind.elem_type not in FLOATS:
            types = {number: kind for kind, number in TensorProto.DataType.items()}
            raise InputError(
                f"its input {name} is of type {types.get(kind.elem_type, 'unknown')};"
                " it must be normalised images of floating-point numbers"
            )
        sizes = [x.dim_value if x.dim_value > 0 else 0 for x in kind.shape.dim]
        if len(sizes) != 4:
            raise InputError(
                f"its input {name} has {len(sizes)} axes, not the four of images"
            )
        batch, *one = sizes
        self._batch = batch or None
        last = one[2] in range(1, 5) and one[0] not in range(1, 5)
        layout = "NHWC" if last else "NCHW"
        shape = tuple(one) if last else (one[1], one[2], one[0])
        if given is not None:
            if len(given) != 3:
                raise InputError(f"image_shape={given}: must be (H, W, channels)")
            own = shape
            shape = tuple(map(int, given))
            if any(
                known not in (0, size) for known, size in zip(own, shape, strict=True)
            ):
                raise InputError(
                    f"image_shape={shape}: the images of the network are {own}, where"
                    " 0 is open",
                    "image_shape",
                )
        if not all(shape):
            raise InputError(
                f"its images have no fixed size ({sizes[1:]}, where 0 is open): give"
                " image_shape=(H, W, channels)",
                "image_shape",
            )
        if max(shape) > MOST_SIDE:
            raise InputError(f"images of {shape}: at most {MOST_SIDE} along a side")
        return (shape[0], shape[1], shape[2]), layout

    def _output(self, names: Sequence[str]) -> Any:
        if len(names) != 1:
            some = ", ".join(map(short, names[:5]))
            raise InputError(f"it has {len(names)} outputs ({some}); export the logits")
        value = self._values.get(names[0])
        if not isinstance(value, jax.Array):
            raise InputError(f"its output {short(names[0])} is computed by no node")
        return value

    def _end(self, shape: tuple[int, ...]) -> tuple[str, tuple[str, ...]]:
        """Return the name of the logits, with a final softmax cut off, and notes."""
        last, notes = self._labels[self._model.graph.output[0].name], tuple[str, ...]()
        producers = {name: node for node in self._nodes for name in node.outputs}
        ends = producers.get(last)
        if (
            ends is not None
            and ends.operator in ("Softmax", "LogSoftmax")
            and ends.attributes.get("axis", -1) in (-1, 1)
        ):
            last = str(ends.inputs[0])
            notes = (f"a final {ends.operator} was cut off: the losses are on logits",)
        if shape[:1] != (self._traced,) or math.prod(shape[1:]) not in shape[1:]:
            sizes = ", ".join("batch" if n == self._traced else str(n) for n in shape)
            raise InputError(f"its output is [{sizes}], not logits [batch, classes]")
        if len(shape) > 2:
            flat = self._label("logits")
            self._nodes.append(Node("Flatten", (last,), (flat,), {}))
            last = flat
        return last, notes

    def _partly_folded(self, nodes: Sequence[Node]) -> Iterator[str]:
        """Yield a note if only some of the batch norms seem to be in the file."""
        norms = [n.inputs[0] for n in nodes if n.operator == "BatchNormalization"]
        convs = [n.outputs[0] for n in nodes if n.operator == "Conv"]
        alone = self._biased & {*convs} - {*norms}
        if norms and alone:
            yield (
                f"{len(alone)} of {len(convs)} convolutions have a bias and no batch"
                " norm behind them: if the exporter folded theirs, export again as the"
                " guide 'Your checkpoint' says"
            )

    def _check(
        self,
        graph: OnnxGraph,
        variables: Mapping[str, np.ndarray],
        shape: tuple[int, ...],
        classes: int,
    ) -> None:
        """Run the graph on the shapes of a smaller and of a larger batch."""
        shapes = {
            k: jax.ShapeDtypeStruct(x.shape, x.dtype) for k, x in variables.items()
        }
        apply = graph.function(shapes).apply
        for batch in (3, self._traced + 1):
            images = jax.ShapeDtypeStruct((batch, *shape), np.float32)
            try:
                found = jax.eval_shape(apply, shapes, images).shape
            except InputError as error:
                found = str(error)
            if found != (batch, classes):
                raise InputError(
                    "its number of images is part of the network; export it with an"
                    f" open batch ({found})"
                )

    # Nodes.

    def _node(self, node: Any) -> None:
        node_name = _name_of(node)
        if node.domain not in ("", "ai.onnx") or node.op_type not in NAMES:
            name = f"{node.domain}::{node.op_type}" if node.domain else node.op_type
            if _QUANTIZED.fullmatch(node.op_type):
                raise InputError(f"{node_name}: the network is quantized already")
            raise InputError(
                f"{node_name}: the operator {short(name)} is not read; the guide 'Your"
                " checkpoint' lists those that are"
            )
        if node.op_type == "Constant":
            return
        for name in node.output:
            if name and name in self._values:
                raise InputError(f"{node_name}: {short(name)} is computed twice")
        for name in node.input:
            if name and name not in self._values:
                raise InputError(
                    f"{node_name}: no node before it computes its input {short(name)}"
                )
        try:
            attributes = {a.name: _attribute(a) for a in node.attribute}
            if node.op_type == "Shape":
                x = self._values[node.input[0]]
                ends = attributes.get("start", 0), attributes.get("end")
                self._set(node.output[0], np.asarray(x.shape[slice(*ends)], np.int64))
            elif node.op_type == "Size":
                x = self._values[node.input[0]]
                self._set(node.output[0], np.asarray(math.prod(x.shape), np.int64))
            elif node.op_type in PASSED_ON:
                self._pass_on(node, attributes)
            elif node.op_type in SEQUENCES:
                self._sequence(node, attributes)
            else:
                self._operation(node, attributes)
        except InputError as error:
            raise InputError(f"{node_name}: {error}") from error
        except Exception as error:  # whatever numpy and jax.numpy raise
            what = str(error) if type(error) is ValueError else first_line(error)
            what = short(" ".join(what.split()), 300)
            raise InputError(f"{node_name}: {what}") from error

    def _set(self, name: str, value: Any, label: str = "") -> None:
        if isinstance(value, np.ndarray):
            self._folded += value.size
            if self._folded > MOST_FOLDED:
                raise InputError("too many numbers are computed from constants")
        self._values[name] = value
        if label:
            self._labels[name] = label

    def _pass_on(self, node: Any, attributes: Mapping[str, Any]) -> None:
        """Give a value another name; types are those of JAX, float32 or whole."""
        value = self._values[node.input[0]]
        if node.op_type in ("Cast", "CastLike"):
            if node.op_type == "Cast":
                from onnx import helper

                dtype = np.dtype(helper.tensor_dtype_to_np_dtype(attributes["to"]))
            else:
                dtype = np.dtype(self._values[node.input[1]].dtype)
            # Types such as bfloat16 are of kind 'V'.
            kind = {"b": np.bool_, "i": np.int64, "u": np.int64}.get(
                dtype.kind, np.float32
            )
            if isinstance(value, np.ndarray):
                value = value.astype(kind)
            elif kind != np.float32:
                raise InputError("a conversion of a tensor to whole numbers")
        self._set(node.output[0], value, self._labels.get(node.input[0], ""))

    def _sequence(self, node: Any, attributes: dict[str, Any]) -> None:
        values = [self._values[name] for name in node.input]
        (output,) = node.output
        if node.op_type == "SequenceConstruct":
            self._values[output] = list(node.input)
        elif node.op_type == "SequenceAt":
            name = values[0][int(values[1])]
            self._set(output, self._values[name], self._labels.get(name, ""))
        elif node.op_type == "ConcatFromSequence":
            if attributes.pop("new_axis", 0):
                raise InputError("new_axis=1 is not read")
            self._record("Concat", values[0], [output], attributes)
        else:
            axis = attributes.get("axis", 0)
            length = values[0].shape[axis]
            given = np.asarray(values[1] if len(values) > 1 else 1)
            sizes = given.tolist()
            if given.ndim == 0:
                size = max(int(given), 1)
                sizes = [min(size, length - at) for at in range(0, length, size)]
            if len(sizes) > MOST_NODES or not attributes.get("keepdims", 1):
                raise InputError("a sequence of so many parts, or without the axis")
            parts = [f"{output}.{i}" for i in range(len(sizes))]
            split = {"axis": axis, "split": [int(size) for size in sizes]}
            self._record("Split", [node.input[0]], parts, split)
            self._values[output] = parts

    def _operation(self, node: Any, attributes: dict[str, Any]) -> None:
        names, static = list(node.input), STATIC.get(node.op_type, {})
        axis = attributes.get("axis", 0)
        if node.op_type == "Gather" and self._takes_all(axis, *names):
            shape = list(self._values[names[1]].shape)
            self._record("Reshape", names[:1], list(node.output), {"shape": shape})
            return
        for place, attribute in static.items():
            if place >= len(names) or not names[place]:
                continue
            value = self._values[names[place]]
            if not isinstance(value, np.ndarray):
                raise InputError(f"its {attribute} is not a constant")
            attributes[attribute] = value.tolist()
        names = [name for place, name in enumerate(names) if place not in static]
        if node.op_type == "Resize":
            attributes = self._without_batch(self._values[names[0]], attributes)
        if node.op_type in ("Softmax", "LogSoftmax") and self._opset < 13:
            attributes = {"axis": attributes.get("axis", 1), "flattened": 1}
        if node.op_type == "Split" and not {"split", "num_outputs"} & {*attributes}:
            attributes["num_outputs"] = len(node.output)
        if node.op_type == "ConstantOfShape" and "value" in attributes:
            value = self._tensors.read(attributes["value"])
            attributes["value"] = value.reshape(()).item()
        self._record(node.op_type, names, list(node.output), attributes)

    def _record(
        self,
        operator: str,
        names: Sequence[str],
        outputs: Sequence[str],
        attributes: dict[str, Any],
    ) -> None:
        """Compute a node on shapes, or on constants, and add it to the graph."""
        function = OPERATORS.get(operator) or FOLDED[operator]
        unknown = attributes.keys() - attributes_of(function)
        if unknown:
            raise InputError(f"its attribute {short(min(unknown))} is not read")
        inputs = [self._values[name] if name else None for name in names]
        if not any(isinstance(x, jax.Array) for x in inputs):
            self._fold(operator, inputs, outputs, attributes)
            return
        if operator not in OPERATORS:
            raise InputError("it is read only where it computes with constants")
        bias = inputs[2] if operator in ("Conv", "Gemm") and len(inputs) == 3 else None
        if isinstance(bias, np.ndarray) and not bias.any():  # as torch.export writes it
            names, inputs = names[:2], inputs[:2]
        x: Any = inputs[0]
        if operator == "Squeeze" and attributes.get("axes") is None:
            # Without axes it would drop a batch of one image, too.
            axes = [axis for axis, size in enumerate(x.shape) if size == 1]
            attributes["axes"] = axes
        if operator == "Reshape":
            attributes["shape"] = self._for_any_batch(x, attributes["shape"])
        if operator == "Expand" and self._is_fixed(x, attributes["shape"]):
            attributes["shape"] = [1, *attributes["shape"][1:]]
        found = compute(operator, inputs, attributes)
        same = operator in ("Reshape", "Expand") and found[0].shape == x.shape
        if same and names[0] in self._labels:
            self._set(outputs[0], x, self._labels[names[0]])
            return
        if operator == "Reshape":
            attributes = {"shape": self._portable(x.shape, found[0].shape)}
        elif operator == "Expand":
            own = (1,) * (found[0].ndim - x.ndim) + x.shape
            sizes = zip(found[0].shape, own, strict=True)
            attributes["shape"] = [1 if size == had else size for size, had in sizes]
        operands = tuple(
            self._operand(name, value)
            for name, value in zip(names, inputs, strict=True)
        )
        labels = [self._label(name) if name else "" for name in outputs[: len(found)]]
        for name, value, label in zip(outputs, found, labels, strict=False):
            if name:
                self._set(name, value, label)
        if operator == "Conv" and len(inputs) == 3 and found[0][0, 0].size > 1:
            self._biased.add(labels[0])
        self._nodes.append(Node(operator, operands, tuple(labels), attributes))

    def _fold(
        self,
        operator: str,
        inputs: Sequence[Any],
        outputs: Sequence[str],
        attributes: Mapping[str, Any],
    ) -> None:
        if operator not in EITHER and operator not in FOLDED:
            raise InputError("it does not depend on the image")
        arrays = [x for x in inputs if x is not None]
        bounded([sum(x.size for x in arrays)])
        try:
            bounded(np.broadcast_shapes(*(x.shape for x in arrays)))
        except ValueError as error:
            if "computed from constants" in str(error):
                raise
        function = FOLDED.get(operator) or OPERATORS[operator]
        with np.errstate(all="ignore"):
            found = function(*inputs, **attributes)
        found = found if isinstance(found, tuple | list) else [found]
        for name, value in zip(outputs, found, strict=False):
            array = np.asarray(value)
            bounded(array.shape)
            kinds = {"f": np.float32, "i": np.int64, "u": np.int64}
            self._set(name, array.astype(kinds.get(array.dtype.kind, array.dtype)))

    def _operand(self, name: str, value: Any) -> Any:
        """Return an input of a node of the graph: a name, a number or None."""
        if not isinstance(value, np.ndarray):
            return self._labels[name] if name else None
        if value.size == 1:
            return value.reshape(()).item()
        label = self._labels.get(name) or self._label(name)
        self._extra[label] = value.astype(np.float32)
        return label

    # The batch.

    def _takes_all(self, axis: int, name: str, indices: str) -> bool:
        """Tell whether a Gather takes all of a flat tensor in order: it is a Reshape.

        torch.export writes as_strided so, which ends the pooling of ConvNeXt.
        """
        x, where = self._values[name], self._values[indices]
        if not isinstance(x, jax.Array) or not isinstance(where, np.ndarray):
            return False
        sizes = {x.size, x.size * (self._batch or 0) // self._traced}
        return (
            x.ndim == 1
            and axis in (0, -1)
            and where.size in sizes - {0}
            and np.array_equal(where.ravel(), np.arange(where.size))
        )

    def _without_batch(self, x: Any, attributes: dict[str, Any]) -> dict[str, Any]:
        """Name the axes that a Resize is of, without the first: it is of any size."""
        key = next((k for k in ("sizes", "scales") if attributes.get(k)), "")
        if not key:
            raise InputError("it has neither scales nor sizes")
        axes = attributes.pop("axes", range(x.ndim))
        axes = [axis + x.ndim if axis < 0 else axis for axis in axes]
        if len({*axes} & {*range(x.ndim)}) < len(axes):
            raise InputError("its axes are not different ones of the tensor")
        values = dict(zip(axes, attributes[key], strict=True))
        kept = (x.shape[0], self._batch) if key == "sizes" else (1,)
        if values.pop(0, kept[0]) not in kept:
            raise InputError("it resizes the batch")
        attributes = {
            name: value
            for name, value in attributes.items()
            if name not in ("roi", "scales", "sizes")
        }
        return {**attributes, "axes": list(values), key: list(values.values())}

    def _is_fixed(self, x: Any, shape: Sequence[int]) -> bool:
        """Tell whether a shape holds the file's number of images, for a batch x."""
        return (
            len(shape) > 0
            and self._batch is not None
            and x.shape[:1] == (self._traced,)
            and shape[0] == self._batch
        )

    def _for_any_batch(self, x: Any, shape: Sequence[int]) -> list[int]:
        """Replace the file's number of images in a shape by the traced one."""
        if self._is_fixed(x, shape):
            return [self._traced, *shape[1:]]
        size = math.prod(x.shape)
        if self._batch and min(shape, default=0) > 0:
            parts, rest = divmod(shape[0], self._batch)
            if not rest and math.prod(shape) * self._traced == size * self._batch:
                return [parts * self._traced, *shape[1:]]
        return list(shape)

    def _portable(self, before: Sequence[int], after: Sequence[int]) -> list[int]:
        """Return a Reshape's shape for any batch: 0 is an axis kept, -1 the rest."""
        if before[:1] == after[:1] == (self._traced,):
            return [0, *after[1:]]
        return [-1 if size and size % self._traced == 0 else size for size in after]


def _needed(nodes: Sequence[Node], last: str) -> tuple[Node, ...]:
    """Return the nodes from which the logits are computed, in order."""
    wanted, found = {last}, []
    for node in reversed(nodes):
        if wanted & {*node.outputs}:
            found.append(node)
            wanted |= {name for name in node.inputs if isinstance(name, str)}
    return tuple(reversed(found))


def _name_of(node: Any) -> str:
    name = node.name or ", ".join(node.output)
    return f"node {short(repr(name))} ({short(node.op_type)})"


# Attributes of a Constant that are read, by name and type.
_CONSTANTS = {
    ("value", "TENSOR"): None,
    ("value_float", "FLOAT"): np.float32,
    ("value_floats", "FLOATS"): np.float32,
    ("value_int", "INT"): np.int64,
    ("value_ints", "INTS"): np.int64,
}


def _attribute(attribute: Any) -> Any:
    """Return an attribute as a plain value; a tensor as it is."""
    from onnx import AttributeProto

    kind = attribute.type
    if kind == AttributeProto.FLOAT:
        return attribute.f
    if kind == AttributeProto.INT:
        return attribute.i
    if kind == AttributeProto.STRING:
        return attribute.s.decode("utf-8", "replace")
    if kind == AttributeProto.TENSOR:
        return attribute.t
    if kind == AttributeProto.FLOATS:
        return list(attribute.floats)
    if kind == AttributeProto.INTS:
        return list(attribute.ints)
    raise InputError(f"its attribute {short(attribute.name)} cannot be read")
