// Attention of one token per row over pages.
#pragma once

#include <cstring>
#include <limits>

#include "lanes.h"
#include "team.h"

namespace polar {

struct Attention {
  const Half* query;     // (B, H, d), `query_step` from one row to the next
  const Half* store;     // (P, 2, G, page, d)
  const int64_t* table;  // (B, blocks)
  const int64_t* positions;
  Half* mixed;  // (B, H × d)
  int64_t query_step, heads, groups, size, page, blocks;
  float scale;
  int64_t window;  // or 0
  float softcap;   // or 0

  int64_t sharing() const { return heads / groups; }
  int64_t end(int64_t row) const { return positions[row] + 1; }
  int64_t first(int64_t row) const { return window > 0 ? std::max<int64_t>(end(row) - window, 0) : 0; }
  // Keys (0) or values (1) of a group, from that key to the end of its page.
  const Half* at(int64_t row, int64_t group, int64_t key, int64_t which) const {
    const int64_t number = table[row * blocks + key / page];
    return store + (((number * 2 + which) * groups + group) * page + key % page) * size;
  }
};

// Sixteen keys or values, to the first-level cache.
inline void fetch(const Half* from, int64_t size) {
  for (int64_t at = 0; at < kLanes * size; at += 2 * kLanes) {
    _mm_prefetch(reinterpret_cast<const char*>(from + at), _MM_HINT_T0);
  }
}

// Scores of one query over the keys up to `end`, minus infinity before `first`. If `next` is not null, also fetches the
// values of these keys and the keys one page ahead; `next` is the page after the last one.
inline float score(const Attention& it, int64_t row, int64_t group, const Half* query, const Half* next, int64_t first,
                   int64_t end, float* scores) {
  __m512 highest = _mm512_set1_ps(-std::numeric_limits<float>::infinity());
  for (int64_t key = first / kLanes * kLanes; key < end; key += kLanes) {
    const Half* keys = it.at(row, group, key, 0);
    if (next) {
      fetch(it.at(row, group, key, 1), it.size);
      fetch(key + it.page < end ? it.at(row, group, key + it.page, 0) : next + key % it.page * it.size, it.size);
    }
    __m512 products[kLanes];
    for (auto& product : products) product = _mm512_setzero_ps();
    for (int64_t part = 0; part < it.size; part += 2 * kLanes) {
      const __m512i queried = _mm512_loadu_si512(query + part);
#pragma GCC unroll 16
      for (int64_t i = 0; i < kLanes; ++i) {
        products[i] = add_pairs(products[i], queried, _mm512_loadu_si512(keys + i * it.size + part));
      }
    }
    __m512 values = _mm512_mul_ps(sums_of(products), _mm512_set1_ps(it.scale));
    if (it.softcap > 0) {
      const __m512 cap = _mm512_set1_ps(it.softcap);
      values = _mm512_mul_ps(cap, hyperbolic_tangent(_mm512_div_ps(values, cap)));
    }
    const __mmask16 seen = lanes_between(first - key, end - key);
    values = _mm512_mask_blend_ps(seen, _mm512_set1_ps(-std::numeric_limits<float>::infinity()), values);
    highest = _mm512_max_ps(highest, values);
    _mm512_storeu_ps(scores + key, values);
  }
  return _mm512_reduce_max_ps(highest);
}

// Turns scores into weights; returns the sum of the weights of the keys from `first` to `end`.
inline float weigh(float* scores, int64_t first, int64_t end, float highest) {
  __m512 total = _mm512_setzero_ps();
  for (int64_t key = first / kLanes * kLanes; key < end; key += kLanes) {
    const __m512 weights = exponential(_mm512_sub_ps(_mm512_loadu_ps(scores + key), _mm512_set1_ps(highest)));
    const __mmask16 seen = lanes_between(first - key, end - key);
    total = _mm512_mask_add_ps(total, seen, total, weights);
    _mm512_storeu_ps(scores + key, weights);
  }
  return _mm512_reduce_add_ps(total);
}

// Values from `part` on, of 32 × kParts entries, mixed by the weights of kHeads heads (one row of `length` each).
template <int kHeads, int kParts>
void mix(const Attention& it, int64_t row, int64_t group, int64_t part, int64_t first, int64_t end,
         const float* weights, int64_t length, const float* totals, Half* to) {
  __m512 sums[kHeads][kParts][2];
  for (auto& head : sums)
    for (auto& sum : head) sum[0] = sum[1] = _mm512_setzero_ps();
  for (int64_t key = first; key < end;) {
    const Half* values = it.at(row, group, key, 1) + part;
    for (const int64_t stop = std::min(end, (key / it.page + 1) * it.page); key < stop; ++key, values += it.size) {
      for (int i = 0; i < kParts; ++i) {
        const __m512i pairs = _mm512_loadu_si512(values + i * 2 * kLanes);
        for (int head = 0; head < kHeads; ++head) {
          const __m512 weight = _mm512_set1_ps(weights[head * length + key]);
          sums[head][i][0] = _mm512_fmadd_ps(weight, first_of(pairs), sums[head][i][0]);
          sums[head][i][1] = _mm512_fmadd_ps(weight, second_of(pairs), sums[head][i][1]);
        }
      }
    }
  }
  for (int head = 0; head < kHeads; ++head) {
    const __m512 share = _mm512_set1_ps(1.0f / totals[head]);
    for (int i = 0; i < kParts; ++i) {
      const __m256i first_half = rounded(_mm512_mul_ps(sums[head][i][0], share));
      const __m256i second_half = rounded(_mm512_mul_ps(sums[head][i][1], share));
      const __m512i pairs =
          _mm512_or_si512(_mm512_cvtepu16_epi32(first_half), _mm512_slli_epi32(_mm512_cvtepu16_epi32(second_half), 16));
      _mm512_storeu_si512(to + head * it.size + part + i * 2 * kLanes, pairs);
    }
  }
}

template <int kParts>
void mix_heads(int64_t count, const Attention& it, int64_t row, int64_t group, int64_t part, int64_t first, int64_t end,
               const float* weights, int64_t length, const float* totals, Half* to) {
  switch (count) {
    case 1:
      return mix<1, kParts>(it, row, group, part, first, end, weights, length, totals, to);
    case 2:
      return mix<2, kParts>(it, row, group, part, first, end, weights, length, totals, to);
    case 3:
      return mix<3, kParts>(it, row, group, part, first, end, weights, length, totals, to);
    default:
      return mix<4, kParts>(it, row, group, part, first, end, weights, length, totals, to);
  }
}

// The heads of one row that share keys and values, four at a time.
inline void attend(const Attention& it, int64_t row, int64_t group, const Half* next) {
  constexpr int64_t kHeads = 4;
  const int64_t end = it.end(row), first = it.first(row);
  const int64_t length = parts_of(end, kLanes) * kLanes;
  auto* scores = reinterpret_cast<float*>(scratch<Attention>(kHeads * length));
  for (int64_t head = 0; head < it.sharing(); head += kHeads) {
    const int64_t count = std::min(it.sharing() - head, kHeads), at = (group * it.sharing() + head) * it.size;
    float totals[kHeads];
    for (int64_t index = 0; index < count; ++index) {
      float* own = scores + index * length;
      const Half* query = it.query + row * it.query_step + at + index * it.size;
      const float highest = score(it, row, group, query, head + index ? nullptr : next, first, end, own);
      totals[index] = weigh(own, first, end, highest);
    }
    const int64_t step = it.size % (4 * kLanes) == 0 ? 4 * kLanes : 2 * kLanes;
    for (int64_t part = 0; part < it.size; part += step) {
      (step == 4 * kLanes ? mix_heads<2> : mix_heads<1>)(count, it, row, group, part, first, end, scores, length,
                                                         totals, it.mixed + row * it.heads * it.size + at);
    }
  }
}

inline void run_attention(const Attention& it, int64_t rows, const Sharing& sharing) {
  share(sharing, rows * it.groups, [&](Range& range) {
    for (int64_t begin, end; range.take(begin, end);) {
      for (int64_t task = begin; task < end; ++task) {
        const int64_t next = std::min(task + 1, rows * it.groups - 1), row = next / it.groups;
        const int64_t first = it.first(row) / it.page * it.page;
        attend(it, task / it.groups, task % it.groups, it.at(row, next % it.groups, first, 0));
      }
    }
  });
}

// Keys or values (N, G, d) of tokens whose pages and offsets are known.
struct Written {
  const Half* from;
  int64_t token_step, group_step;
};

// Writes keys and values of N tokens to pages of a store (P, 2, G, page, d); false where one is not in it.
inline bool write_pages(Half* store, int64_t places, int64_t groups, int64_t length, int64_t size, const int64_t* pages,
                        const int64_t* offsets, int64_t tokens, const Written (&parts)[2]) {
  for (int64_t token = 0; token < tokens; ++token) {
    const int64_t place = pages[token], at = offsets[token];
    if (place < 0 || place >= places || at < 0 || at >= length) return false;
    for (int64_t part = 0; part < 2; ++part) {
      const Written& own = parts[part];
      for (int64_t group = 0; group < groups; ++group) {
        std::memcpy(store + (((place * 2 + part) * groups + group) * length + at) * size,
                    own.from + token * own.token_step + group * own.group_step, size * sizeof(Half));
      }
    }
  }
  return true;
}

}  // namespace polar
