"""Record a finished MNIST challenge, and the weights of our two models with seed 0, whatever their accuracy.

    python -m benchmarks.record_mnist_challenge RUNS --data_root DIR

Copy the comparison and the epochs of each run from RUNS (a --log_dir of `compress mnist_challenge`) to
benchmarks/results/mnist_challenge/, and the weights and architectures to compress/studies/mnist_weights/.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

from architectures.describe import describe
from architectures.weights import read_weights
from architectures.zoo import make
from compress.evaluation.measure import measure_accuracy
from compress.studies.mnist_verification import WEIGHTS
from compress.training.assessment import learned_parameters
from loaders.catalog import load
from loaders.request import Request
from metadata.files import write_json
from metadata.formats import write_tensors

RESULTS = Path(__file__).parent / "results" / "mnist_challenge"
OURS = ("mnist_under_8k", "mnist_under_4k")


def main() -> None:
    """Copy the files; see the top of the file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", type=Path)
    parser.add_argument("--data_root", type=Path, required=True)
    arguments = parser.parse_args()
    RESULTS.mkdir(parents=True, exist_ok=True)
    for name in ("comparison.json", "comparison.md", "comparison.png"):
        shutil.copy(arguments.runs / name, RESULTS)
    for path in sorted(arguments.runs.glob("*/seed*/epochs.csv")):
        shutil.copy(path, RESULTS / f"{path.parts[-3]}-{path.parts[-2]}.csv")
    splits = load(Request(name="mnist", root=arguments.data_root))
    test = splits.open_test()
    WEIGHTS.mkdir(exist_ok=True)
    records = {}
    for name in OURS:
        model = make(name, num_classes=10).eval()
        model.load_state_dict(read_weights(arguments.runs / name / "seed0" / "weights.pth"))
        write_tensors(WEIGHTS / f"{name}.pth", model.state_dict())
        write_json(WEIGHTS / f"{name}.json", describe(model, (1, 28, 28)).to_json())
        found = measure_accuracy(model, test.batches(250), splits.card.preprocessing, len(test))
        records[name] = {"parameters": learned_parameters(model), "seed": 0,
                         "correct": found.correct, "images": found.total}
    write_json(WEIGHTS / "weights.json", {"schema": 1, "models": records})
    print(json.dumps(records, indent=2))


if __name__ == "__main__":
    main()
