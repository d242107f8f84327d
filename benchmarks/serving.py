"""`python -m benchmarks.serving`: the predictor beside its peers, and the table of aims; writes them into docs/serving.md.

With --soak SECONDS it runs mixed load with a model that is replaced every 1.3 seconds instead, and says what failed and how memory grew.
"""

import argparse
import json
import math
import os
import re
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from functools import cache
from pathlib import Path

import numpy as np

import gdlib
from benchmarks import bench_serving as serving
from benchmarks import servers
from benchmarks.aims import Aim
from benchmarks.measure import UnavailableError
from benchmarks.results import Results, ratio, run, share
from benchmarks.tables import aim_table, digits, group_table

COMMAND = "python -m benchmarks.serving"
PAGE = Path(__file__).parents[1] / "docs" / "serving.md"
BEGIN, END = "<!-- made by the benchmark -->\n", "<!-- end -->\n"
STALLED = 200  # clients
REPLACED_SECONDS = 1.3  # how long a model of the soak test stays
NOTE = f"""Made by `{COMMAND}`. The application is timed in process, from the body's bytes to the answer's; over HTTP a client keeps one
connection on the loopback interface, and the servers take turns. MLServer computes the same linear model with NumPy.
"""
GRANIAN_NOTE = """Under granian a constant application takes 28 to 36 us of CPU for a request, granian's own part included, and a prediction
(reading JSON, checking, computing, counting, writing) 12 to 13 us more in a warm loop. Both share two cores with the client, and single
rounds lie between 65 and 105 %: the median of 25 was 83 %, and medians of 5 to 9 between 77 and 95 %. What it took: requests planned once,
only whose values are read each time (20 us -> 14, and 56 -> 76 %), the request like the last one and the usual answer from their frames
(12.4 us), one blocking thread for each worker (84 us of CPU for a request against 106, because threads wait for each other's GIL).
`gdlib serve` answers such requests in its event loop, and saves handing them to a thread, which is why it keeps up with an application that
does nothing. This machine is shared, and 1.3 to 1.6 times as slow for minutes at a time.
"""


@cache
def resident_megabytes() -> float:
    """Ten models, after a hundred requests to each."""
    server = servers.gdlib_server("ten")
    connection = servers.Connection(server.port)
    for i in range(1000):
        connection.ask(servers.request("POST", f"/v2/models/house{i % 10}/infer", servers.json_body(1)))
    return server.resident_bytes() / 2**20


@cache
def ready_seconds(rounds: int = 9) -> float:
    """From the start of the process to its first answer: the median."""
    found = []
    for _ in range(rounds):
        (port,) = servers.free_ports(1)
        command = servers.python("-m", "gdlib", "serve", str(servers.folder() / "ten"), "--port", str(port))
        server = servers.start(command, port, cwd=servers.ROOT)
        found.append(server.ready_seconds)
        servers.end(server.process)
    return statistics.median(found)


@cache
def closure_megabytes() -> float:
    """Files of gdlib[serve] and all that it needs, in a fresh environment; pip and bytecode apart. NaN without a wheel in dist/."""
    wheels = sorted((servers.ROOT / "dist").glob("gdlib-*.whl"), key=lambda path: path.stat().st_mtime)
    if not wheels:
        return math.nan
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--target", folder, "--no-compile", f"{wheels[-1]}[serve]"]
        subprocess.run(command, check=True, stderr=subprocess.DEVNULL)
        return sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file()) / 1e6


def throughput(constant: bool, seconds: int = 3) -> float:
    """Requests per second of granian with 2 workers, by wrk on 16 connections; NaN without it."""
    if shutil.which("wrk") is None:
        return math.nan
    try:
        server = servers.granian(constant)
    except UnavailableError:
        return math.nan
    script = servers.folder() / "post.lua"
    body = servers.json_body(1).decode().replace("'", "\\'")
    script.write_text(f"wrk.method = 'POST'\nwrk.headers['Host'] = 'localhost'\nwrk.body = '{body}'\n")
    command = ["wrk", "-t1", "-c16", f"-d{seconds}s", "-s", str(script), f"http://127.0.0.1:{server.port}{servers.INFER}"]
    out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert "Non-2xx" not in out, out
    found = re.search(r"Requests/sec:\s+([\d.]+)", out)
    assert found is not None, out
    return float(found[1])


@cache
def throughput_share(rounds: int = 15) -> float:
    """Beside an application that answers a constant, the median of turns: single ones lie between 65 and 105 %."""
    return statistics.median(throughput(False) / throughput(True) for _ in range(rounds))


@cache
def health_milliseconds_while_stalled() -> float:
    """The slowest of 20 health answers while clients hold half-sent requests."""
    server = servers.gdlib_server()
    stalled = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(STALLED)]
    try:
        for client in stalled:
            client.sendall(b"POST /v2/models/house/infer HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\n{")
        connection = servers.Connection(server.port)
        message = servers.request("GET", "/v2/health/live")
        connection.ask(message)  # by then the server has read what they sent
        times = []
        for _ in range(20):
            begin = time.perf_counter()
            assert connection.ask(message).startswith(b"HTTP/1.1 200")
            times.append(time.perf_counter() - begin)
        return 1e3 * max(times)
    finally:
        for client in stalled:
            client.close()


def seconds(results: Results, title: str) -> float:
    return results[title]["gdlib"].seconds


HTTP = serving.HTTP.title
AIMS = [
    Aim(
        "beside a WSGI application under waitress that answers a constant",
        "<=",
        1.3,
        "x",
        lambda r: 1 / share(r[HTTP], "gdlib serve"),
        "One row of 13 over HTTP, JSON",
    ),
    Aim("beside MLServer", ">=", 8, "x", lambda r: ratio(r[HTTP], [serving.DEFAULT])),
    Aim("beside MLServer without workers", ">=", 2.5, "x", lambda r: ratio(r[HTTP], [serving.SINGLE])),
    Aim("one row, JSON", "<=", 25, " us", lambda r: 1e6 * seconds(r, serving.APP_JSON.title), "In the application"),
    Aim("one row, binary", "<=", 15, " us", lambda r: 1e6 * seconds(r, serving.APP_BINARY.title)),
    Aim("1,000 rows of 13 float64, JSON", "<", 0.7, " ms", lambda r: 1e3 * seconds(r, serving.LARGE_JSON.title)),
    Aim("1,000 rows of 13 float64, binary", "<=", 40, " us", lambda r: 1e6 * seconds(r, serving.LARGE_BINARY.title)),
    Aim("resident memory with ten models", "<=", 45, " MiB", lambda _: resident_megabytes(), "The process"),
    Aim("from its start to its first answer, ten models", "<=", 0.4, " s", lambda _: ready_seconds()),
    Aim("installed files of gdlib[serve] and all that it needs, NumPy too", "<", 80, " MB", lambda _: closure_megabytes()),
    Aim("throughput beside a constant answer", ">=", 80, " %", lambda _: 100 * throughput_share(), "granian, 2 workers, 16 connections"),
    Aim(
        f"slowest of 20 health answers, {STALLED} clients stalled", "<", 10, " ms", lambda _: health_milliseconds_while_stalled(), "Faults"
    ),
]


def soak(length: float, clients: int = 4) -> bool:
    """Mixed load (JSON and binary, 1 to 1,000 rows, metadata, statistics) on a server whose model is replaced every 1.3 seconds.

    Prints requests, failures, replacements seen and resident memory; true when nothing failed and memory did not grow by a tenth from
    the first fifth of the time to the last.
    """
    folder = Path(tempfile.mkdtemp(prefix="gdlib-soak-"))
    path = folder / "models" / "house" / "1" / "model.safetensors"
    models = [gdlib.Linear(servers.FEATURES, 1, dtype=np.float64, seed=seed) for seed in range(8)]
    answers = [model.predict(servers.rows(1))[0, 0] for model in models]
    gdlib.save(models[0], path)
    (port,) = servers.free_ports(1)
    command = servers.python("-m", "gdlib", "serve", str(folder / "models"), "--port", str(port), "--access-log", str(folder / "access"))
    server = servers.start(command, port, cwd=servers.ROOT)
    binary, length_of_json = servers.binary_body(100)
    mix = [
        servers.request("POST", servers.INFER, servers.json_body(1)),
        servers.request("POST", servers.INFER, servers.json_body(1000)),
        servers.request("POST", servers.INFER, binary, Inference_Header_Content_Length=str(length_of_json)),
        servers.request("GET", "/v2/models/house"),
        servers.request("GET", "/v2/models/stats"),
        servers.request("GET", "/v2/health/ready"),
        servers.request("GET", "/metrics"),
    ]
    end = time.monotonic() + length
    failures: list[bytes] = []
    counts, seen = [0] * clients, set()

    def client(index: int) -> None:
        connection = servers.Connection(port, patient=False)
        while time.monotonic() < end:
            for message in mix:
                try:
                    answer = connection.ask(message)
                except OSError as error:
                    answer = repr(error).encode()
                    connection = servers.Connection(port, patient=False)
                counts[index] += 1
                if not answer.startswith(b"HTTP/1.1 200"):
                    failures.append(answer[:300])
                elif message is mix[0]:
                    seen.add(json.loads(answer.split(b"\r\n\r\n", 1)[1])["outputs"][0]["data"][0])

    threads = [threading.Thread(target=client, args=(index,)) for index in range(clients)]
    for thread in threads:
        thread.start()
    memory = []
    turn = 0
    while time.monotonic() < end:
        turn += 1
        gdlib.save(models[turn % len(models)], path)
        # Not in step with the server, which looks once a second and takes no file younger than 0.3 s: it could miss one after the other.
        time.sleep(REPLACED_SECONDS)
        memory.append(server.resident_bytes() / 2**20)
    for thread in threads:
        thread.join()
    servers.end(server.process)
    lines = (folder / "access").read_text().count("\n")
    shutil.rmtree(folder)
    fifth = max(1, len(memory) // 5)
    before, after = statistics.median(memory[:fifth]), statistics.median(memory[-fifth:])
    strange = [value for value in seen if not np.isclose(value, answers, rtol=1e-12).any()]
    print(f"{sum(counts):,} requests, {len(failures)} failed, {turn} replacements")
    print(f"{len(seen)} of {len(models)} models seen, {len(strange)} strange answers")
    print(
        f"{lines:,} lines of access log; resident {before:.1f} MiB in the first fifth, {after:.1f} in the last, {max(memory):.1f} at most"
    )
    for failure in failures[:5]:
        print(failure)
    return not failures and not strange and len(seen) > 1 and after < 1.1 * before


def main() -> int:
    parser = argparse.ArgumentParser(prog=COMMAND, description=__doc__)
    parser.add_argument("--quick", action="store_true", help="1 round of each group; write nothing")
    parser.add_argument("--soak", type=float, metavar="SECONDS", help="run mixed load with reloads instead")
    options = parser.parse_args()
    if options.soak is not None:
        return 0 if soak(options.soak) else 1
    load = os.getloadavg()[0]
    results = run(serving.GROUPS, lambda group: 1 if options.quick else group.rounds)
    text = (
        "\n".join([NOTE, aim_table(results, AIMS), group_table(serving.HTTP, results[HTTP]), GRANIAN_NOTE])
        + f"Load before the run: {digits(load)}.\n"
    )
    print(text)
    if not options.quick:
        page = PAGE.read_text()
        begin, end = page.index(BEGIN) + len(BEGIN), page.index(END)
        PAGE.write_text(page[:begin] + "\n" + text + "\n" + page[end:])
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
