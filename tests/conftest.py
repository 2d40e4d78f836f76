"""Eight virtual CPU devices, set before JAX starts; compiled programs are kept."""

import os

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
)

from adadfq_jax import compile_cache

compile_cache.enable()
