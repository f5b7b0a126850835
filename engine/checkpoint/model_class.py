"""Chooses the class of `transformers` that runs a model's text: a causal language model, or a multimodal one."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine.errors import UnsupportedError, shown

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel


def check_causal(path: Path, config: Mapping[str, Any]) -> None:
    """Raise `UnsupportedError` unless the model is, or contains, a causal language model by its config.json."""
    if config.get("is_encoder_decoder"):
        named = _told(config)
        raise UnsupportedError(f"{named} in {path} is an encoder-decoder; only causal (decoder-only) models run here")
    if _class_name(config) is None:
        model_type = config["model_type"]
        is_known = model_type in _causal() or model_type in _multimodal()
        raise UnsupportedError(
            f"{_told(config)} in {path} is not a causal language model; only decoder-only models run here"
            if is_known
            else f"{_told(config)} in {path} is no causal language model that this transformers version knows"
        )


def new_model(config: PreTrainedConfig, **settings: Any) -> PreTrainedModel:
    """Create a model of the class that runs `config`, as `from_config` of `transformers`' automatic classes does.

    Raises `UnsupportedError` where no class does.
    """
    kind = model_class(config)
    expected: Any = kind.config_class
    half = config.sub_configs.get("text_config")
    if half is not None and expected is half:  # the language model alone, as AutoModelForCausalLM has it
        whole, config = config, config.get_text_config()
        if getattr(whole, "quantization_config", None) is not None:
            config.quantization_config = whole.quantization_config
    else:
        config = whole_of_half(config) or config
    model: PreTrainedModel = kind._from_config(config, **settings)
    return model


def read_model(directory: str | Path, **settings: Any) -> PreTrainedModel:
    """Load the model of a directory with its weights, by `from_pretrained` of the class that runs it."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(directory, trust_remote_code=False)
    kind = model_class(config)
    expected: Any = kind.config_class
    if _is_half_of(expected, config):
        raise UnsupportedError(
            f"{directory} is the text half of a {expected.model_type} alone, which from_pretrained of transformers "
            "does not read by itself"
        )
    is_causal = kind.__name__ in _causal().get(config.model_type, ())
    model: PreTrainedModel = (AutoModelForCausalLM if is_causal else kind).from_pretrained(directory, **settings)
    return model


def whole_of_half(config: PreTrainedConfig) -> PreTrainedConfig | None:
    """The config of the whole model for that of a text half which only the whole model's class runs; None otherwise.

    Its encoders have the family's default sizes.
    """
    expected: Any = model_class(config).config_class
    if not _is_half_of(expected, config):
        return None
    whole: PreTrainedConfig = expected(text_config=config.to_dict(), tie_word_embeddings=config.tie_word_embeddings)
    return whole


def _is_half_of(whole: Any, config: PreTrainedConfig) -> bool:
    """Whether a config is the text half of the model that the config class `whole` describes."""
    return whole is not None and whole.sub_configs.get("text_config") is type(config)


def model_class(config: PreTrainedConfig) -> type[PreTrainedModel]:
    """The class of `transformers` that runs a config's text; `UnsupportedError` where there is none."""
    import transformers

    told = {"model_type": config.model_type, "architectures": config.architectures, "is_decoder": True}
    name = _class_name(told)
    if name is None:
        raise UnsupportedError(f"{config.model_type} is no causal language model that this transformers version knows")
    found: type[PreTrainedModel] = getattr(transformers, name)
    return found


def _class_name(config: Mapping[str, Any]) -> str | None:
    """The class that a config names, if it runs text and belongs to its model type; None otherwise.

    Configs that name none, or the class without a head, are run by the causal class of their type; so are those that
    name a class with encoders, where their type has a class without, as in AutoModelForCausalLM. The text half of a
    multimodal model is run by the causal class that it names if that class has this config, else by the class of the
    whole model.
    """
    model_type, told = config["model_type"], list(config.get("architectures") or ())
    causal, multimodal = _causal().get(model_type, ()), _multimodal().get(model_type, ())
    if not causal and not multimodal:
        return _class_of_half(model_type, told)
    if _is_encoder_family(model_type) and not config.get("is_decoder"):
        return None
    if all(name.endswith("Model") for name in told):
        return [*causal, *multimodal][0]
    own = next((name for name in told if name in causal or name in multimodal), None)
    return causal[0] if own is not None and causal and own not in causal else own


def _class_of_half(model_type: str, told: list[str]) -> str | None:
    import transformers

    registered = {name for names in _causal().values() for name in names}
    for name in (name for name in told if name in registered):
        if getattr(transformers, name).config_class.model_type == model_type:
            return name
    whole = _whole_of(model_type)
    return None if whole is None else _multimodal()[whole][0]


def _whole_of(model_type: str) -> str | None:
    """The type of the multimodal model that contains this text model type: "qwen3_vl" for "qwen3_vl_text"."""
    from transformers import CONFIG_MAPPING

    for kind in _multimodal() if model_type in CONFIG_MAPPING else ():
        if model_type.startswith(f"{kind}_"):
            text = CONFIG_MAPPING[kind].sub_configs.get("text_config")
            if text is CONFIG_MAPPING[model_type]:
                return kind
    return None


def _told(config: Mapping[str, Any]) -> str:
    """The class, or else the type, that a config names, for messages."""
    name = str([*(config.get("architectures") or ()), config["model_type"]][0])
    return name if name.isprintable() and len(name) <= 100 else shown(name)


def _causal() -> dict[str, tuple[str, ...]]:
    """The classes of causal language models by model type."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return {kind: _names(names) for kind, names in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items()}


def _multimodal() -> dict[str, tuple[str, ...]]:
    """The classes of models that generate text from images, audio and text, by model type."""
    from transformers.models.auto import modeling_auto

    newer = getattr(modeling_auto, "MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES", {})
    found = {**modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES, **newer}
    return {kind: _names(names) for kind, names in found.items()}


def _names(names: str | tuple[str, ...]) -> tuple[str, ...]:
    return (names,) if isinstance(names, str) else tuple(names)


def _is_encoder_family(model_type: str) -> bool:
    """Whether a family (BERT, RoBERTa, …) has a causal class only for configs that set is_decoder."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

    return model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES
