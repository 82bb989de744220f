"""How work is captured, with a GPU that writes down what it is asked. tests/test_captured*.py run the captured work."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from pai_bench.system import graphs, seeding

SECOND = torch.device("cuda", 1)
WAITS = ["another of cuda:1 waits", "main of cuda:1 waits"]  # before the first runs, and after them


class Gpu:
    """Streams, devices and graphs of torch.cuda. A capture that fails leaves its stream behind, as torch does."""

    def __init__(self, fails: bool) -> None:
        self.fails, self.log = fails, list[str]()
        self.device, self.stream = "cuda:0", "main of cuda:0"

    def current_stream(self) -> "Stream":
        return Stream(self, f"main of {self.device}")

    def new_stream(self) -> "Stream":
        return Stream(self, f"another of {self.device}")

    @contextmanager
    def on(self, stream: Any) -> Iterator[None]:
        before, self.stream = self.stream, str(stream)
        try:
            yield
        finally:
            self.stream = before

    @contextmanager
    def of(self, device: torch.device) -> Iterator[None]:
        before, self.device = self.device, str(device)
        try:
            yield
        finally:
            self.device = before

    @contextmanager
    def graph(self, graph: Any, stream: Any, capture_error_mode: str) -> Iterator[None]:
        self.stream = str(stream)
        self.log.append(f"captured on {stream}, {capture_error_mode}")
        yield
        if self.fails:
            raise RuntimeError("operation not permitted when stream is capturing")
        self.stream = "main of cuda:1"


class Stream:
    def __init__(self, gpu: Gpu, name: str) -> None:
        self.gpu, self.name = gpu, name

    def wait_stream(self, other: "Stream") -> None:
        self.gpu.log.append(f"{self.name} waits")

    def __str__(self) -> str:
        return self.name


@pytest.fixture(params=[False, True], ids=["whole", "fails"])
def gpu(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Gpu:
    gpu = Gpu(request.param)
    for name, value in {
        "CUDAGraph": lambda: type("Graph", (), {"replay": lambda self: gpu.log.append("replayed")})(),
        "current_stream": gpu.current_stream,
        "Stream": gpu.new_stream,
        "stream": gpu.on,
        "device": gpu.of,
        "graph": gpu.graph,
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(seeding, "states", lambda device: [torch.get_rng_state()])
    return gpu


def test_work_is_captured_on_its_own_device_and_leaves_no_trace(gpu: Gpu) -> None:
    total, seen = torch.zeros(1), list[str]()

    def work() -> None:
        total.add_(1)
        seen.append(gpu.stream)

    if gpu.fails:
        with pytest.raises(RuntimeError, match="not permitted"):
            graphs.recorded(work, SECOND, changed=[total], threads=True)
    else:
        graphs.recorded(work, SECOND, changed=[total], threads=True)()
    assert seen == 4 * ["another of cuda:1"]
    assert gpu.log[:3] == [*WAITS, "captured on another of cuda:1, thread_local"]
    assert total == 0 and (gpu.stream, gpu.device) == ("main of cuda:0", "cuda:0")
    assert gpu.log[3:] == ([] if gpu.fails else ["replayed"])


def test_what_an_unfinished_run_changes_is_undone_after_it(gpu: Gpu) -> None:
    def work() -> None:
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        graphs.recorded(work, SECOND)
    assert gpu.log == WAITS and gpu.stream == "main of cuda:0"


@pytest.mark.parametrize("random", [False, True])
def test_numbers_that_the_cpu_draws_would_be_the_same_in_every_run(random: bool, gpu: Gpu) -> None:
    before = torch.get_rng_state()
    with pytest.raises(RuntimeError, match="random numbers are drawn"):
        graphs.recorded(lambda: torch.rand(()), SECOND, random=random)
    assert torch.equal(torch.get_rng_state(), before) and not any("captured" in line for line in gpu.log)
