"""Times weights on their way from trainers to rollouts, beside the ways that others take.

    WRITE="--json docs/weights.json --page docs/weights.md"
    python benchmarks/weights.py $WRITE         # more cases with one GPU, and with two
    python benchmarks/weights.py $WRITE --only  # just the page again

The weights are those of a Qwen3 model, 310 tensors: 256 MB in float32 between CPUs, 1.2 GB in
bfloat16 between GPUs, the same memory in every step. Each way is first seen to bring what was
written just before, in how many bytes. Then all take turns; figures are medians of `--rounds`, in
milliseconds, and a ratio is the median over the rounds of the ratio within one round.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import platform
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import numpy as np
import ray
import torch

from single_controller.base import PerRank, Worker
from single_controller.base.decorator import Dispatch, register
from single_controller.ray import (
    RayClassWithInitArgs,
    RayResourcePool,
    RayWorkerGroup,
    colocate,
)

BYTES = {"cpu": 256 << 20, "cuda": 1_192_000_000}
LAYERS, VOCABULARY = 28, 151_936 / 1_024  # per unit of width

Weights = dict[str, torch.Tensor]
EVERY: dict[str, Any] = {"dispatch_mode": Dispatch.ONE_TO_ALL}
GIVES: dict[str, Any] = {**EVERY, "blocking": False, "transport": "device"}


def shapes(size: int, itemsize: int) -> dict[str, tuple[int, ...]]:
    """The parameters of a Qwen3 model of about so many bytes; of 0.6 billion, with width 1 024."""
    width = max(1, round(math.sqrt(size / itemsize / (15 * LAYERS + VOCABULARY)) / 16)) * 16
    layer: dict[str, tuple[int, ...]] = {
        "input_norm": (width,),
        "q": (2 * width, width),
        "k": (width, width),
        "v": (width, width),
        "q_norm": (width // 8,),
        "k_norm": (width // 8,),
        "o": (width, 2 * width),
        "post_norm": (width,),
        "gate": (3 * width, width),
        "up": (3 * width, width),
        "down": (width, 3 * width),
    }
    named = {f"layers.{i}.{name}": shape for i in range(LAYERS) for name, shape in layer.items()}
    return {"embed": (2 * int(VOCABULARY * width / 2), width), **named, "norm": (width,)}


def content(number: int, seed: int, rank: int) -> int:
    """What a rank has everywhere in its tensor of that number; bfloat16 can tell these apart."""
    return (7 * number + 31 * seed + 64 * rank) % 251


class Model(Worker):
    """A model's parameters; or, `sharded`, this rank's rows of each, as FSDP2 cuts them."""

    def __init__(self, size: int, sharded: bool = False) -> None:
        super().__init__()
        dtype = torch.float32 if self.device.type == "cpu" else torch.bfloat16
        self.parameters: Weights = {}
        for name, shape in shapes(size, dtype.itemsize).items():
            whole = torch.empty(shape, dtype=dtype, device="meta")
            mine = whole.chunk(self.world_size)[self.rank] if sharded else whole
            self.parameters[name] = torch.zeros_like(mine, device=self.device)

    @register(**EVERY)
    def noop(self) -> None: ...

    @register(**EVERY)
    def fill(self, seed: int) -> None:
        for number, tensor in enumerate(self.parameters.values()):
            tensor.fill_(content(number, seed, self.rank))

    @register(**EVERY)
    def wrong(self, seed: int, ranks: list[int]) -> int:
        """How many tensors are not those that `fill` made on these ranks, in equal parts."""
        found = 0
        for number, tensor in enumerate(self.parameters.values()):
            parts = zip(tensor.chunk(len(ranks)), ranks, strict=True)
            found += not all((part == content(number, seed, rank)).all() for part, rank in parts)
        return found

    @register(**GIVES)
    def weights(self) -> Weights:
        return self.parameters

    @register(**EVERY, reads_only=True)
    def load(self, weights: Weights) -> None:
        for name, mine in self.parameters.items():
            mine.copy_(weights[name])
        self.finish()

    @register(**EVERY, reads_only=True)
    def load_shards(self, shards: list[Weights]) -> None:
        for name, mine in self.parameters.items():
            for part, shard in zip(mine.chunk(len(shards)), shards, strict=True):
                part.copy_(shard[name])
        self.finish()

    @register(**GIVES)
    def pieces(self) -> Iterable[tuple[str, torch.Tensor]]:
        yield from self.parameters.items()

    @register(**EVERY, reads_only=True)
    def load_pieces(self, pieces: Iterable[tuple[str, torch.Tensor]]) -> None:
        for name, tensor in pieces:
            self.parameters[name].copy_(tensor)
        self.finish()

    def finish(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    @register(**EVERY)
    def address(self) -> list[int]:
        return [tensor.data_ptr() for tensor in self.parameters.values()]

    @register(**EVERY, reads_only=True)
    def addresses(self, weights: Weights) -> list[int]:
        return [tensor.data_ptr() for tensor in weights.values()]

    @register(**EVERY, reads_only=True)
    def use(self, weights: Weights) -> int:
        return len(weights)


@ray.remote
class Plain:
    """By hand, by way of Ray's store: one copy in, and one out into the reader's own."""

    def __init__(self, size: int, sharded: bool = False) -> None:
        whole = {name: torch.zeros(shape) for name, shape in shapes(size, 4).items()}
        self.parameters = {
            name: t.chunk(2)[0].clone() if sharded else t for name, t in whole.items()
        }

    def give(self) -> dict[str, Any]:
        return {name: tensor.numpy() for name, tensor in self.parameters.items()}

    def take(self, *given: dict[str, Any]) -> None:
        for name, mine in self.parameters.items():
            for part, arrays in zip(mine.chunk(len(given)), given, strict=True):
                np.copyto(part.numpy(), arrays[name])


@ray.remote
class Mapper:
    """By hand on one card: CUDA's interprocess handles, and one copy into the reader's own."""

    def __init__(self, size: int) -> None:
        self.tensors = [
            torch.zeros(shape, dtype=torch.bfloat16, device="cuda")
            for shape in shapes(size, 2).values()
        ]

    def give(self) -> list[Any]:
        from torch.multiprocessing.reductions import reduce_tensor

        return [reduce_tensor(tensor) for tensor in self.tensors]

    def take(self, handles: list[Any]) -> None:
        for mine, (rebuild, arguments) in zip(self.tensors, handles, strict=True):
            mine.copy_(rebuild(*arguments))
        torch.cuda.synchronize()

    def copy(self) -> float:
        """The milliseconds of as many bytes within one process."""
        copies = [torch.empty_like(tensor) for tensor in self.tensors]
        return timed_on_device(
            lambda: [copy.copy_(t) for copy, t in zip(copies, self.tensors, strict=True)]
        )


@ray.remote
class Joined:
    """By hand between cards: collectives of NCCL between processes that are joined beforehand."""

    def __init__(self, size: int, port: int, rank: int) -> None:
        store = torch.distributed.TCPStore("127.0.0.1", port, is_master=False)
        torch.distributed.init_process_group("nccl", store=store, rank=rank, world_size=2)
        like: dict[str, Any] = {"dtype": torch.bfloat16, "device": "cuda"}
        self.tensors = [torch.zeros(shape, **like) for shape in shapes(size, 2).values()]
        self.shards = [tensor.chunk(2)[rank].clone() for tensor in self.tensors]
        count = sum(tensor.numel() for tensor in self.tensors)
        self.flat = torch.zeros(count, **like)
        self.flat_shard = torch.zeros(count // 2, **like)
        self.signal = torch.zeros(1, device="cuda")

    def begin(self) -> None:
        """Both ranks are here, so that neither's time has the other's call in it."""
        torch.distributed.all_reduce(self.signal)

    def broadcast(self, flat: bool = False) -> float:
        tensors = [self.flat] if flat else self.tensors
        return timed_on_device(
            lambda: [torch.distributed.broadcast(tensor, 0) for tensor in tensors], self.begin
        )

    def all_gather(self, flat: bool = False) -> float:
        wholes, shards = ([self.flat], [self.flat_shard]) if flat else (self.tensors, self.shards)
        pairs = list(zip(wholes, shards, strict=True))
        return timed_on_device(
            lambda: [torch.distributed.all_gather_into_tensor(*pair) for pair in pairs], self.begin
        )


def timed_on_device(run: Callable[[], Any], begin: Callable[[], Any] = lambda: None) -> float:
    """Milliseconds until the device is done; the median of three."""
    took = []
    for _ in range(3):
        begin()
        torch.cuda.synchronize()
        began = time.perf_counter()
        run()
        torch.cuda.synchronize()
        took.append((time.perf_counter() - began) * 1e3)
    return median(took)


class Asked(NamedTuple):
    """At most so many times the floor, or, where there is none, so many milliseconds."""

    most: float
    floor: str = ""


class Way(NamedTuple):
    """A case, which group makes what it brings, and from which ranks each of the reader's has it,
    in equal parts.
    """

    case: Callable[[], Any]
    maker: Any
    ranks: list[list[int]]


class Figures:
    """What was measured: by case milliseconds of each round and bytes, and what was asked."""

    def __init__(self, rounds: int) -> None:
        self.rounds = rounds
        self.took: dict[str, list[float]] = {}
        self.bytes: dict[str, dict[str, int]] = {}
        self.asked: dict[str, Asked] = {}
        self._seeds = itertools.count(1)

    def checked(self, ways: Mapping[str, Way], reader: Any) -> dict[str, Callable[[], Any]]:
        """Their cases, once it is seen that they bring what the maker has just got."""
        for name, way in ways.items():
            for _ in range(2):  # the second is one like all that follow
                seed = next(self._seeds)
                way.maker.fill(seed)
                before = _moved(way.maker, reader)
                way.case()
                self.bytes[name] = _settled(before, way.maker, reader)
                wrong = reader.wrong(seed, PerRank(way.ranks))
                if any(wrong):
                    raise SystemExit(f"{name}: {wrong} tensors are not what the trainer has")
        return {name: way.case for name, way in ways.items()}

    def time(self, cases: Mapping[str, Callable[[], Any]], often: int = 1) -> None:
        """Cases in turns, each time in another order. One that returns a float has timed itself."""
        names = list(cases)
        print("; ".join(names), end=" … ", flush=True)
        for turn in range(-2, self.rounds * often):  # the first two map memory and fill caches
            start = turn % len(names)
            for name in names[start:] + names[:start]:
                began = time.perf_counter()
                found = cases[name]()
                took = (time.perf_counter() - began) * 1e3
                if turn >= 0:
                    took = found if isinstance(found, float) else took
                    self.took.setdefault(name, []).append(took)
        print(", ".join(f"{self.ms(name):.2f} ms" for name in names))

    def ms(self, name: str) -> float:
        return median(self.took[name])

    def reached(self, name: str) -> float:
        """What is to be compared with what was asked."""
        asked = self.asked[name]
        if not asked.floor:
            return self.ms(name)
        pairs = zip(self.took[name], self.took[asked.floor], strict=True)
        return median(ours / floor for ours, floor in pairs)

    def report(self) -> dict[str, Any]:
        """By case; what was asked is beside what was reached."""
        return {
            name: {
                "ms": round(self.ms(name), 3),
                **(self.asked[name]._asdict() if name in self.asked else {}),
                **({"reached": round(self.reached(name), 3)} if name in self.asked else {}),
                **self.bytes.get(name, {}),
            }
            for name in self.took
        }


def table(figures: Mapping[str, Mapping[str, Any]]) -> str:
    """As Markdown, by case; floors have nothing that is asked of them."""
    rows = [["", "ms", "asked: at most", "reached", "MB between workers"]]
    rows.append(["---", *["---:"] * 4])
    for name, found in figures.items():
        floor = found.get("floor", "").removeprefix(f"{name.split(',')[0]}, ")
        of = f" × {floor}" if floor else " ms"
        cells = [f"{found['ms']:,.1f}"]
        cells += (
            [f"{found['most']:g}{of}", f"{found['reached']:.2f}"] if "most" in found else ["-"] * 2
        )
        cells.append(f"{found['between'] / 1e6:,.0f}" if "between" in found else "-")
        rows.append([name, *cells])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def page(figures: Mapping[str, Mapping[str, Any]], text: str) -> str:
    """A page with these figures in place of those between its marks."""
    start, end = "<!-- figures -->", "<!-- end of figures -->"
    before, _, after = text.partition(start)
    return f"{before}{start}\n\n{table(figures)}\n\n{end}{after.partition(end)[2]}"


def _moved(*groups: Any) -> tuple[int, int]:
    """Bytes by way of the driver, and from worker to worker."""
    tables = [group.stats() for group in groups]
    driver = sum(table.driver_bytes for table in tables)
    return driver, sum(table.moved_bytes for table in tables) - driver


def _between(before: tuple[int, int], after: tuple[int, int]) -> dict[str, int]:
    driver, between = (b - a for a, b in zip(before, after, strict=True))
    return {"driver": driver, "between": between}


def _settled(before: tuple[int, int], *groups: Any) -> dict[str, int]:
    """The same once all ranks' bytes are counted, which is soon after the call."""
    deadline, moved, seen = time.monotonic() + 10, _between(before, _moved(*groups)), None
    while (moved != seen or not moved["between"]) and time.monotonic() < deadline:
        time.sleep(0.5)
        seen, moved = moved, _between(before, _moved(*groups))
    return moved


def all_of(*references: Any) -> None:
    ray.get([*references], timeout=300)


def slower(*references: Any) -> float:
    """The time of those that timed themselves together."""
    return max(ray.get([*references], timeout=300))


def same_process(figures: Figures, team: Any, where: str) -> None:
    """By reference, from role to role."""
    made = team.trainer.weights()
    if team.local.addresses(PerRank(made)) != team.trainer.address():
        raise SystemExit("a role of the same process did not get the trainer's own tensors")
    names = [f"{where}, same process, {how}" for how in ("already made", "made and read")]
    before = _moved(team.trainer, team.local)
    floor = f"{where}, no-op call"
    cases: dict[str, Callable[[], Any]] = {
        floor: team.local.noop,
        names[0]: lambda: team.local.use(PerRank(made)),
        names[1]: lambda: team.local.use(PerRank(team.trainer.weights())),
    }
    figures.time(cases, 10)
    moved = _between(before, _moved(team.trainer, team.local))  # of all calls together
    for name in names:
        figures.asked[name], figures.bytes[name] = Asked(2, floor), moved


def on_cpus(figures: Figures, size: int) -> None:
    """Two ranks to two others, and from role to role."""
    whole, sharded = RayClassWithInitArgs(Model, size), RayClassWithInitArgs(Model, size, True)
    nothing = RayClassWithInitArgs(Model, 0)
    with (
        RayResourcePool([2], use_gpu=False) as pool,
        colocate(pool, trainer=whole, shards=sharded, local=nothing) as team,
        RayWorkerGroup(pool, whole) as reader,
    ):
        same_process(figures, team, "CPUs")
        trainer, shards = team.trainer, team.shards
        share = Plain.options(num_cpus=0.1)
        a, b, halves = ([share.remote(size, cut) for _ in range(2)] for cut in (False, False, True))

        def each_to_its_own() -> None:
            all_of(*[y.take.remote(x.give.remote()) for x, y in zip(a, b, strict=True)])

        def first_to_both() -> None:
            given = a[0].give.remote()
            all_of(*[y.take.remote(given) for y in b])

        def shards_to_both() -> None:
            given = [half.give.remote() for half in halves]
            all_of(*[y.take.remote(*given) for y in b])

        pieces = trainer.pieces.options(bucket_bytes=max(1, size // 8))
        each, both = [[0], [1]], [[0, 1], [0, 1]]
        for name, way, by_hand, in_buckets in (
            (
                "CPUs, 2 → 2 ranks, each to its own",
                Way(lambda: reader.load(PerRank(trainer.weights())), trainer, each),
                each_to_its_own,
                Way(lambda: reader.load_pieces(PerRank(pieces())), trainer, each),
            ),
            (
                "CPUs, 2 → 2 ranks, rank 0 to both",
                Way(lambda: reader.load(trainer.weights()[0]), trainer, [[0], [0]]),
                first_to_both,
                None,
            ),
            (
                "CPUs, 2 → 2 ranks, shards to the whole on both",
                Way(lambda: reader.load_shards(shards.weights()), shards, both),
                shards_to_both,
                None,
            ),
        ):
            floor = name.replace("2 → 2 ranks", "plain actors")
            figures.asked[name] = Asked(1.2, floor)
            ways = {name: way}
            if in_buckets is not None:
                ways[f"{name}, in buckets"] = in_buckets
            figures.time({floor: by_hand, **figures.checked(ways, reader)})
        for actor in (*a, *b, *halves):
            ray.kill(actor)


def on_one_card(figures: Figures, size: int) -> None:
    """From process to process, and from role to role."""
    whole = RayClassWithInitArgs(Model, size)
    with (
        RayResourcePool([1], gpus_per_process=0.4) as pool,
        colocate(pool, trainer=whole, local=RayClassWithInitArgs(Model, 0)) as team,
        RayWorkerGroup(pool, whole) as reader,
    ):
        same_process(figures, team, "one card")
        trainer = team.trainer
        a, b = (Mapper.options(num_gpus=0.2, num_cpus=0).remote(size) for _ in range(2))
        name = "one card, another process, made and read"
        ways = {name: Way(lambda: reader.load(trainer.weights()[0]), trainer, [[0]])}
        cases: dict[str, Callable[[], Any]] = {
            **figures.checked(ways, reader),
            "one card, bare CUDA IPC between plain actors": lambda: all_of(
                b.take.remote(a.give.remote())
            ),
            "one card, the copy alone": lambda: slower(a.copy.remote()),
        }
        figures.asked[name] = Asked(20)
        made = trainer.weights()[0]
        cases["one card, another process, already made"] = lambda: reader.load(made)
        figures.time(cases)
        for actor in (a, b):
            ray.kill(actor)


def on_two_cards(figures: Figures, size: int) -> None:
    """From card to card, and from shards on both to the whole on both.

    The shares are such that no card has room for both ranks of a kind.
    """
    whole, sharded = RayClassWithInitArgs(Model, size), RayClassWithInitArgs(Model, size, True)
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    joined: list[Any] = []

    def beside(collective: str, ways: Mapping[str, tuple[float, Way]], rollout: Any) -> None:
        """Time ways to hand weights over, each asked to take at most so many times what NCCL takes,
        whose ranks are there from the first time on.
        """
        if not joined:
            share = Joined.options(num_gpus=0.25, num_cpus=0)
            joined.extend(share.remote(size, store.port, rank) for rank in range(2))

        def by_hand(flat: bool) -> float:
            method = collective.replace("-", "_")
            return slower(*[getattr(actor, method).remote(flat) for actor in joined])

        floor = f"NCCL {collective}, tensor by tensor"
        figures.asked |= {name: Asked(most, floor) for name, (most, _) in ways.items()}
        cases = figures.checked({name: way for name, (_, way) in ways.items()}, rollout)
        flat = f"NCCL {collective}, one flat tensor"
        figures.time({floor: lambda: by_hand(False), flat: lambda: by_hand(True), **cases})

    with (
        RayResourcePool([1], gpus_per_process=0.6) as first,
        RayResourcePool([1], gpus_per_process=0.6) as second,
        RayWorkerGroup(first, whole) as trainer,
        RayWorkerGroup(second, whole) as rollout,
    ):
        print(trainer.describe(), rollout.describe(), sep="\n")
        pieces = trainer.pieces.options(bucket_bytes=256 << 20)
        plain = Way(lambda: rollout.load(trainer.weights()[0]), trainer, [[0]])
        in_buckets = Way(lambda: rollout.load_pieces(pieces()[0]), trainer, [[0]])
        ways = {"card to card, made and read": (1.5, plain)}
        ways["card to card, in buckets of 256 MB"] = 2, in_buckets
        beside("broadcast", ways, rollout)
        made = trainer.weights()[0]
        figures.time({"card to card, already made": lambda: rollout.load(made)})
    with (
        RayResourcePool([2], gpus_per_process=0.6) as trainers,
        RayResourcePool([2], gpus_per_process=0.15) as rollouts,
        RayWorkerGroup(trainers, sharded) as trainer,
        RayWorkerGroup(rollouts, whole) as rollout,
    ):
        print(trainer.describe(), rollout.describe(), sep="\n")
        way = Way(lambda: rollout.load_shards(trainer.weights()), trainer, [[0, 1], [0, 1]])
        beside("all-gather", {"two cards, shards on both to the whole on both": (2, way)}, rollout)
    for actor in joined:
        ray.kill(actor)


PARTS = {"cpus": (on_cpus, 0), "one-card": (on_one_card, 1), "two-cards": (on_two_cards, 2)}


def measure(
    parts: Iterable[str], cards: int, rounds: int, size: int | None, report: dict[str, Any]
) -> None:
    """Run some parts, and put what they found, and where, into the report."""
    ray.init("local", num_cpus=16, num_gpus=cards, include_dashboard=False, logging_level="ERROR")
    machine = {"cpus": os.cpu_count(), "platform": platform.platform(), "rounds": rounds}
    machine |= {"torch": torch.__version__, "ray": ray.__version__, "cards": cards}
    if cards:
        machine["card"] = torch.cuda.get_device_name()
    print(*machine.values(), sep=", ")
    for part in parts:
        run, needed = PARTS[part]
        figures = Figures(rounds)
        run(figures, size or BYTES["cuda" if needed else "cpu"])
        report["figures"] |= figures.report()
        report["machines"][part] = machine


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--bytes", type=int, help="of the weights, instead of 256 MB and 1.2 GB")
    parser.add_argument("--only", nargs="*", choices=PARTS, help="all that can be by default")
    parser.add_argument("--json", type=Path, help="write the figures here, beside those there are")
    parser.add_argument("--page", type=Path, help="put those of the file into this page's table")
    options = parser.parse_args()
    report: dict[str, Any] = {"figures": {}, "machines": {}}
    if options.json and options.json.exists():
        report = json.loads(options.json.read_text())
    cards = torch.cuda.device_count()
    wanted = PARTS if options.only is None else options.only
    parts = [part for part in PARTS if part in wanted and PARTS[part][1] <= cards]
    if parts:
        measure(parts, cards, options.rounds, options.bytes, report)
    print(table(report["figures"]))
    if options.json:
        options.json.write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n")
    if options.page:
        options.page.write_text(page(report["figures"], options.page.read_text()))


if __name__ == "__main__":
    main()
