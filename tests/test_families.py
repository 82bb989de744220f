"""What is read off networks, over the families of timm: no weight acts where it is pruned, and no number is wrong.

The quick families are always tested. `ALL_FAMILIES=1 pytest tests/test_families.py` tests every one, in some minutes.
"""

import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Generator, Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from pai_bench.analysis import operations, paths
from pai_bench.analysis.mode import mode
from pai_bench.core import Mask
from pai_bench.masks import masks

timm = pytest.importorskip("timm")

# A small one of each family (a module of timm), its size of images, and options that make it smaller.
FAMILIES: dict[str, tuple[str, int, dict[str, Any]]] = {
    "beit": ("beit_base_patch16_224", 32, {"depth": 2, "img_size": 32}),
    "byoanet": ("eca_botnext26ts_256", 64, {"img_size": 64}),
    "byobnet": ("test_byobnet", 64, {}),
    "cait": ("cait_xxs24_224", 64, {"img_size": 64}),
    "coat": ("coat_tiny", 64, {"img_size": 64}),
    "convit": ("convit_tiny", 64, {"img_size": 64}),
    "convmixer": ("convmixer_768_32", 64, {}),
    "convnext": ("convnext_atto_rms", 64, {}),
    "cpubone": ("cpubone_nano", 64, {}),
    "crossvit": ("crossvit_tiny_240", 64, {}),
    "csatv2": ("csatv2", 64, {}),
    "cspnet": ("cs3darknet_focus_s", 64, {}),
    "cspnext": ("cspnext_tiny", 64, {}),
    "davit": ("davit_tiny", 64, {}),
    "deepseek_vit": ("deepseek_vit_412m", 56, {"depth": 2}),
    "deit": ("deit_tiny_patch16_224", 64, {"img_size": 64}),
    "densenet": ("densenet121", 64, {}),
    "dla": ("dla46x_c", 64, {}),
    "dpn": ("dpn48b", 64, {}),
    "edgenext": ("edgenext_xx_small", 64, {}),
    "efficientformer": ("efficientformer_l1", 224, {}),
    "efficientformer_v2": ("efficientformerv2_s0", 64, {"img_size": 64}),
    "efficientnet": ("efficientnet_lite0", 64, {}),
    "efficientvim": ("efficientvim_m1", 64, {}),
    "efficientvit_mit": ("efficientvit_b0", 64, {}),
    "efficientvit_msra": ("efficientvit_m0", 64, {}),
    "eva": ("eva02_tiny_patch14_224", 64, {"img_size": 64}),
    "fasternet": ("fasternet_t0", 64, {}),
    "fastvit": ("fastvit_t8", 64, {}),
    "focalnet": ("focalnet_tiny_srf", 64, {}),
    "gcvit": ("gcvit_xxtiny", 64, {"img_size": 64}),
    "ghostnet": ("ghostnet_050", 64, {}),
    "hardcorenas": ("hardcorenas_b", 64, {}),
    "hgnet": ("hgnetv2_b0", 64, {}),
    "hiera": ("hiera_tiny_224", 64, {"img_size": 64}),
    "hieradet_sam2": ("sam2_hiera_tiny", 64, {}),
    "hrnet": ("hrnet_w18_small", 64, {}),
    "iformer": ("iformer_t", 64, {}),
    "inception_next": ("inception_next_atto", 64, {}),
    "inception_resnet_v2": ("inception_resnet_v2", 96, {}),
    "inception_v3": ("inception_v3", 96, {}),
    "inception_v4": ("inception_v4", 96, {}),
    "lcnetv2": ("lcnetv2_small", 64, {}),
    "levit": ("levit_128s", 64, {"img_size": 64}),
    "lowformer": ("lowformer_b0", 64, {}),
    "mambaout": ("test_mambaout", 64, {}),
    "maxxvit": ("maxvit_pico_rw_256", 64, {"img_size": 64}),
    "metaformer": ("poolformerv2_s12", 64, {}),
    "mlp_mixer": ("gmlp_ti16_224", 64, {"img_size": 64}),
    "mobilenetv3": ("lcnet_035", 64, {}),
    "mobilenetv5": ("mobilenetv5_base", 32, {}),
    "mobilevit": ("mobilevit_xxs", 64, {}),
    "mvitv2": ("mvitv2_tiny", 64, {}),
    "naflexvit": ("naflexvit_base_patch16_parfac_gap", 32, {"depth": 2}),
    "nasnet": ("nasnetalarge", 64, {}),
    "nest": ("nest_tiny", 64, {"img_size": 64}),
    "nextvit": ("nextvit_small", 64, {}),
    "nfnet": ("test_nfnet", 64, {}),
    "pit": ("pit_ti_224", 64, {"img_size": 64}),
    "pnasnet": ("pnasnet5large", 64, {}),
    "pvt_v2": ("pvt_v2_b0", 64, {}),
    "qwen3_vit": ("qwen3_vit_88m", 32, {"depth": 2}),
    "rdnet": ("rdnet_tiny", 64, {}),
    "regnet": ("regnetx_002", 64, {}),
    "repghost": ("repghostnet_050", 64, {}),
    "repvit": ("repvit_m1", 64, {}),
    "res2net": ("res2next50", 64, {}),
    "resnest": ("resnest14d", 64, {}),
    "resnet": ("test_resnet", 64, {}),
    "resnetv2": ("resnetv2_18", 64, {}),
    "rexnet": ("rexnet_100", 64, {}),
    "selecsls": ("selecsls42", 64, {}),
    "senet": ("legacy_seresnet18", 64, {}),
    "sequencer": ("sequencer2d_s", 64, {}),
    "shvit": ("shvit_s1", 64, {}),
    "sknet": ("skresnet18", 64, {}),
    "starnet": ("starnet_s050", 64, {}),
    "swiftformer": ("swiftformer_xs", 64, {}),
    "swin_transformer": ("swin_tiny_patch4_window7_224", 64, {"img_size": 64}),
    "swin_transformer_v2": ("swinv2_tiny_window8_256", 64, {"img_size": 64}),
    "swin_transformer_v2_cr": ("swinv2_cr_tiny_224", 64, {"img_size": 64}),
    "tiny_vit": ("tiny_vit_5m_224", 64, {}),
    "tnt": ("tnt_s_legacy_patch16_224", 64, {"img_size": 64}),
    "tresnet": ("tresnet_m", 64, {}),
    "twins": ("twins_svt_small", 64, {}),
    "vgg": ("vgg11", 32, {"mlp_ratio": 0.1}),
    "visformer": ("visformer_tiny", 64, {"img_size": 64}),
    "vision_transformer": ("test_vit", 64, {}),
    "vision_transformer_hybrid": ("vit_tiny_r_s16_p8_224", 64, {"img_size": 64}),
    "vision_transformer_relpos": ("test_vit_relpos", 64, {"img_size": 64}),
    "vision_transformer_sam": ("samvit_base_patch16_224", 64, {"depth": 2, "img_size": 64}),
    "vitamin": ("vitamin_small_224", 64, {"img_size": 64}),
    "volo": ("volo_d1_224", 64, {"img_size": 64}),
    "vovnet": ("ese_vovnet19b_slim_dw", 64, {}),
    "xception": ("legacy_xception", 64, {}),
    "xception_aligned": ("xception41p", 64, {}),
    "xcit": ("xcit_nano_12_p8_224", 64, {}),
}
SPECIAL: dict[str, tuple[str, int, dict[str, Any]]] = {
    "conditional convolutions": ("tf_efficientnet_cc_b0_4e", 64, {}),
    "scales of layers that start small": ("resmlp_12_224", 64, {"img_size": 64}),
    "convolutional attention": ("coat_lite_tiny", 64, {"img_size": 64}),
    "pooling by attention": ("test_vit4", 64, {}),
}
SLOW = {
    "coat", "convmixer", "crossvit", "davit", "deepseek_vit", "efficientformer", "focalnet", "gcvit", "hiera",
    "hieradet_sam2", "hrnet", "inception_resnet_v2", "inception_v3", "inception_v4", "maxxvit", "mobilenetv5",
    "mvitv2", "nasnet", "nest", "nextvit", "pnasnet", "rdnet", "repvit", "res2net", "selecsls", "sequencer",
    "swin_transformer", "swin_transformer_v2", "swin_transformer_v2_cr", "tiny_vit", "tnt", "tresnet",
    "twins", "vitamin", "volo", "xception", "xception_aligned", "xcit",
}  # fmt: skip
TESTED = [name for name in FAMILIES if os.environ.get("ALL_FAMILIES") or name not in SLOW] + list(SPECIAL)

# Their convolutions standardise their weights, so that zeros would not stay zeros.
COMPUTING = {"nfnet", "vision_transformer_hybrid"}


PRODUCTS = {torch.ops.aten.convolution, torch.ops.aten.addmm, torch.ops.aten.mm, torch.ops.aten.bmm}


class Given(TorchDispatchMode):
    """Every tensor of two or more dimensions that a product is given, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.tensors: list[Tensor] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function._overloadpacket in PRODUCTS:
            self.tensors += [tensor for tensor in args[:3] if isinstance(tensor, Tensor) and tensor.ndim > 1]
        return function(*args, **kwargs or {})


def applied(model: nn.Module, size: int) -> Iterator[Tensor]:
    """What products are given whatever the image is: weights, or what is computed from them."""
    given = []
    for seed in (0, 1):
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), Given() as seen:
            model(torch.randn((1, 3, size, size), generator=Generator().manual_seed(seed)))
        given.append(seen.tensors)
    for one, other in zip(*given, strict=True):
        if torch.equal(one, other):
            yield one


def half(model: nn.Module) -> Mask:
    """Every second weight of each layer."""
    mask = masks.full(model)
    for kept in mask.values():
        kept.view(-1)[1::2] = False
    return mask


@pytest.mark.parametrize("family", TESTED)
def test_numbers_read_off_a_network(family: str) -> None:
    name, size, options = (FAMILIES | SPECIAL)[family]
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=10, **options).eval().requires_grad_(False)
    shape, prunable = (3, size, size), masks.prunable(model)

    # Multiply-adds are those that torch counts, and every prunable weight has its own.
    with mode(model, False):
        found = operations.watch(model, shape)
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        model(torch.zeros(1, *shape))
    assert 2 * sum(found.multiply_adds.values()) == counter.get_total_flops() > 0
    assert [key for key in found.multiply_adds if key in prunable] == list(prunable)

    # The dense network has every channel on a path; of a kernel the borders may see nothing but padding.
    reached = paths.effective(model, masks.full(model), shape)
    assert reached is not None
    for key, tensor in reached.items():
        assert masks.connected(tensor).all(), key

    # What is pruned is not applied, or such a network is known.
    masks.apply_(model, half(model))
    sizes = {weight.numel() for weight in prunable.values()}
    others = {weight.untyped_storage().data_ptr() for weight in masks.unprunable(model).values()}
    dense = [
        tensor.shape
        for tensor in applied(model, size)
        if tensor.numel() in sizes
        and tensor.untyped_storage().data_ptr() not in others
        and tensor.count_nonzero() > (tensor.numel() + 1) // 2
    ]
    assert bool(dense) == bool(found.computed) == (family in COMPUTING), dense
