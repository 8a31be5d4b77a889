"""Numpy's values in a checkpoint: numbers and texts become Python's own, and hostile bytes are refused."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from architectures.checkpoints import NumpyType, numpy_number, open_checkpoint
from metadata.errors import UserError


class Scalar:
    """Pickles as a call of numpy's `scalar`."""

    def __init__(self, dtype: Any, data: bytes) -> None:
        self.args = dtype, data

    def __reduce__(self) -> tuple[Any, ...]:
        return np.float64(0).__reduce__()[0], self.args


def refused(number: Scalar, path: Path) -> str:
    model = nn.Linear(2, 2)
    torch.save({"model": model.state_dict(), "metric": number}, path)
    with pytest.raises(UserError) as caught:
        open_checkpoint(path, model)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("number", [Scalar(np.dtype("O"), b"\x41" * 8), Scalar(np.dtype([("pointer", "O")]), b"\x41" * 8),
                                    Scalar(np.dtype("f8"), b"\x41"), Scalar(np.dtype("V8"), b"\x41" * 8)],
                         ids=["object", "structure", "short", "void"])
def test_numpy_values_that_are_no_numbers_are_refused(number: Any, tmp_path: Path) -> None:
    assert "it holds a numpy value of type" in refused(number, tmp_path / "object.pth")


def test_numpy_numbers_are_pythons_own() -> None:
    for value in (np.float64(0.5), np.float32(-2), np.int64(7), np.uint8(200), np.bool_(True), np.complex64(1 + 2j),
                  np.str_("cat"), np.bytes_(b"dog")):
        _, (dtype, data) = value.__reduce__()  # type: ignore[misc]
        kind = NumpyType(*dtype.__reduce__()[1])
        kind.__setstate__(dtype.__reduce__()[2])
        got = numpy_number(kind, data)
        assert got == value.item() and type(got) is type(value.item())


def test_a_hostile_text_of_numpy_is_refused(tmp_path: Path) -> None:
    """numpy's own reading ends in a SystemError here, since the bytes are no character."""
    text = refused(Scalar(np.dtype("U1"), b"\xff" * 4), tmp_path / "text.pth")
    assert "it holds a numpy value of type 'U1' whose bytes are no text" in text


def test_random_bytes_are_a_plain_value_or_refused() -> None:
    draw, taken = random.Random(0), 0
    for _ in range(2000):
        size = draw.choice([0, 1, 2, 3, 4, 8, 16, 32])
        kind = NumpyType(draw.choice("biufcUSVOmMab?") + str(draw.choice([size, size // 4, draw.randint(0, 99)])))
        kind.__setstate__((3, draw.choice("<>|=x")))
        data = draw.choice([draw.randbytes(size), b"a\0\0\0" * (size // 4), b"\0\xd8\0\0" * (size // 4)])
        try:
            value = numpy_number(kind, data)
        except ValueError as error:
            assert "\n" not in str(error)
        else:
            assert type(value) in (bool, int, float, complex, str, bytes)
            if isinstance(value, str):
                assert value.encode().decode() == value
            taken += 1
    assert taken > 100
