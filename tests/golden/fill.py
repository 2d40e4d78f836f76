"""Deterministic weights: the same numbers for a state-dict key, whoever fills it.

fill(name, shape) is a pure function of the key's name and shape, so a network of any
size can be checked against recorded outputs without shipping its weights.
"""

import zlib

import numpy as np


def fill(name: str, shape: tuple[int, ...], salt: int = 0) -> np.ndarray:
    """float32 array for state-dict key `name` (kernels OIHW, dense [out, in])."""
    rng = np.random.default_rng([zlib.crc32(name.encode()), salt])
    leaf = name.rsplit(".", 1)[-1]
    if leaf == "num_batches_tracked":
        return np.zeros(shape, np.int64)
    if leaf == "running_mean":
        return (0.1 * rng.standard_normal(shape)).astype(np.float32)
    if leaf == "running_var":
        return rng.uniform(0.5, 1.5, shape).astype(np.float32)
    if leaf == "bias":
        return (0.05 * rng.standard_normal(shape)).astype(np.float32)
    if (
        len(shape) == 1
    ):  # batch-norm scale; smaller on residual branches, so that depth does not blow up
        low, high = (0.3, 0.8) if ".body." in name else (0.6, 1.4)
        return rng.uniform(low, high, shape).astype(np.float32)
    if (
        "emb" in name
        or name.endswith("weights.weight")
        or name.endswith("biases.weight")
    ):
        base = 1.0 if name.endswith("weights.weight") else 0.0
        return (base + 0.3 * rng.standard_normal(shape)).astype(np.float32)
    fan_in = int(np.prod(shape[1:]))
    return (np.sqrt(2.0 / fan_in) * rng.standard_normal(shape)).astype(np.float32)


def noise(name: str, shape: tuple[int, ...], salt: int = 0) -> np.ndarray:
    """Standard normal float32 input named `name`."""
    rng = np.random.default_rng([zlib.crc32(name.encode()), 7, salt])
    return rng.standard_normal(shape).astype(np.float32)


def labels(name: str, n: int, classes: int, salt: int = 0) -> np.ndarray:
    """int32 labels [n] in [0, classes)."""
    rng = np.random.default_rng([zlib.crc32(name.encode()), 11, salt])
    return rng.integers(0, classes, n).astype(np.int32)
