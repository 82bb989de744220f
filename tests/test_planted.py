"""Planted tickets: a ticket computes its classes, a host contains it, and a score finds what it found before."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT, RunCli, composed, options, pruned_as
from torch import Generator, Tensor, nn

from pai_bench.analysis.planted import planted as found_in
from pai_bench.core import (
    DataSettings,
    Loss,
    Mask,
    Subnetwork,
)
from pai_bench.errors import ConfigError
from pai_bench.masks import masks
from pai_bench.models.circle_ticket import BORDERS, circle_ticket, class_lines
from pai_bench.runs import status
from pai_bench.system import seeding

CPU = torch.device("cpu")
PLACE = DataSettings(Path(), False, CPU, 0)
SHAPE = (2, 1, 1)

# depth, weights of the ticket, of hosts of width 50 and 100, accuracy on fresh data without noise: computed by the
# construction of the released code.
KNOWN = [
    (3, 100, 300, 600, 0.954),
    (4, 124, 2_800, 10_600, 0.986),
    (5, 108, 5_300, 20_600, 0.986),
    (6, 119, 7_800, 30_600, 0.982),
    (8, 135, 12_800, 50_600, 0.995),
    (10, 153, 17_800, 70_600, 0.999),
]


def host(depth: int, width: int, seed: int = 0) -> nn.Module:
    with seeding.seeded(seed, "init"):
        model: nn.Module = composed("model=planted", f"model.depth={depth}", f"model.width={width}").model(SHAPE, 4)
    return model


def place(model: nn.Module) -> Mask:
    """The mask of the ticket."""
    ticket: Any = model.ticket
    return {name: values != 0 for name, values in ticket.items()}


def plane(number: int = 20_000) -> tuple[Tensor, Tensor]:
    """Fresh points, and their classes without noise."""
    points = 2 * torch.rand(number, 2, generator=Generator().manual_seed(1), dtype=torch.float64) - 1
    return points, torch.bucketize(points.square().sum(1), torch.tensor(BORDERS, dtype=torch.float64))


def computed(depth: int, points: Tensor) -> Tensor:
    """The outputs of the ticket alone."""
    *inner, last = circle_ticket(depth)
    for layer in inner:
        points = (points @ layer.weight.T + layer.bias).relu()
    return points @ last.weight.T + last.bias


# The ticket -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("depth", "num_ticket", "num_narrow", "num_wide", "accuracy"), KNOWN)
def test_a_ticket_has_its_known_size_and_accuracy(
    depth: int, num_ticket: int, num_narrow: int, num_wide: int, accuracy: float
) -> None:
    points, classes = plane()
    assert (computed(depth, points).argmax(1) == classes).double().mean() == pytest.approx(accuracy, abs=0.01)
    for width, num_host in ((50, num_narrow), (100, num_wide)):
        mask = place(host(depth, width))
        assert (masks.kept(mask), masks.total(mask)) == (num_ticket, num_host)


@pytest.mark.parametrize("depth", [3, 4, 5, 6, 9])
def test_outputs_of_a_ticket_are_the_lines_of_its_classes_over_the_squared_norm(depth: int) -> None:
    """A chord of x^2 over an interval h lies at most h^2 / 4 above it."""
    points, _ = plane()
    squares = points.square().sum(1)
    points, squares = points[squares < BORDERS[-1]], squares[squares < BORDERS[-1]]
    slopes, offsets = class_lines()
    above = (computed(depth, points) - offsets) / slopes - squares[:, None]
    widest = {3: 2 / 9, 4: 1 / 9, 5: 1 / 9}.get(depth, 2**0.5 / 14)
    assert above.min() > -1e-9 and above.max() < 2 * widest**2 / 4 + 0.01
    assert torch.allclose(above, above[:, :1].expand_as(above), atol=1e-9)


def test_classes_meet_at_the_borders() -> None:
    slopes, offsets = class_lines()
    for border, (low, high) in zip(BORDERS, ((0, 1), (1, 2), (2, 3)), strict=True):
        values = slopes * border + offsets
        assert values[low] == pytest.approx(float(values[high])) == pytest.approx(float(values.max()))


# The host -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("depth", [3, 4, 5, 6, 10])
@pytest.mark.parametrize("width", [20, 50])
def test_under_its_mask_the_host_computes_the_ticket_whatever_the_other_biases(depth: int, width: int) -> None:
    points, _ = plane(2_000)
    expected = computed(depth, points)
    for seed in (0, 1):
        model = host(depth, width, seed)
        masks.apply_(model, place(model))
        with torch.no_grad():
            outputs = model(points.float().view(-1, *SHAPE)).double() / model.output_scale
        assert (outputs - expected).abs().max() < 1e-5 * expected.abs().max()
        assert (outputs.argmax(1) == expected.argmax(1)).double().mean() > 0.999  # float32 may differ on a border


def test_a_host_is_drawn_as_the_paper_says_but_for_its_ticket() -> None:
    model = host(5, 400)
    layers = [module for module in model.modules() if isinstance(module, nn.Linear)]
    std_of_bias = 1.0
    for layer, mask in zip(layers, place(model).values(), strict=True):
        std = (2 / layer.in_features) ** 0.5
        std_of_bias *= std
        assert layer.weight[~mask].std().item() == pytest.approx(std, rel=0.1)
        if layer is not layers[-1]:
            others = layer.bias[~mask.any(1)]
            assert others.std().item() == pytest.approx(std_of_bias, rel=0.15) and len(others) >= 380


def test_units_of_a_ticket_have_places_of_their_own_and_follow_the_seed() -> None:
    model = host(6, 20)
    units = [int(mask.any(1).sum()) for mask in place(model).values()]
    assert units == [4, 2, 3, 20, 4]
    first, again, other = place(host(6, 50)), place(host(6, 50)), place(host(6, 50, seed=1))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


def test_every_parameter_of_a_host_has_a_gradient() -> None:
    model = host(5, 100)
    model(torch.randn(8, *SHAPE)).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize(
    ("settings", "shape", "num_classes", "message"),
    [
        (
            [],
            (3, 32, 32),
            10,
            "no ticket for inputs of shape 3x32x32 and 10 outputs; give dataset=planted_",
        ),
        ([], SHAPE, 10, "model=planted: .* shape 2x1x1 and 10 outputs; give dataset=planted_circle"),
        (["model.width=19"], SHAPE, 4, "model.width=19: give 20 or more"),
        (["model.depth=2"], SHAPE, 4, "model.depth=2: give 3 or more"),
    ],
    ids=["images", "classes", "width", "depth"],
)
def test_a_host_without_room_for_its_ticket_is_refused(
    settings: list[str], shape: tuple[int, int, int], num_classes: int, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        composed("model=planted", *settings).model(shape, num_classes)


# Recall ---------------------------------------------------------------------------------------------------------------


def no_loss(logits: Tensor, labels: Tensor) -> Tensor:
    raise AssertionError("recall needs no loss")


def measured(model: nn.Module, mask: Mask) -> dict[str, float]:
    initial = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    loss: Loss = no_loss
    return found_in(Subnetwork(model, mask, initial, SHAPE), [], loss)


def test_recall_and_precision_are_those_of_the_mask() -> None:
    model = host(5, 50)
    truth = place(model)
    assert measured(model, truth) == {"planted/recall": 1.0, "planted/precision": 1.0}
    whole = measured(model, masks.full(model))
    assert whole == {"planted/recall": 1.0, "planted/precision": pytest.approx(108 / 5_300)}
    nothing_found = {name: ~mask for name, mask in truth.items()}
    assert measured(model, nothing_found) == {"planted/recall": 0.0, "planted/precision": 0.0}
    last = list(truth)[-1]
    without = truth | {last: torch.zeros_like(truth[last])}  # its 80 weights
    assert measured(model, without) == {"planted/recall": pytest.approx(28 / 108), "planted/precision": 1.0}


def test_recall_needs_a_planted_ticket_and_its_weights() -> None:
    model = host(5, 50)
    plain = nn.Sequential(nn.Flatten(), nn.Linear(2, 4))
    with pytest.raises(
        ConfigError, match="diagnostics=planted: no ticket is planted in this model; give model=planted"
    ):
        measured(plain, masks.full(plain))
    model.load_state_dict(host(5, 50, seed=1).state_dict())
    with pytest.raises(ConfigError, match=r"weights=FILE are not those of the planted ticket in layers\.1\.weight"):
        measured(model, masks.full(model))


# Every score ----------------------------------------------------------------------------------------------------------

# A pruner keeps 124 of 2,800 weights: how many in each layer, and how many of them are among the 4, 40 and 80 that were
# planted there. Random pruning finds 5.5 on average. A change of a score shows here.
FOUND = {
    "biased_loss": ((34, 60, 30), (4, 0, 8)),
    "fisher": ((27, 60, 37), (2, 0, 10)),
    "fisher_taylor2": ((12, 70, 42), (2, 0, 10)),
    "fisher_taylor2_official": ((16, 72, 36), (2, 0, 8)),
    "force": ((7, 85, 32), (0, 0, 4)),
    "force_official": ((7, 92, 25), (1, 0, 8)),
    "gradient_norm": ((0, 67, 57), (0, 0, 22)),
    "gradient_preservation": ((9, 77, 38), (1, 0, 11)),
    "grasp": ((42, 49, 33), (3, 2, 7)),
    "grasp_abs": ((41, 50, 33), (3, 1, 7)),
    "grasp_official": ((28, 38, 58), (1, 0, 19)),
    "iter_snip": ((11, 92, 21), (2, 0, 2)),
    "iter_snip_official": ((7, 92, 25), (1, 0, 8)),
    "lamp": ((32, 59, 33), (3, 0, 4)),
    "loss_preservation": ((16, 60, 48), (1, 0, 14)),
    "magnitude": ((65, 54, 5), (4, 0, 1)),
    "npb": ((31, 60, 33), (1, 0, 13)),
    "ntk_sap": ((32, 52, 40), (3, 3, 15)),
    "ntt": ((4, 111, 9), (0, 0, 1)),
    "ntt_official": ((4, 111, 9), (0, 0, 1)),
    "optimal_brain_damage": ((28, 75, 21), (2, 1, 1)),
    "phew": ((37, 47, 40), (1, 0, 12)),
    "prospr": ((12, 87, 25), (1, 0, 3)),
    "prospr_first_order": ((6, 82, 36), (0, 0, 12)),
    "prospr_official": ((19, 66, 39), (2, 0, 8)),
    "px": ((27, 69, 28), (3, 0, 0)),
    "px_official_2024": ((29, 71, 24), (2, 0, 0)),
    "px_squared": ((8, 80, 36), (0, 0, 1)),
    "random": ((1, 115, 8), (0, 3, 4)),
    "snip": ((16, 70, 38), (2, 0, 12)),
    "synflow": ((25, 65, 34), (2, 0, 4)),
    "synflow_l2": ((24, 67, 33), (2, 0, 5)),
    "synflow_l2_size": ((6, 74, 44), (0, 0, 6)),
    "taylor2": ((33, 63, 28), (2, 2, 5)),
    "taylor2_official": ((41, 60, 23), (4, 2, 4)),
}


def searched(name: str, *settings: str) -> tuple[nn.Module, Mask]:
    """The mask that a pruner finds before training, with the settings of its yaml, on a host of depth 4."""
    words = [f"pruner={name}", "dataset=planted_circle", "model=planted", f"sparsity={1 - 124 / 2_800}", *settings]
    model, data = host(4, 50), composed(*words).dataset(PLACE)

    def build() -> nn.Module:
        fresh: nn.Module = composed("model=planted", "model.depth=4", "model.width=50").model(SHAPE, 4)
        return fresh

    with seeding.seeded(0, "score"):
        pruned = pruned_as(model, SHAPE, *words, draw=data.draw, build=build)
    return model, pruned.mask


FILTERS = [name for name in options("pruner") if name.startswith("filter_")]


@pytest.mark.parametrize("name", sorted(set(options("pruner")) - {"dense", *FILTERS}))
def test_every_score_finds_what_it_found_before(name: str) -> None:
    model, mask = searched(name)
    kept = tuple(masks.count(kept) for kept in mask.values())
    found = tuple(masks.count(mask[key] & planted) for key, planted in place(model).items())
    assert (kept, found) == FOUND[name] and sum(kept) == 124


@pytest.mark.parametrize("name", FILTERS)
def test_pruners_of_filters_find_none_to_rank(name: str) -> None:
    with pytest.raises(ConfigError, match="PlantedNetwork has no filters that can be pruned"):
        searched(name, "schedule=linear", "schedule.rounds=1")


def test_the_python_on_the_page_makes_the_mask_of_the_ticket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "planted.md").read_text(), re.S)
    monkeypatch.chdir(tmp_path)
    exec(code, {})
    saved = torch.load("ticket.pt", weights_only=True)
    expected = place(host(5, 100))
    assert list(saved) == list(expected) and all(torch.equal(saved[name], expected[name]) for name in saved)


def test_a_run_with_the_mask_of_the_ticket_starts_as_accurate_as_the_ticket(run_cli: RunCli, tmp_path: Path) -> None:
    torch.save(place(host(4, 50, seed=3)), tmp_path / "ticket.pt")
    words = ["dataset=planted_circle", "model=planted", "model.depth=4", "model.width=50", "training=planted", "seed=3"]
    more = ["training.epochs=1", "diagnostics=planted", f"mask={tmp_path / 'ticket.pt'}", "tracker=none"]
    done = run_cli(*words, *more)
    assert done.returncode == 0, done.stderr
    (row,) = status.read(tmp_path / "results")
    assert (row["model"], row["num_kept"], row["num_effective"]) == ("planted-d4-w50", 124, 124)
    curve = (tmp_path / "results" / row["id"] / "curve.jsonl").read_text().splitlines()
    records = [record for record in map(json.loads, curve) if "test_top1" in record]
    assert [record["epoch"] for record in records] == [0, 1]
    for record in records:
        assert (record["planted/recall"], record["planted/precision"]) == (1, 1)
    assert records[0]["test_top1"] > 0.96


def test_the_table_on_the_page_has_the_densities_of_the_hosts() -> None:
    text = (ROOT / "docs" / "planted.md").read_text()
    rows = re.findall(r"^\| (\d+) \| (\d+) \| ([\d,]+) \| ([\d.]+) \| ([\d,]+) \| ([\d.]+) \|$", text, re.M)
    said = [tuple(int(cell.replace(",", "")) for cell in (row[0], row[1], row[2], row[4])) for row in rows]
    assert said == [known[:4] for known in KNOWN]
    for row in rows:
        num_ticket = int(row[1])
        for num_host, density in ((row[2], row[3]), (row[4], row[5])):
            num = int(num_host.replace(",", ""))
            assert masks.num_kept(1 - float(density), num) == num_ticket


def test_an_untrained_host_with_the_mask_of_its_ticket_needs_no_training() -> None:
    data = composed("dataset=planted_circle", "model=planted").dataset(PLACE)
    model = host(5, 100)
    ((images, labels),) = data.evaluation("test", 1_000)
    with torch.no_grad():
        before = (model(images).argmax(1) == labels).double().mean()
        masks.apply_(model, place(model))
        after = (model(images).argmax(1) == labels).double().mean()
    assert before < 0.6 and after > 0.96  # a hundredth of the labels is noise
