"""A cache of compiled programs on disk, so that a second start need not compile."""

import hashlib
import os
import platform
from pathlib import Path

import jax

# Keep every program: dozens of small ones take as long to compile as a large one.
_MIN_COMPILE_SECONDS = 0.0


def _processor() -> str:
    """Return the CPU model and instruction sets, on which compiled programs depend."""
    try:
        lines = Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
    except OSError:
        return platform.processor()
    kept = ("model name", "flags", "Features", "CPU part")
    return "\n".join(line for line in lines if line.startswith(kept))


def default_folder() -> Path:
    """Return the user's cache folder, a different one for each kind of CPU.

    Otherwise machines that share a home folder would load programs whose instructions
    they do not have.
    """
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    kind = f"{platform.machine()}\n{_processor()}"
    name = f"xla-{hashlib.sha256(kind.encode()).hexdigest()[:12]}"
    return Path(base) / "adadfq_jax" / name


def enable() -> None:
    """Turn on the persistent compilation cache, in `default_folder`.

    Choices that the user made by JAX's environment variables stay. Where the folder
    cannot be made, the cache stays off and every start compiles.
    """
    if not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        try:
            folder = default_folder()
            folder.mkdir(parents=True, exist_ok=True)
        except (OSError, RuntimeError):  # RuntimeError: the user has no home folder
            return
        jax.config.update("jax_compilation_cache_dir", str(folder))
    if not os.environ.get("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"):
        jax.config.update(
            "jax_persistent_cache_min_compile_time_secs", _MIN_COMPILE_SECONDS
        )
