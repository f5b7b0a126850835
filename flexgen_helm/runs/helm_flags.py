"""HELM's own flags and defaults, copied here because importing HELM's parser would import all of HELM."""

from __future__ import annotations

import argparse


def add_helm_flags(group: argparse._ActionsContainer) -> None:
    """Add HELM's flags that `run_parser` does not add to other groups."""
    for flag, metavar, what in (
        ("--models-to-run", "MODEL", "run entries that name no model for these models; skip entries of other models"),
        ("--groups-to-run", "GROUP", "only entries of these groups (default: all)"),
        ("--plugins", "PLUGIN", "modules or files that register run entries, scenarios or models of your own"),
    ):
        group.add_argument(flag, nargs="+", metavar=metavar, help=what)
    group.add_argument("--priority", type=int, metavar="N", help="only entries of at most this priority (default: all)")
    group.add_argument("--run-specs", nargs="*", default=[], metavar="ENTRY", help="HELM's older name for -r")
    for flag, metavar, what in (
        ("--enable-huggingface-models", "MODEL", "hub models to run by HELM's own client"),
        ("--enable-local-huggingface-models", "DIR", "model directories to run by HELM's own client"),
    ):
        group.add_argument(flag, nargs="+", default=[], metavar=metavar, help=what)
    group.add_argument("-n", "--num-threads", type=int, default=4, metavar="N", help="threads of HELM (default: 4)")
    group.add_argument(
        "-t", "--num-train-trials", type=int, metavar="N", help="number of draws of in-context examples per run"
    )
    group.add_argument(
        "--local-path",
        default="prod_env",
        metavar="DIR",
        help="directory of HELM's configuration and cache (default: prod_env)",
    )
    group.add_argument("--mongo-uri", default="", metavar="URI", help="keep the cache in this MongoDB")
    for flag, what in (
        ("--disable-cache", "neither read nor write the request cache"),
        ("--exit-on-error", "stop at the first run that fails"),
        ("--skip-completed-runs", "skip runs whose files are complete"),
        ("--skip-instances", "stop before instances are made"),
        ("--cache-instances", "write the instances of each scenario to a file, or read them from it"),
        ("--cache-instances-only", "write the instances of each scenario, and do nothing else"),
    ):
        group.add_argument(flag, action="store_true", help=what)
    group.add_argument("-d", "--dry-run", action="store_true", help="make the requests, but do not execute them")
    group.add_argument("--runner-class-name", metavar="CLASS", help="use this runner instead of flexgen-helm's")
    group.add_argument("--log-config", metavar="FILE", help="YAML file with the configuration of HELM's logging")
    group.add_argument("--server-url", metavar="URL", help="HELM proxy server that answers the requests")
    group.add_argument(
        "--api-key-path", default="proxy_api_key.txt", metavar="FILE", help="file with the key of that server"
    )
