"""Turns the SVG of matplotlib into SVG for an HTML page."""

from collections.abc import Collection, Mapping
from xml.etree import ElementTree
from xml.etree.ElementTree import Element

# These colours of a figure follow the style of the page, light or dark. The page has them as variables.
INK, QUIET, LINE, RAISED, GROUND = "#1b1b1a", "#63635f", "#e3e3df", "#f7f7f5", "#ffffff"
_VARIABLES = {INK: "--ink", QUIET: "--quiet", LINE: "--line", RAISED: "--raised", GROUND: "--ground"}
_SCALE = 1.5  # at most this many CSS pixels for a point: letters of 8 points are 12 pixels high


def figure(svg: bytes, words: str, methods: Mapping[str, str], without: Collection[str], cropped: float) -> str:
    """A figure for the page.

    Args:
        words: a description, for people who cannot see the figure.
        methods: id of a group -> method. The group gets the attribute data-method, so that page.js can hide it.
        without: ids of groups that the page does not show.
        cropped: height of the part at the bottom that is cut off, in points.
    """
    root = ElementTree.fromstring(svg)
    _, _, width, height = map(float, root.attrib["viewBox"].split())
    height -= cropped
    _cleaned(root, methods, without)
    root.attrib = {
        "viewBox": f"0 0 {width:g} {height:g}",
        "style": f"max-width:{_SCALE * width:.0f}px;min-width:{width:.0f}px",
        "role": "img",
        "tabindex": "0",
        "aria-label": words,
    }
    root.append(Element("circle", {"class": "here", "r": "5", "cx": "-20", "cy": "-20"}))
    return _coloured(root)


def symbol(svg: bytes, name: str) -> str:
    """A symbol that the page shows in several places with `<use href="#name">`."""
    root = ElementTree.fromstring(svg)
    box = root.attrib["viewBox"]
    _cleaned(root, {}, ())
    root.tag, root.attrib = "symbol", {"id": name, "viewBox": box}
    return _coloured(root)


def _cleaned(root: Element, methods: Mapping[str, str], without: Collection[str]) -> None:
    """Removes what HTML does not need or may not have twice: name spaces, metadata, unused ids."""
    for element in root.iter():
        for child in list(element):
            if child.tag.rpartition("}")[2] in ("metadata", "style") or child.get("id") in without:
                element.remove(child)
    for element in root.iter():
        element.tag = element.tag.rpartition("}")[2]
        element.attrib = {key.rpartition("}")[2]: value for key, value in element.attrib.items()}
        element.tail = None
        if element.tag != "text":
            element.text = None
        name = element.get("id")
        if name is not None and element.tag == "g":
            del element.attrib["id"]
            if name in methods:
                element.set("data-method", methods[name])
        if "d" in element.attrib:
            element.set("d", " ".join(element.attrib["d"].split()))


def _coloured(root: Element) -> str:
    for element in root.iter():
        style = element.get("style", "")
        if "#" in style:
            for colour, variable in _VARIABLES.items():
                style = style.replace(colour, f"var({variable})")
            element.set("style", style)
    return ElementTree.tostring(root, encoding="unicode")
