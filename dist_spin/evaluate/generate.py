"""Let the quantised model of a run answer beside the full-precision one, so that a person can see what it is worth.

    dist-spin generate runs/NAME "The capital of France is" [--tokens 64]     continues a text
    dist-spin chat runs/NAME                                                  a conversation, through the chat template

Both models decode greedily, so that every difference comes from quantisation.
"""

import contextlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor
from transformers import GenerationConfig, TextStreamer

from dist_spin.config.run import RunConfig
from dist_spin.errors import UserError
from dist_spin.evaluate.layerwise_model import load_full_model
from dist_spin.evaluate.targets import EvalTarget, eval_targets
from dist_spin.model.context import context_length
from dist_spin.model.weights import ModelFiles
from dist_spin.pipeline.fingerprints import layer_fingerprint
from dist_spin.pipeline.model import check_vocabulary, open_configured_model
from dist_spin.pipeline.variants import calibration_tokens
from dist_spin.runtime import distributed
from dist_spin.runtime.distributed import World
from dist_spin.runtime.progress import say
from dist_spin.storage.results import bits_label
from dist_spin.storage.run_directory import RunDir
from dist_spin.storage.run_records import read_settings

TOKENS = 64  # of one answer, unless asked for otherwise

T = TypeVar("T")
EndTokens = int | list[int] | None


def end_tokens(files: ModelFiles) -> EndTokens:
    """The tokens that end a text: chat models may end a turn with another one than a text."""
    end: EndTokens = files.tokenizer().eos_token_id
    with contextlib.suppress(OSError):
        end = GenerationConfig.from_pretrained(files.directory).eos_token_id or end
    return end


@torch.no_grad()
def greedy(model: Any, ids: Tensor, tokens: int, end: EndTokens, streamer: Any = None) -> Tensor:
    """ids [1, T], on the model's device, continued by the most probable token each time: [1, T + at most `tokens`]."""
    whole: Tensor = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=tokens,
        do_sample=False,
        eos_token_id=end,
        pad_token_id=end[0] if isinstance(end, list) else end,
        streamer=streamer,
    )
    return whole


class Speaker:
    """One model of a run that writes text to standard output as it is generated."""

    def __init__(self, config: RunConfig, world: World, files: ModelFiles, run: RunDir, target: EvalTarget) -> None:
        """Raises UserError if a quantised layer is not there."""
        bits = bits_label({**vars(config.quant), **({"w_bits": 16} if target.weights == "none" else {})})
        self.name = target.label if target.full_precision else f"{target.label}, {bits}, weights by {target.weights}"
        if target.weights != "none":
            tokens = calibration_tokens(config, files)
            target.fingerprint = layer_fingerprint(config, files, target.variant, tokens)
        self.model = load_full_model(config, world, files, run, target)
        self.device, self.shape, self.tokenizer = world.device, files.shape, files.tokenizer()
        self.conversation: list[dict[str, str]] = []
        self.end_tokens = end_tokens(files)

    def write(self, ids: Tensor, tokens: int) -> str:
        """Continue ids [1, T] by at most `tokens` tokens; returns what was written."""
        print(f"--- {self.name}", flush=True)
        ids = ids.to(self.device)
        streamer: Any = TextStreamer(self.tokenizer, skip_prompt=True, skip_special_tokens=True)
        whole = greedy(self.model, ids, tokens, self.end_tokens, streamer)
        return self.tokenizer.decode(whole[0, ids.shape[1] :], skip_special_tokens=True)

    def answer(self, question: str, tokens: int) -> str:
        """The next turn of this model's own conversation, shorter than `tokens` where the model's context ends.

        Raises:
            UserError: the conversation fills the context, or holds a token that the model has no embedding for.
        """
        self.conversation.append({"role": "user", "content": question})
        ids = self.tokenizer.apply_chat_template(
            self.conversation, add_generation_prompt=True, return_tensors="pt", return_dict=False
        )
        check_vocabulary(ids, self.shape, "the conversation")
        room = (context_length(self.model.config) or sys.maxsize) - ids.shape[1]
        if room < 1:
            problem = f"the conversation has {ids.shape[1]} tokens, which fill the model's context"
            raise UserError(problem, "start a new one: dist-spin chat")
        text = self.write(ids, min(tokens, room))
        self.conversation.append({"role": "assistant", "content": text})
        return text


def generate(path: Path, prompt: str, tokens: int = TOKENS) -> list[str]:
    """Continue `prompt` with the full-precision model, then with the run's quantised one; one in memory at a time.

    Raises:
        UserError: `path` is no run directory, it is not quantised yet, or the prompt is empty or too long.
    """
    said = []

    def prompt_ids(files: ModelFiles) -> Tensor:
        ids: Tensor = files.tokenizer()(prompt, return_tensors="pt")["input_ids"]
        if not ids.numel():
            raise UserError("the prompt is empty", 'dist-spin generate runs/NAME "some text"')
        context, length = context_length(files.config), ids.shape[1]
        if context is not None and length + tokens > context:
            problem = f"{tokens} tokens after a prompt of {length} are longer than the model's context of {context}"
            raise UserError(
                problem, f"give --tokens {context - length}" if length < context else "give a shorter prompt"
            )
        return check_vocabulary(ids, files.shape, "the prompt")

    for speaker, ids in _speakers(path, prompt_ids):
        said.append(speaker.write(ids, tokens))
        del speaker
    return said


def chat(path: Path, tokens: int = 4 * TOKENS) -> None:
    """Ask on standard input, line by line, and let both models answer, until an empty line or the end.

    Raises:
        UserError: as `generate`; or the model has no chat template.
    """
    speakers = [speaker for speaker, _ in _speakers(path, lambda files: None)]
    if not speakers[0].tokenizer.chat_template:
        raise UserError("this model has no chat template", "let it continue a text: dist-spin generate")
    say("Ask something; an empty line ends.")
    while True:
        print("> ", end="", file=sys.stderr, flush=True)
        question = sys.stdin.readline().strip()
        if not question:
            return
        for speaker in speakers:
            speaker.answer(question, tokens)


def _speakers(path: Path, prepare: Callable[[ModelFiles], T]) -> Iterator[tuple[Speaker, T]]:
    """The full-precision model of a run, then its quantised one with the learned rotations.

    Each comes with what `prepare` made of the model's files before weights were read.
    """
    run = RunDir(path.resolve())  # a run may have been moved since
    config = read_settings(path, [f"output_dir={run.path.parent}", f"name={run.path.name}"])
    world = distributed.start(config.distributed.device, config.distributed.timeout_s, config.distributed.threads)
    try:
        files = open_configured_model(config)
        prepared = prepare(files)
        targets = eval_targets(config, files, world.device)
        for target in (targets[0], targets[-1]):
            yield Speaker(config, world, files, run, target), prepared
    finally:
        distributed.stop()
