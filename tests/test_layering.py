"""Rooms point down only, files stay short and say what they are for, and nothing is unpickled."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

PROJECT = Path(__file__).parents[1]
# The rooms, from the top floor down. A file imports its own room and what lies on the floors below it; a new file needs
# no entry here. ARCHITECTURE.md says what each room is for.
FLOORS = [
    ["compress.__main__"],
    ["compress.cli", "compress.api"],
    ["compress.pipeline", "compress.studies"],
    ["compress.quantization"],
    ["compress.packaging"],
    ["compress.training"],
    ["compress.evaluation"],
    ["compress.pruning", "loaders", "architectures", "compress.settings"],
    ["metadata"],
    ["compress"],  # the package's own __init__: its version
]
ROOMS = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}


def room_of(module: str) -> str:
    """The innermost room that a module lies in."""
    return max((room for room in ROOMS if module == room or module.startswith(room + ".")), key=len)


def project_files() -> list[Path]:
    return [path for folder in ("metadata", "architectures", "loaders", "compress")
            for path in (PROJECT / folder).rglob("*.py")]


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
    assert len(files) > 100
    wrong = []
    for path in files:
        own = room_of(name_of(path))
        for other in imports(path):
            if other == "model_loader" or (room_of(other) != own and ROOMS[room_of(other)] <= ROOMS[own]):
                wrong.append(f"{name_of(path)} imports {other}")
    assert wrong == []


def test_the_evaluator_imports_only_the_standard_library_numpy_and_pydantic_at_the_top() -> None:
    from compress.packaging.bundle import bundle
    top = {node.names[0].name.split(".")[0] if isinstance(node, ast.Import) else str(node.module).split(".")[0]
           for node in ast.parse(bundle()).body if isinstance(node, (ast.Import, ast.ImportFrom))}
    assert top - set(sys.stdlib_module_names) == {"numpy", "pydantic"}


def test_every_file_says_what_it_is_for_and_stays_short() -> None:
    for path in [*project_files(), PROJECT / "model_loader.py"]:
        text = path.read_text()
        assert ast.get_docstring(ast.parse(text)), path
        assert len(text.splitlines()) <= 400, path


def test_no_pickle_and_no_unsafe_load() -> None:
    for path in project_files():
        for number, line in enumerate(path.read_text().splitlines(), start=1):
            if "torch.load(" in line and not line.strip().startswith(("#", "model.load_state_dict", '"')):
                assert "weights_only=True" in line, f"{path}:{number}"
            assert "import pickle" not in line, f"{path}:{number}"
