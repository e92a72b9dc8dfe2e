"""The bytes that an AllToAll takes."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Plan"]


@dataclass(frozen=True)
class Plan:
    """Bytes that an AllToAll takes, to the byte what is allocated; nothing is allocated to tell it.

    A slot has four halves; a lane has two slots, padded to pages; the arena has all lanes. All AllToAlls of a group
    share one arena, as large as the largest needs. `device_bytes`, `pinned_bytes` and `host_bytes` split `arena_bytes`
    by kind. `str(plan)` shows all of it with the formula.
    """

    world: int
    top_k: int
    max_tokens: int
    lanes: int
    local_experts: int
    max_local_experts: int
    """The most of any rank."""
    chunk_tokens: int
    """A call of at most so many tokens fits its region and has real halves; a longer one is streamed."""
    dispatch_row: int
    combine_row: int
    dispatch_header: int
    combine_header: int
    dispatch_recv: int
    """Of one slot, as the three below."""
    dispatch_send: int
    combine_recv: int
    combine_send: int
    lane_bytes: int
    arena_bytes: int
    device_bytes: int
    pinned_bytes: int
    host_bytes: int
    max_rows: int
    """The most rows that one dispatch can bring."""
    max_contiguous_rows: int
    """The same in the contiguous layout, padding included."""

    @property
    def formula(self) -> str:
        """How the bytes of a slot come about."""
        tokens = min(self.chunk_tokens, self.max_tokens)
        return (
            f"a slot, with W = {self.world} ranks, T = {tokens} tokens, K = {self.top_k} experts a token, rows of "
            f"d = {self.dispatch_row} and c = {self.combine_row} bytes, and headers of {self.dispatch_header} and "
            f"{self.combine_header} bytes a peer: "
            "dispatch receive W T d, dispatch send T min(K, W) d, combine send W T c, combine receive T min(K, W) c"
        )

    def __str__(self) -> str:
        rows = [
            ("dispatch receive, a slot", self.dispatch_recv),
            ("dispatch send, a slot", self.dispatch_send),
            ("combine receive, a slot", self.combine_recv),
            ("combine send, a slot", self.combine_send),
            ("a lane: two slots, padded to pages", self.lane_bytes),
            (f"the arena: {self.lanes} lanes", self.arena_bytes),
            ("  device", self.device_bytes),
            ("  pinned", self.pinned_bytes),
            ("  host", self.host_bytes),
        ]
        return "\n".join([self.formula, *(f"{name:<36}{count:>16,} bytes" for name, count in rows)])
