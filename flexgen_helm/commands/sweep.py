"""`flexgen-helm sweep`: a whole suite as one job that can be stopped at any moment and continues from there."""

from __future__ import annotations

import argparse
import gc
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from engine.errors import ConfigError, EngineError
from flexgen_helm.runs.flags import add_stop_flag, names_entries, parse_run_flags, policy_from_flags, run_parser
from flexgen_helm.runs.names import check_one_file_system, check_suite_name
from flexgen_helm.terminal.deadline import Deadline
from flexgen_helm.terminal.errors import RunFailed
from flexgen_helm.terminal.parser import Parser
from flexgen_helm.workers.cluster.flags import add_cluster_flags, check_cluster_flags, use_cluster
from flexgen_helm.workers.engine_processes import engine_processes
from flexgen_helm.workers.helper_processes import prepare_helpers

if TYPE_CHECKING:
    from helm.benchmark.executor import ExecutionSpec
    from helm.benchmark.run_spec import RunSpec

    from flexgen_helm.runs.launch import Prepared
    from flexgen_helm.sweeps.log import JsonLog

DESCRIPTION = """
Run the entries of files as one suite. The requests of all runs of a model go to the engine together. Each run's scores
are written as soon as its last answer is there, and answers are stored at the end of every pass over the model: if the
command is stopped or killed, the same command continues from there. Runs that fail do not affect the others; they are
listed at the end.
"""
EXAMPLES = (
    "flexgen-helm sweep nightly --suite 2026-11-29 --model facebook/opt-30b --policy opt-30b-t4",
    "flexgen-helm sweep capabilities --suite caps --model ./my-model -m 100 --judge ./my-judge --judge-policy t4.yaml",
    "flexgen-helm sweep my.conf --suite mine --model ./my-model --gpu-memory 16GB --cpu-memory 48GB -m 100",
)
_REFUSED = ("server_url", "runner_class_name", "dry_run", "skip_instances", "cache_instances", "cache_instances_only")
"""Of HELM's flags, those that a sweep has no use for."""


def sweep_parser() -> Parser:
    """The command line of `sweep`; imports neither HELM nor torch."""
    parser = run_parser("flexgen-helm sweep", DESCRIPTION, EXAMPLES)
    parser.usage = "flexgen-helm sweep CONF ... --suite SUITE [FLAGS]"
    told = "files of run entries, or names of shipped ones, like -c"
    parser.group("what to run").add_argument("conf", nargs="*", metavar="CONF", help=told)
    model = parser.group("model")
    told = "chat model that gives verdicts in place of the API models of HELM's annotators; may be --model itself"
    model.add_argument("--judge", metavar="MODEL", help=told)
    model.add_argument(
        "--judge-policy", metavar="POLICY", help="policy of the judge, written like --policy (default: auto)"
    )
    add_cluster_flags(model)
    output = parser.group("output")
    output.add_argument("--suite", help="name of the suite (required): its runs are in DIR/runs/SUITE")
    output.add_argument("--json-log", metavar="FILE", help="append events to FILE, as lines of JSON")
    add_stop_flag(parser)
    # HELM's adapters and metrics are Python: more threads make them slower.
    parser.set_defaults(num_threads=1, suite=None)
    return parser


def sweep(arguments: Sequence[str]) -> int:
    """Run a suite and print its summary.

    Raises `EngineError` for bad input, which leaves nothing behind, and `RunFailed` when a run failed.
    """
    args = parse_sweep_flags(arguments)
    policy = policy_from_flags(args)
    engine_processes.prepare()
    prepare_helpers("flexgen_helm.sweeps.beside.preloaded")  # before HELM is imported here, which takes as long
    from flexgen_helm.runs.launch import prepare, set_up_logging, take_back, watch_folders
    from flexgen_helm.sweeps.lock import FILE_NAME, SuiteLock
    from flexgen_helm.sweeps.log import JsonLog
    from flexgen_helm.terminal.footprint import Footprint

    set_up_logging(args)
    suite_path = Path(args.output_path) / "runs" / args.suite
    check_one_file_system(suite_path)
    footprint = Footprint()
    watch_folders(args, footprint)
    prepared = prepare(args, policy)
    footprint.settle()
    lock = suite_path / FILE_NAME
    is_new = not lock.exists()
    with SuiteLock(suite_path):
        if is_new:
            footprint.wrote(lock)
        try:
            use_cluster(args)
            prepared.write(args.local_path, footprint.wrote)
            with JsonLog(args.json_log) as json_log:
                return _run(args, prepared, suite_path, json_log)
        except EngineError:
            take_back(footprint)  # while the lock is held: its file goes, too
            raise


def parse_sweep_flags(arguments: Sequence[str]) -> argparse.Namespace:
    """Parse the command line; `ConfigError` for what cannot be meant."""
    args = parse_run_flags(arguments, sweep_parser())
    args.conf_paths = [*args.conf, *args.conf_paths]
    args.output_path = args.output_path or "benchmark_output"
    if not names_entries(args):
        raise ConfigError("nothing to sweep: name a file of run entries, such as nightly")
    check_suite_name(args.suite or "")
    if args.judge_policy is not None and args.judge is None:
        raise ConfigError("--judge-policy says where --judge lives; give --judge too")
    check_cluster_flags(args)
    for name in _REFUSED:
        if getattr(args, name):
            raise ConfigError(f"--{name.replace('_', '-')} is not for sweeps; use flexgen-helm run")
    return args


def _run(args: argparse.Namespace, prepared: Prepared, suite_path: Path, json_log: JsonLog) -> int:
    from flexgen_helm.commands.report import write_report
    from flexgen_helm.helm.scores import read_scores
    from flexgen_helm.sweeps.diary import SweepDiary
    from flexgen_helm.sweeps.log import suite_log
    from flexgen_helm.sweeps.runner import SweepRunner
    from flexgen_helm.sweeps.summary import summary

    run_specs = prepared.run_specs
    failure: Exception | None = None
    with suite_log(suite_path):
        diary = SweepDiary(suite_path, run_specs, json_log)
        runner = SweepRunner(
            _execution_spec(args),
            args.output_path,
            args.suite,
            diary,
            args.plugins or (),
            judge=None if prepared.bench is None else prepared.bench.judge,
            skip_completed_runs=args.skip_completed_runs,
            exit_on_error=args.exit_on_error,
        )
        gc.collect()
        gc.freeze()  # else what was imported is looked through again and again, among requests, for what nobody needs
        try:
            with diary, Deadline(args.stop_before, lambda: diary.longest_pass_s):
                runner.run_all(run_specs)
        except Exception as error:  # runs have been written by now: none of this is bad input
            failure = error
        finally:
            gc.unfreeze()
    found = diary.record()
    ended = {run.name for run in found.runs if run.status != "failed"}
    scores = read_scores([spec for spec in run_specs if spec.name in ended], suite_path)
    notes = [*prepared.notes, *diary.notes]
    try:
        page: Path | None = write_report(suite_path)
    except ConfigError as error:  # the runs are written: a page that cannot be is no reason to fail
        page = None
        notes.append(f"no report: {error}")
    print(summary(found, scores, notes, suite_path))
    if page is not None:
        print(f"report: {page}")
    if failure is not None:
        raise RunFailed(_verdict(failure, run_specs)) from failure
    return 0


def _execution_spec(args: argparse.Namespace) -> ExecutionSpec:
    """As HELM makes it of its flags; `ConfigError` where its cache has no directory."""
    from helm.benchmark.executor import ExecutionSpec
    from helm.common.authentication import Authentication
    from helm.common.cache_backend_config import MongoCacheBackendConfig, SqliteCacheBackendConfig
    from helm.proxy.services.service import CACHE_DIR

    sqlite = mongo = None
    if args.mongo_uri and not args.disable_cache:
        mongo = MongoCacheBackendConfig(args.mongo_uri)
    elif not args.disable_cache:
        path = os.path.join(args.local_path, CACHE_DIR)
        try:
            os.makedirs(path, mode=0o700, exist_ok=True)  # HELM's format is pickles
        except OSError as error:
            raise ConfigError(f"HELM's cache {path} cannot be made: {error.strerror}") from None
        sqlite = SqliteCacheBackendConfig(path)
    return ExecutionSpec(
        url=None,
        auth=Authentication(""),
        local_path=args.local_path,
        parallelism=args.num_threads,
        sqlite_cache_backend_config=sqlite,
        mongo_cache_backend_config=mongo,
    )


def _verdict(failure: Exception, run_specs: Sequence[RunSpec]) -> str:
    from helm.benchmark.executor import ExecutorError

    from flexgen_helm.helm.runner import RunsFailed
    from flexgen_helm.helm.scores import short_name

    if not isinstance(failure, RunsFailed):
        is_told = isinstance(failure, EngineError | ExecutorError)
        return str(failure) if is_told else f"{type(failure).__name__}: {' '.join(str(failure).split())}"
    names = [short_name(name) for name in failure.failures]
    shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
    return f"{len(names)} of {len(run_specs)} runs failed: {shown}; the same command runs them again"
