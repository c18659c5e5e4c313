"""A run that begins with given pairs (`data.pairs`): they take the place of a first round's preferences."""

import hashlib
import json

from sima_ray.data.foreign import origin_of
from sima_ray.data.given import take_given
from sima_ray.data.locations import open_location
from sima_ray.errors import ConfigError
from sima_ray.ports import JsonDict
from sima_ray.runtime.progress import Stage
from sima_ray.runtime.run import Run

_SHOWN_PROBLEMS = 20
_CHUNK_BYTES = 1 << 20


def given_pairs(run: Run) -> JsonDict:
    """Check and count the given pairs, keep the usable ones in the run, and where they come from with them.

    Raises:
        ConfigError: The run begins with prompts.
        DataError: No pairs file, or none of its pairs can be used.
    """
    data, config = run.config.data, run.config
    if data.pairs is None:
        raise ConfigError(f"{config.name}: the run begins with prompts: submit `preferences`")

    def work(stage: Stage) -> tuple[JsonDict, str]:
        assert data.pairs is not None
        files = [run.round_path(1, name) for name in ("pairs.parquet", "quarantine.jsonl")]
        ledger = take_given(data, config.pairs, config.seed, *files)
        _say_problems(run)
        run.folder.write_json(ledger.to_json(), "round-1", "ledger.json")
        given = {
            "pairs": data.pairs,
            "sha256": _sha256(data.pairs),
            "origin": origin_of(data.pairs),
        }
        provenance = run.folder.read_json("provenance.json")
        run.folder.write_json(provenance | {"given": given}, "provenance.json")
        return {"ledger": ledger.to_json(), "given": given}, ledger.equation()

    return run.once("round-1-pairs", "pairs", work)


def refuse_preferences(run: Run) -> None:
    """Raise ConfigError where there is nothing to prefer: the run begins with given pairs."""
    if run.config.data.pairs is not None:
        raise ConfigError(
            f"{run.config.name}: the run begins with given pairs (data.pairs), so that there is nothing to "
            "generate or judge: submit `train` or `pipeline`"
        )


def _say_problems(run: Run) -> None:
    lines = run.folder.read_text("round-1", "quarantine.jsonl").splitlines()
    for line in lines[:_SHOWN_PROBLEMS]:
        row = json.loads(line)
        run.progress.say(f"  {row['source']}: {row['reason']}: {row['error']} (id {row['row_id']})")
    if len(lines) > _SHOWN_PROBLEMS:
        run.progress.say(f"  … and more: all are in {run.round_path(1, 'quarantine.jsonl')}")


def _sha256(location: str) -> str:
    """Of a file, streamed."""
    filesystem, path = open_location(location)
    digest = hashlib.sha256()
    with filesystem.open_input_stream(path, compression=None) as stream:
        while chunk := stream.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()
