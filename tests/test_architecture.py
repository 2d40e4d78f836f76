"""Imports run downward only, and the heavy ones stay at the edge."""

import ast
from pathlib import Path

PACKAGE = Path(__file__).parent.parent / "adadfq_jax"

# From the bottom to the top: a module may import what stands before it.
LAYERS = [
    ["errors", "stop", "allocator", "compile_cache", "progress"],
    ["torch_pickle"],
    ["quant", "losses", "collectives", "framing", "config", "files"],
    ["torch_file", "safetensors_file"],
    ["convolution", "processes"],
    ["layers", "optim", "sharding", "workdir", "command_line", "config_check"],
    ["models", "checkpoint", "mirror"],
    ["game", "recipes", "teacher", "data"],
    ["quantized", "rollout"],
    ["export", "evaluate", "metrics", "events"],
    ["deploy"],
    ["results", "build", "schedule"],
    ["generated"],
    ["outcome", "report"],
    ["sitting"],
    ["train", "modes", "inspection", "benchmark"],
    ["population"],
    ["main", "ablate", "api"],
]


def imports(path):
    """Names of the package's modules, and of others, that a file imports."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module == "adadfq_jax":
            yield from (f"adadfq_jax.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module


def files():
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        if parts != ("__init__",):
            yield path, parts[0]


def test_imports_run_downward():
    rank = {name: i for i, names in enumerate(LAYERS) for name in names}
    for path, name in files():
        for imported in imports(path):
            if not imported.startswith("adadfq_jax."):
                continue
            below = imported.split(".")[1]
            allowed = rank[below] < rank[name] or below == name
            assert allowed, f"{path} imports {below}"


def test_one_module_each_reads_configs_data_sets_and_uses_pmap():
    for path, name in files():
        text = path.read_text()
        if "tensorflow_datasets" in text:
            assert name == "data", path
        if "pmap(" in text:
            assert name == "sharding", path
        if "ml_collections" in text:
            assert name in (
                "config",
                "results",
                "build",
                "generated",
                "outcome",
                "config_check",
                "schedule",
                "sitting",
                "train",
                "modes",
                "population",
                "benchmark",
                "ablate",
                "api",
                "main",
                "command_line",
            ), path


def test_files_stay_readable():
    for path, _ in files():
        assert len(path.read_text().splitlines()) <= 400, path
