"""ImageNet's networks as ONNX and StableHLO files, with filled weights.

Here they are few and their images small. All of them at their own size and bits:

    DEPLOY_FULL=1 ./launch/test.sh tests/integration/test_deploy_networks.py

Two runtimes sum in another order; an activation on the edge of two codes then takes
the other one, and in a deep network of random weights that spreads through all that
follows. It happens on some images. On the others the logits must be the same, which a
wrong graph would give on none.
"""

import dataclasses
import os

import numpy as np
import pytest

from adadfq_jax.deploy import export, quantized_file, verify
from adadfq_jax.deploy.network import NetworkInfo
from adadfq_jax.deploy.onnx_file import OnnxOptions, to_onnx
from adadfq_jax.deploy.stablehlo_file import to_stablehlo
from adadfq_jax.errors import ExportError
from adadfq_jax.settings import Export
from tests import quantized
from tests.quantized import filled

FULL = bool(os.environ.get("DEPLOY_FULL"))
NETWORKS = ["resnet18", "mobilenetv2_w1", *(["resnet50"] if FULL else [])]
SIZE, COUNT = (224, 8) if FULL else (64, 16)
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@pytest.mark.parametrize("model", NETWORKS)
def test_imagenet_networks_on_random_images(tmp_path, model):
    shape = (SIZE, SIZE, 3)
    info = NetworkInfo(model, 1000, shape, MEAN, STD, 4, 4)
    pixels = verify.random_images(shape).pixels[:COUNT]
    images = np.float32((pixels / 255 - MEAN) / STD)
    file = quantized.save(tmp_path / "q.safetensors", info, filled(info), images)
    network = quantized_file.load_quantized(file)
    ours = np.asarray(network(images))
    spread = ours.std(0).mean()  # that of a logit from image to image
    assert spread > 0.05 * ours.std()
    onnx_model = to_onnx(network, OnnxOptions()).SerializeToString()
    for run in (
        verify.onnx_runner(onnx_model, lambda x: x),
        verify.stablehlo_runner(to_stablehlo(network, pixels=False)),
    ):
        errors = np.abs(run(images) - ours).max(-1) / spread
        print(model, spread, ours.std(), np.sort(errors))
        assert np.median(errors) < 1e-3
    assert len(onnx_model) < file.stat().st_size * 1.3


@pytest.mark.parametrize("bits", [4, *([8] if FULL else [])])
def test_resnet50_is_written_though_roundings_spread(tmp_path, monkeypatch, bits):
    """At 4 bits to other logits of some images, at 8 to slightly others of all.

    That is no more than what moving the constants of Q in their last places does, and
    far less than what one kernel with its channels turned around does.
    """
    monkeypatch.setattr(verify, "UNLABELLED_IMAGES", 40)
    info = NetworkInfo("resnet50", 1000, (64, 64, 3), MEAN, STD, bits, bits)
    pixels = verify.random_images(info.image_shape).pixels
    images = np.float32((pixels / 255 - MEAN) / STD)
    file = quantized.save(tmp_path / "q.safetensors", info, filled(info), images[:16])
    options = Export(stablehlo=False)
    made = export.write_exports(file, tmp_path, options)["files"]["onnx"]
    own = verify.Differences(**made["own_differences"])
    if bits == 8:
        largest = verify.LOGIT_SHARE * made["logit_spread_images"]
        assert largest < made["logit_difference_median"] < verify.OWN * own.median
    else:
        assert 1 - made["same_class"] > 1 - verify.SAME_CLASS and own.changed > 0
        assert made["logit_difference_median"] < 1e-4 * made["logit_spread_images"]
    network = quantized_file.load_quantized(file)

    def run_q(batch):
        return np.asarray(network(batch))

    kernels = dict(network.kernels)
    name = "stage3_unit2.conv2.conv.kernel"
    kernels[name] = dataclasses.replace(
        kernels[name], codes=kernels[name].codes[..., ::-1]
    )
    wrong = to_onnx(dataclasses.replace(network, kernels=kernels), OnnxOptions())
    run = verify.onnx_runner(wrong.SerializeToString(), lambda x: x)
    ours, theirs = (verify.all_logits(f, images) for f in (run_q, run))
    found = verify.compare(ours, theirs, verify.random_images(info.image_shape), own)
    with pytest.raises(ExportError, match="does not compute what Q does"):
        verify.require_agreement("f", found)
