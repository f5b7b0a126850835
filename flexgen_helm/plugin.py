"""What HELM loads through the `helm` entry point: registers our run entries and the models that HELM does not know.

Light (no torch, no transformers) and harmless: importing it never raises, replaces nothing that is registered, and
adds no deployment to a model that HELM or the user has, since HELM makes the last one a model's default.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import yaml
from helm.common.hierarchical_logger import hwarn

from flexgen_helm import engine_problem


def config_directory() -> Path | None:
    """The directory configs/helm: inside the installed package first, next to it (a checkout) second."""
    package = Path(__file__).resolve().parent
    candidates = [package / "configs" / "helm", package.parent / "configs" / "helm"]
    return next((path for path in candidates if path.is_dir()), None)


def register_run_entries() -> None:
    """Register the run spec functions of ours; if HELM or the user has one of that name, warn and leave it theirs."""
    try:
        importlib.import_module("flexgen_helm.data_wrangling.run_specs")
    except Exception as error:
        hwarn(f"flexgen_helm registers no run entries: {type(error).__name__}: {' '.join(str(error).split())}")


def register_shipped_models() -> None:
    """Register what configs/helm has and HELM has not; on any trouble warn in one line and go on without."""
    try:
        if problem := engine_problem():
            hwarn(f"flexgen_helm registers nothing: {problem}")
        elif directory := config_directory():
            _register_from(directory)
    except Exception as error:
        hwarn(f"flexgen_helm registers nothing: {type(error).__name__}: {' '.join(str(error).split())}")


def _register_from(directory: Path) -> None:
    import cattrs
    import dacite
    from helm.benchmark import model_deployment_registry, model_metadata_registry, tokenizer_config_registry

    taken = set(model_metadata_registry.MODEL_NAME_TO_MODEL_METADATA)
    models = _read(directory / "model_metadata.yaml", "models")
    for model in dacite.from_dict(model_metadata_registry.ModelMetadataList, models).models:
        if model.name not in taken:
            model_metadata_registry.register_model_metadata(model)
    tokenizers = _read(directory / "tokenizer_configs.yaml", "tokenizer_configs")
    for tokenizer in cattrs.structure(tokenizers, tokenizer_config_registry.TokenizerConfigs).tokenizer_configs:
        if tokenizer.name not in tokenizer_config_registry.TOKENIZER_NAME_TO_CONFIG:
            tokenizer_config_registry.register_tokenizer_config(tokenizer)
    deployments = _read(directory / "model_deployments.yaml", "model_deployments")
    for deployment in cattrs.structure(deployments, model_deployment_registry.ModelDeployments).model_deployments:
        known = model_deployment_registry.DEPLOYMENT_NAME_TO_MODEL_DEPLOYMENT
        if deployment.name not in known and deployment.model_name not in taken:
            model_deployment_registry.register_model_deployment(deployment)


def _read(path: Path, key: str) -> dict[str, Any]:
    if not path.is_file():
        return {key: []}
    with path.open(encoding="utf-8") as stream:
        return dict(yaml.safe_load(stream))


register_run_entries()
register_shipped_models()
