"""The rules on logits of a checkpoint's generation_config.json, which forbid tokens or make them less likely."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from engine.errors import CheckpointError, shown

if TYPE_CHECKING:
    import torch

_HAS_NO_EFFECT: dict[str, tuple[Any, ...]] = {
    "num_beams": (1,),
    "num_beam_groups": (1,),
    "penalty_alpha": (0.0,),
    "guidance_scale": (1.0,),
    "encoder_repetition_penalty": (1.0,),
    "encoder_no_repeat_ngram_size": (0,),
    "diversity_penalty": (0.0,),
    "watermarking_config": (),
    "dola_layers": (),
    "stop_strings": (),
    "max_time": (),
    "constraints": (),
    "force_words_ids": (),
    "sequence_bias": (),
    "exponential_decay_length_penalty": (),
    "forced_bos_token_id": (),
    "token_healing": (False,),
}
"""Keys that would change a text and that are not supported, with the values that have no effect."""


@dataclass(frozen=True, kw_only=True)
class LogitRules:
    """Rules applied by the processors of `transformers`, in its order, before a job's penalties and sampling.

    Sampling settings (temperature, top_p, top_k and the like) are not among them: a job sets these itself.
    """

    repetition_penalty: float = 1.0
    no_repeat_ngram_size: int = 0
    bad_words_ids: tuple[tuple[int, ...], ...] = ()
    min_length: int = 0
    """The least number of tokens of prompt and text together."""
    min_new_tokens: int = 0
    """The least number of tokens of the text."""
    forced_eos_token_id: tuple[int, ...] = ()
    """The token that is forced in the last place of a text."""
    suppress_tokens: tuple[int, ...] = ()
    begin_suppress_tokens: tuple[int, ...] = ()
    """Tokens that are forbidden as the first token."""
    end_of_text: tuple[int, ...] = ()
    prompt: tuple[int, ...] = ()
    """The prompt of the job that the rules apply to: some rules depend on it."""
    max_new_tokens: int = 0
    """The `max_new_tokens` of that job."""

    @classmethod
    def of(cls, config: Mapping[str, Any], end_of_text: Sequence[int]) -> LogitRules | None:
        """The rules of a generation_config.json; None where it has none.

        Raises `CheckpointError` for invalid values.
        """
        try:
            rules = cls._of(config)
        except (TypeError, ValueError, OverflowError):
            told = {name: config[name] for name in asdict(cls()) if config.get(name) is not None}
            raise CheckpointError(
                f"generation_config.json says {shown(told)}; numbers and lists of token ids are expected there"
            ) from None
        return None if rules == cls() else cls(**{**asdict(rules), "end_of_text": tuple(end_of_text)})

    @classmethod
    def _of(cls, config: Mapping[str, Any]) -> LogitRules:
        forced = config.get("forced_eos_token_id")
        return cls(
            repetition_penalty=float(config.get("repetition_penalty") or 1.0),
            no_repeat_ngram_size=int(config.get("no_repeat_ngram_size") or 0),
            bad_words_ids=tuple(map(tuple, config.get("bad_words_ids") or ())),
            min_length=int(config.get("min_length") or 0),
            min_new_tokens=int(config.get("min_new_tokens") or 0),
            forced_eos_token_id=() if forced is None else (forced,) if isinstance(forced, int) else tuple(forced),
            suppress_tokens=tuple(config.get("suppress_tokens") or ()),
            begin_suppress_tokens=tuple(config.get("begin_suppress_tokens") or ()),
        )

    def told(self) -> dict[str, Any]:
        """The rules that are set, by the names of generation_config.json; JSON types."""
        own = {**asdict(self), "prompt": (), "max_new_tokens": 0, "end_of_text": ()}
        defaults = asdict(LogitRules())
        return {
            name: [list(each) if isinstance(each, tuple) else each for each in value]
            if isinstance(value, tuple)
            else value
            for name, value in own.items()
            if value != defaults[name]
        }

    def processors(self, device: torch.device | str) -> list[Any]:
        """The processors that `transformers` makes of the same settings."""
        from transformers.generation import logits_process as g

        end, length = list(self.end_of_text), len(self.prompt)
        made: list[Any] = []
        if self.repetition_penalty != 1.0:
            made.append(g.RepetitionPenaltyLogitsProcessor(self.repetition_penalty))
        if self.no_repeat_ngram_size:
            made.append(g.NoRepeatNGramLogitsProcessor(self.no_repeat_ngram_size))
        if self.bad_words_ids:
            made.append(g.NoBadWordsLogitsProcessor([list(word) for word in self.bad_words_ids], end or None))
        if self.min_length and end:
            made.append(g.MinLengthLogitsProcessor(self.min_length, end, device=str(device)))
        if self.min_new_tokens and end:
            made.append(g.MinNewTokensLengthLogitsProcessor(length, self.min_new_tokens, end, device=str(device)))
        if self.forced_eos_token_id:
            most = length + self.max_new_tokens
            made.append(g.ForcedEOSTokenLogitsProcessor(most, list(self.forced_eos_token_id), device=str(device)))
        if self.suppress_tokens:
            made.append(g.SuppressTokensLogitsProcessor(list(self.suppress_tokens), device=str(device)))
        if self.begin_suppress_tokens:
            tokens = list(self.begin_suppress_tokens)
            made.append(g.SuppressTokensAtBeginLogitsProcessor(tokens, length, device=str(device)))
        return made

    def apply(self, generated: Sequence[int], logits: torch.Tensor) -> torch.Tensor:
        """Apply the rules to logits `[vocabulary]` of what follows `generated`."""
        import torch

        ids = torch.tensor([[*self.prompt, *generated]], device=logits.device)
        scores = logits[None]
        for processor in self.processors(logits.device):
            scores = processor(ids, scores)
        return scores[0]


def refused_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a generation_config.json that would change a text and are not supported."""
    return {
        name: config[name]
        for name, harmless in _HAS_NO_EFFECT.items()
        if config.get(name) is not None and config[name] not in harmless
    }
