"""Integers against fake quantization as XLA optimizes it; the tests tell it not to."""

import sys

from tests import runs

PROGRAM = """
import jax, numpy as np
from adadfq_jax import quant
from adadfq_jax.deploy.codes import Kernel

quantize = jax.jit(quant.fake_quant_kernel, static_argnums=1)
random = np.random.default_rng(0)
for bits in (2, 3, 4, 8):
    kernel = random.normal(size=(3, 3, 32, 64)).astype(np.float32)
    ratios = quant.kernel_shrink(kernel, bits)
    for ratio in (None, ratios):
        rebuilt = Kernel(*quant.kernel_integers(kernel, bits, ratio), bits)
        np.testing.assert_array_equal(
            rebuilt.dequantize(), quantize(kernel, bits, ratio)
        )
print("equal")
"""


def test_rebuilt_kernels_are_q_s_bit_for_bit_when_xla_optimizes():
    command = [sys.executable, "-c", PROGRAM]
    done = runs.run(command, env={"XLA_FLAGS": "", "JAX_PLATFORMS": "cpu"})
    assert done.stdout == "equal\n", done.stderr
