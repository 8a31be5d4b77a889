"""Stage `prune`: remove whole channels by group importance (torch-pruning), at once or in steps with training between."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, fx, nn

from architectures.counting import architecture_macs, count_macs, count_parameters
from architectures.describe import carry_over, describe
from compress.pipeline.stage import CompressingStage, Context, Sketch, TorchModel
from compress.pruning.groups import widths
from compress.pruning.importance import NEEDS_GRADIENTS, accumulate_gradients
from compress.pruning.prune import NothingRemovedError, prune
from compress.training.assessment import ROUNDS, RUNS, interleaved_times
from compress.training.data import Data, seeded
from compress.training.distillation import cross_entropy
from compress.training.loop import train
from compress.training.settings import TrainingSettings
from loaders.images import center_crop, normalize


class Prune(CompressingStage):
    """Structured pruning."""

    history = "structured_pruning"

    ratio: float = Field(0.3, gt=0, lt=1, description="fraction of channels removed; 0.5 keeps about a quarter of the "
                                                      "weights")
    criterion: Literal["l1", "l2", "bn_scale", "fpgm", "taylor", "random"] = Field("l2", description="channel importance")
    scope: Literal["uniform", "global"] = Field("uniform", description="the same fraction of every layer, or ranked "
                                                                      "over the network")
    multiple: int = Field(8, ge=1, description="round the remaining channels to a multiple; odd widths are slow")
    steps: int = Field(1, ge=1, description="number of steps in which the ratio is reached, with training between")
    train: TrainingSettings = Field(TrainingSettings(epochs=1, lr=0.01), description="training between steps")
    gradient_batches: int = Field(10, ge=1, description="number of batches for criteria that need gradients")

    def check(self, sketch: Sketch) -> None:
        sketch.refuse_int8("prune")
        sketch.check_training("prune", self.train)
        if sketch.model is None:
            return
        before, shape, trainings = sketch.model, sketch.card.input_shape, []

        def untrained(step: int, model: fx.GraphModule) -> fx.GraphModule:
            trainings.append(step)
            return model

        loss = accumulate_gradients(lambda model: [model(torch.randn(2, *shape)).square().sum()])
        sketch.model = self._pruned_in_steps(before, shape, sketch.seed, loss, untrained)
        counts = [(count_parameters(model), architecture_macs(describe(model, shape)))
                  for model in (before, sketch.model)]
        between = f" in {self.steps} steps with {len(trainings)} trainings" if self.steps > 1 else ""
        sketch.lines.append(f"ratio {self.ratio} by {self.criterion}, {self.scope}{between}: about {counts[0][0]:,} -> "
                            f"{counts[1][0]:,} parameters, {counts[0][1]:,} -> {counts[1][1]:,} MACs")

    def run(self, model: TorchModel, context: Context) -> TorchModel:
        shape = model.architecture.input_shape
        data = context.data(self.train)
        original = widths(model.module)

        def trained(step: int, module: fx.GraphModule) -> fx.GraphModule:
            context.training_seconds += train(
                module, data, cross_entropy(self.train.label_smoothing), context.usable(self.train),
                label=f"prune step {step}", seed=context.seed, device=context.device,
                checkpoint=context.folder / f"checkpoint-{step}.pth", tracker=context.tracker).seconds
            return module.to("cpu")

        pruned = self._pruned_in_steps(model.module.to("cpu"), shape, context.seed,
                                       accumulate_gradients(lambda module: self._losses(module, data)), trained)
        after = widths(pruned)
        context.note("channels", {name: [original[name], after[name]] for name in original})
        context.note("parameters", [count_parameters(module) for module in (model.module, pruned)])
        context.note("macs", [count_macs(module, shape) for module in (model.module, pruned)])
        latency = _interleaved_latency(model.module, pruned, shape)
        context.note("latency", latency)
        context.tracker.say(f"  {sum(original.values()):,} -> {sum(after.values()):,} channels; interleaved latency "
                            f"{latency['before_ms']:.2f} -> {latency['after_ms']:.2f} ms ({latency['ratio']:.2f}x)")
        steps = [*model.architecture.compression_steps, self.history]
        rate = round(1 - (1 - model.architecture.pruning_rate) * (1 - self.ratio), 6)  # relative to the unpruned widths
        architecture = carry_over(describe(pruned, shape), model.architecture, pruning_rate=rate,
                                  compression_steps=steps)
        return TorchModel(pruned, architecture)

    def _pruned_in_steps(self, model: fx.GraphModule, shape: tuple[int, int, int], seed: int,
                         gradients: Callable[[nn.Module], None],
                         train_between: Callable[[int, fx.GraphModule], fx.GraphModule]) -> fx.GraphModule:
        """Return the model pruned in steps. `check` and `run` both come here, so that a plan fails where a run would.

        A step whose ratio rounds every width back to itself is left out, together with its training.

        Args:
            model: stays as it is.
            shape: (C, H, W) of the input.
            seed: of the run.
            gradients: fills a model's gradients, for the criteria that need them.
            train_between: trains a model after a step, by the step's number; not called after the last.

        Raises:
            UserError: a layer would be left without channels, or no step removes anything.
        """
        original, pruned = widths(model), model
        for step in range(1, self.steps + 1):
            try:
                with seeded(seed, "prune", step):
                    pruned = prune(pruned, torch.zeros(1, *shape), ratio=self.ratio * step / self.steps,
                                   multiple=self.multiple, criterion=self.criterion, scope=self.scope, original=original,
                                   gradients=gradients if self.criterion in NEEDS_GRADIENTS else None)
            except NothingRemovedError:
                if step == self.steps and pruned is model:
                    raise
                continue
            if step < self.steps:
                pruned = train_between(step, pruned)
        return pruned

    def _losses(self, model: nn.Module, data: Data) -> Iterable[Tensor]:
        """Yield the cross-entropy of each of the first batches of training images, in a fixed order."""
        order = torch.randperm(len(data.train)).split(self.train.batch_size)[:self.gradient_batches]
        for ids in order:
            images = center_crop(data.train.images.batch(ids).cpu(), data.augmenter.size)
            logits = model(normalize(images.contiguous(), data.preprocessing))  # channels last may be unsafe
            yield nn.functional.cross_entropy(logits, data.train.labels[ids.to(data.train.labels.device)].cpu())


def _interleaved_latency(before: nn.Module, after: nn.Module, shape: tuple[int, int, int]) -> dict[str, Any]:
    """Time both models interleaved, so that a slow moment of the machine hits both, and in the same memory format."""
    before, after = (copy.deepcopy(model).to(memory_format=torch.contiguous_format) for model in (before, after))
    earlier, now = interleaved_times((before, after), shape)
    return {"before_ms": earlier, "after_ms": now, "ratio": now / earlier, "rounds": ROUNDS, "runs_a_round": RUNS}
