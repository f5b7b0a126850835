"""`flexgen-helm run`: HELM entries through the offloading engine; with no entries, the demo."""

from __future__ import annotations

from collections.abc import Sequence

from flexgen_helm.runs.flags import names_entries, parse_run_flags


def run(arguments: Sequence[str]) -> int:
    """Run the entries of a command line, or the demo; `EngineError` for bad input, `RunFailed` for a failed run."""
    args = parse_run_flags(arguments)
    from flexgen_helm.runs import demo
    from flexgen_helm.runs.launch import carry_out

    is_demo = not names_entries(args)
    if is_demo:
        args.output_path, args.conf_paths = args.output_path or demo.OUTPUT_PATH, ["demo"]
    carry_out(args, is_demo=is_demo)
    if is_demo:
        print(demo.NEXT)
    return 0
