"""Averaging in a process of its own: Ctrl-C, a killed parent, a script without a guard. Each script prints one line of JSON per event."""

import json
import os
import select
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

PATIENCE = 60  # seconds before a wait counts as a hang, on any machine


LONG_RUN = """
    import json, multiprocessing, os
    import numpy as np
    import gdlib, gdlib.distributed
    from gdlib.distributed import averaging

    average = averaging.average

    def say(**event):
        os.write(1, (json.dumps(event) + "\\n").encode())  # whole, whenever the signal comes

    def report(states, mean):
        finite = average(states, mean)
        say(workers=[child.pid for child in multiprocessing.active_children()], mean=mean[:50].tolist())
        return finite

    if __name__ == "__main__":
        averaging.average = report
        rng = np.random.default_rng(0)
        X = rng.standard_normal((200_000, 50))
        model = gdlib.Linear(50, 1, bias=False, dtype=np.float64)
        optimizer = gdlib.SGD(model.parameters(), lr=1e-5, momentum=0.1)
        try:
            gdlib.distributed.fit(model, X, X[:, :1], loss=gdlib.MSELoss(), optimizer=optimizer, epochs=100_000, batch_size=4)
        except KeyboardInterrupt:
            children = [child.pid for child in multiprocessing.active_children()]
            momentum = optimizer.momentum_buffer(model._arena)
            say(kept=model.weight.data[0].tolist(), children=children, momentum=bool(momentum.any()))
"""


ENDLESS_ROUND = """
    import json, multiprocessing, time
    import numpy as np
    import gdlib, gdlib.distributed
    from gdlib.distributed import averaging, shared_memory

    send = shared_memory._Workers.send

    def report(pool, command):
        send(pool, command)
        if isinstance(command, tuple):
            print(json.dumps({"workers": [child.pid for child in multiprocessing.active_children()]}), flush=True)

    if __name__ == "__main__":
        shared_memory._Workers.send = report
        X = np.ones((100, 2), np.float32)
        model = gdlib.Linear(2, 1)
        gdlib.distributed.fit(model, X, X[:, :1], loss=gdlib.MSELoss(), optimizer=gdlib.SGD(model.parameters(), lr=0.1), epochs=1)
    else:  # a worker, which imports this script
        averaging.local_round = lambda *_: time.sleep(1000)
"""


def start(tmp_path, script):
    path = tmp_path / "script.py"
    path.write_text(textwrap.dedent(script))
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    return subprocess.Popen(
        [sys.executable, str(path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment,
        bufsize=0,  # select() sees every line
        start_new_session=True,  # a process group to send Ctrl-C to
    )


def next_line(process):
    assert select.select([process.stdout], [], [], PATIENCE)[0], "no round was reported"
    return json.loads(process.stdout.readline())


def is_running(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


def wait_until_gone(pids):
    deadline = time.monotonic() + PATIENCE
    while any(is_running(pid) for pid in pids):
        assert time.monotonic() < deadline, "workers live on"
        time.sleep(0.01)


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="processes are looked up in /proc")
@pytest.mark.parametrize("group", [True, False], ids=["terminal", "parent only"])
def test_ctrl_c_ends_the_workers_and_keeps_the_last_average(tmp_path, group):
    process = start(tmp_path, LONG_RUN)
    try:
        first, second = next_line(process), next_line(process)  # by now the first average is kept
        workers = first["workers"]
        assert len(workers) == 2
        (os.killpg if group else os.kill)(process.pid, signal.SIGINT)
        out, error = process.communicate(timeout=PATIENCE)
    finally:
        process.kill()
    lines = [first, second, *map(json.loads, out.splitlines())]
    assert error == b""
    assert process.returncode == 0
    *reports, last = lines
    assert last["kept"] in [report["mean"] for report in reports]
    assert last["momentum"]
    assert last["children"] == []
    wait_until_gone(workers)


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="processes are looked up in /proc")
def test_workers_and_files_do_not_outlive_a_killed_parent(tmp_path):
    process = start(tmp_path, ENDLESS_ROUND)
    try:
        workers = next_line(process)["workers"]
        assert len(workers) == 2
        assert all(is_running(pid) for pid in workers)
    finally:
        process.kill()
        process.communicate(timeout=PATIENCE)
    wait_until_gone(workers)


def test_a_script_without_a_main_guard_is_told_so(tmp_path):
    script = """
        import numpy as np
        import gdlib, gdlib.distributed

        X = np.ones((100, 2), np.float32)
        model = gdlib.Linear(2, 1)
        gdlib.distributed.fit(model, X, X[:, :1], loss=gdlib.MSELoss(), optimizer=gdlib.SGD(model.parameters(), lr=0.1), epochs=1)
    """
    process = start(tmp_path, script)
    try:
        _, error = process.communicate(timeout=PATIENCE)
    finally:
        process.kill()
    assert process.returncode == 1
    last = error.decode().rstrip().splitlines()[-1]
    assert 'In a script call fit under `if __name__ == "__main__":`' in last


def test_import_of_gdlib_leaves_multiprocessing_out(tmp_path):
    script = 'import sys, gdlib; sys.exit("multiprocessing" in sys.modules)'
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    assert subprocess.run([sys.executable, "-c", script], env=environment, timeout=PATIENCE, cwd=tmp_path).returncode == 0
