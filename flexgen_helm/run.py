"""The command line `flexgen-helm COMMAND`; `python -m flexgen_helm.run` is its command `run`.

Exit codes: 0 done, 1 a run failed (or `doctor` found something broken), 2 bad input, which leaves nothing behind,
75 not finished because its time was up (--stop-before, SIGUSR1), 130 interrupted (Ctrl-C), 143 terminated (SIGTERM).
"""

from __future__ import annotations

import argparse
import atexit
import gc
import os
import sys
import traceback
from collections.abc import Sequence

from engine.workers.plain import plain
from flexgen_helm import __version__, engine_problem
from flexgen_helm.terminal.errors import RunFailed, UsageError
from flexgen_helm.terminal.parser import Parser
from flexgen_helm.terminal.plain_text import plain_output
from flexgen_helm.terminal.signals import NOT_FINISHED, heeding_signals

atexit.register(gc.freeze)  # else the interpreter looks through all of torch and HELM before it ends, for seconds

COMMANDS = {
    "demo": "run a real HELM scenario with a small real model",
    "run": "run HELM entries through the offloading engine; with no entries, the demo",
    "sweep": "run a whole suite as one job that can be stopped at any moment and resumed",
    "register": "write a model's HELM entries, so that plain helm-run can run it on the engine",
    "complete": "complete prompts of a file, as JSON lines; can be resumed",
    "serve": "serve an OpenAI-compatible HTTP endpoint",
    "bench": "time the engine on random weights of a real shape, compared with the machine's limits",
    "plan": "find the policy with the least estimated time for a workload, without running it",
    "check": "find out whether a model runs, what it needs, and whether a small copy equals plain transformers",
    "verify": "compare a sample of a run with plain transformers: log-probabilities, tokens, score",
    "compare": "compare a suite with a later one; exit code 1 if something is worse",
    "reproduce": "run a finished run again from its record; exit code 1 if something differs",
    "report": "write a suite's report.html and report.json: scores, speed, trends, failed runs",
    "lm-eval": "run lm-evaluation-harness, with the engine as its model `flexgen`",
    "doctor": "show what this machine has and what is missing",
    "completion": "print a completion script for bash, zsh, fish or tcsh",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    with plain_output(), heeding_signals() as signals:
        try:
            code = _main(arguments)
        except SystemExit:
            raise
        except BaseException as error:
            # What a signal has interrupted may raise something of its own.
            if signals.received is None and not isinstance(error, KeyboardInterrupt):
                raise
        else:
            if signals.received is None or code:
                return code
    end = {143: "terminated", NOT_FINISHED: "not finished, its time was up"}.get(signals.exit_code, "interrupted")
    return _complain(f"{end}; answers so far are kept, run the same command to continue", signals.exit_code)


def _main(arguments: list[str]) -> int:
    try:
        command, rest = _split(arguments)
        if command == "doctor":
            from flexgen_helm.commands.doctor import doctor

            return doctor(rest)
        if problem := engine_problem():
            raise UsageError(problem)
        return _run_command(command, rest)
    except UsageError as error:
        return _complain(error, 2)
    except MemoryError:
        if "--debug" in arguments:
            traceback.print_exc()
        return _complain("there is too little memory on the host, or a limit on it (ulimit -v) is too low; raise it", 1)
    except BrokenPipeError:  # whoever read the output has enough of it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def _split(arguments: list[str]) -> tuple[str, list[str]]:
    if arguments and arguments[0] in COMMANDS:
        return arguments[0], arguments[1:]
    width = max(map(len, COMMANDS))
    parser = Parser(
        prog="flexgen-helm",
        usage="flexgen-helm COMMAND ...    (COMMAND --help shows its flags)",
        description="\n".join(f"{name:<{width}}  {what}" for name, what in COMMANDS.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"flexgen-helm {__version__}")
    parser.add_argument("command", choices=list(COMMANDS), help=argparse.SUPPRESS)
    parser.parse_args(arguments or ["--help"])
    raise AssertionError("argparse ends for --help and --version, and refuses everything else")


def _run_command(command: str, rest: list[str]) -> int:
    from engine.errors import EngineError

    try:
        if command == "demo":
            from flexgen_helm.commands.first_steps.demo import demo

            return demo(rest)
        if command == "completion":
            from flexgen_helm.commands.first_steps.shell_completion import completion

            return completion(rest, COMMANDS)
        if command == "sweep":
            from flexgen_helm.commands.sweep import sweep

            return sweep(rest)
        if command == "register":
            from flexgen_helm.commands.register import register

            return register(rest)
        if command == "complete":
            from flexgen_helm.commands.complete import complete

            return complete(rest)
        if command == "serve":
            from flexgen_helm.commands.completion.serve import serve

            return serve(rest)
        if command == "plan":
            from flexgen_helm.commands.plan import plan

            return plan(rest)
        if command == "bench":
            from flexgen_helm.commands.bench import bench

            return bench(rest)
        if command == "check":
            from flexgen_helm.commands.check import check

            return check(rest)
        if command == "verify":
            from flexgen_helm.commands.verify import verify

            return verify(rest)
        if command == "compare":
            from flexgen_helm.commands.compare import compare

            return compare(rest)
        if command == "reproduce":
            from flexgen_helm.commands.reproduce import reproduce

            return reproduce(rest)
        if command == "report":
            from flexgen_helm.commands.report import report

            return report(rest)
        if command == "lm-eval":
            from flexgen_helm.commands.lm_eval import lm_eval

            return lm_eval(rest)
        from flexgen_helm.commands.run import run

        return run(rest)
    except (EngineError, RunFailed) as error:
        if "--debug" in rest:
            traceback.print_exc()
        return _complain(error, 1 if isinstance(error, RunFailed) else 2)


def _complain(message: object, code: int) -> int:
    print(f"flexgen-helm: error: {plain(' '.join(str(message).split()))}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main(["run", *sys.argv[1:]]))
