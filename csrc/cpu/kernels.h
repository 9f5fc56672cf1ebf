// The CPU kernels as the bindings see them. Each instruction set compiles the same sources into its own table of plain
// functions; dispatch.cpp picks one table at run time.
//
// The isa_*.cpp files are compiled with different -m flags, so nothing in them may have external weak linkage (no std::
// templates, no torch): the linker could otherwise keep an AVX-512 copy for everybody. Hence the anonymous namespaces.
#pragma once
#include <cstdint>

#include "../params.h"

namespace zinit::cpu {

// A stage splits into `items` independent pieces of work; a thread runs [begin, end) of them with a scratch of its own.
template <class Params>
struct Stage {
  int64_t (*items)(const Params&);
  int64_t (*scratch_bytes)(const Params&);  // per thread
  void (*run)(const Params&, int64_t begin, int64_t end, void* scratch);
};

struct KernelTable {
  const char* name;  // "default", "avx2", "avx512" or "avx512_bf16"
};

extern const KernelTable kGenericKernels, kAvx2Kernels, kAvx512Kernels, kAvx512Bf16Kernels;

// The best table this processor can run, chosen once. ATEN_CPU_CAPABILITY=default|avx2|avx512 (torch's own variable)
// lowers the choice.
const KernelTable& kernels();

}  // namespace zinit::cpu
