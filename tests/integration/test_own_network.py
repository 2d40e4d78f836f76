"""The guide's block on a network of one's own, as written."""

import sys

import numpy as np
import pytest

import adadfq_jax
from adadfq_jax import quant
from adadfq_jax.errors import InputError
from adadfq_jax.network import named
from tests import runs
from tests.jobs import ROOT
from tests.own_networks import SHAPE, Small

FIRST = "nn.Sequential(layers)"  # of the guide's block


def guide_block(first_line):
    """The Python block of the guide that has a line."""
    guide = ROOT / "docs/guides/own-network.md"
    blocks = guide.read_text().split("```python\n")[1:]
    (found,) = (
        b for b in (block.split("```")[0] for block in blocks) if first_line in b
    )
    return found


def run_guide(folder):
    """Runs the guide's block as written, in a folder and a process of its own."""
    (folder / "block.py").write_text(guide_block(FIRST))
    command = ["sh", "-c", f"cd {folder} && {sys.executable} block.py"]
    done = runs.run(command, env={"PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stderr
    return folder / "runs" / "mine" / "quantized.safetensors"


@pytest.fixture(scope="module")
def guide_run(tmp_path_factory):
    """The network, P's variables and Q's file of the guide's block."""
    path = run_guide(tmp_path_factory.mktemp("guide_run"))
    names = {}
    exec(guide_block(FIRST).split("print(")[0], names)
    return names["model"], names["variables"], path


def test_the_guides_block_runs_as_written(guide_run):
    model, _, path = guide_run
    assert len(guide_block(FIRST).splitlines()) <= 20
    network = adadfq_jax.load_quantized(path, model)
    assert network.path == path
    images = np.random.default_rng(0).normal(size=(5, *SHAPE)).astype(np.float32)
    logits = np.asarray(network(images))
    assert logits.shape == (5, 10) and np.isfinite(logits).all()
    assert (network.info.model, network.weight_bits) == ("Sequential", 4)


def test_q_is_quantized_and_is_not_p(guide_run):
    model, variables, path = guide_run
    network = adadfq_jax.load_quantized(path, model)
    assert len(network.kernels) == 2 and len(network.ranges) == 1
    for name, kernel in network.kernels.items():
        found = kernel.dequantize().reshape(-1, kernel.codes.shape[-1])
        assert max(len(np.unique(channel)) for channel in found.T) <= 2**4
        original = variables["params"][name.rpartition(".")[0]]["kernel"]
        original = np.asarray(original).reshape(found.shape)
        off = np.abs(found - original) / np.ptp(original, 0)
        assert 0.01 < off.max() < 0.2  # of a channel's width, which has 15 steps
    assert all(lo < hi for lo, hi in network.ranges.values())
    q, p = network.variables.variables, named(variables)
    # The blocks learn kernels and ranges; all else is P's.
    for name in ("layers_1.mean", "layers_1.var", "layers_1.scale"):
        np.testing.assert_array_equal(q[name], p[name])
    rounded = quant.kernel_integers(p["layers_0.kernel"], 4)
    assert (network.kernels["layers_0.kernel"].scale != rounded.scale).any()


def test_the_same_seed_gives_the_same_bytes(guide_run, tmp_path):
    model, variables, path = guide_run
    assert run_guide(tmp_path).read_bytes() == path.read_bytes()
    another = (
        r"another game \(act_bits is 4 there and 5 here; seed is 0 there and 1 here\);"
        " choose another workdir$"
    )
    with pytest.raises(InputError, match=another):
        adadfq_jax.quantize(
            model,
            variables,
            image_shape=SHAPE,
            steps=100,
            act_bits=5,
            seed=1,
            workdir=path.parent,
            settings={"devices": 1},
        )


def test_load_quantized_takes_the_network_or_says_so(guide_run):
    path = guide_run[2]
    with pytest.raises(
        InputError, match=r"cannot be applied .*Could not find parameter"
    ):
        adadfq_jax.load_quantized(path, Small())
    with pytest.raises(InputError, match=r"unknown network .*\(path, network\)"):
        adadfq_jax.load_quantized(path)
