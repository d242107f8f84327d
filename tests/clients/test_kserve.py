"""The KServe SDK against every server, in a virtual environment of its own at build/kserve: it holds back protobuf for everybody else."""

import subprocess
from pathlib import Path

import pytest

from tests.clients.servers import ROOT, Running

pytestmark = pytest.mark.clients
PYTHON = ROOT / "build" / "kserve" / "bin" / "python"


@pytest.mark.skipif(not PYTHON.exists(), reason="no KServe SDK: python3 -m venv build/kserve && build/kserve/bin/pip install kserve")
def test_the_kserve_sdk(server: Running):
    script = Path(__file__).with_name("kserve_client.py")
    run = subprocess.run([PYTHON, script, server.url], capture_output=True, text=True, timeout=100, env={})
    assert run.stdout.endswith("passed\n"), run.stderr
