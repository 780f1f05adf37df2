"""Signals that ask a run to save and leave: noted when they come, acted on between steps."""

import signal
from types import FrameType

STOPPING = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)


class StopRequest:
    """Remembers the first stopping signal; a second SIGINT ends the process at once, as an impatient user expects."""

    def __init__(self) -> None:
        self.name = ""
        for number in STOPPING:
            signal.signal(number, self._note)

    def __bool__(self) -> bool:
        return bool(self.name)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.name and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.name = self.name or signal.Signals(number).name
