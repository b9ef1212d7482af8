// What instructions do, by their PTX names; and how to write down an operation of one line.
#pragma once

#include "machine.h"

namespace device {

// `active` are the threads that take part; it is never empty.
using Operation = void (*)(Machine&, const Instruction&, Mask active);

// Those that the schedule itself performs: they have numbers of their own, and no function.
enum Control : s32 { BRANCH, RETURN, BARRIER, N_CONTROLS };

void define(const std::string& name, Operation operation);
Operation operation(s32 number);
s32 operation_number(const std::string& name);  // -1 for none

void define_integers();
void define_bits();
void define_floats();
void define_conversions();
void define_exchanges();
void define_transfers();
void define_matrices();
void define_products();

template <class Body>
void for_each(Mask active, Body body) {
  if (active == ALL) {
    for (int lane = 0; lane < WARP; lane++) body(lane);
  } else {
    for (int lane = 0; lane < WARP; lane++) {
      if (active >> lane & 1) body(lane);
    }
  }
}

// In these, F is a lambda that captures nothing: only its type is used.
template <class To, class From, class F>
void unary(const std::string& name, F) {
  define(name, [](Machine& m, const Instruction& i, Mask active) {
    u64* to = m.target(i, 0);
    const u64* x = m.source(i, 0);
    for_each(active, [&](int lane) { put<To>(to, lane, To(F{}(get<From>(x, lane)))); });
  });
}

template <class To, class From, class F, class Second = From>
void binary(const std::string& name, F) {
  define(name, [](Machine& m, const Instruction& i, Mask active) {
    u64* to = m.target(i, 0);
    const u64 *x = m.source(i, 0), *y = m.source(i, 1);
    for_each(active, [&](int lane) { put<To>(to, lane, To(F{}(get<From>(x, lane), get<Second>(y, lane)))); });
  });
}

template <class To, class From, class Third, class F>
void ternary(const std::string& name, F) {
  define(name, [](Machine& m, const Instruction& i, Mask active) {
    u64* to = m.target(i, 0);
    const u64 *x = m.source(i, 0), *y = m.source(i, 1), *z = m.source(i, 2);
    for_each(active, [&](int lane) {
      put<To>(to, lane, To(F{}(get<From>(x, lane), get<From>(y, lane), get<Third>(z, lane))));
    });
  });
}

}  // namespace device
