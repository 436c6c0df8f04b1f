// Products of 16 or 32 rows with 32 outputs by the tiles of AMX, where the library is for processors that have it.
#pragma once

#include <sys/syscall.h>
#include <unistd.h>

#include "lanes.h"

namespace polar {

#ifdef __AMX_BF16__

// A tile holds 16 lines of 64 bytes: 32 inputs of 16 rows; or 16 pairs of inputs of 16 outputs, as they lie in a panel;
// or the float32 sums of 16 rows and 16 outputs. Two tiles of rows meet two of outputs, so that four sums go on side by
// side. A sum runs in the same order for any number of rows, so a row is the same whatever rows are beside it.

constexpr int64_t kTile = 16;
constexpr int64_t kStep = 2 * kTile;               // inputs that meet at a time
constexpr int64_t kLine = kPanel * sizeof(float);  // bytes of a pair of inputs of 32 outputs

// The system saves tiles only for processes that asked for them. Where it refuses, products do without.
inline bool ask_for_tiles() {
  constexpr long kRequest = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, kRequest, kTileData) == 0;
}
inline const bool has_tiles = ask_for_tiles();

// The compiler does not know that tiles are read from memory, and written to it.
inline void order_memory() { asm volatile("" ::: "memory"); }

// The tiles of a thread, while this lives: sums of the first rows in 0 and 1, of the second ones in 2 and 3, rows in 4
// and 5, weights in 6 and 7.
class Tiles {
 public:
  Tiles(int64_t first, int64_t second) {
    struct alignas(64) {
      uint8_t palette = 1, start = 0, unused[14] = {};
      uint16_t bytes[16] = {};
      uint8_t lines[16] = {};
    } shape;
    const int64_t lines[8] = {first, first, second, second, first, second, kTile, kTile};
    for (int tile = 0; tile < 8; ++tile) {
      shape.lines[tile] = static_cast<uint8_t>(lines[tile]);
      shape.bytes[tile] = lines[tile] ? 64 : 0;
    }
    order_memory();
    _tile_loadconfig(&shape);
  }
  ~Tiles() { _tile_release(); }
  Tiles(const Tiles&) = delete;
  Tiles& operator=(const Tiles&) = delete;
};

// Lines of weights: pairs of inputs, of 16 outputs in each of two tiles side by side.
struct TileLines {
  const char* lines;
  int64_t line;                // bytes from one to the next
  int64_t steps;               // of 16 lines
  const char* last = nullptr;  // what the last step reads where there are fewer; null = it is as the others
  const char* ahead = nullptr;  // weights to fetch meanwhile, `hop` bytes a step
  int64_t hop = 0;

  const char* at(int64_t step) const { return last && step + 1 == steps ? last : lines + step * kTile * line; }
};

// sums (16 or 32, 32) = one or two tiles of rows · weights, on top of what they are if `kOnTop`; `width` numbers from a
// row of sums to the next.
template <bool kTwo, bool kOnTop>
void meet_tiles(const Half* first, const Half* second, int64_t stride, const TileLines& weights, float* sums,
                int64_t width) {
  float* below = sums + kTile * width;
  const int64_t bytes = width * static_cast<int64_t>(sizeof(float));
  order_memory();
  if constexpr (kOnTop) {
    _tile_loadd(0, sums, bytes);
    _tile_loadd(1, sums + kTile, bytes);
    if constexpr (kTwo) {
      _tile_loadd(2, below, bytes);
      _tile_loadd(3, below + kTile, bytes);
    }
  } else {
    _tile_zero(0);
    _tile_zero(1);
    if constexpr (kTwo) {
      _tile_zero(2);
      _tile_zero(3);
    }
  }
  const char* ahead = weights.ahead;
  for (int64_t step = 0; step < weights.steps; ++step, ahead += weights.hop) {
    const char* from = weights.at(step);
    for (int64_t at = 0; at < weights.hop; at += 64) _mm_prefetch(ahead + at, _MM_HINT_T0);
    _tile_loadd(4, first + step * kStep, stride);
    _tile_loadd(6, from, weights.line);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(7, from + 64, weights.line);
    _tile_dpbf16ps(1, 4, 7);
    if constexpr (kTwo) {
      _tile_loadd(5, second + step * kStep, stride);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
  }
  _tile_stored(0, sums, bytes);
  _tile_stored(1, sums + kTile, bytes);
  if constexpr (kTwo) {
    _tile_stored(2, below, bytes);
    _tile_stored(3, below + kTile, bytes);
  }
  order_memory();
}

// Tiles of rows that fit the second-level cache, from `begin` up to `end`; two of them meet weights at a time.
struct TileBlock {
  int64_t begin, end;
  int64_t count() const { return parts_of(end - begin, 2); }
};

// The rows (M, K) of a product, 16 of them to a tile. Where tiles cannot be read from the rows as they lie, they are
// copied, with zeros after them: all rows where the inputs are no whole number of steps, else those after the last whole
// tile.
class TileRows {
 public:
  TileRows(const Half* x, int64_t rows, int64_t inputs)
      : x_(x), rows_(rows), padded_(parts_of(inputs, kStep) * kStep), copied_(first_copied(inputs)) {
    if (copied_ == rows) return;
    const int64_t count = rows - copied_, lines = parts_of(count, kTile) * kTile;
    copy_ = reinterpret_cast<Half*>(scratch<TileRows>(lines * padded_ / 2));
    std::fill_n(copy_, lines * padded_, Half{0});
    for (int64_t row = 0; row < count; ++row) std::copy_n(x + (copied_ + row) * inputs, inputs, copy_ + row * padded_);
  }

  int64_t count() const { return rows_; }
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

// What becomes of sums: y (M, N) = sums × scale + bias; no scale is 1.
struct TileSums {
  const Half *scale, *bias;
  Half* y;
  int64_t outputs;
};

// One or two tiles of rows, those from `tile` and before `end`, by the weights of the 32 outputs from `output` on.
inline void run_tiles(const TileRows& rows, int64_t tile, int64_t end, const TileLines& weights, const TileSums& to,
                      int64_t output) {
  alignas(64) float sums[2 * kTile * kPanel];
  if (end - tile > 1) {
    meet_tiles<true, false>(rows.tile(tile), rows.tile(tile + 1), rows.stride(), weights, sums, kPanel);
  } else {
    meet_tiles<false, false>(rows.tile(tile), nullptr, rows.stride(), weights, sums, kPanel);
  }
  const int64_t outputs = std::min(to.outputs - output, kPanel);
  const __mmask16 lanes[2] = {first_lanes(outputs), first_lanes(outputs - kLanes)};
  __m512 scale[2], bias[2];
  for (int64_t half = 0; half < 2; ++half) {
    const int64_t at = output + half * kLanes;
    scale[half] = to.scale ? widen(to.scale + at, lanes[half]) : _mm512_set1_ps(1.0f);
    bias[half] = widen(to.bias + at, lanes[half]);
  }
  const __mmask32 stored = lanes[0] | static_cast<__mmask32>(lanes[1]) << kLanes;
  const int64_t start = tile * kTile, count = std::min((tile + 2) * kTile, std::min(end * kTile, rows.count())) - start;
  Half* y = to.y + start * to.outputs + output;
  for (int64_t row = 0; row < count; ++row, y += to.outputs) {
    const float* own = sums + row * kPanel;
    const __m512 low = _mm512_fmadd_ps(_mm512_load_ps(own), scale[0], bias[0]);
    const __m512 high = _mm512_fmadd_ps(_mm512_load_ps(own + kLanes), scale[1], bias[1]);
    _mm512_mask_storeu_epi16(y, stored, reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(high, low)));
  }
}

#endif

}  // namespace polar
