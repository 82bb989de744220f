"""The words that all of the package speaks: weights, scores, masks, rounds, and the functions between them.

Nothing here imports torch, so that a config is checked without it.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Protocol, runtime_checkable

from annotated_types import Ge, Gt, Le, Len, Lt

if TYPE_CHECKING:
    import torch
    from torch import Generator, Tensor, nn

Weights = dict[str, "Tensor"]  # prunable parameter name -> values
Scores = dict[str, "Tensor"]  # same names and shapes, float; higher = keep
Mask = dict[str, "Tensor"]  # same names and shapes, bool; True = kept
State = dict[str, "Tensor"]  # a state dict: every parameter and buffer
# images (B, C, H, W) float; and labels: classes (B,) int64, or the targets of a regression (B, K) float
Batch = tuple["Tensor", "Tensor"]
Batches = Sequence[Batch]  # may be walked twice
Change = Callable[["Tensor", "Tensor"], Batch]  # images as they are stored, (B, H, W, C) uint8, and labels -> others
Loss = Callable[["Tensor", "Tensor"], "Tensor"]  # logits (B, K), labels as in Batch -> scalar mean
Record = Callable[[dict[str, float], float], None]  # metrics, epoch: the one way by which numbers leave a run
Shape = tuple[int, int, int]  # (C, H, W) of one image

# Arguments that a config gives. config/signatures.py reads their ranges from the source.
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


@dataclass(frozen=True)
class Call:
    """A function that a config names with `_target_`, and the settings that it gives it.

    It is called with what a run supplies, so it can stand wherever the function itself could.

    Args:
        target: the dotted path of the function.
        settings: keyword arguments of the function.
        name: of the option of its group; empty for a function that is a part of an option.
    """

    target: str
    settings: dict[str, Any] = field(default_factory=dict)
    name: str = ""

    def __call__(self, *arguments: Any) -> Any:
        """Imports the function and calls it."""
        module, _, function = self.target.rpartition(".")
        return getattr(importlib.import_module(module), function)(*arguments, **self.settings)


@dataclass(frozen=True)
class Subnetwork:
    """A network whose pruned weights are zero, the mask that says which, and the weights that it started from.

    Scores evaluate the network through this object and leave the model as it was: parameters, buffers, gradients.
    """

    model: nn.Module
    mask: Mask
    initial: Weights  # initial values of every parameter
    input_shape: Shape
    coupled: Mask = field(default_factory=dict)  # masks of other parameters: norms and biases of pruned filters
    num_kept: Callable[[], int] = field(default=lambda: 1)  # weights this round keeps; only PHEW needs it
    # A score may keep values here between the rounds of a search. It is emptied whenever weights change other than by
    # pruning. Results must not depend on it.
    cache: dict[str, Any] = field(default_factory=dict)
    moved: Weights | None = None  # the values that weights had when they were last kept; None: the initial values
    # Values of every parameter, drawn anew as the model's were. None: the pruner does not say that it redraws.
    redraw: Callable[[Generator], Weights] | None = None
    # Calls a function of lists of tensors that a round calls so often. A GPU may make a CUDA graph of it: the model may
    # be read too, what tells the function from others are the settings of the partial, and the next call may overwrite
    # what it returns.
    repeat: Callable[..., Sequence[Tensor]] = field(default=lambda function, per_round, *inputs: function(*inputs))
    required: list[tuple[Tensor, Callable[[], Exception]]] | None = None  # of `require`, to be checked with the scores

    @property
    def weights(self) -> Weights:
        """The prunable weights as they are in the model, zero where pruned, detached."""
        parameters = dict(self.model.named_parameters())
        return {name: parameters[name].detach() for name in self.mask}

    def masked(self) -> Weights:
        """Fresh leaves that require a gradient: the weights, zero where pruned."""
        return {name: weight.clone().requires_grad_() for name, weight in self.weights.items()}

    def others(self) -> Weights:
        """Fresh leaves that require a gradient: the parameters that are not prunable."""
        named = self.model.named_parameters()
        return {name: p.detach().clone().requires_grad_() for name, p in named if name not in self.mask}

    def require(self, holds: Tensor, error: Callable[[], Exception]) -> None:
        """Raises an error unless a condition () holds: at once, or on a GPU with the checks of the scores."""
        if self.required is not None:
            self.required.append((holds, error))
        elif not holds:
            raise error()

    def free(self, vector: Weights) -> Weights:
        """A vector over parameters, with zeros where they are pruned: the directions that training can take."""
        fixed = self.mask | self.coupled
        return {name: value * fixed[name] if name in fixed else value for name, value in vector.items()}

    def __call__(self, images: Tensor, weights: Weights) -> Tensor:
        """Logits (B, K) of images (B, C, H, W) when the parameters named in `weights` have those values."""
        import torch

        # Batch norm in train mode writes its running statistics: into copies, so that scoring leaves no trace.
        buffers = {name: buffer.clone() for name, buffer in self.model.named_buffers()}
        logits: Tensor = torch.func.functional_call(self.model, (weights, buffers), (images,))
        return logits


@dataclass(frozen=True)
class ScoringData:
    """Which training images a score looks at: `per_class` of each class, or `total` whatever their class.

    `balanced` says otherwise: as many of each class as `total` allows, or `per_class` for each in all.
    A regression has no classes: `per_class` is for each output, and the examples are drawn at random.
    """

    per_class: Count | None
    total: Count | None
    batch_size: Annotated[int, Ge(2)]
    augment: bool
    balanced: bool | None = None  # None: per_class is balanced and total is not


class Score(Protocol):
    """How much each prunable weight matters; higher = keep."""

    def __call__(self, net: Subnetwork, batches: Batches, loss: Loss, generator: Generator) -> Scores:
        """Scores of the prunable weights."""


@dataclass(frozen=True)
class Selection:
    """Which of the candidates stay, and what an allocation has to say about them."""

    mask: Mask
    scale: Weights | None = None  # rescaling of the kept weights; entries of pruned weights are ignored
    num_tied: int = 0  # candidates with the score of the threshold, if the order decided which of them stay


class Allocate(Protocol):
    """Which of the candidates stay. Tensors of weights are (outputs, inputs of a group, ...)."""

    def __call__(self, scores: Scores, candidates: Mask, keep: int, generator: Generator) -> Selection:
        """The mask, of exactly `keep` weights, and a rescaling of the weights if one comes with it."""


class Transfer(Protocol):
    """New values for the prunable weights, for methods that return weights as well as a mask."""

    def __call__(self, net: Subnetwork, batches: Batches, loss: Loss, generator: Generator) -> Weights:
        """Values of every prunable weight, the pruned ones included, given the mask that a round ends with."""


class TransferRule(Protocol):
    """The weights that the last training starts from, for a mask that is found."""

    def __call__(self, own: Weights, fresh: Weights, mask: Mask, generator: Generator, /) -> Weights:
        """Values of every prunable weight; those of pruned ones are ignored.

        Args:
            own: the weights that the network was initialized with.
            fresh: another draw of the initialization.
            mask: of all these weights; layers that are not pruned are kept whole.
        """


@dataclass(frozen=True)
class TrainingLength:
    """How long the recipe trains."""

    epochs: int
    steps_per_epoch: int
    last_rate_epochs: float = math.inf  # at the end, with the last learning rate; 0 where the rate falls to zero


# Which layers are pruned: all, or all but some. The others stay whole, and count neither in N nor in a sparsity.
Prunable = Literal["all", "no_first", "no_last", "no_shortcut", "conv"]
# What a sparsity counts as pruned: pruned weights, or also those that are kept and lie on no path.
Target = Literal["sparsity", "effective"]

Rounding = Literal["nearest", "up", "down"]  # of (1 - sparsity) * N, to the number of weights that a round keeps


@dataclass(frozen=True)
class Condition:
    """When a round takes place. It is asked after every epoch of the training before that round."""

    # Of a Moment of pruning/conditions.py: whether the round takes place now, what to record, notes for the next epoch.
    holds: Callable[[Any], tuple[bool, dict[str, float], State]]
    chooses: bool = False  # it looks at what would be kept now, so scores must follow from the weights alone


@dataclass(frozen=True)
class Round:
    """One score, allocate, mask cycle, within training or, as by default, before it.

    Times are in epochs on the recipe's clock; a fraction is a step within an epoch.
    """

    sparsity: float  # what the round ends with
    until_epoch: float = 0.0  # train this far before scoring
    rewind_epoch: float | None = None  # after masking, put the clock and the learning rate back to this time,
    rewind_weights: bool = True  # and, if so, the weights too (their values when the clock first stood there)
    rounding: Rounding = "nearest"
    final_sparsity: float | None = None  # what the last round ends with, if this one may keep no fewer than that one
    when: Condition | None = None  # train until it holds; until_epoch is then the latest time


class Schedule(Protocol):
    """In which rounds a sparsity is reached."""

    def __call__(self, sparsity: float, length: TrainingLength) -> Sequence[Round]:
        """The rounds; the last has the sparsity asked for."""


class Watch(Protocol):
    """What looks at the network after every epoch of a training, and may end that training."""

    state: dict[str, Any]  # for a checkpoint; its "ended" says whether the training is to end

    def __call__(self) -> dict[str, float]:
        """Looks, and returns what to record."""


class Training(Protocol):
    """What the round loop asks of the training loop."""

    @property
    def epoch(self) -> float:
        """The recipe's clock, in epochs."""

    @property
    def age_epochs(self) -> float:
        """Training done so far, in epochs; unlike the recipe's clock it is never put back."""

    def until(self, mask: Mask, epoch: float, watch: Watch | None = None) -> None:
        """Trains the masked network until the recipe's clock stands at a time in epochs, or until a watch ends it."""

    def rewind(self, mask: Mask, epoch: float, weights: bool) -> None:
        """Puts the clock back, and the weights if asked, and forgets the momentum."""


NUM_PASS_IMAGES = 1000  # enough for statistics of norms, which average over positions too

Reduction = Literal["sum", "abs_sum", "l2", "max"]  # how the scores of a filter's weights become one score


@dataclass(frozen=True)
class Pruner:
    """A score and the conditions under which it is taken."""

    score: Score | None  # None: dense, there are no rounds
    mode: Literal["eval", "train", "eval_after_pass"]  # batch-norm mode while scoring
    scoring_data: ScoringData | None  # None: the score looks at no images
    dtype: Literal["float64", "float32"] = "float64"  # of network, images and scores; most authors compute in float32
    reduce: Reduction | None = None  # set: whole filters are ranked and pruned, and the sparsity is that of filters
    regrow: bool = False  # a weight pruned in one round may return in the next, with its initial value
    regrow_moved: bool = False  # or with the value that it had when it was pruned
    transfer: Transfer | None = None  # set: every round ends with new weights
    pass_images: Count | None = None  # with mode=eval_after_pass: of the pass before scoring; None: NUM_PASS_IMAGES
    redraws: Literal[True] | None = None  # set: the score draws weights anew, and those of the network play no part
    name: str = ""
    label: str | None = None  # what tables and figures call the method; None: its name


HOOKS = ("batches", "images", "scores", "mask", "weights")  # the functions of an ablation


@dataclass(frozen=True)
class Ablation:
    """What is broken on purpose to test a claim: hooks, each of which does nothing where it is None."""

    batches: Callable[[Batches, Generator], Batches] | None = None  # the images and labels that a score sees
    images: Callable[[Tensor, Tensor, Generator], Batch] | None = None  # the same as they are stored: see Change
    scores: Callable[[Scores, Mask, Generator], Scores] | None = None  # of every round, given its candidates
    mask: Callable[[Mask, Generator], Mask] | None = None  # of the last round
    # The state dict that training goes on from, given the present one and a freshly drawn one; to return the latter
    # itself is to start training over.
    weights: Callable[[State, State, Mask, Generator], State] | None = None
    name: str = ""


@dataclass(frozen=True)
class Shard:
    """Which part of every batch a process takes: every `size`-th image, from `rank` on."""

    rank: int = 0
    size: int = 1


@dataclass(frozen=True)
class DataSettings:
    """Where datasets lie and where their images are to go."""

    data_dir: Path
    download: bool
    device: torch.device
    num_workers: int
    share: Shard = Shard()


class Data(Protocol):
    """A dataset in use. Split names are "train", "validation" (may be empty) and "test"."""

    input_shape: Shape
    num_classes: int  # of a regression the number of targets: it is how many outputs a network needs
    regression: bool  # whether labels are targets and not classes
    num_examples: dict[str, int]
    checksum: str  # of the images and labels, or of the file listing where images are streamed

    def train(self, batch_size: int, order: Generator, augment: Generator, start: int = 0) -> Iterator[Batch]:
        """One epoch of augmented training batches in random order, from batch `start`, the same as without it.

        A trailing batch of one image is left out. Of several processes each gets its share of every batch.
        """

    def evaluation(self, split: str, batch_size: int) -> Iterator[Batch]:
        """Every image of a split once, un-augmented, in a fixed order; of several processes each gets other batches."""

    def draw(
        self, examples: ScoringData, generator: Generator, dtype: torch.dtype, change: Change | None = None
    ) -> Batches:
        """Training images for scoring, laid out channels first. A single left-over image joins the batch before it.

        All that is random is drawn at once, and the change is done; images are made when a batch is asked for.

        Args:
            dtype: of the images; it is also what they are normalised in.
            change: is done to the images, as they are stored, and to their labels, before they are augmented.

        Raises:
            ConfigError: a class, or the training split, holds fewer images than asked for; the images are of many sizes
                and are to be changed.
        """


@runtime_checkable
class ByEpoch(Protocol):
    """A Data whose training images can depend on the epoch besides by what is drawn for it."""

    def in_epoch(self, number: int, image_size: int | None) -> Data:
        """The data as they are in an epoch.

        Args:
            number: of the epoch; 1 is the first.
            image_size: pixels of each side of a training image. None: as in `input_shape`.
        """


@runtime_checkable
class OnDevice(Protocol):
    """A Data that lies on the device whole, so that a batch is made there from a few tensors."""

    num_examples: dict[str, int]

    def tables(self, order: Generator, augment: Generator) -> list[Tensor]:
        """What an epoch is made from, on the device: of each training image, in the order of the epoch, the label and
        what was drawn for it."""

    def gather(self, tables: Sequence[Tensor], positions: slice | Tensor) -> Batch:
        """The batch of some positions of an epoch, without waiting for the device."""


def num_steps(num_examples: int, batch_size: int) -> int:
    """Batches in an epoch: the last may be smaller, but a single left-over image is dropped (batch norm needs two)."""
    return num_examples // batch_size + (num_examples % batch_size > 1)
