"""Settings of measuring and of the report."""

from dataclasses import dataclass, field

from dist_spin.config.checks import SELF, TASKS, _check, check_source


@dataclass(frozen=True)
class EvaluateConfig:
    """evaluate (measuring perplexity and zero-shot tasks)."""

    sources: list[str] = field(default_factory=lambda: ["wikitext2"])
    """Texts to measure on, a list such as [wikitext2, c4]; same forms as optimize.source."""
    split: str = "test"
    """Part of each source; c4 has no test part and takes its validation part for it."""
    seq_len: int = 2048
    """Length of one sequence, tokens; the published length (perplexities of different lengths do not compare)."""
    max_sequences: int = 0
    """Sequences measured per source, from its start; 0 means all."""
    unquantized_weights: bool = False
    """Also measure every rotation with 16-bit weights: what learning achieved before the weights were rounded."""
    tasks: list[str] = field(default_factory=list)
    """Zero-shot tasks of lm-evaluation-harness: boolq, piqa, siqa, hellaswag, winogrande, arc_easy, arc_challenge,
    openbookqa, lambada_openai; none by default."""
    tasks_dir: str | None = None
    """Directory with copies of the tasks' data sets, OWNER/NAME as on the hub; null reads the hub or its local cache."""
    task_limit: int = 0
    """Items measured per task, from its start; 0 means all."""

    def __post_init__(self) -> None:
        some = "name at least one source, such as [wikitext2]"
        _check(self, "sources", lambda names: bool(names or self.tasks), some)
        for source in self.sources:
            check_source("evaluate.sources", source)
        _check(self, "sources", lambda names: SELF not in names, "the model's own text says nothing about its quality")
        _check(self, "sources", lambda names: len(set(names)) == len(names), "name each source once")
        _check(self, "seq_len", lambda n: n >= 2, "next-token loss needs 2 tokens or more")
        _check(self, "max_sequences task_limit", lambda n: n >= 0, "use a number, or 0 for all")
        _check(self, "tasks", lambda names: set(names) <= set(TASKS), f"use names out of {', '.join(TASKS)}")
        _check(self, "tasks", lambda names: len(set(names)) == len(names), "name each task once")


@dataclass(frozen=True)
class ReportConfig:
    """report (what is drawn of a run)."""

    sequences: int = 4
    """Calibration sequences whose activations are measured before and after rotation; 0 leaves that pass out."""
    tensorboard: bool = True
    """Write the figures of every learning step for TensorBoard too, to RUN/tensorboard."""

    def __post_init__(self) -> None:
        _check(self, "sequences", lambda n: n >= 0, "use a number, or 0 for none")
