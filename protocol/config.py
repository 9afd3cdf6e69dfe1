"""Settings that hold for every batch in this process, and in the workers of its groups."""

from __future__ import annotations

import os

__all__ = ["DataProtoConfig"]


class _Config(type):
    _auto_padding: bool | None = None

    @property
    def auto_padding(cls) -> bool:
        """Whether every batch may be padded; VERL_AUTO_PADDING decides until this is set."""
        if cls._auto_padding is not None:
            return cls._auto_padding
        return os.environ.get("VERL_AUTO_PADDING", "").lower() in ("1", "true")

    @auto_padding.setter
    def auto_padding(cls, enabled: bool | None) -> None:
        cls._auto_padding = enabled


class DataProtoConfig(metaclass=_Config):
    """Settings of all batches in this process: `DataProtoConfig.auto_padding = True`. What a driver
    has set when it calls a group, here or by VERL_AUTO_PADDING, holds in the group's workers too.
    """
