"""Names are where a veRL program finds them after its import prefix was changed."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

BASE = "Worker WorkerGroup ClassWithInitArgs ResourcePool"
RAY = (
    "RayResourcePool SubRayResourcePool ResourcePoolManager RayClassWithInitArgs RayWorkerGroup "
    "split_resource_pool merge_resource_pool extract_pg_from_exist sort_placement_group_by_node_ip "
    "create_colocated_worker_cls create_colocated_worker_cls_fused create_colocated_worker_raw_cls"
)
ERRORS = (
    "SingleControllerError RegistrationError DispatchError ResourceError WorkerError "
    "WorkerDiedError CallTimeoutError GroupBrokenError"
)
NAMES = {
    "protocol": (
        "DataProto DataProtoItem DataProtoFuture DataProtoConfig BatchData union_tensor_dict "
        "union_numpy_dict pad_dataproto_to_divisor unpad_dataproto fold_batch_dim "
        "unfold_batch_dim collate_fn all_gather_data_proto serialize_single_tensor "
        "deserialize_single_tensor serialize_tensordict deserialize_tensordict"
    ),
    "protocol.tensordict_utils": (
        "assign_non_tensor assign_non_tensor_data assign_non_tensor_stack unwrap_non_tensor_data "
        "get_non_tensor_data nested_tensor_from_tensor_list concat_nested_tensors "
        "concat_tensordict concat_tensordict_with_none_bsz chunk_tensordict get_tensordict "
        "index_select_tensor_dict union_tensor_dict make_iterator assert_tensordict_eq get "
        "get_keys pop pop_keys pad_to_divisor unpad contiguous maybe_fix_3d_position_ids "
        "list_of_dict_to_tensordict"
    ),
    "single_controller": f"{BASE} {ERRORS}",
    "single_controller.device": (
        "get_device_name get_torch_device get_device_id get_nccl_backend get_resource_name "
        "get_visible_devices_keyword is_device_available"
    ),
    "single_controller.base": f"{BASE} PerRank Broadcast",
    "single_controller.base.worker": "Worker",
    "single_controller.base.worker_group": (
        "WorkerGroup ClassWithInitArgs ResourcePool check_workers_alive"
    ),
    "single_controller.base.decorator": (
        "Dispatch Execute register register_dispatch_mode update_dispatch_mode "
        "get_predefined_dispatch_fn get_predefined_execute_fn DISPATCH_MODE_FN_REGISTRY "
        "make_nd_compute_dataproto_dispatch_fn dispatch_nd_compute dispatch_nd_compute_dataproto "
        "dispatch_one_to_all dispatch_all_to_all collect_all_to_all dispatch_dp_compute "
        "collect_dp_compute dispatch_dp_compute_data_proto collect_dp_compute_data_proto "
        "dispatch_dp_compute_data_proto_with_func dummy_direct_rollout_call "
        "_check_dispatch_mode _check_execute_mode "
        "collect_nd_compute collect_nd_compute_dataproto dispatch_lazy_compute_data_proto "
        "collect_lazy_compute_data_proto"
    ),
    "single_controller.ray": f"{RAY} parallel_put colocate",
    "single_controller.ray.base": f"{RAY} Worker get_random_string",
}
MEMBERS = {
    "protocol.DataProto": (
        "from_dict from_single_dict from_tensordict to_tensordict __len__ __getitem__ slice "
        "select select_idxs split chunk make_iterator get_data_info print_size check_consistency "
        "is_padding_enabled concat union repeat sample_level_repeat unfold_column_chunks to pop "
        "rename reorder padding save_to_disk load_from_disk"
    ),
    "protocol.DataProtoFuture": "get chunk concat select __len__",
    "protocol.BatchData": "is_chunkable is_concatable chunk concat",
    "protocol.DataProtoConfig": "auto_padding",
    "single_controller.base.Worker": (
        "rank world_size get_master_addr_port get_available_master_addr_port "
        "get_availale_master_addr_port get_cuda_visible_devices env_keys "
        "_register_dispatch_collect_info _query_dispatch_info _query_collect_info "
        "query_collect_info get_dispatch_collect set_dispatch_collect get_fused_worker_by_name "
        "fused_worker_dict execute_with_func_generator execute_func_rank_zero"
    ),
    "single_controller.base.ResourcePool": (
        "world_size store add_node local_rank_list local_world_size_list __call__"
    ),
    "single_controller.base.WorkerGroup": "world_size",
    "single_controller.ray.RayResourcePool": "get_placement_groups",
    "single_controller.ray.ResourcePoolManager": (
        "create_resource_pool get_resource_pool get_n_gpus"
    ),
    "single_controller.ray.RayClassWithInitArgs": "update_options set_additional_resource",
    "single_controller.ray.RayWorkerGroup": (
        "workers worker_names world_size master_address master_port execute_all execute_all_sync "
        "execute_all_async execute_rank_zero execute_rank_zero_sync execute_rank_zero_async spawn "
        "fuse from_detached start_worker_aliveness_check"
    ),
    "single_controller.base.decorator.Dispatch": (
        "RANK_ZERO ONE_TO_ALL ALL_TO_ALL DP_COMPUTE DP_COMPUTE_PROTO DP_COMPUTE_PROTO_WITH_FUNC "
        "DP_COMPUTE_METRIC DIRECT_ROLLOUT_METHOD"
    ),
    "single_controller.base.decorator.Execute": "ALL RANK_ZERO",
}

BEYOND_VERL = {
    "single_controller.ray.RayResourcePool": "close __enter__ __exit__",
    "single_controller.ray.RayWorkerGroup": ("close __enter__ __exit__ describe"),
    "protocol.DataProto": "balanced_chunk group_by equal",
    "single_controller.base.Worker": "device local_rank local_world_size register_mesh",
}


@pytest.mark.parametrize("module", NAMES)
def test_a_name_is_where_a_verl_program_imports_it_from(module: str) -> None:
    found = importlib.import_module(module)
    assert [name for name in NAMES[module].split() if not hasattr(found, name)] == []


@pytest.mark.parametrize("owner", MEMBERS)
def test_a_class_has_the_members_that_verl_programs_use(owner: str) -> None:
    module, _, name = owner.rpartition(".")
    found = getattr(importlib.import_module(module), name)
    assert [member for member in MEMBERS[owner].split() if not hasattr(found, member)] == []


@pytest.mark.parametrize("owner", BEYOND_VERL)
def test_a_class_has_what_surface_promises_beyond_verl(owner: str) -> None:
    module, _, name = owner.rpartition(".")
    found = getattr(importlib.import_module(module), name)
    assert [member for member in BEYOND_VERL[owner].split() if not hasattr(found, member)] == []


def test_the_same_name_from_two_modules_is_the_same_thing() -> None:
    import single_controller.ray as short
    import single_controller.ray.base as long
    from protocol import tensordict_utils, union_tensor_dict
    from single_controller import Worker
    from single_controller.base import Worker as SameWorker
    from single_controller.base.worker import Worker as WorkerWhereItIs

    assert [name for name in RAY.split() if getattr(short, name) is not getattr(long, name)] == []
    assert Worker is SameWorker
    assert Worker is WorkerWhereItIs
    assert Worker is long.Worker
    assert union_tensor_dict is tensordict_utils.union_tensor_dict


@pytest.mark.parametrize(
    "program",
    [
        "from protocol import DataProto, tensordict_utils as tu; tu.get",
        "from single_controller.ray.base import RayWorkerGroup; RayWorkerGroup.spawn",
    ],
)
def test_each_import_works_as_the_first_one_of_a_program_and_prints_nothing(program: str) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "error::DeprecationWarning:protocol", "-c", program],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
