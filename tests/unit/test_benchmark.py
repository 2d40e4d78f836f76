"""The configurations of the benchmark, and what it cannot measure."""

import pytest

from adadfq_jax.benchmark import configs
from adadfq_jax.errors import InputError
from adadfq_jax.training.spec import resolve
from tests import jobs


def test_default_configs_are_those_of_the_package():
    names = configs.default_configs()
    assert "fashion_mnist_resnet20" in names
    assert all(configs.load_config(name).teacher.num_classes for name in names)


def test_pytorch_for_a_network_that_it_has_not(tmp_path):
    config_file = jobs.write_benchmark_config(tmp_path)
    from adadfq_jax.benchmark import measure

    players = object.__new__(measure.Players)
    players.spec = resolve(configs.load_config(config_file))
    with pytest.raises(InputError, match="resnet20 alone"):
        players._torch_run()
