// The layers of a LLaMA behind cached sequences: checked once, then run for the next tokens as often as wanted.
//
// A model of 30 layers has 270 weights. libtorch takes 0.3 ms to hand them over and to answer what is asked about them,
// because between two tokens the weights themselves have gone through every cache. So whoever decodes many tokens keeps
// a LayerStack (bindings_layers.cpp), and a token hands over two tensors.
#pragma once
#include <cstring>
#include <utility>

#include "arguments.h"
#include "linear_arguments.h"
#include "plan.h"
#include "run_steps.h"

namespace zinit::cpu {

// The tensors of a layer, in this order; all but the two norms have a scheme.
constexpr size_t kTensors = 9, kWeights = 7;
enum { kInputNorm, kQuery, kKey, kValue, kOut, kMlpNorm, kGate, kUp, kDown };
constexpr const char* kTensorNames[] = {"input_norm",   "query weight", "key weight",
                                        "value weight", "out weight",   "mlp_norm",
                                        "gate weight",  "up weight",    "down weight"};

constexpr int64_t kAlignment = 64;

// Memory between the steps: every part starts at a multiple of 64 bytes.
class Parts {
 public:
  int64_t reserve(int64_t bytes) {
    const int64_t at = used_;
    used_ += (bytes + kAlignment - 1) / kAlignment * kAlignment;
    return at;
  }
  int64_t used() const { return used_; }

 private:
  int64_t used_ = 0;
};

// New keys and values are written at places of their own: within a layer, in other layers, in the other cache.
inline void check_places(const Tensor& key_cache, const Tensor& value_cache, int64_t element) {
  uintptr_t begin[2], end[2];
  int i = 0;
  for (const Tensor* cache : {&key_cache, &value_cache}) {
    Footprint layer{reinterpret_cast<uintptr_t>(cache->data_ptr()), element, {}, {}};
    for (int64_t d = 0; d < 4; ++d) {
      layer.sizes[static_cast<size_t>(d)] = cache->size(d + 1);
      layer.strides[static_cast<size_t>(d)] = cache->stride(d + 1);
    }
    if (layer.is_empty() || cache->size(0) == 0) return;
    const int64_t step = cache->stride(0) * element;
    ZINIT_CHECK(!overlaps_itself(layer) && (cache->size(0) == 1 || step >= layer.reach() + element),
                i == 0 ? "key_cache" : "value_cache",
                " must have a place for each element, and its layers must follow one another in memory");
    begin[i] = layer.begin;
    end[i++] = layer.begin + static_cast<uintptr_t>((cache->size(0) - 1) * step + layer.reach() + element);
  }
  ZINIT_CHECK(end[0] <= begin[1] || end[1] <= begin[0], "key_cache and value_cache must lie apart in memory");
}

// One layer: its weights, its part of the cache and its prompts from the beginning, the rest for each run.
struct Layer {
  LinearWork qkv, out, up, down;
  DecodeWork own;  // cache and prompts alone
  DecodeWork append;
  std::vector<DecodeWork> attention;
};

// What a call has for all layers, with a layer's part of the cache and its prompts.
inline DecodeWork of_layer(const DecodeWork& common, const Layer& layer) {
  DecodeWork w = common;
  w.key_cache = layer.own.key_cache, w.value_cache = layer.own.value_cache;
  if (layer.own.prompt_key.given) {
    w.prompt_key = layer.own.prompt_key, w.prompt_value = layer.own.prompt_value;
    w.prompt_length = layer.own.prompt_length, w.prompt_rows = layer.own.prompt_rows;
    w.gate = layer.own.gate, w.gate_rows = layer.own.gate_rows;
    check_prompt_rows(w);
    if (w.prompt_index.given) check_prompt_index(w);
  }
  return w;
}

// Attention of the tokens first .. last of a single sequence, each as a sequence of its own with its own length
// and with as many splits as it would have alone: so it has the same bits as when tokens come one by one.
inline DecodeWork tokens_alone(const DecodeWork& common, int64_t first, int64_t last, Copies& copies) {
  DecodeWork w = common;
  const int64_t element = size_of(w.query.dtype);
  for (View* view : {&w.query, &w.out}) {
    view->data = static_cast<char*>(view->data) + first * view->token * element;
    view->batch = view->token;
  }
  w.num_sequences = last - first, w.seqlen_q = 1, w.seqlen_new = 1;
  w.lse += first * w.num_heads_q;
  if (w.block_table.given) {
    w.block_table_stride = 0;
  } else {
    w.key_cache.batch = 0, w.value_cache.batch = 0;
  }
  int32_t* lengths = copies.room(last - first);
  for (int64_t t = first; t < last; ++t)
    lengths[t - first] = common.cache_seqlens.data[0] + static_cast<int32_t>(t);
  w.cache_seqlens.data = lengths;
  if (w.prompt_index.given) {
    int32_t* rows = copies.room(last - first);
    for (int64_t t = first; t < last; ++t) rows[t - first] = common.prompt_index.data[0];
    w.prompt_index.data = rows;
  }
  return w;
}

// The attention of a layer: one call for all tokens, or for each run of tokens with as many splits.
inline std::vector<DecodeWork> plan_attention(const DecodeWork& common, int64_t longest, Copies& copies) {
  const int64_t threads = torch::stable::get_num_threads();
  std::vector<DecodeWork> found;
  if (common.num_sequences != 1 || common.seqlen_q == 1) {
    found.push_back(common);
    plan_decode(found.back(), longest, threads);
    return found;
  }
  const auto splits_of = [&](int64_t t) {
    DecodeWork alone = common;
    alone.seqlen_q = 1;
    plan_decode(alone, common.cache_seqlens.data[0] + t + 1, threads);
    return alone.splits;
  };
  for (int64_t first = 0, last = 0; first < common.seqlen_q; first = last) {
    const int64_t splits = splits_of(first);
    while (last < common.seqlen_q && splits_of(last) == splits) ++last;
    found.push_back(tokens_alone(common, first, last, copies));
    found.back().num_splits = splits;
    plan_decode(found.back(), common.cache_seqlens.data[0] + last, threads);
  }
  return found;
}

// Memory that grows, and is kept from run to run.
class Memory {
 public:
  char* room(int64_t bytes) {
    if (bytes > capacity_) {
      memory_.reset();
      memory_.reset(std::aligned_alloc(kAlignment, static_cast<size_t>(bytes)));
      capacity_ = memory_ ? bytes : 0;
      ZINIT_CHECK(memory_ != nullptr, "out of memory: ", bytes, " bytes between the layers");
    }
    if (poison_outputs()) std::memset(memory_.get(), 0xff, static_cast<size_t>(bytes));
    return static_cast<char*>(memory_.get());
  }

 private:
  std::unique_ptr<void, decltype(&std::free)> memory_{nullptr, &std::free};
  int64_t capacity_ = 0;
};

// What the operator is told about the layers, apart from their tensors.
struct StackOptions {
  double eps, scale;
  int64_t num_heads_q, num_heads_kv, intermediate, window_left;
  bool tanh_gate;
};

// B sequences, and the next T tokens of each.
struct NextTokens {
  int64_t B, T;
  const Tensor& cache_seqlens;         // int32 [B], before them
  const OptionalTensor& block_table;   // int32 [B, columns]; the cache is then pages
  const OptionalTensor& prompt_index;  // int32 [B]
};

class LayerStack {
 public:
  // C hidden size. The tensors are kept, and must keep their memory. A cache of pages serves any sequences; another
  // one serves as many as it was made for.
  LayerStack(ScalarType dtype, int64_t C, std::vector<Tensor> weights, const std::vector<int64_t>& schemes,
             const Tensor& final_norm, const Tensor& key_cache, const Tensor& value_cache,
             const Tensor& rotary_cos, const Tensor& rotary_sin, std::vector<Tensor> prompts,
             const std::vector<int64_t>& prompt_layers, const StackOptions& options)
      : options_(options), type_(dtype_of(final_norm, "final_norm")), C_(C) {
    ZINIT_CHECK(
        key_cache.dim() == 5,
        "key_cache must have shape (layers, B, S, Hkv, D) or (layers, pages, page size, Hkv, D), got ",
        shape_string(key_cache));
    const int64_t L = key_cache.size(0), N = key_cache.size(1), S = key_cache.size(2), D = key_cache.size(4);
    const int64_t Hq = options.num_heads_q, Hkv = options.num_heads_kv, I = options.intermediate;
    const int64_t element = size_of(type_);
    ZINIT_CHECK(D >= 1 && D <= kMaxHeadDim, "head_dim must lie in 1 .. ", kMaxHeadDim, ", got ", D);
    ZINIT_CHECK(Hkv > 0 && Hq > 0 && Hq % Hkv == 0 && Hq < (1 << 20), "the ", Hq,
                " query heads must be a multiple of the ", Hkv, " key/value heads");
    ZINIT_CHECK(I > 0, "intermediate must be positive, got ", I);
    check_shape(key_cache, "key_cache", {L, N, S, Hkv, D});
    check_shape(value_cache, "value_cache", {L, N, S, Hkv, D});
    ZINIT_CHECK(weights.size() == kTensors * static_cast<size_t>(L), "weights must be ", kTensors,
                " tensors for each of the ", L, " layers, got ", weights.size());
    ZINIT_CHECK(schemes.size() == kWeights * static_cast<size_t>(L), "schemes must be ", kWeights,
                " numbers for each of the ", L, " layers, got ", schemes.size());
    ZINIT_CHECK(prompts.size() == 3 * prompt_layers.size(), "prompts must be 3 tensors for each of the ",
                prompt_layers.size(), " adapted layers, got ", prompts.size());
    for (const auto& [tensor, name] : {std::pair{&key_cache, "key_cache"}, {&value_cache, "value_cache"}}) {
      device_.check(*tensor, name);
      ZINIT_CHECK(tensor->scalar_type() == dtype, name, " must have the input's dtype ", dtype, ", got ",
                  tensor->scalar_type());
      ZINIT_CHECK(D == 1 || tensor->stride(4) == 1, name, " must be contiguous in its last dimension");
    }
    check_places(key_cache, value_cache, element);
    final_norm_ = norm(final_norm, "final_norm", dtype);

    common_.num_heads_q = Hq, common_.num_heads_kv = Hkv, common_.head_dim = D;
    common_.num_pages = N, common_.page_size = S;
    set_rotary(common_, device_, rotary_cos, rotary_sin, false, true);
    layers_.resize(static_cast<size_t>(L));
    size_t next_prompt = 0;
    for (int64_t l = 0; l < L; ++l) {
      Layer& layer = layers_[static_cast<size_t>(l)];
      set_weights(layer, weights.data() + static_cast<size_t>(l) * kTensors,
                  schemes.data() + static_cast<size_t>(l) * kWeights, dtype);
      DecodeWork& w = layer.own = common_;
      const auto cache_of = [&](const Tensor& cache) {
        char* data = static_cast<char*>(cache.data_ptr());
        return View{data == nullptr ? nullptr : data + l * cache.stride(0) * element,
                    cache.stride(1),
                    cache.stride(3),
                    cache.stride(2),
                    type_,
                    true};
      };
      w.key_cache = cache_of(key_cache), w.value_cache = cache_of(value_cache);
      if (next_prompt < prompt_layers.size() && prompt_layers[next_prompt] == l) {
        const Tensor* of_layer = prompts.data() + 3 * next_prompt++;
        set_prompt_table(w, device_, zinit::Layout::kTokenMajor, of_layer[0], of_layer[1], of_layer[2]);
      }
    }
    ZINIT_CHECK(next_prompt == prompt_layers.size(), "prompt_layers must rise and be below ", L);
    tensors_ = std::move(weights);
    tensors_.insert(tensors_.end(), {final_norm, key_cache, value_cache, rotary_cos, rotary_sin});
    tensors_.insert(tensors_.end(), prompts.begin(), prompts.end());
  }

  DType dtype() const { return type_; }
  int64_t hidden_size() const { return C_; }
  const StackOptions& options() const { return options_; }
  const std::vector<Layer>& layers() const { return layers_; }
  const void* final_norm() const { return final_norm_; }
  const DecodeWork& common() const { return common_; }  // what all layers share: shapes and rotary tables

  // The normed hidden states of the next tokens, from input to out [B, T, C]. The caches are written; cache_seqlens
  // stays. Steps that make the input run before, and those that need out after. Two rows of tokens may be of one
  // sequence: all keys are written before any token attends.
  void run(const void* input, const NextTokens& next, void* out, const std::vector<Step>& before,
           const std::vector<Step>& after) {
    const int64_t M = next.B * next.T;
    Copies copies;
    DecodeWork common = common_;
    set_sequences(common, next);
    const int64_t longest = copy_lengths(common, copies);
    copies.replace(common.prompt_index, next.B);
    const char* const hidden = place(common, next.T);

    std::vector<Step> steps = before;
    steps.reserve(before.size() + layers_.size() * 9 + 1 + after.size());
    const void* stream = input;
    int64_t floats = 0;
    for (Layer& layer : layers_) {
      stream = place(layer, common, stream, hidden);
      layer.attention = plan_attention(layer.append, longest, copies);
      steps.push_back(step_of(kernels().linear, layer.qkv));
      steps.push_back(step_of(kernels().decode_append, layer.append));
      for (const DecodeWork& tokens : layer.attention) {
        floats = std::max(floats, decode_partial_floats(tokens));
        steps.push_back(step_of(kernels().decode_attend, tokens));
        if (tokens.splits > 1) steps.push_back(step_of(kernels().decode_combine, tokens));
      }
      steps.push_back(step_of(kernels().linear, layer.out));
      steps.push_back(step_of(kernels().linear, layer.up));
      steps.push_back(step_of(kernels().linear, layer.down));
    }
    auto* partials = reinterpret_cast<float*>(partials_.room(floats * 4));
    for (Layer& layer : layers_) {
      for (DecodeWork& tokens : layer.attention) tokens.partials = partials;
    }
    const NormWork norm{M, C_, stream, final_norm_, static_cast<float>(options_.eps), type_, out, nullptr};
    steps.push_back(step_of(kernels().norm, norm));
    steps.insert(steps.end(), after.begin(), after.end());
    run_steps(steps);
  }

 private:
  const void* norm(const Tensor& tensor, const char* name, ScalarType dtype) const {
    return device_.array<void>(tensor, name, dtype, {C_}).data;
  }

  void set_weights(Layer& layer, const Tensor* own, const int64_t* schemes, ScalarType dtype) const {
    const int64_t D = common_.head_dim, Hq = common_.num_heads_q, Hkv = common_.num_heads_kv;
    const int64_t I = options_.intermediate;
    using Shapes = std::initializer_list<std::pair<int64_t, int64_t>>;
    const auto linear = [&](LinearWork& w, int first, const Shapes& shapes) {
      w.dtype = type_, w.eps = static_cast<float>(options_.eps);
      for (int i = first; const auto& [rows, columns] : shapes) {
        const int64_t scheme = schemes[i < kMlpNorm ? i - 1 : i - 2];
        w.weights[w.num_weights++] = weight_of(own[i], kTensorNames[i], rows, columns, scheme, dtype);
        ++i;
      }
    };
    layer = {};
    linear(layer.qkv, kQuery, {{Hq * D, C_}, {Hkv * D, C_}, {Hkv * D, C_}});
    layer.qkv.norm_weight = norm(own[kInputNorm], "input_norm", dtype);
    linear(layer.out, kOut, {{C_, Hq * D}});
    linear(layer.up, kGate, {{I, C_}, {I, C_}});
    layer.up.norm_weight = norm(own[kMlpNorm], "mlp_norm", dtype);
    layer.up.gated = true;
    ZINIT_CHECK(schemes[4] == schemes[5], "gate and up of a layer must have one scheme, got ", schemes[4],
                " and ", schemes[5]);
    linear(layer.down, kDown, {{C_, I}});
  }

  void set_sequences(DecodeWork& common, const NextTokens& next) const {
    const int64_t B = next.B;
    common.num_sequences = B, common.seqlen_q = next.T, common.seqlen_new = next.T;
    common.cache_seqlens = device_.array<int32_t>(next.cache_seqlens, "cache_seqlens", ScalarType::Int, {B});
    common.block_table = device_.array<int32_t>(next.block_table, "block_table", ScalarType::Int, {B, -1});
    common.prompt_index = device_.array<int32_t>(next.prompt_index, "prompt_index", ScalarType::Int, {B});
    if (common.block_table.given) {
      common.block_table_stride = next.block_table->size(1);
      common.seqlen_k = common.block_table_stride * common.page_size;
    } else {
      ZINIT_CHECK(common.num_pages == B, "key_cache is made for ", common.num_pages, " sequences, got ", B,
                  ": give a block_table where it is made of pages");
      common.seqlen_k = common.page_size;
    }
    const auto adapted = [](const Layer& layer) { return layer.own.prompt_key.given; };
    ZINIT_CHECK(!common.prompt_index.given || std::ranges::any_of(layers_, adapted),
                "prompt_index needs prompts");
  }

  // The places between the steps, the same for every layer. Returns where they begin.
  char* place(DecodeWork& common, int64_t T) {
    const int64_t M = common.num_sequences * T, element = size_of(type_);
    const int64_t query = common.num_heads_q * common.head_dim, key = common.num_heads_kv * common.head_dim;
    Parts parts;
    at_stream_[0] = parts.reserve(M * C_ * element), at_stream_[1] = parts.reserve(M * C_ * element);
    at_up_ = parts.reserve(M * options_.intermediate * element);
    const int64_t at_query = parts.reserve(M * query * element), at_out = parts.reserve(M * query * element);
    const int64_t at_key = parts.reserve(M * key * element), at_value = parts.reserve(M * key * element);
    const int64_t at_lse = parts.reserve(M * common.num_heads_q * 4);
    char* const memory = memory_.room(std::max(parts.used(), kAlignment));
    const auto token_major = [&](int64_t at, int64_t width) {
      return View{memory + at, T * width, common.head_dim, width, type_, true};
    };
    common.query = token_major(at_query, query), common.out = token_major(at_out, query);
    common.new_key = token_major(at_key, key), common.new_value = token_major(at_value, key);
    common.lse = reinterpret_cast<float*>(memory + at_lse);
    set_mask(common, options_.scale, 0.0, options_.window_left, 0, options_.tanh_gate);
    return memory;
  }

  // A layer that reads `stream`. Returns what the next one reads.
  const void* place(Layer& layer, const DecodeWork& common, const void* stream, const char* memory) const {
    void* const middle = const_cast<char*>(memory) + at_stream_[0];
    void* const end = const_cast<char*>(memory) + at_stream_[1];
    void* const up = const_cast<char*>(memory) + at_up_;
    const DecodeWork& w = layer.append = of_layer(common, layer);
    for (LinearWork* linear : {&layer.qkv, &layer.out, &layer.up, &layer.down}) {
      linear->num_rows = common.num_sequences * common.seqlen_q;
    }
    layer.qkv.input = stream;
    layer.qkv.out[0] = w.query.data, layer.qkv.out[1] = w.new_key.data, layer.qkv.out[2] = w.new_value.data;
    layer.out.input = w.out.data, layer.out.residual = stream, layer.out.out[0] = middle;
    layer.up.input = middle, layer.up.out[0] = up;
    layer.down.input = up, layer.down.residual = middle, layer.down.out[0] = end;
    return end;
  }

  const Device device_ = Device::cpu();
  const StackOptions options_;
  const DType type_;
  const int64_t C_;
  const void* final_norm_ = nullptr;
  DecodeWork common_{};
  std::vector<Layer> layers_;
  std::vector<Tensor> tensors_;  // so that their memory stays
  Memory memory_, partials_;
  int64_t at_stream_[2] = {}, at_up_ = 0;  // in memory_
};

}  // namespace zinit::cpu
