"""The survey of a submission's folder: whatever lies there is refused or listed, quickly, and no file is opened."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from compress.evaluation.runtimes import load_model
from compress.evaluation.submission import read_submission
from compress.evaluation.survey import MAX_DEPTH, MAX_ENTRIES, survey_folder
from metadata.errors import UserError, VerificationError
from tests.helpers.submissions import edit_json, weights_of

META = "model_metadata.json"
QUICKLY = 2.0  # seconds; what is refused here took minutes to for ever


@pytest.fixture
def copy(submission: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(submission, tmp_path / "submission"))


def refused(folder: Path, said: str) -> None:
    """Reading and loading the folder end quickly in an error of one line that says what is wrong."""
    for read in (read_submission, load_model):
        start = time.process_time()
        with pytest.raises(VerificationError, match=said) as error:
            read(folder)
        assert time.process_time() - start < QUICKLY
        assert len(str(error.value)) < 600 and "\n" not in str(error.value)


def many_files(folder: Path) -> None:
    (folder / "more").mkdir()
    for index in range(MAX_ENTRIES):
        (folder / "more" / str(index)).touch()


def deep_folders(folder: Path) -> None:
    """Folders 1,200 levels deep, whose path no system call takes in one piece."""
    here = os.open(folder, os.O_RDONLY)
    for _ in range(1200):
        os.mkdir("deep", dir_fd=here)
        below = os.open("deep", os.O_RDONLY, dir_fd=here)
        os.close(here)
        here = below
    os.close(here)


HOSTILE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "a sparse file of 4 TB": (lambda f: ((f / "notes.bin").touch(), os.truncate(f / "notes.bin", 2**42)), "over the limit"),
    "sparse files together": (lambda f: [((f / name).touch(), os.truncate(f / name, 2**31)) for name in "abc"],
                              "with the files before, are over the limit"),
    "many files": (many_files, "over 10,000 files and folders"),
    "deep folders": (deep_folders, "folders lie over 32 levels deep"),
    "a pipe": (lambda f: os.mkfifo(f / "pipe"), "neither a file nor a folder"),
    "a link out": (lambda f: os.symlink("/etc/hostname", f / "link"), "outside the submission"),
    "a link to a folder outside": (lambda f: os.symlink("/etc", f / "link"), "outside the submission"),
    "a link to itself": (lambda f: os.symlink("link", f / "link"), "cannot be resolved"),
    "a link to nothing": (lambda f: os.symlink("nothing", f / "link"), "leads nowhere"),
    "a name in another spelling": (lambda f: rename(f, lambda name: "./" + name), "String should match"),
    "a doubled slash": (lambda f: rename(f, lambda name: "a/.//./../" + name), "write 'compressed_slimresnet18.pth'"),
    "two names by a hard link": (lambda f: (os.link(weights_of(f), f / "w2.pth"), twice(f)), "w2.pth, which are one file"),
    "two names by a link": (lambda f: (os.symlink(weights_of(f).name, f / "w2.pth"), twice(f)), "which are one file"),
    "a file behind a link": (lambda f: (os.symlink(".", f / "here"), rename(f, lambda name: "here/" + name)),
                             "lies behind the link here"),
}


def twice(folder: Path) -> None:
    """State the weights' hash under another name, too."""
    edit_json(folder, META, lambda m: m["files"].update({"w2.pth": m["files"][m["weights_file"]]}))


def rename(folder: Path, new: Callable[[str], str]) -> None:
    """State another name for the weights, which stay where they are."""
    def change(metadata: dict[str, Any]) -> None:
        name = new(metadata["weights_file"])
        metadata["files"][name] = metadata["files"].pop(metadata["weights_file"])
        metadata["weights_file"] = name
    edit_json(folder, META, change)


@pytest.mark.parametrize("what", HOSTILE)
def test_what_lies_in_a_folder_is_refused_before_it_is_opened(what: str, copy: Path) -> None:
    damage, said = HOSTILE[what]
    damage(copy)
    refused(copy, said)
    subprocess.run(["rm", "-rf", copy], check=True)  # pytest's own removal fails at the deep folders


def test_one_file_under_many_spellings_is_not_hashed_for_each(copy: Path) -> None:
    """Sixty names of one sparse file of 1 GB took minutes of hashing, before any limit of time began."""
    (copy / "a").mkdir()
    (copy / "a" / "b").touch()
    os.truncate(copy / "a" / "b", 2**30)
    record = {"sha256": hashlib.sha256(b"").hexdigest(), "bytes": 2**30}
    edit_json(copy, META, lambda m: m["files"].update({"a" + "/." * index + "/b": record for index in range(60)}))
    refused(copy, "write 'a/b', the plain name of that file")


def test_hard_links_are_hashed_once(tmp_path: Path) -> None:
    (tmp_path / "0").write_bytes(bytes(2**24))
    for index in range(1, 200):
        os.link(tmp_path / "0", tmp_path / str(index))
    start = time.process_time()
    hashes = survey_folder(tmp_path).hashes()
    assert len(hashes) == 200 and set(hashes.values()) == {hashlib.sha256(bytes(2**24)).hexdigest()}
    assert time.process_time() - start < QUICKLY


def test_the_survey_lists_files_and_links_in_order_and_counts_their_names(tmp_path: Path) -> None:
    for name in ("b", "a/c", "a b", "empty/deeper/x"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    os.symlink("a/c", tmp_path / "link")
    os.symlink("a", tmp_path / "folder")
    found = survey_folder(tmp_path)
    assert list(found.files) == [str(path.relative_to(tmp_path)) for path in sorted(tmp_path.rglob("*")) if path.is_file()]
    assert found.files["link"].identity == found.files["a/c"].identity
    assert found.total_bytes == sum(path.stat().st_size for path in found.paths())
    assert found.name_bytes == len("b" "a" "c" "a b" "empty" "deeper" "x" "link" "a/c" "folder" "a")
    assert found.find("a/c", "x").size == 3


def test_folders_up_to_the_limit_are_read(tmp_path: Path) -> None:
    (tmp_path / Path(*["d"] * (MAX_DEPTH - 1))).mkdir(parents=True)
    assert survey_folder(tmp_path).files == {}
    (tmp_path / Path(*["d"] * MAX_DEPTH)).mkdir()
    with pytest.raises(VerificationError, match="levels deep"):
        survey_folder(tmp_path)


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads every folder")
def test_a_folder_that_cannot_be_read_gives_one_line(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir(mode=0o300)
    with pytest.raises(VerificationError, match="cannot be read: Permission denied"):
        survey_folder(tmp_path)
    with pytest.raises(UserError, match="cannot be read: Permission denied"):
        survey_folder(tmp_path / "in")


def test_no_folder_is_the_users_mistake(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such folder"):
        survey_folder(tmp_path / "nothing")


def test_metadata_in_a_folder_below_are_pointed_at(tmp_path: Path) -> None:
    (tmp_path / "one" / "two").mkdir(parents=True)
    (tmp_path / "one" / "two" / "metadata.json").write_text(json.dumps({}))
    with pytest.raises(VerificationError, match="one/two has one: pass that folder"):
        read_submission(tmp_path)
