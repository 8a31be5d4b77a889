"""Score MLPerf Tiny's reference networks for CIFAR-10 with the evaluator.

    python -m benchmarks.mlperf_tiny NETWORKS TEST_IMAGES

NETWORKS is a folder with the `.tflite` files of MLCommons' repository (benchmark/training/image_classification),
TEST_IMAGES CIFAR-10's test split as an image folder (`python -m compress export_data cifar10` writes one). Each file is put
into a folder with a metadata.json of a few lines, as anybody would, and scored by its own runtime. The networks take plain
pixels, 0 to 255. Write benchmarks/results/mlperf_tiny.json and .md.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from compress.evaluation.command import terminal_progress
from compress.evaluation.evaluate import evaluate_submission
from compress.evaluation.runtimes import EvaluationSettings
from metadata.errors import UserError
from metadata.files import sha256, write_atomically, write_json

RESULTS = Path(__file__).parent / "results"
NETWORKS = {"pretrainedResnet.tflite": "ResNet-8, float", "pretrainedResnet_quant.tflite": "ResNet-8, int8",
            "pretrainedResnet_large_float.tflite": "large, float", "pretrainedResnet_large_int8.tflite": "large, int8"}
CLASSES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
METADATA = {"model_format": "tflite", "input_shape": [32, 32, 3], "class_names": CLASSES,
            "preprocessing": {"value_range": [0, 255], "layout": "NHWC"}}


def scored(network: Path, images: Path) -> dict[str, Any]:
    """What the evaluator finds for one file: its size, counts and accuracy, and where it ran. No time: that needs quiet.

    Raises:
        UserError, VerificationError: see `evaluate_submission`.
    """
    with tempfile.TemporaryDirectory() as folder:
        shutil.copy(network, Path(folder) / "model.tflite")
        write_json(Path(folder) / "metadata.json", METADATA)
        result = evaluate_submission(folder, images, settings=EvaluationSettings(), progress=terminal_progress())
    details = result["details"]
    accuracy = details["accuracy"]
    return {"sha256": sha256(network), "bytes": details["bytes"]["weights"], "parameters": details["parameters"]["all"],
            "macs": details["macs"], "correct": accuracy["correct"], "images": accuracy["total"],
            "accuracy": accuracy["fraction"], "wilson_95": accuracy["wilson_95"],
            "backend": details["backend"], "machine": details["machine"], "versions": details["versions"],
            "warnings": details["warnings"]}


def table(rows: dict[str, dict[str, Any]]) -> str:
    """The record in Markdown."""
    first = next(iter(rows.values()))
    lines = ["# MLPerf Tiny's networks on CIFAR-10", "",
             f"Scored by the evaluator on {first['images']:,} test images, LiteRT {first['versions']['ai_edge_litert']}, "
             f"one thread of {first['machine']['cpu']}. The files are MLCommons' (MLPerf Tiny, Apache-2.0).", "",
             "| network | bytes | parameters | MACs | correct | accuracy |", "| --- " + "| ---: " * 5 + "|"]
    for name, row in rows.items():
        lines.append(f"| {NETWORKS[name]} | {row['bytes']:,} | {row['parameters']:,} | {row['macs']:,} | "
                     f"{row['correct']:,} | {row['accuracy']:.2%} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(description="Score MLPerf Tiny's networks on CIFAR-10.")
    parser.add_argument("networks", type=Path)
    parser.add_argument("images", type=Path)
    options = parser.parse_args()
    try:
        found = [name for name in NETWORKS if (options.networks / name).is_file()]
        if not found:
            raise UserError(f"{options.networks}: none of {', '.join(NETWORKS)} is there")
        rows = {name: scored(options.networks / name, options.images) for name in found}
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    write_json(RESULTS / "mlperf_tiny.json", rows)
    write_atomically(RESULTS / "mlperf_tiny.md", table(rows).encode())
    print(json.dumps({name: [row["correct"], row["images"]] for name, row in rows.items()}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
