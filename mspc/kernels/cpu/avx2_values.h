// The part of avx2.cpp for values of 16 and 32 bits.
#pragma once

namespace {

// The two float32 of each lane of 16-bit values; float32 values are one.
template <int64_t kContent>
inline __m256 value(__m256i line, int64_t which) {
  if (kContent == kFloat32) return _mm256_castsi256_ps(line);
  if (kContent == kBfloat16)
    return _mm256_castsi256_ps(which ? _mm256_and_si256(line, _mm256_set1_epi32(int32_t(0xffff0000)))
                                     : _mm256_slli_epi32(line, 16));
  __m256i half = which ? _mm256_srli_epi32(line, 16) : _mm256_and_si256(line, _mm256_set1_epi32(0xffff));
  half = _mm256_permute4x64_epi64(_mm256_packus_epi32(half, half), 0x08);
  return _mm256_cvtph_ps(_mm256_castsi256_si128(half));
}

inline __m256 chosen(const float *four, __m256i choice) {
  return _mm256_permutevar_ps(_mm256_broadcast_ps(reinterpret_cast<const __m128 *>(four)), choice);
}

// The lines of a unit of 32 positions, of which `kTurns` sums of each half take turns.
template <int64_t kStructure, int64_t kContent>
struct Values {
  static constexpr int64_t kOfLine = kContent == kFloat32 ? 1 : 2;  // values of a row
  static constexpr int64_t kLines = kUnit / (kStructure == kTwoFour ? 2 : 1) / kOfLine;
  const uint8_t *lines, *marks;

  Values(const mspc_matrix &m, int64_t block) : marks(m.marks) {
    int64_t of_block = num_positions(m) / kUnit;
    lines = m.kept + (kStructure == kBitmap ? m.starts[block] : block * of_block * kLines * 64);
    if (kStructure != kDense) marks += block * of_block * 64;  // a bit a position, or two bits a kept weight
  }

  inline __m128i next_halfwords(uint32_t mask) {
    __m128i found = _mm_shuffle_epi8(load_half(lines), load_half(kPlaces.halfwords[mask]));
    lines += 2 * __builtin_popcount(mask);
    return found;
  }

  inline __m256i next_words(uint32_t mask) {
    __m256i places = _mm256_cvtepi8_epi32(load_half(kPlaces.first[mask]));  // below 0 where there is none
    __m256i found = _mm256_permutevar8x32_epi32(load(lines), places);
    lines += 4 * __builtin_popcount(mask);
    return _mm256_andnot_si256(_mm256_srai_epi32(places, 31), found);
  }

  template <int64_t kLine>
  inline __m256i half_line(int64_t half) {
    if (kStructure != kBitmap) return load(lines + 64 * kLine + 32 * half);
    if (kContent == kFloat32) return next_words(marks[2 * kLine + half]);
    const uint8_t *mask = marks + 4 * kLine + 2 * half;
    __m128i lower = next_halfwords(mask[0]);
    return _mm256_set_m128i(next_halfwords(mask[1]), lower);
  }

  template <int64_t kLine, int64_t kTokens, int64_t kTurns>
  inline void step(const float *const *x, int64_t position, __m256 (*sums)[kTurns][2]) {
    if constexpr (kLine < kLines) {
      if (kStructure != kBitmap || kLine % 2 == 0) fetch(lines + kNear + 64 * (kStructure == kBitmap ? 0 : kLine));
      __m256i both[2] = {half_line<kLine>(0), half_line<kLine>(1)};
      UNROLLED
      for (int64_t which = 0; which < kOfLine; which++) {
        const int64_t k = kLine * kOfLine + which;
        UNROLLED
        for (int64_t half = 0; half < 2; half++) {
          __m256 weight = value<kContent>(both[half], which);
          __m256i choice = _mm256_setzero_si256();  // the two low bits of each lane choose one of four inputs
          if (kStructure == kTwoFour) choice = _mm256_srli_epi32(load(marks + 32 * half), 8 * (k % 4) + 2 * (k / 4));
          UNROLLED
          for (int64_t t = 0; t < kTokens; t++) {
            const float *from = x[t] + position + (kStructure == kTwoFour ? k / 2 * 4 : k);
            __m256 inputs = kStructure == kTwoFour ? chosen(from, choice) : _mm256_set1_ps(*from);
            sums[t][k % kTurns][half] = _mm256_fmadd_ps(weight, inputs, sums[t][k % kTurns][half]);
          }
        }
      }
      step<kLine + 1, kTokens, kTurns>(x, position, sums);
    }
  }

  template <int64_t kTokens, int64_t kTurns>
  inline void unit(const float *const *x, int64_t position, __m256 (*sums)[kTurns][2]) {
    step<0, kTokens, kTurns>(x, position, sums);
    if (kStructure != kBitmap) lines += 64 * kLines;
    if (kStructure != kDense) fetch(marks + kNear), marks += 64;
  }
};

template <int64_t kStructure, int64_t kContent, int64_t kTokens>
void multiply_values(const mspc_matrix &m, const Inputs &in, int64_t token, int64_t block, const Outputs &out) {
  constexpr int64_t kTurns = kTokens == 1 ? 2 : 1;
  Values<kStructure, kContent> values(m, block);
  const float *x[kTokens];
  __m256 sums[kTokens][kTurns][2];
  UNROLLED
  for (int64_t t = 0; t < kTokens; t++) {
    x[t] = in.x + (token + t) * in.stride;
    UNROLLED
    for (int64_t i = 0; i < kTurns; i++) sums[t][i][0] = sums[t][i][1] = _mm256_setzero_ps();
  }
  for (int64_t position = 0; position < num_positions(m); position += kUnit)
    values.template unit<kTokens, kTurns>(x, position, sums);
  UNROLLED
  for (int64_t half = 0; half < 2 && kTurns == 2; half++)  // of the one token
    sums[0][0][half] = _mm256_add_ps(sums[0][0][half], sums[0][kTurns - 1][half]);
  UNROLLED
  for (int64_t t = 0; t < kTokens; t++) store_halves(m, out, token + t, block, sums[t][0]);
}

}  // namespace
