"""Adaptive data-free quantization (AdaDFQ, CVPR 2023) in JAX."""

__version__ = "0.1.0"
