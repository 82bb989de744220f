"""Any folder of images that fits in memory: train/<class>/ and test/<class>/ (or val/<class>/)."""

from pathlib import Path
from typing import Literal

from pai_bench.core import Count, DataSettings, NonNegativeInt, Positive, ProperFraction
from pai_bench.data.decode import decoded
from pai_bench.data.listing import paired_class_folders
from pai_bench.data.resident import Flip, Resident, check_padding
from pai_bench.errors import DataError


def image_folder(
    place: DataSettings,
    *,
    root: str,
    size: Count | None,
    validation: ProperFraction,
    mean: list[float] | None,
    std: list[Positive] | None,
    padding: NonNegativeInt,
    flip: Flip,
    padding_mode: Literal["reflect"] | None,
) -> Resident:
    """Images in class folders, decoded once into `data_dir/cache`. The test split is test/ if that exists, else val/.

    Args:
        size: pixels of each side. Other images are resized and cropped around the centre. None: all have one size.
        mean, std: for each channel, of pixels in [0, 1]. None measures them on the training images.

    Raises:
        ConfigError: the padding is so large that a crop could miss the image.
        DataError: a folder is missing or empty, a file is no image, or the splits have different classes.
    """
    if size is not None:
        check_padding(padding, size, size)
    folder = Path(root).expanduser()
    test_folder = folder / "test" if (folder / "test").is_dir() else folder / "val"
    for part in (folder / "train", test_folder):
        if not part.is_dir():
            raise DataError(
                f"dataset.root={root}: there is no folder {part}; give the folder that holds train/ and test/"
            )
    # No listing is kept: it would not see a file that is written anew in its place, and the cache has its old pixels.
    num_classes, train, test = paired_class_folders(folder / "train", test_folder)
    images = decoded(folder.resolve().name, {"train": train, "test": test}, size, place.data_dir)
    return Resident(
        images["train"],
        images["test"],
        num_classes,
        place,
        validation=validation,
        mean=mean,
        std=std,
        padding=padding,
        padding_mode=padding_mode,
        flip=flip,
    )
