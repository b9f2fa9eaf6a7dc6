"""The ranks of one machine, started by the command line itself, as `torchrun` would start them."""

import logging
import os
import signal
import sys
import uuid

from mspc import ranks
from mspc.errors import InputError, MspcError
from mspc.threads import available

SECONDS_TO_END = 5
"""The time that a rank has to end when another one has failed."""


def launched(number: int | None) -> int | None:
    """Run this command again in `number` ranks; its exit code, or None for a process that does the work itself.

    Raises InputError for a number that cannot be, and MspcError if a rank is killed.
    """
    place = ranks.of_environment()
    if place.size > 1 and number not in (None, place.size):
        raise InputError(f"--ranks is {number}, and torchrun started {place.size}. Leave --ranks out.")
    if number is None or place.size > 1:
        return None
    ranks.check(number)
    return None if number == 1 else _launch(number)


def _launch(number: int) -> int:
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    logging.getLogger("torch.distributed").setLevel(logging.CRITICAL)  # about what is reported here
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, available() // number)))
    config = LaunchConfig(
        min_nodes=1, max_nodes=1, nproc_per_node=number, run_id=uuid.uuid4().hex, rdzv_backend="c10d",
        rdzv_endpoint="localhost:0", max_restarts=0, monitor_interval=0.1, shutdown_timeout=SECONDS_TO_END,
    )  # fmt: skip
    try:
        elastic_launch(config, sys.executable)("-m", "mspc", *sys.argv[1:])
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        codes = {other: one.exitcode for other, one in error.failures.items()}
        if spoken := [code for code in codes.values() if code > 0]:
            return int(failure.exitcode if failure.exitcode > 0 else spoken[0])
        # Those that are left when one is killed get SIGTERM.
        rank = next((other for other, code in codes.items() if code != -signal.SIGTERM), rank)
        raise MspcError(
            f"rank {rank} was ended by {signal.Signals(-codes[rank]).name}. Run the command again: "
            "`mspc compress` goes on with --resume."
        ) from error
    except SignalException as error:  # each rank has got it too, and the first one says so
        return 128 + int(error.sigval)
    return 0
