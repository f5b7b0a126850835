"""`flexgen-helm lm-eval`: the harness's own command line, which knows the model `flexgen`."""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence

from engine.errors import EngineError, InstallationError, named
from flexgen_helm.runs.flags import add_memory_flags
from flexgen_helm.terminal.errors import RunFailed
from flexgen_helm.terminal.parser import Parser
from flexgen_helm.workers.cluster.flags import add_cluster_flags, check_cluster_flags

_log = logging.getLogger(__name__)

DESCRIPTION = """
Run lm-evaluation-harness's own command line, with the engine as its model flexgen. What is shown first are the flags
that are added here (the same as --model_args gpu_memory=...,cpu_memory=...); the harness's own help follows.
"""
EXAMPLES = (
    "flexgen-helm lm-eval --model flexgen --model_args pretrained=facebook/opt-30b,policy=opt-30b-t4 --tasks mmlu",
    "flexgen-helm lm-eval --model flexgen --model_args pretrained=./my-model --gpu-memory 16GB --tasks hellaswag",
)
_MODEL = "flexgen_helm.adapters.lm_eval:FlexGenLM"


def lm_eval_parser() -> Parser:
    """The flags beside the harness's."""
    parser = Parser(
        prog="flexgen-helm lm-eval",
        usage="flexgen-helm lm-eval [FLAGS] [FLAGS OF THE HARNESS]",
        description=DESCRIPTION,
        examples=EXAMPLES,
        add_help=False,
        allow_abbrev=False,
    )
    add_memory_flags(parser.group("policy"))
    add_cluster_flags(parser.group("workers"))
    return parser


def lm_eval(arguments: Sequence[str]) -> int:
    """Run the harness; returns 0.

    Raises `EngineError`, `RunFailed` for what the harness raises, and ends by itself for flags that it refuses.
    """
    parser = lm_eval_parser()
    limits, rest = parser.parse_known_args(arguments)
    check_cluster_flags(limits)
    limits.ray = "true" if limits.ray == "" else limits.ray
    given = [f"{name}={value}" for name, value in vars(limits).items() if value is not None and value is not False]
    try:
        import lm_eval.models  # noqa: F401 - those of the harness, which does not add them to a registry that has one
        from lm_eval.__main__ import cli_evaluate
        from lm_eval.api.registry import model_registry
    except ImportError as error:
        raise InstallationError(f"lm-eval is missing ({error}); run `pip install 'flexgen-helm[lm-eval]'`") from error
    if "flexgen" not in model_registry:
        model_registry.register("flexgen", target=_MODEL)  # imported, with torch, when it is asked for
    if not rest or {"-h", "--help"} & set(rest):
        print(parser.format_help())
    sys.argv = ["lm-eval", *rest, *(["--model_args", *given] if given else [])]  # it reads nothing else
    try:
        cli_evaluate()
    except KeyboardInterrupt:
        raise RunFailed("interrupted; answers so far are kept if there is a --use_cache") from None
    except EngineError:
        raise
    except Exception as error:  # whatever the harness raises, as for a task that there is not
        _log.debug("the harness failed", exc_info=True)
        raise RunFailed(f"lm-evaluation-harness failed: {named(error)}") from error
    return 0
