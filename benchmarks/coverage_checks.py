"""What a network of a zoo must go through: described, rebuilt, pruned, exported, quantized; a column of the table each.

Every check raises an AssertionError or a UserError that says what was expected. The contract test and the coverage table
run the same checks.
"""

from __future__ import annotations

import copy
import json
import time
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn

from architectures.agreement import relative_difference
from architectures.architecture import Architecture
from architectures.build import build
from architectures.counting import architecture_macs, count_macs
from architectures.describe import describe, lower
from benchmarks.zoo_networks import made
from compress.packaging.export import export
from compress.pruning.library import tp
from compress.pruning.prune import prune
from compress.quantization.calibration import session
from compress.quantization.dynamic import quantize_graph
from compress.quantization.static import Calibration, StaticSettings, quantize_static
from metadata.errors import UserError, VerificationError, first_line

REBUILT, SAME_ONNX = 1e-5, 1e-4  # largest difference of logits, relative to the largest logit
COMPUTED = 1e-3  # share of parameters that may differ: tables that a network computes from weights are stored instead
RATIO = 0.5
IMAGES = 3
ROUNDING = 1e-5  # the same difference between float32 and float64; a network above it shows no mistake of 1e-4


def difference(expected: Tensor, got: Tensor) -> float:
    """Return the largest difference of two batches of logits, relative to the largest logit."""
    assert expected.shape == got.shape, f"expected logits {list(expected.shape)}, got {list(got.shape)}"
    assert bool(torch.isfinite(expected).all()), "the network's own logits are not finite"
    return relative_difference(expected, got)


class Examined:
    """One network on its way through the checks, in the order of `CHECKS`; a check needs what those before it made."""

    def __init__(self, name: str, size: int) -> None:
        self.model, self.shape = made(name).requires_grad_(False), (3, size, size)
        self.images = torch.randn(IMAGES, *self.shape, generator=torch.Generator().manual_seed(1))
        self.logits = self._answered()

    @torch.no_grad()
    def _answered(self) -> Tensor:
        """Return the network's logits. First halve the factors of its norms until float32 rounds little in it.

        Random weights can make a deep network chaotic: its logits then depend on the order of every sum.
        """
        for _ in range(5):
            logits: Tensor = self.model(self.images)
            if difference(copy.deepcopy(self.model).double()(self.images.double()), logits.double()) <= ROUNDING:
                return logits
            for name, factors in self.model.named_parameters():
                if factors.dim() == 1 and name.endswith("weight"):
                    factors.mul_(0.5)
        raise AssertionError(f"float32 rounds the network's own logits by more than {ROUNDING:.0e}")

    def describe(self) -> str:
        """The layer table holds the network."""
        lowered = lower(self.model, self.shape)
        self.architecture, self.weights = lowered.architecture, lowered.weights
        return f"{len(self.architecture.layers)} layers"

    def rebuild(self) -> str:
        """The network that its JSON gives has the same logits, and the same JSON."""
        self.graph = rebuilt(self.architecture, self.weights)
        assert describe(self.graph, self.shape, self.architecture.model_type) == self.architecture, "described differently"
        with torch.no_grad():
            found = difference(self.logits, self.graph(self.images))
        assert found <= REBUILT, f"logits differ by {found:.1e}"
        return f"{found:.0e}"

    def count(self) -> str:
        """Parameters and multiply-adds are those that torch counts in the zoo's own network."""
        own, ours = (sum(tensor.numel() for tensor in model.parameters()) for model in (self.model, self.graph))
        assert abs(own - ours) <= COMPUTED * own, f"{own:,} parameters, rebuilt {ours:,}"
        macs = count_macs(self.model, self.shape), architecture_macs(self.architecture)
        assert macs[0] == macs[1], f"{macs[0]:,} MACs by torch, {macs[1]:,} by the layer table"
        return f"{own / 1e6:.2f} M, {macs[0] / 1e6:.0f} M MACs"

    def prune(self) -> str:
        """Half of the channels go; the rest runs, and comes back from its JSON bit for bit."""
        self.pruned = prune(self.graph, torch.zeros(1, *self.shape), ratio=RATIO, multiple=8, criterion="l2",
                            scope="uniform")
        self.pruned_architecture = describe(self.pruned, self.shape, self.architecture.model_type)
        again = rebuilt(self.pruned_architecture, self.pruned.state_dict())
        with torch.no_grad():
            self.pruned_logits: Tensor = self.pruned(self.images)
            assert torch.equal(self.pruned_logits, again(self.images)), "pruned and rebuilt, the logits differ"
        assert self.pruned_logits.shape == self.logits.shape and bool(torch.isfinite(self.pruned_logits).all())
        once_more = describe(again, self.shape, self.architecture.model_type)
        assert once_more == self.pruned_architecture, "described differently"
        left = sum(tensor.numel() for tensor in self.pruned.parameters())
        return f"{left / sum(tensor.numel() for tensor in self.graph.parameters()):.0%}"

    def onnx(self) -> str:
        """The network as ONNX, by ONNX Runtime."""
        self.file, _ = export(self.graph, self.architecture)
        return self._answers(self.file, self.logits)

    def pruned_onnx(self) -> str:
        """The pruned network as ONNX, by ONNX Runtime."""
        return self._answers(export(self.pruned, self.pruned_architecture)[0], self.pruned_logits)

    def dynamic(self) -> str:
        """Dynamic int8 runs."""
        quantized, rows = quantize_graph(self.graph, weights="pair")
        with torch.no_grad():
            assert bool(torch.isfinite(quantized(self.images)).all()), "int8 logits are not finite"
        return f"{sum(row.dtype == 'int8' for row in rows)} of {len(rows)}"

    def static(self) -> str:
        """Static int8 runs on ONNX Runtime."""
        found = quantize_static(Calibration(self.file, self.images.numpy()), StaticSettings())
        logits = _run(found.model, self.images)
        assert bool(torch.isfinite(logits).all()), "int8 logits are not finite"
        weighted = [node for node in found.model.graph.node if node.op_type in ("Conv", "Gemm", "MatMul")]
        scaled = {output for node in found.model.graph.node if node.op_type == "DequantizeLinear" for output in node.output}
        return f"{sum(set(node.input[:2]) <= scaled for node in weighted)} of {len(weighted)}"

    def _answers(self, file: Any, expected: Tensor) -> str:
        found = difference(expected, _run(file, self.images))
        assert found <= SAME_ONNX, f"ONNX Runtime's logits differ by {found:.1e}"
        return f"{found:.0e}"


CHECKS: dict[str, Callable[[Examined], str]] = {
    "describe": Examined.describe, "rebuild": Examined.rebuild, "count": Examined.count, "prune": Examined.prune,
    "onnx": Examined.onnx, "pruned onnx": Examined.pruned_onnx, "int8 dynamic": Examined.dynamic,
    "int8 static": Examined.static}


def examine(name: str, size: int, int8: bool = True) -> dict[str, dict[str, Any]]:
    """Return for each check whether a network passes it, what was found, and the seconds; `int8`: with those of int8."""
    subject = Examined(name, size)
    found: dict[str, dict[str, Any]] = {}
    for check, function in CHECKS.items():
        if check.startswith("int8") and not int8:
            continue
        started = time.perf_counter()
        try:
            passed, text = True, function(subject)
        except (AssertionError, UserError, VerificationError) as error:
            passed, text = False, first_line(error)
        except AttributeError as error:  # an earlier check has failed
            needed = str(error).rpartition("attribute ")[2]
            if "'Examined'" not in str(error):
                raise
            passed, text = False, f"not tried: no {needed}"
        except Exception as error:  # a bug of ours or of a library is a row of the table
            passed, text = False, f"{type(error).__name__}: {first_line(error)}"
        found[check] = {"passed": passed, "text": text, "seconds": round(time.perf_counter() - started, 2)}
    return found


def torch_pruning_alone(name: str, size: int) -> dict[str, dict[str, Any]]:
    """Return whether torch-pruning prunes the zoo's network by itself, as its README shows, and the result runs."""
    model, image = made(name), torch.randn(1, 3, size, size)
    before = sum(tensor.numel() for tensor in model.parameters())
    heads = [module for module in model.modules() if isinstance(module, nn.Linear | nn.Conv2d)
             and module.weight.shape[0] == 1000]
    started = time.perf_counter()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tp.pruner.BasePruner(model, image, tp.importance.GroupMagnitudeImportance(), pruning_ratio=RATIO, round_to=8,
                                 ignored_layers=heads, in_channel_groups={}, out_channel_groups={}).step()
        after = sum(tensor.numel() for tensor in model.parameters())
        with torch.no_grad():
            logits = model(image)
        passed = logits.shape == (1, 1000) and after < before and bool(torch.isfinite(logits).all())
        text = f"{after / before:.0%}"
    except Exception as error:  # whatever the library or the network raises is the result
        passed, text = False, f"{type(error).__name__}: {first_line(error)}"
    return {"prune": {"passed": passed, "text": text, "seconds": round(time.perf_counter() - started, 2)}}


def rebuilt(architecture: Architecture, weights: dict[str, Tensor]) -> fx.GraphModule:
    """Return the network that an architecture's JSON gives, with weights."""
    graph = build(Architecture.model_validate(json.loads(json.dumps(architecture.to_json()))))
    graph.load_state_dict(weights, strict=True)
    return graph.eval()


def _run(file: Any, images: Tensor) -> Tensor:
    """Return ONNX Runtime's logits."""
    runtime = session(file, 1)
    answers: list[np.ndarray] = runtime.run(None, {file.graph.input[0].name: images.numpy()})
    return torch.from_numpy(answers[0])
