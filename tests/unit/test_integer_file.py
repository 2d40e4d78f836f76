"""quantized.integer.onnx: Q's integers, no float product, ranges, targets, refusals."""

import dataclasses
import json
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import onnx
import onnxruntime
import pytest
import safetensors.numpy
from onnx import numpy_helper

from adadfq_jax import quant, teacher
from adadfq_jax.deploy import encodings, export, model_card, quantized_file, verify
from adadfq_jax.deploy.codes import Kernel
from adadfq_jax.deploy.network import NetworkInfo
from adadfq_jax.deploy.onnx_file import OnnxOptions, to_integer_onnx, to_onnx
from adadfq_jax.deploy.onnx_graph import Graph, Tensor, features_first
from adadfq_jax.deploy.onnx_integer import Choices, integer_kernel
from adadfq_jax.errors import ExportError, InputError
from adadfq_jax.models import layers
from adadfq_jax.network import as_function, named, trace
from adadfq_jax.reconstruction import rounding
from adadfq_jax.settings import Export
from adadfq_jax.training import results
from tests import programs, quantized
from tests.network_families import FAMILIES, IMAGE

SHAPE = (16, 16, 3)
FLOAT_PRODUCTS = ("Conv", "FusedConv", "Gemm", "FusedGemm", "MatMul", "FusedMatMul")


class Small(nn.Module):
    """A linear bottleneck, a sum that Q leaves in float, pools, a convolution last."""

    @nn.compact
    def __call__(self, x):
        x = nn.relu6(layers.BatchNorm()(layers.Conv(8, stride=2)(x)))
        x = x + layers.BatchNorm()(layers.Conv(8)(x))
        x = nn.relu(layers.BatchNorm()(layers.Conv(12)(x)))
        x = nn.max_pool(x, (2, 2), (2, 2))
        x = layers.Conv(10, size=1, use_bias=True)(jnp.mean(x, (1, 2), keepdims=True))
        return x.reshape(x.shape[0], 10)


@pytest.fixture(scope="module")
def small():
    """The module, its variables with batch norms of any sign, and 64 images."""
    module, rng = Small(), np.random.default_rng(0)
    images = rng.normal(size=(64, *SHAPE)).astype(np.float32)
    variables = jax.device_get(jax.jit(module.init)(jax.random.key(0), images))

    def moved(path, leaf):
        last = path[-1].key
        if last == "scale":
            return rng.choice([-1.0, 1.0], leaf.shape).astype(np.float32)
        return leaf + (0.2 * rng.normal(size=leaf.shape).astype(np.float32)) * (
            last in ("bias", "mean")
        )

    return module, jax.tree_util.tree_map_with_path(moved, variables), images


@pytest.fixture(scope="module")
def network(small, tmp_path_factory):
    """Make it a Q: (bits, places, symmetric) -> the network."""
    module, variables, images = small
    folder = tmp_path_factory.mktemp("q")

    def make(bits, places="nonlinearities", symmetric=False):
        ends = (0.5,) * 3, (0.25,) * 3
        info = NetworkInfo("own", 10, SHAPE, *ends, bits, bits, places=places)
        function = as_function(module, variables)
        file = folder / f"{bits}.safetensors"
        quantized.save(file, info, None, images, function, symmetric=symmetric)
        return quantized_file.load_quantized(file, module)

    return make


def integer(network, images, **choices):
    made = to_integer_onnx(network, OnnxOptions(), images, Choices(**choices))
    onnx.checker.check_model(made.model, full_check=True)
    return made


def arrays(model):
    return {x.name: numpy_helper.to_array(x) for x in model.graph.initializer}


def run(model, images):
    runner = verify.onnx_runner(model.SerializeToString(), lambda x: x)
    return runner(images)


def optimized(model, tmp_path):
    """The operators that ONNX Runtime computes the model with."""
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    options.log_severity_level = 3  # it warns that such a file fits this machine alone
    onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    return [n.op_type for n in onnx.load(options.optimized_model_filepath).graph.node]


@pytest.mark.parametrize("bits", [2, 4, 7, 8])
def test_integers_are_qs_codes_minus_their_zero_points(network, small, bits):
    q = network(bits)
    made = integer(q, small[2])
    found, again = arrays(made.model), 0
    for entry in q.graph.kernels:
        kernel = features_first(q.kernels[entry.name], [3], [2, 0, 1])
        codes = found[entry.variable].reshape(kernel.codes.shape)
        zero_points = found[f"{entry.variable}.zero_point"]
        assert codes.dtype == np.int8 and codes.min() >= -127 and not zero_points.any()
        steps = kernel.codes.astype(int) - kernel.zero_point.astype(int).reshape(
            -1, 1, 1, 1
        )
        # A negative factor of a batch norm reverses a channel.
        same = [
            (c == s).all() or (c == -s).all() for c, s in zip(codes, steps, strict=True)
        ]
        fits = np.abs(steps).max((1, 2, 3)) <= 127
        assert np.array_equal(same, fits) or (np.asarray(same) >= fits).all()
        again += int((~fits).sum())
    assert made.rounded_again == again
    assert (again == 0) == (bits < 8)


def test_activations_have_256_levels_on_qs_ranges(network, small):
    q = network(3)
    found = arrays(integer(q, small[2]).model)
    scales = {float(x) for name, x in found.items() if x.shape == ()}
    for low, high in q.ranges.values():
        assert low == 0
        wanted = high / 255
        assert any(abs(scale - wanted) < 1e-6 * wanted for scale in scales)
    assert any(abs(scale - 4 / 255) < 1e-6 for scale in scales)  # pixels: -2 to 2


@pytest.mark.parametrize("bits", [3, 8])
def test_the_optimized_graph_has_no_float_product(network, small, bits, tmp_path):
    model = integer(network(bits), small[2]).model
    names = optimized(model, tmp_path)
    assert not set(names) & {*FLOAT_PRODUCTS, "Relu", "Clip", "Min", "Add", "Mul"}
    assert names.count("QLinearConv") == 3 and names.count("QGemm") == 1
    assert {"QLinearAdd", "QLinearGlobalAveragePool"} <= set(names)


def test_a_layer_stays_in_float_by_its_name(network, small, tmp_path):
    q = network(4)
    name = q.graph.kernels[1].name
    model = integer(q, small[2], float_layers=[name]).model
    names = optimized(model, tmp_path)
    assert sum(x in FLOAT_PRODUCTS for x in names) == 1
    assert arrays(model)[name].dtype == np.float32
    with pytest.raises(InputError, match="float_layers=nothing: the network has no"):
        export._float_layers(q.graph, Export(float_layers="nothing"))


def test_variables_may_have_the_names_of_constants(tmp_path):
    rng = np.random.default_rng(0)
    variables = {
        name: rng.normal(size=shape).astype(np.float32)
        for name, shape in {"a": (12, 8), "least": (8, 5)}.items()
    }

    def network(v, x):
        return jnp.maximum(x.reshape(len(x), -1) @ v["a"], 0) @ v["least"]

    images = rng.uniform(-2, 2, (8, 2, 2, 3)).astype(np.float32)
    info = NetworkInfo("own", 5, (2, 2, 3), (0.5,) * 3, (0.25,) * 3, 8, 8)
    file = tmp_path / "q.safetensors"
    quantized.save(file, info, None, images, as_function(network, variables))
    q = quantized_file.load_quantized(file, network, variables)
    theirs = run(integer(q, images, float_layers=["a", "least"]).model, images)
    np.testing.assert_allclose(theirs, np.asarray(q(images)), atol=0.2)


def test_with_8_bits_symmetric_and_all_places_it_is_q(network, small):
    q, images = network(8, "all", symmetric=True), small[2]
    made = integer(q, images)
    assert made.rounded_again == 0
    ours, theirs = np.asarray(q(images)), run(made.model, images)
    step = max(high - low for low, high in q.ranges.values()) / 255
    assert np.abs(ours - theirs).max() < 4 * step
    assert np.median(np.abs(ours - theirs)) < 0.01 * ours.std()
    other = run(integer(network(8, "all"), images).model, images)
    assert np.abs(ours - theirs).mean() < np.abs(ours - other).mean()


def test_the_symmetric_target_has_no_zero_point(network, small):
    model = integer(network(4), small[2], symmetric=True, float_biases=True).model
    found = arrays(model)
    points = [n.input[2] for n in model.graph.node if n.op_type.endswith("eLinear")]
    assert all(found[n].dtype == np.int8 and not found[n].any() for n in points)
    assert not any(x.dtype == np.int32 for x in found.values())
    names = [n.op_type for n in model.graph.node]
    assert names.count("Clip") == 1 and names.count("Relu") == 1
    ours = np.asarray(network(4)(small[2]))
    assert np.corrcoef(ours.ravel(), run(model, small[2]).ravel())[0, 1] > 0.95


def test_a_bias_that_overflows_raises_its_channels_scale():
    codes = np.asarray([[0, 8, 15], [3, 8, 12]], np.uint8)
    kernel = Kernel(codes, np.float32([1e-12, 0.5]), np.float32([8, 8]), 4, (0,))
    found = integer_kernel(kernel, np.asarray([1e-3, 1e-3]))
    assert found.rounded_again.tolist() == [True, False]
    assert found.scale.tolist() == [np.float32(1e-3), 0.5]
    assert found.codes.tolist() == [[0, 0, 0], [-5, 0, 4]]


def test_channels_without_0_that_do_not_fit_are_rounded_again():
    codes = np.asarray([[0, 15], [0, 15]], np.uint8)
    kernel = Kernel(codes, np.float32([0.1, 0.1]), np.float32([-113, -112]), 4, (0,))
    found = integer_kernel(kernel)
    assert found.rounded_again.tolist() == [True, False]
    assert found.codes.tolist() == [[112, 127], [112, 127]]
    assert found.scale[0] == np.float32(12.8) / np.float32(127)


def test_min_is_written_as_clip(network):
    for is_quantized in (False, True):
        model = to_onnx(network(4), OnnxOptions(), quantized=is_quantized)
        names = [node.op_type for node in model.graph.node]
        assert "Min" not in names and "Clip" in names


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_symmetric_ranges_have_one_zero_point(bits):
    half = 2 ** (bits - 1)
    rng = np.random.default_rng(bits)
    kernel = rng.normal(size=(3, 3, 4, 6)).astype(np.float32) + np.float32(0.3)
    for shrink in (None, quant.kernel_shrink(kernel, bits, (-1,), True)):
        found = quant.kernel_integers(kernel, bits, shrink, (-1,), True)
        assert (found.zero_point == half).all()
        rebuilt = Kernel(*found, bits).dequantize()
        ours = quant.fake_quant_kernel(kernel, bits, shrink, (-1,), True)
        np.testing.assert_allclose(rebuilt, ours, rtol=1e-6)
        if shrink is None:
            assert found.codes.min() >= 1
            np.testing.assert_allclose(
                np.abs(rebuilt).max((0, 1, 2)), np.abs(kernel).max((0, 1, 2)), rtol=1e-6
            )
    grid, _ = rounding.start(jnp.asarray(kernel), bits, None, (-1,), True)
    assert (grid.zero_point == half).all()


def test_the_record_and_the_table_tell_of_the_integer_file(tmp_path, monkeypatch):
    monkeypatch.setattr(export, "MOST_LOST", -101.0)
    monkeypatch.setattr(verify, "SAMPLE", 20)
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (50, *SHAPE)).astype(np.uint8)
    images = verify.Images(pixels, rng.integers(0, 10, 50).astype(np.int32), "a set")
    options = Export(stablehlo=False)
    file = quantized.save_tiny(tmp_path, 4)
    record = export.write_exports(file, tmp_path, options, images)
    made = record["files"]["integer"]
    assert made["file"] == "quantized.integer.onnx"
    assert (tmp_path / made["file"]).stat().st_size == made["bytes"]
    assert made["float32_latency_ms"] == record["float32_latency_ms"]
    assert made["rounded_again"] == 0 and made["q_top1"] is not None
    kernels = ["init_block.conv.kernel", "unit.conv.kernel", "output.kernel"]
    assert made["worst_layer"] in kernels
    assert (record["files"]["onnx"]["images"], made["images"]) == (20, 50)
    rows = {name: text for name, _, text in results._export_rows(record)}
    top1 = {name: top1 for name, top1, _ in results._export_rows(record)}
    assert top1 == {"onnx": "as Q", "integer.onnx": f"{made['top1']:.2f} %"}
    assert f"export.float_layers={made['worst_layer']}" in rows["integer.onnx"]
    assert "an image, float32 " in rows["onnx"]
    card = (tmp_path / "model_card.md").read_text()
    assert "has the size and the speed of W8A8" in card
    assert f"`--config.export.float_layers={made['worst_layer']}`" in card

    def remarks(**others):
        own = {**record, "options": {**record["options"], **others}}
        return "\n".join(model_card._remarks({"x": 4}, own))

    assert "in 8-bit integers, but not unit.conv." in remarks(float_layers="unit.conv")
    told = remarks(target="symmetric")
    assert "convolutions in float32" in told and "speed of W8A8" not in told


def test_encodings_and_a_state_dict_are_q(tmp_path):
    file = quantized.save_tiny(tmp_path, 4)
    options = Export(onnx=False, state_dict="pytorchcv")
    export.write_exports(file, tmp_path, options)
    q = quantized_file.load_quantized(file)
    found = json.loads((tmp_path / "encodings.json").read_text())
    for name, kernel in q.kernels.items():
        own = found["kernels"][name]
        assert own["bits"] == 4
        steps = kernel.codes.astype(float) - own["zero_point"]
        np.testing.assert_allclose(steps * own["scale"], kernel.dequantize(), rtol=1e-6)
    for name, (low, high) in q.ranges.items():
        own = found["activations"][name]
        assert own["min"] == low and own["max"] == pytest.approx(high, rel=1e-6)
    weights = teacher.from_state_dict(
        safetensors.numpy.load_file(tmp_path / "quantized.weights.safetensors"), "tiny"
    )
    for name, array in named(weights).items():
        values = {**q.variables.variables, **q.variables.kernels}
        np.testing.assert_array_equal(array, values[name])
    for scheme in ("He", "nothing"):
        with pytest.raises(InputError, match=f"state_dict={scheme}: tiny has the"):
            encodings.state_dict(q, scheme)


def test_openvino_executes_the_files(network, small, monkeypatch):
    # It reports that it was imported, from a process that it forks.
    monkeypatch.setitem(sys.modules, "openvino_telemetry", None)
    openvino = programs.package("openvino")
    q, images = network(3), small[2]
    options = OnnxOptions(least_bits=4)
    models = [to_onnx(q, options), integer(q, images).model]
    for model in models:
        core = openvino.Core()
        read = core.read_model(model.SerializeToString())
        hint = {"INFERENCE_PRECISION_HINT": "f32"}
        found = core.compile_model(read, "CPU", hint)(images)[0]
        ours = run(model, images)
        assert np.abs(ours - found).mean() < 0.05 * ours.std()


def test_an_integer_file_takes_what_the_user_says(network, small):
    q = dataclasses.replace(network(8))
    pixels = np.random.default_rng(1).integers(0, 256, (9, *SHAPE)).astype(np.uint8)
    normalised = ((pixels / 255 - 0.5) / 0.25).astype(np.float32)
    ours = np.asarray(q(normalised))
    for options, given in (
        (OnnxOptions("NCHW"), normalised),
        (OnnxOptions("NHWC", pixels=True), pixels),
    ):
        model = to_integer_onnx(q, options, given).model
        theirs = run(model, options.images(given))
        assert np.abs(ours - theirs).mean() < 0.1 * ours.std()


def own(tmp_path, function, variables):
    """A function as a Q of 8 bits, and images."""
    images = np.random.default_rng(0).normal(size=(8, *IMAGE)).astype(np.float32)
    graph = trace(function, variables, image_shape=IMAGE)
    ends = (0.5,) * 3, (0.25,) * 3
    info = NetworkInfo("own", graph.num_classes, IMAGE, *ends, 8, 8)
    file = tmp_path / "q.safetensors"
    quantized.save(file, info, None, images, as_function(function, variables))
    return quantized_file.load_quantized(file, function, variables), images


def test_a_kernel_that_is_read_twice_is_there_twice(tmp_path):
    make, _ = FAMILIES["one_kernel_twice"]
    q, images = own(tmp_path, *make())
    ours, theirs = np.asarray(q(images)), run(integer(q, images).model, images)
    assert np.corrcoef(ours.ravel(), theirs.ravel())[0, 1] > 0.99


@pytest.mark.parametrize("groups", [1, 2])
def test_only_a_plain_convolution_at_the_end_becomes_a_product(tmp_path, groups):
    """One has a stride, the other groups."""

    class Last(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.relu(nn.Conv(8, (3, 3))(x))
            step = 16 if groups == 1 else 1
            x = x if groups == 1 else jnp.mean(x, (1, 2), keepdims=True)
            ways = {"strides": step, "feature_group_count": groups}
            return nn.Conv(4, (1, 1), **ways)(x).reshape(x.shape[0], 4)

    variables = Last().init(jax.random.key(0), jnp.zeros((1, *IMAGE)))
    q, images = own(tmp_path, Last().apply, variables)
    made = integer(q, images).model
    assert "Gemm" not in [node.op_type for node in made.graph.node]
    ours, theirs = np.asarray(q(images)), run(made, images)
    assert np.corrcoef(ours.ravel(), theirs.ravel())[0, 1] > 0.99


def test_a_width_or_number_of_classes_is_not_taken_for_the_batch(tmp_path):
    class Wide(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.relu(nn.Conv(422, (3, 3), strides=4)(x))
            return nn.Dense(211)(jnp.mean(x, (1, 2)))

    variables = Wide().init(jax.random.key(0), jnp.zeros((1, *IMAGE)))
    q, images = own(tmp_path, Wide().apply, variables)
    ours = np.asarray(q(images))
    for made in (integer(q, images).model, to_onnx(q, OnnxOptions())):
        theirs = run(made, images)
        assert np.corrcoef(ours.ravel(), theirs.ravel())[0, 1] > 0.99


def test_what_onnx_and_its_runtime_refuse_is_an_export_error():
    graph = Graph()
    x = Tensor("images", (211, 4), (0, 1))
    graph.output(graph.node("Gemm", [x.name], (211, 4)), "logits")
    value = onnx.helper.make_tensor_value_info
    ends = [[value(n, 1, ["batch", 4])] for n in ("images", "logits")]
    with pytest.raises(ExportError, match="an invalid ONNX model"):
        graph.model(*ends, {})
    with pytest.raises(ExportError, match="ONNX Runtime does not execute the network"):
        verify.onnx_runner(b"no model", lambda x: x)
    graph.nodes[0].op_type = "Identity"
    runner = verify.onnx_runner(graph.model(*ends, {}).SerializeToString(), lambda x: x)
    with pytest.raises(ExportError, match="ONNX Runtime does not execute the network"):
        runner(np.zeros((2, 3), np.float32))
