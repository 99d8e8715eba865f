"""Ray cluster: checks of its import and its resources, and the connection to it."""

from __future__ import annotations

import logging
import os
import signal
import threading
from collections.abc import Mapping
from typing import Any

from diffes.config import RunConfig, WorkerOptions
from diffes.errors import DiffesError


def check_asynchronous(config: RunConfig, options: WorkerOptions) -> None:
    """Raise if an asynchronous search has a single worker and no shared study.

    Raises:
        DiffesError: the search is asynchronous, with one worker and no study to share.
    """
    if config.asynchronous and config.study is None and options.workers == 1:
        raise DiffesError(
            "asynchronous needs several workers, and workers is 1. Set workers to 2 or more, share a --study, or leave "
            "asynchronous out."
        )


def are_here(options: WorkerOptions) -> bool:
    """Check whether there are several workers, all on this machine, so that they see its files."""
    if options.workers == 1 or options.ray_address is not None:
        return False
    ray = the_ray()
    return not ray.is_initialized() or sum(node["Alive"] for node in ray.nodes()) == 1


def the_ray() -> Any:
    """Import Ray, which is an optional dependency.

    Raises:
        DiffesError: Ray does not import.
    """
    try:
        import ray
    except ImportError as error:
        raise DiffesError(
            'several workers need Ray, which cannot be imported. Run pip install "diffes[ray]", or set workers to 1.'
        ) from error
    return ray


def connect(ray: Any, options: WorkerOptions) -> None:
    """Join the cluster in the options, or start one on this machine.

    Raises:
        DiffesError: there is no such cluster.
    """
    for name, value in {"RAY_USAGE_STATS_ENABLED": "0", "RAY_worker_niceness": "0"}.items():  # no usage reports
        os.environ.setdefault(name, value)
    of_ours = {"include_dashboard": False} if options.ray_address is None else {}
    before = signal.getsignal(signal.SIGTERM)
    try:
        address = options.ray_address or "local"
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR, **of_ours)
    except Exception as error:
        where = "on this machine" if options.ray_address is None else f"at {options.ray_address}"
        reason = " ".join(str(error).split())[:200]
        raise DiffesError(
            f"there is no Ray cluster {where} ({type(error).__name__}: {reason}). Start one with `ray start --head`."
        ) from error
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, before)  # Ray's own handler would call `sys.exit`


def check_room(there: Mapping[str, float], each: Mapping[str, float], workers: int) -> None:
    """Raise if there are more workers than the cluster has resources for.

    Args:
        there: resources of the cluster, by name.
        each: resources that each worker takes, by name.
        workers: number of workers.

    Raises:
        DiffesError: the workers need more of a resource than the cluster has.
    """
    for name, wanted in each.items():
        if wanted * workers > there.get(name, 0.0):
            raise DiffesError(
                f"{workers} workers with {wanted:g} {name} each need more than the {there.get(name, 0):g} {name} of "
                f"the Ray cluster. Use fewer workers{', or lower gpus_per_worker' if name == 'GPU' else ''}."
            )
