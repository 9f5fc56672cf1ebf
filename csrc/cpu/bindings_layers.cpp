// zinit::decode_layers_cpu: the next tokens of cached sequences through all layers of a LLaMA, in one call and
// one parallel region.
#include <cstring>
#include <utility>

#include "arguments.h"
#include "linear_arguments.h"
#include "plan.h"
#include "run_steps.h"

namespace zinit::cpu {
namespace {

constexpr size_t kTensors = 9, kWeights = 7;  // of a layer
// The tensors of a layer, in this order.
enum { kInputNorm, kQuery, kKey, kValue, kOut, kMlpNorm, kGate, kUp, kDown };

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
void check_places(const Tensor& key_cache, const Tensor& value_cache, int64_t element) {
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

struct Layer {
  LinearWork qkv, out, up, down;
  DecodeWork append;
  std::vector<DecodeWork> attention;
};

// Attention of the tokens first .. last of a single sequence, each as a sequence of its own with its own length
// and with as many splits as it would have alone: so it has the same bits as when tokens come one by one.
DecodeWork tokens_alone(const DecodeWork& common, int64_t first, int64_t last, Copies& copies) {
  DecodeWork w = common;
  const int64_t element = size_of(w.query.dtype);
  for (View* view : {&w.query, &w.out}) {
    view->data = static_cast<char*>(view->data) + first * view->token * element;
    view->batch = view->token;
  }
  w.num_sequences = last - first, w.seqlen_q = 1, w.seqlen_new = 1;
  w.lse += first * w.num_heads_q;
  w.key_cache.batch = 0, w.value_cache.batch = 0;
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
std::vector<DecodeWork> plan_attention(const DecodeWork& common, int64_t longest, Copies& copies) {
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

Tensor decode_layers(const Tensor& input, std::vector<Tensor> weights, std::vector<int64_t> schemes,
                     const Tensor& final_norm, double eps, int64_t num_heads_q, int64_t num_heads_kv,
                     int64_t intermediate, const Tensor& key_cache, const Tensor& value_cache,
                     const Tensor& cache_seqlens, const Tensor& rotary_cos, const Tensor& rotary_sin,
                     std::vector<Tensor> prompts, std::vector<int64_t> prompt_layers,
                     const OptionalTensor& prompt_index, double scale, int64_t window_left, bool tanh_gate) {
  const Device device = Device::cpu();
  ZINIT_CHECK(input.dim() == 3, "input must have shape (B, T, C), got ", shape_string(input));
  ZINIT_CHECK(key_cache.dim() == 5, "key_cache must have shape (layers, B, S, Hkv, D), got ",
              shape_string(key_cache));
  const ScalarType dtype = input.scalar_type();
  const int64_t B = input.size(0), T = input.size(1), C = input.size(2), M = B * T;
  const int64_t L = key_cache.size(0), S = key_cache.size(2), D = key_cache.size(4);
  const int64_t Hq = num_heads_q, Hkv = num_heads_kv, I = intermediate;
  const DType type = dtype_of(input, "input");
  const int64_t element = size_of(type);
  device.array<void>(input, "input", dtype, {B, T, C});
  ZINIT_CHECK(M <= kMaxLinearRows, "input must hold at most ", kMaxLinearRows, " tokens, got ", M);
  ZINIT_CHECK(D >= 1 && D <= kMaxHeadDim, "head_dim must lie in 1 .. ", kMaxHeadDim, ", got ", D);
  ZINIT_CHECK(Hkv > 0 && Hq > 0 && Hq % Hkv == 0 && Hq < (1 << 20), "the ", Hq,
              " query heads must be a multiple of the ", Hkv, " key/value heads");
  ZINIT_CHECK(I > 0, "intermediate must be positive, got ", I);
  check_shape(key_cache, "key_cache", {L, B, S, Hkv, D});
  check_shape(value_cache, "value_cache", {L, B, S, Hkv, D});
  ZINIT_CHECK(static_cast<int64_t>(weights.size()) == static_cast<int64_t>(kTensors) * L, "weights must be ",
              kTensors, " tensors for each of the ", L, " layers, got ", weights.size());
  ZINIT_CHECK(static_cast<int64_t>(schemes.size()) == static_cast<int64_t>(kWeights) * L, "schemes must be ",
              kWeights, " numbers for each of the ", L, " layers, got ", schemes.size());
  ZINIT_CHECK(prompts.size() == 3 * prompt_layers.size(), "prompts must be 3 tensors for each of the ",
              prompt_layers.size(), " adapted layers, got ", prompts.size());
  for (const auto& [tensor, name] : {std::pair{&key_cache, "key_cache"}, {&value_cache, "value_cache"}}) {
    device.check(*tensor, name);
    ZINIT_CHECK(tensor->scalar_type() == dtype, name, " must have the input's dtype ", dtype, ", got ",
                tensor->scalar_type());
    ZINIT_CHECK(D == 1 || tensor->stride(4) == 1, name, " must be contiguous in its last dimension");
  }
  check_places(key_cache, value_cache, element);

  // every layer reads and writes the same parts
  Parts parts;
  const int64_t at_stream[2] = {parts.reserve(M * C * element), parts.reserve(M * C * element)};
  const int64_t at_query = parts.reserve(M * Hq * D * element), at_key = parts.reserve(M * Hkv * D * element);
  const int64_t at_value = parts.reserve(M * Hkv * D * element), at_out = parts.reserve(M * Hq * D * element);
  const int64_t at_lse = parts.reserve(B * Hq * T * 4), at_up = parts.reserve(M * I * element);
  const auto free_memory = [](void* memory) { std::free(memory); };
  const std::unique_ptr<void, decltype(free_memory)> memory(
      std::aligned_alloc(kAlignment, static_cast<size_t>(std::max(parts.used(), kAlignment))), free_memory);
  ZINIT_CHECK(memory != nullptr, "out of memory: ", parts.used(), " bytes between the layers");
  if (poison_outputs()) std::memset(memory.get(), 0xff, static_cast<size_t>(parts.used()));
  const auto part = [&](int64_t at) { return static_cast<char*>(memory.get()) + at; };

  const auto token_major = [&](int64_t at, int64_t heads) {
    return View{part(at), T * heads * D, D, heads * D, type, true};
  };
  const auto norm_of = [&](const Tensor& tensor, const char* name) {
    return device.array<void>(tensor, name, dtype, {C}).data;
  };

  DecodeWork common{};
  Copies copies;
  common.num_sequences = B, common.num_heads_q = Hq, common.num_heads_kv = Hkv, common.head_dim = D;
  common.seqlen_q = T, common.seqlen_new = T, common.seqlen_k = S;
  common.query = token_major(at_query, Hq), common.out = token_major(at_out, Hq);
  common.new_key = token_major(at_key, Hkv), common.new_value = token_major(at_value, Hkv);
  common.lse = reinterpret_cast<float*>(part(at_lse));
  common.cache_seqlens = device.array<int32_t>(cache_seqlens, "cache_seqlens", ScalarType::Int, {B});
  set_mask(common, scale, 0.0, window_left, 0, tanh_gate);
  common.prompt_index = {};
  set_rotary(common, device, rotary_cos, rotary_sin, false, true);
  const int64_t longest = copy_lengths(common, copies);

  std::vector<Layer> layers(static_cast<size_t>(L));
  std::vector<Step> steps;
  steps.reserve(static_cast<size_t>(L) * 9 + 1);
  const void* stream = input.data_ptr();
  size_t next_prompt = 0;
  int64_t floats = 0;
  for (int64_t l = 0; l < L; ++l) {
    Layer& layer = layers[static_cast<size_t>(l)];
    const Tensor* own = weights.data() + static_cast<size_t>(l) * kTensors;
    const int64_t* numbers = schemes.data() + static_cast<size_t>(l) * kWeights;
    const auto linear = [&](LinearWork& w, const void* from, const void* norm,
                            std::initializer_list<int> which,
                            std::initializer_list<std::pair<int64_t, int64_t>> shapes) {
      static constexpr const char* kNames[] = {"input_norm",   "query weight", "key weight",
                                               "value weight", "out weight",   "mlp_norm",
                                               "gate weight",  "up weight",    "down weight"};
      w.num_rows = M, w.input = from, w.dtype = type, w.norm_weight = norm, w.eps = static_cast<float>(eps);
      w.num_weights = 0;
      auto shape = shapes.begin();
      for (const int i : which) {
        const int64_t scheme = numbers[i < kOut ? i - 1 : i == kOut ? 3 : i - 2];
        w.weights[w.num_weights++] = weight_of(own[i], kNames[i], shape->first, shape->second, scheme, dtype);
        ++shape;
      }
    };
    linear(layer.qkv, stream, norm_of(own[kInputNorm], "input_norm"), {kQuery, kKey, kValue},
           {{Hq * D, C}, {Hkv * D, C}, {Hkv * D, C}});
    layer.qkv.out[0] = part(at_query), layer.qkv.out[1] = part(at_key), layer.qkv.out[2] = part(at_value);
    linear(layer.out, part(at_out), nullptr, {kOut}, {{C, Hq * D}});
    layer.out.residual = stream, layer.out.out[0] = part(at_stream[0]);
    linear(layer.up, part(at_stream[0]), norm_of(own[kMlpNorm], "mlp_norm"), {kGate, kUp}, {{I, C}, {I, C}});
    ZINIT_CHECK(numbers[4] == numbers[5], "gate and up of a layer must have one scheme, got ", numbers[4],
                " and ", numbers[5]);
    layer.up.gated = true, layer.up.out[0] = part(at_up);
    linear(layer.down, part(at_up), nullptr, {kDown}, {{C, I}});
    layer.down.residual = part(at_stream[0]), layer.down.out[0] = part(at_stream[1]);
    stream = part(at_stream[1]);

    DecodeWork& w = layer.append;
    w = common;
    const auto cache_of = [&](const Tensor& cache) {
      char* data = static_cast<char*>(cache.data_ptr());
      return View{data == nullptr ? nullptr : data + l * cache.stride(0) * element,
                  cache.stride(1),
                  cache.stride(3),
                  cache.stride(2),
                  type,
                  true};
    };
    w.key_cache = cache_of(key_cache), w.value_cache = cache_of(value_cache);
    if (next_prompt < prompt_layers.size() && prompt_layers[next_prompt] == l) {
      const Tensor* of_layer = prompts.data() + 3 * next_prompt++;
      set_prompt(w, device, zinit::Layout::kTokenMajor, of_layer[0], of_layer[1], of_layer[2], prompt_index);
      copy_prompt_index(w, copies);
    }
    layer.attention = plan_attention(w, longest, copies);

    steps.push_back(step_of(kernels().linear, layer.qkv));
    steps.push_back(step_of(kernels().decode_append, w));
    for (const DecodeWork& tokens : layer.attention) {
      floats = std::max(floats, decode_partial_floats(tokens));
      steps.push_back(step_of(kernels().decode_attend, tokens));
      if (tokens.splits > 1) steps.push_back(step_of(kernels().decode_combine, tokens));
    }
    steps.push_back(step_of(kernels().linear, layer.out));
    steps.push_back(step_of(kernels().linear, layer.up));
    steps.push_back(step_of(kernels().linear, layer.down));
  }
  ZINIT_CHECK(next_prompt == prompt_layers.size(), "prompt_layers must rise and be below ", L);
  const auto partials = std::make_unique_for_overwrite<float[]>(static_cast<size_t>(floats));
  for (Layer& layer : layers) {
    for (DecodeWork& tokens : layer.attention) tokens.partials = partials.get();
  }

  NormWork norm{M,    C,       stream, norm_of(final_norm, "final_norm"), static_cast<float>(eps),
                type, nullptr, nullptr};
  Tensor out = device.empty_contiguous({B, T, C}, dtype);
  norm.out = out.data_ptr();
  steps.push_back(step_of(kernels().norm, norm));
  run_steps(steps);
  return out;
}

}  // namespace
}  // namespace zinit::cpu

STABLE_TORCH_LIBRARY_IMPL(zinit, CompositeExplicitAutograd, m) {
  m.impl("decode_layers_cpu", TORCH_BOX(&zinit::cpu::decode_layers));
}
