"""Stage `search`: the most accurate network that keeps limits of time and bytes, found and trained within some minutes."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import Field
from rich import box
from rich.console import Console
from rich.table import Table

from architectures.describe import carry_over, describe
from compress.pipeline.stage import Context, OnnxCard, OnnxModel, Sketch, Stage, TeacherModel, TorchModel
from compress.search.clock import SearchClock
from compress.search.cluster import Teaching, cluster_trainer
from compress.search.entrants import Entrant
from compress.search.finish import Answer
from compress.search.model_search import ModelSearch, SearchOrder
from compress.search.serving import servings
from compress.search.solve import KB, Limits
from compress.search.space import Space
from compress.training.distillation import TeacherLoss
from compress.training.settings import TrainingSettings
from compress.training.workers import check_ray, check_reachable
from metadata.errors import UserError

EXAMPLES = 512  # training images to calibrate with
COSTS = ".costs"  # beside the runs: what was measured of this machine
STEPS = {"float32": [], "int8_dynamic": ["dynamic_quantization"], "int8_static": ["onnx_export", "static_quantization"]}


class Search(TeacherLoss, Stage):
    """Limits in, the best sub-network of the student out: widths of all groups, depth, form of the weights."""

    history = "search"

    latency_ms: float | None = Field(None, gt=0, description="largest latency at batch 1 on this machine")
    size_kb: float | None = Field(None, gt=0, description="largest weights file, in units of 1000 bytes")
    min_accuracy: float | None = Field(None, gt=0, le=1, description="smallest validation accuracy, a fraction; alone, the "
                                       "fastest network that has it is searched for")
    minutes: float = Field(30.0, gt=0, description="of the search, from the trained student on, over all sittings")
    backend: Literal["auto", "torch", "onnxruntime", "openvino"] = Field(
        "auto", description="the runtime to serve on; auto: the fastest of the installed ones")
    threads: int = Field(1, ge=1, le=1024, description="of one inference")
    criteria: list[Literal["l1", "l2", "bn_scale", "fpgm", "taylor", "random"]] = Field(
        ["taylor", "l2"], min_length=1, description="channel importance; each criterion has solutions in the race")
    depth: bool = Field(True, description="let residual blocks go, in some of the solutions")
    samples: int = Field(36, ge=6, description="random sub-networks whose losses correct each importance")
    train: TrainingSettings = Field(TrainingSettings(epochs=1000, lr=0.05), description="of all trainings; the minutes "
                                    "decide on their lengths, `epochs` is the most that the last one takes")

    ray: str | None = Field(None, description="address of a Ray cluster that trains the candidates of the race: HOST:PORT, "
                                              "auto or local")

    WHERE: ClassVar = frozenset({"ray"})

    @property
    def limits(self) -> Limits:
        """The limits."""
        return Limits(latency_ms=self.latency_ms, size_kb=self.size_kb, min_accuracy=self.min_accuracy)

    def check(self, sketch: Sketch) -> None:
        sketch.refuse_int8("search")
        sketch.check_training("search", self.train)
        if self.limits == Limits(latency_ms=None, size_kb=None, min_accuracy=None):
            raise UserError("search: expected a limit, got none; give latency_ms, size_kb or min_accuracy")
        possible = servings(self.backend)
        if self.ray:
            check_ray()
            check_reachable(self.ray)
        self.check_classes("search", sketch.card.num_classes)
        if self.by_features:
            raise UserError(f"search.method {self.method}: features are compared by the stage distill alone; set kd, "
                            "standardized, dkd or dist")
        text = ", ".join(f"{key} {value:g}" for key in ("latency_ms", "size_kb", "min_accuracy")
                         if (value := getattr(self, key)) is not None)
        if sketch.model is not None:
            space = Space.of(describe(sketch.model, sketch.card.input_shape), sketch.model.state_dict())
            text += f"; {len(space.groups)} groups of channels and {len(space.blocks)} blocks"
            if self.size_kb is not None:
                least = min(space.size_bytes(space.smallest(self.depth), serving.form) for serving in possible)
                if least > KB * self.size_kb:
                    raise UserError(f"search.size_kb {self.size_kb:g}: no sub-network is so small; the least is "
                                    f"{least / KB:.1f} kB; raise the limit, or search in a smaller student")
        sketch.lines.append(f"{text}, {self.minutes:g} minutes, on {self.backend}")

    def run(self, model: TorchModel, context: Context) -> TorchModel | OnnxModel:
        order = SearchOrder(limits=self.limits, backend=self.backend, threads=self.threads, criteria=self.criteria,
                            depth=self.depth, samples=self.samples, costs_folder=context.run_folder.parent / COSTS)
        train, teacher = context.usable(self.train), context.latest(TeacherModel)
        teaching = Teaching(teacher=None if teacher is None else teacher.reference, settings=train,
                            method=TeacherLoss(**{key: getattr(self, key) for key in TeacherLoss.model_fields}))
        module = None if teacher is None else teacher.module
        with SearchClock(context.folder / "clock.json", 60 * self.minutes) as clock:
            search = ModelSearch(
                order=order, student=model.module.cpu(), architecture=model.architecture, data=context.data(self.train),
                teaching=teaching, teacher=module, examples=context.examples(EXAMPLES), seed=context.seed,
                device=context.device, folder=context.folder, tracker=context.tracker, clock=clock, warn=context.warn,
                elsewhere=cluster_trainer(self.ray, teaching, module, context.splits.card) if self.ray else None)
            try:
                answer = search.run()
            finally:
                print_front(search.state.entrants, context.tracker.console)
            context.training_seconds = clock.spent
            context.note("minutes", {"allowed": self.minutes, "taken": round(clock.spent / 60, 3)})
        context.note("answer", answer.entrant.model_dump(mode="json"))
        context.note("servings", search.state.servings)
        return self._result(answer)

    def _result(self, answer: Answer) -> TorchModel | OnnxModel:
        """Return the answer as what the next stage takes."""
        deployed, entrant = answer.deployed, answer.entrant
        steps = [*deployed.architecture.compression_steps, self.history, *STEPS[entrant.form]]
        architecture = carry_over(deployed.architecture, deployed.architecture, compression_steps=steps)
        if deployed.module is not None:
            return TorchModel(deployed.module, architecture)
        assert entrant.backend != "torch"
        return OnnxModel(content=deployed.content, architecture=architecture, card=OnnxCard(
            scheme="static_int8", layers=answer.layers, backend=entrant.backend, portability=answer.portability))


def print_front(entrants: list[Entrant], console: Console) -> None:
    """Print what was measured, as a table."""
    table = Table(title="what the search measured (validation accuracy; latency at batch 1)", box=box.SIMPLE_HEAD,
                  pad_edge=False)
    table.add_column("candidate", overflow="fold")
    for name in ("ms", "±", "kB", "M MACs", "accuracy", "steps"):
        table.add_column(name, justify="right")
    table.add_column("status")
    for entrant in entrants:
        if entrant.latency_ms is None and not entrant.images:
            continue
        cells: list[Any] = ["" if entrant.latency_ms is None else f"{entrant.latency_ms:.3f}", f"{entrant.noise:.1%}",
                            f"{entrant.size_bytes / KB:.1f}", f"{entrant.macs / 1e6:.2f}",
                            "" if entrant.accuracy is None else f"{entrant.accuracy:.2%}", str(entrant.steps)]
        table.add_row(entrant.name + (f", {entrant.quantized}" if entrant.quantized else ""), *cells, entrant.status,
                      style="bold" if entrant.status == "answer" else "")
    console.print(table)
