"""The number formats of GGUF files; the name of a matrix's tensor says which one it has."""

from __future__ import annotations

from engine.checkpoint.quantized.method import Kind, Loads, Method, Told, strange
from engine.kernels.packed.ggml_blocks import FORMS


def _problem(told: Told) -> str | None:
    return strange(told, ("quant_method",))


def _kind(told: Told, parts: Loads, is_expert: bool) -> Kind | None:
    return next((Kind.of(form) for form in FORMS.values() if form.names[0] in parts), None)


GGUF = Method(_problem, _kind, has_embedding=True)
