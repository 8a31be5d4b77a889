"""Static int8 of layers that read a tensor of the network's own instead of the images, such as projected positions."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from architectures.describe import lower
from compress.packaging.export import export
from compress.quantization.calibration import session
from compress.quantization.static import Calibration, StaticSettings, quantize_static


class Positions(nn.Module):
    """A convolution of stored positions, added to one of the images."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("positions", torch.rand(2, 8, 8))
        self.conv, self.project, self.head = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(2, 8, 1), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head((self.conv(x) + self.project(self.positions)).relu().mean((2, 3)))  # type: ignore[no-any-return]


def test_a_layer_that_reads_a_stored_tensor_is_quantized_with_the_others() -> None:
    torch.manual_seed(0)
    model, images = Positions().eval(), torch.randn(8, 3, 8, 8)
    lowered = lower(model, (3, 8, 8))
    file, _ = export(lowered.build(), lowered.architecture)
    found = quantize_static(Calibration(file, images.numpy()), StaticSettings())
    logits = torch.from_numpy(session(found.model, 1).run(None, {"input": images.numpy()})[0])
    with torch.no_grad():
        expected = model(images)
    assert float((logits - expected).abs().max()) < 0.1 * float(expected.abs().max())
