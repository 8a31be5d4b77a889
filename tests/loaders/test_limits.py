"""Files that hold far more than they state, that were cut or damaged unseen, or that never end: one line, in little memory.
"""

from __future__ import annotations

import io
import os
import random
import resource
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from compress.evaluation.submission import check_served
from loaders.catalog import load
from loaders.images import decode_image
from loaders.labels import numbered
from loaders.packed import Packed, Spool
from loaders.request import Request
from loaders.sets.webdataset import MOST_PADDING
from loaders.splits import Splits
from metadata.errors import UserError, VerificationError
from metadata.schemas import Preprocessing
from tests.helpers.folders import draw_folder
from tests.helpers.formats import add_member, write_csv, write_parquet, write_webdataset


def opened(root: Path, name: str, **changes: Any) -> Splits:
    return load(Request(name=name, root=root, **{"preprocessing": {"resize": 12, "crop": 12}, **changes}))


def refusal(root: Path, name: str, **changes: Any) -> str:
    with pytest.raises(UserError) as caught:
        opened(root, name, **changes)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def picture(shade: int, padding: int = 0) -> bytes:
    """A PNG that nothing but its shade tells from others, with zeros behind its end."""
    file = io.BytesIO()
    Image.fromarray(np.full((8, 8), shade, np.uint8)).save(file, "PNG")
    return file.getvalue() + bytes(padding)


def shared_rows(path: Path, pictures: list[bytes], rows: int, **columns: Any) -> None:
    """A Parquet file whose rows take turns in a dictionary of pictures; it is stored once, and compressed."""
    import pyarrow
    from pyarrow import parquet

    path.parent.mkdir(parents=True, exist_ok=True)
    images = pyarrow.DictionaryArray.from_arrays(
        pyarrow.array([row % len(pictures) for row in range(rows)], pyarrow.int32()), pyarrow.array(pictures))
    table = pyarrow.table({"image": images, "label": [row % 2 for row in range(rows)], **columns})
    parquet.write_table(table, path, compression="zstd", store_schema=False)


def test_a_parquet_file_of_some_hundred_bytes_does_not_fill_memory(tmp_path: Path) -> None:
    """With 20 MiB in each row, and so 5 GiB in the first 256, it is refused before 1 GiB is taken."""
    pytest.importorskip("pyarrow")
    path = tmp_path / "set" / "train.parquet"
    shared_rows(path, [picture(0, 20 * 2**20)], 260)
    assert path.stat().st_size < 2000
    code = ("import resource, sys; from pathlib import Path; import pyarrow.parquet, torch\n"
            "from loaders.catalog import load; from loaders.request import Request; from metadata.errors import UserError\n"
            "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
            "try: load(Request(name='parquet', root=Path(sys.argv[1])))\n"
            "except UserError as error: print(error)\n"
            "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)\n")
    done = subprocess.run([sys.executable, "-c", code, str(path.parent)], capture_output=True, text=True, check=True)
    said, taken = done.stdout.splitlines()
    assert "train.parquet: row 12: the rows up to here hold 272," in said and "made to fill memory" in said
    assert int(taken) < 2**18, f"{int(taken):,} KiB"


def test_a_parquet_file_that_states_far_more_than_it_has_is_not_read(tmp_path: Path,
                                                                     monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("pyarrow")
    monkeypatch.setattr("loaders.sets.parquet.MOST_BYTES", 2**20)
    shared_rows(tmp_path / "train.parquet", [picture(0, 2**21)], 2)
    assert "states 2,097," in (said := refusal(tmp_path, "parquet")) and "over the limit of 1,1" in said


def test_repeated_pictures_are_stored_once_and_read_as_often_as_they_are_listed(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    pictures = [picture(shade) for shade in range(60)]
    for split, rows in (("train", 6000), ("test", 120)):
        shared_rows(tmp_path / "set" / f"{split}.parquet", pictures, rows)
    splits = opened(tmp_path / "set", "parquet", validation_fraction=0.0, memory_limit_gb=1e-9)
    assert len(splits.train) == 6000 and len(splits.open_test()) == 120
    packed = [path for path in splits.train.paths or [] if isinstance(path, Packed)]
    assert {path.read() for path in packed} == set(pictures) and len({path.offset for path in packed}) == 60
    assert packed[0].spool is not None and packed[0].spool.length == sum(map(len, pictures))
    assert len({path.name for path in packed}) == 6000


def test_a_list_of_pictures_in_a_row_is_refused_or_not_read(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    pictures = [picture(shade) for shade in range(12)]
    path = tmp_path / "set" / "train.parquet"
    shared_rows(path, pictures, 24, more=[[b"x"]] * 24)
    assert opened(path, "parquet").card.num_classes == 2
    assert "the column more holds list<" in refusal(path, "parquet", columns=["more", "label"])
    assert "one column for both" in refusal(path, "parquet", columns=["image", "image"])


def test_pictures_that_exceed_what_their_files_state_do_not_fill_the_disk() -> None:
    spool = Spool(0)
    spool.limit = 4
    assert spool.add(b"abc") == 0
    with pytest.raises(UserError, match="take over 4 bytes, far more than their files state"):
        spool.add(b"de")
    assert spool.read(0, 9) == b"abc"


@pytest.fixture
def tars(tmp_path: Path) -> Path:
    return write_webdataset(draw_folder(tmp_path / "folder", 2, 6), tmp_path / "set")


def headers(path: Path) -> list[int]:
    with tarfile.open(path) as tar:
        return [member.offset for member in tar]


def flipped(content: bytes, place: int) -> bytes:
    return content[:place] + bytes([content[place] ^ 1]) + content[place + 1:]


DAMAGE: dict[str, tuple[Callable[[bytes, int], bytes], str]] = {
    "a flipped bit": (lambda content, place: flipped(content, place + 10), "got no header"),
    "cut in a header": (lambda content, place: content[:place + 100], "got 100 bytes"),
    "cut between members": (lambda content, place: content[:place], "got 0 bytes"),
    "half of the zeros at the end": (lambda content, place: content[:place] + bytes(200), "got 200 bytes"),
    "a header of zeros": (lambda content, place: content[:place] + bytes(512) + content[place + 512:],
                          "zeros, which end a tar, and other bytes from byte"),
    "fetched to here, and the file made before": (lambda content, place: content[:place] + bytes(MOST_PADDING + 512),
                                                  "bytes behind the last member, expected at most"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_a_damaged_tar_is_no_smaller_data_set(case: str, tars: Path) -> None:
    change, said = DAMAGE[case]
    path = tars / "train-0000.tar"
    place = headers(path)[6]
    path.write_bytes(change(path.read_bytes(), place))
    message = refusal(tars, "webdataset")
    assert f"at byte {place:,} of {path}" in message and said in message


def test_no_flipped_bit_in_a_header_makes_a_tar_smaller(tars: Path) -> None:
    draw = random.Random(0)
    path = tars / "train-0000.tar"
    places, content = headers(path), path.read_bytes()
    whole = len(opened(tars, "webdataset", validation_fraction=0.0).train)
    for _ in range(40):
        path.write_bytes(flipped(content, draw.choice(places) + draw.randrange(500)))
        try:
            assert len(opened(tars, "webdataset", validation_fraction=0.0).train) == whole
        except UserError as error:
            assert "train-0000.tar" in str(error)


@pytest.mark.parametrize("mode", ["stream", "pax", "gnu", "ustar", "tar", "tar -b1", "tar -b2048", "one block"])
def test_whole_tars_of_all_writers_are_read(mode: str, tars: Path, tmp_path: Path) -> None:
    """`stream` is how webdataset's TarWriter writes."""
    expected = opened(tars, "webdataset").card.content
    for path in tars.glob("*.tar"):
        unpacked = tmp_path / "unpacked" / path.stem
        with tarfile.open(path) as tar:
            tar.extractall(unpacked, filter="data")
        names = sorted(os.listdir(unpacked))
        path.unlink()
        if mode.startswith("tar"):
            program = shutil.which("tar")
            if program is None:
                pytest.skip("no program tar")
            subprocess.run([program, *mode.split()[1:], "-cf", path, "-C", unpacked, *names], check=True)
            continue
        form = {"pax": tarfile.PAX_FORMAT, "ustar": tarfile.USTAR_FORMAT}.get(mode, tarfile.GNU_FORMAT)
        with tarfile.open(path, "w|" if mode == "stream" else "w", format=form) as tar:
            for name in names:
                add_member(tar, name, (unpacked / name).read_bytes())
        if mode == "one block":
            path.write_bytes(path.read_bytes().rstrip(b"\0") + bytes(512 + -len(path.read_bytes().rstrip(b"\0")) % 512))
    assert opened(tars, "webdataset").card.content == expected


def test_joined_tars_are_named_or_read(tars: Path) -> None:
    """`cat` leaves the zeros between the tars. `tar -A` of GNU takes them away."""
    first, second = tars / "train-0000.tar", tars / "train-0001.tar"
    whole = len(opened(tars, "webdataset", validation_fraction=0.0).train)
    content = first.read_bytes()
    first.write_bytes(content + second.read_bytes())
    assert "tars that were joined with `cat` must be packed again as one" in refusal(tars, "webdataset")
    first.write_bytes(content)
    program = shutil.which("tar")
    if program is None or "GNU" not in subprocess.run([program, "--version"], capture_output=True, text=True).stdout:
        return
    with tarfile.open(second) as tar:
        renamed = [(f"second{member.name}", tar.extractfile(member)) for member in tar if not member.name.startswith(".")]
        with tarfile.open(tars / "other", "w") as other:
            for name, file in renamed:
                assert file is not None
                add_member(other, name, file.read())
    second.unlink()
    subprocess.run([program, "-Af", first, tars / "other"], check=True)
    assert len(opened(tars, "webdataset", validation_fraction=0.0).train) == whole


@pytest.mark.parametrize("name", ["webdataset", "parquet", "csv"])
def test_pipes_are_left_out(name: str, tmp_path: Path) -> None:
    """Nothing opens a named pipe, which would wait for a writer for ever."""
    if name == "parquet":
        pytest.importorskip("pyarrow")
    write = {"webdataset": write_webdataset, "parquet": write_parquet, "csv": write_csv}[name]
    root = write(draw_folder(tmp_path / "folder", 2, 6), tmp_path / "set")
    expected = opened(root, name).card.content
    pipe = root / {"webdataset": "train-9.tar", "parquet": "train-9.parquet", "csv": "train.csv"}[name]
    os.mkfifo(pipe)
    assert opened(root, name).card.content == expected
    if name == "webdataset":
        assert opened(root / "*.tar", name).card.content == expected
    assert "there is n" in refusal(pipe, name) or "expected" in refusal(pipe, name)


@pytest.mark.parametrize(("changes", "said"), [
    ({"image_size": (60_000, 60_000), "preprocessing": {}}, "a resize to 68,571 pixels is over the limit, 4,096 pixels"),
    ({"preprocessing": {"resize": 5000}}, "a resize to 5,000 pixels is over the limit"),
    ({"preprocessing": {"resize": None, "crop": 5000}}, "a crop of 5,000 pixels is over the limit, 4,096 pixels"),
    ({"preprocessing": {"resize": 4000, "crop": 12}}, "8 times the crop"),
])
def test_absurd_sizes(changes: dict[str, Any], said: str, tmp_path: Path) -> None:
    root = draw_folder(tmp_path / "folder", 2, 2)
    assert said in refusal(root, "image_folder", **changes)
    if "image_size" in changes:
        assert "over the limit" in refusal(root, "digits", image_size=60_000, preprocessing={})
    elif (resize := changes["preprocessing"]["resize"]) is not None:  # the evaluator has the same limit
        crop = changes["preprocessing"].get("crop", 224)
        with pytest.raises(VerificationError, match=said):
            check_served("here", (3, crop, crop), Preprocessing(resize=resize, crop=crop))


def test_a_line_of_pixels_is_not_resized_to_a_plain_of_them(tmp_path: Path) -> None:
    Image.fromarray(np.zeros((1, 60_000), np.uint8)).save(tmp_path / "line.png")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(UserError, match=r"line\.png: the image is 60000x1, .* 15,360,000 x 256 pixels, over the limit"):
        decode_image(tmp_path / "line.png", Preprocessing())
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**18


def test_equal_columns_and_whole_decimals(tmp_path: Path) -> None:
    root = write_csv(draw_folder(tmp_path / "folder", 2, 6), tmp_path / "set")
    for columns in (["file", "file"], ["file", "1"], ["file", "label", "label"]):
        assert f"data.columns {','.join(columns)}: one column for two things" in refusal(root, "csv", columns=columns)
    table = root / "labels.csv"
    table.write_text(table.read_text().replace("class_000", "10.0").replace("class_001", "2.0"))
    assert opened(root, "csv").card.class_names == ["2.0", "10.0"]
    assert numbered(["10.0", "0.0", "2."], "here") == ["0.0", "2.", "10.0"]
    assert numbered(["1.0", "1.5", "2.0"], "here") == ["1.0", "1.5", "2.0"]  # names, such as versions
    for labels, said in ((["1", "1.0"], "'1' and '1.0' are one number"), (["-1.0", "0.0"], "-1.0 is out of range"),
                         (["0.0", "1.0", "2.0", "cat"], "'cat' is no number")):
        with pytest.raises(UserError, match=said):
            numbered(labels, "here")
