"""The cost of a recorded scaling study, how the cost grows, and the cost of a study of a thousand points.

    python -m benchmarks.scaling_cost benchmarks/results/scaling_cifar10/final_data.csv

From the recorded seconds, compute the images a second of one worker (one core) for each width; a test image counts
as a third of a training image (forward pass only). The thousand points are 10 widths x 10 subset sizes x 10 seeds with the
epochs of the recorded study. Their time on CPU cores follows from the recorded rates; networks wider than the recorded ones
take the FLOP rate of the widest. Nothing was measured on GPUs: the time there follows from an assumed step time and rate,
which the output names.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path

from compress.studies.scaling.experiment import flops_an_image
from compress.studies.scaling.plans import JointSweep, read_plan
from metadata.formats import read_csv

WIDTHS = (4, 6, 8, 12, 16, 24, 32, 48, 64, 128)
SIZES = (1000, 1500, 2500, 4000, 6000, 10_000, 15_000, 25_000, 35_000, 50_000)
SEEDS = 10
LOOKS, TEST_IMAGES = 25, 10_000
NETWORK = 1, (3, 32, 32), 10  # depth, images, classes
GPU_STEP_MS, GPU_FLOPS = 2.0, 20e12  # assumed: some hundred kernel launches a step; a rate far below the peak of GPUs


def equivalent_images(size: int, epochs: int) -> float:
    """Return the training images of a point, including its measurements of the test split."""
    return size * epochs + LOOKS * TEST_IMAGES / 3


def main() -> None:
    """Print the two tables in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="final_data.csv")
    rows = [row for row in read_csv(parser.parse_args().data) if row["status"] == "done" and row["seconds"]]
    rates: dict[int, float] = {}
    flops_of = {width: flops_an_image(width, *NETWORK) for width in {*WIDTHS, *(int(row["width"]) for row in rows)}}
    print("| width | points | images/s a core | GFLOP/s a core |\n| ---: | ---: | ---: | ---: |")
    for width in sorted({int(row["width"]) for row in rows}):
        own = [row for row in rows if int(row["width"]) == width]
        rates[width] = statistics.median(equivalent_images(int(row["D"]), int(row["epochs"])) / float(row["seconds"])
                                         for row in own)
        print(f"| {width} | {len(own)} | {rates[width]:,.0f} | {rates[width] * flops_of[width] / 1e9:.1f} |")
    hours = sum(float(row["seconds"]) for row in rows) / 3600
    done = sum(float(row["total_flops"]) for row in rows)
    print(f"\nThe study: {len(rows)} points, {done:.2e} FLOPs, {hours:.1f} core hours.\n")
    widest = max(rates)
    plan = read_plan("cifar10")  # for its epochs and batch size
    sweep = JointSweep(kind="joint", widths=list(WIDTHS), depths=[NETWORK[0]], dataset_sizes=list(SIZES), seeds=[0])
    core_seconds = flops = steps = 0.0
    for point in plan.changed(sweeps=[sweep]).points(lambda width, depth: 0):
        width, images = point.width, equivalent_images(point.dataset_size, point.num_epochs)
        nearest = min(rates, key=lambda known: abs(known - width))
        rate = (rates[nearest] if width <= widest else rates[widest] * flops_of[widest] / flops_of[width])
        core_seconds += SEEDS * images / rate
        flops += SEEDS * images * flops_of[width]
        steps += SEEDS * point.num_epochs * -(-point.dataset_size // point.batch_size)
    gpu = steps * GPU_STEP_MS / 1000 + flops / GPU_FLOPS
    hours = core_seconds / 3600
    print(f"A thousand points: {flops:.2e} FLOPs in {steps:.2e} steps. One core: {hours:,.0f} h; a Ray cluster of eight "
          f"machines with 16 cores, a point a core: {hours / 128:.1f} h. One GPU, a point at a time, at an assumed "
          f"{GPU_STEP_MS:g} ms a step and {GPU_FLOPS / 1e12:g} TFLOP/s: {gpu / 3600:.1f} h; a Ray cluster of eight: "
          f"{gpu / 3600 / 8:.1f} h.")


if __name__ == "__main__":
    main()
