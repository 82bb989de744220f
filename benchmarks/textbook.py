"""What published code does, written plainly: the loops that the product is measured against.

They are close to what the authors' repositories run, in own words: masks multiply the weights in every forward pass,
scores are taken over all weights in every round, images come from a DataLoader of PIL transforms one by one.
"""

import copy
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from pai_bench.core import Batch, Mask, Scores, Shape
from pai_bench.masks import masks

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Masked(nn.Module):
    """A copy of a network that multiplies its weights by a mask in every forward pass."""

    def __init__(self, model: nn.Module, mask: Mask | None = None) -> None:
        super().__init__()
        self.model = copy.deepcopy(model)
        self.weights = masks.prunable(self.model)
        given = masks.full(model) if mask is None else mask
        self.factors = {name: given[name].to(weight.dtype) for name, weight in self.weights.items()}

    def forward(self, images: Tensor) -> Tensor:
        """Logits of the masked network."""
        product = {name: weight * self.factors[name] for name, weight in self.weights.items()}
        logits: Tensor = torch.func.functional_call(self.model, product, (images,))
        return logits

    def mask(self) -> Mask:
        """What is kept."""
        return {name: factor.bool() for name, factor in self.factors.items()}


def keep(net: Masked, scores: Scores, k: int, exactly: bool) -> None:
    """Keeps the k highest scores of a network, by a threshold over all of them.

    Args:
        exactly: keep the first of those that equal the threshold. Published loops drop all, and keep fewer than k.
    """
    everything = torch.cat([values.flatten() for values in scores.values()])
    if k < len(everything):
        threshold = torch.kthvalue(everything, len(everything) - k).values
        zero, one = (torch.tensor(value, device=threshold.device) for value in (0.0, 1.0))
        for name, values in scores.items():
            net.factors[name].copy_(torch.where(values <= threshold, zero, one))
        if exactly:
            missing = k - sum(int(factor.sum(dtype=torch.int64)) for factor in net.factors.values())
            for name, values in scores.items():
                equal = (values == threshold).flatten().nonzero().squeeze(1)[:missing]
                net.factors[name].view(-1)[equal] = 1
                missing -= len(equal)


def synflow_counts(num_prunable: int, density: float, rounds: int) -> list[int]:
    """How many weights the published loop keeps in each round: all but trunc((1 - d_i) N)."""
    densities = [density ** (i / rounds) for i in range(1, rounds + 1)]
    return [num_prunable - int((1 - reached) * num_prunable) for reached in densities]


def synflow(net: Masked, input_shape: Shape, counts: Sequence[int], *, exactly: bool = False) -> Mask:
    """SynFlow in rounds that keep so many weights each: signs are put away and brought back in every one."""
    net.eval()
    image = torch.ones(1, *input_shape, device=next(iter(net.weights.values())).device)
    for k in counts:
        with torch.no_grad():
            signs = {}
            for name, tensor in net.model.state_dict().items():
                signs[name] = torch.sign(tensor)
                tensor.abs_()
        net(image).sum().backward()
        scores = {}
        for name, weight in net.weights.items():
            assert weight.grad is not None
            scores[name] = torch.clone(weight.grad * weight).detach().abs_()
            weight.grad.zero_()
        with torch.no_grad():
            for name, tensor in net.model.state_dict().items():
                tensor.mul_(signs[name])
        keep(net, scores, k, exactly)
    return net.mask()


def gradients(model: nn.Module, images: Tensor, labels: Tensor) -> list[Tensor]:
    """A plain forward and backward pass: what SNIP cannot do without."""
    return list(torch.autograd.grad(F.cross_entropy(model(images), labels), list(masks.prunable(model).values())))


def grasp(net: Masked, images: Tensor, labels: Tensor, temperature: float) -> Scores:
    """GraSP with a forward pass for the gradient and another one for its product with the Hessian."""
    leaves = list(net.weights.values())
    constant = torch.autograd.grad(F.cross_entropy(net(images) / temperature, labels), leaves)
    moving = torch.autograd.grad(F.cross_entropy(net(images) / temperature, labels), leaves, create_graph=True)
    inner = sum(((one.detach() * other).sum() for one, other in zip(constant, moving, strict=True)), torch.tensor(0.0))
    inner.backward()  # type: ignore[no-untyped-call]
    scores = {}
    for name, weight in net.weights.items():
        assert weight.grad is not None
        scores[name] = (weight.grad * weight).detach()
        weight.grad = None
    return scores


class _Images(Dataset[tuple[Tensor, int]]):
    """Images in memory, each made a PIL image and transformed when it is asked for."""

    def __init__(self, images: np.ndarray, labels: np.ndarray, mean: Sequence[float], std: Sequence[float]) -> None:
        self.images, self.labels = images, labels
        self.transform = transforms.Compose(
            [
                transforms.RandomCrop(images.shape[1], padding=4),
                transforms.RandomHorizontalFlip(),
                transforms.ToTensor(),
                transforms.Normalize(mean, std),
            ]
        )

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.transform(Image.fromarray(self.images[index])), int(self.labels[index])


def cifar_loader(
    images: np.ndarray, labels: np.ndarray, mean: Sequence[float], std: Sequence[float], batch_size: int, workers: int
) -> "DataLoader[tuple[Tensor, int]]":
    """Shuffled, augmented batches of small images held in memory."""
    return DataLoader(
        _Images(images, labels, mean, std),
        batch_size=batch_size,
        shuffle=True,
        num_workers=workers,
        pin_memory=torch.cuda.is_available(),
        persistent_workers=workers > 0,
    )


class _Photographs(Dataset[tuple[Tensor, int]]):
    """JPEG files, each read and transformed when it is asked for."""

    def __init__(self, paths: Sequence[Path], size: int) -> None:
        self.paths = paths
        self.transform = transforms.Compose(
            [
                transforms.RandomResizedCrop(size),
                transforms.RandomHorizontalFlip(),
                transforms.ToTensor(),
                transforms.Normalize(IMAGENET_MEAN, IMAGENET_STD),
            ]
        )

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        with Image.open(self.paths[index]) as image:
            return self.transform(image.convert("RGB")), 0


def imagenet_loader(paths: Sequence[Path], size: int, batch_size: int) -> "DataLoader[tuple[Tensor, int]]":
    """Shuffled batches of random crops of photographs, decoded in this process."""
    return DataLoader(_Photographs(paths, size), batch_size=batch_size, shuffle=True)


def epoch(net: nn.Module, batches: Iterable[Batch], optimizer: torch.optim.Optimizer, device: torch.device) -> float:
    """An epoch of training that reads loss and accuracy at every step. Returns the mean loss."""
    net.train()
    loss_sum, correct, seen = 0.0, 0, 0
    for given in batches:
        images, labels = (tensor.to(device) for tensor in given)
        optimizer.zero_grad()
        logits = net(images)
        loss = F.cross_entropy(logits, labels)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        loss_sum += loss.item() * len(labels)
        correct += (logits.argmax(1) == labels).sum().item()  # type: ignore[assignment]
        seen += len(labels)
    return loss_sum / seen
