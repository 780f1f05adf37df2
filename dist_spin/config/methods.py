"""Settings of the other published methods in a comparison."""

from dataclasses import dataclass, field

from dist_spin.config.checks import MAX_BATCH, MAX_CHANNELS, MAX_COUNT, check_positive, check_range, require


@dataclass(frozen=True)
class MethodsConfig:
    """methods (other published methods, for comparison; they calibrate on the text of quantize)."""

    smooth_alphas: list[float] = field(default_factory=lambda: [0.3, 0.4, 0.5, 0.6, 0.7, 0.8])
    """SmoothQuant: strengths tried for each layer, from 0 (weights smooth) to 1 (activations smooth)."""
    flat_epochs: int = 15
    """FlatQuant, OmniQuant, AffineQuant: passes over the calibration text; FlatQuant's published number."""
    flat_batch_size: int = 4
    """FlatQuant, OmniQuant, AffineQuant: sequences per step; FlatQuant's published number."""
    flat_lr: float = 5e-3
    """FlatQuant, OmniQuant, AffineQuant: learning rate of transforms, that of clips is ten times it; FlatQuant's."""
    quik_columns: int = 256
    """QUIK: input channels of each site that stay at 16 bits, but at most a quarter of them; about the published number."""
    dart_share: float = 0.1
    """DartQuant: share of the calibration tokens whose activations are kept; published."""
    dart_epochs: int = 10
    """DartQuant: passes over the kept activations; published."""
    dart_batch_size: int = 64
    """DartQuant: calibration sequences whose kept activations of one site make a step; published."""
    dart_lr: float = 1e-3
    """DartQuant: learning rate of plain gradient descent; published."""
    qat_steps: int = 500
    """LLM-QAT: steps over quantize.n_sequences sequences that the model writes itself; published are 12500."""
    qat_batch_size: int = 8
    """LLM-QAT: sequences per step over all processes together; published."""
    qat_lr: float = 2e-5
    """LLM-QAT: learning rate of all weights, falling along a cosine; published."""

    def __post_init__(self) -> None:
        alphas = bool(self.smooth_alphas) and all(0 <= x <= 1 for x in self.smooth_alphas)
        require(alphas, "methods.smooth_alphas", self.smooth_alphas, "use numbers from 0 to 1, such as [0.5]")
        check_range("methods.flat_epochs", self.flat_epochs, 1, MAX_COUNT, "use 1 or more")
        check_range("methods.flat_batch_size", self.flat_batch_size, 1, MAX_BATCH, "use 1 or more")
        check_positive("methods.flat_lr", self.flat_lr, "use a number above 0, such as 5e-3")
        check_range("methods.quik_columns", self.quik_columns, 0, MAX_CHANNELS, "use a number of channels")
        require(0 < self.dart_share <= 1, "methods.dart_share", self.dart_share, "use a fraction above 0 and up to 1")
        check_range("methods.dart_epochs", self.dart_epochs, 1, MAX_COUNT, "use 1 or more")
        check_range("methods.dart_batch_size", self.dart_batch_size, 1, MAX_BATCH, "use 1 or more")
        check_positive("methods.dart_lr", self.dart_lr, "use a number above 0, such as 5e-3")
        check_range("methods.qat_steps", self.qat_steps, 1, MAX_COUNT, "use 1 or more")
        check_range("methods.qat_batch_size", self.qat_batch_size, 1, MAX_BATCH, "use 1 or more")
        check_positive("methods.qat_lr", self.qat_lr, "use a number above 0, such as 5e-3")
