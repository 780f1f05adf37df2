"""What a user may have meant by a word that is not known: "did you mean …?" for names of settings, choices and verbs."""

import difflib
from collections.abc import Collection, Sequence

# British -> American, in words as they occur in names of settings, methods and verbs.
SPELLINGS = {"isation": "ization", "ise": "ize", "ising": "izing", "lyse": "lyze", "our": "or", "centre": "center"}
CUTOFF = 0.6  # of difflib's similarity, from 0 to 1; its own default


def same_spelling(name: str) -> str:
    """`name` in small letters, American spelling and underscores: `Quantise.Cd-Passes` becomes `quantize.cd_passes`."""
    name = name.strip().lower().replace("-", "_")
    for british, american in SPELLINGS.items():
        name = name.replace(british, american)
    return name


def closest(word: str, known: Collection[str], most: int = 1) -> list[str]:
    """Up to `most` of the `known` words that `word` resembles, best first; [] if none does."""
    by_spelling = {same_spelling(name): name for name in known}
    wanted = same_spelling(word)
    if wanted in by_spelling:
        return [by_spelling[wanted]]
    return [by_spelling[name] for name in difflib.get_close_matches(wanted, by_spelling, n=most, cutoff=CUTOFF)]


def closest_settings(key: str, known: Sequence[str]) -> list[str]:
    """The dotted names of settings that `key` may mean: the whole name counts, its group and its last part.

    `optimise.seq_len` is one (the group is misspelt), `w_bits` several (no group is given), `quant.percdamp` is in another group.
    """
    wanted = same_spelling(key)
    if wanted in known:
        return [wanted]
    group, _, leaf = wanted.rpartition(".")
    same_leaf = [name for name in known if name.rpartition(".")[2] == leaf]
    if same_leaf and group:
        groups = {name.rpartition(".")[0]: name for name in same_leaf}
        near = difflib.get_close_matches(group, groups, n=1, cutoff=CUTOFF)
        return [groups[near[0]]] if near else same_leaf
    if same_leaf:
        return same_leaf
    close = difflib.get_close_matches(wanted, known, n=1, cutoff=CUTOFF)
    if close or group:
        return close
    leaves = {name.rpartition(".")[2] for name in known}
    near = difflib.get_close_matches(leaf, leaves, n=1, cutoff=CUTOFF)
    return [name for name in known if near and name.rpartition(".")[2] == near[0]]


def did_you_mean(names: Sequence[str]) -> str:
    """The question, with a space behind it; "" where there is nothing to suggest."""
    return f"did you mean {' or '.join(names)}? " if names else ""
