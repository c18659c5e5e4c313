"""The stages of a run, each a function of the run; jobs run one of them, the pipeline all.

A stage reads what earlier stages left in the run folder and leaves its own result there. A stage that finished
is not run again, so that running the same command again goes on where the last one stopped.
"""

from collections.abc import Callable
from dataclasses import asdict
from itertools import islice
from typing import Any

import ray
from ray.data import Dataset

from sima_ray.data.blocks import reopen_failed
from sima_ray.data.earlier import choose_unsettled, mix_pairs
from sima_ray.data.export import export_llava, export_trl
from sima_ray.data.locations import check_root
from sima_ray.data.prompts import index_prompts, problem_lines
from sima_ray.data.sinks import read_pairs, write_pairs, write_preferences
from sima_ray.data.stages import critique, generate, outcome, read_prompts
from sima_ray.errors import DataError
from sima_ray.ports import JsonDict, Policy
from sima_ray.runtime import evaluation, summary
from sima_ray.runtime.client import connect_policy
from sima_ray.runtime.evaluating import evaluate
from sima_ray.runtime.given import given_pairs, refuse_preferences
from sima_ray.runtime.meter import Meter
from sima_ray.runtime.progress import Stage, duration
from sima_ray.runtime.room import ensure_room, run_demands, serving_demand, training_demand
from sima_ray.runtime.rounds import idle, last_round, verdict
from sima_ray.runtime.run import Run
from sima_ray.runtime.serving import deploy_policy, remove, start_serve, swap_policy

_SHOWN_PROBLEMS = 20


class PolicyService:
    """The run's policy service: deployed when a stage first needs it, then swapped in place."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self.app = f"policy-{run.config.name}"  # other runs, and `sima serve`, have their own
        self._version: str | None = None

    def ensure(self, number: int) -> None:
        """Make the service answer with the model after that many rounds."""
        run, version = self._run, self._run.version(number)
        if self._version == version:
            return
        settings = run.config.policy.service
        with run.progress.stage("serve") as stage:
            if self._version is None:
                replicas = serving_demand(run.config.policy, max(1, settings.min_replicas))
                ensure_room([[replicas]], run.progress.say)
                start_serve(settings.host, settings.port)
                deploy_policy(
                    run.config.policy, model=run.policy(number), version=version, name=self.app
                )
            else:
                swap_policy(run.policy(number), version, name=self.app)
            how = "deployed" if self._version is None else "weights swapped in place"
            stage.result(f"{version}: {how}")
        self._version = version

    def connect(self) -> Callable[[], Policy]:
        """A factory of clients, for Data workers and for this process."""
        settings = self._run.config.generation
        return connect_policy(self.app, retries=settings.retries, timeout_s=settings.timeout_s)

    def release(self) -> None:
        """Give the replicas' resources back to the cluster, also those that a killed job left."""
        remove(self.app)
        self._version = None


def prepare(run: Run) -> JsonDict:
    """Index the prompts file: one row a line, bad ones named, counted and set aside."""

    def work(stage: Stage) -> tuple[JsonDict, str]:
        destination = run.folder.path("prompts.parquet")
        index = index_prompts(run.config.data, destination)
        if (shards := check_root(run.config.data.images)) is not None:
            run.progress.say(f"  {run.config.data.images}: {shards}")
        for number, line in enumerate(problem_lines(destination)):
            if number == _SHOWN_PROBLEMS:
                run.progress.say(
                    f"  … and more: all are in {run.round_path(1, 'quarantine.jsonl')}"
                )
                break
            run.progress.say(f"  {line}")
        if not index.good:
            raise DataError(
                f"{run.config.data.prompts}: none of its {index.rows} prompts can be used"
            )
        line = f"{index.rows:,} prompts" + (
            f", {index.rows - index.good:,} set aside" if index.rows > index.good else ""
        )
        return {"rows": index.rows, "good": index.good}, line

    return run.once("prepare", "prepare", work)


def choose_prompts(run: Run, number: int) -> JsonDict:
    """Round `number`, from the second on: the prompts that the round before left unsettled."""
    _needs(run, f"round-{number - 1}/ledger.json", "preferences")

    def work(stage: Stage) -> tuple[JsonDict, str]:
        settings = run.config.evaluation
        count = evaluation.error_counter(settings.error_counter) if settings else None
        chosen = choose_unsettled(
            _prompts(run, number - 1),
            run.round_path(number - 1, "preferences"),
            run.round_path(number, "prompts.parquet"),
            (lambda row: summary.agrees(row, count) is False) if count else None,
        )
        return chosen.to_json(), f"{chosen.rows:,} of {chosen.before:,} prompts are unsettled"

    return run.once(f"round-{number}-prompts", "prompts", work)


def preferences(run: Run, number: int, service: PolicyService) -> JsonDict:
    """Round `number`: candidates and critiques by the policy of the round before, then pairs."""
    refuse_preferences(run)
    if not _chooses(run, number):
        prepared = prepare(run)
    elif (chosen := run.done(f"round-{number}-prompts")) is not None:
        prepared = chosen["result"]
    else:
        prepared = choose_prompts(run, number)
    config, folder = run.config, run.round_path(number, "preferences")
    base_judges = config.critic.policy == "base" and number > 1

    def work(stage: Stage) -> tuple[JsonDict, str]:
        meter = Meter()
        connect = meter.on(service.connect())
        _ask_failed_again(run, folder)
        rows = read_prompts(
            run.round_path(number, "candidates") if base_judges else _prompts(run, number),
            rows_per_block=config.generation.batch_size,
            done=folder,
        )
        if not base_judges:
            rows = _generated(run, rows, connect)
        rows = critique(
            rows,
            data=config.data,
            critic=config.critic,
            generation=config.generation,
            connect=connect,
        )
        with meter.shown(stage):
            write_preferences(outcome(rows), folder)
        ledger = write_pairs(
            folder, run.round_path(number), config.pairs, config.seed, rows=prepared["rows"]
        )
        pairs = run.round_path(number, "pairs.parquet")
        export_llava(read_pairs(pairs), run.round_path(number, "pairs.llava.json"))
        export_trl(
            read_pairs(pairs),
            run.round_path(number, "pairs.trl.parquet"),
            images=config.data.images,
        )
        run.folder.write_json(ledger.to_json(), f"round-{number}", "ledger.json")
        result = {"ledger": ledger.to_json(), "usage": asdict(meter.read())}
        line = f"{ledger.rows:,} prompts → {ledger.pairs:,} pairs"
        if _mixes(run, number):
            result["earlier_pairs"] = counts = _mix(run, number)
            line += f", {sum(c['drawn'] for c in counts.values()):,} of earlier rounds"
        return result, line

    if run.done(f"round-{number}-preferences") is None:
        if base_judges:
            _candidates(run, number, service)
        service.ensure(0 if base_judges else number - 1)
    return run.once(f"round-{number}-preferences", "preferences", work)


def _candidates(run: Run, number: int, service: PolicyService) -> JsonDict:
    """Candidates alone, for a critic with other weights: one service has one set at a time."""
    folder = run.round_path(number, "candidates")

    def work(stage: Stage) -> tuple[JsonDict, str]:
        meter = Meter()
        _ask_failed_again(run, folder)
        rows = read_prompts(
            _prompts(run, number),
            rows_per_block=run.config.generation.batch_size,
            done=folder,
        )
        with meter.shown(stage):
            write_preferences(_generated(run, rows, meter.on(service.connect())), folder)
        usage = meter.read()
        return {"usage": asdict(usage)}, f"{usage.requests:,} answers"

    if run.done(f"round-{number}-candidates") is None:
        service.ensure(number - 1)
    return run.once(f"round-{number}-candidates", "candidates", work)


def _ask_failed_again(run: Run, folder: str) -> None:
    if count := reopen_failed(folder):
        run.progress.say(f"  {count:,} rows that the service failed before are asked again")


def _generated(run: Run, rows: Dataset, connect: Callable[[], Policy]) -> Dataset:
    config = run.config
    return generate(
        rows, data=config.data, generation=config.generation, seed=config.seed, connect=connect
    )


def _mix(run: Run, number: int) -> JsonDict:
    """The round's training pairs with those of earlier rounds among them; how many of each."""
    return mix_pairs(
        run.round_path(number, "pairs.parquet"),
        {k: run.round_path(k, "pairs.parquet") for k in range(1, number)},
        _training_pairs(run, number),
        share=run.config.pairs.earlier_rounds,
        seed=run.config.seed,
        number=number,
    )


def train(run: Run, number: int) -> JsonDict:
    """Round `number`: DPO with LoRA on the round's pairs, or on those that the run began with."""
    # Imported here, so that the other stages start without torch and DeepSpeed.
    from sima_ray.runtime.training import TrainProgress, run_training

    config = run.config

    def work(stage: Stage) -> tuple[JsonDict, str]:
        told: set[str] = set()

        def show(at: TrainProgress) -> None:
            for warning in at.warnings:
                if warning not in told:
                    told.add(warning)
                    run.progress.say(f"train        warning: {warning}")
            if at.stage == "reference":
                stage.update(f"reference {at.step:,}/{at.steps:,} pairs")
                return
            left = f" · {duration(at.seconds_left)} left" if at.seconds_left is not None else ""
            stage.update(
                f"step {at.step}/{at.steps} · loss {at.loss:.3f} · accuracy {at.accuracy:.2f}{left}"
            )

        result = run_training(
            model=run.policy(number - 1),
            pairs=_training_pairs(run, number),
            images=config.data.images,
            output=run.round_path(number, "train"),
            config=config.training,
            seed=config.seed,
            on_progress=show,
        )
        line = f"{result.steps} steps on {result.pairs:,} pairs"
        if set_aside := sum(result.set_aside.values()):
            line += f", {set_aside:,} set aside"
        return asdict(result), line

    if config.data.pairs is not None and run.done("round-1-pairs") is None:
        given_pairs(run)
    _needs(run, f"round-{number}/pairs.parquet", "preferences")
    if run.done(f"round-{number}-train") is None:
        ensure_room([[training_demand(config.training)]], run.progress.say)
    return run.once(f"round-{number}-train", "train", work)


def merge_adapter(run: Run, number: int) -> JsonDict:
    """Round `number`: adapter into weights, published only when both compute the same."""
    from sima_ray.policy.merge import ParityReport, merge

    config = run.config

    def work(stage: Stage) -> tuple[JsonDict, str]:
        pairs = read_pairs(_training_pairs(run, number))
        probe = list(islice(pairs, config.merge.parity_rows))
        # On a worker: the job itself runs on the head, which need not have a model's memory.
        task: Any = ray.remote(num_cpus=config.training.cpus_per_worker, max_retries=1)
        answer = task(merge).remote(
            run.policy(number - 1),
            run.round_path(number, "train", "adapter"),
            run.policy(number),
            config=config.merge,
            probe=probe,
            images=config.data.images,
        )
        report: ParityReport = ray.get(answer)
        return asdict(report), f"parity {report.difference:.1e} on {report.rows} rows"

    _needs(run, f"round-{number}/train/adapter", "train")
    return run.once(f"round-{number}-merge", "merge", work)


def report(run: Run) -> JsonDict:
    """The run's summary: before and after with intervals, the critic, the ledger, the seconds."""
    last = last_round(run)
    made_by = "preferences" if run.config.data.pairs is None else "train"
    _needs(run, f"round-{last}/ledger.json", made_by)
    if "chair" in _of_rounds(run):
        _needs(run, "round-0/captions.jsonl", "evaluate --round 0")
        _needs(run, f"round-{last}/captions.jsonl", "evaluate")
    result = summary.summarise_run(run)
    run.folder.write_json(result["ledger"], "ledger.json")
    run.folder.write_json(result, "summary.json")
    run.folder.write_text(summary.html(result), "report.html")
    run.progress.say(f"report       {run.folder.path('report.html')}")
    return result


def pipeline(run: Run) -> JsonDict:
    """The whole loop: the very stages above, over all rounds."""
    service = PolicyService(run)
    try:
        rounds(run, service)
    finally:
        service.release()
    return report(run)


def rounds(run: Run, service: PolicyService) -> None:
    """Every stage that has not finished, round after round, until the last or until a rule ends them.

    Raises:
        ClusterError: The cluster can never give what a stage that is left asks for.
    """
    config, suites = run.config, _of_rounds(run)
    if any(run.done(f"round-{k}-train") is None for k in range(1, last_round(run) + 1)):
        ensure_room(run_demands(config.policy, config.training), run.progress.say)
    given = given_pairs(run) if config.data.pairs is not None else None
    if suites:
        evaluate(run, 0, service, suites)
    for number in range(1, config.rounds + 1):
        asks = not _chooses(run, number) or choose_prompts(run, number)["rows"]
        if given is None and asks:
            preferences(run, number, service)
        if number > 1 and (reason := idle(run, number)):
            run.progress.say(f"{'rounds':<12} {reason}")
            return
        if config.policy.service.release_for_training:
            service.release()
        train(run, number)
        merge_adapter(run, number)
        if suites:
            evaluate(run, number, service, suites)
        if (found := verdict(run, number)) is None:
            continue
        run.progress.say(f"{'rounds':<12} {found}")
        if found.stopped:
            return


def _of_rounds(run: Run) -> tuple[str, ...]:
    """The suites that every policy is scored on."""
    return run.config.evaluation.suites_of_rounds if run.config.evaluation else ()


def _chooses(run: Run, number: int) -> bool:
    """Whether a round asks only some of the prompts of the one before."""
    return run.config.data.prompts_after_first == "unsettled" and number > 1


def _prompts(run: Run, number: int) -> str:
    """The index of a round's prompts."""
    if _chooses(run, number):
        return run.round_path(number, "prompts.parquet")
    return run.folder.path("prompts.parquet")


def _mixes(run: Run, number: int) -> bool:
    """Whether a round is trained on earlier rounds' pairs too."""
    return run.config.pairs.earlier_rounds > 0 and number > 1


def _training_pairs(run: Run, number: int) -> str:
    """The pairs that a round is trained on."""
    mixed = _mixes(run, number)
    return run.round_path(number, "training_pairs.parquet" if mixed else "pairs.parquet")


def _needs(run: Run, name: str, stage: str) -> None:
    if not run.folder.exists(*name.split("/")):
        raise DataError(f"{run.folder.path(name)} is missing: run the stage `{stage}` first")
