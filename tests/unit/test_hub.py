"""P in a repository of the Hugging Face Hub, which is a folder here."""

import json
import shutil
import sys
from pathlib import Path

import pytest
from huggingface_hub import constants, errors

import adadfq_jax
from adadfq_jax import teacher
from adadfq_jax.errors import InputError
from adadfq_jax.jobs import inspection
from adadfq_jax.report import gather
from adadfq_jax.teacher import hub as hub_files
from adadfq_jax.training import build, results, workdir
from adadfq_jax.training.spec import resolve
from tests import torch_files
from tests.hub import COMMIT, TIMM, Hub, state_dict
from tests.made_runs import write_run

LITE = "timm/efficientnet_lite0.ra_in1k"
ADDRESS = f"hf://{LITE}"


@pytest.fixture(scope="module")
def weights():
    return state_dict("efficientnet_lite0", "timm")


@pytest.fixture
def hub(tmp_path, monkeypatch):
    return Hub(tmp_path, monkeypatch)


@pytest.fixture
def lite(hub, weights):
    hub.write(LITE, TIMM, weights)
    return hub


def spec_of(path, **teacher_settings):
    settings = {"model": "", "num_classes": 0, "path": path, **teacher_settings}
    for name in ("image_shape", "mean", "std"):
        settings.setdefault(name, ())
    return resolve({"teacher": settings})


def test_the_repository_tells_the_network_and_the_images(lite):
    network = adadfq_jax.load_network(ADDRESS)
    assert (network.name, network.num_classes) == ("efficientnet_lite0", 5)
    assert network.image_shape == (192, 160, 3)
    assert (network.mean, network.std) == ((0.5, 0.4, 0.3), (0.25, 0.25, 0.5))
    assert network.address == f"{ADDRESS}@{COMMIT}"
    assert network.naming == "timm" and network.kind == "safetensors"
    assert lite.fetched == ["config.json", "model.safetensors"]


def test_a_configuration_decides_what_it_sets(lite):
    loaded = build.load_teacher(spec_of(ADDRESS))
    p = loaded.spec.teacher
    assert (p.mean, p.std) == ((0.5, 0.4, 0.3), (0.25, 0.25, 0.5))
    assert (p.image_shape, p.num_classes) == ((192, 160, 3), 5)
    assert p.path == f"{ADDRESS}@{COMMIT}"
    assert loaded.spec.to_json()["teacher"]["path"] == p.path
    assert loaded.note.startswith(f"{p.path}: efficientnet_lite0 in timm naming; ")
    own = {"mean": (0.1,) * 3, "std": (0.2,) * 3, "image_shape": (64, 64, 3)}
    p = build.load_teacher(spec_of(ADDRESS, **own)).spec.teacher
    assert (p.mean, p.std, p.image_shape) == tuple(own.values())


def test_the_architecture_tells_networks_with_the_same_names_apart(hub, weights):
    """The repository's name says the contrary here."""
    hub.write(LITE, {**TIMM, "architecture": "tf_efficientnet_lite0"}, weights)
    for name in ("", "tf_efficientnet_lite0"):
        network = adadfq_jax.load_network(ADDRESS, name)
        assert network.name == "tf_efficientnet_lite0" and not network.notes
    named = r"is of tf_efficientnet_lite0, .*\.model=efficientnet_lite0 is another"
    for call in (adadfq_jax.load_network, teacher.read):
        with pytest.raises(InputError, match=named) as caught:
            call(ADDRESS, "efficientnet_lite0")
        assert str(caught.value).startswith(f"{ADDRESS}@{COMMIT}: ")


def test_arguments_that_change_the_function_are_refused_for_a_named_network(
    hub, weights
):
    hub.write(LITE, config_of(model_args={"act_layer": "gelu"}), weights)
    with pytest.raises(InputError, match='efficientnet_lite0 act_layer="gelu" is not'):
        adadfq_jax.load_network(ADDRESS, "efficientnet_lite0")


@pytest.mark.parametrize("architecture", ["mine", "tf_efficientnet_lite9 x"])
def test_a_named_network_is_read_where_the_architecture_is_not_known(
    hub, weights, architecture
):
    hub.write(LITE, config_of(architecture=architecture), weights)
    loaded = build.load_teacher(spec_of(ADDRESS, model="efficientnet_lite0"))
    said = (
        f"the architecture {architecture} of its config.json is not known; it is read"
    )
    assert f"{said} as teacher.model=efficientnet_lite0" in loaded.note


def test_weights_for_small_images_are_read_where_they_are_named(hub):
    """Their architecture has the name of the network for large images."""
    small = {"architecture": "resnet18"}
    hub.write("me/small", small, state_dict("resnet18_cifar", "torchvision"))
    network = adadfq_jax.load_network("hf://me/small", "resnet18_cifar")
    assert network.name == "resnet18_cifar"
    with pytest.raises(InputError, match="does not fit resnet18 "):
        adadfq_jax.load_network("hf://me/small")


def test_without_a_config_the_names_tell_the_network(hub, weights):
    hub.write("me/mine", None, weights)
    with pytest.raises(InputError, match=r"hf://me/mine.*: efficientnet_lite0 and tf_"):
        adadfq_jax.load_network("hf://me/mine")
    network = adadfq_jax.load_network("hf://me/mine", "tf_efficientnet_lite0")
    assert network.image_shape == (224, 224, 3) and not network.mean
    hub.write("me/tf_efficientnet_lite0-mine", None, weights)
    network = adadfq_jax.load_network("hf://me/tf_efficientnet_lite0-mine")
    assert network.name == "tf_efficientnet_lite0"


def test_teacher_load_reads_a_repository(lite):
    variables = teacher.load(ADDRESS)
    assert variables["params"]["output"]["kernel"].shape == (1280, 5)


def test_what_is_in_the_cache_needs_no_network(lite):
    first = adadfq_jax.load_network(ADDRESS)
    lite.online, lite.fetched = False, []
    assert adadfq_jax.load_network(ADDRESS).address == first.address
    assert adadfq_jax.load_network(first.address).address == first.address
    assert lite.fetched == []


def test_the_config_of_earlier_timm_is_read(hub, weights):
    flat = {**TIMM["pretrained_cfg"], "architecture": "efficientnet_lite0"}
    hub.write(LITE, flat, weights)
    network = adadfq_jax.load_network(f"{ADDRESS}@main")
    assert network.mean == (0.5, 0.4, 0.3) and network.image_shape == (192, 160, 3)


def test_a_pickle_is_read_only_where_there_is_no_safetensors(lite, weights):
    place = lite.folder / LITE
    torch_files.save(place / "pytorch_model.bin", {"no": "network"})
    assert adadfq_jax.load_network(ADDRESS).kind == "safetensors"
    (place / "model.safetensors").unlink()
    torch_files.save(place / "pytorch_model.bin", torch_files.tensors(weights))
    lite.write("me/mine", TIMM)
    (place / "pytorch_model.bin").rename(lite.folder / "me/mine/pytorch_model.bin")
    assert adadfq_jax.load_network("hf://me/mine").kind.startswith("PyTorch checkpoint")


TRANSFORMERS = {
    "model_type": "resnet",
    "architectures": ["ResNetForImageClassification"],
    "depths": [3, 4, 6, 3],
    "layer_type": "bottleneck",
    "hidden_act": "relu",
    "downsample_in_first_stage": False,
    "downsample_in_bottleneck": False,
    "id2label": {str(n): f"class {n}" for n in range(7)},
}
PREPROCESSOR = {
    "size": {"shortest_edge": 160},
    "image_mean": [0.4, 0.4, 0.4],
    "image_std": [0.2, 0.2, 0.2],
}


@pytest.mark.parametrize(
    ("changes", "model"),
    [
        ({}, "resnet50b"),
        ({"downsample_in_bottleneck": True}, "resnet50"),
        ({"layer_type": "basic"}, "resnet34"),
        ({"depths": [2, 2, 2, 2], "layer_type": "basic"}, "resnet18"),
    ],
)
def test_the_resnets_of_transformers(hub, changes, model):
    found = fetch(hub, "resnet", {**TRANSFORMERS, **changes}, PREPROCESSOR)
    assert (found.model, found.num_classes) == (model, 7)
    assert (found.image_size, found.mean) == ((160, 160), (0.4,) * 3)


def fetch(hub, name, config, preprocessor=None, model=""):
    place = hub.write(f"me/{name}", config, preprocessor_config_json=preprocessor)
    (place / "model.safetensors").write_bytes(b"")
    return hub_files.fetch(f"hf://me/{name}", model)


def test_a_named_network_must_be_that_of_transformers(hub):
    assert fetch(hub, "plain", TRANSFORMERS, model="resnet50b").model == "resnet50b"
    named = r"is of resnet50b, .* teacher\.model=resnet50 is another"
    with pytest.raises(InputError, match=named):
        fetch(hub, "plain", TRANSFORMERS, model="resnet50")
    changed = {**TRANSFORMERS, "hidden_act": "gelu"}
    with pytest.raises(InputError, match=r'hidden_act="gelu".* is not known'):
        fetch(hub, "changed", changed, model="resnet50b")
    found = fetch(hub, "other", {"model_type": "mine"}, model="resnet50b")
    assert found.model == "resnet50b" and "architecture mine of" in found.note


USUAL = {"do_normalize": True, "do_rescale": True, "rescale_factor": 0.00392156862745}
CROPPED = {"crop_size": {"height": 128, "width": 96}}


@pytest.mark.parametrize(
    ("changes", "size"),
    [
        (USUAL, (160, 160)),
        (CROPPED, (128, 96)),
        ({"size": [128, 96]}, (128, 96)),
        ({"size": 128}, (128, 128)),
        ({**CROPPED, "do_center_crop": False}, ()),
        ({"size": 128, "do_center_crop": False}, ()),
        (
            {**CROPPED, "size": {"height": 64, "width": 32}, "do_center_crop": False},
            (64, 32),
        ),
    ],
)
def test_the_size_of_images_of_transformers(hub, changes, size):
    found = fetch(hub, "resnet", TRANSFORMERS, {**PREPROCESSOR, **changes})
    assert found.image_size == size


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"do_normalize": False}, "has do_normalize=false; its images must be"),
        ({"do_rescale": False}, "has do_rescale=false"),
        ({"rescale_factor": 1 / 127.5}, r"has rescale_factor=0\.0078"),
        ({"rescale_factor": "1/255"}, "has rescale_factor="),
        ({"size": "128"}, 'its size is \\["128", "128"'),
        ({"size": [128]}, r"its size is \[128\]"),
        (
            {"image_std": None},
            r"have image_mean=\[0\.4, 0\.4, 0\.4\] and image_std=null",
        ),
        ({"image_std": [0.2]}, r"and image_std=\[0\.2\]: both must be"),
    ],
)
def test_other_images_of_transformers_are_refused(hub, changes, why):
    with pytest.raises(InputError, match=why) as caught:
        fetch(hub, "resnet", TRANSFORMERS, {**PREPROCESSOR, **changes})
    assert str(caught.value).startswith(f"hf://me/resnet@{COMMIT}: its ")


def test_inspect_prints_the_command_without_what_is_known(lite):
    description = inspection.describe(ADDRESS)
    for text in (
        f"{ADDRESS}@{COMMIT}: safetensors\n",
        "network     efficientnet_lite0 in timm naming",
        "images      192 x 160\n",
        "normalised  mean=(0.5, 0.4, 0.3), std=(0.25, 0.25, 0.5)",
        "--workdir=runs/efficientnet_lite0.ra_in1k-w4a4",
        f"--config.teacher.path={ADDRESS}",
    ):
        assert text in description
    assert description.endswith(ADDRESS)  # nothing else is to be given or checked


def test_inspect_says_what_the_repository_does_not_tell(hub, weights):
    normal = {"mean": [0.5] * 3, "std": [0.25] * 3}
    lite = {"architecture": "efficientnet_lite0"}
    sized = {"input_size": [3, 192, 160]}
    for name, facts, unknown in (
        ("nothing", {}, "size, mean and std"),
        ("normal", normal, "size"),
        ("sized", sized, "mean and std"),
    ):
        hub.write(f"me/{name}", {**lite, **facts}, weights)
        described = inspection.describe(f"hf://me/{name}")
        assert described.endswith(
            f"The file does not tell the {unknown} of P's images. Check those of the"
            " command."
        )
        is_open = "size" in unknown
        assert ("images      224 x 224, not in the file\n" in described) is is_open
        assert ("teacher.image_shape=(224, 224, 3)" in described) is is_open
        assert ("--config.teacher.mean" in described) is ("mean" in unknown)


def test_a_run_names_the_repository_and_knows_the_size_of_its_weights(lite, tmp_path):
    address = adadfq_jax.load_network(ADDRESS).address
    folder = write_run(tmp_path / "run", finished=False, **{"teacher.path": address})
    files = {"summary": {"sha256": "0"}, "identity": {"teacher.sha256": "1"}}
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    assert workdir.describe_run(folder, "0")["teacher"] == address
    spec = spec_of(address, model="tiny")
    assert f", {address}: not" in results.describe_teacher(spec, None)
    weights = lite.folder / LITE / "model.safetensors"
    assert gather.read(folder).sizes == {"P, float32": weights.stat().st_size}
    shutil.rmtree(lite.cache)
    assert gather.read(folder).sizes == {}


@pytest.mark.parametrize(
    "page",
    [
        "https://huggingface.co/timm/resnet50.a1_in1k",
        "https://huggingface.co/timm/resnet50.a1_in1k/tree/main",
        Path("http://hf.co/timm/resnet50.a1_in1k"),
    ],
)
def test_a_page_of_the_hub_is_answered_with_its_address(page):
    hint = "must be hf://OWNER/NAME .*, as in hf://timm/resnet50.a1_in1k$"
    for call in (adadfq_jax.load_network, teacher.load, inspection.describe):
        with pytest.raises(InputError, match=hint):
            call(page)


def config_of(**values):
    return {**TIMM, **values}


def cfg_of(**values):
    return config_of(pretrained_cfg={**TIMM["pretrained_cfg"], **values})


CONFIGS = {
    "unknown": (
        config_of(architecture="convnext_tiny"),
        "the architecture convnext_tiny is not known; known are resnet18,",
    ),
    "arguments": (
        config_of(model_args={"act_layer": "gelu"}),
        'the architecture efficientnet_lite0 act_layer="gelu" is not known',
    ),
    "pooling": (config_of(global_pool="max"), 'global_pool="max" is not known'),
    "a list": (config_of(architecture=["resnet18"]), "is not known"),
    "classes": (
        config_of(num_classes=10),
        "its config.json says 10 classes, and its weights are of 5",
    ),
    "mean": (cfg_of(mean=["0.5"] * 3), r'its mean is \["0.5", "0.5", "0.5"\]'),
    "two": (cfg_of(std=[0.5, 0.5]), r"its std is \[0.5, 0.5\]"),
    "mean alone": (cfg_of(std=None), r"its files have mean=\[.*\] and std=null: both"),
    "std alone": (cfg_of(mean=None), "its files have mean=null and std="),
    "zero": (cfg_of(std=[0.5, 0, 0.5]), "std above 0"),
    "below zero": (
        cfg_of(mean=[0.5, -0.1, 0.5]),
        r"mean=\[0\.5, -0\.1, 0\.5\] and std",
    ),
    "bytes": (cfg_of(mean=[124, 116, 104], std=[58, 57, 57]), "be of pixels in"),
    "no mean": (cfg_of(mean=[], std=[]), r"its mean is \[\]"),
    "one mean": (
        cfg_of(input_size=None, mean=[0.5], std=[0.5]),
        r"its mean=\(0\.5,\) and std=\(0\.5,\) must have 3 values each",
    ),
    "not finite": (cfg_of(mean=[float("nan")] * 3), r"its mean is \[NaN"),
    "endless": (cfg_of(mean=[10**400] * 3), r"its mean is \[1000"),
    "huge": (cfg_of(input_size=[3, 2**40, 2**40]), "its input_size is"),
    "another": ({"model_type": "vit", "depths": 3}, "its depths is 3"),
    "vit": ({"model_type": "vit"}, "the architecture vit is not known"),
    "act": (
        {**TRANSFORMERS, "hidden_act": "gelu"},
        'hidden_act="gelu".*is not known; known are .* 34 and 50 of transformers',
    ),
    "no object": ([1], "its config.json cannot be read"),
}


@pytest.mark.parametrize(("config", "why"), CONFIGS.values(), ids=CONFIGS)
def test_a_config_that_cannot_be_used_is_refused_in_a_line(hub, weights, config, why):
    hub.write(LITE, config, weights)
    with pytest.raises(InputError, match=why) as caught:
        adadfq_jax.load_network(ADDRESS)
    assert str(caught.value).startswith(f"{ADDRESS}@{COMMIT}: ")
    assert "\n" not in str(caught.value) and "cache" not in str(caught.value)


@pytest.mark.parametrize("content", [b"{", b"\xff\xfe", b"[" * 100_000])
def test_a_damaged_config_is_refused_in_a_line(lite, content):
    (lite.folder / LITE / "config.json").write_bytes(content)
    with pytest.raises(InputError, match=r"its config\.json cannot be read") as caught:
        adadfq_jax.load_network(ADDRESS)
    assert "\n" not in str(caught.value)


REFUSALS = {
    "GatedRepoError": "it is gated: accept its terms",
    "RepositoryNotFoundError": "no such repository, or a private one",
    "RevisionNotFoundError": "no such revision",
    "HfHubHTTPError": r"cannot be fetched \(HfHubHTTPError: Client Error",
}


@pytest.mark.parametrize("kind", REFUSALS)
def test_what_the_hub_refuses_is_one_line(lite, kind):
    lite.refusal = getattr(errors, kind)
    with pytest.raises(InputError, match=REFUSALS[kind]) as caught:
        teacher.load(ADDRESS)
    assert str(caught.value).startswith(f"{ADDRESS}: ")
    assert "\n" not in str(caught.value)


def test_a_repository_without_weights_is_refused(lite):
    (lite.folder / LITE / "model.safetensors").unlink()
    with pytest.raises(InputError, match=r"neither model\.safetensors nor pytorch_mo"):
        adadfq_jax.load_network(ADDRESS)


def test_weights_of_another_network_are_refused_with_the_address(hub, weights):
    hub.write(LITE, config_of(architecture="mobilenetv2_100"), weights)
    with pytest.raises(InputError, match="this is not a mobilenet_v2") as caught:
        teacher.load(ADDRESS)
    assert str(caught.value).startswith(f"{ADDRESS}@{COMMIT}: ")


@pytest.mark.parametrize(
    "address",
    ["hf://", "hf://resnet18", "hf://timm/a/model.safetensors", "hf://timm/a@", "hf:/"],
)
def test_what_is_no_address_is_refused(address):
    for call in (adadfq_jax.load_network, teacher.load, inspection.describe):
        with pytest.raises(InputError, match="must be hf://OWNER/NAME"):
            call(address)


def test_a_name_that_the_hub_does_not_allow_is_refused(hub):
    with pytest.raises(InputError, match=r"cannot be fetched \(HFValidationError"):
        teacher.load("hf://timm/--x")


def test_without_a_network_it_is_one_line(tmp_path, monkeypatch):
    """By huggingface_hub itself, which is told to be offline."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(
        InputError, match=f"^{ADDRESS}: it is not in the cache, and can"
    ):
        adadfq_jax.load_network(ADDRESS)


def test_without_the_extra_it_is_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    named = r"needs huggingface_hub: pip install 'adadfq_jax\[hub\]'"
    with pytest.raises(InputError, match=named):
        adadfq_jax.load_network(ADDRESS)


def test_the_architectures_are_networks_of_the_package_in_names_of_timm():
    for model in hub_files.ARCHITECTURES.values():
        schemes = teacher.schemes(model)
        assert {"timm", "torchvision"} & {*schemes}
