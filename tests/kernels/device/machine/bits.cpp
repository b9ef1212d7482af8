// Logic, shifts, fields and bytes.

#include <algorithm>

#include "operations.h"

namespace device {

namespace {

template <class U>
void logical(const std::string& type) {
  binary<U, U>("and." + type, [](U x, U y) { return x & y; });
  binary<U, U>("or." + type, [](U x, U y) { return x | y; });
  binary<U, U>("xor." + type, [](U x, U y) { return x ^ y; });
}

// Shifts by more than all bits give what a shift by all bits gives.
template <class U, class S>
void shifted(const std::string& bits) {
  constexpr u32 ALL_BITS = sizeof(U) * 8;
  auto right = [](U x, u32 n) { return n >= ALL_BITS ? U(0) : U(x >> n); };
  auto left = [](U x, u32 n) { return n >= ALL_BITS ? U(0) : U(x << n); };
  auto arithmetic = [](S x, u32 n) { return x >> std::min(n, ALL_BITS - 1); };
  binary<U, U, decltype(left), u32>("shl.b" + bits, left);
  binary<U, U, decltype(right), u32>("shr.u" + bits, right);
  binary<U, U, decltype(right), u32>("shr.b" + bits, right);
  binary<S, S, decltype(arithmetic), u32>("shr.s" + bits, arithmetic);
}

template <class U>
U low_bits(u32 n) {
  return n >= sizeof(U) * 8 ? ~U(0) : (U(1) << n) - 1;
}

// n bits of x from `first` on; where the field leaves x, or is signed, its highest bit in x goes on.
template <class U, bool IS_SIGNED>
U field(U x, u32 first, u32 n) {
  constexpr u32 ALL_BITS = sizeof(U) * 8;
  first &= 255, n &= 255;
  if (n == 0) return 0;
  bool sign = IS_SIGNED && (x >> std::min(first + n - 1, ALL_BITS - 1) & 1);
  U found = first >= ALL_BITS ? 0 : x >> first;
  u32 inside = first >= ALL_BITS ? 0 : std::min(n, ALL_BITS - first);
  U kept = low_bits<U>(inside);
  return (found & kept) | (sign ? ~kept : 0);
}

// x in n bits of y from `first` on.
template <class U>
U with_field(U x, U y, u32 first, u32 n) {
  first &= 255, n &= 255;
  if (first >= sizeof(U) * 8) return y;
  U mask = low_bits<U>(n) << first;
  return (y & ~mask) | (x << first & mask);
}

template <class U>
void define_with_field(const std::string& name) {
  define(name, [](Machine& m, const Instruction& i, Mask active) {
    for_each(active, [&](int lane) {
      U x = get<U>(m.source(i, 0), lane), y = get<U>(m.source(i, 1), lane);
      u32 first = get<u32>(m.source(i, 2), lane), n = get<u32>(m.source(i, 3), lane);
      put<U>(m.target(i, 0), lane, with_field(x, y, first, n));
    });
  });
}

u32 permuted(u32 x, u32 y, u32 selector) {
  u64 bytes = u64(y) << 32 | x;
  u32 found = 0;
  for (int k = 0; k < 4; k++) {
    u32 nibble = selector >> (4 * k) & 15, byte = bytes >> (8 * (nibble & 7)) & 255;
    if (nibble & 8) byte = byte & 128 ? 255 : 0;
    found |= byte << (8 * k);
  }
  return found;
}

// Any function of three bits, by its table.
void define_lop3() {
  define("lop3.b32", [](Machine& m, const Instruction& i, Mask active) {
    for_each(active, [&](int lane) {
      u32 word[4], found = 0;
      for (int k = 0; k < 4; k++) word[k] = get<u32>(m.source(i, k), lane);
      for (int bit = 0; bit < 32; bit++) {
        u32 entry = (word[0] >> bit & 1) << 2 | (word[1] >> bit & 1) << 1 | (word[2] >> bit & 1);
        found |= (word[3] >> entry & 1) << bit;
      }
      put<u32>(m.target(i, 0), lane, found);
    });
  });
}

template <class Half, class Whole>
void packed(const std::string& bits) {
  binary<Whole, Half>("pack." + bits, [](Half low, Half high) {
    return Whole(low) | Whole(high) << (sizeof(Half) * 8);
  });
  define("unpack." + bits, [](Machine& m, const Instruction& i, Mask active) {
    u64 *low = m.target(i, 0), *high = m.target(i, 1);
    const u64* x = m.source(i, 0);
    for_each(active, [&](int lane) {
      Whole whole = get<Whole>(x, lane);
      put<Half>(low, lane, Half(whole));
      put<Half>(high, lane, Half(whole >> (sizeof(Half) * 8)));
    });
  });
}

}  // namespace

void define_bits() {
  logical<u8>("pred"), logical<u16>("b16"), logical<u32>("b32"), logical<u64>("b64");
  unary<u8, u8>("not.pred", [](u8 x) { return !x; });
  unary<u16, u16>("not.b16", [](u16 x) { return ~x; });
  unary<u32, u32>("not.b32", [](u32 x) { return ~x; });
  unary<u64, u64>("not.b64", [](u64 x) { return ~x; });
  shifted<u16, s16>("16"), shifted<u32, s32>("32"), shifted<u64, s64>("64");
  define_with_field<u32>("bfi.b32"), define_with_field<u64>("bfi.b64");
  ternary<u32, u32, u32>("bfe.u32", [](u32 x, u32 y, u32 n) { return field<u32, false>(x, y, n); });
  ternary<u32, u32, u32>("bfe.s32", [](u32 x, u32 y, u32 n) { return field<u32, true>(x, y, n); });
  ternary<u64, u64, u32>("bfe.u64", [](u64 x, u64 y, u32 n) { return field<u64, false>(x, u32(y), n); });
  ternary<u64, u64, u32>("bfe.s64", [](u64 x, u64 y, u32 n) { return field<u64, true>(x, u32(y), n); });
  packed<u16, u32>("b32"), packed<u32, u64>("b64");
  ternary<u32, u32, u32>("prmt.b32", [](u32 x, u32 y, u32 selector) { return permuted(x, y, selector); });
  ternary<u32, u32, u32>("shf.l.wrap.b32", [](u32 x, u32 y, u32 n) {
    return u32((u64(y) << 32 | x) << (n & 31) >> 32);
  });
  ternary<u32, u32, u32>("shf.r.wrap.b32", [](u32 x, u32 y, u32 n) {
    return u32((u64(y) << 32 | x) >> (n & 31));
  });
  unary<u32, u32>("popc.b32", [](u32 x) { return u32(__builtin_popcount(x)); });
  unary<u32, u32>("clz.b32", [](u32 x) { return u32(x ? __builtin_clz(x) : 32); });
  define_lop3();
}

}  // namespace device
