"""How fast does `sima validate` check prompts with their images, from a folder, a zip and a tar? No cluster.

    python -m benchmarks.validate [--images 5000] [--members 118287] [--rounds 3] [--json FILE]

Photo-like JPEGs of COCO's usual size, 640 × 480, each in a file of its own, are checked by the function that
the command calls: cold, after the kernel was told to forget the files, and warm. Beside it a plain loop: one
thread, Pillow, every pixel of every image. Then what the list of a shard with so many members as COCO's
train2017 costs: made, taken up as another process kept it, and asked. Every trial is a process of its own; the
kinds take turns. Where other work shares the cores the processor's time an image tells more than the clock:
cores ÷ it is what idle ones would do.
"""

import argparse
import io
import json
import os
import random
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import psutil
from PIL import Image

from sima_ray.config import DataConfig
from sima_ray.ports import JsonDict

KINDS = ("folder", "zip", "tar", "plain")
SIZE = (640, 480)
DISTINCT = 200
"""Photos, each in as many files as it takes."""
PROMPTS = 17_000
CORES = os.cpu_count() or 1
MB = 1 << 20


def main(arguments: list[str] | None = None) -> int:
    """Measure, print, and write the figures where asked."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.validate",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--images", type=int, default=5000)
    parser.add_argument("--members", type=int, default=118_287)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--one", nargs=2, metavar=("TRIAL", "ROOT"), help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.one:
        trial, root = options.one
        print("\n" + json.dumps(TRIALS[trial](Path(root))), flush=True)
        return 0
    with tempfile.TemporaryDirectory(prefix="bench-", dir="/tmp") as folder:
        found = {
            "images": _checks(Path(folder), options.images, options.rounds),
            "shards": _lists(Path(folder), options.members, options.rounds),
        }
    if options.json:
        from benchmarks.pipeline.__main__ import device, versions

        whole = {**found, "versions": versions(), "device": device()}
        options.json.write_text(json.dumps(whole, indent=2) + "\n", encoding="utf-8")
    return 0


def _checks(folder: Path, images: int, rounds: int) -> JsonDict:
    size = write_images(folder, images)
    print(f"{images:,} images, {size / images / 1000:.0f} kB each")
    trials: dict[str, list[JsonDict]] = {}
    for _ in range(rounds):
        for kind in KINDS:
            root = folder / {"zip": "train2017.zip", "tar": "train2017.tar"}.get(kind, "train2017")
            forget(root)
            for state in ("cold", "warm"):
                trial = _in_own_process("plain" if kind == "plain" else "check", root)
                trials.setdefault(f"{kind}, {state}", []).append(trial)
    found: JsonDict = {"images": images, "kb_an_image": size / images / 1000}
    for name, runs in trials.items():
        rates = sorted(images / run["seconds"] for run in runs)
        cpu = statistics.median(run["cpu_s"] for run in runs) / images
        found[name] = {
            "images_per_s": statistics.median(rates),
            "least": rates[0],
            "most": rates[-1],
            "cpu_ms_an_image": 1000 * cpu,
            "images_per_s_of_idle_cores": CORES / cpu if not name.startswith("plain") else 1 / cpu,
            "peak_mb": max(run["peak_mb"] for run in runs),
            f"s_for_{PROMPTS}": PROMPTS / statistics.median(rates),
        }
        print(
            f"  {name:<13} {statistics.median(rates):>6.0f} images/s [{rates[0]:.0f}, {rates[-1]:.0f}]"
            f"  {1000 * cpu:.2f} ms of a processor an image ({found[name]['images_per_s_of_idle_cores']:.0f} idle)"
            f"  {PROMPTS:,} prompts: {PROMPTS / statistics.median(rates):.0f} s",
            flush=True,
        )
    return found


def _lists(folder: Path, members: int, rounds: int) -> JsonDict:
    found: JsonDict = {"members": members}
    for kind in ("zip", "tar"):
        root = folder / f"many.{kind}"
        pack(root, ((f"train2017/{number:012}.jpg", b"x" * 99) for number in range(members)))
        runs = [_in_own_process("list", root) for _ in range(rounds)]
        found[kind] = {key: statistics.median(run[key] for run in runs) for key in runs[0]}
        print(
            f"  {kind} of {members:,}: "
            + ", ".join(f"{key} {value:.3g}" for key, value in found[kind].items()),
            flush=True,
        )
    return found


def check(root: Path) -> JsonDict:
    """The command's own check of all prompts and images."""
    from sima_ray.runtime.validation import check_prompts

    with _measured() as figures:
        found = check_prompts(
            DataConfig(prompts=str(root.parent / "prompts.jsonl"), images=str(root))
        )
    if not found.good:
        raise RuntimeError(f"{len(found.bad)} of {found.rows} rows are bad")
    return figures


def plain(root: Path) -> JsonDict:
    """What a few lines of Pillow do."""
    with _measured() as figures:
        for file in sorted(root.iterdir()):
            Image.open(io.BytesIO(file.read_bytes())).load()
    return figures


def list_shard(root: Path) -> JsonDict:
    """The list of a shard: made, kept and taken up, held, asked."""
    from pyarrow import fs

    from sima_ray.data import shards

    filesystem = fs.LocalFileSystem()
    files = filesystem.get_file_info([str(root)])
    process = psutil.Process()
    before = process.memory_info().rss / MB
    with tempfile.TemporaryDirectory() as cache:
        os.environ["XDG_CACHE_HOME"] = cache
        shards.KEEP_AFTER_S = 0.0
        begun = time.perf_counter()
        made = shards.open_shards(filesystem, files)
        seconds = time.perf_counter() - begun
        added = process.memory_info().rss / MB - before
        begun = time.perf_counter()
        again = shards.open_shards(filesystem, files)
        kept = time.perf_counter() - begun
        (file,) = Path(cache, "sima").iterdir()
        names = random.Random(0).choices(
            [f"train2017/{n:012}.jpg" for n in range(len(made))], k=2000
        )
        begun = time.perf_counter()
        found = [again.find(name) for name in names]
        asked = time.perf_counter()
        for member in found:
            if member is None or len(member.read()) != 99:
                raise RuntimeError("a member is not what was written")
        read = time.perf_counter() - asked
        return {
            "made_s": seconds,
            "taken_up_s": kept,
            "index_mb": file.stat().st_size / MB,
            "process_mb_added": added,
            "find_us": 1e6 * (asked - begun) / len(names),
            "read_us": 1e6 * read / len(names),
        }


TRIALS: dict[str, Callable[[Path], JsonDict]] = {"check": check, "plain": plain, "list": list_shard}


@contextmanager
def _measured() -> Iterator[JsonDict]:
    """Fills in the clock, the processor's seconds and the most memory of what runs inside."""
    figures: JsonDict = {}
    begun, before = time.perf_counter(), time.process_time()
    yield figures
    figures |= {"seconds": time.perf_counter() - begun, "cpu_s": time.process_time() - before}
    figures["peak_mb"] = psutil.Process().memory_info().rss / MB


def write_images(folder: Path, images: int) -> int:
    """The images as a folder, a zip and a tar, and a prompt for each; their bytes."""
    photos = [_photo(np.random.default_rng(number)) for number in range(min(images, DISTINCT))]
    (folder / "train2017").mkdir()
    for number in range(images):
        file = folder / "train2017" / f"{number:012}.jpg"
        file.write_bytes(photos[number % len(photos)])
    with open(folder / "prompts.jsonl", "w", encoding="utf-8") as prompts:
        for number in range(images):
            line = {"image": f"{number:012}.jpg", "text": "What is it?", "ground_truth": "A cat."}
            prompts.write(json.dumps(line) + "\n")
    files = sorted((folder / "train2017").iterdir())
    for kind in ("zip", "tar"):
        named = ((f"train2017/{file.name}", file.read_bytes()) for file in files)
        pack(folder / f"train2017.{kind}", named)
    return sum(len(photos[number % len(photos)]) for number in range(images))


def pack(file: Path, members: Iterator[tuple[str, bytes]]) -> None:
    """Write a zip, its members stored, or a tar."""
    if file.suffix == ".zip":
        with zipfile.ZipFile(file, "w") as archive:
            for name, data in members:
                archive.writestr(name, data)
        return
    with tarfile.open(file, "w") as archive:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))


def forget(root: Path) -> None:
    """Tell the kernel to drop what it holds of a file, or of a folder's files."""
    os.sync()
    for file in root.iterdir() if root.is_dir() else [root]:
        with open(file, "rb") as opened:
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _photo(noise: np.random.Generator) -> bytes:
    """Shapes at several scales with some grain: about as many bytes as a photo has."""
    width, height = SIZE
    pixels = noise.normal(0, 8, (height, width, 3))
    for scale in (8, 32, 128):
        rough = noise.integers(0, 255, (scale * height // width + 1, scale, 3), dtype=np.uint8)
        smooth = Image.fromarray(rough).resize(SIZE, Image.Resampling.BICUBIC)
        pixels += np.asarray(smooth, np.float64) / 3
    file = io.BytesIO()
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(file, "JPEG", quality=93)
    return file.getvalue()


def _in_own_process(trial: str, root: Path) -> JsonDict:
    command = [sys.executable, "-m", "benchmarks.validate", "--one", trial, str(root)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{trial} of {root} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


if __name__ == "__main__":
    sys.exit(main())
