// Products of one row with a matrix of 8-bit or 4-bit integers.
#pragma once

#include <ATen/ops/empty.h>

#include <cmath>

#include "lanes.h"
#include "team.h"

namespace polar {

// y (1, N) = x (1, K) · (integers (N, K) × scales)ᵀ. One row is bound by reading the weights, as long as little is done
// to each of them. So the row is rounded too, to 16-bit integers, 32 of which share a scale: the largest of them keep
// seven bits more than bfloat16 had. Sums over a group are exact; those over groups are float32.

constexpr int64_t kGroup = 32;
constexpr float kMax = 127 * 256;  // the largest integer: both of its bytes are signed
constexpr int64_t kBlock4 = 64;     // outputs that the packed 4-bit layout keeps together

// The row in groups, padded with zeros.
struct Rounded {
  const int16_t* whole;
  const int32_t *high, *low;  // bytes that make 256 × high + low, four inputs a word
  const float *scale, *sum;   // of each group
  int64_t groups;
};

inline Rounded round_row(const Half* x, int64_t inputs) {
  const int64_t groups = parts_of(inputs, kGroup), padded = groups * kGroup;
  float* words = scratch<Rounded>(padded + 2 * groups);
  auto* whole = reinterpret_cast<int16_t*>(words);
  auto* high = reinterpret_cast<int8_t*>(words + padded / 2);
  auto* low = high + padded;
  float *scale = words + padded, *sum = scale + groups;
  for (int64_t group = 0; group < groups; ++group) {
    const int64_t at = group * kGroup, left = inputs - at;
    const __m512 first = widen(x + at, first_lanes(left)), second = widen(x + at + kLanes, first_lanes(left - kLanes));
    float most = _mm512_reduce_max_ps(_mm512_max_ps(_mm512_abs_ps(first), _mm512_abs_ps(second)));
    if (_mm512_cmp_ps_mask(first, second, _CMP_UNORD_Q)) most = NAN;  // a maximum may lose it, integers cannot hold it
    scale[group] = most / kMax;
    const __m512 by = _mm512_set1_ps(most > 0 ? kMax / most : 0.0f);
    const __m512i low_half = _mm512_cvtps_epi32(_mm512_mul_ps(first, by));
    const __m512i high_half = _mm512_cvtps_epi32(_mm512_mul_ps(second, by));
    sum[group] = scale[group] * static_cast<float>(_mm512_reduce_add_epi32(_mm512_add_epi32(low_half, high_half)));
    for (int64_t half = 0; half < 2; ++half) {
      const __m512i value = half ? high_half : low_half;
      const int64_t to = at + half * kLanes;
      const __m512i rest = _mm512_srai_epi32(_mm512_slli_epi32(value, 24), 24);  // the low byte, signed
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(whole + to), _mm512_cvtepi32_epi16(value));
      _mm_storeu_si128(reinterpret_cast<__m128i*>(low + to), _mm512_cvtepi32_epi8(rest));
      _mm_storeu_si128(reinterpret_cast<__m128i*>(high + to),
                       _mm512_cvtepi32_epi8(_mm512_srai_epi32(_mm512_sub_epi32(value, rest), 8)));
    }
  }
  return {whole, reinterpret_cast<const int32_t*>(high), reinterpret_cast<const int32_t*>(low), scale, sum, groups};
}

// Sums of 16 outputs from `weight` on, of which the first `count` exist.
inline __m512 meet_bytes(const Rounded& row, const int8_t* weight, int64_t inputs, int64_t count) {
  __m512 totals[kLanes];
  for (auto& total : totals) total = _mm512_setzero_ps();
  const auto* ahead = reinterpret_cast<const char*>(weight + kLanes * inputs);
  for (int64_t group = 0; group < row.groups; ++group) {
    const int64_t at = group * kGroup, left = inputs - at;
    const auto here = static_cast<__mmask32>(left >= kGroup ? ~0u : (1u << left) - 1);
    const __m512i x = _mm512_load_si512(row.whole + at);
    const __m512 scale = _mm512_set1_ps(row.scale[group]);
    for (int64_t line = 0; line < 8; ++line, ahead += 64) _mm_prefetch(ahead, _MM_HINT_T0);
#pragma GCC unroll 16
    for (int64_t output = 0; output < kLanes; ++output) {
      const int8_t* from = weight + std::min(output, count - 1) * inputs + at;
      const __m512i integers = _mm512_cvtepi8_epi16(_mm256_maskz_loadu_epi8(here, from));
      const __m512i exact = _mm512_dpwssd_epi32(_mm512_setzero_si512(), integers, x);
      totals[output] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(exact), scale, totals[output]);
    }
  }
  return sums_of(totals);
}

inline at::Tensor product_int8(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& scale) {
  const at::Tensor row = x.contiguous(), matrix = weight.contiguous(), scales = scale.contiguous();
  const int64_t inputs = x.size(1), outputs = weight.size(0);
  at::Tensor y = at::empty({1, outputs}, x.options());
  const Rounded rounded = round_row(read(row), inputs);
  const auto* from = static_cast<const int8_t*>(matrix.const_data_ptr());
  const Half* by = read(scales);
  auto* to = static_cast<Half*>(y.mutable_data_ptr());
  share(true, parts_of(outputs, kLanes), [&](Range& range) {
    for (int64_t begin, end; range.take(begin, end);) {
      for (int64_t start = begin * kLanes; start < std::min(end * kLanes, outputs); start += kLanes) {
        const int64_t count = std::min(kLanes, outputs - start);
        const __mmask16 lanes = first_lanes(count);
        const __m512 sums = meet_bytes(rounded, from + start * inputs, inputs, count);
        store_rounded(to + start, _mm512_mul_ps(sums, widen(by + start, lanes)), lanes);
      }
    }
  });
  return y;
}

// Four bytes of the row next to four others, each for half of the lanes.
inline __m512i beside(const int32_t* words) {
  return _mm512_mask_set1_epi32(_mm512_set1_epi32(words[0]), 0xff00, words[1]);
}

// Sums of 256 × high + low over both halves of the lanes, for 32 outputs whose lanes `unpack` has crossed; in order.
inline void gather_sums(const __m512i (&high)[4], const __m512i (&low)[4], __m512 (&sums)[2]) {
  __m256i folded[4];
  for (int i = 0; i < 4; ++i) {
    const __m512i both = _mm512_add_epi32(_mm512_slli_epi32(high[i], 8), low[i]);
    folded[i] = _mm256_add_epi32(_mm512_castsi512_si256(both), _mm512_extracti64x4_epi64(both, 1));
  }
  const __m512i first = _mm512_inserti64x4(_mm512_castsi256_si512(folded[0]), folded[1], 1);
  const __m512i second = _mm512_inserti64x4(_mm512_castsi256_si512(folded[2]), folded[3], 1);
  sums[0] = _mm512_cvtepi32_ps(_mm512_shuffle_i32x4(first, second, 0x88));
  sums[1] = _mm512_cvtepi32_ps(_mm512_shuffle_i32x4(first, second, 0xdd));
}

// Eight inputs of 64 outputs: a byte holds the codes of outputs n and n + 32 for one input. Transposed, so that four
// inputs of an output share a word: inputs 0 to 3 in the lower half of the lanes, 4 to 7 in the upper.
inline void unpack(const uint8_t* from, __m512i (&codes)[4]) {
  __m512i rows[4];
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const auto* row = reinterpret_cast<const __m256i*>(from) + i;
    rows[i] = _mm512_inserti64x4(_mm512_castsi256_si512(_mm256_loadu_si256(row)), _mm256_loadu_si256(row + 4), 1);
  }
  const __m512i low = _mm512_unpacklo_epi8(rows[0], rows[1]), low_after = _mm512_unpacklo_epi8(rows[2], rows[3]);
  const __m512i high = _mm512_unpackhi_epi8(rows[0], rows[1]), high_after = _mm512_unpackhi_epi8(rows[2], rows[3]);
  codes[0] = _mm512_unpacklo_epi16(low, low_after);
  codes[1] = _mm512_unpackhi_epi16(low, low_after);
  codes[2] = _mm512_unpacklo_epi16(high, high_after);
  codes[3] = _mm512_unpackhi_epi16(high, high_after);
}

// 64 outputs, of which `packed` holds the codes; weight = (code − 8) × scale + zero, scales and zeros (groups, N, 2).
inline void meet_codes(const Rounded& row, const uint8_t* packed, const Half* scales_zeros, int64_t outputs, Half* y) {
  const __m512i nibble = _mm512_set1_epi8(15);
  __m512 totals[4];
  for (auto& total : totals) total = _mm512_setzero_ps();
  for (int64_t group = 0; group < row.groups; ++group) {
    __m512i high[2][4], low[2][4];
    for (int half = 0; half < 2; ++half)
      for (int i = 0; i < 4; ++i) high[half][i] = low[half][i] = _mm512_setzero_si512();
    for (int64_t at = group * kGroup; at < (group + 1) * kGroup; at += 8) {
      const uint8_t* from = packed + at * kBlock4 / 2;
      for (int64_t line = 0; line < 4; ++line) _mm_prefetch(from + 4096 + 64 * line, _MM_HINT_T0);
      const __m512i x_high = beside(row.high + at / 4), x_low = beside(row.low + at / 4);
      __m512i codes[4];
      unpack(from, codes);
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {
        const __m512i here = _mm512_and_si512(codes[i], nibble);
        const __m512i there = _mm512_and_si512(_mm512_srli_epi16(codes[i], 4), nibble);
        high[0][i] = _mm512_dpbusd_epi32(high[0][i], here, x_high);
        low[0][i] = _mm512_dpbusd_epi32(low[0][i], here, x_low);
        high[1][i] = _mm512_dpbusd_epi32(high[1][i], there, x_high);
        low[1][i] = _mm512_dpbusd_epi32(low[1][i], there, x_low);
      }
    }
    const __m512 by = _mm512_set1_ps(row.scale[group]), sum = _mm512_set1_ps(row.sum[group]);
    const __m512 less = _mm512_set1_ps(-8 * row.sum[group]);
    const Half* own = scales_zeros + group * outputs * 2;
    for (int64_t line = 0; line < 4; ++line) _mm_prefetch(own + 2 * kBlock4 + 32 * line, _MM_HINT_T0);
    for (int half = 0; half < 2; ++half) {
      __m512 sums[2];
      gather_sums(high[half], low[half], sums);
      for (int i = 0; i < 2; ++i) {
        const int64_t part = 2 * half + i;
        const __m512i pairs = _mm512_loadu_si512(own + part * 2 * kLanes);
        const __m512 coded = _mm512_fmadd_ps(sums[i], by, less);
        totals[part] = _mm512_fmadd_ps(second_of(pairs), sum, totals[part]);
        totals[part] = _mm512_fmadd_ps(first_of(pairs), coded, totals[part]);
      }
    }
  }
  for (int64_t part = 0; part < 4; ++part) store_rounded(y + part * kLanes, totals[part]);
}

// `packed` as `_convert_weight_to_int4pack_for_cpu` returns it, with a multiple of 64 outputs and of 32 inputs.
inline at::Tensor product_int4(const at::Tensor& x, const at::Tensor& packed, const at::Tensor& scales_zeros) {
  const at::Tensor row = x.contiguous(), matrix = packed.contiguous(), pairs = scales_zeros.contiguous();
  const int64_t inputs = x.size(1), outputs = scales_zeros.size(1);
  at::Tensor y = at::empty({1, outputs}, x.options());
  const Rounded rounded = round_row(read(row), inputs);
  const auto* from = static_cast<const uint8_t*>(matrix.const_data_ptr());
  const Half* scales = read(pairs);
  auto* to = static_cast<Half*>(y.mutable_data_ptr());
  share(true, outputs / kBlock4, [&](Range& range) {
    for (int64_t begin, end; range.take(begin, end);) {
      for (int64_t start = begin * kBlock4; start < end * kBlock4; start += kBlock4) {
        meet_codes(rounded, from + start * inputs / 2, scales + 2 * start, outputs, to + start);
      }
    }
  });
  return y;
}

}  // namespace polar
