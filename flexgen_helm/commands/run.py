"""`flexgen-helm run`: HELM entries through the offloading engine; with no entries, the demo."""

from __future__ import annotations

from collections.abc import Sequence

from flexgen_helm.runs.flags import add_stop_flag, names_entries, parse_run_flags, run_parser
from flexgen_helm.terminal.deadline import Deadline
from flexgen_helm.workers.engine_processes import engine_processes


def run(arguments: Sequence[str]) -> int:
    """Run the entries of a command line, or the demo; `EngineError` for bad input, `RunFailed` for a failed run."""
    parser = run_parser()
    add_stop_flag(parser)
    args = parse_run_flags(arguments, parser)
    if not args.dry_run:
        engine_processes.prepare()
    from flexgen_helm.helm.scores import table
    from flexgen_helm.runs import assets, demo
    from flexgen_helm.runs.command_line_runner import CommandLineRunner
    from flexgen_helm.runs.launch import carry_out

    is_demo = not names_entries(args)
    if is_demo:
        args.output_path, args.conf_paths = args.output_path or demo.OUTPUT_PATH, ["demo"]
        needed = assets.to_fetch(with_model=not (args.model or args.models_to_run))
        print(*demo.announcement(needed, assets.cache_directory()), sep="\n", flush=True)
    with Deadline(args.stop_before, lambda: CommandLineRunner.longest_pass_s):
        carry_out(args, is_demo=is_demo, show=demo.told if is_demo else table)
    if is_demo:
        print(demo.NEXT)
    return 0
