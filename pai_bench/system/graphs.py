"""Work on a GPU as one CUDA graph. Launching its hundreds of kernels one by one takes longer than running them."""

import logging
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from pai_bench.system import counters, seeding

log = logging.getLogger(__name__)

_WARM_UPS = 3  # runs before the capture: algorithms are chosen, memory is taken, a model is compiled
# Calls ahead from which on a function is recorded. An estimate: to record takes as long as three or four calls, and
# older versions of torch collect garbage first, which takes a tenth of a second. A call of ResNet-20 saves a hundredth.
_PAYS = 16
_MOST = 8  # recorded functions of a search, as each holds the memory of its intermediate results


def supported(device: torch.device) -> bool:
    """Whether a device has graphs."""
    return device.type == "cuda"


def recorded(
    work: Callable[[], None],
    device: torch.device,
    *,
    changed: Sequence[Tensor] = (),
    begin: Callable[[], object] = lambda: None,
    threads: bool = False,
    random: bool = True,
    warm_ups: int = _WARM_UPS,
) -> Callable[[], None]:
    """Records a function and returns what runs it again: the same kernels on the same memory, in one launch.

    The function is run a few times before. It must not wait for the device, and every tensor that it reads or writes
    must stay at its address as long as it is run again.

    Args:
        changed: the tensors that the function changes. They and torch's random numbers are as before afterwards.
        begin: called before each of the first runs.
        threads: whether other threads use the device meanwhile, for example to pin memory.
        random: whether the function may draw random numbers on the device. On the CPU it may not.
        warm_ups: how often it is run before.

    Raises:
        RuntimeError: the function does something that cannot be recorded, or the memory is too small.
    """
    before, numbers = [tensor.detach().clone() for tensor in changed], seeding.states(device)
    graph = torch.cuda.CUDAGraph()
    try:
        # The device may be another one than the current one, whose streams know nothing of the work.
        with torch.cuda.device(device):
            current, aside = torch.cuda.current_stream(), torch.cuda.Stream()  # type: ignore[no-untyped-call]
            aside.wait_stream(current)
            try:
                with torch.cuda.stream(aside):
                    for _ in range(warm_ups):
                        begin()
                        work()
            finally:
                current.wait_stream(aside)  # also before what a run has changed is undone
            drawn = seeding.states(device)
            # A graph draws on the device each time it is run. What the CPU draws would be the same each time.
            refuse_random(*(states if not random else states[:1] for states in (numbers, drawn)))
            # A capture that fails leaves its stream the current one; the block around it gives the old one back.
            mode = "thread_local" if threads else "global"
            with torch.cuda.stream(current), torch.cuda.graph(graph, stream=aside, capture_error_mode=mode):
                work()
    finally:
        with torch.no_grad():
            for tensor, value in zip(changed, before, strict=True):
                tensor.copy_(value)
        seeding.set_states(numbers, device)
    return graph.replay


def refuse_random(before: Sequence[Tensor], after: Sequence[Tensor]) -> None:
    """Refuses work between whose start and end the states of random generators have changed.

    Raises:
        RuntimeError: they have.
    """
    if not all(map(torch.equal, before, after)):
        raise RuntimeError("random numbers are drawn")


class Repeater:
    """Calls functions of tensors that the rounds of a search call again and again: a `core.Repeat`.

    On a GPU, the first call of a function is a plain one. Where enough calls are ahead, the second records it on
    tensors of its own, and it and later ones run the record. Records hold memory as long as this object lives.

    Args:
        model: the functions may read it beside their inputs. They change nothing.
    """

    def __init__(self, device: torch.device, model: nn.Module) -> None:
        self._device, self._model = device, model
        self._rounds_left = 1
        self._flops: dict[Hashable, int] = {}  # of one call of each function that was called
        self._calls: Counter[Hashable] = Counter()  # in this round
        self._records: dict[Hashable, _Record] = {}
        self._obstacle: str | None = None  # why nothing more is recorded

    def begin(self, rounds_left: int) -> None:
        """Begins a round.

        Args:
            rounds_left: how many there are from here on, this one included.
        """
        self._rounds_left = rounds_left
        self._calls.clear()

    def __call__(
        self, function: partial[Sequence[Tensor]], per_round: int, *inputs: Sequence[Tensor]
    ) -> Sequence[Tensor]:
        """What a function of tensors returns. The next call may overwrite it.

        Args:
            function: what it is given beside the inputs says which function it is.
            per_round: how often a round calls it, with inputs of the same shapes.
        """
        if not supported(self._device):
            return function(*inputs)
        key = self._key(function, inputs)
        if key is None:
            return function(*inputs)
        ahead = per_round * self._rounds_left - self._calls[key]
        self._calls[key] += 1
        known = key in self._flops
        if known and key not in self._records and ahead >= _PAYS:
            self._record(key, function, inputs)
        if key in self._records:
            with counters.paused():
                outputs = self._records[key](inputs)
            counters.add(self._flops[key])
            return outputs
        before = counters.active[-1].flops if counters.active else 0
        outputs = function(*inputs)
        if not known:
            self._flops[key] = counters.active[-1].flops - before if counters.active else 0
        return outputs

    def _record(self, key: Hashable, function: partial[Sequence[Tensor]], inputs: Sequence[Sequence[Tensor]]) -> None:
        """Records a function, if nothing is in the way."""
        if self._obstacle is not None:
            return
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            self._give_up("several processes search")
        elif torch.is_autocast_enabled(self._device.type):
            self._give_up("autocast is on")
        elif len(self._records) == _MOST:
            self._give_up(f"{_MOST} passes are recorded already")
        else:
            try:
                with counters.paused():
                    self._records[key] = _Record(function, inputs, self._device)
            except RuntimeError as error:
                self._give_up(f"they cannot be captured ({str(error).partition(chr(10))[0]})")

    def _give_up(self, obstacle: str) -> None:
        """Notes why nothing more is recorded, and logs it."""
        if self._obstacle is None:
            self._obstacle = obstacle
            log.info("the kernels of the scores are launched one by one: %s", obstacle)

    def _key(self, function: partial[Any], inputs: Sequence[Sequence[Tensor]]) -> Hashable | None:
        """What a record holds for: the function, the layout of its inputs, and where and in which mode the model is.

        None: the settings of the function cannot be compared.
        """
        tensors = (tensor for each in inputs for tensor in each)
        layouts = tuple((tensor.shape, tensor.stride(), tensor.dtype, tensor.requires_grad) for tensor in tensors)
        own = (tensor for each in (self._model.parameters(), self._model.buffers()) for tensor in each)
        places = tuple(tensor.data_ptr() for tensor in own)
        modes = tuple(module.training for module in self._model.modules())
        settings = tuple(sorted(function.keywords.items()))
        key = (function.func, function.args, settings, tuple(map(len, inputs)), layouts, places, modes)
        try:
            hash(key)
        except TypeError as error:
            self._give_up(str(error))
            return None
        return key


class _Record:
    """A function on inputs in fixed memory, as one CUDA graph."""

    def __init__(
        self, function: partial[Sequence[Tensor]], inputs: Sequence[Sequence[Tensor]], device: torch.device
    ) -> None:
        self._function = function
        self._inputs = [
            [tensor.detach().clone().requires_grad_(tensor.requires_grad) for tensor in each] for each in inputs
        ]
        self._outputs: Sequence[Tensor] = ()
        # The plain call before was a warm-up too. Streamed images may be read by threads meanwhile.
        self._replay = recorded(self._take, device, threads=True, random=False, warm_ups=1)

    def __call__(self, inputs: Sequence[Sequence[Tensor]]) -> Sequence[Tensor]:
        with torch.no_grad():
            for own, given in zip(self._inputs, inputs, strict=True):
                if own:
                    torch._foreach_copy_(own, list(given))
        self._replay()
        return self._outputs

    def _take(self) -> None:
        self._outputs = self._function(*self._inputs)
