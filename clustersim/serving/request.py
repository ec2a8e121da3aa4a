"""A request, as the replica sees it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Request:
    """One sequence.

    number         in order of arrival
    batch          batch it arrived in
    arrival        s
    prompt_tokens  tokens to read, or already in the KV cache for decode-only workloads
    decode_steps   further tokens to make
    """

    number: int
    batch: int
    arrival: float
    prompt_tokens: int
    decode_steps: int
