"""ImageNet's networks and everybody's naming schemes against recorded outputs."""

import functools
import re
from typing import NamedTuple

import jax
import numpy as np
import pytest
import safetensors.numpy

from adadfq_jax import losses, models, quant, teacher
from adadfq_jax.errors import InputError
from adadfq_jax.game import players
from adadfq_jax.models import layers
from adadfq_jax.network import named
from adadfq_jax.network import statistics as running_statistics
from adadfq_jax.teacher import naming, search
from tests import helpers
from tests.golden.fill import noise


class Record(NamedTuple):
    """What a recorded state dict is of. statistics: recorded means and variances."""

    model: str
    scheme: str
    statistics: int
    tolerance: float = 1e-5


RECORDS = {
    "resnet18": Record("resnet18", "pytorchcv", 14),
    "resnet50": Record("resnet50", "pytorchcv", 14),
    "mobilenetv2_w1": Record("mobilenetv2_w1", "pytorchcv", 14, 3e-5),
    "import_torchvision_resnet18": Record("resnet18", "torchvision", 2),
    "import_timm_resnet18": Record("resnet18", "torchvision", 2),
    "import_torchvision_resnet50": Record("resnet50b", "torchvision", 2),
    "import_timm_resnet50": Record("resnet50b", "torchvision", 2),
    "import_torchvision_mobilenet_v2": Record("mobilenet_v2", "torchvision", 0, 3e-5),
    "import_timm_mobilenetv2_100": Record("mobilenet_v2", "timm", 0, 3e-5),
    "import_he_resnet20": Record("resnet20a", "He", 2),
}


def filled(record):
    return helpers.filled_state_dict(record, record.removeprefix("import_"))


def images(record):
    cifar = RECORDS[record].model == "resnet20a"
    shape = (8, 3, 32, 32) if cifar else (2, 3, 224, 224)
    return noise("x" + record.removeprefix("import_"), shape).transpose(0, 2, 3, 1)


def graph_for(record, classes):
    return helpers.graph(RECORDS[record].model, classes, images(record).shape[1:])


@functools.cache
def compiled(graph):
    """P with its batch norms' statistics: compiled once for every record of it."""
    return jax.jit(functools.partial(players.p_forward, graph))


@pytest.mark.parametrize("record", RECORDS)
def test_recorded_networks(record):
    golden, state_dict = helpers.load_npz(record), filled(record)
    model, scheme, statistics, tolerance = RECORDS[record]
    found = teacher.recognise(state_dict)
    assert (found.model, found.scheme) == (model, scheme)
    assert ("teacher.model=resnet50" in found.note) is (model[:8] == "resnet50")

    variables = named(teacher.from_state_dict(state_dict))
    graph = graph_for(record, golden["logits"].shape[1])
    logits, moments = compiled(graph)(variables, images(record))
    helpers.assert_close(logits, golden["logits"], tolerance)

    flat = {
        ("batch_stats", *norm.split("."), kind): leaf
        for norm, found in moments.items()
        for kind, leaf in found.items()
    }
    paths = naming.keys(model, scheme, flat)
    recorded = [key for key in golden if key.startswith("bn_")]
    assert len(recorded) == statistics
    for key in recorded:
        kind, layer = key.removeprefix("bn_").split(".", 1)
        there = flat[paths[f"{layer}.running_{kind}"]]
        helpers.assert_close(there, golden[key], tolerance)
    if "bns_loss" in golden:
        loss = losses.bn_stats_loss(moments, running_statistics(graph, variables))
        helpers.assert_close(loss, golden["bns_loss"], tolerance)


@pytest.mark.parametrize("network", ["resnet18", "resnet50", "mobilenetv2_w1"])
def test_recorded_quantized_networks(network):
    golden, x = helpers.load_npz(network), images(network)
    variables = named(teacher.from_state_dict(filled(network)))
    observe = functools.partial(helpers.observe, graph_for(network, 1000), bits=4)
    logits, found = jax.jit(observe)(variables, x)
    assert len(found) == len(golden["act_names"])
    if network == "mobilenetv2_w1":
        np.testing.assert_allclose(found[:, 1], 6, rtol=1e-6)
    else:
        helpers.assert_close(found[:20], golden["q4_ranges"][:20], 1e-4)
    # A single rounding that flips spreads over the rest of its image.
    for ours, theirs in zip(np.asarray(logits), golden["q4_logits"], strict=True):
        assert np.corrcoef(ours, theirs)[0, 1] >= 0.99
        assert np.linalg.norm(ours - theirs) <= 0.15 * np.linalg.norm(theirs)
    if network == "resnet18":  # shallow enough for an image without any
        helpers.assert_close(logits[0], golden["q4_logits"][0], 1e-5)


# Of networks that differ in their depth alone, one or two.
OF_MANY = re.compile(r"resnet(44|110)a?|resnet34_cifar|vgg1[39].*|.*lite1|tiny")
NETWORKS = [name for name in models.names() if not OF_MANY.fullmatch(name)]
LAYOUTS = {4: (3, 2, 0, 1), 2: (1, 0), 1: (0,)}


@pytest.mark.parametrize("model", NETWORKS)
def test_every_network_in_every_scheme_is_recognised(model):
    paths = naming.shapes(model, 10)
    for scheme in naming.schemes(model):
        keys = naming.keys(model, scheme, paths)
        assert len(keys) == len(paths)
        if (model, scheme) in [
            ("resnet50", "torchvision"),
            ("resnet50", "He"),
            ("resnet50", "Hugging Face"),
            ("resnet50", "nn.Sequential"),
            ("resnet50b", "pytorchcv"),
            ("mobilenetv2_w1", "torchvision"),
            ("mobilenetv2_w1", "timm"),
        ]:
            continue  # a form that no file in that scheme has
        entries = {}
        for key, path in keys.items():
            shape = paths[path].shape
            layout = [shape[axis] for axis in LAYOUTS[len(shape)]]
            entries[f"any.{key}"] = jax.ShapeDtypeStruct(layout, np.float32)
        found = search.find(entries, file=f"{model}.pth")
        assert (found.model, found.scheme) == (model, scheme)
        assert set(found.names) == set(paths) and not found.left_out


@pytest.mark.parametrize("model", ["resnet50b", "mobilenet_v2", "resnet32a"])
def test_written_files_are_recognised_as_what_they_are(model, tmp_path):
    shapes = helpers.variable_shapes(model, 10, (32, 32, 3))
    variables = jax.tree.map(lambda leaf: noise("w", leaf.shape), shapes)
    teacher.save(tmp_path / "p.safetensors", variables, {}, model)
    loaded, found = teacher.read(tmp_path / "p.safetensors")
    assert found.model == model
    jax.tree.map(np.testing.assert_array_equal, loaded, variables)


def test_the_stride_of_resnet50_can_be_overridden():
    state_dict = filled("resnet50")
    ours = teacher.from_state_dict(state_dict, "resnet50b")
    theirs = teacher.from_state_dict(state_dict)
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)


def test_depthwise_kernels_are_quantized_filter_by_filter():
    kernel = noise("k", (3, 3, 1, 5)) * np.arange(1, 6)
    found = np.asarray(quant.fake_quant_kernel(kernel, 3))
    for channel in range(5):
        filter_ = kernel[..., channel]
        alone = quant.fake_quant(filter_, filter_.min(), filter_.max(), 3)
        np.testing.assert_allclose(found[..., channel], alone, rtol=1e-6)
        assert len(np.unique(found[..., channel])) <= 8


@pytest.mark.parametrize("stride", [1, 2])
def test_groups_convolve_their_own_channels(stride):
    x, kernel = noise("x", (2, 6, 6, 6)), noise("k", (3, 3, 2, 9))
    layer = layers.Conv(9, 3, stride, groups=3)
    found = layer.apply({"params": {"kernel": kernel}}, x)
    alone = layers.Conv(3, 3, stride)
    for group in range(3):
        share = alone.apply(
            {"params": {"kernel": kernel[..., 3 * group : 3 * group + 3]}},
            x[..., 2 * group : 2 * group + 2],
        )
        helpers.assert_close(found[..., 3 * group : 3 * group + 3], share, 1e-6)


def drop_units(keys, unit):
    return [key for key in keys if unit not in key]


@pytest.mark.parametrize(
    ("names", "named"),
    [
        (["a.weight", "b.bias"], "unknown naming: keys as a.weight, b.bias"),
        (["fc.weight", "fc.bias"], "unknown naming"),
        (
            drop_units(helpers.load_shapes("import_timm_resnet50"), "layer3.5."),
            r"unknown network: torchvision naming, stages of \(3, 4, 5, 3\) units",
        ),
    ],
)
def test_unknown_networks_are_refused(names, named):
    with pytest.raises(InputError, match=named):
        teacher.recognise(names)


def test_a_wider_network_of_the_same_names_is_refused():
    state_dict = filled("import_timm_mobilenetv2_100")
    state_dict["bn2.bias"] = np.zeros(1792, np.float32)
    with pytest.raises(InputError, match=r"bn2\.bias .*does not fit mobilenet_v2"):
        teacher.from_state_dict(state_dict)


def test_ports_from_tensorflow_are_refused(tmp_path):
    path = tmp_path / "tf_mobilenetv2_100.safetensors"
    safetensors.numpy.save_file(filled("import_timm_mobilenetv2_100"), path)
    with pytest.raises(InputError, match=r"tf_mobilenetv2.*epsilon"):
        teacher.load(path)
