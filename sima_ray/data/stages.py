"""The preferences stages on Ray Data: functions from dataset to dataset, all of ROW_SCHEMA.

    write_preferences(outcome(critique(generate(read_prompts(index, done=folder), …), …)), folder)

Rows in = rows out: a row that fails is set aside with its reason, a row set aside passes through
untouched. Workers and tasks reserve a tenth of a CPU each: they wait for the policy far more than
they compute, and must fit beside it on a cluster of two CPUs.
"""

import asyncio
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import ray.data
from ray.data import ActorPoolStrategy, Dataset

from sima_ray.config import CriticConfig, DataConfig, GenerationConfig
from sima_ray.critic.prompt import DEFAULT_EXAMPLES, CriticPrompt, Layout, load_examples
from sima_ray.data.blocks import RowSource
from sima_ray.data.work import Critic, Generate, Health, RowWork, decide_row
from sima_ray.errors import ConfigError, DataError, RequestRefused, ServiceError, one_line
from sima_ray.images import ImageProblem
from sima_ray.ports import JsonDict, Policy
from sima_ray.records import ROW_SCHEMA, Quarantine
from sima_ray.together import together

Connect = Callable[[], Policy]
"""Makes a policy where a worker runs; it travels to the worker, the policy does not."""

CPUS = 0.1
"""What a worker or a task of these stages reserves."""

TASKS = 2
"""Of reading, and of writing, at once: each has a process of its own, which takes more than a second of a core to
start, and blocks come and go faster than any policy answers."""


def read_prompts(path: str, *, rows_per_block: int = 128, done: str | None = None) -> Dataset:
    """Rows from a prompts index, or from a folder that `write_preferences` wrote.

    Args:
        path: A Parquet file or folder of ROW_SCHEMA.
        rows_per_block: Rows that travel, and are committed, together.
        done: The folder that the result goes to; rows committed there are left out, so the run
        resumes.

    Raises:
        DataError: Nothing there that can be read.
        LedgerError: `done` holds a row twice.
    """
    source = RowSource.plan(path, rows_per_block, done)
    blocks = max(1, len(source.blocks))
    return ray.data.read_datasource(
        source, num_cpus=CPUS, override_num_blocks=blocks, concurrency=TASKS
    )


def generate(
    ds: Dataset, *, data: DataConfig, generation: GenerationConfig, seed: int, connect: Connect
) -> Dataset:
    """Fill `candidates`: a greedy and a sampled response of the policy."""
    return _with_policy(ds, Generate(data, generation, seed), generation, connect)


def critique(
    ds: Dataset,
    *,
    data: DataConfig,
    critic: CriticConfig,
    generation: GenerationConfig,
    connect: Connect,
) -> Dataset:
    """Fill `critiques` and `prompt_version`: the policy's verdict in both orders.

    Raises:
        ConfigError: The worked examples cannot be read.
    """
    examples = load_examples(Path(critic.examples) if critic.examples else DEFAULT_EXAMPLES)
    prompt = CriticPrompt(Layout(critic.layout), examples)
    return _with_policy(ds, Critic(data, critic, prompt), generation, connect)


def outcome(ds: Dataset) -> Dataset:
    """Fill `outcome` of every row, and the pair's columns where there is a preference."""
    return ds.map_batches(
        _outcomes, batch_format="pyarrow", batch_size=None, num_cpus=CPUS, concurrency=TASKS
    )


def _with_policy(
    ds: Dataset, work: RowWork, generation: GenerationConfig, connect: Connect
) -> Dataset:
    return ds.map_batches(
        RowWorker,
        fn_constructor_args=(work, connect, generation.concurrency),
        batch_format="pyarrow",
        batch_size=generation.batch_size,
        compute=ActorPoolStrategy(
            size=generation.workers,
            max_tasks_in_flight_per_actor=2 * generation.open_batches,
            max_concurrent_calls_per_actor=generation.open_batches,
        ),
        num_cpus=CPUS,
    )


class RowWorker:
    """A Ray Data worker: does a stage's work for batches of rows, up to `concurrency` rows at
    once."""

    def __init__(self, work: RowWork, connect: Connect, concurrency: int) -> None:
        self._work = work
        self._connect = connect
        self._slots = asyncio.Semaphore(concurrency)
        self._policy: Policy | None = None
        self._health = Health()

    async def __call__(self, batch: pa.Table) -> pa.Table:
        """The batch with the stage's columns filled.

        Raises:
            ServiceError: Too many rows fail.
            DataError, ConfigError: What no row can get past, such as an image root that cannot be
            opened.
        """
        rows = await together(self._row(row) for row in batch.to_pylist())
        return pa.Table.from_pylist(rows, ROW_SCHEMA)

    async def _row(self, row: JsonDict) -> JsonDict:
        if row["quarantine"]:
            return row
        async with self._slots:
            try:
                row = {**row, **await self._work(self._connected(), row)}
            except ImageProblem as problem:
                return _set_aside(row, problem.reason, str(problem))
            except (DataError, ConfigError):
                raise
            except RequestRefused as error:
                return self._failed(row, Quarantine.REQUEST_FAILED, str(error))
            except ServiceError as error:
                return self._failed(row, Quarantine.SERVICE_FAILED, str(error))
            except Exception as error:  # one row, whatever happens in it, must not cost the others
                message = f"{type(error).__name__}: {error}"
                return self._failed(row, Quarantine.REQUEST_FAILED, message)
            self._health.record(None)
            return row

    def _failed(self, row: JsonDict, reason: Quarantine, message: str) -> JsonDict:
        self._health.record(one_line(message))
        return _set_aside(row, reason, message)

    def _connected(self) -> Policy:
        # Not in the constructor: a handle belongs to the event loop that uses it.
        if self._policy is None:
            self._policy = self._connect()
        return self._policy


def _set_aside(row: JsonDict, reason: Quarantine, message: str) -> JsonDict:
    return {**row, "quarantine": reason.value, "error": one_line(message)}


def _outcomes(batch: pa.Table) -> pa.Table:
    rows = [{**row, **decide_row(row)} for row in batch.to_pylist()]
    return pa.Table.from_pylist(rows, ROW_SCHEMA)
