"""The end of a search: the int8 form is chosen by accuracy within the limits, and lost accuracy is trained for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from compress.search import finish as finishing
from compress.search.bench import Bench
from compress.search.clock import SearchClock
from compress.search.entrants import Entrant, RaceState
from compress.search.finish import AWARE, Finish, TRAINED
from compress.search.serving import Serving, Stopwatch, Workshop
from compress.search.solve import Limits
from compress.search.space import Space
from compress.training.distillation import cross_entropy
from tests.helpers.graphs import graph
from tests.helpers.trainings import quiet, settings, small_data


def last_steps(folder: Path, serving: Serving, limits: Limits, seconds: float = 1e4) -> tuple[Finish, Entrant]:
    """The last steps of a search in a network of a few layers, and its winner."""
    model, architecture = graph("compact_net", size=8, block="residual", widths=[16, 16, 16], depths=[1, 1, 1])
    space, data = Space.of(architecture, model.state_dict()), small_data()
    bench = Bench(space=space, student=model, scores={"l2": {}}, data=data, loss=cross_entropy(0.0),
                  settings=settings(epochs=2), seed=0, device=torch.device("cpu"), folder=folder, tracker=quiet())
    workshop = Workshop(examples=torch.rand(16, 3, 8, 8, generator=torch.Generator().manual_seed(0)),
                        preprocessing=data.preprocessing, threads=1, folder=folder)
    winner = Entrant(id=0, criterion="l2", solver="milp", depth=False, backend=serving.backend, form=serving.form,
                     widths=dict(space.full().widths), dropped=[], macs=1, parameters=1, size_bytes=0, model="Net",
                     pace=0.01)
    state = RaceState(entrants=[winner])
    return Finish(bench=bench, workshop=workshop, stopwatch=Stopwatch(model, (3, 8, 8), 1, exact=False), limits=limits,
                  state=state, clock=SearchClock(folder / "clock.json", seconds), keep=lambda: state.save(folder),
                  say=lambda text: None), winner


@pytest.mark.parametrize(("serving", "trials"), [(Serving("torch", "float32"), 1), (Serving("torch", "int8_dynamic"), 3)])
def test_every_form_of_the_weights_is_measured_and_one_is_the_answer(serving: Serving, trials: int, tmp_path: Path) -> None:
    end, winner = last_steps(tmp_path, serving, Limits(size_kb=1000))
    answer = end.answer(winner)
    assert [entrant.status for entrant in end.state.entrants].count("answer") == 1 and winner.status == "trained"
    measured = end.state.entrants[1:]
    assert len(measured) == trials and all(each.latency_ms and each.images == 60 for each in measured)
    assert answer.entrant.accuracy == max(each.accuracy or 0.0 for each in measured)
    assert answer.deployed.size_bytes == answer.entrant.size_bytes and (tmp_path / TRAINED).is_file()
    again, winner = last_steps(tmp_path, serving, Limits(size_kb=1000))
    again.state.entrants += [entrant.model_copy() for entrant in measured]  # a killed finish has left them
    assert again.answer(winner).entrant.correct == answer.entrant.correct and len(again.state.entrants) == 1 + trials


@pytest.mark.slow
def test_static_int8_that_loses_accuracy_is_trained_further(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Any loss pays here, even a gain: the quantization-aware training takes place, and the better of the two is taken."""
    monkeypatch.setattr(finishing, "PAYS", -1.0)
    monkeypatch.setattr(finishing, "TRIALS", {"int8_static": 0})
    end, winner = last_steps(tmp_path, Serving("onnxruntime", "int8_static"), Limits(size_kb=1000), seconds=30.0)
    seen: list[dict[str, Any]] = []
    answer = end.answer(winner)
    seen += [entrant.row() for entrant in end.state.entrants]
    assert (tmp_path / AWARE).is_file()
    assert any("quantization-aware" in row["settings"] for row in seen)
    assert answer.deployed.content and set(answer.layers) and answer.portability is not None
    best = max(entrant.accuracy or 0.0 for entrant in end.state.entrants[1:])
    assert answer.entrant.accuracy == best
