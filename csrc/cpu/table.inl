// Included by each isa_*.cpp: all kernels, compiled for its instruction set, and their table.
#include "kernels.h"
#include "simd.h"

namespace zinit::cpu {

extern const KernelTable ZINIT_KERNEL_TABLE;
const KernelTable ZINIT_KERNEL_TABLE = {.name = ZINIT_ISA_NAME};

}  // namespace zinit::cpu
