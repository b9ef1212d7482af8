// How the threads of a warp share out matrices: PTX ISA, "Matrix fragments" of m16n8k16 and of wgmma.
//
// Thread 4·g + t holds neighbors 2·t and 2·t + 1 of row g of every 8 × 8 part.
#pragma once

#include "machine.h"

namespace device {

inline int group_of(int lane) { return lane / 4; }
inline int pair_of(int lane) { return 2 * (lane % 4); }

// 16 × 16 numbers from four registers of two each: parts lie below each other, then side by side.
inline void gather_a(const u64* const registers[4], f32 a[16][16]) {
  for (int lane = 0; lane < WARP; lane++) {
    for (int k = 0; k < 4; k++) {
      u32 two = get<u32>(registers[k], lane);
      int row = group_of(lane) + 8 * (k & 1), column = pair_of(lane) + 8 * (k >> 1);
      a[row][column] = half{u16(two)}, a[row][column + 1] = half{u16(two >> 16)};
    }
  }
}

// 16 × 8 numbers, column by column.
inline void gather_b(const u64* const registers[2], f32 b[16][8]) {
  for (int lane = 0; lane < WARP; lane++) {
    for (int k = 0; k < 2; k++) {
      u32 two = get<u32>(registers[k], lane);
      int row = pair_of(lane) + 8 * k;
      b[row][group_of(lane)] = half{u16(two)}, b[row + 1][group_of(lane)] = half{u16(two >> 16)};
    }
  }
}

// Where result `k` of a thread lies: row and column of 16 × 8·n numbers.
inline int row_of(int lane, int k) { return group_of(lane) + 8 * (k >> 1 & 1); }
inline int column_of(int lane, int k) { return k / 4 * 8 + pair_of(lane) + (k & 1); }

}  // namespace device
