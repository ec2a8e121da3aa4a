"""KV blocks of every shard: what is used and what is free."""

from __future__ import annotations

from math import ceil

import numpy as np


class KvPool:
    """Counts blocks per shard; used + free = all, always.

    blocks        blocks each shard owns
    block_tokens  tokens per block
    used, most    int64[D] blocks in use, now and at most so far
    """

    def __init__(self, shards: int, blocks: int, block_tokens: int) -> None:
        self.blocks = blocks
        self.block_tokens = block_tokens
        self.used = np.zeros(shards, dtype=np.int64)
        self.most = np.zeros(shards, dtype=np.int64)

    def blocks_for(self, tokens: int) -> int:
        """Whole blocks that hold so many tokens."""
        return ceil(tokens / self.block_tokens)

    def fits(self, wanted: np.ndarray) -> bool:
        """Whether every shard has so many blocks free. wanted int64[D]"""
        return bool((self.used + wanted <= self.blocks).all())

    def take(self, wanted: np.ndarray) -> None:
        """Takes blocks. wanted int64[D]"""
        assert self.fits(wanted), "blocks taken that are not there"
        self.used += wanted
        self.most = np.maximum(self.most, self.used)

    def give_back(self, held: np.ndarray) -> None:
        """Frees blocks. held int64[D]"""
        assert (held <= self.used).all(), "blocks freed that were not taken"
        self.used -= held
