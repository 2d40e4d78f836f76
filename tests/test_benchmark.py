"""The benchmark on the smallest network: what it reports, and that outputs agree."""

import json
import sys

import pytest

from adadfq_jax.benchmark import configs
from adadfq_jax.errors import InputError
from tests import runs

BENCHMARK = [sys.executable, "-m", "adadfq_jax.benchmark"]
CONFIG = """
from adadfq_jax import config as base

def get_config(argument=None):
    config = base.default_config()
    config.teacher.model = "tiny"
    config.teacher.image_shape = (8, 8, 3)
    config.game.batch_size = 4
    config.game.framed_weight = 0.5
    config.quant.weight_bits = config.quant.act_bits = int(argument or 4)
    return config
"""


@pytest.fixture
def config_file(tmp_path):
    file = tmp_path / "tiny.py"
    file.write_text(CONFIG)
    return str(file)


def test_table_and_json_without_a_file_of_p(config_file, tmp_path):
    written = tmp_path / "figures.json"
    # In a process of its own: it changes the allocator and the compilation cache.
    done = runs.run(
        [
            *(*BENCHMARK, f"--config={config_file}", f"--json={written}"),
            *("--rounds=2", "--images=8", "--nostart_up", "--devices=2"),
        ]
    )
    assert done.returncode == 0, done.stderr
    (found,) = json.loads(written.read_text())["configs"].values()
    assert found["phases"].keys() == {"observe", "g_only", "both"}
    for row in found["phases"].values():
        assert row["agreement"]["agree"]
        ratio = row["ours_steps_per_second"] / row["reference_steps_per_second"]
        assert row["against_reference"] == pytest.approx(ratio)
    assert found["evaluation_images_per_second"] > 0
    assert found["devices"]["2"]["step"] > 0
    assert 0 < found["flops"]["ours"] < found["flops"]["reference"]
    lines = done.stdout.splitlines()
    assert max(map(len, lines)) <= 80
    assert any("both" in line for line in lines)


@pytest.mark.parametrize(
    ("flag", "sentence"),
    [
        ("--config=nowhere.py", "nowhere.py: no such file"),
        ("--batch=0", "--batch=0: numbers from 1 up"),
    ],
)
def test_refusals_are_one_line(flag, sentence):
    runs.assert_refused(runs.run([*BENCHMARK, flag]), sentence)


def test_default_configs_are_those_of_the_folder():
    names = configs.default_configs()
    assert any(name.endswith("fashion_mnist_resnet20.py") for name in names)
    assert all(configs.load_config(name).teacher.num_classes for name in names)


def test_pytorch_for_a_network_that_it_has_not(config_file):
    from adadfq_jax.benchmark import measure

    players = object.__new__(measure.Players)
    players.config = configs.load_config(config_file)
    with pytest.raises(InputError, match="resnet20 alone"):
        players._torch_run()
