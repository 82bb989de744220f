"""Optimizers: they move kept weights as torch does, and pruned weights and their state stay zero."""

import copy
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from conftest import Chain
from few_images import RECIPE, half, trainer
from torch import Generator, nn
from torch.nn import functional as F

from pai_bench.masks import masks
from pai_bench.training.optimizer import Optimizer
from pai_bench.training.optimizers.adamw import adamw
from pai_bench.training.optimizers.sgd import sgd
from pai_bench.training.recording import num_resurrected

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
    if name in SGD:
        return torch.optim.SGD(groups, lr=RATES[name], foreach=True, **METHODS[name][1], **settings)
    return torch.optim.AdamW(groups, lr=RATES[name], fused=True, **METHODS[name][1], **settings)


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
