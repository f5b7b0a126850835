"""The name under which HELM's model deployments know our client."""

from flexgen_helm.helm.client import FlexGenClient

__all__ = ["FlexGenClient"]
