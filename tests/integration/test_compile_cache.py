"""Compiled programs on disk: where, whose, and that a second start adds none."""

import sys

from tests import runs

START = (
    "import jax; from adadfq_jax.runtime import compile_cache; compile_cache.enable();"
    " jax.config.update('jax_platforms', 'cpu');"
    " print(jax.jit(lambda x: x * 2 + 1)(jax.numpy.arange(3.0)))"
)


def start(**env):
    """What a process says that compiles a small program."""
    done = runs.run([sys.executable, "-c", START], env=env)
    assert done.returncode == 0, done.stderr
    return done.stdout


def programs(folder):
    return {path.name for path in folder.rglob("*-cache")}


def test_a_second_start_compiles_nothing(tmp_path):
    start(XDG_CACHE_HOME=str(tmp_path))
    first = programs(tmp_path)
    assert any("lambda" in name for name in first)
    start(XDG_CACHE_HOME=str(tmp_path))
    assert programs(tmp_path) == first


def test_what_the_user_chose_stays(tmp_path):
    chosen, other = tmp_path / "chosen", tmp_path / "other"
    start(JAX_COMPILATION_CACHE_DIR=str(chosen), XDG_CACHE_HOME=str(other))
    assert programs(chosen) and not other.exists()
    patient = {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "60"}
    start(**patient, XDG_CACHE_HOME=str(other))
    assert not programs(other)


def test_a_folder_that_cannot_be_made_is_no_error(tmp_path):
    (tmp_path / "file").write_text("")
    assert "1." in start(XDG_CACHE_HOME=str(tmp_path / "file"))
