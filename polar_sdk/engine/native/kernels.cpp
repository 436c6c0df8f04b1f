// Kernels for processors with AVX512-BF16: products of a few or many bfloat16 rows, and attention of one token per row
// over pages. `polar_sdk/engine/native/__init__.py` compiles this file once and says when it is used.
//
// Letters as in `polar_sdk/engine`: M rows, K inputs, N outputs; B rows of one token, H query heads, G key and value
// heads, d head size. Sums are float32; only results are rounded to bfloat16.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <immintrin.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <optional>
#include <utility>
#include <vector>

namespace {

using Half = uint16_t;  // the bits of a bfloat16
constexpr int64_t kLanes = 16;

const Half* read(const at::Tensor& tensor) { return static_cast<const Half*>(tensor.const_data_ptr()); }

// Of 16 pairs of bfloat16: the first of each pair, and the second, as float32.
__m512 first_of(__m512i pairs) { return _mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16)); }
__m512 second_of(__m512i pairs) {
  return _mm512_castsi512_ps(_mm512_and_si512(pairs, _mm512_set1_epi32(static_cast<int>(0xffff0000))));
}

__m512 widen(const Half* from, __mmask16 lanes) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(lanes, from)), 16));
}

void store_rounded(Half* to, __m512 values, __mmask16 lanes = 0xffff) {
  _mm256_mask_storeu_epi16(to, lanes, reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(values)));
}

__mmask16 first_lanes(int64_t count) { return static_cast<__mmask16>((1u << std::min(count, kLanes)) - 1); }

// Lanes from `begin` to `end`, either of which may lie outside.
__mmask16 lanes_between(int64_t begin, int64_t end) {
  return static_cast<__mmask16>(first_lanes(std::max<int64_t>(end, 0)) & ~first_lanes(std::max<int64_t>(begin, 0)));
}

// Sixteen inputs of 16 outputs, turned: for each of 8 pairs of inputs, the weights of the 16 outputs that it meets.
// Row r begins at from + min(r, last) × stride.
inline void turn(const Half* from, int64_t stride, int64_t last, __mmask16 lanes, __m512i (&pairs)[8]) {
  const auto row = [&](int64_t r) { return _mm256_maskz_loadu_epi16(lanes, from + std::min(r, last) * stride); };
  __m512i rows[8], halves[8];
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) {
    const int64_t r = i < 4 ? i : i + 4;
    rows[i] = _mm512_inserti64x4(_mm512_castsi256_si512(row(r)), row(r + 4), 1);
  }
#pragma GCC unroll 8
  for (int i = 0; i < 8; i += 2) {
    halves[i] = _mm512_unpacklo_epi32(rows[i], rows[i + 1]);
    halves[i + 1] = _mm512_unpackhi_epi32(rows[i], rows[i + 1]);
  }
#pragma GCC unroll 2
  for (int i = 0; i < 8; i += 4) {
    rows[i] = _mm512_unpacklo_epi64(halves[i], halves[i + 2]);
    rows[i + 1] = _mm512_unpackhi_epi64(halves[i], halves[i + 2]);
    rows[i + 2] = _mm512_unpacklo_epi64(halves[i + 1], halves[i + 3]);
    rows[i + 3] = _mm512_unpackhi_epi64(halves[i + 1], halves[i + 3]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    pairs[i] = _mm512_shuffle_i32x4(rows[i], rows[i + 4], 0x88);
    pairs[i + 4] = _mm512_shuffle_i32x4(rows[i], rows[i + 4], 0xdd);
  }
}

// ---- products ------------------------------------------------------------------------------------------------------
//
// y (M, N) = x (M, K) · weight (N, K)ᵀ + bias. A *panel* of 32 outputs is turned so that outputs lie along lanes, in a
// buffer of the thread's own; all rows of a block then pass over it, 12 at a time, while the next panel is fetched
// from memory. So weights are read once, stay as torch holds them, and no sum has to be made across lanes.

constexpr int64_t kPanel = 32;
constexpr int64_t kRows = 12;        // 24 sums of 16 lanes, of 32 registers
constexpr int64_t kBlock = 1 << 18;  // words of rows that the second-level cache holds beside a panel
constexpr int64_t kFew = 16;         // rows that are met by weights in registers

// Words of a row of x and of a panel are 32 bits in both forms: a pair of inputs, multiplied by one instruction …
struct Pairs {
  static constexpr int64_t kInputs = 2;
  static __m512 add(__m512 sum, __m512 x, __m512 weight) {
    return _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(x), reinterpret_cast<__m512bh>(weight));
  }
  static void put(float* to, int64_t, __m512i pairs) { _mm512_store_si512(to, pairs); }
  template <int kCount, int kSets>
  static void meet(__m512 (&sums)[kCount][kSets], const float* x, __m512i pairs, int turn) {
#pragma GCC unroll 16
    for (int row = 0; row < kCount; ++row) {
      __m512& sum = sums[row][turn % kSets];
      sum = add(sum, _mm512_set1_ps(x[row]), _mm512_castsi512_ps(pairs));
    }
  }
};

// … or one input as float32. Intel's cores do two such products in the time of one of pairs, AMD's do one in that time.
struct Singles {
  static constexpr int64_t kInputs = 1;
  static __m512 add(__m512 sum, __m512 x, __m512 weight) {
    return _mm512_fmadd_ps(x, weight, sum);
  }
  static void put(float* to, int64_t step, __m512i pairs) {
    _mm512_store_ps(to, first_of(pairs));
    _mm512_store_ps(to + step, second_of(pairs));
  }
  template <int kCount, int kSets>
  static void meet(__m512 (&sums)[kCount][kSets], const float* x, __m512i pairs, int) {
    const __m512 first = first_of(pairs), second = second_of(pairs);
#pragma GCC unroll 16
    for (int row = 0; row < kCount; ++row) {
      sums[row][0] = add(sums[row][0], _mm512_set1_ps(x[row]), first);
    }
#pragma GCC unroll 16
    for (int row = 0; row < kCount; ++row) {
      __m512& sum = sums[row][kSets - 1];
      sum = add(sum, _mm512_set1_ps(x[kCount + row]), second);
    }
  }
};

struct Product {
  const Half* x;
  const Half* weight;
  const Half* bias;  // or null
  Half* y;
  int64_t rows, inputs, outputs;
  int64_t padded() const { return (inputs + kPanel - 1) / kPanel * kPanel; }
};

// Memory that a thread keeps from one call to the next; fresh pages cost more than what is computed in them.
template <class Owner>
float* scratch(int64_t words) {
  thread_local std::vector<float> kept;
  if (static_cast<int64_t>(kept.size()) < words + kLanes) kept.resize(words + kLanes);
  const auto address = reinterpret_cast<uintptr_t>(kept.data());
  return kept.data() + (64 - address % 64) % 64 / sizeof(float);
}

// Inputs of some rows as words, those that stand at the same place of their rows side by side; zero past the inputs.
template <class Form>
void fill_rows(const Product& product, int64_t start, int64_t rows, float* words) {
  const int64_t steps = product.padded() / Form::kInputs;
  std::fill_n(words + product.inputs / Form::kInputs * rows, (steps - product.inputs / Form::kInputs) * rows, 0.0f);
  for (int64_t row = 0; row < rows; ++row) {
    const Half* from = product.x + (start + row) * product.inputs;
    for (int64_t at = 0; at < product.inputs; at += Form::kInputs) {
      const uint32_t bits = Form::kInputs == 1 ? from[at] << 16 : from[at] | (at + 1 < product.inputs ? from[at + 1] << 16 : 0);
      words[at / Form::kInputs * rows + row] = __builtin_bit_cast(float, bits);
    }
  }
}

// 32 outputs from `start`, turned: for each word of a row, the 32 weights it meets. Past the last output it repeats that.
template <class Form>
void fill_panel(const Product& product, int64_t start, float* panel) {
  constexpr int64_t kWords = 2 / Form::kInputs * kPanel;  // of a pair of inputs
  for (int64_t half = 0; half < kPanel; half += kLanes) {
    const int64_t first = std::min(start + half, product.outputs - 1), last = product.outputs - 1 - first;
    for (int64_t at = 0; at < product.padded(); at += kLanes) {
      __m512i pairs[8];
      turn(product.weight + first * product.inputs + at, product.inputs, last, first_lanes(product.inputs - at), pairs);
#pragma GCC unroll 8
      for (int64_t pair = 0; pair < 8; ++pair) Form::put(panel + (at / 2 + pair) * kWords + half, kPanel, pairs[pair]);
    }
  }
}

// Few rows: weights are turned in registers and used at once.
template <class Form, int kCount>
void run_few(const Product& product, int64_t start, const float* words, int64_t begin, int64_t end) {
  constexpr int kSets = kCount <= 8 ? 2 : 1;  // enough sums at a time to hide how long one takes
  for (int64_t output = begin; output < end; output += kLanes) {
    const int64_t last = product.outputs - 1 - output;
    const __mmask16 lanes = first_lanes(last + 1);
    const Half* from = product.weight + output * product.inputs;
    const char* ahead = reinterpret_cast<const char*>(from + kLanes * product.inputs);
    __m512 sums[kCount][kSets];
    for (auto& row : sums) for (auto& sum : row) sum = _mm512_setzero_ps();
    for (int64_t at = 0; at < product.padded(); at += kLanes) {
      __m512i pairs[8];
      turn(from + at, product.inputs, last, first_lanes(product.inputs - at), pairs);
#pragma GCC unroll 8
      for (int i = 0; i < 8; ++i, ahead += 64) {
        _mm_prefetch(ahead, _MM_HINT_T0);
        Form::template meet<kCount, kSets>(sums, words + (at + 2 * i) / Form::kInputs * kCount, pairs[i], i);
      }
    }
    const __m512 bias = product.bias ? widen(product.bias + output, lanes) : _mm512_setzero_ps();
    for (int row = 0; row < kCount; ++row) {
      for (int set = 1; set < kSets; ++set) sums[row][0] = _mm512_add_ps(sums[row][0], sums[row][set]);
      store_rounded(product.y + (start + row) * product.outputs + output, _mm512_add_ps(sums[row][0], bias), lanes);
    }
  }
}

struct Pass {
  const float* words;  // of the rows
  int64_t steps;
  const float* panel;
  const char* ahead;  // weights to fetch meanwhile, `hop` bytes a step
  int64_t hop;
  __m512 bias[2];
  Half* y;
  int64_t outputs;
  __mmask16 lanes[2];
};

template <class Form, int kCount>
void run_rows(const Pass& pass) {
  __m512 sums[kCount][2];
  for (auto& row : sums) row[0] = pass.bias[0], row[1] = pass.bias[1];
  const char* ahead = pass.ahead;
  for (int64_t step = 0; step < pass.steps; ++step) {
    const __m512 low = _mm512_load_ps(pass.panel + step * kPanel);
    const __m512 high = _mm512_load_ps(pass.panel + step * kPanel + kLanes);
    _mm_prefetch(ahead, _MM_HINT_T1);
    ahead += pass.hop;
#pragma GCC unroll 12
    for (int row = 0; row < kCount; ++row) {
      const __m512 x = _mm512_set1_ps(pass.words[step * kCount + row]);
      sums[row][0] = Form::add(sums[row][0], x, low);
      sums[row][1] = Form::add(sums[row][1], x, high);
    }
  }
  for (int row = 0; row < kCount; ++row) {
    store_rounded(pass.y + row * pass.outputs, sums[row][0], pass.lanes[0]);
    store_rounded(pass.y + row * pass.outputs + kLanes, sums[row][1], pass.lanes[1]);
  }
}

template <class Form>
void run_count(int64_t count, const Pass& pass) {
  switch (count) {
    case 1: return run_rows<Form, 1>(pass);
    case 2: return run_rows<Form, 2>(pass);
    case 3: return run_rows<Form, 3>(pass);
    case 4: return run_rows<Form, 4>(pass);
    case 5: return run_rows<Form, 5>(pass);
    case 6: return run_rows<Form, 6>(pass);
    case 7: return run_rows<Form, 7>(pass);
    case 8: return run_rows<Form, 8>(pass);
    case 9: return run_rows<Form, 9>(pass);
    case 10: return run_rows<Form, 10>(pass);
    case 11: return run_rows<Form, 11>(pass);
    default: return run_rows<Form, 12>(pass);
  }
}

int64_t parts_of(int64_t count, int64_t most) { return (count + most - 1) / most; }

// Rows of a product in chunks of nearly one size.
struct Chunks {
  int64_t rows, count;
  explicit Chunks(int64_t rows) : rows(rows), count(parts_of(rows, kRows)) {}
  int64_t start(int64_t chunk) const { return chunk * rows / count; }
};

// All outputs of the panels from `begin` to `end`, for the chunks of rows from `from` to `to`.
template <class Form>
void run_panels(const Product& product, const Chunks& chunks, int64_t from, int64_t to, int64_t begin, int64_t end) {
  const int64_t steps = product.padded() / Form::kInputs, start = chunks.start(from);
  float* panel = scratch<Product>(steps * (kPanel + chunks.start(to) - start));
  float* words = panel + steps * kPanel;
  for (int64_t chunk = from; chunk < to; ++chunk) {
    const int64_t row = chunks.start(chunk);
    fill_rows<Form>(product, row, chunks.start(chunk + 1) - row, words + (row - start) * steps);
  }
  for (int64_t number = begin; number < end; ++number) {
    const int64_t output = number * kPanel;
    fill_panel<Form>(product, output, panel);
    Pass pass{words, steps, panel, nullptr, 0, {}, nullptr, product.outputs, {}};
    for (int64_t half = 0; half < 2; ++half) {
      const int64_t left = std::max<int64_t>(product.outputs - output - half * kLanes, 0);
      pass.lanes[half] = first_lanes(left);
      pass.bias[half] = product.bias ? widen(product.bias + output + half * kLanes, pass.lanes[half]) : _mm512_setzero_ps();
    }
    pass.ahead = reinterpret_cast<const char*>(product.weight + std::min(output + kPanel, product.outputs - 1) * product.inputs);
    pass.hop = 64 * Form::kInputs;
    for (int64_t chunk = from; chunk < to; ++chunk) {
      const int64_t row = chunks.start(chunk);
      pass.words = words + (row - start) * steps;
      pass.y = product.y + row * product.outputs + output;
      run_count<Form>(chunks.start(chunk + 1) - row, pass);
      pass.hop = 0;  // fetched once
    }
  }
}

template <class Form, int kCount>
void run_few_block(const Product& product, int64_t start, int64_t begin, int64_t end) {
  float* words = scratch<Product>(kCount * product.padded() / Form::kInputs);
  fill_rows<Form>(product, start, kCount, words);
  run_few<Form, kCount>(product, start, words, begin, end);
}

template <class Form, int... kCounts>
void run_few_count(int64_t count, const Product& product, int64_t start, int64_t begin, int64_t end, std::integer_sequence<int, kCounts...>) {
  ((count == kCounts + 1 ? run_few_block<Form, kCounts + 1>(product, start, begin, end) : void()), ...);
}

template <class Form>
void run_product(const Product& product) {
  if (product.rows <= kFew) {
    at::parallel_for(0, parts_of(product.outputs, kLanes), 1, [&](int64_t begin, int64_t end) {
      const int64_t parts = parts_of(product.rows, kFew);
      for (int64_t part = 0; part < parts; ++part) {
        const int64_t from = part * product.rows / parts, to = (part + 1) * product.rows / parts;
        run_few_count<Form>(to - from, product, from, begin * kLanes, std::min(end * kLanes, product.outputs), std::make_integer_sequence<int, 16>());
      }
    });
    return;
  }
  const Chunks chunks(product.rows);
  at::parallel_for(0, parts_of(product.outputs, kPanel), 1, [&](int64_t begin, int64_t end) {
    const int64_t words = product.rows * product.padded() / Form::kInputs;
    const int64_t blocks = std::min(parts_of(words, kBlock), chunks.count);
    for (int64_t block = 0; block < blocks; ++block) {
      const int64_t from = block * chunks.count / blocks, to = (block + 1) * chunks.count / blocks;
      run_panels<Form>(product, chunks, from, to, begin, end);
    }
  });
}

at::Tensor product(const at::Tensor& x, const at::Tensor& weight, const std::optional<at::Tensor>& bias) {
  const at::Tensor rows = x.contiguous(), matrix = weight.contiguous();
  const at::Tensor added = bias.has_value() ? bias->contiguous() : at::Tensor();
  at::Tensor y = at::empty({x.size(0), weight.size(0)}, x.options());
  const Product given{read(rows), read(matrix), added.defined() ? read(added) : nullptr,
                      static_cast<Half*>(y.mutable_data_ptr()), x.size(0), x.size(1), weight.size(0)};
  static const bool pairs = __builtin_cpu_is("amd");
  if (pairs) {
    run_product<Pairs>(given);
  } else {
    run_product<Singles>(given);
  }
  return y;
}

// ---- attention of one token per row over pages -----------------------------------------------------------------------

// e to the power of values that are 0 or less, or not a great deal more.
__m512 exponential(__m512 x) {
  x = _mm512_max_ps(x, _mm512_set1_ps(-104.0f));
  const __m512 power = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)), 0);
  __m512 rest = _mm512_fnmadd_ps(power, _mm512_set1_ps(0.693359375f), x);
  rest = _mm512_fnmadd_ps(power, _mm512_set1_ps(-2.12194440e-4f), rest);
  __m512 sum = _mm512_set1_ps(1.9875691500e-4f);
  for (const float term : {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 0.5f, 1.0f, 1.0f}) {
    sum = _mm512_fmadd_ps(sum, rest, _mm512_set1_ps(term));
  }
  return _mm512_scalef_ps(sum, power);
}

__m512 hyperbolic_tangent(__m512 x) {
  const __m512 grown = exponential(_mm512_min_ps(_mm512_add_ps(x, x), _mm512_set1_ps(80.0f)));
  const __m512 one = _mm512_set1_ps(1.0f);
  return _mm512_sub_ps(one, _mm512_div_ps(_mm512_set1_ps(2.0f), _mm512_add_ps(grown, one)));
}

// The sum of each of 16 vectors, in the lane of its number.
__m512 sums_of(__m512 (&vectors)[kLanes]) {
  for (int i = 0; i < 8; ++i) {
    const __m512 a = vectors[2 * i], b = vectors[2 * i + 1];
    vectors[i] = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
  }
  for (int i = 0; i < 4; ++i) {
    const __m512d a = _mm512_castps_pd(vectors[2 * i]), b = _mm512_castps_pd(vectors[2 * i + 1]);
    vectors[i] = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(a, b)), _mm512_castpd_ps(_mm512_unpackhi_pd(a, b)));
  }
  for (int left = 2; left > 0; left /= 2) {
    for (int i = 0; i < left; ++i) {
      const __m512 a = vectors[2 * i], b = vectors[2 * i + 1];
      vectors[i] = _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd));
    }
  }
  return vectors[0];
}

struct Attention {
  const Half* query;     // (B, H, d), `query_step` from one row to the next
  const Half* store;     // (P, 2, G, page, d)
  const int64_t* table;  // (B, blocks)
  const int64_t* positions;
  Half* mixed;  // (B, H × d)
  int64_t query_step, heads, groups, size, page, blocks;
  float scale;
  int64_t window;  // or 0
  float softcap;   // or 0

  int64_t sharing() const { return heads / groups; }
  int64_t end(int64_t row) const { return positions[row] + 1; }
  int64_t first(int64_t row) const { return window > 0 ? std::max<int64_t>(end(row) - window, 0) : 0; }
  // Keys (0) or values (1) of a group, from that key to the end of its page.
  const Half* at(int64_t row, int64_t group, int64_t key, int64_t which) const {
    const int64_t number = table[row * blocks + key / page];
    return store + (((number * 2 + which) * groups + group) * page + key % page) * size;
  }
};

// Sixteen keys or values, to the first-level cache.
void fetch(const Half* from, int64_t size) {
  for (int64_t at = 0; at < kLanes * size; at += 2 * kLanes) {
    _mm_prefetch(reinterpret_cast<const char*>(from + at), _MM_HINT_T0);
  }
}

// Scores of one query over the keys up to `end`, minus infinity before `first`. If `next` is not null, fetches meanwhile
// the same values, and the keys a page on; `next` is the page that comes after the last.
float score(const Attention& it, int64_t row, int64_t group, const Half* query, const Half* next, int64_t first,
            int64_t end, float* scores) {
  __m512 highest = _mm512_set1_ps(-std::numeric_limits<float>::infinity());
  for (int64_t key = first / kLanes * kLanes; key < end; key += kLanes) {
    const Half* keys = it.at(row, group, key, 0);
    if (next) {
      fetch(it.at(row, group, key, 1), it.size);
      fetch(key + it.page < end ? it.at(row, group, key + it.page, 0) : next + key % it.page * it.size, it.size);
    }
    __m512 products[kLanes];
    for (auto& one : products) one = _mm512_setzero_ps();
    for (int64_t part = 0; part < it.size; part += 2 * kLanes) {
      const auto asked = reinterpret_cast<__m512bh>(_mm512_loadu_si512(query + part));
#pragma GCC unroll 16
      for (int64_t i = 0; i < kLanes; ++i) {
        const auto known = reinterpret_cast<__m512bh>(_mm512_loadu_si512(keys + i * it.size + part));
        products[i] = _mm512_dpbf16_ps(products[i], asked, known);
      }
    }
    __m512 values = _mm512_mul_ps(sums_of(products), _mm512_set1_ps(it.scale));
    if (it.softcap > 0) {
      const __m512 cap = _mm512_set1_ps(it.softcap);
      values = _mm512_mul_ps(cap, hyperbolic_tangent(_mm512_div_ps(values, cap)));
    }
    const __mmask16 seen = lanes_between(first - key, end - key);
    values = _mm512_mask_blend_ps(seen, _mm512_set1_ps(-std::numeric_limits<float>::infinity()), values);
    highest = _mm512_max_ps(highest, values);
    _mm512_storeu_ps(scores + key, values);
  }
  return _mm512_reduce_max_ps(highest);
}

// Makes weights of scores, so far as they are seen; returns the sum of the weights.
float weigh(float* scores, int64_t first, int64_t end, float highest) {
  __m512 total = _mm512_setzero_ps();
  for (int64_t key = first / kLanes * kLanes; key < end; key += kLanes) {
    const __m512 weights = exponential(_mm512_sub_ps(_mm512_loadu_ps(scores + key), _mm512_set1_ps(highest)));
    const __mmask16 seen = lanes_between(first - key, end - key);
    total = _mm512_mask_add_ps(total, seen, total, weights);
    _mm512_storeu_ps(scores + key, weights);
  }
  return _mm512_reduce_add_ps(total);
}

// Values from `part` on, of 32 × kParts entries, mixed by the weights of kHeads heads (one row of `length` each).
template <int kHeads, int kParts>
void mix(const Attention& it, int64_t row, int64_t group, int64_t part, int64_t first, int64_t end,
         const float* weights, int64_t length, const float* totals, Half* to) {
  __m512 sums[kHeads][kParts][2];
  for (auto& head : sums) for (auto& one : head) one[0] = one[1] = _mm512_setzero_ps();
  for (int64_t key = first; key < end;) {
    const Half* values = it.at(row, group, key, 1) + part;
    for (const int64_t stop = std::min(end, (key / it.page + 1) * it.page); key < stop; ++key, values += it.size) {
      for (int i = 0; i < kParts; ++i) {
        const __m512i pairs = _mm512_loadu_si512(values + i * 2 * kLanes);
        for (int head = 0; head < kHeads; ++head) {
          const __m512 weight = _mm512_set1_ps(weights[head * length + key]);
          sums[head][i][0] = _mm512_fmadd_ps(weight, first_of(pairs), sums[head][i][0]);
          sums[head][i][1] = _mm512_fmadd_ps(weight, second_of(pairs), sums[head][i][1]);
        }
      }
    }
  }
  for (int head = 0; head < kHeads; ++head) {
    const __m512 share = _mm512_set1_ps(1.0f / totals[head]);
    for (int i = 0; i < kParts; ++i) {
      const auto first_half = reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(_mm512_mul_ps(sums[head][i][0], share)));
      const auto second_half = reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(_mm512_mul_ps(sums[head][i][1], share)));
      const __m512i pairs = _mm512_or_si512(_mm512_cvtepu16_epi32(first_half),
                                            _mm512_slli_epi32(_mm512_cvtepu16_epi32(second_half), 16));
      _mm512_storeu_si512(to + head * it.size + part + i * 2 * kLanes, pairs);
    }
  }
}

template <int kParts>
void mix_heads(int64_t count, const Attention& it, int64_t row, int64_t group, int64_t part, int64_t first, int64_t end,
               const float* weights, int64_t length, const float* totals, Half* to) {
  switch (count) {
    case 1: return mix<1, kParts>(it, row, group, part, first, end, weights, length, totals, to);
    case 2: return mix<2, kParts>(it, row, group, part, first, end, weights, length, totals, to);
    case 3: return mix<3, kParts>(it, row, group, part, first, end, weights, length, totals, to);
    default: return mix<4, kParts>(it, row, group, part, first, end, weights, length, totals, to);
  }
}

// The heads of one row that share keys and values, four at a time.
void attend(const Attention& it, int64_t row, int64_t group, const Half* next) {
  constexpr int64_t kHeads = 4;
  const int64_t end = it.end(row), first = it.first(row);
  const int64_t length = parts_of(end, kLanes) * kLanes;
  auto* scores = reinterpret_cast<float*>(scratch<Attention>(kHeads * length));
  for (int64_t head = 0; head < it.sharing(); head += kHeads) {
    const int64_t count = std::min(it.sharing() - head, kHeads), at = (group * it.sharing() + head) * it.size;
    float totals[kHeads];
    for (int64_t one = 0; one < count; ++one) {
      float* own = scores + one * length;
      const Half* query = it.query + row * it.query_step + at + one * it.size;
      totals[one] = weigh(own, first, end, score(it, row, group, query, head + one ? nullptr : next, first, end, own));
    }
    const int64_t step = it.size % (4 * kLanes) == 0 ? 4 * kLanes : 2 * kLanes;
    for (int64_t part = 0; part < it.size; part += step) {
      (step == 4 * kLanes ? mix_heads<2> : mix_heads<1>)(count, it, row, group, part, first, end, scores, length, totals, it.mixed + row * it.heads * it.size + at);
    }
  }
}

at::Tensor attend_pages(const at::Tensor& query, const at::Tensor& store, const at::Tensor& table,
                        const at::Tensor& positions, double scale, std::optional<int64_t> window,
                        std::optional<double> softcap) {
  TORCH_CHECK(store.is_contiguous() && query.stride(2) == 1 && query.stride(1) == query.size(2));
  const at::Tensor pages = table.contiguous(), at = positions.contiguous();
  const int64_t rows = query.size(0), heads = query.size(1), size = query.size(2), groups = store.size(2);
  at::Tensor mixed = at::empty({rows, heads * size}, query.options());
  const Attention it{read(query), read(store), pages.const_data_ptr<int64_t>(), at.const_data_ptr<int64_t>(),
                     static_cast<Half*>(mixed.mutable_data_ptr()), query.stride(0), heads, groups, size, store.size(3), table.size(1),
                     static_cast<float>(scale), window.value_or(0), static_cast<float>(softcap.value_or(0.0))};
  at::parallel_for(0, rows * groups, 1, [&](int64_t begin, int64_t end) {
    for (int64_t one = begin; one < end; ++one) {
      const int64_t next = std::min(one + 1, rows * groups - 1), row = next / groups;
      const int64_t first = it.first(row) / it.page * it.page;
      attend(it, one / groups, one % groups, it.at(row, next % groups, first, 0));
    }
  });
  return mixed;
}

// ---- causal attention of the last tokens of one row --------------------------------------------------------------------
//
// A task takes some tokens of the heads that share keys, and passes over the keys in blocks. Of each block, the keys are
// turned so that keys lie along lanes, and scores and mixed values are products of 12 queries at a time. Weights are
// relative to the highest score so far, and what was summed is scaled when a higher one comes.

constexpr int64_t kTokens = 64;  // of a task
constexpr int64_t kKeys = 64;    // of a block

struct Prompt {
  const Half *query, *keys, *values;
  Half* mixed;  // (T, H × d)
  int64_t tokens, heads, groups, size, total;
  int64_t query_step, key_step, key_group, value_step, value_group;  // strides of a token, and of a group
  float scale;
  int64_t window;  // or 0
  float softcap;   // or 0

  int64_t sharing() const { return heads / groups; }
};

// sums (12, 32) = sums × share + words · panel, for one word of each of 12 rows per step.
template <int64_t kStep, int64_t kRow>
void meet_panel(const float* words, const float* panel, int64_t width, int64_t steps, const float* share, float* sums, int64_t stride) {
  __m512 own[kRows][2];
  for (int64_t row = 0; row < kRows; ++row) {
    for (int64_t half = 0; half < 2; ++half) {
      own[row][half] = share ? _mm512_mul_ps(_mm512_set1_ps(share[row]), _mm512_loadu_ps(sums + row * stride + half * kLanes))
                             : _mm512_setzero_ps();
    }
  }
  for (int64_t step = 0; step < steps; ++step, panel += width) {
    const __m512 low = _mm512_loadu_ps(panel), high = _mm512_loadu_ps(panel + kLanes);
#pragma GCC unroll 12
    for (int64_t row = 0; row < kRows; ++row) {
      const __m512 word = _mm512_set1_ps(words[step * kStep + row * kRow]);
      own[row][0] = _mm512_fmadd_ps(word, low, own[row][0]);
      own[row][1] = _mm512_fmadd_ps(word, high, own[row][1]);
    }
  }
  for (int64_t row = 0; row < kRows; ++row) {
    _mm512_storeu_ps(sums + row * stride, own[row][0]);
    _mm512_storeu_ps(sums + row * stride + kLanes, own[row][1]);
  }
}

// One task: `count` tokens from `start`, of one group. Rows are (head, token), in chunks of 12, the last one filled up.
class PromptTask {
 public:
  PromptTask(const Prompt& it, int64_t group, int64_t start)
      : it_(it), group_(group), start_(start), count_(std::min(kTokens, it.tokens - start)),
        rows_(it.sharing() * count_), chunks_(parts_of(rows_, kRows)) {
    const int64_t every = chunks_ * kRows;
    queries_ = scratch<Prompt>(every * (2 * it.size + 2) + 2 * kKeys * it.size + kRows * kKeys);
    mixed_ = queries_ + every * it.size;
    keys_ = mixed_ + every * it.size;
    values_ = keys_ + kKeys * it.size;
    scores_ = values_ + kKeys * it.size;
    highest_ = scores_ + kRows * kKeys;
    totals_ = highest_ + every;
    std::fill_n(queries_, 2 * every * it.size, 0.0f);
    std::fill_n(highest_, every, kLowest);
    std::fill_n(totals_, every, 0.0f);
  }

  void run() {
    fill_queries();
    const int64_t end = position(count_ - 1) + 1, first = first_key(position(0));
    for (int64_t key = first / kKeys * kKeys; key < end; key += kKeys) {
      fill_block(key, std::min(kKeys, end - key));
      for (int64_t chunk = 0; chunk < chunks_; ++chunk) run_chunk(chunk, key);
    }
    write();
  }

 private:
  static constexpr float kLowest = -1e30f;

  int64_t position(int64_t token) const { return it_.total - it_.tokens + start_ + token; }
  int64_t first_key(int64_t position) const { return it_.window > 0 ? std::max<int64_t>(position - it_.window + 1, 0) : 0; }
  int64_t head(int64_t row) const { return group_ * it_.sharing() + row / count_; }
  int64_t token(int64_t row) const { return row % count_; }

  void fill_queries() {
    for (int64_t row = 0; row < rows_; ++row) {
      const Half* from = it_.query + (start_ + token(row)) * it_.query_step + head(row) * it_.size;
      float* to = queries_ + row / kRows * kRows * it_.size + row % kRows;
      for (int64_t at = 0; at < it_.size; ++at) {
        to[at * kRows] = it_.scale * __builtin_bit_cast(float, static_cast<uint32_t>(from[at]) << 16);
      }
    }
  }

  void fill_block(int64_t key, int64_t count) {
    const Half* keys = it_.keys + key * it_.key_step + group_ * it_.key_group;
    for (int64_t some = 0; some < kKeys; some += kLanes) {
      const int64_t first = std::min(some, count - 1);
      for (int64_t at = 0; at < it_.size; at += kLanes) {
        __m512i pairs[8];
        turn(keys + first * it_.key_step + at, it_.key_step, count - 1 - first, 0xffff, pairs);
        for (int64_t pair = 0; pair < 8; ++pair) {
          float* to = keys_ + (at + 2 * pair) * kKeys + some;
          _mm512_storeu_ps(to, first_of(pairs[pair]));
          _mm512_storeu_ps(to + kKeys, second_of(pairs[pair]));
        }
      }
    }
    for (int64_t one = 0; one < kKeys; ++one) {
      const Half* from = it_.values + (key + one) * it_.value_step + group_ * it_.value_group;
      for (int64_t at = 0; at < it_.size; at += kLanes) {
        _mm512_storeu_ps(values_ + one * it_.size + at, one < count ? widen(from + at, 0xffff) : _mm512_setzero_ps());
      }
    }
  }

  void run_chunk(int64_t chunk, int64_t key) {
    const float* queries = queries_ + chunk * kRows * it_.size;
    for (int64_t some = 0; some < kKeys; some += kPanel) {
      meet_panel<kRows, 1>(queries, keys_ + some, kKeys, it_.size, nullptr, scores_ + some, kKeys);
    }
    float shares[kRows];
    for (int64_t row = 0; row < kRows; ++row) shares[row] = weigh_row(chunk * kRows + row, key, scores_ + row * kKeys);
    float* mixed = mixed_ + chunk * kRows * it_.size;
    for (int64_t at = 0; at < it_.size; at += kPanel) {
      meet_panel<1, kKeys>(scores_, values_ + at, it_.size, kKeys, shares, mixed + at, it_.size);
    }
  }

  // Makes weights of the scores of a row; returns the factor that what was summed before is to be scaled by.
  float weigh_row(int64_t row, int64_t key, float* scores) {
    const int64_t at = position(token(std::min(row, rows_ - 1))), first = first_key(at);
    __m512 values[kKeys / kLanes];
    __mmask16 seen[kKeys / kLanes];
    __m512 top = _mm512_set1_ps(highest_[row]);
    for (int64_t i = 0; i < kKeys / kLanes; ++i) {
      const int64_t start = key + i * kLanes;
      values[i] = _mm512_loadu_ps(scores + i * kLanes);
      if (it_.softcap > 0) {
        const __m512 cap = _mm512_set1_ps(it_.softcap);
        values[i] = _mm512_mul_ps(cap, hyperbolic_tangent(_mm512_div_ps(values[i], cap)));
      }
      seen[i] = lanes_between(first - start, at + 1 - start);
      top = _mm512_mask_max_ps(top, seen[i], top, values[i]);
    }
    const float highest = _mm512_reduce_max_ps(top);
    __m512 total = _mm512_setzero_ps();
    for (int64_t i = 0; i < kKeys / kLanes; ++i) {
      const __m512 weight = _mm512_maskz_mov_ps(seen[i], exponential(_mm512_sub_ps(values[i], _mm512_set1_ps(highest))));
      total = _mm512_add_ps(total, weight);
      _mm512_storeu_ps(scores + i * kLanes, weight);
    }
    const float share = std::exp(highest_[row] - highest);
    totals_[row] = totals_[row] * share + _mm512_reduce_add_ps(total);
    highest_[row] = highest;
    return share;
  }

  void write() {
    for (int64_t row = 0; row < rows_; ++row) {
      const __m512 share = _mm512_set1_ps(1.0f / totals_[row]);
      Half* to = it_.mixed + ((start_ + token(row)) * it_.heads + head(row)) * it_.size;
      for (int64_t at = 0; at < it_.size; at += kLanes) {
        store_rounded(to + at, _mm512_mul_ps(share, _mm512_loadu_ps(mixed_ + row * it_.size + at)));
      }
    }
  }

  const Prompt& it_;
  const int64_t group_, start_, count_, rows_, chunks_;
  float *queries_, *mixed_, *keys_, *values_, *scores_, *highest_, *totals_;
};

at::Tensor attend_prompt(const at::Tensor& query, const at::Tensor& keys, const at::Tensor& values, double scale,
                         std::optional<int64_t> window, std::optional<double> softcap) {
  TORCH_CHECK(query.stride(2) == 1 && query.stride(1) == query.size(2) && keys.stride(2) == 1 && values.stride(2) == 1);
  const int64_t tokens = query.size(0), heads = query.size(1), size = query.size(2), groups = keys.size(0);
  at::Tensor mixed = at::empty({tokens, heads * size}, query.options());
  const Prompt it{read(query), read(keys), read(values), static_cast<Half*>(mixed.mutable_data_ptr()),
                  tokens, heads, groups, size, keys.size(1),
                  query.stride(0), keys.stride(1), keys.stride(0), values.stride(1), values.stride(0),
                  static_cast<float>(scale), window.value_or(0), static_cast<float>(softcap.value_or(0.0))};
  const int64_t blocks = parts_of(tokens, kTokens);
  at::parallel_for(0, blocks * groups, 1, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t number = task / groups;  // first and last in turn, since later tokens see more keys
      const int64_t block = number % 2 ? blocks - 1 - number / 2 : number / 2;
      PromptTask(it, task % groups, block * kTokens).run();
    }
  });
  return mixed;
}

}  // namespace

TORCH_LIBRARY(polar, library) {
  library.def("product(Tensor x, Tensor weight, Tensor? bias) -> Tensor");
  library.def(
      "attend_pages(Tensor query, Tensor store, Tensor table, Tensor positions, float scale, int? window, float? softcap)"
      " -> Tensor");
  library.def(
      "attend_prompt(Tensor query, Tensor keys, Tensor values, float scale, int? window, float? softcap) -> Tensor");
}

TORCH_LIBRARY_IMPL(polar, CPU, library) {
  library.impl("product", product);
  library.impl("attend_pages", attend_pages);
  library.impl("attend_prompt", attend_prompt);
}
