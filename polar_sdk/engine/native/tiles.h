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

#endif

}  // namespace polar
