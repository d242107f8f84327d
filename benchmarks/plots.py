"""The report's pictures: rooflines, gdlib beside the best peer, shares of the read bandwidth, cost against size.

White ground, so that they are readable on a dark page too. Equal figures give equal bytes.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.ticker import EngFormatter, LogLocator, NullLocator

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
    left, right = 0.5 * min(p.intensity for p in points), 2 * max(p.intensity for p in points)
    with picture(path, 10.5, max(5.2, 0.155 * (len(points) + len(families)) + 1.2)) as figure:
        axes, names = figure.subplots(1, 2, width_ratios=(2.1, 1))
        for style, (threads, peak) in zip(("-", "--"), reversed(peaks.items()), strict=False):
            bandwidth = bandwidths[threads]
            label = f"{threads}: {bandwidth:.1f} GB/s, {peak:.0f} GFLOP/s"
            axes.plot([left, peak / bandwidth, right], [left * bandwidth, peak, peak], style, color=ROOF, lw=1.2, label=label)
        axes.legend(loc="upper left", frameon=False, title="measured in the same run", alignment="left")
        low = 0.6 * min(left * min(bandwidths.values()), *(p.gflops for p in points))
        high = 6 * max(peaks.values())  # above the roofs, where no point is, the legend has room
        axes.set(xscale="log", yscale="log", xlim=(left, right), ylim=(low, high), title=title)
        axes.set(xlabel="arithmetic intensity: flops for each byte read or written at least", ylabel="GFLOP/s")
        axes.grid(which="major", color="#e4e7ea", lw=0.6)
        axes.set_axisbelow(True)
        names.axis("off")
        place, step = 1.0, 1.0 / (len(points) + len(families))
        colors, numbered = mpl.color_sequences["tab10"], []
        for index, family in enumerate(families):
            color, mark = colors[index % len(colors)], MARKS[index % len(MARKS)]
            names.plot([0.0], [place - step / 2], mark, color=color, ms=6, transform=names.transAxes, clip_on=False)
            names.text(0.05, place - step / 2, family, transform=names.transAxes, va="center", weight="bold", fontsize=8)
            place -= step
            for point in (p for p in points if p.family == family):
                numbered.append(point)
                axes.plot([point.intensity], [point.gflops], mark, color=color, ms=5.5, alpha=0.85)
                text = f"{len(numbered)}  {point.label}: {point.gflops:.3g}"
                names.text(0.05, place - step / 2, text, transform=names.transAxes, va="center", fontsize=7.5)
                place -= step
        figure.draw_without_rendering()  # the layout is then known, and with it where numbers meet
        _number(axes, [(point.intensity, point.gflops) for point in numbered])


def _number(axes: Any, points: Sequence[tuple[float, float]]) -> None:
    """A number beside each point, where neither a point nor another number is: the nearest such place of a few rings."""
    scale = 72 / axes.figure.dpi  # points of 1/72 inch for each pixel
    taken = [tuple(scale * axes.transData.transform(point)) for point in points]
    rings = [(r * math.cos(a), r * math.sin(a)) for r in (9, 14, 20, 27, 35, 44) for a in [k * math.pi / 8 for k in range(16)]]
    for number, (point, at) in enumerate(zip(points, taken[:], strict=True), 1):

        def free(offset: tuple[float, float], at: tuple[float, ...] = at) -> bool:
            x, y = at[0] + offset[0], at[1] + offset[1]
            return all(abs(x - other[0]) > 9 or abs(y - other[1]) > 7 for other in taken)

        offset = next(filter(free, rings), rings[0])
        taken.append((at[0] + offset[0], at[1] + offset[1]))
        line = {"arrowstyle": "-", "color": ROOF, "lw": 0.4, "shrinkA": 0, "shrinkB": 2}
        text = axes.annotate(
            str(number),
            point,
            offset,
            textcoords="offset points",
            ha="center",
            va="center",
            fontsize=7,
            arrowprops=line if math.hypot(*offset) > 10 else None,
        )
        text.set_path_effects([withStroke(linewidth=2, foreground="white")])  # a roof that it lies on does not strike it out


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


@dataclass(frozen=True)
class Growth:
    name: str  # of what grows
    what: str  # costs
    sizes: Sequence[float]
    seconds: dict[str, list[float]]  # by contender


def _binary(size: float) -> str:
    return f"{size:,}" if size < 2**14 else f"{size / 2**10:,.0f}k" if size < 2**20 else f"{size / 2**20:,.0f}M"


def scaling(path: Path, growths: Sequence[Growth]) -> None:
    """Points, and a line of exponent 1 (for threads, -1) through gdlib's last one."""
    with picture(path, 10.5, 6.8) as figure:
        places: Any = list(figure.subplots(2, -(-len(growths) // 2)).flat)
        for axes, growth in zip(places, growths, strict=False):
            sizes = growth.sizes
            for who, seconds in growth.seconds.items():
                own = who == "gdlib"
                axes.plot(
                    sizes, seconds, "o-" if own else "s-", color=GDLIB if own else PEER, ms=4, lw=1.3, label=who, zorder=3 if own else 2
                )
            last, power = next(iter(growth.seconds.values()))[-1], -1 if growth.name == "threads" else 1
            axes.plot(sizes, [last * (size / sizes[-1]) ** power for size in sizes], ":", color=ROOF, lw=1, label=f"exponent {power}")
            axes.set(xscale="log", yscale="log")
            axes.set_title(f"time against {growth.name}", fontsize=9.5)
            axes.set_xlabel(growth.what, fontsize=7.5)
            axes.set_xticks(sizes, [_binary(size) for size in sizes], fontsize=7)
            axes.set_xticks([], minor=True)
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.yaxis.set_major_formatter(EngFormatter("s"))
            axes.yaxis.set_minor_locator(NullLocator())
            axes.tick_params(axis="y", labelsize=7)
            axes.grid(which="major", color="#e4e7ea", lw=0.6)
            axes.legend(frameon=False, fontsize=7)
        for axes in places[len(growths) :]:
            axes.axis("off")
