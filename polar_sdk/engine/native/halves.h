// Registers of 16 lanes as two of 8, for processors with AVX2 (with VNNI or not) and without AVX512. Inside `polar`, the
// names of AVX512 that the kernels use mean these functions, so that there is one source of the kernels. Included by
// `lanes.h` alone.
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace polar {

#define POLAR_LANES inline __attribute__((always_inline))

struct __m512 {
  __m256 low, high;
};
struct __m512i {
  __m256i low, high;
};
struct __m512d {
  __m256d low, high;
};
using __mmask16 = uint16_t;

// A function of whole registers that does the same to both halves.
#define POLAR_EACH_1(name, half, Result, Value) \
  POLAR_LANES Result name(Value x) { return {half(x.low), half(x.high)}; }
#define POLAR_EACH_2(name, half, Result, Value) \
  POLAR_LANES Result name(Value x, Value y) { return {half(x.low, y.low), half(x.high, y.high)}; }
#define POLAR_EACH_3(name, half, Result, Value) \
  POLAR_LANES Result name(Value x, Value y, Value z) { \
    return {half(x.low, y.low, z.low), half(x.high, y.high, z.high)}; \
  }
#define POLAR_SHIFT(name, half) \
  POLAR_LANES __m512i name(__m512i x, int by) { return {half(x.low, by), half(x.high, by)}; }

POLAR_EACH_2(_mm512_add_ps, _mm256_add_ps, __m512, __m512)
POLAR_EACH_2(_mm512_sub_ps, _mm256_sub_ps, __m512, __m512)
POLAR_EACH_2(_mm512_mul_ps, _mm256_mul_ps, __m512, __m512)
POLAR_EACH_2(_mm512_div_ps, _mm256_div_ps, __m512, __m512)
POLAR_EACH_2(_mm512_min_ps, _mm256_min_ps, __m512, __m512)
POLAR_EACH_2(_mm512_max_ps, _mm256_max_ps, __m512, __m512)
POLAR_EACH_3(_mm512_fmadd_ps, _mm256_fmadd_ps, __m512, __m512)
POLAR_EACH_3(_mm512_fnmadd_ps, _mm256_fnmadd_ps, __m512, __m512)
POLAR_EACH_2(_mm512_unpacklo_ps, _mm256_unpacklo_ps, __m512, __m512)
POLAR_EACH_2(_mm512_unpackhi_ps, _mm256_unpackhi_ps, __m512, __m512)
POLAR_EACH_2(_mm512_unpacklo_pd, _mm256_unpacklo_pd, __m512d, __m512d)
POLAR_EACH_2(_mm512_unpackhi_pd, _mm256_unpackhi_pd, __m512d, __m512d)
POLAR_EACH_2(_mm512_unpacklo_epi32, _mm256_unpacklo_epi32, __m512i, __m512i)
POLAR_EACH_2(_mm512_unpackhi_epi32, _mm256_unpackhi_epi32, __m512i, __m512i)
POLAR_EACH_2(_mm512_unpacklo_epi64, _mm256_unpacklo_epi64, __m512i, __m512i)
POLAR_EACH_2(_mm512_unpackhi_epi64, _mm256_unpackhi_epi64, __m512i, __m512i)
POLAR_EACH_2(_mm512_add_epi32, _mm256_add_epi32, __m512i, __m512i)
POLAR_EACH_2(_mm512_sub_epi32, _mm256_sub_epi32, __m512i, __m512i)
POLAR_EACH_2(_mm512_and_si512, _mm256_and_si256, __m512i, __m512i)
POLAR_EACH_2(_mm512_or_si512, _mm256_or_si256, __m512i, __m512i)
POLAR_EACH_2(_mm512_xor_si512, _mm256_xor_si256, __m512i, __m512i)
POLAR_SHIFT(_mm512_slli_epi32, _mm256_slli_epi32)
POLAR_SHIFT(_mm512_srli_epi32, _mm256_srli_epi32)
POLAR_SHIFT(_mm512_srai_epi32, _mm256_srai_epi32)
POLAR_SHIFT(_mm512_srli_epi16, _mm256_srli_epi16)
POLAR_SHIFT(_mm512_slli_epi16, _mm256_slli_epi16)
POLAR_EACH_1(_mm512_castps_si512, _mm256_castps_si256, __m512i, __m512)
POLAR_EACH_1(_mm512_castsi512_ps, _mm256_castsi256_ps, __m512, __m512i)
POLAR_EACH_1(_mm512_castps_pd, _mm256_castps_pd, __m512d, __m512)
POLAR_EACH_1(_mm512_castpd_ps, _mm256_castpd_ps, __m512, __m512d)
POLAR_EACH_1(_mm512_cvtps_epi32, _mm256_cvtps_epi32, __m512i, __m512)
POLAR_EACH_1(_mm512_cvtepi32_ps, _mm256_cvtepi32_ps, __m512, __m512i)

POLAR_LANES __m512 _mm512_set1_ps(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
POLAR_LANES __m512 _mm512_setzero_ps() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
POLAR_LANES __m512i _mm512_set1_epi32(int x) { return {_mm256_set1_epi32(x), _mm256_set1_epi32(x)}; }
POLAR_LANES __m512i _mm512_set1_epi8(char x) { return {_mm256_set1_epi8(x), _mm256_set1_epi8(x)}; }
POLAR_LANES __m512i _mm512_setzero_si512() { return {_mm256_setzero_si256(), _mm256_setzero_si256()}; }

// Memory.
POLAR_LANES __m512 _mm512_loadu_ps(const float* from) { return {_mm256_loadu_ps(from), _mm256_loadu_ps(from + 8)}; }
POLAR_LANES __m512 _mm512_load_ps(const float* from) { return _mm512_loadu_ps(from); }
POLAR_LANES void _mm512_storeu_ps(float* to, __m512 x) {
  _mm256_storeu_ps(to, x.low);
  _mm256_storeu_ps(to + 8, x.high);
}
POLAR_LANES void _mm512_store_ps(float* to, __m512 x) { _mm512_storeu_ps(to, x); }
POLAR_LANES __m512i _mm512_loadu_si512(const void* from) {
  const auto* halves = static_cast<const __m256i*>(from);
  return {_mm256_loadu_si256(halves), _mm256_loadu_si256(halves + 1)};
}
POLAR_LANES void _mm512_storeu_si512(void* to, __m512i x) {
  auto* halves = static_cast<__m256i*>(to);
  _mm256_storeu_si256(halves, x.low);
  _mm256_storeu_si256(halves + 1, x.high);
}
POLAR_LANES void _mm512_store_si512(void* to, __m512i x) { _mm512_storeu_si512(to, x); }

// Masks: all bits of a lane where that lane is meant.
POLAR_LANES __m512i lanes_of(__mmask16 mask) {
  const __m256i bits = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128), all = _mm256_set1_epi32(mask);
  const __m256i above = _mm256_srli_epi32(all, 8);
  return {_mm256_cmpeq_epi32(_mm256_and_si256(all, bits), bits), _mm256_cmpeq_epi32(_mm256_and_si256(above, bits), bits)};
}
POLAR_LANES __m512 _mm512_mask_blend_ps(__mmask16 mask, __m512 x, __m512 y) {
  const __m512 lanes = _mm512_castsi512_ps(lanes_of(mask));
  return {_mm256_blendv_ps(x.low, y.low, lanes.low), _mm256_blendv_ps(x.high, y.high, lanes.high)};
}
POLAR_LANES __m512 _mm512_maskz_mov_ps(__mmask16 mask, __m512 x) {
  return _mm512_castsi512_ps(_mm512_and_si512(lanes_of(mask), _mm512_castps_si512(x)));
}
POLAR_LANES __m512 _mm512_maskz_loadu_ps(__mmask16 mask, const float* from) {
  const __m512i lanes = lanes_of(mask);
  return {_mm256_maskload_ps(from, lanes.low), _mm256_maskload_ps(from + 8, lanes.high)};
}
POLAR_LANES void _mm512_mask_storeu_ps(float* to, __mmask16 mask, __m512 x) {
  const __m512i lanes = lanes_of(mask);
  _mm256_maskstore_ps(to, lanes.low, x.low);
  _mm256_maskstore_ps(to + 8, lanes.high, x.high);
}
POLAR_LANES __m256i _mm256_maskz_loadu_epi16(__mmask16 mask, const void* from) {
  if (mask == 0xffff) return _mm256_loadu_si256(static_cast<const __m256i*>(from));
  alignas(32) uint16_t lanes[16] = {};
  const auto* numbers = static_cast<const uint16_t*>(from);
  for (unsigned left = mask; left; left &= left - 1) lanes[__builtin_ctz(left)] = numbers[__builtin_ctz(left)];
  return _mm256_load_si256(reinterpret_cast<const __m256i*>(lanes));
}
POLAR_LANES void _mm256_mask_storeu_epi16(void* to, __mmask16 mask, __m256i x) {
  if (mask == 0xffff) return _mm256_storeu_si256(static_cast<__m256i*>(to), x);
  alignas(32) uint16_t lanes[16];
  _mm256_store_si256(reinterpret_cast<__m256i*>(lanes), x);
  auto* numbers = static_cast<uint16_t*>(to);
  for (unsigned left = mask; left; left &= left - 1) numbers[__builtin_ctz(left)] = lanes[__builtin_ctz(left)];
}
template <int kHow>
POLAR_LANES __mmask16 compare(__m512 x, __m512 y) {
  const int low = _mm256_movemask_ps(_mm256_cmp_ps(x.low, y.low, kHow));
  return static_cast<__mmask16>(low | _mm256_movemask_ps(_mm256_cmp_ps(x.high, y.high, kHow)) << 8);
}
#undef _mm512_cmp_ps_mask
#undef _mm512_mask_cmp_ps_mask
#define _mm512_cmp_ps_mask(x, y, how) compare<how>(x, y)
#define _mm512_mask_cmp_ps_mask(mask, x, y, how) static_cast<__mmask16>((mask) & compare<how>(x, y))

// Sums and largest ones, of all lanes.
POLAR_LANES float _mm512_reduce_add_ps(__m512 x) {
  const __m256 eight = _mm256_add_ps(x.low, x.high);
  __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  four = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(four, _mm_movehdup_ps(four)));
}
POLAR_LANES float _mm512_reduce_max_ps(__m512 x) {
  const __m256 eight = _mm256_max_ps(x.low, x.high);
  __m128 four = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  four = _mm_max_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_max_ss(four, _mm_movehdup_ps(four)));
}
POLAR_LANES int _mm512_reduce_add_epi32(__m512i x) {
  const __m256i eight = _mm256_add_epi32(x.low, x.high);
  __m128i four = _mm_add_epi32(_mm256_castsi256_si128(eight), _mm256_extracti128_si256(eight, 1));
  four = _mm_add_epi32(four, _mm_shuffle_epi32(four, 0x4e));
  return _mm_cvtsi128_si32(_mm_add_epi32(four, _mm_shuffle_epi32(four, 0xb1)));
}
POLAR_LANES float _mm512_cvtss_f32(__m512 x) { return _mm256_cvtss_f32(x.low); }
POLAR_LANES __m512 _mm512_abs_ps(__m512 x) {
  return _mm512_castsi512_ps(_mm512_and_si512(_mm512_castps_si512(x), _mm512_set1_epi32(0x7fffffff)));
}

// Quarters of registers, by a constant.
template <int kFrom>
POLAR_LANES __m128i quarter(__m512i x) {
  return _mm256_extracti128_si256(kFrom < 2 ? x.low : x.high, kFrom % 2);
}
template <int kHow>
POLAR_LANES __m512i quarters(__m512i x, __m512i y) {
  return {_mm256_set_m128i(quarter<(kHow >> 2) & 3>(x), quarter<kHow & 3>(x)),
          _mm256_set_m128i(quarter<(kHow >> 6) & 3>(y), quarter<(kHow >> 4) & 3>(y))};
}
#undef _mm512_shuffle_i32x4
#undef _mm512_shuffle_f32x4
#undef _mm512_inserti64x4
#undef _mm512_roundscale_ps
#define _mm512_shuffle_i32x4(x, y, how) quarters<how>(x, y)
#define _mm512_shuffle_f32x4(x, y, how) \
  _mm512_castsi512_ps(quarters<how>(_mm512_castps_si512(x), _mm512_castps_si512(y)))
#define _mm512_inserti64x4(x, half, which) __m512i{(x).low, half}
#define _mm512_roundscale_ps(x, how) nearest(x)
POLAR_LANES __m512i _mm512_castsi256_si512(__m256i x) { return {x, x}; }

// Other sizes of numbers.
POLAR_LANES __m512 _mm512_cvtph_ps(__m256i x) {
  return {_mm256_cvtph_ps(_mm256_castsi256_si128(x)), _mm256_cvtph_ps(_mm256_extracti128_si256(x, 1))};
}
POLAR_LANES __m512i _mm512_cvtepu8_epi32(__m128i x) {
  return {_mm256_cvtepu8_epi32(x), _mm256_cvtepu8_epi32(_mm_srli_si128(x, 8))};
}
POLAR_LANES __m512i _mm512_cvtepi8_epi32(__m128i x) {
  return {_mm256_cvtepi8_epi32(x), _mm256_cvtepi8_epi32(_mm_srli_si128(x, 8))};
}
POLAR_LANES __m512i _mm512_cvtepu16_epi32(__m256i x) {
  return {_mm256_cvtepu16_epi32(_mm256_castsi256_si128(x)), _mm256_cvtepu16_epi32(_mm256_extracti128_si256(x, 1))};
}
POLAR_LANES __m256i _mm512_cvtepi32_epi16(__m512i x) {  // of numbers that fit 16 bits without a sign
  return _mm256_permute4x64_epi64(_mm256_packus_epi32(x.low, x.high), 0xd8);
}
POLAR_LANES __m128i _mm512_cvtepi32_epi8(__m512i x) {  // of numbers that fit 8 bits with a sign
  const __m256i both = _mm256_permute4x64_epi64(_mm256_packs_epi32(x.low, x.high), 0xd8);
  return _mm_packs_epi16(_mm256_castsi256_si128(both), _mm256_extracti128_si256(both, 1));
}

constexpr int kToNearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
POLAR_LANES __m512 nearest(__m512 x) { return {_mm256_round_ps(x.low, kToNearest), _mm256_round_ps(x.high, kToNearest)}; }

// x × 2^power for whole powers; in two steps, since 2^power alone may be too small for a float.
POLAR_LANES __m256 scaled(__m256 x, __m256 power) {
  const __m256i whole = _mm256_cvtps_epi32(power), half = _mm256_srai_epi32(whole, 1);
  const auto exponent = [](__m256i of) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(of, _mm256_set1_epi32(127)), 23));
  };
  return _mm256_mul_ps(_mm256_mul_ps(x, exponent(half)), exponent(_mm256_sub_epi32(whole, half)));
}
POLAR_LANES __m512 _mm512_scalef_ps(__m512 x, __m512 power) {
  return {scaled(x.low, power.low), scaled(x.high, power.high)};
}

#ifdef __AVXVNNI__
POLAR_EACH_3(_mm512_dpbusd_epi32, _mm256_dpbusd_avx_epi32, __m512i, __m512i)
#else
// sum + four products of unsigned and signed bytes, exactly: products of two of them would not fit 16 bits together.
POLAR_LANES __m256i add_bytes(__m256i sum, __m256i codes, __m256i bytes) {
  const __m256i first = _mm256_set1_epi16(0xff), ones = _mm256_set1_epi16(1);
  const __m256i even = _mm256_maddubs_epi16(_mm256_and_si256(codes, first), bytes);
  const __m256i odd = _mm256_maddubs_epi16(_mm256_andnot_si256(first, codes), bytes);
  return _mm256_add_epi32(sum, _mm256_add_epi32(_mm256_madd_epi16(even, ones), _mm256_madd_epi16(odd, ones)));
}
POLAR_LANES __m512i _mm512_dpbusd_epi32(__m512i sum, __m512i codes, __m512i bytes) {
  return {add_bytes(sum.low, codes.low, bytes.low), add_bytes(sum.high, codes.high, bytes.high)};
}

#define POLAR_SHORT_SUMS
// Products of two neighbours, of codes without a sign and bytes, summed up in 16 bits; and four of them in 32 bits.
POLAR_EACH_2(multiply_short, _mm256_maddubs_epi16, __m512i, __m512i)
POLAR_LANES __m512i add_short(__m512i sum, __m512i codes, __m512i bytes) {
  const __m512i both = multiply_short(codes, bytes);
  return {_mm256_add_epi16(sum.low, both.low), _mm256_add_epi16(sum.high, both.high)};
}
// Sums of four products of bytes with signs, of which the first are −128 … 127 and the others −127 … 127.
POLAR_LANES __m256i add_signed(__m256i sum, __m256i codes, __m256i bytes) {
  const __m256i products = _mm256_maddubs_epi16(_mm256_abs_epi8(codes), _mm256_sign_epi8(bytes, codes));
  return _mm256_add_epi32(sum, _mm256_madd_epi16(products, _mm256_set1_epi16(1)));
}
POLAR_LANES __m512i add_signed(__m512i sum, __m512i codes, __m512i bytes) {
  return {add_signed(sum.low, codes.low, bytes.low), add_signed(sum.high, codes.high, bytes.high)};
}
POLAR_LANES __m512i add_widened(__m512i sum, __m512i shorts) {
  const __m256i ones = _mm256_set1_epi16(1);
  return {_mm256_add_epi32(sum.low, _mm256_madd_epi16(shorts.low, ones)),
          _mm256_add_epi32(sum.high, _mm256_madd_epi16(shorts.high, ones))};
}
#endif

}  // namespace polar
