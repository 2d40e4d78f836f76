"""The configuration files of the repository."""

import importlib.util
from pathlib import Path

CONFIGS = sorted((Path(__file__).parent.parent / "configs").glob("*.py"))


def get_config(path, argument=None):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config(argument)
