"""A submission that is code, behind the interface of a runtime: what is known of it, what it states, and warnings.

The code runs in a `Child`. A reader has looked at the files as data before. What only the code can say is marked as stated
by the code.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from compress.evaluation.channel import Clock
from compress.evaluation.facts import SubmissionFacts
from compress.evaluation.runtime import Runtime
from compress.evaluation.runtimes import EvaluationSettings
from compress.evaluation.sandbox import Child, check_hidden
from metadata.errors import printable

FOUND = {"script": "TorchScript", "pickle": "a pickled module", "resnet18": "a state dict in torchvision's ResNet18"}


class CodeRuntime(Runtime):
    """A submission with its own code, or with weights that only torch can open by running code, in a `Child`."""

    max_outputs = 1024  # torchvision's networks have 1,000; all answers are held in memory

    def __init__(self, files: SubmissionFacts, settings: EvaluationSettings, classes: int, seen: dict[str, Any],
                 clock: Clock) -> None:
        remarks, stored = seen["remarks"], seen["stored"]
        copied = {name: files.folder / name for name in files.sizes if name not in files.kept_back}
        boot = {"mode": "submission", "weights": files.weights, "classes": classes,
                "ways": files.ways, "model_class": files.model_class, "input_shape": files.input_shape}
        self.child = Child(boot, copied, settings, settings.threads, str(files.folder), capacity=2**26)
        self.child.channel.clock = clock
        try:
            facts = self.child.facts()
            loaded_by = self._loaded_by(files, facts)
        except BaseException:
            self.child.close()
            raise
        trainable, macs, stated = (count(facts.get(key)) for key in ("trainable", "macs", "all"))
        super().__init__("torch", {"all": stated if stored is None else stored, "trainable": trainable}, macs)
        self.details["loaded_by"] = loaded_by
        self.details["sandbox"] = {"protection": self.child.protection, "model_class": printable(facts.get("class"), 100),
                                   "channel_ms": self.child.channel_ms,  # part of every latency, not subtracted
                                   "stated_by_the_code": ["loaded_by", "parameters.trainable", "macs",
                                                          *(["parameters.all"] if stored is None else [])]}
        self.warnings += [*files.notes, *remarks, *self.child.unprotected(), *stated_warnings(facts, files)]
        self.warnings += count_warnings(stored, trainable, stated)
        self.threads, self.classes, self.closed = settings.threads, classes, False
        self.start = self.child.usage()

    def _loaded_by(self, files: SubmissionFacts, facts: dict[str, Any]) -> str:
        """Return what gave the model. The child says so, among the ways that it was told to try."""
        way, found = facts.get("way"), facts.get("found")
        if way not in files.ways or (way == "standard" and str(found) not in FOUND):
            raise self.child.forged()
        return {"loader": "model_loader.py: load_model", "class": f"model.py: {printable(facts.get('class'), 100)}",
                "standard": f"{files.weights}: {FOUND.get(str(found))}"}[str(way)]

    def __call__(self, images: np.ndarray) -> np.ndarray:
        logits = self.child.ask(images)
        if logits.size % len(images):
            return logits
        logits = logits.reshape(len(images), -1)
        if self.outputs is None and self.classes < logits.shape[1] <= self.max_outputs:
            self.outputs = logits.shape[1]
            self.warnings.append(f"the model has {self.outputs:,} outputs for the data's {self.classes} classes: an answer "
                                 "beyond the classes is wrong, as for the panel")
        return logits

    def close(self) -> None:
        if self.closed:
            return
        self.closed = True
        usage = self.child.usage()
        printed = self.child.printed_bytes() if usage["cpu_s"] is not None else 0
        self.child.close()
        self.details["sandbox"] |= usage | {"printed_bytes": printed}
        if printed:
            self.warnings.append(f"the code printed {printed:,} bytes, which nobody reads")
        if usage["cpu_s"] is not None and self.start["cpu_s"] is not None:
            cpu = usage["cpu_s"] - self.start["cpu_s"]
            waited = (usage["waited_s"] or 0) - (self.start["waited_s"] or 0)
            if cpu > 1.25 * self.threads * waited + 0.5:
                self.warnings.append(f"the code used {cpu:.1f} s of processor time in {waited:.1f} s of calls on "
                                     f"{self.threads} thread(s)")


def count(value: Any) -> int | None:
    """Return a count that the code states, or None for anything that is no count."""
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**53 else None


def count_warnings(stored: int | None, trainable: int | None, stated: int | None) -> list[str]:
    """Return what is odd about the numbers in a weights file, trainable, and in the model's state dict; None is unknown."""
    remarks = []
    if stored is not None and trainable is not None and trainable < 0.5 * stored:
        others = ("the others lie in buffers or are frozen" if stated is None or stated >= 0.9 * stored else
                  f"the model's own state dict holds {stated:,}")
        remarks.append(f"of {stored:,} stored numbers only {trainable:,} are trainable parameters; {others}")
    if stored is not None and stated is not None and stated > 1.5 * stored + 1000:
        remarks.append(f"the weights file holds {stored:,} numbers and the model {stated:,}: the others are unpacked from "
                       "these, come from the code or other files, or stayed as they were initialized")
    return remarks


def stated_warnings(facts: dict[str, Any], files: SubmissionFacts) -> list[str]:
    """Return what the code's own process says about how the model was loaded. An untrue statement harms only its author."""
    remarks = []
    if facts.get("failed"):
        first_tried = "model.py" if files.ways[0] == "class" else "model_loader.py"
        judged = "where the panel fails" if facts.get("panel_fails") is True else "as the panel does"
        then = "by the class in model.py" if facts.get("way") == "class" else f"the standard way, {judged}"
        remarks.append(f"{first_tried} failed, and the weights were loaded {then}: {printable(facts['failed'], 400)}")
    if count(facts.get("asked")):
        names = facts.get("asked_for")
        first = ", ".join(printable(name, 80) for name in (names if isinstance(names, list) else [])[:3])
        remarks.append(f"the code asked for pretrained weights ({first}); without a network it got random ones"
                       f"{what_became_of_them(facts)}")
    if facts.get("compiled") is True:
        remarks.append("the code called torch.compile, which would start a compiler; the model runs uncompiled")
    if facts.get("unpacked") is True:
        remarks.append("load_model returned a tuple; its first module was taken, where the panel fails")
    return remarks


def what_became_of_them(facts: dict[str, Any]) -> str:
    """Return how the random weights in place of pretrained ones ended, as far as the child knows."""
    kept, loaded, weights = (count(facts.get(key)) or 0 for key in ("kept", "loaded", "weights"))
    if kept:
        return (f" and kept them: {kept} of {weights} weight tensors are random, so the accuracy says nothing about the "
                "model that its author had")
    if loaded and loaded == weights:
        return ", which it overwrote"
    if loaded or facts.get("loads") is True:
        return (f" and loaded others: {loaded} of {weights} weight tensors are as loaded; whether the rest are random is "
                "not known")
    return (" and loaded no state dict of its own: the weights are random as far as is known, so the accuracy may say "
            "nothing about the model that its author had")


def open_code(files: SubmissionFacts, settings: EvaluationSettings, classes: int, data_dir: Path,
              seen: dict[str, Any], clock: Clock) -> Runtime:
    """Start a submission that is code.

    Args:
        files: the submission.
        settings: threads and limits.
        classes: the number of the submission's outputs.
        data_dir: the test data, which the code must not be able to read.
        seen: what the reader says of the weights: `remarks`, and `stored`, the number of stored numbers or None.
        clock: the time that the submission may take. The start of its process, before its code runs, is not on it.

    Raises:
        UserError: the code could read the test data.
        VerificationError: its code fails.
    """
    check_hidden(data_dir)
    return CodeRuntime(files, settings, classes, seen, clock)
