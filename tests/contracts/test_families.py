"""Every model that can be described: describe and build are inverse, and the committed JSON says what `make` makes."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from architectures.architecture import Architecture
from architectures.build import build, check_shapes
from architectures.counting import count_macs, count_parameters, layer_costs
from architectures.describe import describe
from architectures.source import source
from architectures.weights import load_verified
from architectures.zoo import make, names
from metadata.errors import UserError
from tests.helpers.marks import slow_but

JSON = Path(__file__).parents[2] / "architectures" / "json"
STUDENTS = [("slim_resnet18", {"width": 8, "stem": "small"}), ("slim_resnet18", {"width": 16, "in_channels": 1}),
            ("mnist_model_ll", {"in_channels": 1}), ("mnist_model_gap", {"in_channels": 3, "dropout": 0.1}),
            ("mnist_model_final", {"in_channels": 1}), ("airbench", {"widths": [8, 16, 24]}),
            ("compact_net", {"widths": [8, 16, 24], "depths": [1, 2, 1], "kernels": [3, 5, 7]}),
            ("compact_net", {"block": "residual", "widths": [8, 8, 16], "depths": [1, 1, 2], "in_channels": 1}),
            ("compact_net", {"block": ["residual", "inverted", "inverted"], "widths": [8, 8, 16], "depths": [1, 1, 2],
                             "expansion": [1, 2, 3]}),
            ("scaling_cnn", {"width": 5, "depth": 3, "in_channels": 1}),
            ("simple_mlp", {"hidden": [24, 16], "dropout": 0.2, "input_shape": (1, 9, 7)}),
            ("simple_mlp", {"hidden": [], "input_shape": (3, 8, 8)})]
# That these are described and rebuilt is in the contract of the zoos.
OF_ZOOS = [("torchvision:mobilenet_v3_small", {}), ("torchvision:squeezenet1_1", {}), ("timm:resnet18d", {"stem": "small"}),
           *(pytest.param(f"{zoo}:{model}", {}, marks=pytest.mark.slow) for zoo, model in (
               ("torchvision", "resnet18"), ("torchvision", "mobilenet_v2"), ("torchvision", "regnet_y_400mf"),
               ("timm", "resnet10t")))]


def made(name: str, options: dict[str, object]) -> tuple[nn.Module, tuple[int, int, int]]:
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the zoos' own
        model = make(name, num_classes=7, **options).eval()
    shape = options.get("input_shape", (options.get("in_channels", 3), 64, 64))
    return model, shape  # type: ignore[return-value]


@pytest.mark.parametrize(("name", "options"), STUDENTS, ids=lambda value: str(value))
def test_describe_and_build_are_inverse(name: str, options: dict[str, object]) -> None:
    model, shape = made(name, options)
    architecture = describe(model, shape)
    again = Architecture.model_validate(json.loads(json.dumps(architecture.to_json())))
    assert again == architecture
    rebuilt = build(again)
    assert describe(rebuilt, shape, architecture.model_type) == architecture
    rebuilt.load_state_dict(model.state_dict(), strict=True)
    images = torch.randn(2, *shape)
    assert torch.allclose(rebuilt.eval()(images), model(images), atol=1e-5)
    assert check_shapes(architecture)[architecture.layers[-1].name] == (7,)
    costs = layer_costs(architecture).values()
    assert sum(cost.parameters for cost in costs) == count_parameters(model)
    assert sum(cost.macs for cost in costs) == count_macs(model, shape)


@pytest.mark.parametrize(("name", "options"), [*STUDENTS, *OF_ZOOS], ids=lambda value: str(value))
def test_readable_source_is_the_same_network(name: str, options: dict[str, object], tmp_path: Path) -> None:
    model, shape = made(name, options)
    architecture = describe(model, shape)
    text = source(architecture, "weights.pth")
    assert "model_loader" not in text and "architectures" not in text
    namespace: dict[str, type[nn.Module]] = {}
    exec(compile(text, "model.py", "exec"), namespace)
    again = namespace[architecture.model_type]().eval()
    again.load_state_dict(model.state_dict(), strict=True)
    images = torch.randn(2, *shape)
    assert torch.allclose(again(images), model(images), atol=1e-6)


@pytest.mark.parametrize(("name", "published"), [
    ("mnist_model_ll", 9412), ("mnist_model_gap", 6992), ("mnist_model_final", 6972)])
def test_published_mnist_models_are_rebuilt_to_the_parameter(name: str, published: int) -> None:
    model = make(name, num_classes=10)
    assert sum(parameter.numel() for parameter in model.parameters()) == published
    assert model(torch.zeros(2, 1, 28, 28)).shape == (2, 10)
    with pytest.raises(UserError, match="in_channels must be a positive whole number"):
        make(name, num_classes=10, in_channels=0)


COMMITTED: dict[str, tuple[str, int, tuple[int, int, int], dict[str, object]]] = {
    "slim_resnet18_100": ("slim_resnet18", 100, (3, 224, 224), {}),
    "slim_resnet18_cifar10": ("slim_resnet18", 10, (3, 32, 32), {"width": 16, "stem": "small"}),
    "slim_resnet18_digits": ("slim_resnet18", 10, (3, 8, 8), {"width": 16, "stem": "small"}),
    "mnist_model_ll": ("mnist_model_ll", 10, (1, 28, 28), {}),
    "mnist_model_gap": ("mnist_model_gap", 10, (1, 28, 28), {}),
    "mnist_model_final": ("mnist_model_final", 10, (1, 28, 28), {}),
    "mnist_under_8k": ("mnist_under_8k", 10, (1, 28, 28), {}),
    "mnist_under_4k": ("mnist_under_4k", 10, (1, 28, 28), {}),
    "simple_mlp": ("simple_mlp", 10, (1, 28, 28), {}),
    "airbench": ("airbench", 10, (3, 32, 32), {}),
    "scaling_cnn": ("scaling_cnn", 10, (3, 32, 32), {}),
    "compact_net": ("compact_net", 10, (3, 32, 32), {}),
}


def test_committed_architectures_are_what_make_makes() -> None:
    assert {path.stem for path in JSON.glob("*.json")} == set(COMMITTED)
    assert {name for name, *_ in COMMITTED.values()} == set(names())
    for stem, (name, num_classes, shape, options) in COMMITTED.items():
        made_now = describe(make(name, num_classes=num_classes, **options), shape)  # type: ignore[arg-type]
        assert made_now.to_json() == json.loads((JSON / f"{stem}.json").read_text()), stem


class Forks(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x if x.sum() > 0 else -x


class Inner(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.odd = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.odd(self.conv(x)).mean((2, 3))  # type: ignore[no-any-return]


@pytest.mark.parametrize(("layer", "said"), [
    (Forks(), "layer odd (Forks) cannot be traced (test_families.py, line "),
    (nn.ELU(), "layer odd: ELU is not in the layer table"),
    (nn.Upsample(scale_factor=1.5), "resizing of mode 'nearest', by a broken factor"),
    (nn.Conv2d(4, 4, 3, padding_mode="reflect"), "layer odd: Conv2d with padding_mode"),
], ids=["control flow", "unknown layer", "unknown layer 2", "padding mode"])
def test_what_cannot_be_described_is_named(layer: nn.Module, said: str) -> None:
    with pytest.raises(UserError) as caught:
        describe(Inner(layer), (3, 16, 16))
    assert said in str(caught.value)


def lost(function: str) -> type[nn.Module]:
    """A network whose middle is an expression that is easily lowered to something else."""
    class Lossy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3, padding=1)
            self.fc = nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = self.conv(x)
            x = eval(function, {"x": x, "F": nn.functional, "torch": torch})
            return self.fc(x.mean((2, 3)))  # type: ignore[no-any-return]

    return Lossy


@pytest.mark.parametrize("function", [
    "x + F.relu(x, inplace=True)", "F.avg_pool2d(x, 3, 2, 1, divisor_override=1)", "torch.add(x, x, alpha=2)",
    "F.dropout(x)", "x * x.shape[0]", "x + x.T", "torch.cat([x, x])[:x.size(0)]", "x.mean(7)",
])
def test_nothing_is_lowered_to_another_network(function: str) -> None:
    with pytest.raises(UserError) as caught:
        describe(lost(function)(), (3, 8, 8))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("function", [
    "F.avg_pool2d(x, 3, 2, 1, True, False)", "F.max_pool2d(x, 3, 2, 1, 1, True)", "F.gelu(x, approximate='tanh')",
    "F.relu6(x) * torch.sigmoid(x)", "x.add(F.silu(x))",
    "F.adaptive_avg_pool2d(x, (2, 1))", "F.dropout(x, 0.2, False)", "x * x.shape[1]", "x + x.mT", "x * 2",
])
def test_functional_forms_keep_their_arguments(function: str) -> None:
    torch.manual_seed(0)
    model = lost(function)().eval()
    architecture = describe(model, (3, 9, 9))
    rebuilt = build(architecture).eval()
    rebuilt.load_state_dict(model.state_dict())
    images = torch.randn(3, 3, 9, 9)
    assert torch.allclose(rebuilt(images), model(images), atol=1e-6)


class WrongReshape(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.view(2, -1)


class NamesThatCollide(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.x = nn.Conv2d(3, 3, 3, padding=1)
        self.x_ = nn.ModuleDict({"y": nn.Conv2d(3, 3, 1)})
        self.x__y = nn.Conv2d(3, 3, 1)
        self.add = nn.ReLU()
        self.out_x = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        a = self.x(x)
        b, c = self.x_["y"](a), self.x__y(a)
        return self.out_x(self.add(a + b + c + b).mean((2, 3)))  # type: ignore[no-any-return]


def test_names_that_collide_stay_apart() -> None:
    torch.manual_seed(0)
    for model in (NamesThatCollide(), nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 2))):
        model.eval()
        architecture = describe(model, (3, 8, 8))
        namespace: dict[str, type[nn.Module]] = {}
        exec(source(architecture, "w.pth"), namespace)
        again = namespace[architecture.model_type]().eval()
        again.load_state_dict(model.state_dict())
        images = torch.randn(2, 3, 8, 8)
        assert torch.allclose(again(images), model(images), atol=1e-6)
    with pytest.raises(UserError, match="a reshape across the images"):
        describe(WrongReshape(), (3, 8, 8))
    named_input = nn.Sequential()
    named_input.add_module("flatten", nn.Flatten())
    named_input.add_module("input", nn.Linear(8, 2))
    with pytest.raises(UserError, match="layer input: the graph's input"):
        describe(named_input, (1, 1, 8))


class Shared(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.conv(self.relu(self.conv(x)))).mean((2, 3))  # type: ignore[no-any-return]


def test_shared_weights_are_refused_and_shared_activations_are_not() -> None:
    with pytest.raises(UserError, match="layer conv is used twice"):
        describe(Shared(), (3, 8, 8))
    model = make("torchvision:resnet18", num_classes=3)  # calls one ReLU twice in every block
    layers = [layer.name for layer in describe(model, (3, 64, 64)).layers]
    assert "layer1.0.relu" in layers and "layer1.0.relu_1" in layers


class OldFlatten(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(48, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x.view(x.size(0), -1))  # type: ignore[no-any-return]


def test_view_as_flatten() -> None:
    architecture = describe(OldFlatten(), (3, 4, 4))
    assert [layer.type for layer in architecture.layers] == ["Flatten", "Linear"]
    load_verified(architecture, OldFlatten().state_dict(), "here")


@pytest.mark.parametrize(("name", "options", "said"), [
    ("slim_resnet81", {}, "did you mean 'slim_resnet18'"), ("torchvision:resnet19", {}, "did you mean 'resnet18'"),
    ("slim_resnet18", {"widht": 3}, "did you mean 'width'"), ("slim_resnet18", {"width": 0}, "positive whole number"),
    ("slim_resnet18", {"stem": "large"}, "'imagenet' or 'small'"), ("keras:resnet50", {}, "zoos are"),
    ("slim_resnet18", {"pretrained": True}, "no pretrained weights"),
    ("torchvision:vgg11", {"stem": "small"}, "small stem is for ResNets"),
    ("torchvision:shufflenet_v2_x0_5", {"stem": "small"}, "small stem is for ResNets"),
    ("scaling_cnn", {"depth": 0}, "depth must be a positive whole number, got 0"),
    ("compact_net", {"block": "dense"}, "block is 'inverted' or 'residual', or three of these, got 'dense'"),
    ("compact_net", {"block": ["inverted", "residual"]}, "or three of these, got ['inverted', 'residual']"),
    ("compact_net", {"block": [["inverted"], "residual", "residual"]}, "or three of these, got [['inverted'], 'residual'"),
    ("compact_net", {"expansion": [2, 2]}, "expansion: expected a whole number from 1 on, or three, such as [2, 2, 3]"),
    ("compact_net", {"expansion": 0}, "expansion: expected a whole number from 1 on, or three"),
    ("compact_net", {"widths": [8, 16]}, "widths: expected three whole numbers, from 1 on, such as [3, 5, 5]; got [8, 16]"),
    ("compact_net", {"kernels": [3, 4, 5]}, "kernels: expected three whole numbers, 3, 5 or 7"),
    ("compact_net", {"depths": [1, True, 1]}, "depths: expected three whole numbers"),
    ("simple_mlp", {"hidden": [64, 0]}, "hidden must be positive whole numbers, got [64, 0]"),
    ("simple_mlp", {"hidden": 64}, "hidden must be positive whole numbers, got 64"),
    ("simple_mlp", {"input_shape": [28, 28]}, "input_shape must be (C, H, W), positive whole numbers, got [28, 28]"),
    ("simple_mlp", {"dropout": 1}, "dropout must be at least 0 and below 1, got 1")])
def test_wrong_names_and_options(name: str, options: dict[str, object], said: str) -> None:
    with pytest.raises(UserError) as caught:
        make(name, num_classes=3, **options)  # type: ignore[arg-type]
    assert said in str(caught.value)


@pytest.mark.parametrize("name", slow_but(
    ["torchvision:resnet18", "torchvision:resnet50", "timm:resnet18", "timm:resnet50", "timm:resnet18d", "timm:resnest14d",
     "timm:resnest26d"], ["torchvision:resnet18", "timm:resnet18", "timm:resnest14d"]))
def test_small_stem_keeps_the_image_up_to_the_first_stage(name: str) -> None:
    options = {"in_chans": 1} if name.startswith("timm:") else {}
    channels = options.get("in_chans", 3)
    model = make(name, num_classes=7, stem="small", **options).eval()
    seen: list[torch.Size] = []
    model.get_submodule("layer1").register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].shape))
    with torch.inference_mode():
        assert model(torch.zeros(2, channels, 32, 32)).shape == (2, 7)
    assert [tuple(shape[2:]) for shape in seen] == [(32, 32)]
    kernels = [layer.kernel_size for part, layer in model.named_modules()
               if isinstance(layer, nn.Conv2d) and part.startswith("conv1")]
    assert set(kernels) == {(3, 3)}


def test_small_stem_keeps_a_deep_stems_weights() -> None:
    torch.manual_seed(0)
    plain = make("timm:resnet18d", num_classes=7)
    torch.manual_seed(0)
    small = make("timm:resnet18d", num_classes=7, stem="small")
    small.load_state_dict(plain.state_dict(), strict=True)
    torch.manual_seed(0)
    again = make("timm:resnet18d", num_classes=7, stem="small").state_dict()
    assert all(torch.equal(tensor, again[key]) for key, tensor in plain.state_dict().items())


@pytest.mark.parametrize(("name", "options", "stem"), [
    ("torchvision:mobilenet_v2", {"width_mult": 0.25}, "features.0.0"), ("torchvision:efficientnet_b0", {}, "features.0.0"),
    ("timm:mobilenetv3_small_050", {}, "conv_stem")])
def test_small_stem_of_a_depthwise_network_is_its_own_without_the_stride(name: str, options: dict[str, Any],
                                                                         stem: str) -> None:
    plain, small = (make(name, num_classes=7, stem=size, **options).eval() for size in ("imagenet", "small"))
    small.load_state_dict(plain.state_dict(), strict=True)
    image, sizes = torch.zeros(2, 3, 32, 32), []
    for model in (plain, small):
        model.get_submodule(stem).register_forward_hook(lambda module, inputs, output: sizes.append(output.shape[2:]))
        with torch.inference_mode():
            assert model(image).shape == (2, 7)
    assert [tuple(size) for size in sizes] == [(16, 16), (32, 32)]


def test_mlp_that_gets_another_image_says_so() -> None:
    model = make("simple_mlp", num_classes=10, hidden=[16], input_shape=(1, 28, 28))
    assert sum(parameter.numel() for parameter in model.parameters()) == 784 * 16 + 16 + 16 * 10 + 10
    with pytest.raises(UserError, match=r"does not take images of shape \[3, 32, 32\]"):
        describe(model, (3, 32, 32))
