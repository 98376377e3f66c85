"""Object stores for tests: real servers of the two protocols on 127.0.0.1, with throwaway credentials.

S3 is moto's server, in a thread of the test; Azure Blob Storage is Azurite, a process (it comes by npm
and is optional). The drivers find address and credentials where their users put them: ``~/.aws`` and
``~/.config/fsspec`` of a home directory that exists for the test only.
"""

from __future__ import annotations

import base64
import json
import os
import secrets
import shutil
import signal
import subprocess
import threading
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from hsm_pool.provisioning.ports import free_ports
from tests.running_pool import ROOT, until

BUCKET = "backups"


class ObjectStore:
    """A running store.

    Args:
        url: Of the bucket or container.
        home: Home directory with the driver's own configuration.
        filesystem: The store as fsspec sees it, for looking and for doing harm.
    """

    def __init__(self, url: str, home: Path, filesystem: Any) -> None:
        self.url = url
        self.home = home
        self.filesystem = filesystem
        self.kill_at_next: tuple[str, int] | None = None
        self.written: list[str] = []

    def place(self) -> str:
        """Return the URL of an empty place."""
        return f"{self.url}/{uuid.uuid4().hex}"

    def path(self, place: str, name: str) -> str:
        """Return an object as the file system names it."""
        return f"{place.partition('://')[2]}/{name}"

    def names(self, place: str) -> list[str]:
        """Return the names of the objects in a place."""
        self.filesystem.invalidate_cache()
        try:
            found = self.filesystem.ls(place.partition("://")[2], detail=False)
        except FileNotFoundError:
            return []
        return sorted(path.rsplit("/", 1)[-1] for path in found)

    def environment(self) -> dict[str, str]:
        """Return the environment of a command that uses the store."""
        kept = {key: value for key, value in os.environ.items() if not key.startswith(("AWS_", "AZURE_"))}
        # Without it the driver asks an address outside this machine for credentials.
        return {**kept, "HOME": str(self.home), "AWS_EC2_METADATA_DISABLED": "true"}


Application = Callable[[dict[str, Any], Any], Iterable[bytes]]


@contextmanager
def s3(home: Path) -> Iterator[ObjectStore]:
    """Run moto's S3 server; a PUT can be made to kill the client when half of it has arrived."""
    pytest.importorskip("s3fs", reason="scripts/setup object-store was not run")
    server_module = pytest.importorskip("moto.server", reason="scripts/setup object-store was not run")
    import s3fs
    from werkzeug.serving import make_server

    application: Application = server_module.DomainDispatcherApplication(server_module.create_backend_app)
    made: list[ObjectStore] = []

    def watched(environ: dict[str, Any], respond: Any) -> Iterable[bytes]:
        name = environ["PATH_INFO"].rsplit("/", 1)[-1]
        if environ["REQUEST_METHOD"] == "PUT" and made:
            wanted, process_id = made[0].kill_at_next or ("", 0)
            if name == wanted:
                made[0].kill_at_next = None
                environ["wsgi.input"].read(int(environ["CONTENT_LENGTH"]) // 2)
                os.kill(process_id, signal.SIGKILL)
                raise ConnectionAbortedError
            made[0].written.append(name)
        return application(environ, respond)

    server = make_server("127.0.0.1", 0, watched, threaded=True)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        address = f"http://127.0.0.1:{server.server_port}"
        key_id, key = secrets.token_hex(10), secrets.token_hex(20)
        (home / ".aws").mkdir(parents=True)
        (home / ".aws" / "config").write_text(
            f"[default]\nregion = us-east-1\nendpoint_url = {address}\nmax_attempts = 1\n"
        )
        (home / ".aws" / "credentials").write_text(
            f"[default]\naws_access_key_id = {key_id}\naws_secret_access_key = {key}\n"
        )
        filesystem = s3fs.S3FileSystem(key=key_id, secret=key, endpoint_url=address, skip_instance_cache=True)
        filesystem.mkdir(BUCKET)
        made.append(ObjectStore(f"s3://{BUCKET}", home, filesystem))
        yield made[0]
    finally:
        server.shutdown()
        thread.join(10)
        server.server_close()


@contextmanager
def azure(home: Path) -> Iterator[ObjectStore]:
    """Run Azurite, if it is there: on PATH, or below .azurite/ (npm install --prefix .azurite azurite)."""
    pytest.importorskip("adlfs", reason="scripts/setup object-store was not run")
    import adlfs

    beside = ROOT / ".azurite" / "node_modules" / ".bin" / "azurite-blob"
    program = shutil.which("azurite-blob") or (str(beside) if beside.exists() else None)
    if program is None or shutil.which("node") is None:
        pytest.skip("azurite is not on this machine")
    (port,) = free_ports(1)
    key = base64.b64encode(secrets.token_bytes(64)).decode()
    options = ["--blobHost", "127.0.0.1", "--blobPort", str(port), "--inMemoryPersistence"]
    options += ["--skipApiVersionCheck", "--disableTelemetry", "--silent"]
    process = subprocess.Popen(
        [program, *options],
        env={**os.environ, "AZURITE_ACCOUNTS": f"tests:{key}"},
        cwd=home.parent,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        connection = (
            f"DefaultEndpointsProtocol=http;AccountName=tests;AccountKey={key};"
            f"BlobEndpoint=http://127.0.0.1:{port}/tests;"
        )
        (home / ".config" / "fsspec").mkdir(parents=True)
        (home / ".config" / "fsspec" / "azure.json").write_text(
            json.dumps({"abfs": {"connection_string": connection}})
        )
        until(lambda: _answers(port), 60, "an answer of azurite")
        filesystem = adlfs.AzureBlobFileSystem(connection_string=connection, skip_instance_cache=True)
        filesystem.mkdir(BUCKET)
        yield ObjectStore(f"abfs://{BUCKET}", home, filesystem)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait(10)


def _answers(port: int) -> bool:
    import socket

    try:
        socket.create_connection(("127.0.0.1", port), 1).close()
    except OSError:
        return False
    return True
