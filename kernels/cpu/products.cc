// Products of packed ternary matrices with activations, for CPUs.
//
// The mathematics is in prefixes.h. Sums are integers, so that results depend neither on their
// order, nor on the number of threads, nor on the width of registers.
#include <algorithm>
#include <array>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <thread>
#include <utility>
#include <vector>

#include "lanes.h"
#include "prefixes.h"
#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace {

constexpr int kColumns = 8;       // products that one reading of the codes makes
constexpr int kRows = 64;         // rows of a task, at most
constexpr int kCache = 24 << 10;  // bytes of coefficients that stay in a core's first cache
constexpr int kWide = 256;        // columns of weights that are decoded together
constexpr int kSmall = 64 << 10;  // bytes of codes that are not worth a second thread
constexpr int kPlanes = 7;        // of a code, at most

// --- a matrix ---------------------------------------------------------------------------------

// How planes become weights: taps[age, plane] is what a plane adds to the row `age` below its own.
// Plane f belongs to row phase[f] of each period of rows; rows are cyclic in segments of `length`.
// Without a code, length is 0 and period 1.
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
  const void* scales;
  ffi::DataType dtype;
  int64_t scale_rows, scales_per_row;

  bool coded() const { return code.length > 0; }

  float scale(int64_t row, int64_t sum = 0) const {
    const int64_t i = (scale_rows == 1 ? 0 : row) * scales_per_row + sum;
    if (dtype == ffi::F32) return static_cast<const float*>(scales)[i];
    const uint32_t half = static_cast<const uint16_t*>(scales)[i];
    uint32_t bits = half << 16;  // bfloat16
    if (dtype == ffi::F16) {
      const uint32_t exponent = half >> 10 & 31, mantissa = half & 1023;
      if (exponent == 0) return (half >> 15 ? -1.f : 1.f) * std::ldexp(float(mantissa), -24);
      bits = (half >> 15) << 31 | (exponent == 31 ? 255 : exponent + 112) << 23 | mantissa << 13;
    }
    float value;
    std::memcpy(&value, &bits, sizeof(value));
    return value;
  }

  // Rows of the weights that a task of `step` rows of the codes from `first` on makes.
  std::pair<int64_t, int64_t> made_of(int64_t first, int64_t step) const {
    return {first * code.period, std::min(step, code_rows - first) * code.period};
  }

  // Rows of the codes in a task: a segment, or some for each thread.
  int64_t step(int64_t threads) const {
    if (coded()) return code.length / code.period;
    return std::clamp<int64_t>(code_rows / (4 * threads) / 8 * 8, 8, kRows);
  }
};

// z[plane, row of codes, width] to values[row, width], for a segment of `rows` rows.
void filter(const Code& code, const float* z, int64_t planes, int64_t rows, int64_t width,
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

// Calls body(0), ..., body(tasks - 1) on the threads of XLA's pool and on this one, which goes on
// by itself where no other is free. Each task writes what is its own.
template <typename Body>
void parallel(ffi::ThreadPool& pool, int64_t tasks, bool small, const Body& body) {
  struct State {
    std::atomic<int64_t> next{0}, done{0};
  };
  auto state = std::make_shared<State>();
  // A thread that comes late finds no task left, and does not touch `body`, which may be gone.
  auto work = [state, tasks, &body] {
    for (int64_t i; (i = state->next++) < tasks; ++state->done) body(i);
  };
  const int64_t threads = small ? 1 : std::min<int64_t>(tasks, pool.num_threads());
  for (int64_t t = 1; t < threads; ++t) pool.Schedule(decltype(work)(work));
  work();
  while (state->done < tasks) std::this_thread::yield();
}

// --- products -------------------------------------------------------------------------------

// Calls body(0), ..., body(N - 1) with numbers that the compiler knows: arrays that they index stay
// in registers.
template <typename Body, size_t... I>
[[gnu::always_inline]] inline void repeat(Body body, std::index_sequence<I...>) {
  (body(std::integral_constant<size_t, I>()), ...);
}
template <int N, typename Body>
[[gnu::always_inline]] inline void repeat(Body body) {
  repeat(body, std::make_index_sequence<N>());
}

// Adds the products of bytes from..to of R rows with C columns to sums[row, column].
template <int R, int C>
void multiply(const Plan& plan, const uint8_t* codes, int64_t bytes, int64_t from, int64_t to,
              const int16_t* coefficients, int64_t columns, int32_t* sums) {
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
      sums[r * kColumns + c] =
          int32_t(uint32_t(sums[r * kColumns + c]) + uint32_t(add(total[r][c])));
    });
  });
}

// The products of rows with C columns -> sums[row, column]; a stretch of the bytes at a time, whose
// coefficients stay in the cache.
template <int C>
void multiply_rows(const Plan& plan, const uint8_t* codes, int64_t bytes, int64_t rows,
                   const int16_t* coefficients, int64_t columns, int32_t* sums) {
  constexpr int R = kWidth < 64 ? (C <= 4 ? 2 : 1) : C <= 2 ? 8 : C <= 4 ? 4 : 2;
  const int64_t block = plan.block(columns);
  const int64_t stretch =
      std::max<int64_t>(1, kCache / (block * int64_t(sizeof(int16_t)))) * kBlock;
  std::fill(sums, sums + rows * kColumns, 0);
  for (int64_t from = 0; from < bytes; from += stretch) {
    const int64_t to = std::min(bytes, from + stretch);
    const int16_t* here = coefficients + from / kBlock * block;
    int64_t r = 0;
    for (; r + R <= rows; r += R)
      multiply<R, C>(plan, codes + r * bytes, bytes, from, to, here, columns, sums + r * kColumns);
    for (; r < rows; ++r)
      multiply<1, C>(plan, codes + r * bytes, bytes, from, to, here, columns, sums + r * kColumns);
  }
}

template <size_t... I>
auto choices(std::index_sequence<I...>) {
  return std::array{&multiply_rows<int(I) + 1>...};
}

// --- calls ------------------------------------------------------------------------------------

ffi::Error products(ffi::ThreadPool& pool, const float* x, int64_t tokens, int64_t inputs,
                    int parts, const Matrix& matrix, float* y) {
  static const auto of_columns = choices(std::make_index_sequence<kColumns>());
  const Plan plan(matrix.bases, matrix.tied);
  const Integers a = integers(plan, x, tokens, inputs, parts);
  const int64_t sums = plan.sums, runs = tokens * parts, columns = runs * sums;
  const size_t size = std::max<size_t>(
      64, (matrix.bytes + kBlock - 1) / kBlock * plan.block(columns) * sizeof(int16_t));
  std::unique_ptr<int16_t, decltype(&std::free)> held(
      static_cast<int16_t*>(std::aligned_alloc(64, size)), &std::free);
  int16_t* coefficients = held.get();
  if (!coefficients)
    return ffi::Error(ffi::ErrorCode::kResourceExhausted, "no memory for activations");
  std::memset(coefficients, 0, size);
  for (int64_t run = 0; run < runs; ++run)
    fold(plan, &a.values[run * a.inputs], a.inputs / kDigits, columns, run * sums, coefficients);
  const int64_t ones = matrix.tied ? (kPowers[matrix.bases] - 1) / 2 : 1;  // the value of digits 1
  const int64_t step = matrix.step(pool.num_threads());

  auto task = [&](int64_t i) {
    const int64_t first = i * step, count = std::min(step, matrix.code_rows - first);
    std::vector<int32_t> found(count * kColumns);
    std::vector<double> wide(sums * count * tokens);  // [sum, row of codes, token]
    for (int64_t c = 0; c < columns; c += kColumns) {
      const int64_t here = std::min<int64_t>(kColumns, columns - c);
      of_columns[here - 1](plan, matrix.codes + first * matrix.bytes, matrix.bytes, count,
                           coefficients + c * kLanes, columns, found.data());
      for (int64_t j = 0; j < here; ++j) {
        const int64_t run = (c + j) / sums, sum = (c + j) % sums, token = run / parts;
        const double worth = run % parts ? a.radix : 1;
        for (int64_t r = 0; r < count; ++r)
          wide[(sum * count + r) * tokens + token] +=
              worth * double(found[r * kColumns + j] - ones * a.totals[run]);
      }
    }
    std::vector<float> z(wide.size());
    for (size_t n = 0; n < z.size(); ++n) z[n] = float(wide[n] * a.unit[n % tokens]);
    const auto [row, rows] = matrix.made_of(first, step);
    std::vector<float> values(rows * tokens);  // [row, token]
    if (matrix.coded()) filter(matrix.code, z.data(), sums, rows, tokens, values.data());
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t m = 0; m < tokens; ++m) {
        float value = 0;
        if (matrix.coded()) {
          value = values[r * tokens + m] * matrix.scale(row + r);
        } else {
          for (int64_t f = 0; f < sums; ++f)
            value += z[(f * count + r) * tokens + m] * matrix.scale(row + r, f);
        }
        y[m * matrix.rows + row + r] = value;
      }
  };
  parallel(pool, (matrix.code_rows + step - 1) / step,
           matrix.code_rows * matrix.bytes * tokens < kSmall, task);
  return ffi::Error::Success();
}

// The trit at a place of count cells of N bytes each, one place in every cell.
template <int N>
void unpack(const uint8_t* __restrict codes, int64_t count, uint16_t power,
            float* __restrict trits) {
  for (int64_t c = 0; c < count; ++c) {
    const uint16_t rest = uint16_t(codes[c * N] * power) & 255;
    trits[c] = float(int16_t(rest * 3 >> 8) - 1);
  }
}

template <size_t... I>
auto unpackers(std::index_sequence<I...>) {
  return std::array{&unpack<int(I) + 1>...};
}

// Weights in float32, parameter p of cell c in column p cells + c: cells come out as they lie.
ffi::Error weights(ffi::ThreadPool& pool, const Matrix& matrix, float* out) {
  const int64_t n = matrix.bases, cells = matrix.bytes / n, width = cells * kDigits,
                step = matrix.step(pool.num_threads());
  static const auto of_bases = unpackers(std::make_index_sequence<kPlanes>());
  std::vector<float> levels(n), zeros(n, 0.f);
  for (int64_t i = 0; i < n; ++i) levels[i] = float(kPowers[n - 1 - i]);
  auto task = [&](int64_t i) {
    const int64_t first = i * step, count = std::min(step, matrix.code_rows - first);
    const auto [row, rows] = matrix.made_of(first, step);
    const Code sum{1, rows, 1, levels.data(), zeros.data()};  // of tied scales
    std::vector<float> z(n * count * kWide), values(rows * kWide);
    for (int64_t p = 0; p < kDigits; ++p)
      for (int64_t cell = 0; cell < cells; cell += kWide) {
        const int64_t wide = std::min<int64_t>(kWide, cells - cell);
        for (int64_t f = 0; f < n; ++f) {
          const int64_t place = p * n + f, at = place / kDigits;
          const uint16_t power = kPowers[place % kDigits];
          for (int64_t r = 0; r < count; ++r) {
            of_bases[n - 1](matrix.codes + (first + r) * matrix.bytes + cell * n + at, wide, power,
                            &z[(f * count + r) * wide]);
          }
        }
        const bool free = !matrix.coded() && !matrix.tied;
        if (!free)
          filter(matrix.coded() ? matrix.code : sum, z.data(), n, rows, wide, values.data());
        for (int64_t r = 0; r < rows; ++r) {
          float* to = out + (row + r) * width + p * cells + cell;
          if (free) {
            std::fill(to, to + wide, 0.f);
            for (int64_t f = 0; f < n; ++f) {
              const float scale = matrix.scale(row + r, f);
              for (int64_t c = 0; c < wide; ++c) to[c] += scale * z[(f * count + r) * wide + c];
            }
          } else {
            const float scale = matrix.scale(row + r);
            for (int64_t c = 0; c < wide; ++c) to[c] = scale * values[r * wide + c];
          }
        }
      }
  };
  parallel(pool, (matrix.code_rows + step - 1) / step, false, task);
  return ffi::Error::Success();
}

Matrix matrix_of(ffi::Buffer<ffi::U8> codes, ffi::AnyBuffer scales, int64_t rows, int64_t bases,
                 bool tied, int64_t period, int64_t length, ffi::Span<const float> taps) {
  const int64_t code_rows = codes.dimensions()[0];
  const int64_t ages = length ? int64_t(taps.size()) / bases - 1 : 0;  // behind the taps: phases
  return {codes.typed_data(),
          code_rows,
          int64_t(codes.element_count()) / code_rows,
          rows,
          int(bases),
          tied,
          {period, length, ages, taps.begin(), taps.begin() + ages * bases},
          scales.untyped_data(),
          scales.element_type(),
          scales.dimensions()[0],
          scales.dimensions()[2]};
}

ffi::Error call_products(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> x, ffi::Buffer<ffi::U8> codes,
                         ffi::AnyBuffer scales, int64_t bases, bool tied, int64_t period,
                         int64_t length, ffi::Span<const float> taps, int64_t parts,
                         ffi::ResultBuffer<ffi::F32> y) {
  const Matrix matrix =
      matrix_of(codes, scales, y->dimensions()[1], bases, tied, period, length, taps);
  return products(pool, x.typed_data(), x.dimensions()[0], x.dimensions()[1], int(parts), matrix,
                  y->typed_data());
}

ffi::Error call_weights(ffi::ThreadPool pool, ffi::Buffer<ffi::U8> codes, ffi::AnyBuffer scales,
                        int64_t bases, bool tied, int64_t period, int64_t length,
                        ffi::Span<const float> taps, ffi::ResultBuffer<ffi::F32> out) {
  return weights(pool,
                 matrix_of(codes, scales, out->dimensions()[0], bases, tied, period, length, taps),
                 out->typed_data());
}

// Binds the arguments of `matrix_of` behind others.
template <typename Binding>
auto with_matrix(Binding binding) {
  return std::move(binding)
      .template Arg<ffi::Buffer<ffi::U8>>()
      .template Arg<ffi::AnyBuffer>()
      .template Attr<int64_t>("bases")
      .template Attr<bool>("tied")
      .template Attr<int64_t>("period")
      .template Attr<int64_t>("length")
      .template Attr<ffi::Span<const float>>("taps");
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    atd_products, call_products,
    with_matrix(ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Arg<ffi::Buffer<ffi::F32>>())
        .Attr<int64_t>("parts")
        .Ret<ffi::Buffer<ffi::F32>>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    atd_weights, call_weights,
    with_matrix(ffi::Ffi::Bind().Ctx<ffi::ThreadPool>()).Ret<ffi::Buffer<ffi::F32>>());
