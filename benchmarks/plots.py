"""The report's pictures: rooflines, gdlib beside the best peer, shares of the read bandwidth, cost against size.

White ground, so that they are readable on a dark page too. Equal figures give equal bytes.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure

GDLIB, PEER, ROOF = "#1f6fb2", "#b5bcc4", "#444444"
STYLE = {"svg.hashsalt": "gdlib", "svg.fonttype": "path", "axes.spines.top": False, "axes.spines.right": False, "font.size": 9}
MARKS = "os^vDPX*<>ph"


@contextmanager
def picture(path: Path, width: float, height: float) -> Iterator[Figure]:
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(width, height), layout="constrained", facecolor="white")
        yield figure
        figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)


@dataclass(frozen=True)
class Point:
    label: str
    family: str  # points of one family share a mark
    intensity: float  # flops for each byte that must move
    gflops: float


def roofline(path: Path, points: Sequence[Point], peaks: dict[str, float], bandwidths: dict[str, float], title: str) -> None:
    """`peaks` in GFLOP/s and `bandwidths` in GB/s by number of threads. Points are numbered; a list beside the picture names them."""
    families = list(dict.fromkeys(point.family for point in points))
    left, right = 0.5 * min(p.intensity for p in points), 3 * max(p.intensity for p in points)
    with picture(path, 10.5, max(5.2, 0.155 * (len(points) + len(families)) + 1.2)) as figure:
        axes, names = figure.subplots(1, 2, width_ratios=(2.1, 1))
        for style, (threads, peak) in zip(("-", "--"), reversed(peaks.items()), strict=False):
            bandwidth = bandwidths[threads]
            ridge = peak / bandwidth
            axes.plot([left, ridge, right], [left * bandwidth, peak, peak], style, color=ROOF, lw=1.2)
            axes.annotate(
                f"{peak:.0f} GFLOP/s, {threads}",
                (right, peak),
                (-2, -3 if style == "--" else 3),
                textcoords="offset points",
                ha="right",
                va="top" if style == "--" else "bottom",
            )
            foot = max(left, 0.04) if style == "-" else max(left, 0.04) * 3
            axes.annotate(
                f"{bandwidth:.0f} GB/s, {threads}",
                (foot, foot * bandwidth),
                (-4, 4) if style == "-" else (4, -4),
                textcoords="offset points",
                ha="left",
                va="bottom" if style == "-" else "top",
                rotation=0,
            )
        names.axis("off")
        place, step = 1.0, 1.0 / (len(points) + len(families))
        colors = mpl.color_sequences["tab10"]
        number = 0
        for index, family in enumerate(families):
            color, mark = colors[index % len(colors)], MARKS[index % len(MARKS)]
            names.plot([0.0], [place - step / 2], mark, color=color, ms=6, transform=names.transAxes, clip_on=False)
            names.text(0.05, place - step / 2, family, transform=names.transAxes, va="center", weight="bold", fontsize=8)
            place -= step
            for point in (p for p in points if p.family == family):
                number += 1
                axes.plot([point.intensity], [point.gflops], mark, color=color, ms=6, alpha=0.85)
                axes.annotate(str(number), (point.intensity, point.gflops), (4, 3), textcoords="offset points", fontsize=7)
                text = f"{number}  {point.label}: {point.gflops:.3g}"
                names.text(0.05, place - step / 2, text, transform=names.transAxes, va="center", fontsize=7.5)
                place -= step
        axes.set(xscale="log", yscale="log", xlim=(left, right), title=title)
        axes.set(xlabel="arithmetic intensity: flops for each byte read or written at least", ylabel="GFLOP/s")
        axes.grid(which="major", color="#e4e7ea", lw=0.6)
        axes.set_axisbelow(True)


def bars(
    path: Path, names: Sequence[str], values: Sequence[float], labels: Sequence[str], title: str, xlabel: str, log: bool = False
) -> None:
    """Horizontal bars, gdlib's in colour."""
    with picture(path, 7.5, 0.9 + 0.3 * len(names)) as figure:
        axes = figure.subplots()
        drawn = axes.barh(names, values, color=[GDLIB if name.startswith("gdlib") else PEER for name in names])
        axes.bar_label(drawn, labels, padding=4)
        axes.invert_yaxis()
        axes.margins(y=0.01)
        axes.set(
            title=title, xlabel=xlabel, xscale="log" if log else "linear", xlim=(0.5, 6 * max(values)) if log else (0, 1.15 * max(values))
        )


def ratios(path: Path, rows: Sequence[tuple[str, float, str]], title: str) -> None:
    """(work, time of the best peer with gdlib's being 1, its name): bars to the right of 1 where gdlib is faster, to the left where not."""
    with picture(path, 9.5, 1.1 + 0.2 * len(rows)) as figure:
        axes = figure.subplots()
        names = [row[0] for row in rows]
        ends = [row[1] for row in rows]
        starts = [min(1.0, end) for end in ends]
        colors = [GDLIB if end >= 1 else "#c8553d" for end in ends]
        axes.barh(names, [max(1.0, end) - start for start, end in zip(starts, ends, strict=True)], left=starts, color=colors, height=0.7)
        for index, (_, value, peer) in enumerate(rows):
            axes.annotate(f"{value:.2f}x {peer}", (max(value, 1.0), index), (4, 0), textcoords="offset points", va="center", fontsize=7)
        axes.axvline(1, color=ROOF, lw=1)
        axes.invert_yaxis()
        axes.margins(y=0.005)
        axes.tick_params(axis="y", labelsize=7.5)
        low, high = min(*ends, 0.9), max(*ends, 1.1)
        axes.set(title=title, xscale="log", xlim=(low / 1.15, high * (high / low) ** 0.55))
        axes.set(xlabel="time of the best peer, gdlib's being 1 (logarithmic; red: the peer is faster)")
        ticks = [tick for tick in (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50) if low / 1.15 <= tick <= high]
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axes.set_xticks([], minor=True)


Lines = tuple[str, Sequence[float], dict[str, list[float]]]  # what grows, its sizes, seconds by contender


def scaling(path: Path, axes_of: Sequence[Lines]) -> None:
    """Points, and a line of exponent 1 (for threads, -1) through gdlib's last one."""
    with picture(path, 10.5, 6.6) as figure:
        places: Any = list(figure.subplots(2, -(-len(axes_of) // 2)).flat)
        for axes, (name, sizes, lines) in zip(places, axes_of, strict=False):
            for who, seconds in lines.items():
                own = who == "gdlib"
                axes.plot(
                    sizes, seconds, "o-" if own else "s-", color=GDLIB if own else PEER, ms=4, lw=1.3, label=who, zorder=3 if own else 2
                )
            last, at = next(iter(lines.values()))[-1], sizes[-1]
            power = -1 if name == "threads" else 1
            axes.plot(sizes, [last * (size / at) ** power for size in sizes], ":", color=ROOF, lw=1, label=f"exponent {power}")
            axes.set(xscale="log", yscale="log", title=f"{name}", xlabel=name, ylabel="s")
            axes.set_xticks(sizes, [f"{size:,}" if size < 10_000 else f"{size / 1024:,.0f}k" for size in sizes], fontsize=7)
            axes.set_xticks([], minor=True)
            axes.grid(which="major", color="#e4e7ea", lw=0.6)
            axes.legend(frameon=False, fontsize=7)
        for axes in places[len(axes_of) :]:
            axes.axis("off")
