// Kernels for processors with AVX2, faster with AVX512 and VNNI, with AVX512-BF16 and with AMX, and for 64-bit Arm.
// `build.py` compiles this file for each, and `__init__.py` decides when which is used. Sums are float32; results are
// rounded to bfloat16, and the weights of attention of a prompt where inputs go in pairs.

#include "kernels.h"

#include "guess.h"
#include "layers.h"
#include "matrix.h"
#include "pages.h"
#include "prompt.h"
#include "weigh.h"

namespace {

using namespace polar;

Sharing among(const PolarSharing& sharing) { return {sharing.threads, sharing.team != 0}; }

const Half* read(const void* numbers) { return static_cast<const Half*>(numbers); }

PolarAngles angles_from(const PolarAngles& angles, int64_t token) {
  const int64_t at = token * angles.width;
  return {read(angles.cos) + at, read(angles.sin) + at, angles.width};
}

// No exception may leave a function of C.
template <class Body>
int32_t guarded(const Body& body) {
  try {
    return body();
  } catch (const std::bad_alloc&) {
    return kPolarNoMemory;
  }
}

}  // namespace

int32_t polar_product(const PolarMatrix* matrix, const void* x, void* y, float* wide, int64_t rows, int32_t pairs,
                      PolarSharing sharing) {
  return guarded([&] {
    multiply(*matrix, read(x), static_cast<Half*>(y), rows, pairs != 0, among(sharing), wide);
    return kPolarDone;
  });
}

int32_t polar_attend_pages(const void* query, int64_t query_step, const void* store, const int64_t* table,
                           const int64_t* positions, void* mixed, int64_t rows, int64_t heads, int64_t groups,
                           int64_t size, int64_t page, int64_t blocks, PolarKind kind, PolarSharing sharing) {
  return guarded([&] {
    const Attention it{read(query), read(store), table, positions, static_cast<Half*>(mixed), query_step, heads, groups,
                       size, page, blocks, static_cast<float>(kind.scale), kind.window,
                       static_cast<float>(kind.softcap)};
    run_attention(it, rows, among(sharing));
    return kPolarDone;
  });
}

int32_t polar_write_pages(void* store, int64_t places, int64_t groups, int64_t page, int64_t size, const int64_t* pages,
                          const int64_t* offsets, int64_t tokens, const void* keys, PolarSteps key_steps,
                          const void* values, PolarSteps value_steps) {
  const Written parts[2] = {{read(keys), key_steps.token, key_steps.head},
                            {read(values), value_steps.token, value_steps.head}};
  const bool written =
      write_pages(static_cast<Half*>(store), places, groups, page, size, pages, offsets, tokens, parts);
  return written ? kPolarDone : kPolarNoSuchPlace;
}

int32_t polar_attend_prompt(const void* query, int64_t query_step, const void* keys, PolarSteps key_steps,
                            const void* values, PolarSteps value_steps, const int64_t* positions, void* mixed,
                            int64_t tokens, int64_t heads, int64_t groups, int64_t size, int64_t total, PolarKind kind,
                            int32_t pairs, int32_t threads) {
  return guarded([&] {
    const Prompt it{read(query), read(keys), read(values), positions, static_cast<Half*>(mixed), tokens, heads, groups,
                    size, total, query_step, key_steps.token, key_steps.head, value_steps.token, value_steps.head,
                    static_cast<float>(kind.scale), kind.window, static_cast<float>(kind.softcap)};
    run_prompt(it, pairs != 0, threads);
    return kPolarDone;
  });
}

int32_t polar_weigh(const float* logits, int64_t tokens, float temperature, int64_t block, float* weights, double* sums) {
  weigh(Weights(logits, tokens, temperature), block, weights, sums);
  return kPolarDone;
}

int32_t polar_pick(const float* logits, int64_t tokens, float temperature, int64_t block, float least, float* weights,
                   int32_t* numbers, int64_t* count, double* total) {
  *count = pick(Weights(logits, tokens, temperature), block, least, weights, numbers, *total);
  return kPolarDone;
}

int32_t polar_look_up(const PolarMatrix* matrix, const int64_t* wanted, int64_t count, void* rows,
                      PolarSharing sharing) {
  std::atomic<bool> found{true};
  each(among(sharing), count, kTokensShared, [&](int64_t each) {
    if (!look_up(*matrix, wanted[each], static_cast<Half*>(rows) + each * matrix->inputs)) found = false;
  });
  return found ? kPolarDone : kPolarNoSuchPlace;
}

int64_t polar_packed_size(int32_t form, int64_t inputs, int64_t outputs) {
  int64_t size = 0;
  with_form(form, [&](auto kind) {
    using Form = decltype(kind);
    const int64_t step = block_of(form).inputs;
    if (inputs % step == 0) size = parts_of(outputs, kLanes) * panel_bytes<Form>(inputs / kGroup);
  });
  return size;
}

int32_t polar_pack(int32_t form, int32_t file, int64_t start, const int64_t* order, int64_t inputs, int64_t outputs,
                   void* panels, PolarSharing sharing) {
  return guarded([&] {
    Packing packing = Packing::kDone;
    const bool known = with_form(form, [&](auto kind) {
      packing = pack_blocks<decltype(kind)>(form, {file, start, 0, order}, inputs, outputs,
                                            static_cast<uint8_t*>(panels), among(sharing));
    });
    if (!known) return kPolarNoSuchPlace;
    return packing == Packing::kCutShort ? kPolarCutShort : packing == Packing::kDone ? kPolarDone : kPolarNotFinite;
  });
}

int32_t polar_guess(const PolarDraftHead* head, const void* states, const int64_t* tokens, int64_t rows, int64_t most,
                    float least, int64_t* guesses, float* chances, int64_t* made, PolarSharing sharing) {
  return guarded([&] {
    *made = run_guesses(*head, read(states), tokens, rows, most, least, guesses, chances, among(sharing));
    return kPolarDone;
  });
}

int32_t polar_project(const PolarLayer* layer, const void* x, int64_t tokens, PolarAngles angles, void* qkv,
                      PolarSharing sharing) {
  return guarded([&] {
    const Layer it(*layer, among(sharing));
    in_parts({const_cast<Half*>(read(x)), nullptr, tokens}, layer->width, [&](const Some& some, int64_t start) {
      it.project(some, angles_from(angles, start), static_cast<Half*>(qkv) + start * it.heads_width());
    });
    return kPolarDone;
  });
}

int32_t polar_keys_values(const PolarLayer* layer, const void* x, int64_t tokens, PolarAngles angles, void* kv,
                          PolarSharing sharing) {
  return guarded([&] {
    const Layer it(*layer, among(sharing));
    in_parts({const_cast<Half*>(read(x)), nullptr, tokens}, layer->width, [&](const Some& some, int64_t start) {
      it.keys_values(some, angles_from(angles, start), static_cast<Half*>(kv) + start * 2 * layer->groups * layer->size);
    });
    return kPolarDone;
  });
}

int32_t polar_finish(const PolarLayer* layer, const void* x, const void* mixed, void* y, int64_t tokens,
                     PolarSharing sharing) {
  return guarded([&] {
    const Layer it(*layer, among(sharing));
    in_parts({const_cast<Half*>(read(x)), nullptr, tokens}, layer->width, [&](const Some& some, int64_t start) {
      it.finish(some, read(mixed) + start * layer->heads * layer->size, static_cast<Half*>(y) + start * layer->width,
                nullptr);
    });
    return kPolarDone;
  });
}

int32_t polar_decode_layers(const PolarLayer* layers, int64_t depth, void* x, const int64_t* visits, int64_t count,
                            const int64_t* bounds, const int64_t* index, const int64_t* table, const int64_t* positions,
                            const PolarAngles* angles, PolarPages pages, int64_t* done, PolarSharing sharing) {
  return guarded([&]() -> int32_t {
    for (int64_t visit = 0; visit < count; ++visit, ++*done) {
      if (visits[visit] < 0 || visits[visit] >= depth) return kPolarNoSuchPlace;
      const PolarLayer& layer = layers[visits[visit]];
      const int64_t begin = bounds[visit], size = bounds[visit + 1] - begin;
      const Some some{static_cast<Half*>(x), index + begin, size};
      const bool ran = Layer(layer, among(sharing))
                           .decode(some, angles[layer.rope], pages, table + begin * pages.blocks, positions + begin);
      if (!ran) return kPolarNoSuchPlace;
    }
    return kPolarDone;
  });
}
