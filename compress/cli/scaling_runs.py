"""Verbs that run the experiments of a scaling study: `scaling run`, `scaling sweep`, `scaling plan`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from compress.studies.scaling.plans import SweepPlan

PlanName = Annotated[str, typer.Argument(metavar="PLAN", help="name of a packaged plan, or path of a .yaml file")]
DataRoot = Annotated[Path | None, typer.Option("--data_root", help="folder that holds the data set's files")]
Device = Annotated[str | None, typer.Option("--device", help="auto, cpu or cuda")]
BaseDir = Annotated[Path | None, typer.Option("--base_dir", help="folder of the study, results go to results/ in it; "
                                                                 "default: the plan's")]
Workers = Annotated[int | None, typer.Option("--workers", help="processes that share the cores; default: one per core")]


def run(seed: Annotated[int, typer.Option("--seed", help="seed of subset, weights, order and augmentation")] = 0,
        batch_size: Annotated[int, typer.Option("--batch_size", help="images per step")] = 256,
        num_epochs: Annotated[int, typer.Option("--num_epochs", help="passes over the subset")] = 100,
        test_freq: Annotated[int, typer.Option("--test_freq", help="epochs between two looks at the test split")] = 5,
        width: Annotated[int, typer.Option("--width", help="channels of the first of three stages")] = 32,
        depth: Annotated[int, typer.Option("--depth", help="convolution blocks per stage")] = 2,
        dataset_size: Annotated[int, typer.Option("--dataset_size", help="number of training images")] = 50_000,
        dataset: Annotated[str, typer.Option("--dataset", help="name of a data set, see loaders/")] = "cifar10",
        data_root: DataRoot = None,
        base_dir: Annotated[Path, typer.Option("--base_dir", help="folder of the study, results go to results/ in it")
                            ] = Path("."),
        device: Annotated[str, typer.Option("--device", help="auto, cpu or cuda")] = "auto",
        threads: Annotated[int, typer.Option("--threads", min=0, help="CPU threads; 0: all")] = 0,
        checkpoint_seconds: Annotated[float, typer.Option("--checkpoint_seconds", min=0,
                                                          help="seconds between two checkpoints")] = 20,
        download: Annotated[bool, typer.Option("--download", help="let torchvision download the data set")] = False,
        ) -> None:
    """Run one experiment. The same command continues an interrupted one.

    An experiment that diverges keeps its row, marked as diverged, and the command exits with 1.
    """
    from compress.training.trackers import terminal
    from compress.studies.scaling.experiment import run_experiment
    from metadata.errors import VerificationError

    console = terminal()
    row = run_experiment(seed, batch_size, num_epochs, test_freq, width, depth, dataset_size, dataset=dataset,
                         data_root=data_root, base_dir=base_dir, device=device,
                         threads=threads, download=download, checkpoint_seconds=checkpoint_seconds, console=console)
    if row["status"] == "done":
        console.print(f"test loss {float(row['final_test_loss_avg_last5']):.4f}, accuracy "
                      f"{float(row['final_test_acc_avg_last5']):.2%} (last five measured epochs)", highlight=False)
    console.print(f"row:    {base_dir / 'results' / 'final_data.csv'}\n"
                  f"curve:  {base_dir / 'results' / 'runs' / (str(row['id']) + '.csv')}", highlight=False, soft_wrap=True)
    if row["status"] == "diverged":
        raise VerificationError(f"{row['id']} diverged: {row['message']}; its row is kept with that mark and left out of "
                                "fits, and the same command would come to the same")


def sweep(plan: PlanName, workers: Workers = None,
          ray: Annotated[str | None, typer.Option("--ray", help="address of a Ray cluster, or local; instead of processes")
                         ] = None,
          base_dir: BaseDir = None, data_root: DataRoot = None, device: Device = None) -> None:
    """Run all points of a plan that are not done. Continue interrupted points and retry failed ones.

    Exit with 1 if a point failed. A point that diverged counts as finished: its row is kept and marked.
    """
    from compress.training.trackers import terminal
    from compress.studies.scaling.sweep import run_sweep

    try:
        rows = run_sweep(_read(plan, base_dir, data_root, device), terminal(), workers, ray)
    except KeyboardInterrupt as error:
        typer.echo("interrupted; the same command continues", err=True)
        raise typer.Exit(130) from error
    if any(row["status"] == "failed" for row in rows):
        raise typer.Exit(1)


def plan(plan: PlanName, workers: Workers = None, base_dir: BaseDir = None, data_root: DataRoot = None,
         device: Device = None) -> None:
    """Print a plan's points and the time left. Mark what is done; estimate the rest from a short calibration."""
    from compress.training.trackers import terminal
    from compress.studies.scaling.estimate import estimate

    estimate(_read(plan, base_dir, data_root, device), terminal(), workers)


def _read(name: str, base_dir: Path | None, data_root: Path | None, device: str | None) -> SweepPlan:
    """Read a plan and apply what the flags change."""
    from compress.studies.scaling.plans import read_plan

    return read_plan(name).changed(base_dir=base_dir, data_root=data_root, device=device)
