"""A pytest plugin for unit tests of workers: groups in the test's own process, closed after it.

Say `pytest_plugins = ["single_controller.testing"]` in the top `conftest.py`:

    def test_add_adds_the_rank(inline_group):
        actor = inline_group(Actor, ranks=2)
        assert actor.add(batch).batch["a"].tolist() == [0, 1]
        assert actor.workers[1].calls == 1  # the worker itself

Once torch is imported, a group starts in a millisecond; neither Ray nor a GPU is asked for.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from typing import Any

import pytest

from single_controller.base.plan import ResourcePool
from single_controller.base.roles import ClassWithInitArgs, W
from single_controller.inline import InlineWorkerGroup

__all__ = ["InlineGroups", "inline_group"]


class InlineGroups(ExitStack):
    """Makes groups for one test. `close()` closes them all, the last one first."""

    def __call__(
        self, role: type[W] | ClassWithInitArgs[W], ranks: int | Sequence[int] = 1, **options: Any
    ) -> InlineWorkerGroup[W]:
        """A group of `role`, which is a worker class, or `ClassWithInitArgs` with its arguments.

        Args:
            ranks: how many, or how many on each node.
            options: those of `InlineWorkerGroup`, such as `worker_env`.
        """
        spec = role if isinstance(role, ClassWithInitArgs) else ClassWithInitArgs(role)
        pool = ResourcePool([ranks] if isinstance(ranks, int) else ranks)
        return self.enter_context(InlineWorkerGroup(pool, spec, **options))


@pytest.fixture
def inline_group() -> Iterator[InlineGroups]:
    """Makes groups of workers in this process: `inline_group(Actor, ranks=2)`."""
    with InlineGroups() as groups:
        yield groups
