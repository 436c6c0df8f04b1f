// Causal attention of the last tokens of one row.
#pragma once

#include "lanes.h"
#include "team.h"
#include "tiles.h"

namespace polar {

// A task takes some tokens of the heads that share keys, and goes over the keys in blocks. The keys of a block are
// transposed so that they are along lanes, and scores and mixed values are products of a chunk of queries at a time, in
// one of the ways below. Weights are relative to the highest score so far, and the sums so far are scaled when a higher
// one appears; weights that are rounded are so in their sum, too.

constexpr int64_t kTokens = 64;  // of a task

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

// sums (rows, 32) = sums × share + words · panel, for one word of each row per step.
template <class Form, int64_t kStep, int64_t kRow>
void meet_panel(const float* words, const float* panel, int64_t width, int64_t steps, const float* share, float* sums,
                int64_t stride) {
  for (int64_t first = 0; first < kPanel; first += kBeside * kLanes) {
    __m512 own[kRows][kBeside];
    for (int64_t row = 0; row < kRows; ++row) {
      for (int64_t part = 0; part < kBeside; ++part) {
        const float* sum = sums + row * stride + first + part * kLanes;
        own[row][part] =
            share ? _mm512_mul_ps(_mm512_set1_ps(share[row]), _mm512_loadu_ps(sum)) : _mm512_setzero_ps();
      }
    }
    const float* from = panel + first;
    for (int64_t step = 0; step < steps; ++step, from += width) {
      __m512 weights[kBeside];
      for (int64_t part = 0; part < kBeside; ++part) weights[part] = _mm512_loadu_ps(from + part * kLanes);
#pragma GCC unroll 12
      for (int64_t row = 0; row < kRows; ++row) {
        const __m512 word = _mm512_set1_ps(words[step * kStep + row * kRow]);
#pragma GCC unroll 2
        for (int64_t part = 0; part < kBeside; ++part) own[row][part] = Form::add(own[row][part], word, weights[part]);
      }
    }
    for (int64_t row = 0; row < kRows; ++row) {
      for (int64_t part = 0; part < kBeside; ++part) {
        _mm512_storeu_ps(sums + row * stride + first + part * kLanes, own[row][part]);
      }
    }
  }
}

// As many queries at a time as a product has rows, in a form of `lanes.h`.
template <class Its>
struct ByRows {
  using Form = Its;
  static constexpr int64_t kChunk = kRows, kKeys = 64;  // queries of a chunk, and keys of a block
  // Where a word of a query is among those of its chunk.
  static int64_t place(int64_t row, int64_t word, int64_t) { return word * kRows + row; }
  // scores (rows, keys) = queries · keys.
  static void meet_keys(const float* queries, const float* keys, int64_t words, int64_t, float* scores) {
    for (int64_t start = 0; start < kKeys; start += kPanel) {
      meet_panel<Form, kRows, 1>(queries, keys + start, kKeys, words, nullptr, scores + start, kKeys);
    }
  }
  // mixed (rows, size) = mixed × share + weights · values.
  static void meet_values(const float* weights, const float* values, int64_t size, int64_t, const float* share,
                          float* mixed) {
    for (int64_t at = 0; at < size; at += kPanel) {
      meet_panel<Form, 1, kKeys>(weights, values + at, size, kKeys / Form::kInputs, share, mixed + at, size);
    }
  }
};

#ifdef __AMX_BF16__

// Two tiles of queries at a time, and more keys, since sums enter tiles and leave them once for a block.
struct ByTiles {
  using Form = Pairs;
  static constexpr int64_t kChunk = 2 * kTile, kKeys = 256;
  static int64_t place(int64_t row, int64_t word, int64_t words) { return row * words + word; }
  static void meet_keys(const float* queries, const float* keys, int64_t words, int64_t count, float* scores) {
    const auto* first = reinterpret_cast<const Half*>(queries);
    const auto* second = reinterpret_cast<const Half*>(queries + kTile * words);
    for (int64_t start = 0; start < count; start += kPanel) {
      const TileLines lines{reinterpret_cast<const char*>(keys + start), kKeys * 4, words / kTile};
      meet_tiles<true, false>(first, second, words * 4, lines, scores + start, kKeys);
    }
  }
  static void meet_values(const float* weights, const float* values, int64_t size, int64_t count, const float* share,
                          float* mixed) {
    for (int64_t row = 0; row < kChunk; ++row) {
      if (share[row] == 1.0f) continue;
      float* own = mixed + row * size;
      for (int64_t at = 0; at < size; at += kLanes) {
        _mm512_store_ps(own + at, _mm512_mul_ps(_mm512_set1_ps(share[row]), _mm512_load_ps(own + at)));
      }
    }
    const auto* first = reinterpret_cast<const Half*>(weights);
    const auto* second = reinterpret_cast<const Half*>(weights + kTile * kKeys);
    for (int64_t at = 0; at < size; at += kPanel) {
      const TileLines lines{reinterpret_cast<const char*>(values + at), size * 4, parts_of(count, kStep)};
      meet_tiles<true, true>(first, second, kKeys * 4, lines, mixed + at, size);
    }
  }
};

#endif

// One task: `count` tokens from `start`, of one group. Rows are (head, token), in chunks, the last one padded.
template <class Way>
class PromptTask {
  using Form = typename Way::Form;
  static constexpr int64_t kChunk = Way::kChunk, kKeys = Way::kKeys;

 public:
  PromptTask(const Prompt& it, int64_t group, int64_t start)
      : it_(it),
        group_(group),
        start_(start),
        count_(std::min(kTokens, it.tokens - start)),
        rows_(it.sharing() * count_),
        chunks_(parts_of(rows_, kChunk)),
        words_(it.size / Form::kInputs),
        unit_(1.44269504f * (it.softcap > 0 ? 1.0f : it.scale)) {
    const int64_t every = chunks_ * kChunk;
    queries_ = scratch<Prompt>(every * (words_ + it.size + 2) + 2 * kKeys * words_ + kChunk * kKeys);
    mixed_ = queries_ + every * words_;
    keys_ = mixed_ + every * it.size;
    values_ = keys_ + kKeys * words_;
    scores_ = values_ + kKeys * words_;
    highest_ = scores_ + kChunk * kKeys;
    totals_ = highest_ + every;
    std::fill_n(queries_, every * (words_ + it.size), 0.0f);
    std::fill_n(highest_, every, kLowest);
    std::fill_n(totals_, every, 0.0f);
  }

  void run() {
    fill_queries();
    const int64_t end = position(count_ - 1) + 1, first = first_key(position(0));
    for (int64_t key = first / kKeys * kKeys; key < end; key += kKeys) {
      const int64_t count = std::min(kKeys, end - key), filled = parts_of(count, kFill) * kFill;
      fill_block(key, count, filled);
      for (int64_t chunk = 0; chunk < chunks_; ++chunk) run_chunk(chunk, key, filled);
    }
    write();
  }

 private:
  static constexpr float kLowest = -1e30f;
  static constexpr int64_t kFill = std::min<int64_t>(kKeys, 64);  // keys that are made ready together
  static constexpr int64_t kPadded = (kChunk + kLanes - 1) / kLanes * kLanes;

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
      float* to = queries_ + row / kChunk * kChunk * words_;
      for (int64_t word = 0; word < words_; ++word) {
        to[Way::place(row % kChunk, word, words_)] = Form::word(from + word * Form::kInputs);
      }
    }
  }

  // The keys and values from `key` on: `count` of them, and zeros as values up to `filled`.
  void fill_block(int64_t key, int64_t count, int64_t filled) {
    const Half* keys = it_.keys + key * it_.key_step + group_ * it_.key_group;
    for (int64_t start = 0; start < filled; start += kLanes) {
      const int64_t first = std::min(start, count - 1);
      for (int64_t at = 0; at < it_.size; at += kLanes) {
        __m512i pairs[8];
        turn(keys + first * it_.key_step + at, it_.key_step, count - 1 - first, 0xffff, pairs);
        for (int64_t pair = 0; pair < 8; ++pair) {
          Form::put(keys_ + (at + 2 * pair) / Form::kInputs * kKeys + start, kKeys, pairs[pair]);
        }
      }
    }
    for (int64_t offset = 0; offset < filled; offset += Form::kInputs) {
      const Half* from = it_.values + (key + offset) * it_.value_step + group_ * it_.value_group;
      float* to = values_ + offset / Form::kInputs * it_.size;
      for (int64_t at = 0; at < it_.size; at += kLanes) {
        _mm512_store_ps(to + at, offset < count ? Form::words(from + at, it_.value_step, offset + 1 < count)
                                                : _mm512_setzero_ps());
      }
    }
  }

  void run_chunk(int64_t chunk, int64_t key, int64_t count) {
    Way::meet_keys(queries_ + chunk * kChunk * words_, keys_, words_, count, scores_);
    alignas(64) float tops[kPadded] = {}, sums[kPadded] = {}, shares[kPadded];
    for (int64_t row = 0; row < kChunk; ++row) {
      weigh_row(chunk * kChunk + row, key, count, scores_ + row * kKeys, tops[row], sums[row]);
    }
    for (int64_t start = 0; start < kChunk; start += kLanes) {
      const __mmask16 own = first_lanes(kChunk - start);
      float *highest = highest_ + chunk * kChunk + start, *totals = totals_ + chunk * kChunk + start;
      const __m512 top = _mm512_load_ps(tops + start), before = _mm512_maskz_loadu_ps(own, highest);
      const __m512 share = power_of_two<Singles::kDegree>(_mm512_sub_ps(before, top));
      const __m512 total = _mm512_fmadd_ps(_mm512_maskz_loadu_ps(own, totals), share, _mm512_load_ps(sums + start));
      _mm512_mask_storeu_ps(highest, own, top);
      _mm512_mask_storeu_ps(totals, own, total);
      _mm512_store_ps(shares + start, share);
    }
    Way::meet_values(scores_, values_, it_.size, count, shares, mixed_ + chunk * kChunk * it_.size);
  }

  // Turns the scores of a row into words of weights, relative to the highest score so far: `top`, a power of two as all
  // scores are, since that is faster. The sum of the weights is `sum`.
  void weigh_row(int64_t row, int64_t key, int64_t count, float* scores, float& top, float& sum) {
    const int64_t at = position(token(std::min(row, rows_ - 1))), first = first_key(at);
    const bool sees_all = first <= key && key + count <= at + 1;
    const int64_t parts = (kFill == kKeys ? kKeys : count) / kLanes;
    __m512 values[kKeys / kLanes];
    __mmask16 seen[kKeys / kLanes];
    __m512 highest = _mm512_set1_ps(highest_[row]);
    for (int64_t i = 0; i < parts; ++i) {
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
    for (int64_t i = 0; i < parts; ++i) {
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

template <class Way>
void run_tasks(const Prompt& it, Range& range) {
  const int64_t blocks = parts_of(it.tokens, kTokens);
  for (int64_t begin, end; range.take(begin, end);) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t number = task / it.groups;  // first and last alternate, since later tokens see more keys
      const int64_t block = number % 2 ? blocks - 1 - number / 2 : number / 2;
      PromptTask<Way>(it, task % it.groups, block * kTokens).run();
    }
  }
}

// `pairs` says which form inputs have where there are no tiles.
inline void run_prompt(const Prompt& it, bool pairs, int64_t threads) {
  share({threads, false}, parts_of(it.tokens, kTokens) * it.groups, [&](Range& range) {
#ifdef __AMX_BF16__
    if (has_tiles) {
      const Tiles own(kTile, kTile);
      return run_tasks<ByTiles>(it, range);
    }
#endif
    pairs ? run_tasks<ByRows<Pairs>>(it, range) : run_tasks<ByRows<Singles>>(it, range);
  });
}

}  // namespace polar
