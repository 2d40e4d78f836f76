"""A process that reads files within bounds: 2 GiB of memory, told paths on stdin.

For each line, a path, it answers with one line of JSON: {"loaded": digest} or
{"refused": message}. Anything else that a file causes ends it. Files are P's; a path
that ends in `ONNX` is of an ONNX file, and one that ends in `QUANTIZED` of a quantized
network, whose variables must be finite.
"""

import hashlib
import json
import resource
import sys

import jax
import numpy as np

from adadfq_jax import teacher
from adadfq_jax.deploy import quantized_file
from adadfq_jax.errors import InputError

MEMORY = 2 * 2**30
QUANTIZED = "quantized.safetensors"
ONNX = "net.onnx"


def digest(variables) -> str:
    """SHA-256 of the leaves' bytes, in the order of the tree."""
    total = hashlib.sha256()
    for leaf in jax.tree.leaves(variables):
        total.update(np.ascontiguousarray(leaf).tobytes())
    return total.hexdigest()


def variables_of(path: str):
    """What a file holds."""
    if path.endswith(ONNX):
        return teacher.load_network(path).variables
    if not path.endswith(QUANTIZED):
        return teacher.load(path)
    network = quantized_file.load_quantized(path)
    for leaf in jax.tree.leaves(network.variables):
        assert np.isfinite(leaf).all(), path
    return network.variables


def main() -> None:
    """Answers until stdin ends."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    for line in sys.stdin:
        try:
            answer = {"loaded": digest(variables_of(line.strip()))}
        except InputError as error:
            answer = {"refused": str(error)}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
