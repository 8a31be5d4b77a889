"""What the code promises: one meaning a name, dataclasses called by keyword, nothing that a newer Python dropped."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

from compress.evaluation.sandbox import INSIDE

PROJECT = Path(__file__).parents[1]
# Files that stand alone: the project imports nothing from them, and they import nothing of the project.
STANDALONE = {"compress/studies/pareto_solution.py", *(f"compress/evaluation/{name}.py" for name in INSIDE)}
# A stage's class is named as its file is; the class is found by the file, never imported by name.
STAGES = "compress/pipeline/stages/"
# A verb is named as the function that it calls, and each of the two command lines has a `main`.
VERBS = ("compress/cli/", "compress/api.py", "compress/evaluation/command.py")
# Modules that Python 3.12 or 3.13 dropped, and names that they dropped or warn about. Source: the "What's New" of both.
DROPPED_MODULES = """aifc asynchat asyncore audioop cgi cgitb chunk crypt distutils imghdr imp lib2to3 mailcap msilib
    nis nntplib ossaudiodev pipes smtpd sndhdr spwd sunau telnetlib uu xdrlib"""
DROPPED_NAMES = """assertEquals assertRegexpMatches ast.Bytes ast.Ellipsis ast.NameConstant ast.Num ast.Str
    asyncio.get_event_loop configparser.SafeConfigParser find_loader get_loader getdefaultlocale logging.warn makeSuite
    onerror pkg_resources pkgutil.ImpImporter resetlocale ssl.wrap_socket tempfile.mktemp typing.ByteString typing.io
    typing.re utcfromtimestamp utcnow webbrowser.MacOSX"""


def sources() -> Iterator[tuple[str, ast.Module]]:
    """Every file of the project with its syntax tree, tests and benchmarks apart."""
    for wing in ("metadata", "architectures", "loaders", "compress"):
        for path in sorted((PROJECT / wing).rglob("*.py")):
            yield str(path.relative_to(PROJECT)), ast.parse(path.read_text())


def is_dataclass(node: ast.ClassDef) -> ast.expr | None:
    """The decorator that makes a class a dataclass, or None."""
    return next((decorator for decorator in node.decorator_list if "dataclass" in ast.unparse(decorator)), None)


def test_dataclasses_with_more_than_three_fields_are_called_by_keyword() -> None:
    wrong, seen = [], 0
    for name, tree in sources():
        for node in ast.walk(tree):
            if name in STANDALONE or not isinstance(node, ast.ClassDef) or (decorator := is_dataclass(node)) is None:
                continue
            seen += 1
            fields = [field for field in node.body if isinstance(field, ast.AnnAssign)
                      and "ClassVar" not in ast.unparse(field.annotation) and "init=False" not in ast.unparse(field)]
            if len(fields) > 3 and "kw_only=True" not in ast.unparse(decorator):
                wrong.append(f"{name}: {node.name} has {len(fields)} fields")
    assert seen > 30
    assert wrong == []


def test_a_public_class_has_a_name_of_its_own() -> None:
    homes = defaultdict(set)
    for name, tree in sources():
        if name not in STANDALONE and not name.startswith(STAGES):
            for node in tree.body:
                if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                    homes[node.name].add(name)
    assert len(homes) > 100
    assert {name: sorted(files) for name, files in homes.items() if len(files) > 1} == {}


def test_a_public_function_has_a_name_of_its_own() -> None:
    homes = defaultdict(set)
    for name, tree in sources():
        if name not in STANDALONE and not name.startswith(VERBS):
            for node in tree.body:
                if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
                    homes[node.name].add(name)
    assert len(homes) > 200
    assert {name: sorted(files) for name, files in homes.items() if len(files) > 1} == {}


def test_no_test_patches_a_private_name() -> None:
    wrong = []
    for path in sorted((PROJECT / "tests").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func).endswith((".setattr", ".delattr", "patch.object")):
                names = [value for argument in node.args[:2] if isinstance(argument, ast.Constant)
                         and isinstance(value := argument.value, str)]
                wrong += [f"{path.relative_to(PROJECT)}:{node.lineno}" for text in names
                          if any(part.startswith("_") and not part.startswith("__") for part in text.split("."))]
    assert wrong == []


def test_nothing_that_python_3_12_or_3_13_dropped_is_used() -> None:
    wrong, seen = [], 0
    dropped_modules, dropped_names = {*DROPPED_MODULES.split()}, {*DROPPED_NAMES.split()}
    last_parts = {name.split(".")[-1] for name in dropped_names}
    for path in [PROJECT / "model_loader.py", *(path for folder in ("metadata", "architectures", "loaders", "compress",
                                                                    "benchmarks", "tests")
                                                for path in sorted((PROJECT / folder).rglob("*.py")))]:
        seen += 1
        for node in ast.walk(ast.parse(path.read_text())):
            modules = ([alias.name for alias in node.names] if isinstance(node, ast.Import) else
                       [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else [])
            names = ([node.attr, ast.unparse(node)] if isinstance(node, ast.Attribute) and node.attr in last_parts else
                     [f"{node.module}.{alias.name}" for alias in node.names] if isinstance(node, ast.ImportFrom) else
                     [node.arg or ""] if isinstance(node, ast.keyword) else [])
            used = {module.split(".")[0] for module in modules} & dropped_modules
            used |= {*names} & dropped_names
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in ("extractall",
                                                                                                          "extract"):
                used |= set() if "filter=" in ast.unparse(node) else {"extractall without filter"}
            wrong += [f"{path.relative_to(PROJECT)}: {name}" for name in used]
    assert seen > 200
    assert wrong == []


def test_the_threat_model_names_tests_that_are_there() -> None:
    text = (PROJECT / "docs" / "threat-model.md").read_text()
    there = "".join(path.read_text() for path in (PROJECT / "tests").rglob("*.py"))
    names, files = set(re.findall(r"`(test_\w+)`", text)), set(re.findall(r"`(tests/[^`]+)`", text))
    assert len(names) > 15 and len(files) > 5
    assert [name for name in names if f"def {name}(" not in there] == []
    assert [name for name in files if not (PROJECT / name).exists()] == []


def test_rooms_give_their_verb_on_first_use() -> None:
    script = ("import architectures, loaders, sys; assert 'torch' not in sys.modules; "
              "print(architectures.make.__module__, loaders.load.__module__, hasattr(loaders, 'save'))")
    done = subprocess.run([sys.executable, "-c", script], cwd=PROJECT, capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["architectures.zoo", "loaders.catalog", "False"], done.stderr
