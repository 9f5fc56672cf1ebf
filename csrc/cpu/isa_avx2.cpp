#define ZINIT_ISA_NAME "avx2"
#define ZINIT_KERNEL_TABLE kAvx2Kernels
#include "table.h"
