"""Quantized files of earlier versions, recorded before the format changed."""

import json

import numpy as np
import safetensors

import adadfq_jax
from adadfq_jax.deploy.quantized_file import FORMAT_VERSION
from tests import helpers, plain_loader

FILE = helpers.GOLDEN / "quantized_format1.safetensors"


def test_a_file_of_version_1_is_read_bit_for_bit():
    network, record = adadfq_jax.load_quantized(FILE), helpers.load_npz(FILE.stem)
    assert len(network.kernels) == 3 and network.weight_bits == 3
    for name, kernel in network.kernels.items():
        np.testing.assert_array_equal(kernel.dequantize(), record[name])
        assert kernel.codes.dtype == np.uint8 and kernel.codes.max() < 2**3
    helpers.assert_close(network(record["images"]), record["logits"], 1e-5)


def test_saved_again_it_is_of_the_present_version(tmp_path):
    before = adadfq_jax.load_quantized(FILE)
    path = before.save(tmp_path / "again.safetensors")
    with safetensors.safe_open(path, "numpy") as file:
        header = json.loads(file.metadata()["adadfq_jax"])
    assert header["format_version"] == FORMAT_VERSION == 2
    again = adadfq_jax.load_quantized(path)
    for name, kernel in before.kernels.items():
        np.testing.assert_array_equal(kernel.codes, again.kernels[name].codes)
        np.testing.assert_array_equal(
            kernel.dequantize(), again.kernels[name].dequantize()
        )


def test_a_loader_of_numpy_alone_reads_both_versions(tmp_path):
    path = adadfq_jax.load_quantized(FILE).save(tmp_path / "again.safetensors")
    record = helpers.load_npz(FILE.stem)
    for file in (FILE, path):
        _, tensors = plain_loader.read(file)
        for name in (n for n in record if n.endswith("kernel")):
            np.testing.assert_array_equal(tensors[name], record[name])
