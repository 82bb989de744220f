"""What holds for every pruner, whatever its method: a yaml in conf/pruner is under test by existing."""

import copy
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from conftest import CONF, Chain, composed, options, residual
from safetensors.torch import save_file
from torch import Generator, nn
from torch.nn import functional as F

from pai_bench import assembly, search
from pai_bench.analysis.mode import mode
from pai_bench.core import Batches, DataSettings, Pruner, Scores, Subnetwork, TrainingLength, Weights
from pai_bench.data.resident import Resident
from pai_bench.errors import ConfigError
from pai_bench.masks import allocation, masks, selection
from pai_bench.pruning import scoring
from pai_bench.system import layout
from pai_bench.training.reuse import SharedTraining

PRUNERS = options("pruner")
SCORED = [name for name in PRUNERS if name != "dense"]


def pruner_of(name: str) -> Pruner:
    return composed(f"pruner={name}", "sparsity=0.5").pruner


def redraw(model: nn.Module) -> Callable[[Generator], Weights]:
    dtype = next(model.parameters()).dtype
    return scoring.Redraw(Chain if isinstance(model, Chain) else residual, torch.device("cpu"), dtype)


def take(name: str, model: nn.Module, batches: Batches, mask: masks.Mask | None = None, seed: int = 0) -> Scores:
    pruner = pruner_of(name)
    initial = {key: weight.detach().clone() for key, weight in masks.prunable(model).items()}
    mask = masks.full(model) if mask is None else mask
    masks.apply_(model, mask)
    net = Subnetwork(model, mask, initial, (3, 8, 8), redraw=redraw(model) if pruner.redraws else None)
    with mode(model, pruner.mode == "train"):
        assert pruner.score is not None
        return pruner.score(net, batches, F.cross_entropy, Generator().manual_seed(seed))


class WithSpare(Chain):
    """A network with a layer that it never uses."""

    def __init__(self) -> None:
        super().__init__()
        self.spare = nn.Linear(4, 4)


UNUSED_MATTERS = {"ntk_sap", "npb", "phew"} | {
    name for name in SCORED if name.startswith("filter_")
}  # they follow layers


@pytest.mark.parametrize("name", sorted(set(SCORED) - UNUSED_MATTERS))
def test_a_layer_that_is_never_used_has_finite_scores(name: str, batches: Batches) -> None:
    torch.manual_seed(0)
    scores = take(name, WithSpare(), batches)
    assert all(bool(values.isfinite().all()) for values in scores.values())
    if name not in ("magnitude", "lamp", "random", "ntt", "ntt_official"):  # by magnitudes alone, or by chance
        used = torch.cat([values.flatten() for key, values in scores.items() if not key.startswith("spare")])
        assert scores["spare.weight"].unique().numel() == 1 and used.unique().numel() > 1


@pytest.mark.parametrize("name", PRUNERS)
def test_pruner_composes_and_names_itself(name: str) -> None:
    cfg = composed(f"pruner={name}", "sparsity=0.5")
    assert cfg.pruner.name == name
    assert (name == "dense") == (cfg.pruner.score is None)
    file = yaml.safe_load((CONF / "pruner" / f"{name}.yaml").read_text())
    assert file["name"] == name, "the name in the file is its own, not inherited"


@pytest.mark.parametrize("name", SCORED)
def test_scores_cover_the_prunable_weights(name: str, net: nn.Module, batches: Batches) -> None:
    scores = take(name, net, batches)
    weights = masks.prunable(net)
    assert list(scores) == list(weights)
    for key, values in scores.items():
        assert values.shape == weights[key].shape
        assert values.is_floating_point() and not values.requires_grad
        assert values.isfinite().all()
    assert any(values.any() for values in scores.values())


@pytest.mark.parametrize("name", SCORED)
def test_scores_are_a_function_of_their_arguments(name: str, net: nn.Module, batches: Batches) -> None:
    first, second = take(name, net, batches), take(name, net, batches)
    assert all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize("name", SCORED)
def test_scoring_leaves_no_trace(name: str, net: nn.Module, batches: Batches) -> None:
    net.conv2.requires_grad_(False) if hasattr(net, "conv2") else None
    net.train()
    next(net.modules()).training = True
    norm = next(module for module in net.modules() if isinstance(module, nn.BatchNorm2d))
    norm.eval()
    net.fc.weight.grad = torch.ones_like(net.fc.weight)
    state = copy.deepcopy(net.state_dict())
    modes = [module.training for module in net.modules()]
    wants = [parameter.requires_grad for parameter in net.parameters()]
    random = torch.get_rng_state()
    take(name, net, batches)
    assert all(torch.equal(value, net.state_dict()[key]) for key, value in state.items())
    assert [module.training for module in net.modules()] == modes
    assert [parameter.requires_grad for parameter in net.parameters()] == wants
    assert [key for key, parameter in net.named_parameters() if parameter.grad is not None] == ["fc.weight"]
    assert torch.equal(net.fc.weight.grad, torch.ones_like(net.fc.weight))
    assert torch.equal(torch.get_rng_state(), random)


REDRAWS = [name for name in SCORED if pruner_of(name).redraws]


@pytest.mark.parametrize("name", REDRAWS)
def test_pruners_that_redraw_look_at_no_weights_and_no_images(name: str, net: nn.Module, batches: Batches) -> None:
    assert pruner_of(name).scoring_data is None
    first = take(name, net, batches)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.normal_()
    second = take(name, net, [])
    assert all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize("name", SCORED)
def test_a_pruned_weight_stays_pruned(name: str, net: nn.Module, batches: Batches) -> None:
    mask = masks.full(net)
    for sparsity in (0.3, 0.6, 0.8):
        before = mask
        k = masks.num_kept(sparsity, masks.total(mask))
        mask = allocation.global_topk(take(name, net, batches, mask), mask, k, Generator(), min_density=0.0).mask
        masks.apply_(net, mask)
        assert masks.kept(mask) == k
        assert not any((mask[key] & ~before[key]).any() for key in mask)


# Allocations that fix the density of some layers, and so cannot reach every sparsity of a tiny net.
LIMITED = {"uniform_plus", "erk_plus", "smart_ratio", "global_min_density", "layer_rates"}


@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.9, 0.999])
@pytest.mark.parametrize("allocate", options("allocation"))
@pytest.mark.parametrize("tied", [False, True], ids=["distinct", "tied"])
def test_every_allocation_keeps_exactly_k(
    allocate: str, sparsity: float, tied: bool, net: nn.Module, tmp_path: Path
) -> None:
    generator = Generator().manual_seed(0)
    candidates = masks.full(net)
    scores = {
        key: torch.ones(mask.shape) if tied else torch.rand(mask.shape, generator=generator)
        for key, mask in candidates.items()
    }
    k = round(round(1 - sparsity, 12) * masks.total(candidates))
    save_file(selection.keep_largest(scores, candidates, k).mask, tmp_path / "mask.safetensors")
    rows = "".join(f"{key},{1 / (1 + i)}\n" for i, key in enumerate(candidates))
    (tmp_path / "densities.csv").write_text(f"name,density\n{rows}")
    files = {"densities_of_mask": "mask=mask.safetensors", "densities_of_file": "file=densities.csv"}
    more = [f"allocation.{files[allocate].replace('=', f'={tmp_path}/')}"] if allocate in files else []
    function = composed(f"allocation={allocate}", *more).allocation
    try:
        chosen = function(scores, candidates, k, generator)
    except ConfigError as error:
        if allocate == "n_m":  # it keeps one number of weights, and names it
            fits = float(str(error).rpartition("give sparsity=")[2])
            k = masks.num_kept(fits, masks.total(candidates))
            assert masks.kept(function(scores, candidates, k, generator).mask) == k
            return
        assert allocate in LIMITED and sparsity >= 0.9 and "lower" in str(error)
        return
    mask = chosen.mask
    assert list(mask) == list(candidates)
    assert all(mask[key].dtype == torch.bool and mask[key].shape == candidates[key].shape for key in mask)
    assert masks.kept(mask) == k


LENGTH = TrainingLength(epochs=160, steps_per_epoch=391)


@pytest.mark.parametrize("name", [name for name in options("schedule") if name != "none"])
@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.98, 0.9999])
def test_every_schedule_ends_at_the_target_and_keeps_its_times_in_order(name: str, sparsity: float) -> None:
    cfg = composed("pruner=magnitude", "sparsity=0.5", "training=cifar", f"schedule={name}")
    rounds = cfg.schedule(sparsity, LENGTH)
    reached = [this.sparsity for this in rounds]
    assert reached == sorted(reached) and reached[-1] == sparsity and all(0 <= value < 1 for value in reached)
    clock = 0.0
    for this in rounds:
        assert clock <= this.until_epoch <= LENGTH.epochs or this.until_epoch == 0
        clock = max(clock, this.until_epoch) if this.rewind_epoch is None else this.rewind_epoch


# One seed, one mask ---------------------------------------------------------------------------------------------------


def _images(number: int) -> tuple[np.ndarray, np.ndarray]:
    pixels = np.random.default_rng(number).integers(0, 256, (number, 12, 12, 3), dtype=np.uint8)
    return pixels, np.arange(number) % 3


def _mask(name: str, num_threads: int, channels_last: bool, device: str = "cpu") -> masks.Mask:
    """The mask of a whole search, before training, on a network with residual connections."""
    of_method = ["sparsity=0.9"]
    if name.startswith("filter_"):
        of_method += ["schedule=linear", "schedule.rounds=5"]
    if name.startswith(("px", "synflow_l2", "ntk_sap")):
        of_method += ["schedule.rounds=5"]
    if name.startswith("ntt"):
        of_method = ["sparsity=0.5", "schedule.rounds=2", "pruner.transfer.steps=2"]
    if composed(f"pruner={name}", *of_method).pruner.scoring_data is not None:
        of_method += [f"pruner.scoring_data.{of}" for of in ("per_class=6", "total=null", "batch_size=8")]
    cfg = composed(
        f"pruner={name}",
        *of_method,
        "model=resnet8_thin",
        "model.widths=[16,20]",
        "model.blocks=[1,1]",
        "cache_gb=0",
        f"channels_last={str(channels_last).lower()}",
    )
    on = torch.device(device)
    data = Resident(
        _images(40),
        _images(4),
        3,
        DataSettings(Path(), False, on, 0),
        validation=0.0,
        mean=None,
        std=None,
        padding=1,
        flip=True,
    )
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(assembly, "load_data", lambda *_: data)
        parts = assembly.assembled(cfg, on)
    model = parts.build("init")
    torch.set_num_threads(num_threads)  # the fixture of all tests puts it back
    trainer = assembly.trainer_for(parts, model, lambda *_: None)
    assert (layout.layout_of(model) == torch.channels_last) == channels_last
    initial = {key: parameter.detach().clone() for key, parameter in model.named_parameters()}
    found = partial(search.search, parts, SharedTraining(trainer), initial, cfg.ablation)
    pruned, _ = found(lambda *_: None, None, lambda _: None)
    return pruned.mask_with_coupled


@pytest.mark.parametrize("name", SCORED)
def test_a_seed_has_one_mask_with_any_threads_and_layout(name: str) -> None:
    plain, other = _mask(name, 1, False), _mask(name, 2, True)
    assert list(plain) == list(other)
    assert sum(int((plain[key] ^ other[key]).sum()) for key in plain) == 0


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", SCORED)
def test_a_seed_has_the_same_mask_on_a_gpu(name: str) -> None:
    plain, other = _mask(name, 1, False), _mask(name, 1, True, "cuda")
    assert sum(int((plain[key] ^ other[key].cpu()).sum()) for key in plain) == 0
