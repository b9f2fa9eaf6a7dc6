// Products with AVX2. A lane of 32 bits is a row; the halves of a line are rows 0 to 7 and 8 to 15.
//
// Codes and inputs meet as integers of 16 bits, two at a time: `even` are slots 0 and 2 of a row, `odd` 1 and 3.
#include <immintrin.h>

#include "between.h"
#include "inputs.h"
#include "places.h"

namespace {

constexpr int64_t kNear = 2048, kFar = 16384;  // bytes to fetch ahead: of lines, of streams behind bitmaps
constexpr bool kPlanesApart = false;           // `integers` holds both planes

inline void fetch(const void *from) { _mm_prefetch(static_cast<const char *>(from), _MM_HINT_NTA); }
inline __m256i load(const void *from) { return _mm256_loadu_si256(static_cast<const __m256i *>(from)); }
inline __m128i load_half(const void *from) { return _mm_loadu_si128(static_cast<const __m128i *>(from)); }

// As `prepare`, but codes get whole integers: slots 0, 2, 1, 3 of every four positions; at 2:4 in their order.
void prepare_integers(const mspc_matrix &m, const void *x, int64_t is_bfloat16, int64_t token, int64_t planes,
                      Inputs *inputs) {
  if (!has_codes(m)) {
    prepare(m, x, is_bfloat16, token, planes, inputs);
    return;
  }
  int64_t padded = padded_group(m), at = token * num_chunks(m);
  int16_t *whole = const_cast<int16_t *>(inputs->integers) + token * inputs->stride;
  float values[kChunk];
  int8_t high[kChunk], low[kChunk];
  for (int64_t group = 0; group < num_groups(m); group++) {
    for (int64_t first = 0; first < padded; first += kChunk, at++) {
      int64_t count = smaller(kChunk, m.group - first);
      int16_t *integers = whole + group * padded + first;
      load_inputs(x, is_bfloat16, token * m.columns + group * m.group + first, count, values);
      const_cast<float *>(inputs->scales)[at] =
          quantize_chunk(values, count, planes, high, low, const_cast<int32_t *>(inputs->sums) + at);
      for (int64_t i = 0; i < count; i++) {
        int64_t slot = m.structure != kTwoFour && (i % 4 == 1 || i % 4 == 2) ? 3 - i % 4 : i % 4;
        integers[i / 4 * 4 + slot] = int16_t(planes == 2 ? high[i] * 256 + low[i] : high[i]);
      }
    }
  }
}

// Codes of a step of eight rows, in lanes of 16 bits.
struct Pairs {
  __m256i even, odd;
};

template <int64_t kShift, int64_t kWidth>
inline __m256i bits_of(__m256i words) {
  __m256i shifted = kShift ? _mm256_srli_epi16(words, kShift) : words;
  return kShift + kWidth == 16 ? shifted : _mm256_and_si256(shifted, _mm256_set1_epi16((1 << kWidth) - 1));
}

inline Pairs pairs_of(__m256i bytes) { return {bits_of<0, 8>(bytes), bits_of<8, 8>(bytes)}; }

template <int64_t kBits, int64_t kStep>
inline __m256i field(__m256i line) {
  constexpr int64_t shift = kStep % kFields<kBits> * kField<kBits>;
  if (kBits == 8) return line;
  __m256i shifted = shift ? _mm256_srli_epi16(line, shift) : line;
  return _mm256_and_si256(shifted, _mm256_set1_epi8((1 << kField<kBits>) - 1));
}

// Bytes of ones where a bit of the mask is set.
inline __m256i spread(uint32_t mask) {
  const __m256i bytes = _mm256_setr_epi64x(0, 0x0101010101010101, 0x0202020202020202, 0x0303030303030303);
  const __m256i bits = _mm256_set1_epi64x(int64_t(0x8040201008040201));
  __m256i spread = _mm256_shuffle_epi8(_mm256_set1_epi32(int32_t(mask)), bytes);
  return _mm256_cmpeq_epi8(_mm256_and_si256(spread, bits), bits);
}

inline __m256i with_high_bits(__m256i codes, uint32_t mask) {
  return _mm256_or_si256(codes, _mm256_and_si256(spread(mask), _mm256_set1_epi8(4)));
}

// The codes of step kStep of four steps, whose lines are at `lines`.
template <int64_t kBits, int64_t kStep>
inline Pairs codes_of(const uint8_t *lines, int64_t half) {
  __m256i line = load(lines + kStep / kFields<kBits> * 64 + 32 * half);
  constexpr int64_t shift = kStep % kFields<kBits> * kField<kBits>;
  if (kBits != 3) return {bits_of<shift, kField<kBits>>(line), bits_of<shift + 8, kField<kBits>>(line)};
  uint32_t high;
  __builtin_memcpy(&high, lines + 64 + 8 * kStep + 4 * half, 4);
  return pairs_of(with_high_bits(field<kBits, kStep>(line), high));
}

using Sums = __m256i[2];  // of one token

template <int64_t kTokens>
struct Integers {
  const int16_t *of[kTokens];

  Integers(const Inputs &in, int64_t first_token) {
    for (int64_t t = 0; t < kTokens; t++) of[t] = in.integers + (first_token + t) * in.stride;
  }
};

inline __m256i two_inputs(const int16_t *x) {
  int32_t two;
  __builtin_memcpy(&two, x, 4);
  return _mm256_set1_epi32(two);
}

inline void add_products(__m256i &sum, const Pairs &codes, __m256i even, __m256i odd) {
  __m256i products = _mm256_add_epi32(_mm256_madd_epi16(codes.even, even), _mm256_madd_epi16(codes.odd, odd));
  sum = _mm256_add_epi32(sum, products);
  __asm__("" : "+x"(sum));  // or compilers compute all products first, for which they have no registers
}

// Add the products of the codes of a step, one for every position, with the inputs of all tokens.
template <int64_t kTokens>
inline void add_step(const Pairs &upper, const Pairs &lower, const Integers<kTokens> &x, int64_t position, Sums *sums) {
  UNROLLED
  for (int64_t t = 0; t < kTokens; t++) {
    __m256i even = two_inputs(x.of[t] + position), odd = two_inputs(x.of[t] + position + 2);
    add_products(sums[t][0], upper, even, odd);
    add_products(sums[t][1], lower, even, odd);
  }
}

// A stream of dense lines, four steps at a time.
template <int64_t kBits>
struct DenseLines {
  static constexpr bool kCentred = false;  // codes are not yet less their zero
  const uint8_t *lines;

  DenseLines(const mspc_matrix &m, int64_t block) : lines(m.kept + block * num_positions(m) * 2 * kBits) {}
  inline void set_zeros(const __m256i *) {}

  template <int64_t kStep, int64_t kTokens>
  inline void step(const Integers<kTokens> &x, int64_t position, Sums *sums) {
    const uint8_t *four = lines + kStep / 4 * 32 * kBits;
    add_step(codes_of<kBits, kStep % 4>(four, 0), codes_of<kBits, kStep % 4>(four, 1), x, position + 4 * kStep, sums);
  }

  template <int64_t kTokens>
  inline void unit(const Integers<kTokens> &x, int64_t position, Sums *sums) {
    for (int64_t i = 0; i < kBits; i++) fetch(lines + kNear + 64 * i);
    step<0>(x, position, sums), step<1>(x, position, sums), step<2>(x, position, sums), step<3>(x, position, sums);
    step<4>(x, position, sums), step<5>(x, position, sums), step<6>(x, position, sums), step<7>(x, position, sums);
    lines += 64 * kBits;
  }
};

// 2:4: two bits choose one of four inputs. A step has eight of them, which every 128-bit lane of x holds.
template <int64_t kBits>
struct TwoFourLines {
  static constexpr bool kCentred = true;
  const uint8_t *lines, *places;
  __m256i zeros[2];  // twice in each row

  TwoFourLines(const mspc_matrix &m, int64_t block)
      : lines(m.kept + block * num_positions(m) * kBits), places(m.marks + block * num_positions(m) * 2) {}
  inline void set_zeros(const __m256i *of_rows) {
    for (int64_t half = 0; half < 2; half++)
      zeros[half] = _mm256_or_si256(of_rows[half], _mm256_slli_epi32(of_rows[half], 16));
  }

  template <int64_t kStep, int64_t kTokens>
  inline void step(const Integers<kTokens> &x, int64_t position, Sums *sums) {
    const __m256i even = _mm256_set1_epi64x(0x0606040402020000), odd = _mm256_set1_epi64x(0x0707050503030101);
    const __m256i upper = _mm256_setr_epi64x(0, 0x0808080808080808, 0, 0x0808080808080808);  // of a lane
    UNROLLED
    for (int64_t half = 0; half < 2; half++) {
      __m256i of_unit = load(places + 32 * half);
      // The first byte of each input within the 16 bytes of a step.
      __m256i bytes = kStep ? _mm256_srli_epi16(of_unit, 2 * kStep - (kStep > 0)) : _mm256_slli_epi16(of_unit, 1);
      bytes = _mm256_and_si256(bytes, _mm256_set1_epi8(6));
      bytes = _mm256_or_si256(bytes, _mm256_set1_epi32(0x08080000));
      __m256i from_even = _mm256_shuffle_epi8(bytes, _mm256_or_si256(even, upper));
      __m256i from_odd = _mm256_shuffle_epi8(bytes, _mm256_or_si256(odd, upper));
      from_even = _mm256_or_si256(from_even, _mm256_set1_epi16(0x0100));
      from_odd = _mm256_or_si256(from_odd, _mm256_set1_epi16(0x0100));
      Pairs codes = codes_of<kBits, kStep>(lines, half);
      codes = {_mm256_sub_epi16(codes.even, zeros[half]), _mm256_sub_epi16(codes.odd, zeros[half])};
      UNROLLED
      for (int64_t t = 0; t < kTokens; t++) {
        __m256i inputs = _mm256_broadcastsi128_si256(load_half(x.of[t] + position + 8 * kStep));
        add_products(sums[t][half], codes, _mm256_shuffle_epi8(inputs, from_even),
                     _mm256_shuffle_epi8(inputs, from_odd));
      }
    }
  }

  template <int64_t kTokens>
  inline void unit(const Integers<kTokens> &x, int64_t position, Sums *sums) {
    for (int64_t i = 0; i < kBits; i += 2) fetch(lines + kNear + 32 * i);
    fetch(places + kNear);
    step<0>(x, position, sums), step<1>(x, position, sums);
    step<2>(x, position, sums), step<3>(x, position, sums);
    lines += 32 * kBits;
    places += 64;
  }
};

constexpr Places kPlaces;

// The bytes of a stream at the places of 16 entries that are kept, zero at all others.
inline __m128i expand(const uint8_t *&from, const uint8_t *mask) {
  __m128i low = _mm_shuffle_epi8(load_half(from), load_half(kPlaces.first[mask[0]]));
  from += __builtin_popcount(mask[0]);
  __m128i high = _mm_shuffle_epi8(load_half(from), load_half(kPlaces.second[mask[1]]));
  from += __builtin_popcount(mask[1]);
  return _mm_or_si128(low, high);
}

// Behind a bitmap: absent bytes of the dense lines hold the code of zero in all fields.
template <int64_t kBits>
struct Expanded {
  static constexpr bool kCentred = false;
  const uint8_t *stream, *masks;
  __m256i zeros[2];

  Expanded(const mspc_matrix &m, int64_t block)
      : stream(m.kept + m.starts[block]), masks(m.marks + block * num_positions(m) * kBits / 4) {}
  inline void set_zeros(const __m256i *of_rows) {
    constexpr int32_t repeat = kBits == 8 ? 0x01010101 : kBits == 4 ? 0x11111111 : 0x55555555;
    for (int64_t half = 0; half < 2; half++) zeros[half] = _mm256_mullo_epi32(of_rows[half], _mm256_set1_epi32(repeat));
  }

  inline __m256i half_of_line(const uint8_t *mask, int64_t half) {
    uint32_t bits;
    __builtin_memcpy(&bits, mask, 4);
    __m128i lower = expand(stream, mask), upper = expand(stream, mask + 2);
    return _mm256_or_si256(_mm256_set_m128i(upper, lower), _mm256_andnot_si256(spread(bits), zeros[half]));
  }

  // The steps of a line, which are number kFirst and so on of their unit.
  template <int64_t kFirst, int64_t kTokens>
  inline void line(const Integers<kTokens> &x, int64_t position, Sums *sums) {
    constexpr int64_t kSteps = kFields<kBits>;
    const uint8_t *mask = masks + 8 * (kFirst / kSteps);
    fetch(stream + kFar);
    __m256i upper = half_of_line(mask, 0), lower = half_of_line(mask + 4, 1);
    add_fields<0>(upper, lower, x, position + 4 * kFirst, sums);
    if constexpr (kFirst + kSteps < 8) line<kFirst + kSteps>(x, position, sums);
  }

  template <int64_t kStep, int64_t kTokens>
  inline void add_fields(__m256i upper, __m256i lower, const Integers<kTokens> &x, int64_t position, Sums *sums) {
    constexpr int64_t shift = kStep * kBits;
    add_step(Pairs{bits_of<shift, kBits>(upper), bits_of<shift + 8, kBits>(upper)},
             Pairs{bits_of<shift, kBits>(lower), bits_of<shift + 8, kBits>(lower)}, x, position + 4 * kStep, sums);
    if constexpr (kStep + 1 < kFields<kBits>) add_fields<kStep + 1>(upper, lower, x, position, sums);
  }

  template <int64_t kTokens>
  inline void unit(const Integers<kTokens> &x, int64_t position, Sums *sums) {
    fetch(masks + kFar);
    line<0>(x, position, sums);
    masks += 8 * kBits;
  }
};

inline void store_halves(const mspc_matrix &m, const Outputs &out, int64_t token, int64_t block, const __m256 *y) {
  alignas(32) float rows[kRows];
  _mm256_store_ps(rows, y[0]), _mm256_store_ps(rows + 8, y[1]);
  store(m, out, token, block, rows);
}

template <class Lines, int64_t kTokens, int64_t>
void multiply_codes(const mspc_matrix &m, const Inputs &in, int64_t token, int64_t block, const Outputs &out) {
  Lines lines(m, block);
  Integers<kTokens> x(in, token);
  __m256 y[kTokens][2];
  UNROLLED
  for (int64_t t = 0; t < kTokens; t++) y[t][0] = y[t][1] = _mm256_setzero_ps();
  int64_t groups = num_groups(m), padded = padded_group(m), chunks = num_chunks(m), chunk = token * chunks;
  __m256i zeros[2] = {_mm256_set1_epi32(1 << (m.content - 1)), _mm256_set1_epi32(1 << (m.content - 1))};
  for (int64_t group = 0, position = 0; group < groups; group++) {
    int64_t grid = (block * groups + group) * kRows;
    __m256 scales[2];
    UNROLLED
    for (int64_t half = 0; half < 2; half++) {
      scales[half] = _mm256_cvtph_ps(load_half(m.scales + grid + 8 * half));
      if (m.zeros) zeros[half] = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)(m.zeros + grid + 8 * half)));
    }
    lines.set_zeros(zeros);
    for (int64_t first = 0; first < padded; first += kChunk, chunk++) {
      Sums sums[kTokens];
      UNROLLED
      for (int64_t t = 0; t < kTokens; t++) sums[t][0] = sums[t][1] = _mm256_setzero_si256();
      for (int64_t last = position + smaller(kChunk, padded - first); position < last; position += kUnit)
        lines.unit(x, position, sums);
      UNROLLED
      for (int64_t i = 0; i < 2 * kTokens; i++) {
        int64_t t = i / 2, half = i % 2, at = chunk + t * chunks;
        __m256i total = sums[t][half], of_inputs = _mm256_set1_epi32(in.sums[at]);
        if (!Lines::kCentred) total = _mm256_sub_epi32(total, _mm256_mullo_epi32(zeros[half], of_inputs));
        __m256 scaled = _mm256_mul_ps(_mm256_set1_ps(in.scales[at]), _mm256_cvtepi32_ps(total));
        y[t][half] = _mm256_fmadd_ps(scales[half], scaled, y[t][half]);
      }
    }
  }
  UNROLLED
  for (int64_t t = 0; t < kTokens; t++) store_halves(m, out, token + t, block, y[t]);
}

}  // namespace

#include "avx2_values.h"
#include "choose.h"

extern const Kernels avx2_kernels;
const Kernels avx2_kernels = {prepare_integers, product, kBetween};
