"""Networks that are not as ours: with shared weights, with a type of their own, with norms that stay as they are."""

import copy

import pytest
import torch
from conftest import Chain
from few_images import random_batches, same, trainer
from torch import nn
from torch.nn import functional as F

import pai_bench as pb
from pai_bench.analysis.mode import mode
from pai_bench.errors import UserError
from pai_bench.masks import masks


class TwoNames(nn.Module):
    """Two layers with one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
        self.b.weight = self.a.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(torch.relu(self.a(x)))


def test_a_mask_under_the_second_name_of_a_shared_weight_counts() -> None:
    kept = torch.zeros(4, 4, dtype=torch.bool)
    kept[0] = True
    shown = pb.summary(TwoNames(), {"b.weight": kept}, input_shape=(4,))
    assert shown.total["density"] == 0.25


def test_weights_that_layers_share_are_replaced_under_all_their_names() -> None:
    """A state dict has both names, and a model that loads it takes the last."""
    training = trainer(nn.Sequential(nn.Flatten(), nn.Linear(192, 4), TwoNames()))
    mask = masks.full(training.model)
    for put in (training.replace, training.restart):
        state = {name: value.clone() for name, value in training.model.state_dict().items()}
        state["2.a.weight"] = torch.rand(4, 4)
        put(mask, state)
        assert torch.equal(training.model[2].b.weight, state["2.a.weight"])


class FixedType(nn.Module):
    """Makes a table in float32, whatever its weights are."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(torch.linspace(0, 1, 4)[None]) + self.fc(x)


def test_a_network_with_a_type_of_its_own_is_told_which_setting_helps() -> None:
    data = [(torch.randn(100, 4), torch.arange(100) % 2)]
    with pytest.raises(UserError, match=r"pruner.dtype=float64: FixedType makes tensors .*; set pruner.dtype=float32"):
        pb.prune(FixedType(), "snip", sparsity=0.5, data=data)
    assert pb.prune(FixedType(), "snip", sparsity=0.5, data=data, settings={"pruner.dtype": "float32"})


class Affine(nn.Module):
    """What a batch norm is in eval mode."""

    def __init__(self, norm: nn.BatchNorm2d) -> None:
        super().__init__()
        self.weight, self.bias, self.norm = norm.weight, norm.bias, norm

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        mean, var = self.norm.running_mean, self.norm.running_var
        assert mean is not None and var is not None
        return F.batch_norm(x, mean, var, self.weight, self.bias, False, 0.0, self.norm.eps)


class NormsStay(Chain):
    """Its norms stay in eval mode, as when a network is fine-tuned."""

    def train(self, mode: bool = True) -> "NormsStay":
        super().train(mode)
        self.norm1.eval()
        self.norm2.eval()
        return self


def test_scores_in_train_mode_see_the_network_as_it_trains() -> None:
    torch.manual_seed(0)
    model = NormsStay()
    modes = [module.training for module in model.modules()]
    with mode(model, training=True):
        assert model.training and not model.norm1.training
    assert modes == [module.training for module in model.modules()]
    frozen = copy.deepcopy(model)
    frozen.norm1, frozen.norm2 = Affine(model.norm1), Affine(model.norm2)
    data = random_batches()
    assert same(pb.prune(model, "grasp", sparsity=0.8, data=data), pb.prune(frozen, "grasp", sparsity=0.8, data=data))
