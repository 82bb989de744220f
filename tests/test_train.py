"""The training loop: pruned weights stay at zero, kept ones move as if masked in the forward pass."""

import copy
import math
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import Chain, RunCli, composed, options
from torch import Generator, nn
from torch.nn import functional as F

from pai_bench.analysis import signal
from pai_bench.core import Batch, Batches, Call, ScoringData
from pai_bench.errors import UserError
from pai_bench.masks import masks
from pai_bench.system import devices
from pai_bench.training.evaluation import evaluate
from pai_bench.training.optimizer import Optimizer
from pai_bench.training.optimizers.adamw import adamw
from pai_bench.training.optimizers.sgd import sgd
from pai_bench.training.recipe import Recipe, learning_rate
from pai_bench.training.recording import Observers, num_resurrected
from pai_bench.training.step import Execution
from pai_bench.training.trainer import Trainer

CPU = torch.device("cpu")


class FewImages:
    """A core.Data of forty small random images."""

    input_shape, num_classes, checksum = (3, 8, 8), 4, ""

    def __init__(self, validation: int = 0) -> None:
        generator = Generator().manual_seed(0)
        self.images = torch.randn(40, 3, 8, 8, generator=generator)
        self.labels = torch.randint(4, (40,), generator=generator)
        self.num_examples = {"train": 40, "validation": validation, "test": 10}

    def train(self, batch_size: int, order: Generator, augment: Generator, start: int = 0) -> Iterator[Batch]:
        permutation = torch.randperm(40, generator=order)
        noise = 0.1 * torch.randn(40, 3, 8, 8, generator=augment)
        for part in permutation.split(batch_size)[start:]:
            yield self.images[part] + noise[part], self.labels[part]

    def evaluation(self, split: str, batch_size: int) -> Iterator[Batch]:
        for i in range(0, self.num_examples[split], batch_size):
            part = slice(i, min(i + batch_size, self.num_examples[split]))
            yield self.images[part], self.labels[part]

    def draw(self, examples: ScoringData, generator: Generator, dtype: torch.dtype) -> Batches:
        return [(self.images.to(dtype), self.labels)]


RECIPE = Recipe(
    epochs=3,
    batch_size=8,
    lr=0.1,
    optimizer=partial(sgd, momentum=0.9, nesterov=True),
    weight_decay=5e-4,
    decay_norm_and_bias=False,
    lr_schedule="step",
    lr_milestones=[2],
    lr_gamma=0.1,
    warmup_epochs=0,
    label_smoothing=0.1,
    temperature=1.0,
    precision="float32",
)


def half(model: nn.Module) -> masks.Mask:
    generator = Generator().manual_seed(0)
    return {n: torch.rand(w.shape, generator=generator) < 0.5 for n, w in masks.prunable(model).items()}


def trainer(model: nn.Module, recipe: Recipe = RECIPE, data: Any = None, **settings: Any) -> Trainer:
    """A trainer of few images; the settings are those of Execution, Observers and Trainer."""
    execution = {"device": CPU, "channels_last": False, "compile_model": False, "capture": True}
    observers = {"record": lambda metrics, epoch: None, "diagnose": None, "checkpoint": lambda epoch_ended: None}
    others = {"seed": 0, "compact_training": False, "keep_epochs": ()}
    unknown = settings.keys() - execution.keys() - observers.keys() - others.keys()
    assert not unknown, unknown

    def given(defaults: dict[str, Any]) -> dict[str, Any]:
        return {key: settings.get(key, value) for key, value in defaults.items()}

    data = data or FewImages()
    return Trainer(model, data, recipe, Execution(**given(execution)), Observers(**given(observers)), **given(others))


# Optimizers -----------------------------------------------------------------------------------------------------------


SGD = {
    "sgd without momentum": (sgd(momentum=0.0, nesterov=False), {}),
    "sgd": (sgd(momentum=0.9, nesterov=False), {"momentum": 0.9}),
    "sgd_nesterov": (sgd(momentum=0.9, nesterov=True), {"momentum": 0.9, "nesterov": True}),
}
ADAMW = {
    "adamw": (adamw(beta1=0.9, beta2=0.999, eps=1e-8), {}),
    "adamw with other settings": (adamw(beta1=0.8, beta2=0.98, eps=1e-3), {"betas": (0.8, 0.98), "eps": 1e-3}),
}
METHODS = SGD | ADAMW
TORCH_NAMES = {"momentum": "momentum_buffer", "first_moment": "exp_avg", "second_moment": "exp_avg_sq"}
RATES = dict.fromkeys(SGD, 0.1) | dict.fromkeys(ADAMW, 0.01)


def reference(name: str, groups: Any, **settings: Any) -> torch.optim.Optimizer:
    """The same method by torch."""
    kind: Any = torch.optim.SGD if name in SGD else torch.optim.AdamW
    return kind(groups, lr=RATES[name], foreach=True, **METHODS[name][1], **settings)


def optimizer_of(model: nn.Module, name: str, weight_decay: float = 0.01, **settings: Any) -> Optimizer:
    groups = [(dict(model.named_parameters()), weight_decay)]
    return Optimizer(METHODS[name][0], groups, lr=RATES[name], **settings)


def gradients(model: nn.Module, seed: int) -> None:
    """Gradients of a loss on random images, laid out as backward leaves them; some parameters get none."""
    generator = Generator().manual_seed(seed)
    images, labels = torch.randn(8, 3, 8, 8, generator=generator), torch.randint(4, (8,), generator=generator)
    for parameter in model.parameters():
        parameter.grad = None
    F.cross_entropy(model(images), labels).backward()
    for number, parameter in enumerate(model.parameters()):
        if (number + seed) % 4 == 0 and seed != 3:  # in the fourth step all have one
            parameter.grad = None


def assert_equal(ours: nn.Module, theirs: nn.Module) -> None:
    for (name, parameter), other in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert torch.equal(parameter, other), name


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("decays", [(0.0, 0.0), (0.01, 0.0), (0.01, 0.02)])
@pytest.mark.parametrize("channels_last", [False, True])
def test_steps_are_those_of_torch(name: str, decays: tuple[float, float], channels_last: bool) -> None:
    torch.manual_seed(0)
    ours: nn.Module = Chain(bias=True)
    ours = ours.to(memory_format=torch.channels_last) if channels_last else ours
    theirs = copy.deepcopy(ours)

    def groups(model: nn.Module) -> list[tuple[dict[str, nn.Parameter], float]]:
        weights = masks.prunable(model)
        others = {key: parameter for key, parameter in model.named_parameters() if key not in weights}
        return [(weights, decays[0]), (others, decays[1])]

    optimizer = Optimizer(METHODS[name][0], groups(ours), lr=RATES[name])
    torchs = reference(name, [{"params": list(group.values()), "weight_decay": of} for group, of in groups(theirs)])
    names = {parameter: key for key, parameter in theirs.named_parameters()}
    for step in range(20):
        optimizer.lr = RATES[name] / (1 + step)
        for group in torchs.param_groups:
            group["lr"] = optimizer.lr
        for model, this in ((ours, optimizer), (theirs, torchs)):
            gradients(model, seed=step)
            this.step()
        assert_equal(ours, theirs)
        for key, tensors in optimizer.state.items():
            of_torch = {names[p]: state for p, state in torchs.state.items() if state}
            assert tensors.keys() == names_of(ours)
            for parameter, tensor in tensors.items():
                if parameter not in of_torch:  # it never had a gradient
                    assert not tensor.any()
                elif key == "num_steps":
                    assert tensor == of_torch[parameter]["step"]
                else:
                    other = of_torch[parameter][TORCH_NAMES[key]]
                    assert torch.equal(tensor, other) and tensor.stride() == other.stride()


def names_of(model: nn.Module) -> set[str]:
    return {name for name, _ in model.named_parameters()}


@pytest.mark.parametrize("name", METHODS)
def test_an_optimizer_goes_on_from_its_state(name: str) -> None:
    torch.manual_seed(0)
    ours = Chain()
    optimizer = optimizer_of(ours, name)
    for step in range(3):
        gradients(ours, seed=step)
        optimizer.step()
    theirs = copy.deepcopy(ours)
    other = optimizer_of(theirs, name)
    other.load_state(copy.deepcopy(optimizer.state))
    for model, this in ((ours, optimizer), (theirs, other)):
        gradients(model, seed=3)
        this.step()
    assert_equal(ours, theirs)


@pytest.mark.parametrize("name", METHODS)
def test_an_optimizer_that_forgets_its_state_is_a_new_one(name: str) -> None:
    torch.manual_seed(0)
    ours = Chain()
    optimizer = optimizer_of(ours, name)
    for step in range(3):
        gradients(ours, seed=step)
        optimizer.step()
    theirs = copy.deepcopy(ours)
    optimizer.load_state({})
    assert not any(tensor.any() for tensors in optimizer.state.values() for tensor in tensors.values())
    for model, this in ((ours, optimizer), (theirs, optimizer_of(theirs, name))):
        gradients(model, seed=3)
        this.step()
    assert_equal(ours, theirs)


@pytest.mark.parametrize("name", METHODS)
def test_a_gradient_scaler_unscales_before_a_step_and_leaves_out_one_that_overflowed(name: str) -> None:
    torch.manual_seed(0)
    ours = Chain()
    theirs = copy.deepcopy(ours)
    mask = half(ours)
    optimizers = [optimizer_of(model, name) for model in (ours, theirs)]
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=2)
    for optimizer in optimizers:
        optimizer.apply_mask(mask)
    for step in range(4):
        gradients(theirs, seed=step)
        optimizers[1].step()
        scaler.scale(torch.zeros(()))
        gradients(ours, seed=step)
        for parameter in ours.parameters():
            if parameter.grad is not None:
                parameter.grad.mul_(scaler.get_scale())
        scaler.step(optimizers[0])
        scaler.update()
        assert_equal(ours, theirs)
    assert scaler.get_scale() == 32.0
    before = copy.deepcopy(optimizers[0].state)
    gradients(ours, seed=3)
    pruned = (~mask["conv1.weight"]).nonzero()[0]
    ours.conv1.weight.grad[tuple(pruned)] = math.inf
    scaler.step(optimizers[0])
    scaler.update()
    assert scaler.get_scale() == 16.0
    assert_equal(ours, theirs)
    for key, tensors in optimizers[0].state.items():
        assert all(torch.equal(tensor, before[key][parameter]) for parameter, tensor in tensors.items())


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("weight_decay", [0.0, 0.01])
def test_kept_weights_move_as_if_masked_in_the_forward_pass(name: str, weight_decay: float) -> None:
    torch.manual_seed(0)
    ours = Chain(bias=True)
    theirs = copy.deepcopy(ours)
    mask = half(ours)
    optimizer = optimizer_of(ours, name, weight_decay)
    torchs = reference(name, theirs.parameters(), weight_decay=weight_decay)
    optimizer.apply_mask(mask)
    generator = Generator().manual_seed(1)
    for _ in range(10):
        images, labels = torch.randn(8, 3, 8, 8, generator=generator), torch.randint(4, (8,), generator=generator)
        optimizer.zero_grad()
        F.cross_entropy(ours(images), labels).backward()
        optimizer.step()
        torchs.zero_grad()
        masked = {key: parameter * mask.get(key, torch.tensor(1.0)) for key, parameter in theirs.named_parameters()}
        F.cross_entropy(torch.func.functional_call(theirs, masked, (images,)), labels).backward()
        torchs.step()
    for key, parameter in ours.named_parameters():
        kept = mask.get(key, torch.ones_like(parameter, dtype=torch.bool))
        assert torch.equal(parameter[kept], dict(theirs.named_parameters())[key][kept])
        assert (parameter[~kept] == 0).all()


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("capturable", [False, True])
def test_pruned_weights_and_their_state_are_zero_and_stay_zero_when_a_mask_narrows(name: str, capturable: bool) -> None:
    torch.manual_seed(0)
    model = Chain()
    optimizer = optimizer_of(model, name, capturable=capturable)
    mask = half(model)
    generator = Generator().manual_seed(2)
    narrower = {key: kept & (torch.rand(kept.shape, generator=generator) < 0.5) for key, kept in mask.items()}
    for number, held in enumerate((masks.full(model), mask, narrower)):
        optimizer.apply_mask(held)
        for step in range(5):
            for key, kept in held.items():
                for tensor in (model.get_parameter(key), *(optimizer.state[of][key] for of in per_weight(optimizer))):
                    assert not tensor[~kept].any() and (tensor[kept].any() or number + step == 0)
            gradients(model, seed=3 + 4 * step)
            optimizer.step()


def per_weight(optimizer: Optimizer) -> set[str]:
    return optimizer.state.keys() & TORCH_NAMES.keys()


@pytest.mark.parametrize("name", ["sgd_nesterov", "adamw"])
def test_a_masked_step_adds_one_operator(name: str) -> None:
    from torch.utils._python_dispatch import TorchDispatchMode

    class Count(TorchDispatchMode):
        number = 0

        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            Count.number += 1
            return function(*args, **(kwargs or {}))

    def operators(masked: bool) -> int:
        torch.manual_seed(0)
        model = Chain()
        optimizer = optimizer_of(model, name)
        optimizer.apply_mask(half(model) if masked else masks.full(model))
        F.cross_entropy(model(torch.randn(4, 3, 8, 8)), torch.zeros(4, dtype=torch.long)).backward()
        Count.number = 0
        with Count():
            optimizer.step()
        return Count.number

    assert operators(masked=True) - operators(masked=False) == 1


@pytest.mark.parametrize("name", ["sgd_nesterov", "adamw"])
def test_training_goes_on_from_its_state_bit_for_bit(name: str) -> None:
    recipe = replace(RECIPE, optimizer=lambda: METHODS[name][0], lr=RATES[name])
    torch.manual_seed(0)
    model = Chain()
    mask = half(model)
    whole, broken = (trainer(copy.deepcopy(model), recipe) for _ in range(2))
    whole.until(mask, 3)
    broken.until(mask, 1.4)
    later = trainer(Chain(), recipe)
    later.load_state(copy.deepcopy(broken.state()), mask)
    later.until(mask, 3)
    assert_equal(whole.model, later.model)
    assert num_resurrected(later.model, mask) == 0


@pytest.mark.parametrize("name", ["sgd_nesterov", "adamw"])
def test_a_rewound_network_trains_as_it_did_the_first_time(name: str) -> None:
    recipe = replace(RECIPE, optimizer=lambda: METHODS[name][0], lr=RATES[name])
    torch.manual_seed(0)
    model = Chain()
    mask = half(model)
    masks.apply_(model, mask)
    once, twice = (trainer(copy.deepcopy(model), recipe, keep_epochs=[0.0]) for _ in range(2))
    once.until(mask, 2)
    twice.until(mask, 2)
    twice.rewind(mask, 0.0, True)
    assert not any(tensor.any() for tensors in twice.state()["optimizer"].values() for tensor in tensors.values())
    twice.until(mask, 2)
    assert_equal(once.model, twice.model)


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
    "imagenet_16": {"epochs": 16, "batch_size": 1024, "lr": 0.5, "warmup_epochs": 2, "weight_decay": 1e-4},
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
