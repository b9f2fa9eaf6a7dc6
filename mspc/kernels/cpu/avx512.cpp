// Products with AVX-512: VBMI2 expands bitmaps, VNNI multiplies codes. A lane of 32 bits is a row.
#include <immintrin.h>

#include "between.h"
#include "inputs.h"

namespace {

constexpr int64_t kNear = 2048, kFar = 4096;  // bytes to fetch ahead: of lines, of bytes behind bitmaps
constexpr bool kPlanesApart = true;

inline void fetch(const void *from) { _mm_prefetch(static_cast<const char *>(from), _MM_HINT_NTA); }

// Codes of one field of a line. With kInPlace, upper halves of bytes stay where they are: codes times 16.
template <int64_t kBits, int64_t kStep, bool kInPlace = false>
inline __m512i field(__m512i line) {
  constexpr int64_t shift = kStep % kFields<kBits> * kField<kBits>;
  if (kBits == 8) return line;
  if (kInPlace) return _mm512_and_si512(line, _mm512_set1_epi8(int8_t(shift ? 0xf0 : 0x0f)));
  __m512i shifted = shift ? _mm512_srli_epi16(line, shift) : line;
  return _mm512_and_si512(shifted, _mm512_set1_epi8((1 << kField<kBits>) - 1));
}

// The codes of step kStep of four steps, whose lines are at `lines`.
template <int64_t kBits, int64_t kStep, bool kInPlace = false>
inline __m512i codes_of(const uint8_t *lines) {
  __m512i codes = field<kBits, kStep, kInPlace>(_mm512_loadu_si512(lines + kStep / kFields<kBits> * 64));
  if (kBits != 3) return codes;
  uint64_t high;
  __builtin_memcpy(&high, lines + 64 + 8 * kStep, 8);
  return _mm512_or_si512(codes, _mm512_maskz_mov_epi8(high, _mm512_set1_epi8(4)));
}

// Sums of one token: integers of the high plane, or the only one, and of the low plane; and of kept inputs at 2:4.
// Successive steps add to different sums in turn, as one sum would wait for itself. With kInPlace, those of odd steps are
// 16 times as large.
template <int64_t kPlanes, bool kOfKept, int64_t kTurns, bool kInPlace>
struct Sums {
  __m512i of[kTurns][kPlanes], kept[kOfKept ? kTurns : 1][kPlanes];

  static constexpr int64_t kOfTurns = kTurns;
  static constexpr bool kHasHalves = kInPlace;

  inline void clear() {
    UNROLLED
    for (int64_t p = 0; p < kPlanes; p++) {
      UNROLLED
      for (int64_t i = 0; i < kTurns; i++) of[i][p] = _mm512_setzero_si512();
      UNROLLED
      for (int64_t i = 0; i < (kOfKept ? kTurns : 1); i++) kept[i][p] = _mm512_setzero_si512();
    }
  }
  static inline __m512i together(const __m512i (*turns)[kPlanes]) {
    __m512i high = turns[0][0], low = turns[0][kPlanes - 1];
    UNROLLED
    for (int64_t i = 1; i < kTurns; i++) {
      high = _mm512_add_epi32(high, kInPlace ? _mm512_srai_epi32(turns[i][0], 4) : turns[i][0]);
      low = _mm512_add_epi32(low, kInPlace ? _mm512_srai_epi32(turns[i][kPlanes - 1], 4) : turns[i][kPlanes - 1]);
    }
    return kPlanes == 1 ? high : _mm512_add_epi32(_mm512_slli_epi32(high, 8), low);
  }
  // The sum of (code - zero) x.
  inline __m512i total(__m512i zeros, int32_t sum_of_inputs) const {
    __m512i inputs = kOfKept ? together(kept) : _mm512_set1_epi32(sum_of_inputs);
    return _mm512_sub_epi32(together(of), _mm512_mullo_epi32(zeros, inputs));
  }
};

// The planes of some tokens at a position.
template <int64_t kTokens, int64_t kPlanes>
struct Planes {
  const int8_t *of[kPlanes][kTokens];

  Planes(const Inputs &in, int64_t first_token) {
    UNROLLED
    for (int64_t t = 0; t < kTokens; t++) {
      of[0][t] = in.high + (first_token + t) * in.stride;
      if (kPlanes == 2) of[kPlanes - 1][t] = in.low + (first_token + t) * in.stride;
    }
  }
};

struct Four {
  int8_t of[4];
};

inline __m512i sixteen_inputs(const int8_t *x) {
  return _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i *>(x)));
}

// Add the products of the codes of a step, one for every position, with the inputs of all tokens. Compilers would load
// inputs in an instruction of its own.
template <int64_t kStep, int64_t kTokens, int64_t kPlanes, class Sums>
inline void add_products(__m512i codes, const Planes<kTokens, kPlanes> &x, int64_t position, Sums *sums) {
  UNROLLED
  for (int64_t t = 0; t < kTokens; t++) {
    UNROLLED
    for (int64_t p = 0; p < kPlanes; p++) {
      __m512i &of = sums[t].of[kStep % Sums::kOfTurns][p];
      const Four &four = *reinterpret_cast<const Four *>(x.of[p][t] + position + 4 * kStep);
      __asm__("vpdpbusd %2%{1to16%}, %1, %0" : "+v"(of) : "v"(codes), "m"(four));
    }
  }
}

// A stream of dense lines, four steps at a time.
template <int64_t kBits>
struct DenseLines {
  static constexpr bool kOfKept = false, kHasHalves = kBits == 4;
  const uint8_t *lines;

  DenseLines(const mspc_matrix &m, int64_t block) : lines(m.kept + block * num_positions(m) * 2 * kBits) {}
  inline void set_zeros(__m512i) {}

  template <int64_t kStep, int64_t kTokens, int64_t kPlanes, class Sums>
  inline void step(const Planes<kTokens, kPlanes> &x, int64_t position, Sums *sums) {
    __m512i codes = codes_of<kBits, kStep % 4, Sums::kHasHalves>(lines + kStep / 4 * 32 * kBits);
    add_products<kStep>(codes, x, position, sums);
  }

  template <int64_t kTokens, int64_t kPlanes, class Sums>
  inline void unit(const Planes<kTokens, kPlanes> &x, int64_t position, Sums *sums) {
    for (int64_t i = 0; i < kBits; i++) fetch(lines + kNear + 64 * i);
    step<0>(x, position, sums), step<1>(x, position, sums), step<2>(x, position, sums), step<3>(x, position, sums);
    step<4>(x, position, sums), step<5>(x, position, sums), step<6>(x, position, sums), step<7>(x, position, sums);
    lines += 64 * kBits;
  }
};

// 2:4: two bits choose one of four inputs, within blocks of 16 that every 128-bit lane of x holds.
template <int64_t kBits>
struct TwoFourLines {
  static constexpr bool kOfKept = true, kHasHalves = false;
  const uint8_t *lines, *places;

  TwoFourLines(const mspc_matrix &m, int64_t block)
      : lines(m.kept + block * num_positions(m) * kBits), places(m.marks + block * num_positions(m) * 2) {}
  inline void set_zeros(__m512i) {}

  template <int64_t kStep, int64_t kTokens, int64_t kPlanes, class Sums>
  inline void step(__m512i of_unit, const Planes<kTokens, kPlanes> &x, int64_t position, Sums *sums) {
    __m512i shifted = kStep ? _mm512_srli_epi16(of_unit, 2 * kStep) : of_unit;
    __m512i block = _mm512_set1_epi32(kStep % 2 ? 0x0c0c0808 : 0x04040000);
    __m512i from = _mm512_ternarylogic_epi32(shifted, _mm512_set1_epi8(3), block, 0xea);  // (a & b) | c
    __m512i codes = codes_of<kBits, kStep>(lines);
    UNROLLED
    for (int64_t t = 0; t < kTokens; t++) {
      UNROLLED
      for (int64_t p = 0; p < kPlanes; p++) {
        __m512i chosen = _mm512_shuffle_epi8(sixteen_inputs(x.of[p][t] + position + kStep / 2 * 16), from);
        __m512i &of = sums[t].of[kStep % Sums::kOfTurns][p], &kept = sums[t].kept[kStep % Sums::kOfTurns][p];
        of = _mm512_dpbusd_epi32(of, codes, chosen);
        kept = _mm512_dpbusd_epi32(kept, _mm512_set1_epi8(1), chosen);
      }
    }
  }

  template <int64_t kTokens, int64_t kPlanes, class Sums>
  inline void unit(const Planes<kTokens, kPlanes> &x, int64_t position, Sums *sums) {
    for (int64_t i = 0; i < kBits; i += 2) fetch(lines + kNear + 32 * i);
    fetch(places + kNear);
    __m512i of_unit = _mm512_loadu_si512(places);
    step<0>(of_unit, x, position, sums), step<1>(of_unit, x, position, sums);
    step<2>(of_unit, x, position, sums), step<3>(of_unit, x, position, sums);
    lines += 32 * kBits;
    places += 64;
  }
};

// Behind a bitmap: absent bytes of the dense lines hold the code of zero in all fields.
template <int64_t kBits>
struct Expanded {
  static constexpr bool kOfKept = false, kHasHalves = kBits == 4;
  const uint8_t *stream, *masks;
  __m512i zeros;

  Expanded(const mspc_matrix &m, int64_t block)
      : stream(m.kept + m.starts[block]), masks(m.marks + block * num_positions(m) * kBits / 4) {}
  inline void set_zeros(__m512i of_rows) {
    constexpr int32_t repeat = kBits == 8 ? 0x01010101 : kBits == 4 ? 0x11111111 : 0x55555555;
    zeros = _mm512_mullo_epi32(of_rows, _mm512_set1_epi32(repeat));
  }

  // The steps of a line, which are number kFirst and so on of their unit.
  template <int64_t kFirst, int64_t kTokens, int64_t kPlanes, class Sums>
  inline void line(const Planes<kTokens, kPlanes> &x, int64_t position, Sums *sums) {
    constexpr int64_t kSteps = kFields<kBits>;
    uint64_t mask;
    __builtin_memcpy(&mask, masks + 8 * (kFirst / kSteps), 8);
    fetch(stream + kFar);
    __m512i bytes = _mm512_mask_expand_epi8(zeros, mask, _mm512_loadu_si512(stream));
    stream += __builtin_popcountll(mask);
    add_products<kFirst>(field<kBits, 0, Sums::kHasHalves>(bytes), x, position, sums);
    if constexpr (kSteps > 1) add_products<kFirst + 1>(field<kBits, 1, Sums::kHasHalves>(bytes), x, position, sums);
    if constexpr (kSteps > 2) add_products<kFirst + 2>(field<kBits, 2>(bytes), x, position, sums);
    if constexpr (kSteps > 2) add_products<kFirst + 3>(field<kBits, 3>(bytes), x, position, sums);
    if constexpr (kFirst + kSteps < 8) line<kFirst + kSteps>(x, position, sums);
  }

  template <int64_t kTokens, int64_t kPlanes, class Sums>
  inline void unit(const Planes<kTokens, kPlanes> &x, int64_t position, Sums *sums) {
    fetch(masks + kFar);
    line<0>(x, position, sums);
    masks += 8 * kBits;
  }
};

template <class Lines, int64_t kTokens, int64_t kPlanes>
void multiply_codes(const mspc_matrix &m, const Inputs &in, int64_t token, int64_t block, const Outputs &out) {
  Lines lines(m, block);
  Planes<kTokens, kPlanes> x(in, token);
  __m512 y[kTokens];
  UNROLLED
  for (int64_t t = 0; t < kTokens; t++) y[t] = _mm512_setzero_ps();
  int64_t groups = num_groups(m), padded = padded_group(m), chunks = num_chunks(m), chunk = token * chunks;
  __m512i zeros = _mm512_set1_epi32(1 << (m.content - 1));
  for (int64_t group = 0, position = 0; group < groups; group++) {
    int64_t grid = (block * groups + group) * kRows;
    __m512 scales = _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i *>(m.scales + grid)));
    if (m.zeros) zeros = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i *>(m.zeros + grid)));
    lines.set_zeros(zeros);
    for (int64_t first = 0; first < padded; first += kChunk, chunk++) {
      Sums<kPlanes, Lines::kOfKept, kTokens == 1 ? 2 : 1, kTokens == 1 && Lines::kHasHalves> sums[kTokens];
      UNROLLED
      for (int64_t t = 0; t < kTokens; t++) sums[t].clear();
      for (int64_t last = position + smaller(kChunk, padded - first); position < last; position += kUnit)
        lines.unit(x, position, sums);
      UNROLLED
      for (int64_t t = 0; t < kTokens; t++) {
        int64_t at = chunk + t * chunks;
        __m512 total = _mm512_cvtepi32_ps(sums[t].total(zeros, in.sums[at]));
        y[t] = _mm512_fmadd_ps(scales, _mm512_mul_ps(_mm512_set1_ps(in.scales[at]), total), y[t]);
      }
    }
  }
  UNROLLED
  for (int64_t t = 0; t < kTokens; t++) {
    alignas(64) float rows[kRows];
    _mm512_store_ps(rows, y[t]);
    store(m, out, token + t, block, rows);
  }
}

// The two float32 of each lane of 16-bit values; float32 values are one.
template <int64_t kContent>
inline __m512 value(__m512i line, int64_t which) {
  if (kContent == kFloat32) return _mm512_castsi512_ps(line);
  if (kContent == kBfloat16)
    return _mm512_castsi512_ps(which ? _mm512_and_si512(line, _mm512_set1_epi32(int32_t(0xffff0000)))
                                     : _mm512_slli_epi32(line, 16));
  return _mm512_cvtph_ps(_mm512_cvtepi32_epi16(which ? _mm512_srli_epi32(line, 16) : line));
}

// Call visit(line, its number in the unit) for every line of a unit of 32 positions.
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

  template <int64_t kLine>
  inline __m512i line() {
    if (kStructure != kBitmap) return _mm512_loadu_si512(lines + 64 * kLine);
    if (kContent == kFloat32) {
      uint16_t mask;
      __builtin_memcpy(&mask, marks + 2 * kLine, 2);
      __m512i found = _mm512_maskz_expand_epi32(mask, _mm512_loadu_si512(lines));
      lines += 4 * __builtin_popcount(mask);
      return found;
    }
    uint32_t mask;
    __builtin_memcpy(&mask, marks + 4 * kLine, 4);
    __m512i found = _mm512_maskz_expand_epi16(mask, _mm512_loadu_si512(lines));
    lines += 2 * __builtin_popcount(mask);
    return found;
  }

  template <int64_t kLine, int64_t kTokens>
  inline void step(const float *const *x, int64_t position, __m512i places, __m512 (*sums)[2]) {
    if constexpr (kLine < kLines) {
      if (kStructure != kBitmap || kLine % 2 == 0) fetch(lines + kNear + 64 * (kStructure == kBitmap ? 0 : kLine));
      __m512i both = line<kLine>();
      UNROLLED
      for (int64_t which = 0; which < kOfLine; which++) {
        __m512 weight = value<kContent>(both, which);
        const int64_t k = kLine * kOfLine + which;
        UNROLLED
        for (int64_t t = 0; t < kTokens; t++) {
          __m512 inputs;
          if (kStructure == kTwoFour) {
            // The two low bits of each lane choose one of four inputs.
            __m512i choice = _mm512_srli_epi32(places, uint32_t(8 * (k % 4) + 2 * (k / 4)));
            inputs = _mm512_broadcast_f32x4(_mm_loadu_ps(x[t] + position + k / 2 * 4));
            inputs = _mm512_permutevar_ps(inputs, choice);
          } else {
            inputs = _mm512_set1_ps(x[t][position + k]);
          }
          sums[t][k % 2] = _mm512_fmadd_ps(weight, inputs, sums[t][k % 2]);
        }
      }
      step<kLine + 1, kTokens>(x, position, places, sums);
    }
  }

  template <int64_t kTokens>
  inline void unit(const float *const *x, int64_t position, __m512 (*sums)[2]) {
    __m512i places = kStructure == kTwoFour ? _mm512_loadu_si512(marks) : _mm512_setzero_si512();
    step<0, kTokens>(x, position, places, sums);
    if (kStructure != kBitmap) lines += 64 * kLines;
    if (kStructure != kDense) fetch(marks + kNear), marks += 64;
  }
};

template <int64_t kStructure, int64_t kContent, int64_t kTokens>
void multiply_values(const mspc_matrix &m, const Inputs &in, int64_t token, int64_t block, const Outputs &out) {
  Values<kStructure, kContent> values(m, block);
  const float *x[kTokens];
  __m512 sums[kTokens][2];
  UNROLLED
  for (int64_t t = 0; t < kTokens; t++) {
    x[t] = in.x + (token + t) * in.stride;
    sums[t][0] = sums[t][1] = _mm512_setzero_ps();
  }
  for (int64_t position = 0; position < num_positions(m); position += kUnit)
    values.template unit<kTokens>(x, position, sums);
  UNROLLED
  for (int64_t t = 0; t < kTokens; t++) {
    alignas(64) float rows[kRows];
    _mm512_store_ps(rows, _mm512_add_ps(sums[t][0], sums[t][1]));
    store(m, out, token + t, block, rows);
  }
}

}  // namespace

#include "choose.h"

extern const Kernels avx512_kernels;
const Kernels avx512_kernels = {prepare, product, kBetween};
