"""Calibration: where outputs can be shifted, and what biases become."""

import jax.numpy as jnp
import numpy as np
import pytest

from adadfq_jax import quant
from adadfq_jax.errors import InputError
from adadfq_jax.game import QOptions, Teacher
from adadfq_jax.network import Hooks, Shift, find_shifts, kernels, named, run, trace
from adadfq_jax.reconstruction import calibration
from adadfq_jax.training.spec import resolve
from tests import helpers, quantized
from tests.golden.fill import noise


def test_every_kernel_of_a_network_of_the_package_has_its_shift():
    graph = helpers.graph("resnet20")
    shifts = find_shifts(graph)
    assert list(shifts) == [entry.name for entry in graph.kernels]
    assert len({shift.variable for shift in shifts.values()}) == 22
    assert shifts["init_block.conv.kernel"] == Shift("init_block.bn.mean", 3, -1)
    assert shifts["output.kernel"] == Shift("output.bias", 1, 1)


def test_biases_are_found_along_their_axis_and_only_where_they_are_alone():
    def network(v, x):
        x = jnp.maximum(x @ v["a"] + v["bias"][None, None, None], 0).mean((1, 2))
        x = jnp.maximum(x @ v["b"] + v["shared"], 0)
        x = jnp.maximum(x @ v["c"] + v["shared"], 0)
        return x @ v["d"] + v["column"]

    square, line = noise("square", (4, 4)), noise("line", (1, 4))
    v = {**dict.fromkeys("abcd", square), "bias": line[0], "shared": line}
    v["column"] = noise("column", (1, 1))
    graph = trace(network, v, image_shape=(4, 4, 4))
    assert find_shifts(graph) == {"a": Shift("bias", 3, 1)}


def test_the_image_that_is_added_is_no_bias():
    def network(v, x):
        return jnp.maximum(x @ v["a"] + x, 0).mean((1, 2)) @ v["b"]

    v = dict.fromkeys("ab", noise("square", (4, 4)))
    assert find_shifts(trace(network, v, image_shape=(4, 4, 4))) == {}


@pytest.fixture(scope="module")
def calibrated():
    """The tiny network at 3 bits, calibrated on its images."""
    graph = helpers.graph("tiny", 10, quantized.TINY_SHAPE)
    variables, images = quantized.tiny()
    teacher = Teacher(named(variables), {})
    options = QOptions(3, 3, act_range="l3")
    batches = [images[:32], images[32:]]
    return (
        graph,
        teacher,
        images,
        calibration.calibrate(graph, options, teacher, batches),
    )


def test_half_of_the_mean_error_of_every_rounded_kernel_is_removed(calibrated):
    graph, teacher, images, changed = calibrated
    moved = {n for n, x in changed.items() if np.any(x != teacher.variables[n])}
    assert moved == {"init_block.bn.mean", "unit.bn.mean", "output.bias"}
    outputs = {}

    def hook(entry, output, compute):
        kernel = quant.fake_quant_kernel(own[entry.name], 3, None, entry.out_axes)
        outputs[entry.name] = (output, compute(kernel))
        return output

    own = kernels(graph, teacher.variables)
    run(graph, teacher.variables, images, Hooks(output=hook))
    for name, shift in find_shifts(graph).items():
        p, q = (x.mean(tuple(range(x.ndim - 1))) for x in outputs[name])
        error = np.ravel(changed[shift.variable] - teacher.variables[shift.variable])
        np.testing.assert_allclose(-shift.sign * error, (q - p) / 2, atol=1e-5)
        assert np.abs(error).max() > 1e-3


def test_0_steps_select_the_recipe_that_does_not_train_q():
    given = {"recipe": "adadfq", "game": {"steps": 0, "observe_steps": 7}}
    spec = resolve(given)
    assert spec.recipe == "calibrate" and spec.calibration.images
    assert spec.game.warmup_steps == spec.game.observe_steps == spec.game.steps > 0
    longer = resolve({"recipe": "calibrate", "game": {"steps": 30}})
    assert longer.game.warmup_steps == 30 and not longer.reconstruction.iterations
    wrong = {"steps": 30, "observe_steps": 5, "warmup_steps": 5}
    with pytest.raises(InputError, match="a calibration does not train Q"):
        resolve({"recipe": "calibrate", "game": wrong})
    with pytest.raises(InputError, match=r"calibration\.images"):
        resolve({"recipe": "calibrate", "reconstruction": {"iterations": 5}})
