"""Labels that are the targets of a regression: their loss, what counts as right, whole runs, and what is refused."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import RunCli, composed, pruned_as
from test_train import trainer
from torch import Tensor, nn
from torch.nn import functional as F

from pai_bench.assembly import assembled
from pai_bench.core import Data, DataSettings
from pai_bench.errors import ConfigError, UserError
from pai_bench.masks import masks
from pai_bench.runs import status
from pai_bench.system import seeding
from pai_bench.training import objectives
from pai_bench.training.evaluation import evaluate
from pai_bench.training.step import Execution, Step

CPU = torch.device("cpu")
WORDS = ("dataset=planted_helix", "model=planted", "model.depth=3", "model.width=40", "training=planted")


def batch(number: int = 12, outputs: int = 6) -> tuple[Tensor, Tensor, Tensor]:
    """Outputs, targets and classes."""
    generator = torch.Generator().manual_seed(0)
    values, targets = torch.randn(2, number, outputs, generator=generator)
    return values, targets, torch.randint(outputs, (number,), generator=generator)


def few_points(*settings: str) -> Data:
    words = (*WORDS, "dataset.num_examples=220", *settings)
    data: Data = composed(*words).dataset(DataSettings(Path(), False, CPU, 0))
    return data


def network(seed: int = 0) -> nn.Module:
    with seeding.seeded(seed, "init"):
        model: nn.Module = composed(*WORDS).model((1, 1, 1), 3)
    return model


# Losses and hits ------------------------------------------------------------------------------------------------------


def test_classes_have_their_cross_entropy_to_the_bit() -> None:
    outputs, _, classes = batch()
    assert torch.equal(objectives.loss(outputs, classes), F.cross_entropy(outputs, classes))
    assert torch.equal(
        objectives.loss(outputs, classes, label_smoothing=0.1), F.cross_entropy(outputs, classes, label_smoothing=0.1)
    )
    assert torch.equal(
        objectives.loss(outputs, classes, reduction="sum"), F.cross_entropy(outputs, classes, reduction="sum")
    )
    assert torch.equal(objectives.correct(outputs, classes), outputs.argmax(1) == classes)
    order = outputs.argsort(1, descending=True)[:, :5]
    assert torch.equal(objectives.among_best(outputs, classes), order == classes[:, None])


def test_targets_have_the_mean_squared_error_of_their_outputs() -> None:
    outputs, targets, _ = batch()
    expected = ((outputs - targets) ** 2).sum() / targets.numel()
    assert torch.allclose(objectives.loss(outputs, targets), expected)
    assert torch.allclose(objectives.loss(outputs, targets, reduction="sum"), expected * len(targets))
    in_double = objectives.loss(outputs.double(), targets)
    assert in_double.dtype == torch.float64 and torch.allclose(in_double, expected.double())
    in_half = objectives.loss(targets.bfloat16(), targets)  # targets keep their precision
    assert 0 < in_half < 1e-4 and in_half.dtype == torch.float32


def test_a_prediction_is_right_where_every_output_is_near_its_target() -> None:
    targets = torch.zeros(5, 2)
    outputs = torch.tensor([[0.049, -0.049], [0.0, 0.051], [-0.051, 0.0], [0.0, 0.0], [0.0, float("nan")]])
    expected = torch.tensor([True, False, False, True, False])
    assert torch.equal(objectives.correct(outputs, targets), expected)
    assert torch.equal(objectives.among_best(outputs, targets), expected[:, None])


# Training and evaluation ----------------------------------------------------------------------------------------------


def test_an_evaluation_says_which_share_of_the_targets_is_met() -> None:
    data, model = few_points(), network()
    ((x, y),) = data.evaluation("train", 1_000)
    with torch.no_grad():
        for share, wrong in ((1.0, 0), (0.5, 99)):
            moved = y.clone()
            moved[:wrong, 2] += 0.06
            of_moved = iter([moved[:100], moved[100:]])
            found = evaluate(lambda _, parts=of_moved: next(parts), data.evaluation("train", 100), CPU)
            assert (found.top1, found.top5, found.num_not_finite) == (share, share, 0)
            assert found.loss == pytest.approx(wrong * 0.06**2 / 3 / 198, rel=1e-4)
        found = evaluate(model, data.evaluation("train", 64), CPU)
        assert found.loss == pytest.approx(F.mse_loss(model(x), y).item(), rel=1e-5)


def test_a_step_on_targets_is_that_of_torch() -> None:
    data, recipe = few_points(), composed(*WORDS).training
    ours, theirs = network(), network()
    step = Step(ours, recipe, Execution(CPU, channels_last=False, compile_model=False))
    adam = torch.optim.Adam(theirs.parameters(), lr=recipe.lr)
    losses = []
    for x, y in list(data.evaluation("train", 32))[:5]:
        step(x, y, len(y))
        adam.zero_grad()
        value = F.mse_loss(theirs(x), y)
        value.backward()
        adam.step()
        losses.append(value.item() * len(y))
    for one, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    assert float(step.sums[0]) == pytest.approx(sum(losses), rel=1e-4)


def test_an_interrupted_training_on_targets_ends_as_an_uninterrupted_one() -> None:
    recipe, data = replace(composed(*WORDS).training, epochs=2), few_points("dataset.validation=0.1")
    records: list[dict[str, float]] = []
    models = [network() for _ in range(3)]
    mask = masks.full(models[0])
    trainer(models[0], recipe, data, record=lambda metrics, epoch: records.append(metrics)).finish(mask, 2)
    first = trainer(models[1], recipe, data)
    first.until(mask, 1)
    second = trainer(models[2], recipe, data)
    second.load_state(first.state(), mask)
    second.finish(mask, 2)
    assert all(map(torch.equal, models[0].parameters(), models[2].parameters()))
    assert [set(records[0]) >= {"test_top1", "validation_top1"}, len(records)] == [True, 3]
    assert records[-1]["train_loss"] < records[1]["train_loss"]
    assert all(record["test_top1"] == record["test_top5"] for record in records)


# Whole runs -----------------------------------------------------------------------------------------------------------


def test_a_run_of_a_regression_has_a_row_like_others(run_cli: RunCli, tmp_path: Path) -> None:
    model: Any = network()
    torch.save({name: values != 0 for name, values in model.ticket.items()}, tmp_path / "ticket.pt")
    done = run_cli(
        *WORDS, "dataset.num_examples=2000", "dataset.validation=0.1", "training.epochs=1", "tracker=none",
        "diagnostics=planted", f"mask={tmp_path / 'ticket.pt'}",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "1,620 train, 180 validation, 200 test images of 1x1x1 in 3 targets" in done.stdout + done.stderr
    (row,) = status.read(tmp_path / "results")
    assert (row["regression"], row["num_classes"], row["num_kept"], row["num_effective"]) == (True, 3, 115, 115)
    assert row["test_top1"] == row["test_top5"] and row["validation_top1"] is not None
    curve = (tmp_path / "results" / row["id"] / "curve.jsonl").read_text().splitlines()
    before = next(record for record in map(json.loads, curve) if "test_top1" in record)
    assert before["test_top1"] > 0.98 and before["test_loss"] < 0.001 and before["planted/recall"] == 1
    assert row["untrained_test_top1"] == before["test_top1"]
    assert row["measured"] == {"planted/recall": 1, "planted/precision": 1}


# What is for classes alone --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["training.label_smoothing=0.1"], "training.label_smoothing=0.1: dataset=planted_helix is a regression.*0.0"),
        (["training.temperature=2"], "training.temperature=2: dataset=planted_helix is a regression.*; give 1.0"),
        (["pruner=grasp", "sparsity=0.5"], "pruner.score.temperature=200.0: dataset=planted_helix .*; give 1.0"),
        (
            ["pruner=grasp_official", "sparsity=0.5", "pruner.score.temperature=1"],
            "pruner.score.class_halves=true: dataset=planted_helix is a regression, .* for classes; give false",
        ),
    ],
    ids=["smoothing", "temperature", "score", "halves"],
)
def test_settings_of_classes_are_refused_when_the_data_is_made(words: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        assembled(composed(*WORDS, *words), CPU)
    parts = assembled(composed(*WORDS, "pruner=grasp", "sparsity=0.5", "pruner.score.temperature=1"), CPU)
    assert parts.data.regression


@pytest.mark.parametrize("name", ["random_labels", "random_pixels_official"])
def test_ablations_of_classes_are_refused(name: str) -> None:
    config, data = composed(*WORDS, "pruner=snip", "sparsity=0.5", f"ablation={name}"), few_points()
    hook = config.ablation.batches or config.ablation.images
    assert hook is not None
    ((x, y),) = data.evaluation("test", 100)
    given = ([(x, y)],) if config.ablation.batches else (x, y)
    with pytest.raises(ConfigError, match=f"ablation={name}: it changes classes, and this data is a regression"):
        hook(*given, torch.Generator())  # type: ignore[call-arg, arg-type]


@pytest.mark.parametrize("name", ["force_official", "iter_snip_official"])
def test_scores_by_the_logit_of_a_class_are_refused(name: str) -> None:
    with pytest.raises(UserError, match=r"minus the logit of the true class, and the data is a regression; give"):
        pruned_as(network(), (1, 1, 1), *WORDS, f"pruner={name}", "sparsity=0.5", draw=few_points().draw)
