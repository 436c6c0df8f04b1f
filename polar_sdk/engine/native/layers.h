// Whole layers: norms, products, positions, attention over pages and feed-forward, for all families that a `PolarLayer`
// describes. What lies between two products is computed in float32 and rounded once.
#pragma once

#include <cmath>

#include "kernels.h"
#include "matrix.h"
#include "pages.h"

namespace polar {

// Tokens of a pass at a time: what lies between two products then stays in the cache.
constexpr int64_t kTokensTogether = 512;
// Tokens that are worth a second thread for what lies between two products.
constexpr int64_t kTokensShared = 8;

// -- norms -----------------------------------------------------------------------------------------------------------

// Calls `use(at, lanes)` for each register of `size` numbers.
template <class Use>
inline void registers(int64_t size, const Use& use) {
  int64_t at = 0;
  for (; at + kLanes <= size; at += kLanes) use(at, static_cast<__mmask16>(0xffff));
  if (at < size) use(at, first_lanes(size - at));
}

// Numbers in bfloat16 or float32, read and kept in registers of float32.
inline __m512 numbers(const Half* from, __mmask16 lanes) { return widen(from, lanes); }
inline __m512 numbers(const float* from, __mmask16 lanes) { return _mm512_maskz_loadu_ps(lanes, from); }
inline void keep(Half* to, __m512 values, __mmask16 lanes) { store_rounded(to, values, lanes); }
inline void keep(float* to, __m512 values, __mmask16 lanes) { _mm512_mask_storeu_ps(to, lanes, values); }

template <class From>
float mean_square(const From* from, int64_t size, float mean) {
  __m512 squares = _mm512_setzero_ps();
  registers(size, [&](int64_t at, __mmask16 lanes) {
    __m512 x = _mm512_sub_ps(numbers(from + at, lanes), _mm512_set1_ps(mean));
    x = _mm512_mask_blend_ps(lanes, _mm512_setzero_ps(), x);
    squares = _mm512_fmadd_ps(x, x, squares);
  });
  return _mm512_reduce_add_ps(squares) / static_cast<float>(size);
}

template <class From>
float mean_of(const From* from, int64_t size) {
  __m512 sum = _mm512_setzero_ps();
  registers(size, [&](int64_t at, __mmask16 lanes) { sum = _mm512_add_ps(sum, numbers(from + at, lanes)); });
  return _mm512_reduce_add_ps(sum) / static_cast<float>(size);
}

// `from` and `to` may be the same.
template <class From, class To>
void norm_row(int32_t kind, const PolarNorm& norm, float eps, const From* from, int64_t size, To* to) {
  const Half *weight = halves(norm.weight), *bias = halves(norm.bias);
  const float mean = kind == kPolarLayerNorm ? mean_of(from, size) : 0.0f;
  const __m512 by = _mm512_set1_ps(1.0f / std::sqrt(mean_square(from, size, mean) + eps));
  const __m512 one = _mm512_set1_ps(1.0f), off = _mm512_set1_ps(mean);
  registers(size, [&](int64_t at, __mmask16 lanes) {
    __m512 factor = weight ? widen(weight + at, lanes) : one;
    if (kind == kPolarOffsetRms) factor = _mm512_add_ps(factor, one);
    const __m512 x = _mm512_mul_ps(_mm512_sub_ps(numbers(from + at, lanes), off), by);
    keep(to + at, _mm512_fmadd_ps(x, factor, bias ? widen(bias + at, lanes) : _mm512_setzero_ps()), lanes);
  });
}

// -- activations -----------------------------------------------------------------------------------------------------

// The error function, to 1.5 parts in ten million: Abramowitz and Stegun, Handbook of Mathematical Functions, 7.1.26.
inline __m512 error_function(__m512 x) {
  const __m512 one = _mm512_set1_ps(1.0f), size = _mm512_abs_ps(x);
  const __m512 t = _mm512_div_ps(one, _mm512_fmadd_ps(_mm512_set1_ps(0.3275911f), size, one));
  __m512 sum = _mm512_set1_ps(1.061405429f);
  for (const float term : {-1.453152027f, 1.421413741f, -0.284496736f, 0.254829592f}) {
    sum = _mm512_fmadd_ps(sum, t, _mm512_set1_ps(term));
  }
  const __m512 power = exponential(_mm512_sub_ps(_mm512_setzero_ps(), _mm512_mul_ps(size, size)));
  const __m512 up_to = _mm512_fnmadd_ps(_mm512_mul_ps(sum, t), power, one);
  const __mmask16 negative = _mm512_cmp_ps_mask(x, _mm512_setzero_ps(), _CMP_LT_OQ);
  return _mm512_mask_blend_ps(negative, up_to, _mm512_sub_ps(_mm512_setzero_ps(), up_to));
}

inline __m512 activated(int32_t kind, __m512 x) {
  const __m512 one = _mm512_set1_ps(1.0f), half = _mm512_set1_ps(0.5f), none = _mm512_setzero_ps();
  switch (kind) {
    case kPolarSilu:
      return _mm512_div_ps(x, _mm512_add_ps(one, exponential(_mm512_min_ps(_mm512_sub_ps(none, x),
                                                                           _mm512_set1_ps(80.0f)))));
    case kPolarRelu:  // what is no number stays none
      return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(x, none, _CMP_LT_OQ), x, none);
    case kPolarGelu: {
      const __m512 part = error_function(_mm512_mul_ps(x, _mm512_set1_ps(0.70710678f)));
      return _mm512_mul_ps(_mm512_mul_ps(half, x), _mm512_add_ps(one, part));
    }
    default: {  // by the hyperbolic tangent
      const __m512 cube = _mm512_mul_ps(_mm512_mul_ps(x, x), x);
      const __m512 inner = _mm512_mul_ps(_mm512_set1_ps(0.79788456f),
                                         _mm512_fmadd_ps(_mm512_set1_ps(0.044715f), cube, x));
      return _mm512_mul_ps(_mm512_mul_ps(half, x), _mm512_add_ps(one, hyperbolic_tangent(inner)));
    }
  }
}

// act(gate) × up of a row of gates and then what they let through, or act(up) of a row.
inline void activate_row(int32_t kind, bool gated, const Half* from, int64_t units, Half* to) {
  registers(units, [&](int64_t at, __mmask16 lanes) {
    __m512 x = activated(kind, widen(from + at, lanes));
    if (gated) x = _mm512_mul_ps(x, widen(from + units + at, lanes));
    store_rounded(to + at, x, lanes);
  });
}

// -- positions -------------------------------------------------------------------------------------------------------

// A head, of which the first `width` numbers are turned: x cos + (−x₂, x₁) sin, x₁ and x₂ the halves of them.
inline void turn_head(Half* head, const Half* cos, const Half* sin, int64_t width) {
  const int64_t half = width / 2;
  registers(half, [&](int64_t at, __mmask16 lanes) {
    const __m512 first = widen(head + at, lanes), second = widen(head + half + at, lanes);
    const __m512 low = _mm512_fnmadd_ps(second, widen(sin + at, lanes), _mm512_mul_ps(first, widen(cos + at, lanes)));
    const __m512 high = _mm512_fmadd_ps(first, widen(sin + half + at, lanes),
                                        _mm512_mul_ps(second, widen(cos + half + at, lanes)));
    store_rounded(head + at, low, lanes);
    store_rounded(head + half + at, high, lanes);
  });
}

// -- layers ----------------------------------------------------------------------------------------------------------

// Some of the tokens whose states are `states` (N, E): those at `index`, or the first ones where that is null.
struct Some {
  Half* states;
  const int64_t* index;
  int64_t count;
  int64_t place(int64_t token) const { return index ? index[token] : token; }
  Some from(int64_t start, int64_t size, int64_t width) const {
    return {index ? states : states + start * width, index ? index + start : nullptr, size};
  }
};

// Room for what lies between the products of a layer, kept by the thread that calls.
struct Room {
  template <class Owner, class Number = Half>
  static Number* of(int64_t numbers) {
    return reinterpret_cast<Number*>(scratch<Owner>(parts_of(numbers * sizeof(Number), sizeof(float))));
  }
  struct Normed;
  struct Heads;
  struct Mixed;
  struct Inner;
  struct Active;
  struct Outer;
  struct Grown;
};

class Layer {
 public:
  Layer(const PolarLayer& layer, const Sharing& sharing) : it_(layer), sharing_(sharing) {}

  int64_t heads_width() const { return (it_.heads + 2 * it_.groups) * it_.size; }

  // qkv (N, H + 2 G, d): queries and keys in their positions, and values.
  void project(const Some& x, const PolarAngles& angles, Half* qkv) const {
    multiply(it_.qkv, normed(x, it_.attn_norm), qkv, x.count, it_.pairs, sharing_);
    turn(x, angles, qkv, 0, it_.heads + it_.groups, heads_width());
  }

  // kv (N, 2 G, d): keys in their positions, and values; where the matrix cannot be divided, all of it is multiplied.
  void keys_values(const Some& x, const PolarAngles& angles, Half* kv) const {
    const int64_t width = 2 * it_.groups * it_.size, skipped = it_.keys_values.outputs - width;
    const Half* from = normed(x, it_.attn_norm);
    if (skipped == 0) {
      multiply(it_.keys_values, from, kv, x.count, it_.pairs, sharing_);
    } else {
      Half* whole = Room::of<Room::Heads>(x.count * it_.keys_values.outputs);
      multiply(it_.keys_values, from, whole, x.count, it_.pairs, sharing_);
      for (int64_t row = 0; row < x.count; ++row) {
        std::copy_n(whole + row * it_.keys_values.outputs + skipped, width, kv + row * width);
      }
    }
    turn(x, angles, kv, it_.heads, it_.groups, width);
  }

  // The part after attention, whose result is `mixed` (N, H × d); `to` has the states after the layer. Within it the
  // states are float32: they are rounded once, at its end.
  void finish(const Some& x, const Half* mixed, Half* to, const int64_t* to_index) const {
    const int64_t width = it_.width, size = x.count * width;
    float* attended = Room::of<Room::Outer, float>(2 * size);
    multiply(it_.out, mixed, nullptr, x.count, it_.pairs, sharing_, attended);
    after(it_.attn_after, attended, x.count);
    float* between = attended + size;  // what the feed-forward is added to
    each(sharing_, x.count, kTokensShared, [&](int64_t row) {
      const Half* own = x.states + x.place(row) * width;
      registers(width, [&](int64_t at, __mmask16 lanes) {
        const __m512 sum = _mm512_add_ps(widen(own + at, lanes), numbers(attended + row * width + at, lanes));
        keep(between + row * width + at, sum, lanes);
      });
    });
    const float* grown = it_.parallel ? feed(x.count, [&](int64_t row) { return x.states + x.place(row) * width; })
                                      : feed(x.count, [&](int64_t row) { return between + row * width; });
    each(sharing_, x.count, kTokensShared, [&](int64_t row) {
      Half* own = to + (to_index ? to_index[row] : row) * width;
      registers(width, [&](int64_t at, __mmask16 lanes) {
        const int64_t place = row * width + at;
        store_rounded(own + at, _mm512_add_ps(numbers(between + place, lanes), numbers(grown + place, lanes)), lanes);
      });
    });
  }

  // One token of each of some rows, attending over the row's pages; false where a page is not in the store.
  bool decode(const Some& x, const PolarAngles& angles, const PolarPages& pages, const int64_t* table,
              const int64_t* positions) const {
    Half *qkv = Room::of<Room::Heads>(x.count * heads_width());
    Half *mixed = Room::of<Room::Mixed>(x.count * it_.heads * it_.size);
    project(x, angles, qkv);
    const int64_t step = heads_width(), keys = it_.heads * it_.size, values = keys + it_.groups * it_.size;
    auto* store = static_cast<Half*>(pages.store);
    for (int64_t row = 0; row < x.count; ++row) {
      const int64_t page = table[row * pages.blocks + positions[row] / pages.page], at = positions[row] % pages.page;
      const Written parts[2] = {{qkv + row * step + keys, step, it_.size}, {qkv + row * step + values, step, it_.size}};
      if (!write_pages(store, pages.places, it_.groups, pages.page, it_.size, &page, &at, 1, parts)) return false;
    }
    const Attention attention{qkv, store, table, positions, mixed, step, it_.heads, it_.groups, it_.size, pages.page,
                              pages.blocks, static_cast<float>(it_.kind.scale), it_.kind.window,
                              static_cast<float>(it_.kind.softcap)};
    run_attention(attention, x.count, sharing_);
    finish(x, mixed, x.states, x.index);
    return true;
  }

 private:
  const Half* normed(const Some& x, const PolarNorm& norm) const {
    return normed(norm, x.count, [&](int64_t row) { return x.states + x.place(row) * it_.width; });
  }

  // Rows of states, which `row_at` finds, normed.
  template <class RowAt>
  const Half* normed(const PolarNorm& norm, int64_t count, const RowAt& row_at) const {
    Half* to = Room::of<Room::Normed>(count * it_.width);
    each(sharing_, count, kTokensShared, [&](int64_t row) {
      norm_row(it_.norm, norm, it_.eps, row_at(row), it_.width, to + row * it_.width);
    });
    return to;
  }

  void after(const PolarNorm& norm, float* rows, int64_t count) const {
    if (!norm.weight) return;
    each(sharing_, count, kTokensShared, [&](int64_t row) {
      norm_row(it_.norm, norm, it_.eps, rows + row * it_.width, it_.width, rows + row * it_.width);
    });
  }

  // Some heads of each token, from the first of its row on: normed where the family does that, and turned.
  void turn(const Some& x, const PolarAngles& angles, Half* rows, int64_t first, int64_t count, int64_t step) const {
    if (!angles.width && !it_.head_norms) return;
    each(sharing_, x.count, kTokensShared, [&](int64_t row) {
      const int64_t at = x.place(row) * angles.width;
      for (int64_t head = 0; head < count; ++head) {
        Half* own = rows + row * step + head * it_.size;
        if (it_.head_norms) {
          const PolarNorm norm{halves(it_.head_norms) + (first + head) * it_.size, nullptr};
          norm_row(it_.norm, norm, it_.eps, own, it_.size, own);
        }
        turn_head(own, halves(angles.cos) + at, halves(angles.sin) + at, angles.width);
      }
    });
  }

  template <class RowAt>
  const float* feed(int64_t count, const RowAt& row_at) const {
    const int64_t units = it_.down.inputs;
    const Half* from = normed(it_.mlp_norm, count, row_at);
    Half *inner = Room::of<Room::Inner>(count * it_.up.outputs), *active = Room::of<Room::Active>(count * units);
    multiply(it_.up, from, inner, count, it_.pairs, sharing_);
    each(sharing_, count, kTokensShared, [&](int64_t row) {
      activate_row(it_.activation, it_.gated, inner + row * it_.up.outputs, units, active + row * units);
    });
    float* to = Room::of<Room::Grown, float>(count * it_.width);
    multiply(it_.down, active, nullptr, count, it_.pairs, sharing_, to);
    after(it_.mlp_after, to, count);
    return to;
  }

  const PolarLayer& it_;
  const Sharing sharing_;
};

// Calls `run(tokens, start)` for not too many tokens at a time.
template <class Run>
void in_parts(const Some& x, int64_t width, const Run& run) {
  for (int64_t start = 0; start < x.count; start += kTokensTogether) {
    run(x.from(start, std::min(x.count - start, kTokensTogether), width), start);
  }
}

}  // namespace polar
