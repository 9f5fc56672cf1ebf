#define ZINIT_ISA_NAME "avx512"
#define ZINIT_KERNEL_TABLE kAvx512Kernels
#include "table.h"
