// Products of a few or many rows with a matrix.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>

#include <optional>
#include <utility>

#include "lanes.h"

namespace polar {

// y (M, N) = x (M, K) · weight (N, K)ᵀ + bias. A *panel* of 32 outputs is transposed into a buffer of the thread, so
// that outputs are along lanes; all rows of a block are then multiplied by it, 12 at a time, while the next panel is
// fetched from memory. So weights are read once, stay in torch's layout, and no sum runs across lanes. Few rows are
// bound by reading and transposing weights: for them, weights are transposed in registers and used at once.

constexpr int64_t kBlock = 1 << 18;  // words of rows that fit the second-level cache together with a panel
constexpr int kFew = 16;             // rows multiplied at a time by weights in registers …
constexpr int64_t kStrips = 96;      // … where there are no more than this many in all

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

// … or one input as float32. `_pairs` in `__init__.py` says which is faster where.
struct Singles {
  static constexpr int64_t kInputs = 1;
  static __m512 add(__m512 sum, __m512 x, __m512 weight) { return _mm512_fmadd_ps(x, weight, sum); }
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

// Inputs of some rows as words, those at the same place of their rows side by side; zero after the last input.
template <class Form>
void fill_rows(const Product& product, int64_t start, int64_t rows, float* words) {
  const int64_t steps = product.padded() / Form::kInputs;
  std::fill_n(words + product.inputs / Form::kInputs * rows, (steps - product.inputs / Form::kInputs) * rows, 0.0f);
  for (int64_t row = 0; row < rows; ++row) {
    const Half* from = product.x + (start + row) * product.inputs;
    for (int64_t at = 0; at < product.inputs; at += Form::kInputs) {
      const uint32_t bits =
          Form::kInputs == 1 ? from[at] << 16 : from[at] | (at + 1 < product.inputs ? from[at + 1] << 16 : 0);
      words[at / Form::kInputs * rows + row] = __builtin_bit_cast(float, bits);
    }
  }
}

// 32 outputs from `start`, transposed: for each word of a row, the 32 weights for it. After the last output that one is
// repeated.
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

// Few rows and 16 outputs: weights are transposed in registers and used at once.
template <class Form, int kCount>
void run_few(const Product& product, int64_t start, const float* words, int64_t output) {
  constexpr int kSets = kCount <= 8 ? 2 : 1;  // enough sums at a time to hide how long one takes
  const int64_t last = product.outputs - 1 - output;
  const __mmask16 lanes = first_lanes(last + 1);
  const Half* from = product.weight + output * product.inputs;
  const char* ahead = reinterpret_cast<const char*>(from + kLanes * product.inputs);
  __m512 sums[kCount][kSets];
  for (auto& row : sums)
    for (auto& sum : row) sum = _mm512_setzero_ps();
  for (int64_t at = 0; at < product.padded(); at += kLanes) {
    __m512i pairs[8];
    turn(from + at, product.inputs, last, first_lanes(product.inputs - at), pairs);
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i, ahead += 64) {
      _mm_prefetch(ahead, _MM_HINT_T1);  // a strip and the next one are more than the first-level cache holds
      Form::template meet<kCount, kSets>(sums, words + (at + 2 * i) / Form::kInputs * kCount, pairs[i], i);
    }
  }
  const __m512 bias = product.bias ? widen(product.bias + output, lanes) : _mm512_setzero_ps();
  for (int row = 0; row < kCount; ++row) {
    for (int set = 1; set < kSets; ++set) sums[row][0] = _mm512_add_ps(sums[row][0], sums[row][set]);
    store_rounded(product.y + (start + row) * product.outputs + output, _mm512_add_ps(sums[row][0], bias), lanes);
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
    case 1:
      return run_rows<Form, 1>(pass);
    case 2:
      return run_rows<Form, 2>(pass);
    case 3:
      return run_rows<Form, 3>(pass);
    case 4:
      return run_rows<Form, 4>(pass);
    case 5:
      return run_rows<Form, 5>(pass);
    case 6:
      return run_rows<Form, 6>(pass);
    case 7:
      return run_rows<Form, 7>(pass);
    case 8:
      return run_rows<Form, 8>(pass);
    case 9:
      return run_rows<Form, 9>(pass);
    case 10:
      return run_rows<Form, 10>(pass);
    case 11:
      return run_rows<Form, 11>(pass);
    default:
      return run_rows<Form, 12>(pass);
  }
}

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
      pass.bias[half] =
          product.bias ? widen(product.bias + output + half * kLanes, pass.lanes[half]) : _mm512_setzero_ps();
    }
    pass.ahead =
        reinterpret_cast<const char*>(product.weight + std::min(output + kPanel, product.outputs - 1) * product.inputs);
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

template <class Form, int... kCounts>
void run_few_count(int64_t count, const Product& product, int64_t start, const float* words, int64_t output,
                   std::integer_sequence<int, kCounts...>) {
  ((count == kCounts + 1 ? run_few<Form, kCounts + 1>(product, start, words, output) : void()), ...);
}

// Outputs from `begin` to `end`, 16 at a time, for all rows, so that all rows use the weights while these are cached.
template <class Form>
void run_strips(const Product& product, int64_t begin, int64_t end) {
  const int64_t steps = product.padded() / Form::kInputs, parts = parts_of(product.rows, kFew);
  float* words = scratch<Product>(product.rows * steps);
  const auto start = [&](int64_t part) { return part * product.rows / parts; };
  for (int64_t part = 0; part < parts; ++part) {
    fill_rows<Form>(product, start(part), start(part + 1) - start(part), words + start(part) * steps);
  }
  for (int64_t output = begin; output < end; output += kLanes) {
    for (int64_t part = 0; part < parts; ++part) {
      run_few_count<Form>(start(part + 1) - start(part), product, start(part), words + start(part) * steps, output,
                          std::make_integer_sequence<int, kFew>());
    }
  }
}

template <class Form>
void run_product(const Product& product) {
  if (product.rows <= kStrips) {
    at::parallel_for(0, parts_of(product.outputs, kLanes), 1, [&](int64_t begin, int64_t end) {
      run_strips<Form>(product, begin * kLanes, std::min(end * kLanes, product.outputs));
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

inline at::Tensor product(const at::Tensor& x, const at::Tensor& weight, const std::optional<at::Tensor>& bias,
                          bool pairs) {
  const at::Tensor rows = x.contiguous(), matrix = weight.contiguous();
  const at::Tensor added = bias.has_value() ? bias->contiguous() : at::Tensor();
  at::Tensor y = at::empty({x.size(0), weight.size(0)}, x.options());
  const Product operands{read(rows),
                      read(matrix),
                      added.defined() ? read(added) : nullptr,
                      static_cast<Half*>(y.mutable_data_ptr()),
                      x.size(0),
                      x.size(1),
                      weight.size(0)};
  if (pairs) {
    run_product<Pairs>(operands);
  } else {
    run_product<Singles>(operands);
  }
  return y;
}

}  // namespace polar
