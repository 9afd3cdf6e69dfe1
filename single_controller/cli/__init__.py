"""The commands of `python -m single_controller`, for a cluster, its groups and veRL's programs."""

__all__ = []
