"""Run entries of the command line: read, given their model, and built into HELM's run specs."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from engine.errors import ConfigError, EngineError, named, one_line
from flexgen_helm.runs.entry_files import read_entry_file
from flexgen_helm.terminal.installation import lacks

if TYPE_CHECKING:
    from helm.benchmark.presentation.run_entry import RunEntry
    from helm.benchmark.run_spec import RunSpec

_MOST_TRIALS = 1000
"""Most draws of in-context examples: HELM makes all prompts of each, and published runs have 1 to 5."""


@dataclasses.dataclass(frozen=True)
class Target:
    """The names under which HELM knows a model of ours."""

    model: str
    model_deployment: str


def read_entries(args: argparse.Namespace) -> list[RunEntry]:
    """Collect the entries of -c, -r and --description, in this order; `ConfigError` for an invalid file.

    The model of a --description entry is removed, as FlexGen ignored it in favour of --model.
    """
    from helm.benchmark.presentation.run_entry import RunEntry

    entries: list[RunEntry] = []
    for name in args.conf_paths:
        entries.extend(read_entry_file(conf_path(name)))
    for description in [*args.run_entries, *args.run_specs]:
        entries.append(RunEntry(description=description, priority=1, groups=None))
    for description in args.description:
        bare = _with_arguments(description, model=None, model_deployment=None) if args.model else description
        entries.append(RunEntry(description=bare, priority=1, groups=None))
    return entries


def conf_path(name: str) -> Path:
    """Return the file of that name, or the shipped one."""
    path = Path(name).expanduser()
    if path.exists():
        return path
    root = Path(__file__).resolve().parents[1]
    shipped = {
        file.stem: file
        for folder in (root / "run_specs", root.parent / "run_specs")
        for file in sorted(folder.glob("*.conf"))
    }
    if name in shipped:
        return shipped[name]
    raise ConfigError(f"no file {name!r} of run entries; shipped ones are {', '.join(sorted(shipped))}")


def assign_models(
    entries: Iterable[RunEntry], models: Sequence[str], target: Callable[[str], Target], *, skip_others: bool
) -> list[RunEntry]:
    """Give every entry a model and our deployment of it.

    An entry that names no model, or one of HELM's model groups (`model=text`), gets each of `models`; one that names a
    model keeps it. `target` makes sure that HELM knows a model and returns its names. Where `models` are given, an
    entry with another model is left out if `skip_others`. Raises `ConfigError` for it otherwise, and for an entry that
    is left without a model.
    """
    assigned: list[RunEntry] = []
    for entry in entries:
        arguments = _parse(entry.description)
        named = str(arguments.get("model", ""))
        is_group = "/" not in named  # HELM's own rule for --models-to-run
        if is_group and not models:
            raise ConfigError(f"run entry {entry.description!r} names no model; name one with --model")
        if not is_group and models and named not in {name for model in models for name in (model, target(model).model)}:
            if skip_others:
                continue
            raise ConfigError(
                f"run entry {entry.description!r} names model {named}, but {', '.join(models)} is to run; "
                "write model=text, or leave the model out"
            )
        for model in models if is_group else (named,):
            names = target(model)
            deployment = str(arguments.get("model_deployment", names.model_deployment))
            description = _with_arguments(entry.description, model=names.model, model_deployment=deployment)
            assigned.append(dataclasses.replace(entry, description=description))
    return assigned


def build_run_specs(
    entries: Sequence[RunEntry],
    args: argparse.Namespace,
    assign: Callable[[RunEntry], Sequence[RunEntry]] = lambda entry: [entry],
    found: Callable[[], Iterable[EngineError]] = tuple,
) -> list[RunSpec]:
    """Build HELM's run specs of entries, each run once; `assign` gives an entry its models.

    `found` is called last: what else has been found to be wrong meanwhile.

    Raises `EngineError` where an entry cannot be run; where several cannot, one `ConfigError` names them all. HELM
    names a run's directory by the run spec, and leaves some arguments (`temperature`) out of the name: two different
    run specs of one name are refused too.
    """
    run_specs: dict[str, RunSpec] = {}
    origins: dict[str, str] = {}
    problems: dict[str, EngineError] = {}
    for entry in entries:
        try:
            for assigned in assign(entry):
                for run_spec in _build(assigned, args):
                    first = origins.setdefault(run_spec.name, assigned.description)
                    if run_spec != run_specs.setdefault(run_spec.name, run_spec):
                        raise ConfigError(
                            f"run entries {first!r} and {assigned.description!r} are different runs with the same name "
                            f"{run_spec.name!r}, and would overwrite each other; run one of them in another "
                            "--suite"
                        )
        except EngineError as error:
            problems.setdefault(str(error), error)  # a missing model is reported once, not for every entry
    problems.update({str(error): error for error in found()})
    if problems:
        raise _all_of(list(problems.values()))
    if not run_specs:
        raise ConfigError("no runs: --groups-to-run, --priority and --models-to-run left nothing of the run entries")
    return list(run_specs.values())


def _build(entry: RunEntry, args: argparse.Namespace) -> list[RunSpec]:
    """HELM's run specs of an entry that has its model; `ConfigError` in one line if HELM refuses it."""
    from helm.benchmark.run import run_entries_to_run_specs
    from helm.benchmark.scenarios.scenario import create_scenario

    try:
        built: list[RunSpec] = run_entries_to_run_specs(
            run_entries=[entry],
            max_eval_instances=args.max_eval_instances,
            num_train_trials=args.num_train_trials,
            groups_to_run=args.groups_to_run,
            priority=args.priority,
        )
        for run_spec in built:
            _check_trials(run_spec.adapter_spec.num_train_trials)
            create_scenario(run_spec.scenario_spec)  # where many arguments are checked first
    except ModuleNotFoundError as error:
        raise ConfigError(f"run entry {entry.description!r} {lacks(error)}") from None
    except Exception as error:  # run spec functions and scenarios may raise anything
        raise ConfigError(f"run entry {entry.description!r}: {named(error)}") from None
    return built


def _check_trials(count: int) -> None:
    if not 1 <= count <= _MOST_TRIALS:
        raise ValueError(f"num_train_trials {count} is not a number from 1 to {_MOST_TRIALS}")


def check_run_spec_names(entries: Iterable[RunEntry]) -> None:
    """Raise `ConfigError`, which names them all, for entries of whose names HELM has no run spec functions."""
    from helm.benchmark import run_spec as registry

    registry.discover_run_spec_functions()
    known = registry._REGISTERED_RUN_SPEC_FUNCTIONS
    names = dict.fromkeys(entry.description.split(":", 1)[0] for entry in entries)
    problems = [_no_such_entry(name, list(known)) for name in names if name not in known]
    if problems:
        raise _all_of([ConfigError(problem) for problem in problems])


def _no_such_entry(name: str, known: Sequence[str]) -> str:
    nearest = difflib.get_close_matches(name, known, n=3, cutoff=0.6)
    hint = f"; did you mean {' or '.join(nearest)}?" if nearest else "; HELM's documentation lists them"
    return f"HELM has no run entry {name!r}{hint}"


def _all_of(problems: Sequence[EngineError]) -> EngineError:
    """The only problem, or one that lists them."""
    if len(problems) == 1:
        return problems[0]
    listed = "; ".join(f"({number}) {problem}" for number, problem in enumerate(problems, start=1))
    return ConfigError(f"{len(problems)} things are wrong with the run entries: {listed}")


def _parse(description: str) -> dict[str, object]:
    from helm.common.object_spec import parse_object_spec

    try:
        return dict(parse_object_spec(description).args)
    except ValueError as error:
        raise ConfigError(f"run entry {description!r}: {one_line(error)}; write name:key=value,key=value") from None


def _with_arguments(description: str, **changes: str | None) -> str:
    """Set arguments of an entry, or drop those that are None, leaving the others as they were written.

    Those set come first: HELM applies arguments in their order, and some (follow_format_instructions, tokenizer) look
    at the model.
    """
    _parse(description)
    name, _, text = description.partition(":")
    arguments = [f"{key}={value}" for key, value in changes.items() if value is not None]
    arguments += [argument for argument in text.split(",") if argument and argument.split("=", 1)[0] not in changes]
    return f"{name}:{','.join(arguments)}" if arguments else name
