"""What stands in for training where all rounds lie before it."""

from pai_bench.core import Mask, Watch


class NoTraining:
    """A core.Training for rounds that lie before training."""

    epoch = 0.0
    age_epochs = 0.0

    def until(self, mask: Mask, epoch: float, watch: Watch | None = None) -> None:
        """Refuses to train."""
        raise AssertionError("this schedule trains; give training=")

    def rewind(self, mask: Mask, epoch: float, weights: bool) -> None:
        """Refuses to rewind."""
        raise AssertionError("this schedule rewinds; give training=")
