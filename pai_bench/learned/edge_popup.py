"""edge-popup: the strongest scores of each layer choose the weights."""

from pai_bench.learned.initial import Frozen, frozen, kaiming_uniform
from pai_bench.learned.method import Method


def edge_popup(*, weights: Frozen, scale_fan: bool) -> Method:
    """Keeps the weights with the highest |score|. Scores get the gradient of the mask, as if it were |score|.

    Args:
        weights: values of the frozen weights: "signed_constant", or "drawn" by the network's own law.
        scale_fan: make the weights larger where the layer is sparser.

    Reference: Ramanujan et al. 2020, arXiv:1911.13299.
    Deviates: the released code rounds in each layer for itself: it drops the lowest int((1 - k) n) of n scores. Here
        the allocation says how many weights each layer keeps, and the total is exact. Of equal scores the first stay.
    """
    return Method(draw=kaiming_uniform, weights=frozen(weights, scale_fan))
