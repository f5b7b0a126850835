"""Lets HELM's adapters check for all prompts together whether they fit into the model's window."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from helm.benchmark.adaptation.adapters.adapter import Adapter
from helm.benchmark.adaptation.request_state import RequestState
from helm.benchmark.scenarios.scenario import Instance
from helm.benchmark.window_services.window_service import WindowService

if TYPE_CHECKING:
    from flexgen_helm.helm.requests.known_tokens import KnownTokens


def adapted(adapter: Adapter, instances: list[Instance], parallelism: int, known: KnownTokens) -> list[RequestState]:
    """The result of `adapter.adapt`, and its random states, with prompts tokenized in one call.

    At first the adapter is told that every prompt fits. Then all are tokenized together, and HELM's own window service
    is called, which finds their tokens in `known`. If it rejects one, the adapter starts again from the same random
    states, with the unchanged window service.
    """
    window, states = adapter.window_service, (random.getstate(), np.random.get_state())
    noted = _Noted(window)
    adapter.window_service = cast(WindowService, noted)
    try:
        found: list[RequestState] = adapter.adapt(instances, parallelism)
    except Exception:  # it may come from the false answers; if not, it occurs again
        is_right = False
    else:
        known.encode(str(getattr(window, "tokenizer_name", "")), (text for _, text, _ in noted.asked))
        is_right = noted.is_right()
    finally:
        adapter.window_service = window
    if is_right:
        return found
    random.setstate(states[0])
    np.random.set_state(states[1])
    again: list[RequestState] = adapter.adapt(instances, parallelism)
    return again


class _Noted:
    """A window service that records its calls and says that everything fits; otherwise the real one's."""

    def __init__(self, window: Any) -> None:
        self._window = window
        self.asked: list[tuple[str, str, int]] = []
        """(method, text, tokens of the completion) of each call."""

    def __getattr__(self, name: str) -> Any:
        return getattr(self._window, name)

    def fits_within_context_window(self, text: str, expected_completion_token_length: int = 0) -> bool:
        self.asked.append(("fits_within_context_window", text, expected_completion_token_length))
        return True

    def truncate_from_right(self, text: str, expected_completion_token_length: int = 0) -> str:
        self.asked.append(("truncate_from_right", text, expected_completion_token_length))
        return text

    def is_right(self) -> bool:
        """Whether the real service gives the same answer to every call."""
        return all(
            getattr(self._window, method)(text, length) == (True if method.startswith("fits") else text)
            for method, text, length in self.asked
        )
