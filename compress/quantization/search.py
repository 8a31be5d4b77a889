"""The search for a static int8 form of a network: build candidates, measure them, and choose by what was measured.

1. Choose the operators that become int8 and the runtime, by latency. Neither changes the accuracy by much, as long as the
   runtime computes what the file says; the search compares each runtime's answers with ONNX Runtime's.
2. Try calibration methods and corrections one after another, and one candidate that keeps those layers float that int8
   makes slower.
3. If no candidate keeps the accuracy, return layers to float, beginning with those whose rounding disturbs the logits most.

The search always ends with its best candidate, whether or not that candidate is good enough.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

from torch import Tensor

from compress.packaging.export import check_same
from compress.quantization.calibration import RANGES
from compress.quantization.candidates import Candidate, SearchRequest, SearchResult, SENSITIVE, SLOWER, name_of
from compress.quantization.int8_table import check_excluded
from compress.quantization.saturation import Backend
from compress.quantization.static import Int8Network, OPERATORS, Operators, StaticSettings
from compress.quantization.weights import WEIGHT_FORMS, WeightForm
from compress.quantization.workbench import Answer, Workbench
from metadata.errors import UserError, VerificationError, first_line

AS_FAST = 1.03  # of the fastest latency: a shared machine cannot tell the two apart
OTHER_NOISE = 4  # of the power of ONNX Runtime's rounding noise: a runtime with more does not compute what the file says
FLOAT_SHARE = 0.02  # of the weights may stay float for speed, so that the file is still a quarter of the float one
Deployment = tuple[Operators | None, Backend]  # the operators that become int8 (None: a float network), and the runtime


class Search:
    """The search for one network.

    Args:
        workbench: builds and measures the candidates.
        request: the goal.
        backends: runtimes to choose from.
        say: shows a line to the user.
        keep: receives all candidates, the best first, after each new one, so that a killed search leaves its best.
    """

    def __init__(self, workbench: Workbench, request: SearchRequest, backends: Sequence[Backend],
                 say: Callable[[str], None], keep: Callable[[list[Candidate]], None] = lambda candidates: None) -> None:
        self.workbench, self.request, self.say, self.keep = workbench, request, say, keep
        self.names, self.images = list(workbench.weights), workbench.images
        check_excluded("quantize_static", request.exclude, self.names)
        self.deadline = workbench.now() + request.budget_seconds
        self.candidates: list[Candidate] = []
        self.not_tried: list[str] = []
        self.failed: dict[str, str] = {}
        self.backends, self.backend = list(backends), backends[0]

    def run(self) -> SearchResult:
        """Run the search; the module's docstring lists the steps.

        Raises:
            UserError: the only runtime is not installed.
            VerificationError: the only runtime cannot serve the float network, or no candidate can be built and run.
        """
        operators, latencies = self._choose_operators()
        self.float_correct = self._count_correct(self.workbench.float_content)
        first = StaticSettings(operators=operators, weights=self._forms()[0])
        self._try(first)
        base = self._best_of([first, *(replace(first, method=method) for method in RANGES if method != first.method)])
        for settings in (*(replace(base, weights=form) for form in self._forms()[1:]), replace(base, correct=False),
                         replace(base, equalise=True), replace(base, float_ends=True), replace(base, activations="int8"),
                         replace(base, images=max(1, self.workbench.calibration_images // 8))):
            self._try(settings)
        self._try_for_speed(base)
        self._time()
        sensitivity: dict[str, float] = {}
        chosen = self._acceptable()
        if chosen is None and self._has_time():
            sensitivity = self._return_layers()
            self._time()
            chosen = self._acceptable()
        best = chosen or self._closest()
        self._holds(best, after_deadline=True)
        for candidate in self.candidates:  # the record also shows those that were nearly chosen
            if self._meets(candidate):
                self._holds(candidate)
        return SearchResult(
            best=best, reached=chosen is not None, candidates=self.candidates, not_tried=self.not_tried,
            failed=self.failed, float_correct=self.float_correct, images=self.images, float_ms=self.float_ms,
            backend=self.backend, latencies=latencies, sensitivity=sensitivity)

    # ------------------------------------------------------------------------------------------------ candidates

    def _forms(self) -> Sequence[WeightForm]:
        """Return the forms of weights to try, the base's first."""
        return WEIGHT_FORMS if self.request.weights is None else (self.request.weights,)

    def _has_time(self) -> bool:
        return self.workbench.now() < self.deadline

    def _choose_operators(self) -> tuple[Operators, list[dict[str, Any]]]:
        """Return the operators of the fastest int8 network, and set the runtime; of equally fast ones take the first."""
        self._drop_broken_backends()
        deployments: list[Deployment] = [
            (operators, backend) for operators in (None, *OPERATORS) for backend in self.backends]
        networks = {operators: self.workbench.quantize(
            StaticSettings(operators=operators, weights=self._forms()[0]), self.request.exclude) for operators in OPERATORS}
        files = {operators: network.model.SerializeToString() for operators, network in networks.items()}
        answers = [self.workbench.open(files[operators] if operators else self.workbench.float_content, backend)
                   for operators, backend in deployments]
        latencies = dict(zip(deployments, self.workbench.latencies(answers), strict=True))
        wrong = self._wrong(networks, dict(zip(deployments, answers, strict=True)))
        int8 = {(operators, backend): ms for (operators, backend), ms in latencies.items()
                if operators and (operators, backend) not in wrong}
        (chosen, self.backend), ms = next(item for item in int8.items() if item[1] <= AS_FAST * min(int8.values()))
        self.say(f"  {self.backend}, int8 operators {chosen!r}: {ms:.3f} ms; float {latencies[None, self.backend]:.3f} ms")
        return chosen, [{"operators": operators or "float", "backend": backend, "latency_ms": ms,
                         "exact": (operators, backend) not in wrong} for (operators, backend), ms in latencies.items()]

    def _wrong(self, networks: dict[Operators, Int8Network], answers: dict[Deployment, Answer]) -> set[Deployment]:
        """Return the deployments whose int8 logits are much farther from the float ones than ONNX Runtime's are.

        If every deployment is, return none: there is nothing better to choose.
        """
        expected = self._float_logits
        allowed = {operators: _power(self.workbench.reference(network) - expected)
                   for operators, network in networks.items()}
        least, wrong = 1e-12 * _power(expected), set[Deployment]()
        for (operators, backend), answer in answers.items():
            if operators:
                noise = _power(self.workbench.probe(answer) - expected)
                if not noise <= OTHER_NOISE * allowed[operators] + least:
                    wrong.add((operators, backend))
                    times = noise / max(allowed[operators], 1e-30)
                    self.say(f"  {backend}, int8 operators {operators!r}: {times:.0f} times ONNX Runtime's rounding noise")
        return wrong if len(wrong) < len(networks) * len(self.backends) else set()

    @cached_property
    def _float_logits(self) -> Tensor:
        """The float network's logits on ONNX Runtime, which every runtime is compared with."""
        return self.workbench.reference()

    def _drop_broken_backends(self) -> None:
        """Leave out a runtime that cannot serve the float network, unless it is the only one."""
        for backend in list(self.backends):
            try:
                answer = self.workbench.open(self.workbench.float_content, backend)
                check_same(self._float_logits, self.workbench.probe(answer))
            except (UserError, VerificationError) as error:
                if len(self.backends) == 1:
                    raise
                self.backends.remove(backend)
                self.say(f"  {backend} is left out: {error}")

    def _try(self, settings: StaticSettings, kept_float: tuple[str, ...] = (), reason: str = SENSITIVE) -> Candidate | None:
        """Build and measure a candidate; return None when there is no time left, or it cannot be built or run."""
        for known in self.candidates:
            if (known.settings, known.kept_float) == (settings, kept_float):
                return known
        name = name_of(settings, kept_float, reason)
        if self.candidates and not self._has_time():
            self.not_tried.append(name)
            return None
        stay = {*kept_float, *self.request.exclude}
        if len(stay | settings.ends(self.names)) == len(self.names):
            return None  # no layer would be int8
        try:
            quantized = self.workbench.quantize(settings, stay)
            content = quantized.model.SerializeToString()
            correct = self._count_correct(content)
        except (UserError, VerificationError, RuntimeError) as error:  # the runtimes raise RuntimeErrors of their own
            self.failed[name] = first_line(error)
            self.say(f"  {name}: fails: {first_line(error)}")
            return None
        candidate = Candidate(settings=settings, kept_float=kept_float, reason=reason, quantized=quantized, content=content,
                              correct=correct, images=self.images)
        self.candidates.append(candidate)
        self.say(f"  {name}: {correct}/{self.images} ({correct / self.images:.2%})")
        self.keep(sorted(self.candidates, key=lambda candidate: -candidate.correct))
        return candidate

    def _best_of(self, tried: list[StaticSettings]) -> StaticSettings:
        """Try all of the settings and return the most accurate; of equals the first."""
        candidates = [candidate for settings in tried if (candidate := self._try(settings))]
        if not candidates:
            raise VerificationError("quantize_static: no candidate can be built and run: "
                                    + "; ".join(f"{name}: {error}" for name, error in self.failed.items()))
        return max(candidates, key=lambda candidate: candidate.correct).settings

    def _try_for_speed(self, settings: StaticSettings) -> None:
        """Try a candidate that keeps those layers float that the runtime's profiler finds slower in int8.

        Take the layers that save most time for their weights. The conversions between the types are in no layer's time;
        they show in the candidate's own latency.
        """
        if not self._has_time():
            return
        tried = self._try(settings)
        assert tried is not None  # it is the best of those that were tried
        as_float, as_int8 = (self.workbench.layer_times(network, self.backend) for network in (None, tried.quantized))
        floats = {*self.request.exclude, *settings.ends(self.names)}
        weights = self.workbench.weights
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
        """Try candidates with more and more float layers; return the sensitivities that give the order of the layers.

        Double the number of float layers until the accuracy is reached, then bisect for the smallest number that is enough.
        """
        portable = [candidate for candidate in self.candidates if not self.request.portable or self._holds(candidate)]
        settings = max(portable or self.candidates, key=lambda candidate: candidate.correct).settings
        sensitivity = self._sensitivity(settings)
        order = sorted(sensitivity, key=sensitivity.__getitem__, reverse=True)
        low, high = 0, 1
        while (candidate := self._try(settings, tuple(order[:high]))) and not self._meets(candidate):
            low, high = high, min(2 * high, len(order) - 1)  # at least one layer stays int8
            if low == high:
                return sensitivity
        while candidate and high - low > 1:  # `low` float layers are too few, `high` are enough
            middle = (low + high) // 2
            candidate = self._try(settings, tuple(order[:middle]))
            if candidate:
                low, high = (low, middle) if self._meets(candidate) else (middle, high)
        return sensitivity

    def _sensitivity(self, settings: StaticSettings) -> dict[str, float]:
        """Return the sensitivities of the layers that the settings make int8; at the deadline, those measured so far."""
        floats = {*self.request.exclude, *settings.ends(self.names)}
        found: dict[str, float] = {}
        for name in self.names:
            if name not in floats and (not found or self._has_time()):
                found[name] = self.workbench.sensitivity(settings, name)
        return found

    # ------------------------------------------------------------------------------------------------- measuring

    def _count_correct(self, content: bytes) -> int:
        return self.workbench.count_correct(self.workbench.open(content, self.backend))

    def _time(self) -> None:
        """Measure the latency of the candidates that may be chosen or have none yet, interleaved with each other."""
        timed = [candidate for candidate in self.candidates if candidate.latency_ms is None or self._meets(candidate)]
        files = [self.workbench.float_content, *(candidate.content for candidate in timed)]
        self.float_ms, *latencies = self.workbench.latencies(
            [self.workbench.open(content, self.backend) for content in files])
        for candidate, ms in zip(timed, latencies, strict=True):
            candidate.latency_ms = ms

    # --------------------------------------------------------------------------------------------------- choosing

    def _meets(self, candidate: Candidate) -> bool:
        return self.float_correct - candidate.correct <= self.request.max_drop * self.images + 1e-9

    def _holds(self, candidate: Candidate, after_deadline: bool = False) -> bool:
        """Return whether the candidate is known to keep its accuracy on CPUs without VNNI.

        After the deadline, verify a candidate only with `after_deadline`.
        """
        if candidate.portability is None and (after_deadline or self._has_time()):
            max_drop = self.request.max_drop
            found = self.workbench.portability(candidate.content, self.backend, max_drop)
            dropped = (self.float_correct - candidate.correct) / self.images + found.get("accuracy", 0.0) - found.get(
                "accuracy_saturating", 0.0)
            if found["holds"] and self._meets(candidate) and dropped > max_drop + 1e-9:
                found |= {"holds": False, "verdict": f"does not hold: int8 and saturation together lose {dropped:.2%} "
                                                     f"against float, more than the tolerated {max_drop:.2%}"}
            candidate.portability = found
        return candidate.portability is not None and bool(candidate.portability["holds"])

    def _acceptable(self) -> Candidate | None:
        """Return the best candidate that fulfils the request: the most accurate of the fastest."""
        left = [candidate for candidate in self.candidates if self._meets(candidate)]
        while left:
            fastest = min(candidate.milliseconds for candidate in left)
            as_fast = [candidate for candidate in left if candidate.milliseconds <= AS_FAST * fastest]
            best = max(as_fast, key=lambda candidate: (candidate.correct, -len(candidate.content)))
            if not self.request.portable or self._holds(best, after_deadline=True):
                return best
            left.remove(best)
        return None

    def _closest(self) -> Candidate:
        """Return the most accurate candidate; if portability was requested, of the portable ones if there are any."""
        holding = [candidate for candidate in self.candidates if self.request.portable and self._holds(candidate)]
        return max(holding or self.candidates, key=lambda candidate: candidate.correct)


def _power(tensor: Tensor) -> float:
    return float(tensor.square().mean())
