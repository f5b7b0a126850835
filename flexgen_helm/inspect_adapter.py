"""The entry point by which inspect_ai finds the provider `flexgen`; it is loaded only when it is used."""

from __future__ import annotations

from typing import Any

from inspect_ai.model import ModelAPI, modelapi


@modelapi(name="flexgen")
def flexgen() -> type[ModelAPI]:
    """The class of models `flexgen/…`."""
    from flexgen_helm.adapters.inspect_provider import FlexGenAPI

    provider: Any = FlexGenAPI
    return provider  # type: ignore[no-any-return]
