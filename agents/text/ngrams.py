"""Features of a text without a model: hashed words and character n-grams.

The default encoder of what looks at a query before anybody answers it (`programs/supernet.py`). It
needs no model and no download, gives the same numbers on every machine, and takes microseconds;
words tell the subject of a query, n-grams of characters its spelling (signs, digits, endings). It
knows no synonyms: a sentence encoder does, and can be named instead.
"""

from __future__ import annotations

import math
import re
import zlib
from collections.abc import Iterator

SIZE = 64  # numbers of a text; two of a hundred terms share a place more often than not
LONGEST = 3  # characters of an n-gram
MAX_CHARS = 20_000  # of a text that are looked at
_WORDS = re.compile(r"\w+|[^\w\s]")


def ngrams(text: str) -> list[float]:
    """`SIZE` numbers of Euclidean norm 1 (all 0 for a text without a word or sign).

    Each word, and each n-gram of up to 3 characters of a word with its ends marked, adds 1 or -1 at
    a place that its CRC-32 says (feature hashing, arXiv:0902.2206); case does not count.
    """
    found = [0.0] * SIZE
    for term in _terms(text[:MAX_CHARS].casefold()):
        code = zlib.crc32(term.encode("utf-8", "surrogatepass"))
        found[code % SIZE] += 1.0 if code >> 16 & 1 else -1.0
    norm = math.sqrt(math.fsum(x * x for x in found))
    return [x / norm for x in found] if norm else found


def _terms(text: str) -> Iterator[str]:
    for word in _WORDS.findall(text):
        yield f"word {word}"
        marked = f"^{word}$"
        for length in range(1, LONGEST + 1):
            for start in range(len(marked) - length + 1):
                if (term := marked[start : start + length]) not in "^$":
                    yield term
