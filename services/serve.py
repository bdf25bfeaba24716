"""`kvsluice serve`: brings the fleet up on this machine, waits for a signal, drains and stops."""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import sys
import threading
from types import FrameType

from ..errors import KvsluiceError
from .config import ServeConfig
from .security import with_fleet_tokens

WORKER_ENVIRONMENT = {
    # caches come and go: with segments of fixed size much of the memory can end up between them
    "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",
    # idle threads of one worker must not spin while another one computes
    "OMP_WAIT_POLICY": "PASSIVE",
}
_RAY_ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_AUTH_MODE": "token",
    # makes Ray take the loopback address for its own; every server of it then listens there and nowhere else
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    # the workers are what this machine is for; Ray would lower their priority
    "RAY_worker_niceness": "0",
    # workers that take no GPU keep the environment's choice of devices
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}

EXIT_OK = 0
EXIT_FAILED = 1
EXIT_KILLED = 130


def prepare_environment() -> None:
    """Set what a Ray of our own and the workers read from the environment, unless it is set. Comes before Ray is first
    imported, because Ray reads its settings then."""
    for name, value in (_RAY_ENVIRONMENT | WORKER_ENVIRONMENT).items():
        os.environ.setdefault(name, value)
    if "RAY_AUTH_TOKEN_PATH" not in os.environ:
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))


def run(config: ServeConfig) -> int:
    """Serve until SIGTERM or SIGINT. Returns the process's exit status.

    The first signal takes the service out of rotation and lets running requests finish for `grace_s`; a second one
    ends everything at once.

    Raises:
        KvsluiceError: the service could not start.
    """
    prepare_environment()
    from .one_machine import Fleet

    fleet = Fleet(with_fleet_tokens(config))
    stop = threading.Event()

    def on_signal(number: int, frame: FrameType | None) -> None:
        if stop.is_set():
            fleet.kill()
            # the signal may have come in the middle of a print, which cannot be entered again
            os.write(sys.stderr.fileno(), b"kvsluice: stopped at once\n")
            os._exit(EXIT_KILLED)
        stop.set()

    _handle(on_signal)
    try:
        _say(f"starting {config.model_name} …")
        if not fleet.start(stop.is_set, lambda: _handle(on_signal)):
            return EXIT_OK
        scheme = "http" if config.tls_cert_file is None else "https"
        also = f" and {scheme}://{fleet.http_address}/v1" if fleet.http_address else ""
        print(f"kvsluice: serving {config.model_name} on {fleet.address}{also} ({_describe(config)})", flush=True)
        failure = fleet.watch(stop, _say)
        if failure is not None:
            _say(f"{failure}; the service stops")
            fleet.shutdown()
            # Ray's exit handlers would wait for what is gone
            os._exit(EXIT_FAILED)
        _say(f"stopping; running requests may take {config.grace_s:g} s more (signal again to stop now)")
        drained = fleet.drain()
        _say("stopped" if drained else "stopped; the gateway did not answer in time")
        return EXIT_OK if drained else EXIT_FAILED
    except KvsluiceError:
        stop.set()
        raise
    except SystemExit:
        # how Ray's own handler answers a SIGTERM while Ray starts
        return EXIT_OK
    finally:
        fleet.shutdown()


def _handle(on_signal: signal.Handlers | object) -> None:
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, on_signal)  # type: ignore[arg-type]


def _say(line: str) -> None:
    # a full disk, or a terminal that is gone, is no reason to stop
    with contextlib.suppress(OSError):
        print(f"kvsluice: {line}", file=sys.stderr, flush=True)


def _describe(config: ServeConfig) -> str:
    if config.role == "both":
        num = max(config.prefill_workers, config.decode_workers)
        return f"{num} worker{'s' if num > 1 else ''} of both roles"
    return f"{config.prefill_workers} prefill, {config.decode_workers} decode"
