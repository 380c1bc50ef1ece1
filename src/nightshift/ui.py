"""`nightshift ui [--host H] [--port N] [tracking.uri=...]`: the MLflow page on the right store.

Job execution is off: with it MLflow starts ten processes and takes 2.4 GB instead of 0.5.
"""

import argparse
import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

from nightshift.fixed.config import ConfigError
from nightshift.fixed.tracking import VIEW, database_path, load_tracking, open_store, store_uri

START_LIMIT_S = 90


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="nightshift ui", description=__doc__.splitlines()[0])
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (%(default)s)")
    parser.add_argument("--port", type=int, default=5000, help="first port to try (%(default)s)")
    parser.add_argument("overrides", nargs="*", help="tracking.uri=... or tracking.experiment=...")
    parser.error = lambda message: parser.exit(2, f"{parser.prog}: {message}\n")  # one line
    args = parser.parse_args(argv)
    try:
        return show(args.host, args.port, args.overrides)
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 1


def show(host: str, port: int, overrides: list[str]) -> int:
    tracking = load_tracking(overrides)
    uri = store_uri(tracking)
    database = database_path(uri)
    if database is not None and not database.exists():
        raise ConfigError(f"no runs yet ({database}). Run: nightshift study")
    store = open_store(tracking)  # also closes runs whose owner is gone
    if uri.startswith("http"):
        print(page(uri.rstrip("/"), store.experiment_id))
        return 0
    if not 0 < port < 65536:
        raise ConfigError(f"--port ({port}): must be 1 to 65535")
    port = free_port(host, port)
    return serve(uri, database.parent if database else Path.cwd(), host, port, store.experiment_id)


def page(address: str, experiment_id: str) -> str:
    """The runs table with our saved view; `workflowType` skips the page for chat models."""
    return (
        f"{address}/#/experiments/{experiment_id}/runs"
        f"?workflowType=machine_learning&viewStateShareKey={VIEW}"
    )


def free_port(host: str, first: int) -> int:
    for port in range(first, min(first + 100, 65536)):
        with contextlib.closing(socket.socket()) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((host, port))
            except OSError as error:
                if error.errno not in (98, 48, 13):  # in use (Linux, macOS), privileged
                    raise ConfigError(f"--host ({host}): {error.strerror or error}") from None
                continue
            return port
    raise ConfigError(f"--port ({first}): it and the 99 after it are in use")


def serve(uri: str, folder: Path, host: str, port: int, experiment_id: str) -> int:
    """Run the server in its own process group until Ctrl-C or SIGTERM; then end all of it."""
    command = [
        sys.executable,
        "-m",
        "mlflow",
        "server",
        "--backend-store-uri",
        uri,
        "--artifacts-destination",
        str(folder / "artifacts"),
        "--host",
        host,
        "--port",
        str(port),
        "--workers",
        "1",
    ]
    log = folder / "server.log"
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with open(log, "w") as output:
        server = subprocess.Popen(
            command,
            cwd=folder,
            stdout=output,
            stderr=output,
            start_new_session=True,
            env={**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},
        )
    try:
        wait_until_ready(f"http://{host}:{port}/health", server, log)
        print(f"MLflow on {uri}")
        print(page(f"http://{host}:{port}", experiment_id))
        print("Ctrl-C stops it.", flush=True)
        server.wait()
        raise ConfigError(f"the MLflow server ended by itself; see {log}")
    except KeyboardInterrupt:
        return 0
    finally:
        stop(server)


def wait_until_ready(address: str, server: subprocess.Popen, log: Path) -> None:
    deadline = time.monotonic() + START_LIMIT_S
    while time.monotonic() < deadline and server.poll() is None:
        with contextlib.suppress(urllib.error.URLError, ConnectionError, TimeoutError):
            urllib.request.urlopen(address, timeout=2).close()
            return
        time.sleep(0.2)
    raise ConfigError(f"the MLflow server did not start within {START_LIMIT_S} s; see {log}")


def stop(server: subprocess.Popen) -> None:
    """The whole group: its workers outlive their parent by seconds."""
    for number, patience_s in ((signal.SIGTERM, 5), (signal.SIGKILL, 5)):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(server.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            server.wait(patience_s)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
