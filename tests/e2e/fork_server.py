"""Imports Corolla once; each command is then a fork of this process, at no cost for its imports.

Started as `python -P fork_server.py SOCKET`; tests/e2e/forked.py speaks to it. A command has its
own arguments, folder, environment, standard streams, process id and end, as one that is started
cold; so has each process of a deployment, ours and Flower's. Two things are left out, which are
most of the time of a short run: answers are of few tokens, and the charts of a run's report are not
rendered. Where SMALL is in its environment, a run is small besides. The server ends when its
standard input does.
"""

import atexit
import gc
import importlib
import json
import os
import resource
import runpy
import select
import signal
import socket
import sys
import threading
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

PRELOADED = (
    "corolla.commands.simulate.in_process",
    "corolla.commands.simulate.progress",
    "corolla.commands.compare.compare",
    "corolla.commands.check.proofs",
    "corolla.commands.audit.run",
    "corolla.commands.plan.plan",
    "corolla.commands.artefacts",
    "corolla.evaluation.reader",
    "corolla.trackers",
    "corolla.server.app",
    "corolla.server.gateway.daemon",
    "corolla.commands.gateway",
    "corolla.client.device.daemon",
    "corolla.client.device.node",
    "corolla.client.device.relay",
    "corolla.client.phone.trainer",
    "flwr.cli.build",
    "flwr.supercore.cli",
    "flwr.superlink.cli",
    "flwr.supernode.cli",
    "matplotlib.backends.backend_agg",
    "matplotlib.backends.backend_svg",
    "matplotlib.figure",
)
SMALL = "COROLLA_TESTS_SMALL"
"""Variable of the environment that makes the runs of a command small, see `_smaller`."""
MOST = {"local_steps": 2}
"""Key → its largest value in a small run, whatever is asked for."""
DEFAULTS = {"max_length": 64, "eval_examples": 8, "eval_clients": 2, "eval_client_examples": 2}
"""Key → its value in a small run that does not say another."""
ANSWER_TOKENS = 2
"""Tokens in which a run answers its held-out rows, in forks and in the process of the tests."""


def serve(path: str, told: dict[str, str]) -> NoReturn:
    """Fork a command for each connection until standard input ends.

    `told` is what the imports have put into the environment where nothing was said.
    """
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.bind(path)
    listener.listen(64)
    print("ready", flush=True)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for those who wait for commands
    while True:
        ready, _, _ = select.select([listener, sys.stdin], [], [])
        if sys.stdin in ready:
            os._exit(0)  # nothing of this process is worth tidying up
        connection, _ = listener.accept()
        if os.fork() == 0:
            listener.close()
            _attend(connection, told)
        connection.close()


def _attend(connection: socket.socket, told: dict[str, str]) -> NoReturn:
    """Run one command: says its process id, sends on signals, says its exit code.

    Whoever asked and is gone, killed, takes the command along.
    """
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    size, streams, _, _ = socket.recv_fds(connection, 8, 3)
    order = json.loads(_read(connection, int.from_bytes(size, "big")))
    order["environment"] = {**told, **order["environment"]}
    command = os.fork()
    if command == 0:
        connection.close()
        for number, stream in enumerate(streams):
            os.dup2(stream, number)
            os.close(stream)
        _become(order)
    for stream in streams:
        os.close(stream)
    connection.sendall(f"{command}\n".encode())
    threading.Thread(target=_send_on, args=(connection, command), daemon=True).start()
    code = os.waitstatus_to_exitcode(os.waitpid(command, 0)[1])
    connection.sendall(f"{code}\n".encode())
    os._exit(0)


def _send_on(connection: socket.socket, command: int) -> None:
    """Signals that arrive as bytes; the end of the connection kills."""
    with suppress(ProcessLookupError):  # it has ended by itself
        while number := connection.recv(1):
            os.kill(command, number[0])
        os.kill(command, signal.SIGKILL)


def _read(connection: socket.socket, size: int) -> bytes:
    content = b""
    while len(content) < size:
        part = connection.recv(size - len(content))
        if not part:
            os._exit(1)
        content += part
    return content


def _become(order: dict[str, Any]) -> NoReturn:
    """Run a module or code, as `python -m` and `-c` do, and end as an interpreter does."""
    import torch
    from flwr.supercore.logger import update_console_handler

    from corolla.evaluation import other_process

    # torch makes its pool of threads anew at its first use after a fork, and not safely when two
    # threads are the first: models are loaded by several.
    torch.set_num_threads(torch.get_num_threads())

    os.chdir(order["folder"])
    os.environ.clear()
    os.environ.update(order["environment"])
    if level := os.environ.get("FLWR_LOG_LEVEL"):  # which Flower has read when it was imported
        update_console_handler(level=level)
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    sys.argv = [order["module"] or "-c", *order["arguments"]]
    sys.executable = order["python"]
    other_process.command = lambda: [order["reader"], "-m", "corolla.evaluation.reader"]
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if SMALL in order["environment"]:
        from corolla.config import load

        load._gather = _smaller(load._gather)
    if order["largest_file"]:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # an error instead, as of a full disk
        resource.setrlimit(resource.RLIMIT_FSIZE, (order["largest_file"], resource.RLIM_INFINITY))
    code: Any = 0
    try:
        if order["module"] == "corolla":
            from corolla.cli.app import app

            app()
        elif order["code"]:
            exec(order["code"], {"__name__": "__main__"})
        else:
            sys.modules.pop(order["module"], None)  # it begins anew, as __main__
            runpy.run_module(order["module"], run_name="__main__", alter_sys=True)
    except SystemExit as end:
        code = end.code or 0
    except BaseException:  # noqa: BLE001 - said as an interpreter says it
        traceback.print_exc()
        code = 1
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(code if isinstance(code, int) else 1)


def _smaller(gather: Callable[..., dict[str, Any]]) -> Callable[..., dict[str, Any]]:
    """What a run is given, with fewer steps, shorter sequences and fewer examples to evaluate."""

    def gathered(*given: Any) -> dict[str, Any]:
        found = gather(*given)
        capped = {key: min(most, found.get(key, most)) for key, most in MOST.items()}
        return {**DEFAULTS, **found, **capped}

    return gathered


def _drawn(draw: Callable[[Any], None], height: float = 3.4) -> str:
    """A chart of all that a run has to show, which nobody sees."""
    from matplotlib.figure import Figure

    draw(Figure().subplots())
    return "<svg></svg>"


def main() -> None:
    """Import, see that this process may be forked, serve."""
    gc.disable()  # nothing of what is imported is garbage, and forks share it with nobody looking
    given = dict(os.environ)
    importlib.import_module("corolla.cli.app")
    for name in PRELOADED:
        importlib.import_module(name)
    import torch

    from corolla.server.runs import evaluate, report

    evaluate._ANSWER_TOKENS = ANSWER_TOKENS
    report._svg = _drawn
    torch.set_num_threads(1)
    gc.freeze()
    gc.enable()
    threads = len(list(Path("/proc/self/task").iterdir()))
    if threads != 1:
        raise SystemExit(f"{threads} threads after the imports: a fork would lose all but one")
    serve(sys.argv[1], {k: v for k, v in os.environ.items() if k not in given})


if __name__ == "__main__":
    main()
