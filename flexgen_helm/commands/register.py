"""`flexgen-helm register`: writes a model's HELM entries, so that plain helm-run can run it on the engine."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from engine.errors import InstallationError
from flexgen_helm.runs.flags import (
    add_length_flag,
    add_memory_flags,
    add_shaping_flags,
    policy_from_flags,
    shaping_from_flags,
)
from flexgen_helm.terminal.footprint import Footprint
from flexgen_helm.terminal.installation import model_problem
from flexgen_helm.terminal.parser import Parser

EXAMPLES = (
    "flexgen-helm register facebook/opt-30b --policy opt-30b-t4",
    "flexgen-helm register ./my-model --name local/my-model --gpu-memory 16GB --cpu-memory 48GB",
)


def register_parser() -> Parser:
    """The command line of `flexgen-helm register`."""
    parser = Parser(prog="flexgen-helm register", description=__doc__, examples=EXAMPLES)
    model = parser.group("model")
    model.add_argument("model", metavar="MODEL", help="hub id, directory or GGUF file of the model")
    model.add_argument("--name", help="HELM's name for the model, organization/model (default: from MODEL)")
    add_length_flag(model)
    add_shaping_flags(model)
    policy = parser.group("policy", "written into the deployment; the limits override what --policy says")
    policy.add_argument("--policy", default="auto", help="a shipped policy's name, a YAML file, or auto (default)")
    add_memory_flags(policy)
    output = parser.group("output")
    output.add_argument(
        "--local-path", default="prod_env", metavar="DIR", help="HELM's --local-path (default: prod_env)"
    )
    output.add_argument("--debug", action="store_true", help="show tracebacks")
    return parser


def register(arguments: Sequence[str]) -> int:
    """Write the entries and say how to use them; `EngineError` for bad input."""
    args = register_parser().parse_args(arguments)
    policy = policy_from_flags(args) or "auto"
    Footprint().watch([args.local_path])
    if problem := model_problem():
        raise InstallationError(problem)
    from flexgen_helm.runs.registration import entries_for, merge_into_local_path

    entries = entries_for(
        args.model,
        name=args.name,
        policy=policy,
        max_sequence_length=args.max_sequence_length,
        **shaping_from_flags(args),
    )
    for notice in merge_into_local_path(entries, args.local_path):
        print(f"flexgen-helm: {notice}", file=sys.stderr)
    names = f"model={entries.model.name},model_deployment={entries.deployment.name}"
    where = "" if args.local_path == "prod_env" else f" --local-path {args.local_path}"
    print(f"in {args.local_path}; run it with, for example:")
    print(
        f"  helm-run -r mmlu:subject=anatomy,{names} -m 10 --suite first{where}"
        " --runner-class-name flexgen_helm.runner.FlexGenRunner"
    )
    return 0
