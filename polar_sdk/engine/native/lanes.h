// Pieces of the kernels: bfloat16 into and out of registers, sums and powers of 16 lanes, memory of a thread.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#ifdef __aarch64__
#include "quarters.h"
#else
#include <immintrin.h>
#ifndef __AVX512F__
#include "halves.h"
#endif
#endif

namespace polar {

#ifndef __AVX512F__
// What follows from the other names, for registers of two or four parts.
POLAR_LANES __m512i _mm512_mask_blend_epi32(__mmask16 mask, __m512i x, __m512i y) {
  return _mm512_castps_si512(_mm512_mask_blend_ps(mask, _mm512_castsi512_ps(x), _mm512_castsi512_ps(y)));
}
POLAR_LANES __m512 _mm512_mask_max_ps(__m512 other, __mmask16 mask, __m512 x, __m512 y) {
  return _mm512_mask_blend_ps(mask, other, _mm512_max_ps(x, y));
}
POLAR_LANES __m512 _mm512_mask_add_ps(__m512 other, __mmask16 mask, __m512 x, __m512 y) {
  return _mm512_mask_blend_ps(mask, other, _mm512_add_ps(x, y));
}
POLAR_LANES void _mm512_mask_storeu_epi32(void* to, __mmask16 mask, __m512i x) {
  _mm512_mask_storeu_ps(static_cast<float*>(to), mask, _mm512_castsi512_ps(x));
}
POLAR_LANES __m512 _mm512_maskz_compress_ps(__mmask16 mask, __m512 x) {
  float lanes[16], first[16] = {};
  _mm512_storeu_ps(lanes, x);
  float* to = first;
  for (unsigned left = mask; left; left &= left - 1) *to++ = lanes[__builtin_ctz(left)];
  return _mm512_loadu_ps(first);
}
POLAR_LANES __m512i _mm512_maskz_compress_epi32(__mmask16 mask, __m512i x) {
  return _mm512_castps_si512(_mm512_maskz_compress_ps(mask, _mm512_castsi512_ps(x)));
}
#endif

using Half = uint16_t;  // the bits of a bfloat16
constexpr int64_t kLanes = 16;
constexpr int64_t kPanel = 32;  // lanes that a product handles at a time …
#ifdef __AVX512F__
constexpr int64_t kRows = 12;  // … for this many rows: 24 sums, of 32 registers
constexpr int kBeside = 2;     // registers of a panel that are handled together
#else
constexpr int64_t kRows = 6;  // one half of the lanes after the other: 12 halves of sums, of 16 registers
constexpr int kBeside = 1;
#endif

// Of 16 pairs of bfloat16: the first of each pair, and the second, as float32.
inline __m512 first_of(__m512i pairs) { return _mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16)); }
inline __m512 second_of(__m512i pairs) {
  return _mm512_castsi512_ps(_mm512_and_si512(pairs, _mm512_set1_epi32(static_cast<int>(0xffff0000))));
}

// Numbers rounded to bfloat16, to the nearest and of two to the even one; what is no number stays none.
inline __m256i rounded(__m512 values) {
#ifdef __AVX512BF16__
  return reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(values));
#else
  const __m512i bits = _mm512_castps_si512(values);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i near = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  const __m512i quiet = _mm512_or_si512(bits, _mm512_set1_epi32(0x400000));
  const __mmask16 none = _mm512_cmp_ps_mask(values, values, _CMP_UNORD_Q);
  return _mm512_cvtepi32_epi16(_mm512_srli_epi32(_mm512_mask_blend_epi32(none, near, quiet), 16));
#endif
}

// sum + both products of each pair of bfloat16.
inline __m512 add_pairs(__m512 sum, __m512i x, __m512i y) {
#ifdef __AVX512BF16__
  return _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(x), reinterpret_cast<__m512bh>(y));
#else
  return _mm512_fmadd_ps(second_of(x), second_of(y), _mm512_fmadd_ps(first_of(x), first_of(y), sum));
#endif
}

inline __m512 widen(const Half* from, __mmask16 lanes) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(lanes, from)), 16));
}

inline void store_rounded(Half* to, __m512 values, __mmask16 lanes = 0xffff) {
  _mm256_mask_storeu_epi16(to, lanes, rounded(values));
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

// How products hold their inputs, as words of 32 bits: a pair of bfloat16, multiplied together …
struct Pairs {
  static constexpr int64_t kInputs = 2;
  static constexpr int kDegree = 4;  // of `power_of_two`, for a number that becomes an input
  // The word that begins with an input.
  static float word(const Half* from) {
    return __builtin_bit_cast(float, static_cast<uint32_t>(from[0] | from[1] << 16));
  }
  // Words of 16 entries of a row and the next one; that is zero if it is not `there`.
  static __m512 words(const Half* from, int64_t step, bool there) {
    const __m512i second = there ? _mm512_castps_si512(widen(from + step, 0xffff)) : _mm512_setzero_si512();
    return _mm512_castsi512_ps(
        _mm512_or_si512(_mm512_srli_epi32(_mm512_castps_si512(widen(from, 0xffff)), 16), second));
  }
  // Sixteen numbers as inputs; returns what was kept of them.
  static __m512 keep(float* to, __m512 values) {
    const __m256i kept = rounded(values);
    _mm256_store_si256(reinterpret_cast<__m256i*>(to), kept);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(kept), 16));
  }
  static __m512 add(__m512 sum, __m512 x, __m512 weight) {
    return add_pairs(sum, _mm512_castps_si512(x), _mm512_castps_si512(weight));
  }
  // Of 16 pairs, the words; of some of them, anywhere in memory.
  static void put(float* to, int64_t, __m512i pairs) { _mm512_store_si512(to, pairs); }
  static void put(float* to, int64_t, __m512i pairs, __mmask16 lanes) { _mm512_mask_storeu_epi32(to, lanes, pairs); }
  // The sums of some rows and outputs go on by a pair of inputs: a word of each row, and registers of weights.
  template <int kCount>
  static void meet(__m512 (&sums)[kCount][kBeside], const float* words, const __m512 (&weights)[kBeside]) {
#pragma GCC unroll 12
    for (int row = 0; row < kCount; ++row) {
      const __m512 x = _mm512_set1_ps(words[row]);
#pragma GCC unroll 2
      for (int part = 0; part < kBeside; ++part) sums[row][part] = add(sums[row][part], x, weights[part]);
    }
  }
};

// … or one input as float32. `_pairs` in `__init__.py` says which is faster where.
struct Singles {
  static constexpr int64_t kInputs = 1;
  static constexpr int kDegree = 6;
  static float word(const Half* from) { return __builtin_bit_cast(float, static_cast<uint32_t>(from[0]) << 16); }
  static __m512 words(const Half* from, int64_t, bool) { return widen(from, 0xffff); }
  static __m512 keep(float* to, __m512 values) {
    _mm512_store_ps(to, values);
    return values;
  }
  static __m512 add(__m512 sum, __m512 x, __m512 weight) { return _mm512_fmadd_ps(x, weight, sum); }
  static void put(float* to, int64_t step, __m512i pairs) {
    _mm512_store_ps(to, first_of(pairs));
    _mm512_store_ps(to + step, second_of(pairs));
  }
  static void put(float* to, int64_t step, __m512i pairs, __mmask16 lanes) {
    _mm512_mask_storeu_ps(to, lanes, first_of(pairs));
    _mm512_mask_storeu_ps(to + step, lanes, second_of(pairs));
  }
  template <int kCount>
  static void meet(__m512 (&sums)[kCount][kBeside], const float* words, const __m512 (&weights)[kBeside]) {
    for (int input = 0; input < 2; ++input) {
      for (int part = 0; part < kBeside; ++part) {
        const __m512i pairs = _mm512_castps_si512(weights[part]);
        const __m512 weight = input ? second_of(pairs) : first_of(pairs);
#pragma GCC unroll 12
        for (int row = 0; row < kCount; ++row) {
          sums[row][part] = add(sums[row][part], _mm512_set1_ps(words[input * kCount + row]), weight);
        }
      }
    }
  }
};

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

constexpr float kLeastPower = -104.0f;  // e to the power of less is 0

// e to the power of values that are at most a little above 0.
inline __m512 exponential(__m512 x) {
  x = _mm512_max_ps(x, _mm512_set1_ps(kLeastPower));
  const __m512 power = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)), 0);
  __m512 rest = _mm512_fnmadd_ps(power, _mm512_set1_ps(0.693359375f), x);
  rest = _mm512_fnmadd_ps(power, _mm512_set1_ps(-2.12194440e-4f), rest);
  __m512 sum = _mm512_set1_ps(1.9875691500e-4f);
  for (const float term : {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 0.5f, 1.0f, 1.0f}) {
    sum = _mm512_fmadd_ps(sum, rest, _mm512_set1_ps(term));
  }
  return _mm512_scalef_ps(sum, power);
}

// 2 to the power of values that are at most a little above 0, by the first terms of its series: to one part in 24,000
// with 4 of them after the first, in 8 million with 6.
template <int kDegree>
__m512 power_of_two(__m512 x) {
  constexpr float kTerms[] = {1.0f, 0.69314718f, 0.24022651f, 0.055504109f, 0.0096181291f, 0.0013333558f, 1.540353e-4f};
  x = _mm512_max_ps(x, _mm512_set1_ps(-150.0f));
  const __m512 whole = _mm512_roundscale_ps(x, 0), rest = _mm512_sub_ps(x, whole);
  __m512 sum = _mm512_set1_ps(kTerms[kDegree]);
#pragma GCC unroll 6
  for (int term = kDegree - 1; term >= 0; --term) sum = _mm512_fmadd_ps(sum, rest, _mm512_set1_ps(kTerms[term]));
  return _mm512_scalef_ps(sum, whole);
}

inline __m512 hyperbolic_tangent(__m512 x) {
  const __m512 grown = exponential(_mm512_min_ps(_mm512_add_ps(x, x), _mm512_set1_ps(80.0f)));
  const __m512 one = _mm512_set1_ps(1.0f);
  return _mm512_sub_ps(one, _mm512_div_ps(_mm512_set1_ps(2.0f), _mm512_add_ps(grown, one)));
}

}  // namespace polar
