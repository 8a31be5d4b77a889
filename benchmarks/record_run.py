"""Record a finished run: `python benchmarks/record_run.py runs/NAME [REMARK]...` writes benchmarks/results/NAME.json.

The record holds what a reader needs to repeat or check the run: settings, seed, machine, versions, data set, ledger, the
notes of each stage, the result of the evaluator, and the two claims of a compression run (how much smaller and worse).
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from metadata.errors import UserError
from metadata.files import write_json

RESULTS = Path(__file__).parent / "results"


def record(folder: Path, remarks: list[str]) -> dict[str, Any]:
    """What is worth keeping of a run's folder, and what its numbers do not say by themselves.

    Raises:
        UserError: the folder holds no finished run.
    """
    missing = [name for name in ("run.json", "results.json", "card.json") if not (folder / name).is_file()]
    if missing:
        raise UserError(f"{folder}: no finished run, {missing[0]} is missing")
    stages = [json.loads(path.read_text()) for path in sorted(folder.glob("[0-9][0-9]-*/stage.json"))]
    rows = [row for stage in stages for row in stage["rows"]]
    by_stage = {row["stage"]: row for row in rows}
    stage_rows = [stage["rows"][0] for stage in stages]
    int8 = next(index for index, row in enumerate(stage_rows) if row["stage"].startswith("quantize_"))
    results = json.loads((folder / "results.json").read_text())
    run, card = json.loads((folder / "run.json").read_text()), json.loads((folder / "card.json").read_text())
    run["config"]["data"]["root"] = run["config"]["run_dir"] = None  # paths of the recording machine are of no use
    for settings in (settings for entry in run["config"]["stages"] for settings in entry.values()):
        if settings.get("checkpoint"):
            settings["checkpoint"] = Path(settings["checkpoint"]).name
    claims = {
        "teacher_bytes_over_package_bytes": by_stage["teacher"]["size_bytes"] / by_stage["evaluate"]["size_bytes"],
        "int8_minus_float_points": 100 * (stage_rows[int8]["accuracy"] - stage_rows[int8 - 1]["accuracy"]),
        "int8_minus_unpruned_float_points": 100 * (stage_rows[int8]["accuracy"] - by_stage["distill"]["accuracy"]),
        "test_accuracy_percent": results["accuracy"],
        "seconds": sum(row["seconds"] for row in rows),
    }
    data = {key: card[key] for key in ("name", "counts", "input_shape", "fingerprint")}
    return {"claims": claims, "remarks": remarks, "seed": run["config"]["seed"], "machine": run["machine"],
            "versions": run["versions"], "config": run["config"], "data": data, "ledger": rows,
            "notes": {stage["stage"]: stage["notes"] for stage in stages}, "results": results}


def main() -> int:
    """Run the command line."""
    if len(sys.argv) < 2:
        print("usage: python benchmarks/record_run.py runs/NAME [REMARK]...", file=sys.stderr)
        return 2
    folder = Path(sys.argv[1])
    try:
        content = record(folder, sys.argv[2:])
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    RESULTS.mkdir(exist_ok=True)
    write_json(RESULTS / f"{folder.name}.json", content)
    for name, value in content["claims"].items():
        print(f"{name:36}{value:10.3f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
