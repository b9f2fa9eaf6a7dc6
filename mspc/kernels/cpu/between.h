// What a decoder computes between its products, in float32 and for one token: norms, rotations, attention, SwiGLU.
//
// Each instruction set compiles these loops for itself. The order of a sum depends on the set, and on nothing else.
#pragma once
#include "interface.h"

namespace {

constexpr int64_t kTogether = 64;  // keys or values that heads read in turn, so that they stay in the first cache

// e^x to some 1e-7 of its value: e^x = 2^n e^r with |r| <= ln 2 / 2, and eight terms of the series. x beyond the range
// of float32 counts as its end.
inline float exp_of(float x) {
  x = x < -87.0f ? -87.0f : x;
  x = x > 88.0f ? 88.0f : x;
  float shifted = x * 1.44269504f + 12582912.0f;  // to the nearest integer, in the low bits
  float n = shifted - 12582912.0f;
  float r = (x - n * 0.693145751953125f) - n * 1.428606820309417e-6f;
  float sum = 1.98412698e-4f;
  sum = sum * r + 1.38888889e-3f;
  sum = sum * r + 8.33333333e-3f;
  sum = sum * r + 4.16666667e-2f;
  sum = sum * r + 0.166666667f;
  sum = sum * r + 0.5f;
  sum = sum * r + 1.0f;
  sum = sum * r + 1.0f;
  return sum * float_of((bits_of(shifted) - bits_of(12582912.0f) + 127u) << 23);
}

inline float dot(const float *a, const float *b, int64_t count) {
  float sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < count; i++) sum += a[i] * b[i];
  return sum;
}

// out = weight x / sqrt(mean x^2 + eps); out may be x.
void norm(const float *x, const float *weight, int64_t count, float eps, float *out) {
  float scale = 1.0f / __builtin_sqrtf(dot(x, x, count) / float(count) + eps);
#pragma omp simd
  for (int64_t i = 0; i < count; i++) out[i] = x[i] * scale * weight[i];
}

// x += factor y
void add(float *x, const float *y, float factor, int64_t count) {
#pragma omp simd
  for (int64_t i = 0; i < count; i++) x[i] += factor * y[i];
}

// One head (D,) to its place: first halves and second halves turn against each other. cos and sin (D,).
void rotate(const float *head, const float *cos, const float *sin, int64_t dim, float *out) {
  int64_t half = dim / 2;
#pragma omp simd
  for (int64_t i = 0; i < half; i++) {
    float first = head[i], second = head[half + i];
    out[i] = first * cos[i] - second * sin[i];
    out[half + i] = second * cos[half + i] + first * sin[half + i];
  }
}

// silu(gate) up, or gelu(gate) up; out may be either. Both are g / (1 + e^-u): u is g, or sqrt(8 / pi) (g + 0.044715 g^3).
void gate(const float *gates, const float *up, int64_t count, bool is_gelu, float *out) {
  float linear = is_gelu ? 1.5957691216f : 1.0f, cubic = is_gelu ? 1.5957691216f * 0.044715f : 0.0f;
#pragma omp simd
  for (int64_t i = 0; i < count; i++) {
    float g = gates[i], u = g * (linear + cubic * g * g);
    out[i] = g / (1.0f + exp_of(-u)) * up[i];
  }
}

// Products of q (D,) with four keys that follow each other: one alone would wait for its own sum.
inline void dots(const float *q, const float *keys, int64_t dim, float *out) {
  const float *second = keys + dim, *third = second + dim, *fourth = third + dim;
  float a = 0, b = 0, c = 0, d = 0;
#pragma omp simd reduction(+ : a, b, c, d)
  for (int64_t i = 0; i < dim; i++) {
    a += q[i] * keys[i];
    b += q[i] * second[i];
    c += q[i] * third[i];
    d += q[i] * fourth[i];
  }
  out[0] = a, out[1] = b, out[2] = c, out[3] = d;
}

// out (D,) += the weighted sum of four values that follow each other.
inline void add_weighted(const float *weights, const float *values, int64_t dim, float *out) {
  const float *second = values + dim, *third = second + dim, *fourth = third + dim;
  float a = weights[0], b = weights[1], c = weights[2], d = weights[3];
#pragma omp simd
  for (int64_t i = 0; i < dim; i++) out[i] += (a * values[i] + b * second[i]) + (c * third[i] + d * fourth[i]);
}

// Products (tokens,) to e^(scale (x - the largest)), and their sum.
inline float powers(float *weights, int64_t tokens, float scale) {
  float largest = -3.4e38f, total = 0;
#pragma omp simd reduction(max : largest)
  for (int64_t t = 0; t < tokens; t++) {
    weights[t] *= scale;
    largest = weights[t] > largest ? weights[t] : largest;
  }
#pragma omp simd reduction(+ : total)
  for (int64_t t = 0; t < tokens; t++) {
    weights[t] = exp_of(weights[t] - largest);
    total += weights[t];
  }
  return total;
}

// softmax(scale q k^T) v of some heads with the same keys and values (tokens, D): q (heads, D), in place. `weights`
// (heads, length) is for its own use. What lies together is read once from memory, for all heads.
void attend(float *heads, int64_t num_heads, const float *keys, const float *values, int64_t tokens, int64_t dim,
            float scale, float *weights, int64_t length) {
  for (int64_t first = 0; first < tokens; first += kTogether) {
    int64_t last = smaller(first + kTogether, tokens), fours = first + (last - first) / 4 * 4;
    for (int64_t head = 0; head < num_heads; head++) {
      const float *q = heads + head * dim;
      float *of_head = weights + head * length;
      for (int64_t t = first; t < fours; t += 4) dots(q, keys + t * dim, dim, of_head + t);
      for (int64_t t = fours; t < last; t++) of_head[t] = dot(q, keys + t * dim, dim);
    }
  }
  for (int64_t head = 0; head < num_heads; head++) {
    float *of_head = weights + head * length, inverse = 1.0f / powers(of_head, tokens, scale);
    for (int64_t t = 0; t < tokens; t++) of_head[t] *= inverse;
  }
  for (int64_t i = 0; i < num_heads * dim; i++) heads[i] = 0;
  for (int64_t first = 0; first < tokens; first += kTogether) {
    int64_t last = smaller(first + kTogether, tokens), fours = first + (last - first) / 4 * 4;
    for (int64_t head = 0; head < num_heads; head++) {
      const float *of_head = weights + head * length;
      float *out = heads + head * dim;
      for (int64_t t = first; t < fours; t += 4) add_weighted(of_head + t, values + t * dim, dim, out);
      for (int64_t t = fours; t < last; t++) {
#pragma omp simd
        for (int64_t i = 0; i < dim; i++) out[i] += of_head[t] * values[t * dim + i];
      }
    }
  }
}

constexpr Between kBetween = {norm, add, rotate, gate, attend};

}  // namespace
