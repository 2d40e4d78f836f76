"""Q for other runtimes: ONNX and StableHLO files, checked, with a model card."""
