// Pieces of the kernels: bfloat16 into and out of registers, sums and powers of 16 lanes, memory of a thread.
#pragma once

#include <ATen/core/Tensor.h>
#include <immintrin.h>

#include <algorithm>
#include <cstdint>
#include <vector>

namespace polar {

using Half = uint16_t;  // the bits of a bfloat16
constexpr int64_t kLanes = 16;
constexpr int64_t kPanel = 32;  // lanes that a product handles at a time …
constexpr int64_t kRows = 12;   // … for this many rows: 24 sums, of 32 registers

inline const Half* read(const at::Tensor& tensor) { return static_cast<const Half*>(tensor.const_data_ptr()); }

// Of 16 pairs of bfloat16: the first of each pair, and the second, as float32.
inline __m512 first_of(__m512i pairs) { return _mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16)); }
inline __m512 second_of(__m512i pairs) {
  return _mm512_castsi512_ps(_mm512_and_si512(pairs, _mm512_set1_epi32(static_cast<int>(0xffff0000))));
}

inline __m512 widen(const Half* from, __mmask16 lanes) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(lanes, from)), 16));
}

inline void store_rounded(Half* to, __m512 values, __mmask16 lanes = 0xffff) {
  _mm256_mask_storeu_epi16(to, lanes, reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(values)));
}

inline __mmask16 first_lanes(int64_t count) {
  return static_cast<__mmask16>((1u << std::clamp<int64_t>(count, 0, kLanes)) - 1);
}

// Lanes from `begin` to `end`, either of which may be out of range.
inline __mmask16 lanes_between(int64_t begin, int64_t end) {
  return static_cast<__mmask16>(first_lanes(end) & ~first_lanes(begin));
}

// Sixteen inputs of 16 outputs, transposed: for each of 8 pairs of inputs, the weights of the 16 outputs.
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

// The sum of each of 16 vectors, in the lane of its number.
inline __m512 sums_of(__m512 (&vectors)[kLanes]) {
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

// Memory that a thread keeps from one call to the next: new pages would cost more than what is computed in them.
template <class Owner>
float* scratch(int64_t words) {
  thread_local std::vector<float> kept;
  if (static_cast<int64_t>(kept.size()) < words + kLanes) kept.resize(words + kLanes);
  const auto address = reinterpret_cast<uintptr_t>(kept.data());
  return kept.data() + (64 - address % 64) % 64 / sizeof(float);
}

inline int64_t parts_of(int64_t count, int64_t size) { return (count + size - 1) / size; }

// e to the power of values that are at most a little above 0.
inline __m512 exponential(__m512 x) {
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

inline __m512 hyperbolic_tangent(__m512 x) {
  const __m512 grown = exponential(_mm512_min_ps(_mm512_add_ps(x, x), _mm512_set1_ps(80.0f)));
  const __m512 one = _mm512_set1_ps(1.0f);
  return _mm512_sub_ps(one, _mm512_div_ps(_mm512_set1_ps(2.0f), _mm512_add_ps(grown, one)));
}

}  // namespace polar
