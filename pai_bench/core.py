"""The types that scores, allocations, schedules and the training loop speak in."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

import torch
from torch import Generator, Tensor, nn

Weights = dict[str, Tensor]  # prunable parameter name -> values
Scores = dict[str, Tensor]  # same names and shapes, float; higher = keep
Mask = dict[str, Tensor]  # same names and shapes, bool; True = kept
Batch = tuple[Tensor, Tensor]  # images (B, C, H, W) float, labels (B,) int64
Batches = Sequence[Batch]  # materialised: may be walked twice
Loss = Callable[[Tensor, Tensor], Tensor]  # logits (B, K), labels (B,) -> scalar mean
Record = Callable[[dict[str, float], float], None]  # metrics, epoch: the one way by which numbers leave a run
Shape = tuple[int, int, int]  # (C, H, W) of one image


@dataclass(frozen=True)
class Subnetwork:
    """A network, the mask over its prunable weights, and the weights that it started from.

    Scores evaluate the network through this object and leave the model as it was: parameters, buffers, gradients.
    """

    model: nn.Module
    mask: Mask
    initial: Weights
    input_shape: Shape

    @property
    def weights(self) -> Weights:
        """The prunable weights as they are in the model, detached."""
        parameters = dict(self.model.named_parameters())
        return {name: parameters[name].detach() for name in self.mask}

    def masked(self) -> Weights:
        """Fresh leaves that require a gradient: the weights, zero where pruned."""
        return {name: (weight * self.mask[name]).requires_grad_() for name, weight in self.weights.items()}

    def __call__(self, images: Tensor, weights: Weights) -> Tensor:
        """Logits (B, K) of images (B, C, H, W) when the prunable weights are `weights`."""
        # Batch norm in train mode writes its running statistics: into copies, so that scoring leaves no trace.
        buffers = {name: buffer.clone() for name, buffer in self.model.named_buffers()}
        logits: Tensor = torch.func.functional_call(self.model, (weights, buffers), (images,))
        return logits


@dataclass(frozen=True)
class Examples:
    """Which training images a score looks at: `per_class` of each class, or `total` whatever their class."""

    per_class: int | None
    total: int | None
    batch_size: int
    augment: bool


class Score(Protocol):
    """How much each prunable weight matters; higher = keep."""

    def __call__(self, net: Subnetwork, batches: Batches, loss: Loss, generator: Generator) -> Scores:
        """Scores of the prunable weights."""


class Allocate(Protocol):
    """Which of the candidates stay, so that exactly round((1 - sparsity) * N) weights are kept."""

    def __call__(self, scores: Scores, candidates: Mask, sparsity: float, generator: Generator) -> Mask:
        """The mask."""


@dataclass(frozen=True)
class Round:
    """One score, allocate, mask cycle; `sparsity` is what it ends with."""

    sparsity: float


@dataclass(frozen=True)
class Pruner:
    """A score and the conditions under which it is taken."""

    score: Score | None  # None: dense, there are no rounds
    mode: Literal["eval", "train"]  # batch-norm mode while scoring
    examples: Examples | None  # None: the score looks at no images


@dataclass(frozen=True)
class Place:
    """Where datasets lie and where their images are to go."""

    data_dir: Path
    download: bool
    device: torch.device
    num_workers: int


class Data(Protocol):
    """A dataset in use. Split names are "train", "validation" (may be empty) and "test"."""

    input_shape: Shape
    num_classes: int
    num_examples: dict[str, int]
    checksum: str  # of the images and labels, or of the file listing where images are streamed

    def train(self, batch_size: int, order: Generator, augment: Generator) -> Iterator[Batch]:
        """One epoch of augmented training batches in random order; a trailing batch of one image is left out."""

    def evaluation(self, split: str, batch_size: int) -> Iterator[Batch]:
        """Every image of a split once, un-augmented, in a fixed order."""

    def draw(self, examples: Examples, generator: Generator) -> Batches:
        """Training images for scoring.

        Raises:
            ConfigError: a class, or the training split, holds fewer images than asked for.
        """


def num_steps(num_examples: int, batch_size: int) -> int:
    """Batches in an epoch: the last may be smaller, but a single left-over image is dropped (batch norm needs two)."""
    return num_examples // batch_size + (num_examples % batch_size > 1)
