"""What local and joined ranks share: what a function knows of its rank, and what becomes of a rank that fails."""

from __future__ import annotations

import importlib
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


THREADS = "threads"
"""Ranks that are threads of one process, for meshes larger than this machine."""
BACKENDS = {"cpu": ("gloo", THREADS), "cuda": ("nccl", "gloo")}
"""By device, the usual backend first."""
STAGED_GLOO = "staged_gloo"
"""gloo that goes by the host, for ranks that share GPUs."""


def backend_of(device: torch.device, asked: str | None) -> str:
    """The name of the backend for ranks on ``device``, registered if it is our own."""
    if asked == STAGED_GLOO or (asked == "gloo" and device.type == "cuda"):
        importlib.import_module("conformance.staged_gloo")  # registers it
        return STAGED_GLOO
    return asked or BACKENDS[device.type][0]


def device_of(kind: str, local_rank: int, backend: str | None = None) -> torch.device:
    """The device of a rank.

    Args:
        kind: "cpu" or "cuda".
        local_rank: on its machine.
        backend: of its process group; ranks of gloo may share a GPU, those of NCCL (None) need one each.

    Raises:
        ValueError: there is no such device.
    """
    if kind == "cpu":
        return torch.device("cpu")
    if kind != "cuda":
        raise ValueError(f"device must be cpu or cuda, not {kind!r}")
    visible = torch.cuda.device_count() if torch.cuda.is_available() else 0
    shared = visible and backend in ("gloo", STAGED_GLOO)
    index = local_rank % visible if shared else local_rank
    if index >= visible:
        advice = "" if visible == 0 else "; ranks of --backend gloo can share one"
        raise ValueError(f"no GPU for local rank {local_rank}: {visible} visible{advice}")
    torch.cuda.set_device(index)
    return torch.device("cuda", index)
