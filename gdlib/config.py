"""What runs on this machine, and with how many threads."""

from typing import Any

from gdlib import _core, validation


def set_num_threads(count: int) -> None:
    """Set how many threads a call may use, 1 to 1024; results do not depend on it.

    Overrides `GDLIB_NUM_THREADS`; the default is every CPU that affinity and the cgroup quota leave. Raises ValueError out of range and
    TypeError for anything but a whole number.
    """
    _core.set_num_threads(validation.as_count(count, "the number of threads", most=1024))


def get_config() -> dict[str, Any]:
    """By name: the kernel table in use, all that this machine can run, CPU features that they need, bytes of L2 and L3, threads, OpenMP,
    CUDA, compiler."""
    return {
        "isa": _core.isa(),
        "isas": _core.available_isas(),
        "features": _core.cpu_features(),
        "caches": _core.cache_bytes(),
        "threads": _core.num_threads(),
        "openmp": _core.openmp_enabled(),
        "cuda": False,  # this build has no device kernels
        "compiler": _core.compiler(),
    }


def show_config() -> None:
    """Print which kernels run here, and why: the ISA (forced with `GDLIB_ISA`), features, caches, threads, OpenMP and
    CUDA."""
    config = get_config()
    print(f"isa      {config['isa']} (of {', '.join(config['isas'])}; GDLIB_ISA forces one)")
    print(f"features {', '.join(config['features']) or 'none that a table needs'}")
    l2, l3 = config["caches"]
    print(f"caches   L2 of a core {l2 >> 10:,} KiB, L3 that it shares {l3 >> 10:,} KiB")
    print(f"threads  {config['threads']} (GDLIB_NUM_THREADS or gdlib.set_num_threads)")
    print(f"openmp   {'yes' if config['openmp'] else 'no: one thread'}")
    print(f"cuda     {'yes' if config['cuda'] else 'not built'}")
    print(f"compiler {config['compiler']}")
