// Matrices in all forms in which they are stored, and their outputs in several of them.
#pragma once

#include "blocks.h"
#include "integers.h"
#include "kernels.h"
#include "products.h"

namespace polar {

inline const Half* halves(const void* numbers) { return static_cast<const Half*>(numbers); }

inline int64_t own_outputs(const PolarMatrix& matrix) {
  return matrix.outputs - (matrix.next ? matrix.next->outputs : 0);
}

// The weights of one output of a matrix; false where it has no such output or is of bytes or half bytes.
inline bool look_up(const PolarMatrix& matrix, int64_t output, Half* to) {
  if (output < 0 || output >= matrix.outputs) return false;
  if (output >= own_outputs(matrix)) return look_up(*matrix.next, output - own_outputs(matrix), to);
  const auto* numbers = static_cast<const Half*>(matrix.panels);
  switch (matrix.form) {
    case kPolarRows:
      std::copy_n(numbers + output * matrix.inputs, matrix.inputs, to);
      return true;
    case kPolarNumbers: {
      const int64_t pairs = parts_of(matrix.inputs, 2);
      const Half* own = numbers + 2 * (output / kPanel * pairs * kPanel + output % kPanel);
      for (int64_t input = 0; input < matrix.inputs; ++input) to[input] = own[input / 2 * 2 * kPanel + input % 2];
      return true;
    }
    default:
      return with_form(matrix.form, [&](auto kind) {
        unpack_output<decltype(kind)>(static_cast<const uint8_t*>(matrix.panels), output, matrix.inputs, to);
      });
  }
}

// Results are rounded to y, or go to `wide` as they are, where that is not null.
inline void multiply(const PolarMatrix& matrix, const Half* x, Half* y, int64_t rows, bool pairs,
                     const Sharing& sharing, float* wide = nullptr) {
  const int64_t step = matrix.outputs;
  for (const PolarMatrix* part = &matrix; part; part = part->next) {
    const int64_t outputs = own_outputs(*part), at = step - part->outputs;
    Half* to = y ? y + at : nullptr;
    float* wide_to = wide ? wide + at : nullptr;
    if (part->form == kPolarNumbers) {
      run_product({x, static_cast<const float*>(part->panels), halves(part->bias), to, rows, part->inputs, outputs,
                   step, nullptr, wide_to}, pairs, sharing);
      continue;
    }
    const auto* panels = static_cast<const uint8_t*>(part->panels);
    const Results results{halves(part->bias), to, wide_to, outputs, step};
    const bool of_file = with_form(part->form, [&](auto kind) {
      run_blocks<decltype(kind)>(x, rows, part->inputs, panels, results, sharing);
      if (part->fine && wide) refine_blocks<decltype(kind)>(x, rows, part->inputs, panels, results, sharing);
    });
    if (of_file) continue;
    const Integers integers{panels, halves(part->scale), halves(part->bias), to, outputs, step, wide_to};
    (part->form == kPolarBytes ? run_integers<Bytes> : run_integers<Nibbles>)(x, rows, part->inputs, integers, sharing);
  }
}

}  // namespace polar
