"""The evaluator as one file: the same bytes from the same sources, one meaning a name, and the toolkit's own verdict."""

from __future__ import annotations

import ast
import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from compress import __version__
from compress.evaluation.evaluate import evaluate_submission
from compress.evaluation.extras import toolkit_sources
from compress.evaluation.runtimes import EvaluationSettings
from compress.packaging.bundle import MARK, START, BundleError, bundle, is_bundle
from compress.packaging.import_graph import import_order, module_file
from tests.helpers.commands import PROJECT, Compress, assert_one_line_error
from tests.helpers.sources import plant


def isolated(script: str, *arguments: object, cwd: Path) -> str:
    """Run a script under `python -I`, where nothing of the project can be imported."""
    done = subprocess.run([sys.executable, "-I", "-c", script, *map(str, arguments)], cwd=cwd, capture_output=True,
                          text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


# ------------------------------------------------------------------------------------------------------- the file


@pytest.mark.slow
def test_the_same_sources_give_the_same_bytes() -> None:
    script = "import sys; from compress.packaging.bundle import bundle; sys.stdout.buffer.write(bundle())"
    for seed in ("1", "2"):
        done = subprocess.run([sys.executable, "-c", script], cwd=PROJECT, capture_output=True, check=True,
                              env=os.environ | {"PYTHONHASHSEED": seed})
        assert done.stdout == bundle()


def test_the_header_says_what_the_file_is() -> None:
    text = bundle().decode()
    header = ast.get_docstring(ast.parse(text)) or ""
    parts = import_order(START)
    assert header.startswith("The evaluator of record") and "do not edit" in header
    assert f"{MARK} of the toolkit, version {__version__}, from {len(parts)} source files" in header
    sections = [line.split()[-1] for line in text.splitlines() if line.startswith("# --------------------") and "." in line]
    assert sections == parts and parts[-1] == START


def test_each_name_is_defined_once() -> None:
    tree = ast.parse(bundle())
    names = [node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)]
    assert len(names) > 100 and sorted(names) == sorted(set(names))


def test_nothing_in_the_repository_is_or_imports_a_bundle() -> None:
    files = [path for folder in ("architectures", "benchmarks", "compress", "loaders", "metadata", "tests")
             for path in (PROJECT / folder).rglob("*.py")]
    assert len(files) > 100 and not any(is_bundle(path) for path in [*files, PROJECT / "model_loader.py"])
    for path in files:
        imports = {name for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Import | ast.ImportFrom)
                   for name in ([alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module])}
        assert "model_loader" not in imports or path.is_relative_to(PROJECT / "tests"), path


GOOD = {"start": '"""Starts."""\nimport sys\nfrom house.low import low\ndef main():\n    return low()\n',
        "low": '"""Low."""\nimport json\ndef low():\n    return json.dumps(1)\n'}
BAD = {
    "a name twice": (dict(low='"""Low."""\ndef low(): pass\ndef main(): pass\n'), "main is what house.low defines and"),
    "a name twice, in a branch": (dict(low='"""Low."""\nlow = 1\nif low:\n    main = 2\n'), "main is what"),
    "an import and a definition": (dict(low='"""Low."""\nlow = sys = 1\n'), "sys is"),
    "two imports": (dict(low='"""Low."""\nfrom json import loads as sys\nlow = 1\n'), "sys is"),
    "a name of Python's": (dict(low='"""Low."""\nlow = compile = 1\n'), "compile is Python's compile and"),
    "a rename": (dict(start='"""Starts."""\nfrom house.low import low as high\n'), "keep them"),
    "a rename in a function": (dict(start='"""Starts."""\ndef f():\n    from house.low import low as high\n'), "line 3"),
    "a rename for types": (
        dict(start='"""Starts."""\nif TYPE_CHECKING:\n    from house.low import low as high\n'), "line 3"),
    "everything": (dict(start='"""Starts."""\nfrom house.low import *\n'), "keep them"),
    "a module": (dict(start='"""Starts."""\nfrom house import low\n'), "low is imported as a module"),
    "a module by its path": (dict(start='"""Starts."""\nimport house.low\n'), "house.low is imported as a module"),
    "a circle": (dict(low='"""Low."""\nfrom house.start import main\n'), "import each other"),
    "no docstring": (dict(low="low = 1\n"), "house.low has no docstring"),
    "two statements on a line": (dict(low='"""Low."""\nimport json; low = 1\n'), "house.low, line 2"),
}


@pytest.mark.parametrize("case", BAD)
def test_sources_that_cannot_be_joined_are_refused(case: str, tmp_path: Path) -> None:
    changed, said = BAD[case]
    with pytest.raises(BundleError, match=said):
        bundle("house.start", plant(tmp_path, **(GOOD | changed)))


def test_planted_sources_are_joined(tmp_path: Path) -> None:
    """An import that was all that a block held, imports for types, imports over several lines, and relative ones."""
    start = ('"""Starts."""\nfrom __future__ import annotations\nimport sys\nfrom typing import TYPE_CHECKING\n'
             "if TYPE_CHECKING:\n    from decimal import Decimal\n    from house.low import Low\n"
             "def main() -> int:\n    if True:\n        from .low import (\n            low,\n            Low)\n"
             "    value: Decimal | Low = Low(low())\n    print(value, ONE)\n    return 0\nfrom house.one import ONE\n")
    low = '"""Low.\n\nMore of it.\n"""\nimport json\nclass Low(str): pass\ndef low():\n    return json.dumps({"low": 1})\n'
    content = bundle("house.start", plant(tmp_path, start=start, low=low, one='"""One."""\nONE = 1\n'))
    (tmp_path / "joined.py").write_bytes(content)
    done = subprocess.run([sys.executable, "-I", str(tmp_path / "joined.py")], capture_output=True, text=True, check=True)
    assert done.stdout == '{"low": 1} 1\n'
    assert "# Low.\n#\n# More of it.\n" in content.decode() and "\n    from decimal import Decimal\n" in content.decode()


# ------------------------------------------------------------------------------------------------ loaded by its path


LOAD = """
import importlib.util, sys
def load(path, name, register):
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    if register:
        sys.modules[name] = module
    spec.loader.exec_module(module)
    return module
"""
TWO = LOAD + """
folder, register = sys.argv[3], sys.argv[4] == "True"
one, two = (load(path, "submitted", register) for path in sys.argv[1:3])
assert register or "submitted" not in sys.modules
shared = [name for name, kind in vars(one).items() if isinstance(kind, type) and kind is vars(two)[name]]
assert not [name for name in shared if vars(one)[name].__module__.startswith("submitted")], shared
for module in (one, two, one):
    files = module.read_submission(folder)
    assert type(files) is module.SubmissionFiles and type(files.metadata) is module.ModelMetadata
    assert type(files.architecture) is module.Architecture and type(files.preprocessing) is module.Preprocessing
    assert all(isinstance(layer, module.Layer) for layer in files.architecture.layers)
    model = module.load_model(folder)
    assert any(isinstance(part, module.int8_layers().Int8Conv2d) for part in model.modules())
    assert not model.training
    try:
        module.load_model("nowhere")
    except module.UserError as error:
        assert type(error).__mro__[0] is module.UserError
    else:
        raise AssertionError
assert (one.MAX_JSON_BYTES, two.MAX_JSON_BYTES) == (2**24, 2**25)
try:
    two.Preprocessing(mode="grey", mean=[0], std=[1])
except ValueError:
    raise AssertionError("the second file has its own schema") from None
try:
    one.Preprocessing(mode="grey", mean=[0], std=[1])
except ValueError:
    print("apart")
"""


@pytest.mark.slow
@pytest.mark.parametrize("register", [False, True], ids=["unregistered", "registered"])
def test_two_submissions_files_in_one_process_do_not_collide(register: bool, submission: Path, tmp_path: Path) -> None:
    """A panel loads the file of each submission by its path, all under one name; here they also differ."""
    for name in ("one", "two"):
        shutil.copytree(submission, tmp_path / name)
    text = (tmp_path / "two" / "model_loader.py").read_text()
    for before, after in (('Literal["RGB", "L"]', 'Literal["RGB", "L", "grey"]'),
                          ("MAX_JSON_BYTES = 2**24", "MAX_JSON_BYTES = 2**25")):
        assert text.count(before) == 1
        text = text.replace(before, after)
    (tmp_path / "two" / "model_loader.py").write_text(text)
    files = [tmp_path / name / "model_loader.py" for name in ("one", "two")]
    out = isolated(TWO, *files, submission, register, cwd=tmp_path)
    assert out.strip() == "apart"


# ---------------------------------------------------------------------------------------------------- the verdict


# What a clock or the machine's memory decides; all other values of a result must be the same.
MEASURED = {"latency", "latency_score", "total_score", "details.guarded_score", "details.latency.mean_ms",
            "details.latency.median_ms", "details.latency.p5_ms", "details.latency.p90_ms", "details.latency.p95_ms",
            "details.latency.p99_ms", "details.latency.repeats_ratio", "details.peak_memory.evaluator_mb",
            "details.peak_memory.above_start_mb", "details.evaluator_sha256", "details.sha256.evaluator"}


def flat(content: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return a nested result as dotted key -> value."""
    found: dict[str, Any] = {}
    for key, value in content.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return found


def verdict_of(evaluator: Path, submission: Path, data: Path, output: Path) -> dict[str, Any]:
    """Return what an evaluator's file writes, run under `python -I` in another folder."""
    flags = ["--submission_dir", str(submission), "--data_dir", str(data), "--output_file", str(output)]
    flags += ["--runs", "50"]  # as many as there are images: whether repeated calls count depends on the clock
    done = subprocess.run([sys.executable, "-I", str(evaluator), *flags], cwd=output.parent, capture_output=True, text=True,
                          check=False)
    assert done.returncode == 0, done.stderr
    return dict(json.loads(output.read_text()))


def test_the_toolkit_and_the_bundle_agree_key_by_key(submission: Path, few: Path, tmp_path: Path) -> None:
    toolkit = verdict_of(PROJECT / "model_loader.py", submission, few, tmp_path / "toolkit.json")
    single = verdict_of(submission / "model_loader.py", submission, few, tmp_path / "single.json")
    one, two = flat(toolkit), flat(single)
    assert list(one) == list(two) and one.keys() > MEASURED
    for key, value in one.items():
        assert type(value) is type(two[key]), key
        if key == "details.warnings":  # of a cache: the clock's word
            one[key], two[key] = ([text for text in found[key] if "asked again" not in text] for found in (one, two))
        if key not in MEASURED:
            assert one[key] == two[key], key
    content = (submission / "model_loader.py").read_bytes()
    assert single["details"]["evaluator_sha256"] == hashlib.sha256(content).hexdigest()
    kind, digest = toolkit["details"]["evaluator_sha256"].split()
    assert kind == "toolkit" and len(digest) == 64 and int(digest, 16)
    for result in (toolkit, single):
        assert result["details"]["sha256"]["evaluator"] == result["details"]["evaluator_sha256"]


def test_the_toolkits_hash_covers_every_source_of_the_bundle() -> None:
    assert {module_file(name) for name in import_order(START)} <= set(toolkit_sources())


def test_the_verdict_in_memory_names_the_toolkit_too(submission: Path, few: Path) -> None:
    result = evaluate_submission(submission, few, settings=EvaluationSettings(runs=5, warmup=0))
    assert result["details"]["evaluator_sha256"].startswith("toolkit ")


# --------------------------------------------------------------------------------------------- the verb and the face


def test_the_verb_writes_a_file_that_runs_alone(compress: Compress, tmp_path: Path) -> None:
    out = tmp_path / "evaluator.py"
    assert compress("bundle", "--out", out).returncode == 0
    assert out.read_bytes() == bundle() and is_bundle(out)
    done = subprocess.run([sys.executable, "-I", str(out), "--help"], cwd=tmp_path, capture_output=True, text=True,
                          check=False)
    assert done.returncode == 0 and "--submission_dir" in done.stdout, done.stderr
    out.write_bytes(bundle() + b"# of an earlier version\n")
    assert compress("bundle", "--out", out).returncode == 0 and out.read_bytes() == bundle()


def test_the_verb_deletes_nothing(compress: Compress, tmp_path: Path) -> None:
    own = tmp_path / "own.py"
    own.write_text("x = 1\n")
    assert_one_line_error(compress("bundle", "--out", tmp_path / "nowhere" / "x.py"), "there is no folder")
    assert_one_line_error(compress("bundle", "--out", tmp_path), "this is a folder")
    assert_one_line_error(compress("bundle", "--out", own), "no bundle", "nothing was written")
    assert_one_line_error(compress("bundle", "--out", PROJECT / "model_loader.py"), "no bundle")
    assert own.read_text() == "x = 1\n" and [path.name for path in tmp_path.iterdir()] == ["own.py"]


def test_the_face_alone_says_so(tmp_path: Path) -> None:
    face = Path(shutil.copy(PROJECT / "model_loader.py", tmp_path))
    done = subprocess.run([sys.executable, "-I", str(face), "--help"], cwd=tmp_path, capture_output=True, text=True,
                          check=False)
    lines = done.stderr.splitlines()
    assert done.returncode == 2 and done.stdout == "" and len(lines) == 1 and lines[0].startswith("error: ")
    assert "python -m compress bundle --out FILE" in lines[0]
    script = "import sys; sys.path.insert(0, '.')\ntry: import model_loader\nexcept ImportError as error: print(error)"
    assert "python -m compress bundle --out FILE" in isolated(script, cwd=tmp_path)


def test_the_face_runs_and_loads_from_elsewhere(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-I", str(PROJECT / "model_loader.py"), "--help"], cwd=tmp_path,
                          capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "--submission_dir" in done.stdout, done.stderr
    script = LOAD + "face = load(sys.argv[1], 'face', False)\nprint(face.__all__)"
    out = isolated(script, PROJECT / "model_loader.py", cwd=tmp_path)
    assert out.strip() == "['Preprocessing', 'decode_image', 'evaluate_submission', 'load_model', 'main']"
