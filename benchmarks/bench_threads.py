"""One thread and all of them, from sizes where a second thread cannot pay to sizes where it must; PyTorch and the machine beside it."""

from dataclasses import dataclass
from functools import partial
from typing import Any

from benchmarks import bench_gemm, bench_gradient_descent, bench_networks, bench_reference, machine, peers
from benchmarks.bench_gemm import FORWARD, GRADIENTS, Layer
from benchmarks.measure import Contender, Group, Run

GDLIB, PYTORCH = "gdlib", "PyTorch"
WIDTHS = (8, 16, 32, 64, 128, 256, 512, 1024, 2048)  # of Linear(n, n) on n rows
LEAST_COMPUTE_BOUND = 512  # its products take milliseconds, a thousand times what a barrier does
LEAST_BANDWIDTH_BOUND = 64_000_000  # bytes; less may stay in a cache from step to step
# The least of many gains counts, so that each must be sure. Short works need more rounds: the medians of 11 are up to 5 % apart for the
# same code on the same thread.
ROUNDS_OF_LONG, ROUNDS = 11, 31
DESCENTS = ((1_000, 10), (10_000, 10), (100_000, 10), (10_000, 100), (200_000, 100))  # rows, features


@dataclass(frozen=True)
class Work:
    name: str
    group: Group
    compute_bound: bool  # its time must fall with every thread; the others must only not lose


def label(who: str, threads: int) -> str:
    return f"{who}, {machine.plural(threads)}"


def gdlib_by_threads(prepare: Any, work: float = 1.0) -> list[Contender]:
    return [
        Contender(label(GDLIB, threads), prepare, work, around=partial(machine.gdlib_threads, threads)) for threads in machine.THREAD_COUNTS
    ]


def pytorch_by_threads(prepare: Any, work: float = 1.0, form: str = "", around: Any = peers.pytorch_threads) -> list[Contender]:
    return [Contender(label(PYTORCH, threads), prepare, work, form, partial(around, threads)) for threads in machine.THREAD_COUNTS]


def peaks(flops: float) -> list[Contender]:
    return [machine.fma_peak("float32", threads, flops) for threads in machine.THREAD_COUNTS]


def gdlib_products(layer: Layer) -> Run:
    forward, gradients = bench_gemm.linear_forward(layer), bench_gemm.linear_gradients(layer)
    return lambda: (forward(), gradients())


def pytorch_products(layer: Layer) -> Run:
    forward, gradients = (bench_gemm.pytorch_layer(layer, part) for part in (FORWARD, GRADIENTS))
    return lambda: (forward(), gradients())


def check_products(layer: Layer, results: Any) -> None:
    for part, result in zip((FORWARD, GRADIENTS), results, strict=True):
        bench_gemm.check(part, layer, result)


def _products(width: int) -> Work:
    flops = 6.0 * width**3
    contenders = [
        *gdlib_by_threads(gdlib_products),
        *pytorch_by_threads(pytorch_products, around=peers.inference_mode),
        *peaks(flops),
    ]
    problem = partial(bench_gemm.problem, width, width, width, "float32")
    name = f"Linear({width}, {width}), {width} rows: forward and gradients"
    long = width >= LEAST_COMPUTE_BOUND
    group = Group(f"Threads: {name}", "call", contenders, problem, check_products, rounds=ROUNDS_OF_LONG if long else ROUNDS)
    return Work(name, group, compute_bound=long)


def _descent(rows: int, features: int) -> Work:
    name = f"gradient descent, {rows:,} x {features}"
    epochs, moved = bench_gradient_descent.EPOCHS, 4 * rows * features
    long = moved >= LEAST_BANDWIDTH_BOUND
    options: Any = {"epochs": epochs, "lr": bench_gradient_descent.LR, "batch_size": rows}
    readings = [
        form
        for threads in machine.THREAD_COUNTS
        for form in machine.reading(f"X itself read once, {machine.plural(threads)}", lambda problem: problem.X, threads)
    ]
    contenders = [
        *gdlib_by_threads(bench_gradient_descent.gdlib_fit, epochs),
        *pytorch_by_threads(partial(peers.pytorch_by_hand, shuffle=False, **options), epochs),
        *(readings if long else peaks(4 * rows * features)),
    ]
    problem = partial(bench_gradient_descent.problem, rows, features, "float32")
    rounds = ROUNDS_OF_LONG if long else ROUNDS
    return Work(name, Group(f"Threads: {name}", "step", contenders, problem, bench_gradient_descent.check, rounds=rounds), False)


def _reference() -> Work:
    epochs = bench_reference.SLOW_EPOCHS
    by_hand = partial(peers.pytorch_by_hand, epochs=epochs, lr=bench_reference.LR, batch_size=bench_reference.BATCH_SIZE)
    contenders = [
        *gdlib_by_threads(bench_reference.gdlib_fit, bench_reference.EPOCHS),
        *pytorch_by_threads(by_hand, epochs),
        *peaks(bench_reference.FLOPS),
    ]
    group = Group("Threads: reference program", "epoch", contenders, bench_reference.problem, bench_reference.check, rounds=ROUNDS)
    return Work("reference program", group, False)


def _network(widths: tuple[int, ...], batch_size: int, steps: int) -> Work:
    flops, _ = bench_networks.flops_and_bytes(widths, batch_size)
    contenders = [
        *gdlib_by_threads(bench_networks.gdlib_fit, steps),
        *pytorch_by_threads(partial(bench_networks.pytorch_loop, fused=False), steps),
        *pytorch_by_threads(partial(bench_networks.pytorch_loop, fused=True), steps, "fused SGD"),
        *peaks(flops),
    ]
    name = f"network {'-'.join(map(str, widths))}, batch {batch_size}"
    problem = partial(bench_networks.problem, widths, batch_size, steps)
    long = widths[0] >= LEAST_COMPUTE_BOUND
    group = Group(f"Threads: {name}", "step", contenders, problem, bench_networks.check, rounds=ROUNDS_OF_LONG if long else ROUNDS)
    return Work(name, group, compute_bound=long)


WORKS = [
    *(_products(width) for width in WIDTHS),
    *(_descent(*shape) for shape in DESCENTS),
    _reference(),
    *(_network(*network) for network in bench_networks.NETWORKS),
]
GROUPS = [work.group for work in WORKS]


def test_threads(time_contender: None) -> None: ...
