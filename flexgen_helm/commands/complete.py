"""`flexgen-helm complete`: prompts in, completions out, as JSON lines; it can be resumed. Imports no HELM."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine.errors import ConfigError, InstallationError
from engine.job import Completion, Job
from engine.policy import Policy
from flexgen_helm.commands.completion.answers import Answers, Place
from flexgen_helm.commands.completion.own_format import OwnFormat
from flexgen_helm.commands.completion.prompts import Settings
from flexgen_helm.commands.completion.questions import Format, Question
from flexgen_helm.commands.completion.record import AnswersRecord
from flexgen_helm.runs.flags import POLICY, add_policy_flags, policy_from_flags
from flexgen_helm.terminal.errors import RunFailed
from flexgen_helm.terminal.installation import model_problem
from flexgen_helm.terminal.parser import Parser
from flexgen_helm.terminal.progress import Progress
from flexgen_helm.workers.cluster.flags import add_cluster_flags, check_cluster_flags, use_cluster
from flexgen_helm.workers.engine_processes import engine_processes

if TYPE_CHECKING:
    from engine.hosts.hosts_engine import HostsEngine
    from engine.workers.remote_engine import RemoteEngine

_SHOWN = 20
"""Bad prompts that are named, at most."""

_FORMAT = """\

a line of input: {"prompt": "..."} or {"messages": [{"role": "user", "content": "..."}]}, with any of "id",
"metadata", "max_new_tokens", "temperature", "top_k", "top_p", "seed", "stop", "num_completions".
a line of output: index, sample, the line's own fields, completion, finish_reason, num_tokens, logprob (sum of
natural logs) or error.

with --format openai, input and output are OpenAI's batch files, for /v1/completions and /v1/chat/completions. A line
with an unsupported request is answered with an error; the other lines run.
"""
EXAMPLES = (
    "flexgen-helm complete --model facebook/opt-30b --policy opt-30b-t4 -i prompts.txt -o answers.jsonl",
    "flexgen-helm complete --model ./my-model --gpu-memory 16GB --chat 'Name three rivers.'",
    "flexgen-helm complete --model facebook/opt-30b --format openai batch.jsonl -o answers.jsonl",
)
_OF_OWN_FORMAT = (
    *("jsonl", "chat", "num_completions", "max_new_tokens", "temperature", "top_k", "top_p", "seed", "stop"),
)
"""Flags that a line of OpenAI's says for itself."""


def complete_parser() -> Parser:
    """The command line of `flexgen-helm complete`."""
    parser = Parser(
        prog="flexgen-helm complete",
        description=__doc__,
        epilog=_FORMAT,
        examples=EXAMPLES,
        texts=["stop", "served_model_name"],
        prompts=["prompts"],
    )
    model = parser.group("model")
    model.add_argument("--model", required=True, help="hub id, directory or GGUF file of the model")
    add_cluster_flags(model)
    asked = parser.group("prompts and sampling")
    asked.add_argument("prompts", nargs="*", metavar="PROMPT", help="prompts; alternatively --input")
    asked.add_argument(
        "-i", "--input", metavar="FILE", help="file with one prompt per line, or .jsonl; - is standard input"
    )
    asked.add_argument("--jsonl", action="store_true", help="read the input as JSONL, whatever its name")
    asked.add_argument(
        "--format",
        choices=("own", "openai"),
        default="own",
        help="format of input and output: own, as below (default), or OpenAI's batch files",
    )
    asked.add_argument(
        "--served-model-name", metavar="NAME", help="name of the model in bodies of --format openai (default: --model)"
    )
    asked.add_argument(
        "--chat", action="store_true", help="render every prompt as a user's message through the chat template"
    )
    asked.add_argument("--skip-bad", action="store_true", help="skip invalid prompts and run the others")
    asked.add_argument(
        "-n", "--num-completions", type=int, default=1, metavar="N", help="completions per prompt (default: 1)"
    )
    asked.add_argument(
        "--max-new-tokens",
        type=int,
        default=Settings.max_new_tokens,
        metavar="N",
        help="most tokens to generate (default: 64)",
    )
    asked.add_argument(
        "--temperature",
        type=float,
        default=Settings.temperature,
        metavar="T",
        help="sampling temperature; 0 is greedy (default: 0)",
    )
    asked.add_argument("--top-k", type=int, metavar="K", help="sample among the K most likely tokens")
    asked.add_argument(
        "--top-p",
        type=float,
        default=Settings.top_p,
        metavar="P",
        help="sample among tokens of total probability P (default: 1)",
    )
    asked.add_argument("--seed", type=int, metavar="N", help="seed of a prompt's first sample (default: random)")
    asked.add_argument(
        "--stop",
        action="append",
        default=[],
        metavar="TEXT",
        help=r"end completions before TEXT, in which \n is a new line; the flag may be repeated",
    )
    add_policy_flags(parser.group("policy", POLICY))
    output = parser.group("output")
    output.add_argument(
        "-o",
        "--output",
        type=Path,
        metavar="FILE",
        help="JSONL file to write, continued if it exists (default: standard output)",
    )
    output.add_argument("--debug", action="store_true", help="show tracebacks")
    return parser


def complete(arguments: Sequence[str]) -> int:
    """Complete the prompts of a command line; `EngineError` for bad input, `RunFailed` when some failed."""
    parser = complete_parser()
    args = parser.parse_args(arguments)
    spec = policy_from_flags(args)
    policy = Policy.load("auto" if spec is None else spec)
    check_cluster_flags(args)
    form = _format(args, parser)
    found = form.prompts()
    engine_processes.prepare()
    if problem := model_problem():
        raise InstallationError(problem)
    from engine.checkpoint.description import describe
    from engine.checkpoint.identity.result import Identity, identity_beside_weights, result_identity
    from engine.checkpoint.tokenizer import load_tokenizer
    from engine.text.prompt import PromptTokenizer

    description = describe(args.model)
    tokenizer = PromptTokenizer.of(load_tokenizer(Path(description.path)), description.window)
    questions, bad = form.questions(found, tokenizer, description.vocab_size)
    for prompt in bad[:_SHOWN]:
        print(f"{prompt.where}: {prompt.reason}", file=sys.stderr)
    if len(bad) > _SHOWN:
        print(f"and {len(bad) - _SHOWN} more", file=sys.stderr)
    if bad and not (args.skip_bad or form.skips_bad):
        raise ConfigError(
            f"{len(bad)} of {len(found)} prompts are invalid, the first: {bad[0].where}: {bad[0].reason}; "
            "correct them, or give --skip-bad to run the others"
        )
    if not questions and not form.skips_bad:
        raise ConfigError(f"none of the {len(found)} prompts is valid")
    beside = identity_beside_weights(args.model, policy)

    @cache
    def identity_of(weights: str | None) -> Identity:
        """By the digest of the weights that answer; None finds it here."""
        return result_identity(args.model, policy) if weights is None else {"weights": weights, **beside}

    def keys(weights: str | None) -> dict[Place, str]:
        return {question.place: question.key(identity_of(weights)) for question in questions}

    with Answers(args.output, form.form) as answers:
        record = AnswersRecord(answers.path)

        def begin(weights: str | None) -> dict[Place, str]:
            made = {"model": args.model, "policy": policy.as_mapping(), "identity": identity_of(weights)}
            record.write({**made, "settings": form.settings()}, goes_on=bool(done))
            return keys(weights)

        done = answers.resume(lambda: keys(None), lambda: record.what_differs(identity_of(None)))
        left = [question for question in questions if question.place not in done]
        for prompt in bad:
            answers.add(form.refusal(prompt))
        if left:
            use_cluster(args)
        failures = _ask(args, policy, left, begin, answers) if left else []
        answers.sort()
    if done:
        print(f"{len(done)} answers were there already", file=sys.stderr)
    if failures:
        again = "; the same command asks them again" if args.output else ""
        num_asked = sum(len(question.jobs) for question in left)
        raise RunFailed(f"{len(failures)} of {num_asked} requests failed, the first: {failures[0]}{again}")
    return 0


def _opened(model: str, policy: Policy, jobs: Sequence[Job]) -> RemoteEngine | HostsEngine:
    """The engine: of this machine, or of the cluster that is to be used."""
    if engine_processes.cluster is None:
        return engine_processes.load(model, policy)
    return engine_processes.spread(model, policy, None, jobs, 1.0)


def _format(args: Any, parser: Parser) -> Format:
    """The format of the command line."""
    if args.format == "openai":
        from flexgen_helm.commands.completion.openai_batch import OpenAIFormat

        return OpenAIFormat(args, {name: parser.get_default(name) for name in _OF_OWN_FORMAT})
    if args.served_model_name:
        raise ConfigError("--served-model-name is for --format openai; leave it out")
    return OwnFormat(args)


def _ask(
    args: Any,
    policy: Policy,
    left: Sequence[Question],
    begin: Callable[[str | None], dict[Place, str]],
    answers: Answers,
) -> list[str]:
    """Run what is left; returns a line for each failure.

    `begin` is called before the first answer is written, with the digest of the weights, and returns the keys.
    """
    jobs = [(question, at) for question in left for at in range(len(question.jobs))]
    asked = [question.jobs[at] for question, at in jobs]
    done: dict[Place, dict[int, Completion]] = {question.place: {} for question in left}
    failures, tokens = list[str](), 0
    progress = Progress()
    progress.begin("prompts" if args.input in (None, "-") else Path(args.input).name)
    progress(0, len(jobs), 0)
    try:
        with _opened(args.model, policy, asked) as engine:
            keys: dict[Place, str] = {}
            stream = engine.stream(asked)
            for number, (index, completion) in enumerate(stream, 1):
                keys = keys or begin(engine.weights_digest())  # all weights are read by the end of the first sweep
                question, at = jobs[index]
                found = done[question.place]
                found[at] = completion
                if completion.error is not None:
                    failures.append(f"{question.where}: {completion.error}")
                if len(found) == len(question.jobs):
                    ordered = [found[each] for each in range(len(found))]
                    answers.add(question.answer(ordered, keys[question.place]))
                    del done[question.place]
                tokens += len(question.jobs[at].prompt) + len(completion.tokens)
                progress(number, len(jobs), tokens)
    finally:
        throughput = progress.close()
        if progress.num_computed:
            print(throughput, file=sys.stderr)
    return failures
