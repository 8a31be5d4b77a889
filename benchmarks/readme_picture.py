"""Draw the picture of the README from a recorded run: `python benchmarks/readme_picture.py`.

The run is `benchmarks/results/slim_resnet18_cifar10_static.json`, every bar a row of its ledger. The picture is
`docs/pictures/cifar10_static.png`.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from metadata.formats import write_figure

PROJECT = Path(__file__).parents[1]
RECORD = PROJECT / "benchmarks" / "results" / "slim_resnet18_cifar10_static.json"
PICTURE = PROJECT / "docs" / "pictures" / "cifar10_static.png"
STAGES = {"teacher": "teacher (float, PyTorch)", "distill": "distilled (float, PyTorch)",
          "finetune": "pruned, finetuned (float, PyTorch)", "export": "exported (float, ONNX)",
          "quantize_static": "static int8 (ONNX)"}


def draw(record: Path, picture: Path) -> None:
    """Draw size, latency and validation accuracy of each stage."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    ledger = {row["stage"]: row for row in json.loads(record.read_text())["ledger"] if row["split"] == "validation"}
    rows = [ledger[stage] for stage in STAGES]
    panels = [("size of the file, MB", [row["size_bytes"] / 2**20 for row in rows], "{:.2f}"),
              ("latency, ms (batch 1, one thread)", [row["latency_ms"] for row in rows], "{:.2f}"),
              ("validation accuracy, %", [row["accuracy"] * 100 for row in rows], "{:.2f}")]
    figure, all_axes = plt.subplots(1, 3, figsize=(11, 2.7), sharey=True, layout="constrained")
    for axes, (title, values, form) in zip(all_axes, panels, strict=True):
        bars = axes.barh(list(STAGES.values()), values, color=["#9aa5b1"] * (len(rows) - 1) + ["#1f6f8b"])
        axes.bar_label(bars, [form.format(value) for value in values], padding=3, fontsize=9)
        axes.set_title(title, fontsize=10)
        axes.set_xlim(0, max(values) * 1.2)
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=9)
    all_axes[0].invert_yaxis()
    picture.parent.mkdir(parents=True, exist_ok=True)
    write_figure(picture, figure, dpi=100)


if __name__ == "__main__":
    draw(RECORD, PICTURE)
    print(PICTURE)
