"""N of M weights, as many inputs for every output, and repairs of the flow."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Chain, composed, pruned_as, residual
from torch import Generator, Tensor, nn

import pai_bench as pb
from pai_bench import assembly, experiment
from pai_bench.analysis import paths
from pai_bench.core import Selection
from pai_bench.errors import ConfigError
from pai_bench.masks import allocation, flow, masks, structured

SHAPE = (3, 8, 8)
GENERATOR = Generator()


def scored(*shapes: tuple[int, ...], seed: int = 0) -> tuple[masks.Mask, masks.Mask]:
    """Random scores for layers of these shapes, and the mask that keeps all."""
    generator = Generator().manual_seed(seed)
    scores = {f"{place}.weight": torch.rand(shape, generator=generator) for place, shape in enumerate(shapes)}
    return scores, {name: torch.ones_like(values, dtype=torch.bool) for name, values in scores.items()}


# N of M ---------------------------------------------------------------------------------------------------------------

LAYERS = [(6, 3, 3, 3), (8, 8, 3, 3), (5, 8, 1, 1), (4, 12), (3, 10)]


@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4), (3, 4), (4, 4), (1, 2)])
def test_every_group_has_exactly_n_of_its_highest_scores(n: int, m: int) -> None:
    scores, candidates = scored(*LAYERS)
    covered = [name for name, values in scores.items() if values.shape[1] % m == 0]
    assert {"1.weight", "2.weight", "3.weight"} <= set(covered) and "0.weight" not in covered
    keep = sum(math.prod(v.shape) * n // m if name in covered else v.numel() for name, v in scores.items())
    mask = structured.n_m(scores, candidates, keep, GENERATOR, n=n, m=m).mask
    assert masks.kept(mask) == keep
    for name, kept in mask.items():
        if name not in covered:
            assert kept.all()
            continue
        assert masks.densities(mask)[name] == n / m
        for output in range(kept.shape[0]):  # by hand: neighbouring input channels at one position of the kernel
            for start in range(0, kept.shape[1], m):
                of_group = kept[output, start : start + m].reshape(m, -1)
                values = scores[name][output, start : start + m].reshape(m, -1)
                assert (of_group.sum(0) == n).all()
                for position in range(of_group.shape[1]):
                    best = values[:, position].topk(n).indices
                    assert set(of_group[:, position].nonzero().flatten().tolist()) == set(best.tolist())


def test_ties_in_a_group_go_to_the_first_and_are_counted() -> None:
    candidates = {"a": torch.ones(2, 4, dtype=torch.bool)}
    scores = {"a": torch.tensor([[1.0, 1.0, 1.0, 5.0], [1.0, 2.0, 3.0, 3.0]])}
    chosen = structured.n_m(scores, candidates, 4, GENERATOR, n=2, m=4)
    assert chosen.mask["a"].int().tolist() == [[1, 0, 0, 1], [0, 0, 1, 1]]
    assert chosen.num_tied == 3


@pytest.mark.parametrize("keep", [1, 500, 2000])
def test_another_sparsity_is_refused_and_the_one_that_fits_is_named(keep: int) -> None:
    scores, candidates = scored(*LAYERS)
    with pytest.raises(ConfigError, match=r"allocation=n_m with 2:4 keeps \d+ of \d+ weights here; give ") as refused:
        structured.n_m(scores, candidates, keep, GENERATOR, n=2, m=4)
    fits = float(str(refused.value).rpartition("sparsity=")[2])
    number = masks.num_kept(fits, masks.total(candidates))
    assert masks.kept(structured.n_m(scores, candidates, number, GENERATOR, n=2, m=4).mask) == number


def test_groups_that_cannot_be_are_refused() -> None:
    scores, candidates = scored((4, 8))
    with pytest.raises(ConfigError, match=r"allocation.n=5: a group has allocation.m=4 weights"):
        structured.n_m(scores, candidates, 16, GENERATOR, n=5, m=4)
    with pytest.raises(ConfigError, match=r"allocation.m=3: it divides the input channels of no layer"):
        structured.n_m(scores, candidates, 16, GENERATOR, n=2, m=3)
    candidates["0.weight"][1, :3] = False
    with pytest.raises(ConfigError, match=r"an earlier round left a group of 0.weight fewer than 2 weights"):
        structured.n_m(scores, candidates, 16, GENERATOR, n=2, m=4)
    with pytest.raises(ConfigError, match="not for filters"):
        structured.n_m({"a": torch.ones(4)}, {"a": torch.ones(4, dtype=torch.bool)}, 2, GENERATOR, n=1, m=2)


def test_a_run_without_its_first_layer_has_the_sparsity_of_its_groups(tmp_path: Path) -> None:
    words = ["pruner=magnitude", "allocation=n_m", "model=resnet8_thin", "training.epochs=0", "tracker=none"]
    row = experiment.run(composed(*words, "sparsity=0.5", "prunable=no_first", f"results_dir={tmp_path}"))
    assert row["sparsity"] == 0.5 and row["num_kept"] * 2 == row["num_prunable"]
    with pytest.raises(ConfigError, match="schedule=linear: allocation=n_m has one target; use schedule=one_shot"):
        composed(*words, "sparsity=0.5", "schedule=linear")
    with pytest.raises(ConfigError, match="target=effective: allocation=n_m cannot keep any number"):
        composed(*words, "sparsity=0.5", "target=effective")


# As many inputs for every output --------------------------------------------------------------------------------------


@pytest.mark.parametrize("densities", ["uniform", "erk"])
@pytest.mark.parametrize("sparsity", [0.0, 0.37, 0.8, 0.95, 0.99])
def test_outputs_of_a_layer_have_equally_many_inputs(densities: Any, sparsity: float) -> None:
    scores, candidates = scored(*LAYERS, (100, 30))
    keep = masks.num_kept(sparsity, masks.total(candidates))
    mask = structured.constant_fan_in(scores, candidates, keep, GENERATOR, densities=densities).mask
    assert masks.kept(mask) == keep
    uneven = 0
    for name, kept in mask.items():
        rows, values = kept.flatten(1), scores[name].flatten(1)
        counts = rows.sum(1)
        assert counts.max() - counts.min() <= 1
        uneven += int(counts.max() != counts.min())
        for row, value in zip(rows, values, strict=True):
            assert not row.any() or row.all() or value[row].min() > value[~row].max()
    assert uneven <= 1
    plain = (allocation.uniform if densities == "uniform" else allocation.erk)(
        scores, candidates, keep, GENERATOR, **({} if densities == "uniform" else {"kernel": True})
    ).mask
    for name, kept in mask.items():  # nearest whole numbers of weights for each output
        assert abs(int(kept.sum()) - int(plain[name].sum())) <= kept.shape[0], name


def test_the_rest_goes_where_the_next_weight_has_the_highest_score() -> None:
    scores = {"a": torch.tensor([[3.0, 2.0, 1.0], [3.0, 2.9, 1.0], [3.0, 2.5, 0.0]])}
    candidates = {"a": torch.ones(3, 3, dtype=torch.bool)}
    mask = structured.constant_fan_in(scores, candidates, 5, GENERATOR, densities="uniform").mask["a"]
    assert mask.int().tolist() == [[1, 0, 0], [1, 1, 0], [1, 1, 0]]


def test_rounds_keep_the_structure_and_other_masks_are_refused() -> None:
    model = residual()
    found = pruned_as(model, SHAPE, "pruner=magnitude", "allocation=constant_fan_in", "sparsity=0.9", "schedule=linear")
    counts = [kept.flatten(1).sum(1) for kept in found.mask.values()]
    assert sum(int(of.max() - of.min()) for of in counts) <= 1
    scores, candidates = scored((4, 8))
    candidates["0.weight"][1, :6] = False
    with pytest.raises(ConfigError, match="earlier rounds left the outputs of a layer different numbers"):
        structured.constant_fan_in(scores, candidates, 25, GENERATOR, densities="uniform")


# Flow -----------------------------------------------------------------------------------------------------------------


def fractions(name: str, model: nn.Module, sparsity: float) -> tuple[Selection, masks.Mask, masks.Mask]:
    """What an allocation chooses by random scores, the scores and the candidates."""
    generator = Generator().manual_seed(2)
    candidates = masks.full(model)
    scores = {key: torch.rand(kept.shape, generator=generator) for key, kept in candidates.items()}
    keep = masks.num_kept(sparsity, masks.total(candidates))
    return composed(f"allocation={name}").allocation(scores, candidates, keep, generator), scores, candidates


@pytest.mark.parametrize("build", [Chain, residual])
@pytest.mark.parametrize("sparsity", [0.5, 0.85, 0.95])
@pytest.mark.parametrize("name", ["global", "uniform", "erk", "sampled"])
def test_after_a_repair_every_channel_and_every_weight_is_on_a_path(
    name: str, sparsity: float, build: Callable[[], nn.Module]
) -> None:
    model = build()
    selection, scores, candidates = fractions(name, model, sparsity)
    before = {key: kept.clone() for key, kept in selection.mask.items()}
    mask = flow.repaired(selection, scores, candidates).mask
    assert all(torch.equal(kept, before[key]) for key, kept in selection.mask.items()), "its input stays as it was"
    assert list(mask) == list(before) and masks.kept(mask) == masks.kept(before)
    assert not masks.has_empty_slices(mask)
    reached = paths.effective(model, mask, SHAPE)
    assert reached is not None and all(torch.equal(reached[key], kept) for key, kept in mask.items())
    if masks.has_empty_slices(before):
        assert any(not torch.equal(kept, before[key]) for key, kept in mask.items())
    if sparsity == 0.5:  # no layer has to give to another
        assert masks.densities(mask) == masks.densities(before)


def in_groups(groups: int) -> nn.Module:
    """A chain of convolutions, the later ones in groups."""
    return nn.Sequential(
        *(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1, groups=groups), nn.ReLU()),
        *(nn.Conv2d(8, 16, 1, groups=groups), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 4)),
    )


class Bottleneck(nn.Module):
    """A block with a convolution in groups and a shortcut."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.fc = nn.Conv2d(3, 8, 3, padding=1), nn.Linear(8, 4)
        self.block = nn.Sequential(nn.Conv2d(8, 12, 1), nn.Conv2d(12, 12, 3, padding=1, groups=3), nn.Conv2d(12, 8, 1))

    def forward(self, images: Tensor) -> Tensor:
        features: Tensor = self.stem(images)
        logits: Tensor = self.fc((features + self.block(features)).mean((2, 3)))
        return logits


@pytest.mark.parametrize("build", [lambda: in_groups(2), lambda: in_groups(4), Bottleneck], ids=["2", "4", "block"])
@pytest.mark.parametrize("seed", range(4))
def test_in_groups_every_weight_is_on_a_path_after_a_repair(build: Callable[[], nn.Module], seed: int) -> None:
    torch.manual_seed(seed)
    model = build()
    mask = pb.prune(model, "random", sparsity=0.8, input_shape=SHAPE, repair="flow", seed=seed)
    reached = paths.effective(model, mask, SHAPE)
    assert reached is not None and masks.kept(mask) == masks.num_kept(0.8, masks.total(mask))
    assert all(torch.equal(reached[name], kept) for name, kept in mask.items())


def test_a_run_repairs_the_groups_of_its_network() -> None:
    words = ["pruner=random", "sparsity=0.9", "repair=flow", "tracker=none", "device=cpu"]
    allocate = assembly.assembled(composed(*words), torch.device("cpu")).allocate(in_groups(4))
    generator = Generator().manual_seed(0)
    scores = {name: torch.rand(w.shape, generator=generator) for name, w in masks.prunable(in_groups(4)).items()}
    mask = allocate(scores, masks.full(in_groups(4)), 60, generator).mask
    assert masks.kept(mask) == 60
    of_inputs = mask["2.weight"].flatten(2).any(2).view(4, 2, 2)  # groups, outputs and inputs of each
    assert of_inputs.any(1).all() and of_inputs.any(2).all()


def test_a_mask_without_gaps_stays() -> None:
    model = Chain()
    selection, scores, candidates = fractions("uniform", model, 0.05)
    assert not masks.has_empty_slices(selection.mask)
    mask = flow.repaired(selection, scores, candidates).mask
    assert all(torch.equal(kept, selection.mask[name]) for name, kept in mask.items())


def test_the_best_candidate_comes_and_the_lowest_score_goes() -> None:
    scores = {"a": torch.tensor([[9.0, 8.0, 7.0], [6.0, 5.0, 4.0], [1.0, 3.0, 2.0]])}
    candidates = {"a": torch.ones(3, 3, dtype=torch.bool)}
    candidates["a"][2, 1] = False
    kept = torch.tensor([[1, 1, 1], [1, 0, 0], [0, 0, 0]]).bool()
    mask = flow.repaired(Selection({"a": kept}), scores, candidates).mask["a"]
    # (2, 2) is the best candidate of the last output; the lowest kept score that nobody needs is (0, 2).
    assert mask.int().tolist() == [[1, 1, 0], [1, 0, 0], [0, 0, 1]]


def test_what_a_layer_lacks_comes_from_the_others() -> None:
    scores, candidates = scored((4, 4), (4, 4), seed=1)
    mask = {name: torch.zeros_like(kept) for name, kept in candidates.items()}
    mask["1.weight"][:] = True
    repaired = flow.repaired(Selection(mask), scores, candidates).mask
    assert masks.kept(repaired) == 16 and not masks.has_empty_slices(repaired)
    with pytest.raises(ConfigError, match=r"repair=flow: the mask is to keep 4 weights, and outputs and inputs need"):
        few = {name: torch.zeros_like(kept) for name, kept in candidates.items()}
        few["0.weight"][0] = True
        flow.repaired(Selection(few), scores, candidates)
    candidates["0.weight"][2] = False
    with pytest.raises(ConfigError, match=r"no candidate is left for output 2 of 0.weight"):
        flow.repaired(Selection(mask), scores, candidates)


def test_a_run_and_the_library_repair(tmp_path: Path) -> None:
    words = ["pruner=random", "allocation=erk", "model=lenet5", "sparsity=0.95", "training.epochs=0", "tracker=none"]
    plain, repaired = (
        experiment.run(composed(*words, *more, f"results_dir={tmp_path}")) for more in ([], ["repair=flow"])
    )
    assert (plain["repair"], repaired["repair"]) == (None, "flow") and plain["dead_units"] > 0
    assert repaired["dead_units"] == 0 and repaired["num_effective"] == repaired["num_kept"] == plain["num_kept"]
    mask = pb.prune(Chain(), "magnitude", sparsity=0.9, repair="flow")
    assert not masks.has_empty_slices(mask) and not any(kept.all() for kept in mask.values())


BASE = ["pruner=snip", "sparsity=0.9"]


def test_a_repair_is_a_method_of_its_own() -> None:
    one, other = composed(*BASE), composed(*BASE, "repair=flow")
    assert composed(*BASE, "repair=null").id == one.id != other.id
    assert other.task == one.task and other.method != one.method
    assert composed("repair=flow").id == composed().id, "a dense network is one run"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["repair=all"], "repair=all: give flow or null"),
        (["ablation=shuffle_mask"], "repair=flow: ablation=shuffle_mask would undo it"),
        (["pruner=filter_magnitude"], "repair=flow: pruner=filter_magnitude prunes filters"),
        (["allocation=sampled", "allocation.rescale=true"], "repair=flow: allocation.rescale=true has no factor"),
        (["allocation=n_m"], "repair=flow: it would break the structure that allocation=n_m makes"),
        (["allocation=constant_fan_in"], "repair=flow: it would break the structure"),
    ],
)
def test_what_would_undo_a_repair_is_refused(words: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        composed(*BASE, *(["repair=flow"] if "repair=all" not in words else []), *words)
