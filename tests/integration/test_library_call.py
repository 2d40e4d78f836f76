"""`adadfq_jax.quantize` in memory: it writes nothing and needs no command line."""

import sys

from tests import runs

PROGRAM = """
import os, sys

WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


def refuse(event, arguments):
    # What a read-only file system refuses. Pipes and terminals are no files of it.
    if event == "open" and isinstance(arguments[2], int) and arguments[2] & WRITING:
        if not str(arguments[0]).startswith("/dev/"):
            raise OSError(30, "Read-only file system", arguments[0])
    if event in ("os.mkdir", "os.rename", "os.remove", "os.link", "os.symlink"):
        raise OSError(30, "Read-only file system", str(arguments))


import numpy as np

import adadfq_jax
from tests.own_networks import Small

quantize = adadfq_jax.quantize  # a library below asks for a temporary folder
sys.addaudithook(refuse)
import jax

model = Small()
image = np.zeros((1, 16, 16, 3), np.float32)
variables = model.init(jax.random.key(0), image)
network = quantize(
    model, variables, image_shape=(16, 16, 3), steps=10,
    recipe="adadfq_short", settings={"devices": 1},
)
assert np.isfinite(network(image)).all() and network.path is None
rooms = {name.split(".")[1] for name in sys.modules if name.startswith("adadfq_jax.")}
print(sorted(rooms & {"jobs", "config", "main"}), "ml_collections" in sys.modules)
try:
    network.save("q.safetensors")
except OSError as error:
    print(error.errno)
"""


def test_it_works_on_a_read_only_file_system_without_jobs_and_configs(tmp_path):
    done = runs.run([sys.executable, "-B", "-c", PROGRAM], env={"JAX_PLATFORMS": "cpu"})
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-2:] == ["[] False", "30"]
