"""`python -m benchmarks.report`: every group of benchmarks, the ratios beside this machine's limits, and what gdlib promises.

Prints, and writes docs/benchmarks.md with its pictures. With --quick it takes 3 rounds of each and writes nothing.
"""

import argparse
import importlib.metadata
import importlib.util
import math
import os
import platform
import sys
from collections.abc import Sequence
from pathlib import Path

import gdlib
from benchmarks import bench_footprint, bench_gradient_descent, bench_layers, bench_reference, machine
from benchmarks.measure import Group, Timing, measure
from gdlib.config import get_config

PINS = ("OPENBLAS_CORETYPE", "OPENBLAS_L2_SIZE")  # kernels and cache sizes of another machine: NumPy at its best runs without them
PEERS = ("numpy", "scikit-learn", "torch", "jax")
COMMAND = "python -m benchmarks.report"
QUICK_ROUNDS = 3
IMPORT, REFERENCE, DESCENT = bench_footprint.GROUPS[0], bench_reference.GROUPS[0], bench_gradient_descent.GROUPS
GROUPS = [IMPORT, *machine.GROUPS, REFERENCE, *DESCENT, *bench_layers.GROUPS]
INTRODUCTION = f"""# Benchmarks

Made by `{COMMAND}`, after `pip install .[bench]`; PyTorch and JAX take part where they are installed. The result
of each contender is checked before it is timed. Then all contenders of a table, and the machine's limit, take turns on the same arrays;
the figures are medians, and a ratio is the median of the ratios of each turn. PyTorch runs with one thread and with all, scikit-learn in
float32 and float64: the faster one counts. Absolute times are this machine's: compare ratios.
"""
Timings = dict[str, Timing]  # by name of the contender


def fastest(timings: Sequence[Timing]) -> Timings:
    """The fastest variant of each contender."""
    best: Timings = {}
    for timing in timings:
        if timing.seconds < best.setdefault(timing.contender.name, timing).seconds:
            best[timing.contender.name] = timing
    return best


def at_limit(timings: Timings) -> float:
    """Seconds at the machine's limit, the fastest that was reached; NaN where none could be measured."""
    return min((timing.seconds for timing in timings.values() if timing.contender.limit and timing.samples), default=math.nan)


def duration(timing: Timing) -> str:
    scale, unit = next(((s, u) for s, u in ((1.0, "s"), (1e-3, "ms"), (1e-6, "us")) if timing.seconds >= s), (1e-9, "ns"))
    return f"{digits(timing.seconds / scale)} {unit}" if timing.samples else timing.missing


def digits(value: float) -> str:
    """Three of them, or all before the point."""
    return f"{value:,.{max(0, 2 - math.floor(math.log10(abs(value))))}f}" if 0.001 < abs(value) < math.inf else f"{value:.2g}"


def percent(share: float) -> str:
    return "" if math.isnan(share) else f"{100 * share:.0f} %" if share > 0.1 else f"{100 * share:.2g} %"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Markdown; columns without content are left out."""
    kept = [i for i in range(len(header)) if any(row[i] for row in rows)]
    lines = [header, [":---" if i == 0 else "---:" for i in range(len(header))], *rows]
    return "".join(f"| {' | '.join(line[i] for i in kept)} |\n" for line in lines)


def rate(group: Group, timing: Timing) -> str:
    return f"{digits(group.amount / timing.seconds)} {group.amount_unit}/s" if timing.samples and group.amount_unit else timing.missing


def group_table(group: Group, timings: Timings) -> str:
    base = next(timing for name, timing in timings.items() if name.startswith("gdlib"))
    rows = []
    for timing in timings.values():
        ratio = digits(timing.over(base)) if timing.samples else ""
        share = percent(at_limit(timings) / timing.seconds)
        rows.append([timing.contender.label, duration(timing), rate(group, timing) if timing.samples else "", ratio, share])
    return table([group.title, f"one {group.unit}", "rate", "time, gdlib's being 1", "share of the limit"], rows) + f"\n{group.note}\n"


def layer_table(results: dict[str, Timings]) -> str:
    rows = []
    for group in bench_layers.GROUPS:
        timings = results[group.title]
        times = [duration(timings[name]) for name in ("gdlib", "NumPy", "PyTorch")]
        rows.append([group.title.removeprefix("Linear "), *times, percent(at_limit(timings) / timings["gdlib"].seconds)])
    return table(["One call of Linear", "gdlib", "NumPy", "PyTorch", "gdlib's share of the FMA peak"], rows)


def promise_table(results: dict[str, Timings], memory: float) -> str:
    reference, descent = results[REFERENCE.title], results[DESCENT[0].title]
    fit, loop = reference["gdlib fit"], reference["gdlib readable loop"]
    torch, numpy, sklearn = (reference[name] for name in ("PyTorch loop", "NumPy loop", "scikit-learn SGDRegressor"))
    share = at_limit(descent) / descent["gdlib fit"].seconds
    over_numpy = bench_footprint.import_seconds_beyond_numpy()
    rows = []
    for what, sign, bound, value, unit, command in (
        ("Reference program: `fit` beside PyTorch's loop", ">=", 1000, torch.over(fit), "x", COMMAND),
        ("Reference program: `fit` beside scikit-learn's SGDRegressor", ">=", 4, sklearn.over(fit), "x", COMMAND),
        ("Reference program: the readable loop beside PyTorch's", ">=", 20, torch.over(loop), "x", COMMAND),
        ("Reference program: the readable loop beside NumPy's", ">=", 1.3, numpy.over(loop), "x", COMMAND),
        (f"{DESCENT[0].title}: share of the read bandwidth", ">=", 60, 100 * share, " %", COMMAND),
        ("The same: memory beyond X and y", "<", 16, memory / 1e6, " MB", COMMAND),
        ("`import gdlib` over `import numpy`", "<=", 40, 1e3 * over_numpy, " ms", COMMAND),
        ("Wheel", "<", 2, bench_footprint.wheel_bytes() / 1e6, " MB", f"pip wheel --no-deps -w dist . && {COMMAND}"),
    ):
        reached = {">=": value >= bound, "<=": value <= bound, "<": value < bound}[sign]
        measured = ["not measured", ""] if math.isnan(value) else [f"{digits(value)}{unit}", "yes" if reached else "no"]
        rows.append([what, f"{sign} {bound:,}{unit}", *measured, f"`{command}`"])
    return table(["What", "wanted", "measured", "reached", "command"], rows)


def blas() -> str:
    """The kernels that run NumPy's products; to be asked before a peer loads libraries of its own."""
    try:
        from threadpoolctl import threadpool_info
    except ModuleNotFoundError:
        return "unknown: threadpoolctl is not installed"
    libraries = [item for item in threadpool_info() if item["user_api"] == "blas"]
    return ", ".join(f"{item['internal_api']} {item['version']}, {item.get('architecture', 'unnamed')} kernels" for item in libraries)


def machine_table(results: dict[str, Timings], products: str) -> str:
    cpuinfo, config = Path("/proc/cpuinfo"), get_config()
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    cpu = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())
    versions = [f"{name} {importlib.metadata.version(name)}" for name in PEERS if importlib.util.find_spec(name.replace("scikit-", "sk"))]
    size = f"{bench_footprint.installed_bytes() / 1e6:.2f} MB on disk"
    rows = [
        ["CPU", f"{cpu} ({platform.machine()}), {machine.plural(machine.THREADS)}"],
        *([name, rate(group, timing)] for group in machine.GROUPS for name, timing in results[group.title].items()),
        ["gdlib", f"{gdlib.__version__}: {config['isa']} kernels, compiler {config['compiler']}; {size}"],
        ["peers", ", ".join([f"Python {platform.python_version()}", *versions])],
        ["NumPy's matrix products", products],
    ]
    return table(["This machine", "in this run"], rows)


def bars(path: Path, names: list[str], values: list[float], labels: list[str], title: str, xlabel: str, xscale: str = "linear") -> None:
    """Horizontal bars, gdlib's in colour; equal figures give equal bytes."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    with mpl.rc_context({"svg.hashsalt": "gdlib", "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(7.5, 0.9 + 0.32 * len(names)), layout="constrained")
        axes = figure.subplots()
        drawn = axes.barh(names, values, color=["#1f6fb2" if name.startswith("gdlib") else "#b5bcc4" for name in names])
        axes.bar_label(drawn, labels, padding=4)
        axes.invert_yaxis()
        axes.set(title=title, xlabel=xlabel, xscale=xscale, xlim=(0.5, 6 * max(values)) if xscale == "log" else (0, 1.15 * max(values)))
        figure.savefig(path, metadata={"Date": None})


def draw(results: dict[str, Timings], folder: Path) -> None:
    contenders = [t for t in results[REFERENCE.title].values() if t.samples and not t.contender.limit]
    contenders.sort(key=lambda timing: timing.seconds)
    ratios = [timing.over(contenders[0]) for timing in contenders]
    names, labels = [timing.contender.name for timing in contenders], [f"{digits(ratio)}x" for ratio in ratios]
    bars(folder / "benchmarks-reference.svg", names, ratios, labels, REFERENCE.title, f"time, {names[0]}'s being 1", "log")
    shares = {
        f"{name}, {group.title.partition(', ')[2]}": 100 * at_limit(results[group.title]) / timing.seconds
        for group in DESCENT
        for name, timing in results[group.title].items()
        if timing.samples and not timing.contender.limit and not math.isnan(at_limit(results[group.title]))
    }
    if shares:
        names, values, path = list(shares), list(shares.values()), folder / "benchmarks-gradient-descent.svg"
        labels = [f"{value:.0f} %" for value in values]
        bars(path, names, values, labels, "A step of gradient descent", "share of the read bandwidth, %")


def main() -> None:
    parser = argparse.ArgumentParser(prog=COMMAND, description="Time gdlib beside its peers and this machine's limits.")
    parser.add_argument("--quick", action="store_true", help=f"{QUICK_ROUNDS} rounds of each group; write nothing")
    parser.add_argument("--output", type=Path, default=Path(__file__).parents[1] / "docs", help="folder for the page and its pictures")
    options = parser.parse_args()
    if any(pin in os.environ for pin in PINS):  # read when NumPy is loaded, so that only a new process can be without them
        print(f"starting again without {' and '.join(PINS)}", flush=True)
        os.execve(sys.executable, sys.orig_argv, {name: value for name, value in os.environ.items() if name not in PINS})
    products = blas()
    memory = bench_gradient_descent.memory_beyond_data()
    results: dict[str, Timings] = {}
    for group in GROUPS:
        print(f"{group.title} ...", file=sys.stderr, flush=True)
        results[group.title] = fastest(measure(group, QUICK_ROUNDS if options.quick else group.rounds))
    measured = not math.isnan(at_limit(results[DESCENT[0].title]))
    pictures = ["![Reference program](benchmarks-reference.svg)\n", "![Gradient descent](benchmarks-gradient-descent.svg)\n" * measured]
    parts = [
        INTRODUCTION,
        promise_table(results, memory),
        machine_table(results, products),
        pictures[0] + "\n" + group_table(REFERENCE, results[REFERENCE.title]),
        pictures[1] + "\n" + "\n".join(group_table(group, results[group.title]) for group in DESCENT),
        layer_table(results),
        group_table(IMPORT, results[IMPORT.title]),
    ]
    page = "\n".join(parts)
    print(page)
    if not options.quick:
        (options.output / "benchmarks.md").write_text(page)
        draw(results, options.output)


if __name__ == "__main__":
    main()
