"""HELM's view of an answer: the response for its cache, and the result made from that or from an error."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from helm.common.request import ErrorFlags, GeneratedOutput, Request, RequestResult, Thinking, Token

from engine.errors import EngineError, JobError, NumericsError
from engine.job import Completion, Job
from engine.text.decoding import Text
from flexgen_helm.helm.requests.tokenizer import Spelling

if TYPE_CHECKING:
    from helm.tokenizers.huggingface_tokenizer import WrappedPreTrainedTokenizer
    from transformers import PreTrainedTokenizerBase

Response = dict[str, Any]
"""The entry of a request in HELM's cache; JSON types only."""


class PromptError(JobError):
    """A prompt that this model cannot process; other requests of the run are not affected."""


@dataclass(frozen=True, kw_only=True)
class Timing:
    """How long a request took, and how many requests were computed together."""

    seconds: float
    """The seconds from the beginning of the engine call to the answer."""
    started: float
    """When that call began, in seconds since the Epoch."""
    num_requests: int
    """Requests that the engine computed together."""


def response(
    wrapped: WrappedPreTrainedTokenizer,
    spelling: Spelling,
    request: Request,
    job: Job,
    completions: Sequence[Completion],
    timing: Timing,
) -> Response:
    """Make the cache entry of an answer; raises the error of a failed completion. `job` is any of the request's."""
    for completion in completions:
        if completion.error is not None:
            raise completion.error
    if len(completions) < request.num_completions:
        completions = [completions[0]] * request.num_completions
    ids = list(job.prompt)
    with wrapped as tokenizer:
        response: Response = {
            "completions": [_completion(tokenizer, spelling, request, job, completion) for completion in completions],
            "request_time": timing.seconds,
            "request_datetime": int(timing.started),
        }
        if request.echo_prompt:
            response["prompt"] = {
                "text": tokenizer.decode(ids),
                "tokens": spelling.texts(ids),
                "spelled": True,
                "logprobs": [logprob or 0.0 for logprob in completions[0].prompt_logprobs or ()],
            }
    if timing.num_requests > 1:
        response["batch_size"] = timing.num_requests
        response["batch_request_time"] = timing.seconds
    return response


def _completion(
    tokenizer: PreTrainedTokenizerBase, spelling: Spelling, request: Request, job: Job, completion: Completion
) -> Response:
    """Make text, tokens and log-probabilities of the answer; the thinking before it is stored separately."""
    before = list(job.prompt) if request.echo_prompt else []
    kept: Response = {
        "text": _continuation(tokenizer, before, completion) if request.echo_prompt else completion.text,
        "tokens": spelling.texts([*before, *completion.tokens])[len(before) :],
        "logprobs": list(completion.logprobs),
        "finish_reason": completion.finish_reason,
    }
    if job.thinking is None or (reading := job.thinking.read(completion.text)).thinking is None:
        return kept
    first = _first_of_answer(tokenizer, completion, reading.begin)
    return {
        **kept,
        "text": completion.text[reading.begin :],
        "tokens": kept["tokens"][first:],
        "logprobs": kept["logprobs"][first:],
        "thinking": reading.thinking,
        "thinking_tokens": first,
    }


def _first_of_answer(tokenizer: PreTrainedTokenizerBase, completion: Completion, begin: int) -> int:
    """The index of the token with an answer's first character, at `begin` in the text; past the last if it is empty."""
    tokens = completion.tokens
    if begin == len(completion.text):
        return len(tokens)
    count = Text(tokenizer, frozenset()).num_spelling(tokens, completion.text[:begin])
    return count - (count > 0 and len(tokenizer.decode(list(tokens[:count]))) > begin)


def is_cut_off(output: GeneratedOutput) -> bool:
    """Whether the thinking used up all tokens, so that the answer is empty."""
    return output.thinking is not None and not output.text.strip() and output.finish_reason == {"reason": "length"}


def cut_off(count: int) -> str:
    """The message that answers are empty because thinking used up their tokens, in one line."""
    return (
        f"{count} answers were cut off in their thinking and are empty; give entries more room (increase_max_tokens=N)"
        ", or thinking a budget (--thinking-budget N)"
    )


def is_outdated(response: Response) -> bool:
    """Whether a response of an earlier release has prompt tokens that do not spell the prompt, as before `Spelling`.

    HELM computes bits per byte from them.
    """
    prompt = response.get("prompt")
    return (
        prompt is not None
        and "spelled" not in prompt
        and ("\ufffd" in prompt["text"] or "".join(prompt["tokens"]) != prompt["text"])
    )


def _continuation(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], completion: Completion) -> str:
    """Return the text of a completion after its prompt, where a tokenizer like Llama's keeps its first space.

    If the completion changes how the prompt is decoded (half a character makes its neighbours unreadable), its text
    alone.
    """
    if not completion.tokens:
        return completion.text
    prompt, whole = str(tokenizer.decode(list(ids))), str(tokenizer.decode([*ids, *completion.tokens]))
    if not whole.startswith(prompt):
        return completion.text
    num_cut = len(tokenizer.decode(list(completion.tokens))) - len(completion.text)  # characters after the stop
    return whole[len(prompt) : len(whole) - num_cut]


def result(response: Response, *, cached: bool) -> RequestResult:
    """HELM's result of a response, new or from the cache."""
    prompt = response.get("prompt", {"text": "", "tokens": [], "logprobs": []})
    return RequestResult(
        success=True,
        embedding=[],
        completions=[_generated_output(prompt, completion) for completion in response["completions"]],
        cached=cached,
        request_time=response["request_time"],
        request_datetime=response["request_datetime"],
        batch_size=response.get("batch_size"),
        batch_request_time=response.get("batch_request_time"),
    )


def known_response(stored: Response | None) -> Response | None:
    """Return an entry of the cache; None if it is empty, or damaged and not a response of ours."""
    try:
        if stored is None or is_outdated(stored):
            return None
        result(stored, cached=True)
    except (KeyError, TypeError, ValueError, AttributeError):
        return None
    return stored


def _generated_output(prompt: Response, completion: Response) -> GeneratedOutput:
    texts = [*prompt["tokens"], *completion["tokens"]]
    logprobs = [*prompt["logprobs"], *completion["logprobs"]]
    tokens = [Token(text=text, logprob=logprob) for text, logprob in zip(texts, logprobs, strict=True)]
    return GeneratedOutput(
        text=prompt["text"] + completion["text"],
        logprob=sum(logprobs),
        tokens=tokens,
        finish_reason={"reason": completion["finish_reason"]},
        thinking=Thinking(text=completion["thinking"]) if "thinking" in completion else None,
    )


def failure(request: Request, error: EngineError) -> RequestResult:
    """Make HELM's result of a failed request; it is never retried, because HELM would sleep 150 s for that.

    HELM scores a failure that is not fatal as an empty completion. That is right for a prompt that the model cannot
    process, or for which it has no finite answer. But if log-probabilities of the prompt are scored, an empty
    completion would have the best score of all (0). In that case, and for every fault that is not the prompt's, the
    failure is fatal to the run.
    """
    fatal = request.echo_prompt or not isinstance(error, PromptError | NumericsError)
    return RequestResult(
        success=False,
        embedding=[],
        completions=[],
        cached=False,
        error=f"{type(error).__name__}: {error}",
        error_flags=ErrorFlags(is_retriable=False, is_fatal=fatal),
    )
