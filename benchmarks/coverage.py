"""Which networks of torchvision and timm the toolkit takes all the way, beside torch-pruning alone.

    python -m benchmarks.coverage [NAME ...] [--limit 600] [--again failed] [--sides ours torch-pruning] [--without_int8]

Write benchmarks/results/coverage.json and coverage.md. Networks that the file has already are left alone, so that the
command can be interrupted; `--again failed` repeats those with a failed check, `--again all` every one. Each network and
side runs in a process of its own with a clock, so that none takes the others down. Weights are random: nothing is loaded.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import multiprocessing
import sys
import time
import warnings
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.zoo_networks import zoo_networks
from metadata.files import write_atomically, write_json
from metadata.machine import machine, versions

RESULTS = Path(__file__).parent / "results" / "coverage.json"
SIDES = ("ours", "torch-pruning")
PACKAGES = ("torchvision", "timm", "torch-pruning", "onnxruntime")  # that decide the record, beside torch
SERVER = multiprocessing.get_context("forkserver")  # imports once what every process needs
SERVER.set_forkserver_preload(["benchmarks.coverage_checks", "torchvision.models", "timm"])
CHECKS = {"describe": "described", "rebuild": "rebuilt", "count": "parameters, MACs", "prune": "pruned at 0.5",
          "onnx": "ONNX", "pruned onnx": "ONNX, pruned", "int8 dynamic": "int8, dynamic", "int8 static": "int8, static"}
WHOLE = ("describe", "rebuild", "count", "prune", "onnx", "pruned onnx")  # what a network must pass to count as covered


def child(name: str, side: str, int8: bool, answer: Connection) -> None:
    """Examine one network by one side, and send the result."""
    import torch

    from benchmarks.coverage_checks import examine, torch_pruning_alone

    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    pixels = zoo_networks()[name]
    answer.send(examine(name, pixels, int8) if side == "ours" else torch_pruning_alone(name, pixels))


def examined(name: str, side: str, limit: float, int8: bool) -> dict[str, Any]:
    """Return one side's row of a network: its checks with seconds, or why there are none."""
    started = time.monotonic()
    here, there = SERVER.Pipe(duplex=False)
    process = SERVER.Process(target=child, args=(name, side, int8, there))
    process.start()
    there.close()
    row: dict[str, Any] = {"checks": {}}
    try:
        if here.poll(limit):
            row["checks"] = here.recv()
        else:
            row["error"] = f"not over after {limit:.0f} s"
    except EOFError:
        process.join(1)
        row["error"] = f"the process died (exit status {process.exitcode})"
    process.kill()
    process.join()
    return row | {"seconds": round(time.monotonic() - started, 1)}


def passed(row: dict[str, Any], checks: tuple[str, ...] = WHOLE) -> bool:
    """Return whether a side's row passes all of the given checks."""
    return all(row.get("checks", {}).get(check, {}).get("passed", False) for check in checks)


def table(record: dict[str, Any]) -> str:
    """Return the record as Markdown: the totals, a row for each network, and the reasons of what failed."""
    networks = {name: record["networks"][name] for name in zoo_networks() if name in record["networks"]}
    lines = ["# Coverage of torchvision's and timm's networks", "",
             "Written by `python -m benchmarks.coverage` with " + ", ".join(
                 f"{package} {version}" for package, version in record["versions"].items()) + ".",
             *record.get("remarks", []), "",
             "| zoo | networks | " + " | ".join(CHECKS.values()) + " | all but int8 | torch-pruning alone |",
             "| --- |" + " ---: |" * (len(CHECKS) + 3)]
    for zoo in ("torchvision", "timm"):
        rows = [row for name, row in networks.items() if name.startswith(zoo + ":")]
        counts = [sum(passed(row.get("ours", {}), (check,)) for row in rows) for check in CHECKS]
        lines.append(f"| {zoo} | {len(rows)} | " + " | ".join(map(str, counts)) + " | "
                     f"{sum(passed(row.get('ours', {})) for row in rows)} | "
                     f"{sum(passed(row.get('torch-pruning', {}), ('prune',)) for row in rows)} |")
    lines += ["", "What a cell says: layers of the table; largest difference of logits, relative to the largest logit; "
              "parameters and multiply-adds; the share of the parameters that is left; int8 layers and products. A dash is "
              "a failed check, with its reason below.", "",
              "| network | pixels | " + " | ".join(CHECKS.values()) + " | seconds | torch-pruning alone | seconds |",
              "| --- |" + " ---: |" * (len(CHECKS) + 4)]
    for name, row in networks.items():
        ours, peer = row.get("ours", {}), row.get("torch-pruning", {})
        cells = [ours["checks"][check]["text"] if passed(ours, (check,)) else "-" for check in CHECKS]
        alone = peer["checks"]["prune"]["text"] if passed(peer, ("prune",)) else "-"
        lines.append(f"| {name} | {row['pixels']} | " + " | ".join(cells) + f" | {ours.get('seconds', '')} | {alone} | "
                     f"{peer.get('seconds', '')} |")
    lines += ["", "## What fails", ""]
    for name, row in networks.items():
        for side, found in ((side, row[side]) for side in SIDES if side in row):
            reasons = [f"{check}: {result['text']}" for check, result in found["checks"].items()
                       if not result["passed"] and not result["text"].startswith("not tried")]
            reasons += [found["error"]] if "error" in found else []
            lines += [f"- {name}, {side}: {reason}" for reason in reasons]
    return "\n".join(lines) + "\n"


def wanted(row: dict[str, Any], side: str, again: str) -> bool:
    """Return whether a side of a network is to be examined."""
    return side not in row or again == "all" or (again == "failed" and not passed(
        row[side], tuple(CHECKS) if side == "ours" else ("prune",)))


def main() -> int:
    """Examine the networks that are asked for, and write the record after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="networks, or beginnings of their names; all unless given")
    parser.add_argument("--limit", type=float, default=600, help="seconds for a side of a network")
    parser.add_argument("--again", choices=("failed", "all", "none"), default="none")
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=SIDES)
    parser.add_argument("--without_int8", action="store_true", help="leave out the two checks that take longest")
    parser.add_argument("--results", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    record: dict[str, Any] = {"schema": 1, "networks": {}}
    if arguments.results.is_file():
        record = json.loads(arguments.results.read_text())
    used = {package: importlib.metadata.version(package) for package in PACKAGES}
    record |= {"machine": machine(), "versions": versions() | used, "threads": 1}
    for name, pixels in zoo_networks().items():
        if arguments.names and not any(name.startswith((start, f"torchvision:{start}", f"timm:{start}"))
                                       for start in arguments.names):
            continue
        row = record["networks"].setdefault(name, {"pixels": pixels})
        for side in arguments.sides:
            if wanted(row, side, arguments.again):
                row[side] = examined(name, side, arguments.limit, not arguments.without_int8)
                failed = [check for check, result in row[side]["checks"].items() if not result["passed"]]
                outcome = row[side].get("error") or ", ".join(failed) or "passed"
                print(f"{name}, {side}: {outcome} ({row[side]['seconds']} s)", flush=True)
                write_json(arguments.results, record)
                write_atomically(arguments.results.with_suffix(".md"), table(record).encode())
    return 0


if __name__ == "__main__":
    sys.exit(main())
