// Spoiled matrices for the C++ library, built with sanitizers: what `mspc_fits` takes is never read out of bounds.
//
//     cpu_fuzz ROUNDS SEED
//
// Every part of a matrix has memory of its own, of exactly its size. A sanitizer ends the process at the first fault.
// Steps of small decoders follow. The last number is a digest of all portable products, which is the same on every processor.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <vector>

#include "interface.h"

extern "C" {
int64_t mspc_has(int64_t isa);
int64_t mspc_fits(const mspc_matrix *, const int64_t *bytes);
void mspc_lengths(const mspc_matrix *, const uint8_t *entries, const uint8_t *keep, int64_t first_row, int64_t num_rows,
                  int64_t *lengths);
void mspc_pack(const mspc_matrix *, const uint8_t *entries, const uint8_t *keep, int64_t first, int64_t rows);
void mspc_unpack(const mspc_matrix *, int64_t first_row, int64_t num_rows, uint8_t *entries, uint8_t *keep);
void mspc_expand(const mspc_matrix *, int64_t first_row, int64_t num_rows, float *out, int64_t threads);
void mspc_product(const mspc_matrix *, int64_t isa, const void *x, int64_t is_bfloat16, int64_t tokens, void *y,
                  int64_t planes, int64_t threads);
int64_t mspc_step_floats(const mspc_decoder *);
void mspc_step(const mspc_decoder *, float *x, int64_t first, float *workspace, int64_t threads);
}

namespace {

std::mt19937_64 engine;
uint64_t digest = 14695981039346656037u;  // FNV-1a

void add_to_digest(const uint8_t *y, int64_t count, int64_t is_bfloat16) {
  for (int64_t i = 0; i < count; i++) {
    uint32_t bits = 0;
    memcpy(&bits, y + i * (is_bfloat16 ? 2 : 4), is_bfloat16 ? 2 : 4);
    if (is_bfloat16) bits <<= 16;
    if ((bits & 0x7fffffff) > 0x7f800000) bits = 0x7fc00000;  // processors differ in which NaN they give
    digest = (digest ^ bits) * 1099511628211u;
  }
}

int64_t below(int64_t most) { return int64_t(engine() % uint64_t(most)); }

template <size_t kCount>
int64_t one_of(const int64_t (&values)[kCount]) {
  return values[below(kCount)];
}

// Memory of exactly `bytes`, aligned as tensors are, so that the first byte behind it is poisoned.
struct Memory {
  uint8_t *start = nullptr;
  int64_t bytes = 0;

  void take(int64_t count) {
    release();
    bytes = count;
    if (posix_memalign(reinterpret_cast<void **>(&start), 64, size_t(count))) abort();
    memset(start, 0, size_t(count));
  }
  void release() { free(start), start = nullptr, bytes = 0; }
  void shorten(int64_t count) {
    uint8_t *old = start;
    start = nullptr;
    take(count);
    memcpy(start, old, size_t(count));
    free(old);
  }
  void fill() {
    for (int64_t i = 0; i < bytes; i++) start[i] = uint8_t(engine());
  }
};

constexpr int64_t kParts = 5;  // kept, marks, starts, scales, zeros

struct Case {
  mspc_matrix m{};
  Memory parts[kParts];

  ~Case() {
    for (Memory &part : parts) part.release();
  }
  void point() {
    m.kept = parts[0].start, m.marks = parts[1].start, m.starts = reinterpret_cast<int64_t *>(parts[2].start);
    m.scales = reinterpret_cast<uint16_t *>(parts[3].start), m.zeros = parts[4].start;
  }
  bool fits() const {
    int64_t bytes[kParts];
    for (int64_t i = 0; i < kParts; i++) bytes[i] = parts[i].bytes;
    return mspc_fits(&m, bytes);
  }
};

void describe(mspc_matrix &m) {
  const int64_t contents[] = {8, 4, 3, 2, kBfloat16, kFloat16, kFloat32}, groups[] = {4, 8, 24, 32, 64, 100, 128, 160};
  m.rows = 1 + below(40), m.structure = below(3), m.content = one_of(contents);
  m.group = m.structure == kTwoFour || below(2) ? one_of(groups) : 1 + below(140);
  m.columns = m.group * (1 + below(m.group < 32 ? 9 : 3));
  if (!has_codes(m)) m.group = m.columns;
  if (m.structure == kBitmap && m.content == 3) m.content = 4;
}

// Some of the weights; at 2:4 any two of each four.
void choose_kept(const mspc_matrix &m, uint8_t *keep) {
  int64_t share = below(101);
  for (int64_t i = 0; i < m.rows * m.columns; i++) keep[i] = m.structure == kDense || below(100) < share;
  for (int64_t i = 0; m.structure == kTwoFour && i < m.rows * m.columns; i += 4) {
    int64_t first = below(4), second = (first + 1 + below(3)) % 4;
    for (int64_t j = 0; j < 4; j++) keep[i + j] = j == first || j == second;
  }
}

// Pruned weights have the zero point.
void choose_codes(const mspc_matrix &m, const uint8_t *keep, uint8_t *codes) {
  for (int64_t i = 0; i < m.rows * m.columns; i++) {
    int64_t row = i / m.columns, at = (row / kRows * num_groups(m) + i % m.columns / m.group) * kRows + row % kRows;
    codes[i] = keep[i] ? codes[i] & uint8_t((1 << m.content) - 1) : m.zeros ? m.zeros[at] : uint8_t(1 << (m.content - 1));
  }
}

void make(Case &made) {
  mspc_matrix &m = made.m;
  int64_t blocks = num_blocks(m), count = m.rows * m.columns, bytes = has_codes(m) ? 1 : m.content == kFloat32 ? 4 : 2;
  Memory keep, entries, starts;
  keep.take(count), entries.take(count * bytes), starts.take(8 * (blocks + 1));
  choose_kept(m, keep.start);
  entries.fill();
  if (has_codes(m)) {
    made.parts[3].take(blocks * num_groups(m) * kRows * 2), made.parts[3].fill();
    if (below(2)) made.parts[4].take(blocks * num_groups(m) * kRows), made.parts[4].fill();
    for (int64_t i = 0; i < made.parts[4].bytes; i++) made.parts[4].start[i] &= uint8_t((1 << m.content) - 1);
    made.point();
    choose_codes(m, keep.start, entries.start);
  }
  if (m.structure == kBitmap) {
    int64_t *from = reinterpret_cast<int64_t *>(starts.start);
    mspc_lengths(&m, entries.start, keep.start, 0, m.rows, from + 1);
    for (int64_t i = 1; i <= blocks; i++) from[i] += from[i - 1];
    made.parts[0].take(from[blocks] + 128);
    made.parts[2].take(starts.bytes);
    memcpy(made.parts[2].start, starts.start, size_t(starts.bytes));
  } else {
    int64_t kept = num_positions(m) / (m.structure == kTwoFour ? 2 : 1) * kRows;  // entries of a block
    made.parts[0].take(blocks * (has_codes(m) ? kept * m.content / 8 : kept * bytes) + 128);
  }
  int64_t eighths = m.structure == kBitmap && has_codes(m) ? m.content : 8;  // of two bytes of marks a position
  if (m.structure != kDense) made.parts[1].take(blocks * num_positions(m) / 4 * eighths);
  made.point();
  mspc_pack(&m, entries.start, keep.start, 0, m.rows);
  keep.release(), entries.release(), starts.release();
}

void spoil(Case &made) {
  const int64_t extremes[] = {0, -1, 1, 3, 5, 7, 9, 15, 31, 33, 64, 128, 1 << 20, INT32_MAX, INT64_MAX, INT64_MIN};
  Memory &part = made.parts[below(kParts)];
  int64_t *fields[] = {&made.m.rows, &made.m.columns, &made.m.group, &made.m.structure, &made.m.content};
  int64_t &field = *fields[below(5)];
  switch (below(6)) {
    case 0: field = one_of(extremes); break;
    case 1: field += below(9) - 4; break;
    case 2:
      if (part.bytes) part.shorten(below(part.bytes));
      break;
    case 3:
      for (int64_t i = 0; part.bytes && i < 1 + below(4); i++) part.start[below(part.bytes)] ^= uint8_t(1 << below(8));
      break;
    case 4: part.fill(); break;
    case 5: part.release(); break;
  }
  made.point();
}

void use(const mspc_matrix &m) {
  int64_t bytes = has_codes(m) ? 1 : m.content == kFloat32 ? 4 : 2, count = m.rows * m.columns;
  Memory out, entries, keep;
  out.take(4 * count), entries.take(bytes * count), keep.take(count);
  mspc_expand(&m, 0, m.rows, reinterpret_cast<float *>(out.start), 1 + below(2));
  mspc_unpack(&m, 0, m.rows, entries.start, keep.start);
  for (int64_t isa = 0; isa < 3; isa++) {
    if (!mspc_has(isa)) continue;
    int64_t tokens = 1 + below(9), is_bfloat16 = below(2), planes = 1 + below(2), threads = 1 + below(2);
    int64_t size = is_bfloat16 ? 2 : 4;
    Memory x, y;
    x.take(tokens * m.columns * size), y.take(tokens * m.rows * size);
    x.fill();
    mspc_product(&m, isa, x.start, is_bfloat16, tokens, y.start, planes, threads);
    if (isa == 0) add_to_digest(y.start, tokens * m.rows, is_bfloat16);
    x.release(), y.release();
  }
  out.release(), entries.release(), keep.release();
}

// A decoder of one block, with sizes that leave tails everywhere, and its matrices apart or joined.
void step() {
  int64_t batch = 1 + below(3), kv_heads = 1 + below(3), heads = kv_heads * (1 + below(3)), dim = 2 + 2 * below(20);
  int64_t hidden = 1 + below(70), intermediate = 1 + below(70), length = 1 + below(140);
  int64_t queries = heads * dim, keys = kv_heads * dim, qkv = below(2) ? 3 : 1, gate_up = 1 + below(2);
  const int64_t contents[] = {8, 4, 3, 2, kBfloat16, kFloat32};
  int64_t rows[] = {qkv == 3 ? queries : queries + 2 * keys, keys, keys, hidden,
                    gate_up == 2 ? intermediate : 2 * intermediate, intermediate, hidden};
  int64_t columns[] = {hidden, hidden, hidden, queries, hidden, hidden, intermediate};
  Case cases[7];
  Memory biases[7], of_layer[9], of_decoder[3];
  mspc_part parts[7];
  for (int64_t i = 0; i < 7; i++) {
    mspc_matrix &m = cases[i].m;
    m.rows = rows[i], m.columns = m.group = columns[i], m.content = one_of(contents);
    make(cases[i]);
    if (below(2)) biases[i].take(4 * m.rows);
    parts[i] = mspc_part{&m, reinterpret_cast<float *>(biases[i].start)};
  }
  int64_t has_norms = below(2), is_normed = below(2);
  const int64_t floats_of_layer[] = {hidden, hidden, is_normed * hidden, is_normed * hidden, has_norms * dim,
                                     has_norms * dim, length * dim, length * dim, 2 * batch * keys * length};
  for (int64_t i = 0; i < 9; i++)
    if (floats_of_layer[i]) of_layer[i].take(4 * floats_of_layer[i]);
  auto of = [](Memory &memory) { return reinterpret_cast<float *>(memory.start); };
  mspc_layer layer{qkv, gate_up, {parts[0], parts[1], parts[2]}, parts[3], {parts[4], parts[5]}, parts[6],
                   of(of_layer[0]), of(of_layer[1]), of(of_layer[2]), of(of_layer[3]), of(of_layer[4]),
                   of(of_layer[5]), of(of_layer[6]), of(of_layer[7]), of(of_layer[8]), below(length + 1)};
  of_decoder[0].take(4 * hidden);
  mspc_decoder decoder{batch, hidden, intermediate, heads, kv_heads, dim, length, 1, 0, 1 + below(2), below(2), 1e-5,
                       0.1, 1.0, of(of_decoder[0]), &layer};
  of_decoder[1].take(4 * mspc_step_floats(&decoder)), of_decoder[2].take(4 * batch * hidden);
  for (int64_t isa = 0; isa < 3; isa++) {
    decoder.isa = isa;
    if (mspc_has(isa)) mspc_step(&decoder, of(of_decoder[2]), below(length), of(of_decoder[1]), 1 + below(2));
  }
  for (Memory &memory : biases) memory.release();
  for (Memory &memory : of_layer) memory.release();
  for (Memory &memory : of_decoder) memory.release();
}

}  // namespace

int main(int count, char **given) {
  int64_t rounds = count > 1 ? atoll(given[1]) : 1000, taken = 0;
  int64_t seed = count > 2 ? atoll(given[2]) : 0;
  for (int64_t round = 0; round < rounds; round++) {
    Case made;
    engine.seed(uint64_t(2 * (seed * rounds + round)));
    describe(made.m);
    make(made);
    if (!made.fits()) {
      printf("round %ld: a matrix that is whole was refused\n", long(round));
      return 1;
    }
    use(made.m);
    engine.seed(uint64_t(2 * (seed * rounds + round) + 1));
    for (int64_t i = 1 + below(2); i; i--) spoil(made);
    if (!made.fits()) continue;
    taken++;
    use(made.m);
  }
  for (int64_t round = 0; round < rounds / 4; round++) step();
  printf("%ld whole, %ld spoiled and taken, %ld refused, %016lx\n", long(rounds), long(taken), long(rounds - taken),
         (unsigned long)digest);
  return 0;
}
