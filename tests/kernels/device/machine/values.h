// What registers hold: 64 bits for each thread of a warp, read and written as numbers of any type.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

namespace device {

using u8 = uint8_t;
using u16 = uint16_t;
using u32 = uint32_t;
using u64 = uint64_t;
using s8 = int8_t;
using s16 = int16_t;
using s32 = int32_t;
using s64 = int64_t;
using f32 = float;
using f64 = double;
using u128 = unsigned __int128;
using s128 = __int128;

constexpr int WARP = 32;
using Mask = u32;  // threads of a warp, one bit each
constexpr Mask ALL = ~0u;

template <class T>
T get(const u64* lanes, int lane) {
  T value;
  std::memcpy(&value, lanes + lane, sizeof value);
  return value;
}

template <class T>
void put(u64* lanes, int lane, T value) {
  u64 word = 0;
  std::memcpy(&word, &value, sizeof value);
  lanes[lane] = word;
}

template <class To, class From>
To as(From value) {
  static_assert(sizeof(To) == sizeof(From));
  To same;
  std::memcpy(&same, &value, sizeof same);
  return same;
}

// float16, as its bits. Every one of its numbers is a float32.
struct half {
  u16 bits;
  operator f32() const {
    u32 sign = u32(bits & 0x8000) << 16, exponent = bits >> 10 & 31, fraction = bits & 0x3FF;
    if (exponent == 0) return std::copysign(std::ldexp(f32(fraction), -24), as<f32>(sign | 0x3F800000));
    if (exponent == 31) return as<f32>(sign | 0x7F800000 | fraction << 13);
    return as<f32>(sign | (exponent + 112) << 23 | fraction << 13);
  }
};

// bfloat16: the upper half of a float32.
struct bfloat {
  u16 bits;
  operator f32() const { return as<f32>(u32(bits) << 16); }
};

// To the nearest, ties to even.
inline half to_half(f32 value) {
  u32 word = as<u32>(value), magnitude = word & 0x7FFFFFFF;
  u16 sign = word >> 16 & 0x8000;
  if (magnitude > 0x7F800000) return {0x7FFF};                      // not a number
  if (magnitude >= 0x477FF000) return {u16(sign | 0x7C00)};         // 65520 and more
  if (magnitude < 0x38800000) {                                     // below 2^-14: multiples of 2^-24
    return {u16(sign | u16(std::nearbyint(std::ldexp(as<f32>(magnitude), 24))))};
  }
  u32 rounded = magnitude + 0xFFF + (magnitude >> 13 & 1);
  return {u16(sign | ((rounded - 0x38000000) >> 13))};
}

inline bfloat to_bfloat(f32 value) {
  u32 word = as<u32>(value);
  if (value != value) return {0x7FFF};
  return {u16((word + 0x7FFF + (word >> 16 & 1)) >> 16)};
}

// Subnormal numbers count as zero where an instruction says .ftz.
inline f32 flushed(f32 value) { return std::fabs(value) < 0x1p-126f ? std::copysign(0.0f, value) : value; }

// The other number where one is none; -0 is below +0.
inline f32 smaller(f32 x, f32 y) {
  if (x != x) return y;
  if (y != y) return x;
  if (x == y) return std::signbit(x) ? x : y;
  return x < y ? x : y;
}

inline f32 larger(f32 x, f32 y) {
  if (x != x) return y;
  if (y != y) return x;
  if (x == y) return std::signbit(x) ? y : x;
  return x > y ? x : y;
}

}  // namespace device
