"""What only a fresh process shows: the environment variables that are read on import, and a fork after threads have run."""

import os
import subprocess
import sys
import textwrap

import pytest

from gdlib import _core


def run_python(code, **environment):
    """A new interpreter, which finds the same packages. The time-out ends a hang; it is no measure of speed."""
    inherited = {name: value for name, value in os.environ.items() if name not in ("GDLIB_ISA", "GDLIB_NUM_THREADS")}
    path = os.pathsep.join(entry for entry in sys.path if entry)
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        env=inherited | {"PYTHONPATH": path} | environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def output_of(code, **environment):
    done = run_python(code, **environment)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize("isa", _core.available_isas())
def test_isa_is_forced(isa):
    assert output_of("from gdlib import _core; print(_core.isa())", GDLIB_ISA=isa) == isa


@pytest.mark.parametrize("environment", [{}, {"GDLIB_ISA": ""}], ids=["unset", "empty"])
def test_fastest_isa_is_the_default(environment):
    assert output_of("from gdlib import _core; print(_core.isa())", **environment) == _core.available_isas()[-1]


@pytest.mark.parametrize("threads", [1, 3, 1024])
def test_threads_are_forced(threads):
    assert output_of("from gdlib import _core; print(_core.num_threads())", GDLIB_NUM_THREADS=str(threads)) == str(threads)


def test_threads_by_default():
    count = int(output_of("from gdlib import _core; print(_core.num_threads())"))
    assert 1 <= count <= os.cpu_count()


@pytest.mark.parametrize("isa", ["sse9", "AVX2", " scalar"])
def test_unknown_isa_is_an_import_error(isa):
    done = run_python("from gdlib import _core", GDLIB_ISA=isa)
    message = done.stderr.strip().splitlines()[-1]
    assert done.returncode == 1
    assert message.startswith("ImportError: ")
    assert f"'{isa}'" in message
    assert ", ".join(_core.available_isas()) in message


@pytest.mark.parametrize("threads", ["0", "-1", "abc", "2.5", "4 threads", "1025", "99999999999999999999"])
def test_bad_number_of_threads_is_an_import_error(threads):
    done = run_python("from gdlib import _core", GDLIB_NUM_THREADS=threads)
    message = done.stderr.strip().splitlines()[-1]
    assert done.returncode == 1
    assert message.startswith("ImportError: GDLIB_NUM_THREADS is ")
    assert f"'{threads}'" in message
    assert "1 to 1024" in message


FORK = """
    import os, sys, warnings
    import numpy as np
    from gdlib import _core

    rng = np.random.default_rng(0)
    x, target = rng.standard_normal((1024, 300)), rng.standard_normal((1024, 1))
    weight = rng.standard_normal((64, 300))

    def compute():
        parameters, losses = np.zeros(301), np.zeros(2)
        ranges = [(0, 301, 0.01, 0.0, 0.0, 0.0, False, False, True)]
        _core.train(x, target, parameters, None, [("linear", x.shape[1], 1, True)], ranges, 1024, None, 0, 2, True, 0.0, losses)
        gradient = np.zeros((64, 300))
        y = _core.linear_forward(x, weight, None)
        _core.linear_backward(y, x, weight, gradient, None, np.zeros_like(x))
        return b"".join(a.tobytes() for a in (parameters, losses, y, gradient))

    before = compute()
    assert _core.num_threads() == 4
    with warnings.catch_warnings():
        # Python 3.12 warns of a fork beside other threads, as OpenMP's are: this is the case under test.
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if child == 0:
        os._exit(0 if compute() == before and _core.num_threads() == 1 else 3)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 0, status
    assert compute() == before  # the parent keeps its threads
    assert _core.num_threads() == 4
    print("same bits")
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
@pytest.mark.parametrize("isa", _core.available_isas())
def test_fork_after_threads_have_run(isa):
    assert output_of(FORK, GDLIB_ISA=isa, GDLIB_NUM_THREADS="4") == "same bits"


THREADS_DURING_A_CALL = """
import threading
import numpy as np
from gdlib import _core

x, weight = np.ones((1000, 512), np.float32), np.ones((600, 512), np.float32)
_core.set_num_threads(1)
wanted = _core.linear_forward(x, weight, None)
calls = 0
stop = threading.Event()

def compute():
    global calls
    while not stop.is_set():
        assert np.array_equal(_core.linear_forward(x, weight, None), wanted)
        calls += 1

worker = threading.Thread(target=compute)
worker.start()
while calls < 30:
    for count in (16, 1):
        _core.set_num_threads(count)
stop.set()
worker.join()
"""


def test_threads_may_be_set_during_a_call():
    subprocess.run([sys.executable, "-c", THREADS_DURING_A_CALL], check=True, timeout=120)


CPUS_OF_THREADS = """
import os
import threading
import time
import numpy as np
from gdlib import _core

x = np.ones((256, 256), np.float32)

def compute():
    for _ in range(20):
        _core.linear_forward(x, x, None)
    time.sleep(0.01)  # the team falls asleep
    for _ in range(20):
        _core.linear_forward(x, x, None)

def cpus_of_others():
    tasks = {int(task) for task in os.listdir("/proc/self/task")} - {os.getpid()}
    return [os.sched_getaffinity(task) for task in tasks]

def pinned():
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    compute()

everywhere = os.sched_getaffinity(0)
_core.set_num_threads(3)
first = threading.Thread(target=pinned)
first.start()
first.join()
compute()
deadline = time.monotonic() + 60
while any(cpus != everywhere for cpus in cpus_of_others()):  # one that wakes is elsewhere for a moment
    assert time.monotonic() < deadline, cpus_of_others()

# From outside, as taskset does.
one = {max(everywhere)}
for task in os.listdir("/proc/self/task"):
    os.sched_setaffinity(int(task), one)
compute()
time.sleep(0.01)
assert all(cpus == one for cpus in cpus_of_others()), cpus_of_others()
"""


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="CPUs are assigned through Linux's calls")
def test_threads_run_where_the_process_may():
    subprocess.run([sys.executable, "-c", CPUS_OF_THREADS], check=True, timeout=120)


DAEMON_AT_EXIT = """
import threading
import time
import numpy as np
from gdlib import _core

def compute():
    x, losses = np.ones((20_000, 10), np.float32), np.zeros(10**6)
    ranges = [(0, 11, 1e-9, 0.0, 0.0, 0.0, False, False, True)]
    target, parameters, layers = x[:, :1].copy(), np.zeros(11, np.float32), [("linear", 10, 1, True)]
    _core.train(x, target, parameters, None, layers, ranges, 32, None, 0, 625 * 10**6, True, 0.0, losses, print)

threading.Thread(target=compute, daemon=True).start()
threading.Thread(target=lambda: [np.ones(10) + 1 for _ in iter(int, 1)], daemon=True).start()
time.sleep(0.3)
"""


def test_a_daemon_thread_inside_a_call_does_not_break_the_exit():
    for _ in range(3):
        done = subprocess.run([sys.executable, "-c", DAEMON_AT_EXIT], capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
