// Arithmetic and comparisons of integers, and choices by predicates, of 16, 32 and 64 bits.

#include "operations.h"

namespace device {

namespace {

template <class U>
void wrapping(const std::string& type) {  // where signs make no difference
  binary<U, U>("add." + type, [](U x, U y) { return x + y; });
  binary<U, U>("sub." + type, [](U x, U y) { return x - y; });
  binary<U, U>("mul.lo." + type, [](U x, U y) { return u64(x) * y; });
  ternary<U, U, U>("mad.lo." + type, [](U x, U y, U z) { return u64(x) * y + z; });
}

template <class T>
void compared(const std::string& type) {
  binary<u8, T>("setp.eq." + type, [](T x, T y) { return x == y; });
  binary<u8, T>("setp.ne." + type, [](T x, T y) { return x != y; });
  binary<u8, T>("setp.lt." + type, [](T x, T y) { return x < y; });
  binary<u8, T>("setp.le." + type, [](T x, T y) { return x <= y; });
  binary<u8, T>("setp.gt." + type, [](T x, T y) { return x > y; });
  binary<u8, T>("setp.ge." + type, [](T x, T y) { return x >= y; });
}

template <class T>
void ordered(const std::string& type) {
  binary<T, T>("min." + type, [](T x, T y) { return x < y ? x : y; });
  binary<T, T>("max." + type, [](T x, T y) { return x > y ? x : y; });
}

// Division by zero gives what a GPU gives: all ones, and the dividend as the remainder.
template <class U, class S>
void divided(const std::string& bits) {
  binary<U, U>("div.u" + bits, [](U x, U y) { return y ? U(x / y) : U(-1); });
  binary<U, U>("rem.u" + bits, [](U x, U y) { return y ? U(x % y) : x; });
  binary<U, S>("div.s" + bits, [](S x, S y) { return y == 0 ? U(-1) : y == -1 ? U(-U(x)) : U(x / y); });
  binary<U, S>("rem.s" + bits, [](S x, S y) { return y == 0 ? U(x) : y == -1 ? U(0) : U(x % y); });
}

template <class U>
void chosen(const std::string& type) {
  ternary<U, U, u8>("selp." + type, [](U x, U y, u8 first) { return first & 1 ? x : y; });
  unary<U, U>("mov." + type, [](U x) { return x; });
}

template <class U, class S>
void sized(const std::string& bits) {
  for (const char* kind : {"s", "u"}) wrapping<U>(kind + bits);
  for (const char* kind : {"b", "s", "u", "f"}) chosen<U>(kind + bits);
  compared<S>("s" + bits);
  compared<U>("u" + bits);
  compared<U>("b" + bits);
  ordered<S>("s" + bits);
  ordered<U>("u" + bits);
  divided<U, S>(bits);
  unary<U, U>("neg.s" + bits, [](U x) { return U(-x); });
  unary<U, S>("abs.s" + bits, [](S x) { return x < 0 ? U(-U(x)) : U(x); });
}

}  // namespace

void define_integers() {
  sized<u16, s16>("16");
  sized<u32, s32>("32");
  sized<u64, s64>("64");
  chosen<u8>("pred");
  chosen<u16>("bf16");
  binary<u32, u32>("mul.hi.u32", [](u32 x, u32 y) { return u64(x) * y >> 32; });
  binary<u32, s32>("mul.hi.s32", [](s32 x, s32 y) { return u64(s64(x) * y) >> 32; });
  binary<u64, u64>("mul.hi.u64", [](u64 x, u64 y) { return u64(u128(x) * y >> 64); });
  binary<u64, s64>("mul.hi.s64", [](s64 x, s64 y) { return u64(s128(x) * y >> 64); });
  binary<u32, u16>("mul.wide.u16", [](u16 x, u16 y) { return u32(x) * y; });
  binary<u32, s16>("mul.wide.s16", [](s16 x, s16 y) { return u32(s32(x) * y); });
  binary<u64, u32>("mul.wide.u32", [](u32 x, u32 y) { return u64(x) * y; });
  binary<u64, s32>("mul.wide.s32", [](s32 x, s32 y) { return u64(s64(x) * y); });
  ternary<u64, u32, u64>("mad.wide.u32", [](u32 x, u32 y, u64 z) { return u64(x) * y + z; });
  ternary<u64, s32, u64>("mad.wide.s32", [](s32 x, s32 y, u64 z) { return u64(s64(x) * y) + z; });
}

}  // namespace device
