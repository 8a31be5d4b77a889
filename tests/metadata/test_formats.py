"""Files of weights: `torch.load` gives what was written, in fewer bytes than `torch.save` takes for a plain state dict."""

from __future__ import annotations

import io
import struct
import zipfile
from pathlib import Path

import torch
from torch import nn

from architectures.archives import check_archive
from architectures.weights import check_tensors
from architectures.zoo import make
from compress.quantization.dynamic import quantize_graph
from architectures.describe import lower
from metadata.formats import in_one_storage_a_type, narrowed, weights_content, write_weights


def test_a_state_dict_takes_a_storage_a_type(tmp_path: Path) -> None:
    model = lower(make("compact_net", num_classes=10).eval(), (3, 32, 32)).build().eval()
    for module in (model, quantize_graph(model)[0]):
        weights = {name: tensor.clone() for name, tensor in module.state_dict().items()}
        path, plain = tmp_path / "weights.pth", io.BytesIO()
        write_weights(path, weights)
        torch.save(weights, plain)
        for mapped in (False, True):
            read = torch.load(path, weights_only=True, mmap=mapped)
            assert list(read) == list(weights)
            assert all(torch.equal(read[name].to(tensor.dtype), tensor) for name, tensor in weights.items())
        assert len(plain.getvalue()) - path.stat().st_size > 200 * (len(weights) - 3)
        check_archive(path)
        check_tensors(read, "here", path.stat().st_size)
        module.load_state_dict(read, strict=True)
        assert all(torch.equal(tensor, weights[name]) for name, tensor in module.state_dict().items())


def test_the_same_weights_are_the_same_bytes_and_lie_where_they_can_be_mapped() -> None:
    weights = {"int8": torch.ones(7, dtype=torch.int8), "float": torch.rand(5), "wide": torch.rand(5, dtype=torch.float64)}
    content = weights_content(weights)
    assert content == weights_content({name: tensor.clone() for name, tensor in weights.items()})
    many = {f"layer {index}": torch.ones(index, dtype=torch.int8) for index in range(60)}
    assert len(weights_content(many)) == len(weights_content(dict(reversed(many.items()))))
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        numbers = [member for member in archive.infolist() if "/data/" in member.filename]
        assert len(numbers) == 3
        for member in numbers:
            header = content[member.header_offset:]
            begins = member.header_offset + 30 + sum(struct.unpack_from("<HH", header, 26))
            assert begins % 64 == 0 and not member.extra  # the directory repeats no padding
            assert archive.read(member) == content[begins:begins + member.file_size]


def test_scales_beside_int8_weights_are_float16_where_that_changes_nothing() -> None:
    half, full, tied = torch.rand(6).half().float(), torch.rand(6), torch.full((2,), 0.5)
    others = {"half": half, "full": full, "wide": half.double(), "one": tied, "two": tied}
    assert all(tensor.dtype == others[name].dtype for name, tensor in narrowed(others).items())
    read = torch.load(io.BytesIO(weights_content({"int8": torch.ones(3, dtype=torch.int8), **others})), weights_only=True)
    assert {name: tensor.dtype for name, tensor in read.items()} == {
        "int8": torch.int8, "half": torch.float16, "full": torch.float32, "wide": torch.float64, "one": torch.float16,
        "two": torch.float16}
    assert all(torch.equal(read[name].to(tensor.dtype), tensor) for name, tensor in others.items())
    assert read["one"].data_ptr() == read["two"].data_ptr()


def test_views_of_one_memory_that_hold_other_numbers_stay_apart() -> None:
    square, whole, pairs = torch.arange(9.0).view(3, 3), torch.arange(8.0), torch.tensor([1 + 2j, 3 - 1j])
    weights = {"int8": torch.ones(3, dtype=torch.int8), "square": square, "turned": square.t(), "every other": whole[::2],
               "first": whole[:4], "bits": whole.view(torch.int32), "pairs": pairs, "conjugate": pairs.conj(),
               "imaginary": pairs.imag, "negative": pairs.conj().imag, "none": torch.zeros(0),
               "none int8": torch.zeros(0, dtype=torch.int8), "none wide": torch.zeros(0, dtype=torch.float64)}
    read = torch.load(io.BytesIO(weights_content(weights)), weights_only=True)
    for name, tensor in weights.items():
        assert read[name].dtype == (torch.float16 if tensor.dtype == torch.float32 else tensor.dtype), name
        assert torch.equal(read[name].to(tensor.dtype), tensor), name
    sparse = torch.eye(3).to_sparse()
    assert narrowed({"sparse": sparse, **weights})["sparse"] is sparse


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
