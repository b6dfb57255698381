"""What the machine is, what is installed on it, and what is missing: for measurements and for bug reports."""

import os
import platform
from collections.abc import Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

# --- where and with what ----------------------------------------------------------------------------------------------


def describe_machine() -> dict[str, Any]:
    """Where a number was measured: {cpu, cores, memory_gib, system, devices: [kind], python}."""
    import jax

    return {
        "cpu": _cpu_name(),
        "cores": cores(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "system": f"{platform.system()} {platform.machine()}",
        "devices": [device.device_kind for device in jax.devices()],
        "python": platform.python_version(),
    }


def machine_line(machine: Mapping[str, Any]) -> str:
    """What `describe_machine` says, for people."""
    devices = ", ".join(dict.fromkeys(machine["devices"]))
    return f"{machine['cpu']}, {machine['cores']} cores, {machine['memory_gib']:g} GiB; jax devices: {devices}"


def cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def describe_versions() -> dict[str, str]:
    """Versions of this package and of what its numbers depend on, as far as they are installed."""
    versions = {}
    for name in ("vmod_jax", "jax", "jaxlib", "flax", "optax", "numpy", "transformers", "peft", "torch", "av"):
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions


def describe_environment() -> dict[str, str]:
    """The variables that change how fast a process is, as far as they are set: those of XLA, malloc and threads."""
    names = (
        "XLA_", "LIBTPU_INIT_ARGS", "JAX_DEFAULT_MATMUL", "JAX_PLATFORMS", "CUDA_VISIBLE_DEVICES", "MALLOC_",
        "GLIBC_TUNABLES", "LD_PRELOAD", "OMP_NUM",
    )  # fmt: skip
    return {name: value for name, value in sorted(os.environ.items()) if name.startswith(names)}


# --- what is missing --------------------------------------------------------------------------------------------------


def extras(package: str = "vmod_jax") -> list[str]:
    """The names of what a package can be installed with beside what it must have."""
    return sorted(metadata.metadata(package).get_all("Provides-Extra") or ())


def missing(package: str = "vmod_jax", extra: str = "") -> list[str]:
    """What a package (or one of its extras) asks for and is not there: "peft", "torch==2.13.0 (2.12.1 is here)"."""
    return list(dict.fromkeys(_missing(package, extra)))


def _missing(package: str, extra: str) -> Iterator[str]:
    from packaging.requirements import Requirement

    def asked(need: Requirement, extra: str) -> bool:
        return need.marker is None or need.marker.evaluate({"extra": extra})

    for need in map(Requirement, metadata.requires(package) or ()):
        if not asked(need, extra) or (extra and asked(need, "")):  # an extra's alone, not the package's own
            continue
        try:
            version = metadata.version(need.name)
        except metadata.PackageNotFoundError:
            yield need.name
            continue
        if not need.specifier.contains(version, prereleases=True):
            yield f"{need.name}{need.specifier} ({version} is here)"
        for inner in sorted(need.extras):
            yield from _missing(need.name, inner)
