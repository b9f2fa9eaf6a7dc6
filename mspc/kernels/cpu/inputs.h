// Inputs in the order of positions: float32 for values, one or two planes of int8 for codes.
#pragma once
#include "interface.h"

namespace {

inline void load_inputs(const void *x, int64_t is_bfloat16, int64_t first, int64_t count, float *out) {
  if (is_bfloat16) {
    const uint16_t *from = static_cast<const uint16_t *>(x) + first;
#pragma omp simd
    for (int64_t i = 0; i < count; i++) out[i] = from_bfloat16(from[i]);
  } else {
    const float *from = static_cast<const float *>(x) + first;
#pragma omp simd
    for (int64_t i = 0; i < count; i++) out[i] = from[i];
  }
}

// One chunk to integers and their sum. A chunk that holds no finite largest value gets the scale NaN.
inline float quantize_chunk(const float *values, int64_t count, int64_t planes, int8_t *high, int8_t *low,
                            int32_t *sum) {
  float largest = 0;
  uint32_t special = 0;
#pragma omp simd reduction(max : largest) reduction(| : special)
  for (int64_t i = 0; i < count; i++) {
    float size = float_of(bits_of(values[i]) & 0x7fffffff);
    largest = size > largest ? size : largest;
    special |= (bits_of(values[i]) & 0x7f800000) == 0x7f800000;
  }
  float most = planes == 2 ? 32639.0f : 127.0f;  // 127 * 256 + 127
  float inverse = largest > 1e-33f && !special ? most / largest : 0.0f;
  int32_t integers[kChunk];
  int32_t total = 0;
#pragma omp simd reduction(+ : total)
  for (int64_t i = 0; i < count; i++) {
    float scaled = special ? 0.0f : values[i] * inverse;
    int32_t integer = int32_t(bits_of(scaled + 12582912.0f) & 0x7fffff) - 0x400000;  // to the nearest, ties to even
    total += integer;
    integers[i] = integer;
  }
  if (planes == 2) {
#pragma omp simd
    for (int64_t i = 0; i < count; i++) {
      int32_t upper = (integers[i] + 128) >> 8;
      high[i] = int8_t(upper);
      low[i] = int8_t(integers[i] - upper * 256);
    }
  } else {
    for (int64_t i = 0; i < count; i++) high[i] = int8_t(integers[i]);
  }
  *sum = total;
  return special ? float_of(0x7fc00000) : inverse == 0 ? 0.0f : largest / most;
}

// Prepare one token. The memory of `inputs` is zero where there is padding.
void prepare(const mspc_matrix &m, const void *x, int64_t is_bfloat16, int64_t token, int64_t planes,
             Inputs *inputs) {
  if (!has_codes(m)) {
    load_inputs(x, is_bfloat16, token * m.columns, m.columns, const_cast<float *>(inputs->x) + token * inputs->stride);
    return;
  }
  int64_t padded = padded_group(m), at = token * num_chunks(m);
  float values[kChunk];
  for (int64_t group = 0; group < num_groups(m); group++) {
    for (int64_t first = 0; first < padded; first += kChunk, at++) {
      int64_t count = smaller(kChunk, m.group - first), position = token * inputs->stride + group * padded + first;
      load_inputs(x, is_bfloat16, token * m.columns + group * m.group + first, count, values);
      int8_t *high = const_cast<int8_t *>(inputs->high) + position;
      int8_t *low = const_cast<int8_t *>(inputs->low) + position;
      const_cast<float *>(inputs->scales)[at] =
          quantize_chunk(values, count, planes, high, low, const_cast<int32_t *>(inputs->sums) + at);
    }
  }
}

}  // namespace
