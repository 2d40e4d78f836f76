"""quantized.tflite: Q's integers, no float, the integer file's logits, refusals."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from onnx import numpy_helper

from adadfq_jax.deploy import export, quantized_file, verify
from adadfq_jax.deploy.network import NetworkInfo
from adadfq_jax.deploy.onnx_file import OnnxOptions, to_integer_onnx
from adadfq_jax.errors import InputError
from adadfq_jax.models import layers
from adadfq_jax.network import as_function
from adadfq_jax.settings import Export
from adadfq_jax.training import results, spec
from tests import programs, quantized

SHAPE = (16, 12, 3)
BITS = 4
PRODUCTS = ("CONV_2D", "DEPTHWISE_CONV_2D", "FULLY_CONNECTED")


class Small(nn.Module):
    """A depthwise convolution, ReLU6, a sum, pools, branches, two products."""

    @nn.compact
    def __call__(self, x):
        x = nn.relu6(layers.BatchNorm()(layers.Conv(8, stride=2)(x)))
        x = x + nn.Conv(8, (3, 3), feature_group_count=8)(x)
        x = nn.max_pool(nn.relu(x), (3, 3), (1, 1), ((1, 1), (1, 1)))
        branches = nn.relu6(nn.Conv(4, (1, 1))(x)), nn.Conv(4, (1, 1))(x)
        x = nn.relu(nn.Conv(6, (3, 3))(jnp.concatenate(branches, -1)))
        window = (1, 2, 2, 1)
        x = jax.lax.reduce_window(x, 0.0, jax.lax.add, window, window, "VALID") / 4.0
        x = x.mean((1, 2))
        return nn.Dense(10)(nn.relu(nn.Dense(12)(x)))


class Sines(nn.Module):
    """An operation that LiteRT's file has no rule for."""

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(4, (3, 3), (4, 4))(x))
        return nn.Dense(10)(jnp.arctan(x).mean((1, 2)))


def saved(module, folder, images):
    variables = jax.device_get(jax.jit(module.init)(jax.random.key(0), images))
    ends = (0.5,) * 3, (0.25,) * 3
    info = NetworkInfo("own", 10, SHAPE, *ends, BITS, BITS)
    file = folder / "quantized.safetensors"
    quantized.save(file, info, None, images, as_function(module, variables))
    return file, quantized_file.load_quantized(file, module)


def litert():
    """The converter and the interpreter; the test is left out without them."""
    programs.package(
        "litert_converter", "--no-deps litert-converter==0.5.0", required=False
    )
    programs.package("ai_edge_litert", "ai-edge-litert==2.3.0", required=False)
    from ai_edge_litert.interpreter import Interpreter

    from adadfq_jax.deploy import litert_file

    return litert_file.to_litert, Interpreter


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Q, its integer file, its .tflite file, an interpreter of it, and the images."""
    to_litert, interpreter_of = litert()
    images = np.random.default_rng(0).normal(size=(64, *SHAPE)).astype(np.float32)
    _, q = saved(Small(), tmp_path_factory.mktemp("q"), images)
    model = to_integer_onnx(q, OnnxOptions(), images).model
    content = to_litert(model, OnnxOptions(), SHAPE)
    interpreter = interpreter_of(model_content=content)
    interpreter.allocate_tensors()
    return q, model, content, interpreter, images


def tensors(interpreter):
    return {found["index"]: found for found in interpreter.get_tensor_details()}


def test_kernels_are_qs_codes_minus_their_zero_points(made):
    q, _, _, interpreter, _ = made
    known = tensors(interpreter)
    kernels = [
        known[found["inputs"][1]]
        for found in interpreter._get_ops_details()
        if found["op_name"] in PRODUCTS
    ]
    means = [x for x in kernels if (interpreter.get_tensor(x["index"]) == 127).all()]
    kernels = [found for found in kernels if found not in means]
    assert len(means) == 1  # of the average pooling
    for entry, found in zip(q.graph.kernels, kernels, strict=True):
        kernel = q.kernels[entry.name]
        steps = kernel.codes.astype(int) - kernel.zero_point.astype(int)
        own = found["quantization_parameters"]
        codes = interpreter.get_tensor(found["index"])
        assert codes.dtype == np.int8 and codes.min() >= -127
        assert not own["zero_points"].any() and len(own["scales"]) == steps.shape[-1]
        # [out, all others, inputs last]; a negative batch norm reverses a channel.
        codes = np.moveaxis(codes, own["quantized_dimension"], 0)
        codes = codes.reshape(steps.shape[-1], -1)
        steps = np.moveaxis(steps, -1, 0)
        steps = steps.reshape(codes.shape)
        assert ((codes == steps).all(1) | (codes == -steps).all(1)).all()


def test_only_the_quantizers_read_or_give_float(made):
    known = tensors(made[3])
    operators = made[3]._get_ops_details()
    for found in operators:
        kinds = {
            known[index]["dtype"]
            for index in (*found["inputs"], *found["outputs"])
            if index in known
        }
        if found["op_name"] not in ("QUANTIZE", "DEQUANTIZE", "DELEGATE"):
            assert not kinds & {np.float32, np.float64}, found["op_name"]
    names = [found["op_name"] for found in operators]
    assert names.count("CONV_2D") + names.count("DEPTHWISE_CONV_2D") == 6  # with a mean
    assert names.count("FULLY_CONNECTED") == 2
    assert names.count("DEQUANTIZE") == 1


def test_activations_have_the_integer_files_scales(made):
    _, model, _, interpreter, _ = made
    arrays = {x.name: numpy_helper.to_array(x) for x in model.graph.initializer}
    wanted = {
        (float(arrays[node.input[1]]), int(arrays[node.input[2]]) - 128)
        for node in model.graph.node
        if node.op_type == "QuantizeLinear"
    }
    found = {
        (float(own["scales"][0]), int(own["zero_points"][0]))
        for tensor in tensors(interpreter).values()
        for own in [tensor["quantization_parameters"]]
        if tensor["dtype"] == np.int8 and len(own["scales"]) == 1
    }
    assert len(found) > 5 and found <= wanted


def test_its_logits_are_the_integer_files(made):
    q, model, content, _, images = made
    theirs = verify.litert_runner(content)(images)
    plain = verify.onnx_runner(model.SerializeToString(), lambda x: x, optimized=False)(
        images
    )
    assert np.abs(theirs - plain).mean() < 0.01 * plain.std()
    assert np.corrcoef(theirs.ravel(), np.asarray(q(images)).ravel())[0, 1] > 0.9


def test_the_record_the_card_and_the_table_name_it(made, tmp_path):
    images = made[4]
    q = made[0]
    record = q.export(tmp_path, images, target="litert", pixels=True, layout="NCHW")
    found = record["files"]["litert"]
    assert found["input"] == "uint8 pixels NHWC" and set(found["latency_ms"]) == {
        "1",
        "64",
    }
    assert (tmp_path / found["file"]).stat().st_size == found["bytes"]
    assert export.are_whole(record, tmp_path)
    assert found["rounded_again"] == record["files"]["integer"]["rounded_again"]
    integer = record["files"]["integer"]["same_class"]
    assert abs(found["same_class"] - integer) <= 0.02
    assert (
        "`quantized.tflite` has the same integers"
        in (tmp_path / "model_card.md").read_text()
    )
    assert "tflite" in [row[0] for row in results._export_rows(record)]
    export.remove_exports(tmp_path)
    assert not (tmp_path / "quantized.tflite").exists()


def test_an_operation_without_a_rule_is_refused_by_name(tmp_path):
    litert()
    images = np.random.default_rng(0).normal(size=(8, *SHAPE)).astype(np.float32)
    _, q = saved(Sines(), tmp_path, images)
    with pytest.raises(InputError, match="'Atan', for which there is no LiteRT rule"):
        q.export(tmp_path / "out", images, target="litert")
    assert not list((tmp_path / "out").iterdir())


def test_missing_packages_are_named_in_one_line(tmp_path, monkeypatch):
    are_installed = export.extras.are_installed
    monkeypatch.setattr(
        export.extras,
        "are_installed",
        lambda *names: "litert" not in names[0] and are_installed(*names),
    )
    quantized.save_tiny(tmp_path, 4)
    with pytest.raises(InputError, match="pip install --no-deps litert-converter"):
        export.write_exports(
            tmp_path / "quantized.safetensors",
            tmp_path,
            Export(target="litert"),
        )


def test_it_is_not_made_without_the_integer_file():
    export_settings = {"target": "litert", "integer": False}
    with pytest.raises(InputError, match="made from the integer file"):
        spec.resolve({"export": export_settings})
