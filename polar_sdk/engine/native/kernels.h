// What the library can do, in plain C: it depends on neither Python nor torch, so that one build serves all versions.
//
// Letters as in `polar_sdk/engine`: M rows, K inputs, N outputs; B rows of one token, H query heads, G key and value
// heads, d head size. Numbers are the bits of bfloat16 unless said otherwise, and lie one after another unless steps
// are given. Functions return a `PolarResult`.
#pragma once

#include <cstdint>

#define POLAR_EXPORT __attribute__((visibility("default")))

extern "C" {

enum PolarResult : int32_t {
  kPolarDone = 0, kPolarNoMemory = 1, kPolarNoSuchPlace = 2, kPolarCutShort = 3, kPolarNotFinite = 4
};

// Number of threads, and whether they are the library's own rather than torch's.
struct PolarSharing {
  int32_t threads, team;
};

// How a matrix is stored: in panels of bfloat16, of bytes with a scale for each output, of half bytes; as the tensors of
// a GGUF file, see `blocks.h`; or in rows of bfloat16, which can be looked up and not multiplied.
enum PolarForm : int32_t {
  kPolarNumbers = 0, kPolarBytes = 1, kPolarNibbles = 2, kPolarRows = 3,
  kPolarQ4_0 = 4, kPolarQ4_1 = 5, kPolarQ5_0 = 6, kPolarQ5_1 = 7, kPolarQ8_0 = 8, kPolarQ4_K = 9, kPolarQ5_K = 10,
  kPolarQ6_K = 11
};

// A matrix with a bias for each output. The last of its outputs may be stored apart, in another form: as the `next` one.
// Rows that meet one of a GGUF file are rounded to 8 bits; where it is `fine`, those of `wide` results near a row's
// greatest to 16.
struct PolarMatrix {
  const void *panels, *scale, *bias;
  int64_t inputs, outputs;
  const PolarMatrix* next;
  int32_t form, fine;
};

// y (M, N) = x (M, K) · weightᵀ + bias, rounded; or, where y is null, `wide`, float32, not rounded: logits that differ by
// less than bfloat16 tells apart. `pairs` says how to multiply by numbers, see `lanes.h`.
POLAR_EXPORT int32_t polar_product(const PolarMatrix* matrix, const void* x, void* y, float* wide, int64_t rows,
    int32_t pairs, PolarSharing sharing);

// rows (M, K), bfloat16: the weights of some outputs (M,) of a matrix, which is not of bytes or half bytes.
POLAR_EXPORT int32_t polar_look_up(const PolarMatrix* matrix, const int64_t* wanted, int64_t count, void* rows,
    PolarSharing sharing);

// Bytes of the panels of so many outputs in a form of a GGUF file; 0 where that form cannot have so many inputs.
POLAR_EXPORT int64_t polar_packed_size(int32_t form, int64_t inputs, int64_t outputs);

// Brings a matrix (N, K) of such a form into panels, from the byte `start` of an open file on: its rows at `order` (N,),
// or all where it is null. The file may be cut short, or a scale not be finite.
POLAR_EXPORT int32_t polar_pack(int32_t form, int32_t file, int64_t start, const int64_t* order, int64_t inputs,
    int64_t outputs, void* panels, PolarSharing sharing);

// How a layer attends; a window or soft cap of 0 is none.
struct PolarKind {
  double scale, softcap;
  int64_t window;
};

// mixed (B, H × d): attention of query (B, H, d), `query_step` from one row to the next, over a store
// (P, 2, G, page, d), of which row b has the pages table (B, blocks)[b]; it sees what is up to positions (B,)[b].
POLAR_EXPORT int32_t
polar_attend_pages(const void* query, int64_t query_step, const void* store, const int64_t* table,
    const int64_t* positions, void* mixed, int64_t rows, int64_t heads, int64_t groups,
    int64_t size, int64_t page, int64_t blocks, PolarKind kind, PolarSharing sharing);

// weights (V,), from 0 to 1: how likely tokens are beside the likeliest, from their logits (V,) at a temperature; and
// the sum of each `block` of them, which is a multiple of 16.
POLAR_EXPORT int32_t
polar_weigh(const float* logits, int64_t tokens, float temperature, int64_t block, float* weights, double* sums);

// Of those with a weight of at least `least`: `count` weights and numbers, in order, in room for V + 16; and the `total`
// of all weights, summed up by blocks.
POLAR_EXPORT int32_t
polar_pick(const float* logits, int64_t tokens, float temperature, int64_t block, float least, float* weights,
    int32_t* numbers, int64_t* count, double* total);

// Steps of a tensor of tokens and heads, in numbers.
struct PolarSteps {
  int64_t token, head;
};

// Writes keys and values (N, G, d) to pages (N,) and offsets (N,) of a store (P, 2, G, page, d).
POLAR_EXPORT int32_t
polar_write_pages(void* store, int64_t places, int64_t groups, int64_t page, int64_t size, const int64_t* pages,
    const int64_t* offsets, int64_t tokens, const void* keys, PolarSteps key_steps,
    const void* values, PolarSteps value_steps);

// mixed (T, H × d): causal attention of query (T, H, d) over keys and values of `total` tokens. The tokens are those at
// `positions`, ascending, or the last ones where that is null. Torch's threads share the work.
POLAR_EXPORT int32_t
polar_attend_prompt(const void* query, int64_t query_step, const void* keys, PolarSteps key_steps,
    const void* values, PolarSteps value_steps, const int64_t* positions, void* mixed,
    int64_t tokens, int64_t heads, int64_t groups, int64_t size, int64_t total, PolarKind kind,
    int32_t pairs, int32_t threads);

// A draft head of width E, with H units, that guesses C tokens of these numbers; embeddings are (V, E).
struct PolarDraftHead {
  int64_t width, units, tokens;
  const int64_t* numbers;
  const void* scale;
  PolarMatrix enter, gated, down, rows, embeddings;  // the first four of bytes
};

// guesses (B, most), with their chances: what follows `tokens`, of which `states` (B, E) are those before. It guesses as
// long as in any row all guesses so far are right with a chance of at least `least`; `made` says how many of each row.
POLAR_EXPORT int32_t
polar_guess(const PolarDraftHead* head, const void* states, const int64_t* tokens, int64_t rows, int64_t most,
    float least, int64_t* guesses, float* chances, int64_t* made, PolarSharing sharing);

// Weight and bias of a norm; without a weight there is none.
struct PolarNorm {
  const void *weight, *bias;
};
enum PolarNormKind : int32_t { kPolarRms = 0, kPolarOffsetRms = 1, kPolarLayerNorm = 2 };
enum PolarActivation : int32_t { kPolarSilu = 0, kPolarRelu = 1, kPolarGelu = 2, kPolarGeluTanh = 3 };

// A layer of width E: norm → queries, keys and values → norms of heads → positions → attention → output → norm → added
// to what came in; then norm → gate and up, or up alone → activation → down → norm → added. Norms but the first may be
// missing. Where it is `parallel`, both halves read what came in.
struct PolarLayer {
  PolarMatrix qkv, keys_values, out, up, down;
  PolarNorm attn_norm, attn_after, mlp_norm, mlp_after;
  const void* head_norms;  // weights (H + G, d), or null
  PolarKind kind;
  int64_t width, heads, groups, size, rope;
  float eps;
  int32_t norm, activation, gated, parallel, pairs;
};

// Cosine and sine of tokens (N, width), of which width is 0 where positions enter elsewhere.
struct PolarAngles {
  const void *cos, *sin;
  int64_t width;
};

// A store (P, 2, G, page, d) of keys and values, and how many pages each row of a table has.
struct PolarPages {
  void* store;
  int64_t places, page, blocks;
};

// qkv (N, H + 2 G, d) of tokens x (N, E); or, without queries, kv (N, 2 G, d).
POLAR_EXPORT int32_t polar_project(const PolarLayer* layer, const void* x, int64_t tokens, PolarAngles angles, void* qkv,
    PolarSharing sharing);
POLAR_EXPORT int32_t polar_keys_values(const PolarLayer* layer, const void* x, int64_t tokens, PolarAngles angles,
    void* kv, PolarSharing sharing);

// y (N, E): the part of a layer after attention, of which x (N, E) is the input and mixed (N, H × d) the result.
POLAR_EXPORT int32_t polar_finish(const PolarLayer* layer, const void* x, const void* mixed, void* y, int64_t tokens,
    PolarSharing sharing);

// Visits of layers one after another, each for one token of some rows, whose states are x (N, E), in place: those at
// `index`, whose pages and positions are at the same places of `table` and `positions`; visit i is for what stands from
// bounds[i] to bounds[i + 1]. `angles` are of all tokens, for each kind of rope. `done` counts the visits that have run.
POLAR_EXPORT int32_t polar_decode_layers(const PolarLayer* layers, int64_t depth, void* x, const int64_t* visits,
    int64_t count, const int64_t* bounds, const int64_t* index, const int64_t* table, const int64_t* positions,
    const PolarAngles* angles, PolarPages pages, int64_t* done, PolarSharing sharing);
}
