"""Adaptive data-free quantization (AdaDFQ, CVPR 2023) in JAX.

quantize         quantizes a network of your own, without data
load_network     reads a classifier from its file, as a function of images
load_quantized   reads a quantized network from its file
trace            finds what can be quantized in a network, and where
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from adadfq_jax.errors import InputError as InputError
from adadfq_jax.runtime.versions import __version__ as __version__

if TYPE_CHECKING:
    from adadfq_jax.api import quantize as quantize
    from adadfq_jax.api import trace as trace
    from adadfq_jax.deploy.quantized_file import load_quantized as load_quantized
    from adadfq_jax.teacher.network import load_network as load_network

__all__ = [
    *("InputError", "__version__"),
    *("load_network", "load_quantized", "quantize", "trace"),
]


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def __getattr__(name: str) -> Any:
    # Here, so that `import adadfq_jax` and --help do not wait for JAX.
    if name == "load_quantized":
        from adadfq_jax.deploy.quantized_file import load_quantized

        return load_quantized
    if name == "load_network":
        from adadfq_jax.teacher.network import load_network

        return load_network
    if name in ("quantize", "trace"):
        from adadfq_jax import api

        return getattr(api, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
