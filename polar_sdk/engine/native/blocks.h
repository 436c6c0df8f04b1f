// Products of rows with a matrix in the formats of quantized GGUF files, whose numbers are kept as they are.
#pragma once

#include <unistd.h>

#include <cerrno>
#include <cmath>
#include <cstring>

#include "integers.h"
#include "kernels.h"

namespace polar {

// y (M, N) = x (M, K) · weightᵀ + bias. A file has rows of blocks of 32 or 256 weights. Here they are in panels of 16
// outputs, group by group of 32 inputs: words of the codes of four inputs, one for each output, beside the scales of
// the group as the file has them. So an instruction multiplies four inputs of 16 outputs, and nothing is rounded again.
//
// Rows of x are rounded to 8-bit integers, 16 of which share a scale. Where that is not enough, as in the head, which
// decides between near-equal tokens, results near a row's greatest are computed again: what is left of the row is rounded
// likewise and multiplied as another row. Sums over integers are exact, those over several are float32, in their order:
// so a row is the same whatever rows are beside it, and on every processor.

constexpr int64_t kSuperGroups = 8;  // groups that share scales of their scales
#ifdef __AVX512F__
constexpr int kBlockRows = 8;  // that meet a panel together
#else
constexpr int kBlockRows = 4;
#endif
constexpr int64_t kRowBytes = 3 << 17;  // of rows that meet all panels together, so that they stay in the cache
// Results are near the greatest within this part of their range: some hundred times the error of rows of 8 bits.
constexpr float kNear = 0.0625f;

// -- rows ------------------------------------------------------------------------------------------------------------

// Up to `kBlockRows` rows, those at the same place side by side.
struct ShortRows {
  int32_t* words;   // four integers each, (groups, 8, rows)
  float* scale;     // of the first and last 16 inputs of a group, (groups, 2, rows)
  int32_t* halves;  // sums of their integers, likewise
  float* sum;       // both times their scales, (groups, rows)
};

// Where the rows of a product are, some of them after another.
struct ShortMemory {
  float* memory;
  int64_t rows, groups;
  static constexpr int64_t kPerGroup = kWords + 5;
  int64_t chunks() const { return parts_of(rows, kBlockRows); }
  int64_t count(int64_t chunk) const { return std::min<int64_t>(rows - chunk * kBlockRows, kBlockRows); }
  int64_t size() const { return rows * groups * kPerGroup; }
  ShortRows at(int64_t chunk) const {
    float* from = memory + chunk * kBlockRows * groups * kPerGroup;
    const int64_t part = groups * count(chunk);
    auto* words = reinterpret_cast<int32_t*>(from);
    return {words, from + kWords * part, words + (kWords + 2) * part, from + (kWords + 4) * part};
  }
};

// Sixteen values of a row as integers; returns their scale times their sum, and leaves what they lack in `values`.
inline float shorten(__m512& values, int64_t group, int64_t half, int64_t row, int64_t count, const ShortRows& to) {
  float most = _mm512_reduce_max_ps(_mm512_abs_ps(values));
  if (_mm512_cmp_ps_mask(values, values, _CMP_UNORD_Q)) most = NAN;  // a maximum may lose it, integers cannot hold it
  const __m512i integers = _mm512_cvtps_epi32(_mm512_mul_ps(values, _mm512_set1_ps(most > 0 ? 127.0f / most : 0.0f)));
  const float scale = most / 127.0f;
  const int32_t sum = _mm512_reduce_add_epi32(integers);
  const int64_t own = (2 * group + half) * count + row;
  to.scale[own] = scale;
  to.halves[own] = sum;
  alignas(16) int32_t words[4];
  _mm_store_si128(reinterpret_cast<__m128i*>(words), _mm512_cvtepi32_epi8(integers));
  for (int64_t word = 0; word < 4; ++word) {
    to.words[(group * kWords + 4 * half + word) * count + row] = words[word];
  }
  values = _mm512_fnmadd_ps(_mm512_cvtepi32_ps(integers), _mm512_set1_ps(scale), values);
  return scale * static_cast<float>(sum);
}

// A row at `row` of `count`, and what it lacks in the `planes` − 1 rows after it; inputs after the last one are zero.
inline void shorten_row(const Half* x, int64_t inputs, int64_t row, int64_t planes, int64_t count, const ShortRows& to) {
  for (int64_t group = 0; group * kGroup < inputs; ++group) {
    float* sums = to.sum + group * count + row;
    std::fill_n(sums, planes, 0.0f);
    for (int64_t half = 0; half < 2; ++half) {
      const int64_t at = group * kGroup + half * kLanes;
      __m512 values = widen(x + at, first_lanes(inputs - at));
      for (int64_t plane = 0; plane < planes; ++plane) sums[plane] += shorten(values, group, half, row + plane, count, to);
    }
  }
}

// -- codes -----------------------------------------------------------------------------------------------------------

// How codes without a sign lie in a group: `word` gives those of four inputs for 16 outputs, and `put` writes all of
// them. `kWordsPerShort` words, of four, can be summed up in 16 bits, where there is no instruction for more; 0 = none can.

#ifdef POLAR_SHORT_SUMS
constexpr bool kSignedBytes = true;  // they are multiplied with their sign, in half the steps
#else
constexpr bool kSignedBytes = false;
#endif

// The codes of a group: those of four inputs for each of 16 outputs, and so on.
using Words = uint32_t[kWords][kLanes];

struct FourBits {  // low halves of bytes are one word, high ones the next
  static constexpr int64_t kBytes = 256;
  static constexpr int kWordsPerShort = 4;
  static __m512i word(const uint8_t* from, int number) {
    const __m512i both = _mm512_loadu_si512(from + 64 * (number / 2));
    return _mm512_and_si512(number % 2 ? _mm512_srli_epi16(both, 4) : both, _mm512_set1_epi8(15));
  }
  static void put(const Words& words, uint8_t* to) {
    Words both;
    for (int pair = 0; pair < 4; ++pair) {
      for (int lane = 0; lane < kLanes; ++lane) {
        both[pair][lane] = (words[2 * pair][lane] & 0x0f0f0f0f) | (words[2 * pair + 1][lane] & 0x0f0f0f0f) << 4;
      }
    }
    std::memcpy(to, both, kBytes);
  }
  static int code(const uint8_t* from, int input) {
    const int word = input / 4;
    return from[64 * (word / 2) + input % 4] >> 4 * (word % 2) & 15;
  }
};

struct FiveBits {  // four of them as above; then the fifth, of word w in bit w
  static constexpr int64_t kBytes = 320;
  static constexpr int kWordsPerShort = 4;
  static __m512i word(const uint8_t* from, int number) {
    const __m512i high = _mm512_loadu_si512(from + 256);
    const __m512i moved = number < 4 ? _mm512_slli_epi16(high, 4 - number) : _mm512_srli_epi16(high, number - 4);
    return _mm512_or_si512(FourBits::word(from, number), _mm512_and_si512(moved, _mm512_set1_epi8(16)));
  }
  static void put(const Words& words, uint8_t* to) {
    FourBits::put(words, to);
    uint32_t high[kLanes] = {};
    for (int word = 0; word < kWords; ++word) {
      for (int lane = 0; lane < kLanes; ++lane) high[lane] |= (words[word][lane] >> 4 & 0x01010101) << word;
    }
    std::memcpy(to + 256, high, sizeof high);
  }
  static int code(const uint8_t* from, int input) {
    return FourBits::code(from, input) | (from[256 + input % 4] >> input / 4 & 1) << 4;
  }
};

struct SixBits {  // four of them as above; then two, of word w in bits 2 (w mod 4), the last four words after the first
  static constexpr int64_t kBytes = 384;
  static constexpr int kWordsPerShort = 2;
  static __m512i word(const uint8_t* from, int number) {
    const __m512i high = _mm512_loadu_si512(from + 256 + 64 * (number / 4));
    const int place = 2 * (number % 4);
    const __m512i moved = place < 4 ? _mm512_slli_epi16(high, 4 - place) : _mm512_srli_epi16(high, place - 4);
    return _mm512_or_si512(FourBits::word(from, number), _mm512_and_si512(moved, _mm512_set1_epi8(48)));
  }
  static void put(const Words& words, uint8_t* to) {
    FourBits::put(words, to);
    for (int half = 0; half < 2; ++half) {
      uint32_t high[kLanes] = {};
      for (int word = 0; word < 4; ++word) {
        for (int lane = 0; lane < kLanes; ++lane) {
          high[lane] |= (words[4 * half + word][lane] >> 4 & 0x03030303) << 2 * word;
        }
      }
      std::memcpy(to + 256 + 64 * half, high, sizeof high);
    }
  }
  static int code(const uint8_t* from, int input) {
    const int word = input / 4;
    return FourBits::code(from, input) | (from[256 + 64 * (word / 4) + input % 4] >> 2 * (word % 4) & 3) << 4;
  }
};

struct EightBits {
  static constexpr int64_t kBytes = 512;
  static constexpr int kWordsPerShort = 0;
  static __m512i word(const uint8_t* from, int number) {
    const __m512i codes = _mm512_loadu_si512(from + 64 * number);
    return kSignedBytes ? _mm512_xor_si512(codes, _mm512_set1_epi8(-128)) : codes;
  }
  static void put(const Words& words, uint8_t* to) { std::memcpy(to, words, kBytes); }
  static int code(const uint8_t* from, int input) { return from[64 * (input / 4) + input % 4]; }
};

// Sums of products of codes with the integers of some rows, for 16 outputs.
template <class Codes, int kCount>
struct CodeSums {
  __m512i whole[kCount];
#ifdef POLAR_SHORT_SUMS
  static constexpr int kWordsPerShort = Codes::kWordsPerShort;
  __m512i part[kCount];
#else
  static constexpr int kWordsPerShort = 0;
#endif

  // Of four words from the one of that number on.
  template <int kFirst>
  void add(const uint8_t* codes, const int32_t* words) {
#pragma GCC unroll 8
    for (int row = 0; row < kCount; ++row) whole[row] = _mm512_setzero_si512();
#pragma GCC unroll 8
    for (int word = kFirst; word < kFirst + 4; ++word) {
      const __m512i own = Codes::word(codes, word);
#pragma GCC unroll 8
      for (int row = 0; row < kCount; ++row) {
        const __m512i x = _mm512_set1_epi32(words[word * kCount + row]);
#ifdef POLAR_SHORT_SUMS
        if constexpr (kWordsPerShort > 0) {
          part[row] = word % kWordsPerShort ? add_short(part[row], own, x) : multiply_short(own, x);
          if ((word + 1) % kWordsPerShort == 0) whole[row] = add_widened(whole[row], part[row]);
        } else {
          whole[row] = add_signed(whole[row], own, x);
        }
#else
        whole[row] = _mm512_dpbusd_epi32(whole[row], own, x);
#endif
      }
    }
  }
};

// -- scales ----------------------------------------------------------------------------------------------------------

inline __m512 float16s(const uint8_t* from) {  // 16 numbers of IEEE's 16 bits
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
}
inline __m512 bytes_of(const uint8_t* from) {
  return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))));
}
inline __m512 signed_of(const uint8_t* from) {
  return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))));
}

// One number of IEEE's 16 bits.
inline float float16_at(const uint8_t* from, int place) {
  alignas(32) uint8_t padded[32] = {};
  std::memcpy(padded, from + 2 * place, 2);
  return _mm512_cvtss_f32(float16s(padded));
}

// The weights of an output in a group: scale (code − offset) + shift, the scale of its first and last 16 inputs.
struct Line {
  float scale[2], shift;
  int offset;
};

// Sums of codes times integers, of the two halves of a group, times the scales of a row there.
inline __m512 scaled_sums(const __m512i* sums, const float* x, int step) {
  return _mm512_fmadd_ps(_mm512_cvtepi32_ps(sums[1]), _mm512_set1_ps(x[step]),
                         _mm512_mul_ps(_mm512_cvtepi32_ps(sums[0]), _mm512_set1_ps(x[0])));
}

// The same of codes without their offset.
template <int kOffset>
void take_offset(__m512i* sums, const int32_t* halves, int step) {
  for (int half = 0; half < 2; ++half) {
    sums[half] = _mm512_sub_epi32(sums[half], _mm512_set1_epi32(kOffset * halves[half * step]));
  }
}

// A format of panels: how codes lie and what they mean. In memory: `kHead` bytes before every 8 groups; in each group
// `kScales` bytes and then the codes. `enter` reads a head, `begin` the scales of a group; `add` takes the sums of both
// halves of a row, of which scales and sums of integers are at `step`. `line` says the same of one output.

// weight = d (code − offset), d for 32 inputs.
template <class Codes, int kOffset>
struct Scaled {
  using Code = Codes;
  static constexpr int64_t kHead = 0, kScales = 32;
  __m512 scale;

  void enter(const uint8_t*) {}
  void begin(const uint8_t* group) { scale = float16s(group); }
  __m512 add(__m512 total, __m512i* sums, const float* x, float, const int32_t* halves, int step) const {
    take_offset<Codes::kWordsPerShort == 0 && kSignedBytes ? 0 : kOffset>(sums, halves, step);
    return _mm512_fmadd_ps(scale, scaled_sums(sums, x, step), total);
  }
  static Line line(const uint8_t*, const uint8_t* group, int output) {
    const float own = float16_at(group, output);
    return {{own, own}, 0.0f, kOffset};
  }
};

// weight = d code + m, both for 32 inputs.
template <class Codes>
struct Shifted {
  using Code = Codes;
  static constexpr int64_t kHead = 0, kScales = 64;
  __m512 scale, shift;

  void enter(const uint8_t*) {}
  void begin(const uint8_t* group) {
    scale = float16s(group);
    shift = float16s(group + 32);
  }
  __m512 add(__m512 total, __m512i* sums, const float* x, float sum, const int32_t*, int step) const {
    return _mm512_fmadd_ps(scale, scaled_sums(sums, x, step), _mm512_fmadd_ps(shift, _mm512_set1_ps(sum), total));
  }
  static Line line(const uint8_t*, const uint8_t* group, int output) {
    const float own = float16_at(group, output);
    return {{own, own}, float16_at(group + 32, output), 0};
  }
};

// weight = d s code − e m: d and e for 256 inputs, s and m, of six bits, for 32.
template <class Codes>
struct Nested {
  using Code = Codes;
  static constexpr int64_t kHead = 64, kScales = 32;
  __m512 whole, least, scale, shift;

  void enter(const uint8_t* head) {
    whole = float16s(head);
    least = float16s(head + 32);
  }
  void begin(const uint8_t* group) {
    scale = _mm512_mul_ps(whole, bytes_of(group));
    shift = _mm512_mul_ps(least, bytes_of(group + 16));
  }
  __m512 add(__m512 total, __m512i* sums, const float* x, float sum, const int32_t*, int step) const {
    return _mm512_fmadd_ps(scale, scaled_sums(sums, x, step), _mm512_fnmadd_ps(shift, _mm512_set1_ps(sum), total));
  }
  static Line line(const uint8_t* head, const uint8_t* group, int output) {
    const float own = float16_at(head, output) * static_cast<float>(group[output]);
    return {{own, own}, -float16_at(head + 32, output) * static_cast<float>(group[16 + output]), 0};
  }
};

// weight = d s (code − 32): d for 256 inputs, s, of eight bits with a sign, for 16.
template <class Codes>
struct Sixteens {
  using Code = Codes;
  static constexpr int64_t kHead = 32, kScales = 32;
  static constexpr int kOffset = 32;
  __m512 scale[2], whole;

  void enter(const uint8_t* head) { whole = float16s(head); }
  void begin(const uint8_t* group) {
    scale[0] = _mm512_mul_ps(whole, signed_of(group));
    scale[1] = _mm512_mul_ps(whole, signed_of(group + 16));
  }
  __m512 add(__m512 total, __m512i* sums, const float* x, float, const int32_t* halves, int step) const {
    take_offset<kOffset>(sums, halves, step);
    for (int half = 0; half < 2; ++half) {
      const __m512 coded = _mm512_mul_ps(_mm512_cvtepi32_ps(sums[half]), _mm512_set1_ps(x[half * step]));
      total = _mm512_fmadd_ps(scale[half], coded, total);
    }
    return total;
  }
  static Line line(const uint8_t* head, const uint8_t* group, int output) {
    const float own = float16_at(head, output);
    const auto part = [&](int half) { return own * static_cast<float>(static_cast<int8_t>(group[16 * half + output])); };
    return {{part(0), part(1)}, 0.0f, kOffset};
  }
};

// Calls `use(form)` with a value of the type that stands for a form; false for one that is not of a file.
template <class Use>
bool with_form(int32_t form, const Use& use) {
  switch (form) {
    case kPolarQ4_0: use(Scaled<FourBits, 8>()); return true;
    case kPolarQ4_1: use(Shifted<FourBits>()); return true;
    case kPolarQ5_0: use(Scaled<FiveBits, 16>()); return true;
    case kPolarQ5_1: use(Shifted<FiveBits>()); return true;
    case kPolarQ8_0: use(Scaled<EightBits, 128>()); return true;
    case kPolarQ4_K: use(Nested<FourBits>()); return true;
    case kPolarQ5_K: use(Nested<FiveBits>()); return true;
    case kPolarQ6_K: use(Sixteens<SixBits>()); return true;
    default: return false;
  }
}

// Bytes of a panel of so many groups.
template <class Form>
constexpr int64_t panel_bytes(int64_t groups) {
  return groups * (Form::kScales + Form::Code::kBytes) + (Form::kHead ? groups / kSuperGroups * Form::kHead : 0);
}

// -- products --------------------------------------------------------------------------------------------------------

// The sums of kCount rows over all inputs, for the 16 outputs of a panel.
template <class Form, int kCount>
void meet_blocks(const ShortRows& rows, const uint8_t* panel, int64_t groups, __m512 (&totals)[kCount]) {
  using Codes = typename Form::Code;
  constexpr int64_t kSize = Form::kScales + Codes::kBytes;
  for (auto& total : totals) total = _mm512_setzero_ps();
  const int32_t *words = rows.words, *halves = rows.halves;
  Form form;
  for (int64_t group = 0; group < groups; ++group, words += kWords * kCount, halves += 2 * kCount) {
    if (Form::kHead && group % kSuperGroups == 0) {
      form.enter(panel);
      panel += Form::kHead;
    }
    for (int64_t at = 0; at < kSize; at += 64) _mm_prefetch(panel + kFetchIntegers + at, _MM_HINT_T0);
    form.begin(panel);
    const uint8_t* codes = panel + Form::kScales;
    CodeSums<Codes, kCount> first, last;
    first.template add<0>(codes, words);
    last.template add<4>(codes, words);
#pragma GCC unroll 8
    for (int row = 0; row < kCount; ++row) {
      __m512i sums[2] = {first.whole[row], last.whole[row]};
      const float* x = rows.scale + 2 * group * kCount + row;
      totals[row] = form.add(totals[row], sums, x, rows.sum[group * kCount + row], halves + row, kCount);
    }
    panel += kSize;
  }
}

// Where the results of some outputs go: from the first of the rounded rows on, `step` numbers from row to row.
struct Results {
  const Half* bias;
  Half* y;
  float* wide;  // instead of y, not rounded, where it is not null
  int64_t outputs, step;
};

// The results of kCount rounded rows, of which kPlanes are one row and what it lacks.
template <class Form, int kCount, int kPlanes = 1>
void run_blocks_panel(const uint8_t* panels, const ShortRows& rows, int64_t row, int64_t groups, int64_t number,
                      const Results& to) {
  const int64_t output = number * kLanes;
  const __mmask16 lanes = first_lanes(to.outputs - output);
  __m512 totals[kCount];
  meet_blocks<Form, kCount>(rows, panels + number * panel_bytes<Form>(groups), groups, totals);
  const __m512 bias = widen(to.bias + output, lanes);
  for (int each = 0; each < kCount; each += kPlanes) {
    const int64_t at = (row + each / kPlanes) * to.step + output;
    const __m512 whole = kPlanes > 1 ? _mm512_add_ps(totals[each], totals[each + kPlanes - 1]) : totals[each];
    const __m512 sum = _mm512_add_ps(whole, bias);
    if (to.wide) {
      _mm512_mask_storeu_ps(to.wide + at, lanes, sum);
    } else {
      store_rounded(to.y + at, sum, lanes);
    }
  }
}

template <class Form, int... kCounts>
void run_blocks_panel(int64_t count, const uint8_t* panels, const ShortRows& rows, int64_t row, int64_t groups,
                      int64_t number, const Results& to, std::integer_sequence<int, kCounts...>) {
  ((count == kCounts + 1 ? run_blocks_panel<Form, kCounts + 1>(panels, rows, row, groups, number, to) : void()), ...);
}

// Rows (M, K) by the matrix.
template <class Form>
void run_blocks(const Half* x, int64_t count, int64_t inputs, const uint8_t* panels, Results to,
                const Sharing& sharing) {
  const int64_t groups = parts_of(inputs, kGroup), row_bytes = 4 * groups * ShortMemory::kPerGroup;
  const int64_t together = std::max<int64_t>(kRowBytes / row_bytes / kBlockRows, 1) * kBlockRows;
  for (int64_t start = 0; start < count; start += together) {
    const int64_t own = std::min(count - start, together);
    ShortMemory rounded{nullptr, own, groups};
    rounded.memory = scratch<ShortMemory>(rounded.size());
    each(sharing, own, kShared, [&](int64_t row) {
      const int64_t chunk = row / kBlockRows;
      shorten_row(x + (start + row) * inputs, inputs, row % kBlockRows, 1, rounded.count(chunk), rounded.at(chunk));
    });
    each(sharing, parts_of(to.outputs, kLanes), 1, [&](int64_t number) {
      for (int64_t chunk = 0; chunk < rounded.chunks(); ++chunk) {
        run_blocks_panel<Form>(rounded.count(chunk), panels, rounded.at(chunk), chunk * kBlockRows, groups, number, to,
                               std::make_integer_sequence<int, kBlockRows>());
      }
    });
    if (to.wide) to.wide += own * to.step;
    if (to.y) to.y += own * to.step;
  }
}

// The least of some numbers that is near the greatest.
inline float near_greatest(const float* numbers, int64_t count) {
  __m512 most = _mm512_set1_ps(-INFINITY), least = most;  // of numbers, and of them negated
  for (int64_t at = 0; at < count; at += kLanes) {
    const __mmask16 lanes = first_lanes(count - at);
    const __m512 own = _mm512_maskz_loadu_ps(lanes, numbers + at);
    most = _mm512_mask_max_ps(most, lanes, most, own);
    least = _mm512_mask_max_ps(least, lanes, least, _mm512_sub_ps(_mm512_setzero_ps(), own));
  }
  const float greatest = _mm512_reduce_max_ps(most);
  return greatest - kNear * (greatest + _mm512_reduce_max_ps(least));
}

// Computes the results near each row's greatest again, in which the row has 16 bits.
template <class Form>
void refine_blocks(const Half* x, int64_t count, int64_t inputs, const uint8_t* panels, const Results& to,
                   const Sharing& sharing) {
  struct Refined;
  constexpr int kPlanes = 2;
  const int64_t groups = parts_of(inputs, kGroup);
  each(sharing, count, 2, [&](int64_t row) {
    ShortMemory rounded{nullptr, kPlanes, groups};
    rounded.memory = scratch<Refined>(rounded.size());
    shorten_row(x + row * inputs, inputs, 0, kPlanes, kPlanes, rounded.at(0));
    Results own = to;
    own.wide += row * to.step;
    const float near = near_greatest(own.wide, to.outputs);
    for (int64_t output = 0; output < to.outputs; output += kLanes) {
      const __mmask16 lanes = first_lanes(to.outputs - output);
      const __m512 numbers = _mm512_maskz_loadu_ps(lanes, own.wide + output);
      if (!_mm512_mask_cmp_ps_mask(lanes, numbers, _mm512_set1_ps(near), _CMP_GE_OQ)) continue;
      run_blocks_panel<Form, kPlanes, kPlanes>(panels, rounded.at(0), 0, groups, output / kLanes, own);
    }
  });
}

// -- from a file -----------------------------------------------------------------------------------------------------

// Sixteen rows of a file, at the same place of each.
struct FileRows {
  const uint8_t* first;
  int64_t step;

  const uint8_t* at(int lane) const { return first + lane * step; }
  // Four bytes of each row after another.
  void words(int64_t from, int count, uint32_t (*to)[kLanes]) const {
    for (int lane = 0; lane < kLanes; ++lane) {
      for (int word = 0; word < count; ++word) std::memcpy(&to[word][lane], at(lane) + from + 4 * word, 4);
    }
  }
  void halves(int64_t from, uint8_t* to) const {  // a number of 16 bits of each row
    for (int lane = 0; lane < kLanes; ++lane) std::memcpy(to + 2 * lane, at(lane) + from, 2);
  }
};

// Blocks as the format of GGUF has them (its specification, and ggml's `ggml-common.h`), one function each: the codes of
// a group of 16 rows without a sign, and the scales to their places in a panel.

inline void read_nibbles(const FileRows& rows, int64_t from, Words& codes) {  // low halves, then high ones
  rows.words(from, 4, codes);
  for (int word = 0; word < 4; ++word) {
    for (int lane = 0; lane < kLanes; ++lane) {
      codes[word + 4][lane] = codes[word][lane] >> 4 & 0x0f0f0f0f;
      codes[word][lane] &= 0x0f0f0f0f;
    }
  }
}
inline void read_fifths(const FileRows& rows, int64_t from, Words& codes) {  // bit n is that of input n
  uint32_t bits[1][kLanes];
  rows.words(from, 1, bits);
  for (int word = 0; word < kWords; ++word) {
    for (int lane = 0; lane < kLanes; ++lane) {
      const uint32_t own = bits[0][lane] >> 4 * word & 15;
      codes[word][lane] |= ((own | own << 7 | own << 14 | own << 21) & 0x01010101) << 4;
    }
  }
}
// Half bytes of 32 inputs, low ones or high ones; then `kMask` bits more of each, from bit `shift` of a byte on.
inline void read_halves(const FileRows& rows, int64_t from, bool high, Words& codes) {
  rows.words(from, kWords, codes);
  for (auto& word : codes) {
    for (auto& code : word) code = code >> (high ? 4 : 0) & 0x0f0f0f0f;
  }
}
template <uint32_t kMask>
void read_more(const FileRows& rows, int64_t from, int shift, Words& codes) {
  Words more;
  rows.words(from, kWords, more);
  for (int word = 0; word < kWords; ++word) {
    for (int lane = 0; lane < kLanes; ++lane) codes[word][lane] |= (more[word][lane] >> shift & 0x01010101 * kMask) << 4;
  }
}
// Scales and minima of a group, of 8, in the 12 bytes of Q4_K and Q5_K.
inline void read_nested(const FileRows& rows, int group, uint8_t* head, uint8_t* scales) {
  if (group == 0) {
    rows.halves(0, head);
    rows.halves(2, head + 32);
  }
  for (int lane = 0; lane < kLanes; ++lane) {
    const uint8_t* packed = rows.at(lane) + 4;
    uint8_t &scale = scales[lane], &shift = scales[kLanes + lane];
    if (group < 4) {
      scale = packed[group] & 63;
      shift = packed[group + 4] & 63;
    } else {
      scale = static_cast<uint8_t>((packed[group + 4] & 15) | packed[group - 4] >> 6 << 4);
      shift = static_cast<uint8_t>(packed[group + 4] >> 4 | packed[group] >> 6 << 4);
    }
  }
}

struct Block {
  int64_t inputs, bytes;
  // Group `group` of a block of 16 rows: its codes, and its scales to those of a panel.
  void (*read)(const FileRows& rows, int group, Words& codes, uint8_t* head, uint8_t* scales);
};

inline Block block_of(int32_t form) {
  using Rows = const FileRows&;
  using Bytes = uint8_t;
  switch (form) {
    case kPolarQ4_0:
      return {32, 18, [](Rows rows, int, Words& codes, Bytes*, Bytes* scales) {
        rows.halves(0, scales);
        read_nibbles(rows, 2, codes);
      }};
    case kPolarQ4_1:
      return {32, 20, [](Rows rows, int, Words& codes, Bytes*, Bytes* scales) {
        rows.halves(0, scales);
        rows.halves(2, scales + 32);
        read_nibbles(rows, 4, codes);
      }};
    case kPolarQ5_0:
      return {32, 22, [](Rows rows, int, Words& codes, Bytes*, Bytes* scales) {
        rows.halves(0, scales);
        read_nibbles(rows, 6, codes);
        read_fifths(rows, 2, codes);
      }};
    case kPolarQ5_1:
      return {32, 24, [](Rows rows, int, Words& codes, Bytes*, Bytes* scales) {
        rows.halves(0, scales);
        rows.halves(2, scales + 32);
        read_nibbles(rows, 8, codes);
        read_fifths(rows, 4, codes);
      }};
    case kPolarQ8_0:
      return {32, 34, [](Rows rows, int, Words& codes, Bytes*, Bytes* scales) {
        rows.halves(0, scales);
        rows.words(2, kWords, codes);
        for (auto& word : codes) {
          for (auto& code : word) code ^= 0x80808080;
        }
      }};
    case kPolarQ4_K:
      return {256, 144, [](Rows rows, int group, Words& codes, Bytes* head, Bytes* scales) {
        read_nested(rows, group, head, scales);
        read_halves(rows, 16 + group / 2 * 32, group % 2, codes);
      }};
    case kPolarQ5_K:
      return {256, 176, [](Rows rows, int group, Words& codes, Bytes* head, Bytes* scales) {
        read_nested(rows, group, head, scales);
        read_halves(rows, 48 + group / 2 * 32, group % 2, codes);
        read_more<1>(rows, 16, group, codes);
      }};
    case kPolarQ6_K:
      return {256, 210, [](Rows rows, int group, Words& codes, Bytes* head, Bytes* scales) {
        if (group == 0) rows.halves(208, head);
        for (int lane = 0; lane < kLanes; ++lane) {
          scales[lane] = rows.at(lane)[192 + 2 * group];
          scales[kLanes + lane] = rows.at(lane)[192 + 2 * group + 1];
        }
        const int part = group / 4, quarter = group % 4;
        read_halves(rows, 64 * part + 32 * (quarter % 2), quarter / 2, codes);
        read_more<3>(rows, 128 + 32 * part, 2 * quarter, codes);
      }};
    default:
      return {0, 0, nullptr};
  }
}

// Whether 16 numbers of IEEE's 16 bits are finite.
inline bool are_finite(const uint8_t* from) {
  const __m512 values = float16s(from), none = _mm512_sub_ps(values, values);  // of what is not finite no number
  return _mm512_cmp_ps_mask(none, none, _CMP_UNORD_Q) == 0;
}

// Where the rows of a matrix are in a file, those of numbers `order` or one after another.
struct FileMatrix {
  int file;
  int64_t start, row_bytes;
  const int64_t* order;

  // Some of them to `to`; false if the file ends before.
  bool read(int64_t first, int64_t count, uint8_t* to) const {
    if (!order) return read_bytes(first, count * row_bytes, to);
    for (int64_t row = 0; row < count; ++row) {
      if (!read_bytes(order[first + row], row_bytes, to + row * row_bytes)) return false;
    }
    return true;
  }

 private:
  bool read_bytes(int64_t row, int64_t size, uint8_t* to) const {
    for (int64_t done = 0; done < size;) {
      const ssize_t count = pread(file, to + done, static_cast<size_t>(size - done), start + row * row_bytes + done);
      if (count < 0 && errno == EINTR) continue;
      if (count <= 0) return false;
      done += count;
    }
    return true;
  }
};

enum class Packing { kDone, kNotFinite, kCutShort };

// A matrix of a file to panels. Threads read what they pack, so that it is in their caches.
template <class Form>
Packing pack_blocks(int32_t kind, FileMatrix from, int64_t inputs, int64_t outputs, uint8_t* panels,
                    const Sharing& sharing) {
  const Block block = block_of(kind);
  const int64_t groups = inputs / kGroup, per_block = block.inputs / kGroup, size = panel_bytes<Form>(groups);
  from.row_bytes = inputs / block.inputs * block.bytes;
  std::atomic<bool> finite{true}, whole{true};
  each(sharing, parts_of(outputs, kLanes), 1, [&](int64_t number) {
    if (!whole) return;
    auto* rows = reinterpret_cast<uint8_t*>(scratch<FileMatrix>(parts_of(kLanes * from.row_bytes, sizeof(float))));
    const int64_t count = std::min(outputs - number * kLanes, kLanes);
    if (!from.read(number * kLanes, count, rows)) {
      whole = false;
      return;
    }
    std::memset(rows + count * from.row_bytes, 0, static_cast<size_t>((kLanes - count) * from.row_bytes));
    uint8_t *at = panels + number * size, *head = at;
    for (int64_t group = 0; group < groups; ++group) {
      if (Form::kHead && group % kSuperGroups == 0) {
        head = at;
        at += Form::kHead;
      }
      Words codes;
      block.read({rows + group / per_block * block.bytes, from.row_bytes}, static_cast<int>(group % per_block), codes,
                 head, at);
      Form::Code::put(codes, at + Form::kScales);
      const uint8_t* factors = Form::kHead ? head : at;
      constexpr bool kTwo = Form::kHead == 64 || (Form::kHead == 0 && Form::kScales == 64);
      if (!are_finite(factors) || (kTwo && !are_finite(factors + 32))) finite = false;
      at += Form::kScales + Form::Code::kBytes;
    }
  });
  return !whole ? Packing::kCutShort : finite ? Packing::kDone : Packing::kNotFinite;
}

// The weights of an output, (K,), rounded to bfloat16.
template <class Form>
void unpack_output(const uint8_t* panels, int64_t output, int64_t inputs, Half* to) {
  const int64_t groups = parts_of(inputs, kGroup);
  const uint8_t *at = panels + output / kLanes * panel_bytes<Form>(groups), *head = at;
  const int own = static_cast<int>(output % kLanes);
  for (int64_t group = 0; group < groups; ++group) {
    if (Form::kHead && group % kSuperGroups == 0) {
      head = at;
      at += Form::kHead;
    }
    alignas(64) float weights[kGroup];
    const Line line = Form::line(head, at, own);
    for (int input = 0; input < kGroup; ++input) {
      const int code = Form::Code::code(at + Form::kScales + 4 * own, input) - line.offset;
      weights[input] = line.scale[input / 16] * static_cast<float>(code) + line.shift;
    }
    const int64_t start = group * kGroup;
    for (int half = 0; half < 2; ++half) {
      const int64_t place = start + half * kLanes;
      store_rounded(to + place, _mm512_load_ps(weights + half * kLanes), first_lanes(inputs - place));
    }
    at += Form::kScales + Form::Code::kBytes;
  }
}

}  // namespace polar
