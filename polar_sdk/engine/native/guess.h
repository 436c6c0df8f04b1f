// Guesses of a draft head, one after another in one call: see `polar_sdk/engine/draft_head.py`.
#pragma once

#include <cmath>

#include "matrix.h"

namespace polar {

// Between the four products of a guess there is so little to do that calling them one by one took as long as they did.
// What is between them runs in one thread; what is rounded there is rounded as torch does it.

constexpr float kEps = 1e-6f;  // added to a mean square before its root

// A row divided by its root mean square, and then times `scale` if there is one.
inline void normalise(const Half* from, int64_t size, const Half* scale, Half* to) {
  __m512 squares = _mm512_setzero_ps();
  for (int64_t at = 0; at < size; at += kLanes) {
    const __m512 x = widen(from + at, first_lanes(size - at));
    squares = _mm512_fmadd_ps(x, x, squares);
  }
  const __m512 by = _mm512_set1_ps(1.0f / std::sqrt(_mm512_reduce_add_ps(squares) / static_cast<float>(size) + kEps));
  for (int64_t at = 0; at < size; at += kLanes) {
    const __mmask16 lanes = first_lanes(size - at);
    store_rounded(to + at, _mm512_mul_ps(widen(from + at, lanes), by), lanes);
    if (scale != nullptr) store_rounded(to + at, _mm512_mul_ps(widen(to + at, lanes), widen(scale + at, lanes)), lanes);
  }
}

// silu(gate) × up of a row (2 H): the gates, then what they let through.
inline void gate(const Half* both, int64_t units, Half* to) {
  const __m512 one = _mm512_set1_ps(1.0f);
  for (int64_t at = 0; at < units; at += kLanes) {
    const __mmask16 lanes = first_lanes(units - at);
    const __m512 x = widen(both + at, lanes), none = _mm512_setzero_ps();
    const __m512 least = _mm512_min_ps(_mm512_sub_ps(none, x), _mm512_set1_ps(80.0f));
    store_rounded(to + at, _mm512_div_ps(x, _mm512_add_ps(one, exponential(least))), lanes);
    store_rounded(to + at, _mm512_mul_ps(widen(to + at, lanes), widen(both + units + at, lanes)), lanes);
  }
}

inline void add_to(Half* x, const Half* other, int64_t size) {
  for (int64_t at = 0; at < size; at += kLanes) {
    const __mmask16 lanes = first_lanes(size - at);
    store_rounded(x + at, _mm512_add_ps(widen(x + at, lanes), widen(other + at, lanes)), lanes);
  }
}

// The likeliest of all tokens but the last, which stands for all others; its chance is 0 if any logit is no number.
inline int64_t likeliest(const Half* logits, int64_t tokens, float& chance) {
  __m512 most = _mm512_set1_ps(-INFINITY);
  for (int64_t at = 0; at < tokens; at += kLanes) {
    const __mmask16 lanes = first_lanes(tokens - at);
    most = _mm512_mask_max_ps(most, lanes, most, widen(logits + at, lanes));
  }
  const float best = _mm512_reduce_max_ps(most);
  int64_t found = 0;
  for (int64_t at = 0; at < tokens; at += kLanes) {
    const __mmask16 lanes = first_lanes(tokens - at);
    const __mmask16 same = _mm512_mask_cmp_ps_mask(lanes, widen(logits + at, lanes), _mm512_set1_ps(best), _CMP_EQ_OQ);
    if (same) {
      found = at + __builtin_ctz(same);
      break;
    }
  }
  const float others = _mm512_cvtss_f32(widen(logits + tokens, 1)), highest = std::max(best, others);
  __m512 sums = _mm512_setzero_ps();
  for (int64_t at = 0; at <= tokens; at += kLanes) {
    const __mmask16 lanes = first_lanes(tokens + 1 - at);
    const __m512 less = _mm512_sub_ps(widen(logits + at, lanes), _mm512_set1_ps(highest));
    sums = _mm512_mask_add_ps(sums, lanes, sums, exponential(less));
  }
  const float share = std::exp(best - highest) / _mm512_reduce_add_ps(sums);
  chance = share > 0 ? share : 0.0f;
  return found;
}

// Rows that are guessed together, one token further at a time.
class Guesses {
 public:
  Guesses(const PolarDraftHead& head, const Half* states, int64_t rows, const Sharing& sharing)
      : head_(head), rows_(rows), sharing_(sharing) {
    const int64_t sizes[] = {head.width, 2 * head.width, 2 * head.units, head.units, head.width, head.tokens + 1};
    int64_t total = 0;
    for (const int64_t size : sizes) total += parts_of(rows * size, 2 * kLanes) * 2 * kLanes;
    Half* next = reinterpret_cast<Half*>(scratch<Guesses>(total / 2));
    Half** const parts[] = {&states_, &entering_, &gated_, &units_, &normal_, &logits_};
    for (int64_t part = 0; part < 6; ++part) {
      *parts[part] = next;
      next += parts_of(rows * sizes[part], 2 * kLanes) * 2 * kLanes;
    }
    std::copy_n(states, rows * head.width, states_);
  }

  // One more guess of each row: the likeliest token after its token, which is at row × `step` of `tokens`. It goes to
  // row × `places` of `guesses` and `chances`.
  void guess(const int64_t* tokens, int64_t step, int64_t* guesses, float* chances, int64_t places) {
    const int64_t width = head_.width, units = head_.units;
    for (int64_t row = 0; row < rows_; ++row) {
      Half* to = entering_ + 2 * row * width;
      normalise(states_ + row * width, width, nullptr, to);
      look_up(head_.embeddings, tokens[row * step], normal_);
      normalise(normal_, width, nullptr, to + width);
    }
    multiply(head_.enter, entering_, states_);
    for (int64_t row = 0; row < rows_; ++row) normalise(states_ + row * width, width, nullptr, normal_ + row * width);
    multiply(head_.gated, normal_, gated_);
    for (int64_t row = 0; row < rows_; ++row) gate(gated_ + 2 * row * units, units, units_ + row * units);
    multiply(head_.down, units_, normal_);
    add_to(states_, normal_, rows_ * width);
    for (int64_t row = 0; row < rows_; ++row) {
      normalise(states_ + row * width, width, halves(head_.scale), normal_ + row * width);
    }
    multiply(head_.rows, normal_, logits_);
    for (int64_t row = 0; row < rows_; ++row) {
      const int64_t place = likeliest(logits_ + row * (head_.tokens + 1), head_.tokens, chances[row * places]);
      guesses[row * places] = head_.numbers[place];
    }
  }

 private:
  void multiply(const PolarMatrix& matrix, const Half* x, Half* y) const {
    polar::multiply(matrix, x, y, rows_, false, sharing_);  // matrices of bytes do not ask for pairs
  }

  const PolarDraftHead& head_;
  int64_t rows_;
  Sharing sharing_;
  Half *states_, *entering_, *gated_, *units_, *normal_, *logits_;
};

// Up to `most` guesses after each of some tokens, (B, most) with their chances, as long as in any row all guesses so
// far are right with a chance of at least `least`. Returns how many were made.
inline int64_t run_guesses(const PolarDraftHead& head, const Half* states, const int64_t* tokens, int64_t rows, int64_t most,
                           float least, int64_t* guesses, float* chances, const Sharing& sharing) {
  Guesses made(head, states, rows, sharing);
  for (int64_t count = 0; count < most; ++count) {
    const bool first = count == 0;
    made.guess(first ? tokens : guesses + count - 1, first ? 1 : most, guesses + count, chances + count, most);
    float likely = 0;
    for (int64_t row = 0; row < rows; ++row) {
      float path = 1;
      for (int64_t guess = 0; guess <= count; ++guess) path *= chances[row * most + guess];
      likely = std::max(likely, path);
    }
    if (likely < least) return count + 1;
  }
  return most;
}

}  // namespace polar
