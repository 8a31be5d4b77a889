"""`python -m benchmarks.gpu`: the plan, a small real run on a CPU, data sets in archives, and mistakes in one line."""

from __future__ import annotations

import gzip
import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from benchmarks import gpu
from benchmarks.gpu_jobs import OPTIMIZERS, TEACHER, ZOO_WEIGHTS
from benchmarks.gpu_sets import find, parts_of, unpacked
from compress.training.settings import TrainingSettings
from metadata.errors import UserError
from tests.helpers.commands import PROJECT, Compress
from tests.helpers.folders import draw_folder

Gpu = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Gpu:
    """Run the command line inside this process; the jobs are processes of their own all the same."""
    def call(*arguments: object) -> subprocess.CompletedProcess[str]:
        capsys.readouterr()
        code = gpu.main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return subprocess.CompletedProcess([], code, captured.out, captured.err)
    return call


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A folder with a small CIFAR-10 in it."""
    draw_folder(tmp_path / "data" / "cifar10", classes=10, images=4, size=32)
    return tmp_path / "data"


def split(path: Path, size: int) -> list[Path]:
    """Cut a file into parts by the command that the module names, and remove it."""
    subprocess.run(["split", "-b", str(size), "-d", str(path), f"{path}.part"], check=True)
    path.unlink()
    return sorted(path.parent.glob(f"{path.name}.part*"))


# ---------------------------------------------------------------------------------------------------------------- plan


def test_the_plan_is_printed_and_nothing_written(run: Gpu, data: Path, tmp_path: Path) -> None:
    done = run("--data", data, "--minutes", "12", "--out", tmp_path / "out", "--dry_run")
    assert done.returncode == 0 and done.stderr == "" and not (tmp_path / "out").exists()
    printed, _, sources = done.stdout.partition("estimates\n")
    rows = {line.split()[0]: line for line in printed.splitlines() if line.startswith("  ")}
    assert {"cifar10_fast", "slim_resnet18_cifar10_large"} <= rows.keys()
    assert sum(name.startswith("smoke_") for name in rows) >= 2 * len(OPTIMIZERS)
    assert "no cifar100 in" in rows["cifar100_resnet18_sam"] and "scale 1" in done.stdout
    assert "benchmarks/results/slim_resnet18_cifar10_large.json" in sources
    for word in sources.split():  # where estimates come from is there to be read
        if word.startswith("benchmarks/results/"):
            assert (PROJECT / word.strip(":;,")).is_file(), word


def test_less_time_leaves_jobs_out_and_a_cpus_trial_the_ones_for_a_card(run: Gpu, data: Path, tmp_path: Path) -> None:
    done = run("--data", data, "--minutes", "1", "--out", tmp_path / "out", "--dry_run", "--parallel", "16")
    assert "needs about 1.6 min" in done.stdout and "smoke_sam_muon_bfloat16" in done.stdout
    done = run("--data", data, "--out", tmp_path / "out", "--dry_run", "--device", "cpu", "--scale", "0.01")
    assert done.stdout.count("float16 is for CUDA") == len(OPTIMIZERS) and "on cpu" in done.stdout
    assert "CUDA graphs are for CUDA" in done.stdout


def test_every_optimizer_of_the_project_is_tried() -> None:
    known = TrainingSettings.model_fields
    assert {name.partition("_")[0] for name in OPTIMIZERS} >= {"sgd", "adam", "adamw", "muon", "sam"}
    for name, (lr, base) in OPTIMIZERS.items():
        assert TrainingSettings(optimizer="sam" if base else name, sam_base=base or "sgd", lr=lr).lr == lr
    for field in ("optimizer", "sam_base"):
        choices = set(str(known[field].annotation).replace("'", " ").split()) & {"sgd", "adam", "adamw", "muon", "sam"}
        tried = {base for _, base in OPTIMIZERS.values()} if field == "sam_base" else {*OPTIMIZERS}
        assert choices - tried == set()


# ---------------------------------------------------------------------------------------------------------------- runs


@pytest.mark.slow
def test_a_small_run_on_a_cpu_writes_records_and_then_skips_them(run: Gpu, data: Path, tmp_path: Path) -> None:
    command = ["--data", data, "--minutes", "8", "--out", tmp_path / "out", "--scale", "0.01", "--device", "cpu", "--only",
               "smoke_sgd_*float16"]
    done = run(*command)
    assert done.returncode == 0, done.stdout + done.stderr
    record = json.loads((tmp_path / "out" / "smoke_sgd_bfloat16.json").read_text())
    assert record["status"] == "done" and record["scale"] == 0.01 and record["device"] == "cpu"
    assert record["n"] == 1 and record["result"]["test"]["images"] > 300 and record["seconds"] > 0
    assert record["config"]["epochs"] == 1 and record["config"]["optimizer"] == "sgd" and len(record["curve"]) == 1
    assert record["config"]["data_root"] is None and str(tmp_path) not in json.dumps(record)
    assert record["machine"]["cores"] >= 1 and record["versions"]["torch"] == torch.__version__
    assert record["estimated_minutes"] > 0 and record["estimate"] and record["beside"] == []
    assert not (tmp_path / "out" / "smoke_sgd_float16.json").exists() and "float16 is for CUDA" in done.stdout

    before = (tmp_path / "out" / "smoke_sgd_bfloat16.json").read_bytes()
    done = run(*command)
    assert done.returncode == 0 and done.stdout.count("recorded before") == 1
    assert (tmp_path / "out" / "smoke_sgd_bfloat16.json").read_bytes() == before
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert [job["status"] for job in summary["jobs"]] == ["left out", "recorded before"]

    done = run(*command[:6], "--scale", "0.02", "--device", "cpu")
    assert done.returncode == 2 and "holds records of" in done.stderr and done.stderr.count("\n") == 1


@pytest.mark.slow
def test_killed_in_the_middle_of_a_training_it_goes_on(tmp_path: Path) -> None:
    draw_folder(tmp_path / "data" / "cifar10", classes=10, images=3, size=32)
    command = [sys.executable, "-m", "benchmarks.gpu", "--data", str(tmp_path / "data"), "--minutes", "20", "--out",
               str(tmp_path / "out"), "--device", "cpu", "--only", "smoke_sgd_bfloat16"]
    folder = tmp_path / "out" / "runs" / "smoke_sgd_bfloat16"
    with subprocess.Popen(command, cwd=PROJECT) as first:
        patience = time.monotonic() + 300
        while not (folder / "metrics.csv").is_file() and time.monotonic() < patience:
            time.sleep(0.05)
        os.kill(first.pid, signal.SIGKILL)
    began = len((folder / "metrics.csv").read_text().splitlines())
    done = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, check=False)
    record = json.loads((tmp_path / "out" / "smoke_sgd_bfloat16.json").read_text())
    assert done.returncode == 0 and began >= 2, done.stdout + done.stderr
    assert record["status"] == "done" and record["sittings"] == 2 and record["test_accuracy"] > 0.9
    assert [row["epoch"] for row in record["curve"]] == [float(epoch) for epoch in range(1, 13)]


@pytest.mark.slow
def test_every_job_runs_on_a_cpu_at_a_hundredth_of_its_size(run: Gpu, tmp_path: Path) -> None:
    from torchvision.models import resnet50

    from architectures.zoo import make

    data = tmp_path / "data"
    draw_folder(data / "cifar10", classes=10, images=6, size=32)
    draw_folder(tmp_path / "cifar100", classes=6, images=4, size=32)
    with tarfile.open(data / "cifar100.tar.xz", "w:xz") as archive:
        archive.add(tmp_path / "cifar100", "cifar100")
    assert len(split(data / "cifar100.tar.xz", 8000)) > 1
    torch.save(resnet50().state_dict(), data / ZOO_WEIGHTS)
    teacher = make("slim_resnet18", num_classes=10, width=64, stem="small")
    torch.save({name: tensor.half() if tensor.is_floating_point() else tensor
                for name, tensor in teacher.state_dict().items()}, data / TEACHER)
    done = run("--data", data, "--minutes", "60", "--out", tmp_path / "out", "--scale", "0.01", "--device", "cpu")
    assert done.returncode == 0, done.stdout + done.stderr
    records = {path.stem: json.loads(path.read_text()) for path in (tmp_path / "out").glob("*.json")}
    assert {"cifar10_fast", "cifar100_resnet18_sam", "cifar100_resnest26d_sam", "cifar100_transfer",
            "slim_resnet18_cifar10_large"} <= records.keys()
    for name, record in records.items():
        if name not in ("summary", "settings"):
            assert record["status"] == "done" and 0 <= record["test_accuracy"] <= 1, name
    assert records["cifar10_fast"]["n"] == 3 and records["cifar100_transfer"]["config"]["image_size"] == 224
    assert "teacher.train.epochs=0" in records["slim_resnet18_cifar10_large"]["command"]


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["cifar100_resnet18_sam", "cifar100_resnest26d_sam"])
def test_recipes_of_the_jobs_train(recipe: str, compress: Compress, tmp_path: Path) -> None:
    root = draw_folder(tmp_path / "images", classes=3, images=4, size=32)
    done = compress("train", "--config", recipe, "--data_root", root, "--epochs", "1", "--batch_size", "4", "--max_steps",
                    "1", "--log_dir", tmp_path / "log", "--threads", "1")
    assert done.returncode == 0, done.stderr
    summary = json.loads((tmp_path / "log" / "summary.json").read_text())
    assert summary["model"]["options"] == {"stem": "small"} and summary["test"]["images"] == 12


# ------------------------------------------------------------------------------------------------------------ archives


@pytest.mark.parametrize(("suffix", "mode"), [("", "w"), (".xz", "w:xz"), (".gz", "w:gz")])
def test_a_set_in_parts_is_unpacked_once(suffix: str, mode: str, data: Path, tmp_path: Path) -> None:
    path = tmp_path / f"cifar10.tar{suffix}"
    with tarfile.open(path, mode) as archive:  # type: ignore[call-overload]
        archive.add(data / "cifar10", ".")
    parts = split(path, path.stat().st_size // 3)
    found = find(tmp_path, "cifar10")
    assert 3 <= len(parts) <= 4 and found is not None and list(found.parts) == parts
    root = unpacked(found, "cifar10", tmp_path / "there")
    files = sorted(path.relative_to(root) for path in root.rglob("*.png"))
    assert files == sorted(path.relative_to(data / "cifar10") for path in data.rglob("*.png")) and len(files) == 80
    parts[0].unlink()
    with pytest.raises(UserError, match=r"without a gap; got cifar10\.tar"):
        find(tmp_path, "cifar10")
    for part in parts[1:]:
        part.write_bytes(b"")
    assert unpacked(found, "cifar10", tmp_path / "there") == root  # not again


def test_torchvisions_own_files_are_found_by_their_names(data: Path, tmp_path: Path) -> None:
    (tmp_path / "sets" / "cifar-10-batches-py").mkdir(parents=True)
    found = find(tmp_path / "sets", "cifar10")
    assert found is not None and found.folder == tmp_path / "sets"
    with tarfile.open(tmp_path / "cifar-100-python.tar.gz", "w:gz") as archive:
        archive.add(tmp_path / "sets" / "cifar-10-batches-py", "cifar-100-python")
    packed = find(tmp_path, "cifar100")
    assert packed is not None and packed.parts == (tmp_path / "cifar-100-python.tar.gz",)
    assert unpacked(packed, "cifar100", tmp_path / "there") == tmp_path / "there"
    assert find(data, "cifar100") is None and parts_of(data, ZOO_WEIGHTS) == ()


def hostile(path: Path, kind: str) -> None:
    """Write an archive that would write outside its folder, or something else than files."""
    with tarfile.open(path, "w") as archive:
        member = tarfile.TarInfo({"upwards": "../escaped", "absolute": "/tmp/escaped"}.get(kind, "train"))
        if kind == "link to nothing":
            member.type, member.linkname = tarfile.LNKTYPE, "nothing"
        if kind == "link":
            member.type, member.linkname = tarfile.SYMTYPE, "../.."
        if kind == "device":
            member.type = tarfile.CHRTYPE
        member.size = 4 if member.isreg() else 0
        archive.addfile(member, io.BytesIO(b"evil"))


@pytest.mark.parametrize("kind", ["upwards", "absolute", "link", "link to nothing", "device", "cut",
                                  "cut between files", "other bytes in gzip", "noise", "no set"])
def test_archives_that_are_hostile_or_damaged_are_refused(kind: str, run: Gpu, data: Path, tmp_path: Path) -> None:
    (tmp_path / "packed").mkdir()
    path = tmp_path / "packed" / "cifar10.tar"
    with tarfile.open(path, "w") as archive:
        archive.add(data / "cifar10", "cifar10")
    if kind.startswith("cut"):
        with tarfile.open(path) as archive:
            member = archive.getmembers()[-1]
        path.write_bytes(path.read_bytes()[:member.offset if kind == "cut between files" else member.offset_data + 9])
    elif kind == "other bytes in gzip":
        content = bytearray(gzip.compress(path.read_bytes(), 0))
        content[-1000] ^= 255  # of the archive's end, which nothing but the checksum protects
        path.with_suffix(".tar.gz").write_bytes(content)
        path.unlink()
    elif kind == "noise":
        path.write_bytes(b"this is no archive" * 1000)
    elif kind == "no set":
        with tarfile.open(path, "w") as archive:
            archive.add(data / "cifar10" / "test", "test")
    else:
        hostile(path, kind)
    done = run("--data", path.parent, "--out", tmp_path / "out", "--scale", "0.01", "--device", "cpu", "--only",
               "smoke_sgd_float16")  # which a CPU leaves out: an archive that is not refused costs no trainings
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "cifar10" in done.stderr, done.stderr
    assert not (tmp_path / "escaped").exists() and not Path("/tmp/escaped").exists()
    assert not list((tmp_path / "out").rglob("train")) and not list((tmp_path / "out" / "data").iterdir())


# ------------------------------------------------------------------------------------------------------------ mistakes


@pytest.mark.parametrize(("arguments", "parts"), [
    (["--data", "NOWHERE"], ["--data NOWHERE", "no such folder"]),
    (["--data", "EMPTY"], ["no data set in it", "cifar10"]),
    (["--minutes", "0"], ["--minutes 0", "above 0"]),
    (["--minutes", "nan"], ["--minutes nan"]),
    (["--minutes", "soon"], ["--minutes", "soon"]),
    (["--scale", "2"], ["--scale 2"]),
    (["--parallel", "0"], ["--parallel 0"]),
    (["--only", "cifar10_fats"], ["cifar10_fats", "cifar10_fast"]),
    (["--out", "FILE"], ["--out FILE", "a file"]),
    (["--out", "OTHER"], ["--out OTHER", "not of this program"]),
    (["--out", "DAMAGED"], ["--out DAMAGED", "settings.json", "damaged"]),
    (["--fast"], ["--fast"]),
    pytest.param(["--device", "auto", "--scale", "1"], ["no CUDA device", "--scale 0.01", "--device cpu"],
                 marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")),
])
def test_mistakes_are_one_line(arguments: list[str], parts: list[str], run: Gpu, data: Path, tmp_path: Path,
                               monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "EMPTY").mkdir()
    (tmp_path / "FILE").touch()
    (tmp_path / "OTHER").mkdir()
    (tmp_path / "OTHER" / "mine.txt").touch()
    (tmp_path / "DAMAGED").mkdir()
    (tmp_path / "DAMAGED" / "settings.json").write_text('{"scale":')
    done = run("--data", data, "--out", "out", "--scale", "0.01", "--device", "cpu", *arguments)
    assert done.returncode == 2 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, done.stderr
    assert all(part in done.stderr for part in parts), done.stderr
    assert not (tmp_path / "out").exists()
