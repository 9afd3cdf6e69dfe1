"""What a veRL program names is here, with veRL's parameters and defaults in its order; what is ours
comes after them.
"""

from __future__ import annotations

import importlib
import inspect
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from single_controller.base.decorator import Dispatch, Execute

# As veRL 0.9.1 has them, without self and annotations.
VERL = """
protocol
  DataProto(batch=None, non_tensor_batch={}, meta_info={})
  DataProtoItem(batch=None, non_tensor_batch={}, meta_info={})
  DataProto.__getitem__(item)
  DataProto.save_to_disk(filepath)
  DataProto.load_from_disk(filepath)
  DataProto.print_size(prefix='')
  DataProto.check_consistency()
  DataProto.from_single_dict(data, meta_info=None, auto_padding=False)
    DataProto.from_dict(tensors=None, non_tensors=None, meta_info=None, num_batch_dims=1,
    auto_padding=False)
  DataProto.from_tensordict(tensor_dict=None, meta_info=None, num_batch_dims=1)
  DataProto.to(device)
  DataProto.select(batch_keys=None, non_tensor_batch_keys=None, meta_info_keys=None, deepcopy=False)
  DataProto.select_idxs(idxs)
  DataProto.slice(start=None, end=None, step=None)
  DataProto.pop(batch_keys=None, non_tensor_batch_keys=None, meta_info_keys=None)
  DataProto.rename(old_keys=None, new_keys=None)
  DataProto.union(other)
  DataProto.make_iterator(mini_batch_size, epochs, seed=None, dataloader_kwargs=None)
  DataProto.is_padding_enabled()
  DataProto.padding(padding_size, padding_candidate='')
  DataProto.chunk(chunks)
  DataProto.split(split_size)
  DataProto.concat(data)
  DataProto.reorder(indices)
  DataProto.repeat(repeat_times=2, interleave=True)
  DataProto.unfold_column_chunks(n_split, split_keys=None)
  DataProto.sample_level_repeat(repeat_times)
  DataProto.to_tensordict()
  DataProto.get_data_info()
  DataProtoFuture(collect_fn, futures, dispatch_fn=None)
  DataProtoFuture.concat(data)
  DataProtoFuture.chunk(chunks)
  DataProtoFuture.get()
  BatchData(data)
  BatchData.is_chunkable()
  BatchData.is_concatable()
  BatchData.chunk(chunks)
  BatchData.concat()
  all_gather_data_proto(data, process_group)
  collate_fn(x)
  deserialize_single_tensor(arr)
  deserialize_tensordict(arr)
  fold_batch_dim(data, new_batch_size)
  pad_dataproto_to_divisor(data, size_divisor)
  serialize_single_tensor(obj)
  serialize_tensordict(batch)
  unfold_batch_dim(data, batch_dims=2)
  union_numpy_dict(tensor_dict1, tensor_dict2)
  union_tensor_dict(tensor_dict1, tensor_dict2)
  unpad_dataproto(data, pad_size)
protocol.tensordict_utils
  assert_tensordict_eq(tensordict1, tensordict2)
  assign_non_tensor(tensor_dict, **kwargs)
  assign_non_tensor_data(tensor_dict, key, val)
  assign_non_tensor_stack(tensor_dict, key, val)
  chunk_tensordict(td, chunks)
  concat_nested_tensors(tensors)
  concat_tensordict(data)
  concat_tensordict_with_none_bsz(data)
  contiguous(data)
  get(tensordict, key, default=None)
  get_keys(tensordict, keys)
  get_non_tensor_data(data, key, default)
  get_tensordict(tensor_dict, non_tensor_dict=None)
  index_select_tensor_dict(batch, indices)
  list_of_dict_to_tensordict(list_of_dicts)
  make_iterator(tensordict, mini_batch_size, epochs, seed=None, dataloader_kwargs=None)
  maybe_fix_3d_position_ids(data)
  nested_tensor_from_tensor_list(tensors, ragged_idx=None)
  pad_to_divisor(data, size_divisor)
  pop(tensordict, key, default=None)
  pop_keys(tensordict, keys)
  union_tensor_dict(tensor_dict1, tensor_dict2)
  unpad(data, pad_size)
  unwrap_non_tensor_data(data)
single_controller.base.decorator
  collect_lazy_compute_data_proto(mesh_name, worker_group, *args, **kwargs)
  collect_nd_compute(collect_mask, worker_group, output)
  collect_nd_compute_dataproto(collect_mask, worker_group, output)
  dispatch_lazy_compute_data_proto(mesh_name, worker_group, *args, **kwargs)
  dispatch_nd_compute(dp_rank_mapping, dp_size, worker_group, *args, **kwargs)
  dispatch_nd_compute_dataproto(dp_rank_mapping, dp_size, worker_group, *args, **kwargs)
  get_predefined_dispatch_fn(dispatch_mode)
  get_predefined_execute_fn(execute_mode)
  make_nd_compute_dataproto_dispatch_fn(mesh_name)
    register(dispatch_mode=Dispatch.ALL_TO_ALL, execute_mode=Execute.ALL, blocking=True,
    materialize_futures=True)
  register_dispatch_mode(dispatch_mode_name, dispatch_fn, collect_fn)
  update_dispatch_mode(dispatch_mode, dispatch_fn, collect_fn)
single_controller.base
  Worker.__init__(cuda_visible_devices=None)
  Worker._register_dispatch_collect_info(mesh_name, dp_rank, is_collect)
  Worker._query_dispatch_info(mesh_name)
  Worker._query_collect_info(mesh_name)
  Worker.query_collect_info(mesh_name)
  Worker.get_dispatch_collect()
  Worker.set_dispatch_collect(mesh_name, dispatch_dp_rank, collect_dp_rank)
  Worker.env_keys()
  Worker.get_fused_worker_by_name(worker_name)
  Worker.get_master_addr_port()
  Worker.get_available_master_addr_port()
  Worker.get_cuda_visible_devices()
  Worker.execute_with_func_generator(func, *args, **kwargs)
  Worker.execute_func_rank_zero(func, *args, **kwargs)
  ClassWithInitArgs(cls, *args, **kwargs)
  ResourcePool(process_on_nodes=None, max_colocate_count=10, n_gpus_per_node=8)
  ResourcePool.add_node(process_count)
  ResourcePool.local_world_size_list()
  ResourcePool.local_rank_list()
  WorkerGroup.__init__(resource_pool, **kwargs)
single_controller.base.worker_group
  check_workers_alive(workers, is_alive, gap_time=1)
single_controller.ray
  RayClassWithInitArgs(cls, *args, **kwargs)
  RayClassWithInitArgs.set_additional_resource(additional_resource)
  RayClassWithInitArgs.update_options(options)
    RayResourcePool(process_on_nodes=None, use_gpu=True, name_prefix=None, max_colocate_count=10,
    detached=False, accelerator_type=None)
  RayResourcePool.get_placement_groups(strategy='STRICT_PACK', name=None, device_name='cuda')
  SubRayResourcePool(placement_groups, start_bundle_index, subgroup_world_size, **kwargs)
    RayWorkerGroup(resource_pool=None, ray_cls_with_init=None, bin_pack=True, name_prefix=None,
    detached=False, worker_names=None, worker_handles=None, ray_wait_register_center_timeout=300,
    **kwargs)
    RayWorkerGroup.from_detached(name_prefix=None, worker_names=None, worker_handles=None,
    ray_cls_with_init=None, **kwargs)
  RayWorkerGroup.spawn(prefix_set)
  RayWorkerGroup.fuse(prefix_set)
  RayWorkerGroup.execute_rank_zero(method_name, *args, **kwargs)
  RayWorkerGroup.execute_rank_zero_sync(method_name, *args, **kwargs)
  RayWorkerGroup.execute_rank_zero_async(method_name, *args, **kwargs)
  RayWorkerGroup.execute_all(method_name, *args, **kwargs)
  RayWorkerGroup.execute_all_sync(method_name, *args, **kwargs)
  RayWorkerGroup.execute_all_async(method_name, *args, **kwargs)
  RayWorkerGroup.start_worker_aliveness_check(every_n_seconds=1)
  ResourcePoolManager(resource_pool_spec, mapping, max_colocate_count=3, resource_pool_dict={})
  ResourcePoolManager.create_resource_pool()
  ResourcePoolManager.get_resource_pool(role)
  ResourcePoolManager.get_n_gpus()
  create_colocated_worker_cls(class_dict)
  create_colocated_worker_cls_fused(class_dict)
  create_colocated_worker_raw_cls(class_dict)
  extract_pg_from_exist(resource_pools, src_role_names, resource_pool)
  merge_resource_pool(rp1, rp2)
  parallel_put(data_list, max_workers=None)
  sort_placement_group_by_node_ip(pgs)
  split_resource_pool(resource_pool, split_size)
single_controller.device
  get_device_id()
  get_device_name()
  get_nccl_backend()
  get_resource_name()
  get_torch_device()
  get_visible_devices_keyword()
  is_device_available()
"""

# What is different on purpose, with ours in full.
DIFFERS = {
    "DataProtoFuture": "sources, auto_padding=False",  # only groups make futures
    "collect_lazy_compute_data_proto": "mesh_name, worker_group, output",  # what veRL passes
    "WorkerGroup.__init__": "resource_pool=None, **kwargs",
    "RayWorkerGroup": (  # and by keyword, instead of **kwargs, what SURFACE.md lists
        "resource_pool=None, ray_cls_with_init=None, bin_pack=True, name_prefix=None, "
        "detached=False, worker_names=None, worker_handles=None, "
        "ray_wait_register_center_timeout=None, *, use_gpu=None, device_name=None, "
        "worker_env=None, master_addr=None, master_port=None, master_port_range=None"
    ),
}

ROWS = [
    (part.split("\n")[0], name, " ".join(taken.split()))
    for part in re.split(r"\n(?=\w)", VERL)[1:]
    for name, taken in re.findall(r"^  ([\w.]+)\((.*?)\)$", part, re.MULTILINE | re.DOTALL)
]


def parameters(text: str) -> list[inspect.Parameter]:
    made = eval(f"lambda {text}: None", {"Dispatch": Dispatch, "Execute": Execute})
    return list(inspect.signature(made).parameters.values())


def ours(module: str, name: str) -> list[inspect.Parameter]:
    found: Any = importlib.import_module(module)
    for part in name.split("."):
        owner, found = found, inspect.getattr_static(found, part)
    bound = inspect.isclass(owner) and not isinstance(found, staticmethod)
    found = getattr(found, "__func__", found)
    shown = list(inspect.signature(found).parameters.values())[int(bound) :]
    return [p for p in shown if p.name != "_ray_trace_ctx"]  # @ray.remote adds it to base classes


def readable(parameter: inspect.Parameter) -> str:
    default = parameter.default
    if default is inspect.Parameter.empty:
        return str(parameter.replace(annotation=inspect.Parameter.empty))
    made = repr(default) != "<factory>"
    return f"{parameter.name}={default!r}" if made else f"{parameter.name}={{}}"


@pytest.mark.parametrize(("module", "name", "theirs"), ROWS)
def test_parameters_and_defaults_are_verls_and_more_come_after_them(
    module: str, name: str, theirs: str
) -> None:
    mine, expected = ours(module, name), parameters(DIFFERS.get(name, theirs))
    shown = [readable(p) for p in mine[: len(expected)]]
    assert shown == [readable(p) for p in expected]
    assert name not in DIFFERS or shown != [readable(p) for p in parameters(theirs)]
    more = mine[len(expected) :]
    required = [p.name for p in more if p.default is p.empty and p.kind is not p.VAR_KEYWORD]
    assert required == [], "a veRL call does not give these"


def test_the_same_name_from_two_modules_is_the_same_thing() -> None:
    import single_controller.ray as short
    import single_controller.ray.base as long
    from protocol import tensordict_utils, union_tensor_dict
    from single_controller import Worker
    from single_controller.base.worker import Worker as WorkerWhereItIs

    names = [name for module, name, _ in ROWS if module == "single_controller.ray"]
    whole = [n for n in names if "." not in n and n != "parallel_put"]
    assert [name for name in whole if getattr(short, name) is not getattr(long, name)] == []
    assert Worker is WorkerWhereItIs is long.Worker
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
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
