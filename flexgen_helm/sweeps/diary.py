"""Reports a sweep: its progress, its log, and the record, which is written whenever a run ends."""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from types import TracebackType
from typing import TextIO

from helm.benchmark.run_spec import RunSpec

from flexgen_helm.helm.requests.asked import Answer
from flexgen_helm.helm.requests.results import cut_off
from flexgen_helm.helm.requests.translate import SEEDS
from flexgen_helm.helm.runner import failed_requests
from flexgen_helm.helm.scores import short_name
from flexgen_helm.judging.verdicts import Verdicts
from flexgen_helm.planning.environment import environment
from flexgen_helm.sweeps.device_time import DeviceTime
from flexgen_helm.sweeps.foreseen import Foreseen, told, told_together
from flexgen_helm.sweeps.log import JsonLog, logger
from flexgen_helm.sweeps.model_sweep import Counts, ModelSweep, PendingRun
from flexgen_helm.sweeps.progress import Standing, SweepProgress
from flexgen_helm.sweeps.record import ModelRecord, RunRecord, RunStatus, SweepRecord, counted, write_record


class SweepDiary:
    """A context manager whose methods report events, in the thread that runs the suite."""

    def __init__(
        self, suite_path: Path, run_specs: Sequence[RunSpec], json_log: JsonLog, stream: TextIO | None = None
    ) -> None:
        """`stream` shows progress, stderr by default."""
        self.notes: list[str] = []
        """Lines for the user to read at the end."""
        self.models: list[ModelRecord] = []
        """The records of the models that are done."""
        self.judge: ModelRecord | None = None
        """The record of the judge."""
        self._suite_path = suite_path
        self._deployments = {spec.name: str(spec.adapter_spec.model_deployment) for spec in run_specs}
        self._ended: dict[str, RunRecord] = {}
        self._current: ModelSweep | None = None
        self._requests: dict[str, PendingRun] = {}
        self._counts: dict[str, Counts] = {}
        """The counts of runs that are answered and not finished, whose answers may be released meanwhile."""
        self._num_preparing = 0
        self._is_judging = False
        self._foreseen: list[Foreseen] = []
        self._started = _now()
        self._environment = environment()
        self._json_log = json_log
        standing = Standing(len(run_specs), suite_path.name)
        self._progress = SweepProgress(standing, json_log, self._speed, self._devices, stream)

    def __enter__(self) -> SweepDiary:
        """Begin: the record says that the sweep runs. Raises `OSError` where it cannot be written."""
        write_record(self._suite_path, self.record())
        runs = len(self._deployments)
        logger.info("sweep of %d runs begins, process %d on %s", runs, os.getpid(), socket.gethostname())
        self._json_log.write("start", suite=self._suite_path.name, runs=list(self._deployments))
        self._progress.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.__exit__(kind, error, trace)
        is_over = len(self._ended) == len(self._deployments)
        self._write(_now() if is_over else None)
        counts = counted(run.status for run in self._ended.values())
        why = "" if error is None or is_over else f", stopped by {kind.__name__ if kind else ''}"
        logger.info("sweep ends: %s%s", ", ".join(f"{n} {status}" for status, n in counts.items()), why)
        self._json_log.write("end", **counts, complete=is_over)

    @property
    def longest_pass_s(self) -> float:
        """The seconds of the longest sweep of the current model; 0 before the first."""
        model = self._current
        return 0.0 if model is None else model.tally.longest_s

    def record(self, finished: str | None = None) -> SweepRecord:
        """Return the record up to now."""
        current = None if self._current is None else _model_record(self._current)
        models = self.models if current is None or self._is_judging else [*self.models, current]
        return SweepRecord(
            suite=self._suite_path.name,
            started=self._started,
            finished=finished,
            versions=self._environment.versions,
            commit=self._environment.commit,
            hardware=self._environment.hardware,
            models=tuple(models),
            runs=tuple(self._ended[name] for name in self._deployments if name in self._ended),
            judge=current if self._is_judging and current else self.judge,
        )

    # Events

    def skipped(self, run_spec: RunSpec) -> None:
        """An earlier command had completed it."""
        self._end(run_spec.name, "skipped")

    def preparing(self, run_spec: RunSpec) -> None:
        """A run's requests are about to be made."""
        self._num_preparing += 1
        if self._current is None:
            number = f"{self._num_preparing}/{len(self._deployments)}"
            self._progress.standing.doing = f"preparing {short_name(run_spec.name)} ({number})"

    def prepared(self, run: PendingRun) -> None:
        """A run's requests are made."""
        self._requests[run.name] = run
        self.counted(run)

    def judging(self, run_spec: RunSpec) -> None:
        """The requests to a run's judge are about to be made."""
        self._is_judging = True
        self._progress.standing.doing = f"judging {short_name(run_spec.name)}"

    def counted(self, run: PendingRun) -> None:
        """Note that requests were made, for a run or for its judge."""
        self._progress.standing.requests += run.total
        self._progress.standing.requests_done += run.cached
        if self._current is not None:
            self._progress.standing.tokens = self._current.most_tokens

    def foretold(self, each: Foreseen) -> None:
        """All requests of a model are made: report the forecast of the remaining ones, and how many remained."""
        for line in told(each):
            self._progress.tell(line)
        self._foreseen.append(each)
        if len(self._foreseen) == len(set(self._deployments.values())):
            for line in told_together(self._foreseen):
                self._progress.tell(line)
        numbers = {} if each.forecast is None else each.forecast.as_mapping()
        self._json_log.write("forecast", deployment=each.deployment, cached=each.cached, **numbers)

    def begin(self, model: ModelSweep) -> None:
        """A model's engine is about to get its first requests."""
        self._current, now = model, self._progress.standing
        now.doing, now.is_loading = model.deployment, model.num_todo > 0
        now.tokens, now.tokens_done, now.num_workers = model.most_tokens, 0, model.tally.num_workers
        for line in model.client.notes:
            self._progress.say(f"{model.deployment}: {line}")

    def answered(self, model: ModelSweep, answer: Answer) -> None:
        """The engine has answered."""
        now = self._progress.standing
        now.doing = model.deployment
        now.requests_done += len(answer.work.places)
        now.tokens_done += answer.most_tokens
        for run in model.runs_of(answer):
            if run.is_answered:
                now.active.pop(run.name, None)
            else:
                now.active[run.name] = (len(run.outcomes), run.total)

    def held(self, run: PendingRun, counts: Counts, *, is_to_be_judged: bool) -> None:
        """A run is answered, and waits for a judge, who may come in this sweep; `counts` as in `done`."""
        self._note(run, counts)
        if not is_to_be_judged:
            self._end(run.name, "unjudged", run)

    def done(self, run: PendingRun, counts: Counts) -> None:
        """A run's files are written; `counts` has notable numbers about its answers."""
        self._note(run, counts)
        self._end(run.name, "done", run)

    def judged(self, run: PendingRun, verdicts: Verdicts) -> None:
        """The files of a run that was held are written."""
        if verdicts.read < verdicts.asked:
            self.notes.append(f"{short_name(run.name)}: {verdicts.told}")
        self._end(run.name, "done", run, verdicts=verdicts)

    def _note(self, run: PendingRun, counts: Counts) -> None:
        self._counts[run.name] = counts
        if counts.failed:
            self.notes.append(f"{short_name(run.name)}: {failed_requests(counts.failed)}")
        if counts.cut_off:
            self.notes.append(f"{short_name(run.name)}: {cut_off(counts.cut_off)}")

    def failed(self, name: str, error: Exception, trace: str = "") -> None:
        """Note that a run failed; the others continue. An unexpected error has a `trace`: its text may say little."""
        line = " ".join(str(error).split())
        if trace or not line:
            line = ": ".join(part for part in (type(error).__name__, line) if part)
        if trace:
            logger.error("%s failed:\n%s", name, trace)
        self._end(name, "failed", self._requests.get(name), error=line)

    def end(self, model: ModelSweep) -> None:
        """All of a model's runs have ended, or all that it judges."""
        if self._is_judging:
            self.judge = _model_record(model)
        else:
            self.models.append(_model_record(model))
        if deaths := model.tally.deaths():
            times = "once" if len(deaths) == 1 else f"{len(deaths)} times, at last"
            self.notes.append(f"{model.deployment}: the engine's process ended {times} ({deaths[-1]}) and was replaced")
        for device, reason in model.tally.given_up().items():
            self.notes.append(f"{model.deployment}: device {device} was given up ({reason}); the others did its work")
        self._current = None
        self._progress.standing.ended(model.deployment)
        self._write()

    def _end(
        self,
        name: str,
        status: RunStatus,
        pending: PendingRun | None = None,
        *,
        error: str | None = None,
        verdicts: Verdicts | None = None,
    ) -> None:
        verdicts = verdicts or Verdicts()
        counts = self._counts.pop(name, None) or (pending.counts if pending else Counts())
        run = self._ended[name] = RunRecord(
            name=name,
            deployment=self._deployments[name],
            status=status,
            error=error,
            requests=pending.total if pending else 0,
            cached=pending.cached if pending else 0,
            failed_requests=len(counts.failed),
            cut_off=counts.cut_off,
            thinking=counts.thinking,
            new_tokens=pending.new_tokens if pending else 0,
            seconds=self._current.tally.seconds if self._current and pending else 0.0,
            verdicts=verdicts.asked,
            unreadable_verdicts=verdicts.unreadable,
            missing_verdicts=verdicts.unanswered,
        )
        self._requests.pop(run.name, None)
        now = self._progress.standing
        now.runs_ended += 1
        marked = f", {run.failed_requests} requests failed" if run.failed_requests and not run.error else ""
        what = f"{run.status}{marked}{f': {run.error}' if run.error else ''}"
        self._progress.say(f"run {now.runs_ended}/{now.num_runs} {short_name(run.name)}: {what}")
        self._json_log.write(
            "run",
            name=run.name,
            status=run.status,
            error=run.error,
            requests=run.requests,
            cached=run.cached,
            failed_requests=run.failed_requests,
            cut_off=run.cut_off,
            seconds=run.seconds,
            verdicts=run.verdicts,
            unreadable_verdicts=run.unreadable_verdicts,
            missing_verdicts=run.missing_verdicts,
        )
        self._write()

    def _devices(self) -> tuple[DeviceTime, ...]:
        return () if (model := self._current) is None else model.tally.devices()

    def _speed(self) -> tuple[float, float, float | None]:
        return (0.0, 0.0, None) if (model := self._current) is None else model.tally.speed()

    def _write(self, finished: str | None = None) -> None:
        try:
            write_record(self._suite_path, self.record(finished))
        except OSError as error:  # the runs matter more than the record
            logger.warning("the record of the sweep cannot be written: %s", error.strerror)


def _model_record(model: ModelSweep) -> ModelRecord:
    tally, seconds = model.tally, model.tally.seconds
    return ModelRecord(
        deployment=model.deployment,
        policy=model.client.policy.as_mapping(),
        plan=tally.plan(),
        seconds=seconds,
        limit_s=tally.limit_s(),
        fraction=tally.fraction(seconds),
        requests=model.num_requests,
        cached=model.cached,
        computed=tally.computed,
        prompt_tokens=tally.prompt_tokens,
        prefix_tokens_saved=tally.saved_tokens,
        new_tokens=tally.new_tokens,
        sweeps=tally.num_sweeps,
        time_split=tally.split(seconds),
        timeline=tally.timeline(),
        chat_template=model.client.applies_chat_template,
        identity=model.client.known_identity or {},
        seeds=SEEDS,
        deaths=tally.deaths(),
        devices=tally.devices(),
    )


def _now() -> str:
    return datetime.now().astimezone().isoformat(timespec="seconds")
