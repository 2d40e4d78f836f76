"""quantized.safetensors read with numpy alone: the format is open.

Nothing here knows JAX or the package; the format is that of
`adadfq_jax/deploy/quantized_file.py`.
"""

import json
from pathlib import Path

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view


def read(path):
    """(header, tensors by name): kernels [..., out] and other tensors as float32."""
    content = Path(path).read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    index = json.loads(content[8:start])
    header = json.loads(index.pop("__metadata__")["adadfq_jax"])
    raw = {}
    for name, entry in index.items():
        begin, end = entry["data_offsets"]
        dtype = {"U8": np.uint8, "F32": "<f4"}[entry["dtype"]]
        flat = np.frombuffer(content[start + begin : start + end], dtype)
        raw[name] = flat.reshape(entry["shape"])
    for name, kernel in header["kernels"].items():
        # Before version 3 the output channels are the last axis of every kernel.
        shape, axes = kernel, [-1]
        if header["format_version"] >= 3:
            shape, axes = kernel["shape"], kernel["out_axes"]
        bits = header.get("layer_bits", {}).get(name, header["weight_bits"])
        stream = np.unpackbits(raw.pop(f"{name}.codes"), bitorder="little")
        digits = stream[: np.prod(shape) * bits].reshape(-1, bits)
        codes = (digits @ 2 ** np.arange(bits)).reshape(shape)
        along = np.ones(len(shape), int)
        along[axes] = np.asarray(shape)[axes]
        zero_point, scale = (
            raw.pop(f"{name}.{k}").reshape(along) for k in ("zero_point", "scale")
        )
        if header["format_version"] == 1:
            zero_point = 2 ** (bits - 1) - zero_point
        raw[name] = np.float32(codes - zero_point) * scale
    return header, raw


def resnet20(header, t, x):
    """Logits of images [B, H, W, C] in normalised space, of a ResNet-20's tensors."""

    def block(name, x, stride=1):
        kernel = t[f"{name}.conv.kernel"]
        size, pad = kernel.shape[:2], kernel.shape[0] // 2
        x = np.pad(x, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
        seen = sliding_window_view(x, size, (1, 2))[:, ::stride, ::stride]
        x = np.einsum("bhwcij,ijco->bhwo", seen, kernel, optimize=True)
        x = (x - t[f"{name}.bn.mean"]) / np.sqrt(t[f"{name}.bn.var"] + 1e-5)
        return x * t[f"{name}.bn.scale"] + t[f"{name}.bn.bias"]

    def rectify(reader, x):
        name = f"{reader}.kernel:input"
        lo, hi = t[f"{name}.range"]
        bits = header["layer_bits"].get(name, header["act_bits"])
        steps = 2**bits - 1
        s = steps / max(hi - lo, 1e-8)
        first = np.round(s * lo)
        codes = np.clip(np.round(s * np.maximum(x, 0) - first), 0, steps)
        return np.float32((codes + first) / s)

    names = [f"stage{stage}_unit{unit}" for stage in (1, 2, 3) for unit in (1, 2, 3)]
    x = block("init_block", x)
    for name in names:
        stride = 1 + (name in ("stage2_unit1", "stage3_unit1"))
        # The first kernel that reads a unit's input is that of its shortcut.
        first = "identity_conv" if stride > 1 else "conv1"
        x = rectify(f"{name}.{first}.conv", x)
        y = block(f"{name}.conv1", x, stride)
        y = block(f"{name}.conv2", rectify(f"{name}.conv2.conv", y))
        x = y + (block(f"{name}.identity_conv", x, stride) if stride > 1 else x)
    x = rectify("output", x)
    return x.mean((1, 2)) @ t["output.kernel"] + t["output.bias"]
