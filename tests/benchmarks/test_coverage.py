"""The coverage benchmark: its list of networks, its table, and the clock of a network's process."""

from __future__ import annotations

import pytest
import timm
import torch

from benchmarks.coverage import CHECKS, SIDES, examined, passed, table, wanted
from benchmarks.coverage_checks import CHECKS as RUN
from benchmarks.zoo_networks import LARGEST, made, timm_networks, torchvision_networks

GOOD = {"checks": {check: {"passed": True, "text": f"<{check}>", "seconds": 1.0} for check in CHECKS}, "seconds": 9.5}


def test_the_list_is_a_hundred_of_timm_and_all_smaller_ones_of_torchvision() -> None:
    names = timm_networks()
    assert len(names) == 100 and {name.removeprefix("timm:") for name in names} <= set(timm.list_models())
    assert {"timm:resnest14d", "timm:resnest26d"} <= set(names)
    ours = torchvision_networks()
    assert len(ours) >= 68 and "torchvision:efficientnet_b0" in ours and "torchvision:vit_l_16" not in ours
    assert sum(tensor.numel() for tensor in made("torchvision:squeezenet1_1").parameters()) < LARGEST


def test_no_branch_of_a_made_network_is_dead() -> None:
    state = made("timm:convnext_atto").state_dict()
    assert all(float(tensor.abs().mean()) > 1e-3 for name, tensor in state.items() if name.endswith("gamma"))
    again = made("timm:convnext_atto").state_dict()
    assert all(torch.equal(tensor, again[name]) for name, tensor in state.items())


def test_the_table_counts_and_names_what_fails() -> None:
    failing = {"checks": GOOD["checks"] | {
        "prune": {"passed": False, "text": "no channels", "seconds": 0.1},
        "pruned onnx": {"passed": False, "text": "not tried: no 'pruned'", "seconds": 0.0}}, "seconds": 3.0}
    late = {"checks": {}, "error": "not over after 600 s", "seconds": 600}
    record = {"versions": {"torch": "2.14.1"}, "networks": {
        "torchvision:alexnet": {"pixels": 96, "ours": GOOD, "torch-pruning": late},
        "timm:resnest14d": {"pixels": 64, "ours": failing}}}
    assert list(RUN) == list(CHECKS) and len(SIDES) == 2
    text = table(record)
    assert "| torchvision | 1 | 1 | 1 | 1 | 1 | 1 | 1 | 1 | 1 | 1 | 0 |\n" in text
    assert "| timm | 1 | 1 | 1 | 1 | 0 | 1 | 0 | 1 | 1 | 0 | 0 |\n" in text
    assert "| torchvision:alexnet | 96 | <describe> | <rebuild> |" in text and "| 9.5 | - | 600 |\n" in text
    assert text.endswith("## What fails\n\n- torchvision:alexnet, torch-pruning: not over after 600 s\n"
                         "- timm:resnest14d, ours: prune: no channels\n")
    assert passed(GOOD) and not passed(failing) and not passed(late)
    assert [wanted({"ours": row}, "ours", again) for row in (GOOD, failing) for again in ("none", "failed", "all")] == [
        False, False, True, False, True, True]


@pytest.mark.slow
def test_a_network_has_a_process_and_a_clock_of_its_own() -> None:
    row = examined("torchvision:squeezenet1_1", "ours", 300, int8=True)
    assert passed(row, tuple(CHECKS)), row
    assert passed(examined("torchvision:squeezenet1_1", "torch-pruning", 300, int8=False), ("prune",))
    assert examined("torchvision:squeezenet1_1", "ours", 0.01, int8=False)["error"] == "not over after 0 s"
