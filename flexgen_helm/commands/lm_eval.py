"""`flexgen-helm lm-eval`: the harness's own command line, which knows the model `flexgen`."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from flexgen_helm.terminal.errors import RunFailed


def lm_eval(arguments: Sequence[str]) -> int:
    """Run the harness; returns 0. Raises `EngineError`, and ends by itself for what the harness refuses."""
    from lm_eval.__main__ import cli_evaluate

    import flexgen_helm.adapters.lm_eval  # noqa: F401 - registers the model

    sys.argv = ["lm-eval", *arguments]  # it reads nothing else
    try:
        cli_evaluate()
    except KeyboardInterrupt:
        raise RunFailed("interrupted; answers so far are kept if there is a --use_cache") from None
    return 0
