"""What a name that does not exist may have meant."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping


def nearest(key: str, known: Mapping[str, str]) -> list[str]:
    """Up to four of the dotted names in `known` that `key` may have meant, with their meanings.

    The name under another group; its initials, as lr, or its symbol, as K; what is spelt almost so;
    a longer name that holds it; else what is spelt alike.
    """
    last = key.rpartition(".")[2].lower()
    names = {full: full.rpartition(".")[2].lower() for full in known}
    initials = {full: "".join(w[:1] for w in name.split("_")) for full, name in names.items()}
    symbols = {full: text[:1].lower() for full, text in known.items() if re.match(r"[A-Z]\b", text)}

    def unlike(full: str) -> float:
        return -difflib.SequenceMatcher(None, key, full).ratio()

    for near in (
        sorted((full for full, name in names.items() if name == last), key=unlike),
        [full for full, symbol in symbols.items() if symbol == last],
        [full for full, letters in initials.items() if len(last) > 1 and letters.endswith(last)],
        difflib.get_close_matches(key, known, n=3, cutoff=0.85),
        [full for full, name in names.items() if len(last) > 2 and last in name],
        difflib.get_close_matches(key, known, n=3, cutoff=0.6),
        difflib.get_close_matches(key, known, n=1, cutoff=0.4),
    ):
        if near:
            group = key.rpartition(".")[0]
            return sorted(near, key=lambda full: full.rpartition(".")[0] != group)[:4]
    return []
