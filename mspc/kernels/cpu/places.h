// Where shuffles of bytes find kept entries, for instruction sets that expand nothing by a mask.
#pragma once
#include "interface.h"

namespace {

// For each mask of eight entries, where a shuffle finds those that are kept; 0x80, which gives zero, for all others.
struct Places {
  alignas(64) uint8_t first[256][16];      // bytes 0 to 7
  alignas(64) uint8_t second[256][16];     // bytes 8 to 15
  alignas(64) uint8_t halfwords[256][16];  // eight entries of 16 bits

  constexpr Places() : first(), second(), halfwords() {
    for (int mask = 0; mask < 256; mask++) {
      uint8_t found = 0;
      for (int i = 0; i < 8; i++) {
        bool kept = mask >> i & 1;
        first[mask][i] = second[mask][i + 8] = kept ? found : 0x80;
        first[mask][i + 8] = second[mask][i] = 0x80;
        halfwords[mask][2 * i] = kept ? uint8_t(2 * found) : 0x80;
        halfwords[mask][2 * i + 1] = kept ? uint8_t(2 * found + 1) : 0x80;
        found = uint8_t(found + kept);
      }
    }
  }
};

}  // namespace
