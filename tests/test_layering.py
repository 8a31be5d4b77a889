"""Imports point down only, and the evaluator imports nothing of the project."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

PROJECT = Path(__file__).parents[1]
MECHANICS = {"training", "optimizers", "schedules", "losses", "trackers", "distillation", "pruning", "quantization",
             "fake_quantization", "folding", "coverage", "packaging", "report", "assessment", "averaging", "batches",
             "compiling", "distributed", "loggers", "memory", "recipe", "export", "onnx_packaging",
             "calibration", "equalization", "static_quantization", "static_candidates", "static_search",
             "layer_times", "portability"}


def level(module: str) -> int:
    """The floor on which a module of the project lives."""
    parts = module.split(".")
    if parts[0] == "model_loader":
        return 0
    if parts[0] == "metadata":
        return 1
    if parts[0] in ("architectures", "loaders"):
        return 2
    assert parts[0] == "compress", module
    if len(parts) == 1:
        return 3
    if parts[1] in MECHANICS:
        return 3
    return {"config": 4, "training_config": 5, "stage": 5, "stages": 6, "measuring": 6, "training_run": 7, "pipeline": 7,
            "studies": 8, "evaluation": 8, "cli_scaling": 9, "cli_scaling_fit": 9, "cli": 10, "__main__": 11}[parts[1]]


def project_files() -> list[Path]:
    return [PROJECT / "model_loader.py", *(path for folder in ("metadata", "architectures", "loaders", "compress")
                                           for path in (PROJECT / folder).rglob("*.py"))]


def imports(path: Path) -> list[str]:
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.append(node.module)
    return [name for name in found
            if name.split(".")[0] in ("model_loader", "metadata", "architectures", "loaders", "compress")]


def name_of(path: Path) -> str:
    parts = path.relative_to(PROJECT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def test_imports_point_down() -> None:
    files = project_files()
    assert len(files) > 25
    wrong = []
    for path in files:
        own = name_of(path)
        for other in imports(path):
            same_package = level(own) == 2 and own.split(".")[0] == other.split(".")[0]
            same_floor = level(own) == level(other) and (level(own) in (1, 3, 8) or same_package)
            to_stages_package = other == "compress.stages" and own == "compress.stage"  # the folder's path, no stage
            if not (level(other) < level(own) or same_floor or to_stages_package):
                wrong.append(f"{own} imports {other}")
    assert wrong == []


def test_mechanics_never_see_a_config() -> None:
    for name in MECHANICS:
        assert "compress.config" not in imports(PROJECT / "compress" / f"{name}.py"), name


def test_loader_imports_only_the_standard_library_numpy_and_pydantic_at_the_top() -> None:
    tree = ast.parse((PROJECT / "model_loader.py").read_text())
    top = {node.names[0].name.split(".")[0] if isinstance(node, ast.Import) else str(node.module).split(".")[0]
           for node in tree.body if isinstance(node, (ast.Import, ast.ImportFrom))}
    assert top - set(sys.stdlib_module_names) == {"numpy", "pydantic"}


def test_every_file_says_what_it_is_for_and_stays_short() -> None:
    for path in project_files():
        text = path.read_text()
        assert ast.get_docstring(ast.parse(text)), path
        assert len(text.splitlines()) <= 400 or path.name == "model_loader.py", path


def test_no_pickle_and_no_unsafe_load() -> None:
    for path in project_files():
        for number, line in enumerate(path.read_text().splitlines(), start=1):
            if "torch.load(" in line and not line.strip().startswith(("#", "model.load_state_dict", '"')):
                assert "weights_only=True" in line, f"{path}:{number}"
            assert "import pickle" not in line, f"{path}:{number}"
