"""Measures of gradient flow and Fisher information, against explicit derivatives, and norms under gradient flow."""

from types import SimpleNamespace

import pytest
import torch
from conftest import Chain
from few_images import FewImages
from scored import assert_close, subnetwork, taken
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from pai_bench import assembly
from pai_bench.analysis import signal
from pai_bench.analysis.mode import mode
from pai_bench.core import Batches, Loss, Subnetwork
from pai_bench.errors import UserError
from pai_bench.masks import masks
from pai_bench.pruners import (
    gradient_flow,
    gradient_norm,
)


def every_weight_times_hessian_gradient(model: nn.Module, images: Batches, temperature: float) -> dict[str, Tensor]:
    """w (Hg) of every parameter from an assembled Hessian, over all parameters, in eval mode."""
    names = [name for name, _ in model.named_parameters()]
    values = [p.detach() for _, p in model.named_parameters()]
    flat = torch.cat([v.flatten() for v in values])
    x, y = (torch.cat(parts) for parts in zip(*images, strict=True))

    def loss_at(vector: Tensor) -> Tensor:
        parts = torch.split(vector, [v.numel() for v in values])
        state = {n: part.view(v.shape) for n, part, v in zip(names, parts, values, strict=True)}
        return F.cross_entropy(torch.func.functional_call(model, state, (x,)) / temperature, y)

    gradient = torch.autograd.functional.jacobian(loss_at, flat)
    hessian = torch.autograd.functional.hessian(loss_at, flat)
    products = flat * (hessian @ gradient)
    parts = torch.split(products, [v.numel() for v in values])
    return {n: part.view(v.shape) for n, part, v in zip(names, parts, values, strict=True)}


@pytest.mark.parametrize("temperature", [1.0, 200.0])
def test_gradient_preservation_equals_the_explicit_hessian_over_all_parameters(
    images: Batches, temperature: float
) -> None:
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 2, 3), nn.BatchNorm2d(2), nn.Tanh(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2, 4)
    model = nn.Sequential(*layers).double().eval()
    expected = every_weight_times_hessian_gradient(model, images, temperature)
    settings = {"temperature": temperature, "absolute": False}
    found = taken(gradient_flow.gradient_preservation, model, images, False, **settings)
    sizes = taken(gradient_flow.gradient_preservation, model, images, False, **settings | {"absolute": True})
    for name in found:
        assert_close(found[name], expected[name], 1e-7)
        assert torch.equal(sizes[name], found[name].abs())


def test_measures_of_loss_preservation(chain: nn.Module, images: Batches) -> None:
    x, y = (torch.cat(parts) for parts in zip(*images, strict=True))
    chain.eval()
    F.cross_entropy(chain(x) / 5, y).backward()
    loss = taken(gradient_flow.loss_preservation, chain, images, False, temperature=5.0, signed=False)
    signed = taken(gradient_flow.loss_preservation, chain, images, False, temperature=5.0, signed=True)
    biased = taken(gradient_flow.score, chain, images, False, temperature=5.0, from_initial=False)
    for name, weight in masks.prunable(chain).items():
        assert weight.grad is not None
        assert_close(signed[name], weight * weight.grad, 1e-9)
        assert_close(loss[name], signed[name].abs(), 1e-12)
        assert_close(biased[name], weight.abs() * loss[name], 1e-12)
        # Over filters the sum of sizes bounds the size of the sum (triangle inequality).
        assert (loss[name].flatten(1).sum(1) >= signed[name].flatten(1).sum(1).abs() - 1e-15).all()


def test_biased_loss_from_the_initialization_weighs_by_the_distance_moved(chain: nn.Module, images: Batches) -> None:
    net = subnetwork(chain)
    with torch.no_grad():
        chain.conv1.weight.add_(0.1)
    with mode(chain, False):
        scores = gradient_flow.score(net, images, F.cross_entropy, Generator(), temperature=1.0, from_initial=True)
        plain = gradient_flow.loss_preservation(
            net, images, F.cross_entropy, Generator(), temperature=1.0, signed=False
        )
    assert not scores["conv2.weight"].any()
    assert_close(scores["conv1.weight"], 0.1 * plain["conv1.weight"], 1e-9)


def test_fisher_is_the_mean_squared_gradient_of_single_images(chain: nn.Module, images: Batches) -> None:
    found = taken(gradient_norm.fisher, chain, images, False, per_example=True, temperature=1.0)
    of_batches = taken(gradient_norm.fisher, chain, images, False, per_example=False, temperature=5.0)
    chain.eval()

    def squares(batches: Batches, temperature: float) -> dict[str, Tensor]:
        sums = {name: torch.zeros_like(weight) for name, weight in masks.prunable(chain).items()}
        for x, y in batches:
            chain.zero_grad()
            F.cross_entropy(chain(x) / temperature, y).backward()
            for name, weight in masks.prunable(chain).items():
                sums[name] += weight.grad**2 * len(y) / 20  # a batch counts by its size
        return sums

    singles = [(x[i : i + 1], y[i : i + 1]) for x, y in images for i in range(len(y))]
    for scores, expected in ((found, squares(singles, 1)), (of_batches, squares(images, 5))):
        for name, weight in masks.prunable(chain).items():
            assert_close(scores[name], weight.detach() ** 2 * expected[name], 1e-9)
    with pytest.raises(UserError, match=r"pruner.mode=train: an image by itself has no batch statistics"):
        taken(gradient_norm.fisher, chain, images, True, per_example=True, temperature=1.0)


def test_batch_norm_scores_are_those_of_the_norm_behind_the_filter(chain: nn.Module, images: Batches) -> None:
    with torch.no_grad():
        chain.norm1.weight.uniform_(-1, 1)
        chain.norm1.bias.uniform_(-1, 1)
    scores = taken(gradient_flow.batch_norm, chain, [], False, taylor=False, temperature=5.0)
    # To the last bit: equal scales are equal scores, whatever order a device sums in.
    assert torch.equal(scores["conv1.weight"].amax((1, 2, 3)), chain.norm1.weight.detach().abs())
    taylor = taken(gradient_flow.batch_norm, chain, images, False, taylor=True, temperature=5.0)
    expected = torch.zeros(6, dtype=torch.float64)
    chain.eval()
    for x, y in images:
        chain.zero_grad()
        (F.cross_entropy(chain(x) / 5, y)).backward()
        for p in (chain.norm1.weight, chain.norm1.bias):
            expected += (p.detach() * p.grad) ** 2 * len(y) / 20  # a batch counts by its size
    assert_close(taylor["conv1.weight"].amax((1, 2, 3)), expected, 1e-9)


class Concatenated(nn.Module):
    """Two convolutions whose channels one norm has."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 4, 3), nn.Conv2d(3, 5, 3)
        self.norm, self.fc = nn.BatchNorm2d(9), nn.Linear(9, 4)

    def forward(self, x: Tensor) -> Tensor:
        both: Tensor = self.norm(torch.cat([self.conv1(x), self.conv2(x)], 1))
        logits: Tensor = self.fc(both.relu().mean((2, 3)))
        return logits


def test_a_filter_has_the_batch_norm_score_of_its_own_channel_behind_a_concatenation(images: Batches) -> None:
    torch.manual_seed(0)
    model = Concatenated().double()
    with torch.no_grad():
        model.norm.weight.uniform_(-1, 1)
        model.norm.bias.uniform_(-1, 1)
    scale, shift = model.norm.weight, model.norm.bias
    scores = taken(gradient_flow.batch_norm, model, [], False, taylor=False, temperature=1.0)
    taylor = taken(gradient_flow.batch_norm, model, images, False, taylor=True, temperature=1.0)
    of_taylor = torch.zeros(9, dtype=torch.float64)
    for x, y in images:
        model.zero_grad()
        F.cross_entropy(model.eval()(x), y).backward()
        assert scale.grad is not None and shift.grad is not None
        of_taylor += ((scale * scale.grad) ** 2 + (shift * shift.grad) ** 2).detach() * len(y) / 20
    for name, own in (("conv1.weight", slice(0, 4)), ("conv2.weight", slice(4, 9))):
        assert torch.equal(scores[name].amax((1, 2, 3)), scale.detach()[own].abs())
        assert_close(taylor[name].amax((1, 2, 3)), of_taylor[own], 1e-9)


def test_derivatives_of_the_norms_under_gradient_flow(images: Batches) -> None:
    """Integrates d theta / dt = -g by RK4 and compares central differences with the measured quantities."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 3), nn.Tanh(), nn.Linear(3, 4)).double()
    x, y = (torch.cat(parts) for parts in zip(*images, strict=True))
    start = {name: p.detach().clone() for name, p in model.named_parameters()}

    def gradient(at: dict[str, Tensor]) -> dict[str, Tensor]:
        return torch.func.grad(lambda w: F.cross_entropy(torch.func.functional_call(model, w, (x,)), y))(at)

    def flowed(time: float, steps: int = 4) -> dict[str, Tensor]:
        state, h = start, time / steps
        for _ in range(steps):
            k1 = gradient(state)
            k2 = gradient({n: state[n] - h / 2 * k1[n] for n in state})
            k3 = gradient({n: state[n] - h / 2 * k2[n] for n in state})
            k4 = gradient({n: state[n] - h * k3[n] for n in state})
            state = {n: state[n] - h / 6 * (k1[n] + 2 * k2[n] + 2 * k3[n] + k4[n]) for n in state}
        return state

    def norm(vector: dict[str, Tensor]) -> float:
        return float(sum((v**2).sum() for v in vector.values()))

    h = 1e-4
    before, after = flowed(-h), flowed(h)
    found = signal.gradient_flow(subnetwork(model), images, F.cross_entropy)
    assert_close(found["flow/parameter_norm"] ** 2, norm(start), 1e-12)
    assert_close((norm(after) - norm(before)) / (2 * h), -2 * found["flow/weight_gradient"], 1e-5)
    second = (norm(after) - 2 * norm(start) + norm(before)) / h**2
    assert_close(second, 2 * (found["flow/gradient_norm"] ** 2 + found["flow/weight_hessian_gradient"]), 1e-5)
    of_gradient = (norm(gradient(after)) - norm(gradient(before))) / (2 * h)
    assert_close(of_gradient, -2 * found["flow/gradient_hessian_gradient"], 1e-5)
    losses = [F.cross_entropy(torch.func.functional_call(model, w, (x,)), y).item() for w in (before, after)]
    assert_close((losses[1] - losses[0]) / (2 * h), -(found["flow/gradient_norm"] ** 2), 1e-5)
    assert_close(found["flow/loss"], F.cross_entropy(model(x), y).item(), 1e-9)


def test_filter_norms_before_batch_norm_are_conserved_by_the_flow(chain: nn.Module, images: Batches) -> None:
    """In train mode the output does not depend on a filter's scale, so w g sums to zero over it."""
    signed = taken(gradient_flow.loss_preservation, chain, images[:1], True, temperature=1.0, signed=True)
    for name in ("conv1.weight", "conv2.weight"):
        sums, sizes = signed[name].flatten(1).sum(1).abs(), signed[name].flatten(1).abs().sum(1)
        assert (sums < 1e-3 * sizes).all()


def test_a_measurement_sees_the_masked_network_and_its_initial_weights() -> None:
    model = Chain().train()
    initial = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    mask = {name: torch.rand(weight.shape) < 0.5 for name, weight in masks.prunable(model).items()}
    masks.apply_(model, mask)

    def changed(net: Subnetwork, batches: Batches, loss: Loss) -> dict[str, float]:
        assert not model.training and [len(labels) for _, labels in batches] == [40]
        return {name: int((net.weights[name] != net.initial[name]).sum()) for name in net.mask}

    run = SimpleNamespace(diagnostics=changed, seed=0)
    diagnose = assembly.diagnostics(SimpleNamespace(run=run, data=FewImages()), model, initial)  # type: ignore[arg-type]
    assert diagnose is not None and model.training
    assert diagnose(mask) == {name: int((~kept).sum()) for name, kept in mask.items()}
    run.diagnostics = None
    assert assembly.diagnostics(SimpleNamespace(run=run, data=FewImages()), model, initial) is None  # type: ignore[arg-type]
