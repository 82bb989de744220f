"""The pictures of docs/how-sparse.md: `python docs/pictures/how_sparse.py` does the runs and draws them.

It makes some 130 runs of small networks on digits. They take some minutes on one core, and finished runs are not done
again. They lie in results/how-sparse, or in the folder that is given.
"""

import json
import sys
from collections.abc import Sequence
from math import nan
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import matplotlib
from safetensors.torch import load_file

from pai_bench import experiment
from pai_bench.core import Mask
from pai_bench.launch.compose import compose

FOLDER = Path(__file__).parent
METHODS = {"random": "Random", "magnitude": "Magnitude", "snip": "SNIP", "synflow": "SynFlow"}
COLOURS = dict(zip(METHODS, ("#E69F00", "#0072B2", "#009E73", "#D55E00"), strict=True))
MARKERS = dict(zip(METHODS, "s^oD", strict=True))
SMALL = ("model=lenet300", "model.hidden=[64,64]")  # its second layer is a square of 64 x 64 weights
DEEP = ("model=resnet20",)
SEEDS = (0, 1, 2)
ACCURACY = (2, 5, 10, 20, 50, 100, 200)  # compressions
COLLAPSE = (2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000)
UNTRAINED = ("training.epochs=0", "training.warmup_epochs=0", "save_model=false")


def run(results: Path, *words: str) -> tuple[dict[str, Any], Mask, list[dict[str, Any]]]:
    """The row, the mask and the layers of a run."""
    config = compose([*words, "tracker=none", "device=cpu", f"results_dir={results}"])
    row = experiment.run(config)
    mask = load_file(config.directory / "mask.safetensors")
    return row, mask, json.loads((config.directory / "mask.json").read_text())["layers"]


def draw_masks(plt: Any, results: Path) -> None:
    """The 64 x 64 weights of one layer, after 98 % of the whole network were pruned."""
    figure, panels = plt.subplots(1, 4, figsize=(8.6, 2.7), layout="constrained")
    for panel, (pruner, label) in zip(panels, METHODS.items(), strict=True):
        _, mask, _ = run(results, *SMALL, *UNTRAINED, f"pruner={pruner}", "sparsity=0.98")
        square = mask["layers.3.weight"]
        panel.imshow(square, cmap="binary", vmin=0, vmax=1, interpolation="nearest")
        panel.set(title=f"{label}: {int(square.sum())} of 4,096", xticks=[], yticks=[])
    panels[0].set(xlabel="64 inputs", ylabel="64 units")
    save(figure, "masks")


def draw_layers(plt: Any, results: Path) -> None:
    """The density of each layer of a ResNet-20 at 98 %."""
    figure, panel = plt.subplots(figsize=(8.6, 3.4), layout="constrained")
    for pruner, label in METHODS.items():
        _, _, layers = run(results, *DEEP, *UNTRAINED, f"pruner={pruner}", "sparsity=0.98")
        densities = [100 * layer["density"] or nan for layer in layers]
        numbers = range(1, len(layers) + 1)
        panel.plot(numbers, densities, color=COLOURS[pruner], marker=MARKERS[pruner], ms=4, lw=1, label=label)
        for number, layer in zip(numbers, layers, strict=True):
            if not layer["kept"]:
                panel.annotate(
                    f"{label}: empty", (number, 0.1), color=COLOURS[pruner], rotation=90, ha="center", fontsize=8
                )
    panel.axhline(2, color="grey", lw=0.8, ls="--")
    panel.annotate("2 % everywhere", (1, 2), xytext=(0, 3), textcoords="offset points", color="grey", fontsize=8)
    panel.set(xlabel="layer, from the image to the classes", ylabel="weights kept, %", yscale="log")
    panel.set_yticks([0.1, 1, 10, 100], ["0.1", "1", "10", "100"])
    panel.set_xticks(range(1, 23, 3))
    panel.legend(frameon=False, ncols=4)
    save(figure, "layers")


def draw_collapse(plt: Any, results: Path) -> None:
    """How many of the layers of a ResNet-20 keep no weight."""
    figure, panel = plt.subplots(figsize=(6.2, 3.4), layout="constrained")
    for pruner, label in METHODS.items():
        empty = []
        for compression in COLLAPSE:
            row, _, _ = run(results, *DEEP, *UNTRAINED, f"pruner={pruner}", f"compression={compression}")
            empty.append(len(row["collapsed_layers"]))
        panel.plot(COLLAPSE, empty, color=COLOURS[pruner], marker=MARKERS[pruner], ms=4, lw=1, label=label)
    panel.set(xscale="log", xlabel="compression", ylabel="layers without a weight, of 22")
    panel.set_yticks(range(0, 23, 2))
    panel.set_xticks(COLLAPSE, [f"{compression}x" for compression in COLLAPSE], fontsize=7)
    panel.minorticks_off()
    panel.legend(frameon=False)
    save(figure, "collapse")


def draw_accuracy(plt: Any, results: Path) -> None:
    """Test accuracy of the small perceptron, mean and deviation of three seeds."""
    figure, panel = plt.subplots(figsize=(6.2, 3.4), layout="constrained")
    dense = 100 * mean(run(results, *SMALL, f"seed={seed}")[0]["test_top1"] for seed in SEEDS)
    panel.axhline(dense, color="grey", lw=0.8, ls="--")
    panel.annotate(
        "dense", (ACCURACY[-1], dense), xytext=(-14, 3), textcoords="offset points", color="grey", fontsize=8
    )
    for pruner, label in METHODS.items():
        found = [accuracies(results, pruner, compression) for compression in ACCURACY]
        means, spreads = [100 * mean(values) for values in found], [100 * stdev(values) for values in found]
        panel.errorbar(
            ACCURACY, means, spreads, color=COLOURS[pruner], marker=MARKERS[pruner], ms=4, lw=1, capsize=2, label=label
        )
    panel.set(xscale="log", xlabel="compression", ylabel="test accuracy, %")
    panel.set_xticks(ACCURACY, [f"{compression}x" for compression in ACCURACY])
    panel.minorticks_off()
    panel.legend(frameon=False)
    save(figure, "accuracy")


def accuracies(results: Path, pruner: str, compression: int) -> Sequence[float]:
    """The test accuracy of each seed."""
    rows = (run(results, *SMALL, f"pruner={pruner}", f"compression={compression}", f"seed={seed}") for seed in SEEDS)
    return [row["test_top1"] for row, _, _ in rows]


def save(figure: Any, name: str) -> None:
    """Writes a picture of less than 100 kB."""
    for panel in figure.axes:
        panel.spines[["top", "right"]].set_visible(False)
    figure.savefig(FOLDER / f"how-sparse-{name}.png", dpi=120, metadata={"Software": None})


def main() -> None:
    """Draws all pictures."""
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update({"font.size": 9, "axes.titlesize": 9, "figure.facecolor": "white"})
    results = Path(sys.argv[1] if len(sys.argv) > 1 else "results/how-sparse")
    for draw in (draw_masks, draw_layers, draw_accuracy, draw_collapse):
        draw(plt, results)


if __name__ == "__main__":
    main()
