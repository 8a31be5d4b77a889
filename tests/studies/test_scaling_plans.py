"""Plans of scaling studies: the points that they stand for, and what is wrong with a bad one."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from compress.studies.scaling.plans import PLANS, SweepPlan, Point, read_plan
from tests.helpers.commands import Compress, PROJECT, assert_one_line_error
from tests.helpers.sweeps import SMALL, write_plan


def points(plan: dict[str, Any]) -> list[Point]:
    return SweepPlan.model_validate(plan).points(lambda width, depth: 1000 * width * depth)


def test_each_kind_of_sweep_has_its_points() -> None:
    def shapes(**part: Any) -> list[tuple[int, int, int]]:
        return [(point.width, point.depth, point.dataset_size) for point in points({"sweeps": [part]})]

    assert shapes(kind="width", widths=[4, 8], dataset_size=500) == [(4, 2, 500), (8, 2, 500)]
    assert shapes(kind="depth", depths=[1, 3], width=5, dataset_size=500) == [(5, 1, 500), (5, 3, 500)]
    assert shapes(kind="data", dataset_sizes=[10, 20], width=5, depth=1) == [(5, 1, 10), (5, 1, 20)]
    joint = shapes(kind="joint", widths=[4, 8], depths=[1, 2], dataset_sizes=[10, 20])
    assert len(joint) == 8 == len(set(joint))


def test_common_keys_and_a_sweeps_own_and_each_point_once() -> None:
    found = points({"seeds": [0, 1, 2], "num_epochs": {1: 50, 1000: 7}, "test_freq": 9, "sweeps": [
        {"kind": "data", "dataset_sizes": [999, 1000, 5000], "width": 4},
        {"kind": "width", "widths": [4, 6], "dataset_size": 5000, "seeds": [2, 3], "batch_size": 32, "num_epochs": 2},
        {"kind": "width", "widths": [4, 6], "dataset_size": 5000, "seeds": [0, 1]}]})
    by_size = {point.dataset_size: point.num_epochs for point in found[:9]}
    assert by_size == {999: 50, 1000: 7, 5000: 7} and {point.test_freq for point in found} == {9}
    assert len(found) == 9 + 4 + 2 == len({point.id for point in found})  # width 4 on 5,000 images with seeds 0 and 1: once
    assert [(point.seed, point.batch_size, point.num_epochs) for point in found[9:11]] == [(2, 32, 2), (3, 32, 2)]


def test_a_plan_of_one_sweep_needs_no_list(tmp_path: Path) -> None:
    path = tmp_path / "plan.yaml"
    path.write_text("dataset: digits\nseeds: [0, 1]\nkind: width\nwidths: [4, 8]\ndataset_size: 500\n")
    found = read_plan(str(path)).points(lambda width, depth: 1)
    assert [(point.width, point.seed) for point in found] == [(4, 0), (4, 1), (8, 0), (8, 1)]


def test_constant_compute_takes_the_epochs_that_hold_it() -> None:
    found = points({"sweeps": [{"kind": "constant_compute", "compute": 1e9, "tolerance": 0.03, "widths": [1, 2, 4],
                                "depths": [1], "dataset_sizes": [1000, 7000]}]})
    assert {(point.width, point.dataset_size): point.num_epochs for point in found} == {
        (1, 1000): 1000, (1, 7000): 143, (2, 1000): 500, (2, 7000): 71, (4, 1000): 250, (4, 7000): 36}
    for point in found:
        assert abs(1000 * point.width * point.dataset_size * point.num_epochs / 1e9 - 1) <= 0.03


@pytest.mark.parametrize(("plan", "said"), [
    ("sweeps: [{kind: width, widht: [4], dataset_size: 10}]", "unknown key 'sweeps.0.width.widht'; did you mean 'widths'"),
    ("dataste: digits\nsweeps: [{kind: width, widths: [4], dataset_size: 10}]", "'dataste'; did you mean 'dataset'"),
    ("sweeps: [{kind: witdh, widths: [4], dataset_size: 10}]", "unknown kind 'witdh'; did you mean 'width'"),
    ("sweeps: [{widths: [4], dataset_size: 10}]", "sweeps.0: kind is missing"),
    ("sweeps: []", "sweeps: List should have at least 1 item"), ("seeds: [0]", "sweeps: Field required"),
    ("sweeps: [{kind: width, widths: [4, 0], dataset_size: 10}]", "greater than or equal to 1, got 0"),
    ("sweeps: [{kind: width, widths: [], dataset_size: 10}]", "at least 1 item"),
    ("sweeps: [{kind: width, widths: [4], dataset_size: -5}]", "greater than or equal to 1, got -5"),
    ("num_epochs: 0\nsweeps: [{kind: width, widths: [4], dataset_size: 10}]", "num_epochs: expected a"),
    ("num_epochs: {500: 3}\nsweeps: [{kind: width, widths: [4], dataset_size: 10}]",
     "num_epochs says nothing for dataset_size 10, only from 500 on"),
    ("sweeps: [{kind: width, widths: [4], dataset_size: 1439}]", "digits has 1,438 training images"),
    ("sweeps: [{kind: constant_compute, compute: 3.0e+6, widths: [4], depths: [1], dataset_sizes: [1000]}]",
     "epochs brings width 4, depth 1 (N 1,774) on 1,000 images within 5% of 3e+06: 2 epochs are 3.55e+06"),
    ("sweeps: [{kind: constant_compute, compute: 3, widths: [4], dataset_sizes: [1000]}]", "no whole number of epochs"),
    ("sweeps: [", "not valid YAML"), ("- 1", "expected a mapping"), ("seeds: [0]\nseeds: [1]", "is given twice"),
], ids=str)
def test_bad_plans_get_one_line(compress: Compress, tmp_path: Path, plan: str, said: str) -> None:
    path = tmp_path / "plan.yaml"
    path.write_text(plan if "dataste" in plan or plan.startswith("-") else f"dataset: digits\n{plan}")
    for verb in ("sweep", "plan"):
        assert_one_line_error(compress("scaling", verb, path, "--base_dir", tmp_path / "out"), said)
    assert not list(tmp_path.glob("out/results/*.csv"))


def test_bad_flags_get_one_line(compress: Compress, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_plan(tmp_path / "plan.yaml", SMALL, base_dir=str(tmp_path / "out"))
    assert_one_line_error(compress("scaling", "sweep", path, "--workers", "0"), "--workers 0: expected 1 or more")
    assert_one_line_error(compress("scaling", "plan", path, "--workers", "-1"), "--workers -1: expected 1 or more")
    assert_one_line_error(compress("scaling", "sweep", path, "--workers", "2", "--ray", "local"), "one of them")
    assert_one_line_error(compress("scaling", "sweep", tmp_path / "nothing.yaml"), "there is no such file")
    assert_one_line_error(compress("scaling", "sweep", "cifar"), "did you mean 'cifar10'")
    assert_one_line_error(compress("scaling", "sweep", path, "--base_dir", path), "cannot be made (Not a directory)")
    assert_one_line_error(compress("scaling", "sweep", path, "--device", "gpu"), "expected auto, cpu or cuda")
    monkeypatch.setitem(sys.modules, "ray", None)  # as if it were not installed
    assert_one_line_error(compress("scaling", "sweep", path, "--ray", "local"), "the package ray is not installed")
    (tmp_path / "out" / "results" / "final_data.csv").write_text("N,D,loss\n1,2,3\n")
    assert_one_line_error(compress("scaling", "sweep", path), "columns id and status, id is missing")


def test_help_imports_no_torch() -> None:
    for verb in ("", "run", "sweep", "plan"):
        done = subprocess.run([sys.executable, "-X", "importtime", "-m", "compress", "scaling", *verb.split(), "--help"],
                              cwd=PROJECT, capture_output=True, text=True, check=False)
        assert done.returncode == 0 and "Usage:" in done.stdout
        assert not {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()} & {"torch", "yaml", "rich.table"}


def test_packaged_plans_are_plans() -> None:
    names = [path.stem for path in PLANS.glob("*.yaml")]
    assert "cifar10" in names
    for name in names:
        assert read_plan(name).points(lambda width, depth: 1000 * width * depth)
