"""The machine: an accelerator is named where there is one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from metadata.machine import machine


@pytest.mark.skipif(torch.cuda.is_initialized(), reason="torch answers for the GPU in use")
@pytest.mark.parametrize(("kernel", "version"), [
    ("NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.90.07  Fri May 31 09:35:42 UTC 2024", "550.90.07"),
    ("NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.65.06  Release Build", "580.65.06")])
def test_a_gpu_and_its_driver_are_named_without_starting_cuda(kernel: str, version: str, tmp_path: Path) -> None:
    (tmp_path / "gpus" / "0000:01:00.0").mkdir(parents=True)
    (tmp_path / "gpus" / "0000:01:00.0" / "information").write_text("Model: \t\t NVIDIA H100 80GB HBM3\nIRQ: 7\n")
    (tmp_path / "version").write_text(kernel + "\nGCC version: gcc 12.2\n")
    found = machine(tmp_path)
    assert found["accelerators"] == [{"name": "NVIDIA H100 80GB HBM3"}] and found["driver"] == version
    assert found.get("cuda") == torch.version.cuda and not torch.cuda.is_initialized()


def test_nothing_is_said_where_there_is_no_gpu(tmp_path: Path) -> None:
    assert set(machine(tmp_path)) == {"cpu", "flags", "cores"}
