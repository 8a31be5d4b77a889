"""The end of a search: the winner trains for what is left of the time, becomes what is served, and is measured."""

from __future__ import annotations

import copy
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import fx

from architectures.architecture import Architecture
from architectures.weights import read_weights
from compress.evaluation.measure import measure_accuracy
from compress.packaging.export import export
from compress.quantization.aware import prepare_aware, restored
from compress.quantization.candidates import Candidate, SearchRequest
from compress.quantization.search import Search
from compress.quantization.static import Calibration, int8_rows, layers_of
from compress.quantization.weights import WEIGHT_FORMS
from compress.quantization.workbench import OnnxWorkbench
from compress.search.bench import Bench
from compress.search.clock import SearchClock
from compress.search.entrants import Entrant, RaceState
from compress.search.race import FEWEST_STEPS
from compress.search.serving import Deployed, Stopwatch, Workshop
from compress.search.solve import KB, Limits
from compress.search.timed import in_steps, step_seconds, train_within
from compress.search.verdict import described, violation
from compress.training.loop import train
from metadata.formats import write_weights
from metadata.machine import torch_threads

TRAINED, AWARE = "checkpoint-final-weights.pth", "checkpoint-aware-weights.pth"
MAX_DROP = 0.003  # of validation accuracy by static int8, see compress/quantization/search.py
TRIALS = {"float32": 1, "int8_dynamic": 3, "int8_static": 14}  # int8 networks that are made and counted, about
AWARE_SHARE = 0.12  # of the minutes, for quantization-aware training where static int8 loses accuracy
PAYS = 0.002  # of validation accuracy: a loss below this is not trained for
MOST_RESERVED = 0.3  # of the minutes, for all that follows the training
FEW_IMAGES, MOST_IMAGES = 32, 5000  # validation images of one trial
COUNTING = 0.015  # of the minutes at most, for the images of one trial
LEAST_AWARE = 0.03  # of the minutes; a shorter quantization-aware training is none
AWARE_RATE = 0.1  # of the peak learning rate
SAFE = 0.9  # of the time is planned for
CALIBRATION_BATCH, ROW_EXAMPLES = 128, 16  # images


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What a search found.

    Args:
        entrant: with its measurements as served.
        deployed: the network as it is served.
        layers: of an ONNX file: which layers are int8, and why the others are not.
        portability: of an ONNX file, see compress/quantization/portability.py.
    """

    entrant: Entrant
    deployed: Deployed
    layers: dict[str, str] = field(default_factory=dict)
    portability: dict[str, Any] | None = None


@dataclass(frozen=True, kw_only=True)
class Finish:
    """The last steps of a search.

    Args:
        bench: on which the winner trains.
        workshop: makes it ready to be served.
        stopwatch: times it, beside the student as it is served.
        limits: that it should keep.
        state: takes what is measured.
        clock: of the search.
        keep: writes the state.
        say: shows a line.
    """

    bench: Bench
    workshop: Workshop
    stopwatch: Stopwatch
    limits: Limits
    state: RaceState
    clock: SearchClock
    keep: Callable[[], None]
    say: Callable[[str], None]

    def answer(self, winner: Entrant) -> Answer:
        """Train the winner for what is left of the minutes, and return it as it is served."""
        # What an earlier sitting has measured at this point is measured again.
        self.state.entrants = [entrant for entrant in self.state.entrants if entrant.status not in ("trained", "answer")]
        reserved, images = self._reserved(winner)
        network, architecture = self._trained(winner, reserved)
        started = self.clock.spent
        found = self._served(winner, network, architecture, images)
        seconds = self.clock.spent - started  # of what follows a quantization-aware training once more
        lost = self._lost(network, (found.entrant.correct or 0, found.entrant.images))
        left = self.clock.left - seconds
        if winner.form == "int8_static" and lost > PAYS and left > LEAST_AWARE * self.clock.seconds:
            self.say(f"  static int8 loses {lost:.2%}: trained further as int8 computes; {self.clock.said()}")
            aware = self._aware(network, left)
            again = self._served(winner, aware, architecture, images, "quantization-aware, ")
            found = max(found, again, key=lambda answer: self._order(answer.entrant))
        found.entrant.status = "answer"
        self.keep()
        return found

    # ---------------------------------------------------------------------------------------------------- training

    def _reserved(self, winner: Entrant) -> tuple[float, int]:
        """Return the seconds to keep for what follows the training, and the validation images to count trials on."""
        network, architecture = self.bench.network(winner)
        started = time.monotonic()
        deployed = self.workshop.deploy(network, architecture, winner.serving)
        making = time.monotonic() - started
        started = time.monotonic()
        self._correct(deployed, FEW_IMAGES)
        an_image = (time.monotonic() - started) / FEW_IMAGES
        most = min(MOST_IMAGES, len(self.bench.data.validation))
        images = min(most, max(FEW_IMAGES, int(COUNTING * self.clock.seconds / an_image)))
        seconds = TRIALS[winner.form] * (making + images * an_image) + making
        if winner.form == "int8_static" and self._lost(network, self._correct(deployed, images)) > PAYS:
            seconds += AWARE_SHARE * self.clock.seconds
        return min(seconds, MOST_RESERVED * self.clock.seconds), images

    def _lost(self, network: fx.GraphModule, served: tuple[int, int]) -> float:
        """Return how much validation accuracy a network loses as it is served: right answers, of so many images."""
        ids = self.bench.data.validation.sample(served[1])
        as_float = measure_accuracy(network.to("cpu"), self.bench.data.validation.batches(128, ids),
                                    self.workshop.preprocessing, len(ids))
        return (as_float.correct - served[0]) / served[1]

    def _trained(self, winner: Entrant, reserved: float) -> tuple[fx.GraphModule, Architecture]:
        """Return the winner, trained until the reserved seconds are left."""
        network, architecture = self.bench.network(winner)
        path, bench = self.bench.folder / TRAINED, self.bench
        if path.is_file():
            network.load_state_dict(read_weights(path))
            return network, architecture
        end = self.clock.seconds - reserved
        self.say(f"  candidate {winner.name} trains in full; {self.clock.said()}")
        winner.steps += train_within(
            network, bench.data, bench.loss, bench.settings, left=lambda: max(end - self.clock.spent, 0.0),
            pace=winner.pace or 1.0, most_steps=bench.settings.total_steps(len(bench.data.train)), label="search",
            seed=bench.seed, device=bench.device, checkpoint=bench.folder / "checkpoint-final.pth", tracker=bench.tracker)
        write_weights(path, network.cpu().state_dict())
        self.keep()
        return network, architecture

    def _aware(self, network: fx.GraphModule, seconds: float) -> fx.GraphModule:
        """Return the network after training with weights and activations rounded as in static int8."""
        path, bench = self.bench.folder / AWARE, self.bench
        if path.is_file():
            aware = copy.deepcopy(network)
            aware.load_state_dict(read_weights(path))
            return aware
        settings = bench.settings.model_copy(update={"precision": "float32", "lr": AWARE_RATE * bench.settings.lr})
        examples = self.workshop.examples.to(bench.device).split(CALIBRATION_BATCH)
        pace = step_seconds(prepare_aware(copy.deepcopy(network).to(bench.device), examples), bench.data, bench.loss,
                                settings, bench.device)
        steps = max(FEWEST_STEPS, int(SAFE * seconds / pace))
        rounded = prepare_aware(copy.deepcopy(network).to(bench.device), examples, freeze_after=steps // 2)
        train(rounded, bench.data, bench.loss, in_steps(settings, steps, len(bench.data.train)), label="quantization-aware",
              seed=bench.seed, device=bench.device, checkpoint=bench.folder / "checkpoint-aware.pth", tracker=bench.tracker)
        aware = restored(rounded.cpu(), network)
        write_weights(path, aware.state_dict())
        return aware

    # ----------------------------------------------------------------------------------------------------- serving

    def _served(self, winner: Entrant, network: fx.GraphModule, architecture: Architecture, images: int,
                how: str = "") -> Answer:
        """Return the network in the best of the ways to make it int8 that keep the limits, by validation accuracy."""
        network = network.cpu().eval()
        if winner.form == "int8_static":
            trials = self._static(winner, network, architecture, images, how)
        else:
            forms = WEIGHT_FORMS if winner.form == "int8_dynamic" else WEIGHT_FORMS[:1]
            trials = [self._trial(winner, self.workshop.deploy(network, architecture, winner.serving, form), images,
                                  how + (f"{form} weights" if winner.form == "int8_dynamic" else ""))
                      for form in forms]
        timings = self.stopwatch.times([trial.deployed.answer for trial in trials])
        self.state.student_ms[winner.serving.name] = self.stopwatch.calm_ms
        for trial, timing in zip(trials, timings, strict=True):
            trial.entrant.latency_ms, trial.entrant.noise = timing.latency_ms, timing.noise
            self.say(f"  {described(trial.entrant)}, {trial.entrant.quantized or 'float32'}")
        self.keep()
        return max(trials, key=lambda trial: self._order(trial.entrant))

    def _order(self, entrant: Entrant) -> tuple[int, float]:
        """Return what is compared of two answers: first whether it keeps the limits, then accuracy."""
        return -violation(entrant, self.limits), entrant.accuracy or 0.0

    def _trial(self, winner: Entrant, deployed: Deployed, images: int, how: str) -> Answer:
        """Count a network's right answers as it is served, and add it to the state."""
        correct, count = self._correct(deployed, images)
        entrant = winner.model_copy(update={
            "id": self.state.next_id(), "status": "trained", "quantized": how, "size_bytes": deployed.size_bytes,
            "correct": correct, "images": count, "latency_ms": None})
        self.state.entrants.append(entrant)
        return Answer(entrant=entrant, deployed=deployed)

    def _correct(self, deployed: Deployed, images: int) -> tuple[int, int]:
        """Return the right answers on validation images, one at a time as images are served, and how many there are."""
        split = self.bench.data.validation
        ids = split.sample(images)
        with torch_threads(self.workshop.threads):
            found = measure_accuracy(deployed.answer, split.batches(1, ids), self.workshop.preprocessing, len(ids))
        return found.correct, found.total

    def _static(self, winner: Entrant, network: fx.GraphModule, architecture: Architecture, images: int,
                how: str) -> list[Answer]:
        """Return the static int8 networks that the accuracy-aware search finds best, within the limit of bytes."""
        exported, folded = export(network, architecture)
        calibration = Calibration(exported, self.workshop.examples.numpy(), torch.get_num_threads())
        assert winner.backend != "torch"
        request = SearchRequest(max_drop=MAX_DROP, portable=True, budget_seconds=max(self.clock.left, 1.0))
        with tempfile.TemporaryDirectory() as folder:
            workbench = OnnxWorkbench(calibration, self.bench.data.validation, images, self.workshop.preprocessing,
                                      folder=Path(folder))
            found = Search(workbench, request, [winner.backend], lambda text: None).run()
        small = [candidate for candidate in found.candidates if self.limits.size_kb is None
                 or len(candidate.content) <= KB * self.limits.size_kb]
        some = [candidate for candidate in small if candidate is found.best] or sorted(
            small or [found.best], key=lambda candidate: -candidate.correct)[:1]
        if self.limits.latency_ms is not None and small:
            some += [candidate for candidate in [min(small, key=lambda candidate: candidate.latency_ms or 0.0)]
                     if candidate not in some]
        return [self._static_trial(winner, candidate, calibration, folded, images, how) for candidate in some]

    def _static_trial(self, winner: Entrant, candidate: Candidate, calibration: Calibration, folded: Architecture,
                      images: int, how: str) -> Answer:
        assert winner.backend != "torch"
        trial = self._trial(winner, self.workshop.opened(candidate.content, folded, winner.backend), images,
                            how + candidate.name)
        why = dict.fromkeys(candidate.kept_float, candidate.reason) | dict.fromkeys(
            candidate.settings.ends([node.name for node in layers_of(calibration.model)]), "first or last layer")
        rows = int8_rows(calibration, candidate.quantized, calibration.images[:ROW_EXAMPLES], why, {})
        return replace(trial, layers={row.layer: f"{row.dtype}: {row.reason}" for row in rows},
                       portability=candidate.portability)
