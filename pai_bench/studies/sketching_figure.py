"""Results of the sketching study for people: CSV, a table for the terminal, the figure."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pai_bench.studies import sketching
from pai_bench.studies.sketching import Row
from pai_bench.system.files import csv_text


def write_csv(rows: Sequence[Row], path: Path) -> None:
    """Writes all rows, one in each line. An error without a formula gives an empty field."""
    path.write_text(csv_text(rows, list(rows[0])))


def medians(rows: Sequence[Row], selection: str, split: str, column: str) -> dict[float, tuple[float, float, float]]:
    """Quartiles (lower, median, upper) of a column over seeds, by rising density. Empty if a value is missing."""
    found: dict[float, list[float]] = {}
    for row in rows:
        if row["selection"] == selection and row["split"] == split:
            if row[column] is None:
                return {}
            found.setdefault(row["density"], []).append(row[column])
    quartiles = {density: np.quantile(found[density], [0.25, 0.5, 0.75]) for density in sorted(found)}
    return {density: (float(a), float(b), float(c)) for density, (a, b, c) in quartiles.items()}


def table(rows: Sequence[Row], split: str) -> str:
    """A table for the terminal: medians over seeds of the closed form and of the Monte-Carlo mean."""
    densities = sorted({row["density"] for row in rows})
    width = max(len(selection) for selection in sketching.SELECTIONS) + 2
    lines = ["density".ljust(width) + "".join(f"{density:>18g}" for density in densities)]
    for selection in sketching.SELECTIONS:
        closed, simulated = (medians(rows, selection, split, column) for column in ("closed_form", "monte_carlo"))
        cells = [
            f"{_short(closed[density][1]) if closed else '-':>8} /{_short(simulated[density][1]):>8}"
            for density in densities
        ]
        lines.append(selection.ljust(width) + "".join(cells))
    return "\n".join(lines)


def _short(value: float) -> str:
    return f"{value:.0f}" if value >= 1000 else f"{value:.3g}" if value >= 0.001 else f"{value:.0e}"


def figure(rows: Sequence[Row], path: Path, split: str = "train") -> None:
    """Draws error against density, log-log: sketches on the left, binary masks on the right.

    Lines are closed forms, and markers are Monte-Carlo means; both are medians over seeds. Bands are the middle half of
    the seeds. If there is no closed form, a dashed line joins the markers.

    Args:
        rows: the rows of `study`.
        path: the file; its ending, such as .png or .svg, chooses the format.
        split: "train" or "held_out".
    """
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    settings: dict[Any, Any] = {
        "font.size": 9,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "svg.hashsalt": "pai_bench",
    }
    with matplotlib.rc_context(settings):
        drawing = Figure(figsize=(9.6, 6), layout="constrained")
        FigureCanvasAgg(drawing)
        left, right = drawing.subplots(1, 2)
        _panel(left, rows, split, "sketch", "Sketches: kept weights multiplied by c / (s p)")
        _panel(right, rows, split, "mask", "Binary masks: kept weights as they are")
        where = {"train": "training", "held_out": "held-out"}[split]
        left.set_ylabel(f"relative error on {where} images\n‖X(m ⊙ w*) - Xw*‖² / ‖Xw*‖²")
        seeds = len({row["seed"] for row in rows})
        drawing.suptitle("What a mask found before training costs the trained weights", fontsize=12, fontweight="bold")
        drawing.supxlabel(
            f"{seeds} linear regressions on scikit-learn's digits; medians, and bands for the middle half. "
            "Solid lines: closed form.\nMarkers: Monte Carlo, joined by dashed lines where there is no closed form; "
            "low for p ∝ |w⁰ᵢ|, where rare draws carry much of the mean.",
            fontsize=8,
            color="0.3",
        )
        # Without the date that matplotlib writes by default, the same rows give the same file.
        drawing.savefig(path, dpi=160, metadata={"Date": None} if path.suffix == ".svg" else None)


def _panel(axes: Any, rows: Sequence[Row], split: str, kind: str, title: str) -> None:
    """Draws one kind of selection: lines, markers, bands, and a legend below."""
    from matplotlib.lines import Line2D
    from matplotlib.ticker import NullLocator

    handles = []
    for selection, (label, colour, marker) in sketching.SELECTIONS.items():
        if not selection.startswith(kind):
            continue
        closed, simulated = (medians(rows, selection, split, column) for column in ("closed_form", "monte_carlo"))
        line = closed or simulated
        style: Any = "-" if closed else "--"
        low, middle, high = zip(*line.values(), strict=True)
        axes.fill_between(list(line), low, high, color=colour, alpha=0.15, linewidth=0)
        axes.plot(list(line), middle, style, color=colour, linewidth=1.6)
        dots: dict[str, Any] = {"marker": marker, "markersize": 6, "markeredgecolor": "white", "markeredgewidth": 0.7}
        points = [median for _, median, _ in simulated.values()]
        axes.plot(list(simulated), points, color=colour, linestyle="none", zorder=3, **dots)
        handles.append(Line2D([], [], color=colour, linestyle=style, linewidth=1.6, label=label, **dots))
    handles.append(axes.axhline(1, color="black", linewidth=0.9, linestyle=":", label="all weights pruned: error 1"))
    axes.set(xscale="log", yscale="log", xlabel="density: weights kept, each counted once", title=title)
    ticks: list[float] = []
    for density in sorted({row["density"] for row in rows}):
        if not ticks or density > 1.4 * ticks[-1]:  # nearer labels would overlap
            ticks.append(density)
    axes.set_xticks(ticks, [f"{100 * density:g} %" for density in ticks])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.grid(axis="y", color="0.9", linewidth=0.6)
    axes.set_axisbelow(True)
    place = {"loc": "upper left", "bbox_to_anchor": (0, -0.16), "borderaxespad": 0, "alignment": "left"}
    axes.legend(handles=handles, title="mask found from", frameon=False, handlelength=2.6, **place)
