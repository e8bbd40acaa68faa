"""The figures as a diagram; matplotlib is a development dependency."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def draw(summary: dict[str, Any], path: Path) -> None:
    """Seconds of each way at each size, and how the work grows with the scale, as a PNG. Raises ImportError."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3.8), layout="constrained")
    FigureCanvasAgg(figure)
    times, growth = figure.subplots(1, 2)
    ways = list(dict.fromkeys(run["way"] for run in summary["runs"]))
    sizes = list(dict.fromkeys(run["size"] for run in summary["runs"]))
    for number, way in enumerate(ways):
        runs = {run["size"]: run for run in summary["runs"] if run["way"] == way}
        places = [place + (number - (len(ways) - 1) / 2) * 0.8 / len(ways) for place in range(len(sizes))]
        bars = times.bar(places, [runs[size]["seconds"] for size in sizes], 0.8 / len(ways), label=way)
        times.bar_label(bars, [f"{runs[size].get('speed_up', 1):.1f}x" for size in sizes], fontsize=7)
    times.set(title="Seconds for a picture (speed-up over the literal schedule)", yscale="log", ylabel="s",
              xticks=range(len(sizes)), xticklabels=sizes)
    for row in summary["growth"]:
        values = {name: value for name, value in row.items() if name != "way"}
        growth.plot(list(values), list(values.values()), marker="o", label=row["way"])
    growth.set(title="Work, in base pictures (counted)", yscale="log")
    growth.legend(fontsize=8)
    figure.suptitle(f"{summary['model']}, {summary['steps']} steps, {summary['device']}", fontsize=9)
    figure.savefig(path, dpi=110)
