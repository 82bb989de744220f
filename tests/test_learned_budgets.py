"""Layer densities that were learned elsewhere, and published: STR's of ResNet-50, without training."""

from pathlib import Path

import pytest
import torch
from conftest import composed
from torch import Generator

from pai_bench.analysis import cost
from pai_bench.masks import budgets, masks

# Percent pruned of each layer in order, by the percent pruned of the whole network (Kusupati et al. 2020,
# arXiv:2002.03231, budgets/STR_Budgets_ResNet50.csv in RAIVNLab/STR).
PRUNED = {
    81.27: (
        51.4, 73.24, 76.26, 74.65, 72.96, 79.58, 80.95, 80.11, 79.79, 81.53, 83.28, 73.96, 85.7, 83.55, 87.66, 85.79,
        82.75, 84.71, 85.34, 85.43, 84.21, 84.41, 84.03, 85.65, 77.98, 88.68, 83.22, 90.99, 87.35, 86.24, 86.79, 89.15,
        88.67, 86.9, 89.46, 87.97, 86.81, 88.4, 87.38, 85.76, 85.77, 86.67, 82.23, 79.61, 88, 80.48, 89.98, 84.02,
        85.23, 79.96, 77.93, 74.97, 70.38, 52.46,
    ),
    90.23: (
        59.8, 83.28, 89.48, 85.8, 83.34, 89.89, 90.6, 91.7, 88.07, 87.03, 90.99, 85.95, 93.91, 93.13, 94.96, 95.31,
        91.5, 93.66, 94.61, 94.86, 93.38, 93.26, 93.21, 94.14, 88.85, 96.14, 93.19, 97.2, 95.36, 95.06, 94.84, 96.77,
        95.59, 94.99, 96.08, 96.1, 94.94, 95.49, 95.66, 94.49, 95.09, 94.92, 93.14, 90.32, 95.66, 91.14, 96.79, 93.69,
        93.98, 90.48, 87.57, 84.37, 80.29, 64.5,
    ),
    98.05: (
        73.47, 94.51, 97.77, 97.03, 94.89, 98.9, 99.07, 98.76, 98.41, 98.27, 98.6, 98.22, 99.23, 98.95, 99.35, 99.53,
        98.24, 99.21, 99.35, 99.37, 99.15, 99.23, 99.06, 98.97, 98.04, 99.59, 99.03, 99.82, 99.67, 99.48, 99.36, 99.71,
        99.72, 99.56, 99.66, 99.73, 99.57, 99.59, 99.69, 99.52, 99.52, 99.58, 99.25, 98.6, 99.63, 99, 99.82, 99.36,
        99.34, 98.85, 97.97, 97.13, 96.72, 87.26,
    ),
}  # fmt: skip
MULTIPLY_ADDS = {81.27: 705e6, 90.23: 343e6, 98.05: 73e6}  # as published; 4,089 million in the dense network


@pytest.mark.parametrize("pruned", PRUNED)
def test_published_budgets_give_the_published_sparsity_and_multiply_adds(pruned: float, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = composed("dataset=imagenet", "model=resnet50", "training=imagenet", "sparsity=0.9").model(
        (3, 224, 224), 1000
    )
    everything = masks.full(model)
    # torchvision names a shortcut last in its block, and so does the published table.
    assert len(everything) == len(PRUNED[pruned])
    file = tmp_path / "densities.csv"
    lines = [f"{name},{1 - share / 100:.6f}" for name, share in zip(everything, PRUNED[pruned], strict=True)]
    file.write_text("\n".join(["name,density", *lines]))
    keep = masks.num_kept(pruned / 100, masks.total(everything))
    scores = {name: torch.rand(kept.shape) for name, kept in everything.items()}
    mask = budgets.densities_of_file(scores, everything, keep, Generator(), file=str(file)).mask
    assert masks.kept(mask) == keep
    for (name, kept), share in zip(mask.items(), PRUNED[pruned], strict=True):
        # The densities were rounded to hundredths of a percent, so one factor makes their sum exact.
        assert 100 * (1 - float(kept.double().mean())) == pytest.approx(share, abs=0.05), name
    left = cost.masked_multiply_adds(cost.multiply_adds(model, (3, 224, 224)), mask)
    assert left == pytest.approx(MULTIPLY_ADDS[pruned], rel=0.01)
