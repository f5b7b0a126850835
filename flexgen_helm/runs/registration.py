"""HELM's entries for a user's model: made from its files, registered in this process, merged into a local path."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from helm.benchmark.model_deployment_registry import (
    ALL_MODEL_DEPLOYMENTS,
    ClientSpec,
    ModelDeployment,
    register_model_deployment,
)
from helm.benchmark.model_metadata_registry import (
    FULL_FUNCTIONALITY_TEXT_MODEL_TAG,
    MODEL_NAME_TO_MODEL_METADATA,
    TEXT_MODEL_TAG,
    ModelMetadata,
    register_model_metadata,
)
from helm.benchmark.tokenizer_config_registry import (
    TOKENIZER_NAME_TO_CONFIG,
    TokenizerConfig,
    TokenizerSpec,
    register_tokenizer_config,
)

from engine.checkpoint.description import ModelDescription, describe, with_window
from engine.checkpoint.gguf.opened import gguf_file
from engine.checkpoint.hub import with_revision
from engine.checkpoint.side_files import read_generation_config
from engine.errors import CheckpointError, ConfigError, EngineError, named
from engine.policy import Policy
from engine.reading import find_file, read_bytes
from flexgen_helm.helm.requests.shaping import NAMES, Shaping
from flexgen_helm.helm.requests.translate import Translator
from flexgen_helm.runs.names import checked_model_name, default_model_name, tokenizer_args
from flexgen_helm.runs.yaml_lists import MAX_BYTES, add_to_yaml_lists

CLIENT = "flexgen_helm.client.FlexGenClient"
DEPLOYMENTS = "flexgen"
"""The prefix of the names of our deployments, after which HELM names the cache of their requests."""
WITHOUT_CODE = {"trust_remote_code": False}
"""Without it, transformers asks on standard input whether code of a model's directory may run, and takes a `y` as
consent."""
TOKENIZER = "helm.tokenizers.huggingface_tokenizer.HuggingFaceTokenizer"

_FILES = (
    ("model_metadata.yaml", "models"),
    ("tokenizer_configs.yaml", "tokenizer_configs"),
    ("model_deployments.yaml", "model_deployments"),
)


@dataclass(frozen=True, kw_only=True)
class Entries:
    """What HELM must know to run a model on the engine; all three refer to each other by name."""

    model: ModelMetadata
    tokenizer: TokenizerConfig
    deployment: ModelDeployment


def entries_for(
    model: str,
    *,
    name: str | None = None,
    policy: str | Path | Mapping[str, Any] | Policy = "auto",
    max_sequence_length: int | None = None,
    check: Callable[[ModelDescription, Policy], object] | None = None,
    **shaping: Any,
) -> Entries:
    """Make the entries of a hub id, model directory or GGUF file; reads its tokenizer, but no weights.

    The HELM model is called `name`, by default the hub id, or local/ and the name of directory or file; `shaping` are
    args of `Shaping`. Raises `EngineError` for a model that the engine cannot run (by `check`, which defaults to
    `check_model`), and where the longest sequence cannot be determined.
    """
    description = describe(model, download_weights=False)
    is_local = Path(model).expanduser().exists()
    source = os.path.abspath(os.path.expanduser(model)) if is_local else model
    helm_name = checked_model_name(name) if name else default_model_name(source, is_local=is_local)
    shaped = Shaping.of(shaping)
    tokenizer, translator = _read_tokenizer(description, shaped, helm_name)
    longest, window = _longest_sequence(model, max_sequence_length, description, translator)
    if check is None:
        from engine.opening import check_model  # loads torch, which has not been checked before
    (check or check_model)(with_window(description, window), Policy.load(policy))
    args = {"pretrained_model_name_or_path": source, "policy": _policy_for_yaml(policy), **shaped.given()}
    if window is not None:
        args["window"] = window
    return Entries(
        model=ModelMetadata(
            name=helm_name,
            display_name=helm_name.split("/")[1],
            description=f"{description.model_type} model from {source}",
            creator_organization_name=helm_name.split("/")[0],
            access="open",
            release_date=None,
            tags=[TEXT_MODEL_TAG, FULL_FUNCTIONALITY_TEXT_MODEL_TAG],
        ),
        tokenizer=tokenizer,
        deployment=ModelDeployment(
            name=f"{DEPLOYMENTS}/{helm_name.split('/')[1]}",
            model_name=helm_name,
            tokenizer_name=helm_name,
            max_sequence_length=longest,
            client_spec=ClientSpec(class_name=CLIENT, args=args),
        ),
    )


def _read_tokenizer(
    description: ModelDescription, shaping: Shaping, name: str = ""
) -> tuple[TokenizerConfig, Translator]:
    """Return HELM's entry of a model's tokenizer, and the translator for the model."""
    from helm.tokenizers.huggingface_tokenizer import HuggingFaceTokenizer

    path, settings = description.path, read_generation_config(Path(description.path))
    try:
        wrapped = HuggingFaceTokenizer.create_tokenizer(path, **WITHOUT_CODE)
        with wrapped as tokenizer:
            end_of_text_token, prefix_token = tokenizer.eos_token or "", tokenizer.bos_token or ""
        translator = Translator(
            wrapped,
            model=path,
            window=description.window,
            pad_to=None,
            end_of_text_token=end_of_text_token,
            shaping=shaping,
            generation_config={} if settings is None else settings.to_dict(),
        )
    except EngineError:
        raise
    except Exception as error:
        raise CheckpointError(f"the tokenizer in {path} cannot be loaded: {named(error)}") from None
    spec = TokenizerSpec(class_name=TOKENIZER, args={**tokenizer_args(description.tokenizer), **WITHOUT_CODE})
    entry = TokenizerConfig(
        name=name, tokenizer_spec=spec, end_of_text_token=end_of_text_token, prefix_token=prefix_token
    )
    return entry, translator


def source_of(deployment: ModelDeployment) -> str:
    """Return the hub id, with its revision if it has one, or the directory of a deployment of ours."""
    args = deployment.client_spec.args
    return with_revision(str(args.get("pretrained_model_name_or_path") or deployment.model_name), args.get("revision"))


def located_tokenizer(known: TokenizerConfig, deployment: ModelDeployment) -> TokenizerConfig:
    """Return HELM's entry of the tokenizer of a deployment of ours; of a GGUF file as it is now, else `known`.

    The directory that is made from such a file differs for each of its states.
    """
    if gguf_file(source := source_of(deployment)) is None:
        return known
    return _read_tokenizer(describe(source, download_weights=False), shaping_of(deployment), known.name)[0]


def applies_chat_template(deployment: ModelDeployment, source: str) -> bool:
    """Whether a deployment of ours of the model `source` renders prompts by its chat template; downloads no weights."""
    return _read_tokenizer(describe(source, download_weights=False), shaping_of(deployment))[1].applies_chat_template


def _longest_sequence(
    model: str, given: int | None, description: ModelDescription, translator: Translator
) -> tuple[int, int | None]:
    """HELM's max_sequence_length, and the window where it must be set because it differs from the model's files.

    HELM counts only a prompt's own tokens, so that those of a chat template must fit in addition.
    """
    added = translator.num_added
    if given is not None and given < 1:
        raise ConfigError(
            f"max_sequence_length {given} of {model} is below 1; leave it out to use the model's own value"
        )
    own, limit = description.window, translator.window
    beside = f" beside the {added} tokens of its chat template" if added else ""
    if given is not None and (own is None or given + added > own):
        longest = description.longest_window
        if longest is not None and given + added > longest:
            raise ConfigError(
                f"max_sequence_length {given} of {model} is more than its window, which can be {longest} at most, has "
                f"room for{beside}; give {longest - added} or less"
            )
        return given, given + added
    if limit is None:
        raise ConfigError(
            f"neither config nor tokenizer of {model} says its longest sequence; give --max-sequence-length N"
        )
    if limit <= added:
        raise ConfigError(f"the chat template of {model} takes {added} tokens, and its window is {limit}")
    return given or limit - added, None


def with_longest_sequence(deployment: ModelDeployment, source: str, longest: int | None) -> ModelDeployment:
    """A deployment of ours of the model `source` with another `max_sequence_length`; `ConfigError` if it cannot be.

    None keeps the deployment's own, or lowers it where the chat template leaves less room.
    """
    args = deployment.client_spec.args
    description = with_window(describe(source, download_weights=False), args.get("window"))
    _, translator = _read_tokenizer(description, shaping_of(deployment))
    is_asked, own = longest is not None, deployment.max_sequence_length
    longest, window = _longest_sequence(source, longest, description, translator)
    if not is_asked and own is not None:
        longest = min(longest, own)
    if window is not None:
        args = {**args, "window": window}
    client_spec = ClientSpec(class_name=deployment.client_spec.class_name, args=args)
    return dataclasses.replace(deployment, max_sequence_length=longest, client_spec=client_spec)


def shaping_of(deployment: ModelDeployment) -> Shaping:
    """Return the args of a deployment of ours that affect its answers."""
    return Shaping.of({name: value for name, value in deployment.client_spec.args.items() if name in NAMES})


def _policy_for_yaml(policy: str | Path | Mapping[str, Any] | Policy) -> str | dict[str, Any]:
    checked = Policy.load(policy)
    if isinstance(policy, Policy):
        return checked.as_mapping() or "auto"
    if isinstance(policy, Mapping):
        return dict(policy)
    file = Path(policy).expanduser()
    return str(file.absolute()) if file.is_file() else str(policy)


def register_in_process(entries: Entries) -> None:
    """Register the entries with HELM in this process.

    Model and tokenizer, except that of a GGUF file, are unchanged if they are registered; the deployment is replaced,
    because it defines how this run is executed.
    """
    if entries.model.name not in MODEL_NAME_TO_MODEL_METADATA:
        register_model_metadata(dataclasses.replace(entries.model))
    if entries.tokenizer.name not in TOKENIZER_NAME_TO_CONFIG or gguf_file(source_of(entries.deployment)):
        register_tokenizer_config(entries.tokenizer)
    ALL_MODEL_DEPLOYMENTS[:] = [known for known in ALL_MODEL_DEPLOYMENTS if known.name != entries.deployment.name]
    register_model_deployment(entries.deployment)


def check_local_path(local_path: str | Path) -> None:
    """Raise `ConfigError` for files of a local path that HELM would wait for, or read for minutes."""
    for name in (*(name for name, _ in _FILES), "credentials.conf"):
        file = Path(local_path) / name
        if find_file(file, ConfigError):
            read_bytes(file, ConfigError, limit=MAX_BYTES)


def merge_into_local_path(
    entries: Entries, local_path: str | Path, made: Callable[[Path], None] = lambda file: None
) -> list[str]:
    """Add the entries to HELM's three YAML files in `local_path`; return a line for each that was there, but different.

    helm-summarize and helm-server know only these files. Nothing that stands in them is changed, and no file is ever
    half written. Models and tokenizers that HELM ships are left to HELM. `made` is called with each file that was not
    there. Raises `ConfigError` if a file cannot be read or written.
    """
    directory = Path(local_path).expanduser()
    mappings = [_as_mapping(entries.model), _as_mapping(entries.tokenizer), _as_mapping(entries.deployment)]
    additions = [
        (directory / file, key, mapping)
        for (file, key), mapping in zip(_FILES, mappings, strict=True)
        if not _helm_ships(file, mapping["name"])
    ]
    return add_to_yaml_lists(additions, made, _as_now)


def _as_now(entry: Mapping[str, Any]) -> Mapping[str, Any]:
    """An entry with `WITHOUT_CODE`, which earlier versions left out and which applies to their entries, too."""
    spec: Any = entry.get("tokenizer_spec")
    args = spec.get("args") if isinstance(spec, Mapping) and spec.get("class_name") == TOKENIZER else None
    if not isinstance(args, Mapping):
        return entry
    return {**entry, "tokenizer_spec": {**spec, "args": {**WITHOUT_CODE, **args}}}


def _as_mapping(entry: ModelMetadata | TokenizerConfig | ModelDeployment) -> dict[str, Any]:
    """The fields that differ from their defaults, as in HELM's YAML."""
    defaults = {field.name: field.default for field in dataclasses.fields(entry)}
    return {
        name: value
        for name, value in dataclasses.asdict(entry).items()
        if value is not None and value != defaults[name] and name != "deployment_names"
    }


def _helm_ships(file: str, name: str) -> bool:
    text = resources.files("helm.config").joinpath(file).read_text(encoding="utf-8")
    return re.search(rf"^\s*- name:\s*[\"']?{re.escape(name)}[\"']?\s*(#.*)?$", text, re.MULTILINE) is not None
