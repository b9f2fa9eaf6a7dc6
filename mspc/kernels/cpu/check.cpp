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
  if (m.structure == kBitmap && m.content == 3) return false;
  if (m.rows < 1 || m.columns < 1 || m.group < 1 || m.rows > kMost || m.columns > kMost) return false;
  if (m.columns % m.group || (values && m.group != m.columns)) return false;
  return m.structure != kTwoFour || m.group % 4 == 0;
}

bool is_there(const void *pointer, int64_t bytes, int64_t expected) {
  return expected < 0 ? false : bytes == expected && (expected == 0 || pointer);
}

// The stream of every block has the length that its bitmap counts.
bool streams_fit(const mspc_matrix &m) {
  int64_t of_block = num_lines(m) * Shape(m).lanes / 8, of_entry = has_codes(m) ? 1 : value_bytes(m.content), end = 0;
  if (m.starts[0] != 0) return false;
  for (int64_t block = 0; block < num_blocks(m); block++) {
    for (int64_t i = 0; i < of_block; i++) end += of_entry * __builtin_popcount(m.marks[block * of_block + i]);
    if (m.starts[block + 1] != end) return false;
  }
  return true;
}

bool fits(const mspc_matrix &m, const Sizes &sizes) {
  if (!is_known(m)) return false;
  int64_t blocks = num_blocks(m), units = num_positions(m) / kUnit, grids = times(times(blocks, num_groups(m)), kRows);
  bool bitmap = m.structure == kBitmap, codes = has_codes(m);
  // Of 32 positions, a bitmap has a bit for each value or byte of codes, and 2:4 has two bits for each kept weight.
  int64_t of_unit = m.structure == kDense ? 0 : bitmap && codes ? 8 * m.content : 64;
  if (!is_there(m.marks, sizes.marks, times(blocks, times(units, of_unit)))) return false;
  if (!is_there(m.starts, sizes.starts, bitmap ? 8 * (blocks + 1) : 0)) return false;
  if (!is_there(m.scales, sizes.scales, codes ? times(grids, 2) : 0)) return false;
  if ((m.zeros || sizes.zeros) && (!codes || !is_there(m.zeros, sizes.zeros, grids))) return false;
  if (bitmap && !streams_fit(m)) return false;
  int64_t kept = bitmap ? m.starts[blocks] : times(blocks, block_bytes(m));
  return kept >= 0 && m.kept && sizes.kept - kPadding == kept;
}

}  // namespace

extern "C" {

// 1 if products, expansion and unpacking stay within these bytes of each part: kept, marks, starts, scales, zeros.
EXPORTED int64_t mspc_fits(const mspc_matrix *m, const int64_t *bytes) {
  return fits(*m, Sizes{bytes[0], bytes[1], bytes[2], bytes[3], bytes[4]});
}
}
