// Products in plain C++, for every processor; and the dense weight.
#include "between.h"
#include "inputs.h"
#include "panels.h"

namespace {

struct Product {
  const mspc_matrix &m;
  const Inputs &in;
  int64_t first_block, last_block;
  const Outputs &out;

  template <int64_t kStructure, int64_t kContent>
  void operator()() {
    for (int64_t block = first_block; block < last_block; block++) {
      for (int64_t token = 0; token < in.tokens; token++) {
        Reader<kStructure, kContent> reader(m, block);
        float sums[kRows] = {};
        if constexpr (kContent <= 8)
          multiply_codes(reader, block, token, sums);
        else
          multiply_values<kContent>(reader, token, sums);
        store(m, out, token, block, sums);
      }
    }
  }

  template <class Reader>
  void multiply_codes(Reader &reader, int64_t block, int64_t token, float *sums) {
    int64_t padded = padded_group(m), step = 0, chunk = token * num_chunks(m), position = token * in.stride;
    for (int64_t group = 0; group < num_groups(m); group++) {
      const uint16_t *scales = m.scales + (block * num_groups(m) + group) * kRows;
      const uint8_t *zeros = m.zeros ? m.zeros + (block * num_groups(m) + group) * kRows : nullptr;
      for (int64_t first = 0; first < padded; first += kChunk, chunk++) {
        int64_t steps = smaller(kChunk, padded - first) / Reader::kSpan;
        int32_t total[kRows] = {};
        for (int64_t i = 0; i < steps; i++, step++, position += Reader::kSpan) add_step(reader, step, position, zeros, total);
        for (int64_t row = 0; row < kRows; row++)
          sums[row] += from_float16(scales[row]) * (in.scales[chunk] * float(total[row]));
      }
    }
  }

  template <class Reader>
  void add_step(Reader &reader, int64_t step, int64_t position, const uint8_t *zeros, int32_t *total) {
    uint32_t entries[Reader::kLanes];
    int8_t places[Reader::kLanes];
    reader.next(step, entries, places);
    int32_t middle = 1 << (m.content - 1);
    for (int64_t lane = 0; lane < Reader::kLanes; lane++) {
      if (places[lane] < 0) continue;
      int64_t row = lane / 4, at = position + places[lane];
      int32_t x = in.planes == 2 ? in.high[at] * 256 + in.low[at] : in.high[at];
      total[row] += (int32_t(entries[lane]) - (zeros ? zeros[row] : middle)) * x;
    }
  }

  template <int64_t kContent, class Reader>
  void multiply_values(Reader &reader, int64_t token, float *sums) {
    const float *x = in.x + token * in.stride;
    int64_t steps = num_positions(m) / Reader::kSpan;
    for (int64_t step = 0; step < steps; step++, x += Reader::kSpan) {
      uint32_t entries[Reader::kLanes];
      int8_t places[Reader::kLanes];
      reader.next(step, entries, places);
      for (int64_t lane = 0; lane < Reader::kLanes; lane++) {
        if (places[lane] < 0) continue;
        int64_t row = kContent == kFloat32 ? lane % kRows : lane / Reader::kSlots;
        sums[row] += value_of<kContent>(entries[lane]) * x[places[lane]];
      }
    }
  }
};

void product(const mspc_matrix &m, const Inputs &in, int64_t first_block, int64_t last_block, const Outputs &out) {
  visit(m, Product{m, in, first_block, last_block, out});
}

struct Expansion {
  const mspc_matrix &m;
  int64_t block;
  float *out;  // (rows of the block, columns)

  template <int64_t kStructure, int64_t kContent>
  void operator()() {
    using Panel = Reader<kStructure, kContent>;
    Panel reader(m, block);
    int64_t rows = smaller(kRows, m.rows - block * kRows), padded = padded_group(m);
    for (int64_t i = 0; i < rows * m.columns; i++) out[i] = 0;
    int64_t step = 0;
    for (int64_t group = 0; group < num_groups(m); group++) {
      float scales[kRows];
      int32_t zeros[kRows];
      if (kContent <= 8) load_grid(group, scales, zeros);
      for (int64_t first = 0; first < padded; first += Panel::kSpan, step++) {
        uint32_t entries[Panel::kLanes];
        int8_t places[Panel::kLanes];
        reader.next(step, entries, places);
        for (int64_t lane = 0; lane < Panel::kLanes; lane++) {
          int64_t row = kContent == kFloat32 ? lane % kRows : lane / Panel::kSlots, column = first + places[lane];
          if (places[lane] < 0 || row >= rows || column >= m.group) continue;
          float &weight = out[row * m.columns + group * m.group + column];
          if constexpr (kContent <= 8)
            weight = float(int32_t(entries[lane]) - zeros[row]) * scales[row];
          else
            weight = value_of<kContent>(entries[lane]);
        }
      }
    }
  }

  void load_grid(int64_t group, float *scales, int32_t *zeros) const {
    for (int64_t row = 0; row < kRows; row++) {
      int64_t at = (block * num_groups(m) + group) * kRows + row;
      scales[row] = from_float16(m.scales[at]);
      zeros[row] = m.zeros ? m.zeros[at] : 1 << (m.content - 1);
    }
  }
};

}  // namespace

extern const Kernels portable_kernels;
const Kernels portable_kernels = {prepare, product, kBetween};

void expand_block(const mspc_matrix &m, int64_t block, float *out);
void expand_block(const mspc_matrix &m, int64_t block, float *out) { visit(m, Expansion{m, block, out}); }
