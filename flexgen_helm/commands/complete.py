"""`flexgen-helm complete`: prompts in, completions out, as JSON lines; goes on where it was. Imports no HELM."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine.errors import ConfigError, EngineError, InstallationError, JobError
from engine.job import Completion, Job, Sampling, check_num_completions
from engine.policy import Policy
from flexgen_helm.commands.completion.answers import Answers, Place
from flexgen_helm.commands.completion.prompts import BadPrompt, Prompt, Settings, from_arguments, from_jsonl, from_lines
from flexgen_helm.commands.completion.record import AnswersRecord
from flexgen_helm.runs.flags import POLICY, add_policy_flags, policy_from_flags
from flexgen_helm.terminal.errors import RunFailed
from flexgen_helm.terminal.installation import model_problem
from flexgen_helm.terminal.parser import Parser
from flexgen_helm.terminal.progress import Progress
from flexgen_helm.workers.engine_processes import engine_processes

if TYPE_CHECKING:
    from engine.text.prompt import PromptTokenizer

_SHOWN = 20
"""Bad prompts that are named, at most."""

_FORMAT = """\

a line of JSON in: {"prompt": "..."} or {"messages": [{"role": "user", "content": "..."}]}, and if you like "id",
"metadata", "max_new_tokens", "temperature", "top_k", "top_p", "seed", "stop", "num_completions";
out: index, sample, what was given, completion, finish_reason, num_tokens, logprob (natural, summed) or error.
"""
EXAMPLES = (
    "flexgen-helm complete --model facebook/opt-30b --policy opt-30b-t4 -i prompts.txt -o answers.jsonl",
    "flexgen-helm complete --model ./my-model --gpu-memory 16GB --chat 'Name three rivers.'",
)
_MOST_BYTES = 1_000_000_000
"""Of prompts, all of which are in memory together with their tokens."""


def complete_parser() -> Parser:
    """The command line of `flexgen-helm complete`."""
    parser = Parser(
        prog="flexgen-helm complete",
        description=__doc__,
        epilog=_FORMAT,
        examples=EXAMPLES,
        texts=["stop"],
        prompts=["prompts"],
    )
    parser.group("model").add_argument("--model", required=True, help="hub id, directory or GGUF file of the model")
    asked = parser.group("what to ask")
    asked.add_argument("prompts", nargs="*", metavar="PROMPT", help="prompts; or give --input")
    asked.add_argument("-i", "--input", metavar="FILE", help="a prompt a line, or .jsonl; - is standard input")
    asked.add_argument("--jsonl", action="store_true", help="the input is JSONL, whatever it is called")
    asked.add_argument("--chat", action="store_true", help="every prompt is a user's message for the chat template")
    asked.add_argument("--skip-bad", action="store_true", help="ask the others when some prompts cannot be asked")
    asked.add_argument("-n", "--num-completions", type=int, default=1, metavar="N", help="of each prompt (1)")
    asked.add_argument("--max-new-tokens", type=int, default=Settings.max_new_tokens, metavar="N", help="(64)")
    asked.add_argument("--temperature", type=float, default=Settings.temperature, metavar="T", help="0 is greedy (0)")
    asked.add_argument("--top-k", type=int, metavar="K", help="sample among the K most likely tokens")
    asked.add_argument("--top-p", type=float, default=Settings.top_p, metavar="P", help="nucleus sampling (1)")
    asked.add_argument("--seed", type=int, metavar="N", help="of a prompt's first sample; drawn if left out")
    asked.add_argument(
        "--stop", action="append", default=[], metavar="TEXT", help=r"ends a completion; \n is a new line; repeatable"
    )
    add_policy_flags(parser.group("policy", POLICY))
    output = parser.group("output")
    output.add_argument("-o", "--output", type=Path, metavar="FILE", help="JSONL, gone on with if it is there")
    output.add_argument("--debug", action="store_true", help="show tracebacks")
    return parser


def complete(arguments: Sequence[str]) -> int:
    """Complete the prompts of a command line; `EngineError` for bad input, `RunFailed` when some failed."""
    args = complete_parser().parse_args(arguments)
    spec = policy_from_flags(args)
    policy = Policy.load("auto" if spec is None else spec)
    found = _read(args)
    engine_processes.prepare()
    if problem := model_problem():
        raise InstallationError(problem)
    from engine.checkpoint.description import describe
    from engine.checkpoint.identity.result import Identity, identity_beside_weights, result_identity
    from engine.checkpoint.tokenizer import load_tokenizer
    from engine.text.prompt import PromptTokenizer

    description = describe(args.model)
    tokenizer = PromptTokenizer.of(load_tokenizer(Path(description.path)), description.window)
    jobs, bad = _jobs(found, tokenizer, description.window, chat=args.chat)
    for prompt in bad[:_SHOWN]:
        print(f"{prompt.where}: {prompt.reason}", file=sys.stderr)
    if len(bad) > _SHOWN:
        print(f"and {len(bad) - _SHOWN} more", file=sys.stderr)
    if bad and not args.skip_bad:
        raise ConfigError(
            f"{len(bad)} of {len(found)} prompts cannot be asked, the first: {bad[0].where}: {bad[0].reason}; "
            "mend them, or give --skip-bad to ask the others"
        )
    if not jobs:
        raise ConfigError(f"none of the {len(found)} prompts can be asked")
    beside = identity_beside_weights(args.model, policy)

    @cache
    def identity_of(weights: str | None) -> Identity:
        """By the digest of the weights that answer; None finds it here."""
        return result_identity(args.model, policy) if weights is None else {"weights": weights, **beside}

    def keys(weights: str | None) -> dict[Place, str]:
        return {place: _key(prompt, job, identity_of(weights)) for place, (prompt, job) in jobs.items()}

    with Answers(args.output) as answers:
        record = AnswersRecord(answers.path)

        def begin(weights: str | None) -> dict[Place, str]:
            made = {"model": args.model, "policy": policy.as_mapping(), "identity": identity_of(weights)}
            record.write({**made, "settings": _settings(args)}, goes_on=bool(done))
            return keys(weights)

        done = answers.resume(lambda: keys(None), lambda: record.what_differs(identity_of(None)))
        left = {place: job for place, job in jobs.items() if place not in done}
        for prompt in bad:
            answers.add({"index": prompt.index, "where": prompt.where, "error": prompt.reason})
        failures = _ask(args, policy, left, begin, answers) if left else []
        answers.sort()
    if done:
        print(f"{len(done)} answers were there already", file=sys.stderr)
    if failures:
        again = "; the same command asks them again" if args.output else ""
        raise RunFailed(f"{len(failures)} of {len(left)} requests failed, the first: {failures[0]}{again}")
    return 0


def _read(args: Any) -> list[Prompt | BadPrompt]:
    """The prompts of the command line, at least one."""
    settings = Settings(**_settings(args))
    if bool(args.prompts) == (args.input is not None):
        raise ConfigError("give prompts either as arguments or by --input")
    if args.prompts:
        return from_arguments(args.prompts, settings)
    name = "standard input" if args.input == "-" else args.input
    try:
        if args.input == "-" and sys.stdin is None:
            raise ConfigError("standard input is closed; name a file with --input")
        if args.input == "-":
            data = sys.stdin.buffer.read(_MOST_BYTES + 1)
        else:
            with Path(args.input).open("rb") as stream:  # which may be a pipe: a shell's <(...) is one
                data = stream.read(_MOST_BYTES + 1)
        if len(data) > _MOST_BYTES:
            raise ConfigError(f"--input {name} has more than {_MOST_BYTES:,} bytes; cut it into several files")
        lines = data.decode("utf-8-sig").split("\n")
    except OSError as error:
        raise ConfigError(f"--input {name} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"--input {name} is not UTF-8 (byte {error.start}); convert it") from None
    found = (from_jsonl if args.jsonl or name.endswith(".jsonl") else from_lines)(lines, name, settings)
    if not found:
        raise ConfigError(f"--input {name} holds no prompt")
    return found


def _settings(args: Any) -> dict[str, Any]:
    """Those of the command line, which hold where a prompt has none of its own; a seed of None is drawn."""
    return {
        "max_new_tokens": args.max_new_tokens,
        "temperature": args.temperature,
        "top_k": args.top_k,
        "top_p": args.top_p,
        "seed": args.seed,
        "stop": tuple(_unescaped(stop) for stop in args.stop),
        "num_completions": args.num_completions,
    }


def _unescaped(text: str) -> str:
    r"""`\n`, `\t` and `\\` as a shell's user means them."""
    return text.replace("\\\\", "\0").replace("\\n", "\n").replace("\\t", "\t").replace("\0", "\\")


def _jobs(
    found: list[Prompt | BadPrompt], tokenizer: PromptTokenizer, window: int | None, *, chat: bool
) -> tuple[dict[Place, tuple[Prompt, Job]], list[BadPrompt]]:
    """The jobs of the prompts that can be asked, and what cannot, by place."""
    jobs: dict[Place, tuple[Prompt, Job]] = {}
    bad = [prompt for prompt in found if isinstance(prompt, BadPrompt)]
    for prompt in found:
        if isinstance(prompt, BadPrompt):
            continue
        try:
            own = _jobs_of(prompt, _tokens(prompt, tokenizer, chat=chat), window)
        except (ConfigError, JobError) as error:
            bad.append(BadPrompt(index=prompt.index, where=prompt.where, reason=str(error)))
        else:
            jobs.update({(prompt.index, sample): (prompt, job) for sample, job in enumerate(own)})
    return jobs, sorted(bad, key=lambda prompt: prompt.index)


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


def _key(prompt: Prompt, job: Job, identity: dict[str, Any]) -> str:
    """Tells what was asked of which weights, and what goes into the answer with it."""
    sampling = vars(job.sampling)
    asked = [job.prompt, job.max_new_tokens, sorted(sampling.items()), job.stop, sorted(identity.items()), prompt.given]
    return hashlib.sha256(json.dumps(asked).encode()).hexdigest()[:16]


def _ask(
    args: Any,
    policy: Policy,
    left: dict[Place, tuple[Prompt, Job]],
    begin: Callable[[str | None], dict[Place, str]],
    answers: Answers,
) -> list[str]:
    """Run what is left; returns a line for each failure.

    `begin` is called before the first answer is written, with the digest of the weights, and returns the keys.
    """
    places, failures, tokens = list(left), list[str](), 0
    progress = Progress()
    progress.begin("prompts" if args.input in (None, "-") else Path(args.input).name)
    progress(0, len(places), 0)
    try:
        with engine_processes.load(args.model, policy) as engine:
            keys: dict[Place, str] = {}
            for number, (at, completion) in enumerate(engine.stream(job for _, job in left.values()), 1):
                keys = keys or begin(engine.weights_digest())  # all weights are read by the end of the first sweep
                place = places[at]
                prompt, job = left[place]
                answers.add(_answer(place, prompt, completion, keys[place]))
                if completion.error is not None:
                    failures.append(f"{prompt.where}: {completion.error}")
                tokens += len(job.prompt) + len(completion.tokens)
                progress(number, len(places), tokens)
    finally:
        throughput = progress.close()
        if progress.num_computed:
            print(throughput, file=sys.stderr)
    return failures


def _answer(place: Place, prompt: Prompt, completion: Completion, key: str) -> dict[str, Any]:
    entry = {"index": place[0], "sample": place[1], **prompt.given}
    if completion.error is not None:
        return {**entry, "error": str(completion.error)}
    return {
        **entry,
        "completion": completion.text,
        "finish_reason": completion.finish_reason,
        "num_tokens": len(completion.tokens),
        "logprob": sum(completion.logprobs),
        "key": key,
    }
