"""The flags of commands that can run a model on a Ray cluster; loads Ray only if they are given."""

from __future__ import annotations

import argparse

from engine.errors import ConfigError
from flexgen_helm.workers.cluster.connection import check_address
from flexgen_helm.workers.cluster.slots import Wanted
from flexgen_helm.workers.engine_processes import engine_processes


def add_cluster_flags(group: argparse._ActionsContainer) -> None:
    """Add the flags that `use_cluster` reads."""
    group.add_argument(
        "--ray",
        nargs="?",
        const="",
        metavar="ADDRESS",
        help="run the model on a Ray cluster: host:port, auto, or local (RAY_ADDRESS, else a cluster started here)",
    )
    group.add_argument("--workers", type=int, metavar="N", help="number of workers (default: one per machine)")
    group.add_argument(
        "--gpus-per-worker", type=int, metavar="K", help="GPUs per worker; 0: CPUs (default: all of a machine)"
    )
    group.add_argument("--no-wait", action="store_true", help="end at once if the cluster has no room for all workers")


def check_cluster_flags(args: argparse.Namespace) -> None:
    """Raise `ConfigError` for invalid flags, or an address where nothing listens; loads no Ray."""
    if args.ray is None:
        for name in ("workers", "gpus_per_worker", "no_wait"):
            if getattr(args, name) is not None and getattr(args, name) is not False:
                raise ConfigError(f"--{name.replace('_', '-')} is for --ray; give that too")
    Wanted(workers=args.workers, gpus_per_worker=args.gpus_per_worker).check()
    if args.ray is not None:
        check_address(args.ray)


def use_cluster(args: argparse.Namespace) -> None:
    """Connect to the cluster, or start it, so that later engines are opened there; does nothing without `--ray`.

    Raises `EngineError` if that fails, or if there is no room and `--no-wait` is given.
    """
    check_cluster_flags(args)
    if args.ray is not None:
        from flexgen_helm.workers.cluster.ray_cluster import RayCluster

        wanted = Wanted(workers=args.workers, gpus_per_worker=args.gpus_per_worker)
        engine_processes.cluster = RayCluster(args.ray, wanted, wait=not args.no_wait)
