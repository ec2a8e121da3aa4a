"""What collectives are made of: a group as its members sit in the machine, and rounds of flows among them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np

#: Where a flow goes: to its peer, only up to the switch that adds up or copies, or down from there.
PEER, UP, DOWN = 0, 1, 2


@dataclass(frozen=True, eq=False)
class Group:
    """Where the members of a group sit; members are called by their position 0 … n - 1.

    domain  int64[n] NVLink domain of each member, numbered from 0 in order of appearance
    """

    domain: np.ndarray

    @property
    def n(self) -> int:
        """How many members."""
        return len(self.domain)

    @cached_property
    def sizes(self) -> np.ndarray:
        """int64[D] members in each domain."""
        return np.bincount(self.domain)

    @property
    def domains(self) -> int:
        """How many NVLink domains the members sit in."""
        return len(self.sizes)

    @cached_property
    def rail(self) -> np.ndarray:
        """int64[n] how many earlier members sit in the same domain: the place within it."""
        order = np.argsort(self.domain, kind="stable")
        rail = np.empty(self.n, dtype=np.int64)
        rail[order] = np.arange(self.n) - np.repeat(np.cumsum(self.sizes) - self.sizes, self.sizes)
        return rail

    @cached_property
    def at(self) -> np.ndarray:
        """int64[D, most] the member at each place of each domain, -1 where a domain has fewer."""
        table = np.full((self.domains, int(self.sizes.max())), -1)
        table[self.domain, self.rail] = np.arange(self.n)
        return table

    @cached_property
    def relay(self) -> np.ndarray:
        """int64[n, D] the member of each domain on the same rail; smaller domains take turns."""
        turn = self.rail[:, None] % self.sizes[None, :]
        return np.asarray(self.at[np.arange(self.domains)[None, :], turn])


def one_domain(n: int) -> Group:
    """A group of n members that all reach each other by NVLink."""
    return Group(np.zeros(n, dtype=np.int64))


def domains_of(ranks: np.ndarray, domain: np.ndarray) -> np.ndarray:
    """NVLink domains of the members of groups, numbered from 0 in every group, as they appear.

    ranks    int[G, n] members
    domain   int[R] NVLink domain of every rank
    Returns  int64[G, n]
    """
    held = domain[ranks]
    first = (held[:, :, None] == held[:, None, :]).argmax(axis=2)
    number = np.cumsum(first == np.arange(ranks.shape[1]), axis=1) - 1
    return np.asarray(np.take_along_axis(number, first, axis=1))


@dataclass(frozen=True, slots=True, eq=False)
class Round:
    """Flows that may run at once; a member's next round waits for its flows of this one.

    source, target  int[F] positions in the group
    size            float64[G, F] bytes, per group
    repeat          how many rounds in a row have just these flows
    sending         apart: flows are independent of each other; interleaved: a sender takes a piece
                    of each flow in turn, so that they share links as their bytes; together:
                    interleaved, and all begin when the farthest peer can answer
    behind          int[F, B] flows of this round whose bytes a flow passes on piece by piece, padded
                    with -1: its first byte follows theirs, and the bytes move when the first piece has
                    come all the way. None where nobody passes anything on
    via             int8[F] PEER, UP (from the source to the switch that adds up or copies; target is
                    the source) or DOWN (from there to the target, which is the source). None: all PEER
    """

    source: np.ndarray
    target: np.ndarray
    size: np.ndarray
    repeat: int = 1
    sending: Literal["apart", "interleaved", "together"] = "apart"
    behind: np.ndarray | None = None
    via: np.ndarray | None = None


Rounds = Callable[[Group, np.ndarray], list[Round]]


@dataclass(frozen=True, slots=True)
class Collective:
    """One way to do an exchange.

    rounds        (group, sizes) → rounds
    meets         all: nothing is sent before every member is there; each: a member sends when it is
                  there, and is done when its own senders and receivers are
    needs         anything; switches: one in every NVLink domain that adds up what its members send;
                  domain: that all members are in one
    deduplicated  (group, sizes, distinct) → rounds where it is known how many bytes are distinct per
                  target domain; None where an algorithm has no use for it
    last_hop      group → int64[n, n] the member that hands on to column what row sends it (row itself:
                  nobody in between); None: always row itself. For an all-to-all
    """

    rounds: Rounds
    meets: Literal["all", "each"] = "all"
    needs: Literal["anything", "switches", "domain"] = "anything"
    deduplicated: Callable[[Group, np.ndarray, np.ndarray], list[Round]] | None = None
    last_hop: Callable[[Group], np.ndarray] | None = None


def all_pairs(n: int) -> tuple[np.ndarray, np.ndarray]:
    """Source and target of everybody to everybody else, int64[n * (n - 1)] each."""
    # Shifted, as senders go round: in the k-th place everybody sends to its k-th neighbour.
    source = np.tile(np.arange(n), n - 1)
    return source, (source + np.repeat(np.arange(1, n), n)) % n


def backwards(rounds: Sequence[Round]) -> list[Round]:
    """The rounds from last to first with every flow turned round."""
    assert all(r.behind is None and r.via is None for r in rounds), "nothing in them hangs on a direction"
    return [Round(r.target, r.source, r.size, r.repeat, r.sending) for r in reversed(rounds)]
