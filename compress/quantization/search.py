"""The search for a static int8 form of a network: candidates are built, and chosen by what was measured of them.

First the operators that get integers and the runtime are chosen by time, for neither changes the accuracy by much where
the runtime does what the file says, to which it is held. Then
ways to calibrate and to correct are tried one after another, and one in which layers stay float that int8 makes slower.
If none keeps the accuracy, layers return to float, those first whose rounding alone disturbs the logits most. Whatever
happens, the best candidate is there at the end.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from torch import Tensor

from compress.evaluation.measure import measure_accuracy
from compress.evaluation.runtimes import answering, open_onnx
from compress.packaging.export import check_same
from compress.quantization.calibration import RANGES, session
from compress.quantization.candidates import Candidate, Found, SENSITIVE, SLOWER, Wanted, name_of
from compress.quantization.int8_table import check_excluded
from compress.quantization.layer_times import layer_times
from compress.quantization.portability import Backend, verify_portability
from compress.quantization.static import (Calibration, Int8Network, OPERATORS, Operators, StaticSettings, layer_weights,
                                          layers_of, quantize_static)
from compress.training.assessment import interleaved_times
from loaders.arrays import Split
from loaders.images import normalize
from metadata.errors import UserError, VerificationError, first_line
from metadata.files import write_atomically
from metadata.schemas import Preprocessing

SENSITIVITY_IMAGES, FLOAT_IMAGES = 64, 32
PORTABILITY_IMAGES, PORTABILITY_BYTES = 2048, 2**29  # at most, of the validation images
AS_FAST = 1.03  # times the fastest: nobody can tell them apart on a shared machine
OTHER_NOISE = 4  # times the power of ONNX Runtime's own rounding noise: a runtime with more computes something else
FLOAT_SHARE = 0.02  # of the weights, at most, stay float for speed: the file is to be a quarter
Side = tuple[Operators | None, Backend]  # which operators get integers (None: a float network), and who computes


class Search:
    """One network's search.

    Args:
        calibration: the float network, with held-in images.
        split: held-out images to choose by.
        images: so many of them at most, drawn at random.
        preprocessing: of both.
        backends: runtimes to choose from.
        wanted: the goal.
        folder: for files while they are measured.
        say: shows a line to the user.
        keep: is given the candidates, the best first, whenever there is a new one: a search that is killed has not been
            for nothing.
    """

    def __init__(self, calibration: Calibration, split: Split, images: int, preprocessing: Preprocessing,
                 backends: Sequence[Backend], wanted: Wanted, folder: Path, say: Callable[[str], None],
                 keep: Callable[[list[Candidate]], None] = lambda candidates: None) -> None:
        self.calibration, self.split, self.preprocessing, self.wanted = calibration, split, preprocessing, wanted
        self.ids, self.folder, self.say, self.keep = split.sample(images), folder, say, keep
        self.floats: bytes = calibration.model.SerializeToString()
        self.images, self.names = len(self.ids), [node.name for node in layers_of(calibration.model)]
        check_excluded("quantize_static", wanted.exclude, self.names)
        channels, height, width = calibration.images.shape[1:]
        self.input_shape = channels, height, width
        self.deadline = time.monotonic() + wanted.budget_seconds
        self.candidates: list[Candidate] = []
        self.not_tried: list[str] = []
        self.failed: dict[str, str] = {}
        self.backends, self.backend = list(backends), backends[0]

    def run(self) -> Found:
        """Searches; see the module."""
        operators, times = self._choose_operators()
        self.float_correct = self._measure(self.floats)
        first = StaticSettings(operators)
        self._try(first)
        base = self._best_of([first, *(replace(first, method=method) for method in RANGES if method != first.method)])
        for settings in (replace(base, reduced=True), replace(base, correct=False), replace(base, equalise=True),
                         replace(base, float_ends=True), replace(base, activations="int8"),
                         replace(base, images=max(1, len(self.calibration.images) // 8))):
            self._try(settings)
        self._try_for_speed(base)
        self._time()
        sensitivity: dict[str, float] = {}
        chosen = self._acceptable()
        if chosen is None and time.monotonic() < self.deadline:
            sensitivity = self._return_layers()
            self._time()
            chosen = self._acceptable()
        best = chosen or self._closest()
        self._holds(best, whatever_it_takes=True)
        for candidate in self.candidates:  # those that were nearly chosen, for the record
            if self._meets(candidate):
                self._holds(candidate)
        return Found(best, chosen is not None, self.candidates, self.not_tried, self.failed, self.float_correct,
                     self.images, self.float_ms, self.backend, times, sensitivity)

    # ------------------------------------------------------------------------------------------------ candidates

    def _choose_operators(self) -> tuple[Operators, list[dict[str, Any]]]:
        """The operators and the runtime of the fastest network; of those that are as fast the first."""
        self._drop_broken_backends()
        sides: list[Side] = [
            (operators, backend) for operators in (None, *OPERATORS) for backend in self.backends]
        networks = {operators: quantize_static(self.calibration, StaticSettings(operators), self.wanted.exclude)
                    for operators in OPERATORS}
        files = {operators: network.model.SerializeToString() for operators, network in networks.items()}
        answers = [self._open(files[operators] if operators else self.floats, backend) for operators, backend in sides]
        taken = dict(zip(sides, interleaved_times(answers, self.input_shape), strict=True))
        wrong = self._wrong(networks, dict(zip(sides, answers, strict=True)))
        int8 = {(operators, backend): ms for (operators, backend), ms in taken.items()
                if operators and (operators, backend) not in wrong}
        (chosen, self.backend), ms = next(item for item in int8.items() if item[1] <= AS_FAST * min(int8.values()))
        self.say(f"  {self.backend}, integers for operators {chosen!r}: {ms:.3f} ms; float "
                 f"{taken[None, self.backend]:.3f} ms")
        return chosen, [{"operators": operators or "float", "backend": backend, "latency_ms": ms,
                         "exact": (operators, backend) not in wrong} for (operators, backend), ms in taken.items()]

    def _wrong(self, networks: dict[Operators, Int8Network], answers: dict[Side, Callable[[Tensor], Tensor]]) -> set[Side]:
        """Runtimes whose int8 answers are much farther from the float network's than ONNX Runtime's; not if it is all."""
        images, expected = self._probe
        exact = {operators: torch.from_numpy(self._logits(network.model, images.numpy()))
                 for operators, network in networks.items()}
        least, wrong = 1e-12 * float(expected.square().mean()), set[Side]()
        for (operators, backend), answer in answers.items():
            if operators:
                noise, allowed = (float((logits - expected).square().mean())
                                  for logits in (_singly(answer, images), exact[operators]))
                if not noise <= OTHER_NOISE * allowed + least:
                    wrong.add((operators, backend))
                    self.say(f"  {backend}, integers for operators {operators!r}: {noise / max(allowed, 1e-30):.0f} times "
                             "ONNX Runtime's rounding noise")
        return wrong if len(wrong) < len(networks) * len(self.backends) else set()

    @cached_property
    def _probe(self) -> tuple[Tensor, Tensor]:
        """Some calibration images, and the float network's logits for them on ONNX Runtime, to hold runtimes to."""
        images = self.calibration.images[:FLOAT_IMAGES]
        return torch.from_numpy(images), torch.from_numpy(self._logits(self.calibration.model, images))

    def _drop_broken_backends(self) -> None:
        """Leaves out a runtime that cannot even serve the float network as it is, unless it is the only one."""
        images, expected = self._probe
        for backend in list(self.backends):
            try:
                check_same(expected, _singly(self._open(self.floats, backend), images))
            except (UserError, VerificationError) as error:
                if len(self.backends) == 1:
                    raise
                self.backends.remove(backend)
                self.say(f"  {backend} is left out: {error}")

    def _try(self, settings: StaticSettings, kept_float: tuple[str, ...] = (), reason: str = SENSITIVE) -> Candidate | None:
        """A candidate, measured; None when there is no time left for it."""
        for known in self.candidates:
            if (known.settings, known.kept_float) == (settings, kept_float):
                return known
        if self.candidates and time.monotonic() > self.deadline:
            self.not_tried.append(name_of(settings, kept_float, reason))
            return None
        stay = {*kept_float, *self.wanted.exclude}
        if len(stay | settings.ends(self.names)) == len(self.names):
            return None  # nothing would be int8
        try:
            quantized = quantize_static(self.calibration, settings, stay)
            content = quantized.model.SerializeToString()
            correct = self._measure(content)
        except (UserError, VerificationError, RuntimeError) as error:  # the runtimes' own are RuntimeErrors
            name = name_of(settings, kept_float, reason)
            self.failed[name] = first_line(error)
            self.say(f"  {name}: fails: {first_line(error)}")
            return None
        candidate = Candidate(settings, kept_float, reason, quantized, content, correct, self.images)
        self.candidates.append(candidate)
        self.say(f"  {candidate.name}: {correct}/{self.images} ({correct / self.images:.2%})")
        self.keep(sorted(self.candidates, key=lambda candidate: -candidate.correct))
        return candidate

    def _best_of(self, tried: list[StaticSettings]) -> StaticSettings:
        """The most accurate of them; of equals the first."""
        candidates = [candidate for settings in tried if (candidate := self._try(settings))]
        if not candidates:
            raise VerificationError("quantize_static: no candidate can be built and run: "
                                    + "; ".join(f"{name}: {error}" for name, error in self.failed.items()))
        return max(candidates, key=lambda candidate: candidate.correct).settings

    def _try_for_speed(self, settings: StaticSettings) -> None:
        """A candidate that leaves those layers float that the runtime's own profile finds slower in int8.

        They are the layers that save most time for their weights. What it takes to change to and fro between the types is
        in no layer's time; the candidate's own latency tells.
        """
        if time.monotonic() > self.deadline:
            return
        tried = self._try(settings)
        assert tried is not None  # it is the best of those that were tried
        image = self.calibration.images[:1]
        as_float, as_int8 = (layer_times(model, self.backend, image)
                             for model in (self.calibration.model, tried.quantized.model))
        floats = {*self.wanted.exclude, *settings.ends(self.names)}
        weights = layer_weights(self.calibration.model)
        saved = {name: (as_int8[name] - as_float[name]) / weights[name] for name in self.names if name not in floats
                 and name in as_float and AS_FAST * as_float[name] < as_int8.get(name, 0.0)}
        left, slower = FLOAT_SHARE * sum(weights.values()), []
        for name in sorted(saved, key=saved.__getitem__, reverse=True):
            if weights[name] <= left:
                left -= weights[name]
                slower.append(name)
        if slower and (candidate := self._try(settings, tuple(slower), SLOWER)):
            candidate.int8_ms = {name: as_int8[name] for name in slower}

    def _return_layers(self) -> dict[str, float]:
        """Candidates with ever more layers in float, and the sensitivities by which they were chosen."""
        portable = [candidate for candidate in self.candidates if not self.wanted.portable or self._holds(candidate)]
        settings = max(portable or self.candidates, key=lambda candidate: candidate.correct).settings
        sensitivity = self._sensitivity(settings)
        order = sorted(sensitivity, key=sensitivity.__getitem__, reverse=True)
        low, high = 0, 1
        while (candidate := self._try(settings, tuple(order[:high]))) and not self._meets(candidate):
            low, high = high, min(2 * high, len(order) - 1)  # one at least is int8
            if low == high:
                return sensitivity
        while candidate and high - low > 1:  # more than low layers are needed, high are enough
            middle = (low + high) // 2
            candidate = self._try(settings, tuple(order[:middle]))
            if candidate:
                low, high = (low, middle) if self._meets(candidate) else (middle, high)
        return sensitivity

    def _sensitivity(self, settings: StaticSettings) -> dict[str, float]:
        """How much each layer alone disturbs the logits when it becomes int8; of those that the settings make int8."""
        images = self.calibration.images[:SENSITIVITY_IMAGES]
        network = self.calibration.network(settings.equalise)
        expected = self._logits(network, images)
        scale = float(np.square(expected - expected.mean(axis=1, keepdims=True)).mean())
        found: dict[str, float] = {}
        floats = {*self.wanted.exclude, *settings.ends(self.names)}
        for name in self.names:
            if name not in floats and (not found or time.monotonic() < self.deadline):
                alone = quantize_static(self.calibration, replace(settings, float_ends=False), only=[name])
                got = self._logits(alone.model, images)
                found[name] = float(np.square(got - expected).mean()) / max(scale, 1e-30)
        return found

    # ------------------------------------------------------------------------------------------------- measuring

    def _open(self, content: bytes, backend: str) -> Callable[[Tensor], Tensor]:
        path = self.folder / "candidate.onnx"
        write_atomically(path, content)
        answer = answering(open_onnx(path, self.input_shape, self.preprocessing, backend))
        path.unlink()
        return answer

    def _measure(self, content: bytes) -> int:
        """Right answers on the validation images, singly, as they will be served: kernels differ with the batch."""
        result = measure_accuracy(self._open(content, self.backend), self.split.batches(1, self.ids), self.preprocessing,
                                  self.images)
        return result.correct

    def _logits(self, model: onnx.ModelProto, images: Any) -> Any:
        return session(model, self.calibration.threads).run(None, {model.graph.input[0].name: images})[0]

    def _time(self) -> None:
        """The latency of the candidates that may be chosen, or have none yet, in turns with each other."""
        timed = [candidate for candidate in self.candidates if candidate.latency_ms is None or self._meets(candidate)]
        files = [self.floats, *(candidate.content for candidate in timed)]
        answers = [self._open(content, self.backend) for content in files]
        self.float_ms, *taken = interleaved_times(answers, self.input_shape)
        for candidate, ms in zip(timed, taken, strict=True):
            candidate.latency_ms = ms

    # --------------------------------------------------------------------------------------------------- choosing

    def _meets(self, candidate: Candidate) -> bool:
        return self.float_correct - candidate.correct <= self.wanted.max_drop * self.images + 1e-9

    def _holds(self, candidate: Candidate, whatever_it_takes: bool = False) -> bool:
        """Whether its accuracy is known to hold on CPUs without VNNI, too; after the deadline nothing more is looked at."""
        if candidate.portability is None and (whatever_it_takes or time.monotonic() < self.deadline):
            images, labels = self._sample
            found: dict[str, Any] = verify_portability(
                candidate.content, images, labels, self.wanted.max_drop, self.backend, self.calibration.threads)
            dropped = (self.float_correct - candidate.correct) / self.images + found.get("accuracy", 0.0) - found.get(
                "accuracy_saturating", 0.0)
            if found["holds"] and self._meets(candidate) and dropped > self.wanted.max_drop + 1e-9:
                found |= {"holds": False, "verdict": f"does not hold: with what int8 loses anyway, {dropped:.2%} is lost "
                                                     f"against float, more than the tolerated {self.wanted.max_drop:.2%}"}
            candidate.portability = found
        return candidate.portability is not None and bool(candidate.portability["holds"])

    @cached_property
    def _sample(self) -> tuple[Tensor, Tensor]:
        """Some of the validation images, preprocessed, and their labels, for the emulation of such CPUs."""
        count = min(PORTABILITY_IMAGES, max(1, PORTABILITY_BYTES // self.calibration.images[0].nbytes))
        ids = self.ids[torch.linspace(0, self.images - 1, min(count, self.images)).long()]
        images = self.split.images.batch(ids).cpu()
        return normalize(images, self.preprocessing), self.split.labels[ids.to(self.split.labels.device)].cpu()

    def _acceptable(self) -> Candidate | None:
        """The best of those that are as asked: the most accurate of the fastest."""
        left = [candidate for candidate in self.candidates if self._meets(candidate)]
        while left:
            fastest = min(candidate.milliseconds for candidate in left)
            as_fast = [candidate for candidate in left if candidate.milliseconds <= AS_FAST * fastest]
            best = max(as_fast, key=lambda candidate: (candidate.correct, -len(candidate.content)))
            if not self.wanted.portable or self._holds(best, whatever_it_takes=True):
                return best
            left.remove(best)
        return None

    def _closest(self) -> Candidate:
        """Where none is as asked: the most accurate, of those that hold everywhere if that was asked and there are any."""
        holding = [candidate for candidate in self.candidates if self.wanted.portable and self._holds(candidate)]
        return max(holding or self.candidates, key=lambda candidate: candidate.correct)


def _singly(answer: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
    """(N, C, H, W) -> (N, classes), one image at a time, as they will be served."""
    return torch.cat([answer(image[None]) for image in images])
