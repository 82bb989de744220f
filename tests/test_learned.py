"""What holds for every search that learns its mask: a yaml in conf/search is under test by existing."""

import copy
import json
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import CONF, Chain, composed, options
from hydra.errors import HydraException
from safetensors.torch import load_file
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from pai_bench import assembly, experiment, learning
from pai_bench.core import Mask
from pai_bench.errors import ConfigError, UserError
from pai_bench.learned.network import LearnedNetwork
from pai_bench.masks import masks

SEARCHES = [name for name in options("search") if name != "none"]
SMALL = [
    "model.widths=[4,6]", "model.blocks=[1,1]", "training.epochs=1", "training.batch_size=256", "training.compact=off",
    "tracker=none", "num_workers=0", "save_scores=true", "dataset.size=8",
]  # fmt: skip
# The shortest searches in which something happens between two steps.
SHORT = {
    "gem_miner": ["search.epochs=3", "search.method.freeze_every_epochs=1"],
    "iterand": ["search.epochs=2", "search.method.every_steps=2", "search.method.probability=0.5"],
}


def words_of(name: str, *more: str) -> list[str]:
    """The command line of a short search on a tiny network, at sparsity 0.6."""
    return [*SMALL, f"search={name}", "sparsity=0.6", *SHORT.get(name, ["search.epochs=2"]), *more]


def network(name: str, model: nn.Module, counts: dict[str, int] | int | None = None, *more: str) -> LearnedNetwork:
    """The network of a search on a model, which keeps half of every layer where nothing else is said."""
    settings = composed(f"search={name}", "sparsity=0.5", *more).search
    assert settings is not None
    method = settings.method()
    if counts is None:
        halves = {key: weight.numel() // 2 for key, weight in masks.prunable(model).items()}
        counts = halves if method.threshold is None else sum(halves.values())
    return LearnedNetwork(model, method, counts, Generator().manual_seed(0), affine=settings.affine)


def tiny(seed: int = 0) -> Chain:
    torch.manual_seed(seed)
    return Chain()


def pictures(number: int = 6) -> Tensor:
    return torch.randn(number, 3, 8, 8, generator=Generator().manual_seed(1))


@pytest.mark.parametrize("name", SEARCHES)
def test_a_search_composes_under_its_own_name(name: str) -> None:
    cfg = composed(f"search={name}", "sparsity=0.5")
    assert cfg.search is not None and cfg.search.name == cfg.pruner.name == name
    assert name in cfg.tags and f"-{name}-s0.5-seed0-" in cfg.id and cfg.method.startswith(name)
    assert cfg.pruner.label == cfg.search.label
    file = yaml.safe_load((CONF / "search" / f"{name}.yaml").read_text())
    assert file["name"] == name, "the name in the file is its own, not inherited"


@pytest.mark.parametrize("name", SEARCHES)
def test_the_ticket_is_the_network_that_was_evaluated(name: str) -> None:
    net, plain = network(name, tiny()), tiny(1)
    for _ in range(2):
        net.train()(pictures())  # moves the statistics of batch norm
    mask = net.final().mask
    net.settle_(mask)
    plain.load_state_dict(net.ticket(mask))
    masks.apply_(plain, mask)
    with torch.no_grad():
        assert torch.equal(net.eval()(pictures()), plain.eval()(pictures()))
    assert net.eval()(pictures()).requires_grad, "the logits with and without a gradient are the same"
    assert torch.equal(net(pictures()).detach(), plain(pictures()).detach())


@pytest.mark.parametrize("name", SEARCHES)
@pytest.mark.parametrize("keep", [1, 3, 217, 398])
def test_exactly_k_weights_are_kept_and_ranks_alone_decide(name: str, keep: int) -> None:
    net = network(name, tiny(), keep)
    total = masks.total(net.candidates)
    mask = net.final().mask
    assert masks.kept(mask) == min(keep, total)
    with torch.no_grad():
        for score in net.scores:
            score.copy_(score.sign() * score.abs() ** 3)  # another size, the same order
    assert all(torch.equal(kept, mask[key]) for key, kept in net.final().mask.items())


@pytest.mark.parametrize("name", SEARCHES)
def test_ties_go_to_the_first(name: str) -> None:
    net = network(name, tiny(), 200)
    with torch.no_grad():
        for score in net.scores:
            score.fill_(0.25)
    found = net.final()
    chosen = torch.cat([kept.flatten() for kept in found.mask.values()])
    assert chosen[:200].all() and not chosen[200:].any() and found.num_tied == len(chosen)


@pytest.mark.parametrize("name", SEARCHES)
def test_a_score_has_the_gradient_of_the_relaxed_mask(name: str) -> None:
    """The loss with one entry of the mask moved: that of the applied weights plus weight times the entry's change."""
    model = tiny().double()
    net = network(name, model)
    net.double().eval()
    images, labels = pictures().double(), torch.arange(6) % 4
    mask, weights = net.mask(), net.weights
    applied = {key: value.detach() for key, value in net.effective().items()}

    def loss(key: str, place: int, by: float) -> float:
        moved = applied[key].clone()
        moved.view(-1)[place] += by * weights[key].view(-1)[place]
        logits = torch.func.functional_call(model, applied | {key: moved}, (images,))
        return float(F.cross_entropy(logits, labels))

    F.cross_entropy(net(images), labels).backward()
    generator, step = Generator().manual_seed(2), 1e-6
    for key, score in zip(net.names, net.scores, strict=True):
        assert score.grad is not None and score.grad.shape == mask[key].shape
        for place in torch.randint(score.numel(), (5,), generator=generator).tolist():
            slope = (loss(key, place, step) - loss(key, place, -step)) / (2 * step)
            sign = 1.0 if name in ("gem_miner", "iterand") else float(score.detach().view(-1)[place].sign())
            assert float(score.grad.view(-1)[place]) == pytest.approx(sign * slope, rel=1e-5, abs=1e-9)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_the_choice_on_a_device_is_the_plain_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    net = network("edge_popup", tiny())
    with torch.no_grad():
        for score in net.scores:
            score.copy_((score * 20).round())  # with ties
    plain = net.mask()

    monkeypatch.setattr("pai_bench.system.graphs.supported", lambda device: True)
    assert all(torch.equal(kept, plain[name]) for name, kept in net.mask().items())


@pytest.mark.parametrize("affine", ["none", "trained"])
def test_norms_are_ones_and_zeros_or_are_trained(affine: str) -> None:
    model = tiny()
    nn.init.uniform_(model.norm1.weight)
    before = copy.deepcopy(model.norm1.weight)
    net = network("edge_popup", model, None, f"search.affine={affine}")
    net.train()(pictures()).square().sum().backward()
    moved = {name for name, parameter in net.named_parameters() if parameter.grad is not None}
    norms = {f"model.norm{number}.{part}" for number in (1, 2) for part in ("weight", "bias")}
    assert moved == {f"scores.{number}" for number in range(3)} | (norms if affine == "trained" else set())
    assert torch.equal(model.norm1.weight, before if affine == "trained" else torch.ones(6))


# Whole runs -----------------------------------------------------------------------------------------------------------


def ran(name: str, results: Path, *more: str) -> tuple[dict[str, Any], Path]:
    cfg = composed(*words_of(name, *more), f"results_dir={results}")
    return experiment.run(cfg), cfg.directory


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[dict[str, Any], Path]]:
    """The row and the directory of a run of each search."""
    return lru_cache(lambda name: ran(name, tmp_path_factory.mktemp(name)))


Whole = Callable[[str], tuple[dict[str, Any], Path]]


def curve_of(directory: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (directory / "curve.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("name", SEARCHES)
def test_a_run_has_both_accuracies_and_a_mask_of_the_exact_size(name: str, whole: Whole) -> None:
    row, directory = whole(name)
    mask = load_file(directory / "mask.safetensors")
    assert row["num_kept"] == masks.kept(mask) == masks.num_kept(0.6, masks.total(mask))
    assert row["pruner"] == name and row["target_sparsity"] == 0.6
    epochs = 3 if name == "gem_miner" else 2
    assert row["search_train_examples"] == epochs * 1438 and row["train_examples"] == 1438
    evaluated = [line for line in curve_of(directory) if "test_top1" in line]
    assert [line["epoch"] for line in evaluated][: epochs + 1] == [float(epoch) for epoch in range(epochs + 1)]
    assert evaluated[-1]["epoch"] == epochs + 1 and evaluated[-1]["test_top1"] == row["test_top1"]
    assert row["strong_test_top1"] == evaluated[-2]["test_top1"] and row["strong_test_loss"] != row["test_loss"]
    if name != "gem_miner":
        densities = masks.densities(mask)
        assert all(abs(d * mask[key].numel() - 0.4 * mask[key].numel()) < 1 for key, d in densities.items())
    assert load_file(directory / "scores.safetensors").keys() == mask.keys()


@pytest.mark.parametrize("name", SEARCHES)
def test_a_run_without_training_ends_with_the_strong_ticket(name: str, tmp_path: Path) -> None:
    row, directory = ran(name, tmp_path, "training.epochs=0")
    assert row["test_top1"] == row["strong_test_top1"] and row["test_loss"] == row["strong_test_loss"]
    assert row["train_examples"] == 0 and row["best_test_epoch"] == 0
    weights, mask = load_file(directory / "model.safetensors"), load_file(directory / "mask.safetensors")
    cfg = composed(*words_of(name))
    drawn = assembly.assembled(cfg, torch.device("cpu")).build("init").state_dict()
    for key, kept in mask.items():
        assert not weights[key][~kept].any()
        sizes = weights[key][kept].abs().unique()
        if name in ("edge_popup", "gem_miner"):
            assert torch.allclose(sizes, torch.tensor((2 / drawn[key][0].numel()) ** 0.5))
        if name == "biprop":
            torch.testing.assert_close(sizes.mean(), drawn[key].abs()[kept].mean())
            assert sizes.max() - sizes.min() < 1e-6
        if name != "iterand":
            assert torch.equal(weights[key].sign(), drawn[key].sign() * kept)


@pytest.mark.parametrize("name", SEARCHES)
def test_a_seed_has_one_run(name: str, whole: Whole, tmp_path: Path) -> None:
    (_, one), (_, two) = whole(name), ran(name, tmp_path / "two", "checkpoint_epochs=5")
    (_, other) = ran(name, tmp_path / "three", "seed=1", "training.epochs=0")
    for file in ("mask", "scores", "model"):
        first, second = load_file(one / f"{file}.safetensors"), load_file(two / f"{file}.safetensors")
        assert all(torch.equal(tensor, second[key]) for key, tensor in first.items())
    mask, another = load_file(one / "mask.safetensors"), load_file(other / "mask.safetensors")
    assert any(not torch.equal(kept, another[key]) for key, kept in mask.items())


@pytest.mark.parametrize("ablation", ["shuffle_mask", "reinit", "shuffle_weights"])
def test_ablations_work_on_a_learned_mask(ablation: str, whole: Whole, tmp_path: Path) -> None:
    plain, _ = whole("biprop")
    row, directory = ran("biprop", tmp_path, f"ablation={ablation}")
    assert ablation in row["id"] and row["ablation_overlap"] < 1
    assert row["strong_test_top1"] == plain["strong_test_top1"], "the ticket is measured before it is broken"
    mask = load_file(directory / "mask.safetensors")
    assert all(not load_file(directory / "model.safetensors")[key][~kept].any() for key, kept in mask.items())


@pytest.mark.parametrize(("allocation", "layers"), [("erk", True), ("global", False)])
def test_the_allocation_says_how_many_weights_a_layer_keeps(allocation: str, layers: bool) -> None:
    cfg = composed(*words_of("edge_popup", f"allocation={allocation}"))
    parts = assembly.assembled(cfg, torch.device("cpu"))
    net = learning.learned_network(parts)
    candidates: Mask = net.candidates
    keep = masks.num_kept(0.6, masks.total(candidates))
    assert net.num_kept == masks.kept(net.mask()) == keep
    other = {key: torch.rand(kept.shape, generator=Generator().manual_seed(3)) for key, kept in candidates.items()}
    expected = masks.counts(cfg.allocation(other, candidates, keep, Generator()).mask)
    assert (masks.counts(net.mask()) == expected) is layers


@pytest.mark.parametrize("name", SEARCHES)
def test_a_layer_that_is_left_out_stays_whole_and_frozen(name: str, tmp_path: Path) -> None:
    row, directory = ran(name, tmp_path, "prunable=no_last", "training.epochs=0")
    weights, mask = load_file(directory / "model.safetensors"), load_file(directory / "mask.safetensors")
    model = assembly.assembled(composed(*words_of(name)), torch.device("cpu")).build("init")
    *pruned, last = masks.prunable(model)
    assert list(mask) == sorted(pruned) and last not in load_file(directory / "scores.safetensors")
    total = sum(model.get_parameter(key).numel() for key in pruned)
    assert (row["num_prunable"], row["num_kept"]) == (total, masks.kept(mask)) and row["num_kept"] == round(0.4 * total)
    drawn = model.get_parameter(last).detach()
    frozen = {"iterand": drawn, "biprop": drawn.sign() * drawn.abs().mean()}
    torch.testing.assert_close(weights[last], frozen.get(name, drawn.sign() * (2 / drawn.shape[1]) ** 0.5))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            ["search=edge_popup", "allocation=sampled"],
            "allocation=sampled: search=edge_popup: how many weights",
        ),
        (
            ["search=gem_miner", "allocation=erk"],
            "allocation=erk: search=gem_miner: it ranks the weights",
        ),
    ],
)
def test_an_allocation_that_does_not_fit_is_refused(words: list[str], said: str) -> None:
    cfg = composed(*SMALL, "sparsity=0.6", *words)
    with pytest.raises(ConfigError, match=said):
        learning.learned_network(assembly.assembled(cfg, torch.device("cpu")))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            ["search=iterand", "search.epochs=2", "search.method.every_steps=12"],
            "search.method.every_steps=12: the search has 12 steps, so no weight would be drawn again; give fewer, or",
        ),
        (
            ["search=gem_miner", "search.epochs=5"],
            "search.method.freeze_every_epochs=5: the search ends with epoch 5, so no weight would be frozen out; give",
        ),
    ],
)
def test_a_search_too_short_for_its_events_is_refused(words: list[str], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        learning.learned_network(assembly.assembled(composed(*SMALL, "sparsity=0.6", *words), torch.device("cpu")))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["pruner=snip", "sparsity=0.5"], "search=edge_popup: it learns its scores, and those of pruner=snip would be"),
        (["mask=x.pt"], "search=edge_popup: mask=x.pt would be ignored; leave mask= or search= out"),
        (["sparsity=0.5", "ablation=invert_scores"], "ablation=invert_scores: search=edge_popup takes no scores"),
        (["sparsity=0.5", "ablation=random_labels"], "ablation=random_labels: search=edge_popup takes no scores"),
        (["sparsity=0.5", "schedule=exponential"], "schedule=exponential: pruner=edge_popup has no score"),
        ([], "search=edge_popup needs a target: add sparsity=0.9"),
        (["sparsity=0.5", "allocation=n_m"], "allocation=n_m: search=edge_popup chooses the weights of a layer by its"),
        (["sparsity=0.5", "allocation=constant_fan_in"], "allocation=constant_fan_in: search=edge_popup chooses"),
        (["sparsity=0.5", "search.epochs=0"], "search.epochs=0: give 1 or more"),
        (["sparsity=0.5", "search.method=null"], "search.method=null: it needs a _target_"),
        (
            ["sparsity=0.5", "search.method.weights=ones"],
            "search.method.weights=ones: give one of signed_constant",
        ),
        (["sparsity=0.5", "search.affine=trian"], "search.affine=trian: give one of none, trained"),
        (["sparsity=0.5", "search.optimizer.momentum=2"], "search.optimizer.momentum=2: give one in"),
    ],
)
def test_what_excludes_a_search_is_refused_in_one_line(words: list[str], said: str) -> None:
    with pytest.raises(ConfigError, match=said) as refused:
        composed("search=edge_popup", *words)
    assert len(str(refused.value).splitlines()) == 1


def test_a_setting_of_no_search_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"search.label=x: no mask is learned; add search=NAME"):
        composed("search.label=x")
    with pytest.raises(HydraException, match="epochs"):
        composed("search.epochs=5")


def test_without_a_search_a_run_is_called_what_it_was() -> None:
    assert composed("pruner=snip", "sparsity=0.5", "search=none").id == composed("pruner=snip", "sparsity=0.5").id
    one, other = (composed("search=edge_popup", "sparsity=0.5", f"search.lr={lr}").id for lr in (0.1, 0.2))
    assert one != other
    assert composed("search=edge_popup", "sparsity=0.5", "allocation=erk").id != one
    assert composed("search=edge_popup", "sparsity=0.5", "search.label=x").id == one
    assert composed("search=edge_popup", "sparsity=0.5", "prunable=no_last").id != one
    assert composed("search=edge_popup", "sparsity=0.5", "prunable=all").id == one


def test_a_search_that_diverges_names_its_own_learning_rate(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"training diverged in epoch 1: .*lower search.lr=1e"):
        ran("edge_popup", tmp_path, "search.lr=1e38", "search.weight_decay=1")
