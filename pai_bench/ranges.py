"""Types of settings with their ranges, for the signatures of functions that a config names.

`signatures` reads them from the source. In a config every number is finite, and no text is empty.
"""

from dataclasses import dataclass
from typing import Annotated


@dataclass(frozen=True)
class Ge:
    """At least this."""

    bound: float


@dataclass(frozen=True)
class Gt:
    """More than this."""

    bound: float


@dataclass(frozen=True)
class Le:
    """At most this."""

    bound: float


@dataclass(frozen=True)
class Lt:
    """Less than this."""

    bound: float


@dataclass(frozen=True)
class Len:
    """A list of so many values: at least, and at most."""

    least: int
    most: int | None = None


Count = Annotated[int, Ge(1)]
NonNegativeInt = Annotated[int, Ge(0)]
Positive = Annotated[float, Gt(0)]
NonNegative = Annotated[float, Ge(0)]
Fraction = Annotated[float, Ge(0), Le(1)]
ProperFraction = Annotated[float, Ge(0), Lt(1)]
Counts = Annotated[list[Count], Len(1)]

# Normalisation: a number for each channel.
OfGrey = Annotated[list[float], Len(1, 1)]
OfColours = Annotated[list[float], Len(3, 3)]
StdOfGrey = Annotated[list[Positive], Len(1, 1)]
StdOfColours = Annotated[list[Positive], Len(3, 3)]

# Pixels around images of so many: fewer than those, or a crop would hold nothing of its image.
PaddingOf32 = Annotated[int, Ge(0), Le(31)]
PaddingOf64 = Annotated[int, Ge(0), Le(63)]
