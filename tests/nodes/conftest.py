"""Clusters of several nodes on this machine, and drivers of them in processes of their own: that of
the tests may have a Ray of its own.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from typing import Any, TypeVar

import pytest
import ray
from ray.cluster_utils import Cluster

T = TypeVar("T")

HEAD = "127.0.0.2"  # of 127.0.0.1, Ray makes the machine's own address
STORE_BYTES = 100_000_000  # of each node


class Nodes:
    """A cluster whose head has no CPUs, and the other nodes by their names.

    Each has 100 of a custom resource with its name, for pools and groups that are to be there.
    """

    def __init__(self) -> None:
        self._cluster = Cluster()
        self._raylets: dict[str, Any] = {}
        self._start("head", HEAD, 0)
        self.address = str(self._cluster.address)

    def _start(self, name: str, address: str, cpus: int) -> None:
        self._raylets[name] = self._cluster.add_node(
            wait=False,
            node_ip_address=address,
            num_cpus=cpus,
            num_gpus=0,
            resources={name: 100},
            object_store_memory=STORE_BYTES,
            include_dashboard=False,
        )

    def add(self, cpus: int = 2, **addresses: str) -> None:
        """Start nodes, such as `left="127.0.0.9"`, and return when the cluster has them."""
        for name, address in addresses.items():
            self._start(name, address, cpus)
        self._cluster.wait_for_nodes()

    def lose(self, name: str) -> None:
        """End the processes of a node at once."""
        self._cluster.remove_node(self._raylets.pop(name), allow_graceful=False)

    def close(self) -> None:
        self._cluster.shutdown()


class Driver:
    """A driver of a cluster, in a process of its own on one of its nodes.

    What it is called with, a function that can be imported and its arguments, runs there; all calls
    in one process, one after another.
    """

    def __init__(self, nodes: Nodes, node_ip: str = HEAD) -> None:
        spawn = multiprocessing.get_context("spawn")
        self._process = ProcessPoolExecutor(1, spawn, _connect, (nodes.address, node_ip))
        self.pid = self(os.getpid)

    def __call__(self, function: Callable[..., T], *args: Any, timeout_s: float = 90) -> T:
        return self.submit(function, *args).result(timeout_s)

    def submit(self, function: Callable[..., T], *args: Any) -> Any:
        """The same, as a `concurrent.futures.Future`."""
        return self._process.submit(function, *args)

    def close(self) -> None:
        self(ray.shutdown)
        self._process.shutdown()


def _connect(address: str, node_ip: str) -> None:
    ray.init(address, _node_ip_address=node_ip, logging_level="ERROR", log_to_driver=False)


@pytest.fixture(scope="module")
def nodes() -> Iterator[Nodes]:
    """Of a module of its own: what it does to nodes is no other's."""
    started = Nodes()
    yield started
    started.close()
