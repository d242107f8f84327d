"""Every run leaves no process, file or segment behind."""

import multiprocessing
import os
import tempfile
from pathlib import Path

import pytest

SHM = Path("/dev/shm")


@pytest.fixture(autouse=True)
def nothing_left_behind(tmp_path, monkeypatch):
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setenv("TMPDIR", str(temporary))
    monkeypatch.setattr(tempfile, "tempdir", None)
    segments = named_segments()
    yield temporary
    assert multiprocessing.active_children() == []
    assert [entry.name for entry in temporary.iterdir()] == []
    assert named_segments() <= segments


def named_segments():
    return {entry.name for entry in SHM.iterdir() if entry.name.startswith(("psm_", f"pym-{os.getpid()}-"))} if SHM.is_dir() else set()
