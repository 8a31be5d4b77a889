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
architecture = Architecture.model_validate(json.load(open(sys.argv[2] + "/architecture.json")))
quantized = load_verified(architecture, torch.load(sys.argv[2] + "/weights.pth", weights_only=True), "here").eval()
torch.manual_seed(0)
images = torch.randn(2, 3, 32, 32)
with torch.no_grad():
    same = torch.equal(quantized(images), layer_by_layer(quantized)(images))
print(int8_arithmetic(quantized), "|", same)
torch.save(quantized(images), sys.argv[3])
"""


@pytest.mark.skipif(bool(no_int8_kernels()), reason=no_int8_kernels() or "there are int8 kernels")
@pytest.mark.parametrize("weights", ["pair", "8-bit"])
def test_a_cpu_without_vnni_gives_the_same_answers(tmp_path: Path, weights: WeightForm) -> None:
    """The CPU as it is, and the same oneDNN capped to AVX2, whose 16-bit sums saturate with unlimited weights."""
    torch.manual_seed(0)
    graph = graph_of(make("slim_resnet18", num_classes=4, width=8, stem="small"), (3, 32, 32))
    quantized, _ = quantize_graph(graph, example_input=torch.randn(2, 3, 32, 32), choose=False, weights=weights)
    torch.save(quantized.state_dict(), tmp_path / "weights.pth")
    (tmp_path / "architecture.json").write_text(json.dumps(describe(quantized, (3, 32, 32)).to_json()))
    said = []
    for name, capped in (("free", {}), ("capped", {"ONEDNN_MAX_CPU_ISA": "AVX2"})):
        done = subprocess.run([sys.executable, "-c", CAPPED, str(PROJECT), str(tmp_path), str(tmp_path / name)], check=True,
                              text=True, capture_output=True, env=os.environ | capped)
        said.append(done.stdout)
    kernels = [text.startswith("on oneDNN's int8 kernels") for text in said]
    assert kernels == ([True, True] if weights == "pair" else [not kernels_saturate(), False])
    if weights == "8-bit":
        assert "in float32, with the same results to rounding: this CPU has no VNNI instructions, and " in said[1]
        assert said[1].endswith("quantize with weights: pair | True\n")
    free, other = (torch.load(tmp_path / name, weights_only=True) for name in ("free", "capped"))
    assert sqnr_db(free, other) > 45  # a value on the edge of two levels may fall to either side
