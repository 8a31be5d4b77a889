"""One card, many jobs: child processes that share a card, a deadline that stops them, and a record of each.

A job is a command that continues where it was stopped. The jobs start in their order, each as soon as its share of the card
is free, if the time left is enough for something worth a record. A job that fails does not stop the others.
"""

from __future__ import annotations

import json
import math
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from metadata.errors import UserError, first_line
from metadata.files import write_json
from metadata.machine import machine, versions

PROJECT = Path(__file__).parents[1]
LAST_LINES = 20  # of the output of a job that failed, in its record
POLL_SECONDS = 0.1
# Runs a command that gets SIGTERM when its parent dies, even if that is killed (prctl's PR_SET_PDEATHSIG is 1): a job that
# went on alone would hold its folder against the next sitting.
BOUND = "import ctypes, os, sys; ctypes.CDLL(None).prctl(1, 15); os.execv(sys.argv[1], sys.argv[1:])"

Status = Literal["done", "failed", "unfinished", "left out", "recorded before"]


@dataclass(frozen=True, kw_only=True)
class Job:
    """One command, and what is known about it before it runs.

    Args:
        name: of its record, log and folder.
        command: of the child process, which starts in the project's folder; with it, a record says what was run.
        placed: further words of the command, which say where it runs (folders, device, threads) and not what.
        minutes: estimate of the whole job, alone on an H100.
        source: where the estimate comes from.
        share: of the card's time and memory that the job needs; 1 runs alone, because its time is a result.
        least: minutes after which a stopped job is worth a record; unless given, a stopped job is worth nothing.
        missing: why the job cannot run here.
        goal: test accuracy that it is meant to reach, a fraction.
        published: whose figure the goal is, or why it was set.
        environment: variables of the child process, besides those of this one.
        result: reads what the job has left so far, for its record.
    """

    name: str
    command: Sequence[str]
    placed: Sequence[str] = ()
    minutes: float
    source: str
    share: float
    least: float = math.inf
    missing: str = ""
    goal: float | None = None
    published: str = ""
    environment: dict[str, str] = field(default_factory=dict)
    result: Callable[[], dict[str, Any]] = dict


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What the jobs may use: minutes in all, and processes at once."""

    minutes: float
    parallel: int

    @property
    def grace(self) -> float:
        """Return the seconds before the end at which what still runs is asked to stop."""
        return min(10.0, 6.0 * self.minutes)


@dataclass(frozen=True, kw_only=True)
class Planned:
    """When a job starts and ends, in minutes, if every estimate is right."""

    job: Job
    start: float
    end: float
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class Ended:
    """What became of a job: its status, and its record where there is one."""

    job: Job
    status: Status
    note: str = ""
    record: dict[str, Any] = field(default_factory=dict)


def minutes_left_of(job: Job, spent: float) -> float:
    """Return the estimate of what is left of a job that ran for some minutes; some of it always is."""
    return max(job.minutes - spent, 0.1 * job.minutes)


def too_late(job: Job, spent: float, left: float) -> str:
    """Return why a job cannot reach something worth a record in the minutes left, or an empty text."""
    needs = min(minutes_left_of(job, spent), job.least)
    return f"needs about {needs:.1f} min, {max(left, 0):.1f} are left" if needs > left else ""


def fits(job: Job, running: Sequence[Job], limits: Limits) -> bool:
    """Return whether a job can start beside those that run."""
    return len(running) < limits.parallel and sum(other.share for other in running) + job.share <= 1 + 1e-9


def plan(jobs: Sequence[Job], spent: dict[str, float], limits: Limits, start: float = 0.0) -> list[Planned]:
    """Return when each job that can run would start and end, by the rules of `run_jobs` and the estimates.

    Args:
        jobs: in order.
        spent: minutes that earlier sittings gave to jobs.
        limits: minutes and processes.
        start: minutes before the first job, such as for unpacking.
    """
    stop = limits.minutes - limits.grace / 60
    now, waiting = start, [job for job in jobs if not job.missing]
    running: list[tuple[float, Job]] = []
    planned: list[Planned] = []
    while waiting:
        job = waiting[0]
        if late := too_late(job, spent.get(job.name, 0.0), stop - now):
            planned.append(Planned(job=waiting.pop(0), start=now, end=now, note=late))
        elif fits(job, [other for _, other in running], limits):
            end = now + minutes_left_of(job, spent.get(job.name, 0.0))
            note = "" if end <= stop else "stopped at the end, continues in the next sitting"
            planned.append(Planned(job=job, start=now, end=min(end, stop), note=note))
            running.append((end, waiting.pop(0)))
        else:
            now = min(end for end, _ in running)
            running = [(end, other) for end, other in running if end > now]
    return planned


class Sitting:
    """The jobs of one call: what waits, what runs, what has ended.

    Args:
        out: folder of the records `NAME.json`, of the logs `logs/NAME.log` and of the jobs' folders `runs/NAME/`.
        limits: minutes and processes.
        began: the value of `time.monotonic()` at which the minutes began.
        shared: entries of every record, such as the scale.
        say: prints one line.
    """

    def __init__(self, out: Path, limits: Limits, began: float, shared: dict[str, Any], say: Callable[[str], None]) -> None:
        self.out, self.limits, self.began, self.shared, self.say = out, limits, began, shared, say
        self.running: list[_Child] = []
        self.ended: list[Ended] = []
        self.asked_to_stop = ""
        self.where = {"machine": machine(), "versions": versions()}
        (out / "logs").mkdir(parents=True, exist_ok=True)

    @property
    def left(self) -> float:
        """The minutes until what still runs is asked to stop."""
        return self.limits.minutes - (self.limits.grace + time.monotonic() - self.began) / 60

    def run(self, jobs: Sequence[Job]) -> list[Ended]:
        """Run the jobs that have no record yet, until all have ended or the time is over; return what became of each."""
        waiting = list(jobs)
        with self._signals():
            try:
                while (waiting or self.running) and not self.asked_to_stop:
                    self._take_ended()
                    while waiting and self._starts_or_ends(waiting[0]):
                        waiting.pop(0)
                    if self.left <= 0:
                        self.asked_to_stop = f"{self.limits.minutes:g} minutes are over"
                    time.sleep(POLL_SECONDS if self.running else 0)
            finally:
                self._stop()
        self.ended += [Ended(job=job, status="left out", note=self.asked_to_stop) for job in waiting]
        order = [job.name for job in jobs]
        return sorted(self.ended, key=lambda ended: order.index(ended.job.name))

    def _starts_or_ends(self, job: Job) -> bool:
        """Start a job, or end one that will not run; return False where the job has to wait."""
        before = read_record(self.out, job)
        if before.get("status") == "done":
            self.ended.append(Ended(job=job, status="recorded before", record=before))
        elif job.missing:
            self.ended.append(Ended(job=job, status="left out", note=job.missing))
        elif late := too_late(job, before.get("seconds", 0.0) / 60, self.left):
            self.ended.append(Ended(job=job, status="left out", note=late, record=before))
        elif fits(job, [child.job for child in self.running], self.limits):
            child = _Child(job, self.out, before)
            for other in self.running:
                other.beside.add(job.name)
                child.beside.add(other.job.name)
            self.running.append(child)
            self._write(child, "unfinished", None)
            self.say(f"{self._clock()} {job.name}: {'goes on' if before else 'starts'}, about "
                     f"{minutes_left_of(job, before.get('seconds', 0.0) / 60):.1f} min")
        else:
            return False
        return True

    def _take_ended(self) -> None:
        """Write the records of the children that have ended."""
        for child in [child for child in self.running if child.process.poll() is not None]:
            self.running.remove(child)
            code = child.process.returncode
            child.kill()  # what the child itself started
            self._end(child, "failed" if code else "done", "" if not code else f"exit code {code}" if code > 0 else
                      f"killed by {signal.Signals(-code).name}")

    def _stop(self) -> None:
        """Ask what still runs to stop, end what does not within the grace, and write the records."""
        for child in self.running:
            child.terminate()
        patience = time.monotonic() + max(1.0, self.limits.grace * 0.8)
        for child in self.running:
            child.wait(patience - time.monotonic())
            child.kill()
        for child in self.running:
            if child.process.returncode == 0:  # it was faster than the signal
                self._end(child, "done", "")
            else:
                self._end(child, "unfinished", f"{self.asked_to_stop or 'stopped'}; the same command continues")
        self.running = []

    def _end(self, child: _Child, status: Status, note: str) -> None:
        record = self._write(child, status, note)
        status, note = record["status"], record["note"]
        self.ended.append(Ended(job=child.job, status=status, note=note, record=record))
        self.say(f"{self._clock()} {child.job.name}: {status} after {record['seconds']:.0f} s{', ' if note else ''}{note}")

    def _write(self, child: _Child, status: Status, note: str | None) -> dict[str, Any]:
        job = child.job
        try:
            found = {} if note is None else job.result()
        except (UserError, OSError, ValueError, LookupError, TypeError) as error:  # files that the job left half done
            status, note, found = "failed", f"what it left cannot be read: {type(error).__name__} {first_line(error)}", {}
        record = {"schema": 1, "job": job.name, "status": status, "note": note or "", "goal": job.goal,
                  "published": job.published, **self.shared, "command": shown_command(job),
                  "seconds": round(child.seconds, 1), "sittings": child.sittings,
                  "estimated_minutes": round(job.minutes, 2), "estimate": job.source, "share": job.share,
                  "beside": sorted(child.beside), **self.where, **found}
        if status == "failed":
            record["last_lines"] = child.last_lines()
        write_json(self.out / f"{job.name}.json", finite(record))
        return record

    def _clock(self) -> str:
        minutes, seconds = divmod(int(time.monotonic() - self.began), 60)
        return f"[{minutes:2d}:{seconds:02d}]"

    @contextmanager
    def _signals(self) -> Iterator[None]:
        """Let SIGTERM and SIGINT end the sitting as its deadline does."""
        def stop(number: int, frame: object) -> None:
            self.asked_to_stop = f"stopped by {signal.Signals(number).name}"

        before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


class _Child:
    """A job's process, in a process group of its own, and its log."""

    def __init__(self, job: Job, out: Path, before: dict[str, Any]) -> None:
        self.job, self.started = job, time.monotonic()
        self.before, self.sittings = float(before.get("seconds", 0.0)), int(before.get("sittings", 0)) + 1
        self.beside: set[str] = set(before.get("beside", []))
        self.log = out / "logs" / f"{job.name}.log"
        (out / "runs" / job.name).mkdir(parents=True, exist_ok=True)
        with self.log.open("ab") as log:
            self.offset = log.tell()
            self.process = subprocess.Popen(
                [sys.executable, "-I", "-S", "-c", BOUND, *job.command, *job.placed], cwd=PROJECT,
                # Unbuffered: the log has lines in the order in which they were printed, also those of a job that is killed.
                env={**os.environ, "PYTHONUNBUFFERED": "1", **job.environment}, stdin=subprocess.DEVNULL, stdout=log,
                stderr=subprocess.STDOUT, process_group=0)

    @property
    def seconds(self) -> float:
        """The wall time of all sittings."""
        return self.before + time.monotonic() - self.started

    def terminate(self) -> None:
        """Ask the process, and what it started, to end."""
        self._signal(signal.SIGTERM)

    def kill(self) -> None:
        """End whatever is left of the process and of what it started."""
        self._signal(signal.SIGKILL)
        self.process.wait()

    def wait(self, seconds: float) -> None:
        """Wait for the process to end, some seconds at most."""
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(max(0.0, seconds))

    def last_lines(self) -> list[str]:
        """Return the last lines of this sitting's output."""
        with self.log.open("rb") as log:
            log.seek(self.offset)
            return log.read().decode(errors="replace").splitlines()[-LAST_LINES:]

    def _signal(self, number: signal.Signals) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, number)


def shown_command(job: Job) -> str:
    """Return a job's command without the words that say where it runs."""
    return shlex.join(["python", *job.command[1:]])


def read_record(out: Path, job: Job) -> dict[str, Any]:
    """Return the record of a job's earlier sittings, or {} where there is none of the same command."""
    path = out / f"{job.name}.json"
    try:
        record: dict[str, Any] = json.loads(path.read_text())
        return record if record["command"] == shown_command(job) and record["status"] in (
            "done", "unfinished") else {}
    except (OSError, ValueError, LookupError, TypeError):
        return {}


def finite(value: Any) -> Any:
    """Return JSON's content with None in the place of numbers that are not finite."""
    if isinstance(value, dict):
        return {key: finite(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
