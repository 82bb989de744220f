"""Layer densities from sizes alone and from files: exact counts, and what must hold of each by its formula."""

import itertools
from pathlib import Path

import pytest
import torch
from conftest import composed
from torch import Generator

from pai_bench.errors import ConfigError
from pai_bench.masks import allocation, budgets, masks

GENERATOR = Generator()
SHAPES = [(8, 3, 3, 3), (16, 8, 3, 3), (32, 16, 3, 3), (10, 32)]


def candidates(shapes: list[tuple[int, ...]] = SHAPES) -> masks.Mask:
    return {f"layer{i}.weight": torch.ones(shape, dtype=torch.bool) for i, shape in enumerate(shapes)}


def counts(allocate: object, keep: int, everything: masks.Mask | None = None, **settings: object) -> list[int]:
    everything = everything or candidates()
    scores = {name: torch.rand(mask.shape, generator=Generator().manual_seed(0)) for name, mask in everything.items()}
    chosen = allocate(scores, everything, keep, GENERATOR, **settings)  # type: ignore[operator]
    found = [int(mask.sum()) for mask in chosen.mask.values()]
    assert sum(found) == keep
    return found


SIZES = [mask.numel() for mask in candidates().values()]
TOTAL = sum(SIZES)


@pytest.mark.parametrize("keep", [0, 1, 40, 600, 3000, TOTAL - 1, TOTAL])
@pytest.mark.parametrize("allocate", [budgets.igq, budgets.balanced, budgets.pyramid])
def test_counts_are_exact_and_fit(allocate: object, keep: int) -> None:
    found = counts(allocate, keep)
    assert all(0 <= number <= size for number, size in zip(found, SIZES, strict=True))


def test_igq_balances_one_force() -> None:
    """1 / d - 1 = f n: the same force for every layer."""
    found = counts(budgets.igq, 3000)
    forces = [(size / number - 1) / size for number, size in zip(found, SIZES, strict=True)]
    assert max(forces) == pytest.approx(min(forces), rel=0.02)
    densities = [number / size for number, size in zip(found, SIZES, strict=True)]
    assert sorted(densities, reverse=True) == [densities[i] for i in sorted(range(4), key=SIZES.__getitem__)]


def test_igq_keeps_equal_counts_where_little_is_kept() -> None:
    found = counts(budgets.igq, 40)
    assert max(found) - min(found) <= 2
    assert counts(budgets.igq, 4_000, candidates([(1000, 1000), (500, 500)])) == pytest.approx([2_000, 2_000], rel=0.01)


def test_balanced_keeps_equal_counts_and_redistributes() -> None:
    assert counts(budgets.balanced, 400) == [100, 100, 100, 100]
    assert counts(budgets.balanced, 1200) == [216, 332, 332, 320]  # the first and the last are full


def test_pyramid_is_a_geometric_sequence() -> None:
    found = counts(budgets.pyramid, 2000)
    densities = [number / size for number, size in zip(found, SIZES, strict=True)]
    ratios = [densities[0], *(deep / shallow for shallow, deep in itertools.pairwise(densities))]
    assert max(ratios) == pytest.approx(min(ratios), rel=0.02)


def test_erk_plus_gives_the_last_layer_its_own_density() -> None:
    found = counts(budgets.erk_plus, 2000, last=1.0)
    assert found[-1] == SIZES[-1]
    shares = [sum(shape) / size for shape, size in zip(SHAPES, SIZES, strict=True)]
    rest = [number / size / share for number, size, share in zip(found[1:3], SIZES[1:3], shares[1:3], strict=True)]
    assert rest[0] == pytest.approx(rest[1], rel=0.01)  # the first layer is full at this sparsity
    with pytest.raises(ConfigError, match=r"keeps 100 weights, and layer3.weight alone 320"):
        counts(budgets.erk_plus, 100, last=1.0)


def test_layers_of_a_fixed_density_share_what_the_others_have_no_room_for() -> None:
    """In the early rounds of a search."""
    total = sum(SIZES)
    found = counts(budgets.erk_plus, total - 40, last=0.1)
    assert found[:-1] == list(SIZES[:-1]) and found[-1] == SIZES[-1] - 40
    shares = {f"layer{number}": 1.0 for number in range(3)} | {"layer1": 0.3, "layer2": 0.1}
    mask = {name: torch.ones(10, 10, dtype=torch.bool) for name in shares}
    drawn = {name: torch.rand(10, 10) for name in shares}
    kept = allocation.by_density(drawn, mask, 220, shares, fixed=("layer1", "layer2")).mask
    # 80 are left for rooms of 70 and 90.
    assert [int(one.sum()) for one in kept.values()] == [100, 65, 55]


def test_a_layer_of_density_zero_gets_what_no_other_has_room_for(tmp_path: Path) -> None:
    file = tmp_path / "densities.csv"
    file.write_text("name,density\nlayer0.weight,0\nlayer1.weight,0.5\nlayer2.weight,0.5\nlayer3.weight,0.1\n")
    assert counts(budgets.densities_of_file, 1000, file=str(file))[0] == 0
    keep = sum(SIZES[1:]) + 16
    assert counts(budgets.densities_of_file, keep, file=str(file)) == [16, *SIZES[1:]]


def test_densities_come_from_a_file(tmp_path: Path) -> None:
    file = tmp_path / "densities.csv"
    file.write_text("name,density\nlayer0.weight,1\nlayer1.weight,0.5\nlayer2.weight,0.25\nlayer3.weight,0.1\n")
    wanted = [216, 576, 1152, 32]
    assert counts(budgets.densities_of_file, sum(wanted), file=str(file)) == wanted
    scaled = counts(budgets.densities_of_file, 1000, file=str(file))
    assert scaled == pytest.approx([number * 1000 / sum(wanted) for number in wanted], abs=1)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("name,density\nlayer0.weight,1\n", "it has no row for layer1.weight"),
        ("name,sparsity\nlayer0.weight,1\n", "it needs the columns name and density"),
        ("name,density\nlayer0.weight,much\n", "it needs the columns name and density"),
        ("name,density\n" + "".join(f"layer{i}.weight,2\n" for i in range(4)), "the density of layer0.weight is 2"),
        ("name,density\n" + "".join(f"layer{i}.weight,0\n" for i in range(4)), "all densities are 0"),
        (None, "it cannot be read"),
    ],
)
def test_a_file_that_does_not_fit_is_refused(text: str | None, said: str, tmp_path: Path) -> None:
    file = tmp_path / "densities.csv"
    if text is not None:
        file.write_text(text)
    with pytest.raises(ConfigError, match=rf"^allocation.file=.*: {said}"):
        counts(budgets.densities_of_file, 1000, file=str(file))


# Percent pruned of the layers of ResNet-50 under ERK at 90 %, as STR publishes them (Kusupati et al. 2020,
# arXiv:2002.03231, SparsityDistributions_90_ResNet50.csv), rounded there to whole numbers; by the sizes of a layer.
ERK_OF_RESNET50 = {
    (64, 3, 7, 7): 58, (64, 64, 1, 1): 0, (64, 64, 3, 3): 82, (256, 64, 1, 1): 4, (64, 256, 1, 1): 4,
    (128, 256, 1, 1): 43, (128, 128, 3, 3): 91, (512, 128, 1, 1): 52, (512, 256, 1, 1): 71, (128, 512, 1, 1): 52,
    (256, 512, 1, 1): 71, (256, 256, 3, 3): 96, (1024, 256, 1, 1): 76, (1024, 512, 1, 1): 86, (256, 1024, 1, 1): 76,
    (512, 1024, 1, 1): 86, (512, 512, 3, 3): 98, (2048, 512, 1, 1): 88, (2048, 1024, 1, 1): 93, (512, 2048, 1, 1): 88,
    (1000, 2048): 93,
}  # fmt: skip


def test_erk_gives_the_published_densities_of_resnet50() -> None:
    blocks = [(64, 64, 256, 3), (256, 128, 512, 4), (512, 256, 1024, 6), (1024, 512, 2048, 3)]
    shapes: list[tuple[int, ...]] = [(64, 3, 7, 7)]
    for num_in, width, num_out, number in blocks:
        shapes += [(width, num_in, 1, 1), (width, width, 3, 3), (num_out, width, 1, 1), (num_out, num_in, 1, 1)]
        shapes += [(width, num_out, 1, 1), (width, width, 3, 3), (num_out, width, 1, 1)] * (number - 1)
    everything = candidates([*shapes, (1000, 2048)])
    assert masks.total(everything) == 25_502_912
    keep = masks.num_kept(0.9, masks.total(everything))
    chosen = allocation.erk(dict(everything), everything, keep, GENERATOR, kernel=True)  # all scores tie
    for mask in chosen.mask.values():
        assert 100 * (1 - float(mask.float().mean())) == pytest.approx(ERK_OF_RESNET50[tuple(mask.shape)], abs=0.51)


def test_they_are_options() -> None:
    for name in ("igq", "balanced", "pyramid", "erk_plus"):
        assert composed("pruner=random", "sparsity=0.9", f"allocation={name}").allocation.name == name
