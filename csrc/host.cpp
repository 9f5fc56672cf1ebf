// _C_host: how calls are cut into blocks and pieces, on both devices, and how the CUDA kernels were built. It
// needs neither torch nor CUDA. ZINIT_BUILD_FACTS is JSON; kernel_facts.inc is written by the build, from
// what ptxas reports.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "cpu/plan.h"
#include "cuda/decode/plan.h"
#include "cuda/decode/shared_layout.h"
#include "memory.h"

namespace py = pybind11;
using zinit::cuda::choose_num_splits;
using zinit::cuda::DecodePlan;
using zinit::cuda::SharedLayout;

namespace {

constexpr const char* kKernelFacts =
#include "kernel_facts.inc"
    ;

py::dict plan(int multiprocessors, int64_t num_sequences, int64_t num_heads_q, int64_t num_heads_kv,
              int64_t seqlen_q, int64_t capacity, int64_t page_size, bool half_precision, int64_t num_splits,
              int64_t head_dim, int64_t prompt_length, int64_t seqlen_new) {
  if (num_heads_kv <= 0 || num_heads_q % num_heads_kv) {
    throw py::value_error("num_heads_q must be a multiple of num_heads_kv");
  }
  const DecodePlan p = zinit::cuda::plan_decode(multiprocessors, num_sequences, num_heads_kv,
                                                seqlen_q * num_heads_q / num_heads_kv, capacity, page_size,
                                                half_precision, num_splits);
  const SharedLayout shared(p.rows_per_block, static_cast<int>(head_dim), half_precision ? 2 : 4,
                            static_cast<int>(prompt_length), static_cast<int>(seqlen_new));
  return py::dict(py::arg("tensor_cores") = p.tensor_cores, py::arg("rows_per_block") = p.rows_per_block,
                  py::arg("row_blocks") = p.row_blocks, py::arg("num_splits") = p.num_splits,
                  py::arg("shared_bytes") = shared.bytes);
}

py::dict plan_cpu_backward(int64_t num_sequences, int64_t num_heads_q, int64_t num_heads_kv, int64_t seqlen_q,
                           int64_t seqlen_k, int64_t head_dim, int64_t prompt_length, bool packed,
                           bool wants_keys, int64_t threads) {
  zinit::cpu::BackwardWork w{};
  w.num_sequences = num_sequences, w.num_heads_q = num_heads_q, w.num_heads_kv = num_heads_kv;
  w.seqlen_q = seqlen_q, w.seqlen_k = seqlen_k, w.head_dim = head_dim, w.prompt_length = prompt_length;
  w.cu_seqlens_q.given = packed;
  w.grad_key.given = wants_keys, w.grad_prompt_key.given = prompt_length > 0;
  zinit::cpu::plan_backward(w, threads);
  const zinit::cpu::BackwardWorkspace workspace(w);
  return py::dict(
      py::arg("block_queries") = w.block_queries, py::arg("blocks") = w.blocks, py::arg("splits") = w.splits,
      py::arg("in_turn") = w.in_turn, py::arg("key_floats") = workspace.key_floats,
      py::arg("prompt_floats") = workspace.prompt_floats, py::arg("gate_floats") = workspace.gate_floats);
}

py::dict plan_cpu_decode(int64_t num_sequences, int64_t num_heads_q, int64_t num_heads_kv, int64_t seqlen_q,
                         int64_t longest, int64_t head_dim, bool token_major, int64_t num_splits,
                         int64_t threads) {
  zinit::cpu::DecodeWork w{};
  w.num_sequences = num_sequences, w.num_heads_q = num_heads_q, w.num_heads_kv = num_heads_kv;
  w.seqlen_q = seqlen_q, w.head_dim = head_dim, w.num_splits = num_splits;
  w.key_cache.head = token_major ? head_dim : longest * head_dim;
  w.key_cache.token = token_major ? num_heads_kv * head_dim : head_dim;
  zinit::cpu::plan_decode(w, longest, threads);
  return py::dict(py::arg("query_block") = w.query_block, py::arg("query_blocks") = w.query_blocks,
                  py::arg("heads_per_item") = w.heads_per_item, py::arg("head_blocks") = w.head_blocks,
                  py::arg("splits") = w.splits,
                  py::arg("partial_floats") = zinit::cpu::decode_partial_floats(w));
}

using Layout = std::array<int64_t, 4>;

bool share_memory(int64_t begin_a, const Layout& sizes_a, const Layout& strides_a, int64_t begin_b,
                  const Layout& sizes_b, const Layout& strides_b) {
  return zinit::share_memory({static_cast<uintptr_t>(begin_a), 1, sizes_a, strides_a},
                             {static_cast<uintptr_t>(begin_b), 1, sizes_b, strides_b});
}

}  // namespace

PYBIND11_MODULE(_C_host, m) {
  m.doc() = "How calls are cut into pieces, and how the CUDA kernels were built.";
  m.def("choose_num_splits", &choose_num_splits, py::arg("multiprocessors"), py::arg("num_sequences"),
        py::arg("num_heads_kv"), py::arg("row_blocks"), py::arg("capacity"), py::arg("page_size"));
  m.def("plan_decode", &plan, py::arg("multiprocessors"), py::arg("num_sequences"), py::arg("num_heads_q"),
        py::arg("num_heads_kv"), py::arg("seqlen_q"), py::arg("capacity"), py::arg("page_size") = 0,
        py::arg("half_precision") = true, py::arg("num_splits") = 0, py::arg("head_dim") = 128,
        py::arg("prompt_length") = 10, py::arg("seqlen_new") = 1,
        "`shared_bytes`: the dynamic shared memory of a block; that known when it was compiled is in "
        "kernel_facts.");
  m.def("plan_cpu_backward", &plan_cpu_backward, py::kw_only(), py::arg("num_sequences"),
        py::arg("num_heads_q"), py::arg("num_heads_kv"), py::arg("seqlen_q"), py::arg("seqlen_k"),
        py::arg("head_dim") = 64, py::arg("prompt_length") = 0, py::arg("packed") = false,
        py::arg("wants_keys") = true, py::arg("threads"));
  m.def("plan_cpu_decode", &plan_cpu_decode, py::kw_only(), py::arg("num_sequences"), py::arg("num_heads_q"),
        py::arg("num_heads_kv"), py::arg("seqlen_q") = 1, py::arg("longest"), py::arg("head_dim") = 64,
        py::arg("token_major") = true, py::arg("num_splits") = 0, py::arg("threads"));
  m.def("share_memory", &share_memory, "Of two views of one-byte elements: (begin, sizes, strides) of each.");
  m.attr("build_facts") = ZINIT_BUILD_FACTS;
  m.attr("kernel_facts") = kKernelFacts;
}
