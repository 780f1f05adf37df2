"""Settings of the report."""

from dataclasses import dataclass

from dist_spin.config.checks import MAX_COUNT, check_range


@dataclass(frozen=True)
class ReportConfig:
    """report (what is drawn of a run)."""

    sequences: int = 4
    """Calibration sequences whose activations are measured before and after rotation; 0 skips this."""
    tensorboard: bool = True
    """Write the figures of every learning step for TensorBoard too, to RUN/tensorboard."""

    def __post_init__(self) -> None:
        check_range("report.sequences", self.sequences, 0, MAX_COUNT, "use a number, or 0 for none")
