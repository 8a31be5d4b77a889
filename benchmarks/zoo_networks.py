"""The networks of the coverage table and of the contract test: torchvision's classifiers and 100 of timm, with image sizes.

The 100 were chosen by family, a small and a larger one of each, before any was tried. Names are not exchanged for others.
"""

from __future__ import annotations

import warnings

from torch import Tensor, nn

LARGEST = 150_000_000  # parameters of torchvision's classifiers that are listed

# Side of the images in pixels. Convolutional networks get small ones, as far as their strides allow.
TORCHVISION_SIZES = {64: ("densenet", "efficientnet", "mnasnet", "mobilenet", "regnet", "resn", "shufflenet", "squeezenet",
                          "wide_resnet", "convnext"),
                     96: ("googlenet",), 128: ("inception",), 224: ("alexnet", "vgg", "maxvit", "vit", "swin")}

TIMM_SIZES: dict[int, tuple[str, ...]] = {
    64: (
        "efficientnet_b0", "efficientnet_b3", "efficientnet_es", "efficientnetv2_rw_t", "tf_efficientnet_b0",
        "tf_efficientnetv2_b0", "efficientnet_lite1", "tf_efficientnet_lite0", "tf_efficientnet_lite2", "mixnet_s",
        "mobilenetv2_100", "mobilenetv3_large_100", "mobilenetv3_small_100", "tf_mobilenetv3_small_minimal_100",
        "mobilenetv4_conv_small", "mobilenetv4_conv_medium", "lcnet_050", "lcnet_100",
        "repvgg_a0", "repvgg_b0", "mobileone_s0", "resnest14d", "resnest26d", "resnest50d",
        "regnetx_002", "regnety_004", "regnety_016", "convnext_atto", "convnext_tiny", "convnext_base", "convnextv2_atto",
        "convnextv2_tiny", "densenet121", "repghostnet_050", "rexnet_100",
        "resnet10t", "resnet18", "resnet34d", "resnet50", "resnet50_gn", "resnext26ts", "resnext50_32x4d",
        "legacy_seresnet18", "seresnet50", "seresnext26d_32x4d", "ecaresnet26t", "ecaresnetlight", "skresnet18",
        "ghostnet_100", "ghostnetv2_100", "mnasnet_100", "semnasnet_075", "hardcorenas_a", "hardcorenas_c",
        "tinynet_a", "tinynet_e", "dla34", "dla46x_c", "hrnet_w18_small", "hrnet_w18", "res2net50_26w_4s", "res2next50",
        "dpn68b", "selecsls42b", "cspresnet50", "cspresnext50", "cspdarknet53", "darknet53", "tresnet_m",
        "eca_nfnet_l0", "dm_nfnet_f0", "resnetv2_50", "resnetv2_50x1_bit", "poolformer_s12", "poolformerv2_s12"),
    96: ("legacy_xception", "xception41"),
    128: ("inception_v3", "inception_next_tiny"),
    224: ("vgg11_bn", "vgg16", "deit_tiny_patch16_224", "deit3_small_patch16_224", "vit_tiny_patch16_224",
          "vit_small_patch32_224", "vit_base_patch16_224", "swin_tiny_patch4_window7_224", "mobilenetv4_hybrid_medium",
          "coatnet_nano_rw_224", "efficientformer_l1", "levit_128s", "cait_xxs24_224", "mixer_s32_224", "mixer_b16_224"),
    256: ("swinv2_tiny_window8_256", "maxvit_pico_rw_256", "fastvit_t8", "mobilevit_xxs", "mobilevitv2_050",
          "edgenext_xx_small")}


def torchvision_networks() -> dict[str, int]:
    """Return torchvision's classifiers of less than LARGEST parameters, `torchvision:NAME` -> pixels."""
    from torchvision import models

    found = {}
    for name in models.list_models(module=models):
        if models.get_model_weights(name).DEFAULT.meta["num_params"] < LARGEST:
            found[f"torchvision:{name}"] = next(
                size for size, starts in TORCHVISION_SIZES.items() if name.startswith(starts))
    return found


def timm_networks() -> dict[str, int]:
    """Return the 100 networks of timm, `timm:NAME` -> pixels."""
    return {f"timm:{name}": size for size, names in TIMM_SIZES.items() for name in names}


def zoo_networks() -> dict[str, int]:
    """Return all networks of the table, by name -> pixels."""
    return torchvision_networks() | timm_networks()


def made(name: str) -> nn.Module:
    """Return a network with 1000 classes and seeded random weights, in eval mode.

    Fresh networks hide mistakes: a branch that begins at zero or is scaled by 1e-6 adds nothing to the logits. So constants
    are replaced by random numbers, and batch norms get statistics.
    """
    import torch

    from architectures.zoo import make

    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore")  # the zoos' own
        torch.manual_seed(0)
        model = make(name, num_classes=1000).eval()
        for key, tensor in (*model.named_parameters(), *model.named_buffers()):
            if tensor.is_floating_point() and tensor.numel():
                _enliven(key, tensor.data)
    return model


def _enliven(name: str, values: Tensor) -> None:
    """Replace what is constant in a fresh network, in place: statistics and biases near 0, factors near 1."""
    if name.endswith("running_mean"):
        values.normal_(0, 0.1)
    elif name.endswith("running_var"):
        values.uniform_(0.5, 1.5)
    elif bool((values == values.flatten()[0]).all()):
        if float(values.flatten()[0]) or name.endswith(("weight", "gamma", "gain", "scale")):
            values.uniform_(0.5, 1.5)
        else:
            values.normal_(0, 0.1)
    elif float(values.abs().max()) < 1e-4:  # tokens that begin at 1e-6
        values.normal_(0, 0.1)
