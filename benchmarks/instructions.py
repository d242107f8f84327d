"""`python -m benchmarks.instructions`: instructions of a few fixed works, against the pinned counts of instructions.json.

Where the clock is noisy a count is not: the same build does the same work with the same instructions, to some thousandths. Valgrind's
callgrind counts them, on one thread with AVX2, which is what it knows. A work that takes more than 5 % above its pinned count fails; one
that takes less is worth a new pin. Counts belong to a compiler, an ISA and a Python: others, and a machine without Valgrind and a compiler,
are let pass with a word. `--update` writes the counts of this machine's key anew.

A work is counted twice, for n and for 2 n repetitions, in one process: the difference leaves out the start of Python, of a run and of the
counting itself.
"""

import argparse
import ctypes
import gc
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

import gdlib
from gdlib import _core

PINNED = Path(__file__).with_suffix(".json")
TOLERANCE = 0.05
ISA = "avx2"
# Requests to Valgrind: instructions that do nothing outside of it.
SOURCE = """
#include <valgrind/callgrind.h>
void toggle(void) { CALLGRIND_TOGGLE_COLLECT; }
void zero(void) { CALLGRIND_ZERO_STATS; }
void dump(const char* name) { CALLGRIND_DUMP_STATS_AT(name); }
"""
Work = tuple[int, Callable[[int], Any]]  # repetitions n, and what does so many


def works() -> dict[str, Work]:
    rng = np.random.default_rng(0)

    def array(*shape: int, dtype: Any = np.float32) -> Any:
        return rng.standard_normal(shape, dtype=np.dtype(dtype))

    # Enough epochs for what a call of `fit` does once, some 500,000 instructions and now and then 10 % more or less, not to be seen.
    def training(counted: int, model: Any, X: Any, outputs: int, optimizer: Any, **options: Any) -> Work:
        y, loss = array(len(X), outputs), gdlib.MSELoss()

        def run(epochs: int) -> None:
            seed = {"seed": range(epochs)} if options.get("shuffle", True) else {}
            gdlib.fit(model, X, y, loss=loss, optimizer=optimizer, epochs=epochs, **seed, **options)

        return counted, run

    def products(rows: int, inputs: int, outputs: int, dtype: str, backward: bool) -> Work:
        model, x, gradient = (
            gdlib.Linear(inputs, outputs, dtype=dtype, seed=0),
            array(rows, inputs, dtype=dtype),
            array(rows, outputs, dtype=dtype),
        )
        into_input, into_output = np.empty_like(x), np.empty_like(gradient)
        model(x, out=into_output)

        def run(calls: int) -> None:
            for _ in range(calls):
                if backward:
                    model.backward(gradient, out=into_input)
                else:
                    model(x, out=into_output)

        return 1, run

    def prediction() -> Work:
        model, x = gdlib.Linear(10, 1, seed=0), array(1, 10)

        def run(calls: int) -> None:
            for _ in range(calls):
                model.predict(x)

        return 1000, run

    def training_step() -> Work:
        model, criterion, x, target = gdlib.Linear(10, 1, seed=0), gdlib.MSELoss(), array(32, 10), array(32, 1)
        optimizer = gdlib.SGD(model.parameters(), lr=0.01)

        def run(steps: int) -> None:
            for _ in range(steps):
                optimizer.zero_grad()
                criterion(model(x), target)
                model.backward(criterion.backward())
                optimizer.step()

        return 1000, run

    short, line, plane, wide = (gdlib.Linear(features, 1, seed=0) for features in (8, 10, 100, 1000))
    found = {
        "fit, SGD: an epoch of 10,000 x 10, batch 32, shuffled": training(
            10, line, array(10_000, 10), 1, gdlib.SGD(line.parameters(), lr=0.01), batch_size=32
        ),
        "fit, GD: a step on 4,096 x 8": training(40, short, array(4096, 8), 1, gdlib.GD(short.parameters(), lr=0.1), shuffle=False),
        "fit, GD: a step on 16,384 x 8": training(10, short, array(16_384, 8), 1, gdlib.GD(short.parameters(), lr=0.1), shuffle=False),
        "fit, GD: a step on 4,096 x 100": training(40, plane, array(4096, 100), 1, gdlib.GD(plane.parameters(), lr=0.1), shuffle=False),
        "fit, GD: a step on 1,024 x 1,000": training(40, wide, array(1024, 1000), 1, gdlib.GD(wide.parameters(), lr=0.01), shuffle=False),
        "forward, 96 x 200 -> 120, float32": products(96, 200, 120, "float32", backward=False),
        "gradients, 96 x 200 -> 120, float32": products(96, 200, 120, "float32", backward=True),
        "forward, 96 x 200 -> 120, float64": products(96, 200, 120, "float64", backward=False),
        "predict, 1 x 10 -> 1": prediction(),
        "the readable loop, a step, 32 x 10 -> 1": training_step(),
    }
    if hasattr(gdlib, "Sequential"):
        layers = gdlib.Linear(13, 64, seed=0), gdlib.ReLU(), gdlib.Linear(64, 64, seed=1), gdlib.ReLU(), gdlib.Linear(64, 1, seed=2)
        network = gdlib.Sequential(*layers)
        sgd = gdlib.SGD(network.parameters(), lr=0.01)
        for batch_size in (32, 256):
            options: Any = {"batch_size": batch_size, "shuffle": False}
            found[f"fit, 13-64-64-1: an epoch of 512 rows, batch {batch_size}"] = training(10, network, array(512, 13), 1, sgd, **options)
    return found


def count(library: str) -> None:
    """In the process under Valgrind: one dump for each work and number of repetitions."""
    valgrind = ctypes.CDLL(library)
    gc.disable()  # it would come at other times in other builds
    for name, (repetitions, run) in works().items():
        run(repetitions)  # what is only done once
        for times in (repetitions, 2 * repetitions):
            valgrind.zero()
            valgrind.toggle()
            run(times)
            valgrind.toggle()
            valgrind.dump(f"{times}|{name}".encode())


def key() -> str:
    return f"compiler {_core.compiler()}, {ISA}, Python {platform.python_version_tuple()[0]}.{platform.python_version_tuple()[1]}"


def measure() -> dict[str, int]:
    """Instructions of one repetition by work, or the reason why they cannot be counted: a LookupError."""
    valgrind, compiler = shutil.which("valgrind"), shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if valgrind is None or compiler is None:
        raise LookupError("Valgrind and a C compiler are wanted, and not here")
    if ISA not in _core.available_isas():
        raise LookupError(f"this machine has no {ISA}")
    with tempfile.TemporaryDirectory() as folder:
        source, library, dumps = Path(folder, "requests.c"), Path(folder, "requests.so"), Path(folder, "dump")
        source.write_text(SOURCE)
        built = subprocess.run([compiler, "-O2", "-shared", "-fPIC", "-o", library, source], capture_output=True, text=True)
        if built.returncode:
            raise LookupError(f"valgrind/callgrind.h does not compile: {built.stderr.strip().splitlines()[0]}")
        options = ["--tool=callgrind", "--collect-atstart=no", f"--callgrind-out-file={dumps}"]
        program = f"from benchmarks import instructions; instructions.count({str(library)!r})"
        environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith("OPENBLAS_")},
            "GDLIB_ISA": ISA,
            "GDLIB_NUM_THREADS": "1",
            "OPENBLAS_NUM_THREADS": "1",
            "PYTHONHASHSEED": "0",
            "PYTHONPATH": os.pathsep.join(sys.path),
        }
        done = subprocess.run([valgrind, *options, sys.executable, "-P", "-c", program], env=environment, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(done.stderr)
        counts: dict[str, dict[int, int]] = {}
        for path in Path(folder).glob("dump.*"):
            text = path.read_text()
            if trigger := re.search(r"^desc: Trigger: Client Request: (\d+)\|(.*)$", text, re.MULTILINE):
                total = re.search(r"^(?:totals|summary): (\d+)", text, re.MULTILINE)
                assert total is not None
                counts.setdefault(trigger[2], {})[int(trigger[1])] = int(total[1])
    return {name: round((of[max(of)] - of[min(of)]) / min(of)) for name, of in sorted(counts.items())}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.instructions", description="Count instructions, and compare with the pins.")
    parser.add_argument("--update", action="store_true", help="pin the counts of this compiler, ISA and Python anew")
    update = parser.parse_args().update
    pinned = json.loads(PINNED.read_text()) if PINNED.exists() else {}
    if key() not in pinned and not update:
        print(f"instructions: no pinned counts for {key()}; nothing to compare (--update pins them)")
        return
    try:
        counts = measure()
    except LookupError as reason:
        print(f"instructions: not counted, {reason.args[0]}")
        sys.exit(1 if update else 0)
    known = pinned.get(key(), {})
    print(f"instructions of one repetition; {key()}")
    failed = False
    for name in sorted(counts | known):
        now, before = counts.get(name), known.get(name)
        change = f"{100 * (now / before - 1):+.2f} %" if now and before else "new" if now else "no longer counted"
        worse = bool(now and before and now > (1 + TOLERANCE) * before) or now is None
        failed |= worse
        print(f"{name:58} {now or 0:>13,} {before or 0:>13,} {change}{'  TOO MANY' if worse and now else ''}")
    if update:
        PINNED.write_text(json.dumps(pinned | {key(): counts}, indent=2, sort_keys=True) + "\n")
    elif failed:
        sys.exit(f"a work takes over {100 * TOLERANCE:.0f} % more than its pin, or is gone; if that is right, --update pins it anew")


if __name__ == "__main__":
    main()
