"""The access log: whole lines, nothing that a client writes can forge one, and a disk that fails stops no request. Ids of requests."""

import errno
import gc
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from gdlib.serve.access_log import AccessLog, RequestIds


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_bytes().decode("ascii").split("\n")[:-1]]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "access.log"


def test_lines(path: Path) -> None:
    log = AccessLog(str(path))
    log.write(id="1", status=200, ms=0.25, key=None)
    log.write(id="2", path="/v2")
    first, second = lines(path)
    assert first["time"].endswith("Z")
    assert len(first["time"]) == len("2026-01-01T00:00:00.000Z")
    assert first | {"time": ""} == {"time": "", "id": "1", "status": 200, "ms": 0.25}
    assert second["path"] == "/v2"
    assert log.lines_lost() == 0
    AccessLog(str(path)).write(id="3")
    assert [line["id"] for line in lines(path)] == ["1", "2", "3"], "a file that is there is gone on with"


@pytest.mark.parametrize(
    "text",
    [
        '\n{"id": "forged"}\n',
        "\r\n",
        '"}',
        "\0\x1b[31m\x7f",
        "\x9b31m",
        "\u2028\u0085",
        "\ud800",
        "é\U0001f600",
        "x" * 100_000,
        "\ud800" * 9999,
        "\0" * 9999,
    ],
)
def test_what_a_client_writes_stays_in_its_field(path: Path, text: str) -> None:
    log = AccessLog(str(path))
    log.write(path=text, method=text)
    log.write(id="next")
    first, second = lines(path)
    assert set(first) == {"time", "path", "method"}
    assert set(second) == {"time", "id"}
    raw = path.read_bytes()
    assert not set(raw) & (set(range(32)) - {10} | set(range(128, 256)))
    assert len(raw) < 10_000
    assert log.lines_lost() == 0


def test_several_threads(path: Path) -> None:
    log = AccessLog(str(path))
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda i: log.write(id=str(i), path="x" * 200), range(400)))
    assert sorted(int(line["id"]) for line in lines(path)) == list(range(400))


def test_a_full_disk_loses_lines_and_counts_them(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = AccessLog(str(path))
    log.write(id="1")

    def full(descriptor: int, data: bytes) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", full)
        log.write(id="2")
        log.write(id="3")
    log.write(id="4")
    assert [line["id"] for line in lines(path)] == ["1", "4"]
    assert log.lines_lost() == 2


def test_a_line_written_in_part_does_not_spoil_the_next(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = AccessLog(str(path))
    write = os.write
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", lambda descriptor, data: write(descriptor, data[:10]))
        log.write(id="1")
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", lambda descriptor, data: 0)
        log.write(id="2")
    log.write(id="3")
    log.write(id="4")
    torn, *whole = path.read_text().splitlines()
    assert len(torn) == 10
    assert [json.loads(line)["id"] for line in whole] == ["3", "4"]
    assert log.lines_lost() == 2


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="this system has no /dev/full")
def test_a_device_that_is_full() -> None:
    log = AccessLog("/dev/full")
    log.write(id="1")
    assert log.lines_lost() == 1


def test_a_pipe_whose_reader_is_gone() -> None:
    """Standard output, which a process of its own has to itself."""
    code = """
import sys
from gdlib.serve.access_log import AccessLog
log = AccessLog("-")
log.write(id="1")
print("wrote", file=sys.stderr, flush=True)
sys.stdin.readline()
log.write(id="2")
print(log.lines_lost(), file=sys.stderr, flush=True)
"""
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdin and process.stdout and process.stderr  # noqa: PT018 - for the type checker
        assert json.loads(process.stdout.readline())["id"] == "1"
        assert process.stderr.readline() == "wrote\n"
        process.stdout.close()
        process.stdin.write("\n")
        process.stdin.flush()
        assert process.stderr.readline() == "1\n"
        assert process.wait(60) == 0


def test_a_file_that_cannot_be_opened(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="nothing"):
        AccessLog(str(tmp_path / "nothing" / "access.log"))


def test_the_file_is_closed_with_the_log(path: Path) -> None:
    log = AccessLog(str(path))
    descriptor = log._descriptor
    del log
    gc.collect()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(descriptor)


def test_the_file_is_not_for_everybody(path: Path) -> None:
    AccessLog(str(path))
    assert path.stat().st_mode & 0o007 == 0


class TestIds:
    @pytest.mark.parametrize("sent", ["a", "A-1_2.3:4", "x" * 64, "550e8400-e29b-41d4-a716-446655440000"])
    def test_a_fit_one_is_taken(self, sent: str) -> None:
        assert RequestIds().get(sent) == sent

    @pytest.mark.parametrize("sent", [None, "", " a", "a b", "a\n", "a\r\nSet-Cookie: x", "é", "\u0661", "x" * 65, "a,b", '"', "<b>"])
    def test_any_other_is_replaced(self, sent: str | None) -> None:
        ids = RequestIds()
        given = ids.get(sent)
        assert given != sent
        assert ids.get(given) == given

    def test_each_is_another(self) -> None:
        ids = [RequestIds(), RequestIds()]
        given = [one.get(None) for one in ids for _ in range(100)]
        assert len(set(given)) == 200

    def test_a_child_does_not_repeat_those_of_its_parent(self) -> None:
        ids = RequestIds()
        parent = {ids.get(None) for _ in range(3)}
        prefix = ids.get(None).split("-")[0]
        ids.forked()
        child = [ids.get(None) for _ in range(3)]
        assert not parent & set(child)
        assert all(not given.startswith(prefix) for given in child)
        assert len({given.split("-")[0] for given in child}) == 1
