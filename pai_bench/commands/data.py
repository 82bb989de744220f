"""Prepares a dataset for runs: fetches it or takes a local copy, checks it, and builds its decoded cache or store.

You may start it several times at once: one process works, the others wait.

  pai-bench data cifar10
  pai-bench data tiny_imagenet --from ~/Downloads/tiny-imagenet-200.zip
  pai-bench data cifar10 dataset.verify=false --from FOLDER  # a copy as images, in train/<class>/ and test/<class>/
  pai-bench data imagenet dataset.root=/data/imagenet dataset.store=256
"""

import argparse
import shutil
from pathlib import Path

import torch

from pai_bench import assembly
from pai_bench.data import archives, cifar, cifar_copy
from pai_bench.errors import ConfigError, DataError
from pai_bench.launch import compose, terminal


def take(source: Path, data_dir: Path, published: str | None) -> None:
    """Unpacks an archive into data_dir, or copies a folder there.

    Args:
        published: the published MD5 of the archive. None accepts any archive.

    Raises:
        DataError: there is no such file, it is a different or damaged one, or it would write outside data_dir.
    """
    source = source.expanduser()
    if not source.exists():
        raise DataError(f"--from {source}: there is no such file or folder")
    print(f"taking {source} into {data_dir}")
    if source.is_dir():
        shutil.copytree(source, data_dir / source.name, dirs_exist_ok=True)
        return
    if published is not None and (found := archives.md5(source)) != published:
        raise DataError(
            f"--from {source}: its MD5 is {found} and not the published {published}; fetch it again, or unpack it "
            "yourself and give the folder"
        )
    try:
        archives.unpack(source, data_dir)
    except (OSError, ValueError, shutil.ReadError) as error:
        raise DataError(f"--from {source}: it cannot be unpacked ({error})") from error


def take_images(source: Path, data_dir: Path, kind: cifar.Kind, verify: bool) -> None:
    """Makes the files of CIFAR of a folder of images.

    Raises:
        ConfigError: the published files are asked for.
        DataError: the folder does not hold the images of CIFAR.
    """
    if verify:
        raise ConfigError(
            f"--from {source}: images in folders are not the published files of CIFAR; give dataset.verify=false too, "
            "here and to the runs"
        )
    print(f"making the files of CIFAR in {data_dir} of the images in {source}")
    cifar_copy.write(source, data_dir, kind.files(), kind.num_classes)


def main() -> None:
    """Loads the dataset once, like a run, with downloads allowed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", help="an option of conf/dataset")
    parser.add_argument("settings", nargs="*", help="settings of the dataset, such as dataset.subset=true")
    parser.add_argument("--data-dir", type=Path, help="where datasets lie; as for runs, $PAI_DATA or data")
    parser.add_argument("--from", dest="source", type=Path, help="an archive or a folder to take the files from")
    arguments = parser.parse_intermixed_args()
    where = [f"data_dir={arguments.data_dir}"] if arguments.data_dir else []
    terminal.start_process()
    with terminal.one_line_errors():
        settings = [f"dataset={arguments.dataset}", *arguments.settings, *where]
        run = compose.compose(["tracker=none", *settings, "download=true"])
        if arguments.source is not None:
            published = archives.PUBLISHED_MD5.get(run.dataset.target.rpartition(".")[2])
            verify = run.dataset.settings.get("verify", True) and not run.dataset.settings.get("subset")
            data_dir, kind = Path(run.data_dir).expanduser(), cifar.KINDS.get(run.dataset.name)
            if kind is not None and cifar_copy.is_copy(arguments.source):
                take_images(arguments.source, data_dir, kind, verify)
            else:
                take(arguments.source, data_dir, published if verify else None)
        data = assembly.load_data(run, torch.device("cpu"))
        images = ", ".join(f"{number:,} {split}" for split, number in data.num_examples.items() if number)
        shape = "x".join(map(str, data.input_shape))
        labels = "targets" if data.regression else "classes"
        print(f"{run.dataset.name} is ready: {images} images of {shape} in {data.num_classes} {labels}")
        print(f"checksum {data.checksum}")
