"""The command line of scaling studies: `python -m compress scaling VERB`. Imports torch only inside the verbs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

scaling = typer.Typer(no_args_is_help=True, rich_markup_mode=None,
                      help="How test loss scales with parameters, data and compute: experiments, sweeps and fits.")

PlanName = Annotated[str, typer.Argument(metavar="PLAN.yaml", help="a plan's file, or the name of a packaged one")]
DataRoot = Annotated[Path | None, typer.Option("--data_root", help="where the data set's files are")]
Device = Annotated[str | None, typer.Option("--device", help="auto, cpu or cuda")]
BaseDir = Annotated[Path | None, typer.Option("--base_dir", help="results go to results/ below it; else the plan's")]
Workers = Annotated[int | None, typer.Option("--workers", help="processes that share the cores; one a core if not given")]


@scaling.command()
def run(seed: Annotated[int, typer.Option("--seed", help="of subset, weights, order and augmentation")] = 0,
        batch_size: Annotated[int, typer.Option("--batch_size", help="images a step")] = 256,
        num_epochs: Annotated[int, typer.Option("--num_epochs", help="passes over the subset")] = 100,
        test_freq: Annotated[int, typer.Option("--test_freq", help="epochs between looks at the test split")] = 5,
        width: Annotated[int, typer.Option("--width", help="channels of the first of three stages")] = 32,
        depth: Annotated[int, typer.Option("--depth", help="convolution blocks a stage")] = 2,
        dataset_size: Annotated[int, typer.Option("--dataset_size", help="training images")] = 50_000,
        dataset: Annotated[str, typer.Option("--dataset", help="see loaders/")] = "cifar10",
        data_root: DataRoot = None,
        base_dir: Annotated[Path, typer.Option("--base_dir", help="results go to results/ below it")] = Path("."),
        device: Annotated[str, typer.Option("--device", help="auto, cpu or cuda")] = "auto",
        threads: Annotated[int, typer.Option("--threads", min=0, help="CPU threads; 0: all")] = 0,
        checkpoint_seconds: Annotated[float, typer.Option("--checkpoint_seconds", min=0, help="of two checkpoints")] = 20,
        download: Annotated[bool, typer.Option("--download", help="let torchvision fetch the set")] = False) -> None:
    """Run one experiment; the same command continues an interrupted one. One that diverges is kept, and exits 1."""
    from compress.pipeline import report
    from compress.studies.scaling.experiment import run_experiment
    from metadata.errors import VerificationError

    console = report.terminal()
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


@scaling.command()
def sweep(plan: PlanName, workers: Workers = None,
          ray: Annotated[str | None, typer.Option("--ray", help="a Ray cluster's address, or local, instead")] = None,
          base_dir: BaseDir = None, data_root: DataRoot = None, device: Device = None) -> None:
    """Run all points of a plan that are not done; interrupted ones continue, failed ones are tried again.

    Exit 1 if a point failed. One that diverged has come to an end: it is kept and marked, and exits 0.
    """
    from compress.pipeline import report
    from compress.studies.scaling import sweeps

    try:
        rows = sweeps.run_sweep(_plan(plan, base_dir, data_root, device), report.terminal(), workers, ray)
    except KeyboardInterrupt as error:
        typer.echo("interrupted; the same command continues", err=True)
        raise typer.Exit(130) from error
    if any(row["status"] == "failed" for row in rows):
        raise typer.Exit(1)


@scaling.command(name="plan")
def show_plan(plan: PlanName, workers: Workers = None, base_dir: BaseDir = None, data_root: DataRoot = None,
              device: Device = None) -> None:
    """Print a plan's points, what is done, and the time that the rest will take, from a short calibration."""
    from compress.pipeline import report
    from compress.studies.scaling import estimates

    estimates.estimate(_plan(plan, base_dir, data_root, device), report.terminal(), workers)


def _plan(name: str, base_dir: Path | None, data_root: Path | None, device: str | None) -> Any:
    from compress.studies.scaling.plans import read_plan

    return read_plan(name).changed(base_dir=base_dir, data_root=data_root, device=device)
