"""A process that trains single convolutions in both memory formats and says what came of each.

`python -m tests.helpers.convolutions THREADS` reads a JSON list of convolutions, {in, out, kernel, stride, groups, batch,
size, compiled}, and writes JSON lines: {"at": [index, format, refused]} before each backward pass, {"error": largest
difference from the plain layout, relative} after one with channels last. Under `guard.c`, lines on damaged memory too.
"""

from __future__ import annotations

import ctypes
import json
import logging
import sys
from typing import Any

import torch
from torch import Tensor, nn

from compress.training.compiling import compiled
from compress.training.memory_format import unsafe_channels_last


def network(case: dict[str, Any]) -> nn.Sequential:
    """Return the convolution; a compiled one lies between others, where a compiler chooses the layout."""
    torch.manual_seed(0)
    layer = nn.Conv2d(case["in"], case["out"], case["kernel"], case["stride"], case["kernel"] // 2, groups=case["groups"])
    if not case["compiled"]:
        return nn.Sequential(layer)
    return nn.Sequential(nn.Conv2d(3, case["in"], 3, padding=1), nn.BatchNorm2d(case["in"]), nn.Hardtanh(), layer)


def gradients(case: dict[str, Any], layout: torch.memory_format) -> list[Tensor]:
    """Return the output, and the gradients of images and weights."""
    model = network(case).to(memory_format=layout)
    channels = 3 if case["compiled"] else case["in"]
    images = torch.randn(case["batch"], channels, case["size"], case["size"]).contiguous(memory_format=layout)
    images.requires_grad_()
    output = (compiled(model) if case["compiled"] else model)(images)
    output.backward(torch.randn(output.shape).contiguous(memory_format=layout))
    weights = [parameter.grad for parameter in model.parameters()]
    return [tensor.detach() for tensor in (output, images.grad, *weights) if tensor is not None]


def show(**line: Any) -> None:
    print(json.dumps(line), flush=True)


def main() -> None:
    torch.set_num_threads(int(sys.argv[1]))
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    victim = torch.zeros(10)
    show(at=[-1, "control", False])
    if "guarded" in sys.argv:
        ctypes.memset(victim.data_ptr() + victim.nbytes, 1, 4)
    del victim
    for index, case in enumerate(json.load(sys.stdin)):
        refused = bool(unsafe_channels_last(network(case), torch.device("cpu")))
        show(at=[index, "contiguous", False])
        plain = gradients(case, torch.contiguous_format)
        if not (case["compiled"] and refused):  # the loop would train it in the plain layout, compiled or not
            show(at=[index, "channels_last", refused])
            last = gradients(case, torch.channels_last)
            errors = [float((a - b).abs().max() / a.abs().max().clamp(min=1e-6)) for a, b in zip(plain, last, strict=True)]
            show(error=max(errors) if all(error == error for error in errors) else 1e9)
            del last
        del plain


if __name__ == "__main__":
    main()
