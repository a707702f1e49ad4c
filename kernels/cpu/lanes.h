// A register of 16-bit lanes in the widest form that the compiler's target has, and the few things
// that products need of it. The last form is plain C++, for every processor, and gives the same
// numbers as the others: -DATD_PORTABLE takes it.
#pragma once
#include <cstdint>
#include <cstring>
#include <utility>

#if !defined(ATD_PORTABLE) && (defined(__AVX512BW__) || defined(__AVX2__))
#include <immintrin.h>
#endif

// load: from any address. load_some: n bytes of it, at most a register, and zeros.
// even, odd: these bytes, each in the upper half of a lane. high: the upper halves of products.
// dot: sums of 32 bits plus products of two neighbours, which wrap around. add: all sums.
// every: the same four bytes in each 32 bits. dot4: sums plus products of four neighbours, bytes of
// a up to 80 without a sign with bytes of b from -127 on.
#if !defined(ATD_PORTABLE) && defined(__AVX512BW__)
constexpr int kWidth = 64;  // bytes
using Lanes = __m512i;
using Sum = __m512i;
inline Lanes load(const void* p) { return _mm512_loadu_si512(p); }
inline Lanes load_some(const void* p, int64_t n) {
  return _mm512_maskz_loadu_epi8(n >= 64 ? ~0ull : (1ull << n) - 1, p);
}
inline Lanes even(Lanes q) { return _mm512_slli_epi16(q, 8); }
inline Lanes odd(Lanes q) { return _mm512_and_si512(q, _mm512_set1_epi16(int16_t(0xff00))); }
inline Lanes high(Lanes a, Lanes b) { return _mm512_mulhi_epu16(a, b); }
inline Sum dot(Sum s, Lanes a, Lanes b) {
#ifdef __AVX512VNNI__
  return _mm512_dpwssd_epi32(s, a, b);
#else
  return _mm512_add_epi32(s, _mm512_madd_epi16(a, b));
#endif
}
inline int32_t add(Sum s) { return _mm512_reduce_add_epi32(s); }
inline Lanes every(int32_t four) { return _mm512_set1_epi32(four); }
inline Sum dot4(Sum s, Lanes a, Lanes b) {
#ifdef __AVX512VNNI__
  return _mm512_dpbusd_epi32(s, a, b);
#else  // two products of 80 and 127 fit into 16 bits
  return _mm512_add_epi32(s, _mm512_madd_epi16(_mm512_maddubs_epi16(a, b), _mm512_set1_epi16(1)));
#endif
}
#elif !defined(ATD_PORTABLE) && defined(__AVX2__)
constexpr int kWidth = 32;
using Lanes = __m256i;
using Sum = __m256i;
inline Lanes load(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
inline Lanes load_some(const void* p, int64_t n) {
  if (n >= kWidth) return load(p);
  uint8_t bytes[kWidth] = {};
  std::memcpy(bytes, p, n);
  return load(bytes);
}
inline Lanes even(Lanes q) { return _mm256_slli_epi16(q, 8); }
inline Lanes odd(Lanes q) { return _mm256_and_si256(q, _mm256_set1_epi16(int16_t(0xff00))); }
inline Lanes high(Lanes a, Lanes b) { return _mm256_mulhi_epu16(a, b); }
inline Sum dot(Sum s, Lanes a, Lanes b) { return _mm256_add_epi32(s, _mm256_madd_epi16(a, b)); }
inline int32_t add(Sum s) {
  uint32_t each[8], total = 0;
  std::memcpy(each, &s, sizeof(s));
  for (uint32_t e : each) total += e;
  return int32_t(total);
}
inline Lanes every(int32_t four) { return _mm256_set1_epi32(four); }
inline Sum dot4(Sum s, Lanes a, Lanes b) {
#ifdef __AVXVNNI__
  return _mm256_dpbusd_avx_epi32(s, a, b);
#else
  return _mm256_add_epi32(s, _mm256_madd_epi16(_mm256_maddubs_epi16(a, b), _mm256_set1_epi16(1)));
#endif
}
#else
constexpr int kWidth = 16;
struct Lanes {
  uint16_t at[8];
};
struct Sum {
  uint32_t at[4];
};
inline Lanes load_some(const void* p, int64_t n) {
  Lanes v = {};
  std::memcpy(&v, p, n < kWidth ? n : kWidth);
  return v;
}
inline Lanes load(const void* p) { return load_some(p, kWidth); }
inline Lanes even(Lanes q) {
  for (uint16_t& lane : q.at) lane = uint16_t(lane << 8);
  return q;
}
inline Lanes odd(Lanes q) {
  for (uint16_t& lane : q.at) lane &= 0xff00;
  return q;
}
inline Lanes high(Lanes a, Lanes b) {
  for (int i = 0; i < 8; ++i) a.at[i] = uint16_t(uint32_t(a.at[i]) * b.at[i] >> 16);
  return a;
}
inline Sum dot(Sum s, Lanes a, Lanes b) {
  for (int i = 0; i < 4; ++i)
    for (int j = 2 * i; j < 2 * i + 2; ++j)
      s.at[i] += uint32_t(int32_t(int16_t(a.at[j])) * int16_t(b.at[j]));
  return s;
}
inline int32_t add(Sum s) { return int32_t(s.at[0] + s.at[1] + s.at[2] + s.at[3]); }
inline Lanes every(int32_t four) {
  Lanes v;
  for (int i = 0; i < 4; ++i) std::memcpy(&v.at[2 * i], &four, sizeof(four));
  return v;
}
inline Sum dot4(Sum s, Lanes a, Lanes b) {
  uint8_t of_a[kWidth];
  int8_t of_b[kWidth];
  std::memcpy(of_a, &a, kWidth);
  std::memcpy(of_b, &b, kWidth);
  for (int i = 0; i < kWidth; ++i) s.at[i / 4] += uint32_t(of_a[i] * of_b[i]);
  return s;
}
#endif

// A register of floats, in the compiler's own arithmetic.
constexpr int kFloats = kWidth / 4;
typedef float Floats __attribute__((vector_size(kWidth)));

template <typename Vector>
inline Vector load_as(const void* p) {
  Vector v;
  std::memcpy(&v, p, sizeof(v));
  return v;
}
template <typename Vector>
inline void store(void* p, Vector v) {
  std::memcpy(p, &v, sizeof(v));
}

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
