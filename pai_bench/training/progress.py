"""How far training has come, in numbers: what a checkpoint keeps of them, and what an epoch adds to them."""

import math
from dataclasses import asdict, dataclass, fields
from typing import Any


@dataclass
class Progress:
    """Two times and what has been done so far.

    The clock counts optimizer steps on the recipe. It decides the learning rate and the data, and it can be put back.
    The age counts all steps ever taken. Records are ordered by it.
    """

    steps_per_epoch: int
    clock: int = 0
    age: int = 0
    mask_since: int = 0  # the clock when the current mask was applied
    num_examples: int = 0  # images trained on
    seconds: float = 0.0  # spent on steps and their data, without evaluation
    epoch_images: int = 0  # of this epoch, as far as its sums go
    epoch_seconds: float = 0.0
    evaluated: bool = False  # the network as it is now has been evaluated and recorded
    lowest_loss: float = math.inf  # on the held-out images since the mask was applied, where that is looked for
    lowest_at: int = 0  # the clock then
    lowest_test_top1: float = 0.0  # the test accuracy then
    look_missing: bool = False  # a look at the held-out images is due at this clock, and has lost its workers

    @property
    def epoch(self) -> float:
        """The clock, in epochs."""
        return self.clock / self.steps_per_epoch

    @property
    def age_epochs(self) -> float:
        """The age, in epochs."""
        return self.age / self.steps_per_epoch

    @property
    def at_end_of_epoch(self) -> bool:
        """Whether the clock stands between two epochs."""
        return self.clock % self.steps_per_epoch == 0

    def steps(self, epoch: float) -> int:
        """A time in epochs as a number of steps."""
        return round(epoch * self.steps_per_epoch)

    def end_of_epoch(self) -> int:
        """The clock at the end of the current epoch."""
        return (self.clock // self.steps_per_epoch + 1) * self.steps_per_epoch

    def start_epoch(self) -> None:
        """Forgets what the epoch has added up."""
        self.epoch_images, self.epoch_seconds = 0, 0.0

    def start_mask(self) -> None:
        """Begins to count for a new mask."""
        self.evaluated, self.mask_since, self.lowest_loss = False, self.clock, math.inf

    def count_step(self, num_images: int, seconds: float) -> None:
        """Counts a step on so many images."""
        self.num_examples += num_images
        self.evaluated = False
        self.age += 1
        self.clock += 1
        self.count_seconds(seconds)

    def count_seconds(self, seconds: float) -> None:
        """Counts time that training took."""
        self.epoch_seconds += seconds
        self.seconds += seconds

    def take_over(self, other: "Progress") -> None:
        """Counts another training, of the same batch size, as done before this one. The clock stays."""
        self.age += other.age
        self.num_examples += other.num_examples
        self.seconds += other.seconds

    def state(self) -> dict[str, Any]:
        """All numbers, for a checkpoint."""
        return asdict(self)

    def load_state(self, state: dict[str, Any]) -> None:
        """Goes on from what `state` returned."""
        for field in fields(self):
            setattr(self, field.name, state[field.name])
