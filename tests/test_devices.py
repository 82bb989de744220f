"""How a process computes: the precision and the determinism that are set, and what is called on a GPU."""

import subprocess
import sys
import warnings
from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import Chain
from few_images import CPU, RECIPE, trainer
from torch import nn

from pai_bench.errors import ConfigError
from pai_bench.masks import masks
from pai_bench.system import devices, distributed
from pai_bench.system.world import World, world
from pai_bench.training import compact

CUDA = torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def flags() -> Iterator[None]:
    restore = devices._algorithms_kept()
    yield
    restore()


@pytest.mark.parametrize("precision", ["float32", "tfloat32", "bfloat16", "float16"])
def test_one_setting_decides_the_precision_of_everything_on_a_gpu(
    precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = []
    monkeypatch.setattr(
        torch.cuda, "set_device", lambda device: chosen.append(torch.cuda._utils._get_device_index(device))
    )
    devices.prepare(CUDA, precision)
    tf32 = precision == "tfloat32"
    assert torch.backends.cuda.matmul.allow_tf32 is tf32
    assert torch.backends.cudnn.allow_tf32 is tf32
    assert torch.backends.cudnn.benchmark
    devices.prepare(torch.device("cuda"), precision)  # torch takes only a GPU with a number
    assert chosen == [0]
    assert (devices.AUTOCAST[precision] is None) == precision.endswith("float32")


def test_the_gpu_of_a_run_has_a_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    alone = World(rank=0, local_rank=0, size=1)
    assert [devices.pick(name, alone) for name in ("auto", "cuda", "cuda:0")] == 3 * [CUDA]
    with pytest.raises(ConfigError, match=r"device=cuda:1: torch .* finds \d+ GPUs here"):
        devices.pick("cuda:1", alone)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(ConfigError, match=r"device=cuda: torch .* finds \d+ GPUs here"):
        devices.pick("cuda", alone)


@pytest.mark.parametrize(
    "launcher",
    [
        {"WORLD_SIZE": "8", "RANK": "{}", "LOCAL_RANK": "{}", "LOCAL_WORLD_SIZE": "4"},
        {
            "SLURM_STEP_NUM_TASKS": "8",
            "SLURM_PROCID": "{}",
            "SLURM_LOCALID": "{}",
            "SLURM_STEP_TASKS_PER_NODE": "4(x2)",
        },
    ],
    ids=["torchrun", "srun"],
)
def test_every_process_says_that_there_are_too_few_gpus(
    launcher: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("WORLD_SIZE", "RANK"):
        monkeypatch.delenv(name, raising=False)
    for rank in range(4):
        for name, value in launcher.items():
            monkeypatch.setenv(name, value.format(rank))
        here = world()
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
        with pytest.raises(
            ConfigError, match=r"^device=cuda: 4 processes on this machine .* it shows 2; start as many"
        ):
            devices.pick("cuda", here)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
        assert devices.pick("cuda", here) == torch.device("cuda", rank)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)  # each sees its own
        assert devices.pick("cuda", here) == CUDA


def test_tfloat32_is_float32_on_a_cpu() -> None:
    devices.prepare(CPU, "tfloat32")
    assert not torch.backends.cuda.matmul.allow_tf32 and not torch.backends.cudnn.allow_tf32
    states = []
    for precision in ("float32", "tfloat32"):
        torch.manual_seed(0)
        model = Chain()
        training = trainer(model, replace(RECIPE, precision=precision))
        training.until(masks.full(model), 2)
        states.append(model.state_dict())
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_scores_are_taken_in_ieee_precision_by_deterministic_algorithms(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    devices.prepare(CUDA, "tfloat32")
    cuda, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn

    def settings() -> tuple[bool, ...]:
        return cuda.allow_tf32, cudnn.allow_tf32, cudnn.benchmark, cudnn.deterministic

    before = settings()
    with devices.reproducible(CUDA):
        assert settings() == (False, False, False, True)
        assert torch.are_deterministic_algorithms_enabled() and torch.is_deterministic_algorithms_warn_only_enabled()
    assert settings() == before == (True, True, True, False) and not torch.are_deterministic_algorithms_enabled()
    with devices.reproducible(CPU):
        assert not torch.are_deterministic_algorithms_enabled()


# A process of its own: torch has no way back to where nothing was set.
OF_OTHERS = """
import torch
from torch import backends
from pai_bench.system import devices
{}
names = ("cuda.matmul", "cudnn.conv", "cudnn.rnn", "mkldnn.matmul", "mkldnn.conv", "mkldnn.rnn")

def found():
    return [eval("backends." + name).fp32_precision for name in names]

before, medium = found(), {}
with devices.settings_restored():
    devices.prepare(torch.device("cpu"), "float32")
    assert not {{"tf32", "bf16"}} & set(found()), found()
    with devices.reproducible(torch.device("cpu")):
        assert not {{"tf32", "bf16"}} & set(found()), found()
assert found() == before, (before, found())
assert medium is None or torch.get_float32_matmul_precision() == medium
"""


@pytest.mark.skipif(not hasattr(torch.backends.cuda.matmul, "fp32_precision"), reason="torch sets precision otherwise")
@pytest.mark.parametrize(
    "setting",
    [
        "backends.cuda.matmul.fp32_precision = 'tf32'",
        "backends.cudnn.conv.fp32_precision = 'ieee'",
        "backends.mkldnn.conv.fp32_precision = 'bf16'",
        "backends.fp32_precision = 'tf32'",
        "torch.set_float32_matmul_precision('medium')",
    ],
)
def test_the_precision_that_others_set_is_theirs_again(setting: str) -> None:
    medium = "'medium'" if "medium" in setting else "None"
    done = subprocess.run([sys.executable, "-c", OF_OTHERS.format(setting, medium)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_what_is_not_deterministic_is_told_once_in_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    monkeypatch.setattr(devices, "_logged_operations", set())
    monkeypatch.setattr(devices.log, "info", lambda words, *given: told.append(words % given))
    for _ in range(2):
        with devices.reproducible(CUDA):
            warnings.warn("upsample_cuda does not have a deterministic implementation, but ...", stacklevel=1)
    assert told == [
        "upsample_cuda has no deterministic algorithm here; scores can differ between runs in their last digits"
    ]
    with pytest.warns(UserWarning, match="something else"), devices.reproducible(CUDA):
        warnings.warn("something else", stacklevel=1)


def test_an_emulated_bfloat16_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)
    with pytest.raises(ConfigError, match=r"training.precision=bfloat16: this GPU has none"):
        devices.check_precision("bfloat16", CUDA)


def test_batch_norms_of_several_gpus_are_synchronised_by_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[tuple[Any, ...]] = []
    monkeypatch.setattr(
        "torch.nn.modules._functions.SyncBatchNorm",
        SimpleNamespace(apply=lambda *arguments: called.append(arguments) or arguments[0]),
    )
    monkeypatch.setattr(distributed.distributed, "get_world_size", lambda: 4)
    monkeypatch.setattr(distributed, "_alone", lambda: False)
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    norm, x = nn.BatchNorm2d(3, momentum=0.3), torch.ones(2, 3, 4, 4)
    with distributed.synchronised_norms(norm):
        assert norm(x) is x
    assert norm.num_batches_tracked == 1
    ((given, weight, bias, mean, variance, eps, rate, _, size),) = called
    assert given is x and weight is norm.weight and bias is norm.bias
    assert mean is norm.running_mean and variance is norm.running_var
    assert (eps, rate, size) == (norm.eps, 0.3, 4)


@pytest.mark.parametrize(("seconds", "is_smaller"), [([1.0, 0.5], True), ([1.0, 0.95], False)])
def test_on_a_gpu_the_measured_steps_decide_about_a_smaller_network(
    seconds: list[float], is_smaller: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compact, "LONG", {})
    measured: list[int] = []
    monkeypatch.setattr(compact, "pass_seconds", lambda *_: measured.append(1) or seconds)
    torch.manual_seed(0)
    model = Chain()
    mask = masks.full(model)
    mask["conv2.weight"][:, 2:] = False
    training = trainer(model, compact_training=True)
    network = training.network
    network.apply_mask(mask)
    network.device = CUDA
    network._find_compact(100)
    assert (network.trained is not model) == is_smaller
    assert training.compact_speedup == seconds[0] / seconds[1]
    network._examined = None  # as in a run that is taken up again: what was measured then decides
    network._compact = None
    network._find_compact(100)
    assert (network.trained is not model) == is_smaller and measured == [1]
