// Products of matrices: mma (a warp) and wgmma (four warps, asynchronous, from shared memory).
//
// Sums are made in float64 and rounded once; tensor cores round in an order of their own.

#include "fragments.h"
#include "operations.h"

namespace device {

namespace {

// Sources: four registers of A, two of B, four of what is added.
void multiply(Machine& m, const Instruction& i, Mask active) {
  if (active != ALL) return m.report(DIVERGED, i, 0, 0, active);
  const u64* of_a[4] = {m.source(i, 0), m.source(i, 1), m.source(i, 2), m.source(i, 3)};
  const u64* of_b[2] = {m.source(i, 4), m.source(i, 5)};
  f32 a[16][16], b[16][8];
  gather_a(of_a, a), gather_b(of_b, b);
  for (int lane = 0; lane < WARP; lane++) {
    for (int k = 0; k < 4; k++) {
      f64 sum = get<f32>(m.source(i, 6 + k), lane);
      for (int j = 0; j < 16; j++) sum += f64(a[row_of(lane, k)][j]) * b[j][column_of(lane, k)];
      put<f32>(m.target(i, k), lane, f32(sum));
    }
  }
}

// Flags of a wgmma: where A is, and which dimension of an operand is the inner one in shared memory.
enum Flags : s32 { A_IN_REGISTERS = 1, A_TRANSPOSED = 2, B_TRANSPOSED = 4 };

// Where a descriptor has the number at (row, k): PTX ISA, "Shared memory matrix layout" and "swizzling".
u32 place(u64 descriptor, int row, int k, bool transposed) {
  auto field = [&](int at) { return u32(descriptor >> at & 0x3FFF) << 4; };
  u32 start = field(0), leading = field(16), stride = field(32);
  constexpr u32 WIDTHS[4] = {16, 128, 64, 32}, SWIZZLES[4] = {0, 7, 3, 1};
  u32 mode = descriptor >> 62, width = WIDTHS[mode], address;
  if (transposed) {
    u32 across = width / 2;  // numbers of a row of the layout
    address = start + k / 8 * stride + k % 8 * width + row / across * leading + row % across * 2;
  } else {
    address = start + row / 8 * stride + row % 8 * width + k * 2 / width * leading + k * 2 % width;
  }
  return address ^ (address >> 7 & SWIZZLES[mode]) << 4;
}

int first_row(const Machine& m) { return 16 * (m.warp_number % 4); }

// Calls `body` with every address that this warp's part of a product reads.
template <class Body>
void each_address(const Machine& m, const Product& product, Body body) {
  const Instruction& i = *product.instruction;
  for (int k = 0; k < 16; k++) {
    for (int row = 0; row < 16 && !(i.flags & A_IN_REGISTERS); row++) {
      body(place(product.a, first_row(m) + row, k, i.flags & A_TRANSPOSED));
    }
    for (int n = 0; n < 2 * i.n_targets; n++) body(place(product.b, n, k, i.flags & B_TRANSPOSED));
  }
}

f32 load_half(Machine& m, const Instruction& i, u32 address) {
  half found;
  m.load_shared(i, 0, address, reinterpret_cast<u8*>(&found), sizeof found, true);
  return found;
}

void perform(Machine& m, const Product& product) {
  const Instruction& i = *product.instruction;
  int n_columns = 2 * i.n_targets;
  f32 a[16][16];
  std::vector<f32> b(16 * n_columns);
  if (i.flags & A_IN_REGISTERS) {
    u64 lanes[4][WARP];
    for (int k = 0; k < 4; k++) std::copy_n(product.a_registers[k], WARP, lanes[k]);
    const u64* of_a[4] = {lanes[0], lanes[1], lanes[2], lanes[3]};
    gather_a(of_a, a);
  }
  for (int k = 0; k < 16; k++) {
    for (int row = 0; row < 16 && !(i.flags & A_IN_REGISTERS); row++) {
      a[row][k] = load_half(m, i, place(product.a, first_row(m) + row, k, i.flags & A_TRANSPOSED));
    }
    for (int n = 0; n < n_columns; n++) {
      b[k * n_columns + n] = load_half(m, i, place(product.b, n, k, i.flags & B_TRANSPOSED));
    }
  }
  for (int lane = 0; lane < WARP; lane++) {
    for (int e = 0; e < i.n_targets; e++) {
      f64 sum = product.adds ? get<f32>(m.target(i, e), lane) : 0;
      for (int k = 0; k < 16; k++) sum += f64(a[row_of(lane, e)][k]) * b[k * n_columns + column_of(lane, e)];
      put<f32>(m.target(i, e), lane, f32(sum));
    }
  }
}

void mark(Machine& m, const Product& product, int by) {
  each_address(m, product, [&](u32 address) {
    if (Cell* cells = m.shared_cells_at(address, 2)) cells[0].products += by, cells[1].products += by;
  });
}

// Sources: A (a descriptor, or four registers), the descriptor of B, and whether to add to the targets.
void start_product(Machine& m, const Instruction& i, Mask active) {
  if (active != ALL) return m.report(DIVERGED, i, 0, 0, active);
  Product product{&i, m.warp->product_group, false, 0, 0, {}};
  int k = 0;
  if (i.flags & A_IN_REGISTERS) {
    for (; k < 4; k++) std::copy_n(m.source(i, k), WARP, product.a_registers[k]);
  } else {
    product.a = m.source(i, k++)[0];
  }
  product.b = m.source(i, k++)[0];
  product.adds = m.source(i, k)[0] & 1;
  if (m.at_once) perform(m, product);
  mark(m, product, 1);
  m.warp->products.push_back(product);
}

void commit_products(Machine& m, const Instruction&, Mask) { m.warp->product_group++; }

void wait_for_products(Machine& m, const Instruction& i, Mask) {
  auto& products = m.warp->products;
  int group = m.warp->product_group - int(i.offset);
  for (; !products.empty() && products.front().group < group; products.pop_front()) {
    mark(m, products.front(), -1);
    if (!m.at_once) perform(m, products.front());
  }
}

}  // namespace

void define_products() {
  define("mma.m16n8k16", multiply);
  define("wgmma", start_product);
  define("wgmma.commit_group", commit_products);
  define("wgmma.wait_group", wait_for_products);
}

}  // namespace device
