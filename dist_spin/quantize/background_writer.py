"""Files that are written while the next layer is worked on."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType

import torch

from dist_spin.runtime.progress import warn


class BackgroundWriter:
    """One thread that writes one thing at a time; on CUDA its copies lie on a stream of their own.

    To be used in a `with` block, which ends only when the thread is done, and raises what nobody has waited for; where another
    error ends the block, it is told in a line. Whoever holds the tensors of an action must not
    change them in place until `finish` has returned.
    """

    def __init__(self, device: torch.device) -> None:
        """device: where the tensors lie that are written."""
        self._pool = ThreadPoolExecutor(1, "writer")
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._device = device
        self._pending: Future[None] | None = None

    def __enter__(self) -> "BackgroundWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool.shutdown()
        pending, self._pending = self._pending, None
        failed = None if pending is None else pending.exception()
        if failed is not None and error is None:
            raise failed
        if failed is not None:
            warn(f"what was written meanwhile has failed too: {type(failed).__name__}: {failed}")

    def start(self, action: Callable[[], None]) -> None:
        """Have `action` done, after the one before it; what the caller has queued on the GPU is complete for it.

        Raises:
            Exception: whatever the action before it raised.
        """
        self.finish()
        queued = None if self._stream is None else torch.cuda.current_stream(self._device).record_event()
        self._pending = self._pool.submit(self._do, action, queued)

    def finish(self) -> None:
        """Wait until the last action is done.

        Raises:
            Exception: whatever it raised; once.
        """
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def _do(self, action: Callable[[], None], queued: torch.cuda.Event | None) -> None:
        if self._stream is None or queued is None:
            action()
            return
        with torch.cuda.device(self._device), torch.cuda.stream(self._stream):
            self._stream.wait_event(queued)
            action()
            self._stream.synchronize()  # the tensors' memory may be given away after this
