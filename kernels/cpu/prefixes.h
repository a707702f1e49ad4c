// How activations become the coefficients of prefixes, so that no trit is isolated.
//
// A byte of codes holds five trits, q = ceil(256 v / 243). In a lane of 16 bits
// (q << 8) * 3^j >> 16 is the number P_j of its first j digits t + 1 in base 3, so digit j is
// P_j - 3 P_(j-1), and a sum over digits is one over these *prefixes*,
//
//     sum_j a_j (t_j + 1) = sum_j (a_j - 3 a_(j+1)) P_j,        a_6 = 0
//
// The difference goes into the activations, once for all rows (`fold`); where a_j = 3 a_(j+1), as
// between the trits of one tied weight, prefix j is not needed. Activations are integers of one or
// two parts, so that coefficients have 16 bits. Their products add up in 32 bits, which wrap
// around: only the last value must fit, and it does up to 65,536 inputs. Integers make results
// independent of the order of sums, of the number of threads and of the width of registers.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include "floats.h"

constexpr int kDigits = 5;  // trits per byte
constexpr int kBlock = 64;  // bytes of a row whose coefficients lie together
constexpr int kLanes = 32;  // lanes of the even bytes of a block, and of its odd ones
constexpr int kPowers[] = {1, 3, 9, 27, 81, 243};

// A prefix of the byte at some position of a cell: the coefficient of sum `sum` is `factor` times
// an activation of the cell, less `next_factor` times another one in that of sum `next_sum`.
struct Prefix {
  int digits, parameter, factor, sum, next_parameter, next_factor, next_sum;
};

struct Plan {
  int bases, sums, slots = 0, period, limit;  // slots: prefixes of a byte; limit: of activations
  std::vector<std::vector<Prefix>> prefixes;  // of each position of a cell
  std::vector<uint16_t> powers;               // [period of blocks, even or odd, slot, lane]

  Plan(int n, bool tied) : bases(n), sums(tied ? 1 : n), period(kBlock % n ? n : 1), prefixes(n) {
    int largest = 1;
    for (int at = 0; at < n; ++at) {
      auto parameter = [&](int digit) { return (at * kDigits + digit - 1) / n; };
      auto base = [&](int digit) { return (at * kDigits + digit - 1) % n; };
      auto factor = [&](int digit) { return tied ? kPowers[n - 1 - base(digit)] : 1; };
      auto sum = [&](int digit) { return tied ? 0 : base(digit); };
      for (int digit = 1; digit <= kDigits; ++digit) {
        const bool last = digit == kDigits;
        if (tied && !last && parameter(digit + 1) == parameter(digit)) continue;
        prefixes[at].push_back({digit, parameter(digit), factor(digit), sum(digit), 0, 0, 0});
      }
      // Behind a prefix of j digits comes one of j' > j: its digits j + 1, ..., j' are one
      // weight's, or one digit, and take 3^(j' - j) of the prefix with them.
      auto& mine = prefixes[at];
      for (size_t i = 0; i + 1 < mine.size(); ++i) {
        const Prefix& next = mine[i + 1];
        mine[i].next_factor = next.factor * kPowers[next.digits - mine[i].digits];
        mine[i].next_parameter = next.parameter;
        mine[i].next_sum = next.sum;
      }
      for (const Prefix& p : mine)
        largest = std::max(largest, p.sum == p.next_sum ? p.factor + p.next_factor
                                                        : std::max(p.factor, p.next_factor));
      slots = std::max<int>(slots, mine.size());
    }
    limit = 32767 / largest;
    powers.assign(int64_t(period) * 2 * slots * kLanes, 0);
    for (int byte = 0; byte < period * kBlock; ++byte)
      for (size_t s = 0; s < prefixes[byte % n].size(); ++s)
        powers[((byte / kBlock * 2 + byte % 2) * slots + s) * kLanes + byte % kBlock / 2] =
            kPowers[prefixes[byte % n][s].digits];
  }

  // Coefficients of a block: [even or odd, slot, column, lane].
  int64_t block(int64_t columns) const { return int64_t(2) * slots * columns * kLanes; }
};

// The plan of weights with n bases, made once: up to 8, and 4 tied ones.
inline const Plan& plan_of(int n, bool tied) {
  static const auto plans = [] {
    std::vector<Plan> made;
    for (int i = 1; i <= 8; ++i) made.emplace_back(i, false);
    for (int i = 1; i <= 4; ++i) made.emplace_back(i, true);
    return made;
  }();
  return plans[n - 1 + (tied ? 8 : 0)];
}

// Activations as integers: a token has `parts` runs of int32 [inputs], the lower first, in units of
// unit[token]; the upper part is worth `radix` of the lower.
struct Integers {
  int64_t inputs, radix;  // inputs are padded to whole cells
  std::vector<int32_t> values;
  std::vector<int64_t> totals;  // of each run
  std::vector<double> unit;     // NaN for a token that is not finite
};

// The sum of at most 65,536 numbers of 15 bits.
template <typename Integer>
inline int32_t total_of(const Integer* a, int64_t count) {
  int32_t total = 0;
  for (int64_t k = 0; k < count; ++k) total += a[k];
  return total;
}

inline void to_integers(const Plan& plan, const float* x, int64_t tokens, int64_t inputs, int parts,
                        Integers& to) {
  to.inputs = (inputs + kDigits - 1) / kDigits * kDigits;
  to.radix = 2 * plan.limit + 1;
  to.values.assign(tokens * parts * to.inputs, 0);
  to.totals.clear();
  to.unit.clear();
  const double most = parts == 1 ? plan.limit : double(plan.limit) * to.radix + plan.limit;
  const double round = 6755399441055744.;  // 1.5 * 2^52: a sum with it has no fraction
  for (int64_t m = 0; m < tokens; ++m, x += inputs) {
    const float largest = largest_of(x, inputs);
    const bool finite = std::isfinite(largest);
    const double size = largest > 0 ? largest : 1, per_unit = most / size, step = 1. / to.radix;
    to.unit.push_back(finite ? size / most : NAN);
    int32_t* low = &to.values[m * parts * to.inputs];
    int32_t* upper = low + to.inputs;
    if (finite && parts == 1)
      for (int64_t k = 0; k < inputs; ++k) low[k] = int32_t((x[k] * per_unit + round) - round);
    if (finite && parts == 2)
      for (int64_t k = 0; k < inputs; ++k) {
        const double whole = (x[k] * per_unit + round) - round;
        const double above = (whole * step + round) - round;
        low[k] = int32_t(whole - above * to.radix);
        upper[k] = int32_t(above);
      }
    for (int h = 0; h < parts; ++h, low += to.inputs) to.totals.push_back(total_of(low, inputs));
  }
}

// Rounds a token to 8 bits, round(127 x / max(largest |x|, 1e-5)), and returns what one is worth:
// NaN, and zeros, where x is not finite. As `atd.kernels.packed.rounded` does.
template <typename Integer>
inline double to_bytes(const float* x, int64_t inputs, Integer* to) {
  const float largest = largest_of(x, inputs);
  const bool finite = std::isfinite(largest);
  const float scale = finite ? 127.f / std::max(largest, 1e-5f) : 0.f;
  for (int64_t k = 0; k < inputs; ++k) to[k] = finite ? Integer(std::rint(x[k] * scale)) : 0;
  return finite ? 1. / scale : NAN;
}

// Tokens, of one part.
inline void to_bytes(const float* x, int64_t tokens, int64_t inputs, Integers& to) {
  to.inputs = (inputs + kDigits - 1) / kDigits * kDigits;
  to.values.assign(tokens * to.inputs, 0);
  to.totals.assign(tokens, 0);
  to.unit.resize(tokens);
  for (int64_t m = 0; m < tokens; ++m) {
    int32_t* mine = &to.values[m * to.inputs];
    to.unit[m] = to_bytes(x + m * inputs, inputs, mine);
    to.totals[m] = total_of(mine, inputs);
  }
}

// Integers of one run to the coefficients of its sums, which are columns first, first + 1, ... of
// out [block, even or odd, slot, column, lane].
inline void fold(const Plan& plan, const int32_t* a, int64_t cells, int64_t columns, int64_t first,
                 int16_t* out) {
  for (int at = 0; at < plan.bases; ++at)
    for (size_t s = 0; s < plan.prefixes[at].size(); ++s) {
      const Prefix& p = plan.prefixes[at][s];
      for (int64_t cell = 0; cell < cells; ++cell) {
        const int64_t byte = cell * plan.bases + at;
        const int64_t slot = (byte / kBlock * 2 + byte % 2) * plan.slots + int64_t(s);
        int16_t* to = out + (slot * columns + first) * kLanes + byte % kBlock / 2;
        to[p.sum * kLanes] += int16_t(p.factor * a[cell * kDigits + p.parameter]);
        to[p.next_sum * kLanes] -= int16_t(p.next_factor * a[cell * kDigits + p.next_parameter]);
      }
    }
}
