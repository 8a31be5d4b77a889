"""Variants of load_model as competitors write it, each with a small network and the weights file that it reads."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn
from torchvision import models

from tests.helpers.panel_folders import CLASSES, NET, net, settle, write

Build = Callable[[Path, Path], nn.Module]
DEF, LOAD, RETURN = "def load_model(path):\n", "    model.load_state_dict(torch.load(path))\n", "    return model\n"
HEAD = "    model.fc = nn.Linear(model.fc.in_features, 4)\n"
PATH_OF_KAGGLE = "def load_model(path='/kaggle/working/net.pt', device=None):\n"


def loading(source: str, content: Callable[[nn.Module], object] = nn.Module.state_dict) -> Build:
    """A folder with the small network in net.py and a loader beside it."""
    def build(folder: Path, data: Path) -> nn.Module:
        model = net(data)
        write(folder, net=NET, model_loader="import torch\nfrom net import Net\n" + source)
        torch.save(content(model), folder / "model.pth")
        return model
    return build


def shuffle_net(source: str) -> Build:
    """A folder for torchvision's smallest ShuffleNet."""
    def build(folder: Path, data: Path) -> nn.Module:
        torch.manual_seed(5)
        model = settle(models.shufflenet_v2_x0_5(num_classes=CLASSES), data)
        write(folder, model_loader="import torch\nfrom torch import nn\nfrom torchvision import models\n" + source)
        torch.save(model.state_dict(), folder / "model.pth")
        return model
    return build


def dynamic_int8(folder: Path, data: Path) -> nn.Module:
    """Quantized before its weights are loaded, as they were saved; a thousand outputs, as torchvision's default."""
    torch.manual_seed(6)
    model = settle(models.shufflenet_v2_x0_5(num_classes=1000), data)
    model = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
    write(folder, model_loader="""
import torch
from torchvision.models import shufflenet_v2_x0_5
from torch.quantization import quantize_dynamic


def load_model(model_path):
    model = quantize_dynamic(shufflenet_v2_x0_5(), {torch.nn.Linear}, dtype=torch.qint8)
    model.load_state_dict(torch.load(model_path, map_location="cpu"))
    return model
""")
    torch.save(model.state_dict(), folder / "model.pth")
    return model  # type: ignore[no-any-return]


def named_in_main(file: str, extra: str = "") -> Build:
    """A module pickled in a notebook, whose class a file of the folder defines."""
    def build(folder: Path, data: Path) -> nn.Module:
        model = net(data)
        names: dict[str, type[nn.Module]] = {"__name__": "__main__"}  # type: ignore[dict-item]
        exec(NET, names)
        main = sys.modules["__main__"]
        main.Net = model.__class__ = names["Net"]  # type: ignore[attr-defined]
        try:
            write(folder, **{file: NET + extra, "train": "raise SystemExit('this would train')"})
            torch.save(model, folder / "model.pth")
        finally:
            del main.Net  # type: ignore[attr-defined]
        return model
    return build


def traced(source: str) -> Build:
    """A TorchScript program with a loader beside it."""
    def build(folder: Path, data: Path) -> nn.Module:
        model = net(data)
        write(folder, model_loader="import torch\n" + source)
        program = torch.jit.trace(model, torch.zeros(1, 3, 224, 224))  # type: ignore[no-untyped-call]
        program.save(str(folder / "model.pt"))
        return model
    return build


def timm_pretrained(folder: Path, data: Path) -> nn.Module:
    """timm's pretrained weights, overwritten."""
    import timm
    torch.manual_seed(7)
    model = settle(timm.create_model("mobilenetv3_small_050", num_classes=CLASSES), data)
    write(folder, model_loader="import timm\nimport torch\n\n\ndef load_model(path):\n"
          "    model = timm.create_model('mobilenetv3_small_050', pretrained=True, num_classes=4)\n"
          "    model.load_state_dict(torch.load(path))\n    return model\n")
    torch.save(model.state_dict(), folder / "model.pth")
    return model


def renamed(prefix: str) -> Callable[[nn.Module], object]:
    """The state dict under names with a prefix."""
    return lambda model: {prefix + name: value for name, value in model.state_dict().items()}


# name -> the folder, the file or way that loads it, and what a warning says (None: nothing is said of it)
VARIANTS: dict[str, tuple[Build, str, str | None]] = {
    "a device without a default": (loading(
        "def load_model(path, device):\n    model = Net().to(device)\n" + LOAD + RETURN), "loader", None),
    "a tuple": (loading(DEF + "    model = Net()\n" + LOAD + "    return model, {'best': 3}\n"), "loader",
                "load_model returned a tuple"),
    "DataParallel": (loading(DEF + "    model = torch.nn.DataParallel(Net())\n" + LOAD + RETURN, renamed("module.")),
                     "loader", None),
    "torch.compile": (loading(DEF + "    model = torch.compile(Net())\n" + LOAD + RETURN, renamed("_orig_mod.")), "loader",
                      "torch.compile"),
    "the module in torch.compile's": (loading(
        DEF + "    model = torch.compile(Net())\n    model._orig_mod.load_state_dict(torch.load(path))\n" + RETURN),
        "loader", "torch.compile"),
    "weights of a hub, overwritten": (loading(
        "from huggingface_hub import hf_hub_download\nfrom safetensors.torch import load_file\n\n\n" + DEF +
        "    model = Net()\n"
        "    model.load_state_dict(torch.load(hf_hub_download('a/b', 'model.bin')))\n"
        "    model.load_state_dict(load_file(hf_hub_download(repo_id='a/b', filename='model.safetensors')))\n"
        "    weights = torch.hub.load_state_dict_from_url('https://example.com/net.pth')['state_dict']\n"
        "    del weights['fc.weight']\n    weights.pop('fc.bias')\n    model.load_state_dict(weights, strict=False)\n"
        + LOAD + RETURN), "loader", "model.bin of a/b, model.safetensors of a/b, net.pth"),
    "torch.hub": (shuffle_net(
        DEF + "    model = torch.hub.load('pytorch/vision:v0.10.0', 'shufflenet_v2_x0_5', pretrained=True)\n"
        + HEAD + LOAD + RETURN), "loader", "asked for pretrained weights"),
    "an enum of weights": (shuffle_net(
        DEF + "    model = models.get_model('shufflenet_v2_x0_5', weights='IMAGENET1K_V1')\n" + HEAD + LOAD + RETURN),
        "loader", "which it overwrote"),
    "timm": (timm_pretrained, "loader", "timm's for MobileNetV3"),
    "dynamic int8": (dynamic_int8, "loader", "1,000 outputs for the data's 4 classes"),
    "a class of the loader, pickled in a notebook": (
        named_in_main("model_loader", "\n\n" + DEF + "    return torch.load(path)\n"), "loader", None),
    "a class of another file, pickled in a notebook": (named_in_main("network"), "standard", None),
    "TorchScript with a path of Kaggle's": (traced(
        PATH_OF_KAGGLE + "    return torch.jit.load(path, map_location=device)\n"
        "\n\nif __name__ == '__main__':\n    load_model()\n"), "loader", None),
    "TorchScript by torch.load": (traced(DEF + "    return torch.load(path, map_location='cpu')\n"), "loader", None),
    "TorchScript without return": (traced(DEF + "    torch.jit.load(path).eval()\n"), "standard",
                                   "where the panel fails: model_loader.py: load_model returned NoneType"),
}
