"""Images in zip and tar files: found by the names that find them in folders, read whole or not at all."""

import io
import random
import tarfile
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from pyarrow import fs

from sima_ray.data import locations, shards
from sima_ray.data.locations import check_root, load_image, read_image, resolve_image
from sima_ray.data.shards import Shards, open_shards
from sima_ray.errors import DataError
from sima_ray.images import ImageProblem
from sima_ray.records import Quarantine

LEAF = "000000401804.jpg"
LAYOUTS = [
    LEAF,
    f"train2017/{LEAF}",
    f"coco/train2017/{LEAF}",
    f"COCO_train2014_{LEAF}",
    f"train2014/COCO_train2014_{LEAF}",
]
LOCAL = fs.LocalFileSystem()


def jpeg(colour: int = 0) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (40, 30), (colour, 0, 0)).save(file, "JPEG")
    return file.getvalue()


def write_zip(file: Path, members: dict[str, bytes], method: int = zipfile.ZIP_STORED) -> str:
    with zipfile.ZipFile(file, "w", method) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return str(file)


def write_tar(file: Path, members: dict[str, bytes]) -> str:
    with tarfile.open(file, "w") as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return str(file)


def opened(*files: Path | str) -> Shards:
    return open_shards(LOCAL, LOCAL.get_file_info([str(file) for file in files]))


def reason(root: str, name: str) -> tuple[Quarantine, str]:
    with pytest.raises(ImageProblem) as problem:
        read_image(root, name)
    return problem.value.reason, str(problem.value)


@pytest.mark.parametrize("place", LAYOUTS)
def test_every_layout_is_found_in_every_kind_of_shard(tmp_path: Path, place: str) -> None:
    members = {"a/b/c.jpg": jpeg(7), place: jpeg(1), "note.txt": b"no image"}
    (tmp_path / "both").mkdir()
    write_zip(tmp_path / "both" / "1.zip", {"a/b/c.jpg": jpeg(7)})
    write_tar(tmp_path / "both" / "2.TAR", {f"./{place}": jpeg(1)})
    stored = write_zip(tmp_path / "stored.zip", members)
    roots = [
        stored,
        f"file://{stored}",
        write_zip(tmp_path / "deflated.ZIP", members, zipfile.ZIP_DEFLATED),
        write_tar(tmp_path / "images.tar", members),
        str(tmp_path / "both"),
        f"file://{tmp_path}/both/",
    ]
    for root in roots:
        for name in LAYOUTS:
            assert read_image(root, name) == jpeg(1), (root, name)
        assert load_image(root, "a/b/c.jpg", 10_000) == jpeg(7)
        assert reason(root, "b/c.jpg")[0] is Quarantine.MISSING_IMAGE
        assert reason(root, f"{root.rstrip('/')}/../{place}")[0] is Quarantine.MISSING_IMAGE
    path = f"{stored}/{place}"
    assert resolve_image(stored, path).path == resolve_image(stored, f"./{place}").path == path


def test_a_name_that_is_there_more_than_once(tmp_path: Path) -> None:
    write_zip(tmp_path / "b.zip", {"1.jpg": jpeg(1), "2.jpg": jpeg(2)})
    write_tar(tmp_path / "c.tar", {"2.jpg": jpeg(3), "3.jpg": jpeg(4)})
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for data in (jpeg(5), jpeg(6)):
            info = tarfile.TarInfo("3.jpg")
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    found = check_root(str(tmp_path))
    assert found is not None
    assert [Path(path).name for path in found.paths] == ["a.tar", "b.zip", "c.tar"]
    assert str(found) == "3 files in 3 shards, 3 names more than once"
    # Of one shard the last, as tar itself would leave it; of several the first.
    assert read_image(str(tmp_path), "3.jpg") == jpeg(6)
    assert read_image(str(tmp_path), "2.jpg") == jpeg(2)


def test_shards_of_another_file_system(tmp_path: Path) -> None:
    remote = fs.SubTreeFileSystem(str(tmp_path), LOCAL)
    write_zip(tmp_path / "a.zip", {"a.jpg": jpeg(1)})
    write_tar(tmp_path / "b.tar", {f"{n}.jpg": jpeg(n) for n in range(50)})
    found = open_shards(remote, remote.get_file_info(["a.zip", "b.tar"]))
    assert len(found) == 51
    for name, colour in (("a.jpg", 1), ("0.jpg", 0), ("49.jpg", 49)):
        member = found.find(name)
        assert member is not None and member.read() == jpeg(colour)
    (tmp_path / "b.tar").write_bytes((tmp_path / "b.tar").read_bytes()[: 512 * 9])
    with pytest.raises(DataError, match=r"b\.tar: no readable tar"):
        open_shards(remote, remote.get_file_info(["b.tar"]))


def test_a_folders_own_files_come_before_its_shards(tmp_path: Path) -> None:
    write_zip(tmp_path / "train2017.zip", {f"train2017/{n}.jpg": jpeg(n) for n in (1, 2)})
    (tmp_path / "train2017").mkdir()
    (tmp_path / "train2017" / "2.jpg").write_bytes(jpeg(9))
    assert read_image(str(tmp_path), "1.jpg") == jpeg(1)
    assert read_image(str(tmp_path), "2.jpg") == jpeg(9)
    assert reason(str(tmp_path), "3.jpg")[0] is Quarantine.MISSING_IMAGE


def test_a_folder_is_not_listed_while_it_lacks_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "1.jpg").write_bytes(jpeg(1))
    monkeypatch.setattr(locations, "FileSelector", None)
    assert read_image(str(tmp_path), "train2017/1.jpg") == jpeg(1)


@pytest.mark.parametrize("kind", ["zip", "tar"])
def test_archives_that_are_broken_are_named(tmp_path: Path, kind: str) -> None:
    write = write_zip if kind == "zip" else write_tar
    whole = Path(write(tmp_path / f"whole.{kind}", {f"{n}.jpg": jpeg(n) for n in range(40)}))
    cut = tmp_path / "some" / f"cut.{kind}"
    cut.parent.mkdir()
    write(cut.with_name(f"a.{kind}"), {"a.jpg": jpeg(0)})
    data = whole.read_bytes()
    spoilt = bytearray(data)
    if kind == "tar":
        spoilt[512 * 30] ^= 1  # in a header half way: tarfile itself would take it for the end
        assert opened(whole).find("9.jpg")
    else:
        spoilt[data.index(b"PK\1\2")] ^= 1
    for broken in (
        data[: len(data) // 2],
        data[: 512 * 6],
        b"",
        b"no archive" * 300,
        bytes(spoilt),
    ):
        cut.write_bytes(broken)
        with pytest.raises(DataError, match=rf"cut\.{kind}: no readable {kind} archive: .*cut off"):
            opened(*cut.parent.iterdir())
    with pytest.raises(DataError, match=rf"cut\.{kind}"):
        check_root(str(cut.parent))


def test_what_is_no_image_root(tmp_path: Path) -> None:
    file = tmp_path / "images.tar.gz"
    file.write_bytes(b"\x1f\x8b")
    for root in (file, tmp_path / "nowhere.zip"):
        with pytest.raises(DataError, match=r"no such image folder, \.zip or uncompressed \.tar"):
            check_root(str(root))


def test_members_that_lead_elsewhere_are_never_found(tmp_path: Path) -> None:
    members = {
        name: jpeg(1) for name in ("../x.jpg", "/etc/x.jpg", "a/../../x.jpg", "s3://b/x.jpg")
    }
    root = write_tar(tmp_path / "a.tar", members | {"x\udcff.jpg": jpeg(1), "fine.jpg": jpeg(2)})
    assert str(check_root(root)) == "1 files in 1 shard, 5 with unusable names"
    for name in ("x.jpg", *members):
        assert reason(root, name)[0] is Quarantine.MISSING_IMAGE
    with tarfile.open(tmp_path / "links.tar", "w") as archive:
        for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.DIRTYPE, tarfile.FIFOTYPE):
            info = tarfile.TarInfo(f"{kind!r}.jpg")
            info.type, info.linkname = kind, "/etc/passwd"
            archive.addfile(info)
    assert len(opened(tmp_path / "links.tar")) == 0


def test_bombs_and_damage_cost_one_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    members = {"good.jpg": jpeg(1), "bomb.jpg": bytes(5_000_000), "large.jpg": bytes(300_000)}
    file = tmp_path / "a.zip"
    write_zip(file, members | {"damaged.jpg": bytes(1000)}, zipfile.ZIP_DEFLATED)
    with zipfile.ZipFile(file, "a", zipfile.ZIP_BZIP2) as archive:
        archive.writestr("bzip2.jpg", jpeg(1))
        archive.writestr("stored.jpg", b"as it is", zipfile.ZIP_STORED)
        archive.writestr("locked.jpg", jpeg(1), zipfile.ZIP_STORED)
        archive.getinfo("bomb.jpg").file_size = 1000  # of what unpacks to 5 MB
        archive.getinfo("damaged.jpg").CRC ^= 1
        archive.getinfo("locked.jpg").flag_bits |= 1
    file.write_bytes(file.read_bytes().replace(b"as it is", b"as it IS"))
    monkeypatch.setattr(locations, "MAX_IMAGE_BYTES", 200_000)
    broken = {
        "bomb.jpg": "is damaged",
        "damaged.jpg": "is damaged",
        "stored.jpg": "is damaged",
        "bzip2.jpg": "is compressed by method 12",
        "locked.jpg": "is encrypted",
    }
    for name, words in broken.items():
        assert reason(str(file), name) == (
            Quarantine.BROKEN_IMAGE,
            f"image {name!r} in {file} {words}",
        )
    assert reason(str(file), "large.jpg")[0] is Quarantine.IMAGE_TOO_LARGE
    assert read_image(str(file), "good.jpg") == jpeg(1)


def test_a_member_is_one_range_read(tmp_path: Path) -> None:
    info = zipfile.ZipInfo("padded.jpg")
    info.extra = b"\xfe\xca" + (2000).to_bytes(2, "little") + bytes(2000)
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("1.jpg", jpeg(1))
        archive.writestr(info, jpeg(3))
        archive.writestr("last.jpg", jpeg(2))
    found = opened(tmp_path / "a.zip", write_tar(tmp_path / "b.tar", {"t.jpg": jpeg(4)}))
    reads: list[int] = []

    class Counted:
        def __init__(self, path: str) -> None:
            self.file = LOCAL.open_input_file(path)

        def read_at(self, size: int, offset: int) -> bytes:
            reads.append(size)
            return self.file.read_at(size, offset)

    found.file = Counted  # type: ignore[assignment]
    for name, colour, times in (
        ("1.jpg", 1, 1),
        ("last.jpg", 2, 1),
        ("t.jpg", 4, 1),
        ("padded.jpg", 3, 2),
    ):
        reads.clear()
        member = found.find(name)
        assert member is not None and member.read() == jpeg(colour)
        assert len(reads) == times and max(reads) < len(jpeg()) + 1000


def test_many_threads_read_one_shard(tmp_path: Path) -> None:
    colours = {f"{n}.jpg": jpeg(n) for n in range(100)}
    root = write_zip(tmp_path / "a.zip", colours, zipfile.ZIP_DEFLATED)
    names = list(colours) * 5
    random.Random(0).shuffle(names)
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda name: read_image(root, name), names))
    assert found == [colours[name] for name in names]


def test_an_index_that_took_long_is_kept_for_the_very_same_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    file = Path(write_zip(tmp_path / "a.zip", {"1.jpg": jpeg(1), "../2.jpg": jpeg(2)}))
    made: list[Any] = []
    index = shards._indexed
    monkeypatch.setattr(shards, "_indexed", lambda *of: made.append(of) or index(*of))
    opened(file)
    assert not (tmp_path / "cache").exists()  # it took no time
    monkeypatch.setattr(shards, "KEEP_AFTER_S", -1.0)
    first = opened(file)
    again = opened(file)
    assert (
        len(made) == 2 and str(again) == str(first) == "1 files in 1 shard, 1 with unusable names"
    )
    member = again.find("1.jpg")
    assert member is not None and member.read() == jpeg(1)
    (kept,) = (tmp_path / "cache").rglob("*.*")
    kept.write_bytes(kept.read_bytes()[:100])
    assert opened(file).find("1.jpg") and len(made) == 3
    write_zip(file, {"3.jpg": jpeg(3)})
    assert opened(file).find("3.jpg") and len(made) == 4


@given(
    kind=st.sampled_from(["zip", "tar"]),
    flips=st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), min_size=1, max_size=6),
    cut=st.floats(0, 1),
)
def test_damage_anywhere_is_one_of_our_errors(
    tmp_path_factory: pytest.TempPathFactory,
    kind: str,
    flips: list[tuple[float, int]],
    cut: float,
) -> None:
    file = tmp_path_factory.getbasetemp() / f"damaged.{kind}"
    members = {f"{n}.jpg": bytes([n]) * 40 for n in range(3)}
    (write_zip if kind == "zip" else write_tar)(file, members)
    data = bytearray(file.read_bytes())
    for place, value in flips:
        data[int(place * (len(data) - 1))] = value
    file.write_bytes(data if cut < 0.7 else data[: int(len(data) * cut)])
    try:
        found = opened(file)
    except DataError as error:
        assert file.name in str(error)
        return
    for name in members:
        if (member := found.find(name)) is not None:
            try:
                data = member.read()
            except ImageProblem as problem:
                assert problem.reason is Quarantine.BROKEN_IMAGE
            else:
                assert kind == "tar" or data == members[name]
