#define ZINIT_ISA_NAME "avx512_bf16"
#define ZINIT_KERNEL_TABLE kAvx512Bf16Kernels
#include "table.h"
