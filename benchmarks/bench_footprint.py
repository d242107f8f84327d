"""What the package costs before it computes anything: an import in a fresh interpreter, and bytes on disk."""

import importlib.util
import math
import statistics
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.machine import fresh_interpreter
from benchmarks.measure import Contender, Group, Run


def importing(_: Any, module: str) -> Run:
    if importlib.util.find_spec(module.partition(".")[0]) is None:
        raise ModuleNotFoundError(name=module.partition(".")[0])
    return partial(fresh_interpreter, f"import {module}")


def import_seconds_beyond_numpy(rounds: int = 15) -> float:
    """What `import gdlib` takes in an interpreter that has imported NumPy: the median over fresh ones, after one that fills the caches."""
    code = "import time, numpy; begin = time.perf_counter(); import gdlib; print(time.perf_counter() - begin)"
    return statistics.median([float(fresh_interpreter(code)) for _ in range(rounds + 1)][1:])


def installed_bytes() -> int:
    """Files of the installed package, the compiled module among them wherever it lies; bytecode apart, which is Python's own cache."""
    package, extension = importlib.util.find_spec("gdlib"), importlib.util.find_spec("gdlib._core")
    assert package is not None
    assert extension is not None
    files = {file.resolve() for folder in package.submodule_search_locations or () for file in Path(folder).rglob("*")}
    files.add(Path(str(extension.origin)).resolve())
    return sum(file.stat().st_size for file in files if file.is_file() and file.suffix != ".pyc")


def wheel_bytes() -> float:
    """The newest wheel in dist/; NaN without one."""
    wheels = sorted((Path(__file__).parents[1] / "dist").glob("gdlib-*.whl"), key=lambda path: path.stat().st_mtime)
    return wheels[-1].stat().st_size if wheels else math.nan


MODULES = {
    "nothing": "sys",
    "NumPy": "numpy",
    "gdlib": "gdlib",
    "scikit-learn": "sklearn.linear_model",
    "JAX": "jax",
    "PyTorch": "torch",
}
GROUPS = [
    Group(
        "Import",
        "interpreter",
        [Contender(name, partial(importing, module=module), limit=name == "nothing") for name, module in MODULES.items()],
        note="A fresh interpreter each time, from start to exit, with the files in the system's cache; the limit imports nothing.",
        rounds=9,
    )
]


def test_import(time_contender: None) -> None: ...
