"""Workers that make batches on their device and say where batches are that reach them."""

from __future__ import annotations

from typing import Any

import torch
from tensordict import TensorDict

from protocol import DataProto
from single_controller.base import Worker
from single_controller.base.decorator import Dispatch, register

ROWS = 6
LATER = {"dispatch_mode": Dispatch.DP_COMPUTE_PROTO, "uneven": True, "blocking": False}
EACH = {"dispatch_mode": Dispatch.DP_COMPUTE_METRIC, "uneven": True}


def uuid(tensor: torch.Tensor) -> str:
    return str(torch.cuda.get_device_properties(tensor.device).uuid)


class Producer(Worker):
    """Its batches stay on its device, for consumers in other processes, too."""

    def make(self, data: DataProto) -> DataProto:
        x = data.batch["x"].to(self.device)
        lengths = [2, 0, 3] * len(x)
        jagged = [torch.full((n,), i, device=x.device) for i, n in zip(x, lengths, strict=False)]
        return DataProto.from_dict(
            {
                "x": x * 2,
                "half": x.to(torch.bfloat16),
                "wide": x.unsqueeze(1).expand(-1, 4),
                "turned": torch.outer(torch.arange(3.0, device=x.device), x).T,
                "jagged": torch.nested.as_nested_tensor(jagged, layout=torch.jagged),
            },
            {"name": [f"row {int(i)}" for i in x]},
            {"metrics": {"rank": self.rank}},
        )

    @register(dispatch_mode=Dispatch.DP_COMPUTE_PROTO)
    def to_driver(self, data: DataProto) -> DataProto:
        return self.make(data)

    @register(**LATER)
    def by_host(self, data: DataProto) -> DataProto:
        return self.make(data)

    @register(**LATER, transport="device")
    def by_device(self, data: DataProto) -> DataProto:
        return self.make(data)

    @register(**LATER, transport="device")
    def tensordict(self, data: DataProto) -> TensorDict:
        x = data.batch["x"].to(self.device)
        return TensorDict({"x": x * 2}, [len(x)], device=self.device)

    @register(**LATER, transport="device")
    def big(self, data: DataProto) -> DataProto:
        """64 MB a row."""
        x = data.batch["x"].to(self.device)
        return DataProto.from_dict({"x": x.unsqueeze(1).repeat(1, 16 << 20)})

    @register(**LATER, transport="device")
    def kept(self, data: DataProto) -> DataProto:
        """Memory that it writes into again."""
        self.mine = data.batch["x"].to(self.device).unsqueeze(1).clone()
        return DataProto.from_dict({"x": self.mine})

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def write_kept(self) -> None:
        self.mine += 1

    @register(dispatch_mode=Dispatch.ONE_TO_ALL, blocking=False, transport="device")
    def weights(self) -> dict[str, torch.Tensor]:
        self.mine = getattr(self, "mine", torch.zeros(1, device=self.device))
        return {"w": self.mine}

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def write_over(self, count: int) -> None:
        """Use the memory of so many rows that are gone."""
        torch.full((count, 16 << 20), -1.0, device=self.device)
        torch.cuda.synchronize()

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def allocated(self) -> int:
        torch.cuda.synchronize()
        torch.cuda.ipc_collect()
        return torch.cuda.memory_allocated()


class Consumer(Worker):
    @register(dispatch_mode=Dispatch.ONE_TO_ALL, reads_only=True)
    def first(self, weights: dict[str, torch.Tensor]) -> float:
        return weights["w"].flatten()[0].item()

    @register(**EACH)
    def look(self, data: Any) -> dict[str, Any]:
        """What came, and where it is."""
        x = data["x"] if isinstance(data, TensorDict) else data.batch["x"]
        found = {"x": x.tolist(), "device": x.device.type}
        if x.is_cuda:
            found |= {"uuid": uuid(x), "own": uuid(torch.empty(1, device=self.device))}
        if isinstance(data, DataProto):
            found["half"] = data.batch["half"].float().tolist(), str(data.batch["half"].dtype)
            found["wide"] = data.batch["wide"].tolist()
            found["turned"] = data.batch["turned"].tolist()
            found["jagged"] = [row.tolist() for row in data.batch["jagged"].unbind()]
            found["name"] = data.non_tensor_batch["name"].tolist()
        x += 1  # its own: nobody else may see this
        return found

    @register(**EACH)
    def sum(self, data: DataProto) -> tuple[float, str]:
        return float(data.batch["x"][:, 0].sum()), data.batch["x"].device.type

    @register(**EACH, reads_only=True)
    def sum_there(self, data: DataProto) -> tuple[float, int]:
        """The sum, and what this process itself has allocated of its card."""
        return float(data.batch["x"][:, 0].sum()), torch.cuda.memory_allocated()

    @register(**EACH, reads_only=True)
    def start_sum(self, data: DataProto) -> None:
        """Returns seconds before the card has read it."""
        torch.cuda._sleep(4_000_000_000)
        self.total = data.batch["x"][:, 0].sum()

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def finished_sum(self) -> float:
        return float(self.total)

    @register(**EACH, reads_only=True)
    def pointer(self, data: DataProto) -> int:
        return data.batch["x"].data_ptr()

    @register(**EACH)
    def own_pointer(self, data: DataProto) -> tuple[int, str]:
        return data.batch["x"].data_ptr(), data.batch["x"].device.type


def rows(count: int = ROWS) -> DataProto:
    return DataProto.from_dict({"x": torch.arange(float(count))})


def check(found: list[dict[str, Any]], device: str) -> None:
    """All rows, whichever ranks they are on."""
    every = {
        key: [value for one in found for value in one[key]]
        for key in ("x", "wide", "turned", "name")
    }
    assert every["x"] == [2.0 * i for i in range(ROWS)]
    assert every["wide"] == [[float(i)] * 4 for i in range(ROWS)]
    assert every["turned"] == [[0.0, i, 2.0 * i] for i in range(ROWS)]
    assert every["name"] == [f"row {i}" for i in range(ROWS)]
    halves = [one["half"] for one in found]
    assert [value for values, _ in halves for value in values] == list(range(ROWS))
    assert {dtype for _, dtype in halves} == {"torch.bfloat16"}
    assert [set(row) for one in found for row in one["jagged"] if row] == [
        {i} for i in range(ROWS) if i % 3 != 1
    ]
    assert {one["device"] for one in found} == {device}
    assert all(one.get("uuid") == one.get("own") for one in found)
