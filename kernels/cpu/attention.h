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
void attend_one(const float* q, const Element* keys, const Element* values, int64_t head_dim,
                int64_t first, int64_t last, float* mixed) {
  thread_local std::vector<float> weights;
  weights.resize(last - first + 1);
  const float scale = 1.f / std::sqrt(float(head_dim));
  float largest = -INFINITY;
  for (int64_t t = first; t <= last; ++t) {
    const Element* k = keys + t * head_dim;
    const float score = sum_of(head_dim, [&](int64_t i) { return q[i] * float(k[i]); }) * scale;
    weights[t - first] = score;
    largest = score > largest || score != score ? score : largest;
  }
  for (float& w : weights) w = exp_of(w - largest);
  const float total = sum_of(int64_t(weights.size()), [&](int64_t i) { return weights[i]; });
  std::fill(mixed, mixed + head_dim, 0.f);
  for (int64_t t = first; t <= last; ++t) {
    const Element* v = values + t * head_dim;
    const float w = weights[t - first];
    for (int64_t i = 0; i < head_dim; ++i) mixed[i] += w * float(v[i]);
  }
  for (int64_t i = 0; i < head_dim; ++i) mixed[i] /= total;
}

// Writes the new keys and values into their places, and attends: out [batch, heads, head_dim].
template <typename Element>
void attend(ffi::ThreadPool& pool, const Heads& h, Part q, Part k, Part v, const int32_t* positions,
            Element* keys, Element* values, float* out) {
  const int64_t dim = h.head_dim, half = dim / 2, places = h.length * dim;
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
      Element* to = keys + (b * h.kv_heads + head) * places + place * dim;
      turn(k.from + b * k.stride + head * dim, dim, cos, sin, turned.data());
      for (int64_t i = 0; i < dim; ++i) assign(to[i], turned[i]);
      to = values + (b * h.kv_heads + head) * places + place * dim;
      for (int64_t i = 0; i < dim; ++i) assign(to[i], v.from[b * v.stride + head * dim + i]);
    }
  }
  const bool small = h.batch * h.heads * dim * h.length < 1 << 15;
  team.run(pool, h.batch * h.heads, small ? 1 : pool.num_threads(), [&](int64_t i) {
    thread_local std::vector<float> mine;
    const int64_t b = i / h.heads, head = i % h.heads;
    const int64_t of = (b * h.kv_heads + head / (h.heads / h.kv_heads)) * places;
    const int64_t last = std::clamp<int64_t>(positions[b], 0, h.length - 1);
    const int64_t first = h.window ? std::max<int64_t>(0, last - h.window + 1) : 0;
    mine.resize(dim);
    turn(q.from + b * q.stride + head * dim, dim, &angles[b * dim], &angles[b * dim + half],
         mine.data());
    attend_one(mine.data(), keys + of, values + of, dim, first, last, out + i * dim);
  });
}
