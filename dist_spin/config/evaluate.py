"""Settings of measuring."""

from dataclasses import dataclass, field

from dist_spin.config.checks import (
    MAX_COUNT,
    MAX_SEQ_LEN,
    SELF,
    TASKS,
    check_path,
    check_range,
    check_source,
    check_text,
    check_unique,
    require,
)


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
    fidelity: bool = True
    """Also measure how close each variant stays to full precision on these texts: the KL divergence of its next-token
    distribution, mean and 99th percentile in nats per token, and how often both find the same token most probable."""
    tasks: list[str] = field(default_factory=list)
    """Zero-shot tasks of lm-evaluation-harness: boolq, piqa, siqa, hellaswag, winogrande, arc_easy, arc_challenge,
    openbookqa, lambada_openai; none by default."""
    tasks_dir: str | None = None
    """Directory with copies of the tasks' data sets, OWNER/NAME as on the hub; null reads the hub or its local cache."""
    task_limit: int = 0
    """Items measured per task, from its start; 0 means all."""

    prompts: str | None = None
    """File of prompts, one a line (or .jsonl: strings or objects with `prompt`), which full precision and each variant continue
    greedily: how many tokens come before the first difference. The whole model is then in memory at once; null: none."""
    prompt_tokens: int = 64
    """Tokens of one continuation."""

    def __post_init__(self) -> None:
        some = "name at least one source, such as [wikitext2]"
        require(bool(self.sources or self.tasks or self.prompts), "evaluate.sources", self.sources, some)
        for source in self.sources:
            check_source("evaluate.sources", source)
        own = "the model's own text says nothing about its quality"
        require(SELF not in self.sources, "evaluate.sources", self.sources, own)
        check_unique("evaluate.sources", self.sources, "name each source once")
        check_text("evaluate.split", self.split)
        check_range("evaluate.seq_len", self.seq_len, 2, MAX_SEQ_LEN, "next-token loss needs 2 tokens or more")
        check_range("evaluate.max_sequences", self.max_sequences, 0, MAX_COUNT, "use a number, or 0 for all")
        known = set(self.tasks) <= set(TASKS)
        require(known, "evaluate.tasks", self.tasks, f"use names out of {', '.join(TASKS)}")
        check_unique("evaluate.tasks", self.tasks, "name each task once")
        check_path("evaluate.tasks_dir", self.tasks_dir)
        check_path("evaluate.prompts", self.prompts)
        check_range("evaluate.prompt_tokens", self.prompt_tokens, 1, MAX_SEQ_LEN, "use a number from 1")
        check_range("evaluate.task_limit", self.task_limit, 0, MAX_COUNT, "use a number, or 0 for all")
