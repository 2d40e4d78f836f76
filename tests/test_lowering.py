"""Programs for TPU and CUDA, lowered here: full precision in every product."""

import functools
import re

import jax
import pytest

from adadfq_jax import build, sharding
from adadfq_jax.game import Phase
from tests import helpers
from tests.test_config import CONFIGS, get_config

PLATFORMS = ["tpu", "cuda"]


@functools.cache
def program(count, devices):
    """StableHLO of `count` steps of CIFAR-10's game in which both players train."""
    config = build.prepare(get_config(CONFIGS[0].parent / "cifar10_resnet20.py"))
    config.teacher.path = str(helpers.GOLDEN / "resnet20_cifar10_zip.pth")
    with jax.default_matmul_precision(config.matmul_precision):
        chosen = jax.devices()[:devices]
        p_variables = build.load_teacher(config)
        steps, state = build.build_game(config, p_variables, chosen, 16)
        step = jax.jit(steps(Phase.BOTH, count))
        exported = jax.export.export(step, platforms=PLATFORMS)(
            *sharding.replicate((state, p_variables, jax.random.key(0)), chosen)
        )
    return exported.mlir_module()


def operations(text, name):
    """The lines of an operation, without source locations."""
    return [line for line in text.splitlines() if f"stablehlo.{name}" in line]


@pytest.mark.parametrize(("count", "devices"), [(1, 1), (50, 1), (1, 4)])
def test_every_product_is_in_full_precision(count, devices):
    text = program(count, devices)
    products = operations(text, "convolution") + operations(text, "dot_general")
    assert len(products) > 100
    for line in products:
        precisions = re.findall(r"<precision (\w+)>|precision = \[(\w+), (\w+)\]", line)
        named = {word for found in precisions for word in found if word}
        assert named == {"HIGHEST"}, line[:400]


def test_many_steps_are_one_loop():
    assert not operations(program(1, 1), "while")
    assert len(operations(program(50, 1), "while")) == 1
    few, many = (len(program(count, 1)) for count in (1, 50))
    assert many < 1.2 * few
