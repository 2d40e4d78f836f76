"""What the package imports."""

import sys

from tests import runs


def test_the_package_imports_without_jax():
    code = "import sys, adadfq_jax; sys.exit('jax' in sys.modules)"
    assert runs.run([sys.executable, "-c", code]).returncode == 0
