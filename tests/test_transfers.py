"""Transfers: the weights that training starts from, what they keep, and what is refused."""

import copy
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Chain, composed, options, residual
from few_images import half
from safetensors.torch import load_file, save_file
from test_config import MANDATORY
from torch import Generator, nn
from whole_runs import TINY, directory_of, read

from pai_bench import experiment
from pai_bench.analysis import signs
from pai_bench.core import State, Weights
from pai_bench.errors import ConfigError, UserError
from pai_bench.launch import compose
from pai_bench.masks import masks
from pai_bench.models.initialization import initialize_
from pai_bench.pruning import transfers

TRANSFERS = sorted(set(options("transfer")) - {"none"})


def drawn(seed: int, net: str = "chain") -> nn.Module:
    torch.manual_seed(seed)
    return Chain(bias=True) if net == "chain" else residual()


def generator() -> Generator:
    return Generator().manual_seed(3)


def applied(option: str, net: str = "chain") -> tuple[State, State, masks.Mask]:
    """The state before and after a transfer, and the mask."""
    rule = composed("pruner=magnitude", "sparsity=0.5", f"transfer={option}", *MANDATORY.get(option, [])).transfer
    assert rule is not None
    own, fresh = (drawn(seed, net).state_dict() for seed in (0, 1))
    mask = half(drawn(0, net))
    return own, transfers.transferred(rule, own, fresh, mask, generator(), option)[0], mask


# Contract -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("net", ["chain", "residual"])
@pytest.mark.parametrize("option", TRANSFERS)
def test_a_transfer_gives_finite_weights_and_leaves_the_rest(option: str, net: str) -> None:
    own, state, mask = applied(option, net)
    assert state.keys() == own.keys()
    for name, value in state.items():
        assert value.shape == own[name].shape and value.dtype == own[name].dtype
        assert value.isfinite().all()
        if name not in mask:
            assert torch.equal(value, own[name])
    assert any((state[name] != own[name])[kept].any() for name, kept in mask.items())


@pytest.mark.parametrize("option", TRANSFERS)
def test_a_transfer_is_a_function_of_its_arguments(option: str) -> None:
    rule = composed("pruner=magnitude", "sparsity=0.5", f"transfer={option}", *MANDATORY.get(option, [])).transfer
    assert rule is not None
    own, fresh = (drawn(seed).state_dict() for seed in (0, 1))
    mask = half(drawn(0))
    before = copy.deepcopy((own, fresh, mask))
    found = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        random = torch.get_rng_state()
        found.append(transfers.transferred(rule, own, fresh, mask, generator(), option))
        assert torch.equal(torch.get_rng_state(), random)
    assert found[0][1] == found[1][1]
    assert all(torch.equal(value, found[1][0][name]) for name, value in found[0][0].items())
    for given, kept in zip((own, fresh, mask), before, strict=True):
        assert all(torch.equal(given[name], value) for name, value in kept.items())


def test_no_transfer_may_change_nothing() -> None:
    own = drawn(0).state_dict()
    full = masks.full(drawn(0))
    with pytest.raises(UserError, match="transfer=same: it changed nothing"):
        transfers.transferred(transfers.rescale, own, own, full, generator(), "same")

    def endless(own: Weights, *others: Any) -> Weights:
        return {name: weight / 0 for name, weight in own.items()}

    with pytest.raises(UserError, match=r"it gives conv1\.weight values that are not finite"):
        transfers.transferred(endless, own, own, full, generator(), "endless")


# Identities -----------------------------------------------------------------------------------------------------------


def wide(seed: int, scheme: Any) -> nn.Module:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(100, 4000, bias=False))
    return initialize_(model, {"conv": scheme, "linear": scheme, "norm": "ones"})


@pytest.mark.parametrize("scheme", ["kaiming_normal_fan_in", "kaiming_normal_fan_out", "xavier_normal", "framework"])
def test_pre_activations_of_fan_in_have_the_variance_of_the_dense_network(scheme: str) -> None:
    dense = wide(0, scheme)[0].weight.detach()
    mask = {"w": torch.rand(dense.shape, generator=generator()) < torch.linspace(0.03, 0.8, 4000)[:, None]}
    found = transfers.fan_in({"w": dense}, {"w": wide(1, scheme)[0].weight.detach()}, mask, generator())["w"]
    kept, inputs = found * mask["w"], mask["w"].sum(1)
    images = torch.randn(200, 100, generator=generator())
    variance = float((images @ dense.T).var())
    for part in (inputs > 40, (inputs > 0) & (inputs < 15)):
        assert int(part.sum()) > 300
        assert float((images @ kept[part].T).var()) == pytest.approx(variance, rel=0.06)
    assert float((images @ (dense * mask["w"]).T).var()) < 0.6 * variance  # else the test could not fail


def test_fan_in_draws_by_the_number_of_kept_inputs() -> None:
    model = wide(0, "kaiming_normal_fan_in")
    mask = {"w": torch.zeros(4000, 100, dtype=torch.bool)}
    mask["w"][:, :4] = True
    found = transfers.fan_in({}, {"w": model[0].weight.detach()}, mask, generator())["w"]
    assert float(found[mask["w"]].std()) == pytest.approx(math.sqrt(2 / 4), rel=0.02)


def test_fan_in_of_a_full_mask_is_the_draw_itself_and_no_input_gives_no_value_that_is_not_finite() -> None:
    own, fresh = (dict(masks.prunable(drawn(seed))) for seed in (0, 1))
    full = masks.full(drawn(0))
    found = transfers.fan_in(own, fresh, full, generator())
    assert all(torch.equal(weight, fresh[name]) for name, weight in found.items())
    full["conv2.weight"][3] = False
    found = transfers.fan_in(own, fresh, full, generator())
    assert found["conv2.weight"].isfinite().all()
    assert torch.equal(found["conv2.weight"][2], fresh["conv2.weight"][2])


def test_rescaled_layers_have_the_sum_of_squares_of_the_dense_ones() -> None:
    own, state, mask = applied("rescale")
    for name, kept in mask.items():
        factors = state[name] / own[name]
        assert float(factors.min()) == pytest.approx(float(factors.max()), rel=1e-6) and factors.min() > 1.2
        squares = (state[name] * kept).square().sum()
        torch.testing.assert_close(squares, own[name].square().sum(), rtol=1e-5, atol=0)


def test_signs_and_magnitudes_come_from_one_network_each(tmp_path: Path) -> None:
    own, fresh = (dict(masks.prunable(drawn(seed))) for seed in (0, 1))
    other = {name: weight.detach().clone() for name, weight in drawn(2).state_dict().items()}
    other["fc.weight"][0] = 0
    save_file(other, tmp_path / "other.safetensors")
    path, mask = str(tmp_path / "other.safetensors"), masks.full(drawn(0))
    signed = transfers.signs(own, fresh, mask, generator(), weights=path)
    sized = transfers.magnitudes(own, fresh, mask, generator(), weights=path)
    for name, weight in own.items():
        there = other[name] != 0
        assert torch.equal(signed[name].abs(), weight.abs()) and torch.equal(sized[name].sign(), weight.sign())
        assert torch.equal(signed[name].sign()[there], other[name].sign()[there])
        assert torch.equal(sized[name].abs()[there], other[name].abs()[there])
    assert torch.equal(signed["fc.weight"][0], own["fc.weight"][0])
    assert torch.equal(sized["fc.weight"][0], own["fc.weight"][0])
    by_chance = transfers.signs(own, fresh, mask, generator(), weights=None)
    assert all(torch.equal(by_chance[name].sign(), fresh[name].sign()) for name in own)


def test_agreement_of_signs_by_hand() -> None:
    model = nn.Sequential(nn.Linear(4, 1, bias=False), nn.Linear(1, 2, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[1.0, -2.0, 0.0, 3.0]]))
        model[1].weight.copy_(torch.tensor([[0.5], [-0.5]]))
        before = signs.of(model)
        model[0].weight.copy_(torch.tensor([[2.0, 1.0, 5.0, -3.0]]))
    mask = {"0.weight": torch.tensor([[True, True, True, False]]), "1.weight": torch.tensor([[True], [False]])}
    found = signs.agreement(before, model, mask)
    assert found == signs.Agreement(2 / 3, {"0.weight": 0.5, "1.weight": 1.0})
    nothing = {name: torch.zeros_like(kept) for name, kept in mask.items()}
    assert signs.agreement(before, model, nothing) == signs.Agreement(None, {"0.weight": None, "1.weight": None})


# Whole runs -----------------------------------------------------------------------------------------------------------


def done(results: Path, *overrides: str) -> Path:
    short = ["training.epochs=1", "training.warmup_epochs=0", f"results_dir={results}"]
    experiment.run(composed(*TINY, *short, *overrides))
    return directory_of(results)


@pytest.fixture(scope="module")
def ticket(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run, whose mask and weights others take."""
    torch.set_num_threads(1)
    return done(tmp_path_factory.mktemp("ticket"), "pruner=magnitude", "sparsity=0.8", "seed=7", "prunable=conv")


def test_a_run_starts_from_its_own_weights_with_the_signs_of_another(ticket: Path, tmp_path: Path) -> None:
    file, rate = ticket / "model.safetensors", ["training.lr=1e-9", "training.weight_decay=0"]
    given = [f"mask={ticket}/mask.safetensors", "prunable=conv", "seed=1", *rate]
    alone = load_file(done(tmp_path / "mask", *given) / "model.safetensors")
    directory = done(tmp_path / "signs", *given, "transfer=signs", f"transfer.weights={file}")
    found, theirs = load_file(directory / "model.safetensors"), load_file(file)
    mask = load_file(ticket / "mask.safetensors")
    names = {*mask, "fc.weight"}
    for name in names:  # the classifier is not pruned, and gets signs too
        torch.testing.assert_close(found[name].abs(), alone[name].abs(), rtol=1e-4, atol=1e-6)
        assert torch.equal(found[name].sign(), theirs[name].sign())
    assert all(not found[name][~kept].any() for name, kept in mask.items())
    row = read(directory, "result.json")
    same = {name: (alone[name].sign() == theirs[name].sign())[mask.get(name, theirs[name] != 0)] for name in names}
    expected = sum(int(s.sum()) for s in same.values()) / sum(s.numel() for s in same.values())
    assert row["transfer_overlap"] == pytest.approx(expected) and 0.4 < expected < 0.6
    assert (row["transfer"], row["sign_agreement"], row["ablation_overlap"]) == ("signs", 1.0, None)
    assert "-mask-s0.8-signs-seed1-" in directory.name
    assert {layer["sign_agreement"] for layer in read(directory, "mask.json")["layers"]} == {1.0}


def test_a_mask_alone_is_trained_from_the_weights_of_the_seed(ticket: Path, tmp_path: Path) -> None:
    rate = ["training.lr=1e-9", "training.weight_decay=0", "prunable=conv"]
    found = done(tmp_path / "ours", f"mask={ticket}/mask.safetensors", "seed=1", *rate)
    dense = load_file(done(tmp_path / "dense", "pruner=dense", "seed=1", *rate[:2]) / "model.safetensors")
    mask, weights = (load_file(found / f"{name}.safetensors") for name in ("mask", "model"))
    for name, kept in mask.items():
        assert torch.equal(kept, load_file(ticket / "mask.safetensors")[name])
        torch.testing.assert_close(weights[name], dense[name] * kept, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "search", [["schedule=lr_rewind", "schedule.levels=2"], ["rewire=set", "rewire.every_steps=2", "pruner=random"]]
)
def test_a_transfer_takes_the_place_of_what_a_search_leaves(search: list[str], tmp_path: Path) -> None:
    settings = ["pruner=magnitude", "sparsity=0.6", *search, "transfer=fan_in"]
    directory = done(tmp_path, *settings)
    row = read(directory, "result.json")
    mask, weights = (load_file(directory / f"{name}.safetensors") for name in ("mask", "model"))
    assert all(not weights[name][~kept].any() for name, kept in mask.items())
    assert row["num_kept"] == masks.num_kept(0.6, row["num_prunable"])
    assert 0.4 < row["transfer_overlap"] < 0.6 and 0.5 < row["sign_agreement"] <= 1
    assert row["train_examples"] == 1438


# Names and refusals ---------------------------------------------------------------------------------------------------

SYNFLOW = ["pruner=synflow", "sparsity=0.9"]


def test_what_a_file_holds_is_part_of_the_name_and_not_where_it_lies(tmp_path: Path) -> None:
    def config(name: str, seed: int = 0, *more: str) -> Any:
        save_file({"w": torch.full((2,), float(seed))}, tmp_path / name)
        return composed(*SYNFLOW, "transfer=signs", f"transfer.weights={tmp_path / name}", *more)

    one, moved, other = config("a.safetensors"), config("b.safetensors"), config("c.safetensors", 1)
    assert one.id == moved.id != other.id and one.checksums.transfer != other.checksums.transfer
    assert one.task == composed(*SYNFLOW).task and one.method != composed(*SYNFLOW).method
    assert one.chain == composed(*SYNFLOW).chain
    assert "-synflow-s0.9-signs-seed0-" in one.id and "signs" in one.tags
    assert composed(*SYNFLOW, "transfer=none").id == composed(*SYNFLOW).id


def test_signs_and_their_control_are_one_sweep(tmp_path: Path) -> None:
    save_file({"w": torch.eye(2)}, tmp_path / "a.safetensors")
    words = [*SYNFLOW, "transfer=signs,magnitudes", f"transfer.weights={tmp_path}/a.safetensors", "seed=0,1"]
    found, _ = compose.expand(words)
    assert [config.transfer and config.transfer.name for config in found] == ["signs"] * 2 + ["magnitudes"] * 2
    assert len({config.id for config in found}) == 4 and len({config.group for config in found}) == 2


def test_seeds_of_named_masks_with_their_signs_are_one_group(tmp_path: Path) -> None:
    save_file({"w": torch.eye(2)}, tmp_path / "mask.safetensors")

    def config(seed: int) -> Any:
        file = tmp_path / f"{seed}.safetensors"
        save_file({"w": torch.full((2,), float(seed))}, file)
        given = [f"mask={tmp_path}/mask.safetensors", "mask_name=aws", f"seed={seed}"]
        return composed(*given, "transfer=signs", f"transfer.weights={file}")

    assert config(1).group == config(2).group and config(1).id != config(2).id
    alone = composed(f"mask={tmp_path}/mask.safetensors", "mask_name=aws", "seed=1")
    assert alone.group != config(1).group and alone.method != config(1).method


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["pruner=dense", "transfer=fan_in"], "a dense network has no mask"),
        ([*SYNFLOW, "transfer=fan_in", "ablation=reinit"], "ablation=reinit changes the weights too"),
        ([*SYNFLOW, "transfer=fan_in", "ablation=shuffle_weights"], "ablation=shuffle_weights changes the weights"),
        (["pruner=ntt", "sparsity=0.5", "transfer=fan_in"], "pruner=ntt gives the weights values of its own"),
        (["search=edge_popup", "sparsity=0.5", "transfer=fan_in"], "search=edge_popup chooses the weights"),
        (["rewire=acdc", "sparsity=0.5", "transfer=fan_in"], "rewire=acdc starts from the dense network"),
        ([*SYNFLOW, "allocation=sampled", "allocation.rescale=true", "transfer=fan_in"], "would undo allocation"),
        ([*SYNFLOW, "transfer=signs"], "transfer.weights"),
        ([*SYNFLOW, "transfer.weights=some.pt"], "transfer.weights=some.pt: nothing is transferred; add transfer=NAME"),
        ([*SYNFLOW, "transfer=signs", "transfer.weights=nosuch.pt"], "transfer.weights=nosuch.pt: it cannot be read"),
        ([*SYNFLOW, "checksums.transfer=abc"], "checksums.transfer=abc: add transfer=NAME"),
    ],
)  # fmt: skip
def test_what_makes_no_sense_is_refused_in_one_line(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as raised:
        composed(*overrides)
    assert "\n" not in str(raised.value)


def test_a_file_of_another_model_is_refused_before_anything_is_scored(ticket: Path, tmp_path: Path) -> None:
    file = f"transfer.weights={ticket}/model.safetensors"
    for model, message in (
        (["model=lenet300"], r"there is no layers\.1\.weight"),
        (["model.widths=[4,8]", "model.blocks=[1,1]"], r"stages\.1\.0\.conv1\.weight is \(6, 4, 3, 3\), in the model"),
    ):
        config = composed("tracker=none", *SYNFLOW, *model, "transfer=signs", file, f"results_dir={tmp_path}")
        with pytest.raises(ConfigError, match=message):
            experiment.run(config)
    config = composed(*TINY, *SYNFLOW, "transfer=signs", file, f"results_dir={tmp_path}")
    changed = replace(config, checksums=replace(config.checksums, transfer="0" * 64))
    with pytest.raises(ConfigError, match=r"transfer\.weights=.*: it has changed since the run was composed"):
        experiment.run(changed)
