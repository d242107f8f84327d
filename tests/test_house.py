"""The arrows of the house: who may use whom, scanned from imports and includes. An arrow that runs back up fails here."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# Each room of csrc and the rooms whose headers it may include.
NATIVE = {
    "kernels": set(),
    "dispatch": {"kernels"},
    "engine": {"dispatch", "kernels"},
    "bindings": {"engine", "dispatch"},
}
STL_FREE = {"kernels"}  # C headers and intrinsics only

# Each module of gdlib (a package counts as one) and the others that it may import.
BASE = {"errors", "_core"}
PYTHON = {
    "errors": set(),
    "config": {"_core", "validation"},
    "validation": set(),
    "datasets": set(),
    "parameters": {"validation"},
    "modules": BASE | {"validation", "parameters"},
    "nn": BASE | {"validation", "parameters", "modules"},
    "losses": BASE | {"validation"},
    "data": BASE | {"validation"},
    "optim": BASE | {"validation", "parameters"},
    "preprocessing": {"validation", "modules", "nn"},
    "serialization": {"validation", "modules", "nn"},
    "history": set(),
    "training": BASE | {"validation", "modules", "nn", "losses", "optim", "data", "history"},
    "distributed": BASE | {"config", "validation", "parameters", "modules", "losses", "optim", "data", "history", "training"},
    "serve": {"serialization"},
    "quickstart": {
        "config",
        "datasets",
        "history",
        "losses",
        "nn",
        "optim",
        "preprocessing",
        "serialization",
        "serve",
        "training",
    },
    "__main__": {"cli"},
    "cli": {"quickstart", "serve", "distributed", "", "config"},
    "": {"config", "data", "errors", "history", "losses", "nn", "optim", "parameters", "serialization", "training"},
}
SERVE = {
    "tensors": set(),
    "parsing": {"tensors"},
    "protocol": {"parsing", "tensors"},
    "models": {"protocol", "tensors"},
    "batching": {"models"},
    "onnx": {"models", "protocol", "tensors"},
    "locks": set(),
    "repository": {"locks", "models", "onnx"},
    "metrics": {"locks"},
    "keys": {"locks"},
    "exchange": {"keys"},
    "bodies": {"exchange", "tensors"},
    "description": {"protocol", "tensors"},
    "access_log": set(),
    "background": set(),
    "page": {"exchange"},
    "endpoints": {
        "bodies",
        "description",
        "exchange",
        "keys",
        "metrics",
        "models",
        "parsing",
        "protocol",
        "repository",
        "tensors",
    },
    "app": {
        "access_log",
        "background",
        "batching",
        "bodies",
        "endpoints",
        "exchange",
        "keys",
        "metrics",
        "page",
        "protocol",
        "repository",
        "tensors",
    },
    "channels": {"bodies", "endpoints"},
    "server": {"app", "channels"},
    "wsgi": {"app"},
    "": {"app", "server"},
}


def imported(path):
    """Dotted names of everything that a module imports, wherever in it the import stands."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} has a relative import"
            for alias in node.names:
                yield f"{node.module}.{alias.name}"


def modules_of_gdlib(path):
    """First-level modules of gdlib that a file imports; "" is the package itself."""
    for name in imported(path):
        parts = name.split(".")
        if parts[0] == "gdlib":
            here = parts[1] if len(parts) > 1 else ""
            inside = (ROOT / "gdlib" / here).is_dir() or (ROOT / "gdlib" / f"{here}.py").exists() or here == "_core"
            yield here if inside else ""


def test_python_arrows():
    for path in sorted((ROOT / "gdlib").rglob("*.py")):
        relative = path.relative_to(ROOT / "gdlib").with_suffix("")
        room = "" if relative.parts == ("__init__",) else relative.parts[0]
        assert room in PYTHON, f"{relative} is a new room: add it and its arrows to the plan"
        used = set(modules_of_gdlib(path)) - {room}
        assert used <= PYTHON[room], f"gdlib/{relative} imports {sorted(used - PYTHON[room])}: an arrow back up"


def test_the_rooms_of_serve():
    for path in (ROOT / "gdlib" / "serve").glob("*.py"):
        room = "" if path.stem == "__init__" else path.stem
        used = {name.split(".")[2] for name in imported(path) if name.startswith("gdlib.serve.")}
        assert used <= SERVE[room] | {room}, f"serve/{path.name} imports {sorted(used - SERVE[room])}"


def test_native_arrows():
    seen = 0
    for path in sorted((ROOT / "csrc").rglob("*")):
        if path.suffix not in (".h", ".cpp", ".inl"):
            continue
        room = path.relative_to(ROOT / "csrc").parts[0]
        for quoted, angled in re.findall(r'^\s*#\s*include\s+(?:"([^"]+)"|<([^>]+)>)', path.read_text(), re.M):
            seen += 1
            if quoted:
                target = (path.parent / quoted).resolve()
                assert target.exists(), f"{path} includes {quoted}, which is not there"
                other = target.relative_to(ROOT / "csrc").parts[0]
                assert other == room or other in NATIVE[room], f"{path} includes {quoted}: an arrow back up"
                if other == "kernels" and room != "kernels":
                    assert target.name == "kernels.h", f"{path} sees more of the kernels than their contract"
            else:
                assert not angled.startswith("pybind11") or room == "bindings", f"{path} uses pybind11 outside bindings"
                assert angled != "omp.h" or path.name == "parallel.cpp", f"{path} uses OpenMP outside parallel.cpp"
                assert room not in STL_FREE or angled.endswith(".h"), f"{path} uses the C++ library on the ground floor"
    assert seen > 40


def test_pragmas_of_openmp_stay_in_parallel():
    for path in (ROOT / "csrc").rglob("*.[hci]*"):
        if path.name != "parallel.cpp":
            assert "#pragma omp" not in path.read_text(), f"{path} has an OpenMP pragma"


def test_intrinsics_stay_in_simd():
    for path in (ROOT / "csrc").rglob("*.[hci]*"):
        if path.name != "simd.h":
            assert not re.search(r"\b_mm\d*_|\bv(fma|ld1|st1)q?_|immintrin|arm_neon", path.read_text()), f"{path} has intrinsics"


def test_import_brings_in_nothing_heavy():
    """`import gdlib` must stay a few milliseconds: whatever only some calls need is imported by them."""
    heavy = ["multiprocessing", "safetensors", "tqdm", "matplotlib", "waitress", "http", "urllib.request", "asyncio"]
    code = "import sys, numpy; before = set(sys.modules); import gdlib; print(*sorted(set(sys.modules) - before))"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert "gdlib.nn" in loaded
    assert [name for name in loaded if name.split(".")[0] in heavy or name in heavy] == []


@pytest.mark.parametrize("path", [p for p in sorted((ROOT / "gdlib").rglob("*.py")) if p.name != "__init__.py"], ids=lambda p: p.stem)
def test_each_module_says_what_it_is_for(path):
    assert ast.get_docstring(ast.parse(path.read_text())), f"{path} opens without a docstring"


def test_each_table_needs_what_its_flags_imply():
    flags = re.findall(r"set\(GDLIB_FLAGS_(\w+) ([^)]*)\)", (ROOT / "CMakeLists.txt").read_text())
    dispatch = (ROOT / "csrc" / "dispatch" / "dispatch.cpp").read_text()
    assert {isa for isa, _ in flags} == {"scalar", "avx2", "avx512", "neon"}
    for isa, text in flags:
        implied = {flag[2:] for flag in text.split() if flag.startswith("-m") and "=" not in flag}
        needs = re.search(r"\{&kernels_" + isa + r", \{([^}]*)\}\}", dispatch).group(1)
        assert implied <= set(re.findall(r'"(\w+)"', needs)), f"the {isa} table may run where {implied} are missing"
