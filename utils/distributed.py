"""One process or many: the few collective operations FAR needs, the same calls in both cases."""

import os
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from utils.errors import FarError


@dataclass(frozen=True)
class Context:
    """This process's place in the run. `world` processes; rank 0 alone writes files and draws progress bars."""

    rank: int = 0
    world: int = 1
    device: torch.device = torch.device("cpu")

    @property
    def main(self) -> bool:
        return self.rank == 0

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """Sums a tensor over all processes (in float64, so that counts stay exact)."""
        values = values.to(self.device, torch.float64)
        if self.world > 1:
            dist.all_reduce(values)
        return values

    def barrier(self) -> None:
        if self.world > 1:
            dist.barrier()

    def broadcast_module(self, module: torch.nn.Module) -> None:
        """Rank 0's parameters and buffers to everyone."""
        if self.world > 1:
            for tensor in module.state_dict().values():
                dist.broadcast(tensor, 0)


def pick_device(name: str, local_rank: int = 0) -> torch.device:
    """`auto` is CUDA where there is one. Raises FarError where the named device is missing."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda":
        if not torch.cuda.is_available():
            raise FarError("--device cuda: no CUDA device is visible here; use --device cpu or auto")
        if local_rank >= torch.cuda.device_count():
            raise FarError(
                f"--device cuda: local rank {local_rank} but {torch.cuda.device_count()} CUDA devices; "
                "lower torchrun's --nproc_per_node or use --device cpu"
            )
        return torch.device("cuda", local_rank)
    return torch.device(name)


def start(distributed: bool, device: str = "auto") -> Context:
    """Joins torchrun's process group (NCCL on CUDA, gloo on CPU), or stays alone.

    Raises:
        FarError: `--distributed` outside torchrun, or torchrun without `--distributed`.
    """
    launched = "RANK" in os.environ and "WORLD_SIZE" in os.environ
    if distributed and not launched:
        raise FarError("--distributed: not started by torchrun; use `torchrun --nproc_per_node=N ... --distributed`")
    if not distributed:
        if launched and int(os.environ["WORLD_SIZE"]) > 1:
            raise FarError("torchrun started several processes but --distributed is missing; add --distributed")
        return Context(device=pick_device(device))
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    where = pick_device(device, local_rank)
    if where.type == "cuda":
        torch.cuda.set_device(where)
    dist.init_process_group("nccl" if where.type == "cuda" else "gloo", timeout=timedelta(minutes=30))
    return Context(dist.get_rank(), dist.get_world_size(), where)


def stop() -> None:
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()
