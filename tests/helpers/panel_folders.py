"""Folders as competitors hand them to the panel: weights, often a model_loader.py, and three keys in metadata.json."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn
from torchvision import models, transforms
from torchvision.datasets import ImageFolder

CLASSES = 4
NET = """
import torch
from torch import nn


class Net(nn.Module):
    def __init__(self, num_classes=4):
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, 8, 7, stride=8), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 12, 3, 2),
                                      nn.BatchNorm2d(12), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.norm = nn.BatchNorm1d(12)
        self.drop = nn.Dropout(0.5)
        self.fc = nn.Linear(12, num_classes)

    def forward(self, x):
        return self.fc(self.drop(self.norm(self.features(x))))
"""
PANEL = transforms.Compose([transforms.Resize(256), transforms.CenterCrop(224), transforms.ToTensor(),
                            transforms.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])])


def draw_photos(folder: Path) -> None:
    """Pictures of many sizes in four classes, among them a grey one and one with a palette."""
    rng = np.random.default_rng(7)
    for label in range(CLASSES):
        (folder / f"class{label}").mkdir(parents=True)
        for index in range(5):
            height, width = (int(size) for size in rng.integers(40, 300, 2))
            coarse = rng.integers(0, 256, (6, 6, 3), np.uint8)
            picture = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
            mode = {1: "L", 2: "P"}.get(index, "RGB") if label == 0 else "RGB"
            picture.convert(mode).save(folder / f"class{label}" / f"{index}.png")


def panel_answers(model: Callable[[torch.Tensor], torch.Tensor], data: Path) -> list[int]:
    """The panel's own procedure: torchvision's transforms, one image at a time, no gradients."""
    with torch.no_grad():
        return [int(model(image[None]).argmax(1)) for image, _ in ImageFolder(str(data), PANEL)]


def settle(model: nn.Module, data: Path) -> nn.Module:
    """The model in eval mode, with batch statistics of the pictures, so that its answers differ."""
    torch.manual_seed(3)
    images = torch.stack([image for image, _ in ImageFolder(str(data), PANEL)])
    for part in model.modules():
        if isinstance(part, nn.BatchNorm2d | nn.BatchNorm1d):
            part.momentum = None  # type: ignore[assignment]  # the plain mean
    with torch.no_grad():
        model.train()(images)
        model.eval()
        head = next(part for part in reversed(list(model.modules())) if isinstance(part, nn.Linear))
        head.bias -= model(images).mean(0)  # no class wins everywhere
    return model


def net(data: Path) -> nn.Module:
    """The small network that `NET` is the source of."""
    names: dict[str, type[nn.Module]] = {"__name__": "net"}  # type: ignore[dict-item]
    exec(NET, names)
    return settle(names["Net"](), data)


def write(folder: Path, metadata: str | None = None, **files: str) -> None:
    """Writes the metadata and source files, given by their names without a suffix."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metadata.json").write_text(metadata or json.dumps(
        {"username": "ada", "teamname": "engines", "model_format": "pytorch"}))
    for name, text in files.items():
        (folder / f"{name}.py").write_text(text)


def with_loader(folder: Path, data: Path) -> nn.Module:
    """A loader with a device, that prints and returns the network in train mode; weights under a key."""
    model = net(data)
    write(folder, model_loader=NET + """
print("importing the loader")


def load_model(model_path, device=None):
    model = Net(num_classes=4)
    checkpoint = torch.load(model_path, map_location=device or "cpu")
    model.load_state_dict(checkpoint["state_dict"])
    return model


if __name__ == "__main__":
    print(load_model("model.pth")(torch.zeros(1, 3, 224, 224)))
""")
    torch.save({"epoch": 3, "state_dict": model.state_dict(), "best": np.float64(0.3)}, folder / "model.pth")
    return model


def torchscript(folder: Path, data: Path) -> nn.Module:
    """A program without code beside it; its metadata have a comma too much, as the competition's template."""
    model = net(data)
    write(folder, '{\n  "Username": "ada",\n  "teamName": "engines",\n  "model_format": "torchscript",\n}\n')
    torch.jit.trace(model, torch.zeros(1, 3, 224, 224)).save(str(folder / "model.pt"))  # type: ignore[no-untyped-call]
    return model


def plain_resnet18(folder: Path, data: Path) -> nn.Module:
    """A state dict and nothing else, which the panel loads into torchvision's ResNet18."""
    torch.manual_seed(1)
    model = settle(models.resnet18(num_classes=CLASSES), data)
    write(folder)
    torch.save(model.half().state_dict(), folder / "model.pth")
    return model.float()


def pickled_int8(folder: Path, data: Path) -> nn.Module:
    """A pickled nn.Sequential of int8 modules; no code."""
    quantization = torch.ao.quantization
    float_net = nn.Sequential(quantization.QuantStub(), nn.Sequential(nn.Conv2d(3, 8, 7, stride=8), nn.ReLU()),
                              nn.Conv2d(8, 12, 3, 2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, CLASSES),
                              quantization.DeQuantStub())
    torch.manual_seed(2)
    model = settle(float_net, data)
    model.qconfig = quantization.get_default_qconfig("x86")  # type: ignore[assignment]
    prepared = quantization.prepare(model)
    panel_answers(prepared, data)
    model = quantization.convert(prepared)
    write(folder)
    torch.save(model, folder / "model.pth")
    return model  # type: ignore[no-any-return]


def pretrained_first(folder: Path, data: Path) -> nn.Module:
    """A loader that downloads weights only to overwrite them, and imports another file of the folder."""
    torch.manual_seed(4)
    model = settle(models.shufflenet_v2_x0_5(num_classes=CLASSES), data)
    write(folder, head="from torch import nn\n\n\ndef new_head(model):\n"
          "    model.fc = nn.Linear(model.fc.in_features, 4)\n    return model\n", model_loader="""
import torch
from torchvision import models
from head import new_head


def load_model(path):
    model = new_head(models.shufflenet_v2_x0_5(pretrained=True))
    model.load_state_dict(torch.load(path, map_location="cpu"))
    model.eval()
    return model
""")
    torch.save(model.state_dict(), folder / "model.pth")
    return model


FOLDERS: dict[str, Callable[[Path, Path], nn.Module]] = {
    "a loader": with_loader, "TorchScript": torchscript, "a plain ResNet18": plain_resnet18,
    "pickled int8 modules": pickled_int8, "pretrained weights, overwritten": pretrained_first}
