"""The environment of a run: devices, processes, signals, files, compilation cache."""
