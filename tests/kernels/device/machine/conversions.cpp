// Conversions between types of numbers: cvt.

#include <limits>

#include "operations.h"

namespace device {

namespace {

template <class T>
const char* name_of();
template <> const char* name_of<u8>() { return "u8"; }
template <> const char* name_of<s8>() { return "s8"; }
template <> const char* name_of<u16>() { return "u16"; }
template <> const char* name_of<s16>() { return "s16"; }
template <> const char* name_of<u32>() { return "u32"; }
template <> const char* name_of<s32>() { return "s32"; }
template <> const char* name_of<u64>() { return "u64"; }
template <> const char* name_of<s64>() { return "s64"; }

template <class To, class From>
void between_integers() {
  unary<To, From>(std::string("cvt.") + name_of<To>() + "." + name_of<From>(), [](From x) { return To(x); });
}

template <class From>
void from_integer() {
  between_integers<u8, From>(), between_integers<s8, From>();
  between_integers<u16, From>(), between_integers<s16, From>();
  between_integers<u32, From>(), between_integers<s32, From>();
  between_integers<u64, From>(), between_integers<s64, From>();
  unary<f32, From>(std::string("cvt.rn.f32.") + name_of<From>(), [](From x) { return f32(x); });
}

// Toward zero; what does not fit becomes the nearest that does, and what is no number 0.
template <class To>
void to_integer() {
  unary<To, f32>(std::string("cvt.rzi.") + name_of<To>() + ".f32", [](f32 x) {
    using Limits = std::numeric_limits<To>;
    if (x != x) return To(0);
    if (f64(x) <= f64(Limits::min())) return Limits::min();
    return f64(x) >= f64(Limits::max()) ? Limits::max() : To(x);
  });
}

template <class Narrow, class F>
void narrow(const std::string& type, F) {
  unary<f32, Narrow>("cvt.f32." + type, [](Narrow x) { return f32(x); });
  unary<Narrow, f32>("cvt.rn." + type + ".f32", [](f32 x) { return F{}(x); });
  binary<u32, f32>("cvt.rn." + type + "x2.f32", [](f32 high, f32 low) {
    return u32(F{}(high).bits) << 16 | F{}(low).bits;
  });
}

}  // namespace

void define_conversions() {
  from_integer<u8>(), from_integer<s8>(), from_integer<u16>(), from_integer<s16>();
  from_integer<u32>(), from_integer<s32>(), from_integer<u64>(), from_integer<s64>();
  to_integer<u32>(), to_integer<s32>(), to_integer<u64>(), to_integer<s64>();
  narrow<half>("f16", [](f32 x) { return to_half(x); });
  narrow<bfloat>("bf16", [](f32 x) { return to_bfloat(x); });
  unary<f32, f32>("cvt.rmi.f32.f32", [](f32 x) { return std::floor(x); });
  unary<f32, f32>("cvt.rpi.f32.f32", [](f32 x) { return std::ceil(x); });
  unary<f32, f32>("cvt.rzi.f32.f32", [](f32 x) { return std::trunc(x); });
  unary<f32, f32>("cvt.rni.f32.f32", [](f32 x) { return std::nearbyint(x); });
}

}  // namespace device
