// Reads and writes the entries of a block of 16 rows, step by step, in plain C++.
//
// A step is a line of `lanes` entries: codes are (16 rows, 4 slots), 16-bit values (16 rows, 2 slots), float32 values
// (slots, 16 rows), with 2 slots at 2:4 and else 1.
#pragma once
#include "interface.h"

namespace {

struct Shape {
  int64_t slots, lanes, span;  // entries of a row, entries, and positions of a step
  int64_t steps;               // of a block
  bool by_row;                 // entries of a row are neighbours

  explicit Shape(const mspc_matrix &m) {
    bool two_four = m.structure == kTwoFour;
    slots = has_codes(m) ? 4 : m.content == kFloat32 ? (two_four ? 2 : 1) : 2;
    by_row = m.content != kFloat32;
    lanes = kRows * slots;
    span = two_four ? 2 * slots : slots;
    steps = num_positions(m) / span;
  }
  int64_t lane(int64_t row, int64_t slot) const { return by_row ? row * slots + slot : slot * kRows + row; }
  int64_t row(int64_t lane) const { return by_row ? lane / slots : lane % kRows; }
  int64_t slot(int64_t lane) const { return by_row ? lane % slots : lane / kRows; }
};

// Bits of the fields of a byte of kept codes; int3 has its third bits apart.
inline int64_t field_bits(int64_t content) { return content == 3 ? 2 : content; }
inline int64_t value_bytes(int64_t content) { return content == kFloat32 ? 4 : 2; }

// Bytes of a block where its size does not depend on its content.
inline int64_t block_bytes(const mspc_matrix &m) {
  Shape shape(m);
  return has_codes(m) ? shape.steps * 8 * m.content : shape.steps * shape.lanes * value_bytes(m.content);
}

// Lines of a block behind a bitmap: values have one for each step, and codes one for each byte of kept codes.
inline int64_t num_lines(const mspc_matrix &m) {
  return Shape(m).steps / (has_codes(m) ? 8 / field_bits(m.content) : 1);
}

// The byte of kept codes in which all fields are the zero point.
inline uint8_t byte_of_zeros(int64_t content, uint32_t zero) {
  uint32_t byte = 0;
  for (int64_t at = 0; at < 8; at += field_bits(content)) byte |= zero << at;
  return uint8_t(byte);
}

// First byte of the lines of the four steps of codes that `step` belongs to.
inline int64_t line_of_codes(int64_t content, int64_t step) {
  int64_t of_field = 8 / field_bits(content), bytes = content == 3 ? 96 : 64;
  return step / of_field * bytes;
}

// The entries of one block in turn.
template <int64_t kStructure, int64_t kContent>
struct Reader {
  static constexpr bool kCodes = kContent <= 8;
  static constexpr int64_t kField = kContent == 3 ? 2 : kContent;
  static constexpr int64_t kFields = kCodes ? 8 / (kCodes ? kField : 1) : 1;
  static constexpr int64_t kBytes = kCodes ? 1 : kContent == kFloat32 ? 4 : 2;
  static constexpr int64_t kSlots = kCodes ? 4 : kContent != kFloat32 ? 2 : kStructure == kTwoFour ? 2 : 1;
  static constexpr int64_t kLanes = kRows * kSlots;
  static constexpr int64_t kSpan = kStructure == kTwoFour ? 2 * kSlots : kSlots;

  const uint8_t *kept, *marks;
  uint32_t of_line[kStructure == kBitmap ? kLanes : 1];

  Reader(const mspc_matrix &m, int64_t block) {
    if (kStructure == kBitmap) {
      kept = m.kept + m.starts[block];
      marks = m.marks + block * num_lines(m) * (kLanes / 8);
    } else {
      kept = m.kept + block * block_bytes(m);
      marks = kStructure == kTwoFour ? m.marks + block * num_positions(m) / kUnit * 64 : nullptr;
    }
  }

  static uint32_t raw(const uint8_t *from) {
    uint32_t value = 0;
    __builtin_memcpy(&value, from, kBytes);
    return value;
  }

  // Entries of a step, and the position of each within the step. Absent ones have the position -1 and no entry.
  void next(int64_t step, uint32_t *entries, int8_t *places) {
    if (kStructure == kBitmap) {
      next_of_bitmap(step, entries, places);
      return;
    }
    const uint8_t *line = kept + (kCodes ? line_of_codes(kContent, step) : step * kLanes * kBytes);
    int64_t shift = kCodes ? step % kFields * kField : 0;
    for (int64_t lane = 0; lane < kLanes; lane++) {
      entries[lane] = kCodes ? (uint32_t(line[lane]) >> shift) & ((1u << kField) - 1) : raw(line + lane * kBytes);
      if (kContent == 3) entries[lane] |= uint32_t(line[64 + 8 * (step % 4) + lane / 8] >> (lane % 8) & 1) << 2;
      int64_t row = kContent == kFloat32 ? lane % kRows : lane / kSlots;
      int64_t slot = kContent == kFloat32 ? lane / kRows : lane % kSlots;
      places[lane] = int8_t(kStructure == kTwoFour ? place(step, row, slot) : slot);
    }
  }

  // 2:4: position within the step of the weight in this slot. Kept weight k of a unit is at bit 8 (k mod 4) + 2 (k div
  // 4) of the 32 bits of its row.
  int64_t place(int64_t step, int64_t row, int64_t slot) const {
    int64_t number = step * kSlots + slot, k = number % 16;
    const uint8_t *of_row = marks + number / 16 * 64 + 4 * row;
    return (of_row[k % 4] >> (2 * (k / 4)) & 3) + slot / 2 * 4;
  }

  void next_of_bitmap(int64_t step, uint32_t *entries, int8_t *places) {
    const uint8_t *mask = marks + step / kFields * (kLanes / 8);
    int64_t shift = kCodes ? step % kFields * kField : 0;
    for (int64_t lane = 0; lane < kLanes; lane++) {
      places[lane] = -1;
      entries[lane] = 0;
      if (!(mask[lane / 8] >> (lane % 8) & 1)) continue;
      if (step % kFields == 0) of_line[lane] = raw(kept), kept += kBytes;
      places[lane] = int8_t(kContent == kFloat32 ? lane / kRows : lane % kSlots);
      entries[lane] = kCodes ? (of_line[lane] >> shift) & ((1u << kField) - 1) : of_line[lane];
    }
  }
};

template <int64_t kContent>
inline float value_of(uint32_t entry) {
  return kContent == kBfloat16 ? from_bfloat16(uint16_t(entry))
         : kContent == kFloat16 ? from_float16(uint16_t(entry))
                                : float_of(entry);
}

// Call visitor.template operator()<structure, content>() with those of the matrix.
template <int64_t kStructure, class Visitor>
inline void visit_content(int64_t content, Visitor &visitor) {
  switch (content) {
    case 8: visitor.template operator()<kStructure, 8>(); break;
    case 4: visitor.template operator()<kStructure, 4>(); break;
    case 3: visitor.template operator()<kStructure, 3>(); break;
    case 2: visitor.template operator()<kStructure, 2>(); break;
    case kBfloat16: visitor.template operator()<kStructure, kBfloat16>(); break;
    case kFloat16: visitor.template operator()<kStructure, kFloat16>(); break;
    case kFloat32: visitor.template operator()<kStructure, kFloat32>(); break;
  }
}

template <class Visitor>
inline void visit(const mspc_matrix &m, Visitor visitor) {
  switch (m.structure) {
    case kDense: visit_content<kDense>(m.content, visitor); break;
    case kTwoFour: visit_content<kTwoFour>(m.content, visitor); break;
    case kBitmap: visit_content<kBitmap>(m.content, visitor); break;
  }
}

}  // namespace
