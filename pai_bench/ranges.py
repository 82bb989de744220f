"""Types of settings with their ranges, for the signatures of functions that a config names.

`signatures` reads them from the source. Every number of a config is finite, and every text has a letter.
"""

from typing import Annotated

from annotated_types import Ge, Gt, Le, Len, Lt, MinLen

Count = Annotated[int, Ge(1)]
NonNegativeInt = Annotated[int, Ge(0)]
Positive = Annotated[float, Gt(0)]
NonNegative = Annotated[float, Ge(0)]
Fraction = Annotated[float, Ge(0), Le(1)]
ProperFraction = Annotated[float, Ge(0), Lt(1)]  # less than the whole
Widths = Annotated[list[Count], MinLen(1)]

# Normalisation: a number for each channel.
OfGrey = Annotated[list[float], Len(1, 1)]
OfColours = Annotated[list[float], Len(3, 3)]
StdOfGrey = Annotated[list[Positive], Len(1, 1)]
StdOfColours = Annotated[list[Positive], Len(3, 3)]
