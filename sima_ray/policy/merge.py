"""Adapter into weights, published only when the merged folder computes what base + adapter compute.

The check reads the merged folder back from disk and compares log-probabilities of response tokens on real pairs,
so that it covers the arithmetic of merging, its rounding, the names of the weights and the files beside them.
"""

import gc
import json
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel

from sima_ray.config import MergeConfig
from sima_ray.errors import ModelError, ParityError, one_line
from sima_ray.policy.checkpoint import (
    INDEX_SUFFIX,
    WEIGHT_SUFFIXES,
    check_policy,
    context_length,
    fingerprint,
    load_policy,
    weight_files,
    weight_names,
)
from sima_ray.policy.sample import VERSION_FILE, make_sample
from sima_ray.ports import JsonDict
from sima_ray.records import PreferencePair
from sima_ray.tuning.dataset import EncodedPair, PairEncoder, UnusablePair
from sima_ray.tuning.forward import base_of, response_logps

_LONGEST = 1 << 20


@dataclass(frozen=True, slots=True)
class ParityReport:
    """How closely a merged model follows base + adapter.

    Attributes:
        rows: Pairs compared, both responses of each.
        tokens: Response tokens compared.
        difference: Mean |Δ log-probability| over these tokens.
        largest: The largest of them.
        version: Fingerprint of the merged model.
    """

    rows: int
    tokens: int
    difference: float
    largest: float
    version: str


def merge(
    base: str,
    adapter: str,
    destination: str,
    *,
    config: MergeConfig,
    probe: Sequence[PreferencePair],
    images: str,
    write: "Callable[[Any, Path], None] | None" = None,
) -> ParityReport:
    """Merge an adapter into its base and publish the result as a policy folder.

    Weights keep their published names; config, processor, tokenizer, chat template and generation config are the
    base's own files. Where `destination` already is this very merge, its report is returned.

    Args:
        base: Policy folder.
        adapter: PEFT folder that was trained on it.
        destination: Folder to make; it appears whole or not at all.
        config: Rows to compare, and the tolerance.
        probe: Real pairs; the first usable ones are compared.
        images: What their image names are relative to, as `data.images` of a run.
        write: Writes a merged model's weights into a folder; None is `save_pretrained`.

    Raises:
        ModelError: A folder that cannot be loaded, or something else at `destination`.
        ParityError: The merged model computes something else, or nothing to compare: nothing is published.
    """
    target = Path(destination)
    origin = {"base": fingerprint(check_policy(base)), "adapter": _adapter_version(adapter)}
    if target.exists():
        return _published(target, origin)
    temporary = target.parent / f".{target.name}.{os.getpid()}.part"
    try:
        rows, expected = _merge_into(
            temporary, base, adapter, probe, images, config, write or _write
        )
        report, sample = _compare(temporary, rows, expected, config)
        version = {"version": report.version, **origin, "parity": asdict(report), "sample": sample}
        (temporary / VERSION_FILE).write_text(json.dumps(version, indent=2) + "\n")
        temporary.rename(target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return report


def _merge_into(
    folder: Path,
    base: str,
    adapter: str,
    probe: Sequence[PreferencePair],
    images: str,
    config: MergeConfig,
    write: Callable[[Any, Path], None],
) -> tuple[list[EncodedPair], list[torch.Tensor]]:
    """Write the merged policy; return the rows to compare and what base + adapter say of them."""
    model, processor = load_policy(base)
    rows = _encode(
        probe, PairEncoder(processor, images, context_length(model) or _LONGEST), config.parity_rows
    )
    try:
        tuned = PeftModel.from_pretrained(model, adapter)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise ModelError(f"{adapter}: does not fit {base}: {one_line(error)}") from error
    expected = _logps(base_of(tuned.eval()), rows)
    folder.mkdir(parents=True)
    write(tuned.merge_and_unload(), folder)  # pyright: ignore[reportCallIssue]
    copy_companions(Path(base), folder)
    if (names := weight_names(folder)) != (known := weight_names(base)):
        odd = sorted(names ^ known)
        raise ParityError(f"{len(odd)} weights are named otherwise than in {base}: {odd[0]}, …")
    return rows, expected


def _compare(
    folder: Path, rows: Sequence[EncodedPair], expected: list[torch.Tensor], config: MergeConfig
) -> tuple[ParityReport, JsonDict]:
    """Load the merged policy from disk and compare; also its sample, for whoever serves it.

    Raises:
        ParityError: It computes something else.
    """
    gc.collect()  # base + adapter, before another model of that size is loaded
    merged, processor = load_policy(folder)
    found = _logps(merged, rows)
    deltas = torch.cat([(a - b).abs() for a, b in zip(expected, found, strict=True)])
    report = ParityReport(
        rows=len(rows),
        tokens=len(deltas),
        difference=float(deltas.mean()),
        largest=float(deltas.max()),
        version=fingerprint(folder),
    )
    if not report.difference <= config.tolerance:  # NaN fails, too
        raise ParityError(
            f"the merged model differs from base + adapter by {report.difference:.3g} per response token "
            f"(allowed: {config.tolerance:g}) on {report.rows} rows; it is not published"
        )
    return report, make_sample(merged, processor)


def _encode(
    probe: Sequence[PreferencePair], encoder: PairEncoder, wanted: int
) -> list[EncodedPair]:
    rows: list[EncodedPair] = []
    problem: UnusablePair | None = None
    for pair in probe:
        if len(rows) == wanted:
            break
        try:
            rows.append(encoder.encode(pair))
        except UnusablePair as error:
            problem = error
    if not rows:
        raise ParityError(f"no usable pair to check the merged model on: {problem or 'none given'}")
    return rows


def _logps(model: Any, rows: Sequence[EncodedPair]) -> list[torch.Tensor]:
    """Log-probabilities of all response tokens, in float64, a tensor a row."""
    with torch.no_grad():
        return [response_logps(model, [row])[0].double().cpu() for row in rows]


def _write(model: Any, folder: Path) -> None:
    model.save_pretrained(folder)


def copy_companions(base: Path, folder: Path) -> None:
    """Copy all of a policy's files but the weights: config, processor, tokenizer, templates, licence."""
    for file in sorted(base.iterdir()):
        weights = file.name.endswith((*WEIGHT_SUFFIXES, INDEX_SUFFIX))
        if file.is_file() and not weights and file.name != VERSION_FILE:
            shutil.copyfile(file, folder / file.name)


def _adapter_version(adapter: str) -> str:
    path = Path(adapter)
    if not (path / "adapter_config.json").is_file() or not weight_files(path):
        raise ModelError(
            f"{adapter}: not a PEFT adapter (adapter_config.json, adapter_model.safetensors)"
        )
    return fingerprint(path)


def _published(target: Path, origin: dict[str, str]) -> ParityReport:
    """The report of a merge that was published before.

    Raises:
        ModelError: The folder is something else.
    """
    try:
        version = json.loads((target / VERSION_FILE).read_text())
    except (OSError, ValueError):
        version = {}
    if any(version.get(key) != value for key, value in origin.items()):
        raise ModelError(f"{target}: already there, and not a merge of this base and adapter")
    return ParityReport(**version["parity"])
