"""GraSP: what is true of it for a reason, in float64, on small networks."""

import pytest
import torch
from scored import assert_close, subnetwork, taken
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from pai_bench.analysis.gradients import hessian_gradient, mean_gradient
from pai_bench.analysis.mode import mode
from pai_bench.core import (
    Batches,
    Subnetwork,
)
from pai_bench.errors import UserError
from pai_bench.masks import masks
from pai_bench.pruners import (
    grasp,
)

PLAIN = {"absolute": False, "class_halves": False, "draws": 1, "redraw_linear": False}


def explicit_hessian_gradient(model: nn.Module, images: Batches, temperature: float) -> dict[str, Tensor]:
    """Hg from the whole Hessian of the mean loss over the prunable weights, by torch.func.hessian."""
    weights = {name: weight.detach() for name, weight in masks.prunable(model).items()}
    sizes = [weight.numel() for weight in weights.values()]
    x, y = torch.cat([x for x, _ in images]), torch.cat([y for _, y in images])

    def loss(flat: Tensor) -> Tensor:
        parts = {n: p.view(w.shape) for (n, w), p in zip(weights.items(), flat.split(sizes), strict=True)}
        return F.cross_entropy(torch.func.functional_call(model, parts, (x,)) / temperature, y)

    flat = torch.cat([weight.flatten() for weight in weights.values()])
    product = torch.func.hessian(loss)(flat) @ torch.func.grad(loss)(flat)
    return {n: p.view(w.shape) for (n, w), p in zip(weights.items(), product.split(sizes), strict=True)}


def test_sums_over_layers_follow_from_euler(images: Batches) -> None:
    """A loss that is linear in every layer: a layer's w (Hg) sums to the squared gradient norm of all others."""
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 4, 3, bias=False), nn.ReLU(), nn.Conv2d(4, 5, 3, bias=False), nn.ReLU(), nn.Flatten()
    model = nn.Sequential(*layers, nn.Linear(5 * 16, 4, bias=False)).double().eval()

    def linear(logits: Tensor, labels: Tensor) -> Tensor:
        return -logits.gather(1, labels[:, None]).mean()

    scores = grasp.score(subnetwork(model), images, linear, Generator(), temperature=1.0, **PLAIN)
    squares = {name: (g**2).sum() for name, g in mean_gradient(subnetwork(model), images, linear)[1].items()}
    assert len(scores) == 3
    for name, values in scores.items():
        assert_close(values.sum(), sum(squares.values()) - squares[name], 1e-9)


class Small(nn.Module):
    """195 prunable weights, smooth, so that its Hessian is everywhere defined."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 5, 3, stride=2, bias=True)
        self.norm = nn.BatchNorm2d(5)
        self.fc = nn.Linear(5 * 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(F.adaptive_avg_pool2d(torch.tanh(self.norm(self.conv(x))), 2).flatten(1))


@pytest.mark.parametrize("temperature", [1.0, 200.0])
@pytest.mark.parametrize("num_batches", [1, 2])
def test_grasp_equals_the_explicit_hessian(images: Batches, temperature: float, num_batches: int) -> None:
    torch.manual_seed(0)
    model = Small().double().eval()
    images = [(x, y % 3) for x, y in images[:num_batches]]
    weights, products = hessian_gradient(subnetwork(model), images, F.cross_entropy, temperature=temperature)
    expected = explicit_hessian_gradient(model, images, temperature)
    scores = grasp.score(subnetwork(model), images, F.cross_entropy, Generator(), temperature=temperature, **PLAIN)
    for name in expected:
        scale = expected[name].abs().max()
        assert_close(products[name] / scale, expected[name] / scale, 1e-9)
        assert_close(scores[name], weights[name] * products[name], 0)


def test_grasp_high_scores_are_those_whose_removal_shrinks_the_gradient(images: Batches) -> None:
    """The first-order change of |g|^2 when weight q is scaled by 1 - h is -2 h w_q (Hg)_q: the sign, by differences."""
    torch.manual_seed(0)
    model = Small().double().eval()
    images = [(x, y % 3) for x, y in images]
    scores = grasp.score(subnetwork(model), images, F.cross_entropy, Generator(), temperature=1.0, **PLAIN)
    weight, index, h = model.fc.weight, (1, 7), 1e-6
    norms = []
    for factor in (1 + h, 1 - h):
        with torch.no_grad():
            weight[index] *= factor
        _, gradients = mean_gradient(subnetwork(model), images, F.cross_entropy)
        norms.append(sum(float((g**2).sum()) for g in gradients.values()))
        with torch.no_grad():
            weight[index] /= factor
    assert_close((norms[0] - norms[1]) / (2 * h), 2 * scores["fc.weight"][index], 1e-6)


def test_grasp_layer_sums_before_batch_norm(chain: nn.Module, images: Batches) -> None:
    """Scale invariance in train mode: the sum of w * (Hg) over a convolution is minus its squared gradient norm."""
    chain.norm1.eps = chain.norm2.eps = 1e-30
    with mode(chain, True):
        net = subnetwork(chain)
        _, gradients = mean_gradient(net, images[:1], F.cross_entropy, temperature=2.0)
        scores = grasp.score(net, images[:1], F.cross_entropy, Generator(), temperature=2.0, **PLAIN)
    for name in ("conv1.weight", "conv2.weight"):
        assert_close(scores[name].sum(), -(gradients[name] ** 2).sum(), 1e-8)


def test_grasp_temperature_is_more_than_a_scale(chain: nn.Module, images: Batches) -> None:
    cold, hot = (taken(grasp.score, chain, images, True, temperature=t, **PLAIN) for t in (1.0, 200.0))
    together = torch.stack([torch.cat([s.flatten() for s in scores.values()]) for scores in (cold, hot)])
    assert torch.corrcoef(together)[0, 1] < 0.999


def test_second_derivatives_exist_for_attention() -> None:
    import timm

    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=1, embed_dim=24, num_heads=2, num_classes=4)
    images = [(torch.randn(2, 3, 32, 32), torch.tensor([0, 1]))]
    net = Subnetwork(model, masks.full(model), {}, (3, 32, 32))
    scores = grasp.score(net, images, F.cross_entropy, Generator(), temperature=200.0, **PLAIN)
    assert scores.keys() == masks.prunable(model).keys() and "blocks.0.attn.qkv.weight" in scores
    assert all(values.isfinite().all() and values.any() for values in scores.values())


def test_grasp_variants(chain: nn.Module, images: Batches) -> None:
    settings = {"temperature": 200.0, **PLAIN}
    plain = taken(grasp.score, chain, images, True, **settings)
    size = taken(grasp.score, chain, images, True, **settings | {"absolute": True})
    assert all(torch.equal(size[name], plain[name].abs()) for name in plain)
    x, y = (torch.cat(parts) for parts in zip(*images, strict=True))
    order = y.argsort(stable=True)
    halves = [(x[order[:10]], y[order[:10]]), (x[order[10:]], y[order[10:]])]
    by_hand = taken(grasp.score, chain, halves, True, **settings)
    split = taken(grasp.score, chain, images, True, **settings | {"class_halves": True})
    for name in plain:
        assert_close(split[name], by_hand[name], 1e-9)
    redrawn = taken(grasp.score, chain, images, True, **settings | {"redraw_linear": True})
    assert not torch.allclose(redrawn["fc.weight"], plain["fc.weight"])
    noise = torch.randn(chain.fc.weight.shape, generator=Generator().manual_seed(0)).double() * (2 / 12) ** 0.5
    with torch.no_grad():
        chain.fc.weight.copy_(noise)
    for name, values in taken(grasp.score, chain, images, True, **settings).items():
        assert_close(redrawn[name], values, 1e-9)


def test_grasp_draws_as_many_of_every_class_several_times(chain: nn.Module) -> None:
    """Two draws of two images of each of four classes: four chunks of two classes each."""
    generator = Generator().manual_seed(0)
    x = torch.randn(16, 3, 8, 8, dtype=torch.float64, generator=generator)
    y = torch.tensor([3, 0, 1, 2] * 4)
    of = {label: [i for i in range(16) if y[i] == label] for label in range(4)}
    chunks = [
        [of[a][start], of[a][start + 1], of[b][start], of[b][start + 1]]
        for start in (0, 2)
        for a, b in ((0, 1), (2, 3))
    ]
    settings = {"temperature": 200.0, **PLAIN}
    by_hand = taken(grasp.score, chain, [(x[chunk], y[chunk]) for chunk in chunks], True, **settings)
    drawn_twice = settings | {"class_halves": True, "draws": 2}
    found = taken(grasp.score, chain, [(x[:10], y[:10]), (x[10:], y[10:])], True, **drawn_twice)
    once = taken(grasp.score, chain, [(x, y)], True, **settings | {"class_halves": True})
    for name in found:
        assert_close(found[name], by_hand[name], 1e-9)
        assert not torch.allclose(found[name], once[name])
    with pytest.raises(UserError, match=r"pruner.score.draws=9: of 16 images a half is left without any"):
        taken(grasp.score, chain, [(x, y)], True, **settings | {"class_halves": True, "draws": 9})


def test_grasp_of_a_pruned_network_looks_at_the_gradient_that_training_follows(
    chain: nn.Module, images: Batches
) -> None:
    """Moving the kept weights changes the squared norm of their gradient by 2 d'H g, with g on them alone."""
    chain.eval()
    generator = Generator().manual_seed(0)
    mask = {name: torch.rand(w.shape, generator=generator) < 0.5 for name, w in masks.full(chain).items()}
    net = subnetwork(chain, mask)
    scores = grasp.score(net, images, F.cross_entropy, Generator(), temperature=1.0, **PLAIN)
    weights = {name: (w * mask[name]).detach() for name, w in net.weights.items()}

    def squared_norm(step: float) -> float:
        moved = {name: (1 + step) * w for name, w in weights.items()}
        _, gradients = mean_gradient(net, images, F.cross_entropy, at=moved)
        return sum(float((g[mask[name]] ** 2).sum()) for name, g in gradients.items())

    change = (squared_norm(1e-5) - squared_norm(-1e-5)) / 2e-5
    assert_close(sum(float(s.sum()) for s in scores.values()), change / 2, 1e-6)
