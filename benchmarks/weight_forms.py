"""What it costs to keep weights from saturating: 8-bit, pair-limited and 7-bit weights on trained networks.

    python -m benchmarks.weight_forms runs/NAME/03-finetune --dataset cifar10 --data_root DIR
    python -m benchmarks.weight_forms --checkpoint FILE --model slim_resnet18 --options '{"width": 64, "stem": "small"}' ...

Quantize each network dynamically (all layers in int8) and statically (the first settings of the search) with each form of
weights, and classify the test split once. 8-bit weights with exact sums are what the others are compared with, by the
images that only one of the two has right (McNemar's exact test, and Tango's interval). Static files run with exact sums and
on ONNX Runtime's fast kernels, which saturate on CPUs without VNNI.
Write benchmarks/results/weight_forms.json and .md. Rows of other networks in the file are kept.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from scipy.stats import binomtest
from torch import Tensor, fx

sys.path.insert(0, str(Path(__file__).parents[1]))

from architectures.architecture import Architecture
from architectures.build import build
from architectures.describe import describe
from architectures.int8 import int8_modules
from architectures.kernels import int8_arithmetic
from architectures.pairs import saturating_pairs
from architectures.weights import open_model, read_weights
from architectures.zoo import make
from compress.evaluation.measure import Accuracy, measure_accuracy
from compress.packaging.export import export
from compress.quantization.dynamic import quantize_graph
from compress.quantization.portability import drop_bound
from compress.quantization.saturation import saturating
from compress.quantization.static import Calibration, StaticSettings, quantize_static
from compress.quantization.weights import LARGEST
from loaders.augment import examples
from loaders.catalog import load
from loaders.request import Request
from loaders.splits import Splits
from metadata.files import read_json, write_atomically, write_json
from metadata.machine import machine, versions

CALIBRATION, BATCH = 256, 50  # images
SCHEMA = 1  # version of the record


class Answers:
    """Classifies the test split with one network after another; each must see the same images."""

    def __init__(self, splits: Splits, images: int | None) -> None:
        self.splits, self.split = splits, splits.open_test()
        self.ids = self.split.sample(images or len(self.split))

    def of(self, model: Any, logits: list[Tensor]) -> Accuracy:
        """Return the predictions, and append the logits to a list."""
        def call(batch: Tensor) -> Tensor:
            logits.append(model(batch))
            return logits[-1]
        preprocessing = self.splits.card.preprocessing
        return measure_accuracy(call, self.split.batches(BATCH, self.ids), preprocessing, len(self.ids))

    def right(self, accuracy: Accuracy) -> np.ndarray:
        """Return which images are classified correctly, (N,) bool."""
        labels = self.split.labels[self.ids].numpy()
        return np.array(accuracy.predictions) == labels  # type: ignore[no-any-return]


def on_onnxruntime(content: bytes, exact: bool) -> Any:
    """Return a file as a function on ONNX Runtime, one thread, with exact sums or with the fast kernels."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads, options.log_severity_level = 1, 1, 4
    options.add_session_config_entry("session.x64quantprecision", str(int(exact)))
    session = onnxruntime.InferenceSession(content, options, ["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda x: torch.from_numpy(session.run(None, {name: x.numpy()})[0])


def forms_of(model: fx.GraphModule, architecture: Architecture, splits: Splits) -> dict[str, tuple[Any, dict[str, Any]]]:
    """Return each side to measure by name: a function (N, C, H, W) -> logits, and what is known of it."""
    images = examples(splits, CALIBRATION)
    network, _ = export(model, architecture)
    calibration = Calibration(network, images.numpy())
    sides: dict[str, tuple[Any, dict[str, Any]]] = {"float": (on_onnxruntime(network.SerializeToString(), True), {})}
    for form in LARGEST:
        quantized, _ = quantize_graph(model, example_input=images[:1], choose=False, weights=form)
        pairs = sum(saturating_pairs(layer.weight.numpy()) for layer in int8_modules(quantized))
        sides[f"dynamic, {form}"] = quantized, {"pairs_that_can_saturate": pairs, "computes": int8_arithmetic(quantized)}
        file = quantize_static(calibration, StaticSettings(weights=form)).model
        counted = {"pairs_that_can_saturate": sum(saturating(file)[1].values()), "bytes": len(file.SerializeToString())}
        for kernels, exact in (("exact sums", True), ("fast kernels", False)):
            sides[f"static, {form}, {kernels}"] = on_onnxruntime(file.SerializeToString(), exact), counted
    return sides


def measure(model: fx.GraphModule, architecture: Architecture, splits: Splits, images: int | None) -> dict[str, Any]:
    """Return a row for each side: accuracy, what differs from exact 8-bit weights, and the error of the logits."""
    answers, rows, right = Answers(splits, images), {}, {}
    expected: list[Tensor] = []
    sides = forms_of(model, architecture, splits)
    for name, (call, known) in sides.items():
        logits: list[Tensor] = []
        accuracy = answers.of(call, logits)
        right[name] = answers.right(accuracy)
        expected = expected or logits
        noise = sum(float((got - wanted).square().sum()) for got, wanted in zip(logits, expected, strict=True))
        power = sum(float(wanted.square().sum()) for wanted in expected)
        rows[name] = {**known, "correct": accuracy.correct, "images": accuracy.total,
                      "error_of_logits": (noise / power) ** 0.5}
        base = "dynamic, 8-bit" if name.startswith("dynamic") else "static, 8-bit, exact sums"
        rows[name]["base"] = base if name not in ("float", base) else None
        print(f"  {name}: {accuracy.correct}/{accuracy.total}", flush=True)
    for name, row in rows.items():
        if row["base"]:
            before, now = right[row["base"]], right[name]
            lost, gained = int((before & ~now).sum()), int((now & ~before).sum())
            row |= {"lost": lost, "gained": gained, "loses_at_most": drop_bound(lost, gained, row["images"]),
                    "p_value": binomtest(lost, lost + gained).pvalue if lost + gained else 1.0}
    return rows


def markdown(result: dict[str, Any]) -> str:
    """Return the tables, one for each network."""
    where = result["machine"]
    parts = [f"# Forms of weights\n\n{where['cpu']} ({', '.join(where['flags'])}), one thread. \"Points\" are of "
             "accuracy, against 8-bit weights with exact sums on the same images; \"at most\" is the upper end of a one-"
             "sided 95 % interval of the loss.\n"]
    for name, rows in result["networks"].items():
        parts += [f"\n## {name}\n\n| | correct | points | loses at most | p | error of logits | pairs that can saturate "
                  "|\n|---|---:|---:|---:|---:|---:|---:|"]
        for side, row in rows.items():
            against = ["", "", ""] if not row["base"] else [
                f"{100 * (row['gained'] - row['lost']) / row['images']:+.2f}", f"{100 * row['loses_at_most']:.2f}",
                f"{row['p_value']:.2f}"]
            pairs = f"{row['pairs_that_can_saturate']:,}" if "pairs_that_can_saturate" in row else ""
            parts.append(f"| {side} | {row['correct']:,} of {row['images']:,} | {' | '.join(against)} | "
                         f"{row['error_of_logits']:.4f} | {pairs} |")
    return "\n".join(parts) + "\n"


def main() -> int:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stages", type=Path, nargs="*", help="folders of stages of runs")
    parser.add_argument("--checkpoint", type=Path, help="a state dict of --model with --options")
    parser.add_argument("--model", default="slim_resnet18")
    parser.add_argument("--options", type=json.loads, default={})
    parser.add_argument("--dataset", default="cifar10")
    parser.add_argument("--data_root", type=Path, required=True)
    parser.add_argument("--test_images", type=int, help="default: all")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "weight_forms")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    path = arguments.output.with_suffix(".json")
    told = {"schema": SCHEMA, "machine": machine()}
    before = json.loads(path.read_text()) if path.is_file() else {}
    if before and any(before.get(key) != value for key, value in told.items()):
        print(f"error: {path} holds another machine's results or an older form; name another --output", file=sys.stderr)
        return 2
    result = {**told, "versions": versions(), "networks": before.get("networks", {})}
    splits = load(Request(name=arguments.dataset, root=arguments.data_root))
    networks: dict[str, tuple[fx.GraphModule, Architecture]] = {}
    for stage in arguments.stages:
        architecture = read_json(stage / "architecture.json", Architecture)
        model = open_model(architecture, stage / "weights.pth")
        networks[f"{architecture.model_type} of {stage.name}"] = model, architecture
    if arguments.checkpoint:
        made = make(arguments.model, num_classes=splits.card.num_classes, **arguments.options)
        architecture = describe(made, splits.card.input_shape)
        graph = build(architecture)
        graph.load_state_dict({name: tensor.float() if tensor.is_floating_point() else tensor
                               for name, tensor in read_weights(arguments.checkpoint).items()})
        networks[f"{architecture.model_type} {arguments.options}"] = graph.eval(), architecture
    for name, (model, architecture) in networks.items():
        print(f"{name}, {splits.card.name}", flush=True)
        result["networks"][f"{name}, {splits.card.name}"] = measure(model, architecture, splits, arguments.test_images)
        write_json(path, result)
        write_atomically(path.with_suffix(".md"), markdown(result).encode())
    print(markdown(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
