"""Draws a graph that a page has as a block of Mermaid, as an SVG inside the page: no script, and no network.

It reads what our pages use: `a --> b`, `a -. label .-> b` and single names. Every arrow leads downwards.
"""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from xml.sax.saxutils import escape

Arrow = tuple[str, str, str]  # from, to, label; an arrow with a label is dotted
WIDTH, HEIGHT, GAP, ROW = 92.0, 26.0, 16.0, 58.0  # of a box; between boxes of a row; from row to row


def read(text: str) -> tuple[list[str], list[Arrow]]:
    """The names and the arrows of a graph, in the order of the text.

    Raises:
        ValueError: a line is no arrow and no name.
    """
    names, arrows = dict[str, None](), []
    for line in text.strip().splitlines()[1:]:
        match line.split():
            case [name]:
                names[name] = None
            case [first, "-->", second]:
                arrows.append((first, second, ""))
            case [first, "-.", label, ".->", second]:
                arrows.append((first, second, label))
            case _:
                raise ValueError(f"not an arrow: {line.strip()}; write a --> b or a -. label .-> b")
        for name in arrows[-1][:2] if arrows else ():
            names.setdefault(name)
    return list(names), arrows


def rows(names: Sequence[str], arrows: Sequence[Arrow]) -> dict[str, int]:
    """The row of each name, from 0 at the top. An arrow leads to a lower row.

    Raises:
        ValueError: arrows lead in a circle.
    """
    below = {name: [second for first, second, _ in arrows if first == name] for name in names}
    above = {name: [first for first, second, _ in arrows if second == name] for name in names}
    heights: dict[str, int] = {}
    while len(heights) < len(names):
        ready = [name for name in names if name not in heights and all(other in heights for other in below[name])]
        if not ready:
            raise ValueError(f"arrows lead in a circle among {', '.join(sorted(set(names) - set(heights)))}")
        heights |= {name: max((heights[other] + 1 for other in below[name]), default=0) for name in ready}
    found = {name: max(heights.values()) - height for name, height in heights.items()}
    for name in sorted(names, key=lambda name: found[name]):  # near to where most of its arrows come from
        if len(above[name]) > len(below[name]):
            found[name] = max(found[other] + 1 for other in above[name])
    return found


def chains(arrows: Sequence[Arrow], row: Mapping[str, int]) -> list[list[str]]:
    """The stops of each arrow, one in each row. Those between its ends have names with a slash."""
    return [
        [first, *(f"{first}/{second}/{level}" for level in range(row[first] + 1, row[second])), second]
        for first, second, _ in arrows
    ]


def crossings(order: Sequence[Sequence[str]], below: Mapping[str, Sequence[str]]) -> int:
    """How often arrows between neighbouring rows cross."""
    number = 0
    for upper, lower in pairwise(order):
        place = {name: index for index, name in enumerate(lower)}
        ends = [sorted(place[other] for other in below[name]) for name in upper]
        number += sum(a > b for i, left in enumerate(ends) for right in ends[i + 1 :] for a in left for b in right)
    return number


def ordered(
    levels: Sequence[Sequence[str]], above: Mapping[str, list[str]], below: Mapping[str, list[str]]
) -> list[list[str]]:
    """The names of each row from left to right: by turns each is moved to the mean place of its neighbours."""
    order, best = [list(level) for level in levels], [list(level) for level in levels]
    for sweep in range(40):
        down = sweep % 2 == 0
        for index in range(1, len(order)) if down else range(len(order) - 2, -1, -1):
            beside = order[index - 1 if down else index + 1]
            place = {name: float(position) for position, name in enumerate(beside)}
            near = above if down else below
            here = {name: float(position) for position, name in enumerate(order[index])}
            order[index].sort(key=lambda name: _mean([place[other] for other in near[name]], here[name]))
        if crossings(order, below) < crossings(best, below):
            best = [list(level) for level in order]
    return best


def places(order: Sequence[Sequence[str]], near: Mapping[str, list[str]]) -> dict[str, float]:
    """The middle of each name from left to right, in pixels: near its neighbours, and clear of the names beside it."""
    found = {name: index * (WIDTH + GAP) for level in order for index, name in enumerate(level)}
    for _ in range(60):
        for level in order:
            wanted = [_mean([found[other] for other in near[name]], found[name]) for name in level]
            right, left = list(wanted), list(wanted)
            for i in range(1, len(level)):
                right[i] = max(right[i], right[i - 1] + _distance(level[i - 1], level[i]))
            for i in range(len(level) - 2, -1, -1):
                left[i] = min(left[i], left[i + 1] - _distance(level[i], level[i + 1]))
            found |= {name: (a + b) / 2 for name, a, b in zip(level, left, right, strict=True)}
    lowest = min(found[name] - _width(name) / 2 for name in found)
    return {name: middle - lowest + 2 for name, middle in found.items()}


def svg(text: str, title: str) -> str:
    """The graph as an SVG in the colours of the page around it. It has no empty line, so it can stand in Markdown."""
    names, arrows = read(text)
    row = rows(names, arrows)
    lines = chains(arrows, row)
    row |= {stop: row[line[0]] + step for line in lines for step, stop in enumerate(line)}
    below = {name: [b for line in lines for a, b in pairwise(line) if a == name] for name in row}
    above = {name: [a for line in lines for a, b in pairwise(line) if b == name] for name in row}
    levels = [[name for name in row if row[name] == level] for level in range(max(row.values()) + 1)]
    x = places(ordered(levels, above, below), {name: above[name] + below[name] for name in row})
    width = max(x[name] + _width(name) / 2 for name in row) + 2
    drawn = [
        f'<svg class="graph" role="img" viewBox="0 0 {width:.0f} {max(row.values()) * ROW + HEIGHT + 4:.0f}" '
        f'style="max-width:{width:.0f}px"><title>{escape(title)}</title>',
        '<marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
        '<path d="M0 0L8 4L0 8z"/></marker>',
    ]
    for line, (first, second, label) in zip(lines, arrows, strict=True):
        name = escape(f"{first} to {second}{label and ' by ' + label}")
        drawn.append(
            f'<path class="{"dotted" if label else "arrow"}" d="{_curve(line, x, row)}"><title>{name}</title></path>'
        )
    for name in names:
        left, top = x[name] - WIDTH / 2, row[name] * ROW + 2
        drawn.append(f'<rect x="{left:.1f}" y="{top:.1f}" width="{WIDTH}" height="{HEIGHT}" rx="4"/>')
        drawn.append(f'<text x="{x[name]:.1f}" y="{top + HEIGHT / 2 + 4:.1f}">{escape(name)}</text>')
    return "\n".join([*drawn, "</svg>"])


def _curve(line: Sequence[str], x: Mapping[str, float], row: Mapping[str, int]) -> str:
    """An arrow from the bottom of its first box to the top of its last, straight down past the boxes between."""
    y = row[line[0]] * ROW + HEIGHT + 2
    path = f"M{x[line[0]]:.1f} {y:.1f}"
    for before, name in pairwise(line):
        top = row[name] * ROW + 2
        middle = (y + top) / 2
        path += f"C{x[before]:.1f} {middle:.1f} {x[name]:.1f} {middle:.1f} {x[name]:.1f} {top:.1f}"
        y = top + HEIGHT
        if "/" in name:
            path += f"V{y:.1f}"
    return path


def _width(name: str) -> float:
    return 0.0 if "/" in name else WIDTH


def _distance(first: str, second: str) -> float:
    """From the middle of a name to that of the next one in its row."""
    return (_width(first) + _width(second)) / 2 + GAP


def _mean(values: Sequence[float], otherwise: float) -> float:
    return sum(values) / len(values) if values else otherwise
