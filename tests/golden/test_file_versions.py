"""Quantized files of earlier versions, recorded before the format changed."""

import json

import numpy as np
import pytest
import safetensors

import adadfq_jax
from adadfq_jax.deploy import quantized_file
from adadfq_jax.deploy.quantized_file import FORMAT_VERSION
from adadfq_jax.errors import InputError
from tests import helpers, plain_loader

FILES = [helpers.GOLDEN / f"quantized_format{v}.safetensors" for v in (1, 2)]
RECORD = helpers.load_npz("quantized_format1")
NAMES = json.loads((helpers.GOLDEN / "quantizer_names.json").read_text())


@pytest.mark.parametrize("file", FILES)
def test_a_file_of_before_is_read_bit_for_bit(file):
    network, record = adadfq_jax.load_quantized(file), RECORD
    assert len(network.kernels) == 3 and network.weight_bits == 3
    for name, kernel in network.kernels.items():
        np.testing.assert_array_equal(kernel.dequantize(), record[name])
        assert kernel.codes.dtype == np.uint8 and kernel.codes.max() < 2**3
    helpers.assert_close(network(record["images"]), record["logits"], 1e-5)


@pytest.mark.parametrize("model", NAMES)
def test_ranges_of_before_have_the_order_of_the_activations(model):
    """Names of quantizer modules, recorded in the order of the code that had them."""
    graph = helpers.graph(model, 3, (64, 64, 3))
    ranges = {f"{name}.range": np.zeros(2) + i for i, name in enumerate(NAMES[model])}
    shuffled = dict(sorted(ranges.items()))
    found = quantized_file._with_names_of_today(shuffled, graph)
    for i, entry in enumerate(graph.activations):
        assert found[f"{entry.name}.range"][0] == i
    del shuffled["init_quant.range"]
    with pytest.raises(InputError, match="ranges, the network has"):
        quantized_file._with_names_of_today(shuffled, graph)


@pytest.mark.parametrize("file", FILES)
def test_saved_again_it_is_of_the_present_version(tmp_path, file):
    before = adadfq_jax.load_quantized(file)
    path = before.save(tmp_path / "again.safetensors")
    with safetensors.safe_open(path, "numpy") as file:
        header = json.loads(file.metadata()["adadfq_jax"])
    assert header["format_version"] == FORMAT_VERSION == 3
    again = adadfq_jax.load_quantized(path)
    for name, kernel in before.kernels.items():
        np.testing.assert_array_equal(kernel.codes, again.kernels[name].codes)
        np.testing.assert_array_equal(
            kernel.dequantize(), again.kernels[name].dequantize()
        )


def test_a_loader_of_numpy_alone_reads_every_version(tmp_path):
    path = adadfq_jax.load_quantized(FILES[0]).save(tmp_path / "again.safetensors")
    for file in (*FILES, path):
        _, tensors = plain_loader.read(file)
        for name in (n for n in RECORD if n.endswith("kernel")):
            np.testing.assert_array_equal(tensors[name], RECORD[name])
