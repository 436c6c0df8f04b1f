// Registers of 16 lanes as four of 4, for 64-bit Arm with dot products of bytes. Inside `polar`, the names of AVX512 that
// the kernels use mean these functions, so that there is one source of the kernels. Sums across lanes run in the order of
// `halves.h`, and a maximum of what is no number is the one of x86: results are those of AVX2, to the bit. Included by
// `lanes.h` alone.
#pragma once

#include <arm_neon.h>

#include <cstdint>

#ifndef __ARM_FEATURE_DOTPROD
#error "kernels for Arm need dot products of bytes: see build.py"
#endif

namespace polar {

#define POLAR_LANES inline __attribute__((always_inline))

struct __m512 {
  float32x4_t a, b, c, d;
};
struct __m512i {
  int32x4_t a, b, c, d;
};
struct __m512d {
  float64x2_t a, b, c, d;
};
struct __m256i {
  int32x4_t a, b;
};
using __m128i = int32x4_t;
using __mmask16 = uint16_t;

// A function of whole registers that does the same to all four quarters.
#define POLAR_EACH_1(name, quarter, Result, Value) \
  POLAR_LANES Result name(Value x) { return {quarter(x.a), quarter(x.b), quarter(x.c), quarter(x.d)}; }
#define POLAR_EACH_2(name, quarter, Result, Value) \
  POLAR_LANES Result name(Value x, Value y) { \
    return {quarter(x.a, y.a), quarter(x.b, y.b), quarter(x.c, y.c), quarter(x.d, y.d)}; \
  }
#define POLAR_EACH_3(name, quarter, Result, Value) \
  POLAR_LANES Result name(Value x, Value y, Value z) { \
    return {quarter(x.a, y.a, z.a), quarter(x.b, y.b, z.b), quarter(x.c, y.c, z.c), quarter(x.d, y.d, z.d)}; \
  }

POLAR_LANES float32x4_t times_plus(float32x4_t x, float32x4_t y, float32x4_t sum) { return vfmaq_f32(sum, x, y); }
POLAR_LANES float32x4_t minus_times(float32x4_t x, float32x4_t y, float32x4_t sum) { return vfmsq_f32(sum, x, y); }
POLAR_LANES float32x4_t lesser(float32x4_t x, float32x4_t y) { return vbslq_f32(vcltq_f32(x, y), x, y); }
POLAR_LANES float32x4_t greater(float32x4_t x, float32x4_t y) { return vbslq_f32(vcgtq_f32(x, y), x, y); }
POLAR_LANES int32x4_t low_pairs(int32x4_t x, int32x4_t y) {
  return vreinterpretq_s32_s64(vzip1q_s64(vreinterpretq_s64_s32(x), vreinterpretq_s64_s32(y)));
}
POLAR_LANES int32x4_t high_pairs(int32x4_t x, int32x4_t y) {
  return vreinterpretq_s32_s64(vzip2q_s64(vreinterpretq_s64_s32(x), vreinterpretq_s64_s32(y)));
}

POLAR_EACH_2(_mm512_add_ps, vaddq_f32, __m512, __m512)
POLAR_EACH_2(_mm512_sub_ps, vsubq_f32, __m512, __m512)
POLAR_EACH_2(_mm512_mul_ps, vmulq_f32, __m512, __m512)
POLAR_EACH_2(_mm512_div_ps, vdivq_f32, __m512, __m512)
POLAR_EACH_2(_mm512_min_ps, lesser, __m512, __m512)
POLAR_EACH_2(_mm512_max_ps, greater, __m512, __m512)
POLAR_EACH_3(_mm512_fmadd_ps, times_plus, __m512, __m512)
POLAR_EACH_3(_mm512_fnmadd_ps, minus_times, __m512, __m512)
POLAR_EACH_2(_mm512_unpacklo_ps, vzip1q_f32, __m512, __m512)
POLAR_EACH_2(_mm512_unpackhi_ps, vzip2q_f32, __m512, __m512)
POLAR_EACH_2(_mm512_unpacklo_pd, vzip1q_f64, __m512d, __m512d)
POLAR_EACH_2(_mm512_unpackhi_pd, vzip2q_f64, __m512d, __m512d)
POLAR_EACH_2(_mm512_unpacklo_epi32, vzip1q_s32, __m512i, __m512i)
POLAR_EACH_2(_mm512_unpackhi_epi32, vzip2q_s32, __m512i, __m512i)
POLAR_EACH_2(_mm512_unpacklo_epi64, low_pairs, __m512i, __m512i)
POLAR_EACH_2(_mm512_unpackhi_epi64, high_pairs, __m512i, __m512i)
POLAR_EACH_2(_mm512_add_epi32, vaddq_s32, __m512i, __m512i)
POLAR_EACH_2(_mm512_sub_epi32, vsubq_s32, __m512i, __m512i)
POLAR_EACH_2(_mm512_and_si512, vandq_s32, __m512i, __m512i)
POLAR_EACH_2(_mm512_or_si512, vorrq_s32, __m512i, __m512i)
POLAR_EACH_2(_mm512_xor_si512, veorq_s32, __m512i, __m512i)
POLAR_EACH_1(_mm512_abs_ps, vabsq_f32, __m512, __m512)
POLAR_EACH_1(_mm512_castps_si512, vreinterpretq_s32_f32, __m512i, __m512)
POLAR_EACH_1(_mm512_castsi512_ps, vreinterpretq_f32_s32, __m512, __m512i)
POLAR_EACH_1(_mm512_castps_pd, vreinterpretq_f64_f32, __m512d, __m512)
POLAR_EACH_1(_mm512_castpd_ps, vreinterpretq_f32_f64, __m512, __m512d)
POLAR_EACH_1(_mm512_cvtps_epi32, vcvtnq_s32_f32, __m512i, __m512)
POLAR_EACH_1(_mm512_cvtepi32_ps, vcvtq_f32_s32, __m512, __m512i)
POLAR_EACH_1(nearest, vrndnq_f32, __m512, __m512)
#define _mm512_roundscale_ps(x, how) nearest(x)

// Shifts of numbers seen as `Numbers`.
template <class Numbers>
POLAR_LANES int32x4_t left(int32x4_t x, int by) {
  return __builtin_bit_cast(int32x4_t, __builtin_bit_cast(Numbers, x) << by);
}
template <class Numbers>
POLAR_LANES int32x4_t right(int32x4_t x, int by) {
  return __builtin_bit_cast(int32x4_t, __builtin_bit_cast(Numbers, x) >> by);
}
#define POLAR_SHIFT(name, shift) \
  POLAR_LANES __m512i name(__m512i x, int by) { return {shift(x.a, by), shift(x.b, by), shift(x.c, by), shift(x.d, by)}; }
POLAR_SHIFT(_mm512_slli_epi32, left<uint32x4_t>)
POLAR_SHIFT(_mm512_srli_epi32, right<uint32x4_t>)
POLAR_SHIFT(_mm512_srai_epi32, right<int32x4_t>)
template <bool kLeft>
POLAR_LANES int32x4_t shift_halves(int32x4_t x, int by) {
  const auto to_left = static_cast<int16_t>(kLeft ? by : -by);
  return vreinterpretq_s32_u16(vshlq_u16(vreinterpretq_u16_s32(x), vdupq_n_s16(to_left)));
}
POLAR_SHIFT(_mm512_slli_epi16, shift_halves<true>)
POLAR_SHIFT(_mm512_srli_epi16, shift_halves<false>)

POLAR_LANES __m512i four(int32x4_t x) { return {x, x, x, x}; }
POLAR_LANES __m512 _mm512_set1_ps(float x) { return {vdupq_n_f32(x), vdupq_n_f32(x), vdupq_n_f32(x), vdupq_n_f32(x)}; }
POLAR_LANES __m512 _mm512_setzero_ps() { return _mm512_set1_ps(0.0f); }
POLAR_LANES __m512i _mm512_set1_epi32(int x) { return four(vdupq_n_s32(x)); }
POLAR_LANES __m512i _mm512_set1_epi8(signed char x) { return four(vreinterpretq_s32_s8(vdupq_n_s8(x))); }
POLAR_LANES __m512i _mm512_setzero_si512() { return _mm512_set1_epi32(0); }

// Memory, whatever numbers it holds.
template <class Register>
POLAR_LANES Register load(const void* from) {
  Register x;
  __builtin_memcpy(&x, from, sizeof x);
  return x;
}
template <class Register>
POLAR_LANES void store(void* to, Register x) {
  __builtin_memcpy(to, &x, sizeof x);
}
template <class Register, class Quarter>
POLAR_LANES Register load_four(const void* from) {
  const auto* bytes = static_cast<const char*>(from);
  return {load<Quarter>(bytes), load<Quarter>(bytes + 16), load<Quarter>(bytes + 32), load<Quarter>(bytes + 48)};
}
template <class Register>
POLAR_LANES void store_four(void* to, Register x) {
  auto* bytes = static_cast<char*>(to);
  store(bytes, x.a);
  store(bytes + 16, x.b);
  store(bytes + 32, x.c);
  store(bytes + 48, x.d);
}
POLAR_LANES __m512 _mm512_loadu_ps(const void* from) { return load_four<__m512, float32x4_t>(from); }
POLAR_LANES __m512 _mm512_load_ps(const void* from) { return _mm512_loadu_ps(from); }
POLAR_LANES void _mm512_storeu_ps(void* to, __m512 x) { store_four(to, x); }
POLAR_LANES void _mm512_store_ps(void* to, __m512 x) { store_four(to, x); }
POLAR_LANES __m512i _mm512_loadu_si512(const void* from) { return load_four<__m512i, int32x4_t>(from); }
POLAR_LANES void _mm512_storeu_si512(void* to, __m512i x) { store_four(to, x); }
POLAR_LANES void _mm512_store_si512(void* to, __m512i x) { store_four(to, x); }
POLAR_LANES __m256i _mm256_loadu_si256(const void* from) {
  return {load<int32x4_t>(from), load<int32x4_t>(static_cast<const char*>(from) + 16)};
}
POLAR_LANES void _mm256_store_si256(void* to, __m256i x) {
  store(to, x.a);
  store(static_cast<char*>(to) + 16, x.b);
}
POLAR_LANES __m128i _mm_loadu_si128(const void* from) { return load<__m128i>(from); }
POLAR_LANES void _mm_store_si128(void* to, __m128i x) { store(to, x); }
POLAR_LANES void prefetch(const void* from) { __builtin_prefetch(from); }
#define _mm_prefetch(from, how) prefetch(from)
// Waits for about as long as the instruction of that name; `yield` does nothing on most cores.
POLAR_LANES void _mm_pause() { asm volatile("isb" ::: "memory"); }

// Masks: all bits of a lane where that lane is meant.
POLAR_LANES uint32x4_t lanes_of(__mmask16 mask, int first) {
  const uint32x4_t bits = {1, 2, 4, 8};
  return vtstq_u32(vdupq_n_u32(static_cast<uint32_t>(mask >> first)), bits);
}
POLAR_LANES __m512 _mm512_mask_blend_ps(__mmask16 mask, __m512 x, __m512 y) {
  return {vbslq_f32(lanes_of(mask, 0), y.a, x.a), vbslq_f32(lanes_of(mask, 4), y.b, x.b),
          vbslq_f32(lanes_of(mask, 8), y.c, x.c), vbslq_f32(lanes_of(mask, 12), y.d, x.d)};
}
POLAR_LANES __m512 _mm512_maskz_mov_ps(__mmask16 mask, __m512 x) {
  return _mm512_mask_blend_ps(mask, _mm512_setzero_ps(), x);
}

// Memory by masks: nothing beside the lanes that are meant is read or written.
template <class Number>
POLAR_LANES void copy_lanes(Number* to, const void* from, __mmask16 mask) {
  const auto* bytes = static_cast<const char*>(from);
  for (unsigned rest = mask; rest; rest &= rest - 1) {
    const int lane = __builtin_ctz(rest);
    __builtin_memcpy(to + lane, bytes + lane * sizeof(Number), sizeof(Number));
  }
}
POLAR_LANES __m512 _mm512_maskz_loadu_ps(__mmask16 mask, const void* from) {
  if (mask == 0xffff) return _mm512_loadu_ps(from);
  alignas(16) float lanes[16] = {};
  copy_lanes(lanes, from, mask);
  return _mm512_loadu_ps(lanes);
}
POLAR_LANES void _mm512_mask_storeu_ps(void* to, __mmask16 mask, __m512 x) {
  if (mask == 0xffff) return _mm512_storeu_ps(to, x);
  alignas(16) float lanes[16];
  _mm512_storeu_ps(lanes, x);
  copy_lanes(static_cast<float*>(to), lanes, mask);
}
POLAR_LANES __m256i _mm256_maskz_loadu_epi16(__mmask16 mask, const void* from) {
  if (mask == 0xffff) return _mm256_loadu_si256(from);
  alignas(16) uint16_t lanes[16] = {};
  copy_lanes(lanes, from, mask);
  return _mm256_loadu_si256(lanes);
}
POLAR_LANES void _mm256_mask_storeu_epi16(void* to, __mmask16 mask, __m256i x) {
  if (mask == 0xffff) return _mm256_store_si256(to, x);
  alignas(16) uint16_t lanes[16];
  _mm256_store_si256(lanes, x);
  copy_lanes(static_cast<uint16_t*>(to), lanes, mask);
}

// Comparisons, false for what is no number but for the first.
enum Comparison { _CMP_UNORD_Q, _CMP_EQ_OQ, _CMP_LT_OQ, _CMP_GE_OQ };
template <Comparison kHow>
POLAR_LANES uint32_t compare(float32x4_t x, float32x4_t y) {
  const uint32x4_t bits = {1, 2, 4, 8};
  uint32x4_t found;
  if constexpr (kHow == _CMP_UNORD_Q) found = vmvnq_u32(vandq_u32(vceqq_f32(x, x), vceqq_f32(y, y)));
  if constexpr (kHow == _CMP_EQ_OQ) found = vceqq_f32(x, y);
  if constexpr (kHow == _CMP_LT_OQ) found = vcltq_f32(x, y);
  if constexpr (kHow == _CMP_GE_OQ) found = vcgeq_f32(x, y);
  return vaddvq_u32(vandq_u32(found, bits));
}
template <Comparison kHow>
POLAR_LANES __mmask16 compare(__m512 x, __m512 y) {
  return static_cast<__mmask16>(compare<kHow>(x.a, y.a) | compare<kHow>(x.b, y.b) << 4 | compare<kHow>(x.c, y.c) << 8 |
                                compare<kHow>(x.d, y.d) << 12);
}
#define _mm512_cmp_ps_mask(x, y, how) compare<how>(x, y)
#define _mm512_mask_cmp_ps_mask(mask, x, y, how) static_cast<__mmask16>((mask) & compare<how>(x, y))

// Sums and largest ones, of all lanes.
POLAR_LANES float _mm512_reduce_add_ps(__m512 x) {
  const float32x4_t all = vaddq_f32(vaddq_f32(x.a, x.c), vaddq_f32(x.b, x.d));
  const float32x2_t both = vadd_f32(vget_low_f32(all), vget_high_f32(all));
  return vget_lane_f32(both, 0) + vget_lane_f32(both, 1);
}
POLAR_LANES float _mm512_reduce_max_ps(__m512 x) {
  float32x4_t all = greater(greater(x.a, x.c), greater(x.b, x.d));
  all = greater(all, vextq_f32(all, all, 2));
  return vgetq_lane_f32(greater(all, vextq_f32(all, all, 1)), 0);
}
POLAR_LANES int _mm512_reduce_add_epi32(__m512i x) {
  return vaddvq_s32(vaddq_s32(vaddq_s32(x.a, x.c), vaddq_s32(x.b, x.d)));
}
POLAR_LANES float _mm512_cvtss_f32(__m512 x) { return vgetq_lane_f32(x.a, 0); }

// Quarters of registers, by a constant.
template <int kFrom>
POLAR_LANES int32x4_t quarter(__m512i x) {
  if constexpr (kFrom == 0) return x.a;
  if constexpr (kFrom == 1) return x.b;
  if constexpr (kFrom == 2) return x.c;
  return x.d;
}
template <int kHow>
POLAR_LANES __m512i quarters(__m512i x, __m512i y) {
  return {quarter<kHow & 3>(x), quarter<(kHow >> 2) & 3>(x), quarter<(kHow >> 4) & 3>(y), quarter<(kHow >> 6) & 3>(y)};
}
#define _mm512_shuffle_i32x4(x, y, how) quarters<how>(x, y)
#define _mm512_shuffle_f32x4(x, y, how) \
  _mm512_castsi512_ps(quarters<how>(_mm512_castps_si512(x), _mm512_castps_si512(y)))
POLAR_LANES __m512i with_high(__m512i x, __m256i half) { return {x.a, x.b, half.a, half.b}; }
#define _mm512_inserti64x4(x, half, which) with_high(x, half)
POLAR_LANES __m512i _mm512_castsi256_si512(__m256i x) { return {x.a, x.b, x.a, x.b}; }

// Other sizes of numbers; narrower ones of what fits them.
POLAR_LANES int32x4_t low_half(int32x4_t x) {
  return vreinterpretq_s32_u32(vmovl_u16(vget_low_u16(vreinterpretq_u16_s32(x))));
}
POLAR_LANES int32x4_t high_half(int32x4_t x) { return vreinterpretq_s32_u32(vmovl_high_u16(vreinterpretq_u16_s32(x))); }
POLAR_LANES int16x8_t narrow(int32x4_t x, int32x4_t y) { return vmovn_high_s32(vmovn_s32(x), y); }
POLAR_LANES __m512i _mm512_cvtepu16_epi32(__m256i x) {
  return {low_half(x.a), high_half(x.a), low_half(x.b), high_half(x.b)};
}
POLAR_LANES __m512i _mm512_cvtepu8_epi32(__m128i x) {
  const uint8x16_t bytes = vreinterpretq_u8_s32(x);
  const uint16x8_t low = vmovl_u8(vget_low_u8(bytes)), high = vmovl_high_u8(bytes);
  return _mm512_cvtepu16_epi32({vreinterpretq_s32_u16(low), vreinterpretq_s32_u16(high)});
}
POLAR_LANES __m512i _mm512_cvtepi8_epi32(__m128i x) {
  const int8x16_t bytes = vreinterpretq_s8_s32(x);
  const int16x8_t low = vmovl_s8(vget_low_s8(bytes)), high = vmovl_high_s8(bytes);
  return {vmovl_s16(vget_low_s16(low)), vmovl_high_s16(low), vmovl_s16(vget_low_s16(high)), vmovl_high_s16(high)};
}
POLAR_LANES __m512 _mm512_cvtph_ps(__m256i x) {
  const float16x8_t low = vreinterpretq_f16_s32(x.a), high = vreinterpretq_f16_s32(x.b);
  return {vcvt_f32_f16(vget_low_f16(low)), vcvt_high_f32_f16(low), vcvt_f32_f16(vget_low_f16(high)),
          vcvt_high_f32_f16(high)};
}
POLAR_LANES __m256i _mm512_cvtepi32_epi16(__m512i x) {
  return {vreinterpretq_s32_s16(narrow(x.a, x.b)), vreinterpretq_s32_s16(narrow(x.c, x.d))};
}
POLAR_LANES __m128i _mm512_cvtepi32_epi8(__m512i x) {
  return vreinterpretq_s32_s8(vmovn_high_s16(vmovn_s16(narrow(x.a, x.b)), narrow(x.c, x.d)));
}

// x × 2^power for whole powers; in two steps, since 2^power alone may be too small for a float.
POLAR_LANES float32x4_t scaled(float32x4_t x, float32x4_t power) {
  const int32x4_t whole = vcvtnq_s32_f32(power), half = vshrq_n_s32(whole, 1);
  const auto exponent = [](int32x4_t of) {
    return vreinterpretq_f32_s32(vshlq_n_s32(vaddq_s32(of, vdupq_n_s32(127)), 23));
  };
  return vmulq_f32(vmulq_f32(x, exponent(half)), exponent(vsubq_s32(whole, half)));
}
POLAR_EACH_2(_mm512_scalef_ps, scaled, __m512, __m512)

// sum + four products of unsigned and signed bytes, exactly.
POLAR_LANES int32x4_t add_bytes(int32x4_t sum, int32x4_t codes, int32x4_t bytes) {
  const int8x16_t words = vreinterpretq_s8_s32(bytes);
#ifdef __ARM_FEATURE_MATMUL_INT8
  return vusdotq_s32(sum, vreinterpretq_u8_s32(codes), words);
#else
  // Codes less 128 have a sign, and what 128 × the bytes would add is subtracted as −128 × them. That is the same for all
  // outputs that meet the same word, so that the compiler makes it once for the four quarters.
  const int32x4_t less = vdotq_s32(vdupq_n_s32(0), vdupq_n_s8(-128), words);
  const int8x16_t own = veorq_s8(vreinterpretq_s8_s32(codes), vdupq_n_s8(-128));
  return vdotq_s32(vsubq_s32(sum, less), own, words);
#endif
}
POLAR_EACH_3(_mm512_dpbusd_epi32, add_bytes, __m512i, __m512i)

#define POLAR_SIGNED_BYTES
// sum + four products of bytes with signs.
POLAR_LANES int32x4_t add_signed(int32x4_t sum, int32x4_t codes, int32x4_t bytes) {
  return vdotq_s32(sum, vreinterpretq_s8_s32(codes), vreinterpretq_s8_s32(bytes));
}
POLAR_EACH_3(add_signed, add_signed, __m512i, __m512i)

#undef POLAR_EACH_1
#undef POLAR_EACH_2
#undef POLAR_EACH_3
#undef POLAR_SHIFT

}  // namespace polar
