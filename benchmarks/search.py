"""The search beside its rivals, under the same limit of time and within the same minutes; and how often limits are kept.

    python -m benchmarks.search --data_root DIR --checkpoint FILE [--models slim_resnet18 mobilenet_v2] [--seeds 0 1 2]
        [--minutes 20] [--images 10000] [--epochs 10] [--limit 0.75]
    python -m benchmarks.search --digits [--searches 20] [--minutes 1]

On CIFAR-10, a student of each model is trained once a seed, with a teacher. The limit is a share of the student's own time
as it is served. Every rival gets the same minutes, the same training and the same int8: the search; the widest of ten
uniform ratios that keeps the limit; torch-pruning's global pruning, by the least of ten ratios that keeps it; the slowest
of ten random widths that keeps it. Validation accuracy is compared image by image (McNemar's exact test). Nothing is chosen
by the test split, which is counted once, at the end.

With `--digits`, short searches on scikit-learn's digits under limits of all sizes say how often a limit is kept within 3 %.

What the record has is left alone, and a search that was interrupted goes on in its folder (--work). Write
benchmarks/results/search.json and .md.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from torch import fx, nn

sys.path.insert(0, str(Path(__file__).parents[1]))

from architectures.architecture import Architecture
from architectures.checkpoints import open_checkpoint
from architectures.counting import architecture_macs
from architectures.describe import describe, lower
from architectures.weights import read_weights
from architectures.zoo import fitted_options, make
from benchmarks.distillation import some_of
from benchmarks.search_table import RIVALS, table
from compress.evaluation.measure import measure_accuracy
from compress.pruning.library import tp
from compress.search.bench import Bench
from compress.search.clock import SearchClock
from compress.search.cluster import Teaching
from compress.search.entrants import Entrant, RaceState
from compress.search.finish import Answer, Finish
from compress.search.model_search import ModelSearch, SearchOrder
from compress.search.proposals import stored_numbers
from compress.search.serving import Deployed, Serving, servings, Stopwatch, Workshop
from compress.search.solve import Limits
from compress.search.space import Choice, Space
from compress.search.values import nearest
from compress.training.data import Data, seeded, training_data
from compress.training.distillation import TeacherLoss
from compress.training.loop import train
from compress.training.settings import TrainingSettings
from compress.training.trackers import Tracker
from loaders.augment import examples
from loaders.catalog import load
from loaders.request import Request
from loaders.splits import Split, Splits
from metadata.errors import UserError, VerificationError
from metadata.files import write_atomically, write_json
from metadata.formats import write_weights
from metadata.machine import machine, versions
from metadata.records import ModelReference

RESULTS = Path(__file__).parent / "results" / "search.json"
OPTIONS: dict[str, dict[str, Any]] = {"slim_resnet18": {"width": 16, "stem": "small"}, "mobilenet_v2": {"stem": "small"}}
RATIOS = [index / 10 for index in range(1, 10)] + [0.95]  # of the channels that go
SESSIONS = 3  # of the last measurement of each answer, at different moments


@dataclass(frozen=True, kw_only=True)
class Study:
    """What all rivals share.

    Args:
        splits: the data.
        data: the same, on the device.
        teaching: how all networks learn.
        teacher: of all, or None.
        arguments: of the command line.
    """

    splits: Splits
    data: Data
    teaching: Teaching
    teacher: nn.Module | None
    arguments: argparse.Namespace

    @property
    def device(self) -> torch.device:
        """The device that networks train on."""
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")

    def student(self, model: str, seed: int, folder: Path) -> tuple[fx.GraphModule, Architecture]:
        """Return the trained student of a model and a seed, from its folder where it is there."""
        card = self.splits.card
        with seeded(seed, "student"):
            options = fitted_options(model, OPTIONS[model], card.input_shape)
            lowered = lower(make(model, num_classes=card.num_classes, **options).eval(), card.input_shape)
        student, path = lowered.build(), folder / "student.pth"
        if path.is_file():
            student.load_state_dict(read_weights(path))
            return student.eval(), lowered.architecture
        settings = self.teaching.settings.model_copy(update={"epochs": self.arguments.epochs, "lr": 0.1})
        train(student, self.data, self.teaching.loss(self.teacher, self.device), settings, label=f"{model}, seed {seed}",
              seed=seed, device=self.device, checkpoint=folder / "checkpoint-student.pth", tracker=Tracker(Console()))
        write_weights(path, student.cpu().state_dict())
        return student.eval(), lowered.architecture


@dataclass(frozen=True, kw_only=True)
class Course:
    """One student, one limit, and what rivals are measured with.

    Args:
        study: the data and the teacher.
        student: trained, on the CPU.
        architecture: its layers.
        folder: of all rivals of this student.
        seed: of their trainings.
        serving: how they are served.
        share: of the student's time that they may take.
        limit_ms: the same, in milliseconds.
        calm_ms: of the student as it is served, when the limit was measured: latencies are on the scale of that moment.
    """

    study: Study
    student: fx.GraphModule
    architecture: Architecture
    folder: Path
    seed: int
    serving: Serving
    share: float
    limit_ms: float
    calm_ms: float

    def workshop(self, folder: Path) -> Workshop:
        """Return what makes networks ready to be served."""
        splits = self.study.splits
        return Workshop(examples=examples(splits, 512, self.seed), preprocessing=splits.card.preprocessing, threads=1,
                        folder=folder)

    def search(self, folder: Path) -> tuple[Answer, float]:
        """Return the search's answer, and the minutes that it took."""
        order = SearchOrder(limits=Limits(latency_ms=self.limit_ms), backend=self.serving.backend, threads=1,
                            criteria=("taylor", "l2"), depth=True, samples=36, costs_folder=self.folder / "costs")
        state = RaceState.load(folder)
        state.student_ms = {self.serving.name: self.calm_ms} | state.student_ms
        state.save(folder)
        with SearchClock(folder / "clock.json", 60 * self.study.arguments.minutes) as clock:
            found = ModelSearch(
                order=order, student=self.student, architecture=self.architecture, data=self.study.data,
                teaching=self.study.teaching, teacher=self.study.teacher, examples=self.workshop(folder).examples,
                seed=self.seed, device=self.study.device, folder=folder, tracker=Tracker(Console(), folder), clock=clock,
                warn=print).run()
            return found, clock.spent / 60

    def rival(self, name: str, folder: Path) -> tuple[Answer, float]:
        """Return a rival's network, trained for the same minutes, made int8 and measured by the same code."""
        space = Space.of(self.architecture, self.student.state_dict())
        bench = Bench(space=space, student=self.student, scores={"l2": {}}, data=self.study.data,
                      loss=self.study.teaching.loss(self.study.teacher, self.study.device),
                      settings=self.study.teaching.settings, seed=self.seed, device=self.study.device, folder=folder,
                      tracker=Tracker(Console(), folder))
        workshop, state = self.workshop(folder), RaceState.load(folder)
        served = workshop.deploy(self.student, self.architecture, self.serving).answer
        stopwatch = Stopwatch(served, workshop.input_shape, 1, state.student_ms.get(self.serving.name, self.calm_ms))
        with SearchClock(folder / "clock.json", 60 * self.study.arguments.minutes) as clock:
            if not state.entrants:
                candidates = CANDIDATES[name](space, self)
                entrants = [self._entrant(space, number, choice) for number, (choice, _) in enumerate(candidates)]
                for entrant, (_, weights) in zip(entrants, candidates, strict=True):
                    if weights is not None:
                        entrant.round = 1
                        write_weights(folder / f"checkpoint-weights-{entrant.id}-0.pth", weights)
                ready = [workshop.deploy(*bench.network(entrant), self.serving).answer for entrant in entrants]
                for entrant, timing in zip(entrants, stopwatch.times(ready), strict=True):
                    entrant.latency_ms, entrant.noise = timing.latency_ms, timing.noise
                kept = [entrant for entrant in entrants if (entrant.latency_ms or 0.0) <= self.limit_ms]
                if not kept:
                    raise UserError(f"{name}: none of its networks keeps {self.limit_ms:.3f} ms")
                winner = max(kept, key=lambda entrant: entrant.latency_ms or 0.0) if name == "random" else kept[0]
                winner.pace = bench.pace(winner)
                state.entrants, state.student_ms = entrants, {self.serving.name: stopwatch.calm_ms}
                for entrant in entrants:
                    entrant.status = "won" if entrant is winner else "out"
                state.save(folder)
            finish = Finish(bench=bench, workshop=workshop, stopwatch=stopwatch, limits=Limits(latency_ms=self.limit_ms),
                            state=state, clock=clock, keep=lambda: state.save(folder), say=print)
            winner = next(entrant for entrant in state.entrants if entrant.status == "won")
            return finish.answer(winner), clock.spent / 60

    def _entrant(self, space: Space, number: int, choice: Choice) -> Entrant:
        shape = space.shape(choice)
        return Entrant(id=number, criterion="l2", solver="milp", depth=False, backend=self.serving.backend,
                       form=self.serving.form, widths=dict(choice.widths), dropped=[], macs=architecture_macs(shape),
                       parameters=stored_numbers(shape), size_bytes=0, model=shape.model_type)

    def measured(self, answer: Answer, minutes: float, folder: Path) -> dict[str, Any]:
        """Return an answer's row: its time beside the student's as it is served, and which images it has right."""
        workshop = self.workshop(folder)
        whole = workshop.deploy(self.student, self.architecture, self.serving)
        watch = Stopwatch(whole.answer, workshop.input_shape, 1)
        ratios = [watch.times([answer.deployed.answer])[0].latency_ms / watch.calm_ms for _ in range(SESSIONS)]
        splits = self.study.splits
        return {"latency_ms": answer.entrant.latency_ms, "limit_ms": self.limit_ms, "share": self.share,
                "of_student": statistics.median(ratios), "minutes": round(minutes, 3),
                "macs_of_student": answer.entrant.macs / architecture_macs(self.architecture),
                "size_bytes": answer.entrant.size_bytes, "widths": answer.entrant.widths, "dropped": answer.entrant.dropped,
                "quantized": answer.entrant.quantized, "validation": self._right(answer.deployed, splits.validation),
                "test_correct": self._right(answer.deployed, splits.open_test()).count("1")}

    def _right(self, deployed: Deployed, split: Split) -> str:
        """Return which images of a split are answered right, one digit each."""
        found = measure_accuracy(deployed.answer, split.batches(1), self.study.splits.card.preprocessing, len(split))
        labels = split.labels.tolist()
        return "".join("01"[predicted == label] for predicted, label in zip(found.predictions, labels, strict=True))


# ------------------------------------------------------------------------------------------------------------- rivals

Candidates = list[tuple[Choice, dict[str, torch.Tensor] | None]]  # a sub-network, and its weights if they are its own


def uniform(space: Space, course: Course) -> Candidates:
    """Return the networks of ten ratios, the same for every group."""
    return [(Choice(widths={group.name: nearest(group.options, (1 - ratio) * group.channels) for group in space.groups}),
             None) for ratio in RATIOS]


def random(space: Space, course: Course) -> Candidates:
    """Return ten networks whose widths have nothing in common."""
    rng = np.random.default_rng(course.seed)
    return [(Choice(widths={group.name: int(rng.choice(group.options)) for group in space.groups}), None) for _ in RATIOS]


def torch_pruning(space: Space, course: Course) -> Candidates:
    """Return the networks of ten ratios of torch-pruning's global pruning, by group magnitude, with its weights."""
    found: Candidates = []
    for ratio in RATIOS:
        model, image = copy.deepcopy(course.student).eval(), torch.zeros(1, *course.architecture.input_shape)
        for parameter in model.parameters():
            parameter.requires_grad_(True)
        head = [module for module in model.modules() if isinstance(module, nn.Linear)][-1]
        tp.pruner.MagnitudePruner(model, image, importance=tp.importance.GroupMagnitudeImportance(p=2), pruning_ratio=ratio,
                                  global_pruning=True, round_to=8, max_pruning_ratio=0.95, ignored_layers=[head]).step()
        shape = describe(model, course.architecture.input_shape)
        of_layer = {layer.name: layer for layer in shape.layers}
        widths = {group.name: int(of_layer[group.name].out_channels) for group in space.groups}  # type: ignore[attr-defined]
        if all(widths[group.name] in group.options for group in space.groups):
            found.append((Choice(widths=widths), {name: tensor.detach() for name, tensor in model.state_dict().items()}))
    return found


CANDIDATES: dict[str, Callable[[Space, Course], Candidates]] = {
    "uniform": uniform, "torch_pruning": torch_pruning, "random": random}


# -------------------------------------------------------------------------------------------------------------- studies


def opened(arguments: argparse.Namespace) -> Study:
    """Return the study of the data that the command line names."""
    name = "digits" if arguments.digits else "cifar10"
    held_out = 0.2 if arguments.digits else 0.1
    splits = load(Request(name=name, root=arguments.data_root, seed=0, validation_fraction=held_out))
    augmentation: dict[str, Any] = {"augment": ["crop"], "padding": 1, "batch_size": 64} if arguments.digits else {}
    settings = TrainingSettings(epochs=1000, lr=0.05, schedule="one_cycle", **augmentation)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    train_split = splits.train if arguments.digits else some_of(splits.train, arguments.images)
    splits = replace(splits, train=train_split)
    data = training_data(train_split, splits.validation, splits.card, settings, seed=0, device=device)
    teacher, reference = None, None
    if arguments.checkpoint:
        reference = ModelReference(name="slim_resnet18", num_classes=splits.card.num_classes,
                                   options={"width": 64, "stem": "small"})
        teacher = make(reference.name, num_classes=reference.num_classes, **reference.options)
        found = open_checkpoint(arguments.checkpoint, teacher, num_classes=reference.num_classes)
        teacher.load_state_dict({key: value.float() for key, value in found.weights.items()})
        teacher.to(device).eval()
    return Study(splits=splits, data=data, teacher=teacher, arguments=arguments,
                 teaching=Teaching(teacher=reference, method=TeacherLoss(), settings=settings))


def course(study: Study, model: str, seed: int, share: float, serving: Serving, name: str = "") -> Course:
    """Return the course of a student under a limit that is a share of its own time."""
    base = study.arguments.work / f"{model}-{seed}"
    base.mkdir(parents=True, exist_ok=True)
    student, architecture = study.student(model, seed, base)
    found = Course(study=study, student=student, architecture=architecture, folder=base / name if name else base, seed=seed,
                   serving=serving, share=share, limit_ms=1.0, calm_ms=1.0)
    found.folder.mkdir(exist_ok=True)
    path = base / "student.json"
    if not path.is_file():
        workshop = found.workshop(base)
        served = workshop.deploy(student, architecture, serving).answer
        watch = Stopwatch(served, workshop.input_shape, 1)
        for _ in range(SESSIONS):
            watch.times([served])
        write_json(path, {"calm_ms": watch.calm_ms})
    calm = json.loads(path.read_text())["calm_ms"]
    return replace(found, limit_ms=share * calm, calm_ms=calm)


def compare(study: Study, record: dict[str, Any], serving: Serving, keep: Callable[[], None]) -> None:
    """Train and measure what the record lacks of the comparison on CIFAR-10."""
    for seed in study.arguments.seeds:
        for model in study.arguments.models:
            rows = record["rows"].setdefault(model, {}).setdefault(str(seed), {})
            for name in [name for name in RIVALS if name not in rows]:
                found = course(study, model, seed, study.arguments.limit, serving)
                folder = found.folder / name
                folder.mkdir(exist_ok=True)
                try:
                    answer, minutes = found.search(folder) if name == "search" else found.rival(name, folder)
                    rows[name] = found.measured(answer, minutes, folder)
                except UserError as error:  # nothing of its kind keeps the limit
                    rows[name] = {"failed": str(error)}
                keep()


def limits_on_digits(study: Study, record: dict[str, Any], serving: Serving, keep: Callable[[], None]) -> None:
    """Search on digits under limits of all sizes, as many times as the record lacks."""
    shares: Sequence[float] = np.linspace(0.6, 0.95, study.arguments.searches).tolist()
    for number in range(len(record["digits"]), study.arguments.searches):
        found = course(study, "slim_resnet18", 0, shares[number], serving, f"limit-{number}")
        try:
            row = found.measured(*found.search(found.folder), found.folder)
        except VerificationError as error:  # the search itself says that it has missed the limit
            row = {"share": shares[number], "limit_ms": found.limit_ms, "of_student": 1.0, "message": str(error)}
        record["digits"].append(row)
        keep()


def main() -> None:
    """Train and measure what the record lacks, and write it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data_root", type=Path, help="folder of CIFAR-10")
    parser.add_argument("--checkpoint", type=Path, help="of the teacher: slim_resnet18, width 64, stem small")
    parser.add_argument("--models", nargs="+", choices=OPTIONS, default=list(OPTIONS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--minutes", type=float, default=20.0, help="of each rival")
    parser.add_argument("--images", type=int, default=10_000, help="training images")
    parser.add_argument("--epochs", type=int, default=10, help="of the students")
    parser.add_argument("--limit", type=float, default=0.75, help="of time, as a share of the student's")
    parser.add_argument("--backend", choices=["torch", "onnxruntime", "openvino"], default="onnxruntime")
    parser.add_argument("--digits", action="store_true", help="how often limits are kept, on scikit-learn's digits")
    parser.add_argument("--searches", type=int, default=20, help="with --digits")
    parser.add_argument("--threads", type=int, default=1, help="of the trainings")
    parser.add_argument("--work", type=Path, default=Path("search_work"), help="folder of students and searches")
    parser.add_argument("--results", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    study = opened(arguments)
    serving = next(each for each in reversed(servings(arguments.backend)))  # int8
    record: dict[str, Any] = {"schema": 1, "rows": {}, "digits": [], "machine": machine(), "versions": versions()}
    if arguments.results.exists():
        record = json.loads(arguments.results.read_text())
    else:
        record["setup"] = {key: str(value) for key, value in vars(arguments).items() if not isinstance(value, Path)} | {
            "teacher": arguments.checkpoint is not None, "test_images": len(study.splits.open_test())}

    def keep() -> None:
        write_json(arguments.results, record)
        write_atomically(arguments.results.with_suffix(".md"), table(record).encode())

    (limits_on_digits if arguments.digits else compare)(study, record, serving, keep)
    keep()
    print(table(record))


if __name__ == "__main__":
    main()
