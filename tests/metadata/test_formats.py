"""Files of weights: `torch.load` gives what was written, in fewer bytes than `torch.save` takes for a plain state dict."""

from __future__ import annotations

import io
from pathlib import Path

import torch
from torch import nn

from architectures.weights import check_tensors
from architectures.zoo import make
from compress.quantization.dynamic import quantize_graph
from architectures.describe import lower
from metadata.formats import in_one_storage_a_type, write_weights


def test_a_state_dict_takes_a_storage_a_type(tmp_path: Path) -> None:
    model = lower(make("compact_net", num_classes=10).eval(), (3, 32, 32)).build().eval()
    for module in (model, quantize_graph(model)[0]):
        weights = module.state_dict()
        path, plain = tmp_path / "weights.pth", io.BytesIO()
        write_weights(path, weights)
        torch.save(weights, plain)
        read = torch.load(path, weights_only=True)
        assert list(read) == list(weights) and all(
            torch.equal(read[name], tensor) and read[name].dtype == tensor.dtype for name, tensor in weights.items())
        assert len(plain.getvalue()) - path.stat().st_size > 200 * (len(weights) - 3)
        check_tensors(read, "here", path.stat().st_size)
        module.load_state_dict(read, strict=True)


def test_odd_tensors_come_back() -> None:
    shared, wide = torch.randn(3, 4), torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)
    weights = {"one": shared, "again": shared, "turned": shared.t(), "part": shared[1:], "none": torch.empty(0, 3),
               "also none": torch.empty(4, 0), "number": torch.tensor(7), "wide": wide, "half": torch.ones(3).half(),
               "parameter": nn.Parameter(torch.ones(2)), "complex": torch.randn(3, dtype=torch.complex64).conj(),
               "yes": torch.tensor([True, False])}
    sparse = torch.eye(3).to_sparse()
    assert in_one_storage_a_type({"sparse": sparse, **weights})["sparse"] is sparse
    buffer = io.BytesIO()
    torch.save(in_one_storage_a_type(weights), buffer)
    buffer.seek(0)
    read = torch.load(buffer, weights_only=True)
    for name, tensor in weights.items():
        assert read[name].dtype == tensor.dtype and read[name].shape == tensor.shape
        assert torch.equal(read[name], tensor), name
    assert read["one"].data_ptr() == read["again"].data_ptr() != read["turned"].data_ptr()


def test_nothing_is_a_state_dict_too() -> None:
    assert in_one_storage_a_type({}) == {}
