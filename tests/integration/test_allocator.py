"""Memory that is kept is not faulted in again."""

import subprocess
import sys

CODE = """
import resource, sys
from adadfq_jax.runtime import allocator
if sys.argv[1] == "keep":
    allocator.keep_freed_memory()
import numpy as np
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        np.ones(5_000_000)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
faults()
print(faults())
"""


def faults(how):
    done = subprocess.run(
        [sys.executable, "-c", CODE, how], capture_output=True, text=True, check=True
    )
    return int(done.stdout)


def test_kept_memory_is_not_faulted_in_again():
    # 20 arrays of 40 MB: 195,000 pages of 4 KB, fewer where pages are larger.
    assert faults("keep") < 0.1 * faults("leave")
