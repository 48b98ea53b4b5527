"""Reading what is needed next while the machine is busy with what is needed now."""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor

from torch import Tensor

from zq.checkpoint.reader import Read


class Prefetch:
    """A `Read` that can be told what it will be asked for.

    Tensors that were expected are read in a thread, into main memory, and handed out once; every other name
    is read when it is asked for. An error of the thread is raised where its tensors are asked for. At the end
    of the `with` nothing more is read.
    """

    def __init__(self, read: Read) -> None:
        self._read = read
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="zq-prefetch")
        self._coming: set[str] = set()
        self._result: Future[dict[str, Tensor]] | None = None

    def __enter__(self) -> Prefetch:
        return self

    def __exit__(self, *error: object) -> None:
        self._pool.shutdown(cancel_futures=True)

    def expect(self, names: Iterable[str]) -> None:
        """Begin to read these; what was expected before and never asked for is dropped."""
        self._coming = set(names)
        self._result = self._pool.submit(self._read, sorted(self._coming)) if self._coming else None

    def __call__(self, names: Iterable[str]) -> dict[str, Tensor]:
        names = list(names)
        tensors: dict[str, Tensor] = {}
        if self._result is not None and not self._coming.isdisjoint(names):
            held = self._result.result()
            tensors = {name: held.pop(name) for name in names if name in held}
            self._coming -= tensors.keys()
        rest = [name for name in names if name not in tensors]
        return tensors | (self._read(rest) if rest else {})
