"""`flexgen-helm verify`: a sample of a run's requests through our engine and through plain `transformers`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING

from engine.errors import ConfigError
from flexgen_helm.runs.flags import names_entries, parse_run_flags, run_parser
from flexgen_helm.terminal.parser import Parser
from flexgen_helm.workers.engine_processes import engine_processes

if TYPE_CHECKING:
    from flexgen_helm.fidelity.verdict import Fidelity

NUM_INSTANCES = 32
DESCRIPTION = f"""
Run HELM entries on the offloading engine, compute the same requests by plain transformers with the same, uncompressed
weights, and compare log-probabilities of the engine's tokens, greedy tokens up to the first that differs, texts, and
the score. The result is also written to fidelity.json in each run's directory. By default
{NUM_INSTANCES} instances of each run are computed, in the suite "verify". Every request is computed again, whatever
HELM's cache holds. A difference that rounding does not explain is called drift; it does not change the exit code, which
is 1 if a run failed and 2 for bad input. A model that does not fit into host memory is compared layer by layer: the
engine's weights are loaded once more, stock layers of transformers compute next to the engine's own, and the layer that
differs most is named.
"""


EXAMPLES = (
    "flexgen-helm verify --model facebook/opt-1.3b -r mmlu:subject=anatomy",
    "flexgen-helm verify --model ./my-model --compress-weight 4 --gpu-memory 8GB -c quick -m 16",
)


def verify(arguments: Sequence[str]) -> int:
    """Verify the entries of a command line; `EngineError` for bad input, `RunFailed` for a failed run.

    Drift is a finding, not a failure: it is said, and the exit code is 0.
    """
    args = parse_verify_flags(arguments)
    engine_processes.prepare()
    from flexgen_helm.fidelity.runner import VerifyingRunner
    from flexgen_helm.fidelity.verdict import table, told_layers, verdict
    from flexgen_helm.runs.launch import carry_out

    args.disable_cache = True  # an answer from the cache may be another policy's
    args.runner_class_name = f"{VerifyingRunner.__module__}.{VerifyingRunner.__name__}"
    found: list[Fidelity] = []
    VerifyingRunner.found = found
    carry_out(args, show=lambda scores: "\n".join([table(found), *told_layers(found)]))
    print(verdict(found))
    return 0


def verify_parser() -> Parser:
    """The command line of `flexgen-helm verify`."""
    parser = run_parser("flexgen-helm verify", DESCRIPTION, EXAMPLES)
    parser.set_defaults(max_eval_instances=NUM_INSTANCES, suite="verify")  # a suite "default" may hold whole runs
    return parser


def parse_verify_flags(arguments: Sequence[str]) -> argparse.Namespace:
    """Parse the command line: that of `run`, less what would leave nothing to compare."""
    args = parse_run_flags(arguments, verify_parser())
    if not names_entries(args):
        raise ConfigError("verify needs run entries; name them with -r or -c")
    for flag in (
        "dry_run",
        "skip_instances",
        "cache_instances_only",
        "skip_completed_runs",
        "server_url",
        "runner_class_name",
    ):
        if getattr(args, flag):
            raise ConfigError(f"verify computes every request of its runs again; leave --{_dashed(flag)} out")
    return args


def _dashed(flag: str) -> str:
    return flag.replace("_", "-")
