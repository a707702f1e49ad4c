// Numbers in 16 bits, exp, and sums: the same with registers of any width.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "xla/ffi/api/ffi.h"

template <typename To, typename From>
inline To bits_as(From from) {
  To to;
  static_assert(sizeof(to) == sizeof(from), "of one size");
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

struct BFloat16 {
  uint16_t bits;
  operator float() const { return bits_as<float>(uint32_t(bits) << 16); }
  static BFloat16 of(float x) {
    const uint32_t b = bits_as<uint32_t>(x);
    if (x != x) return {uint16_t(b >> 16 | 64)};
    return {uint16_t((b + 0x7fff + (b >> 16 & 1)) >> 16)};  // to the nearest, halves to even
  }
};

struct Float16 {
  uint16_t bits;
#ifdef __FLT16_MANT_DIG__
  operator float() const { return float(bits_as<_Float16>(bits)); }
  static Float16 of(float x) { return {bits_as<uint16_t>(_Float16(x))}; }
#else
  operator float() const {
    const uint32_t exponent = bits >> 10 & 31, mantissa = bits & 1023;
    const float sign = bits >> 15 ? -1.f : 1.f;
    if (exponent == 0) return sign * std::ldexp(float(mantissa), -24);
    if (exponent == 31) return mantissa ? NAN : sign * INFINITY;
    return sign * std::ldexp(float(mantissa | 1024), int(exponent) - 25);
  }
  static Float16 of(float x) {
    const uint32_t b = bits_as<uint32_t>(x), sign = b >> 16 & 0x8000, size = b & 0x7fffffff;
    if (size > 0x7f800000) return {uint16_t(sign | 0x7e00)};
    if (size >= 0x477ff000) return {uint16_t(sign | 0x7c00)};
    // Adding makes the bits that 16 bits don't hold fall off, rounded to even.
    const int exponent = std::max(int(size >> 23), 113);
    const float unit = bits_as<float>(uint32_t(exponent + 13) << 23);
    const uint32_t kept = bits_as<uint32_t>(bits_as<float>(size) + unit) - bits_as<uint32_t>(unit);
    return {uint16_t(sign | ((exponent - 113) << 10) + kept)};
  }
#endif
};

// exp(x), to 2 units in the last place; 88 and more give exp(88), -87 and less exp(-87).
inline float exp_of(float x) {
  x = x > 88.f ? 88.f : x;
  x = x < -87.f ? -87.f : x;
  const float round = 12582912.f;  // 1.5 * 2^23: a sum with it has no fraction
  const float shifted = x * 1.44269504f + round, n = shifted - round;
  const float r = (x - n * 0.693359375f) - n * -2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.f;
  const int32_t whole = bits_as<int32_t>(shifted) - bits_as<int32_t>(round);
  return p * bits_as<float>((whole + 127) << 23);
}

inline float silu(float x) { return x / (1.f + exp_of(-x)); }

// The largest |x|; NaN where one is, and infinite where one is.
inline float largest_of(const float* x, int64_t count) {
  uint32_t bits = 0;  // numbers without a sign are in the order of their bits
  for (int64_t i = 0; i < count; ++i) bits = std::max(bits, bits_as<uint32_t>(x[i]) & 0x7fffffff);
  return bits_as<float>(bits);
}

// Sums of 16 interleaved parts, joined in one order.
template <typename Term>
inline float sum_of(int64_t count, Term term) {
  float parts[16] = {};
  int64_t i = 0;
  for (; i + 16 <= count; i += 16)
    for (int j = 0; j < 16; ++j) parts[j] += term(i + j);
  for (; i < count; ++i) parts[i % 16] += term(i);
  for (int width = 8; width > 0; width /= 2)
    for (int j = 0; j < width; ++j) parts[j] += parts[j + width];
  return parts[0];
}

// Calls body(pointer) with the type of the elements.
template <typename Pointer, typename Body>
inline void with_type(xla::ffi::DataType type, Pointer* p, Body body) {
  constexpr bool fixed = std::is_const_v<Pointer>;
  if (type == xla::ffi::F32) return body((std::conditional_t<fixed, const float, float>*)(p));
  if (type == xla::ffi::F16) return body((std::conditional_t<fixed, const Float16, Float16>*)(p));
  body((std::conditional_t<fixed, const BFloat16, BFloat16>*)(p));
}

inline void assign(float& to, float x) { to = x; }
inline void assign(BFloat16& to, float x) { to = BFloat16::of(x); }
inline void assign(Float16& to, float x) { to = Float16::of(x); }
