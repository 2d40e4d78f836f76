"""Checkpoints as training scripts write them: a known network in any wrapping."""

import argparse
import collections
import dataclasses
import functools
import pathlib
import types

import jax
import numpy as np
import pytest
import safetensors.numpy

from adadfq_jax import teacher
from adadfq_jax.errors import InputError
from adadfq_jax.teacher import naming, search
from tests import helpers, torch_files
from tests.torch_files import Made, Named, Tensor, save, tensors

MODEL = "resnet20a"


@functools.cache
def arrays():
    """The state dict of a ResNet-20 in the names of many scripts."""
    filled = helpers.filled_state_dict("import_he_resnet20", "he_resnet20")
    return {name: np.asarray(array, np.float32) for name, array in filled.items()}


@functools.cache
def expected():
    return teacher.from_state_dict(arrays(), MODEL)


def weights(prefix="", **kwargs):
    return tensors(arrays(), prefix, **kwargs)


def body_and_head(body="backbone.", head="head.", bias=True):
    """The same network with its last layer under another name."""
    renamed = {}
    for name, array in arrays().items():
        if not name.startswith("linear."):
            renamed[body + name] = array
        elif bias or name.endswith("weight"):
            renamed[name.replace("linear.", head)] = array
    return renamed


def assert_loaded(path, key="", model=MODEL):
    variables, found = teacher.read(path, key=key)
    assert found.model == model
    jax.tree.map(np.testing.assert_array_equal, variables, expected())
    return teacher.note_on(found)


def refused(path, *texts, model="", key=""):
    with pytest.raises(InputError) as caught:
        teacher.read(path, model, key)
    message = str(caught.value)
    assert str(path) in message and "\n" not in message and len(message) < 1200
    for text in texts:
        assert text in message, message
    return message


@pytest.mark.parametrize(
    "prefix",
    [
        "module.",
        "_orig_mod.",
        "model.",
        "module._orig_mod.",
        "_orig_mod.module.",
        "model._orig_mod.module.",
        "model.module.net.",
        "lightning_module.student.encoder.0.",
        "my_own-name.",
    ],
)
def test_any_prefix(tmp_path, prefix):
    assert_loaded(save(tmp_path / "p.pth", weights(prefix)))
    plain = {prefix + name: array for name, array in arrays().items()}
    safetensors.numpy.save_file(plain, tmp_path / "p.safetensors")
    assert_loaded(tmp_path / "p.safetensors")


def test_wrappers_within_the_names(tmp_path):
    """As of torch.compile or DataParallel on a part of the network."""
    inner = {}
    for name, array in arrays().items():
        first, _, rest = name.partition(".")
        put = {"layer1": "_orig_mod.", "layer3": "module._orig_mod."}.get(first, "")
        inner[f"{first}.{put}{rest}"] = array
    assert_loaded(save(tmp_path / "p.pth", tensors(inner)))


@pytest.mark.parametrize(
    "wrap",
    [
        lambda w: {"state_dict": w, "epoch": 3},
        lambda w: {"net": w, "acc": 91.3, "epoch": 199},
        lambda w: {"model_state_dict": w, "optimizer_state_dict": {"state": {}}},
        lambda w: {"whatever": {"deeper": {"and_deeper": {"still": {"x": {"y": w}}}}}},
        lambda w: [3, w],
        lambda w: ({"lr": 0.1}, {"weights": [w]}),
        lambda w: {2: {None: w}},
        lambda w: collections.defaultdict(None, {"sd": w}),
        lambda w: Made("collections OrderedDict", ([[k, w[k]] for k in w],)),
        lambda w: Made("easydict EasyDict", (), {}, {"model": w}, None, "NEWOBJ"),
    ],
)
@pytest.mark.parametrize("legacy", [False, True])
def test_any_mapping_around(tmp_path, wrap, legacy):
    assert_loaded(save(tmp_path / "p.pt", wrap(weights("module.")), legacy=legacy))


@dataclasses.dataclass
class Settings:
    """Of a script: a class that nobody else has."""

    rate: float = 0.1


class Meter:
    """The same, with slots."""

    __slots__ = ("value",)

    def __init__(self):
        self.value = 2


BESIDE = {
    "namespace": argparse.Namespace(lr=0.1, device="cuda"),
    "counter": collections.Counter({"a": 2}),
    "numpy scalar": np.float64(0.5),
    "numpy array": np.arange(5.0),
    "numpy integers": np.arange(5),
    "set": {1, 2},
    "frozen set": frozenset({(1, 2)}),
    "own class": Settings(),
    "own slots": Meter(),
    "path": pathlib.PosixPath("/data"),
    "tuple key": {(1, 2): 3},
    "big number": 2**200,
    "bytes": b"\xff\xfe",
    "range": range(3),
    "complex": 1j,
    "namespace type": types.SimpleNamespace(a=1),
    "deque": collections.deque([1, 2]),
    "class": Settings,
    "history": [0.5] * 2000,
    "module": Made("nowhere Net", (), {"_modules": {}}, None, None, "NEWOBJ"),
    "list of own": Made("nowhere List", (), {}, None, [1, 2], "NEWOBJ"),
    "old class": Made("nowhere Old", (1,), None, None, None, "OBJ"),
    "older class": Made("nowhere Old", (), {"x": 1}, None, None, "INST"),
    "call": Made("os system", ("touch executed",)),
    "device": Made("torch device", ("cuda", 0)),
    "dtype": Named("torch float32"),
    "quantized": Made("torch._utils _rebuild_qtensor", ((), 0, (), ())),
}


@pytest.mark.parametrize("protocol", [1, 2, 3, 4, 5])
def test_objects_beside_the_weights_do_nothing(tmp_path, protocol, monkeypatch):
    monkeypatch.chdir(tmp_path)
    root = {"state_dict": weights(), **BESIDE}
    if protocol == 1:
        root.pop("own slots")
    assert_loaded(save(tmp_path / "p.pth", root, protocol=protocol))
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("name", [n for n in BESIDE if n not in ("tuple key",)])
def test_an_object_in_place_of_a_tensor_is_named(tmp_path, name):
    wrong = {**weights("model."), "model.layer2.0.bn1.weight": BESIDE[name]}
    path = save(tmp_path / "p.pth", {"state_dict": wrong})
    refused(path, "state_dict.model.layer2.0.bn1.weight is a", "not a tensor")


@pytest.mark.parametrize("key", ["linear.weight", "linear.bias", "conv1.weight"])
def test_in_the_last_and_the_first_layer_too(tmp_path, key):
    wrong = {**weights("model."), f"model.{key}": BESIDE["numpy array"]}
    refused(save(tmp_path / "p.pth", wrong), f"model.{key} is a numpy", "not a tensor")


@pytest.mark.parametrize("kind", ["parameter", "with state", "subclass"])
def test_parameters_are_tensors(tmp_path, kind):
    assert_loaded(save(tmp_path / "p.pth", weights(kind=kind)))


@pytest.mark.parametrize(
    ("body", "head"),
    [
        ("backbone.", "head."),
        ("backbone.", "classifier.1."),
        ("encoder.module.", "head.fc."),
        ("", "dense."),
        ("", "my_layer."),
        ("model.0.", "model.1."),
        ("net.features.", "net.dense."),
    ],
)
def test_a_body_with_its_head_beside_it(tmp_path, body, head):
    renamed = body_and_head(body, head)
    path = save(tmp_path / "p.pth", {"state_dict": tensors(renamed)})
    assert f"its last layer is state_dict.{head}weight" in assert_loaded(path)
    safetensors.numpy.save_file(renamed, tmp_path / "p.safetensors")
    assert_loaded(tmp_path / "p.safetensors")


def test_a_body_and_a_head_in_mappings_of_their_own(tmp_path):
    split = body_and_head("", "")
    head = {name: split.pop(name) for name in ("weight", "bias")}
    root = {"body": tensors(split), "cls": tensors(head), "step": 3}
    assert_loaded(save(tmp_path / "p.pth", root))


def test_a_head_without_bias(tmp_path):
    path = save(tmp_path / "p.pth", tensors(body_and_head(bias=False)))
    variables, _ = teacher.read(path)
    np.testing.assert_array_equal(variables["params"]["output"]["bias"], np.zeros(10))
    misnamed = {**body_and_head(bias=False), "head.b": arrays()["linear.bias"]}
    refused(save(path, tensors(misnamed)), "missing 1: head.bias")


HEADS = {
    "two layers": ({"head.1.weight": (64, 64), "head.3.weight": (10, 64)}, "several"),
    "a hidden layer": (
        {"fc1.weight": (32, 64), "fc2.weight": (10, 32)},
        "more than one layer behind its body",
    ),
    "a norm": (
        {"fc.weight": (10, 64), "neck.running_mean": (64,)},
        "neck.running_mean stands beside fc.weight",
    ),
    "a layer after the body's own last one": (
        {
            "backbone.fc.weight": (100, 64),
            "backbone.fc.bias": (100,),
            "head.weight": (10, 100),
        },
        "head.weight stands beside backbone.fc.weight",
    ),
    "no head": ({}, "without its last layer"),
    "two heads": ({"a.weight": (10, 64), "b.weight": (3, 64)}, "a.weight, b.weight"),
}


@pytest.mark.parametrize(("more", "said"), HEADS.values(), ids=HEADS)
def test_heads_that_are_not_one_layer_are_refused(tmp_path, more, said):
    made = {n: a for n, a in body_and_head().items() if not n.startswith("head.")}
    made |= {name: np.zeros(shape, np.float32) for name, shape in more.items()}
    refused(save(tmp_path / "p.pth", tensors(made)), said)


def test_what_is_left_out_is_named(tmp_path):
    root = {
        "state_dict": {
            **weights("model."),
            "criterion.weight": Tensor(np.ones(10, np.float32)),
            "projector.0.weight": Tensor(np.ones((3, 64), np.float32)),
        },
        "optimizer": {
            "state": {i: {"exp_avg": Tensor(np.ones(3, np.float32))} for i in range(9)}
        },
    }
    told = assert_loaded(save(tmp_path / "p.pth", root))
    assert "tensors left out 11: " in told
    for name in ("state_dict.criterion.weight", "state_dict.projector.0.weight"):
        assert name in told
    assert "optimizer.* (9)" in told


@pytest.mark.parametrize(
    ("model", "scheme"),
    [
        ("mobilenet_v2", "torchvision"),
        ("vgg11_bn_cifar", "torchvision"),
        ("resnet18", "nn.Sequential"),
        ("resnet18", "Hugging Face"),
    ],
)
def test_what_stands_beside_is_no_part_of_any_body(model, scheme):
    """Also where the names in the body begin with numbers."""
    names = naming.keys(model, scheme, naming.shapes(model, 7))
    shapes = {n: naming.shapes(model, 7)[path] for n, path in names.items()}
    shapes = {n: x.update(shape=x.shape[::-1]) for n, x in shapes.items()}
    other = next(iter(shapes.values()))
    beside = ["optimizer.state.0.exp_avg", "ema.n_averaged", "7.scale"]
    entries = {f"net.module.{n}": x for n, x in shapes.items()}
    entries |= {f"ema.module.{n}": x for n, x in shapes.items()}
    found = search.find({**entries, **dict.fromkeys(beside, other)})
    assert found.model == model and found.left_out == tuple(beside)
    assert "teacher.key chooses others: ema.module" in found.note


def test_the_counts_of_profilers_are_no_part_of_a_body(tmp_path):
    one = Tensor(np.zeros(1))
    counts = {"total_ops": one, "layer1.0.conv1.total_params": one}
    assert_loaded(save(tmp_path / "p.pth", {**weights(), **counts}))


@pytest.mark.parametrize("more", ["layer1.0.se.fc.weight", "layer1.3.conv1.weight"])
def test_more_in_the_body_is_another_network(tmp_path, more):
    made = {**arrays(), more: np.zeros((4, 4), np.float32)}
    path = save(tmp_path / "p.pth", tensors(made, "model."))
    refused(path, more, model=MODEL)
    refused(path, "network" if "se" not in more else more)


def averaged():
    return {name: array + 1 for name, array in arrays().items()}


@pytest.mark.parametrize(
    ("plain", "average", "prefix"),
    [
        ("state_dict", "state_dict_ema", ""),
        ("model", "model_ema", "module."),
        ("net", "ema.shadow", ""),
        ("student", "teacher", "backbone."),
        ("online_net", "target_net", ""),
        ("model", "swa_model", "module."),
    ],
)
def test_weights_and_their_average(tmp_path, plain, average, prefix):
    inner = tensors(averaged(), prefix)
    for part in reversed(average.split(".")[1:]):
        inner = {part: inner}
    root = {average.split(".")[0]: inner, plain: weights(prefix)}
    path = save(tmp_path / "p.pth", root)
    told = assert_loaded(path)
    assert f"the weights under {plain}" in told and average in told
    variables, found = teacher.read(path, key=average)
    np.testing.assert_array_equal(
        variables["params"]["output"]["bias"], averaged()["linear.bias"]
    )
    assert plain in teacher.note_on(found)
    refused(path, "teacher.key='nope'", plain, average, key="nope")


def test_the_same_weights_under_two_keys_are_one_set(tmp_path):
    shared = weights()
    path = save(tmp_path / "p.pth", {"model": shared, "state_dict": shared})
    assert "left out" not in assert_loaded(path)


def test_the_average_alone_is_taken(tmp_path):
    average = weights()
    path = save(tmp_path / "p.pth", {"ema_state_dict": average})
    told = "the weights under ema_state_dict, an average by that name: no plain weights"
    assert assert_loaded(path).startswith(told)
    plain = {name: x for name, x in weights().items() if "running" not in name}
    path = save(tmp_path / "q.pth", {"model": plain, "ema_state_dict": average})
    assert assert_loaded(path).startswith(told)
    assert told not in assert_loaded(path, key="ema_state_dict")


def test_two_sets_of_which_none_is_plain_need_the_key(tmp_path):
    root = {"first": weights(), "second": tensors(averaged())}
    path = save(tmp_path / "p.pth", root)
    refused(path, "first", "second", "teacher.key")
    assert_loaded(path, key="first")


def test_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    save(tmp_path / "p.pth", weights())
    assert_loaded("~/p.pth")
    assert teacher.load("~/p.pth", MODEL)


def no_batch_norms():
    return {n: a for n, a in arrays().items() if ".bn" not in n and "bn1" not in n}


def other_zip(path):
    import zipfile

    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("config.json", "{}")


def torch_script(path):
    import zipfile

    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("net/data.pkl", b"}.")
        archive.writestr("net/constants.pkl", b").")
        archive.writestr("net/code/__torch__.py", "class Net(Module): ...")


def truncated(path):
    save(path, weights())
    path.write_bytes(path.read_bytes()[:-9000])


WHOLE = Made(
    "torchvision.models.resnet ResNet", (), {"_modules": {}}, None, None, "NEWOBJ"
)
NOT_A_CHECKPOINT = {
    "empty": (b"", "the file is empty"),
    "LFS": (b"version https://git-lfs.github.com/spec/v1\noid sha256:1", "Git LFS"),
    "HTML": (b"\n<!DOCTYPE html><html>", "a web page"),
    "XML": (b"<?xml version='1.0'?><Error>", "a web page"),
    "gzip": (b"\x1f\x8b\x08\x00" + bytes(50), "compressed with gzip"),
    "bzip2": (b"BZh91AY", "bzip2"),
    "xz": (b"\xfd7zXZ\0", "compressed with xz"),
    "tar": (b"a/b".ljust(257, b"\0") + b"ustar\0" + bytes(300), "a tar archive"),
    "HDF5": (b"\x89HDF\r\n\x1a\n" + bytes(50), "HDF5 file, as Keras"),
    "NumPy": (b"\x93NUMPY\x01\0", "a NumPy array"),
    "text": (b"Entry not found", "a text that begins with 'Entry not found'"),
    "JSON": (b'{"error": "not found"}', 'a text that begins with \'{"error"'),
    "LiteRT": (b"\x1c\0\0\0TFL3" + bytes(50), "LiteRT"),
    "zeros": (bytes(600), "not a PyTorch checkpoint"),
    "zip": (other_zip, "a zip archive of config.json"),
    "TorchScript": (torch_script, "TorchScript"),
    "truncated": (truncated, "cut off"),
    "module": (lambda p: save(p, WHOLE), "whole pickled module torchvision.models"),
    "old module": (lambda p: save(p, WHOLE, legacy=True), "whole pickled module"),
    "module inside": (
        lambda p: save(p, {"model": WHOLE, "epoch": 3}),
        "model is a whole pickled module torchvision.models.resnet.ResNet",
    ),
    "no weights": (lambda p: save(p, {"epoch": 3}), "no tensors in it; it holds epoch"),
    "an object": (
        lambda p: save(p, Made("own.code Checkpoint", (), {"sd": weights()})),
        "an own.code.Checkpoint, not weights",
    ),
    "a number": (lambda p: save(p, 3), "an int, not weights"),
    "no batch norms": (
        lambda p: save(p, tensors(no_batch_norms())),
        "it has no batch norms",
    ),
    "another network": (
        lambda p: save(p, tensors({"encoder.weight": np.zeros((3, 4), np.float32)})),
        "unknown naming: keys as encoder.weight",
    ),
}


@pytest.mark.parametrize(
    ("make", "said"), NOT_A_CHECKPOINT.values(), ids=NOT_A_CHECKPOINT
)
def test_what_is_no_checkpoint_is_named(tmp_path, make, said):
    path = tmp_path / "p.pth"
    if isinstance(make, bytes):
        path.write_bytes(make)
    else:
        make(path)
    refused(path, said)
    if not said.startswith("unknown"):
        refused(path, said, model=MODEL)


def nested(depth):
    root = {"w": 1}
    for _ in range(depth):
        root = {"a": root}
    return root


def doubled(count):
    root = weights()
    for _ in range(count):
        root = {"a": root, "b": root}
    return root


def cycle():
    root = {"model": weights()}
    root["itself"] = [root]
    return root


def test_mappings_that_hold_each_other(tmp_path):
    assert_loaded(save(tmp_path / "cycle.pth", cycle()))
    assert_loaded(save(tmp_path / "twice.pth", doubled(3)))
    for root in (nested(200), doubled(30)):
        refused(save(tmp_path / "p.pth", root), "too often")


def test_two_tensors_of_one_name_are_refused(tmp_path):
    root = {"a": {"b": Tensor(np.zeros(3, np.float32))}, "a.b": Tensor(np.ones(3))}
    refused(save(tmp_path / "p.pth", root), "two tensors are named a.b")


def test_the_helper_keeps_the_numbers():
    content, data = torch_files.pickled(weights())
    assert len(data) == len(arrays()) and content.endswith(b".")
