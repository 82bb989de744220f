"""A mask for any model: the pruners of conf/ on a network and data of the user's."""

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from pai_bench.analysis import operations
from pai_bench.analysis.mode import mode
from pai_bench.api import networks
from pai_bench.api.examples import Examples
from pai_bench.api.isolation import untouched
from pai_bench.api.methods import Method, method
from pai_bench.assembly import check_prunable, of_classes, tell_of_dense
from pai_bench.config.signatures import shown
from pai_bench.core import Allocate, Loss, Mask, Schedule, Score
from pai_bench.errors import ConfigError
from pai_bench.masks import layers, masks
from pai_bench.pruning import rounds
from pai_bench.pruning.pruned import Pruned

log = logging.getLogger(__name__)


def prune(
    model: nn.Module,
    pruner: str | Score,
    *,
    sparsity: float | None = None,
    density: float | None = None,
    compression: float | None = None,
    data: Iterable[Any] | None = None,
    input_shape: tuple[int, ...] | None = None,
    schedule: str | Schedule | None = None,
    allocation: str | Allocate | None = None,
    prunable: str | Sequence[str] = "all",
    target: str = "sparsity",
    repair: str | None = None,
    settings: Mapping[str, Any] | None = None,
    mask: Mask | None = None,
    build: Callable[[], nn.Module] | None = None,
    loss: Loss = F.cross_entropy,
    seed: int = 0,
) -> Mask:
    """Prunes a model: returns a mask, and sets the pruned weights of the model to zero.

    It is the mask that a run of the command line finds for the same weights, batches and seed. What is not given comes
    from the yaml of the pruner. The model's modes, gradients and buffers stay as they are, and so do random states;
    scores see a copy of the model in float64. Wrappers of torch.compile and data parallelism are looked through.

    Args:
        model: any module that gives logits (B, K) for images (B, C, H, W). The weights of convolutions, linear layers
            and nn.MultiheadAttention are pruned, frozen ones too. Weights that layers share count once.
        pruner: an option of conf/pruner, such as "synflow", or a score: a function of (net, batches, loss, generator)
            that returns a number for each weight, higher = keep (core.Score).
        sparsity: the fraction of these weights (of filters, for pruners of filters) that becomes zero, in [0, 1).
        density: 1 - sparsity; give one of the three.
        compression: 1 / density.
        data: batches (images, labels), such as a DataLoader or a list. A score takes as many examples as its yaml says
            (pruner.scoring_data), as many of each class if it says so, in the order in which they come. Every round
            takes the next ones. Images are used as they come: a loader that augments does so here too.
        input_shape: the shape of one image (C, H, W), where no data is given.
        schedule: an option of conf/schedule, or a function of (sparsity, length) that returns core.Rounds.
        allocation: an option of conf/allocation, or a function of (scores, candidates, keep, generator) that returns a
            core.Selection.
        prunable: which layers are pruned: "all", or one or several of "no_first", "no_last", "no_shortcut" and "conv".
            The others stay whole. They count in no sparsity, and are not in the mask.
        target: "sparsity", or "effective": kept weights on no path from the image to an output count as zero, too. Then
            the mask keeps as few weights as have this effective sparsity, or the next lower one.
        repair: "flow": every output and every input of a layer keeps a weight, and as many are removed elsewhere.
        settings: other settings by the names that they have on the command line, such as
            {"pruner.score.temperature": 100, "schedule.rounds": 10}.
        mask: what is pruned already. It stays pruned, and counts as pruned in the sparsity.
        build: makes such a model anew, for methods that draw new weights (`ntk_sap`). Its weights come from torch's
            global generator, which is seeded meanwhile.
        loss: of outputs and labels, a scalar.
        seed: of all that is random in a method, and of the order and augmentations of a loader.

    Returns:
        A bool tensor for each weight, by its name in model.named_parameters(), True = kept. Where filters are pruned,
        masks of their norms and biases are in it too.

    Raises:
        ConfigError: an argument is wrong, or the method needs data, an image shape or training.
        UserError: the scores cannot rank the weights.

    Example:
        >>> mask = pai_bench.prune(model, "synflow", sparsity=0.98, input_shape=(3, 32, 32))
    """
    network = networks.check_model(model)
    targets = {"sparsity": sparsity, "density": density, "compression": compression}
    chosen = method(
        pruner,
        targets,
        schedule=schedule,
        allocation=allocation,
        prunable=prunable,
        target=target,
        repair=repair,
        settings=settings or {},
        seed=seed,
        has_data=data is not None,
    )
    with untouched():
        copied = networks.copied(network)
        networks.check_build(copied, chosen.pruner, build)
        device = next(copied.parameters()).device
        examples = None if data is None else Examples(data, device, seed, classes=loss is F.cross_entropy)
        shape = _shape(chosen, examples, input_shape)
        num_classes = _examined(copied, examples, shape, chosen)
        if examples is not None:
            examples.num_classes = num_classes
            _tell_of_logits(examples, chosen)
        before = None if mask is None else _begun(copied, chosen, mask)
        pruned = rounds.prune(
            copied,
            chosen.pruner,
            layers.allocated(copied, chosen.allocate, repair=chosen.repair),
            chosen.rounds,
            initial={name: parameter.detach().clone() for name, parameter in copied.named_parameters()},
            input_shape=shape,  # type: ignore[arg-type]  # images have three dimensions, other inputs may have others
            draw=_no_data if examples is None else examples.draw,
            loss=loss,
            seed=seed,
            prunable=chosen.prunable,
            target=chosen.target,
            build=build,
            resume_from=before,
        )
        found = {name: kept.clone() for name, kept in pruned.mask_with_coupled.items()}
    with torch.no_grad():
        for parameter, value in zip(network.parameters(), copied.parameters(), strict=True):
            parameter.copy_(value)
    if collapsed := masks.collapsed(pruned.mask):
        log.warning("pruner=%s: layer collapse: nothing is kept in %s", chosen.pruner.name, ", ".join(collapsed))
    return found


def _no_data(*_: Any) -> list[Any]:
    return []


def _shape(chosen: Method, examples: Examples | None, given: tuple[int, ...] | None) -> tuple[int, ...]:
    """The shape of one image; empty if nobody says it and nobody asks.

    Raises:
        ConfigError: it is not known, no shape, or said in two ways.
    """
    of_data = None if examples is None else tuple(examples.first.shape[1:])
    shape = None if given is None else networks.checked_shape(given)
    if of_data is not None and shape is not None and of_data != shape:
        raise ConfigError(f"input_shape={shape}: images of data= have {of_data}; leave input_shape= out")
    found = of_data or shape
    if found is None and chosen.needs_shape:
        raise ConfigError(
            f"pruner={chosen.pruner.name}: it passes an image through the network; give its shape as "
            "input_shape=(C, H, W), or data="
        )
    return found or ()


def _examined(network: nn.Module, examples: Examples | None, shape: tuple[int, ...], chosen: Method) -> int | None:
    """The number of classes, from what the network makes of one image; None where it gives no logits (1, K).

    Raises:
        ConfigError: it does not take the image, gives no tensor, or computes the weights that it applies.
    """
    if not shape:
        _check_unseen(network, chosen)
        return None
    name = type(network).__name__
    like = next(network.parameters())
    image = examples.first if examples is not None else torch.zeros((1, *shape), device=like.device)
    if image.is_floating_point():
        image = image.to(like.dtype)
    try:
        with torch.no_grad(), mode(network, training=False):
            output = network(image)
    except Exception as error:
        reason = str(error).partition("\n")[0]
        raise ConfigError(
            f"model: {name} does not take inputs of shape {tuple(image.shape)} ({type(error).__name__}: {reason}); "
            "give inputs of another shape"
        ) from error
    if not isinstance(output, torch.Tensor):
        raise ConfigError(
            f"model: {name} returns {type(output).__name__}, and a score needs one tensor of logits; wrap it in a "
            "module that returns them"
        )
    if image.is_floating_point():
        with mode(network, training=False):
            found = operations.watch(network, shape)  # type: ignore[arg-type]
        check_prunable(f"model: {name}", network, found, chosen.prunable)
    return output.shape[1] if output.ndim == 2 else None


def _tell_of_logits(examples: Examples, chosen: Method) -> None:
    """Says what a score does to outputs as if they were logits, where labels are numbers. The loss may want logits."""
    for setting, value, neutral in of_classes(chosen.pruner) if examples.has_targets else []:
        if value != neutral:
            log.warning(
                "%s=%s: it takes outputs for logits of classes, and labels are numbers; if outputs are to meet them, "
                "give settings={'%s': %s}",
                *(setting, shown(value), setting, neutral),
            )


def _check_unseen(network: nn.Module, chosen: Method) -> None:
    """Refuses layers that may compute what they apply, where no image shows whether they do.

    Raises:
        ConfigError: there is one.
    """
    for weight in masks.prunable(network, chosen.prunable):
        layer = type(network.get_submodule(weight.rpartition(".")[0]))
        plain = next(kind for kind in layer.__mro__ if kind.__module__.startswith("torch.nn."))
        if any(getattr(layer, way, None) is not getattr(plain, way, None) for way in ("forward", "_conv_forward")):
            raise ConfigError(
                f"model: {layer.__name__}, as in {weight}, has a forward pass of its own, which may compute what it "
                "applies from its weight; give input_shape=(C, H, W), and an image shows it"
            )
    tell_of_dense(network)


def _begun(network: nn.Module, chosen: Method, mask: Mask) -> Pruned:
    """What an earlier mask has reached. The network gets it.

    Raises:
        ConfigError: the mask does not fit the network or the method.
    """
    pruner = chosen.pruner
    networks.check_mask(network, mask)
    if pruner.reduce is not None or pruner.regrow:
        what = "weights may return" if pruner.regrow else "it prunes filters"
        raise ConfigError(f"mask: pruner={pruner.name} cannot go on from one, as {what}; leave mask= out")
    weights = masks.prunable(network, chosen.prunable)
    if other := next((name for name in mask if name not in weights), None):
        raise ConfigError(f"mask: {other} is no weight that is pruned by itself; leave it out")
    complete = networks.completed(network, mask, chosen.prunable)
    kept, total = masks.kept(complete), masks.total(complete)
    for one in chosen.rounds:
        if chosen.target == "sparsity" and masks.num_kept_after(one, total) > kept:
            raise ConfigError(
                f"mask: it has sparsity {masks.sparsity(complete):.6g} already, and a round has {one.sparsity:.6g}; "
                "give a higher sparsity, or schedule='one_shot'"
            )
    masks.apply_(network, complete)
    return Pruned(complete, complete)
