"""The surroundings: devices, processes, signals, files and the compilation cache."""
