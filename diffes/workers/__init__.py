"""Calibration, evaluations and whole cells on many workers: processes of Ray, each with the model and the bank.

If single evaluations are spread, strategy, store and counting stay in the process that searches.
"""

from diffes.workers.cluster import are_here, check_asynchronous
from diffes.workers.pool import Pool, pool_of
from diffes.workers.worker import NAMED, CausedError, Worker

__all__ = ["NAMED", "CausedError", "Pool", "Worker", "are_here", "check_asynchronous", "pool_of"]
