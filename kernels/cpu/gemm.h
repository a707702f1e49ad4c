// Products of a packed matrix with many activations: weights are decoded, some at a time, and
// multiplied in float32 while they lie in the cache. A register holds an input of several tokens.
#pragma once
#include <array>
#include <cmath>
#include <cstdint>
#include <utility>
#include <vector>

#include "lanes.h"
#include "matrix.h"
#include "prefixes.h"
#include "threads.h"

constexpr int kPlanes = 7;     // of a code, at most
constexpr int kWide = 128;     // cells of a row that are decoded together
constexpr int kTokens = 1024;  // for which weights are decoded once, about

constexpr int kTileRows = kWidth == 32 ? 4 : 6;
constexpr int kTileVectors = kWidth == 64 ? 4 : 3;
constexpr int kTile = kTileVectors * kFloats;  // tokens

// --- activations --------------------------------------------------------------------------------

// Activations in the order in which weights are decoded: a tile of tokens after the other, each
// [digit, cell, token], padded with zeros to whole registers.
struct Panels {
  int64_t cells, padded;  // tokens
  std::vector<float> values;

  void of(ffi::ThreadPool& pool, const float* x, int64_t tokens, int64_t inputs, int64_t all) {
    cells = all;
    padded = (tokens + kFloats - 1) / kFloats * kFloats;
    values.resize(padded * cells * kDigits);
    team.run(pool, (tokens + kTile - 1) / kTile, pool.num_threads(), [&](int64_t t) {
      const int64_t first = t * kTile, count = std::min<int64_t>(kTile, tokens - first);
      const int64_t width = std::min<int64_t>(kTile, padded - first);
      float* mine = &values[first * cells * kDigits];
      std::fill(mine, mine + width * cells * kDigits, 0.f);
      for (int64_t cell = 0; cell < cells; cell += 8)  // so that what is written stays in the cache
        for (int64_t m = 0; m < count; ++m) {
          const float* from = x + (first + m) * inputs;
          for (int64_t c = cell; c < std::min(cell + 8, cells); ++c)
            for (int64_t p = 0; p < std::min<int64_t>(kDigits, inputs - c * kDigits); ++p)
              mine[(p * cells + c) * width + m] = from[c * kDigits + p];
        }
    });
  }
};

// --- weights ------------------------------------------------------------------------------------

// The bytes of count cells of N bytes each, those of one place in a cell together:
// to [place, stride].
template <int N>
void part(const uint8_t* __restrict codes, int64_t count, int64_t stride, uint8_t* __restrict to) {
  for (int at = 0; at < N; ++at)
    for (int64_t c = 0; c < count; ++c) to[at * stride + c] = codes[c * N + at];
}

template <size_t... I>
auto parters(std::index_sequence<I...>) {
  return std::array{&part<int(I) + 1>...};
}

// The trits at one place of count bytes.
inline void unpack(const uint8_t* __restrict bytes, int64_t count, uint16_t power,
                   float* __restrict trits) {
  for (int64_t c = 0; c < count; ++c) {
    const uint16_t rest = uint16_t(bytes[c] * power) & 255;
    trits[c] = float(int16_t(rest * 3 >> 8) - 1);
  }
}

// Which planes make each row of a task's weights: terms start[r], ..., start[r + 1] - 1 are taps
// times rows `from` of the planes [plane, row of codes]; and the scale of a row that has one.
struct Terms {
  std::vector<int64_t> start, from;
  std::vector<float> taps, scales;

  void of(const Matrix& matrix, int64_t first, int64_t count) {
    const auto [row, rows] = matrix.made_of(first, count);
    start.clear(), from.clear(), taps.clear();
    auto add = [&](float tap, int64_t f, int64_t of) {
      taps.push_back(tap), from.push_back(f * count + of);
    };
    for (int64_t r = 0; r < rows; ++r) {
      start.push_back(from.size());
      if (matrix.coded())
        each_term(matrix.code, matrix.bases, r, rows, add);
      else
        for (int f = 0; f < matrix.bases; ++f)
          add(matrix.tied ? float(kPowers[matrix.bases - 1 - f]) : 1.f, f, r);
    }
    start.push_back(from.size());
    scales.assign(rows, 1.f);
    if (matrix.one_scale()) matrix.scales_of(row, rows, 0, 0, scales.data());
  }
};

// to[c] = sum_t taps[t] z[from[t], c], some registers wide.
template <int V>
inline void combine(int64_t terms, const float* taps, const int64_t* from, const float* z,
                    float* to) {
  Floats sum[V] = {};
  for (int64_t t = 0; t < terms; ++t)
    for (int i = 0; i < V; ++i)
      sum[i] += taps[t] * load_as<Floats>(z + from[t] * kWide + i * kFloats);
  for (int i = 0; i < V; ++i) store(to + i * kFloats, sum[i]);
}

// Weights in columns p of `wide` cells, whose bytes are [place in a cell, row of codes, kWide]:
// values[row, kWide], without the scale of a row that has one.
inline void decode(const Matrix& matrix, const Terms& terms, const uint8_t* bytes, int64_t count,
                   int p, int64_t wide, float* z, float* values) {
  const int64_t n = matrix.bases;
  for (int64_t f = 0; f < n; ++f) {
    const int64_t place = p * n + f, at = place / kDigits;
    for (int64_t r = 0; r < count; ++r)
      unpack(bytes + (at * count + r) * kWide, wide, kPowers[place % kDigits],
             z + (f * count + r) * kWide);
  }
  constexpr int many = 4;
  for (size_t r = 0; r + 1 < terms.start.size(); ++r) {
    const int64_t start = terms.start[r], size = terms.start[r + 1] - start;
    const float* taps = &terms.taps[start];
    const int64_t* from = &terms.from[start];
    float* to = values + r * kWide;
    int64_t c = 0;
    for (; c + many * kFloats <= wide; c += many * kFloats)
      combine<many>(size, taps, from, z + c, to + c);
    for (; c < wide; c += kFloats)  // whole registers: a row is kWide wide
      combine<1>(size, taps, from, z + c, to + c);
  }
}

// Multiplies values[row, kWide] by their scales, where a row has several; the bases of free weights
// are in z[base, row, kWide].
inline void scale(const Matrix& matrix, int64_t row, int64_t rows, int p, int64_t cell,
                  int64_t wide, const float* z, float* values) {
  thread_local std::vector<float> scales;  // [group]
  const int64_t sums = matrix.scales_per_group, groups = matrix.groups;
  std::array<int32_t, kWide> group;
  for (int64_t c = 0; c < wide; ++c)
    group[c] = std::min(((cell + c) * kDigits + p) / matrix.group_size, groups - 1);
  scales.resize(groups);
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t f = 0; f < sums; ++f) {
      for (int64_t g = 0; g < groups; ++g) matrix.scales_of(row + r, 1, g, f, &scales[g]);
      const float* scale = scales.data();
      const float* base = z + (f * rows + r) * kWide;
      float* to = values + r * kWide;
      if (sums == 1)
        for (int64_t c = 0; c < wide; ++c) to[c] *= scale[group[c]];
      else
        for (int64_t c = 0; c < wide; ++c) to[c] = (f ? to[c] : 0.f) + base[c] * scale[group[c]];
    }
}

// --- products -----------------------------------------------------------------------------------

// Adds the products of R rows of weights [row, kWide] with V registers of tokens to
// sums [row, token].
template <int R, int V>
void tile(const float* weights, int64_t wide, const float* x, float* sums) {
  Floats total[R][V];
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < V; ++v) total[r][v] = load_as<Floats>(sums + (r * V + v) * kFloats);
  for (int64_t k = 0; k < wide; ++k) {
    Floats of[V];
    for (int v = 0; v < V; ++v) of[v] = load_as<Floats>(x + (k * V + v) * kFloats);
    for (int r = 0; r < R; ++r)
      for (int v = 0; v < V; ++v) total[r][v] += weights[r * kWide + k] * of[v];
  }
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < V; ++v) store(sums + (r * V + v) * kFloats, total[r][v]);
}

template <int V>
void tiles(int64_t rows, const float* weights, int64_t wide, const float* x, float* sums) {
  int64_t r = 0;
  for (; r + kTileRows <= rows; r += kTileRows)
    tile<kTileRows, V>(weights + r * kWide, wide, x, sums + r * V * kFloats);
  for (; r + 2 <= rows; r += 2) tile<2, V>(weights + r * kWide, wide, x, sums + r * V * kFloats);
  if (r < rows) tile<1, V>(weights + r * kWide, wide, x, sums + r * V * kFloats);
}

template <size_t... I>
auto tiles_of(std::index_sequence<I...>) {
  return std::array{&tiles<int(I) + 1>...};
}

// y [token, row] = sums [row, token] of a tile times the scale of the row.
inline void transpose(const float* sums, int64_t rows, int64_t tokens, int64_t width,
                      const float* scales, float* y, int64_t stride) {
  for (int64_t t = 0; t < tokens; ++t)
    for (int64_t r = 0; r < rows; ++r) y[t * stride + r] = sums[r * width + t] * scales[r];
}

inline void multiply_some(ffi::ThreadPool& pool, const float* x, int64_t tokens, int64_t inputs,
                          const Matrix& matrix, float* y) {
  static const auto of_vectors = tiles_of(std::make_index_sequence<kTileVectors>());
  static const auto of_bases = parters(std::make_index_sequence<kPlanes>());
  thread_local Panels held;
  const int64_t n = matrix.bases, step = matrix.step(pool.num_threads());
  held.of(pool, x, tokens, inputs, matrix.bytes / n);
  const Panels& panels = held;

  team.run(pool, (matrix.code_rows + step - 1) / step, pool.num_threads(), [&](int64_t i) {
    thread_local std::vector<uint8_t> bytes;
    thread_local std::vector<float> z, values, sums;  // sums [tile, row, token]
    thread_local Terms terms;
    const int64_t first = i * step, count = std::min(step, matrix.code_rows - first);
    const int64_t cells = panels.cells, padded = panels.padded;
    const auto [row, rows] = matrix.made_of(first, count);
    terms.of(matrix, first, count);
    bytes.resize(n * count * kWide);
    z.resize(n * count * kWide);
    values.resize(rows * kWide);
    sums.assign(rows * padded, 0.f);
    for (int64_t cell = 0; cell < cells; cell += kWide) {
      const int64_t wide = std::min<int64_t>(kWide, cells - cell);
      for (int64_t r = 0; r < count; ++r)
        of_bases[n - 1](matrix.codes + (first + r) * matrix.bytes + cell * n, wide, count * kWide,
                        &bytes[r * kWide]);
      for (int p = 0; p < kDigits; ++p) {
        decode(matrix, terms, bytes.data(), count, p, wide, z.data(), values.data());
        if (!matrix.one_scale())
          scale(matrix, row, rows, p, cell, wide, z.data(), values.data());
        for (int64_t m = 0; m < padded; m += kTile) {
          const int64_t width = std::min<int64_t>(kTile, padded - m);
          const float* of = &panels.values[m * cells * kDigits + (p * cells + cell) * width];
          of_vectors[width / kFloats - 1](rows, values.data(), wide, of, &sums[m * rows]);
        }
      }
    }
    for (int64_t m = 0; m < tokens; m += kTile) {
      const int64_t width = std::min<int64_t>(kTile, padded - m);
      transpose(&sums[m * rows], rows, std::min<int64_t>(kTile, tokens - m), width,
                terms.scales.data(), y + m * matrix.rows + row, matrix.rows);
    }
  });
}

// y [tokens, rows], by `multiply` some tokens at a time.
template <typename Multiply>
inline void by_runs(int64_t tokens, int64_t inputs, int64_t rows, const float* x, float* y,
                          Multiply multiply) {
  const int64_t runs = (tokens + kTokens - 1) / kTokens;
  const int64_t step = ((tokens + runs - 1) / runs + kTile - 1) / kTile * kTile;
  for (int64_t m = 0; m < tokens; m += step)
    multiply(x + m * inputs, std::min(step, tokens - m), y + m * rows);
}

inline ffi::Error gemm(ffi::ThreadPool& pool, const float* x, int64_t tokens, int64_t inputs,
                       const Matrix& matrix, float* y) {
  by_runs(tokens, inputs, matrix.rows, x, y, [&](const float* of, int64_t some, float* to) {
    multiply_some(pool, of, some, inputs, matrix, to);
  });
  return ffi::Error::Success();
}
