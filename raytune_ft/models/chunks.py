"""How many logits exist at the same time while losses are computed. Loads no torch: memory is predicted by it, too."""

from __future__ import annotations

CHUNK = 512
"""Targets whose logits exist at the same time under a head that is trained."""
CHUNK_LOGITS = {"cpu": 1 << 21, "cuda": 1 << 28}
"""Logits that exist at the same time under a frozen head, by device: what caches hold, or a gibibyte in fp32."""
LEAST = 192
"""Targets of a chunk at least: with fewer, each chunk waits for the head's weights to come from memory."""


def frozen_chunk(device: str, vocabulary: int) -> int:
    """Targets whose logits exist at the same time under a frozen head; `device` is ``cpu`` or ``cuda``."""
    return max(LEAST, CHUNK_LOGITS[device] // max(1, vocabulary))
