// Attention of one new token of each sequence to a cache, with rope.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "floats.h"
#include "threads.h"

struct Heads {
  int64_t batch, heads, kv_heads, head_dim, length, window;
  const float* frequencies;  // [head_dim / 2]
};

// Features of all heads of a token: those of sequence b begin at from + b * stride.
struct Part {
  const float* from;
  int64_t stride;
};

// Keys or values of all places; in 8 bits they are codes, and each place has a scale.
template <typename Element>
struct Places {
  Element* elements;  // [..., length, head_dim]
  float* scales;      // [..., length]; null where there are none

  Places from(int64_t place, int64_t head_dim) const {
    return {elements + place * head_dim, scales ? scales + place : nullptr};
  }
  float scale(int64_t place) const { return scales ? scales[place] : 1.f; }
};

// Writes the features of a head into a place.
template <typename Element>
void write(const float* x, int64_t head_dim, Places<Element> to) {
  for (int64_t i = 0; i < head_dim; ++i) assign(to.elements[i], x[i]);
}

// Rounds x to codes, 127 for the largest of its sizes; halves to even.
inline void write(const float* x, int64_t head_dim, Places<int8_t> to) {
  const float largest = largest_of(x, head_dim), inverse = largest > 0.f ? 127.f / largest : 0.f;
  const float round = 12582912.f;  // 1.5 * 2^23: a sum with it has no fraction
  for (int64_t i = 0; i < head_dim; ++i)
    to.elements[i] = int8_t(bits_as<int32_t>(x[i] * inverse + round) - bits_as<int32_t>(round));
  *to.scales = largest / 127.f;
}

// Turns the pairs (i, i + head_dim / 2) of a head.
inline void turn(const float* x, int64_t head_dim, const float* cos, const float* sin, float* to) {
  const int64_t half = head_dim / 2;
  for (int64_t i = 0; i < half; ++i) {
    to[i] = x[i] * cos[i] - x[i + half] * sin[i];
    to[i + half] = x[i + half] * cos[i] + x[i] * sin[i];
  }
}

// One head of one sequence: softmax(q k') v over places first, ..., last -> mixed [head_dim].
template <typename Element>
void attend_one(const float* q, Places<Element> keys, Places<Element> values, int64_t head_dim,
                int64_t first, int64_t last, float* mixed) {
  thread_local std::vector<float> weights;
  weights.resize(last - first + 1);
  const float scale = 1.f / std::sqrt(float(head_dim));
  float largest = -INFINITY;
  for (int64_t t = first; t <= last; ++t) {
    const Element* k = keys.elements + t * head_dim;
    const float sum = sum_of(head_dim, [&](int64_t i) { return q[i] * float(k[i]); });
    const float score = sum * (scale * keys.scale(t));
    weights[t - first] = score;
    largest = score > largest || score != score ? score : largest;
  }
  for (float& w : weights) w = exp_of(w - largest);
  const float total = sum_of(int64_t(weights.size()), [&](int64_t i) { return weights[i]; });
  std::fill(mixed, mixed + head_dim, 0.f);
  for (int64_t t = first; t <= last; ++t) {
    const Element* v = values.elements + t * head_dim;
    const float w = weights[t - first] * values.scale(t);
    for (int64_t i = 0; i < head_dim; ++i) mixed[i] += w * float(v[i]);
  }
  for (int64_t i = 0; i < head_dim; ++i) mixed[i] /= total;
}

// Writes the new keys and values into their places, and attends: out [batch, heads, head_dim].
template <typename Element>
void attend(ffi::ThreadPool& pool, const Heads& h, Part q, Part k, Part v, const int32_t* positions,
            Places<Element> keys, Places<Element> values, float* out) {
  const int64_t dim = h.head_dim, half = dim / 2;
  std::vector<float> angles(h.batch * dim), turned(dim);  // cos, then sin, of each sequence
  for (int64_t b = 0; b < h.batch; ++b) {
    float *cos = &angles[b * dim], *sin = cos + half;
    for (int64_t i = 0; i < half; ++i) {
      cos[i] = std::cos(float(positions[b]) * h.frequencies[i]);
      sin[i] = std::sin(float(positions[b]) * h.frequencies[i]);
    }
    // As XLA does: a position behind the end is the last place.
    const int64_t place = std::clamp<int64_t>(positions[b], 0, h.length - 1);
    for (int64_t head = 0; head < h.kv_heads; ++head) {
      const int64_t to = (b * h.kv_heads + head) * h.length + place;
      turn(k.from + b * k.stride + head * dim, dim, cos, sin, turned.data());
      write(turned.data(), dim, keys.from(to, dim));
      write(v.from + b * v.stride + head * dim, dim, values.from(to, dim));
    }
  }
  const bool small = h.batch * h.heads * dim * h.length < 1 << 15;
  team.run(pool, h.batch * h.heads, small ? 1 : pool.num_threads(), [&](int64_t i) {
    thread_local std::vector<float> mine;
    const int64_t b = i / h.heads, head = i % h.heads;
    const int64_t of = (b * h.kv_heads + head / (h.heads / h.kv_heads)) * h.length;
    const int64_t last = std::clamp<int64_t>(positions[b], 0, h.length - 1);
    const int64_t first = h.window ? std::max<int64_t>(0, last - h.window + 1) : 0;
    mine.resize(dim);
    turn(q.from + b * q.stride + head * dim, dim, &angles[b * dim], &angles[b * dim + half],
         mine.data());
    attend_one(mine.data(), keys.from(of, dim), values.from(of, dim), dim, first, last,
               out + i * dim);
  });
}
