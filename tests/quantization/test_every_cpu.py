"""Dynamic int8 gives the same answers on every CPU: kernels are used only where they are exact for a network's weights."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from architectures.describe import describe
from architectures.kernels import kernels_saturate, no_int8_kernels
from architectures.zoo import make
from compress.quantization.dynamic import quantize_graph
from compress.quantization.int8_table import sqnr_db
from compress.quantization.weights import WeightForm
from tests.helpers.commands import PROJECT
from tests.helpers.graphs import graph_of

CAPPED = """
import json, sys, torch
sys.path.insert(0, sys.argv[1])
from architectures.architecture import Architecture
from architectures.kernels import int8_arithmetic, layer_by_layer
from architectures.weights import load_verified
torch.manual_seed(0)
images, said = torch.randn(2, 3, 32, 32), {}
for form in sys.argv[4:]:
    folder = f"{sys.argv[2]}/{form}"
    architecture = Architecture.model_validate(json.load(open(folder + "/architecture.json")))
    quantized = load_verified(architecture, torch.load(folder + "/weights.pth", weights_only=True), "here").eval()
    with torch.no_grad():
        logits = quantized(images)
        said[form] = int8_arithmetic(quantized), torch.equal(logits, layer_by_layer(quantized)(images))
    torch.save(logits, f"{folder}/{sys.argv[3]}")
print(json.dumps(said))
"""
FORMS: tuple[WeightForm, ...] = ("pair", "8-bit")


@pytest.mark.skipif(bool(no_int8_kernels()), reason=no_int8_kernels() or "there are int8 kernels")
def test_a_cpu_without_vnni_gives_the_same_answers(tmp_path: Path) -> None:
    """The CPU as it is, and the same oneDNN capped to AVX2, whose 16-bit sums saturate with unlimited weights."""
    torch.manual_seed(0)
    graph = graph_of(make("slim_resnet18", num_classes=4, width=8, stem="small"), (3, 32, 32))
    for form in FORMS:
        quantized, _ = quantize_graph(graph, example_input=torch.randn(2, 3, 32, 32), choose=False, weights=form)
        (tmp_path / form).mkdir()
        torch.save(quantized.state_dict(), tmp_path / form / "weights.pth")
        (tmp_path / form / "architecture.json").write_text(json.dumps(describe(quantized, (3, 32, 32)).to_json()))
    said = {}
    for name, capped in (("free", {}), ("capped", {"ONEDNN_MAX_CPU_ISA": "AVX2"})):
        done = subprocess.run([sys.executable, "-c", CAPPED, str(PROJECT), str(tmp_path), name, *FORMS], check=True,
                              text=True, capture_output=True, env=os.environ | capped)
        said[name] = json.loads(done.stdout)
    on_kernels = {(name, form): said[name][form][0] == "on oneDNN's int8 kernels" for name in said for form in FORMS}
    assert on_kernels == {("free", "pair"): True, ("capped", "pair"): True, ("free", "8-bit"): not kernels_saturate(),
                          ("capped", "8-bit"): False}
    how, same = said["capped"]["8-bit"]
    assert how.startswith("in float32, with the same results to rounding: this CPU has no VNNI instructions, and ")
    assert how.endswith("quantize with weights: pair") and same
    for form in FORMS:
        free, other = (torch.load(tmp_path / form / name, weights_only=True) for name in said)
        assert sqnr_db(free, other) > 45  # a value on the edge of two levels may fall to either side
