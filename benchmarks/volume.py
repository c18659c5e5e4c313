"""How does the preferences stage bear many prompts? A fake engine; rows a second, and the driver's memory.

    python -m benchmarks.volume [--prompts 100 1000 10000 100000] [--json FILE]

Everything but the model is real: the prompts index, Ray Data's stages and workers, images, the critic's prompts
and verdicts, commits, pairs, ledger. The fake policy answers at once: what is measured is the pipeline itself.
Each size runs in a process of its own. Driver memory is that process's resident set, twice a second while the
stages run; the slope is the least-squares line through those samples against rows committed, from a tenth on.
"""

import argparse
import asyncio
import json
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from PIL import Image

from sima_ray.config import CriticConfig, DataConfig, GenerationConfig, PairsConfig
from sima_ray.ports import Completion, CompletionRequest, JsonDict, Policy

IMAGES = 64
MB = 1 << 20
KINDS = 5
"""Ways that rows go: three preferences, one inconsistent, one identical."""


class InstantPolicy(Policy):
    """Not a model: answers at once, by the row's number in its question."""

    async def complete(self, request: CompletionRequest) -> Completion:
        """One answer."""
        await asyncio.sleep(0)
        text = "".join(str(part.get("text", "")) for part in request["content"])
        number = int(text[text.rindex("No. ") + 4 :].split("?", 1)[0])
        kind = number % KINDS
        if "alternatives" in request:
            case = text[text.rindex("No. ") :]
            first = 1 if kind == 0 or case.index("A bird") < case.index("A tree") else 2
            answer = f"It says more of what is there. [[{first}]]"
        else:
            answer = "A tree" if request["temperature"] and kind != 1 else "A bird"
            answer += f" stands in picture {number}."
        return {
            "text": answer,
            "tokens": len(answer.split()),
            "prompt_tokens": 100,
            "cached_tokens": 80,
            "logprob": -1.0 if request.get("logprob") else None,
            "finish_reason": "stop",
            "model_version": "instant",
        }


@dataclass
class Memory:
    """The driver's resident set against rows, sampled in a thread."""

    folder: str
    samples: list[tuple[int, float]] = field(default_factory=list[tuple[int, float]])

    def __enter__(self) -> "Memory":
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._sample)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def _sample(self) -> None:
        from sima_ray.data.blocks import committed_rows

        process = psutil.Process()
        while not self._ended.wait(0.5):
            # Rows first: counting them may itself take memory.
            rows = committed_rows(self.folder) if not len(self.samples) % 10 else None
            last = self.samples[-1][0] if self.samples else 0
            self.samples.append((last if rows is None else rows, process.memory_info().rss / MB))

    def figures(self, rows: int) -> JsonDict:
        """Megabytes: at first, at most, and gained every 10,000 rows."""
        late = [(done, mb) for done, mb in self.samples if done >= rows / 10]
        slope = None
        done, mb = [rows for rows, _ in late], [mb for _, mb in late]
        if len(set(done)) >= 5:
            slope = float(np.polyfit(done, mb, 1)[0]) * 10_000
        return {
            "first_mb": self.samples[0][1] if self.samples else None,
            "peak_mb": max((mb for _, mb in self.samples), default=None),
            "mb_per_10000_rows": slope,
        }


def measure(prompts: int) -> JsonDict:
    """One size, in this process."""
    import ray

    from sima_ray.data.prompts import index_prompts
    from sima_ray.data.sinks import write_pairs, write_preferences
    from sima_ray.data.stages import critique, generate, outcome, read_prompts

    with tempfile.TemporaryDirectory(
        prefix="bench-", dir="/tmp", ignore_cleanup_errors=True
    ) as folder:
        data = write_prompts(Path(folder), prompts)
        ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False, _temp_dir=f"{folder}/r")
        begun = time.perf_counter()
        index_prompts(data, f"{folder}/prompts.parquet")
        indexed = time.perf_counter()
        rows_folder, generation = f"{folder}/preferences", GenerationConfig()
        with Memory(rows_folder) as memory:
            rows = read_prompts(
                f"{folder}/prompts.parquet", rows_per_block=generation.batch_size, done=rows_folder
            )
            how: Any = {"data": data, "generation": generation, "connect": InstantPolicy}
            rows = generate(rows, seed=1, **how)
            write_preferences(outcome(critique(rows, critic=CriticConfig(), **how)), rows_folder)
        staged = time.perf_counter()
        ledger = write_pairs(rows_folder, f"{folder}/out", PairsConfig(), 1, rows=prompts)
        ledger.check()
        paired = time.perf_counter()
        after = psutil.Process().memory_info().rss / MB
        ray.shutdown()
    return {
        "prompts": prompts,
        "index_s": indexed - begun,
        "stages_s": staged - indexed,
        "pairs_s": paired - staged,
        "rows_per_s": prompts / (staged - indexed),
        "pairs": ledger.pairs,
        "ledger": ledger.equation(),
        "driver": memory.figures(prompts) | {"after_pairs_mb": after},
    }


def write_prompts(folder: Path, prompts: int) -> DataConfig:
    """Prompts about a few images."""
    (folder / "images").mkdir()
    noise = np.random.default_rng(0)
    for number in range(IMAGES):
        pixels = noise.integers(0, 255, (96, 96, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "images" / f"{number}.jpg")
    with open(folder / "prompts.jsonl", "w", encoding="utf-8") as file:
        for number in range(prompts):
            line = {"id": f"p{number}", "image": f"{number % IMAGES}.jpg"}
            line |= {
                "text": f"What is in picture No. {number}?",
                "ground_truth": "Wings and leaves.",
            }
            file.write(json.dumps(line) + "\n")
    return DataConfig(prompts=str(folder / "prompts.jsonl"), images=str(folder / "images"))


def main(arguments: list[str] | None = None) -> int:
    """Measure all sizes, print, and write the figures where asked."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.volume",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--prompts", type=int, nargs="+", default=[100, 1000, 10_000, 100_000])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.one:
        print("\n" + json.dumps(measure(options.one)), flush=True)
        return 0
    found = [_in_own_process(prompts) for prompts in options.prompts]
    if options.json:
        from benchmarks.pipeline.__main__ import device, versions

        whole = {"sizes": found, "versions": versions(), "device": device()}
        options.json.write_text(json.dumps(whole, indent=2) + "\n", encoding="utf-8")
    return 0


def _in_own_process(prompts: int) -> JsonDict:
    command = [sys.executable, "-m", "benchmarks.volume", "--one", str(prompts)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{prompts} prompts failed:\n{done.stderr[-3000:]}")
    found: JsonDict = json.loads(done.stdout.strip().splitlines()[-1])
    driver = found["driver"]
    slope = driver["mb_per_10000_rows"]
    print(
        f"{prompts:>7} prompts {found['stages_s']:>7.1f} s {found['rows_per_s']:>7.0f} rows/s"
        f"  driver {driver['first_mb']:.0f} → {driver['peak_mb']:.0f} MB"
        + ("" if slope is None else f", {slope:+.2f} MB every 10,000 rows")
        + f"  {found['ledger']}",
        flush=True,
    )
    return found


if __name__ == "__main__":
    sys.exit(main())
