// Whether a matrix can be read without leaving its memory, whatever its numbers and bytes are.
#include "panels.h"

namespace {

// Bytes behind the pointers of a matrix.
struct Sizes {
  int64_t kept, marks, starts, scales, zeros;
};

constexpr int64_t kPadding = 128;  // bytes of `kept` that may be read ahead
constexpr int64_t kMost = int64_t(1) << 31;

// a * b, or -1 if it is no size.
inline int64_t times(int64_t a, int64_t b) {
  int64_t product;
  return a < 0 || b < 0 || __builtin_mul_overflow(a, b, &product) ? -1 : product;
}

bool is_known(const mspc_matrix &m) {
  bool codes = m.content == 8 || m.content == 4 || m.content == 3 || m.content == 2;
  bool values = m.content == kBfloat16 || m.content == kFloat16 || m.content == kFloat32;
  if (!(codes || values) || m.structure < kDense || m.structure > kBitmap) return false;
  if (m.rows < 1 || m.columns < 1 || m.group < 1 || m.rows > kMost || m.columns > kMost) return false;
  if (m.columns % m.group || (values && m.group != m.columns)) return false;
  return m.structure != kTwoFour || m.group % 4 == 0;
}

bool is_there(const void *pointer, int64_t bytes, int64_t expected) {
  return expected < 0 ? false : bytes == expected && (expected == 0 || pointer);
}

// The streams of every block have the lengths that its bitmap counts.
bool streams_fit(const mspc_matrix &m) {
  Shape shape(m);
  int64_t fields = has_codes(m) ? 8 / field_bits(m.content) : 1, of_entry = has_codes(m) ? 1 : value_bytes(m.content);
  if (m.starts[0] != 0) return false;
  int64_t start = 0;
  const uint8_t *mark = m.marks;
  for (int64_t block = 0; block < num_blocks(m); block++) {
    int64_t counts[4] = {}, longest = 0, all = 0;
    for (int64_t step = 0; step < shape.steps; step++, mark += shape.lanes / 8) {
      uint64_t bits = 0;
      __builtin_memcpy(&bits, mark, size_t(shape.lanes / 8));
      counts[step % fields] += __builtin_popcountll(bits);
    }
    for (int64_t count : counts) longest = count > longest ? count : longest, all += count;
    start += longest * of_entry;
    if (m.starts[2 * block + 1] != start) return false;
    start += m.content == 3 ? ceil_div(all, 8) : 0;
    if (m.starts[2 * block + 2] != start) return false;
  }
  return true;
}

bool fits(const mspc_matrix &m, const Sizes &sizes) {
  if (!is_known(m)) return false;
  int64_t blocks = num_blocks(m), units = num_positions(m) / kUnit, grids = times(times(blocks, num_groups(m)), kRows);
  bool bitmap = m.structure == kBitmap, codes = has_codes(m);
  // Of 32 positions, a bitmap has a bit for each entry, and 2:4 has two bits for each kept weight.
  if (!is_there(m.marks, sizes.marks, m.structure == kDense ? 0 : times(blocks, times(units, 64)))) return false;
  if (!is_there(m.starts, sizes.starts, bitmap ? 8 * (2 * blocks + 1) : 0)) return false;
  if (!is_there(m.scales, sizes.scales, codes ? times(grids, 2) : 0)) return false;
  if ((m.zeros || sizes.zeros) && (!codes || !is_there(m.zeros, sizes.zeros, grids))) return false;
  if (bitmap && !streams_fit(m)) return false;
  int64_t kept = bitmap ? m.starts[2 * blocks] : times(blocks, block_bytes(m));
  return kept >= 0 && m.kept && sizes.kept - kPadding == kept;
}

}  // namespace

extern "C" {

// 1 if products, expansion and unpacking stay within these bytes of each part: kept, marks, starts, scales, zeros.
EXPORTED int64_t mspc_fits(const mspc_matrix *m, const int64_t *bytes) {
  return fits(*m, Sizes{bytes[0], bytes[1], bytes[2], bytes[3], bytes[4]});
}
}
