"""SynFlow-L2 and PX: conservation, the sum over paths, gates, and the forms of released code."""

import copy
import itertools
import math
from collections.abc import Callable

import pytest
import torch
from conftest import Chain, composed, residual
from scored import SHAPE, assert_close, subnetwork, taken
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from pai_bench.analysis import gates
from pai_bench.analysis.mode import mode
from pai_bench.core import Batches, Scores, Subnetwork
from pai_bench.errors import ConfigError, UserError
from pai_bench.masks import allocation, masks
from pai_bench.pruners import px, px_official, synflow_l2


def l2(model: nn.Module, factor: str = "square") -> Scores:
    return taken(synflow_l2.score, model, [], False, factor=factor)


def of_px(model: nn.Module, batches: Batches, gradient: str = "sum") -> Scores:
    return taken(px.score, model, batches, False, gradient=gradient)


def flow_of_squares(model: nn.Module) -> Tensor:
    """The outputs for an all-ones image of a network whose parameters are squared."""
    squared = copy.deepcopy(model).eval()
    with torch.no_grad():
        for parameter in squared.parameters():
            parameter.pow_(2)
        return squared(torch.ones((1, *SHAPE), dtype=torch.float64))


def alike(scores: Scores, others: Scores, tolerance: float = 1e-9) -> None:
    """Checks that scores are the same up to one factor, which ranks nothing."""
    largest, other = (max(float(values.max()) for values in found.values()) for found in (scores, others))
    for name, values in scores.items():
        assert_close(values / largest, others[name] / other, tolerance)


# SynFlow-L2 -----------------------------------------------------------------------------------------------------------


def test_synflow_l2_has_the_same_sum_in_every_layer_of_a_chain(chain: nn.Module) -> None:
    for values in l2(chain).values():
        assert (values >= 0).all()
        assert_close(values.sum(), flow_of_squares(chain).sum(), 1e-12)


def test_synflow_l2_is_conserved_through_every_channel(chain: nn.Module) -> None:
    scores = l2(chain)
    assert_close(scores["conv1.weight"].sum((1, 2, 3)), scores["conv2.weight"].sum((0, 2, 3)), 1e-12)
    assert_close(scores["conv2.weight"].sum((1, 2, 3)), scores["fc.weight"].sum(0), 1e-12)


def test_branches_of_a_residual_block_add_up() -> None:
    torch.manual_seed(0)
    model = residual().double()
    sums = {name: values.sum() for name, values in l2(model).items()}
    whole = flow_of_squares(model).sum()
    assert_close(sums["stages.1.0.conv2.weight"] + sums["stages.1.0.shortcut.0.weight"], whole, 1e-12)
    assert_close(sums["fc.weight"], whole, 1e-12)


def test_the_form_of_released_code_multiplies_by_the_size(chain: nn.Module) -> None:
    scores, released = l2(chain), l2(chain, "size")
    for name, weight in masks.prunable(chain).items():
        assert_close(released[name] * weight.abs(), scores[name], 1e-12)
    assert len({round(float(values.sum()), 6) for values in released.values()}) == 3  # it conserves nothing


# PX -------------------------------------------------------------------------------------------------------------------


def perceptron(sizes: tuple[int, ...], relu: bool) -> nn.Module:
    torch.manual_seed(0)
    layers: list[nn.Module] = [nn.Flatten()]
    for num_in, num_out in itertools.pairwise(sizes):
        layers += [nn.Linear(num_in, num_out, bias=False), nn.ReLU(inplace=True) if relu else nn.Identity()]
    return nn.Sequential(*layers[:-1]).double()


def by_paths(model: nn.Module, images: Tensor, mask: masks.Mask, relu: bool) -> tuple[Scores, int]:
    """PX of a perceptron of one hidden layer, one path at a time; and the number of paths."""
    (first, w1), (second, w2) = masks.prunable(model).items()
    kept1, kept2 = mask[first], mask[second]
    is_open = (images @ w1.T > 0) if relu else torch.ones(len(images), len(w1), dtype=torch.bool)
    scores = {first: torch.zeros_like(w1), second: torch.zeros_like(w2)}
    paths = list(itertools.product(range(w1.shape[1]), range(w1.shape[0]), range(w2.shape[0])))

    def exists(path: tuple[int, int, int]) -> bool:
        i, j, k = path
        return bool(kept1[j, i] and kept2[k, j])

    for k in range(len(w2)):
        of_image = sum(
            float(images[b, i] ** 2) * bool(is_open[b, j])
            for b in range(len(images))
            for i, j, end in paths
            if end == k and exists((i, j, end))
        )
        for i, j, end in paths:
            if end == k and exists((i, j, end)):
                of_weights = float(w1[j, i] ** 2 * w2[k, j] ** 2)
                scores[first][j, i] += of_weights * of_image
                scores[second][k, j] += of_weights * of_image
    return scores, len(paths)


@pytest.mark.parametrize("relu", [False, True], ids=["linear", "relu"])
@pytest.mark.parametrize("pruned", [False, True], ids=["whole", "pruned"])
def test_px_is_the_sum_over_paths(relu: bool, pruned: bool) -> None:
    model = perceptron((3, 3, 2), relu)
    images = torch.randn(5, 3, 1, 1, generator=Generator().manual_seed(1), dtype=torch.float64)
    mask = masks.full(model)
    if pruned:
        mask["1.weight"][0, 1] = mask["3.weight"][1, 2] = False
    net = subnetwork(model, mask)
    net = Subnetwork(net.model, net.mask, net.initial, (3, 1, 1))
    with torch.no_grad():
        expected, num_paths = by_paths(model, images.flatten(1), mask, relu)
    assert num_paths == 18
    scores = px.score(net, [(images, torch.zeros(5).long())], F.cross_entropy, Generator(), gradient="sum")
    alike(scores, expected, 1e-12)
    assert all((scores[name][~kept] == 0).all() for name, kept in mask.items())


def test_px_has_the_same_sum_in_every_layer_of_a_chain(chain: nn.Module, images: Batches) -> None:
    scores = of_px(chain, images)
    sums = [values.sum() for values in scores.values()]
    assert all((values >= 0).all() for values in scores.values())
    assert_close(torch.stack(sums), sums[0].expand(3), 1e-12)


def test_px_of_ones_without_gates_is_synflow_l2() -> None:
    """Then every output has the same number of paths, which is a factor of all scores."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.Conv2d(4, 2, 3), nn.Flatten(), nn.Linear(32, 4)).double()
    ones = [(torch.ones(2, *SHAPE, dtype=torch.float64), torch.zeros(2).long())]
    alike(of_px(model, ones), l2(model), 1e-12)


def test_signs_of_weights_count_only_through_gates(chain: nn.Module, images: Batches) -> None:
    mask = masks.full(chain)
    mask["fc.weight"][0, 1:4] = mask["fc.weight"][2, :6] = False  # so that outputs differ in their paths

    def scores() -> Scores:
        with mode(chain, False):
            return px.score(subnetwork(chain, mask), images, F.cross_entropy, Generator(), gradient="sum")

    before = scores()
    with torch.no_grad():  # the classifier comes after all gates
        chain.fc.weight.neg_()
    assert all(torch.equal(before[name], values) for name, values in scores().items())
    with torch.no_grad():
        chain.conv1.weight.neg_()
    assert not torch.equal(scores()["conv2.weight"], before["conv2.weight"])


def test_images_tell_outputs_apart_only_where_these_differ_in_their_paths(chain: nn.Module, images: Batches) -> None:
    """With a whole last layer the flow of the image is the same for every output, so PX ranks as SynFlow-L2 does."""
    alike(of_px(chain, images), l2(chain), 1e-12)


def test_statistics_of_norms_belong_to_no_path(images: Batches) -> None:
    """As in a pretrained network, or after some training. The running means once clipped the flow of weights."""
    torch.manual_seed(0)
    model = Chain().double()
    nn.init.uniform_(model.norm1.running_mean, 0.5, 1.5)
    nn.init.uniform_(model.norm2.running_mean, 0.5, 1.5)
    scores = of_px(model, images)
    for values in scores.values():
        assert_close(values.sum(), scores["fc.weight"].sum(), 1e-12)


def test_px_ignores_labels_and_the_order_of_images(chain: nn.Module, images: Batches) -> None:
    before = of_px(chain, images)
    other = [(x.flip(0), y.roll(1)) for x, y in reversed(images)]
    for name, values in of_px(chain, other).items():
        assert_close(values, before[name], 1e-12)


def test_squares_of_the_gradients_of_batches(chain: nn.Module, images: Batches) -> None:
    """w^2 times the sum of g^2, where w^2 g is the score of each batch, on one scale."""
    squared = of_px(chain, images, "sum_of_squares")
    with mode(chain, False):
        flows = [px._flow_of_images(subnetwork(chain), x) for x, _ in images]
    parts = []
    for (x, y), flow in zip(images, flows, strict=True):
        parts.append({name: values * flow.max() for name, values in of_px(chain, [(x, y)]).items()})
    weights = masks.prunable(chain)
    expected = {n: sum(part[n] ** 2 for part in parts) / weights[n].detach() ** 2 for n in squared}
    alike(squared, expected, 1e-9)
    assert not torch.allclose(squared["conv1.weight"], of_px(chain, images)["conv1.weight"])


def test_px_ranks_the_same_whatever_the_scale_of_the_images(chain: nn.Module, images: Batches) -> None:
    larger = [(100 * x, y) for x, y in images]
    chain.eval()
    alike(of_px(chain, larger), of_px(chain, images), 1e-12)  # without biases gates do not depend on the scale


def test_gates_are_those_of_every_kind_of_relu() -> None:
    x = torch.tensor([[-1.0, 2.0, 0.0, 3.0]])

    def network(given: Tensor) -> Tensor:
        given = nn.ReLU(inplace=True)(given.clone() + 0)
        given = torch.relu(given - 2.5)
        return (given - 0.1).relu_()

    found: list[Tensor] = []
    with gates.recorded("a score", found):
        plain = network(x)
    assert torch.equal(plain, network(x))
    assert [one.int().tolist() for one in found] == [[[0, 1, 0, 1]], [[0, 0, 0, 1]], [[0, 0, 0, 1]]]
    with gates.replayed("a score", found):
        assert network(-x).tolist() == [[0.0, 0.0, 0.0, pytest.approx(-5.6)]]
    with gates.opened("a score"):
        assert network(x)[0, 0] == pytest.approx(-3.6)


class Calls(nn.Module):
    """A function as a layer."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


OTHER_ACTIVATIONS = [
    *(nn.GELU(), nn.SiLU(), nn.LeakyReLU(), nn.ReLU6(), nn.Tanh(), nn.Sigmoid(), nn.Threshold(0, 0), nn.Softsign()),
    *(nn.LogSigmoid(), nn.Softshrink(), nn.Hardshrink(), nn.Tanhshrink(), nn.ELU(inplace=True), nn.CELU(inplace=True)),
    Calls(lambda x: x.clamp(min=0)),
    Calls(lambda x: torch.maximum(x, torch.zeros_like(x))),
    Calls(lambda x: x.clone().clamp_(0, 1)),
    Calls(torch.exp),
]


@pytest.mark.parametrize("activation", OTHER_ACTIVATIONS, ids=str)
def test_other_activations_are_refused(activation: nn.Module, images: Batches) -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 8), activation, nn.Linear(8, 4)).double()
    with pytest.raises(UserError, match=r"^PX is defined for networks of ReLUs.*choose another pruner"):
        of_px(model, images)


def test_px_says_when_it_overflows(images: Batches) -> None:
    model = perceptron((192, *[300] * 18, 4), relu=False).float()
    single = [(x.float(), y) for x, y in images]
    with pytest.raises(UserError, match=r"^PX overflows float32 on this model; choose a wider type"):
        of_px(model, single)
    scores = of_px(model.double(), images)
    assert all(values.isfinite().all() and values.any() for values in scores.values())


# Released code --------------------------------------------------------------------------------------------------------


def of_2024(model: Chain, images: Tensor) -> Scores:
    """The form of 2024 on a chain, each of its three networks written out."""

    def run(x: Tensor, weights: dict[str, Tensor], gate: Callable[[Tensor, int], Tensor]) -> Tensor:
        for number, norm in ((1, model.norm1), (2, model.norm2)):
            layer = getattr(model, f"conv{number}")
            x = F.conv2d(x, weights[f"conv{number}.weight"], stride=layer.stride, padding=1)
            x = gate(F.batch_norm(x, None, None, norm.weight, norm.bias, training=True), number)
        return F.linear(x.mean((2, 3)), weights["fc.weight"])

    weights = {name: weight.detach().clone() for name, weight in masks.prunable(model).items()}
    is_open: dict[int, Tensor] = {}

    def real(x: Tensor, number: int) -> Tensor:
        is_open[number] = x > 0
        return x.clamp(min=0)

    run(images, weights, real)
    ones = {name: torch.ones_like(weight) for name, weight in weights.items()}
    squared = {name: (weight**2).requires_grad_() for name, weight in weights.items()}
    of_images = run(images, ones, lambda x, number: x * is_open[number])
    (of_images.detach() * run(images, squared, lambda x, _: x)).sum().backward()
    return {name: leaf.grad.abs() * weights[name] ** 4 for name, leaf in squared.items() if leaf.grad is not None}


def test_px_as_released_in_2024(chain: Chain, images: Batches) -> None:
    with torch.no_grad():
        chain.norm1.weight.uniform_(0.5, 1.5)
        chain.norm2.bias.uniform_(-0.5, 0.5)
    scores = taken(px_official.score, chain, images, True)
    expected = [of_2024(chain, x) for x, _ in images]
    signed = taken(px_official.score, chain, images[:1], True)
    for name, values in signed.items():
        torch.testing.assert_close(values, expected[0][name], rtol=1e-8, atol=1e-8 * float(values.max()))
        assert (scores[name] >= 0).all() and not torch.equal(scores[name], values)


def test_an_image_of_ones_says_nothing_under_batch_statistics(chain: Chain) -> None:
    """Why the form of 2025 is no option: norms centre every channel, so its mean is what the norm adds."""
    ones = torch.ones(4, *SHAPE, dtype=torch.float64)
    net = subnetwork(chain)
    squared = {name: (weight**2).requires_grad_() for name, weight in net.weights.items()}
    with mode(chain, True), gates.opened("a score"):
        outputs = net(ones, squared)
    for gradient in torch.autograd.grad(outputs.square().sum() + outputs.sum(), list(squared.values())):
        assert gradient.abs().max() < 1e-12


def test_px_as_released_asks_for_batch_statistics(chain: nn.Module, images: Batches) -> None:
    with pytest.raises(UserError, match=r"the network is in eval mode, .* set pruner.mode=train"):
        taken(px_official.score, chain, images, False)


@pytest.mark.parametrize("asked", ["eval", "eval_after_pass"])
def test_px_as_released_refuses_another_mode_by_its_name(asked: str) -> None:
    with pytest.raises(ConfigError, match=rf"^pruner.mode={asked}: .* batch statistics; set pruner.mode=train"):
        composed("pruner=px_official_2024", "sparsity=0.5", f"pruner.mode={asked}")


@pytest.mark.parametrize(("score", "settings"), [(px.score, {"gradient": "sum"}), (px_official.score, {})])
def test_px_needs_images(score: Callable[..., Scores], settings: dict[str, str], chain: nn.Module) -> None:
    with pytest.raises(UserError, match=r"^pruner.scoring_data=null"):
        taken(score, chain, [], True, **settings)


def test_masks_nest_and_no_layer_of_a_chain_collapses(chain: nn.Module, images: Batches) -> None:
    """Every layer has the same total, so the last weight of a layer scores highest."""
    for found in (lambda: l2(chain), lambda: of_px(chain, images)):
        mask = masks.full(chain)
        total = masks.total(mask)
        for number in range(1, 31):
            keep = math.ceil(total * (6 / total) ** (number / 30))
            narrower = allocation.global_topk(found(), mask, keep, Generator(), min_density=0.0).mask
            assert not any((narrower[name] & ~mask[name]).any() for name in mask)
            mask = narrower
            masks.apply_(chain, mask)
        assert all(kept.any() for kept in mask.values())
        torch.manual_seed(0)
        chain.load_state_dict(Chain().double().state_dict())
