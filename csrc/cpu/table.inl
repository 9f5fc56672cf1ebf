// Included by each isa_*.cpp: all kernels, compiled for its instruction set, and their table.
#include "backward.inl"
#include "backward_reduce.inl"
#include "decode.inl"
#include "forward.inl"

namespace zinit::cpu {

extern const KernelTable ZINIT_KERNEL_TABLE;
const KernelTable ZINIT_KERNEL_TABLE = {
    .name = ZINIT_ISA_NAME,
    .forward = {forward_items, forward_scratch, forward_run},
    .backward = {backward_items, backward_scratch, backward_run},
    .backward_reduce = {backward_reduce_items, backward_reduce_scratch, backward_reduce_run},
    .decode_append = kAppendStage,
    .decode_attend = kAttendStage,
    .decode_combine = kCombineStage,
};

}  // namespace zinit::cpu
