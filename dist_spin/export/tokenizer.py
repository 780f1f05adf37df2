"""The tokenizer of the original model beside an export: its files copied, then held against the original on a text."""

import shutil
from pathlib import Path
from typing import Any

from dist_spin.errors import UserError
from dist_spin.model.weights import ModelFiles

COPIED = (
    "tokenizer*",
    "tokenization*.py",
    "*.model",
    "vocab.*",
    "merges.txt",
    "added_tokens.json",
    "special_tokens_map.json",
    "chat_template*.json",
    "*.jinja",
    "additional_chat_templates/*.jinja",
    "generation_config.json",
)
# Scripts, spaces, digits, code and marks that tokenizers cut in different ways.
PROBE = (
    "The quick brown fox, 12345 times:  it's naïve!\n\n\tdef f(x):\n        return x ** 2  # 3.14\r\n"
    "Größe, Ελλάδα, Россия, 日本語のテキスト, العربية, हिन्दी, 👩‍👩‍👧 ½ … <not a token>"
)


def copy_tokenizer(files: ModelFiles, directory: Path) -> None:
    """Copy the tokenizer, every chat template and the generation config of the original model, as far as it has them.

    Raises:
        UserError: the copy would read a text differently.
    """
    for pattern in COPIED:
        for path in files.directory.glob(pattern):
            if path.is_file():
                target = directory / path.relative_to(files.directory)
                target.parent.mkdir(exist_ok=True)
                shutil.copyfile(path, target)
    try:
        original = files.tokenizer()
    except UserError:
        return  # there is none to compare with
    if _difference(original, files, directory):
        original.save_pretrained(directory)  # as transformers itself writes it
        if problem := _difference(original, files, directory):
            raise UserError(
                f"the exported tokenizer {problem}", "see whether this transformers knows the model's tokenizer"
            )


def _difference(original: Any, files: ModelFiles, directory: Path) -> str:
    """What the tokenizer in `directory` does otherwise than `original`; "" if nothing."""
    from transformers import AutoTokenizer

    try:
        exported = AutoTokenizer.from_pretrained(directory, trust_remote_code=files.trust_remote_code)
    except Exception as error:
        return f"cannot be read ({type(error).__name__})"
    added = original.get_added_vocab()
    if exported.get_added_vocab() != added:
        return "has other added tokens"
    if exported.chat_template != original.chat_template:
        return "has another chat template"
    for text in (PROBE, *(f"a {token} b{token}c" for token in added)):
        if exported(text)["input_ids"] != original(text)["input_ids"]:
            return f"gives other ids for {text[:40]!r}"
    return ""
