"""EfficientNet-Lite0: a network of Flax's own layers, traced as it is."""

import functools
import math

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from adadfq_jax import models, teacher
from adadfq_jax.deploy import quantized_file
from adadfq_jax.errors import InputError
from adadfq_jax.models.efficientnet_lite import ConvNorm
from adadfq_jax.network import trace
from adadfq_jax.teacher import naming
from tests import helpers
from tests.golden.fill import noise

NAME = "tf_efficientnet_lite0"
IMAGE = (224, 224, 3)
SCHEMES = ("EfficientNet-PyTorch", "timm")


@pytest.fixture(autouse=True)
def strict():
    """Nothing: Flax's own layers broadcast."""


@pytest.fixture(scope="module")
def variables():
    shapes = helpers.variable_shapes(NAME, 1000, IMAGE)

    def small(path, leaf):
        values = noise("efficientnet" + jax.tree_util.keystr(path), leaf.shape) / 10
        return 1 + abs(values) if path[-1].key in ("var", "scale") else values

    return jax.tree_util.tree_map_with_path(small, shapes)


@functools.cache
def key_names(scheme):
    """Key -> path."""
    shapes = helpers.variable_shapes(NAME, 1000, IMAGE)
    return naming.keys(NAME, scheme, flax.traverse_util.flatten_dict(shapes))


def state_dict(variables, scheme):
    """What a PyTorch file of that scheme has."""
    flat = flax.traverse_util.flatten_dict(variables)
    layout = {4: (3, 2, 0, 1), 2: (1, 0), 1: (0,)}
    return {
        key: np.ascontiguousarray(flat[path].transpose(layout[flat[path].ndim]))
        for key, path in key_names(scheme).items()
    }


def test_what_is_found_in_it():
    model = models.get_model(NAME, num_classes=1000)
    shapes = helpers.variable_shapes(NAME, 1000, IMAGE)
    graph = trace(model.apply, shapes, image_shape=IMAGE)
    assert len(graph.kernels) == 50
    assert len(graph.activations) == 33
    assert len(graph.batch_norms) == 49
    assert not graph.notes and not graph.products
    assert graph.num_classes == 1000
    # The first layer; the expansions and the head, which follow linear projections.
    reasons = [kernel.reason for kernel in graph.kernels if kernel.reason]
    assert len(reasons) == 1 + 16 and reasons[0] == "the image"
    assert all(reason.startswith("the linear output of") for reason in reasons[1:])
    assert sum(kernel.multiplications for kernel in graph.kernels) == 385_187_552


def test_its_size_is_the_published_one():
    shapes = helpers.variable_shapes(NAME, 1000, IMAGE)
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes["params"])) == 4_652_008


@pytest.mark.parametrize(
    ("scheme", "keys"),
    [
        (
            "EfficientNet-PyTorch",
            {
                "_conv_stem.weight": (32, 3, 3, 3),
                "_bn0.running_var": (32,),
                "_blocks.0._depthwise_conv.weight": (32, 1, 3, 3),
                "_blocks.0._bn2.weight": (16,),
                "_blocks.1._expand_conv.weight": (96, 16, 1, 1),
                "_blocks.3._depthwise_conv.weight": (144, 1, 5, 5),
                "_blocks.15._bn0.running_mean": (1152,),
                "_blocks.15._project_conv.weight": (320, 1152, 1, 1),
                "_conv_head.weight": (1280, 320, 1, 1),
                "_bn1.bias": (1280,),
                "_fc.weight": (1000, 1280),
                "_fc.bias": (1000,),
            },
        ),
        (
            "timm",
            {
                "conv_stem.weight": (32, 3, 3, 3),
                "bn1.running_var": (32,),
                "blocks.0.0.conv_dw.weight": (32, 1, 3, 3),
                "blocks.0.0.conv_pw.weight": (16, 32, 1, 1),
                "blocks.0.0.bn2.weight": (16,),
                "blocks.1.0.conv_pw.weight": (96, 16, 1, 1),
                "blocks.2.0.conv_dw.weight": (144, 1, 5, 5),
                "blocks.6.0.bn1.running_mean": (1152,),
                "blocks.6.0.conv_pwl.weight": (320, 1152, 1, 1),
                "conv_head.weight": (1280, 320, 1, 1),
                "bn2.bias": (1280,),
                "classifier.weight": (1000, 1280),
                "classifier.bias": (1000,),
            },
        ),
    ],
)
def test_files_in_others_names_are_recognised(variables, scheme, keys, tmp_path):
    arrays = state_dict(variables, scheme)
    assert {key: arrays[key].shape for key in keys} == keys
    path = tmp_path / "tf_efficientnet_lite0.safetensors"
    safetensors.numpy.save_file(arrays, path)
    loaded, found = teacher.read(path)
    assert (found.model, found.scheme) == (NAME, scheme)
    assert bool(found.note) is (scheme == "timm")
    jax.tree.map(np.testing.assert_array_equal, loaded, variables)
    named = teacher.load(path, NAME)
    jax.tree.map(np.testing.assert_array_equal, named, variables)


def test_a_written_file_is_recognised(variables, tmp_path):
    path = tmp_path / "efficientnet_lite0.safetensors"
    teacher.save(path, variables, {}, NAME)
    loaded, found = teacher.read(path)
    assert found[:3] == (NAME, "EfficientNet-PyTorch", "")
    jax.tree.map(np.testing.assert_array_equal, loaded, variables)


FORMS = ("efficientnet_lite0", "tf_efficientnet_lite0")


def test_the_file_s_name_or_the_setting_tells_the_forms_apart(variables, tmp_path):
    """They have the same names and shapes in timm."""
    arrays = state_dict(variables, "timm")
    for model in FORMS:
        path = tmp_path / f"{model}_ra-37913777.safetensors"
        safetensors.numpy.save_file(arrays, path)
        assert teacher.read(path)[1].model == model
    path = tmp_path / "best-TF-EfficientNet-Lite0.safetensors"
    safetensors.numpy.save_file(arrays, path)
    assert teacher.read(path)[1].model == "tf_efficientnet_lite0"
    for name in ("mine.safetensors", "pytorch_model.safetensors"):
        path = tmp_path / name
        safetensors.numpy.save_file(arrays, path)
        with pytest.raises(InputError) as caught:
            teacher.read(path)
        for text in (*FORMS, "different functions", "teacher.model"):
            assert text in str(caught.value)
        for model in FORMS:
            assert teacher.read(path, model)[1].model == model


def test_the_forms_are_different_functions(variables):
    images = jnp.asarray(noise("images", (2, 32, 32, 3)))
    logits = [
        jax.jit(models.get_model(name, num_classes=1000).apply)(variables, images)
        for name in FORMS
    ]
    assert np.abs(logits[0] - logits[1]).max() > 0.01 * np.abs(logits[0]).max()


@pytest.mark.parametrize(("size", "stride"), [(3, 2), (5, 2), (3, 1), (5, 1)])
def test_padding_of_the_other_form_is_pytorch_s(size, stride):
    x = jnp.asarray(noise("x", (2, 16, 16, 6)))
    layer = ConvNorm(6, size, stride, groups=6, symmetric=True)
    made = layer.init(jax.random.key(0), x)
    expected = jax.lax.conv_general_dilated(
        x,
        made["params"]["conv"]["kernel"],
        (stride, stride),
        ((size // 2, size // 2),) * 2,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=6,
    )
    np.testing.assert_allclose(
        layer.apply(made, x), expected / np.sqrt(1 + 1e-5), rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize(
    ("name", "parameters", "units"),
    [
        ("tf_efficientnet_lite1", 5_416_680, (1, 3, 3, 4, 4, 5, 1)),
        ("tf_efficientnet_lite2", 6_092_072, (1, 3, 3, 4, 4, 5, 1)),
    ],
)
def test_larger_ones_have_the_published_sizes(name, parameters, units):
    shapes = naming.shapes(name, 1000, IMAGE)
    found = sum(math.prod(s.shape) for p, s in shapes.items() if p[0] == "params")
    assert found == parameters
    stages = models.get_model(name, num_classes=1000).stages
    assert tuple(stage.units for stage in stages) == units


@pytest.mark.parametrize(
    ("scheme", "more"),
    [
        ("EfficientNet-PyTorch", "_blocks.0._se_reduce.weight"),
        ("timm", "blocks.0.0.se.conv_reduce.weight"),
        ("EfficientNet-PyTorch", "_blocks.16._bn1.weight"),
        ("timm", "blocks.1.2.conv_dw.weight"),
    ],
)
def test_its_relatives_are_not_taken_for_it(scheme, more):
    with pytest.raises(InputError, match=f"unknown network: {scheme} naming"):
        teacher.recognise([*key_names(scheme), more])


def test_names_of_none_are_refused_in_those_of_its_own_file():
    arrays = {"a.weight": np.zeros(1, np.float32)}
    with pytest.raises(InputError, match=f"{NAME} in EfficientNet-PyTorch naming"):
        teacher.from_state_dict(arrays, NAME)


def test_logits(variables):
    model = models.get_model(NAME, num_classes=1000)
    # Of a small image: the network takes any, and this is soon compiled.
    images = jnp.asarray(noise("images", (2, 32, 32, 3)))
    logits = jax.jit(model.apply)(variables, images)
    assert logits.shape == (2, 1000) and logits.dtype == jnp.float32
    assert np.isfinite(logits).all() and not np.array_equal(logits[0], logits[1])


@pytest.mark.parametrize(
    ("size", "stride", "pads"),
    [(3, 2, (0, 1)), (5, 2, (1, 2)), (3, 1, (1, 1)), (5, 1, (2, 2))],
)
def test_padding_is_tensorflow_s(size, stride, pads):
    x = jnp.asarray(noise("x", (2, 16, 16, 6)))
    layer = ConvNorm(6, size, stride, groups=6)
    made = layer.init(jax.random.key(0), x)
    kernel = made["params"]["conv"]["kernel"]
    assert jax.lax.padtype_to_pads((16,), (size,), (stride,), "SAME") == [pads]
    expected = jax.lax.conv_general_dilated(
        x,
        kernel,
        (stride, stride),
        (pads, pads),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=6,
    )
    # Fresh statistics are 0 and 1: only epsilon is left of the batch norm.
    found = layer.apply(made, x)
    np.testing.assert_allclose(
        found, expected / np.sqrt(1 + 1e-3), rtol=1e-5, atol=1e-6
    )


def test_quantized_files_keep_the_names_that_they_had():
    """TensorFlow's form had the plain name before there was another one."""
    header = {
        "num_classes": 10,
        "image_shape": [32, 32, 3],
        "mean": [0.5] * 3,
        "std": [0.5] * 3,
        "weight_bits": 4,
        "act_bits": 4,
    }
    names = quantized_file.NAMES_IN_FILES
    assert names["tf_efficientnet_lite0"] == "efficientnet_lite0"
    for here, there in {**names, "resnet20": "resnet20"}.items():
        assert quantized_file._read_info({**header, "model": there}).model == here
