// What the files of the library share: products with repacked matrices (docs/cpu-kernels.md). Callers check sizes first.
#pragma once
#include <cstddef>
#include <cstdint>

#define EXPORTED __attribute__((visibility("default")))
// For loops over tokens, planes or halves of a line: sums stay in registers only if none of them is left.
#define UNROLLED _Pragma("GCC unroll 8")

extern "C" {

// A repacked matrix. Its pointers are those of tensors that outlive every call.
struct mspc_matrix {
  int64_t rows, columns;
  int64_t group;      // inputs that share a scale, a divisor of columns; `columns` where there are no codes
  int64_t structure;  // kDense, kTwoFour, kBitmap
  int64_t content;    // bits of a code (8, 4, 3, 2), or kBfloat16, kFloat16, kFloat32
  uint8_t *kept;      // lines of kept weights
  uint8_t *marks;     // bitmap, or places of 2:4; null if dense
  int64_t *starts;    // with a bitmap: for each block of 16 rows the first byte of its stream, and the end
  uint16_t *scales;   // float16 (blocks, groups, 16); null without codes
  uint8_t *zeros;     // (blocks, groups, 16); null if symmetric or without codes
};

// A matrix, and its bias or null.
struct mspc_part {
  const mspc_matrix *matrix;
  const float *bias;
};

// Queries, keys and values in this order, each a matrix of its own or some of them joined; so gates and up.
struct mspc_layer {
  int64_t num_qkv, num_gate_up;
  mspc_part qkv[3], out, gate_up[2], down;
  const float *attention_norm, *mlp_norm;
  const float *after_attention, *after_mlp;  // norms of what both add, or null
  const float *q_norm, *k_norm;              // (head_dim,), or null
  const float *cos, *sin;                    // (length, head_dim)
  float *cache;                              // keys and values (2, batch, kv_heads, length, head_dim)
  int64_t window;                            // the most tokens that one attends to, with itself; 0 is any number
};

struct mspc_decoder {
  int64_t batch, hidden, intermediate, heads, kv_heads, head_dim, length, num_layers;
  int64_t isa, planes;
  int64_t is_gelu;                 // the activation of gates is the tanh form of GELU, else SiLU
  double eps, scale, residual;     // of products of queries and keys; of what attention and MLP add
  const float *norm;               // of the last block's outputs
  const mspc_layer *layers;
};
}

// The inputs of a product in the order of positions, where padding is 0.
struct Inputs {
  int64_t tokens;
  int64_t stride;          // from token to token in planes and x
  int64_t planes;          // of codes: 1 (int8), or 2 (int16 = 256 high + low)
  const int8_t *high;      // with two planes the high one, else the only one
  const int8_t *low;
  const int16_t *integers;  // where a set takes no planes: whole, in their memory
  const float *scales;     // (tokens, chunks)
  const int32_t *sums;     // (tokens, chunks): sum of the integers of a chunk
  const float *x;          // of values: float32
};

struct Outputs {
  void *y;              // (tokens, rows)
  int64_t is_bfloat16;  // else float32
};

// Operations of a decoder between its products (between.h).
struct Between {
  void (*norm)(const float *x, const float *weight, int64_t count, float eps, float *out);
  void (*add)(float *x, const float *y, float factor, int64_t count);
  void (*rotate)(const float *head, const float *cos, const float *sin, int64_t dim, float *out);
  void (*gate)(const float *gates, const float *up, int64_t count, bool is_gelu, float *out);
  void (*attend)(float *heads, int64_t num_heads, const float *keys, const float *values, int64_t tokens, int64_t dim,
                 float scale, float *weights, int64_t length);
};

// What each instruction set has.
struct Kernels {
  void (*prepare)(const mspc_matrix &, const void *x, int64_t is_bfloat16, int64_t token, int64_t planes, Inputs *);
  void (*product)(const mspc_matrix &, const Inputs &, int64_t first_block, int64_t last_block, const Outputs &);
  const Between &between;
};

const Kernels &kernels_of(int64_t isa);

// Calls work(context, piece) for pieces 0 to count - 1, on threads that it has.
struct Sharer {
  void (*share)(const Sharer &, int64_t count, void (*work)(void *, int64_t), void *context);
  const void *threads;  // its own
};

// Threads of this library, or of torch; `threads` outlives the sharer.
Sharer own_threads(const int64_t *threads);

// A matrix that reads the same inputs as others, and where its outputs (tokens, rows) go.
struct Factor {
  const mspc_matrix *matrix;
  void *y;
};

constexpr int64_t kMostFactors = 3;  // queries, keys and values

// x (tokens, columns) -> y (tokens, rows) of each matrix, float32 or bfloat16, by the pieces that a sharer gets.
void multiply(const Factor *factors, int64_t count, int64_t isa, const void *x, int64_t is_bfloat16, int64_t tokens,
              int64_t planes, const Sharer &);

// In each file on its own: the linker must never merge code that was compiled for different instruction sets.
// For the same reason these files use no inline functions of the standard library.
namespace {

constexpr int64_t kDense = 0, kTwoFour = 1, kBitmap = 2;
constexpr int64_t kBfloat16 = 16, kFloat16 = 17, kFloat32 = 32;
constexpr int64_t kRows = 16;    // rows of a block, one for each lane of 32 bits
constexpr int64_t kUnit = 32;    // groups are padded to whole units of positions
constexpr int64_t kChunk = 128;  // most positions whose products are summed as integers
constexpr int64_t kMostTokens = 4;

// Bits of the fields of a byte of kept codes, and fields; int3 has its third bits apart.
template <int64_t kBits>
constexpr int64_t kField = kBits == 3 ? 2 : kBits;
template <int64_t kBits>
constexpr int64_t kFields = 8 / kField<kBits>;

inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline bool has_codes(const mspc_matrix &m) { return m.content <= 8; }
inline int64_t num_groups(const mspc_matrix &m) { return m.columns / m.group; }
inline int64_t padded_group(const mspc_matrix &m) { return ceil_div(m.group, kUnit) * kUnit; }
inline int64_t num_positions(const mspc_matrix &m) { return num_groups(m) * padded_group(m); }
inline int64_t num_blocks(const mspc_matrix &m) { return ceil_div(m.rows, kRows); }
inline int64_t num_chunks(const mspc_matrix &m) { return num_groups(m) * ceil_div(padded_group(m), kChunk); }

inline float float_of(uint32_t bits) {
  float value;
  __builtin_memcpy(&value, &bits, 4);
  return value;
}

inline uint32_t bits_of(float value) {
  uint32_t bits;
  __builtin_memcpy(&bits, &value, 4);
  return bits;
}

inline float from_bfloat16(uint16_t bits) { return float_of(uint32_t(bits) << 16); }

inline uint16_t to_bfloat16(float value) {
  uint32_t bits = bits_of(value);
  if ((bits & 0x7fffffff) > 0x7f800000) return uint16_t(bits >> 16 | 0x40);
  return uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

inline float from_float16(uint16_t half) {
  uint32_t sign = uint32_t(half & 0x8000) << 16, rest = half & 0x7fff;
  if (rest >= 0x7c00) return float_of(sign | 0x7f800000 | (rest & 0x3ff) << 13);
  if (rest >= 0x400) return float_of(sign | ((rest << 13) + (112u << 23)));
  float value = float(rest) * 5.9604644775390625e-8f;  // 2^-24
  return sign ? -value : value;
}

// The sums of a block, one for each of its rows, rounded once.
inline void store(const mspc_matrix &m, const Outputs &out, int64_t token, int64_t block, const float *sums) {
  int64_t first = block * kRows, count = smaller(kRows, m.rows - first);
  for (int64_t row = 0; row < count; row++) {
    int64_t at = token * m.rows + first + row;
    if (out.is_bfloat16)
      static_cast<uint16_t *>(out.y)[at] = to_bfloat16(sums[row]);
    else
      static_cast<float *>(out.y)[at] = sums[row];
  }
}

}  // namespace
