"""Who judges."""

from __future__ import annotations

from dataclasses import dataclass

from helm.benchmark.annotation.model_as_judge import AnnotatorModelInfo


@dataclass(frozen=True)
class Judge:
    """A model that HELM's annotators ask, by HELM's names of it."""

    model: str
    deployment: str

    @property
    def name(self) -> str:
        """As names of files, statistics and annotations have it."""
        return self.model.replace("/", "_")

    @property
    def info(self) -> AnnotatorModelInfo:
        """As annotators that can be told their models take it."""
        return AnnotatorModelInfo(model_name=self.model, model_deployment=self.deployment)
