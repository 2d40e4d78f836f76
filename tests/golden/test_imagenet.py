"""One real step of every ImageNet configuration at 224 x 224 on CPU, and its memory.

    IMAGENET_BATCH=16 ./launch/test.sh tests/golden/test_imagenet.py

That is the released batch; by default it is 2.
"""

import json
import os
import sys

import pytest

from tests import runs
from tests.imagenet_step import RECORDS

BATCH = int(os.environ.get("IMAGENET_BATCH", "2"))
MOST_GIB = 8


@pytest.mark.parametrize("name", RECORDS)
def test_one_step_of_both_players(name):
    command = [sys.executable, "-m", "tests.imagenet_step", name, BATCH]
    done = runs.run(command)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["not_finite"] == [] and found["first_bad_step"] == -1
    assert found["g_moved"] and found["q_moved"]
    assert found["peak_gib"] <= MOST_GIB
