"""What foreign code may read of this machine: the interpreter, the standard library, and some installed packages.

The list names what is in reach, file by file and package by package. A folder of packages as a whole is never on the list:
scikit-learn's own folder holds a well-known test set with its labels. Of the packages on the list, files that hold data are
out of reach (`holds_data`). Both walls are built from the one list: the mounts of bubblewrap (walls.py) and the rules of
Landlock (confine.py).
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.metadata
import os
import re
import sys
import sysconfig
from pathlib import Path

from compress.evaluation.shared_libraries import needed_libraries

# Distributions that submissions use; what they require comes with them.
ALLOWED = ("torch", "torchvision", "torchaudio", "torchao", "torchinfo", "torchmetrics", "numpy", "pillow", "timm",
           "safetensors", "cloudpickle", "einops", "tqdm", "pyyaml", "packaging", "huggingface-hub", "transformers",
           "onnx", "onnxruntime", "opencv-python-headless", "thop", "fvcore", "pytorch-lightning", "lightning")
# Their folders hold data sets, or large tables that could serve as one. What requires them does without.
HOLD_DATA = {"scikit-learn", "scikit-image", "scipy", "pandas", "datasets", "seaborn", "statsmodels", "tensorflow", "keras"}
# What a package brings beside its code is out of reach where it is of a format of arrays, tables, pictures, weights or
# archives, or is named for labels, or lies in a folder for tests or data sets: timm brings the labels of ImageNet's
# validation images, and trained weights of a package would be counted nowhere.
DATA_FORMATS = (
    ".npy", ".npz", ".csv", ".tsv", ".parquet", ".arrow", ".feather", ".pkl", ".pickle", ".pck", ".mat", ".h5", ".hdf5",
    ".arff", ".dat", ".db", ".sqlite", ".jsonl", ".tfrecord", ".npk", ".pb", ".png", ".jpg", ".jpeg", ".gif", ".bmp",
    ".webp", ".tif", ".tiff", ".ppm", ".pgm", ".pt", ".pth", ".ckpt", ".bin", ".safetensors", ".onnx", ".gz", ".bz2", ".xz",
    ".zst", ".zip", ".tar")
DATA_NAMES = ("label", "annotation", "ground_truth")
TEST_FOLDERS = {"test", "tests"}
DATA_FOLDERS = {*TEST_FOLDERS, "testdata", "test_data", "sample_data", "datasets"}
CODE_FORMATS = (".py", ".pyc", ".pyi", ".pyx", ".pxd", ".pxi", ".so", ".h", ".hpp", ".cuh", ".cu", ".c", ".cc", ".cpp",
                ".cmake", ".f", ".f90", ".typed")
PACKAGE_FOLDERS = ("site-packages", "dist-packages")
# Single files of the system that the interpreter and its libraries read.
SYSTEM = ("/etc/ld.so.cache", "/etc/localtime", "/usr/lib/locale/C.utf8", "/sys/devices/system/cpu")
PROCESSES = ("/proc/cpuinfo", "/proc/meminfo")  # of the sandbox's own /proc
DEVICES = ("/dev/null", "/dev/zero", "/dev/urandom", "/dev/random")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reach:
    """What may be read. The deepest entry above a path decides.

    Args:
        trees: resolved paths of files, and of folders with all that lies in them.
        holes: resolved paths of folders that may be listed, and of whose content only the trees inside are in reach; and of
            files in trees that may not be read.
        links: (link, target) of every symbolic link on the way to the trees.
        names: what can be imported from the holes: top-level modules and packages.
        distributions: the names of the installed ones in `ALLOWED`, for messages.
        search: folders of packages, as the interpreter names them.
    """

    trees: tuple[str, ...]
    holes: tuple[str, ...]
    links: tuple[tuple[str, str], ...]
    names: tuple[str, ...]
    distributions: tuple[str, ...]
    search: tuple[str, ...]

    def covers(self, path: Path) -> str | None:
        """Return the tree that puts a resolved path in reach, or None."""
        for above in (path, *path.parents):
            if str(above) in self.trees:
                return str(above)
            if str(above) in self.holes:
                return None
        return None

    def rules(self) -> list[tuple[str, bool]]:
        """Return (path, whether its content may be read) for Landlock, whose rights always hold for all that lies below.

        A tree with a hole is taken apart: it and the hole may be listed, and each of its other entries may be read.
        """
        found = [(hole, False) for hole in self.holes]
        waiting = list(self.trees)
        while waiting:
            path = waiting.pop()
            if not any(hole.startswith(path + "/") for hole in self.holes):
                found.append((path, True))
                continue
            found.append((path, False))
            with os.scandir(path) as entries:
                waiting += [entry.path for entry in entries if not entry.is_symlink() and entry.path not in self.holes]
        return sorted(found)


@functools.cache
def reach() -> Reach:
    """Return what foreign code may read here."""
    allowed = allowed_distributions()
    tops: dict[str, set[str]] = {}  # folder of packages -> what lies in it
    programs, hidden = [os.path.realpath(sys.executable)], set[str]()
    for name, distribution in allowed.items():
        folder = str(distribution.locate_file(""))
        files = installed_files(distribution)
        (entries, libraries), data = top_entries(files), data_entries(files)
        hidden |= {os.path.join(folder, path) for path in data}
        if name.startswith("nvidia-"):  # every entry is a mount, and nobody asks for the versions of these
            entries = {entry for entry in entries if not entry.endswith("-info")}
        tops.setdefault(folder, set()).update(entries - data)
        if not name.startswith("nvidia-"):  # these need what all need
            programs += [os.path.join(folder, library) for library in libraries]
    links: dict[str, str] = {}
    standard = {follow_links(sysconfig.get_path(kind), links) for kind in ("stdlib", "platstdlib")}
    standard = {path for path in standard if os.path.isfile(os.path.join(path, "os.py")) or "lib-dynload" in path}
    programs += [str(path) for folder in standard for path in Path(folder, "lib-dynload").glob("*.so")
                 if not path.name.startswith("_tkinter")]  # windows have no place here
    hidden |= {os.path.join(folder, "test") for folder in standard}  # of Python itself
    holes = {os.path.join(folder, name) for folder in standard for name in PACKAGE_FOLDERS}
    trees = {sys.executable, os.path.join(sys.prefix, "pyvenv.cfg"), *standard, *SYSTEM, *needed_libraries(programs)}
    for folder, names in tops.items():
        holes |= {folder, *(os.path.join(folder, os.path.dirname(name)) for name in names)}
        trees |= {os.path.join(folder, name) for name in names}
    holes = {follow_links(path, links) for path in holes if os.path.isdir(path)}
    holes |= {follow_links(path, links) for path in hidden if os.path.exists(path)}
    trees = {follow_links(path, links) for path in trees if os.path.exists(path)}
    nested = {path for path in trees if (above := uppermost(path, trees, holes)) and above != path}
    kept = trees - nested
    return Reach(trees=tuple(sorted(kept)), holes=tuple(sorted(holes)),
                 links=tuple((link, target) for link, target in links.items()
                             if uppermost(os.path.realpath(os.path.dirname(link)), kept, holes) is None),
                 names=tuple(sorted({importable(name) for names in tops.values() for name in names} - {""})),
                 distributions=tuple(name for name in ALLOWED if name in allowed), search=tuple(sorted(tops)))


def uppermost(path: str, trees: set[str], holes: set[str]) -> str | None:
    """Return the nearest tree at or above a path, unless a hole lies nearer."""
    for above in (path, *map(str, Path(path).parents)):
        if above in holes:
            return None
        if above in trees and above != path:
            return above
    return path if path in trees else None


def follow_links(path: str, links: dict[str, str]) -> str:
    """Return the path without symbolic links, and note in `links` each link on the way and its target."""
    done, waiting = "/", [part for part in os.path.abspath(path).split("/") if part][::-1]
    while waiting:
        part = waiting.pop()
        if part in ("", "."):
            continue
        if part == "..":
            done = os.path.dirname(done)
            continue
        here = os.path.join(done, part)
        if os.path.islink(here):
            links[here] = target = os.readlink(here)
            if target.startswith("/"):
                done = "/"
            waiting += target.split("/")[::-1]
        else:
            done = here
    return done


def allowed_distributions() -> dict[str, importlib.metadata.Distribution]:
    """Return the installed distributions in reach by their normalized names, with all that they require."""
    found: dict[str, importlib.metadata.Distribution] = {}
    waiting, asked = [*ALLOWED], set[str]()
    while waiting:
        wanted = waiting.pop()
        if wanted in asked:
            continue
        asked.add(wanted)
        name, _, extras = wanted.partition("[")
        if (name := normalized(name)) in HOLD_DATA:
            continue
        try:
            found[name] = found.get(name) or importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            continue
        for line in requirements(found[name]):
            requirement, _, condition = line.partition(";")
            if "extra" not in condition or any(re.search(rf"extra == .{extra}\W", condition)
                                               for extra in re.findall(r"[\w.-]+", extras)):
                waiting += re.findall(r"^[\w.-]+(?:\s*\[[^\]]*)?", requirement.strip())
    return found


def requirements(distribution: importlib.metadata.Distribution) -> list[str]:
    """Return what a distribution requires. Python's own reader parses its whole description for that."""
    text = distribution.read_text("METADATA")
    if text is None:
        return distribution.requires or []
    lines = text.partition("\n\n")[0].splitlines()
    return [line.partition(":")[2].strip() for line in lines if line.startswith("Requires-Dist:")]


def normalized(name: str) -> str:
    """Return a distribution's name as package indices compare it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def installed_files(distribution: importlib.metadata.Distribution) -> list[str]:
    """Return the paths of a distribution's files in its folder of packages."""
    record = distribution.read_text("RECORD")
    if record is None:  # as Linux distributions install packages
        names = (distribution.read_text("top_level.txt") or distribution.metadata["Name"]).split()
        folder = Path(str(distribution.locate_file("")))
        found = [path for name in names for path in (folder / f"{name}.py", *(folder / name).rglob("*"))]
        return [str(path.relative_to(folder)) for path in found if path.is_file()]
    lines = [line.strip('"').partition(",")[0] for line in record.splitlines()]
    return [path for path in lines if path and not path.startswith(("/", "..", "__pycache__/"))]


def top_entries(paths: list[str]) -> tuple[set[str], list[str]]:
    """Return a distribution's own entries in its folder of packages, and its extension modules and libraries.

    An entry is a file, a package or, where several distributions share a folder without `__init__.py`, what lies in that.

    Args:
        paths: of its files.
    """
    regular = {path.partition("/")[0] for path in paths if path.count("/") == 1 and path.endswith("/__init__.py")}
    entries = set()
    for path in paths:
        first, _, rest = path.partition("/")
        if "/" in rest and first not in regular and not first.endswith((".libs", "-info")):  # a shared folder
            entries.add(f"{first}/{rest.partition('/')[0]}")
        else:
            entries.add(first)
    # A file right in a shared folder makes the whole folder an entry: then the folder is not shared.
    return {entry for entry in entries if os.path.dirname(entry) not in entries}, [
        path for path in paths if path.endswith(".so") or ".so." in path]


def data_entries(paths: list[str]) -> set[str]:
    """Return what of a distribution holds data: folders in a folder of tests, folders of nothing else, and single files.

    Each is a mount in bubblewrap, so there should be few. Folders of tests themselves stay: numpy.testing imports from one.

    Args:
        paths: of all its files.
    """
    data = [path for path in paths if holds_data(path)]
    if not data:
        return set()
    kept = {""}
    for path in set(paths).difference(data):
        while (path := os.path.dirname(path)) not in kept:
            kept.add(path)
    found = set()
    for path in data:
        parts = path.split("/")
        tests = next((depth for depth, folder in enumerate(parts[:-1], 1) if folder in TEST_FOLDERS), 0)
        if tests:
            path = "/".join(parts[:tests + 1])
        while (above := os.path.dirname(path)) not in kept:
            path = above
        found.add(path)
    return found


def holds_data(path: str) -> bool:
    """Tell by its name whether a file of a package holds images, labels, tables or weights."""
    *folders, name = path.lower().split("/")
    if not folders or folders[0].endswith("-info") or name.endswith(CODE_FORMATS) or ".so." in name:
        return False
    return name.endswith(DATA_FORMATS) or any(word in name for word in DATA_NAMES) or not DATA_FOLDERS.isdisjoint(folders)


def importable(name: str) -> str:
    """Return the top-level name that an entry of a folder of packages is imported by; "" for what is not imported."""
    first = name.partition("/")[0]
    return "" if first.endswith((".libs", "-info", ".pth")) else first.partition(".")[0]
