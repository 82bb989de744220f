"""Planted regressions: the data, the tickets, their hosts, and what scores find there."""

import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT, composed, drawn, options
from torch import Generator, Tensor, nn

from pai_bench.core import Data, DataSettings, Mask, ScoringData, TrainingLength
from pai_bench.errors import ConfigError
from pai_bench.masks import masks
from pai_bench.models.circle_ticket import Layer
from pai_bench.models.curve_tickets import helix_ticket, relu_ticket
from pai_bench.pruning.rounds import prune
from pai_bench.system import seeding
from pai_bench.training import objectives

CPU = torch.device("cpu")
PLACE = DataSettings(Path(), False, CPU, 0)
SHAPE = (1, 1, 1)
OUTPUTS = {"relu": 1, "helix": 3}
TASKS = sorted(OUTPUTS)


def dataset(task: str, *settings: str) -> Data:
    data: Data = composed(f"dataset=planted_{task}", "model=planted", *settings).dataset(PLACE)
    return data


def host(task: str, depth: int, width: int, seed: int = 0) -> nn.Module:
    with seeding.seeded(seed, "init"):
        config = composed("model=planted", f"model.depth={depth}", f"model.width={width}")
        model: nn.Module = config.model(SHAPE, OUTPUTS[task])
    return model


def place(model: nn.Module) -> Mask:
    """The mask of the ticket."""
    ticket: Any = model.ticket
    return {name: values != 0 for name, values in ticket.items()}


def wanted(task: str, x: Tensor) -> Tensor:
    """The function that a ticket computes: (N, 1) -> (N, K)."""
    if task == "relu":
        return torch.where(x > 0, x, torch.zeros_like(x))
    y = math.pi * (5 + 3 * x[:, 0])
    return torch.stack([y * torch.cos(y), y * torch.sin(y), y], 1) / (8 * math.pi)


def computed(layers: list[Layer], x: Tensor) -> Tensor:
    """The outputs of a ticket alone."""
    *inner, last = layers
    for layer in inner:
        x = (x @ layer.weight.T + layer.bias).relu()
    return x @ last.weight.T + last.bias


def line(number: int = 3_000) -> Tensor:
    return torch.linspace(-1, 1, number, dtype=torch.float64)[:, None]


# The data -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", TASKS)
def test_targets_are_the_function_and_normal_noise(task: str) -> None:
    data = dataset(task)
    assert data.num_examples == {"train": 9_000, "validation": 0, "test": 1_000}
    assert (data.input_shape, data.num_classes, data.regression) == (SHAPE, OUTPUTS[task], True)
    ((x, y),) = data.evaluation("train", 9_000)
    assert (x.dtype, y.dtype, x.shape, y.shape) == (
        torch.float32,
        torch.float32,
        (9_000, *SHAPE),
        (9_000, OUTPUTS[task]),
    )
    assert x.min() < -0.99 and x.max() > 0.99 and x.mean().abs() < 0.03
    noise = y - wanted(task, x.view(-1, 1))
    assert noise.std(0).tolist() == pytest.approx([0.01] * OUTPUTS[task], rel=0.05) and noise.mean(0).abs().max() < 1e-3
    assert y.abs().max() < 1.05


@pytest.mark.parametrize("task", TASKS)
def test_the_seed_of_the_data_decides_it(task: str) -> None:
    state = torch.get_rng_state()
    first, again, other = dataset(task), dataset(task), dataset(task, "dataset.seed=1")
    assert torch.equal(torch.get_rng_state(), state)
    assert first.checksum == again.checksum != other.checksum
    clean = dataset(task, "dataset.noise=0.0")
    ((x, y),), ((of_clean, without),) = first.evaluation("test", 1_000), clean.evaluation("test", 1_000)
    assert torch.equal(x, of_clean) and not torch.equal(y, without)
    assert torch.allclose(without, wanted(task, x.view(-1, 1)), atol=1e-5)


def test_targets_are_held_out_and_drawn_without_classes() -> None:
    data = dataset("helix", "dataset.num_examples=1000", "dataset.validation=0.2")
    assert data.num_examples == {"train": 720, "validation": 180, "test": 100}
    train, held = (
        {float(x) for images, _ in data.evaluation(split, 64) for x in images.flatten()}
        for split in ("train", "validation")
    )
    assert len(train) == 720 and not train & held

    def of(**settings: Any) -> tuple[Tensor, Tensor]:
        asked = {"per_class": None, "total": None, "batch_size": 100, "augment": False} | settings
        ((images, labels),) = data.draw(ScoringData(**asked), Generator().manual_seed(3), torch.float64)
        return images, labels

    images, labels = of(per_class=10)  # for each of three outputs
    assert images.shape == (30, *SHAPE) and labels.shape == (30, 3)
    assert {float(x) for x in images.flatten()} <= train and len(set(images.flatten().tolist())) == 30
    assert (labels - wanted("helix", images.view(-1, 1))).abs().max() < 0.06
    assert len(of(total=7)[0]) == 7 and torch.equal(of(total=30)[0], images)
    with pytest.raises(ConfigError, match=r"pruner.scoring_data.balanced=true: .* regression has no classes"):
        of(total=30, balanced=True)
    with pytest.raises(ConfigError, match=r"pruner.scoring_data.per_class=300: there are 720 training images"):
        of(per_class=300)


# The tickets and their hosts ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("depth", [3, 4, 5, 10])
def test_the_relu_ticket_is_exact_with_one_weight_a_layer(depth: int) -> None:
    layers = relu_ticket(depth)
    assert [int((layer.weight != 0).sum()) for layer in layers] == [1] * (depth - 1)
    assert torch.equal(computed(layers, line()), wanted("relu", line()))


@pytest.mark.parametrize("depth", [3, 4, 5, 10])
def test_the_helix_ticket_is_exact_at_its_knots_and_near_between(depth: int) -> None:
    """Between knots a chord of f over an interval h errs by at most max |f''| h^2 / 8."""
    layers = helix_ticket(depth)
    weights = [int((layer.weight != 0).sum()) for layer in layers]
    assert weights == [*[1] * (depth - 3), 38, 77] and sum(weights) == 115 + depth - 3
    knots = torch.linspace(-1, 1, 39, dtype=torch.float64)[:, None]
    assert torch.allclose(computed(layers, knots), wanted("helix", knots), atol=1e-9)
    errors = computed(layers, line()) - wanted("helix", line())
    assert errors[:, 2].abs().max() < 1e-9
    steepest = 9 * math.pi / 8 * (2 + 8 * math.pi)  # of the second derivative of y cos y / (8 pi) by t
    assert 0.01 < errors.abs().max() < steepest * (2 / 38) ** 2 / 8 < objectives.TOLERANCE


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("depth", [3, 4, 5, 10])
@pytest.mark.parametrize("width", [50, 100])
def test_under_its_mask_the_untrained_host_gives_the_targets(task: str, depth: int, width: int) -> None:
    expected = computed({"relu": relu_ticket, "helix": helix_ticket}[task](depth), line())
    for seed in (0, 1):
        model = host(task, depth, width, seed)
        mask = place(model)
        assert masks.kept(mask) == {"relu": depth - 1, "helix": 112 + depth}[task]
        assert masks.total(mask) == width + width**2 * (depth - 3) + OUTPUTS[task] * width
        masks.apply_(model, mask)
        with torch.no_grad():
            outputs = model(line().float().view(-1, *SHAPE)).double()
        assert model.output_scale == 1 and (outputs - expected).abs().max() < 5e-5


@pytest.mark.parametrize("task", TASKS)
def test_the_test_split_counts_the_ticket_as_right(task: str) -> None:
    model = host(task, 5, 100)
    ((x, y),) = dataset(task).evaluation("test", 1_000)
    with torch.no_grad():
        before = objectives.correct(model(x), y).double().mean()
        masks.apply_(model, place(model))
        after = objectives.correct(model(x), y).double().mean()
    assert before < 0.3 and after > 0.99


def test_a_host_is_drawn_as_for_the_circle_but_for_its_ticket() -> None:
    model = host("helix", 5, 300)
    layers = [module for module in model.modules() if isinstance(module, nn.Linear)]
    std_of_bias = 1.0
    for layer, mask in zip(layers, place(model).values(), strict=True):
        std = (2 / layer.in_features) ** 0.5
        std_of_bias *= std
        assert layer.weight[~mask].std().item() == pytest.approx(std, rel=0.1)
        if layer is not layers[-1]:
            assert layer.bias[~mask.any(1)].std().item() == pytest.approx(std_of_bias, rel=0.15)


@pytest.mark.parametrize("task", TASKS)
def test_every_layer_has_an_equal_share_in_the_scale(task: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from pai_bench.models import planted

    model = host(task, 5, 100)
    monkeypatch.setattr(planted, "_scale_up_", lambda *_: None)
    plain = host(task, 5, 100)
    shares = []
    for name, mask in place(model).items():
        ratio = model.get_parameter(name)[mask] / plain.get_parameter(name)[mask]
        shares += ratio.tolist()
        assert torch.equal(model.get_parameter(name)[~mask], plain.get_parameter(name)[~mask])
    assert min(shares) > 1 and shares == pytest.approx([shares[0]] * len(shares), rel=1e-5)


def test_the_table_on_the_page_has_the_densities_of_the_hosts() -> None:
    text = (ROOT / "docs" / "planted.md").read_text()
    rows = re.findall(r"^\| (ReLU|helix) \| (\d+) \| (\d+) \| ([\d,]+) \| ([\d.]+) \|$", text, re.M)
    assert [(row[0], row[1]) for row in rows] == [
        (task, depth) for task in ("ReLU", "helix") for depth in ("3", "5", "10")
    ]
    for task, depth, num_ticket, num_host, density in rows:
        mask = place(host(task.lower(), int(depth), 100))
        assert (f"{masks.kept(mask)}", f"{masks.total(mask):,}") == (num_ticket, num_host)
        assert masks.num_kept(1 - float(density), masks.total(mask)) == masks.kept(mask)


def test_a_host_too_narrow_for_the_helix_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"model\.width=37: the ticket of this dataset needs 38 units"):
        host("helix", 3, 37)
    host("helix", 3, 38)
    host("relu", 3, 20)


# Every score ----------------------------------------------------------------------------------------------------------

# A pruner keeps 117 of 5,200 weights: how many in each layer, and how many of them are among the 1, 1, 38 and 77 that
# were planted there. Random pruning finds 2.6 on average. A change of a score shows here.
FOUND = {
    "biased_loss": ((18, 34, 46, 19), (1, 1, 25, 8)),
    "fisher": ((8, 41, 43, 25), (1, 1, 23, 11)),
    "fisher_taylor2": ((8, 41, 43, 25), (1, 1, 20, 10)),
    "fisher_taylor2_official": ((8, 46, 39, 24), (1, 1, 19, 11)),
    "force": ((3, 54, 30, 30), (1, 1, 14, 18)),
    "gradient_norm": ((0, 55, 30, 32), (0, 1, 2, 12)),
    "gradient_preservation": ((7, 53, 37, 20), (1, 1, 16, 12)),
    "grasp": ((7, 65, 27, 18), (1, 0, 9, 8)),
    "grasp_abs": ((7, 55, 35, 20), (1, 1, 15, 12)),
    "iter_snip": ((5, 61, 26, 25), (1, 1, 12, 13)),
    "lamp": ((25, 58, 23, 11), (1, 1, 23, 11)),
    "loss_preservation": ((8, 44, 36, 29), (1, 1, 17, 11)),
    "magnitude": ((37, 23, 48, 9), (1, 1, 30, 9)),
    "npb": ((20, 39, 38, 20), (1, 0, 2, 13)),
    "ntk_sap": ((9, 18, 17, 73), (1, 0, 0, 41)),
    "ntt": ((1, 56, 56, 4), (0, 1, 31, 4)),
    "ntt_official": ((1, 56, 56, 4), (0, 1, 31, 4)),
    "optimal_brain_damage": ((15, 44, 36, 22), (0, 1, 14, 14)),
    "phew": ((26, 33, 32, 26), (1, 1, 1, 12)),
    "prospr": ((9, 43, 36, 29), (1, 1, 20, 13)),
    "prospr_first_order": ((0, 0, 93, 24), (0, 0, 0, 12)),
    "prospr_official": ((15, 48, 44, 10), (1, 1, 10, 7)),
    "px": ((4, 17, 45, 51), (1, 1, 32, 41)),
    "px_official_2024": ((6, 21, 41, 49), (1, 1, 31, 37)),
    "px_squared": ((1, 9, 35, 72), (1, 1, 27, 50)),
    "random": ((0, 58, 58, 1), (0, 0, 1, 0)),
    "snip": ((7, 44, 37, 29), (1, 1, 18, 11)),
    "synflow": ((12, 17, 31, 57), (1, 1, 31, 41)),
    "synflow_l2": ((3, 11, 41, 62), (1, 1, 33, 44)),
    "synflow_l2_size": ((1, 7, 34, 75), (1, 1, 29, 52)),
    "taylor2": ((17, 36, 40, 24), (1, 1, 22, 13)),
    "taylor2_official": ((17, 30, 43, 27), (1, 1, 23, 13)),
}

OF_CLASSES = {"force_official", "iter_snip_official", "grasp_official"}  # see test_regressions.py


def searched(name: str) -> tuple[nn.Module, Mask]:
    """The mask that a pruner finds before training, without a temperature, on a host of depth 5."""
    words = [f"pruner={name}", "dataset=planted_helix", "model=planted", f"sparsity={1 - 117 / 5_200}"]
    if "temperature" in composed(*words).pruner.score.settings:
        words.append("pruner.score.temperature=1")
    config, model = composed(*words), host("helix", 5, 50)

    def build() -> nn.Module:
        of = composed("model=planted", "model.depth=5", "model.width=50")
        fresh: nn.Module = of.model(SHAPE, OUTPUTS["helix"])
        return fresh

    with seeding.seeded(0, "score"):
        pruned = prune(
            model,
            config.pruner,
            config.allocation,
            config.schedule(config.sparsity, TrainingLength(1, 1)),
            initial=drawn(model),
            input_shape=SHAPE,
            draw=dataset("helix").draw,
            loss=objectives.loss,
            seed=0,
            build=build,
        )
    return model, pruned.mask


SCORES = sorted(name for name in options("pruner") if name != "dense" and not name.startswith("filter_"))


@pytest.mark.parametrize("name", sorted(set(SCORES) - OF_CLASSES))
def test_every_score_finds_what_it_found_before(name: str) -> None:
    model, mask = searched(name)
    kept = tuple(masks.count(kept) for kept in mask.values())
    found = tuple(masks.count(mask[key] & planted) for key, planted in place(model).items())
    assert (kept, found) == FOUND[name] and sum(kept) == 117
