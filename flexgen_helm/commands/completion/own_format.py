"""Our own lines of `flexgen-helm complete`: prompts with settings in, a line for each completion out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from engine.errors import ConfigError, EngineError, JobError
from engine.job import Completion, Job, Sampling, check_num_completions
from flexgen_helm.commands.completion.answers import OWN_FORM, LineForm, Place
from flexgen_helm.commands.completion.prompts import BadPrompt, Prompt, Settings, from_arguments, from_jsonl, from_lines
from flexgen_helm.commands.completion.questions import Format, Question, read_lines, shown_name

if TYPE_CHECKING:
    from engine.text.prompt import PromptTokenizer


@dataclass(frozen=True)
class _Sample(Question):
    """One completion of a prompt."""

    place: Place
    prompt: Prompt
    job: Job

    @property
    def where(self) -> str:  # type: ignore[override]
        return self.prompt.where

    @property
    def jobs(self) -> tuple[Job, ...]:  # type: ignore[override]
        return (self.job,)

    def answer(self, completions: Sequence[Completion], key: str) -> dict[str, Any]:
        (done,) = completions
        entry = {"index": self.place[0], "sample": self.place[1], **self.prompt.given}
        if done.error is not None:
            return {**entry, "error": str(done.error)}
        return {
            **entry,
            "completion": done.text,
            "finish_reason": done.finish_reason,
            "num_tokens": len(done.tokens),
            "logprob": sum(done.logprobs),
            "key": key,
        }

    def asked(self, identity: Mapping[str, Any]) -> Any:
        job, sampling = self.job, sorted(vars(self.job.sampling).items())
        return [job.prompt, job.max_new_tokens, sampling, job.stop, sorted(identity.items()), self.prompt.given]


class OwnFormat(Format):
    """Prompts as arguments, lines of text, or JSON lines with settings of their own."""

    def __init__(self, args: Any) -> None:
        """`args` are those of the command line."""
        self._args = args

    @property
    def form(self) -> LineForm:
        """Index and sample, and a key."""
        return OWN_FORM

    def settings(self) -> dict[str, Any]:
        """The settings of the command line, which apply where a prompt has none of its own; a seed of None is drawn."""
        args = self._args
        return {
            "max_new_tokens": args.max_new_tokens,
            "temperature": args.temperature,
            "top_k": args.top_k,
            "top_p": args.top_p,
            "seed": args.seed,
            "stop": tuple(unescaped(stop) for stop in args.stop),
            "num_completions": args.num_completions,
        }

    def prompts(self) -> list[Prompt | BadPrompt]:
        """The prompts of the command line, at least one."""
        args, settings = self._args, Settings(**self.settings())
        if bool(args.prompts) == (args.input is not None):
            raise ConfigError("give prompts either as arguments or by --input")
        if args.prompts:
            return from_arguments(args.prompts, settings)
        name, lines = shown_name(args.input), read_lines(args.input)
        found = (from_jsonl if args.jsonl or name.endswith(".jsonl") else from_lines)(lines, name, settings)
        if not found:
            raise ConfigError(f"--input {name} holds no prompt")
        return found

    def questions(
        self, prompts: Sequence[Prompt | BadPrompt], tokenizer: PromptTokenizer, vocab_size: int | None
    ) -> tuple[list[Question], list[BadPrompt]]:
        """A question for each completion of the valid prompts, and the invalid ones, by position."""
        found: list[Question] = []
        bad = [prompt for prompt in prompts if isinstance(prompt, BadPrompt)]
        for prompt in prompts:
            if isinstance(prompt, BadPrompt):
                continue
            try:
                jobs = _jobs_of(prompt, _tokens(prompt, tokenizer, chat=self._args.chat), tokenizer.window)
            except (ConfigError, JobError) as error:
                bad.append(BadPrompt(index=prompt.index, where=prompt.where, reason=str(error)))
            else:
                found += [_Sample((prompt.index, sample), prompt, job) for sample, job in enumerate(jobs)]
        return found, sorted(bad, key=lambda prompt: prompt.index)

    def refusal(self, prompt: BadPrompt) -> dict[str, Any]:
        """What is wrong, and where."""
        return {"index": prompt.index, "where": prompt.where, "error": prompt.reason}


def unescaped(text: str) -> str:
    r"""`\n`, `\t` and `\\` as a shell's user means them."""
    return text.replace("\\\\", "\0").replace("\\n", "\n").replace("\\t", "\t").replace("\0", "\\")


def _tokens(prompt: Prompt, tokenizer: PromptTokenizer, *, chat: bool) -> list[int]:
    messages = prompt.messages
    if messages is None and chat:
        messages = ({"role": "user", "content": prompt.text},)
    if messages is None:
        return tokenizer.plain(prompt.text)
    if not tokenizer.tokenizer.chat_template:
        raise ConfigError("the model has no chat template; give 'prompt', without --chat")
    try:
        return tokenizer.chat(messages)
    except EngineError:
        raise
    except Exception as error:  # templates raise what they like
        raise ConfigError(f"the chat template refuses it: {' '.join(str(error).split())[:200]}") from None


def _jobs_of(prompt: Prompt, tokens: list[int], window: int | None) -> list[Job]:
    settings = prompt.settings
    check_num_completions(settings.num_completions)
    if settings.max_new_tokens < 1:
        raise JobError(f"max_new_tokens {settings.max_new_tokens} is below 1")
    if window is not None and len(tokens) + settings.max_new_tokens - 1 > window:
        raise JobError(
            f"prompt of {len(tokens)} tokens + {settings.max_new_tokens} new ones exceed the model's window of {window}"
        )
    jobs = [
        Job(
            prompt=tokens,
            max_new_tokens=settings.max_new_tokens,
            sampling=Sampling(
                temperature=settings.temperature,
                top_k=settings.top_k,
                top_p=settings.top_p,
                seed=None if settings.seed is None else settings.seed + sample,
            ),
            stop=settings.stop,
        )
        for sample in range(settings.num_completions)
    ]
    jobs[0].check()
    return jobs
