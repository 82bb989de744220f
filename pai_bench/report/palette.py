"""The colour, marker and dash of each method. They follow from its name, so that two figures of one paper agree."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product

# The colours of Okabe and Ito, which colour-blind readers can distinguish. Without yellow, which is faint on white.
BLUE, RED, GREEN, PINK, ORANGE, SKY = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"
GREY = "#808080"  # of random pruning alone
_COLOURS = (BLUE, RED, GREEN, PINK, ORANGE, SKY)
_MARKERS = ("circle", "square", "triangle", "diamond", "cross", "down", "plus")
_DASHES = ("solid", "dashed", "dotted")

Style = tuple[str, str, str]  # colour, marker, dash

# Pruners that papers often show together have different colours.
OF_PRUNER = {
    "random":                       (GREY, "cross", "solid"),
    "magnitude":                    (ORANGE, "diamond", "solid"),
    "snip":                         (BLUE, "circle", "solid"),
    "iter_snip":                    (SKY, "down", "solid"),
    "iter_snip_official":           (SKY, "cross", "solid"),
    "grasp":                        (GREEN, "triangle", "solid"),
    "grasp_abs":                    (GREEN, "cross", "solid"),
    "grasp_official":               (GREEN, "square", "solid"),
    "synflow":                      (RED, "square", "solid"),
    "force":                        (PINK, "plus", "solid"),
    "force_official":               (PINK, "cross", "solid"),
    "phew":                         (SKY, "diamond", "solid"),
    "prospr":                       (PINK, "circle", "solid"),
    "prospr_first_order":           (PINK, "down", "solid"),
    "prospr_official":              (PINK, "square", "solid"),
    "ntt":                          (ORANGE, "triangle", "solid"),
    "ntt_official":                 (ORANGE, "cross", "solid"),
    "fisher":                       (RED, "down", "solid"),
    "gradient_norm":                (SKY, "plus", "solid"),
    "loss_preservation":            (BLUE, "diamond", "solid"),
    "biased_loss":                  (RED, "triangle", "solid"),
    "gradient_preservation":        (GREEN, "plus", "solid"),
    "synflow_l2":                   (RED, "circle", "solid"),
    "synflow_l2_size":              (RED, "plus", "solid"),
    "px":                           (BLUE, "triangle", "solid"),
    "px_squared":                   (BLUE, "down", "solid"),
    "px_official_2024":             (BLUE, "cross", "solid"),
    "ntk_sap":                      (GREEN, "circle", "solid"),
    "npb":                          (GREEN, "diamond", "solid"),
    "lamp":                         (ORANGE, "square", "solid"),
    "optimal_brain_damage":         (ORANGE, "down", "solid"),
    "taylor2":                      (SKY, "circle", "solid"),
    "taylor2_official":             (SKY, "triangle", "solid"),
    "fisher_taylor2":               (PINK, "diamond", "solid"),
    "fisher_taylor2_official":      (BLUE, "plus", "solid"),
    "filter_magnitude":             (ORANGE, "circle", "dashed"),
    "filter_loss":                  (BLUE, "square", "dashed"),
    "filter_biased_loss":           (RED, "diamond", "dashed"),
    "filter_grasp":                 (GREEN, "down", "dashed"),
    "filter_gradient_preservation": (SKY, "square", "dashed"),
    "filter_fisher":                (RED, "cross", "dashed"),
    "filter_taylor":                (PINK, "triangle", "dashed"),
    "filter_batch_norm":            (ORANGE, "plus", "dashed"),
}  # fmt: skip

_ALL = tuple((colour, marker, dash) for dash, marker, colour in product(_DASHES, _MARKERS, _COLOURS))


@dataclass(frozen=True)
class Named:
    """What the style of a method follows from."""

    method: str  # its id
    pruner: str
    rank: tuple[bool, bool]  # the first of the methods with one pruner has the style of that pruner


def styles(methods: Sequence[Named]) -> Mapping[str, Style]:
    """The style of each method, by its id. Up to 42 methods, no two have the same colour and marker.

    A pruner of the table has its style, whatever else is shown. If several methods have this pruner, one of them has
    its style. All others start from a hash of their id and take the first style that differs in colour from all that
    is taken; if there is no such style, the first that differs in colour or marker.
    """
    found: dict[str, Style] = {}
    others = []
    seen: set[str] = set()
    for method in sorted(methods, key=lambda method: (method.pruner, method.rank, method.method)):
        if method.pruner in OF_PRUNER and method.pruner not in seen:
            found[method.method] = OF_PRUNER[method.pruner]
        else:
            others.append(method)
        seen.add(method.pruner)
    for method in sorted(others, key=lambda method: method.method):
        found[method.method] = _free(method.method, list(found.values()))
    return found


def _free(method: str, taken: Sequence[Style]) -> Style:
    start = int.from_bytes(hashlib.sha256(method.encode()).digest()[:4])
    # 6 colours and 7 markers have no common divisor, so equal steps through both reach every pair.
    solid = [(_COLOURS[(start + i) % 6], _MARKERS[(start // 6 + i) % 7], "solid") for i in range(42)]
    order = [*solid, *(style for style in _ALL if style[2] != "solid")]
    colours, pairs = {style[0] for style in taken}, {style[:2] for style in taken}
    for differs in (
        lambda style: style[0] not in colours,
        lambda style: style[:2] not in pairs,
        lambda style: style not in taken,
    ):
        if (style := next(filter(differs, order), None)) is not None:
            return style
    return order[0]
