"""What a config says about a search that learns its mask: the method, and how its scores are trained."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Literal

from annotated_types import Ge, Gt, Lt

from pai_bench.core import Count, NonNegativeInt
from pai_bench.training.recipe import Recipe

if TYPE_CHECKING:
    from pai_bench.learned.method import Method
    from pai_bench.training.optimizer import Method as Optimization


@dataclass(frozen=True)
class Search:
    """A search that trains a score for each prunable weight and leaves the weights as they are.

    What is not here is the training's: batch size, precision, label smoothing, temperature, sizes of images.
    """

    method: Callable[[], Method]
    # Parameters of normalisation layers. none: ones and zeros, as if there were none. trained: trained with the scores.
    affine: Literal["none", "trained"]
    epochs: Count
    lr: Annotated[float, Gt(0), Lt(3e38)]  # of the scores
    optimizer: Callable[[], Optimization]
    weight_decay: Annotated[float, Ge(0), Lt(3e38)]  # of the scores
    lr_schedule: Literal["constant", "cosine", "linear"]
    warmup_epochs: NonNegativeInt
    label: str | None = None  # what tables and figures call the method; None: its name
    name: str = ""


def recipe_of(search: Search, training: Recipe) -> Recipe:
    """How the scores are trained."""
    return replace(
        training,
        epochs=search.epochs,
        lr=search.lr,
        optimizer=search.optimizer,
        weight_decay=search.weight_decay,
        decay_norm_and_bias=True,  # all that is trained here counts as such
        lr_schedule="step" if search.lr_schedule == "constant" else search.lr_schedule,
        lr_milestones=[],
        warmup_epochs=search.warmup_epochs,
        batch_norm_l1=0.0,
        norm_interpolation=None,  # for the weights; scores have norms of their own kind
        name=search.name,
    )
