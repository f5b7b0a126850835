"""Makes a suite's requests in a temporary directory, to estimate what they take on this or another machine."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from helm.benchmark.executor import ExecutionSpec
from helm.benchmark.run_spec import RunSpec
from helm.common.authentication import Authentication
from helm.common.cache_backend_config import SqliteCacheBackendConfig
from helm.proxy.services.service import CACHE_DIR

from engine.errors import ConfigError
from engine.planning.hardware_profile import HardwareProfile
from flexgen_helm.helm.runner import WholeRunExecutor
from flexgen_helm.helm.scores import short_name
from flexgen_helm.helm.two_step_runner import TwoStepRunner
from flexgen_helm.sweeps.beside.helm_side import HelmSide
from flexgen_helm.sweeps.foreseen import foresee, told, told_together
from flexgen_helm.sweeps.model_sweep import ModelSweep
from flexgen_helm.terminal.progress import StatusLine

_MOST_FAILURES = 10
"""Most runs that are named because they cannot be made."""


def rehearse(
    run_specs: Sequence[RunSpec], output_path: Path, local_path: Path, cache: str, profile: HardwareProfile | None
) -> Iterator[str]:
    """Yield lines on what the requests of `run_specs` take; nothing is computed.

    HELM's cache `cache` in `local_path` is read if it exists. Raises `ConfigError` if the requests of no run can be
    made.
    """
    file = local_path / CACHE_DIR / f"{cache}.sqlite"
    spec = ExecutionSpec(
        url=None,
        auth=Authentication(""),
        local_path=str(output_path / "prod_env"),  # HELM creates directories there
        parallelism=1,
        sqlite_cache_backend_config=SqliteCacheBackendConfig(str(file.parent)) if file.is_file() else None,
    )
    runner = TwoStepRunner(spec, str(output_path), "plan", skip_completed_runs=False, exit_on_error=False)
    assert isinstance(runner.executor, WholeRunExecutor)
    executor, side = runner.executor, HelmSide(runner)
    failures: dict[str, Exception] = {}
    models: dict[str, ModelSweep] = {}
    status, num_others = StatusLine(None), 0
    for number, run_spec in enumerate(run_specs, start=1):
        if status.in_place:
            status.show(f"preparing {short_name(run_spec.name)} ({number}/{len(run_specs)})")
        try:
            deployment = str(run_spec.adapter_spec.model_deployment)
            if not executor.is_ours(deployment):
                num_others += 1
                continue
            made = side.make(run_spec)
            model = models.get(deployment) or ModelSweep(deployment, executor.our_client(deployment))
            model.add(run_spec.name, None, made.entries)
            models[deployment] = model
        except Exception as error:
            failures[run_spec.name] = error
    status.clear()
    reasons = [f"{short_name(name)}: {' '.join(str(error).split())}" for name, error in failures.items()]
    if not models:
        raise ConfigError(
            reasons[0] if reasons else "no run is of a model that the engine runs; there is nothing to plan"
        )
    num_ours = len(run_specs) - len(failures) - num_others
    yield (
        f"based on all requests of {num_ours} runs, as HELM makes them"
        + (f"; {num_others} runs of other clients are left out" if num_others else "")
        + (f"; {len(failures)} runs cannot be made" if failures else "")
    )
    foreseen = [foresee(model, model.jobs, profile) for model in models.values()]
    for each in foreseen:
        yield from told(each)
    yield from told_together(foreseen)
    yield from (f"cannot be made: {reason}" for reason in reasons[:_MOST_FAILURES])
