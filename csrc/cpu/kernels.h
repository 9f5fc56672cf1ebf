// The CPU kernels as the bindings see them. Each instruction set compiles the same sources into its own table
// of plain functions; dispatch.cpp picks one table at run time.
//
// The isa_*.cpp files are compiled with different -m flags, so nothing in them may have weak external
// linkage: no std:: templates, no torch, and everything in anonymous namespaces. The linker keeps one copy of
// a weak symbol, and it could be the AVX-512 one.
#pragma once
#include "linear_work.h"
#include "row_work.h"
#include "work.h"

namespace zinit::cpu {

// A stage splits into `items` independent pieces of work; a thread runs [begin, end) of them with a scratch
// of its own.
template <class Work>
struct Stage {
  int64_t (*items)(const Work&);
  int64_t (*scratch_bytes)(const Work&);  // of a thread
  void (*run)(const Work&, int64_t begin, int64_t end, void* scratch);
};

struct Bytes {
  const char* begin;
  int64_t count;
};

// A stage whose threads first prepare their scratch, once for all items that they take.
template <class Work>
struct PreparedStage : Stage<Work> {
  void (*prepare)(const Work&, void* scratch);
  Bytes (*reads)(const Work&, int64_t item);  // what an item reads from memory and no stage before writes
};

struct KernelTable {
  const char* name;  // "default", "avx2", "avx512" or "avx512_bf16"
  Stage<ForwardParams> forward;
  Stage<BackwardWork> backward;
  Stage<BackwardWork> backward_reduce;
  Stage<DecodeWork> decode_append, decode_attend, decode_combine, cache_fill;
  PreparedStage<LinearWork> linear;
  bool has_many_rows;  // else the stage does nothing
  Stage<ManyWork> many;
  Stage<NormWork> norm;
  Stage<UnpackWork> unpack;
  Stage<NormBackwardWork> norm_backward;
  Stage<SwigluWork> swiglu;
  Stage<RotateWork> rotate;
  Stage<CrossEntropyWork> cross_entropy;
  Stage<ChoiceWork> choice;
};

extern const KernelTable kGenericKernels, kAvx2Kernels, kAvx512Kernels, kAvx512Bf16Kernels;

// The best table that this processor can run, chosen once. ATEN_CPU_CAPABILITY=default|avx2|avx512 (torch's
// own variable) lowers the choice.
const KernelTable& kernels();

}  // namespace zinit::cpu
