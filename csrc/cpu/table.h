// Included by each isa_*.cpp: all kernels, compiled for its instruction set, and their table.
#include "backward_items.h"
#include "backward_reduce.h"
#include "cache_fill.h"
#include "choice.h"
#include "decode.h"
#include "forward.h"
#include "kernels.h"
#include "linear.h"
#include "linear_many.h"
#include "rows.h"

namespace zinit::cpu {

extern const KernelTable ZINIT_KERNEL_TABLE;
const KernelTable ZINIT_KERNEL_TABLE = {
    .name = ZINIT_ISA_NAME,
    .forward = {forward_items, forward_scratch, forward_run},
    .backward = {backward_items, backward_scratch, backward_run},
    .backward_reduce = {backward_reduce_items, backward_reduce_scratch, backward_reduce_run},
    .decode_append = {append_items, append_scratch, append_run},
    .decode_attend = {attend_items, decode_scratch, attend_run},
    .decode_combine = {combine_items, decode_scratch, combine_run},
    .cache_fill = {fill_items, fill_scratch, fill_run},
    .linear = {{linear_items, linear_scratch, linear_run}, linear_prepare, linear_reads},
    .has_many_rows = kHasManyRows,
    .many = {many_items, many_scratch, many_run},
    .norm = {norm_items, norm_scratch, norm_run},
    .unpack = {unpack_items, unpack_scratch, unpack_run},
    .norm_backward = {norm_backward_items, no_scratch, norm_backward_run},
    .swiglu = {swiglu_items, no_scratch, swiglu_run},
    .rotate = {rotate_items, no_scratch, rotate_run},
    .cross_entropy = {cross_entropy_items, cross_entropy_scratch, cross_entropy_run},
    .choice = {choice_items, choice_scratch, choice_run},
};

}  // namespace zinit::cpu
