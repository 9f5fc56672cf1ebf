// The CPU kernels as the bindings see them. Each instruction set compiles the same sources into its own table
// of plain functions; dispatch.cpp picks one table at run time.
//
// The isa_*.cpp files are compiled with different -m flags, so nothing in them may have external weak linkage
// (no std:: templates, no torch): the linker could otherwise keep an AVX-512 copy for everybody. Hence the
// anonymous namespaces.
#pragma once
#include <cstdint>

#include "../params.h"

namespace zinit::cpu {

// A stage splits into `items` independent pieces of work; a thread runs [begin, end) of them with a scratch
// of its own.
template <class Params>
struct Stage {
  int64_t (*items)(const Params&);
  int64_t (*scratch_bytes)(const Params&);  // per thread
  void (*run)(const Params&, int64_t begin, int64_t end, void* scratch);
};

// How backward is cut into pieces. What is summed, and in which order, depends on the shapes alone, so
// gradients are the same for any number of threads.
//
// A split is a part of the query blocks of a key head's group, for one sequence. It owns the gradient of its
// queries and makes one partial gradient of its keys and of its prompt row. A unit of work is one split, and
// the second stage sums the partials in order; or all splits of a key head in turn, summed in that same order
// as they are made.
struct BackwardPlan : BackwardParams {
  int64_t block_queries;   // queries of one head that a unit holds packed at a time
  int64_t blocks;          // of the longest sequence
  int64_t splits;          // per sequence and key head
  bool in_turn;            // one unit takes them all; where that occupies the threads
  int64_t padded_dim;      // D rounded up to 16
  float* key_partials;     // [B, Hkv, splits, 2, S, padded_dim]: dK, dV; nullptr: one unit, written directly
  float* prompt_partials;  // [B, Hkv, splits, 2, P, padded_dim]
  float* gate_partials;    // [B, Hq, blocks]

  bool wants_keys() const { return grad_key.data != nullptr || grad_value.data != nullptr; }
  bool wants_tokens() const { return grad_query.data != nullptr || wants_keys(); }
  int64_t units() const { return in_turn ? 1 : splits; }  // per sequence and key head
  bool wants_prompt() const { return grad_prompt_key.data != nullptr || grad_prompt_value.data != nullptr; }
};

struct DecodeWork;

struct KernelTable {
  const char* name;  // "default", "avx2", "avx512" or "avx512_bf16"
  Stage<ForwardParams> forward;
  Stage<BackwardPlan> backward;
  Stage<BackwardPlan> backward_reduce;
  Stage<DecodeWork> decode_append, decode_attend, decode_combine;
};

extern const KernelTable kGenericKernels, kAvx2Kernels, kAvx512Kernels, kAvx512Bf16Kernels;

// The best table this processor can run, chosen once. ATEN_CPU_CAPABILITY=default|avx2|avx512 (torch's own
// variable) lowers the choice.
const KernelTable& kernels();

}  // namespace zinit::cpu
