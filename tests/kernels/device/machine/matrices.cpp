// Loads and stores of 8 × 8 matrices of 16 bits by a whole warp: ldmatrix and stmatrix.

#include "fragments.h"
#include "operations.h"

namespace device {

namespace {

// Threads 8·k to 8·k + 7 have the addresses of the rows of matrix k.
template <int N, bool TRANSPOSED>
void load_matrices(Machine& m, const Instruction& i, Mask active) {
  if (active != ALL) return m.report(DIVERGED, i, 0, 0, active);
  u64 addresses[WARP];
  std::memcpy(addresses, m.source(i, 0), sizeof addresses);
  for (int k = 0; k < N; k++) {
    u16 rows[8][8];
    for (int row = 0; row < 8; row++) {
      int lane = 8 * k + row;
      m.load_shared(i, lane, addresses[lane] + i.offset, reinterpret_cast<u8*>(rows[row]), 16);
    }
    for (int lane = 0; lane < WARP; lane++) {
      int row = group_of(lane), column = pair_of(lane);
      u32 low = TRANSPOSED ? rows[column][row] : rows[row][column];
      u32 high = TRANSPOSED ? rows[column + 1][row] : rows[row][column + 1];
      put<u32>(m.target(i, k), lane, low | high << 16);
    }
  }
}

template <int N, bool TRANSPOSED>
void store_matrices(Machine& m, const Instruction& i, Mask active) {
  if (active != ALL) return m.report(DIVERGED, i, 0, 0, active);
  for (int k = 0; k < N; k++) {
    u16 rows[8][8];
    for (int lane = 0; lane < WARP; lane++) {
      u32 two = get<u32>(m.source(i, 1 + k), lane);
      int row = group_of(lane), column = pair_of(lane);
      (TRANSPOSED ? rows[column][row] : rows[row][column]) = u16(two);
      (TRANSPOSED ? rows[column + 1][row] : rows[row][column + 1]) = u16(two >> 16);
    }
    for (int row = 0; row < 8; row++) {
      int lane = 8 * k + row;
      u64 address = m.source(i, 0)[lane] + i.offset;
      m.store_shared(i, lane, address, reinterpret_cast<u8*>(rows[row]), 16);
    }
  }
}

template <int N>
void of_number(const std::string& number) {
  define("ldmatrix.x" + number, load_matrices<N, false>);
  define("ldmatrix.x" + number + ".trans", load_matrices<N, true>);
  define("stmatrix.x" + number, store_matrices<N, false>);
  define("stmatrix.x" + number + ".trans", store_matrices<N, true>);
}

}  // namespace

void define_matrices() { of_number<1>("1"), of_number<2>("2"), of_number<4>("4"); }

}  // namespace device
