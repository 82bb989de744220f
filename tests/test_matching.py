"""Runs beside the numbers of large tables: each beside its own cell, and recipes composed where runs need them."""

from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from published_runs import NUMBERS, RECIPES, compared, of, written

from pai_bench.config import composition, identity
from pai_bench.config.schema import RunConfig, plain
from pai_bench.launch import compose
from pai_bench.published import matching
from pai_bench.published.matching import MISSING, NOT_COMPARABLE
from pai_bench.published.numbers import Number
from pai_bench.published.verdicts import REPRODUCED, Rule

RESNET20 = "resnet20_projected"
Write = Callable[..., list[dict[str, Any]]]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Writes finished runs of a number's recipe."""
    return partial(written, tmp_path)


REWOUND = of("ResNet-20, iterative pruning", 0.512, schedule="rewind", schedule__rewind_epoch="12")[0]


@pytest.mark.parametrize(
    "number",
    [
        REWOUND,
        of("ResNet-20, iterative pruning", 0.512, schedule="lr_rewind", schedule__rewind_epoch="12")[0],
        of("ResNet-20, iterative pruning", 0.512, schedule="fine_tune", schedule__epochs="30")[0],
        of("ResNet-20, one-shot pruning", 0.512, schedule="rewind", schedule__rewind_epoch="0", ablation="")[0],
        of("ResNet-20, one-shot pruning", 0.512, ablation="reinit")[0],
        of("Gradual magnitude pruning", 0.1)[0],
        of("Dense networks on CIFAR-10", model=RESNET20)[0],
    ],
    ids=lambda number: number.label,
)
def test_a_run_stands_beside_its_own_cell_alone(number: Number, write: Write, tmp_path: Path) -> None:
    rows = write(number, [number.value + 0.004 + shift for shift in (-0.001, 0, 0.001)])
    found = compared(rows, tmp_path, NUMBERS)
    (comparison,) = found.values()
    assert comparison.number is number and comparison.ours and comparison.ours.num == 3
    assert comparison.verdict and abs(comparison.verdict.difference) < 1e-9


def test_a_cell_is_judged_with_its_own_spread_and_number_of_runs(write: Write, tmp_path: Path) -> None:
    rows = write(REWOUND, [REWOUND.value + 0.004 + shift for shift in (-0.001, 0, 0.001, 0)])
    (comparison,) = compared(rows, tmp_path, NUMBERS).values()
    assert comparison.name == REPRODUCED and (REWOUND.num_runs, REWOUND.sd) == (3, pytest.approx(0.000904))


def test_another_recipe_is_named_and_another_cell_is_not(write: Write, tmp_path: Path) -> None:
    rows = write(REWOUND, [0.9], {"training.lr": 0.2})
    (comparison,) = compared(rows, tmp_path, NUMBERS).values()
    assert comparison.number is REWOUND and comparison.name == NOT_COMPARABLE
    assert comparison.reason == "training.lr=0.2, published 0.1"
    rows = write(REWOUND, [0.9], {"schedule.rewind_epoch": 18.0})  # in no cell of the table
    assert compared(rows, tmp_path, NUMBERS) == {}
    found = matching.compare([REWOUND], rows, tmp_path / "results", Rule())
    assert found[0].name == MISSING


def test_a_schedule_under_another_name_is_known_by_what_it_does(write: Write, tmp_path: Path) -> None:
    rows = write(REWOUND, [0.9], {"schedule.rewind_weights": False})
    found = {c.number.settings["schedule"]: c for c in compared(rows, tmp_path, NUMBERS).values()}
    assert found.keys() == {"rewind", "lr_rewind"} and found["lr_rewind"].ours
    assert found["rewind"].reason == "schedule.rewind_weights=False, published True"


def test_a_recipe_is_composed_once_and_only_where_there_are_runs(
    write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cells = [*of("ResNet-20, iterative pruning", schedule="rewind")[1:40:11], REWOUND]
    rows = [row for number in cells for row in write(number, [0.9])]
    composed: list[tuple[str, ...]] = []

    def counted(words: list[str]) -> RunConfig:
        composed.append(tuple(words))
        return original(words)

    original = compose.compose
    monkeypatch.setattr(compose, "compose", counted)
    monkeypatch.setattr(compose, "expand", lambda *_: pytest.fail("no experiment has such runs"))
    found = compared(rows, tmp_path, NUMBERS)
    assert len(found) == len(cells)
    # Weights and learning rate can go back to the same epoch, so both are composed.
    assert len(composed) == 2 and {f"model={RESNET20}"} == {w for words in composed for w in words if "model=" in w}


def test_every_run_of_the_experiment_has_its_number(tmp_path: Path) -> None:
    narrowed = [f"model={RESNET20}", "seed=0"]
    cfgs, _ = compose.expand(["experiment=rewinding_or_fine_tuning", *narrowed])
    rows = []
    for cfg in cfgs:
        directory = tmp_path / "results" / cfg.id
        directory.mkdir(parents=True)
        (directory / "config.yaml").write_text(composition.rerunnable(cfg))
        of_network = {key: getattr(cfg, key).name for key in ("dataset", "model", "pruner", "ablation")}
        row = {"id": cfg.id, "group": cfg.group, "seed": 0, "target_sparsity": cfg.sparsity, "test_top1": 0.9}
        rows.append(of_network | row | {"search_train_examples": 1, "dataset_checksum": "0123abcd", "num_classes": 10})
    found = matching.compare(NUMBERS, rows, tmp_path / "results", Rule())
    beside = Counter(group for c in found if c.ours for group in c.groups)
    assert len(cfgs) == 45 and beside == {cfg.group: 1 for cfg in cfgs}
    assert not [c for c in found if c.name == NOT_COMPARABLE]


def test_settings_that_are_shared_are_those_of_each_cell() -> None:
    """What is compared without composing gives the config that composing gives."""
    for number in (REWOUND, of("ResNet-50 on ImageNet, one-shot pruning", 0.512, schedule="fine_tune")[0]):
        shared, own = plain(RECIPES.with_any_values(number)), plain(RECIPES.of(number))
        different = set(identity.differences(shared, own, ("sparsity",)))
        assert different <= set(matching.values(number))
    assert matching.values(REWOUND) == {"schedule.rewind_epoch": 12.0, "schedule.levels": 3.0}
