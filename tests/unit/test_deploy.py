"""ONNX and StableHLO files: exact codes, every width, options, refusals, the check."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import onnx
import onnxruntime
import pytest

from adadfq_jax import quant
from adadfq_jax.deploy import (
    codes,
    export,
    model_card,
    onnx_file,
    quantized_file,
    verify,
)
from adadfq_jax.deploy.codes import Kernel, pack_codes
from adadfq_jax.deploy.network import NetworkInfo, graph_of
from adadfq_jax.deploy.onnx_file import OnnxOptions, to_onnx
from adadfq_jax.deploy.onnx_graph import Graph, Tensor, features_first
from adadfq_jax.deploy.onnx_rules import translate
from adadfq_jax.deploy.stablehlo_file import PLATFORMS, to_stablehlo, unpack
from adadfq_jax.deploy.verify import latency_ms
from adadfq_jax.errors import ExportError, InputError
from adadfq_jax.evaluation.evaluator import normalise
from adadfq_jax.network import Hooks, run, trace
from adadfq_jax.network import kernels as all_kernels
from adadfq_jax.settings import Export
from tests import jobs, quantized
from tests.quantized import TINY_SHAPE as SHAPE


@pytest.fixture
def save_tiny(tmp_path):
    return functools.partial(quantized.save_tiny, tmp_path)


def run_onnx(model, x):
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    return session.run(None, {session.get_inputs()[0].name: x})[0]


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("uint8_only", [False, True])
def test_every_width_runs_and_agrees(save_tiny, bits, uint8_only):
    network = quantized_file.load_quantized(save_tiny(bits))
    model = to_onnx(network, OnnxOptions(least_bits=8 if uint8_only else 2))
    width = 8 if uint8_only else {2: 2, 3: 4, 4: 4}.get(bits, 8)
    (kernel,) = (i for i in model.graph.initializer if i.name == "unit.conv.kernel")
    assert kernel.data_type == getattr(onnx.TensorProto, f"UINT{width}")
    assert len(kernel.raw_data) == 3 * 3 * 8 * 16 * width // 8
    assert model.opset_import[0].version == {2: 25, 4: 21, 8: 13}[width]
    images = np.random.default_rng(1).normal(size=(40, *SHAPE)).astype(np.float32)
    ours, theirs = np.asarray(network(images)), run_onnx(model, images)
    # But for an activation on the edge of two codes.
    assert np.median(np.abs(ours - theirs)) < 1e-4
    assert np.mean(np.abs(ours - theirs)) < 0.02 * ours.std()


@pytest.mark.parametrize("layout", ["NHWC", "NCHW"])
@pytest.mark.parametrize("pixels", [False, True])
def test_images_come_as_the_user_says(save_tiny, layout, pixels):
    network = quantized_file.load_quantized(save_tiny(8))
    options = OnnxOptions(layout, pixels)
    model = to_onnx(network, options)
    given = np.random.default_rng(1).integers(0, 256, (5, *SHAPE)).astype(np.uint8)
    normalised = np.asarray(normalise(jnp.asarray(given), network.mean, network.std))
    ours = np.asarray(network(normalised))
    x = options.images(given if pixels else normalised)
    assert x.shape == ((5, *SHAPE) if layout == "NHWC" else (5, 3, 16, 16))
    np.testing.assert_allclose(run_onnx(model, x), ours, atol=0.02 * ours.std())
    program = jax.export.deserialize(bytearray(to_stablehlo(network, pixels=pixels)))
    np.testing.assert_allclose(
        program.call(given if pixels else normalised), ours, atol=0.02 * ours.std()
    )
    assert program.platforms == PLATFORMS


@pytest.mark.parametrize("bits", [2, 4, 5])
@pytest.mark.parametrize("groups", [1, 6])
def test_kernels_without_zero_and_factors_of_any_sign(bits, groups):
    """Channels all above and all below 0, as depthwise kernels have; and constant."""
    rng = np.random.default_rng(bits)
    kernel = rng.uniform(1, 2, (3, 3, 6 // groups, 6)).astype(np.float32)
    kernel *= [1, -1, 1, 1, -1, 1]
    kernel[..., 3] -= 1.5
    kernel[..., 5] = 0.7
    ours = Kernel(*quant.kernel_integers(kernel, bits), bits)
    factor = np.asarray([1, 2, -0.5, -1, 0, 1], np.float32)
    scaled = ours.scaled(factor)
    assert scaled.codes.max() < 2**bits and scaled.offset.any()
    assert (scaled.scale > 0).all()
    graph = Graph()
    name = graph.kernel("kernel", features_first(scaled, (3,), (2, 0, 1)))
    conv = graph.node("Conv", ["x", name], (), group=groups)
    graph.output(conv, "y")
    x = rng.normal(size=(2, 6, 8, 8)).astype(np.float32)
    found = run_onnx(finish(graph, x.shape, "y", [2, 6, 6, 6]), x)
    expected = jax.lax.conv_general_dilated(
        x,
        jnp.asarray(ours.dequantize() * factor),
        (1, 1),
        "VALID",
        dimension_numbers=("NCHW", "HWIO", "NCHW"),
        feature_group_count=groups,
    )
    np.testing.assert_allclose(found, expected, atol=2e-5)


def finish(graph, shape, output, output_shape):
    def value(name, dims):
        return onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, dims)

    return graph.model([value("x", shape)], [value(output, output_shape)], {})


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("ends", [(0, 3.3), (-0.7, 2.0), (1.0, 2.5), (-3, -1), (0, 0)])
def test_activations_on_any_range_are_rounded_as_ours(bits, ends):
    graph = Graph()
    parameters = codes.quantize_range(*ends, bits)
    x = np.random.default_rng(0).normal(size=(5000,)).astype(np.float32) * 3
    graph.output(graph.quantizer(Tensor("x", x.shape), parameters), "y")
    found = run_onnx(finish(graph, x.shape, "y", [5000]), x)
    expected = np.asarray(quant.fake_quant(x, *map(jnp.float32, ends), bits))
    step = parameters.scale
    # A tie may go to the other code: by one step, and rarely.
    off = np.abs(found - expected)
    assert off.max() <= 1.01 * step
    assert np.mean(off > 0.01 * step) <= 0.002


def onnx_of(function, variables, x, kernels=None, ranges=None):
    """What ONNX Runtime makes of a function of images [B, H, W, C]."""
    network = trace(function, variables, image_shape=x.shape[1:])
    own = kernels or {
        k: np.asarray(w) for k, w in all_kernels(network, variables).items()
    }
    graph = Graph()
    images = Tensor("x", (network.traced_batch, *x.shape[1:]), (0, 3, 1, 2))
    images = graph.node(
        "Transpose", ["x"], images.shape, images.order, perm=(0, 3, 1, 2)
    )
    y = translate(
        graph, network, images, variables=variables, kernels=own, ranges=ranges or {}
    )
    graph.output(y, "y")
    return run_onnx(finish(graph, x.shape, "y", [len(x), network.num_classes]), x)


def test_what_has_no_rule_is_refused_by_name():
    def function(variables, x):
        return jnp.sort(nn.relu(x).mean((1, 2)), -1) @ variables["w"]

    with pytest.raises(InputError, match="'sort'"):
        onnx_of(function, {"w": np.eye(3, dtype=np.float32)}, np.zeros((2, 4, 4, 3)))


def test_padding_slicing_pooling_and_relu6():
    """What shortcuts without a convolution and other networks' stems are made of."""

    def function(variables, x):
        y = nn.relu6(nn.max_pool(x, (3, 3), (2, 2), ((1, 1), (1, 1))))
        y = y + jnp.pad(x[:, ::2, ::2, :2], ((0, 0), (0, 0), (0, 0), (1, 0)))
        y = jnp.mean(y, (1, 2), keepdims=True).reshape(x.shape[0], -1)
        return y @ variables["w"]

    x = np.random.default_rng(0).normal(size=(2, 8, 8, 3)).astype(np.float32) * 4
    variables = {"w": np.eye(3, dtype=np.float32)}
    found = onnx_of(function, variables, x)
    np.testing.assert_allclose(found, function(variables, x), atol=1e-5)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_pooled_codes_are_of_a_type_that_onnx_runtime_pools(bits):
    """Between two quantized convolutions, as at the start of ImageNet's ResNets."""
    rng = np.random.default_rng(0)

    def function(variables, x):
        def conv(x, kernel):
            return jax.lax.conv_general_dilated(
                *(x, kernel, (1, 1), "VALID"),
                dimension_numbers=("NHWC", "HWIO", "NHWC"),
            )

        y = nn.max_pool(nn.relu(conv(x, variables["a"])), (3, 3), (2, 2))
        return conv(y, variables["b"]).reshape(x.shape[0], -1)

    real = {n: rng.normal(size=(3, 3, 4, 4)).astype(np.float32) / 4 for n in "ab"}
    kernels = {
        n: Kernel(*quant.kernel_integers(w, bits), bits) for n, w in real.items()
    }
    x = rng.normal(size=(2, 12, 12, 4)).astype(np.float32)
    found = onnx_of(
        function, real, x, kernels, {"b:input": codes.quantize_range(0.0, 3.0, bits)}
    )
    network = trace(function, real, image_shape=x.shape[1:])

    def activation(entry, y):
        return quant.fake_quant(y, jnp.float32(0), jnp.float32(3), bits)

    hooks = Hooks({n: k.dequantize() for n, k in kernels.items()}, activation)
    expected, _ = run(network, real, x, hooks)
    assert np.median(np.abs(found - expected)) < 1e-5


@pytest.mark.parametrize("width", [2, 4, 8])
def test_packed_codes_come_back(width):
    codes = np.random.default_rng(0).integers(0, 2**width, (3, 5, 7)).astype(np.uint8)
    packed = pack_codes(codes, width)
    assert packed.size == -(-codes.size * width // 8)
    np.testing.assert_array_equal(unpack(packed, codes.shape, width), codes)


@pytest.mark.parametrize("labelled", [0, 64, 1000])
def test_a_file_that_computes_something_else_is_not_written(
    save_tiny, tmp_path, monkeypatch, labelled
):
    """By top-1 alone it might be: that of a random network is 10 %."""
    rng, images = np.random.default_rng(0), None
    if labelled:
        pixels = rng.integers(0, 256, (labelled, *SHAPE)).astype(np.uint8)
        labels = rng.integers(0, 10, labelled).astype(np.int32)
        images = verify.Images(pixels, labels, "labelled images")
    file = save_tiny(4)

    def other(network, options, **kwargs):
        kernels = {
            name: dataclasses.replace(kernel, codes=kernel.codes[..., ::-1])
            for name, kernel in network.kernels.items()
        }
        return to_onnx(dataclasses.replace(network, kernels=kernels), options, **kwargs)

    monkeypatch.setattr(onnx_file, "to_onnx", other)
    with pytest.raises(ExportError, match=r"quantized\.onnx.*(random|labelled) images"):
        export.write_exports(file, tmp_path, Export(), images)
    assert jobs.tree(tmp_path) == [file.name]


def test_stablehlo_alone_needs_no_onnx_rule(save_tiny, tmp_path, monkeypatch):
    def refused(*_, **__):
        raise InputError("the network has 'sin', for which there is no ONNX rule")

    monkeypatch.setattr(onnx_file, "to_onnx", refused)
    record = export.write_exports(save_tiny(2), tmp_path, Export(onnx=False))
    assert set(record["files"]) == {"stablehlo"}
    assert record["float32_kind"] == "stablehlo"
    assert record["float32_bytes"] > 0
    text = (tmp_path / "model_card.md").read_text()
    assert "| as `quantized.stablehlo`, all in float32 |" in text


@pytest.mark.parametrize("kind", ["stablehlo", "onnx"])
def test_latencies_are_medians_of_calls_at_each_batch_size(
    save_tiny, monkeypatch, kind
):
    monkeypatch.setattr(verify, "LATENCY_BATCHES", {1: 3, 64: 1})
    network = quantized_file.load_quantized(save_tiny(4))
    options = Export(onnx=kind == "onnx", stablehlo=kind == "stablehlo")
    ((_, _, _, run, _),) = export._programs(network, options)
    sizes = []

    def counted(batch):
        sizes.append(len(batch))
        assert run(batch).shape == (len(batch), 10)

    found = latency_ms(counted, np.zeros((40, *SHAPE), np.float32))
    assert sizes == [1] * 4 + [64] * 2  # the first call of each compiles
    assert found.keys() == {"1", "64"} and min(found.values()) > 0


def logits_and_images(count, labels=True):
    """Logits of 10 classes, right on 90 % of the images."""
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(count, 10)).astype(np.float32)
    right = logits.argmax(-1)
    right[: count // 10] = (right[: count // 10] + 1) % 10
    return logits, verify.Images(logits, right if labels else None, "x")


def require(ours, theirs, images, *own):
    found = verify.compare(ours, theirs, images, verify.Differences(*own))
    verify.require_agreement("f", found)


def test_a_difference_in_top1_is_refused():
    """Of few images, whose logits agree in the median and the mean."""
    ours, images = logits_and_images(10_000)
    theirs = ours.copy()
    theirs[-9:] = -ours[-9:]
    require(ours, theirs, images)
    theirs[-20:] = -ours[-20:]
    with pytest.raises(ExportError, match=r"top-1 89\.80 % instead of 90\.00 %"):
        require(ours, theirs, images)
    # Of less images two standard errors more.
    last = verify.Images(ours, images.labels[-1000:], "x")
    theirs[-20:] = ours[-20:]
    theirs[-4:] = -ours[-4:]
    require(ours[-1000:], theirs[-1000:], last)


def test_a_little_on_every_image_is_refused_but_where_q_does_so():
    """As at 8 bits in 50 layers; never so much that an image is not told apart."""
    ours, images = logits_and_images(1000, labels=False)
    noise = np.random.default_rng(1).normal(size=ours.shape).astype(np.float32)
    theirs = ours + 0.05 * noise
    own = verify.differences(ours, ours + 0.04 * noise[::-1])
    with pytest.raises(ExportError, match=r"the median image's largest 0\.0"):
        require(ours, theirs, images)
    require(ours, theirs, images, *own)
    with pytest.raises(ExportError):
        require(ours, -ours, images, 100.0, 100.0, 1.0)


@pytest.mark.parametrize(("own", "refused"), [(0.0, True), (0.05, False)])
def test_other_classes_are_refused_but_where_q_has_them(own, refused):
    """As at 4 bits in 50 layers: other logits on one image in 25."""
    ours, images = logits_and_images(250, labels=False)
    theirs = ours.copy()
    theirs[::25] = ours[1::25]
    if not refused:
        return require(ours, theirs, images, 0.0, 0.0, own)
    with pytest.raises(ExportError, match="of the classes are Q's"):
        require(ours, theirs, images, 0.0, 0.0, own)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_what_is_not_finite_is_refused(value):
    ours, images = logits_and_images(250, labels=False)
    theirs = ours.copy()
    theirs[0, 0] = value
    with pytest.raises(ExportError):
        require(ours, theirs, images)


def test_the_card_names_the_recipe_and_what_is_float():
    info = NetworkInfo("mobilenetv2_w1", 10, SHAPE, (0.5,) * 3, (0.25,) * 3, 4, 4)
    run = dict.fromkeys(("dataset", "q_last_top1", "command"))
    run.update(recipe="gdfq", teacher="", teacher_sha256="abc", versions={})
    exported = {"files": {}, "file": "f", "bytes": 1, "sha256": "d", "versions": {}}

    def card(info, run):
        return model_card.model_card(info, graph_of(info), exported, run)

    text = card(info, run)
    assert "recipe `gdfq`" in text and "AdaDFQ" not in text
    # Those of 17 expansions' kernels but the first's, and the last convolution's.
    assert "the inputs of 17 of the 54 kernels, which no nonlinearity" in text
    assert "the input images" in text and "after every nonlinearity" in text
    assert "given from Python, SHA-256" in text and "``" not in text
    text = card(dataclasses.replace(info, places="all"), run)
    assert "# mobilenetv2_w1 W4A4 all activations" in text
    assert "whatever enters a convolution, a product or a sum" in text
    assert "17 of the 54" not in text and "input images" not in text
    info = dataclasses.replace(info, model="resnet20")
    text = card(info, {**run, "recipe": "adadfq_tuned"})
    assert "`adadfq_tuned` (AdaDFQ: " in text and "no nonlinearity precedes" not in text
    assert "which recipe is not known" in card(info, None)
