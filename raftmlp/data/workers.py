"""The processes that load images: how many, and how they end."""

import multiprocessing
import os
import signal

__all__ = ["default_workers", "ignore_signals", "kill_workers", "processor_count"]


def processor_count() -> int:
    """Return how many processors this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def default_workers() -> int:
    """Return how many processes load images: up to 8, as many as there are processors for each process that trains."""
    return max(1, min(8, processor_count() // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))


def ignore_signals(_worker: int) -> None:
    """Let a worker outlive a SIGTERM or Ctrl-C that is sent to the whole group, so that its parent can save."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def kill_workers() -> None:
    """Kill the workers that are left when a command ends: they ignore the SIGTERM that Python would send them."""
    number = getattr(signal, "SIGCHLD", None)  # Windows has none
    handler = number and signal.signal(number, signal.SIG_DFL)  # torch takes a killed worker for a failure
    workers = multiprocessing.active_children()
    for worker in workers:
        worker.kill()
    for worker in workers:
        worker.join()
    if number:
        signal.signal(number, handler or signal.SIG_DFL)
