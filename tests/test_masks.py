"""Masks: which weights they cover, how many they keep, and what they do to a model."""

from typing import Any

import pytest
import torch
from conftest import Chain
from torch import Generator, nn
from torch.utils._python_dispatch import TorchDispatchMode

from pai_bench.errors import ConfigError
from pai_bench.masks import clearing, known_positions, masks


def test_prunable_are_weights_of_convolutions_and_linear_layers() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3),
        nn.BatchNorm2d(4),
        nn.Conv2d(4, 4, 3, groups=4),
        nn.ConvTranspose2d(4, 2, 2),
        nn.LayerNorm(5),
        nn.Embedding(3, 5),
        nn.Linear(5, 2),
    )
    assert list(masks.prunable(model)) == ["0.weight", "2.weight", "3.weight", "6.weight"]


@pytest.mark.parametrize("widths", [{}, {"kdim": 6, "vdim": 10}], ids=["packed", "separate"])
def test_the_projections_of_attention_are_prunable(widths: dict[str, int]) -> None:
    attention = nn.MultiheadAttention(8, 2, batch_first=True, **widths)
    packed = ["in_proj_weight"] if not widths else ["q_proj_weight", "k_proj_weight", "v_proj_weight"]
    assert list(masks.prunable(attention)) == [*packed, "out_proj.weight"]
    assert not masks.unprunable(attention)


def test_other_weights_of_two_dimensions_are_known() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Embedding(3, 5), nn.LayerNorm([2, 3]), nn.PReLU(4), nn.LSTM(2, 3))
    model.token = nn.Parameter(torch.zeros(1, 1, 7))
    model[0] = nn.utils.parametrizations.weight_norm(model[0])
    assert list(masks.unprunable(model)) == [
        "0.parametrizations.weight.original1",
        "1.weight",
        "2.weight",
        "2.bias",
        "4.weight_ih_l0",
        "4.weight_hh_l0",
    ]


def test_a_shared_weight_counts_once() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    assert masks.total(masks.prunable(model)) == 16


@pytest.mark.parametrize(
    ("sparsity", "num_prunable", "expected"),
    [(0.98, 14_761_664, 295_233), (0.9, 14_761_664, 1_476_166), (0.0, 7, 7), (0.98, 100, 2), (0.999, 1000, 1)],
)
def test_num_kept_is_the_rounded_density(sparsity: float, num_prunable: int, expected: int) -> None:
    assert masks.num_kept(sparsity, num_prunable) == expected


def test_a_whole_number_of_weights_is_not_rounded() -> None:
    assert {masks.num_kept(0.98, 100, rounding) for rounding in ("nearest", "up", "down")} == {2}  # 1 - 0.98 > 0.02
    assert {masks.num_kept(0.93, 100, rounding) for rounding in ("nearest", "up", "down")} == {7}  # 1 - 0.93 < 0.07


def test_a_sparsity_that_leaves_nothing_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"leaves none of 100 weights; give at most 0\.99"):
        masks.num_kept(0.9999, 100)


def test_positions_are_flat_and_ascending() -> None:
    mask = torch.tensor([[False, True, False], [False, False, True]])
    assert masks.positions(mask).tolist() == [1, 5]


def test_known_positions_are_forgotten_when_the_mask_changes() -> None:
    positions = torch.arange(3, 300_000, 100)
    mask = known_positions.mask_at(torch.Size((300, 1000)), positions)
    assert known_positions.known(mask) is positions and masks.count(mask) == len(positions)
    assert torch.equal(mask.flatten().nonzero().squeeze(1), positions)
    assert known_positions.known(mask.clone()) is None
    mask[0, 0] = True
    assert known_positions.known(mask) is None
    assert masks.positions(mask).tolist() == [0, *positions.tolist()] and masks.count(mask) == len(positions) + 1


@pytest.mark.parametrize("form", [torch.contiguous_format, torch.channels_last])
def test_clearing_what_a_narrower_mask_removes_gives_the_bits_of_the_plain_formula(form: torch.memory_format) -> None:
    generator = Generator().manual_seed(0)
    weight = torch.randn((150, 130, 3, 3), generator=generator).contiguous(memory_format=form)
    first = torch.rand(weight.shape, generator=generator) < 0.2
    for before in (None, first, known_positions.mask_at(weight.shape, masks.positions(first))):
        kept = first & (torch.rand(weight.shape, generator=generator) < 0.5)
        found = weight.clone()
        if before is not None:
            clearing.clear_plainly_(found, before)
        expected = found.clone()
        clearing.clear_removed_(found, before, kept)
        clearing.clear_plainly_(expected, kept)
        assert torch.equal(found.view(torch.int32), expected.view(torch.int32))


def test_channels_are_connected_by_any_weight_of_a_kernel() -> None:
    generator = Generator().manual_seed(0)
    for shape in ((40, 30, 3, 3), (40, 30, 1, 1), (40, 30, 5), (40, 30)):
        mask = torch.rand(shape, generator=generator) < 0.1
        assert torch.equal(masks.connected(mask), mask.view(40, 30, -1).sum(2) > 0)


def test_apply_zeroes_the_pruned_weights_and_no_others() -> None:
    model = Chain(bias=True)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    mask = {name: torch.rand(weight.shape) < 0.5 for name, weight in masks.prunable(model).items()}
    masks.apply_(model, mask)
    for name, value in model.state_dict().items():
        expected = before[name] * mask[name] if name in mask else before[name]
        assert torch.equal(value, expected)


def test_a_large_weight_is_cleared_in_one_launch_where_there_is_no_cache_to_keep_to() -> None:
    class Launches(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.names: list[str] = []

        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.names.append(function.overloadpacket.__name__)
            return function(*args, **(kwargs or {}))

    shape = (16, clearing._IN_CACHE)
    with Launches() as seen:
        clearing.clear_(torch.empty(shape, device="meta"), torch.empty(shape, dtype=torch.bool, device="meta"))
    assert seen.names.count("bitwise_and_") == 1


@pytest.mark.parametrize("form", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [(150, 130), (5, 4)])
def test_clearing_gives_the_bits_of_the_plain_formula(
    size: tuple[int, int], dtype: torch.dtype, form: torch.memory_format
) -> None:
    generator = Generator().manual_seed(0)
    weight = torch.randn((*size, 3, 3), generator=generator).to(dtype).contiguous(memory_format=form)
    for special in (-0.0, torch.nan, torch.inf, -torch.inf):
        weight[torch.rand(weight.shape, generator=generator) < 0.1] = special
    assert (weight.numel() > clearing._IN_CACHE) == (size == (150, 130))
    kept = torch.rand(weight.shape, generator=generator) < 0.5
    found, expected = weight.clone(), weight.clone()
    clearing.clear_(found, kept)
    clearing.clear_plainly_(expected, kept)
    bits = clearing._INTEGERS[weight.element_size()]
    assert torch.equal(found.view(bits), expected.view(bits))
    assert torch.equal(found.view(bits)[kept], weight.view(bits)[kept])
    assert not found.view(bits)[~kept].any()  # +0, whatever stood there


def test_measures_of_a_mask() -> None:
    mask = {"a": torch.tensor([True, False, False, True]), "b": torch.tensor([False] * 6)}
    assert masks.kept(mask) == 2
    assert masks.sparsity(mask) == 0.8
    assert masks.densities(mask) == {"a": 0.5, "b": 0.0}
    assert masks.collapsed(mask) == ["b"]
