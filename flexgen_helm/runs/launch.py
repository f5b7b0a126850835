"""Executes a command line by HELM: everything is checked before anything is written or a weight is read."""

from __future__ import annotations

import argparse
import logging
import os
import sqlite3
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import yaml
from helm.benchmark.config_registry import register_builtin_configs_from_helm_package, register_configs_from_directory
from helm.benchmark.run import import_user_plugins, load_entry_point_plugins, run_benchmarking
from helm.benchmark.run_spec import RunSpec
from helm.benchmark.runner import set_benchmark_output_path
from helm.common.authentication import Authentication
from helm.common.hierarchical_logger import setup_default_logging
from helm.proxy.services.remote_service import create_authentication
from helm.proxy.services.service import CACHE_DIR

from engine.errors import ConfigError, EngineError, InstallationError, named
from flexgen_helm.helm.runner import RunsFailed
from flexgen_helm.helm.scores import Score, read_scores, table
from flexgen_helm.runs import assets, demo
from flexgen_helm.runs.command_line_runner import CommandLineRunner
from flexgen_helm.runs.entries import assign_models, build_run_specs, check_run_spec_names, read_entries
from flexgen_helm.runs.flags import PolicySpec, policy_from_flags, shaping_from_flags
from flexgen_helm.runs.judges import Bench, find_judge, judged_by
from flexgen_helm.runs.models import Models
from flexgen_helm.runs.names import check_run_names
from flexgen_helm.runs.registration import DEPLOYMENTS, check_local_path
from flexgen_helm.terminal.errors import RunFailed
from flexgen_helm.terminal.footprint import Footprint
from flexgen_helm.terminal.installation import model_problem
from flexgen_helm.terminal.progress import Progress


def carry_out(
    args: argparse.Namespace, *, is_demo: bool = False, show: Callable[[Sequence[Score]], str] = table
) -> None:
    """Execute parsed flags and print what `show` returns for the scores.

    Raises `EngineError` for bad input, which leaves no files, and `RunFailed` for a failed run.
    """
    policy = policy_from_flags(args)
    args.output_path = args.output_path or "benchmark_output"
    set_up_logging(args)
    footprint = Footprint()
    watch_folders(args, footprint)
    prepared = prepare(args, policy, is_demo=is_demo)
    run_specs = prepared.run_specs
    footprint.watch(_run_path(args, run_spec) for run_spec in run_specs)
    footprint.settle()
    try:
        if is_demo:
            demo.write_facts(assets.countries(), Path(args.output_path))
        prepared.write(args.local_path, footprint.wrote)
        if not (args.disable_cache or args.mongo_uri):
            for name in prepared.models.cache_names():
                footprint.claim(Path(args.local_path) / CACHE_DIR / f"{name}.sqlite")
        _execute(args, prepared, show)
    except EngineError:
        take_back(footprint)
        raise


def watch_folders(args: argparse.Namespace, footprint: Footprint) -> None:
    """Note the folders that HELM creates for all runs of a suite; `ConfigError` for one that cannot be written."""
    output, suite = Path(args.output_path), Path(args.output_path) / "runs" / str(args.suite)
    footprint.watch_downloads(output / "scenarios")
    footprint.watch([output / "scenario_instances", suite / "eval_cache", Path(args.local_path) / CACHE_DIR])


def take_back(footprint: Footprint) -> None:
    """Remove what a refused command has created itself; downloads and answers are kept."""
    footprint.undo(is_spent=lambda file: not _holds_answers(file))


def _holds_answers(file: Path) -> bool:
    """Whether a new cache of HELM's for our client contains anything; those of tokenizers are created again."""
    if file.stem != DEPLOYMENTS or not file.stat().st_size:
        return False
    try:
        with closing(sqlite3.connect(file)) as cache:
            tables = [name for (name,) in cache.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
            return any(cache.execute(f'SELECT 1 FROM "{name}" LIMIT 1').fetchone() for name in tables)
    except sqlite3.Error:
        return True


def set_up_logging(args: argparse.Namespace) -> None:
    """Show HELM's log at the requested level; by default its warnings only."""
    logger = logging.getLogger("helm")
    if not logger.handlers:
        setup_default_logging(args.log_config)
    if not (args.debug or args.log_config or os.environ.get("HELM_LOG_LEVEL") or os.environ.get("LOG_LEVEL")):
        logger.setLevel(logging.WARNING)


@dataclass(frozen=True)
class Prepared:
    """A checked command line."""

    run_specs: list[RunSpec]
    models: Models
    """Models to be written to HELM's files."""
    notes: list[str]
    """Lines for the user to read at the end."""
    bench: Bench | None = None
    """The judge, if one is named."""

    def write(self, local_path: str, made: Callable[[Path], None] = lambda file: None) -> None:
        """`Models.write` of all models, the judge's among them."""
        self.models.write(local_path, made)
        if self.bench is not None and self.bench.models is not None:
            self.bench.models.write(local_path, made)


def prepare(args: argparse.Namespace, policy: PolicySpec | None, *, is_demo: bool = False) -> Prepared:
    """Check everything that can be checked beforehand; raises `EngineError`."""
    _register_with_helm(args)
    entries = read_entries(args)
    check_run_spec_names(entries)
    if problem := model_problem():  # imports torch, which the checks up to here do not need
        raise InstallationError(problem)
    _register_models_of_huggingface(args)
    named = [args.model] if args.model else list(args.models_to_run or [])
    models = Models(
        policy=policy,
        path=args.path,
        max_sequence_length=args.max_sequence_length,
        **shaping_from_flags(args) | ({"apply_chat_template": False} if is_demo and not named else {}),
    )
    if is_demo and not named:
        named = [str(assets.demo_model())]
    set_benchmark_output_path(args.output_path)
    run_specs = build_run_specs(
        entries,
        args,
        lambda entry: assign_models([entry], named, models.target, skip_others=bool(args.models_to_run)),
        models.problems,
    )
    check_run_names(run_spec.name for run_spec in run_specs)
    num_twice = len(entries) - len({(entry.description, *(entry.groups or ())) for entry in entries})
    notes = [f"{num_twice} run entries are there twice; each run is done once"] if num_twice else []
    notes += models.notes
    bench = find_judge(args.judge, args.judge_policy, models, run_specs) if getattr(args, "judge", None) else None
    if bench is not None:
        notes += [] if bench.models is None else bench.models.notes
        run_specs, more = judged_by(bench.judge, run_specs)
        notes += more
        check_run_names(run_spec.name for run_spec in run_specs)
    return Prepared(run_specs, models, notes, bench)


def _register_what_helm_ships() -> None:
    """Register the models, deployments and tokenizers of HELM's package, 570 kB of YAML.

    HELM reads them by `yaml.safe_load`, in Python, which takes seconds; libyaml gives the same result much faster.
    """
    in_python = yaml.safe_load
    if yaml.__with_libyaml__:
        yaml.safe_load = partial(yaml.load, Loader=yaml.CSafeLoader)
    try:
        register_builtin_configs_from_helm_package()
    finally:
        yaml.safe_load = in_python


def register_what_is_installed() -> None:
    """Register what HELM ships, and what installed plugins register."""
    _register_what_helm_ships()
    load_entry_point_plugins()


def _register_with_helm(args: argparse.Namespace) -> None:
    """Register what `helm-run` would register."""
    _register_what_helm_ships()
    check_local_path(args.local_path)
    try:
        register_configs_from_directory(args.local_path)
        load_entry_point_plugins()
        import_user_plugins(args.plugins or [])
    except Exception as error:  # the user's files may hold anything
        raise ConfigError(f"HELM cannot read {args.local_path} or the plugins: {named(error)}") from error


def _register_models_of_huggingface(args: argparse.Namespace) -> None:
    """Register the models that HELM's own client is to run."""
    if not (args.enable_huggingface_models or args.enable_local_huggingface_models):
        return
    from helm.benchmark import huggingface_registration as helm

    try:
        for name in args.enable_huggingface_models:
            helm.register_huggingface_hub_model_from_flag_value(name)
        for name in args.enable_local_huggingface_models:
            helm.register_huggingface_local_model_from_flag_value(name)
    except Exception as error:  # the hub or the directory may hold anything
        raise ConfigError(f"HELM cannot register the model {name}: {named(error)}") from error


def _execute(args: argparse.Namespace, prepared: Prepared, show: Callable[[Sequence[Score]], str]) -> None:
    """Run, then show the scores; `EngineError` for bad input that only shows now, `RunFailed` for a failed run."""
    run_specs = prepared.run_specs
    display = CommandLineRunner.display = Progress(num_runs=len(run_specs))
    display.notes.extend(prepared.notes)
    CommandLineRunner.longest_pass_s = 0.0
    own = f"{CommandLineRunner.__module__}.{CommandLineRunner.__name__}"
    auth = create_authentication(args) if args.server_url and not args.skip_instances else Authentication("")
    failure: Exception | None = None
    before = {run_spec.name: _stamp(args, run_spec) for run_spec in run_specs}
    try:
        if not args.disable_cache and not args.mongo_uri:
            # Caches hold pickles, which HELM would let others write to under a permissive umask.
            os.makedirs(os.path.join(args.local_path, CACHE_DIR), mode=0o700, exist_ok=True)
        run_benchmarking(
            run_specs=run_specs,
            auth=auth,
            url=args.server_url,
            local_path=args.local_path,
            num_threads=args.num_threads,
            output_path=args.output_path,
            suite=args.suite,
            dry_run=args.dry_run,
            skip_instances=args.skip_instances,
            cache_instances=args.cache_instances,
            cache_instances_only=args.cache_instances_only,
            skip_completed_runs=args.skip_completed_runs,
            exit_on_error=args.exit_on_error,
            runner_class_name=args.runner_class_name or own,
            mongo_uri=args.mongo_uri,
            disable_cache=args.disable_cache,
        )
    except Exception as error:
        failure = error
    throughput = display.close()
    path = Path(args.output_path) / "runs" / args.suite
    # Files that an earlier command left of a run are not this command's results, unless completed runs are skipped.
    done = [spec for spec in run_specs if args.skip_completed_runs or _stamp(args, spec) != before[spec.name]]
    scores = read_scores(done, path)
    if scores and not args.dry_run:
        print(show(scores), *display.notes, throughput, f"results: {path}", sep="\n")
    if failure is not None:
        raise _verdict(failure, len(run_specs), has_answers=display.num_computed > 0) from failure


def _verdict(failure: Exception, num_runs: int, *, has_answers: bool) -> Exception:
    """Distinguish bad input (`EngineError`) from a failed run (`RunFailed`): if any run succeeded, the run has failed.

    With stored answers it is a failed run, too: a disk that fills up meanwhile is not bad input.
    """
    if not has_answers:
        if isinstance(failure, RunsFailed) and failure.bad_input and len(failure.failures) == num_runs:
            return next(iter(failure.failures.values()))
        if isinstance(failure, EngineError) and type(failure) is not EngineError:
            return failure
    return RunFailed(str(failure) if isinstance(failure, RunsFailed | EngineError) else named(failure))


def _run_path(args: argparse.Namespace, run_spec: RunSpec) -> Path:
    return Path(args.output_path) / "runs" / str(args.suite) / run_spec.name


def _stamp(args: argparse.Namespace, run_spec: RunSpec) -> tuple[int, int] | None:
    """A stamp that distinguishes a run's `stats.json` from an earlier or later one; None if there is none."""
    file = _run_path(args, run_spec) / "stats.json"
    try:
        found = file.stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_ino
