// Products of a packed matrix with many activations of 8 bits, in integers: bytes of weights times
// bytes of activations, summed in 32 bits. A register holds four inputs of several tokens.
//
// A byte of weights is a digit t + 1 of one base, or the number in base 3 of all digits of a tied
// weight: 80 at most. What comes too much, the value of digits 1 times the sum of a token, is taken
// off the sums. A trellis code's filter runs over the sums, as in gemv.h.
#pragma once
#include <array>
#include <cstdint>
#include <cstring>
#include <utility>
#include <vector>

#include "gemm.h"
#include "gemv.h"
#include "lanes.h"
#include "matrix.h"
#include "prefixes.h"
#include "threads.h"

constexpr int kMany = 16;               // sums of all tokens from which on gemv takes longer
constexpr int kCells = 64;              // cells of a row that are decoded together
constexpr int kRow = kDigits * kCells;  // bytes of weights in them
typedef uint8_t Cells __attribute__((vector_size(kCells)));

// --- activations --------------------------------------------------------------------------------

// Activations of 8 bits in the order in which weights are decoded: a tile of tokens after the
// other, each [some cells, digit, four cells, token, 4], padded with zeros to whole registers.
struct Bytes {
  int64_t fours, padded;  // cells, in fours; tokens
  std::vector<int8_t> values;
  std::vector<int32_t> totals;  // of each token
  std::vector<float> unit;

  void of(ffi::ThreadPool& pool, const float* x, int64_t tokens, int64_t inputs, int64_t cells) {
    fours = (cells + 3) / 4;
    padded = (tokens + kFloats - 1) / kFloats * kFloats;
    values.resize(padded * fours * 4 * kDigits);
    totals.assign(padded, 0);
    unit.assign(padded, 0.f);
    team.run(pool, (tokens + kTile - 1) / kTile, pool.num_threads(), [&](int64_t t) {
      thread_local std::vector<int8_t> token;
      const int64_t first = t * kTile, width = std::min<int64_t>(kTile, padded - first);
      token.assign(fours * 4 * kDigits, 0);
      for (int64_t m = first; m < first + width; ++m) {
        if (m < tokens) {
          unit[m] = float(to_bytes(x + m * inputs, inputs, token.data()));
          totals[m] = total_of(token.data(), inputs);
        } else {
          std::fill(token.begin(), token.end(), 0);
        }
        lay(token.data(), width, &values[first * fours * 4 * kDigits + (m - first) * 4]);
      }
    });
  }

  // A token to the places that are its own.
  void lay(const int8_t* token, int64_t width, int8_t* to) const {
    for (int64_t four = 0; four < fours; four += kCells / 4) {
      const int64_t some = std::min<int64_t>(kCells / 4, fours - four);
      for (int64_t c = 0; c < some; ++c)
        for (int p = 0; p < kDigits; ++p) {
          const int8_t* from = token + (four + c) * 4 * kDigits + p;
          int8_t* into = to + (four * kDigits + p * some + c) * width * 4;
          for (int i = 0; i < 4; ++i) into[i] = from[i * kDigits];
        }
    }
  }
};

// --- weights ------------------------------------------------------------------------------------

// `cells` cells of a row of codes to bytes of each sum: to[sum, stride], [digit, cell] in a sum.
template <int N, bool kTied>
void decode_bytes(const uint8_t* codes, int64_t cells, int64_t stride, uint8_t* to) {
  alignas(kCells) uint8_t places[N * kCells] = {};
  part<N>(codes, cells, kCells, places);
  Cells value = {};
  for (int place = 0; place < N * kDigits; ++place) {
    const int base = place % N;
    Cells rest;
    std::memcpy(&rest, places + place / kDigits * kCells, kCells);
    for (int i = 0; i < place % kDigits; ++i) rest = rest + rest + rest;  // what is left of a digit
    const Cells digit = -(Cells)(rest > 85) - (Cells)(rest > 170);
    value = kTied && base ? value + value + value + digit : digit;
    if (!kTied || base == N - 1)
      std::memcpy(to + (kTied ? 0 : base * stride) + place / N * kCells, &value, kCells);
  }
}

template <bool kTied, size_t... I>
auto byte_decoders(std::index_sequence<I...>) {
  return std::array{&decode_bytes<int(I) + 1, kTied>...};
}

// --- products -----------------------------------------------------------------------------------

// Adds the products of R rows of bytes [digit, kCells] with V registers of tokens to
// sums [row, token].
template <int R, int V>
void byte_tile(const uint8_t* weights, int64_t fours, const int8_t* x, int32_t* sums) {
  Sum total[R][V];
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < V; ++v) total[r][v] = load_as<Sum>(sums + (r * V + v) * kFloats);
  for (int p = 0; p < kDigits; ++p)
    for (int64_t c = 0; c < fours; ++c, x += V * kWidth) {
      Lanes of[V];
      repeat<V>([&](auto v) { of[v] = load(x + v * kWidth); });
      repeat<R>([&](auto r) {
        const Lanes w = every(load_as<int32_t>(weights + r * kRow + p * kCells + c * 4));
        repeat<V>([&](auto v) { total[r][v] = dot4(total[r][v], w, of[v]); });
      });
    }
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < V; ++v) store(sums + (r * V + v) * kFloats, total[r][v]);
}

template <int V>
void byte_tiles(int64_t rows, const uint8_t* weights, int64_t fours, const int8_t* x,
                int32_t* sums) {
  int64_t r = 0;
  for (; r + kTileRows <= rows; r += kTileRows)
    byte_tile<kTileRows, V>(weights + r * kRow, fours, x, sums + r * V * kFloats);
  for (; r + 2 <= rows; r += 2)
    byte_tile<2, V>(weights + r * kRow, fours, x, sums + r * V * kFloats);
  if (r < rows) byte_tile<1, V>(weights + r * kRow, fours, x, sums + r * V * kFloats);
}

template <size_t... I>
auto byte_tiles_of(std::index_sequence<I...>) {
  return std::array{&byte_tiles<int(I) + 1>...};
}

inline void multiply_bytes(ffi::ThreadPool& pool, const float* x, int64_t tokens, int64_t inputs,
                           const Matrix& matrix, float* y) {
  static const auto of_vectors = byte_tiles_of(std::make_index_sequence<kTileVectors>());
  static const auto tied = byte_decoders<true>(std::make_index_sequence<4>());
  static const auto apart = byte_decoders<false>(std::make_index_sequence<kPlanes>());
  thread_local Bytes held;
  const auto decode = (matrix.tied ? tied.data() : apart.data())[matrix.bases - 1];
  const int64_t n = matrix.bases, cells = matrix.bytes / n, step = matrix.step(pool.num_threads());
  const int32_t ones = matrix.tied ? (kPowers[n] - 1) / 2 : 1;  // the value of digits 1
  held.of(pool, x, tokens, inputs, cells);
  const Bytes& a = held;

  team.run(pool, (matrix.code_rows + step - 1) / step, pool.num_threads(), [&](int64_t i) {
    thread_local std::vector<uint8_t> weights;  // [sum, row, kRow]
    thread_local std::vector<int32_t> sums;     // [tile, sum, row, token]
    thread_local std::vector<float> z, values;
    const int64_t first = i * step, count = std::min(step, matrix.code_rows - first);
    const int64_t all = matrix.sums() * count;
    const auto [row, rows] = matrix.made_of(first, count);
    weights.resize(all * kRow);
    sums.assign(all * a.padded, 0);
    for (int64_t cell = 0; cell < cells; cell += kCells) {
      const int64_t some = std::min<int64_t>(kCells, cells - cell), fours = (some + 3) / 4;
      for (int64_t r = 0; r < count; ++r)
        decode(matrix.codes + (first + r) * matrix.bytes + cell * n, some, count * kRow,
               &weights[r * kRow]);
      for (int64_t m = 0; m < a.padded; m += kTile) {
        const int64_t width = std::min<int64_t>(kTile, a.padded - m);
        const int8_t* of = &a.values[(m * a.fours * 4 + cell * width) * kDigits];
        of_vectors[width / kFloats - 1](all, weights.data(), fours, of, &sums[m * all]);
      }
    }
    for (int64_t m = 0; m < tokens; m += kTile) {
      const int64_t width = std::min<int64_t>(kTile, a.padded - m);
      z.resize(all * width);
      for (int64_t r = 0; r < all; ++r)
        for (int64_t t = 0; t < width; ++t)
          z[r * width + t] =
              float(sums[m * all + r * width + t] - ones * a.totals[m + t]) * a.unit[m + t];
      matrix.values_of(z.data(), first, count, width, values);
      const int64_t known = std::min<int64_t>(width, tokens - m);
      for (int64_t t = 0; t < known; ++t)
        for (int64_t r = 0; r < rows; ++r)
          y[(m + t) * matrix.rows + row + r] = values[r * width + t];
    }
  });
}

// y as of gemv, of matrices with one scale per row or base.
inline ffi::Error gemm8(ffi::ThreadPool& pool, const float* x, int64_t tokens, int64_t inputs,
                        const Matrix& matrix, const Around& around, float* y) {
  thread_local std::vector<float> held, products;
  const bool alone = !around.gated && !around.residual;
  const int64_t rows = matrix.rows, out = around.gated ? rows / 2 : rows;
  if (!alone) products.resize(tokens * rows);
  float* into = alone ? y : products.data();
  by_runs(tokens, inputs, rows, normed(x, tokens, inputs, around, held), into,
          [&](const float* of, int64_t some, float* to) {
            multiply_bytes(pool, of, some, inputs, matrix, to);
          });
  for (int64_t m = 0; m < tokens && !alone; ++m)
    finish(around, m * out, out, into + m * rows, into + m * rows + out, 1, y);
  return ffi::Error::Success();
}
