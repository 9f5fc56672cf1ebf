// zinit::decode_layers_cpu: the next tokens of cached sequences through all layers of a LLaMA, in one call and
// one parallel region. prefill_layers_cpu: their first tokens. And the same for many tokens: keep_layers_cpu,
// decode_kept_cpu and drop_layers_cpu.
#include <mutex>
#include <unordered_map>

#include "prefill.h"

namespace zinit::cpu {
namespace {

void check_count(int64_t tokens, const char* name) {
  ZINIT_CHECK(tokens <= kMaxLinearRows, name, " must hold at most ", kMaxLinearRows, " tokens, got ", tokens);
}

Tensor decode_layers(const Tensor& input, std::vector<Tensor> weights, std::vector<int64_t> schemes,
                     const Tensor& final_norm, double eps, int64_t num_heads_q, int64_t num_heads_kv,
                     int64_t intermediate, const Tensor& key_cache, const Tensor& value_cache,
                     const Tensor& cache_seqlens, const OptionalTensor& block_table, const Tensor& rotary_cos,
                     const Tensor& rotary_sin, std::vector<Tensor> prompts,
                     std::vector<int64_t> prompt_layers, const OptionalTensor& prompt_index, double scale,
                     int64_t window_left, bool tanh_gate) {
  const Device device = Device::cpu();
  ZINIT_CHECK(input.dim() == 3, "input must have shape (B, T, C), got ", shape_string(input));
  dtype_of(input, "input");
  const ScalarType dtype = input.scalar_type();
  const int64_t B = input.size(0), T = input.size(1), C = input.size(2);
  const void* from = device.array<void>(input, "input", dtype, {B, T, C}).data;
  check_count(B * T, "input");
  LayerStack stack(dtype, C, std::move(weights), schemes, final_norm, key_cache, value_cache, rotary_cos,
                   rotary_sin, std::move(prompts), prompt_layers,
                   {eps, scale, num_heads_q, num_heads_kv, intermediate, window_left, tanh_gate});
  Tensor out = device.empty_contiguous({B, T, C}, dtype);
  stack.run(from, {B, T, cache_seqlens, block_table, prompt_index}, out.data_ptr(), {}, {});
  return out;
}

Tensor prefill_layers(const Tensor& input, std::vector<Tensor> weights, std::vector<int64_t> schemes,
                      const Tensor& final_norm, double eps, int64_t num_heads_q, int64_t num_heads_kv,
                      int64_t intermediate, const Tensor& key_cache, const Tensor& value_cache,
                      const Tensor& cu_seqlens, const Tensor& rotary_cos, const Tensor& rotary_sin,
                      std::vector<Tensor> prompts, std::vector<int64_t> prompt_layers,
                      const OptionalTensor& prompt_index, double scale, int64_t window_left, bool tanh_gate,
                      bool last) {
  const Device device = Device::cpu();
  ZINIT_CHECK(input.dim() == 2, "input must have shape (total, C), got ", shape_string(input));
  ZINIT_CHECK(cu_seqlens.dim() == 1 && cu_seqlens.size(0) >= 1, "cu_seqlens must have shape (B + 1), got ",
              shape_string(cu_seqlens));
  ZINIT_CHECK(kernels().has_many_rows,
              "this processor has no kernels for many rows (they need AVX-512): call the layers one by one");
  dtype_of(input, "input");
  const ScalarType dtype = input.scalar_type();
  const int64_t total = input.size(0), C = input.size(1), B = cu_seqlens.size(0) - 1;
  const void* from = device.array<void>(input, "input", dtype, {total, C}).data;
  const LayerStack stack(dtype, C, std::move(weights), schemes, final_norm, key_cache, value_cache,
                         rotary_cos, rotary_sin, std::move(prompts), prompt_layers,
                         {eps, scale, num_heads_q, num_heads_kv, intermediate, window_left, tanh_gate});
  Prefill prefill(stack, cu_seqlens, prompt_index, total);
  Tensor out = device.empty_contiguous({last ? B : total, C}, dtype);
  prefill.run(from, last, out.data_ptr());
  return out;
}

// A whole model behind cached sequences: from token ids to logits.
class KeptLayers {
 public:
  KeptLayers(std::unique_ptr<LayerStack> stack, ScalarType dtype, const Tensor& embedding,
             int64_t embedding_scheme, const Tensor& head, int64_t head_scheme, int64_t vocab_size)
      : stack_(std::move(stack)),
        dtype_(dtype),
        embedding_(
            weight_of(embedding, "embedding", vocab_size, stack_->hidden_size(), embedding_scheme, dtype)),
        head_(weight_of(head, "head", vocab_size, stack_->hidden_size(), head_scheme, dtype)),
        tensors_{embedding, head} {}

  // Logits [B * T, vocab_size] of tokens [B, T], and the likeliest of each row. Advances cache_seqlens by T.
  std::tuple<Tensor, Tensor> run(const Tensor& tokens, const Tensor& cache_seqlens,
                                 const OptionalTensor& block_table, const OptionalTensor& prompt_index) {
    const std::unique_lock<std::mutex> lock(busy_, std::try_to_lock);
    ZINIT_CHECK(lock.owns_lock(),
                "these layers are decoding for another thread: keep them once for each thread");
    const Device device = Device::cpu();
    const int64_t* ids = device.array<int64_t>(tokens, "tokens", ScalarType::Long, {-1, -1}).data;
    const int64_t B = tokens.size(0), T = tokens.size(1), C = stack_->hidden_size(), V = head_.rows;
    const int64_t M = B * T;
    check_count(M, "tokens");
    int64_t chosen[kMaxLinearRows];  // read once: another thread may write to the tensor
    for (int64_t m = 0; m < M; ++m) {
      chosen[m] = __atomic_load_n(ids + m, __ATOMIC_RELAXED);
      ZINIT_CHECK(chosen[m] >= 0 && chosen[m] < V, "tokens must lie in 0 .. ", V - 1, ", got ", chosen[m]);
    }

    const int64_t bytes = (M * C * size_of(stack_->dtype()) + kAlignment - 1) / kAlignment * kAlignment;
    char* const embedded = memory_.room(std::max(2 * bytes, kAlignment));
    char* const normed = embedded + bytes;
    std::vector<Step> before, after;
    const UnpackWork rows{embedding_, chosen, M, embedded, stack_->dtype()};
    if (embedding_.scheme.packed()) {
      before.push_back(step_of(kernels().unpack, rows));
    } else {
      const int64_t row = C * size_of(stack_->dtype());
      for (int64_t m = 0; m < M; ++m) {
        std::memcpy(embedded + m * row, static_cast<const char*>(embedding_.data) + chosen[m] * row,
                    static_cast<size_t>(row));
      }
    }
    Tensor logits = device.empty_contiguous({M, V}, dtype_);
    Tensor likeliest = device.empty_contiguous({M}, ScalarType::Long);
    LinearWork head{};
    head.num_rows = M, head.input = normed, head.dtype = stack_->dtype();
    head.num_weights = 1, head.weights[0] = head_, head.out[0] = logits.data_ptr();
    after.push_back(step_of(kernels().linear, head));
    const ChoiceWork choice{M, V, logits.data_ptr(), stack_->dtype(),
                            0, 1, nullptr,           static_cast<int64_t*>(likeliest.data_ptr())};
    after.push_back(step_of(kernels().choice, choice));
    stack_->run(embedded, {B, T, cache_seqlens, block_table, prompt_index}, normed, before, after);
    auto* lengths = static_cast<int32_t*>(cache_seqlens.data_ptr());  // run() has checked them
    for (int64_t b = 0; b < B; ++b) lengths[b] += static_cast<int32_t>(T);
    return {std::move(logits), std::move(likeliest)};
  }

 private:
  const std::unique_ptr<LayerStack> stack_;
  const ScalarType dtype_;
  const LinearWeight embedding_, head_;
  const std::vector<Tensor> tensors_;  // so that their memory stays
  Memory memory_;
  std::mutex busy_;
};

// The kept layers of this process, by their numbers.
class Kept {
 public:
  int64_t add(std::shared_ptr<KeptLayers> layers) {
    const std::lock_guard<std::mutex> lock(mutex_);
    layers_[++last_] = std::move(layers);
    return last_;
  }
  std::shared_ptr<KeptLayers> at(int64_t number) {
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto found = layers_.find(number);
    ZINIT_CHECK(found != layers_.end(),
                "layers must be a number that keep_layers_cpu gave and drop_layers_cpu did not "
                "take back, got ",
                number);
    return found->second;
  }
  void drop(int64_t number) {
    std::shared_ptr<KeptLayers> dropped;  // freed behind the lock
    const std::lock_guard<std::mutex> lock(mutex_);
    if (const auto found = layers_.find(number); found != layers_.end()) {
      dropped = std::move(found->second);
      layers_.erase(found);
    }
  }

 private:
  std::mutex mutex_;
  std::unordered_map<int64_t, std::shared_ptr<KeptLayers>> layers_;
  int64_t last_ = 0;
};

// Never destroyed: torch may be gone by the time when the destructors of static objects run.
Kept& kept() {
  static Kept* const all = new Kept;
  return *all;
}

int64_t keep_layers(std::vector<Tensor> weights, std::vector<int64_t> schemes, const Tensor& final_norm,
                    double eps, int64_t num_heads_q, int64_t num_heads_kv, int64_t intermediate,
                    const Tensor& key_cache, const Tensor& value_cache, const Tensor& rotary_cos,
                    const Tensor& rotary_sin, std::vector<Tensor> prompts, std::vector<int64_t> prompt_layers,
                    double scale, int64_t window_left, bool tanh_gate, const Tensor& embedding,
                    int64_t embedding_scheme, const Tensor& head, int64_t head_scheme, int64_t vocab_size) {
  ZINIT_CHECK(final_norm.dim() == 1, "final_norm must have shape (C), got ", shape_string(final_norm));
  const ScalarType dtype = final_norm.scalar_type();
  auto stack = std::make_unique<LayerStack>(
      dtype, final_norm.size(0), std::move(weights), schemes, final_norm, key_cache, value_cache, rotary_cos,
      rotary_sin, std::move(prompts), prompt_layers,
      StackOptions{eps, scale, num_heads_q, num_heads_kv, intermediate, window_left, tanh_gate});
  return kept().add(std::make_shared<KeptLayers>(std::move(stack), dtype, embedding, embedding_scheme, head,
                                                 head_scheme, vocab_size));
}

std::tuple<Tensor, Tensor> decode_kept(int64_t layers, const Tensor& tokens, const Tensor& cache_seqlens,
                                       const OptionalTensor& block_table,
                                       const OptionalTensor& prompt_index) {
  return kept().at(layers)->run(tokens, cache_seqlens, block_table, prompt_index);
}

void drop_layers(int64_t layers) { kept().drop(layers); }

}  // namespace
}  // namespace zinit::cpu

STABLE_TORCH_LIBRARY_IMPL(zinit, CompositeExplicitAutograd, m) {
  m.impl("decode_layers_cpu", TORCH_BOX(&zinit::cpu::decode_layers));
  m.impl("prefill_layers_cpu", TORCH_BOX(&zinit::cpu::prefill_layers));
  m.impl("keep_layers_cpu", TORCH_BOX(&zinit::cpu::keep_layers));
  m.impl("decode_kept_cpu", TORCH_BOX(&zinit::cpu::decode_kept));
  m.impl("drop_layers_cpu", TORCH_BOX(&zinit::cpu::drop_layers));
}
