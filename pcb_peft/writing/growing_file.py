"""A file that is synced, and hashed, while it is written."""

import concurrent.futures
import hashlib
import os
from pathlib import Path

from pcb_peft.writing.targets import writing

_SYNCED_AT_ONCE = 64 << 20


class GrowingFile:
    """A new file that is synced and hashed while it is written, so that little is left to do at the end."""

    def __init__(self, path: Path) -> None:
        self._path = path
        with writing(path):
            self._stream = path.open("wb", buffering=0)
        self._thread = concurrent.futures.ThreadPoolExecutor(1)  # starts when there is work
        self._sync: concurrent.futures.Future[None] | None = None
        self._unsynced = 0
        self._digest, self._hashing = hashlib.sha256(), concurrent.futures.ThreadPoolExecutor(1)
        self._hashed: tuple[concurrent.futures.Future[None], object] | None = None

    def write(self, content: bytes | memoryview) -> None:
        """Append to the file.

        Raises:
            OutputError: The disk is full, or broken.
        """
        unwritten = memoryview(content).cast("B")
        self._wait_for_hash()
        self._hashed = self._hashing.submit(self._digest.update, unwritten), content
        self._unsynced += len(unwritten)
        with writing(self._path):
            while unwritten:
                unwritten = unwritten[self._stream.write(unwritten) :]
            if self._unsynced >= _SYNCED_AT_ONCE and self._is_synced():
                self._sync = self._thread.submit(os.fsync, self._stream.fileno())
                self._unsynced = 0

    def sha256(self) -> str:
        """Return the SHA-256 of what has been written, in hexadecimal digits."""
        self._wait_for_hash()
        return self._digest.hexdigest()

    def __enter__(self) -> "GrowingFile":
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.shutdown()
        self._hashing.shutdown()
        with writing(self._path):
            self._stream.close()
            self._is_synced()

    def _is_synced(self) -> bool:
        """Return whether the last sync is done; raise its error."""
        return self._sync is None or (self._sync.done() and self._sync.result() is None)

    def _wait_for_hash(self) -> None:
        """Wait for the hash of the last content, whose memory is then freed by the thread that made it."""
        if self._hashed is not None:
            self._hashed[0].result()
            self._hashed = None
