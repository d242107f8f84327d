"""The KServe SDK against every server, in a virtual environment of its own at build/kserve: it holds back protobuf for everybody else."""

import subprocess
from pathlib import Path

import pytest

from tests.clients.servers import ROOT, Running, example

PYTHON = ROOT / "build" / "kserve" / "bin" / "python"
pytestmark = [
    pytest.mark.clients,
    pytest.mark.skipif(not PYTHON.exists(), reason="no KServe SDK: python3 -m venv build/kserve && build/kserve/bin/pip install kserve"),
]


def run(*arguments: str | Path) -> str:
    done = subprocess.run([PYTHON, *arguments], capture_output=True, text=True, timeout=100, env={})
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_kserve_sdk(server: Running):
    assert run(Path(__file__).with_name("kserve_client.py"), server.url).endswith("passed\n")


def test_the_program_of_the_document(server: Running):
    assert run("-c", example(server, "kserve")).split() == ["[[165.]", "[255.]]"]
