#define ZINIT_ISA_NAME "default"
#define ZINIT_KERNEL_TABLE kGenericKernels
#include "table.h"
