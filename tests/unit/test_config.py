"""Configuration files: their argument, their keys, and refused values."""

import dataclasses
import json
import math

import pytest

from adadfq_jax import config as base
from adadfq_jax import recipes, settings
from adadfq_jax.errors import InputError
from adadfq_jax.training import build, spec, workdir
from adadfq_jax.training.spec import resolve
from tests.configurations import CONFIGS, get_config


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_every_config_has_exactly_the_known_keys_and_passes_its_check(path):
    def keys(config, prefix=""):
        for key, value in config.items():
            yield prefix + key
            if hasattr(value, "items"):
                yield from keys(value, f"{prefix}{key}.")

    config = get_config(path, "w3a5")
    assert set(keys(config)) == set(keys(base.default_config()))
    assert (config.quant.weight_bits, config.quant.act_bits) == (3, 5)
    resolve(config)


def test_the_paper_option_is_the_released_schedule():
    config = get_config(CONFIGS[0].parent / "fashion_mnist_resnet20.py", "w4a4,paper")
    game = resolve(config).game
    assert (game.steps, game.observe_steps, game.warmup_steps) == (80_000, 800, 800)
    assert tuple(game.rate_drops) == (20_000, 40_000, 60_000)


EPOCH = 200
# Network and bits of kernels: what the released configurations have, in epochs.
RELEASED = {
    # q_rate, warm-up, drops, lambda_l, alpha_ds
    ("resnet18", 3): (1e-5, 50, (350,), 0.1, 0.2),
    ("resnet18", 4): (1e-5, 50, (350,), 0.3, 0.2),
    ("resnet18", 5): (1e-5, 50, (350,), 0.3, 0.3),
    ("mobilenet_v2", 3): (1e-5, 50, (350,), 0.1, 0.2),
    ("mobilenet_v2", 4): (1e-5, 50, (350,), 0.1, 0.3),
    ("mobilenet_v2", 5): (1e-5, 50, (350,), 0.1, 0.2),
    ("resnet50", 3): (1e-4, 100, (150, 300), 0.4, 0.2),
    ("resnet50", 4): (1e-4, 50, (200, 300), 0.3, 0.1),
    ("resnet50", 5): (1e-4, 50, (350,), 0.3, 0.2),
}


@pytest.mark.parametrize(("network", "bits"), RELEASED)
def test_imagenet_configurations_are_the_released_ones(network, bits):
    path = CONFIGS[0].parent / f"imagenet_{network}.py"
    game = resolve(get_config(path, f"w{bits}a{bits}")).game
    found = (
        game.q_rate,
        game.warmup_steps / EPOCH,
        tuple(step / EPOCH for step in game.rate_drops),
        game.lambda_l,
        game.alpha_ds,
    )
    assert found == RELEASED[network, bits]
    assert (game.alpha_as, game.lambda_u, game.temperature) == (0.1, 0.8, 5)
    assert (game.beta, game.gamma, game.g_rate) == (1, 1, 1e-3)
    assert (game.steps, game.observe_steps) == (400 * EPOCH, 4 * EPOCH)
    assert (game.batch_size, game.q_weight_decay) == (16, 1e-4)


IMAGENET = [path for path in CONFIGS if path.stem.startswith("imagenet_")]
RELEASED_IMAGENET = [path for path in IMAGENET if "efficientnet" not in path.stem]


@pytest.mark.parametrize("bits", [3, 4, 5])
@pytest.mark.parametrize("path", RELEASED_IMAGENET, ids=lambda p: p.stem)
def test_the_tpu_option_plays_as_many_images_in_larger_batches(path, bits):
    usual, tpu = (
        resolve(get_config(path, f"w{bits}a{bits}{option}")) for option in ("", ",tpu")
    )
    assert tpu.recipe == f"{usual.recipe}_tpu" == f"adadfq_{path.stem}_tpu"
    scaled = {
        "batch_size": 128,
        "steps": usual.game.steps // 8,
        "observe_steps": usual.game.observe_steps // 8,
        "warmup_steps": usual.game.warmup_steps // 8,
        "rate_drops": tuple(step // 8 for step in usual.game.rate_drops),
        "q_rate": pytest.approx(8 * usual.game.q_rate),  # SGD: linear
        "g_rate": pytest.approx(8**0.5 * usual.game.g_rate),  # Adam: root
    }
    expected = {**dataclasses.asdict(usual.game), **scaled}
    assert dataclasses.asdict(tpu.game) == expected
    assert tpu.quant == usual.quant


@pytest.mark.parametrize("path", RELEASED_IMAGENET, ids=lambda p: p.stem)
def test_bits_that_were_not_released_have_the_values_of_the_nearest(path):
    def game(bits):
        return resolve(get_config(path, f"w{bits}a4")).game

    assert game(2) == game(3)
    assert game(8) == game(7) == game(6) == game(5)
    assert len({game(3), game(4), game(5)}) > 1


@pytest.mark.parametrize(
    ("path", "argument"),
    [
        *((path, "w3a3") for path in IMAGENET),
        *((path, "w3a3,tpu") for path in RELEASED_IMAGENET),
    ],
    ids=lambda value: getattr(value, "stem", value),
)
def test_another_recipe_brings_its_own_schedule_to_imagenet(path, argument):
    config = get_config(path, argument)
    config.recipe = "adadfq_tuned"
    found = resolve(config)
    alone = resolve({"recipe": "adadfq_tuned"})
    own = {"generator": "conditional_bn"}  # the configuration's
    if path not in RELEASED_IMAGENET:
        own["temperature"] = 5.0
    expected = {**dataclasses.asdict(alone.game), **own}
    assert dataclasses.asdict(found.game) == expected
    assert (found.game.steps, found.game.rate_drops) == (1300, (975,))
    assert (found.game.batch_size, found.game.q_rate) == (16, 1e-3)
    ranges = {"act_range": "l3", "weight_range": "mse", "mask_gradient": True}
    assert ranges.items() <= dataclasses.asdict(found.quant).items()


def test_efficientnet_plays_the_recommended_recipe():
    path = CONFIGS[0].parent / "imagenet_efficientnet_lite0.py"
    spec = resolve(get_config(path))
    game = spec.game
    assert spec.recipe == "reconstruction" and spec.reconstruction.iterations == 200
    assert (game.steps, game.observe_steps, game.warmup_steps) == (100, 100, 100)
    assert (game.batch_size, game.g_rate) == (16, 5e-3)
    assert (game.rate_drops, game.temperature) == ((), 5.0)


@pytest.mark.parametrize("steps", [20, 400])
def test_q_does_not_train_in_the_recommended_game_of_any_length(steps):
    game = resolve({"recipe": "best", "game": {"steps": steps}}).game
    assert (game.steps, game.observe_steps, game.warmup_steps) == (steps,) * 3
    own = {"steps": steps, "warmup_steps": 10, "observe_steps": 5}
    game = resolve({"recipe": "best", "game": own}).game
    assert (game.observe_steps, game.warmup_steps) == (5, 10)


def test_a_game_that_ends_before_q_trains_is_refused_with_what_to_give():
    with pytest.raises(InputError, match=r"at least game\.warmup_steps=800.*as well"):
        resolve({"recipe": "adadfq", "game": {"steps": 20}})
    with pytest.raises(InputError, match=r"^game\.steps=-1: "):
        resolve({"recipe": "best", "game": {"steps": -1}})
    with pytest.raises(InputError, match=r"at least game\.observe_steps=50"):
        resolve({"recipe": "best", "game": {"steps": 20, "observe_steps": 50}})
    empty = dataclasses.replace(recipes.get("best"), settings={})
    with pytest.raises(InputError, match=r"no value for game\.\w+; make your recipe"):
        resolve({"recipe": "mine", "game": {"steps": 20}}, empty)


@pytest.mark.parametrize("path", IMAGENET, ids=lambda p: p.stem)
def test_imagenet_is_measured_once_there_is_a_folder_or_a_set(path):
    config = get_config(path, "w4a4")
    assert not resolve(config).eval.enabled
    config.eval.data_dir = "/data/val"
    assert resolve(config).eval.enabled
    name = (config.eval.dataset, config.eval.data_dir, "validation[:50%]")
    assert settings.split_name(*name) == "folder val[:50%]"
    config.eval.data_dir, config.eval.dataset = "", "imagenet2012"
    assert resolve(config).eval.enabled
    name = (config.eval.dataset, config.eval.data_dir, config.eval.split)
    assert settings.split_name(*name) == "imagenet2012 validation"
    config.eval.enabled = False
    assert not resolve(config).eval.enabled


@pytest.mark.parametrize("argument", [None, ""])
def test_the_default_argument(argument):
    assert base.parse_argument(argument, "w4a4") == (4, 4, set())


@pytest.mark.parametrize(
    ("argument", "named"),
    [
        ("w1a4", "w1a4"),
        ("w4a9", "w4a9"),
        ("w44", "w44"),
        ("a4w4", "a4w4"),
        ("w4a4,papre", "papre"),
        ("paper", "paper"),
    ],
)
def test_other_arguments_are_refused_by_name(argument, named):
    with pytest.raises(InputError, match=named):
        base.parse_argument(argument, "w4a4", ("paper",))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("quant.weight_bits", 1),
        ("quant.act_bits", 9),
        ("quant.first_last_bits", 1),
        ("quant.range_ema", "none"),
        ("game.observe_steps", 0),
        ("game.warmup_steps", 10),
        ("game.steps", 100),
        ("game.batch_size", 1),
        ("teacher.image_shape", (0, 32, 3)),
        ("teacher.image_shape", (28, 28)),
        ("teacher.image_shape", (28.0, 28, 3)),
        ("game.rate_drops", (150.5,)),
        ("seed", 2**32),
        ("seed", -1),
        ("teacher.mean", (0.5,)),
        ("teacher.mean", ("a", "b", "c")),
        ("teacher.std", (0.5, 0.5, 0.0)),
        ("teacher.num_classes", 1),
        ("game.lambda_l", 0.9),
        ("game.lambda_u", 1.2),
        ("game.temperature", 0.0),
        ("game.q_rate", -1.0),
        ("eval.batch_size", 0),
        ("eval.between", -2),
        ("eval.resize", 31),
        ("eval.filter", "nearest"),
        ("log.every", 0),
        ("checkpoint.every", -1),
        ("checkpoint.keep", 1),
        ("devices", -1),
        ("steps_per_dispatch", -1),
        ("compute_dtype", "float16"),
        ("game.batch_rule", "nope"),
        ("game.generator", "nope"),
        ("game.generator_channels", 63),
        ("matmul_precision", "nope"),
    ],
)
def test_values_that_cannot_work_are_refused_by_key(key, value):
    config = base.default_config()
    config.update_from_flattened_dict({key: value})
    with pytest.raises(InputError, match=key.split(".")[-1]):
        resolve(config)


@pytest.mark.parametrize(
    ("mean", "std", "said"),
    [
        (
            (123.675, 116.28, 103.53),
            (58.395, 57.12, 57.375),
            "mean=(0.485, 0.456, 0.406) and teacher.std=(0.229, 0.224, 0.225)",
        ),
        ((127.5,) * 3, (1.0,) * 3, "std=(0.003922, 0.003922, 0.003922)"),
        ((0.5,) * 3, (128.0,) * 3, "mean=(0.5, 0.5, 0.5) and teacher.std=(0.502, 0."),
        ((-0.1, 0.5, 0.5), (0.5,) * 3, "the mean not negative and both at most 1"),
        ((0.5,) * 3, (0.5, 300.0, 0.5), "both at most 1"),
        ((0.5, math.nan, 0.5), (0.5,) * 3, "must be of pixels in [0, 1]"),
    ],
)
def test_a_normalisation_of_bytes_is_refused_with_the_divided_values(mean, std, said):
    config = base.default_config()
    config.teacher.update(mean=mean, std=std)
    with pytest.raises(InputError) as caught:
        resolve(config)
    assert said in str(caught.value)
    assert ("these are of pixels up to 255" in str(caught.value)) is (
        "at most 1" not in said and not math.isnan(mean[1])
    )


@pytest.mark.parametrize(
    ("key", "nearest"),
    [
        ("game.lambda_x", "game.lambda_l"),
        ("lambda_u", "game.lambda_u"),
        ("quant.weight_bit", "quant.weight_bits"),
        ("tacher.path", "teacher.path"),
    ],
)
def test_an_unknown_key_is_refused_with_the_nearest(key, nearest):
    with pytest.raises(InputError, match=f"config.{key}: .* config.{nearest} "):
        base.refuse_unknown_keys(["--workdir=x", f"--config.{key}=1"])
    base.refuse_unknown_keys([f"--config.{nearest}=1", "--config=file.py:w4a4"])


def test_no_key_is_near_to_any_word():
    with pytest.raises(InputError, match=r"config.nosuch: no such key \(--keys"):
        base.refuse_unknown_keys(["--config.nosuch=1"])


def test_the_reference_has_every_key():
    reference = base.reference()
    for key in settings.ROWS:
        assert f"| `{key}` |" in reference


@pytest.mark.parametrize("key", settings.REMOVED)
def test_a_key_that_is_gone_says_so(key):
    with pytest.raises(InputError, match=rf"config\.{key}: removed; "):
        base.refuse_unknown_keys([f"--config.{key}=1"])
    section, name = key.split(".")
    with pytest.raises(InputError, match=rf"{key}: removed; "):
        resolve({section: {name: 1}})


def test_a_configuration_comes_back_from_its_json():
    config = get_config(CONFIGS[0], "w3a5")
    there_and_back = base.from_json(json.loads(config.to_json()))
    assert there_and_back.to_dict() == config.to_dict()
    with pytest.raises(InputError, match="nope"):
        base.from_json({"nope": 1})


def identity(config):
    names = {"batch_size": 16, "weights": {}, "p_digest": ""}
    return spec.identity(resolve(config), **names)


def test_paths_are_written_in_full(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    config = base.default_config()
    config.teacher.path = config.eval.data_dir = config.eval.classes = "~/there"
    values = resolve(config).to_json()
    found = values["teacher"]["path"], values["eval"]["data_dir"]
    assert {*found, values["eval"]["classes"]} == {str(tmp_path / "there")}


def test_what_is_beside_the_game_is_not_in_its_identity():
    config = base.default_config()
    before = identity(config)
    for key, value in {
        "log.every": 7,
        "game.steps": 99_999,
        "eval.dataset": "x",
    }.items():
        config.update_from_flattened_dict({key: value})
    assert identity(config) == before
    config.game.lambda_l = 0.05
    assert identity(config) != before


def test_a_smaller_generator_makes_another_game(tmp_path):
    config = base.load("cifar10_resnet20", "w4a4")
    before = identity(config)
    assert "game.generator_channels" not in before  # as in earlier versions
    config.game.generator_channels = 64
    assert identity(config)["game.generator_channels"] == 64
    assert build.assemble(resolve(config), 16).generator.channels == 64
    (tmp_path / workdir.IDENTITY_FILE).write_text(json.dumps(before))
    workdir.check(tmp_path, before)
    with pytest.raises(InputError, match="generator_channels is 128 there and 64 here"):
        workdir.check(tmp_path, identity(config))


def test_an_unknown_key_in_a_configuration_file_is_refused():
    config = base.default_config()
    config.game.lamda_l = 0.2
    with pytest.raises(InputError, match=r"game\.lamda_l.*game\.lambda_l"):
        resolve(config)
