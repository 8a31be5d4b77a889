"""The formats of model files that are not PyTorch's: one entry for each, with all that the evaluator asks of a format."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Protocol

from architectures.onnx_data import data_files
from compress.evaluation.executorch_runtime import ExecutorchRuntime
from compress.evaluation.litert_runtime import LitertRuntime
from compress.evaluation.onnx_runtimes import OnnxRuntime, OpenvinoRuntime
from compress.evaluation.openvino_runtime import OpenvinoIrRuntime, numbers_beside
from compress.evaluation.runtime import FileRuntime
from compress.evaluation.submission_files import SubmissionFiles
from compress.evaluation.torch_program_runtime import TorchProgramRuntime


class FileOpener(Protocol):
    """A class of `FileRuntime` whose objects are made of a submission and a number of threads."""

    module: str
    package: str

    def __call__(self, files: SubmissionFiles, threads: int) -> FileRuntime: ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class FileFormat:
    """A format of model files.

    Args:
        name: what metadata state as `model_format`, and the kind of such a submission.
        suffix: of the weights file, in lower case.
        words: how other people's metadata spell the name: a part of it, in letters and digits alone.
        runtimes: by the name of the backend; the first is the default. A runtime opens the file in the reader's process,
            after checking all that the file claims.
        data_files: gives the other files that hold the model's data, which are counted as weights.
    """

    name: str
    suffix: str
    words: tuple[str, ...]
    runtimes: Mapping[str, FileOpener]
    data_files: Callable[[Path], tuple[Path, ...]] = lambda path: ()


FILE_FORMATS = {each.name: each for each in (
    FileFormat(name="onnx", suffix=".onnx", words=("onnx",), data_files=data_files,
               runtimes={"onnxruntime": OnnxRuntime, "openvino": OpenvinoRuntime}),
    FileFormat(name="litert", suffix=".tflite", words=("litert", "tflite", "tensorflowlite", "tflm"),
               runtimes={"litert": LitertRuntime}),
    FileFormat(name="openvino", suffix=".xml", words=("openvino",), data_files=numbers_beside,
               runtimes={"openvino": OpenvinoIrRuntime}),
    FileFormat(name="executorch", suffix=".pte", words=("executorch", "pte"),
               runtimes={"executorch": ExecutorchRuntime}),
    FileFormat(name="torch_export", suffix=".pt2", words=("torchexport", "exportedprogram", "pt2"),
               runtimes={"torch_export": TorchProgramRuntime}))}
FILE_BACKENDS = tuple(dict.fromkeys(backend for each in FILE_FORMATS.values() for backend in each.runtimes))


def format_of(path: Path) -> FileFormat | None:
    """Return the format of a file by its suffix; None for PyTorch's and all others."""
    return next((each for each in FILE_FORMATS.values() if each.suffix == path.suffix.lower()), None)
