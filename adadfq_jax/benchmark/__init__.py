"""The benchmark of the step against plain JAX and against PyTorch, see `__main__`."""
