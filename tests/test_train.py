"""The training loop: pruned weights stay at zero, kept ones move as if masked in the forward pass."""

import copy
import math
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import Chain, RunCli, composed, options
from few_images import CPU, RECIPE, FewImages, half, trainer
from torch import nn
from torch.nn import functional as F

from pai_bench.analysis import signal
from pai_bench.core import Batches, Call
from pai_bench.errors import UserError
from pai_bench.masks import masks
from pai_bench.system import devices
from pai_bench.training.evaluation import evaluate
from pai_bench.training.optimizers.sgd import sgd
from pai_bench.training.recipe import learning_rate
from pai_bench.training.recording import num_resurrected

# Training -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("channels_last", [False, True])
def test_pruned_weights_are_zero_after_training(precision: str, channels_last: bool) -> None:
    torch.manual_seed(0)
    model = Chain(bias=True)
    mask = half(model)
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    training = trainer(model, replace(RECIPE, precision=precision), channels_last=channels_last)
    training.until(mask, 3)
    assert num_resurrected(model, mask) == 0
    for name, weight in masks.prunable(model).items():
        assert weight.dtype == torch.float32
        assert not torch.equal(weight[mask[name]], before[name][mask[name]])


def test_a_weight_that_came_back_is_caught_at_the_next_evaluation() -> None:
    torch.manual_seed(0)
    model = Chain()
    mask = half(model)
    training = trainer(model)
    training.until(mask, 1)
    with torch.no_grad():
        model.conv1.weight[~mask["conv1.weight"]] = 0.1
    with pytest.raises(AssertionError, match="a pruned weight is not zero"):
        training.until(mask, 2)


def test_training_in_parts_is_training_at_once() -> None:
    def trained(*stops: int) -> dict[str, torch.Tensor]:
        torch.manual_seed(0)
        model = nn.Sequential(Chain(), nn.Dropout(0.5), nn.Linear(4, 4))
        training, mask = trainer(model), half(model)
        for stop in stops:
            training.until(mask, stop)
            torch.rand(3)  # what happens to the global random state between epochs plays no part
        return model.state_dict()

    whole, parts = trained(3), trained(1, 2, 3)
    assert all(torch.equal(whole[key], parts[key]) for key in whole)


def test_the_seed_decides_order_and_augmentation() -> None:
    def trained(seed: int) -> torch.Tensor:
        torch.manual_seed(0)
        model = Chain()
        trainer(model, seed=seed).until(masks.full(model), 1)
        return model.fc.weight.detach()

    assert torch.equal(trained(0), trained(0)) and not torch.equal(trained(0), trained(1))


def test_every_epoch_is_recorded_from_before_the_first() -> None:
    lines: list[tuple[float, dict[str, float]]] = []
    torch.manual_seed(0)
    model = Chain()
    training = trainer(
        model,
        data=FewImages(validation=5),
        record=lambda metrics, epoch: lines.append((epoch, metrics)),
    )
    training.until(masks.full(model), 2)
    assert [epoch for epoch, _ in lines] == [0.0, 1.0, 2.0]
    evaluated = {f"{split}_{name}" for split in ("validation", "test") for name in ("loss", "top1", "top5")}
    assert set(lines[0][1]) == evaluated
    assert set(lines[1][1]) == evaluated | {
        "train_loss",
        "train_top1",
        "lr",
        "train_images_per_second",
        "recipe_epoch",
    }
    assert training.num_examples == 80


@pytest.mark.parametrize("decays", [False, True])
def test_weight_decay_reaches_norms_and_biases_only_when_asked(decays: bool) -> None:
    torch.manual_seed(0)
    model = Chain(bias=True)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(1.0)
    recipe = replace(
        RECIPE, weight_decay=0.5, decay_norm_and_bias=decays, optimizer=partial(sgd, momentum=0.0, nesterov=False)
    )
    training = trainer(model, recipe)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    training.network.step.optimizer.step()
    for name, parameter in model.named_parameters():
        moved = (parameter != 1.0).all()
        assert moved == (decays or name in masks.prunable(model))


def test_a_loss_that_is_not_finite_ends_the_run_with_a_remedy() -> None:
    torch.manual_seed(0)
    model = Chain(norm=False)
    with pytest.raises(UserError, match=r"training diverged in epoch 1: the loss is .*lower training.lr=1e\+20"):
        trainer(model, replace(RECIPE, lr=1e20)).until(masks.full(model), 1)


# Evaluation -----------------------------------------------------------------------------------------------------------


def test_evaluation_counts_every_image_once() -> None:
    data = FewImages()
    torch.manual_seed(0)
    model = Chain().eval()
    results = [evaluate(model, data.evaluation("train", size), CPU) for size in (40, 7, 1)]
    with torch.no_grad():
        logits = model(data.images)
    assert results[0].top1 == pytest.approx((logits.argmax(1) == data.labels).float().mean().item())
    for result in results:
        assert result.loss == pytest.approx(F.cross_entropy(logits, data.labels).item(), rel=1e-6)
        assert (result.top1, result.top5) == (results[0].top1, 1.0)


def test_top5_looks_at_five_logits() -> None:
    logits = torch.arange(10.0).repeat(10, 1)
    result = evaluate(lambda images: logits, [(torch.zeros(10, 1), torch.arange(10))], CPU)
    assert (result.top1, result.top5) == (0.1, 0.5)


# Learning rates -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "rates"),
    [
        ({}, {0: 0.1, 59.99: 0.1, 60: 0.01, 119.9: 0.01, 120: 0.001, 159: 0.001}),
        ({"lr_gamma": 0.2, "lr": 0.01}, {0: 0.01, 60: 0.002, 120: 0.0004}),
        ({"warmup_epochs": 5}, {0: 0.0, 2.5: 0.05, 5: 0.1, 60: 0.01}),
        ({"lr_schedule": "cosine"}, {0: 0.1, 80: 0.05, 160: 0.0}),
        ({"lr_schedule": "cosine", "warmup_epochs": 10}, {5: 0.05, 10: 0.1, 85: 0.05, 160: 0.0}),
    ],
    ids=["step", "another factor", "warm-up", "cosine", "cosine after warm-up"],
)
def test_learning_rate(changes: dict[str, Any], rates: dict[float, float]) -> None:
    recipe = replace(RECIPE, epochs=160, lr_milestones=[60, 120], **changes)
    for epoch, rate in rates.items():
        assert learning_rate(recipe, epoch) == pytest.approx(rate, abs=1e-12)


OF_DATASET = {"imagenet_16": ["dataset=imagenet"]}  # recipes whose images must be streamed

# Recipes: what the papers' code and stored arguments say.
RECIPES = {
    "cifar": {"epochs": 160, "batch_size": 128, "lr": 0.1, "lr_milestones": [60, 120], "weight_decay": 1e-4},
    "cifar_resnet18": {"epochs": 160, "lr": 0.01, "lr_gamma": 0.2, "weight_decay": 5e-4},
    "cifar_grasp": {"epochs": 160, "lr": 0.1, "lr_milestones": [80, 120], "weight_decay": 5e-4},
    "cifar_lottery": {"epochs": 160, "lr": 0.1, "lr_milestones": [80, 120], "weight_decay": 1e-4},
    "tiny_imagenet": {"epochs": 100, "lr": 0.01, "lr_milestones": [30, 60, 80], "lr_gamma": 0.2},
    "imagenet": {"epochs": 90, "batch_size": 1024, "lr": 0.4, "lr_milestones": [30, 60, 80], "warmup_epochs": 5},
    "cifar_fast": {"epochs": 24, "batch_size": 512, "lr": 0.4, "warmup_epochs": 5, "weight_decay": 5e-4},
    "imagenet_16": {"epochs": 16, "batch_size": 1024, "lr": 0.425, "warmup_epochs": 2, "weight_decay": 1e-4},
    "mnist_lottery": {"epochs": 55, "batch_size": 60, "lr": 1.2e-3, "lr_schedule": "step", "weight_decay": 0.0},
    "planted": {"epochs": 10, "batch_size": 32, "lr": 1e-3, "lr_schedule": "step", "weight_decay": 0.0},
}


@pytest.mark.parametrize("name", list(RECIPES))
def test_recipes_are_the_published_ones(name: str) -> None:
    training = composed(f"training={name}", *OF_DATASET.get(name, [])).training
    assert {key: getattr(training, key) for key in RECIPES[name]} == RECIPES[name]


@pytest.mark.parametrize("name", sorted(set(options("training")) - {"planted", "mnist_lottery"}))
def test_recipes_are_of_sgd_with_the_published_kind_of_momentum(name: str) -> None:
    nesterov = name in ("cifar", "cifar_fast", "cifar_resnet18", "tiny_imagenet", "digits")
    assert composed(f"training={name}", *OF_DATASET.get(name, [])).training.optimizer == Call(
        "pai_bench.training.optimizers.sgd.sgd", {"momentum": 0.9, "nesterov": nesterov}
    )


@pytest.mark.parametrize("name", ["planted", "mnist_lottery"])
def test_the_recipes_of_small_networks_are_of_adam(name: str) -> None:
    training = composed(f"training={name}").training
    assert training.optimizer == Call(
        "pai_bench.training.optimizers.adamw.adamw", {"beta1": 0.9, "beta2": 0.999, "eps": 1e-8}
    )
    assert (training.weight_decay, training.warmup_epochs, training.lr_milestones) == (0.0, 0, [])


def test_logits_that_are_not_finite_count_as_wrong() -> None:
    logits = torch.eye(4)
    logits[0, 2], logits[1] = math.inf, math.nan  # of labels 0 and 1
    result = evaluate(lambda images: logits, [(torch.zeros(4, 1), torch.arange(4))], CPU)
    assert (result.top1, result.top5, result.num_not_finite) == (0.5, 0.5, 2)
    empty = evaluate(lambda images: torch.full((4, 4), math.nan), [(torch.zeros(4, 1), torch.zeros(4).long())], CPU)
    assert (empty.top1, empty.num_not_finite) == (0.0, 4)


def test_divergence_in_the_last_step_is_found_when_it_is_evaluated() -> None:
    torch.manual_seed(0)
    model = Chain()
    training = trainer(model, replace(RECIPE, batch_size=40, lr=1e38))  # one step, whose loss is that of good weights
    with pytest.raises(UserError, match=r"training diverged in epoch 1: the loss is nan; lower training.lr=1e\+38"):
        training.finish(masks.full(model), 1)


def test_a_network_that_starts_with_infinite_outputs_is_not_said_to_have_diverged() -> None:
    model = Chain()
    with torch.no_grad():
        model.fc.weight.fill_(math.inf)
    with pytest.raises(UserError, match="the outputs for 10 of 10 test images are not finite before training"):
        trainer(model).finish(masks.full(model), 1)


# Signal ---------------------------------------------------------------------------------------------------------------


def test_signal_is_lost_when_a_layer_of_a_chain_collapses(batches: Batches) -> None:
    torch.manual_seed(0)
    model = Chain()
    state = copy.deepcopy(model.state_dict())
    mask = masks.full(model)
    assert signal.output_depends_on_input(model, batches[0][0])
    assert all(torch.equal(state[key], value) for key, value in model.state_dict().items())
    mask["conv2.weight"] = torch.zeros_like(mask["conv2.weight"])
    masks.apply_(model, mask)
    assert not signal.output_depends_on_input(model, batches[0][0])


def test_a_collapsed_branch_of_a_residual_net_leaves_the_signal(batches: Batches) -> None:
    from conftest import residual

    torch.manual_seed(0)
    model = residual()
    mask = masks.full(model)
    mask["stages.0.0.conv2.weight"] = torch.zeros_like(mask["stages.0.0.conv2.weight"])
    masks.apply_(model, mask)
    assert masks.collapsed(mask) == ["stages.0.0.conv2.weight"]
    assert signal.output_depends_on_input(model, batches[0][0])
    assert math.isfinite(model(batches[0][0]).sum().item())


def test_every_process_takes_the_gpu_with_the_fewest_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices.tempfile, "gettempdir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: SimpleNamespace(uuid=f"gpu{index}"))
    held = []
    chosen = []
    for _ in range(7):
        monkeypatch.setattr(devices, "_lock_of_gpu", {})
        chosen.append(devices._least_used())
        assert devices._least_used() == chosen[-1]
        held.append(devices._lock_of_gpu)
    assert chosen == [0, 1, 2, 0, 1, 2, 0]
    for number in (1, 4):  # both processes of the second GPU end
        held[number][1].release()
    monkeypatch.setattr(devices, "_lock_of_gpu", {})
    assert devices._least_used() == 1


def test_a_gpu_without_an_identity_has_its_number(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch 2.4 tells none."""
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: SimpleNamespace(name="a GPU"))
    for visible, names in ((None, ["0", "1"]), ("2,5", ["2", "5"]), ("GPU-1a, GPU-2b", ["GPU-1a", "GPU-2b"])):
        if visible is not None:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        assert [devices._name_of_gpu(index) for index in range(2)] == names


def test_a_whole_run_with_adamw(run_cli: RunCli, tmp_path: Path) -> None:
    done = run_cli(
        "pruner=magnitude",
        "sparsity=0.5",
        "model=lenet300",
        "training.epochs=1",
        "tracker=none",
        "training.optimizer=adamw",
        "training.optimizer.beta2=0.98",
        "training.lr=1e-3",
    )
    assert done.returncode == 0, done.stderr
    (config_file,) = tmp_path.glob("results/*/config.yaml")
    assert "adamw" in config_file.read_text() and "beta2: 0.98" in config_file.read_text()
