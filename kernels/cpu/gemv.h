// Products of a packed matrix with few activations, in integers: see prefixes.h.
#pragma once
#include <array>
#include <cstdint>
#include <utility>
#include <vector>

#include "lanes.h"
#include "matrix.h"
#include "prefixes.h"
#include "threads.h"

constexpr int kColumns = 8;       // products that one reading of the codes makes
constexpr int kCache = 24 << 10;  // bytes of coefficients that stay in a core's first cache
constexpr int kSmall = 64 << 10;  // bytes of codes that are not worth a second thread

// Adds the products of bytes from..to of R rows with C columns to sums[column, row].
template <int R, int C>
void multiply(const Plan& plan, const uint8_t* codes, int64_t bytes, int64_t from, int64_t to,
              const int16_t* coefficients, int64_t columns, int64_t stride, int32_t* sums) {
  Sum total[R][C] = {};
  const int slots = plan.slots;
  for (int64_t start = from, phase = from / kBlock % plan.period; start < to; start += kBlock) {
    for (int part = 0; part < kBlock / kWidth && start + part * kWidth < to; ++part) {
      const int64_t at = start + part * kWidth;
      Lanes q[R];
      repeat<R>([&](auto r) { q[r] = load_some(codes + r * bytes + at, to - at); });
      for (int parity = 0; parity < 2; ++parity) {
        const uint16_t* power =
            &plan.powers[(phase * 2 + parity) * slots * kLanes + part * kWidth / 2];
        const int16_t* k = coefficients + parity * slots * columns * kLanes + part * kWidth / 2;
        Lanes v[R];
        repeat<R>([&](auto r) { v[r] = parity ? odd(q[r]) : even(q[r]); });
        for (int s = 0; s < slots; ++s, power += kLanes, k += columns * kLanes) {
          const Lanes digits = load(power);
          Lanes prefix[R];
          repeat<R>([&](auto r) { prefix[r] = high(v[r], digits); });
          repeat<C>([&](auto c) {
            const Lanes a = load(k + c * kLanes);
            repeat<R>([&](auto r) { total[r][c] = dot(total[r][c], prefix[r], a); });
          });
        }
      }
    }
    phase = phase + 1 == plan.period ? 0 : phase + 1;
    coefficients += plan.block(columns);
  }
  repeat<R>([&](auto r) {
    repeat<C>([&](auto c) {
      int32_t& sum = sums[c * stride + r];
      sum = int32_t(uint32_t(sum) + uint32_t(add(total[r][c])));
    });
  });
}

// The products of rows with C columns -> sums[column, row]; a stretch of the bytes at a time, whose
// coefficients stay in the cache.
template <int C>
void multiply_rows(const Plan& plan, const uint8_t* codes, int64_t bytes, int64_t rows,
                   const int16_t* coefficients, int64_t columns, int32_t* sums) {
  constexpr int R = kWidth < 64 ? (C <= 4 ? 2 : 1) : C <= 2 ? 8 : C <= 4 ? 4 : 2;
  const int64_t block = plan.block(columns);
  const int64_t stretch =
      std::max<int64_t>(1, kCache / (block * int64_t(sizeof(int16_t)))) * kBlock;
  std::fill(sums, sums + C * rows, 0);
  for (int64_t from = 0; from < bytes; from += stretch) {
    const int64_t to = std::min(bytes, from + stretch);
    const int16_t* here = coefficients + from / kBlock * block;
    int64_t r = 0;
    for (; r + R <= rows; r += R)
      multiply<R, C>(plan, codes + r * bytes, bytes, from, to, here, columns, rows, sums + r);
    for (; r < rows; ++r)
      multiply<1, C>(plan, codes + r * bytes, bytes, from, to, here, columns, rows, sums + r);
  }
}

template <size_t... I>
auto choices(std::index_sequence<I...>) {
  return std::array{&multiply_rows<int(I) + 1>...};
}

// --- what comes before and behind a product ----------------------------------------------------

// An RMS norm of what is multiplied, unless gain is null; a sum with what is found, unless residual
// is null; and silu(gate) * up, where a matrix is a gate above an up matrix.
struct Around {
  const float* gain;
  float eps;
  const float* residual;
  bool gated;
};

// x [tokens, inputs] over its root mean square, times gain.
inline const float* normed(const float* x, int64_t tokens, int64_t inputs, const Around& around,
                           std::vector<float>& into) {
  if (!around.gain) return x;
  into.resize(tokens * inputs);
  for (int64_t m = 0; m < tokens; ++m) {
    const float* from = x + m * inputs;
    float* to = &into[m * inputs];
    const float mean = sum_of(inputs, [&](int64_t k) { return from[k] * from[k]; }) / inputs;
    const float factor = 1.f / std::sqrt(mean + around.eps);
    for (int64_t k = 0; k < inputs; ++k) to[k] = from[k] * factor * around.gain[k];
  }
  return into.data();
}

// Puts products, and behind them what belongs there, into `rows` places of y from `first` on; up:
// those of the up matrix, read only where it is gated.
inline void finish(const Around& around, int64_t first, int64_t rows, const float* from,
                   const float* up, int64_t stride, float* y) {
  float* to = y + first;
  if (around.gated) {
    for (int64_t r = 0; r < rows; ++r) to[r] = silu(from[r * stride]) * up[r * stride];
  } else if (around.residual) {
    const float* more = around.residual + first;
    for (int64_t r = 0; r < rows; ++r) to[r] = from[r * stride] + more[r];
  } else {
    for (int64_t r = 0; r < rows; ++r) to[r] = from[r * stride];
  }
}

// --- the product ------------------------------------------------------------------------------

// What all tasks of a product read: the coefficients of its activations.
struct Activations {
  const Plan& plan;
  const Integers& integers;
  int64_t tokens, parts, columns;
  const int16_t* coefficients;
};

// The products of `count` rows of codes from `first` on, with their scales: values[row, token].
inline void values_of(const Matrix& matrix, const Activations& a, int64_t first, int64_t count,
                      std::vector<float>& values) {
  static const auto of_columns = choices(std::make_index_sequence<kColumns>());
  thread_local std::vector<int32_t> found;  // [column, row of codes]
  thread_local std::vector<float> z;
  const int64_t sums = a.plan.sums, tokens = a.tokens;
  found.resize(a.columns * count);
  for (int64_t c = 0; c < a.columns; c += kColumns)
    of_columns[std::min<int64_t>(kColumns, a.columns - c) - 1](
        a.plan, matrix.codes + first * matrix.bytes, matrix.bytes, count,
        a.coefficients + c * kLanes, a.columns, &found[c * count]);
  const int64_t ones = matrix.tied ? (kPowers[matrix.bases] - 1) / 2 : 1;  // the value of digits 1
  z.resize(sums * count * tokens);  // [sum, row of codes, token]
  for (int64_t m = 0; m < tokens; ++m)
    for (int64_t f = 0; f < sums; ++f) {
      const int64_t run = m * a.parts;
      const int32_t* low = &found[(run * sums + f) * count];
      const double unit = a.integers.unit[m], zero = double(ones * a.integers.totals[run]);
      float* to = &z[f * count * tokens + m];
      if (a.parts == 1) {
        for (int64_t r = 0; r < count; ++r) to[r * tokens] = float((low[r] - zero) * unit);
      } else {
        const int32_t* upper = low + sums * count;
        const double radix = double(a.integers.radix);
        const double all = zero + radix * double(ones * a.integers.totals[run + 1]);
        for (int64_t r = 0; r < count; ++r)
          to[r * tokens] = float((low[r] + radix * upper[r] - all) * unit);
      }
    }
  matrix.values_of(z.data(), first, count, tokens, values);
}

// y [tokens, rows], or [tokens, rows / 2] where it is gated. parts: of an activation's integer; 0
// rounds it to 8 bits.
inline ffi::Error gemv(ffi::ThreadPool& pool, const float* x, int64_t tokens, int64_t inputs,
                       int parts, const Matrix& matrix, const Around& around, float* y) {
  thread_local std::vector<float> held;
  thread_local std::vector<int16_t> buffer;
  const Plan& plan = plan_of(matrix.bases, matrix.tied);
  thread_local Integers integers;
  const float* read = normed(x, tokens, inputs, around, held);
  if (parts) to_integers(plan, read, tokens, inputs, parts, integers);
  else to_bytes(read, tokens, inputs, integers);
  parts = std::max(parts, 1);
  const int64_t sums = plan.sums, runs = tokens * parts, columns = runs * sums;
  const int64_t size = (matrix.bytes + kBlock - 1) / kBlock * plan.block(columns);
  buffer.assign(size + kBlock, 0);
  int16_t* coefficients = buffer.data();
  coefficients += (64 - reinterpret_cast<uintptr_t>(coefficients) % 64) / sizeof(int16_t);
  for (int64_t run = 0; run < runs; ++run)
    fold(plan, &integers.values[run * integers.inputs], integers.inputs / kDigits, columns,
         run * sums, coefficients);
  const Activations a{plan, integers, tokens, parts, columns, coefficients};
  const int64_t threads =
      matrix.code_rows * matrix.bytes * tokens < kSmall ? 1 : int64_t(pool.num_threads());
  const int64_t step = matrix.step(threads), out = around.gated ? matrix.rows / 2 : matrix.rows;
  const int64_t code_rows = around.gated ? matrix.code_rows / 2 : matrix.code_rows;

  team.run(pool, (code_rows + step - 1) / step, threads, [&](int64_t i) {
    thread_local std::vector<float> values, up;
    const int64_t first = i * step, count = std::min(step, code_rows - first);
    values_of(matrix, a, first, count, values);
    if (around.gated) values_of(matrix, a, code_rows + first, count, up);
    const auto [row, rows] = matrix.made_of(first, count);
    for (int64_t m = 0; m < tokens; ++m)
      finish(around, m * out + row, rows, &values[m], around.gated ? &up[m] : nullptr, tokens, y);
  });
  return ffi::Error::Success();
}
