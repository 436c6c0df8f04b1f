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
// fetched from memory. So weights are read once, stay in torch's layout, and no sum runs across lanes. Up to 4 rows are
// bound by reading and transposing weights, which for them are transposed in registers and used at once. For a few
// more, a *piece* of a panel is transposed at a time, which stays in the first-level cache. A sum runs in the same
// order in all three, so a row is the same whatever rows are beside it.

constexpr int64_t kBlock = 1 << 18;  // words of rows that fit the second-level cache together with a panel
constexpr int64_t kPiece = 64;       // inputs of a piece
constexpr int kFew = 4;              // rows that are multiplied by weights in registers
constexpr int kSome = 16;            // rows that are multiplied by pieces …
constexpr int kPass = 8;             // … so many at a time

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
  const Half* from = product.x + start * product.inputs;
  const __mmask16 lanes = first_lanes(rows);
  for (int64_t at = 0; at < product.padded(); at += kLanes) {
    __m512i pairs[8];
    turn(from + at, product.inputs, rows - 1, first_lanes(product.inputs - at), pairs);
    float* to = words + at / Form::kInputs * rows;
    for (int64_t pair = 0; pair < 8; ++pair) Form::put(to + pair * 2 / Form::kInputs * rows, rows, pairs[pair], lanes);
  }
}

// Inputs from `from` to `to` of 32 outputs from `start`, transposed: for each word of a row, the 32 weights for it.
// After the last output that one is repeated.
template <class Form>
void fill_panel(const Product& product, int64_t start, int64_t from, int64_t to, float* panel) {
  constexpr int64_t kWords = 2 / Form::kInputs * kPanel;  // of a pair of inputs
  for (int64_t half = 0; half < kPanel; half += kLanes) {
    const int64_t first = std::min(start + half, product.outputs - 1), last = product.outputs - 1 - first;
    for (int64_t at = from; at < to; at += kLanes) {
      __m512i pairs[8];
      turn(product.weight + first * product.inputs + at, product.inputs, last, first_lanes(product.inputs - at), pairs);
      float* words = panel + (at - from) / 2 * kWords + half;
#pragma GCC unroll 8
      for (int64_t pair = 0; pair < 8; ++pair) Form::put(words + pair * kWords, kPanel, pairs[pair]);
    }
  }
}

// Few rows and 16 outputs: weights are transposed in registers and used at once.
template <class Form, int kCount>
void run_few(const Product& product, const float* words, int64_t output) {
  const int64_t last = product.outputs - 1 - output;
  const __mmask16 lanes = first_lanes(last + 1);
  const Half* from = product.weight + output * product.inputs;
  const char* ahead = reinterpret_cast<const char*>(from + kLanes * product.inputs);
  __m512 sums[kCount];
  for (auto& sum : sums) sum = _mm512_setzero_ps();
  for (int64_t at = 0; at < product.padded(); at += kLanes) {
    __m512i pairs[8];
    turn(from + at, product.inputs, last, first_lanes(product.inputs - at), pairs);
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i, ahead += 64) {
      _mm_prefetch(ahead, _MM_HINT_T1);  // a strip and the next one are more than the first-level cache holds
      Form::template meet<kCount>(sums, words + (at + 2 * i) / Form::kInputs * kCount, pairs[i]);
    }
  }
  const __m512 bias = product.bias ? widen(product.bias + output, lanes) : _mm512_setzero_ps();
  for (int row = 0; row < kCount; ++row) {
    store_rounded(product.y + row * product.outputs + output, _mm512_add_ps(sums[row], bias), lanes);
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
  for (auto& row : sums) row[0] = row[1] = _mm512_setzero_ps();
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
    store_rounded(pass.y + row * pass.outputs, _mm512_add_ps(sums[row][0], pass.bias[0]), pass.lanes[0]);
    store_rounded(pass.y + row * pass.outputs + kLanes, _mm512_add_ps(sums[row][1], pass.bias[1]), pass.lanes[1]);
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
    fill_panel<Form>(product, output, 0, product.padded(), panel);
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
void run_few_count(const Product& product, const float* words, int64_t output, std::integer_sequence<int, kCounts...>) {
  ((product.rows == kCounts + 1 ? run_few<Form, kCounts + 1>(product, words, output) : void()), ...);
}

// Outputs from `begin` to `end`, 16 at a time.
template <class Form>
void run_strips(const Product& product, int64_t begin, int64_t end) {
  float* words = scratch<Product>(product.rows * product.padded() / Form::kInputs);
  fill_rows<Form>(product, 0, product.rows, words);
  for (int64_t output = begin; output < end; output += kLanes) {
    run_few_count<Form>(product, words, output, std::make_integer_sequence<int, kFew>());
  }
}

// sums (kCount, 32) += words · piece. Fetches `lines` of weights from `ahead` with each step.
template <class Form, int kCount>
void meet_piece(const float* words, const float* piece, int64_t steps, const char* ahead, int64_t lines, float* sums) {
  __m512 own[kCount][2];
  for (int row = 0; row < kCount; ++row) {
    own[row][0] = _mm512_load_ps(sums + row * kPanel);
    own[row][1] = _mm512_load_ps(sums + row * kPanel + kLanes);
  }
  for (int64_t step = 0; step < steps; ++step) {
    const __m512 low = _mm512_load_ps(piece + step * kPanel), high = _mm512_load_ps(piece + step * kPanel + kLanes);
    for (int64_t line = 0; line < lines; ++line, ahead += 64) _mm_prefetch(ahead, _MM_HINT_T1);
#pragma GCC unroll 8
    for (int row = 0; row < kCount; ++row) {
      const __m512 x = _mm512_set1_ps(words[step * kCount + row]);
      own[row][0] = Form::add(own[row][0], x, low);
      own[row][1] = Form::add(own[row][1], x, high);
    }
  }
  for (int row = 0; row < kCount; ++row) {
    _mm512_store_ps(sums + row * kPanel, own[row][0]);
    _mm512_store_ps(sums + row * kPanel + kLanes, own[row][1]);
  }
}

template <class Form>
void meet_piece_count(int64_t count, const float* words, const float* piece, int64_t steps, const char* ahead,
                      int64_t lines, float* sums) {
  switch (count) {
    case 4:
      return meet_piece<Form, 4>(words, piece, steps, ahead, lines, sums);
    case 5:
      return meet_piece<Form, 5>(words, piece, steps, ahead, lines, sums);
    case 6:
      return meet_piece<Form, 6>(words, piece, steps, ahead, lines, sums);
    case 7:
      return meet_piece<Form, 7>(words, piece, steps, ahead, lines, sums);
    default:
      return meet_piece<Form, 8>(words, piece, steps, ahead, lines, sums);
  }
}

// All outputs of the panels from `begin` to `end`, for all rows: more than 4, up to 16.
template <class Form>
void run_pieces(const Product& product, int64_t begin, int64_t end) {
  const int64_t steps = product.padded() / Form::kInputs, parts = parts_of(product.rows, kPass);
  const int64_t lines = parts_of(Form::kInputs, parts);
  const auto start = [&](int64_t part) { return part * product.rows / parts; };
  float* piece = scratch<Product>(product.rows * (steps + kPanel) + kPiece / Form::kInputs * kPanel);
  float* sums = piece + kPiece / Form::kInputs * kPanel;
  float* words = sums + product.rows * kPanel;
  for (int64_t part = 0; part < parts; ++part) {
    fill_rows<Form>(product, start(part), start(part + 1) - start(part), words + start(part) * steps);
  }
  for (int64_t output = begin * kPanel; output < end * kPanel; output += kPanel) {
    std::fill_n(sums, product.rows * kPanel, 0.0f);
    const auto* ahead = reinterpret_cast<const char*>(product.weight + (output + kPanel) * product.inputs);
    for (int64_t at = 0; at < product.padded(); at += kPiece) {
      const int64_t to = std::min(at + kPiece, product.padded());
      fill_panel<Form>(product, output, at, to, piece);
      for (int64_t part = 0; part < parts; ++part) {
        const int64_t count = start(part + 1) - start(part);
        meet_piece_count<Form>(count, words + start(part) * steps + at / Form::kInputs * count, piece,
                               (to - at) / Form::kInputs, ahead, lines, sums + start(part) * kPanel);
        ahead += lines * 64 * (to - at) / Form::kInputs;
      }
    }
    for (int64_t half = 0; half < kPanel && output + half < product.outputs; half += kLanes) {
      const __mmask16 lanes = first_lanes(product.outputs - output - half);
      const __m512 bias = product.bias ? widen(product.bias + output + half, lanes) : _mm512_setzero_ps();
      for (int64_t row = 0; row < product.rows; ++row) {
        store_rounded(product.y + row * product.outputs + output + half,
                      _mm512_add_ps(_mm512_load_ps(sums + row * kPanel + half), bias), lanes);
      }
    }
  }
}

template <class Form>
void run_product(const Product& product) {
  if (product.rows <= kFew) {
    at::parallel_for(0, parts_of(product.outputs, kLanes), 1, [&](int64_t begin, int64_t end) {
      run_strips<Form>(product, begin * kLanes, std::min(end * kLanes, product.outputs));
    });
    return;
  }
  const Chunks chunks(product.rows);
  at::parallel_for(0, parts_of(product.outputs, kPanel), 1, [&](int64_t begin, int64_t end) {
    if (product.rows <= kSome) return run_pieces<Form>(product, begin, end);
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
