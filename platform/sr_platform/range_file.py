"""A file in storage as a seekable Python file over range reads, for libraries that want one (zipfile, tarfile, ...)."""

from __future__ import annotations

import io

from sr_platform.storage import Storage


class RangeFile(io.RawIOBase):
    """Reads through one window, fetched by one request; small reads near each other cost nothing more.

    `failure` keeps what storage raised: libraries in C turn it into an error of their own.
    """

    def __init__(self, storage: Storage, name: str, size_bytes: int, *, window_bytes: int = 64 * 1024) -> None:
        self._storage, self._name, self._size_bytes, self._window_bytes = storage, name, size_bytes, window_bytes
        self._position = 0
        self._window_start, self._window = 0, b""
        self.failure: Exception | None = None

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size_bytes}[whence]
        if base + offset < 0:
            raise OSError(f"byte {base + offset} of {self._name} does not exist")
        self._position = base + offset
        return self._position

    def fetch(self, start: int, end: int) -> None:
        """Makes bytes `start` to `end` the window, in one request."""
        try:
            self._window = self._storage.read_range(self._name, start, min(end, self._size_bytes))
        except Exception as error:
            self.failure = error
            raise
        self._window_start = start

    def read(self, size: int | None = -1) -> bytes:
        wanted = self._size_bytes if size is None or size < 0 else size
        end = min(self._position + wanted, self._size_bytes)
        if end <= self._position:
            return b""
        if not self._window_start <= self._position <= end <= self._window_start + len(self._window):
            self.fetch(self._position, max(end, self._position + self._window_bytes))
        start = self._position - self._window_start
        data = self._window[start : start + end - self._position]
        self._position += len(data)
        return data

    def readinto(self, buffer: bytearray | memoryview) -> int:  # type: ignore[override]
        data = self.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)
