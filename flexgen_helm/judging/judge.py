"""The judge model."""

from __future__ import annotations

from dataclasses import dataclass

from helm.benchmark.annotation.model_as_judge import AnnotatorModelInfo


@dataclass(frozen=True)
class Judge:
    """A model that HELM's annotators call, with HELM's names for it."""

    model: str
    deployment: str

    @property
    def name(self) -> str:
        """Its name in files, statistics and annotations."""
        return self.model.replace("/", "_")

    @property
    def info(self) -> AnnotatorModelInfo:
        """Its description for annotators whose models can be set."""
        return AnnotatorModelInfo(model_name=self.model, model_deployment=self.deployment)
