// A packed matrix: its codes, its scales, and how planes of a trellis code become weights.
#pragma once
#include <algorithm>
#include <cstdint>
#include <utility>
#include <vector>

#include "floats.h"

// taps[age, plane] is what a plane adds to the row `age` below its own. Plane f belongs to row
// phase[f] of each period of rows; rows are cyclic in segments of `length`. Without a code, length
// is 0 and period 1.
struct Code {
  int64_t period, length, ages;
  const float* taps;
  const float* phase;
};

struct Matrix {
  const uint8_t* codes;
  int64_t code_rows, bytes;  // of codes; of a row of them
  int64_t rows;
  int bases;
  bool tied;
  Code code;
  const void* scales;  // [rows or 1, groups, sums]
  xla::ffi::DataType dtype;
  int64_t scale_rows, groups, group_size, scales_per_group;

  bool coded() const { return code.length > 0; }
  bool one_scale() const { return groups == 1 && scales_per_group == 1; }

  // The scales of sum `sum` in group `group` of rows first, ..., first + count - 1.
  void scales_of(int64_t first, int64_t count, int64_t group, int64_t sum, float* to) const {
    const int64_t per_row = groups * scales_per_group, at = group * scales_per_group + sum;
    with_type(dtype, scales, [&](auto* s) {
      if (scale_rows == 1) std::fill(to, to + count, float(s[at]));
      else
        for (int64_t r = 0; r < count; ++r) to[r] = float(s[(first + r) * per_row + at]);
    });
  }

  // Rows of the weights that a task of `step` rows of the codes from `first` on makes.
  std::pair<int64_t, int64_t> made_of(int64_t first, int64_t step) const {
    return {first * code.period, std::min(step, code_rows - first) * code.period};
  }

  // Sums over activations that make a weight's product.
  int64_t sums() const { return tied ? 1 : bases; }

  // Products z [sum, row of codes, width] of `count` rows of codes from `first` on, with one scale
  // or one per base: values[row, width].
  void values_of(const float* z, int64_t first, int64_t count, int64_t width,
                 std::vector<float>& values) const;

  // Rows of the codes in a task: a segment, or some for each thread.
  int64_t step(int64_t threads) const {
    if (coded()) return code.length / code.period;
    return std::clamp<int64_t>(code_rows / (4 * threads) / 8 * 8, 8, 64);
  }
};

// Calls body(tap, plane, row of codes) for all that makes row r of a segment of `rows` rows.
template <typename Body>
inline void each_term(const Code& code, int64_t planes, int64_t r, int64_t rows, Body body) {
  for (int64_t age = 0; age < code.ages; ++age)
    for (int64_t f = 0; f < planes; ++f) {
      const float tap = code.taps[age * planes + f];
      const int64_t below = (r - age + rows) % rows - int64_t(code.phase[f]);
      if (tap != 0 && below % code.period == 0) body(tap, f, below / code.period);
    }
}

// z[plane, row of codes, width] to values[row, width], for a segment of `rows` rows.
inline void filter(const Code& code, const float* z, int64_t planes, int64_t rows, int64_t width,
                   float* values) {
  std::fill(values, values + rows * width, 0.f);
  const int64_t code_rows = rows / code.period;
  for (int64_t age = 0; age < code.ages; ++age)
    for (int64_t f = 0; f < planes; ++f) {
      const float tap = code.taps[age * planes + f];
      if (tap == 0) continue;
      const float* from = z + f * code_rows * width;
      const int64_t below = int64_t(code.phase[f]) + age;
      auto run = [&](int64_t to, int64_t first, int64_t count) {
        float* __restrict into = values + to;
        const float* __restrict z_of = from + first;
        for (int64_t i = 0; i < count; ++i) into[i] += tap * z_of[i];
      };
      if (code.period == 1) {  // two runs: to the end of the segment, and from its start
        run(below * width, 0, (rows - below) * width);
        run(0, (rows - below) * width, below * width);
      } else {
        for (int64_t r = 0; r < code_rows; ++r)
          run((r * code.period + below) % rows * width, r * width, width);
      }
    }
}

inline void Matrix::values_of(const float* z, int64_t first, int64_t count, int64_t width,
                              std::vector<float>& values) const {
  thread_local std::vector<float> scales;
  const auto [row, rows] = made_of(first, count);
  values.resize(rows * width);
  scales.resize(rows);
  if (coded()) filter(code, z, sums(), rows, width, values.data());
  for (int64_t f = 0; f < (coded() ? 1 : sums()); ++f) {
    scales_of(row, rows, 0, f, scales.data());
    const float* from = coded() ? values.data() : z + f * count * width;
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t m = 0; m < width; ++m) {
        const float value = from[r * width + m] * scales[r];
        values[r * width + m] = f ? values[r * width + m] + value : value;
      }
  }
}
