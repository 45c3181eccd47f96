"""Files that carry the SHA-256 of their own content, so that a truncated file or a flipped bit is noticed.

The sum stands in the file's JSON (of a safetensors file: in the JSON of its header) and is that of the whole file with
zeros in its own place. Files without one, of older versions and of other programs, count as undamaged.
"""

from __future__ import annotations

import hashlib
import re

#: The key of the sum in a file's JSON; it stands before everything else.
SEAL = "sha256_of_this_file"
#: What is to be put into the JSON before ``sealed`` fills in the sum.
UNSEALED = {SEAL: "0" * 64}
#: JSON inside a header of JSON has its quotes escaped.
_PLACE = re.compile(SEAL.encode() + rb'\\?": ?\\?"(.{64})', re.DOTALL)


def sealed(content: bytes) -> bytes:
    """``content``, whose JSON begins with ``UNSEALED``, with its sum filled in."""
    place = _PLACE.search(content)
    assert place is not None, "its JSON begins with UNSEALED"
    return b"".join((content[: place.start(1)], _sum(content, place), content[place.end(1) :]))


def is_damaged(content: bytes) -> bool:
    """Whether a file's content is another than the one that its sum was taken of."""
    place = _PLACE.search(content)
    return place is not None and place[1] != _sum(content, place)


def _sum(content: bytes, place: re.Match[bytes]) -> bytes:
    view = memoryview(content)
    found = hashlib.sha256(view[: place.start(1)])
    found.update(b"0" * 64)
    found.update(view[place.end(1) :])
    return found.hexdigest().encode()
