"""The digits that scikit-learn contains: 1,797 real images, no download."""

import importlib.util
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
from annotated_types import Ge, Le
from torch.nn import functional as F

from pai_bench.core import DataSettings, OfGrey, ProperFraction, StdOfGrey
from pai_bench.data.resident import Flip, Resident
from pai_bench.data.splits import hold_out
from pai_bench.errors import ConfigError, DataError

_TEST_FRACTION = 0.2


def digits(
    place: DataSettings,
    *,
    size: Annotated[int, Ge(8), Le(64)],
    validation: ProperFraction,
    mean: OfGrey,
    std: StdOfGrey,
    padding: Annotated[int, Ge(0), Le(7)],
    flip: Flip,
) -> Resident:
    """Handwritten digits in grey, resized from 8x8: 1,438 training and 359 test images, the same for any seed.

    Args:
        size: height and width of the images in pixels.

    Raises:
        ConfigError: scikit-learn is not installed.
        DataError: its file of digits is missing.

    Reference: scikit-learn, `sklearn.datasets.load_digits` (UCI optical recognition of handwritten digits, test part).
    """
    # Reads the file of the package: this takes 0.01 s, but importing scikit-learn takes 1 s.
    spec = importlib.util.find_spec("sklearn")
    if spec is None or spec.origin is None:
        raise ConfigError("dataset=digits needs scikit-learn; pip install scikit-learn")
    source = Path(spec.origin).parent / "datasets" / "data" / "digits.csv.gz"
    if not source.is_file():
        raise DataError(f"dataset=digits: {source} is missing; install scikit-learn again")
    table = torch.as_tensor(np.loadtxt(source, delimiter=",", dtype=np.float32))
    small, labels = table[:, :-1].view(-1, 1, 8, 8) * (255 / 16), table[:, -1].long()
    images = F.interpolate(small, size=size, mode="bilinear").round().byte().permute(0, 2, 3, 1).contiguous()
    train, test = ((images[part].numpy(), labels[part].numpy()) for part in hold_out(labels, _TEST_FRACTION))
    return Resident(train, test, 10, place, validation=validation, mean=mean, std=std, padding=padding, flip=flip)
