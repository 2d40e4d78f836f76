"""ONNX files as P: what they compute, what is kept of them, what is refused."""

import json
import re
from pathlib import Path

import jax
import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

import adadfq_jax
from adadfq_jax import teacher
from adadfq_jax.errors import InputError
from adadfq_jax.network import onnx_network, trace
from adadfq_jax.network.onnx_operators import FOLDED, OPERATORS
from adadfq_jax.teacher import onnx_file
from tests import helpers
from tests.onnx_networks import (
    CLASSES,
    FAMILIES,
    SIZE,
    WITHOUT_BATCH_NORMS,
    Builder,
    images,
)


def saved(model, folder, name="net.onnx"):
    onnx.save(model, folder / name)
    return folder / name


def logits_of(path, x):
    """ONNX Runtime's, one image at a time where the batch is fixed."""
    session = onnxruntime.InferenceSession(path)
    (given,) = session.get_inputs()
    batch = given.shape[0] if isinstance(given.shape[0], int) else len(x)
    x = x if given.shape[3] == 3 else x.transpose(0, 3, 1, 2)
    runs = [session.run(None, {"x": x[i : i + batch]}) for i in range(0, len(x), batch)]
    return np.concatenate([found for (found,) in runs])


def compute(network, x):
    with jax.default_matmul_precision("highest"):
        return np.asarray(jax.jit(network.apply)(network.variables, x))


def read(name, path):
    """A network of a family."""
    return teacher.load_network(path, batch_norms=name not in WITHOUT_BATCH_NORMS)


@pytest.mark.parametrize("batch", [0, 1], ids=["open", "fixed"])
@pytest.mark.parametrize("name", FAMILIES)
def test_logits_are_those_of_onnx_runtime_at_two_batch_sizes(tmp_path, name, batch):
    path = saved(FAMILIES[name](batch), tmp_path)
    network = read(name, path)
    assert (network.name, network.num_classes) == ("net", CLASSES)
    assert network.image_shape == (SIZE, SIZE, 3)
    for count in (1, 3) if batch else (2, 3):
        x = images(count)
        ours, theirs = compute(network, x), logits_of(path, x)
        if name == "keras":
            assert network.notes == (
                "a final Softmax was cut off: the losses are on logits",
            )
            ours = np.asarray(jax.nn.softmax(ours))
        helpers.assert_close(ours, theirs, 1e-5)


# Kernels, activations, batch norms.
FOUND = {
    "resnet": (4, 3, 3),
    "mobilenet_v2": (4, 2, 3),
    "mobilenet_v3": (5, 4, 2),
    "shufflenet": (4, 3, 3),
    "densenet": (4, 3, 3),
    "keras": (2, 1, 1),
    "convnext": (5, 5, 0),
    "feature_pyramid": (5, 4, 4),
}


@pytest.mark.parametrize("name", FOUND)
def test_what_is_quantized_is_found_as_in_any_network(name, tmp_path):
    graph = adadfq_jax.trace(read(name, saved(FAMILIES[name](), tmp_path)))
    found = len(graph.kernels), len(graph.activations), len(graph.batch_norms)
    assert found == FOUND[name]
    assert not {"conv1.bias", "running_mean"} & {*graph.parameters}


@pytest.mark.parametrize("opset", [11, 12, 13, 15, 17, 18, 20, 21, 23, 24, 25])
def test_opsets(tmp_path, opset):
    """One network, where what changed between the opsets is an attribute or input."""
    b = Builder()
    x = b.layer("x", "conv", 3, 8, strides=[2, 2])
    if opset >= 13:
        x = b.node("Split", x, [4, 4], axis=1, outputs=2)[0]
        x = b.node("Unsqueeze", x, [1])
        x = b.node("Squeeze", x, [1])
    else:
        x = b.node("Split", x, axis=1, split=[4, 4], outputs=2)[0]
        x = b.node("Squeeze", b.node("Unsqueeze", x, axes=[1]), axes=[1])
    axes = [2, 3]
    if opset >= 18:
        x = b.node("ReduceMean", x, axes, keepdims=0)
    else:
        x = b.node("ReduceMean", x, axes=axes, keepdims=0)
    model = b.model(b.node("Softmax", b.head(x, 4), axis=1), opset=opset)
    path = saved(model, tmp_path)
    network, x = teacher.load_network(path), images(2)
    assert network.kind == f"ONNX, opset {opset}"
    ours = jax.nn.softmax(compute(network, x))
    if opset <= 24:  # what ONNX Runtime takes
        helpers.assert_close(ours, logits_of(path, x), 1e-5)


SHAPES = {"Shape", "Constant", "Expand", "SequenceAt", "CastLike", "Gather", "Range"}


@pytest.mark.parametrize("name", ["shufflenet", "convnext", "feature_pyramid"])
def test_the_graph_is_kept_without_weights_and_gives_the_same_function(name, tmp_path):
    network = read(name, saved(FAMILIES[name](), tmp_path))
    definition = json.loads(json.dumps(network.function.definition))
    assert not {node[0] for node in definition["nodes"]} & SHAPES
    again = onnx_network.from_json(definition).function(network.function.variables)
    variables = network.function.variables

    @jax.jit
    def both(x):
        return again.apply(variables, x), network.function.apply(variables, x)

    assert np.array_equal(*both(images(2)))


def test_external_data_is_read_from_a_file_beside_it(tmp_path):
    model = FAMILIES["resnet"]()
    inside = teacher.load_network(saved(model, tmp_path, "inside.onnx"))
    path = tmp_path / "net.onnx"
    onnx.save(
        model,
        path,
        save_as_external_data=True,
        location="net.onnx.data",
        size_threshold=0,
    )
    outside = teacher.load_network(path)
    assert (tmp_path / "net.onnx.data").exists()
    for name, array in inside.variables.items():
        assert np.array_equal(array, outside.variables[name])
    (tmp_path / "net.onnx.data").unlink()
    with pytest.raises(InputError, match="not beside the ONNX file"):
        teacher.load_network(path)


def folded():
    """A network whose batch norms are in its convolutions."""
    b = Builder()
    x = b.node("Relu", b.conv("x", "conv", 3, 8, bias=True))
    return b.model(b.pooled(x, 8))


def test_folded_batch_norms_are_refused_with_the_way_to_keep_them(tmp_path):
    path = saved(folded(), tmp_path)
    with pytest.raises(InputError, match="batch_norms=False reads it") as caught:
        teacher.load_network(path)
    for part in ("optimize=False", "external_data=False", "TrainingMode.PRESERVE"):
        assert part in str(caught.value)
    network = teacher.load_network(path, batch_norms=False)
    helpers.assert_close(compute(network, images(2)), logits_of(path, images(2)), 1e-5)


def test_layer_norms_are_not_taken_for_folded_batch_norms(tmp_path):
    path = saved(FAMILIES["convnext"](), tmp_path)
    with pytest.raises(InputError, match="its norms are layer norms") as caught:
        teacher.load_network(path)
    assert "batch_norms=False reads it" in str(caught.value)
    assert "xport" not in str(caught.value)


RESIZED = [
    {"mode": mode, "coordinate_transformation_mode": places, "nearest_mode": rounded}
    for mode, rounded in (
        ("linear", "floor"),
        ("nearest", "floor"),
        ("nearest", "ceil"),
        ("nearest", "round_prefer_floor"),
    )
    for places in ("half_pixel", "pytorch_half_pixel", "align_corners", "asymmetric")
]


def test_every_way_to_resize_is_that_of_onnx_runtime(tmp_path):
    b = Builder()
    x = b.node("Relu", b.norm(b.conv("x", "conv", 3, 2), "norm", 2))
    scales = {
        b.weight(f"scales_{n}", [1, 1, *by]): [int(SIZE * s) for s in by]
        for n, by in enumerate([(2, 3), (1.3, 1), (0.5, 0.3)])
    }
    parts = []
    for how in RESIZED:
        for name, size in scales.items():
            parts.append((b.node("Resize", x, "", name, **how), size))
        for size in ((7, 40), (1, 16)):
            sizes = b.ints([1, 2, *size])
            parts.append((b.node("Resize", x, "", "", sizes, **how), size))
    products = []
    for n, (part, (height, width)) in enumerate(parts):
        shape = (2 * height * width, CLASSES)
        kernel = b.weight(f"kernel_{n}", b.rng.normal(size=shape))
        products.append(b.node("MatMul", b.node("Flatten", part), kernel))
    path = saved(b.model(b.node("Concat", *products, axis=1), 1, out=[400]), tmp_path)
    network, x = teacher.load_network(path), images(1)
    ours, theirs = compute(network, x)[0], logits_of(path, x)[0]
    for n, (part, _) in enumerate(parts):
        logits = slice(CLASSES * n, CLASSES * (n + 1))
        assert part and helpers.deviation(ours[logits], theirs[logits]) < 1e-5, n


def test_axes_to_resize_may_be_counted_from_the_end(tmp_path):
    def graph(**axes):
        change = operator("Resize", "", "value_0", values=[HALF[2:]], **axes)
        path = saved(broken(change), tmp_path)
        return teacher.load_network(path).function.definition

    assert graph(axes=[-2, -1]) == graph(axes=[2, 3])


@pytest.mark.parametrize(
    ("count", "axis", "why"),
    [
        (0, 0, r"its output is \[0, 5\], not logits"),
        (2, 7, r"\(Gather\): "),
        (2, 1, r"\(Gather\): "),
    ],
)
def test_a_gather_that_takes_other_than_all_is_refused(tmp_path, count, axis, why):
    """A Gather of all entries of a flat tensor, in their order, is a Reshape."""
    b = Builder()
    x = b.node("Relu", b.norm(b.conv("x", "conv", 3, 2), "norm", 2))
    x = b.node("Reshape", b.node("GlobalAveragePool", x), b.ints([-1]))
    x = b.node("Gather", x, b.ints(np.arange(count)), axis=axis)
    x = b.node("Reshape", x, b.ints([-1, 2]))
    kernel = b.weight("kernel", b.rng.normal(size=(2, CLASSES)))
    path = saved(b.model(b.node("MatMul", x, kernel), count // 2), tmp_path)
    with pytest.raises(InputError, match=why) as caught:
        teacher.load_network(path)
    assert "\n" not in str(caught.value)


def test_what_looks_like_a_partly_folded_file_is_told(tmp_path):
    """As DenseNet in the default export: some norms stand before their convolutions."""

    def notes(stem_bias, head_bias=False):
        b = Builder()
        x = b.node("Relu", b.conv("x", "conv0", 3, 8, bias=stem_bias))
        x = b.conv(b.node("Relu", b.norm(x, "norm1", 8)), "conv1", 8, 8)
        x = b.node("GlobalAveragePool", b.node("Relu", b.norm(x, "norm2", 8)))
        x = b.conv(x, "head", 8, CLASSES, 1, bias=head_bias)
        return teacher.load_network(saved(b.model(x), tmp_path)).notes

    assert notes(False) == notes(False, head_bias=True) == ()
    (note,) = notes(True)
    assert note.startswith("1 of 3 convolutions have a bias and no batch norm behind")


def test_outputs_that_nothing_reads_may_be_declared(tmp_path):
    b = Builder()
    x = b.layer("x", "conv", 3, 8)
    x, _ = b.node("MaxPool", x, kernel_shape=[2, 2], outputs=2)
    path = saved(b.model(b.pooled(x, 8)), tmp_path)
    ours = compute(teacher.load_network(path), images(2))
    helpers.assert_close(ours, logits_of(path, images(2)), 1e-5)


def test_a_squeeze_of_all_axes_keeps_a_batch_of_one(tmp_path):
    b = Builder()
    x = b.node("GlobalAveragePool", b.layer("x", "conv", 3, 8))
    path = saved(b.model(b.head(b.node("Squeeze", x), 8)), tmp_path)
    network, x = teacher.load_network(path), images(2)
    helpers.assert_close(compute(network, x), logits_of(path, x), 1e-5)
    helpers.assert_close(compute(network, x[:1]), compute(network, x)[:1], 1e-5)


def test_an_axis_of_any_length_is_not_taken_for_the_batch(tmp_path):
    """Before and behind a product over all places of all images."""
    b = Builder()
    x = b.layer("x", "conv", 3, 422, strides=[4, 4])
    x = b.node("Reshape", b.node("Transpose", x, perm=[0, 2, 3, 1]), [-1, 422])
    kernel = b.weight("kernel", b.rng.normal(size=(422, CLASSES)))
    x = b.node("Reshape", b.node("MatMul", x, kernel), [-1, 16, CLASSES])
    x = b.node("ReduceMean", x, [1], keepdims=0)
    path, given = saved(b.model(x), tmp_path), images(2)
    network = teacher.load_network(path)
    helpers.assert_close(compute(network, given), logits_of(path, given), 1e-5)


def test_a_slice_that_holds_the_number_of_images_is_refused(tmp_path):
    b = Builder()
    x = b.pooled(b.layer("x", "conv", 3, 8), 8)
    x = b.node("Slice", x, [0], b.node("Shape", x, start=0, end=1), [0])
    path = saved(b.model(x), tmp_path)
    with pytest.raises(InputError, match="its number of images is part of the network"):
        teacher.load_network(path)


def test_whole_numbers_are_divided_toward_0():
    x, y = np.asarray([-7, 7, -7, 6]), np.asarray([2, -2, -2, 3])
    np.testing.assert_array_equal(OPERATORS["Div"](x, y), [-3, -3, 3, 2])
    np.testing.assert_array_equal(FOLDED["Mod"](x, y, fmod=1), [-1, 1, -1, 0])
    np.testing.assert_array_equal(FOLDED["Mod"](x, y), [1, -1, -1, 0])


def test_images_of_an_open_size_need_one(tmp_path):
    model = FAMILIES["mobilenet_v2"]()
    for axis in (2, 3):
        size = model.graph.input[0].type.tensor_type.shape.dim[axis]
        size.dim_param = "size"
    path = saved(model, tmp_path)
    with pytest.raises(InputError, match=r"give image_shape=\(H, W, channels\)"):
        teacher.load_network(path)
    network = teacher.load_network(path, image_shape=(SIZE, SIZE, 3))
    assert network.image_shape == (SIZE, SIZE, 3)
    with pytest.raises(InputError, match=r"the images of the network are \(0, 0, 3\)"):
        teacher.load_network(path, image_shape=(SIZE, SIZE, 1))


def test_p_can_be_computed_in_bfloat16(tmp_path):
    """Statistics stay float32; kernels and activations are rounded."""
    network = teacher.load_network(saved(FAMILIES["mobilenet_v3"](), tmp_path))
    given = network.function.apply, network.function.variables
    shape = {"image_shape": network.image_shape}
    halved = trace(*given, **shape, dtype=jax.numpy.bfloat16)
    assert halved.batch_norms == trace(*given, **shape).batch_norms
    x = jax.numpy.asarray(images(2), jax.numpy.bfloat16)
    logits = network.apply(network.variables, x)
    assert logits.dtype == x.dtype
    helpers.assert_close(logits, compute(network, images(2)), 0.05)


def test_other_floats_become_float32(tmp_path):
    model = FAMILIES["resnet"]()
    for weight in model.graph.initializer:
        array = numpy_helper.to_array(weight).astype(np.float16)
        weight.CopyFrom(numpy_helper.from_array(array, weight.name))
    model.graph.input[0].type.tensor_type.elem_type = TensorProto.FLOAT16
    network = teacher.load_network(saved(model, tmp_path))
    assert {x.dtype for x in network.variables.values()} == {np.dtype("float32")}


def test_every_operator_is_in_the_guide():
    text = Path("docs/guides/checkpoint.md").read_text()
    section = text[text.index("### Operators") :].partition("\n## ")[0]
    listed = re.findall(r"`(\w+)`", section)
    assert sorted(listed) == onnx_file.NAMES


# What is refused, and why.


def broken(change):
    model = FAMILIES["resnet"]()
    change(model.graph, model)
    return model


def node_of(graph, operator):
    return next(node for node in graph.node if node.op_type == operator)


def unknown(graph, model):
    node_of(graph, "Relu").op_type = "Einsum"


def two_lines(graph, model):
    node_of(graph, "Relu").op_type = "Re\nlu"


def custom(graph, model):
    node_of(graph, "Relu").domain = "com.microsoft"


def quantized(graph, model):
    node_of(graph, "Relu").op_type = "QuantizeLinear"


def training(graph, model):
    norm = node_of(graph, "BatchNormalization")
    norm.attribute.append(helper.make_attribute("training_mode", 1))


def cycle(graph, model):
    node_of(graph, "Relu").input[0] = graph.node[-1].output[0]


def twice(graph, model):
    graph.node.append(node_of(graph, "Relu"))


def attribute(graph, model):
    conv = node_of(graph, "Conv")
    conv.attribute.append(helper.make_attribute("sideways", 1))


def huge_pads(graph, model):
    conv = node_of(graph, "Conv")
    del conv.attribute[:]
    conv.attribute.append(helper.make_attribute("pads", [2**40] * 4))


def no_stride(graph, model):
    conv = node_of(graph, "Conv")
    del conv.attribute[:]
    conv.attribute.append(helper.make_attribute("strides", [0, 0]))


def a_number_at_the_end(graph, model):
    node = helper.make_node("ReduceMean", ["x"], ["mean"], keepdims=0)
    graph.node.append(node)
    graph.output[0].name = "mean"


def softmax_of_the_batch(graph, model):
    last = graph.output[0].name
    node = helper.make_node("Softmax", [last], ["shares"], axis=0)
    graph.node.append(node)
    graph.output[0].name = "shares"


def huge_weight(graph, model):
    graph.initializer[0].dims[0] = 2**40


def negative_weight(graph, model):
    graph.initializer[0].dims[0] = -8


def huge_images(graph, model):
    for axis in (2, 3):
        graph.input[0].type.tensor_type.shape.dim[axis].dim_value = 2**31


def operator(name, *inputs, values=(), **attributes):
    """Put a node in the place of the first Relu."""

    def change(graph, model):
        relu = node_of(graph, "Relu")
        for at, value in enumerate(values):
            array = numpy_helper.from_array(np.asarray(value), f"value_{at}")
            graph.initializer.append(array)
        node = helper.make_node(name, [relu.input[0], *inputs], relu.output)
        node.attribute.extend(helper.make_attribute(*x) for x in attributes.items())
        node.name = "odd"
        relu.CopyFrom(node)

    return change


BODY = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "body", [], [])
HALF = np.asarray([1, 1, 0.5, 0.5], np.float32)


def huge_constant(graph, model):
    shape = numpy_helper.from_array(np.asarray([2**40], np.int64), "much")
    graph.initializer.append(shape)
    graph.node.insert(0, helper.make_node("ConstantOfShape", ["much"], ["numbers"]))


def huge_sum(graph, model):
    for name, shape in (("row", (1, 20_000)), ("column", (20_000, 1))):
        value = np.ones(shape, np.int64)
        graph.initializer.append(numpy_helper.from_array(value, name))
    graph.node.insert(0, helper.make_node("Add", ["row", "column"], ["numbers"]))


def many_nodes(graph, model):
    node = helper.make_node("Relu", ["x"], ["y"])
    graph.node.extend([node] * 30_000)


def pixels(graph, model):
    graph.input[0].type.tensor_type.elem_type = TensorProto.UINT8


def two_inputs(graph, model):
    graph.input.append(helper.make_tensor_value_info("z", TensorProto.FLOAT, [1]))


def two_outputs(graph, model):
    graph.output.append(helper.make_tensor_value_info("z", TensorProto.FLOAT, [1]))


def a_map_at_the_end(graph, model):
    graph.output[0].name = node_of(graph, "MaxPool").output[0]


def old(graph, model):
    model.opset_import[0].version = 9


def strings(graph, model):
    graph.initializer[0].data_type = TensorProto.STRING


def many_axes(graph, model):
    graph.initializer[0].dims.extend([1] * 70)


def segment(graph, model):
    weight = graph.initializer[0]
    values = numpy_helper.to_array(weight)
    weight.ClearField("raw_data")
    weight.float_data.extend(values.ravel())
    weight.segment.begin = 0


def constant(name, value):
    """Add a Constant whose attribute does not hold what its name says."""

    def change(graph, model):
        node = helper.make_node("Constant", [], ["odd"], name="odd")
        node.attribute.append(helper.make_attribute(name, value))
        graph.node.insert(0, node)

    return change


def external(location, length=None):
    def change(graph, model):
        weight = graph.initializer[0]
        size = len(weight.raw_data)
        weight.ClearField("raw_data")
        weight.data_location = TensorProto.EXTERNAL
        entries = {"location": location, "length": str(length or size)}
        for key, value in entries.items():
            entry = weight.external_data.add()
            entry.key, entry.value = key, value

    return change


REFUSED = {
    "a branch": (
        operator("If", then_branch=BODY, else_branch=BODY),
        r"node 'odd' \(If\): the operator If is not read",
    ),
    "a loop": (
        operator("Loop", body=BODY),
        r"node 'odd' \(Loop\): the operator Loop is not read",
    ),
    "cubic": (
        operator("Resize", "", "value_0", values=[HALF], mode="cubic"),
        "its mode 'cubic' is not read",
    ),
    "cropped": (
        operator(
            *("Resize", "", "value_0"),
            values=[HALF],
            coordinate_transformation_mode="tf_crop_and_resize",
        ),
        "its coordinate_transformation_mode 'tf_crop_and_resize' is not read",
    ),
    "resized batch": (
        operator("Resize", "", "value_0", values=[HALF + HALF[::-1]]),
        "it resizes the batch",
    ),
    "resized batch, from the end": (
        operator("Resize", "", "value_0", values=[HALF[1:3]], axes=[-1, -4]),
        "it resizes the batch",
    ),
    "resized twice": (
        operator("Resize", "", "value_0", values=[HALF[2:]], axes=[2, -2]),
        "its axes are not different ones of the tensor",
    ),
    "resized beyond": (
        operator("Resize", "", "value_0", values=[HALF[2:]], axes=[2, 4]),
        "its axes are not different ones of the tensor",
    ),
    "resized by nothing": (operator("Resize"), "it has neither scales nor sizes"),
    "huge sizes": (
        operator("Resize", "", "", "value_0", values=[[2**40, 2]], axes=[2, 3]),
        "an axis of 16 resized to 1099511627776",
    ),
    "endless scales": (
        operator("Resize", "", "value_0", values=[HALF * np.float32(np.inf)]),
        "it resizes the batch",
    ),
    "unknown places": (
        operator("Gather", "value_0", values=[[[2**40]]]),
        "an index beyond an axis",
    ),
    "unknown": (unknown, "node 'node_Relu_.*the operator Einsum is not read"),
    "two lines": (two_lines, r"\(Re.lu\): the operator Re.lu is not read"),
    "custom": (custom, "the operator com.microsoft::Relu is not read"),
    "quantized": (quantized, "quantized already"),
    "training": (training, r"call model.eval\(\) before the export"),
    "cycle": (cycle, "no node before it computes its input"),
    "twice": (twice, "is computed twice"),
    "attribute": (attribute, "its attribute sideways is not read"),
    "huge pads": (huge_pads, "dilation of 1099511627776"),
    "no stride": (no_stride, "a window, stride, padding or dilation of 0"),
    "batch": (softmax_of_the_batch, "it computes over the images of a batch"),
    "huge weight": (huge_weight, "216 numbers, but its shape is"),
    "negative weight": (negative_weight, r"has the shape \(-8"),
    "huge images": (huge_images, "at most 8192 along a side"),
    "huge constant": (huge_constant, "shape .1099511627776,. computed from constants"),
    "huge sum": (huge_sum, r"computed from constants"),
    "many nodes": (many_nodes, "nodes; at most 20,000 are read"),
    "pixels": (pixels, "of type UINT8; it must be normalised images"),
    "two inputs": (two_inputs, r"2 inputs \(x, z\)"),
    "two outputs": (two_outputs, "export the logits"),
    "a map": (a_map_at_the_end, r"\[batch, 8, 8, 8\], not logits"),
    "a number": (a_number_at_the_end, r"its output is \[\], not logits"),
    "old": (old, "opset 9: opsets 11 to 25 are read"),
    "strings": (strings, "of type STRING"),
    "many axes": (many_axes, "it cannot be read"),
    "a segment": (segment, "it cannot be read"),
    **{
        f"{name} of {value!r:.5}": (
            constant(name, value),
            r"node 'odd' \(Constant\): its value cannot be read",
        )
        for name, value in (
            ("value", 1.0),
            ("value_ints", numpy_helper.from_array(np.zeros(2))),
            ("value_floats", "1.0"),
        )
    },
    "many windows": (
        operator("AveragePool", kernel_shape=[2, 2], pads=[8000] * 4),
        r"\(AveragePool\): windows over \(16015, 16015\) places",
    ),
    "a folder above": (external("../secret"), "given by its bare name"),
    "an absolute path": (external("/etc/passwd"), "given by its bare name"),
    "the folder itself": (external("."), "given by its bare name"),
    "too short": (external("data.bin"), "not within data.bin of 4 bytes"),
    "negative": (external("data.bin", -1), "not within data.bin of 4 bytes"),
}


@pytest.mark.parametrize(("change", "why"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_read_is_refused_in_a_line(tmp_path, change, why):
    (tmp_path / "data.bin").write_bytes(b"1234")
    path = saved(broken(change), tmp_path)
    with pytest.raises(InputError, match=why) as caught:
        teacher.load_network(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"hello", b"\x08\x08", b"\x08\x08\x12"])
def test_other_files_are_no_onnx_files(tmp_path, content):
    path = tmp_path / "net.onnx"
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"net\.onnx: not an ONNX file"):
        teacher.load_network(path)


def test_what_else_a_file_is_that_is_called_onnx(tmp_path):
    """As the model zoos keep them: pointers until they are fetched."""
    path = tmp_path / "net.onnx"
    for content, kind in (
        (b"version https://git-lfs.github.com/spec/v1", "a Git LFS pointer"),
        (b"<!DOCTYPE html>", "a web page"),
    ):
        path.write_bytes(content)
        with pytest.raises(InputError, match=f"not an ONNX file, but {kind}"):
            teacher.load_network(path)


def test_a_truncated_file_is_refused(tmp_path):
    path = saved(FAMILIES["resnet"](), tmp_path)
    path.write_bytes(path.read_bytes()[:-400])
    with pytest.raises(InputError, match="truncated"):
        teacher.load_network(path)


def test_a_name_that_is_no_text_is_refused(tmp_path):
    path = saved(FAMILIES["resnet"](), tmp_path)
    path.write_bytes(path.read_bytes().replace(b"node_Relu", b"node\x81Relu"))
    with pytest.raises(InputError, match="a name in it is not UTF-8"):
        teacher.load_network(path)


def test_an_onnx_file_of_another_name_is_known_by_its_content(tmp_path):
    path = saved(FAMILIES["resnet"](), tmp_path, "weights.pth")
    assert teacher.load_network(path).kind.startswith("ONNX")


DAMAGED = {
    "no graph": lambda d: d.clear(),
    "an unknown operator": lambda d: d["nodes"][0].__setitem__(0, "Loop"),
    "no tensor": lambda d: d["nodes"][0].__setitem__(1, [1.0, 2.0]),
    "another type": lambda d: d["nodes"][0][1].__setitem__(0, ["x"]),
    "a layout": lambda d: d.update(layout=[]),
    "nodes": lambda d: d.update(nodes=7),
}


@pytest.mark.parametrize("damage", DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_graph_of_a_quantized_file_is_refused(tmp_path, damage):
    network = teacher.load_network(saved(FAMILIES["resnet"](), tmp_path))
    definition = network.function.definition
    definition["nodes"] = [
        [kind, list(inputs), outputs, attributes]
        for kind, inputs, outputs, attributes in definition["nodes"]
    ]
    damage(definition)
    with pytest.raises(InputError, match="onnx: "):
        onnx_network.from_json(definition)


HOSTILE = {
    "Conv": {"pads": [2**40] * 4},
    "AveragePool": {"kernel_shape": [8000, 8000], "pads": [8000] * 4},
    "Expand": {"shape": [2**40, 8, 16, 16]},
    "Pad": {"pads": [0, 0, 0, 0, 0, 0, 2**40, 0]},
    "Split": {"num_outputs": 2**40},
    "Gather": {"indices": [2**40]},
    "Relu": {"alpha": 1},
    "Resize": {"axes": [2], "scales": [1e30]},
    "Reshape": {"shape": [2**40, 2**40]},
}


@pytest.mark.parametrize("operator", HOSTILE)
def test_a_graph_that_cannot_be_computed_is_refused(tmp_path, operator):
    network = teacher.load_network(saved(FAMILIES["resnet"](), tmp_path))
    definition = network.function.definition
    kept = dict(definition["nodes"][0][3]) if operator == "Conv" else {}
    definition["nodes"][0][0] = operator
    definition["nodes"][0][3] = {**kept, **HOSTILE[operator]}
    if operator != "Conv":
        definition["nodes"][0][1] = ["x"]
    function = onnx_network.from_json(definition).function(network.variables)
    with pytest.raises(InputError, match=rf"{operator} of .* cannot be computed"):
        trace(function.apply, function.variables, image_shape=(SIZE, SIZE, 3))
