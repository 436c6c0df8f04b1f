// Causal attention of the last tokens of one row.
#pragma once

#include "lanes.h"
#include "team.h"

namespace polar {

// A task takes some tokens of the heads that share keys, and goes over the keys in blocks. The keys of a block are
// transposed so that they are along lanes, and scores and mixed values are products of 12 queries at a time, in one of
// the forms of `lanes.h`. Weights are relative to the highest score so far, and the sums so far are scaled when a
// higher one appears; weights that are rounded are so in their sum, too.

constexpr int64_t kTokens = 64;  // of a task
constexpr int64_t kKeys = 64;    // of a block

struct Prompt {
  const Half *query, *keys, *values;
  const int64_t* positions;  // of the tokens, ascending; null = they are the last ones
  Half* mixed;  // (T, H × d)
  int64_t tokens, heads, groups, size, total;
  int64_t query_step, key_step, key_group, value_step, value_group;  // strides of a token, and of a group
  float scale;
  int64_t window;  // or 0
  float softcap;   // or 0

  int64_t sharing() const { return heads / groups; }
};

// sums (12, 32) = sums × share + words · panel, for one word of each of 12 rows per step.
template <class Form, int64_t kStep, int64_t kRow>
void meet_panel(const float* words, const float* panel, int64_t width, int64_t steps, const float* share, float* sums,
                int64_t stride) {
  __m512 own[kRows][2];
  for (int64_t row = 0; row < kRows; ++row) {
    for (int64_t half = 0; half < 2; ++half) {
      own[row][half] =
          share ? _mm512_mul_ps(_mm512_set1_ps(share[row]), _mm512_loadu_ps(sums + row * stride + half * kLanes))
                : _mm512_setzero_ps();
    }
  }
  for (int64_t step = 0; step < steps; ++step, panel += width) {
    const __m512 low = _mm512_loadu_ps(panel), high = _mm512_loadu_ps(panel + kLanes);
#pragma GCC unroll 12
    for (int64_t row = 0; row < kRows; ++row) {
      const __m512 word = _mm512_set1_ps(words[step * kStep + row * kRow]);
      own[row][0] = Form::add(own[row][0], word, low);
      own[row][1] = Form::add(own[row][1], word, high);
    }
  }
  for (int64_t row = 0; row < kRows; ++row) {
    _mm512_storeu_ps(sums + row * stride, own[row][0]);
    _mm512_storeu_ps(sums + row * stride + kLanes, own[row][1]);
  }
}

// One task: `count` tokens from `start`, of one group. Rows are (head, token), in chunks of 12, the last one padded.
template <class Form>
class PromptTask {
 public:
  PromptTask(const Prompt& it, int64_t group, int64_t start)
      : it_(it),
        group_(group),
        start_(start),
        count_(std::min(kTokens, it.tokens - start)),
        rows_(it.sharing() * count_),
        chunks_(parts_of(rows_, kRows)),
        words_(it.size / Form::kInputs),
        unit_(1.44269504f * (it.softcap > 0 ? 1.0f : it.scale)) {
    const int64_t every = chunks_ * kRows;
    queries_ = scratch<Prompt>(every * (words_ + it.size + 2) + 2 * kKeys * words_ + kRows * kKeys);
    mixed_ = queries_ + every * words_;
    keys_ = mixed_ + every * it.size;
    values_ = keys_ + kKeys * words_;
    scores_ = values_ + kKeys * words_;
    highest_ = scores_ + kRows * kKeys;
    totals_ = highest_ + every;
    std::fill_n(queries_, every * (words_ + it.size), 0.0f);
    std::fill_n(highest_, every, kLowest);
    std::fill_n(totals_, every, 0.0f);
  }

  void run() {
    fill_queries();
    const int64_t end = position(count_ - 1) + 1, first = first_key(position(0));
    for (int64_t key = first / kKeys * kKeys; key < end; key += kKeys) {
      fill_block(key, std::min(kKeys, end - key));
      for (int64_t chunk = 0; chunk < chunks_; ++chunk) run_chunk(chunk, key);
    }
    write();
  }

 private:
  static constexpr float kLowest = -1e30f;

  int64_t position(int64_t token) const {
    return it_.positions ? it_.positions[start_ + token] : it_.total - it_.tokens + start_ + token;
  }
  int64_t first_key(int64_t position) const {
    return it_.window > 0 ? std::max<int64_t>(position - it_.window + 1, 0) : 0;
  }
  int64_t head(int64_t row) const { return group_ * it_.sharing() + row / count_; }
  int64_t token(int64_t row) const { return row % count_; }

  void fill_queries() {
    for (int64_t row = 0; row < rows_; ++row) {
      const Half* from = it_.query + (start_ + token(row)) * it_.query_step + head(row) * it_.size;
      float* to = queries_ + row / kRows * kRows * words_ + row % kRows;
      for (int64_t word = 0; word < words_; ++word) to[word * kRows] = Form::word(from + word * Form::kInputs);
    }
  }

  void fill_block(int64_t key, int64_t count) {
    const Half* keys = it_.keys + key * it_.key_step + group_ * it_.key_group;
    for (int64_t start = 0; start < kKeys; start += kLanes) {
      const int64_t first = std::min(start, count - 1);
      for (int64_t at = 0; at < it_.size; at += kLanes) {
        __m512i pairs[8];
        turn(keys + first * it_.key_step + at, it_.key_step, count - 1 - first, 0xffff, pairs);
        for (int64_t pair = 0; pair < 8; ++pair) {
          Form::put(keys_ + (at + 2 * pair) / Form::kInputs * kKeys + start, kKeys, pairs[pair]);
        }
      }
    }
    for (int64_t offset = 0; offset < kKeys; offset += Form::kInputs) {
      const Half* from = it_.values + (key + offset) * it_.value_step + group_ * it_.value_group;
      float* to = values_ + offset / Form::kInputs * it_.size;
      for (int64_t at = 0; at < it_.size; at += kLanes) {
        _mm512_store_ps(to + at, offset < count ? Form::words(from + at, it_.value_step, offset + 1 < count)
                                                : _mm512_setzero_ps());
      }
    }
  }

  void run_chunk(int64_t chunk, int64_t key) {
    const float* queries = queries_ + chunk * kRows * words_;
    for (int64_t start = 0; start < kKeys; start += kPanel) {
      meet_panel<Form, kRows, 1>(queries, keys_ + start, kKeys, words_, nullptr, scores_ + start, kKeys);
    }
    float tops[kLanes] = {}, sums[kLanes] = {}, shares[kLanes];
    for (int64_t row = 0; row < kRows; ++row) {
      weigh_row(chunk * kRows + row, key, scores_ + row * kKeys, tops[row], sums[row]);
    }
    constexpr __mmask16 kOwn = (1 << kRows) - 1;
    float *highest = highest_ + chunk * kRows, *totals = totals_ + chunk * kRows;
    const __m512 top = _mm512_loadu_ps(tops), before = _mm512_maskz_loadu_ps(kOwn, highest);
    const __m512 share = power_of_two<Singles::kDegree>(_mm512_sub_ps(before, top));
    const __m512 total = _mm512_fmadd_ps(_mm512_maskz_loadu_ps(kOwn, totals), share, _mm512_loadu_ps(sums));
    _mm512_mask_storeu_ps(highest, kOwn, top);
    _mm512_mask_storeu_ps(totals, kOwn, total);
    _mm512_storeu_ps(shares, share);
    float* mixed = mixed_ + chunk * kRows * it_.size;
    for (int64_t at = 0; at < it_.size; at += kPanel) {
      meet_panel<Form, 1, kKeys>(scores_, values_ + at, it_.size, kKeys / Form::kInputs, shares, mixed + at, it_.size);
    }
  }

  // Turns the scores of a row into words of weights, relative to the highest score so far: `top`, a power of two as all
  // scores are, since that is faster. The sum of the weights is `sum`.
  void weigh_row(int64_t row, int64_t key, float* scores, float& top, float& sum) {
    const int64_t at = position(token(std::min(row, rows_ - 1))), first = first_key(at);
    const bool sees_all = first <= key && key + kKeys <= at + 1;
    __m512 values[kKeys / kLanes];
    __mmask16 seen[kKeys / kLanes];
    __m512 highest = _mm512_set1_ps(highest_[row]);
    for (int64_t i = 0; i < kKeys / kLanes; ++i) {
      const int64_t start = key + i * kLanes;
      values[i] = _mm512_load_ps(scores + i * kLanes);
      if (it_.softcap > 0) {
        const __m512 cap = _mm512_set1_ps(it_.softcap);
        values[i] = _mm512_mul_ps(values[i], _mm512_set1_ps(it_.scale));
        values[i] = _mm512_mul_ps(cap, hyperbolic_tangent(_mm512_div_ps(values[i], cap)));
      }
      values[i] = _mm512_mul_ps(values[i], _mm512_set1_ps(unit_));
      seen[i] = sees_all ? static_cast<__mmask16>(0xffff) : lanes_between(first - start, at + 1 - start);
      highest = _mm512_mask_max_ps(highest, seen[i], highest, values[i]);
    }
    top = _mm512_reduce_max_ps(highest);
    __m512 total = _mm512_setzero_ps();
    for (int64_t i = 0; i < kKeys / kLanes; ++i) {
      const __m512 power = power_of_two<Form::kDegree>(_mm512_sub_ps(values[i], _mm512_set1_ps(top)));
      const __m512 weight = _mm512_maskz_mov_ps(seen[i], power);
      total = _mm512_add_ps(total, Form::keep(scores + i * kLanes / Form::kInputs, weight));
    }
    sum = _mm512_reduce_add_ps(total);
  }

  void write() {
    for (int64_t row = 0; row < rows_; ++row) {
      const __m512 share = _mm512_set1_ps(1.0f / totals_[row]);
      Half* to = it_.mixed + ((start_ + token(row)) * it_.heads + head(row)) * it_.size;
      for (int64_t at = 0; at < it_.size; at += kLanes) {
        store_rounded(to + at, _mm512_mul_ps(share, _mm512_loadu_ps(mixed_ + row * it_.size + at)));
      }
    }
  }

  const Prompt& it_;
  const int64_t group_, start_, count_, rows_, chunks_, words_;
  const float unit_;  // of scores, so that they are powers of two
  float *queries_, *mixed_, *keys_, *values_, *scores_, *highest_, *totals_;
};

template <class Form>
void run_prompt(const Prompt& it, int64_t threads) {
  const int64_t blocks = parts_of(it.tokens, kTokens);
  share({threads, false}, blocks * it.groups, [&](Range& range) {
    for (int64_t begin, end; range.take(begin, end);) {
      for (int64_t task = begin; task < end; ++task) {
        const int64_t number = task / it.groups;  // first and last alternate, since later tokens see more keys
        const int64_t block = number % 2 ? blocks - 1 - number / 2 : number / 2;
        PromptTask<Form>(it, task % it.groups, block * kTokens).run();
      }
    }
  });
}

}  // namespace polar
