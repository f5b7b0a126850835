"""The name under which `helm-run --runner-class-name` knows our runner."""

from flexgen_helm.helm.runner import FlexGenRunner

__all__ = ["FlexGenRunner"]
