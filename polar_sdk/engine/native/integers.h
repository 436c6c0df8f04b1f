// Products of rows with a matrix of 8-bit or 4-bit integers.
#pragma once

#include <cmath>

#include "products.h"

namespace polar {

// y (M, N) = x (M, K) · weightᵀ + bias. Rows are rounded too, to 16-bit integers, 32 of which share a scale: the
// largest of them keep seven bits more than bfloat16 had. Sums over a group of 32 inputs are exact, those over groups
// are float32, in the order of the groups: so a row is the same whatever rows are beside it.
//
// Weights lie in panels of 16 outputs, group by group, as `panels.py` packs them: one instruction multiplies four
// inputs of 16 outputs, a register of 64 codes, by four bytes of a row. A panel is read from memory in order, once, and
// one row is bound by that.

constexpr int64_t kGroup = 32;
constexpr int64_t kWords = kGroup / 4;    // words of four inputs in a group
constexpr float kMax = 127 * 256;         // the largest integer: both of its bytes are signed
#ifdef __AVX512F__
constexpr int kIntegerRows = 8;           // that meet a panel together
#else
constexpr int kIntegerRows = 2;
#endif
constexpr int64_t kIntegerBlock = 256;    // rows that are rounded together, so that they stay in the cache
constexpr int64_t kShared = 4;            // rows that are worth a second thread to round them
constexpr int64_t kFetchIntegers = 4096;  // bytes to fetch ahead

// Up to eight rows, those at the same place side by side.
struct Rounded {
  int32_t *high, *low;  // bytes that make 256 × high + low: (groups, words, rows)
  float* scale;         // (groups, rows)
  int32_t* sum;         // of the integers of a group, likewise
};

// Where the rows of a product are, eight of them after another.
struct RoundedRows {
  float* memory;
  int64_t rows, groups;
  int64_t chunks() const { return parts_of(rows, kIntegerRows); }
  int64_t count(int64_t chunk) const { return std::min<int64_t>(rows - chunk * kIntegerRows, kIntegerRows); }
  int64_t words() const { return rows * groups * (2 * kWords + 2); }
  Rounded at(int64_t chunk) const {
    float* from = memory + chunk * kIntegerRows * groups * (2 * kWords + 2);
    const int64_t size = groups * count(chunk);
    auto* words = reinterpret_cast<int32_t*>(from);
    return {words, words + kWords * size, from + 2 * kWords * size, words + (2 * kWords + 1) * size};
  }
};

// One row of `count`; inputs after the last one are zero.
inline void round_row(const Half* x, int64_t inputs, int64_t row, int64_t count, const Rounded& to) {
  for (int64_t group = 0; group * kGroup < inputs; ++group) {
    const int64_t at = group * kGroup, left = inputs - at, own = group * count + row;
    const __m512 first = widen(x + at, first_lanes(left)), second = widen(x + at + kLanes, first_lanes(left - kLanes));
    float most = _mm512_reduce_max_ps(_mm512_max_ps(_mm512_abs_ps(first), _mm512_abs_ps(second)));
    if (_mm512_cmp_ps_mask(first, second, _CMP_UNORD_Q)) most = NAN;  // a maximum may lose it, integers cannot hold it
    to.scale[own] = most / kMax;
    const __m512 by = _mm512_set1_ps(most > 0 ? kMax / most : 0.0f);
    const __m512i values[2] = {_mm512_cvtps_epi32(_mm512_mul_ps(first, by)),
                               _mm512_cvtps_epi32(_mm512_mul_ps(second, by))};
    to.sum[own] = _mm512_reduce_add_epi32(_mm512_add_epi32(values[0], values[1]));
    for (int64_t half = 0; half < 2; ++half) {
      const __m512i rest = _mm512_srai_epi32(_mm512_slli_epi32(values[half], 24), 24);  // the low byte, signed
      alignas(16) int32_t words[2][4];
      _mm_store_si128(reinterpret_cast<__m128i*>(words[0]),
                      _mm512_cvtepi32_epi8(_mm512_srai_epi32(_mm512_sub_epi32(values[half], rest), 8)));
      _mm_store_si128(reinterpret_cast<__m128i*>(words[1]), _mm512_cvtepi32_epi8(rest));
      for (int64_t word = 0; word < 4; ++word) {
        const int64_t place = (group * kWords + 4 * half + word) * count + row;
        to.high[place] = words[0][word];
        to.low[place] = words[1][word];
      }
    }
  }
}

inline __m512 float_of(const uint8_t* from, int64_t which) {
  const __m512i pairs = _mm512_loadu_si512(from);
  return which ? second_of(pairs) : first_of(pairs);
}

// Bytes: weight = (code − 128) × scale, a scale for each output. A group of a panel is 8 words of 16 outputs.
struct Bytes {
  static constexpr int32_t kOffset = 128;
  static constexpr int64_t kSize = kGroup * kLanes;
  static constexpr int64_t kLines = kWords, kPerLine = 1;
  static __m512i codes(__m512i line, int64_t) { return line; }
  static __m512 add(__m512 total, __m512 coded, __m512, const uint8_t*) { return _mm512_add_ps(total, coded); }
  // Weights without the scale of the output, from their codes.
  static __m512 numbers(__m512 codes, const uint8_t*) { return _mm512_sub_ps(codes, _mm512_set1_ps(kOffset)); }
};

// Halves of bytes: weight = (code − 8) × scale + zero, both for 32 inputs of an output. A group of a panel is 4 lines
// of 64 bytes, whose low halves are one word of 16 outputs and whose high halves the next; then the 16 pairs of scale
// and zero.
struct Nibbles {
  static constexpr int32_t kOffset = 8;
  static constexpr int64_t kSize = kGroup * kLanes / 2 + 4 * kLanes;
  static constexpr int64_t kLines = kWords / 2, kPerLine = 2;
  static __m512i codes(__m512i line, int64_t which) {
    return _mm512_and_si512(which ? _mm512_srli_epi16(line, 4) : line, _mm512_set1_epi8(15));
  }
  static __m512 add(__m512 total, __m512 coded, __m512 sum, const uint8_t* group) {
    const uint8_t* pairs = group + kGroup * kLanes / 2;
    return _mm512_fmadd_ps(float_of(pairs, 0), coded, _mm512_fmadd_ps(float_of(pairs, 1), sum, total));
  }
  static __m512 numbers(__m512 codes, const uint8_t* group) {
    const uint8_t* pairs = group + kGroup * kLanes / 2;
    const __m512 own = _mm512_sub_ps(codes, _mm512_set1_ps(kOffset));
    return _mm512_fmadd_ps(float_of(pairs, 0), own, float_of(pairs, 1));
  }
};

// The sums of kCount rows over all inputs, for the 16 outputs of a panel.
template <class Form, int kCount>
void meet_panel(const Rounded& rows, const uint8_t* panel, int64_t groups, __m512 (&totals)[kCount]) {
  for (auto& total : totals) total = _mm512_setzero_ps();
  const int32_t *high_words = rows.high, *low_words = rows.low;
  for (int64_t group = 0; group < groups; ++group, panel += Form::kSize) {
    __m512i high[kCount], low[kCount];
#pragma GCC unroll 8
    for (int row = 0; row < kCount; ++row) {
      high[row] = _mm512_setzero_si512();
      low[row] = _mm512_set1_epi32(-Form::kOffset * rows.sum[group * kCount + row]);
    }
    for (int64_t at = 0; at < Form::kSize; at += 64) _mm_prefetch(panel + kFetchIntegers + at, _MM_HINT_T0);
#pragma GCC unroll 8
    for (int64_t line = 0; line < Form::kLines; ++line) {
      const __m512i both = _mm512_loadu_si512(panel + 64 * line);
#pragma GCC unroll 2
      for (int64_t which = 0; which < Form::kPerLine; ++which, high_words += kCount, low_words += kCount) {
        const __m512i codes = Form::codes(both, which);
#pragma GCC unroll 8
        for (int row = 0; row < kCount; ++row) {
          high[row] = _mm512_dpbusd_epi32(high[row], codes, _mm512_set1_epi32(high_words[row]));
          low[row] = _mm512_dpbusd_epi32(low[row], codes, _mm512_set1_epi32(low_words[row]));
        }
      }
    }
#pragma GCC unroll 8
    for (int row = 0; row < kCount; ++row) {
      const float scale = rows.scale[group * kCount + row];
      const __m512i exact = _mm512_add_epi32(_mm512_slli_epi32(high[row], 8), low[row]);
      const __m512 coded = _mm512_mul_ps(_mm512_cvtepi32_ps(exact), _mm512_set1_ps(scale));
      const __m512 sum = _mm512_set1_ps(scale * static_cast<float>(rows.sum[group * kCount + row]));
      totals[row] = Form::add(totals[row], coded, sum, panel);
    }
  }
}

// A product's matrix and result.
struct Integers {
  const uint8_t* panels;  // (N / 16, K / 32, size of a group), rounded up
  const Half* scale;      // of each output, or null
  const Half* bias;
  Half* y;  // from the first of the rounded rows on
  int64_t outputs, step;  // from one row of the result to the next
  float* wide = nullptr;  // where sums go as they are, instead of rounded ones to y
};

template <class Form, int kCount>
void run_panel(const Integers& matrix, const Rounded& rows, int64_t row, int64_t groups, int64_t number) {
  const int64_t output = number * kLanes;
  const __mmask16 lanes = first_lanes(matrix.outputs - output);
  __m512 totals[kCount];
  meet_panel<Form, kCount>(rows, matrix.panels + number * groups * Form::kSize, groups, totals);
  const __m512 scale = matrix.scale ? widen(matrix.scale + output, lanes) : _mm512_set1_ps(1.0f);
  const __m512 bias = widen(matrix.bias + output, lanes);
  for (int each = 0; each < kCount; ++each) {
    const int64_t at = (row + each) * matrix.step + output;
    const __m512 sum = _mm512_fmadd_ps(totals[each], scale, bias);
    if (matrix.wide) {
      _mm512_mask_storeu_ps(matrix.wide + at, lanes, sum);
    } else {
      store_rounded(matrix.y + at, sum, lanes);
    }
  }
}

template <class Form, int... kCounts>
void run_panel(int64_t count, const Integers& matrix, const Rounded& rows, int64_t row, int64_t groups, int64_t number,
               std::integer_sequence<int, kCounts...>) {
  ((count == kCounts + 1 ? run_panel<Form, kCounts + 1>(matrix, rows, row, groups, number) : void()), ...);
}

// Without instructions for bytes, and with tiles, many rows are multiplied sooner by numbers that were made of integers.
#if defined(__AMX_BF16__) || !defined(__AVX512F__)

constexpr int64_t kManyRows = 32;  // more of them than this

// The 16 outputs of a panel of integers as numbers in one half of lines of pairs.
template <class Form>
void make_numbers(const uint8_t* panel, int64_t groups, uint32_t* lines) {
  const auto code = [](__m512i words, int byte) {
    return _mm512_cvtepi32_ps(_mm512_and_si512(_mm512_srli_epi32(words, 8 * byte), _mm512_set1_epi32(255)));
  };
  for (int64_t group = 0; group < groups; ++group, panel += Form::kSize) {
    for (int64_t line = 0; line < Form::kLines; ++line) {
      const __m512i both = _mm512_loadu_si512(panel + 64 * line);
      for (int64_t which = 0; which < Form::kPerLine; ++which) {
        const __m512i words = Form::codes(both, which);
        for (int byte = 0; byte < 4; byte += 2, lines += kPanel) {
          const __m256i first = rounded(Form::numbers(code(words, byte), panel));
          const __m256i second = rounded(Form::numbers(code(words, byte + 1), panel));
          const __m512i high = _mm512_slli_epi32(_mm512_cvtepu16_epi32(second), 16);
          _mm512_store_si512(lines, _mm512_or_si512(_mm512_cvtepu16_epi32(first), high));
        }
      }
    }
  }
}

// Rows are not rounded then; weights of half bytes are, to bfloat16, and those of bytes are exact.
template <class Form>
void run_by_numbers(const Product& product, const uint8_t* panels, const Sharing& sharing) {
  const int64_t groups = parts_of(product.inputs, kGroup);
  const auto panel_of = [&](int64_t number) {
    float* numbers = scratch<Integers>(groups * kGroup / 2 * kPanel);
    for (int64_t half = 0; half < 2 && number * kPanel + half * kLanes < product.outputs; ++half) {
      make_numbers<Form>(panels + (2 * number + half) * groups * Form::kSize, groups,
                         reinterpret_cast<uint32_t*>(numbers) + half * kLanes);
    }
    return numbers;
  };
#ifdef __AMX_BF16__
  if (has_tiles) return run_in_tiles(product, sharing, panel_of);
#endif
  run_by_rows<Singles>(product, sharing, panel_of);
}

#endif

// Rows (M, K) by the matrix, whose result begins with the first of them.
template <class Form>
void run_integers(const Half* x, int64_t count, int64_t inputs, Integers matrix, const Sharing& sharing) {
#if defined(__AMX_BF16__) || !defined(__AVX512F__)
  if (count > kManyRows) {
    const Product product{x, nullptr, matrix.bias, matrix.y, count, inputs, matrix.outputs, matrix.step, matrix.scale,
                          matrix.wide};
    return run_by_numbers<Form>(product, matrix.panels, sharing);
  }
#endif
  const int64_t groups = parts_of(inputs, kGroup);
  for (int64_t start = 0; start < count; start += kIntegerBlock) {
    RoundedRows rounded{nullptr, std::min(count - start, kIntegerBlock), groups};
    rounded.memory = scratch<RoundedRows>(rounded.words());
    each(sharing, rounded.rows, kShared, [&](int64_t row) {
      const int64_t chunk = row / kIntegerRows;
      round_row(x + (start + row) * inputs, inputs, row % kIntegerRows, rounded.count(chunk), rounded.at(chunk));
    });
    each(sharing, parts_of(matrix.outputs, kLanes), 1, [&](int64_t number) {
      for (int64_t chunk = 0; chunk < rounded.chunks(); ++chunk) {
        run_panel<Form>(rounded.count(chunk), matrix, rounded.at(chunk), chunk * kIntegerRows, groups, number,
                        std::make_integer_sequence<int, kIntegerRows>());
      }
    });
    if (matrix.y) matrix.y += rounded.rows * matrix.step;
    if (matrix.wide) matrix.wide += rounded.rows * matrix.step;
  }
}

}  // namespace polar
