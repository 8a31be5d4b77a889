"""Export torchvision's classifiers by torch's own exporter, read the files back, and compare with ONNX Runtime.

    python -m benchmarks.onnx_round_trip [NAME...] [--out benchmarks/results/onnx_round_trip.json]

Each file is read as a network, lowered to layers of the layer table and rebuilt from them; its logits for one, two and
three images are compared with ONNX Runtime's. Weights are random (`benchmarks/zoo_networks.py`).
"""

from __future__ import annotations

import argparse
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn

from architectures.describe import lower
from architectures.onnx_network.reading import open_classifier, read_network
from architectures.onnx_network.runtime import TOLERANCE, difference_from_file
from benchmarks.zoo_networks import made, torchvision_networks, zoo_networks
from metadata.errors import UserError
from metadata.files import write_json
from metadata.machine import machine, versions


def export_by_torch(model: nn.Module, path: Path, side: int, dynamo: bool = False) -> None:
    """Write an ONNX file by torch's exporter, for a batch of one."""
    options: dict[str, Any] = {"external_data": False, "verbose": False} if dynamo else {}
    with warnings.catch_warnings(action="ignore"):
        torch.onnx.export(model, (torch.randn(1, 3, side, side),), path, dynamo=dynamo, **options)


def round_trip(name: str, folder: Path, dynamo: bool = False) -> dict[str, Any]:
    """Return what became of a classifier: the largest difference from ONNX Runtime, or the reason that it failed."""
    path, started = folder / f"{name.partition(':')[2]}.onnx", time.perf_counter()
    export_by_torch(made(name), path, zoo_networks()[name], dynamo)
    exported = time.perf_counter()
    row: dict[str, Any] = {"model": name, "export_seconds": round(exported - started, 1)}
    try:
        opened = open_classifier(path)
        lowered = lower(read_network(opened), opened.input_shape)
        row |= {"layers": len(lowered.architecture.layers), "difference": difference_from_file(lowered.build(), opened)}
        row["right"] = row["difference"] <= TOLERANCE
    except UserError as error:
        row |= {"right": False, "reason": str(error).replace(str(folder), "")}
    path.unlink()
    return {**row, "read_seconds": round(time.perf_counter() - exported, 1)}


def main() -> None:
    """Run the round trip for the named classifiers, or for all."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*")
    parser.add_argument("--dynamo", action="store_true", help="torch's newer exporter; needs onnxscript")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for name in arguments.names or torchvision_networks():
            rows.append(round_trip(name, Path(folder), arguments.dynamo))
            print(rows[-1], flush=True)
    print(f"{sum(row['right'] for row in rows)} of {len(rows)} come back")
    if arguments.out:
        write_json(arguments.out, {"schema": 1, "dynamo": arguments.dynamo, "rows": rows, "machine": machine(),
                                   "versions": versions()})


if __name__ == "__main__":
    main()
