"""Steps per second against a plain JAX step and against PyTorch; see `__main__`."""
