"""Sampling settings that a checkpoint's generation_config.json recommends, for deployments that use them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from helm.common.request import Request

from engine.errors import ConfigError, JobError, UnsupportedError, shown
from engine.job import Sampling

WORDS = ("entry", "model")
"""The allowed values of a deployment's `sampling`: the run entry's settings, as in HELM, or the model's."""
_WITHOUT_EFFECT = {"min_p": (0.0,), "typical_p": (1.0,), "epsilon_cutoff": (0.0,), "eta_cutoff": (0.0,), "top_h": ()}
"""Unsupported settings, with the values that have no effect."""

_DEFAULTS = {"temperature": 1.0, "top_k": 50, "top_p": 1.0}
"""The defaults of `transformers` for settings that generation_config.json leaves out."""


@dataclass(frozen=True, kw_only=True)
class ModelSampling:
    """The sampling settings that replace those of requests; a temperature of None leaves all to the requests."""

    top_k: int | None
    """The deployment's top_k; requests have none."""
    temperature: float | None = None
    top_p: float = 1.0

    @classmethod
    def of(cls, sampling: str | None, config: Mapping[str, Any], *, model: str, top_k: int | None) -> ModelSampling:
        """The sampling of a deployment with the given `sampling` and `top_k`; `config` is its generation_config.json.

        Missing settings are those that `transformers` samples with. Raises `ConfigError` where the model's config does
        not sample, `UnsupportedError` for settings that are not supported.
        """
        if sampling is None or sampling == "entry":
            return cls(top_k=top_k)
        if sampling != "model":
            raise ConfigError(f"sampling {shown(sampling)} of {model} is none of {', '.join(WORDS)}")
        if top_k is not None:
            raise ConfigError(f"sampling: model of {model} takes top_k from generation_config.json; leave top_k out")
        if config.get("do_sample") is not True:
            raise ConfigError(
                f"sampling: model, but the generation_config.json of {model} does not say do_sample: true; leave "
                "sampling out, and the run entries' settings hold"
            )
        odd = {
            name: config[name]
            for name, harmless in _WITHOUT_EFFECT.items()
            if config.get(name) is not None and config[name] not in harmless
        }
        if odd:
            told = ", ".join(f"{name} {value}" for name, value in odd.items())
            raise UnsupportedError(
                f"sampling: model, and the generation_config.json of {model} sets {told}, which is not "
                "supported; leave sampling out"
            )
        given = {name: value for name in _DEFAULTS if (value := config.get(name)) is not None}
        for name, value in given.items():
            kinds = int if name == "top_k" else int | float
            if isinstance(value, bool) or not isinstance(value, kinds):
                raise ConfigError(
                    f"sampling: model, and {name} in the generation_config.json of {model} is {shown(value)}; "
                    "a number is expected there"
                )
        found = {**_DEFAULTS, **given}
        settings = Sampling(
            temperature=float(found["temperature"]), top_k=int(found["top_k"]) or None, top_p=float(found["top_p"])
        )
        try:
            settings.check()
        except JobError as error:
            raise ConfigError(f"sampling: model, and in the generation_config.json of {model} {error}") from None
        return cls(temperature=settings.temperature, top_k=settings.top_k, top_p=settings.top_p)

    def applied(self, request: Request) -> Request:
        """Apply the settings to a request; one that generates nothing is not changed."""
        if request.max_tokens == 0 or self.temperature is None:
            return request
        return replace(request, temperature=self.temperature, top_p=self.top_p)

    def note(self, model: str) -> str | None:
        """Describe the settings in one line; None if the requests' own are used."""
        if self.temperature is None:
            return None
        top_k = "all tokens" if self.top_k is None else f"the {self.top_k} likeliest tokens"
        return (
            f"answers of {model} are sampled by its generation_config.json (temperature {self.temperature:g}, top_p "
            f"{self.top_p:g}, among {top_k}), regardless of run entries, as sampling: model says"
        )
