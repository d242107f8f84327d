"""The report's tables in Markdown: results in, text out."""

import importlib.metadata
import importlib.util
import math
import platform
import textwrap
from collections.abc import Sequence
from pathlib import Path

import gdlib
from benchmarks import aims, machine
from benchmarks import bench_footprint as footprint
from benchmarks import bench_scaling as scaling
from benchmarks import bench_threads as threads
from benchmarks.measure import Group, Timing
from benchmarks.results import Results, Timings, ours, share
from gdlib.config import get_config

WIDTH = 140  # of a line of text
PEERS = ("numpy", "scikit-learn", "torch", "jax")


def duration(timing: Timing) -> str:
    scale, unit = next(((s, u) for s, u in ((1.0, "s"), (1e-3, "ms"), (1e-6, "us")) if timing.seconds >= s), (1e-9, "ns"))
    return f"{digits(timing.seconds / scale)} {unit}" if timing.samples else timing.missing


def digits(value: float) -> str:
    """Three of them, or all before the point."""
    return f"{value:,.{max(0, 2 - math.floor(math.log10(abs(value))))}f}" if 0.001 < abs(value) < math.inf else f"{value:.2g}"


def percent(value: float) -> str:
    return "" if math.isnan(value) else f"{100 * value:.0f} %" if value > 0.1 else f"{100 * value:.2g} %"


def times(value: float) -> str:
    return "" if math.isnan(value) else f"{digits(value)}x"


def beside(other: Timing, own: Timing) -> str:
    """How many times as long as gdlib."""
    return f"({times(other.over(own))})" if other.samples and own.samples else ""


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Markdown; columns without content are left out."""
    kept = [i for i in range(len(header)) if any(row[i] for row in rows)]
    lines = [header, [":---" if i == 0 else "---:" for i in range(len(header))], *rows]
    return "".join(f"| {' | '.join(line[i] for i in kept)} |\n" for line in lines)


def rate(group: Group, timing: Timing) -> str:
    return f"{digits(group.amount / timing.seconds)} {group.rate}/s" if timing.samples and group.rate else ""


def group_table(group: Group, timings: Timings) -> str:
    """One row for each contender."""
    rows = []
    for name, timing in timings.items():
        ratio = timing.over(ours(timings))
        row = [timing.contender.label, duration(timing), rate(group, timing), "" if math.isnan(ratio) else digits(ratio)]
        rows.append([*row, percent(share(timings, name))])
    return (
        table([group.title, f"one {group.unit}", "rate", "time, gdlib's being 1", "share of the limit"], rows)
        + f"\n{textwrap.fill(group.note, WIDTH)}\n"
    )


def topic_table(title: str, groups: Sequence[Group], results: Results) -> str:
    """One row for each group, for topics of many: gdlib's time, its peers' (how many times as long), its share of the limit."""
    names = list(dict.fromkeys(t.contender.name for g in groups for t in results[g.title].values() if not t.contender.limit))
    rows = []
    for group in groups:
        timings = results[group.title]
        own = ours(timings)
        others = [timings.get(name) for name in names if name != own.contender.name]
        ratios = ["" if other is None else " ".join(filter(None, [duration(other), beside(other, own)])) for other in others]
        rows.append([group.title, duration(own), rate(group, own), *ratios, percent(share(timings, own.contender.name))])
    peers = [name for name in names if name != ours(results[groups[0].title]).contender.name]
    return table([title, names[0], "rate", *peers, "share of the limit"], rows)


def aim_table(results: Results, wanted: Sequence[aims.Aim] = aims.AIMS) -> str:
    rows = []
    for aim in wanted:
        found = aim.value(results)
        value, where = found if isinstance(found, tuple) else (found, "")
        measured = ["not measured", ""] if math.isnan(value) else [f"{digits(value)}{aim.unit}", "yes" if aim.reached(value) else "no"]
        rows.append(
            [aim.of and f"**{aim.of}**", aim.what, f"{aim.sign} {aim.bound:,g}{aim.unit}", *measured, "" if math.isnan(value) else where]
        )
    return table(["Work", "aim", "wanted", "measured", "reached", "where"], rows)


def threads_table(results: Results) -> str:
    if machine.THREADS == 1:
        return "One thread is all that this machine has: there is nothing to compare.\n"
    rows, counts = [], (1, machine.THREADS)
    for work in threads.WORKS:
        timings = results[work.group.title]
        (one, more), peer = ([timings[threads.label(who, count)] for count in counts] for who in (threads.GDLIB, threads.PYTORCH))
        limits = [timing for timing in timings.values() if timing.contender.limit and timing.samples]
        own_gain = times(limits[0].over(limits[-1])) if len(limits) > 1 else ""
        best = min(peer, key=lambda timing: timing.seconds)
        gains = [times(aims.gain(results, work)), f"{duration(best)} {beside(best, more)}", times(peer[0].over(peer[1])), own_gain]
        rows.append([work.name, duration(one), duration(more), *gains, percent(share(timings, more.contender.name))])
    header = ["Threads", *map(machine.plural, counts), "gain", "PyTorch", "PyTorch's gain", "the limit's gain", "share of the limit"]
    return table(header, rows)


def scaling_table(results: Results) -> str:
    rows = []
    for axis in scaling.AXES:
        figures = [f"{value:.3f}" for who in ("gdlib", "NumPy") for value in aims.scaling(results, axis, who)]
        timings, largest = results[axis.group.title], axis.sizes[-1]
        own, peer = (timings[scaling.label(who, largest)] for who in ("gdlib", "NumPy"))
        ends = [times(peer.over(own)), percent(share(timings, own.contender.name))]
        rows.append([f"{axis.name}: {axis.what}", f"{axis.sizes[0]:,} to {largest:,}", *figures, *ends])
    for work in threads.WORKS if machine.THREADS > 1 else ():
        if work.compute_bound and not math.isnan(aims.gain(results, work)):
            slope = -math.log(aims.gain(results, work)) / math.log(machine.THREADS)
            rows.append([f"threads: {work.name}", f"1 to {machine.THREADS}", f"{slope:.3f}", "", "", "", "", ""])
    header = ["Cost against", "range", "exponent", "R^2", "NumPy's exponent", "NumPy's R^2"]
    return table([*header, "NumPy's time at the end", "share of the limit there"], rows)


def blas() -> str:
    """The kernels that run NumPy's products; to be asked before a peer loads libraries of its own."""
    try:
        from threadpoolctl import threadpool_info
    except ModuleNotFoundError:
        return "unknown: threadpoolctl is not installed"
    libraries = [item for item in threadpool_info() if item["user_api"] == "blas"]
    return ", ".join(f"{item['internal_api']} {item['version']}, {item.get('architecture', 'unnamed')} kernels" for item in libraries)


def machine_table(results: Results, products: str, load: float) -> str:
    """`load`: how many processes others ran when the run began. Figures of several threads say little unless it was near 0."""
    cpuinfo, config = Path("/proc/cpuinfo"), get_config()
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    cpu = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())
    versions = [f"{name} {importlib.metadata.version(name)}" for name in PEERS if importlib.util.find_spec(name.replace("scikit-", "sk"))]
    size = f"{footprint.installed_bytes() / 1e6:.2f} MB on disk"
    limits = ((group, name, timing) for group in machine.GROUPS for name, timing in results[group.title].items())
    rows = [
        ["CPU", f"{cpu} ({platform.machine()}), {machine.plural(machine.THREADS)}; load before the run {load:.2f}"],
        *([name, rate(group, timing) or timing.missing] for group, name, timing in limits),
        ["gdlib", f"{gdlib.__version__}: {config['isa']} kernels, compiler {config['compiler']}; {size}"],
        ["peers", ", ".join([f"Python {platform.python_version()}", *versions])],
        ["NumPy's matrix products", products],
    ]
    return table(["This machine", "in this run"], rows)
