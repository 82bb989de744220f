"""NTK-SAP against explicit Jacobians, what it does not depend on, and the statistics of norms after a pass."""

from collections.abc import Callable

import pytest
import torch
from conftest import Chain, composed, drawn, pruned_as, residual
from scored import SHAPE, assert_close
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from pai_bench.analysis.mode import mode
from pai_bench.analysis.norm_statistics import statistics
from pai_bench.core import Scores, Subnetwork, TrainingLength, Weights
from pai_bench.errors import ConfigError, UserError
from pai_bench.masks import allocation, masks
from pai_bench.pruners import ntk_sap
from pai_bench.pruning import scoring
from pai_bench.pruning.pruned import Pruned
from pai_bench.pruning.rounds import prune
from pai_bench.system import seeding

SETTINGS = {"epsilon": 0.01, "repeats": 2, "images_per_class": 3, "batch_size": 8}


def redrawing(build: Callable[[], nn.Module]) -> Callable[[Generator], Weights]:
    return scoring.Redraw(build, torch.device("cpu"), torch.float64)


def scores_of(
    model: nn.Module,
    build: Callable[[], nn.Module],
    mask: masks.Mask | None = None,
    shape: tuple[int, int, int] = SHAPE,
    seed: int = 0,
    **settings: object,
) -> Scores:
    mask = masks.full(model) if mask is None else mask
    net = Subnetwork(model, mask, drawn(model), shape, redraw=redrawing(build))
    with mode(model, False):
        chosen = SETTINGS | settings
        return ntk_sap.score(net, [], F.cross_entropy, Generator().manual_seed(seed), **chosen)  # type: ignore[arg-type]


def joined(scores: Scores) -> Tensor:
    return torch.cat([values.flatten() for values in scores.values()])


@pytest.mark.parametrize("build", [Chain, residual])
def test_pruned_weights_score_zero_and_weights_of_the_network_play_no_part(build: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    model, other = build().double(), build().double()
    generator = Generator().manual_seed(0)
    mask = {name: torch.rand(kept.shape, generator=generator) < 0.5 for name, kept in masks.full(model).items()}
    scores = scores_of(model, build, mask)
    assert all((scores[name][~kept] == 0).all() and (scores[name][kept] > 0).any() for name, kept in mask.items())
    with torch.no_grad():
        for buffer in other.buffers():
            buffer.add_(1)
    for name, values in scores_of(other, build, mask).items():
        assert torch.equal(values, scores[name])
    assert not torch.equal(joined(scores_of(model, build, mask, seed=1)), joined(scores))


class Smooth(nn.Module):
    """A chain without kinks."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(3, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)
        self.conv2, self.norm2 = nn.Conv2d(6, 8, 3, padding=1, stride=2, bias=False), nn.BatchNorm2d(8)
        self.fc = nn.Linear(8, 4)
        for weight in (self.conv1.weight, self.conv2.weight, self.fc.weight):
            nn.init.kaiming_normal_(weight)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.norm1(self.conv1(x)))
        return self.fc(torch.tanh(self.norm2(self.conv2(x))).mean((2, 3)))


def test_it_comes_to_the_derivative_of_the_trace_of_the_tangent_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """As epsilon falls, S / epsilon^2 comes to |J z|^2. Its sum over unit vectors z, as its mean over normal z, is the
    trace of J J'."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 3, bias=False), nn.Tanh(), nn.Linear(3, 2, bias=False)).double()
    weights = {name: weight.detach() for name, weight in masks.prunable(model).items()}
    images = torch.randn(3, 4, 1, 1, dtype=torch.float64)
    ones = tuple(torch.ones_like(weight) for weight in weights.values())

    def trace(*mask: Tensor) -> Tensor:
        def outputs(*values: Tensor) -> Tensor:
            named = {name: value * factor for name, value, factor in zip(weights, values, mask, strict=True)}
            return torch.func.functional_call(model, named, (images,))

        jacobians = torch.autograd.functional.jacobian(outputs, tuple(weights.values()), create_graph=True)
        return torch.stack([(part**2).sum() for part in jacobians]).sum()

    expected = torch.autograd.functional.jacobian(trace, ones)
    net = Subnetwork(model, masks.full(model), drawn(model), (4, 1, 1), redraw=lambda _: weights)
    units = torch.eye(sum(map(torch.numel, weights.values())), dtype=torch.float64)
    total = [torch.zeros_like(weight) for weight in weights.values()]
    for unit in units:
        parts = iter(unit.split([weight.numel() for weight in weights.values()]))
        monkeypatch.setattr(ntk_sap, "_normal", lambda shape, like, generator, parts=parts: next(parts).view(shape))
        mask = {name: factor.clone().requires_grad_() for name, factor in zip(weights, ones, strict=True)}
        change = ntk_sap._change(net, images, mask, 1e-5, Generator())
        for one, gradient in zip(total, torch.autograd.grad(change, list(mask.values())), strict=True):
            one.add_(gradient / 1e-5**2)
    for one, value in zip(total, expected, strict=True):
        torch.testing.assert_close(one, value, rtol=1e-3, atol=1e-3 * float(value.abs().max()))


def test_the_size_of_the_change_hardly_changes_the_ranking_of_a_smooth_network() -> None:
    torch.manual_seed(0)
    model, sizes = Smooth().double(), (0.01, 0.001, 0.0001)
    # A change of odd order has either sign: it takes many repeats until it cancels out.
    ranks = [joined(scores_of(model, Smooth, epsilon=size, repeats=300)).argsort().argsort().double() for size in sizes]
    assert torch.corrcoef(torch.stack(ranks)).min() > 0.99


def test_masks_nest_and_no_trace_is_left() -> None:
    torch.manual_seed(0)
    model = Chain().double().train()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    random = torch.get_rng_state()
    mask = masks.full(model)
    total = masks.total(mask)
    for number in range(1, 6):
        keep = round(total * 0.05 ** (number / 5))
        found = allocation.global_topk(scores_of(model, Chain, mask), mask, keep, Generator(), min_density=0.0).mask
        assert not any((found[name] & ~mask[name]).any() for name in mask)
        mask = found
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert all(module.training for module in model.modules())
    assert model.norm1.momentum == 0.1
    assert torch.equal(torch.get_rng_state(), random)


def test_each_batch_has_weights_of_its_own() -> None:
    torch.manual_seed(0)
    model, made = Chain().double(), []

    def build() -> nn.Module:
        made.append(Chain())
        return made[-1]

    scores_of(model, build)  # 3 images of 4 classes in batches of 8, twice
    assert len(made) == 4
    assert len({float(one.conv1.weight.detach().sum()) for one in made}) == 4


def test_what_it_needs_is_said() -> None:
    model = Chain().double()
    net = Subnetwork(model, masks.full(model), drawn(model), SHAPE)
    with pytest.raises(UserError, match=r"pruner.redraws=null: .*; set it to true"):
        ntk_sap.score(net, [], F.cross_entropy, Generator(), **SETTINGS)  # type: ignore[arg-type]
    net = Subnetwork(model.train(), masks.full(model), drawn(model), SHAPE, redraw=redrawing(Chain))
    with pytest.raises(UserError, match=r"pruner.mode=train: .*; set pruner.mode=eval"):
        ntk_sap.score(net, [], F.cross_entropy, Generator(), **SETTINGS)  # type: ignore[arg-type]


# The statistics of norms ----------------------------------------------------------------------------------------------


def test_statistics_are_those_of_the_images_and_leave_no_trace() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.BatchNorm2d(3), nn.Dropout(), nn.Flatten(), nn.Linear(192, 4)).double()
    model[0].momentum, model[3].training = 0.3, False
    images = [torch.randn(size, *SHAPE, dtype=torch.float64) * 3 + 1 for size in (6, 2)]
    found = statistics(model, {}, images)
    means = [x.mean((0, 2, 3)) for x in images]
    variances = [x.var((0, 2, 3)) for x in images]
    assert_close(found["0.running_mean"], (6 * means[0] + 2 * means[1]) / 8, 1e-12)
    assert_close(found["0.running_var"], (6 * variances[0] + 2 * variances[1]) / 8, 1e-12)
    assert_close(model[0].running_mean, torch.zeros(3), 0.0)
    assert [module.training for module in model] == [True, True, True, False]
    assert model[0].momentum == 0.3


def pass_before(model: nn.Module, *overrides: str, num_images: int = 40) -> tuple[Scores, list[int]]:
    """The scores of SNIP after a pass; and how many images were drawn, each time."""
    drawings = []

    def draw(wanted: object, generator: Generator, dtype: torch.dtype) -> list[tuple[Tensor, Tensor]]:
        total = wanted.total  # type: ignore[attr-defined]
        if total > num_images:
            raise ConfigError(f"pruner.scoring_data.total={total}: there are {num_images} training images; give fewer")
        drawings.append(total)
        images = torch.randn(total, *SHAPE, generator=generator, dtype=dtype) * 2 + 1
        return [(images, torch.arange(total) % 4)]

    words = ["pruner=snip", "sparsity=0.5", "pruner.scoring_data.total=12", *overrides]
    pruned = pruned_as(model, SHAPE, *words, draw=draw)
    assert pruned.scores is not None and pruned.num_examples == sum(drawings)
    return pruned.scores, drawings


PASS = ("pruner.mode=eval_after_pass", "+pruner.pass_images=30")


def test_a_pass_sets_the_statistics_with_which_scores_are_taken() -> None:
    """Against a network whose own running statistics are set by hand."""
    torch.manual_seed(0)
    model = Chain()
    by_hand = Chain()
    by_hand.load_state_dict(model.state_dict())
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    scores, drawings = pass_before(model, *PASS)
    assert drawings == [12, 30]
    assert all(torch.equal(buffer, buffers[name]) for name, buffer in model.named_buffers())
    shown = torch.randn(30, *SHAPE, generator=seeding.generator(0, "pass", 1), dtype=torch.float64) * 2 + 1
    by_hand.double().load_state_dict(by_hand.state_dict() | statistics(by_hand, {}, [shown]))
    expected, _ = pass_before(by_hand)
    for name, values in scores.items():
        torch.testing.assert_close(values, expected[name], rtol=1e-9, atol=1e-14)
    torch.manual_seed(0)
    assert not torch.allclose(pass_before(Chain())[0]["conv1.weight"], scores["conv1.weight"])


def test_a_pass_that_changes_nothing_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"^pruner.mode=eval_after_pass: pruner=synflow looks at no images; set"):
        composed("pruner=synflow", "sparsity=0.5", "pruner.mode=eval_after_pass")
    with pytest.raises(ConfigError, match=r"^pruner.pass_images=50: it needs pruner.mode=eval_after_pass"):
        composed("pruner=snip", "sparsity=0.5", "+pruner.pass_images=50")
    with pytest.raises(ConfigError, match=r"^pruner.mode=eval_after_pass: the network has no norms with running stat"):
        pass_before(Chain(norm=False), *PASS)
    with pytest.raises(ConfigError, match=r"^pruner.pass_images=1000: there are 40 training images; give fewer"):
        pass_before(Chain(), "pruner.mode=eval_after_pass")


def test_a_new_mode_renames_no_run() -> None:
    plain = composed("pruner=snip", "sparsity=0.5")
    assert composed("pruner=snip", "sparsity=0.5", "+pruner.pass_images=null").id == plain.id
    assert composed("pruner=snip", "sparsity=0.5", "pruner.mode=eval_after_pass").id != plain.id


def searched(build: Callable[[], nn.Module], *overrides: str) -> Pruned:
    """What a search finds that may draw new weights."""
    torch.manual_seed(0)
    model = Chain()
    cfg = composed("sparsity=0.9", *overrides)
    return prune(
        model,
        cfg.pruner,
        cfg.allocation,
        cfg.schedule(0.9, TrainingLength(1, 1)),
        initial=drawn(model),
        input_shape=SHAPE,
        draw=lambda *_: [],
        loss=F.cross_entropy,
        seed=0,
        build=build,
    )


def test_a_search_builds_networks_for_pruners_that_redraw() -> None:
    made = []

    def build() -> nn.Module:
        made.append(1)
        return Chain()

    pruned = searched(build, "pruner=ntk_sap", "schedule.rounds=3", "pruner.score.repeats=2")
    assert len(made) == 3 * 2
    assert masks.kept(pruned.mask) == round(0.1 * masks.total(pruned.mask))


def test_a_score_that_draws_no_weights_may_not_say_that_it_does() -> None:
    with pytest.raises(ConfigError, match=r"^pruner.redraws=true: pruner=magnitude draws no new weights; give null"):
        searched(Chain, "pruner=magnitude", "+pruner.redraws=true")
