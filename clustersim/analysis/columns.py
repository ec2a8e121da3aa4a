"""Columns of repeated words without spelling out every row: large traces have millions."""

from __future__ import annotations

import numpy as np

from clustersim.trace.record import Columns, Text


def text(columns: Columns, name: str) -> Text:
    """A text column: codes, and the words they stand for."""
    column = columns[name]
    assert isinstance(column, Text), name
    return column


def is_word(columns: Columns, name: str, word: str) -> np.ndarray:
    """bool[rows] where a text column holds the word."""
    column = text(columns, name)
    if word not in column.words:
        return np.zeros(len(column), dtype=bool)
    same: np.ndarray = column.codes == column.words.index(word)
    return same


def ratio(amount: np.ndarray, whole: np.ndarray | float) -> np.ndarray:
    """amount ÷ whole, 0 where there is no whole."""
    whole = np.broadcast_to(np.asarray(whole, dtype="float64"), amount.shape)
    shares: np.ndarray = np.divide(amount, whole, out=np.zeros(amount.shape), where=whole > 0)
    return shares
