// _C_host: what the CUDA kernels' launcher decides on the host, and how they were built. No torch, no CUDA:
// it loads where neither does. ZINIT_BUILD_FACTS is JSON; kernel_facts.inc is written by the build from
// ptxas' own account.
#include <pybind11/pybind11.h>

#include "cuda/decode/plan.h"
#include "cuda/decode/shared_layout.h"

namespace py = pybind11;
using namespace zinit::cuda;

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
  const DecodePlan p =
      plan_decode(multiprocessors, num_sequences, num_heads_kv, seqlen_q * num_heads_q / num_heads_kv,
                  capacity, page_size, half_precision, num_splits);
  const SharedLayout shared(p.rows_per_block, static_cast<int>(head_dim), half_precision ? 2 : 4,
                            static_cast<int>(prompt_length), static_cast<int>(seqlen_new));
  return py::dict(py::arg("tensor_cores") = p.tensor_cores, py::arg("rows_per_block") = p.rows_per_block,
                  py::arg("row_blocks") = p.row_blocks, py::arg("num_splits") = p.num_splits,
                  py::arg("shared_bytes") = shared.bytes);
}

}  // namespace

PYBIND11_MODULE(_C_host, m) {
  m.doc() = "How a decode call is cut into blocks, and how the CUDA kernels were built.";
  m.def("choose_num_splits", &choose_num_splits, py::arg("multiprocessors"), py::arg("num_sequences"),
        py::arg("num_heads_kv"), py::arg("row_blocks"), py::arg("capacity"), py::arg("page_size"));
  m.def("plan_decode", &plan, py::arg("multiprocessors"), py::arg("num_sequences"), py::arg("num_heads_q"),
        py::arg("num_heads_kv"), py::arg("seqlen_q"), py::arg("capacity"), py::arg("page_size") = 0,
        py::arg("half_precision") = true, py::arg("num_splits") = 0, py::arg("head_dim") = 128,
        py::arg("prompt_length") = 10, py::arg("seqlen_new") = 1,
        "`shared_bytes`: the dynamic shared memory of a block; that known when it was compiled is in "
        "kernel_facts.");
  m.attr("build_facts") = ZINIT_BUILD_FACTS;
  m.attr("kernel_facts") = kKernelFacts;
}
