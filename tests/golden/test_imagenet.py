"""One real step of an ImageNet configuration at 224 x 224 on CPU, and its memory.

By default that of ResNet-18, with 2 images. Of all three, with the released batch:

    IMAGENET_BATCH=16 ./launch/test.sh tests/golden/test_imagenet.py
"""

import json
import os
import sys

import pytest

from tests import runs
from tests.imagenet_step import RECORDS

GIVEN = os.environ.get("IMAGENET_BATCH")
BATCH = int(GIVEN or 2)
MOST_GIB = 8


@pytest.mark.parametrize("name", RECORDS if GIVEN else list(RECORDS)[:1])
def test_one_step_of_both_players(name):
    command = [sys.executable, "-m", "tests.imagenet_step", name, BATCH]
    done = runs.run(command)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["not_finite"] == [] and found["first_bad_step"] == -1
    assert found["g_moved"] and found["q_moved"]
    assert found["peak_gib"] <= MOST_GIB
