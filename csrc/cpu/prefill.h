// A prompt's pass: packed sequences through all layers of a LayerStack, into caches that have none of their tokens yet.
//
// A layer is norm, the query, key and value product, rotary embedding and cache, attention, the output product with its
// residual, norm, the gated product, and the last product with its residual: eight stages of one parallel region.
#pragma once
#include <deque>

#include "layer_stack.h"

namespace zinit::cpu {

// Rows that are copied: to[i] = from[indices[i]].
struct GatherWork {
  int64_t num_rows, row_bytes;
  const int64_t* indices;
  const char* from;
  char* to;
};

inline const Stage<GatherWork> kGather = {
    [](const GatherWork&) -> int64_t { return 1; }, [](const GatherWork&) -> int64_t { return 0; },
    [](const GatherWork& w, int64_t, int64_t, void*) {
      for (int64_t i = 0; i < w.num_rows; ++i) {
        std::memcpy(w.to + i * w.row_bytes, w.from + w.indices[i] * w.row_bytes,
                    static_cast<size_t>(w.row_bytes));
      }
    }};

class Prefill {
 public:
  // cu_seqlens [B + 1]: sequence b has rows cu_seqlens[b] .. cu_seqlens[b + 1] of the `total` ones.
  Prefill(const LayerStack& stack, const Tensor& cu_seqlens, const OptionalTensor& prompt_index,
          int64_t total)
      : stack_(stack), common_(stack.common()), total_(total) {
    const Device device = Device::cpu();
    const int64_t B = common_.num_sequences = cu_seqlens.size(0) - 1;
    ZINIT_CHECK(common_.num_pages == B, "key_cache is made for ", common_.num_pages, " sequences, got ", B);
    common_.prompt_index = device.array<int32_t>(prompt_index, "prompt_index", ScalarType::Int, {B});
    copies_.replace(common_.prompt_index, B);
    common_.cu_seqlens_q = device.array<int32_t>(cu_seqlens, "cu_seqlens", ScalarType::Int, {B + 1});
    const int64_t capacity = std::min(common_.page_size, common_.rotary.positions);
    copy_cumulative(common_.cu_seqlens_q, "cu_seqlens", B, capacity, total, copies_);
    common_.cu_seqlens_k = common_.cu_seqlens_q;
    common_.seqlen_q = common_.seqlen_k = longest_of(common_.cu_seqlens_q, B);
    const StackOptions& options = stack.options();
    set_mask(common_, options.scale, 0.0, options.window_left, 0, options.tanh_gate);
  }

  // The normed hidden states of all tokens, out [total, C]; or, `last`, of each sequence's last one, out [B, C].
  void run(const void* input, bool last, void* out) {
    const int64_t B = common_.num_sequences, C = stack_.hidden_size(), element = size_of(stack_.dtype());
    for (int64_t b = 0; last && b < B; ++b) {
      last_rows_.push_back(common_.cu_seqlens_q.data[b + 1] - 1);
      ZINIT_CHECK(common_.cu_seqlens_q.data[b + 1] > common_.cu_seqlens_q.data[b], "sequence ", b,
                  " has no tokens, and so no last one");
    }
    place(B);
    const void* stream = input;
    for (const Layer& layer : stack_.layers()) {
      attend(layer, stream);
      const void* attended = at_out_;
      int64_t rows = total_;
      if (last && &layer == &stack_.layers().back()) {  // nobody reads the others
        attended = gather(attended, layer.out.weights[0].columns * element, chosen_out_);
        stream = gather(stream, C * element, chosen_stream_);
        rows = B;
      }
      multiply(layer.out, rows, attended, stream, at_middle_);
      multiply(layer.up, rows, at_middle_, nullptr, at_up_);
      multiply(layer.down, rows, at_up_, at_middle_, at_end_);
      stream = at_end_;
    }
    norm(last ? B : total_, stream, stack_.final_norm(), out);
    run_steps(steps_);
  }

 private:
  // The places between the stages, the same for every layer.
  void place(int64_t B) {
    const int64_t element = size_of(stack_.dtype()), D = common_.head_dim;
    const int64_t query = common_.num_heads_q * D, key = common_.num_heads_kv * D, C = stack_.hidden_size();
    Parts parts;
    const auto rows = [&](int64_t count, int64_t width) { return parts.reserve(count * width * element); };
    const int64_t places[] = {rows(total_, query), rows(total_, key),
                              rows(total_, key),   rows(total_, query),
                              rows(total_, C),     rows(total_, C),
                              rows(total_, C),     rows(B, query),
                              rows(B, C),          rows(total_, stack_.options().intermediate)};
    const int64_t at_lse = parts.reserve(total_ * common_.num_heads_q * 4);
    char* const memory = memory_.room(std::max(parts.used(), kAlignment));
    const auto packed = [&](int i, int64_t width) {
      return View{memory + places[i], 0, D, width, stack_.dtype(), true};
    };
    common_.query = packed(0, query), common_.new_key = packed(1, key), common_.new_value = packed(2, key);
    common_.out = packed(3, query), common_.lse = reinterpret_cast<float*>(memory + at_lse);
    at_out_ = memory + places[3], at_normed_ = memory + places[4], at_middle_ = memory + places[5];
    at_end_ = memory + places[6], chosen_out_ = memory + places[7], chosen_stream_ = memory + places[8];
    at_up_ = memory + places[9];
  }

  // Up to the attention of a layer.
  void attend(const Layer& layer, const void* stream) {
    LinearWork qkv = layer.qkv;
    qkv.out[1] = common_.new_key.data, qkv.out[2] = common_.new_value.data;
    multiply(qkv, total_, stream, nullptr, common_.query.data);
    const DecodeWork& fill = fills_.emplace_back(of_layer(common_, layer));
    steps_.push_back(step_of(kernels().cache_fill, fill));
    ForwardParams& w = attentions_.emplace_back();
    static_cast<AttentionParams&>(w) = fill;
    w.query = common_.query, w.key = common_.new_key, w.value = common_.new_value;
    w.out = common_.out, w.lse = common_.lse;
    steps_.push_back(step_of(kernels().forward, w));
  }

  // A product of some rows, and the norm before it.
  void multiply(LinearWork w, int64_t rows, const void* input, const void* residual, void* out) {
    w.num_rows = rows, w.input = input, w.residual = residual, w.out[0] = out;
    if (rows <= kFewRows) {
      steps_.push_back(step_of(kernels().linear, few_.emplace_back(w)));
      return;
    }
    if (w.norm_weight != nullptr) {
      norm(rows, input, w.norm_weight, at_normed_);
      w.input = at_normed_, w.norm_weight = nullptr;
    }
    const ManyWork& many = many_.emplace_back(plan_many(w, torch::stable::get_num_threads()));
    steps_.push_back(step_of(kernels().many, many));
  }

  void norm(int64_t rows, const void* input, const void* weight, void* out) {
    const auto eps = static_cast<float>(stack_.options().eps);
    const NormWork w{rows, stack_.hidden_size(), input, weight, eps, stack_.dtype(), out, nullptr};
    steps_.push_back(step_of(kernels().norm, norms_.emplace_back(w)));
  }

  const void* gather(const void* from, int64_t row_bytes, char* to) {
    const GatherWork w{static_cast<int64_t>(last_rows_.size()), row_bytes, last_rows_.data(),
                       static_cast<const char*>(from), to};
    steps_.push_back(step_of(kGather, gathers_.emplace_back(w)));
    return to;
  }

  static constexpr int64_t kFewRows = 32;  // beyond that the kernels for many rows are faster

  const LayerStack& stack_;
  DecodeWork common_;
  const int64_t total_;
  Copies copies_;
  Memory memory_;
  std::vector<int64_t> last_rows_;
  char *at_out_ = nullptr, *at_normed_ = nullptr, *at_middle_ = nullptr, *at_end_ = nullptr;
  char *at_up_ = nullptr, *chosen_out_ = nullptr, *chosen_stream_ = nullptr;
  std::vector<Step> steps_;
  // What the steps read; deques, so that it stays where it is
  std::deque<NormWork> norms_;
  std::deque<LinearWork> few_;
  std::deque<ManyWork> many_;
  std::deque<DecodeWork> fills_;
  std::deque<ForwardParams> attentions_;
  std::deque<GatherWork> gathers_;
};

}  // namespace zinit::cpu
