"""Writes the stubs of the compiled module, gdlib/_core.pyi, from the module itself: `make stubs`."""

import re
import subprocess
import sys
import tempfile
from pathlib import Path

from gdlib import _core


def generate() -> str:
    """The stubs as text, in the project's format."""
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([sys.executable, "-P", "-m", "pybind11_stubgen", "gdlib._core", "-o", folder, "--exit-code"], check=True)
        path = Path(folder, "gdlib", "_core.pyi")
        text = path.read_text()
        for name, function in vars(_core).items():  # the generator forgets a "/" behind the last argument
            if "/) ->" in (getattr(function, "__doc__", None) or "").partition("\n")[0]:
                text = re.sub(rf"(\ndef {name}\([^)]*?),?\s*\) ->", r"\1, /) ->", text)
        path.write_text(text)
        subprocess.run([sys.executable, "-m", "ruff", "format", "--quiet", "--line-length", "140", path], check=True)
        return path.read_text()


if __name__ == "__main__":
    text = generate()
    target = Path(sys.argv[1])
    if "--check" in sys.argv:
        sys.exit(0 if target.read_text() == text else f"{target} differs from the compiled module; run `make stubs`.")
    target.write_text(text)
