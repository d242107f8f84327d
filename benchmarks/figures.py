"""Which results are drawn in which picture of the report."""

import math
from collections.abc import Sequence
from pathlib import Path

from benchmarks import aims, machine, plots
from benchmarks import bench_calls as calls
from benchmarks import bench_gemm as gemm
from benchmarks import bench_gradient_descent as descent
from benchmarks import bench_kernels as kernels
from benchmarks import bench_networks as networks
from benchmarks import bench_reference as reference
from benchmarks import bench_scaling as scaling
from benchmarks import bench_sgd as sgd
from benchmarks import bench_threads as threads
from benchmarks.measure import Group
from benchmarks.results import Results, best_peer, limit, ours, share
from benchmarks.tables import digits

_forward = [group for group in gemm.GROUPS if group.title.startswith(gemm.FORWARD)]
FAMILIES = (  # of the points on a roofline: works, and the contender that is drawn where it is not the first of gdlib's
    ("kernels one by one", kernels.GROUPS, ""),
    ("gradient descent, step", descent.GROUPS, ""),
    ("SGD, epoch", [*sgd.EPOCHS, *reference.GROUPS], ""),
    ("products, forward", _forward, ""),
    ("products, forward, packed weights", _forward, gemm.PREDICT),
    ("products, gradients", [group for group in gemm.GROUPS if group.title.startswith(gemm.GRADIENTS)], ""),
    ("network, training step", networks.GROUPS, ""),
)
RATIOS = [*reference.GROUPS, *calls.GROUPS, *descent.GROUPS, *sgd.GROUPS, *kernels.GROUPS, *gemm.GROUPS, *networks.GROUPS]


def available(results: Results) -> set[str]:
    """Names of the pictures that these results give: without a C++ compiler there are no limits to draw."""
    limits = {"roofline-float32", "roofline-float64", "gradient-descent"} if limit(results[machine.BANDWIDTH.title]) else set()
    return {"ratios", "reference", "scaling"} | limits


def draw(results: Results, folder: Path) -> None:
    drawings = {
        "ratios": _ratios,
        "reference": _reference,
        "gradient-descent": _descent,
        "scaling": _scaling,
        "roofline-float32": _roofline,
        "roofline-float64": _roofline,
    }
    for name in sorted(available(results)):
        drawings[name](results, folder / f"benchmarks-{name}.svg")


def _roofline(results: Results, path: Path) -> None:
    dtype = path.stem.rpartition("-")[2]

    def rates(group: Group) -> dict[str, float]:
        return {name.rpartition(", ")[2]: group.amount / timing.seconds for name, timing in results[group.title].items()}

    drawn = [
        (family, group, results[group.title][name] if name else ours(results[group.title]))
        for family, groups, name in FAMILIES
        for group in groups
        if group.dtype == dtype
    ]
    points = [
        plots.Point(_short(group.title), family, group.flops / group.bytes, group.flops / timing.seconds / 1e9)
        for family, group, timing in drawn
        if timing.samples
    ]
    plots.roofline(path, points, rates(machine.PEAKS[dtype]), rates(machine.BANDWIDTH), f"gdlib on this machine, {dtype}")


def _short(title: str) -> str:
    for word in ("forward, ", "gradients, ", "Gradient descent, ", "SGD epoch, ", "Network ", " float32", " float64"):
        title = title.replace(word, "")
    return title.replace("000,000 x", "M x").replace(",M", "M")


def _ratios(results: Results, path: Path) -> None:
    rows = [(group.title, *best_peer(results[group.title])) for group in RATIOS]
    plots.ratios(path, [row for row in rows if not math.isnan(row[1])], "gdlib beside its best peer")


def _reference(results: Results, path: Path) -> None:
    group = reference.GROUPS[0]
    contenders = [timing for timing in results[group.title].values() if timing.samples and not timing.contender.limit]
    contenders.sort(key=lambda timing: timing.seconds)
    over = [timing.over(contenders[0]) for timing in contenders]
    names, labels = [timing.contender.name for timing in contenders], [f"{digits(ratio)}x" for ratio in over]
    plots.bars(path, names, over, labels, group.title, f"time, {names[0]}'s being 1", log=True)


def _descent(results: Results, path: Path) -> None:
    shares = {
        f"{name}, {group.title.partition(', ')[2]}": 100 * share(results[group.title], name)
        for group in descent.GROUPS
        for name, timing in results[group.title].items()
        if timing.samples and not timing.contender.limit
    }
    labels = [f"{value:.0f} %" for value in shares.values()]
    plots.bars(path, list(shares), list(shares.values()), labels, "A step of gradient descent", "share of the read bandwidth, %")


def _scaling(results: Results, path: Path) -> None:
    def growth(group: Group, name: str, what: str, sizes: Sequence[int], labels: dict[str, list[str]]) -> plots.Growth:
        timings = results[group.title]
        return plots.Growth(name, what, sizes, {who: [timings[label].seconds for label in row] for who, row in labels.items()})

    drawn = []
    for axis in scaling.AXES:
        labels = {who: [scaling.label(who, size) for size in axis.sizes] for who in ("gdlib", "NumPy")}
        drawn.append(growth(axis.group, axis.name, axis.what, axis.sizes, labels))
    work = next(work for work in threads.WORKS if work.compute_bound)
    if not math.isnan(aims.gain(results, work)):
        labels = {who: [threads.label(who, count) for count in machine.THREAD_COUNTS] for who in (threads.GDLIB, threads.PYTORCH)}
        drawn.append(growth(work.group, "threads", work.name, machine.THREAD_COUNTS, labels))
    plots.scaling(path, drawn)
