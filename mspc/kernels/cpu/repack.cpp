// Rows of entries and a mask to panels, and back.
#include <cstdlib>

#include "panels.h"

namespace {

inline uint32_t load_entry(const mspc_matrix &m, const uint8_t *entries, int64_t at) {
  int64_t bytes = has_codes(m) ? 1 : value_bytes(m.content);
  uint32_t entry = 0;
  __builtin_memcpy(&entry, entries + at * bytes, size_t(bytes));
  return entry;
}

inline void store_entry(const mspc_matrix &m, uint8_t *entries, int64_t at, uint32_t entry) {
  __builtin_memcpy(entries + at * (has_codes(m) ? 1 : value_bytes(m.content)), &entry,
                   size_t(has_codes(m) ? 1 : value_bytes(m.content)));
}

// The column of every position, -1 for padding.
struct Columns {
  int64_t *of;

  explicit Columns(const mspc_matrix &m) {
    of = static_cast<int64_t *>(malloc(size_t(num_positions(m)) * sizeof(int64_t)));
    if (!of) abort();
    int64_t padded = padded_group(m);
    for (int64_t group = 0; group < num_groups(m); group++)
      for (int64_t i = 0; i < padded; i++) of[group * padded + i] = i < m.group ? group * m.group + i : -1;
  }
  ~Columns() { free(of); }
  Columns(const Columns &) = delete;
  Columns &operator=(const Columns &) = delete;
};

// Some rows of a matrix, first of them a whole block.
struct Rows {
  const mspc_matrix &m;
  const int64_t *columns;  // of positions
  const uint8_t *entries;  // (rows, columns): codes uint8, or values
  const uint8_t *keep;     // (rows, columns)
  int64_t count;

  bool is_kept(int64_t row, int64_t position) const {
    int64_t column = columns[position];
    return row < count && column >= 0 && keep[row * m.columns + column];
  }
  uint32_t entry(int64_t row, int64_t position) const {
    int64_t column = columns[position];
    return row < count && column >= 0 ? load_entry(m, entries, row * m.columns + column) : 0;
  }
};

// The stream of a block behind a bitmap.
struct Stream {
  uint8_t *kept, *marks;  // null where bytes are only counted
  int64_t length = 0;

  void add(int64_t lane_of_block, const void *entry, int64_t bytes) {
    if (marks) marks[lane_of_block / 8] |= uint8_t(1 << (lane_of_block % 8));
    if (kept) __builtin_memcpy(kept + length, entry, size_t(bytes));
    length += bytes;
  }
};

void pack_values(const Rows &rows, Stream &stream) {
  Shape shape(rows.m);
  for (int64_t step = 0; step < shape.steps; step++) {
    for (int64_t lane = 0; lane < shape.lanes; lane++) {
      int64_t row = shape.row(lane), position = step * shape.span + shape.slot(lane);
      if (!rows.is_kept(row, position)) continue;
      uint32_t entry = rows.entry(row, position);
      stream.add(step * shape.lanes + lane, &entry, value_bytes(rows.m.content));
    }
  }
}

// Bytes of codes, if they have others than the zero point. Pruned weights have that code.
void pack_codes(const Rows &rows, int64_t block, Stream &stream) {
  const mspc_matrix &m = rows.m;
  Shape shape(m);
  int64_t bits = field_bits(m.content), fields = 8 / bits, lines = num_lines(m);
  for (int64_t line = 0; line < lines; line++) {
    int64_t first = line * fields * shape.slots, group = first / padded_group(m);  // a group has whole lines
    for (int64_t row = 0; row < rows.count; row++) {
      uint32_t zero = m.zeros ? m.zeros[(block * num_groups(m) + group) * kRows + row] : 1u << (m.content - 1);
      const uint8_t *codes = rows.entries + row * m.columns, of_zeros = byte_of_zeros(m.content, zero);
      for (int64_t slot = 0; slot < shape.slots; slot++) {
        uint8_t byte = of_zeros;
        for (int64_t i = 0; i < fields; i++) {
          int64_t column = rows.columns[first + slot + i * shape.slots];
          if (column >= 0) byte = uint8_t(byte ^ ((codes[column] ^ zero) << (i * bits)));
        }
        if (byte != of_zeros) stream.add(line * shape.lanes + shape.lane(row, slot), &byte, 1);
      }
    }
  }
}

void pack_bitmap(const Rows &rows, int64_t block, Stream &stream) {
  if (has_codes(rows.m))
    pack_codes(rows, block, stream);
  else
    pack_values(rows, stream);
}

void store_in_line(const mspc_matrix &m, const Shape &shape, uint8_t *kept, int64_t step, int64_t lane,
                   uint32_t entry) {
  if (!has_codes(m)) {
    int64_t bytes = value_bytes(m.content);
    __builtin_memcpy(kept + (step * shape.lanes + lane) * bytes, &entry, size_t(bytes));
    return;
  }
  int64_t bits = field_bits(m.content);
  uint8_t *line = kept + line_of_codes(m.content, step);
  line[lane] |= uint8_t((entry & ((1u << bits) - 1)) << (step % (8 / bits) * bits));
  if (m.content == 3) line[64 + 8 * (step % 4) + lane / 8] |= uint8_t((entry >> 2) << (lane % 8));
}

void pack_lines(const Rows &rows, uint8_t *kept, uint8_t *marks) {
  const mspc_matrix &m = rows.m;
  Shape shape(m);
  for (int64_t step = 0; step < shape.steps; step++) {
    for (int64_t row = 0; row < kRows; row++) {
      int64_t slot = 0;
      if (m.structure == kDense) {
        for (; slot < shape.slots; slot++)
          store_in_line(m, shape, kept, step, shape.lane(row, slot), rows.entry(row, step * shape.span + slot));
        continue;
      }
      for (int64_t four = 0; four < shape.span; four += 4) {
        int64_t found = 0;
        for (int64_t place = 0; place < 4 && found < 2; place++) {
          // Rows and positions of padding keep the first two.
          if (!rows.is_kept(row, step * shape.span + four + place) && !(place >= 2 + found) &&
              !(row >= rows.count || rows.columns[step * shape.span + four] < 0))
            continue;
          int64_t number = step * shape.slots + slot, k = number % 16;
          marks[number / 16 * 64 + 4 * row + k % 4] |= uint8_t(place << (2 * (k / 4)));
          store_in_line(m, shape, kept, step, shape.lane(row, slot), rows.entry(row, step * shape.span + four + place));
          found++, slot++;
        }
      }
    }
  }
}

struct Unpacking {
  const mspc_matrix &m;
  const int64_t *columns;
  int64_t block;
  uint8_t *entries, *keep;  // (rows of the block, columns)

  template <int64_t kStructure, int64_t kContent>
  void operator()() {
    using Panel = Reader<kStructure, kContent>;
    Panel reader(m, block);
    int64_t rows = smaller(kRows, m.rows - block * kRows), steps = num_positions(m) / Panel::kSpan;
    for (int64_t step = 0; step < steps; step++) {
      uint32_t of_step[Panel::kLanes];
      int8_t places[Panel::kLanes];
      reader.next(step, of_step, places);
      for (int64_t lane = 0; lane < Panel::kLanes; lane++) {
        int64_t row = kContent == kFloat32 ? lane % kRows : lane / Panel::kSlots;
        if (row >= rows || places[lane] < 0) continue;
        int64_t column = columns[step * Panel::kSpan + places[lane]];
        if (column < 0) continue;
        store_entry(m, entries, row * m.columns + column, of_step[lane]);
        keep[row * m.columns + column] = 1;
      }
    }
  }
};

}  // namespace

extern "C" {

// Bytes of the stream of each block behind a bitmap: int64 (blocks,). Of codes the entries count, of values `keep`.
EXPORTED void mspc_lengths(const mspc_matrix *m, const uint8_t *entries, const uint8_t *keep, int64_t first_row,
                           int64_t num_rows, int64_t *lengths) {
  Columns columns(*m);
  int64_t bytes = has_codes(*m) ? 1 : value_bytes(m->content);
  for (int64_t row = first_row; row < first_row + num_rows; row += kRows) {
    int64_t count = smaller(kRows, first_row + num_rows - row), at = (row - first_row) * m->columns;
    Stream stream{nullptr, nullptr};
    pack_bitmap(Rows{*m, columns.of, entries + at * bytes, keep + at, count}, row / kRows, stream);
    lengths[row / kRows] = stream.length;
  }
}

// Pack rows, first of them a whole block, into memory that is zero.
EXPORTED void mspc_pack(const mspc_matrix *m, const uint8_t *entries, const uint8_t *keep, int64_t first_row,
               int64_t num_rows) {
  Shape shape(*m);
  Columns columns(*m);
  int64_t bytes = has_codes(*m) ? 1 : value_bytes(m->content);
  for (int64_t row = first_row; row < first_row + num_rows; row += kRows) {
    int64_t block = row / kRows, at = (row - first_row) * m->columns;
    Rows rows{*m, columns.of, entries + at * bytes, keep + at, smaller(kRows, first_row + num_rows - row)};
    if (m->structure == kBitmap) {
      Stream stream{m->kept + m->starts[block], m->marks + block * num_lines(*m) * (shape.lanes / 8)};
      pack_bitmap(rows, block, stream);
    } else {
      uint8_t *marks = m->marks ? m->marks + block * num_positions(*m) / kUnit * 64 : nullptr;
      pack_lines(rows, m->kept + block * block_bytes(*m), marks);
    }
  }
}

// Invert `mspc_pack`, into memory that is zero.
EXPORTED void mspc_unpack(const mspc_matrix *m, int64_t first_row, int64_t num_rows, uint8_t *entries, uint8_t *keep) {
  Columns columns(*m);
  int64_t bytes = has_codes(*m) ? 1 : value_bytes(m->content);
  for (int64_t row = first_row; row < first_row + num_rows; row += kRows) {
    int64_t at = (row - first_row) * m->columns;
    visit(*m, Unpacking{*m, columns.of, row / kRows, entries + at * bytes, keep + at});
  }
}
}
