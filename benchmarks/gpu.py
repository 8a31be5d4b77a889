"""Fifteen minutes of a GPU: the project's full-size jobs in order of worth, several at once, until the time is over.

    python -m benchmarks.gpu --data DIR --minutes 12 --out OUT [--dry_run] [--only NAME,...] [--scale 0.01] [--device cpu]

DIR holds data sets, as folders or as archives in parts (`benchmarks/gpu_sets.py`), and checkpoints (TEACHER and ZOO_WEIGHTS
of `benchmarks/gpu_jobs.py`). Nothing is downloaded. OUT gets a record NAME.json as soon as the job NAME ends, the files of
the jobs in runs/, their output in logs/, and summary.json. The same command continues: it skips what is recorded and
resumes what was stopped. The exit code is 0, or 1 if a job failed.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, NoReturn

import torch

from benchmarks.gpu_card import Ended, Job, Limits, Sitting, finite, plan, read_record
from benchmarks.gpu_jobs import TEACHER, ZOO_WEIGHTS, Place, all_jobs
from benchmarks.gpu_sets import SETS, find, parts_of, unpacked, write_joined
from metadata.closest import closest
from metadata.errors import UserError, first_line
from metadata.files import write_json
from metadata.locks import locked, remove_leftovers
from metadata.machine import machine, usable_cores, versions

SETTINGS = "settings.json"  # of the records in OUT: the scale and the device
UNPACK_MINUTES = 0.5  # of an archive of 60,000 small files: assumed


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        """Raise UserError instead of printing the usage."""
        raise UserError(message)


def parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Return the flags.

    Raises:
        UserError: a flag is missing, unknown, or has a value out of range.
    """
    parser = Parser(prog="python -m benchmarks.gpu", description=__doc__,
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, metavar="DIR", help="folder of data sets and checkpoints")
    parser.add_argument("--minutes", type=float, default=12.0, help="wall clock in all, unpacking included (default: 12)")
    parser.add_argument("--out", type=Path, required=True, metavar="OUT", help="folder of the records")
    parser.add_argument("--only", default="", metavar="NAME,...", help="jobs to run; a name may hold *, such as smoke_*")
    parser.add_argument("--scale", type=float, default=1.0, help="share of each job's epochs, for trials (default: 1)")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto",
                        help="auto: CUDA, where there is a device")
    parser.add_argument("--parallel", type=int, default=min(16, usable_cores()),
                        help="processes at once (default: 16, or the number of cores)")
    parser.add_argument("--dry_run", action="store_true", help="print the plan with estimated minutes, and write nothing")
    flags = parser.parse_args(arguments)
    if not (math.isfinite(flags.minutes) and 0 < flags.minutes <= 24 * 60):
        raise UserError(f"--minutes {flags.minutes:g}: expected a number above 0, up to 1440")
    if not 0 < flags.scale <= 1:
        raise UserError(f"--scale {flags.scale:g}: expected a share of the epochs, above 0 and up to 1")
    if flags.parallel < 1:
        raise UserError(f"--parallel {flags.parallel}: expected 1 or more processes")
    if not flags.data.is_dir():
        raise UserError(f"--data {flags.data}: there is no such folder; expected one that holds {' or '.join(SETS)}, as a "
                        "folder or as a .tar in parts")
    return flags


def chosen_device(flags: argparse.Namespace) -> str:
    """Return cuda or cpu; a plan of the full size is one for CUDA unless the CPU was asked for.

    Raises:
        UserError: no CUDA device for jobs of full size, unless the CPU was asked for.
    """
    if flags.device == "cpu" or torch.cuda.is_available():
        return "cpu" if flags.device == "cpu" else "cuda"
    if flags.dry_run and (flags.device == "cuda" or flags.scale == 1):
        return "cuda"
    if flags.device == "cuda" or flags.scale == 1:
        raise UserError("torch sees no CUDA device, which jobs of full size are for; try --scale 0.01 on this CPU, or ask "
                        "for the full size with --device cpu")
    return "cpu"


def opened(flags: argparse.Namespace, device: str, unpack: bool) -> tuple[Place, list[str]]:
    """Return the place of the jobs, and the names of the sets that are still packed.

    With `unpack`, archives are unpacked and checkpoints joined below OUT; without it, nothing is written.

    Raises:
        UserError: no set is there, or one is damaged.
    """
    out, data = flags.out.resolve(), flags.data.resolve()
    found = {name: where for name in SETS if (where := find(data, name))}
    if not found:
        raise UserError(f"--data {flags.data}: no data set in it; expected a folder {' or '.join(SETS)}, or an archive "
                        f"such as {next(iter(SETS))}.tar, whole or in parts")
    files = {name: parts for name in (TEACHER, ZOO_WEIGHTS) if (parts := parts_of(data, name))}
    missing = {name: f"no {name} in {flags.data}" for name in (*SETS, TEACHER, ZOO_WEIGHTS)
               if name not in found and name not in files}
    if device == "cpu":
        missing |= {"float16": "float16 is for CUDA", "cuda_graph": "CUDA graphs are for CUDA"}
    homes = {name: where.folder or out / "data" / name for name, where in found.items()}
    packed = [name for name, home in homes.items() if not home.is_dir()]
    kept = out / "torch_home" / "hub" / "checkpoints"  # where torchvision looks before it fetches weights
    if unpack:
        for name, parts in files.items():
            write_joined(parts, kept / name)
        homes = {name: unpacked(where, name, homes[name]) for name, where in found.items()}
    place = Place(out=out, sets=homes, missing=missing, files={name: kept / name for name in files}, device=device,
                  cores=usable_cores(), scale=flags.scale)
    return place, packed


def chosen_jobs(place: Place, only: str) -> list[Job]:
    """Return the jobs that `--only` names, all without it.

    Raises:
        UserError: a name that fits no job.
    """
    jobs = all_jobs(place)
    names = [name.strip() for name in only.split(",")] if only else ["*"]
    for name in names:
        if not any(fnmatch(job.name, name) for job in jobs):
            raise UserError(f"--only {name}: no job of that name{closest(name, [job.name for job in jobs])} (jobs: "
                            f"{', '.join(job.name for job in jobs)})")
    return [job for job in jobs if any(fnmatch(job.name, name) for name in names)]


def claim(out: Path, shared: dict[str, Any]) -> None:
    """Make OUT the folder of these settings.

    Raises:
        UserError: it is something else, is damaged, or holds records of another scale or device.
    """
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out}: a file; expected a folder")
    if not (out / SETTINGS).is_file():
        if out.is_dir() and any(out.iterdir()):
            raise UserError(f"--out {out}: already there and not of this program; choose another folder")
        out.mkdir(parents=True, exist_ok=True)
        write_json(out / SETTINGS, shared)
    try:
        before = json.loads((out / SETTINGS).read_text())
    except ValueError as error:
        raise UserError(f"--out {out}: {SETTINGS} in it is damaged ({first_line(error)}); choose another folder") from error
    if before != shared:
        raise UserError(f"--out {out}: holds records of {before}, not of {shared}; choose another folder")


# ------------------------------------------------------------------------------------------------------------- tables


def print_plan(jobs: list[Job], place: Place, limits: Limits, packed: list[str]) -> None:
    """Print when each job would start and end, which are left out and why, and where the estimates come from."""
    before = {job.name: read_record(place.out, job) for job in jobs}
    rest = [job for job in jobs if before[job.name].get("status") != "done"]
    planned = plan(rest, {name: record.get("seconds", 0.0) / 60 for name, record in before.items()}, limits,
                   len(packed) * UNPACK_MINUTES)
    rows = [("job", "starts", "ends", "alone", "share", "goal", "")]
    rows += [(entry.job.name, f"{entry.start:.1f}", f"{entry.end:.1f}", f"{entry.job.minutes:.1f}",
              f"{entry.job.share:.2f}", percent(entry.job.goal), entry.note)
             for entry in planned if entry.end > entry.start]
    print(f"plan for {limits.minutes:g} minutes on {place.device}, up to {limits.parallel} processes at once, scale "
          f"{place.scale:g}; minutes as on an H100, and as if jobs that share the card did not slow each other down"
          + "".join(f"; {name} is unpacked first, {UNPACK_MINUTES} min" for name in packed))
    print_rows(rows)
    reasons = {job.name: "recorded before" for job in jobs if job not in rest}
    reasons |= {job.name: job.missing for job in rest if job.missing}
    reasons |= {entry.job.name: entry.note for entry in planned if entry.end == entry.start}
    if reasons:
        print("left out")
        print_rows([(job.name, reasons[job.name]) for job in jobs if job.name in reasons])
    print("estimates")
    sources: dict[str, list[str]] = {}
    for job in jobs:
        sources.setdefault(job.source, []).append(job.name)
    print_rows([(names[0] if len(names) == 1 else f"{names[0]}, ... ({len(names)})", source)
                for source, names in sources.items()])


def print_ended(ended: list[Ended]) -> None:
    """Print what became of each job."""
    rows = [("job", "status", "test", "goal", "n", "seconds", "")]
    for entry in ended:
        record = entry.record
        rows.append((entry.job.name, entry.status, percent(accuracy(record)), percent(entry.job.goal),
                     str(record.get("n", "")), f"{record['seconds']:,.0f}" if "seconds" in record else "",
                     entry.note or missed(entry)))
    print_rows(rows)


def missed(entry: Ended) -> str:
    """Return a word where a job ended with less than its goal; a share of the epochs need not reach it."""
    found, goal = accuracy(entry.record), entry.job.goal
    return "below its goal" if found is not None and goal is not None and found < goal else ""


def accuracy(record: dict[str, Any]) -> float | None:
    """Return the test accuracy that a goal speaks of: with mirror images where a record has it."""
    return record.get("test_accuracy_mirrored", record.get("test_accuracy"))


def percent(fraction: float | None) -> str:
    """Return a fraction in percent, or an empty text for None."""
    return "" if fraction is None else f"{fraction:.2%}"


def print_rows(rows: Sequence[tuple[str, ...]]) -> None:
    """Print rows in columns; the first and the last are words, the others figures."""
    widths = [max(len(row[index]) for row in rows) for index in range(len(rows[0]))]
    for row in rows:
        middle = [text.rjust(width) for text, width in zip(row[1:-1], widths[1:-1], strict=True)]
        print("  ".join(["  " + row[0].ljust(widths[0]), *middle, row[-1]]).rstrip())
    print(flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line."""
    began = time.monotonic()
    try:
        flags = parsed(arguments)
        limits = Limits(minutes=flags.minutes, parallel=flags.parallel)
        device = chosen_device(flags)
        place, packed = opened(flags, device, unpack=False)
        jobs = chosen_jobs(place, flags.only)
        if flags.dry_run:
            print_plan(jobs, place, limits, packed)
            return 0
        shared = {"scale": flags.scale, "device": device}
        claim(flags.out, shared)
        with locked(flags.out, "choose --out OTHER"):
            remove_leftovers(flags.out)
            place, _ = opened(flags, device, unpack=True)
            sitting = Sitting(place.out, limits, began, shared, lambda text: print(text, flush=True))
            ended = sitting.run(chosen_jobs(place, flags.only))
            write_json(place.out / "summary.json", finite({
                "schema": 1, "minutes": round((time.monotonic() - began) / 60, 2), **shared, "machine": machine(),
                "versions": versions(), "jobs": [
                    {"job": entry.job.name, "status": entry.status, "note": entry.note, "goal": entry.job.goal,
                     "test_accuracy": accuracy(entry.record), "n": entry.record.get("n")} for entry in ended]}))
        print_ended(ended)
        print(f"records: {place.out}")
    except UserError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return error.exit_code
    except OSError as error:
        print(f"error: {error.filename or 'disk'}: {error.strerror or error}", file=sys.stderr)
        return 2
    return 1 if any(entry.status == "failed" for entry in ended) else 0


if __name__ == "__main__":
    sys.exit(main())
