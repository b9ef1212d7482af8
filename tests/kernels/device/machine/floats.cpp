// Arithmetic and comparisons of floating-point numbers.
//
// What a GPU rounds correctly is rounded correctly here. Approximations (.approx, .full) are not bit for bit
// those of a GPU: they are made in float64 and rounded once.

#include "operations.h"

namespace device {

namespace {

constexpr bool FLUSHES = true;

template <bool FLUSHED>
f32 given(f32 x) {
  return FLUSHED ? flushed(x) : x;
}

template <bool FLUSHED>
void approximated(const std::string& suffix) {
  auto exp2 = [](f32 x) { return given<FLUSHED>(f32(std::exp2(f64(given<FLUSHED>(x))))); };
  auto log2 = [](f32 x) { return given<FLUSHED>(f32(std::log2(f64(given<FLUSHED>(x))))); };
  auto root = [](f32 x) { return given<FLUSHED>(std::sqrt(given<FLUSHED>(x))); };
  auto inverse = [](f32 x) { return given<FLUSHED>(1 / given<FLUSHED>(x)); };
  auto inverse_root = [](f32 x) { return given<FLUSHED>(f32(1 / std::sqrt(f64(given<FLUSHED>(x))))); };
  auto ratio = [](f32 x, f32 y) { return given<FLUSHED>(given<FLUSHED>(x) / given<FLUSHED>(y)); };
  unary<f32, f32>("ex2.approx" + suffix, exp2);
  unary<f32, f32>("lg2.approx" + suffix, log2);
  unary<f32, f32>("sqrt.approx" + suffix, root);
  unary<f32, f32>("sqrt.rn" + suffix, root);
  unary<f32, f32>("rcp.approx" + suffix, inverse);
  unary<f32, f32>("rcp.rn" + suffix, inverse);
  unary<f32, f32>("rsqrt.approx" + suffix, inverse_root);
  for (const char* kind : {"full", "approx", "rn"}) binary<f32, f32>("div." + (kind + suffix), ratio);
}

template <bool FLUSHED>
void arithmetic(const std::string& suffix) {
  binary<f32, f32>("add" + suffix, [](f32 x, f32 y) {
    return given<FLUSHED>(given<FLUSHED>(x) + given<FLUSHED>(y));
  });
  binary<f32, f32>("sub" + suffix, [](f32 x, f32 y) {
    return given<FLUSHED>(given<FLUSHED>(x) - given<FLUSHED>(y));
  });
  binary<f32, f32>("mul" + suffix, [](f32 x, f32 y) {
    return given<FLUSHED>(given<FLUSHED>(x) * given<FLUSHED>(y));
  });
  ternary<f32, f32, f32>("fma.rn" + suffix, [](f32 x, f32 y, f32 z) {
    return given<FLUSHED>(std::fma(given<FLUSHED>(x), given<FLUSHED>(y), given<FLUSHED>(z)));
  });
  binary<f32, f32>("min" + suffix, [](f32 x, f32 y) { return smaller(given<FLUSHED>(x), given<FLUSHED>(y)); });
  binary<f32, f32>("max" + suffix, [](f32 x, f32 y) { return larger(given<FLUSHED>(x), given<FLUSHED>(y)); });
}

// Comparisons that a number which is none fails, and those (with u) that it passes.
void compared() {
  binary<u8, f32>("setp.eq.f32", [](f32 x, f32 y) { return x == y; });
  binary<u8, f32>("setp.ne.f32", [](f32 x, f32 y) { return x < y || x > y; });
  binary<u8, f32>("setp.lt.f32", [](f32 x, f32 y) { return x < y; });
  binary<u8, f32>("setp.le.f32", [](f32 x, f32 y) { return x <= y; });
  binary<u8, f32>("setp.gt.f32", [](f32 x, f32 y) { return x > y; });
  binary<u8, f32>("setp.ge.f32", [](f32 x, f32 y) { return x >= y; });
  binary<u8, f32>("setp.equ.f32", [](f32 x, f32 y) { return !(x < y || x > y); });
  binary<u8, f32>("setp.neu.f32", [](f32 x, f32 y) { return x != y; });
  binary<u8, f32>("setp.ltu.f32", [](f32 x, f32 y) { return !(x >= y); });
  binary<u8, f32>("setp.leu.f32", [](f32 x, f32 y) { return !(x > y); });
  binary<u8, f32>("setp.gtu.f32", [](f32 x, f32 y) { return !(x <= y); });
  binary<u8, f32>("setp.geu.f32", [](f32 x, f32 y) { return !(x < y); });
  binary<u8, f32>("setp.nan.f32", [](f32 x, f32 y) { return x != x || y != y; });
  binary<u8, f32>("setp.num.f32", [](f32 x, f32 y) { return x == x && y == y; });
}

half narrowed(f32 x, half) { return to_half(x); }
bfloat narrowed(f32 x, bfloat) { return to_bfloat(x); }

// Sums and products of two numbers of at most 11 bits are rounded once, as float32 holds enough of them.
template <class T>
void narrow(const std::string& type) {
  auto sum = [](T x, T y) { return narrowed(f32(x) + f32(y), x); };
  auto difference = [](T x, T y) { return narrowed(f32(x) - f32(y), x); };
  auto product = [](T x, T y) { return narrowed(f32(x) * f32(y), x); };
  auto least = [](T x, T y) { return narrowed(smaller(x, y), x); };
  auto most = [](T x, T y) { return narrowed(larger(x, y), x); };
  binary<T, T>("add." + type, sum), binary<T, T>("sub." + type, difference);
  binary<T, T>("mul." + type, product);
  binary<T, T>("min." + type, least), binary<T, T>("max." + type, most);
  ternary<T, T, T>("fma.rn." + type, [](T x, T y, T z) {
    return narrowed(f32(std::fma(f64(f32(x)), f64(f32(y)), f64(f32(z)))), x);
  });
}

// Two numbers in a register.
template <class T>
struct pair {
  T low, high;
};

template <class T>
void paired(const std::string& type) {
  binary<pair<T>, pair<T>>("add." + type, [](pair<T> x, pair<T> y) {
    return pair<T>{narrowed(x.low + y.low, x.low), narrowed(x.high + y.high, x.low)};
  });
  binary<pair<T>, pair<T>>("sub." + type, [](pair<T> x, pair<T> y) {
    return pair<T>{narrowed(x.low - y.low, x.low), narrowed(x.high - y.high, x.low)};
  });
  binary<pair<T>, pair<T>>("mul." + type, [](pair<T> x, pair<T> y) {
    return pair<T>{narrowed(x.low * y.low, x.low), narrowed(x.high * y.high, x.low)};
  });
}

}  // namespace

void define_floats() {
  unary<f32, f32>("abs.f32", [](f32 x) { return std::fabs(x); });
  unary<f32, f32>("neg.f32", [](f32 x) { return -x; });
  arithmetic<!FLUSHES>(".f32"), arithmetic<FLUSHES>(".ftz.f32");
  approximated<!FLUSHES>(".f32"), approximated<FLUSHES>(".ftz.f32");
  compared();
  narrow<half>("f16"), narrow<bfloat>("bf16");
  paired<half>("f16x2"), paired<bfloat>("bf16x2");
}

}  // namespace device
