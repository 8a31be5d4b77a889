"""The evaluator's command line. The results file is written whatever happens."""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from compress.evaluation.channel import BrokenReaderError
from compress.evaluation.evaluate import BASELINES, evaluate_submission, failed_result
from compress.evaluation.extras import toolkit
from compress.evaluation.measure import Progress
from compress.evaluation.nursery import NURSERY_FLAG, tend
from compress.evaluation.reader import answer_evaluator
from compress.evaluation.file_formats import FILE_BACKENDS
from compress.evaluation.runtimes import EvaluationSettings
from metadata.errors import UserError, first_line, printable
from metadata.files import write_json
from metadata.machine import usable_cores


def terminal_progress() -> Progress | None:
    """Return a counter with the time left, for stderr on a terminal; None where stderr is no terminal.

    The images are counted twice or more: first while they are read, then while they are classified.
    """
    if sys.stderr is None or not sys.stderr.isatty():
        return None
    start, before, verb = 0.0, 0, "read"

    def show(done: int, total: int) -> None:
        nonlocal start, before, verb
        if done <= before:
            before, verb = 0, "classified"
        start = start if before else time.monotonic()  # from the first image on: loading the model comes before
        before = done
        left = (time.monotonic() - start) / done * (total - done)
        end = "\n" if done == total else ""
        if end or done % max(1, total // 200) == 0:
            print(f"\r{verb} {done}/{total} images, {left:.0f} s left ", end=end, file=sys.stderr, flush=True)

    return show


def draw_progress() -> Progress | None:
    """Return a counter of a task's draws with the time left, a line for each, for stderr on a terminal; else None."""
    if sys.stderr is None or not sys.stderr.isatty():
        return None
    start = time.monotonic()

    def show(done: int, total: int) -> None:
        left = f", {(time.monotonic() - start) / done * (total - done):.0f} s left" if done else ""
        print(f"draw {done + 1} of {total}{left}", file=sys.stderr, flush=True)

    return show


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    plain = EvaluationSettings()
    home = os.path.expanduser  # shells leave `~` alone behind `=`, as in --data_dir=~/test
    parser = argparse.ArgumentParser(description="Scores a compressed image classifier: size, latency and accuracy.")
    parser.add_argument("--submission_dir", type=home, help="folder with model_metadata.json and the files that it names")
    parser.add_argument("--data_dir", type=home, help="test images, one folder a class")
    parser.add_argument("--baseline_size", type=float, default=BASELINES.size_mb,
                        help=f"MB (2^20 bytes); default {BASELINES.size_mb:g}")
    parser.add_argument("--baseline_latency", type=float, default=BASELINES.latency_ms,
                        help=f"milliseconds at batch 1; default {BASELINES.latency_ms:g}")
    parser.add_argument("--baseline_accuracy", type=float,
                        help=f"percent, default {BASELINES.accuracy:g}; of --task a fraction, default 0.85")
    parser.add_argument("--output_file", type=home, default="results.json", help="file to write")
    parser.add_argument("--runs", type=int, default=plain.runs, help=f"timed calls; default {plain.runs}")
    parser.add_argument("--warmup", type=int, default=plain.warmup,
                        help=f"calls before the timed ones; default {plain.warmup}")
    parser.add_argument("--threads", type=int, help="threads of one inference; default 1, of --task all cores")
    parser.add_argument("--backend", default="auto", choices=["auto", "torch", *FILE_BACKENDS])
    parser.add_argument("--batch_size", type=int, default=1, help="batch size for the accuracy; default 1")
    parser.add_argument("--min_accuracy", type=float, default=0.0, help="percent; below it the guarded score is zero")
    parser.add_argument("--allow_code", action="store_true", help="run a submission that is code, in a sandbox")
    parser.add_argument("--weak_sandbox", action="store_true",
                        help="run foreign code without bubblewrap where that is missing; the result says so")
    parser.add_argument("--time_limit_s", type=float, default=plain.time_limit_s,
                        help="seconds for all calls of a submission")
    parser.add_argument("--memory_limit_mb", type=int, default=plain.memory_limit_mb,
                        help="MB (2^20 bytes) that a submission may take")
    parser.add_argument("--compare", type=home, metavar="SUBMISSION",
                        help="measure this submission interleaved with the first, and judge")
    parser.add_argument("--task", choices=["imagenet_pareto_2_5m"], help="evaluate a solution of a synthetic task instead")
    parser.add_argument("--solution", type=home, help="of --task: a Python file with a Solution class")
    parser.add_argument("--param_limit", type=int, default=2_500_000, help="of --task: trainable parameters")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an unexpected error")
    parser.add_argument("--data_seed", type=int, help="of --task: the seed of a public draw; default 2025")
    parser.add_argument("--secret", action="store_true", help="of --task: evaluate on draws from a new secret salt")
    parser.add_argument("--draws", type=int, help="of --task: how many draws from the salt; default 5")
    parser.add_argument("--salt", help="of --task: 32 hex digits from a result, to repeat an evaluation on secret draws")
    options = parser.parse_args(arguments)
    required = ("solution",) if options.task else ("submission_dir", "data_dir")
    missing = [f"--{name}" for name in required if not getattr(options, name)]
    if missing:
        parser.error(f"the following arguments are required: {', '.join(missing)}")
    foreign = [name for name in (("submission_dir", "data_dir", "compare") if options.task else
                                ("solution", "secret", "draws", "salt", "data_seed"))
               if getattr(options, name)]
    if foreign:
        parser.error(f"--{foreign[0]} does not go {'with' if options.task else 'without'} --task")
    return options


def evaluate(options: argparse.Namespace) -> dict[str, Any]:
    """Evaluate what the flags name. Raise what the evaluation raises."""
    settings = EvaluationSettings(
        runs=options.runs, warmup=options.warmup, threads=1 if options.threads is None else options.threads,
        backend=options.backend, batch_size=options.batch_size, min_accuracy=options.min_accuracy,
        allow_code=options.allow_code, weak_sandbox=options.weak_sandbox, time_limit_s=options.time_limit_s,
        memory_limit_mb=options.memory_limit_mb)
    if options.task:
        task = toolkit("--task", "pareto_task")
        return task.evaluate_solution(  # type: ignore[no-any-return]
            Path(options.solution), options.param_limit, options.baseline_accuracy,
            task.chosen_draws(options.data_seed, options.draws, options.secret, options.salt),
            options.threads or usable_cores(), settings, draw_progress())
    percent = BASELINES.accuracy if options.baseline_accuracy is None else options.baseline_accuracy
    return evaluate_submission(options.submission_dir, options.data_dir, options.baseline_size, options.baseline_latency,
                               percent, settings, options.compare, terminal_progress())


class StoppedError(BaseException):
    """The evaluator was told to stop. Not an Exception: no handler of errors on the way may take it for one."""

    def __init__(self, number: int) -> None:
        super().__init__(f"the evaluation was stopped by {signal.Signals(number).name}")
        self.exit_code = 128 + number


@contextlib.contextmanager
def stoppable() -> Iterator[Callable[[], None]]:
    """Raise StoppedError inside the block on the first SIGTERM, SIGHUP or Ctrl-C, so that everything is cleaned up.

    Later ones are ignored: cleaning up must not be cut short. The block gets a function that ignores all from then on.
    """
    if threading.current_thread() is not threading.main_thread():
        yield lambda: None  # Python lets only the main thread set handlers
        return
    numbers = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP", "SIGINT") if hasattr(signal, name)]
    numbers = [number for number in numbers if signal.getsignal(number) is not signal.SIG_IGN]  # such as under nohup

    def ignore() -> None:
        for number in numbers:
            signal.signal(number, signal.SIG_IGN)

    def stop(number: int, frame: object) -> None:
        ignore()
        raise StoppedError(number)

    before = {number: signal.signal(number, stop) for number in numbers}
    try:
        yield ignore
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def main(arguments: Sequence[str] | None = None,
         run: Callable[[argparse.Namespace], dict[str, Any]] = evaluate) -> int:
    """Run the command line. Return the exit code: 0 scored, 1 the submission fails verification, 2 the user's mistake.

    The output file is written in every case, unless the file itself cannot be written. An evaluation that a signal stops
    has a result, too, and the exit code that shells know: 128 and the signal's number.

    Args:
        arguments: the flags; those of the process unless given.
        run: what to do with the parsed flags.
    """
    if arguments is None and sys.argv[1:2] == [NURSERY_FLAG]:
        return tend(int(sys.argv[2]), answer_evaluator)
    options = parse(arguments)
    output = Path(options.output_file)
    try:
        if not output.resolve().parent.is_dir():
            raise UserError(f"--output_file {output}: there is no folder {output.resolve().parent}")
        if output.exists() and not output.is_file():
            raise UserError(f"--output_file {output}: this is not a plain file")
    except (UserError, OSError, ValueError, RuntimeError) as error:
        print(f"error: {first_line(error)}", file=sys.stderr)
        return 2
    with stoppable() as ignore:
        code, line, result = run_once(options, run, ignore)
        try:
            write_json(output, result or failed_result(line, options.task))
        except OSError as error:
            code, line = 2, f"{output}: {error.strerror or error}"
    if code:
        print(f"error: {line}", file=sys.stderr)
        return code
    if sys.stdout is None:  # closed before the start
        return 0
    try:
        print_result(result, output)
        sys.stdout.flush()
    except BrokenPipeError:  # the reader closed the pipe; leave nothing to flush at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


def run_once(options: argparse.Namespace, run: Callable[[argparse.Namespace], dict[str, Any]], ignore: Callable[[], None]
             ) -> tuple[int, str, dict[str, Any]]:
    """Run the evaluation. Return the exit code, the line that says why there is no result, and the result.

    Args:
        options: the flags.
        run: what to do with them.
        ignore: called at the end of the run, to keep signals from what follows.
    """
    try:
        try:
            return 0, "", run(options)
        finally:
            ignore()
    except StoppedError as error:
        return error.exit_code, str(error), {}
    except UserError as error:
        return error.exit_code, first_line(error), {}
    except OSError as error:
        return 2, first_line(error), {}
    except Exception as error:  # the edge: an unexpected error, too, must end in one line and a result
        if options.debug:
            raise
        return 1, f"the evaluation broke down ({said(error)}); --debug shows where", {}


def said(error: Exception) -> str:
    """Return an unexpected error in one line: its type and text, or the last line of a reader's traceback."""
    if isinstance(error, BrokenReaderError):
        return str(error).strip().rpartition("\n")[2]
    return f"{type(error).__name__}: {first_line(error)}"


def print_result(result: dict[str, Any], output: Path) -> None:
    """Print the scores, the verdicts and the warnings."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # names of classes need not fit the terminal's encoding
    details = result["details"]
    shown = {key: value for key, value in result.items() if isinstance(value, float | int)}
    shown |= {key: details[key] for key in ("guarded_score",) if details.get(key) is not None}
    for key, value in shown.items():
        print(f"{key:20} {value:14,.4f}" if isinstance(value, float) else f"{key:20} {value:14,}")
    for verdict in details.get("compare", {}).get("lines", []):
        print(verdict)
    for warning in details["warnings"]:
        print(f"warning: {printable(warning)}")
    print(f"written to {output}")
