"""What local and joined ranks share: what a function knows of its rank, and what becomes of a rank that fails."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

GRACE_SECONDS = 1.0  # after the first failure, for the failure that caused it to show


class RankFailedError(RuntimeError):
    """A rank raised or died. `rank` is the first that did, `reason` its exception or exit signal."""

    def __init__(self, rank: int, reason: str, details: str = "") -> None:
        super().__init__(f"rank {rank} {reason}")
        self.rank = rank
        self.reason = reason
        self.details = details


@dataclass(frozen=True)
class Rank:
    """What a function knows of the place where it runs.

    Attributes:
        index: this rank, from 0.
        count: number of ranks.
        device: device of this rank's tensors.
        emit: sends a picklable event to the process that started the ranks, or to rank 0 of joined ranks.
        linger: for a rank that is about to end itself: tells rank 0 of joined ranks, and lets it write all it knows.
    """

    index: int
    count: int
    device: torch.device
    emit: Callable[[object], None]
    linger: Callable[[], None] = lambda: None


def likely_cause(errors: Mapping[int, tuple[str, str]]) -> RankFailedError:
    """The exception that most likely caused the others: a lost peer's is the last."""
    index = min(errors, key=lambda rank: (lost_peer(errors[rank][0]), rank))
    line, details = errors[index]
    same = [str(rank) for rank in sorted(errors) if errors[rank][0] == line and rank != index]
    also = f" (the same on ranks {', '.join(same)})" if same else ""
    return RankFailedError(index, f"raised {line}{also}", details)


def lost_peer(line: str) -> bool:
    """True for the errors that a rank raises because another one is gone."""
    signs = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "Connection refused")
    return line.startswith(("DistBackendError", "DistNetworkError")) or any(sign in line for sign in signs)


def one_line(error: BaseException, limit: int = 600) -> str:
    """`Type: message`, the message's lines joined and cut at `limit` characters."""
    message = " ".join(str(error).split())
    if len(message) > limit:
        message = f"{message[:limit]} ..."
    return f"{type(error).__name__}: {message}" if message else type(error).__name__


def device_of(kind: str, local_rank: int) -> torch.device:
    """The device of a rank; raises ValueError when there is no such device."""
    if kind == "cpu":
        return torch.device("cpu")
    if kind != "cuda":
        raise ValueError(f"device must be cpu or cuda, not {kind!r}")
    if not torch.cuda.is_available() or local_rank >= torch.cuda.device_count():
        raise ValueError(f"no GPU for local rank {local_rank}: {torch.cuda.device_count()} visible")
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)
