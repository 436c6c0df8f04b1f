// Products of few or many rows with a matrix.
#pragma once

#include "lanes.h"
#include "team.h"
#include "tiles.h"

namespace polar {

// y (M, N) = x (M, K) · weightᵀ + bias. Weights lie in *panels* of 32 outputs: for each pair of inputs, the two weights
// of each output side by side, as `panels.py` packs them. So a panel is read from memory in order, once; outputs are
// along lanes, and no sum runs across them. Rows are multiplied by a panel 12 at a time, or 6 without AVX512, while what
// comes next is fetched. A sum runs in the same order for any number of rows, so a row is the same whatever rows are beside it.

constexpr int64_t kBlock = 1 << 18;  // words of rows that fit the second-level cache together with a panel
constexpr int64_t kAhead = 4096;     // bytes to fetch ahead where a panel is used once

struct Product {
  const Half* x;
  const float* panels;  // (N / 32, K / 2, 32), rounded up
  const Half* bias;
  Half* y;
  int64_t rows, inputs, outputs;
  const Half* scale = nullptr;  // of each output, for sums without their bias; null = 1
  int64_t pairs() const { return parts_of(inputs, 2); }
  int64_t padded() const { return parts_of(inputs, kLanes) * kLanes; }
};

// Numbers of a matrix (N, K), one row after another, or in panels.
struct Numbers {
  const Half* numbers;
  bool panels;

  void copy(int64_t row, int64_t inputs, Half* to) const {
    if (!panels) {
      std::copy_n(numbers + row * inputs, inputs, to);
      return;
    }
    const auto* pairs = reinterpret_cast<const uint32_t*>(numbers) + row / kPanel * (inputs / 2) * kPanel;
    for (int64_t pair = 0; pair < inputs / 2; ++pair) {
      const uint32_t both = pairs[pair * kPanel + row % kPanel];
      to[2 * pair] = static_cast<Half>(both);
      to[2 * pair + 1] = static_cast<Half>(both >> 16);
    }
  }
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

struct Pass {
  const float* words;  // of the rows
  const float* panel;
  int64_t pairs;
  const char* ahead;  // weights to fetch meanwhile, `hop` bytes a pair
  int64_t hop;
  __m512 scale[2], bias[2];
  Half* y;
  int64_t outputs;
  __mmask16 lanes[2];
};

template <class Form, int kCount>
void run_rows(const Pass& pass) {
  for (int first = 0; first < 2; first += kBeside) {
    __m512 sums[kCount][kBeside];
    for (auto& row : sums)
      for (auto& sum : row) sum = _mm512_setzero_ps();
    const float* panel = pass.panel + first * kLanes;
    const char* ahead = pass.ahead + (pass.hop > 64 ? 64 * first : 0);
    for (int64_t pair = 0; pair < pass.pairs; ++pair, panel += kPanel, ahead += pass.hop) {
      __m512 weights[kBeside];
      for (int part = 0; part < kBeside; ++part) weights[part] = _mm512_loadu_ps(panel + part * kLanes);
      _mm_prefetch(ahead, _MM_HINT_T0);
      if (kBeside > 1 && pass.hop > 64) _mm_prefetch(ahead + 64, _MM_HINT_T0);
      Form::template meet<kCount>(sums, pass.words + pair * (2 / Form::kInputs) * kCount, weights);
    }
    for (int row = 0; row < kCount; ++row) {
      for (int part = 0; part < kBeside; ++part) {
        const int half = first + part;
        Half* y = pass.y + row * pass.outputs + half * kLanes;
        store_rounded(y, _mm512_fmadd_ps(sums[row][part], pass.scale[half], pass.bias[half]), pass.lanes[half]);
      }
    }
  }
}

template <class Form, int... kCounts>
void run_count(int64_t count, const Pass& pass, std::integer_sequence<int, kCounts...>) {
  ((count == kCounts + 1 ? run_rows<Form, kCounts + 1>(pass) : void()), ...);
}

// Rows of a product in chunks of nearly one size.
struct Chunks {
  int64_t rows, count;
  explicit Chunks(int64_t rows) : rows(rows), count(parts_of(rows, kRows)) {}
  int64_t start(int64_t chunk) const { return chunk * rows / count; }
};

// The words of the chunks of rows from `from` to `to`.
template <class Form>
const float* words_of(const Product& product, const Chunks& chunks, int64_t from, int64_t to) {
  const int64_t steps = product.padded() / Form::kInputs, start = chunks.start(from);
  float* words = scratch<Product>(steps * (chunks.start(to) - start));
  for (int64_t chunk = from; chunk < to; ++chunk) {
    const int64_t row = chunks.start(chunk);
    fill_rows<Form>(product, row, chunks.start(chunk + 1) - row, words + (row - start) * steps);
  }
  return words;
}

// All outputs of a panel, for the chunks of rows from `from` to `to`, which `words` are of.
template <class Form>
void run_panel(const Product& product, const Chunks& chunks, const float* words, int64_t from, int64_t to,
               int64_t number, const float* panel) {
  const int64_t steps = product.padded() / Form::kInputs, start = chunks.start(from), pairs = product.pairs();
  const int64_t output = number * kPanel;
  Pass pass{nullptr, panel, pairs, nullptr, 2 * 64 / (to - from), {}, {}, nullptr, product.outputs, {}};
  for (int64_t half = 0; half < 2; ++half) {
    const int64_t at = output + half * kLanes;
    pass.lanes[half] = first_lanes(product.outputs - at);
    pass.scale[half] = product.scale ? widen(product.scale + at, pass.lanes[half]) : _mm512_set1_ps(1.0f);
    pass.bias[half] = widen(product.bias + at, pass.lanes[half]);
  }
  // Each chunk of several fetches its share of the next panel.
  pass.ahead = reinterpret_cast<const char*>(panel) + (to - from > 1 ? pairs * kPanel * sizeof(float) : kAhead);
  for (int64_t chunk = from; chunk < to; ++chunk) {
    const int64_t row = chunks.start(chunk);
    pass.words = words + (row - start) * steps;
    pass.y = product.y + row * product.outputs + output;
    run_count<Form>(chunks.start(chunk + 1) - row, pass, std::make_integer_sequence<int, kRows>());
    pass.ahead += pairs * pass.hop;
  }
}

// `panel_of(number)` is where the numbers of a panel are.
template <class Form, class PanelOf>
void run_by_rows(const Product& product, const Sharing& sharing, const PanelOf& panel_of) {
  const Chunks chunks(product.rows);
  const int64_t size = product.rows * product.padded() / Form::kInputs;
  const int64_t blocks = std::min(parts_of(size, kBlock), chunks.count);
  share(sharing, parts_of(product.outputs, kPanel), [&](Range& range) {
    int64_t filled = -1;
    const float* words = nullptr;
    for (int64_t begin, end; range.take(begin, end);) {
      for (int64_t block = 0; block < blocks; ++block) {
        const int64_t from = block * chunks.count / blocks, to = (block + 1) * chunks.count / blocks;
        if (block != filled) words = words_of<Form>(product, chunks, from, to);
        filled = block;
        for (int64_t number = begin; number < end; ++number) {
          run_panel<Form>(product, chunks, words, from, to, number, panel_of(number));
        }
      }
    }
  });
}

#ifdef __AMX_BF16__

// `panel_of(number)` is where the numbers of a panel are.
template <class PanelOf>
void run_in_tiles(const Product& product, const Sharing& sharing, const PanelOf& panel_of) {
  const int64_t pairs = product.pairs(), left = pairs % kTile;
  const TileSums to{product.scale, product.bias, product.y, product.outputs};
  share(sharing, parts_of(product.outputs, kPanel), [&](Range& range) {
    const TileRows rows(product.x, product.rows, product.inputs);
    const Tiles own = rows.tiles();
    alignas(64) float last[kTile * kPanel];
    const auto run = [&](const TileBlock& block, int64_t number) {
      const float* panel = panel_of(number);
      TileLines lines{reinterpret_cast<const char*>(panel), kLine, parts_of(pairs, kTile)};
      if (left) {
        std::fill_n(std::copy_n(panel + (pairs - left) * kPanel, left * kPanel, last), (kTile - left) * kPanel, 0.0f);
        lines.last = reinterpret_cast<const char*>(last);
      }
      // Two tiles of several fetch their share of the next panel.
      lines.hop = kTile * kLine / block.count() / 64 * 64;
      lines.ahead = lines.lines + (block.count() > 1 ? pairs * kLine : kAhead);
      for (int64_t tile = block.begin; tile < block.end; tile += 2, lines.ahead += lines.steps * lines.hop) {
        run_tiles(rows, tile, block.end, lines, to, number * kPanel);
      }
    };
    for (int64_t begin, end; range.take(begin, end);) {
      for (const TileBlock& block : rows.blocks()) {
        for (int64_t number = begin; number < end; ++number) run(block, number);
      }
    }
  });
}

#endif

// `pairs` says which form inputs have where there are no tiles.
inline void run_product(const Product& product, bool pairs, const Sharing& sharing) {
  const auto panel_of = [&](int64_t number) { return product.panels + number * product.pairs() * kPanel; };
#ifdef __AMX_BF16__
  if (has_tiles) return run_in_tiles(product, sharing, panel_of);
#endif
  pairs ? run_by_rows<Pairs>(product, sharing, panel_of) : run_by_rows<Singles>(product, sharing, panel_of);
}

}  // namespace polar
