// How likely tokens are, from their logits: see `polar_sdk/engine/sampling.py`.
#pragma once

#include <cmath>

#include "lanes.h"

namespace polar {

// How likely tokens are beside the likeliest, at a temperature. What is no number, or too little for one, has no weight.
class Weights {
 public:
  Weights(const float* logits, int64_t tokens, float temperature) : logits_(logits), tokens_(tokens) {
    __m512 most = _mm512_set1_ps(-INFINITY);
    for (int64_t at = 0; at < tokens; at += kLanes) {
      const __mmask16 lanes = first_lanes(tokens - at);
      most = _mm512_mask_max_ps(most, lanes, most, _mm512_maskz_loadu_ps(lanes, logits + at));
    }
    highest_ = _mm512_set1_ps(_mm512_reduce_max_ps(most));
    by_ = _mm512_set1_ps(1 / temperature);
  }

  // Weights of the tokens from `begin` to `end`: gives put(at, lanes, weights of 16 lanes) each, and returns their sum.
  template <class Put>
  float each(int64_t begin, int64_t end, const Put& put) const {
    __m512 sum = _mm512_setzero_ps();
    for (int64_t at = begin; at < end; at += kLanes) {
      const __mmask16 lanes = first_lanes(end - at);
      const __m512 less = _mm512_sub_ps(_mm512_maskz_loadu_ps(lanes, logits_ + at), highest_);
      const __m512 scaled = _mm512_mul_ps(less, by_);
      const __mmask16 likely = _mm512_mask_cmp_ps_mask(lanes, scaled, _mm512_set1_ps(kLeastPower), _CMP_GE_OQ);
      const __m512 weight = _mm512_maskz_mov_ps(likely, exponential(scaled));
      put(at, lanes, weight);
      sum = _mm512_add_ps(sum, weight);
    }
    return _mm512_reduce_add_ps(sum);
  }

  // Of blocks of tokens, whose size is a multiple of the lanes: gives add(block, sum of its weights).
  template <class Put, class Add>
  void blocks(int64_t size, const Put& put, const Add& add) const {
    for (int64_t begin = 0; begin < tokens_; begin += size) {
      add(begin / size, each(begin, std::min(begin + size, tokens_), put));
    }
  }

 private:
  const float* logits_;
  int64_t tokens_;
  __m512 highest_, by_;
};

inline void weigh(const Weights& all, int64_t block, float* weights, double* sums) {
  const auto put = [&](int64_t at, __mmask16 lanes, __m512 weight) { _mm512_mask_storeu_ps(weights + at, lanes, weight); };
  all.blocks(block, put, [&](int64_t place, float sum) { sums[place] = sum; });
}

// Of the tokens with at least such a weight: weights and numbers, in order, which need room for a register more.
// Returns how many; `total` is of all tokens.
inline int64_t pick(const Weights& all, int64_t block, float least, float* weights, int32_t* numbers, double& total) {
  constexpr int32_t kOrder[kLanes] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  const __m512i order = _mm512_loadu_si512(kOrder);
  int64_t count = 0;
  const auto put = [&](int64_t at, __mmask16 lanes, __m512 weight) {
    const __mmask16 found = _mm512_mask_cmp_ps_mask(lanes, weight, _mm512_set1_ps(least), _CMP_GE_OQ);
    if (!found) return;
    const __m512i number = _mm512_add_epi32(order, _mm512_set1_epi32(static_cast<int32_t>(at)));
    _mm512_storeu_ps(weights + count, _mm512_maskz_compress_ps(found, weight));
    _mm512_storeu_si512(numbers + count, _mm512_maskz_compress_epi32(found, number));
    count += __builtin_popcount(found);
  };
  total = 0;
  all.blocks(block, put, [&](int64_t, float sum) { total += sum; });
  return count;
}

}  // namespace polar
