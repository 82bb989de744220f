"""Figures of reports: where points lie, what captions say, and what the page draws."""

import json
import re
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from report_rows import directory, made, many, results, rows, write

from pai_bench.report import axes, drawing, matrices, plots
from pai_bench.report.configurations import configurations, grids
from pai_bench.report.evidence import Unreadable
from pai_bench.report.figure import Lines, Matrix


def test_points_lie_where_the_axes_say(tmp_path: Path) -> None:
    grid, _, looks = made(many())
    figure = plots.accuracy(grid, looks)
    assert figure is not None and [panel.title for panel in figure.panels] == ["whole range", "zoom: above 90 %"]
    whole = figure.panels[0]
    assert isinstance(whole, Lines)
    for x in (10, 100):
        places = [p for series in whole.series if not series.flat for p in series.points if p.x == pytest.approx(x)]
        assert len(places) == 3
    across = [whole.x.place(value) for value in (10, 31.6227766, 100)]
    assert across[1] - across[0] == pytest.approx(across[2] - across[1])


def test_the_pointer_finds_values_where_the_svg_shows_their_markers() -> None:
    grid, _, looks = made(many())
    figure = plots.accuracy(grid, looks)
    assert figure is not None
    drawn = drawing.draw(figure, looks, "name", with_images=False)
    assert drawn.png is None
    root = ElementTree.fromstring(drawn.inline)
    places: dict[str, set[tuple[float, float]]] = {}
    for group in root.iter("g"):
        markers = {(round(float(use.get("x", 0)), 1), round(float(use.get("y", 0)), 1)) for use in group.iter("use")}
        places.setdefault(group.get("data-method", ""), set()).update(markers)
    points = json.loads(drawn.points)
    pruned = [(x, y, method) for x, y, method, _ in points if not method.startswith("dense")]
    assert len(pruned) >= 6
    for x, y, method in pruned:
        assert min(abs(x - across) + abs(y - down) for across, down in places[method]) < 0.3
    first, second = (next(p for p in points if p[3].startswith(words)) for words in ("snip at 10×", "snip at 100×"))
    assert first[0] < second[0] and "93.20 % ± 0.26 (sd)\nn = 3: seeds 0, 1, 2" in first[3]


def test_the_page_can_hide_each_method_and_follows_its_own_colours(tmp_path: Path) -> None:
    write(results(tmp_path / "results", many()), tmp_path / "report", images=False)
    text = (tmp_path / "report" / "index.html").read_text()
    for figure in re.findall(r"<figure .*?</figure>", text, re.S):
        buttons = set(re.findall(r'<button aria-pressed="true" data-method="([^"]+)"', figure))
        assert buttons == set(re.findall(r'<g data-method="([^"]+)"', figure))
        drawn = figure.partition("<svg viewBox")[2]
        assert "var(--ink)" in drawn and "var(--ground)" in drawn
        assert not re.search("#(1b1b1a|ffffff|000000)", drawn)


def test_few_points_have_bars_beside_each_other_and_many_have_bands() -> None:
    def drawn(levels: tuple[float, ...]) -> list[bool]:
        _, _, looks = made(runs := rows(levels, snip=[0.9, 0.91], random=[0.8, 0.82]))
        (grid,) = grids(configurations(runs))
        figure = plots.accuracy(grid, looks)
        assert figure is not None and isinstance(figure.panels[0], Lines)
        assert ("bars one sample" in figure.caption) == figure.panels[0].series[0].bars
        assert ("bands one sample" in figure.caption) != figure.panels[0].series[0].bars
        return [series.bars for series in figure.panels[0].series]

    assert drawn((0.5, 0.9, 0.99)) == [True, True] and drawn((0.5, 0.9, 0.98, 0.99)) == [False, False]


def test_the_caption_says_what_lies_outside_the_zoom() -> None:
    grid, _, looks = made(many())
    figure = plots.accuracy(grid, looks)
    assert figure is not None and "The zoom leaves out random, below 90 %." in figure.caption
    zoom = figure.panels[1]
    assert isinstance(zoom, Lines) and zoom.y.low == 90
    grid, _, looks = made(rows(snip=[0.5, 0.51], dense=[0.95, 0.96]))  # no method is near the dense network
    figure = plots.accuracy(grid, looks)
    assert figure is not None and len(figure.panels) == 1 and "zoom" not in figure.caption


def test_a_legend_of_many_methods_lies_within_the_figure_and_below_its_axes() -> None:
    grid, _, looks = made(rows((0.9,), **{f"a_method_with_a_long_name_{i:02}": [0.9, 0.91] for i in range(20)}))
    figure = plots.accuracy(grid, looks)
    assert figure is not None
    drawn = drawing.draw(figure, looks, "name", with_images=False)
    names_space = "{http://www.w3.org/2000/svg}"
    root = ElementTree.fromstring(drawn.svg)
    (legend,) = (group for group in root.iter(f"{names_space}g") if group.get("id") == "legend")
    width = float(root.attrib["viewBox"].split()[2])
    entries = {text.text: text.attrib for text in legend.iter(f"{names_space}text")}
    assert len(entries) == 20
    for words, attributes in entries.items():
        left = float(attributes["x"])
        assert left > 0 and left + 0.5 * 8 * len(words or "") < width
    page = ElementTree.fromstring(drawn.inline)
    height = float(page.attrib["viewBox"].split()[3])
    below = [float(text.attrib["y"]) for text in page.iter("text")]
    assert height - 6 < max(below) < height - 1  # the label of the axis is the lowest text, and it is whole


def test_overlaps_and_what_chance_gives_are_two_matrices(tmp_path: Path) -> None:
    runs = rows(snip=[0.9], synflow=[0.8], random=[0.5])
    folder = results(tmp_path, runs)
    grid, _, looks = made(runs)
    shown = plots.look_up(grid, {run["id"]: folder / run["id"] for run in runs}, ["overlap"], Unreadable())
    (figure,) = plots.figures(grid, looks, shown, ["overlap"])
    observed, chance = figure.panels
    assert isinstance(observed, Matrix) and isinstance(chance, Matrix)
    assert (observed.title, chance.title) == ("10×: both keep", "10×: by chance")
    assert observed.rows == ("synflow", "random") and observed.columns == ("snip", "synflow")
    (pair,) = (p for p in shown.overlaps[0.9][1] if {p.first[:4], p.second[:4]} == {"snip", "rand"})
    assert (observed.squares[1][0].value, chance.squares[1][0].value) == (pair.jaccard, pair.jaccard_by_chance)
    assert observed.squares[0][1].empty


def test_densities_of_layers_have_a_labelled_scale_of_their_own_in_each_panel(tmp_path: Path) -> None:
    runs = rows((0.9, 0.99), snip=[0.9, 0.8])
    folder = tmp_path
    for run in runs:
        kept = 50 if run["sparsity"] == 0.9 else 1
        directory(folder, run, {"conv.weight": np.arange(100) < kept, "fc.weight": np.arange(100) < kept - 1})
    grid, _, looks = made(runs)
    shown = plots.look_up(grid, {run["id"]: folder / run["id"] for run in runs}, ["layers"], Unreadable())
    (figure,) = plots.figures(grid, looks, shown, ["layers"])
    first, second = figure.panels
    assert isinstance(first, Lines) and isinstance(second, Lines)
    assert first.y.zero is None and second.y.zero is not None and first.y.label.endswith("log scale")
    assert [words for _, words in first.x.ticks] == ["conv", "fc"]
    assert all(point.low is None for series in first.series for point in series.points)


@pytest.mark.parametrize(
    ("axis", "words"),
    [("compression", ["10×", "100×"]), ("sparsity", ["90 %", "99 %"]), ("density", ["10 %", "1 %"])],
)
def test_the_axis_of_compression_can_be_labelled_otherwise(axis: str, words: list[str]) -> None:
    grid, _, _ = made(many())
    found = axes.of_levels(grid, axis)
    assert [tick for _, tick in found.ticks] == words and [x for x, _ in found.ticks] == [10, 100]


def test_zero_has_a_place_of_its_own_on_logarithmic_axes() -> None:
    axis = axes.decades("cost", [0.0, 5.0, 2000.0], str)
    assert axis.ticks[0][1] == "0" and axis.place(0.0) == axis.place(axis.ticks[0][0]) < axis.place(1.0)
    assert 0 <= axis.place(0.0) < axis.place(2000.0) <= 1
    nothing = axes.decades("cost", [0.0], str)
    assert nothing.ticks[0][1] == "0" and nothing.shown(0.0) == nothing.ticks[0][0]


@pytest.mark.parametrize(("low", "high"), [(0.0, 100.0), (91.23, 91.24), (93.0, 93.0), (9.99, 94.3), (0.0, 0.0)])
def test_linear_axes_hold_their_values_and_few_ticks(low: float, high: float) -> None:
    axis = axes.linear("accuracy", low, high, 0, 100)
    assert axis.low <= low <= high <= axis.high and 2 <= len(axis.ticks) <= 9
    assert len({words for _, words in axis.ticks}) == len(axis.ticks)
    assert all(len(words) <= 6 for _, words in axis.ticks)


def test_the_collapse_map_counts_seeds() -> None:
    grid, _, looks = made(many())
    figure = matrices.collapse(grid, looks)
    assert figure is not None
    (matrix,) = figure.panels
    assert isinstance(matrix, Matrix) and matrix.rows == ("snip", "synflow", "random")
    assert [square.value for square in matrix.squares[2]] == pytest.approx([1 / 3, 1 / 3])
    assert "collapsed layer: 1 of 3 seeds" in matrix.squares[2][0].text


def test_only_what_is_shown_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    levels = tuple(1 - 2.0**-i for i in range(1, 12))
    runs = rows(levels, snip=[0.9] * 8, random=[0.8] * 8)
    folder = results(tmp_path / "results", runs)
    opened: list[str] = []
    keep = Path.open
    monkeypatch.setattr(Path, "open", lambda self, *a, **k: opened.append(self.name) or keep(self, *a, **k))
    (grid,) = grids(configurations(runs))
    plots.look_up(grid, {run["id"]: folder / run["id"] for run in runs}, plots.KINDS, Unreadable())
    assert opened.count("metrics.csv") == 2 * 4 * 5  # methods, compressions and seeds that are shown
