"""How the tests compile: quickly, since it is most of what they do."""

# No optimization by LLVM, the older code for fused loops, in one piece: the step of a
# small network compiles in an eighth of the time. What runs for long runs longer.
QUICKLY = (
    "--xla_backend_optimization_level=0"
    " --xla_cpu_use_fusion_emitters=false"
    " --xla_cpu_parallel_codegen_split_count=1"
)


def flags(devices: int) -> str:
    """XLA_FLAGS for so many CPU devices."""
    return f"--xla_force_host_platform_device_count={devices} {QUICKLY}"
