"""No network trains in a memory format that its CPU's kernels cannot handle: a grid of convolutions in child processes."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from compress.training.memory_format import avx512_kernels, chosen_memory_format, unsafe_channels_last
from tests.helpers.commands import PROJECT
from tests.helpers.trainings import fit, settings

CAPS: list[dict[str, str]] = [{}, {"ATEN_CPU_CAPABILITY": "default"}, {"ATEN_CPU_CAPABILITY": "avx2"},
                              {"ONEDNN_MAX_CPU_ISA": "SSE41"}, {"ONEDNN_MAX_CPU_ISA": "AVX2"}]
CPU = torch.device("cpu")


def narrow() -> nn.Sequential:
    """Return a network with a 1x1 convolution of stride 2 over 4 channels."""
    return nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 8, 1, stride=2),
                         nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))


def grid(compiled: bool) -> list[dict[str, Any]]:
    """Return the convolutions to train; a few if they are compiled, which takes seconds each."""
    keys = ("in", "out", "kernel", "stride", "groups", "batch", "size", "compiled")
    if compiled:
        return [dict(zip(keys, (width, 8, 1, 2, 1, 4, 16, True), strict=True)) for width in (3, 4, 7, 8)]
    found = []
    for width, out, kernel, stride, groups, (batch, size) in itertools.product(
            range(1, 17), (4, 8, 20), (1, 3), (1, 2, 3), (1, 2, 0), ((32, 8), (3, 9), (2, 18))):
        split, produced = (groups, out) if groups else (width, width)  # 0: depthwise
        if not (width % split or produced % split):
            found.append(dict(zip(keys, (width, produced, kernel, stride, split, batch, size, False), strict=True)))
    return [case for index, case in enumerate(found) if case not in found[:index]]


def guards(folder: Path) -> dict[str, str]:
    """Return the environment that puts guards around blocks of memory, empty where they cannot be built."""
    compiler = shutil.which("cc")
    if compiler is None or sys.platform != "linux":
        return {}
    library = folder / "guard.so"
    subprocess.run([compiler, "-O2", "-fno-builtin", "-shared", "-fPIC", "-o", str(library),
                    str(PROJECT / "tests" / "helpers" / "guard.c")], check=True)
    return {"LD_PRELOAD": str(library)}


def watched(cases: list[dict[str, Any]], threads: int, environment: dict[str, str]) -> tuple[list[str], list[str]]:
    """Train all; return what damaged memory, crashed or was wrong: what the rule lets train, and what it refuses."""
    allowed: list[str] = []
    refused: list[str] = []
    start = 0
    while start < len(cases):
        guarded = "LD_PRELOAD" in environment
        done = subprocess.run([sys.executable, "-m", "tests.helpers.convolutions", str(threads), *["guarded"] * guarded],
                              input=json.dumps(cases[start:]), env={**os.environ, **environment}, cwd=PROJECT,
                              capture_output=True, text=True, timeout=900, check=False)
        place, controlled = [-1, "start", False], not guarded
        for line in map(json.loads, done.stdout.splitlines()):
            if "at" in line:
                place = line["at"]
            elif place[1] == "control":
                controlled = line["past"] == 4
            elif "past" in line or not line["error"] < 1e-3:
                (refused if place[2] else allowed).append(f"{cases[start + place[0]]} {place[1]}: {line}")
        assert controlled, f"the guards do not work: {done.stdout[:200]} {done.stderr[-1000:]}"
        if done.returncode == 0:
            break
        assert place[0] >= 0, done.stderr[-1000:]
        (refused if place[2] else allowed).append(
            f"{cases[start + place[0]]} {place[1]}: exit code {done.returncode} {done.stderr[-200:]}")
        start += place[0] + 1
    return allowed, refused


@pytest.mark.slow
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("cap", CAPS, ids=lambda cap: "-".join(*cap.items()) if cap else "native")
def test_what_may_train_channels_last_neither_crashes_nor_damages_memory(cap: dict[str, str], threads: int,
                                                                         tmp_path: Path) -> None:
    allowed, refused = watched(grid(False), threads, {**cap, **guards(tmp_path)})
    print(f"{cap or 'native'}, {threads} threads: {len(refused)} refused configurations are at fault", *refused, sep="\n")
    assert not allowed, "\n".join(allowed)


@pytest.mark.slow
@pytest.mark.parametrize("cap", CAPS[::4], ids=["native", "oneDNN AVX2"])
def test_what_is_compiled_obeys_the_same_rule(cap: dict[str, str], tmp_path: Path) -> None:
    cache = {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    allowed, _ = watched(grid(True), 1, {**cap, **cache, **guards(tmp_path)})
    assert not allowed, "\n".join(allowed)


@pytest.mark.parametrize("cap", ["SSE41", "AVX2", "avx2_vnni_2", "AVX", "unknown"])
@pytest.mark.parametrize("name", ["ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA"])
def test_a_cap_on_onednns_kernels_counts_whatever_the_cpu_can_do(name: str, cap: str,
                                                                 monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, cap)
    assert not avx512_kernels() and "layer 3:" in unsafe_channels_last(narrow(), CPU)
    lines: list[str] = []
    assert chosen_memory_format(narrow(), True, CPU, lines.append) == torch.contiguous_format
    assert len(lines) == 1 and "layer 3" in lines[0]


@pytest.mark.parametrize("cap", ["", "ALL", "AVX512_CORE_VNNI", "avx512_core", "AVX10_1_512"])
def test_a_cap_that_leaves_avx512_leaves_the_cpus_own_answer(cap: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DNNL_MAX_CPU_ISA", raising=False)
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", cap)
    assert avx512_kernels() == ("AVX512" in torch.backends.cpu.get_cpu_capability())


def test_weights_that_an_earlier_training_left_channels_last_are_put_back(tmp_path: Path,
                                                                          monkeypatch: pytest.MonkeyPatch) -> None:
    """Such weights would turn the images channels last inside the network."""
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    seen: list[bool] = []
    model = narrow().to(memory_format=torch.channels_last)
    model[3].register_forward_pre_hook(lambda layer, inputs: seen.append(inputs[0].is_contiguous()))
    fit(tmp_path / "run" / "checkpoint.pth", settings(epochs=1), model)
    assert seen and all(seen) and model[0].weight.is_contiguous()  # type: ignore[union-attr, operator]
