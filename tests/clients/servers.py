"""Servers as subprocesses: the very commands of docs/serving.md, on a port of their own, until their process is told to end."""

import http.client
import importlib.util
import json
import os
import random
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Self

import pytest

ROOT = Path(__file__).parents[2]
DOCUMENT = (ROOT / "docs" / "serving.md").read_text()
ADDRESS = "127.0.0.1"
START_SECONDS = 60  # bounds of what is awaited; nothing takes nearly as long, and no test asserts how long it took
STOP_SECONDS = 25  # less than what gunicorn grants a worker that does not end by itself
ANSWER_SECONDS = 60
AGAIN_SECONDS = 3  # after which granian's workers are told once more


def _commands(heading: str) -> dict[str, list[str]]:
    """The commands under a heading of the document, by what they run."""
    section = DOCUMENT.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    found = {}
    for line in re.findall(r"^    ((?:gdlib|gunicorn|granian|uwsgi) .*)$", section, re.M):
        words = shlex.split(line)
        kind = {"gdlib": "waitress"}.get(words[0], words[0])
        found[kind + "-gthread" * ("gthread" in words)] = words
    return found


def example(server: "Running", package: str) -> str:
    """The program of the document that imports `package`, for this server."""
    (found,) = (
        code for code in re.findall(r"^```python\n(.*?)^```", DOCUMENT, re.M | re.S) if re.search(rf"(import|from) {package}", code)
    )
    return found.replace(f"{ADDRESS}:8000", server.netloc)


ONE, SEVERAL = _commands("One process"), _commands("Several processes")


def _skip_unless_there(program: str) -> None:
    there = _uwsgi() is not None if program == "uwsgi" else importlib.util.find_spec(program) is not None
    if not there:
        pytest.skip(f"{program} is not installed; `pip install gdlib[clients]` brings it, and uWSGI by `pip install uwsgi`")


def _uwsgi() -> str | None:
    beside = Path(sys.executable).parent / "uwsgi"
    return str(beside) if beside.exists() else shutil.which("uwsgi")


def _argv(words: list[str], port: int, models: Path) -> list[str]:
    program, *rest = (word.replace("8000", str(port)) for word in words)
    if program == "uwsgi":
        return [_uwsgi() or program, *rest, "--disable-logging"]
    rest = [str(models) if word == "models" else word for word in rest]
    return [sys.executable, "-m", program, *rest]


def free_port() -> int:
    """A port that nobody listens on, below those that the system gives to clients."""
    for port in random.sample(range(20000, 32000), 100):
        try:
            with socket.create_server((ADDRESS, port)):
                return port
        except OSError:
            continue
    raise OSError("no port is free")


class Running:
    """A server that runs in a `with` statement; `settings` become GDLIB_<NAME>."""

    def __init__(self, words: list[str], models: Path, log: Path, **settings: Any) -> None:
        self.program = words[0]
        self.processes = 2 if "2" in words else 1
        _skip_unless_there(self.program)
        self.models = models
        self.port = free_port()
        self.netloc = f"{ADDRESS}:{self.port}"
        self.url = f"http://{self.netloc}"
        self._argv = _argv(words, self.port, models)
        if self.program == "gdlib":  # one process, which shares nothing; the other settings are options
            settings.pop("state_dir", None)
            for name, value in settings.items():
                self._argv.append(f"--{name.replace('_', '-')}")
                self._argv += [] if value == 1 else [str(value)]
            settings = {}
        self._environ = {name: value for name, value in os.environ.items() if not name.startswith("GDLIB_")}
        self._environ |= {f"GDLIB_{name.upper()}": str(value) for name, value in {"models": models, **settings}.items()}
        self._log = log
        self._again = threading.Timer(AGAIN_SECONDS, self._signal_all)

    def __enter__(self) -> Self:
        with self._log.open("wb") as log:
            self.process = subprocess.Popen(
                self._argv, env=self._environ, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )
        try:
            eventually(self._answers, START_SECONDS)
            self.everywhere("GET", "/v2/health/live")
        except BaseException as error:
            self.__exit__()
            raise RuntimeError(f"{self._argv} did not start:\n{self.log()}") from error
        return self

    def __exit__(self, *error: object) -> None:
        if self.process.poll() is None:
            self.terminate()
        self.wait()

    def log(self) -> str:
        return self._log.read_text("utf-8", "replace")[-4000:]

    def terminate(self) -> None:
        """SIGTERM, as docs/serving.md says.

        A thread that starts at that very moment can take the signal in place of granian's main thread, which then sleeps on. So its
        workers are told once more, as systemd does; not twice, since they block on a third.
        """
        self.process.send_signal(signal.SIGTERM)
        if self.program == "granian" and self._again.ident is None:
            self._again.start()

    def _signal_all(self) -> None:
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGTERM)  # the group that was started above

    def wait(self) -> None:
        """Until it has ended. What does not end by itself is killed, with its workers, and is an error."""
        try:
            self.process.wait(STOP_SECONDS)
            self._again.cancel()
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)  # the group that was started above
            self.process.wait()
            raise

    def _answers(self) -> bool:
        if self.process.poll() is not None:
            raise RuntimeError(f"the process has ended with {self.process.returncode}")
        try:
            return self.ask("GET", "/v2/health/live")[0] == 200
        except OSError:
            return False

    def ask(
        self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None, *, parse: bool = True
    ) -> tuple[int, dict[str, str], Any]:
        """(status, headers in lower case, body: JSON if it is) of a request on a connection of its own."""
        connection = http.client.HTTPConnection(self.netloc, timeout=ANSWER_SECONDS)
        try:
            connection.request(method, path, json.dumps(body) if isinstance(body, dict) else body, headers or {})
            response = connection.getresponse()
            content = response.read()
        finally:
            connection.close()
        found = {key.lower(): value for key, value in response.headers.items()}
        is_json = parse and bool(content) and found.get("content-type") == "application/json"
        return response.status, found, json.loads(content) if is_json else content

    def everywhere(self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None) -> list[tuple[int, Any]]:
        """(status, body) of requests, a few at a time, until each process has answered some of them."""
        answers = []
        answered: Counter[str] = Counter()
        deadline = time.monotonic() + ANSWER_SECONDS
        while sum(number > 3 for number in answered.values()) < self.processes:
            assert time.monotonic() < deadline, f"only {answered} answer"
            with ThreadPoolExecutor(4) as pool:  # at once, else one process might take them all
                for status, got, answer in pool.map(lambda _: self.ask(method, path, body, headers), range(4)):
                    answers.append((status, answer))
                    # Ids begin with a text that each process draws; of its first requests each may draw one when they come at once.
                    answered[got["x-request-id"].split("-")[0]] += 1
        return answers


def eventually(check: Any, seconds: float = 30) -> Any:
    """The first true result of `check`, which is asked again and again for a bounded time; the last result is the error."""
    deadline = time.monotonic() + seconds
    while True:
        result = check()
        if result:
            return result
        assert time.monotonic() < deadline, f"{check} still gives {result!r}"
        time.sleep(0.05)
