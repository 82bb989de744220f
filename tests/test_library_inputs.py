"""What prune takes from Python: examples, functions in place of names, and what it refuses."""

import copy
import logging
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Chain
from few_images import SHAPE, random_batches, same
from safetensors.torch import save_file
from torch import Generator, nn
from torch.nn import functional as F
from torch.nn.utils import prune as torch_prune

import pai_bench as pb
from pai_bench.core import Batches, Loss, Mask, Round, Scores, Selection, Subnetwork, TrainingLength
from pai_bench.errors import ConfigError, UserError
from pai_bench.masks import masks, selection

# Which examples -------------------------------------------------------------------------------------------------------


class Seen:
    """A score that notes what it is given."""

    def __init__(self) -> None:
        self.rounds: list[list[tuple[torch.Tensor, torch.Tensor]]] = []

    def __call__(self, net: Subnetwork, batches: Batches, loss: Loss, generator: Generator) -> Scores:
        self.rounds.append(list(batches))
        return {name: weight.abs() for name, weight in net.weights.items()}


def numbered(size: int, number: int, classes: int = 4) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Batches whose images hold their own number."""
    images = torch.arange(float(size * number)).view(-1, 1, 1, 1).expand(-1, *SHAPE)
    labels = torch.arange(size * number) // 3 % classes
    return list(zip(images.split(size), labels.split(size), strict=True))


def examples_of(data: Any, rounds: int = 1, **settings: Any) -> list[list[int]]:
    """The numbers of the examples that each round sees."""
    seen = Seen()
    given = {f"pruner.scoring_data.{key}": value for key, value in settings.items()}
    schedule = {"schedule": "linear"} if rounds > 1 else {}
    if rounds > 1:
        given["schedule.rounds"] = rounds
    torch.manual_seed(0)
    pb.prune(Chain(), seen, sparsity=0.5, data=data, settings=given, **schedule)
    for batches in seen.rounds:
        for images, labels in batches:
            assert images.dtype == torch.float64 and torch.equal(labels, images[:, 0, 0, 0].long() // 3 % 4)
    return [[int(n) for images, _ in batches for n in images[:, 0, 0, 0]] for batches in seen.rounds]


def test_the_examples_are_the_first_ones_and_each_round_takes_the_next() -> None:
    assert examples_of(numbered(8, 4), total=10) == [list(range(10))]
    assert examples_of(numbered(8, 4), 3, total=10) == [list(range(10)), list(range(10, 20)), list(range(20, 30))]
    # Too few are left for the third round, so it starts over.
    assert examples_of(numbered(8, 3), 3, total=10) == [list(range(10)), list(range(10, 20)), list(range(10))]


def test_examples_are_balanced_where_the_settings_say_so() -> None:
    first = [0, 1, 3, 4, 6, 7, 9, 10]  # two of each class, of which three come in a row
    assert examples_of(numbered(8, 4), total=None, per_class=2) == [first]
    assert examples_of(numbered(8, 4), total=9, balanced=True) == [first]
    assert examples_of(numbered(8, 4), total=None, per_class=2, balanced=False) == [list(range(8))]
    assert examples_of(numbered(8, 4), 2, total=None, per_class=2) == [first, [11, 12, 13, 15, 16, 18, 19, 21]]


def test_batches_are_as_large_as_the_settings_say_and_none_is_of_one_image() -> None:
    seen = Seen()
    sizes = {"pruner.scoring_data.total": 21, "pruner.scoring_data.batch_size": 5}
    pb.prune(Chain(), seen, sparsity=0.5, data=numbered(8, 4), settings=sizes)
    assert [len(labels) for _, labels in seen.rounds[0]] == [5, 5, 5, 6]


def test_what_can_be_walked_once_is_enough_for_one_walk() -> None:
    once: Iterator[Any] = iter(numbered(8, 4))
    assert examples_of(once, total=10) == [list(range(10))]
    with pytest.raises(ConfigError, match=r"data: it ends and cannot be walked again before a round has .*total=10"):
        examples_of(iter(numbered(8, 2)), 2, total=10)


def test_only_as_much_of_a_loader_is_read_as_is_used() -> None:
    read = []

    def endless() -> Iterator[Any]:
        for number in range(1000):
            read.append(number)
            yield numbered(8, 1)[0]

    pb.prune(Chain(), Seen(), sparsity=0.5, data=endless(), settings={"pruner.scoring_data.total": 20})
    assert read == [0, 1, 2]


# Functions in place of names ------------------------------------------------------------------------------------------


def by_size(net: Subnetwork, batches: Batches, loss: Loss, generator: Generator, *, power: float = 1.0) -> Scores:
    return {name: weight.abs() ** power for name, weight in net.weights.items()}


def test_functions_stand_in_for_names(chain: nn.Module) -> None:
    def halves(sparsity: float, length: TrainingLength) -> list[Round]:
        return [Round(sparsity / 2), Round(sparsity)]

    def globally(scores: Scores, candidates: Mask, keep: int, generator: Generator) -> Selection:
        return selection.keep_largest(scores, candidates, keep)

    plain = pb.prune(copy.deepcopy(chain), "magnitude", sparsity=0.8)
    score = partial(by_size, power=2.0)
    assert same(pb.prune(copy.deepcopy(chain), score, sparsity=0.8, schedule=halves, allocation=globally), plain)
    assert same(pb.prune(copy.deepcopy(chain), score, sparsity=0.8, data=random_batches()), plain)
    uniform = pb.prune(copy.deepcopy(chain), score, sparsity=0.8, allocation="uniform")
    assert max(masks.densities(uniform).values()) < 0.22 < max(masks.densities(plain).values())

    def too_many(scores: Scores, candidates: Mask, keep: int, generator: Generator) -> Selection:
        return selection.keep_largest(scores, candidates, keep + 1)

    with pytest.raises(ConfigError, match=r"^allocation: it keeps 126 weights; keep exactly 125$"):
        pb.prune(copy.deepcopy(chain), score, sparsity=0.8, allocation=too_many)


def test_a_setting_can_be_a_path_with_any_letters(chain: nn.Module, tmp_path: Path) -> None:
    other = pb.prune(copy.deepcopy(chain), "synflow", sparsity=0.8, input_shape=SHAPE)
    path = tmp_path / "o'brien's {mask} = 1, 2.safetensors"
    save_file(other, path)
    allocation = {"allocation": "densities_of_mask", "settings": {"allocation.mask": str(path)}}
    mask = pb.prune(chain, "random", sparsity=0.8, **allocation)  # type: ignore[arg-type]
    assert masks.densities(mask) == masks.densities(other) and not same(mask, other)


def test_a_loss_of_ones_own_is_used(chain: nn.Module) -> None:
    data = random_batches()

    def squared(outputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return (outputs - F.one_hot(labels, 4)).square().mean()

    ours = pb.prune(copy.deepcopy(chain), "gradient_norm", sparsity=0.9, data=data, loss=squared)
    net = copy.deepcopy(chain).eval()
    images, labels = (torch.cat(part)[:100] for part in zip(*data, strict=True))
    squared(net(images.double()), labels).backward()
    scores = {name: weight.grad.abs() for name, weight in masks.prunable(net).items()}  # type: ignore[union-attr]
    assert same(ours, selection.keep_largest(scores, masks.full(net), masks.kept(ours)).mask)


def test_a_search_goes_on_from_a_mask_as_iterative_magnitude_pruning_does(chain: nn.Module) -> None:
    mask = None
    for sparsity in (0.3, 0.6, 0.8):
        before = mask
        with torch.no_grad():  # as training would
            chain.fc.weight += 0.01
        mask = pb.prune(chain, "magnitude", sparsity=sparsity, mask=mask)
        assert masks.kept(mask) == masks.num_kept(sparsity, masks.total(mask))
        assert before is None or not any((mask[name] & ~before[name]).any() for name in mask)
    assert mask is not None
    with pytest.raises(ConfigError, match=r"mask: it has sparsity 0\.8.* already, and a round has 0\.5"):
        pb.prune(chain, "magnitude", sparsity=0.5, mask=mask)
    with pytest.raises(ConfigError, match=r"pruner=force cannot go on from one, as weights may return"):
        pb.prune(chain, "force", sparsity=0.9, mask=mask, data=random_batches())


# What is refused ------------------------------------------------------------------------------------------------------

IMAGES = (torch.zeros(100, *SHAPE), torch.zeros(100, dtype=torch.int64))
FEW = {"pruner.scoring_data.per_class": None, "pruner.scoring_data.total": 50}
WRONG: list[tuple[str, dict[str, Any], str]] = [
    ("snp", {}, r"^pruner=snp: there is no such option \(did you mean snip\?\)"),
    ("snip,grasp", {}, r"^pruner=snip,grasp: give the name of one option"),
    ("dense", {}, "^pruner=dense: it prunes nothing"),
    ("snip", {}, r"^pruner=snip: its score looks at images; give data="),
    ("synflow", {}, r"^pruner=synflow: it passes an image .* input_shape=\(C, H, W\)"),
    ("npb", {"input_shape": SHAPE, "settings": {"pruner.reduce": "sum"}}, "^pruner.reduce=sum: pruner=npb needs the"),
    ("grasp", {"data": [IMAGES], "settings": FEW | {"pruner.score.draws": 4}}, "^pruner.score.draws=4: it parts class"),
    ("synflow", {"input_shape": (1, 8, 8)}, r"^model: Chain does not take inputs of shape \(1, 1, 8, 8\)"),
    ("synflow", {"input_shape": 4}, r"^input_shape=4: give the shape of one image .* such as \(3, 32, 32\)$"),
    ("synflow", {"input_shape": (3, -8, 8)}, r"^input_shape=\(3, -8, 8\): give the shape"),
    ("magnitude", {"input_shape": "3,8,8"}, "^input_shape='3,8,8': give the shape"),
    ("magnitude", {"input_shape": ()}, r"^input_shape=\(\): give the shape"),
    ("filter_magnitude", {"input_shape": SHAPE}, "^pruner=filter_magnitude: schedule=front_loaded trains between"),
    ("magnitude", {"schedule": "rewind"}, "^pruner=magnitude: schedule=rewind trains .* or do the whole run with"),
    ("magnitude", {"schedule": "none"}, "^schedule=none: it never prunes"),
    ("magnitude", {"sparsity": None}, "^sparsity: how much is to be pruned"),
    ("magnitude", {"density": 0.5}, r"^sparsity=0\.9 and density=0\.5: they say the same thing"),
    ("magnitude", {"sparsity": 98}, r"^sparsity=98: give a fraction in \[0, 1\)"),
    ("magnitude", {"seed": -1}, "^seed=-1: give 0 or more"),
    ("magnitude", {"settings": {"training.lr": 1}}, r"^settings: 'training\.lr' plays no part here"),
    ("magnitude", {"settings": {"allocation.min_density": 2}}, r"^allocation\.min_density=2: give one in \[0, 1\]"),
    ("snip", {"settings": {"pruner.scoring_data.augment": True}}, "augment' plays no part here"),
    (by_size, {"settings": {"pruner.score.power": 2}}, r"pruner\.score is a function of yours"),  # type: ignore[list-item]
    ("magnitude", {"mask": {"fc.bias": torch.ones(4).bool()}}, "^mask: Chain has no parameter 'fc.bias'"),
    ("magnitude", {"mask": {"norm1.bias": torch.ones(6).bool()}}, "^mask: norm1.bias is no weight that is pruned"),
    ("ntk_sap", {"input_shape": SHAPE}, "^pruner=ntk_sap: it draws new weights .*; give build="),
    ("ntk_sap", {"input_shape": SHAPE, "build": lambda: nn.Linear(2, 2)}, "^build: it makes no Chain with"),
    ("snip", {"data": [IMAGES], "build": Chain}, "^build: pruner=snip draws no weights; leave it out"),
    ("snip", {"data": 5}, "^data: int is no iterable of batches"),
    ("snip", {"data": []}, "^data: it holds no batch"),
    ("snip", {"data": IMAGES}, "^data: a batch is Tensor; .* a single batch goes into a list"),
    ("snip", {"data": [(IMAGES[0][:5], IMAGES[1])]}, r"^data: a batch has images \(5, 3, 8, 8\) and labels \(100,\)"),
    ("snip", {"data": [(IMAGES[0].byte(), IMAGES[1])]}, "^data: images are uint8; give floats"),
    ("snip", {"data": [(IMAGES[0].log(), IMAGES[1])]}, "^data: [0-9]+ of 100 images hold values that are not finite"),
    ("snip", {"data": [(IMAGES[0][:50], IMAGES[1][:50])]}, "^data: it ends before .*total=100"),
    ("grasp", {"data": [IMAGES]}, "^data: it ends before .*per_class=10"),
    ("snip", {"data": [(IMAGES[0], IMAGES[1] + 4)]}, "^data: there is a label 4, and the model has 4 outputs"),
    ("snip", {"data": [IMAGES], "input_shape": (1, 8, 8)}, r"^input_shape=\(1, 8, 8\): images of data= have"),
]  # fmt: skip


@pytest.mark.parametrize(("pruner", "more", "message"), WRONG, ids=[message[:40] for _, _, message in WRONG])
def test_what_is_wrong_is_one_line_and_changes_nothing(pruner: str, more: dict[str, Any], message: str) -> None:
    model = Chain()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ConfigError, match=message) as raised:
        pb.prune(model, pruner, **{"sparsity": 0.9} | more)
    assert "\n" not in str(raised.value)
    assert raised.value.__cause__ is None or not type(raised.value.__cause__).__module__.startswith("hydra")
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


class Computed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.layer.weight - self.layer.weight.mean())


class Two(nn.Linear):
    def forward(self, x: torch.Tensor) -> Any:
        return super().forward(x), x


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (nn.BatchNorm2d(3), "BatchNorm2d has no weight that can be pruned"),
        (nn.LazyLinear(3), "LazyLinear has lazy layers"),
        (Computed(), r"Computed: 1 layers such as layer\.weight \(Linear\) compute what they apply"),
        (Two(8, 4), "Two returns tuple, and a score needs one tensor"),
        (torch_prune.identity(nn.Linear(8, 4), "weight"), "Linear has no weight that can be pruned"),
        ("resnet18", "str is no torch.nn.Module"),
    ],
)
def test_models_that_cannot_be_pruned_are_refused(model: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=f"^model: {message}"):
        pb.prune(model, "synflow", sparsity=0.5, input_shape=(8,))


class Shifted(nn.Conv2d):
    """As weight standardisation does it."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self._conv_forward(x, self.weight - self.weight.mean(), self.bias)


def test_layers_that_compute_their_weights_are_refused_with_and_without_a_shape(
    caplog: pytest.LogCaptureFixture,
) -> None:
    model = nn.Sequential(Shifted(3, 4, 3), nn.Flatten(), nn.LazyLinear(2))
    model(torch.zeros(1, *SHAPE))
    for pruner in ("magnitude", "lamp"):
        with pytest.raises(ConfigError, match=r"^model: Shifted, as in 0\.weight, has a forward pass of its own"):
            pb.prune(model, pruner, sparsity=0.5)
        with pytest.raises(ConfigError, match=r"1 layers such as 0\.weight \(Shifted\) compute what they apply"):
            pb.prune(model, pruner, sparsity=0.5, input_shape=SHAPE)
    half = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(8, 8)), nn.Linear(8, 4))
    pb.prune(half, "lamp", sparsity=0.5)
    assert "64 parameters in 0.parametrizations.weight.original1 are of no layer that is pruned" in caplog.text


@pytest.mark.parametrize("pruner", ["px", "npb", "ntt"])
def test_scores_without_batch_statistics_refuse_train_mode(pruner: str) -> None:
    given: dict[str, Any] = {"input_shape": SHAPE} if pruner == "npb" else {"data": [IMAGES]}
    few = {} if pruner == "npb" else FEW
    with pytest.raises(UserError, match=r"pruner\.mode=train: .*; set pruner\.mode=eval"):
        pb.prune(Chain(), pruner, sparsity=0.9, settings=few | {"pruner.mode": "train"}, **given)


def test_synflow_in_train_mode_says_what_one_image_lacks() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 8), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 4))
    with pytest.raises(UserError, match=r"pruner\.mode=train: SynFlow passes one image .*; set pruner\.mode=eval"):
        pb.prune(model, "synflow", sparsity=0.5, input_shape=SHAPE, settings={"pruner.mode": "train"})


def test_it_is_said_that_outputs_are_taken_for_logits_where_labels_are_numbers(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.WARNING, "pai_bench")
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))
    images, targets = torch.randn(50, 8), torch.randn(50, 3)
    given: dict[str, Any] = {"sparsity": 0.5, "data": [(images, targets)], "settings": FEW}
    pb.prune(model, "loss_preservation", loss=F.mse_loss, **given)
    (said,) = caplog.messages
    assert said.startswith(
        "pruner.score.temperature=5.0: it takes outputs for logits of classes, and labels are numbers"
    )
    caplog.clear()
    pb.prune(model, "loss_preservation", loss=F.mse_loss, **given | {"settings": FEW | {"pruner.score.temperature": 1}})
    pb.prune(model, "loss_preservation", **given | {"data": [(images, targets.softmax(1))]})  # soft classes
    assert caplog.messages == []


def test_a_collapse_is_said(chain: nn.Module, caplog: pytest.LogCaptureFixture) -> None:
    with torch.no_grad():
        chain.conv2.weight.mul_(1e-6)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(logging.getLogger("pai_bench"), "propagate", True)
        pb.prune(chain, "magnitude", sparsity=0.8)
    assert "pruner=magnitude: layer collapse: nothing is kept in conv2.weight" in caplog.text


def test_scores_that_cannot_rank_are_an_error(chain: nn.Module) -> None:
    with torch.no_grad():
        chain.fc.weight.zero_()
    with pytest.raises(UserError, match="every score is zero"):
        pb.prune(chain, "synflow", sparsity=0.5, input_shape=SHAPE)
