"""Compiled programs on disk, so that a second start need not compile."""

import hashlib
import os
import platform
from pathlib import Path

import jax

# All of them: the dozens of small ones together take as long as one large one.
_SHORTEST_KEPT = 0.0  # seconds of compilation


def _processor() -> str:
    """What a compiled CPU program depends on: model and instruction sets."""
    try:
        lines = Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
    except OSError:
        return platform.processor()
    kept = ("model name", "flags", "Features", "CPU part")
    return "\n".join(line for line in lines if line.startswith(kept))


def default_folder() -> Path:
    """The user's cache folder, one for each kind of CPU.

    A home that machines share would otherwise hand one machine's instructions to
    another.
    """
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    kind = f"{platform.machine()}\n{_processor()}"
    name = f"xla-{hashlib.sha256(kind.encode()).hexdigest()[:12]}"
    return Path(base) / "adadfq_jax" / name


def enable() -> None:
    """Turns the persistent compilation cache on, in `default_folder`.

    What the user chose by JAX's variables stays; where no folder can be written, every
    start compiles.
    """
    if not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        try:
            folder = default_folder()
            folder.mkdir(parents=True, exist_ok=True)
        except (OSError, RuntimeError):  # RuntimeError: nobody's home
            return
        jax.config.update("jax_compilation_cache_dir", str(folder))
    if not os.environ.get("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"):
        jax.config.update("jax_persistent_cache_min_compile_time_secs", _SHORTEST_KEPT)
