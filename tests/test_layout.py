"""Memory layout: convolutions are given exactly the strides that a network is laid out in, forwards and backwards."""

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from conftest import composed
from few_images import CPU
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from pai_bench import assembly, experiment, search
from pai_bench.core import DataSettings
from pai_bench.data.resident import Resident
from pai_bench.system import layout
from pai_bench.training.reuse import SharedTraining

FIRST, LAST = torch.contiguous_format, torch.channels_last


@pytest.mark.parametrize("form", [FIRST, LAST])
@pytest.mark.parametrize("shape", [(), (3,), (2, 3), (4, 1, 3, 3), (4, 3, 1, 1), (1, 1, 1, 1), (2, 3, 4, 5), (2,) * 5])
def test_what_is_laid_out_has_the_strides_of_a_fresh_tensor(shape: tuple[int, ...], form: torch.memory_format) -> None:
    for given in (FIRST, LAST) if len(shape) == 4 else (FIRST,):
        tensor = torch.randn(shape).to(memory_format=given)
        if len(shape) == 4:  # as data hands them over, which `contiguous` leaves alone where a dimension has one entry
            tensor = tensor.permute(0, 2, 3, 1).clone(memory_format=FIRST).permute(0, 3, 1, 2)
        fresh = torch.empty(shape, memory_format=form if len(shape) == 4 else FIRST)
        found = layout.laid_out(tensor, form)
        assert found.stride() == fresh.stride() == layout.strides(tensor.shape, form)
        assert torch.equal(found, tensor)
        assert layout.laid_out(found, form) is found


def test_a_grey_image_that_counts_as_both_layouts_is_laid_out_anew() -> None:
    grey = torch.zeros(2, 4, 4, 1).permute(0, 3, 1, 2)
    assert grey.is_contiguous() and grey.stride() == (16, 1, 4, 1)  # torch sees no difference; a convolution does
    assert layout.laid_out(grey, FIRST).stride() == (16, 16, 4, 1)


@pytest.mark.parametrize(
    ("layer", "safe"),
    [
        (nn.Conv2d(8, 16, 1, stride=2), False),
        (nn.Conv2d(1, 16, 1, stride=2), False),
        (nn.Conv2d(32, 32, 1, stride=2, groups=4), False),
        (nn.Conv2d(16, 32, 1, stride=2), True),
        (nn.Conv2d(8, 16, 1), True),
        (nn.Conv2d(8, 16, 3, stride=2), True),
        (nn.Linear(4, 4), True),
    ],
)
def test_a_layout_in_which_torch_overwrites_memory_is_avoided(layer: nn.Module, safe: bool) -> None:
    net = nn.Sequential(layer)
    assert layout.suitable(net, CPU, True) == (LAST if safe else FIRST)
    assert layout.suitable(net, CPU, False) == FIRST
    assert layout.suitable(net, torch.device("cuda"), True) == LAST


def test_a_network_tells_its_layout() -> None:
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Conv2d(4, 6, 1), nn.BatchNorm2d(6))
    for form in (FIRST, LAST, FIRST):  # a plain `to` would leave the 1x1 kernels channels last
        layout.lay_out_(net, form)
        assert layout.layout_of(net) == form
        assert [p.stride() for p in net.parameters()] == [layout.strides(p.shape, form) for p in net.parameters()]


class _Convolutions(TorchDispatchMode):
    """Notes of every convolution, forwards and backwards, what torch takes its layout to be."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[torch.memory_format] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "convolution" in str(function):
            tensors = [t for t in args[:3] if isinstance(t, Tensor) and t.ndim == 4]
            self.seen.append(LAST if any(map(_channels_last, tensors)) else FIRST)
        return function(*args, **(kwargs or {}))


def _channels_last(tensor: Tensor) -> bool:
    """As torch decides it: by the strides, where one of the dimensions has one entry, too."""
    return tensor.stride() == layout.strides(tensor.shape, LAST) != layout.strides(tensor.shape, FIRST)


@contextmanager
def threads(number: int) -> Iterator[None]:
    torch.set_num_threads(number)  # the fixture of all tests puts it back
    yield


def images(number: int, channels: int) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(0)
    return generator.integers(0, 256, (number, 8, 8, channels), dtype=np.uint8), np.arange(number) % 3


# One case is enough of scores that lay nothing out themselves.
CASES = [("snip", *case) for case in itertools.product([1, 3], [1, 2], [8, 7])] + [
    ("grasp", 1, 2, 7),
    ("synflow", 1, 2, 7),
]


@pytest.mark.parametrize(("pruner", "channels", "num_threads", "batch_size"), CASES)
@pytest.mark.parametrize(("widths", "form"), [((4, 8), FIRST), ((16, 20), LAST)])
def test_convolutions_of_a_whole_run_see_one_layout(
    channels: int,
    num_threads: int,
    batch_size: int,
    widths: tuple[int, int],
    form: torch.memory_format,
    pruner: str,
    tmp_path: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    data = Resident(
        images(22, channels),
        images(9, channels),
        3,
        DataSettings(tmp_path, False, CPU, 0),
        validation=0.0,
        mean=None,
        std=None,
        padding=1,
        flip=True,
    )
    examples = [f"pruner.scoring_data.{of}" for of in ("per_class=3", "total=null", f"batch_size={batch_size}")]
    cfg = composed(
        f"pruner={pruner}",
        "sparsity=0.9",
        "model=resnet8_thin",
        f"model.widths=[{widths[0]},{widths[1]}]",
        "model.blocks=[1,1]",
        f"training.batch_size={batch_size}",
        "training.epochs=2",
        "schedule=one_shot",
        "diagnostics=gradient_flow",
        *(examples if pruner != "synflow" else []),
    )
    monkeypatch.setattr(assembly, "load_data", lambda *_: data)
    monkeypatch.setattr("pai_bench.training.compact.LONG", {})  # so that a smaller network is looked for
    parts = assembly.assembled(cfg, CPU)
    model = parts.build("init")
    with threads(num_threads):
        trainer = assembly.trainer_for(parts, model, lambda *_: None, assembly.diagnostics(parts, model, {}))
        with _Convolutions() as scoring:
            initial = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
            found = partial(search.search, parts, SharedTraining(trainer), initial, cfg.ablation)
            pruned, _ = found(lambda *_: None, None, lambda _: None)
        with _Convolutions() as training:
            trainer.until(pruned.mask_with_coupled, 2)
        with _Convolutions() as signal:
            experiment._has_signal(model, data, 0, initial, None)
    assert set(scoring.seen) == {FIRST}
    assert set(signal.seen) == {form}
    # A wide network is also looked at by one image, channels first, where a smaller one is looked for.
    assert set(training.seen) == ({FIRST} if form is FIRST else {FIRST, LAST})


def test_a_smaller_network_is_laid_out_by_its_own_widths(monkeypatch: pytest.MonkeyPatch) -> None:
    """What compact training leaves of a wide network can be as narrow as needs be."""
    from test_compact import trained

    from pai_bench.masks import masks

    torch.manual_seed(0)
    net = composed("model=resnet20").model((3, 32, 32), 10)
    mask = masks.full(net)
    for kept in mask.values():
        kept[:, 5:] = False  # nothing reads more than five channels of a layer
    monkeypatch.setattr("pai_bench.training.compact.LONG", {})
    trainer = trained(net.double(), mask, compact=True)
    assert trainer.trained is not trainer.model
    assert layout.layout_of(trainer.model) == LAST
    assert layout.layout_of(trainer.trained) == FIRST
