"""Names of the files in the folder of a run."""

CONFIG_FILE = "config.json"
IDENTITY_FILE = "identity.json"
COMMAND_FILE = "command.txt"
METRICS_FILE = "metrics.jsonl"
QUANTIZED_FILE = "quantized.safetensors"
EXPORT_FILE = "export.json"
SUMMARY_FILE = "summary.json"
FAILURE_FILE = "failed.json"  # in the folder of a run that reached a non-finite number
LAYER_BITS_FILE = "layer_bits.json"  # bits that a budget chose, by name
SENSITIVITY_FILE = "sensitivity.json"
CHECKPOINTS = "checkpoints"
LOCK_FILE = ".lock"
