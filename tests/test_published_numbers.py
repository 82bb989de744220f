"""The numbers of papers in large tables: as they were released, and read from CSV files."""

from collections import Counter

import pytest
from published_runs import NUMBERS, of

from pai_bench.published import numbers
from pai_bench.published.numbers import Number

RENDA = [n for n in NUMBERS if n.table.paper == "renda2020"]
RESNET20, RESNET56 = ("resnet20_projected", "resnet56_projected")


def percent(number: Number, digits: int = 2) -> str:
    assert number.sd is not None
    return f"{100 * number.value:.{digits}f} ± {100 * number.sd:.{digits}f}"


# The data -------------------------------------------------------------------------------------------------------------


def test_every_paper_has_as_many_numbers_as_were_counted_in_its_source() -> None:
    found = Counter(n.table.paper for n in NUMBERS)
    with_recipe = Counter(n.table.paper for n in NUMBERS if n.table.recipe is not None)
    assert {paper: (found[paper], with_recipe[paper]) for paper in found} == {
        "acdc": (10, 0), "biprop": (5, 0), "edge_popup": (6, 0), "grasp": (210, 117), "itop": (7, 0),
        "jackpots": (18, 0), "jaxpruner": (27, 0), "ramanujan_on_pai": (106, 0), "renda2020": (5286, 1938),
        "rigl": (94, 68), "rigl_reproducibility": (9, 0), "smart_ratio": (63, 63), "snip": (5, 2),
        "state_of_sparsity": (42, 13), "str": (8, 0), "synflow": (1005, 828),
    }  # fmt: skip


# Networks, ways of retraining, lengths of it and densities of the released networks. New weights: in one round alone.
RETRAINED = {
    "ResNet-20, iterative pruning": 10 * (10 + 10 + 2),
    "ResNet-20, one-shot pruning": 10 * (10 + 10 + 2 + 1),
    "ResNet-56, iterative pruning": 17 * (10 + 10 + 2),
    "ResNet-56, one-shot pruning": 10 * (10 + 10 + 2 + 1),
    "ResNet-110, iterative pruning": 10 * (10 + 10 + 2),
    "ResNet-110, one-shot pruning": 10 * (10 + 10 + 2 + 1),
    "ResNet-50 on ImageNet, iterative pruning": 10 * (10 + 10 + 1),
    "ResNet-50 on ImageNet, one-shot pruning": 10 * (10 + 10 + 1 + 1),
    "Fine-tuning for longer": (3 * 10 + 10 + 17 + 10) * 8 + 2 * 10 * 9,
    "Weights rewound, the last learning rate kept": (3 * 10 + 10 + 17 + 10) * 10 + 10 * 10,
    "New weights trained for a part of the epochs": 4 * 10 * 9,
    "Whole filters pruned": 3 * 2 * 5 * 5 * 10,
}


def test_every_table_of_retrained_networks_is_whole() -> None:
    found = Counter(n.table.name for n in RENDA if n.density != 1)
    assert found == RETRAINED and sum(found.values()) == 5280
    assert all(n.num_runs == 3 and n.sd is not None and n.table.evidence == "V" for n in RENDA if n.density != 1)


EPOCH_12, EPOCH_32, EPOCH_52 = ({"schedule": "rewind", "schedule__rewind_epoch": epoch} for epoch in ("12", "32", "52"))
EPOCH_0 = {"schedule": "rewind", "schedule__rewind_epoch": "0"}
LR, FINE_TUNE = {"schedule": "lr_rewind", "schedule__rewind_epoch": "0"}, {"rounds": "iterative"}


@pytest.mark.parametrize(
    ("table", "settings", "printed"),
    [
        ("ResNet-56, iterative pruning", EPOCH_0, "92.95 ± .18, 92.11 ± .20, 90.90 ± .18, 89.45 ± .17, 87.18 ± .33"),
        ("ResNet-56, iterative pruning", EPOCH_12, "93.57 ± .19, 93.72 ± .02, 93.57 ± .08, 92.90 ± .12, 91.51 ± .19"),
        ("ResNet-56, iterative pruning", EPOCH_32, "93.72 ± .15, 93.81 ± .17, 93.57 ± .16, 93.10 ± .16, 91.94 ± .02"),
        ("ResNet-56, iterative pruning", EPOCH_52, "93.73 ± .28, 93.63 ± .32, 93.65 ± .10, 93.17 ± .05, 92.13 ± .26"),
        ("ResNet-56, iterative pruning", LR, "93.85 ± .19, 93.98 ± .07, 93.56 ± .11, 93.12 ± .22, 92.06 ± .09"),
        (
            "Fine-tuning for longer",
            {"model": RESNET56, "retraining_epochs": "50", **FINE_TUNE},
            "93.63 ± .15, 93.12 ± .07, 92.34 ± .25, 91.41 ± .26, 89.12 ± .31",
        ),
        (
            "Fine-tuning for longer",
            {"model": RESNET56, "retraining_epochs": "182", **FINE_TUNE},
            "93.50 ± .21, 92.91 ± .14, 91.92 ± .45, 90.96 ± .91, 89.61 ± .41",
        ),
    ],
)
def test_accuracies_and_spreads_of_resnet56_are_the_released_ones(
    table: str, settings: dict[str, str], printed: str
) -> None:
    found = [of(table, density, **settings) for density in (0.512, 0.2621, 0.1342, 0.0687, 0.0352)]
    assert all(len(some) == 1 for some in found)
    # Printed with two digits, some of them cut off.
    for (number,), cell in zip(found, printed.split(", "), strict=True):
        mean, spread = map(float, cell.split(" ± "))
        assert number.sd is not None
        assert [100 * number.value, 100 * number.sd] == pytest.approx([mean, spread], abs=0.0101)


@pytest.mark.parametrize(
    ("table", "settings", "densities", "printed"),
    [
        ("ResNet-20, iterative pruning", EPOCH_0, (0.512, 0.2621, 0.1342, 0.1074), "90.58/89.59/87.49/86.74"),
        ("ResNet-20, iterative pruning", EPOCH_12, (0.512, 0.2621, 0.1342, 0.1074), "91.94/91.67/91.31/90.96"),
        ("ResNet-20, iterative pruning", EPOCH_52, (0.512, 0.2621, 0.1342, 0.1074), "92.15/91.73/91.23/90.94"),
        ("ResNet-20, iterative pruning", LR, (0.512, 0.2621, 0.1342, 0.1074), "92.30/92.08/91.39/91.04"),
        ("ResNet-20, one-shot pruning", EPOCH_0 | {"ablation": ""}, (0.512, 0.1342, 0.1074), "90.71/87.64/87.13"),
        ("ResNet-20, one-shot pruning", LR, (0.512, 0.2621, 0.1342, 0.1074), "91.90/91.35/90.12/89.20"),
        (
            "ResNet-20, one-shot pruning",
            {"ablation": "reinit"},
            (0.512, 0.2621, 0.1342, 0.1074),
            "90.53/89.05/87.40/86.90",
        ),
        ("ResNet-50 on ImageNet, iterative pruning", EPOCH_0, (0.512, 0.2097, 0.1074), "74.91/71.54/68.38"),
        (
            "ResNet-50 on ImageNet, iterative pruning",
            {"schedule": "rewind", "schedule__rewind_epoch": "9"},
            (0.512, 0.2097, 0.1074),
            "76.29/76.10/75.35",
        ),
        ("ResNet-50 on ImageNet, iterative pruning", LR, (0.512, 0.2097, 0.1074), "76.67/76.27/75.51"),
        ("ResNet-50 on ImageNet, one-shot pruning", {"ablation": "reinit"}, (0.1074,), "69.97"),
    ],
)
def test_accuracies_of_other_networks_are_the_released_ones(
    table: str, settings: dict[str, str], densities: tuple[float, ...], printed: str
) -> None:
    found = [of(table, density, **settings) for density in densities]
    assert all(len(some) == 1 for some in found)
    assert [100 * some[0].value for some in found] == pytest.approx([*map(float, printed.split("/"))], abs=0.0101)


@pytest.mark.parametrize(
    ("table", "settings", "density", "cell"),
    [
        (
            "Whole filters pruned",
            {"model": "resnet110_projected", "filters": "structured_a", "retraining": "fine_tune"}
            | {"retraining_epochs": "10"},
            0.9574,
            "92.4125 ± 0.1625",
        ),
        (
            "Weights rewound, the last learning rate kept",
            {"model": RESNET56, "rounds": "iterative", "retraining_epochs": "182"},
            0.8,
            "82.4292 ± 1.2107",
        ),
        (
            "New weights trained for a part of the epochs",
            {"model": RESNET20, "retraining_epochs": "10"},
            0.8,
            "91.2500 ± 0.1090",
        ),
    ],
)
def test_cells_without_a_recipe_are_the_released_ones(
    table: str, settings: dict[str, str], density: float, cell: str
) -> None:
    (number,) = [n for n in of(table, **settings) if n.density == density]
    assert percent(number, 4) == cell


def test_levels_prune_a_fifth_each_and_one_shot_is_one_level() -> None:
    """Densities are printed with four digits."""
    for number in RENDA:
        levels = number.settings.get("schedule.levels")
        if levels is not None and "iterative" in number.table.name:
            assert abs(0.8 ** int(levels) - (number.density or 0)) < 5.1e-5
        elif levels is not None:
            assert levels == "1"


def test_lottery_tickets_on_imagenet_have_nine_seeds() -> None:
    table = "Lottery tickets and training from scratch"
    (ticket,) = of(table, 0.1, weights="original")
    assert (percent(ticket), ticket.num_runs) == ("67.38 ± 0.20", 9)
    (scratch,) = of(table, 0.1, weights="new", steps="twice")
    assert (percent(scratch), scratch.num_runs) == ("69.00 ± 0.13", 9)
    (fewer,) = of(table, 0.02, weights="original")
    assert (percent(fewer), fewer.num_runs) == ("51.28 ± 0.33", 3)
    (dense,) = of("Dense ResNet-50")
    assert (percent(dense), dense.num_runs) == ("76.69 ± 0.11", 3)
    found = {n.target: round(100 * n.value, 2) for n in of("Gradual magnitude pruning")}
    assert list(found.values()) == [76.53, 76.38, 75.58, 73.91, 70.59, 57.90]


def test_runs_at_chance_are_left_out_and_the_others_are_there() -> None:
    found = [n for n in NUMBERS if n.table.paper == "ramanujan_on_pai"]
    assert all(n.value > 0.4 and (n.sd or 0) < 0.05 and n.num_runs == 3 for n in found)
    cells = Counter((n.settings["dataset"], n.settings["model"], n.settings["pruner"]) for n in found)
    assert cells["cifar10", "vgg16", "grasp"] == 1 and ("cifar100", "vgg16", "grasp") not in cells
    assert cells["cifar10", "vgg16", "random"] == 10 and cells["cifar100", "vgg16", "random"] == 8
    (synflow,) = [
        n
        for n in found
        if {"cifar100", "vgg16", "synflow"} <= {*n.settings.values()} and n.density == pytest.approx(0.05)
    ]
    assert percent(synflow) == "73.13 ± 0.36"


def test_numbers_are_chosen_by_paper_network_and_target() -> None:
    chosen = numbers.choose(NUMBERS, ["renda2020", RESNET20, "density=0.512"])
    assert chosen and {n.target for n in chosen} == {"density=0.512"}
    # Ten lengths of four ways, in rounds and in one round, and of new weights in one.
    assert len(chosen) == 4 * 2 * 10 + 10
    assert len(numbers.choose(NUMBERS, ["renda2020", RESNET20, "iterative pruning", "density=0.512", "fine_tune"])) == 2
