# Flags of the TPU compiler for training on a pod, which train.sh puts into LIBTPU_INIT_ARGS.
# shellcheck shell=bash disable=SC2034
XLA_TPU_FLAGS=(
  # Collectives run inside the products that are computed meanwhile.
  --xla_tpu_enable_async_collective_fusion=true
  # So do the all-gathers of a layer's parameters, the largest part of what is sent.
  --xla_tpu_enable_async_collective_fusion_fuse_all_gather=true
  # Such a collective may stretch over several products instead of one.
  --xla_tpu_enable_async_collective_fusion_multiple_steps=true
  # Computation goes on while the tensor core's collectives are under way.
  --xla_tpu_overlap_compute_collective_tc=true
  # Gradients that are summed over "data", from slice to slice, are sent while the rest of the backward pass computes.
  --xla_tpu_enable_data_parallel_all_reduce_opt=true
  # Gradients of different sizes too, one behind the other.
  --xla_tpu_data_parallel_opt_different_sized_ops=true
)
