"""pai_bench.attach: pruned weights stay at zero in any loop, and kept ones move as if the forward pass were masked."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Chain
from torch import Generator, nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

import pai_bench as pb
from pai_bench.errors import ConfigError
from pai_bench.masks import masks

Step = Callable[[nn.Module, torch.optim.Optimizer, torch.Tensor, torch.Tensor], None]
STEPS = 4


def half(model: nn.Module) -> masks.Mask:
    generator = Generator().manual_seed(0)
    return {name: torch.rand(w.shape, generator=generator) < 0.5 for name, w in masks.prunable(model).items()}


def batches() -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = Generator().manual_seed(2)
    return [
        (torch.randn(8, 3, 8, 8, generator=generator).double(), torch.randint(4, (8,), generator=generator))
        for _ in range(STEPS)
    ]


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.01),
    "sgd_nesterov": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.01),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1),
    "adam_amsgrad": lambda p: torch.optim.Adam(p, lr=0.01, weight_decay=0.1, amsgrad=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.01, momentum=0.9),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.01),
    "lbfgs": lambda p: torch.optim.LBFGS(p, lr=0.1, max_iter=5, line_search_fn="strong_wolfe"),
}


def loss_of(model: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(model(images), labels)


def step(model: nn.Module, optimizer: torch.optim.Optimizer, images: torch.Tensor, labels: torch.Tensor) -> None:
    """A step of an ordinary loop, with clipping."""

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = loss_of(model, images, labels)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        return loss

    if isinstance(optimizer, torch.optim.LBFGS):
        optimizer.step(closure)  # it evaluates the closure many times
    else:
        closure()
        optimizer.step()


class Masked(nn.Module):
    """What attach has to equal: the forward pass applies weight * mask, and any optimizer does what it likes."""

    def __init__(self, model: nn.Module, mask: masks.Mask) -> None:
        super().__init__()
        self.model, self.mask = model, mask

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        named = dict(self.model.named_parameters())
        return functional_call(self.model, {n: named[n] * kept for n, kept in self.mask.items()}, (images,))


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return Chain().double()


def assert_zero(model: nn.Module, optimizer: torch.optim.Optimizer, mask: masks.Mask) -> None:
    """Pruned weights are zero, and so is what the optimizer keeps for them; there is something that is not."""
    for name, weight in model.named_parameters():
        if name in mask:
            assert not weight[~mask[name]].any() and weight[mask[name]].any()
            for value in optimizer.state.get(weight, {}).values():
                if isinstance(value, torch.Tensor) and value.shape == weight.shape:
                    assert not value[~mask[name]].any() and value[mask[name]].any()


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_kept_weights_move_as_if_the_forward_pass_were_masked(name: str, model: nn.Module) -> None:
    mask, other = half(model), copy.deepcopy(model)
    reference = Masked(other, mask)
    optimizer, plain = OPTIMIZERS[name](model.parameters()), OPTIMIZERS[name](other.parameters())
    pb.attach(optimizer, model, mask)
    for images, labels in batches():
        step(model, optimizer, images, labels)
        step(reference, plain, images, labels)
        assert_zero(model, optimizer, mask)
    theirs = dict(other.named_parameters())
    for key, weight in model.named_parameters():
        kept = mask.get(key, torch.ones_like(weight, dtype=torch.bool))
        # A clipped norm and a line search add up other numbers of zeros, which changes the last bits.
        torch.testing.assert_close(weight[kept], theirs[key][kept], rtol=1e-9, atol=1e-12)
        assert not torch.equal(weight, dict(Chain().double().named_parameters())[key])


def test_sgd_is_equal_bit_for_bit_without_clipping(model: nn.Module) -> None:
    mask, other = half(model), copy.deepcopy(model)
    reference = Masked(other, mask)
    optimizer, plain = OPTIMIZERS["sgd"](model.parameters()), OPTIMIZERS["sgd"](other.parameters())
    pb.attach(optimizer, model, mask)
    for images, labels in batches():
        for net, by in ((model, optimizer), (reference, plain)):
            by.zero_grad()
            loss_of(net, images, labels).backward()
            by.step()
    theirs = dict(other.named_parameters())
    assert all(torch.equal(w[mask[n]], theirs[n][mask[n]]) for n, w in masks.prunable(model).items())
    assert all(torch.equal(b, dict(other.named_buffers())[n]) for n, b in model.named_buffers())


def test_it_starts_and_ends_when_it_is_told(model: nn.Module) -> None:
    mask, optimizer = half(model), OPTIMIZERS["sgd"](model.parameters())
    (first, *others) = batches()
    step(model, optimizer, *first)  # leaves momentum and gradients for weights that are pruned now
    handle = pb.attach(optimizer, model, mask)
    assert_zero(model, optimizer, mask)
    assert all(not w.grad[~mask[n]].any() for n, w in masks.prunable(model).items())  # type: ignore[index]
    step(model, optimizer, *others[0])
    assert_zero(model, optimizer, mask)
    handle.remove()
    handle.remove()
    step(model, optimizer, *others[1])
    assert all(w[~mask[n]].any() for n, w in masks.prunable(model).items())
    with pb.attach(optimizer, model, mask):
        step(model, optimizer, *others[2])
        assert_zero(model, optimizer, mask)
    step(model, optimizer, *others[2])
    assert all(w[~mask[n]].any() for n, w in masks.prunable(model).items())


def test_a_state_that_is_loaded_later_is_masked_too(model: nn.Module) -> None:
    mask, optimizer = half(model), OPTIMIZERS["adamw"](model.parameters())
    dense = OPTIMIZERS["adamw"](model.parameters())
    step(model, dense, *batches()[0])
    pb.attach(optimizer, model, mask)
    optimizer.load_state_dict(dense.state_dict())
    step(model, optimizer, *batches()[1])
    assert_zero(model, optimizer, mask)


def test_a_copy_and_a_saved_state_know_nothing_of_it(model: nn.Module, tmp_path: Path) -> None:
    mask, optimizer = half(model), OPTIMIZERS["adamw"](model.parameters())
    pb.attach(optimizer, model, mask)
    step(model, optimizer, *batches()[0])
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "state.pt")
    assert set(torch.load(tmp_path / "state.pt", weights_only=True)) == {"model", "optimizer"}
    torch.save(model, tmp_path / "model.pt")
    other = copy.deepcopy(model)
    step(other, OPTIMIZERS["sgd"](other.parameters()), *batches()[1])
    assert all(w[~mask[n]].any() for n, w in masks.prunable(other).items())


def test_gradient_scaling_and_accumulation(model: nn.Module) -> None:
    mask, other = half(model), copy.deepcopy(model)
    reference = Masked(other, mask)
    nets = [(model, OPTIMIZERS["sgd"](model.parameters())), (reference, OPTIMIZERS["sgd"](other.parameters()))]
    pb.attach(nets[0][1], model, mask)
    for net, optimizer in nets:
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        for number, (images, labels) in enumerate(batches()):
            with torch.autocast("cpu", enabled=False):
                loss = loss_of(net, images, labels)
            if number == 1:  # overflows: the scaler leaves the step out
                loss = loss * float("inf")
            scaler.scale(loss).backward()
            if number:
                scaler.step(optimizer)
                scaler.update()
                optimizer.zero_grad()
        assert scaler.get_scale() == 512.0
    assert_zero(model, nets[0][1], mask)
    theirs = dict(other.named_parameters())
    assert all(torch.equal(w[mask[n]], theirs[n][mask[n]]) for n, w in masks.prunable(model).items())


def test_gradients_under_autocast(model: nn.Module) -> None:
    model, mask = model.float(), half(model)
    optimizer = OPTIMIZERS["adamw"](model.parameters())
    pb.attach(optimizer, model, mask)
    for images, labels in batches():
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = loss_of(model, images.float(), labels)
        loss.backward()
        optimizer.step()
        assert_zero(model, optimizer, mask)


@pytest.mark.parametrize("compiled", ["model", "step"])
def test_compiled_models_and_steps(compiled: str, model: nn.Module) -> None:
    mask, other = half(model), copy.deepcopy(model)
    plain, optimizer = OPTIMIZERS["sgd"](other.parameters()), OPTIMIZERS["sgd"](model.parameters())
    pb.attach(plain, other, mask)
    pb.attach(optimizer, model, mask)
    net: Any = torch.compile(model, backend="aot_eager") if compiled == "model" else model
    take = torch.compile(optimizer.step, backend="aot_eager") if compiled == "step" else optimizer.step
    for images, labels in batches():
        optimizer.zero_grad()
        loss_of(net, images, labels).backward()
        take()
        plain.zero_grad()
        loss_of(other, images, labels).backward()
        plain.step()
        assert_zero(model, optimizer, mask)
    for name, weight in other.named_parameters():
        torch.testing.assert_close(model.get_parameter(name), weight)


def _process(rank: int, folder: str, size: int) -> None:
    """One of several processes: each takes a part of every batch. The first saves the weights."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=size)
    torch.manual_seed(0)
    model = Chain(norm=False).double()
    mask = half(model)
    wrapped = DistributedDataParallel(model)
    optimizer = OPTIMIZERS["sgd"](wrapped.parameters())
    pb.attach(optimizer, wrapped, mask)
    for images, labels in batches():
        optimizer.zero_grad()
        loss_of(wrapped, images[rank::size], labels[rank::size]).backward()
        optimizer.step()
        assert_zero(model, optimizer, mask)
    torch.save(model.state_dict(), f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def test_two_processes_are_as_one(tmp_path: Path) -> None:
    torch.multiprocessing.start_processes(_process, (str(tmp_path), 2), nprocs=2, start_method="fork")
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    assert all(torch.equal(value, second[name]) for name, value in first.items())
    torch.manual_seed(0)
    model = Chain(norm=False).double()
    mask, optimizer = half(model), OPTIMIZERS["sgd"](model.parameters())
    pb.attach(optimizer, model, mask)
    for images, labels in batches():
        optimizer.zero_grad()
        loss_of(model, images, labels).backward()
        optimizer.step()
    for name, value in model.state_dict().items():
        torch.testing.assert_close(first[name], value)


def test_norms_of_pruned_filters_and_frozen_weights_stay_at_zero(model: nn.Module) -> None:
    model = model.float()
    model.conv1.weight.requires_grad_(False)
    settings = {"schedule.rounds": 2}
    mask = pb.prune(
        model, "filter_magnitude", sparsity=0.4, input_shape=(3, 8, 8), schedule="linear", settings=settings
    )
    assert {"norm2.weight", "norm2.bias"} <= set(mask) and not mask["norm2.bias"].all()
    optimizer = OPTIMIZERS["adamw"](model.parameters())
    pb.attach(optimizer, model, mask)
    for images, labels in batches():
        step(model, optimizer, images.float(), labels)
    for name, kept in mask.items():
        assert not model.get_parameter(name)[~kept].any()


def test_what_is_wrong_is_one_line(model: nn.Module) -> None:
    mask, optimizer = half(model), OPTIMIZERS["sgd"](model.parameters())
    other = copy.deepcopy(model)
    for given, of, by, message in (
        (optimizer, other, mask, "^optimizer: it holds none of the weights that the mask names"),
        (optimizer, model, {"fc.weights": mask["fc.weight"]}, r"^mask: Chain has no parameter 'fc\.weights'"),
        (optimizer, model, {"fc.weight": mask["fc.weight"].float()}, r"^mask: fc\.weight is torch\.float32; give bool"),
        (optimizer, model, {"fc.weight": mask["conv1.weight"]}, r"^mask: fc\.weight has shape \(6, 3, 3, 3\)"),
        (optimizer, model, {}, "^mask: give a dictionary"),
        ("sgd", model, mask, r"^optimizer: str is no torch\.optim\.Optimizer"),
        (model, optimizer, mask, r"^optimizer: Chain is no .*; give attach\(optimizer, model, mask\)$"),
        (optimizer, None, mask, r"^model: NoneType is no torch\.nn\.Module; give attach\("),
        (optimizer, mask, model, r"^model: dict is no torch\.nn\.Module; give attach\("),
    ):
        with pytest.raises(ConfigError, match=message):
            pb.attach(given, of, by)  # type: ignore[arg-type]
