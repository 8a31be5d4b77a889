"""Rooms point down only, ARCHITECTURE.md is the tree as it is, files are short, and nothing is unpickled."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

PROJECT = Path(__file__).parents[1]
# The rooms, from the top floor down. A file imports its own room and what lies on the floors below it; a new file needs
# no entry here. ARCHITECTURE.md says what each room is for.
FLOORS = [
    ["compress.__main__"],
    ["compress.cli", "compress.api"],
    ["compress.pipeline", "compress.studies"],
    ["compress.search"],
    ["compress.quantization"],
    ["compress.packaging"],
    ["compress.training"],
    ["compress.evaluation", "compress.pruning"],
    ["loaders", "architectures", "compress.settings"],
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


def arrows() -> set[tuple[str, str]]:
    """The pairs of rooms of which the first imports the second. `python tests/test_layering.py` prints them."""
    pairs = {(room_of(name_of(path)), room_of(other)) for path in project_files() for other in imports(path)
             if other != "model_loader"}
    return {(room, other) for room, other in pairs if room != other}


def test_imports_point_down() -> None:
    files = project_files()
    assert len(files) > 100 and len(arrows()) > 20
    wrong = []
    for path in files:
        own = room_of(name_of(path))
        for other in imports(path):
            if other == "model_loader" or (room_of(other) != own and ROOMS[room_of(other)] <= ROOMS[own]):
                wrong.append(f"{name_of(path)} imports {other}")
    assert wrong == []


def listed_tree() -> list[str]:
    """The paths in the tree of ARCHITECTURE.md; folders end with a slash."""
    found, folders = [], []
    for line in re.search(r"```text\n(.*?)```", (PROJECT / "ARCHITECTURE.md").read_text(), re.DOTALL)[1].splitlines():
        depth, name = (len(line) - len(line.lstrip())) // 2, line.split()[0]
        folders = [*folders[:depth], name]
        found.append("".join(folders))
    return found


def test_architecture_lists_the_tree_as_it_is() -> None:
    listed = listed_tree()
    assert len(listed) == len(set(listed)) > 100
    wrong = [name for name in listed if not (PROJECT / name).exists() or (PROJECT / name).is_dir() != name.endswith("/")]
    assert wrong == []
    inside = [path for room in ("metadata", "architectures", "loaders", "compress") for path in (PROJECT / room).rglob("*")]
    # A checkout that was pulled keeps folders that lost their files; a folder of the project holds some.
    folders = {f"{path.parent.relative_to(PROJECT)}/" for path in inside
               if path.is_file() and path.parent.name != "__pycache__"}
    assert sorted(folders - set(listed)) == []
    assert all(f"`{room.replace('.', '/')}" in (PROJECT / "ARCHITECTURE.md").read_text() for room in ROOMS)


def test_the_evaluator_imports_only_the_standard_library_numpy_and_pydantic_at_the_top() -> None:
    from compress.packaging.bundle import bundle
    top = {node.names[0].name.split(".")[0] if isinstance(node, ast.Import) else str(node.module).split(".")[0]
           for node in ast.parse(bundle()).body if isinstance(node, (ast.Import, ast.ImportFrom))}
    assert top - set(sys.stdlib_module_names) == {"numpy", "pydantic"}


HASHES = """
import pathlib, sys
from compress.evaluation.extras import evaluator_sha256
print(evaluator_sha256())
for name in sys.argv[1:]:
    path = pathlib.Path(name)
    path.write_text(path.read_text() + "# changed")
    print(evaluator_sha256())
"""


def test_the_toolkits_hash_covers_every_source_of_the_evaluator(tmp_path: Path) -> None:
    """A change in any source of the bundled evaluator changes what `details.evaluator_sha256` says for the toolkit."""
    from compress.packaging.bundle import START
    from compress.packaging.import_graph import import_order, module_file
    sources = [path for name in import_order(START) if (path := module_file(name))]
    for path in sources:
        copied = tmp_path / path.relative_to(PROJECT)
        copied.parent.mkdir(parents=True, exist_ok=True)
        copied.write_bytes(path.read_bytes())
    names = [str(path.relative_to(PROJECT)) for path in sources]
    done = subprocess.run([sys.executable, "-c", HASHES, *names], cwd=tmp_path, capture_output=True, text=True, check=True)
    hashes = done.stdout.splitlines()
    assert [name for name, before, after in zip(names, hashes[:-1], hashes[1:], strict=True) if before == after] == []


def test_every_file_says_what_it_is_for_and_stays_short() -> None:
    """The 400-line rule has no exception: it holds for tests and benchmarks too."""
    others = [path for folder in ("tests", "benchmarks") for path in (PROJECT / folder).rglob("*.py")]
    assert len(others) > 60
    for path in [*project_files(), PROJECT / "model_loader.py", *others]:
        text = path.read_text()
        assert ast.get_docstring(ast.parse(text)), path
        assert len(text.splitlines()) <= 400, path


def test_no_pickle_and_no_unsafe_load() -> None:
    # They open foreign files in the sandbox, serialise there what foreign code made, or read a pickle without running it.
    in_the_sandbox = {PROJECT / "compress" / "evaluation" / f"{name}.py" for name in ("panel", "trainee", "inventory")}
    for path in project_files():
        if path in in_the_sandbox:
            continue
        for number, line in enumerate(path.read_text().splitlines(), start=1):
            if "torch.load(" in line and not line.strip().startswith(("#", "model.load_state_dict", '"')):
                assert "weights_only=True" in line, f"{path}:{number}"
            assert not re.search(r"import pickle\b", line), f"{path}:{number}"  # pickletools reads, and runs nothing


if __name__ == "__main__":
    print(*(f"{room} -> {other}" for room, other in sorted(arrows())), sep="\n")
    print(f"{len(ROOMS)} rooms on {len(FLOORS)} floors, {len(arrows())} arrows")
