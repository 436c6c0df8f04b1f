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
  int64_t rows, inputs, outputs, step;  // from one row of the result to the next
  const Half* scale = nullptr;  // of each output, for sums without their bias; null = 1
  float* wide = nullptr;        // where sums go as they are, instead of rounded ones to y
  int64_t pairs() const { return parts_of(inputs, 2); }
  int64_t padded() const { return parts_of(inputs, kLanes) * kLanes; }
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

// What becomes of the sums of a panel's 32 outputs: they are multiplied by their scales, and have a bias added.
struct Ending {
  __m512 scale[2], bias[2];
  __mmask16 lanes[2];

  Ending(const Product& product, int64_t number) {
    for (int64_t half = 0; half < 2; ++half) {
      const int64_t at = number * kPanel + half * kLanes;
      lanes[half] = first_lanes(product.outputs - at);
      scale[half] = product.scale ? widen(product.scale + at, lanes[half]) : _mm512_set1_ps(1.0f);
      bias[half] = widen(product.bias + at, lanes[half]);
    }
  }
  __m512 of(__m512 sum, int half) const { return _mm512_fmadd_ps(sum, scale[half], bias[half]); }
};

struct Pass {
  const float* words;  // of the rows
  const float* panel;
  int64_t pairs;
  const char* ahead;  // weights to fetch meanwhile, `hop` bytes a pair
  int64_t hop;
  Ending ending;
  Half* y;
  float* wide;  // instead of y, where it is not null
  int64_t step;
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
        const int64_t at = row * pass.step + half * kLanes;
        const __m512 sum = pass.ending.of(sums[row][part], half);
        if (pass.wide) {
          _mm512_mask_storeu_ps(pass.wide + at, pass.ending.lanes[half], sum);
        } else {
          store_rounded(pass.y + at, sum, pass.ending.lanes[half]);
        }
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
  const Ending ending(product, number);
  Pass pass{nullptr, panel, pairs, nullptr, 2 * 64 / (to - from), ending, nullptr, nullptr, product.step};
  // Each chunk of several fetches its share of the next panel.
  pass.ahead = reinterpret_cast<const char*>(panel) + (to - from > 1 ? pairs * kPanel * sizeof(float) : kAhead);
  for (int64_t chunk = from; chunk < to; ++chunk) {
    const int64_t row = chunks.start(chunk);
    pass.words = words + (row - start) * steps;
    const int64_t at = row * product.step + number * kPanel;
    pass.y = product.y + at;
    pass.wide = product.wide ? product.wide + at : nullptr;
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

// Tiles of rows that fit the second-level cache, from `begin` up to `end`; two of them meet weights at a time.
struct TileBlock {
  int64_t begin, end;
  int64_t count() const { return parts_of(end - begin, 2); }
};

// The rows of a product, 16 of them to a tile. Where tiles cannot be read from the rows as they lie, they are
// copied, with zeros after them: all rows where the inputs are no whole number of steps, else those after the last whole
// tile.
class TileRows {
 public:
  explicit TileRows(const Product& product)
      : x_(product.x),
        rows_(product.rows),
        padded_(parts_of(product.inputs, kStep) * kStep),
        copied_(first_copied(product.inputs)) {
    if (copied_ == rows_) return;
    const int64_t count = rows_ - copied_, lines = parts_of(count, kTile) * kTile, inputs = product.inputs;
    copy_ = reinterpret_cast<Half*>(scratch<TileRows>(lines * padded_ / 2));
    std::fill_n(copy_, lines * padded_, Half{0});
    for (int64_t row = 0; row < count; ++row) std::copy_n(x_ + (copied_ + row) * inputs, inputs, copy_ + row * padded_);
  }

  int64_t stride() const { return padded_ * static_cast<int64_t>(sizeof(Half)); }
  const Half* tile(int64_t number) const {
    const int64_t row = number * kTile;
    return row < copied_ ? x_ + row * padded_ : copy_ + (row - copied_) * padded_;
  }
  // For up to 32 rows, tiles of just those that there are; else whole ones.
  Tiles tiles() const {
    return is_small() ? Tiles(std::min(rows_, kTile), std::max<int64_t>(rows_ - kTile, 0)) : Tiles(kTile, kTile);
  }
  std::vector<TileBlock> blocks() const {
    constexpr int64_t kNumbers = (1 << 20) / sizeof(Half);
    const int64_t size = std::max<int64_t>(kNumbers / padded_ / kTile / 2 * 2, 2), end = parts_of(rows_, kTile);
    std::vector<TileBlock> blocks;
    for (int64_t begin = 0; begin < end; begin += size) blocks.push_back({begin, std::min(begin + size, end)});
    return blocks;
  }

 private:
  bool is_small() const { return rows_ <= 2 * kTile; }
  int64_t first_copied(int64_t inputs) const {
    if (padded_ != inputs) return 0;
    return is_small() ? rows_ : rows_ / kTile * kTile;
  }

  const Half* x_;
  const int64_t rows_, padded_, copied_;
  Half* copy_ = nullptr;
};

// One or two tiles of rows, those from `tile` and before `end`, by the weights of the 32 outputs of a panel.
inline void run_tiles(const Product& product, const TileRows& rows, int64_t tile, int64_t end, const TileLines& weights,
                      const Ending& ending, int64_t number) {
  alignas(64) float sums[2 * kTile * kPanel];
  if (end - tile > 1) {
    meet_tiles<true, false>(rows.tile(tile), rows.tile(tile + 1), rows.stride(), weights, sums, kPanel);
  } else {
    meet_tiles<false, false>(rows.tile(tile), nullptr, rows.stride(), weights, sums, kPanel);
  }
  const __mmask32 lanes = ending.lanes[0] | static_cast<__mmask32>(ending.lanes[1]) << kLanes;
  const int64_t start = tile * kTile, count = std::min(std::min(tile + 2, end) * kTile, product.rows) - start;
  int64_t at = start * product.step + number * kPanel;
  for (int64_t row = 0; row < count; ++row, at += product.step) {
    const __m512 low = ending.of(_mm512_load_ps(sums + row * kPanel), 0);
    const __m512 high = ending.of(_mm512_load_ps(sums + row * kPanel + kLanes), 1);
    if (product.wide) {
      _mm512_mask_storeu_ps(product.wide + at, ending.lanes[0], low);
      _mm512_mask_storeu_ps(product.wide + at + kLanes, ending.lanes[1], high);
    } else {
      _mm512_mask_storeu_epi16(product.y + at, lanes, reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(high, low)));
    }
  }
}

// `panel_of(number)` is where the numbers of a panel are.
template <class PanelOf>
void run_in_tiles(const Product& product, const Sharing& sharing, const PanelOf& panel_of) {
  const int64_t pairs = product.pairs(), left = pairs % kTile;
  share(sharing, parts_of(product.outputs, kPanel), [&](Range& range) {
    const TileRows rows(product);
    const std::vector<TileBlock> blocks = rows.blocks();
    const Tiles own = rows.tiles();
    alignas(64) float last[kTile * kPanel];
    const auto run = [&](const TileBlock& block, int64_t number) {
      const float* panel = panel_of(number);
      const Ending ending(product, number);
      TileLines lines{reinterpret_cast<const char*>(panel), kLine, parts_of(pairs, kTile)};
      if (left) {
        std::fill_n(std::copy_n(panel + (pairs - left) * kPanel, left * kPanel, last), (kTile - left) * kPanel, 0.0f);
        lines.last = reinterpret_cast<const char*>(last);
      }
      // Two tiles of several fetch their share of the next panel.
      lines.hop = kTile * kLine / block.count() / 64 * 64;
      lines.ahead = lines.lines + (block.count() > 1 ? pairs * kLine : kAhead);
      for (int64_t tile = block.begin; tile < block.end; tile += 2, lines.ahead += lines.steps * lines.hop) {
        run_tiles(product, rows, tile, block.end, lines, ending, number);
      }
    };
    for (int64_t begin, end; range.take(begin, end);) {
      for (const TileBlock& block : blocks) {
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
