"""`import single_controller.as_verl`, before all else: a program for veRL runs on this core.

From then on veRL's names for its core (`verl.protocol`, `verl.single_controller` and all below it,
`verl.utils.tensordict_utils`) lead to the modules here, in this process and in the workers of the
Ray that it starts; whatever else the installed veRL has stays veRL's. Where veRL is not installed,
the names that are left of it are `verl.DataProto`, `verl.utils.device` and
`verl.utils.ray_utils.parallel_put`.
"""

from single_controller.verl import in_worker, install

__all__ = ["in_worker", "install"]

install()
