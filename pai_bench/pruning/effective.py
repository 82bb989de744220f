"""The fewest weights with an effective sparsity: a bisection over the number that an allocation keeps."""

import math
from collections.abc import Callable

from torch import Generator, nn

from pai_bench.analysis import paths
from pai_bench.core import Allocate, Mask, Scores, Selection, Shape
from pai_bench.errors import ConfigError
from pai_bench.masks import masks


class Target:
    """Chooses masks of one network by their effective sparsity.

    Args:
        full: the mask that keeps every prunable weight.

    Raises:
        ConfigError: paths through the network cannot be followed.
    """

    def __init__(self, model: nn.Module, full: Mask, input_shape: Shape) -> None:
        effective = paths.Effective(model, full, input_shape)
        if effective.unknown is not None:
            raise ConfigError(
                f"target=effective: what {effective.unknown} in {type(model).__name__} does to paths is not known; "
                "give target=sparsity"
            )
        self._effective, self._total = effective, masks.total(full)

    def sparsity(self, mask: Mask) -> float:
        """The effective sparsity of a mask."""
        return 1 - masks.kept(self._effective(mask)) / self._total

    def choose(
        self,
        allocate: Allocate,
        scores: Scores,
        candidates: Mask,
        sparsity: float,
        generator: Callable[[], Generator],
        *,
        last: bool = True,
    ) -> Selection:
        """The choice of an allocation with the fewest weights whose effective sparsity is at most the given one.

        The number is found by bisection. Every mask of the search lies within the last that kept enough, so masks nest
        even where an allocation draws or rounds. If one weight more or less moves several on or off paths, the
        effective sparsity is below the given one.

        Args:
            generator: makes the generator of the allocation; the same for every call.
            last: whether this is the last round. An earlier one may ask for less than the whole network has, where many
                weights lie on no path. Then it keeps all candidates.

        Raises:
            ConfigError: in the last round, all candidates together have a higher effective sparsity; or the allocation
                refuses every number.
        """
        if not last and not self._keeps_enough(candidates, sparsity):
            return Selection(candidates)
        # Fewer weights than this cannot be enough, as not more can be effective than are kept.
        too_few, most = self._least(sparsity) - 1, masks.kept(candidates)
        within: Selection | None = None  # the last choice that kept enough
        refused, tried, step = None, False, 1
        while most - too_few > 1:
            # Good masks waste few weights, so the search starts with small steps.
            keep = (too_few + most) // 2 if within is not None else min(too_few + step, (too_few + most) // 2)
            step *= 2
            try:
                chosen = allocate(scores, candidates if within is None else within.mask, keep, generator())
            except ConfigError as error:  # as where whole layers do not fit into so few
                too_few, refused = keep, error
                continue
            tried = True
            if self._keeps_enough(chosen.mask, sparsity):
                within, most = chosen, keep
            else:
                too_few = keep
        if refused is not None and not tried:
            raise refused
        if last and within is None and not self._keeps_enough(candidates, sparsity):
            raise ConfigError(
                f"target=effective sparsity={sparsity:g}: all candidates together have effective sparsity "
                f"{self.sparsity(candidates):.6g}; give a higher sparsity"
            )
        return within or Selection(candidates)

    def _least(self, sparsity: float) -> int:
        """The number of effective weights that is enough."""
        return max(1, math.ceil(round((1 - sparsity) * self._total, 6)))

    def _keeps_enough(self, mask: Mask, sparsity: float) -> bool:
        return masks.kept(self._effective(mask)) >= self._least(sparsity)
