"""The import path that veRL users know; nothing is defined here."""

from single_controller.base import Worker
from single_controller.ray import *  # noqa: F403
from single_controller.ray import __all__ as _names

__all__ = ["Worker", *_names]  # pyright: ignore[reportUnsupportedDunderAll]
