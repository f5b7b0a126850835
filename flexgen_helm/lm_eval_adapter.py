"""Importing it makes lm-evaluation-harness know the model `flexgen`."""

from flexgen_helm.adapters.lm_eval import FlexGenLM

__all__ = ["FlexGenLM"]
