"""All that a submission brings is counted: numbers in the architecture, names of files, files beside the weights."""

from __future__ import annotations

import base64
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from architectures.architecture import Architecture
from architectures.counting import description_bytes
from compress.evaluation.submission import read_submission
from compress.evaluation.submission_files import TEXT_SHARE
from compress.packaging.bundle import bundle
from metadata.files import read_json
from tests.helpers.architectures import layer
from tests.helpers.commands import PROJECT
from tests.helpers.submissions import write_package
from tests.helpers.verdicts import Evaluate, assert_refused

FEATURES, CLASSES = 64, 10
ARCH = "trained_pruned_architecture.json"


def built(folder: Path, layers: list[dict[str, Any]], weights: dict[str, torch.Tensor]) -> Path:
    """A package of grey images of 8x8 pixels."""
    return write_package(folder, layers, weights, 0, (1, 8, 8), CLASSES)


def classifier(folder: Path, kind: str) -> Path:
    """A linear classifier of 64 pooled features: honest, or its weights as slopes, as windows, or as chosen sums."""
    matrix = np.random.default_rng(0).standard_normal((CLASSES, FEATURES))
    grey = layer("grey", "Conv2d", ["input"], in_channels=1, out_channels=1, kernel_size=[1, 1])
    pools = [layer(f"p{index}", "AvgPool2d", ["grey"], kernel_size=[index // 8 + 1, index % 8 + 1], stride=[8, 8])
             for index in range(FEATURES)]
    weights = {"grey.weight": torch.ones(1, 1, 1, 1), "grey.bias": torch.zeros(1)}
    names = [pool["name"] for pool in pools]
    if kind == "honest":
        return built(folder, [grey, *pools, layer("all", "Concat", names), layer("row", "Flatten", ["all"]),
                              layer("fc", "Linear", ["row"], in_features=FEATURES, out_features=CLASSES)],
                     weights | {"fc.weight": torch.from_numpy(matrix).float(), "fc.bias": torch.zeros(CLASSES)})
    layers, sums = [grey, *pools], []
    for row in range(CLASSES):
        terms: list[str] = []
        for column in range(FEATURES):
            name, size = f"m{row}x{column}", 1000 + int(2**16 * abs(matrix[row, column]) / 8)
            if kind == "slopes":
                layers.append(layer(name, "LeakyReLU", [names[column]], negative_slope=float(matrix[row, column])))
            else:  # one number in a window of so many
                layers.append(layer(name, "AvgPool2d", [names[column]], kernel_size=[size, 1], stride=[size, 1],
                                    padding=[size // 2, 0]))
            terms.append(name)
            if column:
                layers.append(layer(f"s{row}x{column}", "Add", [terms[-2], name]))
                terms.append(f"s{row}x{column}")
        sums.append(terms[-1])
    return built(folder, [*layers, layer("all", "Concat", sums), layer("y", "Flatten", ["all"])], weights)


@pytest.mark.parametrize("kind", ["slopes", "windows"])
def test_weights_in_the_architecture_are_counted(kind: str, tmp_path: Path) -> None:
    honest = read_submission(classifier(tmp_path / "honest", "honest"))
    hidden = read_submission(classifier(tmp_path / "hidden", kind))
    assert hidden.size_bytes() > 0.9 * honest.size_bytes() and hidden.needed_bytes() > honest.needed_bytes()
    assert hidden.counted["numbers_in_the_architecture"] > (8 if kind == "slopes" else 6) * CLASSES * FEATURES


def test_what_the_toolkit_packages_gains_nothing(submission: Path) -> None:
    files = read_submission(submission)
    assert files.size_bytes() == files.weights.stat().st_size
    needed = ("model_metadata.json", ARCH, files.weights.name)
    assert files.needed_bytes() == sum((submission / name).stat().st_size + len(name) for name in needed)


@pytest.mark.parametrize("name", [path.name for path in sorted((PROJECT / "architectures" / "json").glob("*.json"))])
def test_committed_networks_describe_little(name: str) -> None:
    architecture: Architecture = read_json(PROJECT / "architectures" / "json" / name, Architecture)
    assert description_bytes(architecture) < 8 * len(architecture.layers)


def test_weights_in_names_of_files_are_counted(original: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(original, tmp_path / "s"))
    honest = read_submission(folder)
    data, step = honest.weights.read_bytes(), 180
    for index, start in enumerate(range(0, len(data), step)):
        (folder / f"{index:05d}{base64.urlsafe_b64encode(data[start:start + step]).decode()}").touch()
    torch.save({"one": torch.ones(1)}, folder / honest.weights.name)
    hidden = read_submission(folder)
    assert hidden.size_bytes() > 1.3 * honest.size_bytes() and hidden.needed_bytes() > honest.needed_bytes()


def test_what_the_code_does_not_get_is_not_counted(original: Path, evaluate: Evaluate, tmp_path: Path) -> None:
    """The toolkit's own model_loader.py, a licence and a description lie beside most models."""
    folder = Path(shutil.copytree(original, tmp_path / "s"))
    honest = read_submission(folder)
    texts = {"model_loader.py": bundle(), "LICENSE": random_text(9_000), "README.md": random_text(9_000)}
    for name, content in texts.items():
        (folder / name).write_bytes(content)
    files = read_submission(folder)
    assert set(files.kept_back) == texts.keys() and files.size_bytes() == honest.size_bytes() + len("".join(texts))
    assert files.needed_bytes() == honest.needed_bytes() + len("".join(texts))
    reads = "import torch\nfrom pathlib import Path\nread = Path(__file__).with_name('README.md').read_bytes()\n"
    model = folder / "model.py"
    model.write_text(model.read_text().replace("import torch\n", reads, 1))
    assert_refused(evaluate(folder, "--allow_code"), "README.md")


def test_text_counts_as_far_as_it_is_large(original: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(original, tmp_path / "s"))
    honest = read_submission(folder)
    free = honest.counted["weights"] // TEXT_SHARE
    assert honest.counted["text_compressed"] == 0 and free > 4_000
    for more in (0, 1_000, 100_000):
        (folder / "history.json").write_bytes(random_text(free + more))
        counted = read_submission(folder).counted["text_compressed"]
        assert 0.7 * more <= counted < free + more


def random_text(length: int) -> bytes:
    """Text that does not compress below three quarters."""
    return base64.b64encode(np.random.default_rng(0).bytes(length))[:length]
